"""Break runs on purpose, by kills and disk errors at their writes and at random moments.

    python fault_campaign.py --pictures                     # 300 faults, an hour on a CPU core
    python fault_campaign.py --scripts distil --tries 20    # a trial

Each try starts a short run in a fork of this process, breaks it, and starts the same command again
until it ends. Then every file must hold what an undisturbed run writes: weights, optimiser, tables
and pixels of pictures bit for bit, times aside; and no temporary file may be left. After the fault
itself, every file must be readable, and an error must have been told in one sentence. How often
each fault was tried is in docs/reliability.md.

The faults at a write: killed with half of the temporary file written; killed with all of it,
before it is renamed; killed when it is renamed; no space left; an error of the disk as it is
renamed. At a removal: killed after it. And killed at a random moment.

Students that a script trains in processes of their own are trained in the same process here, so
that a fault meets them as well. Prints a table, and ends with exit code 1 if anything was lost.
Needs Linux or macOS, and for --scripts export and prune `pip install -r requirements-deploy.txt`.
"""

import csv
import errno
import functools
import importlib
import io
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import comparison
import report
import runs
from runtime import InputError, import_torchvision, print_table, progress_bar, run_script
from settings import file_path, one_of, parse_settings, several, switch, whole
from storage import check_writable, load_checkpoint, write_bytes

# --- What is broken, and how often ---
SCRIPTS = ("distil", "evaluate", "export", "prune", "ablate", "stages")  # keys of COMMANDS
TRIES = 300  # faults in all, shared between the scripts, distil taking half
SEED = 0  # of which faults and when
PICTURES = False  # draw those of training; else files with a black pixel take their places
TIMEOUT = 120  # seconds a run may take before it counts as hanging

# --- Files ---
FOLDER = None  # a new one for the runs, which stay there; None: a temporary one

KINDS = {
    "SCRIPTS": several(one_of("distil", "evaluate", "export", "prune", "ablate", "stages")),
    "TRIES": whole(1), "SEED": whole(0, 2**32 - 1),
    "PICTURES": switch(), "TIMEOUT": whole(1), "FOLDER": file_path(none=None),
}

# Runs of seconds. Each command is also the one that resumes.
TINY = "--data dead-leaves --limit 70 --device cpu"
SHAPES = "8-12-16-24_64_24-16-12-8,4-8-12-16_64_16-12-8-4"
FOLDERS = "--checkpoint-dir {run}/checkpoints --output-dir {run}/outputs"
STUDENT = f"{TINY} --vgg random --batch-size 32 --teacher-channels 8,12,16,24 --epochs 3"
COMMANDS = {
    "distil": (
        "distill_tinyvae",
        f"{STUDENT} --teacher train --teacher-latent-dim 64 --teacher-epochs 2 --save-every 2 "
        f"--rate 30 --resume {FOLDERS}",
    ),
    "evaluate": (
        "test_trained_model",
        f"{TINY} --student {{source}}/tinyvae_best.pth --teacher {{source}}/teacher_vae.pth "
        f"{FOLDERS}",
    ),
    "export": (
        "export_tinyvae",
        "--data dead-leaves --limit 64 --student {source}/tinyvae_best.pth --int8 "
        "--int8-tolerance 10 --export-dir {run}/export",
    ),
    "prune": (
        "prune_tinyvae",
        f"{TINY} --vgg none --student {{source}}/tinyvae_best.pth --ratios 0.5 --epochs 2 "
        f"{FOLDERS}",
    ),
    "ablate": (
        "ablate_distillation",
        f"{TINY} --vgg none --teacher {{source}}/teacher_vae.pth --epochs 1 --seeds 1 "
        f"--rate-tolerance 1 --variants scratch {FOLDERS}",
    ),
    "stages": (
        "progressive_distillation",
        f"{TINY} --vgg none --teacher {{source}}/teacher_vae.pth --epochs 2,1 --rate 30 --stages "
        f"{SHAPES} {FOLDERS}",
    ),
}
# Figures of time, which no two runs share; and files in which runs keep no result.
TIMES = {"seconds", "ms_per_step", "ms_per_image", "images_per_second", "minutes"}
NOT_COMPARED = {"log.txt", ".lock", ".started"}
MARK = ".fault_campaign"  # a file in folders that are a campaign's own

WRITE, RENAME, REMOVAL = "write", "rename", "removal"
FAULTS = {
    WRITE: ("killed with half of a file written", "killed before a rename", "no space left"),
    RENAME: ("killed after a rename", "an error at a rename"),
    REMOVAL: ("killed after a removal",),
}
ERRORS = ("no space left", "an error at a rename")  # the run ends by itself, in a sentence
AT_RANDOM = "killed at a random moment"


