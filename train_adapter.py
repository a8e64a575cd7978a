"""Trajectory tokens on frozen features (paper, "Setting 2"): TrajAdapter beside two probes.

    video uint8 (b, t, H, W, 3)
      -> frozen backbone: features (b, n, D) on its grid (t', h', w')
      -> frozen segmenter: logits (b, t·h·w, K), resized to that grid

    linear       mean over the n tokens -> LayerNorm -> classes
    attentive    self-attention over the n tokens -> one learned query reads them -> classes
    trajadapter  projection -> encoder.TrajectoryEncoder under the masks -> [CLS; live tokens] -> transformer
                 -> classes

    python train_adapter.py                 # pre-trains a small VideoMAE and a segmenter, then the heads
    python train_adapter.py --name again --backbone out/adapter-nano/videomae \
                            --segmenter out/adapter-nano/segmenter-nano
    python train_adapter.py --data actions/manifest.json --labels falling,walking
    python train_adapter.py --size full --backbone VJEPA2-H --segmenter trajtok-segmenter.pth \
                            --data kinetics.csv --segments 8 --crops 3

Features are computed once and kept on disk; all heads train side by side on the same batches of them. One
command trains one seed: `python trajtok.py compare ... --script train_adapter.py` makes a table.

Writes out/adapter-<name>/: config.json, log.jsonl, state.pt, model.safetensors (the heads), result.json,
curves.svg, features/, and, unless they were given, videomae/ and segmenter-nano/, which later runs can use.

Axes in every shape comment: b clip, v view of a clip, t frame, h row, w column, n token of the backbone, K
queries of the segmenter, k trajectory, m tokens of each, D and d widths, a attention head, c its channels.
t', h' and w' count the tokens of the backbone's grid."""
from __future__ import annotations

import itertools
import math
import shutil
import sys
import time
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from tqdm import tqdm

import data
import trajtok
from data import BadInput, configure, write_json
from encoder import TrajectoryEncoder, compact
from segmenter import assign, normalise, resize
from trajtok import Log, learning_rate, load_checkpoint, make_optimizer, open_run, precision, save_checkpoint

# -----------------------------------------------------------------------------------------------------------
# The frozen backbones: V-JEPA2 and VideoMAE, versions 1 and 2
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a video transformer."""
    kind: str = "videomae"          # vjepa2: rotary positions; videomae: a table of positions
    width: int = 768                # D
    depth: int = 12                 # blocks
    heads: int = 12
    mlp: int = 3072                 # inner width of a block's MLP
    patch: int = 16                 # a token is a tubelet: patch x patch pixels ...
    tubelet: int = 2                # ... of so many frames
    frames: int = 16                # of a clip
    image_size: int = 224
    eps: float = 1e-6               # of the LayerNorms
    last_norm: bool = True          # is there a LayerNorm after the last block?

    @property
    def grid(self):
        """(t', h', w') of a clip: a token for each tubelet."""
        side = self.image_size // self.patch
        return self.frames // self.tubelet, side, side


# 0.84 M parameters: what the default run pre-trains
NANO = BackboneConfig("videomae", width=128, depth=4, heads=4, mlp=512, patch=8, frames=8, image_size=64)


def mlp(width, inner):
    """Two linear maps and an exact GELU between them, under the names of the original releases."""
    # the order of the dict is the order of the layers, and its keys are their names
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), act=nn.GELU(), fc2=nn.Linear(inner, width)))


class Block(nn.Module):
    """Pre-norm transformer block. The backbones, VideoMAE's decoder and the heads are made of it. Its
    parameters have the names of the original releases."""

    def __init__(self, width, heads, inner, eps=1e-5):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = mlp(width, inner)

    def forward(self, x, rotation=None, mask=None):
        """x (b, n, d). rotation: tables of rotary_3d; mask: bool (b, 1, 1, n), True = may be read."""
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three a c) -> three b a n c", three=3, a=self.heads)
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # softmax over the keys: the tokens that a query may read
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn["proj"](rearrange(y, "b a n c -> b n (a c)"))
        return x + self.mlp(self.norm2(x))


