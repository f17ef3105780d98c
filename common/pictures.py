"""Pictures of what models make of images. Pixels are drawn as they are, without smoothing.

Of each function that takes models, `path` is the PNG to write, `images` are uint8 and on the
models' device, `models` are name → VAE in evaluation mode, and `title` says what the picture shows,
such as the split.
"""

import io

import torch
from PIL import Image

from common.data import evenly_spaced, to_float
from common.losses import kl_divergence
from common.metrics import evaluate_images, luma_chroma
from common.storage import write_bytes

PER_ROW = 10  # images in a row
PAIRS = 4  # pairs in the interpolation picture
STEPS = 9  # images from one end of an interpolation or traversal to the other, ends included
SAMPLE_ROWS = 2  # rows of prior samples for each model
TRAVERSED = 8  # latents in the traversal picture
REACH = 3.0  # standard deviations of the prior to which a traversal goes, either way
ERROR_GAIN = 4  # errors are small: drawn this many times larger


@torch.no_grad()
def draw_reconstructions(path, images, models, title):
    """A row of originals, the same each time, a row for each model, and the last model's error."""
    originals = to_float(evenly_spaced(images, PER_ROW))
    rows = {"original": originals}
    rows |= {name: model.decode(model.encode(originals)[0]) for name, model in models.items()}
    last = rows[list(models)[-1]]
    rows[f"error ×{ERROR_GAIN}"] = ((last - originals).abs() * ERROR_GAIN).clamp(0, 1)

    what = f"{title} (numbers: MSE of the image, pixels in [0, 1])"
    figure, axes = image_rows(rows.items(), what)
    for row, (name, batch) in enumerate(rows.items()):
        if name in models:
            for ax, mse in zip(axes[row], (batch - originals).square().mean((1, 2, 3))):
                ax.set_xlabel(f"{mse:.4f}", fontsize=7, labelpad=1)
    save_figure(figure, path)


@torch.no_grad()
def draw_interpolations(path, images, models, title):
    """Straight lines in latent space between pairs of images, a row a model; originals at the ends.
    """
    ends = to_float(evenly_spaced(images, 2 * PAIRS))
    weights = torch.linspace(0, 1, STEPS, device=ends.device)[:, None]
    rows = []
    for pair in ends[: len(ends) // 2 * 2].split(2):
        for name, model in models.items():
            mu, _ = model.encode(pair)
            between = model.decode(torch.lerp(mu[:1], mu[1:], weights))
            rows.append((name, [pair[0], *between, pair[1]]))
    headings = ["original", *(f"{weight:.2f}" for weight in weights[:, 0]), "original"]
    figure, _ = image_rows(rows, title, headings)
    save_figure(figure, path)


@torch.no_grad()
def draw_samples(path, models, title):
    """Images decoded from the prior, z ~ N(0, I); the same z each time."""
    rows = []
    for name, model in models.items():
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(SAMPLE_ROWS * PER_ROW, model.latent_dim, generator=generator)
        images = model.decode(z.to(next(model.parameters()).device))
        rows += [(name, some) for some in images.split(PER_ROW)]
    save_figure(image_rows(rows, title)[0], path)


@torch.no_grad()
def draw_traversal(path, images, model, title):
    """What single latents do to an image of middling contrast: a row for each of the latents that
    carry most nats, the others held."""
    images = to_float(images[:1000])
    nats = kl_divergence(*model.encode(images)).mean(0)
    start, _ = model.encode(images[images.var((1, 2, 3)).median(0).indices][None])
    values = torch.linspace(-REACH, REACH, STEPS, device=start.device)
    rows = []
    for latent in nats.topk(min(TRAVERSED, model.latent_dim)).indices:
        z = start.repeat(STEPS, 1)
        z[:, latent] = values
        rows.append((f"z{latent.item()}\n{nats[latent]:.1f} nats", model.decode(z)))
    figure, _ = image_rows(rows, title, [f"{value:+.1f}" for value in values])
    save_figure(figure, path)


@torch.no_grad()
def draw_colours(path, images, reconstructions, title):
    """The images whose colours vary most within them, and what is kept of that, a row for each of
    `reconstructions`, name → function of float images."""
    variety = [luma_chroma(to_float(some))[1].var((2, 3)).sum(1) for some in images.split(1000)]
    chosen = images[torch.cat(variety).topk(min(PER_ROW, len(images))).indices]
    rows = [("original", to_float(chosen))]
    for name, reconstruct in reconstructions.items():
        figures = evaluate_images(reconstruct, chosen, in_full=True)
        if "chroma_kept" in figures:
            name += f"\n{figures['chroma_kept']:.0%} of colour"
        rows.append((name, reconstruct(to_float(chosen))))
    save_figure(image_rows(rows, title)[0], path)


def draw_sheet(path, rows, title, captions=()):
    """Ten pictures side by side, as many lines as it takes.

    Args:
        rows: pairs of a name and its pictures, N×3×32×32 in [0, 1], drawn one below the other.
        title: of the sheet.
        captions: of each of the last rows, N words, beneath its pictures.
    """
    count = len(rows[0][1])
    starts = range(0, count, PER_ROW)
    blank = torch.ones(-count % PER_ROW if count > PER_ROW else 0, *rows[0][1].shape[1:])
    filled = [(name, torch.cat([pictures, blank])) for name, pictures in rows]
    lines = [(name, pictures[i : i + PER_ROW]) for i in starts for name, pictures in filled]
    figure, axes = image_rows(lines, title)
    for number, line in enumerate(axes):
        start, row = PER_ROW * (number // len(rows)), number % len(rows) - len(rows)
        if -row <= len(captions):
            for ax, caption in zip(line, captions[row][start : start + PER_ROW]):
                ax.set_xlabel(caption, fontsize=7, labelpad=1)
    save_figure(figure, path)


def image_rows(rows, title, headings=()):
    """A figure and its axes, rows×columns, with images in them.

    Args:
        rows: pairs of a name, written beside the row, and its images, floating point, N×3×H×W.
        title: of the figure.
        headings: of the columns.
    """
    rows = list(rows)
    columns = len(rows[0][1])
    figure = new_figure(columns * 0.95 + 0.9, len(rows) * 1.05 + 0.5, title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, images) in zip(axes, rows):
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images):
            pixels = image.float().permute(1, 2, 0).cpu().numpy()
            ax.imshow(pixels, interpolation="nearest", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, heading in zip(axes[0], headings):
        ax.set_title(heading, fontsize=8)
    return figure, axes


def new_figure(width, height, title):
    """An empty figure with a title; inches."""
    from matplotlib.figure import Figure  # here, since it is slow to load

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure


def save_figure(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())


def write_picture(image, path):
    """uint8, 3×H×W → a PNG."""
    png = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(png, "png", compress_level=1)
    write_bytes(path, png.getvalue())
