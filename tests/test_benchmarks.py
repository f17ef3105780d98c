"""The benchmarks: what they time is what distill_tinyvae.py does, and what they write."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import distill_tinyvae
from benchmarks import gpu, scaling, speed
from common.runtime import InputError
from common.settings import parse_settings
from common.storage import read_csv
from tests.testing import TINY, folders

SMALL = ("--limit", "70", "--batch-size", "16", "--repeats", "1", "--device", "cpu")


def test_the_batch_is_that_of_distill_tinyvae():
    recipe = parse_settings(vars(distill_tinyvae), [])
    settings = parse_settings(vars(speed), [])
    assert settings.batch_size == recipe.batch_size
    assert settings.perceptual_images == recipe.perceptual_images


def test_the_loop_by_hand_minimises_what_ours_does(tmp_path, capsys):
    speed.main([*SMALL, "--others", "loop,loop_all", "--output-dir", str(tmp_path)])
    rows = {(row["stage"], row["trainer"]): row for row in read_csv(tmp_path / "bench_speed.csv")}
    assert len(rows) == 6
    for (stage, _), row in rows.items():
        assert row["steps"] == "8" and float(row["ms_per_step"]) > 1
        assert float(row["command_seconds"]) > 1 and row["torch"] and row["threads"]
        # The same weights at the start, few and small steps; noise and the images' order differ,
        # and ours calibrates BatchNorm in the teacher that the student learns from.
        ours, tolerance = float(rows[stage, "ours"]["loss"]), {"teacher": 0.1, "student": 0.3}
        assert float(row["loss"]) == pytest.approx(ours, rel=tolerance[stage])
    printed = capsys.readouterr().out
    assert "times ours" in printed and "whole command" in printed


@pytest.mark.parametrize("library", speed.LIBRARIES)
def test_a_library_trains_the_same_where_it_is_installed(tmp_path, library):
    pytest.importorskip(library)
    speed.main([*SMALL, "--others", f"loop,{library}", "--output-dir", str(tmp_path)])
    rows = {(row["stage"], row["trainer"]): row for row in read_csv(tmp_path / "bench_speed.csv")}
    for stage in ("teacher", "student"):
        loss = float(rows[stage, "loop"]["loss"])
        assert float(rows[stage, library]["loss"]) == pytest.approx(loss, rel=0.1)
        assert rows[stage, library][library]  # its version


def test_a_library_that_is_not_installed_is_left_out_with_a_sentence(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "lightning", None)
    row = {"ms_per_step": 2.0, "command_seconds": 3.0, "loss": 0.1}
    monkeypatch.setattr(speed, "measure", lambda *_: [
        {"stage": stage} | row for stage in ("teacher", "student")
    ])
    speed.main([*SMALL, "--others", "loop,lightning", "--output-dir", str(tmp_path)])
    assert "lightning is left out, since it is not installed: pip" in capsys.readouterr().out
    trainers = [row["trainer"] for row in read_csv(tmp_path / "bench_speed.csv")]
    assert trainers == ["ours", "ours", "loop", "loop"]


def test_what_cannot_be_timed_is_refused_in_a_sentence(tmp_path):
    flags = ("--others", "loop", "--output-dir", str(tmp_path), "--device", "cpu")
    with pytest.raises(InputError, match="31 images do not fill two batches: raise --limit"):
        speed.main([*flags, "--limit", "31", "--batch-size", "16"])
    with pytest.raises(InputError, match=r"ours could not train: error: .* too few to project"):
        speed.main([*flags, "--limit", "64", "--batch-size", "16"])  # fewer than latents


def test_the_scaling_counts_the_images_of_all_processes(tmp_path):
    flags = ("--limit", "64", "--epochs", "1", "--device", "cpu", "--output-dir", str(tmp_path))
    scaling.main([*flags, "--processes", "1,2", "--batch-size", "32"])
    rows = read_csv(tmp_path / "bench_scaling.csv")
    assert [row["processes"] for row in rows] == ["1", "2"]
    for row in rows:
        images_per_second = 1000 * 32 / float(row["ms_per_step"])
        assert float(row["images_per_second"]) == pytest.approx(images_per_second)
    with pytest.raises(InputError, match="1 processes did not finish, for the reason above"):
        scaling.main([*flags, "--processes", "1", "--batch-size", "128"])


def test_the_first_run_on_a_gpu_times_a_step_and_reports_what_fails(tmp_path, monkeypatch, capsys):
    outcomes = {"teacher": 2.0, "student": 3.0}, InputError("ours could not train")
    monkeypatch.setattr(gpu, "time_loop", Mock(side_effect=outcomes))
    monkeypatch.setitem(gpu.VARIANTS, "adam", None)
    flags = ("--device", "cpu", "--limit", "142", "--epochs", "2", "--output-dir", str(tmp_path))
    with pytest.raises(InputError, match=r"^time adam failed, ours could not train$"):
        gpu.main([*flags, "--no-check", "--timed", "no vgg,plain loop,adam"])
    result = json.loads((tmp_path / "bench_gpu.json").read_text())
    ours, loop = result["rows"]
    assert ours["variant"] == "no vgg" and 1 < ours["student"] < ours["teacher"]
    recipe = parse_settings(vars(distill_tinyvae), [])
    assert {"teacher": recipe.teacher_epochs, "student": recipe.epochs} == gpu.FULL_EPOCHS
    assert 45_000 // recipe.batch_size == gpu.EPOCH_STEPS
    assert loop["full_recipe_minutes"] == pytest.approx((20 * 703 * 2 + 100 * 703 * 3) / 60_000)
    assert list(result["failed"]) == ["time adam"]
    assert "full recipe, minutes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("warming up\nerror: no such file\n", "error: no such file"),
     ("Traceback\n  File\ntorch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors "
      "might be late\n", "torch.AcceleratorError: CUDA error: out of memory"),
     ("", "exit code 9")],
)
def test_of_a_process_that_fails_the_error_is_told(stderr, reason):
    assert speed.error_of(SimpleNamespace(stderr=stderr, returncode=9)) == reason


def test_noise_from_the_cpu_is_the_same_on_any_device(tmp_path, monkeypatch):
    drawn = []

    def randn(*size, **options):
        drawn.append("device" in options)
        return torch.zeros(*size)

    monkeypatch.setattr(torch, "randn", randn)
    gpu.train_with_cpu_noise(*TINY, *folders(tmp_path), "--teacher", "none", "--epochs", "1")
    assert drawn and not any(drawn)


@pytest.mark.parametrize(
    ("losses", "message"),
    [((0.5, 0.4), None), ((0.5, 0.4001), None), ((0.5, 0.401), r"by 0\.250%"),
     ((0.5, float("nan")), "by inf")],
)
def test_a_gpu_that_computes_something_else_is_noticed(losses, message, monkeypatch):
    def run(program, device, *flags):
        assert program is gpu.WITH_CPU_NOISE and "--precision=fp32" in flags
        return [{"stage": "student", "loss": loss} for loss in
                (losses if device == "--device=cuda" else (0.5, 0.4))], ""

    monkeypatch.setattr(gpu, "run", run)
    if message:
        with pytest.raises(InputError, match=f"the student's loss on cuda differs .* {message}"):
            gpu.check("student", "cuda", 0.0005)
    else:
        assert gpu.check("student", "cuda", 0.0005) < 0.0005


def test_steps_that_are_not_compiled_are_not_timed_as_compiled(monkeypatch):
    rows = [{"stage": stage, "ms_per_step": "2"} for stage in ("teacher", "student")]
    printed = "Steps are not compiled, since (no compiler)\nPeak GPU memory: 1.25 GiB, beside"
    monkeypatch.setattr(gpu, "run", lambda *_: (rows, printed))
    with pytest.raises(InputError, match=r"not compiled, since \(no compiler\)$"):
        gpu.time_step("compiled", "cuda", 100, 2)
    printed = printed.partition("\n")[2]
    assert gpu.time_step("compiled", "cuda", 100, 2)["peak_gib"] == 1.25
