"""Export a student: ONNX files in fp32, fp16 and INT8, and ExecuTorch programs for phones.

    python export_tinyvae.py                      # onnx/encoder.onnx and onnx/decoder.onnx
    python export_tinyvae.py --fp16 --int8        # half precision and INT8 beside them
    python export_tinyvae.py --int8 --executorch --int8-tolerance 0.07   # and two .pte files
    python export_tinyvae.py --web                # renew what the page in web/ shows
    python export_tinyvae.py --hub                # safetensors and a card, for a model hub
    python export_tinyvae.py --student PATH --export-dir onnx/mine --data PATH

The encoder takes an image to mu and logvar, the decoder a latent to an image; images are float32,
N×3×32×32, RGB in [0, 1], for any N (to 64 in a .pte). INT8 is static, with quantise and dequantise
nodes (QDQ), symmetric, one scale a channel for weights: what TensorRT and ONNX Runtime read.

Every form is run on the test images and compared with PyTorch, fp32 and fp16 value by value, INT8
by error and KL; if one is beyond its tolerance, nothing is written. Prints a table. Takes a minute
or two. Needs `pip install -r requirements-dev.txt`, and --executorch `pip install executorch`.
"""

import copy
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from common import kind
from common.data import evenly_spaced, to_float
from common.hub import hub_files
from common.losses import kl_divergence
from common.metrics import encode_means, median_seconds
from common.models import count_parameters, find_images, find_student, load_model, weight_bytes
from common.onnx_models import Form, onnx_form, silence, split_vae, strip, to_onnx
from common.runtime import InputError, describe_device, print_table, require, run_script
from common.settings import parse_settings
from common.storage import check_writable, write_bytes
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What to export ---
# a file in the checkpoint folder, or a path; None: the best there, or released
STUDENT: kind.FileOrNone = None
FP16: kind.Switch = False  # half precision too: half the bytes
INT8: kind.Switch = False  # INT8 too: a quarter of the bytes
# .pte programs for phones (XNNPACK) too, of fp32 and, with --int8, of INT8
EXECUTORCH: kind.Switch = False
WEB: kind.Switch = False  # put the student and example images into web/ as well
HUB: kind.Switch = False  # hub/tinyvae.safetensors and hub/README.md, a model card, as well
LICENCE: kind.text() = "unknown"  # of the weights, as hubs name it: mit, apache-2.0, ...

# --- Images: INT8 is calibrated on the training split, everything is measured on the test split ---
DATA: kind.text(none=None) = None  # as in distill_tinyvae.py; None: what the student was trained on
# use the first N training images; 0: as many as the student saw, or all of DATA
LIMIT: kind.CountOr0 = 0
CALIBRATION_IMAGES: kind.Count = 512  # training images that INT8's ranges are taken from
# of activations that INT8's ranges cover: outliers are clipped, since they coarsen the scale
PERCENTILE: kind.number(50, 100, above=True) = 99.95

# --- Tolerances: if a form is beyond its own, nothing is written ---
FP32_TOLERANCE: kind.Positive = 1e-4  # largest difference of any mu, logvar or pixel from PyTorch's
FP16_TOLERANCE: kind.Positive = 3e-2  # the same in half precision
INT8_TOLERANCE: kind.Positive = 0.02  # how much error may rise and KL change, as a fraction

# --- Files ---
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"  # folder of the .pth files
EXPORT_DIR: kind.Folder = HERE / "onnx"  # folder of what is exported

# --- Not settings ---

WEB_DIR = HERE / "web"
WEB_EXAMPLES = 10  # test images that the page offers
BATCHES = (1, 64)  # images at once when speed is measured


# --- Forms: their packages are imported where used; `main` says which is missing ---


@silence()
def make_forms(vae, record, images, settings):
    """The forms asked for; INT8 is calibrated on training `images`."""
    parts = split_vae(vae)
    models = {part.name: to_onnx(part, vae, record) for part in parts}
    forms = [onnx_form("ONNX fp32", "", models)]
    if settings.fp16:
        from onnxruntime.transformers.float16 import convert_float_to_float16 as to_fp16

        halves = {name: to_fp16(copy.deepcopy(models[name]), keep_io_types=True) for name in models}
        forms.append(onnx_form("ONNX fp16", "_fp16", halves))
    if settings.int8:
        some = evenly_spaced(images.train, settings.calibration_images)
        examples = {"encoder": to_float(some).contiguous(), "decoder": encode_means(vae, some)}
        quantised = {}
        for part in parts:
            model = to_int8(models[part.name], part, examples[part.name], settings.percentile)
            note = f"{len(some)} images of {images.record['data']}"
            model.metadata_props.add(key="calibrated_on", value=note)
            quantised[part.name] = model
        forms.append(onnx_form("ONNX int8", "_int8", quantised))
    if settings.executorch:
        forms.append(executorch_form("ExecuTorch fp32", "tinyvae.pte", to_executorch(parts)))
    if settings.executorch and settings.int8:
        program = to_executorch(parts, examples)
        forms.append(executorch_form("ExecuTorch int8", "tinyvae_int8.pte", program))
    return forms


