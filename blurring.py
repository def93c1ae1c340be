"""Blurring Diffusion Models: blur and noise arrive together, each frequency on its own schedule.

Images have structure at many scales, and most of their power is in the coarse ones. Noise
treats all scales alike. Blur does not: as heat spreads, the high frequencies (fine detail) fade
first and the low ones last, so that the way back goes from coarse to fine. Inverse heat dissipation
(IHDM) blurred an image and added a little noise of a fixed σ. Hoogeboom and Salimans (2022) saw
that this is Gaussian diffusion. In the basis of the cosine transform blur multiplies each
coefficient by a number d, and noise stays noise: u_t = d u_x + σ u_ε. So each coefficient is a
diffusion with its own schedule; that σ is fixed does not matter, for only signal over noise counts.
Diffusion's posterior (Eq. 19) shows what IHDM lacked. The step back has a variance for each
frequency and time; IHDM had one for all: not right even in the limit of small steps. The paper's
model joins a cosine noise schedule to a blur that grows from none to σ_B,max pixels. The network
sees and answers in pixels.

    python blurring.py --train                       embedded shapes, minutes on two CPU cores
    python blurring.py --train --dataset cifar10     CIFAR-10, on a GPU
    python blurring.py --sample --solver ancestral   Algorithm 1, in 1000 steps

    x, x̂₀    x0          [B, C, H, W]    the image, in [-1, 1], and the network's guess of it
    ε, ε̂     eps, eps_hat [B, C, H, W]   the noise, N(0, I), and the guess
    v        v           [B, C, H, W]    a ε - σ x, by default what the network gives; a as below
    t, s     t, s        [B]             times in [0, 1], with s < t
    z_t      z, zt       [B, C, H, W]    the blurred and noisy image, in pixels
    Vᵀ, V    dct, idct                   the orthonormal cosine transform and its inverse
    u_t      ut          [B, C, H, W]    Vᵀ z_t; likewise ux = Vᵀ x and u_eps = Vᵀ ε
    λ        frequencies [H, W]          squared frequencies; a coefficient fades as e^(-λ τ)
    τ        tau         [B, 1, 1, 1]    σ²_B/2, how long heat spreads for a blur of width σ_B
    σ_B,t    sigma_blur  [B]             the blur's standard deviation in pixels
    d_t      d           [B, 1, H, W]    what the blur leaves of a coefficient, in [d_min, 1]
    a_t      a           [B, 1, 1, 1]    the noise schedule's signal, about cos(π t / 2)
    α_t      alpha       [B, 1, H, W]    a_t d_t, the signal of each frequency
    σ_t      sigma       [B, 1, 1, 1]    the noise, the same for all frequencies
    α_t|s    alpha_ts    [B, 1, H, W]    the transition from s to t, of variance σ²_t|s = sigma2_ts

Three choices here are not the paper's. The flag in brackets undoes each, and docs/blurring.md says
what was measured: the network predicts v (--predict eps), x̂₀ is kept in [-1, 1] (--no-clip), and a
second-order solver takes few steps, small ones near t = 0 (--solver ancestral). Appendix A's
pseudo-code does not run as printed; docs/blurring.md lists the corrections.
"""

import functools
import math

import numpy as np
import torch

import data
import unet

# --------------------------------------------------------------------------------------- 1 schedule

def like_image(t):
    """t [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


@functools.lru_cache(maxsize=None)
def dct_matrix(n, dtype, device):
    """The cosine transform of n numbers: C[k, i] = √(2/n) cos(π (i + ½) k / n), row 0 over √2.

    C Cᵀ = I. Computed in float64 and then rounded, for in float32 large angles lose two digits.
    """
    k = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)[None, :]
    C = math.sqrt(2 / n) * torch.cos(math.pi * (i + 0.5) * k / n)
    C[0] /= math.sqrt(2)
    return C.to(dtype).to(device)


def bases(x):
    """The matrices for x's height and width. On CUDA in float64: TF32 would keep three digits."""
    dtype = torch.float64 if x.is_cuda else x.dtype
    return [dct_matrix(n, dtype, x.device) for n in x.shape[-2:]]


