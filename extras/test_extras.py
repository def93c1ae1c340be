"""What neighbours, figures, bench and fd claim. (tasks has tests of its own, but for one.)"""

import csv
import json
import pathlib
import re
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import angular
import blurring
import data
import ddm
import pixel_aware
import unet
from extras import bench, fd, figures, neighbours, tasks
from test_all import oracle

torch.set_num_threads(1)
TINY = "--train --width 8 --mult 1 1 --blocks 1 --attention --image-size 8 --batch-size 4"
HEAT = dict(K=200, widest=24.0)
WIDTHS = [0, *np.geomspace(0.5, 24, 200)]                     # as IHDM's own code has them


def randn(*shape, seed=0):
    """Normal numbers in float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def close(got, want, rtol=0.0, atol=1e-12):
    """Fail unless these are equal, to within rtol or atol."""
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Without --device. What is tested must not depend on the machine."""
    choose = data.choose_device
    monkeypatch.setattr(data, "choose_device", lambda name: choose(name.replace("auto", "cpu")))


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """In an empty directory: call(module, flags) returns what its main prints."""
    draw = data.shapes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, *more, **options: draw(20, *more, **options))

    def call(module, flags, status=0):
        got = 0
        try:
            module.main(flags.split())
        except SystemExit as stop:
            got = stop.code
        out, err = capsys.readouterr()
        if status is not None:                                # curves: 1, without matplotlib
            assert (got, err.count("\n")) == (status, status > 0), (flags, out, err)
        return out + err

    return call


def train(cli, script, more=""):
    """A run of a few steps."""
    own = "--T 12 --code 32 --heads-per-step 5" if script is pixel_aware else ""
    cli(script, f"{TINY} --iterations 3 --lr 0.05 {own} {more}")


def table(path):
    """{column: numbers} of a CSV."""
    header, *rows = csv.reader(pathlib.Path(path).read_text().splitlines())
    return dict(zip(header, np.array(rows, float).T))


