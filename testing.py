"""What several test files share: images, the tiny run's flags, starting scripts, reading a run."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill_tinyvae
import storage

HERE = Path(__file__).resolve().parent
on_posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

# Of distill_tinyvae.py: a whole run of a few seconds.
TINY = (
    "--data", "dead-leaves", "--vgg", "random", "--limit", "70", "--batch-size", "32",
    "--teacher-channels", "16,32,64,128", "--teacher-latent-dim", "128", "--teacher-epochs", "2",
    "--epochs", "3", "--save-every", "2", "--device", "cpu", "--precision", "fp32",
)


# --- Images and numbers ---


def random_images(count, seed=0):
    """Images in [0, 1]."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def random_normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_images(folder, count, first=0, size=(32, 32)):
    """PNGs whose red channel numbers them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        pixels[..., 0] = i
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


class TouchesWhenLoaded:
    """Its pickle makes a file when it is loaded: what it calls could be anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- Starting a script ---


def folders(run):
    """The flags that put a run's files below a folder."""
    return ("--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(run / "outputs"))


def start(*flags, **options):
    """distill_tinyvae.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, HERE / "distill_tinyvae.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def train(run, *flags):
    """A tiny run in this process. Returns the rows of metrics.csv."""
    distill_tinyvae.main([*TINY, *folders(run), *flags])
    return read_table(run)


def teacher_of(run):
    """The flags that take a finished run's teacher."""
    return ("--teacher", str(run / "checkpoints" / "teacher_vae.pth"))


def start_two(script, *flags):
    """A script in two processes of torchrun, of one thread each."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "--", script, *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )


# --- Reading a run ---


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def read_csv(path):
    """Rows as dictionaries of strings."""
    with path.open() as file:
        return list(csv.DictReader(file))


def read_table(run):
    """The rows of metrics.csv."""
    return read_csv(run / "outputs" / "metrics.csv")


def read_rows(run):
    """The lines of metrics.csv, header first, without the columns that hold the time it took."""
    with (run / "outputs" / "metrics.csv").open() as file:
        header, *rows = csv.reader(file)
    kept = [i for i, name in enumerate(header) if name not in ("ms_per_step", "seconds")]
    return [[row[i] for i in kept] for row in (header, *rows)]


def weights_of(run, name="tinyvae_last.pth"):
    """All weights in a checkpoint, the projection's among them."""
    checkpoint = storage.load_checkpoint(run / "checkpoints" / name)
    return checkpoint["model"] | checkpoint.get("projection", {})


def assert_same_weights(run, other, *names):
    for name in names:
        weights, others = weights_of(run, name), weights_of(other, name)
        assert list(weights) == list(others)
        assert all(torch.equal(weights[key], others[key]) for key in weights)


def assert_same_run(run, other):
    assert_same_weights(run, other, "teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth")
    assert read_rows(run) == read_rows(other)
