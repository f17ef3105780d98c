"""What several test files share: images, objectives, the tiny run's flags, starting scripts and
reading a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import distill_tinyvae
from common import losses, runs, storage, vgg
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parents[1]
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


def refuse(*args, **kwargs):
    """In place of a function that must not be called."""
    raise AssertionError("called although it is not needed")


# --- What `fit` trains, outside of any run ---

WEIGHTS = dict(zip(losses.TERMS, (0.3, 0.1 * 0.4, 0.3, 0.2, 0.1 * 4)))  # of distill_tinyvae.py


def run_of(images, precision="fp32", **settings):
    """What `fit` asks of a run: on the CPU, with these images to train on and to validate on."""
    settings = {
        "batch_size": 8, "warmup": 0.25, "seed": 0, "calibration": "means", "compile": False,
    } | settings
    return SimpleNamespace(
        settings=SimpleNamespace(**settings), device=torch.device("cpu"), precision=precision,
        images=images, val_images=images,
    )


def student_objective(weights=WEIGHTS, kind="pixels", precision=torch.float32, **settings):
    """A StudentObjective of a teacher of 96 latents, and VGG16 with random weights."""
    settings = {"temperature": 3.0, "rate": None, "perceptual_images": 6} | settings
    torch.manual_seed(0)
    student, teacher_mu = TinyVAE32(), random_normal(120, 64 if kind == "identity" else 96)
    images = (255 * random_images(120)).byte()
    projection = None
    if "latent" in weights:
        projection = losses.make_projection(kind, teacher_mu, images, 64)
    features = vgg.VGGFeatures(vgg.load_vgg16("random")[0], precision)
    return distill_tinyvae.StudentObjective(
        student, weights, SimpleNamespace(**settings), projection, teacher_mu,
        features if "perceptual" in weights else None,
    )


# --- Starting a script ---


def folders(run):
    """The flags that put a run's files below a folder."""
    return ("--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(run / "outputs"))


def start(*words, **options):
    """Python in a process of its own, with these words after its name."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], **pipes, **options)


def train(run, *flags):
    """A tiny run in this process. Returns the rows of metrics.csv."""
    distill_tinyvae.main([*TINY, *folders(run), *flags])
    return read_table(run)


def train_until(epoch, monkeypatch, run, *flags):
    """`train`, with Ctrl-C once this epoch of the student is saved; 0: before the first."""
    save = runs.save_student

    def interrupt(run, state, *models):
        save(run, state, *models)
        if state["epoch"] == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_student", interrupt)
        train(run, *flags)


def teacher_of(run):
    """The flags that take a finished run's teacher."""
    return ("--teacher", str(run / "checkpoints" / "teacher_vae.pth"))


def start_two(script, *flags):
    """A script in two processes of torchrun, of one thread each."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    return start(*torchrun, script, *flags, env=os.environ | {"PYTHONPATH": str(HERE)})


# --- Reading a run ---


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def read_table(run):
    """The rows of metrics.csv."""
    return storage.read_csv(run / "outputs" / "metrics.csv")


def read_rows(run):
    """The same without the columns that hold the time it took."""
    timed = ("ms_per_step", "seconds")
    return [{name: row[name] for name in row if name not in timed} for row in read_table(run)]


def weights_of(run, name="tinyvae_last.pth"):
    """All weights in a checkpoint, the projection's among them."""
    checkpoint = storage.load_checkpoint(run / "checkpoints" / name)
    return checkpoint["model"] | checkpoint.get("objective", {})


def assert_same_weights(run, other, *names):
    for name in names:
        weights, others = weights_of(run, name), weights_of(other, name)
        assert list(weights) == list(others)
        assert all(torch.equal(weights[key], others[key]) for key in weights)


def assert_same_run(run, other):
    assert_same_weights(run, other, "teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth")
    assert read_rows(run) == read_rows(other)
