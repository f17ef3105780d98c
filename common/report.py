"""What a run of distill_tinyvae.py prints and draws; names of the files that are drawn."""

import numpy as np
import torch

from common.folders import read_image
from common.losses import TERMS
from common.metrics import evaluate_vae
from common.models import count_parameters
from common.pictures import draw_interpolations, draw_reconstructions, new_figure, save_figure
from common.runtime import print_table, require
from common.synthetic import photo_crops

FEW_IMAGES = 10_000  # with fewer, pictures made by the teacher help: docs/results.md
TENSORBOARD = "tensorboard"  # a folder in that of the outputs
PICTURES = ("training_curves.png", "reconstruction_test.png", "interpolation_test.png")
EVALUATION_FILES = (  # of test_trained_model.py
    "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
    "traversal.png", "colours.png",
)
SWAP_FILES = ("code_maps.pth", "swap.png")  # likewise, where there is a teacher


def print_summary(run):
    """The settings in force, before any work."""
    s, record, weights = run.settings, run.record, run.weights
    parts = ", ".join(f"{term} {record[f'{term}_weight']:g}" for term in TERMS)
    beta, processes = record["effective_beta"], record["processes"]
    kl = f"× {s.kl_scale:g}; effective beta {'none' if beta is None else f'{beta:.3g}'} (KL "
    kl += "against the reconstruction term alone)"
    if s.rate:
        kl = f"held at {s.rate:g} nats by its weight"
    notes = [f"KL {kl}"]
    if "output" in weights:
        softened = f"softened at T = {s.temperature:g}"
        notes.append(f"output {softened if s.teacher else 'compares with the image'}")
    if "perceptual" in weights:
        seen = s.perceptual_images or "all"
        precision = record["perceptual_precision"]
        notes.append(
            f"perceptual × {s.perceptual_scale:g}, of {seen} images of a batch, in {precision}"
        )
    if left_out := [term for term in TERMS if term not in weights]:
        notes.append(f"left out: {', '.join(left_out)}")
    if s.teacher is None:
        teacher = "none"
    elif not run.needs_teacher:
        teacher = "none: no term needs one"
    elif s.teacher == "train":
        teacher = (
            f"StandardVAE, {s.teacher_epochs} epochs, beta {s.teacher_kl_weight:g}, Adam, peak "
            f"learning rate {s.teacher_learning_rate:g}"
        )
    else:
        teacher = f"{record['teacher_architecture']['name']}, {s.teacher}"
    source, made = record["data"], ""
    if source == "none":
        source = "made by the teacher"
    elif "made_images" in record:
        made = (
            f" ({record['made_images']:,} made by the teacher, the others "
            f"{record['photographs']:,} photographs, repeated)"
        )
    print(
        f"images       {source}: {record['train_images']:,} to train on{made}, "
        f"{record['val_images']:,} held out\n"
        f"teacher      {teacher}\n"
        f"student      TinyVAE32, {s.epochs} epochs, from {s.start or 'random weights'}\n"
        f"loss         {parts}\n" + "".join(f"             {note}\n" for note in notes) +
        f"VGG16        {record['vgg_weights']}\n"
        f"optimiser    {s.optimizer.capitalize()}, peak learning rate {s.learning_rate:g}, batch "
        f"{s.batch_size}, seed {s.seed}\n"
        f"device       {record['device_name']}, {run.precision}"
        f"{f', {processes} processes' if processes > 1 else ''}\n"
        f"checkpoints  {s.checkpoint_dir}\n"
        f"outputs      {s.output_dir}\n"
    )
    if record["data"] != "none" and not s.teacher_images and len(run.images) < FEW_IMAGES:
        print(
            f"{len(run.images):,} images are few: --teacher checkpoints/teacher_cifar10.pth "
            "--teacher-images 0.9 adds pictures that the teacher makes (docs/results.md)\n"
        )


def draw(run, teacher, student, rows, when):
    """Redraw PICTURES. teacher may be None; rows are those of metrics.csv."""
    data, images = run.record["data"], run.val_images
    if data == "none":  # photographs, since that is what the student is for
        data, images = "photo-crops", photo_crops(100, "val").to(run.device)
    what = f"{data}, validation split, student at {when}"
    models = ({"teacher": teacher} if teacher else {}) | {"student": student}
    curves, reconstructions, interpolations = map(run.output, PICTURES)
    draw_reconstructions(reconstructions, images, models, what)
    draw_interpolations(interpolations, images, models, what)
    if run.teacher:  # that one's images may be others
        rows = [row for row in rows if row["stage"] == "student"]
    sources = [] if run.record["data"] == "none" else [data]
    sources += ["pictures made by the teacher"] if run.record.get("made_images") else []
    draw_curves(curves, rows, f"Training on {' and '.join(sources)}")


def log_epoch(run, row):
    """A row of metrics.csv for TensorBoard, and the pictures where they were just redrawn."""
    stage, epoch = row["stage"], row["epoch"]
    writer = tensorboard_writer(run.output(TENSORBOARD) / stage, epoch)
    for name, value in row.items():
        if name not in ("stage", "epoch") and value is not None:
            writer.add_scalar(name, value, epoch)
    if stage == "student" and epoch % run.settings.save_every == 0:
        picture = np.array(read_image(run.output("reconstruction_test.png")))
        writer.add_image("reconstructions", picture, epoch, dataformats="HWC")
    writer.flush()


WRITERS = {}  # of TensorBoard, by folder


def tensorboard_writer(folder, epoch):
    """A folder's writer. The first of a process replaces what is there from this epoch on: a run
    that resumes writes its last epoch again."""
    if folder not in WRITERS:
        tensorboard = require("torch.utils.tensorboard", "pip install tensorboard")
        WRITERS[folder] = tensorboard.SummaryWriter(folder, purge_step=epoch)
    return WRITERS[folder]


def draw_curves(path, rows, title):
    """Loss and its parts, validation error, rate and learning rate over the epochs of each stage.

    Args:
        path: the PNG to write.
        rows: the rows of metrics.csv.
        title: the run in a few words.
    """
    figure = new_figure(12, 6.5, title)
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
            for term in TERMS:
                plot(axes[1], f"{term}_weighted", label=term)
        last = stage_rows[-1]["val_mse"]
        plot(axes[2], "val_mse", color=colour, label=f"{stage}, last {last:.5f}")
        plot(axes[3], "kl_nats", color=colour, label=stage)
        plot(axes[4], "active_dims", color=colour, label=stage)
        plot(axes[5], "learning_rate", color=colour, label=stage)
    names = (
        "loss", "parts of the student's loss: weight × term", "validation MSE, pixels in [0, 1]",
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


def print_results(run, teacher, student, seconds, files):
    """Validation figures of both models, the time, and the files written."""
    models = ({"teacher": teacher} if teacher else {}) | {"student, best epoch": student}
    table = []
    for name, model in models.items():
        found = evaluate_vae(model, run.val_images)
        table.append(
            {
                "validation split": name,
                "parameters": f"{count_parameters(model):,}",
                "MSE": f"{found['mse']:.5f}",
                "mean PSNR": f"{found['psnr']:.2f} dB",
                "KL": f"{found['kl_nats']:.1f} nats",
                "active": f"{found['active_dims']} of {model.latent_dim}",
            }
        )
    print()
    print_table(table)
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        print(f"\nPeak GPU memory: {peak:.2f} GiB, beside what CUDA itself takes")
    print(f"\nDone in {seconds / 60:.1f} minutes. Written:", *files, sep="\n  ")
