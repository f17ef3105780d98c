"""Distil a VAE of 512 latents into TinyVAE32: 64 latents, 294,403 parameters.

    python distill_tinyvae.py --demo      # without downloads or photographs: about a minute
    python distill_tinyvae.py             # CIFAR-10 and ImageNet VGG16, both downloaded (700 MB)
    python distill_tinyvae.py --teacher PATH              # a teacher that is trained already
    python distill_tinyvae.py --teacher none              # the same student without one
    python distill_tinyvae.py --teacher PATH --data none  # without photographs: it makes them all
    python distill_tinyvae.py --resume    # with its other flags: continue a run that stopped
    python distill_tinyvae.py --data PATH --vgg PATH      # your images, your VGG16 weights

Stage 1 trains the teacher for 20 epochs, stage 2 the student for 100, by five terms: two of any
VAE, two from the teacher, and one that compares features of VGG16. With --teacher none there is no
stage 1 and no latent term, and the output term compares with the image.

Edit the settings below, or override one with the flag of the same name. Then test_trained_model.py
measures on the test split. Formulas: common/losses.py; the loop: common/training.py.
"""

import time
from pathlib import Path

import torch

from common import kind, report, runs
from common.data import PIXEL_VALUES
from common.distributed import average, processes, rank, world_size
from common.losses import (
    PROJECTIONS,
    LatentProjection,
    kl_loss,
    latent_distillation_loss,
    make_projection,
    output_distillation_loss,
    perceptual_loss,
    reconstruction_loss,
    without_grid,
)
from common.metrics import encode_means
from common.runtime import pick_device, run_script
from common.settings import parse_settings
from common.teacher_outputs import teacher_outputs
from common.training import Objective, fit
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- Images ---
# cifar10, a folder of images, photo-crops or dead-leaves; None: all are made by the teacher
DATA: kind.text(none=None) = "cifar10"
LIMIT: kind.CountOr0 = 0  # use the first N training images; 0 uses all
TEACHER_IMAGES: kind.Fraction = 0.0  # of the training pictures, made by the teacher
SKIP_UNREADABLE: kind.Switch = False  # go on without images of a folder that cannot be read

# --- Teacher ---
TEACHER: kind.file_path("train", none=None) = "train"  # train one; a trained one's path; or None
TEACHER_LATENT_DIM: kind.Count = 512  # latents, at least as many as the student's
TEACHER_CHANNELS: kind.Channels = (64, 128, 256, 512)  # out of its four encoder stages
TEACHER_EPOCHS: kind.Count = 20  # epochs of stage 1
TEACHER_KL_WEIGHT: kind.AtLeast0 = 0.01  # beta: low, since its error limits what it can teach
TEACHER_LEARNING_RATE: kind.Positive = 1e-3  # Adam's, at the peak

# --- Student ---
LATENT_DIM: kind.Count = 64  # latents
ENCODER_CHANNELS: kind.Channels = (16, 32, 64, 128)  # out of the four encoder stages
DECODER_CHANNELS: kind.Channels = (128, 64, 32, 16)  # into the four decoder stages
START: kind.FileOrNone = None  # a student to start from, with its own shape; None: random weights
EPOCHS: kind.Count = 100  # epochs of stage 2
OPTIMIZER: kind.one_of("adam", "muon") = "muon"  # muon has Adam for what is no matrix
LEARNING_RATE: kind.Positive = 3e-3  # at the peak

# --- The five terms of the student's loss ---
RECONSTRUCTION_WEIGHT: kind.AtLeast0 = 0.3  # squared error of pixels in [0, 1], of a sample
KL_WEIGHT: kind.AtLeast0 = 0.1  # nats per image dimension; lower: more nats, less error
KL_SCALE: kind.Positive = 0.4  # times KL_WEIGHT: ends near the 87 nats quoted for the design
RATE: kind.PositiveOrNone = None  # nats to hold the KL at, by a further factor; None: free
LATENT_WEIGHT: kind.AtLeast0 = 0.3  # squared distance of mu to the teacher's, projected, in nats
OUTPUT_WEIGHT: kind.AtLeast0 = 0.2  # divergence from the teacher's pixels, softened by T
TEMPERATURE: kind.Positive = 3.0  # T; higher: dark and bright pixels weigh more
PERCEPTUAL_WEIGHT: kind.AtLeast0 = 0.1  # squared distance of VGG16 features
PERCEPTUAL_SCALE: kind.Positive = 4.0  # times PERCEPTUAL_WEIGHT: unit features differ by little
PERCEPTUAL_IMAGES: kind.CountOr0 = 6  # of each batch, seen by VGG16; 0: all, far slower
PROJECTION: kind.one_of(*PROJECTIONS) = "pixels"  # of the teacher's mu (common/losses.py)
VGG: kind.Weights = "imagenet"  # downloaded; or random (untrained), none, a state dict's path