class Lost(Exception):
    """What a fault has cost."""


def must(condition, otherwise):
    if not condition:
        raise Lost(otherwise)


# --- In the process that is to be broken ---


class Files:
    """Counts what this process does to files, and lets one of these events fail.

    Args:
        event: the number of the event that fails; None: none.
        fault: one of FAULTS.
    """

    def __init__(self, event=None, fault=None):
        self.event, self.fault, self.seen = event, fault, []

    def watch(self):
        """From here on, os.fsync, Path.replace and Path.unlink of this process are watched."""
        fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

        def watched_fsync(descriptor):
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and self.is_now(WRITE):
                if self.fault != "killed before a rename":
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                if self.fault == "no space left":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                kill()
            fsync(descriptor)

        def watched_replace(path, target):
            is_now = self.is_now(RENAME)
            if is_now and self.fault == "an error at a rename":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            result = replace(path, target)
            if is_now:
                kill()
            return result

        def watched_unlink(path, missing_ok=False):
            is_now = path.exists() and self.is_now(REMOVAL)
            unlink(path, missing_ok=missing_ok)
            if is_now:
                kill()

        os.fsync, Path.replace, Path.unlink = watched_fsync, watched_replace, watched_unlink

    def is_now(self, kind):
        self.seen.append(kind)
        return self.event == len(self.seen) - 1


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def draw_nothing(run, *_):
    """In place of report.draw."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    for name in report.PICTURES:
        write_bytes(run.output(name), pixel.getvalue())


def in_this_process(command, stdout, is_to_stop):
    """In place of comparison.run_process."""
    module = importlib.import_module(Path(command[1]).stem)
    try:
        module.main([str(word) for word in command[2:]])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- From outside ---


class Campaign:
    """Runs of one script in a folder, broken and resumed.

    Args:
        name: of COMMANDS.
        run: the folder that the script writes into.
        source: the folder of a finished run of `distil`.
        settings: of this script.
    """

    def __init__(self, name, run, source, settings):
        self.name, self.run, self.settings = name, run, settings
        self.log = run.with_name(f"{run.name}.log")
        module, flags = COMMANDS[name]
        self.module = importlib.import_module(module)
        places = {"run": run, "source": source / "checkpoints"}
        self.flags = [flag.format(**places) for flag in flags.split()]

    def start(self, files=None, kill_after=None):
        """Fork, and run the script there. Returns its exit code, -9 if killed, and its events.

        Raises Lost if it hangs.
        """
        events = self.log.with_suffix(".json")
        events.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            os._exit(self.run_here(files or Files(), events))
        start, limit = time.monotonic(), kill_after or self.settings.timeout
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - start > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                must(kill_after, f"it hangs: {self.words()}")
                return -signal.SIGKILL, []
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        return code, json.loads(events.read_text()) if events.exists() else []

    def words(self):
        """The last that the script said."""
        return " / ".join(self.log.read_text().strip().splitlines()[-3:])[-500:]

    def run_here(self, files, events):
        """The script in this process. Returns its exit code."""
        code = 70
        with self.log.open("a") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
            sys.stdout = sys.stderr = log
            try:
                comparison.run_process = in_this_process
                if not self.settings.pictures:
                    report.draw = runs.draw = draw_nothing
                files.watch()
                run_script(lambda: self.module.main(self.flags))
                code = 0
            except SystemExit as end:  # its code is a sentence where the script ends with one
                print(end.code, file=sys.stderr)
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            log.flush()
        if not code:
            events.write_text(json.dumps(files.seen))
        return code

    def reference(self):
        """Run it once, undisturbed: what it writes, its events, and how many seconds it takes."""
        self.clean()
        start = time.monotonic()
        code, events = self.start()
        if code:
            raise InputError(f"{self.name} does not run here: {self.words()}")
        return contents_of(self.run), events, time.monotonic() - start

    def clean(self):
        shutil.rmtree(self.run, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def break_once(self, event, fault, moment, expected):
        """A try: break a run, look at what is left, run to the end, compare.

        Args:
            event, fault: as for Files; None for a kill at a random moment.
            moment: () → seconds until that.
            expected: what the reference wrote.

        Raises Lost where something is lost.
        """
        code = 0
        while not code:  # a kill may come too late
            self.clean()
            if fault == AT_RANDOM:
                code, _ = self.start(kill_after=moment())
            else:
                code, _ = self.start(Files(event, fault))
                must(code, "the fault did not happen")
        if fault in ERRORS:
            printed = self.log.read_text()
            must(code == 1, f"exit code {code}, not 1: {self.words()}")
            must("Traceback" not in printed, f"a traceback: {self.words()}")
            must("error: could not write " in printed, f"another sentence: {self.words()}")
        else:
            must(code == -signal.SIGKILL, f"exit code {code}: {self.words()}")
        contents_of(self.run)  # all readable
        code, _ = self.start()
        must(code == 0, f"exit code {code} when started again: {self.words()}")
        found = contents_of(self.run)
        others = sorted(set(found) ^ set(expected))
        must(not others, f"other files: {others}")
        left = [path.name for path in self.run.rglob("*.tmp")]
        must(not left, f"temporary files are left: {left}")
        for path, content in found.items():
            where = difference(content, expected[path])
            must(where is None, f"{path} differs{where and ' in ' + where}")


# --- Comparing ---


def contents_of(folder):
    """What each file of a run says, apart from temporary ones: path → content.

    Raises Lost for a file that cannot be read.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in NOT_COMPARED or path.suffix == ".tmp":
            continue
        name = str(path.relative_to(folder))
        try:
            found[name] = read(path)
        except Exception as error:
            raise Lost(f"{name} cannot be read: {error}") from error
    return found


