"""Faults on purpose: the short form of fault_campaign.py and what it rests on; memory, output,
locale and folders that fail."""

import errno
import io
import itertools
import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tqdm.std
from PIL import Image

from common import models, runtime, sources, storage, training, vgg
from common.folders import read_image
from common.runtime import InputError
from tests.fault_campaign import contents_of, without_times
from tests.testing import HERE, TINY, assert_same_run, folders, on_posix, start, train
from tiny_vae_32 import TinyVAE32


def run_code(statements, **options):
    """A script whose main is these statements, in a process of its own."""
    code = f"""
import os, pathlib
from common import runtime, storage
from tests import fault_campaign
def main(argv):
{textwrap.indent(statements, "    ")}
runtime.run_script(main)"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, **options)


# --- Files ---


@on_posix
def test_whatever_breaks_a_run_it_ends_the_same():
    done = run_code("fault_campaign.main(['--scripts', 'distil', '--tries', '8'])")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 faults, seed 0: 8 ended identical, 0 did not." in done.stdout


@on_posix
def test_the_campaign_finds_a_loss(tmp_path):
    """Files that are written in place, instead of renamed: half of one is left by a kill."""
    done = run_code(
        "def in_place(path, content):\n"
        "    with path.open('wb') as file:\n"
        "        file.write(content); file.flush(); os.fsync(file.fileno())\n"
        "storage.write_bytes = in_place\n"
        f"run = pathlib.Path({str(tmp_path)!r}, 'run')\n"
        "campaign = fault_campaign.Campaign('distil', run, None)\n"
        "writes = [i for i, event in enumerate(campaign.events) if event == 'write']\n"
        "campaign.break_once(writes[3], 'killed with half of a file written', None)"
    )
    assert done.returncode == 1 and ".pth cannot be read" in done.stderr, done.stderr


def test_the_campaign_compares_bits_and_order_but_no_times(tmp_path):
    checkpoint = {"x": torch.zeros(2), "rows": [{"mse": 1.0, "seconds": 2}]}
    storage.save_checkpoint(tmp_path / "model.pth", checkpoint)
    expected = without_times(checkpoint | {"rows": [{"mse": 1.0, "seconds": 3}]})
    assert contents_of(tmp_path) == {"model.pth": expected}
    for other in ({"x": torch.tensor([0.0, 1e-9])}, {"x": torch.zeros(2).half()}, {"rows": []}):
        assert without_times(checkpoint | other) != expected
    assert without_times(dict(reversed(checkpoint.items()))) != expected


def test_a_file_is_on_the_disk_before_the_old_one_is_gone(tmp_path, monkeypatch):
    done, path = [], tmp_path / "file"
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if is_folder else os.fstat(descriptor).st_size)
        fsync(descriptor)
        if is_folder and len(done) > 3:  # the second time, as some network file systems do
            raise OSError(errno.EINVAL, "Invalid argument")

    def watched_replace(path, target):
        done.append(Path(target).read_bytes())
        return replace(path, target)

    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    storage.write_bytes(path, b"content")
    storage.write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert done == [7, b"old", "folder", 5, b"content", "folder"]


def test_a_folder_is_made_and_tried_and_nothing_stays_in_it(tmp_path, monkeypatch):
    folder, file = tmp_path / "new" / "and below", tmp_path / "file"
    for _ in range(2):
        storage.check_writable(folder)
        assert list(folder.iterdir()) == []
    file.write_bytes(b"")
    for wrong in (file, file / "below"):
        with pytest.raises(InputError, match=r"could not make the folder .*: choose another one"):
            storage.check_writable(wrong)
    # Another process that tries it at the same time may remove the file first.
    monkeypatch.setattr(storage, "write_bytes", Mock())
    storage.check_writable(folder)


def test_a_table_has_its_columns_and_a_record_no_nan(tmp_path):
    path = tmp_path / "table.csv"
    storage.write_csv(path, ("epoch", "mse"), [{"epoch": 1, "mse": 0.5, "more": 2}, {"epoch": 2}])
    assert path.read_bytes() == b"epoch,mse\n1,0.5\n2,\n"
    storage.write_json(path, {"epochs": [1, 2]})
    assert path.read_bytes() == b'{\n  "epochs": [\n    1,\n    2\n  ]\n}\n'
    with pytest.raises(ValueError):
        storage.write_json(path, {"mse": float("nan")})


@on_posix
def test_what_an_ended_process_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        path, ended = tmp_path / "model.of [today].pth", process.pid
    kept = [path, tmp_path / f"other.pth.{ended}.tmp", tmp_path / f"{path.name}.{os.getppid()}.tmp"]
    for file in (*kept, tmp_path / f"{path.name}.{ended}.tmp"):
        file.write_bytes(b"half")
    storage.write_bytes(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted(kept)

    assert storage.is_running(os.getpid()) and not storage.is_running(ended)
    kill = Mock()
    monkeypatch.setattr(os, "kill", kill)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")  # Windows, where os.kill would end it
        is_running = storage.is_running(ended)
    assert is_running and not kill.called
    assert storage.is_running(ended) and kill.call_args.args == (ended, 0)  # which only asks
    kill.side_effect = PermissionError  # another user's
    assert storage.is_running(ended)

    monkeypatch.setattr(storage, "remove_left_over", Mock(side_effect=PermissionError))
    storage.write_bytes(path, b"content")
    assert path.read_bytes() == b"content"


# --- What surrounds a run ---


@on_posix
def test_an_output_that_cannot_be_written_ends_in_a_sentence():
    read_end, pipe = os.pipe()
    os.close(read_end)
    outputs = [(pipe, 141, "")]  # as of `| head`
    if Path("/dev/full").exists():
        sentence = (
            "error: what this prints could not be written (No space left on device): print to a "
            "terminal or a file with space; files that are finished stay\n"
        )
        outputs += [(os.open("/dev/full", os.O_WRONLY), 1, sentence)]
    for output, code, sentence in outputs:
        for unbuffered in ("1", ""):  # at the print, and at the end
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            done = run_code("print('a line')", stdout=output, env=environment)
            assert (done.returncode, done.stderr) == (code, sentence)
    statements = "print('a line'); raise runtime.InputError('which matters more')"
    done = run_code(statements, stdout=pipe, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (1, "error: which matters more\n")


@on_posix
def test_what_is_printed_gets_into_no_file_where_the_output_is_closed(tmp_path):
    path = tmp_path / "file"
    statements = f"file = open({str(path)!r}, 'wb'); os.write(1, b'x'); os.write(2, b'x'); print(1)"
    done = run_code(statements, stdout=None, stderr=None, preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 0 and path.read_bytes() == b""


def test_what_the_locale_lacks_is_printed_as_a_question_mark(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii"))
    runtime.run_script(lambda argv: print("3×32"))
    assert output.getvalue() == b"3?32\n"


@on_posix
def test_a_run_in_poor_surroundings_is_the_same(tiny_run, tmp_path):
    """No home, an ASCII locale, and a folder with quotes, spaces and other letters in its name."""
    run = tmp_path / "it's \"näive\" 音 $x; `y`"
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = start(HERE / "distill_tinyvae.py", *TINY, *folders(run), env=environment)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert_same_run(tiny_run[0], run)


@on_posix
def test_neither_a_clock_that_jumps_nor_a_folder_that_goes_changes_what_a_run_writes(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    clock, jumps = time.time, itertools.cycle((0, 3600, -3600, 3e7, -3e7))  # seconds
    validate, epochs = training.validate, itertools.count(1)

    def renamed(*args):
        if next(epochs) == 4:  # the student's second
            run.rename(elsewhere)
        return validate(*args)

    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: clock() + next(jumps))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="removed, renamed or"):
        patch.setattr(training, "validate", renamed)
        train(run)
    assert not run.exists()
    elsewhere.rename(run)
    rows = train(run, "--resume")
    assert_same_run(tiny_run[0], run)
    assert all(0 < float(row["seconds"]) < 100 for row in rows)


def test_a_reason_of_two_lines_is_told_whole():
    error = RuntimeError("Errors in loading:\n\t0.weight is missing\nmore")
    assert runtime.first_line(error) == "Errors in loading: 0.weight is missing"
    assert runtime.first_line(ValueError("one\ntwo")) == "one"
    assert runtime.first_line(KeyError()) == "KeyError"


# --- Memory ---

FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 98765 bytes"


def test_memory_that_is_full_ends_in_a_sentence():
    for allocate in (torch.empty, np.empty):
        with pytest.raises(SystemExit, match=r"^error: out of memory: use a smaller batch or few"):
            runtime.run_script(lambda argv, allocate=allocate: allocate(10**15))
    with pytest.raises(RuntimeError, match="shape"):
        runtime.run_script(lambda argv: torch.zeros(2).view(3))
    onednn = "could not create a primitive"
    is_full = (
        MemoryError(), OSError(errno.ENOMEM, "No"), torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("bad_alloc"), RuntimeError(onednn),
    )
    assert all(map(runtime.is_out_of_memory, is_full))
    others = RuntimeError(f"{onednn} descriptor"), OSError(errno.ENOSPC, "No"), ValueError(FULL)
    assert not any(map(runtime.is_out_of_memory, others))


def test_memory_that_is_full_says_nothing_against_files(tiny_run, tmp_path, monkeypatch):
    torchvision = runtime.import_torchvision()
    (tmp_path / sources.CIFAR10_FOLDER).mkdir()
    image, best = tmp_path / "image.png", tiny_run[0] / "checkpoints" / "tinyvae_best.pth"
    image.touch()
    for owner, name, load in (
        (torch, "load", lambda: models.load_model(best)),
        (TinyVAE32, "load_state_dict", lambda: models.load_model(best)),
        (TinyVAE32, "load_state_dict", lambda: train(tiny_run[0], "--resume")),
        (Image, "open", lambda: read_image(image)),
        (torchvision.datasets, "CIFAR10", lambda: sources.load_split(str(tmp_path), "train")),
        (torchvision.models.VGG16_Weights, "get_state_dict", lambda: vgg.load_vgg16("imagenet")),
    ):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="98765 bytes"):
            patch.setattr(owner, name, Mock(side_effect=RuntimeError(FULL)))
            load()
