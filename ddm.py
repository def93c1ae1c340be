"""Decoupled Diffusion Models: the image fades to zero while, independently, zero grows into noise.

DDM (Huang et al. 2023), with its journal version ADM. Older models mix image and noise along one
chain, and go back by small, nearly Gaussian steps. In DDM x_t is a sum of two parts. A known rate
h_t fades the image from x₀ at t = 0 to 0 at t = 1; a Wiener process, √t ε at t, grows from 0.
One network is taught both parts of x_t: φ, the parameters of h_t, which give the image; and ε. Two
parts with a target each are easier to learn, the papers argue, than noise deep in a mixture. As h_t
has an integral in closed form, a step back of any size s is a Gaussian, for the x₀ that φ names.
One step from t = 1 to 0 is possible, but its images are soft and alike: at t = 1 x_t tells nothing
of the image, and a step to 0 adds no noise (its variance is s (t - s)/t). The papers take ten.

    python ddm.py --train                        embedded shapes, minutes on two CPU cores
    python ddm.py --train --dataset cifar10      CIFAR-10, on a GPU
    python ddm.py --sample --steps 10            from the newest run

    x₀      x0            [B, C, H, W]    the image, in [-1, 1]
    ε       eps           [B, C, H, W]    the noise, N(0, I)
    t       t             [B]             time in [0, 1]; the network sees none below δ = delta
    s       s             [B]             a step back in time, from t to r = t - s
    x_t     xt            [B, C, H, W]    x₀ + H_t + √t ε
    φ       phi           [B, K·C, H, W]  h_t's parameters, K per value of x₀; h_t constant: φ = -x₀
    H_t     H             [B, C, H, W]    ∫₀ᵗ h_t dt: 0 at t = 0, -x₀ at t = 1
    λ₁, λ₂  loss_weights  [B]             weights of the two losses

A hat is a guess. The equations' numbers are DDM's. Five choices, measured in docs/ddm.md, are not
the paper's; a flag undoes each: training times dense near t = 0 (--time-power 1), preconditioned
outputs (--no-precondition), outputs corrected to add up to x_t (--heads raw), a multistep solver
(--solver ddm, Algorithm 2), and small steps near t = 0 (--grid uniform).
"""

import math

import torch

import data
import unet

# --------------------------------------------------------------------------------------- 1 schedule

def like_image(t):
    """t [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


def H(phi, t, h="constant"):
    """The attenuation H_t = ∫₀ᵗ h. phi [B, K·C, H, W], t [B] in [0, 1] -> [B, C, H, W]."""
    if h == "constant":
        return phi * like_image(t)                            # h_t = c, so H_t = c t
    return other_H(phi, like_image(t), h)                     # the papers' other four: section 7


def draw_phi(x0, h="constant", generator=None):
    """Parameters φ for which x₀ + H₁ = 0. What this leaves free is drawn. -> [B, K·C, H, W]"""
    if h == "constant":
        return -x0
    return draw_other_phi(x0, h, generator)                   # section 7


def image_of(phi, h="constant"):
    """The image that φ attenuates: x₀ = -H₁."""
    return -H(phi, phi.new_ones(len(phi)), h)


def std(t, noise="sqrt"):
    """The noise's standard deviation: √t (Eq. 7), or t as in the released code ("linear")."""
    return t.sqrt() if noise == "sqrt" else t


def flow_time(t, noise="sqrt"):
    """τ = n/(1 - t + n), where x_t has 1 - t of the image and n of the noise. For h_t constant.

    It is flow matching's time: x_t/(1 - t + n) goes straight from x₀ to ε as τ goes from 0 to 1.
    """
    n = t ** 0.5 if noise == "sqrt" else t
    return n / (1 - t + n)


def at_flow_time(tau):
    """The t whose flow time is tau > 0. With the noise n = √t, tau (1 - n² + n) = n gives n."""
    n = (math.sqrt((1 - tau) ** 2 + 4 * tau ** 2) - (1 - tau)) / (2 * tau)
    return n ** 2


GRIDS = {"flow": at_flow_time, "quadratic": lambda u: u ** 2, "uniform": lambda u: u}


