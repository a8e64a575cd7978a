"""The universal segmenter: it clusters the points of a clip, in space and time at once, into at most K
trajectories. A point is a cell of the feature grid in one frame.

One differentiable pass, no tracker (paper, "Key Designs" 1):

    video uint8 (b, t, H, W, 3)
      -> backbone, frame by frame: maps at several scales
      -> each to d channels, LayerNorm, upsampled to the finest, summed:  features F (b, n, d), n = t·h·w
      -> Perceiver: K learned queries Q read the points                   queries    (b, K, d)
      -> M_soft = softmax over the queries of scale · cosine(Q, F)        logits     (b, n, K)
      -> M_hard = argmax over the queries: the trajectory of each point   ids (b, n), alive (b, K)

Training: labels are matched to queries by the Hungarian method, then Dice + focal loss.

Axes in every shape comment: b = clip, t = frame, h w = feature grid, n = points in row-major (t, h, w) order,
k = query (of K), s = latent, l = label, d = width, a = attention head, c = channels."""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet statistics


def normalise(video, mean=MEAN, std=STD):
    """uint8 (b, t, H, W, 3) -> float (b, t, 3, H, W), (pixel / 255 - mean) / std in each channel, on the
    video's device. Over many natural images the result has mean 0 and deviation 1."""
    assert video.dtype == torch.uint8 and video.dim() == 5 and video.shape[-1] == 3, \
        f"video must be uint8 (b, t, H, W, 3), not {video.dtype} {tuple(video.shape)}"
    pixels = video.movedim(-1, 2).float()
    mean = 255 * torch.tensor(mean, device=video.device)
    std = 255 * torch.tensor(std, device=video.device)
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def resize(x, size):
    """(b, t, 3, H, W) -> (b, t, 3, size, size)"""
    small = F.interpolate(x.flatten(0, 1), size=(size, size), mode="bilinear", antialias=True)
    return small.unflatten(0, x.shape[:2])


