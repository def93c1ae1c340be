"""Decoupled Diffusion Models: the image fades to zero while, independently, zero grows into noise.

DDM (Huang et al. 2023), and its journal version ADM, "Simultaneous Image-to-Zero and Zero-to-Noise". Where DDPM mixes
image and noise along one chain, DDM writes the forward process as a sum of two: the image x₀ + H_t is attenuated by
an analytic function, x₀ at t = 0 and 0 at t = 1, and a Wiener process √t ε grows from 0 to N(0, I). One network with
two outputs names both parts of x_t: φ, the parameters of the attenuation (that is, the image), and ε. As H is known
in closed form, the way back from t to t - s is one formula for any step s, and ten network calls show an image.

    python ddm.py --train                        train on the embedded shapes, in runs/ddm-shapes/ (minutes, two cores)
    python ddm.py --train --dataset cifar10      train on CIFAR-10, in runs/ddm-cifar10/
    python ddm.py --sample --steps 10            sample from the newest run
    python ddm.py --train --evaluate --task saliency        an image-conditioned task; README has the others

Symbols, of the paper and of this code:

    x₀      x0            [B, C, H, W]    the image, in [-1, 1]
    ε       eps           [B, C, H, W]    the noise, N(0, I)
    t       t             [B]             time in [0, 1]; the smallest that the network sees is δ = delta, 1e-3
    s       s             [B]             a step back in time, from t to r = t - s
    x_t     xt            [B, C, H, W]    x₀ + H_t + √t ε
    h_t     h             a name          the rate of attenuation: constant, linear, quadratic, exponential or sine
    φ       phi           [B, K·C, H, W]  h's K parameters: (c), (a, c), (a, b, c), (a, c) or (a); constant: φ = c = -x₀
    H_t     H             [B, C, H, W]    ∫₀ᵗ h dt: 0 at t = 0, -x₀ at t = 1
    λ₁, λ₂  loss_weights  [B]             the weights of the two losses
    σ_d     sigma_data    a number        the data's root mean square, about: .5, or .7 for the shapes; preconditioning
    Cond    condition     [B, c, H, W]    what the network is told of an image-conditioned task

Equations used: the forward process, Eq. 6 and 7; the loss, Eq. 10 (Algorithm 1); the step back, Eq. 11 (Algorithm 2),
of which Eq. 9 is the limit of a small step; and Eq. 20, which gives one output from the other. The rest are the older
diffusion models' (1 to 5) or steps of the proofs; README.md has the map.

Where this differs from the paper, and why:

- Preconditioned heads (--precondition, the default). Neither paper has them; the released code does, as EDM: input
  and outputs are scaled so that both raw outputs F have unit variance, and then have the same target. Weights that
  made the loss on F even at all t did much worse than the paper's (README, "Results"): those weigh small t, where the
  detail is made, 1/σ_d² times more. With --no-precondition the outputs are φ and ε as printed; --preset paper does so.
- Noise √t or t (--noise). The papers have √t everywhere (Eq. 7). The configuration of the released code that fits the
  paper's best CIFAR-10 model (90 M parameters, one decoder) has t, rectified flow's path. The default is √t.
- The two heads say one thing twice: (1-t) x̂₀ + √t ε̂ should be x_t, but a trained network misses it by a residual.
  Algorithm 2 carries it along. `project` takes it out, by the least change to both heads; --heads names the
  alternatives.
- Solvers: Algorithm 2 (ddm), the deterministic step of the same process (ode), and a second-order multistep one
  (ode2), which the papers leave to future work. Grids: t = u² with even u, where the papers have even t.
- "Arbitrary step size" (Sec. IV-B) is true given x₀. With the network's mean in its place, large steps of Eq. 11 give
  samples that are too narrow: with the exact mean and even t, data of standard deviation .5 come out at .301 in 5
  steps, .369 in 10.
- λ₂ of "edm" is infinite at t = 1 as printed: in the weights, times are kept δ away from both ends.
- A randomly drawn `a` can't be learnt: x_t explains at most 1/28 of its variance in a t + c, so the loss on φ has a
  floor. That, more than the network, is why the constant wins the papers' comparison of attenuations.
- The sine reaches no |x₀| beyond 0.7246: for it the images are scaled by 0.72, and back after sampling.
- Image-conditioned tasks (--task; Sec. V-C) are the same process, loss and samplers for a network that is told one
  thing more. The papers diffuse in the latent space of an autoencoder; here it is pixels: patches in training, and
  overlapping windows of larger images in sampling. Super-resolution diffuses what bicubic enlargement lacks.
- The condition encoder's features are concatenated to the decoders' inputs (ADM Sec. V-A, "Architecture") or related
  by attention ("Implementation"): the text says both, and --fuse has both.
- fp16 harmed the paper's training. bf16 has fp32's range: weights, optimizer, schedule, loss and preconditioning stay
  in fp32, and only the network's layers compute in bf16, on GPUs that have it.

Measured results: README.md, "Results".
"""

