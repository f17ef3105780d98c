"""StandardVAE, the teacher: 32×32 RGB → 512 latents → 32×32 RGB. 8,664,195 parameters, 33 MiB.

    from standard_vae import StandardVAE
    teacher = StandardVAE().eval()
    reconstruction, mu, logvar = teacher(images)      # images: N×3×32×32 in [0, 1]
"""

from torch import nn

from vae import VAE, check_channels


class StandardVAE(VAE):
    """The teacher. Channels and latent size are arguments; the defaults are the full-size model.

    Args:
        latent_dim: numbers in the code.
        channels: output channels of the four encoder stages; the decoder mirrors them.
    """

    def __init__(self, latent_dim=512, channels=(64, 128, 256, 512)):
        super().__init__()
        c1, c2, c3, c4 = check_channels("channels", channels)
        self.latent_dim = latent_dim
        self.architecture = {
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


def downsample(in_channels, out_channels):
    return (
        nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


def upsample(in_channels, out_channels):
    return (
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )
