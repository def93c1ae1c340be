"""Image and noise on a quarter circle: x = cos η x₀ + sin η ε, and sampling is an ordinary differential equation in η.

Zhang, Ehinger and Drummond (2023) write diffusion's mixture of image and noise as a rotation: at the angle η = 0 it is
the image, at π/2 the noise, and the √ᾱ of older models is cos η. Its derivative dx/dη = -sin η x₀ + cos η ε is finite
everywhere, where d/dᾱ is infinite at both ends; so one may walk back from noise to image by any solver of ordinary
differential equations, from Euler to Runge and Kutta. One network names the image and the noise at once, because each
is hard to get from the other at one end of the arc. Their combination dx/dη is the v of Salimans and Ho (2022), so
that the paper's gradient loss is the loss of v-prediction.

    python angular.py --train                        train on the embedded shapes, in runs/angular-shapes/ (minutes)
    python angular.py --train --dataset cifar10      train on CIFAR-10, in runs/angular-cifar10/
    python angular.py --sample --steps 10            sample from the newest run
    python angular.py --schedules                    draw Figures 2 and 3; --errors, Figure 4; --estimates, Figure 9

Symbols, of the paper and of this code:

    x₀        x0          [B, C, H, W]   the image, in [-1, 1]
    ε         eps         [B, C, H, W]   the noise, N(0, I)
    η_t       eta         [B], a number  the angle, in [0, π/2]; the network is told t = η/(π/2), in [0, 1]
    x_t       x           [B, C, H, W]   cos η x₀ + sin η ε
    ẋ         velocity    [B, C, H, W]   dx/dη. The paper's is dx/dt = η' dx/dη, with η' = π/(2T)
    R_θ, ε_θ  R, E        [B, C, H, W]   the network's x̂₀ and ε̂ (in the sampler, which has no others, x0 and eps)
              residual    [B, C, H, W]   cos η x̂₀ + sin η ε̂ - x: 0 where two heads agree with x
    Δ_t       h, s        numbers        a step back, from eta to s = eta - h
    t, T      i, T        whole numbers  the paper's times, i = 0 ... T, T = 1000: here of the schedules only
    ᾱ_t, β_t  alpha_bar,  float64        cos²η_t, and 1 - ᾱ_t/ᾱ_{t-1}
              beta
    γ         gamma       a number       the weight of the velocity's loss

Equations used: the arc, Eq. 9 (Eq. 4 with ᾱ = cos²η); the velocity, Eq. 10 and 11; the loss, Eq. 12, whose parts
alone are Eq. 5 and 7; Euler's step, Eq. 13; DDIM's, Eq. 6; cold diffusion's, Eq. 8; and DDPM's chain, Eq. 1 and 3.

Where this differs from the paper, and why:

- η is continuous, in training and in sampling: midpoint and RK4 ask in the middle of a step. T is for the figures, and
  for --schedule linear, DDPM's, on which the paper's baselines live.
- The command line's default solver, ddim2, is not in the paper: DDIM's rotation to second order by one call a step,
  from the x̂₀ of the step before. On small trained networks it was the best or nearly so (README, "Results").
  --solver euler is the paper's Eq. 13; which rule its tables used, it does not say.
- Heun's and RK4's last stage lies at η = 0, where E[ε | x₀] = 0 says nothing of the noise still in x: they leave h/2
  and h/6 of it in all fine detail. --last midpoint mends that; midpoint itself never asks there.
- DDIM with two heads, Eq. 6 as it stands (--heads raw), forgets x: it puts the heads' residual into the image anew at
  every step. By default the heads are projected first, and then it is a rotation, cos h x - sin h ẋ. The paper does
  not say which was its "DDIM + x̂₀, ε̂". Euler sees ẋ alone, and so always keeps x.
- A noise-only network has x̂₀ = (x - sin η ε̂)/cos η, infinite at π/2. It starts at .999 of π/2, the last of 1000 times
  before it, where 1/cos is still 637, and so its x̂₀ is clipped, unless --no-clip.
- γ, the number of iterations on CIFAR-10 and CelebA, and how one network has two outputs are not in the paper: 1,
  800,000 (DDPM's) and 500,000, and the shared U-Net's second decoder are our choice. The rest of --preset paper is
  DDIM's, on which the paper builds, and the iterations on churches are the paper's.
- Eq. 5, 7 and 12 print norms that are not squared; in DDPM, Eq. 5 is. --norm plain is as printed, up to a constant.
- Errors in print stand next to the lines they change: ᾱ's two ends (`alpha_bar`), the JSD schedule (`beta`), η' in the
  gradient loss (`velocity`).

Measured results: README.md, "Results".
"""