import argparse
import functools
import math

import torch

import data
import unet

# ------------------------------------------------------------------------------------------------------ 1 schedule

ATTENUATIONS = {"constant": 1, "linear": 2, "quadratic": 3, "exponential": 2, "sine": 1}    # h: its K parameters
GRIDS = {"quadratic": 2, "uniform": 1}      # t is this power of evenly spaced u
SINE_BOUND = 0.724611           # the largest |x₀| that (1 - cos a)/a reaches,
SINE_RANGE = 2.331122           # at a = ± this, the ends of its principal branch


def like_image(t):
    """t: [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


def expm1_over(a, t):
    """expm1(a t)/a, and its limit t at a = 0, where the quotient is NaN (and e^{at} - 1 has no digits left near it)."""
    near_zero = a.abs() < 1e-30
    return torch.where(near_zero, t.expand_as(a), torch.expm1(a * t) / torch.where(near_zero, torch.ones_like(a), a))


def H(phi, t, h="constant"):
    """The attenuation H_t = ∫₀ᵗ h of ADM's Fig. 7. phi: [B, K·C, H, W]; t: [B] in [0, 1]; returns [B, C, H, W]."""
    t, parts = like_image(t), phi.chunk(ATTENUATIONS[h], dim=1)
    if h == "constant":                                     # h_t = c
        c, = parts
        return c * t
    if h == "linear":                                       # h_t = a t + c
        a, c = parts
        return a * t ** 2 / 2 + c * t
    if h == "quadratic":                                    # h_t = a t² + b t + c
        a, b, c = parts
        return a * t ** 3 / 3 + b * t ** 2 / 2 + c * t
    if h == "exponential":                                  # h_t = e^{a t} + c
        a, c = parts
        return expm1_over(a, t) + c * t
    a, = parts                                              # h_t = sin(a t): (1 - cos(a t))/a = 2 sin²(a t/2)/a
    return a * t ** 2 / 2 * torch.sinc(a * t / (2 * math.pi)) ** 2


def draw_phi(x0, h="constant", generator=None):
    """Parameters φ that take the image to zero: x₀ + H₁ = 0. Where that leaves some free they are drawn from N(0, 1).

    x0: [B, C, H, W]; returns [B, K·C, H, W]. Raises ValueError for "sine" where |x0| > 0.7246 has no solution.
    Source: ADM Sec. V-A, "Obtaining Ground Truth of φ".
    """
    if h == "constant":
        return -x0
    if h == "sine":
        if x0.abs().max() > SINE_BOUND:
            raise ValueError(f"h = sin(a t) reaches images in [-{SINE_BOUND}, {SINE_BOUND}] only: scale them")
        low, high = torch.zeros_like(x0), torch.full_like(x0, SINE_RANGE)
        for _ in range(60):                                 # bisection for |a|: H₁ is monotone on this branch
            a = (low + high) / 2
            short = 2 * (a / 2).sin() ** 2 < a * x0.abs()
            low, high = torch.where(short, a, low), torch.where(short, high, a)
        return -x0.sign() * a
    a = data.randn(x0, generator)
    if h == "linear":
        return torch.cat([a, -x0 - a / 2], dim=1)
    if h == "exponential":
        return torch.cat([a, -x0 - expm1_over(a, torch.ones_like(a))], dim=1)
    b = data.randn(x0, generator)
    return torch.cat([a, b, -x0 - a / 3 - b / 2], dim=1)


def image_of(phi, h="constant"):
    """The image that φ attenuates, x₀ = -H₁."""
    return -H(phi, phi.new_ones(len(phi)), h)


def std(t, noise="sqrt"):
    """The noise's standard deviation at t: √t (Eq. 7), or t as in the released code ("linear")."""
    return t.sqrt() if noise == "sqrt" else t


