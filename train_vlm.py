"""TrajVLM (paper, "Setting 3"): a language model that reads trajectories.

    ids (b, s) -> embeddings (b, s, w), visual tokens put in -> decoder of Qwen3's shape -> logits (b, s, vocabulary)
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# The decoder: Qwen3's shape (SPECS 5)
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DecoderConfig:
    vocabulary: int                  # rows of the embedding table; at least as many as the tokenizer has ids
    width: int
    mlp: int                         # width inside the SwiGLU
    layers: int
    heads: int                       # query heads
    kv_heads: int                    # key and value heads: each is read by heads / kv_heads query heads
    head_dim: int = 128              # of its own: heads x head_dim need not be the width
    theta: float = 1e6               # rotary: the slowest channel turns once in about 2 pi theta positions
    eps: float = 1e-6
    context: int = 40_960            # positions at most, prompt and answer together
    tied: bool = True                # logits from the embedding table itself

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions turn pairs of channels; give an even number")


# As published (SPECS 5); nano's vocabulary is its tokenizer's (load_tokenizer("world")).
DECODERS = {
    "nano": DecoderConfig(vocabulary=1280,   width=128,  mlp=384,  layers=4,  heads=4,  kv_heads=2, head_dim=32, theta=1e4, context=4096),
    "0.6b": DecoderConfig(vocabulary=151936, width=1024, mlp=3072, layers=28, heads=16, kv_heads=8),
    "1.7b": DecoderConfig(vocabulary=151936, width=2048, mlp=6144, layers=28, heads=16, kv_heads=8),
    "4b":   DecoderConfig(vocabulary=151936, width=2560, mlp=9728, layers=36, heads=32, kv_heads=8),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32: squares of bfloat16 lose what the norm is about."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def turn(x, cos, sin):
    """Rotary embedding, halves: channel j is paired with channel j + c/2. x (b, a, s, c), cos and sin (b, 1, s, c/2) float32."""
    one, two = x.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


class Cache:
    """Keys and values of every layer, allocated once for `capacity` positions and written in place. `real` (b, capacity), True = a token
    and not padding; `count` (b,): real tokens so far = the next token's position; `length`: places written, padding included."""

    def __init__(self, cfg, b, capacity, device=None, dtype=None):
        shape = (b, cfg.kv_heads, capacity, cfg.head_dim)
        self.kv = [(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)) for _ in range(cfg.layers)]
        self.real = torch.zeros(b, capacity, dtype=torch.bool, device=device)
        self.count = torch.zeros(b, dtype=torch.int64, device=device)
        self.length, self.padded = 0, False

    def put(self, i, k, v):
        """Layer i's new k, v (b, a, s, c) -> all of them so far."""
        s, (keys, values) = k.shape[2], self.kv[i]
        keys[:, :, self.length:self.length + s], values[:, :, self.length:self.length + s] = k, v
        return keys[:, :, :self.length + s], values[:, :, :self.length + s]


