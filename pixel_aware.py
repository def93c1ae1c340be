"""Every pixel its own schedule, and the whole way back from noise in one pass of the network.

The paper (anonymous, under review, 2024) lets bright pixels fade faster than dark ones: of its power a pixel x₀ in
(0, 1] keeps e^{-γ x₀} to the end, so that all should reach noise together, in 200 steps and not in 1000. The way
back then needs x₀ to know its own schedule. So a first network, a variational autoencoder G_θ, guesses from the noisy
image the image scale x_δ = e^{-γ x₀}; and a second, R_φ, names from the noisy image and that guess the noises of all T
steps at once, by T small heads on one U-Net. No step back asks a network again.

    python pixel_aware.py --train                        both networks on the embedded shapes (minutes)
    python pixel_aware.py --train --dataset cifar10      on CIFAR-10, in runs/pixel_aware-cifar10/
    python pixel_aware.py --sample                       one pass, from the newest run; --steps 10: ten passes
    python pixel_aware.py --algorithm1                   what Algorithm 1 makes of noises that are known
    python pixel_aware.py --moments                      draw Figure 2; --strips, Figures 7 and 8A; --estimates, 3

Symbols, of the paper and of this code:

    x₀        x0              [B, C, H, W]     the image, in [low, 1], low = .004 (elsewhere here: in [-1, 1])
    x_i       xi, x           [B, C, H, W]     noisy, at step i
    x_δ, x̂_δ  x_delta, scale  [B, C, H, W]     the image scale e^{-γ x₀} and G_θ's estimate, in [e^-γ, e^{-γ low}]
    j, T      j, T            whole numbers    the trajectory's steps, 1 ... T
    i, t      i, t            numbers or [B]   where a step lies, i = place(j) in [0, T] (in the paper, i = j); t = i/T
    α, ᾱ_i    alpha(_bar)     [B, C, H, W]     x_δ^{1/T}, x_δ^{i/T}; variance: 1 - ᾱ_i
    ε̃_j       eps, noise      [B, m, C, H, W]  the noise in x_j, of one trajectory
    Z^j       Z               [B, T, C, H, W]  the heads' estimates of them; Z[:, j-1] is Z^j, 0 for j > i
    G, R      G, R            networks         x̂_δ = G_θ(x_i, i), Z = R_φ(x_i, x̂_δ, i)
    γ         gamma           a number         20 for CIFAR-10, 50 for CelebA

Equations used: x_δ, α and the marginal, Eq. 7 to 9, of the chain Eq. 2; SNR, Eq. 11 and 16, and its slope, Eq. 17; the
posterior, Eq. 4, and its draw, Eq. 6; the heads and their mask, Eq. 14; their loss, Eq. 15; the mean of x_t, Eq. 25.

Where this differs from the paper, and why (figures: README, "Results"):

- Algorithm 1 does not reconstruct, not even from the true noises (`reverse` says why). The default, --solver mean, goes
  by conditional means, without fresh noise, and clips every x̂₀; --solver literal is the algorithm as printed.
- What heads can learn of ε̃_j is E[ε̃_j | x_i, x̂_δ]. On the schedule of x̂_δ, as if that were the truth, it is one
  estimate of x₀, T times (`expected_noise`). By default they name it (--predict x0), so that an error does not grow
  e^{γ x₀/2}-fold; --predict eps is the paper's.
- An autoencoder of x_i alone can't generate: at i = T its code knows next to nothing of the image, and from N(0, I)
  nothing. The default's code is drawn, in training, from x_i and the truth, and a prior of x_i alone learns to follow
  it by the KL (a conditional VAE): one pass then draws what that prior draws. --vae denoising is the paper's.
- x_δ forgets everything bright: e^{-20 x₀} is 5e-5 at x₀ = .5, and no squared error sees the rest; but the schedule
  needs ln x̂_δ. By default the VAE names the image, and x̂_δ is e^{-γ x̂₀} (--scale image). --scale delta is the paper's,
  which calls the other one worse (Appendix F); measured, each is better at something. R_φ is shown x̂_δ and its
  logarithm.
- The first of T even steps adds noise of √(γ x₀/T), .22 at x₀ = .5 for the paper's γ/T = .1: nobody can give back the
  detail under it. By default the steps are dense near the image (`place`); --grid uniform is the paper's.
- x_T is N(0, I) for bright pixels only (`moments`). --start noise begins there, as the paper; --start forward at a
  training image's own x_T; --low .25 makes all pixels bright.
- --steps K uses the one model in K passes, each with a new x̂_δ, by a jump posterior. The paper has one pass.
- A head is one block of two convolutions, from `width` channels to C and from C to C, where the paper has two blocks
  with self-attention on 512 channels; the U-Net attends at 16x16, and the paper's everywhere. (T heads of 3 channels
  would each attend over HW pixels, T (HW)² numbers an image: .8 GB for CIFAR-10 and 537 GB for 128x128 in float32.)
  Some heads are trained a step (`draw_heads`), and every example's mean over its heads counts alike; --heads 0 and
  --average heads are the paper's.
- Both networks are trained jointly, R_φ on what G_θ says at the time, without a gradient into it: one loop, one
  checkpoint. What G_θ says is, with the conditional VAE, made of the posterior's code, which has seen the truth; in
  sampling, of the prior's. R_φ so learns to trust x̂_δ and to follow it, and in sampling trusts it too much. The KL's
  weight and the code's size are not in the paper.
- Errors in print stand next to the lines they change: Eq. 10 (`snr`), Eq. 17 (`snr_slope`), Propositions 1 and 2
  (`t_delta`, `moments`), line 9 of Algorithm 1 (`reverse`), the mask (`read_heads`).

Measured results: README.md, "Results".
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

import data
import unet

# ------------------------------------------------------------------------------------------------------ 1 schedule

LOW = 4e-3                                          # the least pixel value: 0 would never fade
GRIDS = {"uniform": 1, "quadratic": 2}              # p, of a trajectory whose step j lies at i = j^p / T^{p-1}


def like_image(i):
    """i: [B] -> [B, 1, 1, 1], to multiply images with. A number stays a number."""
    return i[:, None, None, None] if torch.is_tensor(i) and i.dim() == 1 else i


def to_pixels(x, low=LOW):
    """An image in [-1, 1], as this project keeps them, in the paper's range [low, 1]."""
    return low + (1 - low) / 2 * (x + 1)


