"""Claims of extras/tasks.py and extras/task_data.py: tasks, network, pairs, metrics, commands.

Each test makes its own small data. Its docstring says which bug it catches.
"""

import functools
import math
import pathlib
import signal
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import sparse

import data
import ddm
from extras import bench, task_data, tasks

CPU = ["--device", "cpu"]
TINY = "--width 8 --mult 1 2 --blocks 1 --attention --batch-size 4 --image-size 16".split() + CPU


def call(capsys, *flags, status=0):
    """tasks.main(flags) ends with this status: what it printed, on stderr if it failed."""
    code = 0
    try:
        tasks.main([str(flag) for flag in flags])
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


def pair_folder(root, n=3, targets="edges", images="images"):
    """A folder of images with targets, of different sizes; a target is its image's red channel."""
    for folder in (images, targets):
        (root / folder).mkdir(parents=True)
    for k in range(n):
        random = np.random.default_rng([k, *root.name.encode()])
        pixels = random.integers(0, 256, (30 + k, 44 - 2 * k, 3), np.uint8)
        Image.fromarray(pixels).save(root / images / f"a{k}.png")
        Image.fromarray(pixels[:, :, 0]).save(root / targets / f"a{k}.png")
    return root


def fake_run(task, folder=".", size=16, **more):
    """What pairs, test files and walks need of a run."""
    flags = tasks.FLAGS | tasks.SAMPLING
    s = {name: row[0] for name, row in flags.items()}
    s |= dict(script=task, dataset="folder", data_dir=str(folder), image_size=size, train=False,
              images="")
    s = types.SimpleNamespace(**s)
    return types.SimpleNamespace(settings=s, args=s, rank=0, device=torch.device("cpu"), bf16=False,
                                 cuda=False,
                                 directory=pathlib.Path("run"), barrier=lambda: None, **more)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(n, size, task="inpainting"):
    return task_data.shape_pairs(task, n, size)


# ---------------------------------------------------------------------------------------- the tasks

def test_low_resolution_is_pillows():
    """Catches torch's default kernel (a = -3/4), no antialiasing, and a shift by half a pixel."""
    image = shapes(1, 64) // 2 + 64             # nothing is clipped between Pillow's passes
    got = tasks.example("super_resolution", data.to_float(image))[1]
    pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    for size in (16, 64):
        pillow = pillow.resize((size, size), Image.BICUBIC)
    error = data.to_uint8(got)[0].permute(1, 2, 0).numpy() - np.asarray(pillow, int)
    assert np.abs(error).max() <= 2
    flat = torch.full((1, 1, 16, 16), 0.5001)            # 8 bits cannot hold this
    assert (tasks.example("super_resolution", flat)[1] - flat).abs().max() > 1e-3


def test_a_perfect_x0_finishes_as_the_truth():
    """Catches an answer that leaks into the condition, and known pixels that change."""
    image = data.to_float(shapes(4, 32))
    done = tasks.finish("super_resolution", *tasks.example("super_resolution", image))
    torch.testing.assert_close(done, image, rtol=0, atol=1e-6)
    hole = torch.rand(4, 1, 32, 32) < 0.3
    x0, condition = tasks.example("inpainting", image, hole=hole)
    assert torch.equal(x0, image) and not (condition[:, :3] * hole).any()
    painted = tasks.finish("inpainting", torch.full_like(image, 0.125), condition)
    assert torch.equal(painted, torch.where(hole, torch.tensor(0.125), image))


def test_holes_are_seeded_and_neither_nothing_nor_all():
    """Catches an empty mask, whose PSNR is 0/0, and one hole for an image of any size."""
    def draw(k, h=32, w=32):
        return task_data.draw_hole(h, w, 32, np.random.default_rng(k)).float()

    holes = torch.stack([draw(k) for k in range(300)])
    share = holes.mean((1, 2))
    assert share.min() > 0.005 and share.max() < 0.75
    assert torch.equal(holes[7], draw(7))
    boxes = [torch.equal(hole, hole.amax(0) * hole.amax(1)[:, None]) for hole in holes]
    assert 0.35 < np.mean(boxes) < 0.65
    large = torch.stack([draw(k, 96, 128) for k in range(20)])
    assert 0.5 < large.mean() / share.mean() < 1.5


