#!/usr/bin/env python3
"""FD: how far a set of 32x32 samples is from CIFAR-10, where the Inception weights of FID are not at hand.

    python fd.py SAMPLES [--n 10000]      SAMPLES: a folder of PNGs, or a uint8 .npy [N, 3, 32, 32]
    python fd.py SAMPLES --reference cifar10-train-16.npy      16x16 samples, against the last 10,000 images of an .npy

Images of 16x16 are doubled to 32x32, the reference's as well as the samples'.

It is the Fréchet distance of FID, and improved precision and recall (Kynkäänniemi et al. 2019, k = 3), on the pooled
384-dimensional features of a small ResNet-9 trained to classify CIFAR-10 (weights.pt beside this file). It is NOT FID: a
figure compares only with figures of this same program at the same number of samples. Floors, for orientation, are in
reference.json. Needs torch, numpy and Pillow only.
"""
import argparse, json, pathlib, sys
import numpy as np, torch
from torch import nn

HERE = pathlib.Path(__file__).parent


def block(i, o, pool=False):
    layers = [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.GELU()]
    if pool:
        layers.insert(1, nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Res(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = block(c, c), block(c, c)

    def forward(self, x):
        return x + self.b(self.a(x))


class Net(nn.Module):
    def __init__(self, w=48):
        super().__init__()
        self.body = nn.Sequential(block(3, w), block(w, 2 * w, True), Res(2 * w), block(2 * w, 4 * w, True),
                                  block(4 * w, 8 * w, True), Res(8 * w))
        self.fc = nn.Linear(8 * w, 10)


def images(path, n):
    path = pathlib.Path(path)
    if path.is_dir():
        from PIL import Image
        files = sorted(path.rglob("*.png"))[:n]
        return np.stack([np.asarray(Image.open(f).convert("RGB")).transpose(2, 0, 1) for f in files])
    return np.load(path, mmap_mode="r")[:n]


def doubled(x):
    """16x16 images as 32x32, every pixel four times."""
    return x.repeat(2, axis=2).repeat(2, axis=3) if x.shape[2:] == (16, 16) else x


@torch.no_grad()
def features(x, device, batch=500):
    net = Net()
    net.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
    net.eval().to(device)
    mean = torch.tensor([125.31, 122.95, 113.87], device=device).view(1, 3, 1, 1)
    std = torch.tensor([62.99, 62.09, 66.70], device=device).view(1, 3, 1, 1)
    out = []
    for i in range(0, len(x), batch):
        b = torch.from_numpy(np.array(x[i:i + batch])).to(device).float()
        out.append(net.body((b - mean) / std).mean((2, 3)).double().cpu())
    return torch.cat(out)


def frechet(mu1, c1, mu2, c2):
    w, v = torch.linalg.eigh(c1)
    root = (v * w.clamp(min=0).sqrt()) @ v.T
    return ((mu1 - mu2) ** 2).sum() + c1.trace() + c2.trace() - 2 * torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()


def radii(f, k=3):
    return torch.cat([torch.cdist(f[i:i + 1000], f).kthvalue(k + 1, 1).values for i in range(0, len(f), 1000)])


def covered(f, g, r):
    """Share of f inside the union of balls of radius r around g."""
    return torch.cat([(torch.cdist(f[i:i + 1000], g) <= r).any(1) for i in range(0, len(f), 1000)]).double().mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("samples")
    p.add_argument("--n", type=int, default=10000)
    p.add_argument("--reference", help="a uint8 .npy [N, 3, S, S] whose last 10,000 images are the reference")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args()
    x = doubled(images(a.samples, a.n))
    if x.shape[1:] != (3, 32, 32) or x.dtype != np.uint8:
        sys.exit(f"fd: want uint8 [N, 3, 32, 32], got {x.dtype} {list(x.shape)}")
    f = features(x, a.device)
    if a.reference:
        r = features(doubled(np.load(a.reference, mmap_mode="r")[-10000:]), a.device)
        ref = {"mu": r.mean(0), "cov": r.T.cov(), "features": r}
    else:
        ref = torch.load(HERE / "reference.pt", weights_only=True)
    fd = frechet(f.mean(0), f.T.cov(), ref["mu"].double(), ref["cov"].double()).item()
    m = min(len(f), 5000)
    g, h = ref["features"][:m].float(), f[:m].float()
    print(json.dumps({"n": len(f), "fd": round(fd, 4), "precision": round(covered(h, g, radii(g)), 4),
                      "recall": round(covered(g, h, radii(h)), 4)}))


if __name__ == "__main__":
    main()