def from_pixels(x0, low=LOW):
    """The inverse of `to_pixels`."""
    return (x0 - low) * 2 / (1 - low) - 1


def x_delta(x0, gamma):
    """The image scale of x0 in [low, 1]: in [e^-γ, 1), near 1 where the image is dark."""
    return torch.exp(-gamma * x0)                                                                       # Eq. 7


def alpha(x_delta, T):
    """α: the share of a pixel's power that a step keeps, at every step the same. In (0, 1) for any γ > 0 and T."""
    return torch.exp(x_delta.log() / T)                                                                 # Eq. 8


def place(j, T, grid="uniform"):
    """Where the trajectory's step j lies: i = j, as in the paper, or by GRIDS i = j²/T. j: a number or a tensor.

    With even steps the first alone adds noise of √(γ x₀/T), .22 at x₀ = .5 where γ/T is .1, and no way back can do
    better than to take that out at once. All functions here take any real i in [0, T].
    """
    return j ** GRIDS[grid] / T ** (GRIDS[grid] - 1)


def log_alpha_bar(x_delta, i, T):
    """-γ x₀ i/T. i: a number, or [B] of any type."""
    return like_image(i) * x_delta.log() / T


def alpha_bar(x_delta, i, T):
    """ᾱ_i = α^i. i: a number or [B], 0 ... T."""
    return torch.exp(log_alpha_bar(x_delta, i, T))                                                      # Eq. 9


def variance(x_delta, i, T):
    """1 - ᾱ_i, by expm1: at i = 1 a dark pixel's is γ x₀/T = 4e-4, and in bfloat16 1 - ᾱ would be 0."""
    return -torch.expm1(log_alpha_bar(x_delta, i, T))


def snr(x0, t, gamma):
    """The signal to noise ratio at t in (0, 1]. (Eq. 10 has e^{-γ t x₀/T}: with t = i/T that divides by T twice.) The
    next three are what else the paper claims of the process; only tests call them, as they do `alpha`.
    """
    return x0 ** 2 / torch.expm1(gamma * t * x0)                                                        # Eq. 11, 16


def snr_slope(x0, t, gamma):
    """d SNR/dt, γ x₀³ e^y/(e^y - 1)² with y = γ t x₀, negative. Eq. 17 lost the e^y of the numerator."""
    return -gamma * x0 ** 3 / (4 * torch.sinh(gamma * t * x0 / 2) ** 2)                                 # Eq. 17


def moments(x0, t, gamma):
    """(mean, standard deviation) of x_t given x0. At t = 1 dark pixels are not N(0, 1): std .277 for x0 = .004, γ = 20.

    Proposition 2 says that the mean falls faster than DDPM's x₀ e^{-a t²/4} (in print a t²/2) if γ x₀ > a t: not when
    it is already near 0 (γ x₀ = 20, a = 5: only until t = .28). It ends farther from 0 where γ x₀ < a/2.
    """
    return x0 * torch.exp(-gamma * x0 * t / 2), torch.sqrt(-torch.expm1(-gamma * t * x0))               # Eq. 25


def t_delta(dark, bright, gamma):
    """Proposition 1's t_δ: until then the brighter of two pixels loses SNR faster, and afterwards the darker.

    The proof says "a small interval"; how small depends on both, between y*/(γ bright) and y*/(γ dark), where
    y* = 2.5757 (y coth(y/2) = 3). dark < bright: float64 tensors. By bisection; may lie beyond the process's end at 1.
    """
    low, high = 1e-9 / (gamma * bright), 30 / (gamma * dark)
    for _ in range(100):
        t = (low + high) / 2
        faster = snr_slope(bright, t, gamma) < snr_slope(dark, t, gamma)                                # Eq. 12
        low, high = torch.where(faster, t, low), torch.where(faster, high, t)
    return low


def ddpm_alpha_bar(i, T):
    """The conventional schedule of Figures 2 and 8: β from 1e-4 to .02, whatever T. i: whole-number tensor, 0 ... T."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64, device=i.device)
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])[i]                                    # Eq. 3


# ------------------------------------------------------------------------------------------------------- 2 forward

def trajectory_noise(x0, gamma, T, generator=None, times=None):
    """ε̃_1 ... ε̃_T of one trajectory, [B, T, C, H, W] from x0 [B, C, H, W] in [low, 1]: what all the heads learn.

    They are no independent draws, for x_i's noise is in x_j for all j > i: √u_j ε̃_j is a Wiener process at the time
    u_j = (1 - ᾱ_j)/ᾱ_j, the sum of its increments, and corr(ε̃_i, ε̃_j) = √(u_i/u_j) for i <= j. times: only these, [m]
    or [B, m], rising, at the cost of m.
    """
    times = torch.arange(1, T + 1, device=x0.device) if times is None else times
    times = times.to(x0.dtype).expand(len(x0), -1)[..., None, None, None]
    before, rate = F.pad(times[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), gamma / T * x0[:, None]
    increments = torch.exp(rate * before) * torch.expm1(rate * (times - before))            # of u: no difference of
    steps = increments.sqrt() * data.randn(increments, generator)                           # two large numbers
    return steps.cumsum(1) / torch.expm1(rate * times).sqrt()


def draw_trajectory(x0, i, times, gamma, T, generator=None):
    """(ε̃_i [B, C, H, W], ε̃ at `times` [B, m, C, H, W]) of one trajectory. i: [B]; times: [m], rising."""
    times, order = torch.cat([times.expand(len(x0), -1), i[:, None]], 1).sort(1)
    noise = trajectory_noise(x0, gamma, T, generator, times)
    noise = noise.gather(1, order.argsort(1)[..., None, None, None].expand_as(noise))
    return noise[:, -1], noise[:, :-1]


def diffuse(x0, eps, i, gamma, T):
    """x_i. x0: [B, C, H, W] in [low, 1]; eps: ε̃_i; i: a number or [B]."""
    scale = x_delta(x0, gamma)
    return alpha_bar(scale, i, T).sqrt() * x0 + variance(scale, i, T).sqrt() * eps                      # Eq. 9


def expected_noise(eps, i, times, x_delta, T):
    """E[ε̃_j | x_i, x₀] = √(u_j/u_i) ε̃_i for the j <= i of times [m]: [B, m, C, H, W]. All that x_i can tell of ε̃_j, if
    x₀ is known: to one estimate of x₀ belong these T noises. eps: ε̃_i [B, C, H, W], or one a head.
    """
    rate, eps = -x_delta.log()[:, None] / T, eps if eps.dim() == 5 else eps[:, None]
    i = torch.as_tensor(i, dtype=eps.dtype, device=eps.device).reshape(-1, 1, 1, 1, 1)
    j = times.to(eps.dtype)[:, None, None, None]
    return (torch.expm1(rate * torch.minimum(i, j)) / torch.expm1(rate * i)).sqrt() * eps


def posterior(xi, x0, x_delta, i, s, T):
    """(mean, variance) of q(x_s | x_i, x₀) for any s < i: Eq. 4 with x₀ in ε̃'s place. At s = 0 the mean is x0."""
    i, s = like_image(i), like_image(s)
    kept, added, left = alpha_bar(x_delta, i - s, T), variance(x_delta, i - s, T), variance(x_delta, s, T)
    mean = alpha_bar(x_delta, s, T).sqrt() * added * x0 + kept.sqrt() * left * xi
    return mean / variance(x_delta, i, T), left * added / variance(x_delta, i, T)                       # Eq. 4


