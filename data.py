"""Videos in: the procedural world, real video, labels, text, batches.

Everything a run trains on comes through this file, in one form whatever its source:

    video    uint8 (b, t, H, W, 3)     as decoded; normalised later, on the device, inside the model
    labels   int64 (b, t, H, W)        trajectory id of each pixel, -1 = unlabelled (or None: no labels at all)
    caption  list of b strings, and `appearance` / `motion` / `label` class ids where there are any

1. The procedural world.  `script(index)` writes a scene as a few small numpy arrays (who moves where, in front of whom,
   over which ground, filmed how) together with its caption, classes and questions; `rasterise(scripts)` turns a batch
   of scripts into pixels and exact labels in torch, on any device.  The script of an index never changes: clip 17 is the
   same clip on every machine, with any number of workers, so a run's position in its data is one integer.  With `textures`, a
   folder, objects and grounds are painted with its pictures: real texture, exact labels.
2. Real video.  `decode` reads T frames with PyAV by seeking, straight to the size asked for; `read_manifest` takes the
   manifests, class folders and CSV files that people have.  Labels for video that has none: `dense_motion`, `classic_segment`,
   `classic_track` (or SAM2's), joined by `label_frames`.
3. Text.  tiktoken Encodings: one learnt here from made captions, a cached tiktoken name, or a published folder.
4. Batches.  `WorldBatches`, `VideoBatches`, `Mixed`: batch number i is a pure function of (seed, i).

    python data.py label videos/                                    # `_mask.npz` and `_graph.npz` beside each video, and labelled.json
    python data.py label manifest.json --method sam2 --sam2 FOLDER  # the same with a published SAM2
    python data.py make --clips 1000 --out out/world                # the world as films, label sidecars, captions, questions, a manifest
    python data.py make --textures pictures --size base             # painted with your pictures; 16 frames of 224 px
    python data.py check videos/manifest.json                       # opens every entry; each problem with its line; exit code 1 if there is one
"""
from __future__ import annotations

import argparse
import collections
import colorsys
import concurrent.futures.process
import contextlib
import csv
import dataclasses
import fractions
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm


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

class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists the flags")


def configure(config, sizes, argv, positional=None):
    """A frozen dataclass -> an instance of it, from the command line. Each field is a flag, and the comment
    beside it is its help; `positional` names a field that is given without a flag.
    Defaults < sizes[--size] < flags. sizes: {name: dict of values}, or None for a command without sizes."""
    fields = dataclasses.fields(config)
    values = {field.name: field.default for field in fields}
    if sizes is not None:
        parser = OneLineParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--size", default=config.size if config.size in sizes else next(iter(sizes)))
        size = parser.parse_known_args(argv)[0].size
        if size not in sizes:
            raise BadInput(f"--size {size}: one of {', '.join(sizes)}")
        values |= sizes[size] | dict(size=size)
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(config), re.M))
    parser = OneLineParser(description=config.__doc__.splitlines()[0], argument_default=argparse.SUPPRESS,
                           allow_abbrev=False)
    for field in fields:
        text = f"{comments.get(field.name, '')} (default: {values[field.name]})".replace("%", "%%")
        kind = {"int": int, "float": float, "str": str, "bool": bool}[field.type.split(" |")[0]]
        flag = "--" + field.name.replace("_", "-")
        if field.name == positional:
            parser.add_argument(positional, help=comments.get(field.name))
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__, help=text)
    return config(**values | vars(parser.parse_args(argv)))


