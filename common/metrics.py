"""How good a reconstruction is, what the latents carry, how fast a model runs; the baseline, PCA.

Whole splits are taken as uint8, N×3×32×32, batches as floating point. Pixels are compared in
[0, 1], decoded from mu, in `sampled_mse` from a sample.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.data import IMAGE_SHAPE, to_float
from common.losses import fixed_grid, kl_divergence
from common.runtime import autocast

EVALUATION_BATCH = 500  # images at once
ACTIVE_VARIANCE = 0.01  # a latent whose mu varies less than this carries nothing

# --- Reconstruction ---


def psnr(mse):
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1], elementwise."""
    return -10 * torch.log10(mse)


def ssim(images, others):
    """Structural similarity of each pair of images in [0, 1]: N numbers, 1 for equal images.

    With the settings of Wang et al. 2004, "Image quality assessment: from error visibility to
    structural similarity": 11×11 Gaussian window of sigma 1.5, population variances. The mean is
    over the windows wholly inside, and the colours.
    """
    from skimage.metrics import structural_similarity  # here, since it is slow to load

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(images.cpu().numpy(), others.cpu().numpy())
    similarities = [structural_similarity(a, b, channel_axis=0, data_range=1, **settings)
                    for a, b in pairs]
    return torch.tensor(similarities)


@torch.no_grad()
def evaluate_images(reconstruct, images, in_full=False):
    """Mean over images of MSE and PSNR (dB) of `reconstruct(batch)`.

    With `in_full` also SSIM; luma_kept and chroma_kept, how much of the brightness and colour
    within an image is kept: the slope of a least-squares line of reconstruction on original over
    all pixels, each less its mean over the image; mean_chroma_kept, the same of these means. Those
    are left out of which the originals have nothing, as of colour in grey images. And grid_2,
    grid_4 and grid_8: the largest size of a grid of that period in pixels that all reconstructions
    share (`fixed_grid`), which VGG16 takes for texture.
    """
    columns = {"mse": [], "psnr": []} | ({"ssim": []} if in_full else {})
    products = torch.zeros(3, 2, device=images.device)
    error = torch.zeros(IMAGE_SHAPE, device=images.device)
    for chunk in images.split(EVALUATION_BATCH):
        batch = to_float(chunk)
        reconstruction = reconstruct(batch)
        mse = (reconstruction - batch).square().mean((1, 2, 3))
        columns["mse"].append(mse)
        columns["psnr"].append(psnr(mse))
        if in_full:
            columns["ssim"].append(ssim(reconstruction, batch))
            products += detail_products(batch, reconstruction)
            error += (reconstruction - batch).sum(0)
    figures = {name: torch.cat(values).mean().item() for name, values in columns.items()}
    names = ("luma_kept", "chroma_kept", "mean_chroma_kept")
    for name, (product, square) in zip(names, products.tolist()):
        if square > 1e-6 * len(images):
            figures[name] = product / square
    if in_full:
        for period in (2, 4, 8):
            grid = fixed_grid(error[None] / len(images), period)
            figures[f"grid_{period}"] = grid.abs().max().item()
    return figures


