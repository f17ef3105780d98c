"""Weights of the two networks as other programs save them: a bare state dict, one in a dictionary,
or with prefixes before the names, such as `module.` of DataParallel."""

import torch

LAYERS = (0, 3, 6, 9)  # of the four convolutions of an encoder and a decoder
KERNELS = {3: "TinyVAE32", 4: "StandardVAE"}  # their size tells the networks apart


def adopt(checkpoint, expected=None):
    """A checkpoint of this project's form, with `architecture` and `model`.

    Args:
        checkpoint: what was read from the file, a dictionary.
        expected: name of the network that is needed; None takes either.

    Returns it, and in words where in the file it was. Raises ValueError where there is no network
    in it, or more than one.
    """
    networks = []
    for where, weights in find_weights(checkpoint):
        try:
            architecture = architecture_of(weights)
        except (KeyError, IndexError, TypeError):
            continue
        if expected in (None, architecture["name"]):
            networks.append((where, {"architecture": architecture, "model": weights}))
    if len(networks) != 1:
        if not networks:
            raise ValueError(f"there is no {expected or 'network'} in it")
        names = ", ".join(where for where, _ in networks)
        raise ValueError(f"it holds several networks, {names}: save one of them alone")
    return networks[0][1], networks[0][0]


def find_weights(checkpoint, where=""):
    """Yields the name of, and the tensors in, each part of nested dictionaries that looks like a
    state dict; the tensors under their names without prefix."""
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            yield from find_weights(value, f"{where}{key}/")
        elif str(key).endswith("fc_mu.weight"):
            prefix = key.removesuffix("fc_mu.weight")
            yield where + prefix, {
                name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()
                if isinstance(tensor, torch.Tensor) and str(name).startswith(prefix)
            }


def architecture_of(weights):
    """The description that a network's constructor takes, from the shapes of its weights."""
    name = KERNELS[weights["encoder.0.weight"].shape[3]]
    encoder, decoder = (
        [weights[f"{side}.{layer}.weight"].shape[0] for layer in LAYERS]
        for side in ("encoder", "decoder")
    )
    channels = {"encoder_channels": encoder, "decoder_channels": decoder}
    if name == "StandardVAE":
        channels = {"channels": encoder}
    return {"name": name, "latent_dim": len(weights["fc_mu.weight"])} | channels
