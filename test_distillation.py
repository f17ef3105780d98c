"""The test suite: `pytest`. Generated images, no network, no GPU; about 4 minutes on 2 cores.

The real scripts run here with tiny budgets, in this process where that shows the same, and as
subprocesses where it matters: killed, interrupted, without a network, out of disk space.
"""

import base64
import contextlib
import csv
import functools
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ablate_distillation
import bench_training
import data
import distill_tinyvae
import export_tinyvae
import losses
import metrics
import models
import prune_tinyvae
import runtime
import storage
import test_trained_model
import training
from runtime import InputError
from standard_vae import StandardVAE
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    distill_tinyvae, test_trained_model, ablate_distillation, bench_training, export_tinyvae,
    prune_tinyvae,
)
# pytest runs two workers (pyproject.toml): one thread for each of them and of what they start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def random_images(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def random_normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_any_width_is_the_same_class():
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


def test_weights_make_the_beta_that_is_printed():
    # Summed squared error + beta · summed KL, scaled, must be the two terms as they are weighed.
    mu, logvar = random_normal(8, 64), random_normal(8, 64, seed=1)
    images, reconstruction = random_images(8), random_images(8, seed=1)
    beta = losses.effective_beta(0.1, 0.3)
    summed = (reconstruction - images).square().sum() + beta * losses.kl_divergence(
        mu, logvar
    ).sum()
    weights = dict.fromkeys(losses.TERMS, 0.0) | {"reconstruction": 0.3, "kl": 0.1}
    criterion = losses.DistillationLoss(weights, 3.0, projection=None)
    weighed, _ = criterion(images, reconstruction.logit(), None, mu, logvar, None, None)
    torch.testing.assert_close(weighed, 0.3 * summed / (8 * 3072))
    assert beta == pytest.approx(1 / 6)


def test_output_term_is_a_softened_bernoulli_divergence():
    student, teacher = random_normal(2, 3, 32, 32), random_normal(2, 3, 32, 32, seed=1)
    found = losses.output_distillation_loss(student, teacher, 3.0)
    soft = [torch.distributions.Bernoulli(logits=logits / 3) for logits in (teacher, student)]
    expected = 4.5 * torch.distributions.kl_divergence(*soft).mean()
    torch.testing.assert_close(found, expected)
    assert losses.output_distillation_loss(teacher, teacher, 3.0).abs() < 1e-6
    half = losses.output_distillation_loss(student, teacher.half(), 3.0)  # as they are cached
    torch.testing.assert_close(half, expected, rtol=1e-3, atol=0)
    flat = losses.output_distillation_loss(student, teacher, 30.0)  # nearly the limit of large T
    torch.testing.assert_close(flat, (student - teacher).square().mean() / 16, rtol=0.01, atol=0)
    grey, greyish = torch.tensor([0.5, 0.52]).logit().split(1)  # here an error is its square
    small = losses.output_distillation_loss(greyish, grey, 3.0)
    assert small.item() == pytest.approx(0.02**2, rel=0.01)


def test_temperature_turns_the_gradient():
    teacher = 4 * random_normal(2, 3, 32, 32, seed=1)

    def gradient(temperature):
        logits = random_normal(2, 3, 32, 32).requires_grad_()
        losses.output_distillation_loss(logits, teacher, temperature).backward()
        return logits.grad.flatten()

    # Not the same direction at another length, which a weight could do as well.
    assert F.cosine_similarity(gradient(1.0), gradient(3.0), dim=0) < 0.99


def correlated_mu(count=2000, teacher_dim=96, seed=0):
    """Codes as a teacher's are: correlated, off centre, with directions that hardly vary."""
    mixing = random_normal(teacher_dim, teacher_dim, seed=seed)
    scale = torch.logspace(0, -2, teacher_dim)
    return (random_normal(count, teacher_dim, seed=seed + 1) * scale) @ mixing + 3


