"""Prune a student: fewer channels, then more distillation from the same teacher.

    python prune_tinyvae.py --vgg PATH                   # the students of RATIOS, and fresh ones
    python prune_tinyvae.py --vgg none --ratios 0.5 --epochs 1 --no-fresh          # a trial
    python prune_tinyvae.py --vgg PATH --split test      # the final figures of those trained
    python test_trained_model.py --student checkpoints/pruned/tinyvae_pruned_0.6.pth

Whole channels go, those of the smallest weights (torch-pruning), so that what is left is a
TinyVAE32 with other channel numbers: smaller, faster, and loaded by every script. The 64 latents
stay. Then it is distilled again with the five terms. Beside each stands a fresh student:
the same channel numbers, terms and steps, from random weights.

It needs a teacher: distill_tinyvae.py leaves one in checkpoints/. The same command again goes on
where it stopped. Writes the students into checkpoints/pruned/, pruning.csv and pruning.png, and
prints a table. On 2 CPU cores a student takes about 5 minutes for 5 epochs of CIFAR-10.
Needs `pip install -r requirements-deploy.txt`.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from ablate_distillation import SPLITS, Laboratory
from distill_tinyvae import RECIPE, student_stage, train_once
from losses import LatentProjection
from metrics import encode_means, evaluate_vae, perceptual_distance
from models import BEST_STUDENT, count_parameters, find_student, load_model, weight_bytes
from pictures import draw_sizes
from runtime import InputError, describe_device, parse_flags, print_table, require, run
from storage import check_writable, fingerprint, write_csv
from tiny_vae_32 import TinyVAE32
from vae import IMAGE_SHAPE

HERE = Path(__file__).resolve().parent

# --- What is pruned ---
STUDENT = BEST_STUDENT  # a file in the checkpoint folder, or a path; else the released one
RATIOS = "0.4,0.6,0.8"  # shares of the parameters that go, a student each, separated by commas
FRESH = True  # beside each, a student of its size from random weights

# --- Distillation, with the weights and the batch size at the top of distill_tinyvae.py ---
DATA = "teacher"  # what the teacher was trained on, or cifar10, dead-leaves, or a folder
LIMIT = 0  # train on the first N images; 0 uses all
TEACHER = "teacher_vae.pth"  # a file in the checkpoint folder, or a path
VGG = "imagenet"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
EPOCHS = 5  # epochs of each student
LEARNING_RATE = 1e-3  # Adam's, at the peak
SEED = 0  # of weights, image order and latent samples

# --- Measuring ---
SPLIT = "val"  # val while anything is being chosen; test for the final figures
JUDGE = "none"  # VGG16 that measures perceptual distance: a path, other weights than VGG's; or none
JUDGED = 2000  # images that the judge sees; 0: all
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files; students go to pruned/ in it
OUTPUT_DIR = HERE / "outputs"  # folder of pruning.csv and pruning.png

FIGURES = ("mse", "psnr", "perceptual", "kl_nats", "active_dims")
COLUMNS = (
    "student", "ratio", "split", "channels", "parameters", "weight_bytes", *FIGURES, "mse_as_cut",
    "seconds",
)
# What makes a pruned student the same one.
OWN_RECIPE = (*RECIPE, "teacher_sha256", "architecture", "start")


def parse_ratios(text):
    """Numbers between 0 and 1 from --ratios. Raises InputError for anything else."""
    try:
        ratios = [float(word) for word in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or any(not 0 < ratio < 1 for ratio in ratios):
        raise InputError(
            f"--ratios takes shares between 0 and 1, separated by commas, got {text!r}"
        )
    return ratios


def pruned_widths(student, ratio):
    """Channels of the encoder's and decoder's stages after at least this share of the parameters
    has gone.

    All stages are capped at the same width. The wide ones near the code hold nearly all of the
    parameters, the narrow ones near the image hardly any, and these cost the most error: cutting
    the same share of each ends with 4% more of it at the same size.
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
    raise InputError(f"no student is left with {ratio:g} of the parameters gone: lower --ratios")


def prune(student, ratio):
    """A TinyVAE32 without the given share of the parameters, whole channels of least weight gone.

    What belongs to a channel goes with it: filter, BatchNorm, and the weights that read it. The
    importance of a channel is the norm of all of these (Fang et al. 2023, DepGraph,
    arXiv:2301.12900).

    Args:
        student: a TinyVAE32; it is left as it is.
        ratio: the share that goes, above 0 and below 1.
    """
    pruning = require("torch_pruning")
    vae = copy.deepcopy(student).cpu().eval().requires_grad_(True)
    vae.check_range = False
    encoder_widths, decoder_widths = pruned_widths(vae, ratio)
    convolutions = [layer for layer in vae.encoder if isinstance(layer, nn.Conv2d)]
    doublings = [layer for layer in vae.decoder if isinstance(layer, nn.ConvTranspose2d)]
    cuts = [
        *((layer, pruning.prune_conv_out_channels, layer.out_channels, width)
          for layer, width in zip(convolutions, encoder_widths)),
        *((layer, pruning.prune_conv_in_channels, layer.in_channels, width)
          for layer, width in zip(doublings, decoder_widths)),
    ]
    graph = pruning.DependencyGraph().build_dependency(vae, torch.rand(2, *IMAGE_SHAPE))
    importance = pruning.importance.GroupMagnitudeImportance()
    condemned = []  # all of them before anything is cut, which changes the norms of what is left
    for layer, cut, count, width in cuts:
        weights = importance(graph.get_pruning_group(layer, cut, list(range(count))))
        condemned.append(weights.argsort()[: count - width].tolist())
    for (layer, cut, *_), channels in zip(cuts, condemned):
        if channels:
            graph.get_pruning_group(layer, cut, channels).prune()
    small = TinyVAE32(student.latent_dim, encoder_widths, decoder_widths)
    small.load_state_dict(vae.state_dict())
    return small.eval()


