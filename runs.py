"""A run of distill_tinyvae.py as a whole: its record, its files, earlier runs in its folders."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from data import load_training_images
from distributed import first_process_first, rank, wait_for_all, world_size
from losses import TERMS
from models import load_model
from report import PICTURES, draw
from runtime import InputError, describe_device, is_out_of_memory, pick_precision, versions
from standard_vae import StandardVAE
from storage import (
    check_writable,
    fingerprint,
    load_checkpoint,
    locked,
    save_checkpoint,
    write_csv,
    write_json,
)
from teacher_outputs import check_teacher
from tiny_vae_32 import TinyVAE32
from vae import VAE
from vgg import load_vgg16

TEACHER, TEACHER_STATE = "teacher_vae.pth", "teacher_last.pth"
BEST, STUDENT_STATE, NUMBERED = "tinyvae_best.pth", "tinyvae_last.pth", "tinyvae_epoch_{:03d}.pth"
RUN_FILES = (
    TEACHER_STATE, STUDENT_STATE, BEST, "tinyvae_epoch_*.pth", "metrics.csv", "config.json",
)
# What --overwrite removes as well, with what test_trained_model.py has drawn of the old student.
DRAWN = (*PICTURES, "evaluation.json", "samples.png", "traversal.png", "colours.png")

COLUMNS = (  # of metrics.csv; kl is in nats / 3072, *_weighted are the parts of the loss
    "stage", "epoch", "loss", *TERMS, *(f"{term}_weighted" for term in TERMS), "val_mse",
    "val_psnr", "val_sampled_mse", "kl_nats", "kl_per_latent", "active_dims", "projected_std",
    "learning_rate", "ms_per_step", "seconds",
)

# What makes a teacher the same teacher.
TEACHER_RECIPE = (
    "pixels_sha256", "teacher_architecture", "teacher_epochs", "teacher_kl_weight", "batch_size",
    "teacher_learning_rate", "warmup", "calibration", "seed",
)
# Settings that do not make a run another run: these may change on --resume. Data, weights and
# shapes are compared by their fingerprints instead of their names.
NOT_COMPARED = {
    "data", "limit", "teacher", "teacher_latent_dim", "teacher_channels", "vgg", "start",
    "latent_dim", "encoder_channels", "decoder_channels", "device", "precision", "graph",
    "checkpoint_dir", "output_dir", "teacher_outputs", "save_every", "resume", "overwrite", "demo",
}
COMPARED = (
    "with_teacher", "pixels_sha256", "vgg_sha256", "teacher_sha256", "teacher_architecture",
    "start_sha256", "architecture",
)

TEACHER_TRIAL = 200  # training images that a given teacher is tried on before the work

REMEDY = "--overwrite to start again, or another --checkpoint-dir and --output-dir"
IN_WORDS = {
    "with_teacher": "one has a teacher, --teacher, and the other has none",
    "pixels_sha256": "the training images differ",
    "vgg_sha256": "VGG16's weights differ",
    "teacher_sha256": "the teacher differs",
    "start_sha256": "the weights it starts from differ",
    "architecture": "the student's channels or latents differ",
    "teacher_architecture": "the teacher's channels or latents differ",
}


@dataclass
class Run:
    settings: SimpleNamespace  # of distill_tinyvae.py
    device: torch.device
    precision: str             # fp32, bf16 or fp16
    images: torch.Tensor       # to train on, uint8, N×3×32×32, on the device
    val_images: torch.Tensor   # held out, likewise
    record: dict               # settings, data, weights, device: goes into each file

    @property
    def needs_teacher(self):
        """Whether any term of the student's loss needs the teacher."""
        s = self.settings
        return s.teacher is not None and (s.latent_weight > 0 or s.output_weight > 0)

    def may_be_best(self, epoch):
        """Whether an epoch of the student competes for the best: with --rate the last alone, since
        before it the rate is another."""
        s = self.settings
        return not s.rate or epoch == s.epochs

    def checkpoint(self, name):
        return self.settings.checkpoint_dir / name

    def output(self, name):
        return self.settings.output_dir / name


# --- The start of a run ---