def test_shapes_know_their_targets():
    """Catches a mask of another image, and an outline outside of the shape."""
    image, mask = shapes(20, 32, "saliency").int().split([3, 1], dim=1)
    ground = (image - torch.tensor([16, 20, 40])[:, None, None]).abs().sum(1, keepdim=True)
    assert torch.equal(mask == 0, ground == 0)
    assert (ground[mask == 255] > 100).all()
    outside = F.pad((mask < 128).float(), (1, 1, 1, 1))
    touched = F.conv2d(outside, torch.ones(1, 1, 3, 3)) > 0
    outline = shapes(20, 32, "edges")[:, 3:] == 255
    assert torch.equal(outline, (mask >= 128) & touched)


@pytest.mark.parametrize("steps, ratio", [(1, 1), (50, 2)])
def test_one_call_answers_with_the_mean_and_many_with_a_sample(steps, ratio):
    """A condition leaves N(m, s²) open. The squared error of its mean is s², of a sample 2 s².
    Catches a sampler that draws too narrow.
    """
    m, s = 0.3, 0.2

    def net(x, t):
        t = t[:, None, None, None]
        V = (1 - t) ** 2 * s ** 2 + t
        x0 = m + (1 - t) * s ** 2 / V * (x - (1 - t) * m)
        return -x0, (x - (1 - t) * x0) / t.sqrt()

    truth = m + s * randn(20_000, 1, 1, 1, seed=1)
    answer = ddm.sample(net, randn(20_000, 1, 1, 1), steps, "ode2", delta=1e-9)
    assert abs((answer - truth).square().mean() / s ** 2 - ratio) < 0.06


# -------------------------------------------------------------------------------------- the network

@functools.cache
def conditioned(encoder, fuse):
    """A small network told a grey image and a mask, whose zero layers are not zero."""
    torch.manual_seed(0)
    net = tasks.TaskUNet(2, 2, encoder, fuse, outputs=(2, 2), width=8, mult=(1, 2, 2, 3), blocks=1,
                         attention=(), dropout=0.0, size=16)
    for p in net.eval().requires_grad_(False).parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("encoder, fuse", [
    ("compact", "concat"), ("compact", "attention"), ("swin_b", "concat")])
def test_condition_is_used_at_every_level(encoder, fuse):
    """Catches a condition that is dropped, shuffled in the batch, or met at one level only."""
    net = conditioned(encoder, fuse)
    x = randn(3, 2, 32, 16)
    c = randn(3, 2, 32, 16, seed=1).requires_grad_(True)
    t = torch.tensor([0.1, 0.5, 0.9])
    out = torch.cat(net(x, t, c))
    gradient, = torch.autograd.grad(out[0].square().sum(), c)
    assert (gradient[0].abs().amax((1, 2)) > 0).all() and not gradient[1:].any()
    features = net.encode(c)
    assert [f.shape[-2:] for f in features] == [(32, 16), (16, 8), (8, 4), (4, 2)]
    assert torch.equal(torch.cat(net(x, t, features)), out)
    for i, f in enumerate(features):
        others = features[:i] + (f + randn(*f.shape, seed=7),) + features[i + 1:]
        assert (torch.cat(net(x, t, others)) - out).abs().max() > 1e-4


@pytest.mark.parametrize("fuse", ["concat", "attention"])
def test_a_network_of_one_level_is_told_too(fuse):
    """Catches features that are joined twice."""
    net = tasks.TaskUNet(1, 1, "compact", fuse, outputs=(1,), width=8, mult=(1,), blocks=1, size=8)
    out, = net(randn(2, 1, 8, 8), torch.rand(2), randn(2, 1, 8, 8))
    assert out.shape == (2, 1, 8, 8)


def test_swin_sees_the_image_as_imagenet_does(monkeypatch):
    """Catches pixels in [-1, 1], a mask taken for a colour, and a stage left out."""
    from torchvision.models import Swin_B_Weights
    net = conditioned("swin_b", "concat").encode
    seen = []
    net.swin[0].register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    image = torch.full((1, 1, 32, 32), 0.5)
    given = torch.cat([image, -image], dim=1)
    before = net(given)
    pixels = Image.new("RGB", (32, 32), (191, 191, 191))                # about .5 of [-1, 1]
    wanted = Swin_B_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)(pixels)
    torch.testing.assert_close(seen[0][0], wanted, rtol=0, atol=0.01)
    for layer, level in zip(net.maps, (2, 3, 3, 3)):
        layer.weight *= -1
        changed = [not torch.equal(a, b) for a, b in zip(before, net(given))]
        layer.weight *= -1
        assert changed == [i == level for i in range(4)]

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(data.Problem, match="--no-pretrained"), torch.device("meta"):
        tasks.SwinEncoder(3, [8, 8], pretrained=True)


