"""Figures of reconstructions and codes."""

import pytest
import torch
import torch.nn.functional as F

from common import data, losses, metrics, synthetic
from tests.testing import random_images, random_normal
from tiny_vae_32 import TinyVAE32

# --- Metrics ---


def test_luma_and_chroma_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [0.502, 0.502, 0.502], [1, 0, 0], [0, 0, 1]])
    luma, chroma = metrics.luma_chroma(colours[:, :, None, None])
    assert luma.flatten().tolist() == pytest.approx([1, 0.502, 0.299, 0.114], abs=1e-3)
    assert chroma[:2].abs().max() < 1e-6  # greys have no colour
    assert chroma[2:].flatten().tolist() == pytest.approx([-0.169, 0.5, 0.5, -0.081], abs=1e-3)


def test_detail_kept_tells_brightness_from_colour():
    images = (random_images(600) * 255).byte()

    def mean(batch):
        return batch.mean((2, 3), keepdim=True).expand_as(batch)

    for reconstruct, expected in (
        (lambda batch: batch, [1, 1, 1]),
        (mean, [0, 0, 1]),
        (lambda batch: metrics.luma_chroma(batch)[0].expand_as(batch), [1, 0, 0]),
        (lambda batch: (batch + mean(batch)) / 2, [0.5, 0.5, 1]),
    ):
        figures = metrics.evaluate_images(reconstruct, images, in_full=True)
        kept = [figures[name] for name in ("luma_kept", "chroma_kept", "mean_chroma_kept")]
        assert kept == pytest.approx(expected, abs=1e-4)
    greys = images[:, :1].expand(-1, 3, -1, -1)
    figures = metrics.evaluate_images(lambda batch: batch, greys, in_full=True)
    assert figures["luma_kept"] == pytest.approx(1)
    assert not {"chroma_kept", "mean_chroma_kept"} & set(figures)