def init_weights(module):
    """CHOICE: matrices start at a deviation of 1 / sqrt(fan-in). At PyTorch's default, 0.58 of that,
    attention stays nearly uniform for the minutes that these models train."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


class Backbone(nn.Module):
    """What the two families share. features(x (b, t, 3, H, W) normalised) -> (b, n, D), n = t'·h'·w' in
    row-major order. All published models want pixels normalised by the statistics of ImageNet, as
    segmenter.normalise does."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        kernel = (cfg.tubelet, cfg.patch, cfg.patch)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, cfg.width, kernel, kernel)))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.mlp, cfg.eps) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps) if cfg.last_norm else nn.Identity()
        init_weights(self)

    def tubes(self, x):
        """x (b, t, 3, H, W) -> the pixels of each tubelet (b, n, 3·u·p·q): u frames of p x q pixels."""
        u, p = self.cfg.tubelet, self.cfg.patch
        return rearrange(x, "b (t u) c (h p) (w q) -> b (t h w) (c u p q)", u=u, p=p, q=p)

    def embed(self, tubes):
        """(b, n, 3·u·p·q) -> (b, n, D). A convolution whose stride is its kernel is one matrix product."""
        proj = self.patch_embed["proj"]
        # back to float32: under autocast the product is bfloat16, and the residual stream must not be
        return F.linear(tubes, proj.weight.flatten(1), proj.bias).to(tubes.dtype)

    def encode(self, z, rotation=None):
        """Embedded tokens (b, n, D), all of a clip or some -> features (b, n, D)."""
        for block in self.blocks:
            z = block(z, rotation)
        return self.norm(z)

    @classmethod
    def from_pretrained(cls, path):
        """A frozen VJEPA2 or VideoMAE, float32 on the CPU, from a folder of the model hub, from a file of
        its authors (.pth, .pt) or .safetensors, with or without a config.json beside it, or from a
        `videomae` folder of ours. BadInput: weights that are missing, unexpected or of another shape."""
        weights = trajtok.rename(trajtok.read_weights(path, WRAPPERS), BACKBONE_NAMES)
        if not {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= weights.keys():
            raise BadInput(f"{path}: no V-JEPA2 or VideoMAE in a known layout; it holds {list(weights)[:4]}")
        cfg = backbone_config(Path(path), weights)
        net = VJEPA2(cfg) if cfg.kind == "vjepa2" else VideoMAE(cfg)
        net = trajtok.fit_weights(net, join_projections(weights), path)
        return net.eval().requires_grad_(False)


def rotary_3d(grid, channels, device=None):
    """cos and sin, float32 (n, c), for the tokens of a grid (t', h', w') and heads of c channels.

    t, h and w get d = 2 floor(floor(c / 3) / 2) channels each, which turn at position p of their axis by

        angle[p, i] = p · 1e4^(-i / (d/2)),  i < d/2

    Channels that are left over do not turn (cos 1, sin 0).

    The release repeats the d/2 angles one after another, [a0 a1 .. a0 a1 ..], and yet turns adjacent
    channels as pairs: the two of a pair turn by different angles. Its weights were trained that way."""
    d = 2 * (channels // 3 // 2)
    place = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))     # (n, 3)
    exponent = torch.arange(d // 2, device=device) / (d // 2)
    angle = place[..., None] * 1e4 ** -exponent                 # (n, 3, d/2)
    angle = angle.repeat(1, 1, 2).flatten(1)                    # (n, 3d)
    angle = F.pad(angle, (0, channels - 3 * d))
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (b, a, n, c): channels (2j, 2j + 1) = (u, v) become (u cos - v sin, v cos + u sin), in float32."""
    y = x.float()
    swapped = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype)


class VJEPA2(Backbone):
    """V-JEPA2's encoder (arXiv 2506.09985). Positions are rotary: clips of any number of tubelets go
    through."""

    def features(self, x):
        cfg = self.cfg
        grid = (x.shape[1] // cfg.tubelet, x.shape[3] // cfg.patch, x.shape[4] // cfg.patch)
        rotation = rotary_3d(grid, cfg.width // cfg.heads, x.device)
        return self.encode(self.embed(self.tubes(x)), rotation)


def sinusoid(n, width):
    """Table of positions, float32 (n, width): for token p and channel j the sine (even j) or the cosine (odd
    j) of p / 10000^(2 floor(j/2) / width)."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n)[:, None] / 1e4 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


class VideoMAE(Backbone):
    """VideoMAE's encoder (arXiv 2203.12602, 2303.16727). Its table has one row for each token of a clip:
    clips of another size or length do not go through."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("positions", sinusoid(math.prod(cfg.grid), cfg.width), persistent=False)

    def features(self, x):
        return self.encode(self.embed(self.tubes(x)) + self.positions)


# -----------------------------------------------------------------------------------------------------------
# Published weights
# -----------------------------------------------------------------------------------------------------------

# Published names -> ours, which are the authors'. What stands beside an encoder is dropped: V-JEPA2's
# predictor and probe, VideoMAE's decoder, classifiers and the norm before them.
BACKBONE_NAMES = [
    (r"(\w+\.)*?(predictor|pooler|classifier|head|fc_norm|decoder|\w+_decoder|mask_token)(\..+)?", ""),
    # the authors' files, in their wrappers
    (r"(?:(?:module|backbone|encoder|model)\.)+((?:patch_embed|blocks|norm)\..+)", r"\1"),
    # the hub's V-JEPA2 and VideoMAE; the latter's biases are called q_bias or query.bias
    (r"(?:\w+\.)*embeddings\.patch_embeddings\.proj(?:ection)?\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:\w+\.)*layer\.(\d+)\.attention\.attention\.([qv])(uery\.|alue\.|_)bias", r"blocks.\1.attn.\2_bias"),
    (r"(?:\w+\.)*layer\.(\d+)\.attention\.(attention\.)?((query|key|value|proj)\..+)", r"blocks.\1.attn.\3"),
    (r"(?:\w+\.)*layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"(?:\w+\.)*layer\.(\d+)\.((?:norm[12]|mlp)\..+)", r"blocks.\1.\2"),
    (r"(?:\w+\.)*layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"(?:\w+\.)*layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"(?:\w+\.)*layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:\w+\.)*layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:\w+\.)*layernorm\.(.+)", r"norm.\1"),
]
# V-JEPA2's files hold two encoders. CHOICE: the target encoder is taken, a running mean of the other, because
# the release evaluates with it.
WRAPPERS = ("target_encoder", "encoder", "model", "module", "state_dict")
# No tensor tells the number of heads. For files without a config.json it is that of the published model of
# the same width: {width: heads}.
PUBLISHED_HEADS = dict(vjepa2={1024: 16, 1280: 16, 1408: 22},
                       videomae={384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16})
# Fields that no tensor tells: their name in the model hub's config.json -> ours.
HUB_KEYS = dict(num_attention_heads="heads", num_heads="heads", frames_per_clip="frames", num_frames="frames",
                crop_size="image_size", img_size="image_size", image_size="image_size", layer_norm_eps="eps")


def backbone_config(path, weights):
    """A BackboneConfig, read off the shapes of the weights. What they do not tell is read off config.json, or
    else is that of the published models."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = trajtok.read_json(file) if file.exists() else {}
    if "backbone_shape" in config:                              # a folder of ours
        return BackboneConfig(**config["backbone_shape"])
    width, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    # the published models' values, which those of config.json replace
    values = dict(kind="vjepa2", frames=64, image_size=256)
    # VideoMAE's keys have no bias; the hub keeps its queries apart, and has another eps than its authors
    if "blocks.0.attn.q_bias" in weights:
        values = dict(kind="videomae", eps=1e-12 if "blocks.0.attn.query.weight" in weights else 1e-6)
    values["heads"] = PUBLISHED_HEADS[values["kind"]].get(width)
    config = config.get("model_config", config)                 # VideoMAEv2's
    values |= {ours: config[name] for name, ours in HUB_KEYS.items() if name in config}
    if values["heads"] is None:
        raise BadInput(f"{path}: no published model has width {width}; put a config.json beside the file")
    depth = trajtok.count_layers(weights, r"blocks\.(\d+)\.")
    return BackboneConfig(
        **values, width=width, patch=patch, tubelet=tubelet, depth=depth,
        mlp=len(weights["blocks.0.mlp.fc1.weight"]), last_norm="norm.weight" in weights)


def join_projections(weights):
    """Join query, key and value, which the hub keeps apart. VideoMAE's keys have no bias: it would shift all
    scores of a query alike, which does not change a softmax. Zeros take its place."""
    for name in list(weights):
        if ".attn.query." in name:
            names = [name.replace("query", part) for part in ("query", "key", "value")]
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(part) for part in names])
        if name.endswith("attn.q_bias"):
            q, v = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
            weights[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(q), v))
    return weights


