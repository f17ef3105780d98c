"""README.md and docs/: the flags, files and links they name exist."""

import importlib
import re

import pytest

from settings import parse_settings
from testing import HERE

PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_shows_how_to_start():
    commands = re.findall(r"^python (\w+)\.py", PAGES[0].read_text(), re.MULTILINE)
    assert {"distill_tinyvae", "test_trained_model"} <= set(commands)


@each_page
def test_flags_in_commands_exist(page):
    commands = re.findall(r"(?:python|nproc_per_node=\d --) (\w+)\.py([^\n#`]*)", page.read_text())
    for script, words in commands:
        module = importlib.import_module(script)
        known = {"help", *vars(parse_settings(vars(module), []))}
        for flag in re.findall(r"--([a-z0-9-]+)", words):
            name = flag.removeprefix("no-") if flag.startswith("no-") else flag
            assert name.replace("-", "_") in known, f"{script}.py has no --{flag}"


@each_page
def test_files_and_links_exist(page):
    text = page.read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"
    for path in re.findall(r"`(\w+\.py)`", text):
        assert (HERE / path).exists(), f"{page.name} names {path}"


@each_page
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.findall(r"^[A-Z]+$|TODO|FIXME|\bTBD\b", page.read_text(), re.MULTILINE)
