"""TrajTok, the trajectory tokenizer: segmenter + encoder; its sizes, weights and long video; and the run.

    video uint8 (b, t, H, W, 3) -> Segmenter -> Segmentation -> TrajectoryEncoder -> Tokens z (b, K·m, d')

    tokenizer = TrajTok("nano")                                  # or TrajTok(TrajTokConfig(...)), or
    tokenizer = TrajTok.from_pretrained("out/clip-nano")         # what train_clip.py or `pretrain` wrote
    tokenizer = TrajTok.load_official("trajvit2.pth")            # what the authors released
    tokens, segmentation = tokenizer(video, tokens_per_trajectory=2)
    tokens = tokenizer.stream(frames)                            # a video of any length, in constant memory

    python trajtok.py pretrain                                   # the segmenter alone
    python trajtok.py show clip.mp4                              # draw the trajectories of a video
    python trajtok.py show film.mp4 --frames 0                   # every frame of it
    python trajtok.py table out/clip-a out/clip-b                # results side by side
    python trajtok.py compare "base:" "no detach: --no-detach" --script train_clip.py --seeds 0 1 --json FILE

The second half is what the three training scripts share: devices, processes, checkpoints, the log, plots.
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import data
from data import BadInput, configure, film, paint, palette, replace, write_json, write_png
from encoder import Path as TrajectoryPath
from encoder import Tokens, TrajectoryEncoder, soft_sums
from segmenter import (ConvNeXt, Segmentation, Segmenter, best_overlaps, hungarian, labels_on_grid,
                       normalise, segmentation_loss, tube_overlaps, video_metrics)

# -----------------------------------------------------------------------------------------------------------
# The tokenizer
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrajTokConfig:
    """The one configuration of segmenter and encoder; the defaults are the paper's. image_size and frames are
    what the tokenizer is trained on: clips of other lengths, and of other sizes that are multiples of 32,
    go through as well."""
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
        if self.image_size % 32 or self.image_size < 32:
            raise BadInput(f"image size {self.image_size}: give a multiple of 32, e.g. 224")
        if self.dim % self.heads or self.dim % 8:
            raise BadInput(f"dim {self.dim}: must be a multiple of 8 and of the {self.heads} heads")
        if self.max_tokens not in (1, 2, 4, 8, 16):
            raise BadInput(f"max_tokens {self.max_tokens}: must be a power of two (the paper: 4)")

    @property
    def choices(self):
        """How many tokens a trajectory may have: 1, 2, 4, ... max_tokens."""
        return tuple(2 ** i for i in range(self.max_tokens.bit_length()))

    def check(self, m):
        if m not in self.choices:
            raise BadInput(f"tokens per trajectory {m}: one of {', '.join(map(str, self.choices))}")
        return m


# A size is what its machine trains in: nano in minutes on two cores, tiny in hours there, base and large on
# cards of 80 GB. base and large differ in the width of their tokens, which is that of the transformer behind
# them. The counts are parameters of segmenter and encoder together; a test counts them.
TINY = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
FULL = dict(image_size=224, frames=16, dim=512, num_queries=128, depth=2, heads=8, recompute=True, **TINY)
NANO = dict(depths=(1, 1, 2, 1), dims=(32, 64, 128, 256))
SMALL = dict(depths=(2, 2, 4, 2), dims=(48, 96, 192, 384))
SIZES = {
    "nano":  TrajTokConfig(64, 8, dim=96, num_queries=24, depth=1, heads=4, out_dim=128, **NANO),    # 1.4 M
    "tiny":  TrajTokConfig(128, 8, dim=256, num_queries=32, depth=2, out_dim=256, **SMALL),          # 8.8 M
    "base":  TrajTokConfig(out_dim=768, **FULL),                                                     # 46.2 M
    "large": TrajTokConfig(out_dim=1024, **FULL),                                # 46.4 M: the paper's 46 M
}


class TrajTok(nn.Module):
    """The tokenizer: video uint8 (b, t, H, W, 3) -> Tokens, Segmentation.

    size: a name from SIZES or a TrajTokConfig.
    backbone: a module of your own instead of the ConvNeXt, with `.dims`, the channels of its maps, and
    forward(x (b, 3, H, W)) -> maps (b, c, h, w), finest first; strides are read off the maps.

    The gradient of a loss on the tokens reaches the masks through z_init, a mean of features under the soft
    masks, and the features through that and through what the tokens read (encoder.py)."""

    def __init__(self, size="nano", backbone=None):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise BadInput(f"--size {size}: one of {', '.join(SIZES)}")
        self.cfg = SIZES[size] if isinstance(size, str) else size
        self.segmenter = Segmenter(self.cfg, backbone)
        self.encoder = TrajectoryEncoder(self.cfg)

    def forward(self, video, tokens_per_trajectory=None):
        """tokens_per_trajectory m: 1, 2 or 4. None: drawn at random in training (PAPER, after Matryoshka
        representations, arXiv 2205.13147), else 1.

        -> Tokens: z (b, K·m, d'), mask (b, K·m), True = its trajectory owns a point, trajectory (b, K·m);
        Segmentation: F (b, n, d), logits (b, n, K), ids (b, n), alive (b, K), grid (t, h, w)."""
        m = tokens_per_trajectory
        if m is None:
            m = int(np.random.choice(self.cfg.choices)) if self.training else 1
        seg = self.segmenter(video)
        return self.encoder(seg.features, seg, self.cfg.check(m)), seg

    @torch.no_grad()
    def stream(self, frames, tokens_per_trajectory=1, chunk=8, each=None):
        """The tokens of a video of any length, as forward would give them, in constant memory. -> Tokens, b =
        1

        frames: uint8 (t, H, W, 3), or a function that returns, each time anew, an iterator over such pieces
        (a decoder). each(first frame, piece (1, c, H, W, 3), its Segmentation) is called once a piece.
        The features of a long video fit no memory, so the video is read again whenever something needs all
        of it: to count its frames, once a layer of each Perceiver, and once for z_init."""
        segmenter, encoder, cfg = self.segmenter, self.encoder, self.cfg
        m, device = cfg.check(tokens_per_trajectory), segmenter.latents.device
        source = pieces(frames, chunk)
        count = sum(video.shape[1] for video in source())
        if not count:
            raise BadInput("an empty video: there is no frame to make tokens of")

        # the three generators below are the forward pass so far, a piece at a time
        def features():                                         # -> first frame, piece, F (1, n, d), grid
            first = 0
            for video in source():
                f, grid = segmenter.extract(normalise(video.to(device)))
                yield first, video, f, grid
                first += grid[0]

        def read_by_queries():
            for first, _, f, (t, h, w) in features():
                yield first * h * w, f, None

        queries = perceive(segmenter.perceiver, segmenter.latents[None], read_by_queries)

        def clusters():                                         # -> first frame, piece, Segmentation
            for first, video, f, grid in features():
                logits = segmenter.mask_logits(queries, f)
                ids = logits.argmax(-1)
                alive = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter(1, ids, True)
                yield first, video, Segmentation(f, logits, ids, alive, grid)

        # z_init is a mean over all points: sums of pieces add up
        total, weight, alive, path = 0.0, 0.0, False, []
        for first, video, seg in clusters():
            soft = seg.logits.softmax(-1)                       # over the queries
            points = encoder.add_places(seg.features, seg.grid, first, count)
            part, share = soft_sums(soft, points)
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
                last = number >= count * cells - cfg.last_points
                yield first * cells, points, seg.ids.masked_fill(last, EVERYONE)

        # under the hard mask a token sees the tokens of its own trajectory and the points that these own
        owner = torch.arange(cfg.num_queries, device=device).repeat_interleave(m)
        z = perceive(encoder.perceiver, latents, read_by_tokens, owner if cfg.hard_mask else None)
        return encoder.finish(z, alive)

    @torch.no_grad()
    def windows(self, frames, window=8, tokens_per_trajectory=1, each=None):
        """A video as separate clips of `window` frames, each with trajectories of its own: K·m tokens a
        window. -> Tokens, b = 1; trajectory k of window i is number i·K + k."""
        parts, first = [], 0
        for video in pieces(frames, window)():
            tokens, seg = self(video.to(self.segmenter.latents.device), tokens_per_trajectory)
            offset = len(parts) * self.cfg.num_queries
            parts.append(tokens._replace(trajectory=tokens.trajectory + offset))
            if each:
                each(first, video, seg)
            first += video.shape[1]
        if not parts:
            raise BadInput("an empty video: there is no frame to make tokens of")
        return Tokens(*(torch.cat(field, 1) for field in zip(*parts)))

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"trajtok": dataclasses.asdict(self.cfg)})
        write_weights(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, folder):
        """A folder that save_pretrained, `pretrain` or train_clip.py wrote -> the tokenizer, in eval mode."""
        return load_weights(cls(tokenizer_config(folder)), folder, "video.tokenizer.").eval()

    @classmethod
    def load_official(cls, path, mean_start=True):
        """The tokenizer of a checkpoint that the authors released, .pth or safetensors, e.g. TrajViT2's. Its
        configuration is read off names and shapes. mean_start: was it trained with z_init added to the
        codes? The weights do not tell."""
        marks = ("segmenter.log_scale", "latents", "output_projector.weight")
        weights = official_part(read_weights(path), marks, path)
        cfg, renamed = official_segmenter(under(weights, "segmenter."), path)
        own = {k: v for k, v in weights.items() if not k.startswith("segmenter.")}
        own = rename(own, [(r"traj_feature_updater\.(.+)", r"perceiver.\1")])
        official_perceiver(own, path)
        renamed = {f"segmenter.{k}": v for k, v in renamed.items()}
        renamed |= {f"encoder.{k}": v for k, v in own.items()}
        sizes = dict(max_tokens=own["latents"].shape[1], out_dim=len(own["output_projector.weight"]))
        cfg = dataclasses.replace(cfg, **sizes, last_points=2, mean_start=mean_start)
        return fit_weights(cls(cfg), renamed, path).eval()


# -----------------------------------------------------------------------------------------------------------
# Long video: a Perceiver that reads its points a piece at a time
# -----------------------------------------------------------------------------------------------------------

EVERYONE = -2                       # id of a point that every token may read (last_points); -1: of none


# A softmax over all points of a film needs their scores at once only on paper. For scores s_j and values v_j,
#
#   y = sum_j exp(s_j - s_max) v_j / sum_j exp(s_j - s_max)
#
# both sums can be carried along; when a piece brings a larger s_max, what was summed is scaled down.

class RunningSoftmax:
    """y = softmax(s) v over pieces of s and v, exactly, as flash attention does it (arXiv 2205.14135)."""

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
    """Perceiver.forward, where chunks() goes through (number of the first point, points (1, n, d), ids (1, n)
    or None), once a layer. owner (s,): the trajectory of each latent, under the hard mask.
    latents (1, s, d) -> (1, s, d)."""
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
        y = rearrange(softmax.mean(), "b a s c -> b s (a c)").to(latents.dtype)
        latents = (x if perceiver.normed_residual else latents) + attention.to_out(y)
        latents = latents + mlp(latents)
    return latents


def pieces(frames, length):
    """Cut a video into pieces of `length` frames.

    frames: uint8 (t, H, W, 3), or a callable that returns an iterator over parts of any length.
    -> a callable that returns an iterator over uint8 (1, length, H, W, 3); the last piece may be shorter."""
    if length < 1:
        raise BadInput(f"pieces of {length} frames: give at least 1")

    def cut():
        held = []
        for part in frames() if callable(frames) else [frames]:
            held.append(torch.as_tensor(part))
            # the last piece waits for what comes
            *whole, last = torch.cat(held).split(length)
            held = [last]
            yield from (piece[None] for piece in whole)
        if held and len(held[0]):
            yield held[0][None]

    return cut


# -----------------------------------------------------------------------------------------------------------
# Weights: our own folders, and what others published
# -----------------------------------------------------------------------------------------------------------

def tokenizer_config(folder):
    """The TrajTokConfig in a folder's config.json."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
        return TrajTokConfig(**values.get("trajtok", values.get("tokenizer")))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: no tokenizer's configuration ({error}); give the folder of a run") from None


def load_weights(module, folder, *prefixes):
    """folder/model.safetensors into module, strictly; of the keys under the first prefix that there is, if
    any."""
    path = Path(folder) / "model.safetensors"
    weights = read_weights(path)
    parts = [under(weights, prefix) for prefix in prefixes]
    return fit_weights(module, next(filter(None, parts), weights), path)


def write_weights(path, state):
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    replace(path, lambda beside: save_file(state, beside))


def read_weights(path, wrappings=("model", "state_dict")):
    """Weights that somebody wrote -> {name: tensor} on the CPU.

    path: a .safetensors file; a torch checkpoint (.pth, .pt, .bin), of which only tensors are loaded, no
    code; or a folder as a model hub serves it, with one of these files or with an index of several.
    wrappings: keys under which a checkpoint may hold its weights, {"model": {...}, "epoch": 3}; they are
    taken off, as is the `module.` that DistributedDataParallel puts before each name."""
    path = Path(path)
    if path.is_dir():
        # one file, or the index of several
        names = ("model.safetensors", "pytorch_model.bin")
        names += tuple(name + ".index.json" for name in names)
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    if not path.exists():
        raise BadInput(f"{path}: no such file of weights; check the path, or let the run save first")
    weights, files = {}, [path]
    try:
        if path.suffix == ".json":
            names = set(json.loads(path.read_text())["weight_map"].values())
            files = [path.parent / name for name in sorted(names)]
        for file in files:
            weights |= load_any(file)
    # the two readers raise many types on a file that is not theirs
    except Exception as error:
        raise BadInput(f"{path}: no whole file of weights ({type(error).__name__}); fetch it again") from None
    for name in (*wrappings, *wrappings):                       # one may stand inside the other
        weights = weights[name] if isinstance(weights.get(name), dict) else weights
    weights = {str(name).removeprefix("module."): x for name, x in weights.items() if torch.is_tensor(x)}
    if not weights:
        raise BadInput(f"{path}: holds no named weights; a state dict was expected")
    return weights


def load_any(file):
    if file.suffix == ".safetensors":
        return load_file(file)
    # the original VideoMAE release keeps its command line beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def fit_weights(module, weights, where):
    """weights into module -> module. Strictly: a missing, an unexpected or a wrongly shaped tensor is
    refused, or a model would train on, half of it random, and nobody would know."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise BadInput(f"{where}: weights of another model or size: {reason}") from None
    return module


def under(weights, prefix):
    """The weights whose names begin with prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def rename(weights, rules):
    """Rename keys. rules: (pattern, replacement) pairs, of which the first that fits a whole key is applied;
    a replacement None drops the key; keys that no rule fits stay."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            found = re.fullmatch(pattern, key)
            if found:
                key = found.expand(replacement) if replacement else None
                break
        if key:
            renamed[key] = value
    return renamed


def count(weights, pattern):
    """1 + the largest number that group 1 of the pattern takes among the keys; 0 if it fits none."""
    found = [re.match(pattern, key) for key in weights]
    return max((int(one[1]) + 1 for one in found if one), default=0)


# Four projects publish ConvNeXt (arXiv 2201.03545) under four sets of names, the same tensors in each.
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
    """Any published layout -> weights under our names, depths, dims; the last two read off names and
    shapes."""
    for prefix in ("convnext.", "backbone.", "model."):
        if any(k.startswith(prefix) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    weights = rename(weights, CONVNEXT_NAMES)
    depths = tuple(count(weights, rf"stages\.{i}\.(\d+)\.") for i in range(4))
    try:
        stems = [weights[f"downsample_layers.{i}.{min(i, 1)}.weight"] for i in range(4)]
    except KeyError as error:
        raise BadInput(f"{where}: no ConvNeXt in a layout that is known: it has no {error}") from None
    return weights, depths, tuple(len(stem) for stem in stems)


def load_convnext(path):
    """A published ConvNeXt: the original's file, DINOv3's, timm's, or a hub folder."""
    weights, depths, dims = convnext_names(read_weights(path), path)
    return fit_weights(ConvNeXt(depths, dims), weights, path)


# the authors' names -> ours. Their low-resolution head is the one that makes tokens; a second head at the
# frame's resolution serves the segmenter's training alone and is left out.
SEGMENTER_NAMES = [
    (r"patch_encoder\.(proj\.\d|ln)\.(.+)", r"\1.\2"),
    (r"trajectory_perceiver\.latents", r"latents"),
    (r"trajectory_perceiver\.(.+)", r"perceiver.\1"),
    (r"(traj_seg_head|patch_decoder)_low_res\.(.+)", r"\1.\2"),
    (r"(traj_seg_head|patch_decoder)_high_res\..+", None),      # for the release's training only
]


def official_part(weights, marks, where):
    """The keys under the prefix that holds all of `marks`, without it: a released checkpoint holds other
    models beside the tokenizer."""
    for outer in ("", "traj_tokenizer.", "vision_encoder.", "vision_encoder.traj_tokenizer."):
        for prefix in (outer, outer + "segmenter."):
            if all(prefix + mark in weights for mark in marks):
                return under(weights, prefix)
    raise BadInput(f"{where}: not in the authors' layout: no {' and '.join(marks)} under a known prefix; "
                   "folders that these scripts wrote load with from_pretrained")


def official_perceiver(weights, where):
    """-> depth, heads of one of the release's Perceivers. The rotary frequencies that it stores, one for
    every four channels of a head, tell the heads; they are dropped from `weights`."""
    depth = count(weights, r"perceiver\.layers\.(\d+)\.")
    stored = [weights.pop(f"perceiver.layers.{i}.0.rotary_emb.freqs", None) for i in range(depth)]
    if not stored or any(freqs is None for freqs in stored):
        raise BadInput(f"{where}: no perceiver.layers.*.rotary_emb.freqs, which tell the number of heads")
    return depth, weights["perceiver.norm_lat.weight"].numel() // (4 * stored[0].numel())


def official_segmenter(weights, where):
    """The release's segmenter -> TrajTokConfig read off names and shapes, weights under our names."""
    backbone, depths, dims = convnext_names(under(weights, "patch_encoder.backbone."), where)
    rest = {k: v for k, v in weights.items() if not k.startswith("patch_encoder.backbone.")}
    rest = rename(rest, SEGMENTER_NAMES)
    depth, heads = official_perceiver(rest, where)
    queries, dim = rest["latents"].shape
    cfg = TrajTokConfig(dim=dim, num_queries=queries, depth=depth, heads=heads, depths=depths, dims=dims,
                        frames=8, normed_residual=True, norm_media=True)
    return cfg, {**{f"backbone.{k}": v for k, v in backbone.items()}, **rest}


def load_official_segmenter(path):
    """The Segmenter of a checkpoint that the authors released: alone, or inside TrajViT2's."""
    marks = ("log_scale", "trajectory_perceiver.latents")
    cfg, weights = official_segmenter(official_part(read_weights(path), marks, path), path)
    return fit_weights(Segmenter(cfg), weights, path).eval()


# -----------------------------------------------------------------------------------------------------------
# A run: device, processes, optimizer
# -----------------------------------------------------------------------------------------------------------

def setup(cfg):
    """-> torch.device. Joins the other processes if torchrun launched us, and seeds the weights."""
    device = choose_device(cfg.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # the first process may evaluate for long while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        if dist.get_rank():
            # the first process speaks for all; errors are heard from each
            sys.stdout = open(os.devnull, "w")
    torch.manual_seed(cfg.seed)
    return device


def choose_device(name):
    """--device -> torch.device. Of several processes each has a GPU, or its share of the cores, of its
    own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.set_float32_matmul_precision("high")
    if name == "cpu":
        keep_memory()                                           # before the first tensor
        share = data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(min(max(share, 1), 16))
    try:
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
        return torch.zeros(1, device=name).device
    # on a build of torch without GPUs even the switch is missing
    except (RuntimeError, AssertionError, AttributeError):
        raise BadInput(f"--device {name}: not available here; give cpu, or leave it out") from None


def keep_memory():
    """Tell the C library to keep freed memory: by default every large tensor is mapped from the system and
    given back, page by page, at each step. On two cores that made a nano step twice as fast. Linux with glibc
    only. Tensors that begin at a page leave fewer holes in kept memory (THP_MEM_ALLOC_ENABLE, PyTorch's
    switch)."""
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 1 << 30)                                # M_MMAP_THRESHOLD: below 1 GiB, use the heap
            mallopt(-1, -1)                                     # M_TRIM_THRESHOLD: never shrink the heap


def launch(cfg):
    """`python train_x.py` becomes several processes under torchrun: --processes, or one for each GPU."""
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    processes = cfg.processes or gpus
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        os.execvp(sys.executable, [*torchrun, f"--nproc-per-node={processes}", *sys.argv])


def ranks():
    """-> the number of this process, how many train together."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_reduce(values, device):
    """Numbers of this process -> their means over all processes."""
    if ranks()[1] == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(sums)
    return (sums / ranks()[1]).tolist()


def gather(x):
    """Rows of this process (n, ...) -> those of all, in the order of the processes. Gradient flows into our
    own rows only: every process computes the same loss of all rows, so what reaches them is whole."""
    rank, world = ranks()
    if world == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


def sum_gradients(parameters):
    """p.grad becomes its sum over all processes. CHOICE: after the backward pass instead of
    DistributedDataParallel, which must know beforehand which parameters a step uses; here that changes."""
    for p in parameters if ranks()[1] > 1 else []:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


def precision(device, bf16=None):
    """Autocast to bfloat16, by default on a GPU; float32 on a CPU, where it is emulated on most machines."""
    enabled = device.type == "cuda" if bf16 is None else bf16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def learning_rate(step, cfg):
    """Linear warm-up over cfg.warmup steps, then a cosine down to 1 % of cfg.lr at the last step:

      lr (step + 1) / warmup,      then      lr (0.01 + 0.99 (1 + cos(pi progress)) / 2)"""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = min((step - cfg.warmup) / max(cfg.steps - 1 - cfg.warmup, 1), 1)
    return cfg.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model, cfg, scales=None):
    """AdamW. Weight decay is for matrices alone: pulled towards 0, norms, biases and scales would silence the
    layers behind them.
    scales {prefix of names:
    factor}: these parameters learn at factor x the learning rate: the loop multiplies lr by
    group["scale"]."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factors = [factor for prefix, factor in (scales or {}).items() if name.startswith(prefix)]
            scale = factors[0] if factors else 1.0
            decay = cfg.weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(p)
    groups = [dict(params=ps, scale=scale, weight_decay=decay) for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=p.is_cuda)


def check_finite(terms, step):
    """Before the optimizer's step, so that what is saved stays whole."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise BadInput(f"step {step}: {name} is {value}; train again with a lower --lr")


def peak_memory_gb(device):
    """Peak memory: allocated on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20     # bytes or kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def count_gflops(run):
    """GFLOPs of run(): matrix products, convolutions and attention, 2 per multiply-add. torch's counter does
    not know the attention kernel of CPUs, and fails under no_grad."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        run()
    return counter.get_total_flops() / 1e9


# -----------------------------------------------------------------------------------------------------------
# A run: its folder. Every file is written beside and renamed into place
# -----------------------------------------------------------------------------------------------------------

def run_folder(cfg, script, suffix=""):
    """out/<script>-<name>; without --name the size, where own data came from, and `suffix`."""
    name = cfg.size
    if cfg.data != "world":
        sets = [Path(one.strip()).resolve() for one in cfg.data.split(",")]
        name += "-" + "+".join(one.parent.name if one.stem == "manifest" else one.stem for one in sets)
    return Path(cfg.out) / f"{script}-{cfg.name or name + suffix}"


def resumed(cfg, folder, argv):
    """With --resume or --eval-only: the saved configuration, and above it the flags that were given now."""
    config = folder / "config.json"
    saved = read_json(config) if config.exists() else {}
    if "size" not in saved:
        raise BadInput(f"{folder}: no run to go on with, or to score; train one first")
    names = {field.name for field in dataclasses.fields(cfg)} - {"resume", "overwrite", "eval_only"}
    known = {name: saved[name] for name in names if name in saved}
    return configure(type(cfg), {saved["size"]: known}, ["--size", saved["size"], *argv])


def make_folder(folder):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: this folder cannot be made ({error.strerror}); give another") from None


def open_run(folder, cfg, **more):
    """Make the folder of a run and write its config.json: the configuration and `more`. A run that is there
    already is not overwritten. manifest, in `more`: data.fingerprint of what it learns from, which a resumed
    run keeps."""
    config = folder / "config.json"
    if ranks()[0]:
        return
    if config.exists() and not (cfg.resume or cfg.overwrite):
        raise BadInput(f"{folder}: holds a run; --resume goes on with it, --overwrite starts it again")
    if cfg.resume and cfg.overwrite:
        raise BadInput("--resume goes on with a run, --overwrite starts it again: give one of them")
    if cfg.resume and config.exists() and read_json(config).get("manifest") != more.get("manifest"):
        raise BadInput(f"--resume: {cfg.data} has changed since {folder} began; train under another --name")
    make_folder(folder)
    for name in ("state.pt", "log.jsonl", "result.json", "model.safetensors") if cfg.overwrite else ():
        (folder / name).unlink(missing_ok=True)
    write_json(config, {**dataclasses.asdict(cfg), **more})


def save_checkpoint(folder, model, optimizer, step):
    """The state before step number `step`, for --resume, and the weights, for everybody else.

    All that is random in a run is drawn from (seed, step), so model, optimizer and step are the whole state.
    A kill leaves the old checkpoint or the new one, never half of one: files are written beside and
    renamed."""
    if ranks()[0]:
        return
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
    try:
        replace(folder / "state.pt", lambda beside: torch.save(state, beside))
        write_weights(folder / "model.safetensors", model.state_dict())
    except (RuntimeError, SafetensorError) as error:
        # e.g. on a full disk
        raise BadInput(f"{folder}: the checkpoint cannot be written ({error}); make room") from None


def load_checkpoint(folder, model, optimizer):
    """The last checkpoint of a run into model and optimizer -> the step to begin with: 0 if nothing was
    saved."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises many types on a file that is not its own
    except Exception as error:
        raise BadInput(f"{path}: no whole checkpoint ({type(error).__name__}); remove it") from None
    fit_weights(model, state["model"], path)
    # what the flags say now holds: learning rates and weight decay
    kept = ("scale", "weight_decay")
    groups = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise BadInput(f"{path}: is of a run that trained other parameters ({error})") from None
    for group, flags in zip(optimizer.param_groups, groups):
        group.update(flags)
    return state["step"]


class Log:
    """log.jsonl: a line of JSON a step; log(step=3, focal=0.2, ...) appends one. Lines from step `first` on,
    which a resumed run makes again, are cut off; first = None leaves the file as it is."""

    def __init__(self, folder, first=None):
        self.path = folder / "log.jsonl"
        if first is not None and not ranks()[0]:
            kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] < first]
            replace(self.path, lambda beside: beside.write_text("".join(kept)))

    def __call__(self, **line):
        if not ranks()[0]:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def lines(self):
        text = self.path.read_text() if self.path.exists() else ""
        # a kill may leave half a line at the end
        whole = text[:text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]


# -----------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------

# five rows of three pixels a letter, a row an octal digit
GLYPHS = dict(zip("0123456789abcdefghijklmnopqrstuvwxyz.-%/:+=,()> ", (
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 25755 65656 34443 65556 74647 74644 34553 "
    "55755 72227 11153 55655 44447 57755 65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 "
    "55222 71247 00002 00700 51245 11244 02020 02720 07070 00024 12221 42224 42124 00000").split()))


def write_text(image, text, top, left, scale=2):
    """Small capitals into image (H, W, 3), in place; what leaves the image is cut off."""
    for i, letter in enumerate(text.lower()):
        for row, octal in enumerate(GLYPHS.get(letter, "00700")):
            for column in range(3):
                if int(octal) >> (2 - column) & 1:
                    y, x = top + row * scale, left + (4 * i + column) * scale
                    image[y:y + scale, x:x + scale] = 40


def filmstrip(video, rows, count=4, scale=2):
    """`count` frames of video (t, H, W, 3) in a row, and below them the same frames painted by each of rows
    {name: ids (t, H, W)}, with the names at the left -> image. Trajectories take the colour of the one in the
    last row that they overlap most, so that the eye can compare."""
    some = np.linspace(0, len(video) - 1, count).round().astype(int)
    truth = list(rows.values())[-1]
    shown = {"frames": video[some]}
    for name, ids in rows.items():
        # one more, so that unlabelled pixels, -1, are a tube as well
        inter, union = tube_overlaps(torch.from_numpy(ids + 1), torch.from_numpy(truth + 1))
        labels, tubes = hungarian(-(inter / union.clamp(min=1)).numpy())
        colours = palette(sum(inter.shape))
        mine = colours[len(inter):]
        mine[tubes] = colours[labels]
        shown[name] = paint(video, ids, mine[1:])[some]
    lines = []
    for name, images in shown.items():
        images = images.repeat(scale, 1).repeat(scale, 2)
        images = np.pad(images, ((0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
        line = np.pad(np.concatenate(list(images), 1), ((0, 0), (80, 0), (0, 0)), constant_values=255)
        write_text(line, name, len(line) // 2 - 5, 4)
        lines.append(line)
    return np.pad(np.concatenate(lines), ((0, 12), (0, 0), (0, 0)), constant_values=255)


def plot(path, panels, x="step", log=False):
    """panels {title: {line's name: [(x, y), ...]}} -> an SVG file, two panels a row.
    x: the name of the horizontal axis. log: both axes are logarithmic; all values must be above 0.

    SVG because it is text: axes and letters are sharp at any size, and a figure can be read off the file."""
    size = f'width="960" height="{300 * math.ceil(len(panels) / 2)}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for i, (title, lines) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({480 * (i % 2)} {300 * (i // 2)})">')
        parts += [*panel(title, lines, x, log), "</g>"]
    replace(path, lambda beside: beside.write_text("\n".join([*parts, "</svg>"])))


def panel(title, lines, x, log):
    """One panel of a plot, 480 x 300; its axes run from (70, 250) to (370, 30)."""
    points = {name: np.array(line, float) for name, line in lines.items()}
    if log:
        points = {name: np.log10(line) for name, line in points.items()}
    low, high = np.concatenate(list(points.values())).min(0), np.concatenate(list(points.values())).max(0)
    span = np.maximum(high - low, 1e-9)
    yield f'<text x="70" y="20" font-weight="bold">{title}</text>'
    note = " (both axes are logarithmic)" if log else ""
    yield f'<text x="220" y="290" text-anchor="middle">{x}{note}</text>'
    for share in np.linspace(0, 1, 5):
        right, up = 70 + 300 * share, 250 - 220 * share
        tick = 10 ** (low + share * span) if log else low + share * span
        yield f'<path d="M70 {up}H370M{right} 250V255" stroke="#ddd"/>'
        yield f'<text x="64" y="{up + 4}" text-anchor="end">{tick[1]:.3g}</text>'
        yield f'<text x="{right}" y="269" text-anchor="middle">{tick[0]:.4g}</text>'
    for i, (name, line) in enumerate(points.items()):
        colour = "rgb({},{},{})".format(*palette(i + 1)[i])
        where = (line - low) / span * (300, -220) + (70, 250)
        corners = " ".join(f"{right:.1f},{up:.1f}" for right, up in where)
        yield f'<polyline points="{corners}" fill="none" stroke="{colour}"/>'
        yield f'<text x="378" y="{44 + 16 * i}" fill="{colour}">{name}</text>'


def aligned(lines):
    """Lines of cells -> lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        texts.append("  ".join([first.ljust(widths[0]), *cells]))
    return texts


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py pretrain
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PretrainConfig:
    """Trains the segmenter alone: focal + 2 dice on trajectory labels."""
    size: str = "nano"                  # one of SIZES: nano, tiny, base, large
    data: str = "world"                 # `world`, or a manifest or folder with masks; several with commas
    mix: str | None = None              # shares of several sets, with commas: 0.5,0.5; default: equal
    val: str | None = None              # a manifest of held-out clips; default: a part of --data
    name: str | None = None             # the run's folder is out/segmenter-<name>
    out: str = "out"                    # where runs are kept
    init: str | None = None             # start from the segmenter of this run, of `pretrain` or train_clip.py
    # the clips
    image_size: int | None = None       # pixels of a side, a multiple of 32; default: the size's
    frames: int | None = None           # frames of a clip; default: the size's
    num_queries: int | None = None      # K, trajectories at most; default: the size's
    stride: int = 8                     # take every 1st .. stride-th frame; 0: spread over the video
    max_objects: int = 8                # of a made clip: 1 .. 8
    shared_colours: bool = True         # may two objects of a made clip have the same colour?
    augment: bool = False               # of real clips: the same random crop, flip, colours for all frames
    # the training
    batch: int = 32                     # clips a step
    steps: int = 300                    # steps
    lr: float = 1e-3                    # peak learning rate
    warmup: int = 20                    # steps of linear warm-up
    weight_decay: float = 0.02          # on matrices
    clip: float = 1.0                   # largest gradient norm
    seed: int = 0                       # of weights and data order
    workers: int = 0                    # processes that make batches; 0: this one
    save_every: int = 100               # steps between checkpoints
    eval_clips: int = 64                # held-out made clips
    device: str = "auto"                # cpu, cuda, ...
    resume: bool = False                # go on with the run of this name
    overwrite: bool = False             # start again over a run of this name

    def __post_init__(self):
        at_least(self, 1, "batch steps save_every eval_clips num_queries max_objects frames image_size")
        at_least(self, 0, "warmup workers weight_decay stride seed lr clip")


def at_least(cfg, least, names):
    """Refuse flags that are too small, or not a number."""
    for name in names.split():
        value = getattr(cfg, name)
        if not (value is None or least <= value < math.inf):
            raise BadInput(f"--{name.replace('_', '-')} {value}: give a number from {least} on")


# CHOICE, nano only: clips of at most four objects, no two of one colour. Eight, at 64 px, are a few points
# each; in minutes the segmenter learns to tell things apart by colour, not yet by place.
PRETRAIN_SIZES = {name: {"size": name} for name in SIZES}
PRETRAIN_SIZES["nano"] |= dict(max_objects=4, shared_colours=False)


def sized(cfg, shape):
    """A run's TrajTokConfig: `shape` with what the flags say; and the flags with what the size decides."""
    names = ("image_size", "frames", "num_queries")
    shape = dataclasses.replace(shape, **{k: getattr(cfg, k) for k in names if getattr(cfg, k) is not None})
    return shape, dataclasses.replace(cfg, **{k: getattr(shape, k) for k in names})


def pretrain(cfg):
    """Train the segmenter alone -> the folder of the run, which TrajTok.from_pretrained reads; the encoder in
    it stays as it was drawn. PAPER: the segmenter is also trained jointly with the task, in train_clip.py;
    alone it is what TrajAdapter and TrajVLM start from."""
    shape, cfg = sized(cfg, SIZES[cfg.size])
    device = setup(cfg)
    train, held_out = data.open_data(cfg, "mask")
    folder = run_folder(cfg, "segmenter")
    manifest = data.fingerprint(cfg.data, cfg.val)
    open_run(folder, cfg, trajtok=dataclasses.asdict(shape), manifest=manifest)
    tokenizer = TrajTok(shape).to(device)
    if cfg.init:
        load_weights(tokenizer.segmenter, cfg.init, "video.tokenizer.segmenter.", "segmenter.")
    segmenter = tokenizer.segmenter
    optimizer = make_optimizer(segmenter, cfg)
    first = load_checkpoint(folder, tokenizer, optimizer)
    log, damage = Log(folder, first), data.Damage()
    for step, batch in enumerate(data.loader(train, first, cfg.steps, cfg.workers), first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        # 1. clips and their labels
        damage.add(batch["bad"])
        batch = data.finish(batch, device)
        video, labels = batch["video"], batch["labels"]
        # made clips differ enough as they are
        if cfg.augment and "motion" not in batch:
            video, labels = data.augment(video, labels, step + cfg.seed * 10 ** 6)
        # 2. the loss
        segmenter.train()
        with precision(device):
            seg = segmenter(video)
        focal, dice = segmentation_loss(seg, labels)
        # 3. the step
        optimizer.zero_grad()
        # the release's weights for the segmenter alone
        loss = focal + 2 * dice
        loss.backward()
        norm = nn.utils.clip_grad_norm_(segmenter.parameters(), cfg.clip)
        terms = dict(focal=focal.item(), dice=dice.item(), gradient_norm=norm.item())
        check_finite(terms, step)
        optimizer.step()
        # 4. the log and the checkpoint. If few of many queries are alive, they collapse
        live = seg.alive.float().sum(1).mean().item()
        log(step=step, **terms, lr=learning_rate(step, cfg), live=live)
        if step % 10 == 0 or step + 1 == cfg.steps:
            terms = f"focal {focal:.3f}  dice {dice:.3f}  live {live:.1f}"
            print(f"step {step:5d}/{cfg.steps}  {terms}", flush=True)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(folder, tokenizer, optimizer, step + 1)
    result, pictures = evaluate_segmenter(segmenter, held_out, device)
    write_json(folder / "result.json", result | dict(seed=cfg.seed, left_out=len(damage.files)))
    save_pictures(folder, pictures, log, ("focal", "dice"))
    print("\n".join(aligned([[key, f"{value:.3f}"] for key, value in result.items()])))
    print(f"wrote {folder}/: model.safetensors, result.json, trajectories.png, curves.svg")
    return folder


@torch.no_grad()
def evaluate_segmenter(segmenter, batches, device):
    """VEQ, STQ and the mean best IoU of the labelled objects on held-out clips. CHOICE: on the segmenter's
    own grid, where its masks live (PAPER: "low-resolution output"). -> dict of means over clips, empty if
    none is labelled; pictures [(video, found, true)]."""
    segmenter.eval()
    rows, pictures = [], []
    for i in range(len(batches)):
        batch = data.finish(batches[i], device)
        if not len(batch["video"]):                             # none of its files can be used
            continue
        # of made clips objects alone: the ids of grounds come first
        first = data.MAX_GROUNDS if "motion" in batch else 0
        with precision(device):
            seg = segmenter(batch["video"])
        truth = labels_on_grid(batch["labels"], seg.grid, 10 ** 6).unflatten(1, seg.grid).cpu()
        found = seg.ids.unflatten(1, seg.grid).cpu()
        fine = seg.masks(batch["labels"].shape[-2:]).cpu()
        for j in (truth >= 0).flatten(1).any(1).nonzero()[:, 0].tolist():
            scores = video_metrics(found[j:j + 1], truth[j:j + 1])
            best = best_overlaps(found[j:j + 1], truth[j:j + 1], first) or [math.nan]
            row = dict(object_iou=sum(best) / len(best), veq=scores["veq"], stq=scores["stq"])
            rows.append(row | dict(live_trajectories=int(seg.alive[j].sum())))
            if len(pictures) < 6:
                clip = (batch["video"][j], fine[j], batch["labels"][j])
                pictures.append([x.cpu().numpy() for x in clip])
    keys = rows[0] if rows else ()
    return {key: float(np.nanmean([row[key] for row in rows])) for key in keys}, pictures


def save_pictures(folder, pictures, log, terms):
    """trajectories.png: clips with their found and true trajectories, two side by side; curves.svg: the
    log."""
    sheets = [filmstrip(video, {"found": found, "true": true}) for video, found, true in pictures]
    pairs = [np.concatenate(sheets[i:i + 2], 1) for i in range(0, len(sheets) - 1, 2)] or sheets
    if pairs:
        write_png(folder / "trajectories.png", np.concatenate(pairs))
    curves = {term: [(line["step"], line[term]) for line in log.lines() if term in line] for term in terms}
    plot(folder / "curves.svg", {term: {"": curve} for term, curve in curves.items() if curve})


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py show
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShowConfig:
    """Draws the trajectories of a video and tells how many tokens they make."""
    clip: str = "world"                 # a video or picture file, or `world` for a made clip
    weights: str = "out/clip-nano"      # a run's folder, or a checkpoint that the authors released
    frames: int | None = None           # spread over the clip; 0: all of them; default: the tokenizer's
    window: int = 0                     # with --frames 0: so many frames have trajectories of their own
    tokens_per_trajectory: int = 1      # 1, 2 or 4
    out: str = "out"                    # folder for <clip>-trajectories.mp4 and .png
    index: int = 0                      # which made clip, with `world`
    device: str = "auto"                # cpu, cuda, ...

    def __post_init__(self):
        at_least(self, 0, "frames window index")


class Painter:
    """Writes a film of frames and trajectories as they come, and keeps 8 to 16 of them for a picture."""

    def __init__(self, add, count):
        self.add, self.colours, self.every, self.kept, self.frames = add, palette(count), 1, [], 0

    def __call__(self, first, video, seg):                      # as TrajTok.stream calls its `each`
        video = video[0].cpu().numpy()
        ids = seg.masks(video.shape[1:3])[0].cpu().numpy()
        sheet = np.concatenate((video, paint(video, ids, self.colours)), 1)
        scale = max(1, 224 // video.shape[1])
        self.add(sheet.repeat(scale, 1).repeat(scale, 2))
        self.kept += [pair for i, pair in enumerate(zip(video, ids), first) if i % self.every == 0]
        while len(self.kept) > 16:                              # how many will come is not known
            self.kept = self.kept[::2]
            self.every *= 2
        self.frames += len(video)


def show(cfg):
    device = choose_device(cfg.device)
    released = Path(cfg.weights).is_file()
    tokenizer = TrajTok.load_official(cfg.weights) if released else TrajTok.from_pretrained(cfg.weights)
    tokenizer.to(device)
    m = tokenizer.cfg.check(cfg.tokens_per_trajectory)
    frames = tokenizer.cfg.frames if cfg.frames is None else cfg.frames
    size = tokenizer.cfg.image_size
    made = cfg.clip == "world"
    if made or Path(cfg.clip).suffix.lower() in data.IMAGE_SUFFIXES:
        if not frames or cfg.window:
            raise BadInput(f"--frames 0 and --window are for video files, not for {cfg.clip}")
        frames = frames if made else 1
    elif frames and cfg.window:
        raise BadInput(f"--window {cfg.window}: goes with --frames 0")
    rows, rate = {}, 4.0
    if made:
        scripts = data.stack([data.script(data.TEST + cfg.index, data.World(size=size, frames=frames))])
        video, labels = data.rasterise(scripts, size)
        rows["true"] = labels[0].numpy()
    elif frames:
        video, times = data.decode(cfg.clip, frames, size)
        video = torch.from_numpy(video)[None]
        rate = len(times) / (times[-1] + 0.25)
    else:
        rate = data.frame_rate(cfg.clip)

    def read():
        return tqdm(data.read_frames(cfg.clip, size), unit=" pieces", leave=False, disable=None)

    base = Path(cfg.out) / f"{Path(cfg.clip).stem}-trajectories"
    make_folder(base.parent)
    began = time.time()
    with film(f"{base}.mp4", rate) as add, torch.no_grad(), precision(device):
        painter = Painter(add, tokenizer.cfg.num_queries)
        if frames:
            tokens, seg = tokenizer(video.to(device), m)
            painter(0, video, seg)
        elif cfg.window:
            tokens = tokenizer.windows(read, cfg.window, m, painter)
        else:
            tokens = tokenizer.stream(read, m, each=painter)
    video, ids = (np.stack(parts) for parts in zip(*painter.kept))
    rows = {name: labels[::painter.every] for name, labels in rows.items()}
    sheet = filmstrip(video, {"found": ids, **rows}, min(8, len(video)), max(1, 224 // size))
    write_png(f"{base}.png", sheet)
    trajectories = tokens.trajectory[tokens.mask].unique()
    print(f"{cfg.clip}: {painter.frames} frames of {size} x {size} px -> {len(trajectories)} trajectories -> "
          f"{int(tokens.mask.sum())} tokens of width {tokens.z.shape[-1]}; {time.time() - began:.1f} s on "
          f"{device.type}, {peak_memory_gb(device):.2f} GB")
    print(f"wrote {base}.png and {base}.mp4")


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py table, compare
# -----------------------------------------------------------------------------------------------------------

def summary(rows):
    """rows [{name, results: [result.json of each seed]}] -> lines of a table: a score a line, a row of the
    comparison a column: mean +- deviation over seeds; behind it the difference to the first row, and a star
    if it is larger than twice its standard error."""
    scores = {}
    for result in (result for row in rows for result in row["results"]):
        scores |= {key: x for key, x in result.items() if isinstance(x, (int, float)) and key != "seed"}
    lines = [["", *(row["name"] for row in rows)], ["seeds", *(str(len(row["results"])) for row in rows)]]
    for score in scores:
        cells, first = [score], None
        for row in rows:
            x = np.array([r[score] for r in row["results"] if r.get(score) is not None], float)
            if not len(x):
                cells.append("-")
                continue
            cell = f"{x.mean():.3f}"
            if len(x) > 1:
                cell += f" +-{x.std(ddof=1):.3f}"
            if first is not None:
                cell += f" ({x.mean() - first.mean():+.3f}{star(x, first)})"
            first = x if first is None else first
            cells.append(cell)
        lines.append(cells)
    return aligned(lines)


def star(a, b):
    """Is the difference of two means larger than twice its standard error? Of single seeds nothing is said.

      |mean a - mean b| > 2 sqrt(var a / n_a + var b / n_b)"""
    if min(len(a), len(b)) < 2:
        return ""
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return "*" if abs(a.mean() - b.mean()) > 2 * error else " "


def read_json(path):
    """A JSON object from a file -> dict."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds no JSON object")
    return value


def table(argv):
    """Runs, side by side; or what `compare` wrote."""
    if not argv:
        raise BadInput("table: give folders of runs, or a JSON of compare")
    rows = []
    for name in argv:
        if Path(name).is_dir():
            rows.append(dict(name=Path(name).name, results=[read_json(Path(name) / "result.json")]))
        else:
            rows += read_rows(name)
    print("\n".join(summary(rows)))


def read_rows(path):
    """The rows of a JSON that compare wrote."""
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(row.get("results") for row in rows):
        raise BadInput(f"{path}: not a table that `trajtok.py compare` wrote")
    return rows


def compare(argv):
    """Train every row with every seed, each under a name of its own, and print the table. What --json holds
    already is not trained again, so that a table grows over days.

    A row is "NAME: FLAGS", flags of the script: every claim of the paper, and every idea of your own, is a
    line of shell. The JSON: {command, hardware, rows: [{name, flags, results: [result.json of each
    seed]}]}."""
    parser = data.OneLineParser(prog="trajtok.py compare", description=compare.__doc__, allow_abbrev=False)
    parser.add_argument("rows", nargs="+", metavar="NAME: FLAGS", help='e.g. "detach: --no-detach", "base:"')
    parser.add_argument("--script", default="train_clip.py", help="the script whose flags these are")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each row is trained with each")
    parser.add_argument("--json", default="out/compare.json", help="where results are kept")
    parser.add_argument("--out", default="out", help="where the runs are kept")
    args = parser.parse_args(argv)
    path = Path(args.json)
    make_folder(path.parent)
    rows = read_rows(path) if path.exists() else []
    for text in args.rows:
        name, colon, flags = (part.strip() for part in text.partition(":"))
        if not (name and colon):
            raise BadInput(f"compare {text!r}: write a row as NAME: FLAGS")
        row = next((row for row in rows if row["name"] == name), None)
        if row is None:
            row = dict(name=name, flags=flags, results=[])
            rows.append(row)
        if row["flags"] != flags:
            raise BadInput(f"{path}: holds {name} with flags {row['flags']!r}; give this row another name")
        for seed in args.seeds:
            if seed not in [result["seed"] for result in row["results"]]:
                row["results"].append(train_row(args, name, flags, seed))
                command = shlex.join(["python", "trajtok.py", "compare", *argv])
                write_json(path, dict(command=command, hardware=hardware(), rows=rows))
    print("\n".join(summary(rows)))


def hardware():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return f"{gpu or platform.machine()}, {data.cores()} cores, torch {torch.__version__}"


def train_row(args, name, flags, seed):
    """One row and seed -> its result.json."""
    name = f"{name.replace(' ', '-')}-{seed}"
    try:
        command = [sys.executable, args.script, *shlex.split(flags), "--seed", str(seed)]
    except ValueError as error:
        raise BadInput(f"compare {flags!r}: {error}") from None
    command += ["--name", name, "--out", args.out, "--overwrite"]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise BadInput(f"{name}: {args.script} failed (see above); what was finished is in {args.json}")
    script = Path(args.script).stem.removeprefix("train_")
    return read_json(Path(args.out) / f"{script}-{name}" / "result.json")


# -----------------------------------------------------------------------------------------------------------

def pretrain_command(argv):
    cfg = configure(PretrainConfig, PRETRAIN_SIZES, argv)
    if cfg.resume:
        cfg = resumed(cfg, run_folder(cfg, "segmenter"), argv)
    pretrain(cfg)


def show_command(argv):
    show(configure(ShowConfig, None, argv, positional="clip"))


@data.one_line_errors
def main(argv=None):
    commands = {"pretrain": pretrain_command, "show": show_command, "table": table, "compare": compare}
    data.dispatch("trajtok.py", __doc__, commands, argv)


if __name__ == "__main__":
    main()
