"""Video CLIP from scratch (paper, "Setting 1"): TrajViT2 on trajectory tokens, and every tokenizer that it is compared with.

    video uint8 (b, t, H, W, 3) -> tokenizer -> tokens (b, M, w), mask -> [CLS; tokens] -> transformer -> CLS (b, w) -> unit vector (b, e)
    caption ids (b, s)                                               -> text transformer -> mean       -> unit vector (b, e)

    loss = InfoNCE(video, text) + segmentation_weight (0.5 focal + dice)         PAPER: both are optimised jointly (trajvit2 alone has masks to learn)

    python train_clip.py                                         # TrajViT2, nano, on the procedural world: two CPU cores
    python train_clip.py --tokenizer vit3d                       # another row: trajvit2, trajvit, vit3d, vivit, tokenlearner, rlt
    python train_clip.py --data videos/manifest.json             # real, captioned video
    python train_clip.py --segmentation-weight 0                 # the contrastive loss alone shapes the trajectories
    python train_clip.py --init-tokenizer out/segmenter-nano --freeze-tokenizer
    python train_clip.py --resume                                # goes on where a stopped run was saved, step for step
    python train_clip.py --resume --tokens-per-trajectory 4      # a finished run is only evaluated again
    python train_clip.py --size large                            # every GPU of this machine; several machines: torchrun --nnodes ... train_clip.py

Writes out/clip-<name>/: config.json, log.jsonl, state.pt, model.safetensors, result.json, trajectories.png, curves.png.
A tokenizer of your own: one class with one forward (class Tokenizer) and one line in TOKENIZERS.
"""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from data import BadInput, configure, write_json
from encoder import Tokens, compact
from segmenter import labels_on_grid, normalise, segmentation_loss
from trajtok import (SIZES, Damage, Run, TrajTok, check_finite, check_flags, count_gflops, evaluate_segmenter, gather,
                     launch, learning_rate, load_weights, make_optimizer, meet, open_data, peak_memory_gb, precision,
                     ranks, run_name, save_pictures, setup, shard, sources, sum_gradients, tokenizer_config,
                     total, world_of, write_weights)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ClipConfig:
    """Trains a video CLIP: TrajViT2 on trajectory tokens, with the segmentation loss beside the contrastive one, or one of its rivals."""
    size: str = "nano"                          # one of SIZES: nano, tiny, base, large
    data: str = "world"                         # `world` (procedural) or a manifest or CSV of captioned videos; several with commas
    mix: str | None = None                      # shares of several sets, with commas: 0.5,0.5; default: equal
    stride: int = 8                             # a training clip takes every 1st .. stride-th frame (drawn) in a row; 0: frames spread over the whole video
    name: str | None = None                     # the run's folder is out/clip-<name>; default: the size, and of real data the folder's name
    out: str = "out"                            # where runs are kept
    # the model
    tokenizer: str = "trajvit2"                 # one of TOKENIZERS: trajvit2, trajvit, vit3d, vivit, tokenlearner, rlt
    image_size: int | None = None               # pixels of a side, a multiple of 32; default: the size's
    frames: int | None = None                   # frames of a clip; default: the size's
    max_objects: int = 8                        # of the procedural world: 1 .. 8 objects in a clip
    shared_colours: bool = True                 # may two objects of a made clip wear the same colour?
    acts: int = 1                               # acts that a made clip's subject performs one after another, of at least 4 frames each
    camera: bool = True                         # may the camera of a made clip pan and zoom?
    light: bool = True                          # may a made clip get lighter or darker?
    textures: str | None = None                 # a folder of your pictures or clips: made objects and grounds are painted with them
    num_queries: int | None = None              # K, trajectories at most (trajvit2, trajvit); default: the size's
    places: bool = False                        # trajvit2: points say where and when they are, which the paper leaves to rotary keys
    path: bool = False                          # trajvit2: tokens know how their trajectory moved: its mask's centre, size and spread over time
    detach: bool = True                         # trajvit2, ablation: --no-detach lets the Perceiver's gradient into the features
    hierarchical: bool = True                   # trajvit2, ablation: --no-hierarchical uses the finest map of features alone
    hard_mask: bool = True                      # trajvit2, ablation: with --no-hard-mask tokens read all points instead of their own
    mean_start: bool = True                     # trajvit2, ablation: with --no-mean-start a token starts at its learned code, without z_init
    patch: int = 16                             # pixels of a side of a patch (vit3d, vivit, tokenlearner, rlt); it spans two frames
    learned_tokens: int = 8                     # tokenlearner: tokens a time step
    rlt_threshold: float = 0.1                  # rlt: a patch that changed by less, in deviations of a pixel, is dropped
    layers: int = 4                             # video transformer: layers, width, heads
    width: int = 128                            # w
    heads: int = 4                              # of both transformers
    text_layers: int = 3                        # text transformer: layers, width
    text_width: int = 128                       # width of the text transformer
    embed: int = 128                            # e: width of the space that video and text share
    text: str = "world"                         # `world` (a BPE learnt from made captions), a tiktoken name, a folder
    text_length: int = 48                       # longest caption in tokens, the end token included
    # the loss
    segmentation_weight: float = 1.0            # of (0.5 focal + dice_weight x dice); 0: no segmentation loss
    dice_weight: float = 1.0                    # of Dice beside half the focal loss; ablation: 0
    init_tokenizer: str | None = None           # start from the tokenizer of this folder (`trajtok.py pretrain` writes one)
    freeze_tokenizer: bool = False              # leave the tokenizer as it starts
    # the training
    batch: int = 32                             # clips a step of each process; each sees the captions of all others as negatives
    micro_batch: int = 0                        # clips that go through the model at once; the loss still sees the whole batch; 0: all
    steps: int = 400                            # steps
    lr: float = 5e-4                            # peak learning rate
    segmenter_lr: float = 1.0                   # the segmenter's learning rate, as a multiple of lr
    warmup: int = 30                            # steps of linear warm-up; then a cosine to 1 %
    weight_decay: float = 0.02                  # on matrices (SPECS 1)
    clip: float = 5.0                           # largest gradient norm
    augment: bool = False                       # the same random crop, flip, colours, blur for all frames of a clip
    seed: int = 0                               # of weights, data order and augmentation
    workers: int = 0                            # processes that make batches; 0: in the training process
    save_every: int = 50                        # steps between checkpoints
    # how it is computed
    device: str = "auto"                        # cpu, cuda, ...
    processes: int = 0                          # training processes on this machine; 0: one for each GPU, without GPUs one
    bf16: bool | None = None                    # matrix products in bfloat16; default: on a GPU
    compile: bool = False                       # torch.compile the tokenizer and the transformers' layers
    fused: bool | None = None                   # AdamW in one kernel; default: on a GPU
    recompute: bool = False                     # keep no activations of tokenizer and layers: compute them again in the backward pass
    # the evaluation
    tokens_per_trajectory: int = 1              # 1, 2 or 4 at evaluation (training draws one of them at each step)
    eval_split: str = "test"                    # of made clips: test, or validation to choose a recipe by
    eval_clips: int = 256                       # held-out made clips, all captions distinct
    probe_clips: int = 1024                     # made clips that the linear probes learn from
    resume: bool = False                        # go on with the run of this name, exactly
    overwrite: bool = False                     # start again over a run of this name

    def __post_init__(self):
        check_flags(self)
        if self.tokenizer not in TOKENIZERS:
            raise BadInput(f"--tokenizer {self.tokenizer}: one of {', '.join(TOKENIZERS)}")
        for field in ("layers", "width", "heads", "text_layers", "text_width", "embed", "patch", "learned_tokens"):
            if getattr(self, field) < 1:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 1")
        for field in ("micro_batch", "processes", "rlt_threshold", "dice_weight"):
            if getattr(self, field) < 0:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 0")
        for width in (self.width, self.text_width):
            if width % self.heads:
                raise BadInput(f"a transformer of width {width} with {self.heads} heads: the width must be a multiple of the heads")
        if self.num_queries is not None and self.num_queries < 1:
            raise BadInput(f"--num-queries {self.num_queries}: at least 1")
        if not 2 <= self.text_length <= 4096:
            raise BadInput(f"--text-length {self.text_length}: 2 (a word and the end token) to 4096")
        if self.freeze_tokenizer and not self.init_tokenizer:
            raise BadInput("--freeze-tokenizer: freezes random weights unless --init-tokenizer FOLDER is given")
        for field in ("places", "path", "detach", "hierarchical", "hard_mask", "mean_start"):
            flag = field.replace("_", "-")
            if self.tokenizer != "trajvit2" and getattr(self, field) != getattr(type(self), field):
                raise BadInput(f"--{flag}, --no-{flag}: are of trajvit2; leave them out with --tokenizer {self.tokenizer}")
        if self.init_tokenizer and self.tokenizer != "trajvit2":
            raise BadInput(f"--init-tokenizer {self.init_tokenizer}: holds TrajTok's weights, which --tokenizer {self.tokenizer} has no use for")
        if self.eval_split not in ("test", "validation"):
            raise BadInput(f"--eval-split {self.eval_split}: test or validation")
        if self.eval_split == "validation" and not {"world", "plain"} & set(self.data.split(",")):
            raise BadInput(f"--eval-split validation: is of made clips; leave it out with --data {self.data}")


