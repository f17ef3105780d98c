"""Does the teacher help? TinyVAE32 with it, without it, and with one thing changed at a time.

    python ablate_distillation.py --vgg PATH --judge PATH        # all variants, three seeds
    python ablate_distillation.py --vgg none --seeds 1 --limit 10000 --epochs 10       # a trial
    python ablate_distillation.py --vgg PATH --judge PATH --split test     # the final figures

Every variant is the same student trained on the same images in the same order for the same steps,
with the learning rate, batch size and weights at the top of distill_tinyvae.py. `scratch` has no
teacher and no VGG16: reconstruction + KL, its KL weight searched until its rate (total KL on the
validation split) is within 1.5% of the full distillation's, since a lower error at a higher rate
proves nothing.

It needs a teacher: distill_tinyvae.py leaves one in checkpoints/. The same command again goes on
where it stopped, from the last finished epoch; another --split measures the students already
trained. Writes ablation.csv and ablation.png, and prints a table. On 2 CPU cores in fp32 a student
with VGG16 takes 10 to 16 s per epoch of 10,000 images.
"""

import functools
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Split, load_test_images, load_training_images, spread, to_float
from distill_tinyvae import RECIPE, Job, ask_teacher, settings_for, student_stage, train_once
from losses import LatentProjection, PerceptualLoss, load_vgg16
from metrics import (
    EVALUATION_BATCH,
    encode_means,
    evaluate_code,
    evaluate_images,
    evaluate_vae,
    fit_pca,
    gaussian_bound,
    perceptual_distance,
    sampled_mse,
)
from models import find_checkpoint, load_model
from pictures import draw_rate_distortion
from runtime import (
    InputError,
    describe_device,
    parse_flags,
    pick_device,
    pick_precision,
    print_table,
    run,
)
from standard_vae import StandardVAE
from storage import check_writable, fingerprint, save_checkpoint, write_csv
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What is compared ---
DATA = "teacher"  # what the teacher was trained on, or cifar10, dead-leaves, or a folder
LIMIT = 0  # train on the first N images; 0 uses all
TEACHER = "teacher_vae.pth"  # a file in the checkpoint folder, or a path
VGG = "imagenet"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
JUDGE = "none"  # VGG16 that measures perceptual distance: a path, other weights than VGG's; or none
VARIANTS = "all"  # or some of them, separated by commas; full and scratch always run

# --- Budget ---
EPOCHS = 100  # epochs of each student
SEEDS = 3  # students per variant, seeds 0, 1, ...

# --- Measuring ---
SPLIT = "val"  # val while anything is being chosen; test for the final figures
JUDGED = 2000  # images that the judge sees; 0: all
RATE_TOLERANCE = 0.015  # how near scratch's rate must come to full's, as a share
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the teacher; students go to ablation/ in it
OUTPUT_DIR = HERE / "outputs"  # folder of ablation.csv and ablation.png

# The search for the KL weight at which scratch has the full distillation's rate.
FIRST_KL_WEIGHT, SEARCHES = 0.3, 5

SPLITS = {"val": "validation", "test": "test"}
FIGURES = (
    "mse", "sampled_mse", "psnr", "ssim", "perceptual", "kl_nats", "active_dims", "cka",
    "knn_accuracy", "probe_accuracy",
)
COLUMNS = (
    "variant", "seed", "kl_weight", "split", *FIGURES, "val_mse", "val_kl_nats", "projected_std",
    "seconds",
)


# --- The variants ---


def fixed_projection(teacher_mu, latent_dim):
    """The leading principal components, and no learning."""
    return LatentProjection(teacher_mu, latent_dim).requires_grad_(False)


def random_projection(teacher_mu, latent_dim):
    """Starts from random directions of the 128 leading components."""
    projection = LatentProjection(teacher_mu, latent_dim)
    with torch.no_grad():
        nn.init.orthogonal_(projection.rotation.weight)
    return projection


def free_projection(teacher_mu, latent_dim):
    """A plain linear map, learned without constraint from the same start: it may shrink."""
    start = LatentProjection(teacher_mu, latent_dim)
    free = nn.Linear(teacher_mu.shape[1], latent_dim)
    with torch.no_grad():
        weight = start.rotation.weight @ start.whitening
        free.weight.copy_(weight)
        free.bias.copy_(-weight @ start.mean)
    return free


def image_logits(images):
    """The images themselves in place of what the teacher makes of them: is it the teacher that
    helps, or only a second look at the image? Clamped, since black and white have no logit."""
    chunks = images.split(EVALUATION_BATCH)
    return torch.cat([to_float(chunk).clamp(0.02, 0.98).logit().half() for chunk in chunks])


