"""TrajTok, the trajectory tokenizer: segmenter + encoder; its sizes, weights and long video; training runs.

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

The second half is what all training scripts share: devices, processes, checkpoints, the log, pictures; and
the four commands.
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from einops import rearrange
from safetensors.torch import load_file, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from data import BadInput, configure, film, paint, palette, replacing, write_json, write_png
from encoder import Tokens, TrajectoryEncoder, TrajectoryPath, soft_sums
from segmenter import (ConvNeXt, Segmenter, assign, hungarian, labels_on_grid, normalise, segmentation_loss,
                       tube_overlaps, video_metrics)

# -----------------------------------------------------------------------------------------------------------
# The tokenizer
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Variants:
    """What can be switched on or off in the tokenizer: fields of TrajTokConfig and flags of train_clip.py."""
    places: bool = False            # ours: points say where and when they are
    path: bool = False              # ours: tokens know how their trajectory moved
    position_scale: float = 1.0     # factor of the codes of places, or of a grid's first positions
    detach: bool = True             # ablation: --no-detach, the Perceiver's gradient reaches the features
    hierarchical: bool = True       # ablation: --no-hierarchical, the finest map alone
    hard_mask: bool = True          # ablation: --no-hard-mask, tokens read all points instead of their own
    mean_start: bool = True         # ablation: --no-mean-start, tokens start at learned codes, without z_init


@dataclass(frozen=True)
class TrajTokConfig(Variants):
    """The one configuration of segmenter and encoder; the default sizes are the paper's. image_size and
    frames are what the tokenizer is trained on: it also takes clips of other lengths, and of other sizes that
    are multiples of 32."""
    image_size: int = 224
    frames: int = 16
    dim: int = 512                  # d: width of features, queries and tokens inside
    num_queries: int = 128          # K: the most trajectories that a clip can have
    depth: int = 2                  # layers of each Perceiver
    heads: int = 8
    depths: tuple = (3, 3, 9, 3)    # ConvNeXt-Tiny
    dims: tuple = (96, 192, 384, 768)
    max_tokens: int = 4             # the most tokens of a trajectory, a power of two
    out_dim: int = 512              # d': width of the tokens that come out
    scale: float = 10.0             # of the mask logits at the start; it is learned, and at most 20
    recompute: bool = False         # less memory, more time: keep few activations, compute the others again
    # what the authors' checkpoints were trained with; load_official turns it on
    normed_residual: bool = False   # latents = norm(latents) + attention, instead of latents + attention
    norm_media: bool = False        # each layer normalises the points once more
    last_points: int = 0            # how many points, the last ones of a clip, every token reads

    @property
    def choices(self):
        """How many tokens a trajectory may have: 1, 2, 4, ... max_tokens."""
        return [2 ** i for i in range(self.max_tokens.bit_length())]


# nano trains in minutes on two cores and tiny in hours; base and large need a GPU of 80 GB. base and large
# have the default sizes above and differ only in the width of their tokens, which is that of the transformer
# behind them. The numbers at the right are parameters of segmenter and encoder; a test counts them.
NANO_NET = dict(depths=(1, 1, 2, 1), dims=(32, 64, 128, 256))
TINY_NET = dict(depths=(2, 2, 4, 2), dims=(48, 96, 192, 384))
SIZES = {
    "nano":  TrajTokConfig(64, 8, dim=96, num_queries=24, depth=1, heads=4, out_dim=128, **NANO_NET),  # 1.4 M
    "tiny":  TrajTokConfig(128, 8, dim=256, num_queries=32, out_dim=256, **TINY_NET),            # 8.8 M
    "base":  TrajTokConfig(out_dim=768, recompute=True),        # 46.2 M
    "large": TrajTokConfig(out_dim=1024, recompute=True),       # 46.4 M: the paper's 46 M
}


# stands in Segmentation.ids for a point that every token may read (cfg.last_points)
EVERYONE = -2


class TrajTok(nn.Module):
    """The tokenizer: video uint8 (b, t, H, W, 3) -> Tokens, Segmentation.

    size: a name from SIZES or a TrajTokConfig.
    backbone: a module of your own instead of the ConvNeXt, with `.dims`, the channels of its maps, and
    forward(x (b, 3, H, W)) -> maps (b, c, h, w), finest first.

    A loss on the tokens trains the masks too: its gradient reaches the masks through z_init, the mean of the
    features under the soft masks, and the features through z_init and through the attention."""

    def __init__(self, size="nano", backbone=None):
        super().__init__()
        self.cfg = SIZES[size] if isinstance(size, str) else size
        self.segmenter = Segmenter(self.cfg, backbone)
        self.encoder = TrajectoryEncoder(self.cfg)

    def forward(self, video, tokens_per_trajectory=None):
        """tokens_per_trajectory m: 1, 2 or 4. None: drawn at random in training (PAPER, after Matryoshka
        representations, arXiv 2205.13147), else 1.

        -> Tokens (encoder.py), Segmentation (segmenter.py)."""
        m = tokens_per_trajectory
        # numpy's generator: whoever wants to repeat the draws passes m, as train_clip.py does
        if m is None:
            m = int(np.random.choice(self.cfg.choices)) if self.training else 1
        seg = self.segmenter(video)
        return self.encoder(seg.features, seg, m), seg

    @torch.no_grad()
    def stream(self, frames, tokens_per_trajectory=1, chunk=8, each=None):
        """The tokens of one video of any length, as forward would give them, in constant memory -> Tokens
        with b = 1.

        frames: uint8 (t, H, W, 3), which is cut into chunks of `chunk` frames; or a function that returns,
        each time it is called, a new iterator over such chunks (a decoder). each(number of the first frame,
        chunk (1, t, H, W, 3), its Segmentation) is called once for each chunk.

        The features of a long video do not fit in memory. So the video is decoded, and its features are
        computed, again whenever all of them are needed: once for each layer of each Perceiver, and once for
        z_init. Before that it is decoded once to count the frames."""
        segmenter, encoder, m = self.segmenter, self.encoder, tokens_per_trajectory
        device = segmenter.latents.device
        length = sum(video.shape[1] for _, video in chunks_of(frames, chunk))
        assert length, "an empty video: there is no frame to make tokens of"

        # from here on, this is Segmenter.segment and TrajectoryEncoder.forward, a chunk at a time
        def read(queries=None):
            """Decode the video from its beginning; for each chunk yield the number of its first frame, the
            chunk, F (1, n, d) and its Segmentation. Without queries there is no Segmentation yet (None); with
            them, F includes the codes of places."""
            for first, video in chunks_of(frames, chunk):
                points, grid = segmenter.extract(normalise(video.to(device)))
                seg = None
                if queries is not None:
                    seg = assign(segmenter.mask_logits(queries, points), grid, points)
                    points = encoder.add_places(points, grid, first, length)
                    # the last cfg.last_points points of the video, which are all in the last chunk
                    if first + video.shape[1] == length:
                        seg.ids[:, points.shape[1] - self.cfg.last_points:] = EVERYONE
                yield first, video, points, seg

        # the K queries have read the whole video before the first point is given to one of them
        queries = perceive_chunks(segmenter.perceiver, segmenter.latents[None], read)
        # z_init is a mean over all points: its numerator and denominator are summed over the chunks
        total, weight = 0, 0
        alive = False
        path = []
        for first, video, points, seg in read(queries):
            soft = seg.logits.softmax(-1)                       # over the queries
            part, share = soft_sums(soft, points)
            total += part
            weight += share
            alive |= seg.alive
            path.append(TrajectoryPath.sums(soft, seg.grid))
            if each:
                each(first, video, seg)
        latents = encoder.start(total, weight, torch.cat(path, 1), m)
        # under the hard mask a token reads the tokens and the points of its own trajectory
        trajectory = torch.arange(self.cfg.num_queries, device=device).repeat_interleave(m)
        owner = trajectory if self.cfg.hard_mask else None
        z = perceive_chunks(encoder.perceiver, latents, lambda: read(queries), owner)
        return encoder.finish(z, alive)

    @torch.no_grad()
    def windows(self, frames, window=8, tokens_per_trajectory=1, each=None):
        """A video as separate clips of `window` frames, each with trajectories of its own: K·m tokens for
        each window. frames, each: as for stream; a chunk is a window. -> Tokens, b = 1. Trajectory k of
        window i has the number i·K + k, as query k stands for another thing in every window."""
        parts = []
        for first, video in chunks_of(frames, window):
            tokens, seg = self(video.to(self.segmenter.latents.device), tokens_per_trajectory)
            offset = len(parts) * self.cfg.num_queries
            parts.append(tokens._replace(trajectory=tokens.trajectory + offset))
            if each:
                each(first, video, seg)
        # z, mask and trajectory: for each field, the windows one after the other
        return Tokens(*(torch.cat(field, 1) for field in zip(*parts)))

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which from_pretrained reads."""
        write_json(Path(folder) / "config.json", {"trajtok": dataclasses.asdict(self.cfg)})
        write_weights(Path(folder) / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, folder):
        """A folder that save_pretrained, `pretrain` or train_clip.py wrote -> its tokenizer, in eval mode."""
        try:
            cfg = TrajTokConfig(**read_json(Path(folder) / "config.json")["trajtok"])
        except (KeyError, TypeError):                           # no such entry, or unknown fields in it
            raise BadInput(f"{folder}: its config.json describes no trajectory tokenizer") from None
        return load_weights(cls(cfg), folder, "video.tokenizer.").eval()

    @classmethod
    def load_official(cls, path, mean_start=True):
        """The tokenizer of a checkpoint that the authors released, .pth or safetensors, e.g. TrajViT2's, in
        eval mode. Its configuration is read off names and shapes. mean_start: was it trained with z_init
        added to the codes? The weights do not tell."""
        cfg, weights = read_official(path)
        if "encoder.latents" not in weights:
            raise BadInput(f"{path}: holds no encoder, perhaps a segmenter alone; give TrajViT2's file")
        cfg = dataclasses.replace(cfg, max_tokens=weights["encoder.latents"].shape[1], mean_start=mean_start,
                                  out_dim=len(weights["encoder.output_projector.weight"]))
        return fit_weights(cls(cfg), weights, path).eval()


