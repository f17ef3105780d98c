"""Distil a VAE of 512 latents into TinyVAE32: 64 latents, 294,403 parameters.

    python distill_tinyvae.py --demo      # a small run without downloads: two minutes on 2 cores
    python distill_tinyvae.py             # CIFAR-10 and ImageNet VGG16, both downloaded (700 MB)
    python distill_tinyvae.py --teacher PATH              # a teacher that is trained already
    python distill_tinyvae.py --teacher none              # the same student without one
    python distill_tinyvae.py --resume    # with its other flags: continue a run that stopped
    python distill_tinyvae.py --data PATH --vgg PATH      # your images, your VGG16 weights
    torchrun --nproc_per_node=2 -- distill_tinyvae.py     # two processes, the same result
    python distill_tinyvae.py --limit 5000 --epochs 10 \\
        --checkpoint-dir trial --output-dir trial         # a trial, in a folder of its own

Stage 1 trains the teacher for 20 epochs, stage 2 the student for 100, by five terms: two of any
VAE, two that learn from the teacher, and one that compares features of VGG16. With --teacher none
there is no stage 1 and no latent term, and the output term compares with the image.

Edit the settings below, or override one with the flag of the same name. Afterwards
`python test_trained_model.py` measures on the test split.

The formulas of the terms are in losses.py, the learning rate in optimizer.py, batches, validation
and BatchNorm's statistics in training.py.
"""

import sys
import time
from pathlib import Path

import torch

import report
import runs
from distributed import processes, rank, world_size
from losses import (
    PROJECTIONS,
    TERMS,
    kl_loss,
    latent_distillation_loss,
    make_projection,
    output_distillation_loss,
    perceptual_loss,
    reconstruction_loss,
    without_grid,
)
from metrics import encode_means
from runtime import DTYPES, InputError, autocast, pick_device, run_script
from settings import file_path, number, one_of, parse_settings, several, switch, text, whole
from standard_vae import StandardVAE
from teacher_outputs import refuse_other_file, teacher_outputs
from tiny_vae_32 import TinyVAE32
from training import Stage
from vgg import VGGFeatures

HERE = Path(__file__).resolve().parent

# --- Images ---
DATA = "cifar10"  # cifar10, photo-crops, dead-leaves (data.py), or a folder with train/ and test/
LIMIT = 0  # use the first N training images; 0 uses all

# --- Teacher ---
TEACHER = "train"  # train: stage 1 trains one; the path of a trained one; or None, for no teacher
TEACHER_LATENT_DIM = 512  # latents, at least as many as the student's
TEACHER_CHANNELS = (64, 128, 256, 512)  # out of its four encoder stages; the decoder mirrors them
TEACHER_EPOCHS = 20  # epochs of stage 1
TEACHER_KL_WEIGHT = 0.01  # beta of the teacher: low, since its own error limits what it can teach
TEACHER_LEARNING_RATE = 1e-3  # Adam's, at the peak

# --- Student ---
LATENT_DIM = 64  # latents
ENCODER_CHANNELS = (16, 32, 64, 128)  # out of the four encoder stages
DECODER_CHANNELS = (128, 64, 32, 16)  # into the four decoder stages
START = None  # a student's checkpoint to start from, with its own shape; None: random weights
EPOCHS = 100  # epochs of stage 2
OPTIMIZER = "muon"  # muon, for matrices and kernels, with Adam for the rest; or adam for all
LEARNING_RATE = 3e-3  # at the peak

