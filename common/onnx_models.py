"""A student as ONNX models: its encoder and its decoder, and running them in ONNX Runtime."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.data import IMAGE_SHAPE
from common.storage import fingerprint

OPSET = 20  # of ONNX: recent enough for all, old enough for TensorRT 10

# What goes in and comes out, in the words of the files' metadata.
PORTS = {
    "image": "float32, N×3×32×32, RGB, in [0, 1]",
    "mu": "float32, N×{latents}, mean of q(z|x): the code of the image",
    "logvar": "float32, N×{latents}, log-variance of q(z|x)",
    "latent": "float32, N×{latents}, unbounded; the prior is N(0, 1)",
}


class Part(nn.Module):
    """The encoder of a VAE, image → (mu, logvar), or its decoder, latent → image."""

    def __init__(self, vae, name):
        super().__init__()
        self.vae, self.name = vae, name
        if name == "encoder":
            self.input, self.outputs = "image", ["mu", "logvar"]
            self.example = torch.rand(2, *IMAGE_SHAPE)
        else:
            self.input, self.outputs = "latent", ["image"]
            self.example = torch.randn(2, vae.latent_dim)

    def forward(self, x):
        return self.vae.encode(x) if self.name == "encoder" else self.vae.decode(x)


def split_vae(vae):
    """Encoder and decoder of a copy, BatchNorm folded into the convolutions."""
    vae = copy.deepcopy(vae).eval()
    vae.check_range = False
    vae.encoder, vae.decoder = fold_batch_norm(vae.encoder), fold_batch_norm(vae.decoder)
    return [Part(vae, "encoder").eval(), Part(vae, "decoder").eval()]


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
    """The ONNX model of a part; its metadata say of which student, and what goes in and out."""
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
    notes = {
        "model": f"{vae.architecture['name']} {part.name}, {vae.latent_dim} latents",
        "trained_on": str(record.get("data", "unknown")),
        "student_sha256": fingerprint(vae),
    }
    for port in (part.input, *part.outputs):
        notes[port] = PORTS[port].format(latents=vae.latent_dim)
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    return model


def strip(model):
    """Remove what the exporter noted of this machine's files, a tenth of the bytes."""
    graph = model.graph
    for thing in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""
    del graph.value_info[:]


@contextlib.contextmanager
def silence():
    """Without what the exporters and quantisers say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- Running them ---


class Form(NamedTuple):
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
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    contents = {part: model.SerializeToString() for part, model in models.items()}
    encoder, decoder = (
        runtime.InferenceSession(contents[part], options, providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    )

    def encode(images):
        mu, logvar = encoder.run(None, {"image": images.contiguous().numpy()})
        return torch.from_numpy(mu), torch.from_numpy(logvar)

    def decode(latents):
        return torch.from_numpy(decoder.run(None, {"latent": latents.contiguous().numpy()})[0])

    files = {f"{part}{suffix}.onnx": content for part, content in contents.items()}
    return Form(name, files, encode, decode)
