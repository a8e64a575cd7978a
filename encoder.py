"""The trajectory encoder: from the segmenter's masks to 1, 2 or 4 tokens for each trajectory.

Paper, "Key Designs" 2:

    features F (b, n, d), Segmentation (segmenter.py)
      -> z_init = mean of F under M_soft, which carries gradient into the masks      (b, K, d)
      -> + learned codes, one for each of the m tokens of a trajectory               latents (b, K·m, d)
      -> Perceiver under M_hard: a token reads the points of its own trajectory      (b, K·m, d)
      -> linear                                                                      Tokens z (b, K·m, d')

Axes: b = clip, n = point, K = trajectories (the segmenter's queries), m = tokens of each, M = K·m, d = width
inside, d' = width of a token, a = attention head, c = its channels, t = frame, h w = feature grid."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from segmenter import CrossAttention, Perceiver, fourier_codes, waves

# -----------------------------------------------------------------------------------------------------------
# Attention under the hard mask: the formula, and the same in time and memory O(n)
# -----------------------------------------------------------------------------------------------------------


def dense_trajectory_attention(q, k, v, ids, k_own, v_own):
    """The plain formula, for the reader and the tests; the model uses trajectory_attention below. PAPER:
    masked cross-attention. A token attends to its own trajectory's points and tokens only.

    q (b, K, m, a, c): the tokens' queries. k_own, v_own (b, K, j, a, c): keys and values of each trajectory's
    own tokens, j = m, or more with cfg.last_points. k, v (b, n, a, c): those of the points. ids (b, n): the
    trajectory of each point. -> (b, K, m, a, c). The mask has K·m x n entries for the points, of which one in
    K is True."""
    b, K, m = q.shape[:3]
    trajectory = torch.arange(K, device=q.device)
    reader = trajectory.repeat_interleave(m)                    # (K·m,): the trajectory of each query
    own = trajectory.repeat_interleave(k_own.shape[2])          # (K·j,): that of each token's key
    owner = torch.cat((own.expand(b, -1), ids), 1)              # (b, K·j + n): the trajectory of each key
    mask = reader[:, None] == owner[:, None]                    # (b, K·m, K·j + n), True = may be read
    keys = torch.cat((k_own.flatten(1, 2), k), 1)               # (b, K·j + n, a, c)
    values = torch.cat((v_own.flatten(1, 2), v), 1)             # (b, K·j + n, a, c)
    queries = rearrange(q, "b K m a c -> b a (K m) c")          # PyTorch wants heads before positions
    keys = keys.transpose(1, 2)
    values = values.transpose(1, 2)
    # softmax over what a token may read
    out = F.scaled_dot_product_attention(queries, keys, values, mask[:, None])
    return rearrange(out, "b a (K m) c -> b K m a c", m=m)


def trajectory_attention(q, k, v, ids, k_own, v_own):
    """The same values and gradients as dense_trajectory_attention, without its mask.

    Every point belongs to exactly one trajectory. So, of the i-th tokens of all trajectories, exactly one
    reads it: there are n scores a head instead of K·n, and each softmax runs over a segment, the points and
    tokens of one trajectory."""
    b, K, m, a, c = q.shape
    # clip and trajectory become one axis of b·K segments
    clip = torch.arange(b, device=ids.device)
    segment = (ids + K * clip[:, None]).flatten()               # (b·n,)
    q = q.flatten(0, 1) * c ** -0.5                             # (b·K, m, a, c)
    k_own = k_own.flatten(0, 1)                                 # (b·K, j, a, c)
    v_own = v_own.flatten(0, 1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                     # (b·n, a, c)
    out = []
    for i in range(m):                                          # the i-th token of every trajectory
        q_i = q[:, i]                                           # (b·K, a, c)
        s = (q_i[segment] * k).sum(-1)                          # (b·n, a): scores of the points
        s_own = (q_i[:, None] * k_own).sum(-1)                  # (b·K, j, a): scores of the tokens
        # the softmax runs over a segment's points and its tokens together. The segment's largest score is
        # subtracted, or exp would overflow. This does not change a softmax, so it needs no gradient.
        top = s_own.detach().amax(1)                            # (b·K, a)
        index = segment[:, None].expand(-1, a)
        top = top.scatter_reduce(0, index, s.detach(), "amax")
        w = (s - top[segment]).exp()
        w_own = (s_own - top[:, None]).exp()
        norm = w_own.sum(1).index_add(0, segment, w)            # (b·K, a)
        y = (w_own[..., None] * v_own).sum(1)
        y = y.index_add(0, segment, w[..., None] * v)           # (b·K, a, c)
        out.append(y / norm[..., None])
    return torch.stack(out, 1).unflatten(0, (b, K))             # (b, K, m, a, c)


class TrajectoryAttention(CrossAttention):
    """CrossAttention under the hard mask: latents (b, K·m, d), points (b, n, d), ids (b, n), the trajectory
    of each point -> (b, K·m, d)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.num_queries = cfg.num_queries
        self.last_points = cfg.last_points

    def forward(self, latents, points, ids):
        projected = self.project(latents, points, latents.shape[1])
        # float32, also under autocast, because weights of thousands of points are summed
        q, k_own, v_own, k, v = (x.float() for x in projected)
        per_trajectory = (self.num_queries, -1)
        q = q.unflatten(1, per_trajectory)                      # (b, K, m, a, c)
        k_own = k_own.unflatten(1, per_trajectory)
        v_own = v_own.unflatten(1, per_trajectory)
        if self.last_points:
            # The authors' checkpoints were trained with the clip's last two points visible to every token.
            # These points become keys of every trajectory's own, and are left out of the others.
            n = k.shape[1] - self.last_points
            k_own = self.with_last(k_own, k[:, n:])
            v_own = self.with_last(v_own, v[:, n:])
            k, v, ids = k[:, :n], v[:, :n], ids[:, :n]
        y = trajectory_attention(q, k, v, ids, k_own, v_own)
        return self.to_out(rearrange(y, "b k m a c -> b (k m) (a c)"))

    def with_last(self, own, last):
        """Append the keys or values of the last points (b, l, a, c) to those of each trajectory's tokens
        (b, K, m, a, c) -> (b, K, m + l, a, c)."""
        last = repeat(last, "b l a c -> b k l a c", k=self.num_queries)
        return torch.cat((own, last), 2)


