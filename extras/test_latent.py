"""Claims of the latent stage: extras/autoencoder.py, extras/latent.py, extras/tasks.py in latents;
and of the papers' datasets as they come.

Each test makes its own small data. Its docstring says which bug it catches.
"""

import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddm
from extras import autoencoder, bench, latent, task_data, tasks

torch.set_num_threads(1)
CPU = ["--device", "cpu"]
SMALL = "--width 8 --blocks 1 --batch-size 4 --image-size 16".split() + CPU
FIRST = ["--train", *SMALL, "--mult", "1", "1", "2", "--iterations"]


def call(module, capsys, *flags, status=0):
    """module.main(flags) ends with this status: what it printed, on stderr if it failed."""
    code = 0
    try:
        module.main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == status, printed
    return printed.err if status else printed.out


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty current directory, and few shapes."""
    real = data.shapes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, *a, **k: real(min(n, 50), *a, **k))
    return tmp_path


def images(n=4, size=32, seed=0):
    """Even draws in [-1, 1], [n, 3, size, size]."""
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 3, size, size, generator=g) - 1


# ---------------------------------------------------------------------------------- the first stage

@pytest.mark.parametrize("mult, factor", [((1, 2, 4), 4), ((1, 2, 2, 4), 8)])
def test_latents_are_f_times_smaller(mult, factor):
    """f = 2^(levels - 1), for images of any size. Catches a level too many, and a height that is
    taken for a width.
    """
    torch.manual_seed(0)
    net = autoencoder.Autoencoder(3, 4, 8, mult, 1)
    x = images(2, 64)
    again, mean, logvar = net(x[..., :48], torch.zeros(2, 4, 64 // factor, 48 // factor))
    assert mean.shape == logvar.shape == (2, 4, 64 // factor, 48 // factor)
    assert again.shape == (2, 3, 64, 48)


def test_ssim_by_hand():
    """Against loops over windows in numpy. Catches images in [-1, 1] whose
    means may be negative, and n - 1 for n."""
    a, b = images(2, 10).double()
    total = []
    for channel in range(3):
        for top in range(4):
            for left in range(4):
                p, q = [x[channel, top:top + 7, left:left + 7].numpy().ravel() for x in (a, b)]
                p, q = [(x + 1) / 2 for x in (p, q)]                     # in [0, 1]: C = .01², .03²
                (vp, c), (_, vq) = np.cov(p, q, bias=True)
                light = (2 * p.mean() * q.mean() + 1e-4) / (p.mean() ** 2 + q.mean() ** 2 + 1e-4)
                total.append(light * (2 * c + 9e-4) / (vp + vq + 9e-4))
    assert math.isclose(autoencoder.ssim(a[None], b[None]).item(), np.mean(total), rel_tol=1e-9)
    assert math.isclose(autoencoder.ssim(a[None], a[None]).item(), 1)
    assert math.isclose(autoencoder.ssim(*2 * [images(1, 3)]).item(), 1)        # of few pixels


def test_loss_by_hand():
    """ℓ₁ of .5, no divergence of latents N(0, I), and torch's of others. Catches a sum for a mean,
    and a deviation for a variance.
    """
    x = images()
    zero = torch.zeros(4, 3, 8, 8)
    got = autoencoder.loss(x, x + 0.5, zero, zero, structure=0, kl=1)
    torch.testing.assert_close(got, torch.full((4,), 0.5))
    q = torch.distributions.Normal(zero + 2, 3.0)
    far = torch.distributions.kl_divergence(q, torch.distributions.Normal(zero, 1.0)).mean()
    got = autoencoder.loss(x, x, zero + 2, zero + 2 * math.log(3), structure=0.1, kl=0.7)
    torch.testing.assert_close(got, 0.7 * far.expand(4))
    same = autoencoder.loss(x, x.flip(0), zero, zero, structure=2, kl=1)
    less = autoencoder.loss(x, x.flip(0), zero, zero, structure=1, kl=1)
    torch.testing.assert_close(same - less, 1 - autoencoder.ssim(x, x.flip(0)))


def test_training_brings_images_back(few, capsys):
    """A few steps on shapes. Catches a decoder that is not trained, and averages of nothing."""
    call(autoencoder, capsys, *FIRST, 150, "--lr", 5e-3, "--ema", 0.95)
    stage = autoencoder.FirstStage("runs/autoencoder-shapes", "cpu")
    x = data.to_float(torch.from_numpy(data.shapes(20, 16, 1)))
    error = (stage.decode(stage.encode(x)) - x).square().mean()
    assert error < 0.5 * x.var((0, 2, 3)).mean()              # a mean colour leaves 1


def test_a_first_stage_scales_its_latents(few, capsys):
    """Mean 0 and variance 1 of each channel, and back. Catches statistics of all channels at once,
    and those of another autoencoder.
    """
    call(autoencoder, capsys, *FIRST, 1)
    stage = autoencoder.FirstStage("runs/autoencoder-shapes", "cpu")
    x = images(40, 16)
    raw = stage.encode(x)
    plain = stage.decode(raw)
    stage.measure(x)
    z = stage.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(stage.decode(z), plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(stage.encode(x[:, :1]), stage.encode(x[:, :1].expand(-1, 3, -1, -1)))
    again = autoencoder.FirstStage("runs/autoencoder-shapes", "cpu", stage.facts)
    assert torch.equal(again.encode(x), z)
    call(autoencoder, capsys, *FIRST, 2)
    with pytest.raises(data.Problem, match="not the autoencoder that this run was trained with"):
        autoencoder.FirstStage("runs/autoencoder-shapes", "cpu", stage.facts)


def output(**parts):
    """What diffusers' models return: a dictionary with attributes."""
    made = type("Output", (dict,), parts)
    return made(parts)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoders_of_diffusers_may_stand_in(kind, few, monkeypatch):
    """By a stand-in for the package. Catches a draw for the mean, and a wrong f."""
    net = torch.nn.Conv2d(3, 2, 1)
    net.config = types.SimpleNamespace(in_channels=3, latent_channels=2, block_out_channels=[8, 8])
    half = torch.nn.functional.avg_pool2d

    def encode(x):
        z = half(net(x), 2)
        return output(latents=z) if kind == "vq" else output(latent_dist=output(mean=z))

    net.encode = encode
    net.decode = lambda z: output(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3) / 9)
    auto = types.SimpleNamespace(from_pretrained=lambda name: net)
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoModel=auto))
    stage = autoencoder.FirstStage("somebody/something", "cpu")
    assert (stage.factor, stage.channels, stage.latent) == (2, 3, 2)
    x = images(20, 8)
    torch.testing.assert_close(stage.encode(x), half(net(x), 2))
    stage.measure(x)
    torch.testing.assert_close(stage.encode(x).std((0, 2, 3)), torch.ones(2))
    torch.testing.assert_close(stage.decode(stage.encode(x))[..., ::2, ::2], half(net(x), 2) / 9)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(data.Problem, match="pip install diffusers"):
        autoencoder.FirstStage("somebody/something", "cpu")


