"""Trajectory tokens on frozen features (paper, "Setting 2"): TrajAdapter beside linear and attentive probes, on V-JEPA2 or VideoMAE.

    video uint8 (b, t, H, W, 3) -> frozen backbone  -> features (b, n, D) on its grid (t', h', w')      computed once, kept on disk
                                -> frozen segmenter -> logits (b, t·h·w, K) -> resized to that grid -> M_soft, M_hard

    linear       mean over the n tokens -> LayerNorm -> classes
    attentive    self-attention over the n tokens -> one learned query reads them -> classes            (V-JEPA2's probe)
    trajadapter  project -> encoder.TrajectoryEncoder under the masks -> live tokens -> small transformer -> classes
    oracle       the same under the true masks of the procedural world: what a perfect segmenter would give

    python train_adapter.py                                      # needs nothing: pre-trains a small VideoMAE and a segmenter, then the table
    python train_adapter.py --backbone out/adapter-nano/videomae --tokenizer out/adapter-nano/segmenter-nano --size nano --name again
    python train_adapter.py --backbone VJEPA2 --data kinetics.csv --tokenizer FILE --segments 8 --crops 3       # every GPU of this machine
    python train_adapter.py --data actions/manifest.json --labels falling,walking,standing,sitting              # one `group` left out at a time
    python train_adapter.py --resume                             # goes on where a stopped run was saved

Writes out/adapter-<name>/: config.json, result.json, confusion.png; videomae/ and segmenter-<size>/ (what was pre-trained), cache/ (features),
heads-<fold>-<seed>/ (log.jsonl, state.pt of the heads); and results/adapter-<name>.json.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from tqdm import tqdm

import data
import trajtok
from data import BadInput, BadVideo, configure, write_json, write_png
from encoder import TrajectoryEncoder, compact
from segmenter import MEAN, STD, Segmentation, Segmenter, best_overlaps, normalise
from trajtok import (SIZES, Damage, Run, TrajTok, TrajTokConfig, count, fit_weights, load_official_segmenter, read_weights, rename, aligned, check_finite, check_flags, launch, learning_rate, make_optimizer, meet, peak_memory_gb, plot, precision, ranks,
                     results_folder, run_name, setup, shard, sigterm, split_entries, spread_of, sum_gradients, total, world_of, write_text, write_weights)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------

ROWS = ("linear", "attentive", "trajadapter", "oracle")

@dataclass(frozen=True)
class AdapterConfig:
    """Probes on a frozen video backbone: linear, attentive, and TrajAdapter, which pools its features by trajectory."""
    size: str = "nano"                          # one of ADAPTER_SIZES: nano, full (the published protocol); default: nano, and with --backbone full
    data: str = "world"                         # `world` (procedural), or a manifest, `path,label` CSV or folder of labelled videos
    valid: str | None = None                    # another such set, to choose by; default: entries' "split", other groups, or a tenth of the training videos
    test: str | None = None                     # another such set, to report on; default: entries' "split", one "group" at a time, or a fifth of the videos
    labels: str | None = None                   # these classes only, with commas; default: all that occur
    name: str | None = None                     # the run's folder is out/adapter-<name>; default: the size, and of real data the folder's name
    out: str = "out"                            # where runs are kept
    # what is frozen
    backbone: str | None = None                 # a folder or file of a published V-JEPA2 or VideoMAE, or of a `videomae` made here; default: one is pre-trained now
    tokenizer: str | None = None                # a folder of `trajtok.py pretrain` or train_clip.py, or a checkpoint of the authors; default: one is trained now
    image_size: int | None = None               # pixels of a side; default: the backbone's
    frames: int | None = None                   # frames of a clip; default: the backbone's, of a V-JEPA2 at most 16
    stride: int = 4                             # of real video: every stride-th frame of a stretch makes a clip
    segments: int = 1                           # of real test video: so many stretches, evenly from the first to the last (published: K400 8, SSv2 2)
    crops: int = 1                              # ... and of each so many squares along the longer side (published: 3); probabilities are averaged
    train_segments: int = 1                     # of real training video: so many stretches are kept, and one drawn each time; --no-cache draws anew
    # the procedural world
    max_objects: int = 4                        # 1 .. 8 objects in a clip
    shared_colours: bool = False                # may two objects of a made clip wear the same colour?
    camera: bool = False                        # may the camera of a made clip pan and zoom?
    light: bool = False                         # may a made clip get lighter or darker?
    train_clips: int = 3000                     # made clips that heads learn from
    valid_clips: int = 500                      # made clips that settings are chosen by
    test_clips: int = 1000                      # made clips that are reported on
    # pre-training, without --backbone and --tokenizer
    steps: int = 600                            # steps of the VideoMAE
    batch: int = 32                             # clips a step of each process
    masks: int = 2                              # masks that each of these clips is seen under
    mask: float = 0.9                           # share of tubes that is hidden (published: 0.9)
    decoder_layers: int = 2                     # its decoder, which is thrown away: layers, width
    decoder_width: int = 64                     # a multiple of 32 (heads of 32 channels)
    lr: float = 2e-3                            # peak learning rate
    warmup: int = 40                            # steps of linear warm-up; then a cosine to 1 %
    weight_decay: float = 0.05                  # on matrices
    clip: float = 1.0                           # largest gradient norm, of the VideoMAE and of each head
    segmenter_steps: int = 300                  # steps of `trajtok.py pretrain`
    # the heads
    rows: str = "linear,attentive,trajadapter,oracle"   # with commas; oracle: the true masks, of made clips only
    tokens: str = "1,2,4"                       # tokens a trajectory: one of these is drawn at each step, all are reported
    probe_layers: int = 1                       # attentive: layers of self-attention before the query (published: 3)
    probe_heads: int = 4                        # attentive: heads (published: 16)
    width: int = 96                             # trajadapter: width
    depth: int = 1                              # trajadapter: layers of the trajectory encoder
    layers: int = 2                             # trajadapter: layers of the transformer over live tokens
    heads: int = 4                              # trajadapter: heads
    lrs: str = "1e-3,2e-3"                      # learning rates of the grid, with commas; the linear head tries ten times each as well
    weight_decays: str = "0.05"                 # weight decays of the grid, with commas
    epochs: int = 5                             # over the training clips
    head_batch: int = 32                        # clips a step of each process
    head_warmup: float = 0.1                    # share of the steps that warms up; then a cosine to 1 %
    seeds: str = "0,1,2"                        # of the heads and of the order of their clips, with commas; the first one chooses from the grid
    # features
    cache: bool = True                          # compute features once and keep them on disk, in half precision
    cache_dir: str | None = None                # where; default: the run's folder
    feature_batch: int = 32                     # clips that go through the backbone at once
    workers: int = 0                            # processes that make batches; 0: in the training process
    save_every: int = 100                       # steps between checkpoints
    seed: int = 0                               # of the pre-training
    # how it is computed
    device: str = "auto"                        # cpu, cuda, ...
    processes: int = 0                          # processes on this machine; 0: one for each GPU, without GPUs one
    bf16: bool | None = None                    # matrix products in bfloat16; default: on a GPU
    resume: bool = False                        # go on with the run of this name
    overwrite: bool = False                     # start again over a run of this name
    results: str = "results"                    # folder for the table as JSON

    mix = textures = None                       # one set at a time, plain surfaces

    def __post_init__(self):
        check_flags(self)
        for field in ("segments", "crops", "train_segments", "train_clips", "valid_clips", "test_clips", "masks", "decoder_layers", "decoder_width", "segmenter_steps",
                      "probe_heads", "width", "depth", "heads", "epochs", "head_batch", "feature_batch", "stride"):
            if getattr(self, field) < 1:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 1")
        for field in ("processes", "probe_layers", "layers"):
            if getattr(self, field) < 0:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 0")
        if "" in (self.data, self.backbone, self.tokenizer, self.valid, self.test, self.labels, self.cache_dir):
            raise BadInput("an empty name: of --data, --backbone, --tokenizer, --valid, --test, --labels or --cache-dir; give one, or leave the flag out")
        if not 0 < self.mask < 1 or not 0 <= self.head_warmup < 1:
            raise BadInput(f"--mask {self.mask} --head-warmup {self.head_warmup}: shares, above 0 and below 1 (no warm-up: 0)")
        if unknown := set(self.rows.split(",")) - set(ROWS):
            raise BadInput(f"--rows {self.rows}: no row {', '.join(sorted(unknown)) or '(empty)'}; {', '.join(ROWS)}")
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", self.seeds):
            raise BadInput(f"--seeds {self.seeds}: whole numbers, with commas")
        if not re.fullmatch(r"[124](,[124])*", self.tokens):
            raise BadInput(f"--tokens {self.tokens}: 1, 2 or 4, with commas")
        self.grid                                                # refused if it holds no numbers
        if self.width % self.heads or self.decoder_width % 32:
            raise BadInput(f"--width {self.width} --heads {self.heads} --decoder-width {self.decoder_width}: the first a multiple of the second, the third of 32")
        if self.data == "world" and (self.valid or self.test or self.labels):
            raise BadInput(f"--valid, --test, --labels: of real videos, but --data is {self.data}")
        if self.valid and not self.test:
            raise BadInput(f"--valid {self.valid}: is there to choose by; give --test as well, to report on")
        if self.data == "plain":
            raise BadInput("--data plain: give world")

    @property
    def choices(self):
        return tuple(sorted(set(map(int, self.tokens.split(",")))))

    @property
    def grid(self):
        """[(learning rate, weight decay)]"""
        try:
            lrs, decays = ([float(x) for x in text.split(",")] for text in (self.lrs, self.weight_decays))
        except ValueError:
            lrs = []
        if not lrs or not all(0 < x < math.inf for x in lrs) or not all(0 <= x < math.inf for x in decays):
            raise BadInput(f"--lrs {self.lrs} --weight-decays {self.weight_decays}: numbers with commas, learning rates above 0")
        return [(lr, decay) for lr in dict.fromkeys(lrs) for decay in dict.fromkeys(decays)]


# CHOICE: camera and light of the world keep still. Chosen on validation clips, one seed, 300 steps of 32 clips, as a question that minutes of heads can
# answer in part: colour of the largest object, linear / attentive / TrajAdapter x4 / true masks x4: still 20 / 64 / 72 / 75 %; moving 15 / 51 / 62 / 61 %.
# (Among two objects at most 64 and 81 % for attentive and true masks: less headroom.)
# full: the published protocol of V-JEPA2's probes (SPECS 4): 20 epochs, 3 layers of self-attention before the query, 16 heads.
ADAPTER_SIZES = {
    "nano": dict(size="nano"),
    "full": dict(size="full", probe_layers=3, probe_heads=16, width=512, depth=2, layers=4, heads=8, epochs=20, lrs="3e-4,1e-3,3e-3", weight_decays="0.01,0.1,0.4",
                 seeds="0", save_every=500, workers=8),
}

# ---------------------------------------------------------------------------------------------------------------------
# The frozen backbones: V-JEPA2 and VideoMAE(-v2)
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a video transformer. mean, std: of a pixel in [0, 1], what it was trained with."""
    kind: str = "videomae"                      # vjepa2 (rotary positions, any clip) or videomae (a table of positions, one size of clip)
    width: int = 768                            # d
    depth: int = 12                             # blocks
    heads: int = 12
    mlp: int = 3072                             # inner width of a block's MLP
    patch: int = 16                             # pixels of a side of a patch
    tubelet: int = 2                            # frames that a patch spans
    frames: int = 16                            # of a clip
    image_size: int = 224
    eps: float = 1e-6                           # of the LayerNorms
    pool_eps: float = 1e-6                      # of the norm after the mean; the hub's VideoMAE: 1e-5, whatever its config.json says of the others
    norm: str = "tokens"                        # where the last norm stands: after every token (`tokens`), after their mean (`pooled`), nowhere (`none`)
    mean: tuple = MEAN
    std: tuple = STD

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in ("vjepa2", "videomae") or self.norm not in ("tokens", "pooled", "none"):
            raise BadInput(f"backbone of kind {self.kind!r} with norm {self.norm!r}: vjepa2 or videomae; tokens, pooled or none")
        for name in ("width", "depth", "heads", "mlp", "patch", "tubelet", "frames", "image_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise BadInput(f"backbone: {name} {getattr(self, name)!r}: a whole number from 1 on")
        if self.width % self.heads or self.kind == "vjepa2" and self.width // self.heads < 6:
            raise BadInput(f"backbone: width {self.width} and {self.heads} heads: the width must be a multiple of the heads"
                           + ", with 6 channels a head at least" * (self.kind == "vjepa2"))
        if self.image_size % self.patch or self.frames % self.tubelet:
            raise BadInput(f"backbone: {self.frames} frames of {self.image_size} px: not a multiple of tubelets of {self.tubelet} frames x {self.patch} px")
        for eps in (self.eps, self.pool_eps):
            if not isinstance(eps, (int, float)) or not 0 < eps < 1:
                raise BadInput(f"backbone: eps {eps!r} of the norms: a small number above 0, such as 1e-6")
        pixels = (*self.mean, *self.std)
        if not len(self.mean) == len(self.std) == 3 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in pixels) or min(self.std) <= 0:
            raise BadInput(f"backbone: pixel mean {self.mean} and deviation {self.std}: three numbers each, deviations above 0")

    @property
    def grid(self):
        """(t', h', w') of its own size of clip."""
        return self.frames // self.tubelet, self.image_size // self.patch, self.image_size // self.patch


