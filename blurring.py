"""Blurring Diffusion Models: blur and noise arrive together, each frequency of the image on a schedule of its own.

Blurring an image by heat dissipation shrinks its cosine-transform coefficients, the high frequencies first. Hoogeboom
and Salimans (2022) saw that this is Gaussian diffusion with a signal-to-noise schedule for every frequency: in the
basis V of the cosine transform the process is diagonal, so everything of denoising diffusion, its Markov chain, its
posterior, its loss on the noise, holds coefficient by coefficient. Their model joins a cosine noise schedule to a blur
that grows from none to σ_B,max pixels: blur decides the order in which detail is destroyed, noise keeps the process
a proper diffusion. The network sees and answers in pixels; only the schedules live in frequency space.

    python blurring.py --train                       train on the embedded shapes, in runs/blurring-shapes/ (minutes)
    python blurring.py --train --dataset cifar10     train on CIFAR-10, in runs/blurring-cifar10/
    python blurring.py --sample --solver ddim2       sample from the newest run, in 20 deterministic steps
    python blurring.py --sample --steps 1000         ... by Algorithm 1 (in the shapes' run: --solver ancestral)

Symbols, of the paper and of this code:

    x        x0          [B, C, H, W]    the image, in [-1, 1]
    ε        eps         [B, C, H, W]    the noise, N(0, I)
    t        t           [B]             time in [0, 1]
    s        s           [B]             an earlier time, s < t (in ddm.py s is a step; here it is the paper's)
    z_t      z, zt       [B, C, H, W]    the blurred, noisy image in pixels
    Vᵀ, V    dct, idct                   the orthonormal cosine transform and its inverse
    u        ut, ux,     [B, C, H, W]    Vᵀ z_t, Vᵀ x and Vᵀ ε: the same in frequency space
             u_eps
    λ        frequencies [H, W]          squared frequency: the rate at which heat dissipation damps a coefficient
    σ_B,t    sigma_blur  [B]             the blur's standard deviation in pixels, never called sigma
    τ_t      tau         [B, 1, 1, 1]    dissipation time, σ_B²/2
    d_t      d           [B, 1, H, W]    what the blur leaves of a coefficient, in [d_min, 1]
    a_t      a           [B, 1, 1, 1]    the noise schedule's scalar signal, cos(π t / 2) kept clear of 0 and 1
    α_t      alpha       [B, 1, H, W]    a_t d_t, the signal of each frequency
    σ_t      sigma       [B, 1, 1, 1]    the noise, the same for all frequencies; IHDM's is the constant σ
    α_t|s    alpha_ts    [B, 1, H, W]    the transition from s to t, with variance σ²_t|s = sigma2_ts
    δ        delta       a number        the noise of IHDM's sampler
    k, K     levels      whole numbers   IHDM and cold diffusion: the levels k = 1 ... K of blur, at t = k/K

Equations used: the marginal, Eq. 20 and 21; the transition, Eq. 16 (Eq. 17 for IHDM); the posterior, Eq. 18, 19 and,
from the noise, Eq. 24 (Algorithm 1); Eq. 22, the image that follows from the noise; the loss, Eq. 25 (Algorithm 2);
the schedules, Eq. 26 to 28; and IHDM's loss and sampler, Eq. 12 and 11. Eq. 1 to 7 are all that again without blur,
--sigma-blur-max 0. README.md has the map.

Where this differs from the paper, and why:

- What the network is asked for (--predict). The paper asks for ε. Then x̂₀ = (u_t - σ û_ε)/α multiplies the network's
  error by σ/α, at t = 1 by 148 for the mean of the image and by 148,000 for its finest detail: a small trained
  network whose ε̂ was off by .047 at t = 1 gave an x̂₀ off by 4152, for images in ±1. The same network asked for
  v = a ε - σ x₀ was off by .49, the spread of the data. So v is the default; --predict eps is the paper's.
- Clipping (--clip). x̂₀ is kept in [-1, 1] where the network gives x₀ or v, which is harmless. With ε and blur, which
  the paper leaves open, it is not: cutting the x̂₀ above to ±1 comes back as high frequencies, and ruins the samples
  of an otherwise exact network (a poor network's it may improve, see README).
- One output, one decoder: whichever is asked for, Eq. 21 gives the other from z_t exactly.
- Solvers: Algorithm 1 (ancestral); the deterministic step of the same marginals (ddim), with the family between the
  two (--eta); and a second-order multistep one (ddim2). The paper has Algorithm 1, and does not say in how many
  steps; 1000 are denoising diffusion's.
- Appendix A's pseudo-code does not run as printed; each correction stands beside its line.
- Down- and up-sampling are the shared U-Net's strided and nearest convolutions, not residual blocks. The gradient is
  clipped at norm 1, and the average's decay is short at first.
- The neighbours that the paper compares with: --sigma-blur-max 0 is denoising diffusion; --process ihdm is Rissanen et
  al. (2022), blur with a constant, invisible noise; --process cold is Bansal et al. (2022), blur alone, here on IHDM's
  levels. Both start from blurred training images, so their samplers need the training data too.

Measured results: README.md, "Results".
"""

