"""Settings: constants as users edit them, flags, and what is refused, for every script."""

import ast
import contextlib
import functools
import importlib
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import distill_tinyvae
from common import kind, losses, runtime
from common.runtime import InputError
from common.settings import help_texts, kinds_of, parse_settings
from tests.testing import HERE, folders, on_posix

FILES = [*HERE.glob("*.py"), *HERE.glob("benchmarks/*.py"), HERE / "tests" / "fault_campaign.py"]
SCRIPTS = sorted(
    ".".join(file.relative_to(HERE).with_suffix("").parts)
    for file in FILES if "parse_settings(globals()" in file.read_text(encoding="utf-8")
)
each_script = pytest.mark.parametrize("script", SCRIPTS)
HOME = Path.home()


@functools.cache
def load(script="distill_tinyvae"):
    """A script's constants, its kinds, and the names of settings that can do without theirs."""
    constants = vars(importlib.import_module(script))
    kinds = kinds_of(constants, help_texts(constants["__file__"]))
    return constants, kinds, [name for name in kinds if kind.guess(name, constants[name])]


def without_kinds(script="distill_tinyvae"):
    """A script's constants, without the annotations that it can do without."""
    constants, kinds, guessed = load(script)
    return constants | {"__annotations__": {n: k for n, k in kinds.items() if n not in guessed}}


def parse(constants, *flags):
    return parse_settings(constants, list(flags)).as_dict()


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def refused(constants):
    """The sentence that constants are refused with."""
    with pytest.raises(InputError) as error:
        parse(constants)
    assert not re.search(r"\n|[.!?] ", str(error.value))
    return str(error.value)


@pytest.fixture
def printed(capsys, monkeypatch):
    """Calls `parse`, which ends the program, and returns what that prints."""
    monkeypatch.setenv("COLUMNS", "1000")

    def call(constants, *flags):
        with pytest.raises(SystemExit, match="^0$" if flags == ("--help",) else "^2$"):
            parse(constants, *flags)
        return "".join(capsys.readouterr())

    return call


def read_help(text):
    """What --help prints: flag → (comment, default)."""
    entry = r"^  (--[\w-]+)(?:, --no-[\w-]+| VALUE)\s+(?:(.*) )?\(default: (.*)\)$"
    return {flag: found for flag, *found in re.findall(entry, text, re.MULTILINE)}


# --- What each kind takes ---


@pytest.mark.parametrize(
    ("of", "means", "taken", "not_taken"),
    [
        (kind.AtLeast0, "a number of at least 0", [(0, 0.0), ("1e-3", 0.001), ("NONE", 0.0)], [-1]),
        (kind.PositiveOrNone, "a number above 0", [(0.1, 0.1), (None, None)], [0, True, "word"]),
        (kind.number(50, 100, above=True), "a number above 50 and at most 100",
         [(50.1, 50.1), (100, 100.0)], [50, 100.1, None, "none"]),
        (kind.whole(2), "a whole number of at least 2",
         [(2, 2), (3.0, 3), ("4", 4), ("1e3", 1000)], [1, 2.5, "2.5", True, "word", None]),
        (kind.Seed, "a whole number of at least 0 and at most 4294967295",
         [(0, 0), (2**32 - 1, 2**32 - 1)], [-1, 2**32]),
        (kind.Switch, "True or False",
         [(True, True), (1, True), (0, False), (None, False)], [2, 0.5, "word"]),
        (kind.one_of("a", "b"), "one of a, b", [("a", "a"), ("b", "b")], ["c", 1, True, None]),
        (kind.Weights, "a path or a word", [("word", "word"), (Path("a") / "b", "a/b"),
         ("~/a", str(HOME / "a")), (None, "none")], [1, 1.5, True, "a\0b"]),
        (kind.file_path("train"), "a path or train",
         [("train", "train"), ("a", Path("a")), ("~/a", HOME / "a")], [1, True, None]),
        (kind.several(kind.Fraction, 2),
         "2 values, separated by commas, each a number of at least 0 and at most 1",
         [((0, 1), (0.0, 1.0)), ([0.5, None], (0.5, 0.0)), ("none, 1", (0.0, 1.0))], [1, (0, 2)]),
        (kind.several(kind.Count), "one value or more, separated by commas, each a whole number of "
         "at least 1", [(1, (1,)), ((1, 2.0), (1, 2))], [(), (1, 0), None]),
    ],
)
def test_a_kind_takes_what_it_says(of, means, taken, not_taken):
    for value, expected in taken:
        assert (of.check(value), type(of.check(value))) == (expected, type(expected))
    for value in (*not_taken, math.nan, math.inf, "", [], 1j, b"bytes", object()):
        with pytest.raises(ValueError) as error:
            of.check(value)
        assert str(error.value) == f"must be {means}, got {value!r}"


