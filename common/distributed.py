"""torchrun: several processes train one model by DistributedDataParallel, each with its part of
every batch. The first process writes and prints. Without torchrun nothing here does anything."""

import contextlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.runtime import InputError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, then all others, which find what it has cached."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


@contextlib.contextmanager
def processes(device):
    """Within it, the processes that torchrun started work together. Raises InputError where
    another one has ended."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "mps":
        raise InputError("torchrun is for CUDA and CPU, this is mps: use --device cpu")
    timeout = timedelta(hours=2)  # the first may have to download
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    signal.signal(signal.SIGTERM, peer_lost)
    try:
        with Path(os.devnull).open("w") as nowhere:
            out, err = (nowhere, nowhere) if rank() else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
    except RuntimeError as error:  # Gloo has no error class of its own
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            peer_lost()
        raise
    dist.destroy_process_group()


def peer_lost(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise InputError(
        f"process {rank()} of {world_size()} lost another one: every finished epoch is saved, and "
        "the same command with --resume, without --overwrite, continues"
    )


def own_rows(rows):
    """This process's rows of a batch: every Nth."""
    return rows[rank() :: world_size()]


def average(tensor):
    """A tensor's mean over the processes."""
    if world_size() > 1:
        tensor = tensor / world_size()
        dist.all_reduce(tensor)
    return tensor


def data_parallel(objective, device):
    """The objective, its gradients averaged over the processes. BatchNorm is over the whole batch
    on CUDA and over each process's part on CPUs, whose PyTorch cannot share it."""
    if world_size() == 1:
        return objective
    if device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    return DistributedDataParallel(objective)
