"""Is this student good? Evaluate it beside a teacher, if there is one, and PCA, on the test split.

    python test_trained_model.py             # the student in checkpoints/, on its training's data
    python test_trained_model.py --demo      # the one that distill_tinyvae.py --demo made
    python test_trained_model.py --judge PATH      # VGG distance too
    python test_trained_model.py --student checkpoints/tinyvae_epoch_050.pth --data PATH

Where no run has left a student in checkpoints/ it takes the included one. Prints tables and the
answer, writes evaluation.json, and draws reconstructions, interpolations, the most colourful test
images, samples and a latent traversal. Takes 1 to 4 minutes on 2 CPU cores for CIFAR-10's 10,000
test images, and three to five with a judge. All errors are of pixels in [0, 1], decoded from mu
unless a sample is named.

This is a script, not a pytest file: `pytest` runs the suite beside it and leaves it out.
"""

from pathlib import Path

import torch

from common import kind
from common.data import PIXEL_VALUES, Split, evenly_spaced, to_float
from common.metrics import (
    SwappedVAE,
    encode_means,
    evaluate_code,
    evaluate_images,
    evaluate_vae,
    explained_variance,
    fit_pca,
    interpolation_unevenness,
    sampled_mse,
    seconds_per_batch,
    vgg_distance,
)
from common.models import (
    TRAINED_TEACHER,
    count_parameters,
    find_checkpoint,
    find_images,
    find_student,
    load_any_teacher,
    load_model,
    weight_bytes,
)
from common.pictures import (
    draw_colours,
    draw_interpolations,
    draw_reconstructions,
    draw_samples,
    draw_traversal,
)
from common.report import EVALUATION_FILES, SWAP_FILES
from common.runtime import (
    cell,
    describe_device,
    pick_device,
    pick_precision,
    print_table,
    run_script,
    versions,
)
from common.settings import parse_settings
from common.storage import check_writable, save_checkpoint, write_json
from common.vgg import VGGFeatures, load_vgg16, refuse_judge
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- What to evaluate ---
# a file in the checkpoint folder, or a path; None: the best one there, or released
STUDENT: kind.FileOrNone = None
TEACHER: kind.FileOrNone = None  # likewise; None: that of its training, if it is there
DATA: kind.text(none=None) = None  # as in distill_tinyvae.py; None: the student's own
# fit PCA to the first N training images; 0: as many as the student saw, or all of DATA
LIMIT: kind.CountOr0 = 0
SKIP_UNREADABLE: kind.Switch = False  # go on without images of a folder that cannot be read

# --- Measuring ---
JUDGE: kind.Weights = None  # VGG16 for VGG distance: one no student was trained with
JUDGED: kind.CountOr0 = 0  # images that the judge sees; 0: all
PCA_COMPONENTS: kind.whole(1, PIXEL_VALUES) = 64  # numbers in a code
BATCH_SIZE: kind.Count = 256  # images at once when images per second are measured
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps
PRECISION: kind.Precision = "fp32"  # fp32 compares across machines; auto, bf16, fp16

# --- Files ---
CHECKPOINT_DIR: kind.Folder = HERE / "checkpoints"  # folder of the .pth files
OUTPUT_DIR: kind.Folder = HERE / "outputs"  # folder of evaluation.json and the pictures
DEMO: kind.Switch = False  # evaluate the demo's student, in the folders demo/

# --- Not settings ---

SWAP_IMAGES = 10_000  # training images that the maps between two codes are fitted to
INTERPOLATED = 400  # test images whose pairs are interpolated for the unevenness


# --- Figures ---


def measure_vae(vae, images, precision, batch_size):
    """The figures of the first table, and of the second the grid and what is kept of colours."""
    single, batch = to_float(images[:1]), to_float(images[:batch_size])
    return {
        "parameters": count_parameters(vae),
        "weight_bytes": weight_bytes(vae),
        **evaluate_vae(vae, images, precision, in_full=True),
        "ms_per_image": 1000 * seconds_per_batch(vae, single, precision),
        "images_per_second": len(batch) / seconds_per_batch(vae, batch, precision),
    }


def measure_code(vae, teacher_mu, test, train, judge, judged):
    """The other figures of the second table, in fp32."""
    figures = evaluate_code(vae, test, train, teacher_mu)
    figures["sampled_mse"] = sampled_mse(vae, test.images)
    if judge:
        images = evenly_spaced(test.images, judged)
        figures["vgg_distance"] = vgg_distance(vae, images, judge)
        some = evenly_spaced(images, INTERPOLATED)
        figures["unevenness"] = interpolation_unevenness(vae, some, judge)
    return figures


def measure_pca(pca, images):
    """The same for PCA, which has no KL and is not timed."""
    numbers = pca.mean.numel() + pca.components.numel()
    return {
        "parameters": numbers,
        "weight_bytes": numbers * 4,
        **evaluate_images(pca.reconstruct, images, in_full=True),
    }


