"""TrajTok, the trajectory tokenizer: segmenter + encoder; its sizes, files and commands; and what every run shares.

    video uint8 (b, t, H, W, 3) -> Segmenter -> Segmentation -> TrajectoryEncoder -> Tokens z (b, K·m, d'), mask

    tokenizer = TrajTok("nano")                                  # or TrajTok(TrajTokConfig(...)), or
    tokenizer = TrajTok.from_pretrained("out/clip-nano")         # what train_clip.py or `pretrain` wrote
    tokenizer = TrajTok.load_official("trajvit2.pth")            # what the authors released
    tokens, segmentation = tokenizer(video, tokens_per_trajectory=2)
    tokens = tokenizer.stream(frames)                            # a video of any length

    python trajtok.py pretrain                                   # the segmenter alone, on the procedural world
    python trajtok.py pretrain --data manifest.json              # ... on real video with `_mask.npz` / `_graph.npz` sidecars
    python trajtok.py show clip.mp4                              # an MP4 and a PNG: frames above, trajectories below
    python trajtok.py show world                                 # the same on a made clip, the true trajectories below
    python trajtok.py show film.mp4 --frames 0                   # every frame, at any length, in memory that does not grow

The second half of the file is what the training scripts have in common: a dataclass becomes flags, devices, the learning
rate's schedule, several processes, checkpoints that survive a kill at any moment, the log, and pictures.
"""
from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from einops import rearrange
from tqdm import tqdm

import data
from data import BadInput, configure, film, paint, palette, replace, write_json, write_png
from encoder import Path as TrajectoryPath
from encoder import Tokens, TrajectoryEncoder, soft_sums
from segmenter import (ConvNeXt, Segmentation, Segmenter, best_overlaps, grid_tubes, hungarian, labels_on_grid,
                       normalise, segmentation_loss, tube_overlaps, video_metrics)

# -----------------------------------------------------------------------------------------------------------
# The tokenizer
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrajTokConfig:
    """The one configuration of segmenter and encoder; the defaults are the paper's. image_size and frames are what the
    tokenizer is trained on: clips of other lengths, and of other sizes that are multiples of 32, go through as well."""
    image_size: int = 224
    frames: int = 16
    dim: int = 512                  # d: width of features, queries and tokens inside
    num_queries: int = 128          # K: trajectories a clip at most
    depth: int = 2                  # layers of each Perceiver
    heads: int = 8
    depths: tuple = (3, 3, 9, 3)    # ConvNeXt-Tiny
    dims: tuple = (96, 192, 384, 768)
    max_tokens: int = 4             # tokens of a trajectory: 1, 2 or 4
    out_dim: int = 512              # d': width of the tokens that leave
    scale: float = 10.0             # of the mask logits at the start; learned, at most 20
    recompute: bool = False         # less memory, more time: keep few activations, compute the others again
    # two extensions of ours (encoder.py)
    places: bool = False            # points say where and when they are
    path: bool = False              # tokens know how their trajectory moved
    # the paper's ablations
    detach: bool = True             # False: the Perceiver's gradient reaches the features
    hierarchical: bool = True       # False: the finest map alone
    hard_mask: bool = True          # False: tokens read all points instead of their own
    mean_start: bool = True         # False: a token starts at its learned code, without z_init
    # what the authors' checkpoints were trained with; load_official turns it on
    normed_residual: bool = False
    norm_media: bool = False
    last_points: int = 0

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON has lists only
        object.__setattr__(self, "dims", tuple(self.dims))
        numbers = (self.frames, self.dim, self.num_queries, self.depth, self.heads, self.out_dim, *self.depths, *self.dims)
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or len(self.depths) != len(self.dims):
            raise BadInput(f"{self}: whole numbers from 1 on are needed, and as many depths as dims")
        if not isinstance(self.image_size, int) or self.image_size % 32 or not 32 <= self.image_size <= 8192:
            raise BadInput(f"image size {self.image_size}: a multiple of 32, from 32 to 8192 px, e.g. 224")
        if self.dim % self.heads or self.dim % 8:
            raise BadInput(f"dim {self.dim} with {self.heads} heads: dim must be a multiple of the heads and of 8")
        if not 1 < self.scale <= 20 or self.last_points < 0:
            raise BadInput(f"scale {self.scale}, last_points {self.last_points}: a scale above 1, at most 20; points from 0 on")
        if not isinstance(self.max_tokens, int) or self.max_tokens not in (1, 2, 4, 8, 16):
            raise BadInput(f"max_tokens {self.max_tokens}: a power of two (the paper: 4)")

    @property
    def choices(self):
        """How many tokens a trajectory may have: 1, 2, 4, ... max_tokens."""
        return tuple(2 ** i for i in range(self.max_tokens.bit_length()))

    def check(self, m):
        if m not in self.choices:
            raise BadInput(f"tokens per trajectory {m}: one of {', '.join(map(str, self.choices))}")
        return m


TINY = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
SIZES = {
    "nano":  TrajTokConfig(image_size=64, frames=8, dim=96, num_queries=24, depth=1, heads=4, out_dim=128,
                           depths=(1, 1, 2, 1), dims=(32, 64, 128, 256)),                     # 1.4 M parameters
    "tiny":  TrajTokConfig(image_size=128, frames=8, dim=256, num_queries=32, depth=2, heads=8, out_dim=256,
                           depths=(2, 2, 4, 2), dims=(48, 96, 192, 384)),                     # 8.8 M
    "base":  TrajTokConfig(image_size=224, frames=16, dim=512, num_queries=128, depth=2, heads=8, out_dim=768,
                           recompute=True, **TINY),                                           # 46.2 M
    "large": TrajTokConfig(image_size=224, frames=16, dim=512, num_queries=128, depth=2, heads=8, out_dim=1024,
                           recompute=True, **TINY),                                           # 46.4 M: the paper's 46 M
}


