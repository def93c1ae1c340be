"""The first stage of latent diffusion: a convolutional autoencoder, as LDM's (Rombach et al. 2022).

It turns an image [B, C, H, W] into latents z [B, c, H/f, W/f] and back. With f = 4, the default,
diffusion then sees a sixteenth of the pixels: extras/latent.py, extras/tasks.py. LDM's attention,
perceptual loss and discriminator are left out. Without the last two nobody invents fine texture, so
what the latents do not hold comes back smooth.

    python -m extras.autoencoder --train --evaluate            embedded shapes, 64x64, minutes
    python -m extras.autoencoder --train --dataset folder --data-dir photos        photos/test: see
    python -m extras.autoencoder --evaluate --run runs/autoencoder-folder          --evaluate
"""

import argparse
import copy
import hashlib
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import unet
from extras import task_data

# -------------------------------------------------------------------------------- 1 the first stage

class Autoencoder(nn.Module):
    """Images [B, channels, H, W] <-> latents [B, latent, H/f, W/f], with f = 2^(len(mult) - 1).

    It has no attention, so patches teach it images of any size.
    """

    def __init__(self, channels=3, latent=3, width=128, mult=(1, 2, 4), blocks=2):
        super().__init__()
        c = width
        down = [unet.conv(channels, c)]
        for i, m in enumerate(mult):
            down += [unet.conv(c, c, stride=2)] if i else []
            for _ in range(blocks):
                down.append(unet.Block(c, m * width, 0, 0.0))
                c = m * width
        self.encoder = nn.Sequential(*down, *ending(c, 2 * latent))
        up = [unet.conv(latent, c)]
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                up.append(unet.Block(c, m * width, 0, 0.0))
                c = m * width
            up += [nn.Upsample(scale_factor=2.0), unet.conv(c, c)] if i else []
        self.decoder = nn.Sequential(*up, *ending(c, channels))

    def encode(self, x):
        """(mean, logvar), each [B, latent, H/f, W/f], of x's latents."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def forward(self, x, noise):
        """(x again, from latents drawn by noise ~ N(0, I); mean; logvar)."""
        mean, logvar = self.encode(x)
        return self.decoder(mean + (logvar / 2).exp() * noise), mean, logvar


def ending(c_in, c_out):
    """The last layers of an encoder or a decoder."""
    return unet.norm(c_in), nn.SiLU(), unet.conv(c_in, c_out)


def ssim(a, b):
    """Structural similarity of each example, [B], of images in [-1, 1] (Wang et al. 2004).

    Its means, variances and covariance are those of even windows of 7x7 pixels.
    """
    a = (a + 1) / 2                                           # in [0, 1]: light is never negative
    b = (b + 1) / 2
    both = [a, b, a * a, b * b, a * b]
    window = min(7, *a.shape[-2:])
    ma, mb, aa, bb, ab = [F.avg_pool2d(x.contiguous(), window, stride=1) for x in both]
    c1 = 0.01 ** 2
    c2 = 0.03 ** 2
    light = (2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1)
    form = (2 * (ab - ma * mb) + c2) / (aa - ma ** 2 + bb - mb ** 2 + c2)
    return (light * form).flatten(1).mean(1)


def loss(x, again, mean, logvar, structure=0.1, kl=1e-4):
    """The first stage's loss of each example, [B]: ℓ₁, structure, and the latents' KL to N(0, I).

    Each is a mean. The KL only keeps the latents from growing.
    """
    far = (x - again).abs().flatten(1).mean(1)
    divergence = (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).mean(1) / 2
    return far + structure * (1 - ssim(x, again)) + kl * divergence


TASKS = dict(images="super_resolution", masks="saliency", edges="edges")     # of `task_data`


def as_task(run):
    """The run with a task for its script, so that `task_data` reads its images or targets."""
    view = copy.copy(run)
    view.settings = argparse.Namespace(**vars(run.settings) | dict(script=TASKS[run.settings.of]))
    return view


def train(run):
    """Train it on patches, from where the run's checkpoint stopped."""
    s = run.settings
    view = as_task(run)
    images = task_data.load_pairs(view)
    s.images = view.settings.images                           # a checkpoint names them
    sizes = {name: getattr(s, name) for name in ("latent", "width", "mult", "blocks")}
    channels = len(images[0]) if s.of == "images" else 1
    net, ema = run.networks(Autoencoder, sizes | dict(channels=channels))
    optimizer = torch.optim.AdamW(net.parameters(), lr=s.lr, fused=True)
    model = run.ready(net, training=True)
    side = s.image_size // 2 ** (len(s.mult) - 1)

    for step, g in run.steps(net, ema, optimizer):
        x, target, _ = task_data.batch(images, TASKS[s.of], s.image_size, s.batch_size, g)
        x = x if s.of == "images" else target
        noise = torch.randn((len(x), s.latent, side, side), generator=g, device=g.device)
        x, noise = run.share(x, noise)
        outputs = model(x, noise)
        losses = loss(x, *[out.float() for out in outputs], s.structure, s.kl)
        end_step(run, net, ema, optimizer, losses, step)
        run.record(losses, torch.zeros_like(losses))


