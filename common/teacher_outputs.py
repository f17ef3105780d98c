"""The teacher's latents and outputs. The images never change, so one pass serves every epoch."""

from typing import NamedTuple

import torch

from common.data import PIXEL_VALUES, to_float
from common.metrics import ACTIVE_VARIANCE, EVALUATION_BATCH, count_active, encode_means
from common.runtime import InputError, autocast, progress_bar

STEP_MEMORY = 1_000_000_000  # bytes of a device, kept for networks and a step


class TeacherOutputs(NamedTuple):
    mu: torch.Tensor      # of the training images, N×latents, float32
    logits: torch.Tensor  # decoded from that mu, N×3×32×32, float16
    val_mu: torch.Tensor  # of the held-out images, M×latents


@torch.no_grad()
def teacher_outputs(teacher, run):
    """The TeacherOutputs of a run's images. `teacher` is on its device, in evaluation mode."""
    images = run.images
    # In place, since a list and what it is joined to would take twice the memory.
    logits = torch.empty(images.shape, dtype=torch.half, device=images.device)
    mu = torch.empty(len(images), teacher.latent_dim, device=images.device)
    chunks = list(zip(*(x.split(EVALUATION_BATCH) for x in (images, mu, logits))))
    bar = progress_bar(chunks, desc="teacher's outputs", unit="batch", leave=False)
    for chunk, chunk_mu, chunk_logits in bar:
        with autocast(images.device, run.precision):
            code, _ = teacher.encode(to_float(chunk))
            chunk_mu.copy_(code)
            chunk_logits.copy_(teacher.decode_logits(code))
    return TeacherOutputs(mu, logits, encode_means(teacher, run.val_images, run.precision))


def check_memory(count, latent_dim):
    """Raise InputError where the outputs for so many images do not fit the CUDA device."""
    room = torch.cuda.mem_get_info()[0] - STEP_MEMORY
    each = 4 * latent_dim + 2 * PIXEL_VALUES  # bytes, as in TeacherOutputs
    if count * each > room:
        raise InputError(
            f"the teacher's outputs for {count:,} images take {count * each / 1e9:.1f} GB, and the "
            f"device has room for {max(0, room) // each:,} of them: use fewer images (--limit), or "
            "--device cpu"
        )


@torch.no_grad()
def check_teacher(teacher, images, path, latent_dim):
    """Raise InputError for a teacher that was trained on pixels in another range; warn of one with
    fewer latents alive than the student has.

    Args:
        teacher: a VAE in evaluation mode.
        images: some of the training images, uint8, on the teacher's device.
        path: the teacher's file.
        latent_dim: latents that the student needs of it; 0: none.
    """
    pixels = to_float(images)
    teacher.check_range = False
    errors, mu = {}, {}
    for name, factor, offset in (("[0, 1]", 1, 0), ("[-1, 1]", 2, -1), ("[0, 255]", 255, 0)):
        try:
            mu[name], _ = teacher.encode(pixels * factor + offset)
            errors[name] = (teacher.decode(mu[name]) - pixels).square().mean().item()
        except InputError:  # of one's own, which takes no other range
            if factor == 1:
                raise
    teacher.check_range = True
    best = min(errors, key=errors.get)
    if errors[best] < 0.5 * errors["[0, 1]"]:
        raise InputError(
            f"{path} was trained on pixels in {best}, and pixels here are in [0, 1] (MSE "
            f"{errors['[0, 1]']:.4f}, scaled to {best} {errors[best]:.4f}): scale them before its "
            "encoder (common/own_teacher.py), or train one with --teacher train"
        )
    alive = count_active(mu["[0, 1]"])
    if alive < latent_dim:
        print(
            f"Warning: {alive} of the {teacher.latent_dim} latents of {path} are alive (variance "
            f"of mu above {ACTIVE_VARIANCE}), fewer than the student's {latent_dim}: the latent "
            "term can teach no more than these"
        )