# -----------------------------------------------------------------------------------------------------------
# Masks on the backbone's grid
# -----------------------------------------------------------------------------------------------------------

def resize_logits(logits, grid, target):
    """(b, t·h·w, K) -> (b, t'·h'·w', K), linear in space and time. CHOICE: as the released TrajVLM does it
    in space; frames that share a tubelet are averaged by the same rule."""
    x = rearrange(logits, "b (t h w) k -> b k t h w", t=grid[0], h=grid[1])
    x = F.interpolate(x, size=target, mode="trilinear")
    return rearrange(x, "b k t h w -> b (t h w) k")


@torch.no_grad()
def frozen_outputs(backbone, segmenter, video):
    """video uint8 (b, t, H, W, 3) -> features (b, n, D) and mask logits (b, n, K), on the backbone's grid."""
    x = normalise(video)
    features = backbone.features(x).float()
    # the segmenter gets the same frames at the size that it was trained on
    seg = segmenter.segment(resize(x, segmenter.cfg.image_size))
    return features, resize_logits(seg.logits.float(), seg.grid, backbone.cfg.grid)


# -----------------------------------------------------------------------------------------------------------
# Heads: features (b, n, D), their Segmentation and m tokens a trajectory -> scores (b, classes)
# -----------------------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """The mean of all tokens, a LayerNorm, a linear layer."""

    def __init__(self, dim, classes, num_queries, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x, seg, m):
        return self.head(self.norm(x.mean(1)))


class Attentive(nn.Module):
    """V-JEPA2's probe: blocks of self-attention over all tokens, then one learned query reads them. As
    published: a LayerNorm on what is read, none on the query, no output projection."""

    def __init__(self, dim, classes, num_queries, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.blocks = nn.ModuleList(Block(dim, cfg.heads, 4 * dim) for _ in range(cfg.probe_layers))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, 4 * dim)
        self.head = nn.Linear(dim, classes)
        init_weights(self)

    def forward(self, x, seg, m):
        for block in self.blocks:
            x = block(x)
        k, v = rearrange(self.kv(self.norm1(x)), "b n (two a c) -> two b a n c", two=2, a=self.heads)
        q = repeat(self.q(self.query), "1 1 (a c) -> b a 1 c", b=len(x), a=self.heads)
        # softmax over the n tokens, which the query reads
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.query[:, 0] + rearrange(y, "b a 1 c -> b (a c)")
        return self.head(y + self.mlp(self.norm2(y)))


