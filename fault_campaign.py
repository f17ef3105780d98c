"""Break runs on purpose: kills and full disks, at every write and at random moments.

    python fault_campaign.py                                # 300 faults, half an hour on a CPU core
    python fault_campaign.py --scripts distil --tries 20    # a trial

Each try starts a short run in a fork of this process, breaks it, and starts the same command again
until it ends. Then every file must be what a run that was left alone has written: weights,
optimiser, rows of tables and pictures bit for bit, seconds aside. After the fault itself, every
file must be readable, and an error must have been told in one sentence. What is in between, and how
often each fault was tried, is in docs/reliability.md.

The faults at a write: killed with half of the temporary file written; killed with all of it,
before it is renamed; killed when it is renamed; no space left; an error of the disk as it is
renamed. At a removal: killed after it. And killed at a random moment.

Students that a script trains in processes of their own are trained in the same process here, so
that a fault strikes them as well. Prints a table, and ends with exit code 1 if anything was lost.
Needs Linux or macOS, and for --scripts export and prune `pip install -r requirements-deploy.txt`.
"""

import csv
import errno
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

import comparison
import report
import runs
from runtime import InputError, import_torchvision, print_table, progress_bar, run_script
from settings import file_path, one_of, parse_settings, several, switch, whole
from storage import load_checkpoint, write_bytes

# --- What is broken, and how often ---
SCRIPTS = ("distil", "evaluate", "export", "prune", "ablate", "stages")  # keys of COMMANDS
TRIES = 300  # faults in all, shared between the scripts, distil taking half
SEED = 0  # of which faults and when
PICTURES = False  # draw those of training; else files with a black pixel take their places
PATIENCE = 120  # seconds a run may take before it counts as hanging

# --- Files ---
FOLDER = None  # for the runs, which stay; None: a temporary one

KINDS = {
    "SCRIPTS": several(one_of("distil", "evaluate", "export", "prune", "ablate", "stages")),
    "TRIES": whole(1), "SEED": whole(0, 2**32 - 1),
    "PICTURES": switch(), "PATIENCE": whole(1), "FOLDER": file_path(none=None),
}

# Runs of seconds. Each command is also the one that resumes.
TINY = "--data dead-leaves --limit 64 --device cpu"
SHAPES = "8-12-16-24_64_24-16-12-8,4-8-12-16_64_16-12-8-4"
STUDENT = f"{TINY} --vgg random --batch-size 32 --teacher-channels 8,12,16,24 --epochs 3"
COMMANDS = {
    "distil": (
        "distill_tinyvae",
        f"{STUDENT} --teacher train --teacher-latent-dim 64 --teacher-epochs 2 --save-every 2 "
        "--perceptual-start 0.4 --rate 30 --resume {folders}",
    ),
    "evaluate": (
        "test_trained_model",
        f"{TINY} --student {{source}}/tinyvae_best.pth --teacher {{source}}/teacher_vae.pth "
        "{folders}",
    ),
    "export": (
        "export_tinyvae",
        "--data dead-leaves --limit 64 --student {source}/tinyvae_best.pth --int8 "
        "--int8-tolerance 10 --export-dir {run}/export",
    ),
    "prune": (
        "prune_tinyvae",
        f"{TINY} --vgg none --student {{source}}/tinyvae_best.pth --ratios 0.5 --epochs 2 "
        "{folders}",
    ),
    "ablate": (
        "ablate_distillation",
        f"{TINY} --vgg none --teacher {{source}}/teacher_vae.pth --epochs 1 --seeds 1 "
        "--rate-tolerance 1 --variants scratch {folders}",
    ),
    "stages": (
        "progressive_distillation",
        f"{TINY} --vgg none --teacher {{source}}/teacher_vae.pth --epochs 2,1 --rate 30 --stages "
        f"{SHAPES} {{folders}}",
    ),
}
# Figures of time, which no two runs share; and files in which runs keep no result.
TIMES = {"seconds", "ms_per_step", "ms_per_image", "images_per_second", "minutes"}
NOT_COMPARED = {"log.txt", ".lock", ".started"}

WRITE, RENAME, REMOVAL = "write", "rename", "removal"
STRIKES = {
    WRITE: ("killed with half of a file written", "killed before a rename", "no space left"),
    RENAME: ("killed after a rename", "an error at a rename"),
    REMOVAL: ("killed after a removal",),
}
AT_RANDOM = "killed at a random moment"


# --- In the process that is to be broken ---


