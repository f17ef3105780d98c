"""How the cost of training grows: with images, batch size, latents and processes.

    python bench_scaling.py                               # 8 minutes on a CPU core
    python bench_scaling.py --images 1000,4000 --batch-sizes 64 --latents 64 --processes 1

Each row is a run of distill_tinyvae.py, a student without teacher and VGG16, in which one thing is
changed: its own time per step and epoch, and the most memory that one of its processes took. The
images are crops of photographs, so nothing is downloaded. Writes bench_scaling.csv and
bench_scaling.png, and prints the table. Needs Linux or macOS.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from comparison import as_flags
from pictures import save_figure
from runtime import InputError, describe_device, pick_device, print_table, progress_bar, run_script
from settings import file_path, one_of, parse_settings, several, whole
from storage import check_writable, write_csv

HERE = Path(__file__).resolve().parent

# --- What is changed, the rest being the first of each ---
IMAGES = (11_250, 45_000, 180_000)  # to train on
BATCH_SIZES = (64, 16, 256, 1024)  # images per step
LATENTS = (64, 16, 256)  # latents
PROCESSES = (1, 2)  # by torchrun, on one machine

# --- How ---
EPOCHS = 2  # of each run, of which the last counts
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16

# --- Files ---
OUTPUT_DIR = HERE / "outputs"  # folder of bench_scaling.csv and bench_scaling.png

KINDS = {
    "IMAGES": several(whole(64)), "BATCH_SIZES": several(whole(2)), "LATENTS": several(whole(1)),
    "PROCESSES": several(whole(1)), "EPOCHS": whole(1),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "OUTPUT_DIR": file_path(),
}

AXES = ("images", "batch_size", "latents", "processes")
COLUMNS = (
    *AXES, "threads", "changed", "ms_per_step", "images_per_second", "epoch_seconds",
    "peak_megabytes",
)


def variants(settings):
    """What each run changes, and all of its values: (changed, {axis: value})."""
    s = settings
    values = dict(zip(AXES, (s.images, s.batch_sizes, s.latents, s.processes)))
    first = {axis: each[0] for axis, each in values.items()}
    yield "", first
    for axis, each in values.items():
        for value in each[1:]:
            yield axis, first | {axis: value}


def measure(settings, values):
    """A row. Raises InputError where the run fails; its own words are on the terminal by then."""
    flags = as_flags({
        "data": "photo-crops", "limit": values["images"], "batch_size": values["batch_size"],
        "latent_dim": values["latents"], "teacher": "none", "vgg": "none", "start": "none",
        "epochs": settings.epochs, "save_every": 1_000_000, "device": settings.device,
        "precision": settings.precision,
    })
    launcher = [sys.executable]
    if values["processes"] > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={values['processes']}", "--"]  # what follows is not its own
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log.txt").open("w") as log:
        folders = ["--checkpoint-dir", folder, "--output-dir", folder]
        command = [*launcher, HERE / "distill_tinyvae.py", *flags, *folders]
        # The same cores for all: torchrun would give each process one thread.
        threads = max(1, torch.get_num_threads() // values["processes"])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(f"a run with {values} did not finish, for the reason above")
        with Path(folder, "metrics.csv").open(newline="") as file:
            last = list(csv.DictReader(file))[-1]
    kilobytes = used.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return values | {
        "threads": threads,
        "ms_per_step": float(last["ms_per_step"]),
        "images_per_second": 1000 * values["batch_size"] / float(last["ms_per_step"]),
        "epoch_seconds": float(last["seconds"]),
        "peak_megabytes": kilobytes / 1000,
    }


def draw_growth(path, rows, title):
    """Memory over images, and images a second over the rest: a panel for each that was changed.

    Args:
        path: the PNG to write.
        rows: those of bench_scaling.csv.
        title: the machine in a few words.
    """
    changed = [axis for axis in AXES if any(row["changed"] == axis for row in rows)] or ["images"]
    figure = Figure(figsize=(4 * len(changed), 3.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for ax, axis in zip(figure.subplots(1, len(changed), squeeze=False)[0], changed):
        measured, label = "images_per_second", "images a second, steps alone"
        if axis == "images":
            measured, label = "peak_megabytes", "peak memory, MB"
        points = sorted((row[axis], row[measured]) for row in rows if row["changed"] in ("", axis))
        ax.plot(*zip(*points), "o-", color="tab:blue")
        ax.set_xscale("log", base=2)
        ax.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel(axis.replace("_", " "), fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    save_figure(figure, path)


def bench_scaling(settings):
    if not hasattr(os, "wait4"):
        raise InputError("this reads memory by wait4, which Windows does not have: use Linux")
    check_writable(settings.output_dir)
    described = describe_device(pick_device(settings.device))
    print(
        f"run      a student without teacher and VGG16, {settings.epochs} epochs, "
        f"{settings.precision}\ndevice   {described}"
    )
    csv_path = settings.output_dir / "bench_scaling.csv"
    png_path = settings.output_dir / "bench_scaling.png"
    rows = []
    for changed, values in progress_bar(list(variants(settings)), desc="timing", unit="run"):
        rows.append({"changed": changed} | measure(settings, values))
        write_csv(csv_path, COLUMNS, rows)
    draw_growth(png_path, rows, described)
    print()
    print_table([
        {
            "changed": row["changed"].replace("_", " ") or "–",
            "images": f"{row['images']:,}",
            "batch": f"{row['batch_size']:,}",
            "latents": row["latents"],
            "processes": row["processes"],
            "threads each": row["threads"],
            "ms a step": f"{row['ms_per_step']:.1f}",
            "images/s": f"{row['images_per_second']:,.0f}",
            "an epoch": f"{row['epoch_seconds']:.1f} s",
            "peak memory": f"{row['peak_megabytes']:,.0f} MB",
        }
        for row in rows
    ])
    print(
        "\nOf the last epoch. images/s: steps alone; an epoch: with BatchNorm's calibration and "
        "the validation. Peak\nmemory: of the largest process."
    )
    print(f"\nWritten:\n  {csv_path}\n  {png_path}")


def main(argv=None):
    bench_scaling(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