@contextlib.contextmanager
def begin(settings, device):
    """Load what a run needs, refuse what cannot work, write config.json. Within it, the run's
    folders are locked: no other run gets to write into them.

    Yields the Run, VGG16's layers and the student to start from, None where there is none.
    """
    s = settings
    precision = pick_precision(s.precision, device)
    refuse_earlier_run(s)
    teacher_file = given_teacher(s)
    for path in (teacher_file, s.start):
        if path and path.resolve() in find_files(s, RUN_FILES):
            raise InputError(
                f"{path} is one of the files that this run writes: copy it elsewhere, or name "
                "another --checkpoint-dir and --output-dir"
            )
    teacher_shape, student = None, None
    teacher_record = {"teacher_sha256": ""}  # a teacher of stage 1 has its recipe
    known = ("teacher_epochs", "teacher_kl_weight", "teacher_learning_rate")
    if s.teacher is None:
        teacher_record |= dict.fromkeys((*known, "teacher_latent_dim", "teacher_channels"))
    if teacher_file:
        teacher, checkpoint = load_model(teacher_file, VAE)
        teacher_record = {key: checkpoint.get("record", {}).get(key) for key in known}
        teacher_record["teacher_sha256"] = fingerprint(teacher)
        teacher_shape = teacher.architecture
        s.teacher_latent_dim = teacher.latent_dim
        s.teacher_channels = teacher.architecture.get("channels")
    if s.start:
        student, _ = load_model(s.start, TinyVAE32)
        for name in ("latent_dim", "encoder_channels", "decoder_channels"):
            setattr(s, name, student.architecture[name])
    with first_process_first():
        images = load_training_images(s.data, s.limit)
        vgg, vgg_record = load_vgg16(s.vgg, s.seed)
    if len(images.train) < s.batch_size:
        raise InputError(
            f"{len(images.train)} training images do not fill one batch of {s.batch_size}: lower "
            "--batch-size or add images"
        )
    in_force = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(s).items()
        if name not in ("resume", "overwrite", "checkpoint_dir", "output_dir", "teacher_outputs")
    }
    with torch.device("meta"):  # for its description alone
        shape = TinyVAE32(s.latent_dim, s.encoder_channels, s.decoder_channels).architecture
        if s.teacher == "train":
            teacher_shape = StandardVAE(s.teacher_latent_dim, s.teacher_channels).architecture
    beta = None  # where there is no such number
    if s.reconstruction_weight and not s.rate:
        beta = s.kl_weight * s.kl_scale / s.reconstruction_weight
    record = in_force | images.record | vgg_record | teacher_record | {
        "architecture": shape,
        "teacher_architecture": teacher_shape,
        "with_teacher": s.teacher is not None,
        "start_sha256": fingerprint(student) if student else "",
        "effective_beta": beta,  # of (summed squared error + beta × summed KL), without the others
        "device": device.type,
        "device_name": describe_device(device),
        "precision": precision,
        "processes": world_size(),
        "versions": versions(),
    }
    run = Run(s, device, precision, images.train.to(device), images.val.to(device), record)
    if s.latent_weight and s.teacher_latent_dim < s.latent_dim:
        remedy = "name another --teacher" if teacher_file else "raise --teacher-latent-dim"
        raise InputError(
            f"the teacher has {s.teacher_latent_dim} latents, fewer than the student's "
            f"{s.latent_dim}, which learn from them: {remedy}"
            + (", or lower --latent-dim" if not s.start else "")
        )
    if s.latent_weight and s.projection == "identity" and s.teacher_latent_dim != s.latent_dim:
        raise InputError(
            f"--projection identity takes the teacher's code as it is, but the teacher has "
            f"{s.teacher_latent_dim} latents and the student {s.latent_dim}: name another one"
        )
    if s.latent_weight and s.projection != "identity" and len(run.images) <= s.latent_dim:
        raise InputError(
            f"{len(run.images)} training images are too few to project the teacher's latents to "
            f"{s.latent_dim}: at least {s.latent_dim + 1} are needed; add images, or leave out the "
            "latent term with --latent-weight 0"
        )
    if teacher_file and run.needs_teacher:
        wanted = s.latent_dim if s.latent_weight else 0
        check_teacher(teacher, images.train[:TEACHER_TRIAL], teacher_file, wanted)
    with contextlib.ExitStack() as locks:
        if not rank():
            for folder in sorted({path.resolve() for path in (s.checkpoint_dir, s.output_dir)}):
                check_writable(folder)
                locks.enter_context(locked(folder))
            if not s.resume:
                refuse_earlier_run(s)  # again: one may have ended meanwhile
            for path in find_files(s, ("*.tmp",)):  # left by a process that was killed
                path.unlink()
            if s.overwrite:
                remove_earlier_run(run)
        wait_for_all()
        check_earlier_run(run)
        wait_for_all()
        if not rank():
            write_json(run.output("config.json"), record)
        yield run, vgg, student


