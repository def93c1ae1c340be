"""What is not diffusion: images in, pictures out, and a Run: a directory with its settings."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps

# ------------------------------------------------------------------------------ what a user is told

class Problem(Exception):
    """One sentence for the user, and the exit status: 2 for bad arguments, else 1."""

    def __init__(self, sentence, status=1):
        super().__init__(sentence)
        self.status = status


def command(main):
    """Decorator of a script's main(argv=None): a user's mistake becomes a sentence on stderr."""
    @functools.wraps(main)
    def wrapped(argv=None):
        with contextlib.suppress(AttributeError):             # if it is closed, or a notebook's
            sys.stdout.reconfigure(errors="replace")          # some terminals cannot print x̂₀
        try:
            return main(argv)
        except Problem as problem:
            sentence, status = problem, problem.status
        except (MemoryError, RuntimeError) as error:
            if "memory" not in repr(error).lower() and "bad_alloc" not in repr(error):
                raise
            sentence, status = "out of memory: try a smaller --batch-size, --n or --width", 1
        except OSError as error:
            sentence, status = f"{error.filename or 'the system'}: {error.strerror or error}", 1
        except KeyboardInterrupt:
            sentence, status = "stopped", 130
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        print("error:", " ".join(str(sentence).split())[:1000], file=sys.stderr)
        raise SystemExit(status)
    return wrapped


@contextlib.contextmanager
def refusals(what="", status=2, kinds=(ValueError, TypeError, LookupError, ArithmeticError)):
    """Errors inside become a Problem. The default kinds are those that a wrong setting causes."""
    try:
        yield
    except kinds as error:
        raise Problem(f"{what} {error}", status) from error


def say(text, pause=0):
    """Print a line, if the last one is `pause` seconds old. A closed pipe only silences it."""
    if time.monotonic() - getattr(say, "last", -math.inf) < pause:
        return
    say.last = time.monotonic()
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------- randomness

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PURPOSES = ("weights", "batch", "dropout", "image", "hole")


def seed(purpose, *numbers):
    """A well-mixed 63-bit seed of one of PURPOSES and whole numbers: seed("batch", 0, step)."""
    sequence = np.random.SeedSequence((PURPOSES.index(purpose), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def image_generators(run_seed, numbers):
    """A CPU generator for each image: image i is a function of (seed, i) on every device."""
    return [torch.Generator().manual_seed(seed("image", run_seed, i)) for i in numbers]


def randn(like, generator=None):
    """Standard normal noise like a tensor [B, ...]. generator: None, one, or a list of B."""
    if isinstance(generator, (list, tuple)):
        rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generator]
        return torch.stack(rows).to(like.device)
    device = generator.device if generator else like.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like)


# ---------------------------------------------------------------------------------------- images in

CROPS = {"celeba": (25, 57, 153, 185)}           # DDIM's box of the aligned 178x218 images
COLOURS = ((235, 70, 60), (250, 200, 50), (80, 200, 110), (90, 150, 250))


def load(run):
    """A run's training images as uint8 [N, C, S, S]: converted once, then read from a cache."""
    s, folder = run.settings, pathlib.Path(run.settings.data_dir)
    if s.dataset == "shapes":
        return torch.from_numpy(shapes(5000, s.image_size)).to(run.device)
    files, path = [], folder / f"cifar10-train-{s.image_size}.npy"
    if s.dataset != "cifar10":
        files, key = image_files(folder if s.dataset == "folder" else folder / s.dataset)
        home = pathlib.Path("data") if s.dataset == "folder" else folder    # not the user's folder
        path = home / f"{s.dataset}-train-{s.image_size}-{key}.npy"
    if run.rank == 0 and not path.exists():
        mode = "L" if all(map(is_grey, files)) else "RGB"
        opened = functools.partial(open_image, mode=mode) if files else Image.fromarray
        items = files or cifar10(folder)
        convert(path, items, lambda item: square(opened(item), s.image_size, CROPS.get(s.dataset)))
    run.barrier()
    images = mapped(run, path)
    if images.dtype != torch.uint8 or images.shape[2:] != (s.image_size,) * 2 or not len(images):
        raise Problem(f"{path} has no uint8 images [N, C, S, S] with S = {s.image_size}: remove it")
    return images


