r"""TrajVLM: a language model that reads trajectories (paper, "Setting 3").

    video uint8 (b, T, H, W, 3) -> windows of --window frames (v, t, H, W, 3)
      segmenter, frozen -> the trajectory of each cell, ids (v, t, h, w),
                           and features (v, t, h, w, d), or those of a vision tower
      connector: trajtok, one token for each live trajectory    -> (N, width)
                 patch, means over a grid of cells (PatchVLM)
                 blind, no video
    text: of each window its time stamp and its visual tokens; then the question
      -> decoder of Qwen3's shape -> the answer

    loss = -log p of the answers' tokens, and of nothing else

    python train_vlm.py                         # TrajVLM on made stories: two CPU cores, minutes
    python train_vlm.py --connector patch       # PatchVLM
    python trajtok.py compare "trajtok:" "patch: --connector patch" "blind: --connector blind" \
           --script train_vlm.py --seeds 0 1 2 --json out/vlm.json
    python train_vlm.py ask clip.mp4 "What moves?" --model out/vlm-nano-trajtok

    # published weights, on all GPUs of this machine
    python train_vlm.py --size 4b --decoder FOLDER --vision FOLDER --tokenizer FOLDER \
           --segmenter FOLDER --data qa.jsonl --captions captions.jsonl

Writes out/vlm-<name>/: config.json, log.jsonl, state.pt, model.safetensors, result.json, and pictures:
curves.svg, the loss, and accuracy.svg, the accuracy by length of the clip.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

import data
import trajtok
from data import BadInput, configure, write_json, write_png
from encoder import TrajectoryEncoder
from segmenter import assign, fourier_codes, normalise, one_hot, recomputed, resize, waves
from trajtok import TrajTokConfig, ranks

# -----------------------------------------------------------------------------------------------------------
# The decoder: Qwen3's shape. Modules carry the published names, without their leading `model.`
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DecoderConfig:
    """The fields of a published config.json, by its names."""
    vocab_size: int                     # at least as many as the tokenizer has ids
    hidden_size: int
    intermediate_size: int              # width inside the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int            # of the queries; heads x head_dim need not be the width
    num_key_value_heads: int            # each is read by several query heads
    head_dim: int = 128
    rope_theta: float = 1e6             # the slowest channel turns once in about 2 pi theta positions
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40_960           # prompt and answer together
    tie_word_embeddings: bool = True    # logits come from the embedding table itself


# Ids, width, width of the SwiGLU, layers, query heads, key heads; nano also has channels of a head and
# rope_theta. Behind each its number of parameters.
DECODERS = {
    "nano": DecoderConfig(1030, 128, 384, 3, 4, 2, 32, 1e4, max_position_embeddings=4096),     # 0.7 M
    "0.6b": DecoderConfig(151936, 1024, 3072, 28, 16, 8),                                      # 596 M
    "1.7b": DecoderConfig(151936, 2048, 6144, 28, 16, 8),                                      # 1 721 M
    "4b": DecoderConfig(151936, 2560, 9728, 36, 32, 8),                                        # 4 022 M
}


def rotate_halves(x, cos, sin):
    """Rotary embedding that pairs channel j with channel j + c/2. x (b, a, s, c); cos, sin (s, c/2), float32
    -> float32 (b, a, s, c)."""
    u, v = x.float().chunk(2, -1)
    return torch.cat((u * cos - v * sin, v * cos + u * sin), -1)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: several heads of queries share one of keys and values. q
    and k are normed head by head before they are rotated."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        width = cfg.hidden_size
        inner = cfg.num_attention_heads * cfg.head_dim
        shared = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = nn.RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = nn.RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, x, cos, sin, cache=None):
        """x (b, s, w). cache: of each layer the keys and values of all positions so far, and the queries of
        the last ones, which `attended` reads. None: nothing is kept."""
        # q (b, query heads, s, c); k and v (b, key heads, s, c)
        q, k, v = (rearrange(project(x), "b s (a c) -> b a s c", c=self.head_dim)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate_halves(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate_halves(self.k_norm(k), cos, sin).to(v.dtype)
        mask = None
        if cache is not None:
            # without earlier positions the mask stays None: is_causal is the mask
            if self in cache:
                k = torch.cat((cache[self][1], k), 2)
                v = torch.cat((cache[self][2], v), 2)
                mask = causal_mask(x.shape[1], k)
            cache[self] = q, k, v
        # softmax over the keys
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(rearrange(y, "b a s c -> b s (a c)"))


def causal_mask(s, k):
    """For queries at the last s of the n positions of keys k (b, a, n, c): bool (s, n), True = may be read:
    every position up to the query's own."""
    n = k.shape[2]
    return torch.ones(s, n, dtype=torch.bool, device=k.device).tril(n - s)