# CHOICE, nano only: the segmentation loss weighs 4 and the segmenter learns 4x as fast. With the release's weight of 1 the
# contrastive gradient, larger in the backbone, holds the masks back (dice after 60 steps 0.64; with 4 and 4x, 0.50), and
# tokens are no better than their masks. Minutes of training need it, days do not.
# Likewise its clips hold at most four objects, all of different colours: eight, at 64 pixels, are a few points each, and in
# minutes it learns to tell things apart by colour, not yet by place: objects that shared theirs came out at an IoU of 0.39,
# the others at 0.70. `--max-objects 8 --shared-colours` gives the whole world.
#  size          video transformer                   text transformer                          training
CLIP_SIZES = {
    "nano":  dict(layers=4, width=128, heads=4,      text_layers=3, text_width=128, embed=128, batch=32, steps=500, lr=5e-4, warmup=20, segmenter_lr=4.0, segmentation_weight=4.0,
                  max_objects=4, shared_colours=False, patch=8),
    "tiny":  dict(layers=6, width=256, heads=8,      text_layers=4, text_width=256, embed=256, batch=64, steps=10_000, lr=5e-4, warmup=500),
    "base":  dict(layers=12, width=768, heads=12, recompute=True,    text_layers=12, text_width=768, embed=256, batch=64, steps=100_000, lr=1e-4, warmup=5000, text_length=77, clip=10.0, learned_tokens=16),
    "large": dict(layers=24, width=1024, heads=16, recompute=True,   text_layers=12, text_width=768, embed=256, batch=64, steps=200_000, lr=1e-4, warmup=10_000, text_length=77, clip=10.0, learned_tokens=16),
}
CLIP_SIZES = {name: {"size": name, **values} for name, values in CLIP_SIZES.items()}

