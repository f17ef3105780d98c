"""Distil a 512-latent teacher VAE into TinyVAE32: 64 latents, 294,403 parameters.

    python distill_tinyvae.py --demo      # the whole job, small, no network: a minute on 2 cores
    python distill_tinyvae.py             # CIFAR-10 and ImageNet VGG16, both downloaded (700 MB)
    python distill_tinyvae.py --resume    # go on where a run stopped, however it stopped
    python distill_tinyvae.py --data PATH --vgg PATH      # your images, your VGG16 weights
    torchrun --nproc_per_node=2 distill_tinyvae.py        # two processes, the same result
    python distill_tinyvae.py --data PATH --limit 5000 --teacher-epochs 5 --epochs 10   # a trial

Stage 1 trains the teacher, stage 2 the student, with five terms:

    0.3 reconstruction + 0.1 KL + 0.3 latent + 0.2 output (T = 3) + 0.1 perceptual

losses.py has their formulas. VGG16 makes four fifths of a step's arithmetic; `--vgg none` does
without it. Afterwards, `python test_trained_model.py` gives the figures on the test split.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data import load_training_images
from distributed import first_process_first, processes, rank, wait_for_all, world_size
from losses import (
    TERMS,
    DistillationLoss,
    LatentProjection,
    PerceptualLoss,
    VAELoss,
    effective_beta,
    load_vgg16,
)
from metrics import evaluate_vae
from models import count_parameters, load_model
from pictures import draw_curves, draw_interpolations, draw_reconstructions
from runtime import (
    InputError,
    describe_device,
    parse_flags,
    pick_device,
    pick_precision,
    print_table,
    run,
    versions,
)
from standard_vae import StandardVAE
from storage import check_writable, load_checkpoint, save_checkpoint, write_csv, write_json
from tiny_vae_32 import TinyVAE32
from training import Stage, teacher_outputs

HERE = Path(__file__).resolve().parent

# --- Images ---
DATA = "cifar10"  # cifar10, dead-leaves (generated), or a folder with train/ and test/
LIMIT = 0  # use the first N training images; 0 uses all

# --- Teacher ---
TEACHER_EPOCHS = 20  # epochs of stage 1
TEACHER_KL_WEIGHT = 0.01  # beta of the teacher: low, since its error caps the output term's worth

# --- Student: the five terms ---
EPOCHS = 100  # epochs of stage 2
RECONSTRUCTION_WEIGHT = 0.3  # mean squared error of pixels in [0, 1]
KL_WEIGHT = 0.1  # nats per image dimension, counted half
LATENT_WEIGHT = 0.3  # distance of mu to the teacher's, projected 512→64
LATENT_FADE = 0.3  # share of the steps over which the latent term fades to a tenth; 0: never
OUTPUT_WEIGHT = 0.2  # softened divergence from the teacher's logits
PERCEPTUAL_WEIGHT = 0.1  # distance of VGG16 features, counted eightfold
PERCEPTUAL_IMAGES = 4  # images of each batch that VGG16 sees, a sixteenth of the cost; 0: all
TEMPERATURE = 3.0  # T that softens the logits of the output term
VGG = "imagenet"  # imagenet (downloaded), random (untrained), none, or a state dict's path

# --- Optimisation, both stages ---
BATCH_SIZE = 64  # images per step
LEARNING_RATE = 1e-3  # Adam's, at the peak: a linear warm-up, then a cosine to zero
WARMUP = 0.05  # share of a stage's steps in which the learning rate rises
SEED = 0  # of weights, image order and latent samples

# --- Machine ---
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; auto takes what the device does natively
GRAPH = True  # on one CUDA device, launch each step as a whole (CUDA graph)

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
    "teacher_epochs": 3,
    "epochs": 5,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "checkpoint_dir": CHECKPOINT_DIR / "demo",
    "output_dir": OUTPUT_DIR / "demo",
}

# Columns of metrics.csv.
COLUMNS = (
    "stage", "epoch", "loss", *TERMS, "val_mse", "val_psnr", "kl_nats", "kl_per_latent",
    "active_dims", "projected_std", "learning_rate", "seconds",
)

# What makes a teacher the same teacher.
TEACHER_RECIPE = (
    "pixels_sha256", "teacher_epochs", "teacher_kl_weight", "batch_size", "learning_rate",
    "warmup", "seed",
)
# What makes a run the same run, so that it can go on.
RECIPE = (
    *TEACHER_RECIPE, "vgg_sha256", "epochs", "reconstruction_weight", "kl_weight", "latent_weight",
    "latent_fade", "output_weight", "perceptual_weight", "perceptual_images", "temperature",
)

IN_WORDS = {
    "pixels_sha256": "the training images differ",
    "vgg_sha256": "VGG16's weights differ",
    "teacher_sha256": "the teacher differs",
    "start": "the weights it starts from differ",
    "architecture": "the channels differ",
}
REMEDY = "--overwrite to start anew, or another --checkpoint-dir and --output-dir"

# --- The whole job ---


class Job:
    """What both stages share: settings, device, images, and the record that goes into each file."""

    def __init__(self, settings, device, precision, images, vgg_record):
        self.settings, self.device, self.precision = settings, device, precision
        self.images, self.val_images = images.train.to(device), images.val.to(device)
        self.weights = {term: getattr(settings, f"{term}_weight") for term in TERMS}
        self.needs_teacher = self.weights["latent"] > 0 or self.weights["output"] > 0
        in_force = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(settings).items()
            if name not in ("resume", "overwrite", "checkpoint_dir", "output_dir")
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
                "processes": world_size(),
                "versions": versions(),
            }
        )

    def checkpoint(self, name):
        return self.settings.checkpoint_dir / name

    def output(self, name):
        return self.settings.output_dir / name

    def write_table(self, rows):
        write_csv(self.output("metrics.csv"), COLUMNS, rows)

    def check_recipe(self, checkpoint, path, recipe, remedy=REMEDY):
        """Raise InputError if a checkpoint stems from other settings than this run's."""
        try:
            earlier = checkpoint["record"]
            changed = [
                IN_WORDS.get(name, f"{name} was {earlier[name]}, is {self.record[name]}")
                for name in recipe
                if earlier[name] != self.record[name]
            ]
        except (KeyError, TypeError):
            raise InputError(f"{path} is not a checkpoint of this script") from None
        if changed:
            raise InputError(
                f"{path} comes from other settings ({'; '.join(changed)}): use those again, "
                f"{remedy}"
            )

    def check_earlier_run(self):
        """Raise InputError if what is to be gone on with stems from another recipe."""
        for name, recipe in (
            ("teacher_vae.pth", TEACHER_RECIPE),
            ("teacher_last.pth", RECIPE),
            ("tinyvae_last.pth", RECIPE),
        ):
            path = self.checkpoint(name)
            if path.exists():
                self.check_recipe(load_checkpoint(path), path, recipe)

    def resume(self, stage, name):
        """Bring a stage to where its checkpoint stands, if the run is to be resumed and has one."""
        path = self.checkpoint(name)
        if not (self.settings.resume and path.exists()):
            return
        state = load_checkpoint(path)
        try:
            stage.load_state(state)
        except torch.OutOfMemoryError:  # says nothing against the checkpoint
            raise
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path} cannot be resumed from ({reason}): --overwrite starts anew"
            ) from error
        print(f"The {stage.name} goes on after epoch {len(stage.rows)}, from {path}")
        earlier = state["record"]
        for what in ("device_name", "precision", "versions"):
            if earlier[what] != self.record[what]:
                print(f"  Not what it was before: {what}, {earlier[what]} → {self.record[what]}")


