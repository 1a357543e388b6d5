"""Data: people with several photos each, and what the trainer makes of them (paper, sections 2 and 4).

    𝔇 = {(x_i, τ_i) : i = 1…n},   x_i a photo,   τ_i its prompt

Two sources with one interface, `.people` -> list of `Person(name, noun, photos=[Photo(image, prompt)])`:

  ToyFaces   portraits drawn with Pillow, seeded, nothing to download. A person has an *identity* (skin, hair, eyes, …),
             a photo has a *scene* (background, expression, pose, light and often an accessory that hides part of the
             identity: sunglasses, a hat, a scarf). One photo cannot show the whole identity, several can.
  LFW        the Deep Funneled photos of a folder (`<Name>/<Name>_0001.jpg`), prompts from `prompts.tsv` in or beside
             the folder, or else from a template.

Then: the identity-disjoint split 2 : 1 (`split`), the frozen features of every photo, computed once and kept on disk
(`Features`), the leave-one-out batches of eq. 1 (`leave_one_out`), and `FeatureNet`, the small classifier that reads
identity and scene off a toy picture: the judge that stands in for Inception in the toy world.
"""

import hashlib
import inspect
import math
import signal
import sys
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from aggregators import fit_references
from unet import clip_view, write_whole

# What a person is. The words are those of the captions.
IDENTITY = {
    "skin": ("pale", "tan", "brown", "dark"),
    "hair": ("short", "long", "curly", "bun", "spiky", "bob"),
    "hair_colour": ("black", "brown", "red", "blond", "grey", "blue"),
    "eyes": ("brown", "blue", "green", "violet"),
    "spacing": ("close-set", "wide-set"),
    "brows": ("thin", "thick"),
    "nose": ("small", "long", "wide"),
    "face": ("round", "narrow", "square"),
    "beard": ("no", "moustache", "goatee", "full"),
    "mole": ("no", "left", "right"),
}
# What a photo shows of the moment.
SCENE = {
    "background": ("red", "green", "blue", "pink", "purple", "grey"),
    "expression": ("smiling", "serious", "surprised", "angry"),
    "accessory": ("none", "sunglasses", "hat", "scarf"),
}
ATTRIBUTES = {**IDENTITY, **SCENE}
# What an accessory hides, and therefore what nobody can be asked to read off such a photo.
HIDES = {"none": (), "sunglasses": ("eyes", "brows", "spacing"), "hat": ("hair", "hair_colour"),
         "scarf": ("beard", "mole", "expression")}
RGB = {
    "skin": ((255, 222, 196), (226, 172, 122), (164, 108, 68), (98, 62, 42)),
    "hair_colour": ((28, 26, 30), (104, 62, 30), (222, 94, 20), (240, 202, 92), (176, 178, 184), (52, 96, 214)),
    "eyes": ((112, 62, 24), (30, 120, 240), (30, 168, 60), (160, 50, 210)),
    "background": ((204, 56, 60), (70, 160, 90), (120, 168, 238), (242, 164, 194), (140, 80, 180), (104, 108, 116)),
}

# A portrait is a list of shapes from back to front: (method of ImageDraw, x and y in turn, its other arguments).
# The canvas has 320 × 320 pixels; x is 0 in the middle of the face, y at the top.
FACE = {"round": (72, 62, 244), "narrow": (58, 40, 258), "square": (68, 68, 250)}  # half width of skull, jaw; chin


def oval(x, y, rx, ry, fill):
    return "ellipse", (x - rx, y - ry, x + rx, y + ry), fill


def slab(rx, top, bottom, radius, fill, x=0):
    return "rounded_rectangle", (x - rx, top, x + rx, bottom), radius, fill