# -----------------------------------------------------------------------------------------------------------
# Long video: a Perceiver that reads its points a chunk at a time
# -----------------------------------------------------------------------------------------------------------

def perceive_chunks(perceiver, latents, read, owner=None):
    """Perceiver.forward on points that come in chunks: latents (1, s, d) -> (1, s, d).

    read() is called once for each layer and returns a new iterator over (number of the first frame, chunk,
    points (1, n, d), their Segmentation). owner (s,): the trajectory of each latent, under the hard mask;
    None: no mask.

    This is the exact softmax over all points, computed as in flash attention (arXiv 2205.14135). For scores
    s_j and values v_j, of the latents themselves and of all points so far,

      y = sum_j exp(s_j - N) v_j,   N = log sum_j exp(s_j)

    A new chunk makes N larger. The sum so far is then multiplied by exp(old N - new N)."""
    for attention, mlp in perceiver.layers:
        x = perceiver.norm_lat(latents)
        # log_sum is N, -inf for a sum of nothing
        y, log_sum = 0, torch.tensor(-math.inf, device=x.device)
        # latents have the positions 0 .. s-1, so the first point of the video has position s
        position = x.shape[1]
        for first, _, points, seg in read():
            parts = attention.project(x, perceiver.norm_ctx(points), position)
            q, k_own, v_own, k, v = (part.transpose(1, 2).float() for part in parts)
            q = q / math.sqrt(q.shape[-1])
            s_own, s = q @ k_own.mT, q @ k.mT                   # (1, a, s, s), (1, a, s, n)
            if owner is not None:                               # masked_fill: True = may not be read
                s_own = s_own.masked_fill(owner[:, None] != owner, -math.inf)
                s = s.masked_fill((owner[:, None] != seg.ids) & (seg.ids != EVERYONE), -math.inf)
            # project returns the latents' own keys with every chunk, but they count once: in the first
            if first == 0:
                s, v = torch.cat((s_own, s), 3), torch.cat((v_own, v), 2)
            # softmax over the keys, so N is that of each latent and head, (1, a, s, 1)
            larger = torch.logaddexp(log_sum, s.logsumexp(-1, keepdim=True))
            y = y * (log_sum - larger).exp() + (s - larger).exp() @ v
            log_sum = larger
            position += points.shape[1]
        y = rearrange(y, "b a s c -> b s (a c)").to(latents.dtype)
        latents = attention.to_out(y) + (x if perceiver.normed_residual else latents)
        latents = latents + mlp(latents)
    return latents


def chunks_of(frames, length):
    """uint8 (t, H, W, 3), which is cut into chunks of `length` frames, or a function that returns an iterator
    over chunks -> an iterator over (number of the first frame, chunk uint8 (1, t, H, W, 3))."""
    first = 0
    for chunk in frames() if callable(frames) else torch.as_tensor(frames).split(length):
        yield first, torch.as_tensor(chunk)[None]
        first += len(chunk)


# -----------------------------------------------------------------------------------------------------------
# Weights: our own folders, and what others published
# -----------------------------------------------------------------------------------------------------------

def load_weights(module, folder, *prefixes):
    """Load folder/model.safetensors into module, strictly -> module. A file that train_clip.py wrote holds
    the tokenizer among other weights, one that `pretrain` wrote holds it alone. Weights are taken under
    the first prefix that occurs; all of them, if none does."""
    path = Path(folder) / "model.safetensors"
    weights = read_weights(path)
    parts = [under(weights, prefix) for prefix in (*prefixes, "")]
    return fit_weights(module, next(part for part in parts if part), path)


def write_weights(path, state):
    """Write a state dict to a .safetensors file."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replacing(path) as beside:
        beside.write_bytes(save(state))


# A pickle could run code, so torch.load refuses every class that is not allowed by name. The original
# VideoMAE release keeps its command line, an argparse.Namespace, beside the weights.
torch.serialization.add_safe_globals([argparse.Namespace])


def read_weights(path, wrappings=("model", "state_dict")):
    """Weights that somebody wrote -> {name: tensor} on the CPU.

    path: a .safetensors file; a torch checkpoint (.pth, .pt, .bin), of which only tensors are loaded, no
    code; or a folder as a model hub serves it, in which a large model has several of these files.
    wrappings: keys under which a checkpoint may hold its weights, {"model": {...}, "epoch": 3}; they are
    taken off, as is the `module.` that DistributedDataParallel puts before each name."""
    path = Path(path)
    files, weights = [path], {}
    if path.is_dir():
        files = [*path.glob("model*.safetensors")] or [*path.glob("pytorch_model*.bin")]
    try:
        for file in files:
            if file.suffix == ".safetensors":
                weights |= load_file(file)
            else:
                weights |= torch.load(file, map_location="cpu", weights_only=True)
    # the two readers raise exceptions of many types on a file that they cannot read
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{file}: no whole file of weights ({reason}); check the path") from None
    # twice, because one wrapping may stand inside another, in either order
    for name in (*wrappings, *wrappings):
        weights = weights[name] if isinstance(weights.get(name), dict) else weights
    weights = {str(name).removeprefix("module."): x for name, x in weights.items() if torch.is_tensor(x)}
    if not weights:
        raise BadInput(f"{path}: holds no weights, e.g. model.safetensors; let the run save them first")
    return weights


def fit_weights(module, weights, where):
    """Load weights into module -> module. A missing, an unexpected or a wrongly shaped tensor is refused:
    otherwise half of a model could stay random and nobody would notice."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{where}: weights of another model or size: {' '.join(str(error).split())}") from None
    return module


