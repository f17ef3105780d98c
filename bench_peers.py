"""How fast training is beside what others wrote: pythae, PyTorch Lightning, Accelerate.

    python -m venv peers                                  # an environment of its own
    peers/bin/pip install -r requirements.txt pythae lightning accelerate
    peers/bin/python bench_peers.py                       # 12 minutes on a CPU core
    python bench_peers.py --trainers ours,loop --limit 1280 --repeats 1   # without installing any

Three jobs, each the same for all trainers: networks, images, batch size, fp32, Adam, number of
steps.

- *student*: TinyVAE32 on squared error and KL
- *teacher*: StandardVAE likewise
- *distillation*: TinyVAE32 on the five terms, with a teacher of 512 latents and VGG16 on some
  images of each batch. pythae does not distil

*loop* is a plain PyTorch loop. It, Lightning and Accelerate train from a DataLoader over a tensor
of floats, and ask the teacher in every step; pythae's trainer has its own. *ours* is
distill_tinyvae.py. Each is run as its own guide shows it, with what that writes and prints.

The time of a step does not depend on what the images show, so generated ones and untrained networks
serve. Everything runs on the CPU, every run in a process of its own; all take turns in every
repeat, and figures are medians. Writes bench_peers.csv and prints the table.
"""

import importlib.metadata
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from comparison import as_flags
from data import load_training_images, to_float
from losses import (
    kl_loss,
    latent_distillation_loss,
    output_distillation_loss,
    perceptual_loss,
    reconstruction_loss,
    without_grid,
)
from runtime import (
    InputError,
    describe_device,
    print_table,
    progress_bar,
    require,
    run_script,
)
from settings import file_path, one_of, parse_settings, several, text, whole
from standard_vae import StandardVAE
from storage import check_writable, save_checkpoint, write_csv
from tiny_vae_32 import TinyVAE32
from vgg import VGGFeatures, load_vgg16

HERE = Path(__file__).resolve().parent

# --- What is timed ---
TRAINERS = ("ours", "loop", "pythae", "lightning", "accelerate")  # who take turns
JOBS = ("student", "teacher", "distillation")  # what they are to do
DATA = "dead-leaves"  # as in distill_tinyvae.py
LIMIT = 6400  # images, of which the teacher's job takes a quarter
VGG = "random"  # random, imagenet, or a state dict's path: the time is the same
BATCH_SIZE = 64  # images per step
PERCEPTUAL_IMAGES = 6  # images of each batch that VGG16 sees, whoever trains

# --- How long ---
EPOCHS = 2  # of each run; steps are timed from the second on
REPEATS = 3  # every trainer takes its turn in each

# --- Files ---
OUTPUT_DIR = HERE / "outputs"  # folder of bench_peers.csv

KINDS = {
    "TRAINERS": several(one_of("ours", "loop", "pythae", "lightning", "accelerate")),
    "JOBS": several(one_of("student", "teacher", "distillation")), "DATA": text(),
    "LIMIT": whole(0, none=0), "VGG": text(), "BATCH_SIZE": whole(2),
    "PERCEPTUAL_IMAGES": whole(0, none=0),
    "EPOCHS": whole(2), "REPEATS": whole(1), "OUTPUT_DIR": file_path(),
}

COLUMNS = (
    "job", "trainer", "version", "repeat", "steps", "device",
    "step_images_per_second", "images_per_second", "start_seconds", "peak_megabytes",
)
CPU = torch.device("cpu")
KL_WEIGHT, TEMPERATURE, LEARNING_RATE = 0.13, 3.0, 1e-3
# Of the five terms, and what distill_tinyvae.py multiplies two of them by.
WEIGHTS = {"reconstruction": 0.3, "kl": 0.1, "latent": 0.3, "output": 0.2, "perceptual": 0.1}
SCALES = {"kl": 0.4, "perceptual": 4.0}
INSTALL = "pip install pythae lightning accelerate"


# --- One run, in a process of its own ---


class Clock:
    """When each step of a run ended, in seconds since 1970."""

    def __init__(self):
        self.times = []

    def step(self):
        self.times.append(time.time())


def make_model(job):
    torch.manual_seed(0)
    model = StandardVAE() if job == "teacher" else TinyVAE32()
    model.check_range = False  # a safeguard of ours, which training leaves out
    return model


def make_loss(job, model, run):
    """The loss of a batch of float images, as a function."""

    def plain_loss(images):
        mu, logvar = model.encode(images)
        reconstruction = model.decode(model.reparameterize(mu, logvar))
        return reconstruction_loss(reconstruction, images) + KL_WEIGHT * kl_loss(mu, logvar)

    if job != "distillation":
        return plain_loss
    teacher = StandardVAE().eval().requires_grad_(False)
    teacher.check_range = False
    model.projection = torch.nn.Linear(teacher.latent_dim, model.latent_dim)
    vgg = VGGFeatures(load_vgg16(run["vgg"])[0])
    seen = run["perceptual_images"] or None

    def distillation_loss(images):
        with torch.no_grad():
            teacher_mu, _ = teacher.encode(images)
            target = teacher.decode_logits(teacher_mu)
        mu, logvar = model.encode(images)
        z = model.reparameterize(mu, logvar)
        logits, logits_of_mean = model.decode_logits(torch.cat([z, mu])).chunk(2)
        looked_at = without_grid(torch.sigmoid(logits_of_mean), images)[:seen]
        terms = {
            "reconstruction": reconstruction_loss(torch.sigmoid(logits), images),
            "kl": kl_loss(mu, logvar),
            "latent": latent_distillation_loss(mu, model.projection(teacher_mu)),
            "output": output_distillation_loss(logits_of_mean, target, TEMPERATURE),
            "perceptual": perceptual_loss(vgg, looked_at, images[:seen]),
        }
        return sum(WEIGHTS[name] * SCALES.get(name, 1) * term for name, term in terms.items())

    return distillation_loss


def make_loader(images, run):
    dataset = torch.utils.data.TensorDataset(images)
    return torch.utils.data.DataLoader(
        dataset, batch_size=run["batch_size"], shuffle=True, drop_last=True
    )


def make_optimizer(parameters, steps):
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)


def train_ours(run, images, clock):
    import runs  # here, and not at the top: what the others' processes load is timed
    import training

    log = training.Stage.log
    stage_of_job = "teacher" if run["job"] == "teacher" else "student"

    def log_and_time(stage, *args):
        log(stage, *args)  # the last call of a step
        if stage.name == stage_of_job:
            clock.step()

    def saved(function):
        """The function, and then the time: the last thing that an epoch does."""

        def save_and_time(*args):
            function(*args)
            run["end"] = time.time()

        return save_and_time

    training.Stage.log = log_and_time
    save = "save_teacher" if run["job"] == "teacher" else "save_student"
    setattr(runs, save, saved(getattr(runs, save)))
    flags = {
        "latent_dim": TinyVAE32().latent_dim, "data": run["data"], "limit": run["limit"],
        "batch_size": run["batch_size"], "epochs": run["epochs"], "optimizer": "adam",
        "temperature": TEMPERATURE, "kl_scale": SCALES["kl"],
        "perceptual_scale": SCALES["perceptual"], "perceptual_images": run["perceptual_images"],
        "precision": "fp32", "device": "cpu", "start": "none", "rate": "none", "resume": False,
        "save_every": 1_000_000, "checkpoint_dir": run["folder"], "output_dir": run["folder"],
    }
    weights = dict.fromkeys(WEIGHTS, 0) | {"reconstruction": 1, "kl": KL_WEIGHT / SCALES["kl"]}
    if run["job"] == "student":
        flags |= {"teacher": "none", "vgg": "none"}
    elif run["job"] == "teacher":
        flags |= {"teacher": "train", "teacher_epochs": run["epochs"], "epochs": 1, "vgg": "none"}
        weights["output"] = 1  # stage 1 is for a student that needs a teacher
    else:
        flags |= {"teacher": run["teacher"], "vgg": run["vgg"]}
        weights = WEIGHTS
    flags |= {f"{name}_weight": weight for name, weight in weights.items()}
    sys.argv = ["distill_tinyvae.py", *as_flags(flags)]
    runpy.run_path(str(HERE / "distill_tinyvae.py"), run_name="__main__")


def train_loop(run, images, clock, accelerator=None):
    model = make_model(run["job"])
    loss_of = make_loss(run["job"], model, run)
    loader = make_loader(images, run)
    steps = run["epochs"] * len(loader)
    optimizer, scheduler = make_optimizer(model.parameters(), steps)
    if accelerator:
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
    with progress_bar(total=steps) as bar:
        for _ in range(run["epochs"]):
            model.train()
            for (batch,) in loader:
                optimizer.zero_grad()
                loss = loss_of(batch)
                if accelerator:
                    accelerator.backward(loss)
                else:
                    loss.backward()
                optimizer.step()
                scheduler.step()
                bar.set_postfix(loss=loss.item(), refresh=False)
                bar.update()
                clock.step()
    torch.save(model.state_dict(), Path(run["folder"]) / "model.pt")


def train_accelerate(run, images, clock):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    train_loop(run, images, clock, accelerator)


def train_lightning(run, images, clock):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model(run["job"])
            self.loss_of = make_loss(run["job"], self.model, run)

        def training_step(self, batch, _):
            loss = self.loss_of(batch[0])
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self):
            steps = self.trainer.estimated_stepping_batches
            optimizer, scheduler = make_optimizer(self.model.parameters(), steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_train_batch_end(self, *_):
            clock.step()

    trainer = lightning.Trainer(
        max_epochs=run["epochs"],
        accelerator="cpu",
        devices=1,
        default_root_dir=run["folder"],
    )
    trainer.fit(Module(), make_loader(images, run))


def train_pythae(run, images, clock):
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    ours = make_model(run["job"])

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.latent_dim = ours.latent_dim
            self.encoder, self.fc_mu, self.fc_logvar = ours.encoder, ours.fc_mu, ours.fc_logvar

        def forward(self, images):
            features = self.encoder(images).flatten(1)
            return ModelOutput(
                embedding=self.fc_mu(features), log_covariance=self.fc_logvar(features)
            )

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.decoder_input, self.decoder = ours.decoder_input, ours.decoder

        def forward(self, z):
            features = self.decoder_input(z)
            logits = self.decoder(features.view(len(z), -1, 2, 2))
            return ModelOutput(reconstruction=torch.sigmoid(logits))

    class Steps(TrainingCallback):
        def on_train_step_end(self, *_, **__):
            clock.step()

    model = VAE(
        VAEConfig(input_dim=(3, 32, 32), latent_dim=ours.latent_dim, reconstruction_loss="mse"),
        encoder=Encoder(),
        decoder=Decoder(),
    )
    config = BaseTrainerConfig(
        output_dir=run["folder"], num_epochs=run["epochs"], learning_rate=LEARNING_RATE,
        per_device_train_batch_size=run["batch_size"], optimizer_cls="Adam",
        no_cuda=True,
    )
    dataset = BaseDataset(images, torch.zeros(len(images)))
    BaseTrainer(model, dataset, training_config=config, callbacks=[Steps()]).train()


def run_one(run):
    """Train in this process, and print what was measured as a line of JSON."""
    import resource  # which Windows does not have

    clock, images = Clock(), None
    if run["trainer"] != "ours":  # which loads its own
        images = to_float(load_training_images(run["data"], run["limit"]).train)
    globals()[f"train_{run['trainer']}"](run, images, clock)
    end = run.get("end", time.time())
    times = clock.times
    first_epoch = len(times) // run["epochs"]
    steps = [b - a for a, b in zip(times[first_epoch:], times[first_epoch + 1 :])]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        kilobytes /= 1024
    found = {
        "steps": len(times),
        "step_images_per_second": run["batch_size"] / statistics.median(steps),
        "images_per_second": run["batch_size"] * (len(times) - 1) / (end - times[0]),
        "first_step": times[0],
        "peak_megabytes": kilobytes / 1000,
    }
    print(f"\n{json.dumps(found)}")


# --- All of them, in turn ---


def measure(run):
    """A run in a process of its own. Raises InputError if it fails."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import bench_peers; "
        "bench_peers.run_one(json.loads(sys.argv[2]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code, HERE, json.dumps(run | {"folder": folder})],
            capture_output=True, text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"{run['trainer']} could not do the {run['job']} job: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"start_seconds": found["first_step"] - start}


def version_of(trainer):
    package = "torch" if trainer in ("ours", "loop") else trainer
    return f"{package} {importlib.metadata.version(package)}"


def table_rows(rows):
    """For each job and trainer, medians over the repeats, and their range where it matters."""
    table = []
    for job in dict.fromkeys(row["job"] for row in rows):
        of_job = [row for row in rows if row["job"] == job]
        ours = [row["step_images_per_second"] for row in of_job if row["trainer"] == "ours"]
        for trainer in dict.fromkeys(row["trainer"] for row in of_job):
            same = [row for row in of_job if row["trainer"] == trainer]
            values = {key: [row[key] for row in same] for key in COLUMNS[-4:]}
            middle = {key: statistics.median(each) for key, each in values.items()}
            steps = values["step_images_per_second"]
            row = {
                "job": job,
                "trainer": trainer,
                "images/s, steps alone": f"{middle['step_images_per_second']:,.0f}",
                "range": f"{min(steps):,.0f}–{max(steps):,.0f}",
                "ours is": "–",
                "images/s, all in": f"{middle['images_per_second']:,.0f}",
                "to the first step": f"{middle['start_seconds']:.1f} s",
                "peak memory": f"{middle['peak_megabytes']:,.0f} MB",
            }
            if ours:
                ratio = statistics.median(ours) / middle["step_images_per_second"]
                row["ours is"] = f"{ratio:.2f} times as fast"
            table.append(row)
    return table


def bench_peers(settings):
    s = settings
    check_writable(s.output_dir)
    for trainer in s.trainers:
        if trainer not in ("ours", "loop"):
            require(trainer, INSTALL)
    fewest = s.limit // 4 if "teacher" in s.jobs else s.limit
    if s.limit and fewest < 2 * s.batch_size:
        raise InputError(f"{fewest} images do not fill two batches of a job: raise --limit")
    if s.vgg == "none" and "distillation" in s.jobs:
        raise InputError("--vgg none leaves out what is to be timed: use --vgg random")
    described = describe_device(CPU)
    versions = {trainer: version_of(trainer) for trainer in s.trainers}
    print(
        f"trainers    {', '.join(f'{name} ({version})' for name, version in versions.items())}\n"
        f"images      {s.limit or 'all'} of {s.data}, batch {s.batch_size}; VGG16 sees "
        f"{s.perceptual_images or 'all'} of each\n"
        f"device      {described}, fp32\n"
        f"timing      {s.epochs} epochs a run, {s.repeats} turns"
    )
    runs = [
        (job, trainer) for _ in range(s.repeats) for job in s.jobs for trainer in s.trainers
        if (job, trainer) != ("distillation", "pythae")
    ]
    if not runs:
        raise InputError("pythae does not distil: name another of --trainers or --jobs")
    rows, path = [], s.output_dir / "bench_peers.csv"
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher.pth"
        torch.manual_seed(0)
        vae = StandardVAE()
        save_checkpoint(teacher, {"architecture": vae.architecture, "model": vae.state_dict()})
        for job, trainer in progress_bar(runs, desc="timing", unit="run"):
            found = measure({
                "job": job, "trainer": trainer, "data": s.data, "vgg": s.vgg,
                "limit": s.limit // 4 if job == "teacher" else s.limit, "epochs": s.epochs,
                "batch_size": s.batch_size, "perceptual_images": s.perceptual_images,
                "teacher": str(teacher),
            })
            repeat = sum((row["job"], row["trainer"]) == (job, trainer) for row in rows)
            names = {"job": job, "trainer": trainer, "version": versions[trainer]}
            rows.append(names | {"repeat": repeat, "device": described} | found)
            write_csv(path, COLUMNS, rows)
    print()
    print_table(table_rows(rows))
    print(
        "\nSteps alone: the median step from the second epoch on. All in: from the first step to "
        "the end of the last epoch;\nours validates after each and recalibrates BatchNorm on up to "
        "5,000 images, which weighs less the more images\nthere are. To the first step: from the "
        "command's start, ours with the teacher's outputs of all images."
    )
    print(f"\nWritten:\n  {path}")


def main(argv=None):
    bench_peers(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