def recomputed(recompute, function, *args):
    """function(*args). With `recompute`, the activations inside the function are not kept: the backward pass
    computes them again. Nothing in these models is random, so the state of the generator is not saved."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


# -----------------------------------------------------------------------------------------------------------
# ConvNeXt: the feature maps of one frame
# -----------------------------------------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, x):
        y = super().forward(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """ConvNeXt block: depthwise 7x7 -> LayerNorm -> linear, 4 times wider -> GELU -> linear -> layer scale,
    plus the input."""

    def __init__(self, dim, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        # CHOICE: layer scale starts at 0.1. ConvNeXt's 1e-6 is meant for 300 epochs; in minutes of training
        # the blocks would have no effect.
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def mlp(self, y):
        return self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))

    def forward(self, x):                                       # (b, c, h, w)
        y = self.dwconv(x).permute(0, 2, 3, 1)                  # (b, h, w, c)
        y = recomputed(self.recompute, self.mlp, y)
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545), the default backbone. forward(x (b, 3, H, W) normalised) -> four maps,
    (b, dims[i], h, w) each.

    A backbone of your own is any module with `.dims`, the channels of its maps, and such a forward, which
    returns the finest map first. The size of that map is the grid of the points; no stride is assumed.
    Parameter names are those of the original release. PAPER: ConvNeXt-Tiny, depths 3, 3, 9, 3 and dims 96,
    192, 384, 768: 27.8 M parameters."""

    def __init__(self, depths, dims, recompute=False):
        super().__init__()
        self.dims = tuple(dims)
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, dim in zip(dims, dims[1:]):
            norm = ChannelNorm(before, eps=1e-6)
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(before, dim, 2, 2)))
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims):
            blocks = [Block(dim, recompute) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = ChannelNorm(dims[-1], eps=1e-6)
        # linear layers start at the original's 0.02, convolutions at 1 / sqrt(fan in): the output of the stem
        # then has unit variance, as its input has
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                std = 0.02 if isinstance(module, nn.Linear) else fan_in ** -0.5
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        # CHOICE: the stem's bias starts at unit variance, as large as its signal. The LayerNorm after the
        # stem removes the scale of its input. Without a bias, two uniform areas whose normalised colours
        # differ by a factor alone, such as a white and a light grey one, would get the same features.
        nn.init.normal_(stem[0].bias)

    def forward(self, x):
        # depthwise convolutions on a CPU are 4 times as fast in this memory layout
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        # the final norm belongs to the last map alone, as in the authors' release
        maps[-1] = self.norm(x)
        return maps


# -----------------------------------------------------------------------------------------------------------
# The Perceiver: latents read points (arXiv 2103.03206)
# -----------------------------------------------------------------------------------------------------------

def rotate(x, positions):
    """Rotary embedding (arXiv 2104.09864) of x (b, n, a, c) at integer positions (n,). A point's position is
    its place in the flat order of (t, h, w), as in the release.

    Channels 2j and 2j + 1 are a complex number, which turns by position · 10000^(-2j / (c/2)) in the first
    half of the channels; the second half does not turn. Angles are float64: in half precision the 25 216
    positions of 128 queries and 8 frames at 224 px would collapse to a few thousand, and in float32 the
    angles of a long film's last points, at positions of millions, would be off by 0.03."""
    half = x.shape[-1] // 4 * 2                                 # how many channels turn
    even = torch.arange(0, half, 2, dtype=torch.float64)
    frequency = torch.zeros(x.shape[-1] // 2, dtype=torch.float64)
    frequency[:half // 2] = 1e4 ** (-even / half)
    angle = positions[:, None, None] * frequency.to(positions.device)        # (n, 1, c / 2)
    turn = torch.complex(angle.cos().float(), angle.sin().float())           # e^(i·angle)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))          # (b, n, a, c / 2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class CrossAttention(nn.Module):
    """Latents (b, s, d) attend to [latents; points]. For the rotary embedding, latents have the positions
    0 .. s-1 and points (b, n, d) those after them."""

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.dim
        self.heads = cfg.heads
        self.norm_media = nn.LayerNorm(dim) if cfg.norm_media else nn.Identity()
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def project(self, latents, points, first):
        """-> q, k_own, v_own of the latents, each (b, s, a, c), and k, v of the points, each (b, n, a, c).
        `first` is the position of the first point."""
        latents = self.norm_latents(latents)
        points = self.norm_media(points)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1))
        k_own, v_own = self.keys_and_values(latents)
        k, v = self.keys_and_values(points)
        # values are not rotated
        latent_at = torch.arange(latents.shape[1], device=latents.device)
        point_at = first + torch.arange(points.shape[1], device=points.device)
        return rotate(q, latent_at), rotate(k_own, latent_at), v_own, rotate(k, point_at), v

    def keys_and_values(self, x):
        return rearrange(self.to_kv(x), "b n (two a c) -> two b n a c", two=2, a=self.heads)

    def forward(self, latents, points, ids=None):               # ids: unused here; encoder.py needs them
        q, k_own, v_own, k, v = self.project(latents, points, latents.shape[1])
        q = q.transpose(1, 2)                                   # (b, a, s, c)
        k = torch.cat((k_own, k), 1).transpose(1, 2)            # (b, a, s + n, c)
        v = torch.cat((v_own, v), 1).transpose(1, 2)
        # softmax over everything a latent may read: all latents and all points
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(y, "b a s c -> b s (a c)"))


