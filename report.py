"""What a run of distill_tinyvae.py prints and draws."""

import torch

from distributed import world_size
from metrics import evaluate_vae
from models import count_parameters
from pictures import draw_curves, draw_interpolations, draw_reconstructions
from runtime import print_table

PICTURES = ("training_curves.png", "reconstruction_test.png", "interpolation_test.png")


def print_summary(run):
    """The settings in force, before any work."""
    s, record = run.settings, run.record
    terms = ("reconstruction", "kl", "latent", "output", "perceptual")
    weights = ", ".join(f"{term} {getattr(s, f'{term}_weight'):g}" for term in terms)
    beta = record["effective_beta"]
    print(
        f"images       {record['data']}: {record['train_images']:,} to train on, "
        f"{record['val_images']:,} held out\n"
        "teacher      StandardVAE, "
        + (f"{s.teacher}" if s.teacher else
           f"{s.teacher_epochs} epochs, beta {s.teacher_kl_weight:g}")
        + f"\nstudent      TinyVAE32, {s.epochs} epochs, from {s.start or 'random weights'}\n"
        f"loss         {weights}; T = {s.temperature:g}\n"
        f"             KL × {s.kl_scale:g}, perceptual × {s.perceptual_scale:g}; effective beta "
        f"{'none' if beta is None else f'{beta:.3g}'} (KL against the reconstruction term alone)\n"
        f"VGG16        {record['vgg_weights']}\n"
        f"optimiser    Adam, peak learning rate {s.learning_rate:g}, batch {s.batch_size}, "
        f"seed {s.seed}\n"
        f"device       {record['device_name']}, {run.precision}"
        f"{f', {world_size()} processes' if world_size() > 1 else ''}\n"
        f"checkpoints  {s.checkpoint_dir}\n"
        f"outputs      {s.output_dir}\n"
    )


def draw(run, teacher, student, rows, when):
    """Redraw PICTURES. teacher may be None; rows are those of metrics.csv."""
    what = f"{run.record['data']}, validation split, student at {when}"
    models = ({"teacher": teacher} if teacher else {}) | {"student": student}
    curves, reconstructions, interpolations = map(run.output, PICTURES)
    draw_reconstructions(reconstructions, run.val_images, models, what)
    draw_interpolations(interpolations, run.val_images, models, what)
    draw_curves(curves, rows, f"Distillation on {run.record['data']}")


def print_results(run, teacher, student, seconds, files):
    """Validation figures of both models, the time, and the files written."""
    models = ({"teacher": teacher} if teacher else {}) | {"student, best epoch": student}
    table = []
    for name, model in models.items():
        found = evaluate_vae(model, run.val_images)
        table.append(
            {
                "validation split": name,
                "parameters": f"{count_parameters(model):,}",
                "MSE": f"{found['mse']:.5f}",
                "mean PSNR": f"{found['psnr']:.2f} dB",
                "KL": f"{found['kl_nats']:.1f} nats",
                "active": f"{found['active_dims']} of {model.latent_dim}",
            }
        )
    print()
    print_table(table)
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        print(f"\nPeak GPU memory: {peak:.2f} GiB, beside what CUDA itself takes")
    print(f"\nDone in {seconds / 60:.1f} minutes. Written:")
    for path in files:
        print(f"  {path}")
