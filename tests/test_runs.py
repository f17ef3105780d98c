"""Whole runs of distill_tinyvae.py: what they begin with, refuse, keep, and resume bit for bit."""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill_tinyvae
from common import (
    data,
    losses,
    metrics,
    models,
    report,
    runs,
    sources,
    storage,
    teacher_outputs,
    training,
)
from common.runtime import DTYPES, InputError
from common.settings import parse_settings
from standard_vae import StandardVAE
from tests.testing import (
    HERE,
    TINY,
    assert_same_run,
    assert_same_weights,
    contents,
    copy_of,
    folders,
    needs_cuda,
    on_posix,
    random_images,
    read_rows,
    refuse,
    run_of,
    start,
    teacher_of,
    train,
    train_until,
)
from tiny_vae_32 import TinyVAE32

ALONE = ("--teacher", "none", "--vgg", "none")  # the shortest training

# --- An earlier run in the folders ---


def test_a_second_run_replaces_nothing_unless_told_to(tiny_run):
    run, _ = tiny_run
    before, best = contents(run), str(run / "checkpoints" / "tinyvae_best.pth")
    for flags, message in (
        ((), r"--resume .* --overwrite .* another"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--resume", "--epochs", "4"), r"\(epochs was 3, is 4; .* --start tinyvae_best\.pth, "),
        (("--resume", "--learning-rate", "0.01"), r"\(learning_rate was 0\.003, is 0\.01\)"),
        (("--resume", "--optimizer", "adam"), r"\(optimizer was muon, is adam\)"),
        (("--resume", "--kl-scale", "1"), r"settings \(kl_scale was 0\.4, is 1\.0\): use"),
        (("--resume", "--perceptual-scale", "7"), r"\(perceptual_scale was 4\.0, is 7\.0\): use"),
        (("--resume", "--temperature", "1"), r"settings \(temperature was 3\.0, is 1\.0\): use"),
        (("--resume", "--projection", "free"), r"projection was pixels, is free"),
        (("--resume", "--limit", "71"), "the training images differ"),
        (("--resume", "--vgg", "none"), "VGG16's weights differ"),
        (("--resume", "--latent-dim", "32"), "the student's channels or latents differ"),
        (("--resume", "--teacher-channels", "8,8,8,8"), "the teacher's channels or latents diff"),
        (("--resume", *teacher_of(run)), "the teacher differs"),
        (("--resume", "--teacher", "none"), r"\(one has a teacher, --teacher, and the other has"),
        (("--overwrite", "--start", best), r"tinyvae_best\.pth is one of the files .*: copy it"),
        (("--overwrite", "--teacher", best), r"tinyvae_best\.pth is one of the files .*: copy it"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            train(run, *flags)
        assert "\n" not in str(refused.value)
    assert contents(run) == before


def test_what_is_no_state_of_this_version_is_not_resumed(tiny_run, tmp_path):
    copy = copy_of(tiny_run[0], tmp_path)
    last = copy / "checkpoints" / "tinyvae_last.pth"
    state = storage.load_checkpoint(last)
    storage.save_checkpoint(last, state | {"record": {}})
    with pytest.raises(InputError, match="not a checkpoint of this version of the script: use"):
        train(copy, "--resume")
    last.unlink()
    with pytest.raises(InputError, match=r"a student but no tinyvae_last\.pth to resume from"):
        train(copy, "--resume")


def test_two_runs_do_not_write_into_the_same_folder(tmp_path):
    for folder in ("checkpoints", "outputs"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with (
            storage.locked(tmp_path / folder),
            pytest.raises(InputError, match=f"another run is writing into .*{folder}: wait until"),
        ):
            train(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"] * 2


def test_overwrite_keeps_a_teacher_of_the_same_settings(tiny_run, tmp_path, capsys, monkeypatch):
    run, _ = tiny_run
    copy, drawn = copy_of(run, tmp_path), []
    evaluated = ("samples.png", "traversal.png", "colours.png", "evaluation.json", "swap.png")
    for name in (*evaluated, "note.txt"):
        (copy / "outputs" / name).touch()
    monkeypatch.setattr(report, "draw", lambda run, teacher, *rest: drawn.append(teacher))
    train(copy, "--overwrite")
    assert "Stage 1 skipped" in capsys.readouterr().out
    assert_same_run(run, copy)
    # What was made of the old student has gone, pictures too, which are not drawn here.
    left = {path.name for path in (copy / "outputs").iterdir()}
    assert left == {"config.json", "metrics.csv", "note.txt", ".lock"}

    # The teacher is what it was before stage 2, BatchNorm included.
    teacher = drawn[-1]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    saved = storage.load_checkpoint(run / "checkpoints" / "teacher_vae.pth")
    assert all(torch.equal(saved["model"][k], value) for k, value in teacher.state_dict().items())

    train(copy, "--overwrite", "--teacher-epochs", "1", "--epochs", "1", "--vgg", "none")
    assert "a new teacher is trained" in capsys.readouterr().out
    assert len(read_rows(copy)) == 2


def test_tensorboard_gets_what_metrics_csv_gets(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(InputError, match="pip install tensorboard"):
            train(tmp_path, "--tensorboard")
    assert not list(tmp_path.iterdir())
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(tmp_path, "--tensorboard", "--save-every", "2")
    folder = tmp_path / "outputs" / "tensorboard"

    def logged(stage):
        return events.EventAccumulator(str(folder / stage)).Reload()

    monkeypatch.setattr(report, "draw", lambda *args: None)
    report.WRITERS.clear()  # as in another process, which writes the last epoch again
    train(tmp_path, "--tensorboard", "--save-every", "2", "--resume")
    assert "student is trained already, for all 3 epochs" in capsys.readouterr().out
    for stage in ("teacher", "student"):
        own = [row for row in rows if row["stage"] == stage]
        for name in ("loss", "val_mse", "kl_nats", "learning_rate", "reconstruction_weighted"):
            points = logged(stage).Scalars(name)
            assert [point.step for point in points] == [int(row["epoch"]) for row in own]
            values = [float(row[name]) for row in own]
            assert [point.value for point in points] == pytest.approx(values, rel=1e-5)
    assert [image.step for image in logged("student").Images("reconstructions")] == [2]
    train(tmp_path, "--overwrite", "--epochs", "1")  # its teacher stays
    assert not folder.exists()


def test_overwrite_keeps_a_teacher_that_is_named_or_not_needed(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    copy = copy_of(tiny_run[0], tmp_path)
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    another_seed = ("--overwrite", "--seed", "1", "--epochs", "1")
    scratch = ("--latent-weight", "0", "--output-weight", "0")
    for flags in (teacher_of(copy), scratch):
        train(copy, *another_seed, *flags)
        assert_same_weights(tiny_run[0], copy, "teacher_vae.pth")
    train(copy, "--resume", "--seed", "1", "--epochs", "1", *scratch)  # nor is it in the way


def test_the_demo_replaces_its_own_folders_and_no_others(
    tmp_path, monkeypatch, capsys, without_pictures
):
    tiny = {"limit": 70, "epochs": 1}
    monkeypatch.setattr(distill_tinyvae, "DEMO_SETTINGS", distill_tinyvae.DEMO_SETTINGS | tiny)
    mine = {tmp_path / "checkpoints" / "tinyvae_best.pth", tmp_path / "outputs" / "metrics.csv"}
    for path in mine:
        path.parent.mkdir()
        path.write_text("mine")
    flags = ["--demo", "--device", "cpu", "--batch-size", "32", *folders(tmp_path)]
    for _ in range(2):
        distill_tinyvae.main(flags)
        assert "teacher_cifar10.pth" in capsys.readouterr().out
    distill_tinyvae.main([*flags, "--resume"])
    assert "Resuming the student after epoch 1" in capsys.readouterr().out
    outside = {path for path in contents(tmp_path) if path.parent.name != "demo"}
    assert outside == mine and all(path.read_text() == "mine" for path in mine)
    assert (tmp_path / "checkpoints" / "demo" / "tinyvae_best.pth").exists()


# --- What cannot work ---


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    for stage in ("train_teacher", "distil_student"):
        monkeypatch.setattr(distill_tinyvae, stage, refuse)
    for flags, message in (
        (("--batch-size", "71"), "do not fill one batch of 71"),
        ([w for t in losses.TERMS for w in (f"--{t}-weight", "0")], "all five weights are zero"),
        (("--teacher-latent-dim", "32"), r"the teacher has 32 latents, fewer than the .* 64"),
        (("--limit", "64"), r"^64 training images are too few .* to 64: at least 65"),
        (("--projection", "identity"), "the teacher has 128 latents and the student 64: name"),
        (("--rate", "60", "--kl-weight", "0"), "holds the KL by its weight, which is 0"),
        (("--teacher", "nowhere.pth"), r"there is no checkpoint nowhere\.pth"),
        (("--start", "nowhere.pth"), r"there is no checkpoint nowhere\.pth"),
    ):
        with pytest.raises(InputError, match=message):
            train(tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for flag in ("--output-dir", "--checkpoint-dir"):
        with pytest.raises(InputError, match="could not make the folder"):
            train(tmp_path, flag, str(tmp_path / "file"))


def test_without_network_the_real_recipe_stops_at_once(tmp_path, monkeypatch):
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port refuses connections
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies it began with
    monkeypatch.setattr(sources, "DATA_DIR", tmp_path)
    for flags, message in (
        (("--data", "cifar10", "--vgg", "none"), "CIFAR-10 .*could not be downl.*--data.*--demo"),
        (("--data", "dead-leaves"), "ImageNet .*could not be d.*--vgg PATH.*--vgg none.*--demo"),
    ):
        with pytest.raises(InputError, match=message):
            distill_tinyvae.main([*flags, "--limit", "70", *folders(tmp_path)])


def stub(factor, offset, alive=3072):
    """A teacher whose code is the pixels, as it was trained to have them: 2x − 1, or x."""

    def encode(images):
        mu = images.flatten(1) * (torch.arange(3072) < alive)
        return mu, torch.zeros_like(mu)

    def decode(mu):
        return ((mu - offset) / factor).clamp(0, 1).view(-1, 3, 32, 32)

    return SimpleNamespace(latent_dim=3072, encode=encode, decode=decode)


def test_a_teacher_is_tried_before_the_work(tiny_run, tmp_path, monkeypatch, capsys):
    images = (random_images(20) * 255).byte()
    for factor, offset, pixels in ((2, -1, r"\[-1, 1\]"), (255, 0, r"\[0, 255\]")):
        with pytest.raises(InputError, match=f"x.pth was trained on pixels in {pixels}, and pix"):
            teacher_outputs.check_teacher(stub(factor, offset), images, "x.pth", 64)
    teacher_outputs.check_teacher(stub(1, 0), images, "x.pth", 64)
    assert capsys.readouterr().out == ""
    teacher_outputs.check_teacher(stub(1, 0, 63), images, "x.pth", 64)
    assert capsys.readouterr().out.startswith("Warning: 63 of the 3072 latents of x.pth are alive")

    run, tried = tiny_run[0], []

    def refuse_it(teacher, images, path, latent_dim):
        tried.append((path, len(images), latent_dim))
        raise InputError("unfit")

    monkeypatch.setattr(runs, "check_teacher", refuse_it)
    with pytest.raises(InputError, match="unfit"):
        train(tmp_path, *teacher_of(run))
    assert tried == [(run / "checkpoints" / "teacher_vae.pth", 70, 64)]
    assert list(tmp_path.iterdir()) == []


def test_weights_in_half_precision_load_and_those_for_larger_images_are_told(tmp_path):
    vae, images = StandardVAE(64, (4, 4, 4, 4)).eval(), random_images(2)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in vae.state_dict().items()}
    path = tmp_path / "teacher.pth"
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": weights})
    loaded, _ = models.load_model(path, StandardVAE)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(images)[0], vae(images)[0], atol=1e-3, rtol=0)

    weights["fc_mu.weight"] = torch.zeros(64, 64)  # 4 channels, 4×4 positions
    storage.save_checkpoint(path, {"architecture": vae.architecture, "model": weights})
    what = r"fc_mu.weight is \[64, 64\], not \[64, 16\]: it may be made for images of another size"
    with pytest.raises(InputError, match=what):
        train(tmp_path / "run", "--teacher", str(path))
    assert not (tmp_path / "run").exists()


# --- What a run begins with ---


def test_without_a_teacher_the_image_takes_its_place_and_no_stage_1_runs(
    tmp_path, capsys, monkeypatch, without_pictures
):
    for name in ("train_teacher", "teacher_outputs", "latent_distillation_loss"):
        monkeypatch.setattr(distill_tinyvae, name, refuse)
    (row,) = train(tmp_path, "--teacher", "none", "--epochs", "1")
    assert row["stage"] == "student" and row["latent"] == row["latent_weighted"] == ""
    assert float(row["output_weighted"]) == pytest.approx(0.2 * float(row["output"]))
    summary = capsys.readouterr().out
    assert "teacher      none\n" in summary and "left out: latent\n" in summary
    assert "output compares with the image" in summary
    record = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_best.pth")["record"]
    assert (record["teacher"], record["latent_weight"]) == (None, 0)
    for key in ("teacher_epochs", "teacher_latent_dim", "teacher_architecture"):
        assert record[key] is None


def test_without_a_term_that_needs_a_teacher_none_is_trained_and_bf16_trains(
    tmp_path, monkeypatch
):
    for name in ("train_teacher", "teacher_outputs"):
        monkeypatch.setattr(distill_tinyvae, name, refuse)
    scratch = ("--vgg", "none", "--latent-weight", "0", "--output-weight", "0", "--epochs", "1")
    few = ("--precision", "bf16", "--limit", "8", "--batch-size", "8")
    (row,) = train(tmp_path, *scratch, *few)
    assert row["stage"] == "student"
    empty = ("latent", "output", "perceptual", "projected_std")
    assert all(row[name] == "" for name in empty) and row["kl"] != ""
    assert not (tmp_path / "checkpoints" / "teacher_vae.pth").exists()
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 3
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["perceptual_weight"] == 0 and config["vgg"] == "none"
    assert config["precision"] == "bf16"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), "fp32"), (("--precision", "bf16"), "bf16"), (("--perceptual-precision", "bf16"), "bf16"),
     (("--precision", "bf16", "--perceptual-precision", "fp32"), "fp32"),
     (("--perceptual-weight", "0"), None)],
)
def test_vgg16_has_the_runs_precision_or_its_own(flags, expected):
    given = ("--data", "dead-leaves", "--limit", "70", "--teacher", "none", "--vgg", "random")
    s = parse_settings(vars(distill_tinyvae), (*given, *flags))
    run = runs.load(s, distill_tinyvae.term_weights(s), torch.device("cpu"))
    assert run.record["perceptual_precision"] == expected
    assert bool(run.vgg) == bool(expected)
    if run.vgg:
        assert run.vgg.layers[0].weight.dtype == DTYPES[expected]


def test_a_teacher_that_is_given_is_taken_in_place_of_stage_1(
    tiny_run, tmp_path, monkeypatch, capsys, without_pictures
):
    run, _ = tiny_run
    monkeypatch.setattr(distill_tinyvae, "train_teacher", refuse)
    train(tmp_path, *teacher_of(run))
    path = run / "checkpoints" / "teacher_vae.pth"
    assert f"Stage 1 skipped: the teacher is {path} (" in capsys.readouterr().out
    assert_same_weights(run, tmp_path, "tinyvae_best.pth", "tinyvae_last.pth")
    assert read_rows(run) == read_rows(tmp_path)  # those of stage 1 among them
    assert not (tmp_path / "checkpoints" / "teacher_vae.pth").exists()


def test_a_student_that_is_given_is_trained_further(
    tiny_run, tmp_path, monkeypatch, without_pictures
):
    torch.manual_seed(1)
    student, given = TinyVAE32(8, (4, 8, 8, 8), (8, 8, 8, 4)).eval(), tmp_path / "given.pth"
    checkpoint = {"architecture": student.architecture, "model": student.state_dict()}
    storage.save_checkpoint(given, checkpoint)
    asked, make = [], losses.make_projection
    monkeypatch.setattr(
        distill_tinyvae, "make_projection", lambda *args: asked.append(args) or make(*args)
    )
    flags = (*teacher_of(tiny_run[0]), "--start", str(given), "--projection", "principal")
    train_until(0, monkeypatch, tmp_path, *flags)
    last = tmp_path / "checkpoints" / "tinyvae_last.pth"
    before = storage.load_checkpoint(last)
    assert before["epoch"] == 0 and before["architecture"] == student.architecture
    assert all(torch.equal(before["model"][k], value) for k, value in checkpoint["model"].items())
    kind, teacher_mu, _, latent_dim, student_mu = asked[0]
    assert (kind, latent_dim, len(teacher_mu)) == ("principal", 8, 70)
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["latent_dim"] == 8 and config["encoder_channels"] == [4, 8, 8, 8]
    images = sources.load_training_images("dead-leaves", 70).train
    torch.testing.assert_close(student_mu, student.encode(data.to_float(images))[0])

    train(tmp_path, *flags, "--resume")
    after = storage.load_checkpoint(last)
    assert after["epoch"] == 3 and after["architecture"] == student.architecture
    assert (after["model"]["fc_mu.weight"] - student.fc_mu.weight).abs().max() > 1e-5
    checkpoint["model"]["fc_mu.bias"] += 1
    storage.save_checkpoint(given, checkpoint)
    with pytest.raises(InputError, match=r"\(the weights it starts from differ\)"):
        train(tmp_path, *flags, "--resume")


def test_the_teachers_outputs_are_those_of_its_mu():
    teacher, images = StandardVAE(64, (8, 8, 8, 8)).eval(), (255 * random_images(6)).byte()
    run = run_of(images[:4])
    run.val_images = images[4:]
    outputs = teacher_outputs.teacher_outputs(teacher, run)
    mu, _ = teacher.encode(data.to_float(images))
    torch.testing.assert_close(torch.cat([outputs.mu, outputs.val_mu]), mu)
    torch.testing.assert_close(outputs.logits, teacher.decode_logits(mu[:4]).half())


# --- Interrupted and resumed ---


def train_and_die(validations, run, *flags):
    """`train` in a process that is killed in the epoch of this validation, before it is saved."""

    def killed():
        validate, calls = training.validate, iter(range(1, 9))

        def die(*args):
            if next(calls) == validations:
                os.kill(os.getpid(), signal.SIGKILL)
            return validate(*args)

        training.validate = die
        train(run, *flags)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


@on_posix
def test_killed_in_either_stage_a_run_resumes_bit_for_bit(
    tiny_run, tmp_path, capsys, without_pictures
):
    train_and_die(2, tmp_path, "--resume")  # in the teacher's second epoch
    train_and_die(3, tmp_path, "--resume")  # after that, and in the student's second
    checkpoints = tmp_path / "checkpoints"  # the teacher's state is left by one that died between
    shutil.copy(checkpoints / "teacher_vae.pth", checkpoints / "teacher_last.pth")
    train(tmp_path, "--resume")
    assert not (checkpoints / "teacher_last.pth").exists()
    printed = capsys.readouterr().out
    assert "Stage 1 skipped" in printed and "Resuming the student after epoch 1" in printed
    assert_same_run(tiny_run[0], tmp_path)


@on_posix
def test_ctrl_c_ends_in_a_sentence(tmp_path):
    # What a shell starts in the background ignores the signal, and so does what that starts.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    flags = (*TINY, *folders(tmp_path), *ALONE, "--epochs", "1000")  # not over before the signal
    process = start(HERE / "distill_tinyvae.py", *flags, preexec_fn=listen)
    metrics = tmp_path / "outputs" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and "student,1," in metrics.read_text()):
        time.sleep(0.01)  # in the first epoch it may hit tqdm as it starts its bar
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Every finished epoch is saved: --resume" in output and "Traceback" not in output


def test_failing_at_any_write_a_run_resumes_bit_for_bit(tmp_path, monkeypatch, without_pictures):
    # Every write of a run fails once, after the file's content is complete but before it is in
    # place; the run is resumed after each. This meets every moment between two files.
    flags = ("--vgg", "none", "--teacher-epochs", "1", "--epochs", "2")
    train(tmp_path / "whole", *flags)
    failed, write = set(), storage.write_bytes

    def fail_once(path, content):
        # What a file is at this point of the run: its name and how far the table is.
        table = tmp_path / "broken" / "outputs" / "metrics.csv"
        moment = (Path(path).name, len(table.read_text().splitlines()) if table.exists() else 0)
        if Path(path).name != "write_test" and moment not in failed:
            failed.add(moment)
            raise InputError("this write failed")
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", fail_once)
    for _ in range(40):
        try:
            train(tmp_path / "broken", *flags, "--resume")
            break
        except InputError as error:
            assert str(error) == "this write failed"
    assert {name for name, _ in failed} >= {
        "teacher_last.pth", "teacher_vae.pth", "tinyvae_last.pth", "tinyvae_best.pth",
        "tinyvae_epoch_002.pth", "metrics.csv", "config.json",
    }
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(("flags", "best"), [((), 1), (("--rate", "30"), 3)])
def test_with_a_rate_the_best_epoch_is_the_last(
    flags, best, tmp_path, monkeypatch, capsys, without_pictures
):
    errors = iter([0.1, 0.3, 0.2])  # the first at another number of nats
    monkeypatch.setattr(
        training, "evaluate_vae", lambda *args: metrics.evaluate_vae(*args) | {"mse": next(errors)}
    )
    train(tmp_path, *ALONE, "--epochs", "3", *flags)
    state = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_best.pth")
    assert state["epoch"] == best
    assert ("KL held at 30 nats by its weight" in capsys.readouterr().out) == bool(flags)
    assert (state["record"]["effective_beta"] is None) == bool(flags)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
def test_a_run_on_cuda(tmp_path, flag, precision, monkeypatch):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this CUDA device has no bf16")
    flags = ("--device", "cuda", "--precision", precision, flag)
    train_until(1, monkeypatch, tmp_path, *flags)
    rows = train(tmp_path, *flags, "--resume")
    assert len(rows) == 5 and float(rows[-1]["loss"]) < float(rows[2]["loss"])
    (scaler,) = storage.load_checkpoint(tmp_path / "checkpoints" / "tinyvae_last.pth")["scaler"]
    assert bool(scaler) == (precision == "fp16")