def test_a_grid_that_all_reconstructions_share_is_found_at_its_period():
    images = (random_images(50) * 255).byte()
    grids = {2: torch.tensor([[0.02, -0.01], [-0.01, 0.0]]), 4: 0.04 * torch.eye(4)}

    def sizes(grid, period):
        tiled = grid.repeat(32 // period, 32 // period)
        figures = metrics.evaluate_images(
            lambda batch: batch + 0.1 + tiled, images, in_full=True
        )
        return [figures[f"grid_{size}"] for size in (2, 4, 8)]

    assert sizes(grids[2], 2) == pytest.approx([0.02, 0.02, 0.02], abs=1e-5)
    # Of the four ones in a grid of period 4, half lie on each of two phases of period 2.
    assert sizes(grids[4], 4) == pytest.approx([0.01, 0.03, 0.03], abs=1e-5)
    assert sizes(torch.zeros(8, 8), 8) == pytest.approx([0, 0, 0], abs=1e-5)


def test_ssim_agrees_with_the_definition():
    x, y = random_images(1).double(), random_images(1, seed=1).double() * 0.5 + 0.2
    window = torch.exp(-((torch.arange(11.0).double() - 5) ** 2) / (2 * 1.5**2))
    window = window[:, None] * window / window.sum() ** 2

    def mean(image):  # of each window, a colour at a time
        return F.conv2d(image.transpose(0, 1), window[None, None])

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    values = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    expected = (values / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean().item()
    assert metrics.ssim(x.float(), y.float()).item() == pytest.approx(expected, abs=1e-5)


def test_evaluation_is_the_same_in_batches_of_any_size(monkeypatch):
    vae, images = TinyVAE32(), synthetic.dead_leaves(50, "test")
    whole = metrics.evaluate_vae(vae, images, in_full=True)
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 7)
    parts = metrics.evaluate_vae(vae, images, in_full=True)
    # An untrained network keeps 0.00005 of the brightness, off by 1e-8.
    assert whole == pytest.approx(parts, rel=1e-4, abs=1e-7)
    assert metrics.psnr(torch.tensor([0.01, 0.001])).tolist() == pytest.approx([20, 30])
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
    assert metrics.evaluate_vae(vae, synthetic.dead_leaves(50, "test"))["active_dims"] == 10


def test_classes_are_told_apart_where_there_are_two():
    vae, images = TinyVAE32(), synthetic.dead_leaves(20, "test")
    for labels, names in ((torch.arange(20) % 2, {"knn_accuracy", "probe_accuracy"}),
                          (torch.zeros(20, dtype=torch.long), set())):
        split = data.Split(images, labels)
        assert set(metrics.evaluate_code(vae, split, split)) == names
    few = data.Split(images[:3], torch.tensor([0, 1, 0]))  # fewer than neighbours
    assert metrics.evaluate_code(vae, few, few)["knn_accuracy"] == pytest.approx(2 / 3)


class Linear(torch.nn.Module):
    """A VAE of linear maps: mu is `into` · pixels, the image `out_of` · mu."""

    def __init__(self, into, out_of):
        super().__init__()
        self.into, self.out_of = into, out_of

    def encode(self, images):
        mu = images.flatten(1) @ self.into.T
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        return (z @ self.out_of.T).unflatten(1, (3, 32, 32))


def test_codes_are_swapped_by_a_linear_map():
    images = (255 * random_images(60)).byte()
    basis = torch.linalg.qr(random_normal(3072, 6)).Q
    student = Linear(basis[:, :4].T, basis[:, :4])
    turned = torch.linalg.qr(random_normal(6, 6, seed=1)).Q + 0.1  # more directions, mixed
    teacher = Linear(turned @ basis.T, basis @ turned.inverse())
    known, images = images[:40], images[40:]

    def mse(vae):
        return metrics.evaluate_images(lambda some: vae.decode(vae.encode(some)[0]), images)["mse"]

    def swap(encoder, decoder):
        codes = (metrics.encode_means(vae, known) for vae in (encoder, decoder))
        return metrics.SwappedVAE(encoder, decoder, *codes)

    def r2(encoder, decoder):
        swapped = swap(encoder, decoder)
        codes, predicted = (metrics.encode_means(vae, images) for vae in (decoder, swapped))
        return metrics.explained_variance(codes, predicted)

    # The teacher's code says all that the student's does, and the student's not all.
    assert mse(teacher) < mse(student)
    assert mse(swap(teacher, student)) == pytest.approx(mse(student), rel=1e-4)
    assert mse(swap(student, teacher)) > mse(teacher)
    assert r2(teacher, student) == pytest.approx(1) and 0.3 < r2(student, teacher) < 1


def test_neighbours_vote_and_the_nearest_decides_a_tie():
    codes = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    query, truth = torch.tensor([[-1.0]]), torch.tensor([7])

    def accuracy(labels):
        return metrics.nearest_neighbour_accuracy(codes, torch.tensor(labels), query, truth)

    assert accuracy([3, 3, 7, 7, 7]) == 1  # three against the two nearest
    assert accuracy([7, 3, 3, 7, 5]) == 1  # a tie
    assert accuracy([3, 7, 7, 3, 5]) == 0


def test_sampled_error_is_that_of_noise_and_leaves_the_random_state():
    vae, images = TinyVAE32().eval(), synthetic.dead_leaves(50, "test")
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


def test_vgg_distance_and_evenness_of_known_paths():
    class Bent(TinyVAE32):
        """Latents that are the brightness of an image, decoded to a function of it."""

        def __init__(self, bend):
            super().__init__()
            self.bend = bend

        def encode(self, images):
            return images.mean((1, 2, 3))[:, None], torch.zeros(len(images), 1)

        def decode(self, z):
            return self.bend(z)[:, :, None, None].expand(-1, 3, 32, 32)

    def judge(images):  # features of one layer: the red channel
        return [images[:, :1]]

    images = (random_images(40)[:, :1, :1, :1] * 255).byte().expand(40, 3, 32, 32)
    even = metrics.interpolation_unevenness(Bent(lambda z: z), images, judge)
    bent = metrics.interpolation_unevenness(Bent(lambda z: z**3), images, judge)
    assert even == pytest.approx(0, abs=1e-3) and bent > 0.2
    same = images[:1].expand(2, 3, 32, 32)  # joined by a line without length
    assert metrics.interpolation_unevenness(Bent(lambda z: z), same, judge) == 0
    assert metrics.vgg_distance(Bent(lambda z: z), images, judge) < 1e-9
    off = metrics.vgg_distance(Bent(lambda z: z + 0.1), images, judge)
    assert off == pytest.approx(0.01, rel=1e-3)
