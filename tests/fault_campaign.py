"""Break runs on purpose, by kills and disk errors at their writes and at random moments.

    python -m tests.fault_campaign                               # 120 faults
    python -m tests.fault_campaign --scripts distil --tries 10   # a trial

Each try starts a short run in a fork of this process, breaks it, and starts the same command again.
In the end every file must hold what an undisturbed run writes, bit for bit, times aside, and no
temporary file may be left. After the fault itself, every file must be readable, and an error must
have been told in one sentence (docs/reliability.md). Prints a table, and ends with exit code 1 if
anything was lost. Needs Linux or macOS, and for export and prune requirements-dev.txt.

Students that a script trains in processes of their own are trained in the same process here, so
that a fault meets them too; and nothing is drawn in training, which would take longer.
"""

import errno
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common import comparison, kind, report
from common.runtime import (
    InputError,
    import_torchvision,
    print_table,
    progress_bar,
    require,
    run_script,
)
from common.settings import parse_settings
from common.storage import load_checkpoint, read_csv, write_bytes

# Runs of seconds. Each command is also the one that resumes.
TINY = "--data dead-leaves --limit 70 --device cpu"
STUDENT, TEACHER = "--student {source}/tinyvae_best.pth", "--teacher {source}/teacher_vae.pth"
FOLDERS = "--checkpoint-dir {run}/checkpoints --output-dir {run}/outputs"
COMMANDS = {
    "distil": f"distill_tinyvae {TINY} --vgg random --batch-size 32 --teacher train "
    "--teacher-channels 8,12,16,24 --teacher-latent-dim 64 --teacher-epochs 2 --epochs 3 "
    f"--save-every 2 --rate 30 --resume {FOLDERS}",
    "evaluate": f"test_trained_model {TINY} {STUDENT} {TEACHER} {FOLDERS}",
    "export": f"export_tinyvae --data dead-leaves --limit 64 {STUDENT} --int8 --int8-tolerance 10 "
    "--export-dir {run}/export",
    "prune": f"prune_tinyvae {TINY} --vgg none {STUDENT} --ratios 0.5 --epochs 2 {FOLDERS}",
    "ablate": f"ablate_distillation {TINY} --vgg none {TEACHER} --epochs 1 --seeds 1 "
    f"--variants scratch {FOLDERS}",
    "stages": f"progressive_distillation {TINY} --vgg none {TEACHER} --epochs 2,1 --rate 30 "
    f"--stages 8-12-16-24_64_24-16-12-8,4-8-12-16_64_16-12-8-4 {FOLDERS}",
}

# --- What is broken, and how often ---
SCRIPTS: kind.several(kind.one_of(*COMMANDS)) = tuple(COMMANDS)  # whose runs are broken
TRIES: kind.Count = 20  # faults for each
SEED: kind.Seed = 0  # of which faults and when

# --- Not settings ---
LIMIT = 120  # seconds until a run that hangs is killed
# What no two runs share, and files in which they keep no result.
TIMES = {"seconds", "ms_per_step", "ms_per_image", "images_per_second", "minutes"}
NOT_COMPARED = {"log.txt", ".events", ".lock", ".started"}

FAULTS = {  # what a process does to a file → how that is broken
    "write": ("killed with half of a file written", "killed before a rename", "no space left"),
    "rename": ("killed after a rename", "an error at a rename"),
    "removal": ("killed after a removal",),
}
ERRORS, AT_RANDOM = ("no space left", "an error at a rename"), "killed at a random moment"


# --- In the process that is to be broken ---