import argparse
import functools
import math

import torch

import data
import unet

# ------------------------------------------------------------------------------------------------------ 1 schedule

HALF_PI, SCHEDULES = math.pi / 2, ("angular", "linear", "jsd")


def like_image(t):
    """t: [B] -> [B, 1, 1, 1], to multiply images with."""
    return t[:, None, None, None]


def alpha_bar(i, T=1000, schedule="angular"):
    """ᾱ_i = cos²η_i in float64. i: whole-number tensor, 0 ... T. schedule: angular, linear (DDPM's) or jsd.

    (Sec. 3.1 swaps the ends. ᾱ is 1 at t = 0, where dx/dᾱ is infinite by -ε, and 0 at t = T, where it is by +x₀.)
    """
    if schedule == "angular":
        return torch.sin(HALF_PI * (T - i.double()) / T) ** 2               # cos²η, and exactly 0 at i = T
    if schedule == "jsd":
        return 1 - i.double() / T
    betas = beta(torch.arange(1, T + 1, device=i.device), T, "linear")
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])[i]


def beta(i, T=1000, schedule="angular"):
    """β_i = 1 - ᾱ_i/ᾱ_{i-1} in float64. i: whole-number tensor, 1 ... T.

    angular: 1 - cos²η_i/cos²η_{i-1} by the sine of a difference, which keeps its digits at i = 1; β_T = 1. jsd, of
    Sohl-Dickstein et al. (2015): the paper prints 1/t, which would leave nothing of the image at t = 1; 1/(T - t + 1)
    makes ᾱ fall evenly.
    """
    i = i.double()
    if schedule == "angular":
        h = HALF_PI / T
        return (torch.sin((2 * i - 1) * h) * math.sin(h) / torch.sin((T - i + 1) * h) ** 2).clamp(max=1)
    if schedule == "jsd":
        return 1 / (T - i + 1)
    return 1e-4 + (0.02 - 1e-4) * (i - 1) / max(1, T - 1)


@functools.lru_cache(maxsize=None)
def angles(steps, schedule="angular", start=1.0, T=1000):
    """The sampler's angles, `steps` and a last 0: even in t from `start` in (0, 1], or, of another schedule, at even
    whole i = t T. Raises ValueError for unknown schedules, a start or steps out of range, and more steps than i has.
    """
    if schedule not in SCHEDULES or not 0 < start <= 1 or steps < 1:
        raise ValueError(f"there are no {steps} angles of the schedule {schedule} from {start}")
    if schedule == "angular":
        return (*(HALF_PI * start * (1 - k / steps) for k in range(steps)), 0.0)
    if steps > T:
        raise ValueError(f"the {schedule} schedule has {T} times: no more --steps than that")
    i = torch.tensor([round(start * T * (1 - k / steps)) for k in range(steps)])
    bar = alpha_bar(i, T, schedule)
    return (*torch.atan2((1 - bar).sqrt(), bar.sqrt()).tolist(), 0.0)


# ------------------------------------------------------------------------------------------------------- 2 forward

def diffuse(x0, eps, eta):
    """x at the angle eta on the arc from image to noise. x0, eps: [B, C, H, W]; eta: [B] in [0, π/2]."""
    eta = like_image(eta)
    return eta.cos() * x0 + eta.sin() * eps                                                             # Eq. 4, 9


def velocity(x0, eps, eta):
    """dx/dη, v-prediction's target: ε at η = 0, -x₀ at π/2.

    In η, and not in the paper's t, where it is η' = π/(2T) times this: with T = 1000 the squared loss on it would weigh
    2.5e-6. (Nor may a step be multiplied by both h and η': Eq. 10's dot has η' in it already.)
    """
    eta = like_image(eta)
    return -eta.sin() * x0 + eta.cos() * eps                                                            # Eq. 10, 11