def times(steps, grid="quadratic", delta=1e-3, final=False):
    """The sampler's times [1, ..., 0]: `steps` of them see the network, and none of those is below delta.

    grid: "uniform" in t (Algorithm 2), or "quadratic", t = u² with uniform u, which takes small steps where √t is
    steep. final=True puts the last call at delta, the paper's "final denoising step"; otherwise the steps in u are
    equal down to 0, or, where their last call would be below delta, down to delta. Raises ValueError.
    """
    if grid not in GRIDS:
        raise ValueError(f"there is no grid {grid}")
    power = GRIDS[grid]
    last = delta ** (1 / power) if final else max(delta ** (1 / power), 1 / steps)
    u = [1 - i * (1 - last) / max(1, steps - 1) for i in range(steps)]
    return [max(v ** power, delta) for v in u] + [0.0]


# ------------------------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, phi, eps, t, h="constant", noise="sqrt"):
    """x_t, the faded image plus the grown noise. x0, eps: [B, C, H, W]; phi: [B, K·C, H, W]; t: [B] in [0, 1]."""
    return x0 + H(phi, t, h) + like_image(std(t, noise)) * eps                                          # Eq. 6, 7


# ---------------------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="both", precondition=True, sigma_data=0.5, h="constant", noise="sqrt", bf16=False):
    """The one place where the network's outputs get their meaning: returns model(x_t, t, *condition) -> (φ̂, ε̂).

    net(x, t, *condition) -> a tuple of raw outputs, two or one. With `precondition` (constant h only) a raw output
    is, in units of its standard deviation, the error of the mean that Gaussian data of variance sigma_data² would
    have given x_t; both outputs then have the same target, so one may serve as both. Without it they are φ and ε
    themselves, or with predict="image" φ alone, and ε̂ follows from x_t. A noise-only network needs preconditioning:
    its x̂₀ = (x_t - √t ε̂)/(1-t) is 0/0 at t = 1. Raises ValueError.
    """
    if precondition and h != "constant":
        raise ValueError(f"preconditioned heads are for the constant attenuation: use --no-precondition with --h {h}")
    if predict == "noise" and not precondition:
        raise ValueError("a noise-only network's image is 0/0 at t = 1 without preconditioning: drop --no-precondition")

    def model(x, t, *condition):
        keep, n = like_image(1 - t), like_image(std(t, noise))
        V = keep ** 2 * sigma_data ** 2 + n ** 2                        # the variance of x_t
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            raw = net(x / V.sqrt() if precondition else x, t, *condition)
        raw = [out.to(x.dtype) for out in raw]
        if precondition:
            phi = -(keep * sigma_data ** 2 / V) * x + sigma_data * n / V.sqrt() * raw[0]
            eps = n / V * x + keep * sigma_data / V.sqrt() * raw[-1]
        elif predict == "image":
            phi = raw[0]
            eps = (x - image_of(phi, h) - H(phi, t, h)) / n                                             # Eq. 20
        else:
            phi, eps = raw
        return phi, eps

    return model


def loss_weights(t, kind="edm", noise="sqrt", delta=1e-3):
    """(λ₁, λ₂) of ADM's Table V, each [B]. kind: one, inverse, exponential or edm; t: [B], kept delta off 0 and 1.

    "edm", the paper's best, is V/t and V/(1-t)² with V = (1-t)² + t = t² - t + 1, the variance of x_t for data of
    variance 1 (and t² for t where the noise has standard deviation t).
    """
    if kind == "one":
        return torch.ones_like(t), torch.ones_like(t)
    if kind == "exponential":
        return t.exp(), (1 - t).exp()
    t = t.clamp(delta, 1 - delta)
    if kind == "inverse":
        return 1 / t, 1 / (1 - t)
    n2 = std(t, noise) ** 2
    V = (1 - t) ** 2 + n2
    return V / n2, V / (1 - t) ** 2


def distance(a, b, norm="l2"):
    """Mean error per example [B]: l2 (squared), l1, or l1+l2, all with the same reduction."""
    e = (a - b).flatten(1)
    return sum({"l1": e.abs(), "l2": e ** 2}[part].mean(1) for part in norm.split("+"))


