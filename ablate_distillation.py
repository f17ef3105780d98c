"""Does the teacher help? TinyVAE32 with it, without it, and with one thing changed at a time.

    python ablate_distillation.py --vgg PATH --judge PATH        # all variants, three seeds
    python ablate_distillation.py --vgg none --seeds 1 --limit 10000 --epochs 10       # a trial
    python ablate_distillation.py --vgg PATH --judge PATH --split test     # the final figures

Every variant is trained by distill_tinyvae.py, on the same images in the same order for the same
steps, with a few flags changed. `full` is the five-term distillation. `scratch` has no teacher and
no VGG16: reconstruction and KL alone. Its KL weight is searched until its rate (total KL on the
validation split) is within 1.5% of the full distillation's, since a lower error at a higher rate
proves nothing.

It needs a teacher: distill_tinyvae.py leaves one in checkpoints/. The same command again resumes
where it stopped; another --split measures the students that are trained already. Writes
ablation.csv and ablation.png, and prints a table. On one CPU core in fp32 an epoch of 10,000 images
takes 5 s, and 12 s with VGG16.
"""

import hashlib
import json
import math
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from comparison import Comparison
from metrics import (
    evaluate_code,
    evaluate_images,
    evaluate_vae,
    fit_pca,
    gaussian_bound,
    sampled_mse,
    vgg_distance,
)
from models import load_model
from pictures import PANELS, save_figure
from runtime import InputError, print_table, run_script
from settings import file_path, number, one_of, parse_settings, several, text, whole
from storage import check_writable, fingerprint, write_csv, write_json
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What is compared ---
DATA = None  # as in distill_tinyvae.py; None: what the teacher was trained on
LIMIT = 0  # train on the first N images; 0 uses all
TEACHER = "teacher_vae.pth"  # a file in the checkpoint folder, or a path
VGG = "imagenet"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
JUDGE = None  # VGG16 that measures VGG distance: the path of other weights than VGG's; or None
VARIANTS = "all"  # or some of them, separated by commas; full and scratch always run

# --- Budget ---
EPOCHS = 100  # epochs of each student
SEEDS = 3  # students per variant, seeds 0, 1, ...

# --- Measuring ---
SPLIT = "val"  # val while anything is being chosen; test for the final figures
JUDGED = 2000  # images that the judge sees; 0: all
RATE_TOLERANCE = 0.015  # how near scratch's rate must come to full's, as a fraction
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the teacher; students go to ablation/ in it
OUTPUT_DIR = HERE / "outputs"  # folder of ablation.csv and ablation.png

KINDS = {
    "DATA": text(none=None), "LIMIT": whole(0, none=0), "TEACHER": file_path(),
    "VGG": text(none="none"), "JUDGE": text(none="none"), "VARIANTS": several(text()),
    "EPOCHS": whole(1), "SEEDS": whole(1), "SPLIT": one_of("val", "test"),
    "JUDGED": whole(0, none=0),
    "RATE_TOLERANCE": number(0, above=True), "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "CHECKPOINT_DIR": file_path(),
    "OUTPUT_DIR": file_path(),
}

# The search for the KL weight at which scratch has the full distillation's rate.
FIRST_KL_WEIGHT, SEARCHES = 0.3, 5

MEASURED_BY = [HERE / f"{name}.py" for name in ("metrics", "losses", "vae", "vgg", "data")]

COLOURS = [f"C{i}" for i in range(10) if i != 7] + ["k"]  # matplotlib's, without the grey

FIGURES = (
    "mse", "sampled_mse", "psnr", "ssim", "vgg_distance", "kl_nats", "active_dims", "cka",
    "knn_accuracy", "probe_accuracy",
)
COLUMNS = (
    "variant", "seed", "kl_weight", "split", *FIGURES, "val_mse", "val_kl_nats", "projected_std",
    "seconds",
)


# --- The variants ---

SCRATCH = {"reconstruction_weight": 1, "latent_weight": 0, "output_weight": 0, "vgg": "none"}
# What each variant changes: settings of distill_tinyvae.py.
CHANGES = {
    # The full loss without what the teacher gives: no latent term, and the output term compares
    # with the image. This control says what the teacher is worth.
    "no teacher": {"teacher": None, "teacher_outputs": None},
    "no reconstruction": {"reconstruction_weight": 0},
    "no KL": {"kl_weight": 0},
    "no latent": {"latent_weight": 0},
    "no output": {"output_weight": 0},
    "no perceptual": {"vgg": "none"},
    "principal projection": {"projection": "principal"},
    "free projection": {"projection": "free"},
}


