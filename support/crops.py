"""Which part of a photo the pictures of a model show: the crop of the photos it was trained on.

    "face_crop": {"box": [58, 48, 198, 188], "frame": [250, 250]}

stands in a model's feature_extractor/preprocessor_config.json. A photo of the frame's size is cut by
the box: photos of one data set show the face in one place. Of a photo of any other size nobody knows
where the face is: as without a crop, its centre square is taken.
"""

from pathlib import Path
from typing import NamedTuple

from support.files import read_json
from support.pictures import load_image
from support.text import one_line

KEY = "face_crop"  # in the preprocessor's settings


class Crop(NamedTuple):
    """box: left, top, right, bottom in pixels of photos that are `frame`, (width, height), large."""

    box: tuple
    frame: tuple

    def cut(self, image):
        """The part in the box of a photo of the frame's size; any other photo as it is."""
        return image.crop(self.box) if image.size == self.frame else image

    @property
    def fractions(self):
        """The box in fractions of the frame, as support.face_net has boxes."""
        left, top, right, bottom = self.box
        width, height = self.frame
        return left / width, top / height, right / width, bottom / height

    def describe(self):
        """What a preprocessor's settings say of it."""
        return {KEY: {"box": list(self.box), "frame": list(self.frame)}}


def make_crop(box, frame):
    """The Crop of whole pixels. ValueError unless the box is a square inside of the frame."""
    box = tuple(box)
    frame = tuple(frame)
    words = f"the crop {','.join(map(str, box))} of a photo of {' × '.join(map(str, frame))} pixels"
    words = one_line(words, 200)
    if len(box) != 4 or len(frame) != 2 or not all(type(value) is int for value in box + frame):
        raise ValueError(f"{words}: it must be four whole numbers of two")
    left, top, right, bottom = box
    width, height = frame
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"{words}: it must be left < right and top < bottom, inside of the photo")
    if right - left != bottom - top:
        raise ValueError(f"{words}: it must be a square, not {right - left} × {bottom - top}")
    return Crop(box, frame)


def parse_crop(text, frame):
    """ "58,48,198,188", or the same in fractions, of photos (width, height) large -> a Crop.

    ValueError for anything else.
    """
    try:
        values = [float(word) for word in text.split(",")]
        left, top, right, bottom = values
    except ValueError:
        wanted = "left,top,right,bottom in pixels or in fractions of a photo"
        raise ValueError(f"--crop {one_line(text, 60)}: it must be {wanted}") from None
    if not all(abs(value) <= 10**6 for value in values):  # NaN is not
        raise ValueError(f"--crop {one_line(text, 60)}: it lies outside of the photo")
    if max(values) <= 1:
        width, height = frame
        values = [left * width, top * height, right * width, bottom * height]
    return make_crop([round(value) for value in values], frame)


def find_crop(settings):
    """The Crop that a preprocessor's settings name, or None. ValueError if it is none."""
    found = settings.get(KEY)
    if found is None:
        return None
    is_table = isinstance(found, dict) and isinstance(found.get("box"), list)
    if not is_table or not isinstance(found.get("frame"), list):
        raise ValueError(f"{KEY} = {one_line(repr(found), 60)}: it must have a box and a frame")
    return make_crop(found["box"], found["frame"])


def read_crop(model):
    """The Crop that the folder of a model names, or None, before the model itself is loaded."""
    path = Path(model) / "feature_extractor" / "preprocessor_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    return find_crop(settings) if isinstance(settings, dict) else None


def open_references(files, crop):
    """Reference photos, cut like the photos that the model learned from, and a note how."""
    images = [load_image(file) for file in files]
    if crop is None:
        return images
    width, height = crop.frame
    strange = [file for file, image in zip(files, images) if image.size != crop.frame]
    if len(strange) < len(files):
        print(f"note: photos of {width} × {height} pixels are taken for uncut ones, as LFW has them, and "
              f"cut by the box {','.join(map(str, crop.box))}")
    if strange:
        share = (crop.box[2] - crop.box[0]) / width
        print(f"note: of {strange[0]}{' and others' if len(strange) > 1 else ''} the centre square is "
              "taken; the face should fill it from the hairline to just below the chin "
              f"({share:.0%} of a Deep Funneled photo)")
    return [crop.cut(image) for image in images]
