"""use_tinyvae.py: pictures, codes and back."""

import numpy as np
import pytest
import torch
from PIL import Image

import use_tinyvae
from common import models
from common.data import to_float
from common.folders import decode_images
from common.runtime import InputError
from tests.testing import write_images


def use(*words):
    use_tinyvae.main([str(word) for word in words])


@pytest.fixture
def pictures(tmp_path):
    """A folder of seven pictures, two of them in a folder inside."""
    write_images(tmp_path / "pictures", 5, size=(48, 40))
    write_images(tmp_path / "pictures" / "more", 2, first=5)
    return tmp_path / "pictures"


TEACHER = models.RELEASED.with_name("teacher_cifar10.pth")
NAMES = ["000.png", "001.png", "002.png", "003.png", "004.png", "more/005.png", "more/006.png"]


def released():
    return models.load_model(models.RELEASED)[0]


def codes_of(folder):
    images, _ = decode_images([folder / name for name in NAMES], "")
    with torch.no_grad():
        return released().encode(to_float(images))


def test_pictures_are_drawn_beside_what_the_student_makes_of_them(pictures, tmp_path, capsys):
    use(pictures, pictures / "000.png", "--output", tmp_path / "out.png")  # named twice, used once
    images, _ = decode_images([pictures / name for name in NAMES], "")
    with torch.no_grad():
        made, _, _ = released()(to_float(images))
    mse = (made - to_float(images)).square().mean().item()
    printed = capsys.readouterr().out
    assert f"student: MSE {mse:.5f} at " in printed and "mean of 7" in printed
    assert f"Written:\n  {tmp_path / 'out.png'}" in printed
    one = Image.open(tmp_path / "out.png").size
    use(pictures, "--output", tmp_path / "out.png", "--overwrite", "--teacher", models.RELEASED)
    assert Image.open(tmp_path / "out.png").size[1] > one[1]  # a row more


class Same:
    """A VAE whose code is the picture."""

    @staticmethod
    def encode(images):
        mu = images.flatten(1)
        return mu, torch.zeros_like(mu)

    @staticmethod
    def decode(z):
        return z.unflatten(1, (3, 32, 32))