def test_projection_is_white_and_starts_at_the_leading_components():
    mu = correlated_mu()
    projection = losses.LatentProjection(mu, latent_dim=16, components=32)
    projected = projection(mu)
    torch.testing.assert_close(projected.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    covariance = projected.T @ projected / len(mu)
    torch.testing.assert_close(covariance, torch.eye(16), atol=1e-2, rtol=0)
    # The first coordinate is the code along the direction that varies most.
    _, _, directions = torch.linalg.svd(mu - mu.mean(0), full_matrices=False)
    leading = (mu - mu.mean(0)) @ directions[0]
    correlation = torch.corrcoef(torch.stack([leading, projected[:, 0]]))[0, 1]
    assert correlation.abs() > 0.999


@pytest.mark.parametrize("target", ["nothing", "one direction"])
def test_projection_cannot_collapse(target):
    # The pull that makes a plain linear map collapse: a student that sits at zero, or one that
    # knows a single direction and has copied it into every latent.
    mu = correlated_mu()
    projection = losses.LatentProjection(mu, latent_dim=16, components=32)
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


def test_projection_survives_a_teacher_without_variance():
    projection = losses.LatentProjection(torch.ones(10, 96), latent_dim=16)
    assert projection(torch.ones(10, 96)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="8 latents, fewer than the student's 16"):
        losses.LatentProjection(torch.ones(10, 8), latent_dim=16)


def test_perceptual_term_sees_differences_and_trains_only_the_images():
    features, record = losses.load_vgg16("random", seed=0)
    assert record["vgg_weights"] == "random, seed 0"
    perceptual = losses.PerceptualLoss(features)
    images = random_images(2)
    near = (images + 0.02 * random_normal(2, 3, 32, 32)).clamp(0, 1).requires_grad_()
    assert perceptual(images, images) == 0
    assert 0 < perceptual(near, images) < perceptual(random_images(2, seed=1), images)
    perceptual(near, images).backward()
    assert near.grad.abs().max() > 0
    assert all(not parameter.requires_grad for parameter in perceptual.parameters())
    for layer in perceptual.unit_features(images):
        torch.testing.assert_close(layer.norm(dim=1), torch.ones_like(layer[:, 0]))


def test_vgg16_comes_from_where_it_is_said_to(tmp_path):
    features, record = losses.load_vgg16("random", seed=1)
    assert record != losses.load_vgg16("random", seed=2)[1]
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(weights | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    loaded, loaded_record = losses.load_vgg16(str(tmp_path / "vgg.pth"))
    assert loaded_record["vgg_sha256"] == record["vgg_sha256"]
    assert torch.equal(loaded(random_images(1)), features(random_images(1)))

    with pytest.raises(InputError, match="there is no file imagnet: --vgg takes imagenet, random"):
        losses.load_vgg16("imagnet")
    weights["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"are not VGG16's: size mismatch for 0\.weight"):
        losses.load_vgg16(str(tmp_path / "vgg.pth"))
    del weights["features.0.weight"]
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"features\.0\.weight is missing"):
        losses.load_vgg16(str(tmp_path / "vgg.pth"))


def test_total_is_the_weighted_sum_and_zero_weights_cost_nothing():
    weights = dict(zip(losses.TERMS, (0.3, 0.1, 0.3, 0.2, 0.0)))
    teacher_mu = correlated_mu()
    projection = losses.LatentProjection(teacher_mu, 64)
    criterion = losses.DistillationLoss(weights, 3.0, projection, perceptual=None)
    logits, mu = random_normal(4, 3, 32, 32), random_normal(4, 64)
    total, terms = criterion(
        random_images(4), logits, logits, mu, torch.zeros(4, 64), logits + 1, teacher_mu[:4]
    )
    assert list(terms) == ["reconstruction", "kl", "latent", "output"]
    weighed = sum(weights[name] * terms[name].item() for name in terms)
    assert total.item() == pytest.approx(weighed)


def test_the_latent_term_fades_to_its_floor():
    weights = dict.fromkeys(losses.TERMS, 0.0) | {"latent": 0.3}
    teacher_mu, mu = correlated_mu(), random_normal(4, 64)
    criterion = losses.DistillationLoss(
        weights, 3.0, losses.LatentProjection(teacher_mu, 64), latent_fade=0.5
    )

    def share(progress):
        criterion.progress.fill_(progress)
        total, terms = criterion(None, None, None, mu, None, None, teacher_mu[:4])
        return (total / terms["latent"] / 0.3).item()

    shares = [share(progress) for progress in (0, 0.25, 0.5, 1)]
    assert shares == pytest.approx([1, 0.5, losses.LATENT_FLOOR, losses.LATENT_FLOOR])
    assert not criterion.needs_mean


# --- Training ---


def stage_of(vae, criterion, images, epochs=1, batch_size=8, **settings):
    """A stage on the CPU, in fp32, outside of any run."""
    settings = {"learning_rate": 1e-3, "warmup": 0.25, "seed": 0, "graph": False} | settings
    job = SimpleNamespace(
        settings=SimpleNamespace(batch_size=batch_size, **settings),
        precision="fp32",
        images=images,
        val_images=images,
    )
    return training.Stage("student", vae, criterion, [], epochs, job)


def test_the_learning_rate_rises_then_falls_to_nothing():
    criterion = losses.VAELoss(0.1)
    stage = stage_of(TinyVAE32(), criterion, data.dead_leaves(32, 0, "train"), epochs=2)
    rates = []
    for step in range(8):
        stage.set_schedule(step)
        assert criterion.progress == step / 8
        (group,) = stage.optimizer.param_groups
        rates.append(group["lr"].item() / 1e-3)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([0.5, 1, *cosine])


def test_batch_norm_knows_the_images_and_the_means_that_will_be_decoded():
    torch.manual_seed(0)
    vae = TinyVAE32()
    images = data.dead_leaves(60, 0, "train")
    training.calibrate(vae, images, "fp32")
    assert not any(module.training for module in vae.modules())
    with torch.no_grad():
        floats = data.to_float(images)
        mu, _ = vae.encode(floats)
        encoded = vae.encoder[0](floats)
        decoded = vae.decoder[0](vae.decoder_input(mu).view(60, -1, 2, 2))
    for layer, seen in ((vae.encoder[1], encoded), (vae.decoder[1], decoded)):
        # BatchNorm sums in single precision: its variances are off by up to 3e-5 of them.
        expected = seen.double().mean((0, 2, 3)), seen.double().var((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), expected[1], atol=1e-5, rtol=1e-4)
        assert layer.momentum == TinyVAE32().decoder[1].momentum


# --- Images ---


def test_dead_leaves_depend_on_seed_and_split_alone():
    leaves = data.dead_leaves(40, 0, "train")
    assert leaves.dtype == torch.uint8 and leaves.shape == (40, 3, 32, 32)
    assert torch.equal(leaves, data.dead_leaves(40, 0, "train"))
    assert torch.equal(leaves[:7], data.dead_leaves(7, 0, "train"))
    for other in (data.dead_leaves(40, 1, "train"), data.dead_leaves(40, 0, "test")):
        assert (leaves != other).any((1, 2, 3)).all()


def write_images(folder, count, first=0, size=(32, 32)):
    """PNGs whose red channel numbers them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        pixels[..., 0] = i
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("classes", [True, False])
def test_folder_is_read_with_and_without_classes(data_dir, classes):
    folder = data_dir / "photos"
    write_images(folder / "train" / ("cats" if classes else ""), 30)
    write_images(folder / "train" / ("dogs" if classes else ""), 30, first=30)
    write_images(folder / "test" / ("dogs" if classes else ""), 5, first=100)
    images = data.load_training_images(str(folder))
    numbers = [int(image[0, 0, 0]) for image in torch.cat([images.train, images.val])]
    assert sorted(numbers) == list(range(60))  # each once, so none is in both splits
    assert (len(images.train), len(images.val)) == (54, 6)
    assert numbers[:10] != sorted(numbers[:10])  # not one class after another
    test = data.load_test_images(str(folder))
    assert len(test.images) == 5
    if classes:  # labels keep to their images: numbers below 30 are cats
        both = torch.cat([images.labels, images.val_labels])
        assert both.tolist() == [int(number >= 30) for number in numbers]
        assert test.labels.tolist() == [1] * 5
    else:
        assert images.labels is images.val_labels is test.labels is None

    limited = data.load_training_images(str(folder), limit=4)
    assert torch.equal(limited.train, images.train[:4])
    assert torch.equal(limited.val, images.val[:4])
    assert limited.record["train_images"] == 4


def test_folder_is_decoded_once_until_it_changes(data_dir, monkeypatch, capsys):
    folder = data_dir / "photos"
    write_images(folder / "train", 10)
    first = data.load_training_images(str(folder))

    def decode_again(paths, description):
        raise AssertionError("decoded a second time")

    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", decode_again)
        again = data.load_training_images(str(folder))
    assert torch.equal(first.train, again.train)

    write_images(folder / "train", 1, first=10)
    assert len(data.load_split(str(folder), "train").images) == 11
    assert "has changed" in capsys.readouterr().out
    (cache,) = (data_dir / "data" / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(data.load_split(str(folder), "train").images) == 11
    assert "is damaged" in capsys.readouterr().out


def test_other_sizes_are_scaled_and_cropped_and_it_is_said(data_dir, capsys):
    write_images(data_dir / "photos" / "train", 3, size=(40, 100))
    assert data.load_split(str(data_dir / "photos"), "train").images.shape == (3, 3, 32, 32)
    assert "3 of 3 images were not 32×32" in capsys.readouterr().out


def test_unusable_folders_are_refused(data_dir):
    with pytest.raises(InputError, match="there is no folder"):
        data.load_training_images(str(data_dir / "nowhere"))
    (data_dir / "photos").mkdir()
    with pytest.raises(InputError, match=r"photos.train: a folder of images has train/"):
        data.load_training_images(str(data_dir / "photos"))
    (data_dir / "photos" / "train").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        data.load_training_images(str(data_dir / "photos"))
    write_images(data_dir / "photos" / "train", 2)
    with pytest.raises(InputError, match="has 2 training images: at least 4"):
        data.load_training_images(str(data_dir / "photos"))
    link = data_dir / "photos" / "train" / "link.png"
    link.symlink_to(data_dir / "nowhere.png")
    with pytest.raises(InputError, match=r"link\.png is a link to nothing"):
        data.load_training_images(str(data_dir / "photos"))
    link.unlink()
    broken = data_dir / "photos" / "train" / "000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=r"could not read the image .*000\.png"):
        data.load_training_images(str(data_dir / "photos"))
    (data_dir / "photos" / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match="incomplete or damaged"):
        data.load_training_images(str(data_dir / "photos"))


def test_a_linked_class_folder_is_followed(data_dir):
    write_images(data_dir / "elsewhere", 5)
    (data_dir / "photos" / "train").mkdir(parents=True)
    (data_dir / "photos" / "train" / "cats").symlink_to(data_dir / "elsewhere")
    assert len(data.load_split(str(data_dir / "photos"), "train").images) == 5


def test_an_epoch_shows_each_image_at_most_once():
    steps = data.shuffled_batches(70, 32, torch.Generator().manual_seed(0))
    assert steps.shape == (2, 32)
    assert len(steps.unique()) == 64


# --- Metrics ---


def test_psnr_of_known_errors():
    assert metrics.psnr(torch.tensor([1.0, 0.01])).tolist() == pytest.approx([0, 20])


def test_ssim_agrees_with_the_definition_window_by_window():
    x, y = random_images(1).double(), random_images(1, seed=1).double() * 0.5 + 0.2
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for channel in range(3):
        for i in range(22):
            for j in range(22):
                a, b = (t[0, channel, i : i + 11, j : j + 11].numpy() for t in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
                    / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
                )
    found = metrics.ssim(x.float(), y.float())
    assert found.item() == pytest.approx(np.mean(values), abs=1e-5)
    assert metrics.ssim(x.float(), x.float()).item() == pytest.approx(1)


def test_evaluation_is_the_same_in_batches_of_any_size(monkeypatch):
    vae, images = TinyVAE32(), data.dead_leaves(50, 0, "test")
    whole = metrics.evaluate_vae(vae, images, with_ssim=True)
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 7)
    parts = metrics.evaluate_vae(vae, images, with_ssim=True)
    assert whole == pytest.approx(parts, rel=1e-4)
    reconstruction, mu, logvar = vae(data.to_float(images))
    expected = F.mse_loss(reconstruction, data.to_float(images)).item()
    assert whole["mse"] == pytest.approx(expected, rel=1e-4)
    assert whole["kl_nats"] == pytest.approx(
        losses.kl_divergence(mu, logvar).sum().item() / 50, rel=1e-3
    )


def test_active_dimensions_are_those_whose_mean_moves():
    vae = TinyVAE32()
    with torch.no_grad():
        vae.fc_mu.weight[10:] = 0  # these latents say the same of every image
        vae.fc_mu.weight[:10] *= 1000
    assert metrics.evaluate_vae(vae, data.dead_leaves(50, 0, "test"))["active_dims"] == 10


def test_effective_rank_counts_directions():
    codes = random_normal(5000, 8)
    assert metrics.effective_rank(codes) == pytest.approx(8, abs=0.05)
    assert metrics.effective_rank(codes[:, :1].repeat(1, 8)) == pytest.approx(1, abs=0.05)


def test_pca_is_exact_where_images_have_no_more_dimensions():
    basis = random_normal(4, 3072) * 5
    flat = (random_normal(60, 4, seed=1) @ basis + 128).clamp(0, 255)
    images = flat.to(torch.uint8).view(60, 3, 32, 32)
    pca = metrics.fit_pca(images, 59)
    errors = [
        metrics.evaluate_images(
            pca._replace(components=pca.components[:k]).reconstruct, images
        )["mse"]
        for k in (1, 4, 59)
    ]
    assert errors[0] > 10 * errors[1]  # four components hold all but rounding and clipping
    assert errors[2] < 1e-6  # one less than the images hold everything
    spread = data.to_float(images).flatten(1).var(0, correction=0).sum().item()
    assert pca.variances.sum().item() == pytest.approx(spread, rel=1e-3)


def test_gaussian_bound_is_water_filling():
    variances = torch.tensor([4.0, 1.0, 0.25, 0.25])
    # The third and fourth are lost: 0.5 of error before a nat is spent.
    (point,) = metrics.gaussian_bound(variances, 2, [1.5 / 4])
    assert point[1] == pytest.approx(0.5 * math.log(4 / 0.5) + 0.5 * math.log(1 / 0.5), abs=1e-6)
    (point,) = metrics.gaussian_bound(variances, 2, [3.5 / 4])  # the second is under water too
    assert point[1] == pytest.approx(0.5 * math.log(4 / 2), abs=1e-6)
    assert metrics.gaussian_bound(variances, 2, [0.4 / 4, 6 / 4]) == []


def test_cka_sees_through_rotation_and_scale_and_nothing_else():
    codes = random_normal(2000, 8) * torch.linspace(0.5, 2, 8)
    rotation = torch.linalg.qr(random_normal(8, 8, seed=1))[0]
    assert metrics.linear_cka(codes, 3 * codes @ rotation + 5) == pytest.approx(1)
    assert metrics.linear_cka(codes, random_normal(2000, 8, seed=2)) < 0.02
    assert 0.1 < metrics.linear_cka(codes, codes[:, :3]) < 0.9


def test_classifiers_of_codes_find_what_is_there_and_no_more():
    labels = torch.arange(400) % 4
    codes = F.one_hot(labels, 4) + 0.1 * random_normal(400, 4)
    known = (codes[:200], labels[:200], codes[200:], labels[200:])
    nothing = (random_normal(200, 4), labels[:200], random_normal(200, 4, seed=1), labels[200:])
    for accuracy in (metrics.nearest_neighbour_accuracy, metrics.linear_probe_accuracy):
        assert accuracy(*known) == 1
        assert accuracy(*nothing) < 0.4
    # Inside and outside of a ring: neighbours can tell, a plane cannot.
    points = random_normal(2000, 2)
    inside = (points.norm(dim=1) < 1.18).long()
    ring = (points[:1000], inside[:1000], points[1000:], inside[1000:])
    assert metrics.nearest_neighbour_accuracy(*ring) > 0.9
    assert metrics.linear_probe_accuracy(*ring) < 0.65


def test_neighbours_vote_and_the_nearest_decides_a_tie():
    codes = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    query, truth = torch.tensor([[-1.0]]), torch.tensor([7])

    def accuracy(labels):
        return metrics.nearest_neighbour_accuracy(codes, torch.tensor(labels), query, truth)

    assert accuracy([3, 3, 7, 7, 7]) == 1  # three against the two nearest
    assert accuracy([7, 3, 3, 7, 5]) == 1  # a tie
    assert accuracy([3, 7, 7, 3, 5]) == 0


def test_sampled_error_is_that_of_noise_and_leaves_the_random_state():
    vae, images = TinyVAE32().eval(), data.dead_leaves(50, 0, "test")
    with torch.no_grad():
        vae.fc_logvar.weight.zero_()
        vae.fc_logvar.bias.fill_(-40)  # no noise: a sample is the mean
        vae.decoder[-1].weight *= 30  # an untrained decoder hardly heeds its code
    mse = metrics.evaluate_vae(vae, images)["mse"]
    state = torch.get_rng_state()
    assert metrics.sampled_mse(vae, images) == pytest.approx(mse, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        vae.fc_logvar.bias.fill_(4)
    assert metrics.sampled_mse(vae, images) > 1.01 * mse


def test_perceptual_distance_and_evenness_of_known_paths():
    class Stub:
        """Latents that are the brightness of an image, bent by `bend`."""

        def __init__(self, bend):
            self.bend = bend

        def eval(self):
            return self

        def encode(self, images):
            return images.mean((1, 2, 3))[:, None], None

        def decode(self, z):
            return self.bend(z)[:, :, None, None].expand(-1, 3, 32, 32)

    class Judge:
        def distance(self, a, b):
            return (a - b).square().mean((1, 2, 3))

    images = (torch.rand(40, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 255).to(
        torch.uint8
    ).expand(40, 3, 32, 32)
    even = metrics.interpolation_unevenness(Stub(lambda z: z), images, Judge())
    bent = metrics.interpolation_unevenness(Stub(lambda z: z**3), images, Judge())
    assert even == pytest.approx(0, abs=1e-3) and bent > 0.2
    assert metrics.perceptual_distance(Stub(lambda z: z), images, Judge()) < 1e-9
    off = metrics.perceptual_distance(Stub(lambda z: z + 0.1), images, Judge())
    assert off == pytest.approx(0.01, rel=1e-3)


# --- Files ---


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    storage.write_bytes(path, b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # as a full disk does
        "storage.write_bytes(sys.argv[2], b'new' * 1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, HERE, path], capture_output=True, text=True
    )
    assert "InputError: could not write" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="could not write"):
        storage.write_bytes(path / "below a file", b"new")


def test_bad_checkpoints_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(InputError, match="there is no checkpoint"):
        storage.load_checkpoint(path)
    vae = TinyVAE32()
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|plain data"):
            storage.load_checkpoint(path)
    torch.save(vae, path)  # a pickled module: code
    with pytest.raises(InputError, match="not a checkpoint of plain data"):
        storage.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        storage.load_checkpoint(path)


def test_a_checkpoint_builds_the_model_it_describes_and_no_other(tmp_path):
    path = tmp_path / "model.pth"
    vae = TinyVAE32(latent_dim=8, decoder_channels=(10, 9, 8, 7)).eval()
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    built, checkpoint = models.load_model(path, TinyVAE32)
    images = random_images(2)
    assert torch.equal(built(images)[0], vae(images)[0])
    with pytest.raises(InputError, match="holds a TinyVAE32, but a StandardVAE is needed"):
        models.load_model(path, StandardVAE)
    checkpoint["architecture"]["latent_dim"] = 9
    storage.save_checkpoint(path, checkpoint)
    with pytest.raises(InputError, match="do not fit"):
        models.load_model(path, TinyVAE32)
    storage.save_checkpoint(path, {"weights": 1})
    with pytest.raises(InputError, match="not a model checkpoint"):
        models.load_model(path, TinyVAE32)


# --- Flags ---


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    return stop.value.code == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--epoch", "3"),  # no abbreviations, so a typo is not another flag
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--batch-size", "1"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "-1"),
        ("--kl-weight", "-0.1"),
        ("--temperature", "0"),
        ("--device", "tpu"),
        ("--precision", "int8"),
        ("--limit", "-5"),
        ("--seed", "-1"),
        ("--data", ""),
    ],
)
def test_nonsense_is_refused_before_any_work(flags, capsys):
    assert refused(distill_tinyvae.main, *flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_a_flag_with_its_default(script, capsys):
    source = Path(script.__file__).read_text().split("\ndef ")[0]
    constants = re.findall(r"^([A-Z_]+) = .*  # ", source, re.MULTILINE)
    settings = vars(runtime.parse_flags(vars(script), []))
    assert len(constants) > 7
    for constant in constants:
        assert settings[constant.lower()] == getattr(script, constant)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{constant.lower().replace('_', '-')}" in shown for constant in constants)
    # A constant that the code reads in place of the setting would make its flag do nothing.
    body = Path(script.__file__).read_text().split("\ndef ", 1)[1]
    assert not [c for c in constants if re.search(rf"(?<!\w)(?<!!= ){c}(?!\w)", body)]


def test_the_recipe_is_the_one_the_design_names():
    settings = runtime.parse_flags(vars(distill_tinyvae), [])
    assert (settings.teacher_epochs, settings.epochs, settings.batch_size) == (20, 100, 64)
    assert (settings.learning_rate, settings.temperature) == (1e-3, 3.0)
    weights = [getattr(settings, f"{term}_weight") for term in losses.TERMS]
    assert weights == [0.3, 0.1, 0.3, 0.2, 0.1]


def test_a_flag_beside_demo_wins():
    parse = distill_tinyvae.parse_flags
    settings = parse(
        vars(distill_tinyvae), ["--epochs", "2", "--demo"], distill_tinyvae.DEMO_SETTINGS
    )
    assert (settings.epochs, settings.data) == (2, "dead-leaves")


def test_devices_and_precisions_that_are_not_there_are_refused():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device"):
            runtime.pick_device("cuda")
    with pytest.raises(InputError, match="fp16 training needs a CUDA device, this is cpu"):
        runtime.pick_precision("fp16", torch.device("cpu"))
    expected = "bf16" if runtime.cpu_has_bf16() else "fp32"
    assert runtime.pick_precision("auto", torch.device("cpu")) == expected


def test_torchvision_that_does_not_load_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"torchvision does not load beside torch .*reinstall"):
        runtime.import_torchvision()


def test_importing_a_script_does_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"import {', '.join(script.__name__ for script in SCRIPTS)}, torch\n"
        "assert not {'torchvision', 'onnx', 'onnxruntime', 'torch_pruning'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# --- The whole job ---

TINY = (
    "--data", "dead-leaves", "--vgg", "random", "--limit", "64", "--batch-size", "32",
    "--teacher-epochs", "2", "--epochs", "3", "--save-every", "2", "--device", "cpu",
    "--precision", "fp32",
)


def folders(run):
    return ("--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(run / "outputs"))


def start(*flags, **options):
    return subprocess.Popen(
        [sys.executable, HERE / "distill_tinyvae.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def read_rows(run):
    """metrics.csv without its last column, which is the time it took."""
    with (run / "outputs" / "metrics.csv").open() as file:
        return [row[:-1] for row in csv.reader(file)]


def weights_of(run, name="tinyvae_last.pth"):
    checkpoint = storage.load_checkpoint(run / "checkpoints" / name)
    return checkpoint["model"] | checkpoint.get("criterion", {})


def assert_same_run(run, other):
    for name in ("teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth"):
        weights, others = weights_of(run, name), weights_of(other, name)
        assert list(weights) == list(others)
        assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert read_rows(run) == read_rows(other)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    done = start(*TINY, *folders(run))
    output, _ = done.communicate(timeout=100)
    assert done.returncode == 0, output
    return run, output


def test_a_run_writes_what_it_promises(tiny_run):
    run, output = tiny_run
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth", "tinyvae_epoch_002.pth",
    }
    assert {path.name for path in (run / "outputs").iterdir()} == {
        "config.json", "metrics.csv", "training_curves.png", "reconstruction_test.png",
        "interpolation_test.png",
    }
    with (run / "outputs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == distill_tinyvae.COLUMNS
    assert list(rows[0])[-1] == "seconds"
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("teacher", "1"), ("teacher", "2"), ("student", "1"), ("student", "2"), ("student", "3"),
    ]
    assert rows[0]["latent"] == rows[0]["projected_std"] == ""
    weighed = sum(
        weight * float(rows[-1][term])  # in the last epoch the latent term has faded
        for term, weight in zip(losses.TERMS, (0.3, 0.1, 0.3 * losses.LATENT_FLOOR, 0.2, 0.1))
    )
    assert float(rows[-1]["loss"]) == pytest.approx(weighed, rel=1e-4)
    config = json.loads((run / "outputs" / "config.json").read_text())
    assert config["train_images"] == 64 and config["precision"] == "fp32"
    assert config["data"] == "dead-leaves" and config["vgg_weights"] == "random, seed 0"
    assert config["temperature"] == 3.0 and "torch" in config["versions"]
    assert str(run / "checkpoints" / "tinyvae_best.pth") in output
    for picture in (run / "outputs").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 500
            assert np.asarray(image.convert("L")).std() > 10  # something is drawn


def test_training_moves_student_and_projection(tiny_run):
    run, _ = tiny_run
    early = weights_of(run, "tinyvae_epoch_002.pth")
    late = weights_of(run)
    assert (early["fc_mu.weight"] - late["fc_mu.weight"]).abs().max() > 0
    projection = losses.LatentProjection(random_normal(200, 512))
    assert torch.equal(projection.rotation.weight, torch.eye(64, 128))  # where it starts
    saved = storage.load_checkpoint(run / "checkpoints" / "tinyvae_last.pth")["criterion"]
    weights = {k.removeprefix("projection."): v for k, v in saved.items()}
    projection.load_state_dict(weights)
    assert (projection.rotation.weight - torch.eye(64, 128)).abs().max() > 1e-4


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_second_run_replaces_nothing_unless_told_to(tiny_run):
    run, _ = tiny_run
    before = contents(run)
    for flags, message in (
        ((), r"--resume .* --overwrite .* another"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--resume", "--epochs", "4"), r"other settings \(epochs was 3, is 4\)"),
        (("--resume", "--learning-rate", "0.01"), r"learning_rate was 0\.001, is 0\.01"),
        (("--resume", "--limit", "65"), "the training images differ"),
        (("--resume", "--vgg", "none"), "VGG16's weights differ"),
    ):
        with pytest.raises(InputError, match=message):
            distill_tinyvae.main([*TINY, *folders(run), *flags])
    assert contents(run) == before


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_overwrite_keeps_a_teacher_of_the_same_settings(tiny_run, tmp_path, capsys, monkeypatch):
    run, _ = tiny_run
    copy = copy_of(run, tmp_path)
    drawn = []
    monkeypatch.setattr(distill_tinyvae, "draw", lambda job, teacher, *rest: drawn.append(teacher))
    distill_tinyvae.main([*TINY, *folders(copy), "--overwrite"])
    assert "Stage 1 skipped" in capsys.readouterr().out
    assert_same_run(run, copy)

    # The teacher has gone through a whole stage 2 and is what it was, BatchNorm included.
    teacher = drawn[-1]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    before = weights_of(run, "teacher_vae.pth")
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())

    other = ("--teacher-epochs", "1", "--epochs", "1", "--vgg", "none")
    distill_tinyvae.main([*TINY, *folders(copy), "--overwrite", *other])
    assert "a new teacher is trained" in capsys.readouterr().out
    assert len(read_rows(copy)) == 1 + 1 + 1


def test_the_demo_replaces_its_own_folders_and_no_others(tmp_path, monkeypatch, capsys):
    own, mine = tmp_path / "demo", tmp_path / "mine"
    tiny = {"limit": 32, "teacher_epochs": 1, "epochs": 1, "batch_size": 32, "vgg": "none"}
    paths = {"checkpoint_dir": own / "checkpoints", "output_dir": own / "outputs"}
    monkeypatch.setattr(
        distill_tinyvae, "DEMO_SETTINGS", distill_tinyvae.DEMO_SETTINGS | tiny | paths
    )
    monkeypatch.setattr(distill_tinyvae, "draw", lambda *_: None)
    for _ in range(2):
        distill_tinyvae.main(["--demo", "--device", "cpu"])
        assert "Stage 1 skipped" not in capsys.readouterr().out
    before = contents(own)
    distill_tinyvae.main(["--demo", "--device", "cpu", "--resume"])
    assert "goes on after epoch 1" in capsys.readouterr().out
    assert contents(own).keys() == before.keys()
    distill_tinyvae.main(["--demo", "--device", "cpu", *folders(mine)])
    with pytest.raises(InputError, match="is of an earlier run"):
        distill_tinyvae.main(["--demo", "--device", "cpu", *folders(mine)])


def test_killed_in_either_stage_a_run_resumes_bit_for_bit(tiny_run, tmp_path):
    run, _ = tiny_run
    # Killed once a row of metrics.csv says that this epoch is over: in the teacher's second, in
    # the student's second. The output shows from which epoch each continuation starts.
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
        expected = {1: "Nothing to resume", 3: "The teacher goes on after epoch 1"}[rows]
        assert expected in output
    process = start(*TINY, *folders(tmp_path), "--resume")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "Stage 1 skipped" in output and "The student goes on after epoch 1" in output
    assert_same_run(run, tmp_path)


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
    assert "--resume goes on" in output and "Traceback" not in output


def test_failing_at_any_write_a_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    # Every write of a run fails once, after the file's content is complete but before it is in
    # place; the run is resumed after each. This meets every moment between two files.
    flags = (*TINY, "--vgg", "none", "--teacher-epochs", "1", "--epochs", "2")
    monkeypatch.setattr(distill_tinyvae, "draw", lambda *_: None)
    distill_tinyvae.main([*flags, *folders(tmp_path / "whole")])

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
            distill_tinyvae.main([*flags, *folders(tmp_path / "broken"), "--resume"])
            break
        except InputError as error:
            assert str(error) == "this write failed"
    assert {name for name, _ in failed} >= {
        "teacher_last.pth", "teacher_vae.pth", "tinyvae_last.pth", "tinyvae_best.pth",
        "tinyvae_epoch_002.pth", "metrics.csv", "config.json",
    }
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("what", ["loss", "validation mse"])
def test_what_is_no_number_stops_the_run_and_keeps_the_last_good_state(
    tiny_run, tmp_path, monkeypatch, what
):
    run, _ = tiny_run
    copy = copy_of(run, tmp_path)
    for path in (copy / "checkpoints").glob("tinyvae_*"):
        path.unlink()
    train_epoch, train_step = training.Stage.train_epoch, training.Stage.train_step

    def poison_step(self, index):
        if len(self.rows) == 1:
            self.model.fc_mu.bias.data.fill_(float("nan"))
        return train_step(self, index)

    def poison_weights(self, bar):  # after the last loss of the epoch has been read
        found = train_epoch(self, bar)
        if len(self.rows) == 1:
            self.model.fc_mu.bias.data.fill_(float("nan"))
        return found

    if what == "loss":
        monkeypatch.setattr(training.Stage, "train_step", poison_step)
    else:
        monkeypatch.setattr(training.Stage, "train_epoch", poison_weights)
    with pytest.raises(InputError, match=rf"the {what} of the student became nan in epoch 2; .*"):
        distill_tinyvae.main([*TINY, *folders(copy), "--resume"])
    last = storage.load_checkpoint(copy / "checkpoints" / "tinyvae_last.pth")
    assert last["epoch"] == 1
    assert all(value.isfinite().all() for value in last["model"].values())


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    def train_nothing(self):
        raise AssertionError("training began")

    monkeypatch.setattr(training.Stage, "run", train_nothing)
    with pytest.raises(InputError, match="do not fill one batch of 65"):
        distill_tinyvae.main([*TINY, *folders(tmp_path), "--batch-size", "65"])
    weights = [word for term in losses.TERMS for word in (f"--{term}-weight", "0")]
    with pytest.raises(InputError, match="all five weights are zero"):
        distill_tinyvae.main([*TINY, *folders(tmp_path), *weights])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not write"):
        distill_tinyvae.main([*TINY, *folders(tmp_path), "--output-dir", str(tmp_path / "file")])
    with pytest.raises(InputError, match="could not write"):
        distill_tinyvae.main(
            [*TINY, *folders(tmp_path), "--checkpoint-dir", str(tmp_path / "file")]
        )


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
def test_without_network_the_real_recipe_stops_at_once(tmp_path, flags, named):
    nowhere = "http://127.0.0.1:9"  # the discard port: connections are refused
    environment = os.environ | {
        "https_proxy": nowhere, "http_proxy": nowhere, "TORCH_HOME": str(tmp_path)
    }
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        f"import data; data.DATA_DIR = Path({str(tmp_path)!r})\n"
        "import distill_tinyvae, runtime; runtime.run(distill_tinyvae.main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, *folders(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 1
    assert "could not be downloaded" in done.stderr and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in named)


def test_a_term_can_be_left_out_and_bf16_trains(tmp_path):
    less = ("--vgg", "none", "--latent-weight", "0", "--epochs", "1", "--teacher-epochs", "1")
    distill_tinyvae.main(
        [
            *TINY, *folders(tmp_path), *less, "--precision", "bf16", "--limit", "8",
            "--batch-size", "8",
        ]
    )
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["perceptual_weight"] == 0 and config["vgg"] == "none"
    assert config["precision"] == "bf16"
    header, *_, last = read_rows(tmp_path)
    row = dict(zip(header, last))
    assert row["perceptual"] == row["latent"] == "" != row["output"]


def test_a_student_from_scratch_does_not_ask_the_teacher(tmp_path, monkeypatch):
    monkeypatch.delattr(distill_tinyvae, "ask_teacher")
    scratch = ("--vgg", "none", "--latent-weight", "0", "--output-weight", "0", "--epochs", "1")
    distill_tinyvae.main([*TINY, *folders(tmp_path), *scratch, "--teacher-epochs", "1"])
    header, *_, last = read_rows(tmp_path)
    row = dict(zip(header, last))
    assert row["latent"] == row["output"] == row["projected_std"] == "" != row["kl"]


# --- Several processes ---


def start_two(script, *flags):
    """A script in two processes, of one thread each."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            script, *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )


def test_two_processes_compute_what_one_does(tmp_path):
    script = tmp_path / "compare.py"
    script.write_text(
        """
import torch
from distributed import *

def compute(layer, x, target):
    x = x.clone().requires_grad_()
    loss = (layer(x) - target).square().mean()
    loss.backward()
    return loss.detach(), x.grad

with processes(torch.device("cpu")):
    torch.manual_seed(0)
    x, target = torch.randn(2, 6, 3, 4, 4) * 5 + 3
    alone = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    loss, gradient = compute(alone, x, target)

    torch.manual_seed(rank())  # the processes differ until they are made equal
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    torch.nn.init.uniform_(model[0].weight, 1, 2) if rank() else None
    share_batch_norm(model)
    assert type(model[0]) is SharedBatchNorm
    start_equal(model)
    own_loss, own_gradient = compute(model, my_share(x), my_share(target))
    average_gradients(list(model.parameters()))
    close = torch.testing.assert_close
    close(average(own_loss), loss)
    close(gather_rows(own_gradient, len(x)) / 2, gradient)
    for parameter, expected in zip(model.parameters(), alone.parameters()):
        close(parameter.grad, expected.grad)
    for name, buffer in model.named_buffers():
        close(buffer, alone.get_buffer(name))
    print("all the same")
"""
    )
    process = start_two(script)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("all the same") == 1, output


def test_two_processes_go_on_with_what_one_has_begun(tiny_run, tmp_path, monkeypatch):
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", tmp_path / "checkpoints")
    flags = [*TINY, *folders(tmp_path), "--save-every", "100"]
    train_epoch = training.Stage.train_epoch

    def interrupted(self, bar):
        if self.rows:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "train_epoch", interrupted)
        distill_tinyvae.main(flags)
    process = start_two(HERE / "distill_tinyvae.py", *flags, "--resume")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "2 processes" in output and output.count("Written:") == 1
    header, *alone = read_rows(run)
    _, *together = read_rows(tmp_path)
    assert alone[2] == together[2]  # after two epochs of the teacher, the one done alone
    # The KL of so raw a student is a small difference of large numbers.
    tolerances = dict.fromkeys(losses.TERMS, 1e-3) | {"kl": 1e-2, "val_mse": 1e-2}
    for name, tolerance in tolerances.items():
        column = header.index(name)
        expected = float(alone[3][column])
        assert float(together[3][column]) == pytest.approx(expected, rel=tolerance)

    monkeypatch.setattr(distill_tinyvae, "world_size", lambda: 2)
    with pytest.raises(InputError, match="--perceptual-images multiples of 2"):
        distill_tinyvae.main([*flags, "--resume", "--perceptual-images", "5"])


def test_when_one_of_two_processes_dies_the_other_says_so(tmp_path):
    flags = ("--vgg", "none", "--limit", "2000", "--epochs", "1000", "--save-every", "1000")
    process = start_two(HERE / "distill_tinyvae.py", *TINY, *flags, *folders(tmp_path))
    while not (tmp_path / "outputs" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    workers = [int(pid) for pid, parent in pairs if int(parent) == process.pid]
    os.kill(max(workers), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "of 2 lost another one" in output and "with --resume goes on" in output


# --- The evaluation script ---


def test_evaluation_script(tiny_run, tmp_path, capsys):
    run, _ = tiny_run
    flags = ["--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(tmp_path)]
    test_trained_model.main([*flags, "--device", "cpu", "--batch-size", "8"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(record["results"]) == ["teacher", "student", "PCA, 64 components"]
    student = record["results"]["student"]
    assert student["parameters"] == 294_403
    # The figures are those of the test split, computed here another way.
    vae, _ = models.load_model(run / "checkpoints" / "tinyvae_best.pth", TinyVAE32)
    images = data.to_float(data.dead_leaves(64, data.SPLIT_SEED, "test"))
    assert student["mse"] == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)
    ratio = record["results"]["teacher"]["weight_bytes"] / student["weight_bytes"]
    assert 28.5 < ratio < 29.5 and f"{ratio:.1f}×" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
        "traversal.png",
    }
    assert student["cka"] < record["results"]["teacher"]["cka"] == pytest.approx(1)


def test_evaluation_takes_the_architecture_from_the_checkpoint(tmp_path, capsys):
    vae = TinyVAE32(latent_dim=12, encoder_channels=(4, 8, 8, 8), decoder_channels=(8, 8, 8, 4))
    path = tmp_path / "pruned.pth"
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    flags = ["--student", str(path), "--data", "dead-leaves", "--limit", "64", "--device", "cpu"]
    test_trained_model.main([*flags, *folders(tmp_path), "--pca-components", "12"])
    assert "teacher  left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert record["results"]["student"]["parameters"] == models.count_parameters(vae)
    for bad, message in (
        (["--student", "nowhere.pth"], "there is no checkpoint"),
        ([*flags, "--teacher", "nowhere.pth"], "there is no checkpoint"),
        (["--student", str(path)], "does not say its images"),
    ):
        with pytest.raises(InputError, match=message):
            test_trained_model.main([*bad, *folders(tmp_path)])


def test_the_released_student_is_what_its_card_says(tmp_path, capsys, monkeypatch):
    released = models.RELEASED
    assert released.stat().st_size < 1_300_000
    vae, checkpoint = models.load_model(released, TinyVAE32)
    assert models.count_parameters(vae) == 294_403
    record = checkpoint["record"]
    assert set(checkpoint) == {"stage", "architecture", "epoch", "model", "record"}
    assert not [value for value in record.values() if str(value).startswith("/")]
    for constant in ("EPOCHS", "TEACHER_EPOCHS", "KL_WEIGHT", "LATENT_WEIGHT", "TEMPERATURE"):
        assert record[constant.lower()] == getattr(distill_tinyvae, constant)

    # Whoever has neither its images nor a network still gets figures and pictures, and is told.
    def no_network(*args, **kwargs):
        raise InputError("CIFAR-10 could not be downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_cifar10", no_network)
    monkeypatch.setattr(models, "RELEASED", tmp_path / "checkpoints" / released.name)
    storage.save_checkpoint(models.RELEASED, checkpoint)
    test_trained_model.main([*folders(tmp_path), "--limit", "64", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "the released one" in printed and "not cifar10: CIFAR-10 could not" in printed
    assert "not those the student was trained on" in printed
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["data"] == "dead-leaves" and found["results"]["student"]["mse"] < 0.02


def test_pictures_show_the_same_images_each_time():
    images = data.dead_leaves(100, 0, "test")
    assert torch.equal(data.spread(images, 10), data.spread(images, 10))
    assert len(data.spread(images[:3], 10)) == len(data.spread(images[:3], 0)) == 3


def test_images_picked_from_a_split_are_of_all_its_classes():
    labels = torch.arange(10).repeat_interleave(1000)  # as a folder of images is sorted
    assert data.spread(labels, 2000).bincount().tolist() == [200] * 10


# --- The ablation ---


def test_the_search_for_a_rate_gets_there_though_the_slope_is_another():
    asked = []

    def rate_of(kl_weight, slope=-20):
        asked.append(kl_weight)
        return 80 + slope * math.log(kl_weight / 0.3)

    found = ablate_distillation.match_rate(rate_of, 0.1, 80, 0.015)
    assert found == pytest.approx(0.3, rel=0.1) and len(asked) <= 4
    assert ablate_distillation.match_rate(rate_of, found, 80, 0.015) == found
    # Where it cannot get there, the nearest it tried.
    tried = []
    nearest = ablate_distillation.match_rate(
        lambda weight: tried.append(weight) or 50 + 1e-3 / weight, 0.1, 80, 0.015
    )
    assert nearest == min(tried) and len(tried) == ablate_distillation.SEARCHES


def test_the_comparison_with_scratch_is_made_at_the_same_rate():
    rows = [
        {"variant": "scratch", "seed": 0, "kl_weight": 0.1, "kl_nats": 100.0, "mse": 0.010},
        {"variant": "scratch", "seed": 0, "kl_weight": 0.2, "kl_nats": 80.0, "mse": 0.012},
        {"variant": "full", "seed": 0, "kl_weight": 0.1, "kl_nats": 88.0, "mse": 0.0102},
        {"variant": "full", "seed": 1, "kl_weight": 0.1, "kl_nats": 92.0, "mse": 0.0096},
        {"variant": "no KL", "seed": 0, "kl_weight": 0.0, "kl_nats": 300.0, "mse": 0.009},
    ]
    summary = {found["variant"]: found for found in ablate_distillation.summarise(rows)}
    mean, deviation = summary["full"]["mse"]
    assert mean == pytest.approx(0.0099) and deviation == pytest.approx(0.0006 / 2**0.5)
    every = ablate_distillation.summarise(rows)
    gain = ablate_distillation.against_scratch(summary["full"], every, "mse")
    assert gain == pytest.approx(0.0099 / 0.011 - 1)  # 0.011 is half way, at 90 nats
    # No student without a teacher has that rate: nothing to compare with.
    assert ablate_distillation.against_scratch(summary["no KL"], every, "mse") is None


def test_projection_variants_are_what_they_are_called():
    mu = random_normal(500, 160) * torch.linspace(3, 0.1, 160)
    start = losses.LatentProjection(mu, 8)(mu)
    free = ablate_distillation.free_projection(mu, 8)
    torch.testing.assert_close(free(mu), start, atol=1e-4, rtol=1e-4)
    fixed = ablate_distillation.fixed_projection(mu, 8)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    other = ablate_distillation.random_projection(mu, 8)(mu)
    assert (other - start).abs().mean() > 0.5
    torch.testing.assert_close(other.T @ other / 500, torch.eye(8), atol=1e-3, rtol=0)


def test_an_ablation_goes_on_where_it_stopped(tiny_run, tmp_path, capsys, monkeypatch):
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", tmp_path / "checkpoints")
    flags = [
        *folders(tmp_path), "--vgg", "none", "--limit", "64", "--epochs", "2", "--seeds", "1",
        "--variants", "no latent", "--rate-tolerance", "1", "--device", "cpu",
    ]
    train_epoch = training.Stage.train_epoch
    epochs = []

    def interrupted(self, bar):
        epochs.append(len(self.rows))
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Stage, "train_epoch", interrupted)
        ablate_distillation.main(flags)
    assert epochs == [0, 1, 0, 1]  # full, then scratch, stopped in its second epoch
    with monkeypatch.context() as patch:
        patch.setattr(training.Stage, "train_epoch", interrupted)
        ablate_distillation.main(flags)
    assert epochs[4:] == [1, 0, 1, 0, 1, 0, 1]  # its second, two other rates, no latent
    printed = capsys.readouterr().out
    assert "goes on after epoch 1" in printed and "| no latent" in printed
    with (tmp_path / "outputs" / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["full", *["scratch"] * 3, "no latent"]
    assert (tmp_path / "outputs" / "ablation.png").stat().st_size > 10_000

    # Measured on the other split without training; refused for another budget or judge.
    monkeypatch.setattr(training.Stage, "train_epoch", None)
    ablate_distillation.main([*flags, "--split", "test"])
    with (tmp_path / "outputs" / "ablation.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [row["val_mse"] for row in rows] == [row["val_mse"] for row in again]
    assert rows[0]["mse"] != again[0]["mse"]
    perceptual = []
    for judged in ("2", "4"):  # another exam is another measurement of the same students
        ablate_distillation.main([*flags, "--judge", "random", "--judged", judged])
        with (tmp_path / "outputs" / "ablation.csv").open() as file:
            perceptual.append(float(next(csv.DictReader(file))["perceptual"]))
    assert perceptual[0] != perceptual[1]
    with pytest.raises(InputError, match="epochs was 2, is 3"):
        ablate_distillation.main([*flags, "--epochs", "3"])
    with pytest.raises(InputError, match="no variant 'no teacher': choose from no rec"):
        ablate_distillation.main([*flags, "--variants", "no teacher"])
    with pytest.raises(InputError, match="cannot judge"):
        ablate_distillation.main([*flags, "--vgg", "random", "--judge", "random"])


# --- The bench ---


@pytest.fixture
def bench():
    flags = ["--limit", "64", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
    found = bench_training.Bench(runtime.parse_flags(vars(bench_training), flags))
    found.recipe.batch_size = 16
    return found


def test_our_step_does_what_the_straightforward_loop_does(bench, monkeypatch):
    # At the same rate, on the same images: caches, layouts and fused kernels change nothing but
    # rounding, which the steps let grow, and the teacher's logits, which are kept in fp16.
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *_, **__: SimpleNamespace(
        step=lambda: None
    ))
    monkeypatch.setattr(training.Stage, "set_schedule", lambda *_: None)
    kept = [bench_training.RESIDENT, bench_training.FEW_IMAGES]
    plain = bench_training.straightforward(bench, "student", kept)
    plain_losses = [plain() for _ in range(10)]
    ours = bench_training.ours(bench, "student")
    our_losses = [ours()["loss"].item() for _ in range(10)]
    assert our_losses == pytest.approx(plain_losses, rel=1e-3)
    assert our_losses[-1] < 0.95 * our_losses[0]


class NoLooking(TorchDispatchMode):
    """Refuses operations that need a value on the CPU, for which a GPU would have to be waited."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        waits = tags & set(function.tags)
        if function is torch.ops.aten.index.Tensor:  # by a mask its shape depends on values
            waits = any(index.dtype == torch.bool for index in args[1] if index is not None)
        assert not waits, f"{function} looks at a value"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_training_step_looks_at_no_value(bench, stage, precision):
    # A CUDA graph cannot be made of one that does, and any other GPU would stand still for it.
    bench.job.precision = precision
    step = bench_training.ours(bench, stage)
    step()  # Adam makes its moments
    with NoLooking():
        found = step()
        with pytest.raises(AssertionError, match="looks at a value"):
            found["loss"].item()


def test_the_bench_counts_the_work_there_is(bench):
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.ones(8, 10)
    macs, traffic = bench_training.count_work(lambda: linear(x))
    assert macs == 8 * 10 * 20 and traffic == 4 * (8 * 10 + 10 * 20 + 8 * 20)
    tricks = bench_training.tricks_of(bench.device, "fp32")
    ours, _ = bench_training.count_work(bench_training.ours(bench, "student"))
    all_tricks = bench_training.straightforward(bench, "student", tricks)
    assert bench_training.count_work(all_tricks)[0] == ours
    tricks.remove(bench_training.FEW_IMAGES)
    more, _ = bench_training.count_work(bench_training.straightforward(bench, "student", tricks))
    assert more > 2.5 * ours


def test_the_bench_prints_and_draws_what_it_measures(tmp_path, capsys, monkeypatch):
    def two_variants(bench):
        return {
            ("student", "ours"): lambda: time.sleep(0.002),
            ("teacher", "ours"): lambda: time.sleep(0.004),
            ("student", "straightforward"): lambda: time.sleep(0.006),
            ("teacher", "straightforward"): lambda: time.sleep(0.008),
            ("student", f"+ {bench_training.FEW_IMAGES}"): lambda: time.sleep(0.003),
        }

    monkeypatch.setattr(bench_training, "make_variants", two_variants)
    flags = ["--limit", "64", "--seconds", "0.02", "--no-inference", "--output-dir", str(tmp_path)]
    bench_training.main([*flags, "--device", "cpu"])
    with (tmp_path / "bench_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["ms_per_step"]) == pytest.approx(2, abs=1.5)
    assert float(rows[0]["ratio"]) == pytest.approx(3, abs=1.5)  # 6 ms against 2
    assert "floor by arithmetic" in capsys.readouterr().out
    for bad, message in ((["--limit", "20"], "do not fill a batch"), (["--vgg", "none"], "random")):
        with pytest.raises(InputError, match=message):
            bench_training.main([*flags, *bad])
    assert (tmp_path / "bench_training.png").stat().st_size > 5_000


# --- Export ---


EXPORT = ("--student", str(models.RELEASED), "--data", "dead-leaves", "--limit", "256")


def needs_onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


def test_exported_files_are_the_student(tmp_path, capsys, monkeypatch):
    onnx, runtime_library = needs_onnx()
    monkeypatch.setattr(export_tinyvae, "WEB_DIR", tmp_path / "web")
    tmp_path, web = tmp_path / "onnx", tmp_path / "web"
    flags = ["--fp16", "--int8", "--int8-tolerance", "0.1", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags, "--web"])
    table = capsys.readouterr().out
    for form in ("PyTorch fp32", "ONNX fp32", "ONNX fp16", "ONNX int8"):
        assert f"| {form}" in table
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(size) == {
        f"{part}{form}.onnx" for part in ("encoder", "decoder") for form in ("", "_fp16", "_int8")
    }
    for part in ("encoder", "decoder"):
        assert size[f"{part}_fp16.onnx"] < 0.55 * size[f"{part}.onnx"]
        assert size[f"{part}_int8.onnx"] < 0.30 * size[f"{part}.onnx"]

    def run(name, x):
        session = runtime_library.InferenceSession(tmp_path / name)
        (port,) = session.get_inputs()
        return [torch.from_numpy(found) for found in session.run(None, {port.name: x.numpy()})]

    for count in (1, 3, 70):  # any number of images
        images = random_images(count)
        mu, logvar = vae.encode(images)
        for suffix, tolerance in (("", 1e-4), ("_fp16", 2e-2)):
            found = run(f"encoder{suffix}.onnx", images)
            torch.testing.assert_close(found[0], mu, atol=tolerance, rtol=0)
            torch.testing.assert_close(found[1], logvar, atol=tolerance, rtol=0)
            (decoded,) = run(f"decoder{suffix}.onnx", mu.detach())
            torch.testing.assert_close(decoded, vae.decode(mu), atol=tolerance, rtol=0)
    for name in size:
        model = onnx.load(tmp_path / name)
        notes = {note.key: note.value for note in model.metadata_props}
        assert "[0, 1]" in notes["image"] and notes["student_sha256"] == storage.fingerprint(vae)
        assert (notes.get("calibrated_on") == "256 images of dead-leaves") == ("int8" in name)
        assert str(HERE).encode() not in (tmp_path / name).read_bytes()
    for name in ("encoder.onnx", "decoder.onnx"):
        assert (web / name).read_bytes() == (tmp_path / name).read_bytes()
    assert json.loads((web / "model.json").read_text()) == {"parameters": 294_403, "latents": 64}
    assert Image.open(web / "examples.png").size == (32 * export_tinyvae.WEB_EXAMPLES, 32)
    kinds = [node.op_type for node in onnx.load(tmp_path / "decoder_int8.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 5  # before the linear layer and the four convolutions


def test_a_form_that_is_not_the_student_is_not_written(tmp_path, monkeypatch):
    needs_onnx()
    split_vae = export_tinyvae.split_vae

    def damaged(vae):
        parts = split_vae(vae)
        with torch.no_grad():
            parts[1].vae.decoder[0].weight[0] += 0.1
        return parts

    monkeypatch.setattr(export_tinyvae, "split_vae", damaged)
    with pytest.raises(InputError, match="ONNX fp32 is not the student: a value differs"):
        export_tinyvae.main([*EXPORT, "--export-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_each_form_is_held_to_its_tolerance():
    settings = runtime.parse_flags(vars(export_tinyvae), [])
    true = {"mse": 0.01, "kl_nats": 80.0}

    def refuse(name, **found):
        form = export_tinyvae.Form(name, {}, None, None)
        found = {"mse": 0.01, "kl_nats": 80.0, "largest": {"mu": 0.0, "image": 0.5}} | found
        export_tinyvae.refuse_difference(form, found, true, settings)

    refuse("ONNX int8", mse=0.0101, kl_nats=79.0)
    with pytest.raises(InputError, match=r"error differs by 3\.0%, beyond --int8-tolerance 0\.02"):
        refuse("ONNX int8", mse=0.0103)
    with pytest.raises(InputError, match=r"rate differs by 10\.0%"):
        refuse("ONNX int8", kl_nats=72.0)
    refuse("ONNX fp16", largest={"mu": 0.01, "image": 0.001})
    for value in (0.1, math.nan):
        with pytest.raises(InputError, match="beyond --fp16-tolerance"):
            refuse("ONNX fp16", largest={"mu": value, "image": 0.001})


def test_values_that_are_no_numbers_do_not_pass_for_equal():
    nothing = export_tinyvae.Form(
        "ONNX fp16",
        {},
        lambda images: torch.full((2, len(images), 64), math.nan).unbind(),
        lambda z: torch.full((len(z), 3, 32, 32), math.nan),
    )
    vae = TinyVAE32().eval()
    vae.check_range = False
    reference = export_tinyvae.Form("PyTorch fp32", {}, vae.encode, vae.decode)
    found = export_tinyvae.measure(nothing, reference, data.dead_leaves(4, 0, "test"))
    assert all(math.isnan(value) for value in found["largest"].values())


def test_a_missing_package_is_named_with_its_installation(tmp_path, monkeypatch):
    flags = [*EXPORT, "--export-dir", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"onnx is needed.*-r requirements-deploy\.txt"):
        export_tinyvae.main(flags)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"torch_pruning is needed.*-r requirements-deploy\.txt"):
        prune_tinyvae.prune(TinyVAE32(), 0.5)


def test_executorch_programs_are_the_student(tmp_path, capsys):
    needs_onnx()
    pytest.importorskip("executorch")
    flags = ["--executorch", "--int8", "--int8-tolerance", "0.1", "--export-dir", str(tmp_path)]
    export_tinyvae.main([*EXPORT, *flags])  # it compares them with PyTorch
    assert "| ExecuTorch int8" in capsys.readouterr().out
    sizes = [(tmp_path / name).stat().st_size for name in ("tinyvae.pte", "tinyvae_int8.pte")]
    assert sizes[1] < 0.3 * sizes[0] < 400_000


# --- Pruning ---


def test_channels_that_do_nothing_are_those_that_go():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    vae = TinyVAE32(6, encoder_channels=(8, 16, 16, 16), decoder_channels=(16, 16, 16, 8))
    for module in vae.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    encoder, decoder = prune_tinyvae.pruned_widths(vae, 0.6)
    assert encoder[0] == decoder[3] == 8 and len({*encoder[1:], *decoder[:3]}) == 1
    width = encoder[1]
    idle = torch.randperm(16)[width:]  # others in each stage would do as well
    with torch.no_grad():
        for i in (1, 2, 3):  # stages of the encoder, with what reads them
            for layer in vae.encoder[3 * i : 3 * i + 2]:  # the convolution and its BatchNorm
                layer.weight[idle] = layer.bias[idle] = 0
            if i < 3:
                vae.encoder[3 * i + 3].weight[:, idle] = 0
            vae.encoder[3 * i + 1].running_mean[idle] = 0
        for reader in (vae.fc_mu, vae.fc_logvar):
            reader.weight.view(6, 16, 4)[:, idle] = 0
        vae.decoder_input.weight.view(16, 4, 6)[idle] = 0
        vae.decoder_input.bias.view(16, 4)[idle] = 0
        for i in (0, 1, 2):
            vae.decoder[3 * i].weight[idle] = 0  # reads stage i
            if i < 2:
                vae.decoder[3 * i].weight[:, idle] = vae.decoder[3 * i].bias[idle] = 0
                normal = vae.decoder[3 * i + 1]
                normal.weight[idle] = normal.bias[idle] = normal.running_mean[idle] = 0
    images = random_images(4)
    before = vae.eval()(images)
    small = prune_tinyvae.prune(vae, 0.6)
    for found, expected in zip(small(images), before):
        torch.testing.assert_close(found, expected)
    assert models.count_parameters(small) <= 0.4 * models.count_parameters(vae)
    for found, expected in zip(vae(images), before):  # it was left as it was
        assert torch.equal(found, expected)


def test_a_pruned_student_starts_from_the_projection_nearest_to_its_code():
    mu = random_normal(500, 160) * torch.linspace(3, 0.1, 160)
    rotated = ablate_distillation.random_projection(mu, 8)(mu)
    fitted = prune_tinyvae.fitted_projection(rotated)(mu, 8)
    torch.testing.assert_close(fitted(mu), rotated, atol=1e-3, rtol=0)


def test_pruned_students_are_trained_once_and_every_script_loads_them(
    tiny_run, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("torch_pruning")
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    for name in ("teacher_vae.pth", "tinyvae_best.pth"):
        shutil.copy(run / "checkpoints" / name, tmp_path / "checkpoints")
    flags = [
        *folders(tmp_path), "--vgg", "none", "--limit", "64", "--epochs", "1", "--ratios", "0.5",
        "--device", "cpu",
    ]
    prune_tinyvae.main(flags)
    printed = capsys.readouterr().out
    assert "| pruned, −50%" in printed and "| fresh, −50%" in printed
    with (tmp_path / "outputs" / "pruning.csv").open() as file:
        whole, pruned, fresh = csv.DictReader(file)
    assert int(pruned["parameters"]) <= 0.5 * int(whole["parameters"])
    assert pruned["channels"] == fresh["channels"] and pruned["mse"] != fresh["mse"]
    assert (tmp_path / "outputs" / "pruning.png").stat().st_size > 10_000

    monkeypatch.setattr(training.Stage, "train_epoch", None)
    prune_tinyvae.main(flags)  # nothing is trained again
    with pytest.raises(InputError, match="epochs was 1, is 2"):
        prune_tinyvae.main([*flags, "--epochs", "2"])
    for ratios in ("0.5,1", "half", ""):
        with pytest.raises(InputError, match="--ratios takes shares"):
            prune_tinyvae.main([*flags, "--ratios", ratios])
    with pytest.raises(InputError, match=r"no student is left with 0\.999 of the parameters gone"):
        prune_tinyvae.main([*flags, "--ratios", "0.999"])
    path = tmp_path / "checkpoints" / "pruned" / "tinyvae_pruned_0.5.pth"
    test_trained_model.main([*folders(tmp_path), "--student", str(path), "--limit", "64"])
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["results"]["student"]["parameters"] == int(pruned["parameters"])


# --- The page ---


VENDOR = HERE / "web" / "vendor"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def test_the_pages_models_are_the_released_student():
    runtime_library = pytest.importorskip("onnxruntime")
    paths = {name: HERE / "web" / f"{name}.onnx" for name in ("encoder", "decoder")}
    assert sum(path.stat().st_size for path in paths.values()) < 1_500_000
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    sessions = {name: runtime_library.InferenceSession(path) for name, path in paths.items()}
    for session in sessions.values():
        notes = session.get_modelmeta().custom_metadata_map
        assert notes["student_sha256"] == storage.fingerprint(vae)
    images = random_images(2)
    mu, _ = sessions["encoder"].run(None, {"image": images.numpy()})
    (decoded,) = sessions["decoder"].run(None, {"latent": mu})
    torch.testing.assert_close(
        torch.from_numpy(decoded), vae.decode(vae.encode(images)[0]), atol=1e-5, rtol=0
    )


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture
def browser_page():
    """A tab in headless Chromium that reaches no other machine."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        # In a container there is no sandbox; without the others it asks for its maker's servers.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page()
        elsewhere = re.compile(r"^(?!http://127\.0\.0\.1|file:|blob:|data:)")
        page.route(elsewhere, lambda route: route.abort())
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def pixels_of(page, selector):
    """A canvas as uint8, 3×32×32."""
    rgba = page.eval_on_selector(
        selector, "c => Array.from(c.getContext('2d').getImageData(0, 0, 32, 32).data)"
    )
    return torch.tensor(rgba, dtype=torch.uint8).view(32, 32, 4)[..., :3].permute(2, 0, 1)


def wait_until(page, is_so):
    """The page works while the test goes on: look again until it is so, for ten seconds."""
    for _ in range(200):
        if is_so():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came to be so")


def wait_for_drawn(page, selector, image):
    """The canvas comes to show this image, N=1, in [0, 1], to the last of its 256 levels."""
    wanted = 255 * image[0].detach()
    wait_until(page, lambda: (pixels_of(page, selector).float() - wanted).abs().max() <= 1)


def wait_for_text(page, text, selector="#what"):
    wait_until(page, lambda: text in page.inner_text(selector))


DROP = """([id, content]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
    const event = { dataTransfer: transfer, bubbles: true, cancelable: true };
    document.getElementById(id).dispatchEvent(new DragEvent("drop", event));
}"""


def test_the_page_draws_what_pytorch_computes(browser_page, tmp_path):
    page = browser_page
    if not VENDOR.exists():
        pytest.skip("web/vendor/ does not hold the runtime: the README, Deploy, has the command")
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    sheet = np.asarray(Image.open(HERE / "web" / "examples.png").convert("RGB"))
    examples = torch.from_numpy(sheet.copy()).permute(2, 0, 1).unfold(2, 32, 32).permute(2, 0, 1, 3)
    examples = examples.float() / 255
    mu, _ = vae.encode(examples)

    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with served(HERE / "web") as address:
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]")
        assert "offline copy" in page.inner_text("#runtime")
        wait_for_drawn(page, "#slot-a .original", examples[:1])
        wait_for_drawn(page, "#slot-b .decoded", vae.decode(mu[1:2]))
        wait_for_drawn(page, "#decoded", vae.decode(mu[:1]))
        wait_for_text(page, "A, encoded and decoded")
        mse = (vae.decode(mu[:1]) - examples[:1]).square().mean().item()
        assert float(page.inner_text("#mse")) == pytest.approx(mse, abs=1e-4)
        assert re.fullmatch(r"\d+\.\d\d ms", page.inner_text("#decode-ms"))

        page.locator("#between").fill("0.5")
        middle = (mu[:1] + mu[1:2]) / 2
        wait_for_drawn(page, "#decoded", vae.decode(middle))
        page.get_by_label("latent 7", exact=True).fill("3")
        middle[0, 7] = 3
        wait_for_drawn(page, "#decoded", vae.decode(middle))
        wait_for_text(page, "by hand")
        page.click("#prior")
        wait_for_text(page, "from the prior")
        sliders = page.eval_on_selector_all("#latents input", "all => all.map((i) => +i.value)")
        code = torch.tensor(sliders)  # to a hundredth, which the image hardly shows
        assert 0.6 < code.std() < 1.4
        assert (pixels_of(page, "#decoded") / 255 - vae.decode(code[None])[0]).abs().max() < 0.05

        page.click("#slot-b")
        page.get_by_label("Example 4").click()
        wait_for_drawn(page, "#decoded", vae.decode(mu[3:4]))

        # A picture of one's own, opened or dropped: its middle square.
        wide = np.zeros((32, 64, 3), np.uint8)
        wide[:, 16:48] = (255 * examples[5].permute(1, 2, 0)).round().numpy()
        png = io.BytesIO()
        Image.fromarray(wide).save(png, "PNG")
        upload = {"name": "mine.png", "mimeType": "image/png", "buffer": png.getvalue()}
        page.set_input_files("#file", upload)
        wait_for_drawn(page, "#slot-b .original", examples[5:6])
        wait_for_drawn(page, "#decoded", vae.decode(mu[5:6]))
        page.evaluate(DROP, ["slot-a", base64.b64encode(png.getvalue()).decode()])
        wait_for_drawn(page, "#slot-a .decoded", vae.decode(mu[5:6]))
        page.set_input_files("#file", upload | {"name": "note.png", "buffer": b"not a picture"})
        wait_for_text(page, "note.png is not a picture", "#complaint")
        page.evaluate(DROP, ["slot-a", ""])
        wait_for_text(page, "dropped.png is not a picture", "#complaint")
        page.get_by_label("Example 2").click()
        wait_for_drawn(page, "#slot-a .original", examples[1:2])
        assert page.inner_text("#complaint") == ""
    assert not errors


def test_the_page_says_what_it_lacks(browser_page, tmp_path):
    site = tmp_path / "web"
    site.mkdir()
    for name in ("index.html", "style.css", "app.js"):
        shutil.copy(HERE / "web" / name, site)
    (site / "decoder.onnx").write_bytes(b"no model")
    cases = [
        (None, "model.json could not be loaded (404)"),
        ("model.json", "runtime could not be loaded"),
    ]
    if VENDOR.exists():
        (site / "vendor").mkdir()
        shutil.copy(VENDOR / "ort.wasm.min.mjs", site / "vendor")
        cases += [
            ("vendor/ort-wasm-simd-threaded.mjs", "runtime could not be loaded"),
            ("vendor/ort-wasm-simd-threaded.wasm", "encoder.onnx could not be loaded (404)"),
            ("encoder.onnx", "decoder.onnx is not a model"),
        ]
    with served(site) as address:
        for added, message in cases:
            if added:
                (site / added).symlink_to(HERE / "web" / added)
            browser_page.goto(address)
            browser_page.wait_for_selector("body[data-state=error]")
            assert message in browser_page.inner_text("#status")
    browser_page.goto((site / "index.html").as_uri())
    assert "python -m http.server" in browser_page.inner_text("#status")


# --- The README ---


def test_readme_names_flags_and_files_that_exist():
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"python (\w+\.py)([^\n#`]*)", readme)
    assert commands
    for script, words in commands:
        module = {path.__name__ + ".py": path for path in SCRIPTS}[script]
        known = {"help", *vars(runtime.parse_flags(vars(module), []))}
        for flag in re.findall(r"--([a-z0-9-]+)", words):
            assert flag.replace("-", "_") in known, f"{script} has no --{flag}"
    assert not re.findall(r"^[A-Z]+$", readme, re.MULTILINE), "something is still to be filled in"
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme) + re.findall(r"`(\w+\.py)`", readme):
        assert (HERE / path).exists(), f"README names {path}"


# --- CUDA ---


def test_a_failed_capture_says_why(monkeypatch):
    @contextlib.contextmanager
    def graph(*args, **kwargs):  # as torch.cuda.graph ends where its body raises
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def step(index):
        raise reason

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "Stream", SimpleNamespace)
    reason = RuntimeError("a host synchronisation\nand more")
    with pytest.raises(InputError, match=r"\(a host synchronisation\): run with --no-graph"):
        training.StepGraph(step).capture(torch.arange(2))
    reason = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        training.StepGraph(step).capture(torch.arange(2))


def skip_without_bf16(precision):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this CUDA device has no bf16")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_graph_does_what_single_kernels_do(stage, precision, monkeypatch):
    skip_without_bf16(precision)
    flags = ["--limit", "256", "--device", "cuda", "--precision", precision]
    bench = bench_training.Bench(runtime.parse_flags(vars(bench_training), flags))
    captured, capture = [], training.StepGraph.capture
    monkeypatch.setattr(
        training.StepGraph, "capture", lambda *args: captured.append(capture(*args))
    )
    found = {}
    for graph in (True, False):
        step = bench_training.ours(bench, stage, graph)
        found[graph] = [step()["loss"].item() for _ in range(100)]
    assert len(captured) == 1
    first, all_of_them = (1e-4, 1e-2) if precision == "fp32" else (1e-2, 5e-2)
    assert found[True][:10] == pytest.approx(found[False][:10], rel=first)
    assert found[True] == pytest.approx(found[False], rel=all_of_them)


@needs_cuda
def test_the_bench_on_cuda(tmp_path, capsys):
    flags = ["--limit", "64", "--repeats", "1", "--seconds", "0.01", "--output-dir", str(tmp_path)]
    bench_training.main([*flags, "--device", "cuda"])
    assert f"ours without {bench_training.GRAPH}" in capsys.readouterr().out


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_cuda(tmp_path, precision, monkeypatch):
    skip_without_bf16(precision)
    monkeypatch.setattr(training, "STEPS_BEFORE_CAPTURE", 1)
    flags = [*TINY, *folders(tmp_path), "--device", "cuda", "--precision", precision]
    train_epoch = training.Stage.train_epoch

    def interrupted(self, bar):
        if self.name == "student" and len(self.rows) == 1:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "train_epoch", interrupted)
        distill_tinyvae.main(flags)
    distill_tinyvae.main([*flags, "--resume"])
    assert len(read_rows(tmp_path)) == 6
    state = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")
    assert bool(state["scaler"]) == (precision == "fp16")
    test_trained_model.main([*folders(tmp_path), "--device", "cuda"])