import argparse
import functools
import math

import numpy as np
import torch

import data
import unet

# ------------------------------------------------------------------------------------------------------ 1 schedule

CONSTANT_SIGMA = {"ihdm": 0.02, "cold": 0.0}    # the noise of blur-only processes; IHDM's .01 is for images in [0, 1]


def like_image(t):
    """t: [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


@functools.lru_cache(maxsize=None)
def dct_matrix(n, dtype, device):
    """The cosine transform of n numbers: C[k, i] = √(2/n) cos(π (i + ½) k / n), row 0 divided by √2. C Cᵀ = I.

    Built in float64 and then rounded: cosines of large float32 angles would cost two digits.
    """
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    C = math.sqrt(2 / n) * torch.cos(math.pi * (i + 0.5) * k / n)
    C[0] /= math.sqrt(2)
    return C.to(dtype).to(device)


def bases(x):
    """The matrices for x's height and width; float64 on a CUDA GPU, where TF32 products would keep three digits."""
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
    """λ [H, W] = f_h² + f_w², f_k = π k / n. size: S or (H, W). (Appendix A's `labda`, whose `freqs` is its `freq`.)"""
    height, width = (size, size) if isinstance(size, int) else size
    f_h, f_w = (math.pi * torch.arange(n, dtype=like.dtype, device=like.device) / n for n in (height, width))
    return f_h[:, None] ** 2 + f_w[None, :] ** 2


def sigma_blur(t, sigma_blur_max=20.0, schedule="sin2", levels=200):
    """σ_B,t [B] in pixels, from 0 at t = 0 to sigma_blur_max at t = 1.

    schedule: sin2, the paper's; sin, of its Table 4; or log, IHDM's: at t = k/levels, k = 1 ... levels, from half a
    pixel by equal factors.
    """
    if schedule == "log":
        return torch.where(t > 0, 0.5 * (2 * sigma_blur_max) ** ((levels * t - 1) / (levels - 1)), 0 * t)
    return sigma_blur_max * torch.sin(math.pi * t / 2) ** {"sin2": 2, "sin": 1}[schedule]               # Eq. 26


def dissipation_time(t, sigma_blur_max=20.0, schedule="sin2", levels=200):
    """τ_t [B, 1, 1, 1]: heat that has flowed for τ is a Gaussian blur of variance σ_B² = 2τ."""
    return like_image(sigma_blur(t, sigma_blur_max, schedule, levels)) ** 2 / 2     # Appendix A has sigma_t², wrongly


def noise_schedule(t, process="blurring"):
    """The scalars (a_t, σ_t), [B, 1, 1, 1]: cosine, with log(a²/σ²) from 10 to -10; blur-only processes: (1, constant).

    As in Appendix A the angle is kept c = arctan(e⁻⁵) clear of both ends. That rescales the log-SNR between the ends;
    to clip it there, as Sec. 4.1 can be read, is another schedule.
    """
    t = like_image(t)
    if process != "blurring":
        return torch.ones_like(t), torch.full_like(t, CONSTANT_SIGMA[process])
    c = math.atan(math.exp(-5))
    angle = c + (math.pi / 2 - 2 * c) * t
    return angle.cos(), angle.sin()


