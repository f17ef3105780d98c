"""Exported files: ONNX and ExecuTorch programs are the student that PyTorch runs."""

import contextlib
import json
import math
import sys

import pytest
import torch
from PIL import Image

import export_tinyvae
from common import models, onnx_models, storage, synthetic
from common.runtime import InputError
from common.settings import parse_settings
from tests.testing import HERE, random_images
from tiny_vae_32 import TinyVAE32

EXPORT = ("--student", str(models.RELEASED), "--data", "dead-leaves", "--limit", "300")


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
        return [torch.from_numpy(output) for output in session.run(None, {port.name: x.numpy()})]

    for count in (1, 3, 70):  # any number of images
        images = random_images(count)
        mu, logvar = vae.encode(images)
        for suffix, tolerance in (("", 1e-4), ("_fp16", 2e-2)):
            outputs = [*run(f"encoder{suffix}.onnx", images),
                       *run(f"decoder{suffix}.onnx", mu.detach())]
            expected = [mu, logvar, vae.decode(mu)]
            torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=0)
    for name in size:
        model = onnx.load(tmp_path / name)
        notes = {note.key: note.value for note in model.metadata_props}
        assert "[0, 1]" in notes["image"] and notes["student_sha256"] == storage.fingerprint(vae)
        assert (notes.get("calibrated_on") == "300 images of dead-leaves") == ("int8" in name)
        assert str(HERE).encode() not in (tmp_path / name).read_bytes()
    for name in ("encoder.onnx", "decoder.onnx"):
        assert (web / name).read_bytes() == (tmp_path / name).read_bytes()
    assert json.loads((web / "model.json").read_text()) == {"parameters": 294_403, "latents": 64}
    assert Image.open(web / "examples.png").size == (32 * export_tinyvae.WEB_EXAMPLES, 32)
    kinds = [node.op_type for node in onnx.load(tmp_path / "decoder_int8.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 5  # before the linear layer and the four convolutions


def test_a_model_hub_gets_weights_and_a_card_whose_code_runs(tmp_path, monkeypatch):
    needs_onnx()
    safetensors = pytest.importorskip("safetensors")
    flags = ["--hub", "--licence", "mit", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags])
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    path = tmp_path / "hub" / "tinyvae.safetensors"
    assert_same_state(models.load_model(path, TinyVAE32)[0], vae)
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    assert json.loads(about["architecture"]) == vae.architecture and about["licence"] == "mit"
    card = path.with_name("README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert 'license: "mit"\n' in front and 'datasets: ["cifar10-jpeg"]\n' in front
    assert "294,403 parameters" in body and "| 300 test images |" in body
    assert "Trained for 100 epochs on 45,000 images of cifar10-jpeg." in body
    monkeypatch.chdir(path.parent)
    names = {"images": random_images(2)}
    exec(body.split("```python\n")[1].split("```")[0], names)
    torch.testing.assert_close(names["reconstruction"], vae(names["images"])[0])


def assert_same_state(vae, other):
    for name, tensor in other.state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor), name


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


@pytest.mark.parametrize(
    ("name", "figures", "message"),
    [
        ("ONNX int8", {"mse_change": 0.01, "kl_change": -0.0125}, None),
        ("ONNX int8", {"mse_change": -0.3, "kl_change": 0.0}, None),
        ("ONNX int8", {"mse_change": 0.03, "kl_change": 0.0},
         r"its error differs by 3\.0% and its KL by 0\.0%, beyond --int8-tolerance 0\.02"),
        ("ONNX int8", {"mse_change": 0.0, "kl_change": -0.1}, r"its KL by 10\.0%"),
        ("ONNX fp16", {"largest": {"mu": 0.01, "image": 0.001}}, None),
        ("ONNX fp16", {"largest": {"mu": 0.1, "image": 0.001}}, r"0\.1 \(mu\), 0\.001 \(image\)"),
        ("ONNX fp16", {"largest": {"mu": 0.0, "image": math.nan}}, "beyond --fp16-tolerance"),
    ],
)
def test_each_form_is_held_to_its_tolerance(name, figures, message):
    settings = parse_settings(vars(export_tinyvae), [])
    form = onnx_models.Form(name, {}, None, None)
    refused = pytest.raises(InputError, match=message) if message else contextlib.nullcontext()
    with refused:
        export_tinyvae.refuse_difference(form, figures, settings)


def test_values_that_are_no_numbers_do_not_pass_for_equal():
    vae = TinyVAE32().eval()
    vae.check_range = False
    reference = onnx_models.Form("PyTorch fp32", {}, vae.encode, vae.decode)
    nothing = reference._replace(decode=lambda z: vae.decode(z) * math.nan)
    images = synthetic.dead_leaves(4, "test")
    outputs = export_tinyvae.run_form(reference, images)
    figures = export_tinyvae.measure(nothing, outputs, images)
    assert math.isnan(figures["largest"]["image"]) and figures["largest"]["mu"] == 0


def test_a_missing_package_is_named_with_its_installation(tmp_path, monkeypatch):
    flags = [*EXPORT, "--export-dir", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"onnx is needed.*-r requirements-dev\.txt"):
        export_tinyvae.main(flags)


def test_executorch_programs_are_the_student(tmp_path, capsys):
    needs_onnx()
    pytest.importorskip("executorch")
    flags = ["--executorch", "--int8", "--int8-tolerance", "0.1", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags])  # it compares them with PyTorch
    assert "| ExecuTorch int8" in capsys.readouterr().out
    sizes = [(tmp_path / name).stat().st_size for name in ("tinyvae.pte", "tinyvae_int8.pte")]
    assert sizes[1] < 0.3 * sizes[0] < 400_000
