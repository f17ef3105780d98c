"""Search the student's shape: which channels and how many latents, for which budget?

    python search_architecture.py --data PATH                  # 14 students
    python search_architecture.py --data PATH --budget "params<=147000, ms<=1"
    python search_architecture.py --data PATH --train-best 3   # then the 3 best, for 30 epochs
    python search_architecture.py --trials 6 --epochs 1 --limit 5000 --data photo-crops   # a trial

Optuna proposes shapes of TinyVAE32, and distill_tinyvae.py trains each briefly at the same nats
(its --rate). The result is the front: the students within the budget of which no other has both
less error and a lower cost. The error is that of a sample of the posterior, which is what the nats
pay for. That of the mean, which users decode, falls with every latent more; it stands beside it.

The same command again goes on, and several processes share the work. Writes the study and its
students into search/ in the checkpoint folder, search.csv and search.png, and prints a table, all
of the validation split. Needs `pip install -r requirements-dev.txt`.
"""

import warnings
from pathlib import Path

import matplotlib
import torch

from common import kind
from common.comparison import Comparison, relative_change, shape_name
from common.data import IMAGE_SHAPE
from common.metrics import seconds_per_batch
from common.models import BEST_STUDENT, count_macs, count_parameters
from common.pictures import save_figure
from common.runtime import InputError, explain_errors, print_table, require, run_script
from common.settings import parse_settings
from common.storage import check_writable, locked, write_csv
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent
RANGE = kind.several(kind.Count, 2)

# --- What is searched ---
# conditions, commas between: params, macs or ms <= a number; or none
BUDGET: kind.text(none=None) = "params<=294403"
COST: kind.one_of("params", "macs", "ms") = "params"  # what is to be small beside the error
WIDTHS_16: RANGE = (8, 40)  # fewest and most channels at 16×16 pixels, in steps of WIDTH_STEP
WIDTHS_8: RANGE = (16, 80)  # at 8×8
WIDTHS_4: RANGE = (32, 128)  # at 4×4
WIDTHS_2: RANGE = (32, 192)  # at 2×2, beside the code
WIDTH_STEP: kind.Count = 8  # CPUs and GPUs compute channels in eights or more
LATENT_DIMS: RANGE = (16, 256)  # fewest and most latents, in steps of LATENT_STEP
LATENT_STEP: kind.Count = 16  # latents
TRIALS: kind.whole(0) = 14  # students to train to their end, by all starts and processes

# --- Training, with all else as at the top of distill_tinyvae.py ---
DATA: kind.text() = "cifar10"  # as in distill_tinyvae.py
LIMIT: kind.CountOr0 = 0  # train on the first N images; 0 uses all
RATE: kind.Positive = 87.0  # nats at which all students are compared
RATE_TOLERANCE: kind.number(0, 1, above=True) = 0.015  # how far nats may be off, as a fraction
EPOCHS: kind.Count = 3  # epochs of a student in the search
TEACHER: kind.FileOrNone = None  # to distil from: the path of a trained one; or None
# VGG16 of the perceptual term: imagenet, random, none, or a state dict's path
VGG: kind.Weights = "none"
SEED: kind.Seed = 0  # of weights, image order and latent samples

# --- Afterwards ---
TRAIN_BEST: kind.CountOr0 = 0  # train so many of the front at length, those of least error
TRAIN_EPOCHS: kind.Count = 30  # epochs of each

# --- Machine and files ---
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "auto"  # auto, fp32, bf16 or fp16
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"  # the study and its students go to search/ in it
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of search.csv and search.png

# --- Not settings ---
COSTS = {
    "params": "parameters",
    "macs": "multiply-accumulates to encode and decode an image",
    "ms": "milliseconds for that, PyTorch, one CPU thread",
}
COLUMNS = ("student", "shape", "on_front", "sampled_mse", "mse", "kl_nats", *COSTS)
# Tried first: TinyVAE32, and its channels with this many at most, the shapes that it is pruned to.
KNOWN = {"TinyVAE32": 128, "66 at most": 66, "48 at most": 48, "27 at most": 27}
HEARTBEAT = 30  # seconds between a process's signs of life; twice that without: it is dead


def tiny_vae(cap):
    """Optuna's parameters for TinyVAE32 with at most so many channels in each stage."""
    widths = {16: min(cap, 16), 8: min(cap, 32), 4: min(cap, 64), 2: min(cap, 128)}
    sides = {f"{side}_{size}": widths[size] for side in ("encoder", "decoder") for size in widths}
    return {"latent_dim": 64} | sides


