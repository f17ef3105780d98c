"""Students trained for comparison: how each is trained and measured, and what tables and plots of
them have in common.

Each is trained by a run of distill_tinyvae.py, with other flags, in a folder of its own. A run that
stopped is resumed, and one that is done is not repeated.
"""

import subprocess
import sys
from pathlib import Path

import torch

from common import kind
from common.data import Split, evenly_spaced
from common.metrics import evaluate_vae, sampled_mse, vgg_distance
from common.models import (
    BEST_STUDENT,
    count_parameters,
    find_checkpoint,
    load_any_teacher,
    load_model,
)
from common.pictures import new_figure
from common.runtime import InputError, describe_device, pick_device, pick_precision, require
from common.settings import flag_value
from common.sources import load_test_images, load_training_images
from common.storage import check_writable, load_checkpoint, locked
from common.vgg import VGGFeatures, load_vgg16, refuse_judge
from tiny_vae_32 import TinyVAE32

SCRIPT = Path(__file__).resolve().parents[1] / "distill_tinyvae.py"
SPLITS = {"val": "validation", "test": "test"}
ARGUMENTS = ("encoder_channels", "latent_dim", "decoder_channels")  # of a TinyVAE32
# What `Comparison.measure` finds of a student, beside its parameters and the split.
FIGURES = ("mse", "sampled_mse", "psnr", "kl_nats", "active_dims", "vgg_distance")
PLOTTED = {"mse": "MSE from mu, pixels in [0, 1]", "vgg_distance": "VGG distance"}


# --- The shape of a student in a word ---


def read_shape(word):
    """16-32-64-128_64_128-64-32-16, the default's: channels of a TinyVAE32's encoder, latents,
    channels of its decoder → its constructor's arguments."""
    encoder, latents, decoder = str(word).split("_")
    encoder, decoder = (kind.Channels.read(side.split("-")) for side in (encoder, decoder))
    return dict(zip(ARGUMENTS, (encoder, kind.Count.read(latents), decoder)))


Shape = kind.Kind(read_shape, "a shape like 16-32-64-128_64_128-64-32-16")  # of a setting


def shape_name(shape):
    """The word for these arguments."""
    encoder, latents, decoder = (shape[name] for name in ARGUMENTS)
    return f"{'-'.join(map(str, encoder))}_{latents}_{'-'.join(map(str, decoder))}"


# --- A run of distill_tinyvae.py ---


def run_distillation(label, folder, settings):
    """Train a student by distill_tinyvae.py, or resume it, or find that it is done.

    Args:
        label: the student in a few words.
        folder: for its checkpoints, metrics.csv, pictures, and log.txt with what the run prints.
        settings: name → value, those that differ from the constants of the script. START, DEMO and
            OVERWRITE are of a single run: edited in the script, they do not count here.

    Returns the content of its tinyvae_last.pth. Raises InputError if it fails; the script's own
    words are on the terminal by then.
    """
    check_writable(folder)
    folders = {"checkpoint_dir": folder, "output_dir": folder, "resume": True}
    flags = as_flags({"start": None, "demo": False, "overwrite": False} | settings | folders)
    print(f"\n{label}: {folder}", flush=True)
    with locked(folder, wait=True, name=".started"), (folder / "log.txt").open("a") as log:
        with locked(folder, wait=True):  # for a run whose parent was killed
            pass
        code = run_process([sys.executable, SCRIPT, *flags], log)
    if code:
        raise InputError(
            f"{label} did not finish, for the reason above: correct that and repeat the command "
            f"(remove {folder} to train it again)"
        )
    return load_checkpoint(folder / "tinyvae_last.pth")


def as_flags(settings):
    """{"kl_weight": 0.2, "demo": False} → ["--kl-weight", "0.2", "--no-demo"]."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", flag_value(value)]
    return words


def run_process(command, stdout):
    """A command's exit code. A function, so that tests can train in their own process instead."""
    return subprocess.run(command, stdout=stdout).returncode


# --- What students share ---


