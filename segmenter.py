"""The universal segmenter: a clip's points, in space and time at once, are clustered into at most K trajectories.

Paper, "Key Designs" 1; exact shapes and keys of the release: SPECS 1.  One differentiable pass, no tracker:

    video uint8 (b, t, H, W, 3)
      -> ConvNeXt, frame by frame: four maps, strides 4, 8, 16, 32
      -> each to d channels, LayerNorm, up to stride 4, sum:      features F  (b, n, d),  n = t·h·w points
      -> Perceiver: K learned queries Q read the points           latents     (b, K, d)
      -> M_soft = softmax over the K queries of cosine(Q', F')·s  logits      (b, n, K)
      -> argmax: the trajectory of each point                     ids         (b, n);  alive (b, K): owns >= 1 point

Training: labels are matched to queries (exact Hungarian, batched, below), then Dice + focal loss.

`import segmenter` touches no device and no file; the module has no command of its own (trajtok.py pretrain trains it).
"""
from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from data import BadInput

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet, as every backbone here expects


def normalise(video, mean=MEAN, std=STD):
    """uint8 (b, t, H, W, 3) -> float (b, t, 3, H, W), mean 0 and deviation 1 (of ImageNet, unless told), on the video's device."""
    if video.dtype != torch.uint8 or video.dim() != 5 or video.shape[-1] != 3:
        raise ValueError(f"video must be uint8 (b, t, H, W, 3), not {video.dtype} {tuple(video.shape)}")
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1) * 255 for v in (mean, std))
    return (video.movedim(-1, 2).float() - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Weights that others published
# ---------------------------------------------------------------------------------------------------------------------

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


# published names of a ConvNeXt's weights -> ours, which are those of the original release (SPECS 5)
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


# ---------------------------------------------------------------------------------------------------------------------
# ConvNeXt: four maps of a picture
# ---------------------------------------------------------------------------------------------------------------------

def depthwise(x, conv):
    """conv (depthwise, odd kernel, same padding) of x (b, c, h, w), channels last. On a CPU, maps of at most 4 x 4 are
    multiplied with the convolution's own matrix: y_c = T_c x_c, T (c, hw, hw), T[i, j] = weight[j - i]. The library's
    kernels are made for large maps and are slow on such small ones."""
    h, w = x.shape[-2:]
    if x.device.type != "cpu" or max(h, w) > 4:
        return conv(x)
    y, x_ = torch.arange(h), torch.arange(w)
    row, column = y - y[:, None] + conv.padding[0], x_ - x_[:, None] + conv.padding[1]               # (h, h), (w, w): j - i + 3
    row, column = row[:, None, :, None].expand(h, w, h, w), column[None, :, None, :].expand(h, w, h, w)
    matrix = conv.weight[:, 0][:, row, column].flatten(3).flatten(1, 2)                              # (c, hw, hw)
    out = torch.bmm(x.flatten(2).permute(1, 0, 2), matrix.transpose(1, 2))                           # (c, b, hw)
    out = out + conv.bias[:, None, None]
    return out.permute(1, 0, 2).unflatten(2, (h, w))


class PointMLP(torch.autograd.Function):
    """gamma (W2 gelu(W1 LN(y) + b1) + b2), exact GELU, point by point: y (..., c) -> (..., c). Keeps y alone for the backward pass: what
    lies between is ten times as large, and is computed again there: 16 frames of 224 px through the Tiny backbone and back peak at 0.95 GB
    instead of 1.89 (a CPU, `keep_memory`) for 494 GFLOPs instead of 427.

        with D = d(out) gamma, G = gelu(z):   dW2 = Dᵀ G,   db2 = sum D,   dgamma_c gamma_c = sum_j W2_cj dW2_cj + b2_c db2_c"""

    @staticmethod
    def forward(ctx, y, scale, shift, w1, b1, w2, b2, gamma):
        normed, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], scale, shift, 1e-6)
        out = F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2)
        ctx.save_for_backward(y, mean, rstd, scale, shift, w1, b1, w2, b2, gamma)
        ctx.kind = out.dtype                                     # bfloat16 under autocast, which is over by the time of the backward pass
        return gamma * out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        y, mean, rstd, scale, shift, w1, b1, w2, b2, gamma = ctx.saved_tensors
        c, kind = y.shape[-1], ctx.kind
        normed = torch.native_layer_norm(y, (c,), scale, shift, 1e-6)[0].to(kind)
        z = F.linear(normed, w1.to(kind), b1.to(kind))
        rows = d.reshape(-1, c)
        last = (rows.to(kind).t() @ F.gelu(z).flatten(0, -2)).to(w2.dtype)                           # dW2 and db2, before gamma joins them
        total = rows.sum(0).to(w2.dtype)
        dz = torch.ops.aten.gelu_backward((d * gamma).to(kind) @ w2.to(kind), z)
        first = (dz.flatten(0, -2).t() @ normed.flatten(0, -2)).to(w1.dtype)
        dy, d_scale, d_shift = torch.ops.aten.native_layer_norm_backward((dz @ w1.to(kind)).to(y.dtype), y, (c,), mean, rstd, scale, shift, (True, True, True))
        return (dy, d_scale, d_shift, first, dz.flatten(0, -2).sum(0).to(b1.dtype), gamma[:, None] * last, gamma * total,
                (w2 * last).sum(1) + b2 * total)


