"""What is not diffusion: images in; pictures, checkpoints and progress out; devices, processes and the common flags.

The four method scripts share this file, so that they can be nothing but their papers. A dataset is one uint8 array; a
checkpoint is one file of plain types and tensors; every random draw is a function of (seed, step) or (seed, image).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin


# ---------------------------------------------------------------------------------------------------------- errors

class Problem(Exception):
    """A sentence for the user: what is wrong and what to do; with the exit status, 2 for bad arguments, else 1."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def command(main):
    """Decorator for a script's main(argv=None): a Problem becomes a sentence on stderr and an exit status."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except Problem as problem:
            sys.stdout.flush()
            print(f"{pathlib.Path(main.__code__.co_filename).stem}: {problem}", file=sys.stderr)
            raise SystemExit(problem.status) from None
        except torch.OutOfMemoryError:
            print("out of GPU memory: try a smaller --batch-size, --n or --width", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return wrapped


@contextlib.contextmanager
def explained(doing, path):
    """Turn the system's errors while `doing` something with `path` (full disk, no permission ...) into a Problem."""
    try:
        yield
    except OSError as error:
        raise Problem(f"cannot {doing} {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def bad_arguments():
    """Turn the errors with which networks and pure functions refuse settings into a Problem with exit status 2."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise Problem(str(error), 2) from error


# ------------------------------------------------------------------------------------------------------ randomness

PURPOSES = ("weights", "batch", "dropout", "image", "hole")


def seed(purpose, *numbers):
    """A well-mixed 63-bit seed from one of PURPOSES and whole numbers >= 0, such as ("batch", seed, step)."""
    words = np.random.SeedSequence((PURPOSES.index(purpose), *numbers)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def image_generators(run_seed, images):
    """A CPU generator for every image number: image i is a function of (seed, i) alone, on every device alike."""
    return [torch.Generator().manual_seed(seed("image", run_seed, i)) for i in images]


def randn(like, generator=None):
    """Standard normal noise, shaped and placed as `like` [B, ...]. generator: None, one, or a list of B."""
    if isinstance(generator, (list, tuple)):
        rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generator]
        return torch.stack(rows).to(like.device)
    device = generator.device if generator else like.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


# ------------------------------------------------------------------------------------------------------- processes

Processes = collections.namedtuple("Processes", "device rank world")


def start(device="auto"):
    """Choose the device and, under torchrun, join the other processes. device: auto, cpu, cuda or mps -> Processes."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, available in there.items() if available)
    if not there[device]:
        raise Problem(f"PyTorch finds no {device} device on this machine: use --device cpu", 2)
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise Problem(f"this machine has {torch.cuda.device_count()} GPUs: start no more processes than that", 2)
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world > 1:
        backend, ids = ("nccl", {"device_id": torch.device(device)}) if device.startswith("cuda") else ("gloo", {})
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12), **ids)     # to convert a dataset in
    return Processes(torch.device(device), rank, world)


def barrier(processes):
    """Wait for the other processes, where there are any."""
    if processes.world > 1:
        dist.barrier()


def share(batch_size, processes):
    """This process's slice of a global batch; a Problem where the processes can't share it evenly."""
    part, rest = divmod(batch_size, processes.world)
    if rest:
        raise Problem(f"--batch-size {batch_size} can't be shared evenly between {processes.world} processes", 2)
    return slice(processes.rank * part, (processes.rank + 1) * part)


# -------------------------------------------------------------------------------------------------------- datasets

CROPS = {           # how the papers cut their images: side of the centred square that is resized; None: the largest
    "cifar10": None,        # 32x32 as they are
    "celeba": 140,          # of the aligned 178x218, as DDIM does; to 64
    "celebahq": None,       # 1024x1024, only resized; to 256
    "lsun-church": None,    # to 64, 128 or 256
    "folder": None,
}


def load(name, data_dir, size, processes):
    """The training images of a dataset as one uint8 tensor [N, C, size, size], memory-mapped, or on a GPU where it
    fits.

    Made once by the first process, from torchvision's CIFAR-10 or a folder of images (data_dir itself, or
    data_dir/name), into an .npy file, and only mapped afterwards. Raises Problem.
    """
    if name == "shapes":
        return torch.from_numpy(shapes(5000, size)).to(processes.device)
    data_dir = pathlib.Path(data_dir)
    path, whole, files = data_dir / f"{name}-train-{size}.npy", data_dir / "cifar10-train-32.npy", []
    if name == "folder":                            # cached here, keyed by the listing, and not in the user's folder
        files = listing(data_dir, name)
        state = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        path = pathlib.Path(f"data/folder-{hashlib.sha256(state.encode()).hexdigest()[:16]}-train-{size}.npy")
    if processes.rank == 0 and not path.exists():
        if name == "cifar10":
            pixels = read_array(whole, 32).transpose(0, 2, 3, 1) if whole.exists() else download_cifar10(data_dir)
            write_array(path, pixels, lambda item: square(Image.fromarray(item), size), (len(pixels), 3, size, size))
        else:
            files = files or listing(data_dir / name, name)
            shape = (len(files), channels_of(files), size, size)
            write_array(path, files, lambda file: square(open_image(file), size, CROPS[name]), shape)
    barrier(processes)
    images, device = torch.from_numpy(read_array(path, size)), processes.device
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return images.to(device) if fits else images


def read_array(path, size):
    """Map an .npy of the project's format, uint8 [N, 1 or 3, size, size]; a Problem for anything else."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        dtype, shape = array.dtype, array.shape
    except Exception as error:              # numpy raises many kinds
        raise Problem(f"{path} is damaged or no .npy file ({error}): delete it, and it is made again") from error
    if dtype != np.uint8 or shape[1:] not in ((1, size, size), (3, size, size)) or not shape[0]:
        raise Problem(f"{path} holds {array.dtype} {list(array.shape)}, not uint8 [N, 1 or 3, {size}, {size}]: move it")
    return array


def download_cifar10(root):
    """torchvision's CIFAR-10, uint8 [50000, 32, 32, 3], downloaded into `root` where it is not there."""
    from torchvision.datasets import CIFAR10
    try:
        return CIFAR10(str(root), train=True, download=True).data
    except Exception as error:              # the network, the disk, a checksum: torchvision raises many kinds
        raise Problem(f"CIFAR-10 is not in {root} and cannot be downloaded ({first_line(error)}): point --data-dir at "
                      f"a folder that has torchvision's copy, or cifar10-train-32.npy") from error


def listing(folder, name):
    """All image files below a folder, sorted; a Problem where there are none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    if not folder.is_dir():
        raise Problem(f"--dataset {name} reads a folder of images, but {folder} is none: say where with --data-dir", 2)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.is_file())
    if not files:
        raise Problem(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}), nor have its subfolders", 2)
    return files


def open_image(file, header=False):
    """A Pillow image, RGB or L; with header=True only whether it is greyscale. A Problem names an unreadable file."""
    try:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
            if header:
                return grey
            if image.mode.startswith("I"):                      # 16 bits, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    except Exception as error:              # Pillow's decoders raise many kinds for a broken file
        raise Problem(f"{file} is not a readable image ({error}): remove it, or mend it") from error


def square(image, size, crop=None):
    """A centred square (of `crop` pixels, or the largest) of a Pillow image, resized: uint8 [C, size, size]."""
    side = min(crop or min(image.size), *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.BOX if side % size == 0 else Image.LANCZOS)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


def channels_of(files):
    """1 if all these images are grey, else 3."""
    return 1 if all(open_image(file, header=True) for file in files) else 3


def write_array(path, items, read, shape, place=lambda i: i):
    """Write read(item) of every item to array[place(i)] of one .npy, under a temporary name that is then renamed."""
    partial, live = path.with_name(f".{path.name}.{os.getpid()}.partial"), Live()
    with explained("write", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            with concurrent.futures.ThreadPoolExecutor() as pool:           # Pillow decodes outside of Python's lock
                for k in range(0, len(items), 1000):
                    for i, image in enumerate(pool.map(read, items[k:k + 1000]), k):
                        array[place(i)] = image                             # grey fills equal channels
                    live(f"{path.name}: {i + 1} of {len(items)} images", last=i + 1 == len(items))
            array.flush()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def shapes(n, size, seed=0, mask=False):
    """The embedded dataset: disks, rings, squares, triangles and crosses in four colours, uint8 [n, 3, size, size].

    One shape an image, near the centre, drawn by Pillow at four times the size and averaged down; the same everywhere.
    mask=True: the same shapes in white on black, [n, 1, size, size].
    """
    random, big, ground = np.random.default_rng(seed), 4 * size, 0 if mask else (16, 20, 40)
    colours = [(235, 70, 60), (250, 200, 50), (80, 200, 110), (90, 150, 250)]
    images = np.empty((n, size, size, 1 if mask else 3), np.uint8)
    for i in range(n):
        r = big * random.uniform(0.30, 0.38)
        x, y = big / 2 + big * random.uniform(-0.1, 0.1, 2)
        fill = colours[random.integers(len(colours))]
        fill, image = 255 if mask else fill, Image.new("L" if mask else "RGB", (big, big), ground)
        draw, kind = ImageDraw.Draw(image), i % 5
        if kind == 0:
            draw.ellipse([x - r, y - r, x + r, y + r], fill)
        elif kind == 1:
            draw.ellipse([x - r, y - r, x + r, y + r], outline=fill, width=round(0.4 * r))
        elif kind == 2:
            draw.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill)
        elif kind == 3:
            draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
        else:
            draw.rectangle([x - r, y - 0.33 * r, x + r, y + 0.33 * r], fill)
            draw.rectangle([x - 0.33 * r, y - r, x + 0.33 * r, y + r], fill)
        images[i] = np.asarray(image.reduce(4)).reshape(images[i].shape)
    return images.transpose(0, 3, 1, 2).copy()


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, clamped; the exact inverse of `to_float`."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_batch(images, batch_size, generator):
    """x0 [B, C, H, W] in [-1, 1], on the generator's device: drawn with replacement, each image flipped by a coin."""
    device = generator.device
    index = torch.randint(len(images), (batch_size,), generator=generator, device=device)
    flip = torch.rand(batch_size, generator=generator, device=device) < 0.5
    x0 = to_float(images[index.to(images.device)].to(device))
    return torch.where(flip[:, None, None, None], x0.flip(-1), x0)


