"""What every script does around its work: flags from constants, device and precision, errors.

A script's hyperparameters are UPPER_CASE constants at its top, one to a line:

    # --- Optimisation ---
    BATCH_SIZE = 64  # images per step

`parse_flags` turns each into a flag of the same name, `--batch-size`, with the comment as its
help and the constant as its default, so that nothing is said twice.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import math
import os
import platform
import re
import socket
import sys
from pathlib import Path

import torch
from tqdm import tqdm


class InputError(Exception):
    """Something the user can mend. Its text is one sentence: what is wrong and what to do."""


def run(main):
    """Call a script's main; turn what the user can mend into one sentence and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of device memory: lower --batch-size or use --device cpu ({error})")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


# --- Flags ---


def one_of(*choices):
    return (lambda value: value in choices, "must be one of " + ", ".join(choices))


def at_least(low):
    return (lambda value: value >= low, f"must be at least {low}")


POSITIVE = (lambda value: 0 < value < math.inf, "must be a positive number")
NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "must be zero or a positive number")
NOT_EMPTY = (lambda value: bool(str(value)), "must not be empty")

# What a value must satisfy, on every script that has the flag.
CHECKS = {
    "data": NOT_EMPTY,
    "limit": at_least(0),
    "vgg": NOT_EMPTY,
    "epochs": at_least(1),
    "teacher_epochs": at_least(1),
    "batch_size": at_least(2),  # BatchNorm needs two images to have a variance
    "learning_rate": POSITIVE,
    "warmup": (lambda value: 0 <= value <= 1, "must be a share, from 0 to 1"),
    "temperature": POSITIVE,
    "perceptual_images": at_least(0),
    "latent_fade": (lambda value: 0 <= value <= 1, "must be a share, from 0 to 1"),
    "reconstruction_weight": NOT_NEGATIVE,
    "kl_weight": NOT_NEGATIVE,
    "latent_weight": NOT_NEGATIVE,
    "output_weight": NOT_NEGATIVE,
    "perceptual_weight": NOT_NEGATIVE,
    "teacher_kl_weight": NOT_NEGATIVE,
    "save_every": at_least(1),
    "variants": NOT_EMPTY,
    "seeds": at_least(1),
    "split": one_of("val", "test"),
    "judge": NOT_EMPTY,
    "judged": at_least(0),
    "rate_tolerance": POSITIVE,
    "workers": at_least(0),
    "seconds": POSITIVE,
    "repeats": at_least(1),
    "calibration_images": at_least(1),
    "percentile": (lambda value: 50 < value <= 100, "must be above 50, up to 100"),
    "fp32_tolerance": POSITIVE,
    "fp16_tolerance": POSITIVE,
    "int8_tolerance": POSITIVE,
    "pca_components": (lambda value: 1 <= value <= 3072, "must be between 1 and 3072"),
    "seed": (lambda value: 0 <= value < 2**32, "must be between 0 and 4294967295"),
    "device": one_of("auto", "cuda", "cpu", "mps"),
    "precision": one_of("auto", "fp32", "bf16", "fp16"),
}

CONSTANT = re.compile(r"^([A-Z][A-Z0-9_]*) = .*?  # (.+)$")
SECTION = re.compile(r"^# --- (.+) ---$")