class Files:
    """Counts what this process does to files, and strikes at one of these events.

    Args:
        event: the number of the event to strike at; None: none.
        strike: one of STRIKES.
    """

    def __init__(self, event=None, strike=None):
        self.event, self.strike, self.seen = event, strike, []

    def watch(self):
        """From here on, os.fsync, Path.replace and Path.unlink of this process are watched."""
        fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

        def watched_fsync(descriptor):
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and self.is_now(WRITE):
                if self.strike != "killed before a rename":
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                if self.strike == "no space left":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                kill()
            fsync(descriptor)

        def watched_replace(path, target):
            is_now = self.is_now(RENAME)
            if is_now and self.strike == "an error at a rename":
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
        folder: for this script's runs; `source` beside it holds a finished run of `distil`.
        settings: of this script.
    """

    def __init__(self, name, folder, settings):
        self.name, self.patience = name, settings.patience
        self.pictures = settings.pictures
        self.run, self.log = folder / "run", folder / "log.txt"
        module, flags = COMMANDS[name]
        self.module = importlib.import_module(module)
        folders = f"--checkpoint-dir={self.run}/checkpoints --output-dir={self.run}/outputs"
        source = folder.parent / "source" / "checkpoints"
        self.flags = flags.format(run=self.run, source=source, folders=folders).split()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, files=None, kill_after=None):
        """Fork, and run the script there. Returns its exit code, -9 if killed, and its events.

        Raises AssertionError if it hangs.
        """
        events = self.log.with_name("events.json")
        events.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            os._exit(self.run_here(files or Files(), events))
        start = time.monotonic()
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            waited = time.monotonic() - start
            if waited > (kill_after or self.patience):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                assert kill_after, f"it hangs: {self.log}"
                return -signal.SIGKILL, []
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        return code, json.loads(events.read_text()) if events.exists() else []

    def run_here(self, files, events):
        """The script in this process. Returns its exit code."""
        code = 70
        with self.log.open("a") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
            sys.stdout = sys.stderr = log
            try:
                comparison.run_process = in_this_process
                if not self.pictures:
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
        """Run it once, left alone: what it writes, how often, and in how many seconds."""
        start = time.monotonic()
        self.clean()
        code, events = self.start()
        if code:
            raise InputError(f"{self.name} does not run here: see {self.log}")
        return contents_of(self.run), events, time.monotonic() - start

    def clean(self):
        shutil.rmtree(self.run, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def break_once(self, event, strike, moment, expected):
        """A try: break a run, look at what is left, run to the end, compare.

        Args:
            event, strike: as for Files; None for a kill at a random moment.
            moment: seconds until that.
            expected: what the reference wrote.

        Raises AssertionError where something is lost.
        """
        self.clean()
        if strike == AT_RANDOM:
            code, _ = self.start(kill_after=moment)
        else:
            code, _ = self.start(Files(event, strike))
        if strike in ("no space left", "an error at a rename"):
            printed = self.log.read_text()
            assert code == 1, f"exit code {code}, not 1"
            assert "Traceback" not in printed, "a traceback"
            assert "error: could not write " in printed, f"no word of it in {self.log}"
        else:
            assert code == -signal.SIGKILL or strike == AT_RANDOM, f"not killed: {code}"
        contents_of(self.run)  # all readable
        code, _ = self.start()
        assert code == 0, f"exit code {code} when started again: {self.log}"
        found = contents_of(self.run)
        assert list(found) == list(expected), (
            f"other files: {sorted(set(found) ^ set(expected))}"
        )
        for path, content in found.items():
            where = difference(content, expected[path])
            assert where is None, f"{path} differs{where and ' in ' + where}"


# --- Comparing ---


def contents_of(folder):
    """What each file of a run says, apart from temporary ones: path → content.

    Raises AssertionError for a file that cannot be read.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in NOT_COMPARED or path.suffix == ".tmp":
            continue
        name = str(path.relative_to(folder))
        try:
            found[name] = read(path)
        except Exception as error:
            raise AssertionError(f"{name} cannot be read: {error}") from error
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


def possible_faults(events):
    return [(i, strike) for i, kind in enumerate(events) for strike in STRIKES[kind]]


def run_campaign(settings):
    if not hasattr(os, "fork"):
        raise InputError("this needs fork, which Windows does not have: use Linux or macOS")
    s = settings
    torch.set_num_threads(1)  # a process with threads should not be forked
    import_torchvision()  # here, and not in every fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = s.folder or Path(temporary)
        source = Campaign("distil", folder, s)
        source.run = folder / "source"
        source.flags = [flag.replace(f"{folder}/run/", f"{source.run}/") for flag in source.flags]
        source.reference()
        counts, failures = Counter(), []
        chance = random.Random(s.seed)
        for name in s.scripts:
            campaign = Campaign(name, folder / name, s)
            expected, events, seconds = campaign.reference()
            others = len(s.scripts) - 1
            share = s.tries if not others else s.tries // 2
            if name != "distil":
                has_distil = "distil" in s.scripts
                share = s.tries // (2 * others) if has_distil else s.tries // len(s.scripts)
            faults = possible_faults(events)
            at_random = share // 4
            chosen = chance.sample(faults, min(len(faults), share - at_random))
            chosen += [(None, AT_RANDOM)] * (share - len(chosen))
            for event, strike in progress_bar(chosen, desc=name, unit="fault"):
                moment = chance.uniform(0.01, seconds)
                outcome = "identical"
                try:
                    campaign.break_once(event, strike, moment, expected)
                except AssertionError as error:
                    outcome = "LOST"
                    failures.append(f"{name}, event {event}, {strike}, {moment:.2f} s: {error}")
                counts[name, strike, outcome] += 1
            counts[name, "", "writes"] = len(events)
    print()
    print_table([
        {
            "script": COMMANDS[name][0] + ".py",
            "writes, renames, removals": counts[name, "", "writes"],
            "fault": strike,
            "tries": sum(counts[name, strike, outcome] for outcome in ("identical", "LOST")),
            "identical in the end": counts[name, strike, "identical"],
        }
        for name in s.scripts
        for strike in (*sum(STRIKES.values(), ()), AT_RANDOM)
        if any(counts[name, strike, outcome] for outcome in ("identical", "LOST"))
    ])
    lost = len(failures)
    total = sum(n for (_, strike, _), n in counts.items() if strike)
    print(f"\n{total} faults, seed {s.seed}: {total - lost} ended identical, {lost} did not.")
    if failures:
        print("\n".join(failures))
        sys.exit(1)


def main(argv=None):
    run_campaign(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
