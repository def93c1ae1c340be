"""DDM in the latents of an autoencoder (ADM, Sec. V-A): what diffuses is a code of the image.

The first stage (extras/autoencoder.py) turns an image [B, C, H, W] into latents [B, c, H/f, W/f] of
mean 0 and variance 1. ddm.py's process, loss and sampler then do with them what they do with
images. What is sampled is decoded.

    python -m extras.autoencoder --train                       first: embedded shapes of 64x64
    python -m extras.latent --train --sample                   in its latents of 16x16
    python -m extras.latent --train --dataset celebahq --preset paper --autoencoder NAME

NAME is a run of the first command, or a folder or hub name of diffusers' AutoencoderKL or VQModel.
`python -m extras.tasks` has --autoencoder, too.
"""

import torch

import data
import ddm
import unet
from extras.autoencoder import FirstStage, end_step


def encoded(run, stage):
    """The latents of a run's images, and then of their mirror images: float16 [2 N, c, h, w].

    A mirror image of latents would not be the latents of the mirror image.
    """
    images = data.load(run)
    if not run.checkpoint:
        few = images[::max(1, len(images) // 256)]
        stage.measure(data.to_float(few[:256].to(run.device)))
    straight = []
    mirrored = []
    for k, part in enumerate(images.split(64)):
        data.say(f"encoded: {64 * k} of {len(images)} images", pause=10)
        x = data.to_float(part.to(run.device))
        straight.append(stage.encode(x).half())
        mirrored.append(stage.encode(x.flip(-1)).half())
    return torch.cat(straight + mirrored)


def network(s, stage):
    """unet.UNet's arguments for latents, and what a checkpoint keeps of the first stage."""
    own = dict(size=s.image_size // stage.factor, first_stage=stage.facts)
    return ddm.network(s, stage.latent) | own


def build(first_stage, **arguments):
    """The U-Net of `network`."""
    return unet.UNet(**arguments)


def train(run, stage):
    """Algorithm 1 on latents, from where the run's checkpoint stopped."""
    s = run.settings
    latents = encoded(run, stage)
    net, ema = run.networks(build, network(s, stage))
    optimizer = torch.optim.AdamW(net.parameters(), lr=s.lr, fused=True)
    model = ddm.predictor(run.ready(net, training=True), **ddm.meaning(s))

    for step, g in run.steps(net, ema, optimizer):
        index = torch.randint(len(latents), (s.batch_size,), generator=g, device=g.device)
        x0 = latents[index].float()
        t = ddm.draw_times(len(x0), s.time_power, g)                           # Alg. 1, line 3
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        phi = ddm.draw_phi(x0, s.h, g)                                         # Alg. 1, line 3
        x0, phi, eps, t = run.share(x0, phi, eps, t)          # this process's part of the batch

        losses = ddm.loss(model, x0, phi, eps, t, s.h, s.noise, s.predict, s.weights, s.norm)
        end_step(run, net, ema, optimizer, losses, step)
        run.record(losses, t)


def write_samples(run, stage):
    """Pictures or single PNGs: sampled latents, decoded."""
    model = ddm.predictor(run.ready(run.averaged(build)), **ddm.meaning(run.settings))
    options = ddm.sampler(run)

    def walked(x1, generators):
        for t, x, x0 in ddm.walk(model, x1, run.args.steps, generator=generators, **options):
            shown = slice(4) if t else slice(None)            # on the way, data.draw keeps four
            yield t, stage.decode(x[shown]), stage.decode(x0[shown])

    data.draw(run, walked, calls=run.args.steps, autoencoder=stage.facts["digest"], **options)


FLAGS = ddm.FLAGS | unet.FLAGS | dict(
    autoencoder=("", "the first stage: a run of extras.autoencoder, by default the dataset's, or "
                     "an autoencoder of diffusers", None))
SAMPLING = ddm.SAMPLING
LATENT = dict(width=128, mult=(1, 2, 2, 2), attention=(16, 8), sigma_data=1.0)
DEMO = dict(image_size=64, second="conv", sigma_data=1.0, iterations=500)
PRESETS = dict.fromkeys(data.SIZES, LATENT) | dict(
    {"paper celebahq": ddm.PRESETS["paper celebahq"]}, shapes=DEMO)


def check(run):
    """Say what cannot be before all else; the first stage. Raises ValueError or Problem."""
    s = run.settings
    if s.h == "sine" or run.args.clip:
        raise ValueError("latents have no bounds: no --h sine and no --clip")
    ddm.predictor(None, **ddm.meaning(s))
    ddm.sampler(run)
    facts = run.checkpoint and run.checkpoint["network"]["first_stage"]
    stage = FirstStage(s.autoencoder or f"runs/autoencoder-{s.dataset}", run.device, facts)
    if s.image_size % stage.factor:
        raise ValueError(f"--image-size must be a multiple of {stage.factor}")
    with torch.device("meta"):
        build(**network(s, stage))
    return stage


@data.command
def main(argv=None):
    """The command line. Exits as the scripts do."""
    run = data.open_run("latent", __doc__, FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals():
        stage = check(run)
    if run.args.train:
        train(run, stage)
    if run.args.sample:
        write_samples(run, stage)


if __name__ == "__main__":
    main()
