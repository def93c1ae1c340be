"""What the shared U-Net costs on this machine: parameters, FLOPs, and images a second.

    python -m extras.bench                  the demo's network, and three of CIFAR-10's size
    python -m extras.bench --diffusers      against diffusers' U-Net of the same size
    python -m extras.bench --solvers RUN    our solvers and diffusers', on one trained network
    python -m extras.bench --memory         what the papers' sizes need of a GPU: it needs none

FLOPs count a multiply-add as two, and a training step as three calls. Times are taken by turns.
"""

import argparse
import contextlib
import functools
import math
import os
from statistics import median
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import angular
import blurring
import data
import ddm
import pixel_aware
import unet
from extras import fd, figures, latent, task_data, tasks

SMALL = dict(width=32, mult=(1, 2, 2), blocks=1, attention=(8,), size=16, dropout=0.0)
NETWORKS = {
    "demo (shapes, 16x16)": SMALL | dict(second="conv"),
    "CIFAR-10, one output": dict(outputs=(3,)),
    "CIFAR-10, U-Net+conv": dict(second="conv"),
    "CIFAR-10, U-Net+decoder": dict()}


def flops(net, x, t):
    """Floating-point operations of one call, by torch's counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(x, t)                                             # it cannot count fused attention
    return counter.get_total_flops()


def seconds(calls, rounds=3):
    """{name: seconds, one number a round} of calls, by turns. A Timer calls twice to warm up."""
    timers = {name: Timer("f()", globals=dict(f=call), num_threads=torch.get_num_threads())
              for name, call in calls.items()}
    taken = [{name: timer.timeit(1).mean for name, timer in timers.items()}
             for _ in range(rounds)]                          # it also waits for a GPU
    return {name: [each[name] for each in taken] for name in calls}


def ways(net, *given):
    """(a training step: forward, backward and optimizer; a sampler's call) of a network."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def training():
        out = net.train()(*given)
        out = out if isinstance(out, tuple) else [out.sample]
        sum(each.float().square().mean() for each in out).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sampling():
        return net.eval()(*given)

    return training, sampling


def report(name, arguments, batch, bf16=False, compiled=False):
    """Print what UNet(**arguments) costs, also as a share of a large matrix product's speed."""
    net = unet.UNet(**arguments).to(memory_format=torch.channels_last)
    size = arguments.get("size", 32)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    t = torch.rand(batch)
    work = flops(net, x[:1], t[:1])
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    data.say(f"{name}: {millions:.2f} M parameters, {work / 1e9:.3f} GFLOPs a call")
    n = 8192 if x.is_cuda else 2048
    a = torch.randn(n, n, dtype=torch.bfloat16 if bf16 else torch.float32)
    calls = dict(product=lambda: a @ a)
    calls["training"], calls["sampling"] = ways(net, x, t)
    if compiled:
        calls["training, compiled"], calls["sampling, compiled"] = ways(torch.compile(net), x, t)
    taken = seconds(calls)
    best = 2 * n ** 3 / median(taken.pop("product")) / 1e12
    for way, times in taken.items():
        rate = batch / median(times)
        done = rate * work * (3 if way.startswith("training") else 1) / 1e12
        data.say(f"    {way:20} {rate:10,.1f} images/s   {done:8.3g} TFLOP/s, "
                 f"{done / best:4.0%} of a large product's {best:.3g}")


def library():
    """The package diffusers. Raises data.Problem where it is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise data.Problem("this comparison needs diffusers: pip install diffusers") from error
    return diffusers


def against_diffusers(batch, compiled=False, rounds=5):
    """Print images/s of our U-Net and diffusers', in training, in a call, and in ten steps."""
    diffusers = library()
    ours = unet.UNet(outputs=(3,)).to(memory_format=torch.channels_last)
    down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    theirs = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), dropout=0.1,
        attention_head_dim=64, down_block_types=down, up_block_types=up
    ).to(memory_format=torch.channels_last)
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (ours, theirs)]
    data.say("ours {:.2f}, diffusers {:.2f} M parameters".format(*sizes))
    if compiled:
        ours, theirs = torch.compile(ours), torch.compile(theirs)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    t = torch.rand(batch)
    model = angular.predictor(ours, "eps")

    @torch.no_grad()
    def denoise(scheduler, image=x):
        scheduler.set_timesteps(10, device=x.device)
        for i in scheduler.timesteps:
            image = scheduler.step(theirs(image, i).sample, i, image).prev_sample

    ddim2 = functools.partial(angular.sample, model, x, 10, "ddim2", start=0.999, clip=True)
    both = zip(ways(ours, x, t), ways(theirs, x, 1000 * t))
    pairs = dict(zip(("training step", "network call"), both))
    pairs["ddim2, DDIM"] = ddim2, lambda: denoise(diffusers.DDIMScheduler())
    pairs["ddim2, DPM-Solver++"] = ddim2, lambda: denoise(diffusers.DPMSolverMultistepScheduler())
    for name, calls in pairs.items():
        a, b = seconds(dict(enumerate(calls)), rounds).values()
        ratios = sorted(y / x for x, y in zip(a, b))
        data.say(f"{name:25} ours {batch / median(a):8.2f}, diffusers {batch / median(b):8.2f}, "
                 f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


# ------------------------------------------------------------------------- solvers, on one network

OURS = {ddm: ("ode3", "ode2", "ode"), angular: ("ddim3", "ddim2", "ddim", "euler")}
SCHEDULERS = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", dict(solver_order=2)),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", dict(solver_order=3)),
    "UniPC-2": ("UniPCMultistepScheduler", dict(solver_order=2)),
    "UniPC-3": ("UniPCMultistepScheduler", dict(solver_order=3)),
    "DEIS-3": ("DEISMultistepScheduler", dict(solver_order=3))}
