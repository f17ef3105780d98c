"""The scripts beside the distillation: evaluation, ablation, pruning, bench."""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ablate_distillation
import bench_peers
import bench_scaling
import bench_training
import comparison
import data
import distill_tinyvae
import losses
import metrics
import models
import optimizer
import progressive_distillation
import prune_tinyvae
import storage
import test_trained_model
import training
from runtime import InputError
from settings import parse_settings
from testing import folders, needs_cuda, random_images, read_csv, teacher_of, train
from tiny_vae_32 import TinyVAE32
from vae import VAE

FITTED = {}  # PCA of the same few images, which takes seconds


@pytest.fixture(autouse=True)
def pca_is_fitted_once(monkeypatch):
    def fit(images, components):
        key = images.numpy().tobytes(), components
        if key not in FITTED:
            FITTED[key] = metrics.fit_pca(images, components)
        return FITTED[key]

    for script in (ablate_distillation, test_trained_model):
        monkeypatch.setattr(script, "fit_pca", fit)


# --- The evaluation script ---


def test_evaluation_script(tiny_run, tmp_path, capsys):
    run, _ = tiny_run
    flags = ["--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(tmp_path)]
    test_trained_model.main([*flags, "--device", "cpu", "--batch-size", "8"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(record["results"]) == ["teacher", "student", "PCA, 64 components"]
    student = record["results"]["student"]
    assert student["parameters"] == 294_403
    # The figures are those of the test split, computed here another way.
    vae, _ = models.load_model(run / "checkpoints" / "tinyvae_best.pth", TinyVAE32)
    images = data.to_float(data.dead_leaves(70, "test"))
    assert student["mse"] == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)
    ratio = record["results"]["teacher"]["weight_bytes"] / student["weight_bytes"]
    assert f"{ratio:.1f}×" in printed
    # The last lines are the answer and the pictures.
    answer = printed[printed.index("On 70 test images of dead-leaves"):]
    assert f"MSE of {student['mse']:.5f} at {student['kl_nats']:.1f} nats" in answer
    assert "worse than PCA with 64 components" in answer and "times the teacher's error" in answer
    assert answer.rstrip().endswith("colours.png")
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
        "traversal.png", "colours.png",
    }
    assert student["cka"] < record["results"]["teacher"]["cka"] == pytest.approx(1)


def test_evaluation_is_beside_the_teacher_of_the_training(tiny_run, tmp_path, without_pictures):
    # Another run's teacher_vae.pth is in the folder.
    run, _ = tiny_run
    other = tmp_path / "checkpoints" / "teacher_vae.pth"
    other.parent.mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", other)
    train(tmp_path, *teacher_of(run), "--epochs", "1")
    settings = parse_settings(vars(test_trained_model), [])
    settings.checkpoint_dir = other.parent
    _, _, teacher_path, _ = test_trained_model.load_models(settings)
    assert teacher_path == run / "checkpoints" / "teacher_vae.pth"
    settings.teacher = other
    assert test_trained_model.load_models(settings)[2] == other


def test_a_student_without_a_teacher_is_beside_one_that_is_named_alone(
    tiny_run, tmp_path, capsys, without_pictures
):
    run, _ = tiny_run
    train(tmp_path, "--teacher", "none", "--epochs", "1")
    other = tmp_path / "checkpoints" / "teacher_vae.pth"
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", other)  # of another run
    settings = parse_settings(vars(test_trained_model), [])
    settings.checkpoint_dir = other.parent
    found, _, teacher_path, _ = test_trained_model.load_models(settings)
    assert list(found) == ["student"] and teacher_path is None
    assert "teacher  none: the student was trained without one" in capsys.readouterr().out
    settings.teacher = Path("teacher_vae.pth")
    found, _, teacher_path, _ = test_trained_model.load_models(settings)
    assert list(found) == ["teacher", "student"] and teacher_path == other


def test_evaluation_takes_the_architecture_from_the_checkpoint(tmp_path, capsys):
    vae = TinyVAE32(latent_dim=12, encoder_channels=(4, 8, 8, 8), decoder_channels=(8, 8, 8, 4))
    path = tmp_path / "pruned.pth"
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    flags = ["--student", str(path), "--data", "dead-leaves", "--limit", "64", "--device", "cpu"]
    test_trained_model.main([*flags, *folders(tmp_path), "--pca-components", "12"])
    missing = tmp_path / "checkpoints" / "teacher_vae.pth"
    assert f"teacher  left out: there is no {missing}\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert record["results"]["student"]["parameters"] == models.count_parameters(vae)
    for bad, message in (
        (["--student", "nowhere.pth"], "there is no checkpoint"),
        ([*flags, "--teacher", "nowhere.pth"], "there is no checkpoint"),
        (["--student", str(path)], "does not say its images"),
    ):
        with pytest.raises(InputError, match=message):
            test_trained_model.main([*bad, *folders(tmp_path)])


def test_the_released_teacher_is_what_its_card_says():
    path = models.RELEASED.with_name("teacher_cifar10.pth")
    assert path.stat().st_size < 19_000_000  # in half precision
    teacher, checkpoint = models.load_model(path, VAE)
    assert models.count_parameters(teacher) == 8_664_195
    assert teacher.fc_mu.weight.dtype == torch.float32
    record = checkpoint["record"]
    recipe = vars(parse_settings(vars(distill_tinyvae), []))
    for name in ("epochs", "kl_weight", "learning_rate", "latent_dim", "channels"):
        assert record[f"teacher_{name}"] == recipe[f"teacher_{name}"]
    assert all(record[name] == recipe[name] for name in ("batch_size", "warmup", "seed"))
    # On photographs of another kind than it was trained on.
    images = data.load_test_images("photo-crops", 100).images
    assert metrics.evaluate_vae(teacher, images)["mse"] < 0.002
    # What its codes and what it leaves out are distributed like, for making images.
    covariance = checkpoint["codes"]["covariance"]
    assert covariance.shape == (512, 512) and torch.linalg.eigvalsh(covariance).min() > 0
    assert checkpoint["residual_spectrum"].shape == (32, 17, 3, 3)


def test_the_released_student_is_what_its_card_says(tmp_path, capsys, monkeypatch):
    released = models.RELEASED
    assert released.stat().st_size < 1_300_000
    vae, checkpoint = models.load_model(released, TinyVAE32)
    assert models.count_parameters(vae) == 294_403
    record = checkpoint["record"]
    assert set(checkpoint) == {"stage", "architecture", "epoch", "model", "record", "evaluation"}
    assert not [value for value in record.values() if str(value).startswith("/")]
    recipe = vars(parse_settings(vars(distill_tinyvae), []))
    for name in (
        "epochs", "optimizer", "learning_rate", "batch_size", "warmup", "seed",
        "reconstruction_weight", "kl_weight", "kl_scale", "output_weight", "perceptual_weight",
        "perceptual_scale",
    ):
        assert record[name] == recipe[name]
    assert not record["with_teacher"]  # an earlier recipe, as the card says

    # Without its images and without a network there are still figures and pictures.
    def no_network(*args, **kwargs):
        raise InputError("CIFAR-10 could not be downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_cifar10", no_network)
    monkeypatch.setattr(models, "RELEASED", tmp_path / "checkpoints" / released.name)
    models.RELEASED.parent.mkdir()
    storage.save_checkpoint(models.RELEASED, checkpoint)
    test_trained_model.main([*folders(tmp_path), "--limit", "64", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "the released one" in printed and "not cifar10: CIFAR-10 could not" in printed
    assert "not those the student was trained on" in printed
    assert checkpoint["evaluation"] in printed and "MSE of 0.00716 at 86.8 nats" in printed
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["data"] == "photo-crops" and found["results"]["student"]["mse"] < 0.006


# --- The ablation ---


def test_the_search_for_a_rate_gets_there_though_the_slope_is_another():
    asked = []

    def rate_of(kl_weight, slope=-20):
        asked.append(kl_weight)
        return 80 + slope * math.log(kl_weight / 0.3)

    found = ablate_distillation.match_rate(rate_of, 0.1, 80, 0.015)
    assert found == pytest.approx(0.3, rel=0.1) and len(asked) <= 4
    assert ablate_distillation.match_rate(rate_of, found, 80, 0.015) == found
    # Where it cannot get there, the nearest it tried.
    tried = []
    nearest = ablate_distillation.match_rate(
        lambda weight: tried.append(weight) or 50 + 1e-3 / weight, 0.1, 80, 0.015
    )
    assert nearest == min(tried) and len(tried) == ablate_distillation.SEARCHES


def test_the_comparison_with_scratch_is_made_at_the_same_rate():
    rows = [
        {"variant": "scratch", "seed": 0, "kl_weight": 0.1, "kl_nats": 100.0, "mse": 0.010},
        {"variant": "scratch", "seed": 0, "kl_weight": 0.2, "kl_nats": 80.0, "mse": 0.012},
        {"variant": "full", "seed": 0, "kl_weight": 0.1, "kl_nats": 88.0, "mse": 0.0102},
        {"variant": "full", "seed": 1, "kl_weight": 0.1, "kl_nats": 92.0, "mse": 0.0096},
        {"variant": "no KL", "seed": 0, "kl_weight": 0.0, "kl_nats": 300.0, "mse": 0.009},
    ]
    summary = {found["variant"]: found for found in ablate_distillation.summarise(rows)}
    mean, deviation = summary["full"]["mse"]
    assert mean == pytest.approx(0.0099) and deviation == pytest.approx(0.0006 / 2**0.5)
    every = ablate_distillation.summarise(rows)
    gain = ablate_distillation.against_scratch(summary["full"], every, "mse")
    assert gain == pytest.approx(0.0099 / 0.011 - 1)  # 0.011 is half way, at 90 nats
    # No student without a teacher has that rate: nothing to compare with.
    assert ablate_distillation.against_scratch(summary["no KL"], every, "mse") is None


def test_constants_that_are_of_a_single_run_do_not_reach_students_that_are_compared(
    tmp_path, monkeypatch, in_this_process
):
    for name, value in (("START", "nowhere.pth"), ("OVERWRITE", True), ("DEMO", True)):
        monkeypatch.setattr(distill_tinyvae, name, value)
    settings = {
        "data": "dead-leaves", "limit": 64, "batch_size": 32, "epochs": 1, "vgg": "none",
        "latent_weight": 0, "output_weight": 0, "device": "cpu",
    }
    assert comparison.run_distillation("one", tmp_path, settings)["epoch"] == 1


def test_an_ablation_resumes_where_it_stopped(
    tiny_run, tmp_path, capsys, monkeypatch, in_this_process
):
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", tmp_path / "checkpoints")
    flags = [
        *folders(tmp_path), "--vgg", "none", "--limit", "70", "--epochs", "2", "--seeds", "1",
        "--variants", "no latent", "--rate-tolerance", "1", "--device", "cpu",
    ]
    steps = training.Stage.steps
    epochs = []

    def interrupted(self):
        epochs.append(len(self.rows))
        if len(epochs) == 4:
            raise KeyboardInterrupt
        yield from steps(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Stage, "steps", interrupted)
        ablate_distillation.main(flags)
    assert epochs == [0, 1, 0, 1]  # full, then scratch, stopped in its second epoch
    with monkeypatch.context() as patch:
        patch.setattr(training.Stage, "steps", interrupted)
        ablate_distillation.main(flags)
    assert epochs[4:] == [1, 0, 1, 0, 1, 0, 1]  # its second, two other rates, no latent
    assert "| no latent" in capsys.readouterr().out
    log = tmp_path / "checkpoints" / "ablation" / in_this_process[1] / "log.txt"
    assert "Resuming the student after epoch 1" in log.read_text()
    rows = read_csv(tmp_path / "outputs" / "ablation.csv")
    assert [row["variant"] for row in rows] == ["full", *["scratch"] * 3, "no latent"]
    assert (tmp_path / "outputs" / "ablation.png").stat().st_size > 10_000

    # Measured on the other split without training; refused for another budget or judge.
    monkeypatch.setattr(training.Stage, "steps", None)
    monkeypatch.setattr(ablate_distillation, "draw_rate_distortion", lambda *_: None)  # slow
    ablate_distillation.main([*flags, "--split", "test"])
    again = read_csv(tmp_path / "outputs" / "ablation.csv")
    assert [row["val_mse"] for row in rows] == [row["val_mse"] for row in again]
    assert rows[0]["mse"] != again[0]["mse"]
    distances = []
    for judged in ("2", "4"):  # other images are another measurement of the same students
        ablate_distillation.main([*flags, "--judge", "random", "--judged", judged])
        distances.append(read_csv(tmp_path / "outputs" / "ablation.csv")[0]["vgg_distance"])
    assert distances[0] != distances[1]
    with pytest.raises(InputError, match="full, seed 0 did not finish, for the reason above"):
        ablate_distillation.main([*flags, "--epochs", "3"])
    assert "epochs was 2, is 3" in capsys.readouterr().err
    with pytest.raises(InputError, match="no variant 'no student': choose from no teacher"):
        ablate_distillation.main([*flags, "--variants", "no student"])
    with pytest.raises(InputError, match="cannot judge"):
        ablate_distillation.main([*flags, "--vgg", "random", "--judge", "random"])


def test_figures_are_measured_again_where_what_they_depend_on_changes(
    tmp_path, monkeypatch, capsys
):
    vae = TinyVAE32()
    storage.save_checkpoint(
        tmp_path / "tinyvae_last.pth", {"architecture": vae.architecture, "model": vae.state_dict()}
    )
    comparison_of = SimpleNamespace(
        settings=SimpleNamespace(split="val"), judge=None, teacher_sha256="t", judged=[],
        held_out=data.Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None),
        record={"pixels_sha256": "p"}, judge_record={"vgg_sha256": ""}, device="cpu",
    )
    calls = []
    monkeypatch.setattr(
        ablate_distillation, "measure", lambda *args: calls.append(1) or {"mse": len(calls)}
    )

    def measured():
        return ablate_distillation.measured(comparison_of, tmp_path)["mse"]

    assert [measured(), measured()] == [1, 1]
    comparison_of.settings.split = "test"
    assert [measured(), measured()] == [2, 2]
    comparison_of.held_out.images[0] = 1
    assert [measured(), measured()] == [3, 3]
    changed = tmp_path / "metrics.py"  # the code that measures
    changed.write_text("another definition")
    monkeypatch.setattr(ablate_distillation, "MEASURED_BY", [changed])
    assert [measured(), measured()] == [4, 4]
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "measured.json").write_text(damaged)
        assert measured() == measured()
        assert capsys.readouterr().out.endswith("measured.json is damaged: measuring again\n")
    assert measured() == 7


# --- Pruning ---


def test_channels_that_do_nothing_are_those_that_go():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    vae = TinyVAE32(6, encoder_channels=(8, 16, 16, 16), decoder_channels=(16, 16, 16, 8))
    for module in vae.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    encoder, decoder = prune_tinyvae.pruned_widths(vae, 0.6)
    assert encoder[0] == decoder[3] == 8 and len({*encoder[1:], *decoder[:3]}) == 1
    width = encoder[1]
    idle = torch.randperm(16)[width:]  # others in each stage would do as well
    with torch.no_grad():
        for i in (1, 2, 3):  # stages of the encoder, with what reads them
            for layer in vae.encoder[3 * i : 3 * i + 2]:  # the convolution and its BatchNorm
                layer.weight[idle] = layer.bias[idle] = 0
            if i < 3:
                vae.encoder[3 * i + 3].weight[:, idle] = 0
            vae.encoder[3 * i + 1].running_mean[idle] = 0
        for reader in (vae.fc_mu, vae.fc_logvar):
            reader.weight.view(6, 16, 4)[:, idle] = 0
        vae.decoder_input.weight.view(16, 4, 6)[idle] = 0
        vae.decoder_input.bias.view(16, 4)[idle] = 0
        for i in (0, 1, 2):
            vae.decoder[3 * i].weight[idle] = 0  # reads stage i
            if i < 2:
                vae.decoder[3 * i].weight[:, idle] = vae.decoder[3 * i].bias[idle] = 0
                normal = vae.decoder[3 * i + 1]
                normal.weight[idle] = normal.bias[idle] = normal.running_mean[idle] = 0
    images = random_images(4)
    before = vae.eval()(images)
    small = prune_tinyvae.prune(vae, *prune_tinyvae.pruned_widths(vae, 0.6))
    for found, expected in zip(small(images), before):
        torch.testing.assert_close(found, expected)
    assert models.count_parameters(small) <= 0.4 * models.count_parameters(vae)
    for found, expected in zip(vae(images), before):  # it was left as it was
        assert torch.equal(found, expected)


def test_without_torch_pruning_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"torch_pruning is needed.*-r requirements-deploy\.txt"):
        prune_tinyvae.prune(TinyVAE32(), (8, 8, 8, 8), (8, 8, 8, 8))


