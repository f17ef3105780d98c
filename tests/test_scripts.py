"""The scripts beside the distillation: evaluation, ablation, pruning, stages."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

import ablate_distillation
import distill_tinyvae
import progressive_distillation
import prune_tinyvae
import test_trained_model
from common import comparison, data, metrics, models, runs, sources, storage, synthetic
from common.runtime import InputError
from common.settings import parse_settings
from common.storage import read_csv
from standard_vae import StandardVAE
from tests.testing import folders, needs_cuda, random_images, refuse, teacher_of, train
from tiny_vae_32 import TinyVAE32

FITTED = {}  # PCA of the same few images, which takes seconds


@pytest.fixture(autouse=True)
def pca_is_fitted_once(monkeypatch):
    def fit(images, components):
        key = images.numpy().tobytes(), components
        if key not in FITTED:
            FITTED[key] = metrics.fit_pca(images, components)
        return FITTED[key]

    monkeypatch.setattr(test_trained_model, "fit_pca", fit)


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
    images = data.to_float(synthetic.dead_leaves(70, "test"))
    assert student["mse"] == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)
    ratio = record["results"]["teacher"]["weight_bytes"] / student["weight_bytes"]
    assert f"{ratio:.1f}×" in printed
    # The last lines are the answer and the pictures.
    answer = printed[printed.index("On 70 test images of dead-leaves"):]
    assert f"MSE of {student['mse']:.5f} at {student['kl_nats']:.1f} nats" in answer
    assert "worse than PCA with 64 components" in answer and "times the teacher's error" in answer
    assert answer.rstrip().endswith("swap.png")
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
        "traversal.png", "colours.png", "code_maps.pth", "swap.png",
    }
    # The student's code, by the saved map, is one that the teacher decodes.
    teacher, _ = models.load_model(run / "checkpoints" / "teacher_vae.pth")
    to_teacher = storage.load_checkpoint(tmp_path / "code_maps.pth")["student_to_teacher"]
    swapped = teacher.decode(F.linear(vae.encode(images)[0], **to_teacher))
    expected = record["swap"]["student_to_teacher"]
    assert F.mse_loss(swapped, images).item() == pytest.approx(expected, rel=1e-3)
    assert student["cka"] < record["results"]["teacher"]["cka"] == pytest.approx(1)
    with pytest.raises(InputError, match="of the student's own loss, which cannot judge it"):
        test_trained_model.main([*flags, "--judge", "random"])


def test_evaluation_is_beside_the_teacher_of_the_training_or_the_one_named(
    tiny_run, tmp_path, capsys, without_pictures
):
    run, _ = tiny_run
    other = tmp_path / "checkpoints" / "teacher_vae.pth"  # of another run, in the same folder
    other.parent.mkdir()
    shutil.copy(run / "checkpoints" / "teacher_vae.pth", other)

    def load(*flags):
        settings = parse_settings(vars(test_trained_model), [*folders(tmp_path), *flags])
        found, _, teacher_path, _ = test_trained_model.load_models(settings)
        return list(found), teacher_path

    train(tmp_path, *teacher_of(run), "--epochs", "1")
    assert load() == (["teacher", "student"], run / "checkpoints" / "teacher_vae.pth")
    assert load("--teacher", str(other)) == (["teacher", "student"], other)
    train(tmp_path, "--teacher", "none", "--epochs", "1", "--overwrite")
    assert load() == (["student"], None)
    assert "teacher  none: the student was trained without one" in capsys.readouterr().out
    assert load("--teacher", "teacher_vae.pth") == (["teacher", "student"], other)


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
    teacher, checkpoint = models.load_model(path, StandardVAE)
    assert models.count_parameters(teacher) == 8_664_195
    assert teacher.fc_mu.weight.dtype == torch.float32
    record = checkpoint["record"]
    recipe = parse_settings(vars(distill_tinyvae), []).as_dict()
    for name in ("epochs", "kl_weight", "learning_rate", "latent_dim", "channels"):
        assert record[f"teacher_{name}"] == recipe[f"teacher_{name}"]
    assert all(record[name] == recipe[name] for name in ("batch_size", "warmup", "seed"))
    # On photographs of another kind than it was trained on.
    images = sources.load_test_images("photo-crops", 100).images
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
    recipe = parse_settings(vars(distill_tinyvae), []).as_dict()
    for name in (
        "epochs", "optimizer", "learning_rate", "batch_size", "warmup", "calibration", "seed",
        "teacher_epochs", "teacher_latent_dim", "reconstruction_weight", "kl_weight", "kl_scale",
        "rate", "latent_weight", "projection", "output_weight", "temperature",
        "perceptual_weight", "perceptual_scale", "perceptual_images",
    ):
        assert record[name] == recipe[name]
    assert record["with_teacher"] and (released.parent / record["teacher"]).exists()

    # Without its images and without a network there are still figures and pictures.
    def no_network(*args, **kwargs):
        raise InputError("CIFAR-10 could not be downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_cifar10", no_network)
    monkeypatch.setattr(models, "RELEASED", tmp_path / "checkpoints" / released.name)
    models.RELEASED.parent.mkdir()
    storage.save_checkpoint(models.RELEASED, checkpoint)
    test_trained_model.main([*folders(tmp_path), "--limit", "64", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "the included one" in printed and "not cifar10: CIFAR-10 could not" in printed
    assert "not those the student was trained on" in printed
    assert checkpoint["evaluation"] in printed and "MSE of 0.00723 at 87.0 nats" in printed
    found = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert found["data"] == "photo-crops" and found["results"]["student"]["mse"] < 0.006


@needs_cuda
def test_the_evaluation_on_cuda(tiny_run, tmp_path):
    run, _ = tiny_run
    flags = ["--checkpoint-dir", str(run / "checkpoints"), "--output-dir", str(tmp_path)]
    test_trained_model.main([*flags, "--device", "cuda"])
    assert (tmp_path / "evaluation.json").exists()


# --- Students that are compared ---


@pytest.fixture
def not_trained_again(monkeypatch):
    """Called, it makes any further training step fail."""
    return lambda: monkeypatch.setattr(torch.Tensor, "backward", refuse)


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


def test_a_shape_and_its_word_are_the_same():
    architecture = dict(TinyVAE32().architecture)
    word = comparison.shape_name(architecture)
    assert word == "16-32-64-128_64_128-64-32-16"
    assert TinyVAE32(**comparison.read_shape(word)).architecture == architecture
    for bad in ("16-32", "16-32-64-128_64", "a-b-c-d_64_1-2-3-4", "1-2-3-4_0_1-2-3-4", 16):
        with pytest.raises(ValueError, match="must be a shape like 16-32-64-128_64_128-64-32-16"):
            comparison.Shape.check(bad)


# --- The ablation ---


def test_the_comparison_with_scratch_is_made_at_the_same_nats():
    figures = [
        ("full", 87.5, 0.0102), ("full", 86.5, 0.0096), ("scratch", 88.0, 0.011),
        ("no KL", 300.0, 0.009),
    ]
    rows = [{"variant": name, "kl_nats": nats, "mse": mse} for name, nats, mse in figures]
    full, scratch, no_kl = summary = ablate_distillation.summarise(rows)
    assert full["mse"] == pytest.approx(0.0099)
    assert full["mse spread"] == pytest.approx(0.0006 / 2**0.5) and "mse spread" not in scratch
    assert ablate_distillation.against_scratch(full, summary, "mse") == "-10.0%"
    for row, name in ((no_kl, "mse"), (scratch, "mse"), (full, "vgg_distance")):
        assert ablate_distillation.against_scratch(row, summary, name) == "–"
    assert ablate_distillation.table_row(full, summary)["MSE × 1000"] == "9.900 ± 0.424"


def test_an_ablation_resumes_where_it_stopped(
    tiny_run, tmp_path, capsys, monkeypatch, in_this_process, not_trained_again
):
    run, _ = tiny_run
    flags = [
        *folders(tmp_path), *teacher_of(run), "--vgg", "none", "--limit", "70", "--epochs", "2",
        "--seeds", "1", "--variants", "no KL", "--rate", "30", "--device", "cpu",
    ]
    save, epochs = runs.save_student, []

    def interrupted(*args):
        save(*args)
        epochs.append(len(epochs))
        if len(epochs) == 5:  # before the first, and after each: in the second student's second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_student", interrupted)
        ablate_distillation.main(flags)
    csv_path = tmp_path / "outputs" / "ablation.csv"
    assert [row["variant"] for row in read_csv(csv_path)] == ["full"]
    ablate_distillation.main(flags)
    variants = ["full", "scratch", "no_KL"]
    folders_of = [f"{name}_seed_0" for name in variants]
    assert in_this_process == [*folders_of[:2], *folders_of]
    assert "| no KL" in capsys.readouterr().out
    students = tmp_path / "checkpoints" / "ablation"
    log = (students / folders_of[1] / "log.txt").read_text()
    assert "Resuming the student after epoch 1" in log
    rows = read_csv(csv_path)
    assert [row["variant"].replace(" ", "_") for row in rows] == variants
    for name, rate in zip(folders_of, (30, 30, None)):
        state = storage.load_checkpoint(students / name / "tinyvae_last.pth")
        assert state["record"]["rate"] == rate
    assert (tmp_path / "outputs" / "ablation.png").stat().st_size > 10_000

    # Measured on the other split without training.
    not_trained_again()
    ablate_distillation.main([*flags, "--split", "test", "--judge", "random"])
    again = read_csv(csv_path)
    assert rows[0]["mse"] != again[0]["mse"] and float(again[0]["vgg_distance"]) > 0
    # Refused: another budget, a variant that does not exist, the judge that was trained with.
    with pytest.raises(InputError, match="full, seed 0 did not finish, for the reason above"):
        ablate_distillation.main([*flags, "--epochs", "3"])
    assert "epochs was 2, is 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablate_distillation.main([*flags, "--variants", "no student"])
    assert "each one of full, scratch, no teacher" in capsys.readouterr().err
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
    encoder, decoder = widths = prune_tinyvae.pruned_widths(vae, 0.6)
    assert encoder[0] == decoder[3] == 8 and len({*encoder[1:], *decoder[:3]}) == 1
    idle = torch.randperm(16)[encoder[1]:]  # others in each stage would do as well
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
    small = prune_tinyvae.prune(vae, *widths)
    for found, expected in zip(small(images), before):
        torch.testing.assert_close(found, expected)
    assert models.count_parameters(small) <= 0.4 * models.count_parameters(vae)
    for found, expected in zip(vae(images), before):  # it was left as it was
        assert torch.equal(found, expected)


def test_without_torch_pruning_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"torch_pruning is needed.*-r requirements-dev\.txt"):
        prune_tinyvae.prune(TinyVAE32(), (8, 8, 8, 8), (8, 8, 8, 8))


def test_pruned_students_are_trained_once_beside_fresh_ones(
    tiny_run, tmp_path, capsys, in_this_process, not_trained_again
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

    not_trained_again()
    prune_tinyvae.main(flags)
    assert in_this_process == ["pruned_0.5", "fresh_0.5"] * 2
    assert read_csv(tmp_path / "outputs" / "pruning.csv") == [whole, pruned, fresh]
    with pytest.raises(InputError, match="pruned, −50% did not finish"):
        prune_tinyvae.main([*flags, "--epochs", "2"])
    assert "epochs was 1, is 2" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no student is left with 0\.999 of the parameters"):
        prune_tinyvae.main([*flags, "--ratios", "0.999"])
    with pytest.raises(InputError, match="cannot judge"):  # the weights of the whole one's loss
        prune_tinyvae.main([*flags, "--judge", "random"])


# --- Stages ---


SMALL, SMALLER = "8-12-16-24_64_24-16-12-8", "4-8-12-16_64_16-12-8-4"
STAGES = (
    "--vgg", "none", "--limit", "70", "--epochs", "2,1", "--device", "cpu", "--precision", "fp32",
    "--stages", f"{SMALL},{SMALLER}", "--rate", "30",
)


def test_each_stage_learns_from_the_one_before(
    tiny_run, tmp_path, capsys, in_this_process, not_trained_again
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
    macs = [models.count_macs(TinyVAE32(**comparison.read_shape(s))) for s in (SMALL, SMALLER)]
    epochs = round((2 * macs[0] + macs[1]) / macs[1])
    assert int(longer["epochs"]) == int(none_longer["epochs"]) == epochs > 3
    # The figures are those of the checkpoint, computed here another way.
    best = folder / f"stage_2_{SMALLER}_1_epochs" / "tinyvae_best.pth"
    vae, _ = models.load_model(best, TinyVAE32)
    images = data.to_float(sources.load_training_images("dead-leaves", 70).val)
    assert float(last["mse"]) == pytest.approx(F.mse_loss(vae(images)[0], images).item(), rel=1e-3)

    not_trained_again()
    progressive_distillation.main(flags)
    assert len(in_this_process) == 12
    assert read_csv(tmp_path / "outputs" / "progressive.csv")[1] == last
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
