"""Videos in: the procedural world, real video, manifests, text, batches, labels.

Everything that is trained on comes through this file, in one form whatever its source:

    video     uint8 (b, t, H, W, 3)     as decoded; normalised later, on the device, inside the model
    labels    int64 (b, t, H, W)        the trajectory of each pixel, -1 = unlabelled
    caption   list of b texts; `captions`: all texts of each clip; `label`: names of classes, or None

1. The procedural world.  `script(i)` writes a scene as a few small arrays, with its caption, classes and
   questions; `rasterise` turns a batch of scripts into pixels and exact labels, on any device. Clip i is the
   same clip on every machine.
2. Real video.  `decode` reads T frames with PyAV, by seeking, straight to the size asked for; `load_labels`
   reads the masks that stand beside a video.
3. Manifests.  `read_manifest` takes the JSON files, CSV files and folders that people have; `split` holds
   out a part.
4. Text.  tiktoken encodings: words of captions, a tiktoken name, or a published tokenizer.json.
5. Batches.  `open_data` is what a training calls. Batch i is a pure function of (seed, i), so a run's place
   in its data is one number. Files that cannot be used are named, counted and replaced.
6. Labels for video that has no masks.

    python data.py make --clips 1000 --out out/world    # made clips as files, with a manifest
    python data.py label videos/                        # `_mask.npz` and `_graph.npz` beside each video
    python data.py check videos/manifest.json           # names every file that cannot be used
"""
from __future__ import annotations

import argparse
import collections
import colorsys
import concurrent.futures
import contextlib
import csv
import fractions
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm


class BadInput(ValueError):
    """What a person typed or pointed to is wrong. The message is one line: the value and the mend."""


class BadVideo(BadInput):
    """One file cannot be used. Training replaces it by another, evaluation leaves it out; a command that was
    given this one file stops."""


def one_line_errors(main):
    """Wrap a script's main: BadInput, or too little memory on a GPU, prints one line on stderr and exits with
    code 2. Any other exception is a bug of ours, and its traceback is what we want to see."""
    @functools.wraps(main)
    def wrapped(argv=None):
        # File names may hold characters that the terminal cannot show: they are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            mend = "lower --batch, or where --help lists it --micro-batch, or give --recompute"
            print(f"error: {reason}: {mend}", file=sys.stderr)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    return wrapped


# -----------------------------------------------------------------------------------------------------------
# 0. What every command shares: flags from a dataclass; files, pictures and films
# -----------------------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error: here it is one line, as everywhere."""

    def error(self, message):
        raise BadInput(f"{message}; --help lists the flags")


def configure(config, sizes, argv, positional=None):
    """A frozen dataclass -> an instance of it, from the command line. Each field is a flag, and the comment
    behind it is its help; `positional` names a field that is given without a flag.
    Defaults < sizes[--size] < flags. sizes: {name: dict of values}, or None for a command without sizes."""
    values = {field.name: field.default for field in fields(config)}
    if sizes is not None:
        # The size first: the other defaults, which --help shows, depend on it.
        parser = OneLineParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--size", choices=sizes, default=next(iter(sizes)))
        size = parser.parse_known_args(argv)[0].size
        values |= sizes[size] | dict(size=size)
    # Python does not keep comments: they are read from the source of the class and of those it is derived
    # from. __mro__ ends with `object`; backwards, a derived class's comment replaces that of its base.
    source = "".join(inspect.getsource(one) for one in config.__mro__[-2::-1])
    helps = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", source, re.M))
    parser = OneLineParser(description=config.__doc__.splitlines()[0], allow_abbrev=False)
    for field in fields(config):
        flag = "--" + field.name.replace("_", "-")
        default = values[field.name]
        text = f"{helps.get(field.name, '')} (default: {default})".replace("%", "%%")
        # `from __future__ import annotations` makes them texts, such as "int | None"
        kind = {"int": int, "float": float, "str": str, "bool": bool}[field.type.split(" |")[0]]
        if field.name == positional:
            parser.add_argument(positional, type=kind, help=helps.get(positional))
        elif kind is bool:
            parser.add_argument(flag, default=default, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, default=default, type=kind, metavar=kind.__name__, help=text)
    return config(**vars(parser.parse_args(argv)))


