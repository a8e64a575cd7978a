"""TrajVLM (paper, "Setting 3"): a language model that reads trajectories, and PatchVLM, which reads pooled patches instead.

    video uint8 (b, t, H, W, 3), window by window of 8 frames -> vision, frame by frame -> features (v, t, h, w, d)
      trajtok: segmenter (frozen) -> mask logits -> resized to (h, w), argmax -> TrajectoryEncoder under hard masks -> one token for each live trajectory
      patch:   features pooled in space (and time) to as many tokens
    -> SwiGLU to the decoder's width; before each window its time stamp, as text; then the question
    -> decoder of Qwen3's shape -> the answer.  loss = -log p of the answers' tokens, and of nothing else

    python train_vlm.py                                          # TrajVLM, PatchVLM and a blind model on made stories, three seeds: two CPU cores
    python train_vlm.py --connector trajtok --seeds 0            # one of them
    python train_vlm.py --connector oracle --seeds 0             # true masks in place of the segmenter's: where does a gap come from?
    python train_vlm.py --resume                                 # goes on where a stopped run was saved, step for step
    python train_vlm.py ask clip.mp4 "What moves behind the red square?" --model out/vlm-nano-trajtok-0
    python train_vlm.py --size 4b --decoder FOLDER --vision FOLDER --tokenizer FOLDER --segmenter FOLDER --data qa.jsonl     # published weights; every
                                                                 # GPU of this machine; several machines: torchrun --nnodes ... train_vlm.py

Writes out/vlm-<name>-<connector>-<seed>/: config.json, log.jsonl, state.pt (of several processes state-<step>/), model.safetensors, result.json, curves.png;
results/vlm-<name>.json and .png: accuracy by type of question and by length, of all rows.
"""
from __future__ import annotations

import codecs
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import trajtok
from data import BadInput, configure, write_json, write_png
from encoder import TrajectoryEncoder, soft_sums
from segmenter import Segmenter, fourier_codes, labels_on_grid, one_hot
from trajtok import (Damage, Run, TrajTok, TrajTokConfig, fit_weights, load_official_segmenter, read_weights, rename, aligned, check_finite, flags, held_out_share, launch, learning_rate, meet, peak_memory_gb, plot, plot_lines, precision, ranks,
                     results_folder, run_name, setup, sigterm, split_entries, spread_of, tokenizer_config, total, write_text, write_weights)


# ---------------------------------------------------------------------------------------------------------------------
# Published folders
# ---------------------------------------------------------------------------------------------------------------------

def read_config(folder, kinds, what):
    """The object in folder/config.json; its model_type must be one of kinds."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: no configuration ({type(error).__name__}: {error}); give the folder of {what} as published, config.json and safetensors") from None
    if kind not in kinds:
        raise BadInput(f"{path}: model_type {kind!r} is another architecture; {what} is read here ({', '.join(kinds)})")
    return config


def need(config, path, *keys):
    """The values of keys, or BadInput that names those that lack."""
    lacking = [key for key in keys if config.get(key) is None]
    if lacking:
        raise BadInput(f"{path}: lacks {', '.join(lacking)}; fetch it again")
    return [config[key] for key in keys]


def check_whole(cfg, *names):
    """ValueError where one of these fields is no whole number from 1 on."""
    for name in names:
        value = getattr(cfg, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r}; give a whole number, 1 or more")


@contextlib.contextmanager
def published_weights(folder):
    """-> {key: (open file, key)} over model.safetensors, or over the shards that model.safetensors.index.json names. The files are mapped
    into memory: nothing is read yet."""
    folder, whole = Path(folder), Path(folder) / "model.safetensors"
    index, names = folder / "model.safetensors.index.json", [whole.name]
    if not whole.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except FileNotFoundError:
            raise BadInput(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; fetch it again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{index}: not an index of shards ({type(error).__name__}: {error}); fetch it again") from None
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise BadInput(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}; fetch them into it")
    with contextlib.ExitStack() as stack:
        weights = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, "pt"))
                weights |= {key: (file, key) for key in file.keys()}
            except Exception as error:                           # safetensors raises a type of its own, and OSError
                raise BadInput(f"{folder / name}: not a whole safetensors file ({str(error)[:120]}); fetch it again") from None
        yield weights


def read(weight):
    file, key = weight
    return file.get_tensor(key)                                  # a view of the mapped file, not a copy


def fit_published(module, weights, where, dtype, device):
    """Mapped weights into a module that was made on the meta device. All that does not fit is listed before anything is read."""
    own, shape = module.state_dict(), lambda key: tuple(weights[key][0].get_slice(weights[key][1]).get_shape())
    wrong = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    wrong += [f"{k} is {shape(k)}, not {tuple(own[k].shape)}" for k in own if k in weights and shape(k) != tuple(own[k].shape)]
    if wrong:
        raise BadInput(f"{where}: weights of another model or size ({len(wrong)} keys: {'; '.join(wrong)})")
    for name in own:
        value = read(weights[name])
        if not value.is_floating_point() or not torch.stack(torch.aminmax(value)).isfinite().all():            # which hands NaN on, 40 times faster than isfinite
            raise BadInput(f"{where}: {name} holds {'NaN or infinite numbers' if value.is_floating_point() else value.dtype}; fetch it again")
        own[name] = torch.empty(value.shape, dtype=dtype or value.dtype, device=device).copy_(value)
    module.load_state_dict(own, assign=True)
    return module


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
        check_whole(self, "vocabulary", "width", "mlp", "layers", "heads", "kv_heads", "head_dim", "context")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions turn pairs of channels; give an even number")


# As published (SPECS 5). nano's vocabulary: the 1024 that load_tokenizer("world") may learn, and its special tokens.
DECODERS = {
    "nano": DecoderConfig(vocabulary=1030,   width=128,  mlp=384,  layers=4,  heads=4,  kv_heads=2, head_dim=32, theta=1e4, context=4096),
    "0.6b": DecoderConfig(vocabulary=151936, width=1024, mlp=3072, layers=28, heads=16, kv_heads=8),
    "1.7b": DecoderConfig(vocabulary=151936, width=2048, mlp=6144, layers=28, heads=16, kv_heads=8),
    "4b":   DecoderConfig(vocabulary=151936, width=2560, mlp=9728, layers=36, heads=32, kv_heads=8),
}


def decoder_config(folder):
    """config.json of a published Qwen3 -> DecoderConfig; tied is None where the file does not say. BadInput: another architecture, or a
    variant of this one that is not computed here."""
    config, path = read_config(folder, ("qwen3",), "a decoder of Qwen3's shape"), Path(folder) / "config.json"
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}                       # the newer and the older way to write it
    variants = [f"{key} {config[key]!r}" for key, usual in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False))
                if config.get(key, usual) != usual]
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if variants or kind != "default":
        raise BadInput(f"{path}: not computed here: {', '.join(variants + [f'rotary positions of kind {kind!r}'] * (kind != 'default'))}; give a plain Qwen3")
    vocabulary, width, mlp, layers, heads, kv_heads, head_dim, eps, context = need(
        config, path, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "max_position_embeddings")
    theta, = need({"rope_theta": rotary.get("rope_theta", config.get("rope_theta"))}, path, "rope_theta")
    try:
        return DecoderConfig(vocabulary, width, mlp, layers, heads, kv_heads, head_dim, float(theta), eps, context, config.get("tie_word_embeddings"))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


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
        self.c, self.group = cfg.head_dim, cfg.heads // cfg.kv_heads
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
        # softmax over the keys, none of them later than the query. A fast kernel takes fewer key heads than query heads only without a
        # mask; with one, PyTorch would silently write out all scores. So one query's group stands where its positions would, and of many
        # queries the keys are repeated.
        if q.shape[2] == 1:
            q = rearrange(q, "b (a g) 1 c -> b a g c", g=self.group)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(rearrange(y, "b a g c -> b 1 (a g c)"))
        if mask is not None:
            k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=mask is None)
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
      mask=bool (b, s, s)                    True = position i reads position j: branches of one prompt side by side; with positions
      segments=int64 (b, s)                  packed rows: equal numbers, side by side, are one sequence; it sees itself only. Positions begin
                                             at 0 in each. Padding: a number of its own
      positions=int64 (b, s)                 else counted: real tokens before this one
      cache=Cache                            ids continue what the cache holds, and are added to it
      last=True                              -> (b, vocabulary): at each row's last real token only
      where=bool (b, s), True = wanted       -> (number wanted, vocabulary), row by row: 151 936 logits a position are not made for nothing
      targets=int64 (b, s), -1 = none        -> (number of targets,) float32: -log p(target), row by row, logits made `chunk` positions at a time
                                             and again in backward. The target stands where it is predicted: ids shifted by one, by the caller
    recompute = True: activations of a layer are computed again in backward instead of kept. Without where and targets the whole forward is
    one graph for torch.compile; in training, compile the layers (layer.compile()): those two pick by data, which no graph can."""

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

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """A published Qwen3: config.json and model.safetensors, or the shards that its index names. dtype None: as stored. One tensor
        after another is read from the mapped file straight to its place: the model is never in memory twice. Strict: BadInput."""
        with published_weights(folder) as weights:
            cfg, tied = decoder_config(folder), weights.pop("lm_head.weight", None)
            cfg = dataclasses.replace(cfg, tied=tied is None if cfg.tied is None else cfg.tied)
            if not cfg.tied and tied is not None:
                weights["lm_head.weight"] = tied
            weights = rename(weights, [(r"model\.(.+)", r"\1")])
            with torch.device("meta"):
                model = cls(cfg)
            fit_published(model, weights, folder, dtype, device)
            if cfg.tied and tied is not None and not torch.equal(read(tied).to(model.head().dtype), model.head().cpu()):
                raise BadInput(f"{folder}: config.json ties lm_head to the embeddings, but the two are not equal; set tie_word_embeddings to false there")
        return model

    def save_pretrained(self, folder, state=None):
        """What from_pretrained and others read. state: the weights, where they are not in this module (gathered from several processes)."""
        folder, c = Path(folder), self.cfg
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dict(
            architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rope_theta=c.theta, rms_norm_eps=c.eps,
            max_position_embeddings=c.context, tie_word_embeddings=c.tied, hidden_act="silu", attention_bias=False))
        state = self.state_dict() if state is None else state
        write_weights(folder / "model.safetensors", {key if key.startswith("lm_head.") else f"model.{key}": value for key, value in state.items()})

    def places(self, b, s, mask, segments, cache, device):
        """-> positions (b, s), attention mask (b or 1, 1, s, keys) with True = may be read, or None, and whether it is plainly causal."""
        here = torch.arange(s, device=device)
        if mask is not None and mask.dim() == 3:                 # who reads whom is given, and so are positions
            return None, mask[:, None], False
        if segments is not None:
            begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            positions = here - torch.where(begins, here, 0).cummax(1).values
            run = begins.cumsum(1)                               # a number that comes again later is another sequence
            seen = (run[:, :, None] == run[:, None]) & (here[:, None] >= here)
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
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}; give bool, True = real")
        x = self.embed_tokens(ids) if embeddings is None else embeddings
        b, s, _ = x.shape
        counted, seen, causal = self.places(b, s, mask, segments, cache, x.device)
        positions = counted if positions is None else positions
        # in float32 throughout, as the published weights were trained: bfloat16 holds no whole number above 256 exactly. Under fully_shard with
        # mixed precision, cast_forward_inputs must be False for the layers, or it would cast cos and sin.
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


# ---------------------------------------------------------------------------------------------------------------------
# Words: the tokenizer and chat turns
# ---------------------------------------------------------------------------------------------------------------------

END, TURN, TURN_END, VISION, VISION_END, VIDEO = SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")               # END also fills rows up


