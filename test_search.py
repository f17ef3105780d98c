"""The architecture search: its budget, its study, and what a killed or a second process leaves."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

import comparison
import models
import onnx_models
import search_architecture
import storage
import test_trained_model
from runtime import InputError
from settings import parse_settings
from testing import HERE, folders, on_posix, read_csv, teacher_of
from tiny_vae_32 import TinyVAE32

SEARCH = (
    "--data", "dead-leaves", "--limit", "64", "--epochs", "1", "--rate", "10", "--device", "cpu",
    "--precision", "fp32", "--rate-tolerance", "1", "--stop-margin", "none",
)


@pytest.fixture
def optuna():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return pytest.importorskip("optuna")


@pytest.fixture
def no_clock(monkeypatch):
    """Latencies of a made-up machine: the sum of the widths in microseconds."""

    def clock(shape):
        ms = sum(shape["encoder_channels"] + shape["decoder_channels"]) / 1000
        halves = dict.fromkeys(("encode_ms", "decode_ms"), ms / 2) | {"ms": ms}
        return halves | {f"onnx_{name}": value for name, value in halves.items()}

    monkeypatch.setattr(search_architecture, "clock", clock)
    monkeypatch.setattr(
        search_architecture, "KNOWN", {"TinyVAE32": search_architecture.KNOWN["TinyVAE32"]}
    )


def settings(*flags):
    return parse_settings(vars(search_architecture), [*SEARCH, *flags])


# --- Shapes, costs, budget ---


@pytest.mark.parametrize(
    ("word", "budget"),
    [
        ("params<=147000", {"params": 147000}),
        (" params <= 1.5e5 , ms<=0.5", {"params": 150000, "ms": 0.5}),
        ("none", {}),
    ],
)
def test_a_budget_is_a_list_of_conditions(word, budget):
    assert settings("--budget", word).budget == budget


@pytest.mark.parametrize(
    "word", ["params", "params<100", "params<=", "size<=3", "params<=-1", "ms<=1,ms<=2", "", "<=3"]
)
def test_a_budget_that_makes_no_sense_is_refused(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings("--budget", word)
    assert stopped.value.code == 2
    assert "argument --budget: must be conditions like params<=147000" in capsys.readouterr().err


def test_an_impossible_search_is_refused_before_it_starts(tmp_path, optuna):
    for flags, message in (
        (["--budget", "params<=100"], "the smallest student has params"),
        (["--widths-4", "64,32"], "takes the smallest, then the largest"),
    ):
        with pytest.raises(InputError, match=message):
            search_architecture.main([*SEARCH, *folders(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_the_cost_of_tinyvae32_is_counted_right():
    shape = search_architecture.KNOWN["TinyVAE32"]
    cost = search_architecture.count(shape)
    assert cost["params"] == 294_403 and cost["kb"] == pytest.approx(294.403)
    # By hand: output positions × kernel × channels of each convolution; input positions for the
    # transposed ones; the linear layers.
    encoder = 256 * 9 * 3 * 16 + 64 * 9 * 16 * 32 + 16 * 9 * 32 * 64 + 4 * 9 * 64 * 128
    decoder = 4 * 9 * 128 * 64 + 16 * 9 * 64 * 32 + 64 * 9 * 32 * 16 + 256 * 9 * 16 * 3
    assert cost["macs"] == encoder + decoder + 3 * 512 * 64


def test_latency_is_of_both_runtimes_and_of_the_shape():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    small, large = (
        search_architecture.clock({
            "latent_dim": 64, "encoder_channels": [width] * 4, "decoder_channels": [width] * 4,
        })
        for width in (8, 256)
    )
    assert small["ms"] == small["encode_ms"] + small["decode_ms"] < large["ms"]
    assert small["onnx_ms"] < large["onnx_ms"]


def test_ranks_are_correlated_as_spearman_does():
    assert search_architecture.rank_correlation([1, 2, 3, 9], [10, 20, 30, 31]) == pytest.approx(1)
    assert search_architecture.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # 1 − 6 Σd² / n(n² − 1), d = 0, 1, 1, 0
    assert search_architecture.rank_correlation([1, 2, 3, 4], [5, 7, 6, 8]) == pytest.approx(0.8)


# --- The study ---


def trials(run, optuna):
    storage_ = f"sqlite:///{run / 'checkpoints' / 'search' / 'study.db'}"
    return optuna.load_study(study_name="search", storage=storage_).get_trials()


def test_a_search_trains_what_it_proposes_and_resumes(
    tmp_path, capsys, optuna, no_clock, in_this_process
):
    flags = [*SEARCH, *folders(tmp_path), "--budget", "params<=200000,ms<=0.6"]
    search_architecture.main([*flags, "--trials", "2"])
    printed = capsys.readouterr().out
    assert "2 of 2 trained: MSE of a sample" in printed and "| TinyVAE32 " in printed
    assert (tmp_path / "outputs" / "search.png").stat().st_size > 10_000
    rows = read_csv(tmp_path / "outputs" / "search.csv")
    known, *found = rows
    assert known["student"] == "TinyVAE32"
    assert len(found) == 2 and any(row["on_front"] == "True" for row in found)
    for row in found:  # within the budget, and the shape and error are those of its checkpoint
        assert float(row["params"]) <= 200_000 and float(row["ms"]) <= 0.6
        path = tmp_path / "checkpoints" / "search" / f"{row['shape']}_1_epochs" / "tinyvae_last.pth"
        vae, checkpoint = models.load_model(path, TinyVAE32)
        assert models.count_parameters(vae) == int(row["params"])
        last = checkpoint["rows"][-1]
        assert last["val_mse"] == pytest.approx(float(row["mse"]))
        assert last["val_sampled_mse"] == pytest.approx(float(row["sampled_mse"]))
        assert checkpoint["record"]["rate"] == 10
    for trial in trials(tmp_path, optuna):
        beyond = [name for name, value in trial.constraints.items() if value > 0]
        assert bool(beyond) == (trial.state.name == "PRUNED"), trial

    # The same command trains nothing; with more trials, the new ones alone.
    in_this_process.clear()
    search_architecture.main([*flags, "--trials", "3"])
    again = read_csv(tmp_path / "outputs" / "search.csv")
    assert again[1:3] == [row | {"on_front": new["on_front"]} for row, new in zip(found, again[1:])]
    assert len(again) == 4 and len(in_this_process) == 2  # TinyVAE32, found to be trained, and one

    # Another recipe is another study.
    with pytest.raises(InputError, match=r"rate was 10\.0, is 20\.0"):
        search_architecture.main([*flags, "--rate", "20"])
    (tmp_path / "checkpoints" / "search" / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="cannot be used as an Optuna study"):
        search_architecture.main(flags)


def test_the_best_are_trained_at_length_and_every_script_loads_them(
    tmp_path, capsys, optuna, no_clock, in_this_process
):
    flags = [*SEARCH, *folders(tmp_path), "--trials", "2", "--train-best", "2"]
    search_architecture.main([*flags, "--train-epochs", "2"])
    printed = capsys.readouterr().out
    assert "Rank correlation of the search's errors with these (Spearman)" in printed
    paths = [line.strip() for line in printed.splitlines() if line.endswith("tinyvae_best.pth")]
    assert len(paths) == 3  # TinyVAE32 for comparison
    for path in paths:
        assert storage.load_checkpoint(path)["record"]["epochs"] == 2
    test_trained_model.main([*folders(tmp_path), "--student", paths[1], "--device", "cpu"])
    assert "| student" in capsys.readouterr().out
    vae, _ = models.load_model(paths[2], TinyVAE32)
    assert len(onnx_models.split_vae(vae)) == 2


@pytest.fixture
def search(tmp_path, optuna):
    flags = ("--epochs", "3", "--stop-margin", "0.1", "--budget", "params<=150,ms<=2")
    flags += ("--rate", "80", "--rate-tolerance", "0.05")
    return search_architecture.Search(settings(*flags, *folders(tmp_path)), optuna)


def test_a_student_behind_one_of_no_higher_cost_is_stopped(search, optuna):
    study = optuna.create_study(directions=["minimize", "minimize"])

    def add(params, errors, rate=80):
        epochs = [(error, rate) for error in errors]
        study.add_trial(optuna.trial.create_trial(
            values=[errors[-1], params],
            user_attrs={"cost": {"params": params}, "found": {"epochs": epochs}},
        ))

    def behind(*errors, params=500):
        rows = [{"val_sampled_mse": error, "kl_nats": 81} for error in errors]
        return search.is_behind(study, {"params": params})(rows)

    assert not behind(5)  # nothing to compare with
    add(100, [0.9, 0.5, 0.3])
    add(900, [0.1, 0.1, 0.1])  # costs more
    add(100, [0.1, 0.1, 0.1], rate=90)  # at another rate
    assert not behind() and not behind(0.98) and behind(1.0)
    assert not behind(1.0, 0.54) and behind(0.8, 0.56)
    assert not behind(1.0, 1.0, 1.0)  # it has ended
    assert not behind(1.0, params=50)
    search.known = [{"params": 40, "epochs": [(0.5, 80)] * 3}]
    assert behind(1.0, params=50)


def test_the_front_is_what_none_within_budget_and_rate_is_better_than(search, optuna):
    study = optuna.create_study(directions=["minimize", "minimize"])
    shape = search_architecture.KNOWN["TinyVAE32"]

    def row(params, error, rate=80.0, ms=1.0):
        return {"params": params, "sampled_mse": error, "kl_nats": rate, "ms": ms}

    def add(*figures):
        found = row(*figures)
        study.add_trial(optuna.trial.create_trial(
            values=[found["sampled_mse"], found["params"]],
            user_attrs={"shape": shape, "cost": found, "found": found},
        ))

    search.known = [{"student": "TinyVAE32", "state": "known"} | row(100, 0.5)]
    add(90, 0.6)
    add(110, 0.5)  # TinyVAE32 is as good and smaller
    add(120, 0.4)
    add(80, 0.1, 85.0)  # at another rate
    add(80, 0.1, 80.0, 3.0)  # beyond the budget
    add(160, 0.1)
    rows = search_architecture.all_rows(search, study)
    assert [row["on_front"] for row in rows] == [True, True, False, True, False, False, False]


def test_the_first_proposals_are_random_ones_within_the_budget(search, optuna):
    search.settings.budget = {"params": 147_000}  # of all shapes, one in a hundred
    study = optuna.create_study(directions=["minimize", "minimize"])
    search_architecture.propose_at_random(search, study)
    shapes = [
        search_architecture.propose(study.ask(), search.settings)
        for _ in range(search_architecture.STARTUP)
    ]
    assert all(search_architecture.count(shape)["params"] <= 147_000 for shape in shapes)
    assert len({search_architecture.shape_name(shape) for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("it did not finish")])
def test_a_trial_that_was_interrupted_is_proposed_again(search, optuna, monkeypatch, error):
    search.settings.budget = {}
    monkeypatch.setattr(search_architecture, "clock", lambda shape: {"ms": 1.0})
    study = optuna.create_study(directions=["minimize", "minimize"])
    shapes = []

    def train(shape, *args):
        shapes.append(shape)
        if len(shapes) == 1:
            raise error
        return {"sampled_mse": 0.1, "mse": 0.1, "kl_nats": 80.0, "epochs": [], "seconds": 1.0}

    monkeypatch.setattr(search, "train", train)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        study.optimize(search.objective, n_trials=1)
    study.optimize(search.objective, n_trials=1)
    assert shapes[0] == shapes[1]


@on_posix
def test_a_folder_that_goes_away_ends_a_search_in_a_sentence(tmp_path, optuna, monkeypatch, capsys):
    monkeypatch.setattr(search_architecture, "KNOWN", {})
    monkeypatch.setattr(search_architecture, "clock", lambda shape: {"ms": 1.0})
    monkeypatch.setattr(search_architecture, "HEARTBEAT", 1)

    def train(self, *args):
        shutil.rmtree(self.folder)
        time.sleep(1.5)  # in which Optuna's heartbeat meets the same error, in another thread
        return {"sampled_mse": 0.1, "mse": 0.1, "kl_nats": 80.0, "epochs": [], "seconds": 1.0}

    monkeypatch.setattr(search_architecture.Search, "train", train)
    with pytest.raises(InputError, match=r"could not write .*study\.db \(.*database\): free some"):
        search_architecture.main([*SEARCH, *folders(tmp_path)])
    assert "Traceback" not in capsys.readouterr().err


def test_what_went_wrong_in_a_search_is_told_and_not_what_followed(search, optuna):
    full = optuna.exceptions.StorageInternalError("the commit")

    def fail(*errors):
        """The first, then the others, each while the one before is handled."""
        try:
            if errors[:-1]:
                fail(*errors[:-1])
        finally:
            raise errors[-1]

    with pytest.raises(InputError, match="no image"), search_architecture.file_errors(search):
        fail(InputError("no image"), full, AssertionError())
    with pytest.raises(InputError) as told, search_architecture.file_errors(search):
        raise InputError("no image") from OSError()
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(AssertionError), search_architecture.file_errors(search):
        fail(OSError("something else"), AssertionError())


def test_what_contradicts_is_refused(tmp_path, tiny_run, optuna):
    run, _ = tiny_run
    flags = [*SEARCH, *folders(tmp_path), "--vgg", "random", "--scratch"]
    with pytest.raises(InputError, match="--scratch trains on MSE and KL alone"):
        search_architecture.main(flags)
    with pytest.raises(InputError, match="the teacher has 128 latents, and students may"):
        search_architecture.main([*SEARCH, *folders(tmp_path), *teacher_of(run)])
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_hopeless_is_stopped_and_can_go_on(tmp_path, capfd):
    values = {
        "data": "dead-leaves", "limit": 640, "epochs": 500, "vgg": "none", "device": "cpu",
        "precision": "fp32",
    }
    for _ in range(2):
        epochs = len(comparison.validation_rows(tmp_path)) + 1

        def is_hopeless(rows, epochs=epochs):
            assert all(row["val_sampled_mse"] > 0 and row["kl_nats"] > 0 for row in rows)
            return len(rows) >= epochs

        assert comparison.run_distillation("one", tmp_path, values, is_hopeless) is None
        assert epochs <= len(comparison.validation_rows(tmp_path)) < 500
    assert "Resuming the student after epoch" in (tmp_path / "log.txt").read_text()


def test_a_killed_search_loses_no_trial_and_two_processes_share_one(tmp_path, optuna):
    """The first is killed within a trial; then two at once finish the study, with that trial."""
    script = (
        "import search_architecture as s; s.KNOWN = {'TinyVAE32': s.KNOWN['TinyVAE32']}; "
        "s.HEARTBEAT, s.GRACE, s.STARTUP = 1, 2, 1; s.clock = lambda shape: "
        "dict.fromkeys(s.MEASURED[3:], 1.0); s.run_script(s.main)"
    )

    def start():
        flags = [*SEARCH, "--trials", "3", *folders(tmp_path)]
        return subprocess.Popen(
            [sys.executable, "-c", script, *flags], cwd=HERE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )

    def running():
        """Shapes in training, read without Optuna, which would make the file if it is not there."""
        path = tmp_path / "checkpoints" / "search" / "study.db"
        query = (
            "select value_json from trial_user_attributes natural join trials "
            "where state = 'RUNNING' and key = 'shape'"
        )
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                return [json.loads(value) for (value,) in database.execute(query)]
        except sqlite3.OperationalError:  # it is not there yet, or not ready
            return []

    killed = start()
    for _ in range(600):
        if running() or killed.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (lost,) = running()
    time.sleep(3)  # until it counts as dead
    processes = [start(), start()]
    printed = [process.communicate(timeout=150)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    found = trials(tmp_path, optuna)
    complete = [trial for trial in found if trial.state.name == "COMPLETE"]
    assert len(complete) in (3, 4)  # the last two may have been in training at once
    shapes = [search_architecture.shape_name(trial.user_attrs["shape"]) for trial in complete]
    assert len(set(shapes)) == len(shapes)
    assert search_architecture.shape_name(lost) in shapes
    assert not running()
    for text in printed:  # each has trained some
        assert "trained: MSE" in text
