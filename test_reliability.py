"""Faults on purpose: the short form of fault_campaign.py and what it rests on; memory, output,
locale and folders that fail."""

import errno
import itertools
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm.std
from PIL import Image

import data
import fault_campaign
import models
import runtime
import storage
import training
import vgg
from runtime import InputError
from testing import HERE, TINY, assert_same_run, folders, on_posix, start, train

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.parametrize(("script", "tries"), [("distil", 12), ("stages", 3)])
def test_whatever_breaks_a_run_it_ends_the_same(tmp_path, script, tries):
    done = subprocess.run(  # in a process without threads, which forks
        [
            sys.executable, HERE / "fault_campaign.py", "--scripts", script, "--tries", str(tries),
            "--folder", tmp_path / "a folder",
        ],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tries} faults, seed 0: {tries} ended identical, 0 did not." in done.stdout


def test_a_file_is_on_the_disk_before_the_old_one_is_gone(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        found = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(found.st_mode)
        done.append("folder synced" if is_folder else f"{found.st_size} bytes synced")
        fsync(descriptor)

    def watched_replace(path, target):
        assert Path(target).read_bytes() == b"old"
        done.append("renamed")
        return replace(path, target)

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    storage.write_bytes(path, b"content")
    assert done == ["7 bytes synced", "renamed", "folder synced"]
    assert path.read_bytes() == b"content"

    def refused(descriptor):  # as some network file systems do
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "fsync", refused)
    storage.write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_folder_is_made_and_tried_and_nothing_stays_in_it(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "and below"
    for _ in range(2):
        storage.check_writable(folder)
        assert list(folder.iterdir()) == []
    file = tmp_path / "file"
    file.write_bytes(b"")
    for wrong in (file, file / "below"):
        with pytest.raises(InputError, match=r"could not make the folder .*: choose another one"):
            storage.check_writable(wrong)
    # Another process that tries it at the same time may remove the file first.
    monkeypatch.setattr(storage, "write_bytes", lambda path, content: None)
    storage.check_writable(folder)


def test_a_table_has_its_columns_and_a_record_no_nan(tmp_path):
    path = tmp_path / "table.csv"
    storage.write_csv(path, ("epoch", "mse"), [{"epoch": 1, "mse": 0.5, "more": 2}, {"epoch": 2}])
    assert path.read_bytes() == b"epoch,mse\n1,0.5\n2,\n"
    storage.write_json(path, {"data": "photos", "epochs": [1, 2]})
    assert path.read_bytes() == (
        b'{\n  "data": "photos",\n  "epochs": [\n    1,\n    2\n  ]\n}\n'
    )
    with pytest.raises(ValueError):
        storage.write_json(path, {"mse": float("nan")})


@pytest.mark.parametrize("name", ["model.pth", "model", "model.of.today.pth"])
def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path, name):
    path = tmp_path / name
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, others = (tmp_path / f"{name}.{ended.pid}.tmp" for name in (name, "other.pth"))
    written = tmp_path / f"{name}.{os.getppid()}.tmp"
    for file in (left, others, written):
        file.write_bytes(b"half")
    storage.write_bytes(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, others, written])


def test_what_is_left_over_and_cannot_be_removed_fails_no_write(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(storage, "remove_left_over", refused)
    storage.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@on_posix
def test_a_process_is_running_until_it_is_known_to_have_ended(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert storage.is_running(os.getpid()) and not storage.is_running(ended.pid)
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda process, signal: sent.append(signal))
        assert storage.is_running(ended.pid)
    assert sent == [0]  # which only asks
    with monkeypatch.context() as patch:  # Windows, where os.kill would end it
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "kill", None)
        is_running = storage.is_running(ended.pid)
    assert is_running

    def refused(process, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)  # another user's
    assert storage.is_running(ended.pid)


@needs_fork
def test_the_campaign_removes_nothing_but_its_own(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match=r"holds other files, and runs are removed: name a new"):
        fault_campaign.main(["--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({"rows": [{"mse": 1.0, "seconds": 2}]}, {"rows": [{"mse": 1.0, "seconds": 3}]}, None),
        ({"rows": [{"mse": 1.0}]}, {"rows": [{"mse": 1.5}]}, "['rows'][0]['mse']"),
        ({"x": torch.zeros(2)}, {"x": torch.tensor([0.0, 1e-9])}, "['x']"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2).half()}, "['x']"),
        ([1], [1, 2], ""),
        ({"a": 1}, {"b": 1}, ""),
        (b"PNG", b"PNG", None),
    ],
)
def test_the_campaign_sees_what_differs(a, b, where):
    assert fault_campaign.difference(a, b) == where


def test_the_campaign_sees_a_file_that_is_half_written(tmp_path):
    whole = tmp_path / "model.pth"
    storage.save_checkpoint(whole, {"epoch": 1})
    assert fault_campaign.contents_of(tmp_path) == {"model.pth": {"epoch": 1}}
    whole.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(fault_campaign.Lost, match=r"model\.pth cannot be read"):
        fault_campaign.contents_of(tmp_path)