def to_int8(model, part, examples, percentile):
    """Weights and the inputs of convolutions and linear layers in INT8, calibrated on examples.

    What comes out of them stays floating point up to the next: rounding SiLU, sigmoid or the code
    would cost error and save nothing.
    """
    import onnx
    from onnxruntime import quantization

    inputs = iter([{part.input: example.numpy()} for example in examples.split(1)])
    layers = ["Conv", "ConvTranspose", "Gemm"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            path,
            SimpleNamespace(get_next=lambda: next(inputs, None)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=layers,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT takes biases in floating point alone
                "OpTypesToExcludeOutputQuantization": layers,
                "CalibPercentile": percentile,
            },
        )
        quantised = onnx.load(path)
    strip(quantised)
    quantised.metadata_props.extend(model.metadata_props)
    return quantised


def to_executorch(parts, examples=None):
    """A program with methods `encode` and `decode` for XNNPACK, batches to 64, as bytes; INT8 where
    there are examples, name of a part → its input, to calibrate on."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    programs = {}
    for part, method in zip(parts, ("encode", "decode")):
        program = torch.export.export(part, (part.example,), dynamic_shapes=sizes)
        if examples:
            scheme = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
            quantizer = xnnpack.XNNPACKQuantizer().set_global(scheme)
            observed = prepare_pt2e(program.module(), quantizer)
            for batch in examples[part.name].split(64):
                observed(batch)
            quantised = convert_pt2e(observed)
            program = torch.export.export(quantised, (part.example,), dynamic_shapes=sizes)
        programs[method] = program
    lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def executorch_form(name, file, content):
    """Runs in ExecuTorch's own runtime on one CPU thread."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)  # unsafe while a program runs; none does
    program = Runtime.get().load_program(content)
    encoder, decoder = program.load_method("encode"), program.load_method("decode")

    def call(method, x):
        # The runtime reuses its memory, and no call takes more than 64.
        outputs = [[tensor.clone() for tensor in method.execute([chunk.contiguous()])]
                   for chunk in x.split(64)]
        return [torch.cat(tensors) for tensors in zip(*outputs)]

    return Form(name, {file: content}, lambda x: call(encoder, x), lambda x: call(decoder, x)[0])


# --- Measuring ---


@torch.no_grad()
def run_form(form, images):
    """The outputs for uint8 images by name, the error of images decoded from mu, KL in nats."""
    outputs = []
    for chunk in images.split(500):
        mu, logvar = form.encode(to_float(chunk))
        outputs.append((mu, logvar, form.decode(mu)))
    mu, logvar, image = map(torch.cat, zip(*outputs))
    mse = (image - to_float(images)).square().mean().item()
    nats = kl_divergence(mu, logvar).sum(1).mean().item()
    return {"mu": mu, "logvar": logvar, "image": image}, mse, nats


@torch.no_grad()
def measure(form, pytorch, images):
    """What the table says of a form. `pytorch` is what `run_form` gives for PyTorch."""
    (outputs, mse, nats), (true_outputs, true_mse, true_nats) = run_form(form, images), pytorch
    differences = {name: outputs[name] - true_outputs[name] for name in outputs}
    figures = {
        "mse": mse,
        "mse_change": mse / true_mse - 1,
        "kl_nats": nats,
        "kl_change": nats / true_nats - 1,
        "largest": {name: values.abs().max().item() for name, values in differences.items()},
        "ms": [],  # an image, at each of BATCHES
    }
    for some in (to_float(images[:batch]).contiguous() for batch in BATCHES):
        seconds = median_seconds(lambda some=some: form.decode(form.encode(some)[0]), some.device)
        figures["ms"].append(1000 * seconds / len(some))
    return figures


