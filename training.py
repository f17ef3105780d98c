"""The bookkeeping of a training stage: epochs, batches, averages, validation, state to resume from.

What is minimised, and the loops, are in distill_tinyvae.py; teacher and student both go by

    for _ in stage.epochs():
        for _ in stage.steps():
            step()
        stage.validate()
"""

import math
import time

import torch

from cuda_graph import StepGraph
from data import shuffled_batches, to_float
from distributed import average, copy_from_first, own_rows, share_batch_norm, world_size
from metrics import EVALUATION_BATCH, effective_rank, evaluate_vae, sampled_mse
from optimizer import OneCycleOptimizer
from runtime import InputError, autocast, progress_bar
from storage import write_json
from vae import PIXEL_VALUES

CALIBRATION_IMAGES = 5000  # training images that BatchNorm's statistics are taken from
# Of `hold_rate`: how fast the KL's factor follows, in e-folds a stage at a rate twice too high, and
# the fraction of the steps before it does: earlier, the rate is far from where it will settle.
RATE_SPEED, RATE_START = 40, 0.2


class Stage:
    """A model in training, and everything needed to resume after an epoch.

    Args:
        name: `teacher` or `student`.
        model: the VAE to train, on the run's device.
        epochs: how many this stage has in all.
        optimizer: `adam`, or `muon` for the model's matrices and kernels, with Adam for the rest.
        learning_rate: its peak.
        run: a Run of runs.py: settings, precision, images.
        projection: trained with the model, if there is one.
        val_teacher_mu: the teacher's mu of the held-out images, to watch the projection on.
    """

    def __init__(
        self, name, model, epochs, optimizer, learning_rate, run, projection=None,
        val_teacher_mu=None,
    ):
        settings = run.settings
        self.name, self.model, self.epoch_count, self.run = name, model, epochs, run
        self.projection, self.val_teacher_mu = projection, val_teacher_mu
        self.model.check_range = False  # to_float makes the images; the check makes a GPU wait
        share_batch_norm(model)
        copy_from_first(model)
        if projection is not None:
            copy_from_first(projection)
        self.steps_per_epoch = len(run.images) // settings.batch_size
        self.is_graphed = settings.graph and run.device.type == "cuda" and world_size() == 1
        parameters, matrices = list(model.parameters()), []
        if optimizer == "muon":
            matrices = [parameter for parameter in parameters if parameter.ndim > 1]
            parameters = [parameter for parameter in parameters if parameter.ndim == 1]
        if projection is not None:  # has a geometry of its own
            parameters += projection.parameters()
        steps = epochs * self.steps_per_epoch
        self.optimizer = OneCycleOptimizer(
            parameters,
            matrices,
            learning_rate,
            settings.warmup,
            steps,
            run.device,
            run.precision,
            self.is_graphed,
        )
        self.order = torch.Generator().manual_seed(settings.seed)  # of the images
        self.rows = []  # of metrics.csv, one an epoch
        # On the device, so that a step needs nothing from outside: see cuda_graph.py.
        size = self.steps_per_epoch, settings.batch_size
        self.batches = torch.zeros(size, dtype=torch.long, device=run.device)  # of this epoch
        self.batch, self.step_number = torch.zeros(2, 1, dtype=torch.long, device=run.device)
        done = [step / steps for step in range(steps)]
        self.done = torch.tensor(done, device=run.device)  # fraction of the steps, at each step
        self.progress = torch.zeros((), device=run.device)  # the same, of the current step
        self.kl_factor = torch.ones((), device=run.device)  # moved by hold_rate
        self.logged, self.sums = (), None

    def graphed(self, step):
        """The step, as a CUDA graph where the run asks for it."""
        return StepGraph(step, self.record_failed_graph) if self.is_graphed else step

    def record_failed_graph(self, reason):
        """Say and record that the run goes on without a CUDA graph."""
        self.bar.write(
            f"Steps of the {self.name} are launched one by one, since recording one as a CUDA "
            f"graph failed ({reason})"
        )
        self.run.record["graph_failed"] = reason
        write_json(self.run.output("config.json"), self.run.record)

    # --- What a step calls ---

    def next_batch(self):
        """Images in [0, 1], noise for their latents, and their indices; sets the learning rate.

        With several processes, this one's part of the batch.
        """
        index = self.batches.index_select(0, self.batch)[0]
        self.optimizer.set_step(self.step_number)
        self.progress.copy_(self.done.index_select(0, self.step_number)[0])
        self.batch += 1
        self.step_number += 1
        # Noise for the whole batch, so that each image meets the same whoever has it.
        noise = torch.randn(len(index), self.model.latent_dim, device=index.device)
        index = own_rows(index)
        return to_float(self.run.images[index]), own_rows(noise), index

    def hold_rate(self, kl, nats):
        """Move `kl_factor`, which multiplies the KL's weight, so that the rate becomes `nats`.

        The integral part of the controller of Shao et al. 2020, "ControlVAE", arXiv:2004.05988, on
        the logarithm of the weight.

        Args:
            kl: `kl_loss` of this step's images.
            nats: the KL of an image to be held.
        """
        kl = kl.detach().clone()
        average([kl])
        excess = (kl * PIXEL_VALUES / nats - 1).clamp_max(1)  # a KL is not negative: at least −1
        speed = RATE_SPEED / len(self.done) * (self.progress >= RATE_START)
        self.kl_factor *= torch.exp(speed * excess)

    def log(self, loss, terms, weighted):
        """Add a step's loss, its terms and their weighted parts to the epoch's averages.

        Terms that are no tensors are not in use and left out.
        """
        used = [name for name, value in terms.items() if isinstance(value, torch.Tensor)]
        self.logged = ("loss", *used, *(f"{name}_weighted" for name in used))
        values = [loss, *(terms[name] for name in used), *(weighted[name] for name in used)]
        values = torch.stack(values).detach()
        if self.sums is None:
            self.sums = torch.zeros_like(values)
        self.sums += values

    # --- The loops ---

    def epochs(self):
        """Number each epoch that is left, from 1, and show a progress bar over their steps."""
        self.bar = progress_bar(
            total=self.epoch_count * self.steps_per_epoch,
            initial=len(self.rows) * self.steps_per_epoch,
            desc=self.name,
            unit="step",
        )
        with self.bar:
            while len(self.rows) < self.epoch_count:
                yield len(self.rows) + 1

    def steps(self):
        """Yield once for each step of an epoch. Raises InputError if the loss is not finite."""
        self.model.train()
        self.start = time.perf_counter()
        count = len(self.run.images)
        self.batches.copy_(shuffled_batches(count, self.run.settings.batch_size, self.order))
        self.batch.zero_()
        self.step_number.fill_(len(self.rows) * self.steps_per_epoch)
        if self.sums is not None:
            self.sums.zero_()
        for i in range(self.steps_per_epoch):
            yield
            is_last = i == self.steps_per_epoch - 1
            if self.run.device.type == "cpu" or is_last:  # reading it makes a GPU wait
                loss = self.sums[0].item() / (i + 1)
                self.stop_unless_finite("loss", loss)
                epoch = f"{len(self.rows) + 1}/{self.epoch_count}"
                self.bar.set_postfix(epoch=epoch, loss=f"{loss:.5f}", refresh=False)
            self.bar.update()
        self.step_seconds = (time.perf_counter() - self.start) / self.steps_per_epoch

    def validate(self):
        """End an epoch: recalibrate BatchNorm, measure on the held-out images, print, keep the row.

        Raises InputError if a figure is not finite.
        """
        means = self.sums / self.steps_per_epoch
        average([means])
        row = {"stage": self.name, "epoch": len(self.rows) + 1}
        row |= dict(zip(self.logged, means.tolist()))
        images = self.run.images[:CALIBRATION_IMAGES]
        calibrate(self.model, images, self.run.precision, self.run.settings.calibration == "both")
        found = evaluate_vae(self.model, self.run.val_images, self.run.precision)
        for what in ("mse", "kl_nats"):
            self.stop_unless_finite(f"validation {what}", found[what])
        row["val_mse"], row["val_psnr"] = found.pop("mse"), found.pop("psnr")
        row["val_sampled_mse"] = sampled_mse(self.model, self.run.val_images, self.run.precision)
        row |= found
        projected_rank = None
        if self.val_teacher_mu is not None:
            with torch.no_grad():
                projected = self.projection(self.val_teacher_mu)
            row["projected_std"] = projected.std(0, correction=0).mean().item()
            projected_rank = effective_rank(projected)
        row["learning_rate"] = round(self.optimizer.learning_rate.item(), 9)  # it is float32
        row["ms_per_step"] = round(1000 * self.step_seconds, 3)
        row["seconds"] = round(time.perf_counter() - self.start, 2)
        self.rows.append(row)
        self.bar.write(self.epoch_line(row, projected_rank))

    def stop_unless_finite(self, what, value):
        """Raise InputError before a state that is lost replaces the last good one."""
        if not math.isfinite(value):
            raise InputError(
                f"the {what} of the {self.name} became {value} in epoch {len(self.rows) + 1}; the "
                "epochs before it are saved: continue from them with --resume --precision fp32, or "
                "start again with --overwrite and a lower --learning-rate"
            )

    def epoch_line(self, row, projected_rank):
        names = [name for name in self.logged if f"{name}_weighted" in row]
        terms = "  ".join(f"{name} {row[name]:.5f}" for name in names)
        line = (
            f"{self.name} {row['epoch']:3d}/{self.epoch_count} | loss {row['loss']:.5f} | {terms}"
            f" | val MSE {row['val_mse']:.5f}  PSNR {row['val_psnr']:.2f} dB | "
            f"KL {row['kl_nats']:.1f} nats, {row['kl_per_latent']:.3f} per latent, "
            f"{row['active_dims']} of {self.model.latent_dim} active"
        )
        if projected_rank is not None:
            line += f" | projected std {row['projected_std']:.3f}, rank {projected_rank:.1f}"
        return line + f" | {row['seconds']:.0f} s"

    # --- Resuming ---

    def state(self):
        """Everything needed to resume, as plain data."""
        random = {"cpu": torch.get_rng_state(), "order": self.order.get_state()}
        device = self.run.device.type
        if device in ("cuda", "mps"):
            random[device] = getattr(torch, device).get_rng_state()
        return {
            "stage": self.name,
            "architecture": self.model.architecture,
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "projection": self.projection.state_dict() if self.projection else {},
            **self.optimizer.state_dict(),
            "kl_factor": self.kl_factor,
            "random": random,
            "rows": self.rows,
        }

    def load_state(self, state):
        """Take up what `state` returned. Raises KeyError or RuntimeError where it does not fit."""
        self.model.load_state_dict(state["model"])
        if self.projection:
            self.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state)
        self.kl_factor.copy_(state["kl_factor"])
        torch.set_rng_state(state["random"]["cpu"])
        self.order.set_state(state["random"]["order"])
        device = self.run.device.type
        if device in state["random"] and device != "cpu":
            getattr(torch, device).set_rng_state(state["random"][device])
        self.rows = state["rows"]


@torch.no_grad()
def calibrate(model, images, precision, with_samples=False):
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
    generator = torch.Generator().manual_seed(0)
    for part in (model.encoder, model.decoder):  # the decoder's depend on the encoder's
        layers = [layer for layer in part if hasattr(layer, "running_mean")]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over batches
            layer.train()
        for chunk in images.split(EVALUATION_BATCH):
            with autocast(images.device, precision):
                mu, logvar = model.encode(to_float(chunk))
                if part is model.decoder:
                    codes = mu
                    if with_samples:
                        noise = torch.randn(mu.shape, generator=generator).to(mu.device)
                        codes = torch.cat([mu, model.reparameterize(mu, logvar, noise)])
                    model.decode_logits(codes)
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
            layer.eval()