class DecoderLayer(nn.Module):
    """Pre-norm: each branch reads a normed copy of the residual stream, and its output is added to the
    stream."""

    def __init__(self, cfg):
        super().__init__()
        width, inner = cfg.hidden_size, cfg.intermediate_size
        self.input_layernorm = nn.RMSNorm(width, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(width, cfg.rms_norm_eps)
        shapes = dict(gate_proj=(width, inner), up_proj=(width, inner), down_proj=(inner, width))
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y = self.post_attention_layernorm(x)
        # SwiGLU: one half decides how much of the other passes
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x + self.mlp["down_proj"](y)


class Decoder(nn.Module):
    """forward(ids int64 (b, s), or embeddings (b, s, w)) -> logits (b, s, vocabulary)
    forward(ids, targets (b, s)) -> -log p of each target, float32 (number of targets,), row by row; a target
    of -1 is none.

    targets[:, i] is what position i predicts: the caller shifts ids by one. Rows are padded at the right:
    attention is causal, so padding is read by padding alone and needs no mask.
    cache: a dict, empty at first; ids then continue what was given with it before, and are added to it."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        tied = cfg.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # A deviation of 1 / sqrt(fan-in); the last matrices of branches get less, because the stream
                # is the sum of 2 x depth branches. The table of words gets 1 / sqrt(width): tied logits then
                # start near 1.
                fan_in = p.shape[1]
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    fan_in *= 2 * cfg.num_hidden_layers
                nn.init.normal_(p, std=fan_in ** -0.5)

    def forward(self, ids, targets=None, cache=None):
        x = ids if ids.is_floating_point() else self.embed_tokens(ids)
        # how many positions the cache holds
        first = cache[self.layers[0].self_attn][1].shape[2] if cache else 0
        cos, sin = self.rotary(first, first + x.shape[1], x.device)
        for layer in self.layers:
            x = recomputed(self.recompute, layer, x, cos, sin, cache)
        x = self.norm(x)
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if targets is None:
            return F.linear(x, head.weight)
        # only where there is a target: 151 936 logits for every other position would be computed for nothing
        wanted = targets >= 0
        logits = F.linear(x[wanted], head.weight).float()
        return F.cross_entropy(logits, targets[wanted], reduction="none")

    def rotary(self, first, last, device):
        """cos and sin (s, c/2) of the positions first .. last - 1. float32: above 256 bfloat16 cannot tell
        neighbouring positions apart."""
        context = self.cfg.max_position_embeddings
        if last > context:
            raise BadInput(f"{last} tokens, but a context of {context}: give fewer --frames")
        positions = torch.arange(first, last, device=device)
        channel = torch.arange(0, self.cfg.head_dim, 2, device=device) / self.cfg.head_dim
        angle = positions[:, None] * self.cfg.rope_theta ** -channel                # (s, c/2)
        return angle.cos(), angle.sin()

    @classmethod
    def from_pretrained(cls, folder):
        """The folder of a published Qwen3, config.json and one or several files of weights -> Decoder in
        float32."""
        return load_published(cls, DecoderConfig, [(r"model\.(.+)", r"\1")], folder, "qwen3")


# -----------------------------------------------------------------------------------------------------------
# Published folders
# -----------------------------------------------------------------------------------------------------------

def load_published(cls, config_cls, names, folder, *kinds):
    """A folder from the hub whose model_type is one of `kinds` -> a model of class cls in float32. names:
    rules that turn the published names of the weights into ours."""
    config = trajtok.read_json(Path(folder) / "config.json")
    kind = config.get("model_type")
    if kind not in kinds:
        raise BadInput(f"{folder}: model_type {kind!r} is not one of {', '.join(kinds)}")
    # The fields stand at the top of the file or in one of these parts. The last two are the older and the
    # newer name of the same part.
    for part in ("vision_config", "rope_scaling", "rope_parameters"):
        config |= config.get(part) or {}
    if config.get("rope_type", "default") != "default" or config.get("attention_bias"):
        raise BadInput(f"{folder}: scaled rotary positions and biases are not computed here")
    known = {field.name for field in dataclasses.fields(config_cls)} & config.keys()
    try:
        cfg = config_cls(**{name: config[name] for name in known})
    except TypeError as error:
        raise BadInput(f"{folder}/config.json: {error}; fetch it again") from None
    weights = trajtok.rename(trajtok.read_weights(folder), names)
    # some folders of tied models hold the table twice
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    # To draw four billion random weights would take a minute: memory is only reserved, and filled once.
    with torch.device("meta"):
        model = cls(cfg)
    return trajtok.fit_weights(model.to_empty(device="cpu"), weights, folder)


# -----------------------------------------------------------------------------------------------------------
# Words: the tokenizer, and conversations
# -----------------------------------------------------------------------------------------------------------

END, TURN, TURN_END, VIDEO = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>")
DESCRIBE = "Describe the video."
FPS = 8.0                                                       # of made clips


@functools.lru_cache(maxsize=None)
def load_tokenizer(name="world"):
    """-> a tiktoken Encoding with the special tokens above. name: a published Qwen3 folder, or `world`: the
    words of made stories. Its encode_ordinary never makes a special token, whatever a text says."""
    if name != "world":
        return data.load_encoding(str(name))
    # A time stamp of eight frames is one token: as single digits it would outnumber the window's visual
    # tokens. (With --window below 8 it does.)
    pattern = r"<[0-9.]+-[0-9.]+s>|" + data.WORDS
    texts = ["user\nassistant\n" + DESCRIBE]
    texts += [stamp((first / FPS, (first + 7) / FPS)) for first in range(0, 512, 8)]
    # a thousand times, so that they come first; there are fewer than 700 words
    texts *= 1000
    for i in range(1000):
        clip = data.script(i, story_world(32))
        texts.append(clip["caption"])
        for qa in clip["qa"]:
            texts += [qa["question"], *qa["options"]]
    return data.word_encoding(data.word_list(texts, 700, pattern), pattern, SPECIAL)


def stamp(times):
    """When the first and the last frame of a window are shown, in seconds, as text."""
    return f"<{times[0]:.1f}-{times[-1]:.1f}s>"


def chat(encoding, turns, windows=()):
    """One conversation in Qwen3's format -> a list of (id, visual, spoken): the token, the number of the
    visual token that stands here instead (-1: none), and whether the assistant says it, which is what the
    loss is on.

    turns: dicts of question and answer. The last answer may be None: the text then ends where it would begin.
    windows: pairs of a time stamp and the numbers of the window's visual tokens. They stand before the first
    question."""
    encode, special = encoding.encode_ordinary, encoding.encode_single_token
    row = []

    def add(ids, spoken=False):
        row.extend((token, -1, spoken) for token in ids)

    # Pieces are encoded one by one. The prompt of `ask` then has the same tokens as a conversation in
    # training has up to its answer.
    for turn in turns:
        add([special(TURN), *encode("user\n")])
        for mark, numbers in windows:
            add(encode(mark))
            row.extend((special(VIDEO), number, False) for number in numbers)
        # the video is shown once, before the first question
        windows = ()
        add([*encode(turn["question"]), special(TURN_END), *encode("\n")])
        add([special(TURN), *encode("assistant\n")])
        if turn["answer"] is not None:
            add([*encode(turn["answer"]), special(TURN_END)], spoken=True)
            add(encode("\n"))
    return row


def lay_out(conversations, device="cpu"):
    """What chat gave, one conversation a row, padded at the right -> three tensors int64 (b, s): ids; visual,
    the number of a visual token, -1 = a word; targets, what a position predicts, -1 = nothing."""
    length = max(len(row) for row in conversations)
    padding = (0, -1, False)
    rows = [row + [padding] * (length - len(row)) for row in conversations]
    ids, visual, spoken = torch.tensor(rows, device=device).unbind(-1)
    # position i predicts token i + 1; no row begins with a spoken token, so none comes round to its end
    targets = torch.where(spoken == 1, ids, -1).roll(-1, 1)
    return ids, visual, targets


@torch.no_grad()
def generate(decoder, x, stop, known=None, most=64):
    """Embeddings (1, s, w) of a prompt -> an iterator over the ids of the answer, each the most likely one;
    it ends before a token of `stop`, or after `most` tokens. Only ids below `known` are chosen: published
    tables have more rows than there are tokens."""
    cache = {}
    for _ in range(min(most, decoder.cfg.max_position_embeddings - x.shape[1])):
        token = int(decoder(x, cache=cache)[0, -1, :known].argmax())
        if token in stop:
            return
        yield token
        # all earlier positions are in the cache: the new token alone goes in
        x = decoder.embed_tokens(torch.tensor([[token]], device=x.device))


# -----------------------------------------------------------------------------------------------------------
# Vision: SigLIP2
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SigLIP2Config:
    """The fields of a published config.json, by its names."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    image_size: int = 224
    layer_norm_eps: float = 1e-6

    @property
    def side(self):
        """Patches along each side: 378 / 14 = 27."""
        return self.image_size // self.patch_size


class VisionLayer(nn.Module):
    """Pre-norm: attention among all patches, then an MLP with the tanh form of GELU."""

    def __init__(self, cfg):
        super().__init__()
        width, inner = cfg.hidden_size, cfg.intermediate_size
        self.heads = cfg.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, cfg.layer_norm_eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, cfg.layer_norm_eps)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width)))

    def forward(self, x):                                       # (b, n, d)
        y = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[name](y), "b n (a c) -> b a n c", a=self.heads)
                   for name in ("q_proj", "k_proj", "v_proj"))
        # softmax over all patches of the picture
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.self_attn["out_proj"](rearrange(y, "b a n c -> b n (a c)"))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](F.gelu(y, approximate="tanh"))


