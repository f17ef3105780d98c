"""How fast training is on this device: beside the loop most people would write, and the floor.

    python bench_training.py                  # no data, no weights; 12 minutes on 2 CPU cores
    python bench_training.py --repeats 3 --seconds 0.5 --no-inference       # quicker, noisier

The straightforward loop is a DataLoader with workers over a torchvision-style dataset with
ToTensor, eager fp32 (TF32 convolutions on GPUs that have them, as PyTorch has it by default), Adam,
OneCycleLR; the teacher and VGG16 see every image in every step, and the loss is read in every step.
Ours is distill_tinyvae.py itself, run as a program with Adam: `ms_per_step` of its metrics.csv in
the second epoch of each stage. In between, each of our changes is made to the straightforward loop
alone, and taken away from all of them together. One of them is less work, not faster work: VGG16
sees few images of each batch, which makes the same loss on average. So there are two ratios: to the
straightforward loop, and to the one in which VGG16 sees as few.

The time of a step does not depend on what the images show, so generated ones and untrained networks
serve. All variants take turns in every repeat, so that a slow minute of the machine affects them
all; figures are medians over repeats ± half the distance between the quartiles. Writes
bench_training.csv and bench_training.png, and prints the tables.
"""

import copy
import csv
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from comparison import run_distillation
from data import load_training_images
from losses import (
    kl_loss,
    latent_distillation_loss,
    make_projection,
    output_distillation_loss,
    perceptual_loss,
    reconstruction_loss,
    without_grid,
)
from metrics import seconds_per_batch, synchronize
from pictures import save_figure
from runtime import (
    DTYPES,
    InputError,
    autocast,
    describe_device,
    import_torchvision,
    pick_device,
    pick_precision,
    print_table,
    progress_bar,
    run_script,
)
from settings import file_path, number, one_of, parse_settings, switch, text, whole
from standard_vae import StandardVAE
from storage import check_writable, write_csv
from teacher_outputs import compute_outputs
from tiny_vae_32 import TinyVAE32
from vgg import VGGFeatures, load_vgg16

HERE = Path(__file__).resolve().parent

# --- What is timed ---
DATA = "dead-leaves"  # as in distill_tinyvae.py
LIMIT = 2000  # images; an epoch's time is scaled up from the steps timed
VGG = "random"  # random, imagenet, or a state dict's path: the time is the same
BATCH_SIZE = 64  # images per step, as in distill_tinyvae.py
PERCEPTUAL_IMAGES = 4  # images of each batch that VGG16 sees in ours; 0: all
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # of ours: auto, fp32, bf16 or fp16; the straightforward loop is fp32
WORKERS = 4  # of the straightforward loop's DataLoader, at most one for each CPU core
INFERENCE = True  # time encode and decode too, eager and compiled

# --- How long ---
SECONDS = 2.0  # of each variant's turn; ours takes an epoch of LIMIT images
REPEATS = 9  # every variant takes its turn in each

# --- Files ---
OUTPUT_DIR = HERE / "outputs"  # folder of bench_training.csv and bench_training.png

KINDS = {
    "DATA": text(), "LIMIT": whole(0, none=0), "VGG": text(), "BATCH_SIZE": whole(2),
    "PERCEPTUAL_IMAGES": whole(0, none=0), "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "WORKERS": whole(0, none=0),
    "INFERENCE": switch(), "SECONDS": number(0, above=True), "REPEATS": whole(1),
    "OUTPUT_DIR": file_path(),
}

# The step that is timed: the five terms with the weights of distill_tinyvae.py, and Adam.
TEACHER_KL_WEIGHT, TEMPERATURE = 0.01, 3.0
WEIGHTS = {"reconstruction": 0.3, "kl": 0.1, "latent": 0.3, "output": 0.2, "perceptual": 0.1}
SCALES = {"kl": 0.4, "perceptual": 4.0}

