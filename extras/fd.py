"""FD: how far samples are from CIFAR-10, where the Inception weights of FID are not at hand.

    python -m extras.fd FOLDER --n 1000      a folder of images, or a uint8 .npy

FID's Fréchet distance, and improved precision and recall (Kynkäänniemi et al. 2019, k = 3), on 384
features of a small ResNet-9 that classifies CIFAR-10. It is not FID: compare its figures with each
other alone, at the same number of samples. Images of 16x16 are doubled, those of 64x64 halved.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import normalize

import data

HOME = pathlib.Path(__file__).parents[1] / "assets/fd"
SIZES = (16, 32, 64)


def block(c_in, c_out, *pool):
    """A convolution, its norm and its activation."""
    convolution = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pool, nn.BatchNorm2d(c_out), nn.GELU())


class Res(nn.Module):
    """Two blocks and a skip."""

    def __init__(self, c):
        super().__init__()
        self.a = block(c, c)
        self.b = block(c, c)

    def forward(self, x):
        return x + self.b(self.a(x))


def load(path, which):
    """This slice of a folder's images or an .npy's: uint8 [N, 3, 32, 32]. Raises data.Problem."""
    if pathlib.Path(path).is_dir():
        files = data.image_files(pathlib.Path(path))[0][which]
        images = [np.asarray(data.open_image(file, "RGB")).transpose(2, 0, 1) for file in files]
    else:
        with data.refusals(f"{path} is no folder, and no .npy file:", 1, Exception):
            images = np.load(path, mmap_mode="r")[which]
    kinds = {(str(image.dtype), *image.shape) for image in images}
    if len(images) < 4 or kinds not in [{("uint8", 3, size, size)} for size in SIZES]:
        raise data.Problem(f"{path} has {len(images)} images {sorted(kinds)}: FD needs four or "
                           f"more, uint8, all of 3x16x16, 3x32x32 or 3x64x64")
    return in_32(torch.from_numpy(np.stack(images)))


def in_32(images):
    """uint8 images [N, 3, S, S] in 32x32, S being one of SIZES."""
    if images.shape[-1] == 16:
        return images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if images.shape[-1] == 64:
        return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    return images


@torch.no_grad()
def features(images):
    """What the classifier's last layer sees of uint8 images: [N, 384], in float64."""
    half = nn.MaxPool2d(2)
    body = nn.Sequential(
        block(3, 48), block(48, 96, half), Res(96), block(96, 192, half), block(192, 384, half),
        Res(384))
    net = nn.ModuleDict(dict(body=body, fc=nn.Linear(384, 10)))
    net.load_state_dict(torch.load(HOME / "weights.pt", weights_only=True))
    device = data.choose_device("auto")
    net.eval().to(device)
    found = []
    for part in images.split(500):
        x = normalize(part.to(device).float(), (125.31, 122.95, 113.87), (62.99, 62.09, 66.70))
        found.append(body(x).mean((2, 3)).double().cpu())
    return torch.cat(found)


def frechet(f, mean, cov):
    """The squared Fréchet distance of the Gaussian of features f from another."""
    own = f.T.cov()
    values, vectors = torch.linalg.eigh(own)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    both = root @ cov @ root
    cross = torch.linalg.eigvalsh(both).clamp(min=0).sqrt().sum()
    return (f.mean(0) - mean).square().sum() + own.trace() + cov.trace() - 2 * cross


def covered(f, g, k=3):
    """The share of f that some g has nearer than its own k-th neighbour in g."""
    radii = torch.cat([torch.cdist(p, g).kthvalue(k + 1, 1).values for p in g.split(1000)])
    inside = [(torch.cdist(p, g) <= radii).any(1) for p in f.split(1000)]
    return torch.cat(inside).double().mean().item()


@data.command
def main(argv=None):
    """The command line. Its last line is JSON."""
    parser = argparse.ArgumentParser(prog="fd", description=__doc__.split("\n\n")[0])
    parser.error = data.complain
    parser.add_argument("samples")
    parser.add_argument("--n", type=data.number(int, 4), default=10000)
    parser.add_argument("--reference", help="an .npy, whose last 10,000 images are taken")
    args = parser.parse_args(argv)
    if "" in (args.samples, args.reference):                  # it would be the current folder
        data.complain("leave no name empty")
    f = features(load(args.samples, slice(args.n)))
    known = torch.load(HOME / "reference.pt", weights_only=True)
    if args.reference:
        g = features(load(args.reference, slice(-10000, None)))
        known = dict(mu=g.mean(0), cov=g.T.cov(), features=g)
    fd = frechet(f, known["mu"].double(), known["cov"].double()).item()
    mine = f[:5000].float()
    true = known["features"][:len(mine)].float()
    found = dict(n=len(f), fd=fd, precision=covered(mine, true), recall=covered(true, mine))
    data.say(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
