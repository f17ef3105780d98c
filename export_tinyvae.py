"""Export a student: ONNX files in fp32, fp16 and INT8, and ExecuTorch programs for phones.

    python export_tinyvae.py                      # onnx/encoder.onnx and onnx/decoder.onnx
    python export_tinyvae.py --fp16 --int8        # half precision and INT8 beside them
    python export_tinyvae.py --int8 --executorch --int8-tolerance 0.07   # and two .pte files
    python export_tinyvae.py --web                # renew what the page in web/ shows
    python export_tinyvae.py --student PATH --export-dir onnx/mine --data PATH

The encoder takes an image to mu and logvar, the decoder a latent to an image; images are float32,
N×3×32×32, RGB in [0, 1], for any N (to 64 in a .pte). ONNX files say so in their metadata. INT8 is
static, with quantise and dequantise nodes (QDQ), symmetric, one scale a channel for weights, and
calibrated on training images: what TensorRT and ONNX Runtime read.

Every form is run on the test images and compared with PyTorch, fp32 and fp16 value by value, INT8
by error and rate; if one is beyond its tolerance, nothing is written. Prints a table. Takes a
minute or two on a CPU. Needs `pip install -r requirements-deploy.txt`, and for --executorch
`pip install executorch`.
"""

import copy
import io
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from data import spread, to_float
from losses import kl_divergence
from metrics import encode_means, evaluate_images, median_seconds
from models import (
    count_parameters,
    find_images,
    find_student,
    load_model,
    weight_bytes,
)
from onnx_models import Form, onnx_form, silence, split_vae, strip, to_onnx
from runtime import InputError, describe_device, print_table, require, run_script
from settings import file_path, number, parse_settings, switch, text, whole
from standard_vae import StandardVAE
from storage import check_writable, write_bytes
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What to export ---
STUDENT = None  # a file in the checkpoint folder, or a path; None: the best there, or released
FP16 = False  # half precision too: half the bytes
INT8 = False  # INT8 too: a quarter of the bytes
EXECUTORCH = False  # .pte programs for phones (XNNPACK) too, of fp32 and, with --int8, of INT8
WEB = False  # put the student and example images into web/ as well

# --- Images: INT8 is calibrated on the training split, everything is measured on the test split ---
DATA = None  # as in distill_tinyvae.py; None: what the student was trained on
LIMIT = 0  # use the first N training images; 0: as many as the student saw, or all of DATA
CALIBRATION_IMAGES = 512  # training images that INT8's ranges are taken from
PERCENTILE = 99.95  # of activations that INT8's ranges cover: a few large ones cost all others

# --- Tolerances: if a form is beyond its own, nothing is written ---
FP32_TOLERANCE = 1e-4  # largest difference of any mu, logvar or pixel from PyTorch's
FP16_TOLERANCE = 3e-2  # the same in half precision
INT8_TOLERANCE = 0.02  # how much error may rise and rate change, as a fraction

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files
EXPORT_DIR = HERE / "onnx"  # folder of what is exported

KINDS = {
    "STUDENT": file_path(none=None), "FP16": switch(), "INT8": switch(), "EXECUTORCH": switch(),
    "WEB": switch(), "DATA": text(none=None), "LIMIT": whole(0, none=0),
    "CALIBRATION_IMAGES": whole(1), "PERCENTILE": number(50, 100, above=True),
    "FP32_TOLERANCE": number(0, above=True), "FP16_TOLERANCE": number(0, above=True),
    "INT8_TOLERANCE": number(0, above=True), "CHECKPOINT_DIR": file_path(),
    "EXPORT_DIR": file_path(),
}

WEB_DIR = HERE / "web"
WEB_EXAMPLES = 10  # test images that the page offers
BATCHES = (1, 64)  # images at once when speed is measured


# --- ONNX ---