def test_pruned_students_are_trained_once_and_every_script_loads_them(
    tiny_run, tmp_path, capsys, monkeypatch, in_this_process
):
    pytest.importorskip("torch_pruning")
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    for name in ("teacher_vae.pth", "tinyvae_best.pth"):
        shutil.copy(run / "checkpoints" / name, tmp_path / "checkpoints")
    flags = [
        *folders(tmp_path), "--vgg", "none", "--limit", "64", "--epochs", "1", "--ratios", "0.5",
        "--device", "cpu",
    ]
    prune_tinyvae.main(flags)
    printed = capsys.readouterr().out
    assert "| pruned, −50%" in printed and "| fresh, −50%" in printed
    whole, pruned, fresh = read_csv(tmp_path / "outputs" / "pruning.csv")
    assert int(pruned["parameters"]) <= 0.5 * int(whole["parameters"])
    assert pruned["channels"] == fresh["channels"] and pruned["mse"] != fresh["mse"]
    assert "teacher  none" in printed
    folder = tmp_path / "checkpoints" / "pruned" / "pruned_0.5"
    assert not storage.load_checkpoint(folder / "tinyvae_best.pth")["record"]["with_teacher"]
    assert (tmp_path / "outputs" / "pruning.png").stat().st_size > 10_000

    monkeypatch.setattr(training.Stage, "steps", None)
    prune_tinyvae.main(flags)  # nothing is trained again
    assert in_this_process == ["pruned_0.5", "fresh_0.5"] * 2
    with pytest.raises(InputError, match="pruned, −50% did not finish"):
        prune_tinyvae.main([*flags, "--epochs", "2"])
    assert "epochs was 1, is 2" in capsys.readouterr().err
    for ratios in ("0.5,1.5", "half", ""):
        with pytest.raises(SystemExit):
            prune_tinyvae.main([*flags, "--ratios", ratios])
        assert "argument --ratios: must be one value or more" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no student is left with 0\.999 of the parameters"):
        prune_tinyvae.main([*flags, "--ratios", "0.999"])
    path = tmp_path / "checkpoints" / "pruned" / "pruned_0.5" / "tinyvae_best.pth"
    test_trained_model.main([*folders(tmp_path), "--student", str(path), "--limit", "64"])
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["results"]["student"]["parameters"] == int(pruned["parameters"])