def project(x, x0, eps, eta):
    """The nearest pair (x̂₀, ε̂) with cos η x̂₀ + sin η ε̂ = x. It has the same velocity: (x, ẋ) turned back by η."""
    residual = diffuse(x0, eps, eta) - x
    return x0 - like_image(eta).cos() * residual, eps - like_image(eta).sin() * residual


# ---------------------------------------------------------------------------------------------------------- 3 loss

def predictor(net, predict="both", bf16=False):
    """The one place where the network's outputs get their meaning: returns model(x, t) -> (x̂₀, ε̂), t = η/(π/2).

    predict: both, or one, image or noise, from which the other follows; but not at η = 0 for image, nor at π/2 for
    noise, below which `sample` must then start (start=0.999).
    """
    def model(x, t):
        eta = HALF_PI * like_image(t)
        cos, sin = eta.cos(), eta.sin()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            raw = net(x, t)
        raw = [out.to(x.dtype) for out in raw]
        if predict == "image":
            return raw[0], (x - cos * raw[0]) / sin                                                     # Eq. 8
        if predict == "noise":
            return (x - sin * raw[0]) / cos, raw[0]                                                     # Eq. 6
        return raw[0], raw[1]

    return model


def distance(error, norm="squared"):
    """Per example [B]: the mean square, or, "plain", its root: the norm as printed, over √(C H W)."""
    if norm == "plain":
        return torch.linalg.vector_norm(error.flatten(1), dim=1) / error[0].numel() ** 0.5
    return error.square().flatten(1).mean(1)


def loss(model, x0, eps, eta, predict="both", gamma=1.0, norm="squared"):
    """The loss per example [B]: on both heads and γ times on their velocity, or on the one head that `predict` names.

    The heads' squared errors are those of their residual and their velocity together, |e_R|² + |e_E|² = |r|² + |e_ẋ|²:
    the third term counts one of these two parts once more.
    """
    R, E = model(diffuse(x0, eps, eta), eta / HALF_PI)
    if predict == "noise":
        return distance(E - eps, norm)                                                                  # Eq. 5
    if predict == "image":
        return distance(R - x0, norm)                                       # Eq. 7 (where its R has no t)
    error = velocity(R, E, eta) - velocity(x0, eps, eta)
    return distance(R - x0, norm) + distance(E - eps, norm) + gamma * distance(error, norm)             # Eq. 12


# ------------------------------------------------------------------------------------------------------- 4 sampler

SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ddim": 1, "ddim2": 1, "cold": 1, "ddpm": 1}   # calls a step
HEADS = ("ddim", "ddim2", "ddpm")       # to these it matters whether two heads are projected; to a velocity (without
                                        # clipping) it does not


def calls(solver, steps, last=None):
    """Network calls per image of `steps` steps."""
    return (steps - 1) * SOLVERS[solver] + SOLVERS[last or solver]


def ancestral_step(x, x0, eta, s, z):
    """A draw of DDPM's posterior q(x_s | x, x₀) from the angle eta to s < eta. z ~ N(0, I), as x.

    As DDPM writes it from ε̂ it divides by √α_T = 0 at π/2, where β_T = 1; from x̂₀, by cos s and sin η, never 0.
    """
    beta_cos2 = math.sin(eta + s) * math.sin(eta - s)                   # β cos² s = cos² s - cos² η
    mean = (math.cos(eta) * math.sin(s) ** 2 * x + beta_cos2 * x0) / (math.cos(s) * math.sin(eta) ** 2)     # Eq. 3
    return mean + math.sin(s) * math.sqrt(beta_cos2) / (math.cos(s) * math.sin(eta)) * z


def second_order(eta, s):
    """What a slope dx̂₀/dη = 1 adds to DDIM's step from eta to s: sin s ∫ (e - η) d(cot e) over the angles e between,
    as the ODE is d(x/sin η) = x̂₀ d(cot η); by parts.
    """
    return (s - eta) * math.cos(s) - (math.sin(s) * math.log(math.sin(s) / math.sin(eta)) if s else 0.0)


