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
5 epochs of CIFAR-10. Needs `pip install -r requirements-dev.txt`.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from common import kind
from common.comparison import FIGURES, Comparison, make_plots, relative_change
from common.data import IMAGE_SHAPE
from common.metrics import evaluate_vae
from common.models import count_parameters, find_student, load_model, weight_bytes
from common.pictures import save_figure
from common.runtime import InputError, cell, print_table, require, run_script
from common.settings import parse_settings
from common.storage import save_checkpoint, write_csv
from common.vgg import refuse_judge
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What is pruned ---
# a file in the checkpoint folder, or a path; None: the best one there, or released
STUDENT: kind.FileOrNone = None
# fractions of the parameters to remove, one student for each
RATIOS: kind.several(kind.number(0, 1, above=True)) = (0.4, 0.6, 0.8)
FRESH: kind.Switch = True  # beside each, a student of its size from random weights

# --- Training, with weights, optimiser and batch size as at the top of distill_tinyvae.py ---
# as in distill_tinyvae.py; None: what the teacher, or else the student, was trained on
DATA: kind.text(none=None) = None
LIMIT: kind.CountOr0 = 0  # train on the first N images; 0 uses all
# to distil from: a file in the checkpoint folder, or a path; or None
TEACHER: kind.FileOrNone = None
# VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
VGG: kind.Weights = "imagenet"
EPOCHS: kind.Count = 5  # epochs of each student
LEARNING_RATE: kind.Positive = 3e-3  # at the peak
SEED: kind.Seed = 0  # of weights, image order and latent samples

# --- Measuring ---
# val while anything is being chosen; test for the final figures
SPLIT: kind.one_of("val", "test") = "val"
# VGG16 that measures VGG distance: the path of other weights than VGG's; or None
JUDGE: kind.Weights = None
JUDGED: kind.CountOr0 = 2000  # images that the judge sees; 0: all
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
# folder of the .pth files; students go to pruned/ in it
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of pruning.csv and pruning.png

# --- Not settings ---

COLUMNS = (
    "student", "ratio", "split", "channels", "parameters", "weight_bytes", *FIGURES, "mse_as_cut",
    "seconds",
)
COLOURS = {"pruned": "tab:blue", "fresh": "tab:orange"}


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
    """A row of the table: the student that was cut by this ratio, trained on (`pruned`), or one of
    its channels from random weights (`fresh`)."""
    s, architecture = comparison.settings, pruned.architecture
    if start == "pruned":
        cut = comparison.folder / f"cut_{ratio:g}.pth"
        save_checkpoint(cut, {"architecture": architecture, "model": pruned.state_dict()})
        changes = {"start": cut}
    else:
        changes = {name: value for name, value in architecture.items() if name != "name"}
    vae, row = comparison.train_and_measure(
        f"{start}, −{ratio:.0%}", f"{start}_{ratio:g}", s.seed,
        learning_rate=s.learning_rate, **changes,
    )
    return {"student": start, "ratio": ratio} | size(vae) | row


def size(vae):
    channels = vae.architecture["encoder_channels"] + vae.architecture["decoder_channels"]
    return {"channels": "-".join(map(str, channels)), "weight_bytes": weight_bytes(vae)}


def table_row(row, whole):
    return {
        "student": row["student"] + (f", −{row['ratio']:.0%}" if row["ratio"] else ""),
        "channels": row["channels"],
        "parameters": f"{row['parameters']:,}",
        "weights, bytes": f"{row['weight_bytes']:,}",
        "MSE": cell(row, "mse", ".5f"),
        "vs whole": relative_change(row, whole, "mse"),
        "MSE as cut": cell(row, "mse_as_cut", ".4f"),
        "VGG distance": cell(row, "vgg_distance", ".4f"),
        "KL, nats": cell(row, "kl_nats", ".1f"),
    }


def draw_sizes(path, rows, title):
    """Error against parameters: the whole student, those pruned from it, and fresh ones.

    Args:
        path: the PNG to write.
        rows: those of pruning.csv.
        title: data and budget in a few words.
    """
    whole, *others = rows
    figure, plots = make_plots(rows, title)
    for ax, name, label in plots:
        for start, colour in COLOURS.items():
            points = sorted((r["parameters"], r[name]) for r in others if r["student"] == start)
            if points:
                ax.plot(*zip(*points), marker="o", color=colour, label=start)
        ax.plot(whole["parameters"], whole[name], "k*", markersize=10, label="whole")
        for row in others:
            if row["student"] == "pruned":
                ax.annotate(
                    f"−{row['ratio']:.0%}", (row["parameters"], row[name]), xytext=(0, -12),
                    textcoords="offset points", fontsize=8, ha="center",
                )
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        ax.set_xlabel("parameters", fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.legend(fontsize=8)
    save_figure(figure, path)


def main(argv=()):
    s = parse_settings(globals(), argv)
    student, checkpoint = load_model(find_student(s.student, s.checkpoint_dir), TinyVAE32)
    students = {ratio: prune(student, *pruned_widths(student, ratio)) for ratio in s.ratios}
    record = checkpoint.get("record", {})
    comparison = Comparison(
        s, "pruned", record.get("data"), split=s.split, judge=s.judge, judged=s.judged
    )
    refuse_judge(comparison.judge_record, record)
    comparison.begin(
        f"{s.epochs} epochs for each student, seed {s.seed}, peak learning rate "
        f"{s.learning_rate:g}"
    )
    csv_path, png_path = s.output_dir / "pruning.csv", s.output_dir / "pruning.png"
    title = f"{comparison.data}, {s.split} split, {s.epochs} epochs each"
    rows = [{"student": "whole", "ratio": 0} | size(student) | comparison.measure(student)]
    for ratio, pruned in students.items():
        cut = evaluate_vae(copy.deepcopy(pruned).to(comparison.device), comparison.held_out.images)
        rows.append(train(comparison, pruned, ratio, "pruned") | {"mse_as_cut": cut["mse"]})
        if s.fresh:
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


if __name__ == "__main__":
    run_script(main)
