"""Every pixel its own schedule, and the whole way back from noise in one pass of the network.

The paper (anonymous, under review, 2024) lets a bright pixel fade faster than a dark one, so that
all become noise at the same time, as one pours faster from the fuller of two glasses to empty both
together. A pixel x₀ in (0, 1] ends with e^{-γ x₀} of its power. (Dark ones do not quite become
noise.) The way back needs x₀ for its schedule. So a first network, a variational autoencoder G_θ,
guesses the image scale x_δ = e^{-γ x₀}: it has less detail and so, the paper says, is easier. (Here
G_θ names x₀; x̂_δ follows.) A second, R_φ, sees x_i and x̂_δ, which tells how noisy each pixel is.
T heads on one U-Net predict the noises of all T steps at once (here, by way of x₀).

    python pixel_aware.py --train                        embedded shapes, minutes on two CPU cores
    python pixel_aware.py --train --dataset cifar10      CIFAR-10, on a GPU
    python pixel_aware.py --sample --steps 10            ten passes; without --steps, one

    x₀        x0              [B, C, H, W]     the image, here in [LOW, 1], elsewhere in [-1, 1]
    x_i       xi, x           [B, C, H, W]     the noisy image at step i
    x_δ, x̂_δ  x_delta, scale  [B, C, H, W]     the image scale e^{-γ x₀}, and G_θ's estimate of it
    -ln α     rate            [B, C, H, W]     γ x₀/T, so that α = x_δ^{1/T}; its `kept` is ᾱ_i
    j, T      j, T            whole numbers    the trajectory's steps, 1 ... T
    i         i, times        numbers          where a step lies, i = place(j); t = i/T
    ε̃_j       eps             [B, m, C, H, W]  the noise in m of the x_j, all of one trajectory
    Z^j       Z               [B, T, C, H, W]  the heads' estimates of them: Z[:, j-1] is Z^j

Algorithm 1 does not reconstruct an image, not even from its true noises (see `reverse_walk`). So
the default goes by conditional means. The paper's choices are --solver literal (its line 9
with ᾱ, not α), --grid uniform, --predict eps, --scale delta, --vae denoising, --average heads and,
not yet measured, --heads-per-step 500. For the others see docs/pixel_aware.md.
"""

import math
import types

import torch
import torch.nn.functional as F
from torch import nn

import data
import unet

# --------------------------------------------------------------------------------------- 1 schedule

LOW = 4e-3                                     # the smallest pixel value: one of 0 would never fade
GRIDS = {"quadratic": 2, "uniform": 1}         # step j lies at i = T (j/T)^p
SPREAD = {"image": 0.1, "delta": 0.3}          # about the error of the image that x̂_δ names


def like_image(i):
    """i [B] or [B, C] -> [B, . , 1, 1], to multiply images with. A number stays a number."""
    if not torch.is_tensor(i) or i.dim() == 0:
        return i
    return i.view(len(i), -1, 1, 1)


def like_heads(times):
    """times [m] or [B, m] -> [..., m, 1, 1, 1], to multiply noises with."""
    return times[..., None, None, None]


def to_pixels(x):
    """An image in [-1, 1], as the other scripts have it, in the paper's range [LOW, 1]."""
    return LOW + (1 - LOW) / 2 * (x + 1)


def from_pixels(x0):
    """The inverse of `to_pixels`."""
    return (x0 - LOW) * 2 / (1 - LOW) - 1


def x_delta(x0, gamma):
    """The image scale of x0 in [LOW, 1]: in [e^-γ, 1), near 1 where the image is dark."""
    return torch.exp(-gamma * x0)                                                      # Eq. 7


def alpha(x_delta, T):
    """α, what a pixel keeps of its power while i grows by 1."""
    return x_delta ** (1 / T)                                                          # Eq. 8


def alpha_bar(x_delta, i, T):
    """ᾱ_i = α^i, what a pixel keeps of its power. i: a number or [B], from 0 to T, whole or not."""
    return kept(rate_of(x_delta, T), i)                                                # Eq. 9


def rate_of(x_delta, T):
    """-ln α = γ x₀/T, which keeps its digits where α is near 1."""
    return -x_delta.log() / T


