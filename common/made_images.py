"""Pictures that a teacher makes, for a student that learns from few photographs, or from none.

A code is drawn from the Gaussian with the mean and covariance of the teacher's mu, and decoded: a
blurred picture of nothing, with the statistics of the teacher's reconstructions. Gaussian noise
with the power spectrum of what reconstructions lack is added. The idea of teaching by inputs that
are no data: Lopes et al. 2017, arXiv:1710.07535.
"""

import torch

from common.data import to_float
from common.losses import covariance_of
from common.metrics import EVALUATION_BATCH, decode, encode
from common.runtime import InputError, progress_bar
from common.sources import described, load_training_images
from common.synthetic import SYNTHETIC_IMAGES

EPOCH_IMAGES = SYNTHETIC_IMAGES["train"]  # pictures in an epoch, if --limit is 0
VAL_SEED = 2**32  # beyond those of --seed


@torch.no_grad()
def code_statistics(teacher, images, precision="fp32"):
    """What `make_images` needs: how the teacher's codes, and what it leaves out, are distributed.

    Args:
        teacher: a VAE in evaluation mode.
        images: its training images, uint8, N×3×32×32, on its device.
        precision: of the networks.

    Returns `codes`, with the mean, D, and covariance, D×D, of mu; and `residual_spectrum`,
    32×17×3×3, complex: the covariance of the three colours of image − reconstruction at each
    frequency of an orthonormal rfft2.
    """
    mus, spectrum = [], 0
    for chunk in images.split(EVALUATION_BATCH):
        batch = to_float(chunk)
        mu, _ = encode(teacher, batch, precision)
        mus.append(mu)
        waves = torch.fft.rfft2((batch - decode(teacher, mu, precision)).cpu(), norm="ortho")
        spectrum = spectrum + torch.einsum("nchw,ndhw->hwcd", waves, waves.conj())
    mean, covariance = covariance_of(torch.cat(mus))
    return {
        "codes": {"mean": mean.float(), "covariance": covariance.float()},
        "residual_spectrum": spectrum / len(images),
    }


def standard_normal(latent_dim):
    """The same of a teacher of which nothing is known."""
    codes = {"mean": torch.zeros(latent_dim), "covariance": torch.eye(latent_dim)}
    return {"codes": codes, "residual_spectrum": torch.zeros(32, 17, 3, 3, dtype=torch.cfloat)}


def square_root(covariance):
    """The root R of a covariance, or of each of many, ...×D×D: R Rᴴ is that. ValueError if it is
    none."""
    variances, directions = torch.linalg.eigh(covariance)  # ascending; reads the lower triangle
    is_covariance = torch.allclose(covariance, covariance.mH, atol=1e-5)
    largest = variances[..., -1]
    if not (is_covariance and (variances[..., 0] >= -1e-4 * largest).all()):  # not so for NaN
        raise ValueError
    return directions * variances.clamp_min(0).sqrt()[..., None, :] @ directions.mH


def read_statistics(statistics, latent_dim, path):
    """The mean of the codes, the root of their covariance, and those of the spectrum.

    Raises InputError for what is not the distribution of so many latents.
    """
    try:
        mean, covariance = (statistics["codes"][name] for name in ("mean", "covariance"))
        spectrum = statistics["residual_spectrum"]
        shapes = [tuple(tensor.shape) for tensor in (mean, covariance, spectrum)]
        if shapes != [(latent_dim,), (latent_dim, latent_dim), (32, 17, 3, 3)]:
            raise ValueError
        if not mean.isfinite().all() or covariance.trace() < 1e-3 * latent_dim:
            raise ValueError
        return mean, square_root(covariance.double()).float(), square_root(spectrum)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
        raise InputError(
            f"{path} cannot make pictures, since it does not hold the mean and covariance of "
            f"{latent_dim} latents that vary: name another --teacher, or --teacher-images 0"
        ) from None


@torch.no_grad()
def make_images(teacher, statistics, count, seed, path="the teacher"):
    """Pictures made by a teacher, uint8, count×3×32×32, on the CPU; the same for the same seed.

    Args:
        teacher: a VAE in evaluation mode.
        statistics: of `code_statistics`.
        count: of pictures.
        seed: of codes and noise.
        path: the teacher's, for errors.

    Raises InputError for statistics that do not fit the teacher.
    """
    mean, code_root, noise_root = read_statistics(statistics, teacher.latent_dim, path)
    generator = torch.Generator().manual_seed(seed)
    device = next(teacher.parameters()).device
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    chunks = images.split(EVALUATION_BATCH)
    for chunk in progress_bar(chunks, desc="the teacher makes pictures", unit="batch"):
        codes = torch.randn(len(chunk), len(mean), generator=generator) @ code_root.T + mean
        white = torch.randn(chunk.shape, generator=generator)
        waves = torch.einsum("hwcd,ndhw->nchw", noise_root, torch.fft.rfft2(white, norm="ortho"))
        noise = torch.fft.irfft2(waves, s=(32, 32), norm="ortho")
        pixels = (decode(teacher, codes.to(device), "fp32").cpu() + noise).clamp(0, 1)
        chunk.copy_((255 * pixels).round())
    return images


def training_images(
    data, limit, fraction, seed, teacher=None, checkpoint=None, path=None, skip_unreadable=False
):
    """The training images of a source, with those that the teacher makes, in random order.

    Photographs are repeated, so that an epoch has 45,000 pictures in all, or as many as it takes to
    show each photograph once.

    Args:
        data, limit, skip_unreadable: as of `load_training_images`; without data, None, all pictures
            are made, the held-out ones too, and the limit, or else 45,000, is how many.
        fraction: of the pictures that are made.
        seed: of those.
        teacher, checkpoint, path: the teacher in evaluation mode, what its file says, its file.

    Raises InputError for images that cannot be loaded, and for a teacher that cannot make any.
    """
    photographs = load_training_images(data, limit, skip_unreadable) if data else None
    if photographs and not fraction:
        return photographs
    if "codes" in checkpoint:
        statistics = checkpoint
    elif photographs:
        print(f"{path} does not say how its codes are distributed: measured on {data}")
        statistics = code_statistics(teacher, photographs.train)
    else:
        print(
            f"Warning: {path} does not say how its codes are distributed: they are drawn from "
            "N(0, I), and nothing is added to the pictures, which makes a worse student"
        )
        statistics = standard_normal(teacher.latent_dim)
    if not photographs:
        count = limit or EPOCH_IMAGES
        held_out = min(max(2, count // 9), SYNTHETIC_IMAGES["val"])
        train = make_images(teacher, statistics, count, seed, path)
        val = make_images(teacher, statistics, held_out, VAL_SEED + seed, path)
        images, made = described("none", train, val), count
    else:
        real = photographs.train
        count = EPOCH_IMAGES
        if fraction < 1:
            count = max(count, round(len(real) / (1 - fraction)))
        made = round(fraction * count)
        shown = real[torch.arange(count - made) % len(real)]
        train = torch.cat([shown, make_images(teacher, statistics, made, seed, path)])
        train = train[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
        images = described(data, train, photographs.val)
        images.record.update(photographs.record | images.record)
        images.record["photographs"] = len(real)
    images.record["made_images"] = made
    return images
