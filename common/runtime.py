"""What every script does around its work: errors, device and precision, progress, tables."""

import contextlib
import errno
import importlib
import importlib.metadata
import os
import platform
import re
import socket
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm


class InputError(Exception):
    """A mistake that the user can correct. Its text is one sentence: what is wrong, what to do."""


def run_script(main, interrupted=""):
    """Call a script's main with the command line. What `user_message` knows of input, memory, files
    and output becomes one sentence and exit code 1; Ctrl-C the sentence `interrupted`, and 130; a
    reader of the output that has gone, as in `| head`, 141, as of other programs."""
    prepare_streams()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        sentence = user_message(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")
    except KeyboardInterrupt:
        print(f"\nInterrupted. {interrupted}", file=sys.stderr)
        sys.exit(130)
    finally:
        drop_output()


def prepare_streams():
    """Open standard streams that are closed (`>&-`), of which a file would else take the number and
    get what is printed; and print what the locale lacks, such as ×, as a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="replace")


def drop_output():
    """Drop what is still to be printed if it cannot be: it would fail again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error):
    """Of an error's text, with the second where that ends in a colon; the name of its class where
    it has no text."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def user_message(error):
    """What a user is told of bad input, memory that is full, a file that the system refuses, or an
    output that cannot be written; None for other errors."""
    if isinstance(error, InputError):
        return str(error)
    reason = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of the device's memory: use a smaller batch, or --device cpu ({reason})"
    if is_out_of_memory(error):
        return f"out of memory: use a smaller batch or fewer images ({reason})"
    if not isinstance(error, OSError):
        return None
    if error.filename is not None:
        reason = error.strerror or reason
        return f"{error.filename} cannot be used ({reason}): correct its name or permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # of a write
        return (
            f"what this prints could not be written ({error.strerror}): print to a terminal or a "
            "file with space; files that are finished stay"
        )
    return None


def is_out_of_memory(error):
    """Whether an error says that the machine's memory, or the device's, is full."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    signs = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    text = str(error)
    # oneDNN's; with "descriptor", it does not support the operation.
    is_onednn = "create a primitive" in text and "primitive descriptor" not in text
    return is_onednn or any(sign in text for sign in signs)


@contextlib.contextmanager
def explain_errors(sentence):
    """Within it, any error becomes an InputError of the text `sentence(reason)`, but an InputError,
    and memory that is full, which says nothing against a file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(sentence(first_line(error))) from error


# --- Device and precision ---


def pick_device(name):
    """`auto` takes CUDA, then MPS, then the CPU. Of several GPUs, a process of torchrun takes its
    own. Raises InputError if a named one is missing, or one that is there cannot compute.

    Convolutions in fp32 are in fp32: TF32, which Ampere and later use by default, is turned off.
    """
    torch.backends.cudnn.allow_tf32 = False
    has_cuda, warning = look_for_cuda()
    built_for_cuda = torch.version.cuda or torch.version.hip
    no_cuda = "finds no GPU, or no driver" if built_for_cuda else "is built without it"
    missing = {
        "cuda": "" if has_cuda else warning or f"PyTorch {no_cuda}",
        "mps": "" if torch.backends.mps.is_available() else "PyTorch finds none",
        "cpu": "",
    }
    own = int(os.environ["LOCAL_RANK"]) if torch.distributed.is_torchelastic_launched() else 0
    if name == "auto":
        name = next(device for device, reason in missing.items() if not reason)
        if warning and own == 0:
            print(f"This runs on {name}: {warning}", file=sys.stderr)
    if missing[name]:
        raise InputError(
            f"no {name} device can be used ({missing[name]}): --device auto takes what there is"
        )
    device = torch.device(name)
    try:
        if name == "cuda":
            count = torch.cuda.device_count()
            if own >= count:
                raise InputError(f"this machine has {count} CUDA devices: start no more processes")
            torch.cuda.set_device(own)
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise InputError(
            f"{describe_device(device)} cannot be used ({first_line(error)}): end what else uses "
            "it, install a PyTorch that is built for it (pytorch.org/get-started), or use --device "
            "cpu"
        ) from error
    return device


def look_for_cuda():
    """Whether there is a CUDA device, and what PyTorch says of one that it cannot use, such as that
    its driver is too old; "" if nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    return has_cuda, str(caught[0].message).split(" (Triggered")[0] if caught else ""


def pick_precision(name, device, flag="--precision"):
    """`auto` takes what a CUDA device does natively, bf16, or else fp16 on tensor cores; and fp32
    elsewhere. On CPUs bf16 is faster or slower by the CPU and the network (docs/speed.md).

    Raises InputError, which names the flag, for what the device lacks.
    """
    torch.backends.cudnn.benchmark = True  # shapes are few: look for the fastest algorithm once
    if name == "fp16" and device.type != "cuda":
        raise InputError(
            f"fp16 training needs a CUDA device, this is {device.type}: use {flag} auto"
        )
    if name == "bf16" and device.type == "mps":
        raise InputError(f"bf16 is for CUDA and CPU, this is mps: use {flag} auto")
    is_cuda = device.type == "cuda"
    has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and is_cuda and not has_bf16:
        raise InputError(
            f"{describe_device(device)} does not multiply bf16, which came with Ampere: use "
            f"{flag} auto"
        )
    if name != "auto":
        return name
    if has_bf16:
        return "bf16"
    has_tensor_cores = is_cuda and torch.cuda.get_device_capability() >= (7, 0)
    return "fp16" if has_tensor_cores else "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """The context in which a model runs at this precision on this device."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def describe_device(device):
    """The device in words, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.processor()} GPU"
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    name = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    model = name[1] if name else platform.processor() or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {model}, {isa}, {torch.get_num_threads()} threads"


def progress_bar(iterable=None, **options):
    """tqdm, updated every half minute instead of ten times a second where it goes to a file."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(iterable, mininterval=interval, dynamic_ncols=True, **options)


def print_table(rows):
    """Print dictionaries as a Markdown table, a row each, under the first one's keys."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("|", " | ".join([line[0].ljust(widths[0]), *cells[1:]]), "|")


def cell(row, name, form, scale=1):
    """A figure of a row for a table, scaled, in Python's format; – where the row lacks it."""
    return f"{scale * row[name]:{form}}" if name in row else "–"


def versions():
    """Versions of what the figures of a run depend on."""
    names = ("torch", "torchvision", "numpy")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | packages


@contextlib.contextmanager
def download_timeout(seconds=20):
    """Within it, a download that gets no byte for so long fails instead of hanging."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def require(module, install="pip install -r requirements-dev.txt"):
    """A module of a package that only some scripts need. Raises InputError that says how to install
    it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} is needed here ({error}): {install}") from error


def import_torchvision():
    """torchvision, imported where it is needed: it is slow to load and picky about torch."""
    with explain_errors(
        lambda reason: f"torchvision does not load beside torch {torch.__version__} ({reason}): "
        "reinstall the two together with 'pip install --upgrade --force-reinstall torch "
        "torchvision'"
    ):
        import torchvision
    return torchvision
