"""TrajViT2: a video CLIP trained from scratch on trajectory tokens (paper, "Setting 1").

    video uint8 (b, t, H, W, 3) -> TrajTok -> tokens (b, M, w), mask -> [CLS; tokens] -> transformer -> CLS (b, w) -> unit vector (b, e)
    caption ids (b, s)                                            -> text transformer -> mean       -> unit vector (b, e)

    loss = InfoNCE(video, text) + segmentation_weight (0.5 focal + dice)         PAPER: both are optimised jointly

    python train_clip.py                                         # nano, on the procedural world: two CPU cores
    python train_clip.py --data videos/manifest.json             # real, captioned video
    python train_clip.py --segmentation-weight 0                 # the contrastive loss alone shapes the trajectories
    python train_clip.py --init-tokenizer out/segmenter-nano --freeze-tokenizer
    python train_clip.py --resume                                # goes on where a stopped run was saved, step for step
    python train_clip.py --resume --tokens-per-trajectory 4      # a finished run is only evaluated again

Writes out/clip-<name>/: config.json, log.jsonl, state.pt, model.safetensors, result.json, trajectories.png, curves.png.
"""
from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import data
from data import BadInput, configure, write_json
from segmenter import segmentation_loss
from trajtok import (SIZES, Damage, Run, TrajTok, check_finite, check_flags, count_gflops, evaluate_segmenter, learning_rate, load_weights,
                     make_optimizer, open_data, peak_memory_gb, precision, run_name, save_pictures, setup, tokenizer_config,
                     write_weights)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ClipConfig:
    """Trains TrajViT2: a video CLIP on trajectory tokens, with the segmentation loss beside the contrastive one."""
    size: str = "nano"                          # one of SIZES: nano, tiny, base, large
    data: str = "world"                         # `world` (procedural) or a a manifest or CSV of captioned videos
    name: str | None = None                     # the run's folder is out/clip-<name>; default: the size, and of real data the folder's name
    out: str = "out"                            # where runs are kept
    # the model
    image_size: int | None = None               # pixels of a side, a multiple of 32; default: the size's
    frames: int | None = None                   # frames of a clip; default: the size's
    max_objects: int = 8                        # of the procedural world: 1 .. 8 objects in a clip
    shared_colours: bool = True                 # may two objects of a made clip wear the same colour?
    textures: str | None = None                 # a folder of your pictures or clips: made objects and grounds are painted with them
    num_queries: int | None = None              # K, trajectories at most; default: the size's
    layers: int = 4                             # video transformer: layers, width, heads
    width: int = 128                            # w
    heads: int = 4                              # of both transformers
    text_layers: int = 3                        # text transformer: layers, width
    text_width: int = 128                       # width of the text transformer
    embed: int = 128                            # e: width of the space that video and text share
    text: str = "world"                         # `world` (a BPE learnt from made captions), a tiktoken name, a folder
    text_length: int = 48                       # longest caption in tokens, the end token included
    # the loss
    segmentation_weight: float = 1.0            # of (0.5 focal + dice); 0: no segmentation loss
    init_tokenizer: str | None = None           # start from the tokenizer of this folder (`trajtok.py pretrain` writes one)
    freeze_tokenizer: bool = False              # leave the tokenizer as it starts
    # the training
    batch: int = 32                             # clips a step; each sees the others' captions as negatives
    steps: int = 400                            # steps
    lr: float = 5e-4                            # peak learning rate
    segmenter_lr: float = 1.0                   # the segmenter's learning rate, as a multiple of lr
    warmup: int = 30                            # steps of linear warm-up; then a cosine to 1 %
    weight_decay: float = 0.02                  # on matrices (SPECS 1)
    clip: float = 5.0                           # largest gradient norm
    augment: bool = False                       # the same random crop, flip, colours, blur for all frames of a clip
    seed: int = 0                               # of weights, data order and augmentation
    workers: int = 0                            # processes that make batches; 0: in the training process
    save_every: int = 50                        # steps between checkpoints
    # the evaluation
    tokens_per_trajectory: int = 1              # 1, 2 or 4 at evaluation (training draws one of them at each step)
    eval_clips: int = 256                       # held-out made clips, all captions distinct
    probe_clips: int = 1024                     # made clips that the linear probes learn from
    device: str = "auto"                        # cpu, cuda, ...
    resume: bool = False                        # go on with the run of this name, exactly
    overwrite: bool = False                     # start again over a run of this name

    def __post_init__(self):
        check_flags(self)
        for field in ("layers", "width", "heads", "text_layers", "text_width", "embed"):
            if getattr(self, field) < 1:
                raise BadInput(f"--{field.replace('_', '-')} {getattr(self, field)}: at least 1")
        for width in (self.width, self.text_width):
            if width % self.heads:
                raise BadInput(f"a transformer of width {width} with {self.heads} heads: the width must be a multiple of the heads")
        if self.num_queries is not None and self.num_queries < 1:
            raise BadInput(f"--num-queries {self.num_queries}: at least 1")
        if not 2 <= self.text_length <= 4096:
            raise BadInput(f"--text-length {self.text_length}: 2 (a word and the end token) to 4096")
        if self.freeze_tokenizer and not self.init_tokenizer:
            raise BadInput("--freeze-tokenizer: freezes random weights unless --init-tokenizer FOLDER is given")