def cifar10(folder):
    """CIFAR-10's training images, uint8 [50000, 32, 32, 3]; downloaded where they are not there."""
    if (folder / "cifar10-train-32.npy").exists():
        return np.load(folder / "cifar10-train-32.npy", mmap_mode="r").transpose(0, 2, 3, 1)
    with refusals(f"CIFAR-10 is not in {folder} and cannot be downloaded:", 1, Exception):
        return torchvision.datasets.CIFAR10(folder, train=True, download=True).data


def mapped(run, path):
    """A run's .npy file of uint8 as a tensor: on a GPU, or read from the disk as it is needed."""
    with refusals(f"{path} is damaged: delete it, and it is made again.", 1, (Exception,)):
        images = torch.from_numpy(np.load(path, mmap_mode="c"))
    if run.settings.images not in ("", path.name):            # it has a key of the folder's state
        say(f"the images are no longer those of {run.settings.images}: the run goes on with these")
    run.settings.images = path.name
    fits = run.cuda and images.nbytes < torch.cuda.mem_get_info(run.device)[0] / 4
    return images.to(run.device if fits else "cpu")


def image_files(folder):
    """(all images below a folder, of any kind that Pillow opens; a key of their present state)."""
    if not folder.is_dir():
        raise Problem(f"there is no folder {folder} to read images from: see --data-dir", 2)
    kinds = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, seen, errors = [], set(), []
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        new = os.path.realpath(place) not in seen             # a link may lead back
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if new and name[0] != "."]
        files += [pathlib.Path(place, name) for name in names if new and name[0] != "."]
    found = sorted(file for file in files if file.suffix.lower() in kinds)
    if not found:
        raise Problem(f"{folder} has no images, nor have its subfolders", 2)
    if others := [error.filename for error in errors] + sorted({*files} - {*found}):
        say(f"{folder}: {len(others)} files are no images, or unreadable, as {others[0]}: left out")
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in found]
    return found, hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def is_grey(file):
    """Whether an image file has no colour, by its header."""
    with contextlib.suppress(Exception), Image.open(file) as image:
        return Image.getmodebase(image.mode) == "L"
    return True                                               # `open_image` says what is wrong


def open_image(file, mode=None):
    """A Pillow image ("L" or "RGB") over white, turned as its camera says. Raises Problem."""
    with refusals(str(file), 1, Exception), Image.open(file) as image:
        mode = mode or ("L" if Image.getmodebase(image.mode) == "L" else "RGB")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode} has no agreed range: save it with 8 bits")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert(mode)


def square(image, size, box=None):
    """A Pillow image, or this box of it, cut to its centred square: uint8 [C, size, size]."""
    if box and image.width >= box[2] and image.height >= box[3]:
        image = image.crop(box)
    exact = min(image.size) % size == 0
    image = ImageOps.fit(image, (size, size), Image.BOX if exact else Image.LANCZOS)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


def convert(path, items, read, shape=None):
    """Write read(item) of all items, uint8 arrays, as one .npy file. The bad are one Problem."""
    low, high, bad = 255, 0, []
    with own(path.parent / ".lock"), replacing(path) as file:
        for k, item in enumerate(items):
            say(f"{path.name}: {k} of {len(items)} images", pause=10)
            try:
                image = read(item)
            except Problem as problem:
                bad.append(str(problem))
                continue
            if file.tell() == 0:
                header = dict(shape=shape or (len(items), *image.shape), fortran_order=False)
                np.lib.format.write_array_header_1_0(file, header | dict(descr="|u1"))
            file.write(image.tobytes())
            low, high = min(low, image.min()), max(high, image.max())
        if bad:
            raise Problem(f"{len(bad)} of {len(items)} images cannot be read, remove or mend them: "
                          f"{', '.join(bad[:10])}{' and others' if len(bad) > 10 else ''}")
    kind = "grey" if len(image) < 3 else "colour"             # a target may be one plane more
    say(f"{path}: {len(items)} images, {kind}, from {low} (the darkest) to {high} (the brightest)")