def dct(x):
    """u = Vᵀ x: the orthonormal DCT-II of the last two axes, of any height and width."""
    C_h, C_w = bases(x)
    return (C_h @ x.to(C_h.dtype) @ C_w.T).to(x.dtype)


def idct(u):
    """x = V u, the inverse of `dct`."""
    C_h, C_w = bases(u)
    return (C_h.T @ u.to(C_h.dtype) @ C_w).to(u.dtype)


def frequencies(size, like):
    """λ [H, W] = f_h² + f_w², with f_k = π k / n. size: S or (H, W); like: for dtype and device."""
    height, width = (size, size) if isinstance(size, int) else size
    f_h = math.pi * torch.arange(height, dtype=like.dtype, device=like.device) / height
    f_w = math.pi * torch.arange(width, dtype=like.dtype, device=like.device) / width
    return f_h[:, None] ** 2 + f_w[None, :] ** 2


def sigma_blur(t, sigma_blur_max=20.0, schedule="sin2"):
    """σ_B,t [B] in pixels, from 0 at t = 0 to sigma_blur_max at t = 1. schedule: sin2; or sin: it
    takes detail away before there is noise, and with 10 pixels and more does worse (Table 4).
    """
    power = {"sin2": 2, "sin": 1}[schedule]
    return sigma_blur_max * torch.sin(math.pi * t / 2) ** power                        # Eq. 26


def noise_schedule(t):
    """(a_t, σ_t), each [B, 1, 1, 1]: a cosine schedule, with log(a²/σ²) from 10 to -10. As
    a² + σ² = 1, at t = 1 a is .007, and z₁ is about N(0, I).

    As in Appendix A the angle is kept arctan(e⁻⁵) away from both ends. This rescales the log-SNR
    everywhere. Clipping it at ±10, as Sec. 4.1 can be read, would be another schedule.
    """
    c = math.atan(math.exp(-5))
    angle = c + (math.pi / 2 - 2 * c) * like_image(t)
    return angle.cos(), angle.sin()


def alpha_sigma(t, size, sigma_blur_max=20.0, schedule="sin2", d_min=0.001):
    """(α_t [B, 1, H, W], σ_t [B, 1, 1, 1]): the signal left of each frequency, and the noise.

    t: [B] in [0, 1]. size: S or (H, W). sigma_blur_max: in pixels, 0 for no blur. d_min: keeps d
    from 0, because the way back divides by α_t and by α_t/α_s (Eq. 22, 24), and so magnifies
    errors in fine detail. The last three arguments are those that all below take as `blur`.
    """
    blurred = like_image(sigma_blur(t, sigma_blur_max, schedule))
    tau = blurred ** 2 / 2                                    # Appendix A has σ_t², wrongly
    d = (1 - d_min) * torch.exp(-frequencies(size, t) * tau) + d_min                   # Eq. 27
    a, sigma = noise_schedule(t)
    return a * d, sigma                                                                # Eq. 28


# ---------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, eps, t, **blur):
    """z_t: the blurred image and the noise. White noise is white in either basis."""
    alpha, sigma = alpha_sigma(t, x0.shape[-2:], **blur)
    return idct(alpha * dct(x0)) + sigma * eps                                         # Eq. 20, 21


def transition(t, s, size, **blur):
    """(α_t|s, σ²_t|s), each [B, 1, H, W], of q(u_t | u_s) = N(α_t|s u_s, σ²_t|s) for s < t."""
    alpha_t, sigma_t = alpha_sigma(t, size, **blur)
    alpha_s, sigma_s = alpha_sigma(s, size, **blur)
    alpha_ts = alpha_t / alpha_s                                                       # Eq. 16
    return alpha_ts, sigma_t ** 2 - alpha_ts ** 2 * sigma_s ** 2      # Eq. 16; A.1: σ_s² for σ_t²


