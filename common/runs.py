"""A run of distill_tinyvae.py: what it loads, what it refuses, and the files that it writes."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common import report
from common.distributed import first_process_first, rank, wait_for_all, world_size
from common.losses import TERMS
from common.made_images import code_statistics, training_images
from common.models import BEST_STUDENT, TRAINED_TEACHER, load_any_teacher, load_model
from common.recipe import (
    COMPARED,
    NOT_COMPARED,
    NOT_RECORDED,
    STUDENT_SHAPE,
    TEACHER_RECIPE,
    TEACHER_SETTINGS,
    TEACHER_SHAPE,
    check_recipe,
)
from common.runtime import DTYPES, InputError, describe_device, pick_precision, require, versions
from common.settings import Settings
from common.storage import (
    check_writable,
    fingerprint,
    load_checkpoint,
    locked,
    save_checkpoint,
    write_csv,
    write_json,
)
from common.teacher_outputs import check_memory, check_teacher
from common.vgg import VGGFeatures, load_vgg16
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

TEACHER_STATE, STUDENT_STATE = "teacher_last.pth", "tinyvae_last.pth"
NUMBERED = "tinyvae_epoch_{:03d}.pth"
RUN_FILES = (
    TEACHER_STATE, STUDENT_STATE, BEST_STUDENT, "tinyvae_epoch_*.pth", "metrics.csv", "config.json",
)
COLUMNS = (  # of metrics.csv; kl is in nats / 3072, *_weighted are the parts of the loss
    "stage", "epoch", "loss", *TERMS, *(f"{term}_weighted" for term in TERMS), "val_mse",
    "val_psnr", "val_sampled_mse", "kl_nats", "kl_per_latent", "active_dims", "projected_std",
    "learning_rate", "ms_per_step", "seconds",
)
TEACHER_CHECK_IMAGES = 200  # training images that a given teacher is tried on before the work


@dataclass(frozen=True)
class Run:
    settings: Settings              # of distill_tinyvae.py
    weights: dict                   # term → weight, of the terms in use
    device: torch.device
    precision: str                  # fp32, bf16 or fp16
    images: torch.Tensor            # to train on, uint8, N×3×32×32, on the device
    val_images: torch.Tensor        # held out, likewise
    vgg: nn.Module | None           # VGGFeatures
    teacher: nn.Module | None       # that of --teacher PATH
    teacher_checkpoint: dict | None  # what that holds
    student: nn.Module | None       # that of --start
    record: dict                    # settings, data, weights, device: goes into each file

    @property
    def needs_teacher(self):
        """Whether a term of the student's loss learns from a teacher."""
        return self.settings.teacher is not None and bool({"latent", "output"} & set(self.weights))

    @property
    def trains_teacher(self):
        """Whether stage 1 makes the teacher, now or in an earlier run."""
        return self.needs_teacher and self.settings.teacher == "train"

    def checkpoint(self, name):
        return self.settings.checkpoint_dir / name

    def output(self, name):
        return self.settings.output_dir / name


# --- Load ---


def load(settings, weights, device):
    """Images, networks and weights that a run needs, and its record: a Run.

    Args:
        settings: of distill_tinyvae.py.
        weights: term → weight, of the terms in use.
        device: where it runs.

    Raises InputError for what cannot be loaded.
    """
    s = settings
    precision = vgg_precision = pick_precision(s.precision, device)
    if "perceptual" in weights and s.perceptual_precision != "auto":
        flag = "--perceptual-precision"
        vgg_precision = pick_precision(s.perceptual_precision, device, flag)
    teacher, teacher_checkpoint, teacher_record = load_given_teacher(s)
    student = load_model(s.start, TinyVAE32)[0] if s.start else None
    with first_process_first():
        vgg, vgg_record = load_vgg16(s.vgg if "perceptual" in weights else "none", s.seed)
        images = training_images(
            s.data, s.limit, s.teacher_images, s.seed, teacher, teacher_checkpoint, s.teacher,
            s.skip_unreadable,
        )
    vgg = vgg and VGGFeatures(vgg, DTYPES[vgg_precision])
    with torch.device("meta"):  # for its description alone
        shape = TinyVAE32(*(getattr(s, name) for name in STUDENT_SHAPE)).architecture
    shape = student.architecture if student else shape
    beta = None  # where there is no such number
    if s.reconstruction_weight and not s.rate:
        beta = s.kl_weight * s.kl_scale / s.reconstruction_weight
    record = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in s.as_dict().items() if name not in NOT_RECORDED
    }
    record |= {f"{term}_weight": 0.0 for term in TERMS if term not in weights}
    record |= {name: shape[name] for name in STUDENT_SHAPE}
    record |= images.record | vgg_record | teacher_record | {
        "architecture": shape,
        "with_teacher": s.teacher is not None,
        "start_sha256": fingerprint(student) if student else "",
        "effective_beta": beta,  # of (summed squared error + beta × summed KL), without the others
        "device": device.type,
        "device_name": describe_device(device),
        "precision": precision,
        "perceptual_precision": vgg_precision if vgg else None,
        "processes": world_size(),
        "versions": versions(),
    }
    train, val = images.train.to(device), images.val.to(device)
    return Run(
        s, weights, device, precision, train, val, vgg, teacher, teacher_checkpoint, student, record
    )