# ---------------------------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    """Pre-norm transformer layer: (1) self-attention among the real positions, (2) a GELU MLP of width 4w."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask=None, lengths=None):
        """x (b, s, w); mask (b, s), True = a real position; None: all are. Or packed: x (1, N, w), clip after clip, of `lengths` positions."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b s (three a c) -> three b a s c", three=3, a=self.heads)
        # softmax over the keys, padding and dead trajectories excluded: what a token reads from the others. Without a mask a GPU has a
        # faster kernel, which rows that drop nothing must not be denied.
        if lengths is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        else:                                                    # each clip among itself
            y = torch.cat([F.scaled_dot_product_attention(*clip) for clip in zip(*(z.split(lengths, 2) for z in (q, k, v)))], 2)
        x = x + self.proj(rearrange(y, "b a s c -> b s (a c)"))                                      # 1
        return x + self.mlp(self.norm2(x))                                                           # 2


class Transformer(nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.recompute = nn.LayerNorm(width), False
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # 1 / sqrt(fan in), not the customary 0.02: at width 128 that leaves attention so faint that every caption
                # starts, and for long stays, almost the same vector. The ends of branches shrink with depth.
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / (math.sqrt(2 * layers) if name.endswith(("proj.weight", "mlp.2.weight")) else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, mask=None, lengths=None, begin=0, end=None):
        """Layers begin .. end - 1 (None: to the last, and the norm)."""
        for layer in self.layers[begin:end]:
            x = checkpoint(layer, x, mask, lengths, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(x, mask, lengths)
        return self.norm(x) if end is None else x


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizers. Every row has the same video transformer, text tower, clips and schedule; only this part differs
# ---------------------------------------------------------------------------------------------------------------------

class Tokenizer(nn.Module):
    """What a row of the comparison is. A class of your own needs one method:

        forward(video uint8 (b, t, H, W, 3)) -> tokens (b, m, w), mask (b, m) with True = a real token, or None: all are real

    cfg is the whole ClipConfig, its image_size, frames and num_queries filled in. Tokens that are not real cost nothing: they leave
    before the transformer. A tokenizer that acts between the layers has a second method, and its tokens are all real:

        through(transformer, x (b, 1 + m, w): CLS and tokens) -> (b, 1 + any, w) after the layers, CLS first"""
    given_masks = False                                          # True: forward(video, labels (b, t, H, W)), -1 = of no trajectory


class ViT3D(Tokenizer):
    """Patches of 2 frames x p x p pixels, a linear map, learned positions; joint attention over all of them."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.image_size % cfg.patch:
            raise BadInput(f"--patch {cfg.patch}: does not divide an image of {cfg.image_size} px")
        self.patch, self.side = cfg.patch, cfg.image_size // cfg.patch
        self.embed = nn.Linear(2 * cfg.patch ** 2 * 3, cfg.width)
        self.position = nn.Parameter(0.02 * torch.randn(1, -(-cfg.frames // 2) * self.side ** 2, cfg.width))

    def patches(self, video):
        """uint8 (b, t, H, W, 3) -> normalised (b, t', h, w, 2, p, p, 3), t' = ceil(t / 2): of an odd last frame, or a picture, two."""
        x = normalise(video)
        x = torch.cat((x, x[:, -1:]), 1) if x.shape[1] % 2 else x
        return rearrange(x, "b (t two) c (h p) (w q) -> b t h w two p q c", two=2, p=self.patch, q=self.patch)

    def forward(self, video):
        x = self.embed(self.patches(video).flatten(4).flatten(1, 3))
        return x + self.position[:, :x.shape[1]], None           # (b, t' h w, width)


class ViViT(ViT3D):
    """Factorised encoder (ViViT's model 2): the transformer sees each time step alone, with a CLS of its own; a second, small one reads
    these CLSs in order. As published the second has 4 layers beside the first's 12 or 24; CHOICE: never more than a third of them."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.position = nn.Parameter(self.position[:, :self.side ** 2].detach().clone())             # in space: shared by the time steps
        self.time = nn.Parameter(0.02 * torch.randn(1, 1 + -(-cfg.frames // 2), cfg.width))
        self.temporal = Transformer(min(4, max(1, cfg.layers // 3)), cfg.width, cfg.heads)

    def forward(self, video):
        x = rearrange(self.embed(self.patches(video).flatten(4)), "b t h w d -> b t (h w) d")
        return (x + self.position).flatten(1, 2), None

    def through(self, transformer, x):
        cls, x = x[:, :1], rearrange(x[:, 1:], "b (t n) d -> (b t) n d", n=self.side ** 2)
        t = len(x) // len(cls)
        x = transformer(torch.cat((cls.repeat_interleave(t, 0), x), 1))[:, 0]                        # (b t, d): what each step has to say
        x = torch.cat((cls, rearrange(x, "(b t) d -> b t d", t=t)), 1)
        return self.temporal(x + self.time[:, :t + 1])


class TokenLearner(ViT3D):
    """A ViT3D in which, two thirds of the way through (of 12 layers: before the ninth), the patches of each time step become
    `learned_tokens`: weighted sums whose weights are computed from the patches. v1.1: LN -> Dense 64 -> GELU -> Dense S -> softmax over the
    patches -> sum of the un-normed x (SPECS 3)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.at, w, s = 2 * cfg.layers // 3, cfg.width, cfg.learned_tokens
        self.norm = nn.LayerNorm(w)
        self.score = nn.Sequential(nn.Linear(w, 64), nn.GELU(), nn.Linear(64, s))

    def learn(self, x):                                          # (b t, h w, d) -> (b t, S, d)
        s = self.score(self.norm(x)).transpose(1, 2).softmax(-1)             # over the patches of a time step: a token is a mean of them
        return s.to(x.dtype) @ x

    def through(self, transformer, x):
        x = transformer(x, end=self.at)
        cls, x = x[:, :1], rearrange(x[:, 1:], "b (t n) d -> (b t) n d", n=self.side ** 2)
        x = rearrange(self.learn(x), "(b t) s d -> b (t s) d", b=len(cls))
        return transformer(torch.cat((cls, x), 1), begin=self.at)


class RLT(ViT3D):
    """Run-length tokenization: a ViT3D without the patches that did not change since the time step before. Changed = the last frame of this
    one against the first frame of the one before, mean of |difference| over the patch, normalised pixels, above the threshold (SPECS 3)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.threshold = cfg.rlt_threshold

    def changed(self, x):                                        # patches (b, t', h, w, 2, p, p, 3) -> bool (b, t', h, w), True = kept
        change = (x[:, 1:, :, :, 1] - x[:, :-1, :, :, 0]).abs().mean((-3, -2, -1)) > self.threshold
        return F.pad(change, (0, 0, 0, 0, 1, 0), value=True)     # the first time step is always kept

    def forward(self, video):
        x = self.patches(video)
        kept = self.changed(x)
        z = self.embed(x.flatten(4)).flatten(1, 3)
        return z + self.position[:, :z.shape[1]], kept.flatten(1)


class BatchNorm(nn.BatchNorm2d):
    """ResNet's own. In training a clip is seen beside the others of its (micro-)batch, on its own process; saved (by the first process) and evaluated, by
    their running averages, alone. GroupNorm would spare us that, but statistics of one frame take away half of the distance between plain grounds of different
    colours: with it the comparison's three seeds stood at R@5 21 +-15 % (results/remedies-nano.json), now at 76 +-4."""

    def forward(self, x):
        alone = self.training and x.shape[:1] + x.shape[2:] == (1, 1, 1)     # one number a channel: it has no variance
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps) if alone else super().forward(x)


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, before, dim, stride):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(before, dim, 3, stride, 1, bias=False), BatchNorm(dim), nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1, bias=False), BatchNorm(dim))
        self.shortcut = nn.Sequential() if stride == 1 and before == dim else nn.Sequential(nn.Conv2d(before, dim, 1, stride, bias=False), BatchNorm(dim))

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


