"""Pictures: found in folders, opened upright and RGB, cut, turned into tensors and back, laid in grids."""

import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from support.files import write_whole
from support.text import first_line

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAKER = "multi-image IP-Adapter"  # in the field Software of the pictures that save_pictures makes


# ---------------------------------------------------------------- from disk


def picture_files(folder, *patterns):
    """The picture files of a folder, sorted by name.

    patterns: the first one that finds any counts (default: *). ValueError if there is no such
    folder, or no picture in it.
    """
    for pattern in patterns or ["*"]:
        found = [file for file in Path(folder).glob(pattern) if file.suffix.lower() in PICTURES]
        found.sort()
        for file in found:
            require_file(file)
        if found:
            return found
    problem = "no pictures" if Path(folder).is_dir() else "no such folder"
    kinds = ", ".join(PICTURES)
    raise ValueError(f"{folder}: {problem}; give a folder of pictures ({kinds})")


def require_file(path):
    """ValueError unless a picture is a file: not a folder, a link to nowhere, a pipe to wait for."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a readable picture (no such file)")


def load_image(path, size=None, crop=None):
    """Any picture file as an upright RGB image; `size`: its centre square, scaled to that side.

    crop: a crops.Crop, cut out first. Transparent pictures are laid on white. ValueError names a
    file that cannot be read.
    """
    require_file(path)
    try:
        with Image.open(path) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # each format's reader fails in its own ways
        raise ValueError(f"{path}: not a readable picture ({first_line(error)})") from error
    if crop:
        image = crop.cut(image)
    return crop_square(image, size) if size else image


def to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def find_frame(root):
    """(width, height) of the first photo in a folder like LFW. ValueError if there is none."""
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder; give one with a folder of photos a person")
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
        if files:
            return load_image(files[0]).size
    raise ValueError(f"{root}: no folder of photos in it")


def crop_square(image, size):
    """The centre square of a picture, scaled to size × size pixels."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def crop_for_clip(image, size):
    """What CLIP sees of a picture: the shorter side scaled to `size` (bicubic), then the centre."""
    width, height = image.size
    shorter = min(width, height)
    width = size * width // shorter
    height = size * height // shorter
    left = (width - size) // 2
    top = (height - size) // 2
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def open_photo(clip_size, photo):
    """A photo as pixels (3, size, size), uint8, and as CLIP sees it; None if it cannot be read."""
    try:
        image = photo.open()
    except ValueError:
        return None
    pixels = np.asarray(crop_square(image, photo.size)).transpose(2, 0, 1)
    return pixels, clip_size and crop_for_clip(image, clip_size)


