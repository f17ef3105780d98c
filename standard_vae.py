"""StandardVAE, the teacher: 32×32 RGB → 512 latents → 32×32 RGB. 8,664,195 parameters, 33 MiB.

    teacher = StandardVAE.load("checkpoints/teacher_cifar10.pth")
    reconstruction, mu, logvar = teacher(images)      # images: N×3×32×32 in [0, 1]
    images = teacher.sample(16)                       # N×3×32×32 in [0, 1]

This file needs PyTorch and nothing else.
"""

import torch
from torch import nn


class StandardVAE(nn.Module):
    """A convolutional variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114).

    Args:
        latent_dim: numbers in the code.
        channels: output channels of the four encoder stages; the decoder mirrors them.

    Raises ValueError for channels that are not four positive whole numbers.
    """

    # Reading the range of a batch makes an accelerator wait for it. Turn it off only where the
    # images are known to be in [0, 1].
    check_range = True

    def __init__(self, latent_dim=512, channels=(64, 128, 256, 512)):
        super().__init__()
        c1, c2, c3, c4 = four_widths("channels", channels)
        self.latent_dim = latent_dim
        self.architecture = {                        # plain data, enough to build it again
            "name": "StandardVAE",
            "latent_dim": latent_dim,
            "channels": [c1, c2, c3, c4],
        }

        self.encoder = nn.Sequential(                # N×3×32×32, pixels in [0, 1]
            *downsample(3, c1),                      # N×64×16×16
            *downsample(c1, c2),                     # N×128×8×8
            *downsample(c2, c3),                     # N×256×4×4
            *downsample(c3, c4),                     # N×512×2×2
        )
        self.fc_mu = nn.Linear(c4 * 4, latent_dim)       # N×2048 → N×512
        self.fc_logvar = nn.Linear(c4 * 4, latent_dim)   # N×2048 → N×512

        self.decoder_input = nn.Linear(latent_dim, c4 * 4)  # N×512 → N×2048, seen as N×512×2×2
        self.decoder = nn.Sequential(
            *upsample(c4, c3),                       # N×256×4×4
            *upsample(c3, c2),                       # N×128×8×8
            *upsample(c2, c1),                       # N×64×16×16
            nn.ConvTranspose2d(c1, 3, 4, stride=2, padding=1),  # N×3×32×32, logits
        )

    def encode(self, images):
        """Images, N×3×32×32 in [0, 1] → mu and logvar of q(z|x), N×512 each.

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
        """Latents, N×512 → N×3×32×32 unbounded logits. Raises ValueError for another shape."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"latents must have shape N×{self.latent_dim}, got {shape_of(z)}")
        features = self.decoder_input(z)
        return self.decoder(features.view(z.shape[0], -1, 2, 2))

    def decode(self, z):
        """Latents, N×512 → images, N×3×32×32 in [0, 1]."""
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
        nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


def upsample(in_channels, out_channels):
    """Twice the height and width."""
    return (
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
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