def under(weights, prefix):
    """The weights whose names begin with prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def rename(weights, rules):
    """Rename keys. rules: pairs of a regular expression for a whole key and its replacement, applied one
    after the other; the replacement "" drops the key."""
    for pattern, replacement in rules:
        whole = re.compile(f"^(?:{pattern})$")
        weights = {whole.sub(replacement, key): value for key, value in weights.items()}
    weights.pop("", None)
    return weights


def count_layers(weights, pattern):
    """How many layers a checkpoint has: how many different numbers group 1 of the pattern matches in its
    keys."""
    found = [re.match(pattern, key) for key in weights]
    return len({one[1] for one in found if one})


# ConvNeXt (arXiv 2201.03545) is published in four layouts, the original's, timm's and two of the hub
# (ConvNext and DINOv3): the same tensors under other names. These rules turn each into the original's.
CONVNEXT_NAMES = [
    # a ConvNeXt inside a classifier, or inside another model, has some of these before each name
    (r"(?:(?:convnext|backbone|model|encoder)\.)+(.+)", r"\1"),
    (r"(?:stem\.0|embeddings\.patch_embeddings)\.(.+)", r"downsample_layers.0.0.\1"),
    (r"(?:stem\.1|embeddings\.layernorm)\.(.+)", r"downsample_layers.0.1.\1"),
    (r"stages\.(\d)\.downsampl\w+\.(.+)", r"downsample_layers.\1.\2"),
    (r"(stages\.\d)\.(?:blocks|layers)\.(.+)", r"\1.\2"),
    (r"(.+)\.(?:conv_dw|depthwise_conv)\.(.+)", r"\1.dwconv.\2"),
    (r"(.+)\.(?:mlp\.fc|pointwise_conv)([12])\.(.+)", r"\1.pwconv\2.\3"),
    (r"(.+)\.layer_scale_parameter", r"\1.gamma"),
    (r"(.*)(?:head\.norm|layernorm|layer_norm)\.(.+)", r"\1norm.\2"),
    # dropped: the classifier, and the second copy of the last norm in DINOv3's original layout
    (r"(?:head|classifier|norms)\..+", ""),
]


def load_convnext(path):
    """A published ConvNeXt, from the original's file, DINOv3's, timm's, or a hub folder."""
    weights, depths, dims = convnext_names(read_weights(path), path)
    return fit_weights(ConvNeXt(depths, dims), weights, path)


def convnext_names(weights, where):
    """Weights in any published layout -> weights under our names, depths, dims. The latter two are read off
    names and shapes."""
    weights = rename(weights, CONVNEXT_NAMES)
    depths = tuple(count_layers(weights, rf"stages\.{i}\.(\d+)\.") for i in range(4))
    if 0 in depths:
        raise BadInput(f"{where}: no ConvNeXt in a layout that is known; it holds {list(weights)[:4]}")
    dims = tuple(len(weights[f"stages.{i}.0.norm.weight"]) for i in range(4))
    return weights, depths, dims


# The authors' names -> ours; the backbone has its own rules. Their rotary frequencies are dropped, as
# `rotate` computes them. The release's low-resolution heads make the masks that the tokens are built on.
# Its high-resolution heads, at the frame's resolution, are used only to train the segmenter, and are dropped.
OFFICIAL_NAMES = [
    (r"segmenter\.patch_encoder\.backbone\..+|.+_high_res\..+|.+\.freqs", ""),
    (r"segmenter\.patch_encoder\.(.+)", r"segmenter.\1"),
    (r"segmenter\.trajectory_perceiver\.latents", "segmenter.latents"),
    (r"segmenter\.trajectory_perceiver\.(.+)", r"segmenter.perceiver.\1"),
    (r"(.+)_low_res\.(.+)", r"\1.\2"),
    (r"traj_feature_updater\.(.+)", r"perceiver.\1"),
    (r"((?!segmenter\.).+)", r"encoder.\1"),
]


def read_official(path):
    """A checkpoint that the authors released, of TrajViT2 or of the segmenter alone -> TrajTokConfig read off
    names and shapes, and the weights under the names of TrajTok. Both Perceivers of the release have the same
    depth and number of heads."""
    weights = read_weights(path)
    mark = "trajectory_perceiver.latents"
    prefixes = [name.removesuffix(mark) for name in weights if name.endswith(mark)]
    if not prefixes:
        raise BadInput(f"{path}: not in the authors' layout, which has {mark}; our folders: from_pretrained")
    segmenter = under(weights, prefixes[0])
    backbone, depths, dims = convnext_names(under(segmenter, "patch_encoder.backbone."), path)
    queries, dim = segmenter[mark].shape
    # only the stored rotary frequencies tell the heads: there is one for every four channels of a head
    heads = dim // (4 * len(segmenter["trajectory_perceiver.layers.0.0.rotary_emb.freqs"]))
    depth = count_layers(segmenter, r"trajectory_perceiver\.layers\.(\d+)\.")
    cfg = TrajTokConfig(dim=dim, num_queries=queries, depth=depth, heads=heads, depths=depths, dims=dims,
                        frames=8, normed_residual=True, norm_media=True, last_points=2)
    # the tokenizer stands among other models; a segmenter that is published alone is without `segmenter.`
    weights = under(weights, prefixes[0].removesuffix("segmenter."))
    weights |= {f"segmenter.{name}": value for name, value in segmenter.items()}
    weights = rename(weights, OFFICIAL_NAMES)
    return cfg, weights | {f"segmenter.backbone.{name}": value for name, value in backbone.items()}


def load_segmenter(path):
    """A Segmenter in eval mode, from the folder of a run, or from a checkpoint that the authors released: of
    the segmenter alone or of TrajViT2."""
    if Path(path).is_dir():
        return TrajTok.from_pretrained(path).segmenter
    cfg, weights = read_official(path)
    return fit_weights(Segmenter(cfg), under(weights, "segmenter."), path).eval()


# -----------------------------------------------------------------------------------------------------------
# A run: its flags, device, processes, optimizer
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """The flags of every training. The comments are their --help."""
    size: str = "nano"                  # nano, or a larger one of the script's sizes
    name: str | None = None             # of the run, part of its folder's name; default: the size
    out: str = "out"                    # where runs are kept
    batch: int = 32                     # clips of a step, in each process
    steps: int = 300                    # optimizer steps of the whole training
    lr: float = 1e-3                    # peak learning rate
    warmup: int = 20                    # steps of linear warm-up; then a cosine to 1 %
    weight_decay: float = 0.02          # of matrices alone
    clip: float = 1.0                   # largest gradient norm
    seed: int = 0                       # of weights, data order and augmentation
    save_every: int = 100               # steps between checkpoints
    device: str = "auto"                # cpu, cuda, ...
    workers: int = 0                    # processes that make batches; 0: the training process does
    bf16: bool | None = None            # matrix products in bfloat16; default: on a GPU
    resume: bool = False                # go on with the run of this name
    overwrite: bool = False             # start again over a run of this name

    def __post_init__(self):
        at_least(self, 1, "batch steps save_every")
        at_least(self, 0, "lr warmup weight_decay clip seed workers")


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """The flags of a training on made clips, or on real ones with captions or masks."""
    data: str = "world"                 # `world`, or a manifest, CSV or folder; several with commas
    mix: str | None = None              # shares of several sets, with commas: 0.5,0.5; default: equal
    val: str | None = None              # a manifest of held-out clips; default: a part of --data
    image_size: int | None = None       # pixels of a side, a multiple of 32; default: the size's
    frames: int | None = None           # frames of a clip; default: the size's
    stride: int = 8                     # frames are 1 .. stride apart (drawn); 0: spread over the video
    world: str = "full"                 # made clips: full, or stage (plain; captions tell shape and motion)
    max_objects: int = 8                # of a made clip of the full world: 1 .. 8
    shared_colours: bool = True         # may two objects of a made clip have the same colour?
    augment: bool = False               # real clips: a random crop, flip and colours, the same in all frames
    eval_clips: int = 256               # held-out made clips, all captions distinct

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "image_size frames max_objects eval_clips")
        at_least(self, 0, "stride")