def alpha_sigma(t, size, sigma_blur_max=20.0, schedule="sin2", d_min=0.001, process="blurring", levels=200):
    """(α_t [B, 1, H, W], σ_t [B, 1, 1, 1]): the signal left of each frequency, and the noise.

    t: [B] in [0, 1]; size: S or (H, W); sigma_blur_max in pixels, 0 for no blur. The keyword arguments are those that
    every function below takes as `blur`.
    """
    tau, (a, sigma) = dissipation_time(t, sigma_blur_max, schedule, levels), noise_schedule(t, process)
    d = (1 - d_min) * torch.exp(-frequencies(size, t) * tau) + d_min                                    # Eq. 27
    return a * d, sigma                                                                                 # Eq. 28


# ------------------------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, eps, t, **blur):
    """z_t, the blurred image and the noise. x0, eps: [B, C, H, W]; t: [B]. White noise is white in either basis."""
    alpha, sigma = alpha_sigma(t, x0.shape[-2:], **blur)
    return idct(alpha * dct(x0)) + sigma * eps                                                          # Eq. 20, 21


def transition(t, s, size, sigma_blur_max=20.0, schedule="sin2", d_min=0.001, process="blurring", levels=200):
    """q(u_t | u_s) = N(α_t|s u_s, σ²_t|s) for s < t, both [B]: returns (α_t|s, σ²_t|s), [B, 1, H, W]."""
    blur, how = (sigma_blur_max, schedule, d_min, process, levels), (sigma_blur_max, schedule, levels)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, size, *blur), alpha_sigma(s, size, *blur)
    if d_min:
        alpha_ts = alpha_t / alpha_s                                                                    # Eq. 16
    else:                                       # both underflow, to 0/0: the quotient of the exponentials does not
        a_ts = noise_schedule(t, process)[0] / noise_schedule(s, process)[0]
        tau_ts = dissipation_time(t, *how) - dissipation_time(s, *how)
        alpha_ts = a_ts * torch.exp(-frequencies(size, t) * tau_ts)                                     # Eq. 17
    return alpha_ts, sigma_t ** 2 - alpha_ts ** 2 * sigma_s ** 2         # Eq. 16 (Appendix A has sigma_s in both terms)


# ---------------------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="v", bf16=False, **blur):
    """The one place where the network's output gets its meaning: returns model(z_t, t) -> (ε̂,), (x̂₀, ε̂) or (mean,).

    predict: eps, the paper's; x0; v = a ε - σ x₀ in pixels, of the scalar a; or mean, IHDM's E[z_{t-1/K} | x], to
    which the network adds z_t. From x0 and v follow both x̂₀ and ε̂, by Eq. 21 in every frequency; for v its
    determinant a² d + σ² stays above .04 (.004 for schedule sin) at σ_B,max = 20, and the network's error in x̂₀ grows
    at most 4.6-fold (13-fold).
    """
    def model(z, t):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            raw, = net(z, t)
        raw = raw.to(z.dtype)
        if predict == "eps":
            return raw,
        if predict == "mean":
            return z + raw,
        alpha, sigma = alpha_sigma(t, z.shape[-2:], **blur)
        if predict == "x0":
            residual = z - idct(alpha * dct(raw))
            return raw, residual if blur.get("process") == "cold" else residual / sigma     # cold: no noise to name
        a, _ = noise_schedule(t)
        ut, uv, d = dct(z), dct(raw), alpha / a
        det = a ** 2 * d + sigma ** 2
        return idct((a * ut - sigma * uv) / det), idct((sigma * ut + a * d * uv) / det)

    return model