#    name                           kind       width depth heads  mlp patch tubelet frames px           parameters (a test counts them)
BACKBONES = {
    "vjepa2-l":     BackboneConfig("vjepa2",   1024, 24, 16, 4096, 16, 2, 64, 256),
    "vjepa2-h":     BackboneConfig("vjepa2",   1280, 32, 16, 5120, 16, 2, 64, 256),
    "vjepa2-g":     BackboneConfig("vjepa2",   1408, 40, 22, 6144, 16, 2, 64, 256),
    "vjepa2-g-384": BackboneConfig("vjepa2",   1408, 40, 22, 6144, 16, 2, 64, 384),
    "videomae2-b":  BackboneConfig("videomae",  768, 12, 12, 3072, 16, 2, 16, 224, norm="pooled"),
    "videomae2-h":  BackboneConfig("videomae", 1280, 32, 16, 5120, 16, 2, 16, 224, norm="pooled"),
    "videomae2-g":  BackboneConfig("videomae", 1408, 40, 16, 6144, 14, 2, 16, 224, norm="pooled"),
    "nano":         BackboneConfig("videomae",  128,  4,  4,  512,  8, 2,  8,  64),
}


class Attention(nn.Module):
    """Joint self-attention over the tokens of a clip. Of a VideoMAE, queries and values have biases and keys have none: one constant
    added to every key shifts all scores of a query alike, and the softmax does not see it."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width, bias=cfg.kind == "vjepa2"), nn.Linear(cfg.width, cfg.width)
        if self.qkv.bias is None:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(cfg.width)), nn.Parameter(torch.zeros(cfg.width))

    def forward(self, x, tables=None):
        bias = self.qkv.bias if self.qkv.bias is not None else torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = rearrange(F.linear(x, self.qkv.weight, bias), "b n (three a c) -> three b a n c", three=3, a=self.heads)
        if tables is not None:
            q, k = turn(q, *tables), turn(k, *tables)
        # softmax over the keys, all tokens of the clip: no mask, so that a GPU may take its fastest kernel
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b a n c -> b n (a c)"))


class Block(nn.Module):
    """Pre-norm: (1) attention, (2) an MLP with exact GELU. The names are the original releases'."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps), Attention(cfg), nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(cfg.width, cfg.mlp), fc2=nn.Linear(cfg.mlp, cfg.width)))

    def forward(self, x, tables=None):
        x = x + self.attn(self.norm1(x), tables)                             # 1
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))   # 2


