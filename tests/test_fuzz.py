"""Input that makes no sense, by the hundred (Hypothesis): everything ends in one sentence.

    pytest tests/test_fuzz.py                                # a few hundred cases
    pytest tests/test_fuzz.py --hypothesis-profile=long      # 18,000, other ones each time
"""

import contextlib
import io
import pickle
import zipfile

import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st

from common import folders, models, storage
from common.runtime import InputError
from common.settings import parse_settings
from tests.test_settings import SCRIPTS, flag_of, load
from tests.testing import TouchesWhenLoaded, write_images
from tiny_vae_32 import TinyVAE32


def ends_in_a_sentence(function, *arguments):
    """Call it. It may succeed, or raise an InputError of one line; anything else is a failure."""
    try:
        function(*arguments)
    except InputError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)


def as_bytes(save, *arguments):
    file = io.BytesIO()
    save(*arguments, file)
    return file.getvalue()


def damaged(contents):
    """Contents of files with bytes replaced, inserted, or cut off, anywhere."""
    def damage(content, at, new, how):
        i = int(at * len(content))
        end = {"replace": new + content[i + len(new):], "insert": new + content[i:], "cut": b""}
        return content[:i] + end[how]

    new, how = st.binary(min_size=1, max_size=64), st.sampled_from(["replace", "insert", "cut"])
    return st.builds(damage, st.sampled_from(contents), st.floats(0, 1), new, how)


# --- Checkpoints ---

VAE = TinyVAE32(4, (2, 2, 2, 2), (2, 2, 2, 2))
CHECKPOINT = {"architecture": VAE.architecture, "model": VAE.state_dict(), "record": {}}
WHOLE = as_bytes(lambda file: torch.save(CHECKPOINT, file))


@given(content=damaged([WHOLE]))
def test_a_damaged_checkpoint(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    ends_in_a_sentence(models.load_model, tmp_path / "model.pth")


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
tensors = st.sampled_from([torch.zeros(2), torch.tensor(float("nan")), torch.zeros(3).half()])
values = st.recursive(simple | tensors, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.text(max_size=8), inner, max_size=4), max_leaves=8)
shapes = st.dictionaries(
    st.sampled_from(["latent_dim", "encoder_channels", "decoder_channels", "channels", "x"]),
    values | st.lists(st.integers(-2, 2**40), min_size=4, max_size=4))


@given(name=st.sampled_from(["TinyVAE32", "StandardVAE", "Other", 3, [], None]), arguments=shapes,
       model=values)
@example("TinyVAE32", {"encoder_channels": [50_000] * 4}, {})  # 90 GB, if it were allocated
def test_a_checkpoint_of_other_plain_data(tmp_path, name, arguments, model):
    path = tmp_path / "model.pth"
    architecture = arguments | ({} if name is None else {"name": name})
    storage.save_checkpoint(path, {"architecture": architecture, "model": model})
    with pytest.raises(InputError, match=r"^[^\n]*$"):
        models.load_model(path)


@pytest.mark.parametrize("change", [
    lambda tensor: tensor * torch.nan, lambda tensor: tensor + torch.inf, torch.Tensor.double,
    torch.Tensor.int, torch.Tensor.to_sparse, lambda tensor: tensor.new_zeros(tensor.numel() + 1),
    lambda tensor: torch.zeros(1).expand(10**9), lambda tensor: 1.0, lambda tensor: None,
])
def test_weights_that_do_not_fit(tmp_path, change):
    path = tmp_path / "model.pth"
    for name in [name for name in CHECKPOINT["model"] if name.endswith("weight")][:4]:
        weights = CHECKPOINT["model"] | {name: change(CHECKPOINT["model"][name])}
        torch.save(CHECKPOINT | {"model": weights}, path)
        with pytest.raises(InputError, match=r"the weights in .*model.pth do not fit|damaged"):
            models.load_model(path)


def test_files_that_do_more_than_hold_weights(tmp_path):
    path, called = tmp_path / "model.pth", tmp_path / "called"
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive, zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED  # it may unpack to more than there is memory
    ) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
    with pytest.raises(InputError, match="damaged or not a PyTorch checkpoint"):
        storage.load_checkpoint(path)
    for save in (torch.save, pickle.dump):  # it may run code
        path.write_bytes(as_bytes(save, {"model": TouchesWhenLoaded(called)}))
        with pytest.raises(InputError, match=r"could run code|damaged"):
            storage.load_checkpoint(path)
        assert not called.exists()