def times(steps, grid="flow", delta=1e-3):
    """The sampler's times 1 = t₀ > t₁ > ... > 0. The network sees all but the 0, none below δ.
    grid: equal steps of t ("uniform", Algorithm 2), of √t ("quadratic") or of flow time ("flow",
    the last about half). Both of these are dense near t = 0, where √t is steep. ValueError.
    """
    if grid not in GRIDS:
        raise ValueError(f"there is no grid {grid}")
    last = (0.5 if grid == "flow" else 1) / steps             # where u stops
    last = max(delta if grid == "uniform" else delta ** 0.5, last)
    gap = (1 - last) / max(1, steps - 1)
    even = [1 - i * gap for i in range(steps)]
    return [max(GRIDS[grid](u), delta) for u in even] + [0.0]


# ---------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, phi, eps, t, h="constant", noise="sqrt"):
    """x_t: the faded image and the grown noise. If h_t is constant: (1 - t) x₀ + √t ε."""
    return x0 + H(phi, t, h) + like_image(std(t, noise)) * eps                         # Eq. 6, 7


def noise_of(xt, phi, t, h="constant", noise="sqrt"):
    """The noise in x_t, if φ is right."""
    return (xt - image_of(phi, h) - H(phi, t, h)) / like_image(std(t, noise))          # Eq. 20


# ------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="both", precondition=True, sigma_data=0.5, h="constant", noise="sqrt"):
    """The one place where the network's outputs get their meaning: model(x_t, t) -> (φ̂, ε̂).

    As printed (precondition=False) the outputs are φ and ε; with predict="x0" there is φ alone, and
    ε follows by Eq. 20. Otherwise see `preconditioned`. Raises ValueError.
    """
    if precondition and h != "constant":
        raise ValueError(f"preconditioned outputs are not for --h {h}: add --no-precondition")
    if predict == "eps" and not precondition:
        raise ValueError("of ε alone, x̂₀ at t = 1 is 0/0: take --precondition and --h constant")

    def model(x, t):
        keep = like_image(1 - t)
        n = like_image(std(t, noise))
        V = keep ** 2 * sigma_data ** 2 + n ** 2              # the variance of x_t
        seen = x / V.sqrt() if precondition else x
        outputs = net(seen, t)
        first = outputs[0].to(x.dtype)
        last = outputs[-1].to(x.dtype)                        # the first, if it is the only one
        if precondition:
            return preconditioned(x, first, last, keep, n, V, sigma_data)
        if predict == "x0":
            return first, noise_of(x, first, t, h, noise)
        return first, last

    return model


def preconditioned(x, first, last, keep, n, V, sigma_data):
    """As in EDM (Karras et al. 2022): the best linear guesses from x_t, and what the network adds.
    Given x_t, φ tells ε. So the outputs have one target: (keep σ_d ε - n x₀/σ_d)/√V, of variance 1
    if the images' is σ_d². (Two outputs, of two decoders, are still better: docs/ddm.md.)
    """
    phi = -keep * sigma_data ** 2 / V * x + sigma_data * n / V.sqrt() * first
    eps = n / V * x + keep * sigma_data / V.sqrt() * last
    return phi, eps


def loss_weights(t, kind="edm", noise="sqrt", delta=1e-3):
    """(λ₁, λ₂), each [B]: a row of ADM's Table V. Near t = 0 x_t shows the image: φ̂'s error is
    small, and λ₁ large. Near t = 1 ε̂'s is small, and λ₂ large. ("exponential" is the other way.)
    """
    if kind == "one":
        return torch.ones_like(t), torch.ones_like(t)
    if kind == "exponential":
        return t.exp(), (1 - t).exp()
    t = t.clamp(delta, 1 - delta)
    if kind == "inverse":
        return 1 / t, 1 / (1 - t)
    n2 = std(t, noise) ** 2
    V = (1 - t) ** 2 + n2                                     # in the paper, t² - t + 1
    return V / n2, V / (1 - t) ** 2


def distance(a, b, norm="l2"):
    """The mean error of each example, [B]: l2 (squared), l1, or l1+l2."""
    error = (a - b).flatten(1)
    l1 = error.abs().mean(1)
    l2 = (error ** 2).mean(1)
    return {"l1": l1, "l2": l2, "l1+l2": l1 + l2}[norm]


def loss(model, x0, phi, eps, t, h="constant", noise="sqrt", predict="both", weights="edm",
         norm="l2", delta=1e-3):
    """Algorithm 1's loss of each example, [B]; of one term alone if `predict` names one."""
    xt = diffuse(x0, phi, eps, t, h, noise)
    phi_hat, eps_hat = model(xt, t)
    lambda_1, lambda_2 = loss_weights(t, weights, noise, delta)
    of_image = lambda_1 * distance(phi_hat, phi, norm)
    of_noise = lambda_2 * distance(eps_hat, eps, norm)
    return {"both": of_image + of_noise, "x0": of_image, "eps": of_noise}[predict]     # Eq. 10


