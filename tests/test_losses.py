"""The terms of the loss, and the projection of the teacher's code, in depth. test_references.py
compares them with other libraries."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import distill_tinyvae
from common import losses, vgg
from common.runtime import InputError
from tests.testing import random_images, random_normal, student_objective

# --- Losses ---


def test_kl_is_that_of_the_textbook_and_never_negative():
    mu, logvar = random_normal(50, 64), random_normal(50, 64, seed=1)
    kl = losses.kl_divergence(mu, logvar)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-5)
    assert kl.min() >= 0
    assert losses.kl_divergence(torch.zeros(1, 64), torch.zeros(1, 64)).abs().max() == 0
    torch.testing.assert_close(losses.kl_loss(mu, logvar), kl.sum() / 50 / 3072)


def test_latent_term_is_the_divergence_of_two_gaussians():
    mu, projected = random_normal(8, 64), random_normal(8, 64, seed=1)
    student, teacher = (torch.distributions.Normal(mean, 1.0) for mean in (mu, projected))
    expected = torch.distributions.kl_divergence(student, teacher).sum(1).mean() / 3072
    torch.testing.assert_close(losses.latent_distillation_loss(mu, projected), expected)


def test_output_term_is_a_softened_bernoulli_divergence_of_smoothed_pixels():
    student, teacher = random_normal(2, 3, 32, 32), random_normal(2, 3, 32, 32, seed=1)
    smoothed = [(0.1 + 0.8 * torch.sigmoid(logits)).logit() for logits in (teacher, student)]
    soft = [torch.distributions.Bernoulli(logits=logits / 3) for logits in smoothed]
    expected = 4.5 * torch.distributions.kl_divergence(*soft).mean() / 0.64
    torch.testing.assert_close(losses.output_distillation_loss(student, teacher, 3.0), expected)
    assert losses.output_distillation_loss(teacher, teacher, 3.0).abs() < 1e-6
    half = losses.output_distillation_loss(student, teacher.half(), 3.0)  # as they are cached
    torch.testing.assert_close(half, expected, rtol=1e-3, atol=0)
    flat = losses.output_distillation_loss(student, teacher, 30.0)  # nearly the limit of large T
    limit = (smoothed[0] - smoothed[1]).square().mean() / 16 / 0.64
    torch.testing.assert_close(flat, limit, rtol=0.01, atol=0)

    def error(level, temperature=3.0):  # of 0.01, compared with its square
        pair = torch.tensor([level, level + 0.01]).logit().split(1)
        return losses.output_distillation_loss(*pair, temperature).item() / 0.01**2

    assert error(0.495) == pytest.approx(1, rel=0.01)
    assert 5.5 < error(0.005) < 6.8 and error(0.005, temperature=1) < 3
    black = losses.output_distillation_loss(torch.tensor([-90.0]), torch.tensor([90.0]), 3.0)
    assert black.isfinite()


def test_temperature_turns_the_gradient():
    teacher = 4 * random_normal(2, 3, 32, 32, seed=1)

    def gradient(temperature):
        logits = random_normal(2, 3, 32, 32).requires_grad_()
        losses.output_distillation_loss(logits, teacher, temperature).backward()
        return logits.grad.flatten()

    # Not the same direction at another length, which a weight could do as well.
    assert F.cosine_similarity(gradient(1.0), gradient(3.0), dim=0) < 0.998


def test_perceptual_term_sees_differences_and_trains_only_the_images():
    layers, record = vgg.load_vgg16("random", seed=0)
    assert record["vgg_weights"] == "random, seed 0"
    features = vgg.VGGFeatures(layers)
    perceptual = functools.partial(losses.perceptual_loss, features)
    images = random_images(2)
    near = (images + 0.02 * random_normal(2, 3, 32, 32)).clamp(0, 1).requires_grad_()
    assert perceptual(images, images) == 0
    assert 0 < perceptual(near, images) < perceptual(random_images(2, seed=1), images)
    perceptual(near, images).backward()
    assert near.grad.abs().max() > 0
    assert all(not parameter.requires_grad for parameter in features.parameters())
    for layer in features(images):
        torch.testing.assert_close(layer.norm(dim=1), torch.ones_like(layer[:, 0]))
    # A mean over channels and positions of each layer, then over the layers.
    layers = lambda x: [x, 2 * x, x[:, :1]]  # noqa: E731
    change = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected = (0.14 / 3 + 4 * 0.14 / 3 + 0.01) / 3
    assert losses.perceptual_loss(layers, images + change, images) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("around", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vgg16_has_a_precision_of_its_own(dtype, around):
    layers, _ = vgg.load_vgg16("random", seed=0)
    images = random_images(2)
    exact = vgg.VGGFeatures(copy.deepcopy(layers))(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=around == torch.bfloat16):
        features = vgg.VGGFeatures(layers, dtype)(images)
    for layer, same in zip(features, exact):
        assert layer.dtype == torch.float32
        assert torch.equal(layer, same) == (dtype == torch.float32)
        torch.testing.assert_close(layer, same, atol=0.01, rtol=0)


def test_a_grid_that_all_reconstructions_share_is_not_seen_and_earns_nothing():
    images, reconstruction = random_images(16), random_images(16, seed=1)
    free = losses.without_grid(reconstruction, images)
    for period in (2, 4, 8):
        grid = 0.1 * random_normal(3, period, period, seed=period)
        tiled = grid.repeat(1, 32 // period, 32 // period)
        overall = grid.mean((1, 2)).view(3, 1, 1)  # a shift of the brightness is no grid
        torch.testing.assert_close(
            losses.without_grid(reconstruction + tiled, images), free + overall
        )
        added, before = (
            losses.fixed_grid(x - images, period) for x in (reconstruction + tiled, reconstruction)
        )
        torch.testing.assert_close(added - before, grid - overall)
    assert losses.fixed_grid(free - images, 8).abs().max() < 1e-6
    # What is compared has no slope along a grid, whatever compares it.
    size = torch.zeros((), requires_grad=True)
    tiled = random_normal(3, 8, 8).repeat(1, 4, 4)
    tiled = tiled - tiled.mean((1, 2), keepdim=True)
    looked_at = losses.without_grid(reconstruction + size * tiled, images)
    (looked_at[:4] * random_normal(4, 3, 32, 32)).sum().backward()
    assert size.grad.abs() < 1e-3


def test_vgg16_comes_from_where_it_is_said_to(tmp_path):
    layers, record = vgg.load_vgg16("random", seed=1)
    assert record != vgg.load_vgg16("random", seed=2)[1]
    weights = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    torch.save(weights | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    loaded, loaded_record = vgg.load_vgg16(str(tmp_path / "vgg.pth"))
    assert loaded_record["vgg_sha256"] == record["vgg_sha256"]
    assert torch.equal(loaded(random_images(1)), layers(random_images(1)))
    assert vgg.load_vgg16("none") == (None, {"vgg_weights": "none", "vgg_sha256": ""})

    with pytest.raises(InputError, match="there is no file imagnet: name imagenet, random"):
        vgg.load_vgg16("imagnet")
    weights["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"are not VGG16's: 0\.weight is \[64, 3, 5, 5\], not"):
        vgg.load_vgg16(str(tmp_path / "vgg.pth"))
    del weights["features.0.weight"]
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"features\.0\.weight is missing"):
        vgg.load_vgg16(str(tmp_path / "vgg.pth"))


# --- The projection of the teacher's code ---


def correlated_mu():
    """Codes as a teacher's are: correlated, off centre, with directions that hardly vary."""
    scale = torch.logspace(0, -2, 96)
    return (random_normal(2000, 96, seed=1) * scale) @ random_normal(96, 96) + 3


