"""How fast training is, beside a loop written by hand and beside libraries that train.

    python -m benchmarks.speed                              # some 5 minutes on a CPU core
    python -m benchmarks.speed --others loop --repeats 1    # 40 seconds

distill_tinyvae.py trains a teacher, and then a student on its five terms. The others do the same:
same losses, images, VGG16, batch size, number of steps, Adam.

    loop        written by hand: a DataLoader, the teacher asked in every step, the loss read in
                every step; VGG16 sees as many images of each batch as in ours
    loop_all    the same, but VGG16 sees every image
    lightning, pythae       the same step in the trainer of a library, where it is installed

Every run is a process of its own, and all take turns in every repeat; the table shows medians. A
step's time does not depend on what the images show: generated ones serve. Writes bench_speed.csv.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import normalize

import distill_tinyvae
from common import kind, losses, runtime
from common.settings import parse_settings
from common.sources import load_training_images
from common.storage import check_writable, read_csv, write_csv
from common.vgg import load_vgg16
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parents[1]
LIBRARIES = ("lightning", "pythae")
NAMES = ("loop", "loop_all", *LIBRARIES)

# --- What is timed ---
OTHERS: kind.several(kind.one_of(*NAMES)) = NAMES  # who take turns with ours
DATA: kind.text() = "dead-leaves"  # as in distill_tinyvae.py
LIMIT: kind.CountOr0 = 1280  # images
BATCH_SIZE: kind.whole(2) = 64  # images per step
PERCEPTUAL_IMAGES: kind.CountOr0 = 6  # of each batch that VGG16 sees; 0: all
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "fp32"  # of ours: auto, fp32, bf16 or fp16; the others are fp32

# --- How long ---
EPOCHS: kind.whole(2) = 2  # of teacher and of student; steps of the last one are timed
REPEATS: kind.Count = 3  # all take turns in each

# --- Files ---
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of bench_speed.csv

# --- Not settings ---
RECIPE = ("--teacher=train", "--vgg=random")  # terms, weights: those of distill_tinyvae.py
LEARNING_RATE = 1e-4  # low, so that the losses of few steps can be compared
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = (
    "stage", "trainer", "repeat", "steps", "ms_per_step", "command_seconds", "loss", "precision",
    "device", "threads", "python", "torch", "torchvision", "numpy", *LIBRARIES,
)


# --- The loop by hand: of this collection it takes the two models and the losses ---


class Loss(nn.Module):
    """Float images → the loss of a teacher, or of a student that learns from one, whose VGG16 sees
    the first `seen` images; None: all. Keeps each step's loss, and when that was read."""

    def __init__(self, model, recipe, teacher=None, projection=None, vgg16=None, seen=None):
        super().__init__()
        self.model, self.teacher, self.projection = model, teacher, projection
        # recipe: the settings of distill_tinyvae.py
        self.weights = distill_tinyvae.term_weights(recipe)
        self.beta, self.temperature = recipe.teacher_kl_weight, recipe.temperature
        self.vgg16, self.seen = vgg16, seen
        self.values, self.times = [], []
        model.check_range = False  # a safeguard that training leaves out

    def forward(self, images):
        loss = self.student_loss(images) if self.teacher else self.teacher_loss(images)
        self.values.append(loss.item())
        self.times.append(time.perf_counter())
        return loss

    def teacher_loss(self, images):
        mu, logvar = self.model.encode(images)
        reconstruction = self.model.decode(self.model.reparameterize(mu, logvar))
        error = losses.reconstruction_loss(reconstruction, images)
        return error + self.beta * losses.kl_loss(mu, logvar)

    def student_loss(self, images):
        self.projection.retract()  # after the last step
        self.teacher.eval()  # some trainers put all modules into training mode
        with torch.no_grad():
            teacher_mu, _ = self.teacher.encode(images)
            teacher_logits = self.teacher.decode_logits(teacher_mu)
        mu, logvar = self.model.encode(images)
        z = self.model.reparameterize(mu, logvar)
        logits, logits_of_mean = self.model.decode_logits(torch.cat([z, mu])).chunk(2)
        shown = losses.without_grid(torch.sigmoid(logits_of_mean), images)[: self.seen]
        terms = {
            "reconstruction": losses.reconstruction_loss(torch.sigmoid(logits), images),
            "kl": losses.kl_loss(mu, logvar),
            "latent": losses.latent_distillation_loss(mu, self.projection(teacher_mu)),
            "output": losses.output_distillation_loss(
                logits_of_mean, teacher_logits, self.temperature
            ),
            "perceptual": losses.perceptual_loss(self.features, shown, images[: self.seen]),
        }
        return sum(weight * terms[name] for name, weight in self.weights.items())

    def features(self, images):
        """VGG16's after relu1_2, relu2_2 and relu3_3, scaled to unit length over channels."""
        x, features = normalize(images, IMAGENET_MEAN, IMAGENET_STD), []
        for i, layer in enumerate(self.vgg16):
            x = layer(x)
            if i in (3, 8, 15):
                features.append(F.normalize(x, dim=1))
        return features


def fit_loop(module, loader, job):
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    for _ in range(job["epochs"]):
        for (images,) in loader:
            optimizer.zero_grad()
            module(images.to(job["device"])).backward()
            optimizer.step()


# --- The same step in the trainers of libraries ---


def fit_lightning(module, loader, job):
    from lightning import LightningModule, Trainer

    class Model(LightningModule):
        def training_step(self, batch, _):
            loss = self.module(batch[0])
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    model = Model()
    model.module = module
    where = {"accelerator": job["device"], "devices": 1, "default_root_dir": job["folder"]}
    Trainer(max_epochs=job["epochs"], **where).fit(model, loader)


def fit_pythae(module, loader, job):
    from pythae.data.datasets import BaseDataset
    from pythae.models.base import BaseAE, BaseAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Model(BaseAE):
        def forward(self, batch, **_):
            return ModelOutput(loss=self.module(batch["data"]))

    model = Model(BaseAEConfig(input_dim=(3, 32, 32), latent_dim=module.model.latent_dim))
    model.module = module
    config = BaseTrainerConfig(
        output_dir=job["folder"], num_epochs=job["epochs"], learning_rate=LEARNING_RATE,
        per_device_train_batch_size=loader.batch_size, optimizer_cls="Adam",
        no_cuda=job["device"] != "cuda",
    )
    (images,) = loader.dataset.tensors
    dataset = BaseDataset(images, torch.zeros(len(images)))
    BaseTrainer(model, dataset, training_config=config).train()


# --- One run ---


def train(trainer, job_file, folder):
    """Train teacher and student in this process, and write a metrics.csv as ours does."""
    job = torch.load(job_file, weights_only=False) | {"folder": folder}
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # as in ours
    fit = {"lightning": fit_lightning, "pythae": fit_pythae}.get(trainer, fit_loop)
    images, device = job["images"], job["device"]
    recipe = parse_settings(vars(distill_tinyvae), RECIPE)
    loader = DataLoader(TensorDataset(images / 255), job["batch_size"], shuffle=True)

    def row(stage, loss):
        fit(loss.to(device), loader, job)
        last = len(loader)  # steps of the last epoch
        seconds = (loss.times[-1] - loss.times[-last]) / (last - 1)
        mean = statistics.mean(loss.values[-last:])
        return {"stage": stage, "loss": mean, "ms_per_step": 1000 * seconds}

    torch.manual_seed(0)
    teacher = StandardVAE()
    rows = [row("teacher", Loss(teacher, recipe))]
    torch.manual_seed(0)
    student = TinyVAE32()
    teacher.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        mu = torch.cat([teacher.encode(part.to(device) / 255)[0] for part in images.split(500)])
    projection = losses.make_projection("pixels", mu, images.to(device), student.latent_dim)
    seen = None if trainer == "loop_all" else job["perceptual_images"] or None
    rows.append(row("student", Loss(student, recipe, teacher, projection, job["vgg16"], seen)))
    write_csv(Path(folder) / "metrics.csv", ("stage", "loss", "ms_per_step"), rows)


def error_of(done):
    """The line that tells why a process has failed, of what it wrote to stderr."""
    errors = re.findall(r"^(?:error:|[\w.]*(?:Error|Exception)\b).*", done.stderr, re.MULTILINE)
    return errors[-1] if errors else f"exit code {done.returncode}"


