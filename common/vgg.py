"""VGG16 through relu3_3: its weights, and the features that pictures are compared by."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.runtime import InputError, download_timeout, explain_errors, import_torchvision
from common.storage import fingerprint, load_checkpoint, refuse_other_weights

# VGG16's convolutions through relu3_3, as torchvision numbers its `features`.
VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14)
VGG_KEYS = [f"features.{i}.{kind}" for i in VGG_CONVOLUTIONS for kind in ("weight", "bias")]
VGG_LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGGFeatures(nn.Module):
    """Features of unit length, as in LPIPS (Zhang et al. 2018, arXiv:1801.03924): frozen VGG16.

        images, N×3×32×32 in [0, 1]  →  relu1_2 N×64×32×32, relu2_2 N×128×16×16, relu3_3 N×256×8×8

    The features of each position are divided by their length over channels, so that no layer's
    magnitude decides.

    Args:
        layers: VGG16's `features` through relu3_3, from `load_vgg16`.
        dtype: that the convolutions are computed in, whatever autocast says around them. The
            features are in fp32.
    """

    def __init__(self, layers, dtype=torch.float32):
        super().__init__()
        layers = layers.to(dtype, memory_format=torch.channels_last)
        self.layers = layers.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images):
        x = ((images - self.mean) / self.std).to(self.layers[0].weight.dtype)
        found = []
        with torch.autocast(images.device.type, enabled=False):
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i in VGG_LAYERS.values():
                    found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found


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
        with explain_errors(
            lambda reason: "the ImageNet weights of VGG16 could not be downloaded or read "
            f"({reason}): name a file that holds them with --vgg PATH, use --vgg random or --vgg "
            "none, or --demo"
        ), download_timeout():
            weights = models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                progress=True, check_hash=True, weights_only=True
            )
        description = "ImageNet, torchvision IMAGENET1K_V1"
    elif not Path(source).exists():
        raise InputError(
            f"there is no file {source}: name imagenet, random, none, or the path of a state dict "
            "of VGG16"
        )
    else:
        weights = load_checkpoint(source)
        description = f"from {source}"
    missing = [key for key in VGG_KEYS if key not in weights]
    if missing:
        raise InputError(
            f"{source} is not a VGG16 with torchvision's keys: {missing[0]} is missing"
        )
    with explain_errors(lambda reason: f"the weights in {source} are not VGG16's: {reason}"):
        weights = {key.removeprefix("features."): weights[key].float() for key in VGG_KEYS}
        refuse_other_weights(weights, features.state_dict())
        features.load_state_dict(weights, assign=True)
    return features, vgg_record(features, description)


def refuse_judge(judge_record, record):
    """Raise InputError if the VGG16 that judges, by its record, is that of the loss of a student
    with this record."""
    sha256 = judge_record["vgg_sha256"]
    if sha256 and sha256 == record.get("vgg_sha256"):
        raise InputError(
            "--judge holds the VGG16 weights of the student's own loss, which cannot judge it: "
            "name others, or --judge none"
        )


def vgg_record(features, description):
    return {"vgg_weights": description, "vgg_sha256": fingerprint(features)}