def loss(model, x0, eps, t, predict="v", **blur):
    """The loss per example [B]: the mean squared error of what was asked for, in pixels; cold diffusion's is absolute.

    For v it is that of (x̂₀, ε̂) in the one combination that the network gave, a (ε̂ - ε) - σ (x̂₀ - x₀).
    """
    *x0_hat, answer = model(diffuse(x0, eps, t, **blur), t)
    if predict == "eps":
        error = answer - eps                                                # Eq. 25 (Eq. 7 and 25 print x_t for x)
    elif predict == "mean":                     # the target has no noise: E[z_s | x], not the posterior's mean μ_{t→s}
        error = answer - diffuse(x0, torch.zeros_like(eps), t - 1 / blur["levels"], **blur)             # Eq. 12
    elif predict == "x0":
        error = x0_hat[0] - x0
    else:
        a, sigma = noise_schedule(t)
        error = a * (answer - eps) - sigma * (x0_hat[0] - x0)
    return (error.abs() if blur.get("process") == "cold" else error ** 2).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------- 4 sampler

def posterior(ut, ux, t, s, **blur):
    """q(u_s | u_t, x) = N(mean, variance) in frequency space, s < t. ut, ux: [B, C, H, W]; t, s: [B] or [1].

    Eq. 19 multiplied out, so that nothing is divided by σ_t|s or d_t, which may be 0. With x̂₀ in x's place this is the
    model, Eq. 23 (which prints the standard deviation where Eq. 18 has the variance).
    """
    size = ut.shape[-2:]
    alpha_ts, sigma2_ts = transition(t, s, size, **blur)
    (alpha_s, sigma_s), (_, sigma_t) = alpha_sigma(s, size, **blur), alpha_sigma(t, size, **blur)
    mean = (alpha_ts * sigma_s ** 2 * ut + alpha_s * sigma2_ts * ux) / sigma_t ** 2                     # Eq. 19
    return mean, sigma_s ** 2 * sigma2_ts / sigma_t ** 2                                                # Eq. 19


def posterior_mean_from_noise(ut, u_eps, t, s, **blur):
    """The same mean from the noise: what Appendix A's `denoise` means to compute, in one line.

    As printed that needs `diagonal_ts`, which nothing defines (σ_t²/σ_s² would do), a parenthesis around u_t - σ_t u_ε,
    and σ_t² in sigma2_ts; its "+ delta" would add an error of 4e-4 at 1000 steps.
    """
    alpha_ts, sigma2_ts = transition(t, s, ut.shape[-2:], **blur)
    _, sigma_t = alpha_sigma(t, ut.shape[-2:], **blur)
    return (ut - sigma2_ts / sigma_t * u_eps) / alpha_ts                                                # Eq. 24


def ddim_step(ut, ux, t, s, eta=0.0, noise=0.0, **blur):
    """From u_t to u_s with the same marginals: deterministic for eta = 0, the posterior of Eq. 19 for eta = 1."""
    size = ut.shape[-2:]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, size, **blur), alpha_sigma(s, size, **blur)
    variance = eta ** 2 * posterior(ut, ux, t, s, **blur)[1]
    u_eps = (ut - alpha_t * ux) / sigma_t                                                               # Eq. 21
    return alpha_s * ux + (sigma_s ** 2 - variance).clamp(min=0).sqrt() * u_eps + variance.sqrt() * noise


def second_order(t, s, size, **blur):
    """What a slope dû_x/dt = 1 adds to the deterministic step from t to s (floats), per frequency: [1, 1, H, W].

    The deterministic path is d(u/σ) = u_x dρ with ρ = α/σ, so it is σ_s ∫ₜˢ (r - t) dρ; by parts, and then by
    Gauss and Legendre's quadrature, as ρ is smooth but has no closed integral.
    """
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(32))
    alpha, sigma = alpha_sigma(t + (s - t) * (nodes + 1) / 2, size, **blur)
    alpha_s, sigma_s = alpha_sigma(torch.tensor([s], dtype=torch.float64), size, **blur)
    return (s - t) * (alpha_s - sigma_s * (like_image(weights / 2) * alpha / sigma).sum(0, keepdim=True))