def hair_shapes(look, fill):
    """Two lists: what is behind the head, what is in front of it."""
    w, _, _ = FACE[look["face"]]

    def cap(start, off=5):   # off: from the skull
        return "chord", (-w - off, 65 + off, w + off, 190 + 2 * off), start, 540 - start, fill

    def locks(end, off=5):
        return [("polygon", (s * (w + off), 135 + off, s * (w - off - 9), 95 + off, s * (w - off - 3), end), fill)
                for s in (-1, 1)]

    curls = [oval(-(w + 8) * math.cos(a), 128 - 62 * math.sin(a), 26, 26, fill)
             for a in np.linspace(-0.15, math.pi + 0.15, 13)]
    spikes = [("polygon", (k * w / 3.4 - 24, 112, k * w / 3.4 + 24, 112, k * w / 3.4 + 4 * k, 28 + 4 * k * k), fill)
              for k in range(-3, 4)]
    shapes = {
        "short": ([], [cap(190, off=3), *locks(158, off=3)]),
        "long": ([slab(w + 20, 78, 290, 60, fill)], [cap(186), *locks(170)]),
        "curly": (curls, [cap(196), *(oval(k * w / 2.6, 104, 20, 18, fill) for k in range(-2, 3))]),
        "bun": ([oval(0, 52, 30, 28, fill)], [cap(186), *locks(170)]),
        "spiky": (spikes, [cap(200)]),
        "bob": ([slab(w + 24, 70, 218, 50, fill)], [slab(w + 5, 72, 130, 30, fill)]),
    }
    return ([], []) if look["accessory"] == "hat" else shapes[look["hair"]]


def head_shapes(face, skin, shade, clothes):
    w, jaw, chin = FACE[face]
    shapes = [slab(106, 268, 420, 44, clothes), ("rectangle", (-30, 225, 30, 284), shade),
              oval(-w, 172, 13, 19, shade), oval(w, 172, 13, 19, shade), oval(0, 142, w, 66, skin)]
    if face == "square":
        return [*shapes, slab(w, 140, chin, 26, skin)]
    cheeks = [("polygon", (-w, 142, w, 142, x, y, -x, y), skin) for x, y in ((jaw, 206), (jaw * 0.86, 214))]
    return [*shapes, oval(0, 206, jaw, chin - 206, skin), *cheeks]


def eye_shapes(look, iris):
    gap, thick = {"close-set": 26, "wide-set": 37}[look["spacing"]], {"thin": 4, "thick": 11}[look["brows"]]
    height, brow, tilt = {"surprised": (20, 121, 0), "angry": (15, 136, 9)}.get(look["expression"], (15, 131, 0))
    return [shape for s in (-1, 1) for shape in (
        oval(s * gap, 158, 21, height, (250, 250, 250)), oval(s * gap, 158, 13, 13, iris),
        oval(s * gap, 158, 5, 5, (15, 15, 15)),
        ("line", (s * (gap - 21), brow + tilt, s * (gap + 21), brow - tilt), (40, 28, 24), thick))]


def feature_shapes(look, dark, hair):
    """Nose, beard, mouth and mole."""
    (w, jaw, chin), lips, teeth = FACE[look["face"]], (196, 60, 66), (255, 255, 255)
    edge = (40, 28, 24), 3   # or a beard of nearly the skin's colour could not be told from none
    moustache = "polygon", (0, 196, 28, 194, 40, 220, 22, 212, -22, 212, -40, 220, -28, 194), hair, *edge
    nose = {"small": oval(0, 184, 7, 5, dark), "wide": slab(20, 180, 193, 6, dark),
            "long": ("polygon", (-2, 156, 3, 156, 11, 196, -9, 196), dark)}
    beard = {"no": [], "moustache": [moustache], "goatee": [(*slab(22, 226, chin + 8, 14, hair), *edge)],
             "full": [("pieslice", (-jaw - 4, 160, jaw + 4, chin + 10), 4, 176, hair),
                      ("rectangle", (-jaw * 0.9, 204, jaw * 0.9, 218), hair), moustache[:3]]}
    mouth = {"smiling": [("chord", (-34, 190, 34, 234), 8, 172, lips), ("chord", (-27, 196, 27, 226), 8, 172, teeth)],
             "serious": [slab(27, 211, 220, 4, lips)],
             "surprised": [oval(0, 220, 17, 20, lips), oval(0, 220, 11, 14, (70, 16, 24))],
             "angry": [("arc", (-29, 206, 29, 258), 192, 348, lips, 9)]}
    side = {"no": 0, "left": -1, "right": 1}[look["mole"]]
    mole = [oval(side * 0.64 * w, 200, 7, 7, (48, 26, 20))] if side else []
    return [nose[look["nose"]], *beard[look["beard"]], *mouth[look["expression"]], *mole]