# ---------------------------------------------------------------------------------------------- 3 networks and loss

class Encoder(nn.Module):
    """[B, c_in, S, S] -> (mean, log-variance), each [B, latent]: halved down to 4x4, flattened, made larger."""

    def __init__(self, c_in, widths, emb, latent):
        super().__init__()
        c = max(1, latent // 32)                            # 16 c = latent/2 numbers are projected to more
        self.first = unet.conv(c_in, widths[0])
        self.blocks = nn.ModuleList(unet.Block(w, w, emb, 0.0) for w in widths)
        self.down = nn.ModuleList(unet.conv(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.last = nn.Sequential(unet.norm(widths[-1]), nn.SiLU(), unet.conv(widths[-1], c), nn.Flatten(),
                                  nn.Linear(16 * c, 2 * latent))

    def forward(self, x, emb):
        h = self.blocks[0](self.first(x), emb)
        for down, block in zip(self.down, self.blocks[1:]):
            h = block(down(h), emb)
        mean, log_variance = self.last(h).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 12)


class ScaleVAE(nn.Module):
    """G_θ(x_i, i): what it is trained for, the image scale or the image, by way of a latent code; and the KL, [B].

    conditional: a code is drawn from what x_i alone tells (the prior); while training, from what x_i and the truth tell
    (the posterior), and the KL between the two teaches the prior. Otherwise a denoising autoencoder: one code, of
    x_i alone, and the KL to N(0, I).
    """

    def __init__(self, channels, size, width, latent, conditional):
        super().__init__()
        halvings = max(0, round(math.log2(size / 4)))
        if 4 * 2 ** halvings != size:
            raise ValueError(f"the scale VAE halves images down to 4x4: their size must be 4, 8, 16 ..., not {size}")
        widths, emb = [width * min(2 ** k, 2) for k in range(halvings + 1)], 4 * width
        self.time = nn.Sequential(nn.Linear(128, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.prior = Encoder(channels, widths, emb, latent)
        self.posterior = Encoder(2 * channels, widths, emb, latent) if conditional else None
        self.first = nn.Linear(latent, 16 * widths[-1])
        self.blocks = nn.ModuleList(unet.Block(w, w, emb, 0.0) for w in reversed(widths))
        self.up = nn.ModuleList(unet.conv(b, a) for a, b in reversed([*zip(widths, widths[1:])]))
        self.last = nn.Sequential(unet.norm(width), nn.SiLU(), unet.conv(width, channels))

    def decode(self, code, emb):
        h = self.blocks[0](self.first(code).view(len(code), -1, 4, 4), emb)
        for up, block in zip(self.up, self.blocks[1:]):
            h = block(up(F.interpolate(h, scale_factor=2.0, mode="nearest")), emb)
        return self.last(h).float()

    def forward(self, xi, t, z, truth=None):
        """(raw output, KL [B] of the code's law from the prior). z: [B, latent] ~ N(0, I); truth: in training alone."""
        emb = self.time(unet.time_embedding(t, 128))
        mean, log_variance = prior = self.prior(xi, emb)
        if self.posterior is None:
            prior = torch.zeros_like(mean), torch.zeros_like(mean)
        elif truth is not None:
            mean, log_variance = self.posterior(torch.cat([xi, truth], 1), emb)
        off = (mean - prior[0]) ** 2 + log_variance.exp()
        kl = (prior[1] - log_variance + off * torch.exp(-prior[1]) - 1).sum(1) / 2
        return self.decode(mean + torch.exp(log_variance / 2) * z, emb), kl


class Heads(nn.Module):
    """T small networks G_j side by side, features [B, c, H, W] -> [B, m, C, H, W]: convolution, norm, SiLU, convolution
    and a 1x1 skip. Grouped layers are T separate heads in one call. heads: [m] of 1 ... T, the heads that are used.
    """

    def __init__(self, c_in, channels, T):
        super().__init__()
        self.channels, self.T, n = channels, T, channels * T
        self.first, self.skip, self.norm = unet.conv(c_in, n), unet.conv(c_in, n, 1, zero=True), nn.GroupNorm(T, n)
        self.second = nn.Conv2d(n, n, 3, padding=1, groups=T)
        nn.init.zeros_(self.second.weight), nn.init.zeros_(self.second.bias)

    def forward(self, h, heads):
        m = len(heads)
        rows = ((heads - 1)[:, None] * self.channels + torch.arange(self.channels, device=h.device)).flatten()
        first, norm, second, skip = (
            (layer.weight[rows], layer.bias[rows]) for layer in (self.first, self.norm, self.second, self.skip))
        z = F.silu(F.group_norm(F.conv2d(h, *first, padding=1), m, *norm))
        z = F.conv2d(z, *second, padding=1, groups=m) + F.conv2d(h, *skip)
        return z.unflatten(1, (m, self.channels))


class ParallelUNet(nn.Module):
    """R_φ(x_i, x̂_δ, i): the shared U-Net, with x̂_δ and its logarithm fused into every level, and the heads. Returns the
    outputs of `heads` [m], [B, m, C, H, W], before `read_heads` makes noises of them.
    """

    def __init__(self, channels, size, width, mult, blocks, attention, dropout, T, gamma):
        super().__init__()
        self.gamma, seen = gamma, 2 * channels
        self.trunk = unet.UNet(channels, (), width, mult, blocks, attention, dropout, size, condition=seen)
        self.P = nn.Sequential(nn.Linear(128, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.H, self.norm, self.heads = unet.Fusion(seen, width), unet.norm(width), Heads(width, channels, T)

    def forward(self, xi, scale, t, heads):
        seen = torch.cat([2 * scale - 1, -2 * scale.log() / self.gamma - 1], 1)                 # both in [-1, 1]
        h = self.trunk.features(xi, t, seen)[0]
        h = self.H(h, seen) + self.P(unet.time_embedding(t, 128))[:, :, None, None]
        return self.heads(F.silu(self.norm(h)), heads).float()                                          # Eq. 14


class PixelAware(nn.Module):
    """Both networks. scale, predict: what the VAE and the heads are asked for; only `read_scale` and `read_heads` know
    what that makes of their outputs.
    """

    def __init__(self, channels, size, width, mult, blocks, attention, dropout, T, gamma, low, grid, latent, vae, scale,
                 predict):
        super().__init__()
        self.gamma, self.low, self.T, self.grid, self.scale, self.predict = gamma, low, T, grid, scale, predict
        self.vae = ScaleVAE(channels, size, width, latent, vae == "conditional")
        self.parallel = ParallelUNet(channels, size, width, mult, blocks, attention, dropout, T, gamma)

    def forward(self, xi, t, z, truth, heads):
        """(the VAE's raw output, its KL, x̂_δ, the heads' raw outputs [B, m, C, H, W]). For training: x̂_δ is made with
        the posterior's code, so that R_φ learns to trust it, and passes no gradient on.
        """
        raw, kl = self.vae(xi, t, z, truth)
        scale = read_scale(raw.detach(), self.scale, self.gamma, self.low)
        return raw, kl, scale, self.parallel(xi, scale, t, heads)


class Noises:
    """R_φ's Z: Z[:, j-1] is Z^j, made of the heads' raw outputs [B, T, C, H, W] when it is asked for. (All T of them at
    once, in float64, would be 6 GB for 128 images of 64x64 and T = 500.)
    """

    def __init__(self, net, raw, xi, scale, t):
        j = (net.T * t ** (1 / GRIDS[net.grid])).round().to(xi.dtype)
        self.net, self.raw, self.seen = net, raw, (xi, scale, place(j, net.T, net.grid))

    def __getitem__(self, index):
        (xi, scale, i), net, j = self.seen, self.net, index[1] + 1
        raw, time = self.raw[:, j - 1:j].to(xi.dtype), xi.new_full((1,), place(j, net.T, net.grid))
        return read_heads(raw, xi, scale, i, time, net.T, net.gamma, net.predict, SPREAD[net.scale])[:, 0]


def read_scale(raw, scale, gamma, low=LOW):
    """x̂_δ from the VAE's output, which is the image scale ("delta") or the image ("image"). Within x_δ's own range:
    at 1 its schedule would be 0/0, and at 0 not a number.
    """
    if scale == "image":
        return x_delta(raw.clamp(low, 1), gamma)
    return raw.clamp(math.exp(-gamma), math.exp(-gamma * low))


SPREAD = {"image": 0.1, "delta": 0.3}       # about the root mean square error of x̂_δ's image, in training


def guess(xi, scale, i, T, gamma, spread=SPREAD["image"]):
    """(mean, standard deviation) of x₀, if it is N(x̂₀, spread²) with x̂₀ the image of x̂_δ, and x_i is seen."""
    x0, kept, added = -scale.log() / gamma, alpha_bar(scale, i, T), variance(scale, i, T)
    both = kept * spread ** 2 + added
    return x0 + kept.sqrt() * spread ** 2 / both * (xi - kept.sqrt() * x0), spread * (added / both).sqrt()


def read_heads(raw, xi, scale, i, times, T, gamma, predict, spread=SPREAD["image"]):
    """Z from the outputs of the heads of `times` [m]. raw: [B, m, C, H, W]; scale: x̂_δ; i: [B]. M_j
    masks those > i: Z^i itself is needed for the first step back (the mask is illegible in print).

    predict: "eps", the noises themselves, as in the paper; or "x0": what to add to `guess`, in its standard deviations,
    to get the image; Z^j is then the noise that goes with that image.
    """
    if predict == "x0":
        mean, std = guess(xi, scale, i, T, gamma, spread)
        x0 = mean[:, None] + std[:, None] * raw
        kept, added = alpha_bar(scale, i, T)[:, None], variance(scale, i, T)[:, None]
        raw = expected_noise((xi[:, None] - kept.sqrt() * x0) / added.sqrt(), i, times, scale, T)
    return raw * (times <= i[:, None])[..., None, None, None]                                           # Eq. 14


def head_weights(i, times, average="examples"):
    """[B, m], by which a mean over the batch of the weighted sums over heads is a mean over the active ones, j <= i.
    i: [B], of the whole batch; times: [m], of the heads.

    average: "examples", every example's mean over its active heads; or "heads", every head's mean over the examples in
    which it is active. (A mean over all would leave head T, active in one of T, 1/T of the first head's share. But by
    heads an example of small i, which has few heads, hardly counts, and detail is not learned.)
    """
    active = (times <= i[:, None]).float()
    if average == "examples":
        return active / active.sum(1, keepdim=True).clamp(min=1)
    count = active.sum(0)
    return active / count.clamp(min=1) * len(i) / (count > 0).sum().clamp(min=1)


def loss(model, x0, i, eps_i, eps, weights, z, heads, T, gamma, scale="image", predict="x0", kl=0.02):
    """The loss per example, [B], of both networks. x0: [B, C, H, W] in [low, 1]; eps_i, eps: `draw_trajectory`'s, of
    which predict="x0" needs the first alone; weights: [B, m]; z: [B, latent]; heads: [m]. For "x0" all heads have one
    target, the image's distance from `guess` in its standard deviations. The VAE's loss: its squared error, and kl
    times the KL over the number of pixels.
    """
    xi = diffuse(x0, eps_i, i, gamma, T)
    truth = x_delta(x0, gamma) if scale == "delta" else x0
    raw, divergence, shown, out = model(xi, i / T, z, truth, heads)
    mean, std = guess(xi, shown, i, T, gamma, SPREAD[scale])
    target = eps if predict == "eps" else ((x0 - mean) / std)[:, None]
    error = (out - target).square().flatten(2).mean(2)                                                  # Eq. 15
    return ((weights * error).sum(1) + (raw - truth).square().flatten(1).mean(1)
            + kl * divergence / x0[0].numel())


# ------------------------------------------------------------------------------------------------------- 4 sampler

def reverse(xi, i, x_delta, Z, T, mode="mean", generator=None, *, low=LOW, grid="uniform", noise=True, watch=None):
    """From x_i to x̂₀ by the T noises that one pass has named. xi: [B, C, H, W]; i: the number of the step, or [B];
    x_delta: x̂_δ; Z: [B, T, C, H, W], Z[:, j-1] is Z^j. watch(j, x̂_j, x̂₀ as Z^j has it): called before every step.

    mode "literal": Algorithm 1 (whose line 9 prints α for ᾱ under the root). Each Z^j was made for the x_j of the
    forward path, not for x̂_j, and nothing brings x̂_j back: with the true ε̃_j it does not reconstruct, but ends
    √(2(e^{γ x₀} - 1)) away (noise=False: without its fresh noise, √(e^{γ x₀} - 1)). With Z^j = E[ε̃_j | x_i, x₀], what
    a squared error teaches if x̂_δ is exact, and without noise, it does. mode "mean": so no noise, and the same step by
    way of x̂₀, kept in [low, 1].
    """
    if mode not in ("mean", "literal"):
        raise ValueError(f"there is no mode {mode}")
    x, first = xi, int(torch.as_tensor(i).max())
    for j in range(first, 0, -1):
        z, here, there = Z[:, j - 1], place(j, T, grid), place(j - 1, T, grid)
        left = variance(x_delta, here, T).sqrt()
        x0 = ((x - left * z) / alpha_bar(x_delta, here, T).sqrt()).clamp(low, 1)
        if watch:
            watch(j, x, x0)
        y, beta = posterior(x, x0, x_delta, here, there, T)
        if mode == "literal":
            kept, added = alpha_bar(x_delta, here - there, T), variance(x_delta, here - there, T)
            y = (x - added / left * z) / kept.sqrt()                                                    # Eq. 4
            if noise:
                y = y + beta.sqrt() * data.randn(y, generator)                  # Eq. 6; of the last step 0: β̃₁ = 0
        x = torch.where(like_image(i) >= j, y, x) if torch.is_tensor(i) else y
    return x


@torch.no_grad()
def sample(G, R, x, passes=1, *, gamma, T, mode="mean", generator=None, low=LOW, grid="uniform", noise=True,
           watch=None):
    """From x_T [B, C, H, W] to images in [-1, 1]: `passes` calls of G(x_i, t, generator) -> x̂_δ and as many of
    R(x_i, x̂_δ, t) -> Z, at as many evenly spaced steps j.

    One pass, mode "literal", is Algorithm 1. Each of several goes all the way to its x̂₀ and jumps from there to the
    next one's x_s, by q(x_s | x_i, x̂₀), with the schedule that x̂₀ itself implies. watch(t, x, x̂₀): called T times, before
    every step down to x_s, and at last with t = 0 and the image. Raises ValueError.
    """
    if not 1 <= passes <= T or grid not in GRIDS:
        raise ValueError(f"a {grid} trajectory of {T} steps has no {passes} passes")
    stops = [round(T * (1 - k / passes)) for k in range(passes + 1)]
    for j, s in zip(stops, stops[1:]):
        def look(k, x, x0):
            if watch and k > s:
                watch(place(k, T, grid) / T, from_pixels(x, low), from_pixels(x0, low))

        i, t = place(j, T, grid), x.new_full((len(x),), place(j, T, grid) / T)
        scale = G(x, t, generator)
        x0 = reverse(x, j, scale, R(x, scale, t), T, mode, generator, low=low, grid=grid, noise=noise, watch=look)
        if s == 0:
            x = from_pixels(x0, low)
        else:
            x0 = x0.clamp(low, 1)
            mean, spread = posterior(x, x0, x_delta(x0, gamma), i, place(s, T, grid), T)
            x = mean + spread.sqrt() * data.randn(x, generator)
    if watch:
        watch(0.0, x, x)
    return x


# ------------------------------------------------------------------------------------------------------ 5 training

def train(run, settings, checkpoint, args, processes):
    """Train both networks, or go on, in the run directory until step settings["iterations"]. Source: Sec. 3.3."""
    if data.finished(run, settings, checkpoint, processes):
        return
    training = data.Training(run, settings, checkpoint, args, processes, network_of, create, torch.optim.Adam)
    (net, ema, optimizer), images, mine = training.parts.values(), training.images, training.mine
    device, batch, iterations = processes.device, settings["batch_size"], settings["iterations"]
    T, gamma, m = settings["T"], settings["gamma"], min(settings["heads"] or settings["T"], settings["T"])
    alone = predictor(costly(net, m), args, processes)
    unet.warn_cost(alone, images.shape[1:], batch, iterations - training.start, processes)
    model = predictor(unet.parallel(net, device, processes.world, args.compile), args, processes)
    method = {key: settings[key] for key in ("T", "gamma", "scale", "predict", "kl")}

    with training:
        for step, draw in training:
            x0 = to_pixels(data.draw_batch(images, batch, draw), settings["low"])
            i = place(torch.randint(1, T + 1, (batch,), generator=draw, device=device).float(), T, settings["grid"])
            heads = draw_heads(m, T, draw)
            times = place(heads.float(), T, settings["grid"])
            eps_i, eps = draw_trajectory(x0, i, times if settings["predict"] == "eps" else times[:0], gamma, T, draw)
            z = torch.randn(batch, settings["latent"], generator=draw, device=device)
            weights = head_weights(i, times, settings["average"])

            values = loss(model, *(each[mine] for each in (x0, i, eps_i, eps, weights, z)), heads, **method)
            optimizer.zero_grad(set_to_none=True)
            values.mean().backward()
            grad_norm = sum(torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0) for part in (net.vae, net.parallel))
            optimizer.step()

            decay = min(settings["ema"], (1 + step) / (10 + step))      # short at first: young weights are no use
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            training.record(values, i[mine] / T, grad_norm, settings["lr"])


def draw_heads(m, T, generator):
    """m > 1 of the heads 1 ... T, rising: the first, which every example has, and others with odds 1/√j: the low ones
    more often, for only they are active when i is small.
    """
    rest = torch.arange(2, T + 1, device=generator.device)
    if m < T:
        rest = rest[torch.multinomial(rest ** -0.5, m - 1, generator=generator).sort()[0]]
    return F.pad(rest, (1, 0), value=1)


def costly(net, m):
    """What a training step computes, of (x, t), for `unet.warn_cost`."""
    def call(x, t):
        heads = torch.arange(1, m + 1, device=x.device)
        return net(x, t, x.new_zeros(len(x), net.vae.first.in_features), x, heads)
    return call


def predictor(net, args, processes):
    """net, or one of its methods, in the precision asked for."""
    bf16 = unet.use_bf16(args.precision, processes.device)

    def model(x, *inputs):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return net(x, *inputs)

    return model


def create(network, device, seed=0):
    """(PixelAware(**network), a copy for the average of its weights), as `unet.create`."""
    return unet.create(network, device, seed, PixelAware)


def network_of(settings, channels):
    """PixelAware's arguments."""
    return {"channels": channels, "size": settings["image_size"], **{key: settings[key] for key in NETWORK}}


def trained_models(run, settings, checkpoint, args, processes, n):
    """(G, R, x): the networks of a run's EMA weights as `sample` calls them, made fast, and zeros, as many of n images
    as go in a call.
    """
    network = network_of(settings, checkpoint["network"].get("channels", 3))
    net = create(network, processes.device)[1]
    data.restore(run, checkpoint, ema=net)
    x = unet.batch_like(n, network, processes.device)
    x = x[:max(1, 100 * len(x) // max(100, net.T))]                             # T heads' outputs are many
    heads, t = torch.arange(1, net.T + 1, device=x.device), x.new_ones(len(x))
    z = x.new_zeros(len(x), settings["latent"])

    def fast(call, *inputs):
        call = unet.parallel(call, processes.device, compile=args.compile)
        return unet.fast(predictor(call, args, processes), *inputs)

    vae = fast(lambda *inputs: net.vae(*inputs)[:1], x, t, z)
    raw = fast(lambda *inputs: (net.parallel(*inputs, heads),), x, torch.full_like(x, math.exp(-net.gamma / 2)), t)

    def G(xi, t, generator):
        out = vae(xi.float(), t.float(), data.randn(z[:1].expand(len(xi), -1), generator))[0]
        return read_scale(out.to(xi.dtype), net.scale, net.gamma, net.low)

    def R(xi, scale, t):
        return Noises(net, raw(xi.float(), scale.float(), t.float())[0], xi, scale, t)

    return G, R, x


def solver_of(settings, args):
    """(passes, the other arguments of `sample`), as asked for or by default. Raises ValueError for what can't be."""
    passes, mode = args.steps or 1, args.solver or "mean"
    if args.noise is not None and mode == "mean":
        raise ValueError("--noise and --no-noise are for --solver literal: mean draws none")
    if settings["gamma"] * settings["low"] < 1e-4:
        raise ValueError("--gamma times --low must be at least 1e-4: black would not fade at all")
    if settings["heads"] == 1 < settings["T"]:
        raise ValueError("--heads 1 would train the first head alone: 0 is all of them")
    if passes > settings["T"]:
        raise ValueError(f"a trajectory of {settings['T']} steps has no {passes} passes")
    return passes, {"mode": mode, "noise": args.noise is not False,
                    **{key: settings[key] for key in ("gamma", "T", "low", "grid")}}


def training_images(images, generators, low, device):
    """A training image for each generator, [B, C, H, W] in [low, 1]."""
    index = torch.stack([torch.randint(len(images), (), generator=g) for g in generators])
    return to_pixels(wide(data.to_float(images[index.to(images.device)]).to(device)), low)


def wide(x):
    """x in float64, where the device has it: x̂_j's last digits are √ᾱ_j times an image, e^{-γ/2} of a bright one."""
    return x if x.device.type == "mps" else x.double()


def write_samples(run, settings, checkpoint, args, processes):
    """Sample with the EMA weights: two pictures into the run directory, or single PNGs into --out."""
    passes, options = solver_of(settings, args)
    G, R, x = trained_models(run, settings, checkpoint, args, processes, args.n)
    start = args.start or "noise"
    images = load(settings, processes) if start == "forward" else None

    def draw(x1, generators, watch):
        x1 = wide(x1)
        if start == "forward":
            x0 = training_images(images, generators, settings["low"], x1.device)
            x1 = diffuse(x0, x1, settings["T"], settings["gamma"], settings["T"])
        return sample(G, R, x1, passes, generator=generators, watch=watch, **options)

    shown = {"passes": passes, "start": start, **options, "noise": options["mode"] == "literal" and options["noise"]}
    data.draw_samples(draw, x, run, checkpoint, args, 2 * passes, shown, processes, looks=options["T"])


def ssim(a, b):
    """The mean structural similarity of Wang et al. (2004), [B]: a Gaussian window, 11 wide (if that fits), σ = 1.5."""
    k = min(5, (min(a.shape[-2:]) - 1) // 2)
    window = torch.exp(-torch.arange(-k, k + 1, dtype=a.dtype, device=a.device) ** 2 / 4.5)
    window = (window.outer(window) / window.sum() ** 2).expand(a.shape[1], 1, -1, -1)
    A, B, AA, BB, AB = (F.conv2d(x, window, groups=a.shape[1]) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * A * B + c1) / (A * A + B * B + c1)
    structure = (2 * (AB - A * B) + c2) / (AA - A * A + BB - B * B + c2)
    return (luminance * structure).mean((1, 2, 3))


def load(settings, processes):
    """The training images of a run, [N, C, S, S] in uint8."""
    return data.load(settings["dataset"], settings["data_dir"], settings["image_size"], processes)


def shown_images(settings, args, processes, n):
    """(n training images [n, C, H, W] in [low, 1], a generator for each): functions of the seed."""
    generators = data.image_generators(settings["seed"] if args.seed is None else args.seed, range(n))
    return training_images(load(settings, processes), generators, settings["low"], processes.device), generators


def both_ways(x0, settings, generators):
    """The forward paths of x0, of this process and of DDPM's, as lists of T + 1 images."""
    T, gamma, ours, theirs = settings["T"], settings["gamma"], [x0], [x0]
    noise, kept = trajectory_noise(x0, gamma, T, generators), ddpm_alpha_bar(torch.arange(T + 1), T)
    for i in range(1, T + 1):
        ours.append(diffuse(x0, noise[:, i - 1], i, gamma, T))
        a = (kept[i] / kept[i - 1]).item()
        theirs.append(math.sqrt(a) * theirs[-1] + math.sqrt(1 - a) * data.randn(x0, generators))        # Eq. 1, 2
    return ours, theirs


def write_forward(run, settings, checkpoint, args, processes):
    """One image on its way to noise, and the signal to noise ratio of three pixel values."""
    def way(x0, eps, t, ts):
        x, gamma, T = to_pixels(x0, settings["low"]), settings["gamma"], settings["T"]
        names = {"white": 1.0, "half of it": 0.5, "a twentieth": 0.05}
        return from_pixels(diffuse(x, eps, T * t, gamma, T), settings["low"]), {
            f"pixel_aware, {name}": snr(torch.full_like(ts, value), ts, gamma) for name, value in names.items()}
    data.forward_figure("pixel_aware", way, settings, processes)


def write_solvers(run, settings, checkpoint, args, processes):
    """Both solvers, from the same noises. A pass is a call of each of two networks."""
    G, R, x = trained_models(run, settings, checkpoint, args, processes, 3 * math.ceil(settings["T"] / 100))
    options = solver_of(settings, args)[1]

    def draw(mode, passes, x1, generators):
        return sample(G, R, wide(x1), passes, generator=generators, **{**options, "mode": mode, "noise": True})
    data.solver_figure(draw, {"mean": 2, "literal": 2}, x, run, settings, args)


def write_moments(run, settings, checkpoint, args, processes):
    """Figure 2: mean and variance of one image's first channel against i, and DDPM's: pixel_aware-moments.csv, .png."""
    x0, generators = shown_images(settings, args, processes, 1)
    paths = dict(zip(("pixel-aware", "DDPM"), both_ways(x0, settings, generators)))
    panels = {name: {path: [f(x[0, 0]).item() for x in images] for path, images in paths.items()}
              for name, f in (("mean", torch.mean), ("variance", torch.var))}
    data.curves("pixel_aware-moments", ("i", [*range(settings["T"] + 1)]), panels)


def write_algorithm1(run, settings, checkpoint, args, processes, side=40):
    """What Algorithm 1 makes of noises that are known: its error against γ x₀, and the closed form's, with the true ε̃_j
    and with E[ε̃_j | x_T, x₀], on flat images; and four training images: pixel_aware-algorithm1.csv, .png, -images.png.
    """
    T, gamma = settings["T"], settings["gamma"]

    def tries(x0, generators):
        noise, scale = trajectory_noise(x0, gamma, T, generators), x_delta(x0, gamma)
        xT = diffuse(x0, noise[:, -1], T, gamma, T)
        known = expected_noise(noise[:, -1], T, torch.arange(1, T + 1, device=x0.device), scale, T)
        again = functools.partial(reverse, xT, T, scale, T=T, generator=generators, low=settings["low"])
        return xT, {"Algorithm 1, true noises": again(Z=noise, mode="literal"),
                    "without fresh noise": again(Z=noise, mode="literal", noise=False),
                    "conditional means": again(Z=known, mode="mean")}

    values = torch.linspace(settings["low"], 1, 21, dtype=torch.float64)
    flat = values[:, None, None, None].expand(-1, 1, side, side)
    errors = {name: (x - flat).square().mean((1, 2, 3)).sqrt().tolist()
              for name, x in tries(flat, data.image_generators(settings["seed"], range(len(values))))[1].items()}
    errors["√(2(e^γx₀ - 1))"] = (2 * torch.expm1(gamma * values)).sqrt().tolist()
    title = "root mean square error of x̂₀"
    x0, generators, rows = *shown_images(settings, args, processes, 4), []
    for one, generator in zip(x0.split(1), generators):
        xT, images = tries(one, [generator])
        rows += [one, xT, *images.values()]
    labels = ("x_0", "x_T", "literal", "no noise", "means")
    picture = data.picture(data.to_uint8(from_pixels(torch.cat(rows), settings["low"])), 5, labels)
    data.save_png(picture, "pixel_aware-algorithm1-images.png")
    print("wrote pixel_aware-algorithm1-images.png")
    data.curves("pixel_aware-algorithm1", ("γ x₀", (gamma * values).tolist()), {title: errors}, log=(title,))


def write_strips(run, settings, checkpoint, args, processes):
    """Figures 7 and 8A: strips.png. For each of up to three training images: forward, DDPM's forward, and the way back
    from x_T, above x̂₀ on the way.
    """
    passes, options = solver_of(settings, args)
    G, R, x = trained_models(run, settings, checkpoint, args, processes, 3)
    x0, generators = shown_images(settings, args, processes, len(x))
    T, grid, back = settings["T"], settings["grid"], []
    (ours, theirs), shown = both_ways(x0, settings, generators), [round(T * k / 10) for k in range(11)]
    sample(G, R, ours[-1], passes, generator=generators, watch=lambda *frame: back.append(frame[1:]), **options)
    back = back[::-1]                                                   # T + 1 frames, from the image to x_T
    places = [round(place(j, T, grid)) for j in shown]
    rows = [[from_pixels(path[i], settings["low"]) for i in places] for path in (ours, theirs)]
    rows += [[back[j][k] for j in shown] for k in (0, 1)]
    images = torch.stack([frame[b] for b in range(len(x)) for row in rows for frame in row])
    data.save_png(data.picture(data.to_uint8(images), 11, [f"i={i}" for i in places]), run / "strips.png")
    print(f"wrote {run}/strips.png: for each image x_i forward, DDPM's, and x_i and x̂₀ on the way back")


def write_estimates(run, settings, checkpoint, args, processes):
    """Figure 3: what one pass makes of --n training images, forwarded to i: estimates.png, and on stdout the
    SSIM of x̂_δ and of ᾱ_i made of it, as the paper reports them, and the errors of the VAE's image and of x̂₀.
    """
    G, R, x = trained_models(run, settings, checkpoint, args, processes, args.n)
    x0, generators = shown_images(settings, args, processes, args.n)
    T, gamma, low, grid = (settings[key] for key in ("T", "gamma", "low", "grid"))
    noise, truth = data.randn(x0, generators), x_delta(x0, gamma)
    rows, labels = [from_pixels(x0, low), 2 * truth - 1], ["x_0", "x_delta"]
    print("     i   SSIM of x̂_δ   of ᾱ_i   of x̂₀   root mean square error of x̂_δ   of its image   of x̂₀")
    for j in sorted({max(1, round(T * share)) for share in (0.05, 0.25, 0.5, 1)}):
        i = place(j, T, grid)
        xi, parts = diffuse(x0, noise, i, gamma, T), []
        for part in torch.arange(len(x0)).split(len(x)):
            t = x0.new_full((len(part),), i / T)
            scale = G(xi[part], t, [generators[k] for k in part])
            parts.append((scale, reverse(xi[part], j, scale, R(xi[part], scale, t), T, low=low, grid=grid)))
        scale, back = (torch.cat(these) for these in zip(*parts))
        pairs = (scale, truth), (alpha_bar(scale, i, T), alpha_bar(truth, i, T)), (back, x0)
        same = [ssim(*pair).mean().item() for pair in pairs]
        off = [e.square().mean().sqrt().item() for e in (scale - truth, -scale.log() / gamma - x0, back - x0)]
        print(f"{i:6.4g} {same[0]:13.3f} {same[1]:8.3f} {same[2]:7.3f} {off[0]:29.3f} {off[1]:14.3f} {off[2]:7.3f}")
        rows += [from_pixels(xi, low), 2 * scale - 1, from_pixels(back, low)]
        labels += [f"x_{i:.3g}", "estimate", "x_0 back"]
    images = torch.stack(rows, 1)[:8].flatten(0, 1)
    data.save_png(data.picture(data.to_uint8(images), len(labels), labels), run / "estimates.png")
    print(f"(A black picture has the SSIM {ssim(0 * truth, truth).mean():.3f} with x_δ.) wrote {run}/estimates.png")


# -------------------------------------------------------------------------------------------------- 6 command line

COMMON = dict(T=200, gamma=20.0, low=LOW, grid="quadratic", heads=20, average="examples", latent=512,
              vae="conditional", scale="image", predict="x0", kl=0.02, seed=0)
DEFAULTS = {dataset: {**sizes, **COMMON} for dataset, sizes in unet.COMPACT.items()}
DEFAULTS["shapes"] |= dict(iterations=600)
DEFAULTS |= {name: {**DEFAULTS[name], "T": 500, "gamma": 50.0}
             for name in ("celeba", "celebahq", "lsun-church", "folder")}
METHOD = dict(grid="uniform", heads=0, average="heads", vae="denoising", scale="delta", predict="eps", kl=0.002,
              width=128, blocks=2, iterations=1_500_000)
PAPER = {"cifar10": {**METHOD, "mult": (1, 2, 2, 2), "batch_size": 128, "lr": 1e-4},
         "celeba": {**METHOD, "image_size": 128, "mult": (1, 1, 2, 2, 4), "batch_size": 16, "lr": 2e-4}}
NETWORK = ("width", "mult", "blocks", "attention", "dropout", "T", "gamma", "low", "grid", "latent", "vae", "scale",
           "predict")

FIGURES = {"forward": (write_forward, "dataset data_dir image_size T gamma low seed"),      # and the flags each heeds
           "solvers": (write_solvers, "run dataset data_dir seed"),
           "moments": (write_moments, "dataset data_dir image_size T gamma low seed"),
           "algorithm1": (write_algorithm1, "dataset data_dir image_size T gamma low seed"),
           "strips": (write_strips, "run dataset data_dir seed steps solver noise"),
           "estimates": (write_estimates, "run dataset data_dir seed n")}


def arguments(argv=None):
    """Parse the command line; a flag that was not given is None (or False, if it is a switch)."""
    parser, group = data.parser("pixel_aware", __doc__, DEFAULTS, PAPER, "1: passes of both networks")
    add = group["what to do"].add_argument
    add("--moments", action="store_true", help="draw Figure 2, of a training image, here, by matplotlib")
    add("--algorithm1", action="store_true", help="draw what Algorithm 1 makes of noises that are known, by matplotlib")
    add("--strips", action="store_true", help="draw Figures 7 and 8A, of a run: training images forward, and back")
    add("--estimates", action="store_true", help="draw Figure 3, of a run: how near its estimates are")
    add = group["method"].add_argument
    add("--T", type=data.number(int, 1, 5000), metavar="N", help="steps of the trajectory, and heads of R")
    add("--gamma", type=data.number(float, 0, 80, above=True), help="how fast pixels fade, up to 80: e^-γ is left of 1")
    add("--low", type=data.number(float, 0, 0.9, above=True), help="the pixel value of black, up to .9; white is 1")
    add("--grid", choices=GRIDS, help="of the trajectory's steps: even (the paper's), or dense near the image")
    add("--heads", type=data.number(int, 0), metavar="N",
        help="heads trained a step, drawn at random, the first always among them; 0: all")
    add("--latent", type=data.number(int, 1), metavar="N", help="numbers in the scale VAE's code")
    add("--vae", choices=("conditional", "denoising"), help="whose code is made of x_i alone (denoising), or in "
        "training also of the truth")
    add("--scale", choices=("delta", "image"), help="what the VAE names: the image scale x_δ, or the image")
    add("--predict", choices=("eps", "x0"), help="what the heads name: the noises, or the image")
    add("--kl", type=data.number(float, 0), help="the weight of the VAE's KL, 0 or more")
    add("--average", choices=("examples", "heads"), help="of the heads' losses: by example, or by head")
    add = group["sampling"].add_argument
    add("--solver", choices=("mean", "literal"), help="conditional means (default), or Algorithm 1 as printed")
    add("--noise", action=argparse.BooleanOptionalAction, help="literal's fresh noise in every step (default: on)")
    add("--start", choices=("noise", "forward"), help="x_T: N(0, I) (default), or training images, forwarded")
    return parser.parse_args(argv)


@data.command
def main(argv=None):
    """The command line. Raises SystemExit: 1 or 2 with a sentence on stderr, 130 or 143 when stopped by a signal."""
    args = arguments(argv)
    write, of_run = data.figure(args, FIGURES)
    run, settings, checkpoint = data.open_run("pixel_aware", args, DEFAULTS, PAPER, NETWORK, of_run=of_run)
    with data.bad_arguments():                              # what can't go together is said before anything is started
        solver_of(settings, args)
        if run:
            with torch.device("meta"):
                PixelAware(**network_of(settings, 3))
    processes = data.start(args.device)
    if args.train:
        train(run, settings, checkpoint, args, processes)
    if args.sample:
        write_samples(run, settings, data.load_checkpoint(run / "checkpoint.pt"), args, processes)
    if write and processes.rank == 0:                       # one process's work
        write(run, settings, checkpoint, args, processes._replace(world=1))


if __name__ == "__main__":
    main()
