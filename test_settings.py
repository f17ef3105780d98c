"""Settings: constants as users edit them, flags, and what is refused, for every script."""

import ast
import functools
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comparison
import distill_tinyvae
import losses
import runtime
import settings
from runtime import InputError
from settings import parse_settings
from testing import HERE, folders, on_posix

SCRIPTS = (
    "distill_tinyvae", "test_trained_model", "ablate_distillation", "bench_training", "bench_peers",
    "export_tinyvae", "prune_tinyvae", "search_architecture", "progressive_distillation",
    "bench_scaling", "fault_campaign",
)


def find_kinds(name):
    try:
        return getattr(importlib.import_module(name), "KINDS", {})
    except ImportError:
        return {}


# test_every_script_declares_its_settings fails for one that is missing here.
KINDS = {name: kinds for name in SCRIPTS if (kinds := find_kinds(name))}
CONSTANTS = [(script, name) for script, kinds in KINDS.items() for name in kinds]
each_script = pytest.mark.parametrize("script", KINDS)
each_constant = pytest.mark.parametrize(("script", "name"), CONSTANTS)


def source_of(script):
    return (HERE / f"{script}.py").read_text(encoding="utf-8")


@functools.cache
def assignments(script):
    """name → the one statement that assigns a constant."""
    nodes = [node for node in ast.parse(source_of(script)).body if isinstance(node, ast.Assign)]
    found = {name: [n for n in nodes if [ast.unparse(t) for t in n.targets] == [name]]
             for name in KINDS[script]}
    assert all(len(nodes) == 1 for nodes in found.values())
    return {name: node for name, (node,) in found.items()}


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_declares_its_settings(script):
    assert find_kinds(script)
    # A constant with a comment beside it reads like a setting: it must be one, and no other is.
    constants = re.findall(
        r"^([A-Z][A-Z0-9_]*) = .*  # ", source_of(script).split("\nKINDS = ")[0], re.MULTILINE
    )
    assert sorted(constants) == sorted(find_kinds(script))


@each_script
def test_no_constant_is_read_in_place_of_its_setting(script):
    # Its flag would do nothing.
    body = [node for node in ast.parse(source_of(script)).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    assert len(names) > 10
    assert not names & set(KINDS[script])


def help_texts(shown):
    """What --help shows: flag → its text."""
    entries = re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]
    found = [re.match(r"(--[\w-]+)(?:, --no-[\w-]+| VALUE)\s+(.*)", entry) for entry in entries]
    return {match[1]: match[2] for match in found if match}


# --- Edits of the constants in the source ---


class Editor:
    """A script's copy in a folder of its own, one constant of it edited."""

    def __init__(self, folder, script):
        self.path, self.source = folder / f"{script}.py", source_of(script)
        self.assignments = assignments(script)

    def value(self, name):
        """The value of a constant as it is written."""
        return ast.unparse(self.assignments[name].value)

    def load(self, name=None, text=""):
        """The module with this text in place of the lines that assign the constant."""
        lines = self.source.splitlines()
        if name:
            node = self.assignments[name]
            lines[node.lineno - 1 : node.end_lineno] = text.splitlines()
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def settings(self, name=None, text="", flags=()):
        return vars(parse_settings(vars(self.load(name, text)), list(flags)))

    def help(self, name, text, capsys):
        """The help text of each flag."""
        with pytest.raises(SystemExit) as stop:
            self.settings(name, text, ["--help"])
        assert stop.value.code == 0
        return help_texts(capsys.readouterr().out)


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Makes an Editor of a script."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file changes within a second
    monkeypatch.setenv("COLUMNS", "1000")  # help texts in one line
    return lambda script: Editor(tmp_path, script)


PATHLIB = '__import__("pathlib").Path("some") / "folder"'
NOT_ONE_VALUE = ["object()", "[]", 'float("nan")', 'b"bytes"']


