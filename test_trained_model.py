"""Is this student good? Evaluate it beside a teacher, if there is one, and PCA, on the test split.

    python test_trained_model.py             # the student in checkpoints/, on its training's data
    python test_trained_model.py --demo      # the one that distill_tinyvae.py --demo made
    python test_trained_model.py --judge PATH      # VGG distance too
    python test_trained_model.py --student checkpoints/tinyvae_epoch_050.pth --data PATH

Where no run has left a student in checkpoints/ it takes the released one. Prints two tables and the
answer, writes evaluation.json, and draws reconstructions, interpolations, the most colourful test
images, samples and a latent traversal. Takes about a minute on 2 CPU cores for CIFAR-10's 10,000
test images, and three to five with a judge. All errors are of pixels in [0, 1], decoded from mu
unless a sample is named.

This is a script, not a pytest file: `pytest` runs the suite beside it and leaves it out.
"""

from pathlib import Path

import torch

from data import Split, spread, to_float
from losses import kl_divergence
from metrics import (
    encode_means,
    evaluate_code,
    evaluate_images,
    evaluate_vae,
    fit_pca,
    interpolation_unevenness,
    luma_chroma,
    sampled_mse,
    seconds_per_batch,
    vgg_distance,
)
from models import (
    count_parameters,
    find_checkpoint,
    find_images,
    find_student,
    load_model,
    weight_bytes,
)
from pictures import (
    COLUMNS,
    STEPS,
    draw_interpolations,
    draw_reconstructions,
    image_grid,
    label_row,
    save_figure,
    show,
)
from runtime import (
    InputError,
    describe_device,
    pick_device,
    pick_precision,
    print_table,
    run_script,
    versions,
)
from settings import file_path, one_of, parse_settings, switch, text, whole
from storage import check_writable, write_json
from tiny_vae_32 import TinyVAE32
from vae import PIXEL_VALUES, VAE
from vgg import VGGFeatures, load_vgg16

HERE = Path(__file__).resolve().parent

# --- What to evaluate ---
STUDENT = None  # a file in the checkpoint folder, or a path; None: the best one there, or released
TEACHER = None  # likewise; None: that of its training, if it had one and that is there
DATA = None  # as in distill_tinyvae.py; None: what the student was trained on
LIMIT = 0  # fit PCA to the first N training images; 0: as many as the student saw, or all of DATA

# --- Measuring ---
JUDGE = None  # VGG16 for VGG distance: a state dict no student was trained with; or None
JUDGED = 0  # images that the judge sees; 0: all
PCA_COMPONENTS = 64  # numbers in a code, as many as the student's latents
BATCH_SIZE = 256  # images at once when images per second are measured
DEVICE = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION = "fp32"  # fp32 for figures that compare across machines; or auto, bf16, fp16

# --- Files ---
CHECKPOINT_DIR = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR = HERE / "outputs"  # folder of evaluation.json and the pictures
DEMO = False  # evaluate the demo's student, in the folders demo/

KINDS = {
    "STUDENT": file_path(none=None), "TEACHER": file_path(none=None), "DATA": text(none=None),
    "LIMIT": whole(0, none=0), "JUDGE": text(none="none"), "JUDGED": whole(0, none=0),
    "PCA_COMPONENTS": whole(1, PIXEL_VALUES), "BATCH_SIZE": whole(1),
    "DEVICE": one_of("auto", "cuda", "cpu", "mps"),
    "PRECISION": one_of("auto", "fp32", "bf16", "fp16"), "CHECKPOINT_DIR": file_path(),
    "OUTPUT_DIR": file_path(), "DEMO": switch(),
}

TEACHER_FILE = "teacher_vae.pth"
INTERPOLATED = 400  # test images whose pairs are interpolated for the unevenness
SAMPLE_ROWS = 2  # rows of prior samples for each model
TRAVERSED = 8  # latents in the traversal picture
REACH = 3.0  # standard deviations of the prior to which a traversal goes, either way


# --- Figures ---


def decoded_mean(vae):
    """images → what the VAE decodes from their mu."""
    return lambda images: vae.decode(vae.encode(images)[0])


def measure_vae(vae, images, precision, batch_size):
    """Every column of the first table for a VAE, as numbers, and what is kept of the colours."""
    single, batch = to_float(images[:1]), to_float(images[:batch_size])
    found = {"parameters": count_parameters(vae), "weight_bytes": weight_bytes(vae)}
    found |= evaluate_vae(vae, images, precision, with_ssim=True, with_detail=True)
    found["ms_per_image"] = 1000 * seconds_per_batch(vae, single, precision)
    found["images_per_second"] = len(batch) / seconds_per_batch(vae, batch, precision)
    return found


def measure_pca(pca, images):
    """The same for PCA, which has no rate and is not timed."""
    numbers = pca.mean.numel() + pca.components.numel()
    found = {"parameters": numbers, "weight_bytes": numbers * 4}
    return found | evaluate_images(pca.reconstruct, images, with_ssim=True, with_detail=True)


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
    """The other columns of the second table for a VAE, as numbers, in fp32."""
    found = evaluate_code(vae, test, train, teacher_mu)
    found["sampled_mse"] = sampled_mse(vae, test.images)
    if judge:
        images = spread(test.images, judged)
        found["vgg_distance"] = vgg_distance(vae, images, judge)
        found["unevenness"] = interpolation_unevenness(vae, spread(images, INTERPOLATED), judge)
    return found