def luma_chroma(images):
    """RGB in [0, 1] → brightness, N×1×H×W, and two colour differences, N×2×H×W (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma, torch.cat([0.564 * (blue - luma), 0.713 * (red - luma)], 1)


def detail_products(images, others):
    """For brightness within an image, colour within an image, and its mean colour: the sums of
    original × other and of original², 3×2."""
    (luma, chroma), (luma_out, chroma_out) = map(luma_chroma, (images, others))
    mean, mean_out = (x.mean((2, 3), keepdim=True) for x in (chroma, chroma_out))
    pairs = (
        (luma - luma.mean((2, 3), keepdim=True), luma_out),
        (chroma - mean, chroma_out),
        (mean, mean_out),
    )
    sums = [[(original * other).sum(), original.square().sum()] for original, other in pairs]
    return torch.stack([torch.stack(pair) for pair in sums])


# --- VAEs ---


def encode(vae, batch, precision):
    """mu and logvar of float images, in single precision."""
    with autocast(batch.device, precision):
        mu, logvar = vae.encode(batch)
    return mu.float(), logvar.float()


def decode(vae, z, precision):
    """Images of latents, in single precision."""
    with autocast(z.device, precision):
        return vae.decode(z).float()


@torch.no_grad()
def evaluate_vae(vae, images, precision="fp32", in_full=False):
    """The figures of `evaluate_images`, and of the code. Leaves the model in evaluation mode.

    kl_nats is the total KL of an image in nats, kl_per_latent the same divided by the latents,
    active_dims the number of latents whose mu has a variance above 0.01 over the images (Burda et
    al. 2015, arXiv:1509.00519).
    """
    vae.eval()
    codes = []

    def reconstruct(batch):
        codes.append(encode(vae, batch, precision))
        return decode(vae, codes[-1][0], precision)

    figures = evaluate_images(reconstruct, images, in_full)
    mu, logvar = (torch.cat(values) for values in zip(*codes))
    kl_nats = kl_divergence(mu, logvar).sum(1).mean().item()
    return figures | {
        "kl_nats": kl_nats,
        "kl_per_latent": kl_nats / vae.latent_dim,
        "active_dims": count_active(mu),
    }


def count_active(mu):
    """How many latents carry anything: those whose mu varies over the images."""
    return int((mu.var(0, correction=0) > ACTIVE_VARIANCE).sum())


@torch.no_grad()
def sampled_mse(vae, images, precision="fp32"):
    """Mean squared error of reconstructions from a sample of q(z|x), not from its mean: what a code
    of that many nats carries (bits back, Hinton & van Camp 1993). Leaves the random state alone.
    """
    vae.eval()
    generator = torch.Generator().manual_seed(0)  # of the CPU, the same for any device

    def reconstruct(batch):
        mu, logvar = encode(vae, batch, precision)
        noise = torch.randn(mu.shape, generator=generator).to(mu.device)
        return decode(vae, vae.reparameterize(mu, logvar, noise), precision)

    return evaluate_images(reconstruct, images)["mse"]


@torch.no_grad()
def encode_means(vae, images, precision="fp32"):
    """mu of images, N×latent_dim. Leaves the model in evaluation mode."""
    vae.eval()
    chunks = images.split(EVALUATION_BATCH)
    return torch.cat([encode(vae, to_float(chunk), precision)[0] for chunk in chunks])


def evaluate_code(vae, held_out, train, teacher_mu=None):
    """How mu compares with the teacher's, and how well it tells classes apart, in fp32.

    Args:
        vae: the model.
        held_out: Split to measure on.
        train: Split whose codes the classifiers learn from.
        teacher_mu: the teacher's mu of the held-out images, or None.

    Returns cka, with a teacher, and knn_accuracy and probe_accuracy, where both splits have labels
    and there are two classes or more.
    """
    mu = encode_means(vae, held_out.images)
    figures = {} if teacher_mu is None else {"cka": linear_cka(mu, teacher_mu)}
    is_labelled = held_out.labels is not None and train.labels is not None
    if is_labelled and len(train.labels.unique()) > 1:
        known = encode_means(vae, train.images), train.labels
        figures["knn_accuracy"] = nearest_neighbour_accuracy(*known, mu, held_out.labels)
        figures["probe_accuracy"] = linear_probe_accuracy(*known, mu, held_out.labels)
    return figures


def linear_cka(codes, others):
    """Linear centred kernel alignment of two codes of the same images, N×D and N×E (Kornblith et
    al. 2019, arXiv:1905.00414): 1 where one is a rotation and scaling of the other, 0 where they
    are uncorrelated."""
    # On the CPU, since Apple's GPUs have no double precision.
    x, y = (code - code.mean(0) for code in (codes.cpu().double(), others.cpu().double()))
    return ((x.T @ y).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def nearest_neighbour_accuracy(codes, labels, test_codes, test_labels, neighbours=5):
    """Fraction of test images whose class is the commonest of their nearest training codes'.

    Euclidean distance; a tie goes to the class whose nearest member is nearest.
    """
    from sklearn.neighbors import KNeighborsClassifier  # here, since it is slow to load

    def votes(distances):  # nearest first: 1, plus a little that decides ties and nothing else
        each = 1 + 0.1 * 0.5 ** np.arange(distances.shape[1])
        return np.tile(each, (len(distances), 1))

    classifier = KNeighborsClassifier(min(neighbours, len(codes)), weights=votes)
    classifier.fit(codes.cpu().numpy(), labels.cpu().numpy())
    return classifier.score(test_codes.cpu().numpy(), test_labels.cpu().numpy())


def linear_probe_accuracy(codes, labels, test_codes, test_labels):
    """Test accuracy of softmax regression on standardised codes, fitted to convergence; a slight
    penalty, 1e-4 ‖w‖² beside the mean loss, keeps the optimum finite."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # scikit-learn minimises the sum of losses × C + ½ ‖w‖².
    regression = LogisticRegression(C=1 / (2e-4 * len(codes)), max_iter=1000)
    probe = make_pipeline(StandardScaler(), regression)
    probe.fit(codes.cpu().numpy(), labels.cpu().numpy())
    return probe.score(test_codes.cpu().numpy(), test_labels.cpu().numpy())