class Attention(nn.Module):
    """Grouped queries; q and k are normed head by head before they turn."""

    def __init__(self, cfg):
        super().__init__()
        self.c = cfg.head_dim
        self.q_proj = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(cfg.head_dim, cfg.eps), RMSNorm(cfg.head_dim, cfg.eps)

    def forward(self, x, cos, sin, mask, causal, put):
        q, k, v = (rearrange(proj(x), "b s (a c) -> b a s c", c=self.c) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (turn(norm(y), cos, sin).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if put is not None:
            k, v = put(k, v)
            q = q.to(k.dtype)
        # softmax over the keys, none of them later than the query
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(rearrange(y, "b a s c -> b s (a c)"))


class SwiGLU(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False), nn.Linear(mlp, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm: (1) causal self-attention, (2) SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(cfg.width, cfg.eps), Attention(cfg)
        self.post_attention_layernorm, self.mlp = RMSNorm(cfg.width, cfg.eps), SwiGLU(cfg.width, cfg.mlp)

    def forward(self, x, cos, sin, mask=None, causal=True, put=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, put)                 # 1
        return x + self.mlp(self.post_attention_layernorm(x))                                        # 2


class Decoder(nn.Module):
    """Modules carry the published names, without their leading `model.`.

    model(ids int64 (b, s))               -> logits (b, s, vocabulary)
    model(embeddings=(b, s, w))           -> the same: token embeddings (model.embed_tokens(ids)) with visual tokens put in
      mask=bool (b, s)                       True = real, False = padding, left or right of a row's tokens (or between them)
      segments=int64 (b, s)                  packed rows: equal numbers, side by side, are one sequence; it sees itself only. Positions begin
                                             at 0 in each. Padding: a number of its own
      positions=int64 (b, s)                 else counted: real tokens before this one
      cache=Cache                            ids continue what the cache holds, and are added to it
      last=True                              -> (b, vocabulary): at each row's last real token only
      where=bool (b, s), True = wanted       -> (number wanted, vocabulary), row by row: 151 936 logits a position are not made for nothing
      targets=int64 (b, s), -1 = none        -> (number of targets,) float32: -log p(target), row by row, logits made `chunk` positions at a time
                                             and again in backward. The target stands where it is predicted: ids shifted by one, by the caller
    recompute = True: activations of a layer are computed again in backward instead of kept."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.embed_tokens = nn.Embedding(cfg.vocabulary, cfg.width)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # 1 / sqrt(fan in), the ends of branches smaller with depth, as in train_clip.py; the table so that tied logits start near 1
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / (math.sqrt(2 * cfg.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1))

    def places(self, b, s, mask, segments, cache, device):
        """-> positions (b, s), attention mask (b or 1, 1, s, keys) with True = may be read, or None, and whether it is plainly causal."""
        here = torch.arange(s, device=device)
        if segments is not None:
            begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            positions = here - torch.where(begins, here, 0).cummax(1).values
            seen = (segments[:, :, None] == segments[:, None]) & (here[:, None] >= here)
            return positions, seen[:, None], False
        real = torch.ones(b, s, dtype=torch.bool, device=device) if mask is None else mask
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if cache is None:
            if mask is None:
                return positions, None, True
            # padding reads itself: a softmax over nothing would be NaN, and NaN times 0 is NaN
            seen = (here[:, None] >= here) & (real[:, None] | torch.eye(s, dtype=torch.bool, device=device))
            return positions, seen[:, None], False
        positions, total = positions + cache.count[:, None], cache.length + s
        if total > cache.real.shape[1]:
            raise ValueError(f"{total} positions in a cache of {cache.real.shape[1]}")
        cache.real[:, cache.length:total] = real
        cache.padded |= mask is not None
        if not cache.padded and (s == 1 or cache.length == 0):
            return positions, None, s > 1
        there = torch.arange(total, device=device)
        seen = (there <= cache.length + here[:, None]) & (cache.real[:, None, :total] | (there == cache.length + here[:, None]))
        return positions, seen[:, None], False

    def forward(self, ids=None, *, embeddings=None, positions=None, mask=None, segments=None, cache=None, last=False, where=None, targets=None, chunk=1024):
        if (ids is None) == (embeddings is None) or (segments is not None and (mask is not None or cache is not None)):
            raise ValueError("give ids or embeddings; and segments without mask and cache")
        x = self.embed_tokens(ids) if embeddings is None else embeddings
        b, s, _ = x.shape
        counted, seen, causal = self.places(b, s, mask, segments, cache, x.device)
        positions = counted if positions is None else positions
        frequency = self.cfg.theta ** (-torch.arange(0, self.cfg.head_dim, 2, device=x.device, dtype=torch.float32) / self.cfg.head_dim)
        angle = positions[:, None, :, None].float() * frequency                                      # (b, 1, s, c / 2)
        cos, sin = angle.cos(), angle.sin()
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, seen, causal, use_reentrant=False)
            else:
                x = layer(x, cos, sin, seen, causal, None if cache is None else lambda k, v, i=i: cache.put(i, k, v))
        if cache is not None:
            cache.length += s
            cache.count += s if mask is None else mask.sum(1)
        if targets is not None:
            return self.losses(self.norm(x[targets >= 0]), targets[targets >= 0], chunk)
        if last:
            at = torch.full((b,), s - 1, device=x.device) if mask is None else (mask * torch.arange(1, s + 1, device=x.device)).argmax(1)
            x = x[torch.arange(b, device=x.device), at]
        elif where is not None:
            x = x[where]
        return F.linear(self.norm(x), self.head())

    def head(self):
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def losses(self, x, targets, chunk):
        """Normed x (n, w), targets (n,) -> -log p(target) (n,) float32."""
        def some(x, targets, weight):
            return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")           # softmax over the vocabulary
        return torch.cat([checkpoint(some, a, t, self.head(), use_reentrant=False) for a, t in zip(x.split(chunk), targets.split(chunk))])