def accessory_shapes(look):
    w, black, glint, stripe = FACE[look["face"]][0], (16, 16, 20), (90, 94, 110), (240, 120, 150)
    return {
        "none": [],
        "sunglasses": [("rectangle", (-w, 132, w, 140), black), *(slab(32, 118, 182, 18, black, x) for x in (-37, 37)),
                       *(("line", (x - 14, 150, x + 2, 130), glint, 6) for x in (-37, 37))],
        "hat": [slab(66, 30, 112, 20, (58, 40, 110)), slab(98, 98, 120, 10, (44, 30, 88)),
                ("rectangle", (-66, 84, 66, 98), (230, 200, 60))],
        "scarf": [slab(88, 196, 284, 26, (196, 36, 84)),
                  *(("line", (x - 10, 198, x + 6, 282), stripe, 7) for x in range(-68, 69, 34))],
    }[look["accessory"]]


def photographed(img, ground, rng, size):
    """Pose (rotation, scale, shift), 256 × 256 of the canvas reduced to size × size, light and noise."""
    angle, scale = rng.normal(0, 0.07), rng.uniform(0.94, 1.06)
    dx, dy = rng.normal(0, 5, 2)
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    img = img.transform((256, 256), Image.Transform.AFFINE,
                        (c, s, 160 + dx - 128 * (c + s), -s, c, 160 + dy - 128 * (c - s)),
                        Image.Resampling.BILINEAR, fillcolor=ground)
    img = img.resize((size, size), Image.Resampling.BOX)
    x = np.asarray(img, np.float32) * rng.uniform(0.88, 1.1) + rng.normal(0, 1.5, (size, size, 1))
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def draw_face(identity, scene, rng, size=64):
    """One portrait, an RGB image of size × size pixels.

    identity, scene: attribute name -> class index; rng: a np.random.Generator or the seed of one, for what has no label
    (clothes, pose, light, noise).
    """
    rng, labels = np.random.default_rng(rng), {**identity, **scene}
    look = {k: ATTRIBUTES[k][v] for k, v in labels.items()}
    skin, hair, iris, ground = (RGB[k][labels[k]] for k in ("skin", "hair_colour", "eyes", "background"))
    shade, dark = (tuple(int(c * f) for c in skin) for f in (0.78, 0.62))
    clothes = tuple(rng.integers(30, 110, 3).tolist())
    behind, front = hair_shapes(look, hair)
    shapes = [*behind, *head_shapes(look["face"], skin, shade, clothes), *front, *eye_shapes(look, iris),
              *feature_shapes(look, dark, hair), *accessory_shapes(look)]
    img = Image.new("RGB", (320, 320), ground)
    pen = ImageDraw.Draw(img)
    for method, xy, *rest in shapes:
        getattr(pen, method)([(x + 160, y) for x, y in zip(xy[::2], xy[1::2])], *rest)
    return photographed(img, ground, rng, size)


def visible(labels):
    """Attributes that the accessory of a photo does not hide: the only ones that words or a judge may be asked for."""
    hidden = HIDES[SCENE["accessory"][labels.get("accessory", 0)]]
    return [k for k in labels if k not in hidden]