class Reader(nn.Module):
    """One learned latent reads what a trajectory is in each of its frames: `depth` layers of cross-attention, no MLP (SPECS 2)."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.latent = nn.Parameter(dim ** -0.5 * torch.randn(1, 1, dim))
        self.layers = nn.ModuleList(nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True))) for _ in range(depth))

    def forward(self, x, seen):                                  # (s, t, d); seen (s, t), True = it is in this frame -> (s, d)
        z = self.latent.expand(len(x), -1, -1)
        for norm_z, norm_x, attention in self.layers if len(x) else ():
            y = norm_x(x)
            # softmax over the frames in which it is seen; every trajectory here is in one at least
            z = z + attention(norm_z(z), y, y, key_padding_mask=~seen, need_weights=False)[0]
        return z[:, 0]


class TrajViT(Tokenizer):
    """TrajTok's predecessor: trajectories are given (an external pipeline's masks: sidecars; of made clips the true ones, the best that a
    pipeline could do), one token each. ResNet-18 -> features of four scales, as in TrajTok -> their mean over a trajectory's
    points in each frame -> an appearance Perceiver over the frames; its centres -> a position Perceiver; token = their sum."""
    given_masks = True

    def __init__(self, cfg):
        super().__init__()
        shape = SIZES[cfg.size]
        d, dims = shape.dim, (64, 128, 256, 512) if shape.dim >= 512 else shape.dims                 # ResNet-18's widths; smaller sizes' own
        self.most = cfg.num_queries                              # trajectories a clip at most: the largest
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 7, 2, 3, bias=False), BatchNorm(dims[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList(nn.Sequential(ResBlock(before, dim, stride), ResBlock(dim, dim, 1))
                                    for before, dim, stride in zip((dims[0], *dims), dims, (1, 2, 2, 2)))
        self.proj, self.ln = nn.ModuleList(nn.Conv2d(dim, d, 1) for dim in dims), nn.LayerNorm(d)
        depth = 4 if cfg.layers >= 24 else 2                     # SPECS 2: 4 for ViT-Large
        self.appearance, self.place = Reader(d, depth, shape.heads), Reader(d, depth, shape.heads)
        self.register_buffer("waves", math.pi * 2 ** torch.linspace(0, 6, 16), persistent=False)
        self.where, self.out = nn.Linear(3 * 2 * 16, d), nn.Linear(d, cfg.width)

    def extract(self, video):
        """-> features (b, n, d) on a grid of a quarter of the frame, and the grid (t, h, w)."""
        b, t, height, width, _ = video.shape
        x, total, size = self.stem(normalise(video).flatten(0, 1)), 0, (height // 4, width // 4)
        for stage, proj in zip(self.stages, self.proj):
            x = stage(x)
            y = self.ln(proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            total = total + (y if y.shape[-2:] == size else F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return rearrange(total, "(b t) d h w -> b (t h w) d", b=b), (t, *size)

    def forward(self, video, labels):
        f, (t, h, w) = self.extract(video)
        ids = labels_on_grid(labels, (t, h, w), self.most)       # (b, n), -1 = of no trajectory
        b, n, m = *ids.shape, max(int(ids.max()) + 1, 1)
        point = torch.arange(n, device=ids.device)
        cell = ((torch.arange(b, device=ids.device)[:, None] * m + ids) * t + point // (h * w)).flatten()        # (clip, trajectory, frame)
        cell = torch.where(ids.flatten() < 0, b * m * t, cell)   # the last cell is a bin
        row = torch.stack(((point % w + 0.5) / w, (point // w % h + 0.5) / h, (point // (h * w) + 0.5) / t, torch.ones_like(point)), -1)   # x, y, time, 1
        f = torch.cat((f.float(), row.expand(b, -1, -1)), -1).flatten(0, 1)
        sums = torch.zeros(b * m * t + 1, f.shape[-1], device=f.device).index_add_(0, cell, f)[:-1].view(b * m, t, -1)
        seen = sums[..., -1] > 0                                 # (b m, t): is it in this frame?
        alive = seen.any(1)
        mean, seen = (sums / sums[..., -1:].clamp(min=1))[alive], seen[alive]                        # (s, t, d + 4): trajectories that are there
        angle = (mean[..., -4:-1, None] * self.waves).flatten(-2)
        z = self.appearance(mean[..., :-4], seen) + self.place(self.where(torch.cat((angle.sin(), angle.cos()), -1)), seen)
        z = self.out(z)
        tokens = torch.zeros(b * m, z.shape[-1], dtype=z.dtype, device=z.device).index_copy(0, alive.nonzero()[:, 0], z)
        return tokens.view(b, m, -1), alive.view(b, m)


TOKENIZERS = {"trajvit2": TrajTok, "trajvit": TrajViT, "vit3d": ViT3D, "vivit": ViViT, "tokenlearner": TokenLearner, "rlt": RLT}

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

class Encoded(NamedTuple):
    """What the video side says of b clips."""
    cls: torch.Tensor               # (b, w)
    tokens: Tokens                  # what entered the transformer, real tokens first
    seg: tuple | None               # trajvit2: the Segmentation
    out: torch.Tensor               # (b, s, w): what left it, without CLS
    mask: torch.Tensor | None       # bool (b, s), True = real, of `out`; None: all are


class VideoEncoder(nn.Module):
    """Tokenizer, then a transformer over [CLS; tokens]. A set has no order: trajectories get no positions of their own; where and
    when one was is in its token, through the rotary keys of the encoder. Patches get learned positions, in their tokenizer.

    Dead trajectories and dropped patches cost nothing. CHOICE: on a CPU real tokens are packed, clip after clip, and each clip attends to
    itself; elsewhere, and under torch.compile, they only come first, and the batch is cut at the clip that has most: one kernel a layer, not
    one a clip. Measured on one CPU core, forward and backward of the transformer, padded / cut / packed: nano, 32 clips of 8 +- 2.5 trajectories
    137 / 102 / 69 ms, with 4 tokens each 570 / 414 / 228; base, 8 clips 5.3 / 2.0 / 1.6 s; the patches that RLT keeps 1.9 / 1.9 / 1.3 s. (One
    packed row under a block-diagonal mask: 10.6 s.) Both ask the device for numbers, once a step: a GPU waits for it, as it does anyway for
    the matching of the segmentation loss."""

    def __init__(self, tokenizer, cfg):
        super().__init__()
        self.tokenizer = tokenizer
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads)
        self.compact, self.pack = True, True                     # False: all tokens stay, for tests and for counting the worst case

    def tokenize(self, video, tokens_per_trajectory, labels):
        """-> Tokens, their mask or None, Segmentation or None."""
        run = functools.partial(checkpoint, self.tokenizer, use_reentrant=False) if self.transformer.recompute and torch.is_grad_enabled() else self.tokenizer
        if isinstance(self.tokenizer, TrajTok):                  # the one whose masks are learnt, and which has 1, 2 or 4 tokens for each
            tokens, seg = run(video, tokens_per_trajectory)
            return tokens, tokens.mask, seg
        z, mask = run(video, labels) if self.tokenizer.given_masks else run(video)
        index = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
        return Tokens(z, torch.ones_like(index, dtype=torch.bool) if mask is None else mask, index), mask, None

    def forward(self, video, tokens_per_trajectory=None, labels=None):
        """uint8 (b, t, H, W, 3), and labels (b, t, H, W) for those that are given masks -> Encoded."""
        tokens, mask, seg = self.tokenize(video, tokens_per_trajectory, labels)
        if mask is not None:
            tokens = compact(tokens) if self.compact else tokens
            mask = F.pad(tokens.mask, (1, 0), value=True)        # CLS is always real
        x = torch.cat((self.cls.expand(len(video), -1, -1), tokens.z), 1)                            # (b, 1 + m, w)
        if hasattr(self.tokenizer, "through"):
            x, mask = self.tokenizer.through(self.transformer, x), None
        elif mask is not None and self.compact and self.pack and x.device.type == "cpu":
            packed = self.transformer(x[mask][None], lengths=mask.sum(1).tolist())[0]
            x = torch.zeros(x.shape, dtype=packed.dtype).masked_scatter(mask[..., None], packed)
        else:
            x = self.transformer(x, mask)
        return Encoded(x[:, 0], tokens, seg, x[:, 1:], None if mask is None else mask[:, 1:])


class TextEncoder(nn.Module):
    """CHOICE (the paper does not say; the release takes BERT-base): a from-scratch bidirectional transformer, learned
    positions, read as the mean over the real tokens: from the first step on it tells captions of different words apart,
    where a single end token must first learn to look at them."""

    def __init__(self, vocabulary, cfg):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, cfg.text_width)
        self.position = nn.Parameter(0.02 * torch.randn(1, cfg.text_length, cfg.text_width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.transformer = Transformer(cfg.text_layers, cfg.text_width, cfg.heads)

    def forward(self, ids, mask):                                # (b, s), True = a real token, the end token included
        x = self.transformer(self.embed(ids) + self.position[:, :ids.shape[1]], mask)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)                              # (b, w)


class VideoCLIP(nn.Module):
    def __init__(self, tokenizer, vocabulary, cfg):
        super().__init__()
        self.video, self.text = VideoEncoder(tokenizer, cfg), TextEncoder(vocabulary, cfg)
        self.video_proj = nn.Linear(cfg.width, cfg.embed, bias=False)
        self.text_proj = nn.Linear(cfg.text_width, cfg.embed, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def embed_video(self, video, tokens_per_trajectory=None, labels=None):
        """-> unit vectors (b, e), CLS (b, w), Tokens, Segmentation or None."""
        encoded = self.video(video, tokens_per_trajectory, labels)
        return self.project(encoded.cls), encoded.cls, encoded.tokens, encoded.seg

    def project(self, cls):
        return F.normalize(self.video_proj(cls).float(), dim=-1)

    def embed_text(self, ids, mask):
        return F.normalize(self.text_proj(self.text(ids, mask)).float(), dim=-1)

    def contrastive(self, video, text):
        """InfoNCE both ways over a batch of b pairs: unit vectors (b, e) -> scalar. At initialisation ln b.
        SPECS 2: the temperature starts at 0.07, is learned, and is clamped to [0.001, 0.5] (the loop clamps the
        parameter too, after each step: left outside it would have no gradient, and could never come back)."""
        # softmax over the batch: each video chooses among all captions, each caption among all videos
        logits = video @ text.T / self.temperature.clamp(0.001, 0.5)
        target = torch.arange(len(video), device=video.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def shape_of(cfg):
    """The TrajTokConfig of a run: of --init-tokenizer, or the size's."""
    overrides = {k: getattr(cfg, k) for k in ("image_size", "frames", "num_queries") if getattr(cfg, k) is not None}
    overrides |= {k: getattr(cfg, k) for k in ("detach", "hierarchical", "hard_mask", "mean_start", "recompute")}
    if not cfg.init_tokenizer:
        return dataclasses.replace(SIZES[cfg.size], out_dim=cfg.width, places=cfg.places, path=cfg.path, **overrides)
    shape = tokenizer_config(cfg.init_tokenizer)
    if overrides.get("num_queries", shape.num_queries) != shape.num_queries:
        raise BadInput(f"--num-queries {cfg.num_queries}: the tokenizer in {cfg.init_tokenizer} has {shape.num_queries}; leave the flag out")
    if shape.out_dim != cfg.width:
        raise BadInput(f"--init-tokenizer {cfg.init_tokenizer}: its tokens are {shape.out_dim} wide, the transformer of --size {cfg.size} {cfg.width}; "
                       f"give the size that it was trained with, or --width {shape.out_dim}")
    overrides.pop("num_queries", None)
    return dataclasses.replace(shape, places=shape.places or cfg.places, path=shape.path or cfg.path, **overrides)


