"""README.md and docs/: the flags, files and links they name exist."""

import importlib.util
import re

import pytest

from tests.test_settings import SCRIPTS, flag_of, load
from tests.testing import HERE

PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_shows_how_to_start():
    commands = re.findall(r"^python (\w+)\.py", PAGES[0].read_text(), re.MULTILINE)
    assert {"distill_tinyvae", "test_trained_model"} <= set(commands)


@each_page
def test_flags_in_commands_exist(page):
    text = page.read_text().replace("\\\n", " ")  # a command may go on in the next line
    command = r"(?:python|python -m|nproc_per_node=\d --) ([a-z_]\w*(?:\.\w+)?)( [^\n#`]*|$)"
    for script, words in re.findall(command, text, re.MULTILINE):
        script = script.removesuffix(".py")
        if script not in SCRIPTS:  # of Python or of a package
            assert importlib.util.find_spec(script), f"{page.name} names {script}"
            continue
        flags = ["--help", *map(flag_of, load(script)[1])]
        for flag in re.findall(r"--[a-z0-9-]+", words):
            assert flag.replace("--no-", "--") in flags, f"{script} has no {flag}"


@each_page
def test_files_and_links_exist(page):
    text = page.read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert (HERE / path).exists(), f"{page.name} names {path}"


@each_page
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.findall(r"^[A-Z]+$|TODO|FIXME|\bTBD\b", page.read_text(), re.MULTILINE)