# A published SigLIP2 also holds a text tower, a head that pools the patches, and the scale and bias of its
# loss. They are dropped.
SIGLIP_NAMES = [(r"text_model\..+|logit_scale|logit_bias|(?:vision_model\.)?head\..+", ""),
                (r"vision_model\.(.+)", r"\1")]


class SigLIP2(nn.Module):
    """The vision tower of SigLIP, and of SigLIP2 for pictures of one size.

    features(x (b, 3, H, W), in -1 .. 1, H = W = cfg.image_size) -> (b, n, d), n = h·w patches row by row,
    after the last norm like the hub's last_hidden_state; post_norm=False: before it.
    forward(video uint8 (v, t, H, W, 3)) -> (v, t, h, w, d), before the last norm: what the published TrajVLM
    reads."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, cfg.patch_size),
            position_embedding=nn.Embedding(cfg.side ** 2, cfg.hidden_size)))
        layers = nn.ModuleList(VisionLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.encoder = nn.ModuleDict(dict(layers=layers))
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    @classmethod
    def from_pretrained(cls, folder):
        """A hub folder: the whole SigLIP2, or its vision tower alone."""
        return load_published(cls, SigLIP2Config, SIGLIP_NAMES, folder, "siglip", "siglip_vision_model")

    def features(self, x, post_norm=True):
        x = self.embeddings["patch_embedding"](x).flatten(2).transpose(1, 2)        # (b, n, d)
        x = x + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:
            x = recomputed(self.recompute, layer, x)
        return self.post_layernorm(x) if post_norm else x

    def forward(self, video):
        # SigLIP wants pixels from -1 to 1
        half = (0.5, 0.5, 0.5)
        x = resize(normalise(video, half, half), self.cfg.image_size)
        x = self.features(x.flatten(0, 1), post_norm=False)
        return rearrange(x, "(v t) (h w) d -> v t h w d", v=len(video), h=self.cfg.side)


# -----------------------------------------------------------------------------------------------------------
# Connectors: features of windows -> tokens of the decoder's width
# -----------------------------------------------------------------------------------------------------------

def place_codes(count, dim):
    """Learned codes (count, d) of the places along one axis. At the start neighbours are alike, and each code
    is twice as large as a feature.

    CHOICE: tables of codes and not the waves of encoder.Places. Its frequencies are too high for a grid of
    8 x 8 cells, and its few weights move all codes at each step. With tables the decoder learns sooner how a
    thing moves by a cell or two."""
    angle = math.pi * (torch.arange(count) + 0.5)[:, None] / count * torch.arange(1, 5)
    return nn.Parameter(2 * math.sqrt(dim) * fourier_codes(waves(angle), dim))


class PlacedFeatures(nn.Module):
    """Features (v, t, h, w, d), h = w = side -> LayerNorm, less the mean and over the deviation of each
    channel that `calibrate` has found, + codes of frame, row and column. A token is a mean of what it reads,
    and does not know where its thing was unless the features say it.

    CHOICE: frozen features are centred and scaled. The mean of a nano segmenter's normed features is nine
    tenths as long as they are; beside it a decoder that trains for minutes does not see the colours."""

    def __init__(self, dim, window, side):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.frame = place_codes(window, dim)
        self.row = place_codes(side, dim)
        self.column = place_codes(side, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    @torch.no_grad()
    def calibrate(self, features):
        """Set mean and deviation of each channel to those of features (v, t, h, w, d), the first batch of all
        processes. A deviation is at least 0.1: a channel that is constant in this batch must not make later
        features huge."""
        x = F.layer_norm(features.float(), features.shape[-1:]).flatten(0, -2)
        means = torch.cat((x.mean(0), x.square().mean(0))).tolist()
        # all processes have the same number of points, so means over processes are those of the whole batch
        mean, square = torch.tensor(trajtok.mean_over_processes(means, x.device)).chunk(2)
        self.mean.copy_(mean)
        self.deviation.copy_((square - mean ** 2).clamp(min=0.01).sqrt())

    def forward(self, features):
        # under FSDP the weights may be bfloat16
        features = features.to(self.norm.weight.dtype)
        x = (self.norm(features) - self.mean) / self.deviation
        return x + self.frame[:x.shape[1], None, None] + self.row[:, None] + self.column


class Project(nn.Module):
    """SwiGLU from d to the decoder's width. The output starts about as large as a row of the decoder's table
    of words, because both enter the same stream."""

    def __init__(self, dim, width):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 4 * dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, width)
        # gate and up start with variance 1/3, and silu(gate) · up is small there: the 8 makes up for it
        nn.init.normal_(self.down.weight, std=8 * (4 * dim * width) ** -0.5)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):                                       # (N, d) -> (N, width)
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TrajectoryConnector(nn.Module):
    """TrajVLM: features (v, t, h, w, d), ids (v, t, h, w) -> (N, width).

    Window after window, m tokens of each live trajectory, in order of their numbers. A dead one owns no point
    of its window and gives no token, so windows have different numbers of tokens. PAPER: a depth-2 Perceiver
    under hard masks. shape: the segmenter's TrajTokConfig; placed: PlacedFeatures."""

    def __init__(self, cfg, shape, placed, dim, width):
        super().__init__()
        self.m, self.num_queries = cfg.tokens_per_trajectory, shape.num_queries
        self.features, self.project = placed, Project(dim, width)
        self.encoder = TrajectoryEncoder(TrajTokConfig(
            dim=dim, num_queries=shape.num_queries, heads=shape.heads, depth=2, max_tokens=self.m,
            out_dim=dim))

    def owner(self, ids):
        """(v, t, h, w): which of all live trajectories, counted over the windows, each cell belongs to."""
        window = torch.arange(len(ids), device=ids.device)[:, None, None, None]
        # unique sorts what occurs, window by window, and tells the place of each cell's value among it
        return torch.unique(self.num_queries * window + ids, return_inverse=True)[1]

    def forward(self, features, ids):
        # CHOICE: the hard mask in place of the soft one, which cannot learn here because the segmenter is
        # frozen. A token starts at the plain mean of its points: the softmax of 1e4 x mask is the mask.
        seg = assign(1e4 * one_hot(ids.flatten(1), self.num_queries), ids.shape[1:])
        tokens = self.encoder(self.features(features).flatten(1, 3), seg, self.m)
        return self.project(tokens.z[tokens.mask])