def open_photos(photos, clip_size=None, chunk=4096):
    """Yield `open_photo` of every photo (it has .open() and .size), in order, opened by all cores.

    All cores open one chunk, then rest until it is used up: opening and encoding at the same time
    slow each other down. OSError if the system kills one of the processes that open them.
    """
    context = get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(count_cores(), context, initializer=depend_on_parent)

    def open_chunks():
        for start in range(0, len(photos), chunk):
            part = photos[start : start + chunk]
            at_once = min(64, chunk // 8 or 1)
            yield from list(pool.map(partial(open_photo, clip_size), part, chunksize=at_once))

    try:
        yield from tqdm(open_chunks(), desc="photos", total=len(photos), leave=False)
    except BrokenProcessPool as error:
        reason = "the system ended one of the processes that open photos (out of memory?)"
        raise OSError(f"{reason}; start again with more memory or other photos") from error
    finally:
        pool.shutdown(cancel_futures=True)


def count_cores():
    """The CPU cores that this process may use: in a container or a batch job not all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def depend_on_parent():
    """In a worker: Ctrl-C is for the parent; when the parent is gone, end without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it the pool ends the others when one is killed
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    parent_process().join()
    os._exit(1)


# ---------------------------------------------------------------- tensors


def to_tensor(images):
    """List of RGB images, or uint8 (B, 3, H, W), -> float (B, 3, H, W) in [−1, 1]."""
    if not torch.is_tensor(images):
        arrays = [torch.from_numpy(np.array(image)) for image in images]  # each (H, W, 3)
        images = torch.stack([array.permute(2, 0, 1) for array in arrays])
    return images.float() / 127.5 - 1


def to_bytes(x):
    """(B, 3, H, W) in [−1, 1] -> the same as uint8, on the CPU."""
    x = x.detach().float().cpu().clamp(-1, 1)
    return ((x + 1) * 127.5).round().byte()


def to_images(x):
    """(B, 3, H, W) in [−1, 1] -> list of RGB images."""
    return [Image.fromarray(array.numpy()) for array in to_bytes(x).permute(0, 2, 3, 1)]


def clip_pixels(images, size, mean, std):
    """CLIP's preprocessing -> (B, 3, size, size): shorter side to `size`, centre, normalised.

    images: (B, 3, H, W) in [−1, 1], or a list of B PIL images, which come out exactly as from the
    published CLIPImageProcessor. mean, std: of each colour, for pixels in [0, 1].
    """
    from torchvision.transforms.functional import InterpolationMode, resize, to_tensor  # slow

    if isinstance(images, torch.Tensor):
        x = resize(images.float(), size, InterpolationMode.BICUBIC, antialias=True)
        x = x.clamp(-1, 1) / 2 + 0.5
        top = (x.shape[2] - size) // 2
        left = (x.shape[3] - size) // 2
        x = x[:, :, top : top + size, left : left + size]
    else:
        views = [crop_for_clip(image, size) for image in images]
        x = torch.stack([to_tensor(view) for view in views])
    mean = x.new_tensor(mean)[:, None, None]
    std = x.new_tensor(std)[:, None, None]
    return (x - mean) / std


# ---------------------------------------------------------------- to disk


def save_image(path, image, maker=None):
    """Write a PIL image: a JPEG if `path` says so, else a PNG. maker: a PNG's field Software."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        write_whole(path, lambda part: image.save(part, "JPEG"))
        return
    fields = PngInfo()
    if maker:
        fields.add_text("Software", maker)
    write_whole(path, lambda part: image.save(part, "PNG", pnginfo=fields))


def save_pictures(folder, x):
    """(B, 3, H, W) in [−1, 1] -> folder/000.png, 001.png, … in place of those of an older run.

    Our pictures say so themselves, in their field Software. A file that does not is somebody
    else's: it stays, and if its name is needed, it is renamed to 000.png.bak.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]*.png"):
        if is_ours(old):
            old.unlink()
    for k, image in enumerate(to_images(x)):
        path = folder / f"{k:03d}.png"
        set_aside(path)
        save_image(path, image, MAKER)


def is_ours(path):
    """Whether `save_pictures` made this file."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MAKER
    except Exception:  # each format's reader fails in its own ways
        return False


def set_aside(path):
    """Rename a file that is in the way: .bak, or .bak2, …, is appended to its name."""
    if not path.exists():
        return
    kept = Path(f"{path}.bak")
    number = 2
    while kept.exists():
        kept = Path(f"{path}.bak{number}")
        number += 1
    path.rename(kept)
    warnings.warn(f"{path} was not made by this program: it is now {kept}")


def save_grid(path, rows, columns=(), captions=(), side=128):
    """Write one picture made of pictures.

    rows: lists of (3, H, W) tensors in [−1, 1], None: blank. columns: titles over the columns.
    captions: one over each row. side: of each picture, in pixels.
    """
    strip = side // 6  # height of a line of text
    top = strip if columns else 0
    step = side + (strip if captions else 0)
    width = side * max(map(len, rows))
    sheet = Image.new("RGB", (width, top + step * len(rows)), "white")
    font = ImageFont.load_default(strip * 0.6)
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=font)
    for c, title in enumerate(columns):
        write((side * (c + 0.5), strip / 2), title, anchor="mm")
    for r, caption in enumerate(captions):
        write((strip / 3, top + step * r + strip / 2), caption, anchor="lm")
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            if x is not None:
                picture = to_images(x[None])[0].resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(picture, (side * c, top + step * (r + 1) - side))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(path, sheet)


def save_sheet(path, references, images, prompt, per_row=9):
    """A grid: the reference pictures in the upper rows, the pictures (B, 3, H, W) in the lower."""
    size = images.shape[-1]
    shown = [to_tensor([ImageOps.fit(image, (size, size))])[0] for image in references]
    rows, captions = [], []
    for pictures, caption in ((shown, "references"), (list(images), prompt)):
        for start in range(0, len(pictures), per_row):
            rows.append(pictures[start : start + per_row])
            captions.append(caption if start == 0 else "")
    save_grid(path, rows, captions=captions, side=min(max(size, 128), 256))


def warn_of_unreadable(photos, readable):
    bad = [photo.name for photo, ok in zip(photos, readable) if not ok]
    if bad:
        names = ", ".join(bad[:5])
        warnings.warn(f"{len(bad)} of {len(photos)} photos are unreadable and left out: {names}")
