"""The distillation itself: models, losses, training, whole runs, resuming, CUDA.

Generated images, no network, no GPU needed. distill_tinyvae.py runs here with tiny budgets, in this
process where that shows the same, and in one of its own where it matters: killed, interrupted,
without a network.
"""

import contextlib
import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_graph
import data
import distill_tinyvae
import losses
import metrics
import models
import optimizer
import report
import runs
import storage
import teacher_outputs
import training
import vgg
from runtime import InputError
from standard_vae import StandardVAE
from testing import (
    HERE,
    TINY,
    assert_same_run,
    assert_same_weights,
    contents,
    copy_of,
    folders,
    needs_cuda,
    random_images,
    random_normal,
    read_rows,
    read_table,
    start,
    teacher_of,
    train,
    weights_of,
)
from tiny_vae_32 import TinyVAE32


def refuse(*args, **kwargs):
    """In place of a function that must not be called."""
    raise AssertionError("called although it is not needed")


# --- Models ---


@pytest.mark.parametrize(
    ("model", "parameters", "mib", "latent_dim"),
    [(StandardVAE, 8_664_195, 33.08, 512), (TinyVAE32, 294_403, 1.14, 64)],
)
def test_models_have_their_exact_size(model, parameters, mib, latent_dim):
    vae = model()
    assert models.count_parameters(vae) == parameters
    assert models.weight_bytes(vae) / 2**20 == pytest.approx(mib, abs=0.02)
    reconstruction, mu, logvar = vae(random_images(3))
    assert reconstruction.shape == (3, 3, 32, 32)
    assert mu.shape == logvar.shape == (3, latent_dim)
    assert reconstruction.min() >= 0 and reconstruction.max() <= 1


def test_evaluation_decodes_mu_and_training_a_sample():
    vae = TinyVAE32()
    images = random_images(4)
    vae.train()
    assert not torch.equal(vae(images)[0], vae(images)[0])
    vae.eval()
    reconstruction, mu, _ = vae(images)
    assert torch.equal(reconstruction, vae.decode(mu))
    assert torch.equal(reconstruction, torch.sigmoid(vae.decode_logits(mu)))


def test_reparameterize_samples_the_posterior():
    mu, logvar = torch.full((20_000, 1), 2.0), torch.full((20_000, 1), math.log(0.25))
    torch.manual_seed(0)
    z = TinyVAE32.reparameterize(mu, logvar)
    assert z.mean() == pytest.approx(2.0, abs=0.02)
    assert z.std() == pytest.approx(0.5, abs=0.02)


def test_a_student_of_any_width_is_the_same_class():
    vae = TinyVAE32(latent_dim=5, encoder_channels=(3, 7, 5, 9), decoder_channels=(11, 2, 6, 4))
    reconstruction, mu, _ = vae(random_images(2))
    assert reconstruction.shape == (2, 3, 32, 32) and mu.shape == (2, 5)
    with pytest.raises(ValueError, match=r"four positive whole numbers, got \(1, 2, 3\)"):
        TinyVAE32(encoder_channels=(1, 2, 3))


@pytest.mark.parametrize("model", [StandardVAE, TinyVAE32])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 64, 64), r"N×3×32×32, got 2×3×64×64"),
        (torch.rand(3, 32, 32), r"N×3×32×32, got 3×32×32"),
        (torch.rand(2, 1, 32, 32), r"got 2×1×32×32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"floating point .* got torch.uint8"),
        (torch.rand(2, 3, 32, 32) * 2 - 1.5, r"in \[0, 1\], got \[-1\.\d+, 0\.\d+\]"),
        (torch.rand(2, 3, 32, 32) * 255, r"in \[0, 1\], got \[.*, 25\d"),
        (torch.full((2, 3, 32, 32), float("nan")), r"in \[0, 1\], got \[nan, nan\]"),
    ],
)
def test_wrong_images_are_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model()(images)


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match="N×64, got 2×512"):
        TinyVAE32().decode(torch.zeros(2, 512))


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


def test_weights_make_the_beta_that_is_printed(tiny_run):
    # Summed squared error + beta · summed KL, scaled, must be the two terms as they are weighted.
    run, output = tiny_run
    beta = json.loads((run / "outputs" / "config.json").read_text())["effective_beta"]
    assert beta == pytest.approx(0.4 / 3) and "effective beta 0.133 " in output
    mu, logvar = random_normal(8, 64), random_normal(8, 64, seed=1)
    images, reconstruction = random_images(8), random_images(8, seed=1)
    kl = losses.kl_divergence(mu, logvar).sum()
    summed = (reconstruction - images).square().sum() + beta * kl
    terms = {
        "reconstruction": losses.reconstruction_loss(reconstruction, images),
        "kl": losses.kl_loss(mu, logvar),
    }
    row = read_table(run)[-1]
    weighted = sum(
        float(row[f"{name}_weighted"]) / float(row[name]) * value for name, value in terms.items()
    )
    torch.testing.assert_close(weighted, 0.3 * summed / (8 * 3072))


def test_latent_term_is_the_divergence_of_two_gaussians():
    mu, projected = random_normal(8, 64), random_normal(8, 64, seed=1)
    student, teacher = (torch.distributions.Normal(mean, 1.0) for mean in (mu, projected))
    expected = torch.distributions.kl_divergence(student, teacher).sum(1).mean() / 3072
    torch.testing.assert_close(losses.latent_distillation_loss(mu, projected), expected)


def test_output_term_is_a_softened_bernoulli_divergence_of_smoothed_pixels():
    student, teacher = random_normal(2, 3, 32, 32), random_normal(2, 3, 32, 32, seed=1)
    found = losses.output_distillation_loss(student, teacher, 3.0)
    smoothed = [(0.1 + 0.8 * torch.sigmoid(logits)).logit() for logits in (teacher, student)]
    soft = [torch.distributions.Bernoulli(logits=logits / 3) for logits in smoothed]
    expected = 4.5 * torch.distributions.kl_divergence(*soft).mean() / 0.64
    torch.testing.assert_close(found, expected)
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
    found = losses.perceptual_loss(layers, images + change, images)
    assert found == pytest.approx(expected, rel=1e-4)


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
        found = losses.fixed_grid(reconstruction + tiled - images, period)
        found = found - losses.fixed_grid(reconstruction - images, period)
        torch.testing.assert_close(found, grid - overall)
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

    with pytest.raises(InputError, match="there is no file imagnet: --vgg takes imagenet, random"):
        vgg.load_vgg16("imagnet")
    weights["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"are not VGG16's: size mismatch for 0\.weight"):
        vgg.load_vgg16(str(tmp_path / "vgg.pth"))
    del weights["features.0.weight"]
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"features\.0\.weight is missing"):
        vgg.load_vgg16(str(tmp_path / "vgg.pth"))


# --- The projection of the teacher's code ---


def correlated_mu(count=2000, teacher_dim=96, seed=0):
    """Codes as a teacher's are: correlated, off centre, with directions that hardly vary."""
    mixing = random_normal(teacher_dim, teacher_dim, seed=seed)
    scale = torch.logspace(0, -2, teacher_dim)
    return (random_normal(count, teacher_dim, seed=seed + 1) * scale) @ mixing + 3


def images_of(mu, seed=0):
    """Noisy images that depend on a code, on its last directions most."""
    weight = torch.linspace(0, 1, mu.shape[1])[:, None]
    mixing = weight * random_normal(mu.shape[1], 3072, seed=seed)
    pixels = 0.5 + 0.02 * (mu - mu.mean(0)) / mu.std(0) @ mixing
    pixels = pixels + 0.05 * random_normal(len(mu), 3072, seed=seed + 1)
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


def test_the_principal_projection_starts_at_the_direction_that_varies_most():
    mu = correlated_mu()
    _, _, directions = torch.linalg.svd(mu - mu.mean(0), full_matrices=False)
    leading = (mu - mu.mean(0)) @ directions[0]
    first = project(mu, kind="principal")(mu)[:, 0]
    assert torch.corrcoef(torch.stack([leading, first]))[0, 1].abs() > 0.999


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
    assert metrics.effective_rank(projected) > 15.5
    if target == "one direction":
        assert (projection.rotation.weight - before).abs().max() > 0.05  # it did learn