def resolve(cfg):
    """The configuration with what its size or its tokenizer decides filled in."""
    shape = shape_of(cfg)
    return dataclasses.replace(cfg, image_size=shape.image_size, frames=shape.frames, num_queries=shape.num_queries, places=shape.places, path=shape.path)


def build(cfg, encoding):
    """-> VideoCLIP, TrajTokConfig. The tokenizer from --init-tokenizer, or new, in the run's size."""
    shape, cfg = shape_of(cfg), resolve(cfg)
    if cfg.tokenizer == "trajvit2":
        tokenizer = TrajTok(shape)
        if cfg.init_tokenizer:                                   # one that was made without places gets new ones
            saved = load_weights(TrajTok(tokenizer_config(cfg.init_tokenizer)), cfg.init_tokenizer, "video.tokenizer.").state_dict()
            tokenizer.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if k.startswith(("encoder.places.", "encoder.path."))} | saved)
        shape.check(cfg.tokens_per_trajectory)           # refused now, not after the training
    else:
        tokenizer = TOKENIZERS[cfg.tokenizer](cfg)
    if cfg.freeze_tokenizer:
        tokenizer.requires_grad_(False)
    model = VideoCLIP(tokenizer, encoding.n_vocab, cfg)
    for transformer in (model.video.transformer, model.text.transformer):
        transformer.recompute = cfg.recompute
    if cfg.compile:                                              # in place: names of parameters and files stay as they are
        model.video.pack = False                                 # lists of lengths would be compiled anew for each batch
        tokenizer.compile()
        for layer in (*model.video.transformer.layers, *model.text.transformer.layers):
            layer.compile(dynamic=True)                          # the number of tokens changes from step to step
    return model, shape


# ---------------------------------------------------------------------------------------------------------------------
# One step: the loss of all clips of all processes, a micro-batch at a time
# ---------------------------------------------------------------------------------------------------------------------