def propose(suggest, settings):
    """Constructor arguments of TinyVAE32 from `suggest(name, low, high, step=step)`, which is a
    trial's `suggest_int`."""

    def widths(side, size):
        limits = getattr(settings, f"widths_{size}")
        return suggest(f"{side}_{size}", min(limits), max(limits), step=settings.width_step)

    latents = settings.latent_dims
    return {
        "latent_dim": suggest("latent_dim", min(latents), max(latents), step=settings.latent_step),
        "encoder_channels": [widths("encoder", size) for size in (16, 8, 4, 2)],
        "decoder_channels": [widths("decoder", size) for size in (2, 4, 8, 16)],
    }


@torch.no_grad()
def measure_cost(shape):
    """Parameters, multiply-accumulates, and milliseconds to encode and decode one image: a median,
    which other work on the machine raises."""
    vae = TinyVAE32(**shape).eval()
    images = torch.rand(1, *IMAGE_SHAPE)
    vae.check_range = False  # no part of the network
    ms = 1000 * seconds_per_batch(vae, images, "fp32")
    return {"params": count_parameters(vae), "macs": count_macs(vae), "ms": ms}


def read_budget(text):
    """"params<=147000, ms<=0.5" → {"params": 147000.0, "ms": 0.5}; None → {}."""
    budget = {}
    for condition in text.split(",") if text else ():
        name, _, limit = (word.strip() for word in condition.partition("<="))
        try:
            if name not in COSTS or name in budget:
                raise ValueError
            budget[name] = kind.Positive.check(limit)
        except ValueError:
            raise InputError(
                f"--budget must be conditions like params<=147000,ms<=0.5, of {', '.join(COSTS)}, "
                f"each at most once, got {text!r}"
            ) from None
    return budget


def excess(cost, budget):
    """How far a cost is beyond each condition of the budget, as a fraction; negative within."""
    return {name: cost[name] / limit - 1 for name, limit in budget.items()}


def propose_again(study, trial):
    """Optuna calls it for a trial whose process has died."""
    study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)


