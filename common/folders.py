"""A folder of images: which files are taken, which of them are for testing, and decoding them."""

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common.data import IMAGE_SIZE, Split
from common.runtime import InputError, explain_errors, import_torchvision, progress_bar
from common.storage import check_writable, load_checkpoint, save_checkpoint, write_bytes

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")  # the first that is there
TEST_SEED = 1  # of the images that are held out for testing where there is no such folder
# Made by systems and programs, often with copies of pictures in them; so is what starts with a dot.
SYSTEM_NAMES = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# Pillow knows these formats by name, but cannot decode them without another program.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
NAMED = 10  # files that a message names
DECODER = 2  # one more when the same file gives other pixels: then nothing cached earlier is used


class Listing(NamedTuple):
    paths: list[Path]  # of images, sorted
    others: list[Path]  # files that Pillow does not open, sorted
    hidden: int         # hidden files, and folders of systems, each counted as one


def load_folder(root, split, cache_dir, skip_unreadable=False):
    """The images of one split, in the order of their paths. Decoded once, then cached.

    root/train holds the training images, and root/test (or val, valid, validation) those for
    testing. Where there is no such folder, a tenth of the training images, always the same, is for
    testing. Where there is no train/ either, root itself holds the images. Each may have class
    folders.

    Args:
        root: the folder.
        split: `train` or `test`.
        cache_dir: where decoded images are kept, and the list of those that cannot be read.
        skip_unreadable: go on without those.

    Returns the Split, and a record of where it comes from and what was left out. Raises InputError
    where images are missing, and for one that cannot be read.
    """
    train_folder, test_folder = find_folders(root)
    load = functools.partial(load_images, train_folder, cache_dir, skip_unreadable)
    source = {"test_split": str(test_folder or f"a tenth of {train_folder}")}
    if test_folder:
        if split == "train":
            list_images(test_folder)  # an empty one shows before the training
        images, record = load(test_folder if split == "test" else train_folder)
        return images, source | record
    images, record = load(train_folder)
    order = torch.randperm(len(images.images), generator=torch.Generator().manual_seed(TEST_SEED))
    count = max(2, len(order) // 10)
    kept = (order[:count] if split == "test" else order[count:]).sort().values
    if split == "train":
        print(
            f"{root} has no test/ (or val/): {count:,} of its {len(order):,} images, always the "
            "same, are held out for testing"
        )
    return Split(*(None if x is None else x[kept] for x in images)), source | record


def find_folders(root):
    """The folders of the training and the test images; for the latter None where there is none.
    Says what else is there, and not read."""
    there = [path for path in sorted(root.iterdir()) if not is_hidden(path.name)]
    below = {path.name.lower(): path for path in there if path.is_dir()}
    trains = [below[name] for name in TRAIN_FOLDERS if name in below]
    tests = [below[name] for name in TEST_FOLDERS if name in below]
    if not trains:
        if tests:
            raise InputError(f"{root} has {tests[0].name}/, but no train/: put the images there")
        return root, None
    used = {trains[0], *tests[:1]}
    if unused := [path for path in there if path not in used]:
        print(f"{root}: not read: {some_of(unused, 'beside ' + trains[0].name)}")
    return trains[0], tests[0] if tests else None


def load_images(train_folder, cache_dir, skip_unreadable, folder):
    """All images below a folder, as a Split, and a record of what was left out."""
    listing = list_images(folder)
    contents = hashlib.sha256(f"{DECODER}\n".encode())  # another where a file was changed or added
    for path in listing.paths:
        stat = path.stat()
        contents.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    contents = contents.hexdigest()
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    cache = cache_dir / f"{folder.resolve().parent.name}-{folder.name}-{where}.pth"
    cached = read_cache(cache, contents, folder)
    if cached is None:
        images, unreadable = decode_images(listing.paths, f"decoding {folder}")
        unreadable = {str(Path(path).relative_to(folder)): why for path, why in unreadable.items()}
        cached = {"contents": contents, "images": images, "unreadable": unreadable}
        try:
            check_writable(cache_dir)
            save_checkpoint(cache, cached)
            print(f"Decoded images cached in {cache}")
        except InputError as error:
            print(f"Not cached, so the next run decodes {folder} again: {error}")
    unreadable = {str(folder / name): reason for name, reason in cached["unreadable"].items()}
    record = {
        "files_left_out": len(listing.others), "hidden_files": listing.hidden,
        "unreadable_files": list(cached["unreadable"]),
    }
    if unreadable and not skip_unreadable:
        refuse_unreadable(unreadable, cache.with_suffix(".unreadable.txt"))
    if listing.others or listing.hidden or unreadable:
        print(
            f"{folder}: left out {some_of(listing.others, 'of a type that Pillow does not open')}, "
            f"{some_of(unreadable, 'that cannot be read')}, and {listing.hidden:,} hidden files or "
            "system folders"
        )
    paths = [path for path in listing.paths if str(path) not in unreadable]
    return Split(cached["images"], class_labels(paths, folder, train_folder)), record


def read_cache(cache, contents, folder):
    """What an earlier run has decoded of the same files, or None."""
    if not cache.exists():
        return None
    try:
        cached = load_checkpoint(cache)
        if cached["contents"] == contents:
            return cached
        print(f"{folder} has changed since it was cached: decoding it again.")
    except (InputError, KeyError):
        print(f"The cache {cache} is damaged: decoding {folder} again.")
    return None


def refuse_unreadable(unreadable, listed=None):
    """Raise InputError that names the first of some unreadable files, path → reason, after writing
    the paths of all to the file `listed`, if one is given and can be written."""
    first = "".join(f"\n  {path}: {reason}" for path, reason in list(unreadable.items())[:NAMED])
    where = ""
    if listed:
        with contextlib.suppress(InputError):
            write_bytes(listed, "".join(f"{path}\n" for path in unreadable).encode())
            where = f"; all are listed in {listed}"
    raise InputError(
        f"{len(unreadable):,} of the images cannot be read: replace or remove them, or leave out "
        "those in folders with --skip-unreadable, a flag of distill_tinyvae.py, "
        f"test_trained_model.py and use_tinyvae.py{where}{first}"
    )


def some_of(paths, what):
    """How many files, and the names of the first."""
    names = ", ".join(Path(path).name for path in list(paths)[:NAMED])
    more = ", ..." if len(paths) > NAMED else ""
    return f"{len(paths):,} {what}" + (f" ({names}{more})" if names else "")


def class_labels(paths, folder, train_folder):
    """Index of each image's class folder among those of the training images, or None if some image
    lies in no class folder, or in one that has no training images."""
    names = sorted(path.name for path in train_folder.iterdir() if path.is_dir())
    classes = [path.relative_to(folder).parts[0] for path in paths]
    return torch.tensor(list(map(names.index, classes))) if set(classes) <= set(names) else None


def is_hidden(name):
    return name.startswith(".") or name in SYSTEM_NAMES


@functools.cache
def image_extensions():
    Image.init()
    return {
        extension for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NOT_DECODED
    }


def list_images(folder):
    """The files below a folder: a Listing. Raises InputError where it holds no images, and for
    links and devices that cannot be followed or read."""

    def fail(error):  # of a folder that cannot be listed: it would be left out
        raise error

    paths, others, hidden = [], [], 0
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        hidden += sum(map(is_hidden, folders + names))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() and path.resolve() in (above.resolve() for above in path.parents):
                raise InputError(f"{path} is a link to a folder that it lies in: remove it")
        for path in (Path(parent, name) for name in names if not is_hidden(name)):
            if path.suffix.lower() not in image_extensions():
                others.append(path)
                continue
            if not path.exists():
                raise InputError(f"{path} is a link to nothing: restore or remove it")
            if not path.is_file():  # reading a pipe would wait for ever
                raise InputError(f"{path} is a device or a pipe, not an image: remove it")
            paths.append(path)
    if not paths:
        left_out = f", only {some_of(sorted(others), 'other files')}" if others else ""
        raise InputError(f"{folder} holds no images that Pillow opens{left_out}")
    return Listing(sorted(paths), sorted(others), hidden)


def read_image(path):
    """PIL, RGB, turned as the camera says, transparent parts on white; of an animation the first
    frame. Raises InputError where it cannot be read."""
    with explain_errors(
        lambda reason: f"could not read the image {path} ({reason}): replace or remove it"
    ), Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image):
    """An image of any of PIL's modes in RGB, 8 bits a channel."""
    if image.mode.startswith(("I", "F")):  # PIL would cut off what is above 255
        pixels = np.asarray(image)
        is_8_bits = image.mode == "I" and pixels.max() <= 255
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535 or is_8_bits:
            raise ValueError(f"pixels of an unknown range: PIL's mode {image.mode}")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))  # 16 bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_to_size(image):
    """PIL → uint8, 3×32×32: the shorter side scaled to 32, the centre cropped."""
    transforms = import_torchvision().transforms.functional
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = transforms.center_crop(transforms.resize(image, IMAGE_SIZE), IMAGE_SIZE)
    return transforms.pil_to_tensor(image)


def decode_images(paths, description):
    """uint8, N×3×32×32, of those that can be read; and path → reason, of those that cannot."""
    images = torch.empty(len(paths), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    resized, decoded, unreadable = 0, 0, {}
    for path in progress_bar(paths, desc=description, unit="image"):
        try:
            image = read_image(path)
        except InputError as error:
            unreadable[str(path)] = str(error.__cause__)
            continue
        resized += image.size != (IMAGE_SIZE, IMAGE_SIZE)
        images[decoded] = fit_to_size(image)
        decoded += 1
    if resized:
        print(
            f"{resized:,} of {decoded:,} images were not 32×32: "
            "shorter side scaled to 32, centre cropped."
        )
    return images[:decoded].clone() if unreadable else images, unreadable