class PatchConnector(nn.Module):
    """PatchVLM: features (v, t, h, w, d) -> means over the cells of a grid (t', h', w') -> (v t' h' w',
    width)."""
    m = 1

    def __init__(self, cfg, placed, dim, width):
        super().__init__()
        self.frames, self.side = cfg.patch_frames, cfg.patch_side
        self.features, self.project = placed, Project(dim, width)

    def grid(self, frames):
        """(t', h', w') for windows of so many frames: a picture has one step in time."""
        return min(self.frames, frames), self.side, self.side

    def owner(self, ids):
        """(v, t, h, w): the token, counted over the windows, that each cell is pooled into."""
        grid = self.grid(ids.shape[1])
        cells = torch.arange(len(ids) * math.prod(grid), dtype=torch.float32, device=ids.device)
        # by the nearest cell; float32 holds these numbers exactly
        return F.interpolate(cells.view(-1, 1, *grid), size=ids.shape[1:])[:, 0].long()

    def forward(self, features, ids):
        x = rearrange(self.features(features), "v t h w d -> v d t h w")
        x = F.adaptive_avg_pool3d(x, self.grid(ids.shape[1]))   # (v, d, t', h', w')
        return self.project(rearrange(x, "v d t h w -> (v t h w) d"))


# -----------------------------------------------------------------------------------------------------------
# The model
# -----------------------------------------------------------------------------------------------------------

class VLM(nn.Module):
    """Decoder, connector, frozen segmenter and vision. Without vision the connector reads the segmenter's
    features; with cfg.connector == "blind" there is the decoder alone."""

    def __init__(self, cfg, decoder, segmenter, vision):
        super().__init__()
        self.decoder, self.connector, self.segmenter, self.vision = decoder, None, None, None
        decoder.recompute = cfg.recompute
        if cfg.connector == "blind":
            return
        # CHOICE: without SigLIP2 a grid of half the segmenter's side. SigLIP2's side is 27, about half of 56,
        # that of the published segmenter.
        dim, self.side = segmenter.cfg.dim, segmenter.cfg.image_size // 8
        if vision is not None:
            vision.recompute = cfg.recompute
            dim, self.side = vision.cfg.hidden_size, vision.cfg.side
        width = decoder.cfg.hidden_size
        placed = PlacedFeatures(dim, cfg.window, self.side)
        self.connector = PatchConnector(cfg, placed, dim, width)
        # both connectors read the same features: they differ in how they pool them
        if cfg.connector == "trajtok":
            self.connector = TrajectoryConnector(cfg, segmenter.cfg, placed, dim, width)
        self.segmenter = segmenter.requires_grad_(False)
        self.vision = vision

    def embed(self, ids, visual, inputs):
        """-> (b, s, w): embedded words, and visual tokens where they belong. inputs: what `visual_inputs`
        gave."""
        x = self.decoder.embed_tokens(ids)
        if inputs is None:
            return x
        # The vision tower learns, so it runs here; the frozen segmenter ran in visual_inputs or before.
        features = self.vision(inputs["video"]) if self.vision else inputs["features"]
        tokens = self.connector(features, inputs["ids"]).to(x.dtype)                # (N, w)
        return torch.where((visual >= 0)[..., None], tokens[visual.clamp(min=0)], x)

    def forward(self, ids, visual, targets, inputs=None):
        """-> -log p of each row's answers, summed over their tokens (b,)."""
        losses = self.decoder(self.embed(ids, visual, inputs), targets)             # (number of targets,)
        # the row of each loss; losses of one row are added up
        row = (targets >= 0).nonzero()[:, 0]
        return losses.new_zeros(len(ids)).index_add(0, row, losses)


@torch.no_grad()
def segment_windows(segmenter, windows, side, bf16=None):
    """Windows uint8 (v, t, H, W, 3) -> the segmenter's features (v, t, h, w, d) and ids (v, t, h, w), h = w =
    side. As published, logits are resized to the vision grid, and then the argmax is taken."""
    # the segmenter sees frames of the size that it was trained on
    with trajtok.precision(windows.device, bf16):
        seg = segmenter.segment(resize(normalise(windows), segmenter.cfg.image_size))
    t, h, w = seg.grid
    features = rearrange(seg.features, "v (t h w) d -> (v t) d h w", t=t, h=h)
    features = F.adaptive_avg_pool2d(features, side)
    return rearrange(features, "(v t) d h w -> v t h w d", t=t), seg.masks((side, side))


# -----------------------------------------------------------------------------------------------------------
# Configuration
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VLMConfig(trajtok.TrainConfig):
    """Trains a language model that reads a video through trajectories, through patches, or not at all."""
    size: str = "nano"                      # one of VLM_SIZES: nano, 0.6b, 1.7b, 4b
    connector: str = "trajtok"              # trajtok, patch, or blind (no video)
    data: str = "world"                     # made stories, or a manifest with `conversations` or `qa`
    captions: str | None = None             # a manifest for the first stage; default: --data
    # the parts
    decoder: str | None = None              # a published Qwen3 folder; nano's default: random weights
    vision: str | None = None               # a published SigLIP2 folder; nano: the segmenter's features
    tokenizer: str | None = None            # a published Qwen3 folder; default: the decoder's, or `world`
    segmenter: str | None = None            # a run's folder, or the authors' file; nano pre-trains one
    segmenter_steps: int = 100              # of a segmenter that is pre-trained here
    # the clips
    frames: int = 64                        # of a clip; made stories have 8, 16, 32, ... up to so many
    window: int = 8                         # frames with trajectories of their own and one time stamp
    tokens_per_trajectory: int = 1          # 1, 2 or 4
    patch_frames: int = 2                   # patch: number of tokens of a window along time ...
    patch_side: int = 2                     # ... and along each side of the picture
    questions: int = 4                      # about each clip in a step
    clips: int = 600                        # made stories of the shortest length to learn from
    # the training: captions first, then questions; each part has a learning rate in either stage
    caption_steps: int = 0                  # steps of the first stage
    steps: int = 480                        # steps of the second stage
    batch: int = 16                         # clips a step of each process
    lr: float = 1.0                         # a factor of the size's rates, see NANO_RATES
    warmup: int = 20                        # steps of linear warm-up in each stage; then a cosine to 1 %
    processes: int = 0                      # on this machine, weights sharded; 0: one for each GPU
    recompute: bool = False                 # less memory, more time: activations are computed again
    # the evaluation
    eval_clips: int = 96                    # held-out made stories of each length

    def __post_init__(self):
        super().__post_init__()
        trajtok.at_least(self, 1, "frames window questions clips eval_clips segmenter_steps")
        trajtok.at_least(self, 1, "patch_frames patch_side")
        trajtok.at_least(self, 0, "caption_steps processes")
        if self.connector not in ("trajtok", "patch", "blind"):
            raise BadInput(f"--connector {self.connector}: trajtok, patch or blind")
        if self.tokens_per_trajectory not in (1, 2, 4):
            raise BadInput(f"--tokens-per-trajectory {self.tokens_per_trajectory}: 1, 2 or 4")
        if self.frames > self.window and self.frames % self.window:
            raise BadInput(f"--frames {self.frames}: give a multiple of --window {self.window}")
        if self.data == "world" and (self.vision or self.frames < 8 or 8 % self.window):
            raise BadInput("--data world: no --vision, --frames 8 or more, and a --window that divides 8")
        if not self.segmenter and (self.size != "nano" or self.data != "world"):
            raise BadInput("--segmenter: give a folder of `trajtok.py pretrain`, or the authors' file")
        if self.size != "nano" and not (self.decoder and self.vision):
            raise BadInput(f"--size {self.size}: give --decoder and --vision, a published folder each")