@on_posix
@pytest.mark.parametrize("name", ["DATA", "TEACHER", "CHECKPOINT_DIR"])
def test_a_path_that_cannot_be_is_named(name, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, message in (
        ("~no-such-user/ck", "names a home folder that does not exist: '~no-such-user/ck'$"),
        (tmp_path / "circle", r"names .*circle.*, which cannot be reached \(Too many levels"),
        ("x" * 300, r"names 'x+', which cannot be reached \(File name too long"),
    ):
        said = refused(load()[0] | {name: path})
        assert re.match(f"{name} in distill_tinyvae.py {message}", said)


# --- The constants of each script ---

VALUES = (True, 0, 1, 20, 0.5, "word", "val", "a/b.pth", Path("a"), "20", None, "none",
          (8, 16, 32, 64), "8,16,32,64", [8, 16])


def taken_by(kinds, value):
    """The settings that a value makes of the constants that take it."""
    taken = {}
    for name, of in kinds.items():
        with contextlib.suppress(ValueError):
            taken[name] = of.check(value)
    return taken


@each_script
def test_a_constant_takes_what_its_kind_takes_and_is_named_otherwise(script):
    constants, kinds, _ = load(script)
    defaults = {name.lower(): kinds[name].check(constants[name]) for name in kinds}
    assert parse(constants) == defaults and len(defaults) > 2
    for value in VALUES:
        taken = taken_by(kinds, value)
        expected = defaults | {name.lower(): setting for name, setting in taken.items()}
        assert parse(constants | dict.fromkeys(taken, value)) == expected
    for name, of in kinds.items():
        said = refused(constants | {name: 1j})
        assert re.match(rf"{name} in \w+\.py must be {re.escape(of.means)}, got 1j$", said)
        rest = {other: constants[other] for other in constants if other != name}  # it was deleted
        with pytest.raises(InputError, match=rf"^{name} is missing in \w+\.py: put it back$"):
            getattr(parse_settings(rest, []), name.lower())


@each_script
def test_no_constant_is_read_in_place_of_its_setting(script):
    constants, kinds, _ = load(script)  # its flag would do nothing
    body = ast.parse(Path(constants["__file__"]).read_text(encoding="utf-8")).body
    inside = [n for part in body if hasattr(part, "body") for n in ast.walk(part)]
    assert not {node.id for node in inside if isinstance(node, ast.Name)} & set(kinds)


@pytest.mark.parametrize(
    "style",
    ["{name}: {kind} = {value}", "{name}:{kind}={value}#of 100% of it",
     "{name}  :  {kind}   =   {value}   #   of 100% of it",
     "# of 100%\n# of it\n#\n{name}: {kind} = {value}",
     "{name}: {kind} = [{value}, '# no comment'][0]  # of 100% of it",
     "{name}: {kind} = (  # no comment\n    {value})  # of 100% of it",
     "{name} = {value}  # of 100% of it", "{name}: object = {value}  # of 100% of it"],
)
@each_script
def test_constants_may_be_written_in_other_styles(script, style, tmp_path, printed):
    constants, kinds, guessed = load(script)
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    lines, names = source.splitlines(), kinds if "{kind}" in style else guessed
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.AnnAssign) and node.target.id in names:
            kind_text, value = ast.unparse(node.annotation), ast.unparse(node.value)
            text = style.format(name=node.target.id, kind=kind_text, value=value)
            lines[node.lineno - 1 : node.end_lineno] = ["", *text.splitlines()]
    file = tmp_path / Path(constants["__file__"]).relative_to(HERE)
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    copied, expected = runpy.run_path(file), parse(constants)
    for name, setting in parse(copied).items():
        if isinstance(setting, Path) and setting.is_relative_to(tmp_path):
            setting = HERE / setting.relative_to(tmp_path)
        is_number = isinstance(setting, (int, float))  # without a kind, 3.0 becomes 3
        assert setting == expected[name] and (is_number or type(setting) is type(expected[name]))
    shown = read_help(printed(copied, "--help"))
    comment = "of 100% of it" if "of it" in style else ""
    assert {shown[flag_of(name)][0] for name in names} == {comment}


def test_a_script_in_another_encoding_works(tmp_path, printed):
    file, text = tmp_path / "a.py", "from common import kind\nA: kind.Weights = 'ü'  # Übungen\n"
    for encoding, first in (("utf-8-sig", ""), ("latin-1", "# coding=latin-1\n")):
        file.write_text(first + text, encoding=encoding)
        assert read_help(printed(runpy.run_path(file), "--help")) == {"--a": ["Übungen", "ü"]}


