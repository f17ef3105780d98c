"""What a run leaves on disk: checkpoints, tables, records. Each is written whole or not at all."""

import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common.runtime import InputError, explain_errors, require


def write_bytes(path, content):
    """Replace a file by `content` in one step: a reader, a crash or a power cut finds the old or
    the new. On Linux and macOS the new one is on the disk when this returns.

    Raises InputError where the folder is missing or cannot be written, and where the disk is full;
    the old file stays. Folders are made by `check_writable`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another may write it as well
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder is what is wrong; the first error says so
            temporary.unlink()
        remedy = "free some space or choose another folder"
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            remedy = "its folder was removed, renamed or replaced; put it back and try again"
        raise InputError(f"could not write {path} ({error.strerror}): {remedy}") from error
    with contextlib.suppress(OSError):  # the file itself is written
        remove_left_over(path)


def remove_left_over(path):
    """Remove temporary files of `path` whose process was killed."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        process = temporary.name.split(".")[-2]
        if process.isdigit() and not is_running(int(process)):
            temporary.unlink(missing_ok=True)


def is_running(process):
    if os.name != "posix":  # elsewhere os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def sync_folder(folder):
    """Have the names in a folder on the disk, where the system can do that: Windows has no
    descriptors of folders, and some network file systems refuse to sync one."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_writable(folder):
    """Create a folder and check that it can be written, before the work starts."""
    trial = Path(folder) / "write_test"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"could not make the folder {folder} ({error.strerror}): choose another one"
        ) from error
    write_bytes(trial, b"")
    trial.unlink(missing_ok=True)  # another process may try the same folder


@contextlib.contextmanager
def locked(folder, wait=False, name=".lock"):
    """Within it, no other process gets the lock of this name in a folder; it ends with its process.

    Raises InputError where another process holds it, unless told to wait.
    """
    path = Path(folder) / name
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise InputError(
            f"another run is writing into {folder}: wait until it has ended, or name another folder"
        ) from None
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path, record):
    write_bytes(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path, columns, rows):
    """Rows are dictionaries: what a row lacks stays empty, what is no column is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path):
    """The rows of a table: dictionaries of strings."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_checkpoint(path, checkpoint):
    """Write tensors, numbers, strings, lists and dictionaries: what `weights_only=True` reads."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes(path, buffer.getbuffer())


def fingerprint(module):
    """The same for the same weights: the start of a hash over a module's state dict."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_checkpoint(path):
    """Read a checkpoint, or a .safetensors file, onto the CPU. Raises InputError if it is missing,
    damaged or holds code."""
    with explain_errors(
        lambda _: f"{path} is damaged or not a PyTorch checkpoint: delete it, or restore a copy"
    ):
        try:
            if Path(path).exists() and not Path(path).is_file():  # a device may have no end
                raise OSError(errno.EINVAL, "a folder or a device, not a file")
            if Path(path).suffix == ".safetensors":
                checkpoint = require("safetensors.torch", "pip install safetensors").load_file(path)
            else:
                refuse_compressed(path)
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"there is no checkpoint {path}: train one, or name another") from None
        except OSError as error:
            raise InputError(f"could not read {path} ({error.strerror})") from error
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} is not a checkpoint of plain data and was not loaded, since what else it "
                "holds could run code: use one that this project wrote"
            ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def refuse_compressed(path):
    """Raise ValueError for an archive that may unpack to more than it holds; torch.save does not
    compress."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed")


def refuse_other_weights(weights, expected):
    """Raise ValueError unless weights are finite and of the names, shapes and types expected."""
    if not isinstance(weights, dict):
        raise ValueError(f"a {type(weights).__name__} in place of a state dict")
    if others := sorted(map(str, set(weights) ^ set(expected))):
        raise ValueError(f"other layers, of which {others[0]} is in one alone")
    for name, tensor in weights.items():
        is_tensor = isinstance(tensor, torch.Tensor)
        if not is_tensor or tensor.shape != expected[name].shape:
            shape = list(tensor.shape) if is_tensor else type(tensor).__name__
            what = f"{name} is {shape}, not {list(expected[name].shape)}"
            # The width of this one is channels × positions; its height, latents.
            if is_tensor and name == "fc_mu.weight" and len(tensor) == len(expected[name]):
                what += ": it may be made for images of another size than 32×32"
            raise ValueError(what)
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.layout}, not dense")
        # Stored in half precision, weights are loaded into single precision.
        is_half = tensor.dtype in (torch.half, torch.bfloat16)
        is_half = is_half and expected[name].is_floating_point()
        if tensor.dtype != expected[name].dtype and not is_half:
            raise ValueError(f"{name} is {tensor.dtype}, not {expected[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
