"""The optimisers, Adam and Muon, and the learning rate over the steps."""

import math

import torch


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

    torch.optim.Muon takes no kernels and works in bfloat16. Under a GradScaler, a step that
    overflows is skipped, without reading from the device whether it does.

    Args:
        parameters: of two dimensions or more.
        lr: learning rate.
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
                gradient, weight, lr = parameter.grad, 1 - group["momentum"], group["lr"]
                if hasattr(self, "found_inf"):
                    is_finite = self.found_inf == 0
                    gradient = (gradient / self.grad_scale).where(is_finite, 0)
                    weight, lr = weight * is_finite, lr * is_finite
                average = state["average"].lerp_(gradient, weight)
                ahead = gradient.lerp(average, group["momentum"])  # Nesterov's
                matrix = ahead.flatten(1)
                scale = 0.2 * math.sqrt(max(matrix.shape)) * lr
                parameter -= scale * orthogonalize(matrix).view(parameter.shape)


def orthogonalize(matrix, steps=5):
    """A matrix with its singular values moved to near 1, between about 0.7 and 1.2.

    The Newton–Schulz iteration of Jordan et al. 2024, of degree five: matrix products alone. Its
    coefficients lift small singular values fast and do not let them settle at exactly 1. Each step
    multiplies x by a polynomial of x xᵀ, so the steps are taken on that square matrix, and x is
    multiplied once, by the product of the polynomials: for TinyVAE32's matrices, most of them at
    least four times as wide as high, half of the arithmetic of steps on x.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for step in range(steps):
        # The polynomial less its constant, which each addmm below adds: one launch on a GPU in
        # place of three.
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        product = torch.addmm(product, polynomial, product, beta=3.4445)
        if step < steps - 1:
            gram = torch.addmm(gram, polynomial, gram, beta=3.4445)
            gram = torch.addmm(gram, gram, polynomial, beta=3.4445)
    x = product @ x
    return x.T.contiguous() if is_tall else x


def make_optimizers(name, objective, learning_rate):
    """Adam for all that is trained; or for `muon`, Muon for the matrices and kernels of the network
    and Adam for the rest, such as a projection, which has a geometry of its own.

    Args:
        name: `adam` or `muon`.
        objective: an Objective of training.py.
        learning_rate: at its peak.
    """
    matrices = []
    if name == "muon":
        matrices = [p for p in objective.network.parameters() if p.ndim > 1]
    by_muon = set(matrices)
    others = [p for p in objective.parameters() if p.requires_grad and p not in by_muon]
    adam = torch.optim.Adam(others, lr=learning_rate, fused=True)
    return [adam, Muon(matrices, learning_rate)] if matrices else [adam]
