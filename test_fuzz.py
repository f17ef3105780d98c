"""Input that makes no sense, by the hundred (Hypothesis): everything ends in one sentence.

    pytest test_fuzz.py                                # a few hundred cases
    pytest test_fuzz.py --hypothesis-profile=long      # 19,500, other ones each time
"""

import contextlib
import importlib
import io
import pickle
import zipfile

import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st

import data
import models
import storage
from runtime import InputError
from settings import parse_settings
from test_settings import KINDS
from testing import TouchesWhenLoaded, write_images
from tiny_vae_32 import TinyVAE32
from vae import VAE


def ends_in_a_sentence(function, *arguments):
    """Call it. It may succeed, or raise an InputError of one line; anything else is a failure."""
    try:
        return function(*arguments)
    except InputError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)


# --- Checkpoints ---


@pytest.fixture(scope="module")
def whole():
    """A small student's checkpoint, as bytes."""
    torch.manual_seed(0)
    vae = TinyVAE32(4, (2, 2, 2, 2), (2, 2, 2, 2))
    file = io.BytesIO()
    torch.save({"architecture": vae.architecture, "model": vae.state_dict(), "record": {}}, file)
    return file.getvalue()


@given(at=st.floats(0, 1), new=st.binary(min_size=1, max_size=64), how=st.sampled_from("ric"))
def test_a_damaged_checkpoint(whole, tmp_path, at, new, how):
    """Bytes replaced, inserted, or cut off, anywhere."""
    i = int(at * len(whole))
    content = {"r": whole[:i] + new + whole[i + len(new):], "i": whole[:i] + new + whole[i:],
               "c": whole[:i]}[how]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    ends_in_a_sentence(models.load_model, path, VAE)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([torch.zeros(2), torch.tensor(float("nan")), torch.zeros(3).half()]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=8,
)


@given(name=st.sampled_from(["TinyVAE32", "StandardVAE", "Other", 3, [], None]),
       arguments=st.dictionaries(
           st.sampled_from(["latent_dim", "encoder_channels", "decoder_channels", "channels", "x"]),
           values | st.lists(st.integers(-2, 2**40), min_size=4, max_size=4)),
       model=values)
@example("TinyVAE32", {"encoder_channels": [50_000] * 4}, {})  # 90 GB, if it were allocated
def test_a_checkpoint_of_other_plain_data(tmp_path, name, arguments, model):
    path = tmp_path / "model.pth"
    architecture = arguments | ({} if name is None else {"name": name})
    storage.save_checkpoint(path, {"architecture": architecture, "model": model})
    with pytest.raises(InputError) as caught:
        models.load_model(path, VAE)
    assert "\n" not in str(caught.value)


def change(weights, name, how):
    tensor = weights[name]
    weights[name] = {
        "NaN": lambda: torch.full_like(tensor, float("nan")),
        "infinity": lambda: torch.full_like(tensor, float("inf")),
        "double": tensor.double, "integers": tensor.int, "sparse": tensor.to_sparse,
        "flat": lambda: tensor.new_zeros(tensor.numel() + 1),
        "expanded": lambda: torch.zeros(1).expand(10**9),
        "a number": lambda: 1.0, "nothing": lambda: None,
    }[how]()


CHANGES = ("NaN", "infinity", "double", "integers", "sparse", "flat", "expanded", "a number",
           "nothing")


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_do_not_fit(whole, tmp_path, layer, how):
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    names = [name for name in checkpoint["model"] if name.endswith("weight")]
    change(checkpoint["model"], names[layer], how)
    path = tmp_path / "model.pth"
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"the weights in .*model.pth do not fit|damaged"):
        models.load_model(path, VAE)


def test_an_archive_that_unpacks_to_more_than_it_is(whole, tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED
    ) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
    with pytest.raises(InputError, match="damaged or not a PyTorch checkpoint"):
        storage.load_checkpoint(path)


def test_a_pickle_that_calls_something(tmp_path):
    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        path = tmp_path / "model.pth"
        save({"model": TouchesWhenLoaded(tmp_path / "called")}, path)
        with pytest.raises(InputError, match=r"could run code|damaged"):
            storage.load_checkpoint(path)
        assert not (tmp_path / "called").exists()


# --- Images ---


@given(content=st.binary(max_size=200), suffix=st.sampled_from(data.import_torchvision()
       .datasets.folder.IMG_EXTENSIONS), start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"BM",
       b"\xff\xd8\xff\xe0", b"P6\n", b"II*\0", b"RIFF"]))
def test_a_file_that_is_no_image(tmp_path, content, suffix, start):
    path = tmp_path / f"image{suffix}"
    path.write_bytes(start + content)
    ends_in_a_sentence(data.decode_images, [path], "")


@given(at=st.floats(0, 1), new=st.binary(max_size=32),
       format=st.sampled_from(["PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"]))
def test_a_damaged_image(tmp_path, at, new, format):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 32)).convert("RGB").save(file, format)
    content = file.getvalue()
    i = int(at * len(content))
    path = tmp_path / "image.png"  # PIL looks at the content
    path.write_bytes(content[:i] + new + (content[i + len(new):] if new else b""))
    ends_in_a_sentence(data.decode_images, [path], "")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_images_of_all_modes_and_sizes_become_rgb(tmp_path, mode, size):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", size, (255, 255, 255)).convert(mode).save(path)
    found = data.decode_images([path], "")
    assert found.shape == (1, 3, 32, 32) and found.min() >= 254


def test_images_that_would_be_read_wrong(tmp_path):
    deep = tmp_path / "deep.png"
    Image.new("I;16", (32, 32), 20_000).save(deep)
    with pytest.raises(InputError, match=r"more than 8 bits a channel: PIL's mode I;16.*: replace"):
        data.read_image(deep)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    with pytest.raises(InputError, match=r"could not read the image .*decompression bomb"):
        data.read_image(bomb)
    turned, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x112] = 6  # the camera was turned: the first row is the right column
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 32, 4))
    image.save(turned, exif=exif)
    found = data.read_image(turned)
    assert found.size == (16, 32)
    assert found.getpixel((15, 16))[0] > 200 > found.getpixel((1, 16))[0] + 100


def test_a_folder_that_contains_itself(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "elsewhere", 2, first=2)
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    assert len(data.list_images(tmp_path / "train")) == 4
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "train")
    with pytest.raises(InputError, match=r"back is a link to a folder that it lies in: remove it"):
        data.list_images(tmp_path / "train")


# --- Flags and constants ---

words = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
objects = values | st.binary(max_size=4) | st.complex_numbers() | st.sets(st.integers(), max_size=3)


@given(script=st.sampled_from(sorted(KINDS)), choice=st.data())
def test_any_word_after_any_flag(script, choice):
    module = importlib.import_module(script)
    name = choice.draw(st.sampled_from(sorted(module.KINDS)))
    word = choice.draw(words)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parse_settings(vars(module), [f"--{name.lower().replace('_', '-')}={word}"])
    except SystemExit as end:
        assert end.code == 2
        assert printed.getvalue().startswith("error: ")
        assert printed.getvalue().count("\n") == 1


@given(script=st.sampled_from(sorted(KINDS)), choice=st.data())
def test_any_value_in_place_of_a_constant(script, choice):
    module = importlib.import_module(script)
    name = choice.draw(st.sampled_from(sorted(module.KINDS)))
    edited = vars(module) | {name: choice.draw(objects)}
    ends_in_a_sentence(parse_settings, edited, [])