# CHOICE, nano only: the segmentation loss weighs 4 and the segmenter learns 4x as fast. With the release's weight of 1 the
# contrastive gradient, larger in the backbone, holds the masks back (dice after 60 steps 0.64; with 4 and 4x, 0.50), and
# tokens are no better than their masks. Minutes of training need it, days do not.
# Likewise its clips hold at most four objects, all of different colours: eight, at 64 pixels, are a few points each, and in
# minutes it learns to tell things apart by colour, not yet by place: objects that shared theirs came out at an IoU of 0.39,
# the others at 0.70. `--max-objects 8 --shared-colours` gives the whole world.
#  size          video transformer                   text transformer                          training
CLIP_SIZES = {
    "nano":  dict(layers=4, width=128, heads=4,      text_layers=3, text_width=128, embed=128, batch=32, steps=500, lr=5e-4, warmup=20, segmenter_lr=4.0, segmentation_weight=4.0,
                  max_objects=4, shared_colours=False),
    "tiny":  dict(layers=6, width=256, heads=8,      text_layers=4, text_width=256, embed=256, batch=64, steps=10_000, lr=5e-4, warmup=500),
    "base":  dict(layers=12, width=768, heads=12,    text_layers=12, text_width=768, embed=256, batch=64, steps=100_000, lr=1e-4, warmup=5000, text_length=77, clip=10.0),
    "large": dict(layers=24, width=1024, heads=16,   text_layers=12, text_width=768, embed=256, batch=64, steps=200_000, lr=1e-4, warmup=10_000, text_length=77, clip=10.0),
}
CLIP_SIZES = {name: {"size": name, **values} for name, values in CLIP_SIZES.items()}

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    """Pre-norm transformer layer: (1) self-attention among the real positions, (2) a GELU MLP of width 4w."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask):                                  # x (b, s, w); mask (b, s), True = a real position
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b s (three a c) -> three b a s c", three=3, a=self.heads)
        # softmax over the keys, padding and dead trajectories excluded: what a token reads from the others
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(rearrange(y, "b a s c -> b s (a c)"))                                      # 1
        return x + self.mlp(self.norm2(x))                                                           # 2


class Transformer(nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # 1 / sqrt(fan in), not the customary 0.02: at width 128 that leaves attention so faint that every caption
                # starts, and for long stays, almost the same vector. The ends of branches shrink with depth.
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / (math.sqrt(2 * layers) if name.endswith(("proj.weight", "mlp.2.weight")) else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class VideoEncoder(nn.Module):
    """Tokenizer, then a transformer over [CLS; tokens]. A set has no order: tokens get no positions of their own; where and
    when a trajectory was is in its token, through the rotary keys of the encoder."""

    def __init__(self, tokenizer, cfg):
        super().__init__()
        self.tokenizer = tokenizer
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads)

    def forward(self, video, tokens_per_trajectory=None):
        """-> CLS (b, w), Tokens, Segmentation."""
        tokens, seg = self.tokenizer(video, tokens_per_trajectory)
        x = torch.cat((self.cls.expand(len(video), -1, -1), tokens.z), 1)
        mask = F.pad(tokens.mask, (1, 0), value=True)            # CLS is always real
        return self.transformer(x, mask)[:, 0], tokens, seg


class TextEncoder(nn.Module):
    """CHOICE (the paper does not say; the release takes BERT-base): a from-scratch bidirectional transformer, learned
    positions, read as the mean over the real tokens: from the first step on it tells captions of different words apart,
    where a single end token must first learn to look at them."""

    def __init__(self, vocabulary, cfg):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, cfg.text_width)
        self.position = nn.Parameter(0.02 * torch.randn(1, cfg.text_length, cfg.text_width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.transformer = Transformer(cfg.text_layers, cfg.text_width, cfg.heads)

    def forward(self, ids, mask):                                # (b, s), True = a real token, the end token included
        x = self.transformer(self.embed(ids) + self.position[:, :ids.shape[1]], mask)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)                              # (b, w)


class VideoCLIP(nn.Module):
    def __init__(self, tokenizer, vocabulary, cfg):
        super().__init__()
        self.video, self.text = VideoEncoder(tokenizer, cfg), TextEncoder(vocabulary, cfg)
        self.video_proj = nn.Linear(cfg.width, cfg.embed, bias=False)
        self.text_proj = nn.Linear(cfg.text_width, cfg.embed, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def embed_video(self, video, tokens_per_trajectory=None):
        cls, tokens, seg = self.video(video, tokens_per_trajectory)
        return F.normalize(self.video_proj(cls).float(), dim=-1), cls, tokens, seg

    def embed_text(self, ids, mask):
        return F.normalize(self.text_proj(self.text(ids, mask)).float(), dim=-1)

    def contrastive(self, video, text):
        """InfoNCE both ways over a batch of b pairs: unit vectors (b, e) -> scalar. At initialisation ln b.
        SPECS 2: the temperature starts at 0.07, is learned, and is clamped to [0.001, 0.5] (the loop clamps the
        parameter too, after each step: left outside it would have no gradient, and could never come back)."""
        # softmax over the batch: each video chooses among all captions, each caption among all videos
        logits = video @ text.T / self.temperature.clamp(0.001, 0.5)
        target = torch.arange(len(video), device=video.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def build(cfg, encoding):
    """-> VideoCLIP, TrajTokConfig. The tokenizer from --init-tokenizer, or new, in the run's size."""
    overrides = {k: getattr(cfg, k) for k in ("image_size", "frames", "num_queries") if getattr(cfg, k) is not None}
    if cfg.init_tokenizer:
        shape = tokenizer_config(cfg.init_tokenizer)
        if overrides.get("num_queries", shape.num_queries) != shape.num_queries:
            raise BadInput(f"--num-queries {cfg.num_queries}: the tokenizer in {cfg.init_tokenizer} has {shape.num_queries}; leave the flag out")
        if shape.out_dim != cfg.width:
            raise BadInput(f"--init-tokenizer {cfg.init_tokenizer}: its tokens are {shape.out_dim} wide, the transformer of --size {cfg.size} {cfg.width}; "
                           f"give the size that it was trained with, or --width {shape.out_dim}")
        overrides.pop("num_queries", None)
        shape = dataclasses.replace(shape, **overrides)
        tokenizer = load_weights(TrajTok(shape), cfg.init_tokenizer, "video.tokenizer.")
    else:
        shape = dataclasses.replace(SIZES[cfg.size], out_dim=cfg.width, **overrides)
        tokenizer = TrajTok(shape)
    if cfg.freeze_tokenizer:
        tokenizer.requires_grad_(False)
    shape.encoder.check(cfg.tokens_per_trajectory)               # refused now, not after the training
    return VideoCLIP(tokenizer, encoding.n_vocab, cfg), shape


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def recalls(similarity, prefix, right=None):
    """similarity (queries, candidates) -> R@1, R@5, R@10 in [0, 1]. right, of the same shape, True = an answer to the query; default: the
    answer of query i is candidate i. Rank = how many wrong candidates score at least as high as the best answer (SPECS 2: the best
    rank over several captions): ties count against us, so that a constant output scores 0, not 1."""
    right = torch.eye(len(similarity), dtype=torch.bool) if right is None else right
    answer = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    rank = (~(similarity < answer) & ~right).sum(1)
    return {f"{prefix}_r{n}": (rank < n).float().mean().item() for n in (1, 5, 10)}