@torch.no_grad()
def sample(net, z1, steps, solver="ancestral", eta=0.0, clip=False, generator=None, *, delta=0.025, watch=None, **blur):
    """From noise to images by `steps` calls of net, at the times 1, 1 - 1/steps, ..., 1/steps. z1: [B, C, H, W].

    net(z_t, t) -> (ε̂,) or (x̂₀, ε̂), of which x̂₀ is used as it is. solver: ancestral (Algorithm 1), ddim (with eta
    from 0, deterministic, to 1, ancestral), ddim2 (deterministic, second order from its second step); ihdm, for which
    net gives (E[z_s | x],), with noise delta; or naive and improved, cold diffusion's two rules. z1 is N(0, I), or for
    the last three a blurred image. clip: keep every x̂₀ in [-1, 1]. generator: of the noise, one or a list of B.
    watch(t, z_t, x̂₀): called at every step (ihdm: with its mean for x̂₀), and at t = 0. The last step returns its
    mean. Raises ValueError.
    """
    if solver not in ("ancestral", "ddim", "ddim2", "ihdm", "improved", "naive") or (eta and solver != "ddim"):
        raise ValueError(f"there is no solver {solver} with eta {eta}: eta is for ddim")
    z, size, t_last, ux_last = z1, z1.shape[-2:], None, None
    times = [1 - i / steps for i in range(steps)] + [0.0]       # printed as T, T - 1/T, ..., 1/T; T = 1 is meant
    for t, s in zip(times, times[1:]):
        t_, s_ = z.new_full((1,), t), z.new_full((1,), s)       # the schedule is the same for the whole batch
        heads = net(z, t_.expand(len(z)))
        stochastic = s > 0 and (solver in ("ancestral", "ihdm") or eta > 0)
        noise = data.randn(z, generator) if stochastic else torch.zeros_like(z)
        if solver == "ihdm":
            if watch:
                watch(t, z, heads[0])
            z = heads[0] + delta * noise                                                                # Eq. 11
            continue
        ut = dct(z)                                                                                     # Alg. 1, line 3
        (alpha_t, sigma_t), (alpha_s, _) = alpha_sigma(t_, size, **blur), alpha_sigma(s_, size, **blur)
        ux = dct(heads[0]) if len(heads) == 2 else (ut - sigma_t * dct(heads[0])) / alpha_t             # Eq. 22
        if clip:
            ux = dct(idct(ux).clamp(-1, 1))
        if watch:
            watch(t, z, idct(ux))
        if solver == "ancestral":
            mean, variance = posterior(ut, ux, t_, s_, **blur)
            if len(heads) == 1 and not clip:                    # then x̂₀'s large numbers need not arise
                mean = posterior_mean_from_noise(ut, dct(heads[0]), t_, s_, **blur)
            u = mean + variance.sqrt() * noise                                                          # Alg. 1, line 6
        elif solver == "naive":
            u = alpha_s * ux
        elif solver == "improved":              # of a constant error e of x̂₀ (1 - d_1) e remains: none in the mean
            u = ut - alpha_t * ux + alpha_s * ux
        else:
            u = ddim_step(ut, ux, t_, s_, eta, noise, **blur)
            if solver == "ddim2" and t_last:
                u = u + (ux - ux_last) / (t - t_last) * second_order(t, s, size, **blur).to(u)
            t_last, ux_last = t, ux
        z = idct(u)
    if watch:
        watch(0.0, z, z)
    return z


# ------------------------------------------------------------------------------------------------------ 5 training

def train(run, settings, checkpoint, args, processes):
    """Train, or go on, in the run directory until step settings["iterations"]. Source: Algorithm 2, Appendix A.2."""
    if data.finished(run, settings, checkpoint, processes):
        return
    training = data.Training(run, settings, checkpoint, args, processes, network_of, unet.create, torch.optim.Adam)
    (net, ema, optimizer), images, mine = training.parts.values(), training.images, training.mine
    device, batch, iterations = processes.device, settings["batch_size"], settings["iterations"]
    alone = predictor_of(net, settings, args, processes)    # neither compiled nor waiting for the other processes
    unet.warn_cost(alone, images.shape[1:], batch, iterations - training.start, processes)
    model = predictor_of(unet.parallel(net, device, processes.world, args.compile), settings, args, processes)

    with training:
        for step, draw in training:
            x0 = data.draw_batch(images, batch, draw)
            t = draw_times(batch, settings["process"], settings["levels"], draw)                        # Alg. 2, line 1
            eps = torch.randn(x0.shape, generator=draw, device=device)                                  # Alg. 2, line 2

            values = loss(model, x0[mine], eps[mine], t[mine], settings["predict"], **blur_of(settings))    # line 3
            optimizer.zero_grad(set_to_none=True)
            values.mean().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

            decay = min(settings["ema"], (1 + step) / (10 + step))      # short at first: young weights are no use
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            training.record(values, t[mine], grad_norm, settings["lr"])