def at_least(cfg, least, names):
    """Refuse flags that are below `least`, infinite or NaN; None is allowed. names: "batch steps ..."."""
    for name in names.split():
        value = getattr(cfg, name)
        # every comparison with NaN is False
        if not (value is None or least <= value < math.inf):
            raise BadInput(f"--{name.replace('_', '-')} {value}: give a number from {least} on")


def sized(cfg, shape):
    """--image-size, --frames and --num-queries are None where the size decides. -> The size's TrajTokConfig
    `shape`, changed by those that were given, and the flags cfg, in which these three are filled in."""
    names = ("image_size", "frames", "num_queries")
    # the stage is small enough for minutes: its clips hold two things at most
    if cfg.data == "world" and cfg.world == "stage":
        shape = dataclasses.replace(shape, image_size=32, frames=8, num_queries=8)
    chosen = {name: getattr(cfg, name) or getattr(shape, name) for name in names}
    if chosen["image_size"] % 32:
        raise BadInput(f"--image-size {cfg.image_size}: give a multiple of 32, e.g. 224")
    return dataclasses.replace(shape, **chosen), dataclasses.replace(cfg, **chosen)


def setup(cfg):
    """-> torch.device. Initialise torch.distributed if torchrun launched us. torch is seeded, so that all
    processes start with the same weights."""
    device = choose_device(cfg.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # the others wait while the first process evaluates; torch's time-out of ten minutes is too short
        dist.init_process_group(timeout=datetime.timedelta(hours=1))
        if dist.get_rank():
            # only the first process prints; stderr stays open in all, so no error is lost
            sys.stdout = open(os.devnull, "w")
    torch.manual_seed(cfg.seed)
    return device


def choose_device(name):
    """--device -> torch.device. Under torchrun each process takes its own GPU; on a CPU the C library is told
    how to keep memory."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep freed memory of tensors up to 64 MiB. By default the C library maps every large tensor from the
        # system and gives it back, page by page, at each step; a nano step on two cores then takes twice as
        # long. Tensors above 64 MiB would leave holes in the memory that is kept.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # large tensors start at a page: fewer holes
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 26)                               # M_MMAP_THRESHOLD: below 64 MiB, use the heap
        libc.mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: never shrink the heap
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            # matrix products that stay in float32 may use TF32, which is several times faster
            torch.set_float32_matmul_precision("high")
        # a device that does not work fails here, and not after the data is read
        return torch.zeros(1, device=name).device
    # a build of torch without GPU support raises the latter two
    except (RuntimeError, AssertionError, AttributeError):
        raise BadInput(f"--device {name}: not available here; give cpu, or leave it out") from None


def launch(cfg):
    """Start train_clip.py or train_vlm.py again as several processes under torchrun: --processes, or one for
    each GPU. Returns if one process is enough, and in the processes that torchrun started; else execvp
    replaces this process and never returns."""
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    processes = cfg.processes or gpus
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(data.cores() // processes, 1)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        os.execvp(sys.executable, [*torchrun, f"--nproc-per-node={processes}", *sys.argv])


def ranks():
    """-> the rank of this process, and how many processes train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(values, device):
    """A list of this process's numbers -> their means over all processes."""
    means = torch.tensor(values, device=device) / ranks()[1]
    if dist.is_initialized():
        dist.all_reduce(means)
    return means.tolist()


def gather(x):
    """Rows of this process (n, ...) -> those of all processes, in their order (n · processes, ...).
    all_gather carries no gradient, so our own rows are put back. That is enough: every process computes the
    same loss from all rows, so each gets the whole gradient of its own rows, and sum_gradients adds up these
    parts."""
    rank, processes = ranks()
    rows = [torch.empty_like(x) for _ in range(processes)]
    if processes > 1:
        dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


def sum_gradients(parameters):
    """p.grad becomes its sum over all processes. CHOICE: after the backward pass instead of
    DistributedDataParallel, which must know beforehand which parameters a step uses. Here that can
    change: with --no-mean-start no loss reaches the queries in a batch without labels."""
    if dist.is_initialized():
        for p in parameters:
            # all processes have to call all_reduce for the same parameters, or they wait for each other
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def precision(device, bf16=None):
    """Autocast to bfloat16, by default on a GPU. Most CPUs emulate bfloat16 slowly: they stay with
    float32."""
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
    """AdamW. Weight decay is for matrices alone: norms, biases and scales that were pulled towards 0 would
    silence the layers behind them.

    scales {prefix: factor}: parameters whose names begin with the prefix learn `factor` times as fast. AdamW
    ignores group["scale"]: a loop that gives scales multiplies the learning rate of each group by it."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            fitting = [factor for prefix, factor in (scales or {}).items() if name.startswith(prefix)]
            scale = fitting[0] if fitting else 1.0
            decay = cfg.weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(p)
    groups = [dict(params=ps, scale=scale, weight_decay=decay) for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=p.is_cuda)


def check_finite(terms, step):
    """Refuse a loss or gradient that is NaN or infinite. Called before the optimizer's step: one such step
    makes all weights NaN, and they would be saved."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise BadInput(f"step {step}: {name} is {value}; train again with a lower --lr")


def peak_memory_gb(device):
    """Peak memory: allocated on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20     # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def count_gflops(run):
    """GFLOPs of run(): matrix products, convolutions and attention, 2 per multiply-add. Not to be called
    under no_grad, where torch's counter fails."""
    # the kernels of attention that the counter knows: one on a GPU; on a CPU, two matrix products
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(kernels):
        run()
    return counter.get_total_flops() / 1e9


# -----------------------------------------------------------------------------------------------------------
# A run: its folder, checkpoint and log
# -----------------------------------------------------------------------------------------------------------

def run_folder(cfg, script, suffix=""):
    """out/<script>-<name>. Without --name, the name is the size and `suffix`: out/clip-nano-vit3d."""
    return Path(cfg.out) / f"{script}-{cfg.name or cfg.size + suffix}"


def resumed(cfg, folder, argv):
    """With --resume or --eval-only -> the saved configuration, changed by the flags in argv. Flags win over
    saved values, and these over the defaults of the size."""
    saved = read_json(folder / "config.json")
    if "size" not in saved:
        raise BadInput(f"{folder}: its config.json is not that of a run; give the folder of a training")
    names = {field.name for field in dataclasses.fields(cfg)} - {"resume", "overwrite", "eval_only"}
    known = {name: saved[name] for name in names if name in saved}
    return configure(type(cfg), {saved["size"]: known}, ["--size", saved["size"], *argv])


def open_run(folder, cfg, **more):
    """Make the folder of a run and write its config.json: the configuration and `more`. A folder that holds a
    run already is refused without --resume or --overwrite. more["manifest"] is data.fingerprint of the data:
    a resumed run on other data would not continue the old one, and is refused."""
    config = folder / "config.json"
    if ranks()[0]:
        return
    if cfg.overwrite:
        # otherwise the new run would go on from the old state
        for name in ("config.json", "state.pt", "log.jsonl", "result.json", "model.safetensors"):
            (folder / name).unlink(missing_ok=True)
    if config.exists() and not cfg.resume:
        raise BadInput(f"{folder}: holds a run; give --resume to go on, --overwrite, or another --name")
    if config.exists() and read_json(config).get("manifest") != more.get("manifest"):
        raise BadInput(f"--resume: {cfg.data} has changed since {folder} began; train under another --name")
    write_json(config, dataclasses.asdict(cfg) | more | dict(world_size=ranks()[1]))


def save_checkpoint(folder, weights, moments, step):
    """The state dicts of model and optimizer -> state.pt, the state before step number `step`, for --resume,
    and model.safetensors, the weights, for all other uses.

    All that is random in a run is drawn from the seed and the step. So model, optimizer and step are the
    whole state, as long as the number of processes and the batch stay the same (which nobody checks).
    Files are written under another name and renamed: a kill leaves the old checkpoint or the new one, never
    half of one."""
    if ranks()[0]:
        return
    state = dict(model=weights, optimizer=moments, step=step)
    try:
        with replacing(folder / "state.pt") as beside:
            torch.save(state, beside)
        write_weights(folder / "model.safetensors", weights)
    except RuntimeError as error:                               # what torch.save raises on a full disk
        raise BadInput(f"{folder}: the checkpoint cannot be written ({error}); make room") from None


def read_state(path, mmap=False):
    """What save_checkpoint has written to state.pt."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # torch.load raises exceptions of many types on a damaged file
    except Exception as error:
        raise BadInput(f"{path}: no whole checkpoint ({type(error).__name__}); give --overwrite") from None


def load_checkpoint(folder, model, optimizer):
    """Load the last checkpoint of a run into model and optimizer -> the step to go on with, 0 if nothing was
    saved."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = read_state(path)
    fit_weights(model, state["model"], path)
    # AdamW's moments are the saved run's; settings, e.g. --weight-decay, are those of the flags given now
    saved, now = state["optimizer"], optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in now]:
        raise BadInput(f"{path}: is of a run that trained other parameters; leave --freeze-... as they were")
    optimizer.load_state_dict(dict(state=saved["state"], param_groups=now))
    return state["step"]


