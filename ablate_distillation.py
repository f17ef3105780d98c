"""Does the teacher help? TinyVAE32 with it, without it, and with one thing changed at a time.

    python ablate_distillation.py --vgg PATH --judge PATH        # all variants, three seeds
    python ablate_distillation.py --vgg none --seeds 1 --limit 10000 --epochs 10       # a trial
    python ablate_distillation.py --vgg PATH --judge PATH --split test     # the final figures

Every variant is trained by distill_tinyvae.py, on the same images in the same order for the same
steps, with a few flags changed. `full` is the five-term distillation. `scratch` has no teacher and
no VGG16: reconstruction and KL alone. All are held at the same nats (total KL of an image), since
a lower error at more nats proves nothing; only `no KL` cannot be.

It needs a teacher: distill_tinyvae.py leaves one in checkpoints/. The same command again resumes
where it stopped; another --split measures the students that are trained already. Writes
ablation.csv and ablation.png, and prints a table. On one CPU core in fp32 an epoch of 10,000 images
takes 5 s, and 12 s with VGG16.
"""

import statistics
from pathlib import Path

from common import kind
from common.comparison import FIGURES, Comparison, make_plots, relative_change
from common.metrics import encode_means, evaluate_code
from common.pictures import save_figure
from common.runtime import cell, print_table, run_script
from common.settings import parse_settings
from common.storage import write_csv

HERE = Path(__file__).resolve().parent

# What each variant changes: settings of distill_tinyvae.py.
CHANGES = {
    "full": {},
    # Without what a teacher or VGG16 gives. The KL weight is a start: holding the nats moves it.
    "scratch": {
        "reconstruction_weight": 1, "kl_weight": 0.3, "latent_weight": 0, "output_weight": 0,
        "vgg": "none",
    },
    # The full loss without what the teacher gives: no latent term, and the output term compares
    # with the image. This control says what the teacher is worth.
    "no teacher": {"teacher": None},
    "no reconstruction": {"reconstruction_weight": 0},
    "no KL": {"kl_weight": 0, "rate": None},
    "no latent": {"latent_weight": 0},
    "no output": {"output_weight": 0},
    "no perceptual": {"vgg": "none"},
    "principal projection": {"projection": "principal"},
    "free projection": {"projection": "free"},
}

# --- What is compared ---
DATA: kind.text(none=None) = None  # as in distill_tinyvae.py; None: what the teacher was trained on
LIMIT: kind.CountOr0 = 0  # train on the first N images; 0 uses all
TEACHER: kind.file_path() = "teacher_vae.pth"  # a file in the checkpoint folder, or a path
# VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
VGG: kind.Weights = "imagenet"
# VGG16 that measures VGG distance: the path of other weights than VGG's; or None
JUDGE: kind.Weights = None
# which of CHANGES, separated by commas; full and scratch always run
VARIANTS: kind.several(kind.one_of(*CHANGES)) = tuple(CHANGES)
RATE: kind.Positive = 87.0  # nats at which all are compared

# --- Budget ---
EPOCHS: kind.Count = 100  # epochs of each student
SEEDS: kind.Count = 3  # students per variant, seeds 0, 1, ...

# --- Measuring ---
# val while anything is being chosen; test for the final figures
SPLIT: kind.one_of("val", "test") = "val"
JUDGED: kind.CountOr0 = 2000  # images that the judge sees; 0: all
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
# folder of the teacher; students go to ablation/ in it
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of ablation.csv and ablation.png

# --- Not settings ---

NATS_TOLERANCE = 0.015  # students are compared where their nats differ by no more, as a fraction
MEASURED = (*FIGURES, "cka", "knn_accuracy", "probe_accuracy")
COLUMNS = ("variant", "seed", "split", *MEASURED, "seconds")


def summarise(rows):
    """A row for each variant: the mean over its seeds of each figure, and under "mse spread" and
    the like the sample's standard deviation, where there are several seeds."""
    summary = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        group = [row for row in rows if row["variant"] == variant]
        mean = {"variant": variant}
        for name in MEASURED:
            values = [row[name] for row in group if name in row]
            if values:
                mean[name] = statistics.mean(values)
            if len(values) > 1:
                mean[f"{name} spread"] = statistics.stdev(values)
        summary.append(mean)
    return summary