def images_of(mu):
    """Noisy images that depend on a code, on its last directions most."""
    weight = torch.linspace(0, 1, mu.shape[1])[:, None]
    mixing = weight * random_normal(mu.shape[1], 3072)
    pixels = 0.5 + 0.02 * (mu - mu.mean(0)) / mu.std(0) @ mixing
    pixels = pixels + 0.05 * random_normal(len(mu), 3072, seed=1)
    return (255 * pixels.clamp(0, 1)).to(torch.uint8).view(-1, 3, 32, 32)


def project(mu, latent_dim=16, components=32, kind="pixels"):
    return losses.make_projection(kind, mu, images_of(mu), latent_dim, None, components)


@pytest.mark.parametrize("kind", ["pixels", "principal"])
def test_projection_is_white(kind):
    mu = correlated_mu()
    projected = project(mu, kind=kind)(mu)
    torch.testing.assert_close(projected.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    covariance = projected.T @ projected / len(mu)
    torch.testing.assert_close(covariance, torch.eye(16), atol=1e-2, rtol=0)


def test_projection_starts_at_the_directions_that_explain_most_of_the_pixels():
    # Eight latents of which the pixels depend on three, most on the last; the others vary more.
    mu = random_normal(4000, 8) * torch.tensor([9, 9, 9, 9, 9, 1, 1, 1.0]) + 2
    mixing = torch.zeros(8, 3072)
    mixing[5:] = random_normal(3, 3072) * torch.tensor([0.5, 1, 2])[:, None]
    pixels = (127 + 10 * (mu - 2) @ mixing).clamp(0, 255).to(torch.uint8)
    projected = losses.make_projection("pixels", mu, pixels.view(-1, 3, 32, 32), 3)(mu)
    correlation = torch.corrcoef(torch.cat([projected, mu], 1).T)[:3, 3:].abs()
    assert correlation.argmax(1).tolist() == [7, 6, 5] and correlation.amax(1).min() > 0.99
    leading = losses.make_projection("principal", mu, pixels.view(-1, 3, 32, 32), 3)(mu)
    assert torch.corrcoef(torch.cat([leading, mu], 1).T)[:3, 8:].abs().max() < 0.1
    mu = correlated_mu()  # the first principal component
    first, _, _ = torch.linalg.svd(mu - mu.mean(0), full_matrices=False)
    both = torch.stack([first[:, 0], project(mu, kind="principal")(mu)[:, 0]])
    assert torch.corrcoef(both)[0, 1].abs() > 0.999


@pytest.mark.parametrize("target", ["nothing", "one direction"])
def test_projection_cannot_collapse(target):
    # The pull that makes a plain linear map collapse: a student that stays at zero, or one that
    # knows a single direction and has copied it into every latent.
    mu = correlated_mu()
    projection = project(mu)
    before = projection.rotation.weight.detach().clone()
    direction = projection(mu).detach()[:, :1].expand(-1, 16)
    student_mu = torch.zeros(len(mu), 16) if target == "nothing" else direction
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        losses.latent_distillation_loss(student_mu, projection(mu)).backward()
        optimizer.step()
        projection.retract()
    projected = projection(mu).detach()
    assert projected.std(0).min() > 0.95
    spread = torch.linalg.svdvals(projected - projected.mean(0))
    assert spread.min() > 0.7 * spread.max()  # no direction is lost, none counts twice
    if target == "one direction":
        assert (projection.rotation.weight - before).abs().max() > 0.05  # it did learn


def test_projection_works_for_a_teacher_without_variance():
    line = random_normal(50, 1) * torch.linspace(1, 2, 96)  # varies in one direction alone
    images = (255 * random_images(10)).byte()
    for kind in ("pixels", "principal"):
        projection = losses.make_projection(kind, torch.ones(10, 96), images, 16)
        assert projection(torch.ones(10, 96)).abs().max() < 1e-3
        projected = project(line, kind=kind)(line)
        assert projected[:, 0].std() > 0.9 and projected[:, 1:].abs().max() < 0.05
    assert project(random_normal(50, 16))(torch.ones(1, 16)).shape == (1, 16)


@pytest.mark.parametrize("kind", ["pixels", "principal"])
def test_projection_of_few_images_has_no_direction_without_variance_to_turn_to(kind):
    mu = random_normal(40, 96)
    projection = project(mu, latent_dim=16, components=64, kind=kind)
    assert len(projection.whitening) == 39  # as many as 40 images span
    every = (mu - projection.mean) @ projection.whitening.T
    torch.testing.assert_close(every.std(0, correction=0), torch.ones(39), atol=1e-2, rtol=0)


def test_projection_is_the_same_for_a_code_of_any_scale():
    mu = correlated_mu()
    for kind in ("pixels", "principal"):
        large, small = (project(s * mu, kind=kind)(s * mu) for s in (1, 1e-4))
        torch.testing.assert_close(small.abs(), large.abs(), atol=1e-2, rtol=0)


def test_projection_to_more_latents_than_are_usually_kept():
    projection = project(random_normal(600, 256), latent_dim=200)
    rows = projection.rotation.weight
    assert rows.shape == (200, 200)
    torch.testing.assert_close(rows @ rows.T, torch.eye(200), atol=1e-5, rtol=0)


def test_projections_are_what_they_are_called():
    mu = random_normal(500, 160) * torch.linspace(3, 0.1, 160)
    images = images_of(mu)
    pixels = losses.make_projection("pixels", mu, images, 8)
    assert pixels.whitening.shape == (128, 160)
    assert all(parameter.requires_grad for parameter in pixels.parameters())
    free = losses.make_projection("free", mu, images, 8)
    assert isinstance(free, losses.FreeProjection)
    torch.testing.assert_close(free(mu), pixels(mu), atol=1e-4, rtol=1e-4)
    principal = losses.make_projection("principal", mu, images, 8)
    assert (principal(mu) - pixels(mu)).abs().mean() > 0.5
    assert torch.equal(losses.make_projection("identity", mu, images, 160)(mu), mu)


@pytest.mark.parametrize("kind", ["pixels", "principal"])
def test_the_projection_of_a_trained_student_starts_nearest_to_its_code(kind):
    mu = random_normal(500, 160) * torch.linspace(3, 0.1, 160) + 2
    images = images_of(mu)
    projection = losses.make_projection(kind, mu, images, 8)
    torch.nn.init.orthogonal_(projection.rotation.weight)
    rotated = projection(mu).detach()
    for offset in (0, 5):  # which a rotation cannot make
        fitted = losses.make_projection(kind, mu, images, 8, rotated + offset)
        torch.testing.assert_close(fitted(mu), rotated, atol=1e-3, rtol=0)


# --- The nats that are held ---


def test_the_nats_are_held_by_the_weight_of_the_kl():
    objective = student_objective({"kl": 1}, rate=80.0)
    steps, nats = 2000, []

    def step(i, value):
        objective.after_step({"kl": torch.tensor(value / 3072)}, i, steps)

    for i in range(steps):
        # A VAE of 64 active latents: half a nat each less as the weight's logarithm rises by one.
        nats.append(100 - 32 * math.log(objective.kl_factor.item()))
        step(i, nats[-1])
        assert i >= 0.2 * steps or objective.kl_factor == 1  # not yet
    assert nats[int(0.25 * steps)] < 99 and min(nats) > 79.9
    assert nats[int(0.6 * steps)] == pytest.approx(80, rel=0.01)
    assert objective.kl_factor.item() == pytest.approx(math.exp(20 / 32), rel=0.01)
    # However far the nats are off, a step moves the weight by no more than this.
    for value, share in ((120.0, 0.5), (4000.0, 1), (0.0, -1)):
        before = objective.kl_factor.item()
        step(steps - 1, value)
        moved = math.log(objective.kl_factor.item() / before)
        assert moved == pytest.approx(share * distill_tinyvae.RATE_GAIN / steps, rel=1e-3)
    free = student_objective({"kl": 1})
    free.after_step({"kl": torch.tensor(1.0)}, steps - 1, steps)
    assert free.kl_factor == 1