# --- The five terms of the student's loss ---
RECONSTRUCTION_WEIGHT = 0.3  # squared error of pixels in [0, 1], of a sample
KL_WEIGHT = 0.1  # nats per image dimension; lower: more nats, less error
KL_SCALE = 0.4  # times KL_WEIGHT: with 0.4 the student ends near the 87 nats quoted for the design
RATE = None  # nats to hold the KL at, by a further factor that moves; None: its weight decides
LATENT_WEIGHT = 0.3  # squared distance of mu to the teacher's projected mu, in nats
OUTPUT_WEIGHT = 0.2  # divergence from the teacher's pixels, of the mean, softened by T
TEMPERATURE = 3.0  # T; higher: dark and bright pixels weigh more
PERCEPTUAL_WEIGHT = 0.1  # squared distance of VGG16 features, of the mean
PERCEPTUAL_SCALE = 4.0  # times PERCEPTUAL_WEIGHT: a mean over channels of unit vectors is small
PERCEPTUAL_IMAGES = 6  # images of each batch that VGG16 sees; 0: all, less noisy and far slower
PROJECTION = "pixels"  # of the teacher's mu; or principal, free, identity (losses.py)
VGG = "imagenet"  # imagenet (downloaded), random (untrained), none, or a state dict's path

# --- Optimisation, both stages ---
CALIBRATION = "means"  # BatchNorm's final statistics in the decoder: of means, or both with samples
BATCH_SIZE = 64  # images per step
WARMUP = 0.05  # fraction of a stage's steps in which the learning rate rises; then a cosine to zero
SEED = 0  # of weights, image order and latent samples

# --- Machine ---
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; auto: 16 bits on CUDA, fp32 elsewhere
GRAPH = True  # on one CUDA device, launch each step as a whole (CUDA graph)

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR = HERE / "outputs"  # folder of metrics.csv, config.json and the pictures
TEACHER_OUTPUTS = None  # a file to keep the teacher's outputs in (370 MB), for runs that share it
SAVE_EVERY = 10  # epochs between numbered checkpoints, which also redraw the pictures
RESUME = False  # continue the run in these folders
OVERWRITE = False  # replace the run in these folders
DEMO = False  # a small run without downloads, in folders demo/, which it replaces

# What each may be: constants and flags are checked alike.
AT_LEAST_0, CHANNELS = number(0, none=0.0), several(whole(1), 4)
KINDS = {
    "DATA": text(), "LIMIT": whole(0, none=0),
    "TEACHER": file_path("train", none=None), "TEACHER_LATENT_DIM": whole(1),
    "TEACHER_CHANNELS": CHANNELS, "TEACHER_EPOCHS": whole(1), "TEACHER_KL_WEIGHT": AT_LEAST_0,
    "TEACHER_LEARNING_RATE": number(0, above=True),
    "LATENT_DIM": whole(1), "ENCODER_CHANNELS": CHANNELS, "DECODER_CHANNELS": CHANNELS,
    "START": file_path(none=None), "EPOCHS": whole(1), "OPTIMIZER": one_of("adam", "muon"),
    "LEARNING_RATE": number(0, above=True),
    "RECONSTRUCTION_WEIGHT": AT_LEAST_0, "KL_WEIGHT": AT_LEAST_0, "KL_SCALE": number(0, above=True),
    "RATE": number(0, above=True, none=None),
    "LATENT_WEIGHT": AT_LEAST_0, "OUTPUT_WEIGHT": AT_LEAST_0, "TEMPERATURE": number(0, above=True),
    "PERCEPTUAL_WEIGHT": AT_LEAST_0, "PERCEPTUAL_SCALE": number(0, above=True),
    "PERCEPTUAL_IMAGES": whole(0, none=0),
    "PROJECTION": one_of(*PROJECTIONS), "VGG": text(none="none"),
    "CALIBRATION": one_of("means", "both"),
    "BATCH_SIZE": whole(2),  # BatchNorm needs two images to have a variance
    "WARMUP": number(0, 1, none=0.0), "SEED": whole(0, 2**32 - 1),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "GRAPH": switch(),
    "CHECKPOINT_DIR": file_path(), "OUTPUT_DIR": file_path(),
    "TEACHER_OUTPUTS": file_path(none=None), "SAVE_EVERY": whole(1), "RESUME": switch(),
    "OVERWRITE": switch(), "DEMO": switch(),
}
# With --demo these replace the constants above; flags still count. The teacher is small, so that it
# learns enough in the time to be better than its student.
DEMO_SETTINGS = {
    "data": "photo-crops", "limit": 9000, "teacher": "train", "teacher_latent_dim": 192,
    "teacher_channels": (24, 48, 96, 192), "teacher_epochs": 12, "teacher_kl_weight": 0.003,
    "epochs": 2, "vgg": "none", "batch_size": 32,
}


