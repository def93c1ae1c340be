#!/usr/bin/env python3
"""This U-Net and diffusers' UNet2DModel of equal size, in one interleaved run: images/s in training and in sampling.

    pip install diffusers && python assets/versus_diffusers.py [--batch-size 8] [--rounds 9]

Both have DDPM's CIFAR-10 sizes (35.7 M parameters), random weights, and the same images. Every round times, by turns, a
training step (forward, backward, fused AdamW), one network call without gradients, and ten steps of sampling: here
angular.py's ddim2, there DDIM and DPM-Solver++ (2M) with diffusers' own schedulers. "eager" is the same precision for
both; on a GPU "as shipped" is bf16 and a captured CUDA graph here and the pipeline's fp32 there. Printed are medians,
and the ratio of each round's pair, whose median says more on a busy machine.
"""
import argparse
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import angular  # noqa: E402
import unet  # noqa: E402


def theirs(device):
    """UNet2DModel with our network's widths, blocks, attention (at 16x16 and in the middle) and dropout."""
    from diffusers import UNet2DModel
    down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    return UNet2DModel(sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, dropout=0.1,
                       block_out_channels=(128, 256, 256, 256), down_block_types=down, up_block_types=up,
                       attention_head_dim=64).to(device, memory_format=torch.channels_last)


def scheduler(name):
    """diffusers' DDIM, or its DPM-Solver++ of second order."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    return DDIMScheduler() if name == "DDIM" else DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")


@torch.no_grad()
def denoise(net, name, x, steps):
    """diffusers' own loop, as its pipelines have it."""
    how = scheduler(name)
    how.set_timesteps(steps, device=x.device)
    for t in how.timesteps:
        x = how.step(net(how.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=None, help="images a call (128 on a GPU, 8 on a CPU)")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = args.batch_size or (128 if device.type == "cuda" else 8)
    a, b = unet.UNet(outputs=(3,)).to(device, memory_format=torch.channels_last), theirs(device)
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    t = torch.rand(batch, device=device)
    for name, net in (("ours", a), ("diffusers", b)):
        print(f"{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters")
    adam = {net: torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True) for net in (a, b)}

    def step(net, call):
        net.train()
        call().square().mean().backward()
        adam[net].step()
        adam[net].zero_grad(set_to_none=True)
        net.eval()

    @torch.no_grad()
    def once(call):
        return call()

    half = unet.use_bf16("auto", device)
    quick = angular.predictor(a.eval(), "noise", bf16=half)
    graph = unet.fast(quick, x, t)
    ddim2 = dict(steps=10, solver="ddim2", start=0.999, clip=True)
    pairs = {
        "training step, eager": (lambda: step(a, lambda: a(x, t)[0]), lambda: step(b, lambda: b(x, 1000 * t).sample)),
        "network call, eager": (lambda: once(lambda: a(x, t)[0]), lambda: once(lambda: b(x, 1000 * t).sample)),
        "10 steps: ddim2 against DDIM": (lambda: angular.sample(graph, x, **ddim2), lambda: denoise(b, "DDIM", x, 10)),
        "10 steps: ddim2 against DPM-Solver++": (lambda: angular.sample(graph, x, **ddim2),
                                                 lambda: denoise(b, "DPM-Solver++", x, 10))}
    times = {name: ([], []) for name in pairs}
    for k in range(args.rounds + 1):                        # the first warms up
        for name, calls in pairs.items():
            for call, taken in zip(calls, times[name]):
                began = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                taken += [time.perf_counter() - began] if k else []
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"PyTorch {torch.__version__}, {where}, batches of {batch}, {args.rounds} rounds; images/s")
    middle = len(times[next(iter(pairs))][0]) // 2
    for name, (ours, others) in times.items():
        ratio = sorted(o / m for m, o in zip(ours, others))
        mine, his = (batch / sorted(each)[middle] for each in (ours, others))
        print(f"{name:38} ours {mine:9.2f}   diffusers {his:9.2f}   ours / diffusers {ratio[middle]:.2f} "
              f"({ratio[0]:.2f} to {ratio[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