@torch.no_grad()
def sample(net, x1, steps, solver="euler", heads="project", clip=False, generator=None, *, schedule="angular",
           start=1.0, last=None, watch=None):
    """From noise to images in `steps` steps, at the schedule's angles. x1: [B, C, H, W] ~ N(0, I), at `start` of π/2.

    net(x, t) -> (x̂₀, ε̂), t = η/(π/2), is called SOLVERS[solver] times a step. solver: euler (the paper's), midpoint,
    heun, rk4; ddim, the arc of fixed x̂₀ and ε̂, and ddim2, which from its second step extrapolates x̂₀ (error
    h² log 1/h); cold, which makes ε̂ of x̂₀; ddpm, stochastic, of x̂₀ alone. heads: project them on x, or take
    them raw. clip: keep every x̂₀ in [-1, 1], and make ε̂ of it. last: euler or midpoint, for the last step alone.
    generator: ddpm's, one or a list of B. watch(t, x, x̂₀): called at every network call, and at last with t = 0 and
    the image. Raises ValueError.
    """
    if solver not in SOLVERS or heads not in ("project", "raw") or last not in (None, "euler", "midpoint"):
        raise ValueError(f"there is no solver {solver} with heads {heads} and last step {last}")

    def look(x, eta):
        eta_ = x.new_full((len(x),), eta)
        x0, eps = net(x, eta_ / HALF_PI)
        if heads == "project" and solver != "cold":
            x0, eps = project(x, x0, eps, eta_)
        if clip:
            x0 = x0.clamp(-1, 1)
        if eta and (clip or solver == "cold"):                          # the noise that x holds beside this image
            eps = (x - math.cos(eta) * x0) / math.sin(eta)                                              # Eq. 8
        if watch:
            watch(eta / HALF_PI, x, x0)
        return x0, eps

    def v(x, eta):
        return velocity(*look(x, eta), x.new_full((len(x),), eta))

    x, etas, eta_last, x0_last = x1, angles(steps, schedule, start), None, None
    for eta, s in zip(etas, etas[1:]):
        h, rule = eta - s, last or solver if s == 0 else solver
        if rule == "euler":
            x = x - h * v(x, eta)                                                                       # Eq. 13
        elif rule == "midpoint":
            x = x - h * v(x - h / 2 * v(x, eta), eta - h / 2)
        elif rule == "heun":
            k1 = v(x, eta)
            x = x - h / 2 * (k1 + v(x - h * k1, s))
        elif rule == "rk4":
            k1 = v(x, eta)
            k2 = v(x - h / 2 * k1, eta - h / 2)
            k3 = v(x - h / 2 * k2, eta - h / 2)
            k4 = v(x - h * k3, s)
            x = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        else:
            x0, eps = look(x, eta)
            if rule == "ddpm":
                x = ancestral_step(x, x0, eta, s, data.randn(x, generator))
            else:
                x = math.cos(s) * x0 + math.sin(s) * eps                                                # Eq. 6
            if rule == "ddim2" and eta_last:
                x = x + (x0 - x0_last) / (eta - eta_last) * second_order(eta, s)
            eta_last, x0_last = eta, x0
    if watch:
        watch(0.0, x, x)
    return x


# ------------------------------------------------------------------------------------------------------ 5 training

def train(run, settings, checkpoint, args, processes):
    """Train, or go on, in the run directory until step settings["iterations"]. Source: Eq. 5, 7, 12."""
    if data.finished(run, settings, checkpoint, processes):
        return
    training = data.Training(run, settings, checkpoint, args, processes, network_of, unet.create, torch.optim.Adam)
    (net, ema, optimizer), images, mine = training.parts.values(), training.images, training.mine
    device, batch, iterations = processes.device, settings["batch_size"], settings["iterations"]
    alone = predictor_of(net, settings, args, processes)    # neither compiled nor waiting for the other processes
    unet.warn_cost(alone, images.shape[1:], batch, iterations - training.start, processes)
    model = predictor_of(unet.parallel(net, device, processes.world, args.compile), settings, args, processes)
    method = {key: settings[key] for key in ("predict", "gamma", "norm")}

    with training:
        for step, draw in training:
            x0 = data.draw_batch(images, batch, draw)
            eta = draw_angles(batch, settings["schedule"], draw)
            eps = torch.randn(x0.shape, generator=draw, device=device)

            values = loss(model, x0[mine], eps[mine], eta[mine], **method)                              # Eq. 12
            optimizer.zero_grad(set_to_none=True)
            values.mean().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

            decay = min(settings["ema"], (1 + step) / (10 + step))      # short at first: young weights are no use
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            training.record(values, eta[mine] / HALF_PI, grad_norm, settings["lr"])


