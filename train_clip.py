"""Video CLIP from scratch (paper, "Setting 1"): TrajViT2 on trajectory tokens, and the tokenizers beside it.

    video uint8 (b, t, H, W, 3) -> tokenizer -> tokens (b, M, w) -> [CLS; tokens] -> transformer -> (b, e)
    caption ids (b, s) -> text transformer -> mean over the tokens                               -> (b, e)

    b clip, t frame, M tokens of a clip, s tokens of a caption, w width of the transformer, e shared width

    loss = InfoNCE(video, text) + segmentation_weight · (0.5 focal + dice)       PAPER: optimised jointly

    python train_clip.py                             # TrajViT2, nano, on made clips; for two CPU cores
    python train_clip.py --tokenizer vit3d           # trajvit, vivit, tokenlearner, rlt or mine.py:Mine
    python train_clip.py --data videos/manifest.json # captioned videos of your own
    python train_clip.py --init-segmenter out/segmenter-nano --freeze-segmenter
    python train_clip.py --resume                    # go on where a run was saved, step for step
    python train_clip.py --eval-only --tokens-per-trajectory 4        # score the saved weights again
    python train_clip.py --flops                     # GFLOPs of every tokenizer, counted
    python train_clip.py --size large                # all GPUs of this machine; several machines: torchrun

Writes out/clip-<name>/: config.json, log.jsonl, state.pt, model.safetensors, result.json and pictures.
"""
from __future__ import annotations

import collections
import dataclasses
import math
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import data
import trajtok
from data import BadInput, configure, write_json, write_png
from encoder import Tokens, compact, times_and_places
from segmenter import Features, labels_on_grid, normalise, recomputed, segmentation_loss, waves
from trajtok import SIZES, RunConfig, TrajTok, Variants, at_least, gather, ranks

# -----------------------------------------------------------------------------------------------------------
# Configuration
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ClipConfig(Variants, RunConfig):
    """Trains a video CLIP: TrajViT2 on trajectory tokens, or one of the tokenizers it is compared with."""
    # the tokenizer
    tokenizer: str = "trajvit2"             # or trajvit, vit3d, vivit, tokenlearner, rlt, FILE.py:CLASS
    num_queries: int | None = None          # K, trajectories at most; default: the size's
    patch: int = 16                         # pixels of a side of a patch, which is two frames deep
    learned_tokens: int = 8                 # tokenlearner: tokens a time step
    rlt_threshold: float = 0.1              # rlt: patches that changed by less are dropped
    # the two transformers
    layers: int = 4                         # of the video transformer
    width: int = 128                        # w: its width
    heads: int = 4                          # of both transformers
    text_layers: int = 3                    # of the text transformer
    text_width: int = 128                   # its width
    embed: int = 128                        # e: width of the space that video and text share
    text: str | None = None                 # vocabulary: world, captions, a tiktoken name, a folder
    text_length: int = 48                   # longest caption in tokens, the end token included
    # the loss, and how it is computed
    segmentation_weight: float = 1.0        # of (0.5 focal + dice_weight x dice); 0: none
    dice_weight: float = 1.0                # ablation: 0
    init: str | None = None                 # start from all weights of this run
    init_segmenter: str | None = None       # start from the segmenter of this run, e.g. of `pretrain`
    freeze_segmenter: bool = False          # leave the segmenter as it is
    segmenter_lr: float = 1.0               # the segmenter's learning rate, as a multiple of lr
    micro_batch: int = 0                    # clips that go through the model at once; 0: the whole batch
    processes: int = 0                      # processes on this machine; 0: one for each GPU
    compile: bool = False                   # torch.compile the tokenizer and the transformers' layers
    recompute: bool = False                 # less memory, more time: activations are computed again
    # the evaluation
    eval_every: int = 0                     # steps between scores on validation clips; 0: none
    eval_only: bool = False                 # score the weights that a run saved
    eval_split: str = "test"                # of made clips: test, or validation to choose a recipe by
    probe_clips: int = 1024                 # made clips that the linear probes learn from
    tokens_per_trajectory: int = 1          # 1, 2 or 4 (training draws one of them at each step)
    prompt: str = "a video of {}"           # zero-shot classes, where clips have labels
    flops: bool = False                     # count GFLOPs at 8 .. 128 frames; nothing is run

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "width heads text_width text_length embed patch num_queries")
        # the probes divide by deviations, which need two clips
        at_least(self, 2, "probe_clips")
        at_least(self, 0, "micro_batch segmenter_lr eval_every segmentation_weight dice_weight")
        if self.width % self.heads or self.text_width % self.heads:
            raise BadInput(f"--heads {self.heads}: must divide the widths {self.width} and {self.text_width}")
        if self.freeze_segmenter and not (self.init_segmenter or self.init):
            raise BadInput("--freeze-segmenter: would freeze random weights; give --init-segmenter RUN")
        if self.tokens_per_trajectory not in (1, 2, 4):
            raise BadInput(f"--tokens-per-trajectory {self.tokens_per_trajectory}: 1, 2 or 4")
        if "{}" not in self.prompt:
            raise BadInput(f"--prompt {self.prompt!r}: write {{}} where the name of the class goes")
        if self.eval_split not in ("test", "validation"):
            raise BadInput(f"--eval-split {self.eval_split}: test or validation")


# CHOICE, nano only: the segmentation loss weighs 4 and the segmenter learns 4 times as fast. Minutes of
# training are too short for the release's weight of 1, and tokens are no better than their masks.
# base and large fit a GPU of 80 GB: sixteen clips go through at a time, and activations are computed again.
FULL = dict(layers=12, width=768, heads=12, text_layers=12, text_width=768, embed=256, text_length=77,
            learned_tokens=16, batch=64, micro_batch=16, recompute=True, lr=1e-4, clip=10.0, save_every=1000)
CLIP_SIZES = {
    "nano": dict(size="nano", patch=8, steps=450, lr=5e-4, segmenter_lr=4.0, segmentation_weight=4.0,
                 clip=5.0, save_every=50, **trajtok.NANO_CLIPS),
    "tiny": dict(size="tiny", layers=6, width=256, heads=8, text_layers=4, text_width=256, embed=256,
                 batch=64, steps=10_000, lr=5e-4, warmup=500, clip=5.0, save_every=500),
    "base": FULL | dict(size="base", steps=100_000, warmup=5000),
    "large": FULL | dict(size="large", layers=24, width=1024, heads=16, steps=200_000, warmup=10_000),
}

