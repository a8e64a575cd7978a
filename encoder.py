"""The trajectory encoder: from the segmenter's masks to 1, 2 or 4 tokens for each trajectory.

Paper, "Key Designs" 2:

    features F (b, n, d), Segmentation (segmenter.py)
      -> z_init = mean of F under M_soft, which carries gradient into the masks      (b, K, d)
      -> + learned codes, one for each of the m tokens of a trajectory               latents (b, K·m, d)
      -> Perceiver under M_hard: a token reads the points of its own trajectory      (b, K·m, d)
      -> linear                                                                      Tokens z (b, K·m, d')

Axes: b clip, n point, K trajectories (= the segmenter's queries), m tokens of each, a attention head, c its
channels. """
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from segmenter import CrossAttention, Perceiver, fourier_codes

# -----------------------------------------------------------------------------------------------------------
# Attention under the hard mask: the formula, and the same in time and memory O(n)
# -----------------------------------------------------------------------------------------------------------


def dense_trajectory_attention(q, k, v, ids, k_own, v_own):
    """PAPER: masked cross-attention. A token attends to its own trajectory's points and tokens only.

    q (b, K, m, a, c): the tokens' queries. k_own, v_own (b, K, j, a, c): keys and values of each trajectory's
    own tokens. k, v (b, n, a, c): those of the points; ids (b, n): the trajectory of each point, -1 = of
    none. -> (b, K, m, a, c). This is the formula. It holds a mask of K·m x n entries, of which one
    in K is True."""
    K, m = q.shape[1:3]
    j = k_own.shape[2]
    trajectory = torch.arange(K, device=q.device)
    mine = trajectory.repeat_interleave(m)[:, None]             # (K·m, 1): the trajectory of each token
    sees_tokens = mine == trajectory.repeat_interleave(j)       # (K·m, K·j), True = may read
    sees_points = mine == ids[:, None]                          # (b, K·m, n)
    sees_tokens = sees_tokens.expand(len(q), -1, -1)
    mask = torch.cat((sees_tokens, sees_points), 2)
    queries = q.flatten(1, 2)                                   # (b, K·m, a, c)
    keys = torch.cat((k_own.flatten(1, 2), k), 1)               # (b, K·j + n, a, c)
    values = torch.cat((v_own.flatten(1, 2), v), 1)
    # PyTorch wants heads before positions. Softmax over what a token may read.
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])
    return out.transpose(1, 2).unflatten(1, (K, m))


def trajectory_attention(q, k, v, ids, k_own, v_own):
    """The same values and gradients as dense_trajectory_attention, without its mask.

    Every point belongs to exactly one trajectory, so for the i-th tokens of all trajectories it has exactly
    one reader: n scores a head instead of K·n, and a softmax over segments of points."""
    b, K, m, a, c = q.shape
    # clip and trajectory become one axis of b·K segments
    clip = torch.arange(b, device=ids.device)[:, None]
    segment = (ids.clamp(min=0) + K * clip).flatten()           # (b·n,)
    unowned = (ids < 0).flatten()[:, None]                      # True = a point that no token reads
    q = q.flatten(0, 1) * c ** -0.5                             # (b·K, m, a, c)
    k_own, v_own = k_own.flatten(0, 1), v_own.flatten(0, 1)     # (b·K, j, a, c)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                     # (b·n, a, c)
    out = []
    for i in range(m):                                          # the i-th token of every trajectory
        reader = q[:, i]                                        # (b·K, a, c)
        s = (reader[segment] * k).sum(-1)                       # (b·n, a)
        s = s.masked_fill(unowned, -math.inf)
        s_own = (reader[:, None] * k_own).sum(-1)               # (b·K, j, a)
        # the softmax runs over a segment's points and its tokens together; scores are shifted by the
        # segment's largest, or exp would overflow. A shift does not change a softmax: it needs no gradient.
        top = s_own.detach().amax(1)                            # (b·K, a)
        index = segment[:, None].expand(-1, a)
        top = top.scatter_reduce(0, index, s.detach(), "amax")
        w = (s - top[segment]).exp()
        w_own = (s_own - top[:, None]).exp()
        norm = w_own.sum(1).index_add(0, segment, w)            # (b·K, a)
        total = (w_own[..., None] * v_own).sum(1)
        total = total.index_add(0, segment, w[..., None] * v)   # (b·K, a, c)
        out.append(total / norm[..., None])
    return torch.stack(out, 1).unflatten(0, (b, K))


