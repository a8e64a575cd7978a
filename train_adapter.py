"""TrajAdapter (paper, "Setting 2"): trajectory tokens on frozen V-JEPA2 and VideoMAE-v2 features, beside linear and attentive probing.

    video uint8 (b, t, H, W, 3) -> frozen backbone -> features (b, n, d), n = t'·h'·w' tubelets in row-major order

Backbones, written from SPECS 4:

    backbone = load_backbone("vjepa2-vith-fpc64-256")            # a hub folder, or a file of the original release
    backbone.features(normalised (b, t, 3, H, W))                # (b, n, d);  backbone(video) = normalise + features
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import BadInput, write_json
from segmenter import MEAN, STD, count, fit_weights, normalise, read_weights, rename
from trajtok import write_weights

# ---------------------------------------------------------------------------------------------------------------------
# The frozen backbones: V-JEPA2 and VideoMAE(-v2)
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a video transformer. mean, std: of a pixel in [0, 1], what it was trained with."""
    kind: str = "videomae"                      # vjepa2 (rotary positions, any clip) or videomae (a table of positions, one size of clip)
    width: int = 768                            # d
    depth: int = 12                             # blocks
    heads: int = 12
    mlp: int = 3072                             # inner width of a block's MLP
    patch: int = 16                             # pixels of a side of a patch
    tubelet: int = 2                            # frames that a patch spans
    frames: int = 16                            # of a clip
    image_size: int = 224
    eps: float = 1e-6                           # of the LayerNorms
    pool_eps: float = 1e-6                      # of the norm after the mean; the hub's VideoMAE: 1e-5, whatever its config.json says of the others
    norm: str = "tokens"                        # where the last norm stands: after every token (`tokens`), after their mean (`pooled`), nowhere (`none`)
    mean: tuple = MEAN
    std: tuple = STD

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in ("vjepa2", "videomae") or self.norm not in ("tokens", "pooled", "none"):
            raise BadInput(f"backbone of kind {self.kind!r} with norm {self.norm!r}: vjepa2 or videomae; tokens, pooled or none")
        for name in ("width", "depth", "heads", "mlp", "patch", "tubelet", "frames", "image_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise BadInput(f"backbone: {name} {getattr(self, name)!r}: a whole number from 1 on")
        if self.width % self.heads or self.kind == "vjepa2" and self.width // self.heads < 6:
            raise BadInput(f"backbone: width {self.width} and {self.heads} heads: the width must be a multiple of the heads"
                           + ", with 6 channels a head at least" * (self.kind == "vjepa2"))
        if self.image_size % self.patch or self.frames % self.tubelet:
            raise BadInput(f"backbone: {self.frames} frames of {self.image_size} px: not a multiple of tubelets of {self.tubelet} frames x {self.patch} px")
        for eps in (self.eps, self.pool_eps):
            if not isinstance(eps, (int, float)) or not 0 < eps < 1:
                raise BadInput(f"backbone: eps {eps!r} of the norms: a small number above 0, such as 1e-6")
        pixels = (*self.mean, *self.std)
        if not len(self.mean) == len(self.std) == 3 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in pixels) or min(self.std) <= 0:
            raise BadInput(f"backbone: pixel mean {self.mean} and deviation {self.std}: three numbers each, deviations above 0")

    @property
    def grid(self):
        """(t', h', w') of its own size of clip."""
        return self.frames // self.tubelet, self.image_size // self.patch, self.image_size // self.patch


#    name                           kind       width depth heads  mlp patch tubelet frames px           parameters (a test counts them)
BACKBONES = {
    "vjepa2-l":     BackboneConfig("vjepa2",   1024, 24, 16, 4096, 16, 2, 64, 256),
    "vjepa2-h":     BackboneConfig("vjepa2",   1280, 32, 16, 5120, 16, 2, 64, 256),
    "vjepa2-g":     BackboneConfig("vjepa2",   1408, 40, 22, 6144, 16, 2, 64, 256),
    "vjepa2-g-384": BackboneConfig("vjepa2",   1408, 40, 22, 6144, 16, 2, 64, 384),
    "videomae2-b":  BackboneConfig("videomae",  768, 12, 12, 3072, 16, 2, 16, 224, norm="pooled"),
    "videomae2-h":  BackboneConfig("videomae", 1280, 32, 16, 5120, 16, 2, 16, 224, norm="pooled"),
    "videomae2-g":  BackboneConfig("videomae", 1408, 40, 16, 6144, 14, 2, 16, 224, norm="pooled"),
    "nano":         BackboneConfig("videomae",  128,  4,  4,  512,  8, 2,  8,  64),
}


