"""The first run on a GPU, in one command: does it compute what a CPU does, how fast, in how much
memory?

    python -m benchmarks.gpu                 # 5 to 8 minutes, as estimated; needs no download
    python -m benchmarks.gpu --device cpu --limit 640 --epochs 2 --timed defaults    # a trial

First both stages of distill_tinyvae.py take 50 steps on the CPU and on the GPU, in fp32, from the
same weights, images and noise: their losses must agree, epoch by epoch. Then a step is timed, by
default and in variants, and in a plain PyTorch loop (benchmarks/speed.py).

VGG16 has random weights, which cost what trained ones do. Every run is a process of its own. What
fails is reported at the end, and the rest goes on. Writes bench_gpu.json and prints a table.
"""

import contextlib
import io
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import speed
from common import kind, runtime
from common.settings import parse_settings
from common.storage import check_writable, read_csv, write_json

HERE = Path(__file__).resolve().parents[1]
VARIANTS = {  # flags of distill_tinyvae.py
    "defaults": (),
    "fp32": ("--precision=fp32",),
    "compiled": ("--compile",),
    "adam": ("--optimizer=adam",),
    "no vgg": ("--vgg=none",),
    "plain loop": None,
}

# --- Does it compute the same? ---
CHECK: kind.Switch = True  # compare with the CPU
# Of an epoch's loss, relative. Another CPU's instructions make a difference of 0.000003, a learning
# rate that is 1% higher 0.003 or more, bf16 0.0007 or more.
TOLERANCE: kind.Positive = 0.0005

# --- How fast? ---
TIMED: kind.several(kind.one_of(*VARIANTS)) = tuple(VARIANTS)  # variants of a step
LIMIT: kind.CountOr0 = 6400  # images
EPOCHS: kind.whole(2) = 3  # of each stage, of which the last counts

# --- Machine ---
DEVICE: kind.Device = "cuda"  # auto (cuda, then mps, then cpu), cuda, cpu or mps

# --- Files ---
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of bench_gpu.json

# --- Not settings ---
# Of the full recipe, as in distill_tinyvae.py: 45,000 images in batches of 64.
FULL_EPOCHS, EPOCH_STEPS = {"teacher": 20, "student": 100}, 703
CHECKED_IMAGES, CHECKED_EPOCHS = 320, 10  # 5 steps an epoch
CHECKED = {
    "teacher": (f"--teacher-epochs={CHECKED_EPOCHS}", "--epochs=1", "--vgg=none"),
    # From one and the same teacher.
    "student": (f"--teacher={HERE / 'checkpoints' / 'teacher_cifar10.pth'}", "--vgg=random",
                f"--epochs={CHECKED_EPOCHS}"),
}


# --- One run of distill_tinyvae.py ---


def train_with_cpu_noise(*argv):
    """The script in this process, with noise that is drawn on the CPU for any device."""
    import distill_tinyvae

    randn = torch.randn
    torch.randn = lambda *size, device=None, **rest: randn(*size, **rest).to(device or "cpu")
    runtime.prepare_streams()
    distill_tinyvae.main(argv)


SCRIPT = ("distill_tinyvae.py",)
WITH_CPU_NOISE = (
    "-c", "import sys; from benchmarks.gpu import train_with_cpu_noise as t; t(*sys.argv[1:])",
)