# --- Stage 1: the teacher ---


def train_teacher(run):
    """Minimise reconstruction + beta · KL. Returns the teacher and its rows of metrics.csv."""
    s = run.settings
    torch.manual_seed(s.seed)
    teacher = StandardVAE(s.teacher_latent_dim, s.teacher_channels)
    teacher.to(run.device, memory_format=torch.channels_last)
    stage = Stage("teacher", teacher, s.teacher_epochs, "adam", s.teacher_learning_rate, run)
    optimizer = stage.optimizer

    def step():
        images, noise, _ = stage.next_batch()
        with autocast(run.device, run.precision):
            mu, logvar = teacher.encode(images)
            mu, logvar = mu.float(), logvar.float()
            z = teacher.reparameterize(mu, logvar, noise)
            logits = teacher.decode_logits(z).float()
            terms = {
                "reconstruction": reconstruction_loss(torch.sigmoid(logits), images),
                "kl": kl_loss(mu, logvar),
            }
            weighted = {
                "reconstruction": terms["reconstruction"],
                "kl": s.teacher_kl_weight * terms["kl"],
            }
            loss = sum(weighted.values())
        optimizer.backward(loss)
        optimizer.step()
        stage.log(loss, terms, weighted)

    runs.resume(stage, runs.TEACHER_STATE)
    runs.save_teacher(stage)  # before the work: a disk that is too full for it shows now
    step = stage.graphed(step)
    for _ in stage.epochs():
        for _ in stage.steps():
            step()
        stage.validate()
        runs.save_teacher(stage)
    return teacher, stage.rows


# --- Stage 2: the student ---


def distil_student(run, teacher, teacher_rows, vgg, student):
    """Train the student by the weighted terms. Returns that of the best epoch, and all rows.

    Args:
        run: settings, device, images.
        teacher: a frozen StandardVAE, or None where no term needs it.
        teacher_rows: of stage 1, for metrics.csv.
        vgg: VGG16's layers, or None.
        student: to start from, or None for random weights.
    """
    s = run.settings
    targets = teacher_outputs(teacher, run, s.teacher_outputs) if run.needs_teacher else None
    student_mu = None
    if student is not None:
        student.to(run.device, memory_format=torch.channels_last)
        student_mu = encode_means(student, run.images)
    torch.manual_seed(s.seed)
    if student is None:
        student = TinyVAE32(s.latent_dim, s.encoder_channels, s.decoder_channels)
        student.to(run.device, memory_format=torch.channels_last)
    projection = val_mu = None
    if targets and s.latent_weight:
        projection = make_projection(
            s.projection, targets.mu, run.images, student.latent_dim, student_mu
        )
        projection.to(run.device)
        val_mu = targets.val_mu
    if vgg:
        vgg = VGGFeatures(vgg, DTYPES[run.precision]).to(run.device)
    seen = s.perceptual_images // world_size() or None  # of this process's part of a batch
    stage = Stage(
        "student", student, s.epochs, s.optimizer, s.learning_rate, run, projection, val_mu
    )
    optimizer = stage.optimizer

    def step():
        images, noise, index = stage.next_batch()
        with autocast(run.device, run.precision):
            mu, logvar = student.encode(images)
            mu, logvar = mu.float(), logvar.float()
            z = student.reparameterize(mu, logvar, noise)
            # Users decode mu, so output and perceptual terms see what is decoded from it; one pass
            # for both, so that BatchNorm's statistics are of both.
            latents = torch.cat([z, mu]) if s.output_weight or s.perceptual_weight else z
            logits, *logits_of_mean = student.decode_logits(latents).float().split(len(z))

            # A term of weight zero is not computed.
            terms = {
                "reconstruction": s.reconstruction_weight
                and reconstruction_loss(torch.sigmoid(logits), images),
                "kl": s.kl_weight and kl_loss(mu, logvar),
                "latent": s.latent_weight
                and latent_distillation_loss(mu, projection(targets.mu[index])),
                "output": s.output_weight and output(logits_of_mean[0], images, index),
                "perceptual": s.perceptual_weight and perceptual(logits_of_mean[0], images),
            }
            weighted = {
                "reconstruction": s.reconstruction_weight * terms["reconstruction"],
                "kl": s.kl_weight * s.kl_scale * stage.kl_factor * terms["kl"],
                "latent": s.latent_weight * terms["latent"],
                "output": s.output_weight * terms["output"],
                "perceptual": s.perceptual_weight * s.perceptual_scale * terms["perceptual"],
            }
            loss = sum(weighted.values())
        optimizer.backward(loss)
        optimizer.step()
        if projection is not None:
            projection.retract()  # rows orthonormal again, after a step away from it
        if s.rate:
            stage.hold_rate(terms["kl"], s.rate)
        stage.log(loss, terms, weighted)

    def output(logits, images, index):
        if targets is None:
            return reconstruction_loss(torch.sigmoid(logits), images)
        return output_distillation_loss(logits, targets.logits[index], s.temperature)

    def perceptual(logits, images):
        reconstruction = without_grid(torch.sigmoid(logits), images)
        return perceptual_loss(vgg, reconstruction[:seen], images[:seen])

    runs.resume(stage, runs.STUDENT_STATE)
    runs.save_student(stage, teacher, teacher_rows)
    step = stage.graphed(step)
    for _ in stage.epochs():
        for _ in stage.steps():
            step()
        stage.validate()
        runs.save_student(stage, teacher, teacher_rows)
    return runs.best_student(run), teacher_rows + stage.rows