@functools.lru_cache(maxsize=None)
def all_angles(schedule, device, T=1000):
    """A schedule's own T angles, without the 0, on the device."""
    return torch.tensor(angles(T, schedule, 1.0, T)[:-1], device=device)


def draw_angles(n, schedule, generator):
    """n training angles [B]: even in [0, π/2), or of a schedule's own, each as often."""
    u = torch.rand(n, generator=generator, device=generator.device)
    if schedule == "angular":
        return HALF_PI * u
    table = all_angles(schedule, u.device)
    return table[(u * len(table)).long()]


def predictor_of(net, settings, args, processes):
    """The predictor of a run: its network and the settings that say what the outputs are."""
    return predictor(net, settings["predict"], unet.use_bf16(args.precision, processes.device))


def network_of(settings, channels):
    """unet.UNet's arguments: two outputs, x̂₀ and ε̂, or the one that `predict` names."""
    outputs = (channels,) * (2 if settings["predict"] == "both" else 1)
    return {"channels": channels, "outputs": outputs, "size": settings["image_size"],
            **{key: settings[key] for key in NETWORK}}


def trained_model(run, settings, checkpoint, args, processes, n):
    """(model, x): the predictor of a run's EMA weights, made fast, and zeros, as many of n images as go in a call."""
    network = network_of(settings, checkpoint["network"].get("channels", 3))
    net = unet.create(network, processes.device)[1]
    data.restore(run, checkpoint, ema=net)
    net = unet.parallel(net, processes.device, compile=args.compile)
    return unet.fast_batch(predictor_of(net, settings, args, processes), n, network, processes.device)


def solver_of(settings, args, solver=None):
    """(steps, the other arguments of `sample`), as asked for or by default. Raises ValueError for what can't be."""
    predict, schedule, last, steps = settings["predict"], settings["schedule"], args.last, args.steps or 10
    solver = solver or args.solver or "ddim2"
    for wrong, sentence in (
            (last and solver not in ("heun", "rk4"), f"--last is for --solver heun and rk4, not {solver}"),
            (args.heads and solver not in HEADS, f"--heads is for --solver {', '.join(HEADS)}, not {solver}"),
            *((value is not None and predict != "both", f"{flag} is for two outputs: --predict both")
              for flag, value in (("--heads", args.heads), ("--gamma", args.gamma), ("--second", args.second))),
            (predict == "image" and solver in ("heun", "rk4") and not last,
             f"{solver} ends at η = 0, where an image-only network can't name the noise: add --last midpoint")):
        if wrong:
            raise ValueError(sentence)
    infinite = predict == "noise" and schedule == "angular"     # its x̂₀ at π/2
    options = {"solver": solver, "heads": args.heads or "project", "last": last, "schedule": schedule,
               "clip": predict == "noise" if args.clip is None else args.clip, "start": 0.999 if infinite else 1.0}
    angles(steps, schedule, options["start"])
    return steps, options


def write_samples(run, settings, checkpoint, args, processes):
    """Sample with the EMA weights: two pictures into the run directory, or single PNGs into --out."""
    steps, options = solver_of(settings, args)
    model, x = trained_model(run, settings, checkpoint, args, processes, args.n)

    def draw(x1, generators, watch):
        return sample(model, x1, steps, generator=generators, watch=watch, **options)

    shown = {"steps": steps, **options, "heads": options["heads"] if options["solver"] in HEADS else None}
    network_calls = calls(options["solver"], steps, options["last"])
    data.draw_samples(draw, x, run, checkpoint, args, network_calls, shown, processes)


def write_forward(run, settings, checkpoint, args, processes):
    """One image on its way to noise, and cot²η."""
    def way(x0, eps, t, ts):
        return diffuse(x0, eps, HALF_PI * t), {"angular": torch.tan(HALF_PI * ts) ** -2}
    data.forward_figure("angular", way, settings, processes)


