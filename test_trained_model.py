"""Evaluate a distilled student beside its teacher and PCA, on the test split.

    python test_trained_model.py             # the student in checkpoints/, on the data it knows
    python test_trained_model.py --demo      # the one that distill_tinyvae.py --demo made
    python test_trained_model.py --judge PATH      # perceptual distance too
    python test_trained_model.py --student checkpoints/tinyvae_epoch_050.pth --data PATH

Where no run has left a student in checkpoints/ it takes the released one. Prints two tables, writes
evaluation.json, and draws reconstructions, interpolations, samples and a latent traversal from test
images. Takes about a minute on 2 CPU cores for CIFAR-10's 10,000 test images, and three to
five with a judge. All errors are of pixels in [0, 1], decoded from mu unless a sample is said.

This is a script, not a pytest file; the test suite is test_distillation.py.
"""

from pathlib import Path

import torch

from data import Split, spread, to_float
from losses import PerceptualLoss, load_vgg16
from metrics import (
    encode_means,
    evaluate_code,
    evaluate_images,
    evaluate_vae,
    fit_pca,
    interpolation_unevenness,
    perceptual_distance,
    sampled_mse,
    seconds_per_batch,
)
from models import (
    BEST_STUDENT,
    count_parameters,
    find_checkpoint,
    find_images,
    find_student,
    load_model,
    weight_bytes,
)
from pictures import draw_interpolations, draw_reconstructions, draw_samples, draw_traversal
from runtime import (
    InputError,
    describe_device,
    parse_flags,
    pick_device,
    pick_precision,
    print_table,
    run,
    versions,
)
from standard_vae import StandardVAE
from storage import write_json
from tiny_vae_32 import TinyVAE32
from vae import PIXEL_VALUES

HERE = Path(__file__).resolve().parent

# --- What to evaluate ---
STUDENT = BEST_STUDENT  # a file in the checkpoint folder, or a path; else the released one
TEACHER = "teacher_vae.pth"  # likewise; left out, and said so, where it is missing
DATA = "checkpoint"  # what the student was trained on, or cifar10, dead-leaves, or a folder
LIMIT = 0  # fit PCA to the first N training images; 0: as many as the student saw, or all of DATA

# --- Measuring ---
JUDGE = "none"  # VGG16 for perceptual distance: a state dict no student was trained with; or none
JUDGED = 0  # images that the judge sees; 0: all
PCA_COMPONENTS = 64  # numbers in a code, as many as the student's latents
BATCH_SIZE = 256  # images at once when images per second are measured
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "fp32"  # fp32 for figures that compare across machines; or auto, bf16, fp16

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR = HERE / "outputs"  # folder of evaluation.json and the pictures
DEMO = False  # evaluate the demo's student, in the demo's folders

# Test images whose pairs are interpolated for the unevenness.
INTERPOLATED = 400

DEMO_SETTINGS = {
    "checkpoint_dir": CHECKPOINT_DIR / "demo",
    "output_dir": OUTPUT_DIR / "demo",
}


def measure_vae(vae, images, precision, batch_size):
    """Every column of the table for a VAE, as numbers."""
    single, batch = to_float(images[:1]), to_float(images[:batch_size])
    found = {"parameters": count_parameters(vae), "weight_bytes": weight_bytes(vae)}
    found |= evaluate_vae(vae, images, precision, with_ssim=True)
    found["ms_per_image"] = 1000 * seconds_per_batch(vae, single, precision)
    found["images_per_second"] = len(batch) / seconds_per_batch(vae, batch, precision)
    return found


def measure_pca(pca, images):
    """The same for PCA; it has no rate and is not timed."""
    numbers = pca.mean.numel() + pca.components.numel()
    found = {"parameters": numbers, "weight_bytes": numbers * 4}
    return found | evaluate_images(pca.reconstruct, images, with_ssim=True)


def table_row(name, found, teacher_bytes):
    def column(key, text):
        return text.format(found[key]) if key in found else "–"

    smaller = f"{teacher_bytes / found['weight_bytes']:.1f}×" if teacher_bytes else "–"
    return {
        "test split": name,
        "parameters": column("parameters", "{:,}"),
        "weights, bytes": column("weight_bytes", "{:,}"),
        "smaller": smaller,
        "MSE": column("mse", "{:.5f}"),
        "mean PSNR, dB": column("psnr", "{:.2f}"),
        "SSIM": column("ssim", "{:.4f}"),
        "KL, nats": column("kl_nats", "{:.1f}"),
        "active": column("active_dims", "{}"),
        "ms/image": column("ms_per_image", "{:.2f}"),
        "images/s": column("images_per_second", "{:,.0f}"),
    }


def measure_code(vae, teacher_mu, test, train, judge, judged):
    """Every column of the second table for a VAE, as numbers."""
    found = evaluate_code(vae, test, train, teacher_mu)
    found["sampled_mse"] = sampled_mse(vae, test.images)
    if judge:
        images = spread(test.images, judged)
        found["perceptual"] = perceptual_distance(vae, images, judge)
        found["unevenness"] = interpolation_unevenness(vae, spread(images, INTERPOLATED), judge)
    return found


