"""Put a trained student to work on your pictures; the included one will do.

    python use_tinyvae.py photo.jpg pictures/          # what it makes of them, side by side
    python use_tinyvae.py photo.jpg --tiles            # the whole photograph, in 32×32 tiles
    python use_tinyvae.py pictures/ --latents codes.npz     # mu, logvar, names
    python use_tinyvae.py --decode codes.npz --output folder    # and back, a PNG for each
    python use_tinyvae.py --samples 64                 # new pictures, from the prior
    python use_tinyvae.py --interpolate a.jpg b.jpg    # from one picture to another
    python use_tinyvae.py --nearest a.jpg pictures/    # those with the nearest codes

Pictures are files or folders, of any format that Pillow opens and of any size: the shorter side is
scaled to 32 pixels and the centre cut out, or, with --tiles, all of it is used. --teacher shows
what the teacher makes of them as well. On 2 CPU cores 50,000 small pictures are encoded in 15
seconds, and a photograph of 12 megapixels goes through its tiles in 5.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import kind
from common.data import IMAGE_SIZE, evenly_spaced, to_float
from common.folders import decode_images, list_images, read_image, refuse_unreadable, some_of
from common.losses import kl_divergence
from common.metrics import EVALUATION_BATCH
from common.models import load_any_teacher, load_model
from common.pictures import PER_ROW, draw_interpolations, draw_sheet, write_picture
from common.runtime import InputError, explain_errors, pick_device, progress_bar, run_script
from common.settings import parse_settings
from common.storage import check_writable, fingerprint, write_bytes
from tiny_vae_32 import TinyVAE32

HERE = Path(__file__).resolve().parent

# --- Pictures ---
PICTURES: kind.several(kind.file_path(), none=()) = None  # files and folders, named without a flag
SKIP_UNREADABLE: kind.Switch = False  # go on without those that cannot be read

# --- What to do with them; by default reconstruct them ---
TILES: kind.Switch = False  # reconstruct each whole, in tiles of 32×32 pixels
OVERLAP: kind.whole(0, IMAGE_SIZE // 2) = 8  # pixels of neighbouring tiles, which are blended
LATENTS: kind.FileOrNone = None  # write codes into this file: .npz, or .npy for mu alone
HALF: kind.Switch = False  # latents as float16: half the size
DECODE: kind.FileOrNone = None  # pictures from a file of latents
SAMPLES: kind.whole(0, 1000, none=0) = 0  # draw so many new pictures
SEED: kind.Seed = 0  # of these
INTERPOLATE: kind.Switch = False  # from the first picture to the second
NEAREST: kind.Switch = False  # show which of the other pictures are like the first

# --- Networks ---
STUDENT: kind.file_path() = HERE / "checkpoints" / "tinyvae_cifar10.pth"  # a path
TEACHER: kind.FileOrNone = None  # a second network to show beside it
DEVICE: kind.Device = "auto"  # auto (cuda, then mps, then cpu), cuda, cpu or mps

# --- Files ---
# a .png, or, with --tiles and --decode, a folder for one PNG a picture; None: in outputs/
OUTPUT: kind.FileOrNone = None
# replace the file that OUTPUT or LATENTS names; without a name, that in outputs/ always is
OVERWRITE: kind.Switch = False

# --- Not settings ---
SHOWN = 100  # pictures in a sheet at most


# --- Pictures in, codes and pictures out ---


def find_pictures(paths):
    """Files, and the files in folders, each once: path → name, relative to the folder, with the
    folder's own name in front where there are several."""
    names, folders = {}, sum(path.is_dir() for path in paths)
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no file or folder {path}: correct its name")
        if not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is a device or a pipe, not a picture: name another")
        for file in list_images(path).paths if path.is_dir() else [path]:
            root = path if folders == 1 else path.parent
            name = str(file.relative_to(root)) if path.is_dir() else file.name
            names.setdefault(file.resolve(), name)
    return names


def leave_out_unreadable(s, names, unreadable):
    """path → name without unreadable ones, path → reason. Raises InputError for these, unless
    told to go on, and for a file that was named itself."""
    named = {str(path.resolve()) for path in s.pictures if not path.is_dir()}
    if unreadable and (not s.skip_unreadable or named & set(unreadable)):
        refuse_unreadable(unreadable)
    if unreadable:
        print(f"left out {some_of(unreadable, 'that cannot be read')}")
    return {path: name for path, name in names.items() if str(path) not in unreadable}


