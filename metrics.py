"""How good a reconstruction is, what a code carries, how fast a model runs, and the PCA floor.

Everything takes images as uint8, N×3×32×32, compares pixels in [0, 1], and decodes from mu.
"""

import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import to_float
from losses import kl_divergence
from runtime import autocast

EVALUATION_BATCH = 500  # images at once
ACTIVE_VARIANCE = 0.01  # a latent whose mu varies less than this carries nothing

# --- Reconstruction ---


def psnr(mse):
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1], elementwise."""
    return -10 * torch.log10(mse)


def ssim(images, others):
    """Structural similarity of each pair of images in [0, 1]: N numbers, 1 for equal images.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity":
    11×11 Gaussian window of sigma 1.5, population variances, K1 = 0.01, K2 = 0.03. Only windows
    that lie wholly inside count (22×22 of them at 32×32); the mean is over these and the colours.
    """
    offsets = torch.arange(11, device=images.device) - 5.0
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    kernel = torch.outer(window, window).expand(3, 1, 11, 11)

    def local_mean(x):
        return F.conv2d(x, kernel, groups=3)

    mean_x, mean_y = local_mean(images), local_mean(others)
    variance_x = local_mean(images.square()) - mean_x.square()
    variance_y = local_mean(others.square()) - mean_y.square()
    covariance = local_mean(images * others) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


@torch.no_grad()
def evaluate_images(reconstruct, images, with_ssim=False):
    """Mean over images of MSE, PSNR (dB) and, if asked for, SSIM of `reconstruct(batch)`."""
    found = {"mse": [], "psnr": []} | ({"ssim": []} if with_ssim else {})
    for chunk in images.split(EVALUATION_BATCH):
        batch = to_float(chunk)
        reconstruction = reconstruct(batch)
        mse = (reconstruction - batch).square().mean((1, 2, 3))
        found["mse"].append(mse)
        found["psnr"].append(psnr(mse))
        if with_ssim:
            found["ssim"].append(ssim(reconstruction, batch))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


# --- VAEs ---


@torch.no_grad()
def evaluate_vae(vae, images, precision="fp32", with_ssim=False):
    """What `evaluate_images` finds, and the code's rate. Leaves the model in evaluation mode.

    kl_nats is the total KL of an image in nats, kl_per_latent its share per latent, active_dims
    the number of latents whose mu has a variance above 0.01 over the images (Burda et al. 2015,
    arXiv:1509.00519).
    """
    vae.eval()
    codes = []

    def reconstruct(batch):
        with autocast(batch.device, precision):
            mu, logvar = vae.encode(batch)
            reconstruction = vae.decode(mu)
        codes.append((mu.float(), logvar.float()))
        return reconstruction.float()

    found = evaluate_images(reconstruct, images, with_ssim)
    mu, logvar = (torch.cat(values) for values in zip(*codes))
    kl_nats = kl_divergence(mu, logvar).sum(1).mean().item()
    return found | {
        "kl_nats": kl_nats,
        "kl_per_latent": kl_nats / vae.latent_dim,
        "active_dims": int((mu.var(0, correction=0) > ACTIVE_VARIANCE).sum()),
    }


def effective_rank(codes):
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007) of N×D codes.

    D where all directions vary alike and are uncorrelated, 1 where all dimensions are copies.
    """
    singular = torch.linalg.svdvals((codes - codes.mean(0)).cpu())
    share = singular / singular.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


# --- PCA, the floor ---


class PCA(NamedTuple):
    mean: torch.Tensor        # 3072
    components: torch.Tensor  # K×3072, orthonormal rows

    def reconstruct(self, images):
        """Images in [0, 1] → their reconstruction from K numbers, clamped to [0, 1]."""
        codes = (images.flatten(1) - self.mean) @ self.components.T
        return (codes @ self.components + self.mean).clamp(0, 1).view_as(images)


@torch.no_grad()
def fit_pca(images, components):
    """The leading principal components of the images, on their device."""
    total, products = 0, 0
    for chunk in images.split(5_000):
        pixels = to_float(chunk).flatten(1)
        total = total + pixels.sum(0)
        products = products + pixels.T @ pixels
    mean = total / len(images)
    covariance = products / len(images) - torch.outer(mean, mean)
    # In double: some builds of PyTorch cannot do a matrix of this size in single precision.
    _, directions = torch.linalg.eigh(covariance.cpu().double())  # ascending
    leading = directions[:, -components:].flip(1).T.float().contiguous()
    return PCA(mean, leading.to(images.device))


# --- Speed ---


@torch.no_grad()
def seconds_per_batch(vae, images, precision="fp32", repeats=30):
    """Median time of one encode and decode of a batch of float images, warm and synchronised."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        images.device.type, lambda: None
    )
    vae.eval()
    checks, vae.check_range = vae.check_range, False  # looking at the pixels is not the model
    times = []
    for i in range(repeats + 5):  # the first five warm up
        synchronize()
        start = time.perf_counter()
        with autocast(images.device, precision):
            vae.decode(vae.encode(images)[0])
        synchronize()
        if i >= 5:
            times.append(time.perf_counter() - start)
    vae.check_range = checks
    return statistics.median(times)