class SwappedVAE(nn.Module):
    """One VAE's encoder and another's decoder: an image may be encoded by a student on a device,
    and decoded by its teacher elsewhere.

    `code_map` is the linear map from the encoder's mu to the decoder's, by least squares.

    Args:
        encoder, decoder: the VAEs, in evaluation mode.
        encoder_mu, decoder_mu: of the same images, that the map is fitted to, N×D and N×E.
    """

    def __init__(self, encoder, decoder, encoder_mu, decoder_mu):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.code_map = fit_linear(encoder_mu, decoder_mu)

    def encode(self, images):
        mu, logvar = self.encoder.encode(images)
        return self.code_map(mu), logvar

    def decode(self, z):
        return self.decoder.decode(z)


def fit_linear(inputs, outputs):
    """The affine map of least squares from N×D to N×E."""
    x, y = inputs.cpu().double(), outputs.cpu().double()
    weights = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    linear = nn.Linear(*weights.shape, device=inputs.device)
    with torch.no_grad():
        linear.weight.copy_(weights.T)
        linear.bias.copy_(y.mean(0) - x.mean(0) @ weights)
    return linear.requires_grad_(False)


def explained_variance(codes, predicted):
    """R²: the share of the variance of codes, N×D, that their prediction explains."""
    residual = (predicted - codes).square().sum()
    return 1 - (residual / (codes - codes.mean(0)).square().sum()).item()


# --- Distances of VGG16 features ---


def vgg_distances(vgg, images, others):
    """Distance of each pair of images in [0, 1], N numbers: 0 for equal images, at most 2.

    The squared distance of unit features, summed over channels; mean over positions and the three
    layers: LPIPS without its learned weights (Zhang et al. 2018, arXiv:1801.03924). The loss weighs
    the layers otherwise: `perceptual_loss`.
    """
    layers = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(vgg(images), vgg(others))]
    return torch.stack(layers).mean(0)


@torch.no_grad()
def vgg_distance(vae, images, judge):
    """Mean VGG distance of uint8 images from their reconstructions. `judge` is a VGGFeatures that
    the model was not trained to please."""
    vae.eval()
    total = 0
    for chunk in images.split(EVALUATION_BATCH):
        batch = to_float(chunk)
        reconstruction = vae.decode(vae.encode(batch)[0])
        total += vgg_distances(judge, reconstruction, batch).sum().item()
    return total / len(images)


@torch.no_grad()
def interpolation_unevenness(vae, images, judge, steps=8):
    """How unevenly straight lines in latent space change what is seen: 0 for perfectly even.

    The line between the mu of two consecutive images is decoded at steps + 1 points. The standard
    deviation of the root of the VGG distance from each to the next, over its mean; mean over pairs.
    """
    vae.eval()
    unevenness = []
    for chunk in images[: len(images) // 2 * 2].split(100):
        mu, _ = vae.encode(to_float(chunk))
        weights = torch.linspace(0, 1, steps + 1, device=mu.device)[:, None, None]
        points = torch.lerp(mu[0::2], mu[1::2], weights)                       # points×pairs×D
        decoded = vae.decode(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        lengths = vgg_distances(judge, decoded[1:].flatten(0, 1), decoded[:-1].flatten(0, 1))
        lengths = lengths.unflatten(0, (steps, -1)).sqrt()
        # Two images that are the same are joined by a line without length.
        unevenness.append(lengths.std(0) / lengths.mean(0).clamp_min(1e-12))
    return torch.cat(unevenness).mean().item()


# --- The baseline ---


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


def median_seconds(work, device, repeats=30):
    """Median time of `work()` on a device, warm and synchronised."""

    def clock():
        if device.type in ("cuda", "mps"):  # a CPU has always finished its work
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    for _ in range(5):
        work()
    seconds = []
    for _ in range(repeats):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


@torch.no_grad()
def seconds_per_batch(vae, images, precision):
    """Median time of one encode and decode of a batch of float images."""
    return median_seconds(
        lambda: decode(vae, encode(vae, images, precision)[0], precision), images.device
    )
