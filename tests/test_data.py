"""Images: folders, what is made here, what is held out, batches."""

import os
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from common import data, folders, runtime, sources, synthetic
from common.models import find_images
from common.runtime import InputError
from tests.testing import TouchesWhenLoaded, refuse, write_images

# --- Images made here ---


@pytest.mark.parametrize("make", [synthetic.dead_leaves, synthetic.photo_crops])
def test_images_made_here_depend_on_the_split_alone(make):
    images = make(40, "train")
    assert images.dtype == torch.uint8 and images.shape == (40, 3, 32, 32)
    assert torch.equal(images, make(40, "train")) and torch.equal(images[:7], make(7, "train"))
    assert len(images.unique(dim=0)) == 40
    for other in ("val", "test"):
        assert (images != make(40, other)).any((1, 2, 3)).all()
    if make is synthetic.photo_crops:  # none is flat
        assert images.float().std((2, 3)).amax(1).min() >= synthetic.CROP_CONTRAST * 255


def test_photo_crops_of_two_splits_share_no_pixel(monkeypatch):
    # The photographs are replaced by one whose red is the column, from left to right.
    columns = np.linspace(0, 255, 1200).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (200, 1200, 2), dtype=np.uint8)
    pixels = np.dstack([np.broadcast_to(columns, (200, 1200)), noise])
    monkeypatch.setattr(synthetic, "read_image", lambda *_: Image.fromarray(pixels))
    monkeypatch.setattr(synthetic, "CROP_CONTRAST", 0)
    red = {split: synthetic.photo_crops(300, split)[:, 0] for split in ("train", "val", "test")}
    assert red["train"].max() <= red["val"].min() < red["val"].max() <= red["test"].min()
    assert red["train"].min() < 20 and red["test"].max() > 235


def test_photo_crops_without_the_photographs_say_what_to_install(monkeypatch):
    monkeypatch.setattr(synthetic, "PHOTOGRAPHS", (("not_installed", "data/photograph.png"),))
    with pytest.raises(InputError, match=r"images of not_installed, .* requirements\.txt$"):
        synthetic.photo_crops(1, "train")


@pytest.mark.parametrize("source", ["photo-crops", "dead-leaves"])
def test_a_limit_shortens_what_is_made_here(source):
    images = sources.load_training_images(source, 36)
    assert (len(images.train), len(images.val)) == (36, 4)
    assert images.record["data"] == source and images.record["train_images"] == 36
    assert images.labels is images.val_labels is None
    assert torch.equal(images.train[:9], sources.load_training_images(source, 9).train)
    assert images.record == sources.load_training_images(source, 36).record
    assert len(sources.load_test_images(source, 5).images) == 5


# --- Folders ---


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA_DIR", tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("classes", [("cats", "dogs"), ("", "")])
def test_a_folder_is_read_with_and_without_classes(data_dir, classes):
    folder, (cats, dogs) = data_dir / "photos", classes
    write_images(folder / "train" / cats, 30)
    write_images(folder / "train" / dogs, 30, first=30)
    write_images(folder / "test" / dogs, 5, first=100)
    images = sources.load_training_images(str(folder))
    numbers = [int(image[0, 0, 0]) for image in torch.cat([images.train, images.val])]
    assert sorted(numbers) == list(range(60))  # each once, so none is in both splits
    assert (len(images.train), len(images.val)) == (54, 6)
    assert numbers[:10] != sorted(numbers[:10])  # not one class after another
    test = sources.load_test_images(str(folder))
    assert len(test.images) == 5
    if dogs:  # labels keep to their images: numbers below 30 are cats
        both = torch.cat([images.labels, images.val_labels])
        assert both.tolist() == [int(number >= 30) for number in numbers]
        assert test.labels.tolist() == [1] * 5
    else:
        assert images.labels is images.val_labels is test.labels is None

    limited = sources.load_training_images(str(folder), limit=4)
    assert torch.equal(limited.train, images.train[:4])
    assert torch.equal(limited.val, images.val[:4])
    assert limited.record["train_images"] == 4