def shapes(n, size, seed=0, ground=(16, 20, 40), colours=COLOURS):
    """The embedded dataset: images of a disk, ring, square, triangle or cross, [n, 3, S, S]."""
    random, big = np.random.default_rng(seed), 4 * size       # drawn large, then averaged down
    images = np.empty((n, 3, size, size), np.uint8)
    for i in range(n):
        r = big * random.uniform(0.30, 0.38)
        x, y = big / 2 + big * random.uniform(-0.1, 0.1, 2)
        fill = colours[random.integers(len(colours))]
        shape = ("disk", "ring", "square", "triangle", "cross")[i % 5]
        canvas = ImageDraw.Draw(image := Image.new("RGB", (big, big), ground))
        if shape in ("disk", "ring"):
            canvas.circle((x, y), r, fill if shape == "disk" else None, fill, round(0.4 * r))
        elif shape == "triangle":
            canvas.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
        for a, b in {"square": [(0.85, 0.85)], "cross": [(1, 0.33), (0.33, 1)]}.get(shape, ()):
            canvas.rectangle([x - a * r, y - b * r, x + a * r, y + b * r], fill)
        images[i] = np.asarray(image.reduce(4)).transpose(2, 0, 1)
    return images


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, clamped: the exact inverse of `to_float`."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def batch(images, size, generator):
    """x0 [B, C, H, W] in [-1, 1] of uint8 images, drawn with replacement; half are mirrored."""
    index = torch.randint(len(images), (size,), generator=generator, device=generator.device)
    mirror = torch.rand(size, generator=generator, device=generator.device) < 0.5
    x0 = to_float(images[index.to(images.device)].to(generator.device))
    return torch.where(mirror[:, None, None, None], x0.flip(-1), x0)


# -------------------------------------------------------------------------------------------- a run

