"""Files that hold weights: written whole or not at all, loaded as data, ours and others'."""

import io
import os
import subprocess
import sys

import pytest
import torch

from common import models, storage
from common.runtime import InputError
from standard_vae import StandardVAE
from tests.testing import HERE, on_posix, random_images
from tiny_vae_32 import TinyVAE32


@on_posix
def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    storage.write_bytes(path, b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from common import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # as a full disk does
        "storage.write_bytes(sys.argv[2], b'new' * 1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, HERE, path], capture_output=True, text=True
    )
    assert "InputError: could not write" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert done.stderr.endswith("): free some space or choose another folder\n")
    remedy = "its folder was removed, renamed or replaced; put it back and try again$"
    for folder in (path, tmp_path / "no folder"):
        with pytest.raises(InputError, match=rf"could not write .*: {remedy}"):
            storage.write_bytes(folder / "table.csv", b"new")


def test_checkpoints_are_loaded_onto_the_cpu_and_run_no_code(tmp_path, monkeypatch):
    asked, load = {}, torch.load
    path = tmp_path / "model.pth"
    storage.save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(torch, "load", lambda path, **how: asked.update(how) or load(path, **how))
    assert storage.load_checkpoint(path) == {"epoch": 1}
    assert asked == {"map_location": "cpu", "weights_only": True}


def test_bad_checkpoints_are_refused_in_a_sentence(tmp_path):
    path, vae = tmp_path / "model.pth", TinyVAE32()
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    whole = path.read_bytes()

    def saved(thing):
        file = io.BytesIO()
        torch.save(thing, file)
        return file.getvalue()

    for content, message in (
        (whole[: len(whole) // 2], r"damaged|plain data"),
        (b"", r"damaged|plain data"),
        (b"not a checkpoint", r"damaged|plain data"),
        (saved(vae), "not a checkpoint of plain data"),  # a pickled module: code
        (saved([1, 2]), "holds a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            storage.load_checkpoint(path)
    for other in (tmp_path, os.devnull):  # not read: a device may have no end
        with pytest.raises(InputError, match=r"could not read .* \(a folder or a device"):
            storage.load_checkpoint(other)
    with pytest.raises(InputError, match="there is no checkpoint"):
        storage.load_checkpoint(tmp_path / "nowhere.pth")


def test_a_checkpoint_builds_the_model_it_describes_and_no_other(tmp_path):
    path = tmp_path / "model.pth"
    vae = TinyVAE32(latent_dim=8, decoder_channels=(10, 9, 8, 7)).eval()
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    built, checkpoint = models.load_model(path, TinyVAE32)
    images = random_images(2)
    assert torch.equal(built(images)[0], vae(images)[0])
    with pytest.raises(InputError, match="holds a TinyVAE32, but a StandardVAE is needed"):
        models.load_model(path, StandardVAE)
    checkpoint["architecture"]["latent_dim"] = 9
    storage.save_checkpoint(path, checkpoint)
    with pytest.raises(InputError, match="do not fit"):
        models.load_model(path, TinyVAE32)
    storage.save_checkpoint(path, {"weights": 1})
    with pytest.raises(InputError, match="not a model checkpoint"):
        models.load_model(path, TinyVAE32)


# --- Weights that another program saved ---

SMALL = TinyVAE32(latent_dim=8, encoder_channels=(4, 5, 6, 7), decoder_channels=(7, 6, 5, 4)).eval()
WEIGHTS = SMALL.state_dict()
TEACHER = StandardVAE(16, (4, 5, 6, 7))


def under(prefix, weights=WEIGHTS):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (WEIGHTS, ""),
        (under("module."), "module."),
        (under("_orig_mod.module."), "_orig_mod.module."),
        ({"epoch": 3, "model_state_dict": WEIGHTS}, "model_state_dict/"),
        ({"state_dict": under("student.") | under("teacher.", TEACHER.state_dict()),
          "optimizer": {"state": {0: {"step": 1}}}}, "state_dict/student."),
        ({name: tensor.half() if tensor.is_floating_point() else tensor
          for name, tensor in WEIGHTS.items()}, ""),
    ],
)
def test_a_state_dict_of_another_program_is_loaded(content, where, tmp_path, capsys):
    path = tmp_path / "theirs.pth"
    torch.save(content, path)
    vae, checkpoint = models.load_model(path, TinyVAE32)
    images = random_images(2)
    torch.testing.assert_close(vae(images)[0], SMALL(images)[0], rtol=0, atol=1e-3)
    assert checkpoint["architecture"] == SMALL.architecture
    printed = capsys.readouterr().out
    assert f"theirs.pth: a state dict{where and f' under {where}'}, taken as {{" in printed


def test_a_teacher_and_a_safetensors_file_of_another_program_are_loaded(tmp_path, monkeypatch):
    torch.save(under("module.", TEACHER.state_dict()), tmp_path / "theirs.pth")
    teacher, _ = models.load_model(tmp_path / "theirs.pth", StandardVAE)
    assert teacher.architecture == TEACHER.architecture
    path = tmp_path / "theirs.safetensors"
    pytest.importorskip("safetensors.torch").save_file(WEIGHTS, path)
    assert models.load_model(path)[0].architecture == SMALL.architecture
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is damaged or not a"):
        models.load_model(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match=r"safetensors\.torch is needed .*pip install safetensors"):
        models.load_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": WEIGHTS, "model": WEIGHTS}, "it holds several networks, ema/, model/: save"),
        (TEACHER.state_dict(), "there is no TinyVAE32 in it"),
        ({"fc_mu.weight": torch.zeros(2, 2)}, "there is no TinyVAE32 in it"),
        ({name: x for name, x in WEIGHTS.items() if name != "fc_mu.bias"}, "fc_mu.bias is in one"),
        (WEIGHTS | {"fc_mu.bias": torch.full((8,), torch.nan)}, "fc_mu.bias holds NaN"),
        (WEIGHTS | {"fc_mu.bias": torch.zeros(8).double()}, "fc_mu.bias is torch.float64, not"),
        (WEIGHTS | {"fc_mu.bias": torch.zeros(8, 1)}, r"fc_mu.bias is \[8, 1\], not \[8\]$"),
    ],
)
def test_other_state_dicts_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "theirs.pth")
    expected = None if "several" in message else TinyVAE32
    with pytest.raises(InputError, match=message):
        models.load_model(tmp_path / "theirs.pth", expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "a list in place of a state dict"),
        (WEIGHTS | {"fc_mu.bias": 1.0}, r"fc_mu.bias is float, not \[8\]$"),
        (WEIGHTS | {"fc_mu.bias": torch.zeros(8).to_sparse()}, "fc_mu.bias is torch.sparse_coo"),
    ],
)
def test_what_is_no_tensor_of_a_network_is_told(weights, message):
    with pytest.raises(ValueError, match=message):
        storage.refuse_other_weights(weights, WEIGHTS)
