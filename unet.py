"""The compact U-Net that the four method scripts share: an encoder, a middle, a decoder per output.

Two of the papers ask a network for two things at once, the image and the noise. So this U-Net
returns a tuple, with one tensor for each thing that it is asked for:

    t ── sinusoids ── MLP ── added inside every block
                                                                     outputs[0], e.g. φ or x̂₀
    x ─ conv ─ [32²] ─────────────── skips ─────────────── [32²] ─ GN, SiLU, conv
                 ╲ ↓2                                   ↑2 ╱
                 [16²] ∗ ─────────── skips ───────── ∗ [16²]          decoder 1
                    ╲ ↓2                          ↑2 ╱
                    [8²] ────────── skips ────────── [8²]            [..] = `blocks` residual blocks
                       ╲ ↓2                    ↑2 ╱                          (one more in a decoder)
                       [4²] ─────── skips ─────── [4²]                ∗    = with attention
                          ╲                     ╱
                           block ─ attention ─ block
                                                ╲
                                                 decoder 2: a full copy over the same skips

The sizes are those of CIFAR-10 with mult=(1, 2, 2, 2). With second="decoder" (ADM's
"U-Net+decoder") each further output has a decoder of its own. With second="conv" ("U-Net+conv") it
has only two 3x3 convolutions on the feature map before the first output layer. The paper prints
"stride 2" for them, which could not give an image of the input's size; here they have stride 1.

With width=128, blocks=2 and one output this is DDPM's CIFAR-10 network (35.7 M parameters), but for
its initial weights and two differences. Time enters behind a block's second norm and not before it,
because a norm removes what is added evenly to its whole group, and in narrow networks a group is
only a few channels. And attention has one head for every 64 channels, where DDPM has a single head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels):
    """GroupNorm of at most 32 groups, each of at least 4 channels: of 1 it would lose its mean."""
    groups = [g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4]
    return nn.GroupNorm(max(groups), channels)


def conv(c_in, c_out, kernel=3, stride=1, zero=False):
    """A padded convolution. With zero=True its weights start at 0, and so does what it adds."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def time_embedding(t, dim):
    """Sinusoids of continuous time, in t's precision: t [B] in [0, 1] -> [B, dim].

    t is scaled to DDPM's 0 to 1000. In those units the periods grow from 2π towards 2π·10⁴ by equal
    factors (Vaswani et al. 2017), so t and t + .001 differ as neighbouring steps of DDPM do.
    """
    i = torch.arange(dim // 2, dtype=t.dtype, device=t.device)
    frequencies = torch.exp(-math.log(1e4) * i / (dim // 2))
    angles = 1000 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Self-attention between all pixels, about head_dim channels a head: [B, C, H, W] -> same."""

    def __init__(self, channels, head_dim):
        super().__init__()
        most = max(1, channels // head_dim)
        self.heads = max(n for n in range(1, most + 1) if channels % n == 0)
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, kernel=1)
        self.out = conv(channels, channels, kernel=1, zero=True)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)             # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Block(nn.Module):
    """A residual block that is told the time, as in DDPM (Ho et al. 2020). head_dim: see Attention.

    x [B, c_in, H, W] and emb [B, emb] -> [B, c_out, H, W]. A block made with emb=0 knows no time.
    """

    def __init__(self, c_in, c_out, emb, dropout, head_dim=None):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out)
        self.time = nn.Linear(emb, c_out) if emb else None
        self.norm2 = norm(c_out)
        self.conv2 = conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, head_dim) if head_dim else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.time:
            h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class Fusion(nn.Module):
    """h plus a learned map of a conditioning image [B, c_in, S, S], averaged down to h's size."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.map = nn.Sequential(
            conv(c_in, c_out), nn.SiLU(), conv(c_out, c_out, kernel=1, zero=True))

    def forward(self, h, condition):
        return h + self.map(F.adaptive_avg_pool2d(condition, h.shape[-2:]))


class Decoder(nn.Module):
    """The way back up, which takes the encoder's features in reverse order. -> [B, width, H, W]

    skips: the channels of those features. attend: each level's head_dim, or None for no attention.
    condition: the channels of a conditioning image, or 0.
    """

    def __init__(self, skips, widths, blocks, attend, emb, dropout, condition=0):
        super().__init__()
        skips = list(skips)
        self.levels = nn.ModuleList()
        self.up = nn.ModuleList()
        self.fuse = nn.ModuleList()
        c = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            if condition:
                self.fuse.append(Fusion(condition, c))
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                level.append(Block(c + skips.pop(), width, emb, dropout, attend[i]))
                c = width
            self.levels.append(level)
            self.up.append(conv(c, c) if i else nn.Identity())

    def forward(self, h, skips, emb, condition=None):
        skips = list(skips)
        for k, (level, up) in enumerate(zip(self.levels, self.up)):
            if self.fuse:
                h = self.fuse[k](h, condition)
            for block in level:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if skips:
                h = up(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


def check(width, mult, size, second):
    """Raise ValueError for a U-Net that cannot be built."""
    if not mult or mult[0] != 1:
        raise ValueError("--mult must begin with 1: the width is that of the first level")
    if width % 8 or width <= 0:
        raise ValueError(f"the network's width must be a positive multiple of 8, not {width}")
    stride = 2 ** (len(mult) - 1)
    if size % stride:
        raise ValueError(f"{len(mult)} levels halve the image {len(mult) - 1} times: "
                         f"its size must be a multiple of {stride}, not {size}")
    if second not in ("decoder", "conv"):
        raise ValueError(f"second must be 'decoder' or 'conv', not {second!r}")


class UNet(nn.Module):
    """The shared network: net(x, t) -> a tuple, one tensor [B, c, H, W] for each c in `outputs`.

    x [B, channels, H, W], with H and W divisible by 2^(levels - 1); t [B] in [0, 1]. width: the
    first level's channels, a multiple of 8. mult: each level's channels over the width. blocks:
    residual blocks a level. attention: a level attends if size / 2^level is in this list. second:
    "decoder" or "conv", see above. condition: the channels of an image that net(x, t, condition)
    takes too, and fuses with its features where each level begins. Every output starts at zero.
    With outputs=() it is a trunk for other heads: call `features`. Raises ValueError.
    """

    def __init__(self, channels=3, outputs=(3, 3), width=128, mult=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.1, size=32, second="decoder", head_dim=64, condition=0):
        super().__init__()
        check(width, mult, size, second)
        emb = 4 * width
        widths = [width * m for m in mult]
        attend = [head_dim if size / 2 ** i in attention else None for i in range(len(mult))]
        self.time = nn.Sequential(
            nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.first = conv(channels, width)
        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        self.fuse = nn.ModuleList()
        skips = [width]                                # channels of the features that decoders get
        c = width
        for i, w in enumerate(widths):
            if condition:
                self.fuse.append(Fusion(condition, c))
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(Block(c, w, emb, dropout, attend[i]))
                c = w
                skips.append(c)
            self.encoder.append(level)
            if i + 1 < len(widths):
                self.down.append(conv(c, c, stride=2))
                skips.append(c)
        self.middle = nn.ModuleList(
            [Block(c, c, emb, dropout, head_dim), Block(c, c, emb, dropout)])
        decoders = max(1, len(outputs)) if second == "decoder" else 1
        self.decoders = nn.ModuleList(
            self.decoder(skips, widths, blocks, attend, emb, dropout, condition)
            for _ in range(decoders))
        self.heads = nn.ModuleList()
        for i, c_out in enumerate(outputs):
            branch = [conv(width, width), nn.SiLU()] if i >= decoders else []
            last = conv(width, c_out, zero=True)
            self.heads.append(nn.Sequential(norm(width), nn.SiLU(), *branch, last))

    def decoder(self, *arguments):
        """A new decoder: a subclass may have another kind."""
        return Decoder(*arguments)

    def features(self, x, t, condition=None):
        """The heads' inputs: each decoder's [B, width, H, W], in a list. ValueError."""
        stride = 2 ** len(self.down)
        height, width = x.shape[-2:]
        if height % stride or width % stride:
            raise ValueError(f"this U-Net halves its input {len(self.down)} times: its height and "
                             f"width must be multiples of {stride}, not {height}x{width}")
        emb = self.time(time_embedding(t.to(x.dtype), self.time[0].in_features))
        h = self.first(x)
        skips = [h]
        for i, level in enumerate(self.encoder):
            if self.fuse:
                h = self.fuse[i](h, condition)
            for block in level:
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
        last = len(features) - 1
        return tuple(head(features[min(i, last)]) for i, head in enumerate(self.heads))


# Flags of every script: see data.COMMON.
FLAGS = dict(
    width=(32, "channels of the U-Net's first level, a multiple of 8", None),
    mult=((1, 2, 2), "channels of each level, over the first's width", None),
    blocks=(1, "residual blocks a level", None),
    attention=((8,), "sizes at which the U-Net attends", None),
    dropout=(0.0, "probability", (0, 0.99)))


def sizes(s):
    """The arguments of UNet that a run's settings name as they are."""
    return dict(size=s.image_size, **{name: getattr(s, name) for name in FLAGS})