def test_a_folder_is_decoded_once_until_it_changes(data_dir, monkeypatch, capsys):
    folder = data_dir / "photos"
    write_images(folder / "train", 10)
    write_images(folder / "test", 2)
    first = sources.load_training_images(str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "decode_images", refuse)
        again = sources.load_training_images(str(folder))
    assert torch.equal(first.train, again.train)

    write_images(folder / "train", 1, first=10)
    assert len(sources.load_split(str(folder), "train")[0].images) == 11
    assert "has changed" in capsys.readouterr().out
    (cache,) = (data_dir / "data" / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(sources.load_split(str(folder), "train")[0].images) == 11
    assert "is damaged" in capsys.readouterr().out


def test_images_of_other_sizes_are_scaled_and_cropped_with_a_message(data_dir, capsys):
    write_images(data_dir / "photos" / "train", 3, size=(40, 100))
    write_images(data_dir / "photos" / "test", 2)
    assert sources.load_split(str(data_dir / "photos"), "train")[0].images.shape == (3, 3, 32, 32)
    assert "3 of 3 images were not 32×32" in capsys.readouterr().out


def test_unusable_folders_are_refused(data_dir):
    def refused(message, folder="photos"):
        with pytest.raises(InputError, match=message):
            sources.load_training_images(str(data_dir / folder))

    train = data_dir / "photos" / "train"
    refused("there is no folder", "nowhere")
    train.parent.mkdir()
    refused("photos holds no images that Pillow opens")
    train.mkdir()
    (train / "photo.heic").touch()
    refused(r"train holds no images that Pillow opens, only 1 other files \(photo\.heic")
    test = data_dir / "photos" / "test"
    write_images(train, 2)
    test.mkdir()
    refused("test holds no images")
    train.rename(data_dir / "elsewhere")
    refused("photos has test/, but no train/")
    (data_dir / "elsewhere").rename(train)
    write_images(test, 2)
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
    refused(r"1 of the images cannot be read: replace or remove them, .*\n  .*000\.png: ")
    (data_dir / "photos" / "cifar-10-batches-py").mkdir()
    refused(r"CIFAR-10 is incomplete or damaged in .*photos .* unpack cifar-10")


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("train", "Valid"), ("training", "testing"), ("train", None),
     ("train/cats", None),
     ("cats", None), ("", None)],
)
def test_each_layout_of_folders_has_a_training_and_a_test_split(data_dir, train, test, capsys):
    folder = data_dir / "photos"
    write_images(folder / train, 40)
    if test:
        write_images(folder / test, 4, first=100)
    images = sources.load_training_images(str(folder))
    tested = sources.load_test_images(str(folder)).images
    numbers = torch.cat([images.train, images.val])[:, 0, 0, 0].tolist()
    assert sorted(numbers + tested[:, 0, 0, 0].tolist()) == [
        *range(40), *(range(100, 104) if test else ())
    ]
    assert len(tested) == 4
    assert torch.equal(tested, sources.load_test_images(str(folder)).images)
    assert (images.labels is None) == ("cats" not in train)
    said = "4 of its 40 images, always the same, are held out for testing"
    assert (said in capsys.readouterr().out) == (test is None)
    where = folder / train.partition("/")[0] if train.startswith("train") else folder
    expected = str(folder / test) if test else f"a tenth of {where}"
    assert images.record["test_split"] == expected


def test_an_archive_and_a_second_test_folder_are_mentioned(data_dir, capsys):
    folder = data_dir / "photos"
    for name in ("train", "val", "test"):
        write_images(folder / name, 10)
    sources.load_training_images(str(folder))
    printed = capsys.readouterr().out
    assert f"{folder}: not read: 1 beside train (val)" in printed
    # The same ten in both: the test split is of copies.
    find_images(str(folder), 0, folder, {})
    assert "Warning: 10 of the test images are copies of some" in capsys.readouterr().out
    archive = data_dir / "photos.zip"
    archive.touch()
    with pytest.raises(InputError, match=r"photos\.zip is a file: if it is an archive, unpack it"):
        sources.load_training_images(str(archive))


def test_every_format_is_read_and_what_is_no_picture_is_left_out(data_dir, capsys):
    folder = data_dir / "photos"
    write_images(folder / "test", 2)
    suffixes = [".png", ".JPG", ".jfif", ".gif", ".webp", ".tif", ".bmp", ".ppm", ".jp2", ".qoi"]
    suffixes += [".avif"] if features.check("avif") else []
    (folder / "train").mkdir()
    for i, suffix in enumerate(suffixes):
        image = Image.new("RGB", (32, 32), (20 * i, 0, 0))
        extra = {}
        if suffix == ".gif":  # the first picture counts
            extra = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "white")]}
        image.save(folder / "train" / f"{i:02}{suffix}", **extra)
    for name in ("__MACOSX/a.png", ".ipynb_checkpoints/a.png", "cats/.a.png", "cats/notes.txt"):
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    images = sources.load_training_images(str(folder))
    reds = sorted(torch.cat([images.train, images.val])[:, 0, 9, 9].tolist())
    assert reds == pytest.approx([20 * i for i in range(len(suffixes))], abs=3)
    printed = capsys.readouterr().out
    assert "left out 1 of a type that Pillow does not open (notes.txt), 0 that" in printed
    assert "3 hidden files or system folders" in printed
    assert images.record["files_left_out"] == 1 and images.record["hidden_files"] == 3