def test_projection_works_for_a_teacher_without_variance_and_not_for_one_with_fewer_latents():
    line = random_normal(50, 1) * torch.linspace(1, 2, 96)  # varies in one direction alone
    images = (255 * random_images(10)).byte()
    for kind in ("pixels", "principal"):
        projection = losses.make_projection(kind, torch.ones(10, 96), images, 16)
        assert projection(torch.ones(10, 96)).abs().max() < 1e-3
        projected = project(line, kind=kind)(line)
        assert projected[:, 0].std() > 0.9 and projected[:, 1:].abs().max() < 0.05
    assert project(random_normal(50, 16))(torch.ones(1, 16)).shape == (1, 16)
    with pytest.raises(ValueError, match="8 latents, fewer than the student's 16"):
        project(torch.ones(10, 8))


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


# --- Training ---


def stage_of(vae, images, epochs=1, batch_size=8, **settings):
    """A stage on the CPU, in fp32, outside of any run."""
    settings = {"warmup": 0.25, "seed": 0, "graph": False} | settings
    run = SimpleNamespace(
        settings=SimpleNamespace(batch_size=batch_size, **settings),
        device=torch.device("cpu"),
        precision="fp32",
        images=images,
        val_images=images,
    )
    return training.Stage("student", vae, epochs, "adam", 1e-3, run)


def test_the_learning_rate_rises_linearly_then_falls_to_zero_as_a_cosine():
    stage = stage_of(TinyVAE32(), data.dead_leaves(32, "train"), epochs=2)
    rates, progress = [], []
    for _ in stage.epochs():
        for _ in stage.steps():
            stage.next_batch()
            stage.log(torch.tensor(0.0), {}, {})
            (group,) = stage.optimizer.adam.param_groups
            rates.append(group["lr"].item() / 1e-3)
            progress.append(stage.progress.item())
        stage.rows.append({})
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([0.5, 1, *cosine])
    assert progress == pytest.approx([step / 8 for step in range(8)])
    assert [optimizer.one_cycle(step, 8, 0.25) for step in range(8)] == pytest.approx(rates)


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_orthogonalize_moves_singular_values_to_near_1_and_nothing_else(shape):
    u, _, v = torch.linalg.svd(random_normal(*shape), full_matrices=False)
    found = optimizer.orthogonalize(u * torch.logspace(0, -2, 8) @ v)
    values = u.T @ found @ v.T
    assert all(0.65 < value < 1.25 for value in values.diagonal())
    torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-4, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or later")
def test_muon_is_that_of_torch_for_matrices_and_takes_kernels_as_matrices():
    start, gradients = random_normal(6, 36), random_normal(4, 6, 36)
    matrix, kernel, reference = (torch.nn.Parameter(start.clone()) for _ in range(3))
    kernel.data = kernel.data.view(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    steppers = [optimizer.Muon([p], torch.tensor(0.01)) for p in (matrix, kernel)]
    steppers.append(
        torch.optim.Muon([reference], 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    )
    for gradient in gradients:
        matrix.grad, reference.grad, kernel.grad = gradient, gradient, gradient.view(6, 4, 3, 3)
        for stepper in steppers:
            stepper.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    moved = (matrix - start).norm()
    assert (matrix - reference).norm() < 0.02 * moved  # torch's works in bfloat16


def test_with_scaled_gradients_muon_steps_as_without_and_skips_one_that_overflows():
    start, gradients = random_normal(6, 36), random_normal(4, 6, 36)
    moved = []
    for precision in ("fp32", "fp16"):
        matrix, bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(6))
        stepper = optimizer.OneCycleOptimizer(
            [bias], [matrix], 0.01, 0.5, 8, torch.device("cpu"), precision
        )
        for gradient in gradients:
            stepper.backward((matrix * gradient).sum() + bias.sum())
            stepper.step()
        moved.append(matrix.detach() - start)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
    before, scale = matrix.detach().clone(), stepper.scaler.get_scale()
    average = stepper.muon.state[matrix]["average"].clone()
    stepper.backward((matrix * 1e38).sum() + bias.sum())
    stepper.step()
    assert stepper.scaler.get_scale() == scale / 2
    assert torch.equal(matrix, before)
    assert torch.equal(stepper.muon.state[matrix]["average"], average)


def test_muon_trains_kernels_and_matrices_and_adam_the_rest(tmp_path, monkeypatch):
    stages, graphed = {}, training.Stage.graphed

    def spy(self, step):
        stages[self.name] = self
        return graphed(self, step)

    monkeypatch.setattr(training.Stage, "graphed", spy)
    flags = ("--teacher-epochs", "1", "--epochs", "1", "--optimizer", "muon")
    train(tmp_path, *flags, "--learning-rate", "0.003", "--teacher-learning-rate", "0.002")
    teacher, student = stages["teacher"], stages["student"]
    assert teacher.optimizer.muon is None
    (group,) = student.optimizer.muon.param_groups
    by_muon = set(group["params"])
    assert by_muon == {p for p in student.model.parameters() if p.ndim > 1}
    (group,) = student.optimizer.adam.param_groups
    assert student.projection.rotation.weight in set(group["params"])
    assert not by_muon & set(group["params"])
    peaks = [stage.optimizer.rates.max().item() for stage in (teacher, student)]
    assert peaks == pytest.approx([0.002, 0.003])


def test_a_step_gets_each_image_of_an_epoch_once_with_its_index():
    images = data.dead_leaves(34, "train")
    stage = stage_of(TinyVAE32(), images)
    seen = []
    for _ in stage.epochs():
        for _ in stage.steps():
            batch, noise, index = stage.next_batch()
            stage.log(torch.tensor(0.0), {}, {})
            assert torch.equal(batch, data.to_float(images[index]))
            assert noise.shape == (8, 64) and 0.8 < noise.std() < 1.2
            seen += index.tolist()
        stage.rows.append({})
    assert len(seen) == len(set(seen)) == 32


def test_an_epoch_ends_with_a_row_and_a_line_of_what_was_measured(capsys, monkeypatch):
    clock = iter((100.0, 100.0 + 5 * 0.1234567, 101.23456))  # five steps, and the validation
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock.__next__))
    images, mu = data.dead_leaves(40, "train"), random_normal(40, 96) + 1
    vae, run = TinyVAE32(), stage_of(TinyVAE32(), images, calibration="means").run
    run.precision = "bf16"
    projection = project(mu, latent_dim=64)
    stage = training.Stage("student", vae, 12, "adam", 1e-3, run, projection, 3 * mu)
    for _ in stage.epochs():
        for step, _ in enumerate(stage.steps()):
            stage.next_batch()
            kl = torch.tensor(0.1 * step)
            terms = {"kl": kl, "output": 1 + kl, "latent": 0}
            stage.log(torch.tensor(step + 0.5), terms, {"kl": 0.1 * kl, "output": 2 * kl})
        stage.validate()
        break
    (row,) = stage.rows
    means = {"loss": 2.5, "kl": 0.2, "kl_weighted": 0.02, "output": 1.2, "output_weighted": 0.4}
    expected = metrics.evaluate_vae(vae, images, "bf16")
    projected = projection(3 * mu).detach()
    means |= {"val_mse": expected.pop("mse"), "val_psnr": expected.pop("psnr")} | expected
    means["val_sampled_mse"] = metrics.sampled_mse(vae, images, "bf16")
    means["projected_std"] = projected.std(0, correction=0).mean().item()
    assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-6)
    assert (row["stage"], row["epoch"]) == ("student", 1)
    assert row["learning_rate"] == round(stage.optimizer.learning_rate.item(), 9) > 0
    assert (row["ms_per_step"], row["seconds"]) == (123.457, 1.23)
    assert capsys.readouterr().out.strip() == (
        "student   1/12 | loss 2.50000 | kl 0.20000  output 1.20000 | "
        f"val MSE {means['val_mse']:.5f}  PSNR {means['val_psnr']:.2f} dB | "
        f"KL {means['kl_nats']:.1f} nats, "
        f"{means['kl_per_latent']:.3f} per latent, {means['active_dims']} of 64 active | "
        f"projected std {means['projected_std']:.3f}, rank {metrics.effective_rank(projected):.1f}"
        " | 1 s"
    )