# --- Images ---

PICTURE = Image.linear_gradient("L").resize((40, 32)).convert("RGB")
PICTURES = [as_bytes(lambda file, kind=kind: PICTURE.save(file, kind))
            for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")]


@given(content=st.binary(max_size=200) | damaged(PICTURES) | st.builds(
           bytes.__add__, st.sampled_from([picture[:8] for picture in PICTURES]), st.binary()),
       suffix=st.sampled_from([".png", ".jpg", ".ppm", ".tif"]))
def test_a_file_that_is_no_image_or_a_damaged_one(tmp_path, content, suffix):
    path = tmp_path / f"image{suffix}"
    path.write_bytes(content)
    ends_in_a_sentence(folders.read_image, path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_images_of_all_modes_and_sizes_become_rgb(tmp_path, mode, size):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", size, (255, 255, 255)).convert(mode).save(path)
    images, _ = folders.decode_images([path], "")
    assert images.shape == (1, 3, 32, 32) and images.min() >= 254


@pytest.mark.parametrize(
    ("image", "message"),
    [(("F", (32, 32), 0.5), r"pixels of an unknown range: PIL's mode F\): replace"),
     (("I", (32, 32), 70_000), r"pixels of an unknown range: PIL's mode I\): replace"),
     (("I", (32, 32), 200), r"pixels of an unknown range: PIL's mode I\): replace"),
     (("1", (20_000, 20_000)), r"could not read the image .*decompression bomb")],
)
def test_images_that_would_be_read_wrong(image, message, tmp_path):
    Image.new(*image).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match=message):
        folders.read_image(tmp_path / "image.tif")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
     ("LA", (0, 128), (127, 127, 127)), ("I;16", 25_700, (100, 100, 100)),
     ("I", 65_535, (255, 255, 255))],
)
def test_transparency_is_on_white_and_16_bits_are_scaled(mode, colour, expected, tmp_path):
    path = tmp_path / ("image.tif" if mode == "I" else "image.png")
    Image.new(mode, (32, 32), colour).save(path)
    assert folders.read_image(path).getpixel((9, 9)) == expected
    assert folders.fit_to_size(folders.read_image(path)).shape == (3, 32, 32)


def test_a_photo_of_a_turned_camera_stands_upright(tmp_path):
    path, image, exif = tmp_path / "turned.jpg", Image.new("RGB", (32, 16)), Image.Exif()
    exif[0x112] = 6  # the first row is the right column
    image.paste((255, 0, 0), (0, 0, 32, 4))
    image.save(path, exif=exif)
    image = folders.read_image(path)
    assert image.size == (16, 32)
    assert image.getpixel((15, 16))[0] > 200 > image.getpixel((1, 16))[0] + 100


def test_a_folder_that_contains_itself(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "elsewhere", 2, first=2)
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    assert len(folders.list_images(tmp_path / "train").paths) == 4
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "train")
    with pytest.raises(InputError, match=r"back is a link to a folder that it lies in: remove it"):
        folders.list_images(tmp_path / "train")


# --- Flags and constants ---

words = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
objects = values | st.binary(max_size=4) | st.complex_numbers() | st.sets(st.integers(), max_size=3)
each_setting = st.sampled_from(SCRIPTS).flatmap(
    lambda script: st.tuples(st.just(script), st.sampled_from(list(load(script)[1]))))


@given(setting=each_setting, word=words)
def test_any_word_after_any_flag(setting, word):
    (script, name), printed = setting, io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parse_settings(load(script)[0], [f"{flag_of(name)}={word}"])
    except SystemExit as end:
        said = printed.getvalue()
        assert (end.code, said.count("\n"), said[:7]) == (2, 1, "error: ")


@given(setting=each_setting, value=objects, has_kind=st.booleans())
def test_any_value_in_place_of_a_constant(setting, value, has_kind):
    script, name = setting
    constants, kinds, _ = load(script)
    kinds = {other: kinds[other] for other in kinds if has_kind or other != name}
    edited = constants | {name: value, "__annotations__": kinds}
    ends_in_a_sentence(parse_settings, edited, [])
