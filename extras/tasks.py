"""Image-conditioned DDM (ADM, Sec. V-C): super-resolution, inpainting, saliency and edges.

Process, loss and samplers are ddm.py's. The network is told one thing more, an image: the
condition. An encoder makes features of it, and the decoders meet them at every level. What diffuses
is pixels, or with --autoencoder, as in the papers, latents: patches in training, and then
overlapping windows of images of any size.

    python -m extras.tasks saliency --train --evaluate         embedded shapes, minutes on two cores
    python -m extras.tasks edges --train --dataset folder --data-dir bsds500 --edge-bits
    python -m extras.tasks inpainting --sample --input photo.jpg --mask hole.png

    task               condition                  x₀                       a folder of
    super_resolution   bicubic enlargement, ×4    GAIN times what it lacks images
    inpainting         known pixels, and a mask   the image                images
    saliency           the image, as a square     its mask                 images/ and masks/
    edges              the image                  the annotators' mean     images/ and edges/
"""

import functools
import importlib.util
import math
import pathlib
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import ddm
import unet
from extras import task_data
from extras.autoencoder import FirstStage, end_step
from extras.task_data import TARGETS

SCALE = 4                    # of super-resolution, each way
GAIN = 4.0                   # gives the residual of photos a root mean square of about .5

# ------------------------------------------------------------------------------------- 1 the tasks

def resized(x, h, w):
    """x [B, C, H, W] as [B, C, h, w], bicubic as Pillow and MATLAB have it (a = -1/2)."""
    return F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)


