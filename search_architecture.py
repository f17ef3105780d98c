"""Search the student's shape: which channels and how many latents, for which budget?

    python search_architecture.py --data PATH                  # 20 students: half an hour on a CPU
    python search_architecture.py --data PATH --budget "params<=147000, ms<=1"
    python search_architecture.py --data PATH --train-best 3   # then the 3 best, for 30 epochs
    python search_architecture.py --trials 6 --epochs 1 --limit 5000 --data photo-crops   # a trial

Optuna proposes shapes of TinyVAE32, each is trained briefly by distill_tinyvae.py at the same rate
(its --rate), and what is found is the front: the students within the budget of which no other has
both less error and a lower cost. One that is behind another of no higher cost early in its training
is stopped.

The error is that of a sample of the posterior, which is what the rate pays for. That of the mean,
which users decode, falls with every latent more, whatever the rate; it stands beside it.

The study is a file, search/study.db in the checkpoint folder: the same command again resumes it,
several processes share it, and `optuna-dashboard sqlite:///checkpoints/search/study.db` shows it
(`pip install optuna-dashboard`). Students that have been trained are not trained again. Writes them
into folders beside the study, search.csv and search.png, and prints a table. Everything is measured
on the validation split. Needs `pip install -r requirements-deploy.txt`.
"""

import contextlib
import json
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from comparison import Comparison, shape_name
from metrics import median_seconds
from models import count_macs, count_parameters
from onnx_models import onnx_form, split_vae, to_onnx
from pictures import save_figure
from runtime import InputError, describe_device, print_table, require, run_script
from settings import (
    Kind,
    file_path,
    must,
    number,
    one_of,
    parse_settings,
    several,
    switch,
    text,
    whole,
)
from storage import check_writable, locked, write_csv
from tiny_vae_32 import TinyVAE32
from vae import IMAGE_SHAPE

HERE = Path(__file__).resolve().parent

# --- What is searched ---
BUDGET = "params<=294403"  # conditions, commas between: params, kb, macs, ms or onnx_ms <= a number
COST = "params"  # what is to be small beside the error: params, macs, ms or onnx_ms
WIDTHS_16 = (8, 40)  # smallest and largest channel numbers at 16×16 pixels, in steps of WIDTH_STEP
WIDTHS_8 = (16, 80)  # at 8×8
WIDTHS_4 = (32, 128)  # at 4×4
WIDTHS_2 = (32, 192)  # at 2×2, beside the code
WIDTH_STEP = 8  # CPUs and GPUs compute channels in eights or more
LATENT_DIMS = (16, 256)  # fewest and most latents, in steps of LATENT_STEP
LATENT_STEP = 16  # latents
TRIALS = 20  # students to train in all, those of earlier starts and other processes included

# --- Training, with all else as at the top of distill_tinyvae.py ---
DATA = "cifar10"  # as in distill_tinyvae.py
LIMIT = 0  # train on the first N images; 0 uses all
RATE = 87.0  # nats at which all students are compared
RATE_TOLERANCE = 0.015  # how far a student's rate may be from that, as a fraction
EPOCHS = 3  # epochs of a student in the search
STOP_MARGIN = 0.05  # stop one that is so far behind after an epoch, as a fraction; none: never
SCRATCH = False  # train on MSE and KL alone
TEACHER = None  # to distil from: the path of a trained one; or None
VGG = "none"  # VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
SEED = 0  # of weights, image order and latent samples

# --- Afterwards ---
TRAIN_BEST = 0  # train this many at length, those of the front first, then by error
TRAIN_EPOCHS = 30  # epochs of each

# --- Machine and files ---
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "auto"  # auto, fp32, bf16 or fp16
CHECKPOINT_DIR = HERE / "checkpoints"  # the study and its students go to search/ in it
OUTPUT_DIR = HERE / "outputs"  # folder of search.csv and search.png


def conditions(names):
    """A setting: "params<=147000, ms<=0.5" → {"params": 147000.0, "ms": 0.5}."""

    def read(value):
        must(isinstance(value, str))
        found = {}
        for condition in value.split(","):
            name, sign, limit = condition.partition("<=")
            must(sign and name.strip() in names and name.strip() not in found)
            found[name.strip()] = number(0, above=True).read(limit)
        return found

    means = f"conditions like params<=147000,ms<=0.5, of {', '.join(names)}, each at most once"
    return Kind(read, means, none={})