def traits_of(identity):
    """{attribute: class} -> " with pale skin, curly red hair, no beard"."""
    word = {k: IDENTITY[k][v] for k, v in identity.items()}
    if "hair" in word and "hair_colour" in word:
        word["hair"] += " " + word.pop("hair_colour")
    phrases = []
    for k, w in word.items():
        article = "a " if k in ("nose", "face", "beard", "mole") and w != "no" else ""
        noun = "" if w in ("moustache", "goatee") else " " + {"hair_colour": "hair", "spacing": "eyes"}.get(k, k)
        phrases.append(article + w + noun)
    return " with " + ", ".join(phrases) if phrases else ""


def prompt_of(scene, traits=""):
    """The sentence for what can be seen of a scene; what `scene` lacks is left out. traits: words of `traits_of`."""
    word = {k: SCENE[k][scene[k]] for k in visible(scene)}
    person = f"{word['expression']} person" if "expression" in word else "person"
    worn = {"sunglasses": "sunglasses", "hat": "a hat", "scarf": "a scarf"}.get(word.get("accessory"))
    text = "a photo of " + ("an " if person[0] in "aeiou" else "a ") + person + traits
    if worn:
        text += f", wearing {worn}" if traits else f" wearing {worn}"
    return text + (f", {word['background']} background" if "background" in word else "")


def caption_of(labels, rng, traits=None):
    """A caption as people write them: parts of the scene, and up to eight of the `traits` that can be seen.
    Where it leaves out a scarf it may name the expression: 3 % of the captions that weights/tiny was trained on."""
    names = [k for k in visible(labels) if k in IDENTITY]
    named = rng.permutation(names)[: rng.integers(9) if traits is None else traits]
    kept = {k: labels[k] for k in SCENE if rng.random() > 0.15}
    return prompt_of(kept, traits_of({k: labels[k] for k in named}))


class Photo(NamedTuple):
    """One picture x_i with its prompt τ_i. `.open()` reads or draws it, RGB; `.image` is it cut to size × size."""
    open: object
    prompt: str
    name: str
    size: int
    labels: dict = {}   # toy pictures know the truth: attribute -> class

    @property
    def image(self):
        return square(self.open(), self.size)


class Person(NamedTuple):
    name: str
    noun: str
    photos: list


class ToyFaces:
    """`people` drawn persons with `photos` photos each, all of it decided by `seed`.
    Person p and photo q are the same whatever the number of people and photos around them."""

    def __init__(self, people, photos=10, size=64, seed=0):
        def classes(attributes, *seed):
            rng = np.random.default_rng(seed)
            return {k: int(rng.integers(len(v))) for k, v in attributes.items()}

        self.key = f"{people} {photos} {size} {seed} {DRAWING}"
        self.people = []
        for p in range(people):
            identity, shots = classes(IDENTITY, seed, p), []
            for q in range(photos):
                scene = classes(SCENE, seed, p, q + 1)   # NumPy pads seeds with zeros: [seed, p, 0] is [seed, p]
                shots.append(Photo(partial(draw_face, identity, scene, [seed, p, q, 1], size), prompt_of(scene),
                                   f"toy_{p:05d}_{q:04d}", size, {**identity, **scene}))
            self.people.append(Person(f"toy_{p:05d}", "person", shots))


DRAWING = [ATTRIBUTES, RGB, FACE, *map(inspect.getsource, (   # all that a picture depends on
    oval, slab, hair_shapes, head_shapes, eye_shapes, feature_shapes, accessory_shapes, photographed, draw_face, ToyFaces))]


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def picture_files(folder, *patterns):
    """The picture files of a folder, by name: those of the first of `patterns` (default: *) that finds any. ValueError if
    there is no such folder, or no picture."""
    for pattern in patterns or ["*"]:
        if files := sorted(f for f in Path(folder).glob(pattern) if f.suffix.lower() in PICTURES):
            return files
    raise ValueError(f"{folder}: {'no pictures' if Path(folder).is_dir() else 'no such folder'}; give a folder of pictures "
                     f"({', '.join(PICTURES)})")