def loss(model, x0, phi, eps, t, h="constant", noise="sqrt", predict="both", weights="edm", norm="l2", delta=1e-3,
         condition=()):
    """Algorithm 1's loss per example [B]: λ₁ |φ̂ - φ|² + λ₂ |ε̂ - ε|², or only the term that `predict` names.

    condition: what else the model is told, as model(x_t, t, *condition).
    """
    xt = diffuse(x0, phi, eps, t, h, noise)                                                             # Alg. 1, line 5
    phi_hat, eps_hat = model(xt, t, *condition)
    lambda_1, lambda_2 = loss_weights(t, weights, noise, delta)
    of_image, of_noise = lambda_1 * distance(phi_hat, phi, norm), lambda_2 * distance(eps_hat, eps, norm)
    return {"both": of_image + of_noise, "image": of_image, "noise": of_noise}[predict]                 # Eq. 10


# ------------------------------------------------------------------------------------------------------- 4 sampler

def reverse_step(xt, phi, eps, t, s, z, h="constant", noise="sqrt"):
    """One step of Algorithm 2, from t to t - s: a draw of q(x_{t-s} | x_t, x₀). t, s: [B]; z ~ N(0, I), as xt."""
    r = t - s
    if noise == "sqrt":
        pull, variance = s / t.sqrt(), s * r / t
    else:
        pull, variance = (t ** 2 - r ** 2) / t, r ** 2 * (t ** 2 - r ** 2) / t ** 2
    mean = xt + H(phi, r, h) - H(phi, t, h) - like_image(pull) * eps                                    # Eq. 11
    return mean + like_image(variance.clamp(min=0).sqrt()) * z                                          # Eq. 11


def ode_step(xt, phi, eps, t, r, h="constant", noise="sqrt", heads="image"):
    """The deterministic step from t to r with φ̂ and ε̂ held: dx/dt = h_t + ε̂ d√t/dt. t, r: [B].

    With exact heads the three forms are one. With a trained network they differ in what becomes of the residual
    x_t - x̂₀ - H_t - √t ε̂: "forget" drops x_t, and so puts the residual into the image anew at every step; "both"
    carries it along; "image" counts it as noise, and so never looks at ε̂.
    """
    x0, n_t, n_r = image_of(phi, h), like_image(std(t, noise)), like_image(std(r, noise))
    if heads == "forget":
        return x0 + H(phi, r, h) + n_r * eps
    if heads == "both":
        return xt + H(phi, r, h) - H(phi, t, h) + (n_r - n_t) * eps
    return x0 + H(phi, r, h) + n_r / n_t * (xt - x0 - H(phi, t, h))


def project(xt, phi, eps, t, noise="sqrt"):
    """Make the heads agree with x_t: the nearest (x̂₀, ε̂) with (1-t) x̂₀ + √t ε̂ = x_t. Constant h only.

    Near t = 1, where x_t is nearly the noise, ε̂ gives way, and near t = 0 x̂₀. Returns (φ̂, ε̂).
    """
    keep, n = like_image(1 - t), like_image(std(t, noise))
    residual = (xt + keep * phi - n * eps) / (keep ** 2 + n ** 2)
    return phi - keep * residual, eps + n * residual


def clipped(phi, h="constant"):
    """φ with its image kept in [-1, 1]: c, its last part, takes the difference; the sine keeps to its branch."""
    if h == "sine":
        return phi.clamp(-SINE_RANGE, SINE_RANGE)
    x0 = image_of(phi, h)
    return torch.cat([phi[:, :-x0.shape[1]], phi[:, -x0.shape[1]:] + x0 - x0.clamp(-1, 1)], dim=1)


def second_order(t, r, noise="sqrt"):
    """What a slope dx̂₀/dt = 1 adds to the first-order step from t to r (floats, r < t), by integrating the ODE."""
    if r == 0:
        return -t
    if noise == "linear":
        return r - t - r * math.log(r / t)
    return (r - t) * (1 - r) - r ** 0.5 * (2 * r ** 0.5 - 2 / 3 * r ** 1.5 - 2 * t ** 0.5 + 2 / 3 * t ** 1.5)


def heads_for(solver, heads=None, h="constant"):
    """`heads` or its default: both for ddm, as printed, and else project (constant h) or image. Raises ValueError."""
    heads = heads or ("both" if solver == "ddm" else "project" if h == "constant" else "image")
    if solver not in ("ddm", "ode", "ode2") or heads not in ("project", "image", "both", "forget"):
        raise ValueError(f"there is no solver {solver} with heads {heads}")
    if h != "constant" and (solver == "ode2" or heads == "project"):
        raise ValueError(f"solver ode2 and heads project are for the constant attenuation, not {h}: use ode or ddm")
    return heads