class TrajTok(nn.Module):
    """The tokenizer: video uint8 (b, t, H, W, 3) -> Tokens, Segmentation.

    size: a name from SIZES or a TrajTokConfig. backbone: a module of your own instead of the ConvNeXt (segmenter.py)."""

    def __init__(self, size="nano", backbone=None):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise BadInput(f"--size {size}: one of {', '.join(SIZES)}")
        self.cfg = SIZES[size] if isinstance(size, str) else size
        self.segmenter = Segmenter(self.cfg, backbone)
        self.encoder = TrajectoryEncoder(self.cfg)

    def forward(self, video, tokens_per_trajectory=None):
        """tokens_per_trajectory: 1, 2 or 4. None: drawn at random in training (PAPER, after Matryoshka), else 1."""
        m = tokens_per_trajectory
        if m is None:
            m = int(np.random.choice(self.cfg.choices)) if self.training else 1
        seg = self.segmenter(video)
        return self.encoder(seg.features, seg, self.cfg.check(m)), seg

    @torch.no_grad()
    def stream(self, frames, tokens_per_trajectory=1, chunk=8, each=None):
        """The tokens of a video of any length, as forward would give them, in memory that does not grow with it.

        frames: uint8 (t, H, W, 3), or a function that returns, each time anew, an iterator over such pieces in order (a
        decoder). each(first frame, piece (1, c, H, W, 3), its Segmentation) is called once a piece. -> Tokens, b = 1.
        The features of a long video fit no memory. So the video is gone through again whenever something has to wait for
        all of it: once a layer of each Perceiver, and once for z_init. Time for memory."""
        segmenter, encoder, cfg = self.segmenter, self.encoder, self.cfg
        m, device = cfg.check(tokens_per_trajectory), segmenter.latents.device
        source, count = pieces(frames, chunk), 0                # count: frames in all, known after the first pass

        def features():                                         # -> first frame, piece, F (1, n, d), grid
            first = 0
            for video in source():
                f, grid = segmenter.extract(normalise(video.to(device)))
                yield first, video, f, grid
                first += grid[0]

        def read_by_queries():
            nonlocal count
            for first, _, f, (t, h, w) in features():
                count = first + t
                yield first * h * w, f, None

        queries = perceive(segmenter.perceiver, segmenter.latents[None], read_by_queries)
        if not count:
            raise BadInput("an empty video: not one frame to make tokens of")

        def clusters():                                         # -> first frame, piece, Segmentation
            for first, video, f, grid in features():
                logits = segmenter.mask_logits(queries, f)
                ids = logits.argmax(-1)
                alive = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter(1, ids, True)
                yield first, video, Segmentation(f, logits, ids, alive, grid)

        total, weight, alive, path = 0.0, 0.0, False, []
        for first, video, seg in clusters():
            soft = seg.logits.softmax(-1)                       # over the queries
            part, share = soft_sums(soft, encoder.add_places(seg.features, seg.grid, first, count))
            total, weight, alive = total + part, weight + share, seg.alive | alive
            if cfg.path:
                path.append(TrajectoryPath.sums(soft, seg.grid))
            if each:
                each(first, video, seg)
        latents = encoder.start(total, weight, torch.cat(path, 1) if path else None, m)

        def read_by_tokens():
            for first, _, seg in clusters():
                points = encoder.add_places(seg.features, seg.grid, first, count)
                cells = seg.grid[1] * seg.grid[2]
                number = first * cells + torch.arange(seg.ids.shape[1], device=device)
                everyone = number >= count * cells - cfg.last_points
                yield first * cells, points, seg.ids.masked_fill(everyone, EVERYONE)

        owner = torch.arange(cfg.num_queries, device=device).repeat_interleave(m)
        z = perceive(encoder.perceiver, latents, read_by_tokens, owner if cfg.hard_mask else None)
        return encoder.finish(z, alive)

    @torch.no_grad()
    def windows(self, frames, window=8, tokens_per_trajectory=1, each=None):
        """A video as separate clips of `window` frames, each with trajectories of its own: K·m tokens a window, so their
        number grows with the video. -> Tokens, b = 1; trajectory k of window i is number i·K + k."""
        parts, first = [], 0
        for video in pieces(frames, window)():
            tokens, seg = self(video.to(self.segmenter.latents.device), tokens_per_trajectory)
            parts.append(tokens._replace(trajectory=tokens.trajectory + len(parts) * self.cfg.num_queries))
            if each:
                each(first, video, seg)
            first += video.shape[1]
        if not parts:
            raise BadInput("an empty video: not one frame to make tokens of")
        return Tokens(*(torch.cat(x, 1) for x in zip(*parts)))

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"tokenizer": dataclasses.asdict(self.cfg)})
        write_weights(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, folder):
        """A folder that save_pretrained, `pretrain` or train_clip.py wrote (of the last, the tokenizer) -> in eval mode."""
        return load_weights(cls(tokenizer_config(folder)), folder, "tokenizer.").eval()

    @classmethod
    def load_official(cls, path, mean_start=True):
        """The tokenizer of a checkpoint that the authors released, .pth or safetensors, e.g. TrajViT2's. Its configuration
        is read off names and shapes. mean_start: was it trained with z_init added to the codes? The weights do not tell."""
        weights = official_part(read_weights(path), ("segmenter.log_scale", "latents", "traj_feature_updater.norm_lat.weight"), path)
        shape, inside = official_segmenter({k.removeprefix("segmenter."): v for k, v in weights.items() if k.startswith("segmenter.")}, path)
        own = rename({k: v for k, v in weights.items() if not k.startswith("segmenter.")}, [(r"traj_feature_updater\.(.+)", r"perceiver.\1")])
        depth, heads = official_perceiver(own, "perceiver.", path)
        if (depth, heads) != (shape.depth, shape.heads) or own["latents"].dim() != 3 or "output_projector.weight" not in own or own["output_projector.weight"].dim() != 2:
            raise BadInput(f"{path}: an encoder of {depth} layers, {heads} heads and codes {tuple(own['latents'].shape)} beside a segmenter of "
                           f"{shape.depth} layers and {shape.heads} heads; expected the same, codes (K, n, d), and an output_projector")
        cfg = dataclasses.replace(shape, max_tokens=own["latents"].shape[1], out_dim=len(own["output_projector.weight"]), last_points=2, mean_start=mean_start)
        return fit_weights(cls(cfg), {f"segmenter.{k}": v for k, v in inside.items()} | {f"encoder.{k}": v for k, v in own.items()}, path).eval()


def load_official_segmenter(path):
    """The Segmenter of a checkpoint that the authors released, .pth or safetensors: alone or inside TrajViT2's."""
    cfg, weights = official_segmenter(official_part(read_weights(path), ("log_scale", "trajectory_perceiver.latents"), path), path)
    return fit_weights(Segmenter(cfg), weights, path).eval()


def load_convnext(path):
    """A published ConvNeXt: the original's file, DINOv3's, timm's, or a hub folder. Depths and widths are read off it."""
    weights, depths, dims = convnext_names(read_weights(path), path)
    return fit_weights(ConvNeXt(depths, dims), weights, path)


# -----------------------------------------------------------------------------------------------------------
# Long video: a Perceiver that reads its points a piece at a time
# -----------------------------------------------------------------------------------------------------------

EVERYONE = -2                       # id of a point that every token may read (last_points); -1 would be: none


class RunningSoftmax:
    """sum_j softmax(s)_j v_j over pieces of j, exactly, as flash attention does it (arXiv 2205.14135): weights are taken
    relative to the largest score so far, and what was summed before is scaled down when a larger one comes."""

    def __init__(self):
        self.top, self.norm, self.total = torch.tensor(-math.inf), 0.0, 0.0

    def add(self, s, v):                                        # scores (..., q, n), values (..., n, c)
        top = torch.maximum(self.top.to(s.device), s.amax(-1, keepdim=True))
        old = (self.top.to(s.device) - top).exp()
        w = (s - top).exp()
        self.norm = self.norm * old + w.sum(-1, keepdim=True)
        self.total = self.total * old + w @ v
        self.top = top

    def mean(self):
        return self.total / self.norm


def perceive(perceiver, latents, chunks, owner=None):
    """Perceiver.forward, where chunks() goes through (number of the first point, points (1, n, d), ids (1, n) or None), once
    a layer. owner (s,): the trajectory of each latent, under the hard mask. latents (1, s, d) -> (1, s, d)."""
    for attention, mlp in perceiver.layers:
        x, softmax = perceiver.norm_lat(latents), None
        for first, points, ids in chunks():
            parts = attention.project(x, perceiver.norm_ctx(points), latents.shape[1] + first)
            q, k_own, v_own, k, v = (part.transpose(1, 2).float() for part in parts)
            q = q / math.sqrt(q.shape[-1])
            s_own, s = q @ k_own.mT, q @ k.mT                   # (1, a, s, s), (1, a, s, n)
            if owner is not None:
                s_own = s_own.masked_fill(owner[:, None] != owner, -math.inf)
                s = s.masked_fill((owner[:, None] != ids) & (ids != EVERYONE), -math.inf)
            if softmax is None:                                 # the latents themselves come first
                softmax = RunningSoftmax()
                softmax.add(s_own, v_own)
            softmax.add(s, v)
        if softmax is None:
            return latents                                      # an empty video
        y = rearrange(softmax.mean(), "b a s c -> b s (a c)").to(latents.dtype)
        latents = (x if perceiver.normed_residual else latents) + attention.to_out(y)
        latents = latents + mlp(latents)
    return latents


def pieces(frames, length):
    """A video, or a callable that returns an iterator over parts of one -> a callable that returns an iterator over pieces of
    `length` frames, uint8 (1, c, H, W, 3); the last may be shorter."""
    if length < 1:
        raise BadInput(f"pieces of {length} frames: at least 1")

    def cut():
        held, have = [], 0                                       # parts that wait to fill a piece
        for part in frames() if callable(frames) else [frames]:
            begin = 0
            while begin < len(part):
                held.append(torch.as_tensor(part[begin:begin + length - have]))
                begin, have = begin + len(held[-1]), have + len(held[-1])
                if have == length:
                    yield torch.cat(held)[None]
                    held, have = [], 0
        if held:
            yield torch.cat(held)[None]
    return cut


def tokenizer_config(folder):
    """The TrajTokConfig that stands in a folder's config.json."""
    path = Path(folder) / "config.json"
    try:
        return TrajTokConfig(**json.loads(path.read_text())["tokenizer"])
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: holds no config.json; give a folder that `python trajtok.py pretrain` or `python train_clip.py` wrote") from None
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"{path}: no tokenizer's configuration ({type(error).__name__}: {error})") from None


def load_weights(module, folder, prefix=""):
    """folder/model.safetensors into module, strictly. If any key begins with prefix, those are taken, without it."""
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise BadInput(f"{path}: no such file; is the run finished?")
    weights = read_weights(path)
    for begin in (prefix, "video." + prefix) if prefix else ():   # train_clip.py keeps its tokenizer under `video.`
        if any(key.startswith(begin) for key in weights):
            weights = {key[len(begin):]: value for key, value in weights.items() if key.startswith(begin)}
    return fit_weights(module, weights, path)


# -----------------------------------------------------------------------------------------------------------
# Weights that others published
# -----------------------------------------------------------------------------------------------------------

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)      # numbers; the last two: counters