def dispatch(script, doc, commands, argv):
    """`python SCRIPT COMMAND flags ...` -> commands[COMMAND](flags). --help alone prints the script's docstring."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv in (["-h"], ["--help"]):
        print(doc)
        return
    if not argv or argv[0] not in commands:
        raise BadInput(f"python {script} {' '.join(argv[:1]) or '(nothing)'}: give one of {', '.join(commands)}; `--help` after it lists its flags")
    commands[argv[0]](argv[1:])


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


def make_room(out):
    """--out, the name of a file, before the work that ends there: its folder is made, and what cannot be such a name is refused."""
    if not out or Path(out).is_dir():
        raise BadInput(f"--out {out!r}: give the name of a file")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot make its folder ({error.strerror}); give another file") from None


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
def film(path, rate, exact=False):
    """`with film(path, rate) as add`: add(frames uint8 (t, H, W, 3), H and W even), as often as one likes -> an H.264 file that every
    player opens, renamed into place at the end.
    exact: colours at full resolution, lossless: no pixel comes back more than 2 of 255 off (a test), for training; browsers do not play it.
    CHOICE: measured on made clips of 224 px, 16 frames: 207 kB a clip; the usual 4:2:0 at crf 4 takes 156 kB, and is off by up to 147 at the
    objects' borders, just where the labels change."""
    import av
    stream = None
    with replacing(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        def add(frames):
            nonlocal stream
            if stream is None:
                stream = container.add_stream("libx264", rate=fractions.Fraction(max(rate, 1.0)).limit_denominator(1001))
                stream.height, stream.width, stream.pix_fmt, stream.options = *frames.shape[1:3], "yuv444p" if exact else "yuv420p", {"crf": "0" if exact else "18"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        yield add
        container.mux(stream.encode())


def cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def alone():
    """What a process of `in_processes` does first: it keeps to one core, and ends with its parent, or by ctrl-C, at once."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: os._exit(multiprocessing.parent_process().join() or 1), daemon=True).start()


def in_processes(work, jobs, workers):
    """An iterator over (job, work(job)), in order; in `workers` processes of their own (0: in this one)."""
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    # spawned, not forked: a copy of a process whose threads hold locks may wait for them for ever
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), alone)
    try:
        yield from zip(jobs, pool.map(work, jobs))
    except concurrent.futures.process.BrokenProcessPool:
        raise BadInput("a worker process died (killed for want of memory?); what was written is whole: give fewer --workers, and run it again") from None
    finally:
        pool.shutdown(cancel_futures=True)


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

# What the subject of a story does (World.story): infinitives whose third person is "<first word>s ...", and the motion class of each.
DEEDS = {"rise": "bounce", "sink": "bounce", "dart left": "bounce", "dart right": "bounce", "circle": "orbit", "spin": "spin", "swell": "grow", "shrink": "shrink"}
ROLES = ("stays", "comes", "leaves", "returns", "leaves", "returns")         # of the others, drawn evenly from this list

# Index ranges. Training never reaches VALIDATION: it would take a thousand million clips.
TRAIN, VALIDATION, TEST, HELDOUT = 0, 1_000_000_000, 1_150_000_000, 1_200_000_000
LOW, HIGH = 0.17, 0.83                                           # centres start and end inside this box

# The skinned world (World.textures). CHOICE: an eighth of its clips stay exactly what the plain world shows; in the others a surface wears a
# picture three times out of four, and every other object has an irregular outline, the eleventh class of appearance.
SKINNED_CLIPS, SKINNED_SURFACES, IRREGULAR = 0.875, 0.75, 0.5
BLOB, BLOBS = len(SHAPES), 118                                   # `shape` 10 .. 127: irregular outlines, "blob" in words
TEXTURE_SIDE, TEXTURES_MOST, FRAMES_MOST = 256, 256, 4           # pixels of a side; pictures in all; frames of one clip
DEFORM = 0.15                                                    # largest wobble, in radii


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
    textures: str | None = None     # a folder of pictures and clips that objects and grounds are painted with
    story: bool = False             # clips to ask about what happens when: acts that begin and end at one place, objects that leave and come back

    def __post_init__(self):
        if self.story and self.frames < 8:
            raise BadInput(f"a story of {self.frames} frames: give at least 8, or an object could not leave and come back")
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise BadInput(f"max_objects {self.max_objects}: give 1 to {MAX_OBJECTS}")
        if self.frames < 1 or self.size < 8:
            raise BadInput(f"a world of {self.frames} frames at {self.size} px: give at least 1 frame and 8 px")
        if not 1 <= self.acts <= max(1, self.frames // 4):
            raise BadInput(f"acts {self.acts} in {self.frames} frames: an act needs at least 4 frames")


class Dice:
    """Random choices for a script. Only raw doubles of PCG64 are used: numpy keeps a bit generator's stream for ever, but
    may change how its higher-level methods consume it. One draw of a block is faster than many draws of one."""

    def __init__(self, *index):
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((20260222, *index))))
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
    caption, qa (list of {type, question, answer}), appearance, colour and motion (class ids of the subject), index.
    Of a skinned world also skin and bend: see `dress`."""
    dice = Dice(index)
    skinner = None if world.textures is None else Dice(index, 1)             # a stream of its own: pictures do not change who does what
    T = world.frames
    tau = np.linspace(0, 1, T) if T > 1 else np.zeros(1)

    # -- who is there: the subject first. It is the largest, so that "the" appearance and motion of a clip are visible facts.
    likely = (0, 1, 2, 2, 1, 1, 1, 1)[:world.max_objects] if world.story and world.max_objects > 1 else COUNTS[:world.max_objects]
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
    dressed = skinner is not None and skinner() < SKINNED_CLIPS
    if dressed:
        disguise(looks, skinner, subject=index < HELDOUT)

    # -- what the subject does. Places are drawn without looking at the program and drawn again until it fits.
    program = dice.pick(MOTIONS) if count > 1 else dice.pick(SOLO)
    chain = 1 if world.story else world.acts                     # a story's acts are its own
    acts, bounds = [], [round(i * T / chain) for i in range(chain + 1)]
    while True:
        for j in range(count):                                   # of the bystanders, the freest of three places
            spots = [(dice(LOW, HIGH), dice(LOW, HIGH)) for _ in range(1 if j < 2 else 3)]
            x, y = max(spots, key=lambda p: min((math.hypot(p[0] - l["x"], p[1] - l["y"]) for l in looks[:j]), default=0))
            looks[j].update(x=x, y=y)
        # growing and shrinking pass through sizes; everybody else's subject is drawn from that same spread of sizes
        spread = {"grow": -0.29, "shrink": 0.29}.get(program, dice(-0.29, 0.29))
        me = dict(looks[0], r=looks[0]["r"] * math.exp(spread))
        done = move(program, dice, tau if chain == 1 else np.linspace(0, 1, bounds[1]), me, looks[1] if count > 1 else None)
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
    for i in range(1, chain):                                    # further acts start where the last one ended
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
        if busy[j] or (j == 1 and acts[0][0] in MOTIONS[6:]) or (j == 1 and chain > 1) or dice() < 0.5:
            continue
        begin, end = dice.pick(((0, T), (0, T // 2), (T // 2, T)))
        own = move(dice.pick(("straight", "bounce", "orbit", "spin")), dice, np.linspace(0, 1, max(end - begin, 1)),
                   dict(zip("xyra", paths[j, 0])), None) if end - begin >= 3 else None
        if own is not None:
            paths[j, begin:end] = own[0]
            paths[j, end:] = own[0][-1]
            side[j] = (begin, end)

    told = tell(looks, T, world.acts, Dice(index, 2)) if world.story else {}             # a stream of its own: other worlds stay as they are
    if told:
        paths, acts, program = told["paths"], [], DEEDS[told["deeds"][0]]

    # -- depth: any order, but for who passes behind whom
    order = dice.shuffled(list(range(count)))                    # order[0] is painted first
    if count > 1 and {p for p, _ in acts} & {"behind", "front"}:
        deeper = 0 if "behind" in {p for p, _ in acts} else 1
        i, j = sorted((order.index(0), order.index(1)))
        order[i], order[j] = deeper, 1 - deeper
    if told:                                                     # what is asked about is seen
        order = [j for j in order if j] + [0]

    # -- the ground, the camera, the light
    names = dice.shuffled(list(GROUNDS))[:1 + min(int(dice() * dice() * 6), 3)]
    seeds = np.full((MAX_GROUNDS, 2), 1e3)
    for i in range(len(names)):
        seeds[i] = dice(0.05, 0.95), dice(0.05, 0.95)
    warp = np.array([dice(0.0, 0.05), dice(4, 12), dice(0, 6.3), dice(0, 6.3)])
    camera, filmed = np.tile((0.0, 0.0, 1.0), (T, 1)), ""
    if world.camera and not told and dice() < 0.35:
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
    if dressed and world.camera and not told:
        film_by_hand(camera, paths[0, :, :2], tau, skinner)

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
    skins = dress(looks, order, names, tau, skinner, dressed) if skinner else {}

    scene = dict(looks=looks, acts=acts, side=side, names=names, filmed=filmed, shine=shine, paths=paths, place=place,
                 order=order, T=T)
    words = tale(scene | told, Dice(index, 3)) if told else dict(caption=describe(scene, dice), qa=questions(scene, dice))
    return dict(index=index, seeds=seeds.astype(np.float32), warp=warp.astype(np.float32), camera=camera.astype(np.float32),
                light=light.astype(np.float32), place=place.astype(np.float32), shape=shape, count=count,
                surface=surface.astype(np.float32), **words,
                appearance=min(looks[0]["shape"], BLOB), colour=looks[0]["colour"], motion=MOTIONS.index(program), **skins)


def tell(looks, T, acts, dice):
    """What happens in a story, of any length: paths (8, T, 4) of x, y, r, angle; deeds: what the subject does, one after the other, each in
    its frames bounds[i] .. bounds[i+1] - 1; roles (j: (role, frame at which it begins to go, or None, frame at which it begins to come, or
    None)) of the others; deeds end where they begin, so that any may follow any: the question "what comes after X" has no likely answer.
    Two equal deeds never stand side by side: they would look like one. One of them, `hero`, occurs 1, 2 or 3 times, each as often."""
    count = len(looks)
    paths = np.empty((MAX_OBJECTS, T, 4))
    paths[:] = (0.5, 0.5, 1e-3, 0.0)
    # -- the subject's deeds
    hero, times = dice.pick(tuple(DEEDS)), 1 + dice.integer(min(3, (acts + 1) // 2))
    while True:
        at = set(dice.shuffled(range(acts))[:times])
        if not any(i + 1 in at for i in at):
            break
    deeds = []
    for i in range(acts):
        deeds.append(hero if i in at else dice.pick([d for d in DEEDS if d != hero and d not in deeds[-1:]]))
    bounds = [0, *(round((i + dice(-0.15, 0.15)) * T / acts) for i in range(1, acts)), T]
    paths[0] = (dice(0.45, 0.55), dice(0.45, 0.55), looks[0]["r"], looks[0]["a"])
    far = 0.22 if count < 6 else 0.16                            # not over the others
    for deed, begin, end in zip(deeds, bounds, bounds[1:]):
        tau, me = np.linspace(0, 1, end - begin + 1)[1:], paths[0, begin:end]
        out = np.sin(math.pi * tau)                              # there and back
        if deed in ("rise", "sink"):
            me[:, 1] += far * dice(0.9, 1.1) * out * (1 if deed == "sink" else -1)
        elif deed.startswith("dart"):
            me[:, 0] += far * dice(0.9, 1.1) * out * (1 if deed == "dart right" else -1)
        elif deed == "circle":
            angle, turn = dice(0, 2 * math.pi), dice.pick((1, -1))
            me[:, 0] += 0.6 * far * (np.cos(angle + turn * 2 * math.pi * tau) - math.cos(angle))
            me[:, 1] += 0.6 * far * (np.sin(angle + turn * 2 * math.pi * tau) - math.sin(angle))
        elif deed == "spin":
            me[:, 3] += dice.pick((1, -1)) * dice(3.5, 5.0) * tau
            paths[0, end:, 3] = me[-1, 3]
        else:
            me[:, 2] *= 1.6 ** (out if deed == "swell" else -out)
    # -- the others: in the corners, then at the sides
    spots = dice.shuffled([(x, y) for x in (0.16, 0.84) for y in (0.16, 0.84)]) + dice.shuffled([(0.1, 0.5), (0.9, 0.5), (0.5, 0.1), (0.5, 0.9)])
    roles, way = {}, max(1, min(T // 16, 4))                     # frames that going and coming take
    for j in range(1, count):
        home = np.array(spots[j - 1]) + (dice(-0.03, 0.03), dice(-0.03, 0.03))
        role = dice.pick(ROLES)
        goes = int(T * {"leaves": dice(0.15, 0.75), "returns": dice(0.12, 0.35)}[role]) if role in ("leaves", "returns") else None
        comes = int(T * {"comes": dice(0.3, 0.8), "returns": dice(0.55, 0.8)}[role]) if role in ("comes", "returns") else None
        frame, gone = np.arange(T), np.zeros(T)                  # 0: at home, 1: out of view
        if goes is not None:
            gone = np.interp(frame, (goes, goes + way), (0, 1))
        if comes is not None:
            gone = np.where(frame < comes, gone if goes is not None else 1.0, np.interp(frame, (comes, comes + way), (1, 0)))
        off = home - 0.5
        axis = int(abs(off[1]) > abs(off[0]))                    # the nearest edge
        paths[j] = (*home, looks[j]["r"], looks[j]["a"])
        paths[j, :, axis] += gone * (0.5 + math.copysign(0.9, off[axis]) - home[axis])
        roles[j] = (role, goes, comes)
    return dict(paths=paths, deeds=deeds, bounds=bounds, hero=hero, roles=roles)


def disguise(looks, dice, subject):
    """Of a skinned clip: which objects wear a picture, and which have an irregular outline (in place). CHOICE: captions stay true. A
    picture hides the colour, so none is told: "a textured star"; an irregular outline is a "blob", whatever it wears; sizes are not told,
    since the camera may stand nearer. subject: may the subject change? Not in the HELDOUT range, which asks for its shape and colour."""
    for j, look in enumerate(looks):
        skinned, irregular, which = dice() < SKINNED_SURFACES, dice() < IRREGULAR, dice.integer(BLOBS)
        look["size"] = "medium"
        if j or subject:
            look.update(skinned=skinned, shape=BLOB + which if irregular else look["shape"])


def film_by_hand(camera, subject, tau, dice):
    """Of a skinned clip: the camera (T, 3) of real footage, in place: nearer or farther, never quite still, and sometimes after the subject
    (T, 2), so that the ground moves and the subject does not. Contacts and depths are those of the script: all are filmed alike."""
    camera[:, 2] *= math.exp(dice(-0.1, 0.45))
    shake = dice.pick((0.0, 0.006, 0.02))
    for axis in (0, 1):
        camera[:, axis] += shake * np.sin(dice(3, 12) * tau + dice(0, 6.3))
    follow, chosen = dice(0.4, 0.8), dice() < 0.3
    if chosen:
        camera[:, :2] += follow * (subject - subject.mean(0))


def dress(looks, order, names, tau, dice, dressed):
    """skin (12, 8) of grounds 0..3 and objects 4..11: which picture, as a fraction of the folder (-1: none, the plain surface), two rows
    (du, dv, 1) that take the surface's own coordinates to the picture's in [0, 1), and a gain; bend (8, T, 5) of objects: stretch
    along the own axes, wobble, its frequency and its phase (see `rasterise`). In `names` skinned grounds become "textured ground"."""
    skin, bend = np.zeros((MAX_GROUNDS + MAX_OBJECTS, 8), np.float32), np.zeros((MAX_OBJECTS, len(tau), 5), np.float32)
    skin[:, 0], bend[:, :, :2] = -1, 1
    if not dressed:
        return dict(skin=skin, bend=bend)

    def picture(span, turn):                                     # one unit of the surface shows `span` of the picture
        cos, sin, mirror = span * math.cos(turn), span * math.sin(turn), dice.pick((1, -1))
        return dice(), mirror * cos, -mirror * sin, dice(0.15, 0.85), sin, cos, dice(0.15, 0.85), dice(0.75, 1.15)
    for i in range(len(names)):                                  # from a detail, all one stuff, to a whole scene, upright as pictures are
        chosen, worn = dice() < SKINNED_SURFACES, picture(math.exp(dice(math.log(0.15), math.log(1.2))), dice(-0.3, 0.3))
        if chosen:
            skin[i], names[i] = worn, "textured ground"
    for slot, j in enumerate(order):
        worn = picture(math.exp(dice(math.log(0.08), math.log(0.5))), dice(0, 2 * math.pi))
        free = looks[j]["shape"] >= BLOB                         # named shapes wobble a little: a star remains a star
        thin, sway, wobble, speed, phase = dice(0.5, 1.0), dice(0, 0.12), dice(0, DEFORM), dice(-4, 4), dice(0, 6.3)
        breath = sway * np.sin(speed * tau + phase) if free else 0 * tau
        bend[slot, :, 0], bend[slot, :, 1] = np.exp(breath) * 0.88, np.exp(-breath) * (0.88 * thin if free else 0.88)
        bend[slot, :, 2], bend[slot, :, 3], bend[slot, :, 4] = wobble if free else 0.3 * wobble, dice(1.5, 4.0), speed * tau + phase
        if looks[j].get("skinned"):
            skin[MAX_GROUNDS + slot] = worn
    return dict(skin=skin, bend=bend)


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
    """'large red striped star', or just 'red star' (enough to point at it: the two are unique in a clip). With a picture on it
    'textured star', which need not be unique."""
    if look["shape"] >= BLOB or look.get("skinned"):
        colour = "textured" if look.get("skinned") else list(COLOURS)[look["colour"]]
        return f"{colour} {'blob' if look['shape'] >= BLOB else SHAPES[look['shape']]}"
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
    ground = " and ".join(dict.fromkeys(names[:2])) if dice() < 0.8 else names[0]
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
    what, where, count, first, after, behind. Of a skinned clip those whose words or answer a picture hides are left out."""
    looks, acts, place, order = scene["looks"], scene["acts"], scene["place"], scene["order"]
    slot = {j: s for s, j in enumerate(order)}
    qa = []

    called = [name_of(look, False) for look in looks]
    hidden = any(look.get("skinned") for look in looks)          # its colour, that is

    def ask(kind, question, answer, *about):                     # about: the objects that the question names
        if all(called.count(called[j]) == 1 for j in about):
            qa.append(dict(type=kind, question=question, answer=answer))

    subject = looks[0]
    colour, shape = list(COLOURS)[subject["colour"]], (*SHAPES, "blob")[min(subject["shape"], BLOB)]
    largest = place[:len(looks), :, 2].mean(1).argmax() == slot[0]
    if largest and not subject.get("skinned"):
        ask("what", "What colour is the largest object?", colour)
    if not hidden:
        ask("what", f"What shape is the largest object, the {colour} one?", shape)
    elif largest:
        ask("what", "What shape is the largest object?", shape)
    ask("what", f"What does the {name_of(subject, False)} do{' first' if len(acts) > 1 else ''}?", acts[0][0], 0)
    if "textured ground" not in scene["names"]:
        ask("what", "What is the ground made of?", " and ".join(sorted(scene["names"])))
    ask("where", f"On which side is the {name_of(subject, False)} at the end?", visible_side(place[slot[0], -1, 0]), 0)
    ask("count", "How many objects are there?", str(len(looks)))
    counted = dice.pick(tuple(COLOURS))
    if not hidden:
        ask("count", f"How many {counted} objects are there?", str(sum(list(COLOURS)[l["colour"]] == counted for l in looks)))
    starts = {j: s[0] for j, s in enumerate(scene["side"]) if s}
    starts[0] = 0
    late = [j for j in starts if starts[j] > 0]
    if late:                                                     # the subject moves from the first frame on
        pair = dice.shuffled([0, late[0]])
        ask("first", f"Which moves first, the {name_of(looks[pair[0]], False)} or the {name_of(looks[pair[1]], False)}?",
            name_of(subject, False), *pair)
    for (before, _), (after, _) in zip(acts, acts[1:]):
        ask("after", f"What happened to the {name_of(subject, False)} after its first \"{before}\"?", after, 0)
        break
    if len(looks) > 1:
        passes = {p for p, _ in acts} & {"behind", "front"}
        way = dice.pick(("behind", "front"))
        word = {"behind": "behind", "front": "in front of"}[way]
        ask("behind", f"Did the {name_of(subject, False)} pass {word} the {name_of(looks[1], False)}?",
            "yes" if way in passes else "no", 0, 1)
    return qa


def tale(scene, dice):
    """Caption and questions of a story; `told`: what they speak of, for whoever wants to check them. Each question also holds `options`, the
    answer among them, drawn from the same clip where it offers enough: that something occurs is not yet the answer.
    what, first, after, times, back (who left and came back?), again (did it come back?), order. Balanced, so that a question's words
    say nothing of its answer (a test measures it): all deeds are equally likely at any place; how often the asked deed occurs, and whether
    the asked object came back, is drawn before the question."""
    looks, deeds, roles = scene["looks"], scene["deeds"], scene["roles"]
    called, qa = [name_of(look, False) for look in looks], []
    hidden = any(look.get("skinned") for look in looks)

    def ask(kind, question, answer, options, *about):            # about: the objects that question and options name
        options = [o for o in dict.fromkeys(options) if o != answer]
        if options and all(called.count(called[j]) == 1 for j in about):
            qa.append(dict(type=kind, question=question, answer=answer, options=dice.shuffled([answer, *options[:3]])))

    def others(mine, all_of):                                    # first those that occur in the clip
        return dice.shuffled(sorted(set(mine))) + dice.shuffled([x for x in all_of if x not in mine])

    def third(deed):
        return deed.replace(" ", "s ", 1) if " " in deed else deed + "s"
    me, colours = called[0], [list(COLOURS)[look["colour"]] for look in looks]
    if dice() < 0.5 and len(scene["names"]) == 1 and scene["names"][0] in GROUNDS:
        ask("what", "What is the ground made of?", scene["names"][0], others([], GROUNDS))
    elif not hidden:
        ask("what", "What colour is the largest object?", colours[0], others(colours, COLOURS))
    where = dice.pick((("first", 0), ("last", -1)))
    ask("first", f"What does the {me} do {where[0]}?", deeds[where[1]], others(deeds, DEEDS), 0)
    begun = [d for i, d in enumerate(deeds[:-1]) if d not in deeds[:i]]
    if begun:
        asked = dice.pick(begun)
        follows = deeds[deeds.index(asked) + 1]
        ask("after", f"What does the {me} do right after it first {third(asked)}?", follows, [d for d in others(deeds, DEEDS) if d != asked], 0)
    most = min(3, (len(deeds) + 1) // 2)
    if most > 1:
        ask("times", f"How many times does the {me} {scene['hero']}?", str(deeds.count(scene["hero"])), [str(n + 1) for n in range(most)], 0)
    who = [j for j, (role, _, _) in roles.items() if role == "returns"]
    if len(who) == 1 and len(roles) > 1:
        ask("back", "Which object leaves the view and comes back?", called[who[0]], dice.shuffled([called[j] for j in roles]), *roles)
    gone = [j for j, (_, goes, _) in roles.items() if goes is not None]
    if gone:
        j = dice.pick(gone)
        ask("again", f"Does the {called[j]} come back after it left?", "yes" if roles[j][0] == "returns" else "no", ["yes", "no"], j)
    pairs = [(i, j) for i, j in itertools.permutations(gone, 2) if abs(roles[i][1] - roles[j][1]) >= max(2, scene["T"] // 16)]
    if pairs:
        i, j = dice.pick(pairs)
        soon = i if roles[i][1] < roles[j][1] else j
        ask("order", f"Which leaves first, the {called[i]} or the {called[j]}?", called[soon], [called[i], called[j]], i, j)
    happens = {"comes": "comes", "leaves": "leaves", "returns": "leaves and comes back"}
    text = f"{a(name_of(looks[0]))} {', then '.join(map(third, deeds))}, on {' and '.join(dict.fromkeys(scene['names'][:2]))}"
    text += "".join(f"; {a(called[j])} {happens.get(role, 'is there')}" for j, (role, _, _) in roles.items())
    return dict(caption=text, qa=qa, told=dict(deeds=deeds, bounds=scene["bounds"], roles=roles))


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
    keys = ("seeds", "warp", "camera", "light", "place", "shape", "count", "surface", "skin", "bend")
    return {k: torch.from_numpy(np.stack([s[k] for s in scripts])) for k in keys if k in scripts[0]}


@functools.lru_cache(maxsize=None)
def outlines(device):
    """bool (10 + BLOBS, R, R): the ten shapes, then irregular outlines: wavy circles, bodies with limbs, polygons, pairs of shapes. They
    are what lets a segmenter learn "what moves together" instead of ten silhouettes."""
    dice, g = Dice(2 ** 40), (np.arange(SHAPE_RES) + 0.5) / SHAPE_RES * 2 - 1
    named, found = atlas(torch.device("cpu"))[0].numpy(), []

    def wavy():
        waves = [(k, dice(0, 0.5) / k, dice(0, 6.3)) for k in range(1, 8)]
        return lambda x, y: np.hypot(x, y) < 0.6 * (1 + sum(a * np.cos(k * np.arctan2(y, x) + p) for k, a, p in waves))

    def limbs():                                                 # capsules from one point: (angle, length, thickness)
        some = [(dice(0, 6.3), dice(0.4, 1.2), dice(0.12, 0.3)) for _ in range(2 + dice.integer(5))]
        body = dice(0.2, 0.45)

        def inside(x, y):
            hit = np.hypot(x, y) < body
            for angle, length, thick in some:
                along = (x * math.cos(angle) + y * math.sin(angle)).clip(0, length)
                hit |= np.hypot(x - along * math.cos(angle), y - along * math.sin(angle)) < thick
            return hit
        return inside

    def polygon():
        sides = sorted(dice(0, 6.3) for _ in range(3 + dice.integer(4))) + [0.0, 2.1, 4.2]               # the last three close it
        far = [dice(0.3, 0.9) for _ in sides]
        return lambda x, y: np.all([x * math.cos(angle) + y * math.sin(angle) < d for angle, d in zip(sides, far)], 0)

    def pair():
        parts = [(named[dice.integer(len(SHAPES))], dice(-0.3, 0.3), dice(-0.3, 0.3), dice(0.5, 0.9)) for _ in range(2)]

        def inside(x, y):
            hit = np.zeros(x.shape, bool)
            for table, cx, cy, r in parts:
                u, v = (x - cx) / r, (y - cy) / r
                cell = [((q + 1) * SHAPE_RES / 2).astype(int).clip(0, SHAPE_RES - 1) for q in (v, u)]
                hit |= (abs(u) < 1) & (abs(v) < 1) & table[cell[0], cell[1]]
            return hit
        return inside
    coarse = np.meshgrid(g[::4] * 2, g[::4] * 2)
    while len(found) < BLOBS:
        inside = (wavy, limbs, polygon, pair)[len(found) % 4]()
        hit = inside(*coarse)
        if not hit.any():
            continue
        cx, cy = (c[hit].mean() for c in coarse)                 # about its own middle, as large as fits
        far = np.hypot(coarse[0][hit] - cx, coarse[1][hit] - cy).max() + 0.06
        whole = inside(*np.meshgrid(g * far / 0.95 + cx, g * far / 0.95 + cy))
        if whole.mean() > 0.2:                                   # no threads
            found.append(whole)
    return torch.tensor(np.concatenate([named, np.stack(found)]), device=device)


@functools.lru_cache(maxsize=2)
def load_textures(folder):
    """The pictures and clips below a folder -> uint8 (n, R, R, 3), and why files are left out, a line each. n <= TEXTURES_MOST and
    R = TEXTURE_SIDE: at most 50 MB, and 90 MB, with the smaller sizes of `pyramid`, where it is drawn. Files in the order of their
    paths; of each clip up to FRAMES_MOST frames, evenly; of more files than fit, every so many. The central square of each. A
    function of the folder's content: the same everywhere. A folder of nothing usable: BadInput."""
    root, chosen, bad = Path(folder), [], []
    if not root.is_dir():
        raise BadInput(f"--textures {folder}: no such folder; give a folder of pictures or clips")
    files = sorted((f for f in root.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not f.name.startswith(".")),
                   key=lambda f: f.relative_to(root).as_posix())
    if not files:
        raise BadInput(f"--textures {folder}: no picture and no clip in it; expected files such as {folder}/a.jpg or {folder}/b.mp4")
    if len(files) > TEXTURES_MOST:
        files = [files[i * len(files) // TEXTURES_MOST] for i in range(TEXTURES_MOST)]
    each = max(1, min(FRAMES_MOST, TEXTURES_MOST // len(files)))

    def read(file):
        frames = 1 if file.suffix.lower() in IMAGE_SUFFIXES else each
        try:
            return decode(file, frames, TEXTURE_SIDE, threads=1)[0]
        except BadVideo as error:
            try:                                                 # one frame of a clip that is short, or cut, still is a texture
                return decode(file, 1, TEXTURE_SIDE, threads=1)[0]
            except BadVideo:
                return str(error)
    with concurrent.futures.ThreadPoolExecutor(min(8, cores())) as pool:
        for file, got in zip(files, pool.map(read, files)):
            (bad if isinstance(got, str) else chosen).append(got)
    if not chosen:
        raise BadInput(f"--textures {folder}: none of its {len(files)} files can be used; the last: {bad[-1]}")
    return torch.from_numpy(np.concatenate(chosen)), bad


def open_textures(folder):
    """What a command does first with --textures: read them, name what is left out, tell what there is. -> a number that changes when the
    pictures do (None without a folder): a run that goes on must see the clips it began with."""
    if folder is None:
        return None
    textures, bad = load_textures(folder)
    for reason in bad:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"textures: {len(textures)} pictures of {folder}" + (f"; {len(bad)} files left out" if bad else ""))
    return zlib.crc32(textures.numpy())


@functools.lru_cache(maxsize=2)
def pyramid(folder, device):
    """The textures at R, R/2, ... 16 pixels, one after the other, each pixel's colour in one int32: one look-up reads all three. Small
    objects read small pictures: every third pixel of a large one would flicker as nothing real does. -> int32 (cells,), sides."""
    x, sides = F.pad(load_textures(folder)[0].permute(0, 3, 1, 2), (0, 0, 0, 0, 0, 1)), [TEXTURE_SIDE >> i for i in range(5)]           # (n, 4, R, R)
    levels = [F.adaptive_avg_pool2d(some.float(), side).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().view(torch.int32).flatten()
              for side in sides for some in x.split(16)]
    return torch.cat(levels).to(device), sides


@torch.no_grad()
def rasterise(scripts, size, device="cpu", textures=None):
    """stack(scripts) -> video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) with H = W = size, on `device`.
    Painter's algorithm: the ground, then objects from the deepest to the nearest; each pixel remembers the last surface
    that covered it and the surface's own coordinates there, and is coloured once, at the end. So many clips
    are drawn together, 16 on a CPU: measured on two cores at 64 px, 1.8x as fast as two by two, and more gains nothing.
    textures: of a skinned world, its folder."""
    device = torch.device(device)
    if "skin" in scripts and textures is None:
        raise ValueError("scripts of a skinned world are drawn with rasterise(..., textures=world.textures)")
    b = len(scripts["count"])
    chunk = 16 if device.type == "cpu" else 64
    out = [_rasterise({k: v[i:i + chunk].to(device) for k, v in scripts.items()}, size, device, textures) for i in range(0, b, chunk)]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])


def _rasterise(s, size, device, textures):
    shapes = outlines(device) if "bend" in s else atlas(device)[0]
    reach = 1.25 if "bend" in s else 1.0                         # how far from its place an object may be seen, in radii along its axes
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
        hit = ((ou.abs() < reach) & (ov.abs() < reach) & visible).flatten().nonzero()[:, 0]
        fu, fv = ou.flatten().index_select(0, hit), ov.flatten().index_select(0, hit)
        if "bend" in s:                                          # its outline and its picture give way together
            across, along, amount, freq, phase = s["bend"][:, j].flatten(0, 1).index_select(0, hit // (w * w)).unbind(1)
            fu, fv = (fu + amount * torch.sin(freq * fv + phase)) / across, (fv + amount * torch.sin(freq * fu - phase)) / along
            kept = ((fu.abs() < 1) & (fv.abs() < 1)).nonzero()[:, 0]
            hit, fu, fv = hit.index_select(0, kept), fu.index_select(0, kept), fv.index_select(0, kept)
        kind = s["shape"][:, j].index_select(0, hit // (t * w * w))
        # just below 1, a coordinate is rounded up to SHAPE_RES, which is beyond the last row
        row, column = ((f * half + half).long().clamp_(max=SHAPE_RES - 1) for f in (fv, fu))
        inside = flat.index_select(0, (kind * SHAPE_RES + row) * SHAPE_RES + column)
        where = (frame + iy[..., None] * size + ix[:, :, None]).flatten()[hit[inside]]
        u.view(-1)[where], v.view(-1)[where] = fu[inside], fv[inside]
        ids.view(-1)[where] = MAX_GROUNDS + j
    # colour every pixel once: its surface's row of the table, one column after the other. (Measured: index_select on a
    # plane is 4x faster than advanced indexing.)
    row = (ids + torch.arange(b, device=device, dtype=torch.int32)[:, None, None, None] * s["surface"].shape[1]).flatten()
    u, v = u.flatten(), v.flatten()
    if "skin" in s:                                              # plain and skinned pixels apart: each kind costs only itself
        worn = (s["skin"][..., 0] >= 0).flatten().index_select(0, row)
        planes = torch.empty((3, len(row)), device=device)
        for which, look in ((~worn, _plain), (worn, functools.partial(_skinned, size=size, textures=textures))):
            which = which.nonzero()[:, 0]
            for plane, part in zip(planes, look(s, *(x.index_select(0, which) for x in (row, u, v)))):
                plane.index_copy_(0, which, part)
    else:
        planes = _plain(s, row, u, v)
    video = torch.empty((b, t, size, size, 3), dtype=torch.uint8, device=device)
    for c, plane in enumerate(planes):
        video[..., c] = plane.view(b, t, size, size).mul_(s["light"][:, :, c, None, None]).clamp_(0, 255)
    return video, ids.long()


def _plain(s, row, u, v):
    """Pixels (n,) of these rows of the table, at these coordinates of their surfaces -> an iterator over three planes (n,): R, G, B."""
    textures = atlas(row.device)[1]
    column = s["surface"].flatten(0, 1).t().contiguous()                     # (11, b·12)
    kind, tiles, cos, sin, shade = (column[i].index_select(0, row) for i in range(5))
    tiles *= TEXTURE_RES
    tu = ((u * cos + v * sin) * tiles).floor().to(torch.int32) & (TEXTURE_RES - 1)
    tv = ((v * cos - u * sin) * tiles).floor().to(torch.int32) & (TEXTURE_RES - 1)
    blend = textures.flatten().index_select(0, (kind.to(torch.int32) * TEXTURE_RES + tv) * TEXTURE_RES + tu)
    gain = 1 + shade * v
    for c in range(3):
        one, step = column[5 + c].index_select(0, row), (column[8 + c] - column[5 + c]).index_select(0, row)
        yield one.addcmul_(step, blend).mul_(gain)


def _skinned(s, row, u, v, size, textures):
    """The same for pixels that wear a picture: the nearest pixel of it, in the size of it that fits the surface's on the screen."""
    cells, sides = pyramid(textures, row.device)
    skin, n = s["skin"], len(load_textures(textures)[0])
    # how many pixels of the largest picture fall on one of the screen: of a ground 1 unit is the frame, of an object its radius
    radius = torch.cat((s["camera"][:, :, 2].mean(1, keepdim=True).expand(-1, MAX_GROUNDS), s["place"][..., 2].mean(2)), 1)        # (b, 12)
    crowd = skin[..., 1:3].norm(dim=-1) * sides[0] / (radius * size)
    level = crowd.clamp(min=1e-6).log2().round().clamp(0, len(sides) - 1).int()
    side = torch.tensor(sides, dtype=torch.int32, device=row.device)[level]
    begin = torch.tensor([n * sum(q * q for q in sides[:i]) for i in range(len(sides))], dtype=torch.int32, device=row.device)[level]
    begin += (skin[..., 0] * n).int().clamp(max=n - 1) * side * side
    begin, side = (x.flatten().index_select(0, row) for x in (begin, side))
    a, b, c, d, e, f, gain = (x.index_select(0, row) for x in skin[..., 1:].flatten(0, 1).t().contiguous())
    shade = s["surface"][..., 4].flatten().index_select(0, row)
    x, y = ((q * side).floor().to(torch.int32) & (2 * side - 1) for q in (c.addcmul_(a, u).addcmul_(b, v), f.addcmul_(d, u).addcmul_(e, v)))
    x, y = torch.minimum(x, 2 * side - 1 - x), torch.minimum(y, 2 * side - 1 - y)         # beyond its edge a picture is mirrored: no seam
    rgb = cells.index_select(0, begin + y * side + x).view(torch.uint8).view(-1, 4)
    gain *= 1 + shade * v
    return (rgb[:, i] * gain for i in range(3))


# -----------------------------------------------------------------------------------------------------------
# 2. Real video
# -----------------------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".gif", ".asf", ".wmv", ".flv",
                  ".ts", ".3gp"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@contextlib.contextmanager
def opened(path):
    """`with opened(path) as (container, stream)`: a file and its first video stream, by PyAV. Whatever goes
    wrong inside is a BadVideo of one line."""
    import av
    if not os.path.isfile(path):
        raise BadVideo(f"{path}: no such file; paths are relative to the manifest, with / between folders")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise BadVideo(f"{path}: holds no video that can be decoded; give another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if torch.utils.data.get_worker_info() is not None:
                stream.codec_context.thread_count = 1           # the other cores are other workers'
            yield container, stream
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise BadVideo(f"{path}: cannot be decoded ({reason}); re-encode or remove it") from None


def rate_of(stream):
    """Frames a second, as the header says; of a GIF that is a guess from its first frames."""
    if stream.codec_context.name == "gif" and stream.duration:
        return float(stream.frames / (stream.duration * stream.time_base))
    return float(stream.average_rate or stream.guessed_rate or 25)


def frame_rate(path):
    """Frames a second of a video file."""
    with opened(path) as (_, stream):
        return rate_of(stream)


def frame_count(path, container, stream):
    """How many frames a video shows, as its header says."""
    length = float((stream.duration or 0) * stream.time_base)
    if not length and "DURATION" in stream.metadata:            # MKV
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        length = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    expected = round(length * rate_of(stream))
    if "mov" in container.format.name and length:
        return min(stream.frames or expected, expected)         # an edit list may hide some
    return stream.frames or expected or len(frame_times(path))


def frame_times(path):
    """When each frame of a video is shown, in seconds after the first. Nothing is decoded."""
    with opened(path) as (container, stream):
        tick, rate = float(stream.time_base), rate_of(stream)
        by_count = container.format.name == "avi"
        stamps = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    if by_count or None in stamps:
        return np.arange(len(stamps)) / rate
    return (np.array(sorted(stamps)) - min(stamps, default=0)) * tick


def upright(frame, size, whole=False):
    """A frame of PyAV -> uint8 (size, size, 3), its central square; whole: (h, w, 3), all of it, and the short
    side is `size`. Pixels are taken as square ones."""
    import av
    turns = round(frame.rotation / 90) % 4                      # phones store the picture lying on its side
    if frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        # below what is transparent a file may hold any colour. Pages show white.
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        frame = av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")
    scale = size / min(frame.width, frame.height)
    w = max(size, round(frame.width * scale))
    h = max(size, round(frame.height * scale))
    image = frame.reformat(w, h, "rgb24", interpolation="AREA").to_ndarray()
    if not whole:
        top, left = (h - size) // 2, (w - size) // 2
        image = image[top:top + size, left:left + size]
    return np.ascontiguousarray(np.rot90(image, turns))


def in_order(path, container, stream):
    """All frames as they are shown -> an iterator over (seconds after the first, frame)."""
    rate, tick, start = rate_of(stream), float(stream.time_base), stream.start_time or 0
    shape = stream.width, stream.height
    for count, frame in enumerate(container.decode(stream)):
        if (frame.width, frame.height) != shape:
            raise BadVideo(f"{path}: a frame of {frame.width} x {frame.height} px among those of {shape[0]} x {shape[1]}; "
                           "re-encode it at one size")
        # AVI has no time stamps: the n-th frame that the decoder gives out is shown at n / rate
        if frame.pts is None or container.format.name == "avi":
            yield count / rate, frame
        else:
            yield (frame.pts - start) * tick, frame


def on_screen(frames, wanted):
    """(seconds, frame) pairs in order -> a list of those on screen at the times `wanted`."""
    shown, ahead, found = None, next(frames, None), []
    for t in wanted:
        while ahead and (shown is None or ahead[0] <= t):
            shown, ahead = ahead, next(frames, None)
        found.append(shown)
    return found


def by_seeking(container, stream, wanted):
    """The same without decoding everything; None if the file does not allow it.

    Packets tell when frames are shown before anything is decoded. Decoding goes from the key frame before a
    wanted frame up to it, and leaves out frames that no other refers to: half of an ordinary H.264 file."""
    codec, tick, start = stream.codec_context, float(stream.time_base), stream.start_time or 0
    # AVI has no time stamps. Of 4:4:4 an old x264 says in the first frame alone how it is to be decoded.
    if container.format.name == "avi" or "444" in (codec.pix_fmt or ""):
        return None
    margin = 1 + 16 / rate_of(stream)                           # frames are stored in another order than shown
    if wanted[0] > margin:
        container.seek(start + int((wanted[0] - margin) / tick), stream=stream)
    packets = []
    for packet in container.demux(stream):
        if packet.size:
            packets.append(packet)
        if packet.dts is not None and (packet.dts - start) * tick > wanted[-1]:
            break
    stamps = [packet.pts for packet in packets]
    if None in stamps:
        return None
    shown = np.array(sorted(p.pts for p in packets if not p.is_discard))
    places = np.searchsorted((shown - start) * tick, wanted, side="right") - 1
    if len(shown) == 0 or places[0] < 0:
        return None
    chosen, needed, frames = shown[places].tolist(), set(), {}
    for pts in set(chosen):
        at = key = stamps.index(pts)
        while not (packets[key].is_keyframe and stamps[key] <= pts):
            key -= 1
            if key < 0:
                return None
        needed.update(range(key, at + 1))

    def keep(decoded):
        frames.update({frame.pts: frame for frame in decoded if frame.pts in chosen})

    for i in sorted(needed):
        if i - 1 not in needed:                                 # a key frame: what was before it is forgotten
            keep(codec.decode(None))
            codec.flush_buffers()
        codec.skip_frame = "DEFAULT" if stamps[i] in chosen else "NONREF"
        keep(codec.decode(packets[i]))
    keep(codec.decode(None))
    codec.flush_buffers()
    if not all(pts in frames for pts in chosen):
        return None
    return [((pts - start) * tick, frames[pts]) for pts in chosen]


def decode(path, frames, size, start=None, stride=1, whole=False):
    """T frames of a video, or the one of a picture -> uint8 (T, size, size, 3), and when they are shown, in
    seconds after the first frame (T,). whole: (T, h, w, 3), not cut, the short side `size`.

    start=None: what is on screen in the middles of T equal parts. Else T frames in a row, every `stride`-th
    (less where the video is too short), from `start` on, a fraction 0 .. 1 of the room there is.

    BadVideo: fewer than T frames, a file that ends early, one that fails. Not noticed are wrong pixels that a
    damaged file decodes to without an error, and transport streams joined from several; a decoder that hangs
    is waited for."""
    with opened(path) as (container, stream):
        rate, total = rate_of(stream), frame_count(path, container, stream)
        if total < frames:
            raise BadVideo(f"{path}: has {total} frames, fewer than the {frames} of a clip; give less --frames or a longer video")
        if start is None:
            numbers = np.floor((np.arange(frames) + 0.5) * total / frames)
        else:
            stride = max(1, min(stride, total // frames))
            numbers = round(start * (total - 1 - (frames - 1) * stride)) + np.arange(frames) * stride
        # the middle of a frame's time: no rounding makes it a neighbour's
        wanted = (numbers + 0.5) / rate
        # what lies far apart is sought one by one
        far = np.flatnonzero(np.diff(wanted) > 4 * (1 + 16 / rate)) + 1
        parts = [by_seeking(container, stream, part) for part in np.split(wanted, far)]
        found = None if None in parts else sum(parts, [])
        if found is None:
            container.seek(0)
            stream.codec_context.skip_frame = "DEFAULT"
            found = on_screen(in_order(path, container, stream), wanted)
        if None in found:
            raise BadVideo(f"{path}: holds no frame that can be decoded; re-encode or remove it")
        images = [upright(frame, size, whole) for _, frame in found]
        times = np.array([time for time, _ in found])
    slack = max(2 / rate, 0.05 * total / rate)
    if wanted[-1] - times[-1] > slack and wanted[-1] - frame_times(path)[-1] > slack:
        raise BadVideo(f"{path}: ends before the {total / rate:.2f} s that its header announces; re-encode or cut it")
    return np.stack(images), times


def read_frames(path, size, whole=False):
    """Every frame of a video, in order -> an iterator over uint8 (c, size, size, 3), c <= 8, cut as `decode`
    cuts; whole: (c, h, w, 3). Memory does not grow with the video. BadVideo as for `decode`."""
    piece, end = [], 0
    with opened(path) as (container, stream):
        rate, total = rate_of(stream), frame_count(path, container, stream)
        for time, frame in in_order(path, container, stream):
            piece.append(upright(frame, size, whole))
            end = max(end, time + 1 / rate)
            if len(piece) == 8:
                yield np.stack(piece)
                piece = []
    if piece:
        yield np.stack(piece)
    if not end:
        raise BadVideo(f"{path}: holds no frame that can be decoded; re-encode or remove it")
    if total / rate - end > max(3 / rate, 0.05 * total / rate):
        raise BadVideo(f"{path}: ends at {end:.2f} s of the {total / rate:.2f} s that its header announces; re-encode or cut it")


def load_labels(mask_path, graph_path, times, size, video):
    """The sidecars of a video -> int64 (T, size, size): the trajectory of each pixel of the frames shown at
    `times`, -1 = none; cut to the same central square as `decode` cuts, by nearest neighbour.
    mask: `arr_0` (F, H, W), the object id of each pixel, 0 = none. graph: `tensor` (M, F), the object id of
    trajectory m in frame f, 0 = absent. An id that no trajectory owns is unlabelled."""
    mask, graph = sidecars(mask_path, graph_path)
    shown = frame_times(video)
    if abs(len(mask) - len(shown)) > max(2, 0.05 * len(shown)):
        raise BadVideo(f"{mask_path}: masks of {len(mask)} frames, but the video has {len(shown)}; write one for each")
    h, w = mask.shape[1:]
    scale = min(h, w) / size
    place = (np.arange(size) + 0.5 - size / 2) * scale
    rows = (h / 2 + place).astype(int)
    columns = (w / 2 + place).astype(int)
    labels = np.full((len(times), size, size), -1)
    for label, f in zip(labels, np.searchsorted(shown, times).clip(max=len(mask) - 1)):
        ids = mask[f][rows[:, None], columns]
        order = np.argsort(graph[:, f])                         # trajectories by the id that they have here
        sorted_ids = graph[order, f]
        at = np.searchsorted(sorted_ids, ids).clip(max=len(order) - 1)
        found = (ids > 0) & (sorted_ids[at] == ids)
        label[found] = order[at[found]]
    return labels


def sidecars(mask_path, graph_path):
    """-> mask (F, H, W) and graph (M, F), whole numbers. BadVideo names the file that is wrong."""
    arrays = []
    for path, key, axes in ((mask_path, "arr_0", 3), (graph_path, "tensor", 2)):
        if path is None:
            raise BadVideo(f"{mask_path or graph_path}: masks and graphs come in pairs; write both, or remove both")
        try:
            with np.load(path) as file:
                array = file[key]
        # what numpy raises depends on where a file is damaged
        except Exception as error:
            raise BadVideo(f"{path}: no labels can be read ({type(error).__name__}: {error}); write both sidecars again, or remove them") from None
        if array.ndim != axes or array.dtype.kind not in "iub" or not array.size:
            raise BadVideo(f"{path}: `{key}` is {array.dtype} {array.shape}; it must be whole numbers of {axes} axes")
        arrays.append(array)
    mask, graph = arrays
    if graph.shape[1] != len(mask):
        raise BadVideo(f"{mask_path}: {len(mask)} frames, but its graph has {graph.shape[1]}; write both again")
    return mask, graph


# -----------------------------------------------------------------------------------------------------------
# 3. Manifests, CSV files, folders
# -----------------------------------------------------------------------------------------------------------

# what people call the columns of a CSV file
COLUMNS = {"video": ("video", "path", "filename", "file", "video_path"), "caption": ("caption", "text", "sentence"),
           "label": ("label", "class", "action"), "split": ("split",), "mask": ("mask",), "graph": ("graph",),
           "group": ("group",)}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_manifest(path):
    """A manifest (a JSON list or JSON lines), a CSV file or a folder -> a list of entries, one for each file:
    dicts of path, name (the path relative to the manifest), image (bool), caption (list of texts or None),
    label, split ("train", "val", "test" or None), mask, graph, and where given group, qa (list of dicts
    question, answer), conversations (list of conversations: lists of such dicts).

    Rows that name the same file are one entry with all their captions and questions. Masks and graphs that
    are not named are looked for beside the video. What is wrong: BadInput, which says in which line."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give a manifest (.json, .jsonl), a CSV or a folder of videos")
    if path.is_dir() and (path / "manifest.json").exists():
        path = path / "manifest.json"
    if path.is_dir():
        folder, rows = path, folder_rows(path)
    else:
        folder = path.parent
        read = csv_rows if path.suffix.lower() in (".csv", ".tsv", ".txt") else json_rows
        rows = read(path, read_text(path))
    entries = {}
    for where, row in rows:
        try:
            entry = to_entry(row, folder)
            file = os.path.realpath(entry["path"])
            entries[file] = joined(entries[file], entry) if file in entries else entry
        except ValueError as error:
            raise BadInput(f"{path} {where}: {error}") from None
    if not entries:
        raise BadInput(f'{path}: no entries; expected a JSON list of {{"video": path, "caption": text}}')
    return list(entries.values())


def read_text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a manifest in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def json_rows(path, text):
    """A JSON list, or an object a line -> (where, row) pairs."""
    def load(part, line):
        try:
            return json.loads(part)
        except ValueError as error:
            line += getattr(error, "lineno", 1) - 1
            raise BadInput(f"{path} line {line}: not a manifest ({error}); expected a JSON list of "
                           '{"video": path, "caption": text}, or such an object a line') from None

    if text.lstrip().startswith("["):
        return [(f"entry {number}", row) for number, row in enumerate(load(text, 1), 1)]
    # not splitlines: a text in JSON may hold other line separators
    lines = enumerate(text.split("\n"), 1)
    return [(f"line {number}", load(line, number)) for number, line in lines if line.strip()]


def csv_rows(path, text):
    """A table with a header, or `path,label` rows without one -> (where, row) pairs. Cells may stand between
    commas, semicolons, tabs or spaces."""
    first = text.partition("\n")[0]
    delimiter = next((d for d in "\t,;" if d in first), " ")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            where = f"line {reader.line_num}"
            if not any(cells):
                continue
            if header is None:
                media = Path(cells[0]).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
                header = ["video", "label"] if media else known_columns(f"{path} {where}", cells)
                if not media:
                    continue
            if len(cells) != len(header):
                raise BadInput(f"{path} {where}: {len(cells)} cells, not the {len(header)} of {', '.join(map(str, header))}; "
                               "quote a cell that holds the separator")
            yield where, {key: cell for key, cell in zip(header, cells) if key and cell}
    except csv.Error as error:
        raise BadInput(f"{path} line {reader.line_num}: not a table ({error})") from None


def known_columns(where, cells):
    """A header -> our name of each column, None for those that are not read."""
    names = {name: key for key, known in COLUMNS.items() for name in known}
    header = [names.get(cell.lower()) for cell in cells]
    if "video" not in header or not {"caption", "label", "mask"} & set(header):
        known = "; ".join(f"{key}: {', '.join(names)}" for key, names in COLUMNS.items())
        raise BadInput(f"{where}: a header of {', '.join(cells)[:80]}; name the file and its caption or label by known names ({known})")
    return header


def folder_rows(root):
    """root/[train|val|test/]label/.../file -> (where, row) pairs. Links are followed, hidden names left out."""
    videos, pictures = [], []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        targets = {name: os.path.realpath(os.path.join(folder, name)) + os.sep for name in folders}
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX"
                            and not here.startswith(targets[name]))          # a link to a folder above
        for name in sorted(files):
            file = Path(folder, name).relative_to(root)
            if name[0] != "." and file.suffix.lower() in VIDEO_SUFFIXES:
                videos.append(file)
            elif name[0] != "." and file.suffix.lower() in IMAGE_SUFFIXES:
                pictures.append(file)
    for file in videos or pictures:
        above = list(file.parts[:-1])
        row = {"video": str(file)}
        if above and above[0] in SPLITS:
            row["split"] = above.pop(0)
        if above:
            row["label"] = above[0]
        yield str(file), row


def is_text(value):
    """A text that is not empty, and can be written as UTF-8: half of a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def to_entry(row, folder):
    """A row of a manifest -> an entry. ValueError says what is wrong with it."""
    def given(key, fits, form):
        value = row.get(key)
        if value is not None and not fits(value):
            raise ValueError(f'"{key}" is {json.dumps(value)[:60]}; give {form}, or leave it out')
        return value

    source = (row.get("video") or row.get("image")) if isinstance(row, dict) else None
    if not is_text(source):
        raise ValueError(f'{json.dumps(row)[:80]} names neither "video" nor "image"; write {{"video": path}}')
    file = Path(folder, source)
    entry = dict(path=str(file), name=Path(os.path.relpath(file, folder)).as_posix())
    entry["image"] = not row.get("video") or file.suffix.lower() in IMAGE_SUFFIXES
    captions = given("caption", are_texts, "a text, or a list of texts, none empty, in UTF-8")
    entry["caption"] = [captions] if isinstance(captions, str) else captions
    for key in ("label", "group"):
        name = given(key, lambda value: is_text(value) or type(value) is int, "a name or a whole number")
        entry[key] = None if name is None else str(name)
    entry["split"] = SPLITS.get(given("split", lambda value: value in SPLITS, '"train", "val" or "test"'))
    for key in ("mask", "graph"):
        beside = file.with_name(f"{file.stem}_{key}.npz")
        path = given(key, is_text, "a path")
        if path is None and beside.exists():
            entry[key] = str(beside)
        else:
            entry[key] = path and str(Path(folder, path))
    if given("qa", are_questions, 'a list of {"question": text, "answer": text}'):
        entry["qa"] = row["qa"]
    form = '[{"from": "human", "value": question}, {"from": "gpt", "value": answer}, ...], the two in turn'
    if given("conversations", are_turns, form):
        entry["conversations"] = [conversation(row["conversations"])]
    return entry


def are_texts(value):
    return is_text(value) or isinstance(value, list) and bool(value) and all(map(is_text, value))


def are_questions(value):
    return isinstance(value, list) and all(
        isinstance(qa, dict) and is_text(qa.get("question")) and is_text(qa.get("answer")) for qa in value)


def are_turns(value):
    """Is this a conversation in LLaVA's form, whose questions are more than a <video> mark?"""
    if not isinstance(value, list) or not value or len(value) % 2:
        return False
    for turn, who in zip(value, itertools.cycle(("human", "gpt"))):
        if not isinstance(turn, dict) or turn.get("from") != who or not is_text(turn.get("value")):
            return False
    return all(turn["question"] for turn in conversation(value))


def conversation(turns):
    """LLaVA's turns -> [dict(question, answer, ...)]. A <video> mark goes, and the words around it stay
    apart: the video always stands before the text."""
    pairs = []
    for human, gpt in zip(turns[::2], turns[1::2]):
        text = re.sub(r"\s*<(video|image)>\s*", " ", human["value"]).strip()
        more = {key: human[key] for key in ("type", "options") if key in human}
        pairs.append(dict(question=text, answer=gpt["value"]) | more)
    return pairs


def joined(entry, other):
    """Two rows of one file -> one entry with the captions and questions of both."""
    for key in ("label", "split", "mask", "graph", "group"):
        if None not in (entry[key], other[key]) and entry[key] != other[key]:
            raise ValueError(f'"{key}" is {other[key]!r}, but an earlier row of the same file says {entry[key]!r}')
    together = {key: other[key] if entry[key] is None else entry[key] for key in other}
    together["caption"] = list(dict.fromkeys((entry["caption"] or []) + (other["caption"] or []))) or None
    for key in ("qa", "conversations"):
        if key in entry or key in other:
            together[key] = entry.get(key, []) + other.get(key, [])
    return together


def split(entries):
    """-> (training, held out). "split" decides where it is given: entries without it are trained on. If no
    entry has one, a hash of each name holds out a quarter, at most 5 000: an entry stays on its side when
    others are added. Of a few entries at least a sixth is held out."""
    if any(entry["split"] for entry in entries):
        held_out = [entry for entry in entries if entry["split"] in ("val", "test")]
    else:
        share = min(0.25, 5000 / len(entries))
        order = sorted(entries, key=lambda entry: zlib.crc32(entry["name"].encode()))
        count = sum(zlib.crc32(entry["name"].encode()) < share * 2 ** 32 for entry in entries)
        held_out = order[:max(count, min(len(entries), 24) // 6, 1)]
    names = {entry["name"] for entry in held_out}
    train = [entry for entry in entries if entry["name"] not in names]
    if not train or not held_out:
        raise BadInput(f"{len(train)} clips to train on and {len(held_out)} held out: at least one of each is needed; "
                       'mark some entries "split": "val", or give --val')
    return train, [entry for entry in entries if entry["name"] in names]



# ---------------------------------------------------------------------------------------------------------------------
# 2. Real video: dense motion
# ---------------------------------------------------------------------------------------------------------------------

def opponent(frames):
    """uint8 (t, H, W, 3) -> float (t, 3, H, W): light, red against green, both against blue. Distances in it see hue where grey does not."""
    r, g, b = (torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 255).unbind(1)
    return torch.stack([(r + g + b) / 3, (r - g) / 2, (r + g - 2 * b) / 4], 1)


def box(x, radius):
    """The mean over the (2 radius + 1) square about each pixel; at the border, over what there is of it."""
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


def positions(h, w):
    """Pixel numbers, x and y: (2, h, w)."""
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float32), torch.arange(w, dtype=torch.float32), indexing="ij")
    return torch.stack([x, y])


def warped(x, flow):
    """x (n, c, h, w) read at each pixel's own place + flow (n, 2, h, w; x and y in pixels); outside, the nearest pixel of the border."""
    h, w = x.shape[-2:]
    at = (positions(h, w) + flow + 0.5) / torch.tensor([w, h]).view(2, 1, 1) * 2 - 1
    return F.grid_sample(x, at.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def slopes(x):
    """Differences to the right and lower neighbour (n, c, h, w) each, 0 at the border."""
    return F.pad(x[..., 1:] - x[..., :-1], (0, 1)), F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))


def grown(flow, h, w):
    """A flow field at another resolution, in the pixels of that resolution."""
    scale = torch.tensor([w / flow.shape[-1], h / flow.shape[-2]]).view(2, 1, 1)
    return F.interpolate(flow, size=(h, w), mode="bilinear") * scale


def searched_motion(a, b, h, w):
    """The coarsest level, by trying everything: each of h x w cells of a against each of b, on patches of 3 x 3 cells of colours and slopes
    at twice that resolution. A far match costs a little more, else plain ground jumps anywhere.
    -> flow (n, 2, h, w) in cells, confidence (n, 1, h, w): near 1 where the way back from b leads home."""
    n = len(a)

    def patches(x):                                              # (n, patch, cells)
        x = F.adaptive_avg_pool2d(x, (2 * h, 2 * w))
        right, down = slopes(x[:, :1])
        x = torch.cat([x * torch.tensor([1.0, 2.0, 2.0]).view(3, 1, 1), 2 * right, 2 * down], 1)
        return F.unfold(F.pad(x, (2, 2, 2, 2), mode="replicate"), 6, stride=2)
    p, q = patches(a), patches(b)
    place = positions(h, w).flatten(1).T                         # (cells, 2)
    far, there, back = 0.08 * torch.cdist(place, place), [], []
    for i in range(n):                                           # one pair at a time: cells x cells numbers each
        distance = (p[i].square().sum(0)[:, None] + q[i].square().sum(0) - 2 * p[i].T @ q[i]).clamp(min=0)
        cost = distance / (distance.amin(1).median() + 1e-3) + far
        there.append((place[cost.argmin(1)] - place).T.reshape(2, h, w))
        back.append((place[cost.argmin(0)] - place).T.reshape(2, h, w))
    flow = torch.stack(there)
    home = (flow + warped(torch.stack(back), flow)).norm(dim=1, keepdim=True)
    return flow, torch.exp(-(home / 1.5) ** 2) + 1e-3


def refined_motion(a, b, flow, steps=3):
    """Lucas and Kanade: each step solves, in a window of 5 x 5 pixels, for the shift that explains what still differs; a step of at most a
    pixel, taken only where it helps; then the field is smoothed, and plain places follow those that have structure."""
    gx, gy = ((x + F.pad(x, pad)[..., :x.shape[-2], :x.shape[-1]]) / 2 for x, pad in zip(slopes(a), ((1, 0), (0, 0, 1, 0))))
    xx, xy, yy = (box(g.sum(1, keepdim=True), 2) for g in (gx * gx, gx * gy, gy * gy))
    xx, yy = xx + 1e-4, yy + 1e-4
    determinant = xx * yy - xy * xy
    weight = determinant / (xx + yy) + 1e-5                      # large where there are edges of two directions
    for _ in range(steps):
        error = warped(b, flow) - a
        ex, ey = (box((g * error).sum(1, keepdim=True), 2) for g in (gx, gy))
        step = torch.cat([xy * ey - yy * ex, xy * ex - xx * ey], 1) / determinant
        new = flow + step.clamp(-1, 1)
        helps = box((warped(b, new) - a).abs().sum(1, keepdim=True), 2) < box(error.abs().sum(1, keepdim=True), 2)
        flow = torch.where(helps, new, flow)
        flow = box(flow * weight, 1) / box(weight, 1)
    return flow


def camera_motion(flow, weight, rounds=15):
    """What the camera did, as the motion of a plane: u = p0 + p1 x + p2 y + (p6 x + p7 y) x, v likewise: 8 numbers, fitted by re-weighted
    least squares, so that what moves by itself counts less and less. Its scale begins wide and ends at the median of what is left.
    CHOICE: the border of the frame counts ten times as much as the middle: things that a camera follows stand in the middle, and a bus
    that fills a third of the frame was taken for the ground without it.
    flow (n, 2, h, w), weight (n, 1, h, w) -> (n, 2, h, w): the camera's part."""
    def basis(h, w):                                             # (8, 2 h w): u of every pixel, then v
        x, y = (positions(h, w).flatten(1) + 0.5) / torch.tensor([[w], [h]]) * 2 - 1
        one, none = torch.ones_like(x), torch.zeros_like(x)
        return torch.cat([torch.stack([one, x, y, none, none, none, x * x, x * y]), torch.stack([none, none, none, one, x, y, x * y, y * y])], 1), x, y
    n, (h, w) = len(flow), flow.shape[-2:]
    few = min(h, 28), min(w, round(28 * max(w / h, 1)))          # 8 numbers need no more places than these
    rows, x, y = basis(*few)
    target, start = F.adaptive_avg_pool2d(flow, few).flatten(1), F.adaptive_avg_pool2d(weight, few).flatten(1) * (0.1 + torch.maximum(x.abs(), y.abs()) ** 2)
    little = torch.tensor([1e-6, 1e-3, 1e-3, 1e-6, 1e-3, 1e-3, 3e-2, 3e-2]).diag() * len(x)          # nothing to see: no motion
    now = start
    for i in range(rounds):
        weighted = rows * now.repeat(1, 2)[:, None]              # (n, 8, 2 h w)
        p = torch.linalg.solve(weighted @ rows.T + little, weighted @ target[..., None])[..., 0]
        left = (target - p @ rows).view(n, 2, -1).square().sum(1)
        scale = left.median(1, keepdim=True)[0].clamp(min=0.1) * max(2.5 * 0.8 ** i, 1.0) ** 2
        now = start * torch.exp(-left / scale / 2) if i > 3 else start / (left.sqrt() + 0.3)
    return (p @ basis(h, w)[0]).view(n, 2, h, w)


def dense_motion(a, b):
    """Where each pixel of a is in b, from scratch. a, b (n, 3, H, W) of `opponent` -> flow and the camera's part of it, both (n, 2, H/2, W/2)
    in pixels of that half resolution. Three levels: an eighth, where every displacement is tried; a quarter and a half, refined."""
    h, w = a.shape[-2:]
    flow, weight = searched_motion(a, b, -(-h // 8), -(-w // 8))
    camera = camera_motion(flow, weight)
    flow = camera + box((flow - camera) * weight, 1) / box(weight, 1)
    for s in (4, 2):
        size = -(-h // s), -(-w // s)
        p, q = F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
        flow, camera = grown(flow, *size), grown(camera, *size)
        wrong, wrong_camera = (box((warped(q, f) - p).abs().sum(1, keepdim=True), 2) for f in (flow, camera))
        flow = refined_motion(p, q, torch.where(wrong_camera <= wrong + 0.01, camera, flow))         # the ground moves with the camera
        camera = camera_motion(flow, torch.exp(-10 * box((warped(q, flow) - p).abs().sum(1, keepdim=True), 2)))
    return flow, camera


# ---------------------------------------------------------------------------------------------------------------------
# 2. Real video: labels without another model
# ---------------------------------------------------------------------------------------------------------------------

# TrajViT's pipeline (SPECS 2): key frames by three votes -> segment -> track to the next key frame -> link by IoU >= 0.5 -> graph. Two functions
# make a method, `segment` and `track` (METHODS, below); everything else is the same for all.
#
# `classic` needs nothing but torch. Its segment sees a few frames of the stretch between two key frames together:
#   1. superpixels: each frame in patches of one colour, some 10 pixels wide;
#   2. what moves: the frame differs from its neighbours after the camera's motion is undone, and its motion differs from the camera's;
#   3. votes: each superpixel takes the mean of those that look like it in *every* frame, a few times over. What moves is marked in part and
#      in some frames only (the edges of a plain thing, a leg); its colours and texture tell the rest. So do false alarms die: the ground that
#      looks like them says no;
#   4. the marked ones, where they stand out clearly, are trajectories, one for each connected piece; all others are merged with what they touch,
#      in space and along the motion, as colour, texture and place tell.
# Measured on DAVIS-2016 (results/labels-davis.json); parameters were chosen on 12 of its 30 sequences.

PATCH = 10                                                       # pixels of a superpixel's side
REGIONS = 40                                                     # trajectories of a stretch, at most


def superpixels(x, rounds=4):
    """x (t, 3, H, W) -> (t, H, W): superpixel of each pixel, numbered through all frames, and how many there are to a frame. SLIC: k-means on
    colour and place, each pixel looking at the nine nearest centres; half the resolution until the last round."""
    t, _, height, width = x.shape
    rows, columns = max(height // PATCH, 1), max(width // PATCH, 1)
    n = rows * columns

    def points(h, w):                                            # (t, 5, h, w): colour, then place in patches
        place = (positions(h, w) + 0.5) / torch.tensor([w / columns, h / rows]).view(2, 1, 1)
        return torch.cat([F.adaptive_avg_pool2d(x, (h, w)) / 0.06, place.expand(t, 2, h, w)], 1)

    def nearest(f, centres):
        h, w = f.shape[-2:]
        r, c = (torch.arange(h) * rows // h)[:, None], (torch.arange(w) * columns // w)[None]
        best, owner = torch.full((t, h, w), math.inf), torch.zeros((t, h, w), dtype=torch.int64)
        for dr, dc in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            index = (r + dr).clamp(0, rows - 1) * columns + (c + dc).clamp(0, columns - 1)
            distance = (f - centres[:, :, index.flatten()].view(f.shape)).square().sum(1)
            owner = torch.where(distance < best, index, owner)
            best = torch.minimum(best, distance)
        return owner + n * torch.arange(t).view(t, 1, 1)
    f = points(max(height // 2, 1), max(width // 2, 1))
    centres = F.adaptive_avg_pool2d(f, (rows, columns)).flatten(2)
    for _ in range(rounds):
        owner = nearest(f, centres)
        mean, size = means(f, owner, t * n)
        centres = torch.where(size.view(t, 1, n) > 0, mean.view(t, n, 5).transpose(1, 2), centres)
    return nearest(points(height, width), centres), n


def means(values, owner, n):
    """values (t, c, H, W) averaged over the pixels of each of n owners (t, H, W) -> (n, c), and the pixels of each (n,)."""
    c, owner = values.shape[1], owner.flatten()
    total = torch.zeros(n, c).index_add_(0, owner, values.movedim(1, -1).reshape(-1, c))
    size = torch.bincount(owner, minlength=n).float()
    return total / size.clamp(min=1)[:, None], size


def neighbours(owner, n):
    """Superpixels that touch -> i, j (edges,) and the length of their border in pixels."""
    sides = [(owner[..., 1:], owner[..., :-1]), (owner[:, 1:], owner[:, :-1])]
    p, q = (torch.cat([side[k].flatten() for side in sides]) for k in (0, 1))
    key, length = (torch.minimum(p, q) * n + torch.maximum(p, q))[p != q].unique(return_counts=True)
    return key // n, key % n, length.float()


def followers(owner, flow, n):
    """Superpixels that lie on one another when a frame is moved onto the next. owner (t, H, W), flow (t - 1, 2, h, w) -> i, j, and the share
    of i that lies on j."""
    t, h, w = owner.shape
    x, y = (positions(h, w) + grown(flow, h, w)).round().long().unbind(1)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    frame = torch.arange(1, t).view(-1, 1, 1).expand_as(x)
    key, count = (owner[:-1][inside] * n + owner[frame[inside], y[inside], x[inside]]).unique(return_counts=True)
    return key // n, key % n, count / torch.bincount(owner.flatten(), minlength=n)[key // n]


def unlike_the_ground(x):
    """x (t, 3, H, W) -> how much each pixel differs from both neighbouring frames after the camera's motion is undone, how much its motion
    differs from the camera's (both (t, 1, h, w), half resolution, inf where neither neighbour shows the place), and the flow to the next
    frame (t - 1, 2, h, w). Of the two neighbours the smaller difference counts: ground that a thing uncovers is seen in the other."""
    t = len(x)
    flow, camera = dense_motion(torch.cat([x[:-1], x[1:]]), torch.cat([x[1:], x[:-1]]))
    h, w = flow.shape[-2:]
    a, b = (F.adaptive_avg_pool2d(y, (h, w)) for y in (torch.cat([x[:-1], x[1:]]), torch.cat([x[1:], x[:-1]])))
    error = torch.full_like(flow[:, :1], math.inf)
    for dx, dy in ((i, j) for i in (-0.7, 0, 0.7) for j in (-0.7, 0, 0.7)):  # the camera's model is a plane: the world may be half a pixel off
        shifted = warped(b, camera + torch.tensor([dx, dy]).view(2, 1, 1))
        error = torch.minimum(error, box((shifted - a).abs().sum(1, keepdim=True), 1))
    own = (flow - camera).norm(dim=1, keepdim=True)
    to = positions(h, w) + camera
    outside = ((to < 0) | (to > torch.tensor([w - 1, h - 1]).view(2, 1, 1))).any(1, keepdim=True)

    def smaller(values):
        values, none = values.masked_fill(outside, math.inf), torch.full((1, 1, h, w), math.inf)
        return torch.minimum(torch.cat([values[:t - 1], none]), torch.cat([none, values[t - 1:]]))
    return smaller(error), smaller(own), flow[:t - 1]


def stands_out(values, seen, frame, t):
    """How far values (n,) stand out, 0 .. 1: the median of their frame is 0, nine times the usual deviation from it (of the frame, and of all
    frames) is 1. Where the camera's motion was not found, everything deviates and nothing stands out."""
    def middle(v):
        return v.median(), (v - v.median()).abs().median() + 1e-3
    out = torch.zeros_like(values)
    if not seen.any():
        return out
    usual = middle(values[seen])[1]
    for i in range(t):
        here = seen & (frame == i)
        if here.any():
            centre, deviation = middle(values[here])
            out[here] = ((values[here] - centre) / (9 * torch.maximum(deviation, usual))).clamp(0, 1)
    return out


def votes(looks, size, frame, start, t, nearest=6, rounds=5):
    """start (n,), what each superpixel shows by itself -> (n,): the mean over those that look like it, `nearest` of every frame, repeated."""
    index, distance = [], []
    for i in range(t):
        here = ((frame == i) & (size > 0)).nonzero()[:, 0]
        d, j = torch.cdist(looks, looks[here]).topk(min(nearest, len(here)), largest=False)
        index.append(here[j])
        distance.append(d)
    index, distance = torch.cat(index, 1), torch.cat(distance, 1)
    weight = torch.exp(-2 * (distance / (distance.median() + 1e-6)) ** 2) * size[index]
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-6)
    for _ in range(rounds):
        start = (weight * start[index]).sum(1)
    return start


def smoothed(values, size, likeness, edges, rounds=60):
    """The values (n,) that are near the given ones and near their neighbours', where no strong edge lies between: Jacobi's iteration of
    sum of size (u - v)^2 + sum over borders of length · exp(-15 difference) (u_i - u_j)^2."""
    i, j, length = edges
    weight = length * torch.exp(-15 * (likeness[i] - likeness[j]).abs().sum(1))
    own = size / PATCH
    total = (own.clone().index_add_(0, i, weight).index_add_(0, j, weight)).clamp(min=1e-6)
    u = values
    for _ in range(rounds):
        u = (own * values).index_add_(0, i, weight * u[j]).index_add_(0, j, weight * u[i]) / total
    return u


def two_kinds(values, weight, bins=64):
    """Otsu: the threshold that parts values (n,) into the two most different kinds, and the share of their variance that it explains."""
    low, high = values.min(), values.max()
    if high - low < 1e-6:
        return high, 0.0
    at = ((values - low) / (high - low) * (bins - 1)).long()
    mass = torch.zeros(bins).index_add_(0, at, weight)
    level = torch.arange(bins).float()
    below, first = mass.cumsum(0), (mass * level).cumsum(0)
    above = (below[-1] - below).clamp(min=1e-9)
    between = below * above * (first / below.clamp(min=1e-9) - (first[-1] - first) / above) ** 2
    cut = between[:-1].argmax()
    variance = (mass * (level - first[-1] / below[-1]) ** 2).sum() * below[-1]
    return low + (cut + 0.5) / (bins - 1) * (high - low), (between[cut] / variance.clamp(min=1e-9)).item()


def pieces_of(chosen, links):
    """Connected pieces of the chosen (n,) over links (i, j) -> (n,) the piece's number, its smallest member; of others, their own."""
    parent = list(range(len(chosen)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i
    i, j = links
    both = chosen[i] & chosen[j]
    for p, q in zip(i[both].tolist(), j[both].tolist()):
        p, q = root(p), root(q)
        parent[max(p, q)] = min(p, q)
    return torch.tensor([root(i) for i in range(len(chosen))])


def merged(points, weight, links, k):
    """Ward's region merging: points (n, c) of weights (n,), neighbours in links (2, edges) -> (n,) region numbers, at most k of them.
    Each merger is the one that adds least to the squared distances from the regions' means. In rounds: of all pairs that are one another's
    best neighbours, the cheapest half merges at once (such a merger never makes another one cheaper). Regions without neighbours, when nothing else is
    left, may join any other."""
    n = len(points)
    owner, total, mass = torch.arange(n), points * weight[:, None], weight.clone()
    alive = torch.ones(n, dtype=torch.bool)
    i, j = links
    while int(alive.sum()) > k:
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        key = (low * n + high)[low != high].unique()
        if not len(key):                                         # islands: from here on all are neighbours
            left = alive.nonzero()[:, 0]
            key = (left[:, None] * n + left)[left[:, None] < left]
        i, j = key // n, key % n
        centre = total / mass.clamp(min=1e-9)[:, None]
        cost = mass[i] * mass[j] / (mass[i] + mass[j]).clamp(min=1e-9) * (centre[i] - centre[j]).square().sum(1)
        rank = torch.empty_like(key)
        rank[cost.argsort(stable=True)] = torch.arange(len(key))
        best = torch.full((n,), len(key)).scatter_reduce_(0, torch.cat([i, j]), torch.cat([rank, rank]), "amin")
        mutual = ((best[i] == rank) & (best[j] == rank)).nonzero()[:, 0]
        mutual = mutual[rank[mutual].argsort()][:max(1, min(len(mutual) // 2, int(alive.sum()) - k))]
        p, q = i[mutual], j[mutual]                              # pairs: nobody is in two
        total[p] += total[q]
        mass[p] += mass[q]
        alive[q] = False
        to = torch.arange(n)
        to[q] = p
        owner, i, j = to[owner], to[i], to[j]
    return owner.unique(return_inverse=True)[1]


def tidied(ids, radius):
    """ids (t, H, W) -> in each pixel the id that most pixels of the square about it have: specks go, borders stay."""
    out = torch.empty_like(ids)
    for t, frame in enumerate(ids):
        present, index = frame.unique(return_inverse=True)
        out[t] = present[box(F.one_hot(index).movedim(-1, 0)[:, None].float(), radius).argmax(0)[0]]
    return out


@torch.no_grad()
def classic_segment(frames):
    """A few frames of one stretch, uint8 (t, H, W, 3) -> int64 ids (t, H, W), every pixel in one of at most REGIONS trajectories."""
    x = opponent(frames)
    t, _, height, width = x.shape
    owner, per_frame = superpixels(x)
    n = t * per_frame
    frame = torch.arange(t).repeat_interleave(per_frame)
    right, down = slopes(x[:, :1])
    texture = torch.cat([right.abs(), down.abs(), 0.7 * (right + down).abs(), 0.7 * (right - down).abs()], 1)
    looks, size = means(box(torch.cat([x, texture], 1), 1), owner, n)
    place = means(((positions(height, width) + 0.5) / min(height, width)).expand(t, -1, -1, -1), owner, n)[0]
    described = torch.cat([looks * torch.tensor([1.0, 2, 2, 2, 2, 2, 2]), 0.25 * place], 1)
    edges, weight = neighbours(owner, n), size + 1e-6
    moving, links = torch.zeros(n), torch.stack(edges[:2])
    if t > 1:
        error, own, flow = (F.interpolate(v, size=(height, width)) if v.shape[1] == 1 else v for v in unlike_the_ground(x))
        seen = torch.isfinite(error)
        sums = means(torch.cat([error.nan_to_num(posinf=0), own.nan_to_num(posinf=0), seen.float()], 1), owner, n)[0]
        share = sums[:, 2].clamp(min=1e-3)
        known = (share > 0.3) & (size > 0)
        # a small misfit differs much where there is texture: by how much more than its slopes explain?
        differs = stands_out(sums[:, 0] / share / (looks[:, 3:].sum(1) + 0.06), known, frame, t)
        moves = stands_out(sums[:, 1] / share, known, frame, t)
        centre = place - torch.tensor([width, height]) / (2 * min(height, width))
        start = (differs + moves) / 2 * torch.exp(-centre.square().sum(1) / (2 * 0.35 ** 2))         # what is filmed is mostly near the middle
        moving = votes(described, size, frame, start, t)
        order = moving.argsort()
        top = moving[order][(size[order].cumsum(0) < 0.98 * size.sum()).sum().clamp(max=n - 1)]      # a few bright spots must not set the scale
        moving = smoothed((moving / top.clamp(min=1e-6)).clamp(max=1), size, looks, edges)
        i, j, lies = followers(owner, flow, n)
        links = torch.cat([torch.stack(edges[:2])[:, edges[2] >= 4], torch.stack([i, j])[:, lies >= 0.25]], 1)
    threshold, clear = two_kinds(moving, weight)
    chosen, ids, count = moving > threshold, torch.full((n,), -1), 0
    # CHOICE: where the two kinds are not clearly two, or most of the picture would move, nothing is put together: pieces by colour do less harm
    if clear > 0.68 and size[chosen].sum() < 0.4 * size.sum():
        piece = pieces_of(chosen, links)
        area = torch.zeros(n).index_add_(0, piece[chosen], size[chosen])
        for p in area.argsort(descending=True)[:REGIONS // 2].tolist():
            if area[p] >= 0.08 * area.sum():
                ids[chosen & (piece == p)] = count
                count += 1
    rest = ids < 0
    if rest.any():
        ground = torch.cat([described[:, :7], 0.35 * place, 0.25 * (moving / threshold.clamp(min=1e-6)).clamp(max=1)[:, None]], 1)
        inside = rest[links].all(0)
        number = rest.cumsum(0) - 1
        ids[rest] = count + merged(ground[rest], weight[rest], number[links[:, inside]], REGIONS - 2 - count)
    return tidied(ids[owner], 2).unique(return_inverse=True)[1]


ANCHORS = 8                                                      # frames of a stretch that `classic_segment` sees together


@torch.no_grad()
def classic_track(frames, where, ids):
    """Masks of the frames at `where` onto all: frames uint8 (t, H, W, 3), where (s,), ids int64 (s, H, W) -> (t, H, W). Each pixel looks up the
    nearest of those frames, at the place where dense motion finds it there."""
    t, height, width, _ = frames.shape
    where = torch.as_tensor(where)
    nearest = (torch.arange(t)[:, None] - where).abs().argmin(1)
    out = ids[nearest].clone()
    rest = (where[nearest] != torch.arange(t)).nonzero()[:, 0]
    for some in rest.split(8) if len(rest) else ():
        flow, _ = dense_motion(opponent(frames[some]), opponent(frames[where[nearest[some]]]))
        x, y = (positions(height, width) + grown(flow, height, width)).round().long().unbind(1)
        out[some] = ids[nearest[some][:, None, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return out


def anchors(t):
    """The frames of a stretch of t that `classic` segments together: the middles of ANCHORS equal parts. CHOICE: not the key frame alone. What
    moves shows only beside other frames, and from a middle no frame is far."""
    s = min(t, ANCHORS)
    return ((torch.arange(s) + 0.5) * t / s).long()


# `sam2`: automatic masks of the key frame, then video propagation, by the optional package `transformers` and a folder that holds a published
# SAM2. Its image processors want two more packages; what they do is three lines (`sam2_pixels`).
SAM2_POINTS, SAM2_IOU, SAM2_STABILITY, SAM2_OVERLAP = 32, 0.8, 0.95, 0.7     # prompts a side; a mask's own estimate; steadiness; duplicates
SAM2_MASKS = 128                                                 # trajectories of a stretch, at most (SPECS 2)


@functools.lru_cache(maxsize=1)
def sam2_models(folder):
    """The picture model and the video model of one folder, strictly loaded, nothing downloaded; on a GPU if there is one."""
    try:
        import transformers
        from transformers import Sam2Model, Sam2VideoModel
    except ImportError as error:
        raise BadInput(f"--method sam2 needs the package transformers with SAM2 ({error}); pip install transformers, or use --method classic") from None
    if not (Path(folder) / "config.json").is_file():
        raise BadInput(f"--sam2 {folder}: holds no config.json; give the folder of a published SAM2 (config.json and model.safetensors)")
    device, models = "cuda" if torch.cuda.is_available() else "cpu", []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()                   # the picture model leaves out the memory's weights, and would list them
    transformers.logging.disable_progress_bar()
    try:
        for kind in (Sam2Model, Sam2VideoModel):
            model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=torch.float32)
            if info["missing_keys"] or info["mismatched_keys"]:
                raise BadInput(f"--sam2 {folder}: not a whole SAM2 with memory: {sorted(map(str, [*info['missing_keys'], *info['mismatched_keys']]))[:3]} are missing "
                               "or of another shape")
            models.append(model.eval().to(device))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise error if isinstance(error, BadInput) else BadInput(f"--sam2 {folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    return models


def sam2_pixels(frames, model):
    """uint8 (t, H, W, 3) -> (t, 3, S, S) as SAM2 reads them: the whole frame squeezed into its square, normalised."""
    size = model.config.prompt_encoder_config.image_size
    x = F.interpolate(frames.permute(0, 3, 1, 2).float() / 255, size=(size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((x - mean) / std).to(model.device)


def distinct_masks(logits, scores):
    """logits (n, h, w) of proposed masks, scores (n,) -> indices of those to keep, best first: sure (SAM2_IOU), steady (the mask above +1 and
    the mask above -1 overlap by SAM2_STABILITY), and none that overlaps a better one by more than SAM2_OVERLAP; SAM2_MASKS at most."""
    masks = (logits > 0).flatten(1)
    steady = (logits > 1).flatten(1).sum(1) / (logits > -1).flatten(1).sum(1).clamp(min=1)
    good = (scores >= SAM2_IOU) & (steady >= SAM2_STABILITY) & masks.any(1)
    kept, area = [], masks.sum(1)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if good[i] and len(kept) < SAM2_MASKS:
            both = (masks[kept] & masks[i]).sum(1)
            if not (both / (area[kept] + area[i] - both) > SAM2_OVERLAP).any():
                kept.append(i)
    return kept


def sam2_method(folder):
    """-> segment, track (see `method_of`)."""
    picture, film_model = sam2_models(folder)

    @torch.inference_mode()
    def segment(frames):
        size, (h, w) = picture.config.prompt_encoder_config.image_size, frames.shape[1:3]
        side = (torch.arange(SAM2_POINTS) + 0.5) * size / SAM2_POINTS
        points = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(1, -1, 1, 2).to(picture.device)
        ids = torch.full((len(frames), h, w), -1)
        for i, pixels in enumerate(sam2_pixels(frames, picture)):
            embeddings, logits, scores = picture.get_image_embeddings(pixels[None]), [], []
            for some in points.split(64, 1):                     # 64 prompts at a time: memory
                out = picture(image_embeddings=embeddings, input_points=some, input_labels=torch.ones_like(some[..., 0], dtype=torch.int64), multimask_output=True)
                logits.append(out.pred_masks.flatten(0, 2).cpu())
                scores.append(out.iou_scores.flatten().cpu())
            logits, scores = torch.cat(logits), torch.cat(scores)
            kept = distinct_masks(logits, scores)
            if kept:
                masks = F.interpolate(logits[kept][:, None], size=(h, w), mode="bilinear")[:, 0] > 0
                order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)
                for number, j in enumerate(order.tolist()):      # small things lie on large ones
                    ids[i][masks[j]] = number
        return ids

    @torch.inference_mode()
    def track(frames, where, ids):
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
        if where.tolist() != [0]:
            raise ValueError("SAM2 is asked for the key frame alone, and tracks from it")
        h, w = frames.shape[1:3]
        pixels, objects = sam2_pixels(frames, film_model), sorted(set(ids[0].flatten().tolist()) - {-1})
        out = torch.full(frames.shape[:3], -1)
        out[0] = ids[0]
        if not objects or len(frames) == 1:
            return out
        session = Sam2VideoInferenceSession(video=pixels, video_height=h, video_width=w, inference_device=film_model.device,
                                            inference_state_device=film_model.device, video_storage_device=film_model.device, dtype=torch.float32)
        for number in objects:
            mask = F.interpolate((ids[:1, None] == number).float(), size=pixels.shape[-2:], mode="bilinear", antialias=True) >= 0.5
            session.add_mask_inputs(session.obj_id_to_idx(number), 0, mask.float())
        session.obj_with_new_inputs = objects
        for result in film_model.propagate_in_video_iterator(session, start_frame_idx=0):
            if result.frame_idx:
                logits, owner = F.interpolate(result.pred_masks.float().cpu(), size=(h, w), mode="bilinear")[:, 0].max(0)
                out[result.frame_idx] = torch.where(logits > 0, torch.tensor(result.object_ids or objects)[owner], -1)
        return out
    return segment, track


def method_of(cfg):
    """-> anchors(t): which frames of a stretch of t are segmented; segment(frames uint8 (s, H, W, 3)) -> ids int64 (s, H, W), -1 = none;
    track(frames (t, H, W, 3), where (s,), ids (s, H, W)) -> ids (t, H, W). A method of your own is these three functions."""
    if cfg.method == "classic":
        return anchors, classic_segment, classic_track
    return (lambda t: torch.zeros(1, dtype=torch.int64)), *sam2_method(cfg.sam2)


def hsv(frames):
    """uint8 (..., 3) -> float32 hue 0 .. 180, saturation and value 0 .. 255, the scales of the detectors whose thresholds `is_key` takes."""
    r, g, b = np.moveaxis(frames.astype(np.float32), -1, 0)
    top = np.maximum(np.maximum(r, g), b)
    span = top - np.minimum(np.minimum(r, g), b)
    safe = np.maximum(span, 1e-6)
    hue = np.where(top == r, (g - b) / safe % 6, np.where(top == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 30
    return np.stack([np.where(span > 0, hue, 0), 255 * span / np.maximum(top, 1e-6), top], -1)


def changes(before, after):
    """Of two frames uint8 (H, W, 3): the mean change of hue, saturation and value, and how much the correlation of their histograms of light
    falls short of 1."""
    step = np.abs(hsv(before) - hsv(after))
    step[..., 0] = np.minimum(step[..., 0], 180 - step[..., 0])              # hue is a circle
    p, q = (np.histogram(f @ np.array([0.299, 0.587, 0.114]), 64, (0, 256))[0].astype(float) for f in (before, after))
    p, q = p - p.mean(), q - q.mean()
    return float(step.mean()), float(1 - p @ q / max(np.sqrt((p @ p) * (q @ q)), 1e-9))


def is_key(change, drop, recent):
    """Two of three votes (SPECS 2): much change, much more than in the frames just before (`recent`, their changes), other light.
    CHOICE: "much more" is three times as much, and 15 at least, so that a still picture's noise makes no key frame; with nothing before, no vote."""
    return (change > 27) + (len(recent) > 0 and change > max(3 * float(np.mean(recent)), 15)) + (drop > 0.15) >= 2


def stretches(pieces, longest):
    """Frames in order, an iterator over uint8 (c, H, W, 3) -> an iterator over (t, H, W, 3), each from a key frame to the next one, which it
    holds as its last frame too, and whether it does (the last stretch does not). CHOICE: after `longest` frames the next is a key frame
    whatever the votes say: memory stays small, and what was not there at first is found."""
    held, recent = [], collections.deque(maxlen=8)
    for frame in (f for piece in pieces for f in piece):
        if held:
            change, drop = changes(held[-1][::2, ::2], frame[::2, ::2])
            cut = is_key(change, drop, recent)
            if not cut:
                recent.append(change)                            # a cut says nothing of how much moves
            if cut or len(held) == longest:
                yield np.stack([*held, frame]), True
                held = []
        held.append(frame)
    if held:
        yield np.stack(held), False


def linked(before, after):
    """Two segmentations of one frame, int64 (H, W), -1 = none -> {id in after: id in before} where IoU >= 0.5, one to one, best first."""
    p, q = int(before.max()) + 1, int(after.max()) + 1
    both = torch.bincount(((before + 1) * (q + 1) + after + 1).flatten(), minlength=(p + 1) * (q + 1)).view(p + 1, q + 1)
    iou = (both / (both.sum(1, keepdim=True) + both.sum(0) - both).clamp(min=1))[1:, 1:]
    found, taken = {}, set()
    i, j = (iou >= 0.5).nonzero(as_tuple=True)
    for k in iou[i, j].argsort(descending=True, stable=True).tolist():       # at IoU 0.5 exactly, two may claim one
        if int(j[k]) not in found and int(i[k]) not in taken:
            found[int(j[k])] = int(i[k])
            taken.add(int(i[k]))
    return found


def label_frames(pieces, method, longest):
    """Frames in order, an iterator over uint8 (c, H, W, 3) -> trajectories int32 (T, H, W), -1 = none: numbered through the whole video."""
    choose, segment, track = method
    out, count, at_key = [], 0, None
    for frames, more in stretches(pieces, longest):
        frames = torch.from_numpy(frames)
        where = choose(len(frames) - more)
        ids = track(frames, where, segment(frames[where]))
        old = {} if at_key is None else linked(at_key, ids[0])
        table = torch.tensor([old.get(i, -2) for i in range(int(ids.max()) + 1)] + [-1])             # the last: of id -1
        new = table == -2
        table[new] = count + torch.arange(int(new.sum()))
        count += int(new.sum())
        ids = table[ids]
        at_key = ids[-1] if more else None
        out.append(ids[:len(ids) - more].to(torch.int32))        # at_key: ids[-1] as tracked; the next stretch segments it anew
    # a number that lived only in the key frame, as tracked, is seen nowhere now: no gaps
    used = torch.cat([ids.unique() for ids in out]).unique()
    table = torch.full((count + 1,), -1, dtype=torch.int32)      # the last: of id -1
    table[used[used >= 0]] = torch.arange(int((used >= 0).sum()), dtype=torch.int32)
    return torch.cat([table[ids] for ids in out])


def write_labels(mask_path, graph_path, ids):
    """Trajectories (T, H, W), -1 = none -> both sidecars, or neither. Object id = trajectory + 1, since 0 is nothing."""
    ids = np.asarray(ids)
    count = int(ids.max()) + 1
    if count > 65535:
        raise BadVideo(f"{mask_path}: {count} trajectories, more than the 65535 that a mask can name; cut the video into parts")
    mask = (ids + 1).astype(np.uint8 if count <= 255 else np.uint16)
    graph = np.zeros((count, len(ids)), np.int64)
    for t, frame in enumerate(ids):
        present = np.unique(frame[frame >= 0])
        graph[present, t] = present + 1
    try:
        mask_path.unlink(missing_ok=True)                        # an older mask beside the new graph would pass for a pair
        write_npz(graph_path, "tensor", graph)
        write_npz(mask_path, "arr_0", mask)
    except BaseException:
        graph_path.unlink(missing_ok=True)                       # half of a pair is worse than none
        raise
    return count


# ---------------------------------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------------------------------

WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"            # a split that Python's re and tiktoken read alike


def learn_bpe(texts, vocabulary=1024, pattern=WORDS):
    """Byte-level byte-pair encoding: ranks {bytes: id}, the 256 bytes first, then merges, the most frequent pair each time
    (ties: the smallest pair, so that the result never depends on a hash). Works on distinct words with their counts."""
    counts = {}
    for text in texts:
        for word in re.findall(pattern, text):
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


QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")         # SPECS 5
GPT_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.lru_cache(maxsize=None)
def composing():
    """tiktoken's Encoding for tokenizers that were trained on composed text: it brings a text to NFC first (an e and its accent are one
    character), which tiktoken itself has no place for. Made on first use: importing data imports no tiktoken."""
    import tiktoken

    class Composing(tiktoken.Encoding):
        def encode_ordinary(self, text):
            return super().encode_ordinary(unicodedata.normalize("NFC", text))

        def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
            return super().encode(unicodedata.normalize("NFC", text), allowed_special=allowed_special, disallowed_special=disallowed_special)
    return Composing


def published_encoding(folder):
    """The byte-level BPE of a published folder (tokenizer.json, or vocab.json and merges.txt) as a tiktoken Encoding: undo the byte-to-unicode
    map of its vocabulary and rank = id (SPECS 5, checked there on 3 000 strings). Its added tokens become special ones, which
    encode_ordinary never makes from text. What a tiktoken Encoding could not do as the file says is refused: BadInput."""
    import tiktoken
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # the map that byte-level tokenizers share: printable bytes stand for themselves, the rest for 256, 257, ...
    hidden = [i for i in range(256) if i not in set(printable)]
    byte = {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(hidden)}
    try:
        vocabulary, merges, special, pattern, composed = (read_tokenizer if (folder / "tokenizer.json").exists() else read_vocabulary)(folder)
        if not special and "<|endoftext|>" in vocabulary:
            special = {"<|endoftext|>": vocabulary["<|endoftext|>"]}
        ranks = {bytes(byte[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        order = [vocabulary[a + b] for a, b in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)]
        if any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("some bytes are no tokens")
        if any(a >= b for a, b in zip(order, order[1:])):
            raise ValueError("its merges are not in the order of their ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder}: not a published byte-level tokenizer ({type(error).__name__}: {error}); "
                       "expected tokenizer.json or vocab.json") from None
    special.setdefault("<|endoftext|>", max([*ranks.values(), *special.values()]) + 1)
    return (composing() if composed else tiktoken.Encoding)(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def read_tokenizer(folder):
    """tokenizer.json -> {token: id}, merges, {special token: id}, split pattern, whether text is brought to NFC first."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    parts = lambda part, inner: [] if not part else part[inner] if part.get("type") == "Sequence" else [part]
    norms, splits = parts(spec.get("normalizer"), "normalizers"), parts(spec.get("pre_tokenizer"), "pretokenizers")
    pattern = [part["pattern"]["Regex"] for part in splits if part["type"] == "Split"]
    odd = [part["type"] for part in norms if part["type"] != "NFC"] + [part["type"] for part in splits if part["type"] not in ("Split", "ByteLevel")]
    odd += [f"{part['type']} that is {part.get('behavior')}" for part in splits if part.get("behavior", "Isolated") != "Isolated" or part.get("invert")]
    odd += ["a space put before the text"] * any(part.get("add_prefix_space") for part in splits if part["type"] == "ByteLevel") + ["several splits"] * (len(pattern) > 1)
    if odd:
        raise ValueError(f"its steps are not those of GPT-2 or Qwen: {', '.join(odd)}")
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    return spec["model"]["vocab"], spec["model"].get("merges", []), special, pattern[0] if pattern else GPT_WORDS, bool(norms)


def read_vocabulary(folder):
    """The same of vocab.json, merges.txt and tokenizer_config.json. These do not spell the split: it belongs to the class that they name."""
    load = lambda name: json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
    vocabulary, config, merges = json.loads((folder / "vocab.json").read_text(encoding="utf-8")), load("tokenizer_config.json"), folder / "merges.txt"
    special = load("added_tokens.json") | {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    lines = merges.read_text(encoding="utf-8").split("\n") if merges.exists() else []
    qwen = str(config.get("tokenizer_class", "")).startswith(("Qwen2", "Qwen3"))
    return vocabulary, [line for line in lines[bool(lines) and lines[0].startswith("#version"):] if line], special, QWEN_WORDS if qwen else GPT_WORDS, qwen


def word_list(captions, most=16_000):
    """The most frequent words of captions (stand-in, dropped at the merge)."""
    counts = {}
    for text in captions:
        for word in re.findall(WORDS, text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def word_encoding(words):
    """256 bytes and these words (stand-in, dropped at the merge)."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    return tiktoken.Encoding("words", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


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


# -----------------------------------------------------------------------------------------------------------
# 5. Batches: number i is a pure function of (seed, i)
# -----------------------------------------------------------------------------------------------------------

PATIENCE = 300                                                  # seconds that a batch from a worker may take


def distinct(world, begin, count):
    """The first `count` indices from `begin` on whose captions all differ: a caption that fits two clips has
    no right answer."""
    seen, indices = set(), []
    for index in itertools.count(begin):
        if len(indices) == count:
            return indices
        caption = script(index, world)["caption"]
        if caption not in seen:
            seen.add(caption)
            indices.append(index)


class WorldBatches(torch.utils.data.Dataset):
    """Batch i of made clips: numbers begin + i·batch and on, or the next ones of the list `indices`.

    A batch leaves its worker as scripts of a few kB. `finish` paints them on the device that trains: a GPU
    paints faster than pixels could be sent to it."""
    files = None

    def __init__(self, world, batch, begin=TRAIN, indices=None):
        self.world, self.batch = world, batch
        self.begin, self.indices = begin, indices

    def __len__(self):
        assert self.indices is not None, "made clips without `indices` never end"
        return -(-len(self.indices) // self.batch)

    def captions(self):
        """Captions of the first clips: enough of them to hold every word."""
        return [script(self.begin + i, self.world)["caption"] for i in range(2000)]

    def __getitem__(self, i):
        first, last = i * self.batch, (i + 1) * self.batch
        if self.indices is None:
            indices = list(range(self.begin + first, self.begin + last))
        else:
            indices = self.indices[first:last]
        scripts = [script(j, self.world) for j in indices]
        batch = dict(scripts=stack(scripts), size=self.world.size, index=indices, bad=[])
        batch["caption"] = [s["caption"] for s in scripts]
        batch["captions"] = [[caption] for caption in batch["caption"]]
        batch["label"] = [None] * len(scripts)
        batch["qa"] = [s["qa"] for s in scripts]
        for key in ("appearance", "colour", "motion"):
            batch[key] = torch.tensor([s[key] for s in scripts])
        return batch


class VideoBatches(torch.utils.data.Dataset):
    """Batch i of real clips, all of them videos or all of them pictures.

    Training: the entries stand in an endless row, epoch after epoch, each epoch in an order of its own. Batch
    i takes the first `batch` usable ones from place i·batch on, so it is full even where an epoch ends or a
    file is damaged; no file stands in it twice. It is short only where the whole set has fewer usable files.
    A clip is `frames` frames in a row from a random place, every 1st to every stride-th (drawn); stride 0:
    frames spread over the whole video.

    Held out (train=False): entries in order, frames spread over the whole video. Files that cannot be used
    are left out, and the last batch may be short."""

    def __init__(self, entries, frames, size, batch, seed=0, train=True, stride=8):
        self.entries, self.files = entries, len(entries)
        self.frames, self.size, self.batch = frames, size, batch
        self.seed, self.train, self.stride = seed, train, stride
        kinds = {entry["image"] for entry in entries}
        assert len(kinds) == 1, "a batch holds videos or pictures: make a dataset of each, and mix them"

    def __len__(self):
        return -(-len(self.entries) // self.batch)

    def captions(self):
        """All captions of all clips."""
        return [text for entry in self.entries for text in entry["caption"] or []]

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(len(self.entries)).tolist()

    def candidates(self, i):
        """Numbers of the entries that batch i tries, in order, each once."""
        n, first = len(self.entries), i * self.batch
        if not self.train:
            yield from range(first, min(first + self.batch, n))
            return
        seen = set()
        for place in itertools.count(first):
            entry = self.order(place // n)[place % n]
            if entry not in seen:
                seen.add(entry)
                yield entry
            if len(seen) == n:
                return

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, 1, i))
        clips, bad = [], []
        for number in self.candidates(i):
            try:
                clips.append(self.clip(number, rng))
            except BadVideo as error:
                bad.append((self.entries[number]["path"], str(error)))
            if len(clips) == self.batch:
                break
        if self.train and not clips:
            raise BadInput(f"none of the {self.files} files can be used; the last: {bad[-1][1]}")
        batch = dict(bad=bad)
        for key in ("video", "labels", "caption", "captions", "label", "qa", "index"):
            batch[key] = [clip[key] for clip in clips]
        if clips:
            batch["video"] = torch.stack(batch["video"])                # (b, t, H, W, 3)
            batch["labels"] = torch.stack(batch["labels"])              # (b, t, H, W)
        else:
            shape = (0, self.frames, self.size, self.size)
            batch["video"] = torch.zeros(*shape, 3, dtype=torch.uint8)
            batch["labels"] = torch.zeros(shape, dtype=torch.int64)
        return batch

    def clip(self, number, rng):
        """One entry, decoded. BadVideo if it cannot be used."""
        entry = self.entries[number]
        frames = 1 if entry["image"] else self.frames
        start, choice = rng.random(2)
        stride = int(rng.integers(1, max(self.stride, 1) + 1))
        if not self.train or not self.stride:
            start = None
        video, times = decode(entry["path"], frames, self.size, start, stride)
        labels = np.full(video.shape[:3], -1)
        if entry["mask"] or entry["graph"]:
            labels = load_labels(entry["mask"], entry["graph"], times, self.size, entry["path"])
        texts = entry["caption"] or [""]
        caption = texts[int(choice * len(texts))] if self.train else texts[0]
        return dict(video=torch.from_numpy(video), labels=torch.from_numpy(labels), caption=caption,
                    captions=texts, label=entry["label"], qa=entry.get("qa", []), index=number)


class Mixed(torch.utils.data.Dataset):
    """Whole batches of several datasets, one of them at a time, in given shares. With `world` processes,
    batches s·world .. s·world + world - 1 are those of step s: they all come from one dataset, so that at
    each step every process has clips of the same shape.

    The first dataset takes its share of all steps, evenly: step s is its own where floor(s·share + phase)
    grows, and that floor counts its steps so far. The steps that it leaves are counted anew and go to the
    others in the same way. Each dataset then has its share to within a few steps; chance would be off by
    sqrt(s)."""

    def __init__(self, datasets, shares, seed=0, world=1):
        assert len(datasets) == len(shares) and min(shares) > 0, f"shares {shares}: one above 0 for each set"
        self.datasets, self.world = datasets, world
        # of the steps that the datasets before it leave; the last one takes them all
        self.shares = [share / sum(shares[j:]) for j, share in enumerate(shares)]
        self.phases = np.random.default_rng((seed, 3)).random(len(shares)).tolist()
        counts = [dataset.files for dataset in datasets]
        self.files = None if None in counts else sum(counts)

    def captions(self):
        return [text for dataset in self.datasets for text in dataset.captions()]

    def place(self, step):
        """-> (number of the dataset that step s takes, how many steps took it before)."""
        for j, (share, phase) in enumerate(zip(self.shares, self.phases)):
            before = math.floor(step * share + phase)
            if math.floor((step + 1) * share + phase) > before:
                return j, before
            step -= before

    def __getitem__(self, i):
        step, rank = divmod(i, self.world)
        j, before = self.place(step)
        return self.datasets[j][before * self.world + rank]


def finish(batch, device):
    """A batch as a dataset gives it -> the same with `video` uint8 (b, t, H, W, 3) and `labels` int64
    (b, t, H, W) on the device; made clips are painted there."""
    if "scripts" in batch:
        size = batch.pop("size")
        batch["video"], batch["labels"] = rasterise(batch.pop("scripts"), size, device)
    else:
        batch["video"] = batch["video"].to(device, non_blocking=True)
        batch["labels"] = batch["labels"].to(device, non_blocking=True)
    return batch


class Shard(torch.utils.data.Dataset):
    """Every ranks-th batch of a dataset, from `rank` on. Goes when no script uses it any more: loader(rank=, world=)."""

    def __init__(self, dataset, rank, ranks):
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __getitem__(self, i):
        return self.dataset[i * self.ranks + self.rank]


def loader(dataset, first, last, workers=0, rank=0, world=1):
    """Batches of steps first .. last - 1, in order: step s of process `rank` of `world` is dataset[s·world +
    rank]. They are made ahead of time by `workers` processes (0: in this one); what they hold does not depend
    on that. To resume, begin at another `first`."""
    steps = range(first * world + rank, last * world, world)
    # a generator of its own: torch would draw the workers' seeds from the global one
    own = torch.Generator()
    if workers == 0:
        return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=steps, generator=own)
    batches = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=steps, generator=own, num_workers=workers, timeout=PATIENCE,
        pin_memory=torch.cuda.is_available())
    return watched(batches)


def watched(batches):
    """The batches of a DataLoader with workers. A worker that gets no shared memory loses its batch without a
    word: the time-out says where to look."""
    try:
        yield from batches
    except BadInput as error:
        # torch puts the worker's traceback above the message, and its type before it
        raise BadInput(str(error).strip().splitlines()[-1].split(": ", 1)[-1]) from None
    except RuntimeError as error:
        if "timed out" not in str(error) and "Bus error" not in str(error):
            raise
        raise BadInput(f"no batch from --workers for {PATIENCE} s, or one of them died for want of shared memory: "
                       "make /dev/shm larger (docker run --shm-size=8g), or give --workers 0") from None


class Damage:
    """Files that could not be used: each is named once on stderr; `files` holds them with the reason."""

    def __init__(self):
        self.files = {}

    def add(self, bad):
        for path, reason in bad:
            if path not in self.files:
                self.files[path] = reason
                print(f"cannot be used: {reason}", file=sys.stderr)


def augment(video, labels, seed, flip=True):
    """The same random change for all frames of a clip: resized crop (area 0.2 to 1), flip, brightness,
    contrast, saturation or grey, blur. video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) -> the same.
    `seed` (an int) decides everything. Give flip=False where captions tell left from right."""
    rng = np.random.default_rng((seed, 2))
    b, t, h, w, _ = video.shape

    def each(values):                                           # one number a clip
        values = torch.tensor(values, dtype=torch.float32, device=video.device)
        return values.view(b, 1, 1, 1, 1)

    grid = random_crops(rng, b, h, w, flip).to(video.device).repeat_interleave(t, 0)    # (b t, h, w, 2)
    x = rearrange(video, "b t h w c -> (b t) c h w").float()
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # outside of the picture grid_sample reads 0, so labels are moved up by one: 0 is "unlabelled"
    ids = rearrange(labels + 1, "b t h w -> (b t) 1 h w").float()
    ids = F.grid_sample(ids, grid, mode="nearest", align_corners=False)
    labels = rearrange(ids, "(b t) 1 h w -> b t h w", b=b).round().long() - 1
    x = rearrange(x, "(b t) c h w -> b t c h w", b=b)
    light = torch.tensor((0.299, 0.587, 0.114), device=x.device).view(3, 1, 1)
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, (3, b))
    saturation[rng.random(b) < 0.2] = 0                         # grey
    x = x * each(brightness)
    mean = (x * light).sum(2, keepdim=True).mean((1, 3, 4), keepdim=True)
    x = torch.lerp(mean, x, each(contrast))
    grey = (x * light).sum(2, keepdim=True)
    x = torch.lerp(grey.expand_as(x), x, each(saturation))
    strength = rng.uniform(0.3, 1.0, b) * (rng.random(b) < 0.3)
    soft = F.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(x)
    x = torch.lerp(x, soft, each(strength))
    return x.clamp(0, 255).round().byte().movedim(2, -1).contiguous(), labels


def random_crops(rng, b, h, w, flip):
    """Where each pixel of b resized crops comes from, mirrored half the time: (b, h, w, 2) in -1 .. 1."""
    area = rng.uniform(0.2, 1.0, b)
    ratio = np.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3), b))
    sx = np.sqrt(area * ratio).clip(max=1)                      # the crop's width and height, of 1
    sy = np.sqrt(area / ratio).clip(max=1)
    cx = rng.uniform(-1, 1, b) * (1 - sx)                       # its centre
    cy = rng.uniform(-1, 1, b) * (1 - sy)
    mirrored = flip * (rng.random(b) < 0.5)
    theta = np.zeros((b, 2, 3), np.float32)
    theta[:, 0, 0] = np.where(mirrored, -sx, sx)
    theta[:, 1, 1] = sy
    theta[:, 0, 2] = cx
    theta[:, 1, 2] = cy
    return F.affine_grid(torch.from_numpy(theta), (b, 1, h, w), align_corners=False)


# -----------------------------------------------------------------------------------------------------------
# The data of a run
# -----------------------------------------------------------------------------------------------------------

def open_data(cfg, need="caption", world=1):
    """What a run is told to learn from -> (training dataset, held-out dataset).

    cfg.data: `world`, or a manifest, CSV or folder; several with commas, in the shares of cfg.mix, a batch of
    one of them at a time. cfg.val: a manifest that is held out, instead of a part of each. need: the key
    ("caption", "mask") without which an entry cannot be used. world: how many processes train together."""
    names = [cfg.data] if os.path.exists(cfg.data) else [name.strip() for name in cfg.data.split(",")]
    shares = read_shares(cfg, names)
    train, held_out, mix = [], [], []
    val = read_manifest(cfg.val) if getattr(cfg, "val", None) else None
    for name, share in zip(names, shares):
        if name == "world":
            made, test = made_clips(cfg)
            train.append(made)
            mix.append(share)
            held_out += [test] if val is None else []
            continue
        entries = read_manifest(name)
        learnt, test = split(entries) if val is None else (without(entries, val), [])
        check_entries(name, learnt + test, need, len(learnt), len(test))
        for kind in kinds(learnt):
            train.append(videos(cfg, kind, train=True))
            mix.append(share * len(kind) / len(learnt))
        held_out += [videos(cfg, kind, train=False) for kind in kinds(test)]
    if val is not None:
        check_entries(cfg.val, val, need, 0, len(val))
        held_out = [videos(cfg, kind, train=False) for kind in kinds(val)]
    if len(train) > 1:
        train = [Mixed(train, mix, cfg.seed, world)]
    return train[0], held_out[0] if len(held_out) == 1 else torch.utils.data.ConcatDataset(held_out)


def read_shares(cfg, names):
    """--mix "0.2,0.8" -> [0.2, 0.8]; equal shares without it."""
    mix = getattr(cfg, "mix", None)
    try:
        shares = [1.0] * len(names) if mix is None else [float(share) for share in mix.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(names) or not all(0 < share < math.inf for share in shares):
        raise BadInput(f"--mix {mix}: give a number above 0 for each of the {len(names)} sets of --data")
    return shares


def made_clips(cfg):
    """-> (training, held-out) clips of the world that a configuration asks for. Every seed has ten million
    training clips of its own; held-out captions all differ."""
    asked = {}
    for field in dataclasses.fields(World):
        if field.name != "size" and hasattr(cfg, field.name):
            asked[field.name] = getattr(cfg, field.name)
    world = World(size=cfg.image_size, **asked)
    begin = VALIDATION if getattr(cfg, "eval_split", "test") == "validation" else TEST
    indices = distinct(world, begin, cfg.eval_clips)
    train = WorldBatches(world, cfg.batch, TRAIN + cfg.seed % 49 * 10_000_000)
    return train, WorldBatches(world, cfg.batch, indices=indices)


def videos(cfg, entries, train):
    return VideoBatches(entries, cfg.frames, cfg.image_size, cfg.batch, cfg.seed, train, getattr(cfg, "stride", 8))


def kinds(entries):
    """Entries -> [videos, pictures], without the kind that there is none of."""
    parts = [[e for e in entries if e["image"] == image] for image in (False, True)]
    return [part for part in parts if part]


def without(entries, val):
    """Of --data what may be trained on beside --val: not what `split` holds out, and no file of --val."""
    held_out = {os.path.realpath(e["path"]) for e in val}
    learnt = [e for e in entries if e.get("split") in (None, "train")]
    both = [e["path"] for e in learnt if os.path.realpath(e["path"]) in held_out]
    if both or not learnt:
        raise BadInput(f"--val: {len(both)} files of --data are in it as well, the first {both[:1]}; {len(learnt)} are left to train on")
    return learnt


def check_entries(name, entries, need, learnt, test):
    """Refuse entries without what training needs, and print how many there are."""
    lacking = [e["path"] for e in entries if not e[need] or need == "mask" and not e["graph"]]
    if lacking:
        raise BadInput(f"{name}: {len(lacking)} of {len(entries)} entries have no {need}, the first "
                       f"{lacking[0]}; give each a {need}, or leave it out")
    masks = sum(bool(e["mask"]) for e in entries)
    note = "" if masks or need == "mask" else ": no segmentation loss"
    print(f"{name}: {learnt} clips to train on, {test} held out, {masks} of them with masks{note}")


def fingerprint(*names):
    """A short text that changes when an entry of these manifests does: a resumed run stores and compares it."""
    crc = 0
    for name in names:
        entries = read_manifest(name) if name and name != "world" else []
        for entry in entries:
            parts = [entry.get(key) for key in ("name", "caption", "label", "split")]
            crc = zlib.crc32(json.dumps(parts).encode(), crc)
    return f"{crc:08x}"


# ---------------------------------------------------------------------------------------------------------------------
# python data.py make
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MakeConfig:
    """Writes the procedural world as MP4s with label sidecars, captions, questions and a manifest: the same training from disk."""
    size: str = "nano"                  # one of nano, tiny, base, large: what their clips look like by default
    clips: int = 1000                   # how many; more later: the same command with another number
    out: str = "out/world"              # the folder for manifest.json and clips
    image_size: int = 64                # pixels of a side, an even number
    frames: int = 8                     # frames of a clip
    max_objects: int = 8                # 1 .. 8 objects in a clip
    shared_colours: bool = True         # may two objects of a clip wear the same colour?
    acts: int = 1                       # acts that the subject performs one after another; more for long clips
    camera: bool = True                 # pans and zooms
    light: bool = True                  # the scene gets lighter or darker
    textures: str | None = None         # a folder of your pictures or clips: objects and grounds are painted with them
    story: bool = False                 # clips to ask about what happens when, of 8 frames to any number (train_vlm.py)
    seed: int = 0                       # the clips that a training of this seed sees first
    begin: int | None = None            # or: the index of the first clip (held-out clips begin at 1150000000)
    fps: float = 8.0                    # frames a second
    workers: int | None = None          # processes; 0: none but this one; default: one for each core
    overwrite: bool = False             # make clips anew that are there

    def __post_init__(self):
        if not self.out or self.textures == "":
            raise BadInput(f"--out {self.out!r} --textures {self.textures!r}: give the names of folders")
        for name, least in (("clips", 1), ("seed", 0), ("begin", 0), ("workers", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise BadInput(f"--{name} {getattr(self, name)}: at least {least}")
        if not 1 <= self.fps <= 1000:
            raise BadInput(f"--fps {self.fps}: 1 to 1000")
        if self.image_size % 2 or not 8 <= self.image_size <= 8192:
            raise BadInput(f"--image-size {self.image_size}: an even number from 8 to 8192")
        self.world

    @property
    def world(self):
        return World(self.image_size, self.frames, self.max_objects, self.shared_colours, self.acts, self.camera, self.light, self.textures, self.story)

    @property
    def first(self):                                             # seeds as `trajtok.open_data` counts them
        return TRAIN + self.seed % 49 * 10_000_000 if self.begin is None else self.begin


#  size          what `trajtok.py pretrain` and `train_clip.py` train on (a test compares)
MAKE_SIZES = {"nano": dict(image_size=64, frames=8, max_objects=4, shared_colours=False), "tiny": dict(image_size=128, frames=8),
              "base": dict(image_size=224, frames=16), "large": dict(image_size=224, frames=16)}
MAKE_SIZES = {name: {"size": name, **values} for name, values in MAKE_SIZES.items()}
AT_ONCE = 16                                                     # clips that a worker paints together


def make(argv):
    """The same clips as on the fly, on disk: begin .. begin + clips - 1. What is there whole is kept, so a run that was stopped goes on."""
    cfg = configure(MakeConfig, MAKE_SIZES, argv)
    out, began = Path(cfg.out), time.time()
    # what the clips in a folder have in common: one folder never holds two worlds. The words stand for the code that wrote them.
    words = [(s["caption"], s["qa"]) for s in (script(cfg.first + i, cfg.world) for i in range(16))]
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("size", "clips", "out", "seed", "begin", "workers", "overwrite")}
    settings = {k: v for k, v in settings.items() if k != "story" or v}      # folders that were made before there were stories remain usable
    settings |= dict(first=cfg.first, words_crc=zlib.crc32(repr(words).encode()), textures_crc=open_textures(cfg.textures))
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = json.loads((out / "make.json").read_text(encoding="utf-8")) if (out / "make.json").exists() and not cfg.overwrite else settings
    except (OSError, ValueError) as error:
        raise BadInput(f"--out {out}: cannot be used ({error}); give another folder") from None
    differ = [f"{k} {old.get(k)!r} (now {settings[k]!r})" for k in settings if old.get(k) != settings[k]]
    if differ:
        raise BadInput(f"--out {out}: holds clips made with {', '.join(differ[:4])}; give the same flags, another --out, or --overwrite")
    if cfg.overwrite:                                            # clips of other settings, beyond the number asked for now, must not pass for these
        for old_clip in (*out.glob("[0-9]*/[0-9]*.mp4"), *out.glob("[0-9]*/[0-9]*_mask.npz"), *out.glob("[0-9]*/[0-9]*_graph.npz")):
            old_clip.unlink()
    write_json(out / "make.json", settings)
    for stale in out.glob("*/.*.[0-9]*"):                        # what a kill in the middle of a file left
        stale.unlink(missing_ok=True)
    jobs = [(cfg, cfg.first + i, min(AT_ONCE, cfg.clips - i)) for i in range(0, cfg.clips, AT_ONCE)]
    rows, kept, size = {}, 0, 0
    workers = min(cores() if cfg.workers is None else cfg.workers, len(jobs))
    with tqdm(total=cfg.clips, desc=f"{out}", unit=" clips", disable=None) as bar:
        for (_, first, count), (made, old, written) in in_processes(make_some, jobs, workers if len(jobs) > 1 else 0):
            rows[first] = made
            kept, size = kept + old, size + written
            bar.update(count)
    lines = [json.dumps(row, ensure_ascii=False) for first in sorted(rows) for row in rows[first]]
    replace(out / "manifest.json", lambda p: p.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8"))   # a line an entry
    print(f"{cfg.clips} clips of {cfg.frames} frames of {cfg.image_size} x {cfg.image_size} px, {size / 1e6:.1f} MB, {time.time() - began:.0f} s"
          + (f"; {kept} of them were there" if kept else ""))
    talks = [json.dumps(dict(video=row["video"], conversations=[
        {"from": "human", "value": "<video>\n" + qa["question"]} | {k: qa[k] for k in ("type", "options") if k in qa}, {"from": "gpt", "value": qa["answer"]}]), ensure_ascii=False)
        for first in sorted(rows) for row in rows[first] for qa in row["qa"]]
    replace(out / "qa.jsonl", lambda p: p.write_text("\n".join(talks) + "\n", encoding="utf-8"))
    print(f"wrote {out / 'manifest.json'} and qa.jsonl, its questions in the form of LLaVA; train on it with --data {out / 'manifest.json'} --image-size {cfg.image_size} --frames {cfg.frames}")


def make_some(job):
    """Clips first .. first + count - 1 in their folder -> their manifest rows, how many were there, bytes of all."""
    cfg, first, count = job
    scripts, rows, missing, size = [script(first + i, cfg.world) for i in range(count)], [], [], 0
    for s in scripts:
        clip = f"{s['index'] // 1000:07d}/{s['index']:010d}.mp4"             # a thousand clips a folder
        rows.append(dict(video=clip, caption=s["caption"], label=MOTIONS[s["motion"]], appearance=s["appearance"], motion=s["motion"], qa=s["qa"]))
    paths = [Path(cfg.out) / row["video"] for row in rows]
    sidecars = [[p.with_name(f"{p.stem}_{kind}.npz") for kind in ("mask", "graph")] for p in paths]
    missing = [i for i, p in enumerate(paths) if not all(f.exists() for f in (p, *sidecars[i]))]
    if missing:
        videos, labels = rasterise(stack([scripts[i] for i in missing]), cfg.image_size, textures=cfg.textures)
    for i, video, ids in zip(missing, *((videos.numpy(), labels.numpy().astype(np.uint8)) if missing else ((), ()))):
        try:
            paths[i].parent.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput(f"{paths[i].parent}: cannot be made ({error.strerror}); give another --out, or make room") from None
        # object id = label + 1, since 0 is nothing; row m of the graph is label m, so that labels come back as they were
        present = np.stack([np.isin(np.arange(MAX_GROUNDS + MAX_OBJECTS), frame) for frame in ids], 1)
        graph = present * np.arange(1, 1 + MAX_GROUNDS + MAX_OBJECTS, dtype=np.int64)[:, None]
        paths[i].unlink(missing_ok=True)                         # a film whose labels are gone
        write_npz(sidecars[i][0], "arr_0", ids + 1)
        write_npz(sidecars[i][1], "tensor", graph)
        with film(paths[i], cfg.fps, exact=True) as add:         # the video last: a clip that is there has its labels
            add(video)
    return rows, count - len(missing), sum(f.stat().st_size for p, both in zip(paths, sidecars) for f in (p, *both))


def write_npz(path, key, array):
    def write(beside):
        with open(beside, "wb") as file:                         # given a name, numpy would add .npz to it
            np.savez_compressed(file, **{key: array})
    replace(path, write)


# -----------------------------------------------------------------------------------------------------------
# python data.py check
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CheckConfig:
    """Decodes every file of a manifest, CSV or folder, and names those that a training could not use."""
    manifest: str = ""                  # a manifest (.json, .jsonl), a CSV or a folder
    image_size: int = 64                # pixels of a side that frames are decoded to
    workers: int | None = None          # processes; 0: none but this one; default: one for each core


def check(argv):
    """A line for each file that cannot be used, with the reason; exit code 1 if there is one."""
    cfg = configure(CheckConfig, None, argv, positional="manifest")
    entries = read_manifest(cfg.manifest)
    workers = cores() if cfg.workers is None else cfg.workers
    jobs = [(entry, cfg.image_size) for entry in entries]
    bad = 0
    for (entry, _), reason in tqdm(in_processes(inspect_entry, jobs, workers), total=len(jobs), unit=" files"):
        if reason:
            bad += 1
            tqdm.write(reason)
    print(f"{cfg.manifest}: {len(entries)} files, {bad} of them cannot be used")
    if bad:
        raise SystemExit(1)


def inspect_entry(job):
    """-> what is wrong with an entry, or None."""
    entry, size = job
    try:
        frames = sum(len(piece) for piece in read_frames(entry["path"], size))
        if entry["mask"] or entry["graph"]:
            load_labels(entry["mask"], entry["graph"], frame_times(entry["path"]), size, entry["path"])
    except BadVideo as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py label
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LabelConfig:
    """Makes trajectory labels for real video: `_mask.npz` and `_graph.npz` beside each file, and a manifest of them, labelled.json."""
    source: str = ""                    # a folder of videos, a manifest or a CSV
    method: str = "classic"             # classic (nothing else needed) or sam2
    sam2: str | None = None             # folder of a published SAM2 (config.json, model.safetensors), for --method sam2
    out: str | None = None              # folder for labels and manifest; default: beside the videos, the manifest in the folder given
    image_size: int = 224               # short side of the masks in pixels
    stretch: int = 48                   # the next frame is a key frame after so many at the latest
    workers: int | None = None          # processes; 0: none but this one; default: one for each core, of sam2 one
    overwrite: bool = False             # make labels anew that are there

    def __post_init__(self):
        if self.method not in ("classic", "sam2"):
            raise BadInput(f"--method {self.method}: classic or sam2")
        if (self.method == "sam2") != bool(self.sam2):
            raise BadInput(f"--method {self.method} --sam2 {self.sam2}: --sam2 FOLDER goes with --method sam2, and sam2 cannot do without")
        if not 32 <= self.image_size <= 2048 or self.stretch < 1 or (self.workers or 0) < 0:
            raise BadInput(f"--image-size {self.image_size} --stretch {self.stretch} --workers {self.workers}: 32 to 2048, at least 1, at least 0")


def label_video(job):
    """One file in a worker -> (trajectories, frames), or why it cannot be labelled."""
    cfg, path, mask, graph = job
    try:
        ids = label_frames(read_frames(path, cfg.image_size, whole=True), method_of(cfg), cfg.stretch)
        return write_labels(Path(mask), Path(graph), ids), len(ids)
    except BadVideo as error:
        return str(error)


def whole_labels(mask, graph):
    try:
        return bool(mask and graph) and os.path.exists(mask) and os.path.exists(graph) and len(sidecars(mask, graph)) == 2
    except BadVideo:
        return False


def label(argv):
    cfg = configure(LabelConfig, None, argv, positional="source")
    try:
        entries = read_manifest(cfg.source)
    except BadVideo:
        raise
    except BadInput as error:
        raise BadInput(str(error).removeprefix("--data ")) from None
    source = Path(cfg.source) if Path(cfg.source).is_dir() else Path(cfg.source).parent
    out, began, jobs, owners, bad = Path(cfg.out) if cfg.out else source, time.time(), {}, {}, {}
    method_of(cfg)                                               # a missing package or folder is told now, not by a worker
    for entry in entries:
        path = Path(entry["path"])
        inside = os.path.relpath(path, source)
        base = out / inside if cfg.out and not inside.startswith("..") else out / path.name if cfg.out else path
        target = [str(base.with_name(f"{base.stem}_{kind}.npz")) for kind in ("mask", "graph")]
        if owners.setdefault(target[0], str(path)) != str(path):
            bad[str(path)] = f"{path}: its labels would have the name of those of {owners[target[0]]}; rename one"
            print(f"left out: {bad[str(path)]}", file=sys.stderr)
        elif str(path) in bad:
            pass                                                 # the same file again
        elif not cfg.overwrite and whole_labels(entry["mask"], entry["graph"]):
            pass                                                 # of another's making, or ours beside the video
        elif not cfg.overwrite and whole_labels(*target):
            entry["mask"], entry["graph"] = target
        elif not cfg.overwrite and os.path.exists(target[0]):    # ours are written last: a mask alone, or a broken one, is somebody's
            bad[str(path)] = f"{path}: {target[0]} is there, but cannot be used with its graph; remove it, or give --overwrite"
            print(f"left out: {bad[str(path)]}", file=sys.stderr)
        else:
            entry["mask"], entry["graph"] = target
            jobs[str(path)] = cfg, str(path), *target
    try:
        for folder in {Path(job[2]).parent for job in jobs.values()} | {out}:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in (*folder.glob(".*_mask.npz.[0-9]*"), *folder.glob(".*_graph.npz.[0-9]*")):
                stale.unlink(missing_ok=True)                    # what a kill in the middle of a file left
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written to ({error.strerror}); give another folder") from None
    made, frames = [], 0
    usual = 1 if cfg.method == "sam2" else cores()               # each process holds a model of its own
    workers = min(usual if cfg.workers is None else cfg.workers, len(jobs))
    with tqdm(total=len(jobs), desc="labels", unit=" videos", disable=None) as bar:
        for (_, path, *_), result in in_processes(label_video, list(jobs.values()), workers):
            if isinstance(result, str):
                bad[path] = result
                tqdm.write(f"left out: {bad[path]}", file=sys.stderr)
            else:
                made.append(result[0])
                frames += result[1]
            bar.update()
    paths = {e["path"] for e in entries}
    if paths <= bad.keys():
        raise BadInput(f"{cfg.source}: none of the {len(paths)} files can be labelled; the last: {list(bad.values())[-1]}")
    rows = []
    for entry in (e for e in entries if e["path"] not in bad):
        kept = {k: v for k, v in entry.items() if k not in ("path", "image", "mask", "graph") and v is not None}
        files = {"image" if entry["image"] else "video": entry["path"], "mask": entry["mask"], "graph": entry["graph"]}
        rows.append({k: Path(os.path.relpath(v, out)).as_posix() for k, v in files.items()} | kept)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    replace(out / "labelled.json", lambda p: p.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8"))
    seconds = time.time() - began
    print(f"{len(paths)} files: {len(made)} labelled, {len(paths) - len(made) - len(bad)} had labels, {len(bad)} left out"
          + (f"; {frames} frames, {np.mean(made):.1f} trajectories a file, {frames / seconds:.1f} frames a second" if made else ""))
    print(f"wrote {out / 'labelled.json'}; train on it with --data {out / 'labelled.json'}")


@one_line_errors
def main(argv=None):
    dispatch("data.py", __doc__, {"label": label, "make": make, "check": check}, argv)


if __name__ == "__main__":
    # This file is imported by name as well: run from here, there would be two of each class, and a BadInput of the one would not be
    # the other's. So the module of that name runs; its processes find their functions there too.
    import data
    data.main()
