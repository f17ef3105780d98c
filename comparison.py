"""Students trained for comparison, and the images, teacher and judge that they are measured with.

Each student is trained by a run of distill_tinyvae.py, with other flags, in a folder of its own. A
run that stopped is resumed, and one that is done is not repeated.
"""

import contextlib
import csv
import subprocess
import sys
from pathlib import Path

import torch

from data import Split, load_test_images, load_training_images, spread
from metrics import encode_means
from models import find_checkpoint, load_model
from runtime import InputError, describe_device, pick_device, pick_precision
from settings import Kind, must, whole
from storage import check_writable, fingerprint, load_checkpoint, locked
from vae import VAE
from vgg import VGGFeatures, load_vgg16

SCRIPT = Path(__file__).resolve().parent / "distill_tinyvae.py"
SPLITS = {"val": "validation", "test": "test"}
SHAPE = ("encoder_channels", "latent_dim", "decoder_channels")  # of a TinyVAE32


def shape():
    """A setting: the shape of a TinyVAE32 in a word, 16-32-64-128_64_128-64-32-16 for the default:
    channels of its encoder, latents, channels of its decoder. Constructor arguments."""

    def read(word):
        must(isinstance(word, str))
        encoder, latents, decoder = word.split("_")
        sides = [[whole(1).read(width) for width in side.split("-")] for side in (encoder, decoder)]
        must(all(len(side) == 4 for side in sides))
        return dict(zip(SHAPE, (sides[0], whole(1).read(latents), sides[1])))

    return Kind(read, "a shape like 16-32-64-128_64_128-64-32-16")


def shape_name(shape):
    """Constructor arguments of a TinyVAE32 → the word for its shape."""
    encoder, latents, decoder = (shape[name] for name in SHAPE)
    return f"{'-'.join(map(str, encoder))}_{latents}_{'-'.join(map(str, decoder))}"


def as_flags(settings):
    """{"kl_weight": 0.2, "graph": False} → ["--kl-weight", "0.2", "--no-graph"]."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        else:
            is_several = isinstance(value, (tuple, list))
            words += [f"--{name}", ",".join(map(str, value)) if is_several else str(value)]
    return words


def run_distillation(label, folder, settings, is_hopeless=None):
    """Train a student by distill_tinyvae.py, or resume it, or find that it is done.

    Args:
        label: the student in a few words.
        folder: for its checkpoints, metrics.csv, pictures, and log.txt with what the run prints.
        settings: name → value, those that differ from the constants of the script. START, DEMO and
            OVERWRITE are of a single run: edited in the script, they do not count here.
        is_hopeless: called with the student's `validation_rows` so far; True stops the run.

    Returns the content of its tinyvae_last.pth, or None if the run was stopped. Raises InputError
    if it fails; the script's own words are on the terminal by then.
    """
    check_writable(folder)
    log = folder / "log.txt"
    fixed = {"start": None, "demo": False, "overwrite": False}
    folders = {"checkpoint_dir": folder, "output_dir": folder, "resume": True}
    command = [sys.executable, SCRIPT, *as_flags(fixed | settings | folders)]
    print(f"\n{label}: {folder}", flush=True)
    with locked(folder, wait=True, name=".started"), log.open("a") as file:
        with locked(folder, wait=True):  # for a run that has outlived what started it
            pass
        code = run_process(
            command, file, lambda: is_hopeless and is_hopeless(validation_rows(folder))
        )
    if code is None:
        return None
    if code:
        raise InputError(
            f"{label} did not finish, for the reason above: correct that and repeat the command "
            f"(remove {folder} to train it again)"
        )
    return load_checkpoint(folder / "tinyvae_last.pth")


def run_process(command, stdout, is_to_stop):
    """Run a command, asking every second whether to stop it. Its exit code, None if stopped."""
    process = subprocess.Popen(command, stdout=stdout)
    try:
        while process.poll() is None:
            if is_to_stop():
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        return process.returncode
    finally:  # also where this process is interrupted
        process.terminate()  # does nothing to one that has ended
        process.wait()


def validation_rows(folder):
    """Error of samples and rate after each epoch of a student, which may still be training."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: float(row[name]) for name in ("val_sampled_mse", "kl_nats")}
            for row in csv.DictReader(file)
            if row["stage"] == "student"
        ]