# --- Optimisation, both stages ---
CALIBRATION: kind.one_of("means", "both") = "means"  # both: BatchNorm's statistics of samples too
BATCH_SIZE: kind.whole(2) = 64  # images per step
WARMUP: kind.Fraction = 0.05  # of a stage's steps, in which the learning rate rises; then a cosine
SEED: kind.Seed = 0  # of weights, image order and latent samples

# --- Machine ---
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "auto"  # fp32, bf16, fp16; auto: 16 bits on CUDA, fp32 elsewhere
PERCEPTUAL_PRECISION: kind.PerceptualPrecision = "auto"  # VGG16's; auto: that of PRECISION
COMPILE: kind.Switch = False  # torch.compile; on CUDA with CUDA graphs

# --- Files ---
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of metrics.csv, config.json and the pictures
SAVE_EVERY: kind.Count = 10  # epochs between numbered checkpoints, which also redraw the pictures
TENSORBOARD: kind.Switch = False  # metrics and pictures for TensorBoard too, in OUTPUT_DIR
RESUME: kind.Switch = False  # continue the run in these folders
OVERWRITE: kind.Switch = False  # replace the run in these folders
DEMO: kind.Switch = False  # a small run without downloads, in folders demo/, which it replaces

# --- Not settings ---
# Of the controller that holds the KL at --rate: its gain, in e-folds of the KL's weight a stage at
# nats twice too high, and the fraction of the steps before it starts, when nats are still far off.
RATE_GAIN, RATE_START = 40, 0.2
# With --demo these replace the constants above; flags still count.
DEMO_SETTINGS = {
    "data": None, "limit": 9000, "teacher": HERE / "checkpoints" / "teacher_cifar10.pth",
    "epochs": 8, "vgg": "none",
}


# --- Stage 1: the teacher ---


class TeacherObjective(Objective):
    """A beta-VAE's (Higgins et al. 2017): reconstruction + beta · KL.

    Args:
        network: a StandardVAE.
        beta: weight of the KL, with both over the 3,072 values of an image.
    """

    def __init__(self, network, beta):
        super().__init__()
        self.network, self.beta = network, beta

    def forward(self, images, noise):
        """Images, N×3×32×32 in [0, 1], and noise, N×512 → the terms."""
        mu, logvar = (x.float() for x in self.network.encode(images))
        z = self.network.reparameterize(mu, logvar, noise)
        reconstruction = torch.sigmoid(self.network.decode_logits(z).float())
        return {
            "reconstruction": reconstruction_loss(reconstruction, images),
            "kl": kl_loss(mu, logvar),
        }

    def weigh(self, terms):
        return {"reconstruction": terms["reconstruction"], "kl": self.beta * terms["kl"]}


def train_teacher(run):
    """Returns the teacher and its rows of metrics.csv."""
    s = run.settings
    torch.manual_seed(s.seed)
    teacher = StandardVAE(s.teacher_latent_dim, s.teacher_channels)
    teacher.to(run.device, memory_format=torch.channels_last)
    objective = TeacherObjective(teacher, s.teacher_kl_weight)
    resume_from = runs.state_to_resume(run, runs.TEACHER_STATE)
    recipe = s.teacher_epochs, "adam", s.teacher_learning_rate
    for state in fit(objective, run, "teacher", *recipe, resume_from=resume_from):
        runs.save_teacher(run, state)  # the first time before the work: a full disk shows now
    runs.finish_teacher(run, state, teacher)
    return teacher, state["rows"]


# --- Stage 2: the student ---


def term_weights(s):
    """The weights of the student's terms: name → weight, of those in use."""
    weights = {
        "reconstruction": s.reconstruction_weight,
        "kl": s.kl_weight * s.kl_scale,
        "latent": s.latent_weight if s.teacher else 0,
        "output": s.output_weight,
        "perceptual": s.perceptual_weight * s.perceptual_scale if s.vgg != "none" else 0,
    }
    return {name: weight for name, weight in weights.items() if weight}


