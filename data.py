"""Data: people with several photos each, and what the trainer makes of them (paper, sections 2 and 4).

    𝔇 = {(x_i, τ_i) : i = 1…n},   x_i a photo,   τ_i its prompt

Two sources with one interface, `.people` -> list of `Person(name, noun, photos=[Photo(image, prompt)])`:

  ToyFaces   portraits drawn with Pillow, seeded, nothing to download. A person has an *identity*
             (skin, hair, eyes, …), a photo has a *scene* (background, expression, pose, light and
             often an accessory that hides part of the identity: sunglasses, a hat, a scarf).
             One photo cannot show the whole identity, several can.
  LFW        the Deep Funneled photos of a folder (`<Name>/<Name>_0001.jpg`), prompts from
             `prompts.tsv` in or beside the folder, or else from a template.

Then: the identity-disjoint split 2 : 1 (`split`), the frozen features of every photo, computed once
and kept on disk (`Features`), the leave-one-out batches of eq. 1 (`leave_one_out`), and `FeatureNet`,
the small classifier that reads identity and scene off a toy picture: the judge that
stands in for Inception in the toy world.
"""

import hashlib
import inspect
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from aggregators import fit_references

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
# What an accessory hides, and therefore what nobody can be asked to read off such a photo.
HIDES = {
    "none": (),
    "sunglasses": ("eyes", "brows", "spacing"),
    "hat": ("hair", "hair_colour"),
    "scarf": ("beard", "mole", "expression"),
}
RGB = {
    "skin": ((255, 222, 196), (226, 172, 122), (164, 108, 68), (98, 62, 42)),
    "hair_colour": ((28, 26, 30), (104, 62, 30), (222, 94, 20), (240, 202, 92), (176, 178, 184), (52, 96, 214)),
    "eyes": ((112, 62, 24), (30, 120, 240), (30, 168, 60), (160, 50, 210)),
    "background": ((204, 56, 60), (70, 160, 90), (120, 168, 238), (242, 164, 194), (140, 80, 180), (104, 108, 116)),
}

FACE = {"round": (72, 62, 244), "narrow": (58, 40, 258), "square": (68, 68, 250)}   # half width of skull, jaw; chin
X, EYES, MOUTH = 160, 158, 216   # middle of the face, height of eyes and mouth on a canvas of 320 × 320


def oval(pen, x, y, rx, ry, fill):
    pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def draw_hair_behind(pen, style, w, fill):
    if style == "long":
        pen.rounded_rectangle((X - w - 20, 78, X + w + 20, 290), 60, fill=fill)
    elif style == "bob":
        pen.rounded_rectangle((X - w - 24, 70, X + w + 24, 218), 50, fill=fill)
    elif style == "bun":
        oval(pen, X, 52, 30, 28, fill)
    elif style == "curly":
        for a in np.linspace(-0.15, math.pi + 0.15, 13):
            oval(pen, X - (w + 8) * math.cos(a), 128 - 62 * math.sin(a), 26, 26, fill)
    elif style == "spiky":
        for k in range(-3, 4):
            x = X + k * w / 3.4
            pen.polygon([(x - 24, 112), (x + 24, 112), (x + 4 * k, 28 + 4 * k * k)], fill=fill)


def draw_head(pen, face, skin, shade, clothes):
    w, jaw, chin = FACE[face]
    pen.rounded_rectangle((X - 106, 268, X + 106, 420), 44, fill=clothes)
    pen.rectangle((X - 30, 225, X + 30, 284), fill=shade)
    oval(pen, X - w, 172, 13, 19, shade)
    oval(pen, X + w, 172, 13, 19, shade)
    oval(pen, X, 142, w, 66, skin)
    if face == "square":
        pen.rounded_rectangle((X - w, 140, X + w, chin), 26, fill=skin)
    else:
        oval(pen, X, 206, jaw, chin - 206, skin)
        pen.polygon([(X - w, 142), (X + w, 142), (X + jaw, 206), (X - jaw, 206)], fill=skin)
        pen.polygon([(X - w, 142), (X + w, 142), (X + jaw * 0.86, 214), (X - jaw * 0.86, 214)], fill=skin)


