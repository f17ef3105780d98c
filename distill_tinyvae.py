"""Distil a 512-latent teacher VAE into TinyVAE32: 64 latents, 294,403 parameters.

    python distill_tinyvae.py --demo      # the whole job, small, no network: 2 minutes on 2 cores
    python distill_tinyvae.py             # CIFAR-10 and ImageNet VGG16, both downloaded (700 MB)
    python distill_tinyvae.py --resume    # go on where a run stopped, however it stopped
    python distill_tinyvae.py --data PATH --vgg PATH      # your images, your VGG16 weights
    python distill_tinyvae.py --data PATH --limit 5000 --teacher-epochs 5 --epochs 10   # a trial

Stage 1 trains the teacher, stage 2 the student, with five terms:

    0.3 reconstruction + 0.1 KL + 0.3 latent + 0.2 output (T = 3) + 0.1 perceptual

losses.py has their formulas. VGG16 makes nine tenths of a step's arithmetic; `--vgg none` does
without it. Afterwards, `python test_trained_model.py` gives the figures on the test split.
"""

import math
import sys
import time
from pathlib import Path

import torch

from data import load_training_images, shuffled_batches, to_float
from losses import (
    TERMS,
    DistillationLoss,
    LatentProjection,
    PerceptualLoss,
    VAELoss,
    effective_beta,
    load_vgg16,
)
from metrics import EVALUATION_BATCH, effective_rank, evaluate_vae
from pictures import draw_curves, draw_interpolations, draw_reconstructions
from runtime import (
    InputError,
    autocast,
    describe_device,
    parse_flags,
    pick_device,
    pick_precision,
    print_table,
    progress_bar,
    run,
    versions,
)
from standard_vae import StandardVAE
from storage import build_model, load_checkpoint, save_checkpoint, write_csv, write_json
from tiny_vae_32 import TinyVAE32
from vae import count_parameters

HERE = Path(__file__).resolve().parent

# --- Images ---
DATA = "cifar10"  # cifar10, dead-leaves (generated), or a folder with train/ and test/
LIMIT = 0  # use the first N training images; 0 uses all

# --- Teacher ---
TEACHER_EPOCHS = 20  # epochs of stage 1
TEACHER_KL_WEIGHT = 0.02  # beta of the teacher: low, since its error caps the output term's worth

# --- Student: the five terms ---
EPOCHS = 100  # epochs of stage 2
RECONSTRUCTION_WEIGHT = 0.3  # mean squared error of pixels in [0, 1]
KL_WEIGHT = 0.1  # nats per image dimension
LATENT_WEIGHT = 0.3  # distance of mu to the teacher's, projected 512→64
OUTPUT_WEIGHT = 0.2  # softened divergence from the teacher's logits
PERCEPTUAL_WEIGHT = 0.1  # distance of VGG16 features
TEMPERATURE = 3.0  # T that softens the logits of the output term
VGG = "imagenet"  # imagenet (downloaded), random (untrained), none, or a state dict's path

# --- Optimisation, both stages ---
BATCH_SIZE = 64  # images per step
LEARNING_RATE = 1e-3  # Adam's, at the peak: a linear warm-up, then a cosine to zero
SEED = 0  # of weights, image order and latent samples

# --- Machine ---
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; auto takes what the device does natively

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR = HERE / "outputs"  # folder of metrics.csv, config.json and the pictures
SAVE_EVERY = 10  # epochs between numbered checkpoints, which also redraw the pictures
RESUME = False  # go on where the run in these folders stopped
OVERWRITE = False  # replace the run in these folders
DEMO = False  # a small run without network, in folders of its own, which it replaces

DEMO_SETTINGS = {
    "data": "dead-leaves",
    "vgg": "random",
    "limit": 1000,
    "teacher_epochs": 4,
    "epochs": 5,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "checkpoint_dir": CHECKPOINT_DIR / "demo",
    "output_dir": OUTPUT_DIR / "demo",
}

WARMUP = 0.05  # share of a stage's steps in which the learning rate rises
LOSS_EVERY = 20  # steps between readings of the loss, each of which waits for the device

# Columns of metrics.csv.
COLUMNS = (
    "stage", "epoch", "loss", *TERMS, "val_mse", "val_psnr", "kl_nats", "kl_per_latent",
    "active_dims", "projected_std", "learning_rate", "seconds",
)

# What makes a teacher the same teacher.
TEACHER_RECIPE = (
    "pixels_sha256", "teacher_epochs", "teacher_kl_weight", "batch_size", "learning_rate", "seed",
)
# What makes a run the same run, so that it can go on.
RECIPE = (
    *TEACHER_RECIPE, "vgg_sha256", "epochs", "reconstruction_weight", "kl_weight", "latent_weight",
    "output_weight", "perceptual_weight", "temperature",
)