RANGE = several(whole(1), 2)
KINDS = {
    "BUDGET": conditions(("params", "kb", "macs", "ms", "onnx_ms")),
    "COST": one_of("params", "macs", "ms", "onnx_ms"),
    "WIDTHS_16": RANGE, "WIDTHS_8": RANGE, "WIDTHS_4": RANGE, "WIDTHS_2": RANGE,
    "WIDTH_STEP": whole(1), "LATENT_DIMS": RANGE, "LATENT_STEP": whole(1), "TRIALS": whole(0),
    "DATA": text(), "LIMIT": whole(0, none=0), "RATE": number(0, above=True),
    "RATE_TOLERANCE": number(0, 1, above=True), "EPOCHS": whole(1),
    "STOP_MARGIN": number(0, none=float("inf")), "SCRATCH": switch(),
    "TEACHER": file_path(none=None), "VGG": text(none="none"), "SEED": whole(0, 2**32 - 1),
    "TRAIN_BEST": whole(0, none=0), "TRAIN_EPOCHS": whole(1),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "CHECKPOINT_DIR": file_path(),
    "OUTPUT_DIR": file_path(),
}

COSTS = {
    "params": "parameters",
    "kb": "kilobytes of weights in INT8",
    "macs": "multiply-accumulates to encode and decode an image",
    "ms": "milliseconds for that, one image, PyTorch, one CPU thread",
    "onnx_ms": "the same in ONNX Runtime",
}
TINY_VAE = {"encoder_channels": [16, 32, 64, 128], "decoder_channels": [128, 64, 32, 16]}
# Trained first, for comparison, whatever the budget: TinyVAE32 and the shapes that it is pruned to.
KNOWN = {
    "TinyVAE32": {"latent_dim": 64} | TINY_VAE,
    **{
        f"its channels, {cap} at most": {
            "latent_dim": 64,
            **{side: [min(width, cap) for width in widths] for side, widths in TINY_VAE.items()},
        }
        for cap in (66, 48, 27)  # −40, −60 and −80% of the parameters
    },
}
MEASURED = (
    "params", "kb", "macs", "encode_ms", "decode_ms", "ms", "onnx_encode_ms", "onnx_decode_ms",
    "onnx_ms",
)
COLUMNS = (
    "student", "shape", "trial", "state", "on_front", "sampled_mse", "mse", "kl_nats", *MEASURED,
    "seconds",
)
# What the study depends on; the rest may change when it is resumed.
NOT_IN_RECIPE = {
    "trials", "train_best", "train_epochs", "device", "checkpoint_dir", "output_dir", "data",
    "teacher", "split", "judge", "judged",
}
HEARTBEAT, GRACE = 15, 60  # seconds between a process's signs of life, and until it counts as dead
STARTUP = 8  # students of random shapes within the budget, before Optuna learns from what was found
COMPARABLE = 0.03  # rates that differ by less, as a fraction, do not forbid comparing two errors
REFUSALS, CLOCKED_REFUSALS = 2000, 50  # shapes in a row beyond the budget: none seems within it


# --- A student's shape and cost ---


def propose(trial, settings):
    """A shape, from Optuna: constructor arguments of TinyVAE32."""

    def widths(name, size):
        low, high = getattr(settings, f"widths_{size}")
        return trial.suggest_int(f"{name}_{size}", low, high, step=settings.width_step)

    low, high = settings.latent_dims
    return {
        "latent_dim": trial.suggest_int("latent_dim", low, high, step=settings.latent_step),
        "encoder_channels": [widths("encoder", size) for size in (16, 8, 4, 2)],
        "decoder_channels": [widths("decoder", size) for size in (2, 4, 8, 16)],
    }


def count(shape):
    """What a shape costs wherever it runs: parameters, kilobytes in INT8, multiply-accumulates."""
    with torch.device("meta"):  # to be counted, not to be filled
        vae = TinyVAE32(**shape)
    parameters = count_parameters(vae)
    return {"params": parameters, "kb": parameters / 1000, "macs": count_macs(vae)}  # a byte each