@pytest.mark.parametrize("h, w, batches", [
    (21, 35, [6]), (5, 50, [4]), (1, 1, [1]), (16, 16, [1]), (203, 208, [256, 33])])
def test_walk_answers_images_of_any_size(h, w, batches, monkeypatch):
    """An exact network reads its answer off the condition. Catches window weights that do not sum
    to one, a window pasted elsewhere, an uncovered strip, a condition encoded at every call.
    """
    encoded = []

    def told(net, seen, run):
        encoded.append(len(seen))

        def model(x, t):
            t = t[:, None, None, None]
            return -seen, (x - (1 - t) * seen) / t.sqrt()
        return model

    monkeypatch.setattr(tasks, "told", told)
    run = fake_run("edges", checkpoint=dict(network=dict(channels=1)))
    net = types.SimpleNamespace(call=None, encode=lambda part: part)
    condition = randn(1, 1, h, w)
    for t, x, x0 in tasks.walk(run, net, condition, torch.Generator()):
        torch.testing.assert_close(x0, condition, rtol=0, atol=1e-5)
    assert t == 0 and x.shape == condition.shape
    assert encoded == batches


def test_windows_fade_towards_their_borders():
    """Two windows disagree. Catches plain averaging, whose steps are visible."""
    def model(x, t):
        return torch.arange(2.0)[:, None, None, None].expand(x.shape),

    x = torch.zeros(1, 1, 24, 42)
    out, = tasks.windowed(lambda part: model, x, 24)(x, torch.ones(1))
    line = out[0, 0, 12]
    assert not line[:18].any() and (line[24:] == 1).all()
    assert line.diff().min() >= 0 and line.diff().max() < 0.15


# -------------------------------------------------------------------------------------------- pairs

@pytest.mark.parametrize("task, targets, near", [
    ("edges", "edges", 0), ("saliency", "masks", 1.5 / 127.5)])
def test_pairs_stay_aligned(task, targets, near, few):
    """A target is its image's red channel. Catches an image mirrored or cut without its target."""
    folder = pair_folder(few / "d", targets=targets)
    pairs = task_data.load_pairs(fake_run(task, folder, size=28))
    x, target = batch(pairs, task, seed=5)
    assert x.shape == (64, 3, 28, 28)
    torch.testing.assert_close(target, x[:, :1], rtol=0, atol=near)
    assert torch.equal(batch(pairs, task, seed=5)[0], x)
    assert not torch.equal(batch(pairs, task, seed=6)[0], x)


def batch(pairs, task, seed):
    """64 images and targets of 28x28."""
    generator = torch.Generator().manual_seed(seed)
    return task_data.batch(pairs, task, 28, 64, generator)[:2]


def test_patches_reach_all_corners_both_ways_round():
    """Catches a last row or column that no patch has, and images that are never mirrored."""
    image = shapes(1, 31)[0] + torch.arange(31, dtype=torch.uint8)
    drawn = torch.cat([batch([image], "inpainting", seed)[0] for seed in range(9)])
    for corner in (image[:, :28, :28], image[:, -28:, -28:]):
        for way in (corner, corner.flip(2)):
            assert (drawn == data.to_float(way)).all((1, 2, 3)).any()