def draw_hair_front(pen, style, w, fill):
    sides = {"long": (5, 140, 14, 100, 8, 170), "bun": (5, 140, 14, 100, 8, 170), "short": (3, 138, 12, 98, 6, 158)}
    box = (X - w - 5, 70, X + w + 5, 200)
    if style == "bob":
        pen.rounded_rectangle((X - w - 5, 72, X + w + 5, 130), 30, fill=fill)
    elif style == "short":
        pen.chord((X - w - 3, 68, X + w + 3, 196), 190, 350, fill=fill)
    else:
        pen.chord(box, *{"curly": (196, 344), "spiky": (200, 340)}.get(style, (186, 354)), fill=fill)
    if style == "curly":
        for k in range(-2, 3):
            oval(pen, X + k * w / 2.6, 104, 20, 18, fill)
    if style in sides:
        a, ya, b, yb, c, yc = sides[style]
        for s in (-1, 1):
            pen.polygon([(X + s * (w + a), ya), (X + s * (w - b), yb), (X + s * (w - c), yc)], fill=fill)


def draw_eyes(pen, spacing, brows, expression, iris):
    gap = {"close-set": 26, "wide-set": 37}[spacing]
    lift = {"surprised": 10, "angry": -5}.get(expression, 0)
    tilt = 9 if expression == "angry" else 0
    for s in (-1, 1):
        x, y = X + s * gap, EYES - 27 - lift
        oval(pen, x, EYES, 21, 20 if expression == "surprised" else 15, (250, 250, 250))
        oval(pen, x, EYES, 13, 13, iris)
        oval(pen, x, EYES, 5, 5, (15, 15, 15))
        pen.line((x - s * 21, y + tilt, x + s * 21, y - tilt), fill=(40, 28, 24), width=11 if brows == "thick" else 4)


def draw_nose(pen, nose, fill):
    if nose == "small":
        oval(pen, X, 184, 7, 5, fill)
    elif nose == "long":
        pen.polygon([(X - 2, 156), (X + 3, 156), (X + 11, 196), (X - 9, 196)], fill=fill)
    else:
        pen.rounded_rectangle((X - 20, 180, X + 20, 193), 6, fill=fill)


def draw_beard(pen, beard, face, fill):
    w, jaw, chin = FACE[face]
    if beard == "full":
        pen.pieslice((X - jaw - 4, 160, X + jaw + 4, chin + 10), 4, 176, fill=fill)
        pen.rectangle((X - jaw * 0.9, 204, X + jaw * 0.9, 218), fill=fill)
    elif beard == "goatee":
        pen.rounded_rectangle((X - 22, 226, X + 22, chin + 8), 14, fill=fill)
    if beard in ("moustache", "full"):
        pen.polygon([(X, 196), (X + 36, 212), (X - 36, 212)], fill=fill)


def draw_mouth(pen, expression):
    lips = (196, 60, 66)
    if expression == "smiling":
        pen.chord((X - 34, MOUTH - 26, X + 34, MOUTH + 18), 8, 172, fill=lips)
        pen.chord((X - 27, MOUTH - 20, X + 27, MOUTH + 10), 8, 172, fill=(255, 255, 255))
    elif expression == "serious":
        pen.rounded_rectangle((X - 27, MOUTH - 5, X + 27, MOUTH + 4), 4, fill=lips)
    elif expression == "surprised":
        oval(pen, X, MOUTH + 4, 17, 20, lips)
        oval(pen, X, MOUTH + 4, 11, 14, (70, 16, 24))
    else:
        pen.arc((X - 30, MOUTH - 8, X + 30, MOUTH + 34), 198, 342, fill=lips, width=9)