def read(path):
    if path.suffix == ".pth":
        return load_checkpoint(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".png":
        with Image.open(path) as image:
            return image.convert("RGB").tobytes()
    return path.read_bytes()


def difference(a, b, where=""):
    """Where two pieces of plain data first differ, tensors bit for bit, figures of time aside;
    None if they do not."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if type(a) is not type(b):
        return where
    if isinstance(a, dict):
        if list(a) != list(b):
            return where
        pairs = [(key, a[key], b[key]) for key in a if key not in TIMES]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return where
        pairs = zip(range(len(a)), a, b)
    else:
        return None if a == b else where
    found = (difference(x, y, f"{where}[{key!r}]") for key, x, y in pairs)
    return next((place for place in found if place is not None), None)


# --- All of them ---


def choose_faults(events, count, chance):
    """Pairs of an event and a fault at it, none twice, and kills at random moments: a quarter, or
    more where there are too few events."""
    faults = [(i, fault) for i, kind in enumerate(events) for fault in FAULTS[kind]]
    chosen = chance.sample(faults, min(len(faults), count - count // 4))
    return chosen + [(None, AT_RANDOM)] * (count - len(chosen))


def run_campaign(settings):
    if not hasattr(os, "fork"):
        raise InputError("this needs fork, which Windows does not have: use Linux or macOS")
    s = settings
    is_used = s.folder and s.folder.exists() and any(s.folder.iterdir())
    if is_used and not (s.folder / MARK).exists():
        raise InputError(f"{s.folder} holds other files, and runs are removed: name a new one")
    torch.set_num_threads(1)  # a process with threads should not be forked
    tqdm.monitor_interval = 0  # another thread
    import_torchvision()  # here, and not in every fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = (s.folder or Path(temporary)).resolve()
        check_writable(folder)
        write_bytes(folder / MARK, b"")
        source = folder / "source"
        Campaign("distil", source, source, s).reference()
        counts, lost = Counter(), []
        chance = random.Random(s.seed)
        others = max(1, len(s.scripts) - 1)
        weights = {name: others if name == "distil" else 1 for name in s.scripts}
        for name in s.scripts:
            campaign = Campaign(name, folder / name, source, s)
            expected, events, seconds = campaign.reference()
            share = s.tries * weights[name] // sum(weights.values())
            chosen = choose_faults(events, max(1, share), chance)
            moment = functools.partial(chance.uniform, 0.01, seconds)
            for event, fault in progress_bar(chosen, desc=name, unit="fault"):
                counts[name, fault, "tries"] += 1
                try:
                    campaign.break_once(event, fault, moment, expected)
                    counts[name, fault, "identical"] += 1
                except Lost as loss:
                    lost.append(f"{name}, event {event}, {fault}: {loss}")
            counts[name, "", "events"] = len(events)
    print()
    print_table([
        {
            "script": COMMANDS[name][0] + ".py",
            "writes, renames, removals": counts[name, "", "events"],
            "fault": fault,
            "tries": counts[name, fault, "tries"],
            "identical in the end": counts[name, fault, "identical"],
        }
        for name in s.scripts
        for fault in (*sum(FAULTS.values(), ()), AT_RANDOM)
        if counts[name, fault, "tries"]
    ])
    tries = sum(count for (*_, what), count in counts.items() if what == "tries")
    print(
        f"\n{tries} faults, seed {s.seed}: {tries - len(lost)} ended identical, {len(lost)} did "
        "not."
    )
    if lost:
        print("\n".join(lost))
        sys.exit(1)


def main(argv=None):
    run_campaign(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