def test_a_stage_goes_on_where_it_was_with_its_bar_and_its_order(monkeypatch):
    bars, progress_bar = [], training.progress_bar
    spy = lambda **options: bars.append(options) or progress_bar(**options)  # noqa: E731
    monkeypatch.setattr(training, "progress_bar", spy)
    orders = []
    for seed in (1, 2):  # of what is not the stage's own
        stage = stage_of(TinyVAE32(), data.dead_leaves(34, "train"), epochs=4)
        stage.rows = [{}, {}]
        torch.manual_seed(seed)
        numbers = []
        for number in stage.epochs():
            numbers.append(number)
            for _ in stage.steps():
                stage.log(torch.tensor(0.0), {}, {})
            stage.rows.append({})
        assert numbers == [3, 4]
        orders.append(stage.batches.clone())
    assert bars[0] == {"total": 16, "initial": 8, "desc": "student", "unit": "step"}
    assert torch.equal(*orders)


@pytest.mark.parametrize(
    ("device", "shown"), [("cpu", ["0.00000", "0.50000", "1.00000"]), ("cuda", [None] * 3)]
)
def test_the_bar_shows_the_mean_loss_and_makes_no_gpu_wait_for_it(device, shown):
    stage = stage_of(TinyVAE32(), data.dead_leaves(34, "train"), epochs=12)
    stage.rows = [{}] * 2
    stage.run.device = SimpleNamespace(type=device)
    found = []
    for _ in stage.epochs():
        for step, _ in enumerate(stage.steps()):
            found.append(stage.bar.postfix)
            stage.log(torch.tensor(float(step)), {}, {})
        found.append(stage.bar.postfix)
        break
    shown = [loss and f"epoch=3/12, loss={loss}" for loss in shown]
    assert found == [None, *shown, "epoch=3/12, loss=1.50000"]


