"""The trajectory encoder: the points of each trajectory become 1, 2 or 4 tokens.

Paper, "Key Designs" 2; exact shapes of the release: SPECS 1 ("SegmentTokenizer").

    features F (b, n, d), logits (b, n, K)                               from the segmenter
      -> z_init_k = sum_p M_soft[p, k] F_p / sum_p M_soft[p, k]          soft: the gradient's way into the masks
      -> + learned codes, m of them for each trajectory (m = 1, 2, 4)    what tells the m tokens of one trajectory apart
      -> Perceiver: a token reads the points that its trajectory owns (M_hard), and the tokens beside it
      -> Tokens z (b, K·m, d'), mask: True = its trajectory is alive,    trajectory: which one each token belongs to

The hard mask gives every point exactly one reader. So attention under it is a softmax over segments, and costs O(n)
scores instead of the O(K·n) of a dense masked matrix. Points are put in order of their trajectory, in blocks of one owner
(`arrange`); then all is small dense products, block by block (`trajectory_attention`).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from data import BadInput
from segmenter import CrossAttention, Partial, Perceiver, fourier_codes, join, partial, rotary_table, rotate

# ---------------------------------------------------------------------------------------------------------------------
# Attention in which each point has one reader
# ---------------------------------------------------------------------------------------------------------------------

def block_size(n, K):
    """Points a block: a power of two, about a quarter of a trajectory's mean n / K, within 32 .. 128. Larger blocks are left emptier,
    smaller ones make thinner products."""
    return 2 ** min(max((n // (4 * K)).bit_length() - 1, 5), 7)


class Layout(NamedTuple):
    """Where the points went: N rows, in nb blocks of equal length, all of one block owned by one trajectory."""
    source: torch.Tensor            # int64 (b, N): the point in each row (0 where there is none)
    real: torch.Tensor              # bool (b, N), True = a point; the rest fills up blocks
    owner: torch.Tensor             # int64 (b, nb): the trajectory of each block

    def take(self, x):
        """x (b, n, ...) of points -> (b, N, ...) of rows."""
        row = self.source + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, self.source.shape)


def arrange(ids, K):
    """ids int64 (b, n): the trajectory of each point, -1 = left out -> Layout.
    sum over trajectories of ceil(points / p) <= n / p + K blocks of p: on a GPU that bound is the shape, since asking for the true
    number would stall it; a CPU asks."""
    b, n = ids.shape
    size = block_size(n, K)
    key = torch.where(ids < 0, K, ids)
    order = key.argsort(dim=1, stable=True)
    key = key.gather(1, order)
    count = torch.zeros(b, K + 1, dtype=torch.int64, device=ids.device).scatter_add_(1, key, torch.ones_like(key))
    blocks = (count[:, :K] + size - 1) // size
    end = blocks.cumsum(1)
    nb = n // size + K if ids.device.type != "cpu" or torch.compiler.is_compiling() else max(int(end[:, -1].max()), 1)
    first = F.pad(end, (1, 0))                                   # first block of each trajectory; of those left out: past the end
    rank = torch.arange(n, device=ids.device) - (count.cumsum(1) - count).gather(1, key)             # within its trajectory
    row = torch.where(key == K, nb * size, first.gather(1, key) * size + rank)
    source = torch.zeros(b, nb * size + 1, dtype=torch.int64, device=ids.device).scatter_(1, row, order)[:, :-1].contiguous()
    real = torch.zeros(b, nb * size + 1, dtype=torch.bool, device=ids.device).scatter_(1, row, True)[:, :-1].contiguous()
    owner = torch.searchsorted(end, torch.arange(nb, device=ids.device).expand(b, nb).contiguous(), right=True).clamp(max=K - 1)
    return Layout(source, real, owner)


def read_blocks(q, k, v, layout, u=None):
    """What each token reads in the points of its own trajectory, before the division: Partial of (b, K, m, a) and (b, K, m, a, e).

    q (b, K, m, a, c); k (b, N, a, c), v (b, N, a, e) or (b, N, 1, e) shared by the heads, in the layout's rows;
    u (b, K, m, a, e) or None: queries that meet v itself.  Softmax and sums are float32 whatever comes in.

        s_p = q_ids[p] · k_p + u_ids[p] · v_p               one score for each point, head and token: O(n), not O(K n)
        w_p = exp(s_p - max over its segment)               the segment's own maximum: never overflows, never all zero
        acc_i = sum_{ids[p] = i} w_p v_p,  total_i = sum w_p"""
    b, K, m, a, _ = q.shape
    row = (layout.owner + torch.arange(b, device=q.device)[:, None] * K).flatten()                   # block -> (clip, trajectory)
    k, v = (rearrange(x, "b (n p) g c -> (b n) g p c", n=layout.owner.shape[1]) for x in (k, v))     # n blocks of p points
    q = rearrange(q, "b k m a c -> (b k) a m c")
    u = None if u is None else rearrange(u, "b k m (g a) c -> (b k) g (a m) c", g=v.shape[1])
    top, total, acc = ReadBlocks.apply(q, k, v, u, row, layout.real.view(len(k), 1, 1, -1))
    return Partial(*(rearrange(x, "(b k) a m ... -> b k m a ...", b=b) for x in (top, total, acc)))


class ReadBlocks(torch.autograd.Function):
    """q (bK, a, m, c), k (n, a, p, c), v (n, g, p, e), u (bK, g, a·m / g, e) or None, row (n,): whose block it is, real
    (n, 1, 1, p) -> top, total (bK, a, m), acc (bK, a, m, e). g = a, or 1: the heads share v, and a and m are one axis.

    Its own backward, because v takes part twice: the two gradients that flow into it are one product here,
    dv = [w, ds]ᵀ [dacc, u], where autograd would write two arrays as large as the video's features and add them."""

    @staticmethod
    def forward(ctx, q, k, v, u, row, real):
        n, g, p, e = v.shape
        s = (q.index_select(0, row) @ k.transpose(2, 3)).float()                                     # (n, a, m, p)
        if u is not None:
            s += (u.index_select(0, row) @ v.transpose(2, 3)).view_as(s)
        s.masked_fill_(~real, -math.inf)
        top = s.new_full((len(q), *s.shape[1:3]), -math.inf)
        top.view(len(q), -1).scatter_reduce_(0, row[:, None].expand(-1, s[0, :, :, 0].numel()), s.amax(-1).flatten(1), "amax")
        shift = top.masked_fill(top == -math.inf, 0.0)           # no points: exp(-inf - 0) = 0, not NaN
        w = s.sub_(shift.index_select(0, row)[..., None]).exp_()
        total = torch.zeros_like(top).index_add_(0, row, w.sum(-1))
        read = (w.to(v.dtype).view(n, g, -1, p) @ v).float().view(n, *top.shape[1:], e)
        acc = torch.zeros(*top.shape, e, device=q.device).index_add_(0, row, read)
        ctx.save_for_backward(q, k, v, u, row, w)
        ctx.mark_non_differentiable(top)                         # any shift leaves the softmax as it is
        return top, total, acc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, d_total, d_acc):
        q, k, v, u, row, w = ctx.saved_tensors
        n, g, p, e = v.shape
        w = w.view(n, g, -1, p)
        both = d_acc.reshape(len(q), g, -1, e)
        both = (both if u is None else torch.cat((both, u.float()), 2)).index_select(0, row)         # (n, g, (1 or 2) a m / g, e)
        # float32: the two terms nearly cancel where the values of a trajectory are alike, and rounded apart they do not
        ds = both[:, :, :w.shape[2]] @ v.float().transpose(2, 3)
        ds = w * (ds + d_total.index_select(0, row).view(*w.shape[:3], 1))                           # (n, g, a m / g, p)
        dv = ((w if u is None else torch.cat((w, ds), 2)).to(v.dtype).transpose(2, 3) @ both.to(v.dtype))
        du = None if u is None else torch.zeros(u.shape, device=u.device).index_add_(0, row, ds @ v.float()).to(u.dtype)
        ds = ds.view(n, q.shape[1], q.shape[2], p).to(k.dtype)   # autocast may have left k in half precision, and v not
        dq = torch.zeros(q.shape, device=q.device).index_add_(0, row, (ds @ k).float()).to(q.dtype)
        return dq, ds.transpose(2, 3) @ q.to(k.dtype).index_select(0, row), dv, du, None, None