# -----------------------------------------------------------------------------------------------------------
# Two small extensions of ours tell a token where and when its thing was, and how it moved
# -----------------------------------------------------------------------------------------------------------

def times_and_places(grid, device, first=0, frames=None):
    """Time, row and column of each point of a grid (t, h, w) -> (n, 3), each in (0, 1). A long video comes
    in chunks: the grid is then that of a chunk, which begins at frame `first` of a video of `frames`."""
    t, h, w = grid
    time = (first + torch.arange(t, device=device) + 0.5) / (frames or t)
    row = (torch.arange(h, device=device) + 0.5) / h
    column = (torch.arange(w, device=device) + 0.5) / w
    return torch.cartesian_prod(time, row, column)


class Places(nn.Module):
    """Fourier codes of each point's time, row and column, added to features: grid (t, h, w) -> (n, dim).

    DEVIATION: the paper has rotary positions alone. They change the attention weights, not the values. A
    token is an average of values, so it does not know where its thing was unless the features encode it."""
    # with this gain a code is about twice as large as a feature at nano; smaller ones are learned far more
    # slowly
    gain = 6.0

    def __init__(self, dim):
        super().__init__()
        # 3 coordinates x 4 frequencies x (sine, cosine)
        self.linear = nn.Linear(24, dim, bias=False)
        # weights of variance 1/24: a code has variance 1/2, as a sine has, before the gain
        nn.init.uniform_(self.linear.weight, -8 ** -0.5, 8 ** -0.5)

    def forward(self, grid, first=0, frames=None):
        device = self.linear.weight.device
        places = times_and_places(grid, device, first, frames)
        frequencies = math.pi * 2 ** torch.arange(4, device=device)
        angles = places[..., None] * frequencies                # (n, 3, 4)
        codes = waves(angles).flatten(1)                        # (n, 3 · 8)
        return self.gain * self.linear(codes)


