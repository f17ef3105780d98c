"""How fast training is on this device: beside the loop most people would write, and the floor.

    python bench_training.py                  # no data, no weights; 8 minutes on 2 CPU cores
    python bench_training.py --repeats 3 --seconds 0.5 --no-inference       # quicker, noisier

The straightforward loop is a DataLoader with workers over a torchvision-style dataset with
ToTensor, eager fp32 (TF32 convolutions on GPUs that have them, as PyTorch has it by default), Adam,
OneCycleLR; the teacher and VGG16 are asked about every image in every step, and the loss is read in
every step. Ours is the training step of distill_tinyvae.py itself, with the same batch size. In
between, each of our changes is made to the straightforward loop alone, and taken away from all of
them together. One of them is less work, not faster work: VGG16 sees few images of each batch, which
makes the same loss on average. So there are two ratios: to the straightforward loop, and to the one
in which VGG16 sees as few.

The time of a step does not depend on what the images show, so generated ones and untrained networks
serve. All variants take turns in every repeat, so that a slow minute of the machine hits them all;
figures are medians over repeats ± half the distance between the quartiles. Writes
bench_training.csv and bench_training.png, and prints the tables.
"""

import copy
import itertools
import os
import statistics
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

import distill_tinyvae
from data import load_training_images
from distill_tinyvae import Job, ask_teacher, student_stage
from losses import DistillationLoss, LatentProjection, PerceptualLoss, VAELoss, load_vgg16
from metrics import seconds_per_batch, synchronize
from pictures import draw_bars
from runtime import (
    InputError,
    autocast,
    describe_device,
    import_torchvision,
    parse_flags,
    pick_device,
    pick_precision,
    print_table,
    progress_bar,
    run,
)
from standard_vae import StandardVAE
from storage import check_writable, write_csv
from tiny_vae_32 import TinyVAE32
from training import Stage

HERE = Path(__file__).resolve().parent

# --- What is timed ---
DATA = "dead-leaves"  # dead-leaves (generated), cifar10, or a folder with train/ and test/
LIMIT = 2000  # images; an epoch's time is scaled up from the steps timed
VGG = "random"  # random, imagenet, or a state dict's path: as fast one as the other
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # of ours: auto, fp32, bf16 or fp16; the straightforward loop is fp32
WORKERS = 4  # of the straightforward loop's DataLoader, at most one for each CPU core
INFERENCE = True  # time encode and decode too, eager and compiled

# --- How long ---
SECONDS = 2.0  # of each variant's turn
REPEATS = 9  # every variant takes its turn in each

# --- Files ---
OUTPUT_DIR = HERE / "outputs"  # folder of bench_training.csv and bench_training.png

# Images at once in inference.
BATCHES = (1, 64, 1024)
# What a run on CIFAR-10 trains on.
CIFAR10_IMAGES = 45_000
COLUMNS = ("stage", "variant", "ms_per_step", "spread_ms", "ratio", "precision", "device")

# What we do that the straightforward loop does not.
RESIDENT = "images on the device"
ASKED_ONCE = "teacher asked once"
FEW_IMAGES = "VGG16 sees a few"
CHANNELS_LAST = "channels last"
FUSED = "fused Adam"
LOW_PRECISION = "16-bit"
READ_RARELY = "loss read rarely"
GRAPH = "CUDA graph"


def tricks_of(device, precision):
    """Our changes that can matter on this device."""
    tricks = [RESIDENT, ASKED_ONCE, FEW_IMAGES, CHANNELS_LAST, FUSED]
    tricks += [LOW_PRECISION] if precision != "fp32" else []
    return tricks + ([READ_RARELY] if device.type != "cpu" else [])


# --- The straightforward loop, with our changes as switches ---