# --- Stages ---


SMALL, SMALLER = "8-12-16-24_64_24-16-12-8", "4-8-12-16_64_16-12-8-4"
STAGES = (
    "--vgg", "none", "--limit", "70", "--epochs", "2,1", "--device", "cpu", "--precision", "fp32",
    "--stages", f"{SMALL},{SMALLER}", "--rate", "30",
)


def test_each_stage_learns_from_the_one_before(
    tiny_run, tmp_path, capsys, monkeypatch, in_this_process
):
    run, _ = tiny_run
    flags = [*STAGES, *folders(tmp_path), *teacher_of(run)]
    progressive_distillation.main(flags)
    printed = capsys.readouterr().out
    for name in ("stage 1", "stage 2", "direct, same steps", "no teacher, same computing"):
        assert f"| {name} " in printed
    first, last, direct, none, longer, none_longer = read_csv(
        tmp_path / "outputs" / "progressive.csv"
    )
    assert (first["shape"], last["shape"]) == (SMALL, SMALLER)
    folder = tmp_path / "checkpoints" / "progressive"

    def record(row):
        name = f"{row['student']}_{row['shape']}_{row['epochs']}_epochs"
        name = name.replace(" ", "_").replace(",", "")
        return storage.load_checkpoint(folder / name / "tinyvae_last.pth")

    best = folder / f"stage_1_{SMALL}_2_epochs" / "tinyvae_best.pth"
    assistant, _ = models.load_model(best, TinyVAE32)
    found = [record(row)["record"] for row in (first, last, direct, none)]
    assert found[1]["teacher_sha256"] == storage.fingerprint(assistant)
    assert found[1]["teacher_architecture"]["name"] == "TinyVAE32"
    assert found[0]["teacher_sha256"] == found[2]["teacher_sha256"] != found[1]["teacher_sha256"]
    assert [r["projection"] for r in found[:3]] == ["pixels", "identity", "pixels"]
    assert not found[3]["with_teacher"] and all(r["rate"] == 30 for r in found)
    # As much computing as both stages: 2 epochs of the larger and 1 of the smaller.
    macs = [models.count_macs(TinyVAE32(**comparison.shape().read(s))) for s in (SMALL, SMALLER)]
    epochs = round((2 * macs[0] + macs[1]) / macs[1])
    assert int(longer["epochs"]) == int(none_longer["epochs"]) == epochs > 3
    # The figures are those of the checkpoint, computed here another way.
    best = folder / f"stage_2_{SMALLER}_1_epochs" / "tinyvae_best.pth"
    vae, _ = models.load_model(best, TinyVAE32)
    images = data.to_float(data.load_training_images("dead-leaves", 70).val)
    assert float(last["mse"]) == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)

    monkeypatch.setattr(training.Stage, "steps", None)
    progressive_distillation.main(flags)  # nothing is trained again
    assert len(in_this_process) == 12
    with pytest.raises(InputError, match="--epochs has 3 values for 2 stages"):
        progressive_distillation.main([*flags, "--epochs", "1,1,1"])
    wide = "8-12-16-24_96_24-16-12-8"
    for stages, message in (
        (f"{wide},{SMALLER}", "stage 1 has 96 latents and stage 2 64: --projections identity"),
        (f"{SMALL},{wide}", "stage 1 has 64 latents and stage 2 96"),
    ):
        with pytest.raises(InputError, match=message):
            progressive_distillation.main([*flags, "--stages", stages])
    assert len(in_this_process) == 12