BATCHES = (1, 64, 1024)  # images at once in inference
RECIPE_EPOCHS = {"teacher": 20, "student": 100}  # of a full training, whose time is scaled up
CIFAR10_IMAGES = 45_000  # that a run on CIFAR-10 trains on
COLUMNS = ("stage", "variant", "ms_per_step", "spread_ms", "ratio", "precision", "device")

# What we do that the straightforward loop does not.
RESIDENT = "images on the device"
KEPT_OUTPUTS = "teacher's outputs kept"
FEW_IMAGES = "VGG16 on few images"
CHANNELS_LAST = "channels last"
FUSED = "fused Adam"
LOW_PRECISION = "16-bit"
READ_RARELY = "loss read rarely"
COMPILED = "torch.compile"  # which we do not
GRAPH = "CUDA graph"


def tricks_of(device, precision):
    """Our changes that can matter on this device."""
    tricks = [RESIDENT, KEPT_OUTPUTS, FEW_IMAGES, CHANNELS_LAST, FUSED]
    tricks += [LOW_PRECISION] if precision != "fp32" else []
    return tricks + ([READ_RARELY] if device.type != "cpu" else [])


# --- The straightforward loop, with our changes as switches ---


class PILDataset(Dataset):
    """Images in memory, returned one by one as torchvision's CIFAR10 does, with their index for
    a label."""

    def __init__(self, images, transform):
        self.images, self.transform = images.permute(0, 2, 3, 1).contiguous().numpy(), transform
        self.to_pil = import_torchvision().transforms.functional.to_pil_image

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.to_pil(self.images[index])), index