# ------------------------------------------------------------------------------------------ image-conditioned tasks

TARGETS = {"super_resolution": None, "inpainting": None, "saliency": "mask", "edges": "edge"}   # the target's folder
SCALE = 4           # of super-resolution, each way
GAIN = 4.0          # what super-resolution's residual is multiplied by: photos' root mean square becomes about .5


def shrink(image):
    """The low-resolution image: bicubic with antialiasing (a = -1/2, as Pillow and MATLAB), rounded to 8 bits."""
    size = [length // SCALE for length in image.shape[-2:]]
    small = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return to_float(to_uint8(small))


def enlarge(image):
    """Super-resolution's baseline and condition: the same bicubic kernel, the other way."""
    size = [length * SCALE for length in image.shape[-2:]]
    return torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)


def draw_hole(height, width, unit, random):
    """A mask of what is missing, bool [height, width]: boxes and free-form strokes, one for every unit² pixels.

    unit: the size of image for which one hole is right, in pixels (the training patches'); random: numpy's Generator.
    """
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(max(1, round(height * width / unit ** 2))):
        x, y = random.uniform(0, width), random.uniform(0, height)
        if random.random() < 0.5:
            w, h = random.uniform(0.1, 0.25, 2) * unit              # half the sides, so at most half the unit each
            x, y = min(max(x, w), max(w, width - w)), min(max(y, h), max(h, height - h))
            draw.rectangle([x - w, y - h, x + w, y + h], fill=1)
            continue
        thick, angle = random.uniform(0.06, 0.15) * unit, random.uniform(0, 2 * math.pi)
        for _ in range(random.integers(3, 8)):
            angle += random.uniform(-1, 1)
            step = random.uniform(0.1, 0.3) * unit
            end = [min(max(x + step * math.cos(angle), 0), width), min(max(y + step * math.sin(angle), 0), height)]
            draw.line([x, y, *end], fill=1, width=max(1, round(thick)))
            draw.ellipse([end[0] - thick / 2, end[1] - thick / 2, end[0] + thick / 2, end[1] + thick / 2], fill=1)
            x, y = end
    return torch.from_numpy(np.array(canvas))


def example(task, image, target=None, hole=None):
    """(x0, condition) of a task: what is diffused, and what the network is told. All [B, ., H, W] in [-1, 1].

    image: C channels. target: one channel, of saliency and edges. hole: bool [B, 1, H, W], of inpainting.
    Super-resolution diffuses GAIN times what bicubic enlargement lacks.
    """
    if task == "super_resolution":
        condition = enlarge(shrink(image))
        return GAIN * (image - condition), condition
    if task == "inpainting":
        return image, torch.cat([image.masked_fill(hole, 0), 2.0 * hole - 1], dim=1)
    return target, image


def finish(task, x0, condition):
    """The image that a sample x0 means: with the residual added, or with the known pixels pasted back."""
    if task == "super_resolution":
        return (condition + x0 / GAIN).clamp(-1, 1)
    if task == "inpainting":
        return torch.where(condition[:, -1:] > 0, x0, condition[:, :-1]).clamp(-1, 1)
    return x0.clamp(-1, 1)


class Pairs:
    """Images with their targets, of any sizes, behind each other in one uint8 array: [C + K, h, w] each.

    pixels: uint8 [total], mapped or on a GPU. sizes: (h, w) of every image, none below `size`. channels: C. The K last
    channels are the target, and none where the task makes it from the image. shape: [N, C, size, size], as of a
    dataset of patches.
    """

    def __init__(self, task, pixels, sizes, channels, size):
        self.task, self.pixels, self.sizes, self.shape = task, pixels, sizes, (len(sizes), channels, size, size)
        self.planes = channels + (TARGETS[task] is not None)
        self.ends = np.cumsum([0, *(self.planes * h * w for h, w in sizes)])

    def __getitem__(self, i):
        return self.pixels[self.ends[i]:self.ends[i + 1]].view(self.planes, *self.sizes[i])

    def draw(self, batch_size, generator):
        """(x0, condition) of a batch, on the generator's device: images drawn with replacement, of each a patch,
        flipped by a coin, image and target alike. A function of the generator's seed alone.
        """
        random, size, patches, holes = np.random.default_rng(generator.initial_seed()), self.shape[-1], [], None
        for i in random.integers(len(self.sizes), size=batch_size):
            h, w = self.sizes[i]
            top, left = random.integers(h - size + 1), random.integers(w - size + 1)
            patch = self[i][:, top:top + size, left:left + size]
            patches.append(patch.flip(-1) if random.random() < 0.5 else patch)
        x = to_float(torch.stack(patches).to(generator.device))
        if self.task == "inpainting":
            holes = torch.stack([draw_hole(size, size, size, random) for _ in range(batch_size)])[:, None].to(x.device)
        return example(self.task, x[:, :self.shape[1]], x[:, self.shape[1]:], holes)


def load_pairs(settings, processes):
    """The training images, and targets, of settings["task"] as Pairs. Raises Problem.

    The embedded shapes have all targets; other datasets serve super-resolution and inpainting; of a folder's,
    `partners` tells. Its files are decoded once into data/pairs-*.npy, keyed by the listing, and only mapped later.
    """
    task, name, size = settings["task"], settings["dataset"], settings["image_size"]
    if name != "folder":
        if name != "shapes" and TARGETS[task]:
            raise Problem(f"--task {task} needs targets, which {name} has not: use shapes, or --dataset folder", 2)
        shapes_ = name == "shapes"
        pixels = shape_pairs(task, 5000, size) if shapes_ else load(name, settings["data_dir"], size, processes)
        channels = pixels.shape[1] - (TARGETS[task] is not None)
        pixels = pixels.to(processes.device) if shapes_ else pixels                 # `load` has placed the others
        return Pairs(task, pixels.reshape(-1), [(size, size)] * len(pixels), channels, size)
    files = partners(settings["data_dir"], task)
    channels, sizes = channels_of([image for image, _ in files]), [fitted(image, task, size) for image, _ in files]
    state = repr([TARGETS[task], settings["edge_bits"], channels, sizes,
                  *[(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for pair in files for f in pair if f]])
    path = pathlib.Path(f"data/pairs-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npy")
    pairs = Pairs(task, None, sizes, channels, size)

    def read(i):
        image, target, _ = open_pair(task, *files[i], settings["edge_bits"])
        image = image.convert("RGB" if channels == 3 else "L")
        planes = [np.asarray(plane.resize(sizes[i][::-1], Image.BICUBIC) if plane.size != sizes[i][::-1] else plane)
                  for plane in (image, target) if plane]
        return np.concatenate([plane.reshape(*sizes[i], -1).transpose(2, 0, 1).reshape(-1) for plane in planes])

    if processes.rank == 0:
        print(f"{len(files)} images below {settings['data_dir']} (folders named test, or ending in -TE, are left out)")
        if not path.exists():
            write_array(path, range(len(files)), read, (int(pairs.ends[-1]),),
                        lambda i: slice(pairs.ends[i], pairs.ends[i + 1]))
    barrier(processes)
    try:
        pixels, device = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), processes.device
    except Exception as error:              # numpy raises many kinds
        raise Problem(f"{path} is damaged ({error}): delete it, and it is made again") from error
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    pairs.pixels = pixels.to(device) if fits else pixels
    return pairs