class GatedMLP(nn.Module):
    """x (..., d) -> down(SiLU(gate(y)) · up(y)) with y = norm(x); the inner width is 4d."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, 4 * dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Perceiver(nn.Module):
    """`depth` times: latents += attention(latents, points); latents += MLP(latents).
    Latents (b, s, d), points (b, n, d) -> (b, s, d).

    CHOICE: a pre-norm residual. The release adds to the *normed* latents (`normed_residual`), so its queries
    may start at 0.02. Ours start at unit variance: the first attention output is nearly the same for all
    queries and would dominate small ones, so that all queries would collapse into one. CHOICE: points are
    normalised once, by norm_ctx; the release normalises them again in each layer (`norm_media`)."""

    def __init__(self, cfg, attention=CrossAttention):
        super().__init__()
        self.normed_residual = cfg.normed_residual
        self.recompute = cfg.recompute
        self.norm_ctx = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.norm_lat = nn.LayerNorm(cfg.dim, eps=1e-6)         # one for all layers, as in the release
        self.layers = nn.ModuleList()
        for _ in range(cfg.depth):
            self.layers.append(nn.ModuleList([attention(cfg), GatedMLP(cfg.dim)]))

    def forward(self, latents, points, ids=None):
        points = self.norm_ctx(points)
        for attention, mlp in self.layers:
            x = self.norm_lat(latents)
            y = recomputed(self.recompute, attention, x, points, ids)
            latents = y + (x if self.normed_residual else latents)
            latents = latents + mlp(latents)
        return latents


# -----------------------------------------------------------------------------------------------------------
# The segmenter
# -----------------------------------------------------------------------------------------------------------

def waves(angles):
    """Sines and cosines: (..., f) -> (..., 2 f)."""
    return torch.cat((angles.sin(), angles.cos()), -1)


def fourier_codes(features, dim):
    """Rows of f sines and cosines (s, f) -> start vectors (s, dim), by a random orthonormal map, which keeps
    the angles between rows if f <= dim. Their norm is then 1."""
    width = max(features.shape[1], dim)
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    return F.normalize(features, dim=-1) @ basis[:features.shape[1], :dim]


def query_codes(count, dim):
    """Start of the K learned queries, (K, dim) of unit variance: Fourier features of the cells of a square
    grid, as in the release. Neighbours on the grid get similar codes, but no two get the same one: queries
    that start alike would learn alike."""
    side = math.ceil(math.sqrt(count))
    line = torch.linspace(-1, 1, side + 1)[:-1]
    grid = torch.cartesian_prod(line, line)[:count]             # (K, 2)
    # a line of `side` cells can hold no higher frequency
    highest = max(math.isqrt(count) // 2, 1)
    frequencies = math.pi * torch.arange(1, highest + 1)
    angles = grid[:, :, None] * frequencies                     # (K, 2, highest)
    codes = fourier_codes(waves(angles.flatten(1)), dim)        # (K, dim), norm 1
    # a little noise, as in the release
    return math.sqrt(dim) * (codes + 1e-3 * torch.randn_like(codes))


class Segmentation(NamedTuple):
    """The segmenter's output for b clips."""
    features: torch.Tensor | None   # F (b, n, d); None where only masks are needed
    logits: torch.Tensor            # (b, n, K); M_soft = softmax over the last axis, the queries
    ids: torch.Tensor               # int64 (b, n): M_hard, the trajectory of each point
    alive: torch.Tensor             # bool (b, K), True = owns at least one point
    grid: tuple                     # (t, h, w)

    def masks(self, size):
        """Trajectory of each pixel, int64 (b, t, H, W) for size = (H, W). Logits are interpolated before the
        argmax, so that borders are smooth. An argmax first would give borders along the grid's cells."""
        t, h, w = self.grid
        logits = rearrange(self.logits.float(), "b (t h w) k -> (b t) k h w", t=t, h=h)
        # one frame at a time: its K maps (H, W) are large
        ids = [F.interpolate(frame, size=size, mode="bilinear").argmax(1) for frame in logits.split(1)]
        return rearrange(torch.cat(ids), "(b t) h w -> b t h w", t=t)


def mask_head(dim):
    """A small MLP: queries or points (..., d) -> (..., d / 8), where the two are compared."""
    hidden = dim // 4
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim // 8))


def assign(logits, grid, features=None):
    """Give each point to the query with the largest logit: logits (b, n, K) -> Segmentation."""
    ids = logits.argmax(-1)                                     # each point has exactly one owner
    alive = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter(1, ids, True)
    return Segmentation(features, logits, ids, alive, grid)


class Features(nn.Module):
    """The dense features F of a clip: the maps of a backbone at several scales, in one width, summed."""

    def __init__(self, cfg, backbone=None):
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone or ConvNeXt(cfg.depths, cfg.dims, cfg.recompute)
        # PAPER: multi-scale features. The ablation (hierarchical = False) uses the finest map alone.
        used = self.backbone.dims if cfg.hierarchical else self.backbone.dims[:1]
        self.proj = nn.ModuleList(nn.Conv2d(channels, cfg.dim, 1) for channels in used)
        self.ln = ChannelNorm(cfg.dim)                          # one for all scales, as in the release

    def extract(self, x):
        """x (b, t, 3, H, W), normalised -> F = sum over scales of upsample(LN(proj(map)))  (b, n, d), and the
        grid (t, h, w)."""
        t = x.shape[1]
        maps = self.backbone(rearrange(x, "b t c h w -> (b t) c h w"))
        h, w = maps[0].shape[-2:]
        features = 0
        for fmap, proj in zip(maps, self.proj):
            y = recomputed(self.cfg.recompute, nn.Sequential(proj, self.ln), fmap)
            features = features + F.interpolate(y, size=(h, w), mode="bilinear")
        return rearrange(features, "(b t) d h w -> b (t h w) d", t=t), (t, h, w)