def measure(trainer, job_file, settings):
    """A row for each stage, from a run in a process of its own. Raises InputError if it fails."""
    s = settings
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from benchmarks.speed import train; train(*sys.argv[1:])"
        command = ["-c", code, trainer, job_file, folder]
        if trainer == "ours":
            command = [
                "distill_tinyvae.py", *RECIPE, "--optimizer=adam",
                f"--learning-rate={LEARNING_RATE}", f"--teacher-learning-rate={LEARNING_RATE}",
                f"--data={s.data}", f"--limit={s.limit}", f"--batch-size={s.batch_size}",
                f"--perceptual-images={s.perceptual_images}", f"--teacher-epochs={s.epochs}",
                f"--epochs={s.epochs}", f"--device={s.device}", f"--precision={s.precision}",
                f"--checkpoint-dir={folder}", f"--output-dir={folder}",
            ]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise runtime.InputError(f"{trainer} could not train: {error_of(done)}")
        rows = read_csv(Path(folder, "metrics.csv"))
    last = {row["stage"]: row for row in rows}  # the last epoch of each
    return [
        {"stage": stage, "command_seconds": seconds}
        | {name: float(row[name]) for name in ("ms_per_step", "loss")}
        for stage, row in last.items()
    ]


# --- All of them, in turn ---


def table_rows(rows):
    """For each stage and trainer, medians over the repeats; ours comes first."""
    table = []
    for stage in ("teacher", "student"):
        for trainer in dict.fromkeys(row["trainer"] for row in rows):
            group = [row for row in rows if (row["stage"], row["trainer"]) == (stage, trainer)]
            times = [row["ms_per_step"] for row in group]
            if trainer == "ours":
                ours = statistics.median(times)
            seconds = statistics.median(row["command_seconds"] for row in group)
            table.append({
                "stage": stage,
                "trainer": trainer,
                "ms a step": f"{statistics.median(times):.1f}",
                "range": f"{min(times):.1f}–{max(times):.1f}",
                "times ours": f"{statistics.median(times) / ours:.2f}",
                "loss": f"{statistics.median(row['loss'] for row in group):.4f}",
                "whole command": f"{seconds:.1f} s",
            })
    return table


def main(argv=()):
    s = parse_settings(globals(), argv)
    check_writable(s.output_dir)
    device = runtime.pick_device(s.device)
    missing = [name for name in s.others if name in LIBRARIES and not find_spec(name)]
    for name in missing:
        print(f"{name} is left out, since it is not installed: pip install {name}")
    trainers = ["ours", *(name for name in s.others if name not in missing)]
    images = load_training_images(s.data, s.limit).train
    batches = len(images) // s.batch_size
    if batches < 2:
        raise runtime.InputError(f"{len(images)} images do not fill two batches: raise --limit")
    about = {"device": runtime.describe_device(device), "threads": torch.get_num_threads(),
             "steps": s.epochs * batches} | runtime.versions()
    about |= {name: version(name) for name in LIBRARIES if name in trainers}
    print(f"images   {len(images):,} of {s.data}, batch {s.batch_size}\n"
          f"timing   {about['steps']} steps of the teacher, as many of the student\n"
          f"device   {about['device']}; ours {s.precision}, the others fp32")
    job = s.as_dict() | {"device": device.type, "images": images[: batches * s.batch_size],
                         "vgg16": load_vgg16("random")[0].requires_grad_(False)}
    rows, path = [], s.output_dir / "bench_speed.csv"
    turns = [(repeat, trainer) for repeat in range(s.repeats) for trainer in trainers]
    with tempfile.TemporaryDirectory() as folder:
        job_file = f"{folder}/job.pth"
        torch.save(job, job_file)
        for repeat, trainer in runtime.progress_bar(turns, desc="timing", unit="run"):
            about |= {"trainer": trainer, "repeat": repeat,
                      "precision": s.precision if trainer == "ours" else "fp32"}
            rows += [about | row for row in measure(trainer, job_file, s)]
            write_csv(path, COLUMNS, rows)
    print()
    runtime.print_table(table_rows(rows))
    print("\nms a step, loss: of the last epoch. Whole command: start and both stages; ours also "
          f"validates,\nkeeps the teacher's outputs, saves and draws.\n\nWritten:\n  {path}")


if __name__ == "__main__":
    runtime.run_script(main)