def write_solvers(run, settings, checkpoint, args, processes):
    """All solvers that this run's network has, from the same noises."""
    model, x = trained_model(run, settings, checkpoint, args, processes, 3)
    unfit = ("heun", "rk4") if settings["predict"] == "image" else ()       # they would ask it for the noise at η = 0

    def draw(solver, steps, x1, generators):
        steps, options = solver_of(settings, argparse.Namespace(**{**vars(args), "steps": steps}), solver)
        return sample(model, x1, steps, generator=generators, **options)
    data.solver_figure(draw, {name: n for name, n in SOLVERS.items() if name not in unfit}, x, run, settings, args)


def write_schedules(run, settings, checkpoint, args, processes):
    """Figures 2 and 3, β_t and ᾱ_t of the three schedules: angular-schedules.csv and .png."""
    i, T = torch.arange(1, 1001), 1000
    betas = {name: beta(i, T, name).tolist() for name in SCHEDULES} | {"jsd as printed, 1/t": (1 / i).tolist()}
    alpha_bars = {name: alpha_bar(i, T, name).tolist() for name in SCHEDULES}
    data.curves("angular-schedules", ("t", i.tolist()), {"β_t": betas, "ᾱ_t": alpha_bars}, log=("β_t",))


@torch.no_grad()
def write_errors(first, base, checkpoint, args, processes):
    """Figure 4: squared errors of x̂₀ and ε̂ against t, their mean and spread over --n training images, as errors.csv
    and .png of the first run; of two heads also when projected. All runs of --errors see the same images and noise.
    """
    runs, ts = [(first, base, checkpoint)], [(k + 0.5) / 25 for k in range(25)]
    for run in args.errors[1:]:
        other = argparse.Namespace(**{**vars(args), "run": run})
        runs.append(data.open_run("angular", other, DEFAULTS, PAPER, NETWORK))
    seen = {(s["dataset"], s["data_dir"], s["image_size"], c["network"].get("channels")) for _, s, c in runs}
    if len(seen) > 1 or len({run.resolve() for run, _, _ in runs}) < len(runs):
        raise data.Problem("--errors compares different runs, trained on the same images", 2)
    generators = data.image_generators(base["seed"] if args.seed is None else args.seed, range(args.n))
    images = data.load(base["dataset"], base["data_dir"], base["image_size"], processes)
    index = torch.stack([torch.randint(len(images), (), generator=g) for g in generators])
    x0 = data.to_float(images[index.to(images.device)]).to(processes.device)
    eps, panels = data.randn(x0, generators), {"squared error of x̂₀": {}, "squared error of ε̂": {}}
    for run, settings, checkpoint in runs:
        model, x = trained_model(run, settings, checkpoint, args, processes, args.n)
        name = f"{settings['predict']} ({run})"
        names = [name, f"{name} projected"] if settings["predict"] == "both" else [name]
        errors = torch.empty(len(names), 2, len(ts), args.n)
        for k, t in enumerate(ts):
            for part in torch.arange(args.n).split(len(x)):
                eta = x.new_full((len(part),), HALF_PI * t)
                xt = diffuse(x0[part], eps[part], eta)
                heads = model(xt, eta / HALF_PI)
                for error, pair in zip(errors, (heads, project(xt, *heads, eta))):     # one output: the first alone
                    error[0, k, part] = distance(pair[0] - x0[part]).cpu()
                    error[1, k, part] = distance(pair[1] - eps[part]).cpu()
        for name, both in zip(names, errors):
            for named, error in zip(panels.values(), both):
                named[name] = error.mean(1).tolist(), error.std(1, correction=0).tolist()
    data.curves(first / "errors", ("t = η / (π/2)", ts), panels, log=tuple(panels))


def write_estimates(run, settings, checkpoint, args, processes):
    """Figure 9: x̂₀ on the way from the same noises, up to four, by each solver of --estimates: estimates.png."""
    model, x = trained_model(run, settings, checkpoint, args, processes, min(args.n, 4))
    rows, ts = [], [1 - k / 10 for k in range(11)]
    seed = settings["seed"] if args.seed is None else args.seed
    for solver in args.estimates:
        steps, options = solver_of(settings, args, solver)
        generators, frames = data.image_generators(seed, range(len(x))), []
        sample(model, data.randn(x, generators), steps, generator=generators,
               watch=lambda t, _, x0: frames.append((t, x0.cpu())), **options)
        frames.reverse()                                        # heun and rk4 ask at t = 0 before the image is there
        rows.append([min(frames, key=lambda frame: abs(frame[0] - t))[1] for t in ts])
    images = torch.stack([frame[i] for i in range(len(x)) for row in rows for frame in row])
    picture = data.picture(data.to_uint8(images), len(ts), [f"t={t:.1g}" for t in ts])
    data.save_png(picture, run / "estimates.png")
    print(f"wrote {run}/estimates.png: for each noise, a row by {', then one by '.join(args.estimates)}")


