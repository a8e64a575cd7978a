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
   manifests, class folders and CSV files that people have.  Labels for video that has none: `dense_motion`, `classic_segment`,
   `classic_track` (or SAM2's), joined by `label_frames`.
3. Text.  tiktoken Encodings: the words of made captions, a name that tiktoken knows, or a published folder.
4. Batches.  `WorldBatches`, `VideoBatches`, `Mixed`: batch number i is a pure function of (seed, i).

    python data.py label videos/                                    # `_mask.npz` and `_graph.npz` beside each video, and labelled.json
    python data.py label manifest.json --method sam2 --sam2 FOLDER  # the same with a published SAM2
    python data.py make --clips 1000 --out out/world                # the world as films, label sidecars, captions, questions, a manifest
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
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
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
    if sizes is None:                                            # a command without sizes
        return config(**flags)
    size = flags.get("size", config.size)
    if size not in sizes:
        raise BadInput(f"--size {size}: one of {', '.join(sizes)}")
    return config(**{**sizes[size], **flags})


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


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: what there is
# -----------------------------------------------------------------------------------------------------------

SEED = 20260222
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon", "arrow", "hourglass")
COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 25), "yellow": (245, 225, 50), "green": (45, 165, 60),
    "cyan": (60, 215, 225), "blue": (45, 80, 225), "purple": (130, 50, 175), "pink": (250, 130, 190),
    "white": (248, 248, 248), "black": (22, 22, 26)}
TEXTURES = ("plain", "striped", "checked", "dotted", "wavy", "speckled")
# A muted colour and a texture each. Objects are saturated: none has the colour of its ground.
GROUNDS = {
    "sand": (205, 180, 130, 5), "grass": (92, 128, 78, 1), "water": (98, 138, 170, 4),
    "snow": (208, 216, 226, 0), "bricks": (150, 92, 78, 2), "stone": (128, 128, 132, 5),
    "earth": (98, 76, 58, 3), "tiles": (170, 170, 150, 2), "a dark ground": (64, 64, 72, 0)}
MAX_OBJECTS, MAX_GROUNDS = 8, 4                                 # label ids: grounds 0..3, objects 4..11

# Radius of the subject as a fraction of the frame. Of many objects all are smaller.
SIZES = {"medium": 0.20, "large": 0.24}
CROWDED = (1.0, 1.0, 1.0, 0.9, 0.85, 0.8, 0.75, 0.7)
# A subject that grows or shrinks changes its radius by GROWTH, between sizes that other subjects have. The
# radii of the others are shares of its mean radius. At no moment is one larger than 0.7 of the subject's.
GROWTH, SHARE = 1.7, (0.43, 0.53)                               # 0.53 * sqrt(1.7) = 0.69
COUNTS = (15, 30, 22, 13, 8, 6, 3, 3)                           # how often 1, 2, ... 8 objects, in percent
LOW, HIGH = 0.12, 0.88                                          # centres stay inside this box

# Index ranges. Training never reaches VALIDATION: it would take a thousand million clips.
TRAIN, VALIDATION, TEST, HELDOUT = 0, 1_000_000_000, 1_150_000_000, 1_200_000_000

# An act is a program and the way it goes. The program is the motion class, the way is told by captions alone.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}         # y grows downwards
TURNS = {"clockwise": 1, "anticlockwise": -1}
MOTIONS = tuple("straight bounce orbit spin grow shrink approach follow collide behind front".split())
SOLO = MOTIONS[:6]                                              # programs that need no companion
WAYS = {
    "straight": tuple(DIRECTIONS), "bounce": ("sideways", "upright"),
    "orbit": tuple(TURNS), "spin": tuple(TURNS)}
# The acts of a chain by the words of questions: infinitives whose third person is "<first word>s ...".
CHAIN = {
    "dart left": ("straight", "left"), "dart right": ("straight", "right"), "rise": ("straight", "up"),
    "sink": ("straight", "down"), "circle": ("orbit", "clockwise"), "spin": ("spin", "clockwise"),
    "swell": ("grow", ""), "shrink": ("shrink", "")}
# In a chain the others come and go. When they begin to go and to come, as ranges of fractions of the clip.
NEVER, BEFORE = (9, 9), (-9, -9)
ROLES = {
    "stays": (NEVER, NEVER), "comes": (BEFORE, (0.3, 0.8)), "leaves": ((0.15, 0.75), NEVER),
    "returns": ((0.12, 0.35), (0.55, 0.8))}
# Words of a clip that runs backwards.
OPPOSITE = {
    "left": "right", "up": "down", "clockwise": "anticlockwise",
    "grow": "shrink", "in": "out", "lighter": "darker"}
OPPOSITE |= {after: before for before, after in OPPOSITE.items()}


