"""What teacher and student have in common: image → mean and log-variance → image.

A model file defines the layers; this file says how they are used. Images are floating point,
N×3×32×32, with values in [0, 1].
"""

import torch
from torch import nn

IMAGE_SHAPE = (3, 32, 32)
PIXEL_VALUES = 3 * 32 * 32  # 3,072 numbers in one image


class VAE(nn.Module):
    """A convolutional variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114).

    A subclass sets `latent_dim`, `architecture` (its name and constructor arguments, plain data,
    enough to build it again) and five modules:

        encoder                 N×3×32×32 in [0, 1]  →  N×C×2×2
        fc_mu, fc_logvar        N×4C                 →  N×latent_dim
        decoder_input           N×latent_dim         →  N×4D
        decoder                 N×D×2×2              →  N×3×32×32, logits
    """

    # Reading the range of a batch makes an accelerator wait for it. Turn it off only where the
    # images are known to be in [0, 1], as in a training loop that makes them from uint8.
    check_range = True

    def encode(self, images):
        """Images, N×3×32×32 in [0, 1] → mu and logvar of q(z|x), N×latent_dim each.

        Raises ValueError for another shape, an integer type, or values outside [0, 1].
        """
        self._check_images(images)
        features = self.encoder(images).flatten(1)
        return self.fc_mu(features), self.fc_logvar(features)

    @staticmethod
    def reparameterize(mu, logvar, epsilon=None):
        """A sample z = mu + sigma · epsilon, epsilon ~ N(0, I), that gradients pass through."""
        epsilon = torch.randn_like(mu) if epsilon is None else epsilon
        return mu + torch.exp(0.5 * logvar) * epsilon

    def decode_logits(self, z):
        """Latents, N×latent_dim → N×3×32×32 unbounded logits; `decode` is their sigmoid.

        Raises ValueError for another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"latents must have shape N×{self.latent_dim}, got {_shape(z)}"
            )
        features = self.decoder_input(z)
        return self.decoder(features.view(features.shape[0], -1, 2, 2))

    def decode(self, z):
        """Latents, N×latent_dim → images, N×3×32×32 in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, images):
        """Images → (reconstruction, mu, logvar). Decodes a sample in training, mu in evaluation."""
        mu, logvar = self.encode(images)
        z = self.reparameterize(mu, logvar) if self.training else mu
        return self.decode(z), mu, logvar

    def _check_images(self, images):
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise ValueError(f"images must have shape N×3×32×32, got {_shape(images)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floating point in [0, 1], got {images.dtype}: "
                "divide uint8 pixels by 255"
            )
        if self.check_range and not torch.compiler.is_compiling() and len(images):
            low, high = (value.item() for value in torch.aminmax(images.detach()))
            if not (low >= 0 and high <= 1):  # also true of NaN
                raise ValueError(f"pixel values must lie in [0, 1], got [{low:.4g}, {high:.4g}]")


def check_channels(name, channels):
    """Four positive whole numbers as a tuple. Raises ValueError otherwise."""
    channels = tuple(channels)
    if len(channels) != 4 or any(type(c) is not int or c < 1 for c in channels):
        raise ValueError(f"{name} must be four positive whole numbers, got {channels}")
    return channels


def _shape(tensor):
    return "×".join(map(str, tensor.shape)) or "a scalar"