def test_photos_turned_by_their_camera(few):
    """Catches a cache whose rows are another image's columns, and a patch larger than its image."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (few / "d").mkdir()
    Image.fromarray(pixels).save("d/a.png", exif=exif)
    turned, = task_data.load_pairs(fake_run("inpainting", few / "d"))
    np.testing.assert_array_equal(turned.permute(1, 2, 0), np.rot90(pixels, -1))
    large, = task_data.load_pairs(fake_run("inpainting", few / "d", size=30))
    assert large.shape == (3, 60, 30)


def test_edge_bits_are_annotators(few):
    """Catches bits that are taken for a strength, and annotators who marked nothing."""
    pixels = np.diag(np.array([0b10001, 0b10000, 0b100, 0b11001000], np.uint8))
    Image.new("RGB", (4, 4)).save("a.jpg")
    Image.fromarray(pixels).save("a.png")
    planes, marked = task_data.open_pair("a.jpg", "a.png", "RGB", bits=True)
    assert len(marked) == 6 and marked.sum() == 2 + 1 + 1 + 3           # bits 0 2 3 4 6 7
    assert np.diag(planes[3]).tolist() == [85, 42, 42, 128]             # of 6: 2, 1, 1, 3
    planes, marked = task_data.open_pair("a.jpg", "a.png", "RGB")
    assert np.array_equal(planes[3], pixels)
    assert np.argwhere(marked).tolist() == [[0, 3, 3]]


@pytest.mark.parametrize("values, bits", [((0, 0), 0), ((255, 255), 0), ((0, 1), 0), ((1, 1), 1)])
def test_a_target_that_says_nothing_is_refused(values, bits, few):
    """One value only, or a mask of 0 and 1. Catches a network that is trained on nothing."""
    Image.new("RGB", (2, 1)).save("a.jpg")
    Image.fromarray(np.array([values], np.uint8)).save("a.png")
    with pytest.raises(data.Problem, match="a.png has values from"):
        task_data.open_pair("a.jpg", "a.png", "RGB", bits)


@pytest.mark.parametrize("task, folders, train, test", [
    ("edges", ["train", "test"], "train/images/a0.png train/edges/a0.png", "test"),
    ("super_resolution", ["DIV2K_train_HR", "DIV2K_train_LR_bicubic/X2", "DIV2K_valid_HR",
                          "DIV2K_valid_LR_bicubic/X2"],
     "DIV2K_train_HR/images/a0.png", "DIV2K_valid_HR"),
    ("saliency", ["DUTS-TR", "DUTS-TE"],
     "DUTS-TR/DUTS-TR-Image/a0.png DUTS-TR/DUTS-TR-Mask/a0.png", "DUTS-TE")])
def test_folders_are_paired_and_test_folders_left_out(task, folders, train, test, few):
    """BSDS, DIV2K and DUTS as they come. Catches training on test images, or on small ones."""
    for name in folders:
        kinds = [f"{name}-Mask", f"{name}-Image"] if task == "saliency" else []
        pair_folder(few / name, 1, *kinds)
    (pair,), _ = task_data.partners(few, task)
    assert [str(file.relative_to(few)) for file in pair if file] == train.split()
    (_, image, _), = task_data.test_files(fake_run(task, few), 9)
    assert few / test in image.parents


def test_bad_pairs_are_sentences(few):
    """Catches pairs that are made by their order, and a task without its targets."""
    pair_folder(few / "d", n=1)
    with pytest.raises(data.Problem, match="beside one named masks|in a folder of masks"):
        task_data.partners(few / "d", "saliency")
    Image.new("L", (9, 9)).save("d/edges/a0.png")
    with pytest.raises(data.Problem, match="a0.png has not the size of its image"):
        task_data.open_pair("d/images/a0.png", "d/edges/a0.png")
    (few / "d/edges/a0.png").unlink()
    with pytest.raises(data.Problem, match="a0.png has no partner in a folder of edges"):
        task_data.partners(few / "d", "edges")


# ------------------------------------------------------------------------------------------ metrics

def test_psnr_and_luma_by_hand():
    """Catches an error that wraps in uint8, and Y in [0, 255]."""
    a = np.zeros((3, 4, 4), np.uint8)
    assert math.isclose(task_data.psnr(a, a + np.uint8(16)), 24.0484, abs_tol=1e-3)
    assert task_data.psnr(a, a) == 100
    colours = 255 * np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    y = task_data.luma(colours[:, :, None, None]).ravel()
    np.testing.assert_allclose(y, [16, 235, 81.481, 144.553, 40.966], atol=1e-3)
    assert math.isclose(task_data.luma(np.full((1, 1, 1), 255)).item(), 235)


def test_scores_by_hand():
    """Catches a metric of the whole image, with super-resolution's border or the known pixels."""
    truth = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    got = truth.clone()
    got[..., :4, :] = 250
    got[..., 4, 4] += 10
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 4, 4] = True
    q = types.SimpleNamespace(truth=truth, hole=hole)
    ten = 20 * math.log10(255 / 10)                                     # dB of an error of 10
    on_y, on_rgb = tasks.score("super_resolution", data.to_float(got), q)
    assert math.isclose(on_rgb, ten + 10 * math.log10(64))
    assert math.isclose(on_y, on_rgb - 20 * math.log10(219 / 255))
    assert math.isclose(*tasks.score("inpainting", data.to_float(got), q), ten)
    assert math.isclose(*tasks.score("saliency", data.to_float(truth + 51), q), 0.2)


