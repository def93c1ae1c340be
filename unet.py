"""The compact U-Net the four method scripts share: one encoder, one middle, a decoder for every output.

Two of the papers ask a network for two things at once, the image and the noise, so this U-Net returns a tuple:

    t ── sinusoids ── MLP ── added inside every block
                                                                     outputs[0], e.g. φ or x̂₀
    x ─ conv ─ [32²] ─────────────── skips ─────────────── [32²] ─ GN, SiLU, conv
                 ╲ ↓2                                   ↑2 ╱
                 [16²] ∗ ─────────── skips ───────── ∗ [16²]          decoder 1
                    ╲ ↓2                          ↑2 ╱
                    [8²] ────────── skips ────────── [8²]             [..] = `blocks` residual blocks
                       ╲ ↓2                    ↑2 ╱                          (one more in a decoder)
                       [4²] ─────── skips ─────── [4²]                ∗    = with attention
                          ╲                     ╱
                           block ─ attention ─ block
                                                ╲
                                                 decoder 2: a full copy over the same skips    outputs[1], e.g. ε̂

The resolutions are those of CIFAR-10 with mult=(1, 2, 2, 2). With second="decoder" (ADM's "U-Net+decoder") each further
output has a decoder of its own; with second="conv" ("U-Net+conv") it has only two 3x3 convolutions on the feature map
before the first output layer. The paper prints "stride 2" for them, which could not give an image of the input's size;
here they have stride 1. With width=128, blocks=2 and one output this is DDPM's CIFAR-10 network (35.7 M parameters),
but for the place where time enters: behind a block's second norm, not before it. (A norm takes out what is added evenly
to its whole group, and in narrow networks a group is a channel or a few.)

A condition, an image the network is told, has an encoder of its own (the papers' "Cond" branch); `windowed` calls the
network on images larger than it was trained on.

    python unet.py [--compile]         parameters, FLOPs and images/s on this machine; --sweep: against batch, size and
                                       steps; --profile: what the time goes to

`fast` makes a call cheap where Python is slower than the GPU; the samplers stay plain loops.
"""

import argparse
import copy
import datetime
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def norm(channels):
    """GroupNorm with 32 groups or fewer, of at least 4 channels: one alone would lose its mean and its scale."""
    return nn.GroupNorm(max(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4), channels)