@torch.no_grad()
def sample(net, x1, steps, solver="ddm", grid="quadratic", clip=False, generator=None, *, h="constant", noise="sqrt",
           heads=None, delta=1e-3, final=False, watch=None):
    """From noise to images by `steps` calls net(x_t, t) -> (φ̂, ε̂), the first at t = 1. x1: [B, C, H, W] ~ N(0, I).

    solver: ddm (Algorithm 2, stochastic), ode (first order) or ode2 (second order from its second step; constant h
    only). heads: project, image, both or forget, what to make of two heads that disagree; None as `heads_for` says.
    clip: keep every x̂₀ in [-1, 1]. generator: of the stochastic solver's noise, one or a list of B. watch(t, x_t,
    x̂₀): called at every step, and at t = 0. Raises ValueError for what the attenuation can't have.
    """
    heads = heads_for(solver, heads, h)
    x, t_last, x0_last = x1, None, None
    ts = times(steps, grid, delta, final)
    for t, r in zip(ts, ts[1:]):
        t_, r_ = x.new_full((len(x),), t), x.new_full((len(x),), r)
        phi, eps = net(x, t_)                                                                           # Alg. 2, line 3
        if heads == "project":
            phi, eps = project(x, phi, eps, t_, noise)
        if clip:
            phi = clipped(phi, h)
        x0 = image_of(phi, h)
        if watch:
            watch(t, x, x0)
        if solver == "ddm":
            z = data.randn(x, generator) if r else torch.zeros_like(x)
            x = reverse_step(x, phi, eps, t_, t_ - r_, z, h, noise)                                     # Alg. 2, 4-7
        else:
            x = ode_step(x, phi, eps, t_, r_, h, noise, "image" if heads == "project" else heads)
            if solver == "ode2" and t_last:
                x = x + (x0 - x0_last) / (t - t_last) * second_order(t, r, noise)
            t_last, x0_last = t, x0
    if watch:
        watch(0.0, x, x)
    return x


# ------------------------------------------------------------------------------------------------------ 5 training

def train(run, settings, checkpoint, args, processes):
    """Train, or go on, in the run directory until step settings["iterations"]. Source: Algorithm 1 and ADM Sec. V-A."""
    if data.finished(run, settings, checkpoint, processes):
        return
    pretrained = settings["encoder"] == "swin_b" and settings["pretrained"] and checkpoint is None
    create = functools.partial(unet.create, pretrained=True) if pretrained else unet.create
    training = data.Training(run, settings, checkpoint, args, processes, network_of, create, torch.optim.AdamW)
    (net, ema, optimizer), images, mine = training.parts.values(), training.images, training.mine
    device, batch, iterations = processes.device, settings["batch_size"], settings["iterations"]
    alone = predictor_of(net, settings, args, processes)    # neither compiled nor waiting for the other processes
    shape = (training.network["channels"], *images.shape[2:])
    unet.warn_cost(alone, shape, batch, iterations - training.start, processes, training.network.get("condition", 0))
    model = predictor_of(unet.parallel(net, device, processes.world, args.compile), settings, args, processes)
    method = {key: settings[key] for key in ("h", "noise", "predict", "weights", "norm", "delta")}

    with training:
        for step, draw in training:
            if settings["task"] == "none":
                x0, condition = data.draw_batch(images, batch, draw), []
            else:
                x0, *condition = images.draw(batch, draw)
            x0 = x0 * scale_of(settings)
            t = settings["delta"] + (1 - settings["delta"]) * torch.rand(batch, generator=draw, device=device)
            eps = torch.randn(x0.shape, generator=draw, device=device)
            if settings["regression"]:      # x_t = 0: one guess, from the condition alone, and the loss |x̂₀ - x₀|²
                t, eps = torch.ones_like(t), torch.zeros_like(eps)
            phi = draw_phi(x0, settings["h"], draw)                                                     # Alg. 1, line 3

            values = loss(model, x0[mine], phi[mine], eps[mine], t[mine],                               # lines 4-7
                          condition=[c[mine] for c in condition], **method)
            optimizer.zero_grad(set_to_none=True)
            values.mean().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            lr = settings["lr"] * max((1 - step / iterations) ** 0.96, 0.1)     # polynomial decay: Sec. V-A, Table I
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

            decay = min(settings["ema"], (1 + step) / (10 + step))      # short at first: young weights are no use
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            training.record(values, t[mine], grad_norm, lr)