# ------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="v", **blur):
    """The one place where the output gets its meaning: model(z_t, t) -> (ε̂,) or (x̂₀, ε̂).

    predict: "eps", the paper's; "x0"; or "v" = a ε - σ x₀ in pixels, of the scalar a. From x0 and
    from v both x̂₀ and ε̂ follow, by Eq. 21 in every frequency. From ε̂ alone x̂₀ would be
    (u_t - σ û_ε)/α, which multiplies the network's error by σ/α: at t = 1 by e⁵ = 148 in the mean
    of the image, and by e⁵/d_min = 148,000 in its finest detail. v's error grows by σ/(a² d + σ²),
    at 20 pixels 4.6-fold at most.
    """

    def model(z, t):
        out, = net(z, t)
        out = out.to(z.dtype)
        if predict == "eps":
            return out,
        alpha, sigma = alpha_sigma(t, z.shape[-2:], **blur)
        if predict == "x0":
            return out, (z - idct(alpha * dct(out))) / sigma                           # Eq. 21
        a, _ = noise_schedule(t)
        d = alpha / a
        ut = dct(z)
        uv = dct(out)
        determinant = a ** 2 * d + sigma ** 2
        ux = (a * ut - sigma * uv) / determinant              # u_t = a d u_x + σ u_ε and
        u_eps = (sigma * ut + a * d * uv) / determinant       # u_v = a u_ε - σ u_x, solved
        return idct(ux), idct(u_eps)

    return model


def loss(model, x0, eps, t, predict="v", **blur):
    """The loss of each example, [B]: the mean squared error of what was asked for, in pixels."""
    *x0_hat, eps_hat = model(diffuse(x0, eps, t, **blur), t)
    if predict == "eps":
        error = eps_hat - eps                                 # Eq. 25, which prints x_t, not x
    elif predict == "x0":
        error = x0_hat[0] - x0
    else:
        a, sigma = noise_schedule(t)
        error = a * (eps_hat - eps) - sigma * (x0_hat[0] - x0)
    return (error ** 2).flatten(1).mean(1)


# ---------------------------------------------------------------------------------------- 4 sampler

SOLVERS = {"ddim2": 20, "ddim": 50, "ancestral": 1000}        # and how many steps they take


def posterior(ut, ux, t, s, **blur):
    """(mean, variance) of q(u_s | u_t, x) in frequency space, for s < t. t, s: [B] or [1].

    This is Eq. 19, rearranged so that nothing is divided by σ_t|s. With x̂₀ in place of x it is the
    model's step, Eq. 23, which prints a standard deviation where Eq. 18 has the variance.
    """
    size = ut.shape[-2:]
    alpha_ts, sigma2_ts = transition(t, s, size, **blur)
    alpha_s, sigma_s = alpha_sigma(s, size, **blur)
    _, sigma_t = alpha_sigma(t, size, **blur)
    mean = (alpha_ts * sigma_s ** 2 * ut + alpha_s * sigma2_ts * ux) / sigma_t ** 2    # Eq. 19
    return mean, sigma_s ** 2 * sigma2_ts / sigma_t ** 2                               # Eq. 19


def posterior_mean_from_noise(ut, u_eps, t, s, **blur):
    """That mean from the noise: what Appendix A's `denoise`, misprinted, is to compute."""
    alpha_ts, sigma2_ts = transition(t, s, ut.shape[-2:], **blur)
    _, sigma_t = alpha_sigma(t, ut.shape[-2:], **blur)
    return (ut - sigma2_ts / sigma_t * u_eps) / alpha_ts                   # Eq. 24, rearranged


def ddim_step(ut, ux, t, s, **blur):
    """From u_t to u_s without fresh noise: û_x and û_ε are held. (Not the paper's.)"""
    size = ut.shape[-2:]
    alpha_t, sigma_t = alpha_sigma(t, size, **blur)
    alpha_s, sigma_s = alpha_sigma(s, size, **blur)
    u_eps = (ut - alpha_t * ux) / sigma_t                                              # Eq. 21
    return alpha_s * ux + sigma_s * u_eps