class TrajectoryPath(nn.Module):
    """Where each trajectory's soft mask is, how large it is and how it is spread, at eight times of the clip:
    sums (b, t, K, 6) -> (b, K, dim).

    DEVIATION: this is added to z_init. Attention normalises its weights, so without this a token knows
    neither how many points its thing has nor how they move. The result is differentiable through M_soft: the
    loss of the task trains the masks in this way too."""
    times = 8
    gain = 4.0

    def __init__(self, dim):
        super().__init__()
        first = nn.Linear(6 * self.times, dim)
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Linear(dim, dim))

    @staticmethod
    def sums(soft, grid):
        """M_soft (b, n, K) -> (b, t, K, 6): in each frame, the means over all its points p of M_soft[p, k]
        times 1, x, y, x², y² and xy, where x and y are in [-1, 1]."""
        t, h, w = grid
        rows = torch.linspace(-1, 1, h)
        columns = torch.linspace(-1, 1, w)
        places = torch.cartesian_prod(rows, columns)
        y, x = places.to(soft.device).unbind(-1)                # (h·w,)
        frames = soft.float().unflatten(1, (t, h * w))
        terms = torch.ones_like(x), x, y, x * x, y * y, x * y
        # Means, not a matrix product: autocast would round that to bfloat16, and forward takes small
        # differences of these means
        return torch.stack([(frames * term[:, None]).mean(2) for term in terms], -1)

    def forward(self, sums):                                    # (b, t, K, 6)
        area = sums[..., 0]                                     # the mask's share of the frame
        means = sums[..., 1:] / (area[..., None] + 1e-4)
        x, y, xx, yy, xy = means.unbind(-1)                     # (b, t, K): means over the mask
        side = area.clamp(min=1e-8).sqrt()
        # the factors bring all six to about the same size
        place_and_size = 2 * x, 2 * y, 4 * side
        spread = 8 * (xx - x * x), 8 * (yy - y * y), 8 * (xy - x * y)
        track = torch.stack((*place_and_size, *spread), -1)     # (b, t, K, 6)
        b = len(track)
        track = rearrange(track, "b t k c -> (b k) c t")
        track = F.interpolate(track, size=self.times, mode="linear", align_corners=True)
        track = rearrange(track, "(b k) c s -> b k (c s)", b=b)              # s: the eight times
        return self.gain * self.mlp(track)


# -----------------------------------------------------------------------------------------------------------
# The encoder
# -----------------------------------------------------------------------------------------------------------

class Tokens(NamedTuple):
    """M = K·m tokens of b clips."""
    z: torch.Tensor                 # (b, M, d')
    mask: torch.Tensor              # bool (b, M), True = a real token: its trajectory owns at least one point
    trajectory: torch.Tensor        # int64 (b, M): the trajectory that each token belongs to


def ring_codes(count, dim):
    """Start of the codes of a trajectory, (count, dim): Fourier features of `count` angles, evenly spaced on
    a circle. PAPER: Fourier codes encourage the tokens of one trajectory to differ."""
    angle = 2 * math.pi * torch.arange(count) / count
    angles = torch.stack((angle, 2 * angle), -1)                # frequencies 1 and 2
    # CHOICE: the codes start at variance 1/2, and the features at about 4. At the release's deviation of 0.02
    # the tokens of a trajectory would hardly differ, as all of them start with its z_init.
    return math.sqrt(dim / 2) * fourier_codes(waves(angles), dim)


