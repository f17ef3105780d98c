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

import losses
from comparison import Comparison, shape, shape_name
from metrics import evaluate_vae, sampled_mse, vgg_distance
from models import count_macs, count_parameters, load_model
from runtime import InputError, print_table, run_script
from settings import file_path, number, one_of, parse_settings, several, switch, text, whole
from storage import check_writable, write_csv
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- The stages, one value for each; shapes: encoder's channels, latents, decoder's channels ---
STAGES = ("32-64-128-256_64_256-128-64-32", "16-32-64-128_64_128-64-32-16")  # their students
EPOCHS = (30, 30)  # of each stage
LATENT_WEIGHTS = (0.3, 0.3)  # of the latent term: distance to the code of the stage before
PROJECTIONS = ("pixels", "identity")  # of that code; identity where it has as many latents

# --- Training, with all else as at the top of distill_tinyvae.py ---
TEACHER = "teacher_vae.pth"  # of the first stage: a file in the checkpoint folder, or a path
DATA = None  # as in distill_tinyvae.py; None: what the teacher was trained on
LIMIT = 0  # train on the first N images; 0 uses all
RATE = 87.0  # nats at which all students are compared
VGG = "none"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
SEED = 0  # of weights, image order and latent samples
DIRECT = True  # train the students without stages as well

# --- Measuring ---
SPLIT = "val"  # val while anything is being chosen; test for the final figures
JUDGE = None  # VGG16 that measures VGG distance: the path of other weights than VGG's; or None
JUDGED = 2000  # images that the judge sees; 0: all
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16; figures are measured in fp32 always

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files; students go to progressive/
OUTPUT_DIR = HERE / "outputs"  # folder of progressive.csv

KINDS = {
    "STAGES": several(shape()), "EPOCHS": several(whole(1)),
    "LATENT_WEIGHTS": several(number(0, none=0.0)),
    "PROJECTIONS": several(one_of(*losses.PROJECTIONS)),
    "TEACHER": file_path(), "DATA": text(none=None), "LIMIT": whole(0, none=0),
    "RATE": number(0, above=True), "VGG": text(none="none"), "SEED": whole(0, 2**32 - 1),
    "DIRECT": switch(),
    "SPLIT": one_of("val", "test"), "JUDGE": text(none="none"), "JUDGED": whole(0, none=0),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "CHECKPOINT_DIR": file_path(),
    "OUTPUT_DIR": file_path(),
}
PER_STAGE = ("epochs", "latent_weights", "projections")

COLUMNS = (
    "student", "shape", "parameters", "split", "epochs", "computing", "mse", "sampled_mse",
    "kl_nats", "vgg_distance", "seconds",
)


def measure(comparison, vae):
    """Error of the mean and of a sample, rate, VGG distance, parameters."""
    vae.to(comparison.device)
    found = evaluate_vae(vae, comparison.held_out.images)
    found["sampled_mse"] = sampled_mse(vae, comparison.held_out.images)
    if comparison.judge:
        found["vgg_distance"] = vgg_distance(vae, comparison.judged, comparison.judge)
    return found | {"parameters": count_parameters(vae), "split": comparison.settings.split}


def train(comparison, label, stage_shape, epochs, **changes):
    """A row of the table: a student trained now or earlier. Its checkpoint is row["path"]."""
    s = comparison.settings
    folder = f"{label}_{shape_name(stage_shape)}_{epochs}_epochs".replace(" ", "_").replace(",", "")
    changes |= {"epochs": epochs, "rate": s.rate, "calibration": "both"}
    trained = comparison.train_student(label, folder, s.seed, **stage_shape, **changes)
    path = comparison.folder / folder / "tinyvae_best.pth"
    vae, _ = load_model(path, TinyVAE32)
    row = {"student": label, "shape": shape_name(stage_shape), "epochs": epochs, "path": path}
    row["seconds"] = round(sum(epoch["seconds"] for epoch in trained["rows"]), 1)
    row["computing"] = epochs * count_macs(vae)  # in proportion: training takes thrice the passes
    return row | measure(comparison, vae)


