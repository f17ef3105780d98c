"""Our own arithmetic against independent implementations: scikit-image, scikit-learn, lpips, SciPy,
torch.distributions, finite differences. On random data, several seeds."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA

from common import data, losses, metrics, vgg
from tests.testing import random_images, random_normal

seeds = pytest.mark.parametrize("seed", range(5))


def smooth_images(count, seed):
    """Images whose neighbouring pixels are alike, and noisier copies of them."""
    coarse = random_images(count, seed)[:, :, ::4, ::4]
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    noise = 0.1 * random_normal(*images.shape, seed=seed)
    return images, (images + noise).clamp(0, 1)


# --- Metrics ---


def test_pca_is_that_of_scikit_learn():
    images = (255 * smooth_images(300, 0)[1]).to(torch.uint8)
    ours = metrics.fit_pca(images, 20)
    pixels = images.flatten(1).double().numpy() / 255
    theirs = PCA(svd_solver="full").fit(pixels)
    directions = theirs.components_[:20]
    expected = (pixels - theirs.mean_) @ directions.T @ directions + theirs.mean_
    reconstructed = ours.reconstruct(images.float() / 255).flatten(1)
    np.testing.assert_allclose(reconstructed, expected.clip(0, 1), atol=2e-4)


@seeds
def test_cka_is_the_hilbert_schmidt_criterion_of_the_textbook(seed):
    """HSIC(K, L) = tr(K H L H) with Gram matrices of images (Gretton et al. 2005)."""
    x, y = random_normal(40, 7, seed=seed).double(), random_normal(40, 5, seed=seed + 50).double()
    y[:, :3] += x[:, :3]
    centring = torch.eye(40).double() - 1 / 40

    def hsic(a, b):
        return torch.trace(a @ a.T @ centring @ b @ b.T @ centring)

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert metrics.linear_cka(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert 0.05 < expected < 0.95


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of lpips, which knows an older torchvision
def test_the_vgg_distance_is_lpips_without_learned_weights():
    lpips = pytest.importorskip("lpips")
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, lpips=False, verbose=False)
    layers = [layer for part in ("slice1", "slice2", "slice3")
              for layer in getattr(reference.net, part)]
    features = vgg.VGGFeatures(torch.nn.Sequential(*copy.deepcopy(layers)))
    images, others = smooth_images(4, 0)
    with torch.no_grad():
        _, parts = reference(images, others, retPerLayer=True, normalize=True)
    expected = sum(parts[:3]).flatten() / 3  # through relu3_3
    torch.testing.assert_close(metrics.vgg_distances(features, images, others), expected)


# --- Losses ---


@seeds
def test_the_directions_of_the_projection_are_those_of_reduced_rank_regression(seed):
    """The first r of them predict the pixels as well as any r directions of mu can: as the least
    squares fit, cut to rank r (Izenman 1975)."""
    images = (255 * random_images(400, seed=seed)).to(torch.uint8)
    mixing = random_normal(3072, 24, seed=seed + 50)
    mu = (data.to_float(images).flatten(1) - 0.5) @ mixing
    mu = mu + 20 * random_normal(400, 24, seed=seed + 100) + 3
    _, whitening = losses.pixel_whitening(mu, images, 12)
    x = (mu - mu.mean(0)).double().numpy()
    y = data.to_float(images).flatten(1).double().numpy()
    y = y - y.mean(0)
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    squares = np.linalg.svd(fitted, compute_uv=False) ** 2
    for rank in (1, 5, 12):
        codes = x @ whitening[:rank].double().numpy().T
        explained = np.square(codes @ np.linalg.lstsq(codes, y, rcond=None)[0]).sum()
        np.testing.assert_allclose(explained, squares[:rank].sum(), rtol=1e-5)


@seeds
def test_the_projections_gradient_is_the_part_along_its_manifold(seed):
    """By the definition: it is tangent there, and what is left out is normal to all that is."""
    projection = losses.LatentProjection(torch.zeros(24), torch.eye(12, 24), 6)
    rotation = torch.linalg.qr(random_normal(12, 6, seed=seed)).Q.T
    with torch.no_grad():
        projection.rotation.weight.copy_(rotation)
    gradient = random_normal(6, 12, seed=seed + 50)
    tangent = projection.tangent(gradient)
    torch.testing.assert_close(tangent @ rotation.T, -rotation @ tangent.T, atol=1e-5, rtol=0)
    skew = random_normal(6, 6, seed=seed + 100)
    across = random_normal(6, 12, seed=seed + 150)
    others = ((skew - skew.T) @ rotation, across - across @ rotation.T @ rotation)
    for other in others:  # together they span the tangent space
        assert ((gradient - tangent) * other).sum().abs() < 1e-4


@seeds
def test_the_projection_returns_to_scipys_polar_factor(seed):
    projection = losses.LatentProjection(torch.zeros(24), torch.eye(12, 24), 6)
    start = projection.rotation.weight.detach().clone()
    moved = start + 0.01 * random_normal(6, 12, seed=seed)
    with torch.no_grad():
        projection.rotation.weight.copy_(moved)
    projection.retract()
    factor, _ = scipy.linalg.polar(moved.double().numpy(), side="left")
    np.testing.assert_allclose(projection.rotation.weight.detach(), factor, atol=1e-5)