SIGMAS = {                                                    # noise over image, by even u
    "even flow time": lambda u: 0.9984 * (1 - u) / (1 - 0.9984 * (1 - u)),     # as `ode3` has it
    "even log σ, 80 to .01": lambda u: 80 ** (1 - u) * 0.01 ** u,
    "EDM's, 80 to .02": lambda u: (80 ** (1 / 7) * (1 - u) + 0.02 ** (1 / 7) * u) ** 7}


def image_at(script, model, x, sigma):
    """x̂₀ for x = (x₀ + σ ε)/√(1 + σ²), which is how diffusers scales its images."""
    if script is angular:
        eta = x.new_full((len(x),), math.atan(sigma))
        heads = model(x, eta / angular.HALF_PI)
        return angular.project(x, *heads, eta)[0]
    n = (math.sqrt(1 + 4 * sigma ** 2) - 1) / (2 * sigma)     # n / (1 - n²) = σ
    t = x.new_full((len(x),), max(n ** 2, 1e-3))
    x = x * math.hypot(1 - n ** 2, n)
    return -ddm.project(x, *model(x, t), t)[0]


@torch.no_grad()
def by_diffusers(name, grid, script, model, x, steps):
    """The image that a scheduler of diffusers makes of x in so many calls of our network."""
    kind, options = SCHEDULERS[name]
    scheduler = getattr(library(), kind)(prediction_type="sample", **options)
    last = 1 if grid != "even flow time" else 1 - 0.5 / steps       # whose last step, to 0, is half
    sigmas = [SIGMAS[grid](last * k / (steps - 1)) for k in range(steps)]
    scheduler.set_timesteps(steps)
    end = 1e-3 if name == "DEIS-3" else 0.0                   # it takes the logarithm
    scheduler.sigmas = torch.tensor([*sigmas, end])
    for sigma, i in zip(sigmas, scheduler.timesteps):
        x0 = image_at(script, model, x, sigma)
        x = scheduler.step(x0, i, x).prev_sample
    return x