def draw_accessory(pen, accessory, w):
    if accessory == "sunglasses":
        for s in (-1, 1):
            pen.rounded_rectangle((X + s * 37 - 32, 118, X + s * 37 + 32, 182), 18, fill=(16, 16, 20))
        pen.rectangle((X - w, 132, X + w, 140), fill=(16, 16, 20))
        for s in (-1, 1):
            pen.line((X + s * 37 - 14, 150, X + s * 37 + 2, 130), fill=(90, 94, 110), width=6)
    elif accessory == "hat":
        pen.rounded_rectangle((X - 66, 30, X + 66, 112), 20, fill=(58, 40, 110))
        pen.rounded_rectangle((X - 98, 98, X + 98, 120), 10, fill=(44, 30, 88))
        pen.rectangle((X - 66, 84, X + 66, 98), fill=(230, 200, 60))
    elif accessory == "scarf":
        pen.rounded_rectangle((X - 88, 196, X + 88, 284), 26, fill=(196, 36, 84))
        for k in range(-2, 3):
            pen.line((X + k * 34 - 10, 198, X + k * 34 + 6, 282), fill=(240, 120, 150), width=7)


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

    identity, scene: attribute name -> class index; rng: np.random.Generator, for what has no label
    (clothes, pose, light, noise).
    """
    who = {k: IDENTITY[k][v] for k, v in identity.items()}
    what = {k: SCENE[k][v] for k, v in scene.items()}
    skin, hair, iris = (RGB[k][identity[k]] for k in ("skin", "hair_colour", "eyes"))
    ground, w = RGB["background"][scene["background"]], FACE[who["face"]][0]
    shade, dark = (tuple(int(c * f) for c in skin) for f in (0.78, 0.62))
    img = Image.new("RGB", (320, 320), ground)
    pen, bare = ImageDraw.Draw(img), what["accessory"] != "hat"
    clothes = tuple(int(v) for v in rng.integers(30, 110, 3))
    if bare:
        draw_hair_behind(pen, who["hair"], w, hair)
    draw_head(pen, who["face"], skin, shade, clothes)
    if bare:
        draw_hair_front(pen, who["hair"], w, hair)
    draw_eyes(pen, who["spacing"], who["brows"], what["expression"], iris)
    draw_nose(pen, who["nose"], dark)
    draw_beard(pen, who["beard"], who["face"], hair)
    draw_mouth(pen, what["expression"])
    if who["mole"] != "no":
        oval(pen, X + (-0.64 if who["mole"] == "left" else 0.64) * w, 200, 7, 7, (48, 26, 20))
    draw_accessory(pen, what["accessory"], w)
    return photographed(img, ground, rng, size)


DRAWING = "".join(inspect.getsource(f) for name, f in list(globals().items()) if name.startswith(("draw_", "photographed", "oval"))) + f"{FACE} {X} {EYES} {MOUTH}"


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def prompt_of(scene, person="person", traits=""):
    """The sentence for what can be seen of a scene; what `scene` lacks is left out."""
    words = {k: SCENE[k][v] for k, v in scene.items()}
    if "expression" in HIDES[words.get("accessory", "none")]:
        words.pop("expression", None)
    text = "a photo of " + with_article(f"{words.get('expression', '')} {person}".strip()) + traits
    wear = {"sunglasses": "sunglasses", "hat": "a hat", "scarf": "a scarf"}.get(words.get("accessory"))
    if wear:
        text += ", wearing " + wear if traits else " wearing " + wear
    return text + (f", {words['background']} background" if "background" in words else "")


def caption_of(labels, rng, traits=None):
    """A caption as people write them: parts of the scene, and up to five of the `traits` that can be seen."""
    names = [k for k in visible(labels) if k in IDENTITY]
    chosen = rng.permutation(names)[: rng.integers(6) if traits is None else traits]
    word = {k: IDENTITY[k][labels[k]] for k in chosen}
    nouns = {"skin": "skin", "hair_colour": "hair", "hair": "hair", "eyes": "eyes", "spacing": "eyes", "brows": "brows"}
    phrases = []
    for k, w in word.items():
        if k == "hair_colour" and "hair" in word:
            continue
        if k == "hair" and "hair_colour" in word:
            w += " " + word["hair_colour"]
        if k in ("beard", "mole"):
            phrases.append(f"no {k}" if w == "no" else with_article(w) if w in ("moustache", "goatee") else f"a {w} {k}")
        else:
            phrases.append(f"{w} {nouns[k]}" if k in nouns else with_article(f"{w} {k}"))
    kept = {k: labels[k] for k in SCENE if rng.random() > 0.15}
    return prompt_of(kept, traits=" with " + ", ".join(phrases) if phrases else "")


def visible(labels):
    """Attributes that the accessory of a photo does not hide: the only ones that words or a judge may be asked for."""
    hidden = HIDES[SCENE["accessory"][labels["accessory"]]]
    return [k for k in labels if k not in hidden]


@dataclass(frozen=True)
class Photo:
    """One picture x_i with its prompt τ_i. `.image` opens or draws it when asked: RGB, size × size."""
    open: object
    prompt: str
    name: str
    labels: dict = field(default_factory=dict)   # toy pictures know the truth: attribute -> class

    @property
    def image(self):
        return self.open()


@dataclass(frozen=True)
class Person:
    name: str
    noun: str
    photos: list


class _Portrait:
    """Draws one toy photo when called (picklable, so that processes can share the work)."""

    def __init__(self, identity, scene, seed, size):
        self.identity, self.scene, self.seed, self.size = identity, scene, seed, size

    def __call__(self):
        return draw_face(self.identity, self.scene, np.random.default_rng(self.seed), self.size)


class ToyFaces:
    """`people` drawn persons with `photos` photos each, all of it decided by `seed`.

    Person p and photo q are the same whatever the number of people and photos around them.
    """

    def __init__(self, people, photos=10, size=64, seed=0):
        self.size = size
        self.key = f"{people} {photos} {size} {seed} {IDENTITY} {SCENE} {RGB} {DRAWING}"
        self.people = [self._person(p, photos, size, seed) for p in range(people)]

    @staticmethod
    def _person(p, photos, size, seed):
        rng = np.random.default_rng([seed, p])
        identity = {k: int(rng.integers(len(v))) for k, v in IDENTITY.items()}
        shots = []
        for q in range(photos):
            rng = np.random.default_rng([seed, p, q])
            scene = {k: int(rng.integers(len(v))) for k, v in SCENE.items()}
            shots.append(Photo(_Portrait(identity, scene, [seed, p, q, 1], size), prompt_of(scene),
                               f"toy_{p:05d}_{q:04d}", {**identity, **scene}))
        return Person(f"toy_{p:05d}", "person", shots)


def load_image(path, size=None):
    """Any picture file as an upright RGB image; `size` scales the short side to it and cuts the centre.

    Transparent pictures are laid on white. Raises ValueError naming a file that cannot be read.
    """
    try:
        with Image.open(path) as img:
            img = ImageOps.exif_transpose(img)
            if img.mode in ("RGBA", "LA", "PA") or "transparency" in img.info:
                img = img.convert("RGBA")
                img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
            img = img.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a readable picture ({e})") from None
    return ImageOps.fit(img, (size, size), Image.Resampling.BICUBIC) if size else img


class _File:
    def __init__(self, path, size):
        self.path, self.size = path, size

    def __call__(self):
        return load_image(self.path, self.size)


class LFW:
    """Labeled Faces in the Wild, Deep Funneled: a folder with one folder of photos a person.

    root: the folder; size: side of the pictures in pixels; min_photos: people with fewer are left out.
    Prompts come from `prompts.tsv` (image <TAB> prompt) in root or beside it, else "a photo of a person".
    Raises ValueError if there is nothing to use.
    """

    def __init__(self, root, size, min_photos=2):
        root, self.size = Path(root), size
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
            shots = [Photo(_File(f, size), prompts.get(f"{folder.name}/{f.name}", "a photo of a person"),
                           f"{folder.name}/{f.name}") for f in files]
            nouns = [word for shot in shots for word in shot.prompt.split() if word in ("man", "woman")]
            self.people.append(Person(folder.name, max(nouns, key=nouns.count) if nouns else "person", shots))
            facts += [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        if not self.people:
            raise ValueError(f"{root}: no person with at least {min_photos} photos; expected <Name>/<Name>_0001.jpg …")
        self.key = f"{root.resolve()} {size} {min_photos} {facts} {sorted(prompts.items())}"


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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


def to_images(x):
    """(B, 3, H, W) in [−1, 1] -> list of RGB images."""
    x = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(i.numpy()) for i in x]


def save_grid(path, rows, columns=(), captions=(), side=128):
    """Write a picture of pictures: rows of (3, H, W) tensors in [−1, 1] (None: blank), titles over the columns,
    a caption over each row."""
    strip, width = side // 6, side * max(map(len, rows))
    font = ImageFont.load_default(strip * 0.6)
    sheet = Image.new("RGB", (width, strip * (bool(columns) + len(captions)) + side * len(rows)), "white")
    d, y = ImageDraw.Draw(sheet), 0
    if columns:
        for c, title in enumerate(columns):
            d.text((side * c + side / 2, strip / 2), title, "black", font, anchor="mm")
        y = strip
    for r, row in enumerate(rows):
        if captions:
            d.text((strip / 3, y + strip / 2), captions[r], "black", font, anchor="lm")
            y += strip
        for c, x in enumerate(row):
            if x is not None:
                sheet.paste(to_images(x[None])[0].resize((side, side), Image.Resampling.LANCZOS), (side * c, y))
        y += side
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: sheet.save(part, "PNG"))


# --------------------------------------------------------------------------- computed once, kept on disk

def write_whole(path, write):
    """write(temporary path), then rename: the file is there whole or not at all."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cached(compute, *key):
    """The tensors that compute() returns, from disk if they were computed under this key before."""
    path = Path(".cache") / (hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:24] + ".safetensors")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
        write_whole(path, lambda part: save_file(tensors, part))
    return load_file(path)