def shape_pairs(task, n, size, seed=0):
    """Embedded shapes and their targets, uint8 [n, 3 or 4, size, size]: the mask, or its one-pixel outline."""
    images = torch.from_numpy(shapes(n, size, seed))
    if not TARGETS[task]:
        return images
    target = torch.from_numpy(shapes(n, size, seed, mask=True))
    if task == "edges":
        inside = (target >= 128).float()
        target = ((inside + torch.nn.functional.max_pool2d(-inside, 3, 1, 1)) * 255).to(torch.uint8)
    return torch.cat([images, target], dim=1)


def partners(folder, task, test=False):
    """[(image, its target or None)] of all images below a folder, sorted. Raises Problem.

    Where the task needs targets, images lie in a folder named images (or ending so: DUTS-TR-Image), and the target of
    images/x.jpg is masks/x.* or edges/x.* beside it. Folders of targets are no images, and folders named test or ending
    in -TE (DUTS's) are left out, unless the folder itself is one or test is true.
    """
    folder = pathlib.Path(folder)
    files, word, found = listing(folder, "folder"), TARGETS[task], []

    def of(file, pattern):                  # whether a folder on the way to the file is named so
        return any(re.fullmatch(pattern, part, re.I) for part in file.relative_to(folder).parts[:-1])

    files = [f for f in files if not of(f, "(.*[-_])?(mask|edge)s?") and (test or not of(f, "test|.*-te"))]

    @functools.cache
    def targets(place):                     # of a folder of images: {stem: file} of the folders of targets beside it
        name = re.sub("images?$", "", place.name, flags=re.I) + word
        beside = [f for f in place.parent.iterdir() if f.name.lower() in (name.lower(), f"{name}s".lower())]
        return {f.stem: f for g in sorted(beside) if g.is_dir() for f in listing(g, "folder")}

    for file in files:
        if not word:
            found.append((file, None))
        elif re.search("images?$", file.resolve().parent.name, re.I):
            target = targets(file.resolve().parent).get(file.stem)
            if target is None:
                raise Problem(f"{file} has no partner named {file.stem} in a folder of {word}s beside its own")
            found.append((file, target))
    if not found:
        where = f" in folders named images, beside folders of {word}s" if word else ""
        raise Problem(f"{folder} has no images{where} to use (folders named test are left out)", 2)
    return found


def open_pair(task, image, target, bits):
    """(image, target or None, annotators or None): Pillow images, and bool [A, h, w] of edges. Raises Problem.

    bits: bit k of an edge PNG is annotator k's (those who marked nothing can't be told from none); the target is their
    mean. Otherwise it is grey, as a mask is, and one annotator's where it is 128 or more.
    """
    image = open_image(image)
    if target is None:
        return image, None, None
    name, target, annotators = target, open_image(target), None
    if target.size != image.size:
        raise Problem(f"{name} is {target.width}x{target.height}, and its image {image.width}x{image.height}")
    pixels = np.asarray(target.convert("L"))
    if not bits and 0 < pixels.max() < 128:
        raise Problem(f"{name} has no pixel above {pixels.max()}: a target is black (0) to white (255)" + (
            ", or a bit for each annotator with --edge-bits" if task == "edges" else ""))
    if task == "edges":
        planes = [pixels >> k & 1 for k in range(8)] if bits else [pixels >= 128]
        annotators = np.stack([plane.astype(bool) for plane in planes if plane.any()] or [np.zeros_like(pixels, bool)])
        if bits:
            pixels = (255 * annotators.mean(0)).round().astype(np.uint8)
    return image, Image.fromarray(pixels), annotators


def fitted(file, task, size):
    """(h, w) to train an image file at: a square for saliency, which is about the whole image; else its own size, or as
    much more as makes room for a patch.
    """
    with Image.open(file) as image:
        w, h = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size      # turned by a quarter
    more = max(1, size / min(h, w))
    return (size, size) if task == "saliency" else (max(size, round(h * more)), max(size, round(w * more)))


def psnr(a, b, where=None):
    """Peak signal-to-noise ratio in dB of two images in [0, 255], over the elements that the mask `where` selects; 100
    dB at most, so that one perfect image does not make a mean infinite.
    """
    error = (a.double() - b.double()) ** 2
    error = (error if where is None else error[where.expand_as(error)]).mean()
    return min(100.0, float(10 * torch.log10(255 ** 2 / error)))


def luma(rgb):
    """Y of RGB or grey images [B, 3 or 1, H, W] in [0, 255]: BT.601's, in [16, 235], as super-resolution measures."""
    weights = rgb.new_tensor([65.481, 128.553, 24.966])[:, None, None] / 255
    return 16 + (rgb.expand(-1, 3, -1, -1) * weights).sum(1, keepdim=True)


def thin(p):
    """Edge strengths p [H, W] in [0, 1] with all but the ridges' crests set to 0: non-maximum suppression.

    The direction across a ridge is that of the largest curvature of a smoothed p; a pixel stays unless p is larger one
    pixel away in that direction, to either side. A little of the smoothed p decides between equals, as in a broad band.
    """
    smooth = p[None, None]
    for _ in range(2):                      # a triangle of radius 4, each way
        smooth = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(smooth, (2,) * 4, mode="replicate"), 5, 1)
    dy, dx = torch.gradient(smooth[0, 0])
    (dyy, dyx), dxx = torch.gradient(dy), torch.gradient(dx)[1]
    angle = 0.5 * torch.atan2(2 * dyx, dxx - dyy)               # the Hessian's eigenvector of the larger eigenvalue,
    angle = angle + math.pi / 2 * (dxx + dyy < 0)               # or the other one, where that one's is larger in size
    h, w = p.shape
    y, x = torch.meshgrid(torch.arange(h).to(p), torch.arange(w).to(p), indexing="ij")
    height, keep = p[None, None] + 0.01 * smooth, torch.ones_like(p, dtype=torch.bool)
    for side in (-1, 1):
        at = torch.stack([(x + side * angle.cos()) * 2 / (w - 1) - 1, (y + side * angle.sin()) * 2 / (h - 1) - 1], -1)
        beside = torch.nn.functional.grid_sample(height, at[None], padding_mode="border", align_corners=True)
        keep &= height[0, 0] >= beside[0, 0]
    return p * keep


def match(found, marked, radius):
    """Pair found pixels with marked ones within `radius`, one to one, the nearest first: which of each have a partner.

    found, marked: bool [T, H, W], T problems at once. Every offset is a bijection, so one pass over all pixels pairs
    those that lie so far apart and are free still.
    """
    reach, (h, w) = int(radius), found.shape[-2:]
    disk = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1) if i * i + j * j <= radius ** 2]
    free_found, free_marked = found.clone(), marked.clone()
    for i, j in sorted(disk, key=lambda offset: math.hypot(*offset)):
        if abs(i) < h and abs(j) < w:
            a = free_found[:, max(0, -i):h - max(0, i), max(0, -j):w - max(0, j)]
            b = free_marked[:, max(0, i):h + min(0, i), max(0, j):w + min(0, j)]
            pairs = a & b
            a ^= pairs
            b ^= pairs
    return found & ~free_found, marked & ~free_marked


def edge_counts(p, annotators, thresholds, tolerance=0.0075):
    """What precision and recall are made of, float64 [T, 4]: edge pixels found, of them right; marked ones, of them
    found.

    p: thinned strengths [H, W]. annotators: bool [A, H, W]. With each annotator found and marked pixels are paired one
    to one within `tolerance` of the diagonal; a found pixel is right if it has a partner with any annotator, and the
    marked ones of all are counted. As in the BSDS benchmark, but that its pairs are the cheapest there are, and these
    are `match`'s.
    """
    radius = tolerance * math.hypot(*p.shape)
    found = p >= thresholds[:, None, None].to(p)
    right, reached = torch.zeros_like(found), torch.zeros(len(found))
    for marks in annotators:
        of_found, of_marked = match(found, marks.expand_as(found), radius)
        right |= of_found
        reached += of_marked.sum((1, 2))
    marked = torch.full_like(reached, int(annotators.sum()))
    return torch.stack([found.sum((1, 2)), right.sum((1, 2)), marked, reached], dim=1).double()


def f_score(counts):
    """F = 2PR/(P + R) of edge counts [..., 4]."""
    found, right, marked, reached = counts.unbind(-1)
    precision, recall = right / found.clamp(min=1), reached / marked.clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def ods_ois(counts):
    """F at the one best threshold for the dataset, and with each image at its own best. counts: [images, T, 4]."""
    best = f_score(counts).argmax(1)
    return float(f_score(counts.sum(0)).max()), float(f_score(counts[torch.arange(len(counts)), best].sum(0)))


# ----------------------------------------------------------------------------------------------------- checkpoints