def code_row(name, found):
    def column(key, text, scale=1):
        return text.format(scale * found[key]) if key in found else "–"

    return {
        "test split": name,
        "MSE of a sample": column("sampled_mse", "{:.5f}"),
        "perceptual distance": column("perceptual", "{:.4f}"),
        "interpolation unevenness": column("unevenness", "{:.3f}"),
        "CKA with teacher": column("cka", "{:.3f}"),
        "5-NN, %": column("knn_accuracy", "{:.1f}", 100),
        "linear probe, %": column("probe_accuracy", "{:.1f}", 100),
    }


def evaluate(settings):
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    student_path = find_student(settings.student, settings.checkpoint_dir)
    teacher_path = find_checkpoint(settings.teacher, settings.checkpoint_dir)
    student, checkpoint = load_model(student_path, TinyVAE32)
    record = checkpoint.get("record", {})
    judge, judge_record = load_vgg16(settings.judge)
    if judge and judge_record["vgg_sha256"] == record.get("vgg_sha256"):
        raise InputError(
            f"the student was trained with the weights in {settings.judge}, so they cannot judge "
            "it: name others with --judge, or none"
        )
    models = {"student": student}
    if teacher_path.exists() or settings.teacher != TEACHER:
        models = {"teacher": load_model(teacher_path, StandardVAE)[0]} | models
        print(f"teacher  {teacher_path}")
    else:
        print(f"teacher  left out: there is no {teacher_path}")

    images, test = find_images(settings.data, settings.limit, student_path, record)
    data = images.record["data"]
    train, test = Split(images.train, images.labels).to(device), test.to(device)
    if images.record["pixels_sha256"] != record.get("pixels_sha256"):
        print("images   not those the student was trained on, or not as many")
    print(
        f"images   {data}: {len(test.images):,} of the test split; "
        f"{len(train.images):,} to fit PCA and classifiers to\n"
        f"judge    {judge_record['vgg_weights']}\n"
        f"device   {describe_device(device)}, {precision}\n"
    )

    judge = judge and PerceptualLoss(judge).to(device, memory_format=torch.channels_last)
    found = {}
    for name, model in models.items():
        model.to(device, memory_format=torch.channels_last)
        found[name] = measure_vae(model, test.images, precision, settings.batch_size)
    teacher_mu = encode_means(models["teacher"], test.images) if "teacher" in models else None
    for name, model in models.items():
        found[name] |= measure_code(model, teacher_mu, test, train, judge, settings.judged)
    pca = fit_pca(train.images, settings.pca_components)
    found[f"PCA, {settings.pca_components} components"] = measure_pca(pca, test.images)

    teacher_bytes = found.get("teacher", {}).get("weight_bytes")
    print_table([table_row(name, numbers, teacher_bytes) for name, numbers in found.items()])
    print()
    print_table([code_row(name, found[name]) for name in models])
    print(
        "\nsmaller: the teacher's weights over these weights, both fp32 and nothing else. PSNR: "
        "mean over images.\nSSIM: 11×11 Gaussian window, sigma 1.5, windows wholly inside the "
        "image. active: latents whose mu has a\nvariance above 0.01. ms/image: encode and decode "
        f"one image; images/s: {settings.batch_size} at once; medians of 30.\nPCA: fitted to the "
        f"training images, codes of {settings.pca_components} numbers for "
        f"{PIXEL_VALUES:,} pixel values.\n"
        "perceptual distance: between VGG16 features, unit length, through relu3_3 (--judge). "
        "interpolation unevenness:\nhow much the perceptual distance varies from step to step of "
        "a straight line between two codes, std / mean.\nCKA: likeness of mu to the teacher's, "
        "0 to 1. 5-NN, linear probe: class accuracy from mu."
    )

    title = f"{data}, test split"
    written = [settings.output_dir / name for name in (
        "evaluation.json", "reconstruction_test.png", "interpolation_test.png", "samples.png",
        "traversal.png",
    )]
    write_json(
        written[0],
        {
            "student": str(student_path),
            "teacher": str(teacher_path) if "teacher" in models else None,
            "data": data,
            "test_images": len(test.images),
            "train_images": len(train.images),
            "judge": judge_record,
            "device": device.type,
            "device_name": describe_device(device),
            "precision": precision,
            "batch_size": settings.batch_size,
            "versions": versions(),
            "results": found,
        },
    )
    draw_reconstructions(written[1], test.images, models, title)
    draw_interpolations(written[2], test.images, models, title)
    draw_samples(written[3], models, "decoded from z ~ N(0, I)")
    draw_traversal(written[4], test.images, student, f"{title}: the student's busiest latents")
    print("\nWritten:")
    for path in written:
        print(f"  {path}")


def main(argv=None):
    evaluate(parse_flags(globals(), argv, DEMO_SETTINGS))


if __name__ == "__main__":
    run(main)