def compare_solvers(directory, n, seed=0, calls=(5, 10, 20), fine=200):
    """Print FD of n samples, and how far the first 200 are from those of `fine` steps of ours.

    That is the root mean square of the difference over that of the images. FD is against the last
    10,000 training images.
    """
    scripts = {script.__name__: script for script in OURS}
    script, run, (model,) = figures.trained(directory, [f"--seed={seed}"], scripts)
    figures.check_process(script, run, "the comparison")
    channels, size = (run.checkpoint["network"][key] for key in ("channels", "size"))
    if channels != 3 or size not in fd.SIZES:
        raise data.Problem(f"FD is of 3x16x16, 3x32x32 or 3x64x64, not {channels}x{size}x{size}", 2)
    true = fd.features(fd.in_32(data.load(run)[-10_000:]))
    mean = true.mean(0)
    cov = true.T.cov()
    x1 = data.randn(torch.empty(n, 3, size, size), figures.generators_of(run, n))
    x1 = x1.contiguous(memory_format=torch.channels_last)
    exact = script.sample(model, x1[:200], fine, OURS[script][0])

    def cell(solve, steps):
        images = torch.cat([solve(part, steps) for part in x1.split(250)])
        found = fd.features(fd.in_32(data.to_uint8(images)))
        off = images[:200] - exact
        far = off.norm() / exact.norm()
        return f"{fd.frechet(found, mean, cov):.2f} ({far:.0%})"

    def say_row(name, grid, solve):
        cells = [cell(solve, steps) for steps in calls]
        data.say("| " + " | ".join([name, grid, *cells]) + " |")

    data.say("| solver | grid | " + " | ".join(f"{steps} calls" for steps in calls) + " |")
    for name in OURS[script]:
        say_row(name, "default", functools.partial(script.sample, model, solver=name))
    for name in SCHEDULERS:
        for grid in SIGMAS:
            solve = functools.partial(by_diffusers, name, grid, script, model)
            say_row(name, grid, solve)


# ---------------------------------------------------------------------------- memory, without a GPU

ROOM = 72e9                      # bytes of a GPU of 80 GB that are free for what is counted here