class PILDataset(Dataset):
    """Images in memory, handed out one by one as torchvision's CIFAR10 does, with their index for
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
        self.workers = min(settings.workers, os.cpu_count())
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        images = load_training_images(settings.data, settings.limit)
        recipe = parse_flags(vars(distill_tinyvae), [])
        if len(images.train) < recipe.batch_size:
            raise InputError(
                f"{len(images.train)} images do not fill a batch of {recipe.batch_size}: raise "
                "--limit"
            )
        if settings.vgg == "none":
            raise InputError("--vgg none leaves out what is to be timed: use --vgg random")
        self.vgg, vgg_record = load_vgg16(settings.vgg)
        recipe.data, recipe.limit, recipe.vgg = settings.data, settings.limit, settings.vgg
        self.recipe = recipe
        self.job = Job(recipe, self.device, self.precision, images, vgg_record)
        torch.manual_seed(0)
        self.teacher = StandardVAE().to(self.device).eval().requires_grad_(False)
        self.targets = ask_teacher(self.job, self.teacher)
        self.transform = import_torchvision().transforms.ToTensor()
        self.cpu_images = images.train

    def batches(self):
        """Float images and their indices from a DataLoader, without end, in epochs of CIFAR-10's
        length however few images there are."""
        dataset = PILDataset(self.cpu_images, self.transform)
        loader = DataLoader(
            dataset,
            batch_size=self.recipe.batch_size,
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
            order = torch.randperm(len(self.job.images)).to(self.device)
            yield from order.split(self.recipe.batch_size)[: len(order) // self.recipe.batch_size]


def straightforward(bench, stage, tricks=()):
    """The loop most people would write, with some of our changes. Returns its step, a function."""
    recipe, device = bench.recipe, bench.device
    torch.manual_seed(0)
    layout = torch.channels_last if CHANNELS_LAST in tricks else torch.contiguous_format
    precision = bench.precision if LOW_PRECISION in tricks else "fp32"
    if stage == "teacher":
        model, criterion = StandardVAE(), VAELoss(recipe.teacher_kl_weight)
    else:
        model = TinyVAE32()
        criterion = DistillationLoss(
            bench.job.weights,
            recipe.temperature,
            LatentProjection(bench.targets.mu, model.latent_dim),
            PerceptualLoss(copy.deepcopy(bench.vgg)).to(memory_format=layout),
            recipe.perceptual_images if FEW_IMAGES in tricks else 0,
            recipe.latent_fade,
        )
    model.to(device, memory_format=layout).train()
    criterion.to(device)
    teacher = None
    if stage == "student" and ASKED_ONCE not in tricks:
        teacher = copy.deepcopy(bench.teacher).to(memory_format=layout)
        teacher.check_range = False
    model.check_range = False  # a safeguard of ours, which makes a GPU wait
    trained = [p for p in (*model.parameters(), *criterion.parameters()) if p.requires_grad]
    fused = True if FUSED in tricks else None
    optimizer = torch.optim.Adam(trained, lr=recipe.learning_rate, fused=fused)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=10_000_000
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    batches = bench.indices() if RESIDENT in tricks else bench.batches()

    def ask_teacher_now(images):
        with torch.no_grad():
            mu, _ = teacher.encode(images)
            return teacher.decode_logits(mu), mu

    def step():
        # TF32 as PyTorch has it by default; our fp32 goes without.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, allow_tf32=LOW_PRECISION not in tricks
        ):
            return step_inside()

    def step_inside():
        if RESIDENT in tricks:
            index = next(batches)
            images = bench.job.images[index].to(torch.float32, memory_format=layout).div_(255)
        else:
            images, index = next(batches)
            images = images.to(device, memory_format=layout, non_blocking=True)
            index = index.to(device, non_blocking=True)
        with autocast(device, precision):
            targets = ()
            if teacher:
                targets = ask_teacher_now(images)
            elif stage == "student":
                targets = bench.targets.logits[index], bench.targets.mu[index]
            mu, logvar = model.encode(images)
            z, mean_logits = model.reparameterize(mu, logvar), None
            if criterion.needs_mean:
                logits, mean_logits = model.decode_logits(torch.cat([z, mu])).chunk(2)
            else:
                logits = model.decode_logits(z)
            total, _ = criterion(images, logits, mean_logits, mu, logvar, *targets)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        criterion.after_step()
        return total.detach() if READ_RARELY in tricks else total.item()

    return step


def ours(bench, stage, graph=True):
    """The step of distill_tinyvae.py, a function."""
    settings = bench.job.settings
    settings.graph = graph
    if stage == "teacher":
        torch.manual_seed(settings.seed)
        criterion = VAELoss(settings.teacher_kl_weight)
        trained = Stage("teacher", StandardVAE(), criterion, [], settings.epochs, bench.job)
    else:
        trained = student_stage(bench.job, bench.targets, copy.deepcopy(bench.vgg))
    trained.model.train()
    indices, counter = bench.indices(), itertools.count()

    def step():
        trained.set_schedule(next(counter) % trained.steps)
        return trained.step(next(indices))

    return step


def make_variants(bench):
    """(stage, name) → a step, in the order of the table."""
    tricks = tricks_of(bench.device, bench.precision)
    variants = {
        ("teacher", "straightforward"): straightforward(bench, "teacher"),
        ("teacher", "ours"): ours(bench, "teacher"),
        ("student", "straightforward"): straightforward(bench, "student"),
    }
    for trick in tricks:
        variants["student", f"+ {trick}"] = straightforward(bench, "student", [trick])
    variants["student", "all of these"] = straightforward(bench, "student", tricks)
    for trick in tricks:
        others = [other for other in tricks if other != trick]
        variants["student", f"all but: {trick}"] = straightforward(bench, "student", others)
    if bench.device.type == "cuda":
        variants["student", f"ours without {GRAPH}"] = ours(bench, "student", graph=False)
    variants["student", "ours"] = ours(bench, "student")
    return variants


# --- Timing ---


def time_variants(bench, variants, seconds, repeats):
    """Seconds per step of each variant, `repeats` times, all taking turns.

    A turn is as many steps as take `seconds`, at least one, and ends when the device has done
    them. Before the first turn each variant runs until it is warm.
    """
    warm_up, steps = 12, {}  # more than what a CUDA graph is captured after
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
                try:
                    seconds = seconds_per_batch(model, images, repeats=20)
                except Exception as error:  # no compiler, no Triton, each in its own way
                    if kind == "eager" or isinstance(error, torch.OutOfMemoryError):
                        raise
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    print(f"torch.compile does not work here: {reason}")
                    row |= {"compiled, ms/image": "–", "compiled, images/s": "–"}
                else:
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
    recipe = bench.recipe
    per_epoch = CIFAR10_IMAGES // recipe.batch_size

    def minutes(teacher, student):
        whole = recipe.teacher_epochs * ms["teacher", teacher]
        whole += recipe.epochs * ms["student", student]
        return per_epoch * whole / 60_000

    ours = minutes("ours", "ours")
    print(
        f"\nThe default recipe ({recipe.teacher_epochs} + {recipe.epochs} epochs of "
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
        step = ours(bench, stage, graph=False)
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


def bench_training(settings):
    check_writable(settings.output_dir)
    bench = Bench(settings)
    print(
        f"images      {len(bench.job.images):,} of {settings.data}, batch "
        f"{bench.recipe.batch_size}; VGG16 sees {bench.recipe.perceptual_images or 'all'} of them, "
        "in the straightforward loop all\n"
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
        for stage, variant in variants
    ]
    print_times(bench, rows)
    csv_path = settings.output_dir / "bench_training.csv"
    png_path = settings.output_dir / "bench_training.png"
    write_csv(csv_path, COLUMNS, rows)
    batch = f"{bench.recipe.batch_size} images"
    draw_bars(png_path, rows, f"A training step of {batch} on {describe_device(bench.device)}")
    after = measure_peaks(bench.device, bench.precision)
    print_floor(bench, rows, [max(pair) for pair in zip(before, after)])
    if settings.inference:
        print()
        print_table(time_inference(bench))
    print(f"\nWritten:\n  {csv_path}\n  {png_path}")


def main(argv=None):
    bench_training(parse_flags(globals(), argv))


if __name__ == "__main__":
    run(main)
