"""Distil in stages: teacher → assistant → student (Mirzadeh et al. 2020, arXiv:1902.03393).

    python progressive_distillation.py                           # two stages of 30 epochs
    python progressive_distillation.py --split test              # the final figures of those
    python progressive_distillation.py --epochs 5,5 --teacher PATH
    python progressive_distillation.py \\
        --stages 32-64-128-256_64_256-128-64-32,16-32-48-48_64_48-48-32-16

Each stage trains a TinyVAE32 by distill_tinyvae.py, with the student of the stage before as its
teacher; the first one's is --teacher. All are held at the same rate. Beside the last stage stand
students of its shape that were trained directly, from the first teacher and without any, for as
many steps as the last stage, and for as much computing as all stages together.

The same command again resumes where it stopped. Writes each stage into a folder of its own in
checkpoints/progressive/, and progressive.csv, and prints a table. One CPU core needs about 25
seconds for an epoch of CIFAR-10 with the default student, and 75 for the assistant.
"""

from pathlib import Path

from common import kind, losses
from common.comparison import FIGURES, Comparison, Shape, relative_change, shape_name
from common.models import count_macs
from common.runtime import InputError, cell, print_table, run_script
from common.settings import parse_settings
from common.storage import write_csv

HERE = Path(__file__).resolve().parent

# --- The stages, one value for each; shapes: encoder's channels, latents, decoder's channels ---
# their students
STAGES: kind.several(Shape) = ("32-64-128-256_64_256-128-64-32", "16-32-64-128_64_128-64-32-16")
EPOCHS: kind.several(kind.whole(1)) = (30, 30)  # of each stage
# of the latent term: distance to the code of the stage before
LATENT_WEIGHTS: kind.several(kind.number(0, none=0.0)) = (0.3, 0.3)
# of that code; identity where it has as many latents
PROJECTIONS: kind.several(kind.one_of(*losses.PROJECTIONS)) = ("pixels", "identity")

# --- Training, with all else as at the top of distill_tinyvae.py ---
# of the first stage: a file in the checkpoint folder, or a path
TEACHER: kind.file_path() = "teacher_vae.pth"
DATA: kind.text(none=None) = None  # as in distill_tinyvae.py; None: what the teacher was trained on
LIMIT: kind.CountOr0 = 0  # train on the first N images; 0 uses all
RATE: kind.Positive = 87.0  # nats at which all students are compared
# VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
VGG: kind.Weights = "none"
SEED: kind.Seed = 0  # of weights, image order and latent samples
DIRECT: kind.Switch = True  # train the students without stages as well

# --- Measuring ---
# val while anything is being chosen; test for the final figures
SPLIT: kind.one_of("val", "test") = "val"
# VGG16 that measures VGG distance: the path of other weights than VGG's; or None
JUDGE: kind.Weights = None
JUDGED: kind.CountOr0 = 2000  # images that the judge sees; 0: all
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
# folder of the .pth files; students go to progressive/
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of progressive.csv

# --- Not settings ---
COLUMNS = (
    "student", "shape", "parameters", "split", "epochs", "computing", *FIGURES, "seconds",
)


def train(comparison, label, shape, epochs, **changes):
    """A row of the table: a student trained now or earlier. Its checkpoint is row["path"]."""
    s, word = comparison.settings, shape_name(shape)
    folder = f"{label}_{word}_{epochs}_epochs".replace(" ", "_").replace(",", "")
    changes |= shape | {"epochs": epochs, "rate": s.rate, "calibration": "both"}
    vae, row = comparison.train_and_measure(label, folder, s.seed, **changes)
    computing = epochs * count_macs(vae)  # in proportion: training takes thrice the passes
    return {"student": label, "shape": word, "epochs": epochs, "computing": computing} | row


def train_all(comparison):
    """Yields the rows of the stages, each with the one before as its teacher; then those of
    students of the last shape without stages, for as many steps, and for as much computing."""
    s, stages, teacher = comparison.settings, [], comparison.teacher_path
    for i, shape in enumerate(s.stages):
        row = train(
            comparison, f"stage {i + 1}", shape, s.epochs[i],
            teacher=teacher, latent_weight=s.latent_weights[i], projection=s.projections[i],
        )
        yield row
        stages.append(row)
        teacher = row["path"]
    if not s.direct:
        return
    computing = sum(row["computing"] for row in stages)
    as_much = round(s.epochs[-1] * computing / stages[-1]["computing"])
    for budget, epochs in (("same steps", s.epochs[-1]), ("same computing", as_much)):
        yield train(
            comparison, f"direct, {budget}", s.stages[-1], epochs,
            latent_weight=s.latent_weights[0], projection=s.projections[0],
        )
        yield train(
            comparison, f"no teacher, {budget}", s.stages[-1], epochs, teacher=None
        )


def table_row(row, last):
    return {
        "student": row["student"],
        "shape": row["shape"].replace("_", " · "),
        "parameters": f"{row['parameters']:,}",
        "epochs": row["epochs"],
        "minutes": f"{row['seconds'] / 60:.1f}",
        "KL, nats": cell(row, "kl_nats", ".1f"),
        "MSE": cell(row, "mse", ".5f"),
        "vs last stage": relative_change(row, last, "mse"),
        "MSE of a sample": cell(row, "sampled_mse", ".5f"),
        "vs last stage ": relative_change(row, last, "sampled_mse"),
        "VGG distance": cell(row, "vgg_distance", ".4f"),
    }


def refuse_chain(settings, teacher):
    """Raise InputError, before any is trained, where a setting has not one value for each stage, or
    a stage has too few latents for the next."""
    s = settings
    for name in ("epochs", "latent_weights", "projections"):
        count = len(getattr(s, name))
        if count != len(s.stages):
            raise InputError(
                f"--{name.replace('_', '-')} has {count} values for {len(s.stages)} stages: give "
                "one for each"
            )
    latents, name = teacher.latent_dim, "the teacher"
    for i, shape in enumerate(s.stages):
        wanted = shape["latent_dim"]
        as_it_is = s.projections[i] == "identity"
        if s.latent_weights[i] and (latents < wanted or (as_it_is and latents != wanted)):
            raise InputError(
                f"{name} has {latents} latents and stage {i + 1} {wanted}: "
                + ("--projections identity takes as many" if as_it_is else "it takes no fewer")
            )
        latents, name = wanted, f"stage {i + 1}"


def main(argv=()):
    s = parse_settings(globals(), argv)
    comparison = Comparison(s, "progressive", split=s.split, judge=s.judge, judged=s.judged)
    refuse_chain(s, comparison.teacher)
    chain = " → ".join(["the teacher", *(shape_name(shape) for shape in s.stages)])
    comparison.begin(f"{chain}; epochs {s.epochs}, at {s.rate:g} nats, seed {s.seed}")
    csv_path, rows = s.output_dir / "progressive.csv", []
    for row in train_all(comparison):
        rows.append(row)
        write_csv(csv_path, COLUMNS, rows)
    last = rows[len(s.stages) - 1]
    print()
    print_table([table_row(row, last) for row in rows])
    print(
        "\nMSE: pixels in [0, 1], decoded from mu. same steps: as the last stage's. same "
        "computing: multiply-accumulates × epochs\nas all stages together, without VGG16's and "
        "those of the teacher's training. VGG distance: of --judge."
    )
    print(f"\nWritten:\n  {csv_path}\n  {comparison.folder}/")


if __name__ == "__main__":
    run_script(main)