def conv(c_in, c_out, kernel=3, stride=1, zero=False):
    """A padded convolution; with zero=True it starts at 0, so that what it ends contributes nothing at first."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def time_embedding(t, dim):
    """Sinusoids of continuous time, in t's precision.

    t: [B] in [0, 1], scaled to DDPM's 0 to 1000. Returns [B, dim]; the periods run geometrically from 2π to 2π·10⁴ of
    those units (Vaswani et al. 2017), so t and t + 1e-3 differ as neighbouring steps of a 1000-step model do.
    """
    freqs = torch.exp(-math.log(1e4) * torch.arange(dim // 2, dtype=t.dtype, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Self-attention over all pixels, about head_dim channels a head (the largest count of heads that divides C)."""

    def __init__(self, channels, head_dim):
        super().__init__()
        self.heads = max(n for n in range(1, max(1, channels // head_dim) + 1) if channels % n == 0)
        self.norm, self.qkv = norm(channels), conv(channels, 3 * channels, kernel=1)
        self.out = conv(channels, channels, kernel=1, zero=True)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))                          # [B, heads, HW, C / heads]
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Block(nn.Module):
    """Residual block with time added between its convolutions, as in DDPM (Ho et al. 2020), and attention if head_dim.

    x: [B, c_in, H, W], emb: [B, emb] -> [B, c_out, H, W]. Made with emb=0 it knows no time.
    """

    def __init__(self, c_in, c_out, emb, dropout, head_dim=None):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.time = nn.Linear(emb, c_out) if emb else None
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, head_dim) if head_dim else nn.Identity()

    def forward(self, x, emb=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.time:
            h = h + self.time(emb)[:, :, None, None]     # behind the norm, which would take part of it out again
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class Fusion(nn.Module):
    """h plus a learned map of a conditioning image [B, c_in, S, S], averaged down to h's size; 0 at first."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.map = nn.Sequential(conv(c_in, c_out), nn.SiLU(), conv(c_out, c_out, kernel=1, zero=True))

    def forward(self, h, condition):
        return h + self.map(F.adaptive_avg_pool2d(condition, h.shape[-2:]))


class CrossAttention(nn.Module):
    """h [B, C, H, W] asks the condition's features f [B, c, H, W] of its level: every pixel all of them; 0 at first."""

    def __init__(self, channels, c, head_dim):
        super().__init__()
        self.heads = max(n for n in range(1, max(1, channels // head_dim) + 1) if channels % n == 0)
        self.norm, self.norm_f = norm(channels), norm(c)
        self.q, self.kv = conv(channels, channels, kernel=1), conv(c, 2 * channels, kernel=1)
        self.out = conv(channels, channels, kernel=1, zero=True)

    def forward(self, h, f):
        q, k, v = [part.reshape(len(h), self.heads, h.shape[1] // self.heads, -1).transpose(-1, -2)
                   for part in (self.q(self.norm(h)), *self.kv(self.norm_f(f)).chunk(2, dim=1))]
        return h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(h.shape))


class Encoder(nn.Module):
    """The condition encoder: an image [B, c, H, W] -> a tuple with a feature map for every level of the U-Net,
    [B, widths[i], H / 2^i, W / 2^i]. It knows no time, so that one call serves all steps of a sampler.
    """

    def __init__(self, c, widths):
        super().__init__()
        self.first = conv(c, widths[0])
        self.down = nn.ModuleList(conv(a, a, stride=2) for a in widths[:-1])
        self.levels = nn.ModuleList(Block(a, b, 0, 0.0) for a, b in zip([widths[0], *widths], widths))

    def forward(self, image):
        h, features = self.first(image), []
        for i, block in enumerate(self.levels):
            h = block(self.down[i - 1](h) if i else h)
            features.append(h)
        return tuple(features)


class SwinEncoder(Encoder):
    """The papers' condition encoder, Swin-B (Liu et al. 2021, torchvision's): its four stages, of strides 4 to 32, join
    the compact encoder's features at the levels of those strides; stages beyond the last level join that one. In
    training half of its last blocks are skipped at random, and fewer before, as torchvision has it.
    """

    def __init__(self, c, widths):
        from torchvision.models import swin_b
        super().__init__(c, widths)
        self.swin = swin_b(weights=None).features       # patches, stage, merging, stage, merging, stage, merging, stage
        self.level = [min(k + 2, len(widths) - 1) for k in range(4)]
        self.maps = nn.ModuleList(conv(128 * 2 ** k, widths[i], kernel=1) for k, i in enumerate(self.level))
        imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]       # mean, std
        self.register_buffer("imagenet", imagenet, persistent=False)

    def forward(self, image):
        features, (mean, std) = list(super().forward(image)), self.imagenet
        colours = image[:, :3 if image.shape[1] > 2 else 1]                         # without the mask of inpainting
        h = ((colours + 1) / 2 - mean) / std                                        # grey becomes three channels
        for k, (i, to) in enumerate(zip(self.level, self.maps)):
            h = self.swin[2 * k + 1](self.swin[2 * k](h))                           # NHWC
            f = to(F.layer_norm(h, h.shape[-1:]).permute(0, 3, 1, 2))
            size = features[i].shape[-2:]
            features[i] = features[i] + F.interpolate(f, size, mode="bilinear", align_corners=False)
        return tuple(features)

    def load_imagenet(self):
        """Load Swin-B's ImageNet weights, which torchvision downloads once. Raises OSError where it can't."""
        from torchvision.models import Swin_B_Weights
        try:
            state = Swin_B_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:         # no network, no disk, a checksum
            raise OSError(f"cannot download Swin-B's ImageNet weights ({error}): use --encoder swin_b --no-pretrained, "
                          f"or put torchvision's file into {torch.hub.get_dir()}/checkpoints") from error
        prefix = "features."
        self.swin.load_state_dict({k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)})


ENCODERS = {"compact": Encoder, "swin_b": SwinEncoder}


class Decoder(nn.Module):
    """The way back up: takes the encoder's features in reverse order. Returns [B, width, H, W], before the output
    layer.

    fuse: how a condition enters where a level begins: "image" (`Fusion`), "concat" (the condition encoder's features of
    that level are concatenated) or "attention" (`CrossAttention`, but for the first level); None: there is none.
    """

    def __init__(self, skips, widths, blocks, attend, emb, dropout, fuse=None, condition=0, head_dim=64):
        super().__init__()
        skips, self.levels, self.up, self.fuse = list(skips), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.concat, c = fuse == "concat", widths[-1]
        for i, w in reversed(list(enumerate(widths))):
            stack = nn.ModuleList()
            if fuse == "image":
                self.fuse.append(Fusion(condition, c))
            if fuse == "attention":
                self.fuse.append(CrossAttention(c, w, head_dim) if i else nn.Identity())
            if fuse == "concat":
                c += w
            for _ in range(blocks + 1):
                stack.append(Block(c + skips.pop(), w, emb, dropout, attend[i]))
                c = w
            self.levels.append(stack)
            self.up.append(conv(c, c) if i else nn.Identity())

    def forward(self, h, skips, emb, condition=None):
        skips = list(skips)
        for k, (stack, up) in enumerate(zip(self.levels, self.up)):
            seen = condition[-1 - k] if isinstance(condition, tuple) else condition
            if self.concat:
                h = torch.cat([h, seen], dim=1)
            elif self.fuse and not isinstance(self.fuse[k], nn.Identity):
                h = self.fuse[k](h, seen)
            for block in stack:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if skips:
                h = up(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class UNet(nn.Module):
    """The shared network: net(x, t) -> a tuple with one tensor [B, c, H, W] per entry c of `outputs`.

    x: [B, channels, H, W] with H and W divisible by 2^(levels - 1) (ValueError otherwise). t: [B] in [0, 1]. width:
    channels of the first level (divisible by 8); mult: each level's width over it; blocks: residual blocks a level.
    attention: sizes; a level attends where size / 2^level is listed, whatever the size of the input. second:
    "decoder" or "conv", what the second and further outputs are made by. head_dim: channels of an attention head.
    Every output starts at zero. outputs=() makes a trunk for other heads: call `features`.

    condition: channels of an image that net(x, t, condition) takes too. Without an encoder it is fused as it is with
    the features where every level begins, going down and up. encoder: "compact" or "swin_b", whose features of every
    level meet the decoders' there, by fuse="concat" (the papers' appendix: concatenated to the decoders' inputs) or by
    fuse="attention" (the papers' experiments: "to correlate the features of x_t by attention mechanisms"; as in the
    released code the first level, where attention between all pixels would cost most, is concatenated to x instead).
    net(x, t, net.encode(condition)) is the same and lets a sampler encode once.
    """

    def __init__(self, channels=3, outputs=(3, 3), width=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,),
                 dropout=0.1, size=32, second="decoder", head_dim=64, condition=0, encoder=None, fuse="concat"):
        super().__init__()
        if width % 8 or width <= 0:
            raise ValueError(f"the network's width must be a positive multiple of 8, not {width}")
        if size % 2 ** (len(mult) - 1):
            raise ValueError(f"{len(mult)} levels halve the image {len(mult) - 1} times: its size must be a multiple "
                             f"of {2 ** (len(mult) - 1)}, not {size}")
        if second not in ("decoder", "conv"):
            raise ValueError(f"second must be 'decoder' or 'conv', not {second!r}")
        if encoder not in (None, *ENCODERS) or fuse not in ("concat", "attention"):
            raise ValueError(f"there is no condition encoder {encoder!r} with fuse {fuse!r}")
        how = fuse if encoder else "image" if condition else None
        widths, emb = [width * m for m in mult], 4 * width
        attend = [head_dim if size / 2 ** i in attention else None for i in range(len(widths))]
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.first = conv(channels + (widths[0] if how == "attention" else 0), width)

        self.encoder, self.down, self.fuse = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, c = [width], width                        # the widths of what the decoders will be handed
        for i, w in enumerate(widths):
            stack = nn.ModuleList()
            if how == "image":
                self.fuse.append(Fusion(condition, c))
            for _ in range(blocks):
                stack.append(Block(c, w, emb, dropout, attend[i]))
                c = w
                skips.append(c)
            self.encoder.append(stack)
            if i + 1 < len(widths):
                self.down.append(conv(c, c, stride=2))
                skips.append(c)
        self.middle = nn.ModuleList([Block(c, c, emb, dropout, head_dim), Block(c, c, emb, dropout)])

        decoders = max(1, len(outputs)) if second == "decoder" else 1
        self.decoders = nn.ModuleList(Decoder(skips, widths, blocks, attend, emb, dropout, how, condition, head_dim)
                                      for _ in range(decoders))
        self.heads = nn.ModuleList()
        for i, c_out in enumerate(outputs):
            branch = [conv(width, width), nn.SiLU()] if i >= decoders else []
            self.heads.append(nn.Sequential(norm(width), nn.SiLU(), *branch, conv(width, c_out, zero=True)))
        self.at_input, self.encode = how == "attention", ENCODERS[encoder](condition, widths) if encoder else None

    def features(self, x, t, condition=None):
        """What the heads are made of: a list with every decoder's [B, width, H, W]."""
        stride = 2 ** len(self.down)
        if x.shape[-2] % stride or x.shape[-1] % stride:
            raise ValueError(f"this U-Net halves its input {len(self.down)} times: height and width must be multiples "
                             f"of {stride}, not {x.shape[-2]}x{x.shape[-1]}")
        if self.encode and not isinstance(condition, tuple):
            condition = self.encode(condition)
        emb = self.time(time_embedding(t.to(x.dtype), self.first.out_channels))
        h = self.first(torch.cat([x, condition[0]], dim=1) if self.at_input else x)
        skips = [h]
        for i, stack in enumerate(self.encoder):
            if self.fuse:
                h = self.fuse[i](h, condition)
            for block in stack:
                h = block(h, emb)
                skips.append(h)
            if i < len(self.down):
                h = self.down[i](h)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        return [decoder(h, skips, emb, condition) for decoder in self.decoders]

    def forward(self, x, t, condition=None):
        features = self.features(x, t, condition)
        return tuple(head(features[min(i, len(features) - 1)]) for i, head in enumerate(self.heads))


# Sizes for every dataset that train on one GPU in an evening (cifar10) or in minutes on two CPU cores (shapes), the
# same for all four methods. U64 is DDPM's network.
U64 = dict(image_size=64, width=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1, batch_size=128,
           iterations=400_000, lr=2e-4, ema=0.9999)
COMPACT = {
    "shapes": dict(image_size=16, width=32, mult=(1, 2, 2), blocks=1, attention=(8,), dropout=0.0, batch_size=32,
                   iterations=1400, lr=2e-3, ema=0.995),
    "cifar10": {**U64, "image_size": 32, "iterations": 200_000},
    "celeba": U64,
    "celebahq": {**U64, "image_size": 256, "width": 64, "mult": (1, 1, 2, 2, 4, 4), "batch_size": 32},
    "lsun-church": {**U64, "image_size": 128, "width": 96, "mult": (1, 1, 2, 2, 4), "batch_size": 64},
    "folder": U64}


def create(network, device, seed=0, build=UNet, pretrained=False):
    """(build(**network), a copy of it for the average of its weights, which needs no gradients), both on the device.

    pretrained: with Swin-B's ImageNet weights, if that is the network's condition encoder; raises OSError without them.
    """
    torch.manual_seed(seed)
    net = build(**network)
    if pretrained and isinstance(net.encode, SwinEncoder):
        net.encode.load_imagenet()
    net = net.to(device, memory_format=torch.channels_last)
    return net, copy.deepcopy(net).eval().requires_grad_(False)


def batch_like(n, network, device):
    """Zeros [b, C, S, S] in channels_last: as many of n images of that network as are drawn at once on this device."""
    size = network["size"]
    b = min(n, max(1, (512 if device.type == "cuda" else 64) * 32 ** 2 // size ** 2))
    x = torch.zeros(b, network["channels"], size, size, device=device)
    return x.contiguous(memory_format=torch.channels_last)


def fast(net, *inputs):
    """`net` as a callable of the same signature that costs the GPU's time and not Python's.

    On CUDA the call is captured once, for the shapes of the inputs, x [B, C, H, W] and t [B] and what else net takes,
    into a CUDA graph; each later call copies its inputs into the graph's buffers, replays it and returns copies, so a
    multistep solver may keep the last output. A call of another shape or dtype runs uncaptured. On every other device
    this is `net` itself. `net` must be in evaluation mode and return a tuple, must not synchronise with the CPU, and
    its weights must stay where they are (in-place changes are seen).
    """
    if inputs[0].device.type != "cuda":
        return net
    with torch.no_grad():
        static = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):                  # cuDNN picks its algorithms here, outside of the capture
            for _ in range(3):
                net(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(*static)

    def replay(*inputs):
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in static]:
            return net(*inputs)
        for buffer, x in zip(static, inputs):
            buffer.copy_(x)
        graph.replay()
        return tuple(out.clone() for out in captured)

    return replay


def fast_batch(model, n, network, device):
    """(model(x, t) made fast, x): zeros, as many of n images of that network as are drawn at once on this device."""
    x = batch_like(n, network, device)
    return fast(model, x, x.new_ones(len(x))), x


def padded(x, net):
    """x [B, C, H, W] with its last row and column repeated, until the U-Net's stride divides H and W."""
    stride = 2 ** len(net.down)
    return F.pad(x, (0, -x.shape[-1] % stride, 0, -x.shape[-2] % stride), mode="replicate")


def window_starts(length, size, overlap):
    """Where windows of `size` begin that cover `length`, evenly spread, neighbours sharing `overlap` pixels or more."""
    count = 1 + math.ceil(max(0, length - size) / (size - overlap))
    return [i * (length - size) // max(1, count - 1) for i in range(count)]


def windowed(model, encode, size, overlap, batch):
    """Calls on images of any size as calls on overlapping windows: see(condition [1, c, H, W]) -> call(x, t).

    model(x, t, features) -> a tuple; encode(condition) -> features, a tuple; H and W as `padded` makes them. Every
    network call of a sampler goes through all windows, `batch` at a time, and averages their outputs with weights that
    fall towards a window's border: a linear blend, so heads that add up to x_t go on doing so. The windows' features
    are computed once for all calls and kept: the memory is theirs, which grows with the image, and one batch's work.
    """
    graphs = {}

    def see(condition):
        H, W = condition.shape[-2:]
        h, w = min(size, H), min(size, W)
        corners = [(a, b) for a in window_starts(H, h, min(overlap, h - 1))
                   for b in window_starts(W, w, min(overlap, w - 1))]

        def cut(x, part):
            return torch.cat([x[..., a:a + h, b:b + w] for a, b in part]).contiguous(memory_format=torch.channels_last)

        def ramp(n):
            i = torch.arange(1.0, n + 1, device=condition.device)
            return torch.minimum(i, n + 1 - i).clamp(max=overlap + 1)
        weight, total = ramp(h)[:, None] * ramp(w), condition.new_zeros(H, W)
        for a, b in corners:
            total[a:a + h, b:b + w] += weight
        at_once = min(batch, len(corners))
        parts = [corners[k:k + at_once] for k in range(0, len(corners), at_once)]
        parts[-1] = parts[-1] + corners[-1:] * (at_once - len(parts[-1]))           # full, for the captured graph
        features = [encode(cut(condition, part)) for part in parts]

        def call(x, t):
            outs, done = None, set()
            for part, seen in zip(parts, features):
                inputs = cut(x, part), t.expand(at_once), *seen
                if inputs[0].shape not in graphs:
                    graphs.clear()                       # a graph holds its memory, and images come in many sizes
                    graphs[inputs[0].shape] = fast(lambda x, t, *seen: model(x, t, seen), *inputs)
                results = graphs[inputs[0].shape](*inputs)
                outs = outs or [x.new_zeros(1, r.shape[1], H, W) for r in results]
                for k, (a, b) in enumerate(part):
                    share = weight / total[a:a + h, b:b + w]
                    for out, result in zip(outs, results) if (a, b) not in done else ():
                        out[0, :, a:a + h, b:b + w] += share * result[k]
                    done.add((a, b))
            return tuple(outs)
        return call

    return see


def use_bf16(precision, device):
    """Whether the network computes in bfloat16. precision: auto (on a GPU that has it), fp32 or bf16."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "bf16" or (precision == "auto" and native)


def parallel(net, device, world=1, compile=False):
    """The network to call: compiled by flag, and in training with gradients averaged between `world` processes."""
    if compile:
        net = torch.compile(net)
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)
    return net


def rates(calls, batch, device, rounds=5):
    """{name: images/s} of calls on a batch, after a warm-up taken by turns, so that a busy moment hits all alike: the
    median of the rounds.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: batch / sorted(each[1:])[rounds // 2] for name, each in times.items()}


def seconds(call, device, repeats=5):
    """The median time of call() in seconds, after one warm-up call, waiting for the device each time."""
    return 1 / rates({"": call}, 1, device, repeats)[""]


def warn_cost(model, shape, batch_size, steps, processes, condition=0):
    """On a CPU, time the network and say what the training ahead will cost, where that is over half an hour. condition:
    the channels of an image that the model takes too.
    """
    device, batch_size = processes.device, batch_size // processes.world
    if device.type != "cpu" or processes.rank:
        return
    n = min(8, batch_size)
    x, t = torch.zeros(n, *shape), torch.full((n,), 0.5)
    given = [torch.zeros(n, condition, *shape[1:])] if condition else []
    with torch.no_grad():
        step = 3 * batch_size / n * seconds(lambda: model(x, t, *given), device, repeats=3)     # three forward passes
    if step * steps > 1800:
        time_left = datetime.timedelta(seconds=round(step * steps))
        print(f"on the CPU: at about {step:.2g} s a step, {steps} steps take {time_left}. Ctrl-C saves, and the same "
              f"command goes on; a smaller --width, --blocks, --batch-size or --iterations costs less.", flush=True)


def flops(net, x, t):
    """Floating-point operations of one call (a multiplication and an addition are two), by torch's own counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(x, t)                                        # the counter has no formula for every fused attention
    return counter.get_total_flops()


def training_step(net, x, t, optimizer, bf16=False):
    """A training step's work on any loss: forward, backward, optimizer. For timing."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = net(x, t)
    sum(o.float().square().mean() for o in out).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def variants(batch, device, compile=False, **arguments):
    """(net, x, t, {name: call}): UNet(**arguments), a batch for it, and the ways to run it on this device. Each call is
    a training step's work, or a sampler's one call.
    """
    net = UNet(**arguments).to(device, memory_format=torch.channels_last)
    size, channels = arguments.get("size", 32), arguments.get("channels", 3)
    x = torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    t, bf16 = torch.rand(batch, device=device), use_bf16("auto", device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))
    quick = torch.compile(net) if compile else None

    def training(model):
        def call():
            net.train()
            training_step(model, x, t, optimizer, bf16)
        return call

    def evaluated(model):
        def call(x, t):
            net.eval()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                return model(x, t)
        return call

    calls = {"training": training(net), "sampling": lambda: evaluated(net)(x, t)}
    if compile:
        calls |= {"training, compiled": training(quick), "sampling, compiled": lambda: evaluated(quick)(x, t)}
    if device.type == "cuda":
        graph = fast(evaluated(net), x, t)
        calls["sampling, CUDA graph"] = lambda: graph(x, t)
    return net, x, t, calls


def report(name, batch, device, compile=False, **arguments):
    """Print the parameters, FLOPs and images/s of UNet(**arguments) on this device, each way to run it; and how that
    compares with a large product of matrices in the same precision, timed between.
    """
    net, x, t, calls = variants(batch, device, compile, **arguments)
    work, n = flops(net, x[:1], t[:1]), 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if use_bf16("auto", device) else torch.float32)
    print(f"{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {work / 1e9:.3f} GFLOPs a call")
    got = rates({**calls, "product": lambda: a @ a}, batch, device)
    best = 2 * n ** 3 * got.pop("product") / batch / 1e12
    for way, rate in got.items():
        done = rate * work * (3 if way.startswith("training") else 1) / 1e12            # backward costs two forward
        print(f"    {way:24} {rate:10,.1f} images/s   {done:8.3g} TFLOP/s, {done / best:4.0%} of a large product's "
              f"{best:.3g}", flush=True)


def sweep(device, arguments):
    """Print images/s against the batch, the image size, and a sampler's number of steps."""
    def listed(got):
        return "   ".join(f"{way} {rate:,.1f} images/s" for way, rate in got.items())

    many = (8, 32, 128, 512) if device.type == "cuda" else (1, 4, 16, 32, 64, 128)
    for batch in many:
        got = rates(variants(batch, device, **arguments)[3], batch, device, 3)
        print(f"batches of {batch:4}: {listed(got)}", flush=True)
    for size in (16, 32, 64):
        batch = max(1, many[-2] * 16 ** 2 // size ** 2)
        got = rates(variants(batch, device, **{**arguments, "size": size})[3], batch, device, 3)
        print(f"{size}x{size}, batches of {batch:4}: {listed(got)}", flush=True)
    *_, calls = variants(many[-2], device, **arguments)
    call = calls.get("sampling, CUDA graph", calls["sampling"])
    for steps in (1, 5, 10, 20, 50):
        took = seconds(lambda: [call() for _ in range(steps)], device, 3)
        print(f"{steps:2} network calls an image, batches of {many[-2]}: {many[-2] / took:,.1f} images/s", flush=True)


def profile(name, batch, device, **arguments):
    """Print what a training step and a sampler's call spend their time on, by torch's profiler."""
    *_, calls = variants(batch, device, **arguments)
    for way, call in calls.items():
        call()
        with torch.profiler.profile() as taken:
            call()
        on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = sorted(taken.key_averages(), key=lambda row: -getattr(row, on))
        total = sum(getattr(row, on) for row in table)
        print(f"{name}, {way}, a batch of {batch}: {total / 1e3:,.1f} ms")
        for row in table[:8]:
            print(f"    {getattr(row, on) / total:6.1%}  {row.count:5} calls  {row.key[:80]}", flush=True)


DEMO = dict(width=32, mult=(1, 2, 2), blocks=1, attention=(8,), size=16, dropout=0.0, second="conv")


def main(argv=None):
    """The command line: what the networks of the demo and of CIFAR-10 cost on this machine."""
    parser = argparse.ArgumentParser(prog="python unet.py", description="What the shared U-Net costs on this machine.")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the GPU where there is one")
    parser.add_argument("--batch-size", type=int, help="images a call (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile's images/s too, after minutes of compiling")
    parser.add_argument("--sweep", action="store_true", help="instead: images/s against batch, size and steps, of the "
                        "demo's network on a CPU and CIFAR-10's on a GPU")
    parser.add_argument("--profile", action="store_true", help="instead: what the demo's and CIFAR-10's networks spend "
                        "their time on")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device on this machine")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if args.sweep + args.profile + args.compile > 1 or args.sweep and args.batch_size:
        parser.error("--sweep, --profile and --compile go alone, and --sweep has batch sizes of its own")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    batch = args.batch_size or (128 if device.type == "cuda" else 8)
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"PyTorch {torch.__version__}, {where}, batches of {batch}, {'bf16' if use_bf16('auto', device) else 'fp32'}")
    if args.sweep:
        return sweep(device, {"outputs": (3,)} if device.type == "cuda" else DEMO)
    if args.profile:
        profile("demo", args.batch_size or 32, device, **DEMO)
        return profile("CIFAR-10, one output", batch, device, outputs=(3,))
    report("demo (shapes, 16x16)", batch, device, args.compile, **DEMO)
    report("CIFAR-10, one output", batch, device, args.compile, outputs=(3,))
    report("CIFAR-10, U-Net+conv", batch, device, args.compile, second="conv")
    report("CIFAR-10, U-Net+decoder", batch, device, args.compile)


if __name__ == "__main__":
    main()
