"""The images: one uint8 tensor per split, N×3×32×32, small enough to live on the device.

Four sources:

    cifar10        torchvision's CIFAR-10, in data/, downloaded and checksummed if not there
    PATH           a folder of images, PATH/train and PATH/test, with or without class folders;
                   or a folder that holds torchvision's cifar-10-batches-py
    photo-crops    squares cut out of six photographs that come with scikit-image and matplotlib
    dead-leaves    generated: overlapping discs (Lee, Mumford & Huang 2001)

The last two need no network: they are for trying things out. A tenth of the training images is held
out for validation, always the same tenth. Training never sees a label or the test split.
"""

import functools
import hashlib
import importlib.util
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from common.runtime import (
    InputError,
    download_timeout,
    import_torchvision,
    is_out_of_memory,
    progress_bar,
)
from common.storage import check_writable, load_checkpoint, save_checkpoint

DATA_DIR = Path(__file__).resolve().parents[1] / "data"  # downloads and decoded folders
CIFAR10_ARCHIVE, CIFAR10_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
IMAGE_SIZE = 32  # pixels a side
IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
PIXEL_VALUES = 3072  # numbers in one image
TOO_DEEP = ("I", "F")  # PIL's modes of more than 8 bits, I;16 and its like among them, start so
SPLIT_SEED = 0  # which images are held out: the same in every run

SYNTHETIC_IMAGES = {"train": 45_000, "val": 5_000, "test": 10_000}  # as many as CIFAR-10 has

