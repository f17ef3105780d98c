"""Images made here, for trying things out: they need no network and no folder."""

import functools
import importlib.util
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from common.data import IMAGE_SIZE
from common.folders import read_image
from common.runtime import InputError, import_torchvision, progress_bar

SYNTHETIC_IMAGES = {"train": 45_000, "val": 5_000, "test": 10_000}  # as many as CIFAR-10 has

# Photo crops.
PHOTOGRAPHS = (  # package and file
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
STRIPS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # of a photograph's width
CROP_SIDES = (44, 88)  # pixels of a square before it is scaled to 32×32, smallest and largest
CROP_CONTRAST = 0.1  # standard deviation over a square, pixels in [0, 1]: flatter ones are skipped

# Dead leaves.
DEAD_LEAVES_CHUNK = 500  # images drawn at once; each chunk has its own seed
DISCS = 32  # per image, over a background, of which little remains to be seen
RADII = (8.0, 32.0)  # pixels, smallest and largest; density falls as radius ** -3
MARGIN = 8.0  # pixels around the image in which discs may be centred
SUPERSAMPLING = 2  # samples per pixel side, for smooth edges


def photo_crops(count, split):
    """Random squares out of PHOTOGRAPHS, scaled to 32×32, half of them mirrored.

    Each photograph is cut into three strips, one for each split, so no pixel is in two of them.

    Args:
        count: number of images; the first N are the same whatever the count.
        split: `train`, `val` or `test`.

    Returns uint8, count×3×32×32.
    """
    transforms = import_torchvision().transforms.functional
    photographs = []
    for package, file in PHOTOGRAPHS:
        installed = importlib.util.find_spec(package)
        if installed is None:
            raise InputError(
                f"photo-crops are cut from images of {package}, which is not installed: pip "
                "install -r requirements.txt"
            )
        path = Path(installed.origin).parent / file
        photograph = transforms.pil_to_tensor(read_image(path))
        left, right = (round(edge * photograph.shape[2]) for edge in STRIPS[split])
        photographs.append(photograph[:, :, left:right])
    generator = torch.Generator().manual_seed(list(STRIPS).index(split))
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    kept = 0
    for photograph in itertools.cycle(photographs):
        if kept == count:
            break
        x, y, size, mirror = torch.rand(4, generator=generator).tolist()
        side = round(CROP_SIDES[0] + size * (CROP_SIDES[1] - CROP_SIDES[0]))
        top = int(y * (photograph.shape[1] - side + 1))
        left = int(x * (photograph.shape[2] - side + 1))
        crop = photograph[:, top : top + side, left : left + side]
        crop = transforms.resize(crop, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
        if crop.float().std((1, 2)).max() >= CROP_CONTRAST * 255:
            images[kept] = crop.flip(-1) if mirror < 0.5 else crop
            kept += 1
    return images


def dead_leaves(count, split):
    """Images of the dead leaves model: opaque discs dropped one over another.

    Lee, Mumford & Huang, "Occlusion models for natural images", IJCV 41, 2001: positions
    uniform, radii with density r^-3, which makes the statistics scale-invariant as those of
    photographs are. Each image mixes a hue of its own into its discs' random colours.

    Args and result are those of `photo_crops`.
    """
    stream = list(SYNTHETIC_IMAGES).index(split)
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    chunks = images.split(DEAD_LEAVES_CHUNK)
    progress = progress_bar(chunks, desc=f"drawing dead leaves, {split}", unit="chunk")
    for i, chunk in enumerate(progress):
        generator = torch.Generator().manual_seed(stream * 1_000_000 + i)
        chunk.copy_(draw_leaves(DEAD_LEAVES_CHUNK, generator)[: len(chunk)])
    return images


def draw_leaves(count, generator):
    uniform = functools.partial(torch.rand, generator=generator)
    small, large = RADII
    # Inverse of the cumulative distribution of p(r) ∝ r^-3 between the two radii.
    radius = (small**-2 - uniform(DISCS, count, 1, 1) * (small**-2 - large**-2)) ** -0.5
    x, y = uniform(2, DISCS, count, 1, 1) * (IMAGE_SIZE + 2 * MARGIN) - MARGIN
    colour = 0.6 * uniform(count, 3, DISCS + 1) + 0.4 * uniform(count, 3, 1)

    side = IMAGE_SIZE * SUPERSAMPLING
    grid = (torch.arange(side) + 0.5) / SUPERSAMPLING
    topmost = torch.zeros(count, side, side, dtype=torch.uint8)  # 0 is the background
    for disc in range(DISCS):
        distance = (grid - x[disc]).square() + (grid[:, None] - y[disc]).square()
        topmost.masked_fill_(distance < radius[disc].square(), disc + 1)
    index = topmost.flatten(1)[:, None].expand(-1, 3, -1).long()
    image = colour.gather(2, index).view(count, 3, side, side)
    return (F.avg_pool2d(image, SUPERSAMPLING) * 255).round().to(torch.uint8)


SYNTHETIC = {"photo-crops": photo_crops, "dead-leaves": dead_leaves}