def model_row(name, figures, teacher_bytes):
    smaller = f"{teacher_bytes / figures['weight_bytes']:.1f}×" if teacher_bytes else "–"
    return {
        "test split": name,
        "parameters": cell(figures, "parameters", ","),
        "weights, bytes": cell(figures, "weight_bytes", ","),
        "smaller": smaller,
        "MSE": cell(figures, "mse", ".5f"),
        "mean PSNR, dB": cell(figures, "psnr", ".2f"),
        "SSIM": cell(figures, "ssim", ".4f"),
        "KL, nats": cell(figures, "kl_nats", ".1f"),
        "active": cell(figures, "active_dims", "d"),
        "ms/image": cell(figures, "ms_per_image", ".2f"),
        "images/s": cell(figures, "images_per_second", ",.0f"),
    }


def code_row(name, figures):
    grids = [cell(figures, f"grid_{period}", ".4f") for period in (2, 4, 8)]
    return {
        "test split": name,
        "MSE of a sample": cell(figures, "sampled_mse", ".5f"),
        "VGG distance": cell(figures, "vgg_distance", ".4f"),
        "fixed grid": " / ".join(grids),
        "interpolation unevenness": cell(figures, "unevenness", ".3f"),
        "CKA with teacher": cell(figures, "cka", ".3f"),
        "5-NN, %": cell(figures, "knn_accuracy", ".1f", 100),
        "linear probe, %": cell(figures, "probe_accuracy", ".1f", 100),
        "brightness, %": cell(figures, "luma_kept", ".0f", 100),
        "colour, %": cell(figures, "chroma_kept", ".0f", 100),
        "mean colour, %": cell(figures, "mean_chroma_kept", ".0f", 100),
    }


def swap_decoders(teacher, student, train):
    """The two with each other's decoder, and maps fitted to some of the training images."""
    some = evenly_spaced(train.images, SWAP_IMAGES)
    teacher_mu, student_mu = encode_means(teacher, some), encode_means(student, some)
    return {
        "teacher_to_student": SwappedVAE(teacher, student, teacher_mu, student_mu),
        "student_to_teacher": SwappedVAE(student, teacher, student_mu, teacher_mu),
    }


def measure_swap(swapped, teacher_mu, images):
    """The errors of both, and how much of the teacher's code the student's explains."""
    figures = {
        name: evaluate_images(reconstruction_of(vae), images)["mse"]
        for name, vae in swapped.items()
    }
    predicted = encode_means(swapped["student_to_teacher"], images)
    return figures | {"r2": explained_variance(teacher_mu, predicted)}


def reconstruction_of(vae):
    return lambda images: vae.decode(vae.encode(images)[0])


def swap_rows(figures, swap):
    """Error by encoder and decoder."""
    own = {f"{name}_to_{name}": figures[name]["mse"] for name in ("student", "teacher")}
    errors = {name: f"{mse:.5f}" for name, mse in (own | swap).items()}
    return [
        {
            "MSE, encoder": f"{encoder}'s",
            "decoded by the student": errors[f"{encoder}_to_student"],
            "decoded by the teacher": errors[f"{encoder}_to_teacher"],
        }
        for encoder in ("student", "teacher")
    ]


# --- All together ---


def load_models(settings):
    """name → model, the teacher first if there is one; both paths, and the student's checkpoint."""
    student_path = find_student(settings.student, settings.checkpoint_dir)
    student, checkpoint = load_model(student_path, TinyVAE32)
    record, models = checkpoint.get("record", {}), {"student": student}
    teacher_file = settings.teacher or record.get("teacher")
    if teacher_file in (None, "train"):
        teacher_file = TRAINED_TEACHER
    teacher_path = find_checkpoint(Path(teacher_file), settings.checkpoint_dir)
    if not settings.teacher and not record.get("with_teacher", True):
        print("teacher  none: the student was trained without one")
        teacher_path = None
    elif not settings.teacher and not teacher_path.exists():
        print(f"teacher  left out: there is no {teacher_path}")
        teacher_path = None
    else:
        models = {"teacher": load_any_teacher(teacher_path)[0]} | models
        print(f"teacher  {teacher_path}")
    return models, student_path, teacher_path, checkpoint


def load_images(settings, student_path, checkpoint):
    """What PCA and classifiers are fitted to, the test split, and the name of the source."""
    record = checkpoint.get("record", {})
    images, test = find_images(
        settings.data, settings.limit, student_path, record, settings.skip_unreadable
    )
    if images.record["pixels_sha256"] != record.get("pixels_sha256"):
        others = "which a teacher made" if record.get("data") == "none" else "or not as many"
        print(f"images   not those the student was trained on, {others}")
        if "evaluation" in checkpoint:
            print(
                f"         On its own it has {checkpoint['evaluation']}.\n"
                "         Errors on other images do not compare with that: how large they are "
                "depends on how much\n         detail the images hold, and on how far they are "
                "from what the student has learned."
            )
    return Split(images.train, images.labels), test, images.record["data"]