class Log:
    """log.jsonl, a line of JSON for each step; log(step=3, focal=0.2, ...) appends one. Lines from step
    `first` on, which a resumed run writes again, are cut off; first = None leaves the file as it is."""

    def __init__(self, folder, first=None):
        self.path = folder / "log.jsonl"
        if first is not None and not ranks()[0]:
            kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] < first]
            with replacing(self.path) as beside:
                beside.write_text("".join(kept))

    def __call__(self, **line):
        # the first process writes for all
        if not ranks()[0]:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def lines(self):
        """All lines so far -> list of dicts."""
        text = self.path.read_text() if self.path.exists() else ""
        # a kill may leave half a line at the end
        whole = text[:text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]


# -----------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------

# Letters of five rows and three columns. Each octal digit is a row: 4 is its left pixel, 2 the middle, 1 the
# right one, added up.
GLYPHS = dict(zip("0123456789abcdefghijklmnopqrstuvwxyz.-%/:+=,()> ", (
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 25755 65656 34443 65556 74647 74644 34553 "
    "55755 72227 11153 55655 44447 57755 65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 "
    "55222 71247 00002 00700 51245 11244 02020 02720 07070 00024 12221 42224 42124 00000").split()))


def write_text(image, text, top, left, scale=2):
    """Write text into image uint8 (H, W, 3), in place, in dark grey capitals 5 · scale pixels high. What
    would lie outside of the image is cut off. With this, pictures need no font and no plotting library."""
    for letter in text.lower():
        rows = np.array([*GLYPHS.get(letter, "00700")], int)    # a dash for an unknown letter
        ink = rows[:, None] & (4, 2, 1) > 0                     # (5, 3)
        ink = ink.repeat(scale, 0).repeat(scale, 1)
        box = image[top:top + 5 * scale, left:left + 3 * scale]
        box[ink[:len(box), :box.shape[1]]] = 40
        left += 4 * scale


def filmstrip(video, rows, count=4):
    """`count` frames of video (t, H, W, 3) in a row, and below them the same frames painted by each of rows
    {name: ids (t, H, W), -1 = none}, with the names at the left -> image. Ids are arbitrary, so the
    trajectories of each row are matched with those of the last row, and partners get the same colour."""
    some = np.linspace(0, len(video) - 1, count).round().astype(int)
    truth = list(rows.values())[-1]
    shown = {"frames": video[some]}
    for name, ids in rows.items():
        # + 1: tube_overlaps counts ids from 0 on, and -1 has to be one of them
        inter, union = tube_overlaps(torch.from_numpy(ids + 1), torch.from_numpy(truth + 1))
        # hungarian finds the cheapest pairs, so the cost is minus the IoU
        labels, tubes = hungarian(-(inter / union.clamp(min=1)).numpy())
        # a colour for each label of the last row, then a colour for each tube of this row, which it keeps if
        # it has no partner
        colours = palette(sum(inter.shape))
        mine = colours[len(inter):]
        mine[tubes] = colours[labels]
        # mine begins with the colour of id -1. As an index, -1 is the last place: roll moves its colour there
        shown[name] = paint(video, ids, np.roll(mine, -1, 0))[some]
    return captioned(shown, 2)