def test_edge_counts_by_hand():
    """A line of 20 pixels; ten found three rows off at .8, five far away at .3. Catches precision
    and recall changed about, a mark that two share, and a distance of 0, lost as a sparse zero.
    """
    marks = np.zeros((2, 40, 40), bool)
    marks[:, 20, 10:30] = True
    p = np.zeros((40, 40))
    p[23, 10:20] = 0.8
    p[2, 5:10] = 0.3
    reach = 3.5 / math.hypot(40, 40)

    def counts():
        return task_data.edge_counts(p, marks, np.array([0.2, 0.5, 0.9]), reach).tolist()

    assert counts() == [[15, 10, 40, 20], [10, 10, 40, 20], [0, 0, 40, 0]]
    marks[1] = False
    marks[1, 3, 6:9] = True                              # three, within reach of all five
    assert counts()[0] == [15, 13, 23, 13]
    reach = 0.5 / math.hypot(40, 40)
    p[20, 10:20] = 0.8                                   # ten at distance 0
    assert counts()[1] == [20, 10, 23, 10]


@pytest.mark.parametrize("columns", [20, 40])
def test_edge_matching_is_the_largest_and_then_the_nearest(columns):
    """Against Kuhn's augmenting paths. Catches a greedy matching: its ODS is .03 to .05 too low."""
    for k in range(6):
        near = sparse.random(30, columns, 0.06, random_state=k).tocsr()
        owner = {}

        def augment(row, seen):
            for column in set(near[[row]].indices) - seen:
                seen.add(column)
                if column not in owner or augment(owner[column], seen):
                    owner[column] = row
                    return True
            return False

        most = sum(augment(row, set()) for row in range(30))
        rows = task_data.most_pairs(near, far=100)
        assert len(rows) == len(set(rows)) == most
    three = sparse.csr_matrix([[2.0], [1.0], [3.0]])
    assert task_data.most_pairs(three, far=100).tolist() == [1]


def test_ods_takes_one_threshold_for_all_and_ois_each_images_own():
    """Catches the mean of F in place of F of the sums."""
    first = [[10, 10, 10, 10], [0, 0, 10, 0]]
    second = [[90, 10, 10, 10], [10, 10, 10, 10]]
    ods, ois = task_data.ods_ois(np.array([first, second]))
    assert math.isclose(ods, 2 / 3) and ois == 1


def test_thinning_keeps_crests():
    """Catches the direction along a ridge taken for the one across, and a band that stays wide."""
    y, x = np.mgrid[:48, :48] - 23.5
    for angle in np.linspace(0, np.pi, 13):
        off = np.abs(x * np.cos(angle) + y * np.sin(angle))
        kept = task_data.thin(0.9 * np.exp(-off ** 2 / 8)) > 0
        kept &= (np.hypot(x, y) < 18) & (off < 8)
        assert off[kept].max() <= 1.1 and kept.sum() >= 24      # of 36, or of 25 at 45 degrees
    band = np.zeros((32, 32))
    band[12:21] = 1
    kept = np.argwhere(task_data.thin(band)[:, 8:-8])
    assert np.unique(kept[:, 0]).tolist() == [16] and len(kept) == 16


# ----------------------------------------------------------------------------------------- commands

@pytest.mark.parametrize("task, floor, outputs, told", [
    ("super_resolution", "bicubic", (3, 3), 3), ("inpainting", "mean fill", (3, 3), 4),
    ("saliency", "empty mask", (1, 1), 3), ("edges", "gradient", (1, 1), 3)])
