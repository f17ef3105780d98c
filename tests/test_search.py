"""The architecture search: its budget, its study, and what a killed or a second process leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

import search_architecture
from common import models, storage
from common.runtime import InputError
from common.settings import parse_settings
from common.storage import read_csv
from tests.testing import HERE, folders, teacher_of
from tiny_vae_32 import TinyVAE32

optuna = pytest.importorskip("optuna")
SEARCH = (
    "--data", "dead-leaves", "--limit", "64", "--epochs", "1", "--rate", "10", "--device", "cpu",
    "--precision", "fp32", "--rate-tolerance", "1",
)


@pytest.fixture
def search(tmp_path):
    """A study of students of 3 epochs at 80 nats that nothing has been trained for."""
    flags = ("--epochs", "3", "--rate", "80", "--rate-tolerance", "0.05")
    settings = parse_settings(vars(search_architecture), [*SEARCH, *flags, *folders(tmp_path)])
    return search_architecture.Search(settings)


def trials(run):
    url = f"sqlite:///{run / 'checkpoints' / 'search' / 'study.db'}"
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url).get_trials()


def test_a_budget_is_a_list_of_conditions():
    budget = search_architecture.read_budget(" params <= 1.5e5 , ms<=0.5")
    assert budget == {"params": 150_000, "ms": 0.5}
    assert search_architecture.read_budget(None) == {}


@pytest.mark.parametrize(
    "text", ["params", "params<100", "params<=", "size<=3", "params<=-1", "ms<=1,ms<=2", "<=3"]
)
def test_a_budget_that_makes_no_sense_is_refused(text):
    with pytest.raises(InputError, match="--budget must be conditions like params<=147000"):
        search_architecture.read_budget(text)


def test_an_impossible_search_is_refused_before_it_starts(tmp_path, tiny_run):
    run, _ = tiny_run
    for flags, message in (
        (("--budget", "params<=100"), "the smallest student has params"),
        (teacher_of(run), "the teacher has 128 latents, and students may"),
    ):
        with pytest.raises(InputError, match=message):
            search_architecture.main([*SEARCH, *folders(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_costs_are_those_of_the_shape(search):
    known = search_architecture.tiny_vae(128)
    shape = search_architecture.propose(lambda name, *_, step: known[name], search.settings)
    assert shape.items() <= TinyVAE32().architecture.items()
    cost = search_architecture.measure_cost(shape)
    # By hand: output positions × kernel × channels of each convolution; input positions for the
    # transposed ones; the linear layers.
    encoder = 256 * 9 * 3 * 16 + 64 * 9 * 16 * 32 + 16 * 9 * 32 * 64 + 4 * 9 * 64 * 128
    decoder = 4 * 9 * 128 * 64 + 16 * 9 * 64 * 32 + 64 * 9 * 32 * 16 + 256 * 9 * 16 * 3
    assert (cost["params"], cost["macs"]) == (294_403, encoder + decoder + 3 * 512 * 64)
    wide = {"latent_dim": 64, "encoder_channels": [256] * 4, "decoder_channels": [256] * 4}
    assert cost["ms"] < search_architecture.measure_cost(wide)["ms"]


def test_a_search_trains_what_it_proposes_and_resumes(
    tmp_path, capsys, monkeypatch, in_this_process
):
    monkeypatch.setattr(search_architecture, "KNOWN", {"TinyVAE32": 128})
    flags = [*SEARCH, *folders(tmp_path), "--budget", "params<=200000,macs<=2e6"]
    search_architecture.main([*flags, "--trials", "2"])
    assert "| TinyVAE32 " in capsys.readouterr().out
    assert (tmp_path / "outputs" / "search.png").stat().st_size > 10_000
    tiny_vae, *students = read_csv(tmp_path / "outputs" / "search.csv")
    assert tiny_vae["student"] == "TinyVAE32" and tiny_vae["on_front"] == "False"
    assert len(students) == 2 and any(row["on_front"] == "True" for row in students)
    for row in students:  # within the budget, and the shape and error are those of its checkpoint
        assert float(row["params"]) <= 200_000 and float(row["macs"]) <= 2e6
        path = tmp_path / "checkpoints" / "search" / f"{row['shape']}_1_epochs" / "tinyvae_last.pth"
        vae, checkpoint = models.load_model(path, TinyVAE32)
        assert models.count_parameters(vae) == int(row["params"])
        assert checkpoint["rows"][-1]["val_sampled_mse"] == pytest.approx(float(row["sampled_mse"]))
        assert checkpoint["record"]["rate"] == 10
    for trial in trials(tmp_path):
        beyond = [name for name, value in trial.constraints.items() if value > 0]
        assert bool(beyond) == (trial.state.name == "PRUNED"), trial

    # The same command trains nothing; with more trials, the new one alone, and then the best.
    in_this_process.clear()
    flags += ["--train-best", "1", "--train-epochs", "2"]
    search_architecture.main([*flags, "--trials", "3"])
    again = read_csv(tmp_path / "outputs" / "search.csv")
    assert [row["shape"] for row in again[1:3]] == [row["shape"] for row in students]
    assert len(again) == 4
    # TinyVAE32, found to be trained, and one; then two at length
    assert [folder.split("_")[-2] for folder in in_this_process] == ["1", "1", "2", "2"]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    paths = [line for line in lines if line.endswith("tinyvae_best.pth")]
    assert [storage.load_checkpoint(path)["record"]["epochs"] for path in paths] == [2, 2]

    # Students of other settings are not mixed with these; a damaged study is told.
    with pytest.raises(InputError, match="TinyVAE32 did not finish"):
        search_architecture.main([*flags, "--rate", "20"])
    (tmp_path / "checkpoints" / "search" / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="cannot be used as an Optuna study"):
        search_architecture.main(flags)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("it did not finish")])
def test_an_interrupted_trial_is_proposed_again_and_the_front_is_at_the_nats(
    search, monkeypatch, error
):
    nats, names = [80, 90, 80, 80], []

    def train(name, shape, epochs):
        names.append(name)
        if len(names) == 1:
            raise error
        figures = {"sampled_mse": len(names) / 10, "kl_nats": nats[len(names) - 2]}
        return {"student": name} | figures

    monkeypatch.setattr(search, "train", train)
    with pytest.raises(error if isinstance(error, type) else InputError):
        search.study.optimize(search.objective)
    enough = optuna.study.MaxTrialsCallback(4)
    search.study.optimize(search.objective, callbacks=[enough])
    assert names == ["TinyVAE32", "66 at most", "48 at most", "27 at most", "TinyVAE32"]
    front = [row["student"] for row in search.rows() if row["on_front"]]
    assert front == ["66 at most", "27 at most"]  # 48 at other nats; TinyVAE32 is worse and larger


def test_a_killed_search_loses_no_trial_and_two_processes_share_one(tmp_path):
    script = (
        "import search_architecture as s; s.KNOWN = {'TinyVAE32': 128}; s.HEARTBEAT = 1; "
        "s.run_script(s.main)"
    )
    command = [sys.executable, "-c", script, *SEARCH, "--trials", "3", *folders(tmp_path)]

    def running():
        return [trial.params for trial in trials(tmp_path) if trial.state.name == "RUNNING"]

    killed = subprocess.Popen(command, cwd=HERE)
    while len(list(tmp_path.glob("checkpoints/search/*_1_epochs"))) < 2:  # TinyVAE32, and a trial's
        assert killed.poll() is None
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (lost,) = running()
    time.sleep(3)  # until it counts as dead
    processes = [subprocess.Popen(command, cwd=HERE) for _ in range(2)]
    assert [process.wait(timeout=150) for process in processes] == [0, 0]
    complete = [trial.params for trial in trials(tmp_path) if trial.state.name == "COMPLETE"]
    assert len(complete) in (3, 4)  # the last two may have been in training at once
    assert lost in complete and not running()
