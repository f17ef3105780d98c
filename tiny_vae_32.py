"""TinyVAE32, the student: 32×32 RGB → 64 latents → 32×32 RGB. 294,403 parameters, 1.1 MiB.

    student = TinyVAE32.load("checkpoints/tinyvae_cifar10.pth")
    reconstruction, mu, logvar = student(images)      # images: N×3×32×32 in [0, 1]
    images = student.sample(16)                       # N×3×32×32 in [0, 1]

This file needs PyTorch and nothing else: it and a checkpoint are all that another project copies.
"""

import torch
from torch import nn


class TinyVAE32(nn.Module):
    """A convolutional variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114).

    Every layer's width is an argument, so a pruned student is of the same class.

    Args:
        latent_dim: numbers in the code.
        encoder_channels: output channels of the four encoder stages.
        decoder_channels: channels that enter each of the four decoder stages.

    Raises ValueError for channels that are not four positive whole numbers.
    """

    # Reading the range of a batch makes an accelerator wait for it. Turn it off only where the
    # images are known to be in [0, 1].
    check_range = True

    def __init__(
        self,
        latent_dim=64,
        encoder_channels=(16, 32, 64, 128),
        decoder_channels=(128, 64, 32, 16),
    ):
        super().__init__()
        e1, e2, e3, e4 = four_widths("encoder_channels", encoder_channels)
        d1, d2, d3, d4 = four_widths("decoder_channels", decoder_channels)
        self.latent_dim = latent_dim
        self.architecture = {                        # plain data, enough to build it again
            "name": "TinyVAE32",
            "latent_dim": latent_dim,
            "encoder_channels": [e1, e2, e3, e4],
            "decoder_channels": [d1, d2, d3, d4],
        }

        self.encoder = nn.Sequential(                # N×3×32×32, pixels in [0, 1]
            *downsample(3, e1),                      # N×16×16×16
            *downsample(e1, e2),                     # N×32×8×8
            *downsample(e2, e3),                     # N×64×4×4
            *downsample(e3, e4),                     # N×128×2×2
        )
        self.fc_mu = nn.Linear(e4 * 4, latent_dim)       # N×512 → N×64
        self.fc_logvar = nn.Linear(e4 * 4, latent_dim)   # N×512 → N×64

        self.decoder_input = nn.Linear(latent_dim, d1 * 4)  # N×64 → N×512, seen as N×128×2×2
        self.decoder = nn.Sequential(
            *upsample(d1, d2),                       # N×64×4×4
            *upsample(d2, d3),                       # N×32×8×8
            *upsample(d3, d4),                       # N×16×16×16
            double(d4, 3),                           # N×3×32×32, logits
        )

    def encode(self, images):
        """Images, N×3×32×32 in [0, 1] → mu and logvar of q(z|x), N×64 each.

        Raises ValueError for another shape, an integer type, or values outside [0, 1].
        """
        check_images(images, self.check_range)
        features = self.encoder(images).flatten(1)
        return self.fc_mu(features), self.fc_logvar(features)

    @staticmethod
    def reparameterize(mu, logvar, epsilon=None):
        """A sample z = mu + sigma · epsilon, epsilon ~ N(0, I), that gradients pass through."""
        epsilon = torch.randn_like(mu) if epsilon is None else epsilon
        return mu + torch.exp(0.5 * logvar) * epsilon

    def decode_logits(self, z):
        """Latents, N×64 → N×3×32×32 unbounded logits. Raises ValueError for another shape."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"latents must have shape N×{self.latent_dim}, got {shape_of(z)}")
        features = self.decoder_input(z)
        return self.decoder(features.view(z.shape[0], -1, 2, 2))

    def decode(self, z):
        """Latents, N×64 → images, N×3×32×32 in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, images):
        """Images → (reconstruction, mu, logvar). Decodes a sample in training, mu in evaluation."""
        mu, logvar = self.encode(images)
        z = self.reparameterize(mu, logvar) if self.training else mu
        return self.decode(z), mu, logvar

    @torch.no_grad()
    def sample(self, count, generator=None):
        """`count` new images, decoded from z ~ N(0, I): count×3×32×32 in [0, 1]."""
        weight = self.decoder_input.weight
        z = torch.randn(count, self.latent_dim, generator=generator, device=weight.device)
        return self.decode(z.to(weight.dtype))

    @classmethod
    def load(cls, path):
        """The network in a checkpoint, in evaluation mode, on the CPU.

        Raises ValueError where the file holds another network.
        """
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        architecture = dict(checkpoint["architecture"])
        if (name := architecture.pop("name")) != cls.__name__:
            raise ValueError(f"{path} holds a {name}, not a {cls.__name__}")
        network = cls(**architecture)
        network.load_state_dict(checkpoint["model"])
        return network.eval()


def downsample(in_channels, out_channels):
    """Half the height and width."""
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


def upsample(in_channels, out_channels):
    """Twice the height and width."""
    return double(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.SiLU()


def double(in_channels, out_channels):
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=1
    )


def four_widths(name, channels):
    channels = tuple(channels)
    if len(channels) != 4 or any(type(c) is not int or c < 1 for c in channels):
        raise ValueError(f"{name} must be four positive whole numbers, got {channels}")
    return channels


def check_images(images, check_range):
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
        raise ValueError(f"RGB images must have shape N×3×32×32, got {shape_of(images)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point in [0, 1], got {images.dtype}: divide uint8 pixels by "
            "255"
        )
    if check_range and not torch.compiler.is_compiling() and len(images):
        low, high = (value.item() for value in torch.aminmax(images.detach()))
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"pixel values must lie in [0, 1], got [{low:.4g}, {high:.4g}]")


def shape_of(tensor):
    return "×".join(map(str, tensor.shape)) or "a scalar"
