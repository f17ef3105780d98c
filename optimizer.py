"""The optimiser of both stages: Adam, its learning rate over the steps, loss scaling in fp16."""

import math

import torch

from distributed import average


def one_cycle(step, steps, warmup):
    """Factor of the peak learning rate at a step, counted from 0: linear warm-up, cosine to zero.

    After Smith & Topin 2017, arXiv:1708.07120. `warmup` is a fraction of the steps.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class OneCycleAdam:
    """Adam whose learning rate follows `one_cycle`.

    Args:
        parameters: what to train; frozen ones are left out.
        peak: the largest learning rate.
        warmup: fraction of the steps over which it rises.
        steps: how many there are in all.
        device, precision: in fp16 the loss is scaled, so that small gradients survive.
        capturable: whether steps are recorded as a CUDA graph.
    """

    def __init__(self, parameters, peak, warmup, steps, device, precision, capturable=False):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        rates = [peak * one_cycle(step, steps, warmup) for step in range(steps)]
        self.rates = torch.tensor(rates, device=device)
        self.learning_rate = torch.tensor(peak, device=device)  # a tensor, for the CUDA graph
        self.capturable = capturable
        self.adam = torch.optim.Adam(
            self.parameters, lr=self.learning_rate, fused=True, capturable=capturable
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def set_step(self, step):
        """Set the learning rate of a step, a tensor with one number."""
        self.learning_rate.copy_(self.rates.index_select(0, step)[0])

    def backward(self, loss):
        """Gradients of the loss, averaged over the processes."""
        self.adam.zero_grad()
        self.scaler.scale(loss).backward()
        average([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def step(self):
        self.scaler.step(self.adam)
        self.scaler.update()

    def state_dict(self):
        return {"optimizer": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["optimizer"])
        for group in self.adam.param_groups:
            group["lr"], group["capturable"] = self.learning_rate, self.capturable
        if state["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(state["scaler"])
