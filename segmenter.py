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

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import BadInput

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet, as every backbone here expects


def normalise(video):
    """uint8 (b, t, H, W, 3) -> float (b, t, 3, H, W), ImageNet mean 0 and deviation 1, on the video's device."""
    if video.dtype != torch.uint8 or video.dim() != 5 or video.shape[-1] != 3:
        raise ValueError(f"video must be uint8 (b, t, H, W, 3), not {video.dtype} {tuple(video.shape)}")
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return (video.movedim(-1, 2).float() - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# ConvNeXt: four maps of a picture
# ---------------------------------------------------------------------------------------------------------------------

def depthwise(x, conv):
    """conv (depthwise, odd kernel, same padding) of x (b, c, h, w), channels last. On a CPU, maps smaller than the kernel are
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
        y = self.norm(y)                                         # 2
        y = self.pwconv2(F.gelu(self.pwconv1(y)))                # 3, 4
        return x + (self.gamma * y).permute(0, 3, 1, 2)


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

def rotary_table(first, count, channels, device, theta=1e4):
    """e^(i·angle), complex64 (count, 1, channels / 2), of positions first .. first + count - 1. SPECS 1: the first half of a
    head's channels turns, in adjacent pairs, pair i by position x theta^(-2i / rotated); the other half stays (angle 0).
    Always float32: in half precision the 25 216 positions of an 8-frame clip at 224 px collapse to 5 700 values, bf16: 1 100."""
    rotated = channels // 4 * 2
    frequency = torch.zeros(channels // 2, device=device)
    frequency[:rotated // 2] = theta ** (-torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated)
    angle = torch.arange(first, first + count, device=device, dtype=torch.float32)[:, None, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, table):
    """Rotary embedding of x (b, s, a, c): channels (2j, 2j + 1) are one complex number, multiplied by its position's phase.
    One multiplication for all channels: cutting off the half that stays and joining it again would cost two copies."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class GatedMLP(nn.Module):
    """norm -> down(SiLU(gate) * up), inner width 4d (SPECS 1). (b, s, d) -> (b, s, d)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class CrossAttention(nn.Module):
    """Latents read [latents; points]: queries from the latents, keys and values from both, no biases.
    Rotary positions on the first half of each head's channels: latents 0 .. s-1, points s ..; 1-D, in the points' row-major
    (t, h, w) order, as the paper has it. latents (b, s, d), points (b, n, d) -> (b, s, d)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def query(self, x):
        q = rearrange(self.to_q(x), "b s (a c) -> b s a c", a=self.heads)
        return rotate(q, rotary_table(0, q.shape[1], q.shape[-1], q.device))

    def key_value(self, x, first):
        """x (b, n, d) at positions first ... -> k (rotated), v (b, n, a, c)."""
        # one product each: a joint one, split afterwards, costs a copy of both in the backward pass
        k, v = (rearrange(F.linear(x, w), "b n (a c) -> b n a c", a=self.heads) for w in self.to_kv.weight.chunk(2))
        return rotate(k, rotary_table(first, k.shape[1], k.shape[-1], k.device)), v

    def forward(self, latents, points):
        x = self.norm_latents(latents)
        q, (k, v) = self.query(x), self.key_value(torch.cat((x, points), 1), 0)
        # softmax over all latents and points that a query may see (here: all): what to read is a query's own business
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out(rearrange(out, "b a s c -> b s (a c)"))


class Perceiver(nn.Module):
    """Latents (b, s, d) read points (b, n, d) `depth` times: norm; += attention; += MLP. No final norm (SPECS 1).
    CHOICE: the points are normalised once, by norm_ctx, for all layers. The release normalises them again in every layer;
    at 2 048 points a clip that costs as much as the attention itself."""

    def __init__(self, dim, depth, heads, attention=CrossAttention):
        super().__init__()
        self.norm_ctx = nn.LayerNorm(dim, eps=1e-6)
        self.norm_lat = nn.LayerNorm(dim, eps=1e-6)              # one, shared by the layers, as in the release
        self.layers = nn.ModuleList(nn.ModuleList([attention(dim, heads), GatedMLP(dim)]) for _ in range(depth))

    def forward(self, latents, points, *mask):
        points = self.norm_ctx(points)
        for attention, mlp in self.layers:
            # CHOICE: an ordinary pre-norm residual; the release adds to the *normed* latents. So its latents may start tiny
            # (x 0.02); ours start at unit variance, or what they read here, nearly the same for all, would drown who they are.
            latents = latents + attention(self.norm_lat(latents), points, *mask)
            latents = latents + mlp(latents)
        return latents


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

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))   # JSON has lists only
        object.__setattr__(self, "dims", tuple(self.dims))
        if self.dim % self.heads or self.dim % 8:
            raise BadInput(f"dim {self.dim} with {self.heads} heads: dim must be a multiple of the heads and of 8")
        if self.num_queries < 1 or self.depth < 1 or len(self.depths) != 4 or len(self.dims) != 4:
            raise BadInput(f"{self}: at least one query and one layer, and four depths and dims")


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
        return torch.stack([F.interpolate(clip, size=size, mode="bilinear", align_corners=False).argmax(1) for clip in logits])