# -----------------------------------------------------------------------------------------------------------
# The transformer
# -----------------------------------------------------------------------------------------------------------

def mlp(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention among the real positions, then a GELU MLP of width 4w."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, x, mask=None, lengths=None):
        """x (b, s, w); mask (b, s), True = a real position, None: all are. Or packed, without padding:
        x (1, N, w) holds the clips one after the other, and the list `lengths` says how long each is."""
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b s (three a c) -> three b a s c", three=3, a=self.heads)
        # softmax over the keys of the same clip: padding and dead trajectories are not read
        if lengths is None:
            # None rather than a mask that is all True: a GPU has a faster kernel without a mask
            keys = None if mask is None else mask[:, None, None]        # (b, 1, 1, s): same for all queries
            y = F.scaled_dot_product_attention(q, k, v, keys)
        else:
            clips = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
            y = torch.cat([F.scaled_dot_product_attention(*clip) for clip in clips], 2)
        x = x + self.proj(rearrange(y, "b a s c -> b s (a c)"))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Layers and a norm: x (b, s, w) -> (b, s, w). The caller adds the positions."""

    def __init__(self, layers, width, heads, recompute=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.recompute = recompute
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # std 1 / sqrt(fan in). With the customary 0.02, attention is so weak at width 128 that all
                # captions start with almost the same vector. Each layer adds two branches to x. As in GPT-2,
                # their last matrices start smaller, so that all branches together are about as large as one.
                branch = name.endswith(("proj.weight", "mlp.2.weight"))
                fan = p.shape[1] * (2 * layers if branch else 1)
                nn.init.normal_(p, std=fan ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, mask=None, lengths=None, begin=0, end=None):
        """x, mask, lengths: as in Layer. Only layers begin .. end - 1 are applied; with end=None, all layers
        from `begin` on, and then the norm."""
        for layer in self.layers[begin:end]:
            x = recomputed(self.recompute, layer, x, mask, lengths)
        return self.norm(x) if end is None else x


# -----------------------------------------------------------------------------------------------------------
# The tokenizers. Transformers, clips and schedule are the same for all of them
# -----------------------------------------------------------------------------------------------------------

# A tokenizer is a module that is built from the ClipConfig and has one method:
#
#   forward(video uint8 (b, t, H, W, 3), m, labels (b, t, H, W)) -> tokens (b, M, w), mask, seg
#
# m: how many tokens a trajectory has; grids of patches ignore it. labels: the true trajectory of each pixel,
# -1 = none; only a tokenizer that is given its masks, as TrajViT is, reads them. mask bool (b, M), True = a
# real token; None: all are. seg: a Segmentation, which gets the segmentation loss, or None.
#
# A tokenizer that changes the tokens between the layers has a second method, which calls the layers itself:
#
#   through(transformer, x (b, 1 + M, w): CLS and tokens) -> (b, 1 + any, w), CLS first

class TrajViT2(TrajTok):
    """The paper's tokenizer, TrajTok, with the interface above. It is derived from TrajTok, so that its
    weights have the names that TrajTok.from_pretrained reads."""

    def __init__(self, cfg):
        # the flags that mean the same as in TrajTokConfig (`heads`, here, are those of the transformers)
        names = ["image_size", "frames", "num_queries", "recompute"]
        names += [field.name for field in dataclasses.fields(Variants)]
        same = {name: getattr(cfg, name) for name in names}
        super().__init__(dataclasses.replace(SIZES[cfg.size], out_dim=cfg.width, **same))

    def forward(self, video, m=1, labels=None):
        tokens, seg = super().forward(video, m)
        return tokens.z, tokens.mask, seg


class ViT3D(nn.Module):
    """Patches of 2 frames x p x p pixels, a linear map, learned positions; joint attention over all of
    them."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.image_size % cfg.patch:
            raise BadInput(f"--patch {cfg.patch}: does not divide an image of {cfg.image_size} px")
        self.cfg = cfg
        self.side = cfg.image_size // cfg.patch                 # h' = w': patches along a side
        self.steps = math.ceil(cfg.frames / 2)                  # t': time steps, of two frames each
        self.embed = nn.Linear(2 * cfg.patch ** 2 * 3, cfg.width)
        self.position = self.new_positions(self.steps * self.side ** 2)

    def new_positions(self, count):
        """Learned positions (1, count, width). They start at a deviation of 0.02, as in ViT."""
        scale = 0.02 * self.cfg.position_scale
        return nn.Parameter(scale * torch.randn(1, count, self.cfg.width))

    def patches(self, video):
        """uint8 (b, t, H, W, 3) -> normalised pixels of the patches (b, t', h', w', 2·p·p·3)."""
        x = normalise(video)
        # if the number of frames is odd, the last one is taken twice; a picture is one frame
        if x.shape[1] % 2:
            x = torch.cat((x, x[:, -1:]), 1)
        p = self.cfg.patch
        return rearrange(x, "b (t two) c (h p) (w q) -> b t h w (two p q c)", two=2, p=p, q=p)

    def forward(self, video, m=1, labels=None):
        x = self.embed(self.patches(video)).flatten(1, 3)       # (b, t' h' w', width)
        # a shorter clip uses the first positions, which are in the order (t', h', w')
        return x + self.position[:, :x.shape[1]], None, None

    def by_time_step(self, x):
        """[CLS; patches] (b, 1 + t' h' w', width) -> CLS (b, 1, width), patches (b, t', h' w', width)."""
        return x[:, :1], rearrange(x[:, 1:], "b (t n) d -> b t n d", n=self.side ** 2)


class ViViT(ViT3D):
    """Factorised encoder (ViViT's model 2, arXiv 2103.15691). The transformer sees each time step alone, with
    a CLS of its own; a second, small transformer reads these CLSs in order. CHOICE: the second one has the
    published 4 layers, or a third of the first one's layers where these are fewer."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # in place of ViT3D's: the first transformer does not know which time step it sees
        self.position = self.new_positions(self.side ** 2)
        self.time = self.new_positions(1 + self.steps)
        layers = min(4, max(1, cfg.layers // 3))
        self.temporal = Transformer(layers, cfg.width, cfg.heads, cfg.recompute)

    def forward(self, video, m=1, labels=None):
        x = self.embed(self.patches(video))                     # (b, t', h', w', width)
        x = x.flatten(2, 3) + self.position
        return x.flatten(1, 2), None, None

    def through(self, transformer, x):
        cls, patches = self.by_time_step(x)
        b, t = patches.shape[:2]
        # in space: a copy of CLS before the patches of each time step
        copies = cls[:, None].expand(-1, t, -1, -1)
        x = torch.cat((copies, patches), 2).flatten(0, 1)       # (b t', 1 + h' w', width)
        read = transformer(x)[:, 0]                             # what each copy has read
        # in time: CLS before the time steps of each clip
        x = torch.cat((cls, read.unflatten(0, (b, t))), 1)
        return self.temporal(x + self.time[:, :1 + t])


class TokenLearner(ViT3D):
    """A ViT3D in which, after two thirds of the layers, the patches of each time step are replaced by
    `learned_tokens` weighted means of them. The weights are computed from the patches (arXiv 2106.11297,
    version 1.1)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.at = 2 * cfg.layers // 3
        self.norm = nn.LayerNorm(cfg.width)
        self.score = mlp(cfg.width, 64, cfg.learned_tokens)

    def through(self, transformer, x):
        cls, x = self.by_time_step(transformer(x, end=self.at))
        # softmax over the patches of a time step: a token is a mean of them
        weights = self.score(self.norm(x)).mT.softmax(-1)       # (b, t', learned, h' w')
        learned = weights.to(x.dtype) @ x                       # (b, t', learned, width)
        x = torch.cat((cls, learned.flatten(1, 2)), 1)
        return transformer(x, begin=self.at)


class RLT(ViT3D):
    """Run-length tokenization (arXiv 2411.05222): a ViT3D that drops the patches that have not changed since
    the time step before. These are the patches in which, with a mean over normalised pixels,

      mean |last frame of this time step - first frame of the one before| <= rlt_threshold"""

    def forward(self, video, m=1, labels=None):
        x = self.patches(video)
        z = self.embed(x).flatten(1, 3)
        first, last = x.chunk(2, -1)                            # the two frames of each patch
        change = (last[:, 1:] - first[:, :-1]).abs().mean(-1)   # (b, t' - 1, h', w')
        kept = torch.ones_like(x[..., 0], dtype=torch.bool)     # True = a token; the first time step always
        kept[:, 1:] = change > self.cfg.rlt_threshold
        return z + self.position[:, :z.shape[1]], kept.flatten(1), None


class Reader(nn.Module):
    """One learned latent reads a trajectory's vectors, one from each frame, by cross-attention, without
    MLPs."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.latent = nn.Parameter(dim ** -0.5 * torch.randn(1, 1, dim))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = nn.MultiheadAttention(dim, heads, batch_first=True)
            self.layers.append(nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim), attention)))

    def forward(self, x, seen):
        """x (s, t, d) of s trajectories; seen bool (s, t), True = the trajectory is in this frame -> (s,
        d)."""
        z = self.latent.expand(len(x), -1, -1)                  # (s, 1, d)
        for norm_z, norm_x, attention in self.layers:
            y = norm_x(x)
            # softmax over the frames in which the trajectory is seen; key_padding_mask: True = not read
            z = z + attention(norm_z(z), y, y, key_padding_mask=~seen, need_weights=False)[0]
        return z[:, 0]


class TrajViT(Features):
    """TrajTok's predecessor (arXiv 2505.23617): trajectories are given by another model, one token each.

      features of several scales, summed as in TrajTok
      appearance: mean of the features over the trajectory's points in each frame -> Reader over the frames
      place:      mean (x, y, time) of these points, as sines and cosines           -> Reader over the frames
      token = linear(appearance + place)

    CHOICE: on made clips it gets the true masks, where its paper has an external segmenter and tracker.
    CHOICE: TrajTok's backbone replaces the published ResNet-18, so that the two differ in their tokens
    alone."""

    def __init__(self, cfg):
        shape = dataclasses.replace(SIZES[cfg.size], recompute=cfg.recompute)
        super().__init__(shape)
        d = shape.dim
        self.most = cfg.num_queries                             # K: the largest K trajectories are kept
        depth = 4 if cfg.layers >= 24 else 2                    # as published: 4 for ViT-Large
        self.appearance = Reader(d, depth, shape.heads)
        self.place = Reader(d, depth, shape.heads)
        # a sine and a cosine of 16 frequencies, for x, y and time
        self.where = nn.Linear(3 * 2 * 16, d)
        self.scale = cfg.position_scale
        self.out = nn.Linear(d, cfg.width)

    def forward(self, video, m, labels):
        f, grid = self.extract(normalise(video))
        ids = labels_on_grid(labels, grid, self.most).to(f.device)           # (b, n), -1 = of no trajectory
        appearance, centre, seen = self.means(f.float(), ids, grid)
        alive = seen.any(1)                                     # (b K,), True = has a point at all
        # a softmax over no frame would be NaN, so a dead trajectory reads all frames, and is masked later
        seen = seen | ~alive[:, None]
        frequencies = math.pi * 2 ** torch.linspace(0, 6, 16, device=f.device)
        angles = centre[..., None] * frequencies                # (b K, t, 3, 16)
        place = self.where(waves(angles.flatten(2)))
        z = self.out(self.appearance(appearance, seen) + self.scale * self.place(place, seen))
        b = len(video)
        return z.unflatten(0, (b, -1)), alive.unflatten(0, (b, -1)), None

    def means(self, f, ids, grid):
        """Means over the points of each trajectory in each frame: of the features f (b, n, d) -> (b K, t, d),
        and of x, y and time, each in (0, 1) -> (b K, t, 3). Third, seen (b K, t), True = the trajectory has a
        point in this frame."""
        t, h, w = grid
        # what is summed over the points: features, place, and a 1 to count them
        place = times_and_places(grid, f.device).flip(1)        # (n, 3): x, y, time
        place = place.expand(len(f), -1, -1)
        points = torch.cat((f, place, torch.ones_like(f[..., :1])), 2)       # (b, n, d + 4)
        # a cell is a trajectory in a frame; points of no trajectory go to the first t cells
        frame = torch.arange(t, device=f.device).repeat_interleave(h * w)
        cell = (ids + 1) * t + frame
        sums = points.new_zeros(len(f), (self.most + 1) * t, points.shape[2])
        sums = sums.scatter_add(1, cell[..., None].expand_as(points), points)
        sums = sums[:, t:].unflatten(1, (-1, t)).flatten(0, 1)  # (b K, t, d + 4)
        count = sums[..., -1:]
        mean = sums / count.clamp(min=1)
        return mean[..., :-4], mean[..., -4:-1], count[..., 0] > 0


TOKENIZERS = {"trajvit2": TrajViT2, "trajvit": TrajViT, "vit3d": ViT3D, "vivit": ViViT,
              "tokenlearner": TokenLearner, "rlt": RLT}


def tokenizer_class(name):
    """--tokenizer -> its class: one of ours, or that of FILE.py:CLASS, for which the file is run."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    file, _, wanted = name.rpartition(":")
    found = runpy.run_path(file) if Path(file).is_file() else {}
    if wanted not in found:
        raise BadInput(f"--tokenizer {name}: one of {', '.join(TOKENIZERS)}, or FILE.py:CLASS")
    return found[wanted]


# -----------------------------------------------------------------------------------------------------------
# The model
# -----------------------------------------------------------------------------------------------------------

class VideoEncoder(nn.Module):
    """Tokenizer, then a transformer over [CLS; tokens]. Trajectories are a set and get no positions here:
    where and when a thing was has to be in its token. Patches get learned positions from their tokenizer.

    Tokens of dead trajectories and of dropped patches end here: real tokens are moved to the front of each
    clip, and the batch is cut at the largest number of them."""

    def __init__(self, tokenizer, cfg):
        super().__init__()
        self.tokenizer = tokenizer
        # torch.compile would compile the layers anew for each list of lengths
        self.pack = not cfg.compile
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads, cfg.recompute)

    def forward(self, video, m=1, labels=None):
        """-> CLS (b, w), number of real tokens (b,), Segmentation or None."""
        z, mask, seg = self.tokenizer(video, m, labels)
        count = torch.full((len(z),), z.shape[1], device=z.device)
        # --flops: tensors on the meta device have no values, so which tokens are real is not known
        if z.is_meta:
            mask = None
        if mask is not None:
            count = mask.sum(1)
            z, mask, _ = compact(Tokens(z, mask, mask))         # the third field is not used here
            mask = F.pad(mask, (1, 0), value=True)              # CLS is always real
        # PAPER: a CLS token in front; a plain ViT from here on
        x = torch.cat((self.cls.expand(len(z), -1, -1), z), 1)  # (b, 1 + M, w)
        # each way returns CLS first; only CLS is read
        if hasattr(self.tokenizer, "through"):
            x = self.tokenizer.through(self.transformer, x)
        elif mask is not None and self.pack and x.is_cpu:
            x = self.packed(x, mask)
        else:
            x = self.transformer(x, mask)
        return x[:, 0], count, seg

    def packed(self, x, mask):
        """The transformer without padding: x (b, 1 + M, w), mask, True = real -> CLS (b, 1, w). One sequence
        holds the real tokens of all clips, and each clip attends to itself. On a CPU this is twice as fast
        as padding, at nano with four tokens a trajectory."""
        lengths = mask.sum(1)                                   # (b,)
        first = lengths.cumsum(0) - lengths                     # where each clip, and so its CLS, begins
        y = self.transformer(x[mask][None], lengths=lengths.tolist())        # (1, N, w)
        return y[0, first, None]