def test_bicubic_has_as_many_numbers(monkeypatch):
    """Three latents of 8x8 are an image of 8x8; four, of 9x9. Catches a rival with more numbers."""
    sizes = []
    real = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate",
                        lambda x, size, **more: sizes.append(size) or real(x, size, **more))
    for channels, side in ((3, 8), (4, 9)):
        assert autoencoder.bicubic(images(1), channels * 64).shape == (1, 3, 32, 32)
        assert sizes[-2:] == [(side, side), (32, 32)]


# ---------------------------------------------------------------------------------- DDM in latents

def test_ddm_trains_on_latents_and_draws_images(few, capsys):
    """Commands one after the other. Catches samples that are not decoded, latents that are trained
    on before they are scaled, and an autoencoder that has changed.
    """
    assert "there is no first stage" in call(latent, capsys, "--train", *SMALL, status=2)
    call(autoencoder, capsys, *FIRST, 1, "--latent", 4)
    flags = [*SMALL, "--mult", 1, 1, "--attention", "--iterations", 2, "--n", 5, "--steps", 3]
    call(latent, capsys, "--train", "--sample", *flags)
    saved = data.load_checkpoint("runs/latent-shapes/checkpoint.pt")["network"]
    assert (saved["channels"], saved["size"], saved["outputs"]) == (4, 4, (4, 4))
    assert saved["first_stage"]["mean"] != [0, 0, 0, 0]
    first = data.open_image("runs/latent-shapes/samples.png")
    call(latent, capsys, "--sample", "--n", 5, "--steps", 3, "--out", "pngs", *CPU)
    assert data.open_image("pngs/000004.png").size == (16, 16)
    call(latent, capsys, "--sample", "--n", 5, "--steps", 3, *CPU)
    assert data.open_image("runs/latent-shapes/samples.png") == first
    (few / "runs/autoencoder-shapes").rename("moved")
    call(latent, capsys, "--sample", "--steps", 3, "--autoencoder", "moved", *CPU)
    (few / "moved").rename("runs/autoencoder-shapes")
    call(autoencoder, capsys, *FIRST, 2, "--latent", 4)
    assert "not the autoencoder" in call(latent, capsys, "--sample", *CPU, status=1)