class Segmenter(Features):
    """cfg: a trajtok.TrajTokConfig. forward(video uint8 (b, t, H, W, 3)) -> Segmentation."""

    def __init__(self, cfg, backbone=None):
        super().__init__(cfg, backbone)
        self.latents = nn.Parameter(query_codes(cfg.num_queries, cfg.dim))
        self.perceiver = Perceiver(cfg)
        self.traj_seg_head = mask_head(cfg.dim)
        self.patch_decoder = mask_head(cfg.dim)
        # scale = softplus(log_scale) + 1. The name is the release's, although it is no logarithm. It starts
        # where the scale is cfg.scale, so at the inverse of that function
        inverse = math.log(math.expm1(cfg.scale - 1))
        self.log_scale = nn.Parameter(torch.tensor([inverse]))

    def forward(self, video):
        return self.segment(normalise(video))

    def segment(self, x):
        """x (b, t, 3, H, W), normalised and of any size -> Segmentation."""
        features, grid = self.extract(x)
        queries = self.cluster(features)
        return assign(self.mask_logits(queries, features), grid, features)

    def cluster(self, features):
        """The queries Q read the points (b, n, d) -> (b, K, d)."""
        # PAPER: no gradient flows from the Perceiver into F. Otherwise F follows the queries while the
        # queries follow F, and both drift (the paper's VEQ falls from 42.3 to 34.1). F still learns from the
        # mask logits and from the encoder.
        points = features.detach() if self.cfg.detach else features
        queries = self.latents.expand(len(features), -1, -1)
        return self.perceiver(queries, points)

    def mask_logits(self, queries, features):
        """Queries (b, K, d), features (b, n, d) -> logits (b, n, K) = scale · cosine(head(Q), head(F)).

        CHOICE: the release's scaled cosine in place of the paper's dot product. The scale decides how soft
        the masks are. At the release's 3.8, a query that fits a point perfectly, cosine 1, gets only 26 % of
        it if the other 127 have cosine 0. Ours starts at cfg.scale."""
        q = F.normalize(self.traj_seg_head(queries).float(), dim=-1)
        p = F.normalize(self.patch_decoder(features).float(), dim=-1)
        scale = (F.softplus(self.log_scale.float()) + 1).clamp(max=20.0)
        return torch.einsum("bnd,bkd->bnk", p, scale * q)


# -----------------------------------------------------------------------------------------------------------
# Matching: which query stands for which label
# -----------------------------------------------------------------------------------------------------------

def hungarian(cost):
    """Cheapest one-to-one assignment for cost (r, c), by shortest augmenting paths (Jonker and Volgenant
    1987). -> rows, columns: min(r, c) pairs, like scipy.optimize.linear_sum_assignment."""
    r, c = cost.shape
    # where there are more rows than columns, further columns of cost 0 take the rows that are left
    width = max(r, c)
    cost = np.pad(cost, ((0, 0), (0, width - c)))
    # u and v are prices of rows and columns: cost - u - v is >= 0 everywhere and 0 on assigned pairs. Rows
    # and columns count from 1: row 0 stands for "none", and column 0 holds the row that is to be assigned.
    u, v = np.zeros(r + 1), np.zeros(width + 1)
    owner = np.zeros(width + 1, int)                            # the row that holds each column; 0 = none
    for row in range(1, r + 1):
        # Dijkstra's algorithm from this row, along the reduced costs, to the nearest free column
        owner[0], column = row, 0
        distance = np.full(width + 1, np.inf)
        before = np.zeros(width + 1, int)
        done = np.zeros(width + 1, bool)
        while owner[column]:
            done[column] = True
            holder = owner[column]
            reduced = cost[holder - 1] - u[holder] - v[1:]
            better = ~done[1:] & (reduced < distance[1:])
            distance[1:][better] = reduced[better]
            before[1:][better] = column
            column = np.where(done, np.inf, distance)[1:].argmin() + 1
            # with the new prices the way to this column costs 0
            step = distance[column]
            u[owner[done]] += step
            v[done] -= step
            distance[~done] -= step
        # along the path back to column 0, each column is given the owner of the column before it
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    columns = np.flatnonzero(owner[1:c + 1])
    rows = owner[1:][columns] - 1
    order = rows.argsort()
    return rows[order], columns[order]


