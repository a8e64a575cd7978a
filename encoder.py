"""The trajectory encoder: the points of each trajectory become 1, 2 or 4 tokens.

Paper, "Key Designs" 2; exact shapes of the release: SPECS 1 ("SegmentTokenizer").

    features F (b, n, d), logits (b, n, K)                               from the segmenter
      -> z_init_k = sum_p M_soft[p, k] F_p / sum_p M_soft[p, k]          soft: the gradient's way into the masks
      -> + learned codes, m of them for each trajectory (m = 1, 2, 4)    what tells the m tokens of one trajectory apart
      -> Perceiver: a token reads the points that its trajectory owns (M_hard), and the tokens beside it
      -> Tokens z (b, K·m, d'), mask: True = its trajectory is alive,    trajectory: which one each token belongs to

The hard mask gives every point exactly one reader. So attention under it is a softmax over segments, and costs O(n)
scores instead of the O(K·n) of a dense masked matrix: `trajectory_attention`.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from einops import rearrange, repeat

from data import BadInput
from segmenter import CrossAttention, Perceiver, fourier_codes


def trajectory_attention(q, k, v, ids, k_own=None, v_own=None):
    """Exact hard-masked cross-attention: the m tokens of trajectory i see the points p with ids[p] = i, and each other.

    q (b, K, m, a, c): a heads of c channels;  k, v (b, n, a, c): the points';  ids int64 (b, n) in [0, K);
    k_own, v_own (b, K, m, a, c): the tokens' own keys and values, or None.  -> (b, K, m, a, c).
    A trajectory without points returns what its own tokens hold (zeros if there are none).

        s_p = q_ids[p] · k_p / sqrt(c)                 one score for each point, head and token: O(n), not O(K n)
        w_p = exp(s_p - max over its segment)          the segment's own maximum: never overflows, never all zero
        out_i = sum_{ids[p] = i} w_p v_p / sum w_p     the softmax runs over the points of one trajectory

    The points' part is `SegmentAttention` below; it also returns log sum exp of each segment, with which the m own tokens
    are merged in exactly: two softmaxes over disjoint sets, weighed by their share of the total."""
    out, lse = SegmentAttention.apply(q, k, v, ids)
    if k_own is None:
        return out
    own = torch.einsum("bkmac,bkjac->bkmja", q.float(), k_own.float()) / math.sqrt(q.shape[-1])      # (b, K, m, j, a)
    total = torch.logsumexp(torch.cat((own, lse[:, :, :, None]), 3), 3)                              # over own tokens and points
    beside = torch.einsum("bkmja,bkjac->bkmac", (own - total[:, :, :, None]).exp(), v_own.float())
    return (beside + (lse - total).exp()[..., None] * out).to(q.dtype)


class SegmentAttention(torch.autograd.Function):
    """q (b, K, m, a, c), k, v (b, n, a, c), ids (b, n) -> softmax(q k) v over each trajectory's points (b, K, m, a, c) and the
    log of its denominator (b, K, m, a), -inf where there is no point. Float32 inside, whatever comes in.

    Written as one function with its own backward, as flash attention is: the (n, m, a, c) products between the steps are
    made again in the backward pass, not kept, and on a CPU the clips go one after the other, so that these products
    stay in the cache."""

    @staticmethod
    def forward(ctx, q, k, v, ids):
        out, lse = torch.empty(q.shape, device=q.device), torch.empty(q.shape[:-1], device=q.device)
        for i in clips(q):
            owner, K = rows(ids[i], q.shape[1])
            s = SegmentAttention.scores(q[i], k[i], owner)                                           # (p, m, a)
            top = s.new_full((K, *s.shape[1:]), -math.inf)
            top = top.flatten(1).scatter_reduce_(0, owner[:, None].expand(-1, s[0].numel()), s.flatten(1), "amax").view_as(top)
            w = s.sub_(top.masked_fill(top == -math.inf, 0.0).index_select(0, owner)).exp_()
            total = torch.zeros_like(top).index_add_(0, owner, w)                                    # (K, m, a)
            summed = torch.zeros(K, *q.shape[2:], device=q.device).index_add_(0, owner, w[..., None] * v[i].flatten(0, 1)[:, None].float())
            out[i] = (summed / total.clamp(min=1e-30)[..., None]).view_as(out[i])
            lse[i] = (top + total.log()).view_as(lse[i])         # no point: -inf + log 0
        ctx.save_for_backward(q, k, v, ids, out, lse)
        return out, lse

    @staticmethod
    def scores(q, k, owner):
        q = q.flatten(0, 1).float().index_select(0, owner)                                           # (p, m, a, c)
        return (q * k.flatten(0, 1)[:, None].float()).sum(-1) / math.sqrt(q.shape[-1])

    @staticmethod
    def backward(ctx, d_out, d_lse):
        #   P_p = exp(s_p - lse)                              the softmax, made again
        #   dv_p = sum_m P_p dout          ds_p = P_p (dout · v_p - dout · out + dlse)
        #   dk_p = sum_m ds_p q / sqrt c   dq_i = sum_p ds_p k_p / sqrt c
        q, k, v, ids, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(out), torch.empty(k.shape, device=k.device), torch.empty(v.shape, device=v.device)
        # a trajectory without points has lse = -inf, whose own gradient is 0/0 in whatever used it: it gets none
        shift = d_lse.masked_fill(lse.isinf(), 0.0) - (d_out * out).sum(-1)                          # (b, K, m, a)
        for i in clips(q):
            owner, K = rows(ids[i], q.shape[1])
            kp, vp = k[i].flatten(0, 1)[:, None].float(), v[i].flatten(0, 1)[:, None].float()        # (p, 1, a, c)
            P = (SegmentAttention.scores(q[i], k[i], owner) - lse[i].flatten(0, 1).index_select(0, owner)).exp_()
            d = d_out[i].flatten(0, 1).index_select(0, owner)                                        # (p, m, a, c)
            ds = P * ((d * vp).sum(-1) + shift[i].flatten(0, 1).index_select(0, owner)) / math.sqrt(q.shape[-1])
            dv[i] = (P[..., None] * d).sum(1).view_as(dv[i])
            dk[i] = (ds[..., None] * q[i].flatten(0, 1).float().index_select(0, owner)).sum(1).view_as(dk[i])
            dq[i] = torch.zeros(K, *q.shape[2:], device=q.device).index_add_(0, owner, ds[..., None] * kp).view_as(dq[i])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def clips(q):
    """Slices of the batch to work on together: one clip on a CPU (cache), all at once on a GPU."""
    step = 1 if q.device.type == "cpu" else len(q)
    return [slice(i, i + step) for i in range(0, len(q), step)]


def rows(ids, K):
    """ids (b, n) -> the row of each point's trajectory among b·K rows (b·n), and b·K."""
    return (ids + torch.arange(len(ids), device=ids.device)[:, None] * K).flatten(), len(ids) * K