def tiles(path):
    """The images of a picture, [rows, columns, 64, 64, 3]."""
    picture = np.asarray(Image.open(path).convert("RGB"), int)[2:, 2:]
    height, width, _ = picture.shape
    picture = picture.reshape(height // 66, 66, width // 66, 66, 3)
    return picture.swapaxes(1, 2)[:, :, :64, :64]


def heat(x, width):
    """x blurred by so many pixels."""
    damping = torch.exp(-blurring.frequencies(x.shape[-2:], x) * width ** 2 / 2)
    return blurring.idct(damping * blurring.dct(x))


@pytest.mark.parametrize("process, sigma, value", [("ihdm", 0.02, 0.25), ("cold", 0, 0.5)])
def test_neighbours_lose_what_their_networks_are_asked_for(process, sigma, value):
    """Eq. 10, 12: A_k x + σ n in, A_{k-1} x - z_k out, squared. Cold: A_k x in, x out, L1. Both
    miss by .5. Catches a target with noise, and level k for k - 1.
    """
    x0, eps = randn(2, 1, 1, 16, 16)

    def net(z, t):
        close(z, heat(x0, WIDTHS[2]) + sigma * eps)
        close(t, 2 / 200)
        answer = heat(x0, WIDTHS[1]) - z if process == "ihdm" else x0
        return answer + 0.5,

    model = neighbours.predictor(net, process)
    k = torch.tensor([2.0]).double()
    close(neighbours.loss(model, x0, eps, k, process, **HEAT), value)


def test_ihdm_transitions_lead_from_level_to_level():
    """Eq. 17: from A_s x to A_t x. Catches d_t/d_s, which is 0/0 in float32 at last."""
    x0 = randn(1, 1, 16, 16)
    s, t = torch.tensor([[60.0], [90.0]]).double()
    alpha, _ = neighbours.transition(t, s, 16, **HEAT)
    close(alpha * blurring.dct(heat(x0, WIDTHS[60])), blurring.dct(heat(x0, WIDTHS[90])))
    k = torch.arange(1, 201).float()
    for part in neighbours.transition(k, k - 1, 32, **HEAT):
        assert torch.isfinite(part).all()


def test_ihdm_sampler_is_eq_11():
    """f(u, k) + δ n for k = K ... 1, at last without noise. Catches σ for δ, and a grain left."""
    z1 = randn(20000, 1, 1, 1)
    way = neighbours.walk(lambda z, t: z / 2 + t[0], z1, 2, delta=0.3, K=2, widest=9.0)
    *_, (_, x, _) = way
    close(x.mean(), 0.5 * 1 + 0.5, atol=0.01)
    close(x.var(), 0.25 * (0.25 + 0.09), rtol=0.04)


@pytest.mark.parametrize("solver, left", [("naive", 0), ("improved", 1)])
def test_cold_rules_leave_of_a_constant_error(solver, left):
    """Of e, naive leaves e, and improved (1 - d_K) e. Catches a sign, and levels skipped."""
    x0, error = randn(2, 1, 1, 16, 16)
    way = neighbours.walk(lambda z, t: x0 + error, heat(x0, 24), 20, solver, **HEAT)
    *_, (_, x, _) = way
    close(x - x0, error - left * heat(error, 24), atol=1e-11)


@pytest.mark.parametrize("process", ["ihdm", "cold"])
def test_neighbours_learn_every_level_and_start_from_blurred_images(process, cli, monkeypatch):
    """Catches the released code's range of levels, without K, where its sampler starts; and a
    start from noise.
    """
    loss = mock.Mock(side_effect=neighbours.loss)
    walk = mock.Mock(side_effect=neighbours.walk)
    monkeypatch.setattr(neighbours, "loss", loss)
    monkeypatch.setattr(neighbours, "walk", walk)
    run = f"{process} {TINY} --batch-size 2000 --iterations 1 --levels 5 --sample --n 6"
    cli(neighbours, run)
    close(np.bincount(loss.call_args.args[3].long()) / 400, [0, 1, 1, 1, 1, 1], atol=0.15)
    images = heat(data.to_float(torch.from_numpy(data.shapes(20, 8))), 6)
    distance = (walk.call_args.args[1][:, None] - images).abs().amax((2, 3, 4))
    close(distance.amin(1), 0, atol=1e-5)


def test_neighbours_refuse_what_cannot_be(cli):
    """Before anything is begun, in a sentence. Catches a traceback, and steps between levels."""
    for flags in ("", "blurring --train", "ihdm --train --steps 3", "cold --train --steps 3",
                  "cold --train --sigma-blur-max 0", "ihdm --train --solver naive", "cold"):
        cli(neighbours, flags, status=2)
    for mode in ("L", "RGB"):
        pathlib.Path(mode).mkdir()
        Image.new(mode, (8, 8)).save(f"{mode}/a.png")
    cli(neighbours, f"cold {TINY} --run r --iterations 1 --dataset folder --data-dir L")
    assert "channels" in cli(neighbours, "cold --sample --run r --data-dir RGB", status=1)


@pytest.mark.parametrize("module", [neighbours, figures, tasks])
def test_a_program_without_a_word_says_what_it_takes(module, monkeypatch, capsys):
    """`python -m extras.NAME`, and no more. Catches a traceback."""
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("task", ["inpainting", "saliency"])
def test_two_processes_share_what_one_draws(task, cli, monkeypatch):
    """Pairs, holes and noise of a task's training. Catches a draw that depends on the process."""
    networks = data.Run.networks
    seen = []

    def two(run, *arguments):
        """As in this process of two, but without the other one."""
        run.rank = rank
        run.world = 2
        return networks(run, *arguments)

    def told(net, condition, run, real=tasks.told):
        seen.append(condition)
        return real(net, condition, run)

    def loss(model, x0, phi, eps, t, *more, real=ddm.loss):
        seen[-1] = torch.cat([seen[-1], x0, eps, t[:, None, None, None] + 0 * x0], 1)
        return real(model, x0, phi, eps, t, *more)

    monkeypatch.setattr(tasks, "told", told)
    monkeypatch.setattr(ddm, "loss", loss)
    cli(tasks, f"{task} {TINY} --iterations 2 --run whole")
    monkeypatch.setattr(data.Run, "networks", two)
    monkeypatch.setattr(data.Run, "barrier", lambda run: None)
    monkeypatch.setattr(data.Run, "ready", lambda run, net, training: net)
    for rank in (0, 1):
        cli(tasks, f"{task} {TINY} --iterations 2 --run part{rank}")
    for whole, *parts in zip(seen[:2], seen[2:4], seen[4:]):
        assert len(parts[0]) == 2
        close(torch.cat(parts), whole)


def test_forward_shows_one_image_and_its_signal_to_noise_ratio(cli):
    """All begin with one image. The ratio is x_t's of ones in x₀ and in ε. Catches a ratio of
    amplitudes, a time upside down, and another image.
    """
    cli(figures, "forward --image-size 8", None)
    rows = tiles("runs/figures/forward.png")
    close(rows[:, 0], rows[[0] * 8, 0], atol=5)               # blurring begins with some noise
    found = table("runs/figures/snr.csv")
    t = torch.from_numpy(found["t"])
    one = torch.ones(100, 1, 8, 8).double()
    s = mock.Mock(sigma_blur_max=4.0, blur_schedule="sin2", d_min=0.001)
    names = {"ddm": ddm, "angular": angular, "blurring, mean colour": blurring}
    for name, script in names.items():
        image = figures.noisy(script, s, one, 0 * one, t)
        noise = figures.noisy(script, s, 0 * one, one, t)
        close(found[name], (image / noise)[:, 0, 0, 0] ** 2, rtol=1e-4)


@pytest.mark.parametrize("script", figures.SCRIPTS.values(), ids=figures.SCRIPTS)
def test_solvers_show_what_sampling_draws(script, cli):
    """Each tile is --sample's. Catches steps for calls, fresh noise, and another solver's name."""
    train(cli, script)
    run = f"runs/{script.__name__}-shapes"
    said = cli(figures, f"solvers {run}")
    rows = re.search("rows: (.*)", said)[1].split(", ")
    shown = tiles(f"{run}/solvers.png")
    each = {"rk4": 4, "mean": 2, "literal": 2}
    for solver in (rows[0], rows[len(rows) * 5 // 8], rows[-1]):
        steps = 20 // each.get(solver, 1)
        cli(script, f"--sample --solver {solver} --steps {steps} --n 3")
        images = tiles(f"{run}/samples.png").reshape(4, 64, 64, 3)
        close(shown[rows.index(solver), 6:], images[:3], atol=1)


def test_curves_are_written_without_matplotlib_and_drawn_with_it(cli, monkeypatch):
    """Figures 2 and 3. Catches a CSV that needs the picture, a curve that is not drawn, and
    JSD's β = 1/t, as printed.
    """
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert "pip install matplotlib" in cli(figures, "schedules", status=1)
    beta = table("runs/figures/beta.csv")
    close(beta["linear"][[0, -1]], [1e-4, 0.02])
    library = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", library)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", library)
    cli(figures, "schedules")
    drawn = [call for call in library.mock_calls if "errorbar" in str(call)]
    assert len(drawn) == 4 + 3
    for _, (x, y, _), _ in drawn:                             # it cannot draw a GPU's tensors
        assert type(x) is type(y) is np.ndarray
    kept = table("runs/figures/alpha_bar.csv")
    for name in ("angular", "linear", "jsd"):                 # ᾱ is the product of 1 - β
        close(np.cumprod(1 - beta[name]), kept[name], atol=1e-4)


def test_errors_compare_runs_on_the_same_images(cli):
    """A new network answers 0. So its error in what it names is the target's square at each t, and
    Eq. 6 and 8 give the other's. Catches swapped outputs, and x at another angle.
    """
    for predict in ("both", "eps", "x0"):
        train(cli, angular, f"--lr 1e-9 --predict {predict} --run {predict}")
    cli(figures, "errors both eps x0 --n 40", None)
    image = table("both/errors-x0.csv")
    noise = table("both/errors-eps.csv")
    tangent = np.tan(np.pi / 2 * image["t = η / (π/2)"])
    x0 = image["x0 (x0)"][0]
    eps = noise["eps (eps)"][0]
    close(image["both (both)"], x0, rtol=1e-3)
    close(noise["both (both)"], eps, rtol=1e-3)
    close(image["eps (eps)"], eps * tangent ** 2, rtol=1e-2)  # x/cos η - x₀ = tan η ε
    close(noise["x0 (x0)"], x0 / tangent ** 2, rtol=1e-2)


def test_errors_of_ddm_are_against_flow_time(cli):
    """A new preconditioned network answers with the best linear guess, (1-t) x_t/4V for data of
    variance 1/4. Its error is known. Catches φ for x̂₀, and t for the flow time.
    """
    train(cli, ddm, "--lr 1e-9 --sigma-data 0.5 --run r")
    cli(figures, "errors r --n 40", None)
    image = table("r/errors-x0.csv")
    tau = image["flow time of t"]
    sigma = tau / (1 - tau)
    n = (np.sqrt(1 + 4 * sigma ** 2) - 1) / (2 * sigma)       # n / (1 - n²) is noise over image
    V = (1 - n ** 2) ** 2 / 4 + n ** 2
    missed = n ** 2 / V                                       # the part of x₀ that is missing
    power = image["both (r)"][-1] / missed[-1] ** 2           # the images' own mean square
    expected = missed ** 2 * power + ((1 - n ** 2) * n / 4 / V) ** 2
    close(image["both (r)"], expected, rtol=0.05)


def test_estimates_start_from_one_noise(cli):
    """First x̂₀ are equal; last are the images, heun's too. Catches two noises, and x for x̂₀."""
    train(cli, angular)
    cli(figures, "estimates runs/angular-shapes ddim2 ddpm heun --n 4 --steps 2")
    rows = tiles("runs/angular-shapes/estimates.png").reshape(4, 3, 11, 64, 64, 3)
    close(rows[:, 1:, 0], rows[:, [0, 0], 0])
    cli(angular, "--sample --solver heun --n 4 --steps 2")
    samples = tiles("runs/angular-shapes/samples.png")
    close(rows[0, 2, -1], samples[0, 0], atol=1)


def test_linear_schedule_takes_as_long_as_figure_9_says():
    """Figure 9's "150" for "400 to 500" is the schedule's: 465. Catches docs that say better."""
    reached = angular.angles(1000, "angular")[150]
    assert sum(angle > reached for angle in angular.angles(1000, "linear")) == 465


def test_pixel_aware_figures_without_a_run(cli):
    """The mean falls faster than DDPM's. Algorithm 1 errs by its formula, and as printed by more.
    Catches a literal mode that reconstructs.
    """
    cli(figures, "moments --image-size 32", None)
    _, ours, ddpm = table("runs/figures/moments-mean.csv").values()
    assert ours[50:].mean() < ddpm[50:].mean()
    cli(figures, "algorithm1 --T 50 --image-size 8", None)
    *_, literal, silent, means, printed, formula = table("runs/figures/algorithm1.csv").values()
    close(literal, formula, rtol=0.35)                        # it is of many steps
    assert ((silent < literal) & (literal < printed)).all()
    close(means, 0, atol=1e-9)


def test_pixel_aware_figures_of_a_run(cli):
    """The strips begin with the image, and end at x_T. Catches a way back upside down."""
    train(cli, pixel_aware)
    cli(figures, "strips runs/pixel_aware-shapes --steps 2 --solver literal")
    rows = tiles("runs/pixel_aware-shapes/strips.png").reshape(3, 4, 11, 64, 64, 3)
    close(rows[:, 0, 0], rows[:, 1, 0])
    close(rows[:, 0, -1], rows[:, 2, -1], atol=1)
    for flags in ("strips runs/pixel_aware-shapes --steps 900",
                  "estimates runs/pixel_aware-shapes mean",
                  "estimates runs/pixel_aware-shapes --steps 2"):
        cli(figures, flags, status=2)
    said = cli(figures, "estimates runs/pixel_aware-shapes --n 5")
    assert len(re.findall(r"SSIM -?[01]\.\d{3}, rms error [01]\.\d{3}\n", said)) == 4 * 4 + 1


def test_ssim_is_wang_and_bovik():
    """For one window of an image and twice it, by its weighted moments. Catches a lost factor."""
    x = randn(1, 1, 11, 11).sigmoid()
    g = torch.exp(-torch.arange(-5, 6) ** 2 / 4.5)
    w = g.outer(g) / g.sum() ** 2
    m = (w * x).sum()
    v = (w * x ** 2).sum() - m ** 2
    want = (4 * m ** 2 + 1e-4) / (5 * m ** 2 + 1e-4) * (4 * v + 9e-4) / (5 * v + 9e-4)
    close(figures.ssim(x, 2 * x), want, rtol=1e-6)


def test_figures_refuse_what_they_would_ignore(cli):
    """Solvers that a network lacks are left out. Catches a traceback, and an ignored flag."""
    train(cli, ddm, "--h linear --no-precondition")
    train(cli, ddm, "--noise linear --run other")
    train(cli, ddm, "--run third")
    assert "rows: ode, ddm\n" in cli(figures, "solvers runs/ddm-shapes")
    for flags in ("", "nothing", "forward --n 3", "forward runs/ddm-shapes", "solvers",
                  "solvers runs/ddm-shapes --steps 3", "strips runs/ddm-shapes",
                  "errors runs/ddm-shapes", "errors other", "errors third third/",
                  "estimates runs/ddm-shapes rk5", "schedules --n 1"):
        cli(figures, flags, status=2)
    cli(figures, "errors nowhere", status=1)
    assert "another process" in cli(bench, "--solvers other", status=2)
    assert "not 3x8x8" in cli(bench, "--solvers third", status=2)


def test_flops_count_attention():
    """Multiply-adds of qkv, out and scores, twice. Catches attention that is not counted."""
    attention = unet.Attention(256, 64)
    work = bench.flops(lambda x, t: attention(x), torch.randn(1, 256, 16, 16), None)
    close(work, 2 * (4 + 2) * 256 ** 3)


@pytest.mark.parametrize("flag, dtype", (("bf16", torch.bfloat16), ("fp32", torch.float32)))
def test_precision_is_of_a_networks_layers(flag, dtype):
    """In bf16 if asked for. Catches a flag that is not heeded."""
    run = data.open_run("ddm", "", ddm.FLAGS | unet.FLAGS, ddm.SAMPLING, {},
                        ["--train", "--run", "none", "--precision", flag])
    for training in (True, False):
        assert run.ready(torch.nn.Linear(2, 2), training)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("width, chip, bf16", [
    (64, dict(avx512_bf16=True), True), (56, dict(avx512_bf16=True), False),
    (64, dict(avx512_bf16=False), False), (64, {}, False)])
def test_bf16_is_for_wide_networks_on_cpus_that_have_it(width, chip, bf16, monkeypatch):
    """Catches a demo that bf16 slows down, and a CPU that only imitates it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: chip, raising=False)
    flags = f"--train --run none --device cpu --width {width}".split()
    run = data.open_run("ddm", "", ddm.FLAGS | unet.FLAGS, ddm.SAMPLING, {}, flags)
    assert run.bf16 == bf16


@pytest.mark.parametrize("flags, gpu, training, compiled", [
    ("--iterations 5000", True, True, True), ("--iterations 1400", True, True, False),
    ("--n 20000", True, False, True), ("--n 64 --iterations 5000", True, False, False),
    ("--n 20000 --iterations 5000", False, True, False), ("--compile", False, False, True),
    ("--no-compile --iterations 5000", True, True, False)])
def test_networks_are_compiled_where_it_pays(flags, gpu, training, compiled, monkeypatch):
    """On a GPU, and not for the demo. Catches a minute of compiling for 20 seconds of training."""
    made = []
    run = data.open_run("ddm", "", ddm.FLAGS | unet.FLAGS, ddm.SAMPLING, {},
                        ["--train", "--run", "none", "--out", "pngs", *flags.split()])
    run.cuda = gpu
    monkeypatch.setattr(run, "compiled", lambda net, mode: made.append(mode) or net)
    run.ready(torch.nn.Identity(), training)
    assert made == [None if training else "reduce-overhead"] * compiled


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3, 80])
def test_bench_asks_ddm_and_the_circle_for_one_image(sigma):
    """What an image with noise σ tells of x₀ does not depend on the process that made it. Catches
    a wrong t, and an x that is not scaled.
    """
    x = randn(5, 1, 2, 2)
    images = [bench.image_at(script, oracle(script), x, sigma) for script in (ddm, angular)]
    close(*images, 0, 1e-9)


def test_bench_names_its_figures(cli, capsys, monkeypatch):
    """Images/s, of calls by turns. Catches a rate of batches, and calls timed one by one."""
    order = []
    bench.seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4)
    assert "".join(order) == 4 * "aaabbb"                     # a Timer calls twice to warm up
    monkeypatch.setattr(bench, "seconds", lambda calls: dict.fromkeys(calls, [0.5]))
    bench.report("tiny", dict(width=8, mult=(1,), blocks=1, attention=(), size=8), 4)
    said = capsys.readouterr().out
    assert re.findall(r"(\w+) +8.0 images/s", said) == ["training", "sampling"]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in cli(bench, "--diffusers --device cpu", status=1)


def test_memory_is_what_a_hand_counts(cli, monkeypatch):
    """Of attention over 5 images of 64 channels, 8x8. Catches what is kept twice, or not at all, an
    attention matrix, weights in fp32 among what is kept, and GPUs that cannot hold their share.
    """
    def train(run):
        sizes = dict(channels=64, head_dim=32)
        net, _ = run.networks(unet.Attention, sizes)
        for _, g in run.steps():
            x = torch.zeros(5, 64, 8, 8, device=g.device)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                y = net(x)
            y.square().mean().backward()

    settings = types.SimpleNamespace(batch_size=4)
    run = types.SimpleNamespace(settings=settings)
    own, kept = bench.training_memory(train, run)
    n = 5 * 64 * 64
    weights = 4 * 64 * 64 + 4 * 64 + 2 * 64                   # convolutions, biases, norm
    bf16 = n                                                  # what makes q, k, v
    bf16 += 4 * n                                             # they, and their result
    bf16 += 4 * 64 * 64                                       # the convolutions' weights
    fp32 = n + 2 * 5 * 16                                     # into the norm; mean, deviation
    fp32 += 5 * 2 * 64                                        # a row's sum of exponentials
    fp32 += n                                                 # what is squared
    close(own, 5 * 4 * weights)
    close(kept, 2 * bf16 + 4 * fp32, atol=24)                 # and the dropout's seed
    monkeypatch.setattr(bench, "paper_runs", lambda: [("a", train, run)])
    for gpus, room in {1: own + kept, 2: own + kept - 1, 4: own + kept / 3}.items():
        monkeypatch.setattr(bench, "ROOM", room)
        assert f"| a | 4 | 0.0 | 0.0 | {gpus} |" in cli(bench, "--memory")


def test_fd_is_a_distance_of_folders(cli):
    """Of Gaussians |m₁ - m₂|² + Σ (s₁ - s₂)². Catches a lost square root, JPEGs left out."""
    f = randn(100, 3)
    cov = f.T.cov()
    close(fd.frechet(f, f.mean(0) + 1, 4 * cov), 3 + cov.trace(), rtol=1e-9)
    images = data.shapes(20, 16)[:12]
    np.save("all.npy", images)
    for folder in ("png", "jpg"):
        pathlib.Path(folder).mkdir()
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(f"png/{k}.png")
        Image.fromarray(image).save(f"jpg/{k}.JPG")
    found = json.loads(cli(fd, "png --reference all.npy"))
    close([*found.values()], [12, 0, 1, 1], atol=1e-3)
    np.save("large.npy", images.repeat(4, 2).repeat(4, 3))    # 64x64, halved, is 16x16, doubled
    close(json.loads(cli(fd, "large.npy --reference all.npy"))["fd"], 0, atol=1e-3)
    pathlib.Path("jpg/._0.JPG").write_text("a Mac's note, and no image")
    assert json.loads(cli(fd, "jpg --n 5"))["fd"] > 5
    assert json.loads(cli(fd, "jpg"))["n"] == 12


def test_fd_of_what_it_cannot_take_is_one_sentence(cli):
    """Folders and files that are empty, absent, torn, mixed or too few. Catches a traceback."""
    for folder, sizes in dict(empty=(), one=(32,), mixed=(16,) * 4 + (32,), large=(96,) * 4,
                              torn=(32,) * 4).items():
        pathlib.Path(folder).mkdir()
        for k, size in enumerate(sizes):
            Image.new("RGB", (size, size)).save(f"{folder}/{k}.jpg")
    pathlib.Path("torn/2.jpg").write_bytes(pathlib.Path("torn/1.jpg").read_bytes()[:200])
    for path, array in dict(number=np.uint8(3), turned=np.zeros((4, 32, 32, 3), np.uint8),
                            float=np.zeros((4, 3, 32, 32)), pickled=np.array([None] * 4),
                            none=np.zeros((0, 3, 32, 32), np.uint8)).items():
        np.save(f"{path}.npy", array)
    np.savez("archive.npz", np.zeros((4, 3, 32, 32), np.uint8))
    pathlib.Path("blank.npy").write_bytes(b"")
    for words in ("one has 1 images", "mixed has 5 images", "large has 4", "torn/2.jpg", "nowhere",
                  "number.npy", "turned.npy", "float.npy", "pickled.npy", "none.npy has 0",
                  "archive.npz", "blank.npy"):
        path = "torn" if "torn" in words else words.split()[0]
        assert words in cli(fd, path, status=1)
    assert "no images" in cli(fd, "empty", status=2)
    with pytest.raises(SystemExit, match="2"):
        fd.main(["turned.npy", "--reference", ""])