# --- One stage of training ---


class Stage:
    """What one stage trains, and everything needed to go on from the end of an epoch.

    Args:
        name: `teacher` or `student`.
        model: the VAE to train.
        criterion: (images, logits, mu, logvar, *targets) → (total, terms). Parameters of its own,
            such as the projection's, are trained with the model's.
        images: uint8 training images, on the device.
        targets: tensors with a row for each image, handed to the criterion.
        epochs: how many this stage has in all.
        job: the settings, the precision and the held-out images.
        val_teacher_mu: the teacher's mu of the held-out images, to watch the projection on.
    """

    def __init__(
        self, name, model, criterion, images, targets, epochs, job, val_teacher_mu=None
    ):
        settings = job.settings
        self.name, self.epochs, self.precision = name, epochs, job.precision
        self.device = images.device
        self.images, self.targets = images, targets
        self.val_images, self.val_teacher_mu = job.val_images, val_teacher_mu
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.model.check_range = False  # to_float makes the images; looking would stall a GPU
        self.criterion = criterion.to(self.device)
        self.batch_size = settings.batch_size
        self.steps_per_epoch = len(images) // self.batch_size
        trained = [*model.parameters(), *criterion.parameters()]
        self.optimizer = torch.optim.Adam(
            [parameter for parameter in trained if parameter.requires_grad],
            lr=settings.learning_rate,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.one_cycle)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.order = torch.Generator().manual_seed(settings.seed)  # of the images
        self.rows = []  # of metrics.csv, one an epoch

    def one_cycle(self, step):
        """Share of the peak learning rate at a step: linear warm-up, cosine to zero.

        After Smith & Topin 2017, arXiv:1708.07120.
        """
        total = self.epochs * self.steps_per_epoch
        warmup = max(1, round(WARMUP * total))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def train_step(self, index):
        """One step on the images of these indices. Returns the loss and its terms, detached."""
        images = to_float(self.images[index])
        targets = [target[index] for target in self.targets]
        with autocast(self.device, self.precision):
            mu, logvar = self.model.encode(images)
            mu, logvar = mu.float(), logvar.float()
            logits = self.model.decode_logits(self.model.reparameterize(mu, logvar)).float()
            total, terms = self.criterion(images, logits, mu, logvar, *targets)
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return {"loss": total.detach()} | terms

    def train_epoch(self, bar):
        """One pass over the images. Returns the mean loss and terms.

        Raises InputError if the loss is no longer a number.
        """
        self.model.train()
        steps = shuffled_batches(len(self.images), self.batch_size, self.order).to(self.device)
        sums = 0
        for step, index in enumerate(steps, 1):
            found = self.train_step(index)
            sums = sums + torch.stack(list(found.values()))
            if step % LOSS_EVERY == 0 or step == len(steps):
                loss = sums[0].item() / step
                if not loss < float("inf"):  # NaN as well
                    raise InputError(
                        f"the loss of the {self.name} became {loss} in epoch "
                        f"{len(self.rows) + 1}: the epochs before it are saved; try a lower "
                        "--learning-rate, or --precision fp32"
                    )
                epoch = f"{len(self.rows) + 1}/{self.epochs}"
                bar.set_postfix(epoch=epoch, loss=f"{loss:.5f}", refresh=False)
            bar.update()
        return dict(zip(found, (sums / len(steps)).tolist()))

    def validate(self):
        """The validation columns of a row, and the effective rank of the projection, if any."""
        found = evaluate_vae(self.model, self.val_images, self.precision)
        found["val_mse"], found["val_psnr"] = found.pop("mse"), found.pop("psnr")
        rank = None
        if self.val_teacher_mu is not None:
            with torch.no_grad():
                projected = self.criterion.projection(self.val_teacher_mu)
            found["projected_std"] = projected.std(0).mean().item()
            rank = effective_rank(projected)
        return found, rank

    def run(self):
        """Train from where the stage stands to its last epoch; yield after every epoch."""
        bar = progress_bar(
            total=self.epochs * self.steps_per_epoch,
            initial=len(self.rows) * self.steps_per_epoch,
            desc=self.name,
            unit="step",
        )
        with bar:
            while len(self.rows) < self.epochs:
                start = time.perf_counter()
                row = {"stage": self.name, "epoch": len(self.rows) + 1} | self.train_epoch(bar)
                found, rank = self.validate()
                row |= found
                row["learning_rate"] = self.scheduler.get_last_lr()[0]
                row["seconds"] = round(time.perf_counter() - start, 2)
                self.rows.append(row)
                bar.write(self.epoch_line(row, rank))
                yield

    def epoch_line(self, row, rank):
        terms = "  ".join(f"{term} {row[term]:.5f}" for term in TERMS if term in row)
        line = (
            f"{self.name} {row['epoch']:3d}/{self.epochs} | loss {row['loss']:.5f} | {terms} | "
            f"val MSE {row['val_mse']:.5f}  PSNR {row['val_psnr']:.2f} dB | "
            f"KL {row['kl_nats']:.1f} nats, {row['kl_per_latent']:.3f} a latent, "
            f"{row['active_dims']} of {self.model.latent_dim} active"
        )
        if rank is not None:
            line += f" | projected std {row['projected_std']:.3f}, rank {rank:.1f}"
        return line + f" | {row['seconds']:.0f} s"

    def state(self):
        """Everything that going on needs, as plain data."""
        random = {"cpu": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device.type in ("cuda", "mps"):
            random[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        return {
            "stage": self.name,
            "architecture": self.model.architecture,
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "projection": trained_state(self.criterion),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "rows": self.rows,
        }

    def load_state(self, state):
        """Take up what `state` returned; raises KeyError or RuntimeError where it does not fit."""
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(self.criterion.state_dict() | state["projection"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        self.order.set_state(state["random"]["order"])
        if self.device.type in state["random"] and self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(state["random"][self.device.type])
        self.rows = state["rows"]


def trained_state(criterion):
    """A criterion's state dict without VGG16, which is frozen and comes from elsewhere."""
    return {k: v for k, v in criterion.state_dict().items() if not k.startswith("perceptual.")}


# --- The whole job ---


class Job:
    """What both stages share: settings, device, images, and the record that goes into each file."""

    def __init__(self, settings, device, precision, images, vgg_record):
        self.settings, self.device, self.precision = settings, device, precision
        self.images, self.val_images = images.train.to(device), images.val.to(device)
        self.weights = {term: getattr(settings, f"{term}_weight") for term in TERMS}
        in_force = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(settings).items()
            if name not in ("resume", "overwrite")
        }
        self.record = (
            in_force
            | images.record
            | vgg_record
            | {
                "effective_beta": effective_beta(
                    settings.kl_weight, settings.reconstruction_weight
                ),
                "device": device.type,
                "device_name": describe_device(device),
                "precision": precision,
                "versions": versions(),
            }
        )

    def checkpoint(self, name):
        return self.settings.checkpoint_dir / name

    def output(self, name):
        return self.settings.output_dir / name

    def write_table(self, rows):
        write_csv(self.output("metrics.csv"), COLUMNS, rows)

    def check_recipe(self, checkpoint, path, recipe):
        """Raise InputError if a checkpoint stems from other settings than this run's."""
        try:
            earlier = checkpoint["record"]
            changed = [
                f"{name} was {earlier[name]}, is {self.record[name]}"
                for name in recipe
                if earlier[name] != self.record[name]
            ]
        except (KeyError, TypeError):
            raise InputError(f"{path} is not a checkpoint of this script") from None
        if changed:
            raise InputError(
                f"{path} comes from other settings ({'; '.join(changed)}): use those again, "
                "--overwrite to start anew, or another --checkpoint-dir and --output-dir"
            )

    def resume(self, stage, name):
        """Bring a stage to where its checkpoint stands, if the run is to be resumed and has one."""
        path = self.checkpoint(name)
        if not (self.settings.resume and path.exists()):
            return
        state = load_checkpoint(path)
        self.check_recipe(state, path, RECIPE)
        try:
            stage.load_state(state)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be resumed from: {error}") from error
        print(f"The {stage.name} goes on after epoch {len(stage.rows)}, from {path}")
        earlier = state["record"]
        for what in ("device_name", "precision", "versions"):
            if earlier[what] != self.record[what]:
                print(f"  Not what it was before: {what}, {earlier[what]} → {self.record[what]}")


def train_teacher(job):
    """Stage 1. Returns the teacher, frozen, and its rows; skipped where there is one already."""
    path = job.checkpoint("teacher_vae.pth")
    if path.exists():
        checkpoint = load_checkpoint(path)
        job.check_recipe(checkpoint, path, TEACHER_RECIPE)
        teacher = build_model(checkpoint, path, StandardVAE)
        rows = checkpoint["rows"]
        record = checkpoint["record"]
        print(
            f"Stage 1 skipped: {path} has these settings (validation MSE "
            f"{rows[-1]['val_mse']:.5f}, trained in {record['precision']} on "
            f"{record['device_name']})"
        )
    else:
        torch.manual_seed(job.settings.seed)
        teacher = StandardVAE()
        criterion = VAELoss(job.settings.teacher_kl_weight)
        stage = Stage(
            "teacher", teacher, criterion, job.images, [], job.settings.teacher_epochs, job
        )
        job.resume(stage, "teacher_last.pth")
        save_teacher(stage, job)  # before the work: a folder that cannot be written shows now
        for _ in stage.run():
            save_teacher(stage, job)
        rows = stage.rows
        finished = stage.state()
        kept = ("stage", "architecture", "epoch", "model", "rows")
        save_checkpoint(path, {k: finished[k] for k in kept} | {"record": job.record})
    job.checkpoint("teacher_last.pth").unlink(missing_ok=True)
    teacher.to(job.device, memory_format=torch.channels_last)
    return teacher.eval().requires_grad_(False), rows


def save_teacher(stage, job):
    save_checkpoint(job.checkpoint("teacher_last.pth"), stage.state() | {"record": job.record})
    job.write_table(stage.rows)


def distil_student(job, teacher, teacher_rows, vgg):
    """Stage 2. Returns the student of the best epoch and the rows of both stages."""
    settings = job.settings
    # The teacher and the images are fixed, so its outputs are too: one pass for all epochs.
    teacher_mu, teacher_logits = teacher_outputs(teacher, job.images, job.precision)
    val_teacher_mu, _ = teacher_outputs(teacher, job.val_images, job.precision)

    torch.manual_seed(settings.seed)
    student = TinyVAE32()
    projection = LatentProjection(teacher_mu, student.latent_dim)
    perceptual = PerceptualLoss(vgg).to(memory_format=torch.channels_last) if vgg else None
    criterion = DistillationLoss(job.weights, settings.temperature, projection, perceptual)
    targets = [teacher_logits, teacher_mu]
    stage = Stage(
        "student", student, criterion, job.images, targets, settings.epochs, job, val_teacher_mu
    )
    job.resume(stage, "tinyvae_last.pth")
    save_student(stage, job, teacher, teacher_rows)
    for _ in stage.run():
        save_student(stage, job, teacher, teacher_rows)

    best = build_model(
        load_checkpoint(job.checkpoint("tinyvae_best.pth")), "tinyvae_best.pth", TinyVAE32
    )
    return best.to(job.device), teacher_rows + stage.rows


def save_student(stage, job, teacher, teacher_rows):
    """Write what an epoch leaves. `tinyvae_last.pth` comes last of the checkpoints: a run that
    dies between two of them does the epoch again, and writes the others again, the same."""
    state = stage.state() | {"record": job.record}
    kept = ("stage", "architecture", "epoch", "model", "record")
    weights_only = {key: state[key] for key in kept}
    epoch = len(stage.rows)
    if epoch and stage.rows[-1]["val_mse"] == min(row["val_mse"] for row in stage.rows):
        save_checkpoint(job.checkpoint("tinyvae_best.pth"), weights_only)
    if epoch and epoch % job.settings.save_every == 0:
        save_checkpoint(job.checkpoint(f"tinyvae_epoch_{epoch:03d}.pth"), weights_only)
        draw(job, teacher, stage.model.eval(), teacher_rows + stage.rows, f"epoch {epoch}")
    save_checkpoint(job.checkpoint("tinyvae_last.pth"), state)
    job.write_table(teacher_rows + stage.rows)


@torch.no_grad()
def teacher_outputs(teacher, images, precision):
    """The teacher's mu (float32) of fixed images, and its logits (float16), decoded from mu."""
    mus, logits = [], []
    chunks = images.split(EVALUATION_BATCH)
    for chunk in progress_bar(chunks, desc="teacher's outputs", unit="batch", leave=False):
        with autocast(images.device, precision):
            mu, _ = teacher.encode(to_float(chunk))
            logits.append(teacher.decode_logits(mu).half())
        mus.append(mu.float())
    return torch.cat(mus), torch.cat(logits)


def draw(job, teacher, student, rows, when):
    what = f"{job.record['data']}, validation split, student at {when}"
    models = {"teacher": teacher, "student": student}
    draw_reconstructions(job.output("reconstruction_test.png"), job.val_images, models, what)
    draw_interpolations(job.output("interpolation_test.png"), job.val_images, models, what)
    draw_curves(job.output("training_curves.png"), rows, f"Distillation on {job.record['data']}")


# --- Earlier runs in the same folders ---

RUN_FILES = (
    "teacher_last.pth", "tinyvae_last.pth", "tinyvae_best.pth", "tinyvae_epoch_*.pth",
    "metrics.csv", "config.json",
)
DRAWN = ("training_curves.png", "reconstruction_test.png", "interpolation_test.png")


def find_files(settings, names):
    folders = {settings.checkpoint_dir, settings.output_dir}
    return sorted(path for folder in folders for name in names for path in folder.glob(name))


def refuse_earlier_run(settings):
    """Stop before an earlier run would be replaced."""
    earlier = find_files(settings, RUN_FILES)
    if settings.resume:
        if not any(path.name.endswith("_last.pth") for path in earlier):
            print(f"Nothing to resume in {settings.checkpoint_dir}: starting from the beginning.")
    elif earlier and not settings.overwrite:
        raise InputError(
            f"{earlier[0]} is of an earlier run: --resume goes on with it, --overwrite replaces "
            "it, another --checkpoint-dir and --output-dir keep it"
        )


def remove_earlier_run(settings, job):
    """Remove what --overwrite and --demo replace. A teacher of the same settings stays."""
    for path in find_files(settings, RUN_FILES + DRAWN):
        path.unlink()
    for path in find_files(settings, ("teacher_vae.pth",)):
        try:
            job.check_recipe(load_checkpoint(path), path, TEACHER_RECIPE)
        except InputError:
            path.unlink()
        else:
            if settings.demo:  # which is to show the whole job
                path.unlink()


def print_summary(job):
    s, record = job.settings, job.record
    weights = ", ".join(f"{term} {weight:g}" for term, weight in job.weights.items())
    print(
        f"images       {record['data']}: {record['train_images']:,} to train on, "
        f"{record['val_images']:,} held out\n"
        f"teacher      StandardVAE, {s.teacher_epochs} epochs, beta {s.teacher_kl_weight:g}\n"
        f"student      TinyVAE32, {s.epochs} epochs\n"
        f"loss         {weights}; T = {s.temperature:g}\n"
        f"             effective beta {record['effective_beta']:.3g} "
        "(KL against the reconstruction term alone)\n"
        f"VGG16        {record['vgg_weights']}\n"
        f"optimiser    Adam, peak learning rate {s.learning_rate:g}, batch {s.batch_size}, "
        f"seed {s.seed}\n"
        f"device       {record['device_name']}, {job.precision}\n"
        f"checkpoints  {s.checkpoint_dir}\n"
        f"outputs      {s.output_dir}\n"
    )


def print_results(job, models):
    table = []
    for name, model in models.items():
        found = evaluate_vae(model, job.val_images)
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


def distil(settings):
    """The whole job: refuse what cannot work, train both stages, draw, and report."""
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    refuse_earlier_run(settings)
    if settings.vgg == "none" or settings.perceptual_weight == 0:
        settings.vgg, settings.perceptual_weight = "none", 0.0
    vgg, vgg_record = None, {"vgg_weights": "none: no perceptual term", "vgg_sha256": ""}
    if settings.vgg != "none":
        vgg, vgg_record = load_vgg16(settings.vgg, settings.seed)
    images = load_training_images(settings.data, settings.limit)
    if len(images.train) < settings.batch_size:
        raise InputError(
            f"{len(images.train)} training images do not fill one batch of "
            f"{settings.batch_size}: lower --batch-size or add images"
        )

    job = Job(settings, device, precision, images, vgg_record)
    if settings.overwrite:
        remove_earlier_run(settings, job)
    print_summary(job)
    write_json(job.output("config.json"), job.record)
    start = time.perf_counter()
    teacher, teacher_rows = train_teacher(job)
    student, rows = distil_student(job, teacher, teacher_rows, vgg)
    draw(job, teacher, student, rows, "its best epoch")

    print_results(job, {"teacher": teacher, "student, best epoch": student})
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Written:")
    for path in [job.checkpoint("teacher_vae.pth"), *find_files(settings, RUN_FILES + DRAWN)]:
        print(f"  {path}")


def main(argv=None):
    settings = parse_flags(globals(), argv, DEMO_SETTINGS)
    if settings.resume and settings.overwrite:
        raise InputError("--resume keeps what --overwrite removes: give one of them")
    if settings.demo and not settings.resume:  # its own folders are its own to replace
        folders = ("checkpoint_dir", "output_dir")
        settings.overwrite |= all(getattr(settings, f) == DEMO_SETTINGS[f] for f in folders)
    try:
        distil(settings)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Every finished epoch is saved: the same command with --resume goes on.",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    run(main)
