"""Fixtures of the test suite, and one thread for each of pytest's workers."""

import contextlib
import functools
import io
import os
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.testing")

from common import comparison, report, synthetic  # noqa: E402
from tests import fault_campaign  # noqa: E402
from tests.testing import train  # noqa: E402

with contextlib.suppress(ImportError):  # of requirements-dev.txt
    from hypothesis import HealthCheck, settings

    # Of test_fuzz.py: how many cases of each test.
    settings.register_profile(
        "short", max_examples=40, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.register_profile(
        "long", settings.get_profile("short"), max_examples=1500, derandomize=False
    )
    settings.load_profile("short")

# pytest runs two workers (pyproject.toml): one thread for each of them and of what they start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Dead leaves are drawn by the 500, of which a tiny run takes 70: drawn once for each worker.
drawn = functools.cache(synthetic.dead_leaves)
synthetic.SYNTHETIC["dead-leaves"] = lambda count, split: drawn(count, split).clone()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of distill_tinyvae.py, once for each worker: its folder and what it printed.
    Tests that change its files copy it."""
    run, output = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(output):
        train(run)
    return run, output.getvalue()


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes longer than a tiny training."""
    monkeypatch.setattr(report, "draw", lambda *args: None)


@pytest.fixture
def in_this_process(monkeypatch, without_pictures):
    """distill_tinyvae.py without starting Python anew; returns the folders it was called for."""
    called = []

    def run(command, stdout):
        flags = [str(word) for word in command[2:]]
        called.append(Path(flags[flags.index("--checkpoint-dir") + 1]).name)
        with contextlib.redirect_stdout(stdout):
            return fault_campaign.in_this_process(command, stdout)

    monkeypatch.setattr(comparison, "run_process", run)
    return called