@functools.lru_cache(maxsize=None)
def load_tokenizer(name="world"):
    """-> a tiktoken Encoding with the special tokens above. `world`: the built-in one (learnt from made captions and questions), the special
    tokens after its vocabulary; else a published Qwen3 folder, whose texts are brought to NFC first. encode_ordinary reads any text, and
    none of it as special."""
    if name == "world":
        import tiktoken
        # a time stamp is one word: at nano's size a dozen tokens of digits before a window's half a dozen visual ones would be most of what is read
        pattern, clips = r"<[0-9.]+-[0-9.]+s>|" + data.WORDS, [data.script(i, world) for world in (data.World(), data.World(frames=32, acts=4, story=True)) for i in range(700)]
        texts = [text for clip in clips for text in (clip["caption"], *(part for qa in clip["qa"] for part in (qa["question"], qa["answer"])))]
        stamps = [stamp(first / FPS, (first + 7) / FPS) for first in range(0, 512, 8)]
        ranks = data.learn_bpe([*texts, *30 * stamps, *100 * ("user", "assistant", DESCRIBE)], pattern=pattern)
        return tiktoken.Encoding("world", pat_str=pattern, mergeable_ranks=ranks, special_tokens={token: len(ranks) + i for i, token in enumerate(SPECIAL)})
    if not Path(name).is_dir():
        raise BadInput(f"{name}: neither `world` nor a folder with a published tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    encoding = data.load_encoding(str(name))
    lacking = [token for token in SPECIAL if token not in encoding.special_tokens_set]
    if lacking:
        raise BadInput(f"{name}: the tokenizer lacks {', '.join(lacking)}; give one of Qwen3's")
    return encoding


def special(encoding, token):
    """The id of a special token, e.g. VIDEO. The only way to one: text never becomes special, whoever wrote it."""
    if token not in encoding.special_tokens_set:
        raise BadInput(f"{token}: no special token of this tokenizer; it has {', '.join(sorted(encoding.special_tokens_set))}")
    return encoding.encode_single_token(token)


def check_question(text):
    """A question from outside that spells a special token, known or not. It would be read as plain letters (encode_ordinary), which
    is safe but not what was meant."""
    if found := re.search(r"<\|[^\s|]*\|>", text):
        raise BadInput(f"the question holds {found[0]}: special tokens cannot be written into a text; leave it out")


def encode(encoding, parts):
    """Text and ids, mixed -> ids. Neighbouring texts are joined first: a newline belongs to the word that follows it as much as to its own line."""
    ids, text = [], ""
    for part in (*parts, None):
        if isinstance(part, str):
            text += part
            continue
        ids += encoding.encode_ordinary(text)
        text = ""
        if part is not None:
            ids.append(int(part))
    return ids


def chat(encoding, messages, answer=False):
    """[{"role": "system" | "user" | "assistant", "content": text, or a list of texts and ids (visual places, from special())}]
    -> ids, and spoken: True = written by the assistant (its text and the end of its turn): what the loss is on.
    answer: the assistant's turn is opened. Qwen3's turns: im_start role newline text im_end newline; no token at the beginning."""
    ids, spoken, begin, end = [], [], special(encoding, TURN), special(encoding, TURN_END)
    for message in (*messages, *([{"role": "assistant", "content": None}] if answer else [])):
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"a turn of role {role!r}; one of system, user, assistant")
        content = [content] if isinstance(content, str) else content
        if role != "assistant":
            turns = [(encode(encoding, [begin, f"{role}\n", *content, end, "\n"]), False)]
        else:                                                    # its opening apart: what it is trained on must continue exactly what it is asked with
            turns = [(encode(encoding, [begin, f"{role}\n"]), False)]
            turns += [(encode(encoding, [*content, end]), True), (encode(encoding, ["\n"]), False)] if content is not None else []
        for more, own in turns:
            ids += more
            spoken += [own] * len(more)
    return ids, spoken


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------

def pick(logits, temperature, top_p, chance):
    """logits (b, v) float32, chance (b,) uniform in [0, 1) -> ids (b,). temperature 0: the most likely. top_p: only among the smallest set
    of most likely tokens whose probabilities reach that sum."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)         # over the vocabulary
    if top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0)          # a token stays if those before it do not reach the sum: the first always does
    total = p.cumsum(-1)
    # the first whose running sum exceeds chance times the whole: its own share is not 0, and as chance < 1 there is one
    return order.gather(1, torch.searchsorted(total, chance[:, None] * total[:, -1:], right=True))[:, 0]


def pad(prompts, side):
    """Tensors (s_i, ...) -> (b, s, ...), filled with zeros on the left or right, and mask (b, s), True = real."""
    s = max(map(len, prompts))
    ends = [(s - len(x), 0) if side == "left" else (0, s - len(x)) for x in prompts]
    together = torch.stack([F.pad(x, (0, 0) * (x.dim() - 1) + gap) for x, gap in zip(prompts, ends)])
    return together, torch.stack([F.pad(x.new_ones(len(x), dtype=torch.bool), gap) for x, gap in zip(prompts, ends)])


@torch.no_grad()
def steps(model, prompts, most=256, temperature=0.0, top_p=1.0, stop=(), seed=0, known=None, side="left"):
    """Generation, step by step: yields lists of b new ids, None for a row that has ended (at a token of `stop`, which is not given out).

    prompts: each ids (s,), a list or a tensor, or embeddings (s, w) with visual tokens put in; of any lengths. Rows do not see each
    other: row i is what it would be alone with seed + i. known: only ids below it (the tokenizer's n_vocab: published tables hold
    more rows than that). A prompt that does not fit into the context: BadInput; an answer ends where the context does."""
    if temperature < 0 or not 0 < top_p <= 1 or most < 1:
        raise BadInput(f"temperature {temperature}, top_p {top_p}, most {most}: give temperature >= 0 (0: the most likely token), 0 < top_p <= 1, most >= 1")
    table = model.embed_tokens.weight
    if known is not None and known > len(table):
        raise BadInput(f"the tokenizer has {known} ids and the model's table {len(table)} rows: they do not belong together")
    prompts = [torch.as_tensor(p, device=table.device) for p in prompts]
    longest, context = max(map(len, prompts)), model.cfg.context
    if longest >= context or not min(map(len, prompts)):
        raise BadInput(f"a prompt of {longest if longest >= context else 0} tokens, visual ones included; give 1 to {context - 1}: the model's context is {context}")
    if any(p.dim() == 2 for p in prompts):
        prompts = [p.to(table.dtype) if p.dim() == 2 else model.embed_tokens(p) for p in prompts]
    x, mask = pad(prompts, side)
    mask = None if mask.all() else mask
    most = min(most, context - longest)
    cache = Cache(model.cfg, len(prompts), x.shape[1] + most, table.device, table.dtype)
    dice, ended = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))], [False] * len(prompts)
    logits = model(x, mask=mask, cache=cache, last=True) if x.dim() == 2 else model(embeddings=x, mask=mask, cache=cache, last=True)
    for n in range(most):
        chance = torch.cat([torch.rand(1, generator=one) for one in dice]).to(table.device)
        ids = pick(logits[:, :known].float(), temperature, top_p, chance)
        ended = [over or i in stop for over, i in zip(ended, ids.tolist())]
        yield [None if over else i for over, i in zip(ended, ids.tolist())]
        if all(ended) or n + 1 == most:
            return
        logits = model(ids[:, None], cache=cache, last=True)


def generate(model, prompts, most=256, temperature=0.0, top_p=1.0, stop=(), seed=0, known=None, side="left"):
    """-> for each prompt the list of ids that follow it, without the stop token. Arguments: steps."""
    rows = zip(*steps(model, prompts, most, temperature, top_p, stop, seed, known, side))
    return [[i for i in row if i is not None] for row in rows]


def whole_characters(pieces):
    """Pieces of UTF-8, cut anywhere -> pieces of text, never half a character. What is no UTF-8, also at the very end: U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", True):
        yield text


