"""Image and noise on a quarter circle: x = cos η x₀ + sin η ε, so that sampling is an ODE in η.

Zhang, Ehinger and Drummond (2023) write diffusion's mixture of image and noise as a rotation. At
the angle η = 0 it is the image, at π/2 it is the noise, and the √ᾱ of older models is cos η. While
dx/dᾱ = x₀/(2√ᾱ) - ε/(2√(1-ᾱ)) is infinite at both ends, its first term at the noise, the second at
the image, dx/dη = -sin η x₀ + cos η ε is finite everywhere. So one may go back from noise to image
by any solver of ordinary differential equations, from Euler to Runge and Kutta. One network
predicts image and noise at once: to get x₀ from ε, one divides by cos η, 0 at the noise; to get ε
from x₀, by sin η, 0 at the image.

    python angular.py --train                        embedded shapes, minutes on two CPU cores
    python angular.py --train --dataset cifar10      CIFAR-10, on a GPU
    python angular.py --sample --solver euler        the paper's solver, by the newest run

    x₀        x0          [B, C, H, W]   the image, in [-1, 1]
    ε         eps         [B, C, H, W]   the noise, N(0, I)
    η_t       eta         [B] or number  the angle π t/(2T), in [0, π/2]
    x_t       x           [B, C, H, W]   cos η x₀ + sin η ε
    ẋ         velocity    [B, C, H, W]   dx/dη; the paper has dx/dt = η' dx/dη, with η' = π/(2T)
    R_θ, ε_θ  R, E        [B, C, H, W]   the network's two outputs, x̂₀ and ε̂
    η' Δ_t    h           number         a step back, from eta to s = eta - h
    t, T      i, T        whole numbers  the paper's times 0 ... T. The network's `t` is t/T = 2η/π
    ᾱ_t, β_t  alpha_bar, beta   float64  cos²η_t, and 1 - ᾱ_t/ᾱ_{t-1}
    γ         gamma       number         the weight of the velocity's loss (--velocity-weight)

Three choices here are not the paper's; the flag in brackets undoes each. They are a multistep
solver (--solver euler), outputs corrected to add up to x (--heads raw), and squared errors in the
loss (--norm rms): docs/angular.md says why.
"""

import functools
import math

import torch

import data
import unet

# --------------------------------------------------------------------------------------- 1 schedule

HALF_PI = math.pi / 2
SCHEDULES = ("angular", "linear")    # linear: DDPM's; 465 of 1000 times beyond 76.5° (angular: 150)


def like_image(t):
    """t [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


def alpha_bar(i, T=1000, schedule="angular"):
    """ᾱ_i = cos²η_i in float64. i: a tensor of whole numbers 0 ... T."""
    if schedule == "angular":
        return torch.sin(HALF_PI * (T - i.double()) / T) ** 2                # exactly 0 at i = T
    betas = beta(torch.arange(1, T + 1, device=i.device), T, "linear")
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])[i]


def beta(i, T=1000, schedule="angular"):
    """β_i = 1 - ᾱ_i/ᾱ_{i-1} in float64; linear: DDPM's. i: a tensor of whole numbers 1 ... T."""
    i = i.double()
    if schedule == "angular":
        h = HALF_PI / T                                       # sin²a - sin²b keeps its digits so
        betas = torch.sin((2 * i - 1) * h) * math.sin(h) / torch.sin((T - i + 1) * h) ** 2
        return betas.clamp(max=1)
    return 1e-4 + (0.02 - 1e-4) * (i - 1) / max(1, T - 1)


@functools.lru_cache(maxsize=None)
def angles(steps, schedule="angular", start=1.0, T=1000):
    """The sampler's angles: `steps` of them, and a last 0. They are evenly spaced, from `start` (a
    part of π/2); in the linear schedule i is evenly spaced. Raises ValueError.
    """
    if schedule not in SCHEDULES or not 0 < start <= 1 or steps < 1:
        raise ValueError(f"there are no {steps} angles of the schedule {schedule} from {start}")
    if schedule == "angular":
        return (*(HALF_PI * start * (1 - k / steps) for k in range(steps)), 0.0)
    if steps > T:
        raise ValueError(f"the {schedule} schedule has {T} times: take no more steps than that")
    i = torch.tensor([round(start * T * (1 - k / steps)) for k in range(steps)], device="cpu")
    kept = alpha_bar(i, T, schedule)
    return (*torch.atan2((1 - kept).sqrt(), kept.sqrt()).tolist(), 0.0)