def flash(q, k, v):
    """Attention as on a GPU: it keeps q, k, v, its result and a number a row, but no matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def fake_gpu(run):
    """A run on a GPU that computes nothing, with one training step. Yields the run's networks.

    Tensors have sizes and no values: to ask for one raises, and so does to mix devices.
    """
    gpu = torch.device("cuda:0")
    generator = type("Generator", (torch.Generator,), dict(device=gpu))()
    nets = []

    def networks(build, arguments):
        with gpu:
            nets.extend(build(**arguments) for _ in range(2))
        return nets

    def backward(loss):
        for weight in nets[0].parameters():
            weight.grad = torch.zeros_like(weight)

    run.networks = networks
    run.averaged = lambda build: nets[1]
    run.steps = lambda *_: [(0, generator)]
    with contextlib.ExitStack() as stack:
        for place, name, value in (
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
                (torch.nn.functional, "scaled_dot_product_attention", flash),
                (torch.nn.init, "trunc_normal_", lambda weight, **_: weight),   # Swin's, by values
                (torch.Tensor, "backward", backward)):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        run.device = gpu
        run.bf16 = True
        run.sums = torch.zeros(2, 5, device=gpu)
        yield nets


def training_memory(train, run):
    """What train(run) needs at the end of a step's way forth, in bytes, in bf16 and not compiled.

    (weights, their average, their gradients and Adam's two moments; what autograd keeps besides.)
    """
    kept = set()

    def keep(x):
        kept.add(x.untyped_storage())
        return x

    def backward(loss):
        raise StopIteration                                   # all that is kept is known

    with fake_gpu(run) as nets, saved_tensors_hooks(keep, lambda x: x):
        stop = mock.patch.object(torch.Tensor, "backward", backward)
        with stop, contextlib.suppress(StopIteration):
            train(run)
        weights = {weight.untyped_storage() for weight in nets[0].parameters()}
        size = sum(storage.nbytes() for storage in weights)
        return 5 * size, sum(storage.nbytes() for storage in kept - weights)


class Latents:
    """Stands in for a first stage with f = 4 and three channels."""

    factor = 4
    latent = 3
    facts = dict(factor=4)

    def measure(self, x):
        """Nothing."""

    def encode(self, x):
        """Zeros."""
        return x.new_zeros(len(x), 3, x.shape[2] // 4, x.shape[3] // 4)


def paper_runs():
    """(name, train, run) of each --preset paper of the scripts, and in latents, as of the tasks."""
    scripts = [(script.__name__, script, script.PRESETS)
               for script in (ddm, blurring, angular, pixel_aware)]
    scripts.append(("latent", latent, latent.PRESETS))
    of_tasks = [(task, tasks, tasks.presets(task)) for task in task_data.TARGETS]
    for name, module, presets in scripts + of_tasks:
        rows = module.FLAGS | unet.FLAGS
        for preset in presets:
            paper, _, dataset = preset.partition(" ")
            if dataset:
                flags = f"--train --preset {paper} --dataset {dataset} --device cpu --run"
                argv = [*flags.split(), os.devnull]           # a run that is not there
                run = data.open_run(name, "", rows, module.SAMPLING, presets, argv)
                run.settings.pretrained = False
                train = module.train
                if module is latent:
                    train = functools.partial(train, stage=Latents())
                elif module is tasks:
                    run.stage = Latents() if run.settings.autoencoder else None
                yield f"{name} {dataset}", train, run


def memory():
    """Print what each --preset paper needs, and how many GPUs of 80 GB can share its batch."""
    def images(run, n=2, planes=3):
        size = run.settings.image_size
        return torch.zeros(n, planes, size, size, dtype=torch.uint8, device=run.device)

    def pairs(run):
        target = task_data.TARGETS[run.settings.script]
        return list(images(run, planes=4 if target else 3))

    data.say("| preset | batch | weights and Adam, GB | kept for the way back, GB | GPUs |")
    for name, train, run in paper_runs():
        batch = run.settings.batch_size
        with (mock.patch.object(data, "load", images),
              mock.patch.object(task_data, "load_pairs", pairs)):
            own, kept = training_memory(train, run)
        shares = [n for n in range(1, batch + 1) if batch % n == 0]
        fits = [n for n in shares if own + kept / n <= ROOM]
        data.say(f"| {name} | {batch} | {own / 1e9:.1f} | {kept / 1e9:.1f} | {fits[0]} |")


@data.command
def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n\n")[0])
    parser.error = data.complain
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--batch-size", type=data.number(int, 1), help="128 on a GPU, else 8")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    parser.add_argument("--bf16", action="store_true", help="also on a CPU")
    parser.add_argument("--diffusers", action="store_true", help="instead: against diffusers")
    parser.add_argument("--solvers", metavar="RUN", help="instead: of a trained run")
    parser.add_argument("--n", type=data.number(int, 300), default=1000, help="of its samples")
    parser.add_argument("--seed", type=data.number(int, 0), default=0, help="of their noise")
    parser.add_argument("--memory", action="store_true", help="instead: of the papers' sizes")
    args = parser.parse_args(argv)
    if args.memory:
        return memory()
    if args.solvers:
        return compare_solvers(args.solvers, args.n, args.seed)
    device = data.choose_device(args.device)
    cuda = device.type == "cuda"
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = args.bf16 or native
    batch = args.batch_size or (128 if cuda else 8)
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    data.say(f"PyTorch {torch.__version__}, {where}, {'bf16' if bf16 else 'fp32'}, "
             f"batches of {batch}; medians of images/s")
    with device, torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False):
        if args.diffusers:
            return against_diffusers(batch, args.compile)
        for name, arguments in NETWORKS.items():
            report(name, arguments, batch, bf16, args.compile)


if __name__ == "__main__":
    main()