# PAPER: captions, then questions, with a vision tower that learns, too. `batch` is that of each process.
FULL = dict(questions=1, batch=8, caption_steps=2000, steps=10_000, warmup=300, save_every=1000,
            patch_frames=8, patch_side=4, weight_decay=0.0, recompute=True)
VLM_SIZES = {"nano": {}, "0.6b": FULL, "1.7b": FULL, "4b": FULL}
# Peak learning rates of each part, on captions and on questions. PAPER: the published ones. CHOICE: nano
# starts from random weights and goes straight to the questions.
PUBLISHED_RATES = {"connector.": (2e-4, 5e-6), "vision.": (6e-6, 5e-6), "decoder.": (2e-5, 1e-5)}
NANO_RATES = {"connector.": (2e-3, 2e-3), "vision.": (0.0, 0.0), "decoder.": (2e-3, 2e-3)}


# -----------------------------------------------------------------------------------------------------------
# Clips and what is asked about them. A batch is a dict of lists with one item a clip: caption; qa, its
# conversations, each a list of turns; times of its frames (seconds); and video (b, T, H, W, 3), or of made
# stories features and ids of their windows
# -----------------------------------------------------------------------------------------------------------

def story_world(frames, size=64):
    """At most four objects, no two of one colour, and an act a second."""
    return data.World(size, frames, 4, shared_colours=False, acts=max(1, frames // 8), story=True)


def cut_windows(video, window):
    """(b, T, ...) -> (b·windows, t, ...). A picture, or a clip shorter than a window, is one window."""
    return rearrange(video, "b (n t) ... -> (b n) t ...", t=min(video.shape[1], window))


def draw_stories(cfg, segmenter, frames, indices, device):
    """-> a list of clips: dicts of caption, qa, times, and of the clip's n windows features (n, t, h, w, d)
    and ids (n, t, h, w). The segmenter is frozen: it runs once, here."""
    world = story_world(frames, segmenter.cfg.image_size)
    # at most 256 frames at once: the pixels of thousands of clips would not fit into memory
    batches = data.WorldBatches(world, max(256 // frames, 1), indices=indices)
    times = [i / FPS for i in range(frames)]
    clips = []
    for i in tqdm(range(len(batches)), desc=f"{frames} frames", leave=False, disable=None):
        batch = data.finish(batches[i], device)
        windows = cut_windows(batch["video"], cfg.window)
        features, ids = segment_windows(segmenter, windows, segmenter.cfg.image_size // 8, cfg.bf16)
        # half precision and short numbers: thousands of windows are kept
        features = features.to("cpu", torch.float16).split(frames // cfg.window)
        ids = ids.to("cpu", torch.int16).split(frames // cfg.window)
        # each question is a conversation of one turn
        clips += [dict(caption=caption, qa=[[turn] for turn in qa], times=times, features=seen, ids=owners)
                  for caption, qa, seen, owners in zip(batch["caption"], batch["qa"], features, ids)]
    return clips


def join(clips):
    """A list of stories -> a batch. Windows have different numbers of tokens, so nothing is stacked here."""
    return {key: [clip[key] for clip in clips] for key in clips[0]} | dict(bad=[])


class StoryBatches(Dataset):
    """Batch i for training: a length and some of its clips, drawn from (seed, step). With p processes,
    batches step·p .. step·p + p - 1 are those of one step, and of one length: all processes then have rows of
    about the same length.

    CHOICE: only the shortest clips in the first two fifths of the steps: to find the right token among six is
    learnt in minutes, among sixty it is not."""

    def __init__(self, stories, cfg, processes):
        # {number of frames: its clips}
        self.stories, self.cfg, self.processes = stories, cfg, processes

    def __getitem__(self, i):
        step, rank = divmod(i, self.processes)
        rng = np.random.default_rng((self.cfg.seed, step))
        # the generator does not know the process: all of them draw one length and one order of its clips, and
        # each process takes every p-th clip
        frames = 8
        if step >= 0.4 * self.cfg.steps:
            frames = int(rng.choice(list(self.stories)))
        clips = self.stories[frames]
        chosen = rng.permutation(len(clips))[:self.cfg.batch * self.processes]
        return join([clips[j] for j in chosen[rank::self.processes]])


def open_stories(cfg, segmenter, processes, device):
    """-> batches of captions, batches of questions (the same clips), held-out batches of one clip. Of stories
    n times as long there are 1 / sqrt(n) as many."""
    stories, held_out = {}, []
    # lengths 8, 16, 32, ... up to cfg.frames; each has indices of its own, so no story is a part of another
    for place in range(cfg.frames.bit_length() - 3):            # 64 frames: 0 .. 3
        frames = 8 * 2 ** place
        count = max(round(cfg.clips / 2 ** (place / 2)), processes)
        learnt = data.TRAIN + 10_000_000 * place
        stories[frames] = draw_stories(cfg, segmenter, frames, range(learnt, learnt + count), device)
        tested = data.TEST + 1_000_000 * place
        held_out += draw_stories(cfg, segmenter, frames, range(tested, tested + cfg.eval_clips), device)
    batches = StoryBatches(stories, cfg, processes)
    return batches, batches, [join([clip]) for clip in held_out]


def open_films(cfg, size, processes):
    """Manifests -> batches of captions, batches of questions, held-out batches of one clip."""
    entries = data.read_manifest(cfg.data)
    for entry in entries:
        # `qa` holds single questions, `conversations` lists of turns. Each question becomes a conversation of
        # one turn, so that there is only one kind from here on.
        entry["qa"] = [[turn] for turn in entry["qa"]] + entry["conversations"]
    entries = [entry for entry in entries if entry["qa"]]
    if len(entries) < 2:
        raise BadInput(f'{cfg.data}: give at least two clips with "conversations" or "qa"')
    asked, test = data.split(entries)
    add_options(test)
    # No captions of held-out videos: they may tell the answers.
    tested = {os.path.realpath(entry["path"]) for entry in test}
    captioned = [entry for entry in data.read_manifest(cfg.captions or cfg.data)
                 if entry["caption"] and os.path.realpath(entry["path"]) not in tested]
    if cfg.caption_steps and not captioned:
        raise BadInput(f"{cfg.captions or cfg.data}: no captions; give --captions, or --caption-steps 0")
    print(f"{len(asked)} clips to learn questions from, {len(test)} held out, {len(captioned)} captioned")
    # stride 0: frames are spread over the whole video
    options = cfg.frames, size, cfg.batch, cfg.seed, True, 0
    stages = [data.real_batches(some, *options) for some in (captioned, asked)]
    training = [data.Mixed(sets, [one.files for one in sets], cfg.seed, processes) for sets in stages]
    held_out = data.real_batches(test, cfg.frames, size, 1, cfg.seed, False, 0)
    return *training, ConcatDataset(held_out)


def frame_size(*parts):
    """Pixels of a side at which films are decoded, for a segmenter and a vision tower or None."""
    return max([part.cfg.image_size for part in parts if part], default=64)


def add_options(entries):
    """Give the last question of each conversation, if it has no options, its answer and up to three others to
    choose from, in an order that is the same in every run."""
    turns = [talk[-1] for entry in entries for talk in entry["qa"]]
    for number, turn in enumerate(turns):
        # answers to questions of the same type: wrong ones of another type would be found without the video
        others = {other["answer"] for other in turns if other.get("type") == turn.get("type")}
        rng = np.random.default_rng(number)
        some = rng.permutation(sorted(others - {turn["answer"]}))[:3].tolist()
        turn.setdefault("options", rng.permutation([turn["answer"], *some]).tolist())


def visual_inputs(batch, model, cfg, device):
    """A batch -> what the model sees of its v windows (None: blind), and of each clip the windows as chat
    wants them: time stamp and numbers of the visual tokens."""
    if model.connector is None:
        return None, [()] * len(batch["qa"])
    # Real clips come as pixels: features of thousands of long films do not fit into memory, and a vision
    # tower that learns has other features at each step. Stories were segmented before the training.
    if "video" in batch:
        video = cut_windows(batch["video"], cfg.window).to(device)
        features, ids = segment_windows(model.segmenter, video, model.side, cfg.bf16)
        inputs = dict(video=video, features=features, ids=ids)
    else:
        features = torch.cat(batch["features"]).float().to(device)
        inputs = dict(features=features, ids=torch.cat(batch["ids"]).long().to(device))
    # Visual tokens are numbered over the whole batch, clip after clip and window after window. Each owner of
    # cells has m of them, so the largest owner in a window says where the tokens of the window end.
    owner = model.connector.owner(inputs["ids"]).flatten(1).amax(1)
    ends = (model.connector.m * (owner + 1)).tolist()
    numbers = map(range, [0, *ends], ends)
    windows = []
    for times in batch["times"]:
        stamps = [stamp(times[i:i + cfg.window]) for i in range(0, len(times), cfg.window)]
        # as many as there are stamps; the next clip goes on behind them
        windows.append(list(zip(stamps, numbers)))
    return inputs, windows


# -----------------------------------------------------------------------------------------------------------
# The run
# -----------------------------------------------------------------------------------------------------------

def pretrain_segmenter(cfg):
    """-> the folder of the segmenter of runs without --segmenter; those with the same --out and
    --segmenter-steps share it."""
    plan = trajtok.PretrainConfig(
        name=f"vlm-{cfg.segmenter_steps}", out=cfg.out, steps=cfg.segmenter_steps, num_queries=16,
        warmup=cfg.segmenter_steps // 10, eval_clips=32, device=cfg.device, overwrite=True,
        **trajtok.NANO_CLIPS)
    folder = trajtok.run_folder(plan, "segmenter")
    # result.json is written last. If two runs begin at the same time both train the segmenter, from the same
    # seed: it does not matter whose files are kept.
    if not (folder / "result.json").exists():
        trajtok.pretrain(plan)
    return str(folder)


def open_parts(cfg):
    """-> tokenizer, decoder, segmenter (None: --segmenter is not given yet), and vision (None: the
    segmenter's features)."""
    encoding = load_tokenizer(cfg.tokenizer or cfg.decoder or "world")
    decoder = Decoder.from_pretrained(cfg.decoder) if cfg.decoder else Decoder(DECODERS[cfg.size])
    if encoding.n_vocab > decoder.cfg.vocab_size:
        raise BadInput(f"--tokenizer: {encoding.n_vocab} ids, but the decoder has {decoder.cfg.vocab_size}")
    segmenter = trajtok.load_segmenter(cfg.segmenter) if cfg.segmenter else None
    return encoding, decoder, segmenter, SigLIP2.from_pretrained(cfg.vision) if cfg.vision else None


def set_rates(optimizer, step, cfg):
    """The learning rates of this step. Captions and questions each warm up, and end at 1 %."""
    stage, steps = 0, cfg.caption_steps
    if step >= cfg.caption_steps:
        stage, step, steps = 1, step - cfg.caption_steps, cfg.steps
    plan = dataclasses.replace(cfg, steps=steps, warmup=min(cfg.warmup, steps // 2))
    for group in optimizer.param_groups:
        group["lr"] = trajtok.learning_rate(step, plan) * group["scale"][stage]


def training_rows(batch, windows, encoding, cfg, step):
    """cfg.questions conversations of each clip, drawn at random; where a clip has fewer, they are repeated.
    The draw depends on the place of a clip in the whole batch, not on the process that has it."""
    rank, processes = ranks()
    rows = []
    for i, own in enumerate(windows):
        talks = batch["qa"][i]
        if step < cfg.caption_steps:
            talks = [[dict(question=DESCRIBE, answer=batch["caption"][i])]]
        order = np.random.default_rng((cfg.seed, step, rank + i * processes)).permutation(len(talks))
        # np.resize repeats the order from its beginning
        for j in np.resize(order, cfg.questions):
            rows.append(chat(encoding, talks[j], own))
    return rows


def train(cfg, folder):
    device = trajtok.setup(cfg)
    rank, processes = ranks()
    # 1. the parts, the clips, the model
    encoding, decoder, segmenter, vision = open_parts(cfg)
    segmenter.to(device)
    if cfg.data == "world":
        captions, questions, held_out = open_stories(cfg, segmenter, processes, device)
    else:
        captions, questions, held_out = open_films(cfg, frame_size(segmenter, vision), processes)
    model = VLM(cfg, decoder, segmenter, vision).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    if processes > 1:
        shard(model, device, cfg)
    rates = NANO_RATES if cfg.size == "nano" else PUBLISHED_RATES
    optimizer = trajtok.make_optimizer(model, cfg, rates)
    # first the checkpoint: a --resume with flags that do not fit it must not change config.json
    first = restore(folder, model, optimizer) if cfg.resume else 0
    trajtok.open_run(folder, cfg, manifest=data.fingerprint(cfg.data, cfg.captions))
    log, damage = trajtok.Log(folder, first), data.Damage()
    print(f"{cfg.connector}, {parameters / 1e6:.2f} M parameters, on {device}")
    # 2. batches of captions, then of questions, beginning at the saved step. PAPER: with captions the
    # connector first learns to make tokens that the decoder can read
    steps = cfg.caption_steps + cfg.steps
    early, late = min(first, cfg.caption_steps), max(first - cfg.caption_steps, 0)
    batches = itertools.chain(data.loader(captions, early, cfg.caption_steps, cfg.workers, rank, processes),
                              data.loader(questions, late, cfg.steps, cfg.workers, rank, processes))
    began = mark = time.time()
    for step, batch in enumerate(batches, first):
        damage.add(batch["bad"])
        set_rates(optimizer, step, cfg)
        # 3. what is seen, and one conversation a row
        inputs, windows = visual_inputs(batch, model, cfg, device)
        rows = training_rows(batch, windows, encoding, cfg, step)
        ids, visual, targets = lay_out(rows, device)
        if step == 0 and inputs and not vision:
            model.connector.features.calibrate(inputs["features"])
        # 4. forward, backward, step
        model.train()
        optimizer.zero_grad()
        with trajtok.precision(device, cfg.bf16):
            # the mean over an answer's tokens, then over the rows. All processes have the same number of
            # rows, so the mean over processes is that of the whole batch
            loss = (model(ids, visual, targets, inputs) / (targets >= 0).sum(1)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        # of sharded gradients each process has a part of the norm: full_tensor puts it together
        norm = norm.full_tensor() if processes > 1 else norm
        terms = dict(loss=trajtok.mean_over_processes([loss.item()], device)[0], gradient_norm=norm.item())
        trajtok.check_finite(terms, step)
        optimizer.step()
        # 5. the log, the checkpoint
        clips = len(windows) * processes
        seconds, mark = time.time() - mark, time.time()
        log(step=step, **terms, lr=optimizer.param_groups[0]["lr"],
            visual_tokens=int((visual >= 0).sum()) / len(rows), clips=clips, seconds=seconds,
            clips_per_second=clips / seconds, memory_gb=trajtok.peak_memory_gb(device))
        if step % 20 == 0 or step + 1 == steps:
            left = (time.time() - began) / (step + 1 - first) * (steps - 1 - step)
            print(f"step {step:5d}/{steps}  loss {terms['loss']:.3f}  {left:.0f} s left", flush=True)
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save(folder, model, optimizer, step + 1)
    # all processes take part: the weights are sharded
    answers = evaluate(model, held_out, encoding, cfg, device, damage)
    if rank == 0:
        write_results(answers, cfg, device, folder, log, damage, parameters)


# -----------------------------------------------------------------------------------------------------------
# Several processes: weights, gradients and moments are sharded (FSDP2)
# -----------------------------------------------------------------------------------------------------------

def shard(model, device, cfg):
    """FSDP2: a process holds its share of the weights of each layer of decoder and vision, and gathers the
    whole layer while it computes. The segmenter is small and runs outside of forward: every process keeps it
    whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    bf16 = device.type == "cuda" if cfg.bf16 is None else cfg.bf16
    # rotary angles stay float32: inputs are not cast
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (ranks()[1],))
    for layer in (*model.decoder.layers, *(model.vision.encoder["layers"] if model.vision else ())):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # what is ignored stays an ordinary parameter in every process
    whole = set(model.segmenter.parameters()) if model.segmenter else set()
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


# Whole tensors, under the names of the parameters: any number of processes can resume from the file.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(folder, model, optimizer, step):
    """As trajtok.save_checkpoint. All processes have to call it, because each holds a part of the weights."""
    trajtok.save_checkpoint(folder, *get_state_dict(model, optimizer, options=WHOLE), step)


def restore(folder, model, optimizer):
    """The last checkpoint into model and optimizer -> the step to begin with: 0 if nothing was saved."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = trajtok.read_state(path, mmap=True)
    shapes = {name: x.shape for name, x in state["model"].items()}
    if shapes != {name: x.shape for name, x in model.state_dict().items()}:
        raise BadInput(f"{path}: weights of another model or size; give --resume the flags of the run")
    given = [dict(group) for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"], options=WHOLE)
    # the moments are the saved run's, the settings, e.g. --weight-decay, those of the flags given now
    for group, settings in zip(optimizer.param_groups, given):
        group.update(settings)
    return state["step"]


# -----------------------------------------------------------------------------------------------------------
# Evaluation
# -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, held_out, encoding, cfg, device, damage):
    """Each held-out question is answered by its most likely option -> a dict for each question."""
    model.eval()
    answers = []
    for number in tqdm(range(len(held_out)), desc="held-out clips", leave=False, disable=None):
        batch = held_out[number]
        damage.add(batch["bad"])
        if not batch.get("qa"):                                 # the file could not be read
            continue
        inputs, (windows,) = visual_inputs(batch, model, cfg, device)
        # A row for each option of each question. The last turn of a conversation is asked, those before it
        # are its context. Likelihoods are compared, not generated texts: an answer in other words would have
        # to be judged by another model.
        counts = [len(turn["options"]) for *_, turn in batch["qa"][0]]
        rows = [chat(encoding, [*before, turn | dict(answer=text)], windows)
                for *before, turn in batch["qa"][0] for text in turn["options"]]
        with trajtok.precision(device, cfg.bf16):
            # (options,) for each question
            costs = model(*lay_out(rows, device), inputs).split(counts)
        for (*_, turn), cost in zip(batch["qa"][0], costs):
            # summed over the tokens: -log p of the whole option, and of earlier answers, which all options
            # share
            right = turn["options"][int(cost.argmin())] == turn["answer"]
            answers.append(dict(
                type=turn.get("type", "question"), frames=len(batch["times"][0]),
                accuracy=float(right), chance=1 / len(cost)))
    return answers


def accuracies(answers):
    """-> accuracy and chance of all questions, of each type and of each length, as one flat dict: accuracy,
    chance, accuracy_8_frames, ..., accuracy_what, ... Chance is the mean of 1 / number of options."""
    groups = {}
    for answer in sorted(answers, key=lambda answer: answer["frames"]):
        for name in ("", f"_{answer['frames']}_frames", f"_{answer['type']}"):
            for key in ("accuracy", "chance"):
                groups.setdefault(key + name, []).append(answer[key])
    return {name: sum(values) / len(values) for name, values in groups.items()}


def write_results(answers, cfg, device, folder, log, damage, parameters):
    """Write result.json and pictures, and print what they say."""
    if not answers:
        raise BadInput(f"{cfg.data}: no held-out question can be asked; run `python data.py check` on it")
    scores, lines = accuracies(answers), log.lines()
    seconds = sum(line["seconds"] for line in lines)
    result = scores | dict(
        questions=len(answers), parameters=parameters, seconds=seconds, seed=cfg.seed,
        visual_tokens=sum(line["visual_tokens"] for line in lines) / len(lines),
        clips_per_second=sum(line["clips"] for line in lines) / seconds,
        peak_memory_gb=trajtok.peak_memory_gb(device), left_out=len(damage), connector=cfg.connector)
    write_json(folder / "result.json", result)
    # the curve of the loss, then the accuracy by length with chance beside it
    trajtok.save_pictures(folder, [], log, ["loss"])
    lengths = sorted({answer["frames"] for answer in answers})
    curves = {name: [(t, 100 * scores[f"{name}_{t}_frames"]) for t in lengths]
              for name in ("accuracy", "chance")}
    trajtok.plot(folder / "accuracy.svg", {"held-out questions, %": curves}, x="frames of the clip")
    print("\n".join(trajtok.aligned([[key, f"{100 * value:.1f} %"] for key, value in scores.items()])))
    print(f"{len(answers)} questions; {seconds:.0f} s of training; {len(damage)} files left out\n"
          f"wrote {folder}/: model.safetensors, result.json, log.jsonl, curves.svg, accuracy.svg")


# -----------------------------------------------------------------------------------------------------------
# python train_vlm.py ask
# -----------------------------------------------------------------------------------------------------------

def open_model(folder, device="cpu"):
    """The folder of a run -> its VLMConfig, tokenizer and VLM. The parts that it names must still be
    there."""
    if "connector" not in trajtok.read_json(Path(folder) / "config.json"):
        raise BadInput(f"{folder}/config.json: not of a run of train_vlm.py; give another --model")
    cfg = trajtok.resumed(VLMConfig(), Path(folder), [])
    encoding, *parts = open_parts(cfg)
    return cfg, encoding, trajtok.load_weights(VLM(cfg, *parts), folder).eval().to(device)


def attended(decoder, x, count):
    """Embeddings (1, s, w) of a prompt of `count` tokens and its answer -> how much the answer attends to
    each token of the prompt (count,): softmax weights, averaged over layers, heads and the positions that
    predict the answer, from the last one of the prompt on."""
    cache, weights = {}, []
    decoder(x, cache=cache)
    for q, k, _ in cache.values():
        q = q[:, :, count - 1:]
        # the value of each position is its own unit vector: what attention gives is then its weights
        places = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
        mask = causal_mask(q.shape[2], k)
        weights.append(F.scaled_dot_product_attention(q, k, places, mask, enable_gqa=True))
    return torch.cat(weights).mean((0, 1, 2))[:count]


@torch.no_grad()
def ask(argv):
    """Ask a trained model about a video. The answer is printed, and a picture shows what it attended to."""
    parser = data.OneLineParser(prog="train_vlm.py ask", description=ask.__doc__, allow_abbrev=False)
    parser.add_argument("clip", help="a video or a picture")
    parser.add_argument("question", help='"What moves?"')
    parser.add_argument("--model", default="out/vlm-nano-trajtok", help="the folder of a run")
    parser.add_argument("--out", default="out", help="folder for <clip>-attended.png")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    device = trajtok.choose_device(args.device)
    cfg, encoding, model = open_model(args.model, device)
    # a multiple of cfg.window, or all frames of a clip shorter than a window; a picture is one frame
    frames = min(cfg.frames, len(data.frame_times(args.clip))) or 1
    frames -= frames % min(frames, cfg.window)
    video, times = data.decode(args.clip, frames, frame_size(model.segmenter, model.vision))
    batch = dict(video=torch.from_numpy(video)[None], times=[times.tolist()], qa=[[]])
    inputs, windows = visual_inputs(batch, model, cfg, device)
    # the same text as in training, up to where the answer begins
    prompt = chat(encoding, [dict(question=args.question, answer=None)], windows[0])
    ids, visual, _ = lay_out([prompt], device)
    stop = [encoding.encode_single_token(token) for token in (TURN_END, END)]
    x = model.embed(ids, visual, inputs)
    answer = list(generate(model.decoder, x, stop, encoding.n_vocab))
    # decoded all at once, because a token may end within a character
    print(encoding.decode(answer))
    visual = visual[0] >= 0
    print(f"{frames} frames, {int(visual.sum())} visual tokens, {len(prompt)} tokens in all")
    if inputs:
        said = model.decoder.embed_tokens(torch.tensor([answer], dtype=torch.int64, device=device))
        weight = attended(model.decoder, torch.cat((x, said), 1), len(prompt))
        # what the m tokens of an owner get together
        weight = weight[visual].view(-1, model.connector.m).sum(1)
        # cells whose trajectory or patch is attended to less than the mean are not painted
        owner = model.connector.owner(inputs["ids"])            # (v, t, h, w)
        owner[(weight < weight.mean())[owner]] = -1
        pixels = F.interpolate(owner.flatten(0, 1)[:, None].float(), size=video.shape[1:3])[:, 0]
        path = Path(args.out) / f"{Path(args.clip).stem}-attended.png"
        strip = trajtok.filmstrip(video, {"attended": pixels.long().cpu().numpy()}, min(8, frames))
        write_png(path, strip)
        print(f"wrote {path}")


# -----------------------------------------------------------------------------------------------------------

@data.one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ask"]:
        return ask(argv[1:])
    cfg = configure(VLMConfig, VLM_SIZES, argv)
    folder = trajtok.run_folder(cfg, "vlm", f"-{cfg.connector}")
    if cfg.resume:
        cfg = trajtok.resumed(cfg, folder, argv)
    if not cfg.segmenter:
        # the other parts are opened first: a wrong folder is refused before the minutes of the pre-training
        open_parts(cfg)
        cfg = dataclasses.replace(cfg, segmenter=pretrain_segmenter(cfg))
    # The segmenter was pre-trained by one process, before torchrun starts several. Each of them comes here
    # again, and finds the segmenter's folder.
    trajtok.launch(cfg)
    train(cfg, folder)


if __name__ == "__main__":
    main()