def read_weights(path, wrappings=("model", "state_dict")):
    """A .safetensors file, a torch checkpoint (.pth, .pt, .bin: weights only, its pickle may hold no code), or a folder with
    model.safetensors or pytorch_model.bin, or either's .index.json and the shards that it names -> {name: tensor}, on the CPU.
    Wrappings, {"model": ...}, {"state_dict": ...}, are taken off, of several in one file the first, and `module.`. Half a file, no
    weights, or weights that are not finite numbers: BadInput."""
    path = Path(path)
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    file = next((path / n for n in names if (path / n).exists()), None) if path.is_dir() else path
    if file is None or not file.exists():
        raise BadInput(f"{path}: " + ("holds neither model.safetensors nor pytorch_model.bin, nor the index of their shards" if path.is_dir() else "no such file or folder; check the path"))
    if file.name.endswith(".index.json"):
        return read_shards(file)
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:                                   # torch.load raises many types on a file that is not its own
        raise BadInput(f"{file}: not a whole file of weights ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}); fetch it again") from None
    while isinstance(weights, dict) and (inner := next((weights[k] for k in wrappings if isinstance(weights.get(k), dict)), None)):
        weights = inner
    if not isinstance(weights, dict) or not all(isinstance(k, str) for k in weights) or not any(torch.is_tensor(v) for v in weights.values()):
        raise BadInput(f"{file}: holds no named weights; expected a state dict")
    weights = {k.removeprefix("module."): v for k, v in weights.items() if torch.is_tensor(v)}
    odd = [f"{k} ({v.dtype}, {v.layout})" for k, v in weights.items() if v.layout != torch.strided or v.is_meta or v.dtype not in KINDS]
    if odd:
        raise BadInput(f"{file}: tensors of a kind that is not read here: {', '.join(odd)}; save them as float32")
    broken = [k for k, v in weights.items() if not v.isfinite().all()]
    if broken:
        raise BadInput(f"{file}: weights that are NaN or infinite: {', '.join(broken)}; fetch or train it again")
    return weights


def read_shards(index):
    """A hub's index of shards (JSON) -> the weights of all the files that it names; each must be there and hold what the index says."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise BadInput(f"{index}: no index of shards ({type(error).__name__}: {error}); fetch it again") from None
    if lacking := [f for f in files if not (index.parent / f).is_file()]:
        raise BadInput(f"{index}: names shards that are not beside it: {', '.join(lacking)}; fetch them too")
    shards = {f: read_weights(index.parent / f) for f in files}
    if lacking := [f"{k} in {f}" for k, f in places.items() if k not in shards[f]]:
        raise BadInput(f"{index}: weights that are not where it says: {', '.join(lacking)}; fetch the folder again")
    return {k: v for shard in shards.values() for k, v in shard.items()}


def fit_weights(module, weights, where):
    """weights into module, strictly: missing, unexpected and wrongly shaped keys are all listed, and refused: BadInput."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in weights and own[k].shape != weights[k].shape]
    wrong += [f"{k} holds {weights[k].dtype}" for k in own if k in weights and own[k].is_floating_point() != weights[k].is_floating_point()]
    if wrong:
        raise BadInput(f"{where}: weights of another model or size ({len(wrong)} keys: {'; '.join(wrong)})")
    module.load_state_dict(weights)
    return module


def rename(weights, rules):
    """Each key by the first rule (pattern, replacement) that fits its whole; a replacement None drops it. Others stay as they are."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            if match_ := re.fullmatch(pattern, key):
                key = None if replacement is None else match_.expand(replacement)
                break
        if key is not None:
            renamed[key] = value
    return renamed


def count(weights, pattern):
    """1 + the largest number that group 1 of the pattern takes among the keys; 0 if it fits none."""
    return 1 + max((int(m[1]) for key in weights if (m := re.match(pattern, key))), default=-1)


# published names of a ConvNeXt's weights -> ours, which are those of the original release
CONVNEXT_NAMES = [
    # original, and DINOv3's, which has the last norm twice
    (r"norms\.3\..+", None),
    # classifiers on top
    (r"(?:head|classifier|head\.fc)\.(?:weight|bias)", None),
    # timm
    (r"stem\.([01])\.(.+)", r"downsample_layers.0.\1.\2"),
    (r"stages\.(\d)\.downsample\.([01])\.(.+)", r"downsample_layers.\1.\2.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(.+)", r"stages.\1.\2.dwconv.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(.+)", r"stages.\1.\2.pwconv\3.\4"),
    (r"stages\.(\d)\.blocks\.(\d+)\.(gamma|norm\..+)", r"stages.\1.\2.\3"),
    (r"head\.norm\.(.+)", r"norm.\1"),
    # hub, ConvNext
    (r"embeddings\.patch_embeddings\.(.+)", r"downsample_layers.0.0.\1"),
    (r"embeddings\.layernorm\.(.+)", r"downsample_layers.0.1.\1"),
    (r"encoder\.stages\.(\d)\.downsampling_layer\.([01])\.(.+)", r"downsample_layers.\1.\2.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.\2.gamma"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm\.(.+)", r"stages.\1.\2.norm.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.((?:dwconv|pwconv[12])\..+)", r"stages.\1.\2.\3"),
    # hub, DINOv3
    (r"stages\.(\d)\.downsample_layers\.([01])\.(.+)", r"downsample_layers.\1.\2.\3"),
    (r"stages\.(\d)\.layers\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
    (r"stages\.(\d)\.layers\.(\d+)\.depthwise_conv\.(.+)", r"stages.\1.\2.dwconv.\3"),
    (r"stages\.(\d)\.layers\.(\d+)\.layer_norm\.(.+)", r"stages.\1.\2.norm.\3"),
    (r"stages\.(\d)\.layers\.(\d+)\.pointwise_conv([12])\.(.+)", r"stages.\1.\2.pwconv\3.\4"),
    (r"(?:layernorm|layer_norm)\.(.+)", r"norm.\1"),
]


def convnext_names(weights, where):
    """Any published layout -> (weights under our names, depths, dims), the last two read off names and shapes."""
    for prefix in ("convnext.", "backbone.", "model."):
        if all(k.startswith(prefix) or k.startswith(("head.", "classifier.")) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    weights = rename(weights, CONVNEXT_NAMES)
    depths = tuple(count(weights, rf"stages\.{i}\.(\d+)\.") for i in range(4))
    stems = [weights.get(f"downsample_layers.{i}.{int(i > 0)}.weight") for i in range(4)]
    if 0 in depths or any(s is None or s.dim() != 4 for s in stems):
        raise BadInput(f"{where}: not a ConvNeXt in a layout that is known (original, DINOv3, timm, hub); its keys: {', '.join(list(weights)[:4])} ...")
    return weights, depths, tuple(len(s) for s in stems)



# the authors' names -> ours
SEGMENTER_NAMES = [
    (r"patch_encoder\.(proj\.\d|ln)\.(.+)", r"\1.\2"),
    (r"trajectory_perceiver\.latents", r"latents"),
    (r"trajectory_perceiver\.(.+)", r"perceiver.\1"),
    (r"(traj_seg_head|patch_decoder)_low_res\.(.+)", r"\1.\2"),
    (r"(traj_seg_head|patch_decoder)_high_res\..+", None),     # for the release's training only
]


def official_part(weights, marks, where):
    """The keys under the prefix that holds all of `marks`, without it. A segmenter's checkpoint says
    `vision_encoder.`, TrajViT2's `vision_encoder.traj_tokenizer.`; beside that prefix stand other models, which are left alone."""
    for prefix in ("", "traj_tokenizer.", "vision_encoder.", "vision_encoder.traj_tokenizer."):
        for inner in ("", "segmenter."):
            if all(prefix + inner + mark in weights for mark in marks):
                return {k.removeprefix(prefix + inner): v for k, v in weights.items() if k.startswith(prefix + inner)}
    raise BadInput(f"{where}: not in the authors' layout: no {' and '.join(marks)} under any known prefix; its keys: {', '.join(list(weights)[:4])} ... "
                   "(folders that these scripts wrote: from_pretrained)")


