"""Every test, on a CPU, without a network and without files of anybody else's (they make their own clips):

    pytest                                              # all of them, about four minutes on one core
    pytest -k "resume or hungarian"                     # some of them

Each test begins by saying which bug it catches. Oracles are slow and plain on purpose: loops, brute force,
cases worked out by hand. Real clips are used where the folder REAL (below) exists; without it those few tests
are skipped.
"""
import argparse
import cmath
import csv
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from einops import rearrange
from safetensors.torch import load_file, save_file

import data
import encoder
import segmenter
import train_adapter
import train_clip
import train_vlm
import trajtok
from data import BadInput, BadVideo

# The tensors here are tiny: a second thread would only wait for the first. One core, therefore, for the runs
# and processes that the tests start as well, which also makes their sums the same to the last bit.
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
torch.set_num_threads(1)

# PyTorch notes at the first such line which functions take a device. While transformers 5 loads a model, it
# puts another linspace in the place of torch's: were that one noted, meta would fail for good.
with torch.device("meta"):
    torch.linspace(0, 1, 2)

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real clips here")

# the smallest tokenizer that has every part; and flags that make a run of the scripts a matter of seconds
TINY = trajtok.TrajTokConfig(
    image_size=32, frames=2, dim=32, num_queries=6, depth=2, heads=2, depths=(1, 1, 1, 1),
    dims=(8, 16, 24, 32), out_dim=32)
SMALL = "--image-size 32 --frames 2 --batch 4 --steps 2".split()
CLIP = SMALL + ("--width 32 --heads 2 --layers 1 --text-layers 1 --text-width 32 --embed 16 --eval-clips 8 "
                "--probe-clips 32 --workers 0").split()

# -----------------------------------------------------------------------------------------------------------
# What several tests need
# -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def scripts(begin, count, world=data.World()):
    return [data.script(i, world) for i in range(begin, begin + count)]


def looks(s):
    """(shape id, colour id) of each object of a script, in painting order, read off its arrays."""
    table = np.array([data.rgb_of(colour) for colour in data.COLOURS.values()])
    rgb = s["rgb"][data.MAX_GROUNDS:][:s["count"], None]
    colours = abs(table - rgb).sum(-1).argmin(-1)
    return list(zip(s["shape"].tolist(), colours.tolist()))


def run(main, *argv):
    return main(list(map(str, argv)))


def refused(capsys, main, *argv):
    """Run a command that must refuse: exit code 2, the last line on stderr and no other begins with "error:",
    no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(main, *argv)
    *others, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and last.startswith("error: "), last
    # the others are progress bars and files that are left out
    assert all("%|" in line or "left out: " in line for line in others if line), others
    return last


def encode(path, frames, rate=10, codec="libx264", pixels="yuv420p", times=None, **options):
    """uint8 frames (t, H, W, 3) -> a video file, if nothing else is said with key frames every 12 and frames
    that refer to later ones. times: of the frames, in ms."""
    options = options or dict(crf=4, g=12, bf=2)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.options = {key.replace("_", "-"): str(value) for key, value in options.items()}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbered(path, count, **options):
    """A clip of 48 x 64 pixels whose frames tell their number in base 12: left half the twelves, right half
    the ones, as greys. options: those of `encode`."""
    frames = np.zeros((count, 48, 64, 3), np.uint8)
    for i in range(count):
        frames[i, :, :32] = 20 + 18 * (i // 12)
        frames[i, :, 32:] = 20 + 18 * (i % 12)
    return encode(path, frames, **options)


def numbers(video):
    """The numbers that decoded frames (t, s, s, 3) of such a clip tell."""
    third = video.shape[2] // 3
    greys = np.stack([video[:, :, :third], video[:, :, -third:]]).mean((2, 3, 4))
    twelves, ones = np.rint((greys - 20) / 18).astype(int)
    return (12 * twelves + ones).tolist()


def manifest(path, rows):
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of small files: six good clips, two pictures, and three that no decoder can read."""
    folder = tmp_path_factory.mktemp("media")
    for i, count in enumerate((24, 24, 30, 36, 24, 25)):
        numbered(folder / f"clip{i}.mp4", count)
    for i in range(2):
        data.write_png(folder / f"still{i}.png", np.full((40, 50, 3), 60 + 90 * i, np.uint8))
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    whole = (folder / "clip3.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[:len(whole) // 2])
    return folder


def entry(path, captions=None):
    """A video as read_manifest gives it."""
    nothing = dict.fromkeys(("label", "group", "split", "mask", "graph"))
    return nothing | dict(path=str(path), name=path.name, image=False, caption=captions)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def without_clock(lines):
    """Log lines without what the clock and the machine decide."""
    clock = {"clips_per_second", "data_wait", "memory_gb", "seconds"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


# -----------------------------------------------------------------------------------------------------------
# data.py: the procedural world
# -----------------------------------------------------------------------------------------------------------

CHAINS = data.World(64, 32, 4, shared_colours=False, acts=4)


def test_script_is_a_function_of_its_index():
    """Catches: a script that depends on what was made before it, or on the order of a set, which differs
    between two Python processes: a resumed run, or a worker, would see other clips."""
    code = f"from data import World, script; print(script(7), script(8, {CHAINS!r}))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(HERE)}
    there = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    np.random.seed(1)
    data.script(99, data.World(frames=16, acts=2))
    assert there.strip() == f"{data.script(7)} {data.script(8, CHAINS)}"


def paint_naively(s, size):
    """One clip, pixel by pixel and thing by thing -> video (T, size, size, 3) as floats, labels (T, size,
    size)."""
    shapes = data.atlas(torch.device("cpu"))
    labels = np.zeros((len(s["camera"]), size, size), int)
    video = np.zeros((*labels.shape, 3))
    for f, row, column in np.ndindex(labels.shape):
        px, py = (column + 0.5) / size, (row + 0.5) / size
        cx, cy, zoom = map(float, s["camera"][f])
        u = (px - 0.5) / zoom + 0.5 + cx
        v = (py - 0.5) / zoom + 0.5 + cy
        square = (math.floor(5 * u) + math.floor(5 * v)) % 2
        label, gain = 0, 1 - float(s["contrast"]) * square
        for j in range(s["count"]):
            x, y, r, angle = map(float, s["place"][j, f])
            # turned back, in radii
            own = complex(px - x, py - y) * cmath.exp(-1j * angle) / r
            if max(abs(own.real), abs(own.imag)) >= 1:
                continue
            across = int((own.real + 1) * data.CELLS / 2)
            down = int((own.imag + 1) * data.CELLS / 2)
            if shapes[s["shape"][j], down, across]:
                label, gain = data.MAX_GROUNDS + j, 1 + 0.25 * own.imag
        labels[f, row, column] = label
        video[f, row, column] = (s["rgb"][label] * gain * s["light"][f]).clip(0, 255)
    return video, labels


@pytest.mark.parametrize("world", (data.World(32, 3), dataclasses.replace(data.STAGE, frames=3)))
def test_pixels_and_labels_are_the_naive_painters(world):
    """Catches: a wrong camera, rotation or depth order, a thing of another's colour, a window that cuts its
    corners off, labels that are shifted against the pixels, pixels that depend on how many clips are painted
    at a time. A handful of pixels on a border may fall to the other side in float32."""
    chosen = sorted(scripts(data.VALIDATION, 20, world), key=lambda s: s["count"])
    video, labels = data.rasterise(data.stack(chosen), 32)
    for i in (0, 1, 2, 18, 19):
        painted, truth = paint_naively(chosen[i], 32)
        assert (labels[i].numpy() != truth).sum() <= 2
        assert (abs(video[i].numpy() - painted).max(-1) > 1.01).sum() <= 6
        alone, _ = data.rasterise(data.stack(chosen[i:i + 1]), 32)
        assert torch.equal(alone[0], video[i])


def test_splits_are_disjoint_and_the_subject_is_the_largest():
    """Catches: test clips or held-out combinations of shape and colour that occur in training, a held-out
    clip without one; two objects that words cannot tell apart; classes of a thing that is not the largest."""
    places = set()
    for begin in (data.TRAIN, 500_000_000, data.VALIDATION, data.TEST, data.HELDOUT):
        for s in scripts(begin, 200):
            places.add(s["place"].tobytes())
            pairs = looks(s)
            subject, *others = s["slots"]
            held = [colour == data.held_out_colour(shape) for shape, colour in pairs]
            assert held[subject] == (begin == data.HELDOUT)
            assert not any(held[j] for j in others)
            assert len(set(pairs)) == s["count"]
            assert pairs[subject] == (s["appearance"], s["colour"])
            radius = s["place"][:, :, 2]
            assert (radius[others] <= 0.7 * radius[subject]).all()
    assert len(places) == 1000


@pytest.mark.parametrize("name", ("appearance", "colour"))
def test_appearance_says_nothing_of_motion(name):
    """Catches: a shape or colour that favours a motion: then one probe could answer for the other. The
    chi-squared statistic of independent classes has the mean 9 x 10, and twice that as its variance."""
    table = np.zeros((10, len(data.MOTIONS)))
    for s in scripts(data.TRAIN, 2000):
        table[s[name], s["motion"]] += 1
    expected = np.outer(table.sum(1), table.sum(0)) / 2000
    assert ((table - expected) ** 2 / expected).sum() < 90 + 6 * math.sqrt(180)


def deed_told(s):
    """What a script's arrays show that its subject does, in the words of a caption of deeds alone."""
    # who is alone is its own companion
    subject, companion = (s["slots"] * 2)[:2]
    me, other = s["place"][[subject, companion]].astype(float)
    move, theirs = np.diff(me[:, :2], axis=0), np.diff(other[:, :2], axis=0)
    turned, grown = me[-1, 3] - me[0, 3], me[-1, 2] / me[0, 2]
    if abs(turned) > 1:
        return "spins clockwise" if turned > 0 else "spins anticlockwise"
    if abs(grown - 1) > 0.3:
        return "grows" if grown > 1 else "shrinks"
    if s["count"] > 1 and abs(theirs).max() > 1e-3:
        if move[0] @ theirs[0] < 0:
            return "bumps into {}"
        return "follows {}" if move[0] @ (other - me)[0, :2] > 0 else "leads {}"
    if abs(move[-1]).max() < 1e-4:
        return "moves up to {} and stops"
    if abs(move[0]).max() < 1e-4:
        return "moves away from {}"
    if s["count"] > 1 and np.linalg.norm(me[:, :2].mean(0) - other[0, :2]) < 1e-4:
        return "passes behind {}" if subject < companion else "passes in front of {}"
    if min(abs(move).max(0)) > 1e-3:
        turn = move[0, 0] * move[1, 1] - move[0, 1] * move[1, 0]
        return "circles clockwise" if turn > 0 else "circles anticlockwise"
    axis = abs(move).max(0).argmax()
    if np.ptp(np.sign(move[:, axis].round(3))) > 0:
        return ("bounces from side to side", "bounces up and down")[axis]
    ways = ("to the left", "to the right"), ("upwards", "downwards")
    return f"moves {ways[axis][int(move[0, axis] > 0)]}"


@pytest.mark.parametrize("reverse", (False, True))
def test_captions_of_deeds_are_what_the_arrays_show(reverse):
    """Catches: left for right, clockwise for anticlockwise, behind for in front, a companion that is another;
    of clips that run backwards the caption of the clip, or pixels that are not those of the clip
    backwards."""
    for index in range(300):
        s = data.script(index, dataclasses.replace(data.STAGE, reverse=reverse))
        subject, *others = (data.a(data.SHAPES[s["shape"][j]]) for j in s["slots"])
        doing, places = deed_told(s), s["place"][:s["count"], :, :2]
        # in view
        assert data.LOW - 1e-6 < places.min() and places.max() < data.HIGH + 1e-6
        if s["motion"] < 0:
            assert doing in ("moves away from {}", "leads {}")
        else:
            assert doing.startswith(data.VERBS[data.MOTIONS[s["motion"]]].split("|")[0])
        rest = f" with {others[0]}" if others and "{}" not in doing else ""
        assert s["caption"] == f"{subject} {doing}{rest}".format(*others)
        if reverse:
            forth = data.script(index, data.STAGE)
            np.testing.assert_array_equal(forth["place"][:, ::-1], s["place"])


def test_captions_tell_subject_deed_and_ground():
    """Catches: a caption about somebody else, or one that leaves out the deed or the ground."""
    for s in scripts(data.TRAIN, 200):
        subject = data.name_of((s["appearance"], s["colour"]))
        verbs = data.VERBS[data.MOTIONS[s["motion"]]].replace("{}", ".*")
        for told in (subject, s["ground"], verbs):
            assert re.search(rf"\b({told})\b", s["caption"]), (told, s["caption"])


def deed_seen(path, before):
    """What an object did, from its places (t, 4) in the frames of one act of a chain, and the one before
    it."""
    gone = path - before
    across, down = np.abs(gone[:, :2]).max(0)
    if np.ptp(np.append(path[:, 3], before[3])) > 1:
        return "spin"
    if min(across, down) > 0.05:
        return "circle"
    if max(across, down) < 0.05:
        return "swell" if path[:, 2].max() > 1.1 * before[2] else "shrink"
    if across > down:
        return "dart right" if gone[:, 0].sum() > 0 else "dart left"
    return "sink" if gone[:, 1].sum() > 0 else "rise"


@pytest.mark.parametrize("frames, acts, kinds", (
    (8, 1, {"first"}), (8, 2, {"first", "after"}), (32, 4, {"first", "after", "times"})))
def test_answers_to_stories_can_be_seen(frames, acts, kinds):
    """Catches: a question whose answer is not what the pixels show: deeds, their order and number, who leaves
    when and who comes back; an answer that is not among its options, or always in the same place."""
    asked, places = set(), set()
    world = data.World(64, frames, 4, shared_colours=False, acts=acts, story=True)
    for index, s in enumerate(scripts(0, 40, world)):
        slots, names = s["slots"], [data.name_of(look) for look in s["looks"]]
        assert [looks(s)[j] for j in slots] == s["looks"]
        place = s["place"][slots[0]].astype(float)
        deeds = []
        for act in np.split(np.arange(frames), acts):
            # an act begins where the one before it ended; the first one as the first ends, but for a spin
            before = place[act[0] - 1] if act[0] else np.append(place[act[-1], :3], place[0, 3])
            deeds.append(deed_seen(place[act], before))
        assert deeds == s["deeds"]
        _, labels = data.rasterise(data.stack([s]), 64)
        goes, back = {}, set()
        for name, j in zip(names, slots):
            seen = (labels[0] == data.MAX_GROUNDS + j).flatten(1).any(1)
            changes = seen.int().diff().tolist()
            if -1 in changes:
                goes[name] = changes.index(-1)
                if 1 in changes[goes[name]:]:
                    back.add(name)
        assert names[0] not in goes
        for qa in s["qa"]:
            question, options = qa["question"], qa["options"]
            # whom and what it names
            others = [name for name in names[1:] if name in question]
            follows = [b for a, b in itertools.pairwise(deeds) if f" {data.third(a)}?" in question]
            seen = dict(
                what=list(data.COLOURS)[s["colour"]],
                first=deeds[0],
                after="".join(follows[:1]),
                times=str(sum(f" {deed}?" in question for deed in deeds)),
                back=" ".join(back),
                again="yes" if back & set(others) else "no",
                order=min(others, key=goes.get, default=""))
            assert qa["answer"] == seen[qa["type"]], (index, qa)
            assert qa["answer"] in options and len(set(options)) == len(options)
            asked.add(qa["type"])
            places.add((len(options), options.index(qa["answer"])))
    assert asked == {"what", "again", "back", "order"} | kinds
    # of four
    assert places >= {(4, 0), (4, 1), (4, 2), (4, 3)}


def test_controls_are_what_one_frame_gives_away():
    """Catches: a judge that finds nothing where there is something, or a world that shows its motions in one
    frame."""
    found = data.known_controls(data.World(max_objects=4, shared_colours=False))
    assert 0.2 < found["control_last_frame"] < 0.45 < found["control_no_order"] < 0.85


@pytest.mark.parametrize("change", (dict(acts=3), dict(max_objects=9), dict(frames=0), dict(size=4)))
def test_impossible_worlds_are_refused(change):
    """Catches: a world that would end a training with a traceback, or show less than it was asked for."""
    with pytest.raises(BadInput, match=next(iter(change))):
        data.World(**change)


def test_world_batches():
    """Catches: batches that overlap or leave clips out, labels of another clip; a loader that draws from the
    run's generator when it starts, so that a resumed run's random choices are no longer those of the run that
    was never stopped."""
    world = data.World(size=32, frames=2)
    dataset, seen = data.WorldBatches(world, 3, range(data.TEST, data.HELDOUT)), []
    before = torch.get_rng_state()
    for batch in data.loader(dataset, 1, 4, workers=1):
        batch = data.finish(batch, "cpu")
        made = [data.script(i, world) for i in batch["index"]]
        assert batch["caption"] == [s["caption"] for s in made]
        assert batch["motion"].tolist() == [s["motion"] for s in made]
        _, labels = data.rasterise(data.stack(made), 32)
        assert torch.equal(batch["labels"], labels)
        seen += batch["index"]
    assert seen == list(range(data.TEST + 3, data.TEST + 12))
    assert torch.equal(before, torch.get_rng_state())


# -----------------------------------------------------------------------------------------------------------
# data.py: words
# -----------------------------------------------------------------------------------------------------------

def test_a_list_of_words_is_a_vocabulary():
    """Catches: a word of the list that is split, a word that is not of the list and does not come back; words
    that are not the most frequent ones."""
    texts = ["a red star, a red ring", "a star", "naïve café"]
    assert data.word_list(texts, 4) == [" red", " star", "a", " a"]
    encoding = data.word_encoding(data.word_list(texts), special=("<|endoftext|>", "<|x|>"))
    assert len(encoding.encode_ordinary("a red star")) == 3
    for text in (*texts, "a zebra", "Ünïcode\n✓ 123", "naïve naïv", "<|x|>"):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and max(ids) < encoding.n_vocab - 2
    world = data.load_encoding()
    for kind in (data.World(), CHAINS, data.STAGE):
        for s in scripts(5000, 300, kind):
            count = len(re.findall(data.WORDS, s["caption"]))
            assert len(world.encode_ordinary(s["caption"])) == count


def test_tokenize_round_trip_end_token_and_mask():
    """Catches: an end token that a long caption loses (the text encoder reads there), a mask that is inverted
    or one off."""
    encoding = data.load_encoding("world")
    end = encoding.eot_token
    for text in (data.script(0)["caption"], "", "Ünïcode\n✓ 123"):
        own = encoding.encode_ordinary(text)
        for length in (128, 4):
            ids, mask = data.tokenize(encoding, ["a", text], length)
            kept = own[:length - 1]
            assert ids[1].tolist() == kept + [end] * (length - len(kept))
            # True = a real token, the first end token too
            assert mask[1].tolist() == [i <= len(kept) for i in range(length)]


QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ hello", "1 2")


def byte_level(text):
    """How published vocabularies spell a token: printable bytes as themselves, the others as characters from
    256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in text)


def toy_vocabulary():
    # the order of the files: printable first
    tokens = sorted(byte_level(bytes([b])) for b in range(256))
    tokens += [merge.replace(" ", "") for merge in MERGES]
    return {token: i for i, token in enumerate(tokens)}


def toy_qwen(folder, **changes):
    """A folder with a tokenizer.json of Qwen's kind, its merges and special tokens; changes: other top-level
    entries."""
    vocabulary = toy_vocabulary()
    split = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    added = [{"id": len(vocabulary) + i, "content": token} for i, token in enumerate(train_vlm.SPECIAL)]
    spec = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, last]},
        "model": {"vocab": vocabulary, "merges": [merge.split() for merge in MERGES]},
        "added_tokens": added}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec | changes), encoding="utf-8")
    return data.load_encoding(str(folder))


def test_published_tokenizers(tmp_path):
    """Catches: ids that are not the file's, a split pattern that is not read, text that is not composed first
    or becomes a special token."""
    vocabulary = toy_vocabulary()
    qwen = toy_qwen(tmp_path)
    plain = {"type": "ByteLevel", "add_prefix_space": False}
    gpt = toy_qwen(tmp_path / "gpt", normalizer=None, pre_tokenizer=plain)
    spelt = [vocabulary[token] for token in ("hello", "Ġhello", "Ġ", "12")]
    assert gpt.encode_ordinary("hello hello 12") == spelt
    # a digit each, though there is a merge
    assert qwen.encode_ordinary("12") == [vocabulary["1"], vocabulary["2"]]
    composed = [vocabulary[byte_level(bytes([b]))] for b in "é".encode()]
    assert qwen.encode_ordinary_batch(["e\u0301"]) == [composed] == [qwen.encode_ordinary("e\u0301")]
    assert qwen.eot_token == len(vocabulary) and qwen.encode_ordinary("<|im_end|>")[0] < 256
    whole = "".join(map(chr, range(0x20, 0x2000)))
    assert gpt.decode(gpt.encode_ordinary(whole)) == whole


def test_tokenizers_give_the_ids_of_the_published_implementation(tmp_path):
    """Catches: a split pattern, a normal form, a byte map or merges that differ anywhere from what the
    published program does with the same file."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    ours, dice = toy_qwen(tmp_path), np.random.default_rng(1)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    spec["model"]["type"] = "BPE"
    for token in spec["added_tokens"]:
        token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token["special"] = True
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # blanks of every kind, contractions, digits, marks that compose, scripts, pictures
    pieces = [*" \n\r\t'.,!?-_09abcdefghijABsStTlLvVeEmMdD", "'s", "'LL", "'re", " the", " red", "square",
              "\r\n", " \n", "  ", *"\u0085\u2028\u00a0\u3000\x1c\x0b\u200b½²٣Ⅷ漢字👍\U0001d15e",
              "e\u0301", "\u212b", "\u1100\u1161", "\u0323\u0307"]
    for _ in range(1000):
        text = "".join(dice.choice(pieces, int(dice.integers(1, 30))))
        assert theirs.encode(text).ids == ours.encode_ordinary(text), ascii(text)


@pytest.mark.parametrize("words, change", (
    ("Metaspace", dict(pre_tokenizer={"type": "Metaspace"})),
    ("normalizer", dict(normalizer={"type": "Lowercase"})),
    ("add_prefix_space", dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})),
    ("order of their ids", dict(model={"vocab": toy_vocabulary(), "merges": [["l", "l"], ["h", "e"]]})),
    ("published", dict(model={"vocab": [["a", -1.5]]}))))
def test_tokenizers_that_would_be_read_wrongly_are_refused(tmp_path, words, change):
    """Catches: a tokenizer whose steps are other ones, which would give ids, only not the model's; a
    traceback for one of another kind."""
    with pytest.raises(BadInput, match=words):
        toy_qwen(tmp_path, **change)


# -----------------------------------------------------------------------------------------------------------
# data.py: flags
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Flags:
    """Something to configure."""
    clip: "str" = ""                # a file
    size: "str" = "nano"            # one of them
    steps: "int" = 10               # how many, 100 % of them


def test_help_shows_the_defaults_of_the_size_asked_for(capsys):
    """Catches: a --help that shows the default of another size, or a flag that loses against its size."""
    configure = functools.partial(data.configure, Flags, {"nano": {}, "large": {"steps": 77}})
    with pytest.raises(SystemExit):
        configure(["--help", "--size", "large"], "clip")
    text = capsys.readouterr().out
    assert "(default: 77)" in text and "100 % of them" in text
    for argv, size, steps in (("--size large", "large", 77), ("--steps 3 --size large", "large", 3)):
        assert configure(["a.mp4", *argv.split()], "clip") == Flags("a.mp4", size, steps)


# -----------------------------------------------------------------------------------------------------------
# data.py: decoding
# -----------------------------------------------------------------------------------------------------------

def check_against_everything(path, slack=0):
    """Every frame that `decode` gives is the one that a decoder that decodes everything shows at that time;
    spread frames are on screen in the middles of equal parts, to within `slack` frames."""
    times, images = [], []
    with av.open(str(path)) as file:
        for n, frame in enumerate(file.decode(video=0)):
            counted = frame.pts is None or file.format.name == "avi"
            times.append(n / float(file.streams.video[0].average_rate) if counted else frame.time)
            images.append(data.upright(frame, 16))
    times, images = np.array(times) - times[0], np.stack(images)
    with data.opened(path) as stream:
        rate, count = data.rate_of(stream), data.frame_count(stream)
    for frames, start, stride in ((16, None, 1), (3, None, 1), (6, 0.0, 4), (5, 0.61, 3), (3, 1.0, 1)):
        frames = min(frames, len(times))
        video, seen = data.decode(path, frames, 16, start, stride)
        where = np.abs(times[None] - seen[:, None]).argmin(1)
        np.testing.assert_allclose(times[where], seen, atol=1e-6)
        assert np.array_equal(video, images[where]), (frames, start, stride)
        if start is None:
            middles = (np.floor((np.arange(frames) + 0.5) * count / frames) + 0.5) / rate
            assert np.abs(where - np.searchsorted(times, middles + 1e-9, "right") + 1).max() <= slack
    assert np.array_equal(np.concatenate(list(data.read_frames(path, 16))), images)
    np.testing.assert_allclose(data.frame_times(path), times, atol=1e-6)


VARIABLE = np.cumsum(np.random.default_rng(0).choice([20, 40, 100, 400], 130)) + 700