class TextEncoder(nn.Module):
    """CHOICE (the paper does not say; the release takes BERT-base): a bidirectional transformer from scratch
    with learned positions. A caption's vector is the mean over its real tokens. Captions of different words
    then have different vectors from the first step on; a CLS would have to learn that first."""

    def __init__(self, vocabulary, cfg):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, cfg.text_width)
        self.position = nn.Parameter(0.02 * torch.randn(1, cfg.text_length, cfg.text_width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.transformer = Transformer(cfg.text_layers, cfg.text_width, cfg.heads, cfg.recompute)

    def forward(self, ids, mask):                               # (b, s), True = real -> (b, text_width)
        x = self.transformer(self.embed(ids) + self.position[:, :ids.shape[1]], mask)
        # the mean over real tokens: with padding in it, a vector would depend on the other captions' lengths
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class VideoCLIP(nn.Module):
    """A video tower and a text tower, trained so that a clip and its caption have similar unit vectors (CLIP,
    arXiv 2103.00020). Both are trained from scratch. encoding: captions -> ids (data.load_encoding)."""

    def __init__(self, cfg, encoding):
        super().__init__()
        self.cfg, self.encoding = cfg, encoding
        self.video = VideoEncoder(tokenizer_class(cfg.tokenizer)(cfg), cfg)
        self.text = TextEncoder(encoding.n_vocab, cfg)
        self.video_proj = nn.Linear(cfg.width, cfg.embed, bias=False)
        self.text_proj = nn.Linear(cfg.text_width, cfg.embed, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    @classmethod
    def from_pretrained(cls, folder):
        """The folder of a run -> its model, in eval mode."""
        saved = trajtok.read_json(Path(folder) / "config.json")
        if "words" not in saved:
            raise BadInput(f"{folder}: its config.json is not that of a run of train_clip.py")
        names = [field.name for field in dataclasses.fields(ClipConfig)]
        cfg = ClipConfig(**{name: saved[name] for name in names if name in saved})
        encoding = data.word_encoding(saved["words"]) if saved["words"] else data.load_encoding(cfg.text)
        return trajtok.load_weights(cls(cfg, encoding), folder).eval()

    def embed_video(self, video, m=1, labels=None):
        """-> unit vectors (b, e), CLS (b, w), number of real tokens (b,), Segmentation or None."""
        with trajtok.precision(video.device, self.cfg.bf16):
            cls, count, seg = self.video(video, m, labels)
            vectors = self.video_proj(cls).float()
        return F.normalize(vectors, dim=-1), cls, count, seg

    def embed_text(self, ids, mask):
        """-> unit vectors (b, e)."""
        with trajtok.precision(ids.device, self.cfg.bf16):
            vectors = self.text_proj(self.text(ids, mask)).float()
        return F.normalize(vectors, dim=-1)

    def contrastive(self, video, text):
        """InfoNCE over a batch of b pairs, unit vectors (b, e) -> scalar; about ln b before training.

          L = -1/(2b) sum_i ( log softmax_j(v_i t_j / tau)[i] + log softmax_j(t_i v_j / tau)[i] )

        The temperature tau starts at 0.07 and is learned; `train` clamps it to [0.001, 0.5] after each
        step."""
        # softmax over the batch: each video chooses among all captions, each caption among all videos
        logits = video @ text.T / self.temperature
        target = torch.arange(len(video), device=video.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def build(cfg, encoding, device):
    """The model of a run with its first weights: random ones, all weights of another run (--init), or those
    of another run's segmenter (--init-segmenter). PAPER: with --freeze-segmenter the masks stay as they are,
    while the encoder and everything behind it learn."""
    model = VideoCLIP(cfg, encoding)
    segmenter = getattr(model.video.tokenizer, "segmenter", None)
    ablated = not (cfg.detach and cfg.hierarchical and cfg.hard_mask and cfg.mean_start)
    needed = ablated or cfg.places or cfg.path or cfg.init_segmenter or cfg.freeze_segmenter
    if needed and segmenter is None:
        raise BadInput(f"--tokenizer {cfg.tokenizer}: has no segmenter to change, to load or to freeze")
    if cfg.init:
        trajtok.load_weights(model, cfg.init)
    if cfg.init_segmenter:
        trajtok.load_weights(segmenter, cfg.init_segmenter, "video.tokenizer.segmenter.", "segmenter.")
    if cfg.freeze_segmenter:
        segmenter.requires_grad_(False)
    # Module.compile() works in place; torch.compile(module) would put `_orig_mod.` before the weights' names
    if cfg.compile:
        model.video.tokenizer.compile()
        for layer in (*model.video.transformer.layers, *model.text.transformer.layers):
            # the number of tokens changes from step to step
            layer.compile(dynamic=True)
    return model.to(device)


# -----------------------------------------------------------------------------------------------------------
# One step
# -----------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    video: torch.Tensor             # uint8 (b, t, H, W, 3)
    labels: torch.Tensor            # int64 (b, t, H, W), -1 = unlabelled
    ids: torch.Tensor               # int64 (b, s): the caption, s = cfg.text_length
    mask: torch.Tensor              # bool (b, s), True = a real token


def encode(model, batch, m):
    """-> unit vectors of videos and of texts, each (b, e), weighted segmentation loss (0 without a
    Segmentation), terms for the log. The caller computes the contrastive loss, which needs the vectors of all
    micro-batches and processes."""
    video, _, count, seg = model.embed_video(batch.video, m, batch.labels)
    text = model.embed_text(batch.ids, batch.mask)
    terms = dict(tokens=count.float().mean().item())
    segmentation = video.new_zeros(())
    if seg is not None:
        # outside autocast: the matching counts points, and bfloat16 counts exactly only up to 256
        focal, dice = segmentation_loss(seg, batch.labels)
        # PAPER: Dice is added to focal, so that small things are found. 0.5 and 1 are the release's weights
        both = 0.5 * focal + model.cfg.dice_weight * dice
        segmentation = model.cfg.segmentation_weight * both
        terms |= dict(focal=focal.item(), dice=dice.item())
    return video, text, segmentation, terms


def whole_step(model, batch, m):
    """Put the gradients of one batch into p.grad -> terms for the log. Other processes' clips are negatives
    too."""
    video, text, segmentation, terms = encode(model, batch, m)
    contrastive = model.contrastive(gather(video), gather(text))
    # train() sums the gradients over all processes. Each process has the same contrastive loss, of all clips,
    # but the gradient through its own clips only, so that the sum is the whole gradient. The segmentation
    # loss is a mean over the process's own clips, so that its sum has to be divided.
    loss = contrastive + segmentation / ranks()[1]
    # PAPER: both losses train the masks, the segmentation loss directly, the contrastive one through z_init
    loss.backward()
    return dict(contrastive=contrastive.item(), **terms)


def micro_batch_step(model, batch, m):
    """The gradients of whole_step, with activations of only `cfg.micro_batch` clips in memory (GradCache,
    arXiv 2101.06983). InfoNCE couples all clips of a batch, but only through their vectors v and t. Nothing
    in the model is random once m is drawn, so a clip that is embedded twice gets the same vector twice."""
    size = model.cfg.micro_batch
    parts = [Batch(*part) for part in zip(*(x.split(size) for x in batch))]
    # 1. the vectors of all clips, without the graph that leads to them
    with torch.no_grad():
        video = torch.cat([model.embed_video(part.video, m, part.labels)[0] for part in parts])
        text = torch.cat([model.embed_text(part.ids, part.mask) for part in parts])
    # 2. the loss, and its gradients dv, dt with respect to the vectors
    video, text = video.requires_grad_(), text.requires_grad_()
    contrastive = model.contrastive(gather(video), gather(text))
    contrastive.backward()
    # 3. each part is embedded again, with a graph. By the chain rule sum(dv · v) + sum(dt · t), with dv and
    # dt constant, has the same gradient with respect to the weights as the contrastive loss
    means = collections.Counter()
    for part, dv, dt in zip(parts, video.grad.split(size), text.grad.split(size)):
        v, t, segmentation, terms = encode(model, part, m)
        share = len(v) / len(video)                             # the last part may be smaller
        part_loss = (dv * v).sum() + (dt * t).sum() + share * segmentation / ranks()[1]
        part_loss.backward()
        for key, value in terms.items():
            means[key] += share * value
    return dict(contrastive=contrastive.item(), **means)


# -----------------------------------------------------------------------------------------------------------
# Evaluation
# -----------------------------------------------------------------------------------------------------------

def recalls(similarity, prefix, right):
    """similarity (queries, candidates) -> R@1, R@5, R@10 in [0, 1]. right bool, the same shape, True = an
    answer to that query. The rank of a query is the number of wrong candidates that score at least as high as
    its best answer. So a tie counts against the model: otherwise a constant output would score 1."""
    answer = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    # written as "not smaller", because NaN >= answer is False: a model that outputs NaN would be perfect
    rank = (~(similarity < answer) & ~right).sum(1)
    return {f"{prefix}_r{n}": (rank < n).float().mean().item() for n in (1, 5, 10)}


def linear_probe(train, valid, test):
    """train, valid, test: each (features (n, w), classes (n,)) -> accuracy on test of a ridge regression from
    frozen features to one-hot classes, fitted on train:

      W = (X^T X + n penalty I)^-1 X^T Y

    Of four penalties, the one with the best accuracy on valid is taken."""
    mean = train[0].mean(0)
    deviation = train[0].std(0) + 1e-6

    def standardised(features):                                 # with a column of ones for the bias
        x = (features - mean) / deviation
        return F.pad(x, (0, 1), value=1.0).double()

    x = standardised(train[0])                                  # (n, w + 1)
    y = F.one_hot(train[1]).double()
    best = accuracy = -1.0
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        ridge = penalty * len(x) * torch.eye(x.shape[1])
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        scores = []
        for features, classes in (valid, test):
            guess = (standardised(features) @ weights).argmax(1)
            scores.append((guess == classes).float().mean().item())
        if scores[0] > best:
            best, accuracy = scores
    return accuracy


@torch.no_grad()
def embed(model, batches, damage):
    """All n clips of a dataset -> dict: vectors (n, e); features (n, w), the CLS; tokens (n,), how many;
    where, a list of (batch, row); and, if the batches hold them, captions, label, appearance, motion. It is
    empty if no clip can be used."""
    model.eval()
    clips = collections.defaultdict(list)
    loader = data.loader(batches, 0, len(batches), model.cfg.workers)
    for i, batch in enumerate(tqdm(loader, "clips embedded", len(batches), leave=False, disable=None)):
        damage.add(batch["bad"])
        batch = data.finish(batch, model.temperature.device)
        if not len(batch["video"]):                             # no file of this batch can be used
            continue
        m = model.cfg.tokens_per_trajectory
        vectors, cls, count, _ = model.embed_video(batch["video"], m, batch["labels"])
        batch |= dict(vectors=vectors.cpu(), features=cls.float().cpu(), tokens=count.cpu())
        batch["where"] = [(i, j) for j in range(len(vectors))]
        # real clips have no appearance and motion
        for key in ("vectors", "features", "tokens", "where", "captions", "label", "appearance", "motion"):
            clips[key].extend(batch.get(key, []))           # the rows of a tensor, or of a list
    if not clips:
        raise BadInput(f"--data {model.cfg.data}: not one held-out clip can be used")
    for key in clips:
        if clips[key] and torch.is_tensor(clips[key][0]):
            clips[key] = torch.stack(clips[key])
    return clips


@torch.no_grad()
def embed_texts(model, texts):
    """Texts -> unit vectors (n, e)."""
    device = model.temperature.device
    ids, mask = data.tokenize(model.encoding, texts, model.cfg.text_length)
    parts = zip(ids.to(device).split(256), mask.to(device).split(256))
    return torch.cat([model.embed_text(*part).cpu() for part in parts])


def retrieval(model, clips):
    """Text-to-video and video-to-text retrieval -> dict of recalls; texts, the different captions; right,
    bool (texts, clips), True = the clip has this caption; similarity, of the same shape. Each different
    caption is one query, and every clip that has it is a right answer."""
    captions = clips["captions"]
    texts = sorted({text for own in captions for text in own})
    right = torch.tensor([[text in own for own in captions] for text in texts])
    similarity = embed_texts(model, texts) @ clips["vectors"].T
    result = dict(clips=len(captions), live_tokens=clips["tokens"].float().mean().item())
    result |= recalls(similarity, "t2v", right) | recalls(similarity.T, "v2t", right.T)
    return result, texts, right, similarity


def zero_shot(model, clips):
    """The share of labelled clips to which their own label is the most similar of all; None without labels.
    The vector of a label is that of a sentence with its name, cfg.prompt (CLIP, arXiv 2103.00020)."""
    labels = sorted({label for label in clips["label"] if label})
    if not labels:
        return None
    prompts = [model.cfg.prompt.replace("{}", label) for label in labels]
    guess = (clips["vectors"] @ embed_texts(model, prompts).T).argmax(1)
    hits = [labels[i] == label for i, label in zip(guess, clips["label"]) if label]
    return sum(hits) / len(hits)


def probe(model, clips, world):
    """Linear probes of the frozen CLS on made clips -> accuracies for the subject's shape, called appearance
    in result.json, and for its motion."""
    count = model.cfg.probe_clips
    sets = []
    # train: training clips of numbers so high that no training reaches them; then valid; test is `clips`
    # (--eval-split validation scores some of valid, too)
    for begin, size in ((500_000_000, count), (data.VALIDATION, max(count // 4, 1))):
        batches = data.WorldBatches(world, model.cfg.batch, indices=range(begin, begin + size))
        sets.append(embed(model, batches, data.Damage()))
    sets.append(clips)
    scores = {}
    for key in ("appearance", "motion"):
        scores[key] = linear_probe(*[(one["features"], one[key]) for one in sets])
    return scores


def reversal(model, clips, held_out):
    """Does the model know which way time runs? v and t are the vectors of a clip and its caption, v' and t'
    those of the same clip backwards. -> the share of clips for which

      v t + v' t' > v t' + v' t,      that is      (v - v') (t - t') > 0

    Only clips count whose caption changes, and whose motion backwards is one that training shows. Chance is
    1/2. None if there is no such clip, and for pictures."""
    world = dataclasses.replace(held_out.world, reverse=True)
    if world.frames == 1:
        return None
    batches = data.WorldBatches(world, model.cfg.batch, indices=held_out.indices)
    twins = embed(model, batches, data.Damage())
    texts = [own[0] for own in clips["captions"]]
    twin_texts = [own[0] for own in twins["captions"]]
    v = clips["vectors"] - twins["vectors"]
    t = embed_texts(model, texts) - embed_texts(model, twin_texts)
    right = (v * t).sum(1) > 0
    changed = torch.tensor([a != b for a, b in zip(texts, twin_texts)])
    # a clip in which something approaches has no motion class when it runs backwards
    changed &= twins["motion"] >= 0
    return right[changed].float().mean().item() if changed.any() else None


def found_clips(similarity, right, texts, clips, held_out):
    """-> image uint8 (H, W, 3): three captions, and below each the three clips that it finds first, each as
    three frames in a row. The bar under a clip is green if the clip has this caption, else red."""
    sheet = []
    for query in np.linspace(0, len(texts) - 1, 3).astype(int):
        found = []
        best = similarity[query].argsort(descending=True)[:3]
        for clip in best.tolist():
            number, row = clips["where"][clip]
            video = data.finish(held_out[number], "cpu")["video"][row]
            three = video[[0, len(video) // 2, -1]]
            frames = rearrange(three, "t h w c -> h (t w) c").numpy()
            scale = max(1, 128 // len(frames))
            frames = frames.repeat(scale, 0).repeat(scale, 1)
            frames[-6:] = (40, 170, 70) if right[query, clip] else (200, 60, 60)
            # white gaps; the 30 rows above are for the caption
            found.append(np.pad(frames, ((30, 4), (4, 4), (0, 0)), constant_values=255))
        line = np.concatenate(found, 1)
        trajtok.write_text(line, texts[query], 10, 8)
        sheet.append(line)
    return np.concatenate(sheet)


def count_flops(cfg):
    """--flops: print a table of the GFLOPs that VideoEncoder takes for one clip. They are counted on the meta
    device, where tensors have shapes and no values, so nothing is computed. They are upper bounds, as no
    trajectory is dead and no patch is dropped."""
    lengths = (8, 16, 32, 64, 128)
    side = cfg.image_size
    lines = [["GFLOPs a clip", *(f"{t} frames" for t in lengths)]]
    for name, tokenizer in TOKENIZERS.items():
        cells = [name]
        for t in lengths:
            one = dataclasses.replace(cfg, frames=t, recompute=False)
            with torch.device("meta"):
                encoder = VideoEncoder(tokenizer(one), one)
                pixels = torch.zeros(1, t, side, side, 3, dtype=torch.uint8)
            # trajvit reads the values of labels, so these lie on the CPU: vertical stripes, a label each
            labels = torch.arange(side).expand(1, t, side, -1)
            gflops = trajtok.count_gflops(lambda: encoder(pixels, cfg.tokens_per_trajectory, labels))
            cells.append(f"{gflops:.2f}")
        lines.append(cells)
    print("\n".join(trajtok.aligned(lines)))


# -----------------------------------------------------------------------------------------------------------
# The run
# -----------------------------------------------------------------------------------------------------------

# the terms of a step that are printed, and drawn as curves
TERMS = ("contrastive", "focal", "dice", "tokens")


def train(cfg, folder):
    """Make data, model and optimizer, train, and score the held-out clips. With --eval-only, only score.
    `rank` is the number of this process."""
    device = trajtok.setup(cfg)
    rank, processes = ranks()
    train_set, held_out = data.open_data(cfg, "caption", processes)
    encoding, words = choose_words(cfg, train_set, folder)
    model = build(cfg, encoding, device)
    damage = data.Damage()
    if cfg.eval_only:
        trajtok.load_weights(model, folder)
        return score_run(model, held_out, folder, trajtok.Log(folder), damage)
    # config.json holds more than the flags: the vocabulary, without which the text tower cannot be used, and
    # the TrajTokConfig, which TrajTok.from_pretrained reads
    tokenizer = model.video.tokenizer
    shape = dataclasses.asdict(tokenizer.cfg) if isinstance(tokenizer, TrajTok) else None
    manifest = data.fingerprint(cfg.data, cfg.val)
    optimizer = trajtok.make_optimizer(model, cfg, {"video.tokenizer.segmenter.": cfg.segmenter_lr})
    # first the checkpoint: a --resume with flags that do not fit it must not change config.json
    first = trajtok.load_checkpoint(folder, model, optimizer) if cfg.resume else 0
    trajtok.open_run(folder, cfg, trajtok=shape, words=words, manifest=manifest)
    log = trajtok.Log(folder, first)
    clips = cfg.batch * processes                               # of a step, in all processes
    print(f"{count_parameters(model) / 1e6:.2f} M parameters, tokenizer {cfg.tokenizer}, on {device}; "
          f"an untrained contrastive loss is about ln {clips} = {math.log(clips):.2f}")
    began = mark = time.time()
    loader = data.loader(train_set, first, cfg.steps, cfg.workers, rank, processes)
    for step, batch in enumerate(loader, first):
        lr = trajtok.learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # 1. the batch. A file that could not be used was replaced by another; it is named once
        damage.add(batch["bad"])
        batch = prepare(model, batch, step * processes + rank)
        # 2. the gradients. PAPER: 1, 2 or 4 tokens a trajectory, drawn at each step. The draw depends on the
        # seed and the step alone, so it is the same in all processes, and after --resume
        m = int(np.random.default_rng((cfg.seed, step)).choice((1, 2, 4)))
        model.train()
        optimizer.zero_grad()
        take_step = micro_batch_step if 0 < cfg.micro_batch < cfg.batch else whole_step
        terms = take_step(model, batch, m)
        trajtok.sum_gradients(p for p in model.parameters() if p.requires_grad)
        # every process had the whole gradient of the temperature, so the sum is `processes` times too large
        model.temperature.grad /= processes
        # 3. the step
        terms["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
        trajtok.check_finite(terms, step)
        optimizer.step()
        model.temperature.data.clamp_(0.001, 0.5)
        # 4. the log; from time to time a checkpoint, and scores on validation clips
        # focal is exactly 0 only where not one point is labelled
        if step == first and terms.get("focal") == 0:
            print("no segmentation loss: no clip of this batch has masks")
        # means over processes. This waits for the slowest process, so `seconds` is the time of the whole step
        terms = dict(zip(terms, trajtok.mean_over_processes(list(terms.values()), device)))
        seconds = time.time() - mark
        pace = clips / seconds
        log(step=step, **terms, lr=lr, temperature=model.temperature.item(), clips=clips, seconds=seconds,
            clips_per_second=pace, memory_gb=trajtok.peak_memory_gb(device))
        done = step + 1
        if step % 10 == 0 or done == cfg.steps:
            left = (time.time() - began) / (done - first) * (cfg.steps - done)
            shown = [f"{key} {terms[key]:.3f}" for key in TERMS if key in terms]
            print(f"step {step:5d}/{cfg.steps}", *shown, f"{pace:.0f} clips/s", f"{left:.0f} s left",
                  sep="  ", flush=True)
        if done % cfg.save_every == 0 or done == cfg.steps:
            trajtok.save_checkpoint(folder, model.state_dict(), optimizer.state_dict(), done)
        if cfg.eval_every and done % cfg.eval_every == 0 and rank == 0:
            validate(model, log, step, damage)
        mark = time.time()
    if rank == 0:
        score_run(model, held_out, folder, log, damage)


def prepare(model, batch, number):
    """A batch as data.py makes it -> Batch on the model's device, with --augment augmented. number: of the
    batch, in all processes; it is the seed of the augmentation, together with cfg.seed."""
    cfg, device = model.cfg, model.temperature.device
    batch = data.finish(batch, device, number + cfg.seed * 10 ** 6 if cfg.augment else None)
    video, labels = batch["video"], batch["labels"]
    if cfg.tokenizer == "trajvit" and not (labels >= 0).any():
        raise BadInput("--tokenizer trajvit: is given its trajectories, but no clip of this batch has masks")
    ids, mask = data.tokenize(model.encoding, batch["caption"], cfg.text_length)
    return Batch(video, labels, ids.to(device), mask.to(device))


def choose_words(cfg, train_set, folder):
    """--text -> the encoding of captions, and its list of words if that is the run's own, else None. With
    `captions`, the default for real data, the vocabulary is 256 bytes and the most frequent words of the
    training captions. A word's id follows from its place in the list, so a run that goes on, or starts from
    the weights of another, has to take the list of that run."""
    if cfg.text != "captions":
        return data.load_encoding(cfg.text), None
    captions = train_set.captions()
    source = folder if cfg.resume or cfg.eval_only else cfg.init
    saved = trajtok.read_json(Path(source) / "config.json") if source else {}
    words = saved.get("words") or data.word_list(captions)
    encoding = data.word_encoding(words)
    too_long = sum(len(ids) >= cfg.text_length for ids in encoding.encode_ordinary_batch(captions))
    if too_long:
        print(f"{too_long} of {len(captions)} captions are cut: longer than --text-length {cfg.text_length}")
    return encoding, words


def validate(model, log, step, damage):
    """--eval-every: retrieval on validation clips, for real data on the held-out clips. Writes one line to
    the terminal and one to the log."""
    cfg = dataclasses.replace(model.cfg, eval_split="validation")
    _, held_out = data.open_data(cfg)
    result, *_ = retrieval(model, embed(model, held_out, damage))
    log(step=step, **result)
    print(f"step {step:5d} validation ", *(f"{key} {value:.3f}" for key, value in result.items()), flush=True)


def score_run(model, held_out, folder, log, damage):
    """Score the held-out clips: retrieval, zero-shot classes, linear probes, direction of time, segmentation.
    A score is None where the data has no labels for it, or the tokenizer no masks. Write result.json and
    pictures, and print the scores."""
    cfg, device = model.cfg, model.temperature.device
    clips = embed(model, held_out, damage)
    result, texts, right, similarity = retrieval(model, clips)
    result |= dict(zero_shot=zero_shot(model, clips), appearance=None, motion=None, veq=None, stq=None)
    write_png(folder / "found.png", found_clips(similarity, right, texts, clips, held_out))
    # GFLOPs, the mean of eight held-out clips. Here the transformer reads no dead trajectories and no dropped
    # patches, while --flops counts them
    first_batch, _ = clips["where"][0]
    batch = data.finish(held_out[first_batch], device)
    video, labels = batch["video"][:8], batch["labels"][:8]
    gflops = trajtok.count_gflops(lambda: model.embed_video(video, cfg.tokens_per_trajectory, labels))
    result["gflops"] = gflops / len(video)
    # only for made clips: their generator knows what the subject is and how it moves
    if hasattr(held_out, "world"):
        result |= probe(model, clips, held_out.world) | data.known_controls(held_out.world)
        result["reversal"] = reversal(model, clips, held_out)
    masks, segmenter = [], getattr(model.video.tokenizer, "segmenter", None)
    if segmenter is not None:
        scores, masks = trajtok.evaluate_segmenter(segmenter, held_out, device, cfg.bf16)
        result |= scores
    start = cfg.init_segmenter or cfg.init
    if start:
        # how many clips had trained the weights that this run started from
        before = trajtok.read_json(Path(start) / "config.json")
        # a folder that TrajTok.save_pretrained wrote does not say it
        if "steps" in before:
            result["clips_before"] = before["steps"] * before["batch"] * before.get("world_size", 1)
    steps = [line for line in log.lines() if "contrastive" in line]      # the other lines are validations
    seconds = sum(line["seconds"] for line in steps)
    seen = sum(line["clips"] for line in steps)
    result |= dict(parameters=count_parameters(model), seconds=seconds, clips_seen=seen,
                   clips_per_second=seen / max(seconds, 1e-9), left_out=len(damage),
                   peak_memory_gb=trajtok.peak_memory_gb(device), seed=cfg.seed, tokenizer=cfg.tokenizer)
    write_json(folder / "result.json", result)
    trajtok.save_pictures(folder, masks, log, TERMS)
    report(result, folder)


def report(result, folder):
    """Print the scores of a run, with chance beside them, and which command to try next."""
    n = result["clips"]
    lines = [[f"{n} held-out clips", "score", "chance"]]
    for name, key, chance in (
            ("caption finds its clip: R@1", "t2v_r1", 1 / n), ("R@5", "t2v_r5", 5 / n),
            ("clip finds its caption: R@1", "v2t_r1", 1 / n), ("R@5", "v2t_r5", 5 / n),
            ("zero-shot classes", "zero_shot", None),
            ("linear probe: shape", "appearance", 1 / len(data.SHAPES)),
            ("linear probe: motion", "motion", 1 / len(data.MOTIONS)),
            ("which way time runs", "reversal", 1 / 2),
            ("trajectories: best IoU of objects", "object_iou", None),
            ("trajectories: VEQ", "veq", None), ("trajectories: STQ", "stq", None)):
        if result.get(key) is not None:                         # None: no labels, or no masks
            beside = f"{min(100 * chance, 100):.1f} %" if chance else ""
            lines.append([name, f"{100 * result[key]:.1f} %", beside])
    print("\n".join(["", *trajtok.aligned(lines)]))
    print(f"{result['live_tokens']:.1f} tokens and {result['gflops']:.2f} GFLOPs a clip; "
          f"{result['seconds']:.0f} s of training, {result['clips_per_second']:.0f} clips/s, "
          f"{result['peak_memory_gb']:.1f} GB; {result['left_out']} files left out")
    print(f"wrote {folder}/: result.json, curves.svg, found.png (three captions and the clips they find)")
    if result["veq"] is not None:
        print(f"and trajectories.png; next: python trajtok.py show world --weights {folder}")
    print('or: python trajtok.py compare "trajvit2:" "vit3d: --tokenizer vit3d" --seeds 0 1')


# -----------------------------------------------------------------------------------------------------------

@data.one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = configure(ClipConfig, CLIP_SIZES, argv)
    suffix = "" if cfg.tokenizer == "trajvit2" else f"-{cfg.tokenizer.rpartition(':')[2]}"
    folder = trajtok.run_folder(cfg, "clip", suffix)
    if cfg.resume or cfg.eval_only:
        cfg = trajtok.resumed(cfg, folder, argv)
    _, cfg = trajtok.sized(cfg, SIZES[cfg.size])                # fills in image_size, frames, num_queries
    words = "world" if cfg.data == "world" else "captions"
    cfg = dataclasses.replace(cfg, text=cfg.text or words)
    if cfg.flops:
        return count_flops(cfg)
    if not cfg.eval_only:
        trajtok.launch(cfg)
    train(cfg, folder)


if __name__ == "__main__":
    main()