def step_gradients(model, batch, clips, labelled, m, cfg, device):
    """Gradients of one step's loss into p.grad -> dict of its terms, and of the counts for the log; all of them over all processes.

    The contrastive loss needs every clip's vector at once, the model's activations only a few clips' at a time:
      1. embed all micro-batches, without keeping what a backward pass needs (with one micro-batch, keeping it),
      2. gather the vectors of all processes, and take the loss and its gradient on the own vectors,
      3. embed each micro-batch again, now with a graph, and send those gradients back through it, together with its segmentation loss.
    Nothing in the model is random once m is drawn, and no layer but TrajViT's BatchNorm looks at a batch's statistics: gradients are those of the whole batch.
    batch: dict(video, labels, ids, mask); clips, labelled: how many clips, and clips with labels, all processes have in this step."""
    count, segmented = len(batch["video"]), cfg.tokenizer == "trajvit2" and cfg.segmentation_weight and not cfg.freeze_tokenizer
    size = cfg.micro_batch or max(count, 1)
    parts = [slice(i, i + size) for i in range(0, count, size)]

    def forward(part):
        with precision(device, cfg.bf16):
            v, _, tokens, seg = model.embed_video(batch["video"][part], m, batch["labels"][part])    # tokens a trajectory: 1, 2 or 4
            return v, model.embed_text(batch["ids"][part], batch["mask"][part]), tokens, seg
    # 1
    with torch.set_grad_enabled(len(parts) == 1):
        kept = [forward(part) if len(parts) == 1 else forward(part)[:2] for part in parts]
    empty = [torch.zeros(0, cfg.embed, device=device)]           # a process whose clips are all damaged still takes its part in the loss
    vectors = [torch.cat([row[i].detach() for row in kept] or empty).requires_grad_() for i in (0, 1)]
    # 2
    contrastive = model.contrastive(*(gather(x) for x in vectors))
    contrastive.backward()
    if ranks()[1] > 1:
        model.temperature.grad /= ranks()[1]                     # it has the whole gradient in each process, and they are summed
    sums = dict(focal=0.0, dice=0.0, tokens=0.0, live=0.0)
    for part in parts:
        # 3
        v, t, tokens, seg = kept.pop() if len(parts) == 1 else forward(part)
        roots, grads = [v, t], [x.grad[part] for x in vectors]
        if segmented and labelled and len(v):
            focal, dice = segmentation_loss(seg, batch["labels"][part])      # outside autocast: the matching counts points
            share = len(v) / clips                               # both are means over clips: the parts' shares add up to the whole batch's mean
            roots.append(share * cfg.segmentation_weight * (0.5 * focal + cfg.dice_weight * dice))
            grads.append(None)
            sums["focal"] += share * focal.item()
            sums["dice"] += share * dice.item()
        torch.autograd.backward(roots, grads)
        sums["tokens"] += tokens.mask.sum().item()
        sums["live"] += seg.alive.sum().item() if seg is not None else 0.0
    sum_gradients(p for p in model.parameters() if p.requires_grad)
    sums = dict(zip(sums, total(list(sums.values()), device)))
    terms = dict(contrastive=contrastive.item()) | ({k: sums[k] for k in ("focal", "dice")} if segmented and labelled else {})
    loss = terms["contrastive"] + (cfg.segmentation_weight * (0.5 * terms["focal"] + cfg.dice_weight * terms["dice"]) if "focal" in terms else 0.0)
    return terms | dict(loss=loss), sums["tokens"], sums["live"]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def recalls(similarity, prefix, right=None):
    """similarity (queries, candidates) -> R@1, R@5, R@10 in [0, 1]. right bool, the same shape, True = an answer to that query; default:
    the answer of query i is candidate i. Rank = how many wrong candidates score at least as high as the best answer (SPECS 2: the best
    rank over several captions): ties count against us, so that a constant output scores 0, not 1."""
    right = torch.eye(*similarity.shape, dtype=torch.bool) if right is None else right
    answer = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    rank = (~(similarity < answer) & ~right).sum(1)
    return {f"{prefix}_r{n}": (rank < n).float().mean().item() for n in (1, 5, 10)}


def logistic(x, y, penalty, classes):
    """Multinomial logistic regression of standardised features (n, w), L2 penalty -> scores(features) of the classes. Full-batch L-BFGS: no
    learning rate to tune, the same answer every time."""
    mean, std = x.mean(0), (x.std(0) if len(x) > 1 else torch.zeros(x.shape[1])) + 1e-6
    x = (x.double() - mean) / std
    w = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x @ w[:-1] + w[-1], y) + penalty * w[:-1].square().sum() / 2
        loss.backward()
        return loss
    solver.step(closure)
    return lambda z: ((z.double() - mean) / std) @ w[:-1].detach() + w[-1].detach()


PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def linear_probe(train, train_y, valid, valid_y, test, test_y):
    """Accuracy on test of a logistic regression on frozen features (n, w), trained on train; its penalty is the best of four on valid."""
    classes, best = int(torch.cat((train_y, valid_y, test_y)).max()) + 1, (-1.0, 0.0)
    for penalty in PENALTIES:
        scores = logistic(train, train_y, penalty, classes)
        best = max(best, tuple((scores(x).argmax(1) == y).double().mean().item() for x, y in ((valid, valid_y), (test, test_y))), key=lambda s: s[0])
    return best[1]


class Embedded(NamedTuple):
    """What `embed` says of n clips."""
    vectors: torch.Tensor           # (n, e) unit vectors
    features: torch.Tensor          # (n, w): CLS
    live: float                     # tokens a clip
    batches: list                   # the rest of each batch: captions, classes, indices; no pixels
    bad: list                       # files that could not be used


@torch.no_grad()
def embed(model, batches, count, cfg, device, what):
    """Batches 0 .. count - 1 of a dataset -> Embedded, or None and the bad files."""
    model.eval()
    vectors, features, live, kept, bad = [], [], [], [], []
    for batch in tqdm(data.loader(batches, 0, count, cfg.workers), total=count, desc=what, leave=False, disable=None):
        bad += batch["bad"]
        batch = data.finish(batch, device)
        if batch["video"] is None:
            continue
        video = batch.pop("video")
        with precision(device, cfg.bf16):
            encoded = model.video(video, cfg.tokens_per_trajectory, batch.pop("labels"))
            vectors.append(model.project(encoded.cls).cpu())
        features.append(encoded.cls.float().cpu())
        live += encoded.tokens.mask.sum(1).tolist()
        kept.append(batch)
    if not vectors:
        return None, bad
    return Embedded(torch.cat(vectors), torch.cat(features), sum(live) / len(live), kept, bad), bad