def test_ddm_sees_latents_of_images_and_of_mirror_images(few, capsys, monkeypatch):
    """Each x0 is the scaled code of a training image or its mirror image. Catches mirrored latents.
    """
    call(autoencoder, capsys, *FIRST, 1)
    seen = []

    def keep(model, x0, phi, eps, t, *more, real=ddm.loss):
        seen.append(x0)
        return real(model, x0, phi, eps, t, *more)

    monkeypatch.setattr(ddm, "loss", keep)
    call(latent, capsys, "--train", *SMALL, "--mult", 1, 1, "--attention", "--iterations", 6)
    facts = data.load_checkpoint("runs/latent-shapes/checkpoint.pt")["network"]["first_stage"]
    stage = autoencoder.FirstStage("runs/autoencoder-shapes", "cpu", facts)
    x = data.to_float(torch.from_numpy(data.shapes(50, 16)))
    codes = [stage.encode(x), stage.encode(x.flip(-1))]
    far = [(torch.cat(seen)[:, None] - z).abs().amax((2, 3, 4)).amin(1) for z in codes]
    assert torch.minimum(*far).max() < 0.01
    assert (far[0] > 0.01).any() and (far[1] > 0.01).any()


def test_resumed_in_latents_equals_uninterrupted(few, capsys):
    """Catches statistics that are measured anew, and latents that a seed draws."""
    call(autoencoder, capsys, *FIRST, 1)
    flags = ["--train", *SMALL, "--mult", 1, 1, "--attention", "--lr", 1e-9]
    call(latent, capsys, *flags, "--iterations", 4, "--run", "whole")
    call(latent, capsys, *flags, "--iterations", 2, "--run", "parts")
    call(latent, capsys, *flags, "--iterations", 4, "--run", "parts")
    a, b = [data.load_checkpoint(f"{name}/checkpoint.pt") for name in ("whole", "parts")]
    assert a["network"] == b["network"]
    assert all(torch.allclose(a["ema"][name], b["ema"][name], atol=1e-7) for name in a["ema"])


# ------------------------------------------------------------------------------- tasks in latents

@pytest.mark.parametrize("task, of", [
    ("super_resolution", "images"), ("inpainting", "images"), ("saliency", "masks"),
    ("edges", "images")])