def write_atomically(path, content):
    """Write bytes under a temporary name, flush, and rename: a kill at any moment leaves a whole file."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with explained("write", path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint's dictionary (network, method, model, ema, optimizer, step), on the CPU.

    Raises Problem for a missing, truncated, foreign or malicious file; nothing in it is ever executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of a foreign pickle's protocol: the sentence below says it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Problem(f"there is no checkpoint at {path}: train first, or say where with --run") from None
    except Exception as error:              # torch raises many kinds for what is no checkpoint
        raise Problem(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    wanted = {"network": dict, "method": dict, "model": dict, "ema": dict, "optimizer": dict, "step": int}
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in wanted.items()):
        raise Problem(f"{path} is no checkpoint of this project: it has not all of {', '.join(wanted)}")
    return state


def digest(weights):
    """A short name for a state_dict, by its content."""
    h = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        h.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def first_line(error):
    """What an error says, cut to one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def finished(run, settings, checkpoint, processes):
    """Whether the run has all its steps; if so it says so."""
    done = checkpoint is not None and checkpoint["step"] >= settings["iterations"]
    if done and processes.rank == 0:
        print(f"{run} is trained: {checkpoint['step']} of {settings['iterations']} steps (--iterations goes further)")
    return done


def restore(run, checkpoint, **parts):
    """Load a checkpoint's model, ema or optimizer into the objects given; returns its step (0 without a checkpoint)."""
    if checkpoint is None:
        return 0
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Problem(f"{run}/checkpoint.pt does not fit the network it describes: {first_line(error)}") from error
    return checkpoint["step"]


# -------------------------------------------------------------------------------------------------------- training

class Live:
    """A live line: rewritten in place on a terminal, printed every ten seconds elsewhere, and always at the last."""

    def __init__(self):
        self.shown = -math.inf

    def __call__(self, line, last=False):
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if last or now - self.shown >= (0.2 if terminal else 10):
            print(f"\r\x1b[K{line}" if terminal else line, end="\n" if last or not terminal else "", flush=True)
            self.shown = now


class Training:
    """The frame around a training loop, so that the loop itself shows only the paper's step:

        training = Training(run, settings, checkpoint, args, processes, network_of, unet.create, torch.optim.Adam)
        net, ema, optimizer = training.parts.values()
        with training:
            for step, draw in training:
                ...
                training.record(values, t, grad_norm, lr)

    It loads the images; creates network_of(settings, channels), the average of its weights and the optimizer, or
    restores them from the checkpoint; and saves them with the network's arguments and the other settings. `mine` is
    this process's slice of the global batch. It yields the steps to do, each with a generator seeded by (seed, step)
    from which to draw the global batch and all that goes with it; torch's own, dropout's, is seeded by (seed, step,
    rank). It keeps the progress line and log.jsonl; saves every --save-every seconds, at the last step, and before it
    exits on Ctrl-C (130) or SIGTERM (143), all processes at the same step; and stops with a Problem when the loss or
    its gradient is not finite, leaving the last good checkpoint. The losses logged are those of the first process's
    share of the batch.
    """

    bins = 5        # of t in [0, 1], for the loss per time bin

    def __init__(self, run, settings, checkpoint, args, processes, network_of, create, optimizer):
        self.run, self.settings, self.processes = pathlib.Path(run), settings, processes
        self.iterations, self.save_every = settings["iterations"], args.save_every
        self.mine, self.signal = share(settings["batch_size"], processes), 0
        if settings.get("task", "none") != "none":
            self.images = load_pairs(settings, processes)
        else:
            self.images = load(settings["dataset"], settings["data_dir"], settings["image_size"], processes)
        self.network, device = network_of(settings, self.images.shape[1]), processes.device
        try:
            net, ema = create(self.network, device, seed("weights", settings["seed"]))
        except OSError as error:            # of weights to download
            raise Problem(str(error)) from error
        optimizer = optimizer(net.parameters(), lr=settings["lr"], fused=device.type in ("cpu", "cuda"))
        self.parts = {"model": net, "ema": ema, "optimizer": optimizer}
        self.start = restore(run, checkpoint, **self.parts)
        self.log, self.live = self.run / "log.jsonl", Live()
        if processes.rank == 0:
            with explained("use", self.run):
                self.run.mkdir(parents=True, exist_ok=True)
                if self.log.exists():       # what came after the checkpoint, half a line perhaps, is done again
                    kept = self.log.read_text(errors="replace").splitlines()
                    kept = [line for line in kept if _step(line) <= self.start]
                    write_atomically(self.log, "".join(line + "\n" for line in kept).encode())

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def _catch(self, number, frame):
        if self.processes.rank == 0:
            os.write(1, b"\nfinishing this step, then saving\n")        # print is not safe in a signal's handler
        self.signal = number

    def __iter__(self):
        self.began = self.saved = self.logged = self.looked = time.monotonic()
        self._reset()
        draw = torch.Generator(self.processes.device)
        for step in range(self.start, self.iterations):
            draw.manual_seed(seed("batch", self.settings["seed"], step))
            torch.manual_seed(seed("dropout", self.settings["seed"], step, self.processes.rank))
            yield step, draw
            self._after(step + 1)

    def _reset(self):
        device = self.processes.device
        self.sums = torch.zeros(2, self.bins, device=device)        # loss and count of every time bin
        self.health = torch.zeros((), device=device)                # 0, or not finite
        self.steps = 0

    def record(self, values, t, grad_norm, lr):
        """Note a step: its losses [b], their times [b], the gradient's norm, and the learning rate."""
        values = values.detach().float()
        bins = (t * self.bins).long().clamp(0, self.bins - 1)
        self.sums[0].index_add_(0, bins, values)
        self.sums[1].index_add_(0, bins, torch.ones_like(values))
        self.health += 0 * (values.sum() + grad_norm)
        self.steps, self.lr = self.steps + 1, lr

    def _after(self, step):
        now, last = time.monotonic(), step == self.iterations
        stop = self._agree(step, last)
        save = bool(last or stop or now - self.saved >= self.save_every)
        if not save and now - self.looked < 1:      # looking at the numbers makes a GPU wait
            return
        self.looked = now
        if not torch.isfinite(self.health):
            raise Problem(f"the loss or its gradient is not finite at step {step}: stopped, and the last checkpoint is "
                          f"as it was; try a lower --lr")
        if self.processes.rank == 0:
            self._report(step, now, bool(last or stop))
            if save:
                method = {key: value for key, value in self.settings.items() if key not in self.network}
                state, buffer = {name: part.state_dict() for name, part in self.parts.items()}, io.BytesIO()
                torch.save({"network": self.network, "method": method, **state, "step": step}, buffer)
                write_atomically(self.run / "checkpoint.pt", buffer.getbuffer())
            if stop:
                print(f"stopped by {signal.Signals(stop).name} at step {step}; saved {self.run}/checkpoint.pt: the "
                      f"same command goes on", flush=True)
        if save:
            self.saved = time.monotonic()
        if last or stop:
            barrier(self.processes)                 # the others may now read the checkpoint
        if stop:
            raise SystemExit(128 + stop)

    def _agree(self, step, last):
        """The signal that any process got, so that all stop at one step. GPUs ask now and then: it makes them wait."""
        if self.processes.world == 1:
            return self.signal
        if last or (self.processes.device.type == "cuda" and step % 20):
            return 0
        stop = torch.tensor(self.signal, device=self.processes.device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        return int(stop)

    def _report(self, step, now, last):
        sums, seconds = self.sums.tolist(), max(now - self.logged, 1e-9)
        loss, rate = sum(sums[0]) / max(1, sum(sums[1])), self.steps * self.settings["batch_size"] / seconds
        left = (now - self.began) / max(1, step - self.start) * (self.iterations - step)
        left = datetime.timedelta(seconds=round(left))
        self.live(f"step {step}/{self.iterations}   loss {loss:.4f}   {rate:,.0f} images/s   {left} left", last)
        if last or seconds >= 10:
            line = {"step": step, "loss": loss, "loss_by_time": [s / n if n else None for s, n in zip(*sums)],
                    "images_per_s": round(rate, 2), "lr": self.lr, "seconds": round(now - self.began, 2)}
            with explained("write", self.log), open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._reset()
            self.logged = now


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, LookupError):
        return math.inf


# -------------------------------------------------------------------------------------------------------- pictures

def picture(images, columns=None, labels=()):
    """uint8 images [N, C, H, W] as one Pillow image, small ones enlarged, with a label above every column if given."""
    from torchvision.utils import make_grid
    zoom, gap, head = max(1, round(64 / max(images.shape[-2:]))), 2, 14 if labels else 0
    tiles = images.cpu().repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    tiles = make_grid(tiles, columns or math.ceil(math.sqrt(len(images))), gap, pad_value=255).permute(1, 2, 0)
    canvas = Image.new("RGB", (tiles.shape[1], head + tiles.shape[0]), "white")
    canvas.paste(Image.fromarray(tiles.numpy()), (0, head))
    for j, label in enumerate(labels):
        ImageDraw.Draw(canvas).text((gap + j * (zoom * images.shape[-1] + gap), 1), label, fill="black")
    return canvas


