"""The terms of the student's loss; distill_tinyvae.py weights and adds them. Without a teacher the
output term is `reconstruction_loss` of what is decoded from mu.

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

from common.data import PIXEL_VALUES, to_float

SMOOTHING = 0.1  # of pixel values in the output term: they end this far from 0 and 1
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


def covariance_of(teacher_mu):
    """Mean, 512, and covariance, 512×512, of the teacher's mu, N×512, in double precision."""
    codes = teacher_mu.detach().to("cpu", torch.double, copy=True)
    mean = codes.mean(0)
    codes -= mean
    return mean, codes.T @ codes / len(codes)


def inverse_root(covariance):
    """C^(−½) of a covariance C, and C's eigenvectors, that of the least variance first.

    Directions without variance, as of a collapsed teacher, cannot be whitened; a floor leaves them
    near zero.
    """
    variance, directions = torch.linalg.eigh(covariance)
    floor = 1e-6 * variance[-1].clamp_min(1e-12)
    return directions * variance.clamp_min(floor).rsqrt() @ directions.T, directions


def pixel_whitening(teacher_mu, images, components):
    """The whitened directions of the teacher's mu that explain most of the pixels, in that order.

    With C the covariance of mu and X its cross-covariance with the pixels, 512×3072: the leading
    left singular vectors of C^(−½) X, applied to C^(−½). Of all linear maps of mu of rank r, that
    through the first r of these predicts the pixels best: reduced-rank regression (Izenman 1975,
    "Reduced-rank regression for the multivariate linear model").

    Args:
        teacher_mu: of the training images, N×512.
        images: the same images, uint8, N×3×32×32.
        components: directions to return.

    Returns the mean of mu, 512, and the directions, components×512, in single precision.
    """
    mean, covariance = covariance_of(teacher_mu)
    whiten, _ = inverse_root(covariance)
    cross = torch.zeros(len(mean), images[0].numel(), dtype=torch.double)       # 512×3072
    for codes, chunk in zip(teacher_mu.split(2000), images.split(2000)):
        # The codes are centred, so the pixels need not be.
        centred = codes.detach().cpu().double() - mean
        cross += (centred.float().T @ to_float(chunk).cpu().flatten(1)).double()
    explained = whiten @ cross / len(images)
    _, directions = torch.linalg.eigh(explained @ explained.T)                  # ascending
    return mean.float(), (directions.flip(1)[:, :components].T @ whiten).float()


def principal_whitening(teacher_mu, components):
    """The same with the directions in which mu varies most: its principal components."""
    mean, covariance = covariance_of(teacher_mu)
    whiten, directions = inverse_root(covariance)
    return mean.float(), (directions.flip(1)[:, :components].T @ whiten).float()


class LatentProjection(nn.Module):
    """The teacher's 512 latents → the student's 64: learnable, and unable to collapse.

        t = Q W (mu_T − m)

    m is the mean of the teacher's mu over the training images. W, fixed, whitens 128 directions
    of mu. Q, learned, has orthonormal rows. So over the training images every t has zero mean,
    unit variance, and no correlation with another, whatever Q learns: shrinking towards a target
    that teaches nothing, or copying one easy direction into all 64, is out of reach. Learning is
    left with choosing the directions and turning them. Q starts as the identity: the 64 leading
    directions. It learns along the Stiefel manifold: its gradient is tangent to it, and `retract`
    follows each optimiser step.

    The directions are those that explain most of the pixels: `pixel_whitening`. A VAE's mu all
    have a variance near 1, so the directions in which mu varies most, its principal components
    (`principal_whitening`), say nothing about what matters for a picture.

    A plain linear map trained on ‖mu_S − P mu_T‖² has its optimum at P = 0, aided by the KL term;
    hence the fixed teachers of FitNets (arXiv:1412.6550), and the normalisation of SRD (Miles et
    al. 2023, "Understanding the role of the projector in knowledge distillation").

    Args:
        mean: m, of the teacher's mu, 512.
        whitening: W, 128×512, from the function named above.
        latent_dim: the student's latents, at most as many as W has rows.
    """

    def __init__(self, mean, whitening, latent_dim):
        super().__init__()
        self.register_buffer("mean", mean)                                     # 512
        self.register_buffer("whitening", whitening)                           # 128×512
        self.rotation = nn.Linear(len(whitening), latent_dim, bias=False)      # Q, 64×128
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

    def __init__(self, start):
        super().__init__()
        weight = start.rotation.weight @ start.whitening
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(-weight @ start.mean)

    def forward(self, teacher_mu):
        with torch.autocast(teacher_mu.device.type, enabled=False):
            return self.linear(teacher_mu)


PROJECTIONS = ("pixels", "principal", "free", "identity")


