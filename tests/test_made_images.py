"""Pictures that a teacher makes: their distribution, and students that learn from them."""

import pytest
import torch
from torch import nn

from common import made_images, storage
from common.models import load_model
from common.runtime import InputError
from tests.testing import (
    assert_same_weights,
    random_normal,
    read_table,
    teacher_of,
    train,
    train_until,
)


class Grey(nn.Module):
    """A VAE whose code of an image is its mean colour, and whose pictures are of one colour."""

    latent_dim = 3

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def encode(self, images):
        return images.mean((2, 3)), torch.zeros(len(images), 3)

    def decode(self, z):
        return (self.one * z)[..., None, None].expand(-1, -1, 32, 32)


def photographs(count):
    """uint8 images around grey, of colours and pixels that are correlated, far from 0 and 255."""
    colours = 0.5 + 0.05 * random_normal(count, 3, 1, 1)
    noise = random_normal(count, 3, 32, 32, seed=1)
    noise = noise + noise.roll(1, -1) + 0.5 * noise.roll(1, -2) + noise.mean(1, keepdim=True)
    return (255 * (colours + 0.02 * noise)).round().clamp(0, 255).byte()


def moments(images):
    """Variance of pixels, covariances with neighbours to the right and below, and of red with
    green; variance and mean of mean colours."""
    x = images.double() / 255
    colour = x.mean((2, 3))
    y = x - colour[..., None, None]
    parts = (y * y, y * y.roll(1, -1), y * y.roll(1, -2), y[:, 0] * y[:, 1], colour.var(0), colour)
    return torch.tensor([part.mean() for part in parts])


def test_made_images_are_distributed_as_the_photographs_are():
    images = photographs(2000)
    statistics = made_images.code_statistics(Grey(), images)
    codes = images.double().mean((2, 3)) / 255
    torch.testing.assert_close(statistics["codes"]["mean"].double(), codes.mean(0))
    torch.testing.assert_close(
        statistics["codes"]["covariance"].double(), codes.T.cov(correction=0), rtol=1e-3, atol=1e-8
    )
    made = made_images.make_images(Grey(), statistics, 2000, seed=0)
    torch.testing.assert_close(moments(made), moments(images), rtol=0.04, atol=0)
    again = made_images.make_images(Grey(), statistics, 2000, seed=0)
    assert torch.equal(made, again)
    assert not torch.equal(made, made_images.make_images(Grey(), statistics, 2000, seed=1))


@pytest.mark.parametrize("damage", ["none", "size", "nan", "negative", "constant", "spectrum"])
def test_a_distribution_that_is_none_is_refused(damage):
    statistics = made_images.code_statistics(Grey(), photographs(20))
    codes = statistics["codes"]
    if damage == "none":
        del codes["mean"]
    elif damage == "size":
        codes["covariance"] = torch.eye(4)
    elif damage == "nan":
        codes["mean"][0] = torch.nan
    elif damage == "negative":
        codes["covariance"] = torch.diag(torch.tensor([1.0, 1.0, -0.1]))
    elif damage == "constant":
        codes["covariance"] = 1e-9 * torch.eye(3)
    else:
        statistics["residual_spectrum"] = torch.zeros(32, 17, 3, dtype=torch.cfloat)
    with pytest.raises(InputError, match="cannot make pictures"):
        made_images.make_images(Grey(), statistics, 2, seed=0)