def parse_kind(kind):
    """What a kind is and takes, read from its own words: (name, low, high, above, rest)."""
    means = kind.means
    for start, name in (
        ("True or False", "switch"), ("one of ", "choice"), ("a path or a word", "text"),
        ("a path", "path"), ("conditions like ", "words"), ("a shape like ", "words"),
    ):
        if means.startswith(start):
            return name, None, None, False, means.removeprefix(start)
    found = re.fullmatch(
        r"a (whole )?number (of at least|above) (-?[\w.]+)(?: and at most ([\w.]+))?", means
    )
    if found:
        whole, above, low, high = found.groups()
        name = "whole" if whole else "number"
        return name, float(low), float(high or math.inf), above == "above", ""
    found = re.fullmatch(r"(one value or more|\d+ values), separated by commas, each (.*)", means)
    return "several", None, None, False, found.groups()


def sensible(kind):
    """[(source of a value, the setting it makes)] as users may write it."""
    name, low, high, above, rest = parse_kind(kind)
    if name == "switch":
        return [("True", True), ("False", False), ("1", True), ("not 1", False)]
    if name == "words":  # the example that its own words give
        example = re.match(r"[^ ]*[^ ,]", rest)[0]
        read = comparison.shape() if "shape" in kind.means else kind
        return [(repr(example), read.check(example))]
    if name == "choice":
        return [(repr(choice), choice) for choice in rest.split(", ")]
    if name == "text":
        return [
            ('"word"', "word"), ('"a" + "b"', "ab"), (PATHLIB, "some/folder"),
            ('"~/word"', str(Path.home() / "word")),
        ]
    if name == "path":
        return [
            ('"ck"', Path("ck")), (PATHLIB, Path("some/folder")), ('"a" + "b"', Path("ab")),
            ('"~/ck"', Path.home() / "ck"),
        ]
    if name == "several":
        count, each = rest
        count = 1 if count == "one value or more" else int(count.split()[0])
        (text, value), *_ = sensible(settings.Kind(None, each))
        found = [
            (f"({f'{text}, ' * count})", (value,) * count),
            (f"[{f'{text}, ' * count}]", (value,) * count),
            (repr(",".join([str(ast.literal_eval(text))] * count)), (value,) * count),
            (f"({text},) * {count}", (value,) * count),
        ]
        return [*found, (text, (value,))] if count == 1 else found
    inside = [n for n in (1, 2, 20, 100) if low <= n <= high and not (above and n == low)]
    made = int if name == "whole" else float
    found = [(str(inside[0]), made(inside[0])), (f"{inside[0]}.0", made(inside[0]))]
    if 20 in inside:
        found += [("2 * 10", made(20)), ("2e1", made(20))]
    elif name == "number":
        found += [(f"{inside[0]} / 2 + {inside[0]} / 2", made(inside[0]))]
    return found


def senseless(kind):
    """Sources of values that must be refused."""
    name, low, high, above, rest = parse_kind(kind)
    if name == "switch":
        return [*NOT_ONE_VALUE, '"nonsense"', "2", "0.5"]
    if name == "choice":
        return [*NOT_ONE_VALUE, '"nonsense"', '""', "1", "True"]
    if name in ("text", "path", "words"):
        return [*NOT_ONE_VALUE, "1", "1.5", "True", '""']
    if name == "several":
        count, each = rest
        each = settings.Kind(None, each)
        (text, _), *_ = sensible(each)
        found = [*NOT_ONE_VALUE, *(f"({bad}, )" for bad in senseless(each))]
        return found if count == "one value or more" else [*found, f"({text}, )", text]
    found = [*NOT_ONE_VALUE, '"nonsense"', '""', 'float("inf")', "True", "1j"]
    found += ["1.5"] if name == "whole" else []
    found += [f"{low:.0f} - 1"] if low > -math.inf else []
    found += [f"{low}"] if above else []
    found += [f"{high:.0f} + 1"] if high < math.inf else []
    return found