def draw_times(n, process, levels, generator):
    """n training times: even in [0, 1), or, for blur-only processes, a level k/levels with k = 1 ... levels.

    IHDM's released code never draws k = levels, where its sampler starts.
    """
    t = torch.rand(n, generator=generator, device=generator.device)
    return t if process == "blurring" else ((t * levels).floor() + 1) / levels


def blur_of(settings):
    """The settings that `alpha_sigma` and all that call it take."""
    return {key: settings[key] for key in ("sigma_blur_max", "schedule", "d_min", "process", "levels")}


def predictor_of(net, settings, args, processes):
    """The predictor of a run: its network and the settings that say what the output is."""
    return predictor(net, settings["predict"], unet.use_bf16(args.precision, processes.device), **blur_of(settings))


def network_of(settings, channels):
    """unet.UNet's arguments, with one output."""
    return {"channels": channels, "outputs": (channels,), "size": settings["image_size"],
            **{key: settings[key] for key in NETWORK}}


def solver_of(settings, args, solver=None):
    """(steps, the other arguments of `sample`), as asked for or by default. Raises ValueError for what can't be."""
    process, predict, levels = settings["process"], settings["predict"], settings["levels"]
    solvers, few = SOLVERS[process], settings["dataset"] == "shapes" and process == "blurring" and predict != "eps"
    solver = solver or args.solver or ("ddim2" if few else next(iter(solvers)))
    steps = args.steps or solvers.get(solver) or levels
    for wrong, sentence in (
            (predict not in ANSWERS[process],
             f"--process {process} asks its network for {' or '.join(ANSWERS[process])}, not {predict}"),
            (process == "blurring" and not settings["d_min"],
             "--d-min 0 would divide by nothing on the way back: it is for the blur-only processes"),
            (settings["schedule"] == "log" and settings["sigma_blur_max"] <= 0.5,
             "--schedule log starts at half a pixel: --sigma-blur-max must be more"),
            (solver not in solvers, f"--process {process} has no solver {solver}: choose from {', '.join(solvers)}"),
            (args.eta and solver != "ddim", f"--eta is for --solver ddim, not {solver}"),
            (args.delta is not None and solver != "ihdm", f"--delta is for --solver ihdm, not {solver}"),
            (args.clip and solver == "ihdm", "--clip is for estimates of the image, and IHDM's network makes none"),
            (solver == "ihdm" and steps != levels,
             f"IHDM's network knows the way from each level to the next only: --steps {levels}"),
            (process == "cold" and levels % steps, f"--steps must divide the {levels} levels of the training")):
        if wrong:
            raise ValueError(sentence)
    safe = predict in ("x0", "v") or predict == "eps" and settings["sigma_blur_max"] == 0
    options = {"solver": solver, "clip": safe if args.clip is None else args.clip, **blur_of(settings)}
    delta = 0.025 if args.delta is None else args.delta
    options |= {"eta": args.eta} if solver == "ddim" else {"delta": delta} if solver == "ihdm" else {}
    return steps, options


def trained_model(run, settings, checkpoint, args, processes, n):
    """(model, x): the predictor of a run's EMA weights, made fast, and zeros, as many of n images as go in a call."""
    network = network_of(settings, checkpoint["network"].get("channels", 3))
    net = unet.create(network, processes.device)[1]
    data.restore(run, checkpoint, ema=net)
    net = unet.parallel(net, processes.device, compile=args.compile)
    return unet.fast_batch(predictor_of(net, settings, args, processes), n, network, processes.device)