@torch.no_grad()
def clock(shape):
    """Milliseconds to encode and to decode one image, in PyTorch and in ONNX Runtime: medians,
    which other work on the machine raises."""
    vae = TinyVAE32(**shape).eval()
    vae.check_range = False
    image, latent = torch.rand(1, *IMAGE_SHAPE), torch.randn(1, vae.latent_dim)
    models = {part.name: to_onnx(part, vae, {}) for part in split_vae(vae)}
    found = {}
    for prefix, form in (("", vae), ("onnx_", onnx_form("ONNX", "", models))):
        for name, work in (
            ("encode", lambda form=form: form.encode(image)),
            ("decode", lambda form=form: form.decode(latent)),
        ):
            seconds = median_seconds(work, torch.device("cpu"), repeats=100)
            found[f"{prefix}{name}_ms"] = 1000 * seconds
        found[f"{prefix}ms"] = found[f"{prefix}encode_ms"] + found[f"{prefix}decode_ms"]
    return found


def excess(cost, budget):
    """How far a student is beyond each condition of the budget that its cost is known for, as a
    fraction; negative within."""
    return {name: cost[name] / limit - 1 for name, limit in budget.items() if name in cost}


# --- Training one ---


class Search:
    """What all students share: settings, images, teacher, and those that are known.

    Args:
        settings: the script's.
        optuna: the library, loaded.
    """

    def __init__(self, settings, optuna):
        self.settings, self.optuna = settings, optuna
        # Nothing is measured here but what training reports, on the validation split.
        vars(settings).update(split="val", judge="none", judged=0)
        self.comparison = Comparison(settings, "search")
        self.folder = self.comparison.folder
        teacher = self.comparison.teacher
        if teacher and teacher.latent_dim < settings.latent_dims[1]:
            raise InputError(
                f"the teacher has {teacher.latent_dim} latents, and students may have up to "
                f"{settings.latent_dims[1]}: lower the second number of --latent-dims"
            )
        self.known = []  # rows of the students of KNOWN
        self.refusals = 0

    def recipe(self):
        """What the study depends on, as plain data."""
        found = {name: value for name, value in vars(self.settings).items()
                 if name not in NOT_IN_RECIPE}
        found["stop_margin"] = str(found["stop_margin"])  # JSON has no infinity
        comparison = self.comparison
        return found | {
            "images": comparison.record["pixels_sha256"],
            "teacher": comparison.teacher_sha256,
            "VGG16": comparison.vgg_record["vgg_sha256"],
        }

    def train(self, shape, epochs, is_hopeless=None):
        """Train a student, or find that it is trained: its `figures`.

        Returns None where `is_hopeless(rows)`, of the epochs so far, stopped it.
        """
        changes = {"epochs": epochs, "rate": self.settings.rate}
        changes["calibration"] = "both"  # whatever the number of latents
        if self.settings.scratch:
            changes |= {"reconstruction_weight": 1, "output_weight": 0}
            changes |= {"kl_weight": 0.33}  # to start from: --rate moves it
        trained = self.comparison.train_student(
            shape_name(shape), self.student_folder(shape, epochs).name, self.settings.seed,
            is_hopeless=is_hopeless, **shape, **changes,
        )
        return trained and figures(trained["rows"])

    def student_folder(self, shape, epochs):
        return self.folder / f"{shape_name(shape)}_{epochs}_epochs"

    # --- A trial of the study ---

    def objective(self, trial):
        """Train what Optuna proposes → (error, cost). Raises TrialPruned for what is beyond the
        budget, which is not trained, and for what is stopped."""
        shape = propose(trial, self.settings)
        cost = count(shape)
        self.refuse(trial, cost, REFUSALS)
        cost |= clock(shape)
        self.refuse(trial, cost, CLOCKED_REFUSALS)
        self.refusals = 0
        trial.set_user_attr("shape", shape)
        trial.set_user_attr("cost", cost)
        try:
            found = self.train(shape, self.settings.epochs, self.is_behind(trial.study, cost))
        except (KeyboardInterrupt, InputError):
            trial.study.enqueue_trial(trial.params)  # the next start takes it up again
            raise
        if found is None:
            trial.set_user_attr("stopped", True)
            raise self.optuna.TrialPruned("behind a student that costs no more")
        trial.set_user_attr("found", found)
        off = abs(found["kl_nats"] / self.settings.rate - 1)
        trial.set_constraint("rate", off - self.settings.rate_tolerance)
        return found["sampled_mse"], cost[self.settings.cost]

    def refuse(self, trial, cost, limit):
        beyond = excess(cost, self.settings.budget)
        for name, value in beyond.items():
            if name not in trial.constraints:
                trial.set_constraint(name, value)
        if any(value > 0 for value in beyond.values()):
            self.refusals += 1
            if self.refusals >= limit:
                raise InputError(
                    f"{self.refusals} shapes in a row were beyond --budget: raise it, or lower the "
                    "--widths"
                )
            raise self.optuna.TrialPruned("beyond the budget")

    def is_behind(self, study, cost):
        """A test of a student in training: is it behind one that costs no more?

        It is, if after the same epoch of a training of the same length, and at about the same rate,
        the other had less error by the margin. The study has two objectives, for which Optuna has
        no pruner of its own.
        """
        complete = study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,))
        trained = [(trial.user_attrs["cost"], trial.user_attrs["found"]) for trial in complete]
        trained += [(row, row) for row in self.known]
        name = self.settings.cost
        others = [found["epochs"] for other, found in trained if other[name] <= cost[name]]

        def is_hopeless(rows):
            if not 0 < len(rows) < self.settings.epochs:
                return False
            error, rate = rows[-1]["val_sampled_mse"], rows[-1]["kl_nats"]
            found = (epochs[len(rows) - 1] for epochs in others)
            errors = [e for e, other_rate in found if abs(other_rate / rate - 1) < COMPARABLE]
            return bool(errors) and error > (1 + self.settings.stop_margin) * min(errors)

        return is_hopeless

    def is_within(self, row):
        """Whether a trained student is within the budget and at the rate."""
        s = self.settings
        off = abs(row["kl_nats"] / s.rate - 1)
        return off <= s.rate_tolerance and all(
            value <= 0 for value in excess(row, s.budget).values()
        )


