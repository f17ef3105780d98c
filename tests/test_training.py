"""Optimisers, `fit`, validation, and the nats that are held: in this process, on the CPU."""

import copy
import itertools
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import data, losses, metrics, optimizer, storage, synthetic, training
from common.runtime import DTYPES, InputError
from distill_tinyvae import TeacherObjective
from tests.testing import (
    random_normal,
    run_of,
    student_objective,
    train,
)
from tiny_vae_32 import TinyVAE32

IMAGES = synthetic.dead_leaves(60, "train")


class Scripted(torch.nn.Module):
    """An objective whose terms are what it is told, step by step; it keeps what it is called with.
    At kl = x the output term is x + 1, and the loss 0.1 x + 2 (x + 1)."""

    def __init__(self, values=(0.0,) * 100):
        super().__init__()
        self.network = TinyVAE32(4, (2, 3, 4, 5), (5, 4, 3, 2))
        self.values, self.batches, self.steps = iter(values), [], []

    def forward(self, images, noise, *targets):
        assert self.network.training
        self.batches.append((images, noise, *targets))
        kl = next(self.values) + 0 * self.network.fc_mu.bias.sum()
        return {"kl": kl, "output": kl + 1}

    def weigh(self, terms):
        return {"kl": 0.1 * terms["kl"], "output": 2 * terms["output"]}

    def after_step(self, terms, step, steps):
        self.steps.append((step, steps))

    def figures(self):
        return {"further": 7.0}


def keep_calls(monkeypatch, name):
    """What a function of training.py is called with, and returns: a list that grows."""
    calls, function = [], getattr(training, name)

    def keep(*args, **options):
        calls.append((args, options, function(*args, **options)))
        return calls[-1][2]

    monkeypatch.setattr(training, name, keep)
    return calls


def fit(objective, run, epochs=1, name="adam", targets=(), resume_from=None, stage="student"):
    return training.fit(objective, run, stage, epochs, name, 1e-3, targets, resume_from)


# --- The optimisers ---


def test_the_learning_rate_rises_linearly_then_falls_to_zero_as_a_cosine(monkeypatch):
    made, lrs, objective = keep_calls(monkeypatch, "make_optimizers"), [], Scripted()
    objective.after_step = lambda *_: lrs.append(
        [one.param_groups[0]["lr"].item() / 1e-3 for one in made[0][2]]
    )
    *_, last = fit(objective, run_of(IMAGES[:34]), epochs=2, name="muon")
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    for each in zip(*lrs):  # of Adam and of Muon
        assert each == pytest.approx([0.5, 1, *cosine])
    assert [row["learning_rate"] for row in last["rows"]] == [
        round(1e-3 * cosine[i], 9) for i in (1, 5)
    ]
    assert optimizer.one_cycle(0, 8, 0) == 1 and optimizer.one_cycle(0, 1, 1) == 1


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_orthogonalize_moves_singular_values_to_near_1_and_nothing_else(shape):
    u, _, v = torch.linalg.svd(random_normal(*shape), full_matrices=False)
    moved = optimizer.orthogonalize(u * torch.logspace(0, -2, 8) @ v)
    values = u.T @ moved @ v.T
    assert all(0.65 < value < 1.25 for value in values.diagonal())
    torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-4, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or later")