def dispatch(script, doc, commands, argv):
    """`python SCRIPT COMMAND flags ...` -> commands[COMMAND](flags). --help alone prints the docstring."""
    argv = sys.argv[1:] if argv is None else argv
    # "Raw" keeps the docstring's lines as they are
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=script, description=doc, formatter_class=raw)
    parser.add_argument("command", choices=commands, metavar="|".join(commands))
    commands[parser.parse_args(argv[:1]).command](argv[1:])


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as beside`: what is written to `beside` is renamed to `path` at the end. There is
    always the old file or the new one, never half of one, even after a kill. The folder is made."""
    path = Path(path)
    # numpy and PyAV choose the format by a file's suffix, so the suffix stays as it is
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        # The bytes must be on disk before the file gets its name: else a power cut could leave it empty.
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path}: cannot be written ({reason}); give another --out, or make room") from None
    finally:
        if beside.exists():
            beside.unlink()


def write_json(path, value):
    """A value -> a JSON file that a person can read."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def write_npz(path, key, array):
    """One array -> a compressed .npz file that holds it as `key`."""
    with replacing(path) as beside:
        np.savez_compressed(beside, **{key: array})


def write_png(path, image):
    """uint8 (H, W, 3) -> a PNG file. zlib is enough for it: a training on made clips needs no PyAV."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    h, w, _ = image.shape
    # 8 bits of each channel, colour type 2 = RGB
    header = w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    # each row begins with its filter, 0 = none
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    with replacing(path) as beside:
        beside.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@contextlib.contextmanager
def film(path, rate, exact=False):
    """`with film(path, rate) as add`: add(frames uint8 (t, H, W, 3), H and W even) as often as one likes ->
    an H.264 file that every player opens. exact, for training: nothing is lost but the rounding of RGB to
    YUV, so no pixel is more than 2 of 255 off; browsers do not play it."""
    import av
    # H.264 wants a fraction: 29.97 frames a second are 30000 / 1001
    rate = fractions.Fraction(max(rate, 1.0)).limit_denominator(1001)
    pixels = "yuv444p" if exact else "yuv420p"
    options = {"crf": "0" if exact else "18"}
    with replacing(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options, pix_fmt=pixels)

        def add(frames):
            # the first frames give the size
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(frame))
        yield add
        container.mux(stream.encode())


def palette(count):
    """`count` colours (count, 3), neighbours far apart: hues by the golden ratio, three brightnesses."""
    brightness = (0.95, 0.75, 0.55)
    colours = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, brightness[i % 3]) for i in range(count)]
    return (255 * np.array(colours)).round().astype(np.uint8)


def paint(video, ids, colours):
    """Frames uint8 (t, H, W, 3) under coloured trajectories ids (t, H, W), -1 = none: the frame's light, the
    trajectory's colour."""
    grey = video.astype(np.float32).mean(-1, keepdims=True)
    # id -1 reads the last colour; the next line replaces it
    painted = 0.75 * colours[ids] + 0.35 * (grey - 64)
    painted = np.where(ids[..., None] >= 0, painted, grey)
    return painted.clip(0, 255).astype(np.uint8)


def cores():
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: what there is
# -----------------------------------------------------------------------------------------------------------
# A clip of the world shows a subject that does something, up to seven other things, a ground, and a camera
# and a light that may change. Real video with captions and exact masks is scarce; here all three come from
# one script, without end, and every class is known. Colours, shapes and motions are drawn independently of
# each other, but for one colour that each shape lacks: a probe for one cannot be answered by another.

SEED = 20260222
SHAPES = tuple("circle square triangle star cross ring heart moon arrow hourglass".split())
COLOURS = {
    "red": "#dc2828", "orange": "#f58c19", "yellow": "#f5e132", "green": "#2da53c",
    "cyan": "#3cd7e1", "blue": "#2d50e1", "purple": "#8232af", "pink": "#fa82be",
    "white": "#f8f8f8", "black": "#16161a"}
# Grounds are muted; objects are saturated, white or black, so no object can vanish on its ground.
GROUNDS = {
    "sand": "#cdb482", "grass": "#5c804e", "water": "#628aaa", "snow": "#d0d8e2",
    "brick": "#965c4e", "stone": "#808084", "earth": "#624c3a", "tiles": "#aaaa96"}
# the ground of a plain world
DARK = "#404048"
# labels: 0 is the ground, 1..8 objects
MAX_OBJECTS, MAX_GROUNDS = 8, 1

# The mean radius of the subject, as a fraction of the frame. Where there are more than three objects, all of
# them are smaller.
RADIUS = (0.185, 0.255)
# Growing and shrinking change the subject's radius by the factor GROWTH, from sqrt(1 / GROWTH) to
# sqrt(GROWTH) times its mean or back. The others have a SHARE of the mean, so that "the largest object" is
# the subject at every moment: 0.53 * sqrt(1.7) = 0.69 of its radius at most.
GROWTH = 1.7
SHARE = (0.43, 0.53)
# The number of objects in a clip is drawn from this list, in which some numbers stand more often than others.
COUNTS = (1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 8)
# Centres stay inside this box.
LOW, HIGH = 0.12, 0.88

# Clips are numbered. A training starts at TRAIN or at most 5 · 10^8 clips later (`made_clips`), and would
# need as many again to reach VALIDATION.
TRAIN, VALIDATION, TEST, HELDOUT = 0, 1_000_000_000, 1_150_000_000, 1_200_000_000

# An act is a motion program and a way, such as ("orbit", "clockwise"). The program is the motion class that
# probes ask for; the way is told by captions alone. y grows downwards, as in every image.
MOTIONS = tuple("straight bounce orbit spin grow shrink approach follow collide behind front".split())
# The first six programs need no companion.
SOLO = MOTIONS[:6]
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TURNS = {"clockwise": 1, "anticlockwise": -1}
AXES = {"sideways": (1, 0), "upright": (0, 1)}
# The ways of each program; most programs have one way only, without a name.
WAYS = dict.fromkeys(MOTIONS, ("",)) | {
    "straight": tuple(DIRECTIONS), "bounce": tuple(AXES), "orbit": tuple(TURNS), "spin": tuple(TURNS)}
# What a camera and a light may do: how much the logarithm of the zoom, or of the brightness, changes in the
# course of the clip.
ZOOMS = {"in": 0.35, "out": -0.35}
LIGHTS = {"lighter": 0.6, "darker": -0.6}
# In a chain the subject does one deed after another. Each is an infinitive, as questions use it; its third
# person is made by `third`.
DEEDS = {
    "dart left": ("straight", "left"), "dart right": ("straight", "right"), "rise": ("straight", "up"),
    "sink": ("straight", "down"), "circle": ("orbit", "clockwise"), "spin": ("spin", "clockwise"),
    "swell": ("grow", ""), "shrink": ("shrink", "")}
# In a chain the other objects come and go: role -> when they go and when they come (back), as ranges in
# fractions of the clip. Times outside of 0 .. 1 are before or after all that is seen.
ROLES = {
    "stays": ((9, 9), (9, 9)), "comes": ((-9, -9), (0.3, 0.8)),
    "leaves": ((0.15, 0.75), (9, 9)), "returns": ((0.12, 0.35), (0.55, 0.8))}
# What a word becomes when the clip runs backwards. Captions and classes of reversed clips are made with it.
OPPOSITE = {
    "left": "right", "up": "down", "clockwise": "anticlockwise", "grow": "shrink", "in": "out",
    "lighter": "darker", "approach": "leave", "follow": "lead"}
OPPOSITE |= {opposite: word for word, opposite in OPPOSITE.items()}


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
    story: bool = False             # clips of one act are chains, too
    words: str = "all"              # captions tell: all, or deeds (shapes and deeds alone)
    plain: bool = False             # one dark ground without a pattern
    reverse: bool = False           # the same clips backwards, with the captions of what is then seen

    def __post_init__(self):
        # An act needs four frames to be seen.
        most = max(1, self.frames // 4)
        limits = dict(size=(8, 4096), frames=(1, 10 ** 6), max_objects=(1, MAX_OBJECTS), acts=(1, most))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"{name} {getattr(self, name)}: give {low} to {high}")
        assert self.words in ("all", "deeds"), self.words
        # Most acts of a chain go forth and back, and look the same when they are reversed.
        assert not (self.reverse and self.chain), "only clips of one act can be reversed"

    @property
    def chain(self):
        return self.story or self.acts > 1


# A setting in which little is shown and captions tell shapes and deeds alone, so that colours and grounds do
# not win the retrieval. The full world is closer to real video, where they do.
STAGE = World(size=32, max_objects=2, camera=False, light=False, words="deeds", plain=True)
WORLDS = {"full": World(), "stage": STAGE}


def held_out_colour(shape):
    """The colour that this shape never has in training, validation and test. In the HELDOUT range the subject
    always has it: accuracy there measures composition, not memory. 3 and the 10 colours have no common
    divisor, so each of the 10 shapes lacks another colour."""
    return (7 - 3 * shape) % len(COLOURS)


def pick(rng, options):
    """One of a list or tuple. (rng.choice would make a numpy array of it.)"""
    return options[rng.integers(len(options))]


def shuffled(rng, options):
    """A list in another order."""
    return [options[i] for i in rng.permutation(len(options))]


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: motion
# -----------------------------------------------------------------------------------------------------------
# A probe of the motion class should need motion. It never quite does: a thing that stands beside another
# may have come there, and where radii vary something grows or shrinks. `known_controls` measures how much
# single frames and statistics without order give away; its result stands beside train_clip.py's probe.

def choose_acts(rng, world, count):
    """-> act, deeds and hero, see `script`. Two equal deeds never follow each other: they would look like
    one. The hero is the deed that questions count: whether it occurs 1, 2 or 3 times is equally likely."""
    if not world.chain:
        program = pick(rng, MOTIONS if count > 1 else SOLO)
        return dict(act=(program, pick(rng, WAYS[program])), deeds=[], hero="")
    hero = pick(rng, list(DEEDS))
    times = 1 + rng.integers(min(3, (world.acts + 1) // 2))
    # Places with a gap after each: choose among fewer places, then put the gaps in.
    places = np.sort(rng.permutation(world.acts - times + 1)[:times]) + np.arange(times)
    deeds = []
    for i in range(world.acts):
        others = [deed for deed in DEEDS if deed != hero and deed not in deeds[-1:]]
        deeds.append(hero if i in places else pick(rng, others))
    return dict(act=DEEDS[deeds[0]], deeds=deeds, hero=hero)


def perform(rng, act, s, me, other=None, reach=1):
    """One act -> the paths (T, 4) of the subject and of its companion. me, other: the states (x, y, radius,
    angle) in which they begin; s (T,): how much of the act is done in each frame; reach multiplies how far
    the subject goes."""
    program, way = act
    far = reach * rng.uniform(0.3, 0.5)
    phase = rng.uniform(0, 2 * math.pi)
    other = me if other is None else other
    x, y = other[:2] - me[:2]
    distance = max(math.hypot(x, y), 1e-6)
    touching = 0.95 * (me[2] + other[2])
    # how far the subject has come along a line
    along = {
        "straight": far * s,
        # a triangle wave: forth, back and forth again; the sign says to which side first
        "bounce": far * (1 - np.abs(1 - 3 * s % 2)) * math.copysign(1, phase - math.pi),
        # up to the companion, and a rest beside it
        "approach": (distance - touching * (1 + 0.025 * phase)) * np.minimum(s / 0.6, 1),
        # both go the same way, the companion ahead
        "follow": 0.6 * far * s,
        # both meet half-way and spring back
        "collide": (distance - touching) / 2 * (1 - np.abs(1 - 2 * s)),
        # through the companion's place, behind it or in front of it, and out on its far side
        "behind": 2 * distance * s,
        "front": 2 * distance * s}
    # the line leads where `way` says, or else to the companion
    direction = (DIRECTIONS | AXES).get(way, (x / distance, y / distance))
    line = np.outer(along.get(program, 0 * s), direction)           # (T, 2)
    if program == "orbit":
        # once round a circle through the place where it begins
        angle = phase + TURNS[way] * 2 * math.pi * s
        line[:, 0] = 0.44 * far * (np.cos(angle) - math.cos(phase))
        line[:, 1] = 0.44 * far * (np.sin(angle) - math.sin(phase))
    mine = np.full((len(s), 4), me)
    mine[:, :2] += line
    if program == "spin":
        # 3 to 5 radians, in a chain a tenth more. Where an act has 8 frames that is at most 41 degrees a
        # frame: from 45 on a square would seem to turn backwards.
        mine[:, 3] += TURNS[way] * 10 * far * s
    mine[:, 2] *= GROWTH ** {"grow": s, "shrink": -s}.get(program, 0)
    theirs = np.full((len(s), 4), other)
    theirs[:, :2] += {"follow": 1, "collide": -1}.get(program, 0) * line
    return mine, theirs


def inside(paths):
    """Do all places of (..., 4) lie in the box?"""
    places = paths[..., :2]
    return LOW <= places.min() and places.max() <= HIGH


def beside(rng, state, other, close=True):
    """A random place (2,) for `other` beside `state`: half of the time touching or nearly so, if `close` is
    allowed, else farther away."""
    away = rng.uniform(0.9, 1.1) * (state[2] + other[2])
    if not close or rng.random() < 0.5:
        away += rng.uniform(0.2, 0.45)
    angle = rng.uniform(0, 2 * math.pi)
    return state[:2] + away * np.array((math.cos(angle), math.sin(angle)))


def stage_act(rng, world, states, scene):
    """-> paths (count, T, 4) of a clip of one act; no visits. Places are drawn until each path fits into the
    box."""
    program, _ = scene["act"]
    s = np.linspace(0, 1, world.frames)
    # Every subject may have the sizes at which growing and shrinking begin and end: else a size would give
    # these two programs away.
    # `size` is the logarithm of the first radius over the mean one, in halves of log(GROWTH).
    size = pick(rng, (-1.0, 1.0, rng.uniform(-1, 1)))
    size = {"grow": -1.0, "shrink": 1.0}.get(program, size)
    states[0, 2] *= GROWTH ** (size / 2)
    movers = 1 if program in SOLO else 2
    # infinite places are not in the box: nothing has its place yet
    paths = np.full((len(states), world.frames, 4), np.inf)
    while not inside(paths[:movers]):
        states[0, :2] = rng.uniform(LOW, HIGH, 2)
        if movers == 2:
            close = program not in ("approach", "collide")
            states[1, :2] = beside(rng, states[0], states[1], close)
        paths[:movers] = perform(rng, scene["act"], s, *states[:2])[:movers]
    # All others stand where a companion could: beside the first or the last place of something. From the
    # third object on half of them move, too, by the first four programs, which do not change their size.
    for j in range(movers, len(states)):
        while not inside(paths[j]):
            neighbour = paths[rng.integers(j), pick(rng, (0, -1))]
            states[j, :2] = beside(rng, neighbour, states[j])
            paths[j] = states[j]
            if j > 1 and rng.random() < 0.5:
                program = pick(rng, SOLO[:4])
                paths[j], _ = perform(rng, (program, pick(rng, WAYS[program])), s, states[j])
    return paths, []


def stage_chain(rng, world, states, scene):
    """-> paths (count, T, 4) of a chain; visits. The subject acts in the middle, the others come to the
    corners and the sides, and go."""
    corners = shuffled(rng, [(0.16, 0.16), (0.16, 0.84), (0.84, 0.16), (0.84, 0.84)])
    # Far enough apart that the subject never hides another: who is out of sight has left.
    homes = [(0.5, 0.5), *corners, (0.1, 0.5), (0.9, 0.5), (0.5, 0.9)]
    states[:, :2] = homes[:len(states)] + rng.uniform(-0.03, 0.03, (len(states), 2))
    paths = np.repeat(states[:, None], world.frames, 1)
    bounds = np.arange(world.acts + 1) * world.frames // world.acts
    for deed, begin, end in zip(scene["deeds"], bounds, bounds[1:]):
        program, _ = DEEDS[deed]
        # Each act ends where it began, so that any act may follow any other: what comes next cannot be
        # guessed from the places. Circling and spinning do so by themselves, the others go half-way and back.
        s = np.arange(1, end - begin + 1) / (end - begin)
        if program not in ("orbit", "spin"):
            s = 0.5 * np.sin(math.pi * s)
        # A circle that is as wide as a dart is long would leave the frame.
        reach = 0.7 if program == "orbit" else 1.1
        paths[0, begin:end], _ = perform(rng, DEEDS[deed], s, states[0], reach=reach)
        # Only a spin does not end as it began.
        states[0, 3] = paths[0, end - 1, 3]
    return paths, [visit(rng, path) for path in paths[1:]]


def visit(rng, path):
    """Let an object leave to the left or right, and come, as a random role says: its `path` is changed.
    -> role, first frame of going"""
    role = pick(rng, list(ROLES))
    goes, comes = [int(len(path) * rng.uniform(*when)) for when in ROLES[role]]
    # Going and coming take a few frames. `gone` is 0 where the object is at home and 1 where it is away.
    steps = max(1, min(len(path) // 16, 4))
    frame = np.arange(len(path))
    gone = ((frame - goes) / steps).clip(0, 1) - ((frame - comes) / steps).clip(0, 1)
    path[:, 0] += gone * math.copysign(0.9, path[0, 0] - 0.5)
    return role, goes


def filmed(rng, world):
    """-> camera (T, 3): shift of its centre in x and y, and zoom; light (T, 3): gains; what they do, in
    words."""
    # From -1/2 to 1/2: in the middle of a clip everything is where and as large as without a camera.
    tau = np.linspace(-0.5, 0.5, world.frames)
    camera = np.tile((0.0, 0.0, 1.0), (world.frames, 1))
    # each clip has a tint
    light = np.tile(rng.uniform(0.94, 1.06, 3), (world.frames, 1))
    changes = []
    if world.camera and not world.chain and rng.random() < 0.35:
        way = pick(rng, (*DIRECTIONS, *ZOOMS))
        if way in ZOOMS:
            camera[:, 2] = np.exp(ZOOMS[way] * tau)
            changes.append(f"the camera zooms {way}")
        else:
            camera[:, :2] = np.outer(tau, DIRECTIONS[way]) * rng.uniform(0.12, 0.25)
            changes.append(f"the camera pans {way}")
    if world.light and rng.random() < 0.25:
        way = pick(rng, tuple(LIGHTS))
        # from exp(-0.6) to 1, or back: the lightest moment is as light as an unchanged clip
        light *= np.exp(LIGHTS[way] * tau - 0.3)[:, None]
        changes.append(f"it gets {way}")
    return camera, light, changes


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: scripts
# -----------------------------------------------------------------------------------------------------------

def script(index, world=World()):
    """The scene number `index`, the same on every machine: small arrays for `rasterise`, words, classes.

    Arrays: camera (T, 3): shift of its centre in x and y, and zoom; light (T, 3): gain of each colour
    channel; place (8, T, 4): x, y, radius, angle of each object on the screen, the deepest first; shape (8,);
    count: how many objects there are; rgb (9, 3) of the ground and the objects; contrast: of the pattern on
    the ground.

    For learning: caption; qa: list of dict(type, question, answer, options); appearance, colour, motion:
    classes of the subject (motion -1: what is only seen backwards).

    Captions and questions are made from the others. Three are lists of objects, the subject first: looks,
    (shape, colour) of each; slots, its index in `place`; visits, without the subject and in a chain alone,
    (role, first frame of going). The rest: act, the subject's first; deeds, those of a chain; hero, the deed
    that is counted; ground, its name; film, what camera and light do; world and index."""
    rng = np.random.default_rng((SEED, index))
    looks, states = cast(rng, world, index)
    count = len(looks)
    scene = choose_acts(rng, world, count)
    states[:, 3] = rng.uniform(0, 2 * math.pi, count)
    stage = stage_chain if world.chain else stage_act
    paths, scene["visits"] = stage(rng, world, states, scene)
    camera, light, scene["film"] = filmed(rng, world)
    if world.reverse:
        paths, camera, light = paths[:, ::-1], camera[::-1], light[::-1]
        for key in ("act", "film"):
            scene[key] = [backwards(text) for text in scene[key]]
    program = scene["act"][0]

    # Objects are painted from the deepest to the nearest. Their order is random, except for two of which one
    # passes behind the other. In a chain the subject is the nearest, so that what is asked about is seen.
    depth = rng.random(count)
    if world.chain:
        depth[0] = 1
    elif program in ("behind", "front"):
        depth[:2] = sorted(depth[:2], reverse=program == "front")
    order = depth.argsort()
    # Slots without an object get a place far out of view: arrays of all clips then have one shape, and the
    # painter finds no pixel. The camera moves everything on the screen the other way.
    place = np.full((MAX_OBJECTS, world.frames, 4), (9.0, 9.0, 1e-3, 0.0))
    place[:count] = paths[order]
    place[..., :2] = (place[..., :2] - 0.5 - camera[:, :2]) * camera[:, 2:] + 0.5
    place[..., 2] *= camera[:, 2]
    ground = "a dark ground" if world.plain else pick(rng, list(GROUNDS))
    shape = np.zeros(MAX_OBJECTS, np.int64)
    rgb = np.zeros((MAX_GROUNDS + MAX_OBJECTS, 3))
    rgb[0] = rgb_of(GROUNDS.get(ground, DARK))
    for j, who in enumerate(order):
        shape[j], colour = looks[who]
        rgb[MAX_GROUNDS + j] = rgb_of(list(COLOURS.values())[colour])
    arrays = dict(camera=camera, light=light, place=place, rgb=rgb, contrast=0 if world.plain else 0.12)
    scene |= {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    scene |= dict(index=index, world=world, count=count, shape=shape, looks=looks, ground=ground)
    scene["slots"] = order.argsort().tolist()
    scene["appearance"], scene["colour"] = looks[0]
    scene["motion"] = MOTIONS.index(program) if program in MOTIONS else -1
    scene["caption"] = describe(rng, scene)
    scene["qa"] = questions(rng, scene)
    return scene


def rgb_of(colour):
    """'#ff8000' -> (255, 128, 0)"""
    return tuple(bytes.fromhex(colour[1:]))


def backwards(text):
    """What is seen when time is reversed: 'clockwise' -> 'anticlockwise'"""
    return " ".join(OPPOSITE.get(word, word) for word in text.split())


def cast(rng, world, index):
    """The objects of a clip, the subject first -> [(shape, colour)], and states (count, 4) of x, y, radius
    and angle, of which only the radii are set."""
    count = pick(rng, [n for n in COUNTS if n <= world.max_objects])
    radius = rng.uniform(*RADIUS) * (1 - 0.06 * max(count - 3, 0))
    looks, states = [], np.zeros((count, 4))
    # Shape and colour of each object are drawn until they are allowed.
    while len(looks) < count:
        shape = int(rng.integers(len(SHAPES)))
        colour = int(rng.integers(len(COLOURS)))
        if not looks and index >= HELDOUT:
            colour = held_out_colour(shape)
        elif colour == held_out_colour(shape):
            continue
        # Two objects of a clip never share both shape and colour, so that words can point at one of them.
        shared = any(colour == other for _, other in looks)
        if (shape, colour) in looks or (shared and not world.shared_colours):
            continue
        states[len(looks), 2] = radius * rng.uniform(*SHARE)
        looks.append((shape, colour))
    states[0, 2] = radius
    return looks, states


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: how much of the motion class needs motion
# -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def known_controls(world, clips=3000):
    """How well the motion class can be told without the order of frames: accuracy (chance 1 / 11) from the
    true states of the subject and its companion in the last frame alone, and from their mean and spread over
    the frames. Both are lower bounds (see `guessed`): a probe of a video model that is below the
    second has not been shown to use the order."""
    states, motion = [], []
    for s in (script(i, world) for i in range(clips)):
        # the slots of the subject and its companion; a subject that is alone is its own companion
        mine, theirs = (s["slots"] * 2)[:2]
        me, other = s["place"][[mine, theirs]]                      # (T, 4)
        # which of the two is nearer
        depth = np.full((world.frames, 1), np.sign(theirs - mine))
        states.append(np.concatenate((me, other - me, depth), -1))
        motion.append(s["motion"])
    states, motion = np.stack(states), np.array(motion)             # (clips, T, 9), (clips,)
    no_order = np.concatenate((states.mean(1), states.std(1)), -1)
    return dict(control_last_frame=guessed(states[:, -1], motion), control_no_order=guessed(no_order, motion))


def guessed(x, y, hidden=1000):
    """Accuracy of classes y (n,) from features x (n, d), fitted to three quarters and measured on the rest,
    by a network of one wide hidden layer. Its first weights stay random, so that the others are the solution
    of a problem of least squares: no learning rate can be wrong. A network that is trained whole, on more
    clips, guesses better."""
    n = 3 * len(y) // 4
    x = (x - x[:n].mean(0)) / (x[:n].std(0) + 1e-3)
    rng = np.random.default_rng(0)
    first, bias = rng.normal(size=(x.shape[1], hidden)), rng.normal(size=hidden)
    h = np.maximum(x @ first / x.shape[1] ** 0.5 + bias, 0)
    classes = np.eye(y.max() + 1)[y]
    # (h'h + 30) W = h' classes: the 30 keeps weights small where clips are few
    fitted = h[:n]
    weights = np.linalg.solve(fitted.T @ fitted + 30 * np.eye(hidden), fitted.T @ classes[:n])
    return float(((h[n:] @ weights).argmax(-1) == y[n:]).mean())


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: words
# -----------------------------------------------------------------------------------------------------------
# Captions vary in their words and their order, as people's do. Where words=deeds, they do not: there every
# difference between two captions is one between two clips.

# Alternatives stand between bars, and {} is where the companion is named.
VERBS = {
    "straight": "moves|glides|drifts|slides|travels", "bounce": "bounces|springs|bobs",
    "orbit": "circles|goes round|moves in a circle", "spin": "spins|turns on the spot|rotates",
    "grow": "grows|gets bigger|swells", "shrink": "shrinks|gets smaller|dwindles",
    "approach": "moves up to {} and stops|comes to rest beside {}|approaches {} and halts",
    "follow": "follows {}|chases {}|trails behind {}",
    "collide": "bumps into {}|collides with {} and springs back|knocks against {}",
    "behind": "passes behind {}|goes by behind {}|slips behind {} and out again",
    "front": "passes in front of {}|goes by in front of {}|crosses in front of {}",
    "leave": "moves away from {}", "lead": "leads {}"}          # these two only in reversed clips
ADVERBS = {
    "left": "to the left|leftwards|left", "right": "to the right|rightwards|right",
    "up": "upwards|up|to the top", "down": "downwards|down|to the bottom",
    "sideways": "from side to side|left and right", "upright": "up and down|upwards and downwards",
    "clockwise": "clockwise", "anticlockwise": "anticlockwise|counterclockwise", "": ""}


def a(phrase):
    """'a star', 'an arrow', 'an hourglass'"""
    vowels = (*"aeiou", "hour")
    return ("an " if phrase.startswith(vowels) else "a ") + phrase


def name_of(look):
    """(0, 0) -> 'red circle', enough to point at it: no other of the clip is one."""
    shape, colour = look
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}"


def third(infinitive):
    """'dart left' -> 'darts left'"""
    verb, blank, way = infinitive.partition(" ")
    return f"{verb}s{blank}{way}"


def describe(rng, scene):
    """A caption. It always tells subject, companion, deeds, ground and at most two of the other objects (all
    in a chain); what camera and light do it tells by chance. With words=deeds it tells shapes and deeds
    alone, always in the same words."""
    words, deeds = scene["world"].words, scene["deeds"]
    program, way = scene["act"]
    names = [a(name_of(look)) for look in scene["looks"]]
    verbs, adverbs = VERBS[program].split("|"), ADVERBS[way].split("|")
    verb, adverb = pick(rng, verbs), pick(rng, adverbs)
    where = pick(rng, ("on ", "over ", "against ")) + scene["ground"]
    rest = pick(rng, ("with {} nearby", "and there is {}", "next to {}", "along with {}"))
    if words == "deeds":
        names = [a(SHAPES[shape]) for shape, _ in scene["looks"]]
        verb, adverb, where, rest = verbs[0], adverbs[0], "", "with {}"
    subject, *others = names
    # 1. what the subject does, and who else is there
    if deeds:
        doing = ", then ".join(map(third, deeds))
        rest = "".join(f", {name} {role}" for name, (role, _) in zip(others, scene["visits"]))
    else:
        doing = f"{verb} {adverb}".format(*others)
        others = others[verb.count("{}"):]
        rest = rest.format(" and ".join(others[:2])) if others else ""
    # 2. the sentence
    sentences = ["{subject} {doing} {where} {rest}"]
    if words == "all" and not deeds:
        sentences += [
            "{subject} {doing} {rest} , {where}",
            "{where} , {subject} {doing} {rest}",
            "there is {subject} {where} ; it {doing} {rest}"]
    text = pick(rng, sentences).format(subject=subject, doing=doing, where=where, rest=rest)
    # 3. what camera and light do, in most captions and not in all: people do not always say it
    for change in scene["film"]:
        if words == "all" and rng.random() < 0.7:
            text += pick(rng, (" , ", " as ", " while ")) + change
    return " ".join(text.split()).replace(" ,", ",").replace(" ;", ";")


def questions(rng, scene):
    """What can be asked about a clip, and seen in it: list of dict(type, question, answer, options). Types:
    what; and of chains first, after, times, back (who left and came back?), again (did it come back?), order.

    No question should be answerable without the video. Wrong options come from the same clip where it offers
    enough, so it is not enough to see what occurs. All deeds are equally likely at each place of a chain, as
    are the numbers of times that the hero can occur, and the roles of an object."""
    names, deeds = [name_of(look) for look in scene["looks"]], scene["deeds"]
    subject, *others = names
    qa = []

    def ask(kind, question, answer, seen, all_of=()):
        """Wrong options are taken from `seen` first, then from `all_of`."""
        options = shuffled(rng, sorted(set(seen))) + shuffled(rng, list(all_of))
        options = [option for option in dict.fromkeys(options) if option != answer][:3]
        if options:
            options = shuffled(rng, [answer, *options])
            qa.append(dict(type=kind, question=question, answer=answer, options=options))

    colours = [name.split()[0] for name in names]
    ask("what", "What colour is the largest object?", colours[0], colours, COLOURS)
    if deeds:
        ask("first", f"What does the {subject} do first?", deeds[0], deeds, DEEDS)
    if len(deeds) > 1:
        # A deed may occur several times: the question is about its first time. The deed after it is another.
        deed = pick(rng, list(dict.fromkeys(deeds[:-1])))
        follows = deeds[deeds.index(deed) + 1]
        possible = [other for other in DEEDS if other != deed]
        question = f"What does the {subject} do right after it first {third(deed)}?"
        ask("after", question, follows, set(deeds) - {deed}, possible)
    if len(deeds) > 2:
        # the numbers that choose_acts draws from: the letters of "1", "12" or "123"
        hero, times = scene["hero"], "123"[:(len(deeds) + 1) // 2]
        ask("times", f"How many times does the {subject} {hero}?", str(deeds.count(hero)), times)
    visits = list(zip(others, scene["visits"]))
    goes = {name: when for name, (role, when) in visits if role in ("leaves", "returns")}
    back = [name for name, (role, _) in visits if role == "returns"]
    # Two that come back would be two right answers.
    if len(back) == 1:
        ask("back", "Which object leaves the view and comes back?", back[0], others)
    if goes:
        name = pick(rng, list(goes))
        answer = "yes" if name in back else "no"
        ask("again", f"Does the {name} come back after it left?", answer, ("yes", "no"))
    if len(goes) > 1:
        one, two = shuffled(rng, list(goes))[:2]
        # The order of two that leave is asked only where it is plain to see.
        if abs(goes[one] - goes[two]) >= max(2, scene["world"].frames // 16):
            question = f"Which leaves first, the {one} or the {two}?"
            ask("order", question, min(one, two, key=goes.get), (one, two))
    return qa


# -----------------------------------------------------------------------------------------------------------
# 1. The procedural world: pixels
# -----------------------------------------------------------------------------------------------------------

# the side of the tables of shapes
CELLS = 128


@functools.lru_cache(maxsize=None)
def atlas(device):
    """Tables of the shapes, bool (10, 128, 128), in an object's own coordinates, both from -1 to 1; True =
    inside, and all edges of a table are False. Formulas are evaluated once: afterwards a look-up costs the
    same whatever the shape."""
    g = (np.arange(CELLS) + 0.5) / CELLS * 2 - 1
    x, y = np.meshgrid(g, g)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    # 0 .. 1 from one point of the star to the next
    fifth = (angle + math.pi / 2) * 5 / (2 * math.pi) % 1
    hx, hy = 1.15 * x, 0.15 - 1.15 * y
    shaft = (abs(x) < 0.36) & (y > -0.1) & (y < 0.95)
    head = (y <= 0.05) & (y > -0.95) & (abs(x) < 0.9 * (y + 0.95))
    shapes = np.stack((
        radius < 0.92,                                                      # circle
        np.maximum(abs(x), abs(y)) < 0.8,                                   # square
        (y < 0.75) & (y > 1.75 * abs(x) - 0.95),                            # triangle
        radius < 0.54 + 0.44 * abs(2 * fifth - 1) ** 1.2,                   # star
        (np.minimum(abs(x), abs(y)) < 0.36) & (radius < 0.98),              # cross
        (radius < 0.96) & (radius > 0.42),                                  # ring
        (hx ** 2 + hy ** 2 - 0.6) ** 3 < 1.12 * hx ** 2 * hy ** 3,          # heart
        (radius < 0.95) & (np.hypot(x - 0.55, y) > 0.62),                   # moon
        shaft | head,                                                       # arrow
        (abs(x) < abs(y) * 0.8 + 0.2) & (abs(y) < 0.85)))                   # hourglass
    return torch.tensor(shapes, device=device)


def stack(scripts):
    """A list of scripts -> one dict of tensors with a leading batch axis; words stay out."""
    keys = ("camera", "light", "place", "shape", "count", "rgb", "contrast")
    return {key: torch.from_numpy(np.stack([s[key] for s in scripts])) for key in keys}


@torch.no_grad()
def rasterise(scripts, size, device="cpu"):
    """stack(scripts) -> video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) with H = W = size, on
    `device`."""
    device = torch.device(device)
    # Few clips at once, so that their planes stay in the cache of a CPU.
    chunk = 16 if device.type == "cpu" else 64
    painted = []
    for i in range(0, len(scripts["count"]), chunk):
        part = {key: value[i:i + chunk].to(device) for key, value in scripts.items()}
        painted.append(paint_clips(part, size))
    videos, labels = zip(*painted)
    return torch.cat(videos), torch.cat(labels)


def paint_clips(s, size):
    """Scripts of some clips -> video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W), by the painter's
    algorithm: the ground, then objects from the deepest to the nearest. `ids` holds the surface that covers
    each pixel last, `gain` how bright it is there; colours come once, at the end."""
    device = s["rgb"].device
    # The ground is a plane that the camera looks at, laid in lighter and darker squares, so that a camera
    # that pans is told from a thing that moves.
    x, y, zoom = s["camera"][..., None, None].unbind(2)                     # (b, t, 1, 1)
    p = (torch.arange(size, device=device) + 0.5) / size - 0.5
    u = p / zoom + 0.5 + x                                                  # (b, t, 1, W)
    v = p[:, None] / zoom + 0.5 + y                                         # (b, t, H, 1)
    squares = ((5 * u).floor() + (5 * v).floor()) % 2
    gain = 1 - s["contrast"].view(-1, 1, 1, 1) * squares                    # (b, t, H, W)
    ids = torch.zeros_like(gain, dtype=torch.int64)
    # The object of one depth in all clips at a time. Later ones cover earlier ones. One side of each is
    # lighter, so that even a circle is seen to spin.
    for j in range(int(s["count"].max())):
        where, down = covered(s, j, size)
        ids.view(-1)[where] = MAX_GROUNDS + j
        gain.view(-1)[where] = 1 + 0.25 * down
    clip = torch.arange(len(ids), device=device).view(-1, 1, 1, 1)
    colour = s["rgb"][clip, ids] * gain[..., None]                          # (b, t, H, W, 3)
    return (colour * s["light"][:, :, None, None]).clamp(0, 255).byte(), ids


def covered(s, j, size):
    """-> numbers (n,) of the pixels of the batch that object j of each clip covers, and how far down they lie
    on it (n,), along its own axis, in radii. Only a square window around the object is looked at: at 64 px
    this is 6 times as fast as looking at every pixel of the frame."""
    x, y, r, angle = s["place"][:, j, :, :, None, None].unbind(2)           # (b, t, 1, 1)
    # The corners of a table that is turned are sqrt(2) radii away, but no shape goes farther than 1.25: the
    # window has 2.5 radii in all, and a few pixels for rounding.
    w = min(int(2.5 * size * r.max()) + 3, 2 * size)
    offset = torch.arange(w, device=x.device) - w // 2
    # Pixel numbers of the window, and where their centres are on the object: shifted, turned back, scaled.
    column = (x * size).round().long() + offset                             # (b, t, 1, w)
    row = (y * size).round().long() + offset[:, None]                       # (b, t, w, 1)
    dx = (column + 0.5) / size - x
    dy = (row + 0.5) / size - y
    cos, sin = torch.cos(angle), torch.sin(angle)
    u = (dx * cos + dy * sin) / r                                           # (b, t, w, w)
    v = (dy * cos - dx * sin) / r
    # What lies outside the table reads its edge, where no shape is.
    across = ((u + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
    down = ((v + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
    cell = (s["shape"][:, j, None, None, None] * CELLS + down) * CELLS + across
    seen = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    # Most of the window is not covered: from here on only pixels that are.
    hit = (atlas(x.device).view(-1)[cell] & seen).flatten().nonzero()[:, 0]
    frame = torch.arange(x.numel(), device=x.device).view_as(x)
    pixel = (frame * size + row) * size + column
    return pixel.flatten()[hit], v.flatten()[hit]


# -----------------------------------------------------------------------------------------------------------
# 2. Real video
# -----------------------------------------------------------------------------------------------------------

# By these suffixes videos and pictures are found in a folder, and in a table a first row that names a file is
# told from a header.
VIDEO_SUFFIXES = set(".mp4 .mkv .mov .avi .webm .m4v .mpg .mpeg .gif .asf .wmv .flv .ts .3gp".split())
IMAGE_SUFFIXES = set(".jpg .jpeg .png .bmp .webp".split())


@contextlib.contextmanager
def opened(path):
    """`with opened(path) as stream`: the first video stream of a file, by PyAV; the file itself is
    `stream.container`. Whatever goes wrong inside, also while its frames are decoded, is a BadVideo of one
    line: training can replace the file, and a person can read which one it was."""
    # imported here, so that training on made clips needs no PyAV
    import av
    try:
        # titles and other texts in the file may be in any encoding
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise BadVideo(f"{path}: holds no video that can be decoded; give another file")
            stream.thread_type = "AUTO"
            # one in a loader's worker: the other cores belong to the other workers
            stream.codec_context.thread_count = torch.get_num_threads()
            yield stream
    except av.error.FFmpegError as error:
        raise BadVideo(f"{path}: cannot be decoded ({error.strerror}); re-encode or remove it") from None


def rate_of(stream):
    """Frames a second, as the header says."""
    # FFmpeg guesses the rate of a GIF from its first frames; the mean over the whole file is exact
    if stream.codec_context.name == "gif" and stream.duration:
        return float(stream.frames / (stream.duration * stream.time_base))
    return float(stream.average_rate or stream.guessed_rate or 25)


def frame_count(stream):
    """How many frames a video shows, as its header says. Where the header does not say it, the packets are
    counted."""
    container = stream.container
    # MKV stores only when the whole file, picture and sound, ends; PyAV gives it in microseconds
    length = ((container.duration or 0) - (container.start_time or 0)) / 1e6
    if stream.duration:
        length = float(stream.duration * stream.time_base)
    # most MKV files tell when the picture ends as a text: "00:01:02.500"
    elif "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        end = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        length = end - float((stream.start_time or 0) * stream.time_base)
    expected = round(length * rate_of(stream))
    # the number of frames in an MP4 includes those that its edit list hides; its length does not
    if expected and "mov" in container.format.name:
        return min(stream.frames or expected, expected)
    return stream.frames or expected or len(frame_times(container.name))


def frame_times(path):
    """When each frame of a video is shown, in seconds after the first: (F,), ascending. All packets are read,
    none is decoded: a film of an hour takes a few seconds."""
    with opened(path) as stream:
        stamps = [p.pts for p in stream.container.demux(stream) if p.size and not p.is_discard]
        # AVI has no time stamps
        if stream.container.format.name == "avi" or None in stamps:
            return np.arange(len(stamps)) / rate_of(stream)
        return (np.sort(stamps) - min(stamps, default=0)) * float(stream.time_base)


def upright(frame, size, whole=False, crop=0.5):
    """A frame of PyAV -> uint8 (size, size, 3), a square cut out of it: at crop=0 from the left or upper end
    of its longer side, at 1 from the other end. whole: (h, w, 3), all of it, its short side `size` pixels.
    Pixels are assumed to be square."""
    # Below transparent pixels a file may hold any colour. Web pages show them on white, and so do we.
    if frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.float32)
        alpha = rgba[..., 3:] / 255
        rgb = rgba[..., :3] * alpha + 255 * (1 - alpha)
        frame = frame.from_ndarray(rgb.round().astype(np.uint8), format="rgb24")
    scale = size / min(frame.width, frame.height)
    w, h = round(frame.width * scale), round(frame.height * scale)
    image = frame.reformat(w, h, "rgb24", interpolation="AREA").to_ndarray()
    if not whole:
        top, left = int(crop * (h - size)), int(crop * (w - size))
        image = image[top:top + size, left:left + size]
    # a phone that is held upright stores the picture lying on its side, and the angle
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def in_order(stream, begin=0):
    """Decode a stream from its start, or from a key frame before `begin` seconds -> an iterator over (seconds
    after the first frame of the file, frame), in the order in which they are shown. BadVideo where the file
    ends early."""
    container, rate = stream.container, rate_of(stream)
    size = stream.width, stream.height
    first = stream.start_time or 0
    end = begin
    if begin:
        container.seek(first + int(begin / stream.time_base), stream=stream)
    for count, frame in enumerate(container.decode(stream)):
        # an array of frames, or of masks, has one size; joined transport streams may have several
        if (frame.width, frame.height) != size:
            raise BadVideo(f"{container.name}: the size of its frames changes; re-encode it at one size")
        # AVI has no time stamps, and is never sought: the n-th frame is shown at n / rate
        seconds = count / rate
        if frame.pts is not None and container.format.name != "avi":
            seconds = float((frame.pts - first) * stream.time_base)
        end = seconds + 1 / rate
        yield seconds, frame
    # Headers often announce a few frames too many; that of a file that was cut off announces many. `end` is
    # 0 where not even one frame was decoded.
    length = frame_count(stream) / rate
    if not end or length - end > max(3 / rate, 0.05 * length):
        raise BadVideo(f"{container.name}: its frames end at {end:.2f} s, its header says {length:.2f} s; "
                       "re-encode or remove it")


def on_screen(stream, wanted, margin):
    """What is on screen at the times `wanted`, ascending -> [(seconds, frame)]: for each the last frame that
    began before. Gaps of more than two margins (seconds) are skipped by seeking, not decoded."""
    frames, found = in_order(stream), []
    # stands for a frame after the last one, which never begins
    over = math.inf, None
    # `ahead` is the frame decoded last, `shown` the one before it. Only when `ahead` begins after t is it
    # certain that `shown` is still on screen at t. At first, and after a seek, both are the same frame.
    shown = ahead = next(frames)
    for t in wanted:
        if t - ahead[0] > 2 * margin:
            # Frames are stored in another order than they are shown, so a seek aims a margin early.
            frames = in_order(stream, t - margin)
            shown = ahead = next(frames, over)
            # The seek may lead behind t, or to where a decoder cannot begin: then decode from the start.
            if ahead[0] > t or not ahead[1].key_frame:
                stream.container.seek(0)
                return on_screen(stream, wanted, math.inf)
        while ahead[0] <= t:
            shown, ahead = ahead, next(frames, over)
        found.append(shown)
    return found


def decode(path, frames, size, start=None, stride=1, crop=0.5):
    """T frames of a video, or the one of a picture -> uint8 (T, size, size, 3), and when they are shown, in
    seconds after the first frame (T,). crop: where along the longer side the square is cut, 0 .. 1.

    start=None: what is on screen in the middles of T equal parts. Else T frames in a row, every `stride`-th
    (less where the video is too short), from `start` on, a fraction 0 .. 1 of the room there is.

    BadVideo: fewer than T frames, a file that ends early, one that cannot be decoded. Two things are not
    noticed: wrong pixels to which a damaged file decodes without an error, and transport streams joined from
    several of one size. A decoder that hangs is waited for."""
    with opened(path) as stream:
        rate, count = rate_of(stream), frame_count(stream)
        if count < frames:
            raise BadVideo(f"{path}: has {count} frames, fewer than the {frames} asked for")
        # Frames are numbered as if the rate were constant. Their times follow from the numbers, and it is the
        # frames at these times that are read, also where the rate varies.
        numbers = np.arange(frames)
        if start is None:
            numbers = np.floor((numbers + 0.5) * count / frames)
        else:
            # a short video is seen at a smaller stride, rather than left out
            stride = max(1, min(stride, count // frames))
            room = count - 1 - (frames - 1) * stride
            numbers = round(start * room) + numbers * stride
        # AVI has no time stamps to seek by. With 4:4:4 colours, old versions of x264 write how the stream is
        # to be decoded into its first frame alone.
        fixed = stream.container.format.name == "avi" or "444" in (stream.codec_context.pix_fmt or "")
        # ask for the middle of a frame's time, so that rounding cannot make it a neighbour's
        found = on_screen(stream, (numbers + 0.5) / rate, math.inf if fixed else 16 / rate)
        images = [upright(frame, size, crop=crop) for _, frame in found]
    return np.stack(images), np.array([seconds for seconds, _ in found])


def read_frames(path, size, length=8, whole=False):
    """Every frame of a video, in order -> an iterator over uint8 (length, size, size, 3), cut as `decode`
    cuts, the last perhaps shorter; whole: (length, h, w, 3). Memory does not grow with the video. BadVideo as
    for `decode`."""
    with opened(path) as stream:
        frames = in_order(stream)
        while piece := list(itertools.islice(frames, length)):
            yield np.stack([upright(frame, size, whole) for _, frame in piece])


def load_labels(entry, times, size):
    """The sidecars of an entry -> int64 (T, size, size): the trajectory of each pixel of the frames shown at
    `times`, -1 = none; cut to the same central square as `decode` cuts, by nearest neighbour.
    mask: `arr_0` (F, H, W), the object id of each pixel, 0 = none. graph: `tensor` (M, F), the object id of
    trajectory m in frame f, 0 = absent. An id that no trajectory owns is unlabelled. Most videos have no
    sidecars: every pixel is unlabelled, and the segmentation loss ignores it."""
    labels = np.full((len(times), size, size), -1)
    mask, graph = entry["mask"], entry["graph"]
    if not mask and not graph:
        return labels
    # Without one half of a pair there are no labels: a training would go on without them, in silence.
    if not mask or not graph:
        raise BadVideo(f"{mask or graph}: masks and graphs come in pairs; write or remove both")
    mask = read_npz(mask, "arr_0", 3)
    graph = read_npz(graph, "tensor", 2)
    # Labels of another video would fit in size. Their number of frames may differ a little: programs
    # disagree about frames at the end of a file.
    shown = frame_times(entry["path"])
    if graph.shape[1] != len(mask) or abs(len(mask) - len(shown)) > max(2, 0.05 * len(shown)):
        raise BadVideo(f"{entry['mask']}: masks of {len(mask)} frames and a graph of {graph.shape[1]} for a "
                       f"video of {len(shown)}; write all again")
    # where the centres of the square's pixels lie in the mask, whose size may differ from the video's
    h, w = mask.shape[1:]
    place = (np.arange(size) + 0.5 - size / 2) * min(h, w) / size
    square = np.ix_((h / 2 + place).astype(int), (w / 2 + place).astype(int))
    for label, t in zip(labels, times):
        # frames are told apart by their times: at a variable rate their number is not time x rate
        f = min(np.abs(shown - t).argmin(), len(mask) - 1)
        ids = mask[f][square]
        # from the last to the first: of two trajectories that own the same id, the first has it
        for m in np.flatnonzero(graph[:, f] > 0)[::-1]:
            label[ids == graph[m, f]] = m
    return labels


def read_npz(path, key, axes):
    """One array of whole numbers from an .npz file. BadVideo says what is wrong with the file."""
    try:
        array = np.load(path)[key]
    # what numpy raises depends on where a file is damaged
    except Exception as error:
        raise BadVideo(f"{path}: no `{key}` in it ({type(error).__name__}); write it again") from None
    if array.ndim != axes or array.dtype.kind not in "iub" or not array.size:
        raise BadVideo(f"{path}: `{key}` is {array.dtype} {array.shape}; give whole numbers of {axes} axes")
    return array


# -----------------------------------------------------------------------------------------------------------
# 3. Manifests, CSV files, folders
# -----------------------------------------------------------------------------------------------------------

# What people call the columns of a CSV file -> our names. Other columns are not read, but a header without a
# column for the file is refused: it may be a table of something else.
COLUMNS = dict.fromkeys("video path filename file video_path".split(), "video")
COLUMNS |= dict.fromkeys("caption text sentence".split(), "caption")
COLUMNS |= dict.fromkeys("label class action".split(), "label")
COLUMNS |= dict(split="split", mask="mask", graph="graph")
EXPECTED = ('give a JSON list of {"video": path, "caption": text, "split": "train" | "val" | "test"}, such '
            "an object a line, a CSV or a folder")
# what people call the parts of a data set, as a value of "split" or as the name of a folder -> our name
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_manifest(path):
    """A manifest (a JSON list or JSON lines), a CSV file or a folder -> a list of entries, one for each file:
    dicts of path, name (the path relative to the manifest), image (bool), caption (list of texts or None),
    label, split ("train", "val", "test" or None), mask, graph, qa (list of dicts question, answer) and
    conversations (a list of lists of such dicts); for made clips also the classes in MADE.

    Rows that name the same file are one entry with all their captions and questions: as two candidates of a
    retrieval neither could be told from the other. Sidecars that are not named are looked for beside the
    video. BadInput says what is wrong, and where."""
    # Path("") would be the folder in which one happens to be
    if path == "":
        raise BadInput("a data set without a name; give a path, e.g. . for this folder")
    path = Path(path)
    # a folder that `make` has written
    if path.is_dir() and (path / "manifest.json").exists():
        path = path / "manifest.json"
    folder = path if path.is_dir() else path.parent
    entries, where = {}, "cannot be read"
    try:
        # a list: errors in the table as such come before any row
        for where, row in list(read_rows(path)):
            row = json.loads(row) if isinstance(row, str) else row
            entry = new_entry(row, folder)
            # the real path: a file may be named in several ways
            entry = entries.setdefault(os.path.realpath(entry["path"]), entry)
            add_row(entry, row, folder)
    # whatever indexing and conversion raise where JSON holds other types than expected
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise BadInput(f"{path} {where}: {error}; {EXPECTED}") from None
    if not entries:
        raise BadInput(f"{path}: holds no entries; {EXPECTED}")
    return list(entries.values())


def read_rows(path):
    """-> (where, row) pairs of a manifest, a CSV file or a folder. A row is a dict, or a line of JSON."""
    if path.is_dir():
        return folder_rows(path)
    # "utf-8-sig": Excel and Windows begin a file with a byte-order mark
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return csv_rows(text)
    if text.lstrip().startswith("["):
        return [(f"entry {number}", row) for number, row in enumerate(json.loads(text), 1)]
    # not splitlines, which also splits at other separators that a text in JSON may hold
    lines = enumerate(text.split("\n"), 1)
    return [(f"line {number}", line) for number, line in lines if line.strip()]


def csv_rows(text):
    """A table with a header, or `path,label` rows without one -> (where, row) pairs. Cells stand between
    commas, tabs, semicolons or spaces, whichever the first line has."""
    # a caption may hold commas, but hardly ever a tab: so the tab is looked for first
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in "\t,;" if mark in first), " ")
    # Python's reader knows quoted line breaks and both kinds of line ends, if it may see them: newline=""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # stripped: " walking" and "walking" would be two classes
    rows = [(f"line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    rows = [(where, cells) for where, cells in rows if any(cells)]
    # Kinetics writes `path,label` and V-JEPA `path label`, without a header: a first row that names a file is
    # no header
    header = ["video", "label"]
    if rows and Path(rows[0][1][0]).suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        names = rows.pop(0)[1]
        header = [COLUMNS.get(name.lower()) for name in names]
        known = [name for name in header if name]
        told = {"caption", "label", "mask"}.intersection(known)
        if "video" not in known or not told or len(set(known)) < len(known):
            raise ValueError(f"a header of {', '.join(names)[:60]}; name a column for the file and one for "
                             f"its caption or label, each once, by one of {', '.join(COLUMNS)}")
    for where, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, not {len(header)}; quote cells with commas")
        yield where, {key: cell for key, cell in zip(header, cells) if key and cell}


def folder_rows(root):
    """root/[train|val|test/]label/.../file -> (where, row) pairs. Links are followed; hidden names, and the
    folder that macOS adds to an archive, are left out."""
    root = root.resolve()
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):
        place = Path(folder).relative_to(root)
        hidden = place.name.startswith(".") or "__MACOSX" in place.name
        # a link that leads back to a folder above it would be followed for ever
        above = [os.path.realpath(parent) for parent in Path(folder).parents]
        if hidden or os.path.realpath(folder) in above:
            folders.clear()
        else:
            files += [place / name for name in names if not name.startswith(".")]
    # pictures count where there are no videos: beside videos they are thumbnails
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    for file in sorted(videos or [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]):
        parents = list(file.parts[:-1])
        part = parents.pop(0) if parents and parents[0] in SPLITS else None
        label = parents[0] if parents else None
        yield str(file), dict(video=str(file), split=part, label=label)


def new_entry(row, folder):
    """The entry of the file that a row names, without what the row says of it."""
    file = Path(folder, row.get("video") or row["image"])
    # relative to the manifest: a data set can be moved, and its name and split stay the same
    name = Path(os.path.relpath(file, folder)).as_posix()
    image = not row.get("video") or file.suffix.lower() in IMAGE_SUFFIXES
    entry = dict(path=str(file), name=name, image=image, caption=None, label=None, split=None)
    for kind, sidecar in sidecars(file).items():
        entry[kind] = str(sidecar) if sidecar.exists() else None
    return entry | dict(qa=[], conversations=[])


def add_row(entry, row, folder):
    """Add to an entry what a row says of its file. ValueError says what is wrong with it. A file may have
    many captions, but one label and one split."""
    # a made clip has all of MADE; a "colour" of somebody's own is something else
    if all(type(row.get(key)) is int for key in MADE):
        entry |= {key: row[key] for key in MADE}
    entry |= {key: str(Path(folder, row[key])) for key in ("mask", "graph") if row.get(key)}
    # a text, always: class 3 of a JSON file is class "3" of a CSV file
    label = None if row.get("label") is None else str(row["label"])
    if isinstance(row.get("label"), (list, dict)):
        raise ValueError(f'"label" is {label[:60]}; give the name of one class')
    # an unknown word is refused: taken for training, it would put test clips into it
    part = SPLITS[row["split"]] if row.get("split") else None
    for key, value in dict(label=label, split=part).items():
        if None not in (value, entry[key]) and value != entry[key]:
            raise ValueError(f'"{key}" is {value!r}, but an earlier row of the file says {entry[key]!r}')
        entry[key] = entry[key] or value
    captions = row.get("caption") or []
    captions = [captions] if isinstance(captions, str) else captions
    known = entry["caption"] or []
    entry["caption"] = (known + [text for text in captions if text not in known]) or None
    pairs = row.get("qa") or []
    entry["qa"] += pairs
    if row.get("conversations"):
        talk = conversation(row["conversations"])
        entry["conversations"].append(talk)
        pairs = pairs + talk
    texts = captions + [pair[key] for pair in pairs for key in ("question", "answer")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{json.dumps(texts)[:80]}: captions, questions and answers are texts, none empty")
    for pair in pairs:
        if pair["answer"] not in pair.get("options", [pair["answer"]]):
            raise ValueError(f"{json.dumps(pair)[:80]}: the answer is none of the options")


def conversation(turns):
    """LLaVA's turns -> [dict(question, answer)]. A <video> or <image> mark becomes a blank, because the video
    always stands before the text."""
    pairs = []
    # strict: a question without its answer is refused
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        # shifted by a system's turn, questions would be learnt as answers
        if (human["from"], gpt["from"]) != ("human", "gpt"):
            raise ValueError('a conversation goes "human", "gpt", "human", "gpt"')
        question = re.sub(r"\s*<(video|image)>\s*", " ", human["value"]).strip()
        pairs.append(human | dict(question=question, answer=gpt["value"]))
    return pairs


def split(entries):
    """-> (training, held out). "split" decides where it is given; entries without it are then trained on. If
    no entry has one, a hash of each name holds out a quarter, at most about 5 000. Between a few dozen and
    20 000 entries, each stays on its side when others are added. Of few entries at least a sixth is held out,
    and never none."""
    if any(entry["split"] for entry in entries):
        held_out = [entry["split"] in ("val", "test") for entry in entries]
    else:
        # Hashes of names, not numbers in the list: the order of a manifest does not matter. Of the whole
        # names: of <id>/rgb.mp4 the last part is the same for all.
        hashes = [zlib.crc32(os.fsencode(entry["name"])) for entry in entries]
        ranked = sorted(hashes)
        least = max(min(len(entries), 24) // 6, 1)
        # a CRC is a number below 2 ** 32, spread evenly: a share of the names lies below that share of it
        share = min(0.25, 5000 / len(entries))
        limit = max(share * 2 ** 32, ranked[least - 1] + 1)
        # The entry with the largest hash is always trained on: of two entries both may be below a quarter.
        held_out = [number < min(limit, ranked[-1]) for number in hashes]
    train = [entry for entry, held in zip(entries, held_out) if not held]
    test = list(itertools.compress(entries, held_out))
    if not train or not test:
        raise BadInput(f"{len(train)} clips to train on and {len(test)} held out: at least one of each is "
                       'needed; mark some entries "split": "val"')
    return train, test


# -----------------------------------------------------------------------------------------------------------
# 4. Text
# -----------------------------------------------------------------------------------------------------------

# a word with the blank before it; a pattern that Python's re and tiktoken read alike
WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
# the split of GPT-2, as in tiktoken_ext/openai_public.py
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
    # setdefault: a word of one byte is in the list already
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
        # chains of acts are told with words of their own, such as "then"
        chains = World(frames=64, acts=8)
        captions = [script(i)["caption"] for i in range(500)]
        captions += [script(i, chains)["caption"] for i in range(50)]
        return word_encoding(word_list(captions))
    if Path(name).exists():
        return published_encoding(Path(name))
    try:
        return tiktoken.get_encoding(name)
    # tiktoken downloads its files; the errors of the network are kinds of OSError
    except (ValueError, OSError) as error:
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(f"{name}: no vocabulary; give `world`, a folder, or one of tiktoken's {known}, which "
                       f"must be in TIKTOKEN_CACHE_DIR or on the network ({type(error).__name__})") from None


def published_encoding(path):
    """The byte-level BPE of a tokenizer.json, of the kinds of GPT-2 and Qwen. tiktoken merges pairs in the
    order of their ranks, and these files list the merges in the order of their ids: so ranks are ids."""
    path = path / "tokenizer.json" if path.is_dir() else path
    # In these files a printable byte stands for itself, the n-th of the others for the character 256 + n
    # (bytes_to_unicode in GPT-2's encoder.py).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in printable]
    byte = {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(hidden)}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        first = spec["pre_tokenizer"]
        steps = first.get("pretokenizers", [first])
        special = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
        vocabulary = spec["model"]["vocab"]
        ranks = {bytes(byte[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        # a merge is "a b", or in newer files ["a", "b"]
        merged = [vocabulary["".join(merge).replace(" ", "")] for merge in spec["model"]["merges"]]
        # Steps that are not done here, or merges in another order than that of their ids, would give tokens
        # that the model does not know, without any error.
        assert [step["type"] for step in steps] in (["ByteLevel"], ["Split", "ByteLevel"]), steps
        assert steps[0].get("behavior") in (None, "Isolated") and not steps[-1].get("add_prefix_space"), steps
        assert spec.get("normalizer") in (None, {"type": "NFC"}), f"normalizer {spec['normalizer']}"
        assert merged == sorted(merged), "merges are not in the order of their ids"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise BadInput(f"{path}: not a published byte-level tokenizer ({error!r})") from None
    # texts are closed by this token; a tokenizer that has none gets it behind all others
    special.setdefault(END, max([*ranks.values(), *special.values()]) + 1)
    pattern = steps[0]["pattern"]["Regex"] if len(steps) > 1 else GPT_WORDS
    kind = Composing if spec.get("normalizer") else tiktoken.Encoding
    return kind(path.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tokenize(encoding, texts, length):
    """Texts -> ids int64 (b, length), closed by the end token (which is never cut off) and filled up with
    it, and mask (b, length), True = a real token (the end token included)."""
    rows = encoding.encode_ordinary_batch(list(texts), num_threads=1)
    # room for the end token: the text encoder reads its output there
    rows = [row[:length - 1] for row in rows]
    ends = [encoding.eot_token] * length
    ids = torch.tensor([(row + ends)[:length] for row in rows])
    counts = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(length) <= counts[:, None]


# -----------------------------------------------------------------------------------------------------------
# 5. Batches: number i is a pure function of (seed, i)
# -----------------------------------------------------------------------------------------------------------

# the classes of made clips, as numbers
MADE = ("appearance", "colour", "motion")
# how many seconds a batch from a worker may take
PATIENCE = 300


def distinct(world, begin, count):
    """The first `count` indices from `begin` on whose captions all differ: a caption that fits two clips has
    no right answer."""
    indices, index = {}, begin
    while len(indices) < count:
        indices.setdefault(script(index, world)["caption"], index)
        index += 1
    return list(indices.values())


class WorldBatches(torch.utils.data.Dataset):
    """Batch i of made clips: places i·batch .. (i + 1)·batch - 1 of `indices`, a list or a range.

    A batch leaves its worker as scripts of a few kB. `finish` paints them on the device that trains: a GPU
    paints faster than pixels could be sent to it."""

    def __init__(self, world, batch, indices=range(TRAIN, VALIDATION)):
        self.world, self.batch, self.indices = world, batch, indices
        self.files = len(indices)

    def __len__(self):
        """Batches there are, the last perhaps short."""
        return math.ceil(self.files / self.batch)

    def captions(self):
        """Captions of the first clips: enough of them to hold every word."""
        return [script(i, self.world)["caption"] for i in self.indices[:2000]]

    def __getitem__(self, i):
        indices = self.indices[i * self.batch:(i + 1) * self.batch]
        scripts = [script(index, self.world) for index in indices]
        batch = dict(scripts=stack(scripts), size=self.world.size, bad=[], label=[None] * len(scripts))
        batch |= {key: [s[key] for s in scripts] for key in ("index", "caption", "qa")}
        batch |= {key: torch.tensor([s[key] for s in scripts]) for key in MADE}
        return batch | dict(captions=[[caption] for caption in batch["caption"]])


class VideoBatches(torch.utils.data.Dataset):
    """Batch i of real clips, all of them videos or all of them pictures.

    Training: the entries stand in an endless row, epoch after epoch, each epoch in an order of its own. Batch
    i takes the first `batch` usable ones from place i·batch on, so it is full even where an epoch ends or a
    file is damaged (a contrastive loss over one clip would be 0 whatever the model says). No file stands in
    it twice, so it is short where the whole set has fewer usable files.
    A clip is `frames` frames in a row from a random place, every 1st to every stride-th (drawn); stride 0:
    frames spread over the whole video.

    Held out (train=False): entries in order, frames spread over the whole video. Files that cannot be used
    are left out, and the last batch may be short."""

    def __init__(self, entries, frames, size, batch, seed=0, train=True, stride=8):
        self.entries, self.files = entries, len(entries)
        self.frames, self.size, self.batch = frames, size, batch
        self.seed, self.train, self.stride = seed, train, stride

    def __len__(self):
        """Batches of held-out clips; in training, of an epoch."""
        return math.ceil(self.files / self.batch)

    def captions(self):
        """All captions of all clips: what a vocabulary is made of."""
        return [text for entry in self.entries for text in entry["caption"] or []]

    # kept, because a batch may need the end of one epoch and the beginning of the next; for all datasets
    @functools.lru_cache(maxsize=8)
    def order(self, epoch):
        """The entries' numbers as one epoch takes them."""
        if not self.train:
            return range(self.files)
        return np.random.default_rng((self.seed, epoch)).permutation(self.files).tolist()

    def __getitem__(self, i):
        # seeded by (seed, i) alone: a resumed run, and any number of workers, draw the same numbers
        rng = np.random.default_rng((self.seed, 1, i))
        first = i * self.batch
        last = min(first + self.batch, self.files)
        if self.train:
            # twice as many places as entries hold a whole epoch, and so every entry, wherever they begin
            last = first + 2 * self.files
        clips, bad = {}, {}
        for place in range(first, last):
            number = self.order(place // self.files)[place % self.files]
            if len(clips) == self.batch:
                break
            if number in clips or number in bad:
                continue
            try:
                clips[number] = self.clip(number, rng)
            except BadVideo as error:
                bad[number] = self.entries[number]["path"], str(error)
        clips, bad = list(clips.values()), list(bad.values())
        batch = dict(video=torch.empty(0), labels=torch.empty(0), bad=bad)
        if clips:
            # the keys that all clips have: only made clips, for example, have classes in their manifest
            for key in set(clips[0]).intersection(*clips):
                values = [clip[key] for clip in clips]
                batch[key] = torch.stack(values) if torch.is_tensor(values[0]) else values
        # in evaluation a whole batch may be left out, but a training without clips has nothing to learn
        elif self.train:
            raise BadInput(f"none of the {self.files} files can be used; the last: {bad[-1][1]}")
        return batch

    def clip(self, number, rng):
        """One entry, decoded. BadVideo if it cannot be used."""
        entry = self.entries[number]
        # drawn for every clip, needed or not, so that a picture or a caption more changes no other clip
        start, choice = rng.random(2)
        stride = int(rng.integers(1, max(self.stride, 1) + 1))
        if not self.train or not self.stride:
            start = None
        frames = 1 if entry["image"] else self.frames
        video, times = decode(entry["path"], frames, self.size, start, stride)
        labels = load_labels(entry, times, self.size)
        # one of several captions in training; evaluation has all of them, as `captions`
        texts = entry["caption"] or [""]
        caption = texts[int(choice * len(texts))] if self.train else texts[0]
        clip = dict(video=torch.from_numpy(video), labels=torch.from_numpy(labels), times=times.tolist())
        clip |= {key: torch.tensor(entry[key]) for key in MADE if key in entry}
        return clip | dict(index=number, caption=caption, captions=texts, label=entry["label"],
                           qa=entry.get("qa", []))


class Mixed(torch.utils.data.Dataset):
    """Whole batches of several datasets, one of them at a time, in given shares. With p processes,
    batches s·p .. s·p + p - 1 are those of step s: they all come from one dataset, so that at each step every
    process has clips of the same shape.

    The first dataset takes its share of all steps, evenly: step s is its own where floor(s·share + phase)
    grows, and that floor counts its steps so far. The steps that it leaves are counted anew and go to the
    others in the same way. Each dataset then has its share to within a few steps; chance would be off by
    sqrt(s)."""

    def __init__(self, datasets, shares, seed=0, processes=1):
        self.datasets, self.processes = datasets, processes
        # shares of the steps that the earlier datasets leave; the last one takes them all
        self.shares = [share / sum(shares[j:]) for j, share in enumerate(shares)]
        self.phases = np.random.default_rng((seed, 3)).random(len(shares)).tolist()

    def captions(self):
        """All captions of all datasets."""
        return [text for dataset in self.datasets for text in dataset.captions()]

    def __getitem__(self, i):
        step, rank = divmod(i, self.processes)
        for dataset, share, phase in zip(self.datasets, self.shares, self.phases):
            before = math.floor(step * share + phase)
            after = math.floor((step + 1) * share + phase)
            if after > before:
                return dataset[before * self.processes + rank]
            step -= before


def finish(batch, device, augment_seed=None):
    """A batch as a dataset gives it -> the same with `video` uint8 (b, t, H, W, 3) and `labels` int64
    (b, t, H, W) on the device; made clips are painted there. With a seed, real clips are augmented; made ones
    never repeat and need it not."""
    if "scripts" in batch:
        size = batch.pop("size")
        batch["video"], batch["labels"] = rasterise(batch.pop("scripts"), size, device)
    for key in ("video", "labels"):
        # Pixels travel as bytes, a quarter of what floats would be. From pinned memory the copy runs beside
        # the computation.
        batch[key] = batch[key].to(device, non_blocking=True)
    # the key "motion" marks made clips, those in files too
    if augment_seed is not None and "motion" not in batch:
        batch["video"], batch["labels"] = augment(batch["video"], batch["labels"], augment_seed)
    return batch


def loader(dataset, first, last, workers=0, rank=0, processes=1):
    """Batches of steps first .. last - 1, in order; with p = `processes`, step s of process `rank` is
    dataset[s·p + rank]. They are made ahead of time by `workers` further processes (0: in this one); what
    they hold does not depend on that. To resume, begin at another `first`."""
    # batch_size=None: an item of the dataset is a whole batch. The sampler lists the numbers of this process.
    # generator: torch would draw the workers' seeds from the global one.
    batches = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=range(first * processes + rank, last * processes, processes),
        num_workers=workers, timeout=PATIENCE if workers else 0,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())
    try:
        yield from batches
    except BadInput as error:
        # torch puts the worker's traceback above the message, and its type before it
        line = str(error).strip().splitlines()[-1]
        raise BadInput(line.removeprefix("data.BadInput: ")) from None
    except RuntimeError as error:
        if "timed out" not in str(error) and "Bus error" not in str(error):
            raise
        # Workers hand batches over in shared memory. One that gets none loses its batch without a word, and
        # without the time-out the training would wait for ever.
        raise BadInput(f"no batch from --workers for {PATIENCE} s, or one died for want of shared memory: "
                       "make /dev/shm larger (docker run --shm-size=8g), or give --workers 0") from None


class Damage(dict):
    """Files that could not be used -> the reason. Each is named once on stderr."""

    def add(self, bad):
        for path, reason in bad:
            if path not in self:
                self[path] = reason
                print(f"cannot be used: {reason}", file=sys.stderr)


def augment(video, labels, seed):
    """The same random change for all frames of a clip: resized crop (area 0.2 to 1), flip, brightness,
    contrast, saturation or grey, blur. video uint8 (b, t, H, W, 3), labels int64 (b, t, H, W) -> the same.
    `seed` (an int) decides everything. Captions stay, also where they tell left from right."""
    rng = np.random.default_rng((seed, 2))
    clips, ids = zip(*(changed(*pair, rng) for pair in zip(video, labels)))
    return torch.stack(clips), torch.stack(ids)


def changed(clip, ids, rng):
    """One clip uint8 (t, H, W, 3) and its labels (t, H, W), changed at random."""
    h, w = ids.shape[1:]
    # up to 4 / 3 times as wide as high, or as high as wide
    area, ratio = rng.uniform(0.2, 1), math.exp(rng.uniform(-0.28, 0.28))
    height = min(h, round(h * math.sqrt(area / ratio)))
    width = min(w, round(w * math.sqrt(area * ratio)))
    top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
    clip = clip[:, top:top + height, left:left + width]
    ids = ids[:, top:top + height, left:left + width]
    x = F.interpolate(rearrange(clip, "t h w c -> t c h w").float(), (h, w), mode="bilinear")
    # "nearest", because a mean of trajectories 2 and 8 is none. interpolate takes no integers; doubles hold
    # them exactly.
    ids = F.interpolate(ids[:, None].double(), (h, w), mode="nearest-exact")[:, 0].long()
    if rng.random() < 0.5:
        x, ids = x.flip(-1), ids.flip(-1)
    # PAPER: colour jitter, grey and blur, each the same for a whole clip. Contrast moves colours away from
    # the clip's mean brightness, saturation moves them away from grey.
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    # how bright red, green and blue look (ITU-R BT.601)
    light = torch.tensor((0.299, 0.587, 0.114), device=x.device).view(3, 1, 1)
    x = x * brightness
    mean = (x * light).sum(1).mean()
    x = mean + contrast * (x - mean)
    grey = (x * light).sum(1, keepdim=True)
    # one clip in five is grey
    if rng.random() >= 0.8:
        saturation = 0
    x = grey + saturation * (x - grey)
    if rng.random() < 0.3:
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return rearrange(x, "t c h w -> t h w c").clamp(0, 255).round().byte().contiguous(), ids


# -----------------------------------------------------------------------------------------------------------
# The data of a run
# -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def open_data(cfg, need="caption", processes=1):
    """What a run learns from -> (training dataset, held-out dataset). Kept, so that an evaluation in the
    middle of a run does not read the manifests anew.

    cfg.data: `world`, or a manifest, CSV or folder; several with commas, in the shares of cfg.mix, a batch of
    one of them at a time. cfg.val: a manifest that is held out, instead of a part of each. need: the key
    ("caption", "mask") without which an entry cannot be used. processes: how many train together."""
    names = sets_of(cfg.data)
    val = usable_entries(cfg.val, need) if cfg.val else []
    train, held_out, shares = [], [], []
    for name, share in zip(names, read_shares(cfg.mix, names)):
        learnt, tested = made_clips(cfg) if name == "world" else real_clips(cfg, name, need, val)
        # the videos and the pictures of a set have parts of its share, in proportion to their numbers
        files = sum(dataset.files for dataset in learnt)
        shares += [share * dataset.files / files for dataset in learnt]
        train += learnt
        held_out += tested
    if val:
        held_out = real_batches(val, *clip_options(cfg, False))
    # one dataset stays what it is: made clips are also asked for their indices
    if len(held_out) > 1:
        held_out = [torch.utils.data.ConcatDataset(held_out)]
    return Mixed(train, shares, cfg.seed, processes), held_out[0]


def sets_of(data):
    """--data "A,B" -> ["A", "B"]. A comma may stand in a path: what exists is one set."""
    return [data] if os.path.exists(data) else [name.strip() for name in data.split(",")]


def usable_entries(name, need):
    """The entries of a manifest that have what it is read for. A label is a caption where there is no
    other."""
    entries = read_manifest(name)
    for entry in entries:
        if need == "caption" and entry["label"] and not entry["caption"]:
            entry["caption"] = [entry["label"].replace("_", " ")]
    usable = [entry for entry in entries if entry[need]]
    lacking = [entry["path"] for entry in entries if not entry[need]]
    # A missing caption was forgotten, and somebody will want to add it. A mask is missing where `label` could
    # not label a video, which is no mistake.
    if lacking and (need == "caption" or not usable):
        raise BadInput(f"{name}: {len(lacking)} entries have no {need}, the first {lacking[0]}; add it")
    if lacking:
        print(f"{name}: {len(lacking)} of {len(entries)} files have no {need} and are left out")
    return usable


def read_shares(mix, names):
    """--mix "0.2,0.8" -> [0.2, 0.8]; equal shares without it."""
    parts = mix.split(",") if mix else [1] * len(names)
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        # what is not a number is refused below, in the same words as a wrong number
        shares = []
    if len(shares) != len(names) or not all(0 < share < math.inf for share in shares):
        raise BadInput(f"--mix {mix}: give a number above 0 for each of the {len(names)} sets of --data")
    return shares


def world_of(cfg):
    """The world that a configuration asks for: one of WORLDS. Flags change the full one; of the others they
    change only the size and the number of frames."""
    name = getattr(cfg, "world", "full")
    if name not in WORLDS:
        raise BadInput(f"--world {name}: one of {', '.join(WORLDS)}")
    known = World.__dataclass_fields__ if name == "full" else ()
    flags = {field: value for field, value in vars(cfg).items() if field in known}
    return replace(WORLDS[name], **flags | dict(size=cfg.image_size, frames=cfg.frames))


def made_clips(cfg):
    """-> [training dataset], [held-out dataset] of made clips. Each seed from 0 to 48 has ten million
    training clips of its own; held-out captions all differ."""
    world = world_of(cfg)
    # A recipe must not be chosen by its result on the clips that it is tested on later.
    begin = VALIDATION if getattr(cfg, "eval_split", "test") == "validation" else TEST
    indices = distinct(world, begin, cfg.eval_clips)
    # the clips of all seeds stay well below the index of the first validation clip
    first = TRAIN + (cfg.seed % 49) * 10_000_000
    train = WorldBatches(world, cfg.batch, range(first, VALIDATION))
    return [train], [WorldBatches(world, cfg.batch, indices)]


def real_clips(cfg, name, need, val):
    """-> training datasets, held-out datasets of the manifest `name`. val: entries of another manifest, which
    are held out in place of a part of this one; there are then no held-out datasets."""
    entries = usable_entries(name, need)
    if val:
        # Nothing held out is trained on: neither what "split" holds out, nor what stands in both manifests.
        held_out = {os.path.realpath(entry["path"]) for entry in val}
        train, test = [entry for entry in entries if entry["split"] in (None, "train")], []
        both = [entry["path"] for entry in train if os.path.realpath(entry["path"]) in held_out]
        if both or not train:
            raise BadInput(f"{name}: of {len(train)} files to train on, {len(both)} are in --val: {both[:1]}")
    else:
        train, test = split(entries)
    # A column that was not read, or a split that fails, shows first in these numbers.
    masks = sum(bool(entry["mask"]) for entry in train)
    print(f"{name}: {len(train)} clips to train on ({masks} with masks), {len(val or test)} held out")
    return real_batches(train, *clip_options(cfg, True)), real_batches(test, *clip_options(cfg, False))


def clip_options(cfg, train):
    """What VideoBatches takes after the entries."""
    return cfg.frames, cfg.image_size, cfg.batch, cfg.seed, train, cfg.stride


def real_batches(entries, *options):
    """Entries -> a VideoBatches of the videos, one of the pictures: their batches have different shapes."""
    videos = [entry for entry in entries if not entry["image"]]
    pictures = [entry for entry in entries if entry["image"]]
    return [VideoBatches(kind, *options) for kind in (videos, pictures) if kind]


def fingerprint(data, val=None):
    """A short text that changes with what is read from these manifests. A run that is resumed compares it: in
    other entries its place in the data would mean nothing."""
    crc = 0
    for name in sets_of(data) + ([val] if val else []):
        for entry in [] if name == "world" else read_manifest(name):
            # not the path: a folder may move, or be seen under another name on another node
            texts = [entry[key] for key in ("name", "caption", "label", "split", "qa", "conversations")]
            crc = zlib.crc32(json.dumps([*texts, bool(entry["mask"])]).encode(), crc)
    return f"{crc:08x}"


# -----------------------------------------------------------------------------------------------------------
# 6. Labels for video that has none
# -----------------------------------------------------------------------------------------------------------
# PAPER: TrajViT's pipeline. The video is cut at key frames, each stretch between two of them is segmented
# and tracked, and stretches are linked where their masks overlap in the frame that they share.
# A method labels one stretch: frames uint8 (t, H, W, 3) -> ids int64 (t, H, W), -1 = none.
#
# `classic_labels` needs no other model. CHOICE: an object is what moves differently from the camera, together
# with what has the same appearance in any frame. The rest is divided by colour, texture and position, because
# many objects do not move. Eight frames of a stretch are segmented together:
#
#   1. superpixels: small patches of one colour;
#   2. motion: a patch counts as moving the more the frame differs from its neighbours after the camera's
#      motion is undone, and the more its own motion differs from the camera's;
#   3. votes: each patch takes the mean over the patches of all frames that resemble it;
#   4. each connected component of the moving patches is an object, and k-means divides the rest.
#
# An ablation on DAVIS-2016 showed that each of these steps is worth at least 0.02 of IoU.

PATCH = 5                                                       # side of a superpixel in pixels
REGIONS = 41                                                    # clusters of colour, texture and position
ANCHORS = 8                                                     # frames that are segmented together


def opponent(frames):
    """uint8 (t, H, W, 3) -> float (t, 3, H/2, W/2): brightness, red minus green, yellow minus blue. Shadows
    change mainly the first channel. The whole classic method works at this half of the resolution."""
    x = rearrange(frames, "t h w c -> t c h w").float() / 255
    r, g, b = halved(x).unbind(1)
    return torch.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b], 1)


def halved(x):
    """(n, c, h, w) at half of the resolution; an odd size is rounded up."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def box(x, radius):
    """The mean over the square of 2 radius + 1 pixels around each pixel, without what lies outside."""
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


def positions(h, w):
    """The x and y of each pixel: (2, h, w)."""
    y, x = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
    return torch.stack([x, y])


def warped(x, flow, mode="bilinear"):
    """x (n, c, h, w) read at each pixel's position + flow (n, 2, h, w), in pixels. Positions outside of the
    frame read its border."""
    h, w = x.shape[-2:]
    # grid_sample counts from -1 to 1
    place = (positions(h, w) + flow + 0.5) * 2 / torch.tensor([w, h]).view(2, 1, 1) - 1
    return F.grid_sample(x, place.movedim(1, -1), mode, padding_mode="border", align_corners=False)


def window(x):
    """The sum over the channels of x (n, c, h, w), averaged over 5 x 5 pixels: (n, 1, h, w)."""
    return box(x.sum(1, keepdim=True), 2)


def misfit(a, b, flow):
    """How much a and b differ after the motion is undone, averaged over 5 x 5 pixels: (n, 1, h, w)."""
    return window((warped(b, flow) - a).abs())


def coarse_motion(a, b):
    """Exhaustive search: the 5 x 5 pixels around each pixel of a are compared with those around each pixel
    of b. a, b (n, 3, h, w), small -> flow (n, 2, h, w)."""
    h, w = a.shape[-2:]
    # the 25 pixels of 3 channels around each pixel: (n, h w, 75)
    p, q = (F.unfold(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5).mT for x in (a, b))
    distance = torch.cdist(p, q).square()                       # (n, h w, h w)
    # the unit of the cost: how much a pixel usually differs from the one that it fits best
    usual = distance.amin(2).median(1).values.view(-1, 1, 1)
    place = positions(h, w).flatten(1).T                        # (h w, 2)
    # Distant matches cost a little more. Otherwise ground without texture would match anywhere.
    cost = distance / (usual + 1e-3) + 0.08 * torch.cdist(place, place)
    return rearrange(place[cost.argmin(2)] - place, "n (h w) c -> n c h w", h=h)


def refined_motion(a, b, flow):
    """Lucas and Kanade (1981): each step solves, in a window of 5 x 5 pixels, for the shift d that explains
    the remaining difference, (sum g g^T) d = -sum g (b - a), where g is the gradient of a."""
    gx, gy = torch.gradient(a, dim=(3, 2))
    # the small number keeps the system solvable where the window has no texture
    xx = window(gx * gx) + 1e-4
    yy = window(gy * gy) + 1e-4
    xy = window(gx * gy)
    determinant = xx * yy - xy * xy
    # Windows with edges of two directions determine the motion. The others follow their neighbours.
    weight = determinant / (xx + yy) + 1e-5
    for _ in range(3):
        error = warped(b, flow) - a
        ex = window(gx * error)
        ey = window(gy * error)
        # d by Cramer's rule, at most one pixel a step
        step = torch.cat([xy * ey - yy * ex, xy * ex - xx * ey], 1) / determinant
        flow = flow + step.clamp(-1, 1)
        flow = box(flow * weight, 1) / box(weight, 1)
    return flow


def camera_motion(flow, weight):
    """The camera's part of the motion: an affine field, fitted by iteratively re-weighted least squares, in
    which pixels that move by themselves lose their weight. flow (n, 2, h, w), weight (n, 1, h, w) ->
    (n, 2, h, w). CHOICE: the border of a frame counts about ten times as much as its centre, because a camera
    keeps the object that it follows in the centre."""
    h, w = flow.shape[-2:]
    x, y = 2 * (positions(h, w).flatten(1) + 0.5) / torch.tensor([[w], [h]]) - 1
    rows = torch.stack([torch.ones_like(x), x, y])              # (3, h w)
    weight = weight.flatten(1) * (0.1 + torch.maximum(x.abs(), y.abs()) ** 2)
    target, current = flow.flatten(2), weight
    for _ in range(8):
        weighted = rows * current[:, None]
        # The small number on the diagonal makes the motion 0 where the image has no texture.
        system = weighted @ rows.T + 3e-3 * torch.eye(3)
        camera = (rows.T @ torch.linalg.solve(system, weighted @ target.mT)).mT
        current = weight / ((target - camera).norm(dim=1) + 0.3)
    return camera.view_as(flow)


def dense_motion(a, b):
    """Where each pixel of a is in b: a, b (n, 3, h, w) of `opponent` -> flow and the camera's part of it,
    both (n, 2, h, w) in pixels. A quarter of the resolution is searched, a half and the whole are refined."""
    half_a, half_b = halved(a), halved(b)
    p, q = halved(half_a), halved(half_b)
    flow = coarse_motion(p, q)
    # wrong matches leave a large difference and count little
    weight = torch.exp(-10 * misfit(p, q, flow))
    camera = camera_motion(flow, weight)
    flow = camera + box((flow - camera) * weight, 1) / box(weight, 1)
    for p, q in ((half_a, half_b), (a, b)):
        # twice the resolution, so twice the pixels
        both = 2 * F.interpolate(torch.cat([flow, camera], 1), size=p.shape[-2:], mode="bilinear")
        flow, camera = both.chunk(2, 1)
        # A pixel moves with the camera unless its own motion explains the images clearly better.
        ground = misfit(p, q, camera) <= misfit(p, q, flow) + 0.01
        flow = refined_motion(p, q, torch.where(ground, camera, flow))
        camera = camera_motion(flow, torch.exp(-10 * misfit(p, q, flow)))
    return flow, camera


def group_means(values, group, default):
    """values (p, c) -> their means in k groups (k, c). An empty group gets its row of `default` (k, c)."""
    sums = (1e-6 * default).index_add(0, group, values)
    return sums / (1e-6 + torch.bincount(group, minlength=len(default)))[:, None]


def k_means(points, centres, rounds=10):
    """points (p, c), the first centres (k, c) -> the nearest centre of each point (p,)."""
    for _ in range(rounds):
        # min is twice as fast as argmin
        nearest = torch.cdist(points, centres).min(1).indices
        centres = group_means(points, nearest, centres)
    return torch.cdist(points, centres).min(1).indices


def superpixels(x):
    """x (t, 3, h, w) -> patches of one colour, about PATCH pixels wide: the index of each pixel's patch
    (t, h, w), counted through all frames, and how many patches a frame has. SLIC (Achanta et al., 2012):
    k-means on colour and position, which starts from a grid."""
    t, _, h, w = x.shape
    rows, columns = max(h // PATCH, 1), max(w // PATCH, 1)
    owner = []
    for i in range(t):
        # a difference in colour of 0.06 counts as much as a distance of PATCH pixels
        points = torch.cat([x[i] / 0.06, positions(h, w) / PATCH])                   # (5, h, w)
        centres = F.adaptive_avg_pool2d(points, (rows, columns)).flatten(1).T
        owner.append(i * rows * columns + k_means(points.flatten(1).T, centres, 2))
    return torch.stack(owner).view(t, h, w), rows * columns


def unlike_the_camera(x):
    """x (t, 3, h, w) -> (t, 2, h, w): how much each pixel differs from the neighbouring frames after the
    camera's motion is undone, and how much its motion differs from the camera's. Of the two neighbours the
    smaller difference counts: background that an object uncovers is visible in one of them."""
    t = len(x)
    if t == 1:
        return torch.zeros_like(x[:, :2])
    a, b = torch.cat([x[:-1], x[1:]]), torch.cat([x[1:], x[:-1]])
    flow, camera = dense_motion(a, b)
    both = torch.cat([misfit(a, b, camera), (flow - camera).norm(dim=1, keepdim=True)], 1)
    ahead, behind = both.split(t - 1)
    # the last frame is only compared with the one before it, the first only with the one after it
    return torch.minimum(torch.cat([ahead, behind[-1:]]), torch.cat([ahead[:1], behind]))


def stands_out(values, t):
    """values (n, 1) of the superpixels of t frames -> (n, 1): 0 at the median of their frame, 1 at nine times
    the usual deviation from it. If the camera's motion was not found, all patches deviate, so few of them
    stand out."""
    values = values.view(t, -1)
    deviation = values - values.median(1, keepdim=True).values
    # of this frame or of all frames, whichever is larger
    usual = torch.maximum(deviation.abs().median(1, keepdim=True).values, deviation.abs().median())
    return (deviation / (9 * usual + 1e-2)).clamp(0, 1).view(-1, 1)


def votes(looks, values, t):
    """values (n, 1) of the superpixels of t frames and their appearance (n, c) -> means over the six most
    similar superpixels of each frame, five times over. Motion marks only parts of an object, in some frames
    (the edges, a leg), and the votes add what looks the same. They also remove false alarms, because most of
    the background that looks like a false alarm does not move."""
    per_frame = len(looks) // t
    distance = torch.cdist(looks, looks).view(-1, t, per_frame)
    distance, index = distance.topk(min(6, per_frame), largest=False)                # (n, t, 6)
    index = (index + per_frame * torch.arange(t)[:, None]).flatten(1)                # (n, 6 t)
    distance = distance.flatten(1) / (distance.median() + 1e-6)
    # softmax over the 6 t voters of a superpixel, so that their weights sum to 1
    weight = torch.softmax(-2 * distance ** 2, 1)
    for _ in range(5):
        values = (weight * values[index, 0]).sum(1, keepdim=True)
    return values


def connected(chosen):
    """chosen bool (t, h, w) -> connected components in space and time, diagonals included: for each pixel the
    number of its component, -1 where it is not chosen. Every pixel starts with a number of its own and takes
    the largest among its neighbours, until nothing changes."""
    ids = torch.arange(float(chosen.numel())).view(chosen.shape)
    ids, previous = torch.where(chosen, ids, -1), None
    while previous is None or not torch.equal(ids, previous):
        previous = ids
        ids = torch.where(chosen, F.max_pool3d(ids[None], 3, 1, 1)[0], -1)
    return ids.long()


def classic_segment(x):
    """Some frames of a stretch, x (t, 3, h, w) of `opponent` -> ids int64 (t, h, w)."""
    t, _, h, w = x.shape
    owner, per_frame = superpixels(x)
    # texture: differences of brightness to the right and to the lower neighbour, 0 at the border
    light = x[:, :1]
    right = light.diff(dim=3, append=light[..., -1:]).abs()
    down = light.diff(dim=2, append=light[..., -1:, :]).abs()
    looks = box(torch.cat([x, 2 * right, 2 * down], 1), 1)
    # positions relative to the centre of the frame, in units of its short side
    place = (positions(h, w) - torch.tensor([w, h]).view(2, 1, 1) / 2) / min(h, w)
    values = torch.cat([looks, place.expand(t, 2, h, w), unlike_the_camera(x)], 1)
    values = rearrange(values, "t c h w -> (t h w) c")
    values = group_means(values, owner.flatten(), torch.zeros(t * per_frame, 9))
    looks, place, error, own = values.split([5, 2, 1, 1], 1)
    # how much each superpixel moves by itself (n, 1), from 0 to 2; scaled to 0 .. 1 below
    moving = stands_out(error, t) + stands_out(own, t)
    # CHOICE: people film what they care about near the centre
    moving = moving * torch.exp(-place.square().sum(1, keepdim=True) / 0.245)
    moving = votes(torch.cat([looks, 0.25 * place], 1), moving, t)
    # a quantile instead of the maximum, which a few outliers would set
    moving = (moving / moving.quantile(0.98).clamp(min=1e-6)).clamp(max=1)
    points = torch.cat([looks, 0.35 * place, 0.25 * moving], 1)
    first = torch.linspace(0, len(points) - 1, REGIONS).long()
    ids = k_means(points, points[first])[owner]
    # each large component of the moving superpixels is an object
    pieces = connected(moving[owner, 0] > 0.5)
    number, area = pieces[pieces >= 0].unique(return_counts=True)
    for i, piece in enumerate(number[area >= 0.08 * area.sum()]):
        ids[pieces == piece] = REGIONS + i
    return ids


@torch.no_grad()
def classic_labels(frames):
    """A stretch uint8 (t, H, W, 3) -> ids int64 (t, H, W). Up to eight frames, the anchors, are segmented
    together. Every other frame reads its ids from the nearest anchor, along the motion between the two."""
    t, height, width, _ = frames.shape
    x = opponent(frames)
    count = min(t, ANCHORS)
    nearest = torch.arange(t) * count // t
    anchors = ((torch.arange(count) + 0.5) * t / count).long()
    ids = classic_segment(x[anchors])[nearest].float()[:, None]                      # (t, 1, h, w)
    for i, anchor in enumerate(anchors[nearest].tolist()):
        if i != anchor:
            flow, _ = dense_motion(x[i:i + 1], x[anchor:anchor + 1])
            ids[i:i + 1] = warped(ids[i:i + 1], flow, "nearest")
    return F.interpolate(ids, size=(height, width)).long()[:, 0]


def is_cut(before, after):
    """Do two frames uint8 (H, W, 3) show different scenes? CHOICE: they do if their histograms of 8 x 8 x 8
    colours have less than half in common. Motion within a scene hardly changes a histogram."""
    colours = (np.stack((before, after))[:, ::2, ::2] // 32) @ np.array([64, 8, 1])
    shares = [np.bincount(one.ravel(), minlength=512) / one.size for one in colours]
    return np.minimum(*shares).sum() < 0.5


def stretches(pieces, longest):
    """Frames in order, an iterator over uint8 (c, H, W, 3) -> an iterator over (frames (t, H, W, 3), shared).
    A stretch reaches from one key frame to the next. It shares that frame with the following stretch
    (shared = 1; 0 for the last stretch), so that the two can be linked. CHOICE: `longest` frames after a key
    frame there is another one, which bounds the memory and finds objects that have entered since."""
    held = []
    for frame in itertools.chain.from_iterable(pieces):
        if held and (len(held) == longest or is_cut(held[-1], frame)):
            yield np.stack([*held, frame]), 1
            held = []
        held.append(frame)
    if held:
        yield np.stack(held), 0


def linked(before, after):
    """Two segmentations of one frame, int64 (H, W), -1 = none -> {id in after: id in before} where IoU > 0.5.
    CHOICE: the paper also links at exactly 0.5. Above it, no region can be linked to two others."""
    links = {}
    for i in before[before >= 0].unique().tolist():
        # a region with more than half of the union also covers more than half of this one
        j = int(after[before == i].mode().values)
        both = ((before == i) & (after == j)).sum()
        if j >= 0 and 2 * both > ((before == i) | (after == j)).sum():
            links[j] = i
    return links


def label_frames(pieces, method, longest):
    """Frames in order, an iterator over uint8 (c, H, W, 3) -> trajectories int32 (T, H, W), -1 = none,
    numbered through the whole video without gaps."""
    out, count, tracked = [], 0, None
    for frames, shared in stretches(pieces, longest):
        ids = method(torch.from_numpy(frames))
        known = {} if tracked is None else linked(tracked, ids[0])
        kept = ids[:len(ids) - shared]
        # id -1 reads the last entry, which stays -1
        number = torch.full((int(ids.max()) + 2,), -1)
        for i in kept[kept >= 0].unique().tolist():
            number[i] = known.get(i, count)
            count += i not in known
        out.append(number[kept].int())
        # The next stretch segments the shared frame again. It is linked to how this stretch tracked it.
        tracked = number[ids[-1]]
    return torch.cat(out)


def write_labels(mask_path, graph_path, ids):
    """Trajectories (T, H, W), -1 = none -> both sidecars; returns how many trajectories there are. The object
    id of a trajectory is its number + 1, because 0 means none."""
    count = int(ids.max()) + 1
    graph = np.zeros((count, len(ids)), np.int64)
    for t, frame in enumerate(ids):
        present = np.unique(frame[frame >= 0])
        graph[present, t] = present + 1
    # An old mask is removed first and the new one written last, so that a mask always has its own graph.
    Path(mask_path).unlink(missing_ok=True)
    write_npz(graph_path, "tensor", graph)
    # one, two or four bytes a pixel, as many as the largest id needs
    write_npz(mask_path, "arr_0", (ids + 1).astype(np.min_scalar_type(count)))
    return count


# `label --sam2 FOLDER` needs the package transformers and a published SAM2. The thresholds are those of
# SAM2's automatic mask generator. CHOICE: at most 128 trajectories in a stretch.
SAM2_POINTS, SAM2_MASKS = 32, 128
SAM2_IOU, SAM2_STABILITY, SAM2_OVERLAP = 0.8, 0.95, 0.7


@functools.lru_cache(maxsize=1)
def load_sam2(folder):
    """-> the image model and the video model of a folder, on a GPU if there is one."""
    try:
        from transformers import Sam2Model, Sam2VideoModel, logging
        # The image model has no use for the weights of the memory, and transformers would list them all.
        logging.set_verbosity_error()
        options = dict(output_loading_info=True, local_files_only=True)
        loaded = [kind.from_pretrained(folder, **options) for kind in (Sam2Model, Sam2VideoModel)]
    except (ImportError, OSError) as error:
        raise BadInput(f"--sam2 {folder}: needs pip install transformers, and the folder of a published SAM2 "
                       f"({type(error).__name__})") from None
    # transformers would fill in random weights and only warn
    missing = [name for _, info in loaded for name in info["missing_keys"]]
    if missing:
        raise BadInput(f"--sam2 {folder}: is incomplete; {min(missing)} is missing")
    return [model.eval().to("cuda" if torch.cuda.is_available() else "cpu") for model, _ in loaded]


def sam2_masks(model, pixels):
    """An image (1, 3, S, S) -> logits of its masks (objects, s, s), smallest first. A grid of points prompts
    the masks. Those are kept that have a high predicted IoU, are stable (nearly the same at thresholds +1
    and -1) and do not overlap a better one."""
    side = (torch.arange(SAM2_POINTS) + 0.5) * pixels.shape[-1] / SAM2_POINTS
    points = torch.cartesian_prod(side, side).view(1, -1, 1, 2).to(pixels)
    embeddings = model.get_image_embeddings(pixels)
    # 64 prompts at a time, for memory
    found = [model(image_embeddings=embeddings, input_points=some) for some in points.split(64, 1)]
    logits = torch.cat([out.pred_masks.flatten(0, 2) for out in found]).cpu()
    scores = torch.cat([out.iou_scores.flatten() for out in found]).cpu()
    masks = (logits > 0).flatten(1)
    area = masks.sum(1)
    stable = (logits > 1).sum((1, 2)) >= SAM2_STABILITY * (logits > -1).sum((1, 2))
    good = stable & (scores >= SAM2_IOU) & (area > 0)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        both = (masks[kept] & masks[i]).sum(1)
        overlaps = both > SAM2_OVERLAP * (area[kept] + area[i] - both)
        if good[i] and not overlaps.any() and len(kept) < SAM2_MASKS:
            kept.append(i)
    return logits[kept][area[kept].argsort(stable=True)]


@torch.inference_mode()
def sam2_labels(folder, frames):
    """A stretch uint8 (t, H, W, 3) -> ids int64 (t, H, W), -1 = none: the masks of its first frame,
    propagated through the others."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
    image, video = load_sam2(folder)
    height, width = frames.shape[1:3]
    side = image.config.prompt_encoder_config.image_size
    x = rearrange(frames, "t h w c -> t c h w").float() / 255
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    # ImageNet's mean and standard deviation, as in the published models
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = ((x - mean) / std).to(video.device)
    session = Sam2VideoInferenceSession(x, height, width, video.device, dtype=torch.float32)
    masks = F.interpolate(sam2_masks(image, x[:1])[:, None], (side, side), mode="bilinear")
    ids = torch.full(frames.shape[:3], -1)
    for i, mask in enumerate(masks):
        session.add_mask_inputs(session.obj_id_to_idx(i), 0, (mask > 0).float()[None])
    session.obj_with_new_inputs = list(range(len(masks)))
    # without a mask there is nothing to propagate
    for result in video.propagate_in_video_iterator(session, 0) if len(masks) else ():
        logits = F.interpolate(result.pred_masks.cpu(), (height, width), mode="bilinear")
        # Of equal logits the first wins, so that small objects lie on large ones in the first frame.
        best, owner = logits[:, 0].max(0)
        ids[result.frame_idx] = torch.where(best > 0, owner, -1)
    return ids


# -----------------------------------------------------------------------------------------------------------
# python data.py make | check | label
# -----------------------------------------------------------------------------------------------------------

# All three go through their files in processes, show a progress bar, and end with one line of summary.

@dataclass(frozen=True)
class MakeConfig:
    """Writes made clips as MP4 files with sidecars, captions, questions and a manifest."""
    out: str = "out/world"              # the folder for manifest.json and clips
    clips: int = 1000                   # how many
    image_size: int = 64                # pixels of a side, an even number
    frames: int = 8                     # frames of a clip
    max_objects: int = 4                # 1 .. 8 objects in a clip
    shared_colours: bool = False        # may two objects of a clip wear the same colour?
    acts: int = 1                       # acts that the subject performs one after another
    camera: bool = True                 # pans and zooms
    light: bool = True                  # the scene gets lighter or darker
    seed: int = 0                       # the clips that a training of this seed sees first
    fps: float = 8.0                    # frames a second
    workers: int | None = None          # processes; 0: none but this one; default: one for each core


def make(argv):
    """Writes the clips that a training sees."""
    cfg = configure(MakeConfig, None, argv)
    world = world_of(cfg)
    if cfg.clips < 1 or not 1 <= cfg.fps < math.inf:
        raise BadInput(f"--clips {cfg.clips} --fps {cfg.fps}: give numbers from 1 on")
    out = Path(cfg.out)
    # an empty one first, which makes the folder, or says in one line why that cannot be
    write_json(out / "manifest.json", [])
    # numbered as in `made_clips`, so that a training on --data world with this seed sees the same clips
    first = TRAIN + (cfg.seed % 49) * 10_000_000
    jobs = [(out, i, world, cfg.fps) for i in range(first, first + cfg.clips)]
    write_json(out / "manifest.json", worked(make_clip, jobs, cfg.workers, "clips"))
    print(f"wrote {out / 'manifest.json'}; train on it with --data {out / 'manifest.json'}")


def worked(work, jobs, workers, unit):
    """[work(job)] in order, with a progress bar, in `workers` processes of their own (None: one for each
    core; 0: in this one)."""
    workers = min(cores() if workers is None else workers, len(jobs))
    bar = functools.partial(tqdm, total=len(jobs), unit=f" {unit}")
    if workers < 1:
        return list(bar(map(work, jobs)))
    # Each has one thread, so together they take as many cores as there are workers. They are spawned, not
    # forked: a copy of a process whose threads hold locks may wait for these locks for ever.
    context = torch.multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        return list(bar(pool.map(work, jobs)))


def make_clip(job):
    """One made clip as files -> its row of the manifest."""
    out, index, world, fps = job
    made = script(index, world)
    file = out / f"{index:010d}.mp4"
    video, labels = rasterise(stack([made]), world.size, "cpu")
    write_labels(*sidecars(file).values(), labels[0].numpy())
    # lossless, because an ordinary file blurs the borders of the objects, where labels change
    with film(file, fps, exact=True) as add:
        add(video[0].numpy())
    row = dict(video=file.name, caption=made["caption"], label=MOTIONS[made["motion"]], qa=made["qa"])
    return row | {key: int(made[key]) for key in MADE}


def sidecars(file):
    """Where a video's mask and graph are looked for: x.mp4 -> x_mask.npz, x_graph.npz."""
    return {kind: file.with_name(f"{file.stem}_{kind}.npz") for kind in ("mask", "graph")}


@dataclass(frozen=True)
class CheckConfig:
    """Decodes every file of a manifest, CSV or folder, and names those that a training could not use."""
    manifest: str = ""                  # a manifest (.json, .jsonl), a CSV or a folder
    workers: int | None = None          # processes; 0: none but this one; default: one for each core


def check(argv):
    """Prints the reason for each file that cannot be used; exit code 1 if there is one."""
    cfg = configure(CheckConfig, None, argv, positional="manifest")
    entries = read_manifest(cfg.manifest)
    reasons = [reason for reason in worked(inspect_entry, entries, cfg.workers, "files") if reason]
    print(*reasons, f"{cfg.manifest}: {len(entries)} files, {len(reasons)} of them cannot be used", sep="\n")
    if reasons:
        raise SystemExit(1)


def inspect_entry(entry):
    """-> what is wrong with an entry, or None."""
    try:
        # damage shows only where it is decoded
        for _ in read_frames(entry["path"], 64):
            pass
        load_labels(entry, (), 64)
    except BadVideo as error:
        return str(error)


@dataclass(frozen=True)
class LabelConfig:
    """Makes trajectory labels for real video: `_mask.npz` and `_graph.npz` beside each file."""
    source: str = ""                    # a folder of videos, a manifest or a CSV
    sam2: str | None = None             # folder of a published SAM2; without it, the classic method
    image_size: int = 224               # short side of the masks in pixels, 32 to 1024
    stretch: int = 48                   # frames from one key frame to the next, at most
    workers: int | None = None          # processes; 0: none but this one; default: one a core, for SAM2 0
    overwrite: bool = False             # replace labels that exist


def label(argv):
    """Labels every file that has no mask. A file that cannot be labelled is named and left out."""
    cfg = configure(LabelConfig, None, argv, positional="source")
    if not 32 <= cfg.image_size <= 1024 or cfg.stretch < 1:
        raise BadInput(f"--image-size {cfg.image_size} --stretch {cfg.stretch}: 32 to 1024, and at least 1")
    workers = cfg.workers
    if cfg.sam2:
        # A missing package or folder is an error before the work begins. By default all work is done in this
        # process, because each worker would load a SAM2 of its own.
        load_sam2(cfg.sam2)
        workers = workers or 0
    jobs = {}
    for entry in read_manifest(cfg.source):
        # a manifest may name other sidecars than those beside the video
        beside = sidecars(Path(entry["path"]))
        mask, graph = (Path(entry[kind] or path) for kind, path in beside.items())
        if mask in jobs:
            raise BadInput(f"{entry['path']} and {jobs[mask][1]}: both would have {mask}; rename one")
        if cfg.overwrite or not mask.exists():
            jobs[mask] = cfg, entry["path"], mask, graph
    results = worked(label_video, list(jobs.values()), workers, "videos")
    counts = [result for result in results if isinstance(result, int)]
    for reason in results:
        if isinstance(reason, str):
            print(f"left out: {reason}", file=sys.stderr)
    average = sum(counts) / max(len(counts), 1)
    print(f"labelled {len(counts)} of {len(jobs)} files to label, {average:.1f} trajectories each")
    if jobs and not counts:
        raise BadInput(f"{cfg.source}: no file could be labelled")


def label_video(job):
    """A file in a worker -> how many trajectories it has, or why it cannot be labelled."""
    cfg, path, mask, graph = job
    method = functools.partial(sam2_labels, cfg.sam2) if cfg.sam2 else classic_labels
    try:
        ids = label_frames(read_frames(path, cfg.image_size, whole=True), method, cfg.stretch)
        return write_labels(mask, graph, ids.numpy())
    except BadVideo as error:
        return str(error)


@one_line_errors
def main(argv=None):
    dispatch("data.py", __doc__, {"label": label, "make": make, "check": check}, argv)


if __name__ == "__main__":
    # As a script this file is the module __main__, whose BadInput is another class than that of `data`, which
    # other modules and worker processes import. So the imported module runs.
    import data
    data.main()