def print_answer(figures, pca_name, test_images, data):
    """What the figures say of the student, in a few sentences."""
    student, pca = figures["student"], figures[pca_name]
    change = student["mse"] / pca["mse"] - 1
    print(
        f"\nOn {test_images:,} test images of {data}, the student reconstructs with an MSE of "
        f"{student['mse']:.5f} at {student['kl_nats']:.1f} nats.\n"
        f"  {'better' if change < 0 else 'worse'} than {pca_name.replace(',', ' with')} "
        f"({pca['mse']:.5f}): {change:+.1%}"
    )
    if "teacher" in figures:
        teacher = figures["teacher"]
        print(
            f"  {student['mse'] / teacher['mse']:.1f} times the teacher's error "
            f"({teacher['mse']:.5f} at {teacher['kl_nats']:.1f} nats), with "
            f"{teacher['weight_bytes'] / student['weight_bytes']:.1f} times smaller weights"
        )
    else:
        print("  compared with no teacher: --teacher PATH names one")


def main(argv=()):
    settings = parse_settings(globals(), argv)
    if settings.demo:
        settings = settings.replace(
            checkpoint_dir=settings.checkpoint_dir / "demo",
            output_dir=settings.output_dir / "demo",
            data=settings.data or "photo-crops",  # there already
        )
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    models, student_path, teacher_path, checkpoint = load_models(settings)
    judge, judge_record = load_vgg16(settings.judge)
    refuse_judge(judge_record, checkpoint.get("record", {}))
    check_writable(settings.output_dir)
    train, test, data = load_images(settings, student_path, checkpoint)
    train, test = train.to(device), test.to(device)
    print(
        f"images   {data}: {len(test.images):,} of the test split; "
        f"{len(train.images):,} to fit PCA {'' if train.labels is None else 'and classifiers '}to\n"
        f"judge    {judge_record['vgg_weights']}\n"
        f"device   {describe_device(device)}, {precision}\n"
    )

    judge = judge and VGGFeatures(judge).to(device)
    figures = {}
    for name, model in models.items():
        model.to(device, memory_format=torch.channels_last)
        model.check_range = False  # images are made from uint8
        figures[name] = measure_vae(model, test.images, precision, settings.batch_size)
    teacher_mu = encode_means(models["teacher"], test.images) if "teacher" in models else None
    for name, model in models.items():
        figures[name] |= measure_code(model, teacher_mu, test, train, judge, settings.judged)
    pca = fit_pca(train.images, settings.pca_components)
    pca_name = f"PCA, {settings.pca_components} components"
    figures[pca_name] = measure_pca(pca, test.images)

    teacher_bytes = figures.get("teacher", {}).get("weight_bytes")
    print_table([model_row(name, row, teacher_bytes) for name, row in figures.items()])
    print()
    print_table([code_row(name, row) for name, row in figures.items()])
    swapped, swap = {}, {}
    if "teacher" in models:
        swapped = swap_decoders(models["teacher"], models["student"], train)
        swap = measure_swap(swapped, teacher_mu, test.images)
        print()
        print_table(swap_rows(figures, swap))
    print("\nThe columns are explained in docs/results.md, \"What the columns mean\".")
    evaluation = {
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
        "results": figures,
        "swap": swap,
    }
    table, reconstructions, interpolations, samples, traversal, colours = files = [
        settings.output_dir / name for name in EVALUATION_FILES
    ]
    title = f"{data}, test split, {student_path.name}"
    write_json(table, evaluation)
    draw_reconstructions(reconstructions, test.images, models, title)
    draw_interpolations(interpolations, test.images, models, title)
    draw_samples(samples, models, "decoded from z ~ N(0, I)")
    what = f"{title}: one image, and one latent of the student changed at a time"
    draw_traversal(traversal, test.images, models["student"], what)
    functions = {name: reconstruction_of(model) for name, model in models.items()}
    functions[f"PCA, {settings.pca_components}"] = pca.reconstruct
    draw_colours(colours, test.images, functions, f"{title}: the most colourful images")
    maps, picture = swap_files = [settings.output_dir / name for name in SWAP_FILES]
    if swapped:
        named = {name.replace("_to_", "'s code,\n") + "'s decoder": vae
                 for name, vae in swapped.items()}
        draw_reconstructions(picture, test.images, models | named, title)
        linear = {name: vae.code_map.cpu().state_dict() for name, vae in swapped.items()}
        save_checkpoint(maps, linear)
        files += swap_files
    else:
        for file in swap_files:  # of another student
            file.unlink(missing_ok=True)
    print_answer(figures, pca_name, len(test.images), data)
    print("\nWritten:", *files, sep="\n  ")


if __name__ == "__main__":
    run_script(main)