def to_fp16(model):
    """Half-precision weights and arithmetic; inputs and outputs stay float32."""
    float16 = require("onnxruntime.transformers.float16")
    with silence():
        return float16.convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def to_int8(model, part, examples, percentile, source):
    """Weights and the inputs of convolutions and linear layers in INT8, calibrated on examples.

    What comes out of them stays floating point up to the next: rounding SiLU, sigmoid or the code
    would cost error and save nothing. `source` says, in the metadata, what the examples are.
    """
    quantization = require("onnxruntime.quantization")
    onnx = require("onnx")

    class Examples(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(examples.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {part.input: batch.numpy()}

    layers = ["Conv", "ConvTranspose", "Gemm"]
    with tempfile.TemporaryDirectory() as folder, silence():
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            copy.deepcopy(model),
            path,
            Examples(),
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
    quantised.metadata_props.add(key="calibrated_on", value=f"{len(examples)} images of {source}")
    return quantised


# --- ExecuTorch ---


def executorch(module):
    return require(module, "pip install executorch")


def to_executorch(parts, examples=None):
    """The bytes of a program with two methods, `encode` and `decode`, for XNNPACK, batches to 64.

    Args:
        parts: encoder and decoder.
        examples: name of a part → its input, to calibrate INT8 on: weights and activations, those
            of transposed convolutions among them. None: fp32.
    """
    with silence():
        partitioner = executorch("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        quantizer = executorch("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
        exir = executorch("executorch.exir")
        pt2e = executorch("torchao.quantization.pt2e.quantize_pt2e")

        sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        methods = {}
        for part, method in zip(parts, ("encode", "decode")):
            program = torch.export.export(part, (part.example,), dynamic_shapes=sizes)
            if examples:
                scheme = quantizer.get_symmetric_quantization_config(is_per_channel=True)
                observed = pt2e.prepare_pt2e(
                    program.module(), quantizer.XNNPACKQuantizer().set_global(scheme)
                )
                for batch in examples[part.name].split(64):
                    observed(batch)
                quantised = pt2e.convert_pt2e(observed)
                program = torch.export.export(quantised, (part.example,), dynamic_shapes=sizes)
            methods[method] = program
        lowered = exir.to_edge_transform_and_lower(
            methods, partitioner=[partitioner.XnnpackPartitioner()]
        )
        return bytes(lowered.to_executorch().buffer)


# --- Running what was exported ---


def executorch_form(name, file, content):
    with silence():
        bindings = executorch("executorch.extension.pybindings.portable_lib")
        bindings._unsafe_reset_threadpool(1)  # unsafe while a program runs; none does yet
        program = executorch("executorch.runtime").Runtime.get().load_program(content)
        methods = {method: program.load_method(method) for method in ("encode", "decode")}

    def call(method, x):
        # The runtime reuses its memory, and no call takes more than 64.
        found = [
            [tensor.clone() for tensor in methods[method].execute([chunk.contiguous()])]
            for chunk in x.split(64)
        ]
        return [torch.cat(tensors) for tensors in zip(*found)]

    return Form(
        name,
        {file: content},
        lambda images: call("encode", images),
        lambda z: call("decode", z)[0],
    )


# --- Measuring ---


@torch.no_grad()
def measure(form, reference, images):
    """What the table says of a form: error, rate, largest differences from `reference`, speed."""
    largest = {port: torch.zeros(()) for port in ("mu", "logvar", "image")}
    rates = []

    def reconstruct(batch):
        mu, logvar = form.encode(batch)
        found = {"mu": mu, "logvar": logvar, "image": form.decode(mu)}
        true_mu, true_logvar = reference.encode(batch)
        true = {"mu": true_mu, "logvar": true_logvar, "image": reference.decode(true_mu)}
        for port in largest:
            difference = (found[port] - true[port]).abs().max()
            largest[port] = torch.maximum(largest[port], difference)  # NaN, if there is one
        rates.append(kl_divergence(mu, logvar).sum(1))
        return found["image"]

    found = evaluate_images(reconstruct, images)
    found["kl_nats"] = torch.cat(rates).mean().item()
    found["largest"] = {port: value.item() for port, value in largest.items()}
    for batch in BATCHES:
        some = to_float(images[:batch]).contiguous()
        seconds = median_seconds(lambda some=some: form.decode(form.encode(some)[0]), some.device)
        found[f"ms_{batch}"] = 1000 * seconds / len(some)
    return found


def refuse_difference(form, found, true, settings):
    """Raise InputError for a form that is not the student it was made from."""
    if "int8" in form.name:
        changes = {
            "error": found["mse"] / true["mse"] - 1,
            "rate": abs(found["kl_nats"] / true["kl_nats"] - 1),
        }
        flag, what, value = "int8_tolerance", *max(changes.items(), key=lambda change: change[1])
        said = f"its {what} differs by {value:.1%}"
        within = all(change <= settings.int8_tolerance for change in changes.values())
    else:
        flag = "fp16_tolerance" if "fp16" in form.name else "fp32_tolerance"
        within = all(value <= getattr(settings, flag) for value in found["largest"].values())
        said = "a value differs from PyTorch's by " + ", ".join(
            f"{value:.2g} ({port})" for port, value in found["largest"].items()
        )
    if not within:
        raise InputError(
            f"nothing was written, since {form.name} is not the student: {said}, beyond "
            f"--{flag.replace('_', '-')} {getattr(settings, flag):g}; export without that form, "
            "or allow for more"
        )


def table_row(form, found, size, teacher_size, true):
    largest = found["largest"]
    return {
        "form": form.name,
        "bytes": f"{size:,}",
        "smaller": f"{teacher_size / size:.0f}×",
        "MSE": f"{found['mse']:.5f}",
        "vs PyTorch": f"{found['mse'] / true['mse'] - 1:+.2%}",
        "KL, nats": f"{found['kl_nats']:.1f}",
        **{f"Δ {port}": f"{largest[port]:.0e}" for port in largest},
        **{f"ms/image, {batch} at once": f"{found[f'ms_{batch}']:.3f}" for batch in BATCHES},
    }


# --- All together ---


def make_forms(vae, record, images, settings):
    """The forms asked for, one at a time; INT8 is calibrated on training `images`."""
    parts = {part.name: part for part in split_vae(vae)}
    models = {name: to_onnx(part, vae, record) for name, part in parts.items()}
    yield onnx_form("ONNX fp32", "", models)
    if settings.fp16:
        yield onnx_form("ONNX fp16", "_fp16", {name: to_fp16(models[name]) for name in parts})
    examples = None
    if settings.int8:
        calibration = spread(images.train, settings.calibration_images)
        examples = {
            "encoder": to_float(calibration).contiguous(),
            "decoder": encode_means(vae, calibration),
        }
        source = images.record["data"]
        int8 = {
            name: to_int8(models[name], part, examples[name], settings.percentile, source)
            for name, part in parts.items()
        }
        yield onnx_form("ONNX int8", "_int8", int8)
    if settings.executorch:
        content = to_executorch(parts.values())
        yield executorch_form("ExecuTorch fp32", "tinyvae.pte", content)
        if settings.int8:
            content = to_executorch(parts.values(), examples)
            yield executorch_form("ExecuTorch int8", "tinyvae_int8.pte", content)


def web_files(vae, form, test_images):
    """name → bytes of what the page shows: a student in ONNX, what it is, and test images."""
    some = spread(test_images, WEB_EXAMPLES)
    row = some.permute(2, 0, 3, 1).flatten(1, 2)  # 32×(N·32)×3
    png = io.BytesIO()
    Image.fromarray(row.numpy()).save(png, "PNG")
    card = {"parameters": count_parameters(vae), "latents": vae.latent_dim}
    return form.files | {"examples.png": png.getvalue(), "model.json": json.dumps(card).encode()}


def export(settings):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    if settings.executorch:
        executorch("executorch")
    torch.set_num_threads(1)  # figures are of one thread
    student_path = find_student(settings.student, settings.checkpoint_dir)
    vae, checkpoint = load_model(student_path, TinyVAE32)
    record = checkpoint.get("record", {})
    images, test = find_images(settings.data, settings.limit, student_path, record)
    for folder in (settings.export_dir, *([WEB_DIR] if settings.web else [])):
        check_writable(folder)
    calibrated = min(settings.calibration_images, len(images.train))
    print(
        f"images   {images.record['data']}: {len(test.images):,} of the test split to measure on"
        + (f", {calibrated:,} of the training split to calibrate INT8" if settings.int8 else "")
        + f"\ndevice   {describe_device(torch.device('cpu'))}\n"
    )
    vae.check_range = False
    reference = Form("PyTorch fp32", {}, vae.encode, vae.decode)
    true = measure(reference, reference, test.images)
    forms = {form: measure(form, reference, test.images)
             for form in make_forms(vae, record, images, settings)}

    teacher_size = weight_bytes(StandardVAE())
    rows = [table_row(reference, true, weight_bytes(vae), teacher_size, true)]
    for form, found in forms.items():
        rows.append(table_row(form, found, sum(map(len, form.files.values())), teacher_size, true))
    print_table(rows)
    print(
        "\nbytes: encoder and decoder together. smaller: than the teacher's weights in fp32. MSE: "
        "pixels in [0, 1], decoded\nfrom mu. KL: total, of an image. Δ: largest difference from "
        "PyTorch over all test images. ms/image: encode and\ndecode, medians of 30, one CPU thread."
    )
    for form, found in forms.items():
        refuse_difference(form, found, true, settings)
    files = {
        settings.export_dir / name: content
        for form in forms
        for name, content in form.files.items()
    }
    if settings.web:
        page = web_files(vae, next(iter(forms)), test.images)
        files |= {WEB_DIR / name: content for name, content in page.items()}
    for path, content in files.items():
        write_bytes(path, content)
    print("\nWritten:")
    for path in files:
        print(f"  {path}")


def main(argv=None):
    export(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