def load_given_teacher(settings):
    """The teacher of --teacher PATH and its checkpoint, None without one; and what a record says
    of the teacher."""
    if settings.teacher is None:
        absent = dict.fromkeys((*TEACHER_SETTINGS, *TEACHER_SHAPE, "teacher_architecture"))
        return None, None, absent | {"teacher_sha256": ""}
    if settings.teacher == "train":  # its recipe stands for its weights
        with torch.device("meta"):
            shape = StandardVAE(settings.teacher_latent_dim, settings.teacher_channels).architecture
        return None, None, {"teacher_sha256": "", "teacher_architecture": shape}
    teacher, checkpoint = load_any_teacher(settings.teacher)
    shape, trained = teacher.architecture, checkpoint.get("record", {})
    return teacher, checkpoint, {
        **{name: trained.get(name) for name in TEACHER_SETTINGS},
        "teacher_latent_dim": shape["latent_dim"],
        "teacher_channels": shape.get("channels"),
        "teacher_architecture": shape,
        "teacher_sha256": fingerprint(teacher),
    }


# --- Check ---


def check_settings(s, weights):
    """Raise InputError for settings that do not go together, and for a package that is missing."""
    require("matplotlib.figure", "pip install -r requirements.txt")
    if s.tensorboard:
        require("torch.utils.tensorboard", "pip install tensorboard")
    if s.resume and s.overwrite:
        raise InputError("--resume keeps what --overwrite removes: give one of them")
    if (s.data is None or s.teacher_images) and s.teacher in (None, "train"):
        raise InputError(
            "only a trained teacher makes pictures: name one, --teacher "
            "checkpoints/teacher_cifar10.pth, or leave out --data none and --teacher-images"
        )
    if not weights:
        raise InputError("all five weights are zero: there is nothing to train on")
    if s.rate and "kl" not in weights:
        raise InputError("--rate holds the KL by its weight, which is 0: raise --kl-weight")
    shared = (s.batch_size, s.perceptual_images if "perceptual" in weights else 0)
    if any(count % world_size() for count in shared):
        raise InputError(
            f"{world_size()} processes share each batch evenly: make --batch-size and "
            f"--perceptual-images multiples of {world_size()}"
        )
    check_files(s)


def check_files(s):
    """Raise InputError where an earlier run would be replaced without being asked to, or a file
    that is read would be."""
    earlier = find_files(s, RUN_FILES)
    for path in (s.teacher, s.start):
        if isinstance(path, Path) and path.resolve() in earlier:
            raise InputError(
                f"{path} is one of the files that this run writes: copy it elsewhere, or name "
                "another --checkpoint-dir and --output-dir"
            )
    if s.resume:
        saved = {path.name for path in find_files(s, ("*.pth",))}
        if BEST_STUDENT in saved and STUDENT_STATE not in saved:
            raise InputError(
                f"{s.checkpoint_dir} holds a student but no {STUDENT_STATE} to resume from: "
                "--overwrite replaces it, another --checkpoint-dir keeps it"
            )
        if not saved & {TEACHER_STATE, TRAINED_TEACHER, STUDENT_STATE}:
            print(f"Nothing to resume in {s.checkpoint_dir}: starting from the beginning.")
    elif earlier and not s.overwrite:
        raise InputError(
            f"{earlier[0]} belongs to an earlier run: --resume continues it, --overwrite replaces "
            "it, another --checkpoint-dir and --output-dir keep it"
        )