def official_perceiver(weights, begin, where):
    """Names of one of the release's Perceivers under `begin` -> (depth, heads). The stored rotary frequencies tell the heads, are
    compared with theta^(-2i/r), and dropped from `weights`."""
    depth, dim = count(weights, rf"{begin}layers\.(\d+)\."), weights[begin + "norm_lat.weight"].numel()
    heads = set()
    for i in range(depth):
        stored = weights.pop(f"{begin}layers.{i}.0.rotary_emb.freqs", None)
        if stored is None:
            raise BadInput(f"{where}: missing {begin}layers.{i}.0.rotary_emb.freqs, which tells the number of heads")
        turns = 2 * stored.numel()                               # channels of a head that turn: half of them
        heads.add(dim // (2 * turns) if turns and dim % (2 * turns) == 0 else 0)
        wanted = 1e4 ** (-torch.arange(0, turns, 2) / max(turns, 1))
        if 0 in heads or len(heads) > 1 or not torch.allclose(stored.float().flatten(), wanted, rtol=5e-3):          # rtol: bfloat16 rounds by 0.4 %
            raise BadInput(f"{where}: {begin}layers.{i}.0.rotary_emb.freqs {tuple(stored.shape)} are not the frequencies 1e4^(-2i/r) of heads of one width")
    if not heads:
        raise BadInput(f"{where}: {begin}layers: not one layer")
    return depth, heads.pop()


def official_segmenter(weights, where):
    """The release's segmenter -> (TrajTokConfig read off names and shapes, weights under our names)."""
    backbone = {k.removeprefix("patch_encoder.backbone."): v for k, v in weights.items() if k.startswith("patch_encoder.backbone.")}
    backbone, depths, dims = convnext_names(backbone, where)
    rest = rename({k: v for k, v in weights.items() if not k.startswith("patch_encoder.backbone.")}, SEGMENTER_NAMES)
    for key, axes in (("latents", 2), ("perceiver.norm_lat.weight", 1)):
        if key not in rest or rest[key].dim() != axes:
            raise BadInput(f"{where}: {key} " + (f"is {tuple(rest[key].shape)}, not of {axes} dimensions" if key in rest else "is missing"))
    depth, heads = official_perceiver(rest, "perceiver.", where)
    queries, dim = rest["latents"].shape
    cfg = TrajTokConfig(dim=dim, num_queries=queries, depth=depth, heads=heads, depths=depths, dims=dims, frames=8, normed_residual=True, norm_media=True)
    return cfg, {**{f"backbone.{k}": v for k, v in backbone.items()}, **rest}


# ---------------------------------------------------------------------------------------------------------------------
# What every run shares: configuration
# ---------------------------------------------------------------------------------------------------------------------

def check_flags(cfg):
    """What every training asks of its numbers: refused before anything is written."""
    for field in dataclasses.fields(cfg):
        name, value, flag = field.name, getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{flag} {value}: give a finite number")
        if name in ("lr", "clip") and value <= 0:
            raise BadInput(f"{flag} {value}: give a number above 0")
        if name in ("warmup", "workers", "weight_decay", "segmentation_weight", "segmenter_lr", "stride") and value < 0:
            raise BadInput(f"{flag} {value}: at least 0")
        if name in ("batch", "steps", "save_every", "eval_clips", "probe_clips") and value < 1:
            raise BadInput(f"{flag} {value}: at least 1")
    if not 0 <= cfg.seed < 2 ** 32:
        raise BadInput(f"--seed {cfg.seed}: 0 to {2 ** 32 - 1}")
    sources(cfg)                                                 # refuses a --mix that does not fit --data
    if cfg.textures is not None and "world" not in sources(cfg)[0]:
        raise BadInput(f"--textures {cfg.textures}: paints the procedural world, but --data is {cfg.data}; leave one of the two out")


def setup(cfg):
    """-> torch.device. Seeds, and on a CPU keeps to the cores there are, and to the memory it once had."""
    if not 0 <= cfg.seed < 2 ** 32:
        raise BadInput(f"--seed {cfg.seed}: 0 to {2 ** 32 - 1}")
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:            # one of several processes: each has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.split(":")[0] == "cpu":
        keep_memory()                                            # before the first tensor
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {cfg.device}: not available here; give cpu, or leave it out") from None
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16), 1))
    else:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(cfg.seed)
    return device


def keep_memory():
    """Tell the C library to keep freed memory: by default every large tensor is mapped from the system and given back, page
    by page, at each step. On two CPU cores that made a nano step twice as fast. Linux; elsewhere nothing.
    Kept memory gets holes, which the next large tensor may not fit into. Tensors that begin at a page of memory, and huge pages where there
    are any, leave fewer."""
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")       # PyTorch's own switch, read when the first tensor is made
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)    # glibc's; musl has none
        if mallopt:
            mallopt(-3, 1 << 30)                                 # M_MMAP_THRESHOLD: below 1 GiB, take memory from the heap
            mallopt(-1, -1)                                      # M_TRIM_THRESHOLD: never give the heap's end back


def precision(device, bf16=None):
    """Autocast to bfloat16, by default on a GPU; float32 on a CPU, where bf16 is emulated on most machines."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if bf16 is None else bf16)


def learning_rate(step, cfg):
    """Linear warm-up over cfg.warmup steps, then a cosine down to 1 % of cfg.lr at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(cfg.steps - 1 - cfg.warmup, 1)
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def make_optimizer(model, cfg, scales=None, fused=None):
    """AdamW (fused: one kernel for all parameters; by default on a GPU); weight decay on matrices only: on norms, biases and scales it
    would pull towards a silent network.
    scales {prefix of names: factor}: parameters that learn at factor x the learning rate; the loop multiplies lr by group["scale"]."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = next((s for prefix, s in (scales or {}).items() if name.startswith(prefix)), 1.0)
            groups.setdefault((p.dim() > 1, scale), []).append(p)
    groups = [dict(params=ps, scale=scale, weight_decay=cfg.weight_decay if matrix else 0.0) for (matrix, scale), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=groups[0]["params"][0].device.type == "cuda" or None if fused is None else fused)


# ---------------------------------------------------------------------------------------------------------------------
# What every run shares: several processes
# ---------------------------------------------------------------------------------------------------------------------

def ranks():
    """-> (the number of this process, how many train together)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def meet(device):
    """Under torch.distributed.run: joins the other processes. What is asked of all (a step's totals, gradients) ends with an error if one
    of them has been away for ten minutes; on one machine torch.distributed.run sees a death at once, and ends the rest."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")                   # one voice is enough; errors are heard from all


def shard(dataset):
    """This process's part of a dataset: every world-th batch; of a mixture, of each of its sets, so that a step's batches are all of one set."""
    if not isinstance(dataset, data.Mixed):
        return data.Shard(dataset, *ranks())
    part = copy.copy(dataset)
    part.datasets = [shard(one) for one in dataset.datasets]
    return part


def total(values, device):
    """Numbers of this process -> their sums over all processes."""
    if ranks()[1] == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(x):
    """Rows (n, ...) of every process, whose n may differ -> the rows of all, in the order of the processes. Gradient flows into this
    process's own rows only. Every process computes the same loss of all rows, so what reaches the own ones is whole."""
    rank, world = ranks()
    if world == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    counts = [int(c) for c in counts]
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[:len(x)] = x.detach()
    rows = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(rows, padded)
    return torch.cat([x if r == rank else rows[r][:n] for r, n in enumerate(counts)])


def sum_gradients(parameters, bucket=2 ** 25):
    """p.grad becomes its sum over all processes. CHOICE: after the backward pass, in blocks of `bucket` numbers, and not by
    DistributedDataParallel, which would overlap the two: it wants to know beforehand which parameters a step uses, and here that changes
    from step to step (pictures without labels, one micro-batch after another). A parameter that no process used keeps no gradient,
    as in a single process."""
    if ranks()[1] == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    grads, held = [], 0
    for p, u in zip(parameters, used.tolist()):
        if u:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
            held += p.numel()
        if grads and (held >= bucket or p is parameters[-1]):
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g))
            grads, held = [], 0


def start(command):
    """Run a command to its end -> its exit code. SIGTERM is passed on, and then the answer is 143 (128 + SIGTERM) whatever it says."""
    told, child = [], subprocess.Popen([str(part) for part in command])

    def pass_on(*_):
        told.append(True)
        child.terminate()
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 143 if told else code


def launch(script, argv, processes):
    """The same command again in several processes on this machine, under torch.distributed.run. Returns when all are done."""
    code = start([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script, *argv])
    if code == 143:
        raise SystemExit(143)
    if code:
        raise BadInput(f"one of the {processes} processes ended (its own message stands above), and all were ended; "
                       "if it had saved something, that is whole: --resume goes on from it")


@contextlib.contextmanager
def sigterm():
    """`with sigterm() as asked`: SIGTERM does not end the process; asked() tells whether it came. For loops that save and end themselves."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------------------
# What every run shares: files. All are written beside and renamed into place
# ---------------------------------------------------------------------------------------------------------------------

def flags(cfg, sizes, without=()):
    """A configuration -> the command line that gives it; sizes: the script's table."""
    defaults, argv = type(cfg)(**sizes[cfg.size]), ["--size", cfg.size]
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        if value != getattr(defaults, field.name) and field.name not in ("size", *without):
            argv += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
    return argv