@each_constant
def test_the_comment_of_a_constant_is_help_and_nothing_else(script, name, edit, capsys):
    editor = edit(script)
    expected = editor.settings()
    value, flag = editor.value(name), flag_of(name)
    comment = "a comment, of 100% of it"
    assert editor.settings(name, f"{name} = {value}") == expected
    assert editor.help(name, f"{name} = {value}", capsys)[flag].startswith("(default: ")
    for text in (f"{name} = {value} # {comment}", f"# {comment}\n{name} = {value}"):
        assert editor.settings(name, text) == expected
        assert editor.help(name, text, capsys)[flag].startswith(f"{comment} (default: ")


@pytest.mark.parametrize(
    ("above", "text"),
    [("# a text,\n# of two lines", "a text, of two lines"), ("#\n# one\n#", "one"), ("#", "")],
)
def test_a_comment_above_may_have_several_lines_and_empty_ones(above, text, edit, capsys):
    shown = edit("distill_tinyvae").help("EPOCHS", f"{above}\nEPOCHS = 7", capsys)
    assert shown["--epochs"] == f"{text} (default: 7)".strip()


@pytest.mark.parametrize(
    ("encoding", "first"), [("utf-8-sig", ""), ("latin-1", "# -*- coding: latin-1 -*-\n")]
)
def test_a_script_in_another_encoding_works(encoding, first, edit, capsys):
    editor = edit("distill_tinyvae")
    module = editor.load("EPOCHS", "EPOCHS = 7  # Übungen")
    source = editor.path.read_text(encoding="utf-8")
    editor.path.write_text(first + source.replace("→", "->"), encoding=encoding, errors="replace")
    assert parse_settings(vars(module), []).epochs == 7
    with pytest.raises(SystemExit):
        parse_settings(vars(module), ["--help"])
    assert help_texts(capsys.readouterr().out)["--epochs"] == "Übungen (default: 7)"


@each_constant
def test_a_constant_takes_what_makes_sense(script, name, edit):
    editor = edit(script)
    kind, expected = KINDS[script][name], editor.settings()
    values = sensible(kind)
    if kind.none is not settings.REFUSED:
        values += [("None", kind.none), ('"none"', kind.none)]
    assert len(values) > 1
    for text, value in values:
        found = editor.settings(name, f"{name} = {text}")
        assert found == expected | {name.lower(): value}, text
        assert type(found[name.lower()]) is type(value), text


@each_constant
def test_a_constant_that_makes_no_sense_is_named_in_a_sentence(script, name, edit):
    editor = edit(script)
    kind = KINDS[script][name]
    texts = senseless(kind) + (["None"] if kind.none is settings.REFUSED else [])
    for text in texts:
        module = editor.load(name, f"{name} = {text}")
        with pytest.raises(InputError) as refused:
            parse_settings(vars(module), [])
        said = str(refused.value)
        assert said.startswith(f"{name} in {script}.py must be {kind.means}, got "), text
        assert "\n" not in said and not re.search(r"[.!?] ", said), text


@each_constant
def test_a_constant_that_was_deleted_is_named(script, name, edit):
    with pytest.raises(InputError, match=rf"^{name} is missing in {script}\.py: it must be "):
        edit(script).settings(name)