# --- Is it the same run? ---


def check_earlier_run(run):
    """Raise InputError if what is to be continued was made by another recipe."""
    settings = [name for name in vars(run.settings) if name not in NOT_COMPARED]
    recipes = dict.fromkeys((TEACHER_STATE, STUDENT_STATE), (*COMPARED, *settings))
    if trains_teacher(run):
        recipes[TEACHER] = TEACHER_RECIPE
    for name, recipe in recipes.items():
        path = run.checkpoint(name)
        if path.exists():
            check_recipe(load_checkpoint(path), path, run.record, recipe)


def given_teacher(settings):
    """The path of a trained teacher; None where stage 1 trains one, and without a teacher."""
    return None if settings.teacher == "train" else settings.teacher


def trains_teacher(run):
    """Whether stage 1 makes the teacher, now or in an earlier run."""
    return run.needs_teacher and not given_teacher(run.settings)


def check_recipe(checkpoint, path, record, names):
    """Raise InputError if a checkpoint's record and this one differ in one of these names."""
    try:
        earlier = checkpoint["record"]
        changed = [
            IN_WORDS.get(name, f"{name} was {earlier[name]}, is {record[name]}")
            for name in names
            if earlier[name] != record[name]
        ]
        if IN_WORDS["with_teacher"] in changed:  # the weights of its terms follow from that
            changed = changed[:1]
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is not a checkpoint of this version of the script: use {REMEDY}"
        ) from None
    if changed:
        raise InputError(
            f"{path} comes from other settings ({'; '.join(changed)}): use those again, {REMEDY}"
        )


def resume(stage, name):
    """Load a stage's checkpoint, where the run is to be resumed and has one.

    Raises InputError if the checkpoint does not fit.
    """
    path = stage.run.checkpoint(name)
    if not (stage.run.settings.resume and path.exists()):
        return
    state = load_checkpoint(path)
    try:
        stage.load_state(state)
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):  # says nothing against the checkpoint
            raise
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be resumed from ({reason}): --overwrite starts again"
        ) from error
    print(f"Resuming the {stage.name} after epoch {len(stage.rows)}, from {path}")
    earlier = state["record"]
    for what in ("device_name", "precision", "versions"):
        if earlier[what] != stage.run.record[what]:
            print(f"  {what} has changed: {earlier[what]} → {stage.run.record[what]}")


# --- What a run writes ---


def load_teacher(run):
    """The teacher of --teacher, or that of the checkpoint folder if one is needed, and its rows;
    None and no rows where there is none. Prints which."""
    given = given_teacher(run.settings)
    path = given or run.checkpoint(TEACHER)
    if not given and not (run.needs_teacher and path.exists()):
        return None, []
    if not given and not rank():  # left by a run that died as stage 1 ended
        run.checkpoint(TEACHER_STATE).unlink(missing_ok=True)
    teacher, checkpoint = load_model(path, VAE)
    record, rows = checkpoint.get("record", {}), checkpoint.get("rows", [])
    details = [f"validation MSE {rows[-1]['val_mse']:.5f}"] if rows else []
    if "device_name" in record:
        details += [f"trained in {record['precision']} on {record['device_name']}"]
    print(f"Stage 1 skipped: the teacher is {path}" + f" ({', '.join(details)})" * bool(details))
    return teacher.to(run.device, memory_format=torch.channels_last), rows