class Backbone(nn.Module):
    """What the two families share: tubelets of `tubelet` frames x patch x patch pixels, a linear map, blocks, a last norm.
    features(x (b, t, 3, H, W) normalised) -> (b, n, d); forward(video uint8 (b, t, H, W, 3)) = normalise + features.
    self.left_out: what a loaded file held beside the encoder, in words ("" = nothing)."""
    left_out = ""

    def __init__(self, cfg):
        super().__init__()
        if cfg.kind != self.kind:
            raise BadInput(f"a backbone of kind {cfg.kind} is not a {type(self).__name__}")
        self.cfg = cfg
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, cfg.width, (cfg.tubelet, cfg.patch, cfg.patch), (cfg.tubelet, cfg.patch, cfg.patch))))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.eps) if cfg.norm == "tokens" else nn.Identity()
        self.fc_norm = nn.LayerNorm(cfg.width, eps=cfg.pool_eps) if cfg.norm == "pooled" else nn.Identity()
        for name, p in self.named_parameters():
            if p.dim() > 1:                                      # 1 / sqrt(fan in), as in train_clip.py; the ends of branches shrink with depth
                ends = name.endswith(("attn.proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=p[0].numel() ** -0.5 / (math.sqrt(2 * cfg.depth) if ends else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def grid(self):
        """(t', h', w') of its own size of clip; grid_of tells it of any."""
        return self.cfg.grid

    def grid_of(self, x):
        """x (b, t, 3, H, W) -> (t', h', w'); refuses what is not made of whole tubelets."""
        t, height, width = x.shape[1], *x.shape[-2:]
        if t % self.cfg.tubelet or height % self.cfg.patch or width % self.cfg.patch or not x.numel():
            raise BadInput(f"a clip of {t} frames of {height} x {width} px: this backbone cuts it into tubelets of {self.cfg.tubelet} frames "
                           f"x {self.cfg.patch} x {self.cfg.patch} px; give multiples of them")
        return t // self.cfg.tubelet, height // self.cfg.patch, width // self.cfg.patch

    def embed(self, x):
        """(b, t, 3, H, W) -> (b, n, d): each tubelet through the 3-D convolution, which is a matrix product, as kernel and stride are one."""
        self.grid_of(x)                                          # whole tubelets?
        return self.project(self.tubes(x))

    def tubes(self, x):
        """(b, t, 3, H, W) -> pixels of each tubelet (b, n, 3·u·p·p)."""
        return rearrange(x, "b (t u) c (h p) (w q) -> b (t h w) (c u p q)", u=self.cfg.tubelet, p=self.cfg.patch, q=self.cfg.patch)

    def project(self, tubes):
        proj = self.patch_embed["proj"]
        return F.linear(tubes, proj.weight.flatten(1), proj.bias).to(tubes.dtype)    # under autocast: the residual stream stays float32

    def encode(self, z, tables=None):
        """(b, n, d) with their positions -> (b, n, d). tables: rotary ones (V-JEPA2)."""
        for block in self.blocks:
            z = block(z, tables)
        return self.norm(z)

    def pool(self, features):
        """(b, n, d) -> (b, d): the mean over tokens, and after it fc_norm, where the published model has that one (norm `pooled`)."""
        return self.fc_norm(features.mean(1))

    def forward(self, video):
        return self.features(normalise(video, self.cfg.mean, self.cfg.std))

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as load_backbone reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "config.json", {"backbone": dataclasses.asdict(self.cfg)})
        write_weights(Path(folder) / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, path, heads=None, image_size=None, frames=None):
        """See load_backbone; refuses the other family."""
        net = load_backbone(path, heads, image_size, frames)
        if not isinstance(net, cls):
            raise BadInput(f"{path}: holds a {net.cfg.kind}, not a {cls.kind}")
        return net


def rotary_3d(grid, channels, device=None):
    """cos, sin, each float32 (n, c), of the tubelets of a grid (t', h', w') and heads of c channels (SPECS 4).
    The channels are shared out to t, h, w in turn, d = 2 floor(floor(c / 3) / 2) each; what is left over stays (cos 1, sin 0):

        angle[p, i] = p · 1e4^(-i / (d/2)),  i < d/2

    The release repeats the d/2 angles one after another, [a0 a1 .. a0 a1 ..], and yet turns adjacent channels as pairs, (0, 1), (2, 3), ..:
    the two channels of a pair turn by different angles, so lengths are not kept. Weights were trained with it: so do we."""
    d = 2 * (channels // 3 // 2)
    omega = 1e4 ** (-torch.arange(d // 2, device=device, dtype=torch.float32) / (d // 2))
    position = torch.stack(torch.meshgrid(*(torch.arange(s, device=device) for s in grid), indexing="ij"), -1).flatten(0, 2)     # (n, 3)
    angle = (position[..., None] * omega).repeat(1, 1, 2).flatten(1)             # (n, 3, d/2) -> (n, 3d)
    angle = F.pad(angle, (0, channels - 3 * d))
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    """x (b, a, n, c), tables (n, c): channels (2j, 2j + 1) = (u, v) become (u cos - v sin, v cos + u sin), each with its own angle. In float32."""
    y = x.float()
    swapped = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype)


class VJEPA2(Backbone):
    """V-JEPA2's encoder. Positions are rotary, so clips of any number of tubelets go through; cfg.frames and image_size are its own.
    CHOICE: a tubelet's place is its place in this clip. (The hub's implementation counts off rows of its config's crop_size
    whatever comes in; at that size, or with a config of the size that comes in, both are the same.)"""
    kind = "vjepa2"

    def features(self, x):
        return self.encode(self.embed(x), rotary_3d(self.grid_of(x), self.cfg.width // self.cfg.heads, x.device))


def sinusoid(n, width):
    """float32 (n, width): sin (even channels j) and cos (odd ones) of p / 10000^(2 floor(j/2) / width), p the token's place in the
    flattened clip, computed in float64 (SPECS 4)."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 1e4 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


class VideoMAE(Backbone):
    """VideoMAE's encoder, version 1 or 2. Its positions count through the whole clip, so another size or length would move them all."""
    kind = "videomae"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("positions", sinusoid(math.prod(cfg.grid), cfg.width), persistent=False)

    def place(self, x):
        """(b, t, 3, H, W) -> (b, n, d): tubelets with their positions. encode(place(x)) = features(x)."""
        if self.grid_of(x) != self.grid:
            raise BadInput(f"a clip of {x.shape[1]} frames of {x.shape[-2]} x {x.shape[-1]} px: this VideoMAE's positions are made for "
                           f"{self.cfg.frames} frames of {self.cfg.image_size} px and no other size")
        return self.embed(x) + self.positions

    def features(self, x):
        return self.encode(self.place(x))


def new_backbone(cfg):
    """A VJEPA2 or a VideoMAE of that shape with random weights."""
    return (VJEPA2 if cfg.kind == "vjepa2" else VideoMAE)(cfg)


# ---------------------------------------------------------------------------------------------------------------------
# Published backbones: the hub's folders and the original releases' files
# ---------------------------------------------------------------------------------------------------------------------

# published names -> ours, which are those of the original releases (SPECS 4). Query, key and value of the hub are joined afterwards.
BACKBONE_NAMES = [
    # original releases, in their wrappers
    (r"(?:(?:module|backbone|encoder|model)\.)+((?:patch_embed|blocks|norm|fc_norm|head)\..+)", r"\1"),
    # hub, V-JEPA2
    (r"(?:vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.attention\.(query|key|value|proj)\.(.+)", r"blocks.\1.attn.\2.\3"),
    (r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.((?:norm[12]|mlp)\..+)", r"blocks.\1.\2"),
    (r"(?:vjepa2\.)?encoder\.layernorm\.(.+)", r"norm.\1"),
    # hub, VideoMAE; the two biases have two names
    (r"(?:videomae\.)?embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", r"blocks.\1.attn.\2.weight"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(?:q_bias|query\.bias)", r"blocks.\1.attn.q_bias"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(?:v_bias|value\.bias)", r"blocks.\1.attn.v_bias"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:videomae\.)?layernorm\.(.+)", r"norm.\1"),
]
# what may stand beside an encoder: V-JEPA2's predictor and probe; VideoMAE's decoder; classifiers
BESIDE = r"(predictor|pooler|classifier|head|decoder|encoder_to_decoder|mask_token)(\..+)?"
# CHOICE: of V-JEPA2's two encoders the target encoder, the slow mean of the other, with which the release evaluates
WRAPPINGS = ("target_encoder", "encoder", "model", "module", "state_dict")


def load_backbone(path, heads=None, image_size=None, frames=None):
    """A VJEPA2 or a VideoMAE, float32, on the CPU, from
      - a hub folder: config.json, which says which it is, and model.safetensors or its sharded index; preprocessor files, if there
        are any, say how pixels are normalised;
      - a file (.safetensors, .pth, .pt) in the hub's or in the original release's layout: its config.json, if one lies beside it;
        else the shape is read off the tensors, and the heads, which no tensor shows, from the published shape of that width;
      - what save_pretrained wrote.
    heads, image_size, frames: instead of what the folder says, or for files that say nothing. Strict: BadInput lists what is missing,
    unexpected or of another shape; what is known to stand beside an encoder is left out and named in .left_out."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    told = {k: v for k, v in dict(heads=heads, image_size=image_size, frames=frames).items() if v is not None}
    config = read_config(folder) if Path(path).is_dir() or (folder / "config.json").is_file() and Path(path).is_file() else None
    weights, hub, left_out = backbone_names(read_weights(path, WRAPPINGS), path)
    if config is None:
        config = shape_of(weights, hub, heads, path)
    if config["norm"] is None:
        config["norm"] = "pooled" if "fc_norm.weight" in weights else "none"
    cfg = BackboneConfig(**config | told)
    net = fit_weights(new_backbone(cfg), weights, path)
    net.left_out = left_out
    return net


def backbone_names(weights, where):
    """Any published layout -> (weights under our names, was it the hub's?, what is left out, in words)."""
    hub = any("patch_embeddings" in k for k in weights)
    own = rename(weights, BACKBONE_NAMES)
    if len(own) < len(weights):
        raise BadInput(f"{where}: {len(weights) - len(own)} weights are in it twice, under different names; save one encoder alone")
    if "patch_embed.proj.weight" not in own or own["patch_embed.proj.weight"].dim() != 5:
        raise BadInput(f"{where}: neither a V-JEPA2 nor a VideoMAE in a layout that is known (hub, original release); its keys: {', '.join(list(weights)[:4])} ...")
    beside = {}
    for key in [k for k in own if re.fullmatch(BESIDE, k)]:
        beside[key.split(".")[0]] = beside.get(key.split(".")[0], 0) + own.pop(key).numel()
    for i in range(count(own, r"blocks\.(\d+)\.")):
        for part in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{x}.{part}" for x in ("query", "key", "value")]
            if all(n in own and own[n].dim() for n in names) and len({own[n].shape for n in names}) == 1:             # else: named by fit_weights
                own[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([own.pop(n) for n in names])
    return own, hub, ", ".join(f"{name} ({n:,} parameters)" for name, n in beside.items())


def shape_of(weights, hub, heads, where):
    """Weights under our names -> the fields of a BackboneConfig that tensors show; the others from the published shape that fits."""
    width, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    kind = "videomae" if "blocks.0.attn.q_bias" in weights else "vjepa2"
    if "blocks.0.mlp.fc1.weight" not in weights:
        raise BadInput(f"{where}: missing blocks.0.mlp.fc1.weight; not a whole encoder")
    shown = dict(kind=kind, width=width, depth=count(weights, r"blocks\.(\d+)\."), mlp=len(weights["blocks.0.mlp.fc1.weight"]), patch=patch, tubelet=tubelet)
    like = next((c for c in BACKBONES.values() if (c.kind, c.width, c.depth, c.patch) == (kind, width, shown["depth"], patch)), None)
    if like is None and heads is None:
        raise BadInput(f"{where}: a {kind} of width {width} and {shown['depth']} blocks is none that was published; say how many heads it has, "
                       "or put its config.json beside it")
    like = dataclasses.asdict(like or BackboneConfig(kind, width, shown["depth"], heads, frames=16, image_size=224 // patch * patch))
    norm = "tokens" if kind == "vjepa2" or "norm.weight" in weights else None
    # the hub's VideoMAE has another eps unless its config.json says otherwise
    return like | shown | dict(norm=norm) | (dict(eps=1e-12, pool_eps=1e-5) if hub and kind == "videomae" else {})


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return content


# model_type -> our field: (config.json's name for it, the value where config.json is silent)
CONFIG_NAMES = {
    "vjepa2": dict(width=("hidden_size", 1024), depth=("num_hidden_layers", 24), heads=("num_attention_heads", 16), mlp=("mlp_ratio", 4.0),
                   patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("frames_per_clip", 64), image_size=("crop_size", 256), eps=("layer_norm_eps", 1e-6)),
    "videomae": dict(width=("hidden_size", 768), depth=("num_hidden_layers", 12), heads=("num_attention_heads", 12), mlp=("intermediate_size", 3072),
                     patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("num_frames", 16), image_size=("image_size", 224), eps=("layer_norm_eps", 1e-12)),
    "VideoMAEv2": dict(width=("embed_dim", 768), depth=("depth", 12), heads=("num_heads", 12), mlp=("mlp_ratio", 4.0),
                       patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("num_frames", 16), image_size=("img_size", 224), eps=("layer_norm_eps", 1e-6)),
}
# what config.json may say and these classes are not made for, were it otherwise
CONFIG_FIXED = dict(in_chans=3, num_channels=3, hidden_act="gelu", qkv_bias=True, qv_bias=True, use_learnable_pos_emb=False, cos_attn=False, init_values=0,
                    norm_layer="nn.LayerNorm")


def read_config(folder):
    """A folder's config.json, and preprocessor files beside it -> fields of a BackboneConfig (norm None: the weights will show it)."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: holds no config.json; give a folder as the model hub serves it, or a file of weights")
    config = read_json(path)
    try:
        fields = dataclasses.asdict(BackboneConfig(**config["backbone"])) if "backbone" in config else hub_config(config, path) | read_pixels(folder)
        BackboneConfig(**fields | ({} if fields["norm"] else dict(norm="none")))     # checks itself, before gigabytes are read
    except (TypeError, AttributeError) as error:
        raise BadInput(f"{path}: no backbone's configuration, or preprocessor files that are none ({error})") from None
    return fields


def hub_config(config, path):
    """The hub's config.json -> fields of a BackboneConfig, all but the pixels'; norm None: the weights will show it."""
    family = str(config.get("model_type"))
    family = "VideoMAEv2" if family.startswith("VideoMAEv2") else family             # the authors' own folders: VideoMAEv2_Base, ...
    if family not in CONFIG_NAMES:
        raise BadInput(f"{path}: a model of type {family}; {', '.join(CONFIG_NAMES)} are read here")
    config = config.get("model_config", config) if family == "VideoMAEv2" else config
    for name, value in CONFIG_FIXED.items():
        if config.get(name, value) != value:
            raise BadInput(f"{path}: {name} {config[name]!r}: this backbone is written for {value!r}")
    fields = {ours: config.get(name, silent) for ours, (name, silent) in CONFIG_NAMES[family].items()}
    if CONFIG_NAMES[family]["mlp"][0] == "mlp_ratio":            # of the g shapes 48 / 11, which no float holds
        fields["mlp"] = round(fields["width"] * fields["mlp"])
    norm = None if family != "vjepa2" and config.get("use_mean_pooling", True) else "tokens"
    return fields | dict(kind="vjepa2" if family == "vjepa2" else "videomae", norm=norm, pool_eps=1e-5 if family == "videomae" else 1e-6)


def read_pixels(folder):
    """How a folder's preprocessor files normalise pixels: dict(mean, std), empty if there are none."""
    for path in (folder / "video_preprocessor_config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            config = read_json(path)
            if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6 or not config.get("do_rescale", True) or not config.get("do_normalize", True):
                raise BadInput(f"{path}: pixels that are not divided by 255 and normalised; this backbone is written for those that are")
            return dict(mean=config.get("image_mean", MEAN), std=config.get("image_std", STD))
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Heads: features (b, n, D) and a Segmentation on the same grid -> scores (b, classes)
# ---------------------------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    """Pre-norm transformer layer: (1) self-attention among the real positions, (2) a GELU MLP of width 4w."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask=None):                             # (b, s, w); mask (b, s), True = a real position; None: all are
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b s (three a c) -> three b a s c", three=3, a=self.heads)
        # softmax over the real keys: what a token reads from the others
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        x = x + self.proj(rearrange(y, "b a s c -> b s (a c)"))                                      # 1
        return x + self.mlp(self.norm2(x))                                                           # 2


def start(module, depth):
    """Matrices of a head start at a deviation of 1 / sqrt(fan in), the ends of its `depth` branches smaller: PyTorch's own start, 0.58 of that, leaves
    attention faint. Of both kinds of heads: after 300 steps on 2 000 made clips the attentive probe named the largest object's colour in 51 instead of
    47 % of 400 validation clips (one seed each)."""
    for name, p in module.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5 / (math.sqrt(2 * depth) if name.endswith(("proj.weight", "mlp.2.weight")) else 1))


class Linear(nn.Module):
    """The mean of all tokens, a LayerNorm (VideoMAE's fc_norm), a linear layer."""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x, seg, m):
        return self.head(self.norm(x.mean(1)))


class Attentive(nn.Module):
    """V-JEPA2's probe (SPECS 4): layers of self-attention over all tokens, then one layer in which a learned query reads them: LayerNorm on
    what is read, none on the query, no output projection; an MLP; a linear layer."""

    def __init__(self, dim, classes, layers, heads):
        super().__init__()
        if dim % heads:
            raise BadInput(f"--probe-heads {heads}: does not divide the backbone's width {dim}")
        self.heads = heads
        self.blocks = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.norm1, self.q, self.kv = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        start(self, layers + 1)
        self.head = nn.Linear(dim, classes)

    def forward(self, x, seg, m):
        for block in self.blocks:
            x = block(x)
        k, v = rearrange(self.kv(self.norm1(x)), "b n (two a c) -> two b a n c", two=2, a=self.heads)
        q = repeat(self.q(self.query), "1 1 (a c) -> b a 1 c", b=len(x), a=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)              # softmax over the n tokens: where the query looks
        y = self.query[:, 0] + rearrange(y, "b a 1 c -> b (a c)")
        return self.head(y + self.mlp(self.norm2(y)))


class TrajAdapter(nn.Module):
    """Features pooled by trajectory: m tokens of each (the encoder of TrajTok, with keys that know when and where), then a small
    transformer over [CLS; live tokens]. CHOICE: a LayerNorm before the projection (VideoMAE's tokens come without one), and a projection that starts at a
    deviation of 2, like the segmenter's F (four normed maps, summed): at 0.58 z_init drowned in the learned codes beside it. Measured as in `start`, with the
    true masks: 43 % at 0.58, 57 at 1, 63 at 2."""

    def __init__(self, dim, classes, num_queries, cfg):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(dim), nn.Linear(dim, cfg.width)
        nn.init.normal_(self.proj.weight, std=2 * dim ** -0.5)
        self.encoder = TrajectoryEncoder(TrajTokConfig(dim=cfg.width, num_queries=num_queries, depth=cfg.depth, heads=cfg.heads, max_tokens=max(cfg.choices), out_dim=cfg.width))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        self.blocks = nn.ModuleList(Layer(cfg.width, cfg.heads) for _ in range(cfg.layers))
        start(self.blocks, cfg.layers)
        self.out, self.head = nn.LayerNorm(cfg.width), nn.Linear(cfg.width, classes)

    def forward(self, x, seg, m):
        tokens = compact(self.encoder(self.proj(self.norm(x)), seg, m))                              # dead trajectories leave here
        z = torch.cat((self.cls.expand(len(x), -1, -1), tokens.z), 1)
        mask = F.pad(tokens.mask, (1, 0), value=True)            # CLS is always real
        for block in self.blocks:
            z = block(z, mask)
        return self.head(self.out(z[:, 0]))


def new_head(row, dim, classes, num_queries, cfg):
    if row == "linear":
        return Linear(dim, classes)
    if row == "attentive":
        return Attentive(dim, classes, cfg.probe_layers, cfg.probe_heads)
    return TrajAdapter(dim, classes, num_queries if row == "trajadapter" else TRUE_QUERIES, cfg)


def variants(rows, choices):
    """Lines of the table: (row, tokens a trajectory, or None where there are none)."""
    return [(row, m) for row in rows for m in (choices if row in ("trajadapter", "oracle") else (None,))]


def called(row, m):
    return row if m is None else f"{row} x{m}"


# ---------------------------------------------------------------------------------------------------------------------
# Masks on the backbone's grid
# ---------------------------------------------------------------------------------------------------------------------

TRUE_QUERIES = data.MAX_GROUNDS + data.MAX_OBJECTS


def resize_logits(logits, grid, target):
    """(b, t·h·w, K) -> (b, t'·h'·w', K): linear in space and time. The released TrajVLM does this in space (SPECS 5: 56 -> 27, then the argmax);
    two frames that share a tubelet are averaged by the same rule."""
    t, h, w = grid
    x = F.interpolate(rearrange(logits, "b (t h w) k -> b k t h w", t=t, h=h), size=target, mode="trilinear", align_corners=False)
    return rearrange(x, "b k t h w -> b (t h w) k")


def as_segmentation(logits, grid):
    """Logits (b, n, K) on a grid -> what a TrajectoryEncoder reads: softmax and argmax are taken there."""
    ids = logits.argmax(-1)                                      # M_hard: over the queries
    alive = torch.zeros(len(ids), logits.shape[-1], dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    return Segmentation(None, logits, ids, alive, grid)


def true_ids(labels, grid):
    """Labels (b, t, H, W) of made clips -> (b, n): the label that has most of each cell's pixels."""
    share = reduce(F.one_hot(labels, TRUE_QUERIES).float(), "b (t q) (h p) (w r) k -> b (t h w) k", "mean", t=grid[0], h=grid[1], w=grid[2])
    return share.argmax(-1)


def oracle(ids, index, grid):
    """True ids (b, n) of clips number `index` -> Segmentation. Their order is shuffled, each clip's in its own way: a made clip's labels are in
    order of depth, which would tell "behind" from "in front of"."""
    order = torch.stack([torch.from_numpy(np.random.default_rng((4, i)).permutation(TRUE_QUERIES)) for i in index]).to(ids.device)
    return as_segmentation(20.0 * F.one_hot(order.gather(1, ids), TRUE_QUERIES).float(), grid)       # e^20 : 1, hard to all purposes


# ---------------------------------------------------------------------------------------------------------------------
# Clips: made, decoded, or their features from the disk. Each has get(positions, draw) -> dict(video or features, index, y, bad)
# ---------------------------------------------------------------------------------------------------------------------

class WorldClips:
    """Clips begin ... of the procedural world; three classes each, all of the largest object: its `colour`, its `appearance` (shape) and its `motion`.
    CHOICE: colour is asked beside the two kinds that the world has names for. Shapes and motions take more than minutes to learn; which of several
    colours is the largest thing's does not, and a mean over all tokens cannot tell."""
    views = 1

    def __init__(self, world, begin, count):
        self.world, self.begin, self.count = world, begin, count

    def get(self, positions, draw=None):
        batch = data.WorldBatches(self.world, len(positions), indices=[self.begin + i for i in positions])[0]
        return batch | dict(index=list(positions), y={kind: batch[kind] for kind in ("colour", "appearance", "motion")})


class EntryClips:
    """Real videos: entries of a manifest, y (n,) their classes. segments x crops views of each; with `draw`, an integer, one stretch at a random
    place (and one of the crops). A clip with too few frames is left out, like a damaged one: repeated frames would be a motion that is not there."""

    def __init__(self, entries, y, frames, size, stride, segments=1, crops=1):
        self.entries, self.y, self.frames, self.size, self.stride, self.segments, self.crops = entries, y, frames, size, stride, segments, crops
        self.count, self.views = len(entries), segments * crops

    def squares(self, path, start):                              # -> `crops` arrays (t, size, size, 3), along the longer side
        video, _, _ = data.decode(path, self.frames, self.size, start, self.stride, places=False, whole=self.crops > 1)
        places = [round(place) for place in np.linspace(0, max(video.shape[1:3]) - self.size, self.crops)] if self.crops > 1 else [0]
        return [video[:, p:p + self.size, :self.size] if video.shape[1] > video.shape[2] else video[:, :self.size, p:p + self.size] for p in places]

    def get(self, positions, draw=None):
        videos, kept, bad = [], [], []
        for i in positions:
            entry = self.entries[i]
            starts = np.linspace(0, 1, self.segments) if self.segments > 1 else [0.5]
            if draw is not None:
                rng = np.random.default_rng((*draw, i))
                starts = [rng.random()]
            try:
                views = [square for start in starts for square in self.squares(entry["path"], start)]
            except BadVideo as error:
                bad.append((entry["path"], str(error)))
                continue
            videos += views if draw is None else [views[rng.integers(len(views))]]
            kept.append(i)
        return dict(video=torch.from_numpy(np.stack(videos)) if videos else None, labels=None, index=kept, y={"label": self.y[kept]}, bad=bad)


class Batches(torch.utils.data.Dataset):
    """Batch i of some positions of clips, a pure function of (seed, i): epoch i // len in an order drawn from (seed, epoch); seed None: in order."""

    def __init__(self, clips, positions, batch, seed=None):
        self.clips, self.positions, self.batch, self.seed = clips, list(positions), batch, seed

    def __len__(self):                                           # batches of an epoch
        return -(-len(self.positions) // self.batch)

    def __getitem__(self, i):
        epoch, i = divmod(i, len(self))
        order = range(len(self.positions)) if self.seed is None else np.random.default_rng((self.seed, 6, epoch)).permutation(len(self.positions))
        some = [self.positions[j] for j in order[i * self.batch:(i + 1) * self.batch]]
        return self.clips.get(some, None if self.seed is None else (self.seed, 7, epoch))


class Frozen(NamedTuple):
    """What features are made with."""
    backbone: nn.Module
    segmenter: nn.Module
    side: int                       # pixels that the segmenter was trained on
    key: str                        # tells other weights apart, and other frames, sizes and pixels


@torch.no_grad()
def look(frozen, video, labels, cfg):
    """uint8 (b, t, H, W, 3), labels (b, t, H, W) of made clips or None -> dict: features (b, n, D), logits (b, n, K), truth (b, n) or None."""
    grid = frozen.backbone.grid
    with precision(video.device, cfg.bf16):
        features = frozen.backbone(video)
        x = normalise(video)
        if x.shape[-1] != frozen.side:                           # the same frames, at the size that the segmenter knows
            x = F.interpolate(x.flatten(0, 1), size=(frozen.side, frozen.side), mode="bilinear", antialias=True, align_corners=False).unflatten(0, x.shape[:2])
        seg = frozen.segmenter.segment(x)
    return dict(features=features, logits=resize_logits(seg.logits.float(), seg.grid, grid), truth=None if labels is None else true_ids(labels, grid))


def finish(batch, frozen, device, cfg):
    """A batch as its clips gave it -> the same with features (b·v, n, D), logits, truth on the device; features None: no clip of it can be used."""
    if "features" in batch:
        moved = {k: None if batch[k] is None else batch[k].to(device, non_blocking=True) for k in ("features", "logits", "truth")}
        return batch | {k: x if x is None else x.long() if k == "truth" else x.float() for k, x in moved.items()}
    if "scripts" in batch:
        batch = data.finish(batch, device)
    video, labels = batch.pop("video"), batch.pop("labels")
    return batch | (dict(features=None) if video is None else look(frozen, video.to(device, non_blocking=True), labels, cfg))


# ---------------------------------------------------------------------------------------------------------------------
# The cache: one flat file of rows (clip, view), each features | logits | true ids in half precision, and a JSON index beside it
# ---------------------------------------------------------------------------------------------------------------------

class CachedClips:
    """The rows of a whole cache; `kept`: positions of the clips that could be used. Each process maps the file for itself."""

    def __init__(self, path, record, index):
        self.path, self.record, self.rows, self.count, self.views = path, record, None, index["clips"], index["views"]
        self.y, self.bad = {k: torch.tensor(v) for k, v in index["y"].items()}, index["bad"]
        self.kept = [i for i, y in enumerate(next(iter(self.y.values())).tolist()) if y >= 0]

    def __getstate__(self):
        return self.__dict__ | dict(rows=None)

    def get(self, positions, draw=None):
        positions = list(positions)
        if self.rows is None:
            self.rows = np.memmap(self.path, dtype=self.record, mode="r").reshape(self.count, self.views)
        rows = self.rows[positions]                              # (b, v)
        if draw is not None and self.views > 1:
            rows = rows[range(len(rows)), [np.random.default_rng((*draw, i)).integers(self.views) for i in positions]]
        rows = rows.reshape(-1)
        # copies: what a memory map lends must not be written to, and goes back when the system wants its memory
        fields = {k: torch.from_numpy(np.array(rows[k])) if k in rows.dtype.names else None for k in ("features", "logits", "truth")}
        return fields | dict(index=positions, y={k: y[positions] for k, y in self.y.items()}, bad=[])


def record_of(frozen, truth):
    """One row: (n, D) features, (n, K) logits, and of made clips (n,) true ids. Half precision: 11 bits, on values of the order of 1."""
    n = math.prod(frozen.backbone.grid)
    return np.dtype([("features", "<f2", (n, frozen.backbone.cfg.width)), ("logits", "<f2", (n, frozen.segmenter.cfg.num_queries))] + ([("truth", "i1", (n,))] if truth else []))


def announce(parts, record, folder, cfg):
    """Prints what the caches will hold, and refuses what the disk has no room for. parts: {name: clips}."""
    missing, rows = 0, {}
    for name, clips in parts.items():
        size, done = clips.count * clips.views * record.itemsize, Path(folder) / f"{name}.part"
        rows[name] = size
        if not (Path(folder) / f"{name}.bin").exists():
            missing += size - (done.stat().st_blocks * 512 if done.exists() else 0)
    free = shutil.disk_usage(folder).free
    print("features: " + ", ".join(f"{name} {clips.count} clips" + (f" x {clips.views} views" if clips.views > 1 else "") for name, clips in parts.items())
          + f"; {record.itemsize / 1e3:.0f} kB each, {sum(rows.values()) / 1e9:.3g} GB in {folder} ({missing / 1e9:.3g} still to write, {free / 1e9:.3g} free)")
    if missing > free - 2 ** 28:                                 # a quarter of a GB is left to others
        raise BadInput(f"--cache-dir {folder}: {missing / 1e9:.3g} GB of features do not fit into {free / 1e9:.3g} GB; "
                       "give another --cache-dir, fewer --segments, or --no-cache")


def fill(folder, name, clips, record, frozen, device, cfg):
    """Features of all clips into folder/name.bin, what is there already kept -> CachedClips. Several processes write into one file, each its own
    batches and its own index; the first gives the whole its name.  The index is written after the rows that it tells of are on the disk."""
    rank, world = ranks()
    if isinstance(clips, EntryClips):
        source = [[e["path"] for e in clips.entries], clips.y.tolist(), clips.stride, clips.segments, clips.crops]
    else:
        source = [str(clips.world), clips.begin]
    shape = dict(source=f"{frozen.key} {zlib.crc32(json.dumps(source).encode()):08x}", record=str(record), clips=clips.count, views=clips.views)
    whole, part, told = folder / f"{name}.bin", folder / f"{name}.part", folder / f"{name}.json"
    if (index := read_index(told, shape)) is not None and whole.exists():
        print(f"  {name}: kept from before")
        return CachedClips(whole, record, index)
    mine = folder / f"{name}.{rank}of{world}.json"
    index = read_index(mine, shape) if part.exists() else None
    if world > 1:
        dist.barrier()                                           # all have looked before the first makes the file anew
    index = index or dict(shape, batch=cfg.feature_batch, done=0, y={}, bad=[])
    batches = Batches(clips, range(clips.count), index["batch"])
    if index["done"]:
        print(f"  {name}: goes on at clip {index['done'] * index['batch'] * world}")
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file, sigterm() as asked_to_stop:
        own, saved = len(range(rank, len(batches), world)), time.time()
        bar = tqdm(total=own, initial=index["done"], desc=f"features, {name}", leave=False, disable=None)
        for batch in data.loader(data.Shard(batches, rank, world), index["done"], own, cfg.workers):
            batch = finish(batch, frozen, device, cfg)
            write_rows(file, batch, record, clips, index)
            index["done"] += 1
            bar.update(1)
            stop = asked_to_stop()
            if stop or index["done"] == own or time.time() - saved > 5:
                file.flush()
                os.fsync(file.fileno())
                write_json(mine, index)
                saved = time.time()
            if stop:
                print(f"stopped by SIGTERM: features of {name} so far are kept; --resume goes on from there", flush=True)
                raise SystemExit(143)
        bar.close()
        file.truncate(clips.count * clips.views * record.itemsize)           # the last clips may be damaged, and then were not written
    if not own:
        write_json(mine, index)
    if world > 1:
        dist.barrier()
    if not rank:
        y, bad = {}, []
        for r in range(world):
            one = json.loads((folder / f"{name}.{r}of{world}.json").read_text())
            bad += one["bad"]
            for kind, values in one["y"].items():
                y.setdefault(kind, [-1] * clips.count)           # -1: a clip that cannot be used
                for i, value in values.items():
                    y[kind][int(i)] = value
        os.replace(part, whole)
        write_json(told, shape | dict(y=y, bad=bad))
        for r in range(world):
            (folder / f"{name}.{r}of{world}.json").unlink()
    if world > 1:
        dist.barrier()
    index = json.loads(told.read_text())
    if not index["y"]:
        raise BadInput(f"--data {cfg.data}: not one clip of {name} can be used; the last: {index['bad'][-1][1]}")
    return CachedClips(whole, record, index)


def read_index(path, shape):
    """An index that tells of the same features, or None."""
    if not path.exists():
        return None
    index = json.loads(path.read_text())
    if any(index.get(k) != v for k, v in shape.items()):
        print(f"  {path.stem}: made of other clips or by other weights: again")
        return None
    return index


def write_rows(file, batch, record, clips, index):
    index["bad"] += batch["bad"]
    if batch["features"] is None:
        return
    rows = np.zeros(len(batch["features"]), record)
    for field in record.names:
        rows[field] = batch[field].cpu().numpy()
    if not np.isfinite(rows["features"]).all():
        raise BadInput("features that half precision cannot hold (not finite, or above 65504); --no-cache")
    for i, views in zip(batch["index"], rows.reshape(-1, clips.views)):
        try:
            os.pwrite(file.fileno(), views.tobytes(), i * clips.views * record.itemsize)             # not through a map: a full disk is an error, not a SIGBUS
        except OSError as error:
            raise BadInput(f"{file.name}: cannot be written ({error.strerror}); make room, or give another --cache-dir; --resume goes on") from None
    for kind, y in batch["y"].items():
        index["y"].setdefault(kind, {}).update(zip(map(str, batch["index"]), y.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# A small VideoMAE, pre-trained here
# ---------------------------------------------------------------------------------------------------------------------

def tube_mask(count, cells, share, rng):
    """int64 (count, kept): the cells of the frame that stay visible, drawn anew for each clip and the same in all its time steps ("tubes": else
    what is hidden now could be copied from a moment ago). kept = (1 - share) cells, rounded, at least 1."""
    kept = max(round(cells * (1 - share)), 1)
    return torch.from_numpy(np.sort(rng.random((count, cells)).argsort(1)[:, :kept], 1))


def normalised_pixels(tubes):
    """tubes (b, n, 3·p) -> the same, each tubelet's each colour at mean 0 and deviation 1 (VideoMAE's target: structure, not brightness).
    CHOICE: 1e-3 is added to the variance (two grey levels): most of a made ground is flat, and its rounding errors would be blown up to targets."""
    x = rearrange(tubes, "b n (c p) -> b n c p", c=3)
    var, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
    return rearrange((x - mean) / (var + 1e-3).sqrt(), "b n c p -> b n (c p)")


class MaskedAutoencoder(nn.Module):
    """VideoMAE's pre-training: the encoder sees the visible tubelets alone, a small decoder all places, and the loss is on what was hidden."""

    def __init__(self, encoder, layers, width):
        super().__init__()
        self.encoder, n = encoder, math.prod(encoder.grid)
        self.narrow, self.hole = nn.Linear(encoder.cfg.width, width), nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("places", sinusoid(n, width), persistent=False)
        self.blocks = nn.ModuleList(Layer(width, width // 32) for _ in range(layers))
        self.norm, self.pixels = nn.LayerNorm(width), nn.Linear(width, encoder.patch_embed["proj"].weight[0].numel())
        nn.init.normal_(self.pixels.weight, std=1e-3)            # starts at the mean of every tubelet: a loss of 1, not of 1 + noise
        nn.init.zeros_(self.pixels.bias)

    def forward(self, video, visible):
        """video uint8 (b, t, H, W, 3), visible (b·r, kept) from tube_mask: r masks of each clip, one after another
        -> loss, prediction (b·r, n, 3·p), target (b·r, n, 3·p), hidden bool (b·r, n), True = the encoder did not see it."""
        encoder, (t, h, w) = self.encoder, self.encoder.grid
        tubes = encoder.tubes(normalise(video, encoder.cfg.mean, encoder.cfg.std))
        tubes = tubes.repeat_interleave(len(visible) // len(tubes), 0)
        seen = (visible[:, None] + h * w * torch.arange(t, device=visible.device)[:, None]).flatten(1)           # (b, t·kept) of the n places
        take = lambda x: x.gather(1, seen[..., None].expand(-1, -1, x.shape[-1]))
        z = encoder.encode(encoder.project(take(tubes)) + encoder.positions[seen])
        y = self.narrow(z)
        y = self.hole.to(y.dtype).expand(len(y), t * h * w, -1).scatter(1, seen[..., None].expand(-1, -1, y.shape[-1]), y) + self.places
        for block in self.blocks:
            y = block(y)
        prediction, target = self.pixels(self.norm(y)).float(), normalised_pixels(tubes)
        hidden = torch.ones(target.shape[:2], dtype=torch.bool, device=y.device).scatter(1, seen, False)
        loss = ((prediction - target).square().mean(-1) * hidden).sum() / hidden.sum()
        return loss, prediction, target, hidden


def nano_shape(cfg):
    return dataclasses.replace(BACKBONES["nano"], image_size=cfg.image_size, frames=cfg.frames)


def pretrain_videomae(cfg, folder, device):
    """The nano VideoMAE on the procedural world -> folder/videomae/, which load_backbone reads."""
    rank, world = ranks()
    torch.manual_seed(cfg.seed)
    shape = nano_shape(cfg)
    model = MaskedAutoencoder(VideoMAE(shape), cfg.decoder_layers, cfg.decoder_width)
    run = part_of(cfg, folder, "videomae", {"backbone": dataclasses.asdict(shape)})
    model.to(device)
    optimizer, began = make_optimizer(model, cfg), time.time()
    start, cells = run.restore(model, optimizer), shape.grid[1] * shape.grid[2]
    clips = shard(data.WorldBatches(world_of(cfg), cfg.batch, data.TRAIN + cfg.seed % 49 * 10_000_000))
    print(f"VideoMAE: {sum(p.numel() for p in model.encoder.parameters()) / 1e6:.2f} M parameters, a decoder of {sum(p.numel() for n, p in model.named_parameters() if not n.startswith('encoder.')) / 1e6:.2f} M; "
          f"{100 * cfg.mask:.0f} % of {cells} tubes hidden, {cfg.masks} masks a clip")
    with sigterm() as asked_to_stop:
        for step, batch in zip(range(start, cfg.steps), data.loader(clips, start, cfg.steps, cfg.workers)):
            stop_if_asked(asked_to_stop, run, model, optimizer, step, device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg) * group["scale"]
            video = data.finish(batch, device)["video"]
            visible = tube_mask(cfg.masks * len(video), cells, cfg.mask, np.random.default_rng((cfg.seed, 8, step * world + rank))).to(device)
            model.train()
            optimizer.zero_grad()
            with precision(device, cfg.bf16):
                loss, _, target, hidden = model(video, visible)
            (loss / world).backward()
            sum_gradients(model.parameters())
            # what predicting every tubelet's mean would score: the loss of an untrained model; 1 where nothing is flat
            values = dict(zip(("loss", "even_guess"), total([loss.item() / world, target[hidden].square().mean().item() / world], device)))
            values["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
            check_finite(values, step)
            optimizer.step()
            run.record(dict(step=step, **values, lr=learning_rate(step, cfg), seconds=round(time.time() - began, 2)))
            if step % 20 == 0 or step == cfg.steps - 1:
                print(f"step {step:5d}/{cfg.steps}  masked pixels {values['loss']:.3f} (untrained {values['even_guess']:.3f})  "
                      f"{cfg.batch * world * (step + 1 - start) / (time.time() - began):.0f} clips/s  {time.time() - began:.0f} s", flush=True)
            if (step + 1) % cfg.save_every == 0 or step == cfg.steps - 1:
                run.save(model, optimizer, step + 1)
    if not rank:
        model.eval()
        plot(run.folder / "curves.png", {"masked pixels": [(line["step"], line["loss"]) for line in run.history()]})
        draw_reconstruction(run.folder / "reconstruction.png", model, data.finish(data.WorldBatches(world_of(cfg), 3, data.VALIDATION)[0], device)["video"], cfg)
        write_weights(run.folder / "model.safetensors", model.encoder.state_dict())                  # last: it says that all is done
    if world > 1:
        dist.barrier()


@torch.no_grad()
def draw_reconstruction(path, model, video, cfg):
    """Of each clip: some frames, what the encoder saw of them, and what the decoder made of that, at the true mean and deviation of each tubelet."""
    encoder, (t, h, w) = model.encoder, model.encoder.grid
    visible = tube_mask(len(video), h * w, cfg.mask, np.random.default_rng(9)).to(video.device)
    _, prediction, _, hidden = model(video, visible)
    tubes = encoder.tubes(video.permute(0, 1, 4, 2, 3).float())
    x = rearrange(tubes, "b n (c p) -> b n c p", c=3)
    std = torch.tensor(encoder.cfg.std, device=x.device)[:, None] * 255
    deviation = (x.var(-1, keepdim=True, unbiased=False) + 1e-3 * std ** 2).sqrt()                   # in grey levels, as the target's
    guess = (rearrange(prediction, "b n (c p) -> b n c p", c=3) * deviation + x.mean(-1, keepdim=True)).flatten(2)
    rows = (tubes, torch.where(hidden[..., None], 128.0, tubes), torch.where(hidden[..., None], guess, tubes))
    back = lambda y: rearrange(y, "b (t h w) (c u p q) -> b (t u) (h p) (w q) c", t=t, h=h, c=3, u=encoder.cfg.tubelet, p=encoder.cfg.patch).clamp(0, 255).byte().cpu().numpy()
    some = np.linspace(0, cfg.frames - 1, min(4, cfg.frames)).round().astype(int)
    sheets = [np.concatenate([np.concatenate(list(clip[some]), 1) for clip in clips], 0) for clips in zip(*map(back, rows))]
    sheet = np.concatenate([np.pad(s, ((4, 4), (4, 4), (0, 0)), constant_values=255) for s in sheets], 1)
    scale = max(1, 128 // cfg.image_size)
    write_png(path, sheet.repeat(scale, 0).repeat(scale, 1))


def pretrain_segmenter(cfg, folder):
    """`trajtok.py pretrain` on the same world -> folder/segmenter-nano/."""
    target = Path(folder) / "segmenter-nano"
    if (target / "result.json").exists() and cfg.resume:
        return target
    flags = dict(size="nano", steps=cfg.segmenter_steps, warmup=min(20, cfg.segmenter_steps // 2), image_size=cfg.image_size, frames=cfg.frames, max_objects=cfg.max_objects, seed=cfg.seed,
                 out=folder, name="nano", device=cfg.device, workers=cfg.workers, save_every=cfg.save_every, batch=min(32, cfg.batch), eval_clips=min(64, cfg.valid_clips))
    argv = [part for key, value in flags.items() for part in ("--" + key.replace("_", "-"), value)] + ["--shared-colours" if cfg.shared_colours else "--no-shared-colours"]
    argv += ["--resume"] if cfg.resume and (target / "config.json").exists() else ["--overwrite"]
    trajtok.pretrain([str(a) for a in argv])
    return target


# ---------------------------------------------------------------------------------------------------------------------
# The clips of a run: which are learnt from, chosen by, reported on
# ---------------------------------------------------------------------------------------------------------------------

def labelled_entries(path, wanted):
    """Entries of a manifest that have a label (one of `wanted`, if any are)."""
    entries = data.read_manifest(path)
    without = [e["path"] for e in entries if not e["label"]]
    if without:
        raise BadInput(f"--data {path}: {len(without)} of {len(entries)} entries have no label, the first {without[0]}; give each a \"label\"")
    if wanted and (missing := [l for l in wanted if not any(e["label"] == l for e in entries)]):
        raise BadInput(f"--labels {','.join(missing)}: no entry of {path} has this label; it has {', '.join(sorted({e['label'] for e in entries})[:20])}")
    return [e for e in entries if not wanted or e["label"] in wanted]


def split_by_class(entries, share, salt=""):
    """trajtok.split_entries of each class by itself, so that none is held out that nothing can be learnt of: (training, held out)."""
    parts = [split_entries([e for e in entries if e["label"] == label], share, salt) for label in sorted({e["label"] for e in entries})]
    return tuple(sum(side, []) for side in zip(*parts))


def splits(cfg):
    """--data and its kin -> entries, and folds: [(train, valid, test)], each a list of positions in entries. By the first rule that applies:
      1. --test (and --valid): sets of their own
      2. entries that say "split": train, valid, test
      3. entries that all say "group" (a person, a scene), 3 groups at least: each is tested on in turn, the next one is chosen by, the others
         are learnt from; of more than ten groups, ten bunches of them
      4. a fifth of each class's videos is tested on, by a hash of their names
    Where nothing says what to choose by, it is a tenth of each class's training videos, by such a hash."""
    wanted = cfg.labels.split(",") if cfg.labels else None
    entries = labelled_entries(cfg.data, wanted)
    place = {id(e): i for i, e in enumerate(entries)}
    positions = lambda some: [place[id(e)] for e in some]

    def with_valid(train, test):
        learnt, valid = split_by_class(train, 0.1, "valid") if train else ((), ())
        if not valid or not test:
            raise BadInput(f"--data {cfg.data}: {len(train)} training and {len(test)} test videos; at least two videos of a class are needed to learn from, and one to test on")
        return positions(learnt), positions(valid), positions(test)
    if cfg.test:
        other = {name: labelled_entries(path, wanted) for name, path in (("valid", cfg.valid), ("test", cfg.test)) if path}
        train, both = entries, entries + [e for some in other.values() for e in some]
        place |= {id(e): i for i, e in enumerate(both)}
        folds = [with_valid(train, other["test"]) if "valid" not in other else (positions(train), positions(other["valid"]), positions(other["test"]))]
        entries = both
    elif any("split" in e for e in entries):
        parts = {name: [e for e in entries if e.get("split") == name] for name in ("train", "valid", "test")}
        if not (parts["train"] and parts["test"]) or sum(map(len, parts.values())) < len(entries):
            raise BadInput(f"--data {cfg.data}: {', '.join(f'{len(some)} {name}' for name, some in parts.items())} of {len(entries)} entries by their \"split\"; "
                           "give every entry one, train and test at least once")
        folds = [tuple(positions(parts[name]) for name in ("train", "valid", "test"))] if parts["valid"] else [with_valid(parts["train"], parts["test"])]
    elif all("group" in e for e in entries) and len(names := sorted({e["group"] for e in entries})) > 2:
        bunch, count = {name: i % 10 for i, name in enumerate(names)}, min(len(names), 10)
        of = [bunch[e["group"]] for e in entries]
        folds = [tuple([i for i, b in enumerate(of) if (b - turn) % count in kind] for kind in (range(2, count), (1,), (0,))) for turn in range(count)]
    else:
        folds = [with_valid(*split_by_class(entries, 0.2))]
    check_folds(cfg, entries, folds)
    return entries, folds


def check_folds(cfg, entries, folds):
    names = sorted({e["label"] for e in entries})
    if len(names) < 2:
        raise BadInput(f"--data {cfg.data}: one class alone, {names[0]!r}; a probe needs two at least")
    for train, valid, test in folds:
        known, where = {entries[i]["label"] for i in train}, f"--data {cfg.data}" + (f", group {entries[test[0]]['group']} tested on" if len(folds) > 1 else "")
        unseen = sorted({entries[i]["label"] for i in (*valid, *test)} - known)
        if unseen:
            raise BadInput(f"{where}: {len(unseen)} labels are in no training video, the first {unseen[0]!r}; leave them out with --labels {','.join(sorted(known)[:8])}")
        learnt, chosen, tested = ({os.path.realpath(entries[i]["path"]) for i in part} for part in (train, valid, test))
        twice = learnt & (chosen | tested) | chosen & tested
        if twice:
            raise BadInput(f"{where}: {len(twice)} videos are in two of the sets to learn from, to choose by and to test on, the first {min(twice)}; leave them out of one")


class Source(NamedTuple):
    parts: dict                     # train, valid, test -> clips
    folds: list                     # [(train, valid, test)]: positions in those clips
    tasks: dict                     # {kind: names of its classes}


def open_source(cfg, read):
    """read: what `splits` gave, or None of the procedural world."""
    if read is None:
        # far up the training range, where no pre-training gets; validation and test have ranges of their own
        begins = dict(train=(500_000_000, cfg.train_clips), valid=(data.VALIDATION, cfg.valid_clips), test=(data.TEST, cfg.test_clips))
        parts = {name: WorldClips(world_of(cfg), *where) for name, where in begins.items()}
        return Source(parts, [tuple(list(range(clips.count)) for clips in parts.values())], dict(colour=list(data.COLOURS), appearance=list(data.SHAPES), motion=list(data.MOTIONS)))
    entries, folds = read
    names = sorted({e["label"] for e in entries})
    y = torch.tensor([names.index(e["label"]) for e in entries])
    parts, own = {}, []
    for j, (name, views) in enumerate((("train", (cfg.train_segments, 1)), ("valid", (1, 1)), ("test", (cfg.segments, cfg.crops)))):
        used = sorted({i for fold in folds for i in fold[j]})
        parts[name] = EntryClips([entries[i] for i in used], y[used], cfg.frames, cfg.image_size, cfg.stride, *views)
        own.append({i: n for n, i in enumerate(used)})
    return Source(parts, [tuple([own[j][i] for i in fold[j]] for j in range(3)) for fold in folds], dict(label=names))


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing heads
# ---------------------------------------------------------------------------------------------------------------------

class Setting(NamedTuple):
    row: str
    lr: float
    weight_decay: float


def settings_of(rows, grid):
    """Every row with every (learning rate, weight decay), each once. CHOICE: the linear head also at ten times the rates. In the default run five epochs at
    1e-3, 2e-3, 1e-2, 2e-2 bring it to 18, 20, 26, 26 % of the colours of the validation clips (heads-0-0/result.json): the grid of the others would be unfair to it."""
    found = []
    for row in rows:
        found += [Setting(row, lr, decay) for lr, decay in grid]
        found += [Setting(row, float(f"{10 * lr:.6g}"), decay) for lr, decay in grid if row == "linear"]         # ten times 3e-4 is 3e-3, not 2.9999999999999996e-3
    return list(dict.fromkeys(found))


class Schedule(NamedTuple):
    """What trajtok.learning_rate reads; lr 1: a factor for each head's own."""
    steps: int
    warmup: int
    lr: float = 1.0


def heads_of(settings, seed, frozen, tasks, cfg):
    """A head for each setting; those of one row start alike, so that nothing but the setting tells them apart. CHOICE: with two kinds of classes a head
    answers both at once, by a row of scores for each: half the work, the same for all heads."""
    heads = nn.ModuleList()
    for setting in settings:
        torch.manual_seed(seed)
        heads.append(new_head(setting.row, frozen.backbone.cfg.width, sum(map(len, tasks.values())), frozen.segmenter.cfg.num_queries, cfg))
    return heads


def optimizer_of(heads, settings):
    """One AdamW for all; each group keeps its head's own rate as `peak`. Weight decay on matrices alone."""
    groups = [dict(params=[p for p in head.parameters() if (p.dim() > 1) == matrix], peak=s.lr, weight_decay=s.weight_decay if matrix else 0.0)
              for head, s in zip(heads, settings) for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=1.0)


def pooled_by(batch, grid):
    """A finished batch -> {row: Segmentation or None}."""
    seg = as_segmentation(batch["logits"], grid)
    true = None if batch["truth"] is None else oracle(batch["truth"], batch["index"], grid)
    return dict(linear=None, attentive=None, trajadapter=seg, oracle=true)


def step_heads(heads, settings, batch, count, m, tasks, grid, device, cfg):
    """One step's gradients of every head on one batch, their losses (heads,): the sum of both kinds' cross-entropies, a mean over `count` clips, those of
    all processes. CHOICE: a plain loop over heads; the features, which are what is large, are read once for all. Stacked by torch.func.vmap, four attentive
    heads took 898 ms a step instead of 738 (nano, 32 clips, one core), four linear ones 0.4 instead of 0.6; and the blocks of a
    trajectory encoder differ in number from batch to batch, which vmap does not take."""
    losses = torch.zeros(len(heads), device=device)
    if batch["features"] is not None:
        masks, y = pooled_by(batch, grid), {kind: y.to(device) for kind, y in batch["y"].items()}
        for i, (head, setting) in enumerate(zip(heads, settings)):
            with precision(device, cfg.bf16):
                scores = head(batch["features"], masks[setting.row], m).float().split([len(names) for names in tasks.values()], -1)
            loss = sum(F.cross_entropy(s, y[kind], reduction="sum") for kind, s in zip(tasks, scores)) / count
            loss.backward()
            losses[i] = loss.detach()
    sum_gradients(heads.parameters())
    return losses


def train_heads(settings, clips, positions, seed, folder, name, frozen, tasks, device, cfg):
    """All settings' heads at once: every head sees the same batches, and the same number of tokens a trajectory in each step
    (PAPER: drawn at random while training). -> ModuleList, on the device."""
    rank, world = ranks()
    heads = heads_of(settings, seed, frozen, tasks, cfg).to(device)
    optimizer = optimizer_of(heads, settings)
    run = part_of(cfg, folder, name, {"settings": [" ".join(map(str, s)) for s in settings]})
    start, began, damage = run.restore(heads, optimizer), time.time(), Damage()
    batches = Batches(clips, positions, cfg.head_batch, seed)
    steps = -(-cfg.epochs * len(batches) // world)
    schedule = Schedule(steps, round(cfg.head_warmup * steps))
    with sigterm() as asked_to_stop:
        for step, batch in zip(range(start, steps), data.loader(shard(batches), start, steps, cfg.workers)):
            stop_if_asked(asked_to_stop, run, heads, optimizer, step, device)
            damage.add(batch["bad"], len(positions) + 1)
            batch = finish(batch, frozen, device, cfg)
            count = total([0 if batch["features"] is None else len(batch["index"])], device)[0]
            if not count:
                continue
            factor, m = learning_rate(step, schedule), int(np.random.default_rng((seed, 5, step)).choice(cfg.choices))
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            heads.train()
            optimizer.zero_grad()
            losses = step_heads(heads, settings, batch, count, m, tasks, frozen.backbone.grid, device, cfg)
            for head in heads:                                   # each by itself: one head's gradient must not shrink another's
                nn.utils.clip_grad_norm_(head.parameters(), cfg.clip)
            optimizer.step()
            losses = total(losses.tolist(), device)
            line = {row: min(loss if math.isfinite(loss) else math.inf for s, loss in zip(settings, losses) if s.row == row) for row in dict.fromkeys(s.row for s in settings)}
            run.record(dict(step=step, losses=[loss if math.isfinite(loss) else None for loss in losses], tokens=m, factor=factor, clips=int(count), seconds=round(time.time() - began, 2)))
            if step % 50 == 0 or step == steps - 1:
                print(f"{name}  step {step:5d}/{steps}  " + "  ".join(f"{row} {loss:.3f}" for row, loss in line.items()) + f"  {time.time() - began:.0f} s", flush=True)
            if (step + 1) % cfg.save_every == 0 or step == steps - 1:
                run.save(heads, optimizer, step + 1)
    return heads.eval()


@torch.no_grad()
def confusions(wanted, heads, settings, clips, positions, frozen, tasks, device, cfg):
    """wanted: [(number of a head, tokens a trajectory)] -> {(number, tokens): {kind: int64 (true, predicted)}} over all processes. A clip's
    probabilities are the mean of its views'."""
    rank, world = ranks()
    heads.eval()
    sizes = [len(names) for names in tasks.values()]
    found = {key: {kind: torch.zeros(n, n, dtype=torch.int64) for kind, n in zip(tasks, sizes)} for key in wanted}
    batches = Batches(clips, positions, max(cfg.head_batch // clips.views, 1))
    for batch in data.loader(shard(batches), 0, len(range(rank, len(batches), world)), cfg.workers):
        batch = finish(batch, frozen, device, cfg)
        if batch["features"] is None:
            continue
        batch["index"] = np.repeat(batch["index"], clips.views)
        masks = pooled_by(batch, frozen.backbone.grid)
        for i, m in wanted:
            with precision(device, cfg.bf16):
                scores = heads[i](batch["features"], masks[settings[i].row], m).float().split(sizes, -1)
            for (kind, y), s in zip(batch["y"].items(), scores):
                p = reduce(s.softmax(-1), "(b v) c -> b c", "mean", v=clips.views).argmax(-1).cpu()  # softmax over the classes
                found[i, m][kind].view(-1).index_add_(0, y * len(tasks[kind]) + p, torch.ones_like(p))
    flat = total([float(x) for kinds in found.values() for c in kinds.values() for x in c.flatten().tolist()], device)
    for kinds in found.values():
        for kind, c in kinds.items():
            kinds[kind], flat = torch.tensor(flat[:c.numel()], dtype=torch.float64).long().view(c.shape), flat[c.numel():]
    return found


def accuracy(confusion):
    return confusion.diagonal().sum().item() / max(confusion.sum().item(), 1)


def one_seed(settings, chosen, seed, fold, number, source, parts, folder, frozen, device, cfg):
    """Trains, chooses on validation clips if nothing is chosen yet, reports on test clips. -> dict(chosen {row: setting}, valid, test {line of
    the table: {kind: confusion}}), kept in the run's folder."""
    name = f"heads-{number}-{seed}"
    path = folder / name / "result.json"
    if not (cfg.resume and path.exists()):
        heads = train_heads(settings, parts["train"], fold[0], seed, folder, name, frozen, source.tasks, device, cfg)
        lines = variants(dict.fromkeys(s.row for s in settings), cfg.choices)
        whole = [all(bool(p.isfinite().all()) for p in head.parameters()) for head in heads]
        wanted = [(i, m) for i, s in enumerate(settings) for row, m in lines if row == s.row and whole[i]]
        valid = confusions(wanted, heads, settings, parts["valid"], fold[1], frozen, source.tasks, device, cfg) if chosen is None else {}
        valid = {key: {kind: accuracy(c) for kind, c in kinds.items()} for key, kinds in valid.items()}
        picked = {row: best_setting(row, settings, valid) for row in dict.fromkeys(row for row, _ in lines)} if chosen is None else chosen
        where = {row: settings.index(setting) for row, setting in picked.items()}
        if broken := [settings[i] for i in where.values() if not whole[i]]:
            raise BadInput(f"seed {seed}: the {broken[0].row} head of the chosen learning rate {broken[0].lr:g} has diverged; give lower --lrs")
        test = confusions([(where[row], m) for row, m in lines], heads, settings, parts["test"], fold[2], frozen, source.tasks, device, cfg)
        if not ranks()[0]:
            write_json(path, dict(settings=settings, chosen=picked, valid=[dict(setting=settings[i], tokens=m, **kinds) for (i, m), kinds in valid.items()],
                                  diverged=[s for s, ok in zip(settings, whole) if not ok],
                                  test={called(row, m): {kind: c.tolist() for kind, c in test[where[row], m].items()} for row, m in lines}))
        if ranks()[1] > 1:
            dist.barrier()
    result = json.loads(path.read_text())
    return result | dict(chosen={row: Setting(*setting) for row, setting in result["chosen"].items()})


def best_setting(row, settings, valid):
    """The setting of a row that does best on validation clips, in the mean over kinds of classes and tokens a trajectory; of equals the first."""
    scores = {s: [np.mean(list(kinds.values())) for (i, _), kinds in valid.items() if settings[i] == s] for s in settings if s.row == row}
    scores = {s: float(np.mean(values)) for s, values in scores.items() if values}
    if not scores:
        raise BadInput(f"every {row} head has diverged; give lower --lrs than {', '.join(f'{s.lr:g}' for s in settings if s.row == row)}")
    return max(scores, key=scores.get)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def milliseconds(work, count, device, repeats=5):
    """Of a clip, in a batch of `count`: the median of some runs of work(), after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[1:])) / count


@torch.no_grad()
def measure(source, parts, frozen, device, cfg):
    """Milliseconds a clip and parameters of each line's head and of what is frozen; over the first 256 test clips live trajectories, and in the made
    world the mean best IoU of the true objects on the backbone's grid."""
    grid, rows, facts, live, overlaps = frozen.backbone.grid, {}, {}, [], []
    batches = Batches(parts["test"], source.folds[0][2][:256], max(32 // parts["test"].views, 1))
    for i in range(len(batches)):
        batch = finish(batches[i], frozen, device, cfg)
        if (x := batch["features"]) is None:
            continue
        batch["index"] = np.repeat(batch["index"], parts["test"].views)
        masks = pooled_by(batch, grid)
        for row, m in variants(cfg.rows.split(","), cfg.choices) if not rows else ():
            head = heads_of([Setting(row, 0, 0)], 0, frozen, source.tasks, cfg)[0].to(device).eval()
            with precision(device, cfg.bf16):
                rows[called(row, m)] = dict(parameters=sum(p.numel() for p in head.parameters()), ms=milliseconds(lambda: head(x, masks[row], m), len(x), device))
        live += masks["trajadapter"].alive.sum(1).tolist()
        if batch["truth"] is not None:                           # ids of objects begin after those of grounds
            overlaps += best_overlaps(*(ids.view(len(ids), *grid) for ids in (masks["trajadapter"].ids, batch["truth"])), data.MAX_GROUNDS)
    video = torch.zeros(16, cfg.frames, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8, device=device)
    with precision(device, cfg.bf16):
        facts["backbone_ms"] = milliseconds(lambda: frozen.backbone(video), len(video), device)
        facts["segmenter_ms"] = milliseconds(lambda: frozen.segmenter(video[:, :, :1, :1].expand(-1, -1, frozen.side, frozen.side, -1)), len(video), device)
    return rows, facts | dict(live_trajectories=float(np.mean(live)), object_iou=float(np.mean(overlaps)) if overlaps else None)


def summary(results, source, rows):
    """results {fold: [result of each seed]} -> {line: dict(accuracy {kind: [of each seed, over all folds]}, confusion {kind: (C, C) of all seeds},
    parameters, ms, chosen)}."""
    lines = {}
    for line, facts in rows.items():
        counts = {kind: [sum(torch.tensor(of_seeds[n]["test"][line][kind]) for of_seeds in results) for n in range(len(results[0]))] for kind in source.tasks}
        lines[line] = facts | dict(accuracy={kind: [accuracy(c) for c in seeds] for kind, seeds in counts.items()}, confusion={kind: sum(seeds) for kind, seeds in counts.items()},
                                   chosen=[of_seeds[0]["chosen"][line.split()[0]] for of_seeds in results])
    return lines


def table(lines, tasks, choice):
    """-> lines of text: mean +- deviation over the seeds, in percent."""
    cells = [["", *(f"{kind} %" for kind in tasks), "parameters", "ms a clip"]]
    for name, line in lines.items():
        cells.append([name, *(spread_of(100 * np.array(line["accuracy"][kind])) for kind in tasks), f"{line['parameters'] / 1e6:.3f} M", f"{line['ms']:.3f}"])
    cells.append(["most frequent class", *(f"{100 * choice[kind]:.1f}" for kind in tasks), "", ""])
    return aligned(cells)


def draw_confusions(path, lines, tasks):
    """A picture: a row of matrices for each kind of classes, one for each line of the table: true class downwards, predicted to the right, dark = often."""
    bands, shown = [], {name: line for name, line in lines.items() if name == [n for n in lines if n.split()[0] == name.split()[0]][-1]}     # of a row the last
    for kind, names in tasks.items():
        side, label = max(1, min(14, 400 // len(names))), 90 if len(names) <= 40 else 8
        panels = []
        for name, line in shown.items():
            c = line["confusion"][kind].numpy().astype(float)
            dark = (255 * (1 - c / c.sum(1, keepdims=True).clip(1))).astype(np.uint8).repeat(side, 0).repeat(side, 1)
            panel = np.full((26 + len(dark) + 8, max(label + len(dark) + 10, 8 * len(name) + 20), 3), 255, np.uint8)
            panel[26:26 + len(dark), label:label + len(dark), 0] = panel[26:26 + len(dark), label:label + len(dark), 1] = dark
            write_text(panel, name, 2, label)
            write_text(panel, f"{kind} {spread_of(100 * np.array(line['accuracy'][kind]))}", 14, label, scale=1)
            for i, text in enumerate(names if len(names) <= 40 else ()):
                write_text(panel, text[:20], 26 + i * side + max(side - 5, 0) // 2, 4, scale=1)
            panels.append(panel)
        bands += [np.concatenate(panels[i:i + 4], 1) for i in range(0, len(panels), 4)]
    width = max(band.shape[1] for band in bands)                 # panels of one kind are equally high
    write_png(path, np.concatenate([np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=255) for band in bands], 0))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def part_of(cfg, folder, name, extra=None):
    """A run within the run: its log, its checkpoint; of a resumed run it goes on, or begins if it had not."""
    return Run(dataclasses.replace(cfg, out=str(folder), resume=cfg.resume and (folder / name / "config.json").exists()), name, extra, told=False)


def stop_if_asked(asked_to_stop, run, model, optimizer, step, device):
    """SIGTERM: one process was told: all save, and end at the same step."""
    if total([float(asked_to_stop())], device)[0]:
        run.save(model, optimizer, step)
        print(f"stopped by SIGTERM before step {step}: saved; --resume goes on from there", flush=True)
        if ranks()[1] > 1:
            dist.destroy_process_group()
        raise SystemExit(143)


def given_backbone(cfg):
    """--backbone, at the clip that the flags ask for. CHOICE: of a V-JEPA2, whose configuration says 64 frames, 16, the published probes' number."""
    net = load_backbone(cfg.backbone)
    own = net.cfg
    size, frames = cfg.image_size or own.image_size, cfg.frames or min(own.frames, 16)
    if own.kind == "videomae" and (size, frames) != (own.image_size, own.frames):
        raise BadInput(f"--image-size {size} --frames {frames}: the backbone in {cfg.backbone} takes {own.frames} frames of {own.image_size} px and nothing else; leave the flags out")
    net.cfg = dataclasses.replace(own, image_size=size, frames=frames)       # of rotary positions: no weight depends on it
    if net.left_out:
        print(f"{cfg.backbone}: left out: {net.left_out}")
    return net


def given_segmenter(path):
    """--tokenizer -> Segmenter, pixels of a side that it was trained on."""
    if Path(path).is_file():
        return load_official_segmenter(path), 224
    tokenizer = TrajTok.from_pretrained(path)
    return tokenizer.segmenter, tokenizer.cfg.image_size


def resolve(cfg, net):
    shape = BACKBONES["nano"] if net is None else net.cfg
    return dataclasses.replace(cfg, image_size=cfg.image_size or shape.image_size, frames=cfg.frames or shape.frames)


def frozen_key(net, segmenter, side, bf16):
    """What tells features apart: a checksum of all weights, and all else that they depend on: frames, sizes, pixels of the backbone, the segmenter's side."""
    crc = zlib.crc32(f"{net.cfg} {side} {bf16}".encode())
    for module in (net, segmenter):
        for key, value in module.state_dict().items():
            crc = zlib.crc32(np.ascontiguousarray(value.detach().cpu().float().numpy()), zlib.crc32(key.encode(), crc))
    return f"{crc:08x}"


def train(cfg):
    began, device = time.time(), setup(cfg)
    meet(device)
    rank, world = ranks()
    # 1. what is given: refused before anything is written
    read = None if cfg.data == "world" else splits(cfg)
    if cfg.size == "full" and not (cfg.backbone and cfg.tokenizer):
        raise BadInput("--size full: needs --backbone and --tokenizer (`python trajtok.py pretrain` makes one); what is pre-trained here is small: --size nano")
    if world > 1 and not cfg.tokenizer:
        raise BadInput("several processes: give --tokenizer; `python trajtok.py pretrain` makes one, in one process")
    net = given_backbone(cfg) if cfg.backbone else None
    cfg = resolve(cfg, net)
    segmenter = given_segmenter(cfg.tokenizer) if cfg.tokenizer else None
    shape = nano_shape(cfg) if net is None else net.cfg
    if segmenter is None:
        dataclasses.replace(SIZES["nano"], image_size=cfg.image_size, frames=cfg.frames)             # refuses what its strides do not divide
    with torch.device("meta"):
        for row in cfg.rows.split(","):                          # ... and heads that do not divide a width
            new_head(row, shape.width, 2, 2, cfg)
    results_folder(cfg.results)
    if read is not None:
        cfg = dataclasses.replace(cfg, rows=",".join(r for r in cfg.rows.split(",") if r != "oracle"))       # real videos have no true masks
    if not cfg.rows:
        raise BadInput("--rows oracle: the true masks are those of made clips; give another row")
    data_name = run_name(cfg)
    run = Run(cfg, f"adapter-{data_name}")
    folder, seconds = run.folder, {}
    # 2. what is not: pre-trained now
    if net is None:
        mark = time.time()
        if not (cfg.resume and (folder / "videomae" / "model.safetensors").exists()):
            pretrain_videomae(cfg, folder, device)
        net = load_backbone(folder / "videomae")
        seconds["videomae"] = time.time() - mark
    if segmenter is None:
        mark, path = time.time(), pretrain_segmenter(cfg, folder)
        segmenter = given_segmenter(path)
        seconds["segmenter"] = time.time() - mark
    frozen = Frozen(net.to(device).eval().requires_grad_(False), segmenter[0].to(device).eval().requires_grad_(False), segmenter[1],
                    frozen_key(net, *segmenter, cfg.bf16))
    if frozen.side != cfg.image_size:
        print(f"the segmenter was trained on {frozen.side} px: it sees the frames of {cfg.image_size} px at its own size")
    # 3. the clips, and their features
    source, mark = open_source(cfg, read), time.time()
    parts = source.parts
    if cfg.cache:
        where, record = Path(cfg.cache_dir or folder / "cache"), record_of(frozen, read is None)
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--cache-dir {where}: cannot make this folder ({error.strerror}); give another") from None
        announce(parts, record, where, cfg)
        parts = {name: fill(where, name, clips, record, frozen, device, cfg) for name, clips in parts.items()}
        for name, clips in parts.items():
            Damage().add(clips.bad, math.inf)
        source = source._replace(folds=[tuple([i for i in some if i in kept] for some, kept in zip(fold, (set(clips.kept) for clips in parts.values()))) for fold in source.folds])
        if empty := [name for fold in source.folds for name, some in zip(parts, fold) if not some]:
            raise BadInput(f"--data {cfg.data}: not one clip to use for {empty[0]}: all were left out")
    seconds["features"] = time.time() - mark
    # 4. the heads: the whole grid by the first seed, what it chose by the others
    mark, grid = time.time(), settings_of(cfg.rows.split(","), cfg.grid)
    results = []
    for number, fold in enumerate(source.folds):
        results.append([])
        for seed in dict.fromkeys(map(int, cfg.seeds.split(","))):
            chosen = results[-1][0]["chosen"] if results[-1] else None
            results[-1].append(one_seed(list(chosen.values()) if chosen else grid, chosen, seed, fold, number, source, parts, folder, frozen, device, cfg))
    seconds["heads"] = time.time() - mark
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return                                                   # the rest is for one
    # 5. the report
    rows, facts = measure(source, parts, frozen, device, cfg)
    lines = summary(results, source, rows)
    choice = {kind: (c.sum(1).max() / c.sum()).item() for kind, c in next(iter(lines.values()))["confusion"].items()}
    draw_confusions(folder / "confusion.png", lines, source.tasks)
    clips = {name: sum(len(fold[j]) for fold in source.folds) for j, name in enumerate(parts)}
    seconds["all"] = time.time() - began
    plain = {name: {k: v for k, v in line.items() if k != "confusion"} for name, line in lines.items()}
    result = dict(rows=plain, most_frequent_class=choice, classes=source.tasks, clips=clips, folds=len(source.folds), **facts, seconds=seconds, peak_memory_gb=peak_memory_gb(device))
    write_json(folder / "result.json", result | dict(confusion={name: {kind: c.tolist() for kind, c in line["confusion"].items()} for name, line in lines.items()}))
    out = Path(cfg.results) / f"adapter-{data_name}.json"
    write_json(out, dict(command="python train_adapter.py " + " ".join(sys.argv[1:]), torch=torch.__version__, threads=torch.get_num_threads(),
                         gpu=torch.cuda.get_device_name() if device.type == "cuda" else None, config=dataclasses.asdict(cfg), **result))
    print(f"\n{clips['test']} test clips" + (f", {len(source.folds)} groups, each left out once" if len(source.folds) > 1 else "") + f", {clips['train']} training clips, seeds {cfg.seeds}; "
          f"settings chosen on {clips['valid']} validation clips by the first seed")
    print("\n".join(table(lines, source.tasks, choice)))
    print(f"  {facts['live_trajectories']:.1f} live trajectories a clip" + (f"; the true objects' best IoU on the backbone's grid {100 * facts['object_iou']:.1f} %" if facts["object_iou"] is not None else "")
          + "".join(f"; {name} {facts[name + '_ms']:.2f} ms a clip" for name in ("backbone", "segmenter") if facts.get(name + "_ms")))
    print("  " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()) + f", {result['peak_memory_gb']:.1f} GB")
    print(f"wrote {folder}/: result.json, confusion.png, cache/, and {out}")


@data.one_line_errors
def main(argv=None):
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    if any(a.split("=")[0] == "--backbone" for a in argv) and not any(a.split("=")[0] == "--size" for a in argv):
        argv = [*argv, "--size", "full"]                         # a published backbone is probed as published
    cfg = configure(AdapterConfig, ADAPTER_SIZES, argv)
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    processes = cfg.processes or max(gpus, 1)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        if cfg.data != "world":
            splits(cfg)                                          # refused once, here, not by each process
        folder = Path(cfg.out) / f"adapter-{run_name(cfg)}"
        if not cfg.tokenizer and not cfg.backbone and (cfg.resume or cfg.overwrite or not (folder / "config.json").exists()):
            argv += ["--tokenizer", str(pretrain_segmenter(resolve(cfg, None), folder))]             # in one process, before the others start
        return launch(__file__, argv, processes)
    train(cfg)


if __name__ == "__main__":
    main()