def test_a_loss_that_is_not_finite_is_told_with_what_can_be_done():
    stage = stage_of(TinyVAE32(), data.dead_leaves(34, "train"))
    with pytest.raises(InputError) as told:
        for _ in stage.epochs():
            for _ in stage.steps():
                stage.log(torch.tensor(math.nan), {}, {})
    assert str(told.value) == (
        "the loss of the student became nan in epoch 1; the epochs before it are saved: continue "
        "from them with --resume --precision fp32, or start again with --overwrite and a lower "
        "--learning-rate"
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("with_projection", [False, True])
def test_a_step_trains_every_parameter(optimizer, with_projection):
    vae, images = TinyVAE32(), data.dead_leaves(34, "train")
    projection = project(random_normal(200, 96), 64, 96) if with_projection else None
    run = stage_of(TinyVAE32(), images).run
    stage = training.Stage("student", vae, 1, optimizer, 1e-2, run, projection)
    trained = dict(vae.named_parameters())
    trained |= dict(projection.named_parameters()) if projection else {}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    stage.next_batch()
    stage.optimizer.backward(sum((parameter.sin()).sum() for parameter in trained.values()))
    stage.optimizer.step()
    assert not [name for name, value in before.items() if torch.equal(value, trained[name])]


@pytest.mark.parametrize("with_samples", [False, True])
def test_batch_norm_knows_the_images_and_the_codes_that_will_be_decoded(with_samples):
    torch.manual_seed(0)
    vae = TinyVAE32()
    images = data.dead_leaves(60, "train")
    state = torch.get_rng_state()
    training.calibrate(vae, images, "fp32", with_samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in vae.modules())
    with torch.no_grad():
        floats = data.to_float(images)
        mu, logvar = vae.encode(floats)
        codes = mu
        if with_samples:
            codes = torch.cat([mu, vae.reparameterize(mu, logvar, random_normal(60, 64))])
        encoded = vae.encoder[0](floats)
        decoded = vae.decoder[0](vae.decoder_input(codes).view(len(codes), -1, 2, 2))
    for layer, seen in ((vae.encoder[1], encoded), (vae.decoder[1], decoded)):
        # BatchNorm sums in single precision: its variances are off by up to 3e-5 of them.
        expected = seen.double().mean((0, 2, 3)), seen.double().var((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), expected[1], atol=1e-5, rtol=1e-4)
        assert layer.momentum == TinyVAE32().decoder[1].momentum


def test_the_calibration_asked_for_reaches_the_student(tmp_path, monkeypatch, without_pictures):
    asked, calibrate = [], training.calibrate

    def spy(model, images, precision, with_samples):
        asked.append(with_samples)
        calibrate(model, images, precision, with_samples)

    monkeypatch.setattr(training, "calibrate", spy)
    for how in ("means", "both"):
        flags = ("--teacher", "none", "--epochs", "1", "--vgg", "none", "--calibration", how)
        row = train(tmp_path / how, *flags)[-1]
        path = tmp_path / how / "checkpoints" / "tinyvae_last.pth"
        vae, _ = models.load_model(path, TinyVAE32)
        val = data.load_training_images("dead-leaves", 70).val
        assert float(row["val_sampled_mse"]) == pytest.approx(metrics.sampled_mse(vae, val))
    assert asked == [False, True]


def test_the_rate_is_held_by_the_weight_of_the_kl():
    stage = stage_of(TinyVAE32(), data.dead_leaves(34, "train"))
    steps = 2000
    stage.done = torch.arange(steps) / steps
    rates = []
    for i in range(steps):
        stage.progress.fill_(i / steps)
        # A VAE of 64 active latents: half a nat each less as the weight's logarithm rises by one.
        rates.append(100 - 32 * math.log(stage.kl_factor.item()))
        stage.hold_rate(torch.tensor(rates[-1] / 3072), 80.0)
        if i < 0.2 * steps:
            assert stage.kl_factor == 1  # not yet
    assert rates[int(0.25 * steps)] < 99 and min(rates) > 79.9
    assert rates[int(0.6 * steps)] == pytest.approx(80, rel=0.01)
    assert stage.kl_factor.item() == pytest.approx(math.exp(20 / 32), rel=0.01)
    # However far the rate is off, a step moves the weight by no more than this.
    for rate, share in ((120.0, 0.5), (4000.0, 1), (0.0, -1)):
        before = stage.kl_factor.item()
        stage.hold_rate(torch.tensor(rate / 3072), 80.0)
        moved = math.log(stage.kl_factor.item() / before)
        assert moved == pytest.approx(share * training.RATE_SPEED / steps, rel=1e-3)


def test_a_rate_that_is_asked_for_moves_the_weight_in_training(
    tmp_path, monkeypatch, capsys, without_pictures
):
    monkeypatch.setattr(distill_tinyvae, "kl_loss", lambda mu, logvar: 0 * mu.sum() + 90 / 3072)
    flags = ("--teacher", "none", "--vgg", "none", "--epochs", "5")
    rows = train(tmp_path, *flags, "--rate", "60")
    factors = [float(row["kl_weighted"]) / float(row["kl"]) / 0.04 for row in rows]
    # Two steps an epoch. What a step finds moves the weight of the next: e^(0.5 · 40 / 10).
    assert factors[0] == pytest.approx(1)
    assert factors[2] / factors[1] == pytest.approx(math.exp(4), rel=1e-3)
    assert "KL held at 60 nats by its weight" in capsys.readouterr().out
    record = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")["record"]
    assert record["rate"] == 60 and record["effective_beta"] is None
    with pytest.raises(InputError, match="--rate holds the KL by its weight, which is 0"):
        train(tmp_path / "none", *flags, "--rate", "60", "--kl-weight", "0")


def test_with_a_rate_the_best_epoch_is_the_last(tmp_path, monkeypatch, without_pictures):
    errors = iter([0.1, 0.3, 0.2])  # the first at another rate

    def evaluate(*args):
        return metrics.evaluate_vae(*args) | {"mse": next(errors)}

    monkeypatch.setattr(training, "evaluate_vae", evaluate)
    monkeypatch.setattr(runs, "best_student", lambda run: TinyVAE32())
    monkeypatch.setattr(report, "print_results", lambda *args: None)
    train(tmp_path, "--teacher", "none", "--epochs", "3", "--rate", "30", "--vgg", "none")
    best = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_best.pth")
    assert best["epoch"] == 3


class NoLooking(TorchDispatchMode):
    """Refuses operations that need a value on the CPU, for which a GPU would have to be waited."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        waits = tags & set(function.tags)
        if function is torch.ops.aten.index.Tensor:  # by a mask its shape depends on values
            waits = any(index.dtype == torch.bool for index in args[1] if index is not None)
        assert not waits, f"{function} looks at a value"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [(precision, name) for precision in ("fp32", "bf16", "fp16") for name in ("adam", "muon")],
)
def test_a_training_step_reads_no_value_on_the_device(
    precision, optimizer, tmp_path, monkeypatch, without_pictures
):
    # A CUDA graph cannot be made of one that does, and any other GPU would stand still for it.
    calls = Counter()

    def graphed(self, step):
        def watched():
            calls[self.name] += 1
            with NoLooking() if calls[self.name] > 1 else contextlib.nullcontext():
                step()  # the first makes Adam's moments

        return watched

    monkeypatch.setattr(training.Stage, "graphed", graphed)
    monkeypatch.setattr(runs, "pick_precision", lambda *_: precision)  # fp16 is refused on a CPU
    flags = ("--teacher-epochs", "1", "--epochs", "1", "--optimizer", optimizer, "--rate", "50")
    train(tmp_path, *flags)
    assert calls == {"teacher": 2, "student": 2}
    with NoLooking(), pytest.raises(AssertionError, match="looks at a value"):
        torch.ones(1).sum().item()


# --- The weighted sum ---

WEIGHTS = dict(zip(losses.TERMS, (0.3, 0.1 * 0.4, 0.3, 0.2, 0.1 * 4)))
OTHER_WEIGHTS = (
    "--reconstruction-weight", "0.7", "--kl-weight", "0.2", "--kl-scale", "0.9",
    "--latent-weight", "0.4", "--output-weight", "0.6",
    "--perceptual-weight", "0.05", "--perceptual-scale", "3", "--epochs", "1",
)


def assert_adds_up(row, weights):
    """The loss in a row of metrics.csv is the sum of its terms, each times its weight."""
    parts = {name: float(row[f"{name}_weighted"]) for name in weights}
    assert sum(parts.values()) == pytest.approx(float(row["loss"]), rel=1e-5)
    for name, weight in weights.items():
        assert parts[name] == pytest.approx(weight * float(row[name]), rel=1e-5)
    unused = set(losses.TERMS) - set(weights)
    assert all(row[name] == row[f"{name}_weighted"] == "" for name in unused)


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_run, tmp_path, without_pictures):
    run, _ = tiny_run
    for row in read_table(run):
        is_teacher = row["stage"] == "teacher"
        assert_adds_up(row, {"reconstruction": 1, "kl": 0.01} if is_teacher else WEIGHTS)

    row = train(tmp_path, *teacher_of(run), *OTHER_WEIGHTS)[-1]
    assert_adds_up(row, dict(zip(losses.TERMS, (0.7, 0.2 * 0.9, 0.4, 0.6, 0.05 * 3))))


def test_kl_has_the_same_unit_in_both_stages(tmp_path, monkeypatch, without_pictures):
    monkeypatch.setattr(distill_tinyvae, "kl_loss", lambda mu, logvar: 0 * mu.sum() + 0.25)
    teacher, student = train(
        tmp_path, "--teacher-epochs", "1", "--epochs", "1", "--teacher-kl-weight", "0.02"
    )
    assert float(teacher["kl"]) == float(student["kl"]) == 0.25
    assert float(teacher["kl_weighted"]) == pytest.approx(0.02 * 0.25)
    assert float(student["kl_weighted"]) == pytest.approx(0.1 * 0.4 * 0.25)


FUNCTIONS = dict(zip(losses.TERMS, (
    "reconstruction_loss", "kl_loss", "latent_distillation_loss", "output_distillation_loss",
    "perceptual_loss",
)))


@pytest.mark.parametrize("term", losses.TERMS)
def test_a_term_of_weight_zero_is_not_computed(
    term, tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    monkeypatch.setattr(distill_tinyvae, FUNCTIONS[term], refuse)
    flags = (f"--{term}-weight", "0", "--epochs", "1")
    row = train(tmp_path, *teacher_of(run), *flags)[-1]
    used = set(losses.TERMS) - {term}
    assert row[term] == row[f"{term}_weighted"] == ""
    assert all(row[name] and row[f"{name}_weighted"] for name in used)
    parts = sum(float(row[f"{name}_weighted"]) for name in used)
    assert parts == pytest.approx(float(row["loss"]), rel=1e-5)


def test_means_are_decoded_only_for_the_terms_that_need_them(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    decoded = []
    decode_logits = TinyVAE32.decode_logits

    def spy(self, z):
        if self.training:
            decoded.append(len(z))
        return decode_logits(self, z)

    monkeypatch.setattr(TinyVAE32, "decode_logits", spy)
    no_output, no_perceptual = ("--output-weight", "0"), ("--perceptual-weight", "0")
    for flags, count in (
        ((), 64), (no_output, 64), (no_perceptual, 64), ((*no_output, *no_perceptual), 32)
    ):
        decoded.clear()
        train(tmp_path, *teacher_of(run), *flags, "--epochs", "1", "--overwrite")
        assert decoded == [count, count]


def test_settings_reach_their_terms(tiny_run, tmp_path, monkeypatch, without_pictures):
    run, _ = tiny_run
    seen = {}

    def spy(name):
        function = getattr(distill_tinyvae, name)

        def record(*args):
            seen.setdefault(name, args)  # of the first step
            return function(*args)

        monkeypatch.setattr(distill_tinyvae, name, record)

    for name in FUNCTIONS.values():
        spy(name)
    flags = ("--epochs", "1", "--temperature", "2", "--perceptual-images", "6")
    train(tmp_path, *teacher_of(run), *flags)
    assert seen["output_distillation_loss"][2] == 2
    _, drawn, images = seen["perceptual_loss"]
    assert len(drawn) == len(images) == 6
    # The output and perceptual terms see what is decoded from the mean, reconstruction a sample.
    reconstruction, all_images = seen["reconstruction_loss"]
    assert torch.equal(images, all_images[:6])
    of_mean = torch.sigmoid(seen["output_distillation_loss"][0])
    assert not torch.equal(of_mean, reconstruction)
    assert torch.equal(drawn, losses.without_grid(of_mean, all_images)[:6])  # of the whole batch
    seen.clear()
    flags = ("--epochs", "1", "--perceptual-images", "0", "--overwrite")
    train(tmp_path, *teacher_of(run), *flags)
    assert len(seen["perceptual_loss"][1]) == 32


def test_every_weight_and_the_temperature_change_the_network_in_one_step(
    tiny_run, tmp_path, without_pictures
):
    run, _ = tiny_run
    flags = [*teacher_of(run), "--epochs", "1", "--batch-size", "64", "--warmup", "0"]  # one step
    others = [(f"--{term}-weight", "0.7") for term in losses.TERMS] + [("--temperature", "1")]

    def student(*changed):
        train(tmp_path, *flags, *changed, "--overwrite")
        weights = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")["model"]
        return torch.cat([weights[name].flatten() for name in ("fc_mu.weight", "encoder.0.weight")])

    usual = student()
    assert torch.equal(usual, student())
    for changed in others:
        # The outputs of a network without training are grey, where T hardly matters.
        assert (student(*changed) - usual).abs().max() > 1e-5, changed


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_output_term_compares_with_the_teacher_or_without_one_with_the_image(
    with_teacher, tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    compared, images = [], []
    next_batch = training.Stage.next_batch
    name = "output_distillation_loss" if with_teacher else "reconstruction_loss"
    loss = getattr(losses, name)

    def spy_batch(self):
        batch = next_batch(self)
        images.append(batch[0])
        return batch

    def spy_loss(*args):
        compared.append(args)
        return loss(*args)

    monkeypatch.setattr(training.Stage, "next_batch", spy_batch)
    monkeypatch.setattr(distill_tinyvae, name, spy_loss)
    flags = teacher_of(run) if with_teacher else ("--teacher", "none")
    row = train(tmp_path, *flags, "--epochs", "1")[-1]
    assert float(row["output"]) > 0
    if with_teacher:
        teacher, _ = models.load_model(run / "checkpoints/teacher_vae.pth", StandardVAE)
        with torch.no_grad():
            expected = teacher.decode_logits(teacher.encode(images[0])[0])
        logits = compared[0][1].float()
        torch.testing.assert_close(logits, expected, atol=1e-2, rtol=0)  # kept in fp16
        return
    (of_sample, image), (of_mean, target) = compared[:2]  # one step: reconstruction, then output
    assert torch.equal(image, images[0]) and torch.equal(target, images[0])
    assert not torch.equal(of_sample, of_mean)


@pytest.mark.parametrize("kind", losses.PROJECTIONS)
def test_each_projection_learns_as_it_is_called(
    kind, tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    starts = []

    def spy(*args):
        projection = losses.make_projection(*args)
        starts.append(copy.deepcopy(projection.state_dict()))
        return projection

    monkeypatch.setattr(distill_tinyvae, "make_projection", spy)
    if kind == "identity":  # takes a teacher of as many latents
        teacher = ("--teacher", str(run / "checkpoints" / "tinyvae_best.pth"))
        train(tmp_path, *teacher, "--projection", kind, "--epochs", "1")
        assert starts == [{}]
        return
    train(tmp_path, *teacher_of(run), "--projection", kind, "--epochs", "1")
    saved = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")["projection"]
    (before,) = starts
    assert list(saved) == list(before)
    if kind == "free":
        assert set(saved) == {"linear.weight", "linear.bias"}
        assert all((saved[name] - before[name]).abs().max() > 1e-4 for name in saved)
        return
    rotation, begun = saved["rotation.weight"], before["rotation.weight"]
    assert torch.equal(begun, torch.eye(*begun.shape)) and not torch.equal(rotation, begun)
    for weight in (begun, rotation):
        torch.testing.assert_close(weight @ weight.T, torch.eye(64), atol=1e-4, rtol=0)


# --- A whole run ---


def test_a_run_writes_what_it_promises(tiny_run):
    run, output = tiny_run
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth", "tinyvae_epoch_002.pth", ".lock",
    }
    assert {path.name for path in (run / "outputs").iterdir()} == {
        "config.json", "metrics.csv", "training_curves.png", "reconstruction_test.png",
        "interpolation_test.png", ".lock",
    }
    rows = read_table(run)
    assert tuple(rows[0]) == runs.COLUMNS
    assert list(rows[0])[-1] == "seconds"
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("teacher", "1"), ("teacher", "2"), ("student", "1"), ("student", "2"), ("student", "3"),
    ]
    assert rows[0]["latent"] == rows[0]["projected_std"] == ""
    config = json.loads((run / "outputs" / "config.json").read_text())
    assert config["train_images"] == 70 and config["precision"] == "fp32"
    assert config["data"] == "dead-leaves" and config["vgg_weights"] == "random, seed 0"
    assert config["temperature"] == 3.0 and "torch" in config["versions"]
    for path in run.rglob("*"):
        assert path.is_dir() or path.name == ".lock" or f"  {path}\n" in output
    for picture in (run / "outputs").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 500
            assert np.asarray(image.convert("L")).std() > 10  # something is drawn


def test_training_changes_student_and_projection(tiny_run):
    run, _ = tiny_run
    early = weights_of(run, "tinyvae_epoch_002.pth")
    late = weights_of(run)
    assert (early["fc_mu.weight"] - late["fc_mu.weight"]).abs().max() > 0
    saved = storage.load_checkpoint(run / "checkpoints" / "tinyvae_last.pth")["projection"]
    projection = losses.LatentProjection(saved["mean"], saved["whitening"], latent_dim=64)
    start = torch.eye(*projection.rotation.weight.shape)
    assert torch.equal(projection.rotation.weight, start)
    projection.load_state_dict(saved)
    assert (projection.rotation.weight - start).abs().max() > 1e-4


def test_a_second_run_replaces_nothing_unless_told_to(tiny_run):
    run, _ = tiny_run
    before = contents(run)
    for flags, message in (
        ((), r"--resume .* --overwrite .* another"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--resume", "--epochs", "4"), r"other settings \(epochs was 3, is 4\)"),
        (("--resume", "--learning-rate", "0.01"), r"\(learning_rate was 0\.003, is 0\.01\)"),
        (("--resume", "--optimizer", "adam"), r"\(optimizer was muon, is adam\)"),
        (("--resume", "--kl-scale", "1"), r"settings \(kl_scale was 0\.4, is 1\.0\): use"),
        (("--resume", "--perceptual-scale", "7"), r"\(perceptual_scale was 4\.0, is 7\.0\): use"),
        (("--resume", "--temperature", "1"), r"settings \(temperature was 3\.0, is 1\.0\): use"),
        (("--resume", "--projection", "free"), r"projection was pixels, is free"),
        (("--resume", "--limit", "71"), "the training images differ"),
        (("--resume", "--vgg", "none"), "VGG16's weights differ"),
        (("--resume", "--latent-dim", "32"), "the student's channels or latents differ"),
        (("--resume", "--teacher-channels", "8,8,8,8"), "the teacher's channels or latents diff"),
        (("--resume", *teacher_of(run)), "the teacher differs"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            train(run, *flags)
        assert "\n" not in str(refused.value)
    assert contents(run) == before


def test_two_runs_do_not_write_into_the_same_folder(tmp_path, without_pictures):
    for folder in ("checkpoints", "outputs"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with (
            storage.locked(tmp_path / folder),
            pytest.raises(InputError, match=f"another run is writing into .*{folder}: wait until"),
        ):
            train(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"] * 2
    # The lock of a process that was killed is none.
    script = "import storage, time\nwith storage.locked('.'): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path / "outputs", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE)},
    ) as process:
        assert process.stdout.readline().strip() == b"held"
        with pytest.raises(InputError, match="another run"):
            train(tmp_path)
        process.kill()
    assert train(tmp_path, "--teacher", "none", "--vgg", "none", "--epochs", "1")


def test_overwrite_keeps_a_teacher_of_the_same_settings(tiny_run, tmp_path, capsys, monkeypatch):
    run, _ = tiny_run
    copy = copy_of(run, tmp_path)
    drawn = []
    for module in (report, runs):
        monkeypatch.setattr(module, "draw", lambda run, teacher, *rest: drawn.append(teacher))
    train(copy, "--overwrite")
    assert "Stage 1 skipped" in capsys.readouterr().out
    assert_same_run(run, copy)

    # The teacher has gone through a whole stage 2 and is what it was, BatchNorm included.
    teacher = drawn[-1]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    before = weights_of(run, "teacher_vae.pth")
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())

    other = ("--teacher-epochs", "1", "--epochs", "1", "--vgg", "none")
    train(copy, "--overwrite", *other)
    assert "a new teacher is trained" in capsys.readouterr().out
    assert len(read_rows(copy)) == 1 + 1 + 1


def test_overwrite_keeps_a_teacher_that_is_named_or_not_needed(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    copy = copy_of(tiny_run[0], tmp_path)
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    another_seed = ("--overwrite", "--seed", "1", "--epochs", "1")
    scratch = ("--latent-weight", "0", "--output-weight", "0")
    for flags in (teacher_of(copy), scratch):
        train(copy, *another_seed, *flags)
        assert_same_weights(tiny_run[0], copy, "teacher_vae.pth")
    train(copy, "--resume", "--seed", "1", "--epochs", "1", *scratch)  # nor is it in the way


def test_without_a_teacher_the_image_takes_its_place_and_no_stage_1_runs(
    tmp_path, capsys, monkeypatch, without_pictures
):
    for name in ("train_teacher", "teacher_outputs", "latent_distillation_loss"):
        monkeypatch.setattr(distill_tinyvae, name, refuse)
    (row,) = train(tmp_path, "--teacher", "none", "--epochs", "1")
    assert row["stage"] == "student" and row["latent"] == row["latent_weighted"] == ""
    assert float(row["output_weighted"]) == pytest.approx(0.2 * float(row["output"]))
    summary = capsys.readouterr().out
    assert "teacher      none\n" in summary and "left out: latent\n" in summary
    assert "output compares with the image" in summary
    record = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_best.pth")["record"]
    assert (record["teacher"], record["latent_weight"]) == (None, 0)
    for key in ("teacher_epochs", "teacher_latent_dim", "teacher_architecture"):
        assert record[key] is None
    with pytest.raises(InputError, match=r"settings \(one has a teacher, --teacher, and the other"):
        train(tmp_path, "--epochs", "1", "--resume")
    with pytest.raises(InputError, match="add a --teacher"):
        train(tmp_path, "--teacher", "none", "--teacher-outputs", "x.pth", "--overwrite")


def test_a_teachers_state_that_is_left_over_is_removed(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    # A run that dies between two files as stage 1 ends leaves both.
    copy = copy_of(tiny_run[0], tmp_path)
    state = storage.load_checkpoint(copy / "checkpoints" / "teacher_vae.pth")
    storage.save_checkpoint(copy / "checkpoints" / "teacher_last.pth", {"record": state["record"]})
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    train(copy, "--resume")
    assert not (copy / "checkpoints" / "teacher_last.pth").exists()
    assert_same_run(tiny_run[0], copy)


def test_overwrite_removes_what_was_made_of_the_old_student(tiny_run, tmp_path, monkeypatch):
    copy = copy_of(tiny_run[0], tmp_path)
    evaluated = ("samples.png", "traversal.png", "colours.png", "evaluation.json")
    for name in (*evaluated, "note.txt"):
        (copy / "outputs" / name).touch()

    def stop(run):
        raise InputError("that is enough")

    monkeypatch.setattr(report, "print_summary", stop)
    with pytest.raises(InputError, match="enough"):
        train(copy, "--overwrite")
    left = {path.name for path in contents(copy)}
    assert left == {"teacher_vae.pth", "config.json", "note.txt", ".lock"}


def test_the_demo_replaces_its_own_folders_and_no_others(
    tmp_path, monkeypatch, capsys, without_pictures
):
    tiny = {"data": "dead-leaves", "limit": 70, "teacher_epochs": 1, "epochs": 1}
    monkeypatch.setattr(distill_tinyvae, "DEMO_SETTINGS", distill_tinyvae.DEMO_SETTINGS | tiny)
    mine = {tmp_path / "checkpoints" / "tinyvae_best.pth", tmp_path / "outputs" / "metrics.csv"}
    for path in mine:
        path.parent.mkdir()
        path.write_text("mine")
    flags = ["--demo", "--device", "cpu", "--batch-size", "32", *folders(tmp_path)]
    for _ in range(2):
        distill_tinyvae.main(flags)
        assert "Stage 1 skipped" not in capsys.readouterr().out  # the demo shows both stages
    before = contents(tmp_path)
    distill_tinyvae.main([*flags, "--resume"])
    assert "Resuming the student after epoch 1" in capsys.readouterr().out
    assert contents(tmp_path).keys() == before.keys()
    assert len(before) > 6
    outside = {path for path in before if path.parent.name != "demo"}
    assert outside == mine and all(path.read_text() == "mine" for path in mine)


class Stub:
    """A teacher whose code is the pixels, as it was trained to have them: 2x − 1, or x."""

    latent_dim, check_range = 3072, True

    def __init__(self, factor, offset, alive):
        self.factor, self.offset, self.alive = factor, offset, alive

    def encode(self, images):
        mu = images.flatten(1).clone()
        mu[:, self.alive :] = mu[0, self.alive :]
        return mu, torch.zeros_like(mu)

    def decode(self, mu):
        return ((mu - self.offset) / self.factor).clamp(0, 1).view(-1, 3, 32, 32)


def test_a_teacher_is_tried_before_the_work(tiny_run, tmp_path, monkeypatch, capsys):
    images = (random_images(20) * 255).byte()
    for factor, offset, pixels in ((2, -1, r"\[-1, 1\]"), (255, 0, r"\[0, 255\]")):
        with pytest.raises(InputError, match=f"x.pth was trained on pixels in {pixels}, and pix"):
            teacher_outputs.check_teacher(Stub(factor, offset, 3072), images, "x.pth", 64)
    teacher_outputs.check_teacher(Stub(1, 0, 3072), images, "x.pth", 64)
    assert capsys.readouterr().out == ""
    teacher_outputs.check_teacher(Stub(1, 0, 63), images, "x.pth", 64)
    assert capsys.readouterr().out.startswith("Warning: 63 of the 3072 latents of x.pth are alive")

    run, _ = tiny_run
    tried = []

    def refuse_it(teacher, images, path, latent_dim):
        tried.append((path, len(images), latent_dim))
        raise InputError("unfit")

    monkeypatch.setattr(runs, "check_teacher", refuse_it)
    with pytest.raises(InputError, match="unfit"):
        train(tmp_path, *teacher_of(run))
    assert tried == [(run / "checkpoints" / "teacher_vae.pth", 70, 64)]
    assert list(tmp_path.iterdir()) == []


def test_a_model_stored_in_half_precision_loads_in_single(tmp_path):
    vae = TinyVAE32().eval()
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in vae.state_dict().items()
    }
    path = tmp_path / "half.pth"
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": weights})
    loaded, _ = models.load_model(path, TinyVAE32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    images = random_images(2)
    torch.testing.assert_close(loaded(images)[0], vae(images)[0], atol=1e-3, rtol=0)


def test_a_teacher_of_larger_images_is_told_from_other_weights_that_do_not_fit(tmp_path):
    teacher = StandardVAE(64, (4, 4, 4, 4))
    weights = teacher.state_dict()
    weights["fc_mu.weight"] = torch.zeros(64, 64)  # 4 channels, 4×4 positions
    path = tmp_path / "teacher.pth"
    storage.save_checkpoint(path, {"architecture": teacher.architecture, "model": weights})
    with pytest.raises(InputError, match="may be made for images of another size than 32×32"):
        train(tmp_path / "run", "--teacher", str(path))
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    for stage in ("train_teacher", "distil_student"):
        monkeypatch.setattr(distill_tinyvae, stage, refuse)
    with pytest.raises(InputError, match="do not fill one batch of 71"):
        train(tmp_path, "--batch-size", "71")
    weights = [word for term in losses.TERMS for word in (f"--{term}-weight", "0")]
    with pytest.raises(InputError, match="all five weights are zero"):
        train(tmp_path, *weights)
    with pytest.raises(InputError, match=r"the teacher has 32 latents, fewer than the .* 64"):
        train(tmp_path, "--teacher-latent-dim", "32")
    with pytest.raises(InputError, match=r"^64 training images are too few .* to 64: at least 65"):
        train(tmp_path, "--limit", "64")
    for flag in ("--teacher", "--start"):
        with pytest.raises(InputError, match=r"there is no checkpoint nowhere\.pth"):
            train(tmp_path, flag, "nowhere.pth")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for flag in ("--output-dir", "--checkpoint-dir"):
        with pytest.raises(InputError, match="could not make the folder"):
            train(tmp_path, flag, str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--data", "cifar10", "--vgg", "none"), ("CIFAR-10", "--data", "--demo")),
        (
            ("--data", "dead-leaves", "--limit", "64"),
            ("ImageNet", "--vgg PATH", "--vgg none", "--demo"),
        ),
    ],
)
def test_without_network_the_real_recipe_stops_at_once(tmp_path, monkeypatch, flags, named):
    nowhere = "http://127.0.0.1:9"  # the discard port: connections are refused
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies it began with
    monkeypatch.setattr(data, "DATA_DIR", tmp_path)
    with pytest.raises(InputError, match="could not be downloaded") as refused:
        distill_tinyvae.main([*flags, *folders(tmp_path)])
    assert all(word in str(refused.value) for word in named)


def test_a_term_can_be_left_out_and_bf16_trains(tmp_path):
    less = ("--vgg", "none", "--latent-weight", "0", "--epochs", "1", "--teacher-epochs", "1")
    row = train(tmp_path, *less, "--precision", "bf16", "--limit", "8", "--batch-size", "8")[-1]
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["perceptual_weight"] == 0 and config["vgg"] == "none"
    assert config["precision"] == "bf16"
    assert row["perceptual"] == row["latent"] == "" != row["output"]


# --- Runs that begin with what there is ---


def test_without_a_term_that_needs_a_teacher_none_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    monkeypatch.setattr(distill_tinyvae, "teacher_outputs", refuse)
    scratch = ("--vgg", "none", "--latent-weight", "0", "--output-weight", "0", "--epochs", "1")
    (row,) = train(tmp_path, *scratch)
    assert row["stage"] == "student"
    assert row["latent"] == row["output"] == row["projected_std"] == "" != row["kl"]
    assert not (tmp_path / "checkpoints" / "teacher_vae.pth").exists()
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 3


def test_a_teacher_that_is_given_is_taken_in_place_of_stage_1(
    tiny_run, tmp_path, monkeypatch, capsys, without_pictures
):
    run, _ = tiny_run
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    train(tmp_path, *teacher_of(run))
    path = run / "checkpoints" / "teacher_vae.pth"
    assert f"Stage 1 skipped: the teacher is {path} (" in capsys.readouterr().out
    assert_same_weights(run, tmp_path, "tinyvae_best.pth", "tinyvae_last.pth")
    assert read_rows(run) == read_rows(tmp_path)  # those of stage 1 among them
    assert not (tmp_path / "checkpoints" / "teacher_vae.pth").exists()

    other = storage.load_checkpoint(path)
    other["model"]["fc_mu.bias"] += 1
    storage.save_checkpoint(tmp_path / "other.pth", other)
    with pytest.raises(InputError, match=r"other settings \(the teacher differs\)"):
        train(tmp_path, "--resume", "--teacher", str(tmp_path / "other.pth"))


def test_a_student_that_is_given_is_trained_further(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    torch.manual_seed(1)
    student = TinyVAE32(8, (4, 8, 8, 8), (8, 8, 8, 4)).eval()
    given = tmp_path / "given.pth"
    checkpoint = {"architecture": student.architecture, "model": student.state_dict()}
    storage.save_checkpoint(given, checkpoint)
    asked = []

    def spy(*args):
        asked.append(args)
        return losses.make_projection(*args)

    monkeypatch.setattr(distill_tinyvae, "make_projection", spy)
    flags = (*teacher_of(run), "--start", str(given))

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "steps", interrupted)
        train(tmp_path, *flags)
    last = tmp_path / "checkpoints" / "tinyvae_last.pth"
    before = storage.load_checkpoint(last)
    assert before["epoch"] == 0 and before["architecture"] == student.architecture
    for name, weight in student.state_dict().items():
        assert torch.equal(before["model"][name], weight)
    _, teacher_mu, _, latent_dim, student_mu = asked[0]
    assert latent_dim == 8 and teacher_mu.shape[0] == 70
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["latent_dim"] == 8 and config["encoder_channels"] == [4, 8, 8, 8]
    images = data.load_training_images("dead-leaves", 70).train
    torch.testing.assert_close(student_mu, student.encode(data.to_float(images))[0])

    train(tmp_path, *flags, "--resume")
    after = storage.load_checkpoint(last)
    assert after["epoch"] == 3 and after["architecture"] == student.architecture
    assert (after["model"]["fc_mu.weight"] - student.fc_mu.weight).abs().max() > 1e-5
    checkpoint["model"]["fc_mu.bias"] += 1
    storage.save_checkpoint(given, checkpoint)
    with pytest.raises(InputError, match=r"\(the weights it starts from differ\)"):
        train(tmp_path, *flags, "--resume")


@pytest.mark.parametrize(
    ("flag", "name"), [("--start", "tinyvae_best.pth"), ("--teacher", "teacher_last.pth")]
)
def test_what_a_run_begins_with_is_none_of_the_files_that_it_replaces(
    flag, name, tiny_run, tmp_path
):
    copy = copy_of(tiny_run[0], tmp_path)
    named = copy / "checkpoints" / name
    if not named.exists():
        shutil.copy(copy / "checkpoints" / "teacher_vae.pth", named)
    before = contents(copy)
    with pytest.raises(InputError, match=rf"{name} is one of the files .*: copy it"):
        train(copy, "--overwrite", flag, str(named))
    assert contents(copy) == before


def test_the_teachers_outputs_are_kept_for_runs_that_share_them(
    tiny_run, tmp_path, monkeypatch, capsys, without_pictures
):
    run, _ = tiny_run
    cache = tmp_path / "outputs.pth"
    flags = ("--teacher-outputs", str(cache), "--epochs", "1")
    train(tmp_path / "first", *teacher_of(run), *flags)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "compute_outputs", refuse)
        train(tmp_path / "second", *teacher_of(run), *flags)
    names = ("tinyvae_best.pth", "tinyvae_last.pth")
    assert_same_weights(tmp_path / "first", tmp_path / "second", *names)
    assert read_rows(tmp_path / "first") == read_rows(tmp_path / "second")

    teacher, _ = models.load_model(run / "checkpoints" / "teacher_vae.pth", StandardVAE)
    images = data.load_training_images("dead-leaves", 70)
    job = SimpleNamespace(
        record={"pixels_sha256": images.record["pixels_sha256"], "precision": "fp32"},
        images=images.train, val_images=images.val, precision="fp32", device=torch.device("cpu"),
    )

    def outputs():
        """The outputs, and whether they were computed."""
        with monkeypatch.context() as patch:
            computed, compute = [], teacher_outputs.compute_outputs
            spy = lambda *args: computed.append(1) or compute(*args)  # noqa: E731
            patch.setattr(teacher_outputs, "compute_outputs", spy)
            return teacher_outputs.teacher_outputs(teacher, job, cache), bool(computed)

    capsys.readouterr()
    kept, computed = outputs()
    assert not computed and capsys.readouterr().out == ""
    mu, _ = teacher.encode(data.to_float(images.train))
    torch.testing.assert_close(kept.mu, mu)
    torch.testing.assert_close(kept.logits, teacher.decode_logits(mu).half())
    torch.testing.assert_close(kept.val_mu, teacher.encode(data.to_float(images.val))[0])
    with torch.no_grad():
        teacher.fc_mu.bias += 1
    other, computed = outputs()
    assert computed and "another teacher, images or precision" in capsys.readouterr().out
    torch.testing.assert_close(other.mu, kept.mu + 1)
    assert not outputs()[1]  # now it holds this teacher's
    for name in ("pixels_sha256", "precision"):
        job.record[name] = "another"
        assert outputs()[1]
    storage.save_checkpoint(cache, storage.load_checkpoint(cache) | {"outputs": None})
    with pytest.raises(InputError, match=r"is damaged: delete it, and it is computed again"):
        outputs()


def test_a_file_that_holds_no_teachers_outputs_is_not_replaced_by_them(tiny_run, tmp_path):
    copy = copy_of(tiny_run[0], tmp_path)
    mine, notes = copy / "checkpoints" / "teacher_vae.pth", tmp_path / "notes.txt"
    notes.write_text("not a checkpoint")
    for file, message in (
        (mine, "does not hold a teacher's outputs: name another file"),
        (notes, "not a checkpoint of plain data"),
    ):
        before = file.read_bytes()
        with pytest.raises(InputError, match=message):
            train(tmp_path / "third", *teacher_of(copy), "--teacher-outputs", str(file))
        assert file.read_bytes() == before and not (tmp_path / "third").exists()


# --- Interrupted and resumed ---


def test_killed_in_either_stage_a_run_resumes_bit_for_bit(tiny_run, tmp_path):
    run, _ = tiny_run
    # Killed once a row of metrics.csv says that this epoch is over: in the teacher's second, in
    # the student's second. The output shows from which epoch each run goes on.
    for rows in (1, 3):
        process = start(*TINY, *folders(tmp_path), "--resume")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            table = tmp_path / "outputs" / "metrics.csv"
            if table.exists() and len(read_rows(tmp_path)) > rows:
                break
            time.sleep(0.01)
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
        expected = {1: "Nothing to resume", 3: "Resuming the teacher after epoch 1"}[rows]
        assert expected in output
    process = start(*TINY, *folders(tmp_path), "--resume")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "Stage 1 skipped" in output and "Resuming the student after epoch 1" in output
    assert_same_run(run, tmp_path)


def train_until_interrupted(monkeypatch, epochs, *arguments):
    """`train`, with Ctrl-C after this many of the student's epochs."""
    steps = training.Stage.steps

    def interrupted(self):
        if self.name == "student" and len(self.rows) == epochs:
            raise KeyboardInterrupt
        return steps(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "steps", interrupted)
        train(*arguments)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_random_state_of_a_gpu_is_resumed_on_one(device, monkeypatch):
    stage = stage_of(TinyVAE32(), data.dead_leaves(34, "train"))
    restored = []
    monkeypatch.setattr(getattr(torch, device), "get_rng_state", lambda: "of the GPU")
    monkeypatch.setattr(getattr(torch, device), "set_rng_state", restored.append)
    without = stage.state()
    stage.run.device = torch.device(device)
    with_gpu = stage.state()
    assert with_gpu["random"][device] == "of the GPU" and device not in without["random"]
    stage.load_state(without)
    assert restored == []
    stage.load_state(with_gpu)
    stage.run.device = torch.device("cpu")
    stage.load_state(with_gpu)
    assert restored == ["of the GPU"]


@pytest.mark.parametrize("changes", [("--optimizer", "adam"), ("--rate", "20")])
def test_with_other_settings_a_run_resumes_bit_for_bit(
    changes, tiny_run, tmp_path, monkeypatch, without_pictures
):
    run, _ = tiny_run
    flags = (*teacher_of(run), "--epochs", "3", *changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *flags)
    train_until_interrupted(monkeypatch, 2, parts, *flags)
    train(parts, *flags, "--resume")
    assert_same_weights(whole, parts, "tinyvae_best.pth", "tinyvae_last.pth")


def test_ctrl_c_ends_in_a_sentence(tmp_path):
    # What a shell starts in the background ignores the signal, and so does what that starts.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    flags = (*TINY, *folders(tmp_path), "--epochs", "1000")  # not over before the signal
    process = start(*flags, preexec_fn=listen)
    while not (tmp_path / "outputs" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command with --resume" in output and "Traceback" not in output


def test_failing_at_any_write_a_run_resumes_bit_for_bit(tmp_path, monkeypatch, without_pictures):
    # Every write of a run fails once, after the file's content is complete but before it is in
    # place; the run is resumed after each. This meets every moment between two files.
    flags = ("--vgg", "none", "--teacher-epochs", "1", "--epochs", "2")
    train(tmp_path / "whole", *flags)

    failed = set()
    write = storage.write_bytes

    def fail_once(path, content):
        # What a file is at this point of the run: its name and how far the table is.
        table = tmp_path / "broken" / "outputs" / "metrics.csv"
        moment = (Path(path).name, len(table.read_text().splitlines()) if table.exists() else 0)
        if Path(path).name != "write_test" and moment not in failed:
            failed.add(moment)
            raise InputError("this write failed")
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", fail_once)
    for _ in range(40):
        try:
            train(tmp_path / "broken", *flags, "--resume")
            break
        except InputError as error:
            assert str(error) == "this write failed"
    assert {name for name, _ in failed} >= {
        "teacher_last.pth", "teacher_vae.pth", "tinyvae_last.pth", "tinyvae_best.pth",
        "tinyvae_epoch_002.pth", "metrics.csv", "config.json",
    }
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("what", ["loss", "validation mse"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    tiny_run, tmp_path, monkeypatch, what, without_pictures
):
    run, _ = tiny_run
    copy = copy_of(run, tmp_path)
    for path in (copy / "checkpoints").glob("tinyvae_*"):
        path.unlink()
    # Before the second epoch, or after the last loss of the second epoch has been read.
    method = "steps" if what == "loss" else "validate"
    original = getattr(training.Stage, method)

    def poisoned(self):
        if len(self.rows) == 1:
            self.model.fc_mu.bias.data.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(training.Stage, method, poisoned)
    with pytest.raises(InputError, match=rf"the {what} of the student became nan in epoch 2; .*"):
        train(copy, "--resume")
    last = storage.load_checkpoint(copy / "checkpoints" / "tinyvae_last.pth")
    assert last["epoch"] == 1
    assert all(value.isfinite().all() for value in last["model"].values())


# --- CUDA ---


class FakeGenerator:
    state = "before"

    def clone_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state


def test_a_failed_capture_goes_on_step_by_step_and_is_recorded(
    tmp_path, monkeypatch, capsys, without_pictures
):
    @contextlib.contextmanager
    def graph(*args, **kwargs):  # as torch.cuda.graph ends where its body raises
        generator.state = "in capture"
        calls.append("capture")
        try:
            raise reason
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
        yield

    calls, streams, generator = [], [], FakeGenerator()
    for name, value in {
        "graph": graph, "CUDAGraph": SimpleNamespace, "default_generators": [generator],
        "current_device": lambda: 0, "current_stream": lambda: stream,
        "Stream": lambda: stream, "stream": lambda _: contextlib.nullcontext(),
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    reason = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        cuda_graph.StepGraph(lambda: None, calls.append).capture()
    assert calls == ["capture"]

    generator.state = "before"
    reason = RuntimeError("a host synchronisation\nand more")
    graphed = training.Stage.graphed

    def pretend(self, step):
        self.is_graphed = True
        return graphed(self, step)

    monkeypatch.setattr(cuda_graph, "STEPS_BEFORE_CAPTURE", 1)
    flags = ("--teacher-epochs", "1", "--epochs", "1")
    train(tmp_path / "plain", *flags)
    monkeypatch.setattr(training.Stage, "graphed", pretend)
    train(tmp_path / "failed", *flags)
    assert calls == ["capture"] * 3  # once a stage, and above
    assert generator.state == "before" and streams == [stream] * 2
    printed = capsys.readouterr().out
    assert "one by one, since recording one as a CUDA graph failed (a host sync" in printed
    assert_same_run(tmp_path / "plain", tmp_path / "failed")
    record = json.loads((tmp_path / "failed" / "outputs" / "config.json").read_text())
    assert record["graph_failed"] == "a host synchronisation"
    last = storage.load_checkpoint(tmp_path / "failed" / "checkpoints" / "tinyvae_last.pth")
    assert last["record"]["graph_failed"] == "a host synchronisation"


def skip_without_bf16(precision):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this CUDA device has no bf16")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_does_what_single_kernels_do(precision, tmp_path, monkeypatch, without_pictures):
    skip_without_bf16(precision)
    captured, capture = [], cuda_graph.StepGraph.capture
    monkeypatch.setattr(
        cuda_graph.StepGraph,
        "capture",
        lambda self: (capture(self), captured.append(self.graph is not None)),
    )
    graphed = training.Stage.graphed

    def recording(self, step):
        step = graphed(self, step)

        def record():
            before = 0 if self.sums is None else self.sums[0].item()
            step()
            found[self.name].append(self.sums[0].item() - before)

        return record

    monkeypatch.setattr(training.Stage, "graphed", recording)
    both = []
    for flag in ("--graph", "--no-graph"):
        found = {"teacher": [], "student": []}
        train(
            tmp_path / flag, "--device", "cuda", "--precision", precision, flag, "--limit", "256",
            "--teacher-epochs", "13", "--epochs", "13", "--save-every", "100",
        )
        both.append(found)
    assert captured == [True, True]  # one a stage, with --graph alone
    first, all_of_them = (1e-4, 1e-2) if precision == "fp32" else (1e-2, 5e-2)
    for stage in ("teacher", "student"):
        with_graph, without = (found[stage] for found in both)
        assert len(with_graph) == 8 * 13
        assert with_graph[:10] == pytest.approx(without[:10], rel=first)
        assert with_graph == pytest.approx(without, rel=all_of_them)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_cuda(tmp_path, precision, monkeypatch):
    skip_without_bf16(precision)
    monkeypatch.setattr(cuda_graph, "STEPS_BEFORE_CAPTURE", 1)
    flags = ("--device", "cuda", "--precision", precision)
    train_until_interrupted(monkeypatch, 1, tmp_path, *flags)
    train(tmp_path, *flags, "--resume")
    assert len(read_rows(tmp_path)) == 6
    state = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")
    assert bool(state["scaler"]) == (precision == "fp16")
    assert "graph_failed" not in state["record"]


@needs_cuda
def test_on_cuda_a_step_that_cannot_be_recorded_is_launched_as_it_is():
    values, reasons = [], []
    x = torch.zeros((), device="cuda")

    def step():
        x.add_(torch.rand_like(x) + 1)
        values.append(x.item())  # waits for the device, which capture forbids

    graphed = cuda_graph.StepGraph(step, reasons.append)
    for _ in range(cuda_graph.STEPS_BEFORE_CAPTURE + 5):
        graphed()
    assert len(reasons) == 1 and graphed.graph is None
    assert values == sorted(set(values)) and len(values) == cuda_graph.STEPS_BEFORE_CAPTURE + 5
