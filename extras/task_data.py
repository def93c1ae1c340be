"""What `extras.tasks` reads and measures: images with their targets, test images, metrics."""

import contextlib
import hashlib
import math
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data

# Each task, and the word in the names of its targets' folders: "" if it needs none.
TARGETS = dict(super_resolution="", inpainting="", saliency="mask", edges="edge")
# Folders not to train on, and those of them to measure on: DUTS-TE, DIV2K_valid_HR, and CelebA-HQ's
# visual_test_256, as LaMa's script has split it.
HELD_OUT = r"test|.*-te|.*_valid_.*|.*_lr_.*|(val|visual_test)(_source)?_256"
TEST = r"test|.*-te|.*_valid_hr|visual_test(_source)?_256"

# -------------------------------------------------------------------------------------------- pairs

def batch(pairs, task, size, count, generator):
    """Patches of training pairs, uint8 tensors [C + targets, h, w], half of them mirrored.

    -> (images [B, C, S, S], targets [B, 0 or 1, S, S], both in [-1, 1]; for inpainting holes, bool
    [B, 1, S, S], or None), a function of the generator's seed alone.
    """
    random = np.random.default_rng(generator.initial_seed())
    patches = []
    for i in random.integers(len(pairs), size=count):
        h, w = pairs[i].shape[1:]
        top = random.integers(h - size + 1)
        left = random.integers(w - size + 1)
        patch = pairs[i][:, top:top + size, left:left + size]
        patches.append(patch.flip(-1) if random.random() < 0.5 else patch)
    x = data.to_float(torch.stack(patches).to(generator.device))
    channels = x.shape[1] - bool(TARGETS[task])
    hole = None
    if task == "inpainting":
        holes = [draw_hole(size, size, size, random) for _ in range(count)]
        hole = torch.stack(holes)[:, None].to(x.device)
    return x[:, :channels], x[:, channels:], hole


def draw_hole(height, width, unit, random):
    """What is missing, bool [height, width]: boxes and strokes, one for each unit² pixels."""
    image = Image.new("1", (width, height))
    canvas = ImageDraw.Draw(image)
    for _ in range(max(1, round(height * width / unit ** 2))):
        x = random.uniform(0, width)
        y = random.uniform(0, height)
        if random.random() < 0.5:
            w, h = random.uniform(0.1, 0.25, 2) * unit               # half of the box's sides
            x = np.clip(x, w, max(w, width - w))
            y = np.clip(y, h, max(h, height - h))
            canvas.rectangle([x - w, y - h, x + w, y + h], fill=1)
            continue
        thick = random.uniform(0.06, 0.15) * unit
        angle = random.uniform(0, 2 * math.pi)
        for _ in range(random.integers(3, 8)):
            angle += random.uniform(-1, 1)
            step = random.uniform(0.1, 0.3) * unit
            start = x, y
            x = np.clip(x + step * math.cos(angle), 0, width)
            y = np.clip(y + step * math.sin(angle), 0, height)
            canvas.line([start, (x, y)], fill=1, width=max(1, round(thick)))
            canvas.circle((x, y), thick / 2, fill=1)
    return torch.from_numpy(np.array(image))


def shape_pairs(task, n, size, seed=0):
    """Embedded shapes with their masks, or one-pixel outlines: uint8 [n, 3 or 4, size, size]."""
    images = torch.from_numpy(data.shapes(n, size, seed))
    if not TARGETS[task]:
        return images
    white = data.shapes(n, size, seed, ground=(0, 0, 0), colours=[(255, 255, 255)] * 4)
    target = torch.from_numpy(white[:, :1])
    if task == "edges":
        inside = (target >= 128).float()
        deep = -F.max_pool2d(-inside, 3, stride=1, padding=1)        # all neighbours are inside too
        target = (255 * (inside - deep)).to(torch.uint8)
    return torch.cat([images, target], dim=1)


