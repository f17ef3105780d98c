"""What can be checked of a step on a GPU without one: that nothing stays on the CPU or waits for
the device, that it compiles without a break, that fp16's overflows are skipped, how many operations
it takes."""

import copy
import re
import warnings
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torchgen
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import distill_tinyvae
from common import runtime
from common.losses import LatentProjection
from common.optimizer import Muon, make_optimizers
from common.runtime import InputError
from common.settings import parse_settings
from common.teacher_outputs import check_memory
from common.vgg import VGGFeatures, load_vgg16
from standard_vae import StandardVAE
from tests.testing import random_images, random_normal, train
from tiny_vae_32 import TinyVAE32

BATCH = 8
COMPUTE_NOTHING = (
    "view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "unsqueeze",
    "as_strided", "alias", "split", "split_with_sizes", "unbind", "_unsafe_view", "squeeze",
    "_record_function_enter_new", "_record_function_exit",
)


def objective_of(stage, *flags, dtype=torch.float32):
    """The objective of a stage, its VGG16 in a dtype; what a batch brings beside its images."""
    torch.manual_seed(0)
    s = parse_settings(vars(distill_tinyvae), flags)
    if stage == "teacher":
        teacher = StandardVAE(128, (8, 8, 8, 8))
        teacher.check_range = False
        return distill_tinyvae.TeacherObjective(teacher, 0.01), (random_normal(BATCH, 128),)
    student = TinyVAE32()
    student.check_range = False
    projection = LatentProjection(torch.zeros(128), torch.eye(128), 64) if s.teacher else None
    vgg = VGGFeatures(load_vgg16("random")[0], dtype) if s.vgg != "none" else None
    codes = random_normal(BATCH, 128)
    objective = distill_tinyvae.StudentObjective(
        student, distill_tinyvae.term_weights(s), s, projection, codes, vgg
    )
    targets = (codes, random_normal(BATCH, 3, 32, 32).half()) if s.teacher else ()
    return objective, (random_normal(BATCH, 64), *targets)


STAGES = {
    "teacher": ("teacher",),
    "student": ("student",),
    "alone": ("student", "--teacher", "none", "--vgg", "none"),
    "nats held": ("student", "--rate", "87"),
}
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


def step(objective, optimizers, batch, scaler=None):
    """One step of `fit`, without the reading of figures."""
    terms = objective(*batch)
    loss = sum(objective.weigh(terms).values())
    for o in optimizers:
        o.zero_grad()
    (scaler.scale(loss) if scaler else loss).backward()
    for o in optimizers:
        scaler.step(o) if scaler else o.step()
    if scaler:
        scaler.update()
    objective.after_step(terms, 9, 10)
    return loss


# --- Which device, which precision ---