class Search:
    """The study of shapes, with the settings, budget and images that all students share."""

    def __init__(self, settings):
        self.settings, self.budget = settings, read_budget(settings.budget)
        self.optuna = require("optuna")
        cost = measure_cost(propose(lambda name, low, high, step: low, settings))
        for name, fraction in excess(cost, self.budget).items():
            if fraction > 0:
                raise InputError(
                    f"the smallest student has {name} {cost[name]:g}, beyond --budget: raise it, "
                    "or lower the --widths"
                )
        self.comparison = Comparison(settings, "search")
        teacher, latents = self.comparison.teacher, max(settings.latent_dims)
        if teacher and teacher.latent_dim < latents:
            raise InputError(
                f"the teacher has {teacher.latent_dim} latents, and students may have up to "
                f"{latents}: lower the second number of --latent-dims"
            )
        self.folder = self.comparison.folder
        check_writable(self.folder)
        check_writable(settings.output_dir)
        with locked(self.folder, wait=True):  # another process may be making the study
            self.study = self.open_study()

    def open_study(self):
        """The study of this budget and cost in study.db, new or resumed. Others have studies of
        their own there; the trained students are shared."""
        optuna, s, path = self.optuna, self.settings, self.folder / "study.db"
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Fixed parameter")  # known shapes need not be in steps
        with explain_errors(
            lambda reason: f"{path} cannot be used as an Optuna study ({reason}): try again, or "
            "name another --checkpoint-dir"
        ):
            study = optuna.create_study(
                study_name=f"{s.epochs} epochs, {s.cost}, {s.budget or 'any size'}",
                storage=optuna.storages.RDBStorage(
                    f"sqlite:///{path}",
                    engine_kwargs={"connect_args": {"timeout": 60}},
                    heartbeat_interval=HEARTBEAT,
                    heartbeat_stale_trial_callback=propose_again,
                ),
                # Not seeded: processes that share a study must not propose the same.
                sampler=optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True),
                directions=["minimize", "minimize"],  # cost, error
                load_if_exists=True,
            )
        for name, cap in KNOWN.items():
            study.enqueue_trial(tiny_vae(cap), user_attrs={"name": name}, skip_if_exists=True)
        return study

    def train(self, name, shape, epochs):
        """Train a student, or find that it is trained: its figures, for a row of search.csv."""
        folder = f"{shape_name(shape)}_{epochs}_epochs"
        trained = self.comparison.train_student(
            name, folder, self.settings.seed, epochs=epochs, rate=self.settings.rate,
            calibration="both", **shape,  # both: whatever the number of latents
        )
        last = trained["rows"][-1]
        print(f"MSE of a sample {last['val_sampled_mse']:.5f}, {last['kl_nats']:.1f} nats")
        return {
            "student": name,
            "shape": shape_name(shape),
            "arguments": shape,
            "path": str(self.folder / folder / BEST_STUDENT),
            "sampled_mse": last["val_sampled_mse"],
            "mse": last["val_mse"],
            "kl_nats": last["kl_nats"],
        }

    def objective(self, trial):
        """Train what Optuna proposes → (cost, error). Beyond the budget nothing is trained: Optuna
        learns from the constraints where it ends."""
        s = self.settings
        shape = propose(trial.suggest_int, s)
        cost = measure_cost(shape)
        beyond = excess(cost, self.budget)
        for name, fraction in beyond.items():
            trial.set_constraint(name, fraction)
        if max(beyond.values(), default=0) > 0:
            raise self.optuna.TrialPruned
        name = trial.user_attrs.get("name", f"trial {trial.number}")
        try:
            row = cost | self.train(name, shape, s.epochs)
        except (KeyboardInterrupt, InputError):
            propose_again(self.study, trial)
            raise
        trial.set_user_attr("row", row)
        trial.set_constraint("nats", abs(row["kl_nats"] / s.rate - 1) - s.rate_tolerance)
        return cost[s.cost], row["sampled_mse"]

    def rows(self):
        """The rows of search.csv: the trials that were trained to their end."""
        front = {trial.number for trial in self.study.best_trials}
        complete = self.study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,))
        return [trial.user_attrs["row"] | {"on_front": trial.number in front} for trial in complete]

    def run(self):
        """Train TinyVAE32, the trials, and the best at length. Writes and prints the result."""
        s = self.settings
        self.comparison.print_summary(
            f"{s.budget or 'any size'}; {s.trials} students of {s.epochs} epochs at {s.rate:g} "
            f"nats, seed {s.seed}"
        )
        shape = propose(lambda name, *limits, step: tiny_vae(128)[name], s)
        reference = measure_cost(shape) | self.train("TinyVAE32", shape, s.epochs)
        if len(self.rows()) < s.trials:
            enough = self.optuna.study.MaxTrialsCallback(s.trials)
            self.study.optimize(self.objective, callbacks=[enough])
        rows = self.rows()
        others = [row for row in rows if row["shape"] != reference["shape"]]
        reference["on_front"] = any(row["on_front"] for row in rows if row not in others)
        front = sorted((row for row in others if row["on_front"]), key=lambda r: r["sampled_mse"])
        files = [s.output_dir / "search.csv", s.output_dir / "search.png", self.folder]
        write_csv(files[0], COLUMNS, [reference, *others])
        self.draw_front(files[1], [reference, *others])
        print_rows("TinyVAE32, and the front", [reference, *front])
        if s.train_best:
            best = [
                row | self.train(row["student"], row["arguments"], s.train_epochs)
                for row in [reference, *front[: s.train_best]]
            ]
            print_rows(f"After {s.train_epochs} epochs", best)
            files += [row["path"] for row in best]
        print("\nWritten:", *files, sep="\n  ")

    def draw_front(self, path, rows):
        """Error against cost: Optuna's plot, with the names of the front and of known shapes."""
        s, plots = self.settings, require("optuna.visualization.matplotlib")
        names = [COSTS[s.cost], "validation MSE of a sample"]
        ax = plots.plot_pareto_front(self.study, target_names=names)
        for row in rows:
            point = row[s.cost], row["sampled_mse"]
            if row["student"] in KNOWN:
                ax.plot(*point, "k*")
            if row["student"] in KNOWN or row["on_front"]:
                ax.annotate(row["student"], point, xytext=(5, 5), textcoords="offset points")
        ax.set_title(f"{s.data}, {s.epochs} epochs, {s.rate:g} nats, {s.budget or 'any size'}")
        ax.set_xscale("log")
        ax.figure.set_layout_engine("constrained")
        save_figure(ax.figure, path)


def print_rows(title, rows):
    """Print students as a table, compared with the first."""
    print(f"\n{title}:\n")
    print_table([
        {
            "student": row["student"],
            "encoder, latents, decoder": row["shape"].replace("_", " · "),
            "parameters": f"{row['params']:,}",
            "MACs": f"{row['macs'] / 1e6:.2f} M",
            "ms": f"{row['ms']:.2f}",
            "KL, nats": f"{row['kl_nats']:.1f}",
            "MSE of a sample": f"{row['sampled_mse']:.5f}",
            "vs TinyVAE32": relative_change(row, rows[0], "sampled_mse"),
            "of the mean": f"{row['mse']:.5f}",
            "vs TinyVAE32 ": relative_change(row, rows[0], "mse"),
        }
        for row in rows
    ])


def main(argv=()):
    settings = parse_settings(globals(), argv)
    matplotlib.use("Agg")  # Optuna draws with pyplot, which would look for a screen
    torch.set_num_threads(1)  # times are of one thread; students have processes of their own
    Search(settings).run()


if __name__ == "__main__":
    run_script(main)