@pytest.mark.parametrize("name, codec, options", (
    ("one_group.mp4", "libx264", dict(crf=4, g=250, bf=3, x264_params="scenecut=0")),
    ("open.mp4", "libx264", dict(crf=4, g=20, bf=3, x264_params="open-gop=1")),
    ("refresh.mkv", "libx264", dict(crf=4, g=24, intra_refresh=1)),
    ("open.ts", "libx264", dict(crf=4, g=20, bf=3, refs=1, x264_params="open-gop=1:ref=1:b-pyramid=none")),
    ("ten_bits.mov", "libx264", dict(crf=4, g=12, pixels="yuv420p10le")),
    ("hevc.mp4", "libx265", dict(crf=4, x265_params="keyint=20:bframes=3:log-level=none")),
    ("vp9.webm", "libvpx-vp9", dict(crf=4, auto_alt_ref=1, lag_in_frames=16, g=24, cpu_used=8)),
    ("divx.avi", "mpeg4", dict(qmin=1, qmax=2, g=12, bf=2)),
    ("flash.flv", "libx264", dict(crf=4, g=12, bf=2)),
    ("variable.mp4", "libx264", dict(crf=4, g=24, bf=2, times=VARIABLE)),
    ("variable.mkv", "libx264", dict(crf=4, g=250, bf=3, times=VARIABLE))))
def test_every_form_of_a_stream_gives_the_frames_of_a_plain_decoder(tmp_path, name, codec, options):
    """Catches: a frame taken for its neighbour where frames are stored in another order than shown, decoding
    from a key frame behind the frame, frames taken by their number where they stay for different times."""
    path = numbered(tmp_path / name, 130, codec=codec, **options)
    # FLV does not say how many frames it holds, and its length counts from 0, where its first frame is not
    check_against_everything(path, slack=3 if name == "flash.flv" else 0)
    if name == "one_group.mp4":
        assert numbers(data.decode(path, 4, 16)[0]) == [16, 48, 81, 113]


@pytest.mark.parametrize("name", ("long.mp4", "long.mkv", "long.ts"))
def test_far_frames_are_sought(tmp_path, monkeypatch, name):
    """Catches: seeking that is dropped, so that hours of film are decoded for one frame; a seek that lands
    behind the frame, or a jump back for each of two frames that lie close together."""
    path, plain, decoded = numbered(tmp_path / name, 140, rate=2), data.in_order, []

    def counting(*args):
        for seconds, frame in plain(*args):
            decoded.append(seconds)
            yield seconds, frame
    monkeypatch.setattr(data, "in_order", counting)
    for wanted, most, args in (([35, 105], 80, ()), ([122, 124, 126], 45, (0.9, 2)), ([0, 1, 2], 4, (0.0,))):
        decoded.clear()
        assert numbers(data.decode(path, len(wanted), 16, *args)[0]) == wanted
        assert len(decoded) <= most


def test_turned_videos_stand_upright(tmp_path):
    """Catches: a phone's rotation that is ignored, or applied the wrong way round. The track header's
    matrix is overwritten: (x, y) -> (-y, x), a quarter turn clockwise, so what was top left is shown top
    right."""
    frames = np.full((4, 48, 64, 3), 30, np.uint8)
    frames[:, :24, :32] = 220                                   # top left
    raw = encode(tmp_path / "lying.mp4", frames).read_bytes()
    at = raw.index(b"tkhd") + 44
    for (a, b, c, d), place in (((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)), ((0, -1, 1, 0), (1, 0))):
        matrix = b"".join((n << 16).to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0))
        turned = raw[:at] + matrix + (1 << 30).to_bytes(4, "big") + raw[at + 36:]
        (tmp_path / "turned.mp4").write_bytes(turned)
        image = data.decode(tmp_path / "turned.mp4", 1, 16)[0][0].astype(float).mean(-1)
        quarters = image.reshape(2, 8, 2, 8).mean((1, 3))
        assert np.unravel_index(quarters.argmax(), (2, 2)) == place


