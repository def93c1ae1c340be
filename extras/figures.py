"""The papers' figures, and some of our own: python -m extras.figures NAME [RUN ...] [flags]

forward, schedules, moments and algorithm1 need no run, and write to runs/figures/. The others
are of runs, which are directories, and write to the first. Curves are written as CSV, and drawn
by matplotlib. `python -m extras.figures NAME --help` says what a figure shows, and lists flags.
"""

import argparse
import contextlib
import functools
import pathlib
import sys

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur

import angular
import blurring
import data
import ddm
import pixel_aware
import unet
from pixel_aware import from_pixels, place

SCRIPTS = dict(ddm=ddm, blurring=blurring, angular=angular, pixel_aware=pixel_aware)
HOME = pathlib.Path("runs/figures")


def write_picture(path, images, columns=11):
    """Write images [N, C, H, W] in [-1, 1] as one PNG, in rows of so many columns."""
    data.save_png(data.grid(data.to_uint8(images), columns), path)
    data.say(f"wrote {path}")


def write_curves(*tables):
    """Write tables (path, title, {curve: numbers}, "linear" or "log"), and draw them as PNGs.

    The first curve is x. "CURVE, std" is the error bars of CURVE. Raises data.Problem.
    """
    for path, _, curves, _ in tables:
        for name, numbers in curves.items():
            curves[name] = torch.as_tensor(numbers).double().cpu().numpy()   # they may be on a GPU
        header = ",".join(f'"{name}"' for name in curves)
        with data.replacing(f"{path}.csv") as file:
            np.savetxt(file, np.stack([*curves.values()], 1), "%.6g", ",", header=header,
                       comments="", encoding="utf-8")
        data.say(f"wrote {path}.csv")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise data.Problem("to draw what was written: pip install matplotlib") from error
    for path, title, curves, scale in tables:
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        x, *names = curves
        for name in names:
            if not name.endswith(", std"):
                std = curves.get(f"{name}, std")
                axes.errorbar(curves[x], curves[name], std, label=name)
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.legend()
        with data.replacing(f"{path}.png") as file:
            figure.savefig(file)
        data.say(f"wrote {path}.png")


def open_run(script, *argv):
    """A run, as `main` of the script opens it."""
    return data.open_run(
        script.__name__, script.__doc__, script.FLAGS | unet.FLAGS, script.SAMPLING,
        script.PRESETS, argv)


def untrained(script, argv):
    """A run that does not exist: the settings of a script, and its dataset."""
    return open_run(script, "--train", "--run", str(HOME), *argv)


def trained(directory, argv, scripts=SCRIPTS):
    """(the script that made a run directory, its run, the list of its trained models)."""
    state = data.load_checkpoint(pathlib.Path(directory, "checkpoint.pt"))
    name = state["method"].get("script")
    if name not in scripts:
        raise data.Problem(f"there is no such figure of {directory}, a run of {name}", 2)
    script = SCRIPTS[name]
    run = open_run(script, "--sample", "--run", directory, *argv)
    models = script.trained(run)
    return script, run, models if script is pixel_aware else [models]


def generators_of(run, n):
    """A generator for each of n images, by --seed, or else by the run's own seed."""
    seed = run.settings.seed if run.args.seed is None else run.args.seed
    return data.image_generators(seed, range(n))


def training_images(run, n):
    """(n training images [n, C, S, S] in [-1, 1], a generator for each)."""
    generators = generators_of(run, n)
    images = data.load(run)
    chosen = [images[int(torch.randint(len(images), (), generator=g))] for g in generators]
    return data.to_float(torch.stack(chosen)).to(run.device), generators


def walk(script, run, models, n):
    """n images on their way from noise, as --sample draws them. Yields (t, x_t, x̂₀)."""
    channels, size = (run.checkpoint["network"][key] for key in ("channels", "size"))
    generators = generators_of(run, n)
    x1 = data.randn(torch.empty(n, channels, size, size, device=run.device), generators)
    x1 = script.wide(x1) if script is pixel_aware else x1
    steps, options = run.args.steps, script.sampler(run)
    if script is blurring:
        steps, options = options
    scale = ddm.SCALE.get(run.settings.h, 1) if script is ddm else 1
    for t, x, x0 in script.walk(*models, x1, steps, generator=generators, **options):
        yield t, x / scale, x0 / scale


def noisy(script, s, x0, eps, t):
    """x_t [B, C, S, S] in [-1, 1] of a script's process, at t from 0 to 1."""
    if script is ddm:
        return ddm.diffuse(x0, -x0, eps, t)
    if script is blurring:
        return blurring.diffuse(x0, eps, t, **blurring.blur_of(s))
    if script is angular:
        return angular.diffuse(x0, eps, angular.HALF_PI * t)
    pixels = pixel_aware.to_pixels(x0)
    return from_pixels(pixel_aware.diffuse(pixels, eps, s.T * t, s.gamma, s.T))


def snr(script, s, t):
    """The signal to noise ratio at t, of an image of ones, by the name of a curve."""
    if script is ddm:
        return {"ddm": (1 - t) ** 2 / t}
    if script is angular:
        return {"angular": torch.tan(angular.HALF_PI * t) ** -2}
    if script is blurring:                                    # of frequencies, as high as wide
        alpha, sigma = blurring.alpha_sigma(t, s.image_size, **blurring.blur_of(s))
        ratio = (alpha / sigma)[:, 0] ** 2
        places = {
            "mean colour": 0,
            "middle frequency": s.image_size // 2,
            "highest frequency": -1}
        return {f"blurring, {name}": ratio[:, k, k] for name, k in places.items()}
    values = {"white": 1.0, "half of it": 0.5, "a twentieth": 0.05}
    return {f"pixel_aware, {name}": pixel_aware.snr(torch.full_like(t, value), t, s.gamma)
            for name, value in values.items()}


def forward(argv):
    """One image at t = 0, .1, ... 1, and all four signal to noise ratios.

    Two rows for each of ddm, blurring, angular, pixel_aware: x_t, and what of it is the image.
    """
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ts = torch.arange(0.005, 1, 0.01, dtype=torch.float64)
    rows = []
    curves = {"t": ts}
    for script in SCRIPTS.values():
        run = untrained(script, argv)
        x0, generators = training_images(run, 1)
        x0 = x0.cpu().double().expand(11, -1, -1, -1)
        eps = data.randn(x0[:1], generators)
        rows.append(noisy(script, run.settings, x0, eps, t))
        rows.append(noisy(script, run.settings, x0, 0 * eps, t))
        curves |= snr(script, run.settings, ts)
    write_picture(HOME / "forward.png", torch.cat(rows))
    write_curves((HOME / "snr", "signal to noise ratio", curves, "log"))