def kept(rate, i):
    """ᾱ_i, by the rate."""
    return torch.exp(rate * like_image(-i))


def added(rate, i):
    """1 - ᾱ_i, the variance of the noise. By expm1, because it may be as small as 2e-6."""
    return -torch.expm1(rate * like_image(-i))


def place(j, T, grid="uniform"):
    """Where step j lies: i = j²/T; or i = j (the paper), where step 1 buries detail."""
    power = GRIDS[grid]
    return j ** power / T ** (power - 1)


def snr(x0, t, gamma):
    """The signal to noise ratio at t in (0, 1]. (Eq. 10's e^{-γ t x₀/T} divides by T twice.)"""
    return x0 ** 2 / torch.expm1(gamma * t * x0)                                       # Eq. 11, 16


# ---------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, eps, i, gamma, T):
    """x_i from x0 in [LOW, 1] and eps = ε̃_i. i: a number or [B]."""
    rate = gamma / T * x0
    return kept(rate, i).sqrt() * x0 + added(rate, i).sqrt() * eps                     # Eq. 9


def trajectory_noise(x0, gamma, T, generator=None, times=None):
    """ε̃_1 ... ε̃_T of one trajectory: what heads learn (--predict eps). -> [B, T, C, H, W]

    x_j/√ᾱ_j is x₀ + √u_j ε̃_j with u_j = (1 - ᾱ_j)/ᾱ_j. √u_j ε̃_j, of variance u_j, is the sum of
    independent steps: corr(ε̃_i, ε̃_j) = √(u_i/u_j) for i < j. times: [m] or [B, m], rising.
    """
    if times is None:
        times = torch.arange(1, T + 1, device=x0.device)
    times = like_heads(times.to(x0.dtype).expand(len(x0), -1))
    before = torch.cat([0 * times[:, :1], times[:, :-1]], 1)
    rate = gamma / T * x0[:, None]
    grown = torch.exp(rate * before) * torch.expm1(rate * (times - before))   # u_j - u_before
    steps = grown.sqrt() * data.randn(grown, generator)
    u = torch.expm1(rate * times)
    return steps.cumsum(1) / u.sqrt()


def draw_trajectory(x0, i, times, gamma, T, generator=None):
    """(ε̃_i [B, C, H, W], ε̃ at `times` [B, m, C, H, W]) of one trajectory. i: [B]; times: [m]."""
    asked = torch.cat([times.expand(len(x0), -1), i[:, None]], 1)
    rising, order = asked.sort(1)
    noise = trajectory_noise(x0, gamma, T, generator, rising)
    rows = torch.arange(len(x0), device=x0.device)[:, None]
    noise = noise[rows, order.argsort(1)]                     # in the order that was asked for
    return noise[:, -1], noise[:, :-1]


def expected_noise(eps, i, times, rate):
    """E[ε̃_j | x_i, x₀] = √(u_j/u_i) ε̃_i for the j <= i of times [m]. -> [B, m, C, H, W]

    So one guess of x₀ fixes all T noises. eps: ε̃_i [B, C, H, W]; or, of each head, [B, m, ...].
    """
    eps = eps if eps.dim() == 5 else eps[:, None]
    i = torch.as_tensor(i, dtype=eps.dtype, device=eps.device)
    i = i.reshape(-1, 1, 1, 1, 1)
    j = like_heads(times.to(eps.dtype))
    rate = rate[:, None]
    u_j = torch.expm1(rate * torch.minimum(i, j))
    u_i = torch.expm1(rate * i)
    return (u_j / u_i).sqrt() * eps


def posterior(xi, x0, rate, i, s):
    """(mean, variance) of q(x_s | x_i, x₀) for any s < i. At s = 0 the mean is x0."""
    at_i = added(rate, i)
    at_s = added(rate, s)
    between = added(rate, i - s)
    of_x0 = kept(rate, s).sqrt() * between
    of_xi = kept(rate, i - s).sqrt() * at_s
    mean = (of_x0 * x0 + of_xi * xi) / at_i
    return mean, at_s * between / at_i                                                 # Eq. 4


# ----------------------------------------------------------------------------- 3 networks, and loss