def figures(rows):
    """From the rows of metrics.csv: a student's figures on the validation split, at the end."""
    return {
        "sampled_mse": rows[-1]["val_sampled_mse"],
        "mse": rows[-1]["val_mse"],
        "kl_nats": rows[-1]["kl_nats"],
        "epochs": [(row["val_sampled_mse"], row["kl_nats"]) for row in rows],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


# --- All of them ---


def open_study(search):
    """The study in the file, new or resumed. Raises InputError if it is of another recipe."""
    optuna, path = search.optuna, search.folder / "study.db"
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        study = optuna.create_study(
            # A trial whose process has died is proposed again.
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{path}",
                engine_kwargs={"connect_args": {"timeout": 60}},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=(
                    optuna.storages.RetryHeartbeatStaleTrialCallback()
                ),
            ),
            # Not seeded: processes that share a study must not propose the same.
            sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP, multivariate=True),
            study_name="search",
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy's, of many kinds
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be used as an Optuna study ({reason}): try again, or name another "
            "--checkpoint-dir"
        ) from error
    study.set_metric_names(["validation MSE of a sample", search.settings.cost])
    # As the file keeps it: a tuple has become a list.
    recipe = json.loads(json.dumps(search.recipe()))
    earlier = study.user_attrs.get("recipe")
    if earlier is None:
        study.set_user_attr("recipe", recipe)
        propose_at_random(search, study)
        return study
    changed = [f"{name} was {earlier.get(name)}, is {recipe[name]}" for name in recipe
               if earlier.get(name) != recipe[name]]
    if changed:
        raise InputError(
            f"{path} was begun with other settings ({'; '.join(changed)}): use those again, or "
            "name another --checkpoint-dir"
        )
    return study