# ---------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, eps, eta):
    """x at the angle eta [B] on the arc from image to noise."""
    eta = like_image(eta)
    return eta.cos() * x0 + eta.sin() * eps                                            # Eq. 4, 9


def velocity(x0, eps, eta):
    """dx/dη, what v-prediction (Salimans and Ho, 2022) asks for: ε at η = 0, and -x₀ at π/2. So x₀
    is cos η x - sin η ẋ, and ε is sin η x + cos η ẋ.
    """
    eta = like_image(eta)
    return -eta.sin() * x0 + eta.cos() * eps                                           # Eq. 10, 11


# ------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="both"):
    """The one place where the network's outputs get their meaning: model(x, t) -> (x̂₀, ε̂).

    predict: both; or "x0" or "eps" alone, from which the other follows: but not from x₀ at η = 0,
    and not from ε at π/2: there give `walk` a start below (start=0.999).
    """

    def model(x, t):
        eta = HALF_PI * like_image(t)
        outputs = net(x, t)
        first = outputs[0].to(x.dtype)
        last = outputs[-1].to(x.dtype)                        # the first, if it is the only one
        if predict == "x0":
            return first, (x - eta.cos() * first) / eta.sin()                          # Eq. 8
        if predict == "eps":
            return (x - eta.sin() * first) / eta.cos(), first                          # Eq. 6
        return first, last

    return model


def distance(error, norm="l2"):
    """Of each example, [B]: the mean square (l2), or its root (rms, the printed norm / √(CHW))."""
    if norm == "rms":
        return torch.linalg.vector_norm(error.flatten(1), dim=1) / error[0].numel() ** 0.5
    return error.square().flatten(1).mean(1)


def loss(model, x0, eps, eta, predict="both", gamma=1.0, norm="l2"):
    """The loss of each example, [B]: |R - x₀|² + |E - ε|² + γ |error of the velocity|², or of one.

    The first two add up to the squared errors of the velocity and of cos η R + sin η E, which
    should be x. So the third only weighs the velocity's error more. (For "rms" this does not hold.)
    """
    R, E = model(diffuse(x0, eps, eta), eta / HALF_PI)
    if predict == "eps":
        return distance(E - eps, norm)                                                 # Eq. 5
    if predict == "x0":
        return distance(R - x0, norm)                         # Eq. 7, where R lacks its t
    error = velocity(R, E, eta) - velocity(x0, eps, eta)
    heads = distance(R - x0, norm) + distance(E - eps, norm)
    return heads + gamma * distance(error, norm)                                       # Eq. 12


# ---------------------------------------------------------------------------------------- 4 sampler

def euler(v, x, eta, h):
    """From eta to eta - h along the tangent. It widens the circle √(1 + h²)-fold. v(x, eta): ẋ."""
    return x - h * v(x, eta)                                                           # Eq. 13


def midpoint(v, x, eta, h):
    """Second order, by the velocity in the middle of the step."""
    return x - h * v(x - h / 2 * v(x, eta), eta - h / 2)


def heun(v, x, eta, h):
    """Second order, by the mean of the velocities at both ends."""
    k1 = v(x, eta)
    k2 = v(x - h * k1, eta - h)
    return x - h / 2 * (k1 + k2)


def rk4(v, x, eta, h):
    """Fourth order, by Runge and Kutta's four velocities."""
    k1 = v(x, eta)
    k2 = v(x - h / 2 * k1, eta - h / 2)
    k3 = v(x - h / 2 * k2, eta - h / 2)
    k4 = v(x - h * k3, eta - h)
    return x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


RUNGE_KUTTA = {"euler": (euler, 1), "midpoint": (midpoint, 2), "heun": (heun, 2), "rk4": (rk4, 4)}
MULTISTEP = {"ddim3": 3, "ddim2": 2}                          # and their orders
SOLVERS = (*MULTISTEP, "ddim", *RUNGE_KUTTA, "cold", "ddpm")


def calls(solver, steps, last=None):
    """How many network calls `steps` steps make: one each, but for RUNGE_KUTTA's."""
    each = {rule: count for rule, (_, count) in RUNGE_KUTTA.items()}
    return (steps - 1) * each.get(solver, 1) + each.get(last or solver, 1)


def project(x, x0, eps, eta):
    """The nearest x̂₀ and ε̂ with cos η x̂₀ + sin η ε̂ = x. Their velocity stays what it was."""
    residual = diffuse(x0, eps, eta) - x
    return x0 - like_image(eta).cos() * residual, eps - like_image(eta).sin() * residual