def test_pictures_are_clips_of_one_frame(tmp_path):
    """Catches: a picture refused as a video of no length, a crop that is not where it was asked for, and
    whatever colour lies below transparent pixels."""
    # transparent black, and a central square, whose lower half is blue at a quarter
    image = np.zeros((32, 96, 4), np.uint8)
    image[:16, 32:64], image[16:, 32:64] = (250, 100, 50, 255), (0, 0, 255, 64)
    with av.open(str(tmp_path / "wide.png"), "w", format="image2") as file:
        stream = file.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 32, 96, "rgba"
        file.mux([*stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")), *stream.encode()])
    video, times = data.decode(tmp_path / "wide.png", 1, 16)
    assert video.shape == (1, 16, 16, 3) and times.tolist() == [0]
    assert abs(video[0, 2:6, 2:-2].astype(int) - (250, 100, 50)).max() < 12
    assert abs(video[0, 10:, 2:-2].astype(int) - (191, 191, 255)).max() <= 2
    assert data.decode(tmp_path / "wide.png", 1, 16, crop=1.0)[0].min() > 250


@pytest.fixture(scope="module")
def broken(media, tmp_path_factory):
    """Files that cannot be used -> words of the reason."""
    folder = tmp_path_factory.mktemp("broken")
    mkv = numbered(folder / "long.mkv", 120).read_bytes()
    (folder / "cut.mkv").write_bytes(mkv[:len(mkv) // 2])
    parts = [encode(folder / f"{side}.ts", np.full((12, side, 64, 3), side, np.uint8)) for side in (48, 96)]
    (folder / "sizes.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux([*stream.encode(sound), *stream.encode()])
    return {folder / "none.mp4": "No such file", folder: "directory",
            media / "text.mp4": "cannot be decoded",
            media / "empty.mp4": "cannot be decoded", media / "half.mp4": "cannot be decoded",
            folder / "cut.mkv": "end at", folder / "sizes.ts": "the size of its frames changes",
            folder / "sound.mp4": "no video"}


def test_sound_may_be_longer_than_the_picture(tmp_path):
    """Catches: an MKV file that is refused, or read beyond its last frame, because its sound goes on."""
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        picture = file.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        sound = file.add_stream("aac", rate=8000, layout="mono")
        for _ in range(10):
            file.mux(picture.encode(av.VideoFrame(64, 48, "yuv420p")))
        file.mux(picture.encode())
        for i in range(16):                                     # two seconds
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            file.mux(sound.encode(frame))
    assert data.decode(tmp_path / "a.mkv", 2, 16)[1].tolist() == [0.2, 0.7]


def test_files_that_cannot_be_used_are_bad_videos(media, broken):
    """Catches: a traceback, or frames repeated in silence, where a file is damaged or short."""
    reasons = broken | {media / "clip0.mp4": "has 24 frames, fewer than the 25"}
    for path, words in reasons.items():
        # the frames of sizes.ts that `decode` looks at have one size
        if path.name != "sizes.ts":
            with pytest.raises(BadVideo, match=words):
                data.decode(path, 25, 8)
    assert numbers(data.decode(media / "clip0.mp4", 24, 16)[0]) == list(range(24))


@real
def test_real_clips_decode_as_a_decoder_that_decodes_everything():
    """Catches: seeking, frame counts and time stamps that hold only for files of our own making."""
    # every fourth clip: all of them take a minute
    for path in sorted((REAL / "clips").glob("*.mp4"))[::4]:
        check_against_everything(path)
    for row in csv.DictReader(open(REAL / "odd" / "odd.csv", newline="")):
        path = REAL / "odd" / row["file"]
        if row["result"] == "ok" and "truncated" not in row["file"]:
            check_against_everything(path, slack=9 if row["vfr"] == "True" else 1)
        else:
            with pytest.raises(BadVideo) as error:
                data.decode(path, 2, 16)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


# -----------------------------------------------------------------------------------------------------------
# data.py: sidecar labels
# -----------------------------------------------------------------------------------------------------------

def test_sidecar_labels_are_the_naive_look_up(tmp_path):
    """Catches: ids that wrap at 256, trajectories that are mixed up between frames, labels of another frame
    where the rate is variable, an object that no trajectory owns, a crop that is not the video's: of
    12 x 16 pixels to 6, the pixel (i, j) is the mask's (2i+1, 2j+3)."""
    mask = np.random.default_rng(0).choice(np.array([0, 1, 7, 255, 256, 300, 65535], np.uint16), (5, 12, 16))
    graph = np.array([[1, 0, 300, 7, 1], [0, 256, 256, 0, 255], [300, 300, 0, 65535, 0], [300, 0, 0, 0, 0]])
    np.savez(tmp_path / "v_mask.npz", mask)
    np.savez(tmp_path / "v_graph.npz", tensor=graph)
    numbered(tmp_path / "v.mp4", 5, times=[0, 60, 200, 260, 400], crf=4)
    batch = data.VideoBatches(data.read_manifest(tmp_path), 4, 6, 1, train=False)[0]
    labels = batch["labels"][0]
    np.testing.assert_allclose(batch["times"][0], [0, 0.06, 0.26, 0.4], atol=1e-3)
    assert labels.dtype == torch.int64 and labels.shape == (4, 6, 6)
    for (i, f), row, column in itertools.product(enumerate((0, 1, 3, 4)), range(6), range(6)):
        object_id = mask[f, 2 * row + 1, 2 * column + 3]
        found = [m for m in range(4) if object_id and graph[m, f] == object_id]
        assert labels[i, row, column] == (found[0] if found else -1)


WHOLE = np.ones((8, 8, 8), np.uint8)


@pytest.mark.parametrize("mask, frames", ((None, 8), (WHOLE, 0), (b"no labels", 8), (WHOLE[0], 8),
                                          (WHOLE.astype(float), 8), (WHOLE, 7), (WHOLE.repeat(4, 0), 32)))
def test_sidecars_that_do_not_fit_are_named(tmp_path, capsys, mask, frames):
    """Catches: one damaged label file that stops a run or is trained on, half a pair that is not noticed,
    labels of another video."""
    encode(tmp_path / "v.mp4", np.zeros((8, 48, 48, 3), np.uint8))
    if isinstance(mask, bytes):
        (tmp_path / "v_mask.npz").write_bytes(mask)
    elif mask is not None:
        np.savez(tmp_path / "v_mask.npz", mask)
    if frames:
        np.savez(tmp_path / "v_graph.npz", tensor=np.ones((1, frames), int))
    with pytest.raises(SystemExit) as stop:
        run(data.main, "check", tmp_path, "--workers", 0)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and len(lines) == 2 and ".npz" in lines[0]


# -----------------------------------------------------------------------------------------------------------
# data.py: manifests
# -----------------------------------------------------------------------------------------------------------

ROWS = [{"video": "run/a.mp4", "caption": "somebody runs", "label": "run"},
        {"video": "sit/b.mp4", "caption": "two lines:\none and two", "label": "sit"}]
TABLE = 'path,caption,label\nrun/a.mp4,somebody runs, run\nsit/b.mp4,"two lines:\none and two",sit\n'


@pytest.mark.parametrize("name, content", (
    ("m.json", "\ufeff" + json.dumps(ROWS, indent=1)), ("m.jsonl", "\n\n".join(map(json.dumps, ROWS))),
    ("m.csv", "\ufeff" + TABLE), ("m.CSV", TABLE.replace("\n", "\r\n").replace(":\r\n", ":\n")),
    ("m.csv", TABLE.replace(",", ";")), ("m.tsv", TABLE.replace(",", "\t")),
    *(("m.csv", TABLE.replace("path,caption,label", names)) for names in
      ("video,text,class", "filename,sentence,action", "File,Caption,Label", "video_path,text,Class"))))
def test_forms_of_a_manifest_that_people_write(tmp_path, name, content):
    """Catches: " walking" and "walking" as two classes, an upper-case suffix, tabs, a byte-order mark,
    line ends or quoted line breaks that lose rows, column names that are not known."""
    (tmp_path / name).write_bytes(content.encode())
    for entry, row in zip(data.read_manifest(tmp_path / name), ROWS, strict=True):
        assert entry["name"] == row["video"] and entry["caption"] == [row["caption"]]
        assert entry["label"] == row["label"] and entry["split"] is None


def test_rows_without_a_header(tmp_path):
    """Catches: the first clip of Kinetics' `path,label` and V-JEPA's `path label` taken for a header."""
    for separator in (",", " ", "\t"):
        (tmp_path / "m.csv").write_text(f'a.mp4{separator}3\n"b c.mp4"{separator}video\n')
        a, b = data.read_manifest(tmp_path / "m.csv")
        assert (a["name"], a["label"], b["name"], b["label"]) == ("a.mp4", "3", "b c.mp4", "video")


def test_rows_of_one_file_are_one_clip(tmp_path):
    """Catches: one clip twice among the candidates, so that a perfect model finds half of them."""
    def talk(text, **more):
        return [{"from": "human", "value": text, **more}, {"from": "gpt", "value": "a dog"}]

    # "colour" of somebody's own is not the class of a made clip
    rows = [{"video": "a.mp4", "caption": "one", "colour": 3, "motion": True}, {"video": "b.mp4"},
            {"video": "./x/../a.mp4", "caption": ["two", "one"], "label": 3},
            {"video": "b.mp4", "conversations": talk("Look at<video>and say.", type="what")},
            {"video": "b.mp4", "conversations": talk("<video>\nHow many?")}]
    a, b = data.read_manifest(manifest(tmp_path / "m.json", rows))
    assert a["caption"] == ["one", "two"] and a["label"] == "3" and b["caption"] is None
    assert "colour" not in a and "motion" not in a
    talks = [[(turn["question"], turn["answer"]) for turn in turns] for turns in b["conversations"]]
    assert talks == [[("Look at and say.", "a dog")], [("How many?", "a dog")]]
    assert b["conversations"][0][0]["type"] == "what"


def test_folders_of_classes(tmp_path):
    """Catches: splits or deeper folders taken for the label, macOS's litter taken for clips, links that
    are not followed, or that are followed for ever because they lead to a folder above them."""
    for name in ("set/train/run/day 1/a.mp4", "set/val/run/b.MP4", "set/test/c.webm", "elsewhere/sit/f.mp4",
                 "set/train/.hidden/d.mp4", "set/__MACOSX/e.mp4", "set/train/run/._a.mp4", "set/notes.txt",
                 "set/train/run/thumb.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "set/train/sit").symlink_to(tmp_path / "elsewhere/sit")
    (tmp_path / "set/train/run/back").symlink_to(tmp_path / "set")
    rows = [row for _, row in data.folder_rows(tmp_path / "set")]
    assert [(row["video"], row["label"], row["split"]) for row in rows] == [
        ("test/c.webm", None, "test"), ("train/run/day 1/a.mp4", "run", "train"),
        ("train/sit/f.mp4", "sit", "train"), ("val/run/b.MP4", "run", "val")]


def test_a_manifest_decides_what_is_held_out(tmp_path):
    """Catches: a "split" that is ignored; 28 clips called <id>/rgb.mp4 of which one is trained on; a clip
    that is tested on after it was trained on, because others were added."""
    splits = enumerate(("train", "val", "valid", "test", None))
    rows = [{"video": f"{i}/rgb.mp4", "split": split} for i, split in splits]
    train, test = data.split(data.read_manifest(manifest(tmp_path / "m.json", rows)))
    assert [e["name"][0] for e in train] == ["0", "4"] and [e["name"][0] for e in test] == ["1", "2", "3"]
    for n in (2, 3, 7, 28, 400):
        rows = [{"video": f"{i}/rgb.mp4"} for i in range(n)]
        entries = data.read_manifest(manifest(tmp_path / "m.json", rows))
        train, test = data.split(entries)
        assert len(train) + len(test) == n and max(min(n, 24) // 6, 1) <= len(test) <= n / 2
        assert data.split(entries[::-1])[1] == test[::-1]
    fewer = {e["name"] for e in data.split(entries[:300])[1]}
    assert fewer <= {e["name"] for e in test}
    assert 4700 < len(data.split([dict(name=str(i), split=None) for i in range(40_000)])[1]) < 5300
    # a name on disk need not be a text
    assert data.split([dict(name=name, split=None) for name in ("caf\udce9.mp4", "b.mp4")])
    with pytest.raises(BadInput, match="at least one of each"):
        data.split(train[:1])


def one(**more):
    """A manifest of one clip."""
    return json.dumps([{"video": "a.mp4", **more}])


@pytest.mark.parametrize("name, content, words", (
    ("m.json", "[]", "no entries"), (".", None, "no entries"), ("nothing.json", None, "cannot be read"),
    ("m.json", '[{"video": "a.mp4"},\n]', "line 2"), ("m.json", '[{"video": "a.mp4"}, 7]', "entry 2: "),
    ("m.json", one(caption=3), "entry 1"), ("m.json", one(caption=["x", " "]), "none empty"),
    ("m.json", one(split="dev"), "'dev'"), ("m.json", one(qa=[{"question": "x"}]), "entry 1.*answer"),
    ("m.json", one(conversations=[{"from": "human", "value": "<video>"}]), "entry 1"),
    ("m.json", one(conversations=[{"from": x, "value": x} for x in ("system", "human")]), 'goes "human"'),
    ("m.json", one(qa=[{"question": "x", "answer": 3}]), "answers are texts"),
    ("m.json", one(label=["x", "y"]), "the name of one class"),
    ("m.json", one(qa=[{"question": "x", "answer": "y", "options": ["z"]}]), "options"),
    ("m.jsonl", f"{one(label='x')[1:-1]}\n{one(label='y')[1:-1]}", "line 2: \"label\" is 'y'"),
    ("m.jsonl", '{"video": "a.mp4"}\n{"video": "b.mp4"}\n{oops\n', "line 3"),
    ("m.csv", b"a.mp4,2\ncaf\xe9.mp4,1\n", "utf-8"), ("m.csv", '"a.mp4,1\n', "unexpected end"),
    ("m.csv", "clip,words\na.mp4,x\n", "a header of clip, words.*one of video, path"),
    ("m.csv", "path,class,label\na.mp4,1,x\n", "a header of path, class, label.*each once"),
    ("m.csv", "path,label\na.mp4\n", "line 2: 1 cells, not 2"), ("m.csv", "a, b.mp4,1\n", "header")))
def test_wrong_manifests_are_refused_in_one_line(tmp_path, capsys, name, content, words):
    """Catches: a traceback, or a message that does not tell where and what is wrong."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(capsys, data.main, "check", tmp_path / name)
    assert re.search(words, message) and str(tmp_path) in message


# -----------------------------------------------------------------------------------------------------------
# data.py: batches
# -----------------------------------------------------------------------------------------------------------

def same(a, b):
    return a["index"] == b["index"] and a["caption"] == b["caption"] and torch.equal(a["video"], b["video"])


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_batches_are_full_and_a_function_of_seed_and_number(media):
    """Catches: nine clips at batch 8 that give every second step a single clip and a contrastive loss of
    0; a clip twice in one batch; workers, processes or history that change a batch; epochs that forget
    clips; captions that are never drawn."""
    entries = [entry(media / f"clip{i}.mp4", [f"clip {i} {word}" for word in "abc"]) for i in range(5)]
    batches = functools.partial(data.VideoBatches, entries, 3, 16)
    dataset = batches(4, seed=1)
    alone = list(data.loader(dataset, 0, 10))
    assert all(map(same, alone, data.loader(batches(4, seed=1), 0, 10, workers=2)))
    for rank in (0, 1):
        assert all(map(same, alone[2 + rank::2], data.loader(dataset, 1, 5, rank=rank, processes=2)))
    assert all(len(set(batch["index"])) == 4 for batch in alone)
    counts = np.bincount([j for batch in alone for j in batch["index"]])
    assert counts.sum() == 40 and counts.min() >= 6
    assert len({text for batch in alone for text in batch["caption"]}) > 12
    assert not same(batches(4, seed=2)[0], alone[0])
    assert sorted(batches(9)[3]["index"]) == [0, 1, 2, 3, 4]
    last = batches(4, train=False)[1]
    assert (last["index"], last["caption"]) == ([4], ["clip 4 a"])


def test_clips_are_windows_or_spread(media):
    """Catches: a flag that does nothing: long videos of which training only ever sees a window."""
    def frames(i, **options):
        batches = data.VideoBatches([entry(media / "clip3.mp4")], 3, 16, 1, **options)
        return numbers(batches[i]["video"][0].numpy())

    assert frames(0, stride=0) == frames(0, train=False) == [6, 18, 30]
    steps = {tuple(np.diff(frames(i, stride=3))) for i in range(20)}
    assert steps == {(1, 1), (2, 2), (3, 3)}


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_a_bad_file_is_named_counted_and_replaced(media, broken, capsys):
    """Catches: a bad file that stops a run, makes a batch smaller, moves other batches, or is named at
    each step; a clip shorter than what is asked for that stops a run."""
    bad = [entry(path) for path, words in broken.items() if words in ("cannot be decoded", "no video")]
    entries = [entry(media / f"clip{i}.mp4") for i in range(6)] + bad
    # three of the clips have 25 frames
    dataset, damage = data.VideoBatches(entries, 25, 16, 3, seed=4), data.Damage()
    for batch in data.loader(dataset, 0, 8):
        assert len(batch["video"]) == len(set(batch["index"])) == 3
        damage.add(batch["bad"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(damage) == len(bad) + 3
    assert sum("has 24 frames" in line for line in lines) == 3
    for workers in (0, 1):
        with pytest.raises(BadInput, match=r"\Anone of the 4 files can be used; the last: .*/.*\Z"):
            list(data.loader(data.VideoBatches(bad, 3, 16, 3), 0, 1, workers))


@pytest.mark.filterwarnings("ignore:This DataLoader", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_without_shared_memory_ends(monkeypatch):
    """Catches: a training that waits for ever, or for hours, in a container with a small /dev/shm."""
    assert 60 <= data.PATIENCE <= 600
    monkeypatch.setattr(data, "PATIENCE", 2)
    # without a time-out the loader never ends
    signal.alarm(60)
    with pytest.raises(BadInput, match="for 2 s, .*/dev/shm"):
        # a batch that cannot be pickled never leaves its worker
        list(data.loader([lambda: None] * 3, 0, 3, workers=1))
    signal.alarm(0)


@pytest.mark.parametrize("shares", ((1, 1), (0.05, 0.6, 0.3, 0.05)))
def test_mixtures_keep_their_shares(shares):
    """Catches: a share that drifts, a set whose batches are repeated or left out, processes that draw from
    different sets in one step."""
    sets = [[(j, number) for number in range(4000)] for j in range(len(shares))]
    mixed = data.Mixed(sets, shares, seed=3)
    pairs = data.Mixed(sets, shares, seed=3, processes=2)
    counts = np.zeros(len(shares), int)
    for i in range(2000):
        j, number = mixed[i]
        assert number == counts[j]
        for rank in (0, 1):
            assert pairs[2 * i + rank] == (j, 2 * number + rank)
        counts[j] += 1
        assert abs(counts - (i + 1) * np.array(shares) / sum(shares)).max() < len(shares)


def test_augment_changes_all_frames_alike_and_labels_with_them():
    """Catches: a crop or flip of its own for each frame, labels that stay where the pixels were, a change
    that is not the seed's. Four areas, darker to lighter, one of them unlabelled: after any crop, flip
    and colour change each label still has one grey, and the greys have the same order."""
    areas = torch.zeros(24, 3, 40, 40, dtype=torch.int64)
    areas[..., 22:] += 1
    areas[:, :, 17:] += 2
    video = (50 + 40 * areas)[..., None].expand(-1, -1, -1, -1, 3).byte()
    out, moved = data.augment(video, areas - 1, seed=5)
    for grey, labels in zip(out[..., 0].float(), moved):
        assert torch.equal(grey, grey[:1].expand(3, -1, -1))
        assert torch.equal(labels, labels[:1].expand(3, -1, -1))
        # medians: near the borders the filter blends
        greys = [grey[labels == label].median() for label in labels.unique()]
        assert greys == sorted(greys)

    # half of the clips are mirrored: the area at the right is now at the left; and different crops
    assert 3 < (moved[:, 0, 0, 0] % 2 < moved[:, 0, 0, -1] % 2).sum() < 19
    assert (moved >= 1).float().mean((1, 2, 3)).std() > 0.05
    again, other = (data.augment(video, areas - 1, seed=seed)[0] for seed in (5, 6))
    assert torch.equal(out, again) and not torch.equal(out, other)
    # as a training gets it: with a seed, and never for made clips, which have the key "motion"
    for more, seed, expected in (({}, 5, out), ({}, None, video), (dict(motion=0), 5, video)):
        batch = data.finish(dict(video=video, labels=areas - 1, **more), "cpu", seed)
        assert torch.equal(batch["video"], expected)


def test_open_data(media, tmp_path, monkeypatch):
    """Catches: --val that is not what is held out, or holds files that are trained on; pictures in one
    batch with videos; a mixture that leaves a set out."""
    monkeypatch.chdir(tmp_path)
    clips = [{"video": str(media / f"clip{i}.mp4"), "caption": f"clip {i}"} for i in range(6)]
    stills = [{"image": str(media / f"still{i}.png"), "caption": "still"} for i in range(2)]
    manifest(tmp_path / "a.json", clips[:4] + stills)
    manifest(tmp_path / "val.json", clips[4:])
    asked = functools.partial(train_clip.ClipConfig, batch=2, frames=2, image_size=32, eval_clips=4)
    train, held_out = data.open_data(asked(data="world,a.json", mix="1,3", val="val.json"))
    lengths = [train[i]["video"].shape[1] for i in range(24) if "video" in train[i]]
    assert len(lengths) == 18 and abs(lengths.count(1) - 6) <= 1
    assert held_out[0]["caption"] == held_out.captions() == ["clip 4", "clip 5"]
    assert {"clip 0", "still"} <= set(train.captions()) and "clip 4" not in train.captions()
    with pytest.raises(BadInput, match="in --val"):
        data.open_data(asked(data="a.json", val="a.json"))


@pytest.mark.parametrize("form", ("table.csv", "."))
def test_own_data_trains(media, tmp_path, form):
    """Catches: a form that can be read but not trained on: three steps, a bad file among the clips, an
    evaluation. In a folder, labels are captions."""
    table = ["path,text,split"]
    names = [f"{'train' if i < 4 else 'val'}/run {i}/clip{i}.mp4" for i in range(6)]
    for name in names + ["train/x/text.mp4"]:
        target = tmp_path / name
        target.parent.mkdir(parents=True)
        shutil.copy(media / target.name, target)
        table.append(f"{name},{target.stem} runs,{name.split('/')[0]}")
    if form == "table.csv":
        (tmp_path / form).write_text("\n".join(table))
    flags = ["--steps", 3, "--name", "own", "--text", "world", "--out", tmp_path / ".out"]
    run(train_clip.main, *CLIP, *flags, "--data", tmp_path / form)
    folder = tmp_path / ".out/clip-own"
    assert [line["clips"] for line in log(folder) if "contrastive" in line] == [4, 4, 4]
    assert read_result(folder)["clips"] == 2


# -----------------------------------------------------------------------------------------------------------
# data.py: make and check
# -----------------------------------------------------------------------------------------------------------

def test_a_made_folder_holds_what_the_world_shows(tmp_path, capsys):
    """Catches: labels that are shifted, renumbered or lost by the codec or the sidecars, captions, classes
    or questions of another clip, a seed that makes other clips than a training of that seed sees."""
    out = tmp_path / "wörld with spaces"
    assert "--clips 0" in refused(capsys, data.main, "make", "--clips", 0)
    assert "cannot be written" in refused(capsys, data.main, "make", "--out", __file__)
    run(data.main, "make", "--clips", 4, "--out", out, "--seed", 3, "--image-size", 32, "--frames", 4,
        "--workers", 0)
    made = data.VideoBatches(data.read_manifest(out), 4, 32, 4, train=False)[0]
    live = data.WorldBatches(data.World(32, 4, 4, False), 4, range(30_000_000, 40_000_000))
    live = data.finish(live[0], "cpu")
    assert not made["bad"] and torch.equal(made["labels"], live["labels"])
    assert (made["video"].int() - live["video"].int()).abs().max() <= 2
    assert made["caption"] == live["caption"] and made["qa"] == live["qa"]
    assert all(torch.equal(made[key], live[key]) for key in ("appearance", "colour", "motion"))


def test_check_names_every_bad_file(media, broken, tmp_path, capsys):
    """Catches: a bad file that is not found, or shares its line; a good or a short one that is called
    bad; an exit code that says the opposite."""
    good = [media / "clip0.mp4", media / "still0.png", numbered(tmp_path / "short.mp4", 1)]
    rows = [{"video": str(path)} for path in (*good, *broken)]
    with pytest.raises(SystemExit) as stop:
        run(data.main, "check", manifest(tmp_path / "m.json", rows), "--workers", 0)
    *lines, last = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and last.endswith(f"{len(rows)} files, {len(broken)} of them cannot be used")
    assert len(lines) == len(broken)
    for line, (path, words) in zip(lines, broken.items()):
        assert line.startswith(str(path)) and words in line
    run(data.main, "check", manifest(tmp_path / "m.json", rows[:3]), "--workers", 1)
    assert "3 files, 0 of them" in capsys.readouterr().out
    command = [sys.executable, HERE / "data.py", "check", "nothing.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------------------------------------
# data.py: labels without another model
# -----------------------------------------------------------------------------------------------------------

def texture(height, width, seed=0, grain=3):
    """Smooth noise with structure everywhere, mostly in brightness: uint8 (height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 4, height // grain + 2, width // grain + 2, generator=generator)
    x = F.interpolate(0.75 * x[:, :1] + 0.25 * x[:, 1:], size=(height, width), mode="bicubic")
    return (x[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)


def object_scores(pred, gt):
    """Tubes int64 (t, H, W), an object bool (t, H, W) -> the best IoU of one tube with the object, and the
    IoU of the union of all tubes that lie mostly inside the object."""
    tubes = [pred == i for i in pred[pred >= 0].unique().tolist()]
    best = max(((tube & gt).sum() / (tube | gt).sum()).item() for tube in tubes)
    union = sum((tube for tube in tubes if 2 * (tube & gt).sum() > tube.sum()), torch.zeros_like(gt))
    return best, ((union & gt).sum() / (union | gt).sum()).item()


def panned_square(count, size, side, speed, pan):
    """A textured square that moves to the right, `speed` pixels a frame, while the camera pans over textured
    ground, `pan` pixels a frame -> the frames, and the mask of the square."""
    ground = texture(size, size + pan * count, 0, 6)
    thing = texture(side, side, 1, 6) // 2 + torch.tensor([110, 0, 0], dtype=torch.uint8)
    frames = torch.stack([ground[:, pan * i:pan * i + size] for i in range(count)])
    square = torch.zeros(count, size, size, dtype=torch.bool)
    top = (size - side) // 2
    for i in range(count):
        left = top + speed * i - speed * count // 2
        square[i, top:top + side, left:left + side] = True
        frames[i, square[i]] = thing.flatten(0, 1)
    return frames, square


def test_dense_motion_finds_known_motion():
    """Catches: x and y or the sign swapped, levels that scale wrongly, far motion missed, a camera that
    only pans."""
    b = data.opponent(texture(192, 272, 0, 10)[None])
    place = data.positions(96, 136)
    shift = torch.tensor([5.0, -3.0]).view(2, 1, 1).expand(2, 96, 136)
    rolled = torch.roll(b, (3, -5), (2, 3))
    torch.testing.assert_close(data.warped(b, shift[None])[..., 3:, :-5], rolled[..., 3:, :-5])
    turn = 1.05 * torch.tensor([[math.cos(0.07), -math.sin(0.07)], [math.sin(0.07), math.cos(0.07)]])
    centred = place - torch.tensor([68.0, 48.0]).view(2, 1, 1)
    turned = torch.einsum("ij,jhw->ihw", turn, centred) - centred
    for true in (shift, -4 * shift, turned + shift):
        to = place + true
        inside = (to[0] > 12) & (to[0] < 123) & (to[1] > 12) & (to[1] < 83)
        for found in data.dense_motion(data.warped(b, true[None]), b):
            error = (found[0] - true).norm(dim=0)[inside]
            assert error.median() < 0.2 and error.quantile(0.95) < 0.5, (error.median(), error.quantile(0.95))


def test_an_object_on_panned_ground_is_one_trajectory():
    """Catches: motion that is compared before the camera's is taken out, objects in pieces, ids that change
    or lag in the frames between the anchors, results that differ between two runs."""
    frames, square = panned_square(20, 192, 68, 4, 6)
    ids = data.classic_labels(frames)
    assert ids.shape == square.shape and ids.dtype == torch.int64 and ids.min() >= 0
    assert object_scores(ids, square)[0] > 0.8
    thing = ids == ids[square].mode().values
    iou = (thing & square).sum((1, 2)) / (thing | square).sum((1, 2))
    assert iou.min() > 0.7 and torch.equal(data.classic_labels(frames), ids)


@pytest.mark.parametrize("shape", [(1, 96, 96), (5, 96, 96), (3, 40, 33), (3, 32, 32)])
def test_frames_without_motion_are_labelled(shape):
    """Catches: a single frame, a static one, a black or a tiny one that stops the whole video."""
    for frames in (torch.zeros(*shape, 3, dtype=torch.uint8), texture(*shape[1:])[None].expand(*shape, 3)):
        ids = data.classic_labels(frames)
        assert ids.shape == shape and ids.min() >= 0 and len(ids.unique()) <= 2 * data.REGIONS


def test_connected_components():
    """Catches: pieces that are joined over a gap, or that are cut where they bend or between frames. The
    oracle: pixels are connected if some power of the matrix of neighbours connects them."""
    chosen = torch.from_numpy(np.random.default_rng(0).random((3, 12, 13)) < 0.12)
    points = chosen.nonzero().double()
    reached = torch.cdist(points, points, p=math.inf) <= 1
    for _ in range(10):
        reached = reached.double() @ reached.double() > 0
    ids = data.connected(chosen)
    assert torch.equal(ids[chosen][:, None] == ids[chosen], reached) and torch.equal(ids >= 0, chosen)
    assert len(ids[chosen].unique()) > 5


def test_key_frames():
    """Catches: a cut that is missed or found twice, a fade or noise that is cut to pieces, frames lost
    between two stretches."""
    rng = np.random.default_rng(0)
    a = texture(48, 64, 0, 12).numpy().astype(float)
    b = 255 - texture(48, 64, 5, 12).numpy() / 2
    still = np.stack([a + rng.normal(0, 4, a.shape) for _ in range(20)])
    cut = np.concatenate([still[:7], np.stack([b] * 9)])
    fade = np.stack([a + (b - a) * i / 59 for i in range(60)])
    wild = np.stack([np.roll(a, 9 * i, 1) for i in range(12)])
    cases = [(still, 99, [0]), (cut, 99, [0, 7]), (fade, 99, [0]), (wild, 99, [0]), (cut, 5, [0, 5, 7, 12])]
    for film, longest, starts in cases:
        film = film.clip(0, 255).astype(np.uint8)
        found = list(data.stretches(np.split(film, range(3, len(film), 3)), longest))
        for (frames, shared), begin, end in zip(found, starts, [*starts[1:], len(film)], strict=True):
            np.testing.assert_array_equal(frames, film[begin:end + shared])
            assert shared == (end < len(film))


def test_trajectories_go_on_through_key_frames():
    """Catches: numbers that begin anew at each key frame or that two objects share, a key frame that is
    written twice, -1 that becomes an id."""
    film = np.zeros((11, 8, 12, 3), np.uint8)
    film[5:, 6:, 8:] = 90                                        # comes in the second stretch
    for i in range(11):
        film[i, 2:6, i // 2:i // 2 + 4] = 200
    names = iter([(3, 5), (5, 3), (3, 5)])                       # a method may number them in any order

    def method(frames):
        first, second = next(names)
        return torch.where(frames[..., 0] == 200, first, torch.where(frames[..., 0] == 90, second, -1))
    ids = data.label_frames([film], method, 4).numpy()
    assert next(names, None) is None
    np.testing.assert_array_equal(ids, np.where(film[..., 0] == 200, 0, np.where(film[..., 0] == 90, 1, -1)))


@pytest.mark.parametrize("count, dtype", [(0, np.uint8), (255, np.uint8), (256, np.uint16), (700, np.uint16)])
def test_labels_as_they_are_written(count, dtype, tmp_path):
    """Catches: ids that wrap at 256, an id 0 that is lost, a trajectory in frames that do not show it."""
    ids = np.arange(4 * 32 * 32).reshape(4, 32, 32) % (count + 1) - 1
    ids[2][ids[2] == count - 1] = -1
    assert data.write_labels(tmp_path / "a_mask.npz", tmp_path / "a_graph.npz", ids) == count
    mask, graph = arrays(tmp_path)["a_mask.npz"], arrays(tmp_path)["a_graph.npz"]
    assert mask.dtype == dtype
    np.testing.assert_array_equal(mask.astype(int) - 1, ids)
    present = np.array([[(frame == m).any() for frame in ids] for m in range(count)]).reshape(count, 4)
    np.testing.assert_array_equal(graph, present * np.arange(1, count + 1)[:, None])


# -----------------------------------------------------------------------------------------------------------
# data.py label
# -----------------------------------------------------------------------------------------------------------

LABEL = ["--image-size", 32, "--stretch", 8, "--workers", 0]


def wide(path, count=12):
    """A square that moves through frames of 48 x 80 pixels."""
    frames = np.tile(texture(48, 80).numpy(), (count, 1, 1, 1))
    for i in range(count):
        frames[i, 16:32, 4 + 4 * i:20 + 4 * i] = (230, 40, 40)
    return encode(path, frames)


def arrays(folder):
    """The name of each .npz file below a folder -> the one array in it."""
    found = {path.name: np.load(path) for path in Path(folder).glob("**/*.npz")}
    return {name: file[file.files[0]] for name, file in found.items()}


def test_label_a_folder(broken, tmp_path, capsys):
    """Catches: labels of another crop than the loader reads, files made twice, a bad file that stops the
    others or is not named (one of two frame sizes ended in a traceback)."""
    (tmp_path / "ü b").mkdir()
    wide(tmp_path / "a.mp4")
    wide(tmp_path / "ü b" / "c d.mp4", 9)
    data.write_png(tmp_path / "p.png", texture(40, 50).numpy())
    bad = [str(path) for path in broken if path.name in ("text.mp4", "sizes.ts")]
    rows = [{"video": name} for name in ("a.mp4", "ü b/c d.mp4", *bad)]
    run(data.main, "label", manifest(tmp_path / "m.json", [*rows, {"image": "p.png"}]), *LABEL)
    out = capsys.readouterr()
    assert "labelled 3 of 5 files" in out.out and "5/5" in out.err        # the bar is there on a pipe, too
    named = [line for line in out.err.splitlines() if "left out: " in line]
    assert len(named) == 2 and bad[0] in named[0] and bad[1] in named[1]
    made = arrays(tmp_path)
    shapes = {name: array.shape for name, array in made.items() if "mask" in name}
    assert shapes == {"a_mask.npz": (12, 32, 53), "c d_mask.npz": (9, 32, 53), "p_mask.npz": (1, 32, 40)}
    entry = data.read_manifest(tmp_path / "m.json")[0]
    video, times = data.decode(entry["path"], 4, 32)
    labels = data.load_labels(entry, times, 32)
    red = video[..., 0].astype(int) - video[..., 1] > 90
    assert object_scores(torch.from_numpy(labels), torch.from_numpy(red))[1] > 0.45
    # the mask is written last: a kill before it leaves none, and the file is labelled again
    (tmp_path / "a_mask.npz").unlink()
    run(data.main, "label", tmp_path / "m.json", *LABEL)
    assert "labelled 1 of 3 files" in capsys.readouterr().out
    np.testing.assert_array_equal(arrays(tmp_path)["a_mask.npz"], made["a_mask.npz"])


@pytest.mark.parametrize("flags, words", [
    (["none"], "none cannot be read"), (["."], "no file could be labelled"),
    ([".", "--image-size", 3], "--image-size 3"), ([".", "--stretch", 0], "--stretch 0"),
    (["two"], "rename one"), ([".", "--sam2", "none"], "--sam2")])
def test_label_refuses(flags, words, tmp_path, capsys, monkeypatch):
    """Catches: bad input that ends in a traceback; two videos that would overwrite one another's labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").mkdir()
    for path in ("bad.mp4", "two/a.mp4", "two/a.mkv"):
        (tmp_path / path).write_text("no video")
    if flags == ["."]:
        shutil.rmtree(tmp_path / "two")
    assert words in refused(capsys, data.main, "label", *flags, "--workers", 0)


# -----------------------------------------------------------------------------------------------------------
# data.py label: DAVIS and SAM2
# -----------------------------------------------------------------------------------------------------------

def davis(folder, size=224):
    """A folder in the layout of DAVIS -> (name, every frame uint8 (T, size, size, 3), object bool (T,
    size, size))."""
    for sequence in sorted(Path(folder, "JPEGImages", "480p").iterdir()):
        frames, masks = [], []
        for path in sorted(sequence.glob("*.jpg")):
            frames.append(next(data.read_frames(path, size)))
            with av.open(str(Path(folder, "Annotations", "480p", sequence.name, f"{path.stem}.png"))) as file:
                frame = next(file.decode(video=0))
            mask = frame.to_ndarray()[0] if frame.format.name == "pal8" else frame.to_ndarray(format="gray")
            place = (np.arange(size) + 0.5 - size / 2) * min(mask.shape) / size
            rows, columns = ((side / 2 + place).astype(int) for side in mask.shape)
            masks.append(mask[np.ix_(rows, columns)] > 0)
        yield sequence.name, torch.from_numpy(np.concatenate(frames)), torch.from_numpy(np.stack(masks))


@pytest.mark.skipif("DAVIS" not in os.environ, reason="needs DAVIS=FOLDER")
def test_labels_on_davis():
    """Catches: labels that are worse than they were. Made of the whole sequence, scored on eight frames of
    it; all frames show whether the tracking between the anchors holds."""
    scores, spent, count = {}, 0.0, 0
    for name, frames, truth in davis(os.environ["DAVIS"]):
        began = time.process_time()
        ids = data.label_frames([frames.numpy()], data.classic_labels, 48).long()
        spent += time.process_time() - began
        count += len(frames)
        at = ((torch.arange(8) + 0.5) * len(frames) / 8).long()
        cell = torch.arange(frames.shape[1]) * 6 // frames.shape[1]
        grid = (6 * cell[:, None] + cell).expand(ids[at].shape)
        tubes = {"classic": (ids[at], truth[at]), "grid 6 x 6": (grid, truth[at]),
                 "classic, all frames": (ids, truth)}
        for method, (tube, mask) in tubes.items():
            scores.setdefault(method, []).append((*object_scores(tube, mask), len(tube.unique())))
    print(f"best, union, tubes; {count / spent:.1f} frames a second of one core")
    for method, rows in scores.items():
        print(f"{method:20s}", np.mean(rows, 0).round(3))
    best, union, tubes = np.mean(scores["classic"], 0)
    assert best >= 0.47 and union >= 0.61 and tubes <= 42 and count / spent >= 12


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    """A folder with a SAM2 of the published shape, tiny and random."""
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2])
    vision = dict(
        model_type="sam2_vision_model", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=128)
    config = transformers.Sam2VideoConfig(
        vision_config=vision, image_size=64,
        prompt_encoder_config=dict(hidden_size=128, image_size=64, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16),
        memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam2")
    transformers.Sam2VideoModel(config).save_pretrained(folder)
    return folder


def permissive(monkeypatch):
    """Random masks are neither sure nor steady."""
    for name, value in (("SAM2_IOU", -9.0), ("SAM2_STABILITY", -9.0), ("SAM2_POINTS", 4)):
        monkeypatch.setattr(data, name, value)


def test_sam2_labels_like_the_published_implementation(sam2, monkeypatch):
    """Catches: prompts in other coordinates, masks and scores that are mixed up, small things under large
    ones, objects that swap their numbers, masks of another frame."""
    from transformers import Sam2Model, Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
    permissive(monkeypatch)
    frames = torch.stack([texture(48, 72, i, 8) for i in range(4)])
    ids = data.sam2_labels(str(sam2), frames)
    assert ids.shape == (4, 48, 72) and ids.dtype == torch.int64
    pixels = rearrange(frames, "t h w c -> t c h w") / 255
    pixels = F.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    pixels = (pixels - mean) / std
    model, logits, scores = Sam2Model.from_pretrained(sam2).eval(), [], []
    with torch.no_grad():
        for x, y in itertools.product((8.0, 24.0, 40.0, 56.0), repeat=2):            # one prompt at a time
            points = torch.tensor([[[[x, y]]]])
            positive = torch.ones(1, 1, 1, dtype=torch.int64)
            out = model(pixel_values=pixels[:1], input_points=points, input_labels=positive)
            logits.append(out.pred_masks[0, 0])
            scores.append(out.iou_scores[0, 0])
        logits, scores, kept = torch.cat(logits), torch.cat(scores), []
        for i in scores.argsort(descending=True).tolist():
            mask, others = logits[i] > 0, logits[kept] > 0
            iou = (mask & others).sum((1, 2)) / (mask | others).sum((1, 2))
            if mask.any() and (iou <= 0.7).all():
                kept.append(i)
        kept.sort(key=lambda i: int((logits[i] > 0).sum()))
        video, tracks = Sam2VideoModel.from_pretrained(sam2).eval(), []
        for i in kept:                                           # each object in a session of its own
            session = Sam2VideoInferenceSession(pixels, 48, 72, dtype=torch.float32)
            mask = F.interpolate(logits[i][None, None], size=(64, 64), mode="bilinear") > 0
            session.add_mask_inputs(session.obj_id_to_idx(0), 0, mask.float())
            session.obj_with_new_inputs = [0]
            found = torch.cat([out.pred_masks for out in video.propagate_in_video_iterator(session, 0)])
            tracks.append(F.interpolate(found, size=(48, 72), mode="bilinear")[:, 0])
    value, owner = torch.stack(tracks).max(0)
    expected = torch.where(value > 0, owner, -1)
    assert 2 < len(kept) < len(scores) and len(expected.unique()) > 2
    assert (ids == expected).float().mean() > 0.98               # one prompt or 64 at a time: other rounding


def test_label_with_sam2(sam2, tmp_path, capsys, monkeypatch):
    """Catches: a method that works by itself and not in the command; folders that are not whole, loaded
    all the same; a traceback where the optional package is missing."""
    permissive(monkeypatch)
    wide(tmp_path / "a.mp4", 6)
    run(data.main, "label", tmp_path, "--sam2", sam2, "--image-size", 48, "--stretch", 4)
    assert "1 of 1 files" in capsys.readouterr().out and arrays(tmp_path)["a_mask.npz"].shape == (6, 48, 80)
    broken = shutil.copytree(sam2, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights = {name: x for name, x in weights.items() if "memory_encoder" not in name}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for folder, words in ((broken, "memory_encoder"), (tmp_path, "folder of a published SAM2")):
        with pytest.raises(SystemExit):                          # transformers' bars are on stderr, too
            run(data.main, "label", tmp_path, "--sam2", folder, "--overwrite")
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: --sam2") and words in last
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refused(capsys, data.main, "label", tmp_path, "--sam2", tmp_path)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def nearly(one, other, tolerance=1e-4):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def tiny(**change):
    return dataclasses.replace(TINY, **change)


def random_video(*shape):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


# -----------------------------------------------------------------------------------------------------------
# segmenter.py: features, masks, gradients
# -----------------------------------------------------------------------------------------------------------

def test_normalise():
    """Catches: channels or frames in the wrong place, a mean that is taken off twice."""
    video = random_video(2, 3, 4, 5)
    naive = (video / 255 - torch.tensor(segmenter.MEAN)) / torch.tensor(segmenter.STD)
    nearly(segmenter.normalise(video), naive.movedim(-1, 2))


class Pyramid(nn.Conv2d):
    """A backbone of somebody else's: two maps, at strides 8 and 16."""
    dims = (5, 5)

    def forward(self, x):
        fine = super().forward(x)
        return [fine, F.avg_pool2d(fine, 2)]


def test_a_backbone_of_your_own():
    """Catches: strides or a number of maps taken for granted; a backbone that is not trained."""
    tokenizer = trajtok.TrajTok(TINY, Pyramid(3, 5, 8, 8))
    _, seg = tokenizer(random_video(2, 3, 32, 64))
    assert seg.grid == (3, 4, 8)
    seg.logits.square().sum().backward()
    assert all(p.grad.any() for p in tokenizer.segmenter.backbone.parameters())


def test_masks_are_drawn_where_the_points_are():
    """Catches: masks that are transposed or of another frame; masks enlarged after the argmax."""
    ids = torch.randint(5, (3, 48))
    seg = segmenter.assign(9.0 * F.one_hot(ids), (2, 4, 6))
    middles = seg.masks((20, 30))[:, :, 2::5, 2::5]
    assert torch.equal(middles, ids.view(3, 2, 4, 6))
    # two cells, of which the first is surer: the border is not half way
    surer = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert segmenter.assign(surer, (1, 1, 2)).masks((1, 20)).sum() < 8


@pytest.mark.parametrize("detach", (True, False))
def test_detach_cuts_the_perceivers_gradient(detach):
    """Catches: the stop-gradient lost, or one that cuts the mask logits from the features as well."""
    model = segmenter.Segmenter(tiny(detach=detach))
    features = torch.randn(1, 8, 32, requires_grad=True)
    queries = model.cluster(features)
    queries.square().sum().backward(retain_graph=True)
    assert (features.grad is None) == detach
    logits = model.mask_logits(queries.detach(), features)
    logits.square().sum().backward()
    assert features.grad.any(-1).all()


def joint_gradients(cfg):
    """A small joint loss -> itself, and the gradient of each parameter."""
    torch.manual_seed(0)
    tokenizer = trajtok.TrajTok(cfg)
    labels = torch.randint(-1, 3, (2, 2, 32, 32))
    tokens, seg = tokenizer(random_video(2, 2, 32, 32), 4)
    loss = tokens.z.square().mean() + sum(segmenter.segmentation_loss(seg, labels))
    loss.backward()
    gradients = {name: p.grad for name, p in tokenizer.named_parameters()}
    return gradients | {"loss": loss.detach()}


ABLATIONS = (dict(), dict(hard_mask=False), dict(hierarchical=False), dict(detach=False),
             dict(mean_start=False), dict(places=True, path=True), dict(last_points=2))


@pytest.mark.parametrize("change", ABLATIONS)
def test_gradients_reach_every_parameter(change):
    """Catches: a layer that is built and never used, or cut off from the loss by a detach or an argmax; an
    ablation that does nothing."""
    unread = r"$^"
    if "hierarchical" in change:
        # nobody reads the coarser maps
        unread = r"segmenter\.backbone\.((stages|downsample_layers)\.[123]|norm)"
    gradients = joint_gradients(tiny(**change))
    for name, gradient in gradients.items():
        assert re.match(unread, name) or gradient.any() and gradient.isfinite().all(), name
    # detach changes gradients alone
    if change != dict(detach=False):
        assert (gradients["loss"] != joint_gradients(TINY)["loss"]) == bool(change)


def test_recompute_changes_nothing(monkeypatch):
    """Catches: an activation computed again from other inputs; a part that keeps its activations."""
    again = mock.Mock(wraps=segmenter.checkpoint)
    monkeypatch.setattr(segmenter, "checkpoint", again)
    cfg = tiny(places=True, path=True)
    nearly(joint_gradients(dataclasses.replace(cfg, recompute=True)), joint_gradients(cfg))
    # four blocks, four projections, two layers of each Perceiver
    assert again.call_count == 4 + 4 + 2 + 2


# -----------------------------------------------------------------------------------------------------------
# segmenter.py: matching
# -----------------------------------------------------------------------------------------------------------

def test_hungarian_is_the_brute_force_optimum():
    """Catches: an assignment that is not the best, a column given twice, ties or shapes that go wrong."""
    rng = np.random.default_rng(0)
    for r, c in itertools.product(range(1, 6), range(1, 7)):
        ties = rng.integers(-1, 2, (r, c))
        for cost in (rng.normal(size=(r, c)), ties, 0 * ties):
            rows, columns = segmenter.hungarian(cost)
            assert len(set(rows)) == len(set(columns)) == min(r, c)
            # all ways to give each row of the wide form its own column
            wide = cost if r <= c else cost.T
            ways = itertools.permutations(range(max(r, c)), min(r, c))
            best = min(wide[range(len(wide)), way].sum() for way in ways)
            assert cost[rows, columns].sum() == pytest.approx(best)


def test_match_finds_the_hidden_permutation():
    """Catches: rows and columns swapped; absent labels that take a query from a present one; unlabelled
    points that count as a label."""
    labels = torch.randint(-1, 5, (6, 200))                     # 5, 6, 7 do not occur
    labels[3] = -1
    hidden = torch.rand(6, 8).argsort(1)
    owner = hidden.gather(1, labels.clamp(min=0))               # label l is query hidden[l]
    owner[:, ::5] = torch.randint(8, (6, 40))                   # noise
    order = segmenter.match(5.0 * F.one_hot(owner), labels)
    assert torch.equal(order.sort(1)[0], torch.arange(8).expand(6, 8))
    for i in (0, 1, 2, 4, 5):
        assert torch.equal(order[i, :5], hidden[i, :5])


def test_match_asks_the_soft_masks_too():
    """Catches: a match by argmax masks alone, an accident of the column order while one query wins all."""
    labels = torch.arange(5).repeat(1, 4)
    logits = F.one_hot(4 - labels).float()                      # label l is query 4 - l
    logits[..., 0] = 3.0                                        # but this one wins every point
    assert segmenter.match(logits, labels).tolist() == [[4, 3, 2, 1, 0]]


# -----------------------------------------------------------------------------------------------------------
# segmenter.py: losses
# -----------------------------------------------------------------------------------------------------------

def test_dice_and_focal_are_the_naive_loops():
    """Catches: means over all clips' points or regions, absent labels that count, areas without unlabelled
    points, gamma left out; gradients that are not the formula's, e.g. of points without a label."""
    logits = (2 * torch.randn(3, 20, 5)).requires_grad_()
    labels = torch.randint(-1, 3, (3, 20))
    labels[0, :4] = 3                                           # occurs in this clip alone
    labels[1] = -1                                              # no label at all
    dice = focal = 0
    for soft, ids in zip(logits.softmax(-1), labels):
        regions, points = [], []
        for label in set(ids.tolist()) - {-1}:
            p = soft[ids == label, label]
            areas = soft[:, label].sum() + len(p)
            regions.append(1 - 2 * p.sum() / areas)
            points += list(-(1 - p) ** 2 * p.log())
        dice += sum(regions) / max(len(regions), 1) / 3
        focal += sum(points) / max(len(points), 1) / 3
    for mine, naive in ((segmenter.dice_loss, dice), (segmenter.focal_loss, focal)):
        mine = mine(logits, labels)
        nearly(mine, naive)
        nearly(torch.autograd.grad(mine, logits), torch.autograd.grad(naive, logits, retain_graph=True))


def test_labels_on_grid_is_the_naive_look_up():
    """Catches: rows and columns swapped, the corner of a cell instead of its middle; of too many labels the
    largest dropped instead of the smallest, or two that become one."""
    labels = torch.randint(-1, 7, (2, 3, 13, 9))
    found = segmenter.labels_on_grid(labels, (3, 3, 2), 7).view(2, 3, 3, 2)
    for i, j in itertools.product(range(3), range(2)):
        middle = labels[:, :, int((i + 0.5) * 13 / 3), int((j + 0.5) * 9 / 2)]
        assert torch.equal(found[:, :, i, j], middle)
    areas = torch.tensor([9, 2, 1, 7, 8])                       # of the labels 0, 1, 2, 3, 4
    names = torch.tensor([0, -1, -1, 2, 1])                     # by size
    labels = torch.arange(5).repeat_interleave(areas)
    found = segmenter.labels_on_grid(labels.view(1, 1, 3, 9), (1, 3, 9), 3)
    assert torch.equal(found[0], names[labels])


def test_segmentation_loss_does_not_care_about_names():
    """Catches: a loss that depends on an object's id in the labels, or on the order of the queries."""
    labels, logits = torch.randint(5, (3, 2, 4, 4)), torch.randn(3, 32, 6)
    queries, names = torch.randperm(6), torch.randperm(6)
    other = segmenter.assign(logits[..., queries], (2, 4, 4))
    expected = segmenter.segmentation_loss(segmenter.assign(logits, (2, 4, 4)), labels)
    nearly(segmenter.segmentation_loss(other, names[labels]), expected)


# -----------------------------------------------------------------------------------------------------------
# segmenter.py: metrics
# -----------------------------------------------------------------------------------------------------------

# prediction, truth (. = unlabelled): veq, sq, rq, stq, aq
SCORES = (
    ("5524", "001.", [1] * 5),                                  # names do not matter; nothing is known there
    ("00000", "11...", [0] * 5),                                # one tube over everything
    ("0011", "0000", [1 / 3, 1 / 2, 2 / 3, 1 / 2, 1 / 2]),      # just a match
    ("000000", "000011", [4 / 9, 2 / 3, 2 / 3, 2 / 3, 2 / 3]),  # one missed
    ("00011", "00000", [0.4, 0.6, 2 / 3, 0.6, 0.6]),            # one invented
    ("0001222222", "0000111111", [0.7, 0.875, 0.8, math.sqrt(0.875 * 0.9), 0.9]))


def test_video_metrics_by_hand():
    """Catches: id 0 taken for background; unlabelled pixels that count as errors; missed and invented objects
    that cost nothing; a mean that is not over clips; a tube that may fit best once only."""
    def clips(*all_ids):
        pixels = [[".0123456".index(name) - 1 for name in ids] for ids in all_ids]
        return torch.tensor(pixels)[:, None, None]

    for pred, gt, expected in SCORES:
        metrics = segmenter.video_metrics(clips(pred), clips(gt))
        assert list(metrics.values()) == pytest.approx(expected)
    one, two = clips("000011", "000011"), clips("000000", "000011")
    assert segmenter.video_metrics(one, two)["veq"] == pytest.approx((4 / 9 + 1) / 2)
    # the tube over everything fits two labels best
    scores = trajtok.score_clip(two[0], one[0], made=False)
    assert scores["object_iou"] == pytest.approx((4 / 6 + 2 / 6) / 2)


# -----------------------------------------------------------------------------------------------------------
# encoder.py: attention under the hard mask
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m, own, spread", ((1, 1, 1), (2, 5, 1), (4, 4, 12)))
def test_trajectory_attention_is_the_dense_formula(m, own, spread):
    """Catches: a softmax over the wrong points, own tokens that weigh wrongly, an overflow for large scores,
    NaN without points, a gradient that is not the formula's, clips that leak into each other."""
    ids = torch.randint(3, (3, 23))                             # of 5 trajectories, two own no points
    ids[1] = 2                                                  # one owns all
    leaves = []
    for count in ((5, m), (23,), (23,), (5, own), (5, own)):
        x = spread * torch.randn(3, *count, 2, 4)
        leaves.append(x.requires_grad_())
    q, k, v, k_own, v_own = leaves
    weights = torch.randn(3, 5, m, 2, 4)
    results = []
    for attention in (encoder.trajectory_attention, encoder.dense_trajectory_attention):
        y = attention(q, k, v, ids, k_own, v_own)
        results.append((y, *torch.autograd.grad(y, leaves, weights)))
    nearly(*results, 2e-4 * spread)


# -----------------------------------------------------------------------------------------------------------
# encoder.py: tokens
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("hard_mask, m", ((True, 1), (True, 4), (False, 2)))
def test_tokens_see_what_the_mask_lets_them_see(hard_mask, m):
    """Catches: a mask that one of several layers drops; an ablation that does nothing; tokens in another
    order than their mask, dead trajectories that pass for real ones, copies."""
    ids = torch.randint(4, (2, 40))
    f = torch.randn(2, 40, 32)
    seg = segmenter.assign(200.0 * F.one_hot(ids, 6), (1, 5, 8), f)         # queries 4 and 5 own nothing
    net = encoder.TrajectoryEncoder(tiny(hard_mask=hard_mask))
    before = net(f, seg, m)
    owners = torch.arange(6).repeat_interleave(m).expand(2, -1)
    assert torch.equal(before.trajectory, owners)
    assert torch.equal(before.mask, owners < 4)
    assert torch.pdist(before.z[before.mask]).min() > 1e-3
    f[0, ids[0] == 3] *= -1                                     # in clip 0
    changed = (before.z - net(f, seg, m).z).abs().amax(-1) > 1e-5
    assert torch.equal(changed[0], (owners[0] == 3) | (not hard_mask))
    assert not changed[1].any()


# -----------------------------------------------------------------------------------------------------------
# encoder.py: places and paths
# -----------------------------------------------------------------------------------------------------------

def test_places_tell_points_apart():
    """Catches: codes that leave out time, row or column, or mix them up; a scale that is not read."""
    net, f = encoder.TrajectoryEncoder(tiny(places=True)), torch.zeros(1, 60, 32)
    codes = net.add_places(f, (4, 3, 5))[0]
    assert torch.pdist(codes).min() > 0.1
    net.cfg = tiny(position_scale=3.0)
    nearly(net.add_places(f, (4, 3, 5))[0], 3 * codes)


def test_path_sums_are_the_naive_loop():
    """Catches: x and y swapped, frames that mix, sums where means over the frame are meant."""
    soft = torch.rand(1, 24, 5)
    naive = torch.zeros(1, 2, 5, 6)
    for p in range(24):                                         # of two frames of 3 x 4
        x, y = 2 * (p % 4) / 3 - 1, p // 4 % 3 - 1
        terms = torch.tensor([1, x, y, x * x, y * y, x * y])
        naive[0, p // 12] += torch.outer(soft[0, p], terms) / 12
    with torch.autocast("cpu", torch.bfloat16):                 # a spread is a small difference of large sums
        nearly(encoder.TrajectoryPath.sums(soft, (2, 3, 4)), naive)


def test_path_follows_the_mask():
    """Catches: a path that does not know that its mask moves, or that gives the masks no gradient."""
    path, masks = encoder.TrajectoryPath(32), torch.full((3, 2, 6, 8, 1), 0.1)
    for shift in range(3):                                      # of a square, in the second frame
        masks[shift, 0, 2:4, 1:3] = 1.0
        masks[shift, 1, 2:4, 1 + shift:3 + shift] = 1.0
    masks.requires_grad_()
    codes = path(path.sums(masks.flatten(1, 3), (2, 6, 8)))[:, 0]
    assert torch.pdist(codes).min() > 0.1
    codes.square().sum().backward()
    assert masks.grad.all()
    # features of 0 give the masks no other gradient
    model = encoder.TrajectoryEncoder(trajtok.TrajTokConfig(dim=32, num_queries=2, heads=2, path=True))
    logits = torch.randn(1, 48, 2, requires_grad=True)
    seg = segmenter.assign(logits, (1, 6, 8))
    model(torch.zeros(1, 48, 32), seg).z.square().sum().backward()
    assert logits.grad.any()


# -----------------------------------------------------------------------------------------------------------
# trajtok.py, published weights: the release's formulas; every layout of a ConvNeXt
# -----------------------------------------------------------------------------------------------------------

def plain_norm(x, w, name, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)


def plain_linear(x, w, name):
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def plain_perceiver(w, latents, points, visible=None):
    """Two layers of two heads: latents (b, s, d), points (b, n, d); visible bool (b, 1, s, s + n)."""
    points = plain_norm(points, w, "norm_ctx")
    for i in range(2):
        attention, mlp = trajtok.under(w, f"layers.{i}.0."), trajtok.under(w, f"layers.{i}.1.")
        latents = plain_norm(latents, w, "norm_lat")            # the residual keeps the normed value
        x = plain_norm(latents, attention, "norm_latents", 1e-5)
        y = torch.cat((x, plain_norm(points, attention, "norm_media", 1e-5)), 1)
        q, kv = plain_linear(x, attention, "to_q"), plain_linear(y, attention, "to_kv")
        q, k, v = (rearrange(z, "b n (a c) -> b n a c", a=2) for z in (q, *kv.chunk(2, -1)))
        q, k = (segmenter.rotate(z, torch.arange(z.shape[1])) for z in (q, k))
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), visible)
        latents = latents + plain_linear(rearrange(out, "b a s c -> b s (a c)"), attention, "to_out")
        z = plain_norm(latents, mlp, "norm")
        z = F.silu(plain_linear(z, mlp, "gate")) * plain_linear(z, mlp, "up")
        latents = latents + plain_linear(z, mlp, "down")
    return latents


def plain_masks(w, features):
    """The released segmenter on its features (b, n, d) -> logits."""
    perceiver = trajtok.under(w, "trajectory_perceiver.")
    queries = plain_perceiver(perceiver, perceiver["latents"].expand(len(features), -1, -1), features)
    unit = []
    for z, name in ((features, "patch_decoder_low_res"), (queries, "traj_seg_head_low_res")):
        z = plain_linear(F.relu(plain_linear(z, w, name + ".0")), w, name + ".2")
        unit.append(F.normalize(z, dim=-1))
    scale = min(math.log1p(math.exp(w["log_scale"].item())) + 1, 20.0)
    return scale * unit[0] @ unit[1].mT


def plain_tokens(w, features, logits, m):
    """The released encoder -> tokens."""
    soft, ids = logits.softmax(-1), logits.argmax(-1)
    mean = soft.mT @ features / (soft.sum(1)[..., None] + 1e-6)
    z = (w["latents"][:, :m] + mean[:, :, None]).flatten(1, 2)
    owner = torch.arange(logits.shape[2]).repeat_interleave(m)[:, None]
    own = (owner == owner.T).expand(len(ids), -1, -1)           # the tokens of its own trajectory
    points = owner == ids[:, None]                              # its points
    points[..., -2:] = True                                     # and the clip's last two
    visible = torch.cat((own, points), 2)[:, None]
    z = plain_perceiver(trajtok.under(w, "traj_feature_updater."), z, features, visible)
    return plain_linear(z, w, "output_projector")


# our names -> those of the release; what has none loses `encoder.`
RELEASED = {
    "segmenter.(backbone|proj|ln)": r"segmenter.patch_encoder.\1",
    "segmenter.latents": "segmenter.trajectory_perceiver.latents",
    "segmenter.perceiver": "segmenter.trajectory_perceiver",
    "segmenter.(traj_seg_head|patch_decoder)": r"segmenter.\1_low_res",
    "encoder.perceiver": "traj_feature_updater",
    "encoder.": ""}

RELEASE = dict(normed_residual=True, norm_media=True, last_points=2)


def official_weights():
    """Random weights of a small tokenizer, under the names of the authors' release."""
    weights = {}
    tokenizer = trajtok.TrajTok(tiny(out_dim=24, **RELEASE))
    for name, value in tokenizer.state_dict().items():
        for ours, theirs in RELEASED.items():
            name = re.sub("^" + ours, theirs, name)
        weights[name] = value + 0.3 * torch.randn_like(value)
    for i, begin in itertools.product(range(2), ("segmenter.trajectory_perceiver", "traj_feature_updater")):
        weights[f"{begin}.layers.{i}.0.rotary_emb.freqs"] = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    # for the release's training only
    weights["segmenter.traj_seg_head_high_res.0.bias"] = torch.zeros(3)
    return weights


def close(mine, theirs, relative=1e-4):
    assert mine.shape == theirs.shape
    worst = (mine - theirs).abs().max() / theirs.abs().max()
    assert worst < relative, f"differs by {worst:.1e} of the largest value"


@pytest.mark.parametrize("m, prefix", ((1, ""), (2, "vision_encoder.traj_tokenizer."),
                                       (4, "module.vision_encoder.traj_tokenizer.")))
def test_the_released_tokenizer_gives_the_releases_numbers(tmp_path, m, prefix):
    """Catches: a quirk of the release that is left out or switched on wrongly (residual, norms, the last two
    points, the scale's clamp), a key in the wrong place, a configuration read wrongly off the shapes."""
    torch.manual_seed(3)
    weights = official_weights()
    if m == 4:
        weights["segmenter.log_scale"] = torch.tensor([30.0])   # clamped at 20
    stored = {prefix + name: value for name, value in weights.items()}
    file = tmp_path / ("a.pth" if prefix else "a.safetensors")
    if prefix:
        torch.save({"model": stored | {"temp": torch.tensor(0.07)}, "meta": {"step": 3}}, file)
    else:
        save_file(stored, file)
    tokenizer = trajtok.TrajTok.load_official(file)
    assert tokenizer.cfg == tiny(image_size=224, frames=8, out_dim=24, **RELEASE)
    video = random_video(2, 3, 64, 32)
    with torch.no_grad():
        tokens, seg = tokenizer(video, m)
    logits = plain_masks(trajtok.under(weights, "segmenter."), seg.features)
    close(seg.logits, logits)
    close(tokens.z, plain_tokens(weights, seg.features, logits, m))         # of dead trajectories, too
    close(trajtok.load_segmenter(file)(video).logits, logits)


# published layouts of a ConvNeXt: (pattern of the original name, name there), and keys of no use to us
CONVNEXTS = {
    "original": ([], ["head.weight", "head.bias"]),
    "dinov3": ([], ["norms.3.weight", "norms.3.bias"]),
    "timm": ([(r"downsample_layers\.0\.", "stem."), (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
              (r"stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."), ("dwconv", "conv_dw"), ("pwconv", "mlp.fc"),
              (r"^norm\.", "head.norm.")], ["head.fc.weight", "head.fc.bias"]),
    "hub": ([(r"downsample_layers\.0\.0", "embeddings.patch_embeddings"),
             (r"downsample_layers\.0\.1", "embeddings.layernorm"),
             (r"downsample_layers\.(\d)\.", r"encoder.stages.\1.downsampling_layer."),
             (r"^stages\.(\d)\.(\d)\.", r"encoder.stages.\1.layers.\2."), (r"gamma", "layer_scale_parameter"),
             (r"\bnorm\.", "layernorm."), (r"^", "convnext.")], ["classifier.weight", "classifier.bias"]),
    "hub dinov3": ([(r"downsample_layers\.(\d)\.", r"stages.\1.downsample_layers."),
                    (r"stages\.(\d)\.(\d)\.", r"stages.\1.layers.\2."), (r"dwconv", "depthwise_conv"),
                    (r"pwconv", "pointwise_conv"), (r"\bnorm\.", "layer_norm."), (r"^", "model.")], [])}


@pytest.mark.parametrize("layout", CONVNEXTS)
def test_every_published_convnext_layout_loads(tmp_path, layout):
    """Catches: a layout whose keys are renamed wrongly or in part; depths and widths read wrongly."""
    net = segmenter.ConvNeXt((1, 2, 3, 1), (8, 16, 24, 40))
    rules, more = CONVNEXTS[layout]
    published = {name: torch.zeros(3) for name in more}
    for name, value in net.state_dict().items():
        value += 0.1 * torch.randn_like(value)
        for pattern, there in rules:
            name = re.sub(pattern, there, name)
        published[name] = value
    save_file(published, tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 64, 32)
    nearly(trajtok.load_convnext(tmp_path)(x), net(x))


@pytest.mark.parametrize("kind", ("ConvNext", "DINOv3ConvNext"))
def test_convnext_is_the_published_implementation(tmp_path, kind):
    """Catches: names remembered wrongly: `transformers` itself writes the folder, and computes."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(depths=[1, 2, 3, 1], hidden_sizes=[8, 16, 24, 40], image_size=64)
    config = getattr(transformers, kind + "Config")(**sizes)
    theirs = getattr(transformers, kind + "Model")(config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    x, ours = torch.randn(2, 3, 64, 64), trajtok.load_convnext(tmp_path)
    ours.norm = nn.Identity()                                   # theirs stands behind the mean over the map
    states = theirs(x, output_hidden_states=True).hidden_states
    for mine, state in zip(ours(x), states[1:], strict=True):
        close(mine, state, 1e-5)


# -----------------------------------------------------------------------------------------------------------
# trajtok.py: any length
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m, change", ((1, {}), (2, dict(hard_mask=False)), (4, RELEASE),
                                       (4, dict(places=True, path=True))))
def test_a_stream_is_one_pass(m, change):
    """Catches: a softmax that is closed chunk by chunk, positions or places that begin anew with each chunk,
    trajectories alive in one chunk only, a last chunk that is lost, pieces that do not fit the chunks."""
    tokenizer = trajtok.TrajTok(tiny(**change))
    video = random_video(11, 32, 64)
    tokens, seg = tokenizer(video[None], m)

    def decoder():
        return iter(np.split(video.numpy(), (5, 6)))

    drawn = []
    for source, chunk in ((video, 3), (decoder, 4)):
        stream = tokenizer.stream(source, m, chunk, each=lambda *x: drawn.append(x))
        nearly(tuple(stream), tuple(tokens))
    first, pieces, segs = zip(*drawn[:4])
    assert first == (0, 3, 6, 9)
    assert torch.equal(torch.cat(pieces, 1)[0], video)
    nearly(torch.cat([s.logits for s in segs], 1), seg.logits)


def test_windows_are_clips_of_their_own():
    """Catches: windows that see each other, trajectories of two windows under one number, a lost last one."""
    tokenizer, video = trajtok.TrajTok(TINY), random_video(11, 32, 32)
    expected = []
    for i, part in enumerate(video.split(4)):
        tokens, _ = tokenizer(part[None], 2)
        expected.append(tokens._replace(trajectory=tokens.trajectory + 6 * i))
    for found, *fields in zip(tokenizer.windows(video, 4, 2), *expected):
        nearly(found, torch.cat(fields, 1))


def test_long_positions_are_exact():
    """Catches: other pairs or frequencies of the rotary embedding; angles in float32, which are wrong by 0.03
    after some millions of points."""
    far, x = 18_000 * 256 - 1, torch.randn(1, 1, 1, 24)
    y = segmenter.rotate(x, torch.tensor([far])).flatten().tolist()
    for j, (even, odd) in enumerate(x.view(12, 2).tolist()):
        angle = far * 1e4 ** (-2 * j / 12) if j < 6 else 0      # half of the channels turn
        turned = complex(even, odd) * cmath.rect(1, angle)
        assert y[2 * j:2 * j + 2] == pytest.approx([turned.real, turned.imag], abs=1e-5)


# -----------------------------------------------------------------------------------------------------------
# trajtok.py: the tokenizer and its files
# -----------------------------------------------------------------------------------------------------------

def count_parameters(build):
    """In millions. On the meta device: the large sizes take no time and no memory."""
    with torch.device("meta"):
        return round(sum(p.numel() for p in build().parameters()) / 1e6, 1)


def test_the_tokenizer_is_as_large_as_published():
    """Catches: a layer too many or too few; counts beside the table of sizes that the code has outgrown."""
    paper = trajtok.TrajTokConfig()
    assert count_parameters(lambda: segmenter.Segmenter(paper)) == 37.2
    assert count_parameters(lambda: trajtok.TrajTok(paper)) == 46.1
    source = inspect.getsource(trajtok)
    said = re.findall(r'^ +"(\w+)": +TrajTokConfig\(.*# ([\d.]+) M', source, re.M)
    counted = [(name, str(count_parameters(lambda: trajtok.TrajTok(name)))) for name in trajtok.SIZES]
    assert said == counted


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    """Catches: a field or a weight that is not saved; weights that are skipped in silence; a tokenizer inside
    another model that is not found."""
    video, one = random_video(1, 2, 32, 32), trajtok.TrajTok(tiny(detach=False, scale=7.0, places=True))
    one.save_pretrained(tmp_path)
    state, other = one.state_dict(), {"other": torch.zeros(1)}
    inside = {f"video.tokenizer.{name}": value for name, value in state.items()}
    for written in (state, inside | other):
        trajtok.write_weights(tmp_path / "model.safetensors", written)
        two = trajtok.TrajTok.from_pretrained(tmp_path)
        assert not two.training
        assert json.dumps(dataclasses.asdict(two.cfg)) == json.dumps(dataclasses.asdict(one.cfg))
        assert torch.equal(one(video, 4)[0].z, two(video, 4)[0].z)
    trajtok.write_weights(tmp_path / "model.safetensors", state | other)
    with pytest.raises(BadInput, match="other"):
        trajtok.TrajTok.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------------------------------------
# trajtok.py: a run
# -----------------------------------------------------------------------------------------------------------

def in_ranks(processes, work):
    """work(rank) in so many processes that know each other. Forked: new ones would import for seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def child(rank):
        own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                   MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="localhost")
        work(rank)

    torch.multiprocessing.start_processes(child, nprocs=processes, start_method="fork")


def test_learning_rate():
    """Catches: a first step at 0, a peak that is never reached, an end that is not at 1 %."""
    cfg = trajtok.PretrainConfig(lr=2.0, warmup=10, steps=101)
    rates = [trajtok.learning_rate(step, cfg) for step in (0, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.01, 0.02])


def test_weight_decay_is_for_matrices():
    """Catches: decay on norms and biases; parameters in no group; frozen ones that move; rates of the wrong
    parameters that are scaled."""
    net = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.LayerNorm(4), c=nn.Linear(4, 2)))
    net["c"].weight.requires_grad_(False)
    optimizer = trajtok.make_optimizer(net, trajtok.PretrainConfig(weight_decay=0.3), {"b.": 4.0})
    groups = {(g["weight_decay"], g["scale"]): len(g["params"]) for g in optimizer.param_groups}
    # a.weight; the biases of a and c; both parameters of b
    assert groups == {(0.3, 1): 1, (0, 1): 2, (0, 4): 2}


def test_overwrite_forgets_the_old_run(tmp_path):
    """Catches: a new run that is stopped before its first checkpoint and goes on from the old one."""
    cfg = trajtok.PretrainConfig(overwrite=True)
    for name in ("state.pt", "model.safetensors", "log.jsonl", "result.json"):
        (tmp_path / name).write_text("old")
    trajtok.open_run(tmp_path, cfg)
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Catches: log lines that appear twice or are lost, a half-written last line that ends the run."""
    for step in range(4):
        trajtok.Log(tmp_path, step)(step=step)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                           # killed while it wrote
    trajtok.Log(tmp_path, 3)(step=3)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 2, 3]


def test_a_full_disk_is_one_line(tmp_path):
    """Catches: a traceback of torch.save or of the weights' writer; half a checkpoint in the old one's
    place."""
    net = nn.Linear(100, 100)                                   # 40 kB
    optimizer = trajtok.make_optimizer(net, trajtok.PretrainConfig())
    trajtok.save_checkpoint(tmp_path, net.state_dict(), optimizer.state_dict(), 1)

    def work(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(BadInput, match="make room"):
            trajtok.save_checkpoint(tmp_path, net.state_dict(), optimizer.state_dict(), 2)
        with pytest.raises(BadInput, match="make room"):
            trajtok.write_weights(tmp_path / "model.safetensors", net.state_dict())

    in_ranks(1, work)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "state.pt"]
    assert torch.load(tmp_path / "state.pt")["step"] == 1


def test_flops_are_counted_by_hand():
    """Catches: a multiply-add counted once; attention on a CPU that counts nothing."""
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 100, 16)
    attention = trajtok.count_gflops(lambda: F.scaled_dot_product_attention(q, k, k))
    assert attention == pytest.approx(2 * 2 * 2 * 8 * 100 * 16 / 1e9)      # scores, and sums of values


# -----------------------------------------------------------------------------------------------------------
# trajtok.py: pictures
# -----------------------------------------------------------------------------------------------------------

def read_film(path):
    """Frames of a film; a picture has one."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_strips_paint_like_trajectories_alike():
    """Catches: trajectories coloured by their own numbers, so that equal ones look different; an id -1, of
    nothing, that ends in an error."""
    truth = np.random.default_rng(0).integers(-1, 4, (3, 8, 8))
    found = np.array([3, 0, 6, 1, -1])[truth]
    video = np.full((3, 8, 8, 3), 128, np.uint8)
    sheet = trajtok.filmstrip(video, {"found": found, "true": truth}, 3)
    # a margin for the names at the left, and below each picture four white pixels
    _, mine, true = sheet[:60, 80:].reshape(3, 20, -1, 3)
    np.testing.assert_array_equal(mine, true)
    assert len(np.unique(true.reshape(-1, 3), axis=0)) == 6     # with the white


# -----------------------------------------------------------------------------------------------------------
# trajtok.py: its commands
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip, flags, frames, columns, gap", (
    ("still0.png", "", 1, 1, None), ("world", "--frames 3 --stages", 3, 3, 0.25),
    ("clip2.mp4", "--frames 10", 10, 8, 0.3), ("clip2.mp4", "--frames 0 --stages", 30, 8, 0.1),
    ("clip2.mp4", "--frames 0 --window 10", 30, 8, 0.1)))
def test_show(media, clip_run, tmp_path, capsys, clip, flags, frames, columns, gap):
    """Catches: a command that works for one kind of input only; pictures of another size; a wrong count;
    frames that are left out or drawn twice; a film at another pace."""
    name = clip if clip == "world" else media / clip
    argv = ["show", name, "--weights", clip_run, "--out", tmp_path, "--tokens-per-trajectory", 2]
    run(trajtok.main, *argv, *flags.split())
    base = f"{tmp_path}/{Path(clip).stem}"
    sheet = read_film(f"{base}-trajectories.png")
    assert (sheet.shape[1] // 224, sheet.shape[2] // 224) == (2, columns)
    film = read_film(f"{base}-trajectories.mp4")
    assert film.shape == (frames, 448, 224, 3)
    trajectories, tokens = re.search(r"(\d+) trajectories -> (\d+) tokens", capsys.readouterr().out).groups()
    assert 2 <= 2 * int(trajectories) == int(tokens)
    if "stages" in flags:                                       # frames, features, 3 soft masks, hard, read
        assert read_film(f"{base}-stages.png").shape[1] == 7 * (128 + 4)
    if frames == 30:
        assert numbers(film[:, :224:7, ::7]) == list(range(30))
        # frames above, trajectories below; after a margin of 80, each is 224 wide, with a gap of 4
        last = 80 + 7 * 228
        assert numbers(sheet[:, :224:7, last:last + 224:7]) == [29]
    if gap:                                                     # seconds from frame to frame
        assert data.frame_times(f"{base}-trajectories.mp4")[1] == pytest.approx(gap)


def labelled(folder, name, count):
    """A bright square that moves over dark ground, with sidecars: object 300 is the only trajectory. An MP4,
    or of one frame a PNG. -> its row in a manifest."""
    mask = np.zeros((count, 48, 48), np.uint16)
    for i in range(count):
        mask[i, 12:28, 4 * i:4 * i + 16] = 300
    frames = np.repeat(40 + mask[..., None] // 2, 3, -1).astype(np.uint8)
    np.savez(folder / f"{name}_mask.npz", mask)
    np.savez(folder / f"{name}_graph.npz", tensor=np.full((1, count), 300))
    if count == 1:
        data.write_png(folder / f"{name}.png", frames[0])
        return {"image": f"{name}.png"}
    encode(folder / f"{name}.mp4", frames)
    return {"video": f"{name}.mp4"}


def test_pretrain(tmp_path, capsys):
    """Catches: labels of real video that never reach the loss; a damaged file that ends the run or is not
    counted; clips of different lengths that do not fit into one picture; files that are missing; a resumed
    run that is another one, or of another size."""
    rows = []
    for i in range(8):
        row = labelled(tmp_path, f"v{i}", 1 if i % 2 else 6)
        rows.append(row | {"split": "val" if i < 3 else "train"})
    for name in ("v0.mp4", "v4.mp4"):                           # one held out, one to learn from
        (tmp_path / name).write_text("no video")
    argv = ["pretrain", *SMALL, "--size", "tiny", "--steps", 4, "--out", tmp_path, "--name"]
    run(trajtok.main, *argv, "a", "--data", manifest(tmp_path / "m.json", rows), "--augment")
    run(trajtok.main, "pretrain", "--name", "a", "--out", tmp_path, "--resume", "--steps", 6)
    folder = tmp_path / "segmenter-a"
    lines = log(folder)
    assert [line["step"] for line in lines] == list(range(6))
    assert all(line["focal"] > 0 and line["dice"] > 0 for line in lines)
    assert "v4.mp4" in capsys.readouterr().err
    assert read_result(folder)["left_out"] > 0
    assert set(os.listdir(folder)) == FILES - {"found.png"}
    # on the world; its weights were trained for six steps, and hardly change
    run(trajtok.main, *argv, "b", "--init", folder, "--lr", 1e-9, "--eval-clips", 4)
    one, two = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "segmenter-b"))
    nearly(two["segmenter.latents"], one["segmenter.latents"])


def test_two_processes_pretrain_as_one(tmp_path):
    """Catches: processes that all train on the same clips; gradients that are not summed, or twice too
    large."""
    argv = ["pretrain", *SMALL, "--steps", 2, "--eval-clips", 4, "--out", tmp_path]
    run(trajtok.main, *argv, "--name", "one", "--batch", 4)
    in_ranks(2, lambda rank: run(trajtok.main, *argv, "--name", "two", "--batch", 2))
    same_weights(tmp_path / "segmenter-one", tmp_path / "segmenter-two", 1e-4)
    logs = (log(tmp_path / f"segmenter-{name}") for name in ("one", "two"))
    for one, two in zip(*logs, strict=True):
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)
    assert read_config(tmp_path / "segmenter-two")["world_size"] == 2


def test_trajectories_are_counted_on_ground_and_objects():
    """Catches: a true segmentation that does not get the best scores, or trajectories of the ground counted
    as those of objects; counts of made clips that change beside a clip of another kind."""
    labels = torch.tensor([[[[0, 0, 0, 0, 1, 1, 3]]]])          # ground, two objects
    other = dict(video=torch.zeros(1, 1, 1, 7, 3), labels=labels)
    made = other | dict(motion=None)
    # each thing as it is; cut in two; a point of the ground in each object's trajectory, which stays its own
    for ids, on_ground, on_objects in (("0000112", 1, 2), ("0011234", 2, 3), ("0012112", 1, 2)):
        points = torch.tensor([list(map(int, ids))])
        seg = segmenter.assign(segmenter.one_hot(points, 5), (1, 1, 7))
        for batches in ([made], [other, made], [other]):
            result, _ = trajtok.evaluate_segmenter(mock.Mock(return_value=seg), batches, torch.device("cpu"))
            counts = (on_ground, on_objects) if made in batches else (None, None)
            assert (result.get("on_ground"), result.get("on_objects")) == counts
            assert (result["object_iou"] == result["veq"] == 1) == (ids == "0000112")


def rows_of(scores, **same_in_all):
    """{name: a score for each seed} -> what `compare` writes."""
    rows = []
    for name, values in scores.items():
        results = [dict(seed=0, r1=value, **same_in_all) for value in values]
        rows.append(dict(name=name, results=results))
    return rows


def test_a_table_by_hand():
    """Catches: a deviation of the wrong kind, differences to another row, a star for noise."""
    scores = dict(base=(0.1, 0.3), better=(0.5, 0.7), noise=(0.2, 0.4), one=(None,))
    rows = rows_of(scores, tokenizer="a")
    lines = [re.split("  +", line.strip()) for line in trajtok.summary(rows)]
    cells = ["0.200 +-0.141", "0.600 +-0.141 (+0.400*)", "0.300 +-0.141 (+0.100 )", "-"]
    assert lines == [list(scores), ["seeds", "2", "2", "2", "1"], ["r1", *cells]]


REFUSED = (
    ("", "pretrain|show"), ("fly", "pretrain|show"), ("table no", "no:"), ("compare base", "NAME: FLAGS"),
    ("compare a: --script no.py", "failed"), ("show TEXT", "decoded"), ("show HALF --frames 0", "decoded"),
    ("show CLIP --tokens-per-trajectory 3", "1, 2, 4"), ("show CLIP --weights CLIP", "whole file"),
    ("show CLIP --weights evil.pth", "whole file"),
    ("pretrain --data BARE", "mask"), ("pretrain --init no", "no/model"),
    ("pretrain --lr 1e30 --warmup 0 --clip 1e30", "lower --lr"),
    ("show CLIP --frames -1", "--frames -1"), ("show CLIP --window -1", "--window -1"),
    ("show CLIP --weights old", "no trajectory tokenizer"), ("table LIST", "no JSON object"),
    ("table ROWS", "not a table"), ("table WORDS", "not a table"), ("compare a: --json ROWS", "not a table"))


@pytest.mark.parametrize("argv, words", REFUSED)
def test_bad_commands_are_refused(media, clip_run, tmp_path, capsys, monkeypatch, argv, words):
    """Catches: a traceback, or several lines, for what a person is likely to get wrong; training on NaN; code
    in a checkpoint that is run."""
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    bare = manifest(tmp_path / "m.json", 4 * [{"video": str(media / "clip0.mp4")}])
    files = dict(CLIP=media / "clip0.mp4", TEXT=media / "text.mp4", HALF=media / "half.mp4", BARE=bare)
    files["LIST"] = manifest(tmp_path / "list.json", [])
    files["ROWS"] = manifest(tmp_path / "rows.json", dict(rows=[dict(name="a")]))
    files["WORDS"] = manifest(tmp_path / "words.json", dict(rows=[dict(name="a", results=["b"])]))
    trajtok.write_json(tmp_path / "old/config.json", dict(trajtok=dict(width=3)))
    argv = [files.get(word, word) for word in argv.split()]
    defaults = {"show": ["--weights", clip_run], "pretrain": SMALL}
    argv[1:1] = defaults.get(argv[0], []) if argv else []
    assert words in refused(capsys, trajtok.main, *argv)
    assert not Path("evil").exists()


CLAIMS = (
    (dict(against="high", against_score="worse"), "holds"),
    (dict(row="low", against="high"), "does not hold"),
    (dict(row="low", against="high", less=True), "holds"),
    (dict(against="noisy"), "undecided"),
    (dict(against="single"), "undecided"),
    (dict(against="absent"), "not measured"))


def test_a_claim_is_judged_by_twice_the_standard_error(tmp_path):
    """Catches: a verdict from the sign alone, one that ignores `less`, a missing row taken for a tie."""
    scores = dict(high=(0.8, 0.9), low=(0.1, 0.2), noisy=(0.0, 0.9), single=(0.5,))
    manifest(tmp_path / "a.json", dict(rows=rows_of(scores, worse=0.0)))
    plain = dict(claim="c", paper="p", json="a.json", score="r1", row="high")
    for claim, verdict in CLAIMS:
        line = trajtok.verdicts([plain | claim], tmp_path)[-1]
        assert line.endswith(f"| {verdict} |"), claim


def test_the_table_of_claims_is_made_from_its_json(capsys):
    """Catches: a figure typed by hand, a table that was not made again after a run."""
    run(trajtok.main, "table", HERE / "results" / "claims.json")
    assert capsys.readouterr().out in (HERE / "results" / "README.md").read_text()


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: the model
# -----------------------------------------------------------------------------------------------------------

def clip_model(**changes):
    """The smallest video CLIP and a train_clip.Batch of eight made clips."""
    torch.manual_seed(0)
    small = dict(image_size=32, frames=2, num_queries=6, width=32, heads=2, layers=1, text_layers=1,
                 text_width=32, embed=64, patch=8)
    cfg = train_clip.ClipConfig(**small | changes)
    model = train_clip.build(cfg, data.load_encoding("world"), torch.device("cpu"))
    made = data.WorldBatches(data.World(cfg.image_size, cfg.frames), 8)[0]
    return model, train_clip.prepare(model, made, 0)


@pytest.mark.parametrize("name", ("trajvit2", "rlt", "trajvit"))
def test_tokens_that_are_not_real_are_not_read(name):
    """Catches: a real token that is lost, a dead one that is read, packed clips that see each other. Oracle:
    the transformer on the real tokens of each clip alone."""
    model, batch = clip_model(tokenizer=name, frames=6, num_queries=12, rlt_threshold=0.3)
    net = model.video
    z, mask, _ = net.tokenizer(batch.video, 2, batch.labels)
    assert 0 < mask.sum() < mask.numel()
    for net.pack in (True, False):
        cls, count, _ = net(batch.video, 2, batch.labels)
        assert torch.equal(count, mask.sum(1))
        for i in range(8):
            alone = net.transformer(torch.cat((net.cls[0], z[i, mask[i]]))[None])
            nearly(cls[i], alone[0, 0])
    # no trajectory at all: CLS still sees itself
    net.tokenizer.forward = lambda *_: (z, torch.zeros_like(mask), None)
    assert net(batch.video, 2, batch.labels)[0].isfinite().all()


def test_captions_are_read_whole_and_without_their_padding():
    """Catches: a vector that depends on how its caption was padded; words that are not read."""
    model, (_, _, ids, mask) = clip_model()
    vectors = model.embed_text(ids, mask)
    other_padding = torch.where(mask, ids, 7)
    nearly(model.embed_text(other_padding[:, :40], mask[:, :40]), vectors)
    last = mask.sum(1, keepdim=True) - 2                        # the word before the end token
    changed = model.embed_text(ids.scatter(1, last, 65), mask) - vectors
    assert (changed.abs().amax(1) > 1e-5).all()


@pytest.mark.parametrize("name", train_clip.TOKENIZERS)
def test_every_tokenizer_learns_a_batch_by_heart(name):
    """Catches: a loss that cannot fall because gradients are cut, or that falls towards the wrong pairs; a
    parameter that is never used."""
    model, batch = clip_model(tokenizer=name, width=64, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(55):
        optimizer.zero_grad()
        losses.append(train_clip.whole_step(model, batch, 1))
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    video, _, _, _ = model.embed_video(batch.video, 1, batch.labels)
    similarity = model.embed_text(batch.ids, batch.mask) @ video.T
    assert similarity.argmax(1).eq(torch.arange(8)).float().mean() > 0.8
    if name == "trajvit2":
        assert losses[-1]["focal"] < 0.8 * losses[0]["focal"]


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: the tokenizers
# -----------------------------------------------------------------------------------------------------------

def test_patches_are_a_convolution():
    """Catches: pixels of one patch in another, positions of another patch or size, an odd last frame that is
    lost."""
    model, batch = clip_model(tokenizer="vit3d", frames=6, position_scale=3.0)
    net, odd = model.video.tokenizer, batch.video[:, :5]
    even = torch.cat((odd, odd[:, -1:]), 1)
    x = segmenter.normalise(even).transpose(1, 2)               # (8, channel, 6, 32, 32)
    kernel = rearrange(net.embed.weight, "d (t p q c) -> d c t p q", t=2, p=8, q=8)
    naive = F.conv3d(x, kernel, net.embed.bias, stride=(2, 8, 8))
    nearly(net(odd)[0], naive.flatten(2).mT + net.position)
    assert net.position.std().item() == pytest.approx(3 * 0.02, rel=0.1)


def test_vivit_is_the_naive_factorised_encoder():
    """Catches: time steps that see each other's patches, a temporal encoder without order, a lost CLS."""
    model, batch = clip_model(tokenizer="vivit", frames=6)
    net, tokenizer = model.video, model.video.tokenizer
    z, _, _ = tokenizer(batch.video[:1])
    read = [net.cls[:, 0]]
    for step in z.split(16, 1):                                 # the patches of a time step
        read.append(net.transformer(torch.cat((net.cls, step), 1))[:, 0])
    expected = tokenizer.temporal(torch.stack(read, 1) + tokenizer.time)
    nearly(net(batch.video[:1])[0], expected[:, 0])


def test_tokenlearner_is_the_naive_weighted_sum():
    """Catches: weights over the wrong axis, time steps that are mixed, a reduction at another depth."""
    model, batch = clip_model(tokenizer="tokenlearner", frames=6, layers=3, learned_tokens=3)
    net, tokenizer = model.video, model.video.tokenizer
    layers = net.transformer.layers
    z, _, _ = tokenizer(batch.video[:1])
    x = layers[1](layers[0](torch.cat((net.cls, z), 1)))        # of three layers: before the third
    steps = x[:, 1:].unflatten(1, (3, 16))                      # (1, time step, patch, width)
    weights = tokenizer.score(tokenizer.norm(steps)).softmax(2)
    learned = torch.einsum("btps,btpd->btsd", weights, steps).flatten(1, 2)
    expected = layers[2](torch.cat((x[:, :1], learned), 1))
    nearly(net(batch.video[:1])[0], net.transformer.norm(expected)[:, 0])


def test_rlt_keeps_what_changes():
    """Catches: a comparison of the wrong frames, a mean over the wrong pixels, a first step dropped."""
    model, batch = clip_model(tokenizer="rlt", frames=8)
    x = segmenter.normalise(batch.video)
    _, kept, _ = model.video.tokenizer(batch.video)
    difference = x[:, [3, 5, 7]] - x[:, [0, 2, 4]]              # (8, 3, channel, 32, 32)
    naive = F.avg_pool2d(difference.abs().mean(2), 8) > 0.1
    assert 0 < naive.sum() < naive.numel()
    assert kept[:, :16].all()
    assert torch.equal(kept[:, 16:], naive.flatten(1))


def test_trajvit_is_the_naive_mean_of_each_mask():
    """Catches: points counted to another trajectory, frame or clip; unlabelled points that are read; frames
    without the trajectory that are; x, y and time in another order."""
    model, batch = clip_model(tokenizer="trajvit", frames=4, num_queries=12)
    net, video, labels = model.video.tokenizer, batch.video[:2], batch.labels[:2]
    labels[0, :2, :16] = -1
    z, mask, _ = net(video, 1, labels)
    f, grid = net.extract(segmenter.normalise(video))
    f = f.unflatten(1, grid)
    points = segmenter.labels_on_grid(labels, grid, 12).unflatten(1, grid)
    assert torch.equal(mask, segmenter.one_hot(points, 12).flatten(1, 3).any(1))
    for b, k in mask.nonzero().tolist():
        looks, places = [], []
        for time in range(4):
            own = points[b, time] == k
            if own.any():
                looks.append(f[b, time, own].mean(0))
                y, x = (own.nonzero().float().mean(0) + 0.5) / 8
                places.append([x, y, (time + 0.5) / 4])
        angles = torch.tensor(places)[..., None] * math.pi * 2 ** torch.linspace(0, 6, 16)
        place = net.where(segmenter.waves(angles.flatten(1)))
        seen = torch.ones(1, len(looks)) > 0
        token = net.appearance(torch.stack(looks)[None], seen) + net.place(place[None], seen)
        nearly(z[b, k], net.out(token)[0], 1e-3)


@pytest.mark.parametrize("size", ("nano", "large"))
@pytest.mark.parametrize("flag", ("detach", "hierarchical", "hard-mask", "mean-start", "places", "path",
                                  "recompute"))
def test_ablation_flags_reach_the_tokenizer(flag, size):
    """Catches: a flag that is parsed and never used, or that the size's values overwrite."""
    size_flags = "--image-size 32 --frames 2 --num-queries 6 --position-scale 2"
    for value, written in ((True, f"--{flag}"), (False, f"--no-{flag}")):
        argv = ["--size", size, written, *size_flags.split()]
        cfg = data.configure(train_clip.ClipConfig, train_clip.CLIP_SIZES, argv)
        with torch.device("meta"):
            tokenizer = train_clip.TrajViT2(cfg)
        assert getattr(tokenizer.cfg, flag.replace("-", "_")) == value
        assert tokenizer.cfg.position_scale == 2
        assert tokenizer.segmenter.latents.shape == (6, trajtok.SIZES[size].dim)


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: one step
# -----------------------------------------------------------------------------------------------------------

def by_the_book(model, batch, m):
    """One forward pass, the loss as the paper writes it, one backward pass."""
    video, _, _, seg = model.embed_video(batch.video, m)
    logits = video @ model.embed_text(batch.ids, batch.mask).T / model.temperature
    right = torch.cat((logits.log_softmax(0).diag(), logits.log_softmax(1).diag()))
    contrastive = -right.mean()
    focal, dice = segmenter.segmentation_loss(seg, batch.labels)
    segmentation = 0.5 * focal + model.cfg.dice_weight * dice
    (contrastive + model.cfg.segmentation_weight * segmentation).backward()
    return dict(contrastive=contrastive.item(), focal=focal.item(), dice=dice.item())


def one_step(take_step, **changes):
    """Terms of the loss, and all gradients of a step on eight clips, labelled unevenly."""
    model, batch = clip_model(segmentation_weight=3.0, **changes)
    batch.labels[1] = -1
    batch.labels[2, :, :10] = -1
    terms = take_step(model, batch, 2)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [terms[name] for name in ("contrastive", "focal", "dice")], gradients


@pytest.mark.parametrize("micro_batch, dice_weight", ((0, 1.0), (0, 0.0), (4, 1.0), (2, 0.0), (1, 1.0)))
def test_micro_batches_are_the_whole_batch(micro_batch, dice_weight):
    """Catches: negatives that shrink with the micro-batch, clips that weigh by their labels, a temperature
    that is counted once for each part, a weight of the loss that does not reach it."""
    take_step = train_clip.micro_batch_step if micro_batch else train_clip.whole_step
    mine = one_step(take_step, micro_batch=micro_batch, dice_weight=dice_weight)
    expected = one_step(by_the_book, dice_weight=dice_weight)
    nearly(mine, expected)


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: the evaluation
# -----------------------------------------------------------------------------------------------------------

def test_recalls_are_naive_ranks():
    """Catches: candidates and queries swapped, ranks that are one off; the worst of several answers; a right
    one that counts as wrong; ties or NaN that pass for hits."""
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, *range(4, 30)])
    right = owner[:, None] == torch.arange(30)                  # captions x clips
    similarity = (torch.randn(right.shape) + right).round(decimals=1)       # with ties
    for sim, ok in ((similarity, right), (similarity.T, right.T)):
        ranks = []
        for row, answers in zip(sim, ok):
            best = row[answers].max()
            ranks.append((row[~answers] >= best).sum())
        expected = {f"x_r{n}": np.mean([rank < n for rank in ranks]) for n in (1, 5, 10)}
        assert train_clip.recalls(sim, "x", ok) == pytest.approx(expected)
    assert train_clip.recalls(torch.full((40, 40), math.nan), "x", torch.eye(40) > 0)["x_r10"] == 0


def test_linear_probe():
    """Catches: a probe that sees the test labels (better than chance on noise), that does not converge, or is
    upset by the scale of a feature."""
    y, noise = torch.randint(4, (600,)), torch.randn(600, 12)
    x = (4 * torch.randn(4, 12)[y] + noise) * torch.logspace(-3, 3, 12)
    x[:, 5] = 1.0                                               # never changes
    for features, least, most in ((x, 0.97, 1), (noise, 0.1, 0.4)):
        assert least <= train_clip.linear_probe(*zip(features.split(200), y.split(200))) <= most


def test_flops_of_every_tokenizer(capsys):
    """Catches: --flops that runs the models, leaves out a tokenizer, or counts the same at every length."""
    run(train_clip.main, "--flops", "--image-size", 32, "--patch", 16, "--layers", 2)
    _, *lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: list(map(float, line.split()[1:])) for line in lines}
    assert list(table) == list(train_clip.TOKENIZERS)
    assert all(row == sorted(set(row)) and len(row) == 5 for row in table.values())


def test_the_stage_has_a_setting_of_its_own():
    """Catches: --world that is not read, a stage of another size or number of queries."""
    def sized(*argv):
        cfg = data.configure(train_clip.ClipConfig, train_clip.CLIP_SIZES, argv)
        return trajtok.sized(cfg, trajtok.SIZES["nano"])[1]

    assert sized("--world", "stage").num_queries == 8
    assert data.world_of(sized("--world", "stage")) == data.STAGE
    assert data.world_of(sized("--world", "stage", "--frames", "4")).frames == 4
    assert data.world_of(sized()) == data.World(64, 8, 4, False)


@pytest.mark.parametrize("sees", (True, False))
def test_reversal_asks_which_caption_fits_which_direction(monkeypatch, sees):
    """Catches: a model that cannot see time scored above chance, clips and twins mixed up, a score of 0 for
    pictures, in which no time runs."""
    held_out = data.WorldBatches(data.STAGE, 16, indices=list(range(data.TEST, data.TEST + 16)))
    captions = held_out[0]["captions"]
    back, forth = torch.eye(2)

    def twins(model, batches, damage):
        texts = batches[0]["captions"]
        motion = torch.arange(16) % 2 - 1                       # every second one has no class
        # wrong wherever it must not be counted: there a twin has the vector of its clip
        known = torch.tensor([a != b for a, b in zip(texts, captions)]) & (motion >= 0)
        vectors = torch.where(known[:, None] & sees, back, forth)
        return dict(captions=texts, motion=motion, vectors=vectors)

    vectors = iter((forth, back))
    monkeypatch.setattr(train_clip, "embed", twins)
    monkeypatch.setattr(train_clip, "embed_texts", lambda *_: next(vectors).expand(16, 2))
    clips = dict(captions=captions, vectors=forth.expand(16, 2))
    model = mock.Mock(cfg=train_clip.ClipConfig())
    assert train_clip.reversal(model, clips, held_out) == float(sees)
    pictures = data.WorldBatches(dataclasses.replace(data.STAGE, frames=1), 16, [data.TEST])
    assert train_clip.reversal(model, clips, pictures) is None


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: whole runs
# -----------------------------------------------------------------------------------------------------------

RESULT = {"clips", "t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1", "v2t_r5", "v2t_r10", "appearance", "motion",
          "veq", "stq", "live_tokens", "parameters", "gflops", "clips_per_second", "seconds",
          "peak_memory_gb", "seed", "tokenizer"}
FILES = {"config.json", "curves.svg", "found.png", "log.jsonl", "model.safetensors", "result.json",
         "state.pt", "trajectories.png"}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """A finished run on the world."""
    out = tmp_path_factory.mktemp("clip")
    run(train_clip.main, *CLIP, "--eval-every", 2, "--out", out)
    return out / "clip-nano"


def test_run_on_the_world(clip_run):
    """Catches: a command that does not run to its end, results without what a comparison needs, weights that
    TrajTok.from_pretrained cannot read, validation on the test clips."""
    result, lines = read_result(clip_run), log(clip_run)
    assert RESULT | {"control_last_frame", "control_no_order"} <= set(result)
    assert set(os.listdir(clip_run)) == FILES
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert "t2v_r5" in lines[2]
    # of the same weights, but on validation clips
    assert any(lines[2][key] != result[key] for key in set(lines[2]) - {"step"})
    assert {"contrastive", "focal", "dice", "lr", "clips", "gradient_norm", "memory_gb"} <= set(lines[0])
    tokenizer = trajtok.TrajTok.from_pretrained(clip_run)
    assert tokenizer.cfg.image_size == tokenizer.cfg.out_dim == 32


@pytest.fixture
def unscored(monkeypatch):
    """Runs end after the last step."""
    monkeypatch.setattr(train_clip, "score_run", lambda *_: None)


class Masks(train_clip.ViT3D):
    """A tokenizer of one's own, in a file of one's own (this one). Its masks, of patches that are two frames
    deep, get the segmentation loss."""

    def forward(self, video, m=1, labels=None):
        x, _, _ = super().forward(video)
        return x, None, segmenter.assign(x[..., :6].repeat(1, 2, 1), (2, self.side, self.side))


@pytest.mark.parametrize("name", ("trajvit", "vit3d", "vivit", "tokenlearner", "rlt", f"{__file__}:Masks"))
def test_other_tokenizers_run(tmp_path, name):
    """Catches: a tokenizer of the comparison that ends in an error; scores of masks where there are none; a
    fork that needs more than a class in a file, or whose own masks get no loss."""
    run(train_clip.main, *CLIP, "--tokenizer", name, "--out", tmp_path)
    folder = tmp_path / f"clip-nano-{name.rpartition(':')[2]}"
    result = read_result(folder)
    assert RESULT <= set(result)
    assert (result["veq"], result["tokenizer"]) == (None, name)
    assert ("focal" in log(folder)[0]) == ("Masks" in name)


def test_run_on_captioned_videos(media, tmp_path, capsys):
    """Catches: a damaged file that ends a run or hides; made-up scores for what real video does not tell; a
    vocabulary that a resumed, scored or continued run draws up anew; captions cut without a word."""
    rows = [dict(video=str(media / "text.mp4"), caption="zebra " * 60, split="train")]
    for i in range(6):
        texts = [f"grey number {i}", f"a zebra counts to {i}"]
        rows.append(dict(video=str(media / f"clip{i}.mp4"), caption=texts, label=f"kind {i % 2}",
                         split="val" if i < 2 else "train"))
    path, folder = manifest(tmp_path / "m.json", rows), tmp_path / "clip-a"
    argv = [*CLIP, "--data", path, "--save-every", 1, "--out", tmp_path, "--name"]
    run(train_clip.main, *argv, "a", "--augment", "--steps", 3, "--prompt", "grey {}")
    told, result = capsys.readouterr(), read_result(folder)
    assert "1 of 9 captions" in told.out
    assert told.err.count("text.mp4:") == 1
    assert (result["clips"], result["left_out"], result["t2v_r5"]) == (2, 1, 1)
    assert result["motion"] is result["veq"] is None
    assert result["zero_shot"] in (0, 0.5, 1)
    # other captions would make another vocabulary
    words = read_config(folder)["words"]
    run(train_clip.main, *argv, "a", "--resume", "--steps", 5)
    path.write_text(path.read_text().replace("zebra", "heron"))
    assert "has changed" in refused(capsys, train_clip.main, *argv, "a", "--resume", "--steps", 6)
    run(train_clip.main, *argv, "a", "--eval-only")
    run(train_clip.main, *argv, "b", "--init", folder)
    assert read_config(folder)["words"] == read_config(tmp_path / "clip-b")["words"] == words
    model = train_clip.VideoCLIP.from_pretrained(folder)
    assert not model.training and model.encoding.n_vocab == data.word_encoding(words).n_vocab
    with pytest.raises(BadInput, match="not that of a run"):
        train_clip.VideoCLIP.from_pretrained(manifest(tmp_path / "config.json", {}).parent)


def test_pretrained_segmenters_can_be_frozen(clip_run, tmp_path):
    """Catches: --init-segmenter that starts from new weights after all; --freeze-segmenter that lets them
    move, or freezes an encoder of random weights; --init that loads a part of a run; a comparison in which
    one row has seen more clips than the table says."""
    weights = {}
    flags = dict(
        frozen="--freeze-segmenter --init-segmenter", free="--init-segmenter", same="--lr 0 --init")
    for name, started in flags.items():
        argv = [*CLIP, "--out", tmp_path, "--warmup", 0, "--seed", 1, "--name", name]
        run(train_clip.main, *argv, *started.split(), clip_run)
        weights[name] = load_file(tmp_path / f"clip-{name}" / "model.safetensors")
        result = read_result(tmp_path / f"clip-{name}")
        assert result["clips_seen"] == result["clips_before"] == 8
    start = load_file(clip_run / "model.safetensors")
    nearly(weights["same"], start, 0)
    for name, value in start.items():
        if name.startswith("video.tokenizer.segmenter."):
            assert torch.equal(weights["frozen"][name], value), name
            assert (weights["free"][name] - value).abs().max() < 0.1, name
    latents, norm = "video.tokenizer.segmenter.latents", "video.tokenizer.encoder.perceiver.norm_ctx.weight"
    assert not torch.equal(weights["free"][latents], start[latents])
    assert not torch.equal(weights["frozen"][norm], torch.ones(96))
    # a tokenizer's folder does not say how many clips it has seen
    trajtok.TrajTok.from_pretrained(clip_run).save_pretrained(tmp_path / "alone")
    run(train_clip.main, *argv[:-1], "alone", "--init-segmenter", tmp_path / "alone")
    assert "clips_before" not in read_result(tmp_path / "clip-alone")
    # three processes with batches of two
    config = read_config(tmp_path / "alone") | dict(steps=5, batch=2, world_size=3)
    manifest(tmp_path / "alone/config.json", config)
    run(train_clip.main, *argv[:-1], "three", "--init-segmenter", tmp_path / "alone")
    assert read_result(tmp_path / "clip-three")["clips_before"] == 30


def test_a_killed_run_resumes_exactly(tmp_path):
    """Catches: anything that --resume forgets: optimizer, draws, place in the data, log lines. Run a is never
    stopped; run b is killed (no handler runs), scored as it is, and resumed: the same to the last bit."""
    argv = [*CLIP, "--steps", 14, "--save-every", 3, "--probe-clips", 8, "--out"]
    run(train_clip.main, *argv, tmp_path / "a")
    command = [sys.executable, HERE / "train_clip.py", *argv, tmp_path / "b"]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    a, b = tmp_path / "a" / "clip-nano", tmp_path / "b" / "clip-nano"
    while not (b / "log.jsonl").exists() or len(log(b)) < 5:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 3 <= torch.load(b / "state.pt")["step"] < 14, "it was over before it was killed"
    run(train_clip.main, *argv, tmp_path / "b", "--eval-only", "--tokens-per-trajectory", 4)
    assert read_result(b)["live_tokens"] >= 4
    # the other flags are in config.json
    run(train_clip.main, "--resume", "--out", tmp_path / "b")
    assert without_clock(log(b)) == without_clock(log(a))
    one, two = (torch.load(folder / "state.pt") for folder in (a, b))
    nearly(two["model"], one["model"], 0)
    nearly(two["optimizer"]["state"], one["optimizer"]["state"], 0)


@pytest.mark.parametrize("micro_batch", (0, 2))
def test_two_processes_are_one_run(tmp_path, unscored, micro_batch):
    """Catches: a plain command that does not start several processes; processes that see the same clips;
    negatives of the own process only; gradients that are counted twice or not at all."""
    argv = [*CLIP, "--steps", 4, "--warmup", 0, "--device", "cpu", "--out", tmp_path, "--name"]
    run(train_clip.main, *argv, "one", "--batch", 8)
    command = [sys.executable, HERE / "train_clip.py", *argv, "two", "--processes", 2]
    command += ["--micro-batch", micro_batch]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, timeout=300)
    for one, two in zip(log(tmp_path / "clip-one"), log(tmp_path / "clip-two"), strict=True):
        for key in ("contrastive", "focal", "dice", "tokens", "gradient_norm", "temperature", "clips"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), key
    assert read_result(tmp_path / "clip-two")["clips"] == 8


@pytest.mark.parametrize("flag, tolerance", (("--compile", 1e-4), ("--bf16", 0.1)))
def test_ways_to_compute_are_the_same_computation(clip_run, tmp_path, monkeypatch, unscored, flag, tolerance):
    """Catches: a flag that changes what is computed, that ends in an error, or that does nothing."""
    compile_ = nn.Module.compile
    # traced, as a whole, and not translated to C++, which takes minutes
    how = dict(backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_(self, **given, **how))
    run(train_clip.main, *CLIP, flag, "--steps", 1, "--out", tmp_path)
    one, two = log(clip_run)[0], log(tmp_path / "clip-nano")[0]
    for key in ("contrastive", "focal", "dice", "gradient_norm"):
        assert two[key] == pytest.approx(one[key], rel=tolerance)
    assert (flag == "--bf16") == (two["contrastive"] != pytest.approx(one["contrastive"], rel=1e-5))


def test_compare_trains_each_row_and_seed_once(tmp_path, capsys, monkeypatch):
    """Catches: flags or seeds that do not reach the script, a row that is trained a second time, a table
    without the rows of yesterday, or of another comparison that writes meanwhile; two rows of one name."""
    def train_here(command):
        train_clip.main(command[2:])
        rows = trajtok.read_rows(path) | dict(other=dict(name="other", results=[dict(seed=0), dict(seed=1)]))
        trajtok.write_json(path, dict(rows=list(rows.values())))
        return subprocess.CompletedProcess(command, 0)

    train = mock.Mock(side_effect=train_here)
    monkeypatch.setattr(trajtok, "subprocess", mock.Mock(run=train))
    small, path = " ".join(CLIP), tmp_path / "c.json"
    rows = [f"base: {small}", f"detach: --no-detach --text-length 1{{seed}} {small}"]
    argv = ["--script", "train_clip.py", "--json", path, "--out", tmp_path, "--seeds", 0]
    for seeds, count in (([], 2), ([1], 4), ([1], 4)):
        run(trajtok.main, "compare", *argv, *seeds, *rows)
        assert train.call_count == count
    assert {"command", "hardware", "rows"} <= set(json.loads(path.read_text()))
    config = read_config(tmp_path / "clip-detach-1")
    assert (config["detach"], config["seed"], config["text_length"]) == (False, 1, 11)
    # refused before anything is trained
    assert "another name" in refused(capsys, trajtok.main, "compare", "new:", "base: --no-path", *argv)
    assert "another name" in refused(capsys, trajtok.main, "compare", "new:", "new: --path", *argv)
    assert "another name" in refused(capsys, trajtok.main, "compare", rows[0], *argv[2:], "--script", "x.py")
    assert train.call_count == 4
    assert all("cores" in result["hardware"] for result in trajtok.read_rows(path)["base"]["results"])
    assert "No closing quotation" in refused(capsys, trajtok.main, "compare", "odd: --prompt '", *argv)
    run(trajtok.main, "table", tmp_path / "clip-base-0", path)
    assert capsys.readouterr().out.split()[:4] == ["clip-base-0", "other", "base", "detach"]


def test_made_clips_need_no_decoder(tmp_path, monkeypatch):
    """Catches: a training on made clips that ends in an ImportError where PyAV is missing."""
    monkeypatch.setitem(sys.modules, "av", None)
    run(train_clip.main, *CLIP, "--out", tmp_path)
    assert (tmp_path / "clip-nano" / "found.png").stat().st_size > 1000


def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    """Catches: a traceback where a smaller --micro-batch is what helps."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
    monkeypatch.setattr(train_clip, "whole_step", mock.Mock(side_effect=error))
    line = refused(capsys, train_clip.main, *CLIP, "--out", tmp_path)
    assert re.search("2 GiB.*--micro-batch.*--recompute", line)


# -----------------------------------------------------------------------------------------------------------
# train_clip.py: bad input
# -----------------------------------------------------------------------------------------------------------

BAD_FLAGS = (
    ("--size huge", "invalid choice: 'huge'"), ("--no-such-flag", "no-such-flag"), ("--lr fast", "fast"),
    ("--lr nan", "--lr nan"), ("--image-size 33", "multiple of 32"), ("--batch 0", "--batch 0"),
    ("--probe-clips 1", "--probe-clips 1"),
    ("--heads 3", "--heads 3"), ("--tokens-per-trajectory 3", "1, 2 or 4"),
    ("--tokenizer magic", "trajvit2, trajvit"), ("--tokenizer vit3d --patch 7", "--patch 7"),
    ("--tokenizer rlt --no-detach", "rlt: has no segmenter"), ("--freeze-segmenter", "--init-segmenter"),
    ("--init-segmenter no", "no/model"), ("--device abacus", "abacus"), ("--text cl1000k", "cl100k_base"),
    ("--tokenizer no.py:No", "FILE.py:CLASS"), ("--eval-only", "config.json"), ("--val no.json", "no.json"),
    ("--mix 1,2", "--mix 1,2"), ("--data world,", "without a name"),
    ("--data SILENT", "caption"), ("--data BROKEN", "none of the 2"),
    ("--out SILENT", "--out"), ("--name nano", "--overwrite"), ("--world moon", "--world moon"),
    ("--resume --name nano --width 64", "another model or size"))


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags_are_refused(media, clip_run, tmp_path, capsys, monkeypatch, flags, words):
    """Catches: a flag that is ignored, that ends in a traceback, or is found wrong after the training."""
    monkeypatch.chdir(tmp_path)
    if "--name nano" in flags:                                  # a run that there is
        shutil.copytree(clip_run, "out/clip-nano")
    clips = ("clip0.mp4", "val"), ("text.mp4", "train"), ("half.mp4", "train")
    silent = [{"video": str(media / name), "split": split} for name, split in clips]
    manifest(tmp_path / "SILENT.json", silent)
    manifest(tmp_path / "BROKEN.json", [row | {"caption": "x"} for row in silent])
    argv = [f"{word}.json" if word.isupper() else word for word in flags.split()]
    assert words in refused(capsys, train_clip.main, *CLIP, *argv)
    if "--resume" in flags:                                     # the run can still go on
        assert read_config(Path("out/clip-nano")) == read_config(clip_run)


# -----------------------------------------------------------------------------------------------------------
# train_vlm.py: the decoder
# -----------------------------------------------------------------------------------------------------------

# the second's heads together are wider than its width, and it shares nothing
TOYS = {
    "tied": train_vlm.DecoderConfig(96, 48, 80, 2, 4, 2, head_dim=12, max_position_embeddings=64),
    "untied": train_vlm.DecoderConfig(96, 32, 56, 3, 6, 3, head_dim=16, rope_theta=1e4, rms_norm_eps=1e-2,
                                      max_position_embeddings=64, tie_word_embeddings=False)}
TOWERS = {"whole": train_vlm.SigLIP2Config(32, 2, 4, 56, patch_size=8, image_size=32),
          "alone": train_vlm.SigLIP2Config(24, 3, 3, 40, patch_size=7, image_size=48, layer_norm_eps=1e-2)}
# what transformers 5.24.0 gives for filled() weights: of logits, or features, [0, -1, :4] and the mean of all
# absolute values
PUBLISHED = {"tied": (0.209282, 0.457972, 0.703628, 0.944624, 1.343086),
             "untied": (-0.407078, -0.415097, 0.860565, -0.525057, 0.536311),
             "whole": (-0.957238, -0.596242, 1.369182, -0.546406, 0.860582),
             "alone": (0.176977, -1.823300, 1.124524, -0.218047, 0.844152)}


def published(name, output):
    found = [*output[0, -1, :4].tolist(), output.abs().mean().item()]
    np.testing.assert_allclose(found, PUBLISHED[name], atol=1e-4)


def filled(module):
    """Weights that any program can make again: waves whose phase is the name's, with or without the
    hub's prefix."""
    for name, p in module.named_parameters():
        name = re.sub(r"^(model|vision_model)\.", "", name)
        phase = zlib.crc32(name.encode()) % 1000
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.7 + phase).view(p.shape)
        size = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5 * 2
        size = 1.0 if "position" in name else size
        norm = p.dim() == 1 and "norm" in name and name.endswith("weight")
        p.data = (size * wave + norm).float()
    return module.eval()