class TrajectoryAttention(CrossAttention):
    """CrossAttention under the hard mask: latents (b, K·m, d), points (b, n, d), ids (b, n) -> (b, K·m, d)"""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.num_queries, self.last_points = cfg.num_queries, cfg.last_points

    def forward(self, latents, points, ids):
        K, last = self.num_queries, self.last_points
        q, k_own, v_own, k, v = self.project(latents, points, latents.shape[1])
        q, k_own, v_own = (x.unflatten(1, (K, -1)) for x in (q, k_own, v_own))
        if last:
            # the authors' checkpoints were trained with the clip's last two points visible to every token
            k_last = repeat(k[:, -last:], "b j a c -> b k j a c", k=K)
            v_last = repeat(v[:, -last:], "b j a c -> b k j a c", k=K)
            k_own = torch.cat((k_own, k_last), 2)
            v_own = torch.cat((v_own, v_last), 2)
            k, v, ids = k[:, :-last], v[:, :-last], ids[:, :-last]
        # float32, also under autocast: weights of thousands of points are summed
        y = trajectory_attention(q.float(), k.float(), v.float(), ids, k_own.float(), v_own.float())
        return self.to_out(rearrange(y, "b k m a c -> b (k m) (a c)"))


# -----------------------------------------------------------------------------------------------------------
# Two small extensions of ours: where and when a thing was, and how it moved
# -----------------------------------------------------------------------------------------------------------

class Places(nn.Module):
    """Fourier codes of each point's time, row and column, added to features: grid (t, h, w) -> (n, dim).

    DEVIATION: in the paper positions are rotary, in the keys alone. They decide what a token reads and are
    not read themselves, so a token, a mean of values, hardly knows where its thing was."""
    # codes are then two to three times as large as a feature at nano; fainter ones are learnt far more slowly
    gain = 6.0

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(24, dim, bias=False)
        nn.init.uniform_(self.linear.weight, -8 ** -0.5, 8 ** -0.5)

    def forward(self, grid, first=0, frames=None):
        """The frames first, first + 1, ... of a clip of `frames` (a long video comes in chunks)."""
        t, h, w = grid
        device = self.linear.weight.device
        time = (first + torch.arange(t, device=device) + 0.5) / (frames or t)
        row = (torch.arange(h, device=device) + 0.5) / h
        column = (torch.arange(w, device=device) + 0.5) / w
        place = torch.cartesian_prod(time, row, column)         # (n, 3), each in (0, 1)
        angle = math.pi * place[..., None] * 2 ** torch.arange(4, device=device)
        waves = torch.cat((angle.sin(), angle.cos()), -1)       # (n, 3, 8)
        return self.gain * self.linear(waves.flatten(1))


class Path(nn.Module):
    """Where each trajectory's soft mask is, how large and how spread, at eight moments of the clip -> (b, K,
    dim).

    DEVIATION: added to z_init. Attention normalises its weights, so without it a token knows neither how many
    points its thing has nor how they move. Differentiable through M_soft: the task's loss also moves the
    masks."""
    moments, gain = 8, 4.0

    def __init__(self, dim):
        super().__init__()
        first = nn.Linear(6 * self.moments, dim)
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Linear(dim, dim))

    @staticmethod
    def sums(soft, grid):
        """M_soft (b, n, K) -> (b, t, K, 6): in each frame the mean over its points of 1, x, y, x², y², xy."""
        t, h, w = grid
        place = torch.cartesian_prod(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w))
        y, x = place.to(soft.device).unbind(-1)                 # (h·w,)
        frames = soft.float().unflatten(1, (t, h * w))
        # products and means, no matrix product: autocast would round it to bfloat16, and x² - x x is small
        moments = []
        for term in (torch.ones_like(x), x, y, x * x, y * y, x * y):
            moments.append((frames * term[:, None]).mean(2))    # (b, t, K)
        return torch.stack(moments, -1)

    def forward(self, sums):                                    # (b, t, K, 6)
        area = sums[..., :1]
        x, y, xx, yy, xy = (sums[..., 1:] / (area + 1e-4)).unbind(-1)
        side = area[..., 0].clamp(min=1e-8).sqrt()
        centre = torch.stack((x, y), -1)
        spread = torch.stack((xx - x * x, yy - y * y, xy - x * y), -1)
        # the factors bring all six to about the same size
        track = torch.cat((2 * centre, 4 * side[..., None], 8 * spread), -1)
        b = len(track)
        track = rearrange(track, "b t k c -> (b k) c t")
        track = F.interpolate(track, size=self.moments, mode="linear", align_corners=True)
        return self.gain * self.mlp(rearrange(track, "(b k) c s -> b k (c s)", b=b))


