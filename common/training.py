"""`fit` trains any objective: a module whose forward returns the named terms of a loss."""

import contextlib
import functools
import math
import time

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from common.data import shuffled_batches, to_float
from common.distributed import average, data_parallel, own_rows
from common.metrics import EVALUATION_BATCH, evaluate_vae, sampled_mse
from common.optimizer import make_optimizers, one_cycle
from common.runtime import (
    InputError,
    autocast,
    explain_errors,
    first_line,
    is_out_of_memory,
    progress_bar,
)
from common.storage import load_checkpoint

CALIBRATION_IMAGES = 5000  # training images that BatchNorm's statistics are taken from
READ_EVERY = 50  # steps between two readings of the loss, for which a GPU waits


class Objective(nn.Module):
    """What `fit` minimises. A subclass has the VAE that is trained as `network`, and

        forward(images, noise, *targets)   one batch → name → term, scalars
        weigh(terms)                       name → weight × term, which add up to the loss
    """

    def after_step(self, terms, step, steps):
        """What follows an optimiser step, the `step`th of `steps`, counted from 0."""

    def figures(self):
        """Further columns of metrics.csv at the end of an epoch: name → number."""
        return {}


def fit(objective, run, name, epochs, optimizer, learning_rate, targets=(), resume_from=None):
    """Train an objective on a run's images. A generator: after each epoch, and once before the
    first, it yields the state to save, plain data; `rows` in it are those of metrics.csv.

    Args:
        objective: an Objective; its parameters are on the run's device.
        run: a Run of runs.py: settings, device, precision, images.
        name: `teacher` or `student`.
        epochs: in all, those before `resume_from` included.
        optimizer: `adam` or `muon` (optimizer.py).
        learning_rate: at its peak.
        targets: tensors with a row for each training image, for the objective.
        resume_from: the file of a state to continue from.

    Raises InputError if the loss or a validation figure is not finite, and for a state that does
    not fit.
    """
    s, network, device = run.settings, objective.network, run.device
    network.check_range = False  # to_float makes the images; the check makes a GPU wait
    steps = len(run.images) // s.batch_size
    optimizers = make_optimizers(optimizer, objective, learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    order = torch.Generator().manual_seed(s.seed)  # of the images
    parts = {"optimizers": optimizers, "scaler": [scaler]}
    rows = restore(resume_from, objective, parts, order, device) if resume_from else []
    if len(rows) == epochs:
        print(f"The {name} is trained already, for all {epochs} epochs: nothing is left to do")
    yield save_state(name, objective, parts, order, device, rows)

    trained = data_parallel(objective, device)
    if s.compile and can_compile(device):
        trained = torch.compile(trained, mode="reduce-overhead" if device.type == "cuda" else None)
    desc = "teacher, stage 1 of 2" if name == "teacher" else name  # the time left is of one stage
    bar = progress_bar(total=epochs * steps, initial=len(rows) * steps, desc=desc, unit="step")
    with bar, explain_out_of_memory(s.batch_size):
        for epoch in range(len(rows) + 1, epochs + 1):
            start = time.perf_counter()
            network.train()
            sums = 0
            batches = shuffled_batches(len(run.images), s.batch_size, order).to(device)
            for step, index in enumerate(batches, start=1):
                done = (epoch - 1) * steps + step - 1
                lr = torch.tensor(learning_rate * one_cycle(done, epochs * steps, s.warmup))
                for o in optimizers:
                    o.param_groups[0]["lr"] = lr
                # Noise for the whole batch, so that an image gets the same in any process.
                noise = own_rows(torch.randn(len(index), network.latent_dim, device=device))
                index = own_rows(index)
                with autocast(device, run.precision):
                    images = to_float(run.images[index])
                    terms = trained(images, noise, *(target[index] for target in targets))
                parts_of_loss = objective.weigh(terms)
                loss = sum(parts_of_loss.values())

                for o in optimizers:
                    o.zero_grad()
                scaler.scale(loss).backward()
                for o in optimizers:
                    scaler.step(o)
                scaler.update()
                objective.after_step(terms, done, epochs * steps)

                sums += torch.stack([loss, *terms.values(), *parts_of_loss.values()]).detach()
                if step % READ_EVERY == 0 or step == steps:
                    mean = sums[0].item() / step
                    stop_unless_finite("loss", mean, name, epoch, run.precision)
                    bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{mean:.5f}", refresh=False)
                bar.update()
            ms_per_step = 1000 * (time.perf_counter() - start) / steps

            columns = ["loss", *terms, *(f"{term}_weighted" for term in parts_of_loss)]
            row = {"stage": name, "epoch": epoch}
            row |= dict(zip(columns, (average(sums) / steps).tolist()))
            row |= validate(network, run) | objective.figures()
            for what in ("val_mse", "kl_nats"):
                stop_unless_finite(what, row[what], name, epoch, run.precision)
            row["learning_rate"] = round(lr.item(), 9)
            row["ms_per_step"] = round(ms_per_step, 3)
            row["seconds"] = round(time.perf_counter() - start, 2)
            rows.append(row)
            bar.write(epoch_line(row, epochs, network.latent_dim, terms))
            yield save_state(name, objective, parts, order, device, rows)


@functools.cache  # both stages ask
def can_compile(device):
    """Whether torch.compile works here; prints why not, such as for want of a compiler."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as error:  # of a class for each compiler
        print(
            f"Steps are not compiled, since torch.compile does not work here ({first_line(error)})"
        )
        return False
    return True


@contextlib.contextmanager
def explain_out_of_memory(batch_size):
    """Raise InputError that names the batch size where memory runs out within the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory in training with batches of {batch_size} images; finished epochs are "
            f"saved: use a smaller --batch-size, or --device cpu ({first_line(error)})"
        ) from error


