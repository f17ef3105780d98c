"""From the constants at the top of a script to the settings of a run.

A script's hyperparameters are plain UPPER_CASE assignments, and it declares what each may be:

    EPOCHS = 100  # epochs of stage 2

    KINDS = {"EPOCHS": whole(1)}

`parse_settings(globals())` makes each a flag of the same name, `--epochs`, with the constant as its
default, and checks both. Only the help text of a flag is read from the comment, beside or above
the constant; without a comment the flag has no help text and is otherwise the same.
"""

import argparse
import ast
import contextlib
import io
import math
import os
import re
import tokenize
from pathlib import Path

from runtime import InputError

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


def must(condition):
    if not condition:
        raise ValueError


def to_float(value):
    must(not isinstance(value, bool))
    return float(value)


def number(low=-math.inf, high=math.inf, above=False, none=REFUSED):
    """A finite number from `low` to `high`; `above`: low itself is refused."""

    def read(value):
        found = to_float(value)
        must(math.isfinite(found) and low <= found <= high and not (above and found == low))
        return found

    means = f"a number above {low:g}" if above else f"a number of at least {low:g}"
    return Kind(read, means + (f" and at most {high:g}" if high < math.inf else ""), none)


def whole(low, high=math.inf, none=REFUSED):
    """A whole number from `low` to `high`; 1e3 is one as well."""

    def read(value):
        found = to_float(value)
        must(found == int(found) and low <= found <= high)
        return int(found)

    limit = f" and at most {high}" if high < math.inf else ""
    return Kind(read, f"a whole number of at least {low}{limit}", none)


def switch():
    """True or False; the flags are --name and --no-name."""

    def read(value):
        must(isinstance(value, (bool, int)) and value in (0, 1))
        return bool(value)

    return Kind(read, "True or False", none=False)


def one_of(*choices):
    def read(value):
        must(value in choices)
        return value

    return Kind(read, "one of " + ", ".join(choices))


def text(none=REFUSED):
    """A path, or a word in the place of one, as a string; ~ becomes the home folder."""

    def read(value):
        found = os.fspath(value)
        must(isinstance(found, str) and found)
        found = str(Path(found).expanduser()) if found.startswith("~") else found
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            Path(found).stat()  # for a name that is too long, links in a circle, no permission
        return found

    return Kind(read, "a path or a word", none)


def file_path(*words, none=REFUSED):
    """A path; each of the words means something else and stays as it is."""

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
        must(len(values) == count if count else values)
        return tuple(kind.read(value) for value in values)

    many = f"{count} values" if count else "one value or more"
    return Kind(read, f"{many}, separated by commas, each {kind.means}", none)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def as_word(value):
    """A constant as its flag takes it: (16, 32) → 16,32."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def parse_settings(script, argv=None, preset=None):
    """The settings of a run, as a namespace with a lower-case name for each constant.

    Args:
        script: the script's `globals()`, with KINDS.
        argv: the words after the script's name; None reads the command line.
        preset: settings that take the place of the constants where DEMO or --demo is on; a flag
            beside --demo still wins.

    Raises InputError for a constant that makes no sense. An unknown flag, or a flag's value that
    makes no sense, ends the program with exit code 2.
    """
    kinds, file = script["KINDS"], Path(script["__file__"])
    parser = Parser(
        prog=file.name,
        usage="python %(prog)s [--flag VALUE ...]",  # a page long if it listed all
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {}
    helps = help_texts(file)
    is_switch = switch().means
    for name, kind in kinds.items():
        section, comment = helps.get(name, ("settings", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        options = {"type": kind.from_flag, "metavar": "VALUE"}
        if kind.means == is_switch:
            options = {"action": argparse.BooleanOptionalAction}
        default = f"(default: {as_word(script.get(name))})"
        groups[section].add_argument(
            "--" + name.lower().replace("_", "-"),
            help=f"{comment} {default}".strip().replace("%", "%%"),
            **options,
        )
    flags = vars(parser.parse_args(argv))

    constants = {}
    for name, kind in kinds.items():
        if name not in script:
            raise InputError(f"{name} is missing in {file.name}: it must be {kind.means}")
        try:
            constants[name.lower()] = kind.check(script[name])
        except ValueError as error:
            raise InputError(f"{name} in {file.name} {error}") from None
    demo = {}
    if preset and flags.get("demo", constants.get("demo")):
        for name, value in preset.items():
            what = f"{name} of the demo's settings in {file.name}"
            if name.upper() not in kinds:
                raise InputError(f"{what} is not a setting")
            try:
                demo[name] = kinds[name.upper()].check(value)
            except ValueError as error:
                raise InputError(f"{what} {error}") from None
    return argparse.Namespace(**constants | demo | flags)


def help_texts(file):
    """NAME → (section, comment) for the constants of a file; nothing if it cannot be read."""
    try:
        with tokenize.open(file) as opened:  # in the encoding that Python reads it in
            source = opened.read()
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, SyntaxError, UnicodeError, tokenize.TokenError):
        return {}
    comments, whole_lines = {}, set()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if token.line.lstrip().startswith("#"):
                whole_lines.add(token.start[0])
    headings = {row: found[1] for row, comment in comments.items()
                if (found := re.fullmatch(r"--- (.+) ---", comment))}
    found = {}
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        comment = comments.get(node.end_lineno, "")
        if not comment:  # the lines of a comment above
            first = row = node.lineno
            while first - 1 in whole_lines and first - 1 not in headings:
                first -= 1
            comment = " ".join(comments[line] for line in range(first, row)).strip()
        section = headings.get(max((r for r in headings if r < node.lineno), default=0), "settings")
        found |= {target.id: (section, comment) for target in targets
                  if isinstance(target, ast.Name)}
    return found
