"""torchrun: several processes compute what one does, and end as one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

import distill_tinyvae
import distributed
import losses
import training
from runtime import InputError
from testing import (
    HERE,
    TINY,
    assert_same_weights,
    folders,
    read_rows,
    start_two,
    teacher_of,
    train,
)


@pytest.fixture
def torchrun(monkeypatch):
    """The environment that torchrun would give the only process it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_the_process_group_ends_with_the_work_however_it_ends(torchrun):
    mistakes = (
        (InputError("a mistake"), InputError, "^a mistake$"),
        (RuntimeError("another mistake"), RuntimeError, "^another mistake$"),
        (RuntimeError("[gloo/transport] closed"), InputError, "^process 0 of 1 lost the connect"),
    )
    for raised, expected, message in mistakes:
        with pytest.raises(expected, match=message), distributed.processes(torch.device("cpu")):
            assert dist.is_initialized() and distributed.is_shared()
            raise raised
        assert not dist.is_initialized()


def test_the_process_group_ends_with_a_run_that_is_refused(torchrun, tiny_run, monkeypatch):
    shared = []
    monkeypatch.setattr(
        distill_tinyvae, "distil", lambda *_: shared.append(dist.is_initialized()) or refuse_run()
    )

    def refuse_run():
        raise InputError("refused")

    with pytest.raises(InputError, match="refused"):
        train(tiny_run[0])
    assert shared == [True] and not dist.is_initialized()


def test_variables_of_torchrun_that_are_left_over_change_nothing(
    tiny_run, tmp_path, monkeypatch, capfd, without_pictures
):
    run, _ = tiny_run
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    train(tmp_path, *teacher_of(run))
    assert_same_weights(run, tmp_path, "tinyvae_best.pth", "tinyvae_last.pth")
    shown = capfd.readouterr()
    assert "Done in" in shown.out and "student   3/3" in shown.out
    assert "student:" in shown.err  # the progress bar
    assert "processes" not in shown.out
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["processes"] == 1


def test_two_processes_compute_what_one_does(tmp_path):
    script = tmp_path / "compare.py"
    script.write_text(
        """
import torch
from types import SimpleNamespace
from torch.nn import BatchNorm2d, Module, Sequential
from distributed import *
from losses import fixed_grid, without_grid
from training import Stage

class Model(Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Sequential(BatchNorm2d(3)), Sequential(BatchNorm2d(3))

    def forward(self, x):
        return self.decoder(self.encoder(x).square())

def compute(model, x, target):
    x = x.clone().requires_grad_()
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss.detach(), x.grad

with processes(torch.device("cpu")):
    torch.manual_seed(0)
    x, target = torch.randn(2, 6, 3, 4, 4) * 5 + 3
    alone = Model()
    loss, gradient = compute(alone, x, target)

    torch.manual_seed(rank())  # the processes differ until they are made equal
    model = Model()
    torch.nn.init.uniform_(model.encoder[0].weight, 1, 2) if rank() else None
    share_batch_norm(model)
    assert type(model.encoder[0]) is type(model.decoder[0]) is CPUSyncBatchNorm
    copy_from_first(model)
    own_loss, own_gradient = compute(model, own_rows(x), own_rows(target))
    average([parameter.grad for parameter in model.parameters()])
    average([own_loss])
    close = torch.testing.assert_close
    close(own_loss, loss)
    close(own_gradient / 2, own_rows(gradient))
    for parameter, expected in zip(model.parameters(), alone.parameters()):
        close(parameter.grad, expected.grad)
    for name, buffer in model.named_buffers():
        close(buffer, alone.get_buffer(name))
    image = torch.randn(2, 3, 4, 4)  # another in each
    images = [torch.empty_like(image) for _ in range(2)]
    dist.all_gather(images, image)
    image = image.to(memory_format=torch.channels_last)
    average([image, own_loss])
    close(image, (images[0] + images[1]) / 2)
    # The grid is that of the whole batch, and its gradients reach every process's images.
    torch.manual_seed(0)
    drawn, images, weight = torch.rand(3, 6, 3, 32, 32)
    weight *= torch.arange(6).view(6, 1, 1, 1)  # the processes' losses differ
    whole = drawn.clone().requires_grad_()
    looked_at = whole - fixed_grid(whole - images, 8).repeat(1, 4, 4)
    (looked_at * weight).sum().backward()
    own = own_rows(drawn).clone().requires_grad_()
    own_looked_at = without_grid(own, own_rows(images))
    (own_looked_at * own_rows(weight)).sum().backward()
    close(own_looked_at, own_rows(looked_at))
    close(own.grad, own_rows(whole.grad))
    # The rate of the whole batch, 100 nats, moves the weight.
    stage = SimpleNamespace(
        kl_factor=torch.ones(()), progress=torch.tensor(0.5), done=torch.zeros(1000)
    )
    Stage.hold_rate(stage, torch.tensor((80.0 + 40 * rank()) / 3072), 80.0)
    close(stage.kl_factor, torch.tensor(40 / 1000 * 0.25).exp())
    print("all the same")
"""
    )
    process = start_two(script)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("all the same") == 1, output


def test_two_processes_resume_what_one_has_begun(tiny_run, tmp_path, monkeypatch):
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", tmp_path / "checkpoints")
    flags = [*TINY, *folders(tmp_path), "--save-every", "100"]
    steps = training.Stage.steps

    def interrupted(self):
        if self.rows:
            raise KeyboardInterrupt
        return steps(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "steps", interrupted)
        distill_tinyvae.main(flags)
    process = start_two(HERE / "distill_tinyvae.py", *flags, "--resume")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "2 processes" in output and output.count("Written:") == 1
    header, *alone = read_rows(run)
    _, *together = read_rows(tmp_path)
    assert alone[2] == together[2]  # after two epochs of the teacher, the one done alone
    # The KL of so raw a student is a small difference of large numbers.
    tolerances = dict.fromkeys(losses.TERMS, 1e-3) | {"kl": 1e-2, "val_mse": 1e-2}
    for name, tolerance in tolerances.items():
        column = header.index(name)
        expected = float(alone[3][column])
        assert float(together[3][column]) == pytest.approx(expected, rel=tolerance)

    monkeypatch.setattr(distill_tinyvae, "world_size", lambda: 2)
    with pytest.raises(InputError, match="--perceptual-images multiples of 2"):
        distill_tinyvae.main([*flags, "--resume", "--perceptual-images", "5"])


@pytest.mark.parametrize("which", [min, max])  # the first and the second to be started
def test_when_one_of_two_processes_dies_the_other_says_so(tmp_path, which):
    flags = ("--vgg", "none", "--limit", "2000", "--epochs", "1000", "--save-every", "1000")
    process = start_two(HERE / "distill_tinyvae.py", *TINY, *flags, *folders(tmp_path))
    while not (tmp_path / "outputs" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    workers = [int(pid) for pid, parent in pairs if int(parent) == process.pid]
    os.kill(which(workers), signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert re.search(
        r"of 2 (lost the connection to another one|was stopped, as torchrun does where another one "
        r"has ended): every finished epoch is saved, and the same command with --resume", output
    )