def predictor_of(net, settings, args, processes):
    """The predictor of a run: its network and the settings that say what the outputs are."""
    return predictor(net, settings["predict"], settings["precondition"], settings["sigma_data"], settings["h"],
                     settings["noise"], unet.use_bf16(args.precision, processes.device))


def network_of(settings, channels):
    """unet.UNet's arguments: two outputs, φ (K·C channels) and ε, or the one that `predict` names.

    channels: of the images. A task's condition is the image, and for inpainting the mask; a target has one channel.
    """
    task, given = settings["task"], {}
    if task != "none":
        given = {key: settings[key] for key in ("encoder", "fuse")} | {"condition": channels + (task == "inpainting")}
        channels = 1 if data.TARGETS[task] else channels
    outputs = {"both": (ATTENUATIONS[settings["h"]] * channels, channels), "noise": (channels,),
               "image": (ATTENUATIONS[settings["h"]] * channels,)}[settings["predict"]]
    return {"channels": channels, "outputs": outputs, "size": settings["image_size"],
            **{key: settings[key] for key in NETWORK}, **given}


def scale_of(settings):
    """What images are multiplied by: 1, or for the sine the range it can reach."""
    return 0.72 if settings["h"] == "sine" else 1.0


def solver_of(settings, args):
    """The solver asked for, or the default: second order where the attenuation has it."""
    return args.solver or ("ode2" if settings["h"] == "constant" else "ode")


def trained(run, settings, checkpoint, args, processes):
    """What a run samples with: its averaged network, that network's predictor, the steps and `sample`'s options."""
    net = unet.create(network_of(settings, image_channels(settings, checkpoint)), processes.device)[1]
    data.restore(run, checkpoint, ema=net)
    solver = solver_of(settings, args)
    heads = heads_for(solver, args.heads, settings["h"])
    options = {"solver": solver, "grid": args.grid or "quadratic", "heads": heads, "clip": args.clip,
               "final": args.final_at_delta, "h": settings["h"], "noise": settings["noise"],
               "delta": settings["delta"]}
    steps = 1 if settings["regression"] else args.steps or (10 if settings["task"] == "none" else 5)
    model = predictor_of(unet.parallel(net, processes.device, compile=args.compile), settings, args, processes)
    return net, model, steps, options


def image_channels(settings, checkpoint):
    """How many channels the images of a run have; those of a task are its network's condition."""
    network = checkpoint["network"]
    return network.get("channels", 3) if settings["task"] == "none" else (
        network.get("condition", 3) - (settings["task"] == "inpainting"))


def write_samples(run, settings, checkpoint, args, processes):
    """Sample with the EMA weights: two pictures into the run directory, or single PNGs into --out."""
    net, model, steps, options = trained(run, settings, checkpoint, args, processes)
    args.n, network = args.n or 64, network_of(settings, image_channels(settings, checkpoint))
    model, x = unet.fast_batch(model, args.n, network, processes.device)

    def draw(x1, generators, watch):
        return sample(model, x1, steps, generator=generators, watch=watch, **options) / scale_of(settings)

    data.draw_samples(draw, x, run, checkpoint, args, steps, options, processes)


def write_forward(run, settings, checkpoint, args, processes):
    """One image on its way to noise by the constant attenuation, and (1-t)² over the noise's variance."""
    noise = settings["noise"]

    def way(x0, eps, t, ts):
        return diffuse(x0, draw_phi(x0), eps, t, noise=noise), {"ddm": ((1 - ts) / std(ts, noise)) ** 2}
    data.forward_figure("ddm", way, settings, processes)


def write_solvers(run, settings, checkpoint, args, processes):
    """All solvers that this run's attenuation has, from the same noises."""
    net, model, _, options = trained(run, settings, checkpoint, args, processes)
    network = network_of(settings, image_channels(settings, checkpoint))
    model, x = unet.fast_batch(model, 3, network, processes.device)

    def draw(solver, steps, x1, generators):
        how = {**options, "solver": solver, "heads": heads_for(solver, args.heads, settings["h"])}
        return sample(model, x1, steps, generator=generators, **how) / scale_of(settings)
    names = ("ode2", "ode", "ddm") if settings["h"] == "constant" else ("ode", "ddm")
    data.solver_figure(draw, dict.fromkeys(names, 1), x, run, settings, args)