@contextlib.contextmanager
def file_errors(search):
    """Within it, an error of the study's file becomes an InputError.

    Optuna reports what happens to that file, so a trial's own InputError may be behind others. And
    its heartbeat, in another thread, meets the same errors: it is not to print them.
    """
    failure, hook = search.optuna.exceptions.StorageInternalError, threading.excepthook
    threading.excepthook = lambda args: isinstance(args.exc_value, failure) or hook(args)
    try:
        yield
    except Exception as error:
        chain, found = [], error
        while found is not None and found not in chain:
            chain.append(found)
            found = found.__cause__ or found.__context__
        told = [found for found in chain if isinstance(found, InputError)]
        failures = [found for found in chain if isinstance(found, failure)]
        if isinstance(error, InputError) or not (told or failures):
            raise
        if told:
            raise InputError(str(told[0])) from error
        cause = failures[0].__cause__ or failures[0]
        reason = str(getattr(cause, "orig", cause)) or type(cause).__name__  # SQLAlchemy's origin
        raise InputError(
            f"could not write {search.folder / 'study.db'} ({reason.splitlines()[0]}): free some "
            "space, or put its folder back, and repeat the command"
        ) from error
    finally:
        threading.excepthook = hook


def propose_at_random(search, study):
    """Enqueue random shapes whose parameters and multiply-accumulates are within the budget. Left
    to itself the sampler would start with random ones that mostly are not."""
    s, optuna = search.settings, search.optuna
    drafts = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=s.seed))
    left = STARTUP
    for _ in range(REFUSALS):
        draft = drafts.ask()
        if all(value <= 0 for value in excess(count(propose(draft, s)), s.budget).values()):
            study.enqueue_trial(draft.params)
            left -= 1
        if not left:
            return


def is_trained(trial, optuna):
    """Whether a trial counts: trained, to its end or until it was stopped."""
    states = optuna.trial.TrialState
    return trial.state == states.COMPLETE or (
        trial.state == states.PRUNED and "stopped" in trial.user_attrs
    )


def trained_count(study, optuna):
    return sum(is_trained(trial, optuna) for trial in study.get_trials(deepcopy=False))


def all_rows(search, study):
    """The rows of search.csv: the known students, then the trials."""
    rows = [dict(row) for row in search.known]
    for trial in study.get_trials(deepcopy=False):
        if is_trained(trial, search.optuna):
            attributes = trial.user_attrs
            rows.append(
                {
                    "student": f"trial {trial.number}",
                    "shape": shape_name(attributes["shape"]),
                    "arguments": attributes["shape"],
                    "trial": trial.number,
                    "state": "stopped" if "stopped" in attributes else "trained",
                } | attributes["cost"] | attributes.get("found", {})
            )
    cost = search.settings.cost
    candidates = [row for row in rows if row["state"] != "stopped" and search.is_within(row)]
    for row in rows:
        row["on_front"] = row in candidates and not any(
            other["sampled_mse"] <= row["sampled_mse"] and other[cost] <= row[cost]
            and (other["sampled_mse"], other[cost]) != (row["sampled_mse"], row[cost])
            for other in candidates
        )
    return rows


def train_known(search):
    """Train the students of KNOWN: `search.known`."""
    for name, shape in KNOWN.items():
        row = {"student": name, "shape": shape_name(shape), "arguments": shape, "state": "known"}
        row |= count(shape) | clock(shape)
        search.known.append(row | search.train(shape, search.settings.epochs))


def train_best(search, rows):
    """Train TinyVAE32 and the best students at length. Rows with both figures of each."""
    s = search.settings
    within = [row for row in rows if row["state"] != "stopped" and search.is_within(row)]
    within.sort(key=lambda row: (not row["on_front"], row["sampled_mse"]))
    chosen, seen = [rows[0]], {rows[0]["shape"]}  # rows[0] is TinyVAE32
    for row in within:
        if row["shape"] not in seen and len(chosen) <= s.train_best:
            chosen.append(row)
            seen.add(row["shape"])
    found = []
    for row in chosen:
        at_length = search.train(row["arguments"], s.train_epochs)
        folder = search.student_folder(row["arguments"], s.train_epochs)
        found.append(row | {"long": at_length, "path": folder / "tinyvae_best.pth"})
    return found