class Encoder(nn.Module):
    """[B, c_in, S, S] -> (mean, log-variance), each [B, code]: halved down to 4x4, flattened."""

    def __init__(self, c_in, widths, emb, code):
        super().__init__()
        c = max(1, code // 32)
        self.first = unet.conv(c_in, widths[0])
        self.blocks = nn.ModuleList(unet.Block(w, w, emb, 0.0) for w in widths)
        steps = zip(widths, widths[1:])
        self.down = nn.ModuleList(unet.conv(a, b, stride=2) for a, b in steps)
        self.last = nn.Sequential(
            unet.norm(widths[-1]), nn.SiLU(), unet.conv(widths[-1], c), nn.Flatten(),
            nn.Linear(16 * c, 2 * code))

    def forward(self, x, emb):
        h = self.first(x)
        h = self.blocks[0](h, emb)
        for down, block in zip(self.down, self.blocks[1:]):
            h = block(down(h), emb)
        mean, log_variance = self.last(h).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 12)


class ScaleVAE(nn.Module):
    """G_θ: from x_i the image scale, or the image, by way of a code [B, code]; and the code's KL.

    The code is random numbers that say which image it is. The paper's code is made of x_i alone, so
    at T it knows nothing. A conditional VAE samples it from x_i and the truth in training; the KL
    draws a prior, which sees x_i alone, to that code's law, for sampling.
    """

    def __init__(self, channels, size, width, code, conditional):
        super().__init__()
        halvings = max(0, round(math.log2(size / 4)))
        if 4 * 2 ** halvings != size:
            raise ValueError(f"the VAE halves images to 4x4: their size is 4, 8, 16 ..., no {size}")
        widths = [width] + halvings * [2 * width]
        wide_first = widths[::-1]
        emb = 4 * width
        self.time = nn.Sequential(nn.Linear(128, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.prior = Encoder(channels, widths, emb, code)
        self.posterior = Encoder(2 * channels, widths, emb, code) if conditional else None
        self.first = nn.Linear(code, 16 * widths[-1])
        self.blocks = nn.ModuleList(unet.Block(w, w, emb, 0.0) for w in wide_first)
        steps = zip(wide_first, wide_first[1:])
        self.up = nn.ModuleList(unet.conv(a, b) for a, b in steps)
        self.last = nn.Sequential(unet.norm(width), nn.SiLU(), unet.conv(width, channels))

    def decode(self, code, emb):
        h = self.first(code).view(len(code), -1, 4, 4)
        h = self.blocks[0](h, emb)
        for up, block in zip(self.up, self.blocks[1:]):
            h = block(up(F.interpolate(h, scale_factor=2.0, mode="nearest")), emb)
        return self.last(h).float()

    def forward(self, xi, t, z, truth=None):
        """(raw output [B, C, S, S], KL [B]). z: [B, code] ~ N(0, I). truth: in training alone."""
        emb = self.time(unet.time_embedding(t, 128))
        mean, log_variance = self.prior(xi, emb)
        prior = mean, log_variance
        if self.posterior is None:
            prior = torch.zeros_like(mean), torch.zeros_like(mean)           # the paper's, N(0, I)
        elif truth is not None:
            mean, log_variance = self.posterior(torch.cat([xi, truth], 1), emb)
        spread = (mean - prior[0]) ** 2 + log_variance.exp()
        kl = prior[1] - log_variance + spread * torch.exp(-prior[1]) - 1
        code = mean + torch.exp(log_variance / 2) * z
        return self.decode(code, emb), kl.sum(1) / 2


class Heads(nn.Module):
    """T small networks side by side: features [B, c, H, W] -> [B, m, C, H, W] of `heads` [m]."""

    def __init__(self, c_in, channels, T):
        super().__init__()
        n = channels * T
        self.channels = channels
        self.first = unet.conv(c_in, n)
        self.skip = unet.conv(c_in, n, 1, zero=True)
        self.norm = nn.GroupNorm(T, n)
        self.second = nn.Conv2d(n, n, 3, padding=1, groups=T)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h, heads):
        m = len(heads)
        part = torch.arange(self.channels, device=h.device)
        first = (heads - 1) * self.channels
        rows = (first[:, None] + part).flatten()

        def only(layer):
            return layer.weight[rows], layer.bias[rows]

        z = F.conv2d(h, *only(self.first), padding=1)
        z = F.group_norm(z, m, *only(self.norm))
        z = F.conv2d(F.silu(z), *only(self.second), padding=1, groups=m)
        z = z + F.conv2d(h, *only(self.skip))
        return z.unflatten(1, (m, self.channels))


class ParallelUNet(nn.Module):
    """R_φ: the shared U-Net, with x̂_δ and its logarithm fused into every level, and the heads."""

    def __init__(self, a):
        super().__init__()
        self.gamma = a.gamma
        seen = 2 * a.channels
        trunk = {name: getattr(a, name) for name in (*unet.FLAGS, "size", "channels")}
        self.trunk = unet.UNet(outputs=(), condition=seen, **trunk)
        self.P = nn.Sequential(
            nn.Linear(128, 4 * a.width), nn.SiLU(), nn.Linear(4 * a.width, a.width))
        self.H = unet.Fusion(seen, a.width)
        self.norm = unet.norm(a.width)
        self.heads = Heads(a.width, a.channels, a.T)

    def forward(self, xi, scale, t, heads):
        """The raw outputs of `heads`, of which `read_heads` makes noises."""
        image = -scale.log() / self.gamma
        seen = torch.cat([2 * scale - 1, 2 * image - 1], 1)   # both in [-1, 1]
        h, = self.trunk.features(xi, t, seen)
        time = self.P(unet.time_embedding(t, 128))
        h = self.H(h, seen) + like_image(time)
        return self.heads(F.silu(self.norm(h)), heads).float()                         # Eq. 14


class PixelAware(nn.Module):
    """Both networks. Its arguments are those that `network` names."""

    def __init__(self, **arguments):
        super().__init__()
        a = self.of = types.SimpleNamespace(**arguments)
        self.vae = ScaleVAE(a.channels, a.size, a.width, a.code, a.vae == "conditional")
        self.parallel = ParallelUNet(a)

    def forward(self, xi, t, z, truth, heads):
        """(The VAE's raw output, its KL, x̂_δ, the heads' outputs). x̂_δ passes no gradient on."""
        raw, kl = self.vae(xi, t, z, truth)
        scale = read_scale(raw.detach(), self.of.scale, self.of.gamma)
        return raw, kl, scale, self.parallel(xi, scale, t, heads)


def read_scale(raw, scale, gamma):
    """x̂_δ from the VAE's output: the image scale ("delta"), or the image ("image")."""
    if scale == "image":
        return x_delta(raw.clamp(LOW, 1), gamma)
    return raw.clamp(math.exp(-gamma), math.exp(-gamma * LOW))


def guess(xi, rate, i, x0, spread):
    """(mean, std) of the image given x_i, by Bayes, from N(x0, spread²). Heads name the rest."""
    kept_i = kept(rate, i)
    added_i = added(rate, i)
    both = kept_i * spread ** 2 + added_i
    surprise = xi - kept_i.sqrt() * x0
    mean = x0 + kept_i.sqrt() * spread ** 2 / both * surprise
    return mean, spread * (added_i / both).sqrt()


def read_heads(raw, xi, rate, i, times, mean=None, std=None):
    """Z, 0 for steps beyond i. raw: the outputs [B, m, C, H, W] of the heads of `times` [m].

    They are noises; or, with `guess`'s (mean, std), (image - mean)/std, from which Z^j follows.
    """
    if mean is not None:
        x0 = mean[:, None] + std[:, None] * raw
        kept_i = kept(rate, i)[:, None]
        added_i = added(rate, i)[:, None]
        eps_i = (xi[:, None] - kept_i.sqrt() * x0) / added_i.sqrt()
        raw = expected_noise(eps_i, i, times, rate)
    active = times <= i[:, None] * (1 + 1e-5)                 # whatever the rounding of i
    return raw * like_heads(active)                                                    # Eq. 14


def head_weights(i, times, average="examples"):
    """[B, m]: to average over each example's active heads, or ("heads") each head's examples."""
    active = (times <= i[:, None]).float()
    if average == "examples":
        return active / active.sum(1, keepdim=True)
    count = active.sum(0)
    return active / count.clamp(min=1) * len(i) / (count > 0).sum()


def loss(model, x0, i, eps_i, eps, weights, z, heads, T, gamma, scale="image", predict="x0",
         kl=0.02):
    """The loss of each example, [B]: Eq. 15, the VAE's squared error, and kl times its KL a pixel.

    eps_i, eps: by `draw_trajectory`. With predict="x0" the heads share a target, so one would do.
    """
    xi = diffuse(x0, eps_i, i, gamma, T)
    truth = x_delta(x0, gamma) if scale == "delta" else x0
    raw, divergence, shown, outputs = model(xi, i / T, z, truth, heads)
    target = eps
    if predict == "x0":
        named = -shown.log() / gamma                          # the image that x̂_δ names
        mean, std = guess(xi, rate_of(shown, T), i, named, SPREAD[scale])
        target = ((x0 - mean) / std)[:, None]
    error = (outputs - target).square().flatten(2).mean(2)                             # Eq. 15
    of_heads = (weights * error).sum(1)
    of_vae = (raw - truth).square().flatten(1).mean(1)
    return of_heads + of_vae + kl * divergence / x0[0].numel()


# ---------------------------------------------------------------------------------------- 4 sampler

def reverse_walk(xi, n, x_delta, Z, T, mode="mean", generator=None, *, grid="uniform", noise=True):
    """From x_i to x̂₀ by the T noises that one pass has named. Yields (j, x̂_j, x̂₀) before step j,
    and (0, image, image) at last. n: how many steps are to go, also for each image, [B].

    mode "literal": Algorithm 1, with ᾱ under the root of line 9, where α is printed. Each Z^j was
    made for the forward path's x_j, and nothing brings x̂_j back to it: with the true ε̃_j it ends
    about √(2(e^{γ x₀} - 1)) away from the image (√(e^{γ x₀} - 1) without fresh noise). A squared
    error teaches Z^j = E[ε̃_j | x_i, x̂_δ]; by these, without noise, it ends at the image, if x̂_δ
    is right. mode "mean" is that (line 9 is `posterior`'s mean), with x̂₀ kept in [LOW, 1].
    """
    if mode not in ("mean", "literal"):
        raise ValueError(f"there is no mode {mode}")
    x = xi
    rate = rate_of(x_delta, T)
    first = int(torch.as_tensor(n).max())
    for j in range(first, 0, -1):
        here = place(j, T, grid)
        there = place(j - 1, T, grid)
        z = Z[:, j - 1]
        spread = added(rate, here).sqrt()
        x0 = (x - spread * z) / kept(rate, here).sqrt()
        x0 = x0.clamp(LOW, 1)
        yield j, x, x0
        y, variance = posterior(x, x0, rate, here, there)
        if mode == "literal":
            step = here - there
            y = x - added(rate, step) / spread * z
            y = y / kept(rate, step).sqrt()                                    # Eq. 4, line 9
            if noise:
                y = y + variance.sqrt() * data.randn(y, generator)                     # Eq. 6
        x = torch.where(like_image(n) >= j, y, x) if torch.is_tensor(n) else y
    yield 0, x, x


def reverse(*arguments, **options):
    """The image at the end of a `reverse_walk`, in [LOW, 1]."""
    for _, x, _ in reverse_walk(*arguments, **options):
        pass
    return x


def shares(rate, i):
    """(m, n, τ): x_i has m of the image and n of the noise; its flow time is τ = n/(m + n)."""
    m = kept(rate, i).sqrt()
    n = added(rate, i).sqrt()
    return m, n, n / (m + n)


def jump(xi, x0, i, s, rate, last=None):
    """From x_i to x_s, s < i, by x̂₀ and its rate. x̂₀ and the noise in x_i stay, as in DDIM; or by
    last = (i, x̂₀) of the pass before, x̂₀ follows a line in the pixel's flow time (docs/ddm.md).
    """
    m, n, tau = shares(rate, i)
    m_s, n_s, end = shares(rate, s)
    x = m_s * x0 + n_s / n * (xi - m * x0)
    if last:
        _, _, before = shares(rate, last[0])
        slope = (x0 - last[1]) / (tau - before)
        log = torch.xlogy(end, tau / end)
        gain = slope * (log - (tau - end))
        x = x + (m_s + n_s) * gain
    return x


@torch.no_grad()
def walk(G, R, x, passes=1, *, gamma, T, code=1, mode="mean", generator=None, grid="uniform"):
    """From x_T [B, C, H, W] to an image in [-1, 1], by `passes` calls of G(x_i, t, z), for x̂_δ,
    and R(x_i, x̂_δ, t), for Z. Yields (t, x, x̂₀) T times, and (0, image, image) at last.

    One pass in mode "literal" is Algorithm 1. Between two passes is a `jump`. z is N(0, I),
    [B, code], one for all passes. Raises ValueError.
    """
    stops = pass_stops(passes, T, grid)
    z = data.randn(x.new_zeros(len(x), code, dtype=torch.float32), generator)
    last = None
    for j, s in zip(stops, stops[1:]):
        i = place(j, T, grid)
        t = x.new_full((len(x),), i / T)
        scale = G(x, t, z)
        Z = R(x, scale, t)
        back = reverse_walk(x, j, scale, Z, T, mode, generator, grid=grid)
        for k, y, x0 in back:
            if k > s:
                yield place(k, T, grid) / T, from_pixels(y), from_pixels(x0)
        x0 = y.clamp(LOW, 1)
        x = jump(x, x0, i, place(s, T, grid), gamma / T * x0, last)
        last = i, x0
    x = from_pixels(x.clamp(LOW, 1))
    yield 0.0, x, x


def sample(G, R, x, passes=1, **options):
    """The image at the end of a `walk`."""
    for _, x, _ in walk(G, R, x, passes, **options):
        pass
    return x


def pass_stops(passes, T, grid):
    """The steps j = T (k/passes)², at least k, that passes begin at, and 0. Raises ValueError."""
    if not 1 <= passes <= T or grid not in GRIDS:
        raise ValueError(f"a {grid} trajectory of {T} steps has no {passes} passes")
    return [max(round(T * (k / passes) ** 2), k) for k in range(passes, -1, -1)]


# --------------------------------------------------------------------------------------- 5 training

def train(run):
    """Both networks together, from where the run's checkpoint stopped. Source: Sec. 3.3."""
    s = run.settings
    images = data.load(run)
    net, ema = run.networks(PixelAware, network(s, images.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=s.lr, fused=True)
    model = run.ready(net, training=True)

    for step, g in run.steps(net, ema, optimizer):            # resumes, logs, saves, ends on Ctrl-C
        x0 = to_pixels(data.batch(images, s.batch_size, g))
        j = torch.randint(1, s.T + 1, (len(x0),), generator=g, device=g.device)
        i = place(j.float(), s.T, s.grid)
        heads = draw_heads(min(s.heads_per_step, s.T), s.T, g)
        times = place(heads.float(), s.T, s.grid)
        learned = times if s.predict == "eps" else times[:0]          # by x0 no noise is learned
        eps_i, eps = draw_trajectory(x0, i, learned, s.gamma, s.T, g)
        z = torch.randn(len(x0), s.code, generator=g, device=g.device)
        weights = head_weights(i, times, s.average)
        x0, i, eps_i, eps, weights, z = run.share(x0, i, eps_i, eps, weights, z)

        losses = loss(model, x0, i, eps_i, eps, weights, z, heads, s.T, s.gamma, s.scale,
                      s.predict, s.kl)
        optimizer.zero_grad()
        losses.mean().backward()
        for part in (net.vae, net.parallel):                  # one must not slow the other down
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        data.average(ema, net, s.ema, step)
        run.record(losses, i / s.T)


def draw_heads(m, T, generator):
    """Head 1 and m - 1 others, rising, by odds of 1/√j. (Small i needs the low heads alone.)"""
    rest = torch.arange(2, T + 1, device=generator.device)
    if m < T:
        chosen = torch.multinomial(rest ** -0.5, m - 1, generator=generator)
        rest = rest[chosen.sort()[0]]
    return F.pad(rest, (1, 0), value=1)


# ----------------------------------------------------------------------------------- 6 command line

FLAGS = dict(
    T=(200, "steps of the trajectory, and heads of R", (1, 5000)),
    gamma=(20.0, "γ; a larger one fades darker pixels too, and costs (docs)", (1, 80)),
    grid=("quadratic", "the steps: dense near the image, or even as in the paper", tuple(GRIDS)),
    heads_per_step=(20, "heads trained a step, drawn at random; at most T", (2,)),
    average=("examples", "the heads' losses: by example, or by head", ("examples", "heads")),
    code=(512, "numbers in the VAE's code", None),
    vae=("conditional", "whose code in training sees the truth, or never",
         ("conditional", "denoising")),
    scale=("image", "what the VAE names: the image, or its scale x_δ", ("image", "delta")),
    predict=("x0", "what the heads name: the image, or the noises", ("x0", "eps")),
    kl=(0.02, "the weight of the VAE's KL", (0,)))
SAMPLING = dict(
    steps=(1, "passes, each a call of both networks", None),
    solver=("mean", "conditional means, or Algorithm 1 with line 9 mended", ("mean", "literal")))
PAPER = dict(grid="uniform", heads_per_step=500, average="heads", vae="denoising", scale="delta",
             predict="eps", kl=0.002, width=128, blocks=2, iterations=1_500_000)
PRESETS = {
    "shapes": dict(iterations=600),
    "celeba": dict(T=500, gamma=50.0),
    "paper cifar10": PAPER | dict(mult=(1, 2, 2, 2), batch_size=128, lr=1e-4),
    "paper celeba": PAPER | dict(T=500, gamma=50.0, image_size=128, mult=(1, 1, 2, 2, 4),
                                 batch_size=16, lr=2e-4)}


def network(s, channels):
    """PixelAware's arguments."""
    names = ("T", "gamma", "grid", "code", "vae", "scale", "predict")
    own = {name: getattr(s, name) for name in names}
    return dict(channels=channels, **own, **unet.sizes(s))


def trained(run):
    """(G, R) as `walk` calls them, with the averaged weights."""
    net = run.averaged(PixelAware)
    a = net.of
    vae = run.ready(net.vae)
    parallel = run.ready(net.parallel)
    heads = torch.arange(1, a.T + 1, device=run.device)

    def G(xi, t, z):
        raw, _ = vae(xi.float(), t.float(), z)
        return read_scale(raw.to(xi.dtype), a.scale, a.gamma)

    def R(xi, scale, t):
        i = a.T * t
        raw = parallel(xi.float(), scale.float(), t.float(), heads).to(xi.dtype)
        rate = rate_of(scale, a.T)
        times = place(heads.to(xi.dtype), a.T, a.grid)
        if a.predict == "eps":
            return read_heads(raw, xi, rate, i, times)
        mean, std = guess(xi, rate, i, -scale.log() / a.gamma, SPREAD[a.scale])
        return read_heads(raw, xi, rate, i, times, mean, std)

    return G, R


def sampler(run):
    """walk's options, as asked for or by default. Raises ValueError for what cannot be."""
    s = run.settings
    pass_stops(run.args.steps, s.T, s.grid)
    return dict(mode=run.args.solver, gamma=s.gamma, T=s.T, code=s.code, grid=s.grid)


def wide(x):
    """x in float64, where there is one: of a white pixel x_T has e^{-γ/2} alone."""
    return x if x.device.type == "mps" else x.double()


def write_samples(run):
    """Pictures or single PNGs, drawn with the averaged weights."""
    options = sampler(run)
    G, R = trained(run)

    def walked(x1, generators):
        return walk(G, R, wide(x1), run.args.steps, generator=generators, **options)

    data.draw(run, walked, 2 * run.args.steps, looks=options["T"], **options)


@data.command
def main(argv=None):
    """The command line. Exits with 2 for bad arguments, 1 for other problems, 130 for Ctrl-C."""
    run = data.open_run("pixel_aware", __doc__, FLAGS | unet.FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals(), torch.device("meta"):               # refuse first what cannot be
        PixelAware(**network(run.settings, 3))
        sampler(run)
    if run.args.train:
        train(run)
    if run.args.sample:
        write_samples(run)


if __name__ == "__main__":
    main()