def stop_unless_finite(what, value, name, epoch, precision):
    """Raise InputError before a diverged state replaces the last good checkpoint."""
    if math.isfinite(value):
        return
    go_on = "" if precision == "fp32" else "continue from them with --resume --precision fp32, or "
    flag = "--teacher-learning-rate" if name == "teacher" else "--learning-rate"
    raise InputError(
        f"the {what} of the {name} became {value} in epoch {epoch}; the epochs before it are "
        f"saved: {go_on}start again with --overwrite and a lower {flag}"
    )


def epoch_line(row, epochs, latent_dim, terms):
    parts = "  ".join(f"{name} {row[name]:.5f}" for name in terms)
    line = (
        f"{row['stage']} {row['epoch']:3d}/{epochs} | loss {row['loss']:.5f} | {parts}"
        f" | val MSE {row['val_mse']:.5f}  PSNR {row['val_psnr']:.2f} dB | "
        f"KL {row['kl_nats']:.1f} nats, {row['kl_per_latent']:.3f} per latent, "
        f"{row['active_dims']} of {latent_dim} active"
    )
    if "projected_std" in row:
        line += f" | projected std {row['projected_std']:.3f}"
    return line + f" | {row['seconds']:.0f} s"


# --- Validation ---


def validate(network, run):
    """Recalibrate BatchNorm and measure on the held-out images: columns of metrics.csv."""
    calibrate(
        network, run.images[:CALIBRATION_IMAGES], run.precision,
        with_samples=run.settings.calibration == "both",
    )
    row = evaluate_vae(network, run.val_images, run.precision)
    row = {"val_mse": row.pop("mse"), "val_psnr": row.pop("psnr")} | row
    row["val_sampled_mse"] = sampled_mse(network, run.val_images, run.precision)
    return row


@torch.no_grad()
def calibrate(model, images, precision, with_samples):
    """Set the statistics of all BatchNorm layers to those of uint8 images and of their codes.

    A running mean over the last ten or so batches is noisy, by up to 3% of the error; statistics
    over many images are not: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    arXiv:2105.07576, section 3. Those of the decoder are of what it decodes in use, means, or of
    means and samples together, as in training. With 64 latents at 87 nats the two hardly differ;
    with more latents at that rate, means vary much less than samples, and the second is better, by
    a tenth of the error with 128. Training uses the statistics of each batch, and is not affected.
    Leaves the model in evaluation mode, and the random state as it was.
    """
    model.eval()
    chunks = images.split(EVALUATION_BATCH)
    generator = torch.Generator().manual_seed(0)

    def decoder_inputs():
        for chunk in chunks:
            codes, logvar = model.encode(to_float(chunk))
            if with_samples:
                noise = torch.randn(codes.shape, generator=generator).to(codes.device)
                codes = torch.cat([codes, model.reparameterize(codes, logvar, noise)])
            yield model.decoder_input(codes).view(len(codes), -1, 2, 2)

    with autocast(images.device, precision):
        update_bn(map(to_float, chunks), model.encoder)
        update_bn(decoder_inputs(), model.decoder)  # whose statistics depend on the encoder's


# --- Resuming ---


def save_state(name, objective, parts, order, device, rows):
    """Everything needed to resume, as plain data."""
    random = {"cpu": torch.get_rng_state(), "order": order.get_state()}
    if device.type != "cpu":
        random[device.type] = getattr(torch, device.type).get_rng_state()
    # The network stands alone, for those who load it; VGG16 never changes.
    rest = {key: value for key, value in objective.state_dict().items()
            if not key.startswith(("network.", "vgg."))}
    return {
        "stage": name,
        "architecture": objective.network.architecture,
        "epoch": len(rows),
        "model": objective.network.state_dict(),
        "objective": rest,
        **{what: [part.state_dict() for part in several] for what, several in parts.items()},
        "random": random,
        "rows": list(rows),
    }


def restore(path, objective, parts, order, device):
    """Take up what `save_state` returned. Returns its rows; raises InputError where it cannot."""
    state = load_checkpoint(path)
    with explain_errors(
        lambda reason: f"{path} cannot be resumed from ({reason}): --overwrite starts again"
    ):
        objective.network.load_state_dict(state["model"])
        objective.load_state_dict(state["objective"], strict=False)
        for what, several in parts.items():
            for part, saved in zip(several, state[what]):
                if saved:  # a scaler's is empty, unless the precision was fp16
                    part.load_state_dict(saved)
        torch.set_rng_state(state["random"]["cpu"])
        order.set_state(state["random"]["order"])
        if device.type in state["random"] and device.type != "cpu":
            getattr(torch, device.type).set_rng_state(state["random"][device.type])
        rows = state["rows"]
    print(f"Resuming the {state['stage']} after epoch {len(rows)}, from {path}")
    return rows