@pytest.mark.parametrize(
    "word", ["16-32", "16-32-64-128_64", "a-b-c-d_64_1-2-3-4", "1-2-3-4_0_1-2-3-4"]
)
def test_a_shape_that_is_none_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        progressive_distillation.main([*STAGES, "--stages", word])
    assert "each a shape like 16-32-64-128_64_128-64-32-16" in capsys.readouterr().err


def test_a_shape_and_its_word_are_the_same():
    architecture = dict(TinyVAE32().architecture)
    word = comparison.shape_name(architecture)
    assert word == "16-32-64-128_64_128-64-32-16"
    assert TinyVAE32(**comparison.shape().read(word)).architecture == architecture


def test_the_teachers_code_as_it_is_needs_as_many_latents(tiny_run, tmp_path):
    run, _ = tiny_run
    with pytest.raises(InputError, match="the teacher has 128 latents and the student 64"):
        train(tmp_path, *teacher_of(run), "--projection", "identity")


# --- The bench ---


BENCH = ["--limit", "70", "--batch-size", "16", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def bench():
    flags = [*BENCH, "--precision", "fp32"]
    return bench_training.Bench(parse_settings(vars(bench_training), flags))


def test_the_bench_times_the_terms_and_epochs_of_distill_tinyvae():
    recipe = parse_settings(vars(distill_tinyvae), [])
    settings = parse_settings(vars(bench_training), [])
    assert settings.batch_size == recipe.batch_size
    weights = {name: getattr(recipe, f"{name}_weight") for name in losses.TERMS}
    assert weights == bench_training.WEIGHTS
    assert {"kl": recipe.kl_scale, "perceptual": recipe.perceptual_scale} == bench_training.SCALES
    epochs = {"teacher": recipe.teacher_epochs, "student": recipe.epochs}
    assert epochs == bench_training.RECIPE_EPOCHS


def test_the_straightforward_loop_computes_what_distill_tinyvae_does(
    bench, tmp_path, monkeypatch, without_pictures
):
    # At the same rate, on the same images: caches, layouts and fused kernels change nothing but
    # rounding, which the steps let grow, and the teacher's logits, which are kept in fp16.
    def batches(self):
        order = torch.Generator().manual_seed(0)
        while True:
            yield from data.shuffled_batches(len(self.images), self.batch_size, order)

    monkeypatch.setattr(bench_training.Bench, "indices", batches)
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *_, **__: SimpleNamespace(
        step=lambda: None
    ))
    monkeypatch.setattr(optimizer, "one_cycle", lambda *_: 1.0)
    kept = [bench_training.RESIDENT, bench_training.FEW_IMAGES]
    plain = bench_training.straightforward(bench, "student", kept)
    plain_losses = [plain() for _ in range(12)]

    teacher = tmp_path / "teacher.pth"
    storage.save_checkpoint(
        teacher, {"architecture": bench.teacher.architecture, "model": bench.teacher.state_dict()}
    )
    our_losses = []
    log = training.Stage.log

    def watch(self, loss, terms, weighted):
        our_losses.append(loss.item())
        log(self, loss, terms, weighted)

    monkeypatch.setattr(training.Stage, "log", watch)
    distill_tinyvae.main([
        "--data", "dead-leaves", "--vgg", "random", "--limit", "70", "--batch-size", "16",
        "--epochs", "3", "--teacher", str(teacher), "--device", "cpu",
        "--precision", "fp32", "--optimizer", "adam", "--learning-rate", "0.001",
        "--perceptual-images", "4", *folders(tmp_path),
    ])
    assert our_losses == pytest.approx(plain_losses, rel=1e-3)
    assert our_losses[-1] < 0.95 * our_losses[0]


