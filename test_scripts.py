"""The scripts beside the distillation: evaluation, ablation, pruning, bench."""

import csv
import json
import math
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ablate_distillation
import bench_training
import data
import distill_tinyvae
import models
import prune_tinyvae
import runtime
import storage
import test_trained_model
import training
from runtime import InputError
from testing import folders, needs_cuda, random_images
from tiny_vae_32 import TinyVAE32

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
    images = data.to_float(data.dead_leaves(64, data.SPLIT_SEED, "test"))
    assert student["mse"] == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)
    ratio = record["results"]["teacher"]["weight_bytes"] / student["weight_bytes"]
    assert 28.5 < ratio < 29.5 and f"{ratio:.1f}×" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
        "traversal.png",
    }
    assert student["cka"] < record["results"]["teacher"]["cka"] == pytest.approx(1)


def test_evaluation_takes_the_architecture_from_the_checkpoint(tmp_path, capsys):
    vae = TinyVAE32(latent_dim=12, encoder_channels=(4, 8, 8, 8), decoder_channels=(8, 8, 8, 4))
    path = tmp_path / "pruned.pth"
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": vae.state_dict()})
    flags = ["--student", str(path), "--data", "dead-leaves", "--limit", "64", "--device", "cpu"]
    test_trained_model.main([*flags, *folders(tmp_path), "--pca-components", "12"])
    assert "teacher  left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert record["results"]["student"]["parameters"] == models.count_parameters(vae)
    for bad, message in (
        (["--student", "nowhere.pth"], "there is no checkpoint"),
        ([*flags, "--teacher", "nowhere.pth"], "there is no checkpoint"),
        (["--student", str(path)], "does not say its images"),
    ):
        with pytest.raises(InputError, match=message):
            test_trained_model.main([*bad, *folders(tmp_path)])