def parse_flags(script, argv=None, demo_settings=None):
    """The settings of a run, as a namespace: the script's constants, overridden by flags.

    Args:
        script: the script's `globals()`.
        argv: the words after the script's name; None reads the command line.
        demo_settings: values that `--demo` puts in place of the defaults; a flag given beside
            `--demo` still wins.

    An unknown flag or a value that makes no sense ends the program with exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser
    for line in Path(script["__file__"]).read_text(encoding="utf-8").splitlines():
        if line.startswith(("def ", "class ")):  # the constants end where the code begins
            break
        if section := SECTION.match(line):
            group = parser.add_argument_group(section[1])
        elif constant := CONSTANT.match(line):
            add_flag(group, constant[1], script[constant[1]], help=constant[2].replace("%", "%%"))

    settings = parser.parse_args(argv)
    if demo_settings and settings.demo:
        parser.set_defaults(**demo_settings)
        settings = parser.parse_args(argv)
    for name, value in vars(settings).items():
        is_valid, requirement = CHECKS.get(name, (lambda value: True, ""))
        if not is_valid(value):
            parser.error(f"--{name.replace('_', '-')} {requirement}, got {value!r}")
    return settings


def add_flag(group, name, default, help):
    flag = "--" + name.lower().replace("_", "-")
    help += f" (default: {default})"
    if isinstance(default, bool):
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=default, help=help
        )
    else:
        group.add_argument(flag, type=type(default), default=default, metavar="", help=help)


# --- Device and precision ---


def pick_device(name):
    """`auto` takes CUDA, then MPS, then the CPU. Raises InputError if a named one is missing."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in present if present[device])
    if not present[name]:
        raise InputError(
            f"this machine (or this build of PyTorch) has no {name} device: use --device auto"
        )
    if name == "cuda":
        own = int(os.environ.get("LOCAL_RANK", 0))  # this process's, where torchrun starts several
        if own >= torch.cuda.device_count():
            raise InputError(
                f"this machine has {torch.cuda.device_count()} CUDA devices: start no more "
                "processes than that"
            )
        torch.cuda.set_device(own)
    return torch.device(name)


def pick_precision(name, device):
    """`auto` takes what the hardware does natively: bf16, else fp16 tensor cores, else fp32.

    fp32 means it: TF32, which Ampere and later use in convolutions by default, is turned off.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # shapes are few: look for the fastest algorithm once
    if name == "fp16" and device.type != "cuda":
        raise InputError(
            f"fp16 training needs a CUDA device, this is {device.type}: use --precision auto"
        )
    if name == "bf16" and device.type == "mps":
        raise InputError("bf16 is for CUDA and CPU, this is mps: use --precision auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        has_tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
        return "fp16" if has_tensor_cores else "fp32"
    if device.type == "cpu" and cpu_has_bf16():
        return "bf16"
    return "fp32"


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 matrices itself; emulated, bf16 is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "amx_bf16" in cpuinfo() or "avx512_bf16" in cpuinfo()  # older PyTorch


def cpuinfo():
    """What Linux says of the CPU; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def autocast(device, precision):
    """The context in which a model runs at this precision on this device."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def describe_device(device):
    """The device in words, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.processor()} GPU"
    name = re.search(r"model name\s*: (.+)", cpuinfo())
    model = name[1] if name else platform.processor() or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {model}, {isa}, {torch.get_num_threads()} threads"


def progress_bar(iterable=None, **options):
    """tqdm, which in a log file speaks every half minute instead of ten times a second."""
    interval = 0.1 if sys.stderr.isatty() else 30
    silent = os.environ.get("RANK", "0") != "0"  # of several processes the first speaks
    return tqdm(iterable, mininterval=interval, dynamic_ncols=True, disable=silent, **options)


def print_table(rows):
    """Print dictionaries as a Markdown table, a row each, under the first one's keys."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    for line in lines:
        first, *rest = (cell.ljust(w) if j == 0 else cell.rjust(w)
                        for j, (cell, w) in enumerate(zip(line, widths)))
        print("|", " | ".join([first, *rest]), "|")


def versions():
    """Versions of what the figures of a run depend on."""
    packages = ("torch", "torchvision", "numpy")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


@contextlib.contextmanager
def download_timeout(seconds=20):
    """Within it, a download that gets no byte for so long fails instead of hanging."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def require(module, install="pip install -r requirements-deploy.txt"):
    """A module of a package that only some scripts need. Raises InputError that says how to install
    it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} is needed here ({error}): {install}") from error


def import_torchvision():
    """torchvision, imported where it is needed: it is slow to load and picky about torch."""
    try:
        import torchvision
    except Exception as error:  # a mismatched build fails in many ways, by its own account
        raise InputError(
            f"torchvision does not load beside torch {torch.__version__} ({error}): reinstall "
            "the two together with 'pip install --upgrade --force-reinstall torch torchvision'"
        ) from error
    return torchvision
