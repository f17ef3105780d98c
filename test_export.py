"""Exported files: ONNX and ExecuTorch programs are the student that PyTorch runs."""

import json
import math
import sys

import pytest
import torch
from PIL import Image

import data
import export_tinyvae
import models
import onnx_models
import storage
from runtime import InputError
from settings import parse_settings
from testing import HERE, random_images
from tiny_vae_32 import TinyVAE32

EXPORT = ("--student", str(models.RELEASED), "--data", "dead-leaves", "--limit", "256")


def needs_onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


def test_exported_files_are_the_student(tmp_path, capsys, monkeypatch):
    onnx, runtime_library = needs_onnx()
    monkeypatch.setattr(export_tinyvae, "WEB_DIR", tmp_path / "web")
    tmp_path, web = tmp_path / "onnx", tmp_path / "web"
    flags = ["--fp16", "--int8", "--int8-tolerance", "0.1", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags, "--web"])
    table = capsys.readouterr().out
    for form in ("PyTorch fp32", "ONNX fp32", "ONNX fp16", "ONNX int8"):
        assert f"| {form}" in table
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(size) == {
        f"{part}{form}.onnx" for part in ("encoder", "decoder") for form in ("", "_fp16", "_int8")
    }
    for part in ("encoder", "decoder"):
        assert size[f"{part}_fp16.onnx"] < 0.55 * size[f"{part}.onnx"]
        assert size[f"{part}_int8.onnx"] < 0.30 * size[f"{part}.onnx"]

    def run(name, x):
        session = runtime_library.InferenceSession(tmp_path / name)
        (port,) = session.get_inputs()
        return [torch.from_numpy(found) for found in session.run(None, {port.name: x.numpy()})]

    for count in (1, 3, 70):  # any number of images
        images = random_images(count)
        mu, logvar = vae.encode(images)
        for suffix, tolerance in (("", 1e-4), ("_fp16", 2e-2)):
            found = run(f"encoder{suffix}.onnx", images)
            torch.testing.assert_close(found[0], mu, atol=tolerance, rtol=0)
            torch.testing.assert_close(found[1], logvar, atol=tolerance, rtol=0)
            (decoded,) = run(f"decoder{suffix}.onnx", mu.detach())
            torch.testing.assert_close(decoded, vae.decode(mu), atol=tolerance, rtol=0)
    for name in size:
        model = onnx.load(tmp_path / name)
        notes = {note.key: note.value for note in model.metadata_props}
        assert "[0, 1]" in notes["image"] and notes["student_sha256"] == storage.fingerprint(vae)
        assert (notes.get("calibrated_on") == "256 images of dead-leaves") == ("int8" in name)
        assert str(HERE).encode() not in (tmp_path / name).read_bytes()
    for name in ("encoder.onnx", "decoder.onnx"):
        assert (web / name).read_bytes() == (tmp_path / name).read_bytes()
    assert json.loads((web / "model.json").read_text()) == {"parameters": 294_403, "latents": 64}
    assert Image.open(web / "examples.png").size == (32 * export_tinyvae.WEB_EXAMPLES, 32)
    kinds = [node.op_type for node in onnx.load(tmp_path / "decoder_int8.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 5  # before the linear layer and the four convolutions


def test_a_form_that_is_not_the_student_is_not_written(tmp_path, monkeypatch):
    needs_onnx()
    split_vae = onnx_models.split_vae

    def damaged(vae):
        parts = split_vae(vae)
        with torch.no_grad():
            parts[1].vae.decoder[0].weight[0] += 0.1
        return parts

    monkeypatch.setattr(export_tinyvae, "split_vae", damaged)
    with pytest.raises(InputError, match="ONNX fp32 is not the student: a value differs"):
        export_tinyvae.main([*EXPORT, "--export-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_each_form_is_held_to_its_tolerance():
    settings = parse_settings(vars(export_tinyvae), [])
    true = {"mse": 0.01, "kl_nats": 80.0}

    def refuse(name, **found):
        form = onnx_models.Form(name, {}, None, None)
        found = {"mse": 0.01, "kl_nats": 80.0, "largest": {"mu": 0.0, "image": 0.5}} | found
        export_tinyvae.refuse_difference(form, found, true, settings)

    refuse("ONNX int8", mse=0.0101, kl_nats=79.0)
    with pytest.raises(InputError, match=r"error differs by 3\.0%, beyond --int8-tolerance 0\.02"):
        refuse("ONNX int8", mse=0.0103)
    with pytest.raises(InputError, match=r"rate differs by 10\.0%"):
        refuse("ONNX int8", kl_nats=72.0)
    refuse("ONNX fp16", largest={"mu": 0.01, "image": 0.001})
    for value in (0.1, math.nan):
        with pytest.raises(InputError, match="beyond --fp16-tolerance"):
            refuse("ONNX fp16", largest={"mu": value, "image": 0.001})


def test_values_that_are_no_numbers_do_not_pass_for_equal():
    nothing = onnx_models.Form(
        "ONNX fp16",
        {},
        lambda images: torch.full((2, len(images), 64), math.nan).unbind(),
        lambda z: torch.full((len(z), 3, 32, 32), math.nan),
    )
    vae = TinyVAE32().eval()
    vae.check_range = False
    reference = onnx_models.Form("PyTorch fp32", {}, vae.encode, vae.decode)
    found = export_tinyvae.measure(nothing, reference, data.dead_leaves(4, "test"))
    assert all(math.isnan(value) for value in found["largest"].values())


def test_a_missing_package_is_named_with_its_installation(tmp_path, monkeypatch):
    flags = [*EXPORT, "--export-dir", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"onnx is needed.*-r requirements-deploy\.txt"):
        export_tinyvae.main(flags)


def test_executorch_programs_are_the_student(tmp_path, capsys):
    needs_onnx()
    pytest.importorskip("executorch")
    flags = ["--executorch", "--int8", "--int8-tolerance", "0.1", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags])  # it compares them with PyTorch
    assert "| ExecuTorch int8" in capsys.readouterr().out
    sizes = [(tmp_path / name).stat().st_size for name in ("tinyvae.pte", "tinyvae_int8.pte")]
    assert sizes[1] < 0.3 * sizes[0] < 400_000
