"""Prune a student: fewer channels, then more training.

    python prune_tinyvae.py --vgg PATH                   # the students of RATIOS, and fresh ones
    python prune_tinyvae.py --vgg none --ratios 0.5 --epochs 1 --no-fresh          # a trial
    python prune_tinyvae.py --vgg PATH --split test      # the final figures of those trained
    python test_trained_model.py --student checkpoints/pruned/pruned_0.6/tinyvae_best.pth

Whole channels are removed, those of the smallest weights (torch-pruning), so that what is left is a
TinyVAE32 with other channel numbers: smaller, faster, and loaded by every script. The 64 latents
stay. Then distill_tinyvae.py trains it on. Beside each stands a fresh student: the same channel
numbers, loss and steps, from random weights.

The same command again resumes where it stopped. Writes the students into checkpoints/pruned/,
pruning.csv and pruning.png, and prints a table. On one CPU core a student takes about 5 minutes for
5 epochs of CIFAR-10. Needs `pip install -r requirements-deploy.txt`.
"""

import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from comparison import SPLITS, Comparison
from metrics import evaluate_vae, vgg_distance
from models import count_parameters, find_student, load_model, weight_bytes
from pictures import PANELS, save_figure
from runtime import InputError, print_table, require, run_script
from settings import file_path, number, one_of, parse_settings, several, switch, text, whole
from storage import check_writable, save_checkpoint, write_csv
from tiny_vae_32 import TinyVAE32
from vae import IMAGE_SHAPE

HERE = Path(__file__).resolve().parent

# --- What is pruned ---
STUDENT = None  # a file in the checkpoint folder, or a path; None: the best one there, or released
RATIOS = (0.4, 0.6, 0.8)  # fractions of the parameters to remove, one student for each
FRESH = True  # beside each, a student of its size from random weights

# --- Training, with weights, optimiser and batch size as at the top of distill_tinyvae.py ---
DATA = None  # as in distill_tinyvae.py; None: what the teacher, or else the student, was trained on
LIMIT = 0  # train on the first N images; 0 uses all
TEACHER = None  # to distil from: a file in the checkpoint folder, or a path; or None
VGG = "imagenet"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
EPOCHS = 5  # epochs of each student
LEARNING_RATE = 3e-3  # at the peak
SEED = 0  # of weights, image order and latent samples

# --- Measuring ---
SPLIT = "val"  # val while anything is being chosen; test for the final figures
JUDGE = None  # VGG16 that measures VGG distance: the path of other weights than VGG's; or None
JUDGED = 2000  # images that the judge sees; 0: all
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files; students go to pruned/ in it
OUTPUT_DIR = HERE / "outputs"  # folder of pruning.csv and pruning.png

KINDS = {
    "STUDENT": file_path(none=None), "RATIOS": several(number(0, 1, above=True)),
    "FRESH": switch(),
    "DATA": text(none=None), "LIMIT": whole(0, none=0), "TEACHER": file_path(none=None),
    "VGG": text(none="none"), "EPOCHS": whole(1), "LEARNING_RATE": number(0, above=True),
    "SEED": whole(0, 2**32 - 1),
    "SPLIT": one_of("val", "test"), "JUDGE": text(none="none"), "JUDGED": whole(0, none=0),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "CHECKPOINT_DIR": file_path(),
    "OUTPUT_DIR": file_path(),
}

FIGURES = ("mse", "psnr", "vgg_distance", "kl_nats", "active_dims")
COLUMNS = (
    "student", "ratio", "split", "channels", "parameters", "weight_bytes", *FIGURES, "mse_as_cut",
    "seconds",
)


def pruned_widths(student, ratio):
    """Channels of the encoder's and decoder's stages with at least this fraction of the parameters
    removed.

    All stages are capped at the same width. The wide ones near the latents hold nearly all of the
    parameters, the narrow ones near the image few, and removing those costs the most error: the
    same fraction of every stage ends with 4% more error at the same size.
    """
    architecture = student.architecture
    allowed = (1 - ratio) * count_parameters(student)
    widest = max(architecture["encoder_channels"] + architecture["decoder_channels"])
    for cap in range(widest, 0, -1):
        widths = [
            [min(width, cap) for width in architecture[side]]
            for side in ("encoder_channels", "decoder_channels")
        ]
        with torch.device("meta"):  # to be counted, not to be filled
            if count_parameters(TinyVAE32(student.latent_dim, *widths)) <= allowed:
                return widths
    raise InputError(f"no student is left with {ratio:g} of the parameters removed: lower --ratios")