def run(program, *flags):
    """SCRIPT or WITH_CPU_NOISE in a process of its own: the rows of metrics.csv, and what it
    printed. Raises InputError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        folders = (f"--checkpoint-dir={folder}", f"--output-dir={folder}")
        command = [sys.executable, *program, "--data=dead-leaves", *flags, *folders]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            raise runtime.InputError(f"{' '.join(flags)}: {speed.error_of(done)}")
        return read_csv(Path(folder, "metrics.csv")), done.stdout


# --- Does it compute the same? ---


def check(stage, device, tolerance):
    """The largest relative difference of an epoch's loss on the device from that on the CPU. Raises
    InputError where it is not below the tolerance."""
    losses = []
    for where in ("cpu", device):
        limit = f"--limit={CHECKED_IMAGES}"
        flags = (f"--device={where}", "--precision=fp32", limit, *CHECKED[stage])
        rows, _ = run(WITH_CPU_NOISE, *flags)
        losses.append([float(row["loss"]) for row in rows if row["stage"] == stage])
    pairs = list(zip(*losses, strict=True))
    is_finite = all(math.isfinite(loss) for pair in pairs for loss in pair)
    difference = max(abs(loss / other - 1) for other, loss in pairs) if is_finite else math.inf
    if difference >= tolerance:
        raise runtime.InputError(
            f"the {stage}'s loss on {device} differs from the CPU's by {difference:.3%}, more than "
            f"{tolerance:.3%}: epoch by epoch {losses[1]}, on the CPU {losses[0]}"
        )
    return difference


# --- How fast? ---


def time_step(variant, device, limit, epochs):
    """A row: ms a step of both stages in the last epoch, and the peak of the device's memory."""
    shared, peak = (f"--device={device}", f"--limit={limit}", f"--epochs={epochs}"), None
    if VARIANTS[variant] is None:
        times = time_loop(*shared)
    else:
        more = ("--vgg=random", *VARIANTS[variant], f"--teacher-epochs={epochs}")
        rows, printed = run(SCRIPT, *shared, *more)
        if "Steps are not compiled" in printed:
            raise runtime.InputError(re.search("Steps are not compiled.*", printed)[0])
        times = {row["stage"]: float(row["ms_per_step"]) for row in rows}
        peak = re.search(r"Peak GPU memory: ([\d.]+) GiB", printed)
    ms = sum(count * EPOCH_STEPS * times[stage] for stage, count in FULL_EPOCHS.items())
    return {"variant": variant, **times, "full_recipe_minutes": ms / 60_000,
            "peak_gib": peak and float(peak[1])}


def time_loop(*flags):
    """ms a step of both stages in a plain loop."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            speed.main([*flags, "--others=loop", "--repeats=1", f"--output-dir={folder}"])
        rows = read_csv(Path(folder, "bench_speed.csv"))
    return {row["stage"]: float(row["ms_per_step"]) for row in rows if row["trainer"] == "loop"}


def main(argv=()):
    s = parse_settings(globals(), argv)
    check_writable(s.output_dir)
    device = runtime.pick_device(s.device)
    result = {"device": runtime.describe_device(device), "limit": s.limit, "epochs": s.epochs,
              "auto_precision": runtime.pick_precision("auto", device)} | runtime.versions()
    print(f"device   {result['device']}, --precision auto is {result['auto_precision']}\n"
          f"images   {s.limit:,} of dead leaves, {s.epochs} epochs of each stage")
    result |= {"largest_difference": {}, "rows": [], "failed": {}}
    jobs = [("check", stage) for stage in CHECKED] * s.check + [("time", what) for what in s.timed]
    path = s.output_dir / "bench_gpu.json"
    for job, what in runtime.progress_bar(jobs, desc="checks and variants", unit="job"):
        try:
            if job == "check":
                result["largest_difference"][what] = check(what, device.type, s.tolerance)
            else:
                result["rows"].append(time_step(what, device.type, s.limit, s.epochs))
        except runtime.InputError as error:
            result["failed"][f"{job} {what}"] = str(error)
        write_json(path, result)
    print_results(result)
    print(f"\nWritten:\n  {path}")
    if result["failed"]:
        raise runtime.InputError("; ".join(f"{job} failed, {text}" for job, text in
                                           result["failed"].items()))


def print_results(result):
    for stage, difference in result["largest_difference"].items():
        print(f"\nThe {stage}'s losses are those of the CPU, to {difference:.4%}", end="")
    if not result["rows"]:
        return
    print("\n")
    runtime.print_table([
        {
            "variant": row["variant"],
            "teacher, ms a step": f"{row['teacher']:.2f}",
            "student, ms a step": f"{row['student']:.2f}",
            "full recipe, minutes": f"{row['full_recipe_minutes']:.1f}",
            "peak, GiB": f"{row['peak_gib']:.2f}" if row["peak_gib"] else "–",
        }
        for row in result["rows"]
    ])
    print("\nFull recipe: the steps of 20 and 100 epochs, without validation, files and pictures."
          f"\nPeak: of the device's memory, {result['limit']:,} images. Plain loop: fp32, Adam.")


if __name__ == "__main__":
    runtime.run_script(main)