def rank_correlation(first, second):
    """Spearman's: the correlation of two lists' ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def table_row(row, tiny_vae):
    def milliseconds(prefix):
        return f"{row[f'{prefix}encode_ms']:.2f} + {row[f'{prefix}decode_ms']:.2f}"

    def error(name):
        return f"{row[name]:.5f}", f"{row[name] / tiny_vae[name] - 1:+.1%}"

    of_sample, versus = error("sampled_mse")
    of_mean, mean_versus = error("mse")
    return {
        "student": row["student"],
        "encoder, latents, decoder": row["shape"].replace("_", " · "),
        "parameters": f"{row['params']:,}",
        "MACs": f"{row['macs'] / 1e6:.2f} M",
        "ms": milliseconds(""),
        "ms, ONNX": milliseconds("onnx_"),
        "KL, nats": f"{row['kl_nats']:.1f}",
        "MSE of a sample": of_sample,
        "vs TinyVAE32": versus,
        "of the mean": of_mean,
        "vs TinyVAE32 ": mean_versus,
    }


def draw_front(path, rows, cost, title):
    """Error against cost: all students, the front, and the known ones.

    Args:
        path: the PNG to write.
        rows: those of search.csv.
        cost: the column of the x axis.
        title: data, budget and rate in a few words.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    ax = figure.subplots()
    # Failures far above would press the rest together.
    top = 1.1 * max(row["sampled_mse"] for row in rows if row["state"] == "known")
    trained = [row for row in rows if row["state"] == "trained"]
    shown = [row for row in trained if row["sampled_mse"] <= top]
    above = len(trained) - len(shown)
    ax.plot(
        [row[cost] for row in shown], [row["sampled_mse"] for row in shown], "o", markersize=4,
        color="tab:grey", label="trained" + (f" ({above} more above)" if above else ""),
    )
    front = [row for row in rows if row["on_front"] and row["sampled_mse"] <= top]
    front = sorted((row[cost], row["sampled_mse"], str(row.get("trial", ""))) for row in front)
    if front:
        costs, errors, _ = zip(*front)
        ax.plot(
            costs, errors, "o-", markersize=5, color="tab:blue", drawstyle="steps-post",
            label="the front: within the budget, and none better in both",
        )
        for x, y, trial in front:
            ax.annotate(
                trial, (x, y), xytext=(0, -11), textcoords="offset points", fontsize=7,
                color="tab:blue", ha="center",
            )
    for row in rows:
        if row["state"] == "known":
            is_whole = row["student"] == "TinyVAE32"
            ax.plot(
                row[cost], row["sampled_mse"], "k*" if is_whole else "k^",
                markersize=10 if is_whole else 6,
            )
            ax.annotate(
                row["student"], (row[cost], row["sampled_mse"]), xytext=(0, 8),
                textcoords="offset points", fontsize=8, ha="center",
            )
    ax.set_xscale("log")
    for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        axis(EngFormatter(sep=""))
    ax.margins(0.12, 0.1)
    ax.set_xlabel(COSTS[cost], fontsize=9)
    ax.set_ylabel("validation MSE of a sample, pixels in [0, 1]", fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(alpha=0.3, which="both")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8)
    save_figure(figure, path)


def words(budget):
    return ", ".join(f"{name} <= {limit:g}" for name, limit in budget.items()) or "none"


def print_summary(search, study):
    s = search.settings
    done, budget = trained_count(study, search.optuna), words(s.budget)
    print(
        f"study    {search.folder / 'study.db'}: {done} students trained, {s.trials} wanted\n"
        f"budget   {budget}; small is to be: {s.cost}, {COSTS[s.cost]}\n"
        f"images   {search.comparison.data}: {len(search.comparison.train.images):,} to train on; "
        "figures are of the validation split\n"
        f"training {s.epochs} epochs at {s.rate:g} nats, "
        f"{'MSE and KL alone' if s.scratch else 'the terms of distill_tinyvae.py'}, teacher "
        f"{s.teacher or 'none'}, VGG16 {s.vgg}, seed {s.seed}\n"
        f"device   {describe_device(search.comparison.device)}, {search.comparison.precision}",
        flush=True,
    )


