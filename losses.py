"""The terms of the student's loss; distill_tinyvae.py weights and adds them. The squared output
term is `reconstruction_loss` of what is decoded from mu.

Squared errors are means over what they compare, pixel or feature values; nats are divided by the
3,072 values of an image. With pixels and nats over the same divisor, the weight of the KL over that
of the reconstruction is the beta of a beta-VAE on summed errors. (With the KL averaged over 64
latents instead, weights of 0.1 and 0.3 alone make a beta of 16, at which theory keeps 3 latents of
64 alive: Lucas et al. 2019, arXiv:1911.02469.)

Images are N×3×32×32 in [0, 1]; logits are what a decoder returns before its sigmoid.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vae import PIXEL_VALUES

TERMS = ("reconstruction", "kl", "latent", "output", "perceptual")  # in settings, metrics.csv


# --- The terms every VAE has ---


def reconstruction_loss(reconstruction, images):
    """Mean squared error of pixels in [0, 1]: ‖x̂ − x‖² / 3072, mean over the batch."""
    return F.mse_loss(reconstruction, images)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma²) ‖ N(0, 1)) of each latent of each image, in nats, N×latent_dim, ≥ 0.

    ½ (mu² + sigma² − 1 − log sigma²): Kingma & Welling 2013, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def kl_loss(mu, logvar):
    """Total KL of an image in nats, summed over latents, / 3072; mean over the batch."""
    return kl_divergence(mu, logvar).sum(1).mean() / PIXEL_VALUES


# --- The terms that learn from the teacher ---


class LatentProjection(nn.Module):
    """The teacher's 512 latents → the student's 64: learnable, and unable to collapse.

        t = Q W (mu_T − m)

    m is the mean of the teacher's mu over the training images. W, fixed, whitens it: the leading
    principal components, each divided by its standard deviation. Q, learned, has orthonormal
    rows. So over the training images every t has zero mean, unit variance, and no correlation
    with another, whatever Q learns: shrinking towards a target that teaches nothing, or copying
    one easy direction into all 64, is out of reach. Learning is left with choosing the directions
    and turning them. Q starts as the identity: the 64 leading components. It learns along the
    Stiefel manifold: its gradient is tangent to it, and `retract` follows each optimiser step.

    A plain linear map trained on ‖mu_S − P mu_T‖² has its optimum at P = 0, aided by the KL term;
    hence the fixed teachers of FitNets (arXiv:1412.6550), and the normalisation of SRD (Miles et
    al. 2023, "Understanding the role of the projector in knowledge distillation").

    Args:
        teacher_mu: the teacher's mu of the training images, N×512. Sets m and W.
        latent_dim: the student's latents.
        components: how many principal components Q chooses from; at least latent_dim are taken.

    Raises ValueError if the teacher has fewer latents than the student.
    """

    def __init__(self, teacher_mu, latent_dim, components=128):
        super().__init__()
        teacher_dim = teacher_mu.shape[1]
        if teacher_dim < latent_dim:
            raise ValueError(
                f"the teacher has {teacher_dim} latents, fewer than the student's {latent_dim}"
            )
        components = min(max(components, latent_dim), teacher_dim)
        codes = teacher_mu.detach().cpu().double()
        mean = codes.mean(0)
        centred = codes - mean
        covariance = centred.T @ centred / len(centred)
        variance, directions = torch.linalg.eigh(covariance)  # ascending
        variance, directions = variance.flip(0)[:components], directions.flip(1)[:, :components]
        # A direction without variance (fewer images than latents, or a collapsed teacher) cannot
        # be whitened; the floor leaves it near zero, where projected_std shows it.
        scale = variance.clamp_min(1e-6 * variance[0].clamp_min(1e-12)).rsqrt()
        self.register_buffer("mean", mean.float())                             # 512
        self.register_buffer("whitening", (directions * scale).T.float())      # components×512

        self.rotation = nn.Linear(components, latent_dim, bias=False)          # Q, 64×components
        nn.init.eye_(self.rotation.weight)
        self.rotation.weight.register_hook(self.tangent)

    def forward(self, teacher_mu):
        """N×512 → N×64, zero mean and unit variance over the training images."""
        # 16 bits would lose the small components that whitening magnifies.
        with torch.autocast(teacher_mu.device.type, enabled=False):
            return self.rotation(F.linear(teacher_mu - self.mean, self.whitening))

    def tangent(self, gradient):
        """The part of Q's gradient that keeps rows orthonormal to first order: G − sym(G Qᵀ) Q.

        Edelman, Arias & Smith 1998, "The geometry of algorithms with orthogonality constraints".
        """
        rotation = self.rotation.weight.detach()
        product = gradient @ rotation.T
        return gradient - 0.5 * (product + product.T) @ rotation

    @torch.no_grad()
    def retract(self):
        """Q, a step away from orthonormal rows, → the nearest matrix that has them.

        That is its polar factor (Higham 1986, "Computing the polar decomposition"), by two
        Newton–Schulz steps: matrix products alone, where a solver or a QR would make a GPU wait.
        They need singular values below √3. Adam's steps leave them near 1; after a larger one the
        matrix is scaled down by a bound of its norm first, and the next calls do the rest.
        """
        rotation = self.rotation.weight
        bound = (rotation @ rotation.T).abs().sum(1).max().sqrt()
        rotation /= (bound / 1.5).clamp_min(1)
        for _ in range(2):
            rotation.copy_(1.5 * rotation - 0.5 * (rotation @ rotation.T) @ rotation)


class FreeProjection(nn.Module):
    """A linear map from the same start, learned without constraint: it may shrink towards zero."""

    def __init__(self, teacher_mu, latent_dim):
        super().__init__()
        start = LatentProjection(teacher_mu, latent_dim)
        self.linear = nn.Linear(teacher_mu.shape[1], latent_dim)
        with torch.no_grad():
            weight = start.rotation.weight @ start.whitening
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(-weight @ start.mean)

    def forward(self, teacher_mu):
        with torch.autocast(teacher_mu.device.type, enabled=False):
            return self.linear(teacher_mu)

    def retract(self):
        """Nothing: there is no constraint to return to."""


class NoProjection(nn.Module):
    """The teacher's mu as it is: for one with the student's number of latents and a like rate."""

    def forward(self, teacher_mu):
        return teacher_mu

    def retract(self):
        """Nothing: nothing is learned."""


PROJECTIONS = ("orthonormal", "random", "fixed", "free", "identity")


def make_projection(kind, teacher_mu, latent_dim, student_mu=None):
    """A projection of the teacher's mu to the student's latents.

    Args:
        kind: `orthonormal` starts at the leading principal components and learns; `random` starts
            at random directions of the leading 128; `fixed` does not learn; `free` is a
            FreeProjection; `identity` a NoProjection.
        teacher_mu: of the training images, N×512.
        latent_dim: the student's.
        student_mu: of the same images, N×latent_dim, where the student is trained already: the
            projection then starts as near to that code as it can. From the principal components,
            the code would first have to turn.
    """
    if kind == "free":
        return FreeProjection(teacher_mu, latent_dim)
    if kind == "identity":
        return NoProjection()
    projection = LatentProjection(teacher_mu, latent_dim)
    with torch.no_grad():
        if kind == "random":
            nn.init.orthogonal_(projection.rotation.weight)
        elif student_mu is not None:
            # Orthogonal Procrustes (Schönemann 1966): Q = UVᵀ of the covariance of the two codes.
            whitened = (teacher_mu.cpu() - projection.mean) @ projection.whitening.T
            u, _, v = torch.linalg.svd(student_mu.cpu().T @ whitened, full_matrices=False)
            projection.rotation.weight.copy_(u @ v)
    return projection.requires_grad_(kind != "fixed")


def latent_distillation_loss(mu, projected, variance):
    """½ ‖mu_S − t‖² / variance / 3072, summed over latents, mean over the batch.

    The KL in nats between N(mu_S, variance · I) and N(t, variance · I), so in the unit of the KL
    term. It compares means: the noise of a sample teaches nothing.
    """
    return 0.5 * (mu - projected).square().sum(1).mean() / (variance * PIXEL_VALUES)


def output_distillation_loss(logits, teacher_logits, temperature):
    """½ T² KL(σ(l_T / T) ‖ σ(l_S / T)), mean over pixel values and the batch.

    Hinton et al. 2015, arXiv:1503.02531, with each pixel value a Bernoulli variable of logit l
    in place of a class distribution. A higher T weighs errors in dark and bright pixels, where
    the sigmoid is flat, more nearly like those in mid-grey ones; the limit is (l_T − l_S)² / 16.
    On the images themselves T would cancel: T² MSE(s/T, t/T) = MSE(s, t). The half makes a small
    error at mid-grey count as its square, so that the weight compares with reconstruction's.
    """
    # Cached logits come in fp16, which is precise enough for a value but not for differences.
    student, teacher = logits.float() / temperature, teacher_logits.float() / temperature
    divergence = (
        torch.sigmoid(teacher) * (teacher - student) + F.softplus(student) - F.softplus(teacher)
    )
    return 0.5 * temperature**2 * divergence.mean()


def perceptual_loss(vgg, reconstruction, images):
    """‖φ̂(x̂) − φ̂(x)‖² / CHW, mean over three layers of VGG16 and the batch.

    Johnson et al. 2016, arXiv:1603.08155, equation 2, on features φ̂ of unit length (`VGGFeatures`).
    A mean over channels as well as positions makes the shallow layers count most, which at 32×32
    carry the detail. The evaluation's `vgg_distance` is a sum over channels, as in LPIPS.

    Args:
        vgg: VGGFeatures.
        reconstruction, images: in [0, 1]; gradients reach the first alone.
    """
    with torch.no_grad():
        targets = vgg(images)
    found = vgg(reconstruction)
    return sum(F.mse_loss(a, b) for a, b in zip(found, targets)) / len(targets)