SCRATCH = {
    "reconstruction_weight": 1.0, "latent_weight": 0.0, "output_weight": 0.0,
    "perceptual_weight": 0.0,
}
# What each variant changes: settings of distill_tinyvae.py, or how the projection is made.
CHANGES = {
    "no reconstruction": {"reconstruction_weight": 0.0},
    "no KL": {"kl_weight": 0.0},
    "no latent": {"latent_weight": 0.0},
    "no output": {"output_weight": 0.0},
    "no perceptual": {"perceptual_weight": 0.0},
    "image for teacher's": {"image_targets": True},
    "no fading": {"latent_fade": 0.0},
    "fixed projection": {"make_projection": fixed_projection},
    "random projection": {"make_projection": random_projection},
    "free projection": {"make_projection": free_projection},
}


def chosen_variants(settings):
    """Names from --variants. Raises InputError for one that does not exist."""
    if settings.variants == "all":
        names = list(CHANGES)
    else:
        names = [name.strip() for name in settings.variants.split(",")]
    for name in names:
        if name not in (*CHANGES, "full", "scratch"):
            raise InputError(f"there is no variant {name!r}: choose from {', '.join(CHANGES)}")
    if settings.vgg == "none":
        names = [name for name in names if name != "no perceptual"]
    return [name for name in names if name in CHANGES]


# --- One student ---


class Laboratory:
    """What students that are compared share: images, the teacher and its outputs, VGG16, a judge.

    `settings` has data, limit, teacher, vgg, judge, split, epochs, device, precision and the two
    folders.
    """

    def __init__(self, settings):
        self.settings = settings
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.teacher_path = find_checkpoint(settings.teacher, settings.checkpoint_dir)
        teacher, checkpoint = load_model(self.teacher_path, StandardVAE)
        self.teacher = teacher.to(self.device, memory_format=torch.channels_last)
        self.teacher_record = checkpoint["record"]
        self.teacher_sha256 = fingerprint(teacher)
        data = self.teacher_record["data"] if settings.data == "teacher" else settings.data
        self.images = load_training_images(data, settings.limit)
        self.train_split = Split(self.images.train, self.images.labels).to(self.device)
        if settings.split == "val":
            self.exam = Split(self.images.val, self.images.val_labels).to(self.device)
        else:
            self.exam = load_test_images(data, settings.limit).to(self.device)
        self.vgg, self.vgg_record = load_vgg16(settings.vgg)
        judge, self.judge_record = load_vgg16(settings.judge)
        self.refuse_judge_of(self.vgg_record)
        self.judge = judge and PerceptualLoss(judge).to(
            self.device, memory_format=torch.channels_last
        )
        self.targets = None  # asked for when the first student is trained

    def refuse_judge_of(self, record):
        """Raise InputError if the judge is the VGG16 that a student with this record knows."""
        sha256 = self.judge_record["vgg_sha256"]
        if sha256 and sha256 == record.get("vgg_sha256"):
            raise InputError(
                "--judge holds the weights that the students are trained with, which cannot judge "
                "them: name others, or --judge none"
            )

    @functools.cached_property
    def judged(self):
        return spread(self.exam.images, self.settings.judged)

    @functools.cached_property
    def exam_mu(self):
        return encode_means(self.teacher, self.exam.images)

    def job(self, seed, **changes):
        """The settings of distill_tinyvae.py, some changed: what `student_stage` trains by."""
        own = ("vgg", "limit", "epochs", "checkpoint_dir", "output_dir")
        own = {name: getattr(self.settings, name) for name in own} | {"seed": seed}
        if self.vgg is None:
            own["perceptual_weight"] = 0.0
        settings = settings_for(self.teacher_record, **own | changes)
        job = Job(settings, self.device, self.precision, self.images, self.vgg_record)
        job.record["teacher_sha256"] = self.teacher_sha256
        return job

    def targets_for(self, job, image_targets=False):
        if self.targets is None and job.needs_teacher:
            self.targets = ask_teacher(job, self.teacher)
        if image_targets:
            return self.targets._replace(logits=image_logits(self.train_split.images))
        return self.targets

    def student(
        self, variant, seed, make_projection=LatentProjection, image_targets=False, **changes
    ):
        """One student's row, from the file that holds it, or else trained now."""
        job = self.job(seed, **changes)
        name = f"{variant}, seed {seed}"
        if variant == "scratch":
            name = f"scratch, KL weight {changes['kl_weight']:.4g}, seed {seed}"
        path = self.settings.checkpoint_dir / "ablation" / f"{name.replace(', ', '_')}.pth"

        def make_stage():
            targets = self.targets_for(job, image_targets)
            vgg = self.vgg if job.settings.perceptual_weight else None
            return student_stage(job, targets, vgg, make_projection)

        trained = train_once(job, name, path, (*RECIPE, "teacher_sha256"), make_stage)
        measured = trained.setdefault("measured", {})
        exam = f"{self.settings.split}, judge {self.judge_record['vgg_sha256']}"
        exam += f" on {len(self.judged)}" if self.judge else ""
        if exam not in measured:
            vae = load_model(path, TinyVAE32)[0].to(self.device, memory_format=torch.channels_last)
            measured[exam] = self.measure(vae)
            save_checkpoint(path, trained)
        last = trained["rows"][-1]
        row = {"variant": variant, "seed": seed, "kl_weight": job.settings.kl_weight}
        row |= {"split": self.settings.split} | measured[exam]
        row |= {"val_mse": last["val_mse"], "val_kl_nats": last["kl_nats"]}
        row["projected_std"] = last.get("projected_std")
        row["seconds"] = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
        return row

    def measure(self, vae):
        """The figures of a row, in fp32: errors, rate, perception, and what the code resembles."""
        found = evaluate_vae(vae, self.exam.images, with_ssim=True)
        found.pop("kl_per_latent")
        found["sampled_mse"] = sampled_mse(vae, self.exam.images)
        if self.judge:
            found["perceptual"] = perceptual_distance(vae, self.judged, self.judge)
        return found | evaluate_code(vae, self.exam, self.train_split, self.exam_mu)