def load_pictures(s, pictures):
    """uint8, N×3×32×32, and their names."""
    images, unreadable = decode_images(pictures, "reading")
    names = list(leave_out_unreadable(s, pictures, unreadable).values())
    if not names:
        raise InputError("none of the pictures can be read")
    return images, names


@torch.no_grad()
def encode(vae, images, device):
    """mu and logvar of uint8 images, on the CPU."""
    chunks = progress_bar(images.split(EVALUATION_BATCH), desc="encoding", unit="batch")
    codes = [vae.encode(to_float(chunk.to(device))) for chunk in chunks]
    return (torch.cat(values).cpu() for values in zip(*codes))


@torch.no_grad()
def decode(vae, mu, device):
    """Images in [0, 1] of latents, on the CPU."""
    return torch.cat([vae.decode(z.to(device)).cpu() for z in mu.split(EVALUATION_BATCH)])


@torch.no_grad()
def reconstruct_in_tiles(vae, image, overlap, device):
    """A picture of any size, put together from 32×32 tiles that are encoded one by one.

    Args:
        image: uint8, 3×H×W.
        overlap: pixels that neighbouring tiles share; across them one fades into the other.

    Returns uint8, 3×H×W, and the nats of all tiles and how many there are.
    """
    stride, sides = IMAGE_SIZE - overlap, image.shape[1:]
    rows, columns = (1 + max(0, -((IMAGE_SIZE - side) // stride)) for side in sides)
    height, width = (stride * (count - 1) + IMAGE_SIZE for count in (rows, columns))
    y, x = (torch.arange(size).clamp_max(side - 1) for size, side in zip((height, width), sides))
    padded = image[:, y[:, None], x]  # the last row and column repeated
    ramp = (torch.arange(IMAGE_SIZE) + 1).clamp_max(overlap + 1) / (overlap + 1)
    window = torch.outer(ramp * ramp.flip(0), ramp * ramp.flip(0))
    total, weight, nats = torch.zeros(3, height, width), torch.zeros(1, height, width), 0.0

    def add_up(tiles):  # N×C×32×32, a row of overlapping tiles → C×32×W
        across = tiles.flatten(1).T[None]
        return F.fold(across, (IMAGE_SIZE, width), IMAGE_SIZE, stride=(IMAGE_SIZE, stride))[0]

    for row in progress_bar(range(rows), desc="tiles", unit="row"):
        band = slice(row * stride, row * stride + IMAGE_SIZE)
        tiles = padded[:, band].unfold(2, IMAGE_SIZE, stride).permute(2, 0, 1, 3)
        mu, logvar = vae.encode(to_float(tiles.to(device)))
        nats += kl_divergence(mu, logvar).sum().item()
        total[:, band] += add_up(vae.decode(mu).cpu() * window)
        weight[:, band] += add_up(window.expand(columns, 1, -1, -1))
    made = total.div_(weight).mul_(255).round_().byte()
    return made[:, : sides[0], : sides[1]], nats, rows * columns


def read_latents(path, vae):
    """mu, N×latents, of a file that `--latents` wrote, and names. Raises InputError for what is no
    such file, or not of this student."""
    with explain_errors(lambda _: f"{path} is not a file of latents: name another"):
        content = np.load(path, allow_pickle=False)
        is_archive = not isinstance(content, np.ndarray)
        mu = torch.from_numpy(np.asarray(content["mu"] if is_archive else content, np.float32))
        names = [f"{i:05}" for i in range(len(mu))]
        if is_archive and "names" in content:
            names = [str(name) for name in content["names"]]
        own = fingerprint(vae)
        if is_archive and content.get("student", own) != own:
            print(f"Warning: {path} holds codes of another student than --student")
    if mu.ndim != 2 or mu.shape[1] != vae.latent_dim or not len(mu) or len(names) != len(mu):
        shape = "×".join(map(str, mu.shape))
        raise InputError(
            f"{path} holds latents of {shape} and {len(names)} names, but the network takes "
            f"N×{vae.latent_dim}: name the --student that they are of"
        )
    if not mu.isfinite().all():
        raise InputError(f"{path} holds NaN or infinity among its latents: write it again")
    return mu, names


# --- Where results go ---


def output_paths(s, pictures, default, names=(), suffixes=(".png",)):
    """The files to write: OUTPUT, or `default` in outputs/.

    Args:
        s: the settings.
        pictures: those of `find_pictures`.
        default: a name.
        names: of pictures that may each go to a PNG of their own, in a folder.
        suffixes: that a file may have.

    Raises InputError where a file is there already, is one that is read, or cannot be written.
    """
    others = [path.resolve() for path in (s.decode, s.student, s.teacher) if path]
    read = {*pictures, *others}
    path = s.output or HERE / "outputs" / default
    files = [path]
    if names and path.suffix not in suffixes:
        if any(not is_inside(name) for name in names):
            raise InputError(f"some names of pictures lead out of {path}: write one sheet instead")
        files = [path / Path(name).with_suffix(".png") for name in names]
        if len(set(files)) < len(files):  # a.jpg and a.png
            files = [path / f"{name}.png" for name in names]
        if len(set(files)) < len(files):
            raise InputError("some pictures have the same name: use one folder at a time")
    elif path.suffix not in suffixes or path.is_dir():
        raise InputError(f"{path} must be a file that ends in {' or '.join(suffixes)}")
    there = [file for file in files if file.exists()]
    if there and s.output and not s.overwrite:
        raise InputError(
            f"{there[0]} is there already: --overwrite replaces it, another name keeps it"
        )
    if replaced := [file for file in there if file.resolve() in read]:
        raise InputError(f"{replaced[0]} is read and would be replaced: name another output")
    for folder in {file.parent for file in files}:
        check_writable(folder)
    return files


def is_inside(name):
    """Whether a name leads to a file inside the folder that it is put into."""
    parts = Path(name).parts
    return bool(parts) and "\0" not in name and not Path(name).is_absolute() and ".." not in parts


# --- What can be done: each returns the files that it has written ---


def reconstruct(s, pictures, networks, device):
    """Pictures beside what each network makes of them."""
    (path,) = output_paths(s, pictures, "reconstructions.png")
    images, _ = load_pictures(s, pictures)
    if len(images) > SHOWN:
        print(f"{SHOWN} of {len(images):,} pictures are drawn, evenly spaced")
        images = evenly_spaced(images, SHOWN)
    originals = to_float(images)
    rows, captions = [("original", originals)], []
    for name, vae in networks.items():
        mu, logvar = encode(vae, images, device)
        rows.append((name, decode(vae, mu, device)))
        mse = (rows[-1][1] - originals).square().mean((1, 2, 3))
        nats = kl_divergence(mu, logvar).sum(1)
        captions.append([f"{error:.4f}, {rate:.0f}" for error, rate in zip(mse, nats)])
        print(f"{name}: MSE {mse.mean():.5f} at {nats.mean():.1f} nats, mean of {len(mse)}")
    draw_sheet(path, rows, "numbers: MSE, pixels in [0, 1], and nats", captions)
    return [path]


def reconstruct_tiles(s, pictures, networks, device):
    """Whole pictures beside what each network makes of their tiles, pixel for pixel."""
    unreadable = {}
    for path in pictures:  # all, before the first is written
        try:
            read_image(path)
        except InputError as error:
            unreadable[str(path)] = str(error.__cause__)
    pictures = leave_out_unreadable(s, pictures, unreadable)
    default = "tiles.png" if len(pictures) == 1 else "tiles"
    files = output_paths(s, pictures, default, pictures.values())
    if len(files) < len(pictures):
        raise InputError(f"{len(pictures)} pictures need a folder: --output without a suffix")
    for picture, file in zip(pictures, files):
        image = torch.from_numpy(np.array(read_image(picture))).permute(2, 0, 1)
        panels = [image]
        for name, vae in networks.items():
            made, nats, tiles = reconstruct_in_tiles(vae, image, s.overlap, device)
            panels.append(made)
            error = made.float().sub_(image).square_().mean().item() / 255**2
            print(
                f"{picture.name}, {name}: MSE {error:.5f} at {nats / tiles:.1f} nats a tile, "
                f"{tiles:,} tiles"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_picture(torch.cat(panels, 2), file)
    return files


def write_latents(s, pictures, networks, device):
    """The codes of pictures, in the order of their names."""
    (path,) = output_paths(s.replace(output=s.latents), pictures, "", suffixes=(".npz", ".npy"))
    images, names = load_pictures(s, pictures)
    vae = networks["student"]
    mu, logvar = (x.half().numpy() if s.half else x.numpy() for x in encode(vae, images, device))
    file = io.BytesIO()
    if path.suffix == ".npy":
        np.save(file, mu)
    else:
        np.savez(file, mu=mu, logvar=logvar, names=np.array(names), student=fingerprint(vae))
    write_bytes(path, file.getbuffer())
    print(f"{len(mu):,} codes of {mu.shape[1]} latents, {mu.dtype}")
    return [path]


def decode_latents(s, pictures, networks, device):
    """The pictures of codes, on one sheet or each in a file."""
    vae = networks["student"]
    mu, names = read_latents(s.decode, vae)
    files = output_paths(s, pictures, "decoded.png", names)
    one_sheet = not s.output or s.output.suffix == ".png"
    if one_sheet and len(mu) > SHOWN:
        print(f"the first {SHOWN} of {len(mu):,} are drawn; --output FOLDER writes all")
        mu = mu[:SHOWN]
    decoded = decode(vae, mu, device)
    if one_sheet:
        draw_sheet(files[0], [("", decoded)], f"decoded from {s.decode.name}")
    else:
        for picture, file in zip(decoded, files):
            write_picture((255 * picture).round().byte(), file)
    return files


def draw_samples(s, pictures, networks, device):
    """New pictures, decoded from z ~ N(0, I)."""
    (path,) = output_paths(s, pictures, "new.png")
    rows = []
    for name, vae in networks.items():
        generator = torch.Generator().manual_seed(s.seed)
        z = torch.randn(s.samples, vae.latent_dim, generator=generator)
        rows.append((name, decode(vae, z, device)))
    draw_sheet(path, rows, f"decoded from z ~ N(0, I), seed {s.seed}")
    return [path]


def interpolate(s, pictures, networks, device):
    """From one picture to another, along a straight line between their codes."""
    if len(pictures) != 2:
        raise InputError(f"--interpolate needs two pictures, got {len(pictures)}")
    (path,) = output_paths(s, pictures, "interpolated.png")
    images, names = load_pictures(s, pictures)
    draw_interpolations(path, images.to(device), networks, " to ".join(names))
    return [path]


def find_nearest(s, pictures, networks, device):
    """The pictures whose mu is nearest to that of the first, by Euclidean distance."""
    if len(pictures) < 2:
        raise InputError("--nearest needs a picture and others to compare it with")
    (path,) = output_paths(s, pictures, "nearest.png")
    images, names = load_pictures(s, pictures)
    rows, captions = [], []
    for name, vae in networks.items():
        mu, _ = encode(vae, images, device)
        distances = (mu - mu[0]).norm(dim=1)
        distances[0] = -1  # first, whatever its copies
        nearest = distances.argsort(stable=True)[:PER_ROW]
        rows.append((f"{name}: the first, and\nthose nearest to it", to_float(images[nearest])))
        captions.append(["", *(f"{distance:.1f}" for distance in distances[nearest[1:]])])
        print(f"{name}: nearest to {names[0]} are {', '.join(names[i] for i in nearest[1:])}")
    draw_sheet(path, rows, "numbers: distance between the codes", captions)
    return [path]


JOBS = {
    "tiles": reconstruct_tiles, "latents": write_latents, "decode": decode_latents,
    "samples": draw_samples, "interpolate": interpolate, "nearest": find_nearest,
}
NEED_NO_PICTURES = ("decode", "samples")


def main(argv=()):
    s = parse_settings(globals(), argv, words="pictures")
    jobs = [name for name in JOBS if getattr(s, name)]
    if len(jobs) > 1:
        raise InputError(f"one thing at a time: --{' and --'.join(jobs)} are {len(jobs)}")
    job = jobs[0] if jobs else "reconstruct"
    if (job in NEED_NO_PICTURES) == bool(s.pictures):
        raise InputError(
            f"--{job} takes no pictures" if s.pictures else
            "no pictures: name files or folders, or use --samples or --decode (--help)"
        )
    pictures = find_pictures(s.pictures)
    device = pick_device(s.device)
    networks = {"student": load_model(s.student, TinyVAE32)[0].to(device)}
    if s.teacher:
        networks["teacher"] = load_any_teacher(s.teacher)[0].to(device)
    for vae in networks.values():
        vae.check_range = False  # pixels are made from uint8
    files = JOBS.get(job, reconstruct)(s, pictures, networks, device)
    print("\nWritten:", *files[:SHOWN], sep="\n  ")
    if len(files) > SHOWN:
        print(f"  and {len(files) - SHOWN:,} more")


if __name__ == "__main__":
    run_script(main)
