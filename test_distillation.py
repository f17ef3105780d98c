"""What a reader runs first: the two models, the terms, and one short distillation.

Generated images, no network, no GPU needed. The rest is in tests/: test_losses.py, test_training.py
and test_runs.py go deeper into the same.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import distill_tinyvae
from common import losses, models, runs, storage
from common.settings import parse_settings
from distill_tinyvae import TeacherObjective
from standard_vae import StandardVAE
from tests.testing import (
    HERE,
    TINY,
    WEIGHTS,
    random_images,
    random_normal,
    read_table,
    student_objective,
    weights_of,
)
from tiny_vae_32 import TinyVAE32

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


@pytest.mark.parametrize("model", [StandardVAE, TinyVAE32])
def test_evaluation_decodes_mu_and_training_a_sample(model):
    vae, images = model(), random_images(4)
    vae.train()
    assert not torch.equal(vae(images)[0], vae(images)[0])
    vae.eval()
    reconstruction, mu, _ = vae(images)
    assert torch.equal(reconstruction, vae.decode(mu))
    assert torch.equal(reconstruction, torch.sigmoid(vae.decode_logits(mu)))
    z = torch.randn(5, vae.latent_dim, generator=torch.Generator().manual_seed(3))
    sample = vae.sample(5, torch.Generator().manual_seed(3))
    assert torch.equal(sample, vae.decode(z)) and not sample.requires_grad


@pytest.mark.parametrize("model", [StandardVAE, TinyVAE32])
def test_reparameterize_samples_the_posterior(model):
    mu, logvar = torch.full((20_000, 1), 2.0), torch.full((20_000, 1), math.log(0.25))
    torch.manual_seed(0)
    z = model.reparameterize(mu, logvar)
    assert z.mean() == pytest.approx(2.0, abs=0.02)
    assert z.std() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(model.reparameterize(mu, logvar, -mu), mu - 1)


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


@pytest.mark.parametrize("model", [StandardVAE, TinyVAE32])
def test_wrong_latents_are_refused(model):
    vae = model(latent_dim=7)
    with pytest.raises(ValueError, match="N×7, got 2×8"):
        vae.decode(torch.zeros(2, 8))


ALONE = """
import sys
import torch
from {module} import {name}

network = {name}.load("weights.pth")
assert not network.training
with torch.no_grad():
    mu, logvar = network.encode(torch.load("images.pth"))
    results = [mu, logvar, network.decode(mu), network.sample(3, torch.Generator().manual_seed(0))]