def results_folder(path):
    """--results, made before the work that ends there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--results {path}: cannot make this folder ({error.strerror}); give another") from None


def spread_of(values):
    """Of each seed -> mean +- deviation, as text; "-" of none."""
    return "-" if not len(values) else f"{np.mean(values):.1f}" + (f" +-{np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def aligned(lines):
    """Lines of cells -> lines of text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths))) for line in lines]


def write_weights(path, state):
    replace(path, lambda p: save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, p))


def run_name(cfg):
    """The name given, or the size; of real data also where it came from, so that runs on several sets stand side by side."""
    def short(name):
        source = Path(name).resolve()
        return name if name in ("world", "plain") else source.parent.name if source.stem == "manifest" else source.stem
    return cfg.name or (cfg.size if cfg.data == "world" else f"{cfg.size}-{'+'.join(map(short, sources(cfg)[0]))}")


class Run:
    """The folder of a run: config.json, log.jsonl, state.pt, and what the script adds.
    state.pt alone is what --resume reads: weights, optimizer, RNG and step in one file, so that one rename makes a
    checkpoint and no kill can leave two halves of different age."""

    # what may differ when a run is resumed: where it runs, and how it is evaluated at the end
    VOLATILE = {"resume", "overwrite", "workers", "device", "save_every", "out", "tokens_per_trajectory", "eval_clips", "probe_clips",
                "results", "processes", "seeds", "labels", "cache_dir"}

    def __init__(self, cfg, name, extra=None, told=True):
        self.folder, self.cfg, self.start = Path(cfg.out) / name, cfg, 0
        self.state, self.log = self.folder / "state.pt", self.folder / "log.jsonl"
        if ranks()[0]:
            return                                               # of several processes the first alone writes; `restore` waits for it
        values = {**dataclasses.asdict(cfg), **(extra or {})}
        config = self.folder / "config.json"
        if cfg.resume and config.exists():
            try:
                old = json.loads(config.read_text())
            except ValueError:
                raise BadInput(f"{config}: damaged; --overwrite starts the run again") from None
            if differ := self.differences({f.name: f.default for f in dataclasses.fields(cfg)} | old, values):       # a flag that is newer than the run
                raise BadInput(f"--resume: {self.folder} was made with {differ}; give the same flags, or another --name")
        elif cfg.resume:
            raise BadInput(f"--resume: no run in {self.folder}; leave --resume out to start one")
        elif config.exists() and not cfg.overwrite:
            raise BadInput(f"{self.folder} holds a run already; --resume goes on with it, --overwrite starts it again, --name makes another")
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--out {cfg.out}: cannot make the folder {self.folder} ({error.strerror}); give another") from None
            for name in ("state.pt", "log.jsonl", "result.json", "model.safetensors", "trajectories.png", "curves.png"):
                (self.folder / name).unlink(missing_ok=True)     # nothing of an older run stays beside the new one's
        for stale in self.folder.glob(".*.[0-9]*"):              # what a kill in the middle of `replace` left
            stale.unlink(missing_ok=True)
        if told:
            print(" ".join(f"{k}={v}" for k, v in values.items() if v is not None and not isinstance(v, dict)))
        write_json(config, values)

    @classmethod
    def differences(cls, old, values):
        """What a saved configuration and another disagree on, of what a run may not change: text, empty if nothing."""
        new = json.loads(json.dumps(values))
        differ = [k for k in new if k not in cls.VOLATILE and old.get(k) != new[k]]
        differ = [k for k in differ if not isinstance(new[k], dict)] or differ
        return ", ".join(f"{k} {old.get(k)!r} (now {new[k]!r})" for k in differ[:4])

    def restore(self, model, optimizer):
        """Load state.pt if there is one; drop the log lines after it. -> the step to begin with. Of several processes each calls it, and
        sees the same files (several machines: a shared file system)."""
        rank, world = ranks()
        if world > 1:
            dist.barrier()                                       # the first has looked at the folder, and may go on
        if self.cfg.resume and self.state.exists():
            try:
                state = torch.load(self.state, map_location="cpu", weights_only=True)
            except Exception as error:                           # torch.load raises many types on a file that is not its own
                raise BadInput(f"{self.state}: not a whole checkpoint ({type(error).__name__}); remove it to start again") from None
            if len(state["rng"]) != world:                       # each step's clips are those of all processes: another number, other steps
                raise BadInput(f"--resume: {self.state} was made by {len(state['rng'])} process(es), now there are {world}; start as many")
            fit_weights(model, state["model"], self.state)      # an older version's are refused, not a traceback
            optimizer.load_state_dict(state["optimizer"])
            rng, cuda_rng = state["rng"][rank]
            torch.set_rng_state(rng)
            if cuda_rng is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda_rng)
            self.start = state["step"]
            print(f"resumed at step {self.start}")
        elif self.cfg.resume:
            print("no checkpoint was saved yet: starting at step 0")
        return self.begin(self.start)

    def begin(self, start):
        """Drop the log's lines from step `start` on, and go on writing after them. -> start"""
        self.start = start
        if not ranks()[0]:
            kept = self.log.read_text().splitlines(True) if start else []
            kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] < start]
            replace(self.log, lambda p: p.write_text("".join(kept)))
            self.stream = open(self.log, "a")
        return start

    def save(self, model, optimizer, step):
        """The checkpoint before step number `step`, with the random state of every process (all call it, the first writes)."""
        rank, world = ranks()
        rng = (torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)
        rngs = [rng]
        if world > 1:
            rngs = [None] * world
            dist.all_gather_object(rngs, rng)
        if not rank:
            replace(self.state, lambda p: torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, rng=rngs), p))

    def record(self, line):
        if not ranks()[0]:
            self.stream.write(json.dumps(line) + "\n")
            self.stream.flush()

    def history(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def check_finite(terms, step):
    for name, value in terms.items():
        if not math.isfinite(value):
            raise BadInput(f"step {step}: {name} is {value}; start again with a lower --lr (under another --name; the last checkpoint is whole)")


def peak_memory_gb(device):
    """Peak memory: of the device on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "linux":                                  # ru_maxrss would begin with what the parent process held
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform != "darwin" else 30)


def count_gflops(run):
    """GFLOPs of run(): its matrix products, convolutions and attention, 2 per multiply-add, counted while it runs (under no_grad,
    torch's counter fails on parameters that want gradients). That counter does not know the attention kernel of CPUs: it is told."""
    aten = torch.ops.aten
    def convolution_backward(dout, x, w, *_, out_shape=None, **__):          # torch's own formula forgets the groups of a depthwise one
        wanted = sum(shape is not None and len(shape) == 4 for shape in out_shape[:2])               # gradients of x, of w
        return wanted * 2 * math.prod((dout[0], *dout[2:])) * math.prod(w)
    kernels = {aten.convolution_backward: convolution_backward,
               aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
               aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: sdpa_backward_flop_count(dout, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    return counter.get_total_flops() / 1e9


def mean_of(rows):
    return sum(rows) / len(rows) if rows else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# What every run shares: data
# ---------------------------------------------------------------------------------------------------------------------

def held_out_share(entries):
    """A quarter, of large sets 5 000: whatever is held out is embedded at the end, and compared with all captions."""
    return min(0.25, 5000 / max(len(entries), 1))


def split_entries(entries, share, salt=""):
    """(training, held out): every entry goes where the hash of its name says, so that a file stays on its side when others
    are added. Of two dozen or fewer, chance may hold out next to none: then the sixth with the smallest hashes is held out, and
    a file may change sides when others are added to so small a set. At least one on each side (2 entries or more).
    salt: what is split again needs another hash: those that the first left are all above its share."""
    def number(entry):
        return zlib.crc32((salt + os.path.basename(entry["path"])).encode())
    order = sorted(entries, key=number)
    least = -(-len(order) // 6) if len(order) <= 24 else 1
    n = min(max(sum(number(e) < share * 2 ** 32 for e in order), least), max(len(order) - 1, 0))
    return sorted(order[n:], key=lambda e: e["path"]), sorted(order[:n], key=lambda e: e["path"])


class Damage:
    """Files that could not be used: each is named once, all are counted."""

    def __init__(self):
        self.files = {}

    def add(self, bad, total):
        for path, reason in bad:
            if path not in self.files:
                self.files[path] = reason
                print(f"left out: {reason}", file=sys.stderr)
        if len(self.files) >= total:
            raise BadInput(f"none of the {total} files can be used; the last: {list(self.files.values())[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# What every run shares: pictures
# ---------------------------------------------------------------------------------------------------------------------

GLYPHS = dict(zip("0123456789abcdefghijklmnopqrstuvwxyz.-%/:+=,()> ", (
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 25755 65656 34443 65556 74647 74644 34553 55755 72227 11153 55655 "
    "44447 57755 65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 55222 71247 00002 00700 51245 11244 02020 02720 "
    "07070 00024 12221 42224 42124 00000").split()))             # five rows of three pixels, a row an octal digit


def write_text(image, text, top, left, colour=(60, 60, 60), scale=2):
    """Small capitals-free text into image (H, W, 3), in place; what leaves the image is cut off."""
    for i, glyph in enumerate(text.lower()):
        for row, bits in enumerate(GLYPHS.get(glyph, "00700")):
            for column in range(3):
                if int(bits) >> (2 - column) & 1:
                    y, x = top + row * scale, left + (4 * i + column) * scale
                    image[y:y + scale, x:x + scale] = colour


def strip(video, *rows, scale=1):
    """Frames (t, H, W, 3) in a row, and below them the same frames painted by each of `rows` (t, H, W) of ids.
    The first row's trajectories take the colours of the last row's that they overlap most, so the eye can compare."""
    rows = [np.asarray(r) for r in rows]
    count = 1 + max(int(r.max()) for r in rows)
    colours = palette(count)
    pictures = []
    for r in rows:
        mine = colours
        if r is not rows[-1]:
            p = int(r.max()) + 1
            inter, union = tube_overlaps(torch.from_numpy(r), torch.from_numpy(rows[-1]))
            labels, tubes = hungarian(-(inter / union.clamp(min=1)).numpy())
            order = dict(zip(tubes.tolist(), labels.tolist()))
            spare = iter([c for c in range(count + p) if c not in order.values()])
            mine = palette(count + p)[[order[i] if i in order else next(spare) for i in range(p)]]
        pictures.append(paint(video, r, mine))
    sheet = np.concatenate([np.concatenate(list(part), 1) for part in (video, *pictures)], 0)
    return sheet.repeat(scale, 0).repeat(scale, 1)


def plot(path, curves, width=460, height=240):
    """curves {title: list of (step, value)} -> a PNG, a panel each: faint = each step, dark = a running mean."""
    panels = []
    for title, points in curves.items():
        image = np.full((height, width, 3), 255, np.uint8)
        x, y = (np.array(c, float) for c in zip(*points))
        low, high = float(y.min()), float(y.max())
        high = high if high > low else low + 1
        box = (34, height - 26, 52, width - 14)                  # top, bottom, left, right
        image[box[0]:box[1], box[2]] = image[box[1], box[2]:box[3]] = 150
        width_of_mean = max(len(y) // 25, 1)
        smooth = np.convolve(np.pad(y, (width_of_mean - 1, 0), mode="edge"), np.ones(width_of_mean) / width_of_mean, "valid")
        for values, colour, thick in ((y, (190, 205, 235), 1), (smooth, (30, 70, 170), 2)):
            fine = np.linspace(0, len(y) - 1, 4 * width)         # dense enough to look like a line
            px = (box[2] + 1 + np.interp(fine, range(len(y)), x - x[0]) / max(x[-1] - x[0], 1) * (box[3] - box[2] - 2)).astype(int)
            py = (box[1] - 1 - (np.interp(fine, range(len(y)), values) - low) / (high - low) * (box[1] - box[0] - 2)).astype(int)
            for i in range(thick):
                image[(py - i).clip(box[0]), px] = colour
        write_text(image, f"{title}: {y[-1]:.3g}", 8, box[2], (20, 20, 20))
        write_text(image, f"{high:.3g}", box[0], 2)
        write_text(image, f"{low:.3g}", box[1] - 10, 2)
        write_text(image, f"step {int(x[-1])}", box[1] + 8, box[3] - 90)
        panels.append(image)
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % 2)
    write_png(path, np.concatenate([np.concatenate(panels[i:i + 2], 1) for i in range(0, len(panels), 2)], 0))


def plot_lines(path, panels, width=460, height=300):
    """{title: {name: [(x, y)]}}, all above 0 -> a PNG, a panel each: both axes logarithmic, a colour for each name."""
    sheets = []
    for title, lines in panels.items():
        image = np.full((height, width, 3), 255, np.uint8)
        points = np.log(np.array([p for line in lines.values() for p in line], float))
        (left, low), (right, high) = points.min(0), points.max(0)
        top, bottom, begin, end = 34, height - 26, 60, width - 120
        image[top:bottom, begin] = image[bottom, begin:end] = 150
        for n, (name, line) in enumerate(lines.items()):
            colour = palette(len(lines))[n]
            write_text(image, name, top + 18 * n, end + 12, tuple(int(c) for c in colour))
            if not line:
                continue
            x, y = np.log(np.array(line, float)).T
            px, py = begin + (x - left) / max(right - left, 1e-9) * (end - begin - 4) + 2, bottom - 2 - (y - low) / max(high - low, 1e-9) * (bottom - top - 4)
            fine = np.linspace(0, len(px) - 1, 4 * width)        # dense enough to look like a line
            for dy in (0, 1):
                image[(np.interp(fine, range(len(py)), py).astype(int) + dy).clip(0, height - 1), np.interp(fine, range(len(px)), px).astype(int)] = colour
            for a, b in zip(px.astype(int), py.astype(int)):
                image[max(b - 2, 0):b + 4, max(a - 2, 0):a + 4] = colour
        write_text(image, title, 8, begin, (20, 20, 20))
        for value, y in ((math.exp(high), top), (math.exp(low), bottom - 10)):
            write_text(image, f"{value:.0f}" if value >= 1000 else f"{value:.3g}", y, 2)
        write_text(image, f"{math.exp(left):.0f}", bottom + 8, begin)
        write_text(image, f"{math.exp(right):.0f} frames", bottom + 8, end - 80)
        sheets.append(image)
    sheets += [np.full_like(sheets[0], 255)] * (len(sheets) % 2 if len(sheets) > 1 else 0)
    step = min(len(sheets), 2)
    write_png(path, np.concatenate([np.concatenate(sheets[i:i + step], 1) for i in range(0, len(sheets), step)], 0))


# ---------------------------------------------------------------------------------------------------------------------
# python trajtok.py pretrain
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PretrainConfig:
    """Trains the segmenter alone: focal + 2 dice on trajectory labels."""
    size: str = "nano"                  # one of SIZES: nano, tiny, base, large
    data: str = "world"                 # `world` (procedural; `plain`: without --textures) or a manifest / folder whose videos have mask sidecars; several with commas
    mix: str | None = None              # shares of several sets, with commas: 0.5,0.5; default: equal
    stride: int = 8                     # a training clip takes every 1st .. stride-th frame (drawn) in a row; 0: frames spread over the whole video
    name: str | None = None             # the run's folder is out/segmenter-<name>; default: the size, and of real data the folder's name
    out: str = "out"                    # where runs are kept
    image_size: int | None = None       # pixels of a side, a multiple of 32; default: the size's
    frames: int | None = None           # frames of a clip; default: the size's
    num_queries: int | None = None      # K, trajectories at most; default: the size's
    init: str | None = None             # start from the segmenter of this folder: another run of `pretrain` or of train_clip.py
    max_objects: int = 8                # of the procedural world: 1 .. 8 objects in a clip
    shared_colours: bool = True         # may two objects of a made clip wear the same colour?
    textures: str | None = None         # a folder of your pictures or clips: made objects and grounds are painted with them
    batch: int = 32                     # clips a step
    steps: int = 300                    # steps
    lr: float = 1e-3                    # peak learning rate
    warmup: int = 20                    # steps of linear warm-up
    weight_decay: float = 0.02          # on matrices
    clip: float = 1.0                   # largest gradient norm
    eval_clips: int = 64                # held-out clips for VEQ and STQ
    augment: bool = False               # of real clips: the same random crop, flip, colours for all frames of a clip
    seed: int = 0                       # of weights and data order
    workers: int = 0                    # processes that make batches; 0: in the training process
    save_every: int = 100               # steps between checkpoints
    device: str = "auto"                # cpu, cuda, ...
    resume: bool = False                # go on with the run of this name, exactly
    overwrite: bool = False             # start again over a run of this name

    def __post_init__(self):
        if self.num_queries is not None and self.num_queries < 1:
            raise BadInput(f"--num-queries {self.num_queries}: at least 1")
        check_flags(self)


def evaluate_segmenter(segmenter, batches, device, limit):
    """VEQ, STQ and mean best IoU of the labelled tubes, beside a grid with as many cells as the model has live trajectories.
    CHOICE: measured on the segmenter's own grid, a quarter of the frame's resolution, where its masks live (PAPER: "low-
    resolution output"); `object_iou_pixels` is the same IoU against the full-resolution labels, logits interpolated.
    batches: a dataset of data.py; limit: how many of its batches. -> dict, pictures (video, predicted, true) of the first clips."""
    bad, rows, grid_rows, objects, grid_objects, pixels, cells, alive, pictures = [], [], [], [], [], [], [], [], []
    segmenter.eval()
    for i in range(limit):
        batch = data.finish(batches[i], device)
        bad += batch["bad"]
        if batch["video"] is None or not (batch["labels"] >= 0).any():
            continue
        first = data.MAX_GROUNDS if "motion" in batch else 0     # of made clips, objects only: their ids start there
        with torch.no_grad(), precision(device):
            seg = segmenter(batch["video"])
        fine, labels = seg.masks(batch["labels"].shape[-2:]).cpu(), batch["labels"].cpu()
        pred, gt = (x.cpu().unflatten(1, seg.grid) for x in (seg.ids, labels_on_grid(batch["labels"], seg.grid, 10 ** 6)))
        for j in range(len(gt)):
            if not (gt[j] >= 0).any():
                continue
            live = int(seg.alive[j].sum())
            side = max(1, round(live ** 0.5))
            grid = grid_tubes(gt[j:j + 1].shape, side, max(1, round(live / side)))
            rows.append(video_metrics(pred[j:j + 1], gt[j:j + 1]))
            grid_rows.append(video_metrics(grid, gt[j:j + 1]))
            objects += best_overlaps(pred[j:j + 1], gt[j:j + 1], first)
            pixels += best_overlaps(fine[j:j + 1], labels[j:j + 1], first)
            grid_objects += best_overlaps(grid, gt[j:j + 1], first)
            cells.append(int(grid.max()) + 1)
            alive.append(live)
        if len(pictures) < 6:
            pictures += [(batch["video"][j].cpu().numpy(), fine[j].numpy(), labels[j].numpy()) for j in range(len(gt)) if (gt[j] >= 0).any()]
    result = {key: mean_of([r[key] for r in rows]) for key in ("veq", "stq")} | dict(object_iou=mean_of(objects), object_iou_pixels=mean_of(pixels))
    result |= {f"grid_{key}": mean_of([r[key] for r in grid_rows]) for key in ("veq", "stq")}
    result |= dict(grid_object_iou=mean_of(grid_objects), grid_cells=mean_of(cells), live_trajectories=mean_of(alive), labelled_clips=len(rows))
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result.items()}, pictures[:6], bad


def sources(cfg):
    """--data a,b,... and --mix -> (the names of the sets, their shares). A comma may stand in a path: what exists is one set."""
    names = [cfg.data] if cfg.data and os.path.exists(cfg.data) else [name.strip() for name in cfg.data.split(",")]
    if "" in names or getattr(cfg, "textures", None) == "":
        raise BadInput(f"--data {cfg.data!r} --textures {getattr(cfg, 'textures', None)!r}: an empty name; give `world`, `plain`, a manifest or a folder")
    try:
        shares = [1.0] * len(names) if cfg.mix is None else [float(share) for share in cfg.mix.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(names) or not all(0 < share < math.inf for share in shares):
        raise BadInput(f"--mix {cfg.mix}: give a number above 0 for each of the {len(names)} sets of --data {cfg.data}, with commas")
    return names, shares


def world_of(cfg):
    """The procedural world that a configuration asks for; of `plain` the one without --textures."""
    asked = ("frames", "max_objects", "shared_colours", "acts", "camera", "light", "story") + (() if cfg.data == "plain" else ("textures",))
    return data.World(size=cfg.image_size, **{name: getattr(cfg, name) for name in asked if hasattr(cfg, name)})


def open_data(cfg, need):
    """cfg.data -> (training dataset, held-out dataset, batches of it, number of files or None). need: the entry key that
    training cannot do without ("mask", "caption"); entries without it are refused, not skipped. Of several sets: whole batches of
    one set at a time, in the shares of --mix; held out are the held-out clips of all."""
    names, shares = sources(cfg)
    if len(names) > 1:
        one = lambda name: dataclasses.replace(cfg, data=name, mix=None, textures=cfg.textures if name == "world" else None)
        train, tests, counts, files = zip(*(open_data(one(name), need) for name in names))
        held_out = torch.utils.data.ConcatDataset([torch.utils.data.Subset(test, range(n)) for test, n in zip(tests, counts)])
        return data.Mixed(train, shares, cfg.seed), held_out, sum(counts), sum(n or 0 for n in files) or None
    if cfg.data in ("world", "plain"):
        world = world_of(cfg)
        begin = dict(test=data.TEST, validation=data.VALIDATION)[getattr(cfg, "eval_split", "test")]
        held_out = data.WorldBatches(world, cfg.batch, indices=data.distinct(world, begin, cfg.eval_clips))
        # every seed has ten million clips of its own; the probes' begin at 500 million, validation at a thousand million
        return data.WorldBatches(world, cfg.batch, data.TRAIN + cfg.seed % 49 * 10_000_000), held_out, -(-cfg.eval_clips // cfg.batch), None
    entries = data.read_manifest(cfg.data)
    without = [e["path"] for e in entries if not e[need] or need == "mask" and not e["graph"]]
    if without:
        mend = {"caption": 'give each entry a "caption"', "mask": "training needs `_mask.npz` and `_graph.npz` beside each video"}[need]
        raise BadInput(f"--data {cfg.data}: {len(without)} of {len(entries)} entries have no {need}, the first {without[0]}; {mend}")
    if len(entries) < 2:
        raise BadInput(f"--data {cfg.data}: {len(entries)} entry; training and held-out clips need at least 2")
    train, test = split_entries(entries, held_out_share(entries))
    test = data.VideoBatches(test, cfg.frames, cfg.image_size, cfg.batch, cfg.seed, train=False)
    return data.VideoBatches(train, cfg.frames, cfg.image_size, cfg.batch, cfg.seed, stride=cfg.stride), test, len(test), len(train)


def pretrain(argv):
    sizes = {name: {"size": name} for name in SIZES} | {"nano": dict(size="nano", max_objects=4, shared_colours=False)}      # why: train_clip.py
    cfg = configure(PretrainConfig, sizes, argv)
    shape = dataclasses.replace(SIZES[cfg.size], **{k: getattr(cfg, k) for k in ("image_size", "frames", "num_queries") if getattr(cfg, k) is not None})
    cfg = dataclasses.replace(cfg, image_size=shape.image_size, frames=shape.frames, num_queries=shape.num_queries)
    device = setup(cfg)
    train, test, test_batches, files = open_data(cfg, "mask")
    tokenizer = TrajTok(shape)                                   # the encoder rides along untrained, so that one file holds all
    if cfg.init:
        load_weights(tokenizer, cfg.init, "video.tokenizer.")    # refused before the run has a folder
    run = Run(cfg, f"segmenter-{run_name(cfg)}", {"tokenizer": dataclasses.asdict(shape), "textures_crc": data.open_textures(cfg.textures)})
    tokenizer.to(device)
    segmenter, damage, began = tokenizer.segmenter, Damage(), time.time()
    optimizer = make_optimizer(segmenter, cfg)
    start = run.restore(segmenter, optimizer)
    for step, batch in zip(range(start, cfg.steps), data.loader(train, start, cfg.steps, cfg.workers)):
        segmenter.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["scale"]
        damage.add(batch["bad"], files or math.inf)
        batch = data.finish(batch, device)
        if batch["video"] is None:
            continue
        video, labels = batch["video"], batch["labels"]
        if cfg.augment and "motion" not in batch:                # made clips differ enough as they are
            video, labels = data.augment(video, labels, step + cfg.seed * 10 ** 6)
        with precision(device):
            seg = segmenter(video)
        loss = dict(zip(("focal", "dice"), segmentation_loss(seg, labels)))
        optimizer.zero_grad()
        (loss["focal"] + 2 * loss["dice"]).backward()            # the release's weights for the segmenter alone
        norm = nn.utils.clip_grad_norm_(segmenter.parameters(), cfg.clip)
        line = {k: v.item() for k, v in loss.items()} | dict(lr=learning_rate(step, cfg), gradient_norm=norm.item())
        check_finite(line, step)                                 # before the step: what is saved stays whole
        optimizer.step()
        live = seg.alive.float().sum(1).mean().item()            # few of many: the queries collapse
        run.record(dict(step=step, **line, live_trajectories=live, seconds=round(time.time() - began, 2)))
        if step % 10 == 0 or step == cfg.steps - 1:
            print(f"step {step:5d}/{cfg.steps}  focal {line['focal']:.3f}  dice {line['dice']:.3f}  live {live:.1f}/{cfg.num_queries}  {time.time() - began:.0f} s", flush=True)
        if (step + 1) % cfg.save_every == 0 or step == cfg.steps - 1:
            run.save(segmenter, optimizer, step + 1)
    write_weights(run.folder / "model.safetensors", tokenizer.state_dict())
    result, pictures, bad = evaluate_segmenter(segmenter, test, device, test_batches)
    damage.add(bad, math.inf)
    write_json(run.folder / "result.json", result | dict(seconds=time.time() - began, left_out=len(damage.files)))
    save_pictures(run, pictures, ("focal", "dice"))
    print("\n".join(f"{k:18s} {'-' if v is None else f'{v:.3f}'}" for k, v in result.items()))
    print(f"wrote {run.folder}/: model.safetensors, result.json, trajectories.png, curves.png")


def save_pictures(run, pictures, terms):
    """trajectories.png: of each clip four frames, its predicted and its true trajectories, two clips side by side; curves.png:
    the loss terms of the log."""
    if pictures:
        sheets = []
        for video, *rows in pictures:
            some = np.linspace(0, len(video) - 1, 4).round().astype(int)     # a picture is a clip of one frame, four times
            sheets.append(np.pad(strip(video[some], *(r[some] for r in rows), scale=max(1, 128 // video.shape[2])), ((4, 4), (4, 4), (0, 0)), constant_values=255))
        sheets += [np.full_like(sheets[0], 255)] * (len(sheets) % 2)
        write_png(run.folder / "trajectories.png", np.concatenate([np.concatenate(sheets[i:i + 2], 1) for i in range(0, len(sheets), 2)], 0))
    history = run.history()
    if history:
        curves = {term: [(line["step"], line[term]) for line in history if term in line] for term in terms}
        plot(run.folder / "curves.png", {k: v for k, v in curves.items() if v})


# ---------------------------------------------------------------------------------------------------------------------
# python trajtok.py show
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShowConfig:
    """Draws the trajectories of a video and tells how many tokens they make."""
    clip: str = "world"                 # a video or picture file, or `world` for a made clip
    weights: str = "out/clip-nano"      # a folder with config.json and model.safetensors, or a checkpoint that the authors released
    frames: int | None = None           # frames taken from the whole clip, evenly; 0: every frame, at any length; default: what the tokenizer was trained on
    window: int = 0                     # with --frames 0: every so many frames trajectories of their own (the published TrajVLM: 8); 0: one set for the whole video
    image_size: int | None = None       # pixels of a side, a multiple of 32; default: the tokenizer's
    tokens_per_trajectory: int = 1      # 1, 2 or 4
    out: str = "out"                    # folder for <clip>-trajectories.mp4 and .png
    index: int = 0                      # which made clip, with `world`
    seed: int = 0                       # decides nothing here: every command takes it
    size: str = "saved"                 # the size stands in the weights' folder: nothing else can be given
    device: str = "auto"                # cpu, cuda, ...


def show(argv):
    cfg = configure(ShowConfig, {"saved": {}}, argv, positional="clip")
    device = setup(cfg)
    released = Path(cfg.weights).is_file()
    tokenizer = (TrajTok.load_official(cfg.weights) if released else TrajTok.from_pretrained(cfg.weights)).to(device).eval()
    frames, size = (getattr(tokenizer.cfg, k) if getattr(cfg, k) is None else getattr(cfg, k) for k in ("frames", "image_size"))
    if not 0 <= cfg.index < 5 * 10 ** 7:
        raise BadInput(f"--index {cfg.index}: 0 to {5 * 10 ** 7 - 1}")
    dataclasses.replace(tokenizer.cfg, image_size=size, frames=frames or 1)  # refuses what the strides do not divide
    tokenizer.cfg.check(cfg.tokens_per_trajectory)
    if cfg.window < 0:
        raise BadInput(f"--window {cfg.window}: at least 0")
    image = Path(cfg.clip).suffix.lower() in data.IMAGE_SUFFIXES
    if (cfg.window or not frames) and (image or cfg.clip == "world"):
        raise BadInput(f"--frames 0 and --window are for video files, not for {cfg.clip}; leave them out")
    if cfg.window and frames:
        raise BadInput(f"--window {cfg.window}: goes with --frames 0")
    base = Path(cfg.out) / f"{Path(cfg.clip).stem}-trajectories"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {cfg.out}: cannot make the folder ({error.strerror}); give another") from None
    truth, seconds, scale, began = (), 2.0, max(1, 224 // size), time.time()
    if not frames:
        tokens, video, ids, count = show_stream(tokenizer, cfg, f"{base}.mp4", size, scale)
        points, alive = count * (size // 4) ** 2, len(set(tokens.trajectory[tokens.mask].tolist()))
    else:
        if cfg.clip == "world":
            video, labels = data.rasterise(data.stack([data.script(data.TEST + cfg.index, data.World(size, frames))]), size)
            video, truth = video[0].numpy(), (labels[0].numpy(),)
        else:
            video, times, _ = data.decode(cfg.clip, 1 if image else frames, size)
            seconds = max(times[-1] - times[0], 1e-3) * len(times) / max(len(times) - 1, 1) if len(times) > 1 else 1.0
        began = time.time()
        with torch.no_grad(), precision(device):
            tokens, seg = tokenizer(torch.from_numpy(video)[None].to(device), cfg.tokens_per_trajectory)
        ids = seg.masks(video.shape[1:3])[0].cpu().numpy()
        painted = np.concatenate([video, *(paint(video, r, palette(int(r.max()) + 1)) for r in (ids, *truth))], 1)
        with film(f"{base}.mp4", len(video) / seconds) as add:
            add(painted.repeat(scale, 1).repeat(scale, 2))
        count, points, alive = len(video), seg.ids.shape[1], int(seg.alive.sum())
    spent, some = time.time() - began, np.linspace(0, len(video) - 1, min(8, len(video))).round().astype(int)
    write_png(f"{base}.png", strip(video[some], *(r[some] for r in (ids, *truth)), scale=scale))
    most = tokenizer.cfg.num_queries * (-(-count // cfg.window) if cfg.window else 1)
    print(f"{cfg.clip}: {count} frames of {size} x {size} px = {points} points -> {alive} trajectories (of at most {most}) -> "
          f"{int(tokens.mask.sum())} tokens of width {tokens.z.shape[-1]}; {spent:.2f} s on {device.type}, {peak_memory_gb(device):.2f} GB")
    print(f"wrote {base}.png and {base}.mp4")


def show_stream(tokenizer, cfg, path, size, scale):
    """Every frame of a file, a piece at a time: the film is written as the pieces come.
    -> Tokens, some 8 to 16 frames (k, H, W, 3) and their trajectories (k, H, W) for the picture, number of frames."""
    rounds = 1 if cfg.window else tokenizer.cfg.depth + 1 + tokenizer.cfg.depth
    colours, kept, every, turn, total = palette(tokenizer.cfg.num_queries), [], 1, 0, None
    rate = data.frame_rate(cfg.clip)

    def source():
        nonlocal turn, total
        turn, count = turn + 1, 0
        with tqdm(total=total, desc=f"round {turn} of {rounds}", unit=" frames", leave=False, disable=None) as bar:
            for part in data.read_frames(cfg.clip, size):
                count += len(part)
                bar.update(len(part))
                yield part
        total = count

    with film(path, rate) as add, precision(next(tokenizer.parameters()).device):
        def draw(first, video, seg):
            nonlocal kept, every
            video, ids = video[0].cpu().numpy(), seg.masks((size, size))[0].cpu().numpy()
            add(np.concatenate([video, paint(video, ids, colours)], 1).repeat(scale, 1).repeat(scale, 2))
            kept += [(v, i) for n, (v, i) in enumerate(zip(video, ids), first) if n % every == 0]
            while len(kept) > 16:                                # how many frames there will be is not known yet
                kept, every = kept[::2], 2 * every
        tokens = (tokenizer.windows(source, cfg.window, cfg.tokens_per_trajectory, draw) if cfg.window else
                  tokenizer.stream(source, cfg.tokens_per_trajectory, each=draw))
    return tokens, *(np.stack(x) for x in zip(*kept)), total


@data.one_line_errors
def main(argv=None):
    data.dispatch("trajtok.py", __doc__, {"pretrain": pretrain, "show": show}, argv)


if __name__ == "__main__":
    main()