class TrajAdapter(nn.Module):
    """PAPER: TrajTok's trajectory encoder on frozen features. CHOICE: a LayerNorm and a projection before
    it, and a small transformer over [CLS; live tokens] after it."""

    def __init__(self, dim, classes, num_queries, cfg):
        super().__init__()
        width, heads = cfg.width, cfg.heads
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, width)
        # z_init, a mean of projected features, must be as large as the learned codes that it is added to
        nn.init.normal_(self.proj.weight, std=2 * dim ** -0.5)
        self.encoder = TrajectoryEncoder(trajtok.TrajTokConfig(
            dim=width, num_queries=num_queries, depth=(cfg.layers + 1) // 2, heads=heads, out_dim=width))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(cfg.layers))
        init_weights(self.blocks)
        self.out = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x, seg, m):
        points = self.proj(self.norm(x))                        # (b, n, d)
        tokens = compact(self.encoder(points, seg, m))          # of live trajectories alone
        z = torch.cat((self.cls.expand(len(x), -1, -1), tokens.z), 1)
        mask = F.pad(tokens.mask, (1, 0), value=True)           # True = real; CLS always is
        for block in self.blocks:
            z = block(z, mask=mask[:, None, None])
        return self.head(self.out(z[:, 0]))


HEADS = dict(linear=Linear, attentive=Attentive, trajadapter=TrajAdapter)
# With how many tokens a trajectory each is trained and evaluated. PAPER: one TrajAdapter serves 1, 2 and 4.
TOKENS = dict(linear=[1], attentive=[1], trajadapter=[1, 2, 4])


# -----------------------------------------------------------------------------------------------------------
# A small VideoMAE
# -----------------------------------------------------------------------------------------------------------

def tube_mask(clips, grid, rng):
    """int64 (clips, t·kept): the tenth of the n places that the encoder sees, the same cells in all time
    steps. PAPER (VideoMAE): 90 % are hidden, and in tubes: else a hidden place could be copied from the time
    step before."""
    t, h, w = grid
    kept = max(round(0.1 * h * w), 1)
    cells = rng.random((clips, 1, h * w)).argsort(-1)[..., :kept]
    seen = cells + h * w * np.arange(t)[:, None]                # (clips, t, kept)
    return torch.from_numpy(seen).flatten(1)


def normalised_pixels(tubes):
    """VideoMAE's target: tubelets of p pixels (b, n, 3·p) -> the same with mean 0 and deviation 1 in each
    colour of each tubelet. CHOICE: 1e-3 is added to the variance. Made grounds are flat, and without it
    rounding errors would become targets."""
    x = rearrange(tubes, "b n (c p) -> b n c p", c=3)
    var, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
    return ((x - mean) / (var + 1e-3).sqrt()).flatten(2)


class MaskedAutoencoder(nn.Module):
    """VideoMAE's pre-training: the encoder sees the visible tubelets alone, a small decoder all places, and
    the loss is on what was hidden. The encoder's names are the original release's, so that
    Backbone.from_pretrained reads what is saved."""

    def __init__(self, cfg, layers=2, width=64):
        super().__init__()
        self.encoder = VideoMAE(cfg)
        self.encoder_to_decoder = nn.Linear(cfg.width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("places", sinusoid(math.prod(cfg.grid), width), persistent=False)
        blocks = [Block(width, width // 32, 4 * width) for _ in range(layers)]
        to_pixels = nn.Linear(width, 3 * cfg.tubelet * cfg.patch ** 2)
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(width), to_pixels)

    def forward(self, video, seen):
        """video uint8 (b, t, H, W, 3), seen from tube_mask -> loss, prediction and target (b, n, 3·p) for
        tubelets of p pixels, hidden bool (b, n), True = the encoder did not see it."""
        encoder = self.encoder
        tubes = encoder.tubes(normalise(video))
        clip = torch.arange(len(seen), device=seen.device)[:, None]
        # the encoder costs a tenth: it sees the visible tubelets alone, with the positions of their places
        z = encoder.encode(encoder.embed(tubes[clip, seen]) + encoder.positions[seen])
        z = self.encoder_to_decoder(z)
        # the decoder gets what was seen, and elsewhere one learned token
        y = self.mask_token.to(z.dtype).repeat(*tubes.shape[:2], 1)
        y[clip, seen] = z
        prediction = self.decoder(y + self.places).float()
        target = normalised_pixels(tubes)
        hidden = torch.ones_like(target[..., 0], dtype=torch.bool)
        hidden[clip, seen] = False
        loss = (prediction - target)[hidden].square().mean()
        return loss, prediction, target, hidden


def pretrain_videomae(shape, cfg, folder, device):
    """Trains a VideoMAE of that shape on made clips -> Backbone, read from the weights in `folder`."""
    torch.manual_seed(cfg.seed)
    model = MaskedAutoencoder(shape).to(device)
    optimizer = make_optimizer(model, cfg)
    # first the checkpoint: a --resume with flags that do not fit it must not change config.json
    first = load_checkpoint(folder, model, optimizer) if cfg.resume else 0
    open_run(folder, cfg, backbone_shape=asdict(shape))
    log = Log(folder, first)
    # clips of this seed's own, as in data.made_clips
    begin = data.TRAIN + (cfg.seed % 49) * 10_000_000
    clips = data.WorldBatches(world_of(shape), cfg.batch, range(begin, data.VALIDATION))
    batches = data.loader(clips, first, cfg.steps, cfg.workers)
    # disable=None: no bar where the output goes to a file
    batches = tqdm(batches, "VideoMAE", cfg.steps, initial=first, leave=False, disable=None)
    for step, batch in enumerate(batches, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        # each clip is used under two masks, because making a clip takes longer than hiding parts of it
        video = data.finish(batch, device)["video"].repeat_interleave(2, 0)
        seen = tube_mask(len(video), shape.grid, np.random.default_rng((cfg.seed, 8, step))).to(device)
        with precision(device, cfg.bf16):
            loss = model(video, seen)[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        trajtok.check_finite(dict(loss=loss.item()), step)
        optimizer.step()
        log(step=step, loss=loss.item())
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(folder, model.state_dict(), optimizer.state_dict(), step + 1)
    return Backbone.from_pretrained(folder)


# -----------------------------------------------------------------------------------------------------------
# Configuration
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AdapterConfig(trajtok.TrainConfig):
    """Probes on a frozen video backbone: linear, attentive, and TrajAdapter, which pools by trajectory."""
    size: str = "nano"              # one of ADAPTER_SIZES: nano, full (the published protocol)
    data: str = "world"             # `world` (made clips), or a manifest, CSV or folder of labelled videos
    labels: str | None = None       # these classes only, with commas; default: all
    # what is frozen; without these two flags it is pre-trained now
    backbone: str | None = None     # a published V-JEPA2 or VideoMAE, or a `videomae` of an earlier run
    segmenter: str | None = None    # a run of train_clip.py or `trajtok.py pretrain`, or the authors' file
    image_size: int | None = None   # pixels of a side; default: the backbone's
    frames: int | None = None       # frames of a clip; default: the backbone's, of `full` 16
    # the clips
    ask: str = "colour"             # of the largest object of made clips: its colour, appearance or motion
    clips: int = 3000               # made, to learn from; a sixth as many to choose by, a third to test on
    stride: int = 4                 # of real video: every stride-th frame in a row
    segments: int = 1               # of real test video: so many stretches, evenly (published: 8 or 2)
    crops: int = 1                  # ... and of each so many squares along the longer side (published: 3)
    features: str | None = None     # folder for features, 16 bits a number; default: the run's
    # the heads
    epochs: int = 5                 # over the training clips
    head_lr: float = 1e-3           # smallest learning rate tried; the linear head: ten times that
    rates: int = 2                  # learning rates tried, each twice the one before
    probe_layers: int = 1           # attentive: layers of self-attention before the query (published: 3)
    width: int = 96                 # trajadapter: d, a multiple of 8
    layers: int = 2                 # trajadapter: over the tokens; half as many encode trajectories
    heads: int = 4                  # attention heads of both (published: 16)
    # the pre-training
    steps: int = 550                # of the VideoMAE; half as many of the segmenter
    lr: float = 2e-3                # peak learning rate of the VideoMAE
    warmup: int = 40                # steps of linear warm-up of the VideoMAE
    weight_decay: float = 0.05      # on matrices

    def __post_init__(self):
        super().__post_init__()
        trajtok.at_least(self, 1, "clips segments crops epochs rates heads stride frames image_size")
        trajtok.at_least(self, 0, "head_lr")
        if self.ask not in ASKED:
            raise BadInput(f"--ask {self.ask}: one of {', '.join(ASKED)}")
        if self.width % 8 or self.width % self.heads:
            raise BadInput(f"--width {self.width}: give a multiple of 8 and of --heads {self.heads}")


# what can be asked about made clips -> the names of the classes
ASKED = dict(colour=data.COLOURS, appearance=data.SHAPES, motion=data.MOTIONS)
# full: the published training of V-JEPA2's probes; its test has --segments 8 --crops 3
ADAPTER_SIZES = {"nano": dict(size="nano")}
ADAPTER_SIZES["full"] = dict(size="full", frames=16, epochs=20, head_lr=3e-4, rates=4, probe_layers=3,
                             width=512, layers=4, heads=16, save_every=500, workers=8)


# -----------------------------------------------------------------------------------------------------------
# Clips to learn from, to choose by, to test on
# -----------------------------------------------------------------------------------------------------------

def world_of(shape):
    """CHOICE: made clips of at most four objects, no two of one colour, with camera and light at rest. After
    minutes of training heads are then neither at chance nor perfect, and can be compared."""
    return data.World(size=shape.image_size, frames=shape.frames, camera=False, light=False,
                      **trajtok.NANO_CLIPS)


def made_clips(shape, cfg):
    """-> {train, valid, test: dataset}, names of the classes."""
    # (first clip, divisor of cfg.clips): training clips far up the range, which no pre-training reaches
    starts = dict(train=(data.TRAIN + 500_000_000, 1), valid=(data.VALIDATION, 6), test=(data.TEST, 3))
    sets = {}
    for name, (first, divisor) in starts.items():
        indices = range(first, first + math.ceil(cfg.clips / divisor))
        sets[name] = data.WorldBatches(world_of(shape), cfg.batch, indices)
    return sets, ASKED[cfg.ask]


class Views(data.VideoBatches):
    """Labelled videos, in order, segments x crops views of each: video (b, v, t, H, W, 3). A file that cannot
    be used is left out, and so is one shorter than a clip: to repeat its frames would change its motion."""

    def __init__(self, entries, shape, cfg, segments=1, crops=1):
        super().__init__(entries, shape.frames, shape.image_size, cfg.batch, train=False, stride=cfg.stride)
        # fractions of the room that there is, in time and along the longer side
        self.views = list(itertools.product(evenly(segments), evenly(crops)))

    def clip(self, number, rng):
        entry = self.entries[number]
        views = [data.decode(entry["path"], self.frames, self.size, start, self.stride, crop)[0]
                 for start, crop in self.views]
        return dict(video=torch.from_numpy(np.stack(views)), labels=torch.empty(0), label=entry["label"])


def evenly(count):
    """`count` numbers from 0 to 1, ends included; of one, the middle."""
    return np.linspace(0, 1, count) if count > 1 else [0.5]


def real_clips(shape, cfg):
    """As made_clips. test: what data.split holds out; valid: every tenth of the others; train: the rest.
    Pictures, in which nothing moves, and clips without one of the labels are left out."""
    entries = [entry for entry in data.read_manifest(cfg.data) if not entry["image"]]
    found = {entry["label"] for entry in entries if entry["label"]}
    names = cfg.labels.split(",") if cfg.labels else sorted(found)
    train, test = (labelled(part, names) for part in data.split(entries))
    # the second, twelfth, ...: of two clips one goes into each set
    valid = train[1::10]
    del train[1::10]
    unseen = sorted({*range(len(names))} - {entry["label"] for entry in train})
    if unseen or not valid or not test:
        lacking = ", ".join(names[i] for i in unseen) or "each class"
        raise BadInput(f"--data {cfg.data}: {len(train + valid)} clips to learn from, {len(test)} to test "
                       f"on; give two to learn from, one to test on, and some of {lacking}")
    # several views are for the test alone; clips for training and validation have the middle one
    return dict(train=Views(train, shape, cfg), valid=Views(valid, shape, cfg),
                test=Views(test, shape, cfg, cfg.segments, cfg.crops)), names


def labelled(entries, names):
    """Those with one of these labels, each with the label's number."""
    return [entry | dict(label=names.index(entry["label"])) for entry in entries if entry["label"] in names]


# -----------------------------------------------------------------------------------------------------------
# Features on disk
# -----------------------------------------------------------------------------------------------------------

class Features(NamedTuple):
    """The outputs of the frozen models for a set of clips, memory-mapped, and the classes of the clips."""
    features: np.ndarray            # float16 (clips, v, n, D)
    logits: np.ndarray              # float16 (clips, v, n, K)
    classes: np.ndarray             # int64 (clips,)
    grid: tuple                     # (t', h', w')

    def read(self, clips, device):
        """clips: b of their numbers -> features (b·v, n, D), their Segmentation, classes (b,)."""
        x, logits, y = (torch.from_numpy(array[clips]).to(device) for array in self[:3])
        return x.flatten(0, 1).float(), assign(logits.flatten(0, 1).float(), self.grid), y


def extract(folder, batches, backbone, segmenter, damage, cfg, device):
    """A dataset of clips -> Features in `folder`. If they are there already they are read: classes.npy, which
    is written last, shows that they are complete. Clips that cannot be used are left out."""
    done = folder / "classes.npy"
    if not done.exists():
        write_features(folder, batches, backbone, segmenter, damage, cfg, device)
    classes = np.load(done)
    features = np.load(folder / "features.npy", mmap_mode="r")[:len(classes)]
    logits = np.load(folder / "logits.npy", mmap_mode="r")[:len(classes)]
    return Features(features, logits, classes, backbone.cfg.grid)


def write_features(folder, batches, backbone, segmenter, damage, cfg, device):
    """Write the three files of `extract`. Where clips are left out, the last rows of features.npy and
    logits.npy stay empty."""
    folder.mkdir(parents=True, exist_ok=True)
    views = len(getattr(batches, "views", [1]))                 # made clips have one
    shape = (len(batches) * cfg.batch, views, math.prod(backbone.cfg.grid))
    # 16 bits a number: features are as large as the videos that they come from
    arrays, size = [], 0
    for name, width in (("features", backbone.cfg.width), ("logits", segmenter.cfg.num_queries)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (*shape, width))
        arrays.append(array.reshape(-1, *array.shape[2:]))      # a row for each view
        size += array.nbytes
    if size > shutil.disk_usage(folder).free:
        # a disk that gets full while a memory map is written kills the process (SIGBUS)
        raise BadInput(f"--features {folder}: no room for features of {1e-9 * size:.3g} GB")
    classes, row = [], 0
    loader = data.loader(batches, 0, len(batches), cfg.workers)
    for batch in tqdm(loader, f"features, {folder.name}", len(batches), disable=None):
        damage.add(batch["bad"])
        video = data.finish(batch, device)["video"]
        if not len(video):                                      # none of these files can be used
            continue
        # made clips have each class under its name, real ones have a label
        classes += torch.as_tensor(batch.get(cfg.ask, batch["label"])).tolist()
        # a clip may have two dozen views: never more than a batch at once
        for part in video.view(-1, *video.shape[-4:]).split(cfg.batch):
            with precision(device, cfg.bf16):
                outputs = frozen_outputs(backbone, segmenter, part)
            for array, x in zip(arrays, outputs):
                array[row:row + len(part)] = x.half().cpu()
            row += len(part)
    if not classes:
        raise BadInput(f"--data {cfg.data}: no clip can be used")
    with data.replacing(folder / "classes.npy") as beside:
        np.save(beside, classes)


# -----------------------------------------------------------------------------------------------------------
# Training heads
# -----------------------------------------------------------------------------------------------------------

def train_heads(heads, rates, features, folder, cfg, device):
    """All heads at once, on the same batches of features. rates: the learning rate of each, by name."""
    clips = len(features.classes)
    epoch_steps = math.ceil(clips / cfg.batch)
    steps = cfg.epochs * epoch_steps
    # a schedule from 0 to 1: group["scale"] is the learning rate of a head
    schedule = replace(cfg, steps=steps, warmup=steps // 10, lr=1.0)
    optimizer = make_optimizer(heads, schedule, {f"{name}.": rate for name, rate in rates.items()})
    first = load_checkpoint(folder, heads, optimizer)
    if cfg.resume:
        open_run(folder, cfg, manifest=data.fingerprint(cfg.data))
    log = Log(folder, first)
    for step in tqdm(range(first, steps), "heads", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["scale"]
        # Each epoch has an order of its own, drawn from the seed, so that a resumed run can go on in the
        # middle of it. The number after the seed, 6 or 5, keeps the two sequences of random numbers apart.
        epoch, place = divmod(step, epoch_steps)
        order = np.random.default_rng((cfg.seed, 6, epoch)).permutation(clips)
        x, seg, y = features.read(order[place * cfg.batch:][:cfg.batch], device)
        # PAPER: the number of tokens a trajectory is drawn at random
        m = int(np.random.default_rng((cfg.seed, 5, step)).choice(TOKENS["trajadapter"]))
        optimizer.zero_grad()
        losses = {}
        for name, head in heads.items():
            with precision(device, cfg.bf16):
                scores = head(x, seg, m)
            loss = F.cross_entropy(scores.float(), y)
            loss.backward()
            # each head by itself: the gradient of one must not shrink another's
            nn.utils.clip_grad_norm_(head.parameters(), cfg.clip)
            losses[name] = loss.item()
        trajtok.check_finite(losses, step)
        optimizer.step()
        log(step=step, tokens=m, **losses)
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_checkpoint(folder, heads.state_dict(), optimizer.state_dict(), step + 1)
    trajtok.save_pictures(folder, [], log, list(rates))


@torch.no_grad()
def accuracies(heads, features, cfg, device):
    """-> {(name of the head, tokens a trajectory): share of right answers}. The probabilities of a clip are
    the means over its views."""
    clips, views = features.features.shape[:2]
    right = {}
    # so many clips that their views make a batch
    at_once = max(cfg.batch // views, 1)
    for some in np.array_split(np.arange(clips), math.ceil(clips / at_once)):
        x, seg, y = features.read(some, device)
        for name, head in heads.items():
            for m in TOKENS[name.split("-")[0]]:
                with precision(device, cfg.bf16):
                    scores = head(x, seg, m)
                # softmax over the classes
                p = reduce(scores.float().softmax(-1), "(b v) c -> b c", "mean", v=views)
                right[name, m] = right.get((name, m), 0) + (p.argmax(-1) == y).sum().item()
    return {pair: count / clips for pair, count in right.items()}


def report(heads, rates, sets, cfg, device):
    """For each row of TOKENS, the head that does best on validation clips and its accuracy on test clips -> a
    flat dict."""
    valid, test = (accuracies(heads, sets[name], cfg, device) for name in ("valid", "test"))
    result = {}
    for row, choices in TOKENS.items():
        # Validation clips choose: of several heads, the best on the test clips would look better than it is.
        names = [name for name in heads if name.startswith(row)]
        best = max(names, key=lambda name: sum(valid[name, m] for m in choices))
        for m in choices:
            key = f"{row}_x{m}" if len(choices) > 1 else row
            result[key] = test[best, m]
        result[f"{row}_lr"] = rates[best]
        result[f"{row}_parameters"] = sum(p.numel() for p in heads[best].parameters())
    return result


# -----------------------------------------------------------------------------------------------------------
# The run
# -----------------------------------------------------------------------------------------------------------

def train(cfg):
    began = time.time()
    device = trajtok.setup(cfg)
    # what is given is read, and refused if it is wrong, before anything is written
    backbone = cfg.backbone and Backbone.from_pretrained(cfg.backbone)
    segmenter = cfg.segmenter and trajtok.load_segmenter(cfg.segmenter)
    own = backbone.cfg if backbone else NANO
    shape = replace(own, image_size=cfg.image_size or own.image_size, frames=cfg.frames or own.frames)
    if isinstance(backbone, VideoMAE) and shape != own:
        raise BadInput(f"{cfg.backbone}: takes {own.frames} frames of {own.image_size} px only")
    if shape.frames % shape.tubelet or shape.image_size % shape.patch or shape.width % cfg.heads:
        raise BadInput(f"--frames {shape.frames} --image-size {shape.image_size} --heads {cfg.heads}: give "
                       f"multiples of {shape.tubelet} and {shape.patch}, and a divisor of {shape.width}")
    clips, classes = made_clips(shape, cfg) if cfg.data == "world" else real_clips(shape, cfg)
    folder = trajtok.run_folder(cfg, "adapter")
    # with --resume not before the checkpoint is read (train_heads): flags that do not fit it change nothing
    if not cfg.resume:
        open_run(folder, cfg, manifest=data.fingerprint(cfg.data))
    # what is not given is pre-trained
    if not segmenter:
        plan = trajtok.PretrainConfig(
            name="nano", out=str(folder), image_size=shape.image_size, frames=shape.frames, batch=cfg.batch,
            steps=math.ceil(cfg.steps / 2), seed=cfg.seed, workers=cfg.workers, device=cfg.device,
            resume=cfg.resume, overwrite=cfg.overwrite, **trajtok.NANO_CLIPS)
        segmenter = trajtok.load_segmenter(trajtok.pretrain(plan))
    backbone = backbone or pretrain_videomae(shape, cfg, folder / "videomae", device)
    # V-JEPA2 also takes clips of another size and length: no weight depends on them
    backbone.cfg = shape
    # sums of all parameters, by which the features of two models are told apart
    weights = [p.sum().item() for model in (backbone, segmenter) for p in model.parameters()]
    backbone.to(device)
    segmenter.to(device).eval()
    # damage names and counts the files that cannot be used
    sets, damage = {}, data.Damage()
    for name, batches in clips.items():
        # features of other clips, or from other weights, go to another folder
        made_of = zlib.crc32(repr((shape, cfg.ask, vars(batches), weights)).encode())
        where = Path(cfg.features or folder / "features") / f"{name}-{made_of:08x}"
        sets[name] = extract(where, batches, backbone, segmenter, damage, cfg, device)
    # a head for each row and rate; the validation clips decide which rate is best
    heads, rates = nn.ModuleDict(), {}
    for row, i in itertools.product(HEADS, range(cfg.rates)):
        name, rate = f"{row}-{i}", cfg.head_lr * 2 ** i
        # CHOICE: the linear head at ten times the rates, or it does not converge in five epochs
        rates[name] = 10 * rate if row == "linear" else rate
        # heads of one row start alike and differ in their rate alone
        torch.manual_seed(cfg.seed)
        heads[name] = HEADS[row](shape.width, len(classes), segmenter.cfg.num_queries, cfg)
    train_heads(heads.to(device), rates, sets["train"], folder, cfg, device)
    result = report(heads.eval(), rates, sets, cfg, device)
    # the score of a head that always says the most frequent class stands beside the others
    counts = np.bincount(sets["test"].classes)
    result |= dict(
        most_frequent=counts.max() / counts.sum(), clips=int(counts.sum()), seed=cfg.seed,
        left_out=len(damage), seconds=time.time() - began)
    write_json(folder / "result.json", result)
    print("\n".join(trajtok.aligned([[key, f"{value:.4g}"] for key, value in result.items()])))
    print(f"wrote {folder}/: model.safetensors, result.json, curves.svg, features/")


@data.one_line_errors
def main(argv=None):
    cfg = configure(AdapterConfig, ADAPTER_SIZES, argv)
    if cfg.resume:
        cfg = trajtok.resumed(cfg, trajtok.run_folder(cfg, "adapter"), argv or sys.argv[1:])
    train(cfg)


if __name__ == "__main__":
    main()