def test_muon_is_that_of_torch_for_matrices_and_takes_kernels_as_matrices():
    start, gradients = random_normal(6, 36), random_normal(4, 6, 36)
    matrix, kernel, reference = (torch.nn.Parameter(start.clone()) for _ in range(3))
    kernel.data = kernel.data.view(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    steppers = [optimizer.Muon([p], torch.tensor(0.01)) for p in (matrix, kernel)]
    steppers.append(
        torch.optim.Muon([reference], 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    )
    for gradient in gradients:
        matrix.grad, reference.grad, kernel.grad = gradient, gradient, gradient.view(6, 4, 3, 3)
        for stepper in steppers:
            stepper.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    moved = (matrix - start).norm()
    assert (matrix - reference).norm() < 0.02 * moved  # torch's works in bfloat16


def test_with_scaled_gradients_muon_steps_as_without_and_skips_one_that_overflows():
    start, gradients, moved = random_normal(6, 36), random_normal(4, 6, 36), []
    for enabled in (False, True):
        matrix, overflow = torch.nn.Parameter(start.clone()), torch.tensor(1e38)
        muon = optimizer.Muon([matrix], torch.tensor(0.01))
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for gradient in (*gradients, overflow)[: 4 + enabled]:
            before, scale = matrix.detach().clone(), scaler.get_scale()
            averages = [state["average"].clone() for state in muon.state.values()]
            muon.zero_grad()
            scaler.scale((matrix * gradient).sum()).backward()
            scaler.step(muon)
            scaler.update()
        moved.append(matrix.detach() - start)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
    assert scaler.get_scale() == scale / 2
    assert torch.equal(matrix, before)
    assert torch.equal(muon.state[matrix]["average"], averages[0])


def test_muon_trains_kernels_and_matrices_and_adam_the_rest(
    monkeypatch, tmp_path, without_pictures
):
    made = keep_calls(monkeypatch, "make_optimizers")
    flags = ("--teacher-epochs", "1", "--epochs", "1", "--vgg", "none", "--optimizer", "muon")
    train(tmp_path, *flags, "--learning-rate", "0.003", "--teacher-learning-rate", "0.002")
    (of_teacher, _, teachers), (of_student, _, students) = made
    assert (of_teacher[0], of_teacher[2]) == ("adam", 0.002) and len(teachers) == 1
    assert (of_student[0], of_student[2]) == ("muon", 0.003)
    by_adam, by_muon = (set(one.param_groups[0]["params"]) for one in students)
    network, rotation = of_student[1].network, of_student[1].projection.rotation.weight
    assert by_muon == {p for p in network.parameters() if p.ndim > 1}
    assert by_adam == {p for p in network.parameters() if p.ndim == 1} | {rotation}


@pytest.mark.parametrize("name", ["adam", "muon"])
@pytest.mark.parametrize("kind", losses.PROJECTIONS)
def test_every_parameter_is_trained_and_vgg16_is_not(name, kind):
    objective = student_objective(kind=kind)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    targets = random_normal(16, 64 if kind == "identity" else 96), random_normal(16, 3, 32, 32)
    *_, state = fit(objective, run_of(IMAGES[:16]), 1, name, targets)
    after = objective.state_dict()
    trained = {key for key, p in objective.named_parameters() if p.requires_grad}
    assert {key for key in trained if torch.equal(before[key], after[key])} == set()
    learned = {key for key in trained if key.startswith("projection.")}
    assert learned == {
        "free": {"projection.linear.weight", "projection.linear.bias"}, "identity": set(),
    }.get(kind, {"projection.rotation.weight"})
    for key in learned & {"projection.rotation.weight"}:  # rows orthonormal, as at the start
        torch.testing.assert_close(after[key] @ after[key].T, torch.eye(64), atol=1e-4, rtol=0)
    fixed = [key for key in before if key.startswith(("vgg.", "projection.mean", "projection.wh"))]
    assert all(torch.equal(before[key], after[key]) for key in fixed)
    assert not [key for key in state["objective"] if key.startswith("vgg.")]


# --- fit ---


def test_fit_trains_as_a_plain_loop_does():
    objective, run = TeacherObjective(Scripted().network, 0.5), run_of(IMAGES[:20], seed=3)
    plain = copy.deepcopy(objective)
    torch.manual_seed(1)
    list(fit(objective, run, epochs=2))
    torch.manual_seed(1)
    adam = torch.optim.Adam(plain.parameters(), fused=True)
    order = torch.Generator().manual_seed(3)
    batches = [data.shuffled_batches(20, 8, order) for _ in range(2)]
    for step, index in enumerate(torch.cat(batches)):
        adam.param_groups[0]["lr"] = torch.tensor(1e-3 * optimizer.one_cycle(step, 4, 0.25))
        terms = plain(data.to_float(IMAGES[index]), torch.randn(8, 4))
        adam.zero_grad()
        (terms["reconstruction"] + 0.5 * terms["kl"]).backward()
        adam.step()
    for trained, expected in zip(objective.parameters(), plain.parameters()):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_a_step_gets_each_image_of_an_epoch_once_with_its_targets():
    objective, run = Scripted(), run_of(IMAGES[:34])
    *_, state = fit(objective, run, 2, targets=(torch.arange(34), 2 * torch.arange(34)))
    for images, noise, index, double in objective.batches:
        assert torch.equal(images, data.to_float(run.images[index]))
        assert torch.equal(double, 2 * index)
        assert noise.shape == (8, 4) and 0.6 < noise.std() < 1.4
    epochs = [torch.cat([b[2] for b in objective.batches[i : i + 4]]).tolist() for i in (0, 4)]
    assert all(len(set(seen)) == 32 for seen in epochs) and epochs[0] != epochs[1]
    assert len({noise.sum().item() for _, noise, *_ in objective.batches}) == 8
    assert objective.steps == [(step, 8) for step in range(8)]
    assert state["epoch"] == 2 and state["stage"] == "student"
    assert torch.equal(state["model"]["fc_mu.bias"], objective.network.fc_mu.bias)


def test_an_epoch_ends_with_a_row_and_a_line_of_what_was_measured(capsys, monkeypatch):
    clock = iter((100.0, 100.0 + 5 * 0.1234567, 101.23456))  # five steps, and the validation
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(training, "READ_EVERY", 2)
    monkeypatch.setattr(Scripted, "figures", lambda self: {"projected_std": 0.98765})
    bars, shown = keep_calls(monkeypatch, "progress_bar"), []
    objective = Scripted(0.1 * step for step in range(5))
    objective.after_step = lambda *_: shown.append(bars[0][2].postfix)
    run, vae = run_of(IMAGES[:40], "bf16"), objective.network
    *_, state = itertools.islice(fit(objective, run, 12), 2)
    (row,) = state["rows"]
    means = {"loss": 2.42, "kl": 0.2, "kl_weighted": 0.02, "output": 1.2, "output_weighted": 2.4}
    measured = metrics.evaluate_vae(vae, run.val_images, "bf16")
    means |= {"val_mse": measured.pop("mse"), "val_psnr": measured.pop("psnr")} | measured
    means["val_sampled_mse"] = metrics.sampled_mse(vae, run.val_images, "bf16")
    assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-6)
    assert (row["stage"], row["epoch"], row["projected_std"]) == ("student", 1, 0.98765)
    assert (row["ms_per_step"], row["seconds"]) == (123.457, 1.23)
    assert capsys.readouterr().out.strip() == (
        "student   1/12 | loss 2.42000 | kl 0.20000  output 1.20000 | "
        f"val MSE {means['val_mse']:.5f}  PSNR {means['val_psnr']:.2f} dB | "
        f"KL {means['kl_nats']:.1f} nats, {means['kl_per_latent']:.3f} per latent, "
        f"{means['active_dims']} of 4 active | projected std 0.988 | 1 s"
    )
    _, options, bar = bars[0]
    assert options == {"total": 60, "initial": 0, "desc": "student", "unit": "step"}
    assert [*shown, bar.postfix] == [None, None] + [
        f"epoch=1/12, loss={loss:.5f}" for loss in (2.105, 2.105, 2.315, 2.42)
    ]


@pytest.mark.parametrize(
    ("stage", "precision", "go_on", "flag"),
    [
        ("student", "fp32", "", "--learning-rate"),
        ("teacher", "bf16", "continue from them with --resume --precision fp32, or ",
         "--teacher-learning-rate"),
    ],
)
@pytest.mark.parametrize("poison", ["loss", "val_mse", "kl_nats"])
def test_what_is_not_finite_is_told_and_not_saved(
    poison, stage, precision, go_on, flag, monkeypatch
):
    bars = keep_calls(monkeypatch, "progress_bar")
    values = [math.nan if poison == "loss" and step == 5 else 0.0 for step in range(8)]
    validate, saved = training.validate, []
    monkeypatch.setattr(
        training, "validate",
        lambda *args: validate(*args) | ({poison: math.nan} if len(saved) == 2 else {}),
    )
    with pytest.raises(InputError) as told:
        for state in fit(Scripted(values), run_of(IMAGES[:34], precision), epochs=2, stage=stage):
            saved.append((state["stage"], state["epoch"]))
    assert saved == [(stage, 0), (stage, 1)]
    assert str(told.value) == (
        f"the {poison} of the {stage} became nan in epoch 2; the epochs before it are saved: "
        f"{go_on}start again with --overwrite and a lower {flag}"
    )
    assert bars[0][1]["desc"] == {"teacher": "teacher, stage 1 of 2"}.get(stage, stage)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_goes_on_bit_for_bit_where_it_was(precision, tmp_path, monkeypatch, capsys):
    bars = keep_calls(monkeypatch, "progress_bar")
    weights = dict.fromkeys(("reconstruction", "kl", "latent", "output"), 1)
    run, path = run_of(IMAGES[:34], precision), tmp_path / "state.pth"
    targets = random_normal(34, 96), random_normal(34, 3, 32, 32)
    for state in fit(student_objective(weights, rate=80.0), run, 4, "muon", targets):
        if state["epoch"] == 2:
            storage.save_checkpoint(path, state)
    other = student_objective(weights, rate=80.0)
    for parameter in other.parameters():
        parameter.data += 1
    torch.manual_seed(5)
    epochs = []
    for again in fit(other, run, 4, "muon", targets, resume_from=path):
        epochs.append(again["epoch"])
    assert epochs == [2, 3, 4]
    assert f"Resuming the student after epoch 2, from {path}" in capsys.readouterr().out
    assert [options["initial"] for _, options, _ in bars if "initial" in options] == [0, 8]
    assert state["objective"]["kl_factor"] != 1
    assert not any(key.startswith("network.") for key in state["objective"])  # saved as "model"
    for final in (state, again):
        for row in final["rows"]:
            del row["stage"], row["seconds"], row["ms_per_step"]
    for which in ("model", "objective", "optimizers", "scaler", "random", "rows"):
        torch.testing.assert_close(again[which], state[which], rtol=0, atol=0)

    damaged = storage.load_checkpoint(path)
    del damaged["optimizers"]
    storage.save_checkpoint(path, damaged)
    with pytest.raises(InputError, match=r"from \('optimizers'\): --overwrite starts again"):
        next(fit(student_objective(weights), run, 4, "muon", targets, resume_from=path))


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_training_goes_on_in_another_precision(before, after, tmp_path):
    weights = dict.fromkeys(("reconstruction", "kl"), 1)
    for state in fit(student_objective(weights), run_of(IMAGES[:34], before), 2):
        if state["epoch"] == 1:
            storage.save_checkpoint(tmp_path / "state.pth", state)
    same = run_of(IMAGES[:34], after)
    *_, again = fit(student_objective(weights), same, 2, resume_from=tmp_path / "state.pth")
    assert again["epoch"] == 2
    assert again["rows"][-1]["loss"] == pytest.approx(state["rows"][-1]["loss"], rel=0.02)
    for last, precision in ((state, before), (again, after)):
        assert bool(last["scaler"][0]) == (precision == "fp16")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_random_state_of_a_gpu_is_resumed_on_one(device, tmp_path, monkeypatch):
    restored, objective = [], Scripted()
    monkeypatch.setattr(getattr(torch, device), "get_rng_state", lambda: "of the GPU")
    monkeypatch.setattr(getattr(torch, device), "set_rng_state", restored.append)
    for saved_on, resumed_on in (("cpu", device), (device, device), (device, "cpu")):
        rest = {}, torch.Generator(), torch.device(saved_on), []
        state = training.save_state("student", objective, *rest)
        assert (device in state["random"]) == (saved_on == device)
        storage.save_checkpoint(tmp_path / "state.pth", state)
        training.restore(
            tmp_path / "state.pth", objective, {}, torch.Generator(), torch.device(resumed_on)
        )
    assert restored == ["of the GPU"]


class Waits(TorchDispatchMode):
    """Notes operations that need a value on the CPU, for which a GPU would have to be waited."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        waits = tags & set(function.tags)
        if function is torch.ops.aten.index.Tensor:  # by a mask its shape depends on values
            waits = any(index.dtype == torch.bool for index in args[1] if index is not None)
        if waits:
            self.functions.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_step_reads_no_value_on_the_device_but_now_and_then(stage, precision, monkeypatch):
    # A GPU would stand still for each, and torch.compile could make no graph of the step.
    targets = ()
    if stage == "teacher":
        objective = TeacherObjective(TinyVAE32(), 0.01)
    else:
        dtype = DTYPES[precision]
        objective = student_objective(rate=50.0, perceptual_images=1, precision=dtype)
        targets = random_normal(24, 96), random_normal(24, 3, 32, 32)
    seen, waits, after_step = [], Waits(), objective.after_step

    def note(terms, step, steps):
        after_step(terms, step, steps)
        seen.append(list(waits.functions))  # before the loss may be read
        waits.functions.clear()

    monkeypatch.setattr(objective, "after_step", note)
    monkeypatch.setattr(training, "READ_EVERY", 4)
    nothing = dict.fromkeys(("val_mse", "val_psnr", "kl_nats", "kl_per_latent", "active_dims"), 0)
    monkeypatch.setattr(training, "validate", lambda *_: nothing)
    states = fit(objective, run_of(IMAGES[:24], precision, batch_size=4), 1, "muon", targets)
    next(states)
    with waits:
        next(states)
    item = "aten._local_scalar_dense.default"
    assert seen[1:4] == [[], [], []] and seen[4].count(item) == 1 and seen[5] == []
    with waits:
        torch.ones(1).sum().item()
    assert waits.functions[-1] == item


def test_the_objective_is_compiled_where_that_is_asked_for(monkeypatch, capsys):
    training.can_compile.cache_clear()
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled.append((*args, options)) or args[0]
    )
    for setting in (False, True):
        list(fit(objective := Scripted(), run_of(IMAGES[:8], compile=setting)))
    assert compiled == [(torch.neg, {}), (objective, {"mode": None})]

    training.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("No compiler\nFull story")))
    list(fit(Scripted(), run_of(IMAGES[:8], compile=True)))
    assert "since torch.compile does not work here (No compiler)\n" in capsys.readouterr().out


# --- Validation ---


@pytest.mark.parametrize("how", ["means", "both"])
def test_batch_norm_knows_the_images_and_the_codes_that_will_be_decoded(how):
    torch.manual_seed(0)
    vae = TinyVAE32()
    state = torch.get_rng_state()
    row = training.validate(vae, run_of(IMAGES, calibration=how))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in vae.modules())
    assert row["val_sampled_mse"] == metrics.sampled_mse(vae, IMAGES)
    with torch.no_grad():
        floats = data.to_float(IMAGES)
        mu, logvar = vae.encode(floats)
        codes = mu
        if how == "both":
            codes = torch.cat([mu, vae.reparameterize(mu, logvar, random_normal(60, 64))])
        encoded = vae.encoder[0](floats)
        decoded = vae.decoder[0](vae.decoder_input(codes).view(len(codes), -1, 2, 2))
    for layer, seen in ((vae.encoder[1], encoded), (vae.decoder[1], decoded)):
        # BatchNorm sums in single precision: its variances are off by up to 3e-5 of them.
        expected = seen.double().mean((0, 2, 3)), seen.double().var((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), expected[1], atol=1e-5, rtol=1e-4)
        assert layer.momentum == TinyVAE32().decoder[1].momentum