# ---------------------------------------------------------------------------------------- 4 sampler

SOLVERS = {"ode3": 3, "ode2": 2, "ode": 1, "ddm": 1}          # and their orders


def reverse_step(xt, phi, eps, t, s, z, h="constant", noise="sqrt"):
    """One step of Algorithm 2, from t to r = t - s: a draw of q(x_r | x_t, x₀), by z ~ N(0, I)."""
    r = t - s
    if noise == "sqrt":
        pull, variance = s / t.sqrt(), s * r / t
    else:
        pull, variance = (t ** 2 - r ** 2) / t, r ** 2 * (t ** 2 - r ** 2) / t ** 2
    mean = xt + H(phi, r, h) - H(phi, t, h) - like_image(pull) * eps                   # Eq. 11
    return mean + like_image(variance.clamp(min=0).sqrt()) * z                         # Eq. 11


def ode_step(xt, phi, eps, t, r, h="constant", noise="sqrt"):
    """From t to r along dx/dt = h_t + ε d√t/dt, φ̂ and ε̂ held; h constant: -x̂₀ + ε̂/(2√t)."""
    growth = like_image(std(r, noise) - std(t, noise))
    return xt + H(phi, r, h) - H(phi, t, h) + growth * eps


def multistep(history, end):
    """What to add to a first-order step to the flow time `end`, for y = x/(1 - t + n).

    history: 2 or 3 calls' (flow time, x̂₀), the newest first. In flow time dy/dτ = (y - x̂₀)/τ. The
    step holds x̂₀; here it follows a line or a parabola through the calls, exactly (docs/ddm.md).
    """
    (tau0, x0), (tau1, x1) = history[:2]
    log = end * math.log(tau0 / end) if end else 0.0
    slope = (x0 - x1) / (tau0 - tau1)
    gain = slope * (log - (tau0 - end))
    if len(history) == 3 and end:                             # for the last step a line is better
        tau2, x2 = history[2]
        bend = (slope - (x1 - x2) / (tau1 - tau2)) / (tau0 - tau2)
        gain = gain + bend * ((tau0 - end) * (tau1 + end) - (tau0 + tau1) * log)
    return gain


def project(xt, phi, eps, t, h="constant", noise="sqrt"):
    """Outputs corrected so that x̂₀ + H_t + √t ε̂ = x_t, which a trained network misses. The error
    is taken out by the least change to both; for other attenuations, out of ε̂ alone.
    """
    if h != "constant":
        return phi, noise_of(xt, phi, t, h, noise)
    keep = like_image(1 - t)
    n = like_image(std(t, noise))
    residual = (xt + keep * phi - n * eps) / (keep ** 2 + n ** 2)
    return phi - keep * residual, eps + n * residual


@torch.no_grad()
def walk(net, x1, steps, solver="ddm", grid="flow", clip=False, generator=None, *,
         h="constant", noise="sqrt", heads=None, delta=1e-3):
    """From noise to image by `steps` calls net(x_t, t) -> (φ̂, ε̂). Yields (t, x_t, x̂₀) at each
    call, and (0, image, image) at the end.

    solver: ddm, Algorithm 2 (its grid is uniform), stochastic; ode, its deterministic step; ode2
    and ode3, of higher order as soon as there are calls enough. heads: raw (ddm's default, as
    printed) or project (the others'). generator: of ddm's noise, one or a list of B. ValueError.
    """
    heads = heads or ("raw" if solver == "ddm" else "project")
    check_solver(solver, heads, h, clip)
    ts = times(steps, grid, delta)
    x = x1
    history = []
    for t, r in zip(ts, ts[1:]):
        t_ = x.new_full((len(x),), t)
        r_ = x.new_full((len(x),), r)
        phi, eps = net(x, t_)                                                  # Alg. 2, line 3
        if heads == "project":
            phi, eps = project(x, phi, eps, t_, h, noise)
        if clip:
            phi = phi.clamp(-1, 1)
            eps = noise_of(x, phi, t_, h, noise) if heads == "project" else eps
        x0 = image_of(phi, h)
        yield t, x, x0
        if solver == "ddm":
            z = data.randn(x, generator) if r else torch.zeros_like(x)
            x = reverse_step(x, phi, eps, t_, t_ - r_, z, h, noise)            # Alg. 2, lines 4-7
        else:
            x = ode_step(x, phi, eps, t_, r_, h, noise)
            history = [(flow_time(t, noise), x0), *history][:SOLVERS[solver]]
        if len(history) > 1:
            size = like_image(1 - r_ + std(r_, noise))
            x = x + size * multistep(history, flow_time(r, noise))
    yield 0.0, x, x