def test_all_unreadable_images_are_named_at_once_and_can_be_left_out(data_dir, monkeypatch, capsys):
    folder = data_dir / "photos"
    write_images(folder / "train" / "cats", 10)
    write_images(folder / "train" / "dogs", 10, first=10)
    write_images(folder / "test", 2, first=90)
    cut, empty = (folder / "train" / "cats" / f"{i:03}.png" for i in (3, 8))
    page = folder / "train" / "dogs" / "019.png"
    cut.write_bytes(cut.read_bytes()[:-25])
    empty.write_bytes(b"")
    page.write_text("<html>not found</html>")
    for _ in range(2):  # from the files, then from the cache
        with pytest.raises(InputError, match=r"^3 of .*\.unreadable\.txt\n") as refusal:
            sources.load_training_images(str(folder))
        assert all(f"\n  {path}: " in str(refusal.value) for path in (cut, empty, page))
        monkeypatch.setattr(folders, "decode_images", None)
    (listed,) = (data_dir / "data" / "cache").glob("*.unreadable.txt")
    assert listed.read_text().splitlines() == [str(cut), str(empty), str(page)]
    images = sources.load_training_images(str(folder), skip_unreadable=True)
    left = torch.cat([images.train, images.val])[:, 0, 0, 0].tolist()
    assert sorted(left) == [i for i in range(20) if i not in (3, 8, 19)]
    classes = torch.cat([images.labels, images.val_labels]).tolist()
    assert classes == [int(number >= 10) for number in left]
    names = [str(path.relative_to(folder / "train")) for path in (cut, empty, page)]
    assert images.record["unreadable_files"] == names
    monkeypatch.chdir(data_dir)  # the same folder under another name: from the cache
    again = sources.load_training_images("photos", skip_unreadable=True)
    assert torch.equal(again.train, images.train) and torch.equal(again.labels, images.labels)
    assert "3 that cannot be read (003.png, 008.png, 019.png)" in capsys.readouterr().out


def test_copies_across_training_and_validation_are_counted(data_dir, capsys):
    folder = data_dir / "photos"
    write_images(folder / "train" / "a", 30)
    shutil.copytree(folder / "train" / "a", folder / "train" / "b")
    write_images(folder / "test", 2, first=90)
    sources.load_training_images(str(folder))
    assert "of those held out for validation are copies of some of the" in capsys.readouterr().out


def test_a_cifar10_other_than_the_original_is_refused(data_dir, monkeypatch):
    monkeypatch.setattr(runtime.import_torchvision().datasets.CIFAR10, "url", "http://[::1]:9/")
    with pytest.raises(InputError, match=r"CIFAR-10 is not in .* could not be downloaded"):
        sources.load_training_images("cifar10")
    archive = data_dir / "data" / sources.CIFAR10_ARCHIVE
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as content:  # it would unpack beside the folder
        content.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(InputError, match=r"CIFAR-10 is incomplete or damaged in .* put cifar-10-p"):
        sources.load_training_images("cifar10")
    assert not (data_dir / "outside").exists()

    batches = data_dir / "own" / sources.CIFAR10_FOLDER
    batches.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (batches / name).write_bytes(pickle.dumps(TouchesWhenLoaded(data_dir / "called")))
    with pytest.raises(InputError, match=r"CIFAR-10 is incomplete or damaged in .*own "):
        sources.load_training_images(str(data_dir / "own"))
    assert not (data_dir / "called").exists()


def test_torchvision_that_does_not_load_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"torchvision does not load beside torch .*reinstall"):
        runtime.import_torchvision()


# --- Picks ---


def test_images_picked_from_a_split_are_of_all_its_classes():
    labels = torch.arange(10).repeat_interleave(1000)  # as a folder of images is sorted
    assert data.evenly_spaced(labels, 2000).bincount().tolist() == [200] * 10
    assert len(data.evenly_spaced(labels[:3], 10)) == len(data.evenly_spaced(labels[:3], 0)) == 3
