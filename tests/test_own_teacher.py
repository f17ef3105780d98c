"""A teacher that is another program's VAE."""

import pytest
import torch
from torch import nn

import test_trained_model
from common import models, own_teacher, storage
from common.own_teacher import OwnTeacher
from common.runtime import InputError
from common.settings import parse_settings
from common.teacher_outputs import check_teacher
from tests.testing import folders, train


class Theirs(nn.Module):
    """Pixels in [-1, 1], and a map in place of a vector."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 2, 4, stride=4)       # N×2×8×8
        self.up = nn.ConvTranspose2d(2, 3, 4, stride=4)
        with torch.no_grad():  # it keeps red and green, coarsely
            self.down.weight.copy_(torch.eye(2, 3)[..., None, None].expand(-1, -1, 4, 4) / 16)
            self.up.weight.copy_(torch.eye(2, 3)[..., None, None].expand(-1, -1, 4, 4))
            self.down.bias.zero_()
            self.up.bias.zero_()


def encode(network):
    def images_to_code(images):
        mu = network.down(2 * images - 1)
        return mu, torch.full_like(mu, -4)
    return images_to_code


def decode(network):
    return lambda z: network.up(z) / 2 + 0.5


def test_a_student_learns_from_a_foreign_module(tmp_path, monkeypatch, capsys, without_pictures):
    def load(path):
        network = Theirs()
        return OwnTeacher(network, encode(network), decode(network))

    monkeypatch.setattr(own_teacher, "load", load)
    rows = train(tmp_path, "--teacher", "theirs")
    assert float(rows[-1]["latent"]) > 0 and float(rows[-1]["output"]) > 0
    assert "teacher      Theirs, theirs" in capsys.readouterr().out
    record = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_best.pth")["record"]
    assert record["teacher_architecture"] == {"name": "Theirs", "latent_dim": 128}
    train(tmp_path, "--teacher", "theirs", "--resume")  # the same teacher
    (tmp_path / "theirs").touch()
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(vars(test_trained_model), folders(tmp_path))
    evaluated, *_ = test_trained_model.load_models(settings)
    assert isinstance(evaluated["teacher"], OwnTeacher)


def test_a_teacher_that_cannot_be_built_ends_in_a_sentence(monkeypatch):
    def load(path):
        raise OSError("no such model")

    monkeypatch.setattr(own_teacher, "load", load)
    with pytest.raises(InputError, match=r"could not build a teacher from theirs \(no such model"):
        models.load_any_teacher("theirs")


def test_an_encoder_that_checks_the_range_of_pixels_is_taken():
    def strict(images):
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("pixel values must lie in [0, 1]")
        return fine(images)

    teacher = OwnTeacher(nn.Identity(), strict, grey)
    check_teacher(teacher, random_uint8(8), "theirs", 0)


def random_uint8(count):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)


def test_a_code_that_is_a_map_is_flattened_and_comes_back():
    network = Theirs()
    teacher = OwnTeacher(network, encode(network), decode(network))
    images = torch.rand(5, 3, 32, 32)
    images[0], images[1] = 0, 1
    mu, logvar = teacher.encode(images)
    assert mu.shape == logvar.shape == (5, 128) and teacher.latent_dim == 128
    expected = decode(network)(network.down(2 * images - 1)).clamp(0, 1)
    torch.testing.assert_close(teacher.decode(mu), expected)
    shown = torch.sigmoid(teacher.decode_logits(mu))
    torch.testing.assert_close(shown, expected.clamp(1e-3, 1 - 1e-3), rtol=0, atol=1e-5)


def fine(x):
    return x.flatten(1)[:, :70], x.flatten(1)[:, :70]


def grey(z):
    return torch.full((len(z), 3, 32, 32), 0.5)


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (lambda x: x.flatten(1)[:, :70], grey, "encode returns a Tensor, not mu and logvar"),
        (lambda x: (x.mean(), x.mean()), grey, "as mu what is no tensor of 2 codes"),
        (lambda x: (fine(x)[0], None), grey, "as logvar what is no tensor of 2 codes"),
        (lambda x: (fine(x)[0], x), grey, "mu and logvar of different shapes"),
        (lambda x: (fine(x)[0], fine(x)[0] / 0), grey, "logvar with NaN or infinity"),
        (lambda x: x @ x[0, 0, :5], grey, r"encode does not take \(2, 3, 32, 32\) \("),
        (fine, lambda z: z, r"decode returns \(2, 70\), not a tensor N×3×32×32"),
        (fine, lambda z: {"sample": z}, "decode returns a dict, not a tensor N×3"),
        (fine, lambda z: grey(z).numpy(), "decode returns a ndarray, not a tensor"),
        (fine, lambda z: 2 * grey(z) - 2, r"pixels in \[-1, -1\], not in \[0, 1\]"),
        (fine, lambda z: grey(z) / 0 * 0, "pixels in .nan, nan., not"),
    ],
)
def test_what_a_foreign_module_gets_wrong_is_named(encode, decode, message):
    with pytest.raises(InputError, match=message):
        OwnTeacher(nn.Identity(), encode, decode)