def linear_probe(train, train_y, valid, valid_y, test, test_y):
    """Accuracy on test of a multinomial logistic regression on frozen features (n, w), trained on train; its L2 penalty is
    the best of four on valid. Full-batch L-BFGS: no learning rate to tune, the same answer every time."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, valid, test = ((x.double() - mean) / std for x in (train, valid, test))
    classes, best = int(torch.cat((train_y, valid_y, test_y)).max()) + 1, (-1.0, 0.0)
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        w = torch.zeros(train.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(train @ w[:-1] + w[-1], train_y) + penalty * w[:-1].square().sum() / 2
            loss.backward()
            return loss
        solver.step(closure)
        score = [((x @ w[:-1] + w[-1]).argmax(1) == y).double().mean().item() for x, y in ((valid, valid_y), (test, test_y))]
        best = max(best, tuple(score), key=lambda s: s[0])
    return best[1]


@torch.no_grad()
def embed(model, batches, count, cfg, device, encoding, what):
    """Batches 0 .. count - 1 of a dataset -> unit vectors of videos and of all their captions, the video of each caption, CLS features,
    live tokens, the rest of the batches, bad files."""
    model.eval()
    videos, texts, owner, features, live, kept, bad = [], [], [], [], [], [], []
    for batch in tqdm(data.loader(batches, 0, count, cfg.workers), total=count, desc=what, leave=False, disable=None):
        bad += batch["bad"]
        batch = data.finish(batch, device)
        if batch["video"] is None:
            continue
        with precision(device):
            video, cls, tokens, _ = model.embed_video(batch.pop("video"), cfg.tokens_per_trajectory)
            every = batch["captions"] if "captions" in batch else [[c] for c in batch["caption"]]
            text = model.embed_text(*(x.to(device) for x in data.tokenize(encoding, sum(every, []), cfg.text_length)))
        owner += [sum(map(len, videos)) + i for i, some in enumerate(every) for _ in some]
        videos.append(video.cpu())
        texts.append(text.cpu())
        features.append(cls.float().cpu())
        live += tokens.mask.sum(1).tolist()
        kept.append({k: batch[k] for k in ("appearance", "motion") if k in batch})                  # not the pixels' labels
    return (torch.cat(videos), torch.cat(texts), torch.tensor(owner), torch.cat(features), sum(live) / len(live), kept, bad) if videos else (None,) * 5 + ([], bad)


def evaluate(model, test, test_batches, cfg, device, encoding):
    """Retrieval and segmentation scores on held-out clips; on the procedural world also linear probes. -> dict, pictures, bad
    files. What the data cannot tell (classes, masks) is None."""
    video, text, owner, _, live, kept, bad = embed(model, test, test_batches, cfg, device, encoding, "held-out clips")
    if video is None:
        raise BadInput(f"--data {cfg.data}: not one held-out clip can be read; the last: {bad[-1][1]}")
    right = owner[:, None] == torch.arange(len(video))           # (captions, videos)
    result = recalls(text @ video.T, "t2v", right) | recalls(video @ text.T, "v2t", right.T) | dict(clips=len(video), live_tokens=live)
    result |= dict(appearance=None, motion=None)
    if cfg.data == "world":
        world = data.World(cfg.image_size, cfg.frames, cfg.max_objects, cfg.shared_colours, textures=cfg.textures)
        # the probes' clips come from far up the training range, where the training itself never gets, and from validation
        sets = [(500_000_000, cfg.probe_clips), (data.VALIDATION, max(cfg.probe_clips // 4, 1)), (data.TEST, max(cfg.probe_clips // 2, 1))]
        split = [embed(model, data.WorldBatches(world, cfg.batch, begin), -(-n // cfg.batch), cfg, device, encoding, "probe clips") for begin, n in sets]
        for kind in ("appearance", "motion"):
            result[kind] = linear_probe(*(x for _, _, _, f, _, batches, _ in split for x in (f, torch.cat([b[kind] for b in batches]))))
    scores, pictures, _ = evaluate_segmenter(model.video.tokenizer.segmenter, test, device, test_batches)
    return result | scores, pictures, bad


def gflops(model, cfg, device):
    """GFLOPs (2 per multiply-add) of embedding one clip, counted while it runs."""
    clip = torch.zeros(1, cfg.frames, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8, device=device)
    return count_gflops(lambda: model.eval().embed_video(clip, cfg.tokens_per_trajectory))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

@data.one_line_errors
def main(argv=None):
    cfg = configure(ClipConfig, CLIP_SIZES, argv)
    encoding = data.load_encoding(cfg.text)
    device = setup(cfg)
    model, shape = build(cfg, encoding)
    cfg = dataclasses.replace(cfg, image_size=shape.image_size, frames=shape.frames, num_queries=shape.num_queries)
    train, test, test_batches, files = open_data(cfg, "caption")
    run = Run(cfg, f"clip-{run_name(cfg)}", {"tokenizer": dataclasses.asdict(shape), "textures_crc": data.open_textures(cfg.textures)})
    model.to(device)
    optimizer = make_optimizer(model, cfg, {"video.tokenizer.segmenter.": cfg.segmenter_lr})
    start = run.restore(model, optimizer)
    damage, parameters = Damage(), sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {sum(p.numel() for p in model.video.tokenizer.parameters()) / 1e6:.2f} M of them the tokenizer; "
          f"{device.type}; an untrained contrastive loss is ln {cfg.batch} = {math.log(cfg.batch):.2f}")
    began, mark, told = time.time(), time.time(), False
    for step, batch in zip(range(start, cfg.steps), data.loader(train, start, cfg.steps, cfg.workers)):
        # 1. the learning rate
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # 2. the batch: clips, captions, and labels where there are any
        damage.add(batch["bad"], files or math.inf)
        batch = data.finish(batch, device)
        if batch["video"] is None:
            continue
        video, labels = batch["video"], batch["labels"]
        if cfg.augment:
            video, labels = data.augment(video, labels, step + cfg.seed * 10 ** 6, flip="motion" not in batch)    # made captions tell left from right
        ids, mask = (x.to(device) for x in data.tokenize(encoding, batch["caption"], cfg.text_length))
        wait = time.time() - mark
        # 3. forward: the loss, term by term
        model.train()
        with precision(device):
            v, _, tokens, seg = model.embed_video(video)         # tokens a trajectory: 1, 2 or 4, drawn for this step
            terms = dict(contrastive=model.contrastive(v, model.embed_text(ids, mask)))
            if cfg.segmentation_weight and not cfg.freeze_tokenizer and bool((labels >= 0).any()):
                terms |= segmentation_loss(seg, labels)
            loss = terms["contrastive"]
            if "focal" in terms:
                loss = loss + cfg.segmentation_weight * (0.5 * terms["focal"] + terms["dice"])      # SPECS 1
            elif not told:
                told = True
                print("no segmentation loss: " + ("--segmentation-weight 0" if not cfg.segmentation_weight else
                                                  "--freeze-tokenizer" if cfg.freeze_tokenizer else "no clip of this batch has mask sidecars"))
        # 4. backward, clip, step
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        values = {k: v.item() for k, v in terms.items()} | dict(loss=loss.item(), gradient_norm=norm.item())
        check_finite(values, step)                               # before the step: what is saved stays whole
        optimizer.step()
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        # 5. the log: one line a step
        now = time.time()
        live = seg.alive.float().sum(1).mean().item()
        run.record(dict(step=step, **values, segmentation="focal" in terms, lr=lr, temperature=model.temperature.item(), live_trajectories=live, tokens=tokens.mask.sum(1).float().mean().item(),
                        clips=len(video), seconds=now - mark, clips_per_second=len(video) / (now - mark), data_wait=wait, memory_gb=peak_memory_gb(device)))
        if step % 10 == 0 or step == cfg.steps - 1:
            print(f"step {step:5d}/{cfg.steps}  " + "  ".join(f"{k} {values[k]:.3f}" for k in terms) + f"  live {live:.1f}/{cfg.num_queries}"
                  f"  {len(video) / (now - mark):.0f} clips/s  {now - began:.0f} s", flush=True)
        mark = now
        # 6. the checkpoint
        if (step + 1) % cfg.save_every == 0 or step == cfg.steps - 1:
            run.save(model, optimizer, step + 1)
    if not run.history():
        raise BadInput(f"--data {cfg.data}: not one of the clips that {cfg.steps} steps drew can be used; the first: {next(iter(damage.files.values()), '-')}")
    seconds, clips = (sum(line[key] for line in run.history()) for key in ("seconds", "clips"))      # of all parts of a resumed run
    began = time.time()
    write_weights(run.folder / "model.safetensors", model.state_dict())
    result, pictures, bad = evaluate(model, test, test_batches, cfg, device, encoding)
    damage.add(bad, math.inf)
    result |= dict(parameters=parameters, gflops=gflops(model, cfg, device), clips_per_second=clips / max(seconds, 1e-9), seconds=seconds,
                   evaluation_seconds=time.time() - began, peak_memory_gb=peak_memory_gb(device), left_out=len(damage.files))
    write_json(run.folder / "result.json", result)
    save_pictures(run, pictures, ("contrastive", "focal", "dice", "live_trajectories"))
    report(result, run.folder, cfg.textures is not None)


def report(result, folder, skinned=False):
    def cell(key, percent=True):
        return "-" if result[key] is None else f"{100 * result[key]:.1f} %" if percent else f"{result[key]:.1f}"
    n, left_out = result["clips"], result["left_out"]
    print(f"\n{n} held-out clips, chance R@1 {100 / n:.1f} %, R@5 {min(500 / n, 100):.1f} %" + (f"; {left_out} files left out" if left_out else ""))
    print(f"  text -> video   R@1 {cell('t2v_r1')}   R@5 {cell('t2v_r5')}   R@10 {cell('t2v_r10')}")
    print(f"  video -> text   R@1 {cell('v2t_r1')}   R@5 {cell('v2t_r5')}   R@10 {cell('v2t_r10')}")
    if result["appearance"] is not None:
        # in a skinned world one class, the irregular outlines, is the likely guess
        chance = max(1 / len(data.SHAPES), data.SKINNED_CLIPS * data.IRREGULAR * skinned)
        print(f"  linear probes   appearance {cell('appearance')} (chance {100 * chance:.0f} %)   motion {cell('motion')} (chance {100 / len(data.MOTIONS):.0f} %)")
    if result["veq"] is not None:
        print(f"  trajectories    objects' best IoU {cell('object_iou')} (at full resolution {cell('object_iou_pixels')})   VEQ {cell('veq')}   STQ {cell('stq')}   ({cell('live_trajectories', False)} live)")
        print(f"  a grid instead  objects' best IoU {cell('grid_object_iou')}   VEQ {cell('grid_veq')}   STQ {cell('grid_stq')}   ({cell('grid_cells', False)} cells)")
    print(f"  {result['live_tokens']:.1f} tokens a clip, {result['parameters'] / 1e6:.2f} M parameters, {result['gflops']:.2f} GFLOPs a clip, "
          f"{result['clips_per_second']:.0f} clips/s in training, {result['seconds']:.0f} s + {result['evaluation_seconds']:.0f} s evaluation, {result['peak_memory_gb']:.1f} GB")
    print(f"wrote {folder}/: model.safetensors, result.json, log.jsonl, trajectories.png, curves.png")


if __name__ == "__main__":
    main()