def write_samples(run, settings, checkpoint, args, processes):
    """Sample with the EMA weights: two pictures into the run directory, or single PNGs into --out."""
    steps, options = solver_of(settings, args)
    model, x = trained_model(run, settings, checkpoint, args, processes, args.n)
    origin, blur = {}, blur_of(settings)
    if settings["process"] != "blurring":                       # these start from training images, blurred
        origin = {key: settings[key] for key in ("dataset", "data_dir")}
        images = data.load(*origin.values(), x.shape[-1], processes)
        if images.shape[1] != x.shape[1]:
            raise data.Problem(f"{run} was trained on images of {x.shape[1]} channels, and those in "
                               f"{origin['data_dir']}, to start from, have {images.shape[1]}")

    def draw(z1, generators, watch):
        if settings["process"] != "blurring":
            x0 = torch.stack([images[int(torch.randint(len(images), (), generator=g))] for g in generators])
            z1 = diffuse(data.to_float(x0).to(z1), torch.zeros_like(z1), z1.new_ones(len(z1)), **blur)
        return sample(model, z1, steps, generator=generators, watch=watch, **options)

    data.draw_samples(draw, x, run, checkpoint, args, steps, {**options, **origin}, processes)


def write_forward(run, settings, checkpoint, args, processes):
    """One image on its way to noise, and α²/σ² of three frequencies."""
    def way(x0, eps, t, ts):
        size, how = settings["image_size"], blur_of(settings)
        alpha, sigma = alpha_sigma(ts, size, **how)
        snr = (alpha / sigma)[:, 0].diagonal(dim1=1, dim2=2).square()           # [100, S]: as high in both axes
        names = {"mean colour": 0, "middle frequency": size // 2, "highest frequency": size - 1}
        return diffuse(x0, eps, t, **how), {f"blurring, {name}": snr[:, k] for name, k in names.items()}
    data.forward_figure("blurring", way, settings, processes)


def write_solvers(run, settings, checkpoint, args, processes):
    """All solvers of blurring, from the same noises."""
    model, x = trained_model(run, settings, checkpoint, args, processes, 3)

    def draw(solver, steps, z1, generators):
        own = {"steps": steps, "eta": args.eta if solver == "ddim" else 0.0}
        steps, options = solver_of(settings, argparse.Namespace(**{**vars(args), **own}), solver)
        return sample(model, z1, steps, generator=generators, **options)
    data.solver_figure(draw, dict.fromkeys(SOLVERS["blurring"], 1), x, run, settings, args)


# -------------------------------------------------------------------------------------------------- 6 command line

COMMON = dict(process="blurring", predict="v", sigma_blur_max=20.0, schedule="sin2", d_min=0.001, levels=200,
              head_dim=64, seed=0)
DEFAULTS = {dataset: {**sizes, **COMMON} for dataset, sizes in unet.COMPACT.items()}
DEFAULTS["cifar10"] |= dict(dropout=0.2)
DEFAULTS["shapes"] |= dict(sigma_blur_max=4.0, iterations=1700)         # more blur takes longer to learn
TABLE_5 = dict(predict="eps", blocks=3, dropout=0.2, ema=0.9999)
CHURCH = {**TABLE_5, "lr": 1e-4, "batch_size": 256, "attention": (32, 16, 8), "head_dim": 64,
          "iterations": 1_000_000}                                           # the paper does not say how many
PAPER = {"cifar10": {**TABLE_5, "lr": 2e-4, "batch_size": 128, "attention": (16, 8), "head_dim": 256, "width": 256,
                     "mult": (1, 1, 1), "iterations": 2_000_000},
         "lsun-church": {**CHURCH, "width": 64, "mult": (1, 2, 4, 6, 8), "dropout": 0.1}}
CHURCH_64 = {**CHURCH, "width": 128, "mult": (1, 2, 3, 4)}                  # with --image-size 64
NETWORK = ("width", "mult", "blocks", "attention", "dropout", "head_dim")
ANSWERS = {"blurring": ("v", "x0", "eps"), "ihdm": ("mean",), "cold": ("x0",)}              # what --predict may be
SOLVERS = {"blurring": {"ancestral": 1000, "ddim": 50, "ddim2": 20},                        # and their default steps:
           "ihdm": {"ihdm": None}, "cold": {"improved": None, "naive": None}}               # None is --levels

FIGURES = {"forward": (write_forward, "dataset data_dir image_size seed sigma_blur_max schedule d_min"),
           "solvers": (write_solvers, "run dataset data_dir seed clip eta")}                # and the flags each heeds


def defaults_for(table, process, image_size):
    """A table of settings by dataset; for a blur-only process with IHDM's levels, up to 3/4 or 1/2 of the image."""
    if process == "blurring":
        return table
    heat = dict(process=process, predict=ANSWERS[process][0], schedule="log", d_min=0.0)
    sizes = {dataset: image_size or DEFAULTS[dataset]["image_size"] for dataset in table}
    return {dataset: {**values, **heat, "sigma_blur_max": sizes[dataset] * (0.75 if sizes[dataset] <= 32 else 0.5)}
            for dataset, values in table.items()}


def arguments(argv=None):
    """Parse the command line; a flag that was not given is None (or False, if it is a switch)."""
    steps = "by solver: ancestral 1000, ddim 50, ddim2 20; for ihdm and cold --levels"
    parser, group = data.parser("blurring", __doc__, DEFAULTS, PAPER, steps)
    add = group["method"].add_argument
    add("--process", choices=ANSWERS, help="blur and noise, or its neighbours: IHDM, or cold "
        "diffusion; both with --schedule log, --d-min 0, and a blur of 3/4 of the image up to 32 pixels, 1/2 beyond")
    add("--predict", choices=("eps", "x0", "v", "mean"), help="what the network is asked for; mean: IHDM's next level")
    add("--sigma-blur-max", type=data.number(float, 0), metavar="PIXELS", help="the blur at t = 1; 0: only noise")
    add("--schedule", choices=("sin2", "sin", "log"), help="of the blur's growth; log: IHDM's")
    add("--d-min", type=data.number(float, 0, 1), help="what blur leaves of any frequency, 0 to 1")
    add("--levels", type=data.number(int, 2), metavar="K", help="levels of blur, for ihdm, cold and --schedule log")
    add = group["sampling"].add_argument
    add("--solver", choices=[name for names in SOLVERS.values() for name in names],
        help="Algorithm 1 (ancestral), the deterministic step (ddim), its second order (ddim2; the default for "
             "shapes), IHDM's, or cold diffusion's (improved, naive)")
    add("--eta", type=data.number(float, 0, 1), default=0.0, help="of ddim: 0, deterministic, to 1, ancestral (0)")
    add("--clip", action=argparse.BooleanOptionalAction,
        help="keep every estimate x̂₀ in [-1, 1] (default: not where the network names ε and there is blur)")
    add("--delta", type=data.number(float, 0), help="IHDM's sampling noise (default: 0.025)")
    return parser.parse_args(argv)


@data.command
def main(argv=None):
    """The command line. Raises SystemExit: 1 or 2 with a sentence on stderr, 130 or 143 when stopped by a signal."""
    args = arguments(argv)
    paper = {**PAPER, "lsun-church": CHURCH_64} if args.image_size == 64 else PAPER
    defaults, paper = (defaults_for(table, args.process or "blurring", args.image_size) for table in (DEFAULTS, paper))
    write, of_run = data.figure(args, FIGURES)
    run, settings, checkpoint = data.open_run("blurring", args, defaults, paper, NETWORK, of_run=of_run)
    with data.bad_arguments():                              # what can't go together is said before anything is started
        if args.solvers and settings["process"] != "blurring":
            raise ValueError(f"--solvers starts from noise, and {run} of --process {settings['process']} does not")
        solver_of(settings, args, "ddim" if args.solvers else None)                     # --eta is for that one
        with torch.device("meta"):
            unet.UNet(**network_of(settings, 3))
    processes = data.start(args.device)
    if args.train:
        train(run, settings, checkpoint, args, processes)
    if args.sample:
        write_samples(run, settings, data.load_checkpoint(run / "checkpoint.pt"), args, processes)
    if write and processes.rank == 0:                       # one process's work
        write(run, settings, checkpoint, args, processes._replace(world=1))


if __name__ == "__main__":
    main()