# --- All students ---


def match_rate(rate_of, kl_weight, target, tolerance):
    """Search the KL weight at which a student's rate is `target` nats.

    Newton's method on log beta with the slope of a linear VAE whose latents are all active: its
    rate of ½ log(variance / (beta / 2)) per latent falls by half a nat as log beta rises by one
    (Lucas et al. 2019, arXiv:1911.02469). From the second student on, the slope measured.

    Args:
        rate_of: kl_weight → the rate of a student trained with it, nats.
        kl_weight: where to start.
        target: the rate to reach, nats.
        tolerance: how near is near enough, as a share of the target.

    Returns the KL weight, the nearest found if SEARCHES students do not get there.
    """
    slope = -0.5 * TinyVAE32().latent_dim
    tried = []
    for _ in range(SEARCHES):
        tried.append((math.log(kl_weight), rate_of(kl_weight)))
        tried.sort(key=lambda trial: abs(trial[1] - target))
        (log_weight, rate), *others = tried
        if abs(rate / target - 1) <= tolerance:
            break
        if others and others[0][0] != log_weight:
            slope = min(-1.0, (rate - others[0][1]) / (log_weight - others[0][0]))
        step = max(-1.0, min(1.0, (target - rate) / slope))
        kl_weight = float(f"{math.exp(log_weight + step):.4g}")
    return float(f"{math.exp(tried[0][0]):.4g}")


def train_all(laboratory, variants, seeds, report):
    """Every student in turn. `report(rows)` is called after each with all rows so far.

    Returns the rows and the KL weight at which scratch has the full distillation's rate.
    """
    rows = []

    def student(variant, seed, **changes):
        rows.append(laboratory.student(variant, seed, **changes))
        report(rows)
        return rows[-1]

    def scratch(kl_weight, seed=seeds[0]):
        return student("scratch", seed, **SCRATCH | {"kl_weight": kl_weight})["val_kl_nats"]

    target = statistics.mean(student("full", seed)["val_kl_nats"] for seed in seeds)
    tolerance = laboratory.settings.rate_tolerance
    matched = match_rate(scratch, FIRST_KL_WEIGHT, target, tolerance)
    for seed in seeds[1:]:
        scratch(matched, seed)
    for kl_weight in (matched / 2, matched * 2):  # the curve that other rates are held against
        scratch(kl_weight)
    for variant in variants:
        for seed in seeds:
            student(variant, seed, **CHANGES[variant])
    return rows, matched


# --- What came out ---