def sample(net, x1, steps, *options, **more):
    """The image at the end of a `walk`."""
    for _, x, _ in walk(net, x1, steps, *options, **more):
        pass
    return x


def check_solver(solver, heads, h, clip=False):
    """Raise ValueError for what cannot be."""
    if solver not in SOLVERS or heads not in ("project", "raw"):
        raise ValueError(f"there is no solver {solver} with heads {heads}")
    if h != "constant" and (clip or SOLVERS[solver] > 1):
        raise ValueError(f"with h {h} take solver ode or ddm, and do not clip")


# --------------------------------------------------------------------------------------- 5 training

def train(run):
    """Algorithm 1, from where the run's checkpoint stopped."""
    s = run.settings
    images = data.load(run)
    net, ema = run.networks(unet.UNet, network(s, images.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=s.lr, fused=True)
    model = predictor(run.ready(net, training=True), **meaning(s))

    for step, g in run.steps(net, ema, optimizer):            # resumes, logs, saves, ends on Ctrl-C
        x0 = SCALE.get(s.h, 1) * data.batch(images, s.batch_size, g)           # section 7
        t = draw_times(len(x0), s.time_power, g)                               # Alg. 1, line 3
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        phi = draw_phi(x0, s.h, g)
        x0, phi, eps, t = run.share(x0, phi, eps, t)          # this process's part of the batch

        losses = loss(model, x0, phi, eps, t, s.h, s.noise, s.predict, s.weights, s.norm)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = s.lr * max((1 - step / s.iterations) ** 0.96, 0.1)                # ADM, Table I
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        data.average(ema, net, s.ema, step)
        run.record(losses, t)


def draw_times(n, power, generator, delta=1e-3):
    """n training times [B] in [δ, 1]: u^power of uniform u. Power 1 is the paper's: then 92 of 100
    have √t > .3 (1 - t). Power 3: 58 of 100 (docs/ddm.md).
    """
    u = torch.rand(n, generator=generator, device=generator.device)
    return delta + (1 - delta) * u ** power


# ----------------------------------------------------------------------------------- 6 command line

FLAGS = dict(
    h=("constant", "the attenuation h_t",
       ("constant", "linear", "quadratic", "exponential", "sine")),
    noise=("sqrt", "its deviation: √t (the papers) or t (the released code)", ("sqrt", "linear")),
    predict=("both", "what the network is asked for: x0 (as φ), eps", ("both", "x0", "eps")),
    second=("decoder", "what makes the second output", ("decoder", "conv")),
    precondition=(True, "input and outputs of variance 1", None),
    time_power=(3.0, "training times are this power of uniform u: 1 in the paper", (1, 10)),
    weights=("edm", "λ₁ and λ₂: a row of ADM's Table V", ("one", "inverse", "exponential", "edm")),
    norm=("l2", "of the errors in the loss", ("l2", "l1", "l1+l2")),
    sigma_data=(0.5, "the images' root mean square, for --precondition", None))
SAMPLING = dict(
    steps=(10, "steps of the solver, each a network call", None),
    solver=("", "order 3, 2, 1, or Algorithm 2 (ode3; ode if h is not constant)", tuple(SOLVERS)),
    grid=("flow", "even steps of flow time (of noise √t), √t, or t (paper)", tuple(GRIDS)),
    heads=("", "outputs that add up to x_t, or raw (project; ddm: raw)", ("project", "raw")),
    clip=(False, "keep every x̂₀ in [-1, 1]", None))
PAPER = dict(precondition=False, time_power=1.0, blocks=3, attention=(16, 8), lr=1e-4, ema=0.9999)
PRESETS = {
    "shapes": dict(second="conv", sigma_data=0.7),
    "paper cifar10": PAPER | dict(width=160, batch_size=128, iterations=800_000),       # Table I
    "paper celebahq": PAPER | dict(width=128, mult=(1, 2, 2, 2), batch_size=48)}


def network(s, channels):
    """unet.UNet's arguments: outputs of K·C channels, for φ, and of C, for ε, or one of the two."""
    k = ATTENUATIONS[s.h] * channels
    outputs = {"both": (k, channels), "x0": (k,), "eps": (channels,)}[s.predict]
    return dict(channels=channels, outputs=outputs, second=s.second, **unet.sizes(s))


def meaning(s):
    """predictor's arguments: what the outputs of a run are."""
    names = ("predict", "precondition", "sigma_data", "h", "noise")
    return {name: getattr(s, name) for name in names}


def sampler(run):
    """walk's options, as asked for or by default. Raises ValueError for what cannot be."""
    s, args = run.settings, run.args
    solver = args.solver or ("ode3" if s.h == "constant" else "ode")
    heads = args.heads or ("raw" if solver == "ddm" else "project")
    check_solver(solver, heads, s.h, args.clip)
    return dict(solver=solver, grid=args.grid, heads=heads, clip=args.clip, h=s.h, noise=s.noise)


def trained(run):
    """The model to sample with: the averaged weights, and what their outputs mean."""
    return predictor(run.ready(run.averaged(unet.UNet)), **meaning(run.settings))


def write_samples(run):
    """Pictures or single PNGs, drawn with the averaged weights."""
    model = trained(run)
    options = sampler(run)
    scale = SCALE.get(run.settings.h, 1)

    def walked(x1, generators):
        for t, x, x0 in walk(model, x1, run.args.steps, generator=generators, **options):
            yield t, x / scale, x0 / scale

    data.draw(run, walked, calls=run.args.steps, **options)


@data.command
def main(argv=None):
    """The command line. Exits with 2 for bad arguments, 1 for other problems, 130 for Ctrl-C."""
    run = data.open_run("ddm", __doc__, FLAGS | unet.FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals(), torch.device("meta"):               # refuse first what cannot be
        predictor(None, **meaning(run.settings))
        unet.UNet(**network(run.settings, 3))
        sampler(run)
    if run.args.train:
        train(run)
    if run.args.sample:
        write_samples(run)


# ------------------------- 7 the other attenuations (ADM's Fig. 7), which a first reading can skip

ATTENUATIONS = {"constant": 1, "linear": 2, "quadratic": 3, "exponential": 2, "sine": 1}      # h: K
SINE_BOUND = 0.724611           # the largest |x₀| that (1 - cos a)/a reaches,
SINE_RANGE = 2.331122           # at a = ± this
SCALE = {"sine": 0.72}          # so images are multiplied by this


def other_H(phi, t, h):
    """H_t for h_t = a t + c, a t² + b t + c, e^{a t} + c and sin(a t); t is [B, 1, 1, 1]."""
    if h == "sine":                                           # (1 - cos(a t))/a keeps its digits so
        return phi * t ** 2 / 2 * torch.sinc(phi * t / (2 * math.pi)) ** 2
    a, *b, c = phi.chunk(ATTENUATIONS[h], dim=1)
    if h == "linear":
        return a * t ** 2 / 2 + c * t
    if h == "quadratic":
        return a * t ** 3 / 3 + b[0] * t ** 2 / 2 + c * t
    return expm1_over(a, t) + c * t


def expm1_over(a, t):
    """(e^{a t} - 1)/a, and its limit t where a is 0."""
    zero = a.abs() < 1e-30
    return torch.where(zero, t.expand_as(a), torch.expm1(a * t) / torch.where(zero, 1.0, a))


def draw_other_phi(x0, h, generator=None):
    """φ with x₀ + H₁ = 0: a and b are drawn from N(0, 1) (ADM, Sec. V-A), and c follows. No network
    can learn what was drawn: for h_t = a t + c, x_t explains at most 1/28 of the variance of a.
    """
    if h == "sine":
        return -x0.sign() * solve_sine(x0.abs())
    free = [data.randn(x0, generator) for _ in range(ATTENUATIONS[h] - 1)]
    without_c = torch.cat([*free, 0 * x0], dim=1)             # for a t + c, c is -x₀ - a/2
    return torch.cat([*free, image_of(without_c, h) - x0], dim=1)


def solve_sine(size):
    """a >= 0 with (1 - cos a)/a = size, by bisection: H₁ is monotone on this branch. ValueError."""
    if size.device.type == "cpu" and size.max() > SINE_BOUND:                 # a GPU would wait
        raise ValueError(f"the sine reaches images in ±{SINE_BOUND} only: scale them")
    low = torch.zeros_like(size)
    high = torch.full_like(size, SINE_RANGE)
    for _ in range(60):
        a = (low + high) / 2
        short = 2 * (a / 2).sin() ** 2 < a * size
        low, high = torch.where(short, a, low), torch.where(short, high, a)
    return a


if __name__ == "__main__":
    main()