def test_train_sample_and_evaluate(task, floor, outputs, told, few, capsys):
    """Catches a task that only some commands know, and files in another place."""
    call(capsys, task, "--train", "--sample", *TINY, "--iterations", 2, "--n", 3, "--steps", 2)
    run = few / "runs" / f"{task}-shapes"
    network = data.load_checkpoint(run / "checkpoint.pt")["network"]
    assert network["outputs"] == outputs and network["condition"] == told
    out = call(capsys, task, "--evaluate", "--n", 3, "--steps", 1, "--ensemble", 2, *CPU)
    assert floor in out and "(3 images)" in out
    for name in ("samples.png", "trajectory.png", "evaluation.png"):
        assert (run / name).exists()
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3), np.uint8)
    Image.fromarray(pixels).save("own.png")
    call(capsys, task, "--sample", "--steps", 1, "--input", "own.png", *CPU)
    scale = 4 if task == "super_resolution" else 1
    assert data.open_image(run / f"own-{task}.png").size == (35 * scale, 21 * scale)


def test_a_mask_says_what_is_missing(few, capsys):
    """Catches a mask the other way round, and known pixels that change."""
    call(capsys, "inpainting", "--train", *TINY, "--iterations", 1)
    missing = np.eye(21, 35, dtype=bool)
    Image.new("RGB", (35, 21), (9, 99, 199)).save("own.png")
    Image.fromarray(missing).save("m.png")
    call(capsys, "inpainting", "--sample", "--input", "own.png", "--mask", "m.png", *CPU)
    got = np.asarray(data.open_image("runs/inpainting-shapes/own-inpainting.png"))
    changed = (got != (9, 99, 199)).any(2)
    assert changed.any() and not changed[~missing].any()


