"""Images in memory: one uint8 tensor per split, N×3×32×32, small enough to live on the device."""

from typing import NamedTuple

import torch

IMAGE_SIZE = 32  # pixels a side
IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
PIXEL_VALUES = 3072  # numbers in one image


class Split(NamedTuple):
    images: torch.Tensor         # uint8, N×3×32×32
    labels: torch.Tensor | None  # class of each image, N, or None where images have no classes

    def to(self, device):
        return Split(*(None if x is None else x.to(device) for x in self))


def to_float(images):
    """uint8 → float32 in [0, 1], channels last, which convolutions run fastest on."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def evenly_spaced(images, count):
    """`count` images spread evenly over a split: the same ones each time, and of all classes, which
    folders are sorted by. 0 takes all."""
    count = min(count or len(images), len(images))
    return images[torch.linspace(0, len(images) - 1, count).long()]


def shuffled_batches(count, batch_size, generator):
    """Indices of one epoch's batches, as a tensor steps×batch_size.

    The few images that do not fill the last batch wait for another epoch's order, so that every
    step has the same shape.
    """
    order = torch.randperm(count, generator=generator)
    steps = count // batch_size
    return order[: steps * batch_size].view(steps, batch_size)