def toy(name="tied"):
    return filled(train_vlm.Decoder(TOYS[name]))


def toy_ids(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 96, shape))


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_the_decoder_gives_published_numbers_with_and_without_a_cache(name):
    """Catches: norms after rotary, adjacent pairs, the wrong key head for a query head, a scale; a cache
    whose keys are at the wrong place or rotated by the wrong position; targets that pick other positions
    than they say; an answer that is not the naive loop's, with a stop token in it, or beyond the context."""
    model, ids = toy(name), toy_ids(2, 9)
    logits = model(ids)
    published(name, logits)
    cache = {}
    parts = [model(part, cache=cache) for part in ids.split((4, 1, 3, 1), 1)]
    close(torch.cat(parts, 1), logits, 1e-5)
    targets = torch.where(ids % 2 == 0, ids, -1)
    losses = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
    close(model(ids, targets), losses[targets >= 0], 1e-5)
    naive = ids[:1]
    for _ in range(10):
        naive = torch.cat((naive, model(naive)[:, -1:].argmax(-1)), 1)
    naive = naive[0, 9:].tolist()

    def said(stop=(), known=None, most=10, ids=ids[:1]):
        return list(train_vlm.generate(model, model.embed_tokens(ids), stop, known, most))

    assert said() == naive and said(stop=[naive[4]]) == naive[:naive.index(naive[4])]
    assert max(said(known=7)) < 7 and len(said(most=100, ids=toy_ids(1, 60))) == 4
    with pytest.raises(BadInput, match="a context of 64"):
        model(toy_ids(1, 65))


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_the_decoder_is_the_published_implementation(tmp_path, name):
    """Catches: names, shapes or numbers that differ from the hub's, which writes the folder, in shards,
    and computes."""
    transformers = pytest.importorskip("transformers", reason="an optional package")
    values = dataclasses.asdict(TOYS[name])
    rope = dict(rope_type="default", rope_theta=values["rope_theta"])
    theirs = filled(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values, rope_parameters=rope)))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    mine, logits = train_vlm.Decoder.from_pretrained(tmp_path), theirs(toy_ids(2, 9)).logits
    assert mine.cfg == TOYS[name]
    close(mine(toy_ids(2, 9)), logits, 1e-4)
    published(name, logits)