def check(run):
    """Raise InputError for images, a teacher and a student that do not fit each other."""
    s, count = run.settings, len(run.images)
    if count < s.batch_size:
        raise InputError(
            f"{count} training images do not fill one batch of {s.batch_size}: lower --batch-size "
            "or add images"
        )
    latents, wanted = run.record["teacher_latent_dim"], run.record["latent_dim"]
    if "latent" in run.weights:
        if latents < wanted:
            remedy = "name another --teacher" if run.teacher else "raise --teacher-latent-dim"
            raise InputError(
                f"the teacher has {latents} latents, fewer than the student's {wanted}, which "
                f"learn from them: {remedy}" + (", or lower --latent-dim" if not s.start else "")
            )
        if s.projection == "identity" and latents != wanted:
            raise InputError(
                "--projection identity takes the teacher's code as it is, but the teacher has "
                f"{latents} latents and the student {wanted}: name another one"
            )
        if s.projection != "identity" and count <= wanted:
            raise InputError(
                f"{count} training images are too few to project the teacher's latents to "
                f"{wanted}: at least {wanted + 1} are needed; add images, or leave out the latent "
                "term with --latent-weight 0"
            )
    if run.device.type == "cuda" and run.needs_teacher:
        check_memory(count, latents)
    if run.teacher and run.needs_teacher:
        images = run.images[:TEACHER_CHECK_IMAGES].cpu()
        check_teacher(run.teacher, images, s.teacher, wanted if "latent" in run.weights else 0)


# --- Prepare ---


@contextlib.contextmanager
def prepared(run):
    """Within it, the run's folders are its own: no other run gets to write into them. Removes what
    --overwrite replaces, refuses to continue another run, and writes config.json."""
    s = run.settings
    with contextlib.ExitStack() as locks:
        if not rank():
            for folder in sorted({path.resolve() for path in (s.checkpoint_dir, s.output_dir)}):
                check_writable(folder)
                locks.enter_context(locked(folder))
            if not s.resume:
                check_files(s)  # again: another run may have ended meanwhile
            if s.overwrite:
                remove_earlier_run(run)
        wait_for_all()
        check_earlier_run(run)
        wait_for_all()
        if not rank():
            write_json(run.output("config.json"), run.record)
        yield


def remove_earlier_run(run):
    """Remove what --overwrite and --demo replace. A teacher of the same settings stays."""
    drawn = (*report.PICTURES, *report.EVALUATION_FILES, *report.SWAP_FILES)
    for path in find_files(run.settings, (*RUN_FILES, *drawn)):
        path.unlink()
    shutil.rmtree(run.output(report.TENSORBOARD), ignore_errors=True)
    teacher = run.checkpoint(TRAINED_TEACHER)
    if not (run.trains_teacher and teacher.exists()):
        return
    try:
        check_recipe(load_checkpoint(teacher), teacher, run.record, TEACHER_RECIPE)
    except InputError:
        teacher.unlink()
        print(f"{teacher} removed: a new teacher is trained.")


def check_earlier_run(run):
    """Raise InputError if what is to be continued was made by another recipe."""
    settings = [name for name in run.settings.as_dict() if name not in NOT_COMPARED]
    recipes = dict.fromkeys((TEACHER_STATE, STUDENT_STATE), (*COMPARED, *settings))
    if run.trains_teacher:
        recipes[TRAINED_TEACHER] = TEACHER_RECIPE
    for name, recipe in recipes.items():
        path = run.checkpoint(name)
        if path.exists():
            check_recipe(load_checkpoint(path), path, run.record, recipe)


# --- What a run reads and writes ---


def state_to_resume(run, name):
    """The path of a stage's state where the run resumes one, else None."""
    path = run.checkpoint(name)
    if not (run.settings.resume and path.exists()):
        return None
    earlier = load_checkpoint(path)["record"]
    for what in ("device_name", "precision", "perceptual_precision", "versions"):
        if what in earlier and earlier[what] != run.record[what] and run.record[what]:
            print(f"{path}: {what} has changed: {earlier[what]} → {run.record[what]}")
    return path