def fitted_projection(student_mu):
    """How to project the teacher's code for a student that has one already: nearest to that.

    Orthogonal Procrustes (Schönemann 1966): Q = UVᵀ of the covariance of the two codes. From the
    principal components, where a new student starts, the code would first have to turn.
    """

    def make(teacher_mu, latent_dim):
        projection = LatentProjection(teacher_mu, latent_dim)  # on the CPU
        with torch.no_grad():
            whitened = (teacher_mu.cpu() - projection.mean) @ projection.whitening.T
            u, _, v = torch.linalg.svd(student_mu.cpu().T @ whitened, full_matrices=False)
            projection.rotation.weight.copy_(u @ v)
        return projection

    return make


def train(laboratory, pruned, ratio, start):
    """A row of the table: the pruned student trained on, or one of its size from random weights.

    Args:
        laboratory: what all of them share.
        pruned: the student as it was cut.
        ratio: the share that was cut.
        start: `pruned`, or `fresh` for random weights.
    """
    settings = laboratory.settings
    job = laboratory.job(settings.seed, learning_rate=settings.learning_rate)
    job.record["start"] = fingerprint(pruned) if start == "pruned" else "random weights"
    job.record["architecture"] = pruned.architecture

    def make_stage():
        targets = laboratory.targets_for(job)
        if start == "pruned":
            student = copy.deepcopy(pruned).to(job.device)
            project = fitted_projection(encode_means(student, job.images))
            return student_stage(job, targets, laboratory.vgg, project, student)
        torch.manual_seed(settings.seed)
        arguments = {key: value for key, value in pruned.architecture.items() if key != "name"}
        return student_stage(job, targets, laboratory.vgg, student=TinyVAE32(**arguments))

    path = settings.checkpoint_dir / "pruned" / f"tinyvae_{start}_{ratio:g}.pth"
    trained = train_once(job, f"{start}, ratio {ratio:g}", path, OWN_RECIPE, make_stage)
    seconds = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
    return {"seconds": seconds} | measure(laboratory, start, load_model(path, TinyVAE32)[0], ratio)


def measure(laboratory, name, vae, ratio=0.0):
    vae.to(laboratory.device, memory_format=torch.channels_last)
    found = evaluate_vae(vae, laboratory.exam.images)
    if laboratory.judge:
        found["perceptual"] = perceptual_distance(vae, laboratory.judged, laboratory.judge)
    channels = vae.architecture["encoder_channels"] + vae.architecture["decoder_channels"]
    row = {
        "student": name,
        "ratio": ratio,
        "split": laboratory.settings.split,
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
        "perceptual": cell("perceptual", 4),
        "KL, nats": cell("kl_nats", 1),
    }


def prune_all(settings):
    ratios = parse_ratios(settings.ratios)
    student_path = find_student(settings.student, settings.checkpoint_dir)
    student, checkpoint = load_model(student_path, TinyVAE32)
    students = {ratio: prune(student, ratio) for ratio in ratios}
    laboratory = Laboratory(settings)
    laboratory.refuse_judge_of(checkpoint.get("record", {}))
    check_writable(settings.checkpoint_dir / "pruned")
    check_writable(settings.output_dir)
    images, split = laboratory.images, SPLITS[settings.split]
    print(
        f"teacher  {laboratory.teacher_path}\n"
        f"images   {images.record['data']}: {len(images.train):,} to train on; figures are of "
        f"{len(laboratory.exam.images):,} of the {split} split\n"
        f"VGG16    {laboratory.vgg_record['vgg_weights']}; judge: "
        f"{laboratory.judge_record['vgg_weights']}\n"
        f"budget   {settings.epochs} epochs a student, seed {settings.seed}, peak learning rate "
        f"{settings.learning_rate:g}\n"
        f"device   {describe_device(laboratory.device)}, {laboratory.precision}"
    )
    csv_path, png_path = settings.output_dir / "pruning.csv", settings.output_dir / "pruning.png"
    title = f"{images.record['data']}, {split} split, {settings.epochs} epochs each"
    rows = [measure(laboratory, "whole", student)]
    for ratio, pruned in students.items():
        cut = evaluate_vae(copy.deepcopy(pruned).to(laboratory.device), laboratory.exam.images)
        rows.append(train(laboratory, pruned, ratio, "pruned") | {"mse_as_cut": cut["mse"]})
        if settings.fresh:
            rows.append(train(laboratory, pruned, ratio, "fresh"))
        write_csv(csv_path, COLUMNS, rows)
        draw_sizes(png_path, rows, title)
    print()
    print_table([table_row(row, rows[0]) for row in rows])
    print(
        "\nMSE: pixels in [0, 1], decoded from mu. fresh: the same channels, terms and steps, from "
        "random weights.\nMSE as cut: before it was trained again. channels: out of the encoder's "
        "four stages, into the decoder's four.\nperceptual: distance of VGG16 features (--judge)."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {settings.checkpoint_dir / 'pruned'}/")


def main(argv=None):
    prune_all(parse_flags(globals(), argv))


if __name__ == "__main__":
    run(main)