def test_decoders_are_as_large_as_published():
    """Catches: a width, a layer or a bias too many in one of the published sizes."""
    counts = {"nano": 722_752, "0.6b": 596_049_920, "1.7b": 1_720_574_976, "4b": 4_022_468_096}
    for name, count in counts.items():
        with torch.device("meta"):
            decoder = train_vlm.Decoder(train_vlm.DECODERS[name])
        assert sum(p.numel() for p in decoder.parameters()) == count


def published_folder(folder, module, **changes):
    """A decoder or a vision tower in a folder as the hub has them: config.json and model.safetensors."""
    prefix, config = "model.", dict(model_type="qwen3", **dataclasses.asdict(module.cfg))
    if isinstance(module, train_vlm.SigLIP2):
        prefix, config = "vision_model.", dict(model_type="siglip", vision_config=config)
    folder.mkdir(exist_ok=True)
    weights = {prefix + name: value for name, value in module.state_dict().items()}
    trajtok.write_weights(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("change, words", (
    (dict(model_type="llama"), "model_type 'llama'"), (dict(attention_bias=True), "biases"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "scaled rotary"),
    (dict(num_hidden_layers=3), "Missing"), (dict(num_hidden_layers=1), "Unexpected")))
def test_published_folders_are_read_strictly(tmp_path, change, words):
    """Catches: weights left as they were made, or read from another model or another kind of it."""
    with pytest.raises(BadInput, match=words):
        train_vlm.Decoder.from_pretrained(published_folder(tmp_path / "qwen", toy(), **change))


# -----------------------------------------------------------------------------------------------------------
# train_vlm.py: words and vision
# -----------------------------------------------------------------------------------------------------------

CHAT = """<|im_start|>user
<0.0-0.9s>##<1.0-1.9s>#What moves?<|im_end|>
<|im_start|>assistant
a dog<|im_end|>
<|im_start|>user
And then?<|im_end|>
<|im_start|>assistant
it stops<|im_end|>
"""


def test_the_built_in_tokenizer_and_conversations():
    """Catches: text that becomes a special token, turns that are not Qwen3's, a loss on what the
    assistant did not say, an answer that is asked for in another way than it was trained on, windows
    out of place."""
    e = train_vlm.load_tokenizer()
    assert len(e.encode_ordinary("What colour is the largest object?")) == 7
    assert len(e.encode_ordinary("<8.0-8.9s>")) == 1
    odd = "né✓漢🙂 <|im_end|> e\u0301\n"
    end = e.encode_single_token(train_vlm.TURN_END)
    assert e.decode(e.encode_ordinary(odd)) == odd and end not in e.encode_ordinary(odd)
    turns = [dict(question="What moves?", answer="a dog"), dict(question="And then?", answer="it stops")]
    row = train_vlm.chat(e, turns, [("<0.0-0.9s>", range(3, 5)), ("<1.0-1.9s>", range(5, 6))])
    assert e.decode([token for token, _, _ in row]).replace("<|video_pad|>", "#") == CHAT
    spoken = e.decode([token for token, _, own in row if own])
    assert spoken == "a dog<|im_end|>it stops<|im_end|>"
    asked = train_vlm.chat(e, [turns[0] | dict(answer=None)])
    assert train_vlm.chat(e, turns)[:len(asked)] == asked
    _, visual, targets = train_vlm.lay_out([row, asked])
    assert e.decode(targets[targets >= 0].tolist()) == spoken
    assert visual[visual >= 0].tolist() == [3, 4, 5]


def siglip_picture(name):
    shape = (2, 3, TOWERS[name].image_size, TOWERS[name].image_size)
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, shape)).float()


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_siglip_gives_published_numbers(tmp_path, name):
    """Catches: exact GELU, a norm too many, transposed positions; a video that is normalised or cut
    otherwise; a text tower that gets in the way."""
    model = filled(train_vlm.SigLIP2(TOWERS[name]))
    y = model.features(siglip_picture(name))
    published(name, y)
    video = random_video(2, 3, model.cfg.image_size, model.cfg.image_size)
    frame = (video[1, 2].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    close(model(video)[1, 2].flatten(0, 1), model.features(frame, post_norm=False)[0], 1e-5)
    folder = published_folder(tmp_path / "siglip", model)
    weights = load_file(folder / "model.safetensors")
    more = ("text_model.head.bias", "logit_scale", "vision_model.head.probe")
    save_file(weights | {key: torch.zeros(1) for key in more}, folder / "model.safetensors")
    close(train_vlm.SigLIP2.from_pretrained(folder).features(siglip_picture(name)), y, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_siglip_is_the_published_implementation(tmp_path, name):
    """Catches: names or numbers that differ from the hub's: the whole model, and the tower alone."""
    transformers = pytest.importorskip("transformers", reason="an optional package")
    shape = dataclasses.asdict(TOWERS[name])
    theirs = tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape))
    if name == "whole":
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    vocab_size=50, projection_size=32, bos_token_id=1, eos_token_id=2)
        theirs = transformers.SiglipModel(transformers.SiglipConfig(vision_config=shape, text_config=text))
        tower = theirs.vision_model
    filled(tower)
    theirs.save_pretrained(tmp_path)
    mine, x = train_vlm.SigLIP2.from_pretrained(tmp_path), siglip_picture(name)
    assert mine.cfg == TOWERS[name]
    theirs = tower(x).last_hidden_state
    published(name, theirs)
    close(mine.features(x), theirs, 1e-4)


