"""From the constants at the top of a script to the settings of a run.

    EPOCHS: kind.Count = 100  # epochs of stage 2

is a setting: its name, what it may be, its value, and what it means. `parse_settings(globals())`
makes each a flag of the same name, `--epochs`, with the constant as its default, checks both, and
takes the help text from the comment, beside or above the constant.
"""

import argparse
import ast
import difflib
import re
import tokenize
from pathlib import Path

from common.kind import Kind, Switch, guess
from common.runtime import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage."""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        word = unknown[1].replace("_", "-") if unknown else ""
        known = [flag for action in self._actions for flag in action.option_strings]
        if near := difflib.get_close_matches(word, known, 1, 0.8):
            message += f": is {near[0]} meant?"
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def flag_value(value):
    """A constant as its flag takes it: (16, 32) → 16,32."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


class Settings:
    """The settings of a run: a lower-case name for each constant. They cannot be changed."""

    def __init__(self, values, file):
        vars(self).update(values, _file=file)

    def __setattr__(self, name, value):
        raise AttributeError("settings are fixed; use replace()")

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise InputError(f"{name.upper()} is missing in {self._file}: put it back")

    def replace(self, **changes):
        """A copy with other values."""
        return Settings(self.as_dict() | changes, self._file)

    def as_dict(self):
        return {name: value for name, value in vars(self).items() if name != "_file"}


def kinds_of(script, texts):
    """NAME → Kind of a script's settings, of its `globals()` and its `help_texts`. Raises
    InputError for a constant that is written without its kind where nothing else tells it."""
    kinds = script.get("__annotations__")
    if kinds is None:  # Python 3.14 makes them when they are asked for
        kinds = script["__annotate__"](1) if "__annotate__" in script else {}
    kinds = {name: kind for name, kind in kinds.items() if isinstance(kind, Kind)}
    for name, (section, _) in texts.items():
        if section and name in script and name not in kinds:
            kinds[name] = guess(name, script[name])
            if kinds[name] is None:
                raise InputError(
                    f"{name} in {Path(script['__file__']).name} lacks its kind, which stood "
                    f"between the name and the =: write '{name}: KIND = VALUE' again"
                )
    return kinds


def parse_settings(script, argv=(), preset=None, words=None):
    """The Settings of a run.

    Args:
        script: the script's `globals()`.
        argv: the words after the script's name. Without any, as where `main()` is called in a
            notebook, the constants count.
        preset: settings that take the place of the constants where DEMO or --demo is on; a flag
            beside --demo still wins.
        words: the name of a setting that takes the words without a flag, instead of a flag.

    Raises InputError for a constant that makes no sense. An unknown flag, or a flag's value that
    makes no sense, ends the program with exit code 2.
    """
    file = Path(script["__file__"])
    texts = help_texts(file)
    kinds = kinds_of(script, texts)
    parser = Parser(
        prog=file.name,
        usage="python %(prog)s [--flag VALUE ...]",  # a page long if it listed all
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {}
    for name, kind in kinds.items():
        section, comment = texts.get(name, (None, ""))
        section = section or "settings"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        options = {"type": kind.from_flag, "metavar": "VALUE"}
        if kind is Switch:
            options = {"action": argparse.BooleanOptionalAction}
        default = f"(default: {flag_value(script.get(name))})"
        flag = "--" + name.lower().replace("_", "-")
        if name.lower() == words:
            flag, options = words, {"nargs": "*", "metavar": name}
        groups[section].add_argument(
            flag, help=f"{comment} {default}".strip().replace("%", "%%"), **options
        )
    flags = vars(parser.parse_intermixed_args(argv) if words else parser.parse_args(argv))
    if words:
        try:
            flags[words] = kinds[words.upper()].check(flags.get(words) or script[words.upper()])
        except ValueError as error:
            parser.error(f"{words} {error}")

    def check(name, value, what=""):
        if name.upper() not in kinds:
            raise InputError(f"{name}{what} in {file.name} is not a setting")
        try:
            return kinds[name.upper()].check(value)
        except ValueError as error:
            raise InputError(f"{name}{what} in {file.name} {error}") from None

    constants = {name.lower(): check(name, script[name]) for name in kinds if name in script}
    demo = {}
    if preset and flags.get("demo", constants.get("demo")):
        demo = {name: check(name, value, " of the demo's settings")
                for name, value in preset.items()}
    return Settings(constants | demo | flags, file.name)


def help_texts(file):
    """NAME → (section, comment) for the constants at the top of a file, which ends at its first
    function or at the heading `# --- Not settings ---`. The section is that of the heading above,
    `# --- Student ---`, None where there is none; the comment stands beside the constant or above.
    """
    with tokenize.open(file) as opened:  # in the encoding that Python reads it in
        source = opened.read()
    lines = source.split("\n")
    headings = {row: match[1] for row, line in enumerate(lines, 1)
                if (match := re.fullmatch(r"# --- (.+) ---", line.rstrip()))}
    texts = {}
    for node in ast.parse(source).body:
        section = headings.get(max((row for row in headings if row < node.lineno), default=0))
        if section == "Not settings" or isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        # A statement ends before the comment beside it; columns are counted in bytes.
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        comment = behind.partition("#")[2].strip()
        first = row = node.lineno
        while first > 1 and first - 1 not in headings and lines[first - 2].startswith("#"):
            first -= 1  # the lines of a comment above
        if not comment:
            comment = " ".join(line.lstrip("#").strip() for line in lines[first - 1 : row - 1])
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        texts |= {target.id: (section, comment.strip()) for target in targets
                  if isinstance(target, ast.Name) and target.id.isupper()}
    return texts