class Bench:
    """What all variants share: images, the teacher and its outputs, VGG16, the settings."""

    def __init__(self, settings):
        self.settings, self.batch_size = settings, settings.batch_size
        self.workers = min(settings.workers, os.cpu_count())
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.cpu_images = load_training_images(settings.data, settings.limit).train
        if len(self.cpu_images) < self.batch_size:
            raise InputError(
                f"{len(self.cpu_images)} images do not fill a batch of {self.batch_size}: raise "
                "--limit"
            )
        if settings.vgg == "none":
            raise InputError("--vgg none leaves out what is to be timed: use --vgg random")
        self.vgg, _ = load_vgg16(settings.vgg)
        self.images = self.cpu_images.to(self.device)
        torch.manual_seed(0)
        self.teacher = StandardVAE().to(self.device).eval().requires_grad_(False)
        self.mu, self.logits = compute_outputs(self.teacher, self.images, self.precision)
        self.transform = import_torchvision().transforms.ToTensor()

    def batches(self):
        """Float images and their indices from a DataLoader, without end, in epochs of CIFAR-10's
        length however few images there are."""
        dataset = PILDataset(self.cpu_images, self.transform)
        loader = DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=RandomSampler(dataset, replacement=True, num_samples=CIFAR10_IMAGES),
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def indices(self):
        """Indices of shuffled batches on the device, without end."""
        while True:
            order = torch.randperm(len(self.images)).to(self.device)
            yield from order.split(self.batch_size)[: len(order) // self.batch_size]


def straightforward(bench, stage, tricks=()):
    """The loop most people would write, with some of our changes. Returns its step, a function."""
    device = bench.device
    torch.manual_seed(0)
    layout = torch.channels_last if CHANNELS_LAST in tricks else torch.contiguous_format
    precision = bench.precision if LOW_PRECISION in tricks else "fp32"
    is_student = stage == "student"
    model = TinyVAE32() if is_student else StandardVAE()
    model.to(device, memory_format=layout).train()
    model.check_range = False  # a safeguard of ours, which makes a GPU wait
    parameters = list(model.parameters())
    teacher = projection = vgg = seen = None
    if is_student:
        projection = make_projection("pixels", bench.mu, bench.images, model.latent_dim).to(device)
        parameters += projection.parameters()
        layers = copy.deepcopy(bench.vgg).to(memory_format=layout)
        vgg = VGGFeatures(layers, DTYPES[precision]).to(device, memory_format=layout)
        seen = (bench.settings.perceptual_images if FEW_IMAGES in tricks else 0) or None
        if KEPT_OUTPUTS not in tricks:
            teacher = copy.deepcopy(bench.teacher).to(memory_format=layout)
            teacher.check_range = False
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True if FUSED in tricks else None)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10_000_000)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    batches = bench.indices() if RESIDENT in tricks else bench.batches()

    def teacher_outputs_of(images, index):
        if teacher is None:
            return bench.logits[index], bench.mu[index]
        with torch.no_grad():
            mu, _ = teacher.encode(images)
            return teacher.decode_logits(mu), mu

    def teacher_loss(images):
        mu, logvar = model.encode(images)
        logits = model.decode_logits(model.reparameterize(mu, logvar))
        kl = kl_loss(mu, logvar)
        return reconstruction_loss(torch.sigmoid(logits), images) + TEACHER_KL_WEIGHT * kl

    def student_loss(images, index):
        teacher_logits, teacher_mu = teacher_outputs_of(images, index)
        mu, logvar = model.encode(images)
        z = model.reparameterize(mu, logvar)
        logits, of_mean = model.decode_logits(torch.cat([z, mu])).chunk(2)
        looked_at = without_grid(torch.sigmoid(of_mean), images)[:seen]
        terms = {
            "reconstruction": reconstruction_loss(torch.sigmoid(logits), images),
            "kl": kl_loss(mu, logvar),
            "latent": latent_distillation_loss(mu, projection(teacher_mu.float())),
            "output": output_distillation_loss(of_mean, teacher_logits, TEMPERATURE),
            "perceptual": perceptual_loss(vgg, looked_at, images[:seen]),
        }
        return sum(WEIGHTS[name] * SCALES.get(name, 1) * term for name, term in terms.items())

    if COMPILED in tricks:
        student_loss = torch.compile(student_loss)

    def step():
        # TF32 as PyTorch has it by default; our fp32 goes without.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, allow_tf32=LOW_PRECISION not in tricks
        ):
            return step_inside()

    def step_inside():
        if RESIDENT in tricks:
            index = next(batches)
            images = bench.images[index].to(torch.float32, memory_format=layout).div_(255)
        else:
            images, index = next(batches)
            images = images.to(device, memory_format=layout, non_blocking=True)
            index = index.to(device, non_blocking=True)
        with autocast(device, precision):
            loss = student_loss(images, index) if is_student else teacher_loss(images)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if is_student:
            projection.retract()
        return loss.detach() if READ_RARELY in tricks else loss.item()

    return step


def make_variants(bench):
    """(stage, name) → a step of the straightforward loop, in the order of the table."""
    tricks = tricks_of(bench.device, bench.precision)
    variants = {
        ("teacher", "straightforward"): straightforward(bench, "teacher"),
        ("student", "straightforward"): straightforward(bench, "student"),
    }
    for trick in tricks:
        variants["student", f"+ {trick}"] = straightforward(bench, "student", [trick])
    variants["student", "all of these"] = straightforward(bench, "student", tricks)
    for trick in tricks:
        others = [other for other in tricks if other != trick]
        variants["student", f"all but: {trick}"] = straightforward(bench, "student", others)
    compiled = straightforward(bench, "student", [*tricks, COMPILED])
    start = time.perf_counter()
    if works_compiled(compiled):
        print(f"torch.compile of a student's step: {time.perf_counter() - start:.0f} s")
        variants["student", f"all of these, {COMPILED}"] = compiled
    return variants


def works_compiled(function, *args):
    """Whether what torch.compile has made runs here; prints why not."""
    try:
        function(*args)
    except Exception as error:  # no compiler, no Triton, each in its own way
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"torch.compile does not work here: {reason}")
        return False
    return True


# --- Ours ---


