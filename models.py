"""From a checkpoint to the model it describes, and how large a model is."""

import io
from pathlib import Path

import torch

from runtime import InputError
from standard_vae import StandardVAE
from storage import load_checkpoint
from tiny_vae_32 import TinyVAE32

MODELS = {"StandardVAE": StandardVAE, "TinyVAE32": TinyVAE32}


def load_model(path, expected):
    """The model in a checkpoint, built as the checkpoint describes it, and the whole checkpoint.

    Args:
        path: the checkpoint.
        expected: the class it should hold, such as TinyVAE32.

    Returns (model, checkpoint), the model in evaluation mode on the CPU. Raises InputError for what
    `load_checkpoint` refuses, for another class, and for weights that do not fit.
    """
    checkpoint = load_checkpoint(path)
    architecture = checkpoint.get("architecture")
    if not isinstance(architecture, dict) or "model" not in checkpoint:
        raise InputError(f"{path} is not a model checkpoint of this project: name one that is")
    arguments = dict(architecture)
    name = arguments.pop("name", None)
    if MODELS.get(name) is not expected:
        raise InputError(f"{path} holds a {name}, but a {expected.__name__} is needed here")
    try:
        model = expected(**arguments)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the weights in {path} do not fit its architecture: {reason}") from error
    return model.eval(), checkpoint


def find_checkpoint(name, folder):
    """A name is a file in the checkpoint folder, or else a path."""
    return folder / name if (folder / name).exists() or not Path(name).exists() else Path(name)


def weight_bytes(model):
    """Size of a model's state dict on disk: weights and BatchNorm statistics, nothing else."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def count_parameters(model):
    """Number of trainable and frozen parameters; BatchNorm's running statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