def ddim_step(x0, eps, s):
    """To the angle s along the circle, with x̂₀ and ε̂ held."""
    return math.cos(s) * x0 + math.sin(s) * eps                                        # Eq. 6


def ancestral_step(x, x0, eta, s, z):
    """A draw of DDPM's posterior q(x_s | x, x₀), with z ~ N(0, I)."""
    beta_cos2 = math.sin(eta + s) * math.sin(eta - s)         # β cos² s = cos² s - cos² η
    mean = math.cos(eta) * math.sin(s) ** 2 * x + beta_cos2 * x0
    mean = mean / (math.cos(s) * math.sin(eta) ** 2)                                  # Eq. 3, Bayes
    spread = math.sin(s) * math.sqrt(beta_cos2) / (math.cos(s) * math.sin(eta))
    return mean + spread * z


def flow_time(eta):
    """τ at the angle eta, for which x/(cos η + sin η) = (1 - τ) x₀ + τ ε, as in flow matching."""
    return math.sin(eta) / (math.sin(eta) + math.cos(eta))


def multistep(history, end):
    """What a first-order step to the flow time `end` lacks, for y = x/(cos η + sin η).

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


@torch.no_grad()
def walk(net, x1, steps, solver="euler", heads="project", clip=False, generator=None, *,
         schedule="angular", start=1.0, last=None):
    """Noise to image, by net(x, t) -> (x̂₀, ε̂). Yields (t, x, x̂₀) a call; last (0, image, image).

    solver: euler (the paper's), midpoint, heun, rk4; ddim, along the circle; ddim2 and ddim3 (the
    command line's), the same with a memory of one or two calls; cold, with ε̂ made of x̂₀; ddpm,
    stochastic. heads: project, so that they agree with x; or raw. clip: keep x̂₀ in [-1, 1] (ε̂
    follows). last: midpoint, for heun's and rk4's last step. generator: ddpm's, one or a list of B.
    """
    check_solver(solver, heads, last)
    seen = []

    def look(x, eta):
        eta_ = x.new_full((len(x),), eta)
        x0, eps = net(x, eta_ / HALF_PI)
        if heads == "project" and solver != "cold":
            x0, eps = project(x, x0, eps, eta_)
        if clip:
            x0 = x0.clamp(-1, 1)
        if eta and (clip or solver == "cold"):                # the noise beside this image
            eps = (x - math.cos(eta) * x0) / math.sin(eta)                             # Eq. 8
        seen.append((eta / HALF_PI, x, x0))
        return x0, eps

    def v(x, eta):
        return velocity(*look(x, eta), x.new_full((len(x),), eta))

    etas = angles(steps, schedule, start)
    x = x1
    history = []
    for eta, s in zip(etas, etas[1:]):
        rule = last if last and s == 0 else solver
        if rule in RUNGE_KUTTA:
            step, _ = RUNGE_KUTTA[rule]
            x = step(v, x, eta, eta - s)
        else:
            x0, eps = look(x, eta)
            if rule == "ddpm":
                x = ancestral_step(x, x0, eta, s, data.randn(x, generator))
            else:
                x = ddim_step(x0, eps, s)
            history = [(flow_time(eta), x0), *history][:MULTISTEP.get(rule, 1)]
            if len(history) > 1:
                x = x + (math.cos(s) + math.sin(s)) * multistep(history, flow_time(s))
        yield from seen
        seen.clear()
    yield 0.0, x, x


def sample(net, x1, steps, *options, **more):
    """The image at the end of a `walk`."""
    for _, x, _ in walk(net, x1, steps, *options, **more):
        pass
    return x


def check_solver(solver, heads="project", last=None):
    """Raise ValueError for what cannot be."""
    if solver not in SOLVERS or heads not in ("project", "raw"):
        raise ValueError(f"there is no solver {solver} with heads {heads}")
    if last not in (None, "midpoint") or (last and solver not in ("heun", "rk4")):
        raise ValueError(f"a last step by midpoint is for heun and rk4, not {solver}")


# --------------------------------------------------------------------------------------- 5 training

def train(run):
    """Eq. 12, or Eq. 5 or 7, from where the run's checkpoint stopped."""
    s = run.settings
    images = data.load(run)
    net, ema = run.networks(unet.UNet, network(s, images.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=s.lr, fused=True)
    model = predictor(run.ready(net, training=True), s.predict)

    for step, g in run.steps(net, ema, optimizer):            # resumes, logs, saves, ends on Ctrl-C
        x0 = data.batch(images, s.batch_size, g)
        eta = draw_angles(len(x0), s.schedule, g)
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        x0, eta, eps = run.share(x0, eta, eps)                # this process's part of the batch

        losses = loss(model, x0, eps, eta, s.predict, s.velocity_weight, s.norm)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        data.average(ema, net, s.ema, step)
        run.record(losses, eta / HALF_PI)


def draw_angles(n, schedule, generator):
    """n random training angles [B]: any in [0, π/2), or, of the linear schedule, one of its T."""
    u = torch.rand(n, generator=generator, device=generator.device)
    if schedule == "angular":
        return HALF_PI * u
    own = torch.tensor(angles(1000, schedule)[:-1], device=u.device)
    return own[(u * len(own)).long()]


# ----------------------------------------------------------------------------------- 6 command line

FLAGS = dict(
    predict=("both", "what the network is asked for", ("both", "x0", "eps")),
    schedule=("angular", "of the angle: even, or DDPM's linear β", SCHEDULES),
    velocity_weight=(1.0, "γ, the weight of the velocity's loss, for both outputs", (0, 1000)),
    norm=("l2", "of the errors: squared, or rms, as printed", ("l2", "rms")),
    second=("decoder", "what makes the second output", ("decoder", "conv")))
SAMPLING = dict(
    steps=(10, "steps of the solver; in each midpoint and heun call twice, rk4 four times", None),
    solver=("ddim3", "of order 3, 2, 1, Runge and Kutta's, cold diffusion's, DDPM's", SOLVERS),
    last=("", "heun's and rk4's last step; without it they leave noise", ("midpoint",)),
    heads=("project", "outputs made to agree with x, or raw", ("project", "raw")),
    clip=(None, "keep every x̂₀ in [-1, 1] (default: if the network names eps alone)", None))
DDIM = dict(width=128, blocks=2, attention=(16,), dropout=0.1, batch_size=128, lr=2e-4, ema=0.9999)
PRESETS = {                         # the paper builds on DDIM, and gives iterations for churches
    "shapes": dict(second="conv"),
    "paper cifar10": DDIM | dict(mult=(1, 2, 2, 2), iterations=800_000),
    "paper celeba": DDIM | dict(mult=(1, 2, 2, 2, 4), iterations=500_000),
    "paper lsun-church": DDIM | dict(image_size=256, mult=(1, 1, 2, 2, 4, 4), dropout=0.0, lr=2e-5,
                                     batch_size=64, ema=0.999, iterations=1_135_000)}


def network(s, channels):
    """unet.UNet's arguments: an output for x̂₀ and one for ε̂, or one of the two."""
    outputs = (channels,) * (2 if s.predict == "both" else 1)
    return dict(channels=channels, outputs=outputs, second=s.second, **unet.sizes(s))


def sampler(run):
    """walk's options, as asked for or by default. Raises ValueError for what cannot be."""
    s, args = run.settings, run.args
    last = args.last or None
    check_solver(args.solver, args.heads, last)
    if s.predict == "x0" and args.solver in ("heun", "rk4") and not last:
        raise ValueError(f"{args.solver} ends at η = 0, where x0 tells no ε: add --last midpoint")
    endless = s.predict == "eps" and s.schedule == "angular"  # its x̂₀ at π/2 would be infinite
    start = 0.999 if endless else 1.0
    angles(args.steps, s.schedule, start)
    clip = s.predict == "eps" if args.clip is None else args.clip
    return dict(solver=args.solver, heads=args.heads, last=last, schedule=s.schedule, clip=clip,
                start=start)


def trained(run):
    """The model to sample with: the averaged weights, and what their outputs mean."""
    return predictor(run.ready(run.averaged(unet.UNet)), run.settings.predict)


def write_samples(run):
    """Pictures or single PNGs, drawn with the averaged weights."""
    model, steps, options = trained(run), run.args.steps, sampler(run)

    def walked(x1, generators):
        return walk(model, x1, steps, generator=generators, **options)

    data.draw(run, walked, calls(options["solver"], steps, options["last"]), steps=steps, **options)


@data.command
def main(argv=None):
    """The command line. Exits with 2 for bad arguments, 1 for other problems, 130 for Ctrl-C."""
    run = data.open_run("angular", __doc__, FLAGS | unet.FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals(), torch.device("meta"):               # refuse first what cannot be
        unet.UNet(**network(run.settings, 3))
        sampler(run)
    if run.args.train:
        train(run)
    if run.args.sample:
        write_samples(run)


if __name__ == "__main__":
    main()