def train_teacher(job):
    """Stage 1. Returns the teacher, frozen, and its rows; skipped where there is one already."""
    path = job.checkpoint("teacher_vae.pth")
    if path.exists():
        teacher, checkpoint = load_model(path, StandardVAE)
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
        stage = Stage("teacher", teacher, criterion, [], job.settings.teacher_epochs, job)
        job.resume(stage, "teacher_last.pth")
        save_teacher(stage, job)  # before the work: a disk that is too full for it shows now
        for _ in stage.run():
            save_teacher(stage, job)
        rows = stage.rows
        finished = stage.state()
        kept = ("stage", "architecture", "epoch", "model", "rows")
        save_checkpoint(path, {k: finished[k] for k in kept} | {"record": job.record})
    wait_for_all()
    job.checkpoint("teacher_last.pth").unlink(missing_ok=True)
    teacher.to(job.device, memory_format=torch.channels_last)
    return teacher.eval().requires_grad_(False), rows


def save_teacher(stage, job):
    if rank():
        return
    save_checkpoint(job.checkpoint("teacher_last.pth"), stage.state() | {"record": job.record})
    job.write_table(stage.rows)


class Targets(NamedTuple):
    """What the teacher says of images that never change: one pass serves every epoch."""

    mu: torch.Tensor      # of the training images, N×512, float32
    logits: torch.Tensor  # decoded from that mu, N×3×32×32, float16
    val_mu: torch.Tensor  # of the held-out images, M×512