def summarise(rows):
    """Rows of the same variant and KL weight → one, with (mean, standard deviation) per figure.

    The standard deviation is the sample's, 0 for a single seed.
    """
    groups = {}
    for row in rows:
        groups.setdefault((row["variant"], row["kl_weight"]), []).append(row)
    summary = []
    for (variant, kl_weight), group in groups.items():
        found = {"variant": variant, "kl_weight": kl_weight, "students": len(group)}
        for figure in FIGURES:
            values = [row[figure] for row in group if row.get(figure) is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                found[figure] = (statistics.mean(values), deviation)
        summary.append(found)
    return summary


def against_scratch(found, summary, figure):
    """How far a figure lies from scratch's at the same rate, as a share; None beyond its curve."""
    curve = sorted(
        (other["kl_nats"][0], other[figure][0])
        for other in summary
        if other["variant"] == "scratch" and figure in other
    )
    rates, values = zip(*curve) if curve else ((), ())
    rate = found["kl_nats"][0]
    if not rates or not rates[0] <= rate <= rates[-1] or figure not in found:
        return None
    return found[figure][0] / float(np.interp(rate, rates, values)) - 1


def table_row(found, summary, matched):
    def cell(figure, digits, scale=1):
        if figure not in found:
            return "–"
        mean, deviation = (scale * value for value in found[figure])
        several = found["students"] > 1
        return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if several else "")

    def gain(figure):
        if found["variant"] == "scratch":
            return "–"
        share = against_scratch(found, summary, figure)
        return "–" if share is None else f"{share:+.1%}"

    name = found["variant"]
    if name == "scratch":
        name += f", KL weight {found['kl_weight']:.3g}"
        name += " (same rate)" if found["kl_weight"] == matched else ""
    return {
        "variant": name,
        "KL, nats": cell("kl_nats", 1),
        "MSE × 1000": cell("mse", 3, 1000),
        "vs scratch": gain("mse"),
        "perceptual": cell("perceptual", 4),
        "vs scratch ": gain("perceptual"),
        "CKA": cell("cka", 3),
        "5-NN, %": cell("knn_accuracy", 1, 100),
        "probe, %": cell("probe_accuracy", 1, 100),
    }


def ablate(settings):
    variants = chosen_variants(settings)
    laboratory = Laboratory(settings)
    check_writable(settings.checkpoint_dir / "ablation")
    check_writable(settings.output_dir)
    exam = laboratory.exam
    csv_path, png_path = settings.output_dir / "ablation.csv", settings.output_dir / "ablation.png"
    data = laboratory.images.record["data"]
    title = f"{data}, {laboratory.images.record['train_images']:,} images, {settings.epochs} epochs"
    print(
        f"images   {data}: {len(laboratory.images.train):,} to train on; figures are of "
        f"{len(exam.images):,} of the {SPLITS[settings.split]} split\n"
        f"teacher  {laboratory.teacher_path}, {laboratory.teacher_record['teacher_epochs']} epochs "
        f"on {laboratory.teacher_record['train_images']:,} images\n"
        f"VGG16    {laboratory.vgg_record['vgg_weights']}; judge: "
        f"{laboratory.judge_record['vgg_weights']}\n"
        f"budget   {settings.epochs} epochs, seeds 0 to {settings.seeds - 1}: full, scratch, "
        f"{', '.join(variants) or 'nothing else'}\n"
        f"device   {describe_device(laboratory.device)}, {laboratory.precision}"
    )

    # The floors, fitted to the images that the students see.
    pca = fit_pca(laboratory.train_split.images, TinyVAE32().latent_dim)
    components = len(pca.components)
    errors = np.linspace(0, 0.03, 301)[1:].tolist()
    floors = {
        "PCA": evaluate_images(pca.reconstruct, exam.images)["mse"],
        "bound": gaussian_bound(pca.variances, components, errors),
    }

    def report(rows):
        write_csv(csv_path, COLUMNS, rows)
        draw_rate_distortion(png_path, summarise(rows), floors, title)

    rows, matched = train_all(laboratory, variants, range(settings.seeds), report)
    summary = summarise(rows)
    rates = {
        found["variant"]: found["kl_nats"][0]
        for found in summary
        if found["variant"] == "full" or found["kl_weight"] == matched
    }
    print()
    scratch = [found for found in summary if found["variant"] == "scratch"]
    scratch.sort(key=lambda found: found["kl_nats"])
    others = [found for found in summary if found["variant"] != "scratch"]
    ordered = [others[0], *scratch, *others[1:]]
    print_table([table_row(found, summary, matched) for found in ordered])
    print(
        "\nMean ± standard deviation over seeds. vs scratch: against scratch at the same rate, "
        "between its points on the\nrate–distortion plane. perceptual: distance of VGG16 features "
        f"(judge) on {len(laboratory.judged):,} images. CKA: with the teacher's mu. "
        "5-NN, probe: class accuracy from mu."
    )
    print(
        f"scratch at KL weight {matched:g} has {rates['scratch'] / rates['full'] - 1:+.1%} of "
        "full's rate."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {settings.checkpoint_dir / 'ablation'}/")


def main(argv=None):
    ablate(parse_flags(globals(), argv))


if __name__ == "__main__":
    run(main)
