"""The five terms of the distillation loss, and how they are weighed.

    total = 0.3 reconstruction + 0.1 KL + 0.3 latent + 0.2 output + 0.1 perceptual

Squared errors are means over what they compare, pixel or feature values; nats are divided by the
3,072 values of an image. With pixels and nats over the same divisor a ratio of weights means what
it says: KL over reconstruction, 0.1 / 0.3 × KL_SHARE, is the beta of a beta-VAE on summed errors.
(Averaging KL over 64 latents instead makes 0.1 / 0.3 alone a beta of 16, at which theory keeps 3
latents of 64 alive: Lucas et al. 2019, arXiv:1911.02469.)

Images are in [0, 1], N×3×32×32; a VAE offers mu, logvar, and its decoder's logits.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from runtime import InputError, download_timeout, import_torchvision
from storage import fingerprint, load_checkpoint
from vae import PIXEL_VALUES

TERMS = ("reconstruction", "kl", "latent", "output", "perceptual")


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


class LatentProjection(nn.Module):
    """The teacher's 512 latents → the student's 64: learnable, and unable to collapse.

        t = Q W (mu_T − m)

    m is the mean of the teacher's mu over the training images. W, fixed, whitens it: the leading
    principal components, each divided by its standard deviation. Q, learned, has orthonormal
    rows. So over the training images every t has zero mean, unit variance, and no correlation
    with another, whatever Q learns: shrinking towards a target that teaches nothing, or copying
    one easy direction into all 64, is out of reach. Learning is left with choosing the directions
    and turning them. Q starts as the identity: the 64 leading components. It learns along the
    Stiefel manifold: its gradient is tangent to it, and `retract` follows each optimiser step.

    A plain linear map trained on ‖mu_S − P mu_T‖² has its optimum at P = 0, aided by the KL term;
    hence the fixed teachers of FitNets (arXiv:1412.6550), and the normalisation of SRD (Miles et
    al. 2023, "Understanding the role of the projector in knowledge distillation").

    Args:
        teacher_mu: the teacher's mu of the training images, N×512. Sets m and W.
        latent_dim: the student's latents.
        components: how many principal components Q chooses from.

    Raises ValueError if the teacher has fewer latents than the student.
    """

    def __init__(self, teacher_mu, latent_dim=64, components=128):
        super().__init__()
        teacher_dim = teacher_mu.shape[1]
        if teacher_dim < latent_dim:
            raise ValueError(
                f"the teacher has {teacher_dim} latents, fewer than the student's {latent_dim}"
            )
        components = min(components, teacher_dim)
        codes = teacher_mu.detach().cpu().double()
        mean = codes.mean(0)
        centred = codes - mean
        covariance = centred.T @ centred / len(centred)
        variance, directions = torch.linalg.eigh(covariance)  # ascending
        variance, directions = variance.flip(0)[:components], directions.flip(1)[:, :components]
        # A direction without variance (fewer images than latents, or a collapsed teacher) cannot
        # be whitened; the floor leaves it near zero, where projected_std shows it.
        scale = variance.clamp_min(1e-6 * variance[0].clamp_min(1e-12)).rsqrt()
        self.register_buffer("mean", mean.float())                             # 512
        self.register_buffer("whitening", (directions * scale).T.float())      # components×512

        self.rotation = nn.Linear(components, latent_dim, bias=False)          # Q, 64×components
        nn.init.eye_(self.rotation.weight)
        self.rotation.weight.register_hook(self.tangent)

    def forward(self, teacher_mu):
        """N×512 → N×64, zero mean and unit variance over the training images."""
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


# Variance of the Gaussians that the latent term compares: about that of the student's posterior
# (1.3 nats a latent is a variance of 0.07 against the prior's 1), so that missing the target by
# so much costs about as much as the noise of sampling already does.
LATENT_VARIANCE = 0.1
LATENT_FLOOR = 0.1  # share of the latent term that is left when it has faded


def latent_distillation_loss(mu, projected):
    """½ ‖mu_S − t‖² / s² / 3072 with s² = 0.1, summed over latents, mean over the batch.

    The KL in nats between N(mu_S, s² I) and N(t, s² I), so in the unit of the KL term. Means are
    matched, not samples: a sample's noise teaches nothing.
    """
    return 0.5 * (mu - projected).square().sum(1).mean() / (LATENT_VARIANCE * PIXEL_VALUES)


def output_distillation_loss(logits, teacher_logits, temperature):
    """½ T² KL(σ(l_T / T) ‖ σ(l_S / T)), mean over pixel values and the batch.

    Hinton et al. 2015, arXiv:1503.02531, with each pixel value a Bernoulli variable of logit l
    in place of a class distribution. A higher T weighs errors in dark and bright pixels, where
    the sigmoid is flat, more nearly like those in mid-grey ones; the limit is (l_T − l_S)² / 16.
    On the images themselves T would cancel: T² MSE(s/T, t/T) = MSE(s, t). The half makes a small
    error at mid-grey count as its square, so that the weight compares with reconstruction's.
    """
    # Cached logits come in fp16, which is precise enough for a value but not for differences.
    student, teacher = logits.float() / temperature, teacher_logits.float() / temperature
    divergence = (
        torch.sigmoid(teacher) * (teacher - student) + F.softplus(student) - F.softplus(teacher)
    )
    return 0.5 * temperature**2 * divergence.mean()


# --- The perceptual term ---

# VGG16's convolutions through relu3_3, as torchvision numbers its `features`.
VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14)
VGG_KEYS = [f"features.{i}.{kind}" for i in VGG_CONVOLUTIONS for kind in ("weight", "bias")]
VGG_LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """Distance of VGG16 features: ‖φ̂(x̂) − φ̂(x)‖² / CHW, mean over layers and the batch.

    Johnson et al. 2016, arXiv:1603.08155, equation 2, at relu1_2, relu2_2 and relu3_3. The
    features φ̂ of each position have unit length over channels, as in LPIPS (Zhang et al. 2018,
    arXiv:1801.03924, without its learned weights), so that no layer's magnitude decides. A mean
    over channels as well as positions makes the shallow layers count most, which at 32×32 carry
    the detail.

    Args:
        features: VGG16's `features` through relu3_3, from `load_vgg16`. Frozen here.
    """

    def __init__(self, features):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def unit_features(self, images):
        """Images in [0, 1] → one tensor a layer, N×C×H×W, unit length over C."""
        x = (images - self.mean) / self.std
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in VGG_LAYERS.values():
                found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found

    def distance(self, reconstruction, images):
        """Distance of each pair of images in [0, 1], N numbers: the mean over layers and positions
        of the squared distance of unit features: 0 for equal images, at most 2."""
        with torch.no_grad():
            targets = self.unit_features(images)
        layers = [
            (a - b).square().sum(1).mean((1, 2))
            for a, b in zip(self.unit_features(reconstruction), targets)
        ]
        return torch.stack(layers).mean(0)

    def forward(self, reconstruction, images):
        with torch.no_grad():
            targets = self.unit_features(images)
        found = self.unit_features(reconstruction)
        return sum(F.mse_loss(a, b) for a, b in zip(found, targets)) / len(targets)


def load_vgg16(source, seed=0):
    """VGG16 through relu3_3, and a record of its weights: `vgg_weights`, `vgg_sha256`.

    Args:
        source: `imagenet` (torchvision's, downloaded once, 528 MB), `random` (untrained), the
            path of a state dict with torchvision's keys, `features.0.weight` to
            `features.14.bias` at least, or `none`, which returns None for the network.
        seed: of the random weights.

    Raises InputError where the weights cannot be had or do not fit. Never falls back to others.
    """
    if source == "none":
        return None, {"vgg_weights": "none", "vgg_sha256": ""}
    models = import_torchvision().models
    with torch.device("meta"):  # no memory and no initialisation for the 134 M other parameters
        features = models.vgg16().features[: max(VGG_LAYERS.values()) + 1]
    if source == "random":
        features.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for i in VGG_CONVOLUTIONS:
            nn.init.kaiming_normal_(features[i].weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(features[i].bias)
        return features, vgg_record(features, f"random, seed {seed}")

    if source == "imagenet":
        try:
            with download_timeout():
                weights = models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                    progress=True, check_hash=True, weights_only=True
                )
        except Exception as error:  # URL, socket, disk and checksum errors share no narrower base
            raise InputError(
                f"the ImageNet weights of VGG16 could not be downloaded or read ({error}): name a "
                "file that holds them with --vgg PATH, use --vgg random or --vgg none, or --demo"
            ) from error
        description = "ImageNet, torchvision IMAGENET1K_V1"
    elif not Path(source).exists():
        raise InputError(
            f"there is no file {source}: --vgg takes imagenet, random, none, or the path of a "
            "state dict of VGG16"
        )
    else:
        weights = load_checkpoint(source)
        description = f"from {source}"
    missing = [key for key in VGG_KEYS if key not in weights]
    if missing:
        raise InputError(
            f"{source} is not a VGG16 with torchvision's keys: {missing[0]} is missing"
        )
    try:
        features.load_state_dict(
            {key.removeprefix("features."): weights[key].float() for key in VGG_KEYS}, assign=True
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()  # the first line names only the class
        raise InputError(f"the weights in {source} are not VGG16's: {reason}") from error
    return features, vgg_record(features, description)


def vgg_record(features, description):
    return {"vgg_weights": description, "vgg_sha256": fingerprint(features)}


# --- All together ---


class Criterion(nn.Module):
    """What a stage minimises: (images, logits, mean_logits, mu, logvar, *targets) → (total, terms).

    total is a scalar; terms are unweighted and detached, keyed by name. `progress`, from 0 to 1,
    is how much of the stage's steps are done; the stage keeps it up to date.
    """

    needs_mean = False  # whether mean_logits, decoded from mu, are needed

    def __init__(self):
        super().__init__()
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def after_step(self):
        """What has to follow every optimiser step."""


class VAELoss(Criterion):
    """Reconstruction + kl_weight · KL: the teacher's loss. kl_weight is its effective beta."""

    def __init__(self, kl_weight):
        super().__init__()
        self.kl_weight = kl_weight

    def forward(self, images, logits, mean_logits, mu, logvar):
        reconstruction, kl = reconstruction_loss(torch.sigmoid(logits), images), kl_loss(mu, logvar)
        terms = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        return reconstruction + self.kl_weight * kl, terms


# The five weights alone would leave the student at 58 nats. With half the KL it has 82, near the
# rate of the run they were first used for, 87.
KL_SHARE = 0.5
# A mean over channels of vectors of unit length is small. Eight times as much takes a tenth off the
# distance that another VGG16 sees, adds 2% to the squared error, and makes half of the loss.
PERCEPTUAL_SCALE = 8


class DistillationLoss(Criterion):
    """The weighted sum of the five terms. A term of weight zero is not computed.

    Reconstruction and KL are a VAE's, of a sample from the posterior. The two terms that compare
    pictures with what is free of noise, the teacher's output (decoded from its mean) and VGG16's
    features of the image, look at what is decoded from the student's mean, as its users will.

    The latent term fades, from its full weight to a tenth: a target for the encoder saves it many
    steps at the start, but a linear map of the teacher's code is not the code that suits so small
    a decoder best, and held to it to the end, the student stays behind one that was not.

    Args:
        weights: a weight for each of `TERMS`.
        latent_fade: share of the steps over which the latent term fades; 0: it never does.
        temperature: T of the output term.
        projection: a LatentProjection; its parameters are trained with the student's. None where
            neither the latent nor the output weight asks for a teacher.
        perceptual: a PerceptualLoss, or None where that weight is zero.
        perceptual_images: how many images of a batch it sees, the first; 0: all. Batches are
            shuffled, so the term's expectation is the same.
    """

    def __init__(
        self, weights, temperature, projection, perceptual=None, perceptual_images=0, latent_fade=0
    ):
        super().__init__()
        self.weights = weights
        self.latent_fade = latent_fade
        self.temperature = temperature
        self.projection = projection
        self.perceptual = perceptual
        self.perceptual_images = perceptual_images or None

    @property
    def needs_mean(self):
        return self.weights["output"] > 0 or self.weights["perceptual"] > 0

    def after_step(self):
        if isinstance(self.projection, LatentProjection):
            self.projection.retract()

    def latent_targets(self, teacher_mu):
        # 16 bits would lose the small components that whitening magnifies.
        with torch.autocast(teacher_mu.device.type, enabled=False):
            return self.projection(teacher_mu)

    def forward(
        self, images, logits, mean_logits, mu, logvar, teacher_logits=None, teacher_mu=None
    ):
        seen = self.perceptual_images
        functions = {
            "reconstruction": lambda: reconstruction_loss(torch.sigmoid(logits), images),
            "kl": lambda: KL_SHARE * kl_loss(mu, logvar),
            "latent": lambda: latent_distillation_loss(mu, self.latent_targets(teacher_mu)),
            "output": lambda: output_distillation_loss(
                mean_logits, teacher_logits, self.temperature
            ),
            "perceptual": lambda: PERCEPTUAL_SCALE
            * self.perceptual(torch.sigmoid(mean_logits[:seen]), images[:seen]),
        }
        terms = {name: functions[name]() for name in TERMS if self.weights[name] > 0}
        weights = dict(self.weights)
        if self.latent_fade:
            left = (1 - self.progress / self.latent_fade).clamp_min(LATENT_FLOOR)
            weights["latent"] = weights["latent"] * left
        total = sum(weights[name] * value for name, value in terms.items())
        return total, {name: value.detach() for name, value in terms.items()}


def effective_beta(kl_weight, reconstruction_weight):
    """beta of (summed squared error + beta × summed KL), the beta-VAE these two weights make here.

    Counts the reconstruction term alone; the output and perceptual terms also pull towards the
    image, which makes the beta that is felt smaller. None without a reconstruction term.
    """
    return KL_SHARE * kl_weight / reconstruction_weight if reconstruction_weight else None