def read_own(q, k, v):
    """What each token reads in the m tokens of its trajectory, itself included: q, k (b, K, m, a, c), v (b, K, m, a or 1, e) -> Partial."""
    v = v.expand(*v.shape[:3], q.shape[3], -1).float()
    return partial(torch.einsum("bkmac,bkjac->bkmaj", q, k), lambda w: torch.einsum("bkmaj,bkjae->bkmae", w, v))


def trajectory_attention(q, k, v, ids, k_own=None, v_own=None):
    """Exact hard-masked cross-attention: the m tokens of trajectory i see the points p with ids[p] = i, and each other.

    q (b, K, m, a, c): a heads of c channels;  k, v (b, n, a, c): the points';  ids int64 (b, n) in [0, K), -1 = seen by none;
    k_own, v_own (b, K, m, a, c): the tokens' own keys and values, or None.  -> (b, K, m, a, c).
    A trajectory without points returns what its own tokens hold (zeros if there are none). The two parts, points and tokens, are
    softmaxes over disjoint sets, and joined exactly by their maxima and sums."""
    layout = arrange(ids, q.shape[1])
    q = q / math.sqrt(q.shape[-1])
    out = read_blocks(q, layout.take(k), layout.take(v), layout)
    if k_own is not None:
        out = join(out, read_own(q, k_own, v_own))
    return out.finish().to(q.dtype)