def test_the_bench_counts_the_work_there_is(bench):
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.ones(8, 10)
    macs, traffic = bench_training.count_work(lambda: linear(x))
    assert macs == 8 * 10 * 20 and traffic == 4 * (8 * 10 + 10 * 20 + 8 * 20)
    tricks = bench_training.tricks_of(bench.device, "fp32")
    ours, _ = bench_training.count_work(bench_training.straightforward(bench, "student", tricks))
    tricks.remove(bench_training.FEW_IMAGES)
    more, _ = bench_training.count_work(bench_training.straightforward(bench, "student", tricks))
    assert more > 2.5 * ours


def test_the_bench_prints_and_draws_what_it_measures(
    tmp_path, capsys, monkeypatch, in_this_process
):
    def few_variants(bench):
        return {
            ("student", "straightforward"): lambda: time.sleep(0.006),
            ("teacher", "straightforward"): lambda: time.sleep(0.008),
            ("student", f"+ {bench_training.FEW_IMAGES}"): lambda: time.sleep(0.003),
        }

    monkeypatch.setattr(bench_training, "make_variants", few_variants)
    flags = [*BENCH, "--repeats", "1", "--seconds", "0.02", "--no-inference"]
    flags += ["--output-dir", str(tmp_path)]
    bench_training.main(flags)
    rows = {(row["stage"], row["variant"]): row for row in
            read_csv(tmp_path / "bench_training.csv")}
    few = rows["student", f"+ {bench_training.FEW_IMAGES}"]
    assert float(few["ms_per_step"]) == pytest.approx(3, abs=1.5)
    assert float(few["ratio"]) == pytest.approx(2, abs=1)  # 6 ms against 3
    for stage in ("teacher", "student"):  # those of distill_tinyvae.py
        assert float(rows[stage, "ours"]["ms_per_step"]) > 1
    assert "floor by arithmetic" in capsys.readouterr().out
    for bad, message in ((["--limit", "15"], "do not fill a batch"), (["--vgg", "none"], "random")):
        with pytest.raises(InputError, match=message):
            bench_training.main([*flags, *bad])
    assert (tmp_path / "bench_training.png").stat().st_size > 5_000