def ask_teacher(job, teacher):
    mu, logits = teacher_outputs(teacher, job.images, job.precision)
    val_mu, _ = teacher_outputs(teacher, job.val_images, job.precision)
    return Targets(mu, logits, val_mu)


def student_stage(job, targets, vgg, make_projection=LatentProjection, student=None):
    """Stage 2 before its first step: a new student, or the one given, its criterion and optimiser.

    targets may be None where the weights of the terms that need them are zero.
    """
    torch.manual_seed(job.settings.seed)
    student = student or TinyVAE32()
    projection = make_projection(targets.mu, student.latent_dim) if job.needs_teacher else None
    perceptual = PerceptualLoss(vgg).to(memory_format=torch.channels_last) if vgg else None
    criterion = DistillationLoss(
        job.weights,
        job.settings.temperature,
        projection,
        perceptual,
        job.settings.perceptual_images // world_size(),  # of this process's share of a batch
        job.settings.latent_fade,
    )
    fixed = [targets.logits, targets.mu] if job.needs_teacher else []
    val_mu = targets.val_mu if job.weights["latent"] else None  # to watch the projection on
    return Stage("student", student, criterion, fixed, job.settings.epochs, job, val_mu)


def distil_student(job, teacher, teacher_rows, vgg):
    """Stage 2. Returns the student of the best epoch and the rows of both stages."""
    targets = ask_teacher(job, teacher) if job.needs_teacher else None
    stage = student_stage(job, targets, vgg)
    job.resume(stage, "tinyvae_last.pth")
    save_student(stage, job, teacher, teacher_rows)
    for _ in stage.run():
        save_student(stage, job, teacher, teacher_rows)

    wait_for_all()  # the first process may still be writing it
    best, _ = load_model(job.checkpoint("tinyvae_best.pth"), TinyVAE32)
    return best.to(job.device), teacher_rows + stage.rows


def save_student(stage, job, teacher, teacher_rows):
    """Write what an epoch leaves. `tinyvae_last.pth` comes last of the checkpoints: a run that
    dies between two of them does the epoch again, and writes the others again, the same."""
    if rank():
        return
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


def draw(job, teacher, student, rows, when):
    what = f"{job.record['data']}, validation split, student at {when}"
    models = {"teacher": teacher, "student": student}
    draw_reconstructions(job.output("reconstruction_test.png"), job.val_images, models, what)
    draw_interpolations(job.output("interpolation_test.png"), job.val_images, models, what)
    draw_curves(job.output("training_curves.png"), rows, f"Distillation on {job.record['data']}")


# --- For the scripts that train other students by the same recipe ---


def settings_for(teacher_record, **changes):
    """The settings at the top of this script, for a given teacher and its images, some changed."""
    settings = parse_flags(globals(), [])
    known = {name: teacher_record[name] for name in ("data", "teacher_epochs", "teacher_kl_weight")}
    for name, value in (known | changes).items():
        setattr(settings, name, value)
    return settings


def train_once(job, name, path, recipe, make_stage):
    """A trained student: from the file that holds it, or else trained now and written there.

    An interrupted training goes on from its last finished epoch. Raises InputError if the file is
    of another recipe.

    Args:
        job: of the student; its record goes into the file.
        name: what the student is called in the log.
        path: its file.
        recipe: the keys of the record that must agree.
        make_stage: called, without arguments, for a stage that has not begun.

    Returns the file's content: model, architecture, epoch, rows, record.
    """
    remedy = "or move the file away to train it anew"
    if path.exists():
        trained = load_checkpoint(path)
        job.check_recipe(trained, path, recipe, remedy)
        return trained
    unfinished = path.with_suffix(".unfinished.pth")
    state = load_checkpoint(unfinished) if unfinished.exists() else None
    if state:
        job.check_recipe(state, unfinished, recipe, remedy)
    print(f"\n{name}")
    stage = make_stage()
    if state:
        stage.load_state(state)
        print(f"goes on after epoch {len(stage.rows)}")
    for _ in stage.run():
        save_checkpoint(unfinished, stage.state() | {"record": job.record})
    state = stage.state()
    kept = ("stage", "architecture", "epoch", "model", "rows")
    trained = {key: state[key] for key in kept} | {"record": job.record}
    save_checkpoint(path, trained)
    unfinished.unlink(missing_ok=True)
    return trained


# --- Earlier runs in the same folders ---