def _open(photo):
    try:
        return np.asarray(photo.image).transpose(2, 0, 1)
    except ValueError as e:   # an unreadable file: the message names it
        return str(e)


def open_all(photos, chunk=4096):
    """Yield the pixels of every photo in order, uint8 (3, S, S), or an error's text where one cannot be read.

    All cores open one chunk, then rest while it is used: drawing and encoding at once slow each other down.
    """
    with get_context("fork" if sys.platform == "linux" else None).Pool() as pool, tqdm(total=len(photos), desc="photos", leave=False) as bar:
        for i in range(0, len(photos), chunk):
            for x in pool.map(_open, photos[i:i + chunk], chunksize=64):
                yield x
                bar.update()


def pixels(faces):
    """uint8 (n, 3, S, S): all photos of ToyFaces, cached."""
    photos = [photo for person in faces.people for photo in person.photos]
    return cached(lambda: {"x": torch.from_numpy(np.stack(list(open_all(photos))))}, "pixels", faces.key)["x"]


class Features:
    """What the frozen encoders say of every photo, computed once and kept on disk.

    z_0 (n, 4, h, w) latents, embeds (n, E) image embeddings, c_t (u, L, D) text features of the u
    different prompts with `prompt[i]` the row of photo i, null_c_t (1, L, D) those of the empty prompt,
    groups: one LongTensor of photo numbers a person. The key holds the data and the encoders' weights,
    so a changed model or a changed photo is never read from an old file. Photos that cannot be read are
    counted, the first five named, and left out; ValueError if none can be.
    """

    def __init__(self, sd, people, key):
        if sd.image_encoder is None:
            raise ValueError("the model comes without an image encoder: name one with --image-encoder (h94/IP-Adapter)")
        photos = [photo for person in people for photo in person.photos]
        prompts = sorted({photo.prompt for photo in photos})
        device = next(sd.unet.parameters()).device
        found = cached(lambda: self.compute(sd, photos, [""] + prompts, device), "features", key, fingerprint(sd),
                       [(photo.name, photo.prompt) for photo in photos], torch.is_autocast_enabled(device.type))
        self.z_0, self.embeds = found["z_0"], found["embeds"]
        self.null_c_t, self.c_t = found["c_t"][:1], found["c_t"][1:]
        kept = found["readable"]
        if not kept.all():
            bad = [photo.name for photo, ok in zip(photos, kept) if not ok]
            warnings.warn(f"{len(bad)} of {len(photos)} photos are unreadable and left out: {', '.join(bad[:5])}")
        row = {prompt: i for i, prompt in enumerate(prompts)}
        self.prompt = torch.tensor([row[photo.prompt] for photo, ok in zip(photos, kept) if ok])
        counts = [part.sum().item() for part in kept.split([len(person.photos) for person in people])]
        self.groups = list(torch.arange(len(self.z_0)).split(counts))

    @staticmethod
    @torch.inference_mode()
    def compute(sd, photos, prompts, device):
        batch = max(1, 64 * 64**2 // sd.image_size**2)
        generator, parts, waiting, readable = torch.Generator(device).manual_seed(0), [], [], []

        def encode():
            images = to_tensor(torch.from_numpy(np.stack(waiting))).to(device)
            parts.append((sd.encode_latents(images, generator).float().cpu(), sd.embed_images(images).float().cpu()))
            waiting.clear()

        for x in open_all(photos):
            readable.append(not isinstance(x, str))
            if readable[-1]:
                waiting.append(x)
            if len(waiting) == batch:
                encode()
        if waiting:
            encode()
        if not parts:
            raise ValueError(f"none of the {len(photos)} photos can be read")
        z_0, embeds = map(torch.cat, zip(*parts))
        c_t = torch.cat([sd.encode_prompts(prompts[i:i + 64]).float().cpu() for i in range(0, len(prompts), 64)])
        return {"z_0": z_0, "embeds": embeds, "c_t": c_t, "readable": torch.tensor(readable)}


def fingerprint(sd):
    """A digest of the three encoders: it changes when any of their weights does."""
    digest = hashlib.sha256(str(sd.vae.config["scaling_factor"]).encode())
    for module in (sd.vae, sd.text_encoder, sd.image_encoder):
        for name, w in module.state_dict().items():
            w = w.detach().cpu().double()   # mps has no float64
            digest.update(f"{name} {tuple(w.shape)} {w.sum().item()} {w.square().sum().item()}".encode())
    return digest.hexdigest()


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

    forward: (B, 3, 64, 64) in [−1, 1] -> {attribute: logits (B, K)}; `.features`: (B, 256) for FID and KID.
    """

    def __init__(self, width=32):
        super().__init__()
        self.heads = {k: len(v) for k, v in {**IDENTITY, **SCENE}.items()}
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

    def forward(self, x):
        logits = self.head(F.silu(self.body(x))).split(list(self.heads.values()), dim=1)
        return dict(zip(self.heads, logits))

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