class Comparison:
    """Images, teacher and judge that all students share.

    Args:
        settings: has data, limit, teacher, vgg, epochs, device, precision and checkpoint_dir.
            teacher may be None: then they train without one.
        name: folder of the students in checkpoint_dir.
        trained_on: the images to take where neither settings nor teacher name any, or None.
        split: val or test, to measure on.
        judge: VGG16 that measures VGG distance, or none.
        judged: images that the judge sees; 0: all.

    Raises InputError where nothing names the images, and for what cannot be loaded.
    """

    def __init__(self, settings, name, trained_on=None, split="val", judge="none", judged=0):
        self.settings, self.split = settings, split
        self.folder = settings.checkpoint_dir / name
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.teacher, self.teacher_path = None, None
        if settings.teacher:
            self.teacher_path = find_checkpoint(settings.teacher, settings.checkpoint_dir)
            teacher, checkpoint = load_any_teacher(self.teacher_path)
            self.teacher = teacher.to(self.device, memory_format=torch.channels_last)
            trained_on = checkpoint.get("record", {}).get("data", trained_on)
        self.data = settings.data or trained_on
        if not self.data:
            named = self.teacher_path or "the student's checkpoint"
            raise InputError(f"{named} does not name its images: use --data")
        images = load_training_images(self.data, settings.limit)
        self.train = Split(images.train, images.labels).to(self.device)
        held_out = Split(images.val, images.val_labels)
        if split == "test":
            held_out = load_test_images(self.data, settings.limit)
        self.held_out = held_out.to(self.device)
        _, self.vgg_record = load_vgg16(settings.vgg)
        judge, self.judge_record = load_vgg16(judge)
        refuse_judge(self.judge_record, self.vgg_record)
        self.judge = judge and VGGFeatures(judge).to(self.device)
        self.judged = evenly_spaced(self.held_out.images, judged)

    def train_student(self, label, folder, seed, **changes):
        """`run_distillation` with the images and the teacher of this comparison."""
        settings = self.settings
        shared = {
            "data": self.data,
            "limit": settings.limit,
            "teacher": self.teacher_path,
            "vgg": settings.vgg,
            "epochs": settings.epochs,
            "seed": seed,
            "device": settings.device,
            "precision": settings.precision,
            "save_every": 1_000_000,  # no numbered checkpoints
        }
        return run_distillation(label, self.folder / folder, shared | changes)

    def train_and_measure(self, label, folder, seed, **changes):
        """Train a student, or find that it is trained. Returns that of its best epoch, and its row:
        path, seconds, and what `measure` finds."""
        trained = self.train_student(label, folder, seed, **changes)
        path = self.folder / folder / BEST_STUDENT
        vae, _ = load_model(path, TinyVAE32)
        seconds = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
        return vae, {"path": path, "seconds": seconds} | self.measure(vae)

    def measure(self, vae):
        """Split, parameters, and those of FIGURES that there are, in fp32; moves the model to the
        device. VGG distance needs a judge."""
        vae.to(self.device, memory_format=torch.channels_last)
        row = {"split": self.split, "parameters": count_parameters(vae)}
        row |= evaluate_vae(vae, self.held_out.images)
        row["sampled_mse"] = sampled_mse(vae, self.held_out.images)
        if self.judge:
            row["vgg_distance"] = vgg_distance(vae, self.judged, self.judge)
        return row

    def begin(self, budget):
        """Make the folders that are written to, and `print_summary`. Raises InputError for a folder
        that cannot be written, and for a package that is missing."""
        require("matplotlib.figure", "pip install -r requirements.txt")
        check_writable(self.folder)
        check_writable(self.settings.output_dir)
        self.print_summary(budget)

    def print_summary(self, budget):
        """What is compared, and with which budget, in words."""
        print(
            f"teacher  {self.teacher_path or 'none'}\n"
            f"images   {self.data}: {len(self.train.images):,} to train on; figures are of "
            f"{len(self.held_out.images):,} of the {SPLITS[self.split]} split\n"
            f"VGG16    {self.vgg_record['vgg_weights']}; judge: "
            f"{self.judge_record['vgg_weights']}\n"
            f"budget   {budget}\n"
            f"device   {describe_device(self.device)}, {self.precision}"
        )


# --- Tables and plots ---


def relative_change(row, other, name):
    """A figure's difference from another row's, for a table; – in that row itself."""
    return "–" if row is other or name not in row else f"{row[name] / other[name] - 1:+.1%}"


def make_plots(rows, title):
    """A figure, and (axes, name, label) for each of PLOTTED that the rows have."""
    names = [name for name in PLOTTED if name in rows[0]]
    figure = new_figure(6 * len(names), 4.5, title)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
        ax.margins(0.1, 0.15)
    return figure, [(ax, name, PLOTTED[name]) for ax, name in zip(axes, names)]