def pil(image):
    """uint8 [C, h, w] as a Pillow image, RGB or L."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def side_by_side(rows, labels):
    """Rows of Pillow images of any sizes as one, small ones enlarged, with a label above every column."""
    zoom, gap, head = max(1, round(64 / max(max(image.size) for row in rows for image in row))), 2, 14
    across = max(1, round(math.sqrt(len(rows) / len(labels)))) if zoom > 1 else 1       # small rows stand side by side
    lines = [[image for row in rows[k:k + across] for image in row] for k in range(0, len(rows), across)]
    w = gap + zoom * max(image.width for line in lines for image in line)
    heights = [gap + zoom * max(image.height for image in line) for line in lines]
    canvas = Image.new("RGB", (gap + across * len(labels) * w, head + sum(heights)), "white")
    for k, line in enumerate(lines):
        for j, image in enumerate(line):
            large = image.resize((zoom * image.width, zoom * image.height), Image.NEAREST)
            canvas.paste(large.convert("RGB"), (gap + j * w, head + sum(heights[:k])))
    for j in range(across * len(labels)):
        ImageDraw.Draw(canvas).text((gap + j * w, 1), labels[j % len(labels)], fill="black")
    return canvas


def save_png(image, path, **text):
    """Write a Pillow image atomically as PNG, with text chunks."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_text(key, value)
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())


def trajectory(frames):
    """The picture that teaches: a row of x_t, and under it one of the estimates x̂0, for each of a few images.

    frames: list of (t, x_t [B, C, H, W], x̂0 [B, C, H, W]) in the sampler's order.
    """
    rows = [to_uint8(frame[k][i]) for i in range(len(frames[0][1])) for k in (1, 2) for frame in frames]
    return picture(torch.stack(rows), len(frames), [f"t={t:.3g}" for t, _, _ in frames])


def write_table(path, columns):
    """Write {a column's name: its numbers} as CSV, atomically."""
    table = io.StringIO()
    csv.writer(table).writerows([columns, *([f"{float(v):.6g}" for v in row] for row in zip(*columns.values()))])
    write_atomically(path, table.getvalue().encode())


def curves(path, x, panels, log=()):
    """Write curves to PATH.csv, draw them side by side in PATH.png, and say so. Drawing needs matplotlib, nothing else.

    x: (its label, numbers). panels: {title: {a curve's name: numbers, or (numbers, standard deviations)}}. log: the
    titles of panels with a logarithmic axis. Raises Problem where matplotlib is missing; the CSV is then there.
    """
    columns = {x[0]: x[1]}
    panels = {title: {name: y if isinstance(y, tuple) else (y, None) for name, y in named.items()}
              for title, named in panels.items()}
    for title, named in panels.items():
        for name, (y, spread) in named.items():
            columns |= {f"{title}, {name}": y} | ({f"{title}, {name}, std": spread} if spread is not None else {})
    write_table(f"{path}.csv", columns)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        sentence = f"wrote {path}.csv, and not its curves: drawing needs matplotlib (pip install matplotlib)"
        raise Problem(sentence) from error
    width, buffer = sum(5.5 if len(named) <= 5 else 8 for named in panels.values()), io.BytesIO()
    figure = Figure(figsize=(width, 4), layout="constrained")
    for axes, (title, named) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, (y, spread) in named.items():
            line, = axes.plot(x[1], y, label=name)
            if spread is not None:
                low, high = (np.asarray(y) + sign * np.asarray(spread) for sign in (-1, 1))
                axes.fill_between(x[1], np.maximum(low, 0), high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel=x[0], yscale="log" if title in log else "linear")
        axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(named) > 5 else {}))
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(f"{path}.png", buffer.getvalue())
    print(f"wrote {path}.csv, {path}.png", flush=True)


def figure(args, figures):
    """(the function that draws the figure asked for, whether it is of a run), or (None, True). Raises Problem unless
    one thing is asked for, and for flags that the figure would ignore.

    figures: {its flag: (function, the flags it heeds, in one string)}; of a run if --run is among them.
    """
    asked = [name for name in figures if getattr(args, name)]
    evaluate = getattr(args, "evaluate", False)
    if len(asked) + (args.train or args.sample or evaluate) != 1:
        names = "--train, --sample, --evaluate" if evaluate or getattr(args, "task", None) else "--train, --sample"
        raise Problem(f"say {names}, or both, or else one of --{', --'.join(figures)} (--help shows the rest)", 2)
    if not asked:
        return None, True
    write, flags = figures[asked[0]]
    heeded = {*flags.split(), *asked, "device", "precision"}
    for name, value in vars(args).items():
        if name not in heeded and value != args.parser.get_default(name):
            raise Problem(f"--{name.replace('_', '-')} is not for --{asked[0]}", 2)
    return write, "run" in flags.split()