def watch_files(broken=None, fault=None):
    """From here on, what this process does to files is added to the list that this returns, as a
    key of FAULTS, and the event of the number `broken` is broken by a fault of FAULTS."""
    events, fsync = [], os.fsync

    def is_now(event):
        events.append(event)
        return len(events) - 1 == broken

    def watched_fsync(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and is_now("write"):
            if fault != "killed before a rename":
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            if fault == "no space left":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def watched(event, function):
        def watched_function(path, *arguments, **options):
            is_broken = path.exists() and is_now(event)
            if is_broken and fault == "an error at a rename":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            function(path, *arguments, **options)
            if is_broken:
                os.kill(os.getpid(), signal.SIGKILL)

        return watched_function

    os.fsync = watched_fsync
    Path.replace, Path.unlink = watched("rename", Path.replace), watched("removal", Path.unlink)
    return events


def draw_nothing(run, *_):
    """In place of report.draw."""
    for name in report.PICTURES:
        write_bytes(run.output(name), b"a picture")


def in_this_process(command, stdout):
    """In place of comparison.run_process."""
    try:
        importlib.import_module(Path(command[1]).stem).main([str(word) for word in command[2:]])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- From outside ---


class Campaign:
    """Runs of one script of COMMANDS in a folder, with the networks of a finished run of `distil`.
    The first is undisturbed: what it wrote, its events, how many seconds it took."""

    def __init__(self, name, run, networks):
        self.run, self.log, self.events_file = run, run / "log.txt", run / ".events"
        module, *flags = COMMANDS[name].split()
        self.module = importlib.import_module(module)
        self.flags = [flag.format(run=run, source=networks) for flag in flags]
        start = time.monotonic()
        if self.start():
            raise InputError(f"{module} does not run here: {self.words()}")
        self.seconds = time.monotonic() - start
        self.expected = contents_of(run)
        self.events = json.loads(self.events_file.read_text())

    def start(self, *fault, seconds=LIMIT, anew=True):
        """Run the script in a fork, at most so long. Returns its exit code, -9 if killed."""
        if anew:
            shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=self.run_here, args=fault)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    def run_here(self, *fault):
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        comparison.run_process = in_this_process
        report.draw = draw_nothing
        events = watch_files(*fault)
        run_script(lambda argv: self.module.main(self.flags))
        self.events_file.write_text(json.dumps(events))

    def words(self):
        """The last that the script said."""
        return " / ".join(self.log.read_text().strip().splitlines()[-3:])[-500:]

    def choose(self, count, chance):
        """Faults, none twice: the event's number, what happens, no time; and kills at random
        moments, a quarter or more: no event, AT_RANDOM, seconds."""
        events = enumerate(self.events)
        faults = [(i, fault, None) for i, event in events for fault in FAULTS[event]]
        chosen = chance.sample(faults, min(len(faults), count - count // 4))
        moments = [chance.uniform(0.01, self.seconds) for _ in range(count - len(chosen))]
        return chosen + [(None, AT_RANDOM, moment) for moment in moments]

    def break_once(self, event, fault, seconds):
        """A try: break a run, look at what is left, run to the end, compare. Raises AssertionError
        where something is lost."""
        code = self.start(event, fault, seconds=seconds or LIMIT)
        if fault in ERRORS:
            printed = self.log.read_text()
            assert code == 1 and "error: could not write " in printed, self.words()
            assert "Traceback" not in printed, self.words()
        else:  # at a random moment it may have ended already
            assert code == -signal.SIGKILL or (fault == AT_RANDOM and not code), self.words()
        contents_of(self.run)  # all readable
        assert not self.start(anew=False), f"when started again: {self.words()}"
        assert not list(self.run.rglob("*.tmp")), "temporary files are left"
        after, before = contents_of(self.run), self.expected
        names = {name for name in before | after if before.get(name) != after.get(name)}
        assert not names, f"missing, new or with other contents: {sorted(names)}"


READERS = {
    ".pth": load_checkpoint,
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": read_csv,
}


def contents_of(folder):
    """What each file of a run says, times aside: path → plain data to compare. Raises
    AssertionError for a file that cannot be read."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in NOT_COMPARED and path.suffix != ".tmp":
            read = READERS.get(path.suffix, Path.read_bytes)
            try:
                contents[str(path.relative_to(folder))] = without_times(read(path))
            except Exception as error:
                raise AssertionError(f"{path.name} cannot be read: {error}") from error
    return contents


def without_times(data):
    """Plain data in a form in which == compares the bits of tensors, and order."""
    if isinstance(data, torch.Tensor):
        return str(data.dtype), tuple(data.shape), data.numpy().tobytes()
    if isinstance(data, dict):
        return [(key, without_times(data[key])) for key in data if key not in TIMES]
    if isinstance(data, (list, tuple)):
        return [without_times(part) for part in data]
    return data


def main(argv=()):
    s = parse_settings(globals(), argv)
    torch.set_num_threads(1)  # a process with threads should not be forked
    tqdm.monitor_interval = 0  # another thread
    import_torchvision()  # here, and not in every fork
    require("matplotlib.figure")  # which may write a cache
    chance, tries, lost = random.Random(s.seed), Counter(), []
    with tempfile.TemporaryDirectory(prefix="a campaign ") as temporary:
        folder = Path(temporary).resolve()
        Campaign("distil", folder / "source", None)
        for name in s.scripts:
            campaign = Campaign(name, folder / name, folder / "source" / "checkpoints")
            for event, fault, seconds in progress_bar(campaign.choose(s.tries, chance), desc=name):
                tries[name, fault] += 1
                try:
                    campaign.break_once(event, fault, seconds)
                except AssertionError as loss:
                    lost.append(f"{name}, event {event}, {fault}: {loss}")
    print()
    print_table([{"script": key[0], "fault": key[1], "tries": tries[key]} for key in tries])
    same = tries.total() - len(lost)
    print(f"\n{tries.total()} faults, seed {s.seed}: {same} ended identical, {len(lost)} did not.")
    if lost:
        sys.exit("\n".join(lost))


if __name__ == "__main__":
    run_script(main)
