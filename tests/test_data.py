"""Images: folders, what is made here, what is held out, batches."""

import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, runtime
from common.runtime import InputError
from tests.testing import TouchesWhenLoaded, write_images

# --- Images made here ---


@pytest.mark.parametrize("make", [data.dead_leaves, data.photo_crops])
def test_images_made_here_depend_on_the_split_alone(make):
    images = make(40, "train")
    assert images.dtype == torch.uint8 and images.shape == (40, 3, 32, 32)
    assert torch.equal(images, make(40, "train")) and torch.equal(images[:7], make(7, "train"))
    assert len(images.unique(dim=0)) == 40
    for other in ("val", "test"):
        assert (images != make(40, other)).any((1, 2, 3)).all()
    if make is data.photo_crops:  # none is flat
        assert images.float().std((2, 3)).amax(1).min() >= data.CROP_CONTRAST * 255


def test_photo_crops_of_two_splits_share_no_pixel(monkeypatch):
    # The photographs are replaced by one whose red is the column, from left to right.
    columns = np.linspace(0, 255, 1200).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (200, 1200, 2), dtype=np.uint8)
    pixels = np.dstack([np.broadcast_to(columns, (200, 1200)), noise])
    monkeypatch.setattr(data, "read_image", lambda *_: Image.fromarray(pixels))
    monkeypatch.setattr(data, "CROP_CONTRAST", 0)
    red = {split: data.photo_crops(300, split)[:, 0] for split in ("train", "val", "test")}
    assert red["train"].max() <= red["val"].min() < red["val"].max() <= red["test"].min()
    assert red["train"].min() < 20 and red["test"].max() > 235


def test_photo_crops_without_the_photographs_say_what_to_install(monkeypatch):
    monkeypatch.setattr(data, "PHOTOGRAPHS", (("not_installed", "data/photograph.png"),))
    with pytest.raises(InputError, match=r"images of not_installed, .* requirements\.txt$"):
        data.photo_crops(1, "train")


@pytest.mark.parametrize("source", ["photo-crops", "dead-leaves"])
def test_a_limit_shortens_what_is_made_here(source):
    images = data.load_training_images(source, 36)
    assert (len(images.train), len(images.val)) == (36, 4)
    assert images.record["data"] == source and images.record["train_images"] == 36
    assert images.labels is images.val_labels is None
    assert torch.equal(images.train[:9], data.load_training_images(source, 9).train)
    assert images.record == data.load_training_images(source, 36).record
    assert len(data.load_test_images(source, 5).images) == 5


# --- Folders ---


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("classes", [("cats", "dogs"), ("", "")])
def test_a_folder_is_read_with_and_without_classes(data_dir, classes):
    folder, (cats, dogs) = data_dir / "photos", classes
    write_images(folder / "train" / cats, 30)
    write_images(folder / "train" / dogs, 30, first=30)
    write_images(folder / "test" / dogs, 5, first=100)
    images = data.load_training_images(str(folder))
    numbers = [int(image[0, 0, 0]) for image in torch.cat([images.train, images.val])]
    assert sorted(numbers) == list(range(60))  # each once, so none is in both splits
    assert (len(images.train), len(images.val)) == (54, 6)
    assert numbers[:10] != sorted(numbers[:10])  # not one class after another
    test = data.load_test_images(str(folder))
    assert len(test.images) == 5
    if dogs:  # labels keep to their images: numbers below 30 are cats
        both = torch.cat([images.labels, images.val_labels])
        assert both.tolist() == [int(number >= 30) for number in numbers]
        assert test.labels.tolist() == [1] * 5
    else:
        assert images.labels is images.val_labels is test.labels is None

    limited = data.load_training_images(str(folder), limit=4)
    assert torch.equal(limited.train, images.train[:4])
    assert torch.equal(limited.val, images.val[:4])
    assert limited.record["train_images"] == 4