def test_photographs_are_repeated_and_made_ones_mixed_in(tiny_run, monkeypatch):
    run, _ = tiny_run
    monkeypatch.setattr(made_images, "EPOCH_IMAGES", 400)
    path = run / "checkpoints" / "teacher_vae.pth"
    teacher, checkpoint = load_model(path)
    source = ("dead-leaves", 70)
    real = made_images.training_images(*source, 0.0, seed=0)
    mixed = made_images.training_images(*source, 0.75, 0, teacher, checkpoint, path)
    assert mixed.record["made_images"] == 300 and mixed.record["photographs"] == 70
    assert len(mixed.train) == 400 and torch.equal(mixed.val, real.val)
    shown = [(mixed.train == image).flatten(1).all(1).nonzero().flatten() for image in real.train]
    assert sorted(map(len, shown)) == [1] * 40 + [2] * 30  # 100 places for 70 photographs
    assert torch.cat(shown).max() > 200  # not all at the beginning
    assert mixed.record["pixels_sha256"] != real.record["pixels_sha256"]
    # Each photograph is shown, however many there are.
    some = made_images.training_images("dead-leaves", 300, 0.5, 0, teacher, checkpoint, path)
    assert len(some.train) == 600 and some.record["made_images"] == 300


def test_a_student_learns_without_photographs_and_resumes_bit_for_bit(
    tiny_run, tmp_path, monkeypatch, capsys, without_pictures
):
    flags = (*teacher_of(tiny_run[0]), "--data", "none")
    rows = train(tmp_path / "whole", *flags)
    assert float(rows[-1]["latent"]) > 0 and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    printed = capsys.readouterr().out
    assert "images       made by the teacher: 70 to train on, 7 held out" in printed
    train_until(1, monkeypatch, tmp_path / "cut", *flags)
    train(tmp_path / "cut", *flags, "--resume")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", "tinyvae_last.pth")
    best = tmp_path / "cut" / "checkpoints" / "tinyvae_best.pth"
    record = storage.load_checkpoint(best)["record"]
    assert record["data"] == "none" and record["made_images"] == 70
    assert len(read_table(tmp_path / "cut")) == len(rows)


def test_a_teacher_that_says_nothing_of_its_codes_is_measured_or_warned_of(
    tiny_run, tmp_path, capsys, without_pictures, monkeypatch
):
    monkeypatch.setattr(made_images, "EPOCH_IMAGES", 80)
    path = tmp_path / "older.pth"
    checkpoint = storage.load_checkpoint(tiny_run[0] / "checkpoints" / "teacher_vae.pth")
    older = {key: value for key, value in checkpoint.items() if key != "codes"}
    storage.save_checkpoint(path, older)
    train(tmp_path / "mixed", "--teacher", str(path), "--teacher-images", "0.5", "--epochs", "1")
    assert "measured on dead-leaves" in capsys.readouterr().out
    train(tmp_path / "none", "--teacher", str(path), "--data", "none", "--epochs", "1")
    assert "drawn from N(0, I)" in capsys.readouterr().out


def test_few_images_are_told_what_helps(tiny_run, tmp_path, capsys, without_pictures):
    advice = "70 images are few: --teacher checkpoints/teacher_cifar10.pth --teacher-images 0.9"
    assert advice in tiny_run[1]
    train(tmp_path, *teacher_of(tiny_run[0]), "--data", "none", "--epochs", "1")
    assert "are few" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [("--data", "none"), ("--data", "none", "--teacher", "none"), ("--teacher-images", "0.5")],
)
def test_only_a_trained_teacher_makes_pictures(tmp_path, flags):
    with pytest.raises(InputError, match="only a trained teacher makes pictures"):
        train(tmp_path, *flags)
    assert not list(tmp_path.rglob("*.pth"))


def test_the_statistics_are_of_the_teachers_training_images(tiny_run):
    run, _ = tiny_run
    checkpoint = storage.load_checkpoint(run / "checkpoints" / "teacher_vae.pth")
    assert checkpoint["codes"]["covariance"].shape == (128, 128)
    assert checkpoint["residual_spectrum"].shape == (32, 17, 3, 3)
    # By Parseval the spectrum's trace is the error, which is that of the training images.
    trace = checkpoint["residual_spectrum"].diagonal(dim1=2, dim2=3).real.sum(2)
    both_halves = trace[:, 1:16].sum() * 2 + trace[:, [0, 16]].sum()
    assert both_halves.item() / 3072 == pytest.approx(checkpoint["rows"][-1]["val_mse"], rel=0.3)