class Block(nn.Module):
    """(1) depthwise 7x7, (2) LayerNorm, (3) 4x wide, exact GELU, (4) back, scaled by gamma, added to the input.
    Works on channels-last maps: on a CPU that layout makes the depthwise convolution 4x faster (measured), and
    LayerNorm and the two linear layers then need no copy."""

    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        # CHOICE: gamma starts at 1e-6 in the paper's backbone, which is made for 300 epochs or pre-trained weights. From
        # scratch in minutes that leaves every block silent; 0.1 lets it speak at once. Loaded weights overwrite it.
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):                                        # (b, c, h, w), channels last in memory
        y = depthwise(x, self.dwconv).permute(0, 2, 3, 1)       # 1  (b, h, w, c): a view
        first, second = self.pwconv1, self.pwconv2
        y = PointMLP.apply(y, self.norm.weight, self.norm.bias, first.weight, first.bias, second.weight, second.bias, self.gamma)    # 2, 3, 4
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """depths, dims: four each. forward(x (b·t, 3, H, W) normalised) -> four maps, strides 4, 8, 16, 32.
    Names of the modules are those of the original release. Stages 0-2 leave raw, only stage 3 through the final
    LayerNorm (SPECS 1). Tiny: 3/3/9/3, 96-768: 27 820 128 parameters."""

    def __init__(self, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem] + [
            nn.Sequential(ChannelNorm(dims[i], eps=1e-6), nn.Conv2d(dims[i], dims[i + 1], 2, 2)) for i in range(3)])
        self.stages = nn.ModuleList(nn.Sequential(*[Block(dim) for _ in range(depth)]) for depth, dim in zip(depths, dims))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(m.weight, std=0.02 if isinstance(m, nn.Linear) else 1 / math.sqrt(m.weight[0].numel()))
                nn.init.zeros_(m.bias)
        # CHOICE: a LayerNorm follows the stem, and a linear map without bias under a LayerNorm does not see how large its input
        # is: white would look like snow, red like bricks, cyan like water, and the ground swallows things of its own hue.
        # A bias as large as the signal keeps brightness and saturation apart from the first step on.
        nn.init.normal_(stem[0].bias)

    @classmethod
    def from_pretrained(cls, path):
        """A published ConvNeXt: the original's file, DINOv3's, timm's, or a hub folder. Depths and widths are read off it."""
        weights, depths, dims = convnext_names(read_weights(path), path)
        return fit_weights(cls(depths, dims), weights, path)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
            maps.append(x)
        maps[3] = self.norm(maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions and the Perceiver (the encoder uses both, with masks)
# ---------------------------------------------------------------------------------------------------------------------

def rotary_table(positions, channels, theta=1e4):
    """e^(i·angle), complex64 (..., 1, channels / 2), of integer positions (...). SPECS 1: the first half of a head's channels
    turns, in adjacent pairs, pair i by position x theta^(-2i / rotated); the other half stays (angle 0).
    Angles in float64: in half precision the 25 216 positions of an 8-frame clip at 224 px collapse to 5 700 values (bf16:
    1 100), and in float32 those of the millions of points of a ten-minute video are wrong by more than 0.03."""
    rotated = turned(channels)
    exact = torch.float32 if positions.device.type == "mps" else torch.float64                       # Apple's GPUs have no float64
    frequency = torch.zeros(channels // 2, device=positions.device, dtype=exact)
    frequency[:rotated // 2] = theta ** (-torch.arange(0, rotated, 2, device=positions.device, dtype=exact) / rotated)
    angle = positions[..., None, None] * frequency
    return torch.complex(angle.cos().float(), angle.sin().float())


def turned(channels):
    """How many of a head's channels turn with the position: the first half, an even number."""
    return channels // 4 * 2


def rotate(x, table):
    """Rotary embedding of x (b, s, a, c): channels (2j, 2j + 1) are one complex number, multiplied by its position's phase.
    One multiplication for all channels: cutting off the half that stays and joining it again would cost two copies."""
    product = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


class Partial(NamedTuple):
    """A softmax-weighted sum over part of what there is to read, before the division: with its largest score, exact to join
    with other parts. Float32."""
    top: torch.Tensor               # (...): largest score, -inf where nothing was read
    total: torch.Tensor             # (...): sum of exp(score - top)
    acc: torch.Tensor               # (..., e): sum of exp(score - top) value

    def finish(self):
        return self.acc / self.total.clamp(min=1e-30)[..., None]


def partial(s, values):
    """Scores s (..., n), softmax over the last axis to be: what is to be read; values(w) = the weighted sum. -> Partial."""
    s = s.float()
    top = s.detach().amax(-1)
    w = (s - top[..., None]).exp()
    return Partial(top, w.sum(-1), values(w))


def join(p, q):
    """Two Partials over disjoint sets -> the one over both."""
    with torch.no_grad():                                        # shifting all scores leaves a softmax as it is: no gradient
        top = torch.maximum(p.top, q.top)
        shift = top.masked_fill(top == -math.inf, 0.0)
        x, y = (p.top - shift).exp(), (q.top - shift).exp()
    return Partial(top, x * p.total + y * q.total, x[..., None] * p.acc + y[..., None] * q.acc)


class GatedMLP(nn.Module):
    """norm -> down(SiLU(gate) * up), inner width 4d (SPECS 1). (b, s, d) -> (b, s, d)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


MUCH = 2 ** 24                                                   # numbers: 64 MiB. A batch at nano is below, one of base or large above


class CrossAttention(nn.Module):
    """Latents read [latents; points]: queries from the latents, keys and values from both, no biases.
    Rotary positions on the first half of each head's channels: latents 0 .. s-1, points s ..; 1-D, in the points' row-major
    (t, h, w) order, as the paper has it. latents (b, s, d); points: [(x (b, n, d), positions (n,))], or an iterable of such
    chunks of a long video -> (b, s, d)."""

    def __init__(self, dim, heads, norm_media=False):
        super().__init__()
        self.heads, self.turned = heads, turned(dim // heads)
        self.norm_media = nn.LayerNorm(dim) if norm_media else nn.Identity()
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def query(self, x):
        return self.turn(self.to_q(x), torch.arange(x.shape[1], device=x.device))

    def key(self, x, positions, affine=None):
        return self.turn(self.project(0, x, affine), positions)

    def value(self, x, affine=None):
        return rearrange(self.project(1, x, affine), "b n (a c) -> b n a c", a=self.heads)

    def project(self, which, x, affine):
        """Keys (0) or values (1) of x; made apart: a joint product, split afterwards, costs a copy of both in the backward pass.
        affine: a LayerNorm whose scale and shift x still lacks. W (g x + s) = (W g) x + W s: they join the weights. Then nothing that
        needs a gradient stands between detached points and this product, and its gradient in the points, n d² that only
        served g and s, is never computed."""
        w = self.to_kv.weight.chunk(2)[which]
        return F.linear(x, w) if affine is None else F.linear(x, w * affine.weight, w @ affine.bias)

    def turn(self, x, positions):
        x = rearrange(x, "b n (a c) -> b n a c", a=self.heads)
        return rotate(x, rotary_table(positions, x.shape[-1]))

    def forward(self, latents, points, affine=None):
        x = self.norm_latents(latents)
        q, here = self.query(x).transpose(1, 2), torch.arange(x.shape[1], device=x.device)
        if isinstance(points, list):
            (y, positions), = points

            def attend(q, x, y):
                y = self.norm_media(y)
                k = torch.cat((self.key(x, here), self.key(y, positions, affine)), 1).transpose(1, 2)
                v = torch.cat((self.value(x), self.value(y, affine)), 1).transpose(1, 2)
                # softmax over all latents and points that a query may see (here: all): what to read is a query's own business
                return F.scaled_dot_product_attention(q, k, v)
            # keys and values of all points are 2 b n d numbers a layer: where that is much, not kept for the backward pass, but made again there
            recompute = torch.is_grad_enabled() and y.numel() > MUCH
            out = checkpoint(attend, q, x, y, use_reentrant=False, preserve_rng_state=False) if recompute else attend(q, x, y)
        else:
            out = self.read(q, x, here)
            for y, positions in points:                          # the same softmax, a chunk at a time
                out = join(out, self.read(q, self.norm_media(y), positions, affine))
            out = out.finish().to(latents.dtype)
        return self.to_out(rearrange(out, "b a s c -> b s (a c)"))

    def read(self, q, y, positions, affine=None):
        """q (b, a, s, c) reads y (b, n, d) -> Partial of (b, a, s) and (b, a, s, c)."""
        s = q @ rearrange(self.key(y, positions, affine), "b n a c -> b a c n") / math.sqrt(q.shape[-1])
        return partial(s, lambda w: w @ self.value(y, affine).transpose(1, 2).float())


class Perceiver(nn.Module):
    """Latents (b, s, d) read points `depth` times: norm; += attention; += MLP. No final norm (SPECS 1). points: a list of one
    chunk, or an iterable of chunks, that can be gone through once a layer; a chunk: (x (b, n, d), positions, ...).

    CHOICE: the points are normalised once, by norm_ctx, for all layers. The release normalises them again in every layer
    (norm_media=True); at 2 048 points a clip that costs as much as the attention itself.
    CHOICE: an ordinary pre-norm residual; the release adds to the *normed* latents (normed_residual=True). So its latents may
    start tiny (x 0.02); ours start at unit variance, or what they read here, nearly the same for all, would drown who they are."""

    def __init__(self, dim, depth, heads, normed_residual=False, norm_media=False, attention=CrossAttention):
        super().__init__()
        self.normed_residual, self.fold = normed_residual, attention is CrossAttention and not norm_media
        self.norm_ctx = nn.LayerNorm(dim, eps=1e-6)
        self.norm_lat = nn.LayerNorm(dim, eps=1e-6)              # one, shared by the layers, as in the release
        self.layers = nn.ModuleList(nn.ModuleList([attention(dim, heads, norm_media), GatedMLP(dim)]) for _ in range(depth))

    def forward(self, latents, points, *rest):
        normed = [self.norm_chunk(c) for c in points] if isinstance(points, list) else Again(lambda: map(self.norm_chunk, points))
        rest = (self.norm_ctx,) if self.fold else rest           # its scale and shift, see CrossAttention.project
        for attention, mlp in self.layers:
            x = self.norm_lat(latents)
            latents = (x if self.normed_residual else latents) + attention(x, normed, *rest)
            latents = latents + mlp(latents)
        return latents

    def norm_chunk(self, chunk):
        """norm_ctx of the points of a chunk (b, n, d), and of those that all tokens see, if it has any (encoder.py)."""
        x, positions, *layout = chunk
        if self.fold:
            return F.layer_norm(x, x.shape[-1:], eps=self.norm_ctx.eps), positions
        if layout and layout[1] is not None:
            layout[1] = (self.norm_ctx(layout[1][0]), layout[1][1])
        return self.norm_ctx(x), positions, *layout


class Again:
    """An iterable that can be gone through again and again: each time make() is called anew, and nothing is kept."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def fourier_codes(angles_or_grid, dim, generator=None):
    """Distinct start vectors: rows of sin / cos features (s, f), each of norm 1, sent through a random orthonormal map to
    `dim` channels. Nearby rows get similar codes, no two the same: queries that start alike learn alike, and collapse."""
    features = F.normalize(angles_or_grid, dim=-1)
    width = max(features.shape[1], dim)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:features.shape[1], :dim]
    return features @ basis


def query_codes(count, dim):
    """Learned queries' start (K, d): Fourier features of a ceil(sqrt K) x ceil(sqrt K) grid, + 1e-3 noise (SPECS 1), at unit
    variance (CHOICE; the release: x 0.02, see Perceiver)."""
    side = math.ceil(math.sqrt(count))
    y, x = torch.meshgrid(torch.linspace(-1, 1, side + 1)[:-1], torch.linspace(-1, 1, side + 1)[:-1], indexing="ij")
    frequencies = torch.arange(1, max(math.isqrt(count) // 2, 1) + 1) * math.pi
    grid = torch.stack((x.flatten(), y.flatten()), -1)[:count, :, None] * frequencies                # (K, 2, f)
    codes = fourier_codes(torch.cat((grid.sin(), grid.cos()), -1).flatten(1), dim)
    return math.sqrt(dim) * (codes + 1e-3 * torch.randn_like(codes))


# ---------------------------------------------------------------------------------------------------------------------
# The segmenter
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SegmenterConfig:
    """The paper's by default (Tiny backbone: 46 M parameters for the whole tokenizer)."""
    dim: int = 512                              # d: width of features and queries
    num_queries: int = 128                      # K: at most so many trajectories
    depth: int = 2                              # layers of the Perceiver
    heads: int = 8
    depths: tuple = (3, 3, 9, 3)                # ConvNeXt: blocks of the four stages
    dims: tuple = (96, 192, 384, 768)           # ConvNeXt: widths of the four stages
    scale: float = 10.0                         # s at the start of training (the release: 3.83), see soft_masks
    detach: bool = True                         # PAPER: the Perceiver gets F without gradient (ablation: False)
    hierarchical: bool = True                   # PAPER: sum of four scales (ablation: False, the stride-4 map alone)
    normed_residual: bool = False               # release, see Perceiver
    norm_media: bool = False                    # release, see Perceiver

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))   # JSON has lists only
        object.__setattr__(self, "dims", tuple(self.dims))
        numbers = (self.dim, self.num_queries, self.depth, self.heads, *self.depths, *self.dims)
        if len(self.depths) != 4 or len(self.dims) != 4 or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise BadInput(f"{self}: whole numbers from 1 on, and four depths and dims")
        if self.dim % self.heads or self.dim % 8:
            raise BadInput(f"dim {self.dim} with {self.heads} heads: dim must be a multiple of the heads and of 8")
        if not 1 < self.scale <= 20:                             # softplus(.) + 1, clamped at 20
            raise BadInput(f"scale {self.scale}: above 1, at most 20")


class Segmentation(NamedTuple):
    """What the segmenter says of b clips. n = t·h·w points in row-major (t, h, w) order, grid = (t, h, w)."""
    features: torch.Tensor          # F (b, n, d)
    logits: torch.Tensor            # (b, n, K); M_soft = softmax over the last axis, the queries
    ids: torch.Tensor               # int64 (b, n): M_hard, the trajectory of each point
    alive: torch.Tensor             # bool (b, K), True = owns at least one point
    grid: tuple

    def masks(self, size):
        """Trajectory of each pixel, int64 (b, t, H, W), at size = (H, W): logits interpolated, then the argmax, which
        draws borders between grid cells (argmax first would draw stairs of 4 pixels)."""
        t, h, w = self.grid
        logits = rearrange(self.logits.float(), "b (t h w) k -> b t k h w", t=t, h=h)
        frame = lambda x: F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)       # one at a time: K maps of H x W
        return torch.stack([torch.stack([frame(x) for x in clip]) for clip in logits])


# the authors' names -> ours (SPECS 1)
SEGMENTER_NAMES = [
    (r"patch_encoder\.(proj\.\d|ln)\.(.+)", r"\1.\2"),
    (r"trajectory_perceiver\.latents", r"latents"),
    (r"trajectory_perceiver\.(.+)", r"perceiver.\1"),
    (r"(traj_seg_head|patch_decoder)_low_res\.(.+)", r"\1.\2"),
    (r"(traj_seg_head|patch_decoder)_high_res\..+", None),     # for the release's training only
]


def official_part(weights, marks, where):
    """The keys under the prefix that holds all of `marks`, without it. SPECS 1: a segmenter's checkpoint says
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
    """The release's segmenter -> (SegmenterConfig read off names and shapes, weights under our names)."""
    backbone = {k.removeprefix("patch_encoder.backbone."): v for k, v in weights.items() if k.startswith("patch_encoder.backbone.")}
    backbone, depths, dims = convnext_names(backbone, where)
    rest = rename({k: v for k, v in weights.items() if not k.startswith("patch_encoder.backbone.")}, SEGMENTER_NAMES)
    for key, axes in (("latents", 2), ("perceiver.norm_lat.weight", 1)):
        if key not in rest or rest[key].dim() != axes:
            raise BadInput(f"{where}: {key} " + (f"is {tuple(rest[key].shape)}, not of {axes} dimensions" if key in rest else "is missing"))
    depth, heads = official_perceiver(rest, "perceiver.", where)
    queries, dim = rest["latents"].shape
    cfg = SegmenterConfig(dim, queries, depth, heads, depths, dims, normed_residual=True, norm_media=True)
    return cfg, {**{f"backbone.{k}": v for k, v in backbone.items()}, **rest}


class Segmenter(nn.Module):
    def __init__(self, cfg=SegmenterConfig()):
        super().__init__()
        self.cfg, d = cfg, cfg.dim
        self.backbone = ConvNeXt(cfg.depths, cfg.dims)
        self.proj = nn.ModuleList(nn.Conv2d(dim, d, 1) for dim in (cfg.dims if cfg.hierarchical else cfg.dims[:1]))
        self.ln = nn.LayerNorm(d)                                # one, shared by the four scales, as in the release
        self.latents = nn.Parameter(query_codes(cfg.num_queries, d))
        self.perceiver = Perceiver(d, cfg.depth, cfg.heads, cfg.normed_residual, cfg.norm_media)
        self.traj_seg_head = nn.Sequential(nn.Linear(d, d // 4), nn.ReLU(), nn.Linear(d // 4, d // 8))
        self.patch_decoder = nn.Sequential(nn.Linear(d, d // 4), nn.ReLU(), nn.Linear(d // 4, d // 8))
        self.log_scale = nn.Parameter(torch.tensor([math.log(math.expm1(cfg.scale - 1))]))       # softplus(.) + 1 = scale

    @classmethod
    def load_official(cls, path):
        """The segmenter of a checkpoint that the authors released (SPECS 1), .pth or safetensors: alone or inside TrajViT2's.
        Its configuration is read off names and shapes; what the release does otherwise than the paper is switched on."""
        cfg, weights = official_segmenter(official_part(read_weights(path), ("log_scale", "trajectory_perceiver.latents"), path), path)
        return fit_weights(cls(cfg), weights, path)

    def forward(self, video):
        """uint8 (b, t, H, W, 3) -> Segmentation."""
        return self.segment(normalise(video))

    def segment(self, x):
        """x (b, t, 3, H, W) normalised float -> Segmentation. H and W: multiples of 32, or a ValueError."""
        features, grid = self.extract(x)
        return self.assign(self.cluster(features), features, grid)

    def assign(self, latents, features, grid):
        """Queries (b, K, d) and points (b, n, d) -> Segmentation."""
        logits = self.soft_masks(latents, features)
        ids = logits.argmax(-1)                                  # M_hard: over the queries; each point has one owner
        alive = torch.zeros(ids.shape[0], self.cfg.num_queries, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        return Segmentation(features, logits, ids, alive, grid)

    def extract(self, x):
        """F = sum over scales of up(LN(proj(map)))  (b, n, d), and the grid (t, h, w)."""
        b, t, _, height, width = x.shape
        if height % 32 or width % 32:
            raise BadInput(f"frames of {width} x {height} px: the strides need multiples of 32; try --image-size {max(32, round(min(height, width) / 32) * 32)}")
        maps = self.backbone(rearrange(x, "b t c h w -> (b t) c h w"))
        h, w = height // 4, width // 4
        total = None
        for x, proj in zip(maps, self.proj):
            # d channels at a quarter of the side are as large as all maps together: what LN(proj) needs for its backward pass is made again there
            y = checkpoint(lambda x, proj=proj: self.ln(proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), x, use_reentrant=False, preserve_rng_state=False)
            y = y if y.shape[-2:] == (h, w) else F.interpolate(y, size=(h, w), mode="bilinear", align_corners=False)
            total = y if total is None else y.add_(total)        # in place: no backward pass needs a sum's terms
        return rearrange(total, "(b t) d h w -> b (t h w) d", b=b), (t, h, w)

    def cluster(self, features):
        """The queries Q read the points -> latents (b, K, d)."""
        # PAPER: gradients into F are cut here. Without it F learns to please the queries while the queries learn to follow
        # F, and both drift (ablation: VEQ 42.3 -> 34.1). F still learns, from the mask logits and from the encoder.
        points = features.detach() if self.cfg.detach else features
        return self.perceiver(self.latents.expand(len(features), -1, -1), [(points, self.positions(points))])

    def positions(self, points, first=0):
        """Rotary positions (n,) of points (b, n, d), the first of which is point number `first` of its clip: after the queries'."""
        begin = self.cfg.num_queries + first
        return torch.arange(begin, begin + points.shape[1], device=points.device)

    def soft_masks(self, latents, features):
        """logits = s·cosine(head(Q), head(F))  (b, n, K).
        CHOICE: the paper's "dot product" is the release's scaled dot product of unit vectors. The scale s matters: it
        starts at softplus(ln 16) + 1 = 3.83 in the release, where the softmax over K queries is nearly flat: with K = 128,
        a query that matches a point perfectly claims e^3.83 / (e^3.83 + 127 e^0) = 27 % of it while the others are
        orthogonal to it. Here it starts at cfg.scale. It is learned, and clamped at 20."""
        q = F.normalize(self.traj_seg_head(latents).float(), dim=-1)
        p = F.normalize(self.patch_decoder(features).float(), dim=-1)
        scale = (F.softplus(self.log_scale.float()) + 1).clamp(max=20.0)
        return torch.einsum("bnd,bkd->bnk", p, q * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Matching: which query is which label
# ---------------------------------------------------------------------------------------------------------------------

def hungarian(cost, certificate=False):
    """Exact minimum-cost assignment of rows to columns, batched. cost float (b, r, c), r <= c, finite
    -> int64 (b, r): the column of each row.  numpy in, numpy out.
    certificate=True: also the potentials u (b, r), v (b, c). u_i + v_j <= c_ij everywhere, = on the assignment, v <= 0 and 0 on
    free columns: no assignment can cost less than sum u + sum v, and this one costs just that.

    1. Every row takes a free column among its cheapest: in costs of overlap most objects have one to themselves.
    2. The rows that are left enter one by one by a shortest augmenting path (Jonker-Volgenant): from the new row, Dijkstra over
       columns on the reduced costs c_ij - u_i - v_j >= 0 until a free column is reached; then the path is flipped and the
       potentials are raised so that reduced costs stay >= 0 and matched ones 0.
    All problems of the batch step together, each on a row and a path of its own; a finished one waits."""
    b, rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot be matched to {columns} columns: transpose the cost")
    if not np.isfinite(cost).all():                              # the search below would never reach a free column
        raise ValueError("hungarian: every cost must be finite")
    cost = np.asarray(cost, np.float64)
    every = np.arange(b)
    u, v = np.zeros((b, rows + 1)), np.zeros((b, columns))       # u's last entry belongs to nobody
    if rows:
        u[:, :rows] = cost.min(2)
    owner = np.full((b, columns), -1)                            # row matched to each column, -1 = free
    left = np.ones((b, rows), bool)                              # rows without a column
    for row in range(rows):                                      # 1
        fits = (cost[:, row] <= u[:, row, None]) & (owner < 0)
        column = fits.argmax(1)
        left[:, row] = ~fits[every, column]
        owner[every, column] = np.where(left[:, row], owner[every, column], row)
    while left.any():                                            # 2
        who = np.flatnonzero(left.any(1))                        # problems with a row left, and that row
        row, n = left[who].argmax(1), len(who)
        left[who, row] = False
        distance = np.full((n, columns), np.inf)                 # shortest path from `row` to each column
        before = np.full((n, columns), -1)                       # the column before it on that path, -1 = the row itself
        done = np.zeros((n, columns), bool)
        here, reached, column = row.copy(), np.zeros(n), np.full(n, -1)
        active = np.arange(n)
        while len(active):
            i, r = who[active], here[active]
            reduced = (reached[active] - u[i, r])[:, None] + cost[i, r] - v[i]
            better = ~done[active] & (reduced < distance[active] - 1e-12)
            distance[active] = np.where(better, reduced, distance[active])
            before[active] = np.where(better, column[active, None], before[active])
            step = np.where(done[active], np.inf, distance[active] - 1e-13 * (owner[i] < 0)).argmin(1)    # of equals, a free one
            reached[active], column[active] = distance[active, step], step
            done[active, step] = True
            here[active] = owner[i, step]
            active = active[owner[i, step] >= 0]                 # a free column ends the path
        # potentials: columns on the tree fall, the rows that own them rise, by how much earlier they were reached
        slack = np.where(done, reached[:, None] - distance, 0.0)
        slack[np.arange(n), column] = 0.0
        v[who] -= slack
        mine = owner[who]
        np.add.at(u, (who[:, None], np.where(mine >= 0, mine, rows)), np.where(mine >= 0, slack, 0.0))
        u[who, row] += reached
        active = np.arange(n)
        while len(active):                                       # flip the path: each column takes its predecessor's row
            previous = before[active, column[active]]
            owner[who[active], column[active]] = np.where(previous < 0, row[active], owner[who[active], previous.clip(0)])
            column[active] = previous
            active = active[previous >= 0]
    answer = np.full((b, rows + 1), -1)
    answer[every[:, None], np.where(owner >= 0, owner, rows)] = np.arange(columns)
    return (answer[:, :rows], u[:, :rows], v) if certificate else answer[:, :rows]


def overlaps(pred, gt, p, g):
    """Intersections of predicted tubes and labels: pred int64 (b, n) in [0, p), gt int64 (b, n) in [-1, g)
    -> (intersection (b, g, p), label area (b, g), predicted area (b, p)). Predicted areas count unlabelled points too."""
    b, n = pred.shape
    pair = (gt + 1) * p + pred + torch.arange(b, device=pred.device)[:, None] * ((g + 1) * p)
    table = torch.bincount(pair.flatten(), minlength=b * (g + 1) * p).view(b, g + 1, p)              # row 0: unlabelled
    return table[:, 1:], table[:, 1:].sum(2), table.sum(1)


@torch.no_grad()
def match(logits, labels, soft=1.0):
    """logits (b, n, k), labels int64 (b, n), -1 = unlabelled, ids < k -> int64 (b, k): the column (query) of each label;
    labels that do not occur get the columns that are left, so each row is a permutation.
    PAPER / SPECS 1: Hungarian on -IoU of the argmax masks; rows of absent labels cost 0.
    DEVIATION: `soft` times the IoU of the soft masks is added. Early in training most queries win no point at all: their
    argmax IoU is 0 with every label, any assignment among them is optimal, and which query is told to become which object
    is an accident of column order. The soft masks say which one leans towards it already. soft=0 is the release's."""
    k = logits.shape[-1]
    inter, area, predicted = overlaps(logits.argmax(-1), labels, k, k)
    iou = inter / (area[:, :, None] + predicted[:, None] - inter).clamp(min=1)
    if soft:
        p = logits.float().softmax(-1)                           # over the queries, as everywhere
        row = (labels + 1 + torch.arange(len(labels), device=labels.device)[:, None] * (k + 1)).flatten()
        both = p.new_zeros(len(labels) * (k + 1), k).index_add_(0, row, p.flatten(0, 1)).view(-1, k + 1, k)[:, 1:]
        iou = iou + soft * both / (area[:, :, None] + p.sum(1)[:, None] - both).clamp(min=1)
    # absent labels cost 0 everywhere: they can be left out of the problem and filled in after it. The present ones come
    # first (stable sort), so the problem has as many rows as the richest clip has labels, not k.
    order = (area == 0).to(torch.int8).argsort(dim=1, stable=True).cpu().numpy()
    live = (area > 0).sum(1).tolist()
    rows = order[:, :max(live)]
    # logits that have become NaN match anyhow: the losses are NaN then, and the training loop names step and term
    column = hungarian(-np.nan_to_num(np.take_along_axis(iou.double().cpu().numpy(), rows[:, :, None], 1)))
    result = np.full((len(iou), k), -1)
    for i, n in enumerate(live):
        result[i, rows[i, :n]] = column[i, :n]
        result[i, result[i] < 0] = np.setdiff1d(np.arange(k), column[i, :n])
    return torch.from_numpy(result).to(logits.device)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

def dice_loss(logits, labels, pooled=False, eps=1e-6):
    """1 - 2 |P ∩ G| / (|P| + |G|), averaged over the labels that occur; P = softmax over the queries, soft areas.
    logits (b, n, k) in the labels' order, labels (b, n), -1 = unlabelled and left out.
    CHOICE: each label of each clip is one region, so every object counts the same. The release pools label l of all clips
    of the batch into one region (SPECS 1; pooled=True), which weighs objects by their size and by the accident of their id.
    CHOICE: |P| counts all points. An unlabelled point may be anything, but not part of a labelled trajectory: of videos in which
    one object alone is labelled, a |P| over labelled points (pooled=True) would be content with one query for everything."""
    p = logits.float().softmax(-1)                               # over the queries: a point belongs to one trajectory
    seen = labels >= 0
    onehot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(p.dtype) * seen[..., None]
    over = (0, 1) if pooled else 1
    inter, soft, hard = (p * onehot).sum(over), (p * seen[..., None] if pooled else p).sum(over), onehot.sum(over)     # (b, k) or (k,)
    dice = 1 - (2 * inter + eps) / (soft + hard + eps)
    here = (hard > 0).to(p.dtype)
    return (dice * here).sum() / here.sum().clamp(min=1)


def focal_loss(logits, labels, gamma=2.0):
    """-(1 - p)^gamma log p of the labelled query, mean over labelled points: points that are already right weigh little,
    so small things are heard beside large ones. No alpha (SPECS 1). At initialisation p = 1/k: (1 - 1/k)² ln k."""
    seen = labels >= 0
    log_p = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -(1 - log_p.exp()) ** gamma * log_p
    return (loss * seen).sum() / seen.sum().clamp(min=1)


@torch.no_grad()
def labels_on_grid(labels, grid, k=None):
    """Pixel labels (b, t, H, W) -> point labels (b, n): the pixel in the middle of each cell. At most k trajectories a clip
    (None: all) are kept, the largest, under new ids by rank; what does not fit becomes unlabelled (-1)."""
    b, (t, h, w) = len(labels), grid
    y = (torch.arange(h, device=labels.device) * 2 + 1) * labels.shape[2] // (2 * h)
    x = (torch.arange(w, device=labels.device) * 2 + 1) * labels.shape[3] // (2 * w)
    points = labels[:, :, y][..., x].flatten(1)
    count = int(points.max()) + 1
    if k is not None and count > k:
        area = torch.zeros(b, count + 1, dtype=torch.int64, device=labels.device)
        area.scatter_add_(1, points + 1, torch.ones_like(points))
        rank = area[:, 1:].argsort(dim=1, descending=True, stable=True).argsort(dim=1)       # 0 = the largest trajectory of its clip
        rank = torch.where(rank < k, rank, -1)
        points = torch.where(points >= 0, rank.gather(1, points.clamp(min=0)), -1)
    return points


def segmentation_loss(seg, labels, pooled=False, soft=1.0):
    """Segmentation, pixel labels (b, t, H, W) -> dict(focal, dice): scalars with gradient. The caller weighs them: focal +
    2 dice for the segmenter alone, 0.5 focal + dice beside the contrastive loss (SPECS 1). PAPER: no cross-entropy.
    pooled=True, soft=0: the release's values (see dice_loss, match)."""
    points = labels_on_grid(labels, seg.grid, seg.logits.shape[-1])
    order = match(seg.logits, points, soft)                      # column of each label
    logits = seg.logits.gather(-1, order[:, None].expand(-1, seg.logits.shape[1], -1))               # column l = label l
    return dict(focal=focal_loss(logits, points), dice=dice_loss(logits, points, pooled))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def video_metrics(pred, gt):
    """Video entity quality and segmentation-and-tracking quality. pred, gt int64 (b, t, H, W), gt -1 = unlabelled.
    CHOICE: a predicted tube's area counts unlabelled pixels, as in matching (they are not part of the labelled object); a tube that
    lies on unlabelled pixels alone is no error (nothing is known there). Means over clips, as floats:
      tubes over T x H x W, matched one to one by Hungarian, a match counts from IoU 0.5 (SPECS 1)
      sq  mean IoU of matches         rq  TP / (TP + FP/2 + FN/2)            veq = sq·rq
      aq  sum of the matches' intersections / sum of their unions            stq = sqrt(sq·aq)
    Id 0 is a tube like any other (the release drops predicted id 0, so a perfect match in slot 0 scores 0)."""
    b = len(pred)
    pred, gt = pred.flatten(1), gt.flatten(1)
    p, g = int(pred.max()) + 1, int(gt.max()) + 1
    total = dict(veq=0.0, sq=0.0, rq=0.0, stq=0.0, aq=0.0)
    if min(p, g) == 0:
        return total
    inter, area, predicted = overlaps(pred, gt, p, g)
    union = area[:, :, None] + predicted[:, None] - inter
    iou = (inter / union.clamp(min=1)).double()
    cost = -iou.cpu().numpy()
    column = hungarian(cost) if g <= p else None
    row = hungarian(cost.transpose(0, 2, 1)) if g > p else None
    for i in range(b):
        pairs = list(enumerate(column[i])) if row is None else [(r, c) for c, r in enumerate(row[i])]
        good = [(r, c) for r, c in pairs if iou[i, r, c] >= 0.5]
        tp = len(good)
        fp, fn = int((inter[i].sum(0) > 0).sum()) - tp, int((area[i] > 0).sum()) - tp
        if tp:
            sq = sum(iou[i, r, c].item() for r, c in good) / tp
            aq = sum(inter[i, r, c].item() for r, c in good) / sum(union[i, r, c].item() for r, c in good)
            rq = tp / (tp + fp / 2 + fn / 2)
            for key, value in dict(veq=sq * rq, sq=sq, rq=rq, stq=math.sqrt(sq * aq), aq=aq).items():
                total[key] += value / b
    return total


@torch.no_grad()
def best_overlaps(pred, gt, first=0):
    """For every label >= `first` that occurs: the IoU of the predicted tube that fits it best. A flat list of floats."""
    pred, gt = pred.flatten(1), gt.flatten(1)
    if int(gt.max()) < first:
        return []
    inter, area, predicted = overlaps(pred, gt, int(pred.max()) + 1, int(gt.max()) + 1)
    iou = (inter / (area[:, :, None] + predicted[:, None] - inter).clamp(min=1)).amax(2)
    return iou[:, first:][area[:, first:] > 0].tolist()


def object_scores(pred, gt):
    """One object's tube against a segmentation. pred int64 (t, H, W), -1 = none; gt bool (t, H, W), True = the object -> two floats:
      best   the highest IoU of any one predicted tube with the object's
      union  IoU of the object with all tubes together that have more than half of their pixels inside it
    The first asks for one trajectory on the thing, the second only that borders are kept. An object without a pixel scores 0."""
    pred, gt = pred.flatten(), gt.flatten()
    own = pred >= 0
    count = int(pred.max()) + 1
    area, inside = torch.bincount(pred[own], minlength=count), torch.bincount(pred[own & gt], minlength=count)
    total = int(gt.sum())
    if not total or not count:
        return 0.0, 0.0
    mostly = 2 * inside > area
    best = (inside / (area + total - inside)).max().item()
    return best, (inside[mostly].sum() / (total + (area - inside)[mostly].sum())).item()


def grid_tubes(shape, rows, columns):
    """The baseline beside every segmentation score: the frame cut into rows x columns cells, the same in all frames.
    shape (b, t, H, W) -> int64 ids of that shape."""
    b, t, h, w = shape
    y = torch.arange(h) * rows // h
    x = torch.arange(w) * columns // w
    return (y[:, None] * columns + x).expand(b, t, h, w)
