"""A teacher that is no StandardVAE: a VAE of yours, of pythae, of diffusers (docs/own-teacher.md).

`load` is the place to edit. All scripts load their teacher through it.
"""

import torch
from torch import nn

from common.data import IMAGE_SHAPE
from common.runtime import InputError, explain_errors
from standard_vae import StandardVAE

LOGIT_EPSILON = 1e-3  # pixels end this far from 0 and 1, where logits would be infinite


def load(path):
    """The teacher of `--teacher PATH`, as an OwnTeacher; None for a checkpoint of this project,
    such as the teacher that stage 1 trains."""
    # --- Your teacher: build it from `path`, and return OwnTeacher(network, encode, decode) ---
    return None


class OwnTeacher(nn.Module):
    """Any VAE of 32×32 images, with the methods of a StandardVAE.

    Args:
        network: the module, whose weights are moved to the device and stay as they are.
        encode: images, N×3×32×32 in [0, 1] → mu and logvar of q(z|x), N×D or N×C×H×W each. Of an
            autoencoder without a variance, zeros in place of logvar.
        decode: latents of that shape → images, N×3×32×32 in [0, 1].

    Maps are flattened: the teacher's code has C·H·W latents. Raises InputError where encode and
    decode do not keep to this.
    """

    def __init__(self, network, encode, decode):
        super().__init__()
        self.network, self.their_encode, self.their_decode = network.eval(), encode, decode
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        ends = torch.stack([torch.zeros(IMAGE_SHAPE), torch.ones(IMAGE_SHAPE)])  # black, white
        with torch.no_grad():
            mu, _ = self.encode(ends.to(device))
            self.latent_dim = mu.shape[1]
            shown = self.decode_unclamped(mu)
        low, high = shown.min().item(), shown.max().item()
        if not (low > -0.5 and high < 1.5):  # also true of NaN; a little beyond is clamped
            refuse("decode", f"returns pixels in [{low:.3g}, {high:.3g}], not in [0, 1]")
        self.architecture = {"name": type(network).__name__, "latent_dim": self.latent_dim}

    def encode(self, images):
        code = attempt("encode", self.their_encode, images)
        if not isinstance(code, tuple) or len(code) != 2:
            refuse("encode", f"returns a {type(code).__name__}, not mu and logvar")
        for name, part in zip(("mu", "logvar"), code):
            if not isinstance(part, torch.Tensor) or part.ndim < 2 or len(part) != len(images):
                refuse("encode", f"returns as {name} what is no tensor of {len(images)} codes")
            if not part.isfinite().all():
                refuse("encode", f"returns {name} with NaN or infinity")
        if code[0].shape != code[1].shape:
            refuse("encode", "returns mu and logvar of different shapes")
        self.shape = code[0].shape[1:]
        return tuple(part.flatten(1) for part in code)

    def decode(self, z):
        return self.decode_unclamped(z).clamp(0, 1)

    def decode_unclamped(self, z):
        images = attempt("decode", self.their_decode, z.unflatten(1, self.shape))
        is_tensor = isinstance(images, torch.Tensor)
        if not is_tensor or images.shape != (len(z), *IMAGE_SHAPE):
            what = tuple(images.shape) if is_tensor else f"a {type(images).__name__}"
            refuse("decode", f"returns {what}, not a tensor N×3×32×32")
        return images

    def decode_logits(self, z):
        return torch.logit(self.decode(z).float(), LOGIT_EPSILON)

    reparameterize = staticmethod(StandardVAE.reparameterize)


def attempt(name, function, argument):
    with explain_errors(
        lambda reason: f"your teacher's {name} does not take {tuple(argument.shape)} ({reason}): "
        "see OwnTeacher in common/own_teacher.py"
    ):
        return function(argument)


def refuse(name, what):
    raise InputError(f"your teacher's {name} {what}: see OwnTeacher in common/own_teacher.py")
