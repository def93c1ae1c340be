"""IHDM and cold diffusion: the two neighbours that the blurring paper compares itself with.

Both blur an image by heat dissipation, in levels k = 0 ... K. IHDM (Rissanen et al. 2022) adds
noise too small to be seen, and learns the way from each level to the one before. Its sampler adds
noise δ. Cold diffusion (Bansal et al. 2022) has no noise. Its network names the image, which is
blurred again, one level less. Both start from training images, blurred to level K. The numbers
of equations are those of the blurring paper.

    python -m extras.neighbours ihdm --train --sample          (cold --help lists cold's flags)
    python -m extras.neighbours cold --train --sample --solver naive
"""

import sys

import torch

import blurring
import data
import unet
from blurring import dct, frequencies, idct, like_image

SIGMA = {"ihdm": 0.02, "cold": 0.0}             # IHDM's .01 is for images in [0, 1]


def dissipation_time(k, K, widest):
    """τ_k = σ_B²/2 [B, 1, 1, 1]. σ_B grows by equal factors, from .5 pixels at level 1."""
    grown = 0.5 * (2 * widest) ** ((k - 1) / (K - 1))
    sigma_blur = torch.where(k > 0, grown, torch.zeros_like(grown))
    return like_image(sigma_blur) ** 2 / 2


def blur(x0, k, K, widest):
    """A_k x. k: [B], floats that are whole numbers. widest: the blur of level K, in pixels."""
    d = torch.exp(-frequencies(x0.shape[-2:], x0) * dissipation_time(k, K, widest))
    return idct(d * dct(x0))


def diffuse(x0, eps, k, process="ihdm", **heat):
    """z_k: the blurred image, and IHDM's small noise. heat: `blur`'s K and widest."""
    return blur(x0, k, **heat) + SIGMA[process] * eps                              # Eq. 10, 13


def transition(k, j, size, K, widest):
    """(α_k|j, σ²_k|j), each [B, 1, H, W], of IHDM's chain q(u_k | u_j), for levels j < k.

    d_k/d_j is 0/0 where both underflow. So it is computed from the dissipation times.
    """
    tau = dissipation_time(k, K, widest) - dissipation_time(j, K, widest)
    alpha_kj = torch.exp(-frequencies(size, tau) * tau)                            # Eq. 17
    return alpha_kj, (1 - alpha_kj ** 2) * SIGMA["ihdm"] ** 2                      # Eq. 17


def predictor(net, process="ihdm"):
    """model(z_k, t): IHDM's f_θ, which is z_k plus the output; or cold diffusion's x̂₀."""

    def model(z, t):
        out, = net(z, t)
        out = out.to(z.dtype)
        return z + out if process == "ihdm" else out

    return model


def loss(model, x0, eps, k, process="ihdm", **heat):
    """The loss of each example, [B]: absolute for cold; for IHDM squared, from A_{k-1} x."""
    answer = model(diffuse(x0, eps, k, process, **heat), k / heat["K"])
    if process == "cold":
        return (x0 - answer).abs().flatten(1).mean(1)
    return ((blur(x0, k - 1, **heat) - answer) ** 2).flatten(1).mean(1)         # Eq. 12


@torch.no_grad()
def walk(model, z1, steps, solver="ihdm", clip=False, delta=0.025, generator=None, **heat):
    """From level K, z1, to the image. Yields (t, z_k, answer) at each call, and (0, image, image).

    solver: ihdm, with noise delta in all steps but the last; or Bansal et al.'s Algorithm 1, naive,
    or 2, improved. If x̂₀ has a constant error e, naive leaves e, and improved (1 - d_K) e.
    clip: keep x̂₀ in [-1, 1]. generator: one or a list of B.
    """
    K = heat["K"]
    stride = K // steps
    z = z1
    for k in range(K, 0, -stride):
        now = z.new_full((1,), k)
        answer = model(z, (now / K).expand(len(z)))
        answer = answer.clamp(-1, 1) if clip else answer
        yield k / K, z, answer
        if solver == "ihdm":
            noise = data.randn(z, generator) if k > 1 else torch.zeros_like(z)
            z = answer + delta * noise                                             # Eq. 11
        else:
            before = blur(answer, now - stride, **heat)
            z = before if solver == "naive" else z - blur(answer, now, **heat) + before
    yield 0.0, z, z


def train(run):
    """Either one's training, from where the run's checkpoint stopped."""
    s = run.settings
    images = data.load(run)
    net, ema = run.networks(unet.UNet, blurring.network(s, images.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=s.lr, fused=True)
    model = predictor(run.ready(net, training=True), s.script)

    for step, g in run.steps(net, ema, optimizer):
        x0 = data.batch(images, s.batch_size, g)
        u = torch.rand(len(x0), generator=g, device=g.device)
        k = (u * s.levels).floor() + 1                      # IHDM's code never draws level K
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        x0, k, eps = run.share(x0, k, eps)                  # this process's part of the batch

        losses = loss(model, x0, eps, k, s.script, **heat_of(s))
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        data.average(ema, net, s.ema, step)
        run.record(losses, k / s.levels)


FLAGS = dict(
    levels=(200, "K, the levels of blur", (2, 5000)),
    sigma_blur_max=(
        0.0, "blur of level K in pixels (3/4 of the image; above 32 pixels 1/2)", (0.51,)),
    head_dim=(64, "channels of an attention head", None))
SAMPLING = dict(
    ihdm=dict(sampling_noise=(0.025, "δ, the noise of all steps but the last", (0, 10))),
    cold=dict(
        steps=(0, "steps, which must divide --levels (by default, all levels)", None),
        solver=("improved", "Bansal et al.'s Algorithm 2, or 1", ("improved", "naive")),
        clip=(True, "keep every x̂₀ in [-1, 1]", None)))
PRESETS = {name: {key: preset[key] for key in preset.keys() - {"predict", "sigma_blur_max"}}
           for name, preset in blurring.PRESETS.items()}


def heat_of(s):
    """The settings that `blur` takes. Level 1 blurs by half a pixel, and level K by more."""
    widest = s.sigma_blur_max or s.image_size * (0.75 if s.image_size <= 32 else 0.5)
    return dict(K=s.levels, widest=widest)


def sampler(run):
    """(steps, walk's options), as asked for or by default. Raises ValueError."""
    s, args = run.settings, run.args
    if s.script == "ihdm":
        return s.levels, dict(solver="ihdm", delta=args.sampling_noise, **heat_of(s))
    if s.levels % (args.steps or 1):
        raise ValueError(f"--steps must divide the {s.levels} levels of the training")
    return args.steps or s.levels, dict(solver=args.solver, clip=args.clip, **heat_of(s))


def write_samples(run):
    """Pictures or single PNGs, drawn from blurred training images."""
    s = run.settings
    model = predictor(run.ready(run.averaged(unet.UNet)), s.script)
    steps, options = sampler(run)
    images = data.load(run)

    def walked(x1, generators):
        if images.shape[1] != x1.shape[1]:
            raise data.Problem(f"the images in {s.data_dir}, to start from, have "
                               f"{images.shape[1]} channels, and the run has {x1.shape[1]}")
        chosen = [images[int(torch.randint(len(images), (), generator=g))] for g in generators]
        x0 = data.to_float(torch.stack(chosen)).to(x1)
        z1 = blur(x0, x0.new_full((len(x0),), s.levels), **heat_of(s))
        return walk(model, z1, steps, generator=generators, **options)

    data.draw(run, walked, steps, images=s.images, **options)


@data.command
def main(argv=None):
    """The command line: ihdm or cold, and then flags. Exits as the scripts do."""
    script, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if script not in SIGMA:
        raise data.Problem("say ihdm or cold first, then flags (ihdm --help lists them)", 2)
    run = data.open_run(script, __doc__, FLAGS | unet.FLAGS, SAMPLING[script], PRESETS, flags)
    with data.refusals(), torch.device("meta"):
        unet.UNet(**blurring.network(run.settings, 3))
        sampler(run)
    if run.args.train:
        train(run)
    if run.args.sample:
        write_samples(run)


if __name__ == "__main__":
    main()
