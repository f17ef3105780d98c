"""A student as a model hub takes it: weights in safetensors, and a model card."""

import json
from pathlib import Path

from common.models import count_parameters
from common.onnx_models import PORTS

CARD = """---
license: {licence}
library_name: pytorch
tags: [vae, image-compression, knowledge-distillation]
{datasets}metrics: [mse]
---

# {name}, {latents} latents

A variational autoencoder of {parameters:,} parameters for RGB images of 32×32 pixels: an image
becomes {latents} numbers, and these an image again.

| {images:,} test images | |
|---|---|
| images | {data} |
| MSE of pixels in [0, 1], decoded from the mean | {mse:.5f} |
| KL of an image from the prior | {nats:.1f} nats |

{training}

```python
from safetensors.torch import load_file
from tiny_vae_32 import TinyVAE32     # one file, which needs PyTorch alone

vae = TinyVAE32({arguments})
vae.load_state_dict(load_file("tinyvae.safetensors"))
vae.eval()
mu, logvar = vae.encode(images)       # float, N×3×32×32 in [0, 1]
reconstruction = vae.decode(mu)
```

Outlines are soft, textures are lost and colours are duller than in the original. It is not meant
for recognising or assessing anything in an image.
"""


def hub_files(vae, record, figures, test_images, data, licence):
    """name → bytes.

    Args:
        vae: a TinyVAE32.
        record: of its training, which may be empty.
        figures: of the test images: `mse` and `kl_nats`.
        test_images: how many these are.
        data: their source.
        licence: of the weights, as hubs name it.
    """
    from safetensors.torch import save

    trained_on = Path(str(record.get("data", "unknown images"))).name  # without the user's folders
    training, datasets = "How it was trained is not recorded.", ""
    if record:
        training = f"Trained for {record['epochs']} epochs on {record['train_images']:,} images"
        if trained_on != "none":
            training += f" of {trained_on}"
            datasets = f"datasets: [{json.dumps(trained_on)}]\n"
        if made := record.get("made_images"):
            training += f", {made:,} of them made by its teacher"
        training += "."
    architecture = dict(vae.architecture)
    name = architecture.pop("name")
    card = CARD.format(
        licence=json.dumps(licence), datasets=datasets, name=name, latents=vae.latent_dim,
        parameters=count_parameters(vae), images=test_images, data=Path(data).name,
        mse=figures["mse"], nats=figures["kl_nats"], training=training,
        arguments=", ".join(f"{key}={value}" for key, value in architecture.items()),
    )
    metadata = {
        "format": "pt",
        "architecture": json.dumps(vae.architecture),
        "images": PORTS["image"],
        "trained_on": trained_on,
        "licence": licence,
    }
    weights = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    return {"tinyvae.safetensors": save(weights, metadata), "README.md": card.encode()}