class TrajectoryAttention(CrossAttention):
    """CrossAttention where a token sees the points of its own trajectory only (M_hard), and the tokens beside it.

    Keys and values of n points would cost 2 n d² multiplications, most of this module's work; none of them is needed whole:
    - values: the sum commutes with the projection. sum_p w_p (W_v x_p) = W_v (sum_p w_p x_p): points are summed as they are,
      and K·m sums are projected instead of n points.
    - keys, the half that does not turn: q · (W_k x_p) = (W_kᵀ q) · x_p = u · x_p: again K·m projections instead of n.
    - keys, the half that turns with its position: projected, n d²/2. Each point has its own rotation between q and W_k.
    With one reader a point this is a gain; in the segmenter, where each of K queries reads all points with a heads, W_kᵀ q
    would make every score d channels long instead of d / a, and it is not."""

    def forward(self, latents, points, m):
        """latents (b, K·m, d); points: an iterable of (x (b, N, d) in rows, their positions (b, N), Layout, shared), which
        is one item, or the chunks of a long video; shared: (y (b, 2, d), positions (2,)), points that all tokens see, or None."""
        r, d = self.turned, latents.shape[-1]
        wk, wv = (rearrange(w, "(a c) d -> a c d", a=self.heads) for w in self.to_kv.weight.chunk(2))
        x = self.norm_latents(latents)
        split = lambda y: rearrange(y, "b (k m) a c -> b k m a c", m=m)
        scale = (d // self.heads) ** -0.5
        q, k_own = split(self.query(x)) * scale, split(self.key(x, torch.arange(x.shape[1], device=x.device)))
        u = torch.einsum("bkmac,acd->bkmad", q[..., r:], wk[:, r:].to(q.dtype))
        out = read_own(q, k_own, split(x[:, :, None]))
        for y, positions, layout, shared in points:
            y = self.norm_media(y)
            k = rotate(torch.einsum("bnd,acd->bnac", y, wk[:, :r].to(y.dtype)), rotary_table(positions, d // self.heads)[..., :r // 2])
            out = join(out, read_blocks(q[..., :r], k, y[:, :, None], layout, u))
            if shared is not None:
                y, positions = shared
                y = self.norm_media(y)
                s = torch.einsum("bkmac,bnac->bkman", q, self.key(y, positions))
                out = join(out, partial(s, lambda w: torch.einsum("bkman,bnd->bkmad", w, y.float())))
        out = torch.einsum("bkmad,acd->bkmac", out.finish().to(latents.dtype), wv)
        return self.to_out(rearrange(out, "b k m a c -> b (k m) (a c)"))


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EncoderConfig:
    dim: int = 512                              # d: width of features and tokens inside
    num_queries: int = 128                      # K: as in the segmenter
    depth: int = 2                              # layers of the Perceiver
    heads: int = 8
    max_tokens: int = 4                         # most tokens a trajectory can have: a power of two
    out_dim: int = 512                          # d': width of the tokens that leave
    hard_mask: bool = True                      # PAPER: masked cross-attention (ablation: False, every token sees all)
    mean_start: bool = True                     # PAPER: a token starts at z_init (False: at its learned code alone)
    places: bool = False                        # points also say where and when they are (PAPER: rotary positions, on the keys alone)
    last_points: int = 0                        # release: the last two points of a clip are seen by all tokens
    normed_residual: bool = False               # release, see Perceiver
    norm_media: bool = False                    # release, see Perceiver

    def __post_init__(self):
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1 or self.max_tokens & (self.max_tokens - 1):
            raise BadInput(f"max_tokens {self.max_tokens}: a power of two (the paper: 4)")

    @property
    def choices(self):
        """Token counts that may be asked for: 1, 2, 4, ..."""
        return tuple(2 ** i for i in range(self.max_tokens.bit_length()))

    def check(self, m):
        if m not in self.choices:
            raise BadInput(f"tokens per trajectory {m}: one of {', '.join(map(str, self.choices))}")
        return m


class Tokens(NamedTuple):
    z: torch.Tensor                 # (b, M, d'), M = K·m
    mask: torch.Tensor              # bool (b, M), True = a real token: its trajectory is alive
    trajectory: torch.Tensor        # int64 (b, M): the trajectory (query) that it belongs to


class TrajectoryEncoder(nn.Module):
    def __init__(self, cfg=EncoderConfig()):
        super().__init__()
        self.cfg = cfg
        # PAPER: Fourier codes encourage the tokens of one trajectory to differ. SPECS 1: points on a ring, evenly spaced,
        # sin and cos of frequencies 1 and 2; the same ring for every trajectory, then learned. CHOICE: at half the variance of a
        # normalised feature (the release: x 0.02, which beside z_init, of norm ~ sqrt d, hardly tells the tokens apart).
        angle = 2 * math.pi * torch.arange(cfg.max_tokens) / cfg.max_tokens
        ring = torch.stack([f(angle * i) for i in (1, 2) for f in (torch.sin, torch.cos)], -1)       # (m, 4)
        self.latents = nn.Parameter(math.sqrt(cfg.dim / 2) * fourier_codes(ring, cfg.dim).expand(cfg.num_queries, -1, -1).clone())
        self.perceiver = Perceiver(cfg.dim, cfg.depth, cfg.heads, cfg.normed_residual, cfg.norm_media, TrajectoryAttention if cfg.hard_mask else CrossAttention)
        self.output_projector = nn.Linear(cfg.dim, cfg.out_dim)
        self.places = nn.ModuleList(nn.Linear(8, cfg.dim) for _ in range(3)) if cfg.places else None             # of t, y, x

    def see(self, features, grid, first=0, frames=None):
        """F (b, n, d), frames first .. of a clip of `frames` -> what the tokens read. Rotary positions turn keys: they decide what is read, and are not
        read themselves. Where and when a thing was, a sum of F alone tells only as far as F happens to know. With cfg.places each point says it,
            F_p + W_t c(t) + W_y c(y) + W_x c(x),   c(s) = sin, cos of pi 2^i s, i = 0 .. 3,   s in (0, 1): of the clip, of the frame's sides
        and z_init, a mean over a trajectory, starts with where it mostly is. DEVIATION, off by default."""
        if self.places is None:
            return features
        place = 0
        for linear, (length, count, begin), shape in zip(self.places, ((frames or grid[0], grid[0], first), grid[1:2] * 2 + (0,), grid[2:] * 2 + (0,)),
                                                         ("s d -> s 1 1 d", "s d -> 1 s 1 d", "s d -> 1 1 s d")):
            s = (begin + torch.arange(count, device=features.device) + 0.5) / length
            angle = math.pi * s[:, None] * 2.0 ** torch.arange(4, device=s.device)
            place = place + rearrange(linear(torch.cat((angle.sin(), angle.cos()), -1)), shape)
        return features + place.flatten(0, 2).to(features.dtype)

    def forward(self, features, seg, tokens_per_trajectory=None, budget=None):
        """F (b, n, d), Segmentation -> Tokens. tokens_per_trajectory: 1, 2 or 4; None: drawn at random while training
        (PAPER, after Matryoshka), else 1.  budget: at most so many tokens a clip instead, spread by `spread`: M <= budget."""
        features = self.see(features, seg.grid)
        z = self.aggregate(features, seg.logits)                                                     # (b, K, d)
        if budget is None:
            m = tokens_per_trajectory
            if m is None:
                m = self.cfg.choices[int(torch.randint(len(self.cfg.choices), ()))] if self.training else 1
            self.cfg.check(m)
            return self.tokens(self.encode(z, [self.chunk(features, seg.ids, m)], m), seg.alive, m)
        if tokens_per_trajectory is not None:
            raise BadInput(f"tokens per trajectory {tokens_per_trajectory} and a budget of {budget} tokens: give one of the two")
        counts = spread(seg, budget, self.cfg.choices)                                               # (b, K)
        parts = []
        for m in self.cfg.choices:                               # each point is read in one of these rounds only
            mine = counts == m
            if bool(mine.any()):
                ids = torch.where(mine.gather(1, seg.ids), seg.ids, -1)
                parts.append(self.tokens(self.encode(z, [self.chunk(features, ids, m, seg.ids.shape[1])], m), mine, m))
        return compact(Tokens(*(torch.cat(x, 1) for x in zip(*parts))))

    def encode(self, z, chunks, m):
        """z_init (b, K, d) and the points -> (b, K·m, d')."""
        latents = self.latents[:, :m] + z[:, :, None] if self.cfg.mean_start else self.latents[:, :m].expand(len(z), -1, -1, -1)
        latents = rearrange(latents, "b k m d -> b (k m) d")
        return self.output_projector(self.perceiver(latents, chunks, *((m,) if self.cfg.hard_mask else ())))

    def tokens(self, z, alive, m):
        trajectory = repeat(torch.arange(self.cfg.num_queries, device=z.device), "k -> b (k m)", b=len(z), m=m)
        return Tokens(z, alive.repeat_interleave(m, 1), trajectory)

    def chunk(self, features, ids, m, total=None, first=0):
        """Points first ... of a clip of `total` points, as the Perceiver reads them: features (b, n, d), positions, and under the
        hard mask features and positions in rows, their Layout, and the points that everybody sees."""
        n, K = features.shape[1], self.cfg.num_queries
        begin = first + K * m                                    # tokens have the positions before it
        if not self.cfg.hard_mask:
            return features, torch.arange(begin, begin + n, device=features.device)
        shared, alone = None, max((total or n) - self.cfg.last_points - first, 0)
        if alone < n:                                            # the last points: seen by all, once
            ids = ids.masked_fill(torch.arange(n, device=ids.device) >= alone, -1)
            shared = (features[:, alone:], torch.arange(begin + alone, begin + n, device=ids.device))
        layout = arrange(ids, K)
        return layout.take(features), begin + layout.source, layout, shared

    @staticmethod
    def sums(features, logits):
        """sum_p M_soft[p, k] F_p (b, K, d), one matrix product, and sum_p M_soft[p, k] (b, K), float32. Soft on purpose: argmax has no
        gradient, this is the way by which the task's loss reaches the masks."""
        soft = logits.softmax(-1)                                # over the queries: each point spreads one unit over them
        return (soft.to(features.dtype).transpose(1, 2) @ features).float(), soft.sum(1, dtype=torch.float32)

    @staticmethod
    def mean(total, weight):
        return total / (weight[..., None] + 1e-6)

    @staticmethod
    def aggregate(features, logits):
        """z_init_k = sum_p M_soft[p, k] F_p / (sum_p M_soft[p, k] + 1e-6)  (b, K, d)."""
        return TrajectoryEncoder.mean(*TrajectoryEncoder.sums(features, logits)).to(features.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# A budget of tokens
# ---------------------------------------------------------------------------------------------------------------------

def importance(seg):
    """How much there is to tell of each trajectory (b, K), 0 for dead ones: its share of the clip's points + the way that its
    centre goes from frame to frame, in frame sides. CHOICE: the paper adjusts n "according to the compute budget" and says no more."""
    t, h, w = seg.grid
    b, n, K = seg.logits.shape
    frame = torch.arange(n, device=seg.ids.device) // (h * w)
    cell = seg.ids + frame * K                                   # (b, n): which trajectory in which frame
    def total(values):                                           # of points -> (b, t, K)
        return torch.zeros(b, t * K, device=cell.device).scatter_add_(1, cell, values.float().expand(b, n)).view(b, t, K)
    place = torch.arange(n, device=cell.device) % (h * w)
    area = total(torch.ones_like(frame))
    centre = torch.stack((total(place // w / h), total(place % w / w)), -1) / area.clamp(min=1)[..., None]           # (b, t, K, 2)
    both = (area[:, 1:] > 0) & (area[:, :-1] > 0)                # a frame in which it is not seen has no centre
    way = ((centre[:, 1:] - centre[:, :-1]).norm(dim=-1) * both).sum(1)
    return (area.sum(1) / n + way) * seg.alive


def spread(seg, budget, choices):
    """Tokens for each trajectory (b, K), each in {0, *choices}, at most `budget` a clip. Every trajectory gets one, the most
    important first; what is left doubles the count of the one that has most to tell for each token it holds, and so on."""
    if budget < 1:
        raise BadInput(f"a budget of {budget} tokens: give at least 1")
    budget = min(budget, choices[-1] * seg.alive.shape[1])
    weight = importance(seg).cpu()
    counts = torch.zeros(weight.shape, dtype=torch.int64)
    for i in range(len(weight)):
        alive = int(seg.alive[i].sum())
        counts[i, weight[i].argsort(descending=True, stable=True)[:min(alive, budget)]] = 1
        left = budget - int(counts[i].sum())
        while left:
            need = torch.where((counts[i] > 0) & (counts[i] < choices[-1]) & (counts[i] <= left), weight[i] / counts[i].clamp(min=1), -1.0)
            best = int(need.argmax())
            if need[best] < 0:
                break                                            # all have all they can, or what is left is too little
            left -= int(counts[i, best])
            counts[i, best] *= 2
    return counts.to(seg.ids.device)


def compact(tokens):
    """Real tokens first, and no longer than the clip that has most of them."""
    order = (~tokens.mask).to(torch.int8).argsort(dim=1, stable=True)[:, :int(tokens.mask.sum(1).max())]
    z = tokens.z.gather(1, order[..., None].expand(-1, -1, tokens.z.shape[-1]))
    return Tokens(z, tokens.mask.gather(1, order), tokens.trajectory.gather(1, order))