@pytest.mark.parametrize("overlap", [0, 8, 16])
@pytest.mark.parametrize("size", [(32, 32), (20, 75), (97, 64)])
def test_tiles_put_together_are_the_picture(size, overlap):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    made, nats, tiles = use_tinyvae.reconstruct_in_tiles(Same, image, overlap, torch.device("cpu"))
    assert torch.equal(made, image) and nats > 0
    stride = 32 - overlap
    rows, columns = (1 + max(0, -(-(side - 32) // stride)) for side in size)
    assert tiles == rows * columns


def test_one_tile_fades_into_the_next():
    class Numbered(Same):
        @staticmethod
        def decode(z):  # black, then white
            return torch.arange(2.0)[:, None, None, None].expand(2, 3, 32, 32)

    image, device = torch.zeros(3, 32, 56, dtype=torch.uint8), torch.device("cpu")
    made, _, _ = use_tinyvae.reconstruct_in_tiles(Numbered, image, 8, device)
    expected = 255 * torch.cat([torch.zeros(24), torch.arange(1, 9) / 9, torch.ones(24)])
    assert torch.equal(made[0, 0], expected.round().byte())


def test_whole_pictures_go_through_tiles(pictures, tmp_path):
    use(pictures / "000.png", "--tiles", "--output", tmp_path / "one.png")
    one = np.asarray(Image.open(tmp_path / "one.png"))
    assert one.shape == (48, 80, 3)  # original and reconstruction
    assert (one[:, :40] == np.asarray(Image.open(pictures / "000.png"))).all()
    use(pictures, "--tiles", "--output", tmp_path / "all")
    written = sorted((tmp_path / "all").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "all")) for path in written] == NAMES
    assert (np.asarray(Image.open(tmp_path / "all" / "000.png")) == one).all()
    with pytest.raises(InputError, match="7 pictures need a folder: --output without a suffix"):
        use(pictures, "--tiles", "--output", tmp_path / "two.png")
    write_images(tmp_path / "others", 2)  # of the same names
    use(pictures, "--tiles", tmp_path / "others", "--output", tmp_path / "both")
    assert len(list((tmp_path / "both").rglob("*.png"))) == 9
    (pictures / "more" / "006.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 of the images cannot be read"):
        use(pictures, "--tiles", "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    use(pictures, "--tiles", "--output", tmp_path / "six", "--skip-unreadable")
    assert len(list((tmp_path / "six").rglob("*.png"))) == 6


def test_codes_are_written_in_order_and_decoded_again(pictures, tmp_path, capsys):
    mu, logvar = codes_of(pictures)
    use(pictures, "--latents", tmp_path / "codes.npz")
    codes = np.load(tmp_path / "codes.npz")
    torch.testing.assert_close(torch.tensor(codes["mu"]), mu)
    torch.testing.assert_close(torch.tensor(codes["logvar"]), logvar)
    assert codes["names"].tolist() == NAMES
    use(pictures, "--latents", tmp_path / "codes.npy", "--half")
    half = np.load(tmp_path / "codes.npy")
    assert half.dtype == np.float16 and np.allclose(half, mu, atol=0.01)

    use("--decode", tmp_path / "codes.npz", "--output", tmp_path / "decoded")
    for name, z in zip(NAMES, mu):
        pixels = (255 * released().decode(z[None]))[0].detach().permute(1, 2, 0)
        written = np.asarray(Image.open(tmp_path / "decoded" / name))
        assert np.abs(written - pixels.numpy()).max() < 1
    assert "Warning" not in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", mu=mu, names=NAMES, student="another")
    use("--decode", tmp_path / "other.npz", "--output", tmp_path / "other.png")
    assert "holds codes of another student" in capsys.readouterr().out
    use("--decode", tmp_path / "codes.npy", "--output", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_samples_interpolation_and_neighbours(pictures, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        use("--samples", 12, "--seed", seed, "--output", tmp_path / f"{name}.png")
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert (a == b).all() and (a[200:] != c[200:]).any()
    use("--interpolate", pictures / "000.png", pictures / "001.png", "--output", tmp_path / "i.png")
    assert (tmp_path / "i.png").exists()
    mu, _ = codes_of(pictures)
    nearest = (mu - mu[3]).norm(dim=1).argsort()[1:]
    use("--nearest", pictures / "003.png", pictures, "--output", tmp_path / "n.png")
    expected = ", ".join(NAMES[i] for i in nearest)
    assert f"nearest to 003.png are {expected}\n" in capsys.readouterr().out



@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no pictures: name files or folders"),
        (("--samples", "3", "."), "--samples takes no pictures"),
        (("--samples", "3", "--decode", "codes.npz"), "at a time: --decode and --samples are 2"),
        (("nowhere.jpg",), r"there is no file or folder nowhere\.jpg"),
        (("a.png", "--student", TEACHER), "holds a StandardVAE, but a TinyVAE32 is needed"),
        (("a.png", "broken.png", "--skip-unreadable"), "1 of the images cannot be read"),
        (("empty",), "empty holds no images that Pillow opens"),
        (("a.png", "broken.png"), r"1 of the images cannot be .*\n  .*broken\.png: "),
        (("a.png", "--output", "there.png"), r"there\.png is there already: --overwrite rep"),
        (("a.png", "--output", "empty"), r"empty must be a file that ends in \.png"),
        (("a.png", "--output", "out.jpg"), r"out\.jpg must be a file that ends in \.png"),
        (("a.png", "--output", "a.png", "--overwrite"), "a.png is read and would be replaced"),
        (("a.png", "--output", "a.png/out.png"), "could not make the folder a.png"),
        (("a.png", "--latents", "codes.txt"), r"must be a file that ends in \.npz or \.npy"),
        (("--interpolate", "a.png"), "--interpolate needs two pictures, got 1"),
        (("--nearest", "a.png"), "--nearest needs a picture and others"),
        (("--decode", "a.png"), r"a\.png is not a file of latents"),
        (("--decode", "wide.npz"), r"wide\.npz holds latents of 2×65 and 2 names, but .* N×64"),
        (("--decode", "nan.npz"), r"nan\.npz holds NaN or infinity"),
        (("--decode", "out.npz", "--output", "new"), "some names of pictures lead out of new"),
        (("--decode", "same.npz", "--output", "new"), "some pictures have the same name"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(use_tinyvae, "HERE", tmp_path)
    write_images(tmp_path, 1)
    (tmp_path / "000.png").rename(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for name in ("there.png", "broken.png"):
        (tmp_path / name).touch()
    np.savez("wide.npz", mu=np.zeros((2, 65)))
    np.savez("nan.npz", mu=np.full((2, 64), np.nan))
    np.savez("out.npz", mu=np.zeros((1, 64)), names=["../../a"])
    np.savez("same.npz", mu=np.zeros((2, 64)), names=["a", "a"])
    (tmp_path / "outputs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        use(*words)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sheet_in_outputs_is_replaced_by_the_next(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(use_tinyvae, "HERE", tmp_path)
    sheet, drawn = tmp_path / "outputs" / "reconstructions.png", set()
    for name in ("000.png", "001.png"):
        use(pictures / name)
        drawn.add(sheet.read_bytes())
    assert len(drawn) == 2 and list(sheet.parent.glob("*.png")) == [sheet]


def test_unreadable_pictures_are_left_out_where_told_to(pictures, tmp_path, capsys):
    (pictures / "001.png").write_bytes(b"")
    use(pictures, "--latents", tmp_path / "codes.npz", "--skip-unreadable")
    assert np.load(tmp_path / "codes.npz")["names"].tolist() == [NAMES[0], *NAMES[2:]]
    assert "left out 1 that cannot be read (001.png)" in capsys.readouterr().out
