"""TrajVLM (paper, "Setting 3"): a language model that reads trajectories.

    ids (b, s) -> embeddings (b, s, w), visual tokens put in -> decoder of Qwen3's shape -> logits (b, s, vocabulary)
"""
from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

import data
from data import BadInput, write_json
from segmenter import rename
from trajtok import write_weights


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
        raise BadInput(f"{path}: no configuration ({type(error).__name__}: {error}); give the folder of a published {what}, config.json and safetensors") from None
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
        clips = [data.script(i) for i in range(1000)]
        ranks = data.learn_bpe(text for clip in clips for text in (clip["caption"], *(part for qa in clip["qa"] for part in (qa["question"], qa["answer"]))))
        return tiktoken.Encoding("world", pat_str=data.WORDS, mergeable_ranks=ranks, special_tokens={token: len(ranks) + i for i, token in enumerate(SPECIAL)})
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
