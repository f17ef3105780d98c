"""The PNGs: reconstructions, interpolations, samples, latent traversals, training curves.

Pixels are drawn as they are, without smoothing.
"""

import io

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from data import spread, to_float
from losses import kl_divergence
from storage import write_bytes

COLUMNS = 10  # images in the reconstruction picture
PAIRS = 4  # pairs in the interpolation picture
STEPS = 9  # images from one end of an interpolation or traversal to the other, ends included
SAMPLE_ROWS = 2  # rows of prior samples for each model
TRAVERSED = 8  # latents in the traversal picture
COLOURS = [f"C{i}" for i in range(10) if i != 7] + ["k"]  # matplotlib's, without the grey
REACH = 3.0  # standard deviations of the prior to which a traversal goes, either way
PANELS = (("mse", "MSE from mu, pixels in [0, 1]"), ("perceptual", "perceptual distance"))
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


@torch.no_grad()
def draw_samples(path, models, title):
    """Images decoded from the prior, z ~ N(0, I); the same z each time.

    Args are those of `draw_reconstructions`.
    """
    figure, axes = image_grid(SAMPLE_ROWS * len(models), COLUMNS, title)
    row = 0
    for name, model in models.items():
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(SAMPLE_ROWS * COLUMNS, model.latent_dim, generator=generator)
        images = model.decode(z.to(next(model.parameters()).device))
        for some in images.split(COLUMNS):
            label_row(axes[row][0], name)
            for ax, image in zip(axes[row], some):
                show(ax, image)
            row += 1
    save_figure(figure, path)