# Photo crops.
PHOTOGRAPHS = (  # package and file
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
STRIPS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # of a photograph's width
CROP_SIDES = (44, 88)  # pixels of a square before it is scaled to 32×32, smallest and largest
CROP_CONTRAST = 0.1  # standard deviation over a square, pixels in [0, 1]: flatter ones are skipped

# Dead leaves.
DEAD_LEAVES_CHUNK = 500  # images drawn at once; each chunk has its own seed
DISCS = 32  # per image, over a background, of which little remains to be seen
RADII = (8.0, 32.0)  # pixels, smallest and largest; density falls as radius ** -3
MARGIN = 8.0  # pixels around the image in which discs may be centred
SUPERSAMPLING = 2  # samples per pixel side, for smooth edges


class Split(NamedTuple):
    images: torch.Tensor         # uint8, N×3×32×32
    labels: torch.Tensor | None  # class of each image, N, or None where images have no classes

    def to(self, device):
        return Split(*(None if x is None else x.to(device) for x in self))


class TrainingImages(NamedTuple):
    train: torch.Tensor         # uint8, N×3×32×32
    val: torch.Tensor           # uint8, M×3×32×32, held out of the training images
    record: dict                # where they come from, how many, and a fingerprint of the pixels
    labels: torch.Tensor | None      # of `train`
    val_labels: torch.Tensor | None  # of `val`


def load_training_images(source, limit=0):
    """The training images of a source, a tenth of them held out for validation.

    Args:
        source: `cifar10`, `photo-crops`, `dead-leaves`, or the path of a folder.
        limit: train on the first N images only (and hold out at most N); 0 takes all. Of the
            sources that are made here N are made, and a ninth of that, 5,000 at most, held out.

    Raises InputError where the images are missing, unreadable or cannot be downloaded.
    """
    if source in SYNTHETIC:
        count = limit or SYNTHETIC_IMAGES["train"]
        held_out = min(max(2, count // 9), SYNTHETIC_IMAGES["val"])
        train, val = SYNTHETIC[source](count, "train"), SYNTHETIC[source](held_out, "val")
        labels = val_labels = None
    else:
        images, labels = load_split(source, "train")
        if len(images) < 4:
            raise InputError(f"{source} has {len(images)} training images: at least 4 are needed")
        # Folders come sorted by class, so the order is shuffled before anything is cut from it.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
        val_count = max(2, len(images) // 10)
        kept = order[val_count:][: limit or None]
        held_out = order[:val_count][: limit or None]
        train, val = images[kept], images[held_out]
        labels, val_labels = (None if labels is None else labels[i] for i in (kept, held_out))
    return described(source, train, val, labels, val_labels)


def described(source, train, val, labels=None, val_labels=None):
    """TrainingImages with their record."""
    fingerprint = hashlib.sha256(train.numpy())
    fingerprint.update(val.numpy())
    record = {
        "data": source,
        "train_images": len(train),
        "val_images": len(val),
        "pixels_sha256": fingerprint.hexdigest()[:16],
    }
    return TrainingImages(train, val, record, labels, val_labels)


def load_test_images(source, limit=0):
    """The test split of a source: for final figures only.

    A limit shortens the sources that are made here alone, since figures on a part of a real test
    split compare with nothing. Errors are those of `load_training_images`.
    """
    if source in SYNTHETIC:
        count = SYNTHETIC_IMAGES["test"]
        return Split(SYNTHETIC[source](min(limit or count, count), "test"), None)
    test = load_split(source, "test")
    if len(test.images) < 2:
        raise InputError(f"{source} has {len(test.images)} test image: at least 2 are needed")
    return test


def load_split(source, split):
    if source == "cifar10":
        return load_cifar10(DATA_DIR, split, download=True)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {source}: --data takes cifar10, photo-crops, dead-leaves, or the "
            "path of a folder with train/ and test/"
        )
    if (folder / CIFAR10_FOLDER).is_dir():
        return load_cifar10(folder, split, download=False)
    return load_folder(folder, split)


# --- CIFAR-10 ---


def load_cifar10(root, split, download):
    datasets = import_torchvision().datasets
    try:
        with download_timeout():
            dataset = datasets.CIFAR10(root, train=split == "train", download=download)
    except Exception as error:  # URL, socket, disk and checksum errors have no narrower base
        if is_out_of_memory(error):
            raise
        is_there = (root / CIFAR10_ARCHIVE).exists() or (root / CIFAR10_FOLDER).exists()
        state = "incomplete or damaged in" if is_there else "not in"
        message = f"CIFAR-10 is {state} {root}"
        if download:
            message += f" and could not be downloaded ({error}): put {CIFAR10_ARCHIVE} there"
        else:
            message += f" ({error}): unpack {CIFAR10_ARCHIVE} there again"
        raise InputError(
            f"{message}, name a folder of images with --data PATH, or use --data photo-crops or "
            "--demo"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(dataset.targets))


# --- A folder of images ---


def load_folder(root, split):
    """All images below root/split, in the order of their paths. Decoded once, then cached."""
    folder = root / split
    paths = list_images(folder)
    labels = class_labels(paths, folder, root / "train")
    contents = hashlib.sha256()  # changes when an image is added, removed or rewritten
    for path in paths:
        stat = path.stat()
        contents.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    contents = contents.hexdigest()
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    cache = DATA_DIR / "cache" / f"{folder.resolve().parent.name}-{folder.name}-{where}.pth"
    if cache.exists():
        try:
            cached = load_checkpoint(cache)
            if cached["contents"] == contents:
                return Split(cached["images"], labels)
            print(f"{folder} has changed since it was cached: decoding it again.")
        except (InputError, KeyError):
            print(f"The cache {cache} is damaged: decoding {folder} again.")
    images = decode_images(paths, f"decoding {folder}")
    try:
        check_writable(cache.parent)
        save_checkpoint(cache, {"contents": contents, "images": images})
        print(f"Decoded images cached in {cache}")
    except InputError as error:
        print(f"Not cached, so the next run decodes {folder} again: {error}")
    return Split(images, labels)


def class_labels(paths, folder, train_folder):
    """Index of each image's class folder among those of the training images, or None if some image
    lies in no class folder, or in one that has no training images."""
    names = sorted(path.name for path in train_folder.iterdir() if path.is_dir())
    classes = [path.relative_to(folder).parts[0] for path in paths]
    return torch.tensor(list(map(names.index, classes))) if set(classes) <= set(names) else None


def list_images(folder):
    extensions = import_torchvision().datasets.folder.IMG_EXTENSIONS
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}: a folder of images has train/ and test/, "
            "with or without class folders in them"
        )

    def fail(error):  # of a folder that cannot be listed: it would be left out
        raise error

    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() and path.resolve() in (above.resolve() for above in path.parents):
                raise InputError(f"{path} is a link to a folder that it lies in: remove it")
        for path in (Path(parent, name) for name in names):
            if path.suffix.lower() not in extensions or path.name.startswith("."):
                continue
            if not path.exists():
                raise InputError(f"{path} is a link to nothing: restore or remove it")
            if not path.is_file():  # reading a pipe would wait for ever
                raise InputError(f"{path} is a device or a pipe, not an image: remove it")
            paths.append(path)
    if not paths:
        raise InputError(f"{folder} holds no images ({', '.join(extensions)})")
    return sorted(paths)


def read_image(path):
    """PIL, RGB, turned as the camera says. Raises InputError where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(TOO_DEEP):  # as RGB, nearly all of it would be white
                raise ValueError(f"more than 8 bits a channel: PIL's mode {image.mode}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and its own
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"could not read the image {path} ({error}): replace or remove it"
        ) from error


def decode_images(paths, description):
    transforms = import_torchvision().transforms.functional
    images = torch.empty(len(paths), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    resized = 0
    for i, path in enumerate(progress_bar(paths, desc=description, unit="image")):
        image = read_image(path)
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = transforms.center_crop(transforms.resize(image, IMAGE_SIZE), IMAGE_SIZE)
            resized += 1
        images[i] = transforms.pil_to_tensor(image)
    if resized:
        print(
            f"{resized:,} of {len(paths):,} images were not 32×32: "
            "shorter side scaled to 32, centre cropped."
        )
    return images


# --- Images made here ---


def photo_crops(count, split):
    """Random squares out of PHOTOGRAPHS, scaled to 32×32, half of them mirrored.

    Each photograph is cut into three strips, one for each split, so no pixel is in two of them.

    Args:
        count: number of images; the first N are the same whatever the count.
        split: `train`, `val` or `test`.

    Returns uint8, count×3×32×32.
    """
    transforms = import_torchvision().transforms.functional
    photographs = []
    for package, file in PHOTOGRAPHS:
        installed = importlib.util.find_spec(package)
        if installed is None:
            raise InputError(
                f"photo-crops are cut from images of {package}, which is not installed: pip "
                "install -r requirements.txt"
            )
        path = Path(installed.origin).parent / file
        photograph = transforms.pil_to_tensor(read_image(path))
        left, right = (round(edge * photograph.shape[2]) for edge in STRIPS[split])
        photographs.append(photograph[:, :, left:right])
    generator = torch.Generator().manual_seed(list(STRIPS).index(split))
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    kept = 0
    for photograph in itertools.cycle(photographs):
        if kept == count:
            break
        x, y, size, mirror = torch.rand(4, generator=generator).tolist()
        side = round(CROP_SIDES[0] + size * (CROP_SIDES[1] - CROP_SIDES[0]))
        top = int(y * (photograph.shape[1] - side + 1))
        left = int(x * (photograph.shape[2] - side + 1))
        crop = photograph[:, top : top + side, left : left + side]
        crop = transforms.resize(crop, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
        if crop.float().std((1, 2)).max() >= CROP_CONTRAST * 255:
            images[kept] = crop.flip(-1) if mirror < 0.5 else crop
            kept += 1
    return images


def dead_leaves(count, split):
    """Images of the dead leaves model: opaque discs dropped one over another.

    Lee, Mumford & Huang, "Occlusion models for natural images", IJCV 41, 2001: positions
    uniform, radii with density r^-3, which makes the statistics scale-invariant as those of
    photographs are. Each image mixes a hue of its own into its discs' random colours.

    Args and result are those of `photo_crops`.
    """
    stream = list(SYNTHETIC_IMAGES).index(split)
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    chunks = images.split(DEAD_LEAVES_CHUNK)
    progress = progress_bar(chunks, desc=f"drawing dead leaves, {split}", unit="chunk")
    for i, chunk in enumerate(progress):
        generator = torch.Generator().manual_seed(stream * 1_000_000 + i)
        chunk.copy_(draw_leaves(DEAD_LEAVES_CHUNK, generator)[: len(chunk)])
    return images


def draw_leaves(count, generator):
    uniform = functools.partial(torch.rand, generator=generator)
    small, large = RADII
    # Inverse of the cumulative distribution of p(r) ∝ r^-3 between the two radii.
    radius = (small**-2 - uniform(DISCS, count, 1, 1) * (small**-2 - large**-2)) ** -0.5
    x, y = uniform(2, DISCS, count, 1, 1) * (IMAGE_SIZE + 2 * MARGIN) - MARGIN
    colour = 0.6 * uniform(count, 3, DISCS + 1) + 0.4 * uniform(count, 3, 1)

    side = IMAGE_SIZE * SUPERSAMPLING
    grid = (torch.arange(side) + 0.5) / SUPERSAMPLING
    topmost = torch.zeros(count, side, side, dtype=torch.uint8)  # 0 is the background
    for disc in range(DISCS):
        distance = (grid - x[disc]).square() + (grid[:, None] - y[disc]).square()
        topmost.masked_fill_(distance < radius[disc].square(), disc + 1)
    index = topmost.flatten(1)[:, None].expand(-1, 3, -1).long()
    image = colour.gather(2, index).view(count, 3, side, side)
    return (F.avg_pool2d(image, SUPERSAMPLING) * 255).round().to(torch.uint8)


SYNTHETIC = {"photo-crops": photo_crops, "dead-leaves": dead_leaves}


# --- Batches ---


def to_float(images):
    """uint8 → float32 in [0, 1], channels last, which convolutions run fastest on."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def evenly_spaced(images, count):
    """`count` images spread evenly over a split: the same ones each time, and of all classes, which
    folders are sorted by. 0 takes all."""
    count = min(count or len(images), len(images))
    return images[torch.linspace(0, len(images) - 1, count).long()]


def shuffled_batches(count, batch_size, generator):
    """Indices of one epoch's batches, as a tensor steps×batch_size.

    The few images that do not fill the last batch wait for another epoch's order, so that every
    step has the same shape.
    """
    order = torch.randperm(count, generator=generator)
    steps = count // batch_size
    return order[: steps * batch_size].view(steps, batch_size)
