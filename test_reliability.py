"""Faults on purpose: the short form of fault_campaign.py, and what it rests on."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fault_campaign
import storage
from runtime import InputError
from testing import HERE

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


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path = tmp_path / "model.pth"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, others = (tmp_path / f"{name}.{process}.tmp" for name, process in (
        ("model.pth", ended.pid), ("other.pth", ended.pid)))
    written = tmp_path / f"model.pth.{os.getppid()}.tmp"
    for file in (left, others, written):
        file.write_bytes(b"half")
    storage.write_bytes(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, others, written])


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