def chosen_variants(settings):
    """Names from --variants. Raises InputError for one that does not exist."""
    names = list(CHANGES) if settings.variants == ("all",) else settings.variants
    for name in names:
        if name not in (*CHANGES, "full", "scratch"):
            raise InputError(f"there is no variant {name!r}: choose from {', '.join(CHANGES)}")
    if settings.vgg == "none":
        names = [name for name in names if name != "no perceptual"]
    return [name for name in names if name in CHANGES]


# --- One student ---


def student_row(comparison, variant, seed, **changes):
    """The row of one student, trained now or earlier."""
    label = f"{variant}, seed {seed}"
    if variant == "scratch":
        label = f"scratch, KL weight {changes['kl_weight']:.4g}, seed {seed}"
    folder = label.replace(", ", "_").replace(" ", "_").replace("'", "")
    trained = comparison.train_student(label, folder, seed, **changes)
    last = trained["rows"][-1]
    row = {"variant": variant, "seed": seed, "kl_weight": trained["record"]["kl_weight"]}
    row |= {"split": comparison.settings.split} | measured(comparison, comparison.folder / folder)
    row |= {"val_mse": last["val_mse"], "val_kl_nats": last["kl_nats"]}
    row["projected_std"] = last.get("projected_std")
    row["seconds"] = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
    return row