def stream(model, encoding, prompt, most=256, temperature=0.0, top_p=1.0, seed=0):
    """The answer to one prompt (ids or embeddings, see steps), as text, while it is made. It ends with the turn."""
    stop = {special(encoding, TURN_END), special(encoding, END)}
    ids = (row[0] for row in steps(model, [prompt], most, temperature, top_p, stop, seed, encoding.n_vocab))
    yield from whole_characters(encoding.decode_single_token_bytes(i) for i in ids if i is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Vision: SigLIP2
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SigLIP2Config:
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    patch: int = 16
    image: int = 224                 # side of the pictures that the position table was learnt on
    eps: float = 1e-6

    def __post_init__(self):
        check_whole(self, "width", "layers", "heads", "mlp", "patch", "image")
        if self.patch > self.image:
            raise ValueError(f"patch = {self.patch} is larger than image = {self.image}")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")

    @property
    def side(self):
        return self.image // self.patch                          # 378 / 14: 27


SIGLIPS = {
    "base":   SigLIP2Config(width=768,  layers=12, heads=12, mlp=3072, patch=16, image=224),
    "so400m": SigLIP2Config(width=1152, layers=27, heads=16, mlp=4304, patch=14, image=378),
}


class VisionLayer(nn.Module):
    """Pre-norm: (1) attention among all patches, (2) an MLP with the tanh form of GELU."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, linear = cfg.heads, lambda: nn.Linear(cfg.width, cfg.width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(cfg.width, cfg.eps), nn.LayerNorm(cfg.width, cfg.eps)
        self.self_attn = nn.ModuleDict(dict(q_proj=linear(), k_proj=linear(), v_proj=linear(), out_proj=linear()))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(cfg.width, cfg.mlp), fc2=nn.Linear(cfg.mlp, cfg.width)))

    def forward(self, x):
        y, a = self.layer_norm1(x), self.self_attn
        q, k, v = (rearrange(a[name](y), "b n (a c) -> b a n c", a=self.heads) for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v)              # softmax over all patches of the picture
        x = x + a["out_proj"](rearrange(y, "b a n c -> b n (a c)"))                                  # 1
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))                     # 2


# A published SigLIP2 holds a text tower, a head that pools the patches to one vector, and the temperature of their contrast: none is read here
SIGLIP_NAMES = [(r"text_model\..+|logit_scale|logit_bias|(?:vision_model\.)?head\..+", None), (r"vision_model\.(.+)", r"\1")]


class SigLIP2(nn.Module):
    """The vision tower of SigLIP and SigLIP2 (fixed size): patches -> linear -> + learned positions -> pre-norm transformer -> LayerNorm.

    features(x (b, 3, H, W) normalised) -> (b, n, d), n = H/p·W/p row by row: the last block, after the post LayerNorm, as the hub's
    last_hidden_state; post_norm=False: before it, as the published TrajVLM reads them (SPECS 5).
    forward(video uint8 (b, t, H, W, 3)) -> (b, t, n, d): pixels to [-1, 1] (mean and deviation 0.5), then features.
    Another size than the table's: positions are interpolated (bicubic)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.embeddings = nn.ModuleDict(dict(patch_embedding=nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch), position_embedding=nn.Embedding(cfg.side ** 2, cfg.width)))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(VisionLayer(cfg) for _ in range(cfg.layers))))
        self.post_layernorm = nn.LayerNorm(cfg.width, cfg.eps)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                end = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 if "position" in name else p[0].numel() ** -0.5 / (math.sqrt(2 * cfg.layers) if end else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """A hub folder: the whole SigLIP2 (its text tower and pooling head are left out) or its vision tower alone. Strict: BadInput."""
        cfg = siglip_config(folder)
        with published_weights(folder) as weights:
            with torch.device("meta"):
                model = cls(cfg)
            return fit_published(model, rename(weights, SIGLIP_NAMES), folder, dtype, device)

    def positions(self, h, w):
        table, side = self.embeddings["position_embedding"].weight, self.cfg.side
        if (h, w) == (side, side):
            return table
        grid = rearrange(table, "(h w) d -> 1 d h w", h=side)
        return rearrange(F.interpolate(grid.float(), size=(h, w), mode="bicubic", align_corners=False), "1 d h w -> (h w) d").to(table.dtype)

    def features(self, x, post_norm=True):
        p = self.cfg.patch
        if x.shape[-2] < p or x.shape[-1] < p:
            raise ValueError(f"a picture of {x.shape[-2]} x {x.shape[-1]} pixels holds no patch of {p} x {p}")
        x = self.embeddings["patch_embedding"](x)                # pixels beyond the last whole patch are not seen
        x = rearrange(x, "b d h w -> b (h w) d") + self.positions(*x.shape[-2:])
        for layer in self.encoder["layers"]:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(x)
        return self.post_layernorm(x) if post_norm else x

    def forward(self, video, post_norm=True):
        if video.dtype != torch.uint8 or video.dim() != 5 or video.shape[-1] != 3:
            raise ValueError(f"video must be uint8 (b, t, H, W, 3), not {video.dtype} {tuple(video.shape)}")
        x = rearrange(video, "b t h w c -> (b t) c h w").float() / 127.5 - 1
        return rearrange(self.features(x.to(self.post_layernorm.weight.dtype), post_norm), "(b t) n d -> b t n d", b=len(video))


def siglip_config(folder):
    """config.json of a hub SigLIP or SigLIP2 of fixed size, whole or its vision tower -> SigLIP2Config. What it leaves out has the hub's default."""
    config, path = read_config(folder, ("siglip", "siglip_vision_model"), "a SigLIP2 of fixed size"), Path(folder) / "config.json"
    vision = config.get("vision_config", {}) if config["model_type"] == "siglip" else config
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or vision.get("num_channels", 3) != 3:
        raise BadInput(f"{path}: hidden_act {vision.get('hidden_act')!r}, num_channels {vision.get('num_channels')}: not computed here; give a SigLIP2")
    names = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp="intermediate_size", patch="patch_size", image="image_size",
                 eps="layer_norm_eps")
    try:
        return SigLIP2Config(**{ours: vision[theirs] for ours, theirs in names.items() if theirs in vision})
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Configuration of a run
# ---------------------------------------------------------------------------------------------------------------------

CONNECTORS = ("trajtok", "patch", "blind", "oracle")
DESCRIBE = "Describe the video."
FPS = 8.0                                                        # of made clips


@dataclass(frozen=True)
class VLMConfig:
    """Trains TrajVLM and what it is compared with: the same decoder on pooled patches, on no video at all, on true trajectories."""
    size: str = "nano"                          # one of VLM_SIZES: nano, 0.6b, 1.7b, 4b
    data: str = "world"                         # `world` (made stories) or a manifest whose rows hold questions: `conversations` (LLaVA's form) or `qa`
    captions: str | None = None                 # a manifest of captioned videos for the first stage; default: the captions of --data
    name: str | None = None                     # runs are out/vlm-<name>-<connector>-<seed>; default: the size, and of real data the folder's name
    out: str = "out"                            # where runs are kept
    connector: str = "trajtok,patch,blind"      # what is trained, with commas: trajtok, patch, blind (no video), oracle (true masks; --data world)
    seeds: str = "0,1,2"                        # each of them with these seeds, with commas
    # the parts
    decoder: str | None = None                  # a published Qwen3 folder; nano's default, or `random`: random weights in the size's shape
    vision: str | None = None                   # a published SigLIP2 folder; default (nano): the segmenter's own features
    tokenizer: str | None = None                # a published Qwen3 folder, or `world` (learnt from made texts); default: the decoder's folder, of random weights `world`
    segmenter: str | None = None                # a folder of trajtok.py or train_clip.py, or a file that the authors released; default: pre-trained first, on made clips
    layers: int | None = None                   # of the decoder, where no folder gives it; default: the size's
    width: int | None = None                    # of the decoder, likewise
    # what is seen
    frames: str = "8,16,32,64"                  # frames of a clip; of made stories several, with commas: a step takes one of them
    window: int = 8                             # frames that have trajectories of their own, and one time stamp; 0: the whole clip
    image_size: int | None = None               # pixels of a side for the segmenter; default: what it was trained on
    num_queries: int = 16                       # K, trajectories of a window at most, of a segmenter that is pre-trained here
    tokens_per_trajectory: int = 1              # 1, 2 or 4
    patch_grid: str | None = None               # patch: time,height,width of a window's tokens; default: the least that is as many as trajtok's on average
    max_objects: int = 4                        # of made stories
    clips: int = 600                            # made stories to learn from, of the shortest length; of n times the length 1 / sqrt(n) as many
    # the training: stage 1 on captions, stage 2 on questions
    caption_steps: int = 0                      # steps of stage 1
    steps: int = 480                            # steps of stage 2
    batch: int = 16                             # clips a step of each process, with all their questions
    row: int = 0                                # clips are packed into rows of so many tokens; 0: as long as the longest clip's
    rates: str = "2e-3,0,2e-3"                  # stage 1: learning rates of connector, vision, decoder; 0: frozen
    sft_rates: str = "2e-3,0,2e-3"              # stage 2: likewise
    warmup: int = 20                            # steps of linear warm-up, of each stage; then a cosine to 1 %
    weight_decay: float = 0.02                  # on matrices
    clip: float = 1.0                           # largest gradient norm
    segmenter_steps: int = 200                  # of the segmenter that is pre-trained here
    seed: int = 0                               # of the segmenter that is pre-trained here; a row's own is one of --seeds
    workers: int = 0                            # processes that decode videos; 0: in the training process
    save_every: int = 100                       # steps between checkpoints
    # how it is computed
    device: str = "auto"                        # cpu, cuda, ...
    processes: int = 0                          # training processes on this machine; 0: one for each GPU, without GPUs one. Weights are sharded (FSDP2)
    bf16: bool | None = None                    # matrix products in bfloat16; default: on a GPU
    recompute: bool = False                     # keep no activations of vision and decoder: compute them again in the backward pass
    # the evaluation
    eval_clips: int = 96                        # held-out stories of each length
    eval_split: str = "test"                    # of made stories: test, or validation to choose a recipe by
    resume: bool = False                        # go on with the runs of this name, exactly; what is finished is kept
    overwrite: bool = False                     # start again over runs of this name
    results: str = "results"                    # folder for the table and its picture

    def __post_init__(self):
        names = self.connector.split(",")
        if unknown := [n for n in names if n not in CONNECTORS]:
            raise BadInput(f"--connector {self.connector}: no {unknown[0]!r}; {', '.join(CONNECTORS)}, several with commas")
        for field, form, what in (("seeds", r"\d{1,9}(,\d{1,9})*", "whole numbers, with commas"), ("frames", r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", "whole numbers from 1 on, with commas"),
                                  ("patch_grid", r"[1-9]\d*,[1-9]\d*,[1-9]\d*", "three whole numbers, e.g. 2,2,2")):
            if getattr(self, field) is not None and not re.fullmatch(form, getattr(self, field)):
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: {what}")
        for field in ("rates", "sft_rates"):
            try:
                fits = len(numbers(getattr(self, field), float)) == 3 and all(0 <= r < 1 for r in numbers(getattr(self, field), float))
            except ValueError:
                fits = False
            if not fits:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: three numbers from 0 (frozen) to 1, with commas: connector, vision, decoder")
        for field, least in (("batch", 1), ("steps", 1), ("save_every", 1), ("clips", 1), ("eval_clips", 1), ("segmenter_steps", 1), ("num_queries", 1), ("max_objects", 1),
                             ("caption_steps", 0), ("row", 0), ("warmup", 0), ("window", 0), ("workers", 0), ("processes", 0), ("weight_decay", 0), ("seed", 0)):
            if not least <= getattr(self, field) < math.inf:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least {least}")
        if self.tokens_per_trajectory not in (1, 2, 4):
            raise BadInput(f"--tokens-per-trajectory {self.tokens_per_trajectory}: one of 1, 2, 4")
        for field in ("layers", "width", "image_size"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 1")
        if not 0 < self.clip < math.inf:
            raise BadInput(f"--clip {self.clip}: above 0")
        for field, count in (("rates", self.caption_steps), ("sft_rates", self.steps)):          # the blind row has neither connector nor vision
            connector, vision, decoder = numbers(getattr(self, field), float)
            if count and not decoder and ("blind" in names or not connector and not (vision and self.vision)):
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: leaves {'the blind row ' if 'blind' in names else ''}nothing to train in this stage; "
                               f"give a rate above 0, {'leave blind out of --connector, ' if 'blind' in names else ''}or no steps")
        if wrong := [t for t in numbers(self.frames) if self.window and t > self.window and t % self.window]:
            raise BadInput(f"--frames {wrong[0]}: a multiple of --window {self.window}, e.g. {max(wrong[0] // self.window, 1) * self.window}, or fewer than it")
        if self.eval_split not in ("test", "validation"):
            raise BadInput(f"--eval-split {self.eval_split}: test or validation")
        if self.data != "world" and ("oracle" in names or len(numbers(self.frames)) > 1):
            raise BadInput(f"--data {self.data}: true masks (oracle) and several lengths are of made stories; give one number with --frames, and other connectors")
        if self.data == "world" and self.vision:
            raise BadInput(f"--vision {self.vision}: made stories are looked at once, through the segmenter; leave it out, or give films with --data")
        if self.data == "world" and min(numbers(self.frames)) < 8:
            raise BadInput(f"--frames {self.frames}: a made story has at least 8 frames")


# CHOICE: rates as published for a decoder and a vision tower that have learnt (SPECS 5): connector, vision, decoder; nano trains all from nothing, and goes
# straight to the questions: of 480 steps of trajtok 100 on captions first brought 49.8 % of 1232 validation questions, none 57.1 % (chance 34.2 %; one seed).
#  size         frames and windows                        training
FULL = dict(frames="64", window=8, num_queries=128, connector="trajtok", seeds="0", batch=8, row=8192, caption_steps=2000, steps=10_000, warmup=300, save_every=500,
            rates="2e-4,6e-6,2e-5", sft_rates="5e-6,5e-6,1e-5", weight_decay=0.0, recompute=True)
VLM_SIZES = {"nano": dict(layers=3), "0.6b": FULL, "1.7b": FULL, "4b": FULL}
VLM_SIZES = {name: {"size": name, **values} for name, values in VLM_SIZES.items()}


def numbers(text, kind=int):
    """"8,16" -> [8, 16]"""
    return [kind(part) for part in text.split(",")]


# ---------------------------------------------------------------------------------------------------------------------
# Connectors
# ---------------------------------------------------------------------------------------------------------------------

class Places(nn.Module):
    """Features (v, t, h, w, d) -> LayerNorm, what all of them share taken off (of the segmenter's features; SigLIP2's, which may learn, stay as they are), + a
    learned code of row, column and frame within the window. CHOICE: SigLIP2's features know their place in the picture, a ConvNeXt's hardly, and none the
    frame; a token is a mean of values, and rotary keys only decide of which."""

    def __init__(self, dim, window, side):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("mean", torch.zeros(dim))           # of a normed feature, channel by channel, see calibrate
        self.register_buffer("deviation", torch.ones(dim))

        def codes(n):                                            # sines and cosines of the place, each twice as large as a normed feature: a thing that moves a cell must change
            angle = (torch.arange(n) + 0.5)[:, None] / n * math.pi * torch.arange(1, 5)
            return nn.Parameter(2 * math.sqrt(dim) * fourier_codes(torch.cat((angle.sin(), angle.cos()), 1), dim))
        self.frame, self.row, self.column = codes(window), codes(side), codes(side)

    @torch.no_grad()
    def calibrate(self, features):
        """Frozen features (v, t, h, w, d) of the first batch, in all processes: their mean and deviation will be taken off each channel. CHOICE: the mean of a nano
        segmenter's normed features is 0.91 as long as they are (|mean| / sqrt d of the default run); a decoder that starts from nothing, and has minutes,
        does not see the colours beside it.
        A channel's deviation counts as 0.1 at least: a first batch that shows nothing must not make what comes later huge."""
        x = F.layer_norm(features.float(), features.shape[-1:]).flatten(0, -2).cpu().double()
        count, *sums = total([len(x), *x.sum(0).tolist(), *x.square().sum(0).tolist()], features.device)
        mean, square = torch.tensor(sums, dtype=torch.float64).div(count).chunk(2)
        self.mean.copy_(mean)
        self.deviation.copy_((square - mean ** 2).clamp(min=1e-2).sqrt())

    def forward(self, x):
        x = self.norm(x.to(self.row.dtype))
        return (x - self.mean.to(x.dtype)) / self.deviation.to(x.dtype) + self.frame[:x.shape[1], None, None] + self.row[:, None] + self.column


class Project(nn.Module):
    """SwiGLU from d to the decoder's width, + a linear map of sines of the window's number in its clip. Its output begins as large as a row of the decoder's
    table of words: both enter the same stream. CHOICE: the time stamp tells the same in words; but a token would have to read it first, a layer of
    attention that a small decoder has not to spare."""

    def __init__(self, dim, width):
        super().__init__()
        self.register_buffer("waves", 64 ** -torch.linspace(0, 1, 8), persistent=False)
        self.when = nn.Linear(16, width, bias=False)
        nn.init.normal_(self.when.weight, std=(8 * width) ** -0.5)
        self.norm = nn.LayerNorm(dim)
        self.gate, self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, width)
        nn.init.normal_(self.down.weight, std=8 * (4 * dim * width) ** -0.5)     # silu(a) b, of a and b with variance 1/3, is small
        nn.init.zeros_(self.down.bias)

    def forward(self, x, window):                                # (N, d), (N,) -> (N, width)
        x, angle = self.norm(x), window[:, None] * self.waves
        return self.down(F.silu(self.gate(x)) * self.up(x)) + self.when(torch.cat((angle.sin(), angle.cos()), 1))


class TrajectoryConnector(nn.Module):
    """features (v, t, h, w, d) of v windows, ids (v, t, h, w): the trajectory of each point, -1 = of none; window (v,): its number in its clip
    -> tokens (N, width), window after window, of live trajectories only, by number; each trajectory has m of them.
    CHOICE: a token starts at the mean under the hard mask: the soft mean's gradient would go into a segmenter that is frozen here."""

    def __init__(self, dim, window, side, num_queries, m, width):
        super().__init__()
        heads = next(a for a in (8, 4, 2, 1) if dim % a == 0 and dim // a >= 16)
        self.m, self.places = m, Places(dim, window, side)
        self.encoder = TrajectoryEncoder(TrajTokConfig(dim=dim, num_queries=num_queries, depth=2, heads=heads, max_tokens=m, out_dim=dim))
        self.project = Project(dim, width)

    def counts(self, ids):
        """How many tokens each window will have (v,)."""
        K = self.encoder.cfg.num_queries
        return self.m * torch.zeros(len(ids), K + 1, dtype=torch.int64, device=ids.device).scatter_(1, ids.flatten(1).long() + 1, 1)[:, 1:].sum(1)

    def forward(self, features, ids, window):
        x, ids, K = self.places(features).flatten(1, 3), ids.flatten(1).long(), self.encoder.cfg.num_queries
        owned = one_hot(ids, K)                                  # (v, n, K)
        latents = self.encoder.start(*soft_sums(owned, x), None, self.m).to(x.dtype)
        tokens = self.encoder.finish(self.encoder.perceiver(latents, x, ids), owned.any(1))
        return self.project(tokens.z[tokens.mask], window.repeat_interleave(tokens.mask.sum(1)))


class PatchConnector(nn.Module):
    """PatchVLM: features (v, t, h, w, d) -> means over the cells of a (t', h', w') grid -> tokens (v t' h' w', width), in that order."""

    def __init__(self, dim, window, side, grid, width):
        super().__init__()
        self.grid, self.places, self.project = grid, Places(dim, window, side), Project(dim, width)

    def counts(self, ids):
        return torch.full((len(ids),), math.prod(self.grid), device=ids.device)

    def forward(self, features, ids, window):
        x = rearrange(self.places(features), "v t h w d -> v d t h w")
        return self.project(rearrange(F.adaptive_avg_pool3d(x, self.grid), "v d t h w -> (v t h w) d"), window.repeat_interleave(math.prod(self.grid)))


def patch_grid(tokens, window, side):
    """The grid (t', h', w') of at least `tokens` cells for a window. As many frames as possible are kept apart, but not at the price of space: at least
    2 x 2 cells. 128 tokens of 8 frames: 8 x 4 x 4, which is pooling in space alone, as PatchVLM's; 7 tokens: 2 x 2 x 2."""
    h = min(max(math.ceil(math.sqrt(tokens / window)), 2), side)
    return next((t, h, h) for t in range(1, window + 1) if window % t == 0 and (t * h * h >= tokens or t == window))


class VLM(nn.Module):
    """Decoder, connector (blind: None) and, where it is not the segmenter that gives the features, vision."""

    def __init__(self, decoder, connector=None, vision=None):
        super().__init__()
        self.decoder, self.connector, self.vision = decoder, connector, vision

    def embed(self, rows, features=None, ids=None, window=None, video=None):
        """Rows -> (b, s, w), visual tokens where they belong. window (v,); ids (v, t, h, w); features (v, t, h, w, d), or video uint8 (v, t, H, W, 3) for vision."""
        x = self.decoder.embed_tokens(rows.ids)
        if self.connector is None or ids is None:
            return x
        if features is None:
            features = self.vision(resize(video, self.vision.cfg.image), post_norm=False)
            features = rearrange(features, "v t (h w) d -> v t h w d", h=self.vision.cfg.side)
        tokens = self.connector(features, ids, window).to(x.dtype)
        return torch.where((rows.token >= 0)[..., None], tokens[rows.token.clamp(min=0)], x)

    def forward(self, rows, features=None, ids=None, window=None, video=None, logits=False):
        """-> -log p of each target (n,) float32, row by row; or logits (n, vocabulary) where the targets are."""
        x = self.embed(rows, features, ids, window, video)
        more = dict(where=rows.targets >= 0) if logits else dict(targets=rows.targets)
        return self.decoder(embeddings=x, positions=rows.positions, mask=rows.mask, **more)


def resize(video, size):
    """uint8 (v, t, H, W, 3) -> the same at size x size."""
    if video.shape[2:4] == (size, size):
        return video
    x = F.interpolate(rearrange(video, "v t h w c -> (v t) c h w").float(), size=(size, size), mode="bilinear", antialias=True)
    return rearrange(x.round().clamp(0, 255).to(torch.uint8), "(v t) c h w -> v t h w c", v=len(video))


@torch.no_grad()
def perceive(segmenter, video, size, side):
    """Windows uint8 (v, t, H, W, 3) -> the segmenter's features (v, t, h, w, d), pooled to side x side, and the trajectory of each such cell (v, t, h, w).
    PAPER (SPECS 5): the logits are resized to the vision grid, bilinearly, and then the argmax is taken."""
    seg = segmenter(resize(video, size))
    t, h, w = seg.grid
    logits = F.interpolate(rearrange(seg.logits.float(), "v (t h w) k -> (v t) k h w", t=t, h=h), size=(side, side), mode="bilinear", align_corners=False)
    features = F.adaptive_avg_pool2d(rearrange(seg.features, "v (t h w) d -> (v t) d h w", t=t, h=h), side)
    return rearrange(features, "(v t) d h w -> v t h w d", t=t), rearrange(logits.argmax(1), "(v t) h w -> v t h w", t=t)


# ---------------------------------------------------------------------------------------------------------------------
# Sequences: a video once, and beside each other all that is asked about it
# ---------------------------------------------------------------------------------------------------------------------

def stamp(begin, end):
    """Seconds of a window's first and last frame, as text."""
    return f"<{begin:.1f}-{end:.1f}s>"


def stamps(times, window):
    return [stamp(times[i], times[min(i + window, len(times)) - 1]) for i in range(0, len(times), window)]


class Piece(NamedTuple):
    """Part of a sequence. code: 0 = the beginning that all share; 64 q = question q; 64 q + o = answer o to it. A position reads the pieces
    that its own continues, and the earlier ones of its own. start: its first position."""
    code: int
    start: int
    ids: list
    spoken: list                    # True = a token that the loss, or the score, is on


def visual(encoding, marks, counts):
    """What stands before the question: of each window its time stamp and a place for each of its tokens. Blind: nothing."""
    return [part for mark, n in zip(marks, counts) for part in (mark, *[special(encoding, VIDEO)] * int(n))]


MOST_OPTIONS = 63                                                # talk q has the code 64 q, its option o 64 q + o


def sequence(encoding, marks, counts, talks, options=None):
    """One clip: marks, time stamps of its windows; counts, visual tokens of each; talks: lists of turns dict(question, answer).
    options: of each talk a list of answers to its last question, scored one by one; None: all answers of a talk are learnt. -> list of Pieces.
    Each talk is tokenised as chat() would the whole of it, so what is shared changes nothing."""
    seen, video, pieces = visual(encoding, marks, counts), special(encoding, VIDEO), []
    for q, talk in enumerate(talks, 1):
        turns = [dict(role=role, content=turn[key]) for turn in talk for role, key in (("user", "question"), ("assistant", "answer"))]
        turns[0] = turns[0] | dict(content=[*seen, turns[0]["content"]])
        ids, spoken = chat(encoding, turns) if options is None else chat(encoding, turns[:-1], answer=True)
        if not pieces:                                           # up to the last visual token; of a blind clip the turn's first token
            shared = max((i for i, one in enumerate(ids) if one == video), default=0) + 1
            pieces.append(Piece(0, 0, ids[:shared], [False] * shared))
        end = len(ids) - 1                                       # learnt: the newline after the last turn is never read; scored: see below
        pieces.append(Piece(64 * q, shared, ids[shared:end], [s and options is None for s in spoken[shared:end]]))
        for o, text in enumerate(options[q - 1] if options else (), 1):
            own = encode(encoding, [text, special(encoding, TURN_END)])              # each begins with the token that predicts its first one
            pieces.append(Piece(64 * q + o, end, [ids[-1], *own], [False] + [True] * len(own)))
    return pieces


def check_length(pieces, spans, parts, where):
    """A clip with its longest question that does not fit into the decoder's context: BadInput, with the number of frames that would.
    spans: tokens of each window, its time stamp included."""
    longest, context = max(p.start + len(p.ids) for p in pieces), parts.decoder.context
    if longest <= context:
        return
    rest = longest - sum(spans)                                  # of the longest question, its answer, and the turns' own
    fits = int((np.cumsum(spans) <= context - rest).sum()) if spans else 0
    if not fits:
        raise BadInput(f"{where}: a question of {rest} tokens, answer included, and a context of {context}" + (", which leaves no room for a window of video" if spans else "") + "; shorten it")
    raise BadInput(f"{where}: {longest} tokens, {sum(spans)} of them for {len(spans)} windows of video, and a context of {context}: give at most {fits * parts.window} frames")


class Rows(NamedTuple):
    """Sequences, packed. targets stand where they are predicted."""
    ids: torch.Tensor               # int64 (b, s)
    token: torch.Tensor             # int64 (b, s): which visual token stands here, -1 = a word
    positions: torch.Tensor         # int64 (b, s)
    targets: torch.Tensor           # int64 (b, s), -1 = none
    mask: torch.Tensor              # bool (b, s, s), True = position i reads position j
    group: torch.Tensor             # int64 (n,) of the n targets, row by row: number of the piece they belong to, over all clips


def first_fit(lengths, row):
    """Sequences of these lengths into rows of at most `row` tokens: the longest first, each into the first row that has room. -> lists of numbers."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(row)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def lay_out(clips, video, row=0, device="cpu"):
    """Clips (lists of Pieces) -> Rows. video: the id of visual places. Clips do not see each other, nor does a question the other questions."""
    flat, tokens, groups = [], 0, 0
    for number, pieces in enumerate(clips):
        ids, spoken = ([x for p in pieces for x in getattr(p, key)] for key in ("ids", "spoken"))
        each = [len(p.ids) for p in pieces]
        ids, spoken = np.array(ids), np.array(spoken)
        place, token = ids == video, np.full(len(ids), -1)
        token[place] = tokens + np.arange(place.sum())
        tokens += int(place.sum())
        position = np.concatenate([np.arange(p.start, p.start + n) for p, n in zip(pieces, each)])
        target = np.where(np.append(spoken[1:], False), np.append(ids[1:], -1), -1)                   # the first token of a piece is never spoken
        flat.append((ids, token, position, target, np.repeat([p.code for p in pieces], each), np.full(len(ids), number), groups + np.repeat(np.arange(len(pieces)), each)))
        groups += len(pieces)
    lengths = [len(one[0]) for one in flat]
    rows = first_fit(lengths, max(row, *lengths))
    table = np.full((7, len(rows), max(sum(lengths[i] for i in r) for r in rows)), -1)               # padding: of clip -1
    for r, some in enumerate(rows):
        table[:, r, :sum(lengths[i] for i in some)] = np.concatenate([flat[i] for i in some], 1)
    ids, token, position, target, code, clip, group = torch.from_numpy(table).to(device)
    s = ids.shape[1]
    here = torch.arange(s, device=device)
    i, j = code[:, :, None], code[:, None]
    seen = (clip[:, :, None] == clip[:, None]) & (here[:, None] >= here) & ((j == i) | (j == i // 64 * 64) | (j == 0))
    seen |= torch.eye(s, dtype=torch.bool, device=device)        # padding reads itself: a softmax over nothing would be NaN
    return Rows(ids.clamp(min=0), token, position.clamp(min=0), target, seen, group[target >= 0])


# ---------------------------------------------------------------------------------------------------------------------
# Clips and what is asked about them
# ---------------------------------------------------------------------------------------------------------------------

def story_world(cfg, frames):
    return data.World(64, frames, cfg.max_objects, shared_colours=False, acts=max(1, frames // 8), story=True)      # an act a second


class Stories(NamedTuple):
    """Made stories of one length, looked at once: the segmenter is frozen, so what it sees of them never changes."""
    features: torch.Tensor          # float16 (n, windows, t, h, w, d)
    ids: torch.Tensor               # int16 (n, windows, t, h, w): the segmenter's trajectories
    truth: torch.Tensor             # int16, the true ones
    qa: list                        # of each clip its questions
    captions: list
    times: list                     # seconds of each frame, of all clips


def windowed(x, window):
    """(b, T, ...) -> (b·windows, t, ...)"""
    return x if not window or x.shape[1] <= window else x.unflatten(1, (-1, window)).flatten(0, 1)


def renumbered(truth, K, seed):
    """True labels (v, t, h, w), -1 = none, each window's in an order of its own. A made clip's labels are in order of depth, the subject's always last, and the
    same in all windows: a code learnt for a number would tell what no segmenter can."""
    order = torch.stack([torch.from_numpy(np.random.default_rng((seed, i)).permutation(K)) for i in range(len(truth))]).to(truth.device)
    return torch.where(truth < 0, truth, order.gather(1, truth.clamp(min=0).flatten(1)).view_as(truth))


def look_at_stories(cfg, segmenter, size, side, frames, first, count, device):
    """Stories first .. first + count - 1 of so many frames, drawn and segmented a few at a time -> Stories."""
    world, parts, qa, captions = dataclasses.replace(story_world(cfg, frames), size=size), [], [], []
    for i in tqdm(range(0, count, max(256 // frames, 1)), desc=f"{frames} frames", leave=False, disable=None):
        scripts = [data.script(first + j, world) for j in range(i, min(i + max(256 // frames, 1), count))]
        qa, captions = qa + [s["qa"] for s in scripts], captions + [s["caption"] for s in scripts]
        video, labels = (windowed(x, cfg.window) for x in data.rasterise(data.stack(scripts), size, device))
        with precision(device, cfg.bf16):
            features, ids = perceive(segmenter, video, size, side)
        truth = labels_on_grid(labels, (video.shape[1], side, side), segmenter.cfg.num_queries).view(ids.shape)
        truth = renumbered(truth, segmenter.cfg.num_queries, first + i)
        parts.append([x.unflatten(0, (len(scripts), -1)).cpu() for x in (features.to(torch.float16), ids.to(torch.int16), truth.to(torch.int16))])
    return Stories(*(torch.cat(x) for x in zip(*parts)), qa, captions, [i / FPS for i in range(frames)])


class Films(torch.utils.data.Dataset):
    """Batch i of real clips, their talks and captions: epoch i // len, in an order drawn from (seed, epoch). Frames are spread over the
    whole video. A file that cannot be used is listed in `bad`, and its place is empty."""

    def __init__(self, entries, frames, size, batch, seed=0, train=True):
        self.entries, self.frames, self.size, self.batch, self.seed, self.train = entries, frames, size, batch, seed, train

    def __len__(self):
        return -(-len(self.entries) // self.batch)

    def __getitem__(self, i):
        epoch, at = divmod(i, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.entries)) if self.train else np.arange(len(self.entries))
        videos, times, kept, bad = [], [], [], []
        for j in order[at * self.batch:(at + 1) * self.batch]:
            entry = self.entries[j]
            try:
                video, seconds, _ = data.decode(entry["path"], 1 if entry["image"] else self.frames, self.size, places=False)
            except data.BadVideo as error:
                bad.append((entry["path"], str(error)))
                continue
            videos.append(torch.from_numpy(video))
            times.append([float(s) for s in seconds])
            kept.append(entry)
        return dict(video=videos, times=times, entries=kept, bad=bad)


def talks_of(entry):
    """What an entry of a manifest says of its video: lists of turns."""
    return [[qa] for qa in entry.get("qa", ())] + ([entry["talk"]] if "talk" in entry else [])


def described(caption):
    """A caption, or the first of several, as a talk."""
    return [[dict(question=DESCRIBE, answer=caption if isinstance(caption, str) else caption[0])]]


def options_of(turn, pool, seed):
    """Answers to choose from: the question's own, or its answer and three more to questions of its type, drawn from (seed)."""
    if turn.get("options"):
        return turn["options"]
    others = sorted({a for a in pool.get(turn.get("type", ""), ()) if a != turn["answer"]})
    rng = np.random.default_rng(seed)
    mixed = [turn["answer"], *(others[i] for i in rng.permutation(len(others))[:3])]
    return [mixed[i] for i in rng.permutation(len(mixed))]


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a model
# ---------------------------------------------------------------------------------------------------------------------

class Parts(NamedTuple):
    """What the rows of a comparison share."""
    encoding: object                # a tiktoken Encoding
    segmenter: nn.Module            # frozen
    shape: TrajTokConfig            # its, with the pixels of a side that it sees
    vision: nn.Module | None        # None: the segmenter's own features
    decoder: DecoderConfig
    dim: int                        # d: width of the features
    side: int                       # h = w: cells of a side of the vision grid
    window: int                     # frames of a window


def pretrained_segmenter(cfg):
    """The folder of the segmenter that --segmenter leaves out: pre-trained on made clips of one window, once; what is there is kept."""
    argv = dict(name=f"vlm-{run_name(shim(cfg))}", out=cfg.out, num_queries=cfg.num_queries, max_objects=cfg.max_objects, steps=cfg.segmenter_steps, seed=cfg.seed, device=cfg.device,
                warmup=min(20, cfg.segmenter_steps // 2), eval_clips=32, **({"image_size": cfg.image_size} if cfg.image_size else {}))
    folder = Path(cfg.out) / f"segmenter-{argv['name']}"
    if (folder / "result.json").exists() and (ranks()[1] > 1 or not cfg.overwrite):
        return folder
    if ranks()[1] > 1:
        raise BadInput("several processes: the segmenter is pre-trained by one; run `python trajtok.py pretrain`, and give its folder with --segmenter")
    again = ["--overwrite"] if cfg.overwrite else ["--resume"] if (folder / "config.json").exists() else []
    trajtok.pretrain([str(x) for key, value in argv.items() for x in (f"--{key.replace('_', '-')}", value)] + ["--no-shared-colours", *again])
    return folder


def shim(cfg):
    """What trajtok.run_name asks of a configuration."""
    return types.SimpleNamespace(name=cfg.name, size=cfg.size, data=cfg.data, mix=None)


def published(cfg):
    return cfg.decoder not in (None, "random")


def words_of(cfg):
    """The name of the tokenizer."""
    return cfg.tokenizer or (cfg.decoder if published(cfg) else "world")


def open_parts(cfg, device):
    if cfg.size != "nano" and not cfg.decoder or cfg.data != "world" and cfg.size != "nano" and not cfg.segmenter:
        raise BadInput(f"--size {cfg.size}: give --decoder FOLDER, --vision FOLDER and --segmenter FOLDER (`--decoder random`: random weights of that size, to see how fast it is)")
    shape = decoder_config(cfg.decoder) if published(cfg) else dataclasses.replace(DECODERS[cfg.size], **{k: getattr(cfg, k) for k in ("layers", "width") if getattr(cfg, k)})
    encoding = load_tokenizer(words_of(cfg))
    if encoding.n_vocab > shape.vocabulary:
        raise BadInput(f"--tokenizer {words_of(cfg)}: has {encoding.n_vocab} ids, the decoder's table {shape.vocabulary} rows; give the tokenizer that belongs to it")
    vision = SigLIP2.from_pretrained(cfg.vision, torch.float32) if cfg.vision else None
    folder = cfg.segmenter or pretrained_segmenter(cfg)
    if Path(folder).is_file():
        segmenter = load_official_segmenter(folder)
        tokenizer = dataclasses.replace(segmenter.cfg, frames=16)
    else:
        tokenizer, segmenter = tokenizer_config(folder), TrajTok.from_pretrained(folder).segmenter
    tokenizer = dataclasses.replace(tokenizer, **({"image_size": cfg.image_size} if cfg.image_size else {}))
    window = cfg.window or max(numbers(cfg.frames))
    side = vision.cfg.side if vision else tokenizer.image_size // 8          # CHOICE, nano: half the segmenter's grid, as 27 is half of 56 in the published one
    return Parts(encoding, segmenter.requires_grad_(False).eval().to(device), tokenizer, vision, shape, vision.cfg.width if vision else segmenter.cfg.dim, side, window)


def connector_of(name, parts, cfg, grid):
    if name == "blind":
        return None
    if name == "patch":
        return PatchConnector(parts.dim, parts.window, parts.side, grid, parts.decoder.width)
    return TrajectoryConnector(parts.dim, parts.window, parts.side, parts.segmenter.cfg.num_queries, cfg.tokens_per_trajectory, parts.decoder.width)


def build(cfg, parts, grid):
    """-> VLM with the row's connector, on the CPU."""
    decoder = Decoder.from_pretrained(cfg.decoder, torch.float32) if published(cfg) else Decoder(parts.decoder)
    model = VLM(decoder, connector_of(cfg.connector, parts, cfg, grid), None if cfg.connector == "blind" else copy.deepcopy(parts.vision))       # a row may train it: not the next one's
    decoder.recompute = cfg.recompute
    if model.vision is not None:
        model.vision.recompute = cfg.recompute
    return model


def optimizer_of(model, cfg, device):
    """AdamW; groups know their part (the loop sets their rates); weight decay on matrices only."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault((name.split(".")[0], p.dim() > 1), []).append(p)
    groups = [dict(params=ps, part=part, weight_decay=cfg.weight_decay if matrix else 0.0) for (part, matrix), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=device.type == "cuda" or None)


def set_rates(model, optimizer, step, cfg):
    """Stage and learning rates of this step; what has rate 0 in it gets no gradient. -> stage (0 captions, 1 questions), rates by part."""
    stage = int(step >= cfg.caption_steps)
    peaks = dict(zip(("connector", "vision", "decoder"), numbers(cfg.sft_rates if stage else cfg.rates, float)))
    begin, steps = (cfg.caption_steps, cfg.steps) if stage else (0, cfg.caption_steps)
    factor = learning_rate(step - begin, types.SimpleNamespace(lr=1.0, warmup=min(cfg.warmup, steps // 2), steps=steps))
    for group in optimizer.param_groups:
        group["lr"] = factor * peaks[group["part"]]
        for p in group["params"]:
            p.requires_grad_(peaks[group["part"]] > 0)
    return stage, {part: factor * peak for part, peak in peaks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Batches: what the model is given
# ---------------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    seen: dict                      # features, ids, video of all windows, and their numbers in their clips, clip after clip, as VLM.forward takes them; blind: nothing
    counts: list                    # of each clip, visual tokens of each window; blind: none
    marks: list                     # of each clip, time stamps of its windows
    talks: list                     # of each clip
    names: list                     # what to call each clip in a message


def from_stories(stories, chosen, name, model, parts, device, captions=False):
    """Clips number `chosen` of Stories -> Batch."""
    talks = [described(stories.captions[i]) if captions else [[qa] for qa in stories.qa[i]] for i in chosen]
    return with_counts(dict(features=stories.features[chosen].flatten(0, 1).float(), ids=(stories.truth if name == "oracle" else stories.ids)[chosen].flatten(0, 1)),
                       [stories.times] * len(chosen), talks, [f"story {i}" for i in chosen], model, parts, device)


def from_films(batch, model, parts, cfg, device, captions=False):
    """What Films gave -> Batch, or None if no file of it could be used."""
    if not batch["video"]:
        return None
    talks = [described(e["caption"]) if captions else talks_of(e) for e in batch["entries"]]
    video = [v.expand(parts.window, -1, -1, -1) if len(v) == 1 else v for v in batch["video"]]               # a picture is a window that stands still
    times = [t * parts.window if len(t) == 1 else t for t in batch["times"]]
    video = torch.cat([windowed(v[None], parts.window) for v in video]).to(device)
    with precision(device, cfg.bf16):
        features, ids = perceive(parts.segmenter, video, parts.shape.image_size, parts.side) if model.connector is not None else (None, None)
    seen = dict(ids=ids, **(dict(video=video) if model.vision is not None else dict(features=features)))
    return with_counts(seen, times, talks, [e["path"] for e in batch["entries"]], model, parts, device)


def with_counts(seen, times, talks, names, model, parts, device):
    if model.connector is None:
        return Batch({}, [[]] * len(talks), [[]] * len(talks), talks, names)
    marks = [stamps(t, parts.window) for t in times]
    counts = model.connector.counts(seen["ids"]).split([len(m) for m in marks])
    seen = seen | dict(window=torch.cat([torch.arange(len(m)) for m in marks]))
    return Batch({k: v.to(device) for k, v in seen.items()}, [c.tolist() for c in counts], marks, talks, names)


def rows_of(batch, parts, row, device, options=None):
    clips = [sequence(parts.encoding, m, c, t, o) for m, c, t, o in zip(batch.marks, batch.counts, batch.talks, options or [None] * len(batch.talks))]
    for pieces, m, c, name in zip(clips, batch.marks, batch.counts, batch.names):
        check_length(pieces, [n + len(parts.encoding.encode_ordinary(mark)) for mark, n in zip(m, c)], parts, name)
    return lay_out(clips, special(parts.encoding, VIDEO), row, device), clips


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: weights, gradients and optimizer are sharded (FSDP2)
# ---------------------------------------------------------------------------------------------------------------------

def shard_model(model, device, bf16):
    """fully_shard on each layer of decoder and vision, then on the rest: of a layer that does not work just now a process holds its share only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    low = device.type == "cuda" if bf16 is None else bf16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (ranks()[1],))
    for layer in (*model.decoder.layers, *(model.vision.encoder["layers"] if model.vision is not None else ())):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def save(run, model, optimizer, step):
    """The checkpoint before step number `step`. Of several processes each writes its shards into state-<step>/, and then state.json, renamed into
    place, says which folder counts."""
    if ranks()[1] == 1:
        return run.save(model, optimizer, step)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    folder, old = run.folder / f"state-{step}", read_state(run)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save(dict(model=weights, optimizer=moments), checkpoint_id=folder)
    dist.barrier()
    if not ranks()[0]:
        write_json(run.folder / "state.json", dict(step=step, folder=folder.name, processes=ranks()[1]))
        if old and old["folder"] != folder.name:
            shutil.rmtree(run.folder / old["folder"], ignore_errors=True)
    dist.barrier()


def read_state(run):
    path = run.folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else None


def restore(run, model, optimizer):
    """-> the step to begin with. A sharded checkpoint can be read by another number of processes; the clips of a step would be others."""
    if ranks()[1] == 1:
        if run.cfg.resume and read_state(run):
            raise BadInput(f"--resume: {run.folder} was made by {read_state(run)['processes']} processes; start as many")
        return run.restore(model, optimizer)
    dist.barrier()                                               # the first has looked at the folder, and may go on
    state = read_state(run) if run.cfg.resume else None
    if not state:
        return run.begin(0)
    if state["processes"] != ranks()[1]:
        raise BadInput(f"--resume: {run.folder} was made by {state['processes']} processes, now there are {ranks()[1]}; start as many")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    set_rates(model, optimizer, max(state["step"] - 1, 0), run.cfg)          # what was frozen then has no moments to be read
    weights, moments = get_state_dict(model, optimizer)
    held = dict(model=weights, optimizer=moments)
    dcp.load(held, checkpoint_id=run.folder / state["folder"])
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    print(f"resumed at step {state['step']}")
    return run.begin(state["step"])


def whole_weights(model):
    """All weights of a model, whole, on the CPU of the first process."""
    if ranks()[1] == 1:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def score(model, parts, batch, options, cfg, device):
    """Of each clip's last questions, by likelihood: log p of each of its options, -log p summed over the option and the end of the turn, and whether
    greedy generation would give exactly that option: it does if and only if each token is the most likely one after those before it.
    -> for each clip and question a pair of lists."""
    rows, clips = rows_of(batch, parts, cfg.row, device, options)
    model.eval()
    with precision(device, cfg.bf16):
        logits = model(rows, **batch.seen, logits=True)[:, :parts.encoding.n_vocab].float()
    target = rows.targets[rows.targets >= 0]
    log_p = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]          # over the vocabulary
    n = sum(map(len, clips))
    sums = lambda values: torch.zeros(n, device=device).index_add_(0, rows.group, values).tolist()
    log_p, wrong, at, answers = sums(log_p), sums((logits.argmax(-1) != target).float()), 0, []
    for pieces in clips:
        questions = {}
        for i, p in enumerate(pieces, at):
            if p.code % 64:
                both = questions.setdefault(p.code // 64, ([], []))
                both[0].append(log_p[i])
                both[1].append(wrong[i] == 0)
        answers.append(list(questions.values()))
        at += len(pieces)
    return answers


def judged(batch, options, answers, frames):
    """-> a row for each question: its type, frames, chance, and whether it was answered right by choice and openly."""
    rows = []
    for talks, some, clip in zip(batch.talks, options, answers):
        for talk, texts, (log_p, said) in zip(talks, some, clip):
            right = texts.index(talk[-1]["answer"])
            rows.append(dict(type=talk[-1].get("type", "question"), frames=frames, chance=1 / len(texts), choice=max(range(len(texts)), key=log_p.__getitem__) == right, open=said[right]))
    return rows


def evaluate(model, parts, cfg, held_out, device):
    """held_out: {frames: Stories}, or Films -> rows of `judged`, bad files."""
    rows, bad = [], []
    if isinstance(held_out, Films):
        pool = {}
        for turn in (t[-1] for e in held_out.entries for t in talks_of(e)):
            pool.setdefault(turn.get("type", ""), []).append(turn["answer"])
        for i in tqdm(range(len(held_out)), desc="held-out clips", leave=False, disable=None):
            films = held_out[i]
            bad += films["bad"]
            batch = from_films(films, model, parts, cfg, device)
            if batch is not None:
                options = [[options_of(talk[-1], pool, (i, j, q)) for q, talk in enumerate(talks)] for j, talks in enumerate(batch.talks)]
                rows += judged(batch, options, score(model, parts, batch, options, cfg, device), held_out.frames)
        return rows, bad
    for frames, stories in held_out.items():
        for some in torch.arange(len(stories.qa)).split(8):
            batch = from_stories(stories, some, cfg.connector, model, parts, device)
            options = [[talk[-1]["options"] for talk in talks] for talks in batch.talks]
            rows += judged(batch, options, score(model, parts, batch, options, cfg, device), frames)
    return rows, bad


def accuracies(rows):
    """Rows of `judged` -> {"all", each type, each length, and each type at each length: dict(choice, open, chance, questions)}."""
    parts = {"all": list(rows)}
    for row in rows:
        for key in (row["type"], f"{row['frames']} frames", f"{row['type']}, {row['frames']} frames"):
            parts.setdefault(key, []).append(row)
    return {key: dict({k: sum(r[k] for r in some) / len(some) for k in ("choice", "open", "chance")}, questions=len(some)) for key, some in parts.items() if some}


# ---------------------------------------------------------------------------------------------------------------------
# The run of one row
# ---------------------------------------------------------------------------------------------------------------------

def folder_of(cfg):
    return f"vlm-{run_name(shim(cfg))}-{cfg.connector}-{cfg.seed}"


def shapes(cfg, parts, grid):
    """What config.json tells beside the flags: all that `open_model` needs. tokenizer: the TrajTokConfig, as in other runs."""
    return dict(tokenizer=dataclasses.asdict(parts.shape), parts=dict(words=words_of(cfg), decoder=dataclasses.asdict(parts.decoder), grid=grid, window=parts.window,
                                                                         vision=dataclasses.asdict(parts.vision.cfg) if parts.vision else None))


def draw(cfg, step, lengths, counts):
    """Which clips a step takes: a length, and this process's share of clips of it. A function of (seed, step) alone.
    CHOICE: the shortest clips alone for the first two fifths of the way: to find the right token among six is learnt in minutes, among sixty not."""
    (rank, world), rng = ranks(), np.random.default_rng((cfg.seed, step))
    at = int(rng.integers(len(lengths) if 5 * step >= 2 * (cfg.caption_steps + cfg.steps) else 1))
    chosen = rng.permutation(counts[at])[:cfg.batch * world]
    return lengths[at], torch.from_numpy(chosen[rank::world].copy())


def train(cfg, parts, learnt, grid, device):
    """One row: cfg.connector and cfg.seed. learnt: {frames: Stories}, or (Films of captions, of questions). -> the model; of several processes, whose
    weights are in shards, None: what was written is what is read"""
    torch.manual_seed(cfg.seed)
    begun = (Path(cfg.out) / folder_of(cfg) / "config.json").exists()        # --resume of a comparison: this row may not have begun
    (rank, world), run = ranks(), Run(dataclasses.replace(cfg, resume=cfg.resume and begun), folder_of(cfg), shapes(cfg, parts, grid))
    if not rank and not run.cfg.resume:                          # nothing of an older run stays beside the new one's
        (run.folder / "state.json").unlink(missing_ok=True)
        for old in run.folder.glob("state-*"):
            shutil.rmtree(old)
    model = build(cfg, parts, grid)
    sizes = {part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(part)) for part in ("connector", "vision", "decoder")}
    model = model.to(device) if world == 1 else shard_model(model, device, cfg.bf16)
    optimizer = optimizer_of(model, cfg, device)
    begin = restore(run, model, optimizer)
    steps, damage, began, mark = cfg.caption_steps + cfg.steps, Damage(), time.time(), time.time()
    films = not isinstance(learnt, dict)
    print(f"{cfg.connector}, seed {cfg.seed}: decoder {sizes['decoder'] / 1e6:.2f} M, connector {sizes['connector'] / 1e6:.2f} M, vision {sizes['vision'] / 1e6:.2f} M parameters; "
          f"{device.type}; an even guess is ln {parts.decoder.vocabulary} = {math.log(parts.decoder.vocabulary):.2f}")
    batches, raw = None, not begin                               # raw: its connector has not seen a feature yet
    with sigterm() as asked_to_stop:
        for step in range(begin, steps):
            # 1. the stage, the rates
            stage, rates = set_rates(model, optimizer, step, cfg)
            # 2. the batch
            if films:
                if batches is None or step == cfg.caption_steps:
                    first = 0 if not stage else cfg.caption_steps
                    batches = iter(data.loader(data.Shard(learnt[stage], rank, world), step - first, steps - first if stage else cfg.caption_steps, cfg.workers))
                got = next(batches)
                damage.add(got["bad"], math.inf)
                batch, frames = from_films(got, model, parts, cfg, device, captions=not stage), learnt[stage].frames
            else:
                frames, chosen = draw(cfg, step, list(learnt), [len(s.qa) for s in learnt.values()])
                batch = from_stories(learnt[frames], chosen, cfg.connector, model, parts, device, captions=not stage)
            rows = rows_of(batch, parts, cfg.row, device)[0] if batch else None
            own = (float((rows.targets >= 0).sum()), len(batch.names), float((rows.token >= 0).sum()), float(rows.ids.numel())) if batch else (0, 0, 0, 0)
            stop, empty, targets, clips, seen_tokens, words = total([asked_to_stop(), batch is None, *own], device)
            if stop:                                             # one process was told: all save, and end at the same step
                save(run, model, optimizer, step)
                print(f"stopped by SIGTERM before step {step}: saved; --resume goes on from there", flush=True)
                if world > 1:
                    dist.destroy_process_group()
                raise SystemExit(143)
            if empty or not targets:                             # sharded weights meet in each layer: all go, or none
                continue
            if raw and "features" in batch.seen:
                model.connector.places.calibrate(batch.seen["features"])
            raw = False
            wait = time.time() - mark
            # 3. forward and backward. Gradients of shards are means over the processes: the sum over all targets is what is wanted
            model.train()
            optimizer.zero_grad()
            with precision(device, cfg.bf16):
                loss = model(rows, **batch.seen).sum() * (world / targets)
            loss.backward()
            # 4. clip, step
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            values = dict(loss=total([loss.item() / world], device)[0], gradient_norm=norm)
            check_finite(values, step)                           # before the step: what is saved stays whole
            optimizer.step()
            # 5. the log
            now = time.time()
            kind, seen = ("captions", "questions")[stage], seen_tokens / clips
            run.record(dict(step=step, stage=kind, **values, **{f"lr_{k}": v for k, v in rates.items()}, frames=frames, clips=clips, visual_tokens=seen, tokens=words, targets=targets,
                            seconds=now - mark, data_wait=wait, memory_gb=peak_memory_gb(device)))
            if step % 20 == 0 or step == steps - 1:
                print(f"step {step:5d}/{steps}  {kind:9s}  loss {values['loss']:.3f}  {frames} frames  {seen:.1f} visual tokens  {words / (now - mark):.0f} tokens/s  {now - began:.0f} s", flush=True)
            mark = now
            # 6. the checkpoint
            if (step + 1) % cfg.save_every == 0 or step == steps - 1:
                save(run, model, optimizer, step + 1)
    weights = whole_weights(model)
    if rank:
        return None
    if not run.history():
        raise BadInput(f"--data {cfg.data}: not one of the clips that {steps} steps drew can be used; the first: {next(iter(damage.files.values()), '-')}")
    write_weights(run.folder / "model.safetensors", weights | ({f"segmenter.{k}": v for k, v in parts.segmenter.state_dict().items()} if cfg.connector != "blind" else {}))
    return model if world == 1 else None


def examine(cfg, parts, held_out, grid, device, model=None):
    """A trained row is asked what it was not trained on -> result, written to its folder. model None: what was written there is read again."""
    folder, damage = Path(cfg.out) / folder_of(cfg), Damage()
    if model is None:
        model = build(cfg, parts, grid)
        fit_weights(model, {k: v for k, v in read_weights(folder / "model.safetensors").items() if not k.startswith("segmenter.")}, folder)
        model.to(device)
    sizes = {part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(part)) for part in ("connector", "vision", "decoder")}
    began, history = time.time(), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows, bad = evaluate(model, parts, cfg, held_out, device)
    damage.add(bad, math.inf)
    if not rows:
        raise BadInput(f"--data {cfg.data}: not one held-out question can be asked; the last file: {bad[-1][1] if bad else '-'}")
    seconds, seen = sum(line["seconds"] for line in history), {}
    for line in history:
        seen.setdefault(f"{line['frames']} frames", []).append(line["visual_tokens"])
    result = dict(connector=cfg.connector, seed=cfg.seed, accuracy=accuracies(rows), parameters=sizes, visual_tokens={key: float(np.mean(x)) for key, x in sorted(seen.items())}, seconds=seconds,
                  evaluation_seconds=time.time() - began, tokens_per_second=sum(line["tokens"] for line in history) / max(seconds, 1e-9), peak_memory_gb=peak_memory_gb(device),
                  left_out=len(damage.files))
    write_json(folder / "result.json", result)
    plot(folder / "curves.png", {f"{stage}, loss": points for stage in ("captions", "questions") if (points := [(l["step"], l["loss"]) for l in history if l["stage"] == stage])})
    all_ = result["accuracy"]["all"]
    print(f"{all_['questions']} held-out questions: {100 * all_['choice']:.1f} % right by choice (chance {100 * all_['chance']:.1f} %), {100 * all_['open']:.1f} % word for word; "
          f"{result['seconds']:.0f} s + {result['evaluation_seconds']:.0f} s\nwrote {folder}/: model.safetensors, result.json, log.jsonl, curves.png\n", flush=True)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# All rows, and their table
# ---------------------------------------------------------------------------------------------------------------------

def open_stories(cfg, parts, device):
    """-> learnt, held_out: {frames: Stories}."""
    lengths = sorted(numbers(cfg.frames))
    begin = dict(test=data.TEST, validation=data.VALIDATION)[cfg.eval_split]
    look = functools.partial(look_at_stories, cfg, parts.segmenter, parts.shape.image_size, parts.side)
    counts = [max(round(cfg.clips * (lengths[0] / t) ** 0.5), 1) for t in lengths]
    if counts[-1] < ranks()[1]:
        raise BadInput(f"--clips {cfg.clips}: leaves {counts[-1]} stories of {lengths[-1]} frames, fewer than processes ({ranks()[1]}); give more")
    learnt = {t: look(t, data.TRAIN + 10_000_000 * i, count, device) for i, (t, count) in enumerate(zip(lengths, counts))}
    return learnt, {t: look(t, begin + 1_000_000 * i, cfg.eval_clips, device) for i, t in enumerate(lengths)}


def open_films(cfg, parts):
    """-> (Films of captions, Films of questions), held-out Films."""
    size, frames = max(parts.shape.image_size, parts.vision.cfg.image if parts.vision else 0), numbers(cfg.frames)[0]
    entries = [e for e in data.read_manifest(cfg.data) if talks_of(e)]
    if len(entries) < 2:
        raise BadInput(f'--data {cfg.data}: {len(entries)} entries with questions; give at least 2 rows with "conversations" (or "qa")')
    for turn in (t for e in entries for talk in talks_of(e) for t in talk):
        check_question(turn["question"])
        kind, options = turn.get("type"), turn.get("options")
        if kind is not None and (not isinstance(kind, str) or kind == "all" or "," in kind or "frames" in kind):
            raise BadInput(f'--data {cfg.data}: the type {str(kind)[:40]!r} of {turn["question"][:60]!r}: give a word other than "all", without a comma or "frames": it names a column')
        if options and isinstance(options, list) and (len(options) > MOST_OPTIONS or not all(isinstance(o, str) for o in options)):
            raise BadInput(f'--data {cfg.data}: the options of {turn["question"][:60]!r}: give texts, at most {MOST_OPTIONS}')
        if turn.get("options") and (not isinstance(turn["options"], list) or turn["answer"] not in turn["options"]):
            raise BadInput(f'--data {cfg.data}: the options {str(turn["options"])[:80]} of {turn["question"][:60]!r} do not hold its answer {turn["answer"][:40]!r}')
    train_, test = split_entries(entries, held_out_share(entries))
    held_out = {os.path.realpath(e["path"]) for e in test}       # a caption may say what a question about its video asks
    captioned = [e for e in (data.read_manifest(cfg.captions) if cfg.captions else train_) if e["caption"] and os.path.realpath(e["path"]) not in held_out]
    if cfg.caption_steps and not captioned:
        raise BadInput(f"--caption-steps {cfg.caption_steps}: {cfg.captions or cfg.data} has no captions; give --captions MANIFEST, or --caption-steps 0")
    films = functools.partial(Films, frames=frames, size=size, batch=cfg.batch, seed=cfg.seed)
    return (films(captioned), films(train_)), films(test, train=False)


def live_tokens(learnt, parts, cfg, device):
    """trajtok's tokens of a window, on average over what is learnt from: PatchVLM gets at least as many."""
    counts = TrajectoryConnector.counts
    like = types.SimpleNamespace(m=cfg.tokens_per_trajectory, encoder=types.SimpleNamespace(cfg=types.SimpleNamespace(num_queries=parts.segmenter.cfg.num_queries)))
    if isinstance(learnt, dict):
        return float(torch.cat([counts(like, s.ids.flatten(0, 1)) for s in learnt.values()]).float().mean())
    seen = []
    for i in range(min(len(learnt[1]), 8)):
        for video in learnt[1][i]["video"]:
            seen.append(counts(like, perceive(parts.segmenter, windowed(video[None], parts.window).to(device), parts.shape.image_size, parts.side)[1]).float().cpu())
    if not seen:
        raise BadInput(f"--data {cfg.data}: none of its first videos can be read; run `python data.py check` on it")
    return float(torch.cat(seen).mean())


def compare(cfg):
    """Every connector with every seed, on the same clips, seen by the same segmenter -> the table, results/vlm-<name>.json and .png."""
    device = setup(cfg)
    meet(device)
    began = time.time()
    results_folder(Path(cfg.results))
    parts = open_parts(cfg, device)
    names, seeds = list(dict.fromkeys(cfg.connector.split(","))), list(dict.fromkeys(numbers(cfg.seeds)))
    check_fit(cfg, parts, None, names)
    looked = time.time()
    learnt, held_out = open_stories(cfg, parts, device) if cfg.data == "world" else open_films(cfg, parts)
    live = live_tokens(learnt, parts, cfg, device)
    grid = numbers(cfg.patch_grid) if cfg.patch_grid else list(patch_grid(live, parts.window, parts.side))
    check_fit(cfg, parts, grid, names)
    print(f"{live:.1f} live tokens a window of {parts.window} frames (trajtok); patch: {' x '.join(map(str, grid))} = {math.prod(grid)}; clips looked at in {time.time() - looked:.0f} s", flush=True)
    several, path, rows, models = ranks()[1] > 1, Path(cfg.results) / f"vlm-{run_name(shim(cfg))}.json", {name: [] for name in names}, {}
    each = [dataclasses.replace(cfg, connector=name, seed=seed) for seed in seeds for name in names]
    for one in each if several else ():                          # together they train; what was trained is examined by the first alone
        if not finished(one, parts, grid):
            train(one, parts, learnt, grid, device)
    if several:
        alone = ranks()[0] == 0
        dist.barrier()
        dist.destroy_process_group()
        if not alone:
            return
    for one in each:
        result = finished(one, parts, grid)
        if not result:
            model = None if several else train(one, parts, learnt, grid, device)
            result = examine(one, parts, held_out, grid, device, model)
        rows[one.connector].append(result)
        write_json(path, dict(command="python train_vlm.py " + " ".join(flags(cfg, VLM_SIZES, ("resume", "overwrite"))), torch=torch.__version__, threads=torch.get_num_threads(),
                              gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, seeds=cfg.seeds, live_tokens=live, patch_grid=grid,
                              seconds=time.time() - began, rows=rows))
    print("\n".join(table(rows)))
    picture(path.with_suffix(".png"), rows)
    print(f"{time.time() - began:.0f} s in all; wrote {path} and {path.with_suffix('.png')}")


def finished(cfg, parts, grid):
    """The result of a row that --resume finds finished, or None. A row of other flags: BadInput."""
    folder = Path(cfg.out) / folder_of(cfg)
    if not cfg.resume or not (folder / "result.json").exists():
        return None
    differ = Run.differences(json.loads((folder / "config.json").read_text()), json.loads(json.dumps(dataclasses.asdict(cfg) | shapes(cfg, parts, grid))))
    if differ:
        raise BadInput(f"--resume: {folder} is a finished row of another comparison: {differ}; give the same flags, or another --name")
    print(f"{folder.name}: finished before", flush=True)
    return json.loads((folder / "result.json").read_text())


def check_fit(cfg, parts, grid, names):
    """More frames than the context could hold, if every trajectory were alive: refused before anything is trained. grid None: patch's is not known yet."""
    each = {"patch": math.prod(grid) if grid else 0, "blind": 0}
    for name in names:
        most = each.get(name, parts.segmenter.cfg.num_queries * cfg.tokens_per_trajectory)
        marked = most + len(parts.encoding.encode_ordinary(stamp(999, 999)))
        fits = (parts.decoder.context - 64) // marked * parts.window
        if most and max(numbers(cfg.frames)) > fits:
            raise BadInput(f"--frames {cfg.frames}: {marked} tokens a window of {parts.window} frames ({name}), and a context of {parts.decoder.context}: give at most {fits} frames")


def table(rows):
    """{connector: results of its seeds} -> lines: a column for each type and length, mean +- deviation over the seeds, and chance."""
    some = next(r[0]["accuracy"] for r in rows.values() if r)
    keys = [k for k in some if ", " not in k]
    keys = ["all", *sorted((k for k in keys if k.endswith(" frames")), key=lambda k: int(k.split()[0])), *(k for k in keys if k != "all" and not k.endswith(" frames"))]

    def cell(results, key, what):
        return spread_of([100 * r["accuracy"][key][what] for r in results if key in r["accuracy"]])
    lines = [["%", *keys]] + [[name + (" (open)" if what == "open" else ""), *(cell(results, key, what) for key in keys)] for what in ("choice", "open") for name, results in rows.items() if results]
    lines += [["chance", *(f"{100 * some[key]['chance']:.1f}" for key in keys)], ["questions", *(str(some[key]["questions"]) for key in keys)]]
    return aligned(lines)


def picture(path, rows):
    """Accuracy by choice over the length of the clip, a panel for all questions and one for each type."""
    some = next(r[0]["accuracy"] for r in rows.values() if r)
    lengths, panels = sorted(int(k.split()[0]) for k in some if re.fullmatch(r"\d+ frames", k)), {}
    for kind in ("all", *(k for k in some if k != "all" and "frames" not in k)):
        key = lambda t: f"{t} frames" if kind == "all" else f"{kind}, {t} frames"
        lines = {name: [(t, 100 * float(np.mean([r["accuracy"][key(t)]["choice"] for r in results]))) for t in lengths if results and key(t) in results[0]["accuracy"]] for name, results in rows.items()}
        lines["chance"] = [(t, 100 * some[key(t)]["chance"]) for t in lengths if key(t) in some]
        lines = {name: [(t, max(y, 0.1)) for t, y in line] for name, line in lines.items() if line}
        if any(len(line) > 1 for line in lines.values()):
            panels[f"{kind}: % right"] = lines
    if panels:
        plot_lines(path, panels)


# ---------------------------------------------------------------------------------------------------------------------
# python train_vlm.py ask
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AskConfig:
    """Asks a trained model about a video: the answer comes as it is made, and a picture shows what was looked at."""
    clip: str = ""                      # a video or a picture
    question: str = ""                  # what to ask
    model: str = "out/vlm-nano-trajtok-0"   # the folder of a run
    frames: int = 0                     # frames from the whole clip, evenly; 0: as many as the longest clips that it was trained on
    most: int = 64                      # tokens of the answer, at most
    temperature: float = 0.0            # 0: always the most likely token
    top_p: float = 1.0                  # only among the most likely tokens that make this share
    out: str = "out"                    # folder for <clip>-attended.png
    seed: int = 0                       # of the answer, where temperature is above 0
    device: str = "auto"                # cpu, cuda, ...

    def __post_init__(self):
        if not self.clip or not self.question.strip():
            raise BadInput('give a clip and a question: python train_vlm.py ask clip.mp4 "What moves?"')
        if self.frames < 0:
            raise BadInput(f"--frames {self.frames}: at least 0")
        check_question(self.question)


def open_model(folder, device):
    """The folder of a run -> its VLMConfig, Parts, VLM."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())
        kinds, cfg = saved["parts"], VLMConfig(**{f.name: saved[f.name] for f in dataclasses.fields(VLMConfig) if f.name in saved})
        shape, decoder = TrajTokConfig(**saved["tokenizer"]), DecoderConfig(**kinds["decoder"])
        vision = SigLIP2(SigLIP2Config(**kinds["vision"])) if kinds["vision"] else None
        window, grid, words = kinds["window"], kinds["grid"], kinds["words"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--model {folder}: no finished run of train_vlm.py ({type(error).__name__}: {error}); give its folder, e.g. out/vlm-nano-trajtok-0") from None
    segmenter = Segmenter(shape)
    parts = Parts(load_tokenizer(words), segmenter.requires_grad_(False).eval(), shape, vision, decoder, vision.cfg.width if vision else shape.dim,
                  vision.cfg.side if vision else shape.image_size // 8, window)
    model = VLM(Decoder(decoder), connector_of(cfg.connector, parts, cfg, grid), None if cfg.connector == "blind" else vision)
    if not (Path(folder) / "model.safetensors").exists():
        raise BadInput(f"{folder}/model.safetensors: no such file; is the run finished?")
    weights = read_weights(Path(folder) / "model.safetensors")
    if cfg.connector != "blind":
        fit_weights(segmenter, {k.removeprefix("segmenter."): v for k, v in weights.items() if k.startswith("segmenter.")}, folder)
    fit_weights(model, {k: v for k, v in weights.items() if not k.startswith("segmenter.")}, folder)
    segmenter.to(device)
    return cfg, parts, model.to(device).eval()


@torch.no_grad()
def attended(decoder, x, begin):
    """Embeddings (1, s, w) of prompt and answer; the answer's tokens are predicted from position begin on -> how much they attend to each position (s,):
    softmax weights, averaged over layers, heads and these tokens."""
    found = []

    def look(module, args):
        y, cos, sin = args[:3]
        q, k = (turn(norm(rearrange(proj(y), "1 s (a c) -> 1 a s c", c=module.c)), cos, sin) for proj, norm in ((module.q_proj, module.q_norm), (module.k_proj, module.k_norm)))
        scores = q[:, :, begin:] @ k.repeat_interleave(module.group, 1).transpose(2, 3) / math.sqrt(module.c)
        here = torch.arange(x.shape[1], device=x.device)
        found.append(scores.masked_fill(here > here[begin:, None], -math.inf).softmax(-1).mean((0, 1, 2)))       # over the keys
    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in decoder.layers]
    try:
        decoder(embeddings=x, last=True)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(0)


def owners(connector, ids):
    """Windows (v, t, h, w) of trajectories -> the same, with the number of the first visual token that reads each point, over all windows (-1: none does),
    and how many tokens read it (1, or m of a trajectory)."""
    v, t, h, w = ids.shape
    if isinstance(connector, PatchConnector):
        a, b, c = (torch.arange(n) * g // n for n, g in zip((t, h, w), connector.grid))
        cell = (a[:, None, None] * connector.grid[1] + b[:, None]) * connector.grid[2] + c
        return cell + math.prod(connector.grid) * torch.arange(v)[:, None, None, None], 1
    out, first = torch.full(ids.shape, -1), 0
    for window, one in enumerate(ids):
        for k in one.unique().tolist():                          # live trajectories, by number
            if k >= 0:
                out[window][one == k] = first
                first += connector.m
    return out, connector.m


def ask(argv):
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise BadInput('python train_vlm.py ask: give a clip and a question, then flags: ask clip.mp4 "What moves?" --model out/vlm-nano-trajtok-0')
        argv = ["clip", "question", "--help"]
    cfg = configure(AskConfig, None, [argv[0], f"--question={argv[1]}", *argv[2:]], positional="clip")
    device = setup(cfg)
    run, parts, model = open_model(cfg.model, device)
    size, image = max(parts.shape.image_size, parts.vision.cfg.image if parts.vision else 0), Path(cfg.clip).suffix.lower() in data.IMAGE_SUFFIXES
    frames = cfg.frames or max(numbers(run.frames))
    if not image:
        there = data.video_header(cfg.clip)[0]
        frames = min(frames, there) if there else frames
    frames = 1 if image else frames if frames <= parts.window else frames // parts.window * parts.window
    video, times, _ = data.decode(cfg.clip, frames, size, places=False)
    films = dict(video=[torch.from_numpy(video)], times=[[float(s) for s in times]], entries=[dict(path=cfg.clip, talk=[dict(question=cfg.question, answer="")])], bad=[])
    batch = from_films(films, model, parts, run, device)
    rows, (pieces,) = rows_of(batch, parts, 0, device, options=[[[""]]])         # one answer of nothing: the prompt is what it continues
    end = int((rows.positions[0] == pieces[-1].start).nonzero()[0]) + 1
    x = model.embed(rows, **batch.seen)[0, :end]
    ids, began = [], time.time()

    def spoken():
        stop = {special(parts.encoding, TURN_END), special(parts.encoding, END)}
        for row in steps(model.decoder, [x], cfg.most, cfg.temperature, cfg.top_p, stop, cfg.seed, parts.encoding.n_vocab):
            if row[0] is not None:
                ids.append(row[0])
                yield parts.encoding.decode_single_token_bytes(row[0])
    for text in whole_characters(spoken()):
        print(text, end="", flush=True)
    print(f"\n{len(video)} frames, {sum(batch.counts[0])} visual tokens, {end} tokens in all, {len(ids)} of the answer in {time.time() - began:.2f} s")
    if model.connector is None:
        return
    whole = torch.cat((x, model.decoder.embed_tokens(torch.tensor(ids[:-1], dtype=torch.int64, device=device))))[None]
    weight = attended(model.decoder, whole, end - 1)[:end][rows.token[0, :end] >= 0].cpu()           # of each visual token
    owner, m = owners(model.connector, batch.seen["ids"].cpu())
    sheet = attention_picture(windowed(films["video"][0][None], parts.window) if not image else films["video"][0][None].expand(1, parts.window, -1, -1, -1), owner, m, weight)
    base = Path(cfg.out) / f"{Path(cfg.clip).stem}-attended.png"
    data.make_room(str(base))
    write_text(sheet, f"{cfg.question} {parts.encoding.decode(ids)}", 4, 4)
    write_png(base, sheet)
    print(f"wrote {base}")


def attention_picture(video, owner, m, weight):
    """Windows uint8 (v, t, H, W, 3), owner (v, t, h, w), weight (n,) of the visual tokens -> a picture: up to eight frames, and below them the same frames in
    grey, in which each trajectory wears its colour, the more the more it was attended to."""
    weight = torch.stack([F.pad(weight, (0, m))[i:len(weight) + i] for i in range(m)]).sum(0)        # of a trajectory, at its first token
    share = (weight / weight.max().clamp(min=1e-9)).sqrt()
    video, owner = video.flatten(0, 1).numpy(), owner.flatten(0, 1)
    some = np.linspace(0, len(video) - 1, min(8, len(video))).round().astype(int)
    scale = max(1, 128 // video.shape[2])
    video, owner = video[some], owner[some].repeat_interleave(-(-video.shape[1] // owner.shape[1]), 1)[:, :video.shape[1]]
    owner = owner.repeat_interleave(-(-video.shape[2] // owner.shape[2]), 2)[:, :, :video.shape[2]].numpy()
    strength = np.where(owner >= 0, share.numpy()[owner.clip(0)], 0)[..., None]
    grey = video.mean(-1, keepdims=True) * 0.6
    lit = (grey * (1 - strength) + data.paint(video, owner, data.palette(int(owner.max()) + 1)) * strength).clip(0, 255).astype(np.uint8)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in (video, lit)], 0).repeat(scale, 0).repeat(scale, 1)
    return np.pad(sheet, ((20, 0), (0, 0), (0, 0)), constant_values=255)


@data.one_line_errors
def main(argv=None):
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    if argv[:1] == ["ask"]:
        return ask(argv[1:])
    cfg = configure(VLMConfig, VLM_SIZES, argv)
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    processes = cfg.processes or (max(gpus, 1) if cfg.size != "nano" else 1)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        if not cfg.segmenter:
            pretrained_segmenter(cfg)
        return launch(__file__, argv, processes)
    compare(cfg)


if __name__ == "__main__":
    main()