def test_tasks_in_latents(task, of, few, capsys):
    """An autoencoder of masks, and of colours for edges. Catches an answer that is no image, one of
    another size, and known pixels that are decoded.
    """
    call(autoencoder, capsys, *FIRST, 1, "--of", of, "--run", "first")
    flags = ["--train", *SMALL, "--mult", 1, 1, "--attention", "--iterations", 1]
    name = ["--autoencoder", "first"]
    exact = ["--sigma-data", 1]
    call(tasks, capsys, task, *flags, *name, *exact, "--sample", "--n", 2, "--steps", 2)
    run = few / "runs" / f"{task}-shapes"
    network = data.load_checkpoint(run / "checkpoint.pt")["network"]
    assert network["size"] == 4 and network["channels"] == 3
    assert "(3 images)" in call(tasks, capsys, task, "--evaluate", "--n", 3, "--steps", 1, *CPU)
    Image.new("RGB", (35, 21), (9, 99, 199)).save("own.png")
    call(tasks, capsys, task, "--sample", "--steps", 1, "--input", "own.png", *CPU)
    scale = 4 if task == "super_resolution" else 1
    got = data.open_image(run / f"own-{task}.png")
    assert got.size == (35 * scale, 21 * scale)
    if task == "inpainting":
        assert (np.asarray(got) == (9, 99, 199)).all(2).mean() > 0.2


