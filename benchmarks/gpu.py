"""The first run on a GPU, in one command: does it compute what a CPU does, how fast, in how much
memory?

    python -m benchmarks.gpu                 # some 5 minutes; needs no download
    python -m benchmarks.gpu --device cpu    # the same on a CPU: 15 minutes on 2 cores

First both stages of distill_tinyvae.py take 50 steps on the CPU and on the device, in fp32, from
the same weights, images and noise: their losses must agree, epoch by epoch. Then a step is timed,
as it is by default and in other ways, and in a loop written by hand (benchmarks/speed.py).

VGG16 has random weights, which cost what trained ones do. Every run is a process of its own. Writes
bench_gpu.json and prints a table to paste.
"""

import contextlib
import csv
import io
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import speed
from common import kind, runtime
from common.settings import parse_settings
from common.storage import check_writable, write_json

HERE = Path(__file__).resolve().parents[1]
TEACHER = HERE / "checkpoints" / "teacher_cifar10.pth"
WAYS = {  # of taking a step: flags of distill_tinyvae.py
    "defaults": (),
    "fp32": ("--precision=fp32",),
    "compiled": ("--compile",),
    "adam": ("--optimizer=adam",),
    "no vgg": ("--vgg=none",),
    "batch 256": ("--batch-size=256",),
    "loop": None,
}

# --- Does it compute the same? ---
CHECK: kind.Switch = True  # compare with the CPU
# Of an epoch's loss, relative. Another CPU's instructions make a difference of 0.00001, a learning
# rate that is 1% higher 0.001, bf16 0.0016.
TOLERANCE: kind.Positive = 0.0005

# --- How fast? ---
TIMED: kind.several(kind.one_of(*WAYS)) = tuple(WAYS)  # ways to take a step
LIMIT: kind.CountOr0 = 6400  # images
EPOCHS: kind.whole(2) = 3  # of each stage, of which the last counts

# --- Machine ---
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps

# --- Files ---
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of bench_gpu.json

# --- Not settings ---
IMAGES, BATCH_SIZE = 45_000, 64  # of the full recipe
FULL_EPOCHS = {"teacher": 20, "student": 100}
CHECKED_EPOCHS, CHECKED_IMAGES = 10, 356  # with 320 of the images, 5 steps an epoch


# --- One run ---


def train(folder, noise_from, *flags):
    """distill_tinyvae.py, in this process, with noise drawn on the CPU where `noise_from` is "cpu".
    Leaves the device's peak memory, in bytes, beside metrics.csv."""
    import distill_tinyvae

    randn = torch.randn
    if noise_from == "cpu":
        torch.randn = lambda *size, device=None, **rest: randn(*size, **rest).to(device or "cpu")
    distill_tinyvae.main([*flags, f"--checkpoint-dir={folder}", f"--output-dir={folder}"])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    Path(folder, "peak").write_text(str(peak))