# -----------------------------------------------------------------------------------------------------------
# train_vlm.py: connectors, rows and scores
# -----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def vlm_parts(connector="trajtok", m=1):
    """A small model with random weights, and what it sees of three clips of two windows of 4 frames:
    features 32 wide on a grid of 4 x 4, trajectory 2 dead in the first window of each."""
    cfg = train_vlm.VLMConfig(connector=connector, tokens_per_trajectory=m, window=4, questions=2)
    shape = dataclasses.replace(train_vlm.DECODERS["nano"], hidden_size=32, num_hidden_layers=2)
    model = train_vlm.VLM(cfg, train_vlm.Decoder(shape), segmenter.Segmenter(TINY), None)
    features = torch.randn(6, 4, 4, 4, 32)
    ids = torch.randint(0, 5, features.shape[:-1])
    ids[::2][ids[::2] == 2] = 1
    shapes, counts = ["moon", "star", "ring"], ["0", "1", "2"]
    qa = []
    for shape, count in zip(shapes, counts):
        qa.append([[dict(question="What moves?", answer=shape, options=shapes)],
                   [dict(question="How many?", answer=count, options=counts)]])
    times = [[i / 8 for i in range(8)]] * 3
    batch = dict(features=features.split(2), ids=ids.split(2), qa=qa, times=times, bad=[[]] * 3)
    return cfg, model, batch, features, ids