@torch.no_grad()
def embed_texts(model, texts, cfg, device, encoding):
    """Texts -> unit vectors (n, e)."""
    with precision(device, cfg.bf16):
        return torch.cat([model.embed_text(*(x.to(device) for x in data.tokenize(encoding, texts[i:i + 256], cfg.text_length))).cpu()
                          for i in range(0, len(texts), 256)])


def captions_of(embedded):
    """Of each embedded clip its captions, a list: a manifest may have several, of which `caption` is one (`captions`: all)."""
    return [own for b in embedded.batches for own in b.get("captions") or [[c] for c in b["caption"]]]


def retrieval(model, vectors, captions, cfg, device, encoding):
    """Recalls both ways among n videos: unit vectors (n, e), captions: n lists of texts -> dict, and bool (texts, n), True = an answer. Several
    captions of a video: each is a query of its own, and video -> text counts the best of them (SPECS 2). One text that several videos
    have (a label spelt out) is one query, and any of these videos answers it: among equals there is no right one to find."""
    texts = sorted({text for own in captions for text in own})
    right = torch.tensor([[text in own for own in captions] for text in texts])
    text = embed_texts(model, texts, cfg, device, encoding)
    return recalls(text @ vectors.T, "t2v", right) | recalls(vectors @ text.T, "v2t", right.T), right