class Comparison:
    """Images, teacher and judge that all students share.

    Args:
        settings: has data, limit, teacher, vgg, judge, judged, split, epochs, device, precision,
            checkpoint_dir and output_dir. teacher may be None: then they train without one.
        name: folder of the students in checkpoint_dir.
        trained_on: the images to take where neither settings nor teacher name any, or None.

    Raises InputError where nothing names the images, and for what cannot be loaded.
    """

    def __init__(self, settings, name, trained_on=None):
        self.settings = settings
        self.folder = settings.checkpoint_dir / name
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.teacher, self.teacher_path, self.teacher_sha256 = None, None, ""
        if settings.teacher:
            self.teacher_path = find_checkpoint(settings.teacher, settings.checkpoint_dir)
            teacher, checkpoint = load_model(self.teacher_path, VAE)
            self.teacher = teacher.to(self.device, memory_format=torch.channels_last)
            self.teacher_sha256 = fingerprint(teacher)
            trained_on = checkpoint.get("record", {}).get("data", trained_on)
        self.data = settings.data or trained_on
        if not self.data:
            named = self.teacher_path or "the student's checkpoint"
            raise InputError(f"{named} does not name its images: use --data")
        images = load_training_images(self.data, settings.limit)
        self.record = images.record
        self.train = Split(images.train, images.labels).to(self.device)
        if settings.split == "val":
            held_out = Split(images.val, images.val_labels)
        else:
            held_out = load_test_images(self.data, settings.limit)
        self.held_out = held_out.to(self.device)
        _, self.vgg_record = load_vgg16(settings.vgg)
        judge, self.judge_record = load_vgg16(settings.judge)
        self.refuse_judge_of(self.vgg_record)
        self.judge = judge and VGGFeatures(judge).to(self.device)
        self.judged = spread(self.held_out.images, settings.judged)
        self._teacher_mu = None

    @property
    def teacher_mu(self):
        """The teacher's mu of the images to measure on; None without a teacher."""
        if self.teacher and self._teacher_mu is None:
            self._teacher_mu = encode_means(self.teacher, self.held_out.images)
        return self._teacher_mu

    def refuse_judge_of(self, record):
        """Raise InputError if the judge is the VGG16 that a student with this record knows."""
        sha256 = self.judge_record["vgg_sha256"]
        if sha256 and sha256 == record.get("vgg_sha256"):
            raise InputError(
                "--judge holds the weights that the students are trained with, which cannot judge "
                "them: name others, or --judge none"
            )

    def train_student(self, label, folder, seed, is_hopeless=None, **changes):
        """`run_distillation` with the images and the teacher of this comparison."""
        settings = self.settings
        shared = {
            "data": self.data,
            "limit": settings.limit,
            "teacher": self.teacher_path,
            "teacher_outputs": self.teacher and self.folder / "teacher_outputs.pth",
            "vgg": settings.vgg,
            "epochs": settings.epochs,
            "seed": seed,
            "device": settings.device,
            "precision": settings.precision,
            "save_every": 1_000_000,  # no numbered checkpoints
        }
        return run_distillation(label, self.folder / folder, shared | changes, is_hopeless)

    def print_summary(self, budget):
        split = SPLITS[self.settings.split]
        print(
            f"teacher  {self.teacher_path or 'none'}\n"
            f"images   {self.data}: {len(self.train.images):,} to train on; figures are of "
            f"{len(self.held_out.images):,} of the {split} split\n"
            f"VGG16    {self.vgg_record['vgg_weights']}; judge: "
            f"{self.judge_record['vgg_weights']}\n"
            f"budget   {budget}\n"
            f"device   {describe_device(self.device)}, {self.precision}"
        )
