"""Videos in: the procedural world, real video, labels, text, batches.

Everything a run trains on comes through this file, in one form whatever its source:

    video    uint8 (b, t, H, W, 3)     as decoded; normalised later, on the device, inside the model
    labels   int64 (b, t, H, W)        trajectory id of each pixel, -1 = unlabelled (or None: no labels at all)
    caption  list of b strings, and `appearance` / `motion` / `label` class ids where there are any

1. The procedural world.  `script(index)` writes a scene as a few small numpy arrays (who moves where, in front of whom,
   over which ground, filmed how) together with its caption, classes and questions; `rasterise(scripts)` turns a batch
   of scripts into pixels and exact labels in torch, on any device.  The script of an index never changes: clip 17 is the
   same clip on every machine, with any number of workers, so a run's position in its data is one integer.
2. Real video.  `decode` reads T frames with PyAV by seeking, straight to the size asked for; `read_manifest` takes the
   manifests, class folders and CSV files that people have.
3. Text.  tiktoken Encodings: one learnt here from made captions, a cached tiktoken name, or a published folder.
4. Batches.  `WorldBatches`, `VideoBatches`, `Mixed`: batch number i is a pure function of (seed, i).

    python data.py bench                                         # clips a second: the procedural world, and decoding beside a plain loop
    python data.py bench --data videos/                          # ... of your own files
"""
from __future__ import annotations

import argparse
import colorsys
import contextlib
import csv
import dataclasses
import fractions
import functools
import inspect
import itertools
import json
import math
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


class BadInput(ValueError):
    """Something the user gave is wrong: the message is one line that names the value and the mend."""


class BadVideo(BadInput):
    """One file cannot be used. Loaders name it, count it and leave it out; a single-file command stops."""