def test_what_all_features_share_is_taken_off():
    """Catches: features nine tenths of which are the same for all points; a channel that hardly changes
    and becomes huge."""
    placed = train_vlm.PlacedFeatures(32, 4, 3).requires_grad_(False)
    x = 5 + 3 * torch.randn(32) + 0.5 * torch.randn(6, 4, 3, 3, 32)
    places = placed.frame[:, None, None] + placed.row[:, None] + placed.column
    placed.calibrate(x)
    y = (placed(x) - places).flatten(0, 3)
    assert y.mean(0).abs().max() < 1e-4 and (y.square().mean(0) - 1).abs().max() < 1e-3
    placed.calibrate(torch.ones(2, 4, 3, 3, 32))
    assert placed.deviation.min() == pytest.approx(0.1)


@pytest.mark.parametrize("m", (1, 2))
def test_dead_trajectories_take_no_place(m):
    """Catches: a place for a trajectory that owns no point, tokens that depend on another window or on
    points that are not their own."""
    _, model, _, features, ids = vlm_parts(m=m)
    live = [len(own.unique()) for own in ids]
    assert len(set(live)) > 1
    tokens = model.connector(features, ids)
    assert tokens.shape == (m * sum(live), 32)
    owner = model.connector.owner(ids)
    assert owner.unique().tolist() == list(range(sum(live)))
    features[owner == 3] = 9.0
    changed = (model.connector(features, ids) - tokens).abs().amax(1) > 1e-4
    assert changed.nonzero()[:, 0].tolist() == list(range(3 * m, 3 * m + m))


def test_patches_are_naive_means():
    """Catches: pooling over the wrong axes, cells in another order than frame, row, column."""
    _, model, _, features, ids = vlm_parts("patch")
    connector = model.connector
    placed = connector.features(features)
    naive = placed.view(6, 2, 2, 2, 2, 2, 2, 32).mean((2, 4, 6)).flatten(0, 3)
    close(connector(features, ids), connector.project(naive), 1e-5)
    sums = torch.zeros(48, 32).index_add(0, connector.owner(ids).flatten(), placed.flatten(0, 3))
    close(sums / 8, naive, 1e-5)


@torch.no_grad()
def test_windows_are_seen_on_the_vision_grid():
    """Catches: argmax before the logits are resized, features of another frame or cell."""
    seg, video = segmenter.Segmenter(TINY), random_video(2, 3, 32, 32)
    features, ids = train_vlm.segment_windows(seg, video, 4)
    whole = seg(video[1:])
    assert torch.equal(ids[1:], whole.masks((4, 4)))
    close(features[1], whole.features[0].view(3, 4, 2, 4, 2, 32).mean((2, 4)), 1e-5)


def answer_cost(model, tokens, row):
    """-log p of all that is spoken in one conversation, by itself."""
    ids = torch.tensor([token for token, _, _ in row])
    x = model.decoder.embed_tokens(ids)
    for i, (_, number, _) in enumerate(row):
        if number >= 0:
            x[i] = tokens[number]
    log_p = model.decoder(x[None])[0].log_softmax(-1)
    return -sum(log_p[i - 1, ids[i]] for i, (_, _, spoken) in enumerate(row) if spoken)


@pytest.mark.parametrize("name", ("trajtok", "patch"))
def test_rows_are_conversations_that_can_be_learnt_by_heart(name):
    """Catches: a row that reads padding, visual tokens of another clip or ones that drown the words, a loss
    on the question or none on the turn's end, stamps of other frames, gradients that do not reach a part; an
    evaluation that does not find what was learnt. The questions are alike: only the video tells the answers
    apart."""
    cfg, model, batch, features, ids = vlm_parts(name)
    e, tokens = train_vlm.load_tokenizer(), model.connector(features, ids)
    inputs, windows = train_vlm.visual_inputs(batch, model, cfg, CPU)
    assert [mark for mark, _ in windows[1]] == ["<0.0-0.4s>", "<0.5-0.9s>"]
    numbers = [own for clip in windows for _, own in clip]
    assert list(itertools.chain(*numbers)) == list(range(len(tokens)))
    rows = train_vlm.training_rows(batch, windows, e, cfg, 0)
    assert len(rows) == 6 and len({str(row) for row in rows}) == 6
    parts = train_vlm.lay_out(rows)
    with torch.no_grad():
        costs = torch.stack([answer_cost(model, tokens, row) for row in rows])
        close(model(*parts, inputs), costs, 1e-4)
    cfg = dataclasses.replace(cfg, steps=100, warmup=5, lr=2.5)
    optimizer = trajtok.make_optimizer(model, cfg, train_vlm.NANO_RATES)
    for step in range(100):
        train_vlm.set_rates(optimizer, step, cfg)
        optimizer.zero_grad()
        loss = (model(*parts, inputs) / (parts[2] >= 0).sum(1)).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        assert step or abs(loss.item() - math.log(1030)) < 1.0
    assert loss.item() < 0.2
    clips = [{key: batch[key][i:i + 1] for key in batch} | dict(bad=[]) for i in range(3)]
    scores = train_vlm.accuracies(train_vlm.evaluate(model, clips, e, cfg, CPU, data.Damage()))
    assert scores["accuracy"] == scores["accuracy_8_frames"] == 1 and scores["chance"] == pytest.approx(1 / 3)


def test_rates_by_part_and_stage():
    """Catches: a part that learns at another's rate; a second stage that goes on at the end of the
    first one's cosine."""
    cfg, model, *_ = vlm_parts()
    cfg = dataclasses.replace(cfg, caption_steps=10, steps=20, warmup=2)
    optimizer = trajtok.make_optimizer(model, cfg, train_vlm.PUBLISHED_RATES)
    expected = {1: (2e-5, 2e-4), 9: (2e-7, 2e-6), 10: (5e-6, 2.5e-6), 12: (1e-5, 5e-6), 29: (1e-7, 5e-8)}
    for step, (decoder, connector) in expected.items():
        train_vlm.set_rates(optimizer, step, cfg)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert sorted(rates) == pytest.approx(sorted((decoder, connector))), step


@torch.no_grad()
def test_attention_is_the_decoders():
    """Catches: attention of other positions than those that predict the answer, or to what comes later;
    weights that are no softmax, heads that read another group's keys."""
    model, weights = toy("untied"), []
    x = model.embed_tokens(toy_ids(1, 9))
    for last in range(7, 10):                                   # 7 tokens of prompt, 2 of answer
        cache = {}
        model(x[:, :last], cache=cache)
        for (q, k, _), head in itertools.product(cache.values(), range(6)):
            scores = k[0, head // 2] @ q[0, head, -1] / 4
            weights.append(scores.softmax(0)[:7])
    close(train_vlm.attended(model, x, 7), torch.stack(weights).mean(0), 1e-5)


# -----------------------------------------------------------------------------------------------------------
# train_vlm.py: whole runs
# -----------------------------------------------------------------------------------------------------------

VLM_FLAGS = ["--frames", 16, "--clips", 6, "--eval-clips", 3, "--caption-steps", 2, "--steps", 3,
             "--batch", 4, "--warmup", 1, "--questions", 2]


@pytest.fixture(scope="module")
def vlm_run(tmp_path_factory):
    """A folder with a segmenter and a run of each connector on tiny stories."""
    folder = tmp_path_factory.mktemp("vlm")
    trajtok.TrajTok(tiny(num_queries=12)).save_pretrained(folder / "seg")
    for name in ("trajtok", "patch", "blind"):
        run(train_vlm.main, *VLM_FLAGS, "--segmenter", folder / "seg", "--connector", name, "--out", folder)
    return folder


def story_films(folder):
    """Six films with two questions and a caption each, the last damaged."""
    rows, world = [], train_vlm.story_world(16)
    for i in range(6):
        script = data.script(i, world)
        video = data.rasterise(data.stack([script]), 64)[0][0]
        encode(folder / f"clip{i}.mp4", video.numpy(), rate=8)
        qa = [dict(question=turn["question"], answer=turn["answer"]) for turn in script["qa"][:2]]
        rows.append(dict(video=f"clip{i}.mp4", qa=qa, caption=script["caption"],
                         split="val" if i < 2 else "train"))
    (folder / "clip5.mp4").write_bytes(b"no film")
    return manifest(folder / "qa.json", rows)


@pytest.mark.parametrize("name, tokens", (("trajtok", None), ("patch", 8), ("blind", 0)))
def test_runs_write_what_they_say_and_can_be_asked(vlm_run, tmp_path, capsys, name, tokens):
    """Catches: a result that is not flat, a type or a length without a score, a blind model that sees; a
    question about a film or a picture that leaves no answer and no picture."""
    folder = vlm_run / f"vlm-nano-{name}"
    files = {"config.json", "state.pt", "model.safetensors", "curves.svg", "accuracy.svg"}
    assert files <= set(os.listdir(folder))
    result, lines = read_result(folder), log(folder)
    assert {"accuracy", "accuracy_8_frames", "accuracy_what", "chance_16_frames"} <= set(result)
    assert all(isinstance(value, (int, float, str)) for value in result.values())
    assert len(lines) == 5 and tokens in (None, lines[0]["visual_tokens"])
    story_films(tmp_path)
    data.write_png(tmp_path / "still.png", np.full((40, 40, 3), 90, np.uint8))
    for file, frames in (("clip0.mp4", 16), ("still.png", 1)):
        run(train_vlm.main, "ask", tmp_path / file, "What colour is the largest object?",
            "--model", folder, "--out", tmp_path)
        out = capsys.readouterr().out
        assert f"{frames} frames" in out and (" 0 visual tokens" in out) == (name == "blind")
    assert (tmp_path / "clip0-attended.png").exists() == (name != "blind")


def same_weights(a, b, atol=0.0):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) <= atol


def test_a_stopped_run_is_the_same(vlm_run, tmp_path, capsys, monkeypatch):
    """Catches: a checkpoint without the moments, a resumed run that draws other clips or questions; a run
    that flags of another one spoil."""
    argv = [*VLM_FLAGS, "--segmenter", vlm_run / "seg", "--out", tmp_path, "--save-every", 3]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rates = mock.Mock(side_effect=[mock.DEFAULT] * 4 + [KeyboardInterrupt], wraps=train_vlm.set_rates)
        patch.setattr(train_vlm, "set_rates", rates)
        run(train_vlm.main, *argv)
    one, two = vlm_run / "vlm-nano-trajtok", tmp_path / "vlm-nano-trajtok"
    assert len(log(two)) == 4
    run(train_vlm.main, *argv, "--resume")
    assert without_clock(log(one)) == without_clock(log(two))
    same_weights(one, two)
    argv += ["--name", "nano-trajtok", "--resume"]
    assert "another model" in refused(capsys, train_vlm.main, *argv, "--connector", "patch")
    assert read_config(two)["connector"] == "trajtok"
    (two / "state.pt").write_bytes(b"half")
    assert "no whole checkpoint" in refused(capsys, train_vlm.main, *argv)


def test_two_sharded_processes_are_one(vlm_run, tmp_path):
    """Catches: shards (FSDP2) whose losses, gradients or weights are not those of one process with
    twice the batch; a gathered checkpoint that one process, or two, cannot go on from."""
    argv = [*VLM_FLAGS, "--segmenter", vlm_run / "seg", "--out", tmp_path, "--name", "two", "--batch", 2]
    train_vlm.load_tokenizer()                                  # once, not in each of them
    in_ranks(2, lambda rank: run(train_vlm.main, *argv))
    one, two = tmp_path / "vlm-one", tmp_path / "vlm-two"
    shutil.copytree(vlm_run / "vlm-nano-trajtok", one)
    for a, b in zip(log(one), log(two), strict=True):
        for key in ("loss", "gradient_norm", "clips"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    same_weights(one, two, 2e-3)
    # one process and two go on from each other's checkpoints, with the moments
    more = ["--out", tmp_path, "--resume", "--steps", 4]
    run(train_vlm.main, *more, "--name", "two", "--batch", 4)
    in_ranks(2, lambda rank: run(train_vlm.main, *more, "--name", "one", "--batch", 2))
    assert len(log(one)) == len(log(two)) == 6
    same_weights(one, two, 2e-3)


def test_full_size_trains_on_films_from_published_folders(vlm_run, tmp_path, capsys):
    """Catches: the command of the full size, on toys of the same form: folders that are not read, a
    vision tower that is not trained, a damaged film that ends the run or is not counted, a held-out film
    whose caption is learnt, an answer of a saved run that cannot be asked for."""
    path = story_films(tmp_path)
    shape = dataclasses.replace(TOYS["tied"], vocab_size=1100, max_position_embeddings=512)
    decoder = published_folder(tmp_path / "decoder", filled(train_vlm.Decoder(shape)))
    vision = published_folder(tmp_path / "vision", filled(train_vlm.SigLIP2(TOWERS["whole"])))
    run(train_vlm.main, "--size", "4b", "--decoder", decoder, "--vision", vision, "--tokenizer", "world",
        "--segmenter", vlm_run / "seg", "--data", path, "--frames", 16, "--caption-steps", 1, "--steps", 2,
        "--batch", 2, "--warmup", 0, "--lr", 100, "--out", tmp_path, "--name", "full")
    result = read_result(tmp_path / "vlm-full")
    assert result["questions"] == 4 and result["left_out"] == 1 and len(log(tmp_path / "vlm-full")) == 3
    assert "clip5.mp4" in capsys.readouterr().err
    cfg, _, model = train_vlm.open_model(tmp_path / "vlm-full")
    before, after = load_file(vision / "model.safetensors"), model.vision.state_dict()
    moved = {key for key in after if not torch.equal(before[f"vision_model.{key}"], after[key])}
    assert any("q_proj" in key for key in moved) and not any("post_layernorm" in key for key in moved)
    # a tower that learns is not calibrated
    assert (model.connector.features.mean == 0).all() and (model.connector.features.deviation == 1).all()
    parts = [sets.datasets[0].entries for sets in train_vlm.open_films(cfg, 32, 1)]
    names = ["".join(entry["name"][4] for entry in entries) for entries in parts]
    assert names == ["2345", "2345", "01"]
    # open questions got options, of which their answer is one, and one alone
    for (turn,) in itertools.chain(*(entry["qa"] for entry in parts[2])):
        assert turn["options"].count(turn["answer"]) == 1 < len(turn["options"])
    run(train_vlm.main, "ask", tmp_path / "clip0.mp4", "What moves?", "--model", tmp_path / "vlm-full",
        "--out", tmp_path)
    assert "16 frames" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", (
    (["--connector", "qformer"], "--connector qformer"), (["--frames", 12], "a multiple of --window"),
    (["--frames", 4], "--frames 8 or more"), (["--window", 0], "--window 0"),
    (["--tokenizer", "nowhere"], "nowhere"), (["--segmenter", "nowhere"], "nowhere"),
    (["--decoder", "nowhere"], "nowhere"), (["--vision", "x"], "--vision"),
    (["--size", "4b", "--segmenter", "x"], "--decoder and --vision"), (["--data", "x.json"], "--segmenter"),
    (["--data", "nowhere.json", "--segmenter", "SEG"], "nowhere.json"),
    (["ask", "none.mp4", "What?", "--model", "RUN"], "none.mp4"),
    (["ask", "x.mp4", "What?", "--model", "SEG"], "config.json")))
def test_bad_input_of_the_vlm_is_refused(vlm_run, tmp_path, capsys, monkeypatch, argv, words):
    """Catches: a traceback, or a run or a pre-training that begins, where one line should name the value
    and the mend."""
    monkeypatch.chdir(tmp_path)
    paths = {"SEG": vlm_run / "seg", "RUN": vlm_run / "vlm-nano-trajtok"}
    assert words in refused(capsys, train_vlm.main, *(paths.get(arg, arg) for arg in argv))
    assert not (tmp_path / "out").exists()


def test_runs_share_one_whole_segmenter(tmp_path, monkeypatch):
    """Catches: half a segmenter that is taken for a whole one; a second run that makes another."""
    folder = tmp_path / "segmenter-vlm-2"
    folder.mkdir()                                              # as a kill in the middle leaves it
    pretrain = mock.Mock(side_effect=lambda cfg: (folder / "result.json").write_text("{}"))
    monkeypatch.setattr(trajtok, "pretrain", pretrain)
    for seed in (0, 1):
        cfg = train_vlm.VLMConfig(out=str(tmp_path), segmenter_steps=2, seed=seed)
        assert train_vlm.pretrain_segmenter(cfg) == str(folder)
    assert pretrain.call_count == 1


# -----------------------------------------------------------------------------------------------------------
# train_adapter.py: the backbones, and the layouts in which they are published
# -----------------------------------------------------------------------------------------------------------

# head widths that the rotary split does not divide evenly (64: 4 channels stay, 80: 2), sizes other than the
# published ones, and twice an eps that shows
BACKBONES = {
    ("vjepa2", 64): train_adapter.BackboneConfig("vjepa2", 128, 2, 2, 512, 16, 2, 4, 48),
    ("vjepa2", 80): train_adapter.BackboneConfig("vjepa2", 160, 2, 2, 640, 16, 2, 6, 32, eps=0.1),
    ("videomae", 64): train_adapter.BackboneConfig(
        "videomae", 128, 2, 2, 192, 16, 2, 4, 32, eps=1e-12, last_norm=False),
    ("videomae", 88): train_adapter.BackboneConfig(
        "videomae", 88, 2, 1, 96, 14, 2, 6, 42, eps=0.1, last_norm=False),
    ("videomae", 80): train_adapter.BackboneConfig("videomae", 160, 2, 2, 192, 8, 2, 2, 24, eps=0.1)}
# what transformers 5.24.0 gives for weights and clip of `waving`: of features [0, 0, :3], [1, -1, :3] and the
# mean of all absolute values
EXPECTED = {
    ("vjepa2", 64): [-0.53427, 1.32241, 0.50350, 2.16953, -0.00380, 1.78117, 0.81989],
    ("vjepa2", 80): [0.97862, -1.06785, -0.53146, 0.22633, 0.51635, 0.97030, 0.80764],
    ("videomae", 64): [-2.39943, 6.07668, 3.61750, -1.49376, 3.21983, 4.78695, 4.92233],
    ("videomae", 88): [8.39580, -0.46065, 3.91521, -1.83116, 0.42200, -2.09002, 3.56179],
    ("videomae", 80): [0.69635, -0.45268, -0.73594, 0.87359, 0.75776, 0.67514, 0.82382],
}


def backbone_of(cfg):
    family = train_adapter.VJEPA2 if cfg.kind == "vjepa2" else train_adapter.VideoMAE
    return family(cfg).requires_grad_(False)