def second_order(t, s, size, **blur):
    """What is added to the deterministic step from t to s, if û_x changes by 1 a unit of time. (Not
    the paper's: a first reading can skip it.)

    The step itself holds û_x. Its path is d(u/σ) = u_x dρ with ρ = α/σ. A change of r - t at the
    time r adds σ_s ∫ (r - t) dρ from t to s. This is integrated by parts, and then numerically, by
    Gauss-Legendre quadrature, for ρ has no closed integral. -> [1, 1, H, W]
    """
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(32))
    alpha, sigma = alpha_sigma(t + (s - t) * (nodes + 1) / 2, size, **blur)
    alpha_s, sigma_s = alpha_sigma(torch.tensor([s], dtype=torch.float64), size, **blur)
    mean_rho = (like_image(weights / 2) * alpha / sigma).sum(0, keepdim=True)
    return (s - t) * (alpha_s - sigma_s * mean_rho)


GRIDS = {"dense": 1.75, "even": 1}                            # t = u^power, u even


def times(steps, grid="even"):
    """The sampler's times 1 = t₀ > t₁ > ... > 0: even, or dense near the image. ValueError."""
    if grid not in GRIDS:
        raise ValueError(f"there is no grid {grid}")
    return [(1 - i / steps) ** GRIDS[grid] for i in range(steps)] + [0.0]


@torch.no_grad()
def walk(net, z1, steps, solver="ancestral", clip=False, generator=None, grid="even", **blur):
    """From noise to image by `steps` calls of net. Yields (t, z_t, x̂₀) at each, at last (0, x, x).

    net(z_t, t) -> (ε̂,) or (x̂₀, ε̂), of which x̂₀ is used as it is. solver: ancestral, that is
    Algorithm 1, but its last step returns the mean; ddim, without noise; ddim2, the same, and of
    second order from its second step on. clip: keep x̂₀ in [-1, 1]. generator: of Algorithm 1's
    noise, one or a list of B. Raises ValueError.
    """
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver}")
    z = z1
    size = z1.shape[-2:]
    t_last = ux_last = None
    ts = times(steps, grid)
    for t, s in zip(ts, ts[1:]):
        t_ = z.new_full((1,), t)                              # one time for the whole batch
        s_ = z.new_full((1,), s)
        heads = net(z, t_.expand(len(z)))
        ut = dct(z)                                                            # Alg. 1, line 3
        u_eps = dct(heads[-1])
        alpha_t, sigma_t = alpha_sigma(t_, size, **blur)
        ux = dct(heads[0]) if len(heads) == 2 else (ut - sigma_t * u_eps) / alpha_t    # Eq. 22
        if clip:
            ux = dct(idct(ux).clamp(-1, 1))
        yield t, z, idct(ux)
        if solver == "ancestral":
            mean, variance = posterior(ut, ux, t_, s_, **blur)
            if len(heads) == 1 and not clip:                  # without x̂₀'s large numbers
                mean = posterior_mean_from_noise(ut, u_eps, t_, s_, **blur)
            noise = data.randn(z, generator) if s else torch.zeros_like(z)
            u = mean + variance.sqrt() * noise                                 # Alg. 1, line 6
        else:
            u = ddim_step(ut, ux, t_, s_, **blur)
        if solver == "ddim2" and t_last:
            u = u + (ux - ux_last) / (t - t_last) * second_order(t, s, size, **blur).to(u)
        t_last, ux_last = t, ux
        z = idct(u)
    yield 0.0, z, z


def sample(net, z1, steps, *options, **more):
    """The image at the end of a `walk`."""
    for _, z, _ in walk(net, z1, steps, *options, **more):
        pass
    return z


# --------------------------------------------------------------------------------------- 5 training