def fake_cuda(monkeypatch, **answers):
    """torch.cuda with these answers."""
    answers = {"is_available": True, "device_count": 1, "set_device": None,
               "get_device_name": "GeForce"} | answers
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def test_a_device_that_is_missing_is_refused_with_the_reason(monkeypatch, capsys):
    fake_cuda(monkeypatch, is_available=False)
    for version, reason in (("13.0", "finds no GPU, or no driver"), (None, "is built without it")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(InputError, match=rf"no cuda device .*{reason}.* --device auto"):
            runtime.pick_device("cuda")
    other = runtime.pick_device("auto").type
    assert other in ("cpu", "mps") and capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="2"):
        parse_settings(vars(distill_tinyvae), ["--device", "cuda:1"])
    assert "CUDA_VISIBLE_DEVICES=1 picks the second), got 'cuda:1'" in capsys.readouterr().err

    def has_an_old_driver():
        warnings.warn("The NVIDIA driver is too old (Triggered internally at x)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", has_an_old_driver)
    with pytest.raises(InputError, match=r"no cuda device .* driver is too old\): --device auto"):
        runtime.pick_device("cuda")
    assert runtime.pick_device("auto").type == other
    assert capsys.readouterr().err == f"This runs on {other}: The NVIDIA driver is too old\n"


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: no kernel image is available\nCompile with ..."),  # sm_50
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),  # for the context
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MB"),
])
def test_a_gpu_that_cannot_be_used_is_refused_with_its_reason(error, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    reason = re.escape(str(error).splitlines()[0])
    with pytest.raises(InputError, match=rf"GeForce cannot .* \({reason}\): end .*get-started"):
        runtime.pick_device("auto")


def test_a_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    fake_cuda(monkeypatch, device_count=2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    for run_id in (None, "1"):  # which torchrun sets
        if run_id:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        assert runtime.pick_device("cuda").type == "cuda"
    assert taken == [0, 1] and not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="has 1 CUDA devices: start no more processes"):
        runtime.pick_device("cuda")


@pytest.mark.parametrize(
    ("capability", "bf16", "precision"), [((6, 1), False, "fp32"), ((7, 5), False, "fp16"),
                                    ((8, 0), True, "bf16")],
)
def test_a_gpu_takes_what_it_multiplies_itself(capability, bf16, precision, monkeypatch):
    fake_cuda(monkeypatch, is_bf16_supported=bf16, get_device_capability=capability)
    device = torch.device("cuda")
    assert runtime.pick_precision("auto", device) == precision
    assert runtime.pick_precision("fp16", device) == "fp16"
    if bf16:
        assert runtime.pick_precision("bf16", device) == "bf16"
    else:
        for flag in ("--precision", "--perceptual-precision"):
            with pytest.raises(InputError, match=rf"GeForce does not multiply bf16.*{flag} auto$"):
                runtime.pick_precision("bf16", device, flag)
    with pytest.raises(InputError, match="fp16 training needs a CUDA device, this is cpu"):
        runtime.pick_precision("fp16", torch.device("cpu"))
    assert runtime.pick_precision("auto", torch.device("cpu")) == "fp32"


def test_out_of_memory_in_training_names_the_batch_size(tmp_path, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    monkeypatch.setattr(distill_tinyvae, "kl_loss", Mock(side_effect=full))
    with pytest.raises(InputError, match=r"in training with batches of 32 .* a smaller --batch-size"
                                         r".*Tried to allocate 2.00 GiB\.\)$"):
        train(tmp_path)


def test_more_outputs_of_a_teacher_than_a_gpu_holds_are_refused(monkeypatch):
    fake_cuda(monkeypatch, mem_get_info=(8_000_000_000, 8_000_000_000))
    check_memory(850_000, 512)  # 8,192 bytes each
    with pytest.raises(InputError, match=r"900,000 images take 7\.4 GB, .* room for 854,492 of"):
        check_memory(900_000, 512)
    fake_cuda(monkeypatch, mem_get_info=(500_000_000, 8_000_000_000))
    with pytest.raises(InputError, match="room for 0 of them"):
        check_memory(100, 512)


# --- Devices ---


def on_fake_cuda(module, mode):
    """A module with its parameters and buffers, and nothing else of it, on a GPU that only knows
    shapes and types."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor).detach().to("cuda")
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
    return module


def fake_step(objective, rest, stage, dtype):
    objective = copy.deepcopy(objective)
    with FakeTensorMode() as mode:
        objective = on_fake_cuda(objective, mode)
        batch = [mode.from_tensor(tensor).to("cuda") for tensor in (random_images(BATCH), *rest)]
        optimizers = make_optimizers("adam" if stage == "teacher" else "muon", objective, 1e-3)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            terms = objective(*batch)
        loss = sum(objective.weigh(terms).values())
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for parameter in objective.parameters():  # backward needs a driver
            parameter.grad = torch.zeros_like(parameter)
        for o in optimizers:
            if isinstance(o, Muon):  # Adam is PyTorch's, and fused, which cannot be faked
                o.param_groups[0]["lr"] = torch.tensor(1e-3)
                o.step()
        objective.after_step(terms, 9, 10)


@pytest.fixture
def autocast_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@each_stage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_leaves_nothing_on_the_cpu_and_reads_nothing_back(
    stage, dtype, autocast_without_cuda
):
    fake_step(*objective_of(*stage, dtype=dtype), stage[0], dtype)


def test_what_would_go_wrong_on_a_gpu_is_noticed(monkeypatch):
    objective, rest = objective_of("student", "--vgg", "none")
    kl = distill_tinyvae.kl_loss

    def waits(mu, logvar):
        return kl(mu, logvar) * (1 + 0 * mu.sum().item())

    def forgets(mu, logvar):
        return (kl(mu, logvar) * torch.ones(BATCH)).mean()

    for wrong in (waits, forgets):
        monkeypatch.setattr(distill_tinyvae, "kl_loss", wrong)
        with pytest.raises(Exception, match=r"_local_scalar_dense|on the same device"):
            fake_step(objective, rest, "student", torch.float32)


# --- torch.compile ---


@each_stage
def test_an_objective_compiles_without_a_break(stage):
    objective, rest = objective_of(*stage)
    batch = random_images(BATCH), *rest
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    losses = []
    for module in (objective, compiled):
        objective.zero_grad()
        loss = sum(objective.weigh(module(*batch)).values())
        loss.backward()
        gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
        losses.append((loss.detach(), gradients))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


# --- fp16 ---


def test_a_step_that_overflows_is_skipped_and_the_scale_halves():
    objective, rest = objective_of("student", "--vgg", "none")
    optimizers = make_optimizers("muon", objective, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = random_images(BATCH), *rest
    step(objective, optimizers, batch, scaler)
    before = {name: tensor.clone() for name, tensor in objective.network.named_parameters()}
    broken = batch[0], batch[1].clone().fill_(torch.inf), *batch[2:]
    step(objective, optimizers, broken, scaler)
    assert scaler.get_scale() == 2.0**9
    for name, tensor in objective.network.named_parameters():
        assert torch.equal(tensor, before[name]), name
    assert step(objective, optimizers, batch, scaler).isfinite()
    assert any(not torch.equal(p, before[n]) for n, p in objective.network.named_parameters())


# --- How many operations ---


class Count(TorchDispatchMode):
    """Counts operations that compute something: on a GPU, about as many launches."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in COMPUTE_NOTHING:
            self.operations[name] += 1
        return function(*args, **kwargs or {})


def count_operations(stage, optimizer):
    objective, rest = objective_of(*stage)
    optimizers = make_optimizers(optimizer, objective, 1e-3)
    batch = random_images(BATCH), *rest
    step(objective, optimizers, batch)  # which makes the optimisers' states
    with Count() as count:
        step(objective, optimizers, batch)
    return count.operations


@pytest.mark.parametrize(
    ("stage", "optimizer", "most"),
    [(("teacher",), "adam", 109), (("student",), "muon", 654), (("student",), "adam", 345),
     (("student", "--vgg", "none"), "muon", 504)],
)
def test_a_step_takes_no_more_operations_than_docs_say(stage, optimizer, most):
    assert count_operations(stage, optimizer).total() <= most


def test_mps_has_every_operation_of_a_step_by_pytorchs_own_list():
    yaml = pytest.importorskip("yaml")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(path.read_text())}

    def is_on_mps(name):  # written for it, or composed of others
        overloads = [e for full, e in entries.items() if full.split(".")[0] == name]
        overloads = [entries.get(e.get("structured_delegate"), e) for e in overloads]
        written_for = [",".join(e.get("dispatch", ["Composite"])) for e in overloads]
        return any("MPS" in devices or "Composite" in devices for devices in written_for)

    for stage in (STAGES["teacher"], STAGES["nats held"]):  # which has all that the others have
        operations = count_operations(stage, "adam" if stage[0] == "teacher" else "muon")
        assert [name for name in operations if not is_on_mps(name)] == []
    assert not is_on_mps("_linalg_eigvals")