# -------------------------------------------------------------------------------------------------- 6 command line

COMMON = dict(predict="both", schedule="angular", gamma=1.0, norm="squared", second="decoder", seed=0)
DEFAULTS = {dataset: {**sizes, **COMMON} for dataset, sizes in unet.COMPACT.items()}
DEFAULTS["shapes"] |= dict(second="conv")
DDIM = dict(width=128, blocks=2, attention=(16,), dropout=0.1, batch_size=128, lr=2e-4, ema=0.9999)
PAPER = {"cifar10": {**DDIM, "mult": (1, 2, 2, 2), "iterations": 800_000},         # the paper builds on DDIM's networks
         "celeba": {**DDIM, "mult": (1, 2, 2, 2, 4), "iterations": 500_000},
         "lsun-church": {**DDIM, "image_size": 256, "mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0, "batch_size": 64,
                         "lr": 2e-5, "iterations": 1_135_000}}
NETWORK = ("width", "mult", "blocks", "attention", "dropout", "second")

FIGURES = {"forward": (write_forward, "dataset data_dir image_size seed"),                  # and the flags each heeds
           "solvers": (write_solvers, "run dataset data_dir seed clip"),
           "schedules": (write_schedules, ""),
           "errors": (write_errors, "dataset data_dir seed n"),
           "estimates": (write_estimates, "run dataset data_dir seed n steps last heads clip")}


def arguments(argv=None):
    """Parse the command line; a flag that was not given is None (or False, if it is a switch)."""
    parser, group = data.parser("angular", __doc__, DEFAULTS, PAPER)
    add = group["what to do"].add_argument
    add("--schedules", action="store_true", help="draw Figures 2 and 3 here, by matplotlib")
    add("--errors", nargs="+", metavar="RUN", help="draw Figure 4, errors against t, of these runs, into the first, by "
        "matplotlib")
    add("--estimates", nargs="+", choices=SOLVERS, metavar="SOLVER", help="draw Figure 9: x̂₀ from one noise, by each")
    add = group["method"].add_argument
    add("--predict", choices=("both", "noise", "image"), help="what the network is asked for")
    add("--schedule", choices=("angular", "linear"), help="of the angle: even, or DDPM's linear β")
    add("--gamma", type=data.number(float, 0, 1000), help="weight of the velocity's loss, 0 to 1000, for two outputs")
    add("--norm", choices=("squared", "plain"), help="of the errors: squared, or not, as printed")
    add("--second", choices=("decoder", "conv"), help="what makes the second output: a decoder, or two convolutions")
    add = group["sampling"].add_argument
    add("--solver", choices=SOLVERS, help="euler (the paper's), midpoint, heun, rk4: 1, 2, 2 and 4 network calls a "
        "step; 1: the rotation (ddim) and its second order (ddim2, default), cold diffusion's rule, ddpm's")
    add("--last", choices=("euler", "midpoint"), help="the last step of heun and rk4, which otherwise leave noise")
    add("--heads", choices=("project", "raw"), help="of ddim, ddim2, ddpm: made to agree with x (default), or as is")
    add("--clip", action=argparse.BooleanOptionalAction,
        help="keep every estimate x̂₀ in [-1, 1] (default: where the network names the noise alone)")
    return parser.parse_args(argv)


@data.command
def main(argv=None):
    """The command line. Raises SystemExit: 1 or 2 with a sentence on stderr, 130 or 143 when stopped by a signal."""
    args = arguments(argv)
    write, of_run = data.figure(args, FIGURES)
    if args.errors:                                         # which names its runs itself
        args.run, of_run = args.errors[0], True
    run, settings, checkpoint = data.open_run("angular", args, DEFAULTS, PAPER, NETWORK, of_run=of_run)
    with data.bad_arguments():                              # what can't go together is said before anything is started
        for solver in args.estimates or [None]:
            solver_of(settings, args, solver)
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