class StudentObjective(Objective):
    """The five terms.

    Args:
        network: a TinyVAE32.
        weights: those of `term_weights`.
        settings: TEMPERATURE, RATE and PERCEPTUAL_IMAGES of them.
        projection: of the teacher's mu to the student's latents, or None.
        val_teacher_mu: of the held-out images, to watch the projection on.
        vgg: VGGFeatures, or None.
    """

    def __init__(self, network, weights, settings, projection, val_teacher_mu, vgg):
        super().__init__()
        self.network, self.projection, self.vgg = network, projection, vgg
        self.weights, self.val_teacher_mu = weights, val_teacher_mu
        self.temperature, self.target_nats = settings.temperature, settings.rate
        self.perceptual_images = settings.perceptual_images // world_size() or None
        self.register_buffer("kl_factor", torch.ones(()))  # moves where the nats are held

    def forward(self, images, noise, teacher_mu=None, teacher_logits=None):
        """The terms of a batch.

        Args:
            images: N×3×32×32 in [0, 1].
            noise: of the latents, N×64.
            teacher_mu: N×512, and teacher_logits, N×3×32×32, where there is a teacher.
        """
        mu, logvar = (x.float() for x in self.network.encode(images))
        z = self.network.reparameterize(mu, logvar, noise)
        # Users decode mu, so output and perceptual terms see what is decoded from it; one pass for
        # both, so that BatchNorm's statistics are of both.
        decodes_mean = "output" in self.weights or "perceptual" in self.weights
        latents = torch.cat([z, mu]) if decodes_mean else z
        logits, *of_mean = self.network.decode_logits(latents).float().split(len(z))

        terms = {
            "reconstruction": reconstruction_loss(torch.sigmoid(logits), images),
            "kl": kl_loss(mu, logvar),
        }
        if "latent" in self.weights:
            terms["latent"] = latent_distillation_loss(mu, self.projection(teacher_mu))
        if "output" in self.weights and teacher_logits is not None:
            terms["output"] = output_distillation_loss(*of_mean, teacher_logits, self.temperature)
        elif "output" in self.weights:
            terms["output"] = reconstruction_loss(torch.sigmoid(*of_mean), images)
        if "perceptual" in self.weights:
            seen = self.perceptual_images
            reconstruction = without_grid(torch.sigmoid(*of_mean), images)
            terms["perceptual"] = perceptual_loss(self.vgg, reconstruction[:seen], images[:seen])
        return terms

    def weigh(self, terms):
        """name → weight × term."""
        weighted = {name: self.weights.get(name, 0) * term for name, term in terms.items()}
        weighted["kl"] = self.kl_factor * weighted["kl"]
        return weighted

    @torch.no_grad()
    def after_step(self, terms, step, steps):
        if isinstance(self.projection, LatentProjection):
            self.projection.retract()  # rows orthonormal again, after a step away from it
        if self.target_nats and step >= RATE_START * steps:
            # The integral part of the controller of Shao et al. 2020, "ControlVAE",
            # arXiv:2004.05988, on the logarithm of the weight.
            nats = average(terms["kl"].detach()) * PIXEL_VALUES
            excess = (nats / self.target_nats - 1).clamp_max(1)  # a KL is not negative: at least −1
            self.kl_factor *= torch.exp(RATE_GAIN / steps * excess)

    def figures(self):
        """What the projected code of the held-out images varies by: 1 unless it shrinks."""
        if self.projection is None:
            return {}
        with torch.no_grad():
            projected = self.projection(self.val_teacher_mu)
        return {"projected_std": projected.std(0, correction=0).mean().item()}


def distil_student(run, teacher, teacher_rows):
    """Returns the student of the best epoch, and all rows of metrics.csv.

    Args:
        run: settings, device, images, VGG16.
        teacher: a frozen StandardVAE, or None where no term needs it.
        teacher_rows: of stage 1.
    """
    s = run.settings
    outputs = teacher_outputs(teacher, run) if run.needs_teacher else None
    torch.manual_seed(s.seed)
    student = run.student or TinyVAE32(s.latent_dim, s.encoder_channels, s.decoder_channels)
    student.to(run.device, memory_format=torch.channels_last)
    projection = None
    if "latent" in run.weights:
        student_mu = encode_means(student, run.images) if run.student else None
        projection = make_projection(
            s.projection, outputs.mu, run.images, student.latent_dim, student_mu
        )
    objective = StudentObjective(
        student, run.weights, s, projection, outputs and outputs.val_mu, run.vgg
    ).to(run.device)
    targets = (outputs.mu, outputs.logits) if outputs else ()
    resume_from = runs.state_to_resume(run, runs.STUDENT_STATE)
    recipe = s.epochs, s.optimizer, s.learning_rate
    for state in fit(objective, run, "student", *recipe, targets, resume_from):
        runs.save_student(run, state, student, teacher, teacher_rows)
    return runs.best_student(run), teacher_rows + state["rows"]


def distil(settings, device):
    """Refuse what cannot work, train teacher and student, draw, and report."""
    weights = term_weights(settings)
    runs.check_settings(settings, weights)
    run = runs.load(settings, weights, device)
    runs.check(run)
    with runs.prepared(run):
        report.print_summary(run)
        start = time.perf_counter()
        teacher, rows = runs.load_teacher(run)
        if teacher is None and run.needs_teacher:
            teacher, rows = train_teacher(run)
        if teacher:
            teacher.eval().requires_grad_(False)
        student, rows = distil_student(run, teacher, rows)
        if not rank():
            report.draw(run, teacher, student, rows, "its best epoch")
            seconds = time.perf_counter() - start
            report.print_results(run, teacher, student, seconds, runs.written_files(run))


def main(argv=()):
    settings = parse_settings(globals(), argv, DEMO_SETTINGS)
    if settings.demo:
        settings = settings.replace(
            checkpoint_dir=settings.checkpoint_dir / "demo",
            output_dir=settings.output_dir / "demo",
            overwrite=not settings.resume,
        )
    device = pick_device(settings.device)
    with processes(device):
        distil(settings, device)


if __name__ == "__main__":
    run_script(main, "Every finished epoch is saved: --resume, without --overwrite, continues.")