def solvers(argv, directory):
    """What each solver of a run makes of the same three noises: a row for each.

    Three columns are in 5 network calls, three in 10, and three in 20.
    """
    script, run, models = trained(directory, argv)
    rows = {}
    for run.args.solver in script.SAMPLING["solver"][2]:
        each = angular.calls(run.args.solver, 1) if script is angular else len(models)
        images = []
        with contextlib.suppress(ValueError):                 # some networks lack some solvers
            for calls in (5, 10, 20):
                run.args.steps = max(1, calls // each)
                *_, (_, x, _) = walk(script, run, models, 3)
                images.append(x)
            rows[run.args.solver] = torch.cat(images)
    if not rows:
        raise data.Problem(f"{directory} cannot make so many calls", 2)
    data.say(f"rows: {', '.join(rows)}")
    write_picture(run.directory / "solvers.png", torch.cat([*rows.values()]), 9)


def schedules(argv):
    """Angular's Figures 2 and 3: β_t and ᾱ_t of three schedules.

    The third is JSD, of Sohl-Dickstein et al. (2015), with β_t = 1/(T - t + 1), so that ᾱ falls
    evenly. The paper prints 1/t, which leaves no image after the first step.
    """
    i = torch.arange(1, 1001)
    betas = {name: angular.beta(i, 1000, name) for name in angular.SCHEDULES}
    kept = {name: angular.alpha_bar(i, 1000, name) for name in angular.SCHEDULES}
    betas["jsd"] = 1 / (1001 - i.double())
    kept["jsd"] = 1 - i.double() / 1000
    write_curves(
        (HOME / "beta", "β_t", {"t": i, **betas, "jsd as printed, 1/t": 1 / i}, "log"),
        (HOME / "alpha_bar", "ᾱ_t", {"t": i, **kept}, "linear"))


def errors(argv, *directories):
    """Errors of x̂₀ and ε̂: of angular.py's runs against t (its Figure 4), or of ddm.py's against
    flow time, on the same --n images.
    """
    apart = {pathlib.Path(directory).resolve() for directory in directories}
    if len(apart) < len(directories):
        raise data.Problem("errors names a run twice: give each once", 2)
    found = [trained(directory, argv, ["angular", "ddm"]) for directory in directories]
    script, first, _ = found[0]
    if len({(each, run.settings.images, run.settings.image_size) for each, run, _ in found}) > 1:
        raise data.Problem("errors compares runs of one script, trained on the same images", 2)
    for _, run, _ in found:
        check_process(script, run, "errors")
    x0, generators = training_images(first, first.args.n)
    eps = data.randn(x0, generators)
    ts = np.arange(0.02, 1, 0.04)
    axis = "t = η / (π/2)" if script is angular else "flow time of t"
    of_image = {axis: ts}
    of_noise = {axis: ts}
    for _, run, (model,) in found:
        name = f"{run.settings.predict} ({run.directory})"
        for t in ts if script is angular else map(ddm.at_flow_time, ts):
            for kind, (R, E) in estimates_at(script, run, model, x0, eps, t).items():
                note(of_image, name + kind, R - x0)
                note(of_noise, name + kind, E - eps)
    names = [name for name in of_image if name != axis and not name.endswith(", std")]
    share = {name: np.divide(of_image[name], of_image[names[0]]) for name in names}
    write_curves(
        (first.directory / "errors-share", f"error of x̂₀ over that of {names[0]}",
         {axis: ts} | share, "linear"),
        (first.directory / "errors-x0", "squared error of x̂₀", of_image, "log"),
        (first.directory / "errors-eps", "squared error of ε̂", of_noise, "log"))


def check_process(script, run, what):
    """Raise Problem for a run of ddm.py whose process is not the default."""
    s = run.settings
    if script is ddm and (s.h, s.noise) != ("constant", "sqrt"):
        raise data.Problem(f"{run.directory} has another process: {what} is for the default", 2)


def estimates_at(script, run, model, x0, eps, t):
    """{"": (x̂₀, ε̂), " projected": the same made to agree} of images at a number t."""
    t = x0.new_full((len(x0),), t)
    x = noisy(script, run.settings, x0, eps, t)
    first, E = model(x, t)
    if script is ddm:
        phi, projected = ddm.project(x, first, E, t)
        return {"": (-first, E), " projected": (-phi, projected)}
    pairs = {"": (first, E)}
    if run.settings.predict == "both":
        pairs[" projected"] = angular.project(x, first, E, angular.HALF_PI * t)
    return pairs


def note(curves, name, error):
    """Add the mean and the standard deviation of the images' squared errors to two curves."""
    squared = error.square().flatten(1).mean(1)
    curves.setdefault(name, []).append(squared.mean().item())
    curves.setdefault(f"{name}, std", []).append(squared.std(correction=0).item())


def estimates(argv, directory, *names):
    """Angular's Figure 9: x̂₀ at t = 1, .9, ... 0, by each solver, or by those named after RUN.

    A row for each solver, and so for each of up to four noises (--n). Of pixel_aware it is that
    paper's Figure 3: a row an image, of x₀, x_δ, and, four times, x_i, x̂_δ, x̂₀.
    """
    script, run, models = trained(directory, argv)
    if script is pixel_aware:
        if names or "--steps" in " ".join(argv):
            raise data.Problem("of pixel_aware it is one pass: name no solver and no --steps", 2)
        return pixel_estimates(run, *models)
    ts = np.linspace(1, 0, 11)
    names = names or script.SAMPLING["solver"][2]
    rows = []
    for run.args.solver in names:
        with data.refusals():
            frames = [(t, x0) for t, _, x0 in walk(script, run, models, min(run.args.n, 4))]
        frames.reverse()                                      # heun asks at t = 0 before its end
        rows += [min(frames, key=lambda frame: abs(frame[0] - t))[1] for t in ts]
    data.say(f"rows: {', '.join(names)}")
    write_picture(run.directory / "estimates.png", torch.stack(rows, 1).flatten(0, 1))


def ssim(a, b):
    """The mean structural similarity (Wang et al. 2004) of images in [0, 1] -> [B]."""
    k = min(5, (min(a.shape[-2:]) - 1) // 2)                  # a window of 11, or what fits

    def mean(x):
        return gaussian_blur(x, 2 * k + 1, 1.5)[..., k:-k, k:-k]

    A = mean(a)
    B = mean(b)
    luminance = (2 * A * B + 1e-4) / (A ** 2 + B ** 2 + 1e-4)
    variances = mean(a * a) - A ** 2 + mean(b * b) - B ** 2
    structure = (2 * (mean(a * b) - A * B) + 9e-4) / (variances + 9e-4)
    return (luminance * structure).mean((1, 2, 3))


def pixels(run, n):
    """`training_images` in [LOW, 1], in float64."""
    x0, generators = training_images(run, n)
    return pixel_aware.to_pixels(pixel_aware.wide(x0)), generators


@torch.no_grad()
def pixel_estimates(run, G, R):
    """Figure 3: what one pass makes of --n training images, forwarded to i."""
    s = run.settings
    x0, generators = pixels(run, run.args.n)
    noise = data.randn(x0, generators)
    z = data.randn(torch.empty(len(x0), s.code, device=run.device), generators)
    truth = pixel_aware.x_delta(x0, s.gamma)
    tiles = [from_pixels(x0), 2 * truth - 1]
    for share in (0.05, 0.25, 0.5, 1):
        j = max(1, round(s.T * share))
        i = place(j, s.T, s.grid)
        xi = pixel_aware.diffuse(x0, noise, i, s.gamma, s.T)
        t = x0.new_full((len(x0),), i / s.T)
        scale = G(xi, t, z)
        back = pixel_aware.reverse(xi, j, scale, R(xi, scale, t), s.T, grid=s.grid)
        compare(f"x̂_δ of x_{i:.4g}", scale, truth)
        compare("    its image", -scale.log() / s.gamma, x0)
        compare("    its ᾱ_i", scale ** (i / s.T), truth ** (i / s.T))
        compare("    x̂₀", back, x0)
        tiles.append(from_pixels(xi))
        tiles.append(2 * scale - 1)
        tiles.append(from_pixels(back))
    compare("a black picture for x_δ", torch.zeros_like(truth), truth)
    path = run.directory / "estimates.png"
    write_picture(path, torch.stack(tiles, 1)[:8].flatten(0, 1), len(tiles))


def compare(name, guess, true):
    """Say how near a guess is."""
    error = (guess - true).square().mean().sqrt()
    data.say(f"{name:24} SSIM {ssim(guess, true).mean():.3f}, rms error {error:.3f}")


def both_ways(x0, s, generators):
    """Two ways of x0 to noise, pixel_aware's and DDPM's: each [T + 1, B, C, S, S]."""
    noise = pixel_aware.trajectory_noise(x0, s.gamma, s.T, generators)
    ours = [pixel_aware.diffuse(x0, noise[:, i], i + 1, s.gamma, s.T) for i in range(s.T)]
    theirs = [x0]
    for beta in torch.linspace(1e-4, 0.02, s.T, dtype=torch.float64).tolist():
        fresh = data.randn(x0, generators)
        theirs.append((1 - beta) ** 0.5 * theirs[-1] + beta ** 0.5 * fresh)            # Eq. 2
    return torch.stack([x0, *ours]), torch.stack(theirs)


def moments(argv):
    """Pixel_aware's Figure 2: mean and variance of an image's first channel, and DDPM's."""
    run = untrained(pixel_aware, argv)
    x0, generators = pixels(run, 1)
    ways = torch.stack(both_ways(x0, run.settings, generators))[:, :, 0, 0]
    tables = []
    for title, (ours, theirs) in (("mean", ways.mean((2, 3))), ("variance", ways.var((2, 3)))):
        curves = {"i": range(len(ours)), "pixel-aware": ours, "DDPM": theirs}
        tables.append((HOME / f"moments-{title}", title, curves, "linear"))
    write_curves(*tables)


def strips(argv, directory):
    """Pixel_aware's Figures 7 and 8A: three images at even steps, in four rows each.

    These are x_i forward, x_i of DDPM's way, and x_i and x̂₀ on the way back.
    """
    _, run, models = trained(directory, argv, ["pixel_aware"])
    s = run.settings
    x0, generators = pixels(run, 3)
    ours, theirs = both_ways(x0, s, generators)
    with data.refusals():
        options = pixel_aware.sampler(run)
    back = pixel_aware.walk(*models, ours[-1], run.args.steps, generator=generators, **options)
    _, x, x0 = zip(*reversed([*back]))                        # T + 1 frames, from image to x_T
    j = (s.T * torch.linspace(0, 1, 11)).round().long()
    i = place(j, s.T, s.grid).round().long()
    rows = [from_pixels(ours[i]), from_pixels(theirs[i])]
    rows += [torch.stack(x)[j], torch.stack(x0)[j]]
    tiles = torch.stack(rows).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
    data.say(f"columns: i = {i.tolist()}")
    write_picture(run.directory / "strips.png", tiles)


def backward(x0, s, generators):
    """{how: the image that it makes of x_T}, where all noises of the way to x_T are known."""
    rate = s.gamma / s.T * x0
    scale = pixel_aware.x_delta(x0, s.gamma)
    noise = pixel_aware.trajectory_noise(x0, s.gamma, s.T, generators)
    xT = pixel_aware.diffuse(x0, noise[:, -1], s.T, s.gamma, s.T)
    times = torch.arange(1, s.T + 1, device=x0.device)
    known = pixel_aware.expected_noise(noise[:, -1], s.T, times, rate)
    added = pixel_aware.added(rate[:, None], times)
    one_step = pixel_aware.added(rate[:, None], 1)            # its root is in print in line 9,
    as_printed = noise * (added / one_step).sqrt()            # in the place of that of `added`
    reverse = functools.partial(pixel_aware.reverse, xT, s.T, scale, T=s.T,
                                generator=generators)
    return {
        "x_T": xT,
        "Algorithm 1, true noises": reverse(Z=noise, mode="literal"),
        "without fresh noise": reverse(Z=noise, mode="literal", noise=False),
        "conditional means": reverse(Z=known, mode="mean"),
        "line 9 as printed": reverse(Z=as_printed, mode="literal")}


def algorithm1(argv):
    """What Algorithm 1 makes of noises that are known: its errors, of flat images against γ x₀.

    The picture's columns: x_0, x_T, Algorithm 1, the same without fresh noise, conditional
    means, and Algorithm 1 with line 9 as printed.
    """
    run = untrained(pixel_aware, argv)
    s = run.settings
    values = torch.linspace(pixel_aware.LOW, 1, 21, dtype=torch.float64)
    flat = values[:, None, None, None].expand(-1, 1, 40, 40)
    curves = {"γ x₀": s.gamma * values}
    for name, x in backward(flat, s, generators_of(run, len(values))).items():
        curves[name] = (x - flat).square().mean((1, 2, 3)).sqrt()
    curves["√(2(e^γx₀ - 1))"] = (2 * torch.expm1(s.gamma * values)).sqrt()
    x0, generators = pixels(run, 4)
    tiles = torch.stack([x0, *backward(x0, s, generators).values()], 1).flatten(0, 1)
    write_picture(HOME / "algorithm1-images.png", from_pixels(tiles), 6)
    write_curves((HOME / "algorithm1", "root mean square error of x̂₀", curves, "log"))


STEPS = dict(steps=(0, "steps of the solver (by default the script's)", None))
KNOWN = data.COMMON | data.MACHINE | pixel_aware.FLAGS | pixel_aware.SAMPLING | STEPS
IMAGE = "dataset data_dir image_size seed"
RUN = "seed data_dir device precision"
FIGURES = dict(                                   # a figure's function, its runs, its flags
    forward=(forward, None, IMAGE),
    solvers=(solvers, 1, RUN),
    schedules=(schedules, None, ""),
    errors=(errors, "+", f"{RUN} n"),
    estimates=(estimates, "+", f"{RUN} n steps"),
    moments=(moments, None, f"{IMAGE} T gamma"),
    strips=(strips, 1, f"{RUN} steps solver"),
    algorithm1=(algorithm1, None, f"{IMAGE} T gamma"))


@data.command
def main(argv=None):
    """The command line. Exits with 2 for bad arguments, 1 for other problems."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in FIGURES:
        raise data.Problem(f"say which figure: {', '.join(FIGURES)}", 2)
    figure, runs, flags = FIGURES[name]
    usage = f"figures {name} {'RUN ... [flags]' if runs else '[flags]'}"
    parser = argparse.ArgumentParser(
        usage=usage, description=figure.__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    parser.error = data.complain
    if runs:
        parser.add_argument("runs", nargs=runs, metavar="RUN")
    data.add_rows(parser, "flags", {flag: KNOWN[flag] for flag in flags.split()})
    given = vars(parser.parse_args(words))
    runs = given.pop("runs", [])
    argv = [f"--{flag.replace('_', '-')}={value}" for flag, value in given.items()]
    figure(argv, *runs)


if __name__ == "__main__":
    main()