def train_stages(comparison):
    """The stages in turn, each with the one before as its teacher. Yields their rows."""
    s, teacher = comparison.settings, comparison.teacher_path
    for i, stage_shape in enumerate(s.stages):
        kept = "teacher_outputs.pth" if i == 0 else f"stage_{i}_outputs.pth"
        row = train(
            comparison, f"stage {i + 1}", stage_shape, s.epochs[i],
            teacher=teacher, teacher_outputs=comparison.folder / kept,
            latent_weight=s.latent_weights[i], projection=s.projections[i],
        )
        yield row
        teacher = row["path"]


def train_directly(comparison, stages):
    """Students of the last stage's shape without stages: as many steps, or as much computing.
    Yields their rows."""
    s = comparison.settings
    last = stages[-1]
    total = sum(stage["computing"] for stage in stages)
    as_much = round(last["epochs"] * total / last["computing"])
    for budget, epochs in (("same steps", last["epochs"]), ("same computing", as_much)):
        yield train(
            comparison, f"direct, {budget}", s.stages[-1], epochs,
            latent_weight=s.latent_weights[0], projection=s.projections[0],
        )
        yield train(
            comparison, f"no teacher, {budget}", s.stages[-1], epochs,
            teacher=None, teacher_outputs=None,
        )


def table_row(row, last):
    def against(name):
        return "–" if row is last else f"{row[name] / last[name] - 1:+.1%}"

    return {
        "student": row["student"],
        "shape": row["shape"].replace("_", " · "),
        "parameters": f"{row['parameters']:,}",
        "epochs": row["epochs"],
        "minutes": f"{row['seconds'] / 60:.1f}",
        "KL, nats": f"{row['kl_nats']:.1f}",
        "MSE": f"{row['mse']:.5f}",
        "vs last stage": against("mse"),
        "MSE of a sample": f"{row['sampled_mse']:.5f}",
        "vs last stage ": against("sampled_mse"),
        "VGG distance": f"{row['vgg_distance']:.4f}" if "vgg_distance" in row else "–",
    }


def refuse_chain(comparison):
    """Raise InputError where a stage has too few latents for the next, before any is trained."""
    s, latents, name = comparison.settings, comparison.teacher.latent_dim, "the teacher"
    for i, stage_shape in enumerate(s.stages):
        wanted = stage_shape["latent_dim"]
        as_it_is = s.projections[i] == "identity"
        if s.latent_weights[i] and (latents < wanted or (as_it_is and latents != wanted)):
            raise InputError(
                f"{name} has {latents} latents and stage {i + 1} {wanted}: "
                + ("--projections identity takes as many" if as_it_is else "it takes no fewer")
            )
        latents, name = wanted, f"stage {i + 1}"


def distil_in_stages(settings):
    s = settings
    for name in PER_STAGE:
        values = getattr(s, name)
        if len(values) != len(s.stages):
            raise InputError(
                f"--{name.replace('_', '-')} has {len(values)} values for {len(s.stages)} stages: "
                "give one for each"
            )
    comparison = Comparison(settings, "progressive")
    refuse_chain(comparison)
    check_writable(comparison.folder)
    check_writable(s.output_dir)
    chain = " → ".join(["the teacher", *(shape_name(stage_shape) for stage_shape in s.stages)])
    comparison.print_summary(f"{chain}; epochs {s.epochs}, at {s.rate:g} nats, seed {s.seed}")
    csv_path, rows = s.output_dir / "progressive.csv", []

    def keep(row):
        rows.append(row)
        write_csv(csv_path, COLUMNS, rows)

    for row in train_stages(comparison):
        keep(row)
    last = rows[-1]
    if s.direct:
        for row in train_directly(comparison, list(rows)):
            keep(row)
    print()
    print_table([table_row(row, last) for row in rows])
    print(
        "\nMSE: pixels in [0, 1], decoded from mu. same steps: as the last stage's. same "
        "computing: multiply-accumulates × epochs\nas all stages together, without VGG16's and "
        "those of the teacher's training. VGG distance: of --judge."
    )
    print(f"\nWritten:\n  {csv_path}\n  {comparison.folder}/")


def main(argv=None):
    distil_in_stages(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