# --- Constants without their kind ---


@each_script
def test_without_its_kind_a_constant_keeps_its_flag(script):
    constants, kinds, guessed = load(script)
    for word in ("20", "0.5", "word", "val", "a/b.pth", "8,16,32,64", "8,16", "none"):
        known = {name: kinds[name] for name in guessed if kinds[name] is not kind.Switch
                 and (word != "none" or kinds[name].none in (None, "none"))}
        taken = taken_by(known, word)
        flags = [f"{flag_of(name)}={word}" for name in taken]
        expected = parse(constants) | {name.lower(): value for name, value in taken.items()}
        assert parse(without_kinds(script), *flags) == expected
    for name in set(kinds) - set(guessed):
        others = {other: kinds[other] for other in kinds if other != name}
        said = refused(constants | {"__annotations__": others})
        lacks = r"lacks its kind, which stood between the name and the =: write"
        assert re.match(rf"{name} in \w+\.py {lacks} '{name}: KIND = VALUE' again$", said)


@pytest.mark.parametrize(
    ("name", "value", "flags", "expected"),
    [
        ("EPOCHS", 150, "", 150), ("EPOCHS", 3.0, "", 3), ("EPOCHS", 3, "--epochs 1e1", 10),
        ("KL_WEIGHT", 1, "--kl-weight 0.5", 0.5), ("RATE", None, "--rate 87", 87.0),
        ("RATE", 87, "--rate none", None), ("TEACHER", None, "", None),
        ("TEACHER", None, "--teacher a.pth", Path("a.pth")), ("START", "ck", "", Path("ck")),
        ("TEACHER", "a.pth", "--teacher train", "train"), ("VGG", None, "", "none"),
        ("CHECKPOINT_DIR", "ck", "", Path("ck")), ("CHECKPOINT_DIR", "~/ck", "", HOME / "ck"),
        ("RESUME", True, "", True), ("RESUME", True, "--no-resume", False),
        ("TEACHER_CHANNELS", [8, 16, 32, 64], "", (8, 16, 32, 64)),
        ("TEACHER_CHANNELS", (8, 16, 32, 64), "--teacher-channels 1,2,3,4", (1, 2, 3, 4)),
        ("DATA", Path("a"), "", "a"), ("DEVICE", "cpu", "", "cpu"), ("LIMIT", 0, "", 0),
        ("TEMPERATURE", 2, "", 2.0), ("TEACHER_IMAGES", 0.5, "", 0.5),
    ],
)
def test_a_kind_is_guessed(name, value, flags, expected):
    found = parse(without_kinds() | {name: value}, *flags.split())[name.lower()]
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EPOCHS", -1, "must be a whole number of at least 1, got -1"), ("EPOCHS", 1.5, "must be"),
        ("EPOCHS", "three", "must be"), ("EPOCHS", math.nan, "must be"), ("EPOCHS", None, "must"),
        ("EPOCHS", (3,), "lacks its kind"), ("OVERWRITE", "no", "lacks its kind"),
        ("RESUME", "off", "lacks"), ("WARMUP", 5, "must be a num"),
        ("DEVICE", "gpu", "must be one of"), ("PRECISION", "fp64", "must be one of"),
        ("KL_WEIGHT", -1, "must be a number of at least 0"), ("KL_WEIGHT", "0.1", "lacks"),
        ("ENCODER_CHANNELS", [16, 32], "must be 4 values"), ("BATCH_SIZE", 32.5, "must be a whole"),
    ],
)
def test_what_makes_no_sense_is_refused_without_a_kind_too(name, value, message):
    said = refused(without_kinds() | {name: value})
    assert said.startswith(f"{name} in distill_tinyvae.py {message}")



def test_annotations_may_be_made_when_they_are_asked_for():  # as in Python 3.14
    constants, kinds, _ = load()
    lazy = {name: value for name, value in constants.items() if name != "__annotations__"}
    assert parse(lazy | {"__annotate__": lambda form: kinds}) == parse(constants)


# --- Flags, and the settings of a run ---


@each_script
def test_help_lists_every_flag_with_its_default(script, printed):
    constants, kinds, _ = load(script)
    shown = read_help(printed(constants, "--help"))
    assert set(shown) == set(map(flag_of, kinds))
    for name, of in kinds.items():
        comment, default = shown[flag_of(name)]
        value = of.check(constants[name])
        assert comment  # and the default is a word that the flag takes
        assert default == str(value) if of is kind.Switch else of.from_flag(default) == value