def wave(*shape, k=0):
    """Numbers in [-1, 1] without a short period, which anyone can make again: sin(0.7 i² + k)."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * i ** 2 + k).float().view(shape)


def waving(cfg):
    """A backbone with such weights, and a clip for it."""
    net = backbone_of(cfg)
    for k, (name, p) in enumerate(net.named_parameters()):
        p.data = 0.2 * wave(*p.shape, k=k)
        if name.endswith("weight") and "norm" in name:
            p.data += 1
    return net, wave(2, cfg.frames, 3, cfg.image_size, cfg.image_size, k=99)


def published_model(cfg, kind="Model"):
    """The published implementation in the shape of cfg."""
    transformers = pytest.importorskip("transformers", reason="an optional package")
    common = dict(hidden_size=cfg.width, num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads,
                  patch_size=cfg.patch, tubelet_size=cfg.tubelet, layer_norm_eps=cfg.eps)
    if cfg.kind == "vjepa2":
        config = transformers.VJEPA2Config(
            **common, crop_size=cfg.image_size, frames_per_clip=cfg.frames, mlp_ratio=cfg.mlp / cfg.width,
            pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1)
        return transformers.VJEPA2Model(config).eval()
    config = transformers.VideoMAEConfig(
        **common, image_size=cfg.image_size, num_frames=cfg.frames, intermediate_size=cfg.mlp,
        use_mean_pooling=not cfg.last_norm, decoder_hidden_size=24, decoder_intermediate_size=24,
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
    return getattr(transformers, "VideoMAE" + kind)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind, head, model", (
    ("vjepa2", 64, "Model"), ("vjepa2", 80, "Model"), ("videomae", 64, "Model"),
    ("videomae", 88, "ForVideoClassification"), ("videomae", 80, "ForPreTraining")))
def test_backbones_are_the_published_implementation(tmp_path, kind, head, model):
    """Catches: a rotation that is right where the release's is not, axes shared out differently, a last norm
    where there is none, the authors' eps, wrong names or sizes, positions of another size of clip, a
    classifier or decoder that stops the encoder from loading."""
    cfg = BACKBONES[kind, head]
    theirs = published_model(cfg, model)
    for p in theirs.parameters():
        # a norm that is 1 or a bias that is 0 could be missing and nobody would see it
        p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")    # in shards
    mine = train_adapter.Backbone.from_pretrained(tmp_path)
    assert mine.cfg == cfg and not mine.training
    x = torch.randn(2, cfg.frames, 3, cfg.image_size, cfg.image_size)
    if kind == "videomae":
        nearly(mine.features(x), getattr(theirs, "videomae", theirs)(x).last_hidden_state)
        return
    nearly(mine.features(x), theirs(x, skip_predictor=True).last_hidden_state)
    larger = published_model(dataclasses.replace(cfg, image_size=80))
    larger.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, 3, 80, 80)
    nearly(mine.features(x), larger(x, skip_predictor=True).last_hidden_state)


@pytest.mark.parametrize("kind, head", EXPECTED)
def test_features_are_the_published_numbers(kind, head):
    """Catches any change of what the backbones compute, the order (t', h', w') of their tokens included."""
    net, x = waving(BACKBONES[kind, head])
    z = net.features(x)
    found = [*z[0, 0, :3].tolist(), *z[1, -1, :3].tolist(), z.abs().mean().item()]
    assert found == pytest.approx(EXPECTED[kind, head], rel=1e-4, abs=1e-4)


def released(net, layout):
    """A backbone's weights as the original releases pack them."""
    own = {k: v.clone() for k, v in net.state_dict().items()}
    for key in list(own):
        # VideoMAE's keys have no bias
        if key.endswith("qkv.bias") and net.cfg.kind == "videomae":
            q, _, v = own.pop(key).clone().chunk(3)
            own[key.replace("qkv.", "q_")], own[key.replace("qkv.", "v_")] = q.clone(), v.clone()
    target = {"module.backbone." + k: v for k, v in own.items()}
    student = {k: torch.zeros_like(v) for k, v in target.items()}
    names = ("decoder.blocks.0.norm1.weight", "encoder_to_decoder.weight", "mask_token", "fc_norm.weight")
    beside = {name: torch.zeros(3) for name in names}
    return {
        "plain": own, "student": dict(encoder=target), "module": dict(module=own | beside),
        "jepa": dict(encoder=student, target_encoder=target, predictor={"x": torch.zeros(1)}, epoch=3),
        "pretraining": dict(model={"encoder." + k: v for k, v in own.items()} | beside,
                            args=argparse.Namespace(model="pretrain", lr=0.1)),
        "authors' hub": {"model." + k: v for k, v in (own | beside).items()}}[layout]


@pytest.mark.parametrize("layout, kind, suffix", (
    ("plain", "vjepa2", "safetensors"), ("jepa", "vjepa2", "pt"), ("student", "vjepa2", "pth"),
    ("plain", "videomae", "pth"), ("module", "videomae", "pth"), ("pretraining", "videomae", "pth"),
    ("authors' hub", "videomae", "safetensors")))
def test_every_layout_of_the_authors_loads(tmp_path, layout, kind, suffix):
    """Catches: keys renamed wrongly or in part, the student taken for its teacher, a shape read wrongly off
    the tensors, a command line beside the weights that stops them, a missing weight of which nobody says a
    word."""
    shape = BACKBONES[kind, 80 if layout == "pretraining" else 64 if kind == "vjepa2" else 88]
    net, x = waving(dataclasses.replace(shape, eps=1e-6))
    cfg, weights = net.cfg, released(net, layout)
    path = tmp_path / f"weights.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(weights, path)
    names = dict(num_attention_heads=cfg.heads, crop_size=cfg.image_size, frames_per_clip=cfg.frames)
    if layout == "authors' hub":
        names = dict(model_config=dict(num_heads=cfg.heads, img_size=cfg.image_size, num_frames=cfg.frames))
    (tmp_path / "config.json").write_text(json.dumps(names))
    loaded = train_adapter.Backbone.from_pretrained(path)
    assert loaded.cfg == cfg
    nearly(loaded.features(x), net.features(x))
    inner = next((weights[k] for k in train_adapter.WRAPPERS if k in weights), weights)
    del inner[next(k for k in inner if k.endswith("1.mlp.fc2.weight"))]
    save(weights, path)
    with pytest.raises(BadInput, match=r"blocks\.1\.mlp\.fc2\.weight"):
        train_adapter.Backbone.from_pretrained(path)


@pytest.mark.parametrize("kind, width, depth, heads, mlp, patch, millions", (
    ("vjepa2", 1024, 24, 16, 4096, 16, 303.9), ("vjepa2", 1280, 32, 16, 5120, 16, 631.6),
    ("vjepa2", 1408, 40, 22, 6144, 16, 1012.2), ("videomae", 768, 12, 12, 3072, 16, 86.2),
    ("videomae", 1280, 32, 16, 5120, 16, 631.6), ("videomae", 1408, 40, 16, 6144, 14, 1011.7)))
def test_published_backbones_have_their_sizes(kind, width, depth, heads, mlp, patch, millions):
    """Catches: a wrong number of heads for a file without a config.json; linear maps with too many or too few
    biases."""
    frames, side = (64, 256) if kind == "vjepa2" else (16, 224)
    cfg = train_adapter.BackboneConfig(kind, width, depth, heads, mlp, patch, frames=frames, image_size=side)
    with torch.device("meta"):
        net = backbone_of(cfg)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    weights = net.state_dict()
    if kind == "videomae":
        weights["blocks.0.attn.q_bias"] = None
    assert train_adapter.backbone_config(Path("nowhere"), weights) == cfg


@pytest.mark.parametrize("config, cut, words", (
    (None, 0, "has width 128"), ("no json", 0, "config.json"), ("{}", 1000, "no whole file")))
def test_bad_backbones_are_refused(tmp_path, config, cut, words):
    """Catches: a traceback, or part of a model, where a person gave the wrong folder."""
    path = tmp_path / "model.safetensors"
    save_file(backbone_of(BACKBONES["vjepa2", 64]).state_dict(), path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size - cut])
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=words):
        train_adapter.Backbone.from_pretrained(tmp_path)
    save_file({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(BadInput, match="fc.weight"):
        train_adapter.Backbone.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------------------------------------
# train_adapter.py: masks and heads
# -----------------------------------------------------------------------------------------------------------

HEADS = train_adapter.AdapterConfig(image_size=32, frames=2, width=32, heads=2, layers=1, batch=8)


def new_head(row, classes, num_queries, cfg=HEADS):
    torch.manual_seed(0)
    return train_adapter.HEADS[row](16, classes, num_queries, cfg)


def masks(ids, num_queries):
    return segmenter.assign(20.0 * F.one_hot(ids, num_queries), (2, 4, 4))


def two_halves(count, seed):
    """Features (count, 32, 16), their masks and classes: half the points hold +v, half -v, so that every
    clip's mean is 0. Class 1: each of two trajectories is all of one sign; class 0: each is half and
    half."""
    rng = torch.Generator().manual_seed(seed)
    sign, ids, y = torch.ones(count, 32), torch.zeros(count, 32, dtype=torch.int64), torch.arange(count) % 2
    for i in range(count):
        order = torch.randperm(32, generator=rng)
        sign[i, order[:16]] = -1
        ids[i, order[:16] if y[i] else order[8:24]] = 1
    return sign[..., None] * wave(16), masks(ids, 4), y


def test_trajadapter_separates_what_the_mean_mixes():
    """Catches: a TrajAdapter that pools over the wrong points, ignores its masks, or cannot learn; a linear
    probe that is more than a mean."""
    (x, seg, y), (u, other, z) = two_halves(64, 0), two_halves(64, 1)
    for row, m in (("linear", 1), ("trajadapter", 1), ("trajadapter", 4)):
        head = new_head(row, 2, 4)
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(head(x, seg, m), y).backward()
            optimizer.step()
        right = (head(u, other, m).argmax(1) == z).float().mean()
        assert right == 1 if row == "trajadapter" else right <= 0.75, (row, m, right)


def test_attentive_probe_is_the_published_one():
    """Catches: a norm on the query, none on what is read, an output projection, a missing residual or bias:
    against plain lines."""
    probe = new_head("attentive", 3, 4, dataclasses.replace(HEADS, probe_layers=0))
    x = torch.randn(2, 5, 16)
    for i in range(2):
        query = probe.query[0, 0]
        k, v = probe.kv(probe.norm1(x[i])).chunk(2, -1)
        q, read = probe.q(query), []
        for a in (slice(0, 8), slice(8, 16)):
            read.append((k[:, a] @ q[a] / math.sqrt(8)).softmax(0) @ v[:, a])
        y = query + torch.cat(read)
        y = y + probe.mlp.fc2(F.gelu(probe.mlp.fc1(probe.norm2(y))))
        nearly(probe(x, None, 1)[i], probe.head(y), 1e-5)


def test_dead_trajectories_cost_nothing_and_change_nothing():
    """Catches: dead trajectories that enter the transformer; scores that depend on a clip's neighbours."""
    head, x = new_head("trajadapter", 3, 6), torch.randn(3, 32, 16)
    ids = torch.zeros(3, 32, dtype=torch.int64)
    ids[1, 5:], ids[2, 10:20], ids[2, 20:] = 4, 2, 5            # 1, 2 and 3 are alive
    lengths = []
    head.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for m in (1, 2, 4):
        together = head(x, masks(ids, 6), m)
        for i in range(3):
            nearly(together[i:i + 1], head(x[i:i + 1], masks(ids[i:i + 1], 6), m), 1e-5)
    assert lengths == [1 + n * m for m in (1, 2, 4) for n in (3, 1, 2, 3)]


def test_logits_are_resized_in_space_and_time():
    """Catches: axes that change places, aligned corners, time left as it is, an argmax before the
    interpolation."""
    logits = torch.randn(2, 4 * 8 * 8, 3)
    frames = rearrange(logits, "b (t h w) k -> (b t) k h w", t=4, h=8)
    frames = F.interpolate(frames, size=(5, 3), mode="bilinear").view(2, 2, 2, 3, 5, 3)
    expected = rearrange(frames.mean(2), "b t k h w -> b (t h w) k")
    found = train_adapter.resize_logits(logits, (4, 8, 8), (2, 5, 3))
    nearly(found, expected, 1e-5)
    seg = segmenter.assign(found, (2, 5, 3))
    assert torch.equal(seg.ids, found.argmax(-1))
    for alive, ids in zip(seg.alive, seg.ids):
        assert alive.nonzero()[:, 0].tolist() == ids.unique().tolist()


# -----------------------------------------------------------------------------------------------------------
# train_adapter.py: the VideoMAE that it pre-trains
# -----------------------------------------------------------------------------------------------------------

def masked_autoencoder():
    torch.manual_seed(0)
    shape = dataclasses.replace(train_adapter.NANO, frames=4)
    seen = train_adapter.tube_mask(4, shape.grid, np.random.default_rng(0))
    return train_adapter.MaskedAutoencoder(shape, 1, 32), seen, random_video(4, 4, 64, 64)


def test_ten_percent_of_the_tubes_are_seen():
    """Catches: another share, a mask that changes in time, is alike for all clips or repeats a cell; an
    encoder that sees hidden pixels; a loss on visible ones; gradients that do not reach a part."""
    model, seen, video = masked_autoencoder()
    cells = seen.view(4, 2, 6)                                  # 6 of 64 cells, at 2 time steps
    assert torch.equal(cells[:, 1], cells[:, 0] + 64)
    assert [len(set(row)) for row in seen.tolist()] == [12] * 4 and len(seen.unique(dim=0)) == 4
    video[:, :, :, :32] = 90                                    # flat: the loss depends on which places count
    loss, prediction, target, hidden = model(video, seen)
    assert prediction.shape == target.shape == (4, 128, 384)
    assert torch.equal((~hidden).nonzero()[:, 1].view(4, 12), seen.sort(1).values)
    nearly(loss, (prediction - target)[hidden].square().mean())
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    tubes = model.encoder.tubes(video.movedim(-1, 2))
    tubes[hidden] = 255 - tubes[hidden]
    other = rearrange(tubes, "b (t h w) (c u p q) -> b (t u) (h p) (w q) c", t=2, h=8, c=3, u=2, p=8)
    assert torch.equal(model(other, seen)[1], prediction) and not torch.equal(other, video)


def test_videomae_predicts_normalised_pixels():
    """Catches: targets that are not of mean 0 and deviation 1 (colours mixed, a tubelet's frames apart), a
    decoder that starts elsewhere than at the mean; flat tubelets whose rounding errors become targets."""
    model, seen, video = masked_autoencoder()
    video[..., 1] //= 4                                         # colours of different strength
    target = model(video, seen)[2]
    cell = target[1, 64 + 9].view(3, 2, 8, 8)                   # second time step, second row and column
    pixels = segmenter.normalise(video)[1, 2:4, :, 8:16, 8:16].movedim(1, 0)
    for mine, x in zip(cell, pixels):
        nearly(mine, (x - x.mean()) / (x.var(unbiased=False) + 1e-3).sqrt())
    video[:] = 90
    video[..., ::7, 0] += 1
    assert model(video, seen)[2].abs().max() < 0.6


# -----------------------------------------------------------------------------------------------------------
# train_adapter.py: clips, features on disk, whole runs
# -----------------------------------------------------------------------------------------------------------

ADAPTER = ["--image-size", 32, "--frames", 2, "--steps", 3, "--warmup", 1, "--batch", 8, "--clips", 36,
           "--epochs", 2, "--width", 32, "--heads", 2, "--layers", 1, "--save-every", 2]
TOKENS_OF = {"linear", "attentive", "trajadapter_x1", "trajadapter_x2", "trajadapter_x4"}


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    run(train_adapter.main, *ADAPTER, "--out", out)
    return out / "adapter-nano"


def given(folder):
    return "--backbone", folder / "videomae", "--segmenter", folder / "segmenter-nano"


def numbered_entries(folder, paths):
    """Entries whose label is their number."""
    rows = [dict(video=str(path), label="a") for path in paths]
    entries = data.read_manifest(manifest(folder / "m.json", rows))
    return [entry | dict(label=i) for i, entry in enumerate(entries)]


def striped(path, count=24):
    """A wide clip (48 x 144) whose left, middle and right third are grey 40, 120 and 200, plus one a
    frame."""
    frames = np.array([40, 120, 200]).repeat(48) + np.arange(count)[:, None]
    frames = np.broadcast_to(frames[:, None, :, None], (count, 48, 144, 3))
    return encode(path, frames.astype(np.uint8))


def test_views_are_the_segments_and_crops_asked_for(tmp_path):
    """Catches: segments that begin at one place or run past the end, crops that are all the middle, views
    of one clip mixed with another's."""
    entries = numbered_entries(tmp_path, [striped(tmp_path / f"wide{i}.mp4") for i in range(2)])
    shape = train_adapter.BackboneConfig(frames=4, image_size=32)
    batch = train_adapter.Views(entries, shape, dataclasses.replace(HEADS, stride=2), 3, 3)[0]
    assert batch["video"].shape == (2, 9, 4, 32, 32, 3) and batch["label"] == [0, 1] and not batch["bad"]
    greys = batch["video"].float().mean((3, 4, 5))              # (b, v, t)
    for view, (first, grey) in enumerate(itertools.product((0, 8.5, 17), (40, 120, 200))):
        wanted = grey + first + 2 * torch.arange(4)
        assert (greys[:, view] - wanted).abs().max() < 3


def test_features_survive_the_disk(adapter_run, tmp_path):
    """Catches: rows that change places, a damaged file that shifts the classes of those after it, half a
    file taken for a whole one, features that are made again although they are there."""
    backbone = train_adapter.Backbone.from_pretrained(adapter_run / "videomae")
    net = trajtok.load_segmenter(adapter_run / "segmenter-nano")
    paths = [numbered(tmp_path / f"{i}.mp4", 12 + i) for i in range(11)]
    # of the second batch none can be used
    bad = [paths[4], *paths[8:]]
    for path in bad:
        path.write_text("no film")
    clips = train_adapter.Views(numbered_entries(tmp_path, paths), backbone.cfg, HEADS, 2, 1)
    damage, folder, cpu = data.Damage(), tmp_path / "f", torch.device("cpu")
    args = (folder, clips, backbone, net, damage, HEADS, cpu)
    features = train_adapter.extract(*args)
    assert list(damage) == list(map(str, bad)) and features.classes.tolist() == [0, 1, 2, 3, 5, 6, 7]
    x, seg, y = features.read(np.array([6, 1]), cpu)
    assert y.tolist() == [7, 1]
    video = torch.cat([clips.clip(i, None)["video"] for i in (7, 1)])
    fresh, logits = train_adapter.frozen_outputs(backbone, net, video)
    nearly(x, fresh, 2e-3)
    nearly(seg.logits, logits, 2e-2)
    made = (folder / "features.npy").stat().st_mtime_ns
    train_adapter.extract(*args)
    assert (folder / "features.npy").stat().st_mtime_ns == made
    (folder / "classes.npy").unlink()                           # as a kill in the middle leaves it
    assert np.array_equal(train_adapter.extract(*args).features, features.features)


class Scores(nn.Module):
    def forward(self, x, seg, m):
        return x[:, 0, :2]


def test_probabilities_are_means_over_views():
    """Catches: views of one clip counted as clips of their own, means over the wrong ones, scores instead of
    probabilities."""
    x = np.zeros((2, 3, 4, 2), np.float16)                      # (clips, v, n, D)
    x[0, :, 0] = [[9, 0], [0, 2], [0, 2]]                       # probabilities of class 0: 1, .12, .12
    x[1, :, 0] = [[9, 0], [9, 0], [0, 1]]
    features = train_adapter.Features(x, np.zeros((2, 3, 4, 5), np.float16), np.array([1, 0]), (1, 2, 2))
    for batch in (2, 3, 8):
        cfg = dataclasses.replace(HEADS, batch=batch)
        found = train_adapter.accuracies({"linear-0": Scores()}, features, cfg, torch.device("cpu"))
        assert found == {("linear-0", 1): 1}


def test_heads_are_chosen_by_validation_clips(monkeypatch):
    """Catches: the head that is best on the test clips, which would look better than it is."""
    heads, rates = nn.ModuleDict(), {}
    for row, i in itertools.product(train_adapter.HEADS, (0, 1)):
        heads[f"{row}-{i}"], rates[f"{row}-{i}"] = nn.Linear(1, 1), i

    def accuracies(heads, best, cfg, device):
        return {(name, m): float(name.endswith(best)) for name in heads for m in (1, 2, 4)}
    monkeypatch.setattr(train_adapter, "accuracies", accuracies)
    found = train_adapter.report(heads, rates, dict(valid="1", test="0"), HEADS, CPU)
    assert found["linear_lr"] == found["trajadapter_lr"] == 1
    assert found["linear"] == found["trajadapter_x4"] == 0


def test_heads_side_by_side_are_heads_alone(adapter_run, tmp_path):
    """Catches: a part of the run that leaves no file, a row that is not reported, a gradient norm shared by
    all heads, a learning rate given to another head."""
    for name in ("config.json", "state.pt", "model.safetensors", "curves.svg", "segmenter-nano/state.pt"):
        assert (adapter_run / name).stat().st_size
    result = read_result(adapter_run)
    assert TOKENS_OF <= result.keys() and all(0 <= result[name] <= 1 for name in TOKENS_OF)
    assert all(isinstance(value, (int, float)) for value in result.values()) and result["clips"] == 12
    run(train_adapter.main, *ADAPTER, *given(adapter_run), "--out", tmp_path, "--rates", 1)
    one, two = log(tmp_path / "adapter-nano"), log(adapter_run)
    assert len(one) == 10
    for a, b in zip(one, two, strict=True):
        assert a == {key: b[key] for key in a}


def test_adapter_resumes_exactly(adapter_run, tmp_path, capsys, monkeypatch):
    """Catches: a stop, in the pre-training or among the heads, after which --resume repeats a step, begins
    again or ends with other scores; a run that flags of another one spoil."""
    again, save = tmp_path / "adapter-nano", train_adapter.save_checkpoint
    # the second save is the VideoMAE's last; of the resumed run the second is the heads' first
    for saves, flags in ((1, ADAPTER), (4, ["--resume"])):
        stop = mock.Mock(side_effect=[mock.DEFAULT] * saves + [KeyboardInterrupt], wraps=save)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train_adapter, "save_checkpoint", stop)
            run(train_adapter.main, "--out", tmp_path, *flags)
    assert len(log(again)) == 8
    refused(capsys, train_adapter.main, "--out", tmp_path, "--resume", "--width", 64)
    run(train_adapter.main, "--out", tmp_path, "--resume")
    for name in (".", "videomae"):
        assert log(again / name) == log(adapter_run / name)
    one, two = read_result(adapter_run), read_result(again)
    assert {k: one[k] for k in TOKENS_OF} == {k: two[k] for k in TOKENS_OF}


@pytest.fixture(scope="module")
def labelled_films(tmp_path_factory):
    """A manifest of films of two classes: of one split or the other; one of them is no film."""
    folder = tmp_path_factory.mktemp("films")
    rows = []
    for i in range(14):
        path = (striped if i % 2 else numbered)(folder / f"film{i}.mp4", 16)
        split = "test" if i > 9 else "train"
        rows.append(dict(video=path.name, label=("numbered", "striped")[i % 2], split=split))
    (folder / "film13.mp4").write_text("no film")
    data.write_png(folder / "still.png", np.full((40, 40, 3), 90, np.uint8))
    rows.append(dict(image="still.png", label="striped", split="train"))
    return manifest(folder / "manifest.json", rows)


def test_adapter_on_real_films(adapter_run, labelled_films, tmp_path, capsys):
    """Catches: a film that is learnt from and tested on, a damaged one that stops the run or is not named,
    labels that are not asked for, views that do not fit their clips."""
    run(train_adapter.main, *ADAPTER, *given(adapter_run), "--data", labelled_films, "--segments", 2,
        "--crops", 3, "--epochs", 1, "--out", tmp_path, "--name", "films")
    result = read_result(tmp_path / "adapter-films")
    assert (result["clips"], result["left_out"]) == (3, 1)
    assert "film13.mp4" in capsys.readouterr().err and TOKENS_OF <= result.keys()
    for name, count in (("train", 9), ("valid", 1), ("test", 3)):
        folder, = tmp_path.glob(f"adapter-films/features/{name}-*")
        assert len(np.load(folder / "classes.npy")) == count, name


@pytest.mark.parametrize("flags, words", (
    (["--epochs", 0], "--epochs 0"), (["--data", "no.csv"], "no.csv"), (["--backbone", "nowhere"], "nowhere"),
    (["--segmenter", "nowhere"], "nowhere"), (["--image-size", 33], "--image-size 33"),
    (["--ask", "size"], "--ask size"), (["--frames", 3], "--frames 3"), (["--width", 36], "--width 36"),
    (["--data", "FILMS", "--labels", "striped,odd"], "odd"),
    (["--data", "FILMS", "--backbone", "MAE", "--frames", 4], "2 frames of 32 px")))
def test_bad_adapter_flags(adapter_run, labelled_films, tmp_path, capsys, monkeypatch, flags, words):
    """Catches: a flag that is ignored, ends in a traceback, or is found wrong only after minutes of
    pre-training."""
    monkeypatch.setattr(train_adapter, "pretrain_videomae", None)
    places = dict(FILMS=labelled_films, MAE=adapter_run / "videomae")
    flags = [places.get(flag, flag) for flag in flags]
    assert words in refused(capsys, train_adapter.main, *ADAPTER, "--out", tmp_path / "out", *flags)


# -----------------------------------------------------------------------------------------------------------
# The README
# -----------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
COMMANDS = {
    "train_clip.py": (train_clip.ClipConfig, train_clip.CLIP_SIZES),
    "train_adapter.py": (train_adapter.AdapterConfig, train_adapter.ADAPTER_SIZES),
    "train_vlm.py": (train_vlm.VLMConfig, train_vlm.VLM_SIZES),
    "trajtok.py pretrain": (trajtok.PretrainConfig, trajtok.PRETRAIN_SIZES),
    "trajtok.py show": (trajtok.ShowConfig, None, "clip"),
    "data.py make": (data.MakeConfig, None),
    "data.py label": (data.LabelConfig, None, "source"),
    "data.py check": (data.CheckConfig, None, "manifest"),
}


def readme_commands():
    """Every command of the README that runs a script, in order: [script, argument, ...]."""
    for block, inline in re.findall(r"```sh\n(.*?)```|`(python [^`]+)`", README, re.S):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = [word for word in shlex.split(command, comments=True) if word != "..."]
                scripts_ = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts_:
                    yield words[scripts_[0]:]


def parse(words):
    """What the command's own parser makes of its flags; BadInput or SystemExit if it does not know one."""
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    config, sizes, *positional = COMMANDS[name]
    return data.configure(config, sizes, words[len(name.split()):], *positional)


def test_the_readme_names_what_exists():
    """Catches: a flag, command or file of the README that is gone or misspelt; a README that grows."""
    for words in readme_commands():
        if words[:2] == ["trajtok.py", "compare"]:
            for row in words[2:words.index("--seeds")]:
                parse(["train_clip.py", *shlex.split(row.partition(":")[2])])
        elif words[:2] != ["train_vlm.py", "ask"]:
            parse(words)
    known = {field.name for config, *_ in COMMANDS.values() for field in dataclasses.fields(config)}
    for flag in re.findall(r"`--([a-z-]+)", README):
        assert flag == "help" or flag.removeprefix("no-").replace("-", "_") in known, flag
    for path in re.findall(r"\]\((?!https)([^)#]+)", README):
        assert (HERE / path).exists(), path
    # longer, and nobody would read it to its end
    assert len(README.encode()) <= 15_000


# added to each command, so that it takes seconds
STEPS = "--steps 2 --warmup 1 --batch 4 --overwrite".split()
SHORTER = {
    "train_clip.py": CLIP + ["--overwrite"],
    "train_adapter.py": STEPS + "--clips 36 --epochs 1 --rates 1 --image-size 32 --frames 2".split(),
    "train_vlm.py": STEPS + "--segmenter-steps 2 --clips 4 --eval-clips 2 --frames 8".split(),
    "train_vlm.py ask": [],
    "trajtok.py pretrain": SMALL + "--eval-clips 4 --overwrite --workers 0".split(),
    "data.py check": ["--workers", 0],
    "data.py label": ["--workers", 0, "--image-size", 48],
    "data.py make": ["--clips", 4]}


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Catches: a command that its parser knows and that fails when it is run; a command that needs what none
    before it has made; an example in Python that does not run as it stands; a tokenizer in a file of one's
    own that cannot be trained. Commands for other machines, or with weights that others published, are only
    read."""
    monkeypatch.chdir(tmp_path)
    for script in HERE.glob("*.py"):
        shutil.copy(script, tmp_path)                           # `compare` starts them in this folder
    decoding, search, _, own = re.findall(r"```python\n(.*?)```", README, re.S)
    Path("mine.py").write_text(own)
    labels = "actions/train/fall", "actions/train/walk", "actions/val/fall", "actions/val/walk"
    for folder in ("videos", *labels):
        Path(folder).mkdir(parents=True)
        numbered(f"{folder}/cat.mp4", 20)
        numbered(f"{folder}/dog.mp4", 20)
    Path("videos/manifest.json").write_text(re.search(r"```json\n(.*?)```", README, re.S)[1])
    talk = re.search(r"A line of `qa.jsonl`: `(.*)`", README)[1]
    talks = [talk.replace("cat.mp4", name) for name in ("clip.mp4", "film.mp4")]
    Path("qa.jsonl").write_text("\n".join(talks))
    shutil.copy("videos/cat.mp4", "clip.mp4")
    shutil.copy("videos/dog.mp4", "film.mp4")
    ran = []
    for words in readme_commands():
        if words in ran or {"large", "full", "4b"} & set(words):
            continue
        ran.append(words)
        shorter = SHORTER.get(" ".join(words[:2]), SHORTER.get(words[0], []))
        if words[1:2] == ["compare"]:
            # two of the rows, with more flags in each, and one of the seeds
            rows = [f"{row} {' '.join(CLIP)}" for row in words[2:4]]
            words = [*words[:2], *rows, "--json", "out/mine.json"]
        run(sys.modules[words[0].removesuffix(".py")].main, *words[1:], *shorter)
    assert len(ran) >= 15 and Path("out/mine.json").exists()
    names = {}
    exec(decoding, names)
    assert names["masks"].shape == (1, 8, 64, 64) and names["z"].shape[:2] == names["mask"].shape
    capsys.readouterr()
    exec(search, {})
    assert capsys.readouterr().out.count("out/world/") == 3