def load_pairs(run):
    """A run's training pairs. A folder's are decoded once, into data/TASK-SIZE-KEY.npy."""
    s = run.settings
    if s.dataset == "shapes":
        return list(shape_pairs(s.script, 5000, s.image_size).to(run.device))
    files, key = partners(pathlib.Path(s.data_dir), s.script)
    images = [image for image, _ in files]
    mode = "L" if all(map(data.is_grey, images)) else "RGB"
    planes = len(mode) + bool(TARGETS[s.script])
    sizes = [fitted(image, s) for image in images]
    lengths = [planes * h * w for h, w in sizes]
    bits = "-bits" if s.edge_bits else ""
    path = pathlib.Path(f"data/{s.script}{bits}-{s.image_size}-{key}.npy")

    def read(i):
        return open_pair(*files[i], mode, s.edge_bits, sizes[i])[0]

    if run.rank == 0:
        data.say(f"{len(files)} images below {s.data_dir}, without those in test folders")
        if not path.exists():
            data.convert(path, range(len(files)), read, shape=(sum(lengths),))
        with data.replacing(run.directory / f"trained-on-{key}.txt") as file:
            file.write("\n".join(map(digest, images)).encode())
    run.barrier()
    flat = data.mapped(run, path).split(lengths)
    return [pixels.view(planes, *size) for pixels, size in zip(flat, sizes)]