@each_script
def test_flags_that_make_no_sense_are_refused_and_named(script, printed):
    constants, kinds, _ = load(script)
    assert re.match(r"error: .* --nonsense 1 .*\n$", printed(constants, "--nonsense", "1"))
    for flag, of in zip(map(flag_of, kinds), kinds.values()):
        if flag[:-1] not in map(flag_of, kinds):  # an abbreviation may be meant for another
            assert flag[:-1] in printed(constants, f"{flag[:-1]}=1")
        means = ".*" if of is kind.Switch else f"must be {re.escape(of.means)}, got ''"
        assert re.match(rf"error: argument {flag}.*: {means}.*\n$", printed(constants, f"{flag}="))


@pytest.mark.parametrize(
    ("epochs", "flag", "code"), [(3, "--batch-size=1", 2), (3, "--epoch=3", 2), ("many", "--demo",
     "error: EPOCHS in distill_tinyvae.py must be a whole number of at least 1, got 'many'")],
)
def test_bad_settings_end_a_script_before_any_work(epochs, flag, code, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_tinyvae, "EPOCHS", epochs)
    with pytest.raises(SystemExit) as stop:
        runtime.run_script(lambda argv: distill_tinyvae.main([*folders(tmp_path), flag]))
    assert (stop.value.code, list(tmp_path.iterdir())) == (code, [])


def test_a_mistyped_flag_gets_a_suggestion(capsys):
    for word, meant in (("--epoch=3", "--epochs"), ("--batch_size=3", "--batch-size")):
        with pytest.raises(SystemExit):
            parse_settings(load()[0], [word])
        assert f"is {meant} meant?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_settings(load()[0], ["--zzz"])
    assert "meant" not in capsys.readouterr().err


def test_main_called_in_a_notebook_takes_the_constants(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert parse_settings(load()[0]).as_dict() == parse_settings(load()[0], []).as_dict()


def test_the_recipe_is_that_of_the_design_and_fixed():
    s = parse_settings(load()[0], [])
    assert (s.teacher_epochs, s.epochs, s.batch_size, s.teacher) == (20, 100, 64, "train")
    assert (s.optimizer, s.learning_rate, s.temperature) == ("muon", 3e-3, 3.0)
    weights = [getattr(s, f"{term}_weight") for term in losses.TERMS]
    assert [weight for weight in weights if weight] == [0.3, 0.1, 0.3, 0.2, 0.1]
    assert (s.kl_scale, s.perceptual_scale, s.perceptual_images) == (0.4, 4.0, 6)
    assert (s.projection, s.vgg) == ("pixels", "imagenet")
    with pytest.raises(AttributeError, match=r"settings are fixed; use replace\(\)"):
        s.epochs = 3
    assert s.replace(epochs=3).as_dict() == s.as_dict() | {"epochs": 3}


def test_a_flag_beside_demo_wins_and_a_constant_does_not():
    preset = {"epochs": 2, "data": "dead-leaves"}
    for edited, flags, expected in (
        ({}, "--demo --epochs 7", (7, "dead-leaves")),
        ({"DEMO": True}, "--epochs 7", (7, "dead-leaves")),
        ({"DEMO": True, "EPOCHS": 7}, "--no-demo", (7, distill_tinyvae.DATA)),
        ({"EPOCHS": 7}, "", (7, distill_tinyvae.DATA)),
        ({"EPOCHS": 7}, "--demo", (2, "dead-leaves")),
    ):
        settings = parse_settings(load()[0] | edited, flags.split(), preset)
        assert (settings.epochs, settings.data) == expected


def test_the_demos_settings_are_checked_like_constants():
    for name, value, message in (
        ("epochs", "many", "must be a whole number of at least 1, got 'many'"),
        ("epoch", 3, "is not a setting"),
    ):
        with pytest.raises(InputError) as error:
            parse_settings(load()[0], ["--demo"], {name: value})
        assert str(error.value) == f"{name} of the demo's settings in distill_tinyvae.py {message}"
        assert parse_settings(load()[0], [], {name: value}).epochs == distill_tinyvae.EPOCHS
    parse_settings(load()[0], ["--demo"], distill_tinyvae.DEMO_SETTINGS)


# --- Device, precision, and importing ---


def test_importing_the_scripts_does_nothing(tmp_path):
    scripts = ", ".join(name for name in SCRIPTS if "." not in name)
    slow = {"torchvision", "onnx", "onnxruntime", "torch_pruning", "sklearn", "torch._dynamo"}
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {scripts}, torch\n"
    code += f"print({slow!r} & set(sys.modules), torch.cuda.is_initialized())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set() False\n", "")
    assert list(tmp_path.iterdir()) == []
