"""A student as ONNX models: its encoder and its decoder, and running them in ONNX Runtime."""

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime import require
from storage import fingerprint
from vae import IMAGE_SHAPE

OPSET = 20  # of ONNX: recent enough for all, old enough for TensorRT 10


class Encoder(nn.Module):
    """image → (mu, logvar)"""

    name, input, outputs = "encoder", "image", ["mu", "logvar"]

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.example = torch.rand(2, *IMAGE_SHAPE)

    def forward(self, image):
        return self.vae.encode(image)


class Decoder(nn.Module):
    """latent → image"""

    name, input, outputs = "decoder", "latent", ["image"]

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.example = torch.randn(2, vae.latent_dim)

    def forward(self, latent):
        return self.vae.decode(latent)


# What goes in and comes out, in the words of the files' metadata.
PORTS = {
    "image": "float32, N×3×32×32, RGB, in [0, 1]",
    "mu": "float32, N×{latents}, mean of q(z|x): the code of the image",
    "logvar": "float32, N×{latents}, log-variance of q(z|x)",
    "latent": "float32, N×{latents}, unbounded; the prior is N(0, 1)",
}


def split_vae(vae):
    """Encoder and decoder of a copy, BatchNorm folded into the convolutions."""
    vae = copy.deepcopy(vae).eval()
    vae.check_range = False
    vae.encoder, vae.decoder = fold_batch_norm(vae.encoder), fold_batch_norm(vae.decoder)
    return [Encoder(vae).eval(), Decoder(vae).eval()]


def fold_batch_norm(layers):
    """The same function without BatchNorm, which becomes part of the convolution before it."""
    folded = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            transposed = isinstance(folded[-1], nn.ConvTranspose2d)
            folded[-1] = fuse_conv_bn_eval(folded[-1], layer, transposed)
        else:
            folded.append(layer)
    return nn.Sequential(*folded)


# --- From PyTorch ---


def to_onnx(part, vae, record):
    """An ONNX model without the exporter's notes."""
    with silence():
        program = torch.onnx.export(
            part,
            (part.example,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[part.input],
            output_names=part.outputs,
            verbose=False,
        )
    model = program.model_proto
    strip(model)
    describe(model, part, vae, record)
    return model


def strip(model):
    """Remove what the exporter noted of this machine's files, a tenth of the bytes."""
    graph = model.graph
    for thing in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""
    del graph.value_info[:]


def describe(model, part, vae, record):
    notes = {
        "model": f"{vae.architecture['name']} {part.name}, {vae.latent_dim} latents",
        "trained_on": str(record.get("data", "unknown")),
        "student_sha256": fingerprint(vae),
    }
    notes |= {name: PORTS[name].format(latents=vae.latent_dim)
              for name in (part.input, *part.outputs)}
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)


@contextlib.contextmanager
def silence():
    """Without what the quantisers say of themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- Running them ---


@dataclasses.dataclass(eq=False)
class Form:
    """A student in one form: its files, and how to run it on float images and latents."""

    name: str
    files: dict        # name → bytes, before they are written
    encode: Callable   # images → (mu, logvar)
    decode: Callable   # latents → images


def onnx_form(name, suffix, models):
    """Runs in ONNX Runtime on one CPU thread.

    Args:
        name, suffix: of the form, and of its files.
        models: part → ONNX model.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    files, sessions = {}, {}
    for part, model in models.items():
        content = model.SerializeToString()
        files[f"{part}{suffix}.onnx"] = content
        sessions[part] = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )

    def call(part, port, x):
        found = sessions[part].run(None, {port: x.contiguous().numpy()})
        return [torch.from_numpy(array) for array in found]

    return Form(
        name,
        files,
        lambda images: call("encoder", "image", images),
        lambda z: call("decoder", "latent", z)[0],
    )
