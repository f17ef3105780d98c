"""torchrun: two processes compute what one does, write the files of a run once, and end as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common import distributed, losses, runs
from common.runtime import InputError
from common.training import fit
from distill_tinyvae import StudentObjective, main
from tests.testing import (
    HERE,
    TINY,
    WEIGHTS,
    folders,
    random_normal,
    read_table,
    run_of,
    start_two,
)
from tiny_vae_32 import TinyVAE32

CPU = torch.device("cpu")


class HalfByHalf(StudentObjective):
    """In one process what two do: each half of a batch has its own BatchNorm statistics and its
    own grid, and their gradients are averaged."""

    def forward(self, *batch):
        first, second = (StudentObjective.forward(self, *(x[i::2] for x in batch)) for i in (0, 1))
        return {name: (first[name] + second[name]) / 2 for name in first}


def state_after_three_steps(objective_class):
    images = (random_normal(24, 3, 32, 32) * 40 + 128).clamp(0, 255).byte()
    targets = random_normal(24, 8), random_normal(24, 3, 32, 32, seed=1)
    torch.manual_seed(0)
    network = TinyVAE32(4, (4, 4, 8, 8), (8, 8, 4, 4))
    projection = losses.make_projection("pixels", targets[0], images, 4)
    vgg = nn.AvgPool2d((1, 4))  # in its place: three maps to compare
    run = run_of(images, warmup=0.5, temperature=3.0, rate=0.4, perceptual_images=0)
    objective = objective_class(network, WEIGHTS, run.settings, projection, targets[0], vgg)
    return [*fit(objective, run, "student", 1, "muon", 3e-3, targets)][-1]


def merge_biases(state):
    """A bias before BatchNorm shifts the running mean and nothing else. Its gradient is rounding
    error, which differs by CPU and which Adam scales to a step: only running_mean - bias is known.
    """
    for name in [name for name in state if name.endswith("running_mean")]:
        block, number, _ = name.split(".")
        state[name] = state[name] - state.pop(f"{block}.{int(number) - 1}.bias")
    return state


def test_two_processes_take_the_steps_of_one_that_sees_both_halves(tmp_path):
    process = start_two(Path(__file__), tmp_path / "state.pth")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    together = torch.load(tmp_path / "state.pth", weights_only=True)
    alone = state_after_three_steps(HalfByHalf)
    tensors, expected = ({**s["objective"], **merge_biases(s["model"])} for s in (together, alone))
    torch.testing.assert_close(tensors, expected, rtol=1e-6, atol=1e-6)
    assert alone["objective"]["kl_factor"] != 1  # the mean KL of the two halves moves it
    assert together["rows"][0]["loss"] == pytest.approx(alone["rows"][0]["loss"], rel=1e-5)


def test_a_killed_process_ends_the_run_in_a_sentence_and_resuming_writes_its_files_once(tmp_path):
    flags = ("--vgg", "none", "--epochs", "1", "--resume")
    command = (HERE / "distill_tinyvae.py", *TINY, *folders(tmp_path), *flags)
    process = start_two(*command)
    while not list(tmp_path.glob("checkpoints/*.pth")) and process.poll() is None:
        time.sleep(0.02)
    workers = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(min(map(int, workers)), signal.SIGKILL)  # the one that writes
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    sentence = "process 1 of 2 lost another one: every finished epoch is saved, and the same"
    assert f"{sentence} command with --resume, without --overwrite, continues" in output, output

    process = start_two(*command)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and output.count("Written:") == 1, output
    assert "2 processes" in output and output.count("student   1/1 |") == 1
    assert [row["epoch"] for row in read_table(tmp_path)] == ["1", "2", "1"]


def test_a_batch_that_does_not_divide_is_refused_and_other_variables_count_for_nothing(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with distributed.processes(CPU):
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    with pytest.raises(InputError, match="make --batch-size and --perceptual-images multiples of"):
        main(["--perceptual-images", "5"])


if __name__ == "__main__":
    with distributed.processes(CPU):
        state = state_after_three_steps(StudentObjective)
        if not distributed.rank():
            torch.save(state, sys.argv[1])