def make_projection(kind, teacher_mu, images, latent_dim, student_mu=None, components=128):
    """A projection of the teacher's mu to the student's latents.

    Args:
        kind: `pixels`, a LatentProjection that starts at the directions that explain most of the
            pixels; `principal`, one that starts at the principal components; `free`, a
            FreeProjection from the start of `pixels`; `identity`, mu as it is, for a teacher with
            the student's number of latents and a like rate.
        teacher_mu: of the training images, N×512.
        images: the same images, uint8, N×3×32×32.
        latent_dim: the student's.
        student_mu: of the same images, N×latent_dim, where the student is trained already: the
            projection then starts as near to that code as it can. From the leading directions,
            the code would first have to turn. `free` starts from these all the same.
        components: directions that Q chooses from, at most all there are; at least latent_dim.

    The teacher must have at least as many latents as the student, and there must be more images
    than the student has latents.
    """
    if kind == "identity":
        return nn.Identity()
    # Fewer images span fewer directions; but for one for each latent, none without variance.
    components = max(latent_dim, min(components, teacher_mu.shape[1], len(teacher_mu) - 1))
    if kind == "principal":
        mean, whitening = principal_whitening(teacher_mu, components)
    else:
        mean, whitening = pixel_whitening(teacher_mu, images, components)
    projection = LatentProjection(mean, whitening, latent_dim)
    if kind == "free":
        return FreeProjection(projection)
    if student_mu is not None:
        # Orthogonal Procrustes (Schönemann 1966): Q = UVᵀ of the covariance of the two codes.
        whitened = (teacher_mu.cpu() - mean) @ whitening.T
        u, _, v = torch.linalg.svd(student_mu.cpu().T @ whitened, full_matrices=False)
        with torch.no_grad():
            projection.rotation.weight.copy_(u @ v)
    return projection


def latent_distillation_loss(mu, projected):
    """½ ‖mu_S − t‖² / 3072, summed over latents, mean over the batch.

    The KL in nats between N(mu_S, I) and N(t, I), so in the unit of the KL term. It compares
    means: the noise of a sample teaches nothing.
    """
    return 0.5 * (mu - projected).square().sum(1).mean() / PIXEL_VALUES


def output_distillation_loss(logits, teacher_logits, temperature):
    """½ T² KL(σ(l_T / T) ‖ σ(l_S / T)) / 0.8², of smoothed logits l; mean over pixels and batch.

    Hinton et al. 2015, arXiv:1503.02531, with each pixel value a Bernoulli variable of logit l
    in place of a class distribution. A higher T weighs errors in dark and bright pixels, where
    the sigmoid is flat, more nearly like those in mid-grey ones; the limit is a squared difference
    of logits. On the images themselves T would cancel: T² MSE(s/T, t/T) = MSE(s, t).

    Pixel values are smoothed first (`smooth_logits`): without, at T = 3 an error at 98% of white
    counts 110 times one at mid-grey, and the student spends its code on how black black is. With
    it, 6.8 times at most. The factors make a small error at mid-grey count as its square, so that
    the weight compares with reconstruction's.
    """
    # Cached logits come in fp16, which is precise enough for a value but not for differences.
    student, teacher = (smooth_logits(x.float()) / temperature for x in (logits, teacher_logits))
    divergence = (
        torch.sigmoid(teacher) * (teacher - student) + F.softplus(student) - F.softplus(teacher)
    )
    return 0.5 * (temperature / (1 - 2 * SMOOTHING)) ** 2 * divergence.mean()


def smooth_logits(logits):
    """The logits of pixel values moved from [0, 1] to [0.1, 0.9].

    Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return (SMOOTHING + (1 - 2 * SMOOTHING) * torch.sigmoid(logits)).logit()


# --- The perceptual term ---


def without_grid(reconstruction, images):
    """The reconstructions less the grid that all of them share, so that VGG16 does not see it.

    A decoder that doubles the size in each stage can add a fixed grid of a few grey levels to
    every picture, and a network trained to have little VGG distance learns to: VGG16, this one or
    another, takes it for texture. Here the mean error of each of the 8×8 phases of a pixel's
    position, over the batch, is taken out, less the mean over the phases. That can be
    differentiated, so a grid of period 2, 4 or 8 earns nothing.

    Args:
        reconstruction, images: N×3×32×32 in [0, 1].
    """
    grid = fixed_grid(reconstruction - images, 8)                               # 3×8×8
    repeats = images.shape[-1] // 8
    return reconstruction - grid.repeat(1, repeats, repeats)


def fixed_grid(errors, period):
    """Mean of errors, N×3×32×32, in each phase of a pixel's position, 3×period×period, less the
    mean over the phases."""
    phases = errors.mean(0).unflatten(2, (-1, period)).unflatten(1, (-1, period)).mean((1, 3))
    return phases - phases.mean((1, 2), keepdim=True)


def perceptual_loss(vgg, reconstruction, images):
    """‖φ̂(x̂) − φ̂(x)‖² / CHW, mean over three layers of VGG16 and the batch.

    Johnson et al. 2016, arXiv:1603.08155, equation 2, on features φ̂ of unit length (`VGGFeatures`).
    A mean over channels as well as positions makes the shallow layers count most, which at 32×32
    carry the detail. The evaluation's `vgg_distance` is a sum over channels, as in LPIPS.

    Args:
        vgg: VGGFeatures.
        reconstruction: N×3×32×32, `without_grid`; gradients reach it alone.
        images: N×3×32×32 in [0, 1].
    """
    with torch.no_grad():
        targets = vgg(images)
    found = vgg(reconstruction)
    return sum(F.mse_loss(a, b) for a, b in zip(found, targets)) / len(targets)
