"""What a setting may be: `EPOCHS: kind.Count = 100` in a script is a whole number of at least 1."""

import argparse
import contextlib
import math
import os
from pathlib import Path

REFUSED = object()


class Kind:
    """What a setting may be.

    Args:
        read: a value (of a constant, or the word after a flag) → the setting. Raises ValueError,
            TypeError, OverflowError, RuntimeError or OSError for what makes no sense.
        means: what it must be, in words: "a whole number of at least 1".
        none: what None stands for; by default None is refused.
    """

    def __init__(self, read, means, none=REFUSED):
        self.read, self.means, self.none = read, means, none

    def check(self, value):
        """The setting. Raises ValueError that says what it must be."""
        is_none = value is None or (isinstance(value, str) and value.lower() == "none")
        if is_none and self.none is not REFUSED:
            return self.none
        try:
            return self.read(value)
        except RuntimeError:  # of expanduser
            raise ValueError(f"names a home folder that does not exist: {value!r}") from None
        except OSError as error:
            raise ValueError(
                f"names {value!r}, which cannot be reached ({error.strerror})"
            ) from None
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"must be {self.means}, got {value!r}") from None

    def from_flag(self, word):
        try:
            return self.check(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


def number(low, high=math.inf, above=False, none=REFUSED, is_whole=False):
    """A finite number from `low` to `high`; `above`: low itself is refused."""

    def read(value):
        number = math.nan if isinstance(value, bool) else float(value)
        is_inside = low <= number <= high and math.isfinite(number)
        if not is_inside or (above and number == low) or (is_whole and number != int(number)):
            raise ValueError
        return int(number) if is_whole else number

    means = "a whole number " if is_whole else "a number "
    means += f"above {low}" if above else f"of at least {low}"
    return Kind(read, means + (f" and at most {high}" if high < math.inf else ""), none)


def whole(low, high=math.inf, none=REFUSED):
    """A whole number from `low` to `high`; 1e3 is one as well."""
    return number(low, high, none=none, is_whole=True)


def one_of(*choices):
    def read(value):
        if value not in choices:
            raise ValueError
        return value

    return Kind(read, "one of " + ", ".join(choices))


def text(none=REFUSED):
    """A path, or a word in the place of one, as a string; ~ becomes the home folder."""

    def read(value):
        word = os.fspath(value)
        if not (isinstance(word, str) and word):
            raise ValueError
        word = str(Path(word).expanduser()) if word.startswith("~") else word
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            Path(word).stat()  # for a name that is too long, links in a circle, no permission
        return word

    return Kind(read, "a path or a word", none)


def file_path(*words, none=REFUSED):
    """A path; the words are keywords and returned unchanged."""

    def read(value):
        return value if value in words else Path(text().read(value))

    return Kind(read, " or ".join(["a path", *words]), none)


def several(kind, count=None, none=REFUSED):
    """Values of one kind: a tuple or list of them, or a string with commas between."""

    def read(values):
        if isinstance(values, str):
            values = [word.strip() for word in values.split(",")]
        elif not isinstance(values, (list, tuple)):
            values = [values]
        if len(values) != count if count else not values:
            raise ValueError
        return tuple(kind.check(value) for value in values)

    many = f"{count} values" if count else "one value or more"
    return Kind(read, f"{many}, separated by commas, each {kind.means}", none)


def read_switch(value):
    if not (isinstance(value, (bool, int)) and value in (0, 1)):
        raise ValueError
    return bool(value)


# The kinds that most settings are of.
AtLeast0 = number(0, none=0.0)
Positive = number(0, above=True)
PositiveOrNone = number(0, above=True, none=None)
Fraction = number(0, 1, none=0.0)
Count = whole(1)
CountOr0 = whole(0, none=0)
Seed = whole(0, 2**32 - 1)
Switch = Kind(read_switch, "True or False", none=False)  # flags --name and --no-name
Folder = file_path()
FileOrNone = file_path(none=None)
Weights = text(none="none")  # of VGG16: imagenet, random, none, or a path
Channels = several(whole(1), 4)
Device = one_of("auto", "cuda", "cpu", "mps")
Device.means += " (of several cards, CUDA_VISIBLE_DEVICES=1 picks the second)"
Precision = one_of("auto", "fp32", "bf16", "fp16")
PerceptualPrecision = one_of("auto", "fp32", "bf16")  # fp16 needs an fp16 run's scaling


# --- Settings that are written without a kind, as `EPOCHS = 150` ---

# By its name, or by the last word of it. Other numbers are of at least 0, True and False are
# switches. Of any other value, a word above all, the kind must be written: "no" is not False.
BY_NAME = {
    "DATA": text(none=None), "VGG": Weights, "JUDGE": Weights,
    "TEACHER": file_path("train", none=None), "STUDENT": FileOrNone, "START": FileOrNone,
    "FOLDER": FileOrNone, "DIR": Folder,
    "RATE": PositiveOrNone, "LEARNING_RATE": Positive, "TEACHER_LEARNING_RATE": Positive,
    "DEVICE": Device, "PRECISION": Precision, "PERCEPTUAL_PRECISION": PerceptualPrecision,
    "WARMUP": Fraction, "TEACHER_IMAGES": Fraction,
    "EPOCHS": Count, "BATCH_SIZE": whole(2), "DIM": Count, "CHANNELS": Channels, "EVERY": Count,
    "SEED": Seed, "LIMIT": CountOr0, "IMAGES": CountOr0, "JUDGED": CountOr0,
}


def guess(name, value):
    """The kind of a setting from its name and its value; None where they do not tell."""
    known = BY_NAME.get(name, BY_NAME.get(name.rpartition("_")[2]))
    if known and (known is Channels or not isinstance(value, (tuple, list))):
        return known
    if isinstance(value, bool):
        return Switch
    return AtLeast0 if isinstance(value, (int, float)) else None