def against_scratch(row, summary, name):
    """A figure's difference from scratch's, for the table; – where the nats are not the same."""
    scratch = next(other for other in summary if other["variant"] == "scratch")
    is_comparable = abs(row["kl_nats"] / scratch["kl_nats"] - 1) <= NATS_TOLERANCE
    return relative_change(row, scratch, name) if is_comparable else "–"


def table_row(row, summary):
    def with_spread(name, form, scale=1):
        spread = f"{name} spread"
        more = f" ± {cell(row, spread, form, scale)}" if spread in row else ""
        return cell(row, name, form, scale) + more

    return {
        "variant": row["variant"],
        "KL, nats": with_spread("kl_nats", ".1f"),
        "MSE × 1000": with_spread("mse", ".3f", 1000),
        "vs scratch": against_scratch(row, summary, "mse"),
        "MSE of a sample × 1000": with_spread("sampled_mse", ".3f", 1000),
        "vs scratch ": against_scratch(row, summary, "sampled_mse"),
        "VGG distance": with_spread("vgg_distance", ".4f"),
        "vs scratch  ": against_scratch(row, summary, "vgg_distance"),
        "CKA": with_spread("cka", ".3f"),
        "5-NN, %": with_spread("knn_accuracy", ".1f", 100),
        "probe, %": with_spread("probe_accuracy", ".1f", 100),
    }


def draw_variants(path, summary, title):
    """A line for each variant that is held at the same nats: its mean, and its spread over seeds.

    Args:
        path: the PNG to write.
        summary: what `summarise` returns.
        title: data and budget in a few words.
    """
    held = [row for row in reversed(summary) if "rate" not in CHANGES[row["variant"]]]
    figure, plots = make_plots(held, title)
    for ax, name, label in plots:
        for height, row in enumerate(held):
            colour = {"full": "tab:blue", "scratch": "tab:orange"}.get(row["variant"], "tab:grey")
            spread = row.get(f"{name} spread", 0)
            ax.errorbar(row[name], height, xerr=spread, fmt="o", capsize=3, color=colour)
        ax.set_yticks(range(len(held)), [row["variant"] for row in held])
        ax.set_xlabel(label, fontsize=9)
    save_figure(figure, path)


def main(argv=()):
    s = parse_settings(globals(), argv)
    names = [name for name in CHANGES if name in ("full", "scratch", *s.variants)]
    if s.vgg == "none":  # as full
        names = [name for name in names if name != "no perceptual"]
    comparison = Comparison(s, "ablation", split=s.split, judge=s.judge, judged=s.judged)
    comparison.begin(
        f"{s.epochs} epochs at {s.rate:g} nats, seeds 0 to {s.seeds - 1}: {', '.join(names)}"
    )
    teacher_mu = encode_means(comparison.teacher, comparison.held_out.images)
    csv_path, png_path = s.output_dir / "ablation.csv", s.output_dir / "ablation.png"
    title = f"{comparison.data}, {len(comparison.train.images):,} images, {s.epochs} epochs, "
    title += f"{s.rate:g} nats, {s.split} split"
    rows = []
    for name in names:
        for seed in range(s.seeds):
            vae, row = comparison.train_and_measure(
                f"{name}, seed {seed}", f"{name}_seed_{seed}".replace(" ", "_"), seed,
                **{"rate": s.rate} | CHANGES[name],
            )
            code = evaluate_code(vae, comparison.held_out, comparison.train, teacher_mu)
            rows.append({"variant": name, "seed": seed} | row | code)
            write_csv(csv_path, COLUMNS, rows)
            draw_variants(png_path, summarise(rows), title)
    summary = summarise(rows)
    print()
    print_table([table_row(row, summary) for row in summary])
    print(
        f"\nMean ± standard deviation over seeds. vs scratch: – where the nats differ by more "
        f"than {NATS_TOLERANCE:.1%}.\nVGG distance: of the judge's features, on "
        f"{len(comparison.judged):,} images. CKA: with the teacher's mu. 5-NN, probe: class\n"
        "accuracy from mu."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {comparison.folder}/")


if __name__ == "__main__":
    run_script(main)