def save_teacher(stage):
    """Write what an epoch of stage 1 leaves."""
    run = stage.run
    if not rank():
        save_checkpoint(run.checkpoint(TEACHER_STATE), stage.state() | {"record": run.record})
        write_csv(run.output("metrics.csv"), COLUMNS, stage.rows)


def finish_teacher(run, teacher, rows):
    """Write the trained teacher, without what only its training needs."""
    if not rank():
        checkpoint = {"stage": "teacher", "architecture": teacher.architecture, "epoch": len(rows)}
        checkpoint |= {"model": teacher.state_dict(), "rows": rows, "record": run.record}
        save_checkpoint(run.checkpoint(TEACHER), checkpoint)
        run.checkpoint(TEACHER_STATE).unlink(missing_ok=True)


def save_student(stage, teacher, teacher_rows):
    """Write what an epoch of stage 2 leaves. `tinyvae_last.pth` comes last of the checkpoints: a
    run that dies between two of them does the epoch again, and writes the others again, the same.
    """
    if rank():
        return
    run, epoch, rows = stage.run, len(stage.rows), teacher_rows + stage.rows
    state = stage.state() | {"record": run.record}
    kept = ("stage", "architecture", "epoch", "model", "record")
    weights_only = {key: state[key] for key in kept}
    competing = [row for row in stage.rows if run.may_be_best(row["epoch"])] or stage.rows
    if epoch and stage.rows[-1]["val_mse"] == min(row["val_mse"] for row in competing):
        save_checkpoint(run.checkpoint(BEST), weights_only)
    if epoch and epoch % run.settings.save_every == 0:
        save_checkpoint(run.checkpoint(NUMBERED.format(epoch)), weights_only)
        draw(run, teacher, stage.model.eval(), rows, f"epoch {epoch}")
    save_checkpoint(run.checkpoint(STUDENT_STATE), state)
    write_csv(run.output("metrics.csv"), COLUMNS, rows)


def best_student(run):
    """The student of the epoch with the lowest validation error, of those that may be the best."""
    wait_for_all()  # the first process may still be writing it
    return load_model(run.checkpoint(BEST), TinyVAE32)[0].to(run.device)


# --- Earlier runs in the same folders ---


def find_files(settings, names):
    folders = {settings.checkpoint_dir.resolve(), settings.output_dir.resolve()}
    return sorted(path for folder in folders for name in names for path in folder.glob(name))


def written_files(run):
    own = (TEACHER,) if trains_teacher(run) else ()
    return find_files(run.settings, (*own, *RUN_FILES, *DRAWN))


def refuse_earlier_run(settings):
    """Raise InputError where an earlier run would be replaced without being asked to."""
    earlier = find_files(settings, RUN_FILES)
    if settings.resume:
        saved = {path.name for path in find_files(settings, ("*.pth",))}
        if BEST in saved and STUDENT_STATE not in saved:
            raise InputError(
                f"{settings.checkpoint_dir} holds a student but no {STUDENT_STATE} to resume "
                "from: --overwrite replaces it, another --checkpoint-dir keeps it"
            )
        if not saved & {TEACHER_STATE, TEACHER, STUDENT_STATE}:
            print(f"Nothing to resume in {settings.checkpoint_dir}: starting from the beginning.")
    elif earlier and not settings.overwrite:
        raise InputError(
            f"{earlier[0]} belongs to an earlier run: --resume continues it, --overwrite replaces "
            "it, another --checkpoint-dir and --output-dir keep it"
        )


def remove_earlier_run(run):
    """Remove what --overwrite and --demo replace. A teacher of the same settings stays."""
    for path in find_files(run.settings, RUN_FILES + DRAWN):
        path.unlink()
    teacher = run.checkpoint(TEACHER)
    if not (trains_teacher(run) and teacher.exists()):
        return
    try:
        check_recipe(load_checkpoint(teacher), teacher, run.record, TEACHER_RECIPE)
        is_another = False
    except InputError:
        is_another = True
    if is_another or run.settings.demo:  # the demo shows both stages
        teacher.unlink()
        print(f"{teacher} removed: a new teacher is trained.")