class Attention(nn.Module):
    """Joint self-attention over the tokens of a clip. Of a VideoMAE, queries and values have biases and keys have none: one constant
    added to every key shifts all scores of a query alike, and the softmax does not see it."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width, bias=cfg.kind == "vjepa2"), nn.Linear(cfg.width, cfg.width)
        if self.qkv.bias is None:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(cfg.width)), nn.Parameter(torch.zeros(cfg.width))

    def forward(self, x, tables=None):
        bias = self.qkv.bias if self.qkv.bias is not None else torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = rearrange(F.linear(x, self.qkv.weight, bias), "b n (three a c) -> three b a n c", three=3, a=self.heads)
        if tables is not None:
            q, k = turn(q, *tables), turn(k, *tables)
        # softmax over the keys, all tokens of the clip: no mask, so that a GPU may take its fastest kernel
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b a n c -> b n (a c)"))


class Block(nn.Module):
    """Pre-norm: (1) attention, (2) an MLP with exact GELU. The names are the original releases'."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps), Attention(cfg), nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(cfg.width, cfg.mlp), fc2=nn.Linear(cfg.mlp, cfg.width)))

    def forward(self, x, tables=None):
        x = x + self.attn(self.norm1(x), tables)                             # 1
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))   # 2


class Backbone(nn.Module):
    """What the two families share: tubelets of `tubelet` frames x patch x patch pixels, a linear map, blocks, a last norm.
    features(x (b, t, 3, H, W) normalised) -> (b, n, d); forward(video uint8 (b, t, H, W, 3)) = normalise + features.
    self.left_out: what a loaded file held beside the encoder, in words ("" = nothing)."""
    left_out = ""

    def __init__(self, cfg):
        super().__init__()
        if cfg.kind != self.kind:
            raise BadInput(f"a backbone of kind {cfg.kind} is not a {type(self).__name__}")
        self.cfg = cfg
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, cfg.width, (cfg.tubelet, cfg.patch, cfg.patch), (cfg.tubelet, cfg.patch, cfg.patch))))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.eps) if cfg.norm == "tokens" else nn.Identity()
        self.fc_norm = nn.LayerNorm(cfg.width, eps=cfg.pool_eps) if cfg.norm == "pooled" else nn.Identity()
        for name, p in self.named_parameters():
            if p.dim() > 1:                                      # 1 / sqrt(fan in), as in train_clip.py; the ends of branches shrink with depth
                ends = name.endswith(("attn.proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=p[0].numel() ** -0.5 / (math.sqrt(2 * cfg.depth) if ends else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def grid(self):
        """(t', h', w') of its own size of clip; grid_of tells it of any."""
        return self.cfg.grid

    def grid_of(self, x):
        """x (b, t, 3, H, W) -> (t', h', w'); refuses what is not made of whole tubelets."""
        t, height, width = x.shape[1], *x.shape[-2:]
        if t % self.cfg.tubelet or height % self.cfg.patch or width % self.cfg.patch or not x.numel():
            raise BadInput(f"a clip of {t} frames of {height} x {width} px: this backbone cuts it into tubelets of {self.cfg.tubelet} frames "
                           f"x {self.cfg.patch} x {self.cfg.patch} px; give multiples of them")
        return t // self.cfg.tubelet, height // self.cfg.patch, width // self.cfg.patch

    def embed(self, x):
        """(b, t, 3, H, W) -> (b, n, d): each tubelet through the 3-D convolution, which is a matrix product, as kernel and stride are one."""
        self.grid_of(x)                                          # whole tubelets?
        u, p, proj = self.cfg.tubelet, self.cfg.patch, self.patch_embed["proj"]
        tubes = rearrange(x, "b (t u) c (h p) (w q) -> b (t h w) (c u p q)", u=u, p=p, q=p)
        return F.linear(tubes, proj.weight.flatten(1), proj.bias).to(x.dtype)        # under autocast: the residual stream stays float32

    def encode(self, z, tables=None):
        """(b, n, d) with their positions -> (b, n, d). tables: rotary ones (V-JEPA2)."""
        for block in self.blocks:
            z = block(z, tables)
        return self.norm(z)

    def pool(self, features):
        """(b, n, d) -> (b, d): the mean over tokens, and after it fc_norm, where the published model has that one (norm `pooled`)."""
        return self.fc_norm(features.mean(1))

    def forward(self, video):
        return self.features(normalise(video, self.cfg.mean, self.cfg.std))

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as load_backbone reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "config.json", {"backbone": dataclasses.asdict(self.cfg)})
        write_weights(Path(folder) / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, path, heads=None, image_size=None, frames=None):
        """See load_backbone; refuses the other family."""
        net = load_backbone(path, heads, image_size, frames)
        if not isinstance(net, cls):
            raise BadInput(f"{path}: holds a {net.cfg.kind}, not a {cls.kind}")
        return net


def rotary_3d(grid, channels, device=None):
    """cos, sin, each float32 (n, c), of the tubelets of a grid (t', h', w') and heads of c channels (SPECS 4).
    The channels are shared out to t, h, w in turn, d = 2 floor(floor(c / 3) / 2) each; what is left over stays (cos 1, sin 0):

        angle[p, i] = p · 1e4^(-i / (d/2)),  i < d/2

    The release repeats the d/2 angles one after another, [a0 a1 .. a0 a1 ..], and yet turns adjacent channels as pairs, (0, 1), (2, 3), ..:
    the two channels of a pair turn by different angles, so lengths are not kept. Weights were trained with it: so do we."""
    d = 2 * (channels // 3 // 2)
    omega = 1e4 ** (-torch.arange(d // 2, device=device, dtype=torch.float32) / (d // 2))
    position = torch.stack(torch.meshgrid(*(torch.arange(s, device=device) for s in grid), indexing="ij"), -1).flatten(0, 2)     # (n, 3)
    angle = (position[..., None] * omega).repeat(1, 1, 2).flatten(1)             # (n, 3, d/2) -> (n, 3d)
    angle = F.pad(angle, (0, channels - 3 * d))
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    """x (b, a, n, c), tables (n, c): channels (2j, 2j + 1) = (u, v) become (u cos - v sin, v cos + u sin), each with its own angle. In float32."""
    y = x.float()
    swapped = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype)


class VJEPA2(Backbone):
    """V-JEPA2's encoder. Positions are rotary, so clips of any number of tubelets go through; cfg.frames and image_size are its own.
    CHOICE: a tubelet's place is its place in this clip. (The hub's implementation counts off rows of its config's crop_size
    whatever comes in; at that size, or with a config of the size that comes in, both are the same.)"""
    kind = "vjepa2"

    def features(self, x):
        return self.encode(self.embed(x), rotary_3d(self.grid_of(x), self.cfg.width // self.cfg.heads, x.device))


def sinusoid(n, width):
    """float32 (n, width): sin (even channels j) and cos (odd ones) of p / 10000^(2 floor(j/2) / width), p the token's place in the
    flattened clip, computed in float64 (SPECS 4)."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 1e4 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


class VideoMAE(Backbone):
    """VideoMAE's encoder, version 1 or 2. Its positions count through the whole clip, so another size or length would move them all."""
    kind = "videomae"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("positions", sinusoid(math.prod(cfg.grid), cfg.width), persistent=False)

    def place(self, x):
        """(b, t, 3, H, W) -> (b, n, d): tubelets with their positions. encode(place(x)) = features(x)."""
        if self.grid_of(x) != self.grid:
            raise BadInput(f"a clip of {x.shape[1]} frames of {x.shape[-2]} x {x.shape[-1]} px: this VideoMAE's positions are made for "
                           f"{self.cfg.frames} frames of {self.cfg.image_size} px and no other size")
        return self.embed(x) + self.positions

    def features(self, x):
        return self.encode(self.place(x))


def new_backbone(cfg):
    """A VJEPA2 or a VideoMAE of that shape with random weights."""
    return (VJEPA2 if cfg.kind == "vjepa2" else VideoMAE)(cfg)


# ---------------------------------------------------------------------------------------------------------------------
# Published backbones: the hub's folders and the original releases' files
# ---------------------------------------------------------------------------------------------------------------------

# published names -> ours, which are those of the original releases (SPECS 4). Query, key and value of the hub are joined afterwards.
BACKBONE_NAMES = [
    # original releases, in their wrappers
    (r"(?:(?:module|backbone|encoder|model)\.)+((?:patch_embed|blocks|norm|fc_norm|head)\..+)", r"\1"),
    # hub, V-JEPA2
    (r"(?:vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.attention\.(query|key|value|proj)\.(.+)", r"blocks.\1.attn.\2.\3"),
    (r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.((?:norm[12]|mlp)\..+)", r"blocks.\1.\2"),
    (r"(?:vjepa2\.)?encoder\.layernorm\.(.+)", r"norm.\1"),
    # hub, VideoMAE; the two biases have two names
    (r"(?:videomae\.)?embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", r"blocks.\1.attn.\2.weight"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(?:q_bias|query\.bias)", r"blocks.\1.attn.q_bias"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.attention\.(?:v_bias|value\.bias)", r"blocks.\1.attn.v_bias"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:videomae\.)?encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:videomae\.)?layernorm\.(.+)", r"norm.\1"),
]
# what may stand beside an encoder: V-JEPA2's predictor and probe; VideoMAE's decoder; classifiers
BESIDE = r"(predictor|pooler|classifier|head|decoder|encoder_to_decoder|mask_token)(\..+)?"
# CHOICE: of V-JEPA2's two encoders the target encoder, the slow mean of the other, with which the release evaluates
WRAPPINGS = ("target_encoder", "encoder", "model", "module", "state_dict")


def load_backbone(path, heads=None, image_size=None, frames=None):
    """A VJEPA2 or a VideoMAE, float32, on the CPU, from
      - a hub folder: config.json, which says which it is, and model.safetensors or its sharded index; preprocessor files, if there
        are any, say how pixels are normalised;
      - a file (.safetensors, .pth, .pt) in the hub's or in the original release's layout: its config.json, if one lies beside it;
        else the shape is read off the tensors, and the heads, which no tensor shows, from the published shape of that width;
      - what save_pretrained wrote.
    heads, image_size, frames: instead of what the folder says, or for files that say nothing. Strict: BadInput lists what is missing,
    unexpected or of another shape; what is known to stand beside an encoder is left out and named in .left_out."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    told = {k: v for k, v in dict(heads=heads, image_size=image_size, frames=frames).items() if v is not None}
    config = read_config(folder) if Path(path).is_dir() or (folder / "config.json").is_file() and Path(path).is_file() else None
    weights, hub, left_out = backbone_names(read_weights(path, WRAPPINGS), path)
    if config is None:
        config = shape_of(weights, hub, heads, path)
    if config["norm"] is None:
        config["norm"] = "pooled" if "fc_norm.weight" in weights else "none"
    cfg = BackboneConfig(**config | told)
    net = fit_weights(new_backbone(cfg), weights, path)
    net.left_out = left_out
    return net


def backbone_names(weights, where):
    """Any published layout -> (weights under our names, was it the hub's?, what is left out, in words)."""
    hub = any("patch_embeddings" in k for k in weights)
    own = rename(weights, BACKBONE_NAMES)
    if len(own) < len(weights):
        raise BadInput(f"{where}: {len(weights) - len(own)} weights are in it twice, under different names; save one encoder alone")
    if "patch_embed.proj.weight" not in own or own["patch_embed.proj.weight"].dim() != 5:
        raise BadInput(f"{where}: neither a V-JEPA2 nor a VideoMAE in a layout that is known (hub, original release); its keys: {', '.join(list(weights)[:4])} ...")
    beside = {}
    for key in [k for k in own if re.fullmatch(BESIDE, k)]:
        beside[key.split(".")[0]] = beside.get(key.split(".")[0], 0) + own.pop(key).numel()
    for i in range(count(own, r"blocks\.(\d+)\.")):
        for part in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{x}.{part}" for x in ("query", "key", "value")]
            if all(n in own and own[n].dim() for n in names) and len({own[n].shape for n in names}) == 1:             # else: named by fit_weights
                own[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([own.pop(n) for n in names])
    return own, hub, ", ".join(f"{name} ({n:,} parameters)" for name, n in beside.items())


def shape_of(weights, hub, heads, where):
    """Weights under our names -> the fields of a BackboneConfig that tensors show; the others from the published shape that fits."""
    width, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    kind = "videomae" if "blocks.0.attn.q_bias" in weights else "vjepa2"
    if "blocks.0.mlp.fc1.weight" not in weights:
        raise BadInput(f"{where}: missing blocks.0.mlp.fc1.weight; not a whole encoder")
    shown = dict(kind=kind, width=width, depth=count(weights, r"blocks\.(\d+)\."), mlp=len(weights["blocks.0.mlp.fc1.weight"]), patch=patch, tubelet=tubelet)
    like = next((c for c in BACKBONES.values() if (c.kind, c.width, c.depth, c.patch) == (kind, width, shown["depth"], patch)), None)
    if like is None and heads is None:
        raise BadInput(f"{where}: a {kind} of width {width} and {shown['depth']} blocks is none that was published; say how many heads it has, "
                       "or put its config.json beside it")
    like = dataclasses.asdict(like or BackboneConfig(kind, width, shown["depth"], heads, frames=16, image_size=224 // patch * patch))
    norm = "tokens" if kind == "vjepa2" or "norm.weight" in weights else None
    # the hub's VideoMAE has another eps unless its config.json says otherwise
    return like | shown | dict(norm=norm) | (dict(eps=1e-12, pool_eps=1e-5) if hub and kind == "videomae" else {})


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return content


# model_type -> our field: (config.json's name for it, the value where config.json is silent)
CONFIG_NAMES = {
    "vjepa2": dict(width=("hidden_size", 1024), depth=("num_hidden_layers", 24), heads=("num_attention_heads", 16), mlp=("mlp_ratio", 4.0),
                   patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("frames_per_clip", 64), image_size=("crop_size", 256), eps=("layer_norm_eps", 1e-6)),
    "videomae": dict(width=("hidden_size", 768), depth=("num_hidden_layers", 12), heads=("num_attention_heads", 12), mlp=("intermediate_size", 3072),
                     patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("num_frames", 16), image_size=("image_size", 224), eps=("layer_norm_eps", 1e-12)),
    "VideoMAEv2": dict(width=("embed_dim", 768), depth=("depth", 12), heads=("num_heads", 12), mlp=("mlp_ratio", 4.0),
                       patch=("patch_size", 16), tubelet=("tubelet_size", 2), frames=("num_frames", 16), image_size=("img_size", 224), eps=("layer_norm_eps", 1e-6)),
}
# what config.json may say and these classes are not made for, were it otherwise
CONFIG_FIXED = dict(in_chans=3, num_channels=3, hidden_act="gelu", qkv_bias=True, qv_bias=True, use_learnable_pos_emb=False, cos_attn=False, init_values=0,
                    norm_layer="nn.LayerNorm")


def read_config(folder):
    """A folder's config.json, and preprocessor files beside it -> fields of a BackboneConfig (norm None: the weights will show it)."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: holds no config.json; give a folder as the model hub serves it, or a file of weights")
    config = read_json(path)
    try:
        fields = dataclasses.asdict(BackboneConfig(**config["backbone"])) if "backbone" in config else hub_config(config, path) | read_pixels(folder)
        BackboneConfig(**fields | ({} if fields["norm"] else dict(norm="none")))     # checks itself, before gigabytes are read
    except (TypeError, AttributeError) as error:
        raise BadInput(f"{path}: no backbone's configuration, or preprocessor files that are none ({error})") from None
    return fields


def hub_config(config, path):
    """The hub's config.json -> fields of a BackboneConfig, all but the pixels'; norm None: the weights will show it."""
    family = str(config.get("model_type"))
    family = "VideoMAEv2" if family.startswith("VideoMAEv2") else family             # the authors' own folders: VideoMAEv2_Base, ...
    if family not in CONFIG_NAMES:
        raise BadInput(f"{path}: a model of type {family}; {', '.join(CONFIG_NAMES)} are read here")
    config = config.get("model_config", config) if family == "VideoMAEv2" else config
    for name, value in CONFIG_FIXED.items():
        if config.get(name, value) != value:
            raise BadInput(f"{path}: {name} {config[name]!r}: this backbone is written for {value!r}")
    fields = {ours: config.get(name, silent) for ours, (name, silent) in CONFIG_NAMES[family].items()}
    if CONFIG_NAMES[family]["mlp"][0] == "mlp_ratio":            # of the g shapes 48 / 11, which no float holds
        fields["mlp"] = round(fields["width"] * fields["mlp"])
    norm = None if family != "vjepa2" and config.get("use_mean_pooling", True) else "tokens"
    return fields | dict(kind="vjepa2" if family == "vjepa2" else "videomae", norm=norm, pool_eps=1e-5 if family == "videomae" else 1e-6)


def read_pixels(folder):
    """How a folder's preprocessor files normalise pixels: dict(mean, std), empty if there are none."""
    for path in (folder / "video_preprocessor_config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            config = read_json(path)
            if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6 or not config.get("do_rescale", True) or not config.get("do_normalize", True):
                raise BadInput(f"{path}: pixels that are not divided by 255 and normalised; this backbone is written for those that are")
            return dict(mean=config.get("image_mean", MEAN), std=config.get("image_std", STD))
    return {}