RUN_FILES = (
    "teacher_last.pth", "tinyvae_last.pth", "tinyvae_best.pth", "tinyvae_epoch_*.pth",
    "metrics.csv", "config.json",
)
DRAWN = (
    "training_curves.png", "reconstruction_test.png", "interpolation_test.png", "evaluation.json",
)


def find_files(settings, names):
    folders = {settings.checkpoint_dir.resolve(), settings.output_dir.resolve()}
    return sorted(path for folder in folders for name in names for path in folder.glob(name))


def refuse_earlier_run(settings):
    """Stop before an earlier run would be replaced."""
    earlier = find_files(settings, RUN_FILES)
    if settings.resume:
        saved = {path.name for path in find_files(settings, ("*.pth",))}
        if "tinyvae_best.pth" in saved and "tinyvae_last.pth" not in saved:
            raise InputError(
                f"{settings.checkpoint_dir} holds a student but no tinyvae_last.pth to go on "
                "from: --overwrite replaces it, another --checkpoint-dir keeps it"
            )
        if not saved & {"teacher_last.pth", "teacher_vae.pth", "tinyvae_last.pth"}:
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
    teacher = job.checkpoint("teacher_vae.pth")
    if not teacher.exists():
        return
    try:
        job.check_recipe(load_checkpoint(teacher), teacher, TEACHER_RECIPE)
        is_another = False
    except InputError:
        is_another = True
    if is_another or settings.demo:  # the demo is to show the whole job
        teacher.unlink()
        print(f"{teacher} removed: a new teacher is trained.")


def print_summary(job):
    s, record = job.settings, job.record
    weights = ", ".join(f"{term} {weight:g}" for term, weight in job.weights.items())
    beta = "none" if record["effective_beta"] is None else f"{record['effective_beta']:.3g}"
    print(
        f"images       {record['data']}: {record['train_images']:,} to train on, "
        f"{record['val_images']:,} held out\n"
        f"teacher      StandardVAE, {s.teacher_epochs} epochs, beta {s.teacher_kl_weight:g}\n"
        f"student      TinyVAE32, {s.epochs} epochs\n"
        f"loss         {weights}; T = {s.temperature:g}\n"
        f"             effective beta {beta} "
        "(KL against the reconstruction term alone)\n"
        f"VGG16        {record['vgg_weights']}\n"
        f"optimiser    Adam, peak learning rate {s.learning_rate:g}, batch {s.batch_size}, "
        f"seed {s.seed}\n"
        f"device       {record['device_name']}, {job.precision}"
        f"{f', {world_size()} processes' if world_size() > 1 else ''}\n"
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


def distil(settings, device):
    """The whole job: refuse what cannot work, train both stages, draw, and report."""
    precision = pick_precision(settings.precision, device)
    refuse_earlier_run(settings)
    if settings.vgg == "none" or settings.perceptual_weight == 0:
        settings.vgg, settings.perceptual_weight = "none", 0.0
    if not any(getattr(settings, f"{term}_weight") for term in TERMS):
        raise InputError("all five weights are zero: there is nothing to train on")
    count = world_size()
    if settings.batch_size % count or settings.perceptual_images % count:
        raise InputError(
            f"{count} processes share each batch evenly: make --batch-size and "
            f"--perceptual-images multiples of {count}"
        )
    with first_process_first():
        images = load_training_images(settings.data, settings.limit)
        vgg, vgg_record = load_vgg16(settings.vgg, settings.seed)
    if len(images.train) < settings.batch_size:
        raise InputError(
            f"{len(images.train)} training images do not fill one batch of "
            f"{settings.batch_size}: lower --batch-size or add images"
        )
    check_writable(settings.checkpoint_dir)
    check_writable(settings.output_dir)

    job = Job(settings, device, precision, images, vgg_record)
    if settings.overwrite:
        with first_process_first():
            remove_earlier_run(settings, job)
    job.check_earlier_run()
    wait_for_all()
    print_summary(job)
    write_json(job.output("config.json"), job.record)
    start = time.perf_counter()
    teacher, teacher_rows = train_teacher(job)
    student, rows = distil_student(job, teacher, teacher_rows, vgg)
    if rank():
        return
    draw(job, teacher, student, rows, "its best epoch")

    print_results(job, {"teacher": teacher, "student, best epoch": student})
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        print(f"\nPeak GPU memory: {peak:.2f} GiB, beside what CUDA itself takes")
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
    device = pick_device(settings.device)
    try:
        with processes(device):
            distil(settings, device)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Every finished epoch is saved: the same command with --resume goes on "
            "(without --overwrite).",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    run(main)