def prune(student, encoder_channels, decoder_channels):
    """A TinyVAE32 of these channels: the student without whole channels of the least weight.

    What belongs to a channel is removed with it: filter, BatchNorm, and the weights that read it.
    The importance of a channel is the norm of all of these (Fang et al. 2023, DepGraph,
    arXiv:2301.12900).

    Args:
        student: a TinyVAE32; it is left as it is.
        encoder_channels, decoder_channels: of the smaller one, none above the student's.
    """
    pruning = require("torch_pruning")
    vae = copy.deepcopy(student).cpu().eval().requires_grad_(True)
    vae.check_range = False
    convolutions = [layer for layer in vae.encoder if isinstance(layer, nn.Conv2d)]
    doublings = [layer for layer in vae.decoder if isinstance(layer, nn.ConvTranspose2d)]
    cuts = [
        *((layer, pruning.prune_conv_out_channels, layer.out_channels, width)
          for layer, width in zip(convolutions, encoder_channels)),
        *((layer, pruning.prune_conv_in_channels, layer.in_channels, width)
          for layer, width in zip(doublings, decoder_channels)),
    ]
    graph = pruning.DependencyGraph().build_dependency(vae, torch.rand(2, *IMAGE_SHAPE))
    importance = pruning.importance.GroupMagnitudeImportance()
    removed = []  # chosen before anything is cut, which changes the norms of what is left
    for layer, cut, count, width in cuts:
        weights = importance(graph.get_pruning_group(layer, cut, list(range(count))))
        removed.append(weights.argsort()[: count - width].tolist())
    for (layer, cut, *_), channels in zip(cuts, removed):
        if channels:
            graph.get_pruning_group(layer, cut, channels).prune()
    small = TinyVAE32(student.latent_dim, encoder_channels, decoder_channels)
    small.load_state_dict(vae.state_dict())
    return small.eval()


def train(comparison, pruned, ratio, start):
    """A row of the table: the pruned student trained on, or one of its size from random weights.

    Args:
        comparison: what all of them share.
        pruned: the student as it was cut.
        ratio: the fraction that was cut.
        start: `pruned`, or `fresh` for random weights.
    """
    settings = comparison.settings
    architecture = pruned.architecture
    if start == "pruned":
        cut = comparison.folder / f"cut_{ratio:g}.pth"
        save_checkpoint(cut, {"architecture": architecture, "model": pruned.state_dict()})
        changes = {"start": cut}
    else:
        shape = ("latent_dim", "encoder_channels", "decoder_channels")
        changes = {name: architecture[name] for name in shape}
    changes["learning_rate"] = settings.learning_rate
    folder = f"{start}_{ratio:g}"
    label = f"{start}, −{ratio:.0%}"
    trained = comparison.train_student(label, folder, settings.seed, **changes)
    seconds = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
    vae, _ = load_model(comparison.folder / folder / "tinyvae_best.pth", TinyVAE32)
    return {"seconds": seconds} | measure(comparison, start, vae, ratio)


def measure(comparison, name, vae, ratio=0.0):
    vae.to(comparison.device, memory_format=torch.channels_last)
    found = evaluate_vae(vae, comparison.held_out.images)
    if comparison.judge:
        found["vgg_distance"] = vgg_distance(vae, comparison.judged, comparison.judge)
    channels = vae.architecture["encoder_channels"] + vae.architecture["decoder_channels"]
    row = {
        "student": name,
        "ratio": ratio,
        "split": comparison.settings.split,
        "parameters": count_parameters(vae),
        "weight_bytes": weight_bytes(vae),
        "channels": "-".join(map(str, channels)),
    }
    return row | {key: found[key] for key in FIGURES if key in found}


def table_row(row, whole):
    def cell(key, digits):
        return f"{row[key]:.{digits}f}" if key in row else "–"

    return {
        "student": row["student"] + (f", −{row['ratio']:.0%}" if row["ratio"] else ""),
        "channels": row["channels"],
        "parameters": f"{row['parameters']:,}",
        "weights, bytes": f"{row['weight_bytes']:,}",
        "MSE": cell("mse", 5),
        "vs whole": f"{row['mse'] / whole['mse'] - 1:+.1%}",
        "MSE as cut": cell("mse_as_cut", 4),
        "VGG distance": cell("vgg_distance", 4),
        "KL, nats": cell("kl_nats", 1),
    }


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
            ("pruned", "pruned, trained on", "tab:blue"),
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


def prune_all(settings):
    for ratio in settings.ratios:
        if ratio >= 1:
            raise InputError(f"--ratios takes fractions between 0 and 1, got {ratio:g}")
    student_path = find_student(settings.student, settings.checkpoint_dir)
    student, checkpoint = load_model(student_path, TinyVAE32)
    students = {ratio: prune(student, *pruned_widths(student, ratio)) for ratio in settings.ratios}
    record = checkpoint.get("record", {})
    comparison = Comparison(settings, "pruned", record.get("data"))
    comparison.refuse_judge_of(record)
    check_writable(comparison.folder)
    check_writable(settings.output_dir)
    comparison.print_summary(
        f"{settings.epochs} epochs for each student, seed {settings.seed}, peak learning rate "
        f"{settings.learning_rate:g}"
    )
    csv_path, png_path = settings.output_dir / "pruning.csv", settings.output_dir / "pruning.png"
    title = f"{comparison.data}, {SPLITS[settings.split]} split, {settings.epochs} epochs each"
    rows = [measure(comparison, "whole", student)]
    for ratio, pruned in students.items():
        cut = evaluate_vae(copy.deepcopy(pruned).to(comparison.device), comparison.held_out.images)
        rows.append(train(comparison, pruned, ratio, "pruned") | {"mse_as_cut": cut["mse"]})
        if settings.fresh:
            rows.append(train(comparison, pruned, ratio, "fresh"))
        write_csv(csv_path, COLUMNS, rows)
        draw_sizes(png_path, rows, title)
    print()
    print_table([table_row(row, rows[0]) for row in rows])
    print(
        "\nMSE: pixels in [0, 1], decoded from mu. fresh: the same channels, terms and steps, from "
        "random weights.\nMSE as cut: before it was trained again. channels: out of the encoder's "
        "four stages, into the decoder's four.\nVGG distance: of the features of --judge."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {comparison.folder}/")


def main(argv=None):
    prune_all(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