@pytest.mark.parametrize("fuse", ["concat", "attention"])
def test_resumed_equals_uninterrupted(fuse, few, capsys, monkeypatch):
    """Catches patches, holes or noise that are not functions of the step."""
    real = data.average

    def interrupted(ema, net, decay, step):
        real(ema, net, decay, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    flags = ["inpainting", "--train", *TINY, "--fuse", fuse, "--iterations", 6, "--run"]
    call(capsys, *flags, "whole")
    monkeypatch.setattr(data, "average", interrupted)
    call(capsys, *flags, "parts", status=143)
    monkeypatch.setattr(data, "average", real)
    call(capsys, *flags, "parts")
    a = data.load_checkpoint("whole/checkpoint.pt")["ema"]
    b = data.load_checkpoint("parts/checkpoint.pt")["ema"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_tells_each_example_its_own_condition(few, capsys, monkeypatch):
    """x0 and condition make up an image, or its mirror image. Catches conditions that are shuffled,
    and a regression that sees noise.
    """
    known = shapes(50, 16).float()
    known = torch.cat([known, known.flip(-1)])
    told = []
    drawn = []

    def keep_told(net, condition, run, real=tasks.told):
        told.append(condition)
        return real(net, condition, run)

    def keep(model, x0, phi, eps, t, *more, real=ddm.loss):
        whole = data.to_uint8(tasks.finish("super_resolution", x0, told[-1])).float()
        distance = (whole[:, None] - known).abs().amax((2, 3, 4)).amin(1)
        drawn.append((distance.max(), t, eps))
        return real(model, x0, phi, eps, t, *more)

    monkeypatch.setattr(tasks, "told", keep_told)
    monkeypatch.setattr(ddm, "loss", keep)
    flags = ["super_resolution", "--train", *TINY, "--iterations", 2]
    call(capsys, *flags)
    assert len(drawn) == 2 and all(far <= 1 and (t < 1).all() for far, t, _ in drawn)
    call(capsys, *flags, "--regression", "--run", "guess")
    assert all((t == 1).all() and not eps.any() for _, t, eps in drawn[2:])


@pytest.mark.parametrize("task, fuse", [
    ("super_resolution", "concat"), ("inpainting", "attention"), ("saliency", "attention"),
    ("edges", "concat")])
def test_gpu_is_given_no_tensor_of_the_cpu_and_asked_for_no_value(task, fuse, few, monkeypatch):
    """Training but for its gradient, and answers, on fake tensors. Catches .item(), and what is
    drawn or made elsewhere.
    """
    argv = ["--train", *TINY, "--steps", "2", "--fuse", fuse]
    run = data.open_run(task, "", tasks.FLAGS, tasks.SAMPLING, tasks.presets(task), argv)
    network = tasks.network(run.settings, 3)
    run.checkpoint = dict(network=network)
    run.stage = None
    gpu = torch.device("cuda:0")
    image = np.zeros((4, 21, 35), np.uint8)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    with bench.fake_gpu(run) as nets:
        tasks.train(run)
        net = types.SimpleNamespace(call=run.ready(nets[1]), encode=nets[1].encode)
        q = tasks.question(run, (0, 0), "image", image[:network["condition"]], None)
        for solver in ddm.SOLVERS:
            run.args.solver = solver
            for _, x, x0 in tasks.walk(run, net, q.condition, torch.Generator()):
                answer = tasks.finish(task, x0, q.condition)
                assert x.device == answer.device == gpu
        assert tasks.baseline(task, q)[1].device == gpu


def test_answers_are_functions_of_seed_image_and_member(few, capsys, monkeypatch):
    """Catches an ensemble of one noise, and noise that depends on the images before."""
    call(capsys, "saliency", "--train", *TINY, "--iterations", 1)
    noises = []
    answers = []

    def walk(run, net, condition, g):
        noises.append(torch.rand(condition[:, :1].shape, generator=g))
        yield 0.0, noises[-1], noises[-1]

    def drawn(*flags):
        noises.clear()
        answers.clear()
        call(capsys, "saliency", "--evaluate", *CPU, *flags)
        return list(noises)

    monkeypatch.setattr(tasks, "walk", walk)
    monkeypatch.setattr(tasks, "score", lambda task, picture, q: answers.append(picture) or [0.0])
    one = drawn("--n", 3)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(drawn("--n", 1, "--seed", 0)[0], one[0])
    assert not torch.equal(drawn("--n", 1, "--seed", 4)[0], one[0])
    many = drawn("--n", 2, "--ensemble", 3)
    assert torch.equal(many[0], one[0]) and torch.equal(many[3], one[1])
    assert len({float(noise.sum()) for noise in many}) == 6
    torch.testing.assert_close(answers[0], sum(many[:3]) / 3)


def test_a_regression_answers_without_noise_in_one_call(few, capsys, monkeypatch):
    """Catches a baseline that sees noise."""
    call(capsys, "saliency", "--train", "--regression", *TINY, "--iterations", 1)
    walk = ddm.walk
    monkeypatch.setattr(ddm, "walk", lambda net, x1, steps, **more:
                        [] if x1.any() or steps != 1 else walk(net, x1, steps, **more))
    assert "(2 images)" in call(capsys, "saliency", "--evaluate", "--n", 2, *CPU)


def test_a_folder_is_cached_trained_on_and_evaluated(few, capsys, monkeypatch):
    """Catches a test image in training, a cache that is not used, and answers of another size."""
    pair_folder(few / "photos/train")
    pair_folder(few / "photos/test", n=2)
    train = ["edges", "--train", "--dataset", "folder", "--data-dir", "photos", *TINY]
    assert "3 images below" in call(capsys, *train, "--iterations", 1)
    with monkeypatch.context() as cached:
        cached.setattr(task_data, "open_pair", None)
        call(capsys, *train, "--iterations", 2)
    ask = ["edges", "--evaluate", "--steps", 1, *CPU, "--out", "pngs"]
    assert "(2 images)" in call(capsys, *ask)
    sizes = {file.name: data.open_image(file).size for file in (few / "pngs").glob("*.png")}
    assert sizes == {"images-a0.png": (44, 30), "images-a1.png": (42, 31)}
    assert "PNGs of another sampling" in call(capsys, *ask, "--seed", 1, status=1)


def test_images_that_were_trained_on_are_refused(few, capsys):
    """Also copies of them. Catches figures that are measured on training images."""
    pair_folder(few / "photos", n=2)
    pair_folder(few / "new", n=1)
    train = ["inpainting", "--train", "--dataset", "folder", "--data-dir", "photos", *TINY]
    call(capsys, *train, "--iterations", 1)
    ask = ["inpainting", "--evaluate", "--steps", 1, *CPU]
    assert "(1 images)" in call(capsys, *ask, "--data-dir", "new")
    assert "was trained on photos" in call(capsys, *ask, status=2)
    (few / "new/copy.png").write_bytes((few / "photos/images/a1.png").read_bytes())
    assert "was trained on new/copy.png" in call(capsys, *ask, "--data-dir", "new", status=2)
    assert "has no folder named test" in call(capsys, *train, "--evaluate", status=2)


@pytest.mark.parametrize("task, targets, size", [
    ("super_resolution", "edges", (44, 28)), ("saliency", "masks", (44, 30))])
def test_scores_so_far_are_printed_if_a_later_image_is_bad(task, targets, size, few, capsys):
    """Catches hours lost, and a truth of another size than the answer, of odd sizes here."""
    train = [task, "--train", "--dataset", "folder", *TINY, "--iterations", 1, "--data-dir"]
    call(capsys, *train, pair_folder(few / "d", n=1, targets=targets))
    pair_folder(few / "e", n=2, targets=targets)
    (few / "e/images/a1.png").write_bytes(b"no image")
    ask = ["--evaluate", "--data-dir", "e", "--steps", "1", "--out", "pngs"]
    with pytest.raises(SystemExit):
        tasks.main([task, *ask, *CPU])
    printed = capsys.readouterr()
    assert "(1 images)" in printed.out and "a1.png" in printed.err
    assert data.open_image(few / "pngs/images-a0.png").size == size


@pytest.mark.parametrize("task, row", [
    ("inpainting", (256, 48, 4e-5, 400_000, 96, (1, 2, 4, 8))),
    ("super_resolution", (512, 12, 5e-5, 200_000, 128, (1, 2, 4, 4))),
    ("saliency", (384, 16, 5e-5, 200_000, 128, (1, 2, 4, 4))),
    ("edges", (320, 16, 5e-5, 200_000, 128, (1, 2, 4, 4)))])
def test_preset_is_table_i(task, row, few):
    """Catches a task with another's numbers."""
    flags = "--train --dataset folder --data-dir d --preset paper --device cpu".split()
    run = data.open_run(task, "", tasks.FLAGS, tasks.SAMPLING, tasks.presets(task), flags)
    s = run.settings
    assert (s.image_size, s.batch_size, s.lr, s.iterations, s.width, s.mult) == row
    assert (s.encoder, s.blocks, s.delta, s.precondition) == ("swin_b", 2, 1e-4, False)


@pytest.mark.parametrize("flags, words", [
    ("nothing --train", "say super_resolution, inpainting, saliency, edges first"),
    ("edges --train --dataset cifar10", "a task is for --dataset shapes or folder"),
    ("edges --train --h sine --no-precondition", "not for --h sine"),
    ("super_resolution --train --mult 1 --image-size 18", "an --image-size that 4 divides"),
    ("super_resolution --train --sample --clip", "no --clip"),
    ("edges --train --regression --no-precondition", "--regression goes with"),
    ("edges --train --fuse sum", "invalid choice"),
    ("inpainting --train --evaluate --input a.png", "--input goes with --sample alone"),
    ("inpainting --train --sample --mask m.png", "--mask with inpainting's --input"),
    ("edges --train --data-dir photos", "--dataset folder"),
    ("inpainting --train --evaluate --sample --out a", "not for both"),
    ("edges --train --evaluate", "pip install scipy")])
def test_wrong_flags_are_sentences(flags, words, few, capsys, monkeypatch):
    """Before anything is trained. Catches a flag that is silently ignored."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert words in call(capsys, *flags.split(), *CPU, status=2)
    assert not list(few.glob("runs/*"))


def test_wrong_files_are_sentences(few, capsys):
    """Catches tracebacks, and a mask that is stretched to its image."""
    call(capsys, "inpainting", "--train", *TINY, "--iterations", 1)
    Image.new("RGB", (20, 20)).save("a.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("L", (9, 9), 255).save("m.png")
    ask = ["inpainting", "--sample", *CPU, "--input"]
    assert "none.png" in call(capsys, *ask, "none.png", status=1)
    other = ["inpainting", "--sample", *CPU, "--autoencoder", "other"]
    assert "is of pixels" in call(capsys, *other, status=2)
    assert "dot is 1x1: a task needs 12" in call(capsys, *ask, "dot.png", status=1)
    for mask in ("m.png", "a.png"):
        assert f"{mask} must be 20x20" in call(capsys, *ask, "a.png", "--mask", mask, status=2)