# --- All together ---


def distil(settings, device):
    """Refuse what cannot work, train teacher and student, draw, and report."""
    s = settings
    if s.vgg == "none" or s.perceptual_weight == 0:
        s.vgg, s.perceptual_weight = "none", 0.0
    if s.teacher is None:
        s.latent_weight = 0.0
        if s.teacher_outputs:
            raise InputError("--teacher-outputs keeps a teacher's outputs: add a --teacher")
    if not any(getattr(s, f"{term}_weight") for term in TERMS):
        raise InputError("all five weights are zero: there is nothing to train on")
    if s.rate and not s.kl_weight:
        raise InputError("--rate holds the KL by its weight, which is 0: raise --kl-weight")
    shared = (s.batch_size, s.perceptual_images if s.perceptual_weight else 0)
    if any(count % world_size() for count in shared):
        raise InputError(
            f"{world_size()} processes share each batch evenly: make --batch-size and "
            f"--perceptual-images multiples of {world_size()}"
        )
    refuse_other_file(s.teacher_outputs)
    with runs.begin(s, device) as (run, vgg, student):
        report.print_summary(run)
        start = time.perf_counter()
        teacher, rows = runs.load_teacher(run)
        if teacher is None and run.needs_teacher:
            teacher, rows = train_teacher(run)
            runs.finish_teacher(run, teacher, rows)
        if teacher:
            teacher.eval().requires_grad_(False)
        best, rows = distil_student(run, teacher, rows, vgg, student)
        if not rank():
            report.draw(run, teacher, best, rows, "its best epoch")
            seconds = time.perf_counter() - start
            report.print_results(run, teacher, best, seconds, runs.written_files(run))


def main(argv=None):
    settings = parse_settings(globals(), argv, DEMO_SETTINGS)
    if settings.resume and settings.overwrite:
        raise InputError("--resume keeps what --overwrite removes: give one of them")
    if settings.demo:
        settings.checkpoint_dir /= "demo"
        settings.output_dir /= "demo"
        settings.overwrite = not settings.resume
    device = pick_device(settings.device)
    try:
        with processes(device):
            distil(settings, device)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Every finished epoch is saved: the same command with --resume, without "
            "--overwrite, continues.",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