def end_step(run, net, ema, optimizer, losses, step):
    """What ends a step of ddm.train, from the gradient to the average of the weights."""
    s = run.settings
    optimizer.zero_grad()
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    lr = s.lr * max((1 - step / s.iterations) ** 0.96, 0.1)                    # ADM, Sec. V-A
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    data.average(ema, net, s.ema, step)


class FirstStage:
    """A trained autoencoder: images in [-1, 1] <-> latents of mean 0 and variance 1.

    name: a run's directory, or diffusers' folder or hub name. facts: what a checkpoint keeps, the
    autoencoder's digest, and its latents' means and deviations. Raises Problem.
    """

    def __init__(self, name, device, facts=None):
        self.name = name
        self.net, self.channels, self.latent, levels = open_autoencoder(name)
        self.factor = 2 ** (levels - 1)
        self.net = self.net.to(device).eval().requires_grad_(False)
        weights = [weight.cpu().numpy().tobytes() for weight in self.net.state_dict().values()]
        digest = hashlib.sha256(b"".join(weights)).hexdigest()[:16]
        self.facts = facts or dict(digest=digest, factor=self.factor,
                                   mean=[0.0] * self.latent, std=[1.0] * self.latent)
        if self.facts["digest"] != digest:
            raise data.Problem(f"{name} is not the autoencoder that this run was trained with")

    def measure(self, x):
        """Take the mean and deviation of each channel of the latents from these images."""
        z = self.encode(x)
        self.facts |= dict(mean=z.mean((0, 2, 3)).tolist(), std=z.std((0, 2, 3)).tolist())

    def statistics(self, z):
        """(mean, deviation), each [c, 1, 1]."""
        return [z.new_tensor(self.facts[name])[:, None, None] for name in ("mean", "std")]

    @torch.no_grad()
    def encode(self, x):
        """[B, C, H, W] -> [B, c, H/f, W/f]. An autoencoder of colours takes grey images, too."""
        if x.shape[1] > self.channels:
            raise data.Problem(f"{self.name} is for grey images, and these have colours", 2)
        z = []
        for part in x.expand(-1, self.channels, -1, -1).split(16):       # memory is short
            out = self.net.encode(part)
            if not isinstance(out, tuple):                    # diffusers': of VQModel, or of KL
                out = [out.latents if "latents" in out else out.latent_dist.mean]
            z.append(out[0])
        mean, std = self.statistics(z[0])
        return (torch.cat(z) - mean) / std

    @torch.no_grad()
    def decode(self, z):
        """[B, c, h, w] -> [B, C, f h, f w]."""
        mean, std = self.statistics(z)
        decode = self.net.decoder if isinstance(self.net, Autoencoder) else self.net.decode
        parts = [decode(part) for part in (z * std + mean).split(16)]
        return torch.cat([getattr(part, "sample", part) for part in parts]).clamp(-1, 1)


def open_autoencoder(name):
    """(the network, its images' channels, its latents' channels, its levels). Raises Problem."""
    if (pathlib.Path(name) / "checkpoint.pt").exists():
        saved = data.load_checkpoint(pathlib.Path(name) / "checkpoint.pt")
        if saved["method"].get("script") != "autoencoder":
            raise data.Problem(f"{name} is no run of extras.autoencoder", 2)
        sizes = saved["network"]
        with data.refusals(f"{name} does not fit the network it names:", 1, Exception):
            net = Autoencoder(**sizes)
            net.load_state_dict(saved["ema"])
            return net, sizes["channels"], sizes["latent"], len(sizes["mult"])
    if pathlib.Path(name).parts[:1] == ("runs",):
        raise data.Problem(f"there is no first stage in {name}: train one (python -m "
                           f"extras.autoencoder --train), or name one by --autoencoder", 2)
    try:
        import diffusers
        net = diffusers.AutoModel.from_pretrained(name)
        config = net.config
        return net, config.in_channels, config.latent_channels, len(config.block_out_channels)
    except ImportError as error:
        raise data.Problem(f"{name} is no run of ours; if it is diffusers', pip install "
                           f"diffusers") from error
    except (OSError, ValueError, AttributeError) as error:
        raise data.Problem(f"{name} is no autoencoder of ours or diffusers' ({error})") from error