def train(run):
    """Algorithm 2, from where the run's checkpoint stopped."""
    s = run.settings
    images = data.load(run)
    net, ema = run.networks(unet.UNet, network(s, images.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=s.lr, fused=True)
    model = predictor(run.ready(net, training=True), s.predict, **blur_of(s))

    for step, g in run.steps(net, ema, optimizer):            # resumes, logs, saves, ends on Ctrl-C
        x0 = data.batch(images, s.batch_size, g)
        t = torch.rand(len(x0), generator=g, device=g.device)                  # Alg. 2, line 1
        eps = torch.randn(x0.shape, generator=g, device=g.device)              # Alg. 2, line 2
        x0, t, eps = run.share(x0, t, eps)                    # this process's part of the batch

        losses = loss(model, x0, eps, t, s.predict, **blur_of(s))              # Alg. 2, line 3
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        data.average(ema, net, s.ema, step)
        run.record(losses, t)


# ----------------------------------------------------------------------------------- 6 command line

FLAGS = dict(
    predict=("v", "what the network is asked for", ("v", "x0", "eps")),
    sigma_blur_max=(20.0, "the blur at t = 1, in pixels; 0: none, denoising diffusion", (0,)),
    blur_schedule=("sin2", "how the blur grows", ("sin2", "sin")),
    d_min=(0.001, "the least that blur leaves of a frequency", (1e-9, 1)),
    head_dim=(64, "channels of an attention head", None))
SAMPLING = dict(
    steps=(0, "steps of the solver, each a network call (ddim2 20, ddim 50, ancestral 1000)", None),
    solver=("ddim2", "second order, first order, or Algorithm 1", tuple(SOLVERS)),
    grid=("", "even times, or dense near t = 0 (ddim2: dense; others: even)", tuple(GRIDS)),
    clip=(None, "keep every x̂₀ in [-1, 1] (default: unless --predict eps with blur)", None))
PAPER = dict(predict="eps", blocks=3, dropout=0.2, ema=0.9999)                         # Table 5
PRESETS = {
    "shapes": dict(sigma_blur_max=4.0, iterations=1700),      # more blur takes longer to learn
    "cifar10": dict(dropout=0.2),
    "paper cifar10": PAPER | dict(lr=2e-4, batch_size=128, attention=(16, 8), head_dim=256,
                                  width=256, mult=(1, 1, 1), iterations=2_000_000),
    "paper lsun-church": PAPER | dict(lr=1e-4, batch_size=256, attention=(32, 16, 8), dropout=0.1,
                                      width=64, mult=(1, 2, 4, 6, 8), iterations=1_000_000)}


def network(s, channels):
    """unet.UNet's arguments, with one output."""
    sizes = unet.sizes(s)
    return dict(channels=channels, outputs=(channels,), head_dim=s.head_dim, **sizes)


def blur_of(s):
    """The settings that `alpha_sigma` takes, and all that calls it."""
    return dict(sigma_blur_max=s.sigma_blur_max, schedule=s.blur_schedule, d_min=s.d_min)


def sampler(run):
    """(steps, walk's options), as asked for or by default."""
    s, args = run.settings, run.args
    clip = args.clip
    if clip is None:                          # x̂₀ of ε̂ may be in the thousands: clipping ruins it
        clip = s.predict != "eps" or s.sigma_blur_max == 0
    grid = args.grid or ("dense" if args.solver == "ddim2" else "even")
    options = dict(solver=args.solver, grid=grid, clip=clip, **blur_of(s))
    return args.steps or SOLVERS[args.solver], options


def trained(run):
    """The model to sample with: the averaged weights, and what their output means."""
    s = run.settings
    return predictor(run.ready(run.averaged(unet.UNet)), s.predict, **blur_of(s))


def write_samples(run):
    """Pictures or single PNGs, drawn with the averaged weights."""
    model = trained(run)
    steps, options = sampler(run)

    def walked(z1, generators):
        return walk(model, z1, steps, generator=generators, **options)

    data.draw(run, walked, calls=steps, **options)


@data.command
def main(argv=None):
    """The command line. Exits with 2 for bad arguments, 1 for other problems, 130 for Ctrl-C."""
    run = data.open_run("blurring", __doc__, FLAGS | unet.FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals(), torch.device("meta"):               # refuse first what cannot be
        unet.UNet(**network(run.settings, 3))
    if run.args.train:
        train(run)
    if run.args.sample:
        write_samples(run)


if __name__ == "__main__":
    main()