def print_best(found):
    """The table of the students trained at length, and how well the search ranked them."""
    tiny_vae = found[0]
    print()
    print_table([
        table_row(row | row["long"], tiny_vae | tiny_vae["long"])
        | {"of a sample, in the search": f"{row['sampled_mse']:.5f}"}
        for row in found
    ])
    if len(found) > 2:
        short = [row["sampled_mse"] for row in found]
        long = [row["long"]["sampled_mse"] for row in found]
        print(
            f"\nRank correlation of the search's errors with these (Spearman): "
            f"{rank_correlation(short, long):.2f} over {len(found)} students."
        )


def search_all(settings):
    s = settings
    for name in ("widths_16", "widths_8", "widths_4", "widths_2", "latent_dims"):
        low, high = getattr(s, name)
        if low > high:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} takes the smallest, then the largest, got {low},{high}")
    if s.scratch and (s.teacher or s.vgg != "none"):
        raise InputError("--scratch trains on MSE and KL alone: leave out --teacher and --vgg")
    optuna = require("optuna")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    torch.set_num_threads(1)  # figures are of one thread; students have processes of their own
    smallest = {
        "latent_dim": s.latent_dims[0],
        "encoder_channels": [getattr(s, f"widths_{size}")[0] for size in (16, 8, 4, 2)],
        "decoder_channels": [getattr(s, f"widths_{size}")[0] for size in (2, 4, 8, 16)],
    }
    cost = count(smallest)
    if {"ms", "onnx_ms"} & set(s.budget):
        cost |= clock(smallest)
    for name, value in excess(cost, s.budget).items():
        if value > 0:
            raise InputError(
                f"the smallest student has {name} {cost[name]:g}, beyond --budget: raise it, or "
                "lower the --widths"
            )
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # errors are told in a sentence
    search = Search(s, optuna)
    check_writable(search.folder)
    check_writable(s.output_dir)
    with file_errors(search):
        run_study(search)


def run_study(search):
    """Open the study, train what is left of its trials, report."""
    s, optuna = search.settings, search.optuna
    with locked(search.folder, wait=True):  # another process may be making it
        study = open_study(search)
    print_summary(search, study)
    csv_path, png_path = s.output_dir / "search.csv", s.output_dir / "search.png"
    title = f"{search.comparison.data}, {s.epochs} epochs, {s.rate:g} nats, {words(s.budget)}"
    train_known(search)

    def report(study, trial=None):
        rows = all_rows(search, study)
        with locked(search.folder, wait=True):  # another process may report as well
            write_csv(csv_path, COLUMNS, rows)
            draw_front(png_path, rows, s.cost, title)
        if trial is not None and is_trained(trial, optuna):
            found, result = trial.user_attrs.get("found"), "stopped"
            if found:
                result = f"MSE of a sample {found['sampled_mse']:.5f}, of the mean "
                result += f"{found['mse']:.5f}, at {found['kl_nats']:.1f} nats"
            done = trained_count(study, optuna)
            print(f"trial {trial.number}, {done} of {s.trials} trained: {result}", flush=True)
        return rows

    def stop_when_done(study, trial):
        if is_trained(trial, optuna):
            report(study, trial)
        if trained_count(study, optuna) >= s.trials:
            study.stop()

    if trained_count(study, optuna) < s.trials:
        study.optimize(search.objective, callbacks=[stop_when_done])
    rows = report(study)
    print()
    shown = [row for row in rows if row["state"] == "known" or row["on_front"]]
    print_table([table_row(row, rows[0]) for row in shown])
    if not any(row["on_front"] for row in rows):
        print(
            f"\nNo student is within the budget and within {s.rate_tolerance:.1%} of {s.rate:g} "
            "nats: the front is empty."
        )
    print(
        "\nThe known students, and the front. MSE: validation split, pixels in [0, 1]. KL: the "
        "rate.\nms: encode + decode one image, medians of 100, one CPU thread."
    )
    best = train_best(search, rows) if s.train_best else []
    if best:
        print_best(best)
    print(f"\nWritten:\n  {csv_path}\n  {png_path}\n  {search.folder}/")
    for row in best:
        print(f"  {row['path']}")


def main(argv=None):
    search_all(parse_settings(globals(), argv))


if __name__ == "__main__":
    run_script(main)