def code_row(name, found):
    def column(key, text, scale=1):
        return text.format(scale * found[key]) if key in found else "–"

    return {
        "test split": name,
        "MSE of a sample": column("sampled_mse", "{:.5f}"),
        "VGG distance": column("vgg_distance", "{:.4f}"),
        "fixed grid": " / ".join(column(f"grid_{i}", "{:.4f}") for i in (2, 4, 8)),
        "interpolation unevenness": column("unevenness", "{:.3f}"),
        "CKA with teacher": column("cka", "{:.3f}"),
        "5-NN, %": column("knn_accuracy", "{:.1f}", 100),
        "linear probe, %": column("probe_accuracy", "{:.1f}", 100),
        "brightness, %": column("luma_kept", "{:.0f}", 100),
        "colour, %": column("chroma_kept", "{:.0f}", 100),
        "mean colour, %": column("mean_chroma_kept", "{:.0f}", 100),
    }


# --- Pictures ---


@torch.no_grad()
def draw_samples(path, models, title):
    """Images decoded from the prior, z ~ N(0, I); the same z each time.

    Args are those of `draw_reconstructions`.
    """
    figure, axes = image_grid(SAMPLE_ROWS * len(models), COLUMNS, title)
    row = 0
    for name, model in models.items():
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(SAMPLE_ROWS * COLUMNS, model.latent_dim, generator=generator)
        images = model.decode(z.to(next(model.parameters()).device))
        for some in images.split(COLUMNS):
            label_row(axes[row][0], name)
            for ax, image in zip(axes[row], some):
                show(ax, image)
            row += 1
    save_figure(figure, path)


