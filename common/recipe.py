"""What makes two runs the same: compared where one is resumed, or its teacher used again."""

from common.runtime import InputError

NOT_RECORDED = {"resume", "overwrite", "checkpoint_dir", "output_dir"}
TEACHER_SETTINGS = ("teacher_epochs", "teacher_kl_weight", "teacher_learning_rate")
TEACHER_SHAPE = ("teacher_latent_dim", "teacher_channels")
STUDENT_SHAPE = ("latent_dim", "encoder_channels", "decoder_channels")
# What makes a teacher the same teacher.
TEACHER_RECIPE = (
    *TEACHER_SETTINGS, "pixels_sha256", "teacher_architecture", "batch_size", "warmup",
    "calibration", "seed",
)
# Settings that may change on --resume. Data, weights and shapes are compared by their fingerprints
# instead of their names.
NOT_COMPARED = {
    *NOT_RECORDED, *TEACHER_SHAPE, *STUDENT_SHAPE, "data", "limit", "teacher_images", "teacher",
    "vgg", "start", "skip_unreadable", "device", "precision", "perceptual_precision", "compile",
    "save_every", "tensorboard", "demo",
}
COMPARED = (
    "with_teacher", "pixels_sha256", "vgg_sha256", "teacher_sha256", "teacher_architecture",
    "start_sha256", "architecture",
)
EPOCHS_FIXED = (
    "; the learning rate has fallen with the epochs and cannot rise again: --start "
    "tinyvae_best.pth, in other folders, trains a finished student on"
)
MESSAGES = {
    "with_teacher": "one has a teacher, --teacher, and the other has none",
    "pixels_sha256": "the training images differ",
    "vgg_sha256": "VGG16's weights differ",
    "teacher_sha256": "the teacher differs",
    "start_sha256": "the weights it starts from differ",
    "architecture": "the student's channels or latents differ",
    "teacher_architecture": "the teacher's channels or latents differ",
}
REMEDY = "--overwrite to start again, or another --checkpoint-dir and --output-dir"


def check_recipe(checkpoint, path, record, names):
    """Raise InputError if a checkpoint's record and this one differ in one of these names."""
    try:
        earlier = checkpoint["record"]
        changed = [
            MESSAGES.get(name, f"{name} was {earlier[name]}, is {record[name]}")
            + (EPOCHS_FIXED if name == "epochs" else "")
            for name in names
            if earlier[name] != record[name]
        ]
        if MESSAGES["with_teacher"] in changed:  # the weights of its terms follow from that
            changed = changed[:1]
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is not a checkpoint of this version of the script: use {REMEDY}"
        ) from None
    if changed:
        raise InputError(
            f"{path} comes from other settings ({'; '.join(changed)}): use those again, {REMEDY}"
        )