def soft_sums(soft, points):
    """M_soft (b, n, K), points F (b, n, d) -> numerator and denominator of z_init, which is their quotient:
    sum_p M_soft[p, k] F_p  (b, K, d), and sum_p M_soft[p, k]  (b, K, 1)."""
    total = soft.to(points.dtype).mT @ points
    weight = soft.float().sum(1)
    return total.float(), weight[..., None]


class TrajectoryEncoder(nn.Module):
    """cfg: a trajtok.TrajTokConfig. forward(features (b, n, d), their Segmentation, m) -> Tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # a code for each token of each trajectory, (K, max_tokens, d); every trajectory starts with the same
        codes = ring_codes(cfg.max_tokens, cfg.dim)
        self.latents = nn.Parameter(repeat(codes, "m d -> k m d", k=cfg.num_queries).clone())
        # PAPER: hard masks keep trajectories apart. Ablation (hard_mask = False): every token reads every
        # point.
        self.perceiver = Perceiver(cfg, TrajectoryAttention if cfg.hard_mask else CrossAttention)
        self.output_projector = nn.Linear(cfg.dim, cfg.out_dim)
        self.places = Places(cfg.dim) if cfg.places else None
        self.path = TrajectoryPath(cfg.dim) if cfg.path else None

    def forward(self, features, seg, tokens_per_trajectory=1):
        points = self.add_places(features, seg.grid)
        # softmax over the queries: each point divides a weight of 1 among the trajectories. z_init needs soft
        # masks, as an argmax has no gradient: here the gradient of the task's loss enters the masks.
        soft = seg.logits.softmax(-1)
        path = TrajectoryPath.sums(soft, seg.grid) if self.path else None
        latents = self.start(*soft_sums(soft, points), path, tokens_per_trajectory)
        z = self.perceiver(latents, points, seg.ids)
        # (TrajTok.stream and draw_stages, trajtok.py, go through these lines one by one)
        return self.finish(z, seg.alive)

    def add_places(self, features, grid, first=0, frames=None):
        """Features (b, n, d) of a grid, with the codes of Places added if cfg.places."""
        if self.places is None:
            return features
        codes = self.cfg.position_scale * self.places(grid, first, frames)
        return features + codes.to(features.dtype)

    def start(self, total, weight, path, m):
        """Where the tokens start, latents (b, K·m, d) = code + z_init:

          z_init_k = sum_p M_soft[p, k] F_p / sum_p M_soft[p, k]

        total, weight: these two sums, as soft_sums gives them. path: TrajectoryPath.sums, used with cfg.path
        alone. m: how many tokens a trajectory has."""
        assert m in self.cfg.choices, f"tokens_per_trajectory {m}: one of {self.cfg.choices}"
        z = total / (weight + 1e-6)                             # (b, K, d)
        if self.path is not None:
            z = z + self.path(path)
        # ablation (mean_start = False): a token starts at its learned code alone
        z = z if self.cfg.mean_start else torch.zeros_like(z)
        latents = z[:, :, None] + self.latents[:, :m]           # (b, K, m, d)
        return latents.flatten(1, 2)

    def finish(self, z, alive):
        """What the Perceiver made of the latents, (b, K·m, d), and alive (b, K) -> Tokens."""
        K = alive.shape[1]
        m = z.shape[1] // K
        trajectory = torch.arange(K, device=z.device).expand_as(alive)
        trajectory = trajectory.repeat_interleave(m, 1)
        mask = alive.repeat_interleave(m, 1)
        return Tokens(self.output_projector(z), mask, trajectory)


def compact(tokens):
    """Move the real tokens of each clip to the front, in their order, and cut all clips at the largest number
    of real tokens: (b, M, ...) -> (b, most, ...). What follows then need not compute with dead tokens."""
    most = int(tokens.mask.sum(1).max())
    dead = (~tokens.mask).int()
    order = dead.argsort(dim=1, stable=True)[:, :most]
    clip = torch.arange(len(order), device=order.device)[:, None]
    return Tokens(*(x[clip, order] for x in tokens))