def captioned(rows, scale):
    """rows {name: frames uint8 (t, H, W, 3)} -> image: each row of frames, enlarged `scale` times, with its
    name at the left and white gaps."""
    lines = []
    for name, images in rows.items():
        large = images.repeat(scale, 1).repeat(scale, 2)
        large = np.pad(large, ((0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
        margin = np.full((large.shape[1], 80, 3), 255, np.uint8)
        write_text(margin, name, len(margin) // 2 - 5, 4)
        lines.append(np.concatenate((margin, *large), 1))
    return np.concatenate(lines)


def plot(path, panels, x="step"):
    """panels {title: {line's name: [(x, y), ...]}} -> an SVG file, one panel below the other.
    x: the name of the horizontal axis.

    SVG is text: it needs no plotting library and is sharp at any size. In SVG y grows downwards: the axes of
    a panel run from (70, 250) at the lower left to (370, 30) at the upper right."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="480" height="{300 * len(panels)}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for i, (title, lines) in enumerate(panels.items()):
        corners = np.concatenate(list(lines.values()))          # (points, 2): x, y
        low, span = corners.min(0), np.maximum(np.ptp(corners, 0), 1e-9)
        parts.append(f'<g transform="translate(0 {300 * i})"><text x="70" y="20">{title}</text>')
        parts.append(f'<text x="220" y="290" text-anchor="middle">{x}</text>')
        # five grid lines each way, with the values that they stand for
        for share in np.linspace(0, 1, 5):
            right, up = 70 + 300 * share, 250 - 220 * share
            tick = low + share * span
            parts.append(f'<path d="M70 {up}H370M{right} 250V255" stroke="#ddd"/>')
            parts.append(f'<text x="64" y="{up + 4}" text-anchor="end">{tick[1]:.3g}</text>')
            parts.append(f'<text x="{right}" y="269" text-anchor="middle">{tick[0]:.4g}</text>')
        for j, (name, line) in enumerate(lines.items()):
            colour = "rgb({},{},{})".format(*palette(j + 1)[j])
            pixels = (np.array(line) - low) / span * (300, -220) + (70, 250)
            pixels = " ".join(f"{right:.1f},{up:.1f}" for right, up in pixels)
            parts.append(f'<polyline points="{pixels}" fill="none" stroke="{colour}"/>')
            parts.append(f'<text x="378" y="{44 + 16 * j}" fill="{colour}">{name}</text>')
        parts.append("</g>")
    with replacing(path) as beside:
        beside.write_text("\n".join([*parts, "</svg>"]))


def aligned(lines):
    """Lines of cells -> lines of text, in which the first column is aligned at the left, the others at the
    right."""
    columns = []
    for column in zip(*lines):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in column])
    return ["  ".join(cells) for cells in zip(*columns)]


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py pretrain
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Trains the segmenter alone: focal + 2 dice on trajectory labels. The data must have masks."""
    init: str | None = None             # start from the segmenter of this run of `pretrain` or train_clip.py
    num_queries: int | None = None      # K, trajectories at most; default: the size's
    eval_clips: int = 64                # held-out made clips


# CHOICE, nano only: clips have at most four objects, no two of one colour. At 64 px, each of eight objects
# would be a few points only; and in minutes of training the segmenter learns to tell things apart by colour,
# not yet by place.
NANO_CLIPS = dict(max_objects=4, shared_colours=False)
PRETRAIN_SIZES = dict.fromkeys(SIZES, {}) | {"nano": NANO_CLIPS}


def pretrain(cfg):
    """Train the segmenter alone -> the folder of the run. TrajTok.from_pretrained reads it, but the encoder
    in it has random weights. PAPER: TrajAdapter and TrajVLM start from such a segmenter; TrajViT2 trains its
    segmenter together with the task (train_clip.py). Under torchrun, several processes share each step."""
    shape, cfg = sized(cfg, SIZES[cfg.size])
    device = setup(cfg)
    rank, processes = ranks()
    train_set, held_out = data.open_data(cfg, "mask", processes)
    folder = run_folder(cfg, "segmenter")
    # a whole tokenizer is saved, so that `show` and train_clip.py can read it
    tokenizer = TrajTok(shape).to(device)
    segmenter = tokenizer.segmenter
    if cfg.init:
        load_weights(segmenter, cfg.init, "video.tokenizer.segmenter.", "segmenter.")
    optimizer = make_optimizer(segmenter, cfg)
    # first the checkpoint: a --resume with flags that do not fit it must not change config.json
    first = load_checkpoint(folder, tokenizer, optimizer) if cfg.resume else 0
    open_run(folder, cfg, trajtok=dataclasses.asdict(shape), manifest=data.fingerprint(cfg.data, cfg.val))
    log, damage = Log(folder, first), data.Damage()
    loader = data.loader(train_set, first, cfg.steps, cfg.workers, rank, processes)
    for step, batch in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        # 1. clips and their labels. A file that could not be used was replaced by another; it is named once
        damage.add(batch["bad"])
        seed = step * processes + rank + cfg.seed * 10 ** 6     # each batch has its own
        batch = data.finish(batch, device, seed if cfg.augment else None)
        video, labels = batch["video"], batch["labels"]
        # 2. the loss, with the weights that the release uses when it trains the segmenter alone
        with precision(device, cfg.bf16):
            seg = segmenter(video)
        # outside autocast: the matching counts points, and bfloat16 counts exactly only up to 256
        focal, dice = segmentation_loss(seg, labels)
        loss = focal + 2 * dice
        # 3. the step
        optimizer.zero_grad()
        (loss / processes).backward()                           # a mean over processes
        sum_gradients(segmenter.parameters())
        norm = nn.utils.clip_grad_norm_(segmenter.parameters(), cfg.clip)
        # `live`: how many trajectories of a clip own a point. If they are few among many queries, the queries
        # have become alike
        live = seg.alive.sum(1).float().mean()
        terms = dict(focal=focal.item(), dice=dice.item(), gradient_norm=norm.item(), live=live.item())
        check_finite(terms, step)
        optimizer.step()
        # 4. the log, with means over processes, and the checkpoint
        terms = dict(zip(terms, mean_over_processes(list(terms.values()), device)))
        log(step=step, **terms, lr=optimizer.param_groups[0]["lr"])
        if step % 10 == 0 or step + 1 == cfg.steps:
            print(f"step {step:5d}/{cfg.steps}", *(f" {key} {x:.3f}" for key, x in terms.items()), flush=True)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(folder, tokenizer.state_dict(), optimizer.state_dict(), step + 1)
    if dist.is_initialized():
        dist.barrier()                                          # the first process has then saved all
    if rank:
        return folder
    result, pictures = evaluate_segmenter(segmenter, held_out, device, cfg.bf16)
    write_json(folder / "result.json", result | dict(seed=cfg.seed, left_out=len(damage)))
    save_pictures(folder, pictures, log, ("focal", "dice"))
    print("\n".join(aligned([[key, f"{value:.3f}"] for key, value in result.items()])))
    print(f"wrote {folder}/: model.safetensors, result.json, trajectories.png, curves.svg")
    return folder


@torch.no_grad()
def evaluate_segmenter(segmenter, batches, device, bf16=None):
    """The scores of score_clip, means over the clips that have labels -> dict, empty if there are none;
    pictures: (video, found ids, true ids) of the first four clips. CHOICE: scores are taken on the
    segmenter's own grid, on which it decides (PAPER: "low-resolution output")."""
    segmenter.eval()
    scores, pictures = {}, []
    for i in range(len(batches)):
        batch = data.finish(batches[i], device)
        video, labels = batch["video"], batch["labels"]
        if not len(video):                                      # no file of this batch can be used
            continue
        with precision(device, bf16):
            seg = segmenter(video)
        # k is a million here, so that every label counts, while training keeps the K largest
        truth = labels_on_grid(labels, seg.grid, 10 ** 6)       # (b, n), as seg.ids
        for ids, true in zip(seg.ids.cpu().split(1), truth.cpu().split(1)):      # (1, n)
            if (true >= 0).any():
                for name, score in score_clip(ids, true, "motion" in batch).items():
                    scores.setdefault(name, []).append(score)
        if not pictures:
            fine = seg.masks(labels.shape[2:])                  # (b, t, H, W)
            pictures = list(zip(*(x[:4].cpu().numpy() for x in (video, fine, labels))))
    # NaN: object_iou of a clip in which only the ground is labelled
    return {name: float(np.nanmean(column)) for name, column in scores.items()}, pictures


def score_clip(ids, labels, made):
    """VEQ, STQ, the best IoU of each labelled object and the number of live trajectories of one clip, ids and
    labels (1, n); for a made clip also how many of these trajectories lie on the ground and how many on
    objects."""
    inter, union = tube_overlaps(ids, labels)                   # (labels, tubes)
    iou = inter / union.clamp(min=1)
    metrics = video_metrics(ids, labels)
    live = len(ids.unique())
    # the ids of the ground come first in made clips, and are no objects
    first = data.MAX_GROUNDS if made else 0
    occurs = inter[first:].any(1)
    best = iou[first:][occurs].double().amax(1)
    scores = dict(object_iou=best.mean().item(), veq=metrics["veq"], stq=metrics["stq"])
    scores |= dict(live_trajectories=live)
    if made:
        # A trajectory with more points on the ground than on objects is the ground's; the others are those of
        # objects
        ground = int((inter[:first].sum(0) > inter[first:].sum(0)).sum())
        scores |= dict(on_ground=ground, on_objects=live - ground)
    return scores


def save_pictures(folder, pictures, log, terms):
    """Draw trajectories.png, clips with their found and true trajectories, and curves.svg, the log's `terms`
    over the steps. pictures: as evaluate_segmenter returns them."""
    if pictures:
        sheets = [filmstrip(video, {"found": found, "true": true}) for video, found, true in pictures]
        write_png(folder / "trajectories.png", np.concatenate(sheets))
    curves, lines = {}, log.lines()
    for term in terms:
        curve = [(line["step"], line[term]) for line in lines if term in line]
        if curve:
            # each term has a panel of its own, and its only line needs no name
            curves[term] = {"": curve}
    plot(folder / "curves.svg", curves)


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py show
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShowConfig:
    """Draws the trajectories of a video and tells how many tokens they make."""
    clip: str = "world"                 # a video or picture file, or `world` for a made clip
    weights: str = "out/clip-nano"      # a run's folder, or a checkpoint that the authors released
    frames: int | None = None           # how many, spread over the clip; 0: all; default: the tokenizer's
    window: int = 0                     # frames of a window with trajectories of its own; 0: one window
    tokens_per_trajectory: int = 1      # 1, 2 or 4
    out: str = "out"                    # folder for <clip>-trajectories.mp4 and .png
    index: int = 0                      # which made clip, with `world`
    stages: bool = False                # walk through the method: <clip>-stages.png (of its start)
    device: str = "auto"                # cpu, cuda, ...

    def __post_init__(self):
        at_least(self, 0, "frames window index")


def open_clip(cfg, shape):
    """The clip of `show` -> frames, as TrajTok.stream takes them, and when they are shown, in seconds (t,).
    Frames are uint8 (t, H, W, 3), or with --frames 0 a function that reads them, since a long video stays on
    disk."""
    size = shape.image_size
    count = shape.frames if cfg.frames is None else cfg.frames
    if cfg.clip == "world":
        world = data.World(size=size, frames=count or shape.frames)
        script = data.script(data.TEST + cfg.index, world)
        video, _ = data.rasterise(data.stack([script]), size)
        return video[0], np.arange(world.frames) / 4            # four frames a second
    if Path(cfg.clip).suffix.lower() in data.IMAGE_SUFFIXES:
        count = 1
    if count > 0:
        return data.decode(cfg.clip, count, size)

    def read():                                                 # a new iterator each time it is called
        chunks = data.read_frames(cfg.clip, size, cfg.window or 8)
        return tqdm(chunks, unit=" chunks", leave=False, disable=None)

    times = data.frame_times(cfg.clip)
    if not len(times):
        raise BadInput(f"{cfg.clip}: has no frames; give another clip")
    return read, times


def show(argv):
    """Draw the trajectories of a clip into a film and a picture, and print how many tokens they make."""
    cfg = configure(ShowConfig, None, argv, positional="clip")
    device = choose_device(cfg.device)
    load = TrajTok.load_official if Path(cfg.weights).is_file() else TrajTok.from_pretrained
    tokenizer = load(cfg.weights).to(device)
    m, size = cfg.tokens_per_trajectory, tokenizer.cfg.image_size
    if m not in tokenizer.cfg.choices:
        raise BadInput(f"--tokens-per-trajectory {m}: one of {tokenizer.cfg.choices}")
    video, times = open_clip(cfg, tokenizer.cfg)
    count = len(times)
    # As fast as in the clip: t frames have t - 1 gaps between them. A single frame is shown for a quarter of
    # a second
    rate = max(count - 1, 1) / (np.ptp(times) or 0.25)
    base = Path(cfg.out) / Path(cfg.clip).stem
    colours = palette(tokenizer.cfg.num_queries)
    # frames of 64 px are too small to look at, so they are enlarged
    scale = max(1, 224 // size)
    # the numbers of the frames for the picture, evenly spaced
    some = np.linspace(0, count - 1, min(8, count)).round()
    kept = []

    def draw(first, video, seg):                                # video (1, t, H, W, 3), from frame `first` on
        ids = seg.masks(video.shape[2:4])[0].cpu().numpy()
        video = video[0].cpu().numpy()
        drawn = np.concatenate((video, paint(video, ids, colours)), 1)       # one above the other
        add(drawn.repeat(scale, 1).repeat(scale, 2))
        kept.extend(drawn[np.isin(first + np.arange(len(video)), some)])

    # make the tokens; `draw` writes the film meanwhile. Without --window, a clip in memory is one window
    with film(f"{base}-trajectories.mp4", rate) as add, precision(device):
        if callable(video) and not cfg.window:
            tokens = tokenizer.stream(video, m, each=draw)
        else:
            tokens = tokenizer.windows(video, cfg.window or count, m, draw)
    frames, found = np.split(np.stack(kept), 2, 1)
    write_png(f"{base}-trajectories.png", captioned({"frames": frames, "found": found}, scale))
    if cfg.stages:
        _, clip = next(chunks_of(video, count))                 # all of it, or the first chunk of a film
        draw_stages(tokenizer, clip.to(device), m, f"{base}-stages.png")
    trajectories = tokens.trajectory[tokens.mask].unique()
    print(f"{cfg.clip}: {count} frames of {size} x {size} px -> {len(trajectories)} trajectories -> "
          f"{int(tokens.mask.sum())} tokens of width {tokens.z.shape[-1]}; {peak_memory_gb(device):.2f} GB")
    print(f"wrote {base}-trajectories.png and {base}-trajectories.mp4")


@torch.no_grad()
def draw_stages(tokenizer, video, m, path):
    """Walk through the method on one clip uint8 (1, t, H, W, 3): print the shape and range of each stage, and
    draw features, the three largest soft masks, hard masks, and the points that the tokens of the second
    largest trajectory read (the largest is mostly the ground)."""
    segmenter, encoder = tokenizer.segmenter, tokenizer.encoder
    # 1. Segmenter.segment and TrajectoryEncoder.forward, line by line
    features, grid = segmenter.extract(normalise(video))
    queries = segmenter.cluster(features)
    seg = assign(segmenter.mask_logits(queries, features), grid, features)
    soft = seg.logits.softmax(-1)
    points = encoder.add_places(features, grid)
    latents = encoder.start(*soft_sums(soft, points), TrajectoryPath.sums(soft, grid), m)
    tokens = encoder.finish(encoder.perceiver(latents, points, seg.ids), seg.alive)
    stages = {"video": video, "features F": features, "queries Q": queries, "mask logits": seg.logits,
              "M_soft": soft, "M_hard": seg.ids, "latents": latents, "tokens z": tokens.z}
    lines = [["stage", "shape", "range"]]
    for name, x in stages.items():
        lines.append([name, str(tuple(x.shape)), f"{x.min():.3g} .. {x.max():.3g}"])
    print("\n".join(aligned(lines)))
    # 2. the picture. values: of the points, (n, 1 or 3) in 0 .. 1. The features' three principal components
    # are their red, green and blue
    pca = torch.pca_lowrank(features[0].float(), 3)[0]
    largest = soft.sum(1)[0].argsort(descending=True)[:3]
    values = {"pca of f": (pca / pca.abs().amax(0) + 1) / 2}
    for i, query in enumerate(largest):
        values[f"mask {i + 1}"] = soft[0, :, query, None]
    values["hard"] = torch.from_numpy(palette(soft.shape[-1]) / 255)[seg.ids[0].cpu()]
    values["read"] = (seg.ids[0] == largest[1])[:, None]
    some = np.linspace(0, grid[0] - 1, min(4, grid[0])).astype(int)
    rows = {"frames": video[0].cpu().numpy()[some]}
    stride = video.shape[2] // grid[1]
    for name, x in values.items():
        maps = rearrange(255 * x.float(), "(t h w) c -> t h w c", t=grid[0], h=grid[1])[some]
        maps = maps.expand(-1, -1, -1, 3).byte().cpu().numpy()
        rows[name] = maps.repeat(stride, 1).repeat(stride, 2)
    write_png(path, captioned(rows, max(1, 128 // video.shape[2])))
    print(f"wrote {path}")


# -----------------------------------------------------------------------------------------------------------
# python trajtok.py table, compare
# -----------------------------------------------------------------------------------------------------------

def scores_of(row, name):
    """The score `name` of each seed of a row -> array. Seeds without it are left out: veq is None without
    masks."""
    scores = [result.get(name) for result in row["results"]]
    return np.array([score for score in scores if score is not None], float)


def spread(x):
    """Mean and standard deviation over seeds, as text. With a single seed the deviation is not known, and
    shown as 0."""
    return f"{x.mean():.3f} +-{x.std(ddof=min(len(x) - 1, 1)):.3f}" if len(x) else "-"


def differ(a, b):
    """Is the difference of two means larger than twice its standard error? a (n_a,) and b (n_b,) are the
    scores of the seeds:

      |mean a - mean b| > 2 sqrt(var a / n_a + var b / n_b)

    With a single seed in a or b the error is not known, and the answer is no. Few seeds give a rough error:
    of two equal rows of 2, 3 or 5 seeds, 18, 12 or 8 of 100 differ by this rule (20 000 normal draws)."""
    if min(len(a), len(b)) < 2:
        return False
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return abs(a.mean() - b.mean()) > 2 * error


def summary(rows):
    """rows [{name, results: [result.json of each seed]}] -> the lines of a table. It is transposed: each
    score is a line, each row a column. A cell is the mean +- deviation over seeds, then the difference to the
    first row that has the score, with a star if they differ (`differ`)."""
    names = {}                                                  # a dict as an ordered set
    for row in rows:
        for result in row["results"]:
            names |= {key: x for key, x in result.items() if isinstance(x, (int, float)) and key != "seed"}
    lines = [["", *(row["name"] for row in rows)], ["seeds", *(str(len(row["results"])) for row in rows)]]
    for name in names:
        columns = [scores_of(row, name) for row in rows]
        first = next(x for x in columns if len(x))
        lines.append([name, *(cell(x, first) for x in columns)])
    return aligned(lines)


def cell(x, first):
    """Mean and deviation of x, then the difference of its mean to that of `first`, with a star if they
    differ."""
    if x is first or not len(x):
        return spread(x)
    star = "*" if differ(x, first) else " "
    return f"{spread(x)} ({x.mean() - first.mean():+.3f}{star})"


def read_json(path):
    """The content of a JSON file. A missing or damaged one is BadInput, as a person has pointed to it."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds no JSON object; give another file or folder")
    return value


def read_rows(path):
    """A JSON file that compare wrote, or the folder of a run -> rows {name: {name, results, ...}}."""
    path = Path(path)
    if path.is_dir():
        return {path.name: dict(name=path.name, results=[read_json(path / "result.json")])}
    value = read_json(path)
    try:
        return {row["name"]: row | dict(results=list(map(dict, row["results"]))) for row in value["rows"]}
    # what indexing and dict raise where the JSON holds something else
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not a table that `trajtok.py compare` wrote") from None


def table(argv):
    """Print runs, or what `compare` wrote, side by side; or, for results/claims.json, the verdicts."""
    if not argv:
        raise BadInput("table: give folders of runs, a JSON of compare, or results/claims.json")
    first = Path(argv[0])
    if first.is_file() and "claims" in read_json(first):
        lines = verdicts(read_json(first)["claims"], first.parent)
    else:
        lines = summary([row for path in argv for row in read_rows(path).values()])
    print("\n".join(lines))


def verdicts(claims, folder):
    """claims [{claim, paper, json, row, against, score}] -> the lines of a table (Markdown).

    `json` is a file in `folder` that compare wrote; `row` and `against` are two rows in it. A claim says that
    the mean of `score` over the seeds is larger in `row` than in `against`, or smaller, with `less`. If the
    claim has `against_score`, that score of `against` is taken. If the difference is at most twice its
    standard error, or the error is unknown, the claim is undecided."""
    lines = ["| claim | paper | ours | against it | seeds | verdict |", "|---|---|---|---|---|---|"]
    nothing = dict(results=[])
    for claim in claims:
        path, score = folder / claim["json"], claim["score"]
        rows = read_rows(path) if path.exists() else {}
        a = scores_of(rows.get(claim["row"], nothing), score)
        b = scores_of(rows.get(claim["against"], nothing), claim.get("against_score", score))
        verdict = "undecided" if len(a) and len(b) else "not measured"
        if differ(a, b):
            verdict = "holds" if (a.mean() > b.mean()) != claim.get("less", False) else "does not hold"
        cells = claim["claim"], claim["paper"], spread(a), spread(b), f"{len(a)}, {len(b)}", verdict
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare(argv):
    """Train every row with every seed, each under a name of its own, and print the table. What --json holds
    already is not trained again, so that a table may grow over days.

    A row is "NAME: FLAGS", with flags of the script. {seed} in FLAGS stands for the seed, as in --init
    out/clip-base-{seed}. The JSON: {command, hardware, rows: [{name, flags, script, results: [result.json of
    each seed, and its hardware]}]}; command and hardware are those of the last call."""
    parser = data.OneLineParser(prog="trajtok.py compare", description=compare.__doc__, allow_abbrev=False)
    # for --help alone: rows are taken out of argv below
    parser.add_argument("rows", nargs="*", metavar="NAME: FLAGS", help='e.g. "detach: --no-detach", "base:"')
    parser.add_argument("--script", default="train_clip.py", help="the script whose flags these are")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each row is trained with each")
    parser.add_argument("--json", default="out/compare.json", help="where results are kept")
    parser.add_argument("--out", default="out", help="where the runs are kept")
    # every argument with a colon is a row, wherever it stands: argparse would take a row after --seeds for a
    # seed
    args = parser.parse_args([text for text in argv if ":" not in text])
    texts = [text for text in argv if ":" in text]
    if args.rows or not texts:
        raise BadInput(f"compare {args.rows}: write each row as NAME: FLAGS")
    command = shlex.join(["python", "trajtok.py", "compare", *argv])
    hardware = f"{processor()}, {data.cores()} cores, torch {torch.__version__}"
    if not Path(args.json).exists():
        write_json(args.json, dict(rows=[]))
    wanted = {}
    for text in texts:
        name, flags = (part.strip() for part in text.split(":", 1))
        if wanted.setdefault(name, flags) != flags:
            raise BadInput(f"compare {name}: two rows of one name; give one of them another name")

    def rows_with(name):
        """The rows of --json, which another process may have written to meanwhile, and among them `name`."""
        rows = read_rows(args.json)
        row = rows.setdefault(name, dict(name=name, flags=wanted[name], script=args.script, results=[]))
        if (row.get("flags"), row.get("script")) != (wanted[name], args.script):
            raise BadInput(f"{args.json}: {name} has flags {row.get('flags')!r}; give it another name")
        return rows, row

    # all rows are checked before the first is trained
    for name in wanted:
        rows_with(name)
    for name, seed in itertools.product(wanted, args.seeds):
        if seed in scores_of(rows_with(name)[1], "seed"):
            continue
        result = train_row(args, name, wanted[name], seed) | dict(hardware=hardware)
        # written after each training, so that an interrupted comparison loses at most one of them
        rows, row = rows_with(name)
        row["results"].append(result)
        write_json(args.json, dict(command=command, hardware=hardware, rows=list(rows.values())))
    print("\n".join(summary(read_rows(args.json).values())))


def processor():
    """The name of the GPU, or else of the CPU, for which Python itself knows only the architecture."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def train_row(args, name, flags, seed):
    """Train one row with one seed, in a process of its own -> its result.json."""
    name = f"{name.replace(' ', '-')}-{seed}"
    try:
        flags = shlex.split(flags.replace("{seed}", str(seed)))
    except ValueError as error:
        raise BadInput(f"compare {flags!r}: {error}") from None
    own = ["--seed", str(seed), "--name", name, "--out", args.out, "--overwrite"]
    command = [sys.executable, args.script, *flags, *own]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise BadInput(f"{name}: {args.script} failed (see above); what was finished is in {args.json}")
    script = Path(args.script).stem.removeprefix("train_")
    return read_json(Path(args.out) / f"{script}-{name}" / "result.json")


# -----------------------------------------------------------------------------------------------------------

@data.one_line_errors
def main(argv=None):
    def pretrain_command(argv):
        cfg = configure(PretrainConfig, PRETRAIN_SIZES, argv)
        pretrain(resumed(cfg, run_folder(cfg, "segmenter"), argv) if cfg.resume else cfg)

    commands = {"pretrain": pretrain_command, "show": show, "table": table, "compare": compare}
    data.dispatch("trajtok.py", __doc__, commands, argv)


if __name__ == "__main__":
    main()