def load_teacher(run):
    """The teacher of --teacher, or that of the checkpoint folder if one is needed, and its rows of
    metrics.csv; None and no rows where there is none. Prints which."""
    path, teacher, checkpoint = run.settings.teacher, run.teacher, run.teacher_checkpoint
    if not teacher:
        path = run.checkpoint(TRAINED_TEACHER)
        if not (run.needs_teacher and path.exists()):
            return None, []
        if not rank():  # left by a run that died as stage 1 ended
            run.checkpoint(TEACHER_STATE).unlink(missing_ok=True)
        teacher, checkpoint = load_model(path, StandardVAE)
    record, rows = checkpoint.get("record", {}), checkpoint.get("rows", [])
    details = [f"MSE {rows[-1]['val_mse']:.5f} on its own validation images"] if rows else []
    if "device_name" in record:
        details += [f"trained in {record['precision']} on {record['device_name']}"]
    print(f"Stage 1 skipped: the teacher is {path}" + f" ({', '.join(details)})" * bool(details))
    return teacher.to(run.device, memory_format=torch.channels_last), rows


def write_metrics(run, rows, earlier=()):
    """Write the rows of a stage, after those of the earlier one."""
    if run.settings.tensorboard and rows:
        report.log_epoch(run, rows[-1])
    rows = [*earlier, *rows]
    others = [name for row in rows for name in row if name not in COLUMNS]  # of another objective
    write_csv(run.output("metrics.csv"), (*COLUMNS, *dict.fromkeys(others)), rows)


def save_teacher(run, state):
    """Write what an epoch of stage 1 leaves."""
    if not rank():
        save_checkpoint(run.checkpoint(TEACHER_STATE), state | {"record": run.record})
        write_metrics(run, state["rows"])


def finish_teacher(run, state, teacher):
    """Write the trained teacher, without what only its training needs, and with what it needs to
    make pictures."""
    if not rank():
        kept = ("stage", "architecture", "epoch", "model", "rows")
        checkpoint = {key: state[key] for key in kept} | {"record": run.record}
        checkpoint |= code_statistics(teacher.eval(), run.images, run.precision)
        save_checkpoint(run.checkpoint(TRAINED_TEACHER), checkpoint)
        run.checkpoint(TEACHER_STATE).unlink(missing_ok=True)


def save_student(run, state, student, teacher, teacher_rows):
    """Write what an epoch of stage 2 leaves. `tinyvae_last.pth` comes last of the checkpoints: a
    run that dies between two of them repeats the epoch and writes identical files.

    With --rate the last epoch alone can be the best, since before it the nats are others.
    """
    if rank():
        return
    s, epoch, rows = run.settings, state["epoch"], state["rows"]
    state = state | {"record": run.record}
    kept = ("stage", "architecture", "epoch", "model", "record")
    weights_only = {key: state[key] for key in kept}
    if epoch:
        competing = rows[-1:] if s.rate and epoch == s.epochs else rows
        if rows[-1]["val_mse"] == min(row["val_mse"] for row in competing):
            save_checkpoint(run.checkpoint(BEST_STUDENT), weights_only)
        if epoch % s.save_every == 0:
            save_checkpoint(run.checkpoint(NUMBERED.format(epoch)), weights_only)
            report.draw(run, teacher, student.eval(), teacher_rows + rows, f"epoch {epoch}")
    save_checkpoint(run.checkpoint(STUDENT_STATE), state)
    write_metrics(run, rows, teacher_rows)


def best_student(run):
    """The student of the epoch with the lowest validation error."""
    wait_for_all()  # the first process may still be writing it
    return load_model(run.checkpoint(BEST_STUDENT), TinyVAE32)[0].to(run.device)


def find_files(settings, names):
    folders = {settings.checkpoint_dir.resolve(), settings.output_dir.resolve()}
    return sorted({path for folder in folders for name in names for path in folder.glob(name)})


def written_files(run):
    own = (TRAINED_TEACHER,) if run.trains_teacher else ()
    return find_files(run.settings, (*own, *RUN_FILES, *report.PICTURES))