@needs_fork
def test_the_campaign_finds_a_loss(tmp_path):
    """Files that are written in place, instead of renamed: half of one is left by a kill."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import storage, os, fault_campaign\n"
        "def in_place(path, content):\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    with path.open('wb') as file:\n"
        "        file.write(content); file.flush(); os.fsync(file.fileno())\n"
        "storage.write_bytes = in_place\n"
        "fault_campaign.main(['--scripts', 'distil', '--tries', '8', '--folder', sys.argv[2]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, HERE, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1 and "cannot be read" in done.stdout, done.stdout + done.stderr


# --- What surrounds a run ---

def run_code(statements, **options):
    """A script whose main is these statements, in a process of its own."""
    code = f"import os, runtime\ndef main(): {statements}\nruntime.run_script(main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE, text=True, **options
    )


@on_posix
@pytest.mark.parametrize(
    ("where", "reason"),
    [("a pipe", "Broken pipe"), ("/dev/full", "No space left on device")],
)
def test_an_output_that_cannot_be_written_ends_in_a_sentence(where, reason):
    if where == "a pipe":
        read_end, output = os.pipe()
        os.close(read_end)
    elif Path(where).exists():
        output = os.open(where, os.O_WRONLY)
    else:
        pytest.skip(f"no {where} here")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = run_code("print('a line')", stdout=output, env=buffered)
    unbuffered = buffered | {"PYTHONUNBUFFERED": "1"}
    assert run_code("print('a line')", stdout=output, env=unbuffered).stderr == done.stderr
    statements = "print('a line'); raise runtime.InputError('which matters more')"
    other = run_code(statements, stdout=output, env=buffered)
    assert (other.returncode, other.stderr) == (1, "error: which matters more\n")
    os.close(output)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: what this prints could not be written ({reason}): print to a terminal or a file "
        "with space; files that are finished stay\n"
    )


@on_posix
def test_what_is_printed_gets_into_no_file_where_the_output_is_closed(tmp_path):
    path = tmp_path / "file"
    statements = f"file = open({str(path)!r}, 'wb'); os.write(1, b'x'); os.write(2, b'x'); print(1)"
    done = run_code(statements, preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 0 and path.read_bytes() == b""


def test_what_the_locale_lacks_is_printed_as_a_question_mark():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run_code("print('3×32')", stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (0, "3?32\n"), done.stderr


@on_posix
def test_a_run_in_poor_surroundings_is_the_same(tiny_run, tmp_path):
    """No home, an ASCII locale, and a folder with quotes, spaces and other letters in its name."""
    run = tmp_path / "it's \"näive\" 音 $x; `y`"
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = start(*TINY, *folders(run), env=environment)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert_same_run(tiny_run[0], run)


def test_a_clock_that_jumps_changes_nothing(tiny_run, tmp_path, monkeypatch, without_pictures):
    clock, jumps = time.time, itertools.cycle((0, 3600, -3600, 3e7, -3e7))  # seconds
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: clock() + next(jumps))
    rows = train(tmp_path)
    assert_same_run(tiny_run[0], tmp_path)
    assert all(0 < float(row["seconds"]) < 100 for row in rows)


FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 98765 bytes"


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_memory_that_is_full_ends_in_a_sentence(allocate):
    with pytest.raises(SystemExit, match=r"^error: out of memory: use a smaller batch or fewer"):
        runtime.run_script(lambda: allocate(10**15))
    with pytest.raises(RuntimeError, match="shape"):
        runtime.run_script(lambda: torch.zeros(2).view(3))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True), (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False), (ValueError("of memory"), False),
    ],
)
def test_errors_that_mean_full_memory(error, is_memory):
    assert runtime.is_out_of_memory(error) == is_memory


def test_memory_that_is_full_says_nothing_against_a_checkpoint(tiny_run, monkeypatch):
    path = tiny_run[0] / "checkpoints" / "tinyvae_best.pth"

    def full(*args, **options):
        raise RuntimeError(FULL)

    for owner, name in ((torch, "load"), (models.TinyVAE32, "load_state_dict")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="98765 bytes"):
            patch.setattr(owner, name, full)
            models.load_model(path, models.TinyVAE32)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="98765 bytes"):
        patch.setattr(training.Stage, "load_state", full)
        train(tiny_run[0], "--resume")


def test_memory_that_is_full_says_nothing_against_images_and_weights(tmp_path, monkeypatch):
    def full(*args, **options):
        raise MemoryError(FULL)

    torchvision = runtime.import_torchvision()
    (tmp_path / data.CIFAR10_FOLDER).mkdir()
    image = tmp_path / "image.png"
    image.touch()
    for owner, name, load in (
        (Image, "open", lambda: data.read_image(image)),
        (torchvision.datasets, "CIFAR10", lambda: data.load_split(str(tmp_path), "train")),
        (torchvision.models.VGG16_Weights, "get_state_dict", lambda: vgg.load_vgg16("imagenet")),
    ):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(owner, name, full)
            load()


@on_posix
def test_a_run_whose_folder_is_gone_ends_in_a_sentence_and_resumes(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    validate = training.Stage.validate

    def renamed(self):
        validate(self)
        if len(self.rows) == 2:
            run.rename(elsewhere)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="removed, renamed or"):
        patch.setattr(training.Stage, "validate", renamed)
        train(run)
    assert not run.exists()
    elsewhere.rename(run)
    train(run, "--resume")
    assert_same_run(tiny_run[0], run)