@torch.no_grad()
def draw_traversal(path, images, model, title):
    """What single latents do: a row for each of the latents that carry most nats, the others held.

    Args:
        path: the PNG to write.
        images: uint8 images; the rates are averaged over these, and the middle one is changed.
        model: a VAE in evaluation mode, on the images' device.
        title: what the picture shows.
    """
    mu, logvar = model.encode(to_float(images[:1000]))
    rates = kl_divergence(mu, logvar).mean(0)
    start, _ = model.encode(to_float(images[len(images) // 2][None]))
    chosen = rates.topk(min(TRAVERSED, model.latent_dim)).indices
    values = torch.linspace(-REACH, REACH, STEPS, device=start.device)
    figure, axes = image_grid(len(chosen), STEPS, title)
    for row, latent in enumerate(chosen):
        z = start.repeat(STEPS, 1)
        z[:, latent] = values
        label_row(axes[row][0], f"z{latent.item()}\n{rates[latent]:.1f} nats")
        for column, image in enumerate(model.decode(z)):
            show(axes[row][column], image)
            if row == 0:
                axes[row][column].set_title(f"{values[column]:+.1f}", fontsize=8)
    save_figure(figure, path)


def draw_curves(path, rows, title):
    """Loss terms, validation error, rate and learning rate over the epochs of both stages.

    Args:
        path: the PNG to write.
        rows: the rows of metrics.csv.
        title: the run in a few words.
    """
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 3).ravel()
    for stage, colour in (("teacher", "tab:grey"), ("student", "tab:blue")):
        stage_rows = [row for row in rows if row["stage"] == stage]
        if not stage_rows:
            continue
        epochs = [row["epoch"] for row in stage_rows]
        marker = "o" if len(epochs) < 30 else None  # a few epochs are dots, many are a line

        def plot(ax, column, epochs=epochs, stage_rows=stage_rows, marker=marker, **style):
            values = [row.get(column) for row in stage_rows]
            if any(value is not None for value in values):
                ax.plot(epochs, values, marker=marker, markersize=3, **style)

        plot(axes[0], "loss", color=colour, label=stage)
        if stage == "student":
            for term in ("reconstruction", "kl", "latent", "output", "perceptual"):
                plot(axes[1], term, label=term)
        plot(axes[2], "val_mse", color=colour, label=f"{stage}, best {best(stage_rows):.4f}")
        plot(axes[3], "kl_nats", color=colour, label=stage)
        plot(axes[4], "active_dims", color=colour, label=stage)
        plot(axes[5], "learning_rate", color=colour, label=stage)
    names = (
        "weighted loss", "student's terms, unweighted", "validation MSE, pixels in [0, 1]",
        "KL of an image, nats", "active dimensions", "learning rate at the epoch's end",
    )
    for ax, name in zip(axes, names):
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("epoch of its stage", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    for ax in axes[:3]:
        ax.set_yscale("log")
        ax.tick_params(which="both", labelsize=8)
    save_figure(figure, path)


def draw_rate_distortion(path, summary, floors, title):
    """Rate against distortion, a labelled point for each variant with its spread over seeds.

    Args:
        path: the PNG to write.
        summary: what `summarise` of ablate_distillation.py returns.
        floors: `PCA`, the error of PCA with as many numbers as latents, and `bound`, points
            (distortion, rate) of the Gaussian bound.
        title: the budget in a few words.
    """
    panels = [panel for panel in PANELS if any(panel[0] in found for found in summary)]
    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for ax, (measure, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        shown = [found for found in summary if measure in found]
        scratch = sorted(
            (found["kl_nats"][0], found[measure][0])
            for found in shown
            if found["variant"] == "scratch"
        )
        if scratch:
            ax.plot(*zip(*scratch), color="tab:grey", linewidth=1, label="scratch, other rates")
        colours = {}  # of the variants, scratch in grey
        for found in shown:
            colour = "tab:grey" if found["variant"] == "scratch" else COLOURS[len(colours) % 10]
            colours.setdefault(found["variant"], colour)
            (rate, rate_spread), (value, spread) = found["kl_nats"], found[measure]
            ax.errorbar(
                rate, value, spread, rate_spread, fmt="o", markersize=4,
                color=colours[found["variant"]],
            )
        ax.set_xscale("log")
        left, right = ax.get_xlim()
        bottom, top = ax.get_ylim()
        if measure == "mse":
            ax.axhline(floors["PCA"], color="k", linewidth=0.8, linestyle=":", label="PCA, 64")
            errors, rates = zip(*floors["bound"])
            ax.plot(
                rates, errors, color="k", linewidth=0.8, linestyle="--",
                label="Gaussian bound, 64 components (from samples)",
            )
            ax.set_ylim(min(bottom, 0.97 * floors["PCA"]), top)
        ax.set_xlim(left * 0.95, right * 1.15)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(labelsize=8)
        ax.set_xlabel("rate: KL of an image, nats", fontsize=9)
        ax.set_ylabel(name, fontsize=9)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
        # Of the students from scratch the one of full's rate, which has all seeds, gets a name.
        seeds = max(found["students"] for found in shown)
        points = [
            (found["kl_nats"][0], found[measure][0], found["variant"])
            for found in shown
            if found["variant"] != "scratch" or found["students"] == seeds
        ]
        label_points(ax, points, colours)
    save_figure(figure, path)


def draw_bars(path, rows, title):
    """A bar for each row's milliseconds per step, its ratio to the straightforward loop written
    at its end. `rows` are those of bench_training.csv."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    counts = [sum(row["stage"] == stage for row in rows) for stage in stages]
    figure = Figure(figsize=(8, 0.28 * len(rows) + 1.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(stages), sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for ax, stage in zip(axes, stages):
        shown = [row for row in rows if row["stage"] == stage]
        colours = ["tab:blue" if row["variant"] == "ours" else "tab:grey" for row in shown]
        bars = ax.barh(
            [row["variant"] for row in shown],
            [row["ms_per_step"] for row in shown],
            xerr=[row["spread_ms"] for row in shown],
            color=colours,
        )
        ax.bar_label(bars, [f"{row['ratio']:.2f}×" for row in shown], padding=4, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.tick_params(labelsize=8)
        ax.set_title(stage, fontsize=9, loc="left")
    axes[-1].set_xlabel("ms per step", fontsize=9)
    save_figure(figure, path)


def draw_sizes(path, rows, title):
    """Error against parameters: the whole student, those pruned from it, and fresh ones.

    Args:
        path: the PNG to write.
        rows: those of pruning.csv.
        title: data and budget in a few words.
    """
    panels = [panel for panel in PANELS if panel[0] in rows[0]]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    whole = rows[0]
    for ax, (measure, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for kind, label, colour in (
            ("pruned", "pruned, distilled again", "tab:blue"),
            ("fresh", "from random weights, the same steps", "tab:orange"),
        ):
            points = sorted((r["parameters"], r[measure]) for r in rows if r["student"] == kind)
            if points:
                ax.plot(*zip(*points), marker="o", color=colour, label=label)
        ax.plot(
            whole["parameters"], whole[measure], "k*", markersize=10, label="before pruning"
        )
        for row in rows:
            if row["student"] == "pruned":
                ax.annotate(
                    f"−{row['ratio']:.0%}", (row["parameters"], row[measure]), xytext=(0, -12),
                    textcoords="offset points", fontsize=8, ha="center",
                )
        ax.margins(0.1, 0.15)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        ax.set_xlabel("parameters", fontsize=9)
        ax.set_ylabel(name, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save_figure(figure, path)


def label_points(ax, points, colours):
    """Names in a column at the right, in the order of their points' heights, a line to each: points
    may lie as near each other as they like. `points` are (x, y, name)."""
    points = sorted(points, key=lambda point: point[1])
    low, high = ax.get_ylim()
    for i, (x, y, name) in enumerate(points):
        height = low + (high - low) * (i + 0.5) / len(points)
        colour = colours[name]
        ax.annotate(
            name, (x, y), xytext=(1.03, height), textcoords=("axes fraction", "data"),
            fontsize=8, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )


def best(rows):
    return min(row["val_mse"] for row in rows)


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
