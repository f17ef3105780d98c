"""Several processes, one run: each batch is dealt out, and the result is that of one process.

    torchrun --nproc_per_node=2 distill_tinyvae.py --data PATH --vgg PATH

Every process holds all images and takes every Nth image of each batch. Gradients are averaged,
BatchNorm's statistics are those of the whole batch, and so is the noise of the latents: what comes
out differs from a single process by rounding alone. The first process writes and speaks; all of
them read. Without torchrun nothing here does anything.
"""

import contextlib
import io
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from runtime import InputError


def rank():
    return dist.get_rank() if is_shared() else 0


def world_size():
    return dist.get_world_size() if is_shared() else 1


def is_shared():
    return dist.is_available() and dist.is_initialized()  # some builds of PyTorch lack it


@contextlib.contextmanager
def processes(device):
    """Within it, what torchrun has started works together: over NCCL on CUDA, else over Gloo.

    When one process dies torchrun ends the others. Over Gloo they notice first, and raise an
    InputError.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        yield
        return
    if device.type == "mps":
        raise InputError("torchrun is for CUDA and CPU, this is mps: use --device cpu")
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        timeout=timedelta(hours=2),  # the others wait while the first one downloads and decodes
        device_id=torch.device("cuda", torch.cuda.current_device()) if is_cuda else None,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO() if rank() else sys.stdout):
            yield
    except RuntimeError as error:  # Gloo has no error class of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise InputError(
            f"process {rank()} of {world_size()} lost another one, which ended before its time: "
            "every finished epoch is saved, the same command with --resume goes on"
        ) from error
    dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The first process goes through the block, then all others, who find what it has cached."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


def wait_for_all():
    if is_shared():
        dist.barrier()


def my_share(rows):
    """This process's rows of a batch or a split: every Nth. The same rows without torchrun."""
    return rows[rank() :: world_size()]


@torch.no_grad()
def start_equal(*modules):
    """Parameters and buffers of the first process, everywhere."""
    if is_shared():
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(parameters):
    """Each gradient → its mean over all processes, in one exchange."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def average(tensor):
    """The mean of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def gather_rows(own, count):
    """What each process found for `my_share` of `count` rows → all rows, in order, everywhere."""
    if world_size() == 1:
        return own
    rows = own.new_zeros(count, *own.shape[1:])
    rows[rank() :: world_size()] = own
    dist.all_reduce(rows)
    return rows


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all processes' images.

    nn.SyncBatchNorm, which does this too, is for GPUs alone.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float()
        # One exchange, there and back: each process fills in its own row and the sum is the table.
        mean = values.mean((0, 2, 3))
        deviation = values - mean.view(-1, 1, 1)  # Tensor.var is far slower on CPUs
        own = torch.stack([mean, deviation.square().mean((0, 2, 3))])
        table = own.new_zeros(world_size(), *own.shape)
        table[rank()] = own
        means, variances = SumOverProcesses.apply(table).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        self.keep(mean.detach(), variance.detach(), world_size() * values[:, 0].numel())
        scale = self.weight * (variance + self.eps).rsqrt()
        normal = (values - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return normal.to(x.dtype)

    @torch.no_grad()
    def keep(self, mean, variance, count):
        self.num_batches_tracked += 1
        share = self.momentum or 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


def share_batch_norm(model):
    """Put a SharedBatchNorm, with the same state, in place of every BatchNorm2d of a model."""
    if world_size() == 1:
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.BatchNorm2d:
                shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
                shared.load_state_dict(layer.state_dict())
                setattr(parent, name, shared)