class Segmenter(nn.Module):
    def __init__(self, cfg=SegmenterConfig()):
        super().__init__()
        self.cfg, d = cfg, cfg.dim
        self.backbone = ConvNeXt(cfg.depths, cfg.dims)
        self.proj = nn.ModuleList(nn.Conv2d(dim, d, 1) for dim in (cfg.dims if cfg.hierarchical else cfg.dims[:1]))
        self.ln = nn.LayerNorm(d)                                # one, shared by the four scales, as in the release
        self.latents = nn.Parameter(query_codes(cfg.num_queries, d))
        self.perceiver = Perceiver(d, cfg.depth, cfg.heads)
        self.traj_seg_head = nn.Sequential(nn.Linear(d, d // 4), nn.ReLU(), nn.Linear(d // 4, d // 8))
        self.patch_decoder = nn.Sequential(nn.Linear(d, d // 4), nn.ReLU(), nn.Linear(d // 4, d // 8))
        self.log_scale = nn.Parameter(torch.tensor([math.log(math.expm1(cfg.scale - 1))]))       # softplus(.) + 1 = scale

    def forward(self, video):
        """uint8 (b, t, H, W, 3) -> Segmentation."""
        return self.segment(normalise(video))

    def segment(self, x):
        """x (b, t, 3, H, W) normalised float -> Segmentation. H and W: multiples of 32, or a ValueError."""
        features, grid = self.extract(x)
        latents = self.cluster(features)
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
        total = 0
        for x, proj in zip(maps, self.proj):
            y = self.ln(proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            total = total + (y if y.shape[-2:] == (h, w) else F.interpolate(y, size=(h, w), mode="bilinear", align_corners=False))
        return rearrange(total, "(b t) d h w -> b (t h w) d", b=b), (t, h, w)

    def cluster(self, features):
        """The queries Q read the points -> latents (b, K, d)."""
        # PAPER: gradients into F are cut here. Without it F learns to please the queries while the queries learn to follow
        # F, and both drift (ablation: VEQ 42.3 -> 34.1). F still learns, from the mask logits and from the encoder.
        points = features.detach() if self.cfg.detach else features
        return self.perceiver(self.latents.expand(len(features), -1, -1), points)

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

def hungarian(cost):
    """Exact minimum-cost assignment of rows to columns, batched. cost float (b, r, c), r <= c, finite
    -> int64 (b, r): the column of each row.  numpy in, numpy out.

    Shortest augmenting paths (Jonker-Volgenant): rows enter one by one; from the new row, Dijkstra over columns on the
    reduced costs c_ij - u_i - v_j >= 0 until a free column is reached; then the path is flipped and the potentials u, v
    are raised so that reduced costs stay >= 0 and matched ones 0: the certificate that no assignment is cheaper.
    All b problems step together, each on its own path; a finished one waits. O(r²) steps of numpy over (b, c)."""
    b, rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot be matched to {columns} columns: transpose the cost")
    if not np.isfinite(cost).all():                              # the search below would never reach a free column
        raise ValueError("hungarian: every cost must be finite")
    cost = np.asarray(cost, np.float64)
    u, v = np.zeros((b, rows + 1)), np.zeros((b, columns))
    owner = np.full((b, columns), -1)                            # row matched to each column, -1 = free
    every = np.arange(b)
    for row in range(rows):
        distance = np.full((b, columns), np.inf)                 # shortest path from `row` to each column
        before = np.full((b, columns), -1)                       # the column before it on that path, -1 = the row itself
        done = np.zeros((b, columns), bool)
        here, reached, column = np.full(b, row), np.zeros(b), np.full(b, -1)
        active = every
        while len(active):
            reduced = reached[active, None] + cost[active, here[active]] - u[active, here[active], None] - v[active]
            better = ~done[active] & (reduced < distance[active] - 1e-12)
            distance[active] = np.where(better, reduced, distance[active])
            before[active] = np.where(better, column[active, None], before[active])
            step = np.where(done[active], np.inf, distance[active]).argmin(1)
            reached[active], column[active] = distance[active, step], step
            done[active, step] = True
            here[active] = owner[active, step]
            active = active[owner[active, step] >= 0]            # a free column ends the path
        # potentials: columns on the tree fall, the rows that own them rise, by how much earlier they were reached
        slack = np.where(done, reached[:, None] - distance, 0.0)
        slack[every, column] = 0.0
        v -= slack
        np.add.at(u, (every[:, None], np.where(owner >= 0, owner, rows)), np.where(owner >= 0, slack, 0.0))
        u[:, row] += reached
        active = every
        while len(active):                                       # flip the path: each column takes its predecessor's row
            previous = before[active, column[active]]
            owner[active, column[active]] = np.where(previous < 0, row, owner[active, previous.clip(0)])
            column[active] = previous
            active = active[previous >= 0]
    answer = np.full((b, rows + 1), -1)
    answer[every[:, None], np.where(owner >= 0, owner, rows)] = np.arange(columns)
    return answer[:, :rows]


def overlaps(pred, gt, p, g):
    """Intersections of predicted tubes and labels: pred int64 (b, n) in [0, p), gt int64 (b, n) in [-1, g)
    -> (intersection (b, g, p), label area (b, g), predicted area (b, p)). Predicted areas count unlabelled points too."""
    b, n = pred.shape
    pair = (gt + 1) * p + pred + torch.arange(b, device=pred.device)[:, None] * ((g + 1) * p)
    table = torch.bincount(pair.flatten(), minlength=b * (g + 1) * p).view(b, g + 1, p)              # row 0: unlabelled
    return table[:, 1:], table[:, 1:].sum(2), table.sum(1)


@torch.no_grad()
def match(logits, labels, soft=0.01):
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
    of the batch into one region (SPECS 1; pooled=True), which weighs objects by their size and by the accident of their id."""
    p = logits.float().softmax(-1)                               # over the queries: a point belongs to one trajectory
    seen = labels >= 0
    onehot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(p.dtype) * seen[..., None]
    over = (0, 1) if pooled else 1
    inter, soft, hard = (p * onehot).sum(over), (p * seen[..., None]).sum(over), onehot.sum(over)    # (b, k) or (k,)
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


def segmentation_loss(seg, labels):
    """Segmentation, pixel labels (b, t, H, W) -> dict(focal, dice): scalars with gradient. The caller weighs them: focal +
    2 dice for the segmenter alone, 0.5 focal + dice beside the contrastive loss (SPECS 1). PAPER: no cross-entropy."""
    points = labels_on_grid(labels, seg.grid, seg.logits.shape[-1])
    order = match(seg.logits, points)                            # column of each label
    logits = seg.logits.gather(-1, order[:, None].expand(-1, seg.logits.shape[1], -1))               # column l = label l
    return dict(focal=focal_loss(logits, points), dice=dice_loss(logits, points))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def video_metrics(pred, gt):
    """Video entity quality and segmentation-and-tracking quality. pred, gt int64 (b, t, H, W), gt -1 = unlabelled: those
    pixels are left out of everything (CHOICE: nothing is known of them). Means over clips, as floats:
      tubes over T x H x W, matched one to one by Hungarian, a match counts from IoU 0.5 (SPECS 1)
      sq  mean IoU of matches         rq  TP / (TP + FP/2 + FN/2)            veq = sq·rq
      aq  sum of the matches' intersections / sum of their unions            stq = sqrt(sq·aq)
    Id 0 is a tube like any other (the release drops predicted id 0, so a perfect match in slot 0 scores 0)."""
    b = len(pred)
    pred, gt = pred.flatten(1), gt.flatten(1)
    pred = torch.where(gt >= 0, pred, -1)
    p, g = int(pred.max()) + 1, int(gt.max()) + 1
    total = dict(veq=0.0, sq=0.0, rq=0.0, stq=0.0, aq=0.0)
    if min(p, g) == 0:
        return total
    inter, area, _ = overlaps(pred.clamp(min=0), gt, p, g)
    predicted = inter.sum(1)                                     # within the labelled pixels
    union = area[:, :, None] + predicted[:, None] - inter
    iou = (inter / union.clamp(min=1)).double()
    cost = -iou.cpu().numpy()
    column = hungarian(cost) if g <= p else None
    row = hungarian(cost.transpose(0, 2, 1)) if g > p else None
    for i in range(b):
        pairs = list(enumerate(column[i])) if row is None else [(r, c) for c, r in enumerate(row[i])]
        good = [(r, c) for r, c in pairs if iou[i, r, c] >= 0.5]
        tp = len(good)
        fp, fn = int((predicted[i] > 0).sum()) - tp, int((area[i] > 0).sum()) - tp
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


def grid_tubes(shape, rows, columns):
    """The baseline beside every segmentation score: the frame cut into rows x columns cells, the same in all frames.
    shape (b, t, H, W) -> int64 ids of that shape."""
    b, t, h, w = shape
    y = torch.arange(h) * rows // h
    x = torch.arange(w) * columns // w
    return (y[:, None] * columns + x).expand(b, t, h, w)