def digest(file):
    """A name for a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def partners(folder, task, test=False):
    """([(image, its target or None)] of the images below a folder; a key of the folder's state).

    Where the task has targets, images lie in a folder named images, or ending so, and the target of
    images/x.jpg is masks/x.* or edges/x.* (of DUTS-TR-Image/x.jpg, DUTS-TR-Mask/x.*; of BSDS500's
    images/train/x.jpg, groundTruth/train/x.mat). Folders named as HELD_OUT are left out, unless
    `test` is true. Raises Problem.
    """
    files, key = data.image_files(folder)
    word = TARGETS[task]
    left_out = "(.*[-_])?(mask|edge)s?" + ("" if test else "|" + HELD_OUT)
    berkeley = word == "edge" and (folder / "groundTruth").is_dir()
    more = folder.glob("groundTruth/*/*.mat") if berkeley else []
    known = {file.with_suffix("").as_posix().lower(): file for file in [*files, *more]}
    found = []
    for file in files:
        above = file.relative_to(folder).parts[:-1]
        if any(re.fullmatch(left_out, part, re.I) for part in above):
            continue
        name = file.with_suffix("").as_posix().lower()
        partner = re.sub("image(s?/[^/]*)$", rf"{word}\1", name)
        if berkeley:
            partner = re.sub("images(/[^/]*/[^/]*)$", r"groundtruth\1", name)
        if word and partner != name and partner not in known:
            raise data.Problem(f"{file} has no partner in a folder of {word}s beside its own: "
                               f"--data-dir is the folder that holds both")
        if not word or partner != name:
            found.append((file, known[partner] if word else None))
    if not found:
        where = f" in a folder named images, beside one named {word}s" if word else ""
        raise data.Problem(f"{folder} has no images{where}: test folders are left out", 2)
    return found, key


def fitted(file, s):
    """(h, w) to train an image file at: its own, or more for a patch; for saliency a square."""
    w = h = s.image_size
    with contextlib.suppress(Exception), Image.open(file) as image:  # `open_pair` says what is bad
        w, h = image.size
        turned = image.getexif().get(0x0112, 1) >= 5                 # a camera, by a quarter
        if turned and image.format != "TIFF":                        # Pillow turns TIFF itself
            w, h = h, w
    if s.script == "saliency":
        return s.image_size, s.image_size
    more = max(1, s.image_size / min(h, w))
    return round(h * more), round(w * more)


def open_pair(image, target=None, mode=None, bits=False, size=None):
    """(an image and its target, uint8 [C + 0 or 1, h, w]; what annotators marked, bool [A, h, w]).

    bits: bit k of a target is what annotator k marked, and the target becomes their mean, as of a
    .mat file. Without, one annotator marked what is 128 or more. size: (h, w), if not the image's.
    Raises Problem.
    """
    planes = [data.open_image(image, mode)]
    marked = None
    w, h = planes[0].size
    if target:
        berkeley = pathlib.Path(target).suffix == ".mat"
        bits = bits or berkeley
        each = annotators(target) if berkeley else []
        planes.append(Image.fromarray(255 * each.max(0)) if berkeley
                      else data.open_image(target, "L"))
        pixels = np.asarray(planes[1])
        low = pixels.min()
        high = pixels.max()
        if pixels.shape != (h, w):
            raise data.Problem(f"{target} has not the size of its image, {image}")
        if low == high or high < 128 and not bits:
            raise data.Problem(f"{target} has values from {low} to {high} only: a target is black "
                               f"(0) and white (255), or with --edge-bits a bit an annotator")
        if not berkeley:
            each = [pixels >> k & 1 for k in range(8)] if bits else [pixels >= 128]
        marked = np.stack([marks > 0 for marks in each if marks.any()])
        if bits:
            planes[1] = Image.fromarray((255 * marked.mean(0)).round().astype(np.uint8))
    h, w = size or (h, w)
    arrays = [np.asarray(plane.resize((w, h), Image.BICUBIC)) for plane in planes]
    pixels = np.concatenate([array.reshape(h, w, -1) for array in arrays], axis=2)
    return pixels.transpose(2, 0, 1), marked


def annotators(file):
    """What each annotator of BSDS500's .mat file marked, 0 or 1, uint8 [A, h, w]. Needs scipy."""
    try:
        from scipy.io import loadmat
        people = loadmat(file)["groundTruth"][0]
        return np.stack([person["Boundaries"][0, 0] > 0 for person in people]).astype(np.uint8)
    except ImportError as error:
        raise data.Problem(f"{file} is read with scipy: pip install scipy") from error
    except Exception as error:                                # scipy raises many kinds
        raise data.Problem(f"{file} is not as BSDS500's .mat files ({error})") from error


def in_test(file, folder):
    """The parts of a file's path below its test folder in `folder`, or () if it is in none."""
    parts = file.relative_to(folder).with_suffix("").parts
    tests = [k for k, part in enumerate(parts[:-1]) if re.fullmatch(TEST, part, re.I)]
    return parts[tests[0] + 1:] if tests else ()


def test_files(run, n):
    """[(name, image, target or None)]: n test images, evenly spread. Raises Problem.

    They are those in folders named as TEST in --data-dir. Without such a folder they are those of
    --data-dir, if neither the run nor its first stage was trained on them.
    """
    folder = pathlib.Path(run.settings.data_dir)
    pairs, _ = partners(folder, run.settings.script, test=True)
    files = [pair for pair in pairs if in_test(pair[0], folder)] or pairs
    if run.args.train and not in_test(files[0][0], folder):
        raise data.Problem(f"{folder} has no folder named test: make one; or train first, and then "
                           f"evaluate with the --data-dir of other images", 2)
    n = min(n, len(files))
    files = [files[k * len(files) // n] for k in range(n)]
    lists = [*run.directory.glob("trained-on-*.txt")]
    if run.args.evaluate and not run.args.train and not lists:
        raise data.Problem(f"{run.directory} has no trained-on-*.txt, so nobody can tell whether "
                           f"it was trained on {folder}: train a run on other images", 2)
    stage = vars(run.settings).get("autoencoder")
    lists += pathlib.Path(stage).glob("trained-on-*.txt") if stage else []
    trained = {line for path in lists for line in path.read_text().split()}
    for image, _ in files:
        if digest(image) in trained:
            raise data.Problem(f"{run.directory}{f' or {stage}' if stage else ''} was trained on "
                               f"{image}: put other images in a "
                               f"folder named test, or name their folder with --data-dir", 2)
    names = ["-".join(in_test(image, folder) or image.relative_to(folder).with_suffix("").parts)
             for image, _ in files]
    if len(set(names)) < n:
        raise data.Problem(f"two answers to images in {folder} would have one name: rename one", 2)
    return [(name, *pair) for name, pair in zip(names, files)]


# ------------------------------------------------------------------------------------------ metrics

def psnr(a, b):
    """Peak signal to noise ratio of arrays in [0, 255], in dB; 100 at most, for the mean's sake."""
    error = np.mean((a.astype(float) - b) ** 2)
    return min(100.0, 10 * math.log10(255 ** 2 / max(error, 1e-12)))


def luma(rgb):
    """Y of images [..., 3 or 1, H, W] in [0, 255]: BT.601's, from 16 to 235."""
    weights = np.array([65.481, 128.553, 24.966])[:, None, None] / 255
    return 16 + (rgb * weights).sum(-3, keepdims=True)


def thin(p):
    """Edge strengths p [H, W] in [0, 1], with 0 off the ridges' crests. Needs scipy.

    Across a ridge is the direction in which a smoothed p is curved most. A pixel stays unless p is
    larger one pixel away in this direction. A little of the smoothed p decides between equals.
    """
    from scipy import ndimage
    smooth = p
    for _ in range(2):                                               # two boxes make a triangle
        smooth = ndimage.uniform_filter(smooth, 5, mode="nearest")
    dy, dx = np.gradient(smooth)
    dyy, dyx = np.gradient(dy)
    dxx = np.gradient(dx, axis=1)
    angle = 0.5 * np.arctan2(2 * dyx, dxx - dyy)                     # the larger eigenvalue's,
    angle = angle + math.pi / 2 * (dxx + dyy < 0)                    # or the one's larger in size
    across = np.stack([np.sin(angle), np.cos(angle)])
    height = p + 0.01 * smooth
    keep = np.ones(p.shape, bool)
    for side in (-1, 1):
        place = np.indices(p.shape) + side * across
        keep &= height >= ndimage.map_coordinates(height, place, order=1, mode="nearest")
    return p * keep


def edge_counts(p, annotators, thresholds, tolerance=0.0075):
    """Edge pixels found, of them right; marked pixels, of them found: [T, 4]. Needs scipy.

    p: thinned strengths [H, W]. annotators: bool [A, H, W]. With each annotator, found and marked
    pixels are paired one to one within `tolerance` of the diagonal. A found pixel is right if any
    annotator gives it a partner. All annotators' marks count (Martin et al. 2004, BSDS).
    """
    from scipy.spatial import KDTree
    radius = tolerance * math.hypot(*p.shape)
    seen = p >= thresholds.min()
    found = p[seen] >= thresholds[:, None]                           # [T, pixels]
    right = np.zeros_like(found)
    reached = np.zeros(len(thresholds))
    for marks in annotators:
        tree = KDTree(np.argwhere(marks))
        near = KDTree(np.argwhere(seen)).sparse_distance_matrix(tree, radius)
        near = near.tocsr()
        near.data += 1                                               # 0 would be no pair
        for k, row in enumerate(found):
            pixels = np.flatnonzero(row)
            pixels = pixels[most_pairs(near[pixels], far=100 * radius)]
            right[k, pixels] = True
            reached[k] += len(pixels)
    marked = np.full(len(thresholds), annotators.sum())
    return np.stack([found.sum(1), right.sum(1), marked, reached], axis=1)


def most_pairs(near, far):
    """The rows with a partner, if as many rows and columns as can be are paired, and the nearest.

    near: sparse distances, with no entry where there is no pair. far: what a lost pair costs.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching
    few = near if near.shape[0] <= near.shape[1] else near.T         # this way round is faster
    alone = far * sparse.identity(few.shape[0])                      # a column each, to stay alone
    costs = sparse.hstack([few, alone]).tocsr()
    one, other = min_weight_full_bipartite_matching(costs)
    rows = one if few is near else other
    return rows[other < few.shape[1]]


def f_score(counts):
    """F = 2PR/(P + R) of edge counts [..., 4]."""
    found, right, marked, reached = np.moveaxis(counts, -1, 0)
    precision = right / np.maximum(found, 1)
    recall = reached / np.maximum(marked, 1)
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def ods_ois(counts):
    """F at the dataset's best threshold, and at each image's own best. counts: [images, T, 4]."""
    ods = f_score(counts.sum(0)).max()
    best = f_score(counts).argmax(1)
    own = counts[np.arange(len(counts)), best]
    return ods, f_score(own.sum(0))