def evaluate(model, test, test_batches, cfg, device, encoding):
    """Retrieval and segmentation scores on held-out clips; on the procedural world also linear probes. -> dict, pictures, bad
    files. What the data or the tokenizer cannot tell (classes, masks) is None."""
    clips, bad = embed(model, test, test_batches, cfg, device, "held-out clips")
    if clips is None:
        raise BadInput(f"--data {cfg.data}: not one held-out clip can be read; the last: {bad[-1][1]}")
    result = retrieval(model, clips.vectors, captions_of(clips), cfg, device, encoding)[0] | dict(clips=len(clips.vectors), live_tokens=clips.live)
    result |= dict(appearance=None, motion=None)
    if cfg.data in ("world", "plain"):
        world, size = world_of(cfg), cfg.batch
        # the probes' clips come from far up the training range, where the training itself never gets, and from validation
        last = dict(test=data.TEST, validation=data.VALIDATION + 50_000_000)[cfg.eval_split]
        sets = [(500_000_000, cfg.probe_clips), (data.VALIDATION, max(cfg.probe_clips // 4, 1)), (last, max(cfg.probe_clips // 2, 1))]
        split = [embed(model, data.WorldBatches(world, size, begin), -(-n // size), cfg, device, "probe clips")[0] for begin, n in sets]
        for kind in ("appearance", "motion"):
            result[kind] = linear_probe(*(x for s in split for x in (s.features, torch.cat([b[kind] for b in s.batches]))))
    if cfg.tokenizer != "trajvit2":
        return result | dict(veq=None, stq=None), [], bad
    scores, pictures, _ = evaluate_segmenter(model.video.tokenizer.segmenter, test, device, test_batches)
    return result | scores, pictures, bad


def gflops(model, batch, cfg, limit=8):
    """GFLOPs (2 per multiply-add) of embedding a clip, counted while it runs, one clip at a time: the mean over a batch's first ones."""
    model.eval()
    each = [count_gflops(lambda: model.embed_video(batch["video"][i:i + 1], cfg.tokens_per_trajectory, batch["labels"][i:i + 1]))
            for i in range(min(limit, len(batch["video"])))]
    return sum(each) / len(each)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def train(cfg):
    encoding = data.load_encoding(cfg.text)
    device = setup(cfg)
    meet(device)
    rank, world = ranks()
    model, shape = build(cfg, encoding)
    cfg = resolve(cfg)
    dataset, test, test_batches, files = open_data(cfg, "caption")
    check_masks(cfg, dataset)
    check_masks(cfg, test)
    name = f"clip-{run_name(cfg)}" + (f"-{cfg.tokenizer}" if cfg.tokenizer != "trajvit2" and not cfg.name else "")
    # config.json: of trajvit2 `tokenizer` holds the whole TrajTokConfig, which TrajTok.from_pretrained reads, else the name
    run = Run(cfg, name, {"textures_crc": data.open_textures(cfg.textures)} | ({"tokenizer": dataclasses.asdict(shape)} if cfg.tokenizer == "trajvit2" else {}))
    model.to(device)
    optimizer = make_optimizer(model, cfg, {"video.tokenizer.segmenter.": cfg.segmenter_lr}, cfg.fused)
    start_step = run.restore(model, optimizer)
    damage, parameters, clips_a_step = Damage(), sum(p.numel() for p in model.parameters()), cfg.batch * world
    print(f"{parameters / 1e6:.2f} M parameters, {sum(p.numel() for p in model.video.tokenizer.parameters()) / 1e6:.2f} M of them the tokenizer ({cfg.tokenizer}); "
          f"{device.type}; an untrained contrastive loss is ln {clips_a_step} = {math.log(clips_a_step):.2f}")
    if world > 1 or cfg.micro_batch:
        print(f"{world} process(es) x {cfg.batch} clips a step, {cfg.micro_batch or cfg.batch} at a time; each clip sees the captions of all {clips_a_step} as negatives")
    began, mark, told = time.time(), time.time(), False
    batches = data.loader(shard(dataset), start_step, cfg.steps, cfg.workers)
    for step, batch in zip(range(start_step, cfg.steps), batches):
        # 1. the learning rate
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # 2. the batch: clips, captions, and labels where there are any
        damage.add(batch["bad"], files or math.inf)
        batch, labelled = data.finish(batch, device), 0
        if batch["video"] is None:                               # every file of it was damaged
            batch |= dict(video=torch.zeros(0, 1, 32, 32, 3, dtype=torch.uint8, device=device), labels=torch.zeros(0, 1, 32, 32, dtype=torch.int64, device=device))
        elif cfg.augment:                                        # before the labels are counted: a crop cuts some away
            # no flip of made clips: their captions tell left from right
            batch["video"], batch["labels"] = data.augment(batch["video"], batch["labels"], (step * world + rank) + cfg.seed * 10 ** 6, flip="motion" not in batch)
        if len(batch["video"]) and cfg.tokenizer == "trajvit2":
            labelled = int((batch["labels"] >= 0).flatten(1).any(1).sum())
        clips, labelled = total([len(batch["video"]), labelled], device)
        if not clips:
            continue
        batch["ids"], batch["mask"] = (x.to(device) for x in data.tokenize(encoding, batch["caption"], cfg.text_length))
        wait = time.time() - mark
        # 3. forward and backward: the loss, term by term. Tokens a trajectory are drawn anew in each step, the same for all clips
        model.train()
        choices = shape.choices
        m = choices[int(torch.randint(len(choices), ()))] if cfg.tokenizer == "trajvit2" else None
        optimizer.zero_grad()
        values, tokens, live = step_gradients(model, batch, clips, labelled, m, cfg, device)
        if "focal" not in values and cfg.tokenizer == "trajvit2" and not told:
            told = True
            print("no segmentation loss: " + ("--segmentation-weight 0" if not cfg.segmentation_weight else
                                              "--freeze-tokenizer" if cfg.freeze_tokenizer else "no clip of this batch has mask sidecars"))
        # 4. clip, step
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        values |= dict(gradient_norm=norm.item())
        check_finite(values, step)                               # before the step: what is saved stays whole
        optimizer.step()
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        # 5. the log: one line a step
        now, live, tokens = time.time(), live / clips, tokens / clips
        run.record(dict(step=step, **values, segmentation="focal" in values, lr=lr, temperature=model.temperature.item(), live_trajectories=live, tokens=tokens,
                        clips=int(clips), seconds=now - mark, clips_per_second=clips / (now - mark), data_wait=wait, memory_gb=peak_memory_gb(device)))
        if step % 10 == 0 or step == cfg.steps - 1:
            print(f"step {step:5d}/{cfg.steps}  " + "  ".join(f"{k} {values[k]:.3f}" for k in ("contrastive", "focal", "dice") if k in values)
                  + (f"  live {live:.1f}/{cfg.num_queries}" if cfg.tokenizer == "trajvit2" else f"  tokens {tokens:.1f}")
                  + f"  {clips / (now - mark):.0f} clips/s  {now - began:.0f} s", flush=True)
        mark = now
        # 6. the checkpoint
        if (step + 1) % cfg.save_every == 0 or step == cfg.steps - 1:
            run.save(model, optimizer, step + 1)
    if world > 1:
        dist.barrier()                                           # nobody leaves while another still waits for it
        dist.destroy_process_group()
    if rank:
        return                                                   # the rest is for one
    if not run.history():
        raise BadInput(f"--data {cfg.data}: not one of the clips that {cfg.steps} steps drew can be used; the first: {next(iter(damage.files.values()), '-')}")
    seconds, clips = (sum(line[key] for line in run.history()) for key in ("seconds", "clips"))      # of all parts of a resumed run
    began = time.time()
    write_weights(run.folder / "model.safetensors", model.state_dict())
    result, pictures, bad = evaluate(model, test, test_batches, cfg, device, encoding)
    damage.add(bad, math.inf)
    first = next(b for b in (data.finish(test[i], device) for i in range(test_batches)) if b["video"] is not None)
    result |= dict(parameters=parameters, gflops=gflops(model, first, cfg), clips_per_second=clips / max(seconds, 1e-9), seconds=seconds,
                   evaluation_seconds=time.time() - began, peak_memory_gb=peak_memory_gb(device), left_out=len(damage.files))
    write_json(run.folder / "result.json", result)
    save_pictures(run, pictures, ("contrastive", "focal", "dice", "live_trajectories" if cfg.tokenizer == "trajvit2" else "tokens"))
    report(result, run.folder, cfg.textures is not None, cfg.eval_split)


def gets_masks(cfg):
    """Is the tokenizer given its trajectories?"""
    return cfg.tokenizer != "trajvit2" and TOKENIZERS[cfg.tokenizer].given_masks


def check_masks(cfg, dataset):
    """A tokenizer that is given its masks cannot do without: refused before anything is written."""
    sets = getattr(dataset, "datasets", [dataset])               # of a mixture: each set, the held-out ones as Subsets
    entries = [e for one in sets for e in getattr(getattr(one, "dataset", one), "entries", [])]
    without = [e["path"] for e in entries if not (e["mask"] and e["graph"])]
    if gets_masks(cfg) and without:
        raise BadInput(f"--tokenizer {cfg.tokenizer}: is given its trajectories, but {len(without)} of {len(entries)} files have no `_mask.npz` and `_graph.npz`, "
                       f"the first {without[0]}; make them, or take another tokenizer")


def report(result, folder, skinned=False, split="test"):
    def cell(key, percent=True):
        return "-" if result[key] is None else f"{100 * result[key]:.1f} %" if percent else f"{result[key]:.1f}"
    n, left_out = result["clips"], result["left_out"]
    print(f"\n{n} {'held-out' if split == 'test' else split} clips, chance R@1 {100 / n:.1f} %, R@5 {min(500 / n, 100):.1f} %" + (f"; {left_out} files left out" if left_out else ""))
    for way, name in (("t2v", "text -> video"), ("v2t", "video -> text")):
        print(f"  {name}   " + "   ".join(f"R@{k} {cell(f'{way}_r{k}')}" for k in (1, 5, 10)))
    if result["appearance"] is not None:
        # in a skinned world one class, the irregular outlines, is the likely guess
        chance = max(1 / len(data.SHAPES), data.SKINNED_CLIPS * data.IRREGULAR * skinned)
        print(f"  linear probes   appearance {cell('appearance')} (chance {100 * chance:.0f} %)   motion {cell('motion')} (chance {100 / len(data.MOTIONS):.0f} %)")
    if result["veq"] is not None:
        print(f"  trajectories    objects' best IoU {cell('object_iou')} (at full resolution {cell('object_iou_pixels')})   VEQ {cell('veq')}   STQ {cell('stq')}   ({cell('live_trajectories', False)} live)")
        print(f"  a grid instead  objects' best IoU {cell('grid_object_iou')}   VEQ {cell('grid_veq')}   STQ {cell('grid_stq')}   ({cell('grid_cells', False)} cells)")
    print(f"  {result['live_tokens']:.1f} tokens a clip, {result['parameters'] / 1e6:.2f} M parameters, {result['gflops']:.2f} GFLOPs a clip, "
          f"{result['clips_per_second']:.0f} clips/s in training, {result['seconds']:.0f} s + {result['evaluation_seconds']:.0f} s evaluation, {result['peak_memory_gb']:.1f} GB")
    print(f"wrote {folder}/: model.safetensors, result.json, log.jsonl, " + ("trajectories.png, " if result["veq"] is not None else "") + "curves.png")


# ---------------------------------------------------------------------------------------------------------------------

@data.one_line_errors
def main(argv=None):
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    cfg = configure(ClipConfig, CLIP_SIZES, argv)
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    processes = cfg.processes or max(gpus, 1)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        for name in sources(cfg)[0]:                             # told once, here, not by each process
            if name not in ("world", "plain"):
                data.read_manifest(name)
        return launch(__file__, argv, processes)
    train(cfg)


if __name__ == "__main__":
    main()