def test_the_bench_says_where_the_time_goes_and_whether_it_can_compile(bench, capsys):
    found = bench_training.time_operations(bench, "student", steps=2)
    assert set(found) == set(bench_training.KERNELS.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    convolutions = found["convolutions, forward"] + found["convolutions, backward"]
    assert convolutions > 0.3 * sum(found.values())

    def fails():
        raise RuntimeError("no compiler\nhere")

    assert bench_training.works_compiled(lambda: None)
    assert not bench_training.works_compiled(fails)
    assert "does not work here: RuntimeError: no compiler here\n" in capsys.readouterr().out


# --- CUDA ---


@needs_cuda
def test_the_bench_on_cuda(tmp_path, capsys):
    flags = ["--limit", "64", "--repeats", "1", "--seconds", "0.01", "--output-dir", str(tmp_path)]
    bench_training.main([*flags, "--device", "cuda"])
    assert f"ours without {bench_training.GRAPH}" in capsys.readouterr().out


@needs_cuda
def test_the_evaluation_on_cuda(tiny_run, tmp_path):
    run, _ = tiny_run
    flags = ["--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(tmp_path)]
    test_trained_model.main([*flags, "--device", "cuda"])
    assert (tmp_path / "evaluation.json").exists()


# --- bench_peers.py ---


def test_the_trainers_of_the_bench_do_the_same_job(tmp_path, capsys):
    flags = ("--trainers", "ours,loop", "--data", "dead-leaves", "--limit", "512", "--repeats", "1",
             "--batch-size", "32", "--output-dir", str(tmp_path))
    bench_peers.main([*flags, "--jobs", "student,distillation"])
    rows = read_csv(tmp_path / "bench_peers.csv")
    jobs = [(row["job"], row["trainer"], row["steps"]) for row in rows]
    assert jobs == [(job, trainer, "32") for job in ("student", "distillation")
                    for trainer in ("ours", "loop")]
    assert all(float(row[key]) > 0 for row in rows for key in bench_peers.COLUMNS[-4:])
    assert capsys.readouterr().out.count("times as fast") == 4
    for bad, sentence in (
        (("--jobs", "teacher", "--limit", "200"), "50 images do not fill two batches"),
        (("--vgg", "none"), "leaves out what is to be timed"),
        (("--vgg", str(tmp_path / "none.pth")), "ours could not do the distillation job: error: "),
    ):
        with pytest.raises(InputError, match=sentence):
            bench_peers.main([*flags, "--jobs", "distillation", *bad])


@pytest.mark.parametrize("trainer", ["pythae", "lightning", "accelerate"])
def test_others_train_where_they_are_installed(tmp_path, trainer):
    pytest.importorskip(trainer)
    flags = ("--trainers", trainer, "--limit", "512", "--repeats", "1", "--jobs", "student")
    bench_peers.main([*flags, "--output-dir", str(tmp_path)])
    (row,) = read_csv(tmp_path / "bench_peers.csv")
    assert (row["trainer"], row["steps"]) == (trainer, "16")


def test_the_bench_and_the_recipe_weigh_the_terms_alike():
    """The loss that the other trainers minimise is that of distill_tinyvae.py."""
    settings = parse_settings(vars(distill_tinyvae), [])
    weights = {name: getattr(settings, f"{name}_weight") for name in losses.TERMS}
    assert weights == bench_peers.WEIGHTS
    scales = {name: getattr(settings, f"{name}_scale") for name in bench_peers.SCALES}
    assert scales == bench_peers.SCALES
    assert settings.perceptual_images == bench_peers.PERCEPTUAL_IMAGES


def test_a_trainer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(InputError, match=r"lightning is needed here .*: pip install pythae"):
        bench_peers.main(["--trainers", "lightning", "--output-dir", str(tmp_path)])


# --- bench_scaling.py ---


def test_one_thing_is_changed_at_a_time(tmp_path, capsys):
    flags = ("--images", "64,128", "--batch-sizes", "32,16", "--latents", "8", "--processes", "1",
             "--epochs", "1", "--device", "cpu", "--output-dir", str(tmp_path))
    bench_scaling.main(flags)
    rows = read_csv(tmp_path / "bench_scaling.csv")
    found = [[row[key] for key in ("changed", *bench_scaling.AXES)] for row in rows]
    assert found == [["", "64", "32", "8", "1"], ["images", "128", "32", "8", "1"],
                     ["batch_size", "64", "16", "8", "1"]]
    for row in rows:
        rate = 1000 * int(row["batch_size"]) / float(row["ms_per_step"])
        assert float(row["images_per_second"]) == pytest.approx(rate)
        assert 100 < float(row["peak_megabytes"]) < 10_000
    assert (tmp_path / "bench_scaling.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count(" MB |") == 3
    with pytest.raises(InputError, match="did not finish, for the reason above"):
        bench_scaling.main([*flags, "--batch-sizes", "128"])