def painter(run, settings, checkpoint, args, processes):
    """How a run of a task answers conditions of any size: (draw(condition, generators, watch) -> x0, steps, options).
    """
    net, model, steps, options = trained(run, settings, checkpoint, args, processes)
    bf16, size = unet.use_bf16(args.precision, processes.device), args.window or settings["image_size"]
    stride, batch = 2 ** (len(settings["mult"]) - 1), max(1, 16 * 64 ** 2 // size ** 2)
    channels = network_of(settings, image_channels(settings, checkpoint))["channels"]

    def encode(condition):
        with torch.no_grad(), torch.autocast(condition.device.type, torch.bfloat16, enabled=bf16):
            return net.encode(condition)
    see = unet.windowed(model, encode, -(-size // stride) * stride, args.overlap or size // 4, batch)

    def draw(condition, generators, watch=None):
        h, w = condition.shape[-2:]
        condition = unet.padded(condition, net)
        x1 = data.randn(condition.new_zeros(1, channels, *condition.shape[-2:]), generators)
        if settings["regression"]:
            x1 = torch.zeros_like(x1)

        def cropped(t, x, x0):
            watch(t, x[..., :h, :w], x0[..., :h, :w])
        x0 = sample(see(condition), x1, steps, generator=generators, watch=cropped if watch else None, **options)
        return x0[..., :h, :w] / scale_of(settings)

    return draw, steps, options


def answer(run, settings, checkpoint, args, processes):
    """--sample and --evaluate of a task: what data.answer makes of this run's samples, and of those of --against."""
    draw, steps, options = painter(run, settings, checkpoint, args, processes)
    calls = f"{options['solver']}, {steps} call{'s' * (steps > 1)}"
    calls += f" × {args.ensemble} samples" if args.ensemble else ""
    draws = {"regression" if settings["regression"] else calls: draw}
    for other in args.against or ():
        saved = data.load_checkpoint(f"{other}/checkpoint.pt")
        theirs = {**saved["network"], **saved["method"], "image_size": saved["network"].get("size")}
        if any(theirs.get(key) != settings[key] for key in ("task", "image_size")) or (
                saved["network"].get("condition") != checkpoint["network"]["condition"]):
            raise data.Problem(f"{other} is no run of --task {settings['task']} at the same image size and channels", 2)
        with data.bad_arguments():
            draws[other] = painter(other, theirs, saved, args, processes)[0]
    data.answer(draws, run, settings, args, checkpoint, image_channels(settings, checkpoint), steps, options, processes)


# -------------------------------------------------------------------------------------------------- 6 command line

COMMON = dict(h="constant", noise="sqrt", predict="both", precondition=True, second="decoder", weights="edm", norm="l2",
              sigma_data=0.5, delta=1e-3, seed=0)
NO_TASK = dict(task="none", encoder="compact", fuse="concat", pretrained=True, edge_bits=False, regression=False)
DEFAULTS = {dataset: {**sizes, **COMMON, **NO_TASK} for dataset, sizes in unet.COMPACT.items()}
DEFAULTS["shapes"] |= dict(second="conv", sigma_data=0.7)
TABLE_I = dict(precondition=False, blocks=3, attention=(16, 8), mult=(1, 2, 2, 2), lr=1e-4, ema=0.9999, delta=1e-3)
PAPER = {"cifar10": {**TABLE_I, "width": 160, "batch_size": 128, "iterations": 800_000},
         "celebahq": {**TABLE_I, "width": 128, "batch_size": 48, "iterations": 400_000}}
NETWORK = ("width", "mult", "blocks", "attention", "dropout", "second")

# TASKS[task]: what a task changes for every dataset ("all"), for the shapes, for a folder, and by --preset paper, where
# it is ADM's Table I.
DEMO = dict(image_size=32, width=24, iterations=700, batch_size=16)
PATCHES = dict(image_size=128, width=64, mult=(1, 2, 4, 4), blocks=2, attention=(16,), dropout=0.0, batch_size=32,
               iterations=100_000, lr=1e-4, ema=0.9999)
SWIN = {**TABLE_I, "encoder": "swin_b", "width": 128, "mult": (1, 2, 4, 4), "blocks": 2, "batch_size": 16, "lr": 5e-5,
        "iterations": 200_000, "delta": 1e-4}
TASKS = {
    None: NO_TASK,
    "super_resolution": {"all": {"sigma_data": 0.5}, "shapes": DEMO, "folder": PATCHES,
                         "paper": {**SWIN, "image_size": 512, "batch_size": 12}},
    "inpainting": {"all": {"sigma_data": 0.5}, "shapes": DEMO, "folder": PATCHES,
                   "paper": {**SWIN, "image_size": 256, "width": 96, "mult": (1, 2, 4, 8), "batch_size": 48, "lr": 4e-5,
                             "iterations": 400_000}},
    "saliency": {"all": {"sigma_data": 1.0}, "shapes": DEMO, "folder": {**PATCHES, "image_size": 192},
                 "paper": {**SWIN, "image_size": 384}},
    "edges": {"all": {"sigma_data": 1.0}, "shapes": DEMO, "folder": PATCHES, "paper": {**SWIN, "image_size": 320}}}

FIGURES = {"forward": (write_forward, "dataset data_dir image_size seed noise"),            # and the flags each heeds
           "solvers": (write_solvers, "run dataset data_dir seed grid heads clip final_at_delta")}


def arguments(argv=None):
    """Parse the command line; a flag that was not given is None (or False, if it is a switch)."""
    parser, group = data.parser("ddm", __doc__, DEFAULTS, PAPER, steps="10, or 5 for a task")
    parser.set_defaults(n=None)
    add = group["method"].add_argument
    add("--h", choices=ATTENUATIONS, help="the attenuation function h_t")
    add("--noise", choices=("sqrt", "linear"), help="of standard deviation √t (the papers) or t (released code)")
    add("--predict", choices=("both", "noise", "image"), help="what the network is asked for")
    add("--second", choices=("decoder", "conv"), help="what makes the second output: a decoder, or two convolutions")
    add("--precondition", action=argparse.BooleanOptionalAction, help="unit-variance inputs and outputs")
    add("--weights", choices=("one", "inverse", "exponential", "edm"), help="λ₁ and λ₂: the rows of ADM's Table V")
    add("--norm", choices=("l2", "l1", "l1+l2"), help="the loss's distance")
    add("--delta", type=data.number(float, 0, 0.1, above=True), help="the smallest time, in (0, 0.1]")
    add = group["sampling"].add_argument
    add("--solver", choices=("ode2", "ode", "ddm"), help="second order (default), first, or Algorithm 2 (stochastic)")
    add("--grid", choices=GRIDS, help="times t = u² (default), or equal steps of t as the paper")
    add("--heads", choices=("project", "image", "both", "forget"),
        help="what to make of heads that disagree (default: both for ddm, else project)")
    add("--clip", action="store_true", help="keep every estimate x̂₀ in [-1, 1]")
    add("--final-at-delta", action="store_true", help="put the last network call at delta, as the paper")
    data.task_flags(parser, unet.ENCODERS)
    parser.epilog += data.task_table(TASKS)
    return parser.parse_args(argv)


@data.command
def main(argv=None):
    """The command line. Raises SystemExit: 1 or 2 with a sentence on stderr, 130 or 143 when stopped by a signal."""
    args = arguments(argv)
    write, of_run = data.figure(args, FIGURES)
    run, settings, checkpoint = data.open_run(
        "ddm", args, DEFAULTS, PAPER, (*NETWORK, "encoder", "fuse"), TASKS, of_run=of_run)
    with data.bad_arguments():                              # what can't go together is said before anything is started
        predictor(None, settings["predict"], settings["precondition"], h=settings["h"])
        heads_for(solver_of(settings, args), args.heads, settings["h"])
        args.trained_on = (checkpoint["method"] if checkpoint else settings)["data_dir"]
        data.check_task(settings, args)
        if write and settings["task"] != "none":
            raise ValueError(f"--solvers starts from noise alone, and {run} is of a task: try --evaluate")
        with torch.device("meta"):
            unet.UNet(**network_of(settings, 3))
    processes = data.start(args.device)
    if args.train:
        train(run, settings, checkpoint, args, processes)
    if args.sample or args.evaluate:
        checkpoint = data.load_checkpoint(run / "checkpoint.pt")
    if args.sample and settings["task"] == "none":
        write_samples(run, settings, checkpoint, args, processes)
    elif settings["task"] != "none":
        for evaluate in [True] * args.evaluate + [False] * args.sample:
            answer(run, settings, checkpoint, argparse.Namespace(**{**vars(args), "evaluate": evaluate}), processes)
    if write and processes.rank == 0:                       # one process's work
        write(run, settings, checkpoint, args, processes._replace(world=1))


if __name__ == "__main__":
    main()