def measured(comparison, folder):
    """The figures of the student in a folder; those of measured.json where nothing that they depend
    on has changed, the code that measures included."""
    vae, _ = load_model(folder / "tinyvae_last.pth", TinyVAE32)
    code = b"".join(path.read_bytes() for path in MEASURED_BY)
    held_out = comparison.held_out.images.cpu().numpy().tobytes()
    depends_on = {
        "student": fingerprint(vae),
        "teacher": comparison.teacher_sha256,
        "training_pixels": comparison.record["pixels_sha256"],
        "held_out_pixels": hashlib.sha256(held_out).hexdigest()[:16],
        "split": comparison.settings.split,
        "judge": comparison.judge_record["vgg_sha256"],
        "judged": len(comparison.judged) if comparison.judge else 0,
        "code": hashlib.sha256(code).hexdigest()[:16],
    }
    kept = folder / "measured.json"
    try:
        earlier = json.loads(kept.read_text())
        if earlier["depends_on"] == depends_on:
            return earlier["figures"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        print(f"{kept} is damaged: measuring again")
    figures = measure(comparison, vae.to(comparison.device))
    write_json(kept, {"depends_on": depends_on, "figures": figures})
    return figures


def measure(comparison, vae):
    """Error, rate, VGG distance, and what mu is good for, in fp32."""
    held_out = comparison.held_out
    found = evaluate_vae(vae, held_out.images, with_ssim=True)
    found.pop("kl_per_latent")
    found["sampled_mse"] = sampled_mse(vae, held_out.images)
    if comparison.judge:
        found["vgg_distance"] = vgg_distance(vae, comparison.judged, comparison.judge)
    return found | evaluate_code(vae, held_out, comparison.train, comparison.teacher_mu)


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
        tolerance: how near is near enough, as a fraction of the target.

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


def train_all(comparison, variants, seeds, report):
    """Every student in turn. `report(rows)` is called after each with all rows so far.

    Returns the rows and the KL weight at which scratch has the full distillation's rate.
    """
    rows = []

    def student(variant, seed, **changes):
        rows.append(student_row(comparison, variant, seed, **changes))
        report(rows)
        return rows[-1]

    def scratch(kl_weight, seed=seeds[0]):
        return student("scratch", seed, **SCRATCH | {"kl_weight": kl_weight})["val_kl_nats"]

    target = statistics.mean(student("full", seed)["val_kl_nats"] for seed in seeds)
    tolerance = comparison.settings.rate_tolerance
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
    """Relative difference from scratch's figure at the same rate; None beyond its curve."""
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
        difference = against_scratch(found, summary, figure)
        return "–" if difference is None else f"{difference:+.1%}"

    name = found["variant"]
    if name == "scratch":
        name += f", KL weight {found['kl_weight']:.3g}"
        name += " (same rate)" if found["kl_weight"] == matched else ""
    return {
        "variant": name,
        "KL, nats": cell("kl_nats", 1),
        "MSE × 1000": cell("mse", 3, 1000),
        "vs scratch": gain("mse"),
        "VGG distance": cell("vgg_distance", 4),
        "vs scratch ": gain("vgg_distance"),
        "CKA": cell("cka", 3),
        "5-NN, %": cell("knn_accuracy", 1, 100),
        "probe, %": cell("probe_accuracy", 1, 100),
    }


def draw_rate_distortion(path, summary, baselines, title):
    """Rate against distortion, a labelled point for each variant with its spread over seeds.

    Args:
        path: the PNG to write.
        summary: what `summarise` returns.
        baselines: `PCA`, the error of PCA with as many numbers as latents, and `bound`, points
            (distortion, rate) of the Gaussian bound.
        title: the budget in a few words.
    """
    panels = [panel for panel in PANELS if any(panel[0] in found for found in summary)]
    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for ax, (measure, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        shown = [found for found in summary if measure in found]
        scratch = sorted(
            (found["kl_nats"][0], found[measure][0])
            for found in shown
            if found["variant"] == "scratch"
        )
        if scratch:
            ax.plot(*zip(*scratch), color="tab:grey", linewidth=1, label="scratch, other rates")
        colours = {}  # of the variants, scratch in grey
        for found in shown:
            colour = "tab:grey" if found["variant"] == "scratch" else COLOURS[len(colours) % 10]
            colours.setdefault(found["variant"], colour)
            (rate, rate_spread), (value, spread) = found["kl_nats"], found[measure]
            ax.errorbar(
                rate, value, spread, rate_spread, fmt="o", markersize=4,
                color=colours[found["variant"]],
            )
        ax.set_xscale("log")
        left, right = ax.get_xlim()
        bottom, top = ax.get_ylim()
        if measure == "mse":
            ax.axhline(baselines["PCA"], color="k", linewidth=0.8, linestyle=":", label="PCA, 64")
            errors, rates = zip(*baselines["bound"])
            ax.plot(
                rates, errors, color="k", linewidth=0.8, linestyle="--",
                label="Gaussian bound, 64 components (from samples)",
            )
            ax.set_ylim(min(bottom, 0.97 * baselines["PCA"]), top)
        ax.set_xlim(left * 0.95, right * 1.15)
        ax.xaxis.set_major_locator(LogLocator(subs=range(1, 10)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(labelsize=8)
        ax.set_xlabel("rate: KL of an image, nats", fontsize=9)
        ax.set_ylabel(name, fontsize=9)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
        # Of the students from scratch the one of full's rate, which has all seeds, gets a name.
        seeds = max(found["students"] for found in shown)
        points = [
            (found["kl_nats"][0], found[measure][0], found["variant"])
            for found in shown
            if found["variant"] != "scratch" or found["students"] == seeds
        ]
        label_points(ax, points, colours)
    save_figure(figure, path)


def label_points(ax, points, colours):
    """Names in a column at the right, in the order of their points' heights, a line to each: points
    may lie as near each other as they like. `points` are (x, y, name)."""
    points = sorted(points, key=lambda point: point[1])
    low, high = ax.get_ylim()
    for i, (x, y, name) in enumerate(points):
        height = low + (high - low) * (i + 0.5) / len(points)
        colour = colours[name]
        ax.annotate(
            name, (x, y), xytext=(1.03, height), textcoords=("axes fraction", "data"),
            fontsize=8, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )


def ablate(settings):
    variants = chosen_variants(settings)
    comparison = Comparison(settings, "ablation")
    check_writable(comparison.folder)
    check_writable(settings.output_dir)
    csv_path, png_path = settings.output_dir / "ablation.csv", settings.output_dir / "ablation.png"
    title = f"{comparison.data}, {len(comparison.train.images):,} images, {settings.epochs} epochs"
    comparison.print_summary(
        f"{settings.epochs} epochs, seeds 0 to {settings.seeds - 1}: full, scratch, "
        f"{', '.join(variants) or 'nothing else'}"
    )

    # Baselines, fitted to the images that the students are trained on.
    pca = fit_pca(comparison.train.images, TinyVAE32().latent_dim)
    components = len(pca.components)
    errors = np.linspace(0, 0.03, 301)[1:].tolist()
    baselines = {
        "PCA": evaluate_images(pca.reconstruct, comparison.held_out.images)["mse"],
        "bound": gaussian_bound(pca.variances, components, errors),
    }

    def report(rows):
        write_csv(csv_path, COLUMNS, rows)
        draw_rate_distortion(png_path, summarise(rows), baselines, title)

    rows, matched = train_all(comparison, variants, range(settings.seeds), report)
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
        "between its points on the\nrate–distortion plane. VGG distance: of the judge's features, "
        f"on {len(comparison.judged):,} images. CKA: with the teacher's mu. "
        "5-NN, probe: class accuracy from mu."
    )
    print(
        f"scratch at KL weight {matched:g} has {rates['scratch'] / rates['full'] - 1:+.1%} of "
        "full's rate."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {comparison.folder}/")


def main(argv=None):
    ablate(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