@on_posix
def test_a_path_that_the_system_refuses_is_named(edit, tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path, reason in ((circle, "Too many levels"), ("x" * 300, "File name too long")):
        for name in ("DATA", "TEACHER", "CHECKPOINT_DIR"):
            message = f"{name} in .* names '.*', which cannot be reached .{reason}"
            with pytest.raises(InputError, match=message):
                edit("distill_tinyvae").settings(name, f"{name} = {str(path)!r}")
    with pytest.raises(InputError, match=r"DATA in .* must be a path or a word, got 'a\\x00b'"):
        edit("distill_tinyvae").settings("DATA", 'DATA = "a\\0b"')


def test_a_home_folder_that_does_not_exist_is_named(edit):
    for name in ("DATA", "TEACHER", "CHECKPOINT_DIR"):
        with pytest.raises(InputError) as refused:
            edit("distill_tinyvae").settings(name, f'{name} = "~no-such-user/ck"')
        assert str(refused.value) == (
            f"{name} in distill_tinyvae.py names a home folder that does not exist: "
            "'~no-such-user/ck'"
        )


def test_a_flag_is_of_its_kind_whatever_type_the_constant_has(edit):
    editor = edit("distill_tinyvae")
    found = editor.settings("KL_WEIGHT", "KL_WEIGHT = 1", ["--kl-weight", "0.5"])
    assert found["kl_weight"] == 0.5
    found = editor.settings("EPOCHS", "EPOCHS = 3.0", ["--epochs", "4"])
    assert found["epochs"] == 4
    found = editor.settings("TEACHER", 'TEACHER = "a.pth"', ["--teacher", "none"])
    assert found["teacher"] is None
    found = editor.settings("TEACHER", "TEACHER = None", ["--teacher", "train"])
    assert found["teacher"] == "train"
    found = editor.settings("CHECKPOINT_DIR", 'CHECKPOINT_DIR = "ck"', ["--checkpoint-dir", "x"])
    assert found["checkpoint_dir"] == Path("x")
    found = editor.settings("GRAPH", "GRAPH = 0", ["--graph"])
    assert found["graph"] is True


def test_a_script_with_a_bad_constant_ends_with_a_sentence_and_nothing_else(edit, tmp_path):
    editor = edit("distill_tinyvae")
    editor.load("EPOCHS", 'EPOCHS = "many"')
    done = subprocess.run(
        [sys.executable, editor.path], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True, text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: EPOCHS in distill_tinyvae.py must be a whole number of at least 1, got 'many'\n"
    )
    assert list(tmp_path.iterdir()) == [editor.path]


# --- Flags ---


def parse(script, *flags):
    return parse_settings(vars(importlib.import_module(script)), list(flags))


def refused_with(capsys, script, *flags):
    """What is written to stderr where flags end a script with exit code 2: one line."""
    with pytest.raises(SystemExit) as stop:
        parse(script, *flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@each_script
def test_help_lists_every_flag_with_its_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    shown = help_texts(capsys.readouterr().out)
    assert set(shown) == {flag_of(name) for name in KINDS[script]}
    for name, kind in KINDS[script].items():
        comment, default = shown[flag_of(name)].removesuffix(")").split(" (default: ")
        assert comment
        value = kind.check(getattr(module, name))
        if isinstance(value, bool):
            assert default == str(value)
        else:  # it is a word that the flag takes
            assert kind.from_flag(default) == value


@each_script
def test_without_flags_the_constants_are_the_settings(script):
    module = importlib.import_module(script)
    found = vars(parse(script))
    assert set(found) == {name.lower() for name in KINDS[script]}
    for name, kind in KINDS[script].items():
        assert found[name.lower()] == kind.check(getattr(module, name))


@each_script
def test_unknown_and_abbreviated_flags_are_refused(script, capsys):
    assert "--nonsense" in refused_with(capsys, script, "--nonsense", "1")
    for name in KINDS[script]:
        short = flag_of(name)[:-1]
        if short not in map(flag_of, KINDS[script]):
            assert short in refused_with(capsys, script, f"{short}=1")


@each_script
def test_flags_that_make_no_sense_are_refused_and_named(script, capsys):
    for name, kind in KINDS[script].items():
        what, low, *_ = parse_kind(kind)
        words = [""]
        if what in ("choice", "number", "whole"):
            words += ["nonsense", "nan"]
        if what in ("number", "whole") and low > -math.inf:
            words += [str(low - 1)]
        if what == "whole":
            words += ["1.5"]
        if kind.none is settings.REFUSED and what in ("choice", "number", "whole"):
            words += ["none"]
        for word in words:
            assert f"argument {flag_of(name)}" in refused_with(
                capsys, script, f"{flag_of(name)}={word}"
            ), word


@pytest.mark.parametrize(
    "flags",
    [
        ("--epoch", "3"),  # no abbreviations, so that a typo is not another flag
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--batch-size", "1"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "-1"),
        ("--kl-weight", "-0.1"),
        ("--kl-scale", "0"),
        ("--temperature", "0"),
        ("--encoder-channels", "16,32,64"),
        ("--device", "tpu"),
        ("--precision", "int8"),
        ("--projection", "none"),
        ("--limit", "-5"),
        ("--seed", "-1"),
        ("--data", ""),
    ],
)
def test_flags_that_make_no_sense_stop_the_script_before_any_work(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        distill_tinyvae.main([*folders(tmp_path), *flags])
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_that_of_the_design():
    found = parse("distill_tinyvae")
    assert (found.teacher_epochs, found.epochs, found.batch_size) == (20, 100, 64)
    assert found.teacher == "train"
    assert (found.optimizer, found.learning_rate, found.temperature) == ("muon", 3e-3, 3.0)
    assert [getattr(found, f"{term}_weight") for term in losses.TERMS] == [0.3, 0.1, 0.3, 0.2, 0.1]
    assert (found.kl_scale, found.perceptual_scale, found.perceptual_images) == (0.4, 4.0, 6)
    assert (found.projection, found.vgg) == ("pixels", "imagenet")


# --- The demo ---


def parse_demo(module, *flags):
    return parse_settings(vars(module), list(flags), distill_tinyvae.DEMO_SETTINGS)


def test_a_flag_beside_demo_wins(edit):
    found = parse_demo(distill_tinyvae, "--epochs", "2", "--demo")
    assert (found.epochs, found.data) == (2, "photo-crops")
    editor = edit("distill_tinyvae")
    module = editor.load("DEMO", "DEMO = True")
    found = parse_demo(module, "--epochs", "2")
    assert (found.epochs, found.data) == (2, "photo-crops")
    found = parse_demo(module, "--no-demo")
    assert (found.epochs, found.data) == (module.EPOCHS, module.DATA)
    module = editor.load("EPOCHS", "EPOCHS = 7")  # a constant gives way to the demo
    assert parse_demo(module, "--demo").epochs == distill_tinyvae.DEMO_SETTINGS["epochs"]
    assert parse_demo(module).epochs == 7


def test_the_demos_settings_are_checked_like_constants(edit):
    for name, value in distill_tinyvae.DEMO_SETTINGS.items():
        assert distill_tinyvae.KINDS[name.upper()].check(value) == value
    module = edit("distill_tinyvae").load()
    with pytest.raises(InputError) as refused:
        parse_settings(vars(module), ["--demo"], {"epochs": "many"})
    assert str(refused.value) == (
        "epochs of the demo's settings in distill_tinyvae.py must be a whole number of at least "
        "1, got 'many'"
    )
    with pytest.raises(InputError) as refused:
        parse_settings(vars(module), ["--demo"], {"epoch": 3})
    assert str(refused.value) == (
        "epoch of the demo's settings in distill_tinyvae.py is not a setting"
    )
    assert parse_settings(vars(module), [], {"epochs": "many"}).epochs == module.EPOCHS


# --- Device and precision ---


def test_devices_and_precisions_that_are_missing_are_refused():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device"):
            runtime.pick_device("cuda")
    with pytest.raises(InputError, match="fp16 training needs a CUDA device, this is cpu"):
        runtime.pick_precision("fp16", torch.device("cpu"))
    assert runtime.pick_precision("auto", torch.device("cpu")) == "fp32"


# --- Importing ---


def test_importing_a_script_does_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"import {', '.join(KINDS)}, torch\n"
        "assert not {'torchvision', 'onnx', 'onnxruntime', 'torch_pruning'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