def forward_figure(script, way, settings, processes):
    """Draw one image's way to noise, and beside it those that other scripts have left of the same image and noise.

    way(x0, eps, t, ts): x0, eps: [11, C, S, S], one image and one noise, 11 times over, functions of the seed; t: [11],
    from 0 to 1; ts: [100]. Returns (x_t [11, C, S, S] in [-1, 1], {curve's name: the signal to noise ratio at ts}). It
    is asked twice, the second time with ε = 0, for what is left of the image. Into runs/forward-DATASET-SIZE/:
    SCRIPT.png and SCRIPT.csv; and of all scripts forward.png, snr.csv and, by matplotlib, snr.png.
    """
    folder = pathlib.Path("runs/forward-{dataset}-{image_size}".format_map(settings))
    generators = image_generators(settings["seed"], [0])
    images = load(settings["dataset"], settings["data_dir"], settings["image_size"], processes)
    image = images[int(torch.randint(len(images), (), generator=generators[0]))]
    t, ts = torch.linspace(0, 1, 11, dtype=torch.float64), (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    x0 = to_float(image)[None].double().cpu().repeat(11, 1, 1, 1)
    eps = randn(x0[:1], generators).expand_as(x0)
    (xt, snr), (kept, _) = way(x0, eps, t, ts), way(x0, torch.zeros_like(eps), t, ts)
    with explained("use", folder):
        folder.mkdir(parents=True, exist_ok=True)
    labels, same = [f"t={float(each):.1f}" for each in t], digest({"image": image})
    strip = picture(to_uint8(torch.cat([xt, kept])), 11, labels)
    save_png(strip, folder / f"{script}.png", shows=same)
    write_table(folder / f"{script}.csv", {"t": ts.tolist(), **{name: y.tolist() for name, y in snr.items()}})
    strips, panel = {}, {}
    for file in sorted({*folder.glob("*.png")} - {folder / "forward.png", folder / "snr.png"}):
        with Image.open(file) as there:
            if there.info.get("shows") == same:
                strips[file.stem] = there.convert("RGB")
    canvas = Image.new("RGB", (strip.width, len(strips) * (strip.height + 14)), "white")
    for k, (name, there) in enumerate(strips.items()):
        ImageDraw.Draw(canvas).text((2, k * (strip.height + 14) + 2), f"{name}.py", fill="black")
        canvas.paste(there, (0, k * (strip.height + 14) + 14))
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        panel |= {column: [float(row[j]) for row in rows] for j, column in enumerate(columns) if j}
    save_png(canvas, folder / "forward.png")
    print(f"wrote {folder}/forward.png: {', '.join(strips)}", flush=True)
    title = "signal to noise ratio"
    curves(folder / "snr", ("t", ts.tolist()), {title: panel}, log=(title,))


def solver_figure(draw, solvers, x, run, settings, args):
    """Draw what each solver makes of the same three noises in 5, 10 and 20 network calls: solvers.png in the run.

    draw(solver, steps, x1, generators) -> [3, C, S, S] in [-1, 1]; solvers: {name: network calls a step}; x: zeros.
    """
    tiles, budgets, seed = [], (5, 10, 20), settings["seed"] if args.seed is None else args.seed
    for solver, calls in solvers.items():
        tiles.append(torch.ones_like(x[:1]))
        for budget in budgets:
            generators = image_generators(seed, range(len(x)))
            x1 = randn(x, generators).contiguous(memory_format=torch.channels_last)
            tiles.append(draw(solver, max(1, budget // calls), x1, generators))
    labels = [label for budget in budgets for label in (f"{budget} calls", *[""] * (len(x) - 1))]
    canvas = picture(to_uint8(torch.cat(tiles)), 1 + len(labels), ["", *labels])
    height = (canvas.height - 14 - 2) // len(solvers)
    for k, solver in enumerate(solvers):
        ImageDraw.Draw(canvas).text((4, 14 + k * height + height // 2 - 4), solver, fill="black")
    save_png(canvas, run / "solvers.png")
    print(f"wrote {run}/solvers.png: {', '.join(f'{name} ({n} a step)' for name, n in solvers.items())}", flush=True)


def sample_folder(draw, n, folder, batch_size, identity, processes):
    """Write images 0 to n-1 as folder/000000.png ... and nothing else, only those missing; returns how many were.

    draw(numbers) -> uint8 [b, C, H, W]. identity: text that names the run, seed and solver, kept inside every PNG; a
    folder whose first or last is another's, or that holds anything but numbered PNGs, is refused.
    """
    folder = pathlib.Path(folder)
    with explained("use", folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(f.name for f in folder.iterdir() if not f.name.endswith(".partial"))
    strange = [name for name in there if not (name[:-4].isdigit() and name.endswith(".png"))][:1]
    for name in strange or there[:1] + there[-1:]:
        with contextlib.suppress(OSError), Image.open(folder / name) as image:
            if image.info.get("sample") == identity and not strange:
                continue
        raise Problem(f"{folder} holds {name}, which is not of this sampling run ({identity}): choose another --out")
    barrier(processes)
    missing = sorted({f"{i:06}.png" for i in range(n)} - {*there})
    mine, live, began = missing[processes.rank::processes.world], Live(), time.monotonic()
    for k in range(0, len(mine), batch_size):
        names = mine[k:k + batch_size]
        for name, image in zip(names, draw([int(name[:-4]) for name in names])):
            save_png(pil(image), folder / name, sample=identity)
        if processes.rank == 0:
            done, seconds = k + len(names), time.monotonic() - began
            live(f"{done} of {len(mine)} images   {done / seconds:,.1f} images/s each process", done == len(mine))
    barrier(processes)
    return len(missing)


def draw_samples(draw, x, run, checkpoint, args, calls, options, processes, looks=None):
    """What --sample does, and the lines that say so.

    draw(x1, generators, watch) -> [b, C, H, W] in [-1, 1], from noise x1 of which image i is a function of (seed, i),
    as are the generators; it calls watch(t, x_t, x̂0) at each of its `calls` of the network (or `looks` times in all),
    and at t = 0. x: zeros, as many as are drawn at once. options: a dictionary of what else makes the images what they
    are.
    """
    looks = looks or calls
    seed, frames, live = checkpoint["method"]["seed"] if args.seed is None else args.seed, [], Live()
    identity = {"weights": digest(checkpoint["ema"]), "seed": seed, "network calls per image": calls, **options}
    given = {key: value for key, value in identity.items() if value is not None and value is not False}
    text = ", ".join(f"{key} {flag(value)}" for key, value in given.items())
    shown = {round(i * looks / 10) for i in range(11)}                      # of the looks, and the end

    def images(numbers):
        generators, count = image_generators(seed, numbers), itertools.count()
        x1 = randn(x[:1].expand(len(numbers), -1, -1, -1), generators).contiguous(memory_format=torch.channels_last)

        def watch(t, x, x0):
            i = next(count)
            if numbers[0] == 0 and i in shown:
                frames.append((t, x[:4].cpu(), x0[:4].cpu()))
            if processes.rank == 0:
                live(f"images {numbers[0]} to {numbers[-1]}: {'call' if looks == calls else 'step'} "
                     f"{min(i + 1, looks)} of {looks}")

        return to_uint8(draw(x1, generators, watch)).cpu()

    if args.out:
        missing = sample_folder(images, args.n, args.out, len(x), text, processes)
        if processes.rank == 0:
            print(f"sampled: {text}\nwrote {missing} PNGs into {args.out}, which has the first {args.n}", flush=True)
    elif processes.rank == 0:
        began = time.monotonic()
        parts = [images(range(k, min(args.n, k + len(x)))) for k in range(0, args.n, len(x))]
        rate = args.n / (time.monotonic() - began)
        live(f"{args.n} of {args.n} images", last=True)
        save_png(picture(torch.cat(parts)), run / "samples.png", sample=text)
        save_png(trajectory(frames), run / "trajectory.png", sample=text)
        print(f"sampled: {text}; {args.n} images at {rate:,.1f} images/s")
        print(f"wrote {run}/samples.png, {run}/trajectory.png", flush=True)


def score(task, prediction, truth, hole=None, annotators=None):
    """What a prediction is worth: {metric: value}, or of edges their counts at 33 thresholds. All in [0, 255].

    PSNR in dB: of super-resolution on Y and on RGB, without a border of SCALE pixels; of inpainting inside the hole.
    MAE of saliency as a fraction of the range.
    """
    if task == "super_resolution":
        a, b = (x[..., SCALE:-SCALE, SCALE:-SCALE] for x in (prediction, truth))
        return {"PSNR on Y, dB": psnr(luma(a), luma(b)), "PSNR on RGB, dB": psnr(a, b)}
    if task == "inpainting":
        return {"PSNR in the hole, dB": psnr(prediction, truth, hole)}
    if task == "saliency":
        return {"MAE": float((prediction - truth).abs().mean() / 255)}
    return edge_counts(thin(prediction[0, 0] / 255), annotators, torch.arange(1, 34) / 34)


def summary(scores):
    """A list of what `score` returned, as text."""
    if isinstance(scores[0], dict):
        return "   ".join(f"{name} {np.mean([s[name] for s in scores]):.4g}" for name in scores[0])
    return "ODS {:.3f}   OIS {:.3f}".format(*ods_ois(torch.stack(scores)))


def baseline(task, image, condition, hole):
    """(name, prediction in [-1, 1]) of what takes no network: the task's honest floor."""
    if task == "super_resolution":
        return "bicubic", condition
    if task == "inpainting":
        known = (image * ~hole).sum((2, 3), keepdim=True) / (~hole).sum().clamp(min=1)
        return "mean fill", torch.where(hole, known, image)
    if task == "saliency":
        return "empty mask", torch.full_like(image[:, :1], -1)
    grey = torch.nn.functional.pad(image.mean(1, keepdim=True), (2,) * 4, mode="replicate")
    dy, dx = torch.gradient(torch.nn.functional.avg_pool2d(grey, 5, 1), dim=(2, 3))
    return "gradient", (8 * torch.hypot(dy, dx) - 1).clamp(max=1)


def as_tensor(image, mode):
    """A Pillow image as uint8 [1, C, h, w]."""
    pixels = np.array(image.convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None]


def resized(x, size):
    """x [B, C, H, W] in [-1, 1] at another size, bicubic with antialiasing."""
    return torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def test_folder(settings, args):
    """The folder of test images: `test`, or one whose name ends in -TE, in the data directory; or a --data-dir given
    for no training, as it is. Raises Problem, so that nobody measures on training images.
    """
    folder = pathlib.Path(settings["data_dir"])
    found = sorted(f for f in folder.glob("*") if re.fullmatch("test|.*-te", f.name, re.I) and f.is_dir())
    if not found and (args.train or not args.data_dir or folder.resolve() == pathlib.Path(args.trained_on).resolve()):
        raise Problem(f"{folder} has no folder named test: make one; or say with --data-dir, in a command without "
                      f"--train, where other images are; or use --input", 2)
    return (found or [folder])[0]


def test_items(settings, args, channels):
    """[(name, read)] of what to answer; read() -> (image [1, C, h, w], target [1, 1, h, w], annotators [A, h, w] bool),
    uint8, the last two or None. They are --input's files; or embedded shapes, of another seed than the training's; or
    the images of `test_folder`, --n of them, spread evenly.
    """
    task, n = settings["task"], args.n or (None if args.evaluate else 8)

    def read(image, target=None):
        image, target, annotators = open_pair(task, image, target, settings["edge_bits"])
        return (as_tensor(image, "RGB" if channels == 3 else "L"), as_tensor(target, "L") if target else None,
                torch.from_numpy(annotators) if annotators is not None else None)

    if args.input:
        return [(pathlib.Path(file).stem, functools.partial(read, file)) for file in args.input]
    if settings["dataset"] == "shapes":
        pairs = shape_pairs(task, n or 200, settings["image_size"], seed=1)

        def drawn(i):
            image, target = pairs[i:i + 1, :3], pairs[i:i + 1, 3:]
            return image, target if TARGETS[task] else None, target[0] >= 128 if task == "edges" else None
        return [(f"{i:06}", functools.partial(drawn, i)) for i in range(len(pairs))]
    folder = test_folder(settings, args)
    files = partners(folder, task, test=True)
    names = [str(image.relative_to(folder).with_suffix("")).replace(os.sep, "-") for image, _ in files]
    n = min(n or len(files), len(files))
    return [(names[i], functools.partial(read, *files[i])) for i in (k * len(files) // n for k in range(n))]


def hole_of(i, name, image, size, seed_, args):
    """Test image i's hole, bool [1, 1, h, w]: --mask, or drawn, a function of (seed, i) alone."""
    h, w = image.shape[-2:]
    if not args.mask:
        return draw_hole(h, w, size, np.random.default_rng(seed("hole", seed_, i)))[None, None].to(image.device)
    hole = as_tensor(open_image(args.mask), "L") >= 128
    if hole.shape[-2:] != (h, w):
        raise Problem(f"{args.mask} is {hole.shape[-1]}x{hole.shape[-2]}, and {name} {w}x{h}: give one of its size", 2)
    if not hole.any():
        raise Problem(f"{args.mask} has no white in it: white is what is missing", 2)
    return hole.to(image.device)


def answer(draws, run, settings, args, checkpoint, channels, calls, options, processes):
    """What --sample and --evaluate do for a task, and the lines that say so; the first process does it all.

    draws: {name: draw}, this run's first; draw(condition [1, c, H, W], generators, watch) -> x0 [1, C, H, W]. With
    --input each answer is a PNG of its own, as with --out; else a picture has input, prediction and truth side by side.
    --evaluate prints the metric of every draw, and of the baseline that needs no network. The noise of image i and
    member k of the ensemble is a function of (seed, i, k) alone.
    """
    if processes.rank:
        return
    task, size, members, own = settings["task"], settings["image_size"], args.ensemble or 1, next(iter(draws))
    items, live, frames, rows, scores = test_items(settings, args, channels), Live(), [], [], {}
    least = 2 * SCALE + 1 if task == "super_resolution" and not args.input else 2      # pixels that can be measured
    seed_ = settings["seed"] if args.seed is None else args.seed
    identity = {"weights": digest(checkpoint["ema"]), "task": task, "seed": seed_, "network calls per sample": calls,
                "samples per image": members, **options}
    given = {key: value for key, value in identity.items() if value is not None and value is not False}
    text = ", ".join(f"{key} {flag(value)}" for key, value in given.items())
    folder, picture_ = pathlib.Path(args.out or run), run / ("evaluation.png" if args.evaluate else "samples.png")
    files = [folder / (f"{name}-{task}.png" if args.input else f"{name}.png") for name, _ in items]
    files = files if args.input or args.out else []
    if args.out and settings["dataset"] == "folder" and folder.resolve().is_relative_to(
            pathlib.Path(settings["data_dir"]).resolve()):
        raise Problem(f"{folder} is among the images: choose an --out outside of {settings['data_dir']}", 2)
    if len({*files}) < len(files):
        raise Problem("two of the images have one name, and so would their answers: rename one", 2)
    with explained("use", folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.exists():
            with contextlib.suppress(OSError), Image.open(file) as there:
                if "sample" in there.info:
                    continue
            raise Problem(f"{file} is there, and was not made here: choose another --out")
    began = time.monotonic()
    for i, (name, read) in enumerate(items):
        image, target, annotators = read()
        image = to_float(image).to(processes.device)
        if min(image.shape[-2:]) < least:
            raise Problem(f"{name} is {image.shape[-1]}x{image.shape[-2]}, too small: the task needs {least}x{least}")
        if task == "super_resolution" and not args.input:
            image = image[..., :image.shape[-2] // SCALE * SCALE, :image.shape[-1] // SCALE * SCALE]
        hole = hole_of(i, name, image, size, seed_, args) if task == "inpainting" else None
        seen = resized(image, (size, size)) if task == "saliency" else image
        condition = enlarge(image) if task == "super_resolution" and args.input else example(task, seen, seen, hole)[1]

        def watch(t, x, x0):                # the middle, a training patch
            top, left = ((length - size) // 2 if length > size else 0 for length in x.shape[-2:])
            middle = (..., slice(top, top + size), slice(left, left + size))
            frames.append((t, x[middle].cpu(), finish(task, x0, condition)[middle].cpu()))

        predictions = {}
        for method, draw in draws.items():
            drawn = [draw(condition, [torch.Generator().manual_seed(seed("image", seed_, i, k))],
                          watch if (i, k, method) == (0, 0, own) else None) for k in range(members)]
            predictions[method] = sum(finish(task, x0, condition) for x0 in drawn) / members
        if args.evaluate:
            method, floor = baseline(task, image, condition, hole)
            predictions[method] = floor
        if task == "saliency":
            predictions = {method: resized(p, image.shape[-2:]) for method, p in predictions.items()}
        pixels = {method: to_uint8(p).cpu() for method, p in predictions.items()}
        truth = target if target is not None else to_uint8(image).cpu()
        for method, p in pixels.items() if args.evaluate else ():
            worth = score(task, p.float(), truth.float(), hole.cpu() if hole is not None else None, annotators)
            scores.setdefault(method, []).append(worth)
        if files:
            save_png(pil(pixels[own][0]), files[i], sample=text)
        elif len(rows) < 8:
            shown = image if task == "saliency" else condition[:, :channels]
            rows.append([pil(x[0]) for x in (to_uint8(shown).cpu(), pixels[own], truth)])
        so_far = f"   {own}: {summary(scores[own])}" if scores else ""
        left = datetime.timedelta(seconds=round((time.monotonic() - began) / (i + 1) * (len(items) - i - 1)))
        live(f"{i + 1} of {len(items)} images{so_far}   {left} left", last=i + 1 == len(items))
    wrote = ", ".join(map(str, files)) if len(files) < 4 else f"{len(items)} PNGs into {folder}"
    if rows:
        save_png(side_by_side(rows, ("input", "prediction", "truth")), picture_, sample=text)
        wrote = str(picture_)
        if not args.evaluate:
            few = sorted({round(k * (len(frames) - 1) / 10) for k in range(11)})
            save_png(trajectory([frames[k] for k in few]), run / "trajectory.png", sample=text)
            wrote += f", {run}/trajectory.png"
    print(f"sampled: {text}; {(time.monotonic() - began) / len(items):.3g} s an image")
    for method, worth in scores.items():
        print(f"  {method:32} {summary(worth)}")
    print(f"wrote {wrote}", flush=True)


# ---------------------------------------------------------------------------------------------------- command line

CHANGEABLE = {"iterations", "data_dir"}     # of a checkpoint's settings; the machine's flags are no part of them


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a whole (int) or real (float) number in [low, high], or in (low, high] with above=True."""
    def parse(text):
        value = kind(text)
        if not (low < value <= high if above else low <= value <= high):
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'more than' if above else 'at least'} {low}{most}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def flag(value):
    """A setting as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (" ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def parser(script, doc, defaults, paper, steps="10"):
    """The flags all scripts share: (argparse parser, its groups by name). What is not given is None or False.

    steps: the default of --steps, in words.
    """
    columns = {**defaults, **{f"{name}, paper": {**defaults[name], **values} for name, values in paper.items()}}
    first = next(iter(columns.values()))
    same = [key for key in first if all(column[key] == first[key] for column in columns.values())]
    rows = [["", *columns], *([key, *(flag(c[key]) for c in columns.values())] for key in first if key not in same)]
    table = "\n".join("".join(f"{cell:>16}" if i else f"  {cell:12}" for i, cell in enumerate(row)) for row in rows)
    p = argparse.ArgumentParser(
        prog=f"python {script}.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=doc.split("\n\n")[0], epilog=(
            f"defaults by dataset, and the paper's own by --preset paper:\n\n{table}\n\n"
            f"for all: {', '.join(f'{key} {flag(first[key])}' for key in same)}").replace("_", "-"))
    p.set_defaults(parser=p)
    names = ("what to do", "data", "training", "network", "method", "sampling", "machine")
    group = {name: p.add_argument_group(name) for name in names}
    add = group["what to do"].add_argument
    add("--train", action="store_true", help="train, or go on with what the run directory holds")
    add("--sample", action="store_true", help=f"sample, from the newest runs/{script}-* unless --dataset or --run "
        "says which")
    add("--forward", action="store_true", help="draw one image on its way to noise, beside the other scripts that did "
        "so, and the signal to noise ratio, by matplotlib: runs/forward-DATASET-SIZE/")
    add("--solvers", action="store_true", help="draw what each solver of a run makes of the same noise in at most 5, "
        "10 and 20 network calls: solvers.png")
    add("--run", metavar="DIR", help=f"the run directory (default: runs/{script}-DATASET)")
    add = group["data"].add_argument
    add("--dataset", choices=defaults, help="training images (default: shapes, drawn by the program)")
    add("--data-dir", metavar="DIR", help="where datasets lie or are downloaded to (default: data); folder: the images")
    add("--image-size", type=number(int, 1), metavar="PIXELS", help="height and width the images are resized to")
    add = group["training"].add_argument
    add("--preset", choices=("paper",), help="the paper's own hyper-parameters in place of the compact defaults")
    add("--iterations", type=number(int, 1), metavar="N", help="training steps in all")
    add("--batch-size", type=number(int, 1), metavar="N", help="images a step, shared between processes")
    add("--lr", type=number(float, 0, above=True), help="learning rate (at the start, where it decays), more than 0")
    add("--ema", type=number(float, 0, 1), help="decay of the weights' moving average, 0 to 1")
    add("--seed", type=number(int, 0), help="of training and of sampling, 0 or more (default: 0, or the run's)")
    add("--save-every", type=number(float, 0), default=60.0, metavar="S",
        help="seconds between checkpoints (default: 60)")
    add = group["network"].add_argument
    add("--width", type=number(int, 8), metavar="C", help="channels of the first level, a multiple of 8")
    add("--mult", type=number(int, 1), nargs="+", metavar="M", help="each level's channels over the width, e.g. 1 2 2")
    add("--blocks", type=number(int, 1), metavar="N", help="residual blocks a level")
    add("--attention", type=number(int, 1), nargs="*", metavar="PIXELS", help="sizes at which to attend, e.g. 16 8")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="probability, 0 to 0.99")
    add = group["sampling"].add_argument
    add("--steps", type=number(int, 1), metavar="N", help=f"solver steps (default: {steps})")
    add("--n", type=number(int, 1), default=64, help="images to draw (default: 64)")
    add("--out", metavar="FOLDER", help="write single PNGs, only, and only those missing; else two pictures")
    add = group["machine"].add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the layers; auto: bf16 if a GPU has it; fp32: with TF32 products there (default: auto)")
    add("--compile", action="store_true", help="torch.compile the network, in training and in sampling: minutes at "
        "first, and then faster; on a CPU sampling alone is")
    return p, group


def task_flags(p, encoders):
    """Add the flags of image-conditioned tasks to an argparse parser."""
    add = p.add_argument_group("image-conditioned tasks").add_argument
    add("--task", choices=TARGETS, type=lambda name: name.replace("-", "_"),
        help="learn x₀ given an image: ×4 super_resolution, inpainting, saliency or edges")
    add("--evaluate", action="store_true", help="print the task's metric over all test images, or --n, and draw eight")
    add("--input", nargs="+", metavar="FILE",
        help="with --sample: images of any size to answer, a PNG each; super-resolution's come back 4 times as large")
    add("--mask", metavar="FILE", help="of inpainting's --input, of its size: white is missing (default: drawn)")
    add("--ensemble", type=number(int, 1), metavar="K", help="answer with the mean of K samples (default: 1)")
    add("--against", nargs="+", metavar="DIR", help="with --evaluate: other runs of the task, on the same images")
    add("--window", type=number(int, 8), metavar="PIXELS", help="of larger images (default: the training patch)")
    add("--overlap", type=number(int, 1), metavar="PIXELS", help="of neighbouring windows (default: a quarter of one)")
    add("--encoder", choices=encoders, help="of the condition: compact, or the paper's Swin-B (with --preset paper)")
    add("--fuse", choices=("concat", "attention"), help="how its features enter the decoders (default: concat)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="Swin-B's ImageNet weights (default: downloaded)")
    add("--edge-bits", action=argparse.BooleanOptionalAction, help="bit k of an edge PNG is annotator k's")
    add("--regression", action=argparse.BooleanOptionalAction, help="a baseline: the same network, one guess, no noise")


def task_table(tasks):
    """What tasks change, as text for --help. tasks: as `open_run` takes them."""
    rows = []
    for task, changes in tasks.items():
        for name in ("shapes", "folder", "paper") if task else ():
            values = {**changes["all"], **changes[name]}
            rows.append(f"  {task}, {name}: " + ", ".join(f"{k.replace('_', '-')} {flag(values[k])}" for k in (
                "image_size", "width", "mult", "batch_size", "iterations", "lr", "encoder") if k in values))
    return ("\n\nwith a task --image-size is a patch's (saliency: what whole images are resized to), --n is by default "
            "all test\nimages, or 200 shapes, and 8 for --sample, --out gets a PNG of every answer, and these change:\n\n"
            + "\n".join(rows))


def check_task(settings, args):
    """Raise a Problem for flags that have no meaning for this task, or without one; before anything is trained."""
    task, regression = settings["task"], settings["regression"]
    sampling, patches = args.sample or args.evaluate, task != "saliency"
    rules = {           # flag: whether it has a meaning with a task, and what it goes with
        "evaluate": (True, ""), "encoder": (True, ""), "fuse": (True, ""), "regression": (True, ""),
        "pretrained": (settings["encoder"] == "swin_b", "it goes with --encoder swin_b"),
        "edge_bits": (task == "edges" and settings["dataset"] == "folder", "it goes with --task edges and a folder"),
        "ensemble": (sampling and not regression, "it goes with --sample or --evaluate, and not with a regression"),
        "window": (sampling and patches, "it goes with --sample or --evaluate; saliency resizes the whole image"),
        "overlap": (sampling and patches, "it goes with --sample or --evaluate; saliency resizes the whole image"),
        "input": (args.sample and not args.evaluate, "it goes with --sample alone"),
        "against": (args.evaluate, "it goes with --evaluate"),
        "mask": (task == "inpainting" and len(args.input or ()) == 1, "it goes with --task inpainting and one --input")}
    if task != "none":
        rules |= {"n": (not args.input, "--input says which images"), "steps": (not regression, "a regression has one"),
                  "clip": (task != "super_resolution", "super-resolution diffuses a residual, beyond [-1, 1]")}
    for name, (meaning, reason) in rules.items():
        if getattr(args, name) not in (None, False) and not (meaning and task != "none"):
            where = f"here: {reason}" if task != "none" else "without --task"
            raise Problem(f"--{name.replace('_', '-')} has no meaning {where}", 2)
    if task == "super_resolution" and settings["image_size"] % SCALE:
        raise Problem(f"super-resolution by {SCALE} needs an --image-size that {SCALE} divides", 2)
    if task == "super_resolution" and settings["h"] == "sine":
        raise Problem("super-resolution diffuses a residual that is larger than the sine can reach: use another --h", 2)
    window = args.window or settings["image_size"]
    if (args.overlap or 0) >= window:
        raise Problem(f"--overlap {args.overlap} must be less than the window, {window}", 2)
    if regression and (settings["predict"] != "both" or not settings["precondition"]):
        raise Problem("--regression is for the default outputs: drop --predict or --no-precondition", 2)
    for file in args.input or ():
        if not pathlib.Path(file).is_file():
            raise Problem(f"--input {file}: there is no such file", 2)
    if task != "none" and sampling and settings["dataset"] == "folder" and not args.input:
        test_folder(settings, args)


def open_run(script, args, defaults, paper, network_keys, tasks=None, of_run=True):
    """Find the run that the flags mean, and its settings: defaults, overruled by its checkpoint, overruled by flags.

    Where there is a checkpoint only CHANGEABLE settings may differ from it. tasks: of a script that has --task, what
    each changes of the defaults: {task: {"all": ..., dataset: ..., "paper": ...}}, and under None the settings of
    no task. of_run=False: for a figure that needs no run, (None, settings, None). Returns (run directory, settings,
    checkpoint or None); raises Problem for contradictions, spelling out the difference.
    """
    asked = getattr(args, "task", None)
    suffix = f"-{asked}" if asked else ""
    run = pathlib.Path(args.run or f"runs/{script}-{args.dataset or 'shapes'}{suffix}")
    if of_run and not (args.run or args.train or args.dataset):
        found = pathlib.Path("runs").glob(f"{script}-*{suffix}/checkpoint.pt")
        found = sorted(found, key=lambda f: f.stat().st_mtime)
        if not found:
            what = f"{script}.py --task {asked}" if asked else f"{script}.py"
            raise Problem(f"there is no run of {what} named runs/{script}-*{suffix} yet: train first, or name it by "
                          f"--run")
        run = found[-1].parent
    checkpoint = saved = None
    if of_run and ((run / "checkpoint.pt").exists() or not args.train):
        checkpoint = load_checkpoint(run / "checkpoint.pt")
        saved = {**(tasks or {}).get(None, {}), **{k: v for k, v in checkpoint["network"].items() if k in network_keys},
                 **checkpoint["method"]}
        kinds = {key: type(value) for key, value in next(iter(defaults.values())).items()}
        if (saved.get("script") != script or saved.get("dataset") not in [*defaults]
                or any(type(saved.get(key)) is not kind for key, kind in kinds.items())):
            raise Problem(f"{run} was trained by another script, or another {script}.py: choose another --run")
    dataset = args.dataset or (saved or {}).get("dataset", "shapes")
    if args.preset and dataset not in paper and not asked:
        raise Problem(f"--preset paper is for --dataset {' or '.join(paper)}: the paper has none for {dataset}", 2)
    changes = (tasks or {}).get(asked, {}) if asked else {}
    known = {"script": script, "dataset": dataset, "data_dir": "data", **defaults[dataset], **changes.get("all", {}),
             **changes.get(dataset, {})}
    given = {key: value for key, value in vars(args).items() if key in known and value is not None}
    given = {**((changes["paper"] if asked else paper[dataset]) if args.preset else {}), **given}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if dataset == "folder" and not saved and "data_dir" not in given:
        raise Problem("--dataset folder needs --data-dir, the folder of images", 2)
    if saved is None:
        return run if of_run else None, {**known, **given}, None
    if not args.train:
        given.pop("seed", None)             # then it is the samples' seed
    differences = [f"--{key.replace('_', '-')} {flag(saved[key])}, not {flag(value)}" for key, value in given.items()
                   if key not in CHANGEABLE and saved[key] != value]
    if differences:
        raise Problem(f"{run} was trained with {'; '.join(differences)}: drop the flag, or choose another --run", 2)
    return run, {**saved, **{key: value for key, value in given.items() if key in CHANGEABLE}}, checkpoint
