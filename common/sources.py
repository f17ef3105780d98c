"""Where images come from.

    cifar10        torchvision's CIFAR-10, in data/, downloaded and checksummed if not there
    PATH           a folder of images, with train/ and test/ or without, with or without class
                   folders; or a folder that holds torchvision's cifar-10-batches-py
    photo-crops    squares cut out of six photographs that come with scikit-image and matplotlib
    dead-leaves    generated: overlapping discs (Lee, Mumford & Huang 2001)

The last two need no network: they are for trying things out. A tenth of the training images is held
out for validation, always the same tenth. Training never sees a label or the test split.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from common.data import Split
from common.folders import load_folder
from common.runtime import InputError, download_timeout, explain_errors, import_torchvision
from common.synthetic import SYNTHETIC, SYNTHETIC_IMAGES

DATA_DIR = Path(__file__).resolve().parents[1] / "data"  # downloads and decoded folders
CIFAR10_ARCHIVE, CIFAR10_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
SPLIT_SEED = 0  # which images are held out: the same in every run


class TrainingImages(NamedTuple):
    train: torch.Tensor         # uint8, N×3×32×32
    val: torch.Tensor           # uint8, M×3×32×32, held out of the training images
    record: dict                # where they come from, how many, and a fingerprint of the pixels
    labels: torch.Tensor | None      # of `train`
    val_labels: torch.Tensor | None  # of `val`


def load_training_images(source, limit=0, skip_unreadable=False):
    """The training images of a source, a tenth of them held out for validation.

    Args:
        source: `cifar10`, `photo-crops`, `dead-leaves`, or the path of a folder.
        limit: train on the first N images only (and hold out at most N); 0 takes all. Of the
            sources that are made here N are made, and a ninth of that, 5,000 at most, held out.
        skip_unreadable: leave out images of a folder that cannot be read, instead of refusing it.

    Raises InputError where the images are missing, unreadable or cannot be downloaded.
    """
    if source in SYNTHETIC:
        count = limit or SYNTHETIC_IMAGES["train"]
        held_out = min(max(2, count // 9), SYNTHETIC_IMAGES["val"])
        train, val = SYNTHETIC[source](count, "train"), SYNTHETIC[source](held_out, "val")
        labels, val_labels, record = None, None, {}
    else:
        (images, labels), record = load_split(source, "train", skip_unreadable)
        if len(images) < 4:
            raise InputError(f"{source} has {len(images)} training images: at least 4 are needed")
        # Folders come sorted by class, so the order is shuffled before anything is cut from it.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
        val_count = max(2, len(images) // 10)
        kept = order[val_count:][: limit or None]
        held_out = order[:val_count][: limit or None]
        train, val = images[kept], images[held_out]
        labels, val_labels = (None if labels is None else labels[i] for i in (kept, held_out))
        warn_of_copies(train, val, "the training images", "those held out for validation")
    images = described(source, train, val, labels, val_labels)
    images.record.update(record)
    return images


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


def warn_of_copies(images, others, name, other_name):
    """Say how many images of one split, uint8, are in the other as well, pixel by pixel."""
    def digest(image):
        return hashlib.sha256(image.numpy()).digest()

    known = set(map(digest, images))
    copies = sum(digest(image) in known for image in others)
    if copies:
        print(
            f"Warning: {copies:,} of {other_name} are copies of some of {name}, so figures on "
            "them are too good"
        )


def load_test_images(source, limit=0, skip_unreadable=False):
    """The test split of a source: for final figures only.

    A limit shortens the sources that are made here alone, since figures on a part of a real test
    split compare with nothing. Errors are those of `load_training_images`.
    """
    if source in SYNTHETIC:
        count = SYNTHETIC_IMAGES["test"]
        return Split(SYNTHETIC[source](min(limit or count, count), "test"), None)
    test, _ = load_split(source, "test", skip_unreadable)
    if len(test.images) < 2:
        raise InputError(f"{source} has {len(test.images)} test image: at least 2 are needed")
    return test


def load_split(source, split, skip_unreadable=False):
    """A Split, and a record of it."""
    if source == "cifar10":
        return load_cifar10(DATA_DIR, split, download=True), {}
    folder = Path(source).expanduser()
    if folder.is_file():
        raise InputError(f"{source} is a file: if it is an archive, unpack it and name the folder")
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {source}: --data takes cifar10, the path of a folder of images, "
            "photo-crops, dead-leaves, or none"
        )
    if (folder / CIFAR10_FOLDER).is_dir():
        return load_cifar10(folder, split, download=False), {}
    return load_folder(folder, split, DATA_DIR / "cache", skip_unreadable)


# --- CIFAR-10 ---


def load_cifar10(root, split, download):
    datasets = import_torchvision().datasets

    def sentence(reason):
        is_there = (root / CIFAR10_ARCHIVE).exists() or (root / CIFAR10_FOLDER).exists()
        message = f"CIFAR-10 is {'incomplete or damaged in' if is_there else 'not in'} {root}"
        if download:
            message += f" and could not be downloaded ({reason}): put {CIFAR10_ARCHIVE} there"
        else:
            message += f" ({reason}): unpack {CIFAR10_ARCHIVE} there again"
        return (
            f"{message}, name a folder of images with --data PATH, or use --data photo-crops or "
            "--demo"
        )

    with explain_errors(sentence), download_timeout():
        dataset = datasets.CIFAR10(root, train=split == "train", download=download)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(dataset.targets))