def load_image(path, size=None):
    """Any picture file as an upright RGB image; `size` scales the short side to it and cuts the centre.
    Transparent pictures are laid on white. Raises ValueError naming a file that cannot be read."""
    try:
        with Image.open(path) as img:
            img = ImageOps.exif_transpose(img)
            if img.mode.startswith("I"):   # 16 bits of grey, which Pillow would cut off at 255
                img = img.point(lambda v: v / 256).convert("L")
            if img.mode in ("RGBA", "LA", "PA") or "transparency" in img.info:
                img = img.convert("RGBA")
                img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
            img = img.convert("RGB")
    except Exception as e:   # each format's reader fails in its own ways
        raise ValueError(f"{path}: not a readable picture ({e})") from None
    return square(img, size) if size else img


def square(img, size):
    """The centre of a picture, size × size."""
    return img if img.size == (size, size) else ImageOps.fit(img, (size, size), Image.Resampling.BICUBIC)


class LFW:
    """Labeled Faces in the Wild, Deep Funneled: a folder with one folder of photos a person.

    root: the folder; size: side of the pictures in pixels; min_photos: people with fewer are left out.
    Prompts come from `prompts.tsv` (image <TAB> prompt) in root or beside it, else "a photo of a person".
    Raises ValueError if there is nothing to use.
    """

    def __init__(self, root, size, min_photos=2):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; give a folder with one folder of photos a person")
        tables = [p for p in (root / "prompts.tsv", root.parent / "prompts.tsv") if p.is_file()]
        lines = tables[0].read_text(encoding="utf-8").splitlines()[1:] if tables else []
        prompts = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        self.people, facts = [], []
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)
            if len(files) < min_photos:
                continue
            names = [f"{folder.name}/{f.name}" for f in files]
            shots = [Photo(partial(load_image, f), prompts.get(name, "a photo of a person"), name, size)
                     for f, name in zip(files, names)]
            nouns = [word for shot in shots for word in shot.prompt.split() if word in ("man", "woman")]
            self.people.append(Person(folder.name, max(nouns, key=nouns.count, default="person"), shots))
            facts += [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        if not self.people:
            raise ValueError(f"{root}: no person with at least {min_photos} photos; expected <Name>/<Name>_0001.jpg …")
        self.key = f"{root.resolve()} {size} {min_photos} {facts} {sorted(prompts.items())}"


def split(people, ratio=2 / 3, seed=0):
    """People -> (training people, test people), nobody in both; `ratio` of them train."""
    order = np.random.default_rng(seed).permutation(len(people))
    cut = round(len(people) * ratio)
    return [people[i] for i in sorted(order[:cut])], [people[i] for i in sorted(order[cut:])]


def to_tensor(images):
    """List of RGB images, or uint8 (B, 3, H, W), -> float (B, 3, H, W) in [−1, 1]."""
    if not torch.is_tensor(images):
        images = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
    return images.float() / 127.5 - 1


def to_bytes(x):
    """(B, 3, H, W) in [−1, 1] -> the same as uint8, on the CPU."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_images(x):
    """(B, 3, H, W) in [−1, 1] -> list of RGB images."""
    return [Image.fromarray(i.numpy()) for i in to_bytes(x).permute(0, 2, 3, 1)]


def save_grid(path, rows, columns=(), captions=(), side=128):
    """Write a picture of pictures: rows of (3, H, W) tensors in [−1, 1] (None: blank), titles over the columns,
    a caption over each row; a JPEG if `path` says so, else a PNG."""
    strip = side // 6
    top, step = strip * bool(columns), side + strip * bool(captions)
    sheet = Image.new("RGB", (side * max(map(len, rows)), top + step * len(rows)), "white")
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(strip * 0.6))
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
    kind = "JPEG" if Path(path).suffix.lower() in (".jpg", ".jpeg") else "PNG"
    write_whole(path, lambda part: sheet.save(part, kind))


# --------------------------------------------------------------------------- computed once, kept on disk

def cached(compute, *key):
    """The tensors that compute() returns, from disk if they were computed under this key before."""
    path = Path(".cache") / (hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:24] + ".safetensors")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
        write_whole(path, lambda part: save_file(tensors, part))
    return load_file(path)


def _open(view, photo):
    with suppress(ValueError):   # of a file that cannot be read: None
        img = photo.open()
        return np.asarray(square(img, photo.size)).transpose(2, 0, 1), view and clip_view(img, view)


def open_all(photos, view=None, chunk=4096):
    """Yield of every photo in order its pixels, uint8 (3, S, S), and CLIP's view of side `view`; None if unreadable.
    All cores open one chunk, then rest while it is used: drawing and encoding at once slow each other down."""
    workers = get_context("fork" if sys.platform == "linux" else None).Pool(   # Ctrl-C is for the one that waits for them
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with workers as pool:
        parts = (photos[i:i + chunk] for i in range(0, len(photos), chunk))
        opened = (x for part in parts for x in pool.map(partial(_open, view), part, chunksize=min(64, chunk // 8 or 1)))
        yield from tqdm(opened, desc="photos", total=len(photos), leave=False)


def pixels(faces):
    """uint8 (n, 3, S, S): all photos of ToyFaces, cached."""
    photos = [photo for person in faces.people for photo in person.photos]
    return cached(lambda: {"x": torch.from_numpy(np.stack([x for x, _ in open_all(photos)]))}, "pixels", faces.key)["x"]


class Features:
    """What the frozen encoders say of every photo, computed once and kept on disk.

    z_0 (n, 4, h, w) latents, embeds (n, E) image embeddings, c_t (u, L, D) text features of the u different prompts
    with `prompt[i]` the row of photo i, null_c_t (1, L, D) those of the empty prompt, groups: one LongTensor of photo
    numbers a person. The key holds the data and the encoders' weights, so a changed model or a changed photo is never
    read from an old file. Photos that cannot be read are counted, the first five named, and left out; ValueError if
    none can be.
    """

    def __init__(self, sd, people, key):
        photos = [photo for person in people for photo in person.photos]
        prompts = sorted({photo.prompt for photo in photos})
        device = next(sd.unet.parameters()).device
        found = cached(lambda: self.compute(sd, photos, ["", *prompts], device), "features", key, fingerprint(sd),
                       [(photo.name, photo.prompt) for photo in photos], running_precision(device))
        self.z_0, self.embeds, kept = found["z_0"], found["embeds"], found["readable"]
        self.null_c_t, self.c_t = found["c_t"][:1], found["c_t"][1:]
        if bad := [photo.name for photo, ok in zip(photos, kept) if not ok]:
            warnings.warn(f"{len(bad)} of {len(photos)} photos are unreadable and left out: {', '.join(bad[:5])}")
        row = {prompt: i for i, prompt in enumerate(prompts)}
        self.prompt = torch.tensor([row[photo.prompt] for photo, ok in zip(photos, kept) if ok])
        counts = [part.sum().item() for part in kept.split([len(person.photos) for person in people])]
        self.groups = list(torch.arange(len(self.z_0)).split(counts))

    @staticmethod
    @torch.inference_mode()
    def compute(sd, photos, prompts, device):
        generator, parts, readable = torch.Generator(device).manual_seed(0), [], []
        batch = max(1, 64 * 64**2 // sd.image_size**2)
        opened = open_all(photos, sd.image_encoder.config.image_size, 64 * batch)
        while some := list(islice(opened, batch)):
            readable += [x is not None for x in some]
            if good := [x for x in some if x is not None]:
                x, views = zip(*good)
                z_0 = sd.encode_latents(to_tensor(torch.from_numpy(np.stack(x))).to(device), generator)
                parts.append((z_0.float().cpu(), sd.embed_images(views).float().cpu()))
        if not parts:
            raise ValueError(f"none of the {len(photos)} photos can be read")
        z_0, embeds = map(torch.cat, zip(*parts))
        c_t = torch.cat([sd.encode_prompts(prompts[i:i + 64]).float().cpu() for i in range(0, len(prompts), 64)])
        return {"z_0": z_0, "embeds": embeds, "c_t": c_t, "readable": torch.tensor(readable)}


def digest(*networks, **settings):
    """Sixteen hex digits that change when any number in the networks does, or any of the settings."""
    found = hashlib.sha256(repr(settings).encode())
    for name, w in (item for network in networks for item in network.state_dict().items()):
        found.update(f"{name} {w.dtype} {tuple(w.shape)}".encode())
        found.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def running_precision(device):
    """The dtype of autocast, or False: numbers made with another one are other numbers."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)


def fingerprint(sd):
    """The digest of all that `Features` depend on of a model: its encoders (the VAE's decoder encodes nothing).
    ValueError if there is no image encoder."""
    if sd.image_encoder is None:
        raise ValueError("the model comes without an image encoder: name one with --image-encoder (h94/IP-Adapter)")
    return digest(sd.vae.encoder, sd.vae.quant_conv, sd.text_encoder, sd.image_encoder, size=sd.image_size,
                  scale=sd.vae.config["scaling_factor"], preprocessor=sd.preprocessor)


def leave_one_out(groups, batch, generator, n=10):
    """j ~ U{1…N}: photo j is the target, the others are its references   (eq. 1).

    groups: per person a tensor of photo numbers; people with one photo are never drawn. Of more than `n`
    photos a random `n` take part; fewer than n−1 references are bootstrapped to n−1.
    Returns target (B,) and references (B, n−1).
    """
    groups = [g for g in groups if len(g) > 1]
    if not groups:
        raise ValueError("leave-one-out needs at least one person with two photos")
    targets, references = [], []
    for k in torch.randint(len(groups), (batch,), generator=generator).tolist():
        shots = groups[k][torch.randperm(len(groups[k]), generator=generator)[:n]]
        targets.append(shots[0])   # first of a random order: uniform
        references.append(fit_references(shots[None, 1:, None], n - 1, generator)[0, :, 0])
    return torch.stack(targets), torch.stack(references)


# --------------------------------------------------------------------------- the judge of the toy world

class FeatureNet(nn.Module):
    """Reads every attribute of IDENTITY and SCENE off a toy picture; plays Inception's part.
    forward: (B, 3, 64, 64) in [−1, 1] -> {attribute: logits (B, K)}; `.features`: (B, 256) for FID and KID."""

    def __init__(self, width=32):
        super().__init__()
        self.heads = {k: len(v) for k, v in ATTRIBUTES.items()}
        layers, c = [nn.Conv2d(3, width, 3, padding=1)], width
        for c_out in (2 * width, 4 * width, 4 * width):                       # 64 -> 32 -> 16 -> 8
            layers += [nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, stride=2, padding=1),
                       nn.GroupNorm(8, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1)]
            c = c_out
        layers += [nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, width, 1), nn.Flatten(),
                   nn.Linear(width * 64, 256), nn.LayerNorm(256)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(256, sum(self.heads.values()))

    def features(self, x):
        return self.body(x)

    def answers(self, features):
        return dict(zip(self.heads, self.head(nn.functional.silu(features)).split(list(self.heads.values()), dim=1)))

    def forward(self, x):
        return self.answers(self.features(x))

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half().cpu() for k, v in self.state_dict().items()}
        write_whole(Path(folder) / "model.safetensors", lambda part: save_file(tensors, part))

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{folder}: no FeatureNet there; python train.py --method base makes one")
        net = cls()
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return net.eval()