def one_line_errors(main):
    """Wrap a script's main: bad input prints one line on stderr and exits with code 2, without a traceback.
    Only BadInput is caught: any other exception is a bug of ours, and its traceback is what we want to see."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted: what was saved is whole; --resume goes on from it", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# 0. What every command shares: flags from a dataclass; files, pictures and films that are whole or not there
# ---------------------------------------------------------------------------------------------------------------------

def configure(config, sizes, argv, positional=None):
    """A frozen dataclass -> an instance, from flags. Each field is a flag, the comment beside it its help.
    Defaults < sizes[--size] < flags; unknown flags and unreadable values: one line, exit code 2."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(config), re.M))
    doc = (config.__doc__ or "").strip().splitlines()[0]

    class OneLine(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(f"{message}; --help lists the flags")

    parser = OneLine(description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    if positional:
        parser.add_argument(positional)
    for field in dataclasses.fields(config):
        if field.name == positional:
            continue
        flag, text = "--" + field.name.replace("_", "-"), f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        kind = {"int": int, "float": float, "str": str, "bool": bool}[field.type.split(" |")[0]]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__, help=text)
    flags = vars(parser.parse_args(argv))
    size = flags.get("size", config.size)
    if size not in sizes:
        raise BadInput(f"--size {size}: one of {', '.join(sizes)}")
    return config(**{**sizes[size], **flags})


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as beside`: what is written to `beside` is flushed to disk and renamed at the end: a reader, or a kill, sees
    the old file or the new, never half of one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error}); give another --out, or make room") from None
    finally:
        beside.unlink(missing_ok=True)


def replace(path, write):
    with replacing(path) as beside:
        write(beside)


def write_json(path, value):
    replace(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def write_png(path, image):
    """uint8 (H, W, 3) -> a PNG file. Twelve lines of zlib save an imaging library."""
    h, w, _ = image.shape
    raw = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    replace(path, lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")))


def palette(count):
    """`count` colours, neighbours far apart: hues by the golden ratio, three brightnesses."""
    return np.array([[255 * c for c in colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.75, 0.95, 0.5)[i % 3], (0.95, 0.75, 0.9)[i // 3 % 3])]
                     for i in range(count)]).round().astype(np.uint8)


def paint(video, ids, colours):
    """Frames uint8 (t, H, W, 3) under coloured trajectories ids (t, H, W): the frame's light, the trajectory's colour."""
    grey = video.astype(np.float32).mean(-1, keepdims=True)
    return np.where(ids[..., None] >= 0, 0.75 * colours[ids] + 0.35 * (grey - 64), grey).clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def film(path, rate):
    """`with film(path, rate) as add`: add(frames uint8 (t, H, W, 3), H and W even), as often as one likes -> an H.264 file that every
    player opens, renamed into place at the end."""
    import av
    stream = None
    with replacing(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        def add(frames):
            nonlocal stream
            if stream is None:
                stream = container.add_stream("libx264", rate=fractions.Fraction(max(rate, 1.0)).limit_denominator(1001))
                stream.height, stream.width, stream.pix_fmt, stream.options = *frames.shape[1:3], "yuv420p", {"crf": "18"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        yield add
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------------------
# 1. The procedural world: words and colours
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon", "arrow", "hourglass")
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 25), "yellow": (245, 225, 50), "green": (45, 165, 60),
           "cyan": (60, 215, 225), "blue": (45, 80, 225), "purple": (130, 50, 175), "pink": (250, 130, 190),
           "white": (248, 248, 248), "black": (22, 22, 26)}
TEXTURES = ("plain", "striped", "checked", "dotted", "wavy", "speckled")
SIZES = {"small": 0.15, "medium": 0.185, "large": 0.22}          # radius as a fraction of the frame, in a scene of up to 3
CROWDED = (1.0, 1.0, 1.0, 0.9, 0.85, 0.8, 0.75, 0.7)             # ... and what it is multiplied by when there are more
# name: two close, muted colours (objects are saturated: an object is never the colour of its ground) and texture ids
GROUNDS = {"sand": ((205, 180, 130), (190, 162, 112), (5, 4)), "grass": ((92, 128, 78), (76, 112, 66), (5, 1)),
           "water": ((98, 138, 170), (84, 122, 156), (4,)), "snow": ((208, 216, 226), (190, 200, 212), (5, 0)),
           "bricks": ((150, 92, 78), (128, 78, 68), (2,)), "stone": ((128, 128, 132), (110, 110, 116), (5, 2)),
           "earth": ((98, 76, 58), (82, 62, 48), (5, 3)), "tiles": ((170, 170, 150), (140, 144, 130), (2, 3))}
# The motion class is the program that the subject follows; directions are told in the caption, not in the class.
MOTIONS = ("straight", "bounce", "orbit", "spin", "grow", "shrink", "approach", "follow", "collide", "behind", "front")
SOLO = MOTIONS[:6]                                               # programs that need no companion
COUNTS = (15, 30, 22, 13, 8, 6, 3, 3)                            # how often 1, 2, ... 8 objects, in percent
MAX_OBJECTS, MAX_GROUNDS = 8, 4                                  # label ids: grounds 0..3, objects 4..11

# Index ranges. Training never reaches VALIDATION: it would take a thousand million clips.
TRAIN, VALIDATION, TEST, HELDOUT = 0, 1_000_000_000, 1_150_000_000, 1_200_000_000
LOW, HIGH = 0.17, 0.83                                           # centres start and end inside this box


def held_out(shape, colour):
    """Is this (shape, colour) pair kept out of training, validation and test? One colour for each shape; in the HELDOUT
    range the subject always wears that pair, so that accuracy there measures composition, not memory."""
    return (3 * shape + colour) % len(COLOURS) == 7


@dataclass(frozen=True)
class World:
    """What the procedural world may do. One frozen object, so that a run's config.json says exactly what it saw."""
    size: int = 64                  # pixels of a side
    frames: int = 8                 # frames of a clip
    max_objects: int = 8            # 1..8
    shared_colours: bool = True     # may two objects of a clip wear the same colour (never also the same shape)?
    acts: int = 1                   # acts that the subject performs one after another; more for long clips
    camera: bool = True             # pans and zooms
    light: bool = True              # the scene gets lighter or darker

    def __post_init__(self):
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise BadInput(f"max_objects {self.max_objects}: give 1 to {MAX_OBJECTS}")
        if self.frames < 1 or self.size < 8:
            raise BadInput(f"a world of {self.frames} frames at {self.size} px: give at least 1 frame and 8 px")
        if not 1 <= self.acts <= max(1, self.frames // 4):
            raise BadInput(f"acts {self.acts} in {self.frames} frames: an act needs at least 4 frames")


class Dice:
    """Random choices for a script. Only raw doubles of PCG64 are used: numpy keeps a bit generator's stream for ever, but
    may change how its higher-level methods consume it. One draw of a block is faster than many draws of one."""

    def __init__(self, index):
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((20260222, index))))
        self.block, self.at = self.rng.random(256).tolist(), 0

    def __call__(self, low=0.0, high=1.0):
        if self.at == 256:
            self.block, self.at = self.rng.random(256).tolist(), 0
        self.at += 1
        return low + (high - low) * self.block[self.at - 1]

    def integer(self, n):
        return int(self() * n)

    def pick(self, options):
        return options[int(self() * len(options))]

    def shuffled(self, options):
        return sorted(options, key=lambda _: self())


# ---------------------------------------------------------------------------------------------------------------------
# 1. The procedural world: motion programs
# ---------------------------------------------------------------------------------------------------------------------

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}   # y grows downwards


def move(program, dice, tau, me, other):
    """One act of one object. tau (T,) in [0, 1]; me, other: dict(x, y, r, a) at tau = 0 (other may be None).
    Returns (path (T, 4) of x, y, r, a, other's path or None, detail) or None where the program does not fit the place.

    Every program may start from any state that leaves it room, so acts can be chained, and the place of an object at a
    given moment says next to nothing about its program: the motion class cannot be read from one frame."""
    x, y, r, a = me["x"], me["y"], me["r"], me["a"]
    path = np.empty((len(tau), 4))
    path[:] = (x, y, r, a)
    if program in ("straight", "bounce"):
        room = {d: (HIGH - x if dx > 0 else x - LOW if dx < 0 else HIGH - y if dy > 0 else y - LOW)
                for d, (dx, dy) in DIRECTIONS.items()}
        direction = dice.pick([d for d in DIRECTIONS if room[d] >= 0.3])     # the box is 0.66 wide: there always is one
        d = np.array(DIRECTIONS[direction])
        far = dice(0.3, min(room[direction], 0.5))
        # straight: once along the line.  bounce: forth, back and forth again (a triangle wave of one and a half periods).
        travelled = tau if program == "straight" else 1 - np.abs(1 - (3 * tau) % 2)
        path[:, :2] += travelled[:, None] * far * d
        return path, None, direction if program == "straight" else ("sideways" if d[0] else "upright")
    if program == "orbit":
        turn = dice.pick((1, -1))                                # +1: clockwise on the screen, since y grows downwards
        for _ in range(8):
            phase, radius = dice(0, 2 * math.pi), dice(0.15, 0.22)
            cx, cy = x - radius * math.cos(phase), y - radius * math.sin(phase)
            if LOW - .05 < cx - radius and cx + radius < HIGH + .05 and LOW - .05 < cy - radius and cy + radius < HIGH + .05:
                angle = phase + turn * 2 * math.pi * dice(0.85, 1.0) * tau
                path[:, 0], path[:, 1] = cx + radius * np.cos(angle), cy + radius * np.sin(angle)
                return path, None, "clockwise" if turn > 0 else "anticlockwise"
        return None
    if program == "spin":
        turn = dice.pick((1, -1))
        path[:, 3] += turn * dice(3.5, 5.0) * tau                # at most 41 degrees a frame at 8 frames: no aliasing
        return path, None, "clockwise" if turn > 0 else "anticlockwise"
    if program in ("grow", "shrink"):
        factor = 1.8 if program == "grow" else 1 / 1.8
        if not 0.07 <= r * factor <= 0.34:
            return None
        path[:, 2] *= factor ** tau
        return path, None, ""
    # from here on there is somebody else
    if other is None:
        return None
    ox, oy, orad = other["x"], other["y"], other["r"]
    away = math.hypot(ox - x, oy - y)
    if away < 1e-6:
        return None
    ux, uy = (ox - x) / away, (oy - y) / away                    # unit vector from me to the other
    if program == "approach":                                    # move up to the other and stay there
        gap = away - (r + orad) * 0.95
        if gap < 0.15:
            return None
        s = np.minimum(tau / 0.6, 1.0) * gap
        path[:, 0] += s * ux
        path[:, 1] += s * uy
        return path, None, ""
    if program == "collide":                                     # meet, and spring back
        gap = away - (r + orad) * 0.95
        if gap < 0.2:
            return None
        s = (1 - np.abs(1 - 2 * tau)) * gap / 2
        theirs = np.empty((len(tau), 4))
        theirs[:] = (ox, oy, orad, other["a"])
        path[:, 0] += s * ux
        path[:, 1] += s * uy
        theirs[:, 0] -= s * ux
        theirs[:, 1] -= s * uy
        return path, theirs, ""
    if program in ("behind", "front"):                           # through the other's place and out on its far side
        far = 2 * away
        ex, ey = x + far * ux, y + far * uy
        if away < r + orad or not (0.08 < ex < 0.92 and 0.08 < ey < 0.92):
            return None
        path[:, 0] += tau * far * ux
        path[:, 1] += tau * far * uy
        return path, None, ""
    if program == "follow":                                      # both go the same way, the other ahead
        if not r + orad < away < 0.5:
            return None
        far = 0.0
        for step in np.arange(0.24, 0.5, 0.02):                  # as far as the leader stays inside
            if LOW - .06 < ox + step * ux < HIGH + .06 and LOW - .06 < oy + step * uy < HIGH + .06:
                far = step
        if far == 0.0:
            return None
        theirs = np.empty((len(tau), 4))
        theirs[:] = (ox, oy, orad, other["a"])
        for p in (path, theirs):
            p[:, 0] += tau * far * ux
            p[:, 1] += tau * far * uy
        return path, theirs, ""
    raise ValueError(f"unknown motion program {program!r}: one of {MOTIONS}")


# ---------------------------------------------------------------------------------------------------------------------
# 1. The procedural world: scripts
# ---------------------------------------------------------------------------------------------------------------------

def script(index, world=World()):
    """The scene number `index`: a dict of small arrays (what `rasterise` needs), its words and its classes.

    seeds (4, 2), warp (4,): the background's regions (nearest seed, wavy borders); camera (T, 3): centre x, y and zoom;
    light (T, 3): gain per colour; place (8, T, 4): x, y, radius, angle of each object on the *screen*, painted in order
    of the first axis (object 0 lies deepest); shape (8,), count: objects that exist; surface (12, 11): texture kind,
    tiles per unit, cos, sin, shading, colour A (3), colour B (3) of grounds 0..3 and objects 4..11.
    caption, qa (list of {type, question, answer}), appearance and motion (class ids), index."""
    dice = Dice(index)
    T = world.frames
    tau = np.linspace(0, 1, T) if T > 1 else np.zeros(1)

    # -- who is there: the subject first. It is the largest, so that "the" appearance and motion of a clip are visible facts.
    likely = COUNTS[:world.max_objects]
    count = int(np.searchsorted(np.cumsum(likely), dice() * sum(likely), side="right")) + 1
    subject_size = dice.pick(("medium", "large")) if count < 6 else "medium"
    looks, taken = [], set()
    for j in range(count):
        size = subject_size if j == 0 else ("small" if subject_size == "medium" else dice.pick(("small", "medium")))
        while True:
            shape, colour = dice.integer(len(SHAPES)), dice.integer(len(COLOURS))
            if j == 0 and index >= HELDOUT:
                colour = (7 - 3 * shape) % len(COLOURS)
            elif held_out(shape, colour):
                continue
            mark = (shape, colour) if world.shared_colours else colour
            if mark not in taken:                                # two objects of a clip never share both shape and colour,
                break                                            # so that words can point at one of them
        taken.add(mark)
        looks.append(dict(shape=shape, colour=colour, size=size, texture=dice.integer(len(TEXTURES)),
                          r=SIZES[size] * CROWDED[count - 1] * math.exp(dice(-0.1, 0.1)), a=dice(0, 2 * math.pi)))

    # -- what the subject does. Places are drawn without looking at the program and drawn again until it fits.
    program = dice.pick(MOTIONS) if count > 1 else dice.pick(SOLO)
    acts, bounds = [], [round(i * T / world.acts) for i in range(world.acts + 1)]
    while True:
        for j in range(count):                                   # of the bystanders, the freest of three places
            spots = [(dice(LOW, HIGH), dice(LOW, HIGH)) for _ in range(1 if j < 2 else 3)]
            x, y = max(spots, key=lambda p: min((math.hypot(p[0] - l["x"], p[1] - l["y"]) for l in looks[:j]), default=0))
            looks[j].update(x=x, y=y)
        # growing and shrinking pass through sizes; everybody else's subject is drawn from that same spread of sizes
        spread = {"grow": -0.29, "shrink": 0.29}.get(program, dice(-0.29, 0.29))
        me = dict(looks[0], r=looks[0]["r"] * math.exp(spread))
        done = move(program, dice, tau if world.acts == 1 else np.linspace(0, 1, bounds[1]), me, looks[1] if count > 1 else None)
        if done is not None:
            break
    paths = np.empty((MAX_OBJECTS, T, 4))
    paths[:] = (0.5, 0.5, 1e-3, 0.0)
    busy = [False] * count                                       # moved by the subject's program
    mine, theirs, detail = done
    acts.append((program, detail))
    paths[0, :bounds[1]] = mine
    if count > 1:
        paths[1] = [looks[1][k] for k in "xyra"]
        if theirs is not None:
            paths[1, :bounds[1]], busy[1] = theirs, True
            paths[1, bounds[1]:] = theirs[-1]
    for i in range(1, world.acts):                               # further acts start where the last one ended
        state = dict(zip("xyra", paths[0, bounds[i] - 1]))
        partner = dict(zip("xyra", paths[1, bounds[i] - 1])) if count > 1 else None
        sub = np.linspace(0, 1, bounds[i + 1] - bounds[i] + 1)[1:]
        fits = [p for p in MOTIONS if p != acts[-1][0]]
        for nxt in dice.shuffled(fits):
            if {"behind", "front"} & {p for p, _ in acts} and nxt in ("behind", "front") and nxt not in {p for p, _ in acts}:
                continue                                         # the two need opposite depths
            done = move(nxt, dice, sub, state, partner)
            if done is not None:
                break                                            # one always does: straight, or spin after it
        paths[0, bounds[i]:bounds[i + 1]] = done[0]
        if done[1] is not None:
            paths[1, bounds[i]:bounds[i + 1]], busy[1] = done[1], True
            paths[1, bounds[i + 1]:] = done[1][-1]
        acts.append((nxt, done[2]))

    # -- what the others do: half of them stay, the rest follow a program of their own, in one half of the clip or all of it
    side = [None] * count                                        # (begin, end) of each other object that moves
    for j in range(1, count):
        if j > 1:
            paths[j] = [looks[j][k] for k in "xyra"]
        if busy[j] or (j == 1 and acts[0][0] in MOTIONS[6:]) or (j == 1 and world.acts > 1) or dice() < 0.5:
            continue
        begin, end = dice.pick(((0, T), (0, T // 2), (T // 2, T)))
        own = move(dice.pick(("straight", "bounce", "orbit", "spin")), dice, np.linspace(0, 1, max(end - begin, 1)),
                   dict(zip("xyra", paths[j, 0])), None) if end - begin >= 3 else None
        if own is not None:
            paths[j, begin:end] = own[0]
            paths[j, end:] = own[0][-1]
            side[j] = (begin, end)

    # -- depth: any order, but for who passes behind whom
    order = dice.shuffled(list(range(count)))                    # order[0] is painted first
    if count > 1 and {p for p, _ in acts} & {"behind", "front"}:
        deeper = 0 if "behind" in {p for p, _ in acts} else 1
        i, j = sorted((order.index(0), order.index(1)))
        order[i], order[j] = deeper, 1 - deeper

    # -- the ground, the camera, the light
    names = dice.shuffled(list(GROUNDS))[:1 + min(int(dice() * dice() * 6), 3)]
    seeds = np.full((MAX_GROUNDS, 2), 1e3)
    for i in range(len(names)):
        seeds[i] = dice(0.05, 0.95), dice(0.05, 0.95)
    warp = np.array([dice(0.0, 0.05), dice(4, 12), dice(0, 6.3), dice(0, 6.3)])
    camera, filmed = np.tile((0.0, 0.0, 1.0), (T, 1)), ""
    if world.camera and dice() < 0.35:
        if dice() < 0.65:
            way = dice.pick(tuple(DIRECTIONS))
            camera[:, :2] += (tau - 0.5)[:, None] * dice(0.12, 0.25) * np.array(DIRECTIONS[way])
            filmed = f"pans {way}"
        else:
            inwards = dice() < 0.5
            camera[:, 2] = np.exp((tau - 0.5) * (0.35 if inwards else -0.35))
            filmed = "zooms in" if inwards else "zooms out"
    light, shine = np.ones((T, 3)), ""
    if world.light and dice() < 0.25:
        brighter = dice() < 0.5
        light *= np.exp(((tau - 1) if brighter else -tau) * 0.6)[:, None]
        shine = "gets lighter" if brighter else "gets darker"
    light *= 1 + 0.06 * np.array([dice(-1, 1), dice(-1, 1), dice(-1, 1)])    # the tint of the whole clip

    # -- everything onto the screen, in painting order
    place = paths.copy()
    place[:, :, 0] = (paths[:, :, 0] - 0.5 - camera[:, 0]) * camera[:, 2] + 0.5
    place[:, :, 1] = (paths[:, :, 1] - 0.5 - camera[:, 1]) * camera[:, 2] + 0.5
    place[:, :, 2] = paths[:, :, 2] * camera[:, 2]
    surface = np.zeros((MAX_GROUNDS + MAX_OBJECTS, 11))
    for i, name in enumerate(names):
        one, two, kinds = GROUNDS[name]
        turn = dice(0, 2 * math.pi)
        surface[i] = (dice.pick(kinds), dice(4, 8), math.cos(turn), math.sin(turn), 0.0, *one, *two)
    rgb = list(COLOURS.values())
    shape = np.zeros(MAX_OBJECTS, np.int64)
    for slot, j in enumerate(order):
        look = looks[j]
        colour = np.array(rgb[look["colour"]], float)
        second = colour * 0.45 if colour.sum() > 230 else colour * 0.55 + 95       # darker; of a dark colour, lighter
        # shading 0.25: one side of each object is lighter, so that even a plain circle is seen to spin
        surface[MAX_GROUNDS + slot] = (look["texture"], dice(0.9, 1.3), 1.0, 0.0, 0.25, *colour, *second)
        shape[slot] = look["shape"]
    place[:count] = place[order]

    scene = dict(looks=looks, acts=acts, side=side, names=names, filmed=filmed, shine=shine, paths=paths, place=place,
                 order=order, T=T)
    return dict(index=index, seeds=seeds.astype(np.float32), warp=warp.astype(np.float32), camera=camera.astype(np.float32),
                light=light.astype(np.float32), place=place.astype(np.float32), shape=shape, count=count,
                surface=surface.astype(np.float32), caption=describe(scene, dice), qa=questions(scene, dice),
                appearance=looks[0]["shape"], motion=MOTIONS.index(program))


# ---------------------------------------------------------------------------------------------------------------------
# 1. The procedural world: words
# ---------------------------------------------------------------------------------------------------------------------

VERBS = {"straight": ("moves", "glides", "drifts", "slides", "travels"), "bounce": ("bounces", "springs", "bobs"),
         "orbit": ("circles", "goes round", "moves in a circle"), "spin": ("spins", "turns on the spot", "rotates"),
         "grow": ("grows", "gets bigger", "swells"), "shrink": ("shrinks", "gets smaller", "dwindles"),
         "approach": ("moves up to {} and stops", "comes to rest beside {}", "approaches {} and halts"),
         "follow": ("follows {}", "chases {}", "trails behind {}"),
         "collide": ("bumps into {}", "collides with {} and springs back", "knocks against {}"),
         "behind": ("passes behind {}", "goes by behind {}", "slips behind {} and out again"),
         "front": ("passes in front of {}", "goes by in front of {}", "crosses in front of {}")}
WAYS = {"left": ("to the left", "leftwards", "left"), "right": ("to the right", "rightwards", "right"),
        "up": ("upwards", "up", "to the top"), "down": ("downwards", "down", "to the bottom"),
        "sideways": ("from side to side", "left and right"), "upright": ("up and down", "upwards and downwards"),
        "clockwise": ("clockwise",), "anticlockwise": ("anticlockwise", "counterclockwise"), "": ("",)}


def a(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name_of(look, full=True):
    """'large red striped star', or just 'red star' (enough to point at it: the two are unique in a clip)."""
    words = [look["size"] if full and look["size"] != "medium" else "", list(COLOURS)[look["colour"]],
             TEXTURES[look["texture"]] if full and look["texture"] else "", SHAPES[look["shape"]]]
    return " ".join(w for w in words if w)


def act_words(act, dice, companion):
    program, detail = act
    return f"{dice.pick(VERBS[program])} {dice.pick(WAYS[detail])}".strip().replace("{}", companion)


def describe(scene, dice):
    """A caption in varied English. The subject, its companion and the ground are always told; the rest by chance."""
    looks, names = scene["looks"], scene["names"]
    subject = a(name_of(looks[0]))
    partner = a(name_of(looks[1], full=dice() < 0.7)) if len(looks) > 1 else ""
    doing = " and then ".join(act_words(act, dice, partner if i == 0 else "it") for i, act in enumerate(scene["acts"]))
    if scene["acts"][0][0] in SOLO and any(p not in SOLO for p, _ in scene["acts"]):     # "it" must have been named
        doing = doing.replace(" it", " " + partner, 1)
    ground = " and ".join(names[:2]) if dice() < 0.8 else names[0]
    where = dice.pick(("on", "over", "against")) + " " + ground
    used = 2 if scene["acts"][0][0] not in SOLO else 1
    rest = looks[used:]
    others = ""
    if rest:
        near = a(name_of(rest[0], full=dice() < 0.6))
        others = dice.pick((f" with {near} nearby", f" and there is {near}", f" next to {near}", f" while {near} is in view"))
        if len(rest) > 1 and dice() < 0.6:
            others += f" and {a(name_of(rest[1], full=False))}"
    template = dice.integer(4)
    if template == 0:
        text = f"{subject} {doing} {where}{others}"
    elif template == 1:
        text = f"{where}, {subject} {doing}{others}"
    elif template == 2:
        text = f"{subject} {doing}{others}, {where}"
    else:
        text = f"there is {subject} {where}; it {doing}{others}"
    if scene["filmed"] and dice() < 0.7:
        text += dice.pick((", the camera ", " as the camera ")) + scene["filmed"]
    if scene["shine"] and dice() < 0.7:
        text += dice.pick((" and it ", " while it ")) + scene["shine"]
    return text


def visible_side(x):
    return "left" if x < 0.5 else "right"


def questions(scene, dice):
    """Question-answer pairs with one-word (or one-phrase) answers, all decidable from the pixels:
    what, where, count, first, after, behind."""
    looks, acts, place, order = scene["looks"], scene["acts"], scene["place"], scene["order"]
    slot = {j: s for s, j in enumerate(order)}
    qa = []

    def ask(kind, question, answer):
        qa.append(dict(type=kind, question=question, answer=answer))

    subject = looks[0]
    colour, shape = list(COLOURS)[subject["colour"]], SHAPES[subject["shape"]]
    if place[:len(looks), :, 2].mean(1).argmax() == slot[0]:
        ask("what", "What colour is the largest object?", colour)
    ask("what", f"What shape is the largest object, the {colour} one?", shape)
    ask("what", f"What does the {name_of(subject, False)} do{' first' if len(acts) > 1 else ''}?", acts[0][0])
    ask("what", "What is the ground made of?", " and ".join(sorted(scene["names"])))
    ask("where", f"On which side is the {name_of(subject, False)} at the end?", visible_side(place[slot[0], -1, 0]))
    ask("count", "How many objects are there?", str(len(looks)))
    counted = dice.pick(tuple(COLOURS))
    ask("count", f"How many {counted} objects are there?", str(sum(list(COLOURS)[l["colour"]] == counted for l in looks)))
    starts = {j: s[0] for j, s in enumerate(scene["side"]) if s}
    starts[0] = 0
    late = [j for j in starts if starts[j] > 0]
    if late:                                                     # the subject moves from the first frame on
        pair = dice.shuffled([0, late[0]])
        ask("first", f"Which moves first, the {name_of(looks[pair[0]], False)} or the {name_of(looks[pair[1]], False)}?",
            name_of(subject, False))
    for (before, _), (after, _) in zip(acts, acts[1:]):
        ask("after", f"What happened to the {name_of(subject, False)} after its first \"{before}\"?", after)
        break
    if len(looks) > 1:
        passes = {p for p, _ in acts} & {"behind", "front"}
        way = dice.pick(("behind", "front"))
        word = {"behind": "behind", "front": "in front of"}[way]
        ask("behind", f"Did the {name_of(subject, False)} pass {word} the {name_of(looks[1], False)}?",
            "yes" if way in passes else "no")
    return qa


# ---------------------------------------------------------------------------------------------------------------------
# 1. The procedural world: pixels
# ---------------------------------------------------------------------------------------------------------------------

SHAPE_RES, TEXTURE_RES = 128, 64


@functools.lru_cache(maxsize=None)
def atlas(device):
    """(shapes bool (10, R, R), textures float (6, S, S) in [0, 1]): what a look-up finds under local coordinates.
    A table costs one gather a pixel whatever it shows; formulas would cost ten operations each, for every shape."""
    g = (np.arange(SHAPE_RES) + 0.5) / SHAPE_RES * 2 - 1
    x, y = np.meshgrid(g, g)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    points = 0.55 + 0.45 * (np.abs(((angle + math.pi / 2) * 5 / (2 * math.pi)) % 1 - 0.5) * 2) ** 1.2    # five-pointed
    shapes = np.stack([
        radius < 0.92, np.maximum(abs(x), abs(y)) < 0.8, (y < 0.75) & (y > 1.75 * abs(x) - 0.95), radius < 0.98 * points,
        (np.minimum(abs(x), abs(y)) < 0.36) & (radius < 0.98), (radius < 0.96) & (radius > 0.42),
        ((1.15 * x) ** 2 + (1.15 * -y + 0.15) ** 2 - 0.6) ** 3 < 0.7 * (1.15 * x) ** 2 * (1.15 * -y + 0.15) ** 3 * 1.6,
        (radius < 0.95) & (np.hypot(x - 0.55, y) > 0.62),
        ((abs(x) < 0.36) & (y > -0.1) & (y < 0.95)) | ((y <= 0.05) & (y > -0.95) & (abs(x) < 0.9 * (y + 0.95))),
        (abs(x) < abs(y) * 0.8 + 0.2) & (abs(y) < 0.85)])
    s = np.arange(TEXTURE_RES) / TEXTURE_RES
    u, v = np.meshgrid(s, s)
    grain = np.random.Generator(np.random.PCG64(7)).random((16, 16)).repeat(4, 0).repeat(4, 1)
    textures = np.stack([np.zeros_like(u), (u % 1) < 0.45, ((u < 0.5) ^ (v < 0.5)),
                         np.hypot(u - 0.5, v - 0.5) < 0.3, ((v + 0.15 * np.sin(2 * np.pi * u)) % 1) < 0.45, grain])
    return torch.tensor(shapes, device=device), torch.tensor(textures, dtype=torch.float32, device=device)


def stack(scripts):
    """A list of scripts -> one dict of tensors with a leading batch axis (words stay out)."""
    keys = ("seeds", "warp", "camera", "light", "place", "shape", "count", "surface")
    return {k: torch.from_numpy(np.stack([s[k] for s in scripts])) for k in keys}


@torch.no_grad()
def rasterise(scripts, size, device="cpu", chunk=None):
    """stack(scripts) -> video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) with H = W = size, on `device`.
    Painter's algorithm: the ground, then objects from the deepest to the nearest; each pixel remembers the last surface
    that covered it and the surface's own coordinates there, and is coloured once, at the end. `chunk` clips
    are drawn together; 16 on a CPU: measured on two cores at 64 px, 1.8x as fast as two by two, and more gains nothing."""
    device = torch.device(device)
    b = len(scripts["count"])
    chunk = chunk or (16 if device.type == "cpu" else 64)
    out = [_rasterise({k: v[i:i + chunk].to(device) for k, v in scripts.items()}, size, device) for i in range(0, b, chunk)]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])


def _rasterise(s, size, device):
    shapes, textures = atlas(device)
    b, t = s["camera"].shape[:2]
    p = (torch.arange(size, device=device) + 0.5) / size
    camera = s["camera"][..., None, None]                                    # (b, t, 3, 1, 1)
    wx = (p - 0.5) / camera[:, :, 2] + 0.5 + camera[:, :, 0]                 # (b, t, 1, W): screen -> world
    wy = (p[:, None] - 0.5) / camera[:, :, 2] + 0.5 + camera[:, :, 1]        # (b, t, H, 1)
    amount, freq, p1, p2 = (w[:, None, None, None] for w in s["warp"].unbind(1))
    bx, by = wx + amount * torch.sin(freq * wy + p1), wy + amount * torch.sin(freq * wx + p2)       # wavy borders
    nearest = torch.full((b, t, size, size), 1e9, device=device)
    ids = torch.zeros((b, t, size, size), dtype=torch.int32, device=device)
    for i in range(int((s["seeds"][:, :, 0] < 1e2).sum(1).max())):
        gx, gy = (c[:, None, None, None] for c in s["seeds"][:, i].unbind(1))
        distance = (bx - gx).square_().add_((by - gy).square_())
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        ids.masked_fill_(closer, i)
    u, v = wx.expand(b, t, size, size).contiguous(), wy.expand(b, t, size, size).contiguous()       # texture coordinates
    flat = shapes.flatten()
    half = SHAPE_RES / 2
    frame = torch.arange(b * t, device=device).view(b, t, 1, 1) * (size * size)
    pixel = torch.arange(2 * size, device=device)
    for j in range(int(s["count"].max())):
        x, y, r, angle = (q[:, :, None] for q in s["place"][:, j].unbind(-1))                      # (b, t, 1)
        w = min(int(2.5 * size * r.max()) + 3, 2 * size)                     # only a w x w window around it is looked at
        ix = ((x * size).round().long() - w // 2 + pixel[:w]).clamp_(-1, size)                     # (b, t, w)
        iy = ((y * size).round().long() - w // 2 + pixel[:w]).clamp_(-1, size)
        dx, dy = ((ix + 0.5) / size - x)[:, :, None], ((iy + 0.5) / size - y)[..., None]           # (b, t, 1, w), (b, t, w, 1)
        c, n = torch.cos(angle)[..., None] / r[..., None], torch.sin(angle)[..., None] / r[..., None]
        ou, ov = dx * c + dy * n, dy * c - dx * n                            # its own axes, in units of its radius
        visible = ((ix >= 0) & (ix < size) & (s["count"] > j)[:, None, None])[:, :, None] & ((iy >= 0) & (iy < size))[..., None]
        hit = ((ou.abs() < 1) & (ov.abs() < 1) & visible).flatten().nonzero()[:, 0]
        fu, fv = ou.flatten().index_select(0, hit), ov.flatten().index_select(0, hit)
        kind = s["shape"][:, j].index_select(0, hit // (t * w * w))
        inside = flat.index_select(0, (kind * SHAPE_RES + (fv * half + half).long()) * SHAPE_RES + (fu * half + half).long())
        where = (frame + iy[..., None] * size + ix[:, :, None]).flatten()[hit[inside]]
        u.view(-1)[where], v.view(-1)[where] = fu[inside], fv[inside]
        ids.view(-1)[where] = MAX_GROUNDS + j
    # colour every pixel once: its surface's row of the table, one column after the other. (Measured: index_select on a
    # plane is 4x faster than advanced indexing.)
    row = (ids + torch.arange(b, device=device, dtype=torch.int32)[:, None, None, None] * s["surface"].shape[1]).flatten()
    column = s["surface"].flatten(0, 1).t().contiguous()                     # (11, b·12)
    kind, tiles, cos, sin, shade = (column[i].index_select(0, row) for i in range(5))
    u, v = u.flatten(), v.flatten()
    tiles *= TEXTURE_RES
    tu = ((u * cos + v * sin) * tiles).floor().to(torch.int32) & (TEXTURE_RES - 1)
    tv = ((v * cos - u * sin) * tiles).floor().to(torch.int32) & (TEXTURE_RES - 1)
    blend = textures.flatten().index_select(0, (kind.to(torch.int32) * TEXTURE_RES + tv) * TEXTURE_RES + tu)
    gain = (1 + shade * v).view(b, t, size, size)
    video = torch.empty((b, t, size, size, 3), dtype=torch.uint8, device=device)
    for c in range(3):
        one, step = column[5 + c].index_select(0, row), (column[8 + c] - column[5 + c]).index_select(0, row)
        plane = one.addcmul_(step, blend).view(b, t, size, size).mul_(gain)
        video[..., c] = plane.mul_(s["light"][:, :, c, None, None]).clamp_(0, 255)
    return video, ids.long()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Real video: decoding
# ---------------------------------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".gif", ".asf", ".wmv", ".flv", ".ts", ".3gp"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
FILE_SECONDS = 60.0                                              # seconds that one file may take


def fit(height, width, size):
    """(h, w) with the short side = size, and the (top, left) of the central size x size square."""
    scale = size / min(height, width)
    h, w = max(size, round(height * scale)), max(size, round(width * scale))
    return h, w, (h - size) // 2, (w - size) // 2


def decode(path, frames, size, start=None, stride=None, threads=None, limit=FILE_SECONDS, places=True):
    """T frames of a video (or the one of a picture) as uint8 (T, size, size, 3), their times in seconds (T,) and the
    positions of these frames in the file, as a fraction in [0, 1).

    Without start: what is on screen in the middles of T equal parts of the whole video.  With start (a fraction of the room there
    is) and stride (in frames, shortened where the video is too short for it): T frames in a row from there.  By time stamps: at a
    variable rate a frame that stays is shown as often as its time says.  Each frame is converted straight to the size asked for,
    by swscale; the central square is kept.  A damaged, truncated or empty file is refused (BadVideo) if a frame that is asked for
    cannot be had as it was encoded, as far as decoder and container tell (a damaged MKV may lose frames without a word: the one before
    then seems to stay); so is one of fewer than T frames, and one that takes longer than `limit` seconds.

    threads: of the decoder, 0 as many as there are cores; default: 1 in a worker process, else 0.  places=False: the positions need
    not be exact to the frame, which saves reading a file through whose header does not count its frames."""
    if threads is None:
        threads = 0 if torch.utils.data.get_worker_info() is None else 1
    return within(limit, path, lambda late: _decode(path, frames, size, start, stride, threads, late, places))


HAND = threading.local()                                         # of each thread that asks: the thread that decodes for it
STUCK = {}                                                       # file that was given up -> where its result would arrive


def serve(inbox):
    while (job := inbox.get()) is not None:
        work, late, box = job
        try:
            box.put((work(late), None))
        except BaseException as error:                           # whatever it is, it is raised where the call was made
            box.put((None, error))
        del job, work, box                                       # else the last frames stay until the next job comes


def within(seconds, path, work):
    """work(late), done by a thread that this one keeps for it -> what it returns; given up after `seconds`: BadVideo.

    CHOICE: a thread, not a process. Both stop waiting for a call into the decoder that never returns (PyAV lets go of Python's lock in
    it). A process could be killed as well, but costs 36 ms a file, a thread 0.03 (on two cores; a small clip takes 1.4 to decode): a
    thread that hangs is left behind, one for each such file, and the file is not tried again. What is merely slow ends by itself:
    `late()`, called between packets, raises. The thread is kept: the C library gives new ones heaps of their own, which add up."""
    def refusal():
        return BadVideo(f"{path}: not decoded within {seconds:g} s; leave it out or re-encode it")
    deadline = time.monotonic() + seconds

    def late():
        if time.monotonic() > deadline:
            raise refusal()
    if str(path) in STUCK and STUCK[str(path)].empty():
        raise refusal()
    if getattr(HAND, "process", None) != os.getpid():            # none yet, or it stayed behind in the process that this one was forked from
        HAND.process, HAND.inbox = os.getpid(), queue.SimpleQueue()
        threading.Thread(target=serve, args=(HAND.inbox,), daemon=True).start()
    box = queue.SimpleQueue()
    HAND.inbox.put((work, late, box))
    try:
        result, error = box.get(timeout=seconds + 1)             # the second is for `late` to come first
    except queue.Empty:
        STUCK[str(path)], HAND.process = box, None
        HAND.inbox.put(None)                                     # should it come back after all
        raise refusal() from None
    if error is not None:
        try:
            raise error
        finally:
            del error                                            # else error -> traceback -> this frame -> error keeps the file open
    return result


@contextlib.contextmanager
def opened(path):
    """`with opened(path) as container`: PyAV's, which has a video stream. What goes wrong inside is a BadVideo that names the file."""
    import av                                                    # here: the procedural path needs no av
    if not os.path.exists(path):
        raise BadVideo(f"{path}: no such file; check the path")
    if not os.path.isfile(path):                                 # a folder; or a pipe, whose opening would wait for ever
        raise BadVideo(f"{path}: cannot be decoded (not a file); give a video file")
    try:
        with av.open(str(path), timeout=FILE_SECONDS) as container:
            if not container.streams.video:
                raise BadVideo(f"{path}: holds no video stream; leave it out or give a video file")
            # a decoder may paint over what it cannot read, and says so nowhere that PyAV shows: it shall fail instead
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}
            yield container
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise BadVideo(f"{path}: cannot be decoded ({getattr(error, 'strerror', None) or type(error).__name__}); re-encode or remove it") from None


def read_frames(path, size, chunk=8):
    """Every frame of a video, in order: an iterator over uint8 (c, size, size, 3), c <= chunk, cut as `decode` cuts. Memory does not
    grow with the video. A file that ends long before its header says, in a damaged part, or holds no frame: BadVideo."""
    held, count, square = [], 0, squarer(path, size)
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        length = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        end = base = float((stream.start_time or 0) * stream.time_base)
        for frame in container.decode(stream):
            held.append(square(frame))
            count += 1
            end = max(frame.time if frame.time is not None else base + count / rate, end)
            if len(held) == chunk:
                yield np.stack(held)
                held = []
    if held:
        yield np.stack(held)
    if not count:
        raise BadVideo(f"{path}: not one frame can be decoded; re-encode or remove it")
    if length - (end - base) > max(0.05 * length, 3 / rate):     # headers often announce a little too much; of a cut file, a lot
        raise BadVideo(f"{path}: ends at {end - base:.2f} s of the {length:.2f} s that its header announces (truncated?); re-encode or cut it")


def frame_rate(path):
    """Frames a second of a video file, as its header says (25 where it says nothing)."""
    with opened(path) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate or stream.guessed_rate or 25)


def squarer(path, size):
    """-> a function: PyAV's frame -> uint8 (size, size, 3), the central square, upright.

    CHOICE: pixels that are not square are taken as they are stored, as most readers do, those of the tools that make masks among
    them: a mask lies on its pixels, whatever the header says of their shape.
    CHOICE: what is transparent is laid on white, as a page shows it: below it a file may hold any colour.
    One reformatter for all frames: a new one for each frame would work out the filter anew."""
    import av
    convert = av.video.reformatter.VideoReformatter().reformat

    def square(frame):
        turns = round(getattr(frame, "rotation", 0) / 90) % 4    # phones write the picture lying and a rotation beside it
        h, w, top, left = fit(frame.height, frame.width, size)
        if max(h, w) > 64 * size:
            raise BadVideo(f"{path}: a frame of {frame.width} x {frame.height} px is too narrow for a square of {size} px")
        if frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components):
            rgba = convert(frame, format="rgba").to_ndarray().astype(np.uint16)
            white = (rgba[..., :3] * rgba[..., 3:] + 255 * (255 - rgba[..., 3:]) + 127) // 255
            frame = av.VideoFrame.from_ndarray(white.astype(np.uint8), format="rgb24")
        image = convert(frame, width=w, height=h, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(image[top:top + size, left:left + size], turns))
    return square


def scan(container, stream):
    """The times of all frames in ticks, in order: every packet is read, none decoded. Leaves the file at its beginning."""
    container.seek(0)
    pts = sorted(p.pts for p in container.demux(stream) if p.size and p.pts is not None and not p.is_discard)
    container.seek(0)
    return pts


def timeline(container, stream):
    """(frames, frames a second, is that of this stream alone?) of a video, as its header says: what is shown, if an edit list hides a part."""
    rate, total = float(stream.average_rate or stream.guessed_rate or 25), stream.frames
    length = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if not length and re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", stream.metadata.get("DURATION", "")):           # MKV keeps it there
        length = sum(float(x) * s for x, s in zip(stream.metadata["DURATION"].split(":"), (3600, 60, 1)))
    own = bool(length or total)
    length = length or (container.duration or 0) / 1e6           # of all streams: sound may go on for longer
    if length and (not total or total > length * rate + 1 and "mov" in container.format.name):
        total = int(length * rate + 0.5)
    if total < 2:                                                # the header does not tell: count the packets
        pts = scan(container, stream)
        if len(pts) > 1:
            return len(pts), (len(pts) - 1) / float((pts[-1] - pts[0]) * stream.time_base), True
        container.seek(0)
        total = sum(1 for packet in container.demux(stream) if packet.size)  # one frame, or packets without times
        container.seek(0)
    return total, rate, own


def packets(container, stream, late):
    """The packets of a stream that hold something, to its end, or to where the file can be read no further: what is asked for behind
    that place will be missed by whoever asks."""
    import av
    try:
        for packet in container.demux(stream):
            late()
            if packet.size:                                      # the last one is empty, PyAV's sign for the end
                yield packet
    except av.error.FFmpegError:
        return


def _decode(path, frames, size, start, stride, threads, late, exact):
    square = squarer(path, size)
    with opened(path) as container:
        stream = container.streams.video[0]
        total, rate, own = timeline(container, stream)
        if total < frames:
            raise BadVideo(f"{path}: has {total} frames, fewer than the {frames} asked for; give --frames {max(total, 1)} or less, "
                           "or a longer video")
        if start is None:
            targets = (np.arange(frames) + 0.5) * total / frames             # in frames, at a constant rate
        else:
            stride = max(1, min(stride or 1, total // frames))
            targets = start * (total - (frames - 1) * stride - 1) + np.arange(frames) * stride + 0.5
        counted = total == stream.frames
        times = (np.floor(targets) + 0.5) / rate                 # the middle of a frame's time: no rounding makes it a neighbour's
        found = by_seeking(container, stream, times, square, threads, late)
    if found is None:
        with opened(path) as container:
            found = in_order(container, container.streams.video[0], times, square, rate, late)
    images, seen, end = found
    lost = [i for i, image in enumerate(images) if image is None]
    if len(lost) == frames:
        raise BadVideo(f"{path}: not one frame can be decoded; re-encode or remove it" if end < math.inf else
                       f"{path}: the frames asked for are damaged; re-encode or remove it")
    if lost:
        raise BadVideo(f"{path}: damaged at {times[lost[0]]:.2f} s; re-encode or remove it")
    # headers often announce a frame or two too much, or what the sound lasts; of a cut file, a lot
    if times[-1] - 0.5 / rate - end > max(2 / rate, 0 if own else 0.5 * total / rate / frames):
        raise BadVideo(f"{path}: ends at {end:.2f} s of the {total / rate:.2f} s that its header announces (truncated?); re-encode or remove it")
    places = np.rint(seen * rate)
    if exact and (not counted or abs(seen * rate - places).max() > 0.25):    # no count, or a variable rate: the list of all frames tells which these are
        with opened(path) as container:
            pts, tick = scan(container, container.streams.video[0]), float(container.streams.video[0].time_base)
        if pts:
            places, total = np.searchsorted(pts, np.rint(seen / tick) + pts[0]), len(pts)
    return np.stack(images), seen, np.clip(places / total, 0, 1 - 1e-9)


def unordered(container, stream):
    """Does the file tell wrong times? AVI has none: they are counted in the file's order, which is not H.264's and HEVC's order on screen."""
    return container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc") and stream.codec_context.has_b_frames


def by_seeking(container, stream, times, square, threads, late):
    """What is on screen at `times` (T,), ascending, in seconds after the first frame -> (images, times of these frames (T,), end of the
    last packet if the file was read so far, else infinity). None: the file is damaged, or of a kind that wants the slow way.

    The file tells the times of frames and the key frames before anything is decoded: packets are read until the one after a time has
    passed; the frame is the last that begins before it. Decoding starts at the last key frame before it and leaves out
        1. whatever stands between the last frame that is wanted and the next such key frame, and
        2. frames that no other frame refers to (half of an H.264 stream of ordinary settings), unless one of them is wanted.
    Neither changes a bit of the others. More than two seconds ahead, the file is not even read: it is sought."""
    import av
    codec, tick = stream.codec_context, float(stream.time_base or 0)
    if unordered(container, stream):
        return None
    codec.thread_type, codec.thread_count = "AUTO", threads
    codec.open(strict=False)                                     # before skip_frame is set: dav1d would take that for all it ever decodes
    images, wanted, chosen, ready = {}, set(), [], {}            # by time stamp. ready: decoded, and a later time may want it
    held, known, reader = [], set(), packets(container, stream, late)        # packets read, not decoded; time stamps read
    base, reached, over, busy, end = None, -math.inf, False, False, 0.0     # reached: no packet that comes is shown before it

    def read(until):                                             # -> can this way go on?
        nonlocal reached, over, end
        while reached <= until and not over:
            packet = next(reader, None)
            over = packet is None
            if over:
                break
            if packet.pts is None or packet.is_corrupt:
                return False
            held.append(packet)
            reached, end = reached if packet.dts is None else packet.dts, max(end, packet.pts + (packet.duration or 0))
            if not packet.is_discard:                            # what an edit list hides is decoded, not shown
                known.add(packet.pts)
        return True

    def feed(packet):                                            # None: give out what is still inside
        codec.skip_frame = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
        for frame in codec.decode(packet):
            if frame.is_corrupt or frame.pts is None:
                continue
            if frame.pts in wanted:
                images[frame.pts] = square(frame)
            elif frame.pts > chosen[-1]:
                ready[frame.pts] = frame

    def drain():
        nonlocal busy
        if busy:
            feed(None)
            codec.flush_buffers()
        busy = False
        ready.clear()

    def jump(target):                                            # to a key frame at or before it
        nonlocal reader, reached, over
        drain()
        back = 0
        while True:
            held.clear()
            known.clear()
            container.seek(max(target - back, base), stream=stream)
            reader, reached, over = packets(container, stream, late), -math.inf, False
            if read(target) and any(p.is_keyframe and p.pts <= target for p in held):
                return True
            if target - back <= base:
                return False
            back = max(2 * back, round(1 / tick))                # some formats land behind the target

    try:
        while not over and (not known or reached < min(known)):  # the first frame to be shown is not always the first in the file
            if not read(reached):
                return None
        if not known or not tick:
            return None
        base = min(known)
        for target in (base + np.floor(times / tick)).astype(int).tolist():
            if not (jump(target) if target - max(reached, base) > 2 / tick else read(target)) or not known:
                return None
            pts = max((p for p in known if p <= target), default=min(known))
            chosen.append(pts)
            known.difference_update([p for p in known if p < pts])
            for p in [p for p in ready if p < pts]:
                del ready[p]
            if pts in wanted:
                continue
            wanted.add(pts)
            if pts in ready:
                images[pts] = square(ready.pop(pts))
                continue
            at = next((i for i, p in enumerate(held) if p.pts == pts and not p.is_discard), None)
            if at is None:                                       # read and fed on the way to an earlier one: still inside the decoder
                continue
            key = next((i for i in range(at, -1, -1) if held[i].is_keyframe and held[i].pts <= pts), None)
            if key is not None:
                drain()
            elif not busy:
                return None
            for packet in held[key or 0:at + 1]:
                feed(packet)
            del held[:at + 1]
            busy = True
        drain()
    except av.error.FFmpegError:
        return None
    if not all(pts in images for pts in chosen):
        return None
    return [images[pts] for pts in chosen], (np.array(chosen) - base) * tick, (end - base) * tick if over else math.inf


def in_order(container, stream, times, square, rate, late):
    """The same by decoding everything from the beginning: for files without time stamps or key frames, and to judge what damage hit.
    An image is None if its frame is damaged, or if it may refer to a damaged one: all from there to the next key frame."""
    import av
    codec, tick, counting = stream.codec_context, float(stream.time_base or 0), unordered(container, stream)
    codec.thread_count = 1                                       # more of them would tell of damage later than it happens
    images, seen, shown, base, count, end = [], [], None, None, 0, 0.0
    fed, sound, hurt, damaged, floor = set(), set(), False, False, -math.inf             # time stamps: of all packets; decoded from sound data alone

    def settle(until):                                           # `shown` is on screen up to `until`
        while len(images) < len(times) and times[len(images)] < until:
            at, (now, frame) = times[len(images)], shown or (0.0, None)
            lost = frame is None or frame.is_corrupt
            if damaged and not lost:                             # is it whole, and is no later one, which was lost, on screen by then?
                lost = hurt if counting or frame.pts is None else frame.pts not in sound or any(frame.pts < p <= base + at / tick for p in fed)
            images.append(None if lost else square(frame))
            seen.append(now)

    for packet in itertools.chain(packets(container, stream, late), (None,)):                # None: give out what is still inside
        stamp = None if packet is None or counting else packet.pts
        if hurt and packet is not None and packet.is_keyframe:
            hurt, floor = False, -math.inf if stamp is None else stamp       # what follows it but is shown before it may refer to what was lost
        if stamp is not None and not packet.is_discard:
            fed.add(stamp)
        try:
            frames = codec.decode(packet)
        except av.error.FFmpegError:
            frames, hurt, damaged = [], True, True
        if stamp is not None and not hurt and stamp >= floor:
            sound.add(stamp)
        for frame in frames:
            if base is None:
                base = min(fed, default=frame.pts)
            now = count / rate if counting or frame.pts is None else (frame.pts - base) * tick
            settle(now)
            shown, count, end = (now, frame), count + 1, max(end, now + 1 / rate)
        if len(images) == len(times):
            return images, np.array(seen), math.inf
    settle(math.inf)
    return images, np.array(seen), end


def load_labels(mask_path, graph_path, where, size):
    """The sidecars -> int64 (T, size, size): the trajectory of each pixel of the frames at `where` (fractions of the video),
    -1 = none. mask: `arr_0` (F, H, W), object id of each pixel, 0 = none.  graph: `tensor` (M, F): id of trajectory m
    in frame f, 0 = absent.  Cut to the same central square as `decode`, by nearest neighbour."""
    try:
        mask = np.load(mask_path, allow_pickle=False)["arr_0"]
        graph = np.load(graph_path, allow_pickle=False)["tensor"]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise BadVideo(f"{mask_path}: its labels cannot be read ({error}); remove both sidecars or write them again") from None
    if mask.dtype.kind not in 'iu' or graph.dtype.kind not in 'iu' or (mask.size and mask.min() < 0):
        raise BadVideo(f"{mask_path}: labels of type {mask.dtype}; they must be whole numbers from 0 on")
    if mask.ndim != 3 or graph.ndim != 2 or graph.shape[1] != len(mask):
        raise BadVideo(f"{mask_path}: masks {mask.shape} and graph {graph.shape} do not fit; they must be (F, H, W) and (M, F)")
    h, w, top, left = fit(*mask.shape[1:], size)
    rows = ((np.arange(size) + top + 0.5) * mask.shape[1] / h).astype(int)
    columns = ((np.arange(size) + left + 0.5) * mask.shape[2] / w).astype(int)
    labels = np.empty((len(where), size, size), np.int64)
    for i, f in enumerate((np.asarray(where) * len(mask) + 0.5).astype(int).clip(0, len(mask) - 1)):
        table = np.full(max(int(mask[f].max()), int(graph[:, f].max()), 0) + 1, -1, np.int64)
        present = graph[:, f] > 0
        table[graph[present, f]] = np.flatnonzero(present)
        labels[i] = table[mask[f][rows][:, columns]]
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# 2. Real video: manifests, folders, CSV files
# ---------------------------------------------------------------------------------------------------------------------

def read_manifest(path):
    """A manifest (.json list, .jsonl), a folder root/<label>/*.mp4 or a `path,label` CSV -> list of dicts with `path`,
    `image` (bool) and, where known, caption, label, mask, graph. Paths are relative to the manifest. Wrong: BadInput."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"--data {path}: no such file or folder; give a manifest (.json, .jsonl), a CSV or a folder of videos")
    if path.is_dir():
        if (path / "manifest.json").exists():
            return read_manifest(path / "manifest.json")
        rows = [dict(video=str(f), label=f.parent.name if f.parent != path else None) for f in sorted(path.glob("**/*"))
                if f.suffix.lower() in VIDEO_SUFFIXES]
        if not rows:
            raise BadInput(f"--data {path}: a folder without videos; expected {path}/<label>/*.mp4 or {path}/*.mp4")
    elif path.suffix == ".csv":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, OSError) as error:
            raise BadInput(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None
        # Kinetics writes `path,label`, Something-Something and V-JEPA write `path label`; a header is optional
        rows = [next(csv.reader([l], delimiter="," if "," in l else " ")) for l in lines if l.strip()]
        header = rows.pop(0) if rows and len(rows[0]) > 1 and rows[0][0] in ("path", "video") else None
        for i, row in enumerate(rows):
            if len(row) < 2:
                raise BadInput(f"{path} line {i + 1 + bool(header)}: {','.join(row)!r} is not `path,label` (or `path,caption`, under a header that says so)")
        second = "caption" if header and "caption" in header[1].strip().lower() else "label"
        rows = [{"video": r[0], second: r[1]} for r in rows]
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("["):
                rows = json.loads(text)
            else:
                rows = []
                for number, line in enumerate(text.splitlines(), 1):
                    try:
                        rows += [json.loads(line)] if line.strip() else []
                    except json.JSONDecodeError as error:
                        raise BadInput(f"{path} line {number}: not a manifest ({error.msg}); expected a JSON object") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInput(f"{path}: not a manifest ({error}); expected a JSON list of {{\"video\": path, \"caption\": text}}") from None
    if not rows:
        raise BadInput(f"{path}: an empty manifest; expected a JSON list of {{\"video\": path, \"caption\": text}}")
    folder, entries = (path if path.is_dir() else path.parent), []
    for i, row in enumerate(rows):
        source = (row.get("video") or row.get("image")) if isinstance(row, dict) else None
        if not isinstance(source, str):
            raise BadInput(f"{path} entry {i + 1}: {json.dumps(row)[:80]} names neither \"video\" nor \"image\"")
        for key in ("caption", "label", "mask", "graph"):
            if row.get(key) is not None and not isinstance(row[key], (str, int) if key == "label" else str):
                raise BadInput(f"{path} entry {i + 1}: \"{key}\" must be text, not {json.dumps(row[key])[:60]}")
        file = Path(source) if path.is_dir() else folder / source
        entry = dict(path=str(file), image=not row.get("video") or file.suffix.lower() in IMAGE_SUFFIXES,
                     caption=row.get("caption"), label=None if row.get("label") is None else str(row["label"]))
        for key in ("mask", "graph"):
            given, beside = row.get(key), file.with_name(f"{file.stem}_{key}.npz")
            entry[key] = str(folder / given) if given else str(beside) if beside.exists() else None
        entries.append(entry)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------------------------------

WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"            # a split that Python's re and tiktoken read alike


def learn_bpe(texts, vocabulary=1024):
    """Byte-level byte-pair encoding: ranks {bytes: id}, the 256 bytes first, then merges, the most frequent pair each time
    (ties: the smallest pair, so that the result never depends on a hash). Works on distinct words with their counts."""
    counts = {}
    for text in texts:
        for word in re.findall(WORDS, text):
            counts[word] = counts.get(word, 0) + 1
    words = {tuple(bytes([byte]) for byte in word.encode()): n for word, n in counts.items()}
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < vocabulary:
        pairs = {}
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs:
            break                                                # every word is one token already
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        merged = {}
        for word, n in words.items():
            new, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                new.append(b"".join(word[i:i + step]))
                i += step
            merged[tuple(new)] = merged.get(tuple(new), 0) + n
        words = merged
    return ranks


@functools.lru_cache(maxsize=None)
def load_encoding(name="world"):
    """A tiktoken Encoding.  `world`: learnt from 2 000 made captions (a second, no download, the same everywhere);
    a folder: a published byte-level tokenizer (tokenizer.json, or vocab.json); else a tiktoken name, if it is cached.
    Its `<|endoftext|>` closes a text: `eot_token`. Nothing is ever downloaded."""
    import tiktoken
    if name == "world":
        ranks = learn_bpe(script(i)["caption"] for i in range(2000))
        return tiktoken.Encoding("world", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    if os.path.isdir(name):
        return published_encoding(Path(name))
    if name not in tiktoken.list_encoding_names():
        raise BadInput(f"--text {name}: neither `world`, a folder, nor a tiktoken encoding ({', '.join(tiktoken.list_encoding_names())})")
    import tiktoken.load
    fetch = tiktoken.load.read_file

    def refuse(address):
        raise BadInput(f"--text {name}: not in tiktoken's cache, and nothing is downloaded here; put it into TIKTOKEN_CACHE_DIR first")
    tiktoken.load.read_file = refuse                             # tiktoken reads its cache first and calls this only on a miss
    try:
        return tiktoken.get_encoding(name)
    finally:
        tiktoken.load.read_file = fetch


def published_encoding(folder):
    """The byte-level BPE of a published folder as a tiktoken Encoding: undo the byte-to-unicode map of its vocabulary and
    rank = id (SPECS 5, checked there on 3 000 strings)."""
    import tiktoken
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # the map that byte-level tokenizers share: printable bytes stand for themselves, the rest for 256, 257, ...
    hidden = [i for i in range(256) if i not in set(printable)]
    byte = {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(hidden)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"                # GPT-2's split
    special, whole = {}, folder / "tokenizer.json"
    try:
        if whole.exists():
            spec = json.loads(whole.read_text(encoding="utf-8"))
            vocabulary = spec["model"]["vocab"]
            special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
            pre = spec.get("pre_tokenizer") or {}
            for part in pre.get("pretokenizers", [pre]):
                if part.get("type") == "Split":
                    pattern = part["pattern"]["Regex"]
        else:
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            config = folder / "tokenizer_config.json"
            if config.exists():
                added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
                special = {t["content"]: int(i) for i, t in added.items()}
        if not special and "<|endoftext|>" in vocabulary:
            special = {"<|endoftext|>": vocabulary["<|endoftext|>"]}
        ranks = {bytes(byte[c] for c in token): i for token, i in vocabulary.items() if token not in special}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--text {folder}: not a published byte-level tokenizer ({type(error).__name__}: {error}); "
                       "expected tokenizer.json or vocab.json") from None
    special.setdefault("<|endoftext|>", max([*ranks.values(), *special.values()]) + 1)
    return tiktoken.Encoding(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tokenize(encoding, texts, length):
    """Texts -> ids int64 (b, length), closed by the end token (which is never cut off) and filled up with it, and
    mask (b, length), True = a real token (the end token included)."""
    ids = torch.full((len(texts), length), encoding.eot_token, dtype=torch.int64)
    mask = torch.zeros((len(texts), length), dtype=torch.bool)
    for i, tokens in enumerate(encoding.encode_ordinary_batch(list(texts), num_threads=1)):
        tokens = tokens[:length - 1]
        ids[i, :len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[i, :len(tokens) + 1] = True
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# 4. Batches
# ---------------------------------------------------------------------------------------------------------------------

def distinct(world, begin, count):
    """The first `count` indices from `begin` on whose captions all differ: a caption that fits two clips has no right answer."""
    seen, indices, index = set(), [], begin
    while len(indices) < count:
        caption = script(index, world)["caption"]
        if caption not in seen:
            seen.add(caption)
            indices.append(index)
        index += 1
    return indices


class WorldBatches(torch.utils.data.Dataset):
    """Batch i of the procedural world: clips begin + i·batch ... A dict of stacked scripts and words; `finish` makes the
    pixels, on the device that trains, in the process that trains (a GPU rasterises faster than it could be sent to)."""

    def __init__(self, world, batch, begin=TRAIN, indices=None):
        self.world, self.batch, self.begin, self.indices = world, batch, begin, indices

    def __getitem__(self, i):
        some = slice(i * self.batch, (i + 1) * self.batch)
        chosen = self.indices[some] if self.indices is not None else range(self.begin + some.start, self.begin + some.stop)
        scripts = [script(j, self.world) for j in chosen]
        return dict(scripts=stack(scripts), size=self.world.size, caption=[s["caption"] for s in scripts], bad=[],
                    appearance=torch.tensor([s["appearance"] for s in scripts]),
                    motion=torch.tensor([s["motion"] for s in scripts]), index=[s["index"] for s in scripts])


class VideoBatches(torch.utils.data.Dataset):
    """Batch i of real clips: epoch i // len, in an order drawn from (seed, epoch); videos and pictures never share a batch
    (their t differs). A file that cannot be used is listed in `bad` and left out: its batch is smaller, nothing else moves.
    Training takes `frames` frames in a row from a random place, every 1st to every stride-th (drawn); stride 0, and evaluation: frames
    spread over the whole video."""

    def __init__(self, entries, frames, size, batch, seed=0, train=True, stride=8):
        self.entries, self.frames, self.size, self.batch, self.seed, self.train, self.stride = entries, frames, size, batch, seed, train, stride

    @functools.lru_cache(maxsize=2)
    def plan(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for image in (False, True):
            kind = [i for i, e in enumerate(self.entries) if e["image"] == image]
            kind = [kind[j] for j in rng.permutation(len(kind))] if self.train else kind
            batches += [kind[j:j + self.batch] for j in range(0, len(kind), self.batch)]
        return [batches[j] for j in rng.permutation(len(batches))] if self.train else batches

    def __len__(self):                                           # batches of one epoch
        counts = [sum(e["image"] == image for e in self.entries) for image in (False, True)]
        return sum(-(-n // self.batch) for n in counts)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, 1, i))
        videos, labels, kept, bad = [], [], [], []
        for j in self.plan(i // len(self))[i % len(self)]:
            entry, start, stride = self.entries[j], rng.random(), int(rng.integers(1, max(self.stride, 1) + 1))
            try:
                video, _, where = decode(entry["path"], 1 if entry["image"] else self.frames, self.size,
                                         *((start, stride) if self.train and self.stride else (None, None)), places=bool(entry["mask"] and entry["graph"]))
                label = np.full(video.shape[:3], -1, np.int64)
                if entry["mask"] and entry["graph"]:
                    label = load_labels(entry["mask"], entry["graph"], where, self.size)
            except BadVideo as error:
                bad.append((entry["path"], str(error)))
                continue
            videos.append(torch.from_numpy(video))
            labels.append(torch.from_numpy(label))
            kept.append(j)
        return dict(video=torch.stack(videos) if videos else None, labels=torch.stack(labels) if videos else None, bad=bad,
                    index=kept, caption=[self.entries[j]["caption"] for j in kept], label=[self.entries[j]["label"] for j in kept])


def finish(batch, device):
    """A batch as it left its worker -> the same with `video` uint8 (b, t, H, W, 3) and `labels` int64 (b, t, H, W) on the device."""
    if "scripts" in batch:
        batch["video"], batch["labels"] = rasterise(batch.pop("scripts"), batch["size"], device)
    elif batch["video"] is not None:
        batch["video"] = batch["video"].to(device, non_blocking=True)
        batch["labels"] = batch["labels"].to(device, non_blocking=True)
    return batch


class Mixed(torch.utils.data.Dataset):
    """Batches of several datasets in given shares: batch i is a whole batch of one of them, so that videos, pictures and made clips
    never share one. Which one, and which of its batches, is a pure function of (seed, i): a resumed run draws on alike.

    The first dataset takes its share of all numbers, evenly: batch i is its own where floor(i share + phase) steps, and that floor
    counts its batches so far. The numbers that it leaves, counted anew, go to the others in the same way. So among the first i the first
    dataset has its share to within one batch, and each of the others to within a few (chance would be off by sqrt(i))."""

    def __init__(self, datasets, shares, seed=0):
        if len(datasets) != len(shares) or not datasets or min(shares) <= 0 or not math.isfinite(sum(shares)):
            raise BadInput(f"shares {', '.join(map(str, shares))} for {len(datasets)} sets: give each a number above 0")
        self.datasets = datasets
        self.shares = [share / sum(shares[j:]) for j, share in enumerate(shares)]            # ... of what those before it leave: the last 1
        self.phases = np.random.default_rng((seed, 3)).random(len(shares)).tolist()

    def place(self, i):                                          # -> (dataset, number of the batch there)
        for j, (share, phase) in enumerate(zip(self.shares, self.phases)):
            mine = math.floor(i * share + phase)
            if math.floor((i + 1) * share + phase) > mine:
                return j, mine
            i -= mine
        raise AssertionError("the last share is 1: it takes every number that is left")

    def __getitem__(self, i):
        j, n = self.place(i)
        return self.datasets[j][n]


class Shard(torch.utils.data.Dataset):
    """The part of rank `rank` of `ranks`: every ranks-th batch of a dataset. The parts are disjoint, and each rank's batch i
    exists, so that none waits for another. Of a mixture, shard each dataset, not the mixture: then at each step all ranks
    draw from the same one, and their batches have one shape."""

    def __init__(self, dataset, rank, ranks):
        if not 0 <= rank < ranks:
            raise BadInput(f"rank {rank} of {ranks}: ranks are counted from 0")
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __getitem__(self, i):
        return self.dataset[i * self.ranks + self.rank]


def loader(dataset, first, last, workers=0):
    """Batches first .. last - 1, in order, made by `workers` processes ahead of time (0: in this one). Order and content do
    not depend on the number of workers; to resume, begin at another `first`. A worker that dies ends the run: BadInput."""
    batches = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(first, last), num_workers=workers, generator=torch.Generator(),
                                          prefetch_factor=2 if workers else None, pin_memory=torch.cuda.is_available() and workers > 0)
    return watched(batches) if workers else batches


def watched(batches):
    """The batches of a DataLoader with workers. torch notices a dead worker when the system reports it, wherever this process is at that
    moment, and raises a RuntimeError from the signal's handler: here it becomes one line and exit code 2."""
    def refusal(error):
        text = str(error).strip().splitlines()
        if isinstance(error, BadInput):                          # a worker's own refusal, under the traceback that torch puts above it
            return BadInput(text[-1].split(": ", 1)[-1])
        return BadInput(f"a process that makes batches died ({text[0].rstrip('. ')}): if the system killed it, memory ran out; "
                        "give fewer --workers or a smaller --batch; --resume goes on from the last checkpoint")
    iterator, main = iter(batches), threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None       # torch's: it was set just now

    def told(number, frame):
        try:
            before(number, frame)
        except RuntimeError as error:
            raise refusal(error) from None
    if callable(before):
        signal.signal(signal.SIGCHLD, told)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):           # an error of ours in a worker: its traceback is wanted
                    raise
                raise refusal(error) from None
            except BadInput as error:
                raise (refusal(error) if str(error).startswith("Caught") else error) from None
            yield batch
    finally:
        if callable(before):
            signal.signal(signal.SIGCHLD, before)


def augment(video, labels, seed, flip=True):
    """The same random change for all frames of a clip (SPECS 2): resized crop (area 0.2-1), flip 0.5, colour jitter, grey, blur.
    video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) -> the same. `seed` (an int) decides everything. `flip` is off
    where captions tell left from right."""
    rng = np.random.default_rng((seed, 2))
    b, t, h, w, _ = video.shape
    area, ratio = rng.uniform(0.2, 1.0, b), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), b))
    sx, sy = np.sqrt(area * ratio).clip(max=1), np.sqrt(area / ratio).clip(max=1)      # crop's width and height, of 1
    cx, cy = rng.uniform(-1, 1, b) * (1 - sx), rng.uniform(-1, 1, b) * (1 - sy)
    mirror = np.where(rng.random(b) < (0.5 if flip else 0.0), -1.0, 1.0)
    zero = np.zeros(b)
    theta = torch.tensor(np.stack([sx * mirror, zero, cx, zero, sy, cy], 1).reshape(b, 2, 3), dtype=torch.float32, device=video.device)
    grid = F.affine_grid(theta, (b, 1, h, w), align_corners=False).repeat_interleave(t, 0)          # one map for all frames
    x = F.grid_sample(video.flatten(0, 1).permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    labels = F.grid_sample((labels.flatten(0, 1)[:, None] + 1).float(), grid, mode="nearest", align_corners=False)[:, 0]
    x = x.view(b, t, 3, h, w)

    def each(values):
        return torch.tensor(values, dtype=torch.float32, device=x.device).view(b, 1, 1, 1, 1)
    weights = torch.tensor((0.299, 0.587, 0.114), device=x.device).view(1, 1, 3, 1, 1)
    x = x * each(rng.uniform(0.6, 1.4, b))                                              # brightness
    mean = (x * weights).sum(2, keepdim=True).mean((1, 3, 4), keepdim=True)
    x = mean + (x - mean) * each(rng.uniform(0.6, 1.4, b))                              # contrast
    grey = (x * weights).sum(2, keepdim=True)
    x = grey + (x - grey) * each(np.where(rng.random(b) < 0.2, 0.0, rng.uniform(0.6, 1.4, b)))      # saturation, grey
    soft = F.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(x)
    x = torch.lerp(x, soft, each(np.where(rng.random(b) < 0.3, rng.uniform(0.3, 1.0, b), 0.0)))     # blur
    return (x.clamp(0, 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous(),
            labels.round().long().view(b, t, h, w) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py bench
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BenchConfig:
    """Times where clips come from: the procedural world, and the decoding of files beside a loop that decodes everything."""
    data: str | None = None             # a manifest or folder of videos; default: two clips of 854 x 480 px, made on the spot
    files: int = 8                      # how many of its videos, at most
    size: str = "large"                 # clips as these sizes take them: nano (64 px, 8 frames), tiny (128 px, 8), base, large (224 px, 16)
    image_size: int | None = None       # pixels of a side; default: the size's
    frames: int | None = None           # frames of a clip; default: the size's
    repeats: int = 5                    # timings of each, taken in turn
    out: str = "results/bench-data.json"        # file for the figures
    device: str = "auto"                # what the world is drawn on, beside the CPU: cpu, cuda, ...

    def __post_init__(self):
        for field in ("files", "repeats", "frames", "image_size"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 1")


def bench_films(files, count=300, height=480, width=854):
    """files {path: encoder's options}: one clip of `count` frames, as a camera would leave it: a long scene of the world, drawn at a third of
    the size (so that edges come out soft), with a sensor's noise, so that it costs as many bits as a filmed one. H.264, 30 frames a second."""
    import av
    noise, small, piece = np.random.default_rng(0), -(-width // 3), 10
    scene = stack([script(VALIDATION + 7, World(small, count, acts=max(count // 30, 1)))])
    with contextlib.ExitStack() as stack_of_files:
        outputs = []
        for path, options in files.items():
            file = stack_of_files.enter_context(av.open(str(path), "w"))
            outputs.append((file, file.add_stream("libx264", rate=30)))
            outputs[-1][1].height, outputs[-1][1].width, outputs[-1][1].pix_fmt, outputs[-1][1].options = height, width, "yuv420p", options
        for t in range(count):
            if t % piece == 0:
                part = {k: v[:, t:t + piece] if k in ("camera", "light") else v[:, :, t:t + piece] if k == "place" else v for k, v in scene.items()}
                drawn = rasterise(part, small)[0][0].numpy()
            frame = av.VideoFrame.from_ndarray(drawn[t % piece], format="rgb24").reformat(width=width, height=width, format="rgb24", interpolation="BICUBIC")
            big = frame.to_ndarray()[(width - height) // 2:][:height] + noise.integers(-6, 7, (height, width, 3), np.int16)
            big = av.VideoFrame.from_ndarray(big.clip(0, 255).astype(np.uint8), format="rgb24")
            for file, stream in outputs:
                file.mux(stream.encode(big))
        for file, stream in outputs:
            file.mux(stream.encode())


def decode_everything(path, frames, size, keep):
    """The plain loop, for comparison: every frame is decoded, then T are chosen. keep: what of each frame is kept until then:
    `rgb` (all of it as RGB, scaled after the choice: what one writes first), `square` (what a clip needs), `decoded` (as the
    decoder gave it: only the chosen ones are turned into RGB)."""
    import av
    square = squarer(path, size)
    turn = {"rgb": lambda frame: frame.to_ndarray(format="rgb24"), "square": square, "decoded": lambda frame: frame}[keep]
    with av.open(str(path)) as container:
        video = [turn(frame) for frame in container.decode(video=0)]
        video = [video[int((i + 0.5) * len(video) / frames)] for i in range(frames)]
        finish = {"rgb": lambda array: square(av.VideoFrame.from_ndarray(array, format="rgb24")), "square": lambda array: array, "decoded": square}[keep]
        return np.stack([finish(frame) for frame in video])


def readers(frames, size):
    """{name: a function of a path -> (T, ., ., 3) frames}. decord is no part of this project: it is timed where it is installed."""
    found = {"ours": lambda p: decode(p, frames, size)[0], "ours, one thread": lambda p: decode(p, frames, size, threads=1)[0]}
    found |= {f"plain loop, keeping {keep}": functools.partial(decode_everything, frames=frames, size=size, keep=keep) for keep in ("rgb", "square", "decoded")}
    try:
        import decord
    except ImportError:
        return found

    def by_decord(path, threads):
        with open(path, "rb") as file:
            h, w, top, left = fit(*decord.VideoReader(file, num_threads=1)[0].shape[:2], size)
        video = decord.VideoReader(str(path), num_threads=threads, width=w, height=h)
        return video.get_batch([int((i + 0.5) * len(video) / frames) for i in range(frames)]).asnumpy()[:, top:top + size, left:left + size]
    return found | {"decord": lambda p: by_decord(p, 0), "decord, one thread": lambda p: by_decord(p, 1)}


def in_turn(functions, repeats, first=0):
    """{name: function} -> {name: seconds of each repeat (r,)}. In turn, so that the machine's moods meet all; `first` rounds more, to begin
    with, are not counted."""
    seconds = {name: [] for name in functions}
    for _ in range(first + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times[first:]) for name, times in seconds.items()}


def bench_world(cfg, device):
    """-> rows: clips a second of writing scripts, and of drawing them, on each device."""
    world, rows = World(cfg.image_size, cfg.frames), []
    batch = max(1, min(32, 2 ** 22 // (cfg.frames * cfg.image_size ** 2)))
    scripts = stack([script(VALIDATION + i, world) for i in range(batch)])

    def draw(device):
        rasterise(scripts, cfg.image_size, device)
        if device != "cpu":
            torch.cuda.synchronize()
    functions = {"world, script": lambda: [script(VALIDATION + i, world) for i in range(batch)], "world, drawn on cpu": lambda: draw("cpu")}
    if device.type != "cpu":
        functions[f"world, drawn on {device.type}"] = lambda: draw(device)
    for name, seconds in in_turn(functions, cfg.repeats, first=1).items():
        rows.append(dict(source="world", name=name, clips_per_second=batch / float(np.median(seconds)), batch=batch))
        print(f"{name:46s} {rows[-1]['clips_per_second']:9.1f} clips/s", flush=True)
    return rows


def bench_file(path, cfg):
    """-> rows: milliseconds of each reader for one file, and how many times as long as ours it takes (median of the pairs)."""
    import av
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        what = f"{Path(path).name}, {stream.codec_context.name} {stream.width} x {stream.height}, {timeline(container, stream)[0]} frames"
    rows, seconds = [], in_turn({name: functools.partial(f, str(path)) for name, f in readers(cfg.frames, cfg.image_size).items()}, cfg.repeats)
    print(f"{what}: {cfg.frames} frames of {cfg.image_size} px")
    for name, times in seconds.items():
        ratio = {base: float(np.median(times / seconds[base])) for base in ("ours", "ours, one thread")}
        rows.append(dict(source=what, name=name, ms=1e3 * float(np.median(times)), clips_per_second=1 / float(np.median(times)), times_ours=ratio["ours"],
                         times_ours_one_thread=ratio["ours, one thread"]))
        print(f"    {name:42s} {rows[-1]['clips_per_second']:9.1f} clips/s  {rows[-1]['ms']:7.0f} ms   {ratio['ours']:5.2f} x ours   "
              f"{ratio['ours, one thread']:5.2f} x ours with one thread", flush=True)
    return rows


def bench(argv):
    sizes = {name: dict(size=name, image_size=size, frames=frames) for name, size, frames in
             (("nano", 64, 8), ("tiny", 128, 8), ("base", 224, 16), ("large", 224, 16))}
    cfg = configure(BenchConfig, sizes, argv)
    if not cfg.out or Path(cfg.out).is_dir():
        raise BadInput(f"--out {cfg.out!r}: give the name of a file")
    try:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {cfg.out}: cannot make its folder ({error.strerror}); give another file") from None
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else torch.device(cfg.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {cfg.device}: not available here; give cpu, or leave it out") from None
    entries = [e["path"] for e in read_manifest(cfg.data) if not e["image"]][:cfg.files] if cfg.data else []
    cores, card = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), device.type
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    print(f"{cores} cores, {torch.get_num_threads()} torch threads, {card}; medians of {cfg.repeats} in turn; clips of {cfg.frames} frames, {cfg.image_size} px")
    rows, bad = bench_world(cfg, device), []
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.data:
            films = {f"{folder}/gop250.mp4": {}, f"{folder}/gop30.mp4": {"g": "30"}}         # key frames: an encoder's own choice; a streaming site's
            bench_films(films)
            entries = list(films)
        for path in entries:
            try:
                decode(path, cfg.frames, cfg.image_size)         # the plain loop would end in a traceback
                rows += bench_file(path, cfg)
            except BadVideo as error:
                bad.append(str(error))
                print(f"left out: {error}", file=sys.stderr)
    if len(bad) == len(entries):
        raise BadInput(f"--data {cfg.data}: none of the {len(entries)} videos can be decoded; the last: {bad[-1] if bad else '-'}")
    for name in dict.fromkeys(row["name"] for row in rows if "ms" in row):
        of = [row for row in rows if row["name"] == name]
        rows.append(dict(source="all files", name=name, clips_per_second=len(of) / sum(row["ms"] for row in of) * 1e3,
                         times_ours=float(np.median([row["times_ours"] for row in of])), times_ours_one_thread=float(np.median([row["times_ours_one_thread"] for row in of]))))
        print(f"{f'all {len(of)} files, {name}':46s} {rows[-1]['clips_per_second']:9.1f} clips/s   {rows[-1]['times_ours']:5.2f} x ours   "
              f"{rows[-1]['times_ours_one_thread']:5.2f} x ours with one thread")
    import av
    write_json(cfg.out, dict(dataclasses.asdict(cfg), device=card, cores=cores, torch_threads=torch.get_num_threads(), torch=torch.__version__,
                             av=av.__version__, left_out=bad, rows=rows))
    print(f"wrote {cfg.out}")


@one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"bench": bench}
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0] not in commands:
        raise BadInput(f"python data.py {' '.join(argv[:1]) or '(nothing)'}: give one of {', '.join(commands)}; `--help` after it lists its flags")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    # This file is imported by name as well: run from here, there would be two of each class, and a BadInput of the one would not be
    # the other's. So the module of that name runs; its processes find their functions there too.
    import data
    data.main()