def one_hot(labels, count):
    """int64 (...) -> float (..., count); an unlabelled point (-1) becomes a row of zeros."""
    return F.one_hot(labels + 1, count + 1)[..., 1:].float()


def pair_iou(gt, pred):
    """IoU of each label with each query's mask: gt (b, n, l) one-hot, pred (b, n, k) in [0, 1] -> (b, l,
    k)."""
    inter = torch.einsum("bnl,bnk->blk", gt, pred)
    areas = gt.sum(1)[:, :, None] + pred.sum(1)[:, None]
    return inter / (areas - inter).clamp(min=1)


@torch.no_grad()
def match(logits, labels):
    """logits (b, n, k), labels int64 (b, n), each < k, -1 = unlabelled -> permutation int64 (b, k): [i, l] is
    the query of label l in clip i.

    PAPER: Hungarian on -IoU of the argmax masks. Labels that do not occur get the queries that are left.
    DEVIATION: the IoU of the soft masks is added. Early on most queries win no point, their argmax IoU is 0
    with every label, and the order of the columns would decide which of them a label gets."""
    b, _, k = logits.shape
    soft = logits.float().softmax(-1)                           # over the queries
    hard = one_hot(logits.argmax(-1), k)
    gt = one_hot(labels, int(labels.max()) + 1)                 # (b, n, l)
    iou = pair_iou(gt, hard) + pair_iou(gt, soft)               # (b, l, k)
    # NaN logits get this far; the loss is then NaN, and check_finite (trajtok.py) reports it
    iou = iou.nan_to_num().cpu().numpy()
    present = gt.any(1).cpu().numpy()                           # (b, l)
    order = np.zeros((b, k), int)
    for i in range(b):
        occurs = np.flatnonzero(present[i])
        _, queries = hungarian(-iou[i, occurs])
        order[i, occurs] = queries
        absent = np.setdiff1d(np.arange(k), occurs)
        order[i, absent] = np.setdiff1d(np.arange(k), queries)
    return torch.from_numpy(order).to(logits.device)


# -----------------------------------------------------------------------------------------------------------
# Losses: means within each clip, then over clips, so that the mean over micro-batches is that of the batch
# -----------------------------------------------------------------------------------------------------------

def dice_loss(logits, labels):
    """1 - 2 |P ∩ G| / (|P| + |G|), P = soft mask, G = label: mean over the labels of a clip, then over clips.
    Scalar. logits (b, n, k) with column l = label l; labels (b, n), -1 = unlabelled. A clip without labels
    counts as 0.

    PAPER: Dice makes the segmenter find every region, small ones too. CHOICE: a region belongs to one clip;
    the release pools label l of all clips of a batch. CHOICE: |P| counts unlabelled points too. They are not
    part of a labelled trajectory; without them, one query that claims every point would have no loss on a
    clip with a single labelled object."""
    p = logits.float().softmax(-1)                              # over the queries, which share each point
    gt = one_hot(labels, logits.shape[-1])
    inter = (p * gt).sum(1)                                     # (b, k)
    areas = p.sum(1) + gt.sum(1)
    dice = 1 - (2 * inter + 1e-6) / (areas + 1e-6)
    occurs = gt.any(1).float()
    clip = (dice * occurs).sum(1) / occurs.sum(1).clamp(min=1)               # (b,)
    return clip.mean()


def focal_loss(logits, labels):
    """-(1 - p)² log p, p = M_soft of the labelled query (arXiv 1708.02002): mean over labelled points, then
    over clips. Scalar; arguments as for dice_loss. Points that are already right weigh little, so that small
    things count beside large ones. With flat masks p is 1/k and the loss (1 - 1/k)² ln k; matching and a
    scale of 10 make it smaller from the start."""
    known = labels >= 0
    target = labels.clamp(min=0)[..., None]
    log_soft = logits.float().log_softmax(-1)                   # over the queries
    log_p = log_soft.gather(-1, target)[..., 0]                 # (b, n)
    loss = -(1 - log_p.exp()) ** 2 * log_p * known
    clip = loss.sum(1) / known.sum(1).clamp(min=1)
    return clip.mean()


