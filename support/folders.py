"""Folders of pictures, read by a judge."""

from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from support.pictures import picture_files, to_tensor


def read_folder(folder, judge, batch=32, device="cpu"):
    """Folder -> features (n, d), p(y|x) (n, K) of its pictures, or of those of its folders (LFW).

    Each is resized on its own and made RGB by Pillow. p(y|x) is None if the judge has no classes.
    ValueError: no folder, no pictures, one that cannot be read (named), features not finite.
    """
    return read_files(folder, picture_files(folder, "*", "*/*"), judge, batch, device)


def read_people(folder, judge, batch=32, device="cpu"):
    """Folder with a folder of pictures a person -> for each person features (n, d), by name.

    ValueError as above.
    """
    files = people_files(folder)
    features, _ = read_files(folder, files, judge, batch, device)
    counts = Counter(file.parent.name for file in files)  # in the order of the files
    return list(features.split(list(counts.values())))


def people_files(folder):
    """The picture files folder/<person>/*, sorted. ValueError if there are none."""
    try:
        return picture_files(folder, "*/*")
    except ValueError as error:
        if Path(folder).is_dir():
            raise ValueError(f"{folder}: no folders with pictures, one a person") from None
        raise error


def require_same_people(folders):
    """ValueError names people who have pictures in one of the folders and none in another."""
    people = [{file.parent.name for file in people_files(folder)} for folder in folders]
    everybody = set.union(*people)
    for folder, found in zip(folders, people):
        missing = sorted(everybody - found)
        if missing:
            names = ", ".join(missing[:5])
            raise ValueError(f"{folder}: no pictures of {len(missing)} of the people: {names}")


@torch.inference_mode()
def read_files(folder, files, judge, batch, device):
    """What `read_folder` returns, of these files of the folder."""
    modes, sizes = Counter(), Counter()
    features, probs = [], []
    for start in tqdm(range(0, len(files), batch), f"{folder}", leave=False):
        images = []
        for file in files[start : start + batch]:
            try:
                with Image.open(file) as picture:
                    pixels = to_tensor([picture.convert("RGB")]).to(device)
                    modes[picture.mode] += 1
                    sizes[picture.size] += 1
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{file}: not a readable picture ({error})") from None
            images.append(judge.resize(pixels))
        some_features, some_probs = judge.read(torch.cat(images))
        features.append(some_features.cpu())
        if some_probs is not None:
            probs.append(some_probs.cpu())
    features = torch.cat(features)
    probs = torch.cat(probs) if probs else None
    if not (features.isfinite().all() and (probs is None or probs.isfinite().all())):
        raise ValueError(f"{folder}: {judge.name} gives features that are not finite")
    if len(sizes) > 1 or list(modes) != ["RGB"]:
        kinds = f"{len(sizes)} different sizes, modes {', '.join(modes)}"
        print(f"note: {folder}: {kinds}; all converted to RGB, resized")
    return features, probs