@torch.no_grad()
def draw_traversal(path, images, model, title):
    """What single latents do: a row for each of the latents that carry most nats, the others held.

    Args:
        path: the PNG to write.
        images: uint8 images; the rates are averaged over these, and the middle one is changed.
        model: a VAE in evaluation mode, on the images' device.
        title: what the picture shows.
    """
    mu, logvar = model.encode(to_float(images[:1000]))
    rates = kl_divergence(mu, logvar).mean(0)
    start, _ = model.encode(to_float(images[len(images) // 2][None]))
    chosen = rates.topk(min(TRAVERSED, model.latent_dim)).indices
    values = torch.linspace(-REACH, REACH, STEPS, device=start.device)
    figure, axes = image_grid(len(chosen), STEPS, title)
    for row, latent in enumerate(chosen):
        z = start.repeat(STEPS, 1)
        z[:, latent] = values
        label_row(axes[row][0], f"z{latent.item()}\n{rates[latent]:.1f} nats")
        for column, image in enumerate(model.decode(z)):
            show(axes[row][column], image)
            if row == 0:
                axes[row][column].set_title(f"{values[column]:+.1f}", fontsize=8)
    save_figure(figure, path)


@torch.no_grad()
def draw_colours(path, images, reconstructions, title):
    """The images whose colours vary most within them, and what is kept of that, a row each.

    Args:
        path: the PNG to write.
        images: uint8 images to choose from.
        reconstructions: name → function of images in [0, 1].
        title: what the picture shows.
    """
    variety = [luma_chroma(to_float(some))[1].var((2, 3)).sum(1) for some in images.split(1000)]
    chosen = images[torch.cat(variety).topk(min(COLUMNS, len(images))).indices]
    rows = {"original": to_float(chosen)}
    for name, reconstruct in reconstructions.items():
        batch = reconstruct(to_float(chosen))
        found = evaluate_images(lambda _, batch=batch: batch, chosen, with_detail=True)
        if "chroma_kept" in found:
            name += f"\n{found['chroma_kept']:.0%} of colour"
        rows[name] = batch
    figure, axes = image_grid(len(rows), len(chosen), title)
    for row, (name, batch) in enumerate(rows.items()):
        label_row(axes[row][0], name)
        for ax, image in zip(axes[row], batch):
            show(ax, image)
    save_figure(figure, path)


# --- All together ---


def load_models(settings):
    """name → model, the teacher first if there is one; the student's path and its checkpoint."""
    student_path = find_student(settings.student, settings.checkpoint_dir)
    student, checkpoint = load_model(student_path, TinyVAE32)
    record, models = checkpoint.get("record", {}), {"student": student}
    named = settings.teacher or record.get("teacher") or TEACHER_FILE
    named = TEACHER_FILE if named == "train" else named
    teacher_path = find_checkpoint(Path(named), settings.checkpoint_dir)
    if not settings.teacher and not record.get("with_teacher", True):
        print("teacher  none: the student was trained without one")
        teacher_path = None
    elif teacher_path.exists() or settings.teacher:
        models = {"teacher": load_model(teacher_path, VAE)[0]} | models
        print(f"teacher  {teacher_path}")
    else:
        print(f"teacher  left out: there is no {teacher_path}")
        teacher_path = None
    return models, student_path, teacher_path, checkpoint


def print_answer(found, pca_components, test, data):
    """What the figures say of the student, in a few sentences."""
    student = found["student"]
    pca = found[f"PCA, {pca_components} components"]
    print(
        f"\nOn {test:,} test images of {data}, the student reconstructs with an MSE of "
        f"{student['mse']:.5f} at {student['kl_nats']:.1f} nats."
    )
    change = student["mse"] / pca["mse"] - 1
    verdict = "better" if change < 0 else "worse"
    components = f"PCA with {pca_components} components"
    print(f"  {verdict} than {components} ({pca['mse']:.5f}): {change:+.1%}")
    if "teacher" in found:
        teacher = found["teacher"]
        print(
            f"  {student['mse'] / teacher['mse']:.1f} times the teacher's error "
            f"({teacher['mse']:.5f} at {teacher['kl_nats']:.1f} nats), with "
            f"{teacher['weight_bytes'] / student['weight_bytes']:.1f} times smaller weights"
        )
    else:
        print("  compared with no teacher: --teacher PATH names one")


def evaluate(settings):
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    models, student_path, teacher_path, checkpoint = load_models(settings)
    student, record = models["student"], checkpoint.get("record", {})
    judge, judge_record = load_vgg16(settings.judge)
    if judge and judge_record["vgg_sha256"] == record.get("vgg_sha256"):
        raise InputError(
            f"the student was trained with the weights in {settings.judge}, so they cannot judge "
            "it: name others with --judge, or none"
        )
    check_writable(settings.output_dir)
    images, test = find_images(settings.data, settings.limit, student_path, record)
    data = images.record["data"]
    train, test = Split(images.train, images.labels).to(device), test.to(device)
    if images.record["pixels_sha256"] != record.get("pixels_sha256"):
        print("images   not those the student was trained on, or not as many")
        if "evaluation" in checkpoint:
            print(
                f"         On its own it has {checkpoint['evaluation']}.\n"
                "         Errors on other images do not compare with that: how large they are "
                "depends on how much\n         detail the images hold, and on how far they are "
                "from what the student has learned."
            )
    print(
        f"images   {data}: {len(test.images):,} of the test split; "
        f"{len(train.images):,} to fit PCA and classifiers to\n"
        f"judge    {judge_record['vgg_weights']}\n"
        f"device   {describe_device(device)}, {precision}\n"
    )

    judge = judge and VGGFeatures(judge).to(device)
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
    print_table([code_row(name, numbers) for name, numbers in found.items()])
    print(
        "\nsmaller: the teacher's weights over these weights, both saved in fp32. PSNR: mean over "
        "images.\nSSIM: 11×11 Gaussian window, sigma 1.5, windows wholly inside the "
        "image. active: latents whose mu has a\nvariance above 0.01. ms/image: encode and decode "
        f"one image; images/s: {settings.batch_size} at once; medians of 30.\nPCA: fitted to the "
        f"training images, codes of {settings.pca_components} numbers for "
        f"{PIXEL_VALUES:,} pixel values.\n"
        "VGG distance: between VGG16 features of unit length, through relu3_3 (--judge). fixed "
        "grid: the largest size of a\ngrid of period 2, 4 and 8 pixels that all reconstructions "
        "share; VGG16 takes one for texture, so it makes the\nVGG distance smaller. "
        "interpolation unevenness: how much the VGG distance varies from step to step of a "
        "straight\nline between two codes, std / mean. CKA: similarity of mu to the teacher's, "
        "0 to 1. 5-NN, linear probe: class accuracy from mu.\n"
        "brightness, colour: how much of what varies within an image is kept, as the slope of the "
        "reconstruction on\nthe original, each less its mean over the image; mean colour: the same "
        "of these means."
    )

    title = f"{data}, test split"
    table = settings.output_dir / "evaluation.json"
    pictures = [settings.output_dir / name for name in (
        "reconstruction_test.png", "interpolation_test.png", "samples.png", "traversal.png",
        "colours.png",
    )]
    write_json(
        table,
        {
            "student": str(student_path),
            "teacher": str(teacher_path) if teacher_path else None,
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
    draw_reconstructions(pictures[0], test.images, models, title)
    draw_interpolations(pictures[1], test.images, models, title)
    draw_samples(pictures[2], models, "decoded from z ~ N(0, I)")
    draw_traversal(
        pictures[3], test.images, student, f"{title}: the student's latents that carry most nats"
    )
    reconstructions = {name: decoded_mean(model) for name, model in models.items()}
    reconstructions[f"PCA, {settings.pca_components}"] = pca.reconstruct
    draw_colours(pictures[4], test.images, reconstructions, f"{title}: the most colourful images")
    print_answer(found, settings.pca_components, len(test.images), data)
    print("\nWritten:")
    for path in (table, *pictures):
        print(f"  {path}")


def main(argv=None):
    settings = parse_settings(globals(), argv)
    if settings.demo:
        settings.checkpoint_dir /= "demo"
        settings.output_dir /= "demo"
    evaluate(settings)


if __name__ == "__main__":
    run_script(main)