# -------------------------------------------------------------------------------- 2 how good it is

def bicubic(x, numbers):
    """x [1, C, h, w] as a smaller image of so many numbers, enlarged again."""
    whole = tuple(x.shape[-2:])
    scale = math.sqrt(numbers / x.numel())
    small = tuple(round(side * scale) for side in whole)
    for size in (small, whole):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(-1, 1)


def unseen(run, stage):
    """Yield --n images that it was not trained on, [1, C, h, w], h and w multiples of f."""
    s = run.settings
    if s.dataset == "shapes":                                 # training has seed 0
        items = task_data.shape_pairs(TASKS[s.of], run.args.n, s.image_size, seed=1).numpy()
    else:
        mode = "L" if s.of == "images" and stage.channels == 1 else "RGB"
        files = task_data.test_files(as_task(run), run.args.n)
        items = (task_data.open_pair(*pair, mode, s.edge_bits)[0] for _, *pair in files)
    for pixels in items:
        x = torch.from_numpy(pixels[-stage.channels:])[None].to(run.device)
        h, w = [side - side % stage.factor for side in x.shape[-2:]]
        yield data.to_float(x[..., :h, :w])


def evaluate(run):
    """Print PSNR and SSIM of images, encoded and decoded, and of `bicubic`. Draw eight of them."""
    stage = FirstStage(run.directory, run.device)
    scores = []
    tiles = []
    for x in unseen(run, stage):
        z = stage.encode(x)
        for y in (bicubic(x, z.numel()), stage.decode(z)):
            pair = [data.to_uint8(each).cpu().numpy() for each in (x, y)]
            scores.append((task_data.psnr(*pair), ssim(x, y).item()))
            tiles.append(y[0])
        tiles.append(x[0])
    for name, each in (("bicubic", scores[::2]), ("autoencoder", scores[1::2])):
        psnr, similar = np.mean(each, axis=0)
        data.say(f"{name:12} PSNR {psnr:.2f} dB, SSIM {similar:.3f}   ({len(each)} images)")
    crop = torchvision.transforms.CenterCrop(run.settings.image_size)
    tiles = torch.stack([crop(tile) for tile in tiles[:24]])
    picture = run.directory / "evaluation.png"
    data.save_png(data.grid(data.to_uint8(tiles), across=6), picture)
    data.say(f"wrote {picture}: bicubic's, the autoencoder's and the image, two images a row")


# ----------------------------------------------------------------------------------- 3 command line

FLAGS = {name: unet.FLAGS[name] for name in ("width", "mult", "blocks")} | dict(
    latent=(3, "channels of the latents", None),
    of=("images", "what it encodes; masks and edges: extras.tasks' targets", tuple(TASKS)),
    edge_bits=(False, "bit k of an edge PNG is what annotator k marked", None),
    structure=(0.1, "weight of 1 - SSIM in the loss", (0,)),
    kl=(1e-4, "weight of the KL in the loss", (0,)))
SAMPLING = dict(
    evaluate=(False, "print how well --n test images come back, and draw eight of them", None))
DEMO = dict(image_size=64, width=16, mult=(1, 2, 4), batch_size=8, iterations=800)
LDM = dict(width=128, mult=(1, 2, 4), blocks=2, batch_size=12, lr=1e-4)
PRESETS = dict(shapes=DEMO, folder=LDM | dict(image_size=128))


def check(run):
    """Say what cannot be before all else. Raises ValueError or Problem."""
    s, args = run.settings, run.args
    unet.check(s.width, s.mult, s.image_size, "conv")
    if s.dataset not in ("shapes", "folder"):                 # so that a run knows its files
        raise ValueError("an autoencoder is for --dataset shapes or folder: give the folder of "
                         "other images as --data-dir")
    if args.sample or args.out:
        raise ValueError("an autoencoder draws nothing: say --evaluate, or see extras.latent")
    if s.dataset == "folder" and args.train and args.evaluate:
        task_data.test_files(as_task(run), 1)


@data.command
def main(argv=None):
    """The command line. Exits as the scripts do."""
    run = data.open_run("autoencoder", __doc__, FLAGS, SAMPLING, PRESETS, argv)
    with data.refusals():
        check(run)
    if run.args.train:
        train(run)
    if run.args.evaluate and run.rank == 0:
        evaluate(run)


if __name__ == "__main__":
    main()
