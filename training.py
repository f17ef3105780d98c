"""One stage of training: the step, the epoch, the state that resuming needs.

Teacher and student go through the same code; what differs is the criterion and its targets.
"""

import gc
import math
import time

import torch

from data import shuffled_batches, to_float
from distributed import (
    average,
    average_gradients,
    gather_rows,
    my_share,
    share_batch_norm,
    start_equal,
    world_size,
)
from losses import TERMS
from metrics import EVALUATION_BATCH, effective_rank, evaluate_vae
from runtime import InputError, autocast, progress_bar

STEPS_BEFORE_CAPTURE = 5  # of a stage, on CUDA
CALIBRATION_IMAGES = 5000  # training images that BatchNorm's statistics are taken from


class Stage:
    """What one stage trains, and everything needed to go on from the end of an epoch.

    Args:
        name: `teacher` or `student`.
        model: the VAE to train.
        criterion: a Criterion of losses.py. Parameters of its own, such as the projection's, are
            trained with the model's.
        targets: tensors with a row for each training image, handed to the criterion.
        epochs: how many this stage has in all.
        job: has `settings`, `precision`, and the uint8 images on the device: `images` to train
            on, `val_images` held out.
        val_teacher_mu: the teacher's mu of the held-out images, to watch the projection on.
    """

    def __init__(self, name, model, criterion, targets, epochs, job, val_teacher_mu=None):
        settings = job.settings
        self.name, self.epochs, self.precision = name, epochs, job.precision
        self.device = job.images.device
        self.images, self.targets = job.images, targets
        self.val_images, self.val_teacher_mu = job.val_images, val_teacher_mu
        share_batch_norm(model)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.model.check_range = False  # to_float makes the images; looking would stall a GPU
        self.criterion = criterion.to(self.device)
        start_equal(self.model, self.criterion)
        self.batch_size = settings.batch_size
        self.steps_per_epoch = len(self.images) // self.batch_size
        self.steps = epochs * self.steps_per_epoch
        self.trained = [*model.parameters(), *criterion.parameters()]
        self.trained = [parameter for parameter in self.trained if parameter.requires_grad]
        self.peak, self.warmup = settings.learning_rate, settings.warmup
        self.is_graphed = settings.graph and self.device.type == "cuda" and world_size() == 1
        self.learning_rate = torch.tensor(self.peak, device=self.device)  # set before each step
        self.optimizer = torch.optim.Adam(
            self.trained,
            lr=self.learning_rate,
            fused=True,
            capturable=self.is_graphed,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.order = torch.Generator().manual_seed(settings.seed)  # of the images
        self.rows = []  # of metrics.csv, one an epoch
        self.step = StepGraph(self.train_step) if self.is_graphed else self.train_step

    def set_schedule(self, step):
        """Learning rate and the criterion's progress at a step of the stage, counted from 0.

        One cycle, after Smith & Topin 2017, arXiv:1708.07120: linear warm-up, cosine to zero.
        """
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            share = (step + 1) / warmup
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        self.learning_rate.fill_(self.peak * share)
        self.criterion.progress.fill_(step / self.steps)

    def train_step(self, index):
        """One step on the images of these indices. Returns the loss and its terms, detached.

        With several processes, the terms are those of this process's share of the images.
        """
        # Noise for the whole batch, so that each image meets the same whoever has it.
        epsilon = torch.randn(len(index), self.model.latent_dim, device=self.device)
        index, epsilon = my_share(index), my_share(epsilon)
        images = to_float(self.images[index])
        targets = [target[index] for target in self.targets]
        with autocast(self.device, self.precision):
            mu, logvar = self.model.encode(images)
            mu, logvar = mu.float(), logvar.float()
            z, mean_logits = self.model.reparameterize(mu, logvar, epsilon), None
            if self.criterion.needs_mean:  # one pass, so that BatchNorm sees what both look like
                both = self.model.decode_logits(torch.cat([z, mu])).float()
                logits, mean_logits = both.chunk(2)
            else:
                logits = self.model.decode_logits(z).float()
            total, terms = self.criterion(images, logits, mean_logits, mu, logvar, *targets)
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        average_gradients(self.trained)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.criterion.after_step()
        return {"loss": total.detach()} | terms

    def train_epoch(self, bar):
        """One pass over the images. Returns the mean loss and terms."""
        self.model.train()
        batches = shuffled_batches(len(self.images), self.batch_size, self.order).to(self.device)
        first_step = len(self.rows) * self.steps_per_epoch
        sums = 0
        for i, index in enumerate(batches):
            self.set_schedule(first_step + i)
            found = self.step(index)
            sums = sums + torch.stack(list(found.values()))
            if self.device.type == "cpu" or i == len(batches) - 1:  # reading makes a GPU wait
                loss = sums[0].item() / (i + 1)
                self.stop_unless_finite("loss", loss)
                epoch = f"{len(self.rows) + 1}/{self.epochs}"
                bar.set_postfix(epoch=epoch, loss=f"{loss:.5f}", refresh=False)
            bar.update()
        return dict(zip(found, average(sums / len(batches)).tolist()))

    def stop_unless_finite(self, what, value):
        """Raise InputError before a state that is lost replaces the last good one."""
        if not math.isfinite(value):
            raise InputError(
                f"the {what} of the {self.name} became {value} in epoch {len(self.rows) + 1}; the "
                "epochs before it are saved: go on from them with --resume --precision fp32, or "
                "start anew with --overwrite and a lower --learning-rate"
            )

    def validate(self):
        """The validation columns of a row, and the effective rank of the projection, if any."""
        calibrate(self.model, self.images[:CALIBRATION_IMAGES], self.precision)
        found = evaluate_vae(self.model, self.val_images, self.precision)
        for what in ("mse", "kl_nats"):
            self.stop_unless_finite(f"validation {what}", found[what])
        found["val_mse"], found["val_psnr"] = found.pop("mse"), found.pop("psnr")
        rank = None
        if self.val_teacher_mu is not None:
            with torch.no_grad():
                projected = self.criterion.projection(self.val_teacher_mu)
            found["projected_std"] = projected.std(0, correction=0).mean().item()
            rank = effective_rank(projected)
        return found, rank

    def run(self):
        """Train from where the stage stands to its last epoch; yield after every epoch.

        Raises InputError if a loss or a validation figure is no longer a number.
        """
        bar = progress_bar(
            total=self.steps,
            initial=len(self.rows) * self.steps_per_epoch,
            desc=self.name,
            unit="step",
        )
        with bar:
            while len(self.rows) < self.epochs:
                start = time.perf_counter()
                row = {"stage": self.name, "epoch": len(self.rows) + 1} | self.train_epoch(bar)
                found, rank = self.validate()
                row |= found
                row["learning_rate"] = round(self.learning_rate.item(), 9)  # it is float32
                row["seconds"] = round(time.perf_counter() - start, 2)
                self.rows.append(row)
                bar.write(self.epoch_line(row, rank))
                yield

    def epoch_line(self, row, rank):
        terms = "  ".join(f"{term} {row[term]:.5f}" for term in TERMS if term in row)
        line = (
            f"{self.name} {row['epoch']:3d}/{self.epochs} | loss {row['loss']:.5f} | {terms} | "
            f"val MSE {row['val_mse']:.5f}  PSNR {row['val_psnr']:.2f} dB | "
            f"KL {row['kl_nats']:.1f} nats, {row['kl_per_latent']:.3f} a latent, "
            f"{row['active_dims']} of {self.model.latent_dim} active"
        )
        if rank is not None:
            line += f" | projected std {row['projected_std']:.3f}, rank {rank:.1f}"
        return line + f" | {row['seconds']:.0f} s"

    def state(self):
        """Everything that going on needs, as plain data."""
        random = {"cpu": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device.type in ("cuda", "mps"):
            random[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        return {
            "stage": self.name,
            "architecture": self.model.architecture,
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "criterion": trained_state(self.criterion),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "rows": self.rows,
        }

    def load_state(self, state):
        """Take up what `state` returned; raises KeyError or RuntimeError where it does not fit."""
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(self.criterion.state_dict() | state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.learning_rate, self.is_graphed
        if state["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        self.order.set_state(state["random"]["order"])
        if self.device.type in state["random"] and self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(state["random"][self.device.type])
        self.rows = state["rows"]


class StepGraph:
    """A training step as one CUDA graph: a single launch in place of several hundred.

    At this batch size many kernels are done before the next could be launched. The first steps run
    as they are, on a stream of their own, as capture demands: they allocate what lasts, and cuDNN
    chooses its algorithms. Then a step is recorded, and every one from there on is that recording
    played on other images. Nothing in a step may look at a value on the GPU.

    Raises InputError if a step cannot be recorded.
    """

    def __init__(self, train_step):
        self.train_step = train_step
        self.stream = torch.cuda.Stream()
        self.steps = 0
        self.graph = self.index = self.found = None

    def __call__(self, index):
        self.steps += 1
        if self.steps == STEPS_BEFORE_CAPTURE + 1:
            self.capture(index)
        if self.graph:
            self.index.copy_(index)
            self.graph.replay()
            return self.found
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = self.train_step(index)
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def capture(self, index):
        gc.collect()  # an earlier stage's graph must not be freed in the middle of this one
        self.index = index.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as tqdm's, may do as they like.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.found = self.train_step(self.index)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a capture that failed fails in its turn
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).splitlines()[0]
            raise InputError(
                f"a training step could not be captured as a CUDA graph ({reason}): run with "
                "--no-graph"
            ) from error
        self.graph = graph


@torch.no_grad()
def calibrate(model, images, precision):
    """Set the statistics of all BatchNorm layers to those of uint8 images and of their means.

    In training the decoder sees samples, in use it decodes means, which vary less; and a running
    mean over the last ten or so batches is noisy, by up to 3% of the error. Statistics of what a
    layer will see, over many images, are neither: Wu & Johnson 2021, "Rethinking 'Batch' in
    BatchNorm", arXiv:2105.07576, section 3. Training goes by the statistics of each batch and does
    not notice. Leaves the model in evaluation mode.
    """
    model.eval()
    for part in (model.encoder, model.decoder):  # the decoder's depend on the encoder's
        layers = [layer for layer in part if isinstance(layer, torch.nn.BatchNorm2d)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over batches
            layer.train()
        for chunk in images.split(EVALUATION_BATCH):
            with autocast(images.device, precision):
                mu, _ = model.encode(to_float(chunk))
                if part is model.decoder:
                    model.decode_logits(mu)
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
            layer.eval()


def trained_state(criterion):
    """A criterion's state dict without VGG16, which is frozen and comes from elsewhere."""
    return {k: v for k, v in criterion.state_dict().items() if not k.startswith("perceptual.")}


@torch.no_grad()
def teacher_outputs(teacher, images, precision):
    """The teacher's mu (float32) of fixed images, and its logits (float16), decoded from mu."""
    mus, logits = [], []
    chunks = my_share(images).split(EVALUATION_BATCH)
    for chunk in progress_bar(chunks, desc="teacher's outputs", unit="batch", leave=False):
        with autocast(images.device, precision):
            mu, _ = teacher.encode(to_float(chunk))
            logits.append(teacher.decode_logits(mu).half())
        mus.append(mu.float())
    return gather_rows(torch.cat(mus), len(images)), gather_rows(torch.cat(logits), len(images))