def run(noise_from, device, *flags):
    """`train` in a process of its own: the rows of metrics.csv and the peak. Raises InputError if
    it fails."""
    code = "import sys; from benchmarks.gpu import train; train(*sys.argv[1:])"
    flags = ("--data=dead-leaves", f"--device={device}", *flags)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, folder, noise_from, *flags]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            raise runtime.InputError(f"distill_tinyvae.py {' '.join(flags)} failed: {last}")
        with Path(folder, "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file)), int(Path(folder, "peak").read_text())


# --- Does it compute the same? ---


def check(device, tolerance):
    """For each stage, the largest relative difference of an epoch's loss on the device from that on
    the CPU. Raises InputError where it is not below the tolerance."""
    shared = ("--precision=fp32", f"--limit={CHECKED_IMAGES}")
    stages = {
        "teacher": ("--teacher=train", f"--teacher-epochs={CHECKED_EPOCHS}", "--epochs=1"),
        # From one and the same teacher.
        "student": (f"--teacher={TEACHER}", "--vgg=random", f"--epochs={CHECKED_EPOCHS}"),
    }
    stages["teacher"] += ("--vgg=none",)
    differences = {}
    for stage, flags in stages.items():
        losses = []
        for where in ("cpu", device):
            rows, _ = run("cpu", where, *shared, *flags)
            losses.append([float(row["loss"]) for row in rows if row["stage"] == stage])
        differences[stage] = largest_difference(*losses)
        if not differences[stage] < tolerance:  # or it is not a number
            raise runtime.InputError(
                f"the {stage}'s loss on {device} differs from the CPU's by up to "
                f"{differences[stage]:.2%} within {CHECKED_EPOCHS} epochs, more than "
                f"{tolerance:.2%}: {losses[1]}, on the CPU {losses[0]}"
            )
    return differences


def largest_difference(expected, losses):
    """The largest relative one; nan where a loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.nan
    return max(abs(loss / other - 1) for other, loss in zip(expected, losses, strict=True))


# --- How fast? ---


def time_step(way, device, limit, epochs):
    """A row of a way to take a step: ms a step of both stages in the last epoch, and the peak."""
    if WAYS[way] is None:
        times, peak = time_loop(device, limit, epochs), None
    else:
        flags = ("--vgg=random", *WAYS[way], f"--teacher-epochs={epochs}", f"--epochs={epochs}")
        rows, peak = run("device", device, f"--limit={limit}", *flags)
        times = {row["stage"]: float(row["ms_per_step"]) for row in rows}
    steps = IMAGES // (BATCH_SIZE if way != "batch 256" else 256)  # of an epoch
    ms = sum(count * steps * times[stage] for stage, count in FULL_EPOCHS.items())
    return {"way": way, **times, "full_recipe_minutes": ms / 60_000, "peak_bytes": peak}


def time_loop(device, limit, epochs):
    """ms a step of both stages in the loop by hand."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = (f"--limit={limit}", f"--epochs={epochs}", f"--device={device}")
        speed.main([*flags, "--others=loop", "--repeats=1", f"--output-dir={folder}"])
        with Path(folder, "bench_speed.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["trainer"] == "loop"]
    return {row["stage"]: float(row["ms_per_step"]) for row in rows}


def main(argv=()):
    s = parse_settings(globals(), argv)
    check_writable(s.output_dir)
    device = runtime.pick_device(s.device)
    result = {"device": runtime.describe_device(device), "limit": s.limit, "epochs": s.epochs,
              "auto_precision": runtime.pick_precision("auto", device)} | runtime.versions()
    print(f"device   {result['device']}, --precision auto is {result['auto_precision']}\n"
          f"images   {s.limit:,} of dead leaves, {s.epochs} epochs of each stage")
    path = s.output_dir / "bench_gpu.json"
    if s.check:
        result["largest_difference"] = check(device.type, s.tolerance)
        differences = ", ".join(f"{stage} {value:.3%}" for stage, value in
                                result["largest_difference"].items())
        print(f"check    losses as on the CPU over {CHECKED_EPOCHS} epochs, but for: {differences}")
    result["ways"] = []
    for way in runtime.progress_bar(s.timed, desc="timing", unit="way"):
        result["ways"].append(time_step(way, device.type, s.limit, s.epochs))
        write_json(path, result)
    print()
    runtime.print_table([
        {
            "a step": row["way"],
            "teacher, ms": f"{row['teacher']:.2f}",
            "student, ms": f"{row['student']:.2f}",
            "20 + 100 epochs, minutes": f"{row['full_recipe_minutes']:.1f}",
            "peak, MB": f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "–",
        }
        for row in result["ways"]
    ])
    print("\nSteps alone: validation, files and pictures come on top. Peak: of the device's memory."
          f"\nThe loop by hand is fp32, with Adam.\n\nWritten:\n  {path}")


if __name__ == "__main__":
    runtime.run_script(main)