class TrajectoryAttention(CrossAttention):
    """CrossAttention where a token sees the points of its own trajectory only (M_hard), and the tokens beside it."""

    def forward(self, latents, points, ids, m):
        x = self.norm_latents(latents)
        q, k_own, v_own = (rearrange(y, "b (k m) a c -> b k m a c", m=m) for y in (self.query(x), *self.key_value(x, 0)))
        out = trajectory_attention(q, *self.key_value(points, latents.shape[1]), ids, k_own, v_own)
        return self.to_out(rearrange(out, "b k m a c -> b (k m) (a c)"))


@dataclass(frozen=True)
class EncoderConfig:
    dim: int = 512                              # d: width of features and tokens inside
    num_queries: int = 128                      # K: as in the segmenter
    depth: int = 2                              # layers of the Perceiver
    heads: int = 8
    max_tokens: int = 4                         # most tokens a trajectory can have: a power of two
    out_dim: int = 512                          # d': width of the tokens that leave
    hard_mask: bool = True                      # PAPER: masked cross-attention (ablation: False, every token sees all)

    def __post_init__(self):
        if self.max_tokens < 1 or self.max_tokens & (self.max_tokens - 1):
            raise BadInput(f"max_tokens {self.max_tokens}: a power of two (the paper: 4)")

    @property
    def choices(self):
        """Token counts that may be asked for: 1, 2, 4, ..."""
        return tuple(2 ** i for i in range(self.max_tokens.bit_length()))


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
        self.perceiver = Perceiver(cfg.dim, cfg.depth, cfg.heads, TrajectoryAttention if cfg.hard_mask else CrossAttention)
        self.output_projector = nn.Linear(cfg.dim, cfg.out_dim)

    def forward(self, features, seg, tokens_per_trajectory=None):
        """F (b, n, d), Segmentation -> Tokens. tokens_per_trajectory: 1, 2 or 4; None: drawn at random while training
        (PAPER, after Matryoshka), else 1."""
        m = self.tokens_per_trajectory(tokens_per_trajectory)
        z = self.aggregate(features, seg.logits)                                                     # (b, K, d)
        latents = rearrange(self.latents[:, :m] + z[:, :, None], "b k m d -> b (k m) d")
        latents = self.perceiver(latents, features, *((seg.ids, m) if self.cfg.hard_mask else ()))
        trajectory = repeat(torch.arange(self.cfg.num_queries, device=z.device), "k -> b (k m)", b=len(z), m=m)
        return Tokens(self.output_projector(latents), seg.alive.repeat_interleave(m, 1), trajectory)

    def tokens_per_trajectory(self, m):
        if m is None:
            m = self.cfg.choices[int(torch.randint(len(self.cfg.choices), ()))] if self.training else 1
        if m not in self.cfg.choices:
            raise BadInput(f"tokens per trajectory {m}: one of {', '.join(map(str, self.cfg.choices))}")
        return m

    @staticmethod
    def aggregate(features, logits):
        """z_init_k = sum_p M_soft[p, k] F_p / (sum_p M_soft[p, k] + 1e-6)  (b, K, d): one matrix product.
        Soft on purpose: argmax has no gradient, this is the way by which the task's loss reaches the masks."""
        soft = logits.softmax(-1)                                # over the queries: each point spreads one unit over them
        return torch.einsum("bnk,bnd->bkd", soft.to(features.dtype), features) / (soft.sum(1)[..., None] + 1e-6).to(features.dtype)
