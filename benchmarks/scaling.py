"""How many images a second 1, 2, ... processes of torchrun train on.

    python -m benchmarks.scaling                        # a minute on 2 CPU cores
    python -m benchmarks.scaling --processes 1,2,4,8    # on as many GPUs, say

Each row is a run of distill_tinyvae.py: a student without teacher and VGG16. Its processes share
each batch, and on a CPU the threads, so that all do the same work on the same machine. Writes
bench_scaling.csv.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import kind, runtime
from common.settings import parse_settings
from common.storage import check_writable, read_csv, write_csv

HERE = Path(__file__).resolve().parents[1]

# --- What is timed ---
PROCESSES: kind.several(kind.Count) = (1, 2)  # of each run, on one machine
LIMIT: kind.whole(64) = 6400  # images
BATCH_SIZE: kind.whole(2) = 64  # images per step of all processes together
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps

# --- How long ---
EPOCHS: kind.Count = 2  # of each run, of which the last counts

# --- Files ---
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of bench_scaling.csv

# --- Not settings ---
COLUMNS = ("processes", "threads_each", "ms_per_step", "images_per_second", "device", "python",
           "torch", "torchvision", "numpy")


def measure(processes, settings):
    """A row. Raises InputError where the run fails; its own words are on the terminal by then."""
    s = settings
    launcher = [sys.executable]
    if processes > 1:  # after the two dashes come the words of the script
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
        launcher += ["-m", *torchrun]
    threads = max(1, torch.get_num_threads() // processes)  # torchrun would give each one
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *launcher, "distill_tinyvae.py", "--teacher=none", "--vgg=none", "--data=photo-crops",
            f"--limit={s.limit}", f"--batch-size={s.batch_size}", f"--epochs={s.epochs}",
            f"--device={s.device}", f"--checkpoint-dir={folder}", f"--output-dir={folder}",
        ]
        threaded = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=HERE, env=threaded, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise runtime.InputError(f"{processes} processes did not finish, for the reason above")
        *_, last = read_csv(Path(folder, "metrics.csv"))
    milliseconds = float(last["ms_per_step"])
    return {
        "processes": processes, "threads_each": threads, "ms_per_step": milliseconds,
        "images_per_second": 1000 * s.batch_size / milliseconds,
    }


def main(argv=()):
    s = parse_settings(globals(), argv)
    check_writable(s.output_dir)
    device = runtime.describe_device(runtime.pick_device(s.device))
    print(f"{s.limit:,} images, batch {s.batch_size}, {s.epochs} epochs; {device}")
    rows, path = [], s.output_dir / "bench_scaling.csv"
    for processes in runtime.progress_bar(s.processes, desc="timing", unit="run"):
        rows.append(runtime.versions() | {"device": device} | measure(processes, s))
        write_csv(path, COLUMNS, rows)
    print()
    runtime.print_table([
        {
            "processes": row["processes"],
            "threads each": row["threads_each"],
            "ms a step": f"{row['ms_per_step']:.1f}",
            "images/s": f"{row['images_per_second']:,.0f}",
            "times the first": f"{row['images_per_second'] / rows[0]['images_per_second']:.2f}",
        }
        for row in rows
    ])
    print(f"\nSteps of the last epoch, without its validation.\n\nWritten:\n  {path}")


if __name__ == "__main__":
    runtime.run_script(main)
