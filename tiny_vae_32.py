"""TinyVAE32, the student: 32×32 RGB → 64 latents → 32×32 RGB. 294,403 parameters, 1.1 MiB.

    from tiny_vae_32 import TinyVAE32
    student = TinyVAE32().eval()
    reconstruction, mu, logvar = student(images)      # images: N×3×32×32 in [0, 1]
"""

from torch import nn

from vae import VAE, check_channels


class TinyVAE32(VAE):
    """The student. Every layer's width is an argument, so a pruned variant is the same class.

    Args:
        latent_dim: numbers in the code.
        encoder_channels: output channels of the four encoder stages.
        decoder_channels: channels that enter each of the four decoder stages.
    """

    def __init__(
        self,
        latent_dim=64,
        encoder_channels=(16, 32, 64, 128),
        decoder_channels=(128, 64, 32, 16),
    ):
        super().__init__()
        e1, e2, e3, e4 = check_channels("encoder_channels", encoder_channels)
        d1, d2, d3, d4 = check_channels("decoder_channels", decoder_channels)
        self.latent_dim = latent_dim
        self.architecture = {
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


def downsample(in_channels, out_channels):
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


def upsample(in_channels, out_channels):
    return double(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.SiLU()


def double(in_channels, out_channels):
    """Twice the height and width."""
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=1
    )