def test_answers_in_latents_decode_to_the_truth(few, capsys, monkeypatch):
    """A sampler that ends at the answer's own latents gives the autoencoder's image of it. Catches
    a residual that is taken for an image, and windows of latents pasted elsewhere.
    """
    call(autoencoder, capsys, *FIRST, 1, "--run", "first")
    stage = autoencoder.FirstStage("first", "cpu")
    x = images(2, 32)
    x0, condition = tasks.example("super_resolution", x)
    z = stage.encode(tasks.finish("super_resolution", x0, condition))
    got = tasks.finish("super_resolution", z, condition, stage)
    torch.testing.assert_close(got, stage.decode(stage.encode(x)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("h, w", [(21, 35), (5, 50), (16, 16), (70, 64)])
def test_walk_in_latents_answers_images_of_any_size(h, w, monkeypatch):
    """An exact network reads its latents off the condition, f times as large. Catches windows of
    one that are not those of the other.
    """
    def told(net, seen, run):
        def model(x, t):
            t = t[:, None, None, None]
            return -seen, (x - (1 - t) * seen) / t.sqrt()
        return model

    monkeypatch.setattr(tasks, "told", told)
    flags = {name: row[0] for name, row in (tasks.FLAGS | tasks.SAMPLING).items()}
    s = types.SimpleNamespace(**flags | dict(script="edges", image_size=16))
    network = dict(channels=1, first_stage=dict(factor=4))
    run = types.SimpleNamespace(settings=s, args=s, device=torch.device("cpu"), bf16=False,
                                checkpoint=dict(network=network))
    net = types.SimpleNamespace(call=None, encode=lambda part: part[..., ::4, ::4])
    condition = torch.randn(1, 1, h, w)
    for t, x, x0 in tasks.walk(run, net, condition, torch.Generator()):
        torch.testing.assert_close(x0, condition[..., ::4, ::4], rtol=0, atol=1e-5)
    assert t == 0 and x.shape[-2:] == (math.ceil(h / 4), math.ceil(w / 4))


@pytest.mark.parametrize("factor, levels", [
    (1, [2, 3, 3, 3]), (4, [0, 1, 2, 3]), (8, [0, 0, 1, 2])])
def test_swin_meets_the_levels_of_its_strides(factor, levels):
    """Strides 4 to 32 among f to 8 f. Catches a stage at a level of another size."""
    facts = dict(factor=factor)
    net = tasks.TaskUNet(3, 3, "swin_b", "concat", first_stage=facts, outputs=(3,), width=8,
                         mult=(1, 1, 1, 1), blocks=1, attention=(), dropout=0.0, size=8)
    assert net.encode.level == levels
    features = net.encode(torch.zeros(1, 3, 64, 64))
    assert [f.shape[-1] for f in features] == [64 // factor // 2 ** i for i in range(4)]


# ------------------------------------------------------------------------------------------- memory

def test_the_papers_presets_fit_one_gpu_in_latents(monkeypatch, capsys):
    """By the count of `bench --memory`: a sixteenth of the pixels takes a tenth of the memory.
    Catches a preset in pixels, attention where it costs most, and a network of another size.
    """
    in_latents = {"latent", *task_data.TARGETS}
    runs = [run for run in bench.paper_runs() if run[0].split()[0] in in_latents]
    monkeypatch.setattr(bench, "paper_runs", lambda: runs)
    bench.memory()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 5 and all(int(gpus) == 1 for *_, gpus in rows)
    pixels = [249.7, 246.9, 197.3, 185.4, 128.7]              # docs/latent.md
    for (*_, kept, _), before in zip(rows, pixels):
        assert before / 16 < float(kept) < before / 7


# -------------------------------------------------------------------- the papers' data as they come

DIV2K = "DIV2K_train_HR/0001.png DIV2K_train_LR_bicubic/X4/0001x4.png " \
        "DIV2K_valid_HR/0801.png DIV2K_valid_LR_bicubic/X4/0801x4.png"
DUTS = "DUTS-TR/DUTS-TR-Image/n1.jpg DUTS-TR/DUTS-TR-Mask/n1.png " \
       "DUTS-TE/DUTS-TE-Image/n2.jpg DUTS-TE/DUTS-TE-Mask/n2.png"
CELEBAHQ = "train_256/7.jpg val_source_256/8.jpg visual_test_source_256/9.jpg"
BSDS = "images/train/1.jpg images/val/2.jpg images/test/3.jpg " \
       "groundTruth/train/1.mat groundTruth/val/2.mat groundTruth/test/3.mat"


def tree(root, files):
    """These files below a folder: small images, or BSDS500's .mat files of two annotators."""
    from scipy.io import savemat
    for k, name in enumerate(files.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(k)
        if name.endswith(".mat"):
            people = np.empty((1, 2), object)
            for person in range(2):
                marks = np.zeros((24, 32), np.uint8)
                marks[5 + person, 3:9] = 1
                people[0, person] = dict(Segmentation=marks + 1, Boundaries=marks)
            savemat(root / name, dict(groundTruth=people))
        else:
            mode = "L" if "Mask" in name else "RGB"
            pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name)
    return root


def as_run(task, folder, **more):
    """What pairs and test files need of a run."""
    flags = tasks.FLAGS | tasks.SAMPLING
    s = {name: row[0] for name, row in flags.items()}
    s |= dict(script=task, dataset="folder", data_dir=str(folder), image_size=16, train=False,
              images="")
    s = types.SimpleNamespace(**s | more)
    return types.SimpleNamespace(settings=s, args=s, rank=0, device=torch.device("cpu"),
                                 cuda=False, directory=folder / "run", barrier=lambda: None)


@pytest.mark.parametrize("task, files, train, test", [
    ("super_resolution", DIV2K, ["DIV2K_train_HR/0001.png"], "0801: DIV2K_valid_HR/0801.png"),
    ("saliency", DUTS, ["DUTS-TR/DUTS-TR-Image/n1.jpg DUTS-TR/DUTS-TR-Mask/n1.png"],
     "DUTS-TE-Image-n2: DUTS-TE/DUTS-TE-Image/n2.jpg DUTS-TE/DUTS-TE-Mask/n2.png"),
    ("inpainting", CELEBAHQ, ["train_256/7.jpg"], "9: visual_test_source_256/9.jpg"),
    ("edges", BSDS, ["images/train/1.jpg groundTruth/train/1.mat",
                     "images/val/2.jpg groundTruth/val/2.mat"],
     "3: images/test/3.jpg groundTruth/test/3.mat")])
def test_datasets_as_they_come(task, files, train, test, few):
    """What is trained on and what is measured. Catches test images in training, a low resolution
    taken for the high one, and a truth of another image.
    """
    folder = tree(few / "d", files)
    pairs, _ = task_data.partners(folder, task)

    def named(pair):
        return " ".join(file.relative_to(folder).as_posix() for file in pair if file)

    assert [named(pair) for pair in pairs] == train
    assert [f"{name}: {named(pair)}" for name, *pair in
            task_data.test_files(as_run(task, folder), 9)] == [test]
    assert len(task_data.load_pairs(as_run(task, folder))) == len(train)


def test_berkeleys_annotators_are_read(few):
    """Two mark a row each. Catches one annotator for all, and the segments for the boundaries."""
    tree(few, "images/train/1.jpg groundTruth/train/1.mat")
    planes, marked = task_data.open_pair("images/train/1.jpg", "groundTruth/train/1.mat", "RGB")
    assert marked.shape == (2, 24, 32) and marked.sum() == 12
    assert marked[0, 5, 3:9].all() and marked[1, 6, 3:9].all()
    assert set(np.unique(planes[3])) == {0, 128} and (planes[3] == 128).sum() == 12
    (few / "bad.mat").write_bytes(b"nothing")
    with pytest.raises(data.Problem, match="bad.mat is not as BSDS500's"):
        task_data.open_pair("images/train/1.jpg", few / "bad.mat", "RGB")


def test_what_is_measured_was_not_trained_on(few, capsys):
    """Also not by the first stage; and where nobody can tell, nothing is measured. Catches figures
    of training images.
    """
    tree(few / "a", "1.png 2.png")
    tree(few / "b", "1.png 2.png x.png")                      # b/x.png alone is new
    folder = ["--dataset", "folder", "--data-dir"]
    call(autoencoder, capsys, *FIRST, 1, *folder, "a", "--run", "first")
    assert "first was trained on" in call(
        autoencoder, capsys, "--evaluate", "--run", "first", *CPU, "--data-dir", "b", status=2)
    tree(few / "c", "7.png 8.png 9.png")
    (few / "c/7.png").unlink()
    (few / "c/8.png").unlink()
    out = call(autoencoder, capsys, "--evaluate", "--run", "first", *CPU, "--data-dir", "c")
    assert "bicubic" in out and "(1 images)" in out
    train = ["super_resolution", "--train", *SMALL, "--mult", 1, 1, "--attention"]
    name = ["--autoencoder", "first", "--sigma-data", 1, "--iterations", 1]
    call(tasks, capsys, *train, *folder, "c", *name)
    ask = ["super_resolution", "--evaluate", "--steps", 1, *CPU, "--data-dir"]
    assert "first was trained on" in call(tasks, capsys, *ask, "a", status=2)
    for file in few.glob("runs/*/trained-on-*"):
        file.unlink()
    assert "nobody can tell" in call(tasks, capsys, *ask, "a", status=2)


@pytest.mark.parametrize("module, flags, words", [
    (autoencoder, "--train --sample", "an autoencoder draws nothing"),
    (autoencoder, "--train --image-size 18", "a multiple of 4"),
    (autoencoder, "--train --mult", "must begin with 1"),
    (autoencoder, "--train --dataset cifar10", "--dataset shapes or folder"),
    (autoencoder, "--train --evaluate --out pngs", "an autoencoder draws nothing"),
    (latent, "--train --clip --sample", "no --clip"),
    (latent, "--train --h sine --no-precondition", "no --h sine"),
    (latent, "--train --autoencoder runs/none", "there is no first stage in runs/none"),
    (latent, "--train --dataset lsun-church --preset paper", "there is no preset")])
def test_wrong_flags_are_sentences(module, flags, words, few, capsys):
    """Before anything is trained. Catches a traceback, and a flag that is silently ignored."""
    assert words in call(module, capsys, *flags.split(), *CPU, status=2)
    assert not list(few.glob("runs/*"))