@dataclass(frozen=True)
class World:
    """What the procedural world shows and says. Frozen, so that a run's config.json says what it saw."""
    size: int = 64                  # pixels of a side
    frames: int = 8                 # frames of a clip
    max_objects: int = 8            # 1..8
    shared_colours: bool = True     # may two objects of a clip have one colour (never also one shape)?
    acts: int = 1                   # acts of the subject; several are a chain: each ends where it began
    camera: bool = True             # pans and zooms
    light: bool = True              # the scene gets lighter or darker
    story: bool = False             # a chain even of one act
    words: str = "all"              # captions tell: all, looks (no deeds), deeds (shapes and deeds alone)
    shapes: int = len(SHAPES)       # how many of SHAPES there are
    programs: tuple = MOTIONS       # what a subject of one act may do
    plain: bool = False             # no texture anywhere, and one dark ground
    scale: float = 1.0              # of all radii
    reverse: bool = False           # the same clips backwards, with the captions of what is then seen

    def __post_init__(self):
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise BadInput(f"max_objects {self.max_objects}: give 1 to {MAX_OBJECTS}")
        least = 8 if self.chain else 1
        if self.frames < least or self.size < 8:
            raise BadInput(f"{self.frames} frames at {self.size} px: give at least {least} of 8 px")
        if not 1 <= self.acts <= max(1, self.frames // 4):
            raise BadInput(f"acts {self.acts} in {self.frames} frames: an act needs at least 4 frames")
        if self.words not in ("all", "looks", "deeds"):
            raise BadInput(f"words {self.words!r}: one of all, looks, deeds")
        # Backwards, approaching and following are something that there are no words for; so are chains.
        one_way = self.chain or "approach" in self.programs or "follow" in self.programs
        assert not (self.reverse and one_way), "reverse: one act, programs without approach and follow"
        assert set(self.programs) & set(SOLO), "a lone object needs one of the programs " + ", ".join(SOLO)

    @property
    def chain(self):
        return self.story or self.acts > 1


# Little is shown, and captions ask for all of it. Radii are 1.1 times those of the full world.
STAGE = World(size=32, max_objects=2, camera=False, light=False, words="deeds", plain=True, scale=1.1)


def held_out(shape, colour):
    """Is this pair kept out of training, validation and test? One colour for each shape. In the HELDOUT range
    the subject always has such a pair: accuracy there measures composition, not memory."""
    return (3 * shape + colour) % len(COLOURS) == 7


def pick(rng, options):
    """One of a list or tuple. (rng.choice would make a numpy array of it.)"""
    return options[rng.integers(len(options))]


def shuffled(rng, options):
    """A list in another order."""
    return [options[i] for i in rng.permutation(len(options))]


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: motion programs
# -----------------------------------------------------------------------------------------------------------
# A program takes go (T,): how much of the act is done, 0 .. 1, or 0 .. 1 .. 0 in a chain; the way; far, a
# distance, and phase, an angle, both random; the states (x, y, r, angle) of the subject and its companion at
# go = 0. It returns the path (T, 4) of the subject and that of the companion (None: it stays), or None where
# there is no room. A single frame gives the program away in a third of the clips, and the mean and spread of
# the places over the frames in three quarters (`controls`); a guess is right in a tenth.

def path_of(state, x=0.0, y=0.0, r=1.0, angle=0.0):
    """A state, and what is added to x, y and angle and multiplies the radius, (T,) or numbers -> (T, 4)"""
    path = np.empty((np.size(x + y + r + angle), 4))
    path[:, 0] = state[0] + x
    path[:, 1] = state[1] + y
    path[:, 2] = state[2] * r
    path[:, 3] = state[3] + angle
    return path


def toward(me, other):
    """-> unit vector x, y from one to the other, and their distance and where they touch, in the frame's
    side"""
    x, y = other[:2] - me[:2]
    away = max(math.hypot(x, y), 1e-6)
    return x / away, y / away, away, 0.95 * (me[2] + other[2])


def straight(go, way, far, phase, me, other):
    """Once along a line."""
    x, y = DIRECTIONS[way]
    return path_of(me, far * go * x, far * go * y), None


def bounce(go, way, far, phase, me, other):
    """Forth, back and forth again."""
    wave = far * (1 - np.abs(1 - 3 * go % 2))
    wave = wave if phase < math.pi else -wave
    return (path_of(me, x=wave) if way == "sideways" else path_of(me, y=wave)), None


def orbit(go, way, far, phase, me, other):
    """Once round a circle through the place where it begins."""
    angle = phase + TURNS[way] * 2 * math.pi * go
    x = np.cos(angle) - math.cos(phase)
    y = np.sin(angle) - math.sin(phase)
    return path_of(me, 0.44 * far * x, 0.44 * far * y), None


def spin(go, way, far, phase, me, other):
    """3 to 5 radians. At 8 frames at most 41 degrees a frame, so that no square is seen to turn backwards."""
    return path_of(me, angle=TURNS[way] * 10 * far * go), None


def grow(go, way, far, phase, me, other):
    """By the factor GROWTH, evenly in the logarithm."""
    return path_of(me, r=GROWTH ** go), None


def shrink(go, way, far, phase, me, other):
    """The reverse of growing."""
    return path_of(me, r=GROWTH ** -go), None


def approach(go, way, far, phase, me, other):
    """Up to the companion, and a rest beside it."""
    x, y, away, touching = toward(me, other)
    gap = away - touching * (1 + 0.025 * phase)
    s = gap * np.minimum(go / 0.6, 1)
    if gap > 0.15:
        return path_of(me, s * x, s * y), None


def follow(go, way, far, phase, me, other):
    """Both go the same way, the companion ahead."""
    x, y, away, touching = toward(me, other)
    s = 0.6 * far * go
    if touching < away < 0.5:
        return path_of(me, s * x, s * y), path_of(other, s * x, s * y)


def collide(go, way, far, phase, me, other):
    """Both meet half-way and spring back."""
    x, y, away, touching = toward(me, other)
    s = (away - touching) / 2 * (1 - np.abs(1 - 2 * go))
    if away - touching > 0.2:
        return path_of(me, s * x, s * y), path_of(other, -s * x, -s * y)


def passing(go, way, far, phase, me, other):
    """Through the companion's place, behind it or in front of it, and out on its far side."""
    x, y, away, touching = toward(me, other)
    s = 2 * away * go
    if away > 0.9 * touching:
        return path_of(me, s * x, s * y), None


FUNCTIONS = (
    straight, bounce, orbit, spin, grow, shrink, approach, follow, collide, passing, passing)
PROGRAMS = dict(zip(MOTIONS, FUNCTIONS))


def perform(rng, world, act, frames, me, other=None):
    """One act from these states -> what its program returns; None also where a path leaves the box."""
    program, way = act
    far, phase = rng.uniform(0.3, 0.5), rng.uniform(0, 2 * math.pi)
    go = np.linspace(0, 1, frames)
    if world.chain:
        far = 0.55 * far
        go = np.linspace(0, 1, frames + 1)[1:]
        if program not in ("orbit", "spin"):                    # these end where they begin by themselves
            go = 0.55 * np.sin(math.pi * go)
    paths = PROGRAMS[program](go, way, far, phase, me, other)
    if paths is not None and all(path is None or inside(path) for path in paths):
        return paths


def inside(path):
    """Do all places of (T, 4) or (4,) lie in the box?"""
    places = path[..., :2]
    return LOW <= places.min() and places.max() <= HIGH


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: scripts
# -----------------------------------------------------------------------------------------------------------

class Scene(NamedTuple):
    """What words are made of. Lists are of objects, the subject first."""
    world: World
    looks: list                     # dict(shape, colour, size, texture, r)
    act: tuple                      # of the subject: its first (program, way)
    deeds: list                     # of the subject, by name
    hero: str                       # the deed whose number is balanced
    visits: list                    # of the others in a chain: (role, first frame of going, of coming)
    grounds: list                   # names
    film: list                      # what camera and light do, in words


def script(index, world=World()):
    """The scene number `index`, the same on every machine: small arrays for `rasterise`, words, classes.

    seeds (4, 2): each pixel belongs to the ground whose seed is nearest; camera (T, 3): centre x, y and zoom;
    light (T, 3): gain of each colour; place (8, T, 4): x, y, radius, angle of each object on the screen, the
    deepest first; shape (8,); count: objects that there are; surface (12, 9) of grounds 0..3 and objects
    4..11: texture, its tiles a unit, shading, two colours.
    caption; qa: list of dict(type, question, answer, options); appearance, colour, motion: of the subject;
    told: dict(deeds, bounds: frames between them, visits, slots: of each object its index in `place`)."""
    rng = np.random.default_rng((SEED, index))
    looks = cast(rng, world, index)
    deeds, hero, acts = choose_acts(rng, world, len(looks))
    bounds = [i * world.frames // len(acts) for i in range(len(acts) + 1)]
    if world.chain:
        paths, visits = chained(rng, world, looks, acts, bounds)
    else:
        paths, visits = staged(rng, world, looks, acts[0]), []
    camera, light, film = filmed(rng, world)
    if world.reverse:
        paths, camera, light = paths[:, ::-1], camera[::-1], light[::-1]
        acts = [tuple(OPPOSITE.get(word, word) for word in acts[0])]
        deeds = [acts[0][0]]
        film = [" ".join(OPPOSITE.get(word, word) for word in text.split()) for text in film]

    order = painting_order(rng, world, len(looks), acts[0][0])
    grounds, seeds, surface = surfaces(rng, world, [looks[j] for j in order])

    # From the world to the screen, in the order of painting; who is not there is far out of view.
    place = np.full((MAX_OBJECTS, world.frames, 4), (9.0, 9.0, 1e-3, 0.0))
    place[:len(looks)] = paths[order]
    place[..., :2] = (place[..., :2] - 0.5 - camera[:, :2]) * camera[:, 2:] + 0.5
    place[..., 2] *= camera[:, 2]
    shape = np.zeros(MAX_OBJECTS, np.int64)
    shape[:len(looks)] = [looks[j]["shape"] for j in order]
    scene = Scene(world, looks, acts[0], deeds, hero, visits, grounds, film)
    result = dict(seeds=seeds, camera=camera, light=light, place=place, surface=surface)
    result = {name: array.astype(np.float32) for name, array in result.items()}
    result |= dict(index=index, shape=shape, count=len(looks))
    result |= dict(caption=describe(rng, scene), qa=questions(rng, scene))
    result |= dict(appearance=looks[0]["shape"], colour=looks[0]["colour"], motion=MOTIONS.index(acts[0][0]))
    slots = [order.index(j) for j in range(len(looks))]
    return result | dict(told=dict(deeds=deeds, bounds=bounds, visits=visits, slots=slots))


def cast(rng, world, index):
    """Who is there, the subject first: it is the largest, so that words can point at it. -> looks, see
    Scene"""
    likely = np.array(COUNTS[:world.max_objects])
    count = 1 + int(rng.choice(len(likely), p=likely / likely.sum()))
    size = pick(rng, tuple(SIZES)) if count < 6 else "medium"
    radius = world.scale * SIZES[size] * CROWDED[count - 1] * rng.uniform(0.92, 1.08)
    looks, taken = [], set()
    while len(looks) < count:
        shape, colour = int(rng.integers(world.shapes)), int(rng.integers(len(COLOURS)))
        if not looks and index >= HELDOUT:
            colour = (7 - 3 * shape) % len(COLOURS)
        elif held_out(shape, colour):
            continue
        # Two objects of a clip never share both shape and colour, so that words can point at one of them.
        mark = (shape, colour) if world.shared_colours else colour
        if mark in taken:
            continue
        taken.add(mark)
        texture = 0 if world.plain else int(rng.integers(len(TEXTURES)))
        r = radius * rng.uniform(*SHARE)
        looks.append(dict(shape=shape, colour=colour, texture=texture, size="", r=r))
    looks[0].update(size=size, r=radius)
    return looks


def choose_acts(rng, world, count):
    """-> deeds by name, the hero, acts. In a chain two equal deeds never stand side by side: they would look
    like one. The hero is the deed that questions count: it occurs 1, 2 or 3 times, each as often."""
    if not world.chain:
        program = pick(rng, [p for p in world.programs if count > 1 or p in SOLO])
        return [program], "", [(program, pick(rng, WAYS.get(program, ("",))))]
    hero = pick(rng, tuple(CHAIN))
    times = 1 + rng.integers(min(3, (world.acts + 1) // 2))
    at = np.sort(rng.permutation(world.acts - times + 1)[:times]) + np.arange(times)
    deeds = []
    for i in range(world.acts):
        others = [deed for deed in CHAIN if deed != hero and deed not in deeds[-1:]]
        deeds.append(hero if i in at else pick(rng, others))
    return deeds, hero, [CHAIN[deed] for deed in deeds]


def beside(rng, state, other, close):
    """A place (2,) for the companion: close by every other time, if that may be; else farther away."""
    away = rng.uniform(0.9, 1.1) * (state[2] + other[2])
    if not close or rng.random() < 0.5:
        away += rng.uniform(0.15, 0.45)
    angle = rng.uniform(0, 2 * math.pi)
    return state[:2] + away * np.array((math.cos(angle), math.sin(angle)))


def start(rng, looks):
    """-> states (count, 4) of objects at about (0, 0), turned anyhow"""
    states = rng.uniform(-0.03, 0.03, (len(looks), 4))
    states[:, 2] = [look["r"] for look in looks]
    states[:, 3] = rng.uniform(0, 2 * math.pi, len(looks))
    return states


def staged(rng, world, looks, act):
    """Paths (count, T, 4) of a clip of one act. Places are drawn until the act fits. A companion that does
    not matter is put where one could be that does, or its place would tell the program."""
    program = act[0]
    states = start(rng, looks)
    # All subjects have the sizes at which those begin and end that grow and shrink.
    size = pick(rng, (-1.0, 1.0, rng.uniform(-1, 1)))
    size = {"grow": -1.0, "shrink": 1.0}.get(program, size)
    states[0, 2] *= GROWTH ** (size / 2)
    done = None
    while done is None:
        states[0, :2] = rng.uniform(LOW, HIGH, 2)
        if program not in SOLO:
            states[1, :2] = beside(rng, states[0], states[1], program not in ("approach", "collide"))
            if not inside(states[1]):
                continue
        done = perform(rng, world, act, world.frames, *states[:2])
    # Who does nothing stays where it is.
    paths = np.repeat(states[:, None], world.frames, 1)
    paths[0] = done[0]
    if done[1] is not None:
        paths[1] = done[1]
    for j in range(1 if program in SOLO else 2, len(looks)):
        # A companion lies beside the subject's first or last place, another object somewhere beside a third.
        states[j, :2] = 9.0
        while not inside(states[j]):
            near = paths[0, pick(rng, (0, -1, -1))] if j == 1 else paths[pick(rng, range(j)), 0]
            states[j, :2] = beside(rng, near, states[j], j == 1)
        paths[j] = states[j]
        program = pick(rng, SOLO[:4])                           # half of the others do something, too
        own = perform(rng, world, (program, pick(rng, WAYS[program])), world.frames, states[j])
        if own is not None and rng.random() < 0.5 and j > 1:
            paths[j] = own[0]
    return paths


def chained(rng, world, looks, acts, bounds):
    """Paths (count, T, 4) of a chain, and visits: the subject in the middle, the others in the corners,
    then at the sides, from where they come and go. Acts end where they begin, so that any may follow
    any."""
    T = world.frames
    homes = shuffled(rng, [(0.16, 0.16), (0.16, 0.84), (0.84, 0.16), (0.84, 0.84)])
    homes = [(0.5, 0.5), *homes, (0.1, 0.5), (0.9, 0.5), (0.5, 0.9)]
    states = start(rng, looks)
    states[:, :2] += homes[:len(looks)]
    paths = np.repeat(states[:, None], T, 1)
    for act, begin, end in zip(acts, bounds, bounds[1:]):
        paths[0, begin:end] = perform(rng, world, act, end - begin, states[0])[0]
        states[0, 3] = paths[0, end - 1, 3]                     # a spin ends where it ends
    visits, frame = [], np.arange(T)
    way = max(1, min(T // 16, 4))                               # frames that going and coming take
    for path in paths[1:]:
        role = pick(rng, tuple(ROLES))
        goes, comes = [int(T * rng.uniform(*when)) for when in ROLES[role]]
        visits.append((role, goes, comes))
        gone = ((frame - goes) / way).clip(0, 1) - ((frame - comes) / way).clip(0, 1)
        axis = int(abs(path[0, 1] - 0.5) > abs(path[0, 0] - 0.5))       # over the nearest edge
        out = math.copysign(0.9, path[0, axis] - 0.5) + 0.5
        path[:, axis] += gone * (out - path[0, axis])
    return paths, visits


def painting_order(rng, world, count, program):
    """Numbers of objects, the deepest first: by chance, but for the two of whom one passes behind the
    other. In a chain the subject is the nearest, so that what is asked about is seen."""
    order = rng.permutation(count).tolist()
    if world.chain:
        order.remove(0)
        order.append(0)
    if program in ("behind", "front"):
        i, j = sorted((order.index(0), order.index(1)))
        order[i], order[j] = (0, 1) if program == "behind" else (1, 0)
    return order


def filmed(rng, world):
    """-> camera (T, 3) of centre x, y and zoom, light (T, 3) of gains, what they do in words"""
    tau = np.arange(world.frames) / max(world.frames - 1, 1) - 0.5
    camera, film = np.tile((0.0, 0.0, 1.0), (world.frames, 1)), []
    light = np.tile(rng.uniform(0.94, 1.06, 3), (world.frames, 1))         # each clip has a tint
    if world.camera and not world.chain and rng.random() < 0.35:
        way = pick(rng, (*DIRECTIONS, "in", "out"))
        if way in DIRECTIONS:
            camera[:, :2] = tau[:, None] * rng.uniform(0.12, 0.25) * np.array(DIRECTIONS[way])
        else:
            camera[:, 2] = np.exp(tau * (0.35 if way == "in" else -0.35))
        film.append(f"the camera {'pans' if way in DIRECTIONS else 'zooms'} {way}")
    if world.light and rng.random() < 0.25:
        way = pick(rng, ("lighter", "darker"))
        light *= np.exp(0.6 * (tau if way == "lighter" else -tau) - 0.3)[:, None]
        film.append(f"it gets {way}")
    return camera, light, film


def surfaces(rng, world, looks):
    """Objects, the deepest first -> names of the grounds, seeds (4, 2) and surface (12, 9), see `script`"""
    *names, dark = GROUNDS
    names = shuffled(rng, names)[:pick(rng, (1, 1, 1, 1, 2, 2, 3, 4))]
    if world.plain:
        names = [dark]
    seeds = np.full((MAX_GROUNDS, 2), 1e3)
    seeds[:len(names)] = rng.uniform(0.05, 0.95, (len(names), 2))
    surface = np.zeros((MAX_GROUNDS + MAX_OBJECTS, 9))
    for i, name in enumerate(names):
        *colour, texture = GROUNDS[name]
        colour = np.array(colour)
        surface[i] = (texture, rng.uniform(4, 8), 0.0, *colour, *(0.86 * colour))
    for slot, look in enumerate(looks, MAX_GROUNDS):
        colour = np.array(list(COLOURS.values())[look["colour"]])
        second = 0.45 * colour
        if colour.sum() < 230:                                  # of a dark colour, a lighter one
            second = 0.55 * colour + 95
        # Shading of 0.25: one side of each object is lighter, so that even a plain circle is seen to spin.
        surface[slot] = (look["texture"], rng.uniform(0.9, 1.3), 0.25, *colour, *second)
    return names, seeds, surface


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: how much of the motion class needs motion
# -----------------------------------------------------------------------------------------------------------

def controls(world, clips=8000):
    """What a network can tell of the motion class (accuracy, chance 1 / 11) that is given the true states
    of the subject and its companion: those of the last frame alone, or their mean and spread over the
    frames, which hold no order. A probe of a video model proves use of order only where it is above the
    second."""
    states, motion = [], []
    for s in (script(i, world) for i in range(clips)):
        slots = s["told"]["slots"][:2]
        # both (T, 4); of an object that is alone, the same
        me, other = s["place"][slots[0]], s["place"][slots[-1]]
        turn = np.stack((np.sin(me[:, 3]), np.cos(me[:, 3])), -1)
        depth = np.full((world.frames, 1), slots[-1] - slots[0])
        states.append(np.concatenate((me[:, :3], other[:, :3] - me[:, :3], turn, depth), -1))
        motion.append(s["motion"])
    x, y = np.stack(states), torch.tensor(motion)                           # (clips, T, 9)
    no_order = np.concatenate((x.mean(1), x.std(1)), -1)
    return dict(control_last_frame=guessed(x[:, -1], y), control_no_order=guessed(no_order, y))


def known_controls(world):
    """The values of `controls` at this setting, of any size in pixels; None where they are not in the
    table."""
    names = ("control_last_frame", "control_no_order")
    for setting, values in CONTROLS.items():
        if dataclasses.replace(world, size=setting.size) == setting:
            return dict(zip(names, values))
    return dict.fromkeys(names)


def guessed(x, y, steps=1500):
    """Accuracy on the last quarter of x (n, features) of a network of two hidden layers fitted to the
    rest."""
    n = 3 * len(y) // 4
    x = torch.tensor(x, dtype=torch.float32)
    x = (x - x[:n].mean(0)) / (x[:n].std(0) + 1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = [nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        net = nn.Sequential(*hidden, nn.Linear(128, len(MOTIONS)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for batch in torch.randint(n, (steps, 256)):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return (net(x[n:]).argmax(-1) == y[n:]).float().mean().item()


# python -c "import data; print([data.controls(world) for world in data.CONTROLS])" prints these numbers.
CONTROLS = {
    World(max_objects=4, shared_colours=False): (0.33, 0.75), World(): (0.32, 0.77),
    World(frames=16): (0.33, 0.78), STAGE: (0.36, 0.77)}


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: words
# -----------------------------------------------------------------------------------------------------------

VERBS = {
    "straight": ("moves", "glides", "drifts", "slides", "travels"), "bounce": ("bounces", "springs", "bobs"),
    "orbit": ("circles", "goes round", "moves in a circle"),
    "spin": ("spins", "turns on the spot", "rotates"),
    "grow": ("grows", "gets bigger", "swells"), "shrink": ("shrinks", "gets smaller", "dwindles"),
    "approach": ("moves up to {} and stops", "comes to rest beside {}", "approaches {} and halts"),
    "follow": ("follows {}", "chases {}", "trails behind {}"),
    "collide": ("bumps into {}", "collides with {} and springs back", "knocks against {}"),
    "behind": ("passes behind {}", "goes by behind {}", "slips behind {} and out again"),
    "front": ("passes in front of {}", "goes by in front of {}", "crosses in front of {}")}
ADVERBS = {
    "left": ("to the left", "leftwards", "left"), "right": ("to the right", "rightwards", "right"),
    "up": ("upwards", "up", "to the top"), "down": ("downwards", "down", "to the bottom"),
    "sideways": ("from side to side", "left and right"), "upright": ("up and down", "upwards and downwards"),
    "clockwise": ("clockwise",), "anticlockwise": ("anticlockwise", "counterclockwise"), "": ("",)}


def a(phrase):
    """'a star', 'an arrow', 'an hourglass'"""
    return ("an " if phrase.startswith(("a", "e", "i", "o", "u", "hour")) else "a ") + phrase


def name_of(look, full=False):
    """'red star', enough to point at it: no other of the clip is one. full: 'large red striped star'"""
    words = [list(COLOURS)[look["colour"]], SHAPES[look["shape"]]]
    if full and look["texture"]:
        words.insert(1, TEXTURES[look["texture"]])
    if full and look["size"] == "large":
        words.insert(0, "large")
    return " ".join(words)


def third(infinitive):
    """'dart left' -> 'darts left'"""
    verb, *rest = infinitive.split()
    return " ".join([verb + "s", *rest])


def describe(rng, scene):
    """A caption in varied English. Subject, companion, deeds and ground are always told, the rest by chance.
    `words`: "looks" leaves out the deeds; "deeds" tells shapes and deeds alone, always in the same words."""
    words, (program, way) = scene.world.words, scene.act
    names = [a(name_of(look, full=rng.random() < 0.75)) for look in scene.looks]
    verb, adverb = pick(rng, VERBS[program]), pick(rng, ADVERBS[way])
    where = f"{pick(rng, ('on', 'over', 'against'))} {' and '.join(scene.grounds[:2])}"
    if words == "deeds":
        names = [a(SHAPES[look["shape"]]) for look in scene.looks]
        verb, adverb, where = VERBS[program][0], ADVERBS[way][0], ""
    # 1. what the subject does
    subject, *others = names
    doing = f"{verb} {adverb}"
    if scene.world.chain:
        doing = ", then ".join(map(third, scene.deeds))
    elif program not in SOLO:
        doing = doing.format(others.pop(0))
    # 2. who else is there
    rest = ""
    if scene.visits:
        for name, (role, _, _) in zip(others, scene.visits):
            rest += f", {name} {role}"
    elif others:
        rest = pick(rng, ("with {} nearby", "and there is {}", "next to {}", "along with {}"))
        rest = ("with {}" if words == "deeds" else rest).format(" and ".join(others[:2]))
    if words == "looks":
        doing = ""
    # 3. the sentence
    order = ["{subject} {doing} {where} {rest}"]
    if words == "all" and not scene.world.chain:
        order += ["{subject} {doing} {rest} , {where}", "{where} , {subject} {doing} {rest}",
                  "there is {subject} {where} ; it {doing} {rest}"]
    text = pick(rng, order).format(subject=subject, doing=doing, where=where, rest=rest)
    for change in scene.film:
        if words == "all" and rng.random() < 0.7:
            text += pick(rng, (" , ", " as ", " while ")) + change
    return " ".join(text.split()).replace(" ,", ",").replace(" ;", ";")


def questions(rng, scene):
    """What can be asked about a clip, and seen in it: list of dict(type, question, answer, options). Types:
    what, first, after, times, back (who left and came back?), again (did it come back?), order. Wrong
    options come from the same clip where it offers enough: that a thing occurs is not yet the answer.
    Answers are balanced: all deeds are equally likely at each place of a chain, how often the hero's occurs
    and who comes back is drawn before it is asked."""
    names, deeds, qa = [name_of(look) for look in scene.looks], scene.deeds, []
    known = list(CHAIN if scene.world.chain else MOTIONS)

    def ask(kind, question, answer, seen, all_of=()):
        options = shuffled(rng, sorted(set(seen))) + shuffled(rng, list(all_of))
        options = [option for option in dict.fromkeys(options) if option != answer][:3]
        if options:
            options = shuffled(rng, [answer, *options])
            qa.append(dict(type=kind, question=question, answer=answer, options=options))

    if len(scene.grounds) == 1 and not scene.world.plain and rng.random() < 0.5:
        ask("what", "What is the ground made of?", scene.grounds[0], (), list(GROUNDS)[:-1])
    else:
        colours = [name.split()[0] for name in names]
        ask("what", "What colour is the largest object?", colours[0], colours, COLOURS)
    ask("first", f"What does the {names[0]} do first?", deeds[0], deeds, known)
    if len(deeds) > 1:
        deed = pick(rng, list(dict.fromkeys(deeds[:-1])))
        follows = deeds[deeds.index(deed) + 1]
        all_of = [other for other in known if other != deed]
        seen = [other for other in all_of if other in deeds]
        question = f"What does the {names[0]} do right after it first {third(deed)}?"
        ask("after", question, follows, seen, all_of)
    if len(deeds) > 2:
        times = [str(n + 1) for n in range(min(3, (len(deeds) + 1) // 2))]
        ask("times", f"How many times does the {names[0]} {scene.hero}?", str(deeds.count(scene.hero)), times)
    visits = dict(zip(names[1:], scene.visits))
    goes = {name: when for name, (role, when, _) in visits.items() if role in ("leaves", "returns")}
    back = [name for name in goes if visits[name][0] == "returns"]
    if len(back) == 1:
        ask("back", "Which object leaves the view and comes back?", back[0], visits)
    if goes:
        name = pick(rng, list(goes))
        answer = "yes" if name in back else "no"
        ask("again", f"Does the {name} come back after it left?", answer, ("yes", "no"))
    pair = shuffled(rng, list(goes))[:2]
    if len(pair) == 2 and abs(goes[pair[0]] - goes[pair[1]]) >= max(2, scene.world.frames // 16):
        ask("order", f"Which leaves first, the {pair[0]} or the {pair[1]}?", min(pair, key=goes.get), pair)
    return qa


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: pixels
# -----------------------------------------------------------------------------------------------------------

CELLS, TILE = 128, 64                                           # sides of the tables below


@functools.lru_cache(maxsize=None)
def atlas(device):
    """Shapes bool (10, 128, 128), False along their edges, and textures float (6, 64, 64) in [0, 1]: what
    there is at an object's own coordinates. A look-up costs the same whatever it shows."""
    g = (np.arange(CELLS) + 0.5) / CELLS * 2 - 1
    x, y = np.meshgrid(g, g)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    # 0 .. 1 from one point of the star to the next
    fifth = (angle + math.pi / 2) * 5 / (2 * math.pi) % 1
    hx, hy = 1.15 * x, 0.15 - 1.15 * y
    shaft = (abs(x) < 0.36) & (y > -0.1) & (y < 0.95)
    shapes = np.stack((
        radius < 0.92,                                                      # circle
        np.maximum(abs(x), abs(y)) < 0.8,                                   # square
        (y < 0.75) & (y > 1.75 * abs(x) - 0.95),                            # triangle
        radius < 0.54 + 0.44 * abs(2 * fifth - 1) ** 1.2,                   # star
        (np.minimum(abs(x), abs(y)) < 0.36) & (radius < 0.98),              # cross
        (radius < 0.96) & (radius > 0.42),                                  # ring
        (hx ** 2 + hy ** 2 - 0.6) ** 3 < 1.12 * hx ** 2 * hy ** 3,          # heart
        (radius < 0.95) & (np.hypot(x - 0.55, y) > 0.62),                   # moon
        shaft | ((y <= 0.05) & (y > -0.95) & (abs(x) < 0.9 * (y + 0.95))),  # arrow
        (abs(x) < abs(y) * 0.8 + 0.2) & (abs(y) < 0.85)))                   # hourglass
    u, v = np.meshgrid(np.arange(TILE) / TILE, np.arange(TILE) / TILE)
    speckles = np.random.default_rng(7).random((16, 16)).repeat(4, 0).repeat(4, 1)
    waves = (v + 0.15 * np.sin(2 * np.pi * u)) % 1 < 0.45
    dots = np.hypot(u - 0.5, v - 0.5) < 0.3
    textures = np.stack((0 * u, u < 0.45, (u < 0.5) ^ (v < 0.5), dots, waves, speckles))
    return torch.tensor(shapes, device=device), torch.tensor(textures, dtype=torch.float32, device=device)


def stack(scripts):
    """A list of scripts -> one dict of tensors with a leading batch axis; words stay out."""
    keys = ("seeds", "camera", "light", "place", "shape", "count", "surface")
    return {key: torch.from_numpy(np.stack([s[key] for s in scripts])) for key in keys}


@torch.no_grad()
def rasterise(scripts, size, device="cpu"):
    """stack(scripts) -> video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) with H = W = size, on
    `device`. Painter's algorithm: the ground, then objects from the deepest to the nearest. Each pixel
    remembers the last surface that covered it and its own coordinates on that surface, and is coloured
    once, at the end."""
    device = torch.device(device)
    # So many clips at once: on a CPU their planes stay in its cache.
    chunk = 16 if device.type == "cpu" else 64
    videos, labels = [], []
    for i in range(0, len(scripts["count"]), chunk):
        s = {key: value[i:i + chunk].to(device) for key, value in scripts.items()}
        ids, u, v = draw_ground(s, size)
        for j in range(int(s["count"].max())):
            where, own_u, own_v = covered(s, j, size)
            ids.view(-1)[where] = MAX_GROUNDS + j
            u.view(-1)[where] = own_u
            v.view(-1)[where] = own_v
        videos.append(coloured(s, ids, u, v))
        labels.append(ids.long())
    return torch.cat(videos), torch.cat(labels)


def draw_ground(s, size):
    """-> the ground of each pixel (b, t, H, W), and its coordinates there, which move with the camera"""
    p = (torch.arange(size, device=s["camera"].device) + 0.5) / size - 0.5
    cx, cy, zoom = s["camera"][..., None, None].unbind(2)                   # (b, t, 1, 1)
    u = p / zoom + 0.5 + cx                                                 # (b, t, 1, W)
    v = p[:, None] / zoom + 0.5 + cy                                        # (b, t, H, 1)
    seeds = s["seeds"][..., None, None, None]                               # (b, 4, 2, 1, 1, 1)
    # The nearest seed so far, one after the other: a stack of all distances would be four planes.
    nearest = (u - seeds[:, 0, 0]) ** 2 + (v - seeds[:, 0, 1]) ** 2         # (b, t, H, W)
    ids = torch.zeros_like(nearest, dtype=torch.int32)
    for i in range(1, MAX_GROUNDS):
        distance = (u - seeds[:, i, 0]) ** 2 + (v - seeds[:, i, 1]) ** 2
        ids.masked_fill_(distance < nearest, i)
        nearest = torch.minimum(nearest, distance)
    return ids, u.expand_as(ids).contiguous(), v.expand_as(ids).contiguous()


def covered(s, j, size):
    """-> numbers (n,) of the pixels of the batch that object j of each clip covers, and their coordinates
    (n,) on it, along its own axes, in radii. Only a square window around the object is looked at: at 64 px
    this is 6 times as fast as looking at every pixel of the frame."""
    shapes = atlas(s["place"].device)[0]
    b, t = s["camera"].shape[:2]
    x, y, r, angle = s["place"][:, j, :, :, None, None].unbind(2)            # (b, t, 1, 1)
    # sqrt(2) radii to each side hold a square that is turned; 2.5 in all hold every shape of the table
    w = min(int(2.5 * size * r.max()) + 3, 2 * size)
    offset = torch.arange(w, device=x.device) - w // 2
    column = (x * size).round().long() + offset                             # (b, t, 1, w)
    row = (y * size).round().long() + offset[:, None]                       # (b, t, w, 1)
    dx, dy = (column + 0.5) / size - x, (row + 0.5) / size - y
    u = (dx * torch.cos(angle) + dy * torch.sin(angle)) / r                 # (b, t, w, w)
    v = (dy * torch.cos(angle) - dx * torch.sin(angle)) / r
    cell_u = ((u + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
    cell_v = ((v + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
    # What lies outside the table reads its edge, where no shape is.
    kind = s["shape"][:, j, None, None, None]
    hit = shapes.flatten()[(kind * CELLS + cell_v) * CELLS + cell_u]
    hit = hit & (column >= 0) & (column < size) & (row >= 0) & (row < size)
    frame = torch.arange(b * t, device=x.device).view(b, t, 1, 1)
    pixel = (frame * size + row) * size + column
    hit = hit.flatten().nonzero()[:, 0]
    return pixel.flatten()[hit], u.flatten()[hit], v.flatten()[hit]


def coloured(s, ids, u, v):
    """Surface of each pixel (b, t, H, W) and coordinates on it -> video uint8 (b, t, H, W, 3). The table of
    surfaces is read column by column: index_select on a plane is 4 times as fast as advanced indexing."""
    clip = torch.arange(len(ids), device=ids.device, dtype=torch.int32)[:, None, None, None]
    row = (ids + clip * s["surface"].shape[1]).flatten()
    column = s["surface"].flatten(0, 1).t().contiguous()                    # (9, b * 12)
    kind, tiles, shade = (column[i].index_select(0, row) for i in range(3))
    tiles = tiles * TILE
    tile_u = (u.flatten() * tiles).floor().int() % TILE
    tile_v = (v.flatten() * tiles).floor().int() % TILE
    textures = atlas(ids.device)[1].flatten()
    blend = textures.index_select(0, (kind.int() * TILE + tile_v) * TILE + tile_u)
    # One of the two colours of the surface, as its texture says, times the shading, times the light.
    gain = 1 + shade * v.flatten()
    video = torch.empty((*ids.shape, 3), dtype=torch.uint8, device=ids.device)
    for c in range(3):
        first = column[3 + c].index_select(0, row)
        second = column[6 + c].index_select(0, row)
        plane = (torch.lerp(first, second, blend) * gain).view(ids.shape)
        video[..., c] = (plane * s["light"][:, :, c, None, None]).clamp(0, 255)
    return video


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


def decode(path, frames, size, start=None, stride=None, threads=None, places=True, whole=False):
    """T frames of a video (or the one of a picture) as uint8 (T, size, size, 3), their times in seconds (T,) and the
    positions of these frames in the file, as a fraction in [0, 1).

    Without start: what is on screen in the middles of T equal parts of the whole video.  With start (a fraction of the room there
    is) and stride (in frames, shortened where the video is too short for it): T frames in a row from there.  By time stamps: at a
    variable rate a frame that stays is shown as often as its time says.  Each frame is converted straight to the size asked for,
    by swscale; the central square is kept.  A damaged, truncated or empty file is refused (BadVideo) if a frame that is asked for
    cannot be had as it was encoded, as far as decoder and container tell (a damaged MKV may lose frames without a word: the one before
    then seems to stay); so is one of fewer than T frames, and one that takes longer than FILE_SECONDS.

    threads: of the decoder, 0 as many as there are cores; default: 1 in a worker process, else 0.  places=False: the positions need
    not be exact to the frame, which saves reading a file through whose header does not count its frames.  whole: frames (T, h, w, 3), not
    cut, the short side `size`."""
    if threads is None:
        threads = 0 if torch.utils.data.get_worker_info() is None else 1
    return within(FILE_SECONDS, path, lambda late: _decode(path, frames, size, start, stride, threads, late, places, whole))


HAND = threading.local()                                         # of each thread that asks: the thread that decodes for it
STUCK = {}                                                       # file that was given up -> where its result would arrive


def decode_for_others(inbox):
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
        threading.Thread(target=decode_for_others, args=(HAND.inbox,), daemon=True).start()
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


def read_frames(path, size, whole=False):
    """Every frame of a video, in order: an iterator over uint8 (c, size, size, 3), c <= 8, cut as `decode` cuts; whole: (c, h, w, 3), not cut,
    the short side `size`. Memory does not grow with the video. A file that ends long before its header says, in a damaged part, or
    holds no frame: BadVideo."""
    held, count, upright = [], 0, framer(path, size, whole)
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        length = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        end = base = float((stream.start_time or 0) * stream.time_base)
        frames = container.decode(stream)
        # a film may be long: the time limit is for each of its frames
        while (frame := within(FILE_SECONDS, path, lambda late: next(frames, None))) is not None:
            held.append(upright(frame))
            count += 1
            end = max(frame.time if frame.time is not None else base + count / rate, end)
            if len(held) == 8:
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


def framer(path, size, whole=False):
    """-> a function: PyAV's frame -> uint8 (size, size, 3), the central square, upright; whole: (h, w, 3), all of it, its short side `size`.

    CHOICE: pixels that are not square are taken as they are stored, as most readers do, those of the tools that make masks among
    them: a mask lies on its pixels, whatever the header says of their shape.
    CHOICE: what is transparent is laid on white, as a page shows it: below it a file may hold any colour.
    One reformatter for all frames: a new one for each frame would work out the filter anew."""
    import av
    convert, most = av.video.reformatter.VideoReformatter().reformat, 4 if whole else 64

    def upright(frame):
        turns = round(getattr(frame, "rotation", 0) / 90) % 4    # phones write the picture lying and a rotation beside it
        h, w, top, left = fit(frame.height, frame.width, size)
        if max(h, w) > most * size:
            raise BadVideo(f"{path}: a frame of {frame.width} x {frame.height} px is too narrow: its sides may differ {most} times; crop it")
        if frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components):
            rgba = convert(frame, format="rgba").to_ndarray().astype(np.uint16)
            white = (rgba[..., :3] * rgba[..., 3:] + 255 * (255 - rgba[..., 3:]) + 127) // 255
            frame = av.VideoFrame.from_ndarray(white.astype(np.uint8), format="rgb24")
        image = convert(frame, width=w, height=h, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(image if whole else image[top:top + size, left:left + size], turns))
    return upright


def scan(container, stream):
    """The times of all frames in ticks, in order, and how many packets there are, with times or without: every packet is read, none decoded.
    The file was just opened, and is left at its beginning; but a JPEG cannot be read twice."""
    sizes, pts = 0, []
    for p in container.demux(stream):
        sizes += bool(p.size)
        if p.size and p.pts is not None and not p.is_discard:
            pts.append(p.pts)
    container.seek(0)
    return sorted(pts), sizes


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
        pts, total = scan(container, stream)
        if len(pts) > 1:
            return len(pts), (len(pts) - 1) / float((pts[-1] - pts[0]) * stream.time_base), True
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


def _decode(path, frames, size, start, stride, threads, late, exact, whole):
    square = framer(path, size, whole)
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
        counted = total == stream.frames and stream.average_rate == stream.base_rate         # the second: frames of equal length
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
    if exact and (not counted or abs(seen * rate - places).max() > 0.25):    # no count, or a variable rate: the list of all frames tells
        with opened(path) as container:
            (pts, _), tick = scan(container, container.streams.video[0]), float(container.streams.video[0].time_base)
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


def load_labels(mask_path, graph_path, where, size, video=None):
    """The sidecars -> int64 (T, size, size): the trajectory of each pixel of the frames at `where` (fractions of the video),
    -1 = none. mask: `arr_0` (F, H, W), object id of each pixel, 0 = none, any whole numbers.  graph: `tensor` (M, F): id of trajectory m
    in frame f, 0 = absent.  Cut to the same central square as `decode`, by nearest neighbour.

    An id that no trajectory owns is unlabelled, not refused: tools drop small or lost tracks from the graph alone. Refused is what
    cannot be right: an object that two trajectories claim; masks that share no id with the graph in any frame asked for; with
    `video`, its file: sidecars of another length or shape than it has (see `check_fit`)."""
    mask, graph, shape = cut_masks(mask_path, graph_path, size)
    if video is not None:
        check_fit(mask_path, shape, *video_header(str(video))[:3])
    labels, frames = np.empty((len(where), size, size), np.int64), (np.asarray(where) * len(mask) + 0.5).astype(int).clip(0, len(mask) - 1)
    for i, f in enumerate(frames):
        owner, column = np.argsort(graph[:, f], kind="stable"), np.sort(graph[:, f])         # trajectories by the id that they have here
        owner, column = owner[column > 0], column[column > 0]
        twice = np.flatnonzero(column[1:] == column[:-1])
        if len(twice):
            raise BadVideo(f"{graph_path}: trajectories {owner[twice[0]]} and {owner[twice[0] + 1]} both are object {column[twice[0]]} in frame {f}; "
                           "an object belongs to one trajectory")
        labels[i] = -1
        if len(column):
            at = np.searchsorted(column, mask[f]).clip(max=len(column) - 1)
            labels[i] = np.where(column[at] == mask[f], owner[at], -1)
    if (labels < 0).all() and strangers(*sidecars(mask_path, graph_path), frames):
        raise BadVideo(f"{mask_path}: shares no object id with {graph_path} in the frames read; do the two belong together?")
    return labels


def strangers(mask, graph, frames):
    """Has each of these frames masks and trajectories, and none of the latter is among the former?"""
    return all(graph[:, f].any() and mask[f].any() and not np.isin(graph[graph[:, f] > 0, f], mask[f]).any() for f in frames)


KEPT, KEPT_BYTES = collections.OrderedDict(), 2 ** 28            # the last masks that `cut_masks` made: 256 MB in a process


def cut_masks(mask_path, graph_path, size):
    """-> masks (F, size, size), the central square by nearest neighbour; graph (M, F); shape of the whole masks. Kept for the next time:
    to unpack 147 frames of 292 x 224 takes some 80 ms, and a clip needs eight of them."""
    key = (str(mask_path), str(graph_path), size, *(os.stat(p).st_mtime_ns for p in (mask_path, graph_path) if p and os.path.exists(p)))
    if key in KEPT:
        KEPT.move_to_end(key)
        return KEPT[key]
    mask, graph = sidecars(mask_path, graph_path)
    h, w, top, left = fit(*mask.shape[1:], size)
    rows = ((np.arange(size) + top + 0.5) * mask.shape[1] / h).astype(int)
    columns = ((np.arange(size) + left + 0.5) * mask.shape[2] / w).astype(int)
    KEPT[key] = np.ascontiguousarray(mask[:, rows[:, None], columns]), graph, mask.shape
    while len(KEPT) > 1 and sum(kept[0].nbytes for kept in KEPT.values()) > KEPT_BYTES:
        KEPT.popitem(last=False)
    return KEPT[key]


def sidecars(mask_path, graph_path):
    """-> mask (F, H, W) and graph (M, F) of whole numbers from 0 on, of their own types. Anything else: BadVideo, which names the file."""
    for one, other, kind in ((mask_path, graph_path, "graph"), (graph_path, mask_path, "mask")):
        if one and not other:
            raise BadVideo(f"{one}: its {kind} is missing; labels are two files, `<video>_mask.npz` and `<video>_graph.npz`: write both or remove both")
    arrays = []
    for path, key, axes, form in ((mask_path, "arr_0", 3, "(F, H, W)"), (graph_path, "tensor", 2, "(M, F)")):
        try:
            with np.load(path, allow_pickle=False) as file:
                x = file[key]
        except KeyError:
            raise BadVideo(f"{path}: holds no array `{key}`; masks are `arr_0` {form[:9]}, graphs are `tensor` (M, F)") from None
        except (OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, NotImplementedError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise BadVideo(f"{path}: its labels cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                           "write both sidecars again, or remove them") from None
        if x.dtype.kind not in "iub" or x.dtype.kind == "i" and x.size and x.min() < 0:
            raise BadVideo(f"{path}: labels of type {x.dtype}{' below 0' if x.dtype.kind == 'i' else ''}; they must be whole numbers from 0 on")
        if x.ndim != axes or not x.size and axes == 3:
            raise BadVideo(f"{path}: an array {x.shape}; it must be {form}, F at least 1")
        arrays.append(x.view(np.uint8) if x.dtype.kind == "b" else x)
    mask, graph = arrays
    if graph.shape[1] != len(mask):
        raise BadVideo(f"{mask_path}: masks {mask.shape} and graph {graph.shape} do not fit; they must be (F, H, W) and (M, F)")
    return mask, graph


@functools.lru_cache(maxsize=65536)
def video_header(path):
    """(frames, height, width, seconds) of a video as its header says: height and width as stored, frames as shown. Nothing is decoded, and
    each file is opened once."""
    with opened(path) as container:
        stream = container.streams.video[0]
        total, rate, _ = timeline(container, stream)
        return total, stream.height, stream.width, total / rate


def check_fit(path, shape, frames, height, width):
    """Masks (F, H, W) against their video's frames and shape. CHOICE: the length may differ by 2 frames or 5 %: headers round, and count
    frames at the ends of a stream that no decoder gives out. The size may differ, the shape by one pixel of the mask: labels may be coarser than
    pixels; a video may lie on its side (phones turn it when it is shown); and a square mask is the central square, which `decode` cuts."""
    count, h, w = shape
    if frames and abs(count - frames) > max(2, 0.05 * frames):
        raise BadVideo(f"{path}: masks of {count} frames, but the video has {frames}; write masks for every frame, or remove both sidecars")
    if h != w and min(abs(w - h * width / height), abs(w - h * height / width)) > max(1, w / h, 0.01 * w):
        raise BadVideo(f"{path}: masks of {w} x {h} px do not have the shape of the video's {width} x {height}; write them at its size, or scaled evenly")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Real video: manifests, folders, CSV files
# ---------------------------------------------------------------------------------------------------------------------

EXPECTED = 'a JSON list of {"video": path, "caption": text}'


def read_manifest(path):
    """A manifest (.json list, .jsonl), a folder root/<label>/*.mp4 or a `path,label` CSV -> list of dicts with `path`,
    `image` (bool) and, where known, caption (a text, or a list of texts that all fit), label, mask, graph, group, split (train, valid
    or test); from `data.py make` also appearance, motion (class ids) and qa; `talk` of a row in the form of LLaVA (`conversations`): turns of one
    talk. Paths are relative to the manifest. Wrong: BadInput, which names the line."""
    return [to_entry(row, where, folder, path) for row, where, folder in manifest_rows(path)]


def manifest_rows(path):
    """-> [(row, where, folder)]: rows as they stand in the file, "line 3" or "entry 2 (line 3)", and what paths are relative to."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"--data {path}: no such file or folder; give a manifest (.json, .jsonl), a CSV or a folder of videos")
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise BadInput(f"--data {path}: one film or picture, not a set of them; give its folder, or a manifest that names it")
    if path.is_dir():
        if (path / "manifest.json").exists():
            return manifest_rows(path / "manifest.json")
        files = [f for f in sorted(path.glob("**/*")) if f.suffix.lower() in VIDEO_SUFFIXES]
        if not files:
            raise BadInput(f"--data {path}: a folder without videos; expected {path}/<label>/*.mp4 or {path}/*.mp4")
        return [(dict(video=str(f.relative_to(path)), label=f.parent.name if f.parent != path else None), str(f.relative_to(path)), path) for f in files]
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} line {1 + raw[:error.start].count(10)}: not a manifest in UTF-8 (byte {raw[error.start]:#04x}); save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    read = csv_rows if path.suffix == ".csv" else list_rows if text.lstrip().startswith("[") else line_rows
    rows = [(row, where, path.parent) for row, where in read(text, path)]
    if not rows:
        raise BadInput(f"{path}: an empty manifest; expected {EXPECTED}")
    return rows


def csv_rows(text, path):
    """Kinetics writes `path,label`, Something-Something and V-JEPA write `path label`; a header is optional, and tells more columns."""
    header = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            cells = next(csv.reader([line], delimiter="," if "," in line else " ", strict=True))
        except csv.Error as error:
            raise BadInput(f"{path} line {number}: {line[:80]!r} is not `path,label` ({error})") from None
        if header is None:                                       # of the first line
            header = [cell.strip().lower() for cell in cells]
            if {"path", "video"} & set(header) and len(header) > 1:
                header = ["video" if cell == "path" else cell for cell in header]
                if not {"label", "caption"} & set(header):       # whatever it is called: the second column is the label
                    header[1] = "label"
                continue
            header = ()
        if len(cells) < 2 or not header and len(cells) > 2 or header and len(cells) > len(header):
            raise BadInput(f"{path} line {number}: {line[:80]!r} is not `path,label` (or `path,caption`, under a header that says so); "
                           "quote a path that holds the separator")
        columns = dict(zip(header or ("video", "label"), cells))
        yield {k: v for k, v in columns.items() if k in ("video", "label", "caption") or k in ("mask", "graph", "group", "split") and v}, f"line {number}"


def line_rows(text, path):
    for number, line in enumerate(text.split("\n"), 1):          # not splitlines: a JSON text may hold other line separators
        try:
            if line.strip():
                yield json.loads(line), f"line {number}"
        except ValueError as error:
            raise BadInput(f"{path} line {number}: not a manifest ({getattr(error, 'msg', error)}); expected {EXPECTED}, or an object a line") from None


def list_rows(text, path):
    """The items of a JSON list, one after the other: so each knows its line."""
    decoder, at, line, counted, number = json.JSONDecoder(), text.index("[") + 1, 1, 0, 0
    space = re.compile(r"[ \t\r\n]*")

    def here():
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), at
        return line

    def refuse(message):
        raise BadInput(f"{path} line {here()}: not a manifest ({message}); expected {EXPECTED}")
    at = space.match(text, at).end()
    while text[at:at + 1] != "]" or number:                      # "[]" is whole; "[1,]" is not
        number += 1
        try:
            row, end = decoder.raw_decode(text, at)
        except ValueError as error:
            at = getattr(error, "pos", at)
            refuse(getattr(error, "msg", error))
        yield row, f"entry {number} (line {here()})"
        at = space.match(text, end).end()
        if text[at:at + 1] == "]":
            break
        if text[at:at + 1] != ",":
            refuse(f"a comma or ] is missing after entry {number}")
        at = space.match(text, at + 1).end()
    at = space.match(text, at + 1).end()
    if at != len(text):
        refuse("there is more after the list's end")


def to_entry(row, where, folder, path):
    """A manifest's row -> an entry; what is wrong with it: BadInput, which names the place, the value and what to write instead."""
    def refuse(message):
        raise BadInput(f"{path} {where}: {message}")

    def is_text(x):                                              # a lone half of a surrogate pair cannot be written as UTF-8
        return isinstance(x, str) and bool(x.strip()) and not re.search("[\ud800-\udfff\0]", x)

    def is_class(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0
    def is_talk(x):
        turns = ("human", "gpt") * (len(x) // 2) if isinstance(x, list) else ()
        return bool(turns) and len(turns) == len(x) and all(isinstance(t, dict) and t.get("from") == who and is_text(t.get("value")) for t, who in zip(x, turns))
    source = (row.get("video") or row.get("image")) if isinstance(row, dict) else None
    if not isinstance(source, str):
        refuse(f'{json.dumps(row)[:80]} names neither "video" nor "image"; write {{"video": path}}')
    kinds = dict(video=(is_text, "a path"), image=(is_text, "a path"), mask=(is_text, "a path"), graph=(is_text, "a path"),
                 caption=(lambda x: is_text(x) or isinstance(x, list) and bool(x) and all(map(is_text, x)), "a text, or a list of texts, none empty, in UTF-8"),
                 label=(lambda x: is_text(x) or isinstance(x, int) and not isinstance(x, bool), "a name or a whole number"),
                 group=(lambda x: is_text(x) or isinstance(x, int) and not isinstance(x, bool), "a name or a whole number"),
                 split=(lambda x: x in ("train", "valid", "val", "test"), '"train", "valid" or "test"'),
                 appearance=(is_class, "a class id, 0 or more"), motion=(is_class, "a class id, 0 or more"),
                 qa=(lambda x: isinstance(x, list) and all(isinstance(q, dict) and is_text(q.get("question")) and is_text(q.get("answer")) for q in x),
                     'a list of {"question": text, "answer": text}'),
                 conversations=(is_talk, '[{"from": "human", "value": question}, {"from": "gpt", "value": answer}, ...], the two in turn'))
    for key, (fits, form) in kinds.items():
        if row.get(key) is not None and not fits(row[key]):
            refuse(f'"{key}" is {json.dumps(row[key])[:60]}; give {form}, or leave it out')
    file = folder / source
    entry = dict(path=str(file), image=not row.get("video") or file.suffix.lower() in IMAGE_SUFFIXES,
                 caption=row.get("caption"), label=None if row.get("label") is None else str(row["label"]))
    for key in ("mask", "graph"):
        given, beside = row.get(key), file.with_name(f"{file.stem}_{key}.npz")
        entry[key] = str(folder / given) if given else str(beside) if beside.exists() else None
    entry |= {"group": str(row["group"])} if row.get("group") is not None else {}                  # a person, a scene: probes keep them apart
    if row.get("conversations"):                                 # LLaVA's form: one talk, each turn after those before it; the mark says where the video stands: first
        turns = [t | dict(value=re.sub(r"\s*<(?:video|image)>\s*", "", t["value"]) if t["from"] == "human" else t["value"]) for t in row["conversations"]]
        if empty := [t for t in turns if not t["value"]]:
            refuse(f'"conversations" holds a turn of "{empty[0]["from"]}" without a question; write one beside <video>')
        entry["talk"] = [dict(question=q["value"], answer=g["value"]) | {k: q[k] for k in ("type", "options") if k in q} for q, g in zip(turns[::2], turns[1::2])]
    entry |= {"split": row["split"].replace("valid", "val").replace("val", "valid")} if row.get("split") is not None else {}
    return entry | {key: row[key] for key in ("appearance", "motion", "qa") if row.get(key) is not None}


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

WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"            # Python's re and tiktoken read it alike
# The split of GPT-2, as in tiktoken_ext/openai_public.py.
GPT_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"


class Composing(tiktoken.Encoding):
    """For tokenizers that were trained on composed text: NFC makes an e and its accent one character."""

    def encode_ordinary(self, text):
        return super().encode_ordinary(unicodedata.normalize("NFC", text))


def word_list(texts, most=16_000, pattern=WORDS):
    """The most frequent words of some texts, each with the blank before it: a list of str, ties by
    alphabet."""
    counts = collections.Counter()
    for text in texts:
        counts.update(re.findall(pattern, text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def word_encoding(words, pattern=WORDS, special=(END,)):
    """256 bytes and these words -> a tiktoken Encoding with the special tokens after them. CHOICE: no
    byte-pair encoding is learnt. tiktoken looks a whole word up before it merges anything, so a list of
    words is a vocabulary: a word of the list is one token, any other text falls back to its bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    tokens = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks, special_tokens=tokens)


@functools.lru_cache(maxsize=None)
def load_encoding(name="world"):
    """A tiktoken Encoding. name: "world", the words of made captions; a name that tiktoken knows; a folder
    with a published byte-level tokenizer.json, or such a file. A text is closed by `eot_token`, its
    <|endoftext|>."""
    if name == "world":
        chains = World(frames=64, acts=8)
        captions = [script(i)["caption"] for i in range(500)]
        return word_encoding(word_list(captions + [script(i, chains)["caption"] for i in range(50)]))
    if Path(name).exists():
        return published_encoding(Path(name))
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(f"--text {name}: no folder, no `world`, and none of tiktoken's {known}") from None
    except OSError:                                             # those of the network among them
        raise BadInput(f"--text {name}: cannot be fetched; put it into TIKTOKEN_CACHE_DIR") from None


def published_encoding(path):
    """The byte-level BPE of a tokenizer.json, of the kinds of GPT-2 and Qwen. tiktoken merges by rank:
    ranks are ids."""
    path = path / "tokenizer.json" if path.is_dir() else path
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # the byte map of these files: printable bytes stand for themselves, the others for characters 256, 257,
    # ...
    hidden = [i for i in range(256) if i not in printable]
    byte = {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(hidden)}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        splits, composed = spec["pre_tokenizer"], spec.get("normalizer")
        splits, vocabulary = splits.get("pretokenizers", [splits]), spec["model"]["vocab"]
        steps = [split["type"] for split in splits]
        odd = steps not in (["ByteLevel"], ["Split", "ByteLevel"]) or composed not in (None, {"type": "NFC"})
        if odd or splits[0].get("behavior") not in (None, "Isolated") or splits[-1].get("add_prefix_space"):
            raise ValueError(f"not the steps of GPT-2 or Qwen: {composed} {splits}")
        pattern = splits[0]["pattern"]["Regex"] if len(splits) == 2 else GPT_WORDS
        special = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
        ranks = {bytes(byte[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        merged = [vocabulary["".join(merge).replace(" ", "")] for merge in spec["model"]["merges"]]
        if merged != sorted(merged) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("it is not byte-level, or its merges are not in the order of their ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}: not a published byte-level tokenizer ({reason})") from None
    special.setdefault(END, max([*ranks.values(), *special.values()]) + 1)
    kind = Composing if composed else tiktoken.Encoding
    return kind(path.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tokenize(encoding, texts, length):
    """Texts -> ids int64 (b, length), closed by the end token (which is never cut off) and filled up with
    it, and mask (b, length), True = a real token (the end token included)."""
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
                    appearance=torch.tensor([s["appearance"] for s in scripts]), colour=torch.tensor([s["colour"] for s in scripts]),
                    motion=torch.tensor([s["motion"] for s in scripts]), qa=[s["qa"] for s in scripts], index=[s["index"] for s in scripts])


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
                if entry["mask"] or entry["graph"]:
                    label = load_labels(entry["mask"], entry["graph"], where, self.size, entry["path"])
            except BadVideo as error:
                bad.append((entry["path"], str(error)))
                continue
            videos.append(torch.from_numpy(video))
            labels.append(torch.from_numpy(label))
            kept.append(j)
        return dict(video=torch.stack(videos) if videos else None, labels=torch.stack(labels) if videos else None, bad=bad,
                    index=kept, **self.captions(i, kept), label=[self.entries[j]["label"] for j in kept],
                    **made_keys([self.entries[j] for j in kept]))

    def captions(self, i, kept):
        """Of several captions of a clip one, drawn from (seed, batch, entry); where nothing is drawn the first, and `captions` holds them all."""
        texts = [e if isinstance(e, list) else [e] for e in (self.entries[j]["caption"] for j in kept)]
        if not self.train:
            return dict(caption=[t[0] for t in texts], captions=texts)
        return dict(caption=[t[0] if len(t) == 1 else t[np.random.default_rng((self.seed, 3, i, j)).integers(len(t))] for j, t in zip(kept, texts)])


def made_keys(entries):
    """appearance and motion (b,) and qa, b lists, of a batch of made clips: only where all of them have it."""
    kept = {key: [e[key] for e in entries] for key in ("appearance", "motion", "qa") if entries and all(key in e for e in entries)}
    return {key: x if key == "qa" else torch.tensor(x) for key, x in kept.items()}


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
    story: bool = False                 # clips to ask about what happens when, of 8 frames to any number (train_vlm.py)
    seed: int = 0                       # the clips that a training of this seed sees first
    begin: int | None = None            # or: the index of the first clip (held-out clips begin at 1150000000)
    fps: float = 8.0                    # frames a second
    workers: int | None = None          # processes; 0: none but this one; default: one for each core
    overwrite: bool = False             # make clips anew that are there

    def __post_init__(self):
        if not self.out:
            raise BadInput(f"--out {self.out!r}: give the name of a folder")
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
        return World(self.image_size, self.frames, self.max_objects, self.shared_colours, self.acts, self.camera, self.light, self.story)

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
    settings |= dict(first=cfg.first, words_crc=zlib.crc32(repr(words).encode()))
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
        videos, labels = rasterise(stack([scripts[i] for i in missing]), cfg.image_size)
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


# ---------------------------------------------------------------------------------------------------------------------
# python data.py check
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CheckConfig:
    """Opens every entry of a manifest, folder or CSV, and names what a training would stumble over. Exit code 0: nothing, 1: something."""
    manifest: str = ""                  # a manifest (.json, .jsonl), a CSV or a folder
    frames: int = 8                     # frames of a clip: so many places of each video are decoded; a shorter video is a problem
    image_size: int = 64                # pixels of a side that frames are decoded to
    workers: int | None = None          # processes; 0: none but this one; default: one for each core

    def __post_init__(self):
        for name, least in (("frames", 1), ("image_size", 8), ("workers", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")


def check(argv):
    """Prints each problem with its line, then a table. Raises SystemExit(1) if there is a problem."""
    cfg = configure(CheckConfig, None, argv, positional="manifest")
    rows, problems, jobs, found = manifest_rows(cfg.manifest), [], [], []
    for number, (row, where, folder) in enumerate(rows):
        try:
            jobs.append((cfg, number, to_entry(row, where, folder, cfg.manifest)))
        except BadInput as error:
            problems.append((number, "entry", str(error)))
    with tqdm(total=len(jobs), desc=f"{cfg.manifest}", unit=" files", disable=None) as bar:
        for (_, number, entry), result in in_processes(inspect_entry, jobs, min(cores() if cfg.workers is None else cfg.workers, len(jobs))):
            found.append((entry, result))
            problems += [(number, kind, f"{cfg.manifest} {rows[number][1]}: {text}") for kind, text in result["wrong"]]
            bar.update()
    for _, _, text in sorted(problems):
        print(text)
    summary(len(rows), found, problems)
    if problems:
        raise SystemExit(1)


def inspect_entry(job):
    """One entry, opened as a training opens it -> dict(seconds, bytes, shape (H, W) or None, wrong: [(kind of problem, what and how to mend it)],
    strangers: has the mask ids that no trajectory owns?)."""
    cfg, _, entry = job
    path, wrong, where, result = entry["path"], [], None, dict(seconds=0.0, bytes=0, shape=None, strangers=False)
    if not os.path.exists(path):
        hint = "write / for \\ in paths" if "\\" in path else "paths are relative to the manifest"
        return result | dict(wrong=[("no such file", f"{path}: no such file; {hint}")])
    try:
        total, height, width, seconds = video_header(path)
        result |= dict(seconds=0.0 if entry["image"] else seconds, bytes=os.path.getsize(path), shape=(height, width))
        if not entry["image"] and 0 < total < cfg.frames:
            wrong.append(("too short", f"{path}: has {total} frames, fewer than the {cfg.frames} of a clip; give --frames {total} or less, or leave it out"))
        where = decode(path, 1 if entry["image"] else min(cfg.frames, total or cfg.frames), cfg.image_size)[2]
    except BadVideo as error:
        wrong.append(("cannot be decoded", str(error)))
    if entry["mask"] or entry["graph"]:
        try:
            mask, graph = sidecars(entry["mask"], entry["graph"])
            load_labels(entry["mask"], entry["graph"], np.arange(len(mask)) / len(mask), 16, path if where is not None else None)        # every frame
            if graph.any() and not np.isin(graph[graph > 0], mask).any():
                wrong.append(("labels", f"{entry['mask']}: shares no object id with {entry['graph']}; do the two belong together?"))
            result["strangers"] = not np.isin(mask[mask > 0], graph).all()
        except BadVideo as error:
            wrong.append(("labels", str(error)))
    return result | dict(wrong=wrong)


def summary(count, found, problems):
    """The table at the end of `check`."""
    entries, results = [e for e, _ in found], [r for _, r in found]
    shapes = collections.Counter(r["shape"] for r in results if r["shape"]).most_common()
    seconds, size = sum(r["seconds"] for r in results), sum(r["bytes"] for r in results)
    texts = [1 if isinstance(e["caption"], str) else len(e["caption"]) for e in entries if e["caption"]]
    lines = [("entries", count), ("videos", sum(not e["image"] for e in entries)), ("pictures", sum(e["image"] for e in entries)),
             ("labelled", sum(bool(e["mask"] and e["graph"]) for e in entries)),
             ("captioned", f"{len(texts)}" + (f" ({sum(texts)} captions)" if sum(texts) > len(texts) else "")),
             ("with a class", f"{sum(e['label'] is not None for e in entries)} ({len({e['label'] for e in entries} - {None})} classes)"),
             ("duration", f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{seconds % 60:04.1f}"), ("size", f"{size / 1e6:.1f} MB"),
             ("frames", ", ".join(f"{w} x {h} ({n})" for (h, w), n in shapes[:4]) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else ""))]
    if any(r["strangers"] for r in results):
        lines.append(("unlabelled ids", f"{sum(r['strangers'] for r in results)} masks hold objects that no trajectory owns: left unlabelled"))
    lines.append(("problems", len(problems)))
    lines += [(f"  {kind}", n) for kind, n in collections.Counter(kind for _, kind, _ in problems).most_common()]
    for name, value in lines:
        print(f"{name:20s} {value}")


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
