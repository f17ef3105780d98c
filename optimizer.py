"""The optimiser: Adam, Muon for matrices, the learning rate over steps, loss scaling in fp16."""

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


class Muon(torch.optim.Optimizer):
    """Steps of one size in every direction: the momentum's nearest orthogonal matrix.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". A convolution's
    kernel counts as the matrix that takes a patch to a position, a transposed one's as that which
    takes a position to a patch. The factor 0.2 √(larger side) gives a step the size of one of
    Adam's, so that the same learning rates fit: Liu et al. 2025, arXiv:2502.16982, section 2.2.

    torch.optim.Muon takes no kernels, works in bfloat16, and reads its learning rate back from the
    device, which a CUDA graph forbids. Under a GradScaler, a step that overflows is skipped.

    Args:
        parameters: of two dimensions or more.
        lr: learning rate, a tensor with one number.
        momentum: weight of the earlier gradients in their average.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, as for fused Adam

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                gradient, weight, rate = parameter.grad, 1 - group["momentum"], group["lr"]
                if hasattr(self, "found_inf"):
                    is_finite = self.found_inf == 0
                    gradient = (gradient / self.grad_scale).where(is_finite, 0)
                    weight, rate = weight * is_finite, rate * is_finite
                average = state["average"].lerp_(gradient, weight)
                ahead = gradient.lerp(average, group["momentum"])  # Nesterov's
                matrix = ahead.flatten(1)
                scale = 0.2 * math.sqrt(max(matrix.shape)) * rate
                parameter -= scale * orthogonalize(matrix).view(parameter.shape)


def orthogonalize(matrix, steps=5):
    """A matrix with its singular values moved to near 1, between about 0.7 and 1.2.

    The Newton–Schulz iteration of Jordan et al. 2024, of degree five: matrix products alone. Its
    coefficients lift small singular values fast and do not let them settle at exactly 1. Each step
    multiplies x by a polynomial of x xᵀ, so the steps are taken on that square matrix, and x is
    multiplied once, by the product of the polynomials: for TinyVAE32's matrices, at least four
    times as wide as high or nearly so, half of the arithmetic of steps on x.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    gram, product = x @ x.T, None
    for step in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return x.T.contiguous() if is_tall else x


class OneCycleOptimizer:
    """Adam, with Muon for those parameters that are to have it; their learning rate follows
    `one_cycle`.

    Args:
        parameters: what Adam trains; frozen ones are left out.
        matrices: what Muon trains, if anything.
        peak: the largest learning rate.
        warmup: fraction of the steps over which it rises.
        steps: how many there are in all.
        device, precision: in fp16 the loss is scaled, so that small gradients survive.
        capturable: whether steps are recorded as a CUDA graph.
    """

    def __init__(
        self, parameters, matrices, peak, warmup, steps, device, precision, capturable=False
    ):
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.parameters = parameters + matrices
        rates = [peak * one_cycle(step, steps, warmup) for step in range(steps)]
        self.rates = torch.tensor(rates, device=device)
        self.learning_rate = torch.tensor(peak, device=device)  # a tensor, for the CUDA graph
        self.capturable = capturable
        self.adam = torch.optim.Adam(
            parameters, lr=self.learning_rate, fused=True, capturable=capturable
        )
        self.muon = Muon(matrices, self.learning_rate) if matrices else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def set_step(self, step):
        """Set the learning rate of a step, a tensor with one number."""
        self.learning_rate.copy_(self.rates.index_select(0, step)[0])

    def backward(self, loss):
        """Gradients of the loss, averaged over the processes."""
        for parameter in self.parameters:
            parameter.grad = None
        self.scaler.scale(loss).backward()
        average([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def step(self):
        self.scaler.step(self.adam)
        if self.muon:
            self.scaler.step(self.muon)
        self.scaler.update()

    def state_dict(self):
        return {
            "optimizer": self.adam.state_dict(),
            "muon": self.muon.state_dict() if self.muon else {},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state):
        # Each step sets it; but a state that is saved before the next step must be the same.
        self.learning_rate.copy_(state["optimizer"]["param_groups"][0]["lr"])
        self.adam.load_state_dict(state["optimizer"])
        for group in self.adam.param_groups:
            group["lr"], group["capturable"] = self.learning_rate, self.capturable
        if self.muon:
            self.muon.load_state_dict(state["muon"])
            self.muon.param_groups[0]["lr"] = self.learning_rate
        if state["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(state["scaler"])