def test_a_folder_is_decoded_once_until_it_changes(data_dir, monkeypatch, capsys):
    folder = data_dir / "photos"
    write_images(folder / "train", 10)
    first = data.load_training_images(str(folder))

    def decode_again(paths, description):
        raise AssertionError("decoded a second time")

    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", decode_again)
        again = data.load_training_images(str(folder))
    assert torch.equal(first.train, again.train)

    write_images(folder / "train", 1, first=10)
    assert len(data.load_split(str(folder), "train").images) == 11
    assert "has changed" in capsys.readouterr().out
    (cache,) = (data_dir / "data" / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(data.load_split(str(folder), "train").images) == 11
    assert "is damaged" in capsys.readouterr().out


def test_images_of_other_sizes_are_scaled_and_cropped_with_a_message(data_dir, capsys):
    write_images(data_dir / "photos" / "train", 3, size=(40, 100))
    assert data.load_split(str(data_dir / "photos"), "train").images.shape == (3, 3, 32, 32)
    assert "3 of 3 images were not 32×32" in capsys.readouterr().out


def test_unusable_folders_are_refused(data_dir):
    def refused(message, folder="photos"):
        with pytest.raises(InputError, match=message):
            data.load_training_images(str(data_dir / folder))

    train = data_dir / "photos" / "train"
    refused("there is no folder", "nowhere")
    train.parent.mkdir()
    refused(r"photos.train: a folder of images has train/")
    train.mkdir()
    refused("holds no images")
    write_images(train, 2)
    refused("has 2 training images: at least 4")
    link = train / "link.png"
    link.symlink_to(data_dir / "nowhere.png")
    refused(r"link\.png is a link to nothing")
    link.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(link)
        refused(r"link\.png is a device or a pipe")
        link.unlink()
    broken = train / "000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    refused(r"could not read the image .*000\.png")
    (data_dir / "photos" / "cifar-10-batches-py").mkdir()
    refused(r"CIFAR-10 is incomplete or damaged in .*photos .* unpack cifar-10")


def test_a_cifar10_other_than_the_original_is_refused(data_dir, monkeypatch):
    monkeypatch.setattr(runtime.import_torchvision().datasets.CIFAR10, "url", "http://[::1]:9/")
    with pytest.raises(InputError, match=r"CIFAR-10 is not in .* could not be downloaded"):
        data.load_training_images("cifar10")
    archive = data_dir / "data" / data.CIFAR10_ARCHIVE
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as content:  # it would unpack beside the folder
        content.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(InputError, match=r"CIFAR-10 is incomplete or damaged in .* put cifar-10-p"):
        data.load_training_images("cifar10")
    assert not (data_dir / "outside").exists()

    batches = data_dir / "own" / data.CIFAR10_FOLDER
    batches.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (batches / name).write_bytes(pickle.dumps(TouchesWhenLoaded(data_dir / "called")))
    with pytest.raises(InputError, match=r"CIFAR-10 is incomplete or damaged in .*own "):
        data.load_training_images(str(data_dir / "own"))
    assert not (data_dir / "called").exists()


def test_a_linked_class_folder_is_followed(data_dir):
    write_images(data_dir / "elsewhere", 5)
    (data_dir / "photos" / "train").mkdir(parents=True)
    (data_dir / "photos" / "train" / "cats").symlink_to(data_dir / "elsewhere")
    assert len(data.load_split(str(data_dir / "photos"), "train").images) == 5


def test_torchvision_that_does_not_load_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"torchvision does not load beside torch .*reinstall"):
        runtime.import_torchvision()


# --- Batches and picks ---


def test_an_epoch_shows_each_image_at_most_once():
    steps = data.shuffled_batches(70, 32, torch.Generator().manual_seed(0))
    assert steps.shape == (2, 32)
    assert len(steps.unique()) == 64


def test_images_picked_from_a_split_are_of_all_its_classes():
    labels = torch.arange(10).repeat_interleave(1000)  # as a folder of images is sorted
    assert data.evenly_spaced(labels, 2000).bincount().tolist() == [200] * 10
    assert len(data.evenly_spaced(labels[:3], 10)) == len(data.evenly_spaced(labels[:3], 0)) == 3
