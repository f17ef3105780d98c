"""Reconstructions and interpolations, and what all pictures of images have in common.

Pixels are drawn as they are, without smoothing.
"""

import io

import torch
from matplotlib.figure import Figure

from data import spread, to_float
from storage import write_bytes

COLUMNS = 10  # images in a row
PAIRS = 4  # pairs in the interpolation picture
STEPS = 9  # images from one end of an interpolation or traversal to the other, ends included
# What students are compared by in plots: a figure's name, and its axis.
PANELS = (("mse", "MSE from mu, pixels in [0, 1]"), ("vgg_distance", "VGG distance"))
ERROR_GAIN = 4  # errors are small: drawn this many times larger


@torch.no_grad()
def draw_reconstructions(path, images, models, title):
    """A row of originals, a row for each model, and the last model's error.

    Args:
        path: the PNG to write.
        images: uint8 images to choose from; the same ones are taken each time.
        models: name → VAE in evaluation mode, on the images' device.
        title: what the picture shows, such as the split.
    """
    originals = to_float(spread(images, COLUMNS))
    rows = {"original": originals}
    rows |= {name: model.decode(model.encode(originals)[0]) for name, model in models.items()}
    last = rows[list(models)[-1]]
    rows[f"error ×{ERROR_GAIN}"] = ((last - originals).abs() * ERROR_GAIN).clamp(0, 1)

    figure, axes = image_grid(
        len(rows), len(originals), f"{title} (numbers: MSE of the image, pixels in [0, 1])"
    )
    for row, (name, batch) in enumerate(rows.items()):
        label_row(axes[row][0], name)
        for column, image in enumerate(batch):
            show(axes[row][column], image)
            if name in models:
                mse = (image - originals[column]).square().mean().item()
                axes[row][column].set_xlabel(f"{mse:.4f}", fontsize=7, labelpad=1)
    save_figure(figure, path)


@torch.no_grad()
def draw_interpolations(path, images, models, title):
    """Straight lines in latent space between pairs of images, a row a model; originals at the ends.

    Args are those of `draw_reconstructions`.
    """
    ends = to_float(spread(images, 2 * PAIRS))
    pairs = len(ends) // 2
    weights = torch.linspace(0, 1, STEPS, device=ends.device)[:, None]
    figure, axes = image_grid(pairs * len(models), STEPS + 2, title)
    row = 0
    for pair in range(pairs):
        first, second = ends[2 * pair], ends[2 * pair + 1]
        for name, model in models.items():
            mu, _ = model.encode(torch.stack([first, second]))
            between = model.decode(torch.lerp(mu[:1], mu[1:], weights))
            label_row(axes[row][0], name)
            for column, image in enumerate([first, *between, second]):
                show(axes[row][column], image)
            if row == 0:
                for column in (0, STEPS + 1):
                    axes[row][column].set_title("original", fontsize=8)
                for column in range(STEPS):
                    axes[row][column + 1].set_title(f"{column / (STEPS - 1):.2f}", fontsize=8)
            row += 1
    save_figure(figure, path)


def image_grid(rows, columns, title):
    figure = Figure(figsize=(columns * 0.95 + 0.9, rows * 1.05 + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def label_row(ax, name):
    ax.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")


def show(ax, image):
    ax.imshow(image.float().permute(1, 2, 0).cpu().numpy(), interpolation="nearest", vmin=0, vmax=1)


def save_figure(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())