def labels_on_grid(labels, grid, k):
    """Pixel labels (b, t, H, W) -> point labels (b, n): the pixel in the middle of each cell. If a
    label is k or more, those of every clip are numbered anew, by size, and from k on they become unlabelled
    (-1)."""
    points = F.interpolate(labels.float(), size=grid[1:], mode="nearest-exact")
    points = points.long().flatten(1)
    if points.max() >= k:
        for clip in points:                                     # (n,), a view: changed in place
            known = clip >= 0
            area = clip[known].bincount()
            by_size = area.argsort(descending=True, stable=True)
            rank = by_size.argsort()                            # of each label: 0 = the largest
            clip[known] = rank[clip[known]]
        points = points.masked_fill(points >= k, -1)
    return points


def segmentation_loss(seg, labels):
    """Segmentation, pixel labels (b, t, H, W) -> focal, dice: scalars with gradient. PAPER: no
    cross-entropy."""
    points = labels_on_grid(labels, seg.grid, seg.logits.shape[-1])
    order = match(seg.logits, points)                           # (b, k): the query of each label
    order = order[:, None].expand_as(seg.logits)
    logits = seg.logits.gather(-1, order)                       # column l = label l
    return focal_loss(logits, points), dice_loss(logits, points)


# -----------------------------------------------------------------------------------------------------------
# Metrics of tubes. A tube is the mask of one trajectory or label over (t, h, w)
# -----------------------------------------------------------------------------------------------------------

def tube_overlaps(pred, gt):
    """One clip: pred >= 0 and gt, -1 = unlabelled, int64 of one shape -> intersections and unions (labels,
    tubes), in points or pixels. A predicted tube's area counts unlabelled points too, as in dice_loss."""
    tubes = int(pred.max()) + 1
    rows = int(gt.max()) + 2                                    # row 0 holds the unlabelled points
    # a table of how many points have this label and lie in this tube
    cell = (gt + 1) * tubes + pred
    table = torch.bincount(cell.flatten(), minlength=rows * tubes).view(rows, tubes)
    inter = table[1:]
    areas = inter.sum(1, keepdim=True) + table.sum(0)
    return inter, areas - inter


def video_metrics(pred, gt):
    """Video entity quality and segmentation-and-tracking quality of tubes; pred, gt int64 (b, ...), gt -1 =
    unlabelled. -> dict(veq, sq, rq, stq, aq), each in [0, 1], a mean over the clips. Tubes and labels are
    paired one to one; a pair with IoU >= 0.5 is a match, a true positive (TP):

      sq  mean IoU of the matches      rq  TP / (TP + FP/2 + FN/2)     veq = sq · rq
      aq  sum of the matches' intersections / sum of their unions      stq = sqrt(sq · aq)

    CHOICE: a tube on unlabelled pixels alone is no false positive: nothing is known there."""
    clips = []
    for one_pred, one_gt in zip(pred.cpu(), gt.cpu()):
        inter, union = tube_overlaps(one_pred, one_gt)
        iou = inter / union.clamp(min=1)
        rows, columns = hungarian(-iou.double().numpy())
        good = (iou[rows, columns] >= 0.5).numpy()              # True = a match
        matches = rows[good], columns[good]
        tp = int(good.sum())
        # tubes on labelled points are TP + FP, labels that occur TP + FN: rq = 2 TP / (tubes + labels)
        tubes = int(inter.any(0).sum())
        labels = int(inter.any(1).sum())
        sq = iou[matches].sum() / max(tp, 1)
        rq = 2 * tp / max(tubes + labels, 1)
        aq = inter[matches].sum() / union[matches].sum().clamp(min=1)
        stq = (sq * aq).sqrt()
        clips.append((sq * rq, sq, rq, stq, aq))
    mean = torch.tensor(clips).mean(0).tolist()
    return dict(zip(("veq", "sq", "rq", "stq", "aq"), mean))