def example(task, image, target=None, hole=None):
    """(x0, condition) of images and targets in [-1, 1]. hole: bool [B, 1, H, W], missing pixels."""
    if task == "super_resolution":
        h, w = image.shape[-2:]
        small = resized(image, h // SCALE, w // SCALE)
        condition = resized(data.to_float(data.to_uint8(small)), h, w)   # 8 bits, as in a file
        return GAIN * (image - condition), condition
    if task == "inpainting":
        return image, torch.cat([image.masked_fill(hole, 0), 2.0 * hole - 1], dim=1)
    return target, image


def finish(task, x0, condition, stage=None):
    """The answer that x0 means, or that its latents mean. Inpainting's known pixels are pasted."""
    if stage:
        h, w = condition.shape[-2:]
        x0 = stage.decode(x0)[..., :h, :w]
        x0 = x0.mean(1, keepdim=True) if TARGETS[task] else x0
    elif task == "super_resolution":
        x0 = condition + x0 / GAIN
    if task == "inpainting":
        x0 = torch.where(condition[:, -1:] > 0, x0, condition[:, :-1])
    return x0.clamp(-1, 1)


# ----------------------------------------------------------------------------------- 2 the network

class Encoder(nn.Module):
    """A condition [B, c, fH, fW] -> a tuple of each level's features, [B, widths[i], H/2^i, W/2^i].

    f is `factor`: H and W are those of what diffuses, and latents are smaller than the image. It
    knows no time, so that one call serves all steps of a sampler.
    """

    def __init__(self, c, widths, factor=1):
        super().__init__()
        self.first = unet.conv(c, widths[0], kernel=max(3, 2 * factor - 1), stride=factor)
        self.down = nn.ModuleList(unet.conv(w, w, stride=2) for w in widths[:-1])
        self.levels = nn.ModuleList(
            unet.Block(a, b, 0, 0.0) for a, b in zip([widths[0], *widths], widths))

    def forward(self, condition):
        h = self.first(condition)
        features = []
        for i, block in enumerate(self.levels):
            h = block(self.down[i - 1](h) if i else h)
            features.append(h)
        return tuple(features)


class SwinEncoder(Encoder):
    """The papers' encoder, Swin-B (Liu et al. 2021). Its stages have strides 4 to 32. Each is added
    to the compact encoder's features at the level of its stride, or at the last.
    """

    def __init__(self, c, widths, factor=1, pretrained=False):
        from torchvision.models import swin_b
        super().__init__(c, widths, factor)
        try:
            self.swin = swin_b(weights="IMAGENET1K_V1" if pretrained else None).features
        except (OSError, RuntimeError) as error:                         # no network, a checksum
            raise data.Problem(f"no ImageNet weights ({error}): add --no-pretrained") from error
        strides = [factor * 2 ** i for i in range(len(widths))]
        self.level = [strides.index(min(max(factor, 4 * 2 ** k), strides[-1])) for k in range(4)]
        self.maps = nn.ModuleList(
            unet.conv(128 * 2 ** k, widths[i], kernel=1) for k, i in enumerate(self.level))
        statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("imagenet", statistics[:, :, None, None], persistent=False)

    def forward(self, condition):
        features = list(super().forward(condition))
        image = condition[:, :3 if condition.shape[1] > 2 else 1]        # without a hole's mask
        mean, std = self.imagenet
        h = ((image + 1) / 2 - mean) / std                               # grey becomes 3 channels
        for k, i in enumerate(self.level):
            h = self.swin[2 * k + 1](self.swin[2 * k](h))                # patches or merging; stage
            f = F.layer_norm(h, h.shape[-1:]).permute(0, 3, 1, 2)
            f = F.interpolate(self.maps[k](f), features[i].shape[-2:], mode="bilinear")
            features[i] = features[i] + f
        return tuple(features)


class CrossAttention(nn.Module):
    """h [B, C, H, W] asks the condition's features f [B, c, H, W]: each pixel all of them."""

    def __init__(self, channels, c):
        super().__init__()
        most = max(1, channels // 64)
        self.heads = max(n for n in range(1, most + 1) if channels % n == 0)
        self.norm = unet.norm(channels)
        self.norm_f = unet.norm(c)
        self.q = unet.conv(channels, channels, kernel=1)
        self.kv = unet.conv(c, 2 * channels, kernel=1)
        self.out = unet.conv(channels, channels, kernel=1, zero=True)

    def forward(self, h, f):
        B, C, H, W = h.shape
        qkv = torch.cat([self.q(self.norm(h)), self.kv(self.norm_f(f))], dim=1)
        qkv = qkv.view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)             # each [B, heads, HW, C / heads]
        seen = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(seen.transpose(-1, -2).reshape(h.shape))


class Decoder(nn.Module):
    """unet.Decoder, which meets the condition's features where each level begins: see TaskUNet."""

    def __init__(self, fuse, skips, widths, blocks, attend, *emb_and_dropout):
        super().__init__()
        skips = list(skips)
        self.levels = nn.ModuleList()
        self.up = nn.ModuleList()
        self.fuse = nn.ModuleList()
        self.concat = fuse == "concat"
        c = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            if not self.concat and i:
                self.fuse.append(CrossAttention(c, width))
            c += width if self.concat else 0
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                level.append(unet.Block(c + skips.pop(), width, *emb_and_dropout, attend[i]))
                c = width
            self.levels.append(level)
            self.up.append(unet.conv(c, c) if i else nn.Identity())

    def forward(self, h, skips, emb, features):
        skips = list(skips)
        for k, level in enumerate(self.levels):
            seen = features[-1 - k]
            if self.concat:
                h = torch.cat([h, seen], dim=1)
            elif k < len(self.fuse):
                h = self.fuse[k](h, seen)
            for block in level:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if skips:
                h = self.up[k](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class TaskUNet(unet.UNet):
    """The U-Net with a condition: net(x, t, c) of an image c, or of its features, net.encode(c).

    condition: c's channels. fuse: how features enter the decoders, by "concat" (ADM, Sec. V-A,
    "Architecture") or by "attention" ("Implementation"). Then, as in the released code, the first
    level's are joined to x, because attention would cost most there. encoder: compact or swin_b.
    first_stage: the facts of the autoencoder of whose latents x is, or None.
    """

    def __init__(self, channels, condition, encoder, fuse, pretrained=False, first_stage=None,
                 **sizes):
        widths = [sizes["width"] * m for m in sizes["mult"]]
        factor = first_stage["factor"] if first_stage else 1
        self.way = fuse                                                  # `decoder` needs it now
        super().__init__(channels + (widths[0] if fuse == "attention" else 0), **sizes)
        swin = encoder == "swin_b"
        self.encode = (SwinEncoder(condition, widths, factor, pretrained) if swin
                       else Encoder(condition, widths, factor))

    def decoder(self, *arguments):
        return Decoder(self.way, *arguments[:-1])

    def features(self, x, t, condition):
        seen = condition if isinstance(condition, tuple) else self.encode(condition)
        x = torch.cat([x, seen[0]], dim=1) if self.way == "attention" else x
        return super().features(x, t, seen)


def told(net, condition, run):
    """ddm's model(x_t, t) -> (φ̂, ε̂) by a network that is told a condition."""
    return ddm.predictor(lambda x, t: net(x, t, condition), **ddm.meaning(run.settings))


# -------------------------------------------------------------------------------------- 3 training

def train(run):
    """Algorithm 1 with a condition, from where the run's checkpoint stopped."""
    s = run.settings
    pairs = task_data.load_pairs(run)
    channels = len(pairs[0]) - bool(TARGETS[s.script])
    if run.stage and not run.checkpoint:
        g = torch.Generator().manual_seed(data.seed("batch", s.seed))
        some = example(s.script, *task_data.batch(pairs, s.script, s.image_size, 64, g))
        run.stage.measure(finish(s.script, *some).to(run.device))
    build = functools.partial(TaskUNet, pretrained=s.pretrained and not run.checkpoint)
    net, ema = run.networks(build, network(s, channels, run.stage))
    optimizer = torch.optim.AdamW(net.parameters(), lr=s.lr, fused=True)
    ready = run.ready(net, training=True)

    for step, g in run.steps(net, ema, optimizer):
        patches = task_data.batch(pairs, s.script, s.image_size, s.batch_size, g)
        x0, condition = example(s.script, *patches)
        x0 = run.stage.encode(finish(s.script, x0, condition)) if run.stage else x0
        t = ddm.draw_times(len(x0), s.time_power, g, s.delta)                  # Alg. 1, line 3
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        t = torch.ones_like(t) if s.regression else t         # the baseline: one guess, from x₁ = 0
        eps = eps * (not s.regression)
        phi = ddm.draw_phi(x0, s.h, g)                                         # Alg. 1, line 3
        x0, phi, eps, t, condition = run.share(x0, phi, eps, t, condition)

        model = told(ready, condition, run)
        losses = ddm.loss(
            model, x0, phi, eps, t, s.h, s.noise, s.predict, s.weights, s.norm, s.delta)
        end_step(run, net, ema, optimizer, losses, step)
        run.record(losses, t)


# -------------------------------------------------------------------------------------- 4 sampling

def windowed(model_of, condition, size, factor=1):
    """call(x, t) of an x of any size: model_of(windows of the condition)(windows of x, t).

    Windows of x are of size x size, those of the condition are `factor` times larger each way.
    Neighbours share a quarter of a window. Outputs are averaged with weights that fall towards a
    window's border. This is linear: outputs that add up to x_t go on doing so.
    """
    stride = size - size // 4
    at_once = max(1, 16 * 64 ** 2 // size ** 2)

    whole = [side // factor for side in condition.shape[-2:]]

    def cut(x, zoom=1):
        side = zoom * size
        windows = F.unfold(x, side, stride=zoom * stride)[0].T.unflatten(1, (-1, side, side))
        return windows.contiguous(memory_format=torch.channels_last).split(at_once)

    def paste(windows):
        return F.fold(windows.flatten(1).T, whole, size, stride=stride)[None]

    i = torch.arange(size, device=condition.device)
    ramp = 1.0 + torch.minimum(i, size - 1 - i).clamp(max=size // 4)
    seen = cut(condition, factor)
    weight = (ramp[:, None] * ramp).expand(sum(map(len, seen)), 1, size, size)
    share = weight / torch.cat(cut(paste(weight)))
    models = [model_of(part) for part in seen]                           # once for all calls

    def call(x, t):
        outputs = [model(part, t.expand(len(part))) for model, part in zip(models, cut(x))]
        return tuple(paste(share * torch.cat(parts)) for parts in zip(*outputs))

    return call


def walk(run, net, condition, generator):
    """ddm.walk for a condition [1, c, h, w] of any size. Latents that it yields cover h and w."""
    facts = run.checkpoint["network"].get("first_stage")
    factor = facts["factor"] if facts else 1
    size = run.settings.image_size // factor
    h, w = [math.ceil(side / factor) for side in condition.shape[-2:]]

    def lacking(length):                                      # until windows cover it
        stride = factor * (size - size // 4)
        return max(factor * size - length, (factor * size - length) % stride)

    def model_of(part):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            return told(net.call, net.encode(part), run)

    right, below = [lacking(condition.shape[axis]) for axis in (3, 2)]
    condition = F.pad(condition, (0, right, 0, below), mode="replicate")
    channels = run.checkpoint["network"]["channels"]
    like = condition[:, :1, ::factor, ::factor].expand(-1, channels, -1, -1)
    x1 = data.randn(like, [generator]) * (not run.settings.regression)
    call = windowed(model_of, condition, size, factor)
    for t, x, x0 in ddm.walk(call, x1, generator=[generator], **sampler(run)):
        yield t, x[..., :h, :w], x0[..., :h, :w]


def sampler(run):
    """ddm.walk's steps and options. A regression has one step."""
    steps = 1 if run.settings.regression else run.args.steps
    return dict(steps=steps, delta=run.settings.delta) | ddm.sampler(run)


def answers(run, net, q):
    """(the mean of --ensemble answers to a question, [(t, x_t, x̂₀)] of the first)."""
    task = run.settings.script
    frames = []
    members = []
    for k in range(run.args.ensemble):
        g = torch.Generator().manual_seed(data.seed("image", *q.seeds, k))
        for t, x, x0 in walk(run, net, q.condition, g):
            x0 = finish(task, x0, q.condition, run.stage)
            if k == 0:
                x = finish(task, x, q.condition, run.stage) if run.stage else x
                frames.append((t, x.cpu(), x0.cpu()))
        members.append(x0)
    mean = sum(members) / len(members)
    if task == "saliency":
        mean = resized(mean, *q.image.shape[-2:])
    return mean, frames[::-1][::-(-len(frames) // 11)][::-1]  # at most 11, the last among them


# ------------------------------------------------------------------------------------ 5 evaluation

METRICS = dict(super_resolution="PSNR {:.2f} dB on Y, {:.2f} dB on RGB", saliency="MAE {:.4g}",
               inpainting="PSNR {:.2f} dB in the hole", edges="ODS {:.3f}   OIS {:.3f}")


def test_items(run, n):
    """[(name, image, target)] of what to answer: files, or shapes as arrays and no target."""
    s, given = run.settings, run.args.input
    if given:
        return [(pathlib.Path(given).stem, given, None)]
    if s.dataset == "folder":
        return task_data.test_files(run, n)
    pairs = task_data.shape_pairs(s.script, n, s.image_size, seed=1)     # training has seed 0
    return [(f"{i:06}", pair.numpy(), None) for i, pair in enumerate(pairs)]


def question(run, seeds, name, image, target):
    """A test item, read: its image, truth, condition, hole, and what its annotators marked.

    seeds: (the run's or --seed, the item's number), of which its noise is a function.
    """
    s, args = run.settings, run.args
    task, size = s.script, s.image_size
    channels = run.checkpoint["network"]["condition"] - (task == "inpainting")
    if isinstance(image, np.ndarray):
        planes = image
        marked = image[3:] >= 128
    else:
        mode = "RGB" if channels == 3 else "L"
        planes, marked = task_data.open_pair(image, target, mode, s.edge_bits)
    h, w = planes.shape[1:]
    if min(h, w) < 3 * SCALE:
        raise data.Problem(f"{name} is {w}x{h}: a task needs {3 * SCALE} pixels each way")
    upscale = task == "super_resolution" and args.input
    if task == "super_resolution" and not upscale:
        planes = planes[:, :h - h % SCALE, :w - w % SCALE]
    planes = torch.from_numpy(planes)[None]
    truth = planes[:, -1:] if TARGETS[task] else planes
    image = data.to_float(planes[:, :channels]).to(run.device)
    seen = resized(image, size, size).clamp(-1, 1) if task == "saliency" else image
    hole = None
    if task == "inpainting":
        random = np.random.default_rng(data.seed("hole", *seeds))
        hole = task_data.draw_hole(h, w, size, random)
        hole = read_hole(args.mask, h, w) if args.mask else hole
        hole = hole[None, None].to(run.device)
    condition = example(task, seen, seen, hole)[1]
    if upscale:
        condition = resized(image, h * SCALE, w * SCALE)
    return types.SimpleNamespace(
        seeds=seeds, image=image, truth=truth, condition=condition, hole=hole, marked=marked)


def read_hole(mask, h, w):
    """A mask file's white pixels, bool [h, w]."""
    hole = torch.from_numpy(np.array(data.open_image(mask, "L")) >= 128)
    if hole.shape != (h, w) or not hole.any():
        raise data.Problem(f"{mask} must be {w}x{h}, as its image, with white where it lacks", 2)
    return hole


def baseline(task, q):
    """(name, answer) of what takes no network."""
    if task == "super_resolution":
        return "bicubic", q.condition
    if task == "saliency":
        return "empty mask", torch.full_like(q.image[:, :1], -1)
    if task == "inpainting":
        known = (q.image * ~q.hole).sum((2, 3), keepdim=True) / (~q.hole).sum().clamp(min=1)
        return "mean fill", torch.where(q.hole, known, q.image)
    grey = F.pad(q.image.mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate")
    dy, dx = torch.gradient(F.avg_pool2d(grey, 5, 1), dim=(2, 3))
    return "gradient", 8 * torch.hypot(dy, dx) - 1


def score(task, picture, q):
    """The METRICS of an answer in [-1, 1]; of edges, their counts at 33 thresholds."""
    got = data.to_uint8(picture).cpu().numpy()
    truth = q.truth.numpy()
    if task == "edges":
        strength = task_data.thin(got[0, 0] / 255)
        return task_data.edge_counts(strength, q.marked, np.arange(1, 34) / 34)
    if task == "saliency":
        return [np.abs(got - truth.astype(float)).mean() / 255]
    if task == "inpainting":
        hole = q.hole.expand(truth.shape).cpu().numpy()
        return [task_data.psnr(got[hole], truth[hole])]
    inner = (..., slice(SCALE, -SCALE), slice(SCALE, -SCALE))            # as the papers measure
    on_y = task_data.psnr(task_data.luma(got)[inner], task_data.luma(truth)[inner])
    return [on_y, task_data.psnr(got[inner], truth[inner])]


def respond(run, evaluating):
    """--evaluate, which prints scores, or --sample: a picture, or with --out or --input PNGs."""
    task, args = run.settings.script, run.args
    trained = run.averaged(TaskUNet)
    net = types.SimpleNamespace(call=run.ready(trained), encode=trained.encode)
    base = run.settings.seed if args.seed is None else args.seed
    single = args.out or args.input
    items = test_items(run, args.n if evaluating or single else min(args.n, 8))
    text = described(run, base)
    if args.out:
        data.missing(run, text)                               # refuses a folder of other PNGs
    if run.rank:
        return
    wrote = args.out or run.directory
    ending = f"-{task}.png" if args.input else ".png"         # no input is overwritten
    scores = {}
    tiles = []
    try:
        for i, (name, *files) in enumerate(items):
            data.say(f"{i + 1} of {len(items)} images", pause=10)
            q = question(run, (base, i), name, *files)
            mine, frames = answers(run, net, q)
            got = data.to_uint8(mine).cpu()
            rivals = [("DDM", mine), baseline(task, q)] if evaluating else []
            for method, picture in rivals:
                scores.setdefault(method, []).append(score(task, picture, q))
            if single:
                data.save_png(got[0], f"{wrote}/{name}{ending}")
            elif i < 8:
                shown = q.image if task == "saliency" else q.condition[:, :q.image.shape[1]]
                tiles += [data.to_uint8(shown).cpu(), got, q.truth]
            if i == 0 and not (single or evaluating):
                data.save_png(data.trajectory(frames), run.directory / "trajectory.png")
    finally:                                                  # also if a later image is bad
        print_scores(task, scores)
    if tiles:
        wrote = run.directory / ("evaluation.png" if evaluating else "samples.png")
        data.save_png(side_by_side(tiles), wrote)
    data.say(f"sampled: {text}\nwrote {wrote}")


def described(run, base):
    """What answers are of, in one line: a folder of others is refused."""
    weights = task_data.digest(run.directory / "checkpoint.pt")
    named = dict(checkpoint=weights, seed=base, ensemble=run.args.ensemble)
    named |= dict(data_dir=run.settings.data_dir) | sampler(run)
    return ", ".join(f"{key} {value}" for key, value in named.items())


def print_scores(task, scores):
    """Say what `score` returned of each image: {method: a list}."""
    for method, each in scores.items():
        each = np.stack(each)
        values = task_data.ods_ois(each) if task == "edges" else each.mean(0)
        data.say(f"{method:12} {METRICS[task].format(*values)}   ({len(each)} images)")


def side_by_side(tiles):
    """Images [1, 1 or 3, h, w] of any sizes, three a row: input, answer, truth."""
    h = max(tile.shape[2] for tile in tiles)
    w = max(tile.shape[3] for tile in tiles)
    for k, tile in enumerate(tiles):
        border = (0, w - tile.shape[3], 0, h - tile.shape[2])
        tiles[k] = F.pad(tile.expand(-1, 3, -1, -1), border, value=255)
    return data.grid(torch.cat(tiles), across=3)


# ---------------------------------------------------------------------------------- 6 command line

FLAGS = ddm.FLAGS | unet.FLAGS | dict(
    time_power=(1.0, "training times are this power of even u", (1, 10)),
    delta=(1e-3, "the smallest time that the network sees", (1e-6, 0.1)),
    encoder=("compact", "of the condition: compact, or the papers' Swin-B", ("compact", "swin_b")),
    fuse=("concat", "how its features meet the decoders", ("concat", "attention")),
    pretrained=(True, "Swin-B begins with ImageNet's weights, which are downloaded", None),
    edge_bits=(False, "bit k of an edge PNG is what annotator k marked", None),
    regression=(False, "a baseline: the same network makes one guess, without noise", None),
    autoencoder=("", "diffuse in the latents of this one: a run of extras.autoencoder, or "
                     "diffusers' (pixels)", None))
SAMPLING = ddm.SAMPLING | dict(
    steps=(5, "steps of the solver, each a network call", None),
    evaluate=(False, "print the metric of --n test images, and draw eight of them", None),
    input=("", "an image to answer with --sample (super-resolution: to enlarge)", None),
    mask=("", "of inpainting's --input: white where pixels are missing", None),
    ensemble=(1, "answer with the mean of so many samples", None))
DEMO = dict(image_size=32, width=24, iterations=700, batch_size=16, second="conv")
PATCHES = dict(image_size=128, width=64, mult=(1, 2, 4, 4), dropout=0.0, batch_size=32,
               iterations=100_000, lr=1e-4)
TABLE_I = ddm.PAPER | dict(encoder="swin_b", width=128, mult=(1, 2, 4, 4), blocks=2, batch_size=16,
                           lr=5e-5, iterations=200_000, delta=1e-4,
                           autoencoder="runs/autoencoder-folder")
PAPER = dict(                                                 # the columns of ADM's Table I
    super_resolution=TABLE_I | dict(image_size=512, batch_size=12, attention=(32, 16)),
    inpainting=TABLE_I | dict(image_size=256, width=96, mult=(1, 2, 4, 8), batch_size=48, lr=4e-5,
                              iterations=400_000),
    saliency=TABLE_I | dict(image_size=384, attention=(24, 12)),        # the last two levels, in
    edges=TABLE_I | dict(image_size=320, attention=(20, 10)))            # latents with f = 4


def presets(task):
    """What a dataset, or --preset paper, changes of the defaults."""
    own = dict(sigma_data=1.0 if TARGETS[task] else 0.5)
    size = dict(image_size=192) if task == "saliency" else {}
    return {"shapes": DEMO | own, "folder": PATCHES | own | size, "paper folder": PAPER[task]}


def network(s, channels, stage=None):
    """TaskUNet's arguments. channels: of the images; a target has one. stage: of latents, whose."""
    x0_channels = 1 if TARGETS[s.script] else channels
    condition = channels + (s.script == "inpainting")
    own = dict(condition=condition, encoder=s.encoder, fuse=s.fuse)
    if stage:
        own |= dict(first_stage=stage.facts, size=s.image_size // stage.factor)
        x0_channels = stage.latent
    return ddm.network(s, x0_channels) | own


def check(run):
    """Say what cannot be before all else, and open the first stage. ValueError, Problem."""
    s, args = run.settings, run.args
    ddm.predictor(None, **ddm.meaning(s))
    ddm.sampler(run)
    run.stage = None
    if s.autoencoder:
        facts = run.checkpoint and run.checkpoint["network"].get("first_stage")
        if run.checkpoint and not facts:
            raise ValueError("this run is of pixels: it takes no --autoencoder")
        run.stage = FirstStage(s.autoencoder, run.device, facts)
        if args.clip or s.precondition and s.sigma_data != 1:
            raise ValueError("latents have no bounds, and the variance 1: no --clip, and with "
                             "--precondition --sigma-data 1")
        if s.image_size % run.stage.factor:
            raise ValueError(f"--image-size must be a multiple of {run.stage.factor}")
    with torch.device("meta"):
        TaskUNet(**network(s, 3, run.stage))
    if s.dataset not in ("shapes", "folder") or s.h == "sine":
        raise ValueError("a task is for --dataset shapes or folder, and not for --h sine")
    if s.script == "super_resolution" and (s.image_size % SCALE or args.clip):
        raise ValueError(f"super-resolution needs an --image-size that {SCALE} divides, and no "
                         f"--clip: its x₀ is a residual, beyond [-1, 1]")
    if s.regression and (s.predict != "both" or not s.precondition):
        raise ValueError("--regression goes with --predict both and --precondition")
    if args.input and args.evaluate or args.mask and not (args.input and s.script == "inpainting"):
        raise ValueError("--input goes with --sample alone, and --mask with inpainting's --input")
    if args.out and args.evaluate and args.sample:
        raise ValueError("--out is for --evaluate or for --sample, not for both")
    if args.evaluate and s.script == "edges" and not importlib.util.find_spec("scipy"):
        raise ValueError("edges are measured with scipy: pip install scipy")
    if s.dataset == "folder" and args.train and (args.evaluate or args.sample) and not args.input:
        task_data.test_files(run, 1)


@data.command
def main(argv=None):
    """The command line: a task, and then flags. Exits as the scripts do."""
    task, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if task not in TARGETS:
        raise data.Problem(f"say {', '.join(TARGETS)} first, then flags (see edges --help)", 2)
    run = data.open_run(task, __doc__, FLAGS, SAMPLING, presets(task), flags)
    with data.refusals():
        check(run)
    if run.args.train:
        train(run)
    if run.args.evaluate:
        respond(run, evaluating=True)
    if run.args.sample:
        respond(run, evaluating=False)


if __name__ == "__main__":
    main()