@dataclasses.dataclass(repr=False)                           # signal.signal would print all weights
class Run:
    """A run directory, and what training and sampling need to know of it."""
    directory: pathlib.Path
    settings: argparse.Namespace                              # saved with the run: settings.lr
    args: argparse.Namespace                                  # the flags that are not saved
    checkpoint: dict | None                                   # what the directory holds

    def __post_init__(self):
        with refusals("torchrun's variables:"):
            self.rank = int(os.environ.get("RANK", 0))        # this process, of how many
            self.world = int(os.environ.get("WORLD_SIZE", 1))
            self.device = choose_device(self.args.device)
            self.cuda = self.device.type == "cuda"
            native = self.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            if self.device.type == "cpu" and self.settings.width >= 64:       # narrow: no faster
                native = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
            self.bf16 = native if self.args.precision == "auto" else self.args.precision == "bf16"
            if self.settings.batch_size % self.world:
                raise Problem(f"--batch-size can't be shared by {self.world} processes", 2)
            if self.world > 1:
                dist.init_process_group(("gloo", "nccl")[self.cuda], timeout=datetime.timedelta(1))

    def barrier(self):
        """Wait for the other processes, where there are any."""
        if self.world > 1:
            dist.barrier()

    def share(self, *tensors):
        """This process's part of each of a global batch's tensors."""
        return [tensor.chunk(self.world)[self.rank] for tensor in tensors]

    def networks(self, build, arguments):
        """(the network build(**arguments), a second one for the average of its weights)."""
        self.network = arguments
        if self.checkpoint and self.checkpoint["network"] != arguments:
            raise Problem(f"{self.directory} had images of another number of channels, or code")
        torch.manual_seed(seed("weights", self.settings.seed))
        net, ema = build(**arguments), build(**arguments).eval().requires_grad_(False)
        ema.load_state_dict(net.state_dict())
        return [each.to(self.device, memory_format=torch.channels_last) for each in (net, ema)]

    def averaged(self, build):
        """The network to sample with: the checkpoint's, with its averaged weights."""
        if self.args.train:                                   # then the file is newer
            self.checkpoint = load_checkpoint(self.directory / "checkpoint.pt")
        with refusals("the checkpoint's network cannot be built:", 1, Exception):
            net = build(**self.checkpoint["network"])
        self.restore(ema=net)
        return net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def ready(self, net, training=False):
        """net, or a part of one, to call: in bf16, compiled, shared, as the run has it."""
        many = self.settings.iterations >= 5000 if training else self.args.n >= 20_000
        if self.cuda and many if self.args.compile is None else self.args.compile:
            net = self.compiled(net, None if training else "reduce-overhead")
        if training and self.world > 1:                       # one gradient for all processes
            net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16, cache_enabled=False)(net)

    def compiled(self, net, mode):
        """net by torch.compile, or as it is where there is no compiler."""
        try:
            torch.compile(torch.sin)(torch.ones(2, device=self.device))
        except Exception as error:                            # there may be no Triton, gcc, headers
            say(f"not compiled, and slower: {str(error)[:200]}".splitlines()[0])
            return net
        say("compiling: the first step takes a minute or two")
        fast = torch.compile(net, mode=mode)
        if mode:                                              # its next call overwrites its outputs
            fast.register_forward_hook(lambda _, __, out: out.clone() if torch.is_tensor(out)
                                       else tuple(each.clone() for each in out))
        return fast

    def restore(self, **parts):
        """Load the checkpoint's model, ema or optimizer into these objects, if it fits them."""
        with refusals("the checkpoint does not fit the network it names:", 1, Exception):
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])

    def steps(self, net, ema, optimizer):
        """Yield (step, generator). Save each minute, at the end, and at Ctrl-C, SIGTERM, SIGHUP."""
        s, first = self.settings, self.checkpoint["step"] if self.checkpoint else 0
        parts = dict(model=net, ema=ema, optimizer=optimizer)
        if first >= s.iterations:
            return say(f"{self.directory} has had its {first} steps: more --iterations train on")
        if self.checkpoint:
            self.restore(**parts)
        if self.rank == 0:
            lock = own(self.directory / ".lock")              # until the loop ends
            size = sum(map(torch.numel, net.parameters())) / 1e6
            say(f"{self.directory}: {size:.1f} M weights, {s.iterations} steps, on {self.device}")
        before = {number: signal.signal(number, self.caught) for number in STOPS
                  if signal.getsignal(number) != signal.SIG_IGN}                # as nohup has it
        self.stop = 0                                         # or the signal that asks to
        self.sums = torch.zeros(2, 5, device=self.device)     # by fifths of t: losses, how many
        self.first = self.since = first
        self.began = self.looked = saved = time.monotonic()
        g = torch.Generator(self.device)
        try:
            for step in range(first, s.iterations):
                g.manual_seed(seed("batch", s.seed, step))    # step k is a function of (seed, k)
                torch.manual_seed(seed("dropout", s.seed, step, self.rank))
                yield step, g
                stop = self.agreed(step)
                last = bool(stop) or step + 1 == s.iterations
                self.report(step + 1, last, optimizer.param_groups[0]["lr"])
                if last or time.monotonic() - saved > 60:
                    self.save(step + 1, parts)
                    saved = time.monotonic()
                if stop:
                    say(f"stopped after step {step + 1}, and saved: the same command goes on")
                    raise SystemExit(128 + stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def caught(self, number, frame):
        """A signal to stop: the loop does so after this step; at once, if it is Ctrl-C again."""
        if self.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    def agreed(self, step):
        """The signal that any process has had, so that all stop together; asked every 20 steps."""
        if self.world == 1 or step % 20 != 19:
            return self.stop if self.world == 1 else 0
        dist.all_reduce(stop := torch.tensor(self.stop, device=self.device), dist.ReduceOp.MAX)
        return int(stop)

    def record(self, losses, t):
        """Note a step: its losses [b] and their times [b] in [0, 1], for the progress line."""
        losses = losses.detach().float()
        fifth = (5 * t).long().clamp(0, 4)
        self.sums.index_add_(1, fifth, torch.stack([losses, torch.ones_like(losses)]))

    def report(self, step, last, lr):
        """Every ten seconds, at first sooner, and at the last: the progress, also in log.jsonl."""
        s, now = self.settings, time.monotonic()
        seconds = max(now - self.looked, 1e-9)
        if seconds < min(10, 1 + self.looked - self.began) and not last:    # looking stalls GPUs
            return
        losses, counts = self.sums.tolist()
        mean = sum(losses) / max(1, sum(counts))
        if not math.isfinite(mean):
            raise Problem(f"the loss is not finite at step {step}: try a lower --lr")
        rate = (step - self.since) * s.batch_size / seconds
        left = (now - self.began) / (step - self.first) * (s.iterations - step)
        line = dict(step=step, loss=mean, images_per_s=round(rate, 2), lr=lr)
        line |= dict(loss_by_time=[loss / n if n else None for loss, n in zip(losses, counts)])
        if self.rank == 0:
            say(f"step {step}/{s.iterations}   loss {mean:.4f}   {rate:,.0f} images/s   "
                f"{datetime.timedelta(seconds=round(left))} left")
            with open(self.directory / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        self.since, self.looked = step, now
        self.sums.zero_()

    def save(self, step, parts):
        """Write the checkpoint, unless a weight is not finite."""
        state = {name: part.state_dict() for name, part in parts.items()}
        if not all(weight.isfinite().all() for weight in state["model"].values()):
            raise Problem(f"a weight is not finite after step {step}: try a lower --lr")
        if self.rank == 0:
            state |= dict(network=self.network, method=vars(self.settings), step=step)
            torch.save(state, buffer := io.BytesIO())
            with replacing(self.directory / "checkpoint.pt") as file:
                file.write(buffer.getbuffer())
        self.barrier()                                        # the others may read it now


def average(ema, net, decay, step):
    """Move the average of the weights on. It is short at first, for the first weights are bad."""
    share = max(1 - decay, 9 / (10 + step))
    for mean, weight in zip(ema.parameters(), net.parameters()):
        mean.data.lerp_(weight.data, share)


def own(file):
    """Lock a file until it is closed, or this process ends. (Windows has no such lock: do not.)"""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = open(file, "a")
    with contextlib.suppress(ImportError), refusals(f"another process has {file}:", 1, OSError):
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def choose_device(name):
    """auto, cpu, cuda or mps -> torch.device. Under torchrun each process has a GPU of its own."""
    best = getattr(torch.accelerator.current_accelerator(True), "type", "cpu")      # if it is there
    name = best if name == "auto" else name
    if name not in ("cpu", best):
        raise Problem(f"PyTorch finds no {name} device on this machine: use --device cpu", 2)
    if name != "cuda":
        return torch.device(name)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def replacing(path, sync=True):
    """A new file for `path`, renamed when complete: a kill, with sync a power cut, keep the old."""
    (path := pathlib.Path(path)).parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint: network, method, model, ema, optimizer, step. Nothing in it is executed."""
    keys = dict(network=dict, method=dict, model=dict, ema=dict, optimizer=dict, step=int)
    if not os.path.exists(path):
        raise Problem(f"there is no checkpoint at {path}: train first, or see --run")
    with refusals(f"{path} is not readable as a checkpoint:", 1, Exception):
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = all(isinstance(state[key], kind) for key, kind in keys.items())
        finite = all(weight.isfinite().all() for weight in state["ema"].values())
        if zipfile.ZipFile(path).testzip() or not known or not finite or state["step"] < 0:
            raise ValueError("it is damaged, or is not of this project")
        return state


# ------------------------------------------------------------------------------------- pictures out

def draw(run, walk, calls, looks=None, **options):
    """Write --n images, as two pictures or PNGs, by walk(x1, generators) -> (t, x_t, x̂₀), ..."""
    args, network = run.args, run.checkpoint["network"]
    base = run.checkpoint["method"]["seed"] if args.seed is None else args.seed
    weights = hashlib.sha256((run.directory / "checkpoint.pt").read_bytes()).hexdigest()[:16]
    named = dict(checkpoint=weights, seed=base, bf16=run.bf16, calls=calls) | options
    text = ", ".join(f"{key} {value}" for key, value in named.items())
    numbers = list(missing(run, text) if args.out else [] if run.rank else range(args.n))
    looks, images, frames = looks or calls, {}, []            # looks: of walk, before the last
    shown, size = {round(k * looks / 10) for k in range(11)}, network["size"]
    at_once = max(1, min(len(numbers), (512 if run.cuda else 64) * 32 ** 2 // size ** 2))
    for first in range(0, len(numbers), at_once):
        now = (numbers[first:] + numbers)[:at_once]           # the last is filled up: one shape
        generators = image_generators(base, now)              # image i is a function of (seed, i)
        x1 = torch.empty(len(now), network["channels"], size, size, device=run.device)
        x1 = randn(x1, generators).contiguous(memory_format=torch.channels_last)
        for k, (t, x, x0) in enumerate(walk(x1, generators)):
            say(f"images {now[0]} to {now[-1]}: {k} of {looks}", pause=10)
            if now[0] == 0 and k in shown:
                frames.append((t, x[:4].cpu(), x0[:4].cpu()))
        images |= zip(now, to_uint8(x).cpu())
        if args.out:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                [*pool.map(save_png, images.values(), [f"{args.out}/{i:06}.png" for i in images])]
            images = {}
    if images:
        save_png(grid(torch.stack([*images.values()])), run.directory / "samples.png")
        save_png(trajectory(frames), run.directory / "trajectory.png")
    if run.rank == 0:
        times = ", ".join(f"{t:.3g}" for t, _, _ in frames)
        wrote = args.out or f"{run.directory}/samples.png, and trajectory.png at t = {times}"
        say(f"sampled: {text}\nwrote {wrote}")
    run.barrier()


def missing(run, text):
    """The numbers of the PNGs that --out lacks, of this process. A Problem if they are others."""
    note = pathlib.Path(run.args.out, ".sampling")            # says what its PNGs are
    there = {file.name for file in note.parent.glob("*.png") if file.stat().st_size}
    if there and not (note.exists() and note.read_text() == text):
        raise Problem(f"{note.parent} has PNGs of another sampling: choose another --out")
    run.lock = own(note) if run.rank == 0 else None
    run.barrier()
    note.write_text(text)
    return [i for i in range(run.args.n) if f"{i:06}.png" not in there][run.rank::run.world]


def grid(images, across=None):
    """uint8 images [N, C, H, W] as one, [3, h, w], enlarged if small."""
    zoom = max(1, round(64 / max(images.shape[-2:])))
    x = images.cpu().repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return torchvision.utils.make_grid(x, across or math.ceil(len(images) ** 0.5), pad_value=255)


def trajectory(frames):
    """For each image a row of x_t and one of x̂₀. frames: (t, x_t, x̂₀), each [B, C, H, W]."""
    x = torch.stack([torch.stack([xt, x0]) for _, xt, x0 in frames])      # [frames, 2, B, C, H, W]
    return grid(to_uint8(x).permute(2, 1, 0, 3, 4, 5).flatten(0, 2), len(frames))


def save_png(image, path):
    """Write uint8 [C, H, W] as a PNG."""
    with replacing(path, sync=False) as file:
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()).save(file, "PNG")


# ------------------------------------------------------------------------------------- command line

BIG = dict(image_size=64, iterations=400_000, batch_size=128, lr=2e-4, ema=0.9999, width=128,
           mult=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1)
SIZES = {
    "shapes": {}, "celeba": BIG, "folder": BIG,
    "cifar10": BIG | dict(image_size=32, iterations=200_000),
    "celebahq": BIG | dict(image_size=256, width=64, mult=(1, 1, 2, 2, 4, 4), batch_size=32),
    "lsun-church": BIG | dict(image_size=128, width=96, mult=(1, 1, 2, 2, 4), batch_size=64)}
ACTIONS = dict(
    train=(False, "train, or go on with what the run directory holds", None),
    sample=(False, "sample, by default from the newest run of this script in runs/", None),
    run=("", "the run directory, by default runs/SCRIPT-DATASET", None),
    preset=("", "the paper's own sizes and training for this dataset", ("paper",)))
COMMON = dict(
    dataset=("shapes", "training images", tuple(SIZES)),
    data_dir=("data", "where datasets lie or are downloaded to; of folder, the images", None),
    image_size=(16, "height and width that images are resized to", None),
    iterations=(1400, "training steps in all", None),
    batch_size=(32, "images a step, shared between the processes", None),
    lr=(2e-3, "learning rate", None),
    ema=(0.995, "decay of the average of the weights", (0, 1)),
    seed=(0, "of training, and of sampling", None))
MACHINE = dict(
    n=(64, "images to draw", None),
    out=("", "a folder for single PNGs, in place of two pictures", None),
    device=("auto", "auto: a GPU, if there is one", ("auto", "cpu", "cuda", "mps")),
    precision=("auto", "of the layers; auto: bf16 where it pays", ("auto", "fp32", "bf16")),
    compile=(None, "torch.compile the network (on a GPU, for 5,000 steps or 20,000 samples)", None))
CHANGEABLE = ("iterations", "data_dir", "autoencoder")        # of a run's settings: they may move


def add_rows(parser, title, rows):
    """A flag for each row: name=(default, what it is, choices or limits)."""
    group = parser.add_argument_group(title)
    for name, (default, text, choices) in rows.items():
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        how = dict(help=f"{text} ({shown})" if shown not in ("", False, None) else text)
        if default is None or isinstance(default, bool):
            how["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        elif isinstance(default, str):
            how |= dict(choices=choices, metavar=None if choices else name.upper())
        elif isinstance(default, tuple):
            how |= dict(nargs="*", type=number(int, 1), metavar="N")
        else:
            least = 0 if default == 0 else 1 if isinstance(default, int) else 1e-12
            how |= dict(type=number(type(default), *(choices or (least,))), metavar="N")
        group.add_argument("--" + name.replace("_", "-"), **how)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number from low to high."""
    def parse(text):
        if low <= kind(text) <= high and float(text) < math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def complain(sentence):
    """What argparse does about a bad flag: it says so in one sentence."""
    raise Problem(f"{sentence} (--help lists the flags)", 2)


def parse(script, doc, flags, sampling, argv):
    """(what the command line gives, as a dictionary; what is not saved, with its defaults)."""
    parser = argparse.ArgumentParser(
        prog=script, usage="%(prog)s --train --sample [flags]", description=doc.split("\n\n")[0],
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = complain
    for title, rows in (("what to do", ACTIONS), ("data and training", COMMON), ("method", flags),
                        ("sampling", sampling), ("machine", MACHINE)):
        add_rows(parser, title, rows)
    given = vars(parser.parse_args(argv))
    rest = {name: row[0] for name, row in (ACTIONS | sampling | MACHINE).items()} | dict(seed=None)
    args = argparse.Namespace(**rest | given)
    if "" in given.values() or not (args.train or args.sample or getattr(args, "evaluate", False)):
        complain("say --train, --sample, or both, and leave no flag empty")
    if args.sample and args.n > 1024 and not args.out:
        raise Problem("one picture holds at most 1,024 images: add --out FOLDER", 2)
    return given, args


def open_run(script, doc, flags, sampling, presets, argv=None):
    """The Run of a command line: its checkpoint's settings, or defaults, SIZES, presets, flags."""
    given, args = parse(script, doc, flags, sampling, argv)
    directory = run_directory(script, args, given.get("dataset"))
    new = args.train and not os.path.lexists(directory / "checkpoint.pt")
    checkpoint = None if new else load_checkpoint(directory / "checkpoint.pt")
    saved = dict(images="") | checkpoint["method"] if checkpoint else {}
    dataset = given.get("dataset") or saved.get("dataset", "shapes")
    if dataset == "shapes" and "data_dir" in given:
        raise Problem("shapes have no --data-dir: add --dataset folder, or another dataset", 2)
    settings = {name: row[0] for name, row in (COMMON | flags).items()}
    settings |= SIZES.get(dataset, {}) | presets.get(dataset, {}) | dict(script=script, images="")
    chosen = {name: tuple(value) if isinstance(value, list) else value
              for name, value in given.items() if name in settings}
    if args.preset:
        with refusals("there is no preset"):
            chosen = presets[f"paper {dataset}"] | chosen
    kinds = [{name: type(value) for name, value in each.items()} for each in (saved, settings)]
    if saved and (kinds[0] != kinds[1] or saved["script"] != script):
        raise Problem(f"{directory} is no run of this {script}: choose another --run")
    if saved and not args.train:
        chosen.pop("seed", None)                              # it is the samples' seed then
    differ = [f"--{name.replace('_', '-')} {saved[name]}, not {value}" for name, value
              in chosen.items() if saved and saved[name] != value and name not in CHANGEABLE]
    if differ:
        raise Problem(f"{directory} was trained with {'; '.join(differ)}: choose another --run", 2)
    settings = argparse.Namespace(**settings | saved | chosen)
    source = pathlib.Path(settings.data_dir, "" if dataset == "folder" else dataset).resolve()
    for place in (directory, args.out or directory):
        if pathlib.Path(place).resolve().is_relative_to(source):
            raise Problem(f"{place} lies inside the images' folder {source}: choose another", 2)
    return Run(directory, settings, args, checkpoint)


def run_directory(script, args, dataset):
    """--run; or runs/SCRIPT-DATASET; or, to sample, the newest run, or the project's weights."""
    if args.run or args.train or dataset:
        return pathlib.Path(args.run or f"runs/{script}-{dataset or 'shapes'}")
    found = [*pathlib.Path("runs").glob(f"{script}-*/checkpoint.pt")]
    shipped = pathlib.Path(__file__).parent / f"assets/weights/{script}"
    if not found and shipped.exists():
        say(f"no run yet: sampling from {shipped} (docs/{script}.md); --train makes your own")
        return pathlib.Path(shutil.copytree(shipped, f"runs/{script}-weights"))
    if not found:
        raise Problem(f"there is no runs/{script}-* yet: train first, or name a run by --run")
    return max(found, key=lambda file: file.stat().st_mtime).parent