def test_the_released_student_is_what_its_card_says(tmp_path, capsys, monkeypatch):
    released = models.RELEASED
    assert released.stat().st_size < 1_300_000
    vae, checkpoint = models.load_model(released, TinyVAE32)
    assert models.count_parameters(vae) == 294_403
    record = checkpoint["record"]
    assert set(checkpoint) == {"stage", "architecture", "epoch", "model", "record"}
    assert not [value for value in record.values() if str(value).startswith("/")]
    for constant in ("EPOCHS", "TEACHER_EPOCHS", "KL_WEIGHT", "LATENT_WEIGHT", "TEMPERATURE"):
        assert record[constant.lower()] == getattr(distill_tinyvae, constant)

    # Whoever has neither its images nor a network still gets figures and pictures, and is told.
    def no_network(*args, **kwargs):
        raise InputError("CIFAR-10 could not be downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_cifar10", no_network)
    monkeypatch.setattr(models, "RELEASED", tmp_path / "checkpoints" / released.name)
    storage.save_checkpoint(models.RELEASED, checkpoint)
    test_trained_model.main([*folders(tmp_path), "--limit", "64", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "the released one" in printed and "not cifar10: CIFAR-10 could not" in printed
    assert "not those the student was trained on" in printed
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["data"] == "dead-leaves" and found["results"]["student"]["mse"] < 0.02


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


def test_an_ablation_goes_on_where_it_stopped(tiny_run, tmp_path, capsys, monkeypatch):
    run, _ = tiny_run
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", tmp_path / "checkpoints")
    flags = [
        *folders(tmp_path), "--vgg", "none", "--limit", "64", "--epochs", "2", "--seeds", "1",
        "--variants", "no latent", "--rate-tolerance", "1", "--device", "cpu",
    ]
    train_epoch = training.Stage.train_epoch
    epochs = []

    def interrupted(self, bar):
        epochs.append(len(self.rows))
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Stage, "train_epoch", interrupted)
        ablate_distillation.main(flags)
    assert epochs == [0, 1, 0, 1]  # full, then scratch, stopped in its second epoch
    with monkeypatch.context() as patch:
        patch.setattr(training.Stage, "train_epoch", interrupted)
        ablate_distillation.main(flags)
    assert epochs[4:] == [1, 0, 1, 0, 1, 0, 1]  # its second, two other rates, no latent
    printed = capsys.readouterr().out
    assert "goes on after epoch 1" in printed and "| no latent" in printed
    with (tmp_path / "outputs" / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["full", *["scratch"] * 3, "no latent"]
    assert (tmp_path / "outputs" / "ablation.png").stat().st_size > 10_000

    # Measured on the other split without training; refused for another budget or judge.
    monkeypatch.setattr(training.Stage, "train_epoch", None)
    ablate_distillation.main([*flags, "--split", "test"])
    with (tmp_path / "outputs" / "ablation.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [row["val_mse"] for row in rows] == [row["val_mse"] for row in again]
    assert rows[0]["mse"] != again[0]["mse"]
    perceptual = []
    for judged in ("2", "4"):  # another exam is another measurement of the same students
        ablate_distillation.main([*flags, "--judge", "random", "--judged", judged])
        with (tmp_path / "outputs" / "ablation.csv").open() as file:
            perceptual.append(float(next(csv.DictReader(file))["perceptual"]))
    assert perceptual[0] != perceptual[1]
    with pytest.raises(InputError, match="epochs was 2, is 3"):
        ablate_distillation.main([*flags, "--epochs", "3"])
    with pytest.raises(InputError, match="no variant 'no teacher': choose from no rec"):
        ablate_distillation.main([*flags, "--variants", "no teacher"])
    with pytest.raises(InputError, match="cannot judge"):
        ablate_distillation.main([*flags, "--vgg", "random", "--judge", "random"])


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
    small = prune_tinyvae.prune(vae, 0.6)
    for found, expected in zip(small(images), before):
        torch.testing.assert_close(found, expected)
    assert models.count_parameters(small) <= 0.4 * models.count_parameters(vae)
    for found, expected in zip(vae(images), before):  # it was left as it was
        assert torch.equal(found, expected)


def test_without_torch_pruning_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"torch_pruning is needed.*-r requirements-deploy\.txt"):
        prune_tinyvae.prune(TinyVAE32(), 0.5)


def test_pruned_students_are_trained_once_and_every_script_loads_them(
    tiny_run, tmp_path, capsys, monkeypatch
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
    with (tmp_path / "outputs" / "pruning.csv").open() as file:
        whole, pruned, fresh = csv.DictReader(file)
    assert int(pruned["parameters"]) <= 0.5 * int(whole["parameters"])
    assert pruned["channels"] == fresh["channels"] and pruned["mse"] != fresh["mse"]
    assert (tmp_path / "outputs" / "pruning.png").stat().st_size > 10_000

    monkeypatch.setattr(training.Stage, "train_epoch", None)
    prune_tinyvae.main(flags)  # nothing is trained again
    with pytest.raises(InputError, match="epochs was 1, is 2"):
        prune_tinyvae.main([*flags, "--epochs", "2"])
    for ratios in ("0.5,1", "half", ""):
        with pytest.raises(InputError, match="--ratios takes shares"):
            prune_tinyvae.main([*flags, "--ratios", ratios])
    with pytest.raises(InputError, match=r"no student is left with 0\.999 of the parameters gone"):
        prune_tinyvae.main([*flags, "--ratios", "0.999"])
    path = tmp_path / "checkpoints" / "pruned" / "tinyvae_pruned_0.5.pth"
    test_trained_model.main([*folders(tmp_path), "--student", str(path), "--limit", "64"])
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["results"]["student"]["parameters"] == int(pruned["parameters"])


# --- The bench ---


@pytest.fixture
def bench():
    flags = ["--limit", "64", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
    found = bench_training.Bench(runtime.parse_flags(vars(bench_training), flags))
    found.recipe.batch_size = 16
    return found


def test_our_step_does_what_the_straightforward_loop_does(bench, monkeypatch):
    # At the same rate, on the same images: caches, layouts and fused kernels change nothing but
    # rounding, which the steps let grow, and the teacher's logits, which are kept in fp16.
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *_, **__: SimpleNamespace(
        step=lambda: None
    ))
    monkeypatch.setattr(training.Stage, "set_schedule", lambda *_: None)
    kept = [bench_training.RESIDENT, bench_training.FEW_IMAGES]
    plain = bench_training.straightforward(bench, "student", kept)
    plain_losses = [plain() for _ in range(10)]
    ours = bench_training.ours(bench, "student")
    our_losses = [ours()["loss"].item() for _ in range(10)]
    assert our_losses == pytest.approx(plain_losses, rel=1e-3)
    assert our_losses[-1] < 0.95 * our_losses[0]


def test_the_bench_counts_the_work_there_is(bench):
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.ones(8, 10)
    macs, traffic = bench_training.count_work(lambda: linear(x))
    assert macs == 8 * 10 * 20 and traffic == 4 * (8 * 10 + 10 * 20 + 8 * 20)
    tricks = bench_training.tricks_of(bench.device, "fp32")
    ours, _ = bench_training.count_work(bench_training.ours(bench, "student"))
    all_tricks = bench_training.straightforward(bench, "student", tricks)
    assert bench_training.count_work(all_tricks)[0] == ours
    tricks.remove(bench_training.FEW_IMAGES)
    more, _ = bench_training.count_work(bench_training.straightforward(bench, "student", tricks))
    assert more > 2.5 * ours


def test_the_bench_prints_and_draws_what_it_measures(tmp_path, capsys, monkeypatch):
    def two_variants(bench):
        return {
            ("student", "ours"): lambda: time.sleep(0.002),
            ("teacher", "ours"): lambda: time.sleep(0.004),
            ("student", "straightforward"): lambda: time.sleep(0.006),
            ("teacher", "straightforward"): lambda: time.sleep(0.008),
            ("student", f"+ {bench_training.FEW_IMAGES}"): lambda: time.sleep(0.003),
        }

    monkeypatch.setattr(bench_training, "make_variants", two_variants)
    flags = ["--limit", "64", "--seconds", "0.02", "--no-inference", "--output-dir", str(tmp_path)]
    bench_training.main([*flags, "--device", "cpu"])
    with (tmp_path / "bench_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["ms_per_step"]) == pytest.approx(2, abs=1.5)
    assert float(rows[0]["ratio"]) == pytest.approx(3, abs=1.5)  # 6 ms against 2
    assert "floor by arithmetic" in capsys.readouterr().out
    for bad, message in ((["--limit", "20"], "do not fill a batch"), (["--vgg", "none"], "random")):
        with pytest.raises(InputError, match=message):
            bench_training.main([*flags, *bad])
    assert (tmp_path / "bench_training.png").stat().st_size > 5_000


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