def refuse_difference(form, figures, settings):
    """Raise InputError for a form that is not the student it was made from."""
    precision = form.name.split()[-1]
    tolerance = getattr(settings, f"{precision}_tolerance")
    if precision == "int8":
        differences = figures["mse_change"], abs(figures["kl_change"])
        reason = "its error differs by {:.1%} and its KL by {:.1%}".format(*differences)
    else:
        differences = figures["largest"].values()
        values = [f"{value:.2g} ({name})" for name, value in figures["largest"].items()]
        reason = f"a value differs from PyTorch's by {', '.join(values)}"
    if not all(difference <= tolerance for difference in differences):  # not so for NaN
        raise InputError(
            f"nothing was written, since {form.name} is not the student: {reason}, beyond "
            f"--{precision}-tolerance {tolerance:g}; export without that form, or allow for more"
        )


def table_row(name, size, figures, teacher_size):
    return {
        "form": name,
        "bytes": f"{size:,}",
        "smaller": f"{teacher_size / size:.0f}×",
        "MSE": f"{figures['mse']:.5f}",
        "vs PyTorch": f"{figures['mse_change']:+.2%}",
        "KL, nats": f"{figures['kl_nats']:.1f}",
        **{f"Δ {name}": f"{value:.0e}" for name, value in figures["largest"].items()},
        **{f"ms/image, {batch} at once": f"{ms:.3f}" for batch, ms in zip(BATCHES, figures["ms"])},
    }


def web_files(vae, form, test_images):
    """name → bytes of what the page shows: a student in ONNX, what it is, and test images."""
    some = evenly_spaced(test_images, WEB_EXAMPLES)
    row = some.permute(2, 0, 3, 1).flatten(1, 2)  # 32×(N·32)×3
    png = io.BytesIO()
    Image.fromarray(row.numpy()).save(png, "PNG")
    card = {"parameters": count_parameters(vae), "latents": vae.latent_dim}
    return form.files | {"examples.png": png.getvalue(), "model.json": json.dumps(card).encode()}


def main(argv=()):
    settings = parse_settings(globals(), argv)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    if settings.executorch:
        require("executorch", "pip install executorch")
    if settings.hub:
        require("safetensors")
    torch.set_num_threads(1)  # figures are of one thread
    student_path = find_student(settings.student, settings.checkpoint_dir)
    vae, checkpoint = load_model(student_path, TinyVAE32)
    record = checkpoint.get("record", {})
    images, test = find_images(settings.data, settings.limit, student_path, record)
    check_writable(settings.export_dir)
    if settings.web:
        check_writable(WEB_DIR)
    if settings.hub:
        check_writable(settings.export_dir / "hub")
    measured = f"{len(test.images):,} of the test split to measure on"
    if settings.int8:
        calibrated = min(settings.calibration_images, len(images.train))
        measured += f", {calibrated:,} of the training split to calibrate INT8"
    print(f"images   {images.record['data']}: {measured}")
    print(f"device   {describe_device(torch.device('cpu'))}\n")
    vae.check_range = False
    forms = make_forms(vae, record, images, settings)
    pytorch = Form("PyTorch fp32", {}, vae.encode, vae.decode)
    true = run_form(pytorch, test.images)
    figures = {form.name: measure(form, true, test.images) for form in (pytorch, *forms)}
    sizes = {pytorch.name: weight_bytes(vae)}
    sizes |= {form.name: sum(map(len, form.files.values())) for form in forms}
    teacher_size = weight_bytes(StandardVAE())
    print_table([table_row(name, sizes[name], figures[name], teacher_size) for name in figures])
    print(
        "\nbytes: encoder and decoder together. smaller: than the teacher's weights in fp32. MSE: "
        "pixels in [0, 1], decoded\nfrom mu. KL: total, of an image. Δ: largest difference from "
        "PyTorch over all test images. ms/image: encode and\ndecode, medians of 30, one CPU thread."
    )
    for form in forms:
        refuse_difference(form, figures[form.name], settings)
    files = {settings.export_dir / name: content
             for form in forms for name, content in form.files.items()}
    if settings.web:
        page = web_files(vae, forms[0], test.images)
        files |= {WEB_DIR / name: content for name, content in page.items()}
    if settings.hub:
        about = figures[pytorch.name], len(test.images), images.record["data"], settings.licence
        card = hub_files(vae, record, *about)
        files |= {settings.export_dir / "hub" / name: content for name, content in card.items()}
    for path, content in files.items():
        write_bytes(path, content)
    print("\nWritten:", *files, sep="\n  ")


if __name__ == "__main__":
    run_script(main)
