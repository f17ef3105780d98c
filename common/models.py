"""From a checkpoint to its model and the images it was trained on; how large a model is."""

import copy
import io
from pathlib import Path

import torch

from common import own_teacher
from common.data import IMAGE_SHAPE
from common.other_checkpoints import adopt
from common.runtime import InputError, explain_errors
from common.sources import load_test_images, load_training_images, warn_of_copies
from common.storage import load_checkpoint, refuse_other_weights
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

BEST_STUDENT, TRAINED_TEACHER = "tinyvae_best.pth", "teacher_vae.pth"  # what a run leaves
RELEASED = Path(__file__).resolve().parents[1] / "checkpoints" / "tinyvae_cifar10.pth"
MODELS = {"StandardVAE": StandardVAE, "TinyVAE32": TinyVAE32}


def load_model(path, expected=None):
    """The model in a checkpoint, built as the checkpoint describes it, and the whole checkpoint.

    A state dict that another program saved will do as well: `other_checkpoints`. What it was taken
    from is printed.

    Args:
        path: the checkpoint.
        expected: the class that it should hold, TinyVAE32 or StandardVAE; None takes either.

    Returns (model, checkpoint), the model in evaluation mode on the CPU. Raises InputError for what
    `load_checkpoint` refuses, for another class, and for weights that do not fit.
    """
    checkpoint = load_checkpoint(path)
    architecture, record = checkpoint.get("architecture"), checkpoint.get("record", {})
    if not (isinstance(architecture, dict) and isinstance(record, dict) and "model" in checkpoint):
        try:
            checkpoint, where = adopt(checkpoint, expected and expected.__name__)
        except ValueError as error:
            raise InputError(
                f"{path} is not a model checkpoint of this project, nor one network's state dict "
                f"({error}): name another"
            ) from error
        architecture = checkpoint["architecture"]
        print(f"{path}: a state dict{where and f' under {where}'}, taken as {architecture}")
    arguments = dict(architecture)
    name = arguments.pop("name", None)
    network = MODELS.get(name) if isinstance(name, str) else None
    if network is None or network is not (expected or network):
        needed = expected.__name__ if expected else " or a ".join(MODELS)
        raise InputError(f"{path} holds a {name}, but a {needed} is needed here")
    with explain_errors(
        lambda reason: f"the weights in {path} do not fit its architecture: {reason}"
    ):
        with torch.device("meta"):  # nothing is allocated before its size is known
            shapes = network(**arguments).state_dict()
        refuse_other_weights(checkpoint["model"], shapes)
        model = network(**arguments)
        model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def load_any_teacher(path):
    """The same of a teacher, which may be any VAE: `own_teacher`."""
    with explain_errors(
        lambda reason: f"common/own_teacher.py could not build a teacher from {path} ({reason})"
    ):
        own = own_teacher.load(path)
    return (own, {}) if own else load_model(path)


def find_checkpoint(path, folder):
    """A file in the checkpoint folder, or else a path as it is."""
    return folder / path if (folder / path).exists() or not path.exists() else path


def find_student(path, folder):
    """The path of a student: the one that is named; for None, the best one in the folder; where no
    run has left one in checkpoints/, the released one. Prints which."""
    if path is not None:
        found = find_checkpoint(path, folder)
    elif not (folder / BEST_STUDENT).exists() and folder.resolve() == RELEASED.parent:
        print(f"student  {RELEASED}, the included one, since no run has left another there")
        return RELEASED
    else:
        found = folder / BEST_STUDENT
    print(f"student  {found}")
    return found


def find_images(data, limit, student_path, record, skip_unreadable=False):
    """Training and test images: those of `data`, or what the student was trained on.

    The released student's own images may not be there, and one without photographs has none: then
    CIFAR-10, or else crops of a few photographs, take their place, and the figures, the record and
    the pictures name them.

    Args:
        data: a source of sources.py, or None for the student's own.
        limit: of the training images; 0: as many as the student saw, or all of `data`.
        student_path: the student's file.
        record: what it says of its training.
        skip_unreadable: leave out images of a folder that cannot be read, as the student's training
            may have done.
    """
    skip_unreadable = skip_unreadable or record.get("skip_unreadable", False)
    if data is not None:
        sources = [(data, limit)]
    elif "data" not in record:
        raise InputError(f"{student_path} does not say its images: name them with --data")
    else:
        sources = [(record["data"], limit or record["limit"])]
        if record["data"] == "none":
            print("images   none of its own: the teacher made them")
            sources = []
        if not sources or student_path.resolve() == RELEASED:
            sources += [("cifar10", limit), ("photo-crops", limit or 5000)]
    for source, count in sources:
        try:
            images = load_training_images(source, count, skip_unreadable)
            test = load_test_images(source, count, skip_unreadable)
        except InputError as error:
            if source == sources[-1][0]:
                raise
            print(f"images   not {source}: {error}")
        else:
            known = torch.cat([images.train, images.val])
            warn_of_copies(known, test.images, "the training images", "the test images")
            return images, test


def weight_bytes(model):
    """Size of a model's state dict on disk: weights and BatchNorm statistics, nothing else."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def count_parameters(model):
    """Number of trainable and frozen parameters; BatchNorm's running statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(vae):
    """Multiply-accumulates to encode and decode one image."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it is slow to load

    vae = copy.deepcopy(vae).to("meta").eval()  # nothing is computed
    vae.check_range = False
    with FlopCounterMode(display=False) as counter:
        vae(torch.empty(1, *IMAGE_SHAPE, device="meta"))
    return counter.get_total_flops() // 2