def time_ours(bench, graph=True):
    """Seconds per step of a run of distill_tinyvae.py: (stage, name) → seconds."""
    settings = bench.settings
    student = TinyVAE32().architecture
    shape = {key: student[key] for key in ("latent_dim", "encoder_channels", "decoder_channels")}
    flags = {  # what decides the work of a step, whatever is edited in distill_tinyvae.py
        **shape,
        "teacher": "train",
        "teacher_latent_dim": bench.teacher.architecture["latent_dim"],
        "teacher_channels": bench.teacher.architecture["channels"],
        **{f"{term}_weight": weight for term, weight in WEIGHTS.items()},
        "optimizer": "adam",
        "projection": "pixels",
        "data": settings.data,
        "limit": settings.limit,
        "vgg": settings.vgg,
        "batch_size": bench.batch_size,
        "perceptual_images": settings.perceptual_images,
        "teacher_epochs": 2,
        "epochs": 2,
        "device": settings.device,
        "precision": settings.precision,
        "graph": graph,
    }
    with tempfile.TemporaryDirectory() as folder:
        run_distillation("distill_tinyvae.py", Path(folder), flags)
        with Path(folder, "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        if "graph_failed" in json.loads(Path(folder, "config.json").read_text()):
            graph = False  # the run has said why
    name = "ours" if graph else f"ours without {GRAPH}"
    return {  # a later row of a stage replaces an earlier one: the first epoch warms up
        (row["stage"], name): float(row["ms_per_step"]) / 1000 for row in rows
        if graph or row["stage"] == "student"
    }


# --- Timing ---


def time_variants(bench, variants, seconds, repeats):
    """Seconds per step of each variant and of ours, `repeats` times, all taking turns.

    A turn is as many steps as take `seconds`, at least one, and ends when the device has done
    them. Before the first turn each variant runs until it is warm.
    """
    warm_up, steps = 12, {}
    for name, step in progress_bar(variants.items(), desc="warming up", unit="variant"):
        for i in range(warm_up):
            if i == warm_up // 2:
                synchronize(bench.device)
                start = time.perf_counter()
            step()
        synchronize(bench.device)
        each = (time.perf_counter() - start) / (warm_up - warm_up // 2)
        steps[name] = max(1, round(seconds / each))
    times = {name: [] for name in variants}
    for _ in progress_bar(range(repeats), desc="timing", unit="repeat"):
        for name, step in variants.items():
            synchronize(bench.device)
            start = time.perf_counter()
            for _ in range(steps[name]):
                step()
            synchronize(bench.device)
            times[name].append((time.perf_counter() - start) / steps[name])
        ours = time_ours(bench)
        if bench.device.type == "cuda":
            ours = time_ours(bench, graph=False) | ours
        for name, each in ours.items():
            times.setdefault(name, []).append(each)
    return times


def half_interquartile(values):
    """A spread: half the distance between the quartiles; half the range of fewer than four."""
    if len(values) < 4:
        return (max(values) - min(values)) / 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


# --- The floor ---


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each as if it ran on its own."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def count_work(step):
    """(multiply–accumulates, bytes read and written) of one step: matrix products and convolutions,
    forward and backward; bytes of all operations."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        step()
    return counter.get_total_flops() // 2, traffic.bytes


def best_of(function, device, repeats=10):
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_peaks(device, precision):
    """(multiply–accumulates a second of a large matrix product, bytes a second of a large copy)."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 1536 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    macs = side**3 / best_of(lambda: torch.mm(a, b), device)
    source = torch.ones(64_000_000, device=device)
    target = torch.empty_like(source)
    return macs, 2 * source.numel() * 4 / best_of(lambda: target.copy_(source), device)


# --- Where the time goes ---

KERNELS = {  # part of an operation's name → the row it counts in; the first that fits (adam, Adam)
    "convolution_backward": "convolutions, backward", "conv": "convolutions, forward",
    "batch_norm": "BatchNorm, both ways", "silu": "SiLU, both ways", "mm": "matrix products",
    "pool": "VGG16's pooling and ReLU", "relu": "VGG16's pooling and ReLU",
    "threshold": "VGG16's pooling and ReLU", "dam": "Adam", "": "all else",
}


def time_operations(bench, stage, steps=10):
    """Milliseconds a step that each kind of operation takes, most first, by PyTorch's profiler."""
    step = straightforward(bench, stage, tricks_of(bench.device, bench.precision))
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = bench.device.type == "cuda"
    activities += [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        synchronize(bench.device)
    found = dict.fromkeys(KERNELS.values(), 0.0)
    for event in profile.key_averages():
        # On CUDA an operation's time is that of its kernels, which are listed once more themselves.
        if event.device_type != torch.autograd.DeviceType.CPU or event.is_user_annotation:
            continue
        kind = next(kind for part, kind in KERNELS.items() if part in event.key)
        microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        found[kind] += microseconds / 1000 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def print_operations(bench):
    teacher, student = (time_operations(bench, stage) for stage in ("teacher", "student"))
    whole = sum(student.values())
    print()
    print_table([
        {
            "ms a step, all of our changes": kind,
            "teacher": f"{teacher[kind]:.2f}",
            "student": f"{student[kind]:.2f}",
            "of the student's": f"{student[kind] / whole:.0%}",
        }
        for kind in student
    ])


# --- Inference ---


def time_inference(bench):
    """A row for each model and batch size: encode and decode, fp32, eager and compiled."""
    rows = []
    for name, vae in (("teacher", StandardVAE()), ("student", TinyVAE32())):
        vae = vae.to(bench.device, memory_format=torch.channels_last).eval()
        compiled = copy.copy(vae)
        # Each batch size is compiled for itself, not for any size.
        compiled.encode = torch.compile(vae.encode, dynamic=False)
        compiled.decode = torch.compile(vae.decode, dynamic=False)
        for batch in BATCHES:
            images = torch.rand(batch, 3, 32, 32, device=bench.device)
            row = {"inference, fp32": name, "batch": batch}
            for kind, model in (("eager", vae), ("compiled", compiled)):
                if kind == "compiled" and not works_compiled(compiled.encode, images):
                    row |= {"compiled, ms/image": "–", "compiled, images/s": "–"}
                    continue
                seconds = seconds_per_batch(model, images, repeats=20)
                row[f"{kind}, ms/image"] = f"{1000 * seconds / batch:.3f}"
                row[f"{kind}, images/s"] = f"{batch / seconds:,.0f}"
            rows.append(row)
    return rows


# --- All together ---


def print_times(bench, rows):
    print()
    print_table(
        [
            {
                "stage": row["stage"],
                "step": row["variant"],
                "ms": f"{row['ms_per_step']:.2f} ± {row['spread_ms']:.2f}",
                "times as fast": f"{row['ratio']:.2f}",
            }
            for row in rows
        ]
    )
    ms = {(row["stage"], row["variant"]): row["ms_per_step"] for row in rows}
    per_epoch = CIFAR10_IMAGES // bench.batch_size

    def minutes(teacher, student):
        whole = RECIPE_EPOCHS["teacher"] * ms["teacher", teacher]
        whole += RECIPE_EPOCHS["student"] * ms["student", student]
        return per_epoch * whole / 60_000

    ours = minutes("ours", "ours")
    print(
        "\nA full training with these steps "
        f"({RECIPE_EPOCHS['teacher']} + {RECIPE_EPOCHS['student']} epochs of "
        f"{CIFAR10_IMAGES:,} images), in steps alone:"
    )
    for name, student in (
        ("ours", "ours"),
        ("straightforward", "straightforward"),
        ("straightforward, VGG16 sees as few", f"+ {FEW_IMAGES}"),
    ):
        whole = minutes("ours" if student == "ours" else "straightforward", student)
        print(f"  {whole:8.1f} minutes, {whole / ours:5.2f} times ours: {name}")


def print_floor(bench, rows, peaks):
    macs_peak, bandwidth = peaks
    ms = {(row["stage"], row["variant"]): row["ms_per_step"] for row in rows}
    table = []
    for stage in ("teacher", "student"):
        step = straightforward(bench, stage, tricks_of(bench.device, bench.precision))
        step()  # Adam makes its moments in the first
        macs, traffic = count_work(step)
        floor = 1000 * macs / macs_peak
        table.append(
            {
                "ours": stage,
                "GMAC a step": f"{macs / 1e9:.2f}",
                "floor by arithmetic, ms": f"{floor:.2f}",
                "GB a step": f"{traffic / 1e9:.3f}",
                "its time, ms": f"{1000 * traffic / bandwidth:.2f}",
                "measured, ms": f"{ms[stage, 'ours']:.2f}",
                "times the floor": f"{ms[stage, 'ours'] / floor:.1f}",
            }
        )
    print()
    print_table(table)
    print(
        f"\nMeasured peaks: {macs_peak / 1e9:,.0f} GMAC/s (large matrix product, "
        f"{bench.precision}), {bandwidth / 1e9:,.1f} GB/s (large copy). The floor is that of "
        "direct convolution.\nGB: what every operation reads and writes, as if nothing stayed in "
        "a cache, so its time can be undercut."
    )


def draw_bars(path, rows, title):
    """A bar for each row's milliseconds per step, its ratio to the straightforward loop written
    at its end. `rows` are those of bench_training.csv."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    counts = [sum(row["stage"] == stage for row in rows) for stage in stages]
    figure = Figure(figsize=(8, 0.28 * len(rows) + 1.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(stages), sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for ax, stage in zip(axes, stages):
        shown = [row for row in rows if row["stage"] == stage]
        colours = ["tab:blue" if row["variant"] == "ours" else "tab:grey" for row in shown]
        bars = ax.barh(
            [row["variant"] for row in shown],
            [row["ms_per_step"] for row in shown],
            xerr=[row["spread_ms"] for row in shown],
            color=colours,
        )
        ax.bar_label(bars, [f"{row['ratio']:.2f}×" for row in shown], padding=4, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.tick_params(labelsize=8)
        ax.set_title(stage, fontsize=9, loc="left")
    axes[-1].set_xlabel("ms per step", fontsize=9)
    save_figure(figure, path)


def bench_training(settings):
    check_writable(settings.output_dir)
    bench = Bench(settings)
    print(
        f"images      {len(bench.images):,} of {settings.data}, batch {bench.batch_size}; VGG16 "
        f"sees {settings.perceptual_images or 'all'} of them, in the straightforward loop all\n"
        f"device      {describe_device(bench.device)}; ours {bench.precision}, straightforward "
        f"fp32, {bench.workers} workers\n"
        f"timing      {settings.repeats} turns of {settings.seconds:g} s for each variant; "
        f"torch {torch.__version__}\n"
    )
    variants = make_variants(bench)
    before = measure_peaks(bench.device, bench.precision)
    times = time_variants(bench, variants, settings.seconds, settings.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "stage": stage,
            "variant": variant,
            "ms_per_step": 1000 * medians[stage, variant],
            "spread_ms": 1000 * half_interquartile(times[stage, variant]),
            "ratio": medians[stage, "straightforward"] / medians[stage, variant],
            "precision": bench.precision,
            "device": describe_device(bench.device),
        }
        for stage, variant in sorted(times, key=lambda name: name[0], reverse=True)
    ]
    print_times(bench, rows)
    csv_path = settings.output_dir / "bench_training.csv"
    png_path = settings.output_dir / "bench_training.png"
    write_csv(csv_path, COLUMNS, rows)
    batch = f"{bench.batch_size} images"
    draw_bars(png_path, rows, f"A training step of {batch} on {describe_device(bench.device)}")
    after = measure_peaks(bench.device, bench.precision)
    print_floor(bench, rows, [max(pair) for pair in zip(before, after)])
    print_operations(bench)
    if settings.inference:
        print()
        print_table(time_inference(bench))
    print(f"\nWritten:\n  {csv_path}\n  {png_path}")


def main(argv=None):
    bench_training(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
