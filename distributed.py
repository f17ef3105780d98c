"""torchrun: several processes train one model, and the result is that of one process.

    torchrun --nproc_per_node=2 -- distill_tinyvae.py --data PATH --vgg PATH

Every process holds all images and takes every Nth image of each batch. Gradients are averaged,
BatchNorm's statistics are those of the whole batch, and so are the noise of the latents and the
grid that VGG16 does not see: the result differs from a single process's by rounding alone. The
first process writes and prints. Without torchrun every function here does nothing.

DistributedDataParallel is not used: it averages the gradients of one module's forward, and a step
here calls `encode` and `decode_logits` of one module and the projection of another.
"""

import contextlib
import os
import signal
from datetime import timedelta
from pathlib import Path

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
    """Within it, the processes that torchrun started work together, over NCCL or Gloo.

    Raises InputError where there are more processes than CUDA devices, over Gloo where another
    process died, and where torchrun stops this one, as it does when another has ended.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if device.type == "mps":
        raise InputError("torchrun is for CUDA and CPU, this is mps: use --device cpu")
    is_cuda = device.type == "cuda"
    if is_cuda:
        own = int(os.environ["LOCAL_RANK"])
        if own >= torch.cuda.device_count():
            raise InputError(
                f"this machine has {torch.cuda.device_count()} CUDA devices: start no more "
                "processes than that"
            )
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        timeout=timedelta(hours=2),  # the others wait while the first one downloads and decodes
        device_id=torch.device("cuda", torch.cuda.current_device()) if is_cuda else None,
    )
    is_done = False
    former = signal.signal(signal.SIGTERM, tell_stopped)
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        is_done = True
    except RuntimeError as error:  # Gloo has no error class of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise lost("lost the connection to another one") from error
    finally:
        # torchrun's may come before this process has told its own error.
        signal.signal(signal.SIGTERM, former if is_done else signal.SIG_IGN)
        # After an error NCCL could wait here for processes that wait for this one; torchrun ends
        # them when this one has ended.
        if is_done or not is_cuda:
            dist.destroy_process_group()


def tell_stopped(*_):
    """In place of dying without a word when torchrun ends this process, since another has ended."""
    raise lost("was stopped, as torchrun does where another one has ended")


def lost(what):
    return InputError(
        f"process {rank()} of {world_size()} {what}: every finished epoch is saved, and the same "
        "command with --resume, without --overwrite, continues"
    )


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, then all others, which find what it has cached."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


def wait_for_all():
    if is_shared():
        dist.barrier()


def own_rows(rows):
    """This process's rows of a batch: every Nth."""
    return rows[rank() :: world_size()]


@torch.no_grad()
def copy_from_first(module):
    """The first process's parameters and buffers, in every process."""
    if is_shared():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average(tensors):
    """Replace each tensor by its mean over all processes, in one exchange."""
    if world_size() > 1:
        mean = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(mean)
        mean /= world_size()
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def share_batch_norm(model):
    """BatchNorm over the images of all processes, in place of every BatchNorm2d of a model."""
    if world_size() == 1:
        return
    if next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for layers in (model.encoder, model.decoder):
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[i] = CPUSyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
                layers[i].load_state_dict(layer.state_dict())


class SumOverProcesses(torch.autograd.Function):
    """A sum, and that of its gradients: the loss of every process depends on it."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


def mean_over_processes(tensor):
    """The mean of a tensor over all processes; gradients reach every process's own."""
    if world_size() == 1:
        return tensor
    return SumOverProcesses.apply(tensor) / world_size()


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm for CPUs, which it refuses."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = values.mean((0, 2, 3))
        deviation = values - mean.view(-1, 1, 1)  # Tensor.var is far slower on CPUs
        own = torch.stack([mean, deviation.square().mean((0, 2, 3))])
        table = own.new_zeros(world_size(), *own.shape)
        table[rank()] = own
        table = SumOverProcesses.apply(table)
        means, variances = table.unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            count = world_size() * values[:, 0].numel()
            self.num_batches_tracked += 1
            rate = self.momentum or 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (count / (count - 1)), rate)
        scale = self.weight * (variance + self.eps).rsqrt()
        normal = (values - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return normal.to(x.dtype)