torch.save(results, "results.pth")
project = [name for name in sys.modules if name.split(".")[0] in ("common", "tests")]
assert not project and {here!r} not in sys.path
"""


@pytest.mark.parametrize(
    ("network", "checkpoint", "other"),
    [(TinyVAE32, "tinyvae_best.pth", "teacher_vae.pth"),
     (StandardVAE, "teacher_vae.pth", "tinyvae_best.pth")],
)
def test_a_model_file_and_a_checkpoint_are_all_that_is_needed(
    network, checkpoint, other, tiny_run, tmp_path
):
    file, name = sys.modules[network.__module__].__file__, network.__name__
    weights, images = tiny_run[0] / "checkpoints" / checkpoint, random_images(2)
    shutil.copy(file, tmp_path)
    shutil.copy(weights, tmp_path / "weights.pth")
    torch.save(images, tmp_path / "images.pth")
    script = ALONE.format(module=network.__module__, name=name, here=str(HERE))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    alone = torch.load(tmp_path / "results.pth")
    vae, _ = models.load_model(weights, network)
    mu, logvar, *_ = vae.encode(images)
    here = [mu, logvar, vae.decode(mu), vae.sample(3, torch.Generator().manual_seed(0))]
    for found, expected in zip(alone, here):
        torch.testing.assert_close(found, expected.detach())
    path = tiny_run[0] / "checkpoints" / other
    with pytest.raises(ValueError, match=rf"{other} holds a \w+, not a {name}"):
        network.load(path)


# --- The terms ---


def batch():
    """Images, noise, and what a teacher of 96 latents makes of the images."""
    return random_images(8), random_normal(8, 64), random_normal(8, 96), random_normal(8, 3, 32, 32)


def assert_terms(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("with_teacher", "seen"), [(True, 6), (False, 6), (True, 0)])
def test_the_students_terms(with_teacher, seen):
    weights = {name: WEIGHTS[name] for name in losses.TERMS if with_teacher or name != "latent"}
    objective = student_objective(weights, temperature=2.0, perceptual_images=seen)
    network = copy.deepcopy(objective.network).train()
    images, noise, teacher_mu, teacher_logits = batch()
    terms = objective(images, noise, *((teacher_mu, teacher_logits) if with_teacher else ()))

    mu, logvar = network.encode(images)
    z = mu + (0.5 * logvar).exp() * noise
    # What is decoded from a sample is compared with the image; all else is decoded from the mean.
    of_sample, of_mean = network.decode_logits(torch.cat([z, mu])).chunk(2)
    expected = {
        "reconstruction": losses.reconstruction_loss(of_sample.sigmoid(), images),
        "kl": losses.kl_loss(mu, logvar),
    }
    if with_teacher:
        projected = objective.projection(teacher_mu)
        expected["latent"] = losses.latent_distillation_loss(mu, projected)
        expected["output"] = losses.output_distillation_loss(of_mean, teacher_logits, 2.0)
    else:
        expected["output"] = losses.reconstruction_loss(of_mean.sigmoid(), images)
    seen = seen or 8
    without_grid = losses.without_grid(of_mean.sigmoid(), images)[:seen]  # of the whole batch
    expected["perceptual"] = losses.perceptual_loss(objective.vgg, without_grid, images[:seen])
    assert_terms(terms, expected)

    objective.kl_factor.fill_(5)
    factors = weights | {"kl": 5 * weights["kl"]}
    assert_terms(objective.weigh(terms), {name: factors[name] * terms[name] for name in terms})


def test_the_teachers_terms():
    network = StandardVAE(96, (4, 8, 8, 8))
    objective = TeacherObjective(network, beta=0.02)
    images, noise = random_images(8), random_normal(8, 96)
    terms = objective(images, noise)
    mu, logvar = network.encode(images)
    reconstruction = network.decode(mu + (0.5 * logvar).exp() * noise)
    expected = {
        "reconstruction": losses.reconstruction_loss(reconstruction, images),
        "kl": losses.kl_loss(mu, logvar),  # in the unit of the student's
    }
    assert_terms(terms, expected)
    weighted = {"reconstruction": expected["reconstruction"], "kl": 0.02 * expected["kl"]}
    assert_terms(objective.weigh(terms), weighted)


@pytest.mark.parametrize("left_out", [*losses.TERMS, "output and perceptual"])
def test_a_term_of_weight_zero_counts_nothing_and_is_not_computed(left_out, monkeypatch):
    weights = {name: weight for name, weight in WEIGHTS.items() if name not in left_out}
    objective = student_objective(weights)
    decoded, decode = [], objective.network.decode_logits
    monkeypatch.setattr(
        objective.network, "decode_logits", lambda z: decoded.append(len(z)) or decode(z)
    )
    terms = objective(*batch())
    weighted = objective.weigh(terms)
    free = {"reconstruction", "kl"}  # any VAE has them
    assert set(terms) == set(weighted) == free | set(weights)
    assert all(weighted[name] > 0 if name in weights else weighted[name] == 0 for name in weighted)
    assert decoded == [8 if left_out == "output and perceptual" else 16]  # means as well


def test_flags_and_constants_make_the_weights():
    def weights(*flags):
        return distill_tinyvae.term_weights(parse_settings(vars(distill_tinyvae), flags))

    assert weights() == pytest.approx(WEIGHTS)
    assert weights(
        "--reconstruction-weight", "0.7", "--kl-weight", "0.2", "--kl-scale", "0.9",
        "--latent-weight", "0.4", "--output-weight", "0.6",
        "--perceptual-weight", "0.05", "--perceptual-scale", "3",
    ) == pytest.approx(dict(zip(losses.TERMS, (0.7, 0.18, 0.4, 0.6, 0.15))))
    assert list(weights("--teacher", "none", "--vgg", "none")) == ["reconstruction", "kl", "output"]
    for term in losses.TERMS:
        assert set(weights(f"--{term}-weight", "0")) == set(losses.TERMS) - {term}


def test_weights_make_the_beta_that_is_printed(tiny_run):
    # Summed squared error + beta · summed KL, scaled, must be the two terms as they are weighted.
    run, output = tiny_run
    beta = json.loads((run / "outputs" / "config.json").read_text())["effective_beta"]
    assert beta == pytest.approx(0.4 / 3) and "effective beta 0.133 " in output
    mu, logvar = random_normal(8, 64), random_normal(8, 64, seed=1)
    images, reconstruction = random_images(8), random_images(8, seed=1)
    kl = losses.kl_divergence(mu, logvar).sum()
    summed = (reconstruction - images).square().sum() + beta * kl
    weighted = WEIGHTS["reconstruction"] * losses.reconstruction_loss(reconstruction, images)
    weighted += WEIGHTS["kl"] * losses.kl_loss(mu, logvar)
    torch.testing.assert_close(weighted, 0.3 * summed / (8 * 3072))


# --- A short distillation ---


def test_a_run_writes_what_it_promises(tiny_run):
    run, output = tiny_run
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "teacher_vae.pth", "tinyvae_best.pth", "tinyvae_last.pth", "tinyvae_epoch_002.pth", ".lock",
    }
    assert {path.name for path in (run / "outputs").iterdir()} == {
        "config.json", "metrics.csv", "training_curves.png", "reconstruction_test.png",
        "interpolation_test.png", ".lock",
    }
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


def test_a_run_has_a_row_for_each_epoch_whose_parts_add_up_to_the_loss(tiny_run):
    rows = read_table(tiny_run[0])
    assert tuple(rows[0]) == runs.COLUMNS
    assert list(rows[0])[-1] == "seconds"
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("teacher", "1"), ("teacher", "2"), ("student", "1"), ("student", "2"), ("student", "3"),
    ]
    for row in rows:
        is_teacher = row["stage"] == "teacher"
        weights = {"reconstruction": 1, "kl": 0.01} if is_teacher else WEIGHTS
        parts = {name: float(row[f"{name}_weighted"]) for name in weights}
        assert sum(parts.values()) == pytest.approx(float(row["loss"]), rel=1e-5)
        for name, weight in weights.items():
            assert parts[name] == pytest.approx(weight * float(row[name]), rel=1e-5)
        unused = set(losses.TERMS) - set(weights)
        assert all(row[name] == row[f"{name}_weighted"] == "" for name in unused)
        assert (row["projected_std"] == "") == is_teacher


def test_training_changes_student_and_projection(tiny_run):
    run, _ = tiny_run
    early, late = weights_of(run, "tinyvae_epoch_002.pth"), weights_of(run)
    assert (early["fc_mu.weight"] - late["fc_mu.weight"]).abs().max() > 0
    rotation = late["projection.rotation.weight"]
    assert (rotation - torch.eye(*rotation.shape)).abs().max() > 1e-4
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64), atol=1e-4, rtol=0)
    first, *_, last = [row for row in read_table(run) if row["stage"] == "student"]
    assert float(last["loss"]) < float(first["loss"])


def test_the_checkpoint_of_the_best_epoch_holds_its_error(tiny_run):
    run, _ = tiny_run
    best = storage.load_checkpoint(run / "checkpoints" / "tinyvae_best.pth")
    errors = [float(row["val_mse"]) for row in read_table(run) if row["stage"] == "student"]
    assert best["epoch"] == 1 + errors.index(min(errors))
    assert best["record"]["limit"] == int(TINY[TINY.index("--limit") + 1])