# -----------------------------------------------------------------------------------------------------------
# The encoder
# -----------------------------------------------------------------------------------------------------------

class Tokens(NamedTuple):
    """M = K·m tokens of b clips."""
    z: torch.Tensor                 # (b, M, d')
    mask: torch.Tensor              # bool (b, M), True = a real token: its trajectory owns at least one point
    trajectory: torch.Tensor        # int64 (b, M): the trajectory that it belongs to


def ring_codes(count, dim):
    """Start of the m codes of a trajectory, (m, dim): Fourier features of points on a ring, evenly spaced.
    PAPER: Fourier codes encourage the tokens of one trajectory to differ."""
    angle = 2 * math.pi * torch.arange(count) / count
    angles = torch.stack((angle, 2 * angle), -1)                # frequencies 1 and 2
    waves = torch.cat((angles.sin(), angles.cos()), -1)
    # CHOICE: half the variance of a feature. At the release's 0.02 the tokens hardly differ beside z_init.
    return math.sqrt(dim / 2) * fourier_codes(waves, dim)


def soft_sums(soft, points):
    """M_soft (b, n, K), points (b, n, d) -> sum_p M_soft[p, k] F_p (b, K, d) and sum_p M_soft[p, k] (b, K,
    1)."""
    total = soft.to(points.dtype).transpose(1, 2) @ points
    return total.float(), soft.float().sum(1)[..., None]


class TrajectoryEncoder(nn.Module):
    """cfg: a trajtok.TrajTokConfig. Features (b, n, d) and their Segmentation -> Tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        codes = ring_codes(cfg.max_tokens, cfg.dim)
        self.latents = nn.Parameter(repeat(codes, "m d -> k m d", k=cfg.num_queries).clone())
        # PAPER: hard masks keep trajectories apart. Ablation (hard_mask = False): every token reads every
        # point.
        self.perceiver = Perceiver(cfg, TrajectoryAttention if cfg.hard_mask else CrossAttention)
        self.output_projector = nn.Linear(cfg.dim, cfg.out_dim)
        self.places = Places(cfg.dim) if cfg.places else None
        self.path = Path(cfg.dim) if cfg.path else None

    def forward(self, features, seg, tokens_per_trajectory=1):
        points = self.add_places(features, seg.grid)
        # softmax over the queries: each point spreads one unit over the trajectories. Soft, because an argmax
        # has no gradient: here the gradient of the task's loss enters the masks.
        soft = seg.logits.softmax(-1)
        path = Path.sums(soft, seg.grid) if self.path else None
        latents = self.start(*soft_sums(soft, points), path, tokens_per_trajectory)
        z = self.perceiver(latents, points, seg.ids)
        return self.finish(z, seg.alive)

    def add_places(self, features, grid, first=0, frames=None):
        if self.places is None:
            return features
        codes = self.cfg.position_scale * self.places(grid, first, frames)
        return features + codes.to(features.dtype)

    def start(self, total, weight, path, m):
        """Latents (b, K·m, d) = code + z_init, z_init_k = sum_p M_soft[p, k] F_p / sum_p M_soft[p, k]."""
        assert m in self.cfg.choices, f"tokens_per_trajectory {m}: one of {self.cfg.choices}"
        z = total / (weight + 1e-6)                             # (b, K, d)
        if self.path is not None:
            z = z + self.path(path)
        # ablation (mean_start = False): a token starts at its learned code alone
        z = z if self.cfg.mean_start else torch.zeros_like(z)
        return rearrange(z[:, :, None] + self.latents[:, :m], "b k m d -> b (k m) d")

    def finish(self, z, alive):
        """Latents (b, K·m, d), alive (b, K) -> Tokens."""
        K = alive.shape[1]
        m = z.shape[1] // K
        mask = alive.repeat_interleave(m, 1)
        trajectory = torch.arange(K, device=z.device).repeat_interleave(m)
        return Tokens(self.output_projector(z), mask, trajectory.expand(len(z), -1))


def compact(tokens):
    """Real tokens first, and no longer than the clip that has most of them: what follows need not carry dead
    ones."""
    most = int(tokens.mask.sum(1).max())
    order = (~tokens.mask).int().argsort(dim=1, stable=True)[:, :most]
    clip = torch.arange(len(order), device=order.device)[:, None]
    return Tokens(*(x[clip, order] for x in tokens))
