"""Portraits of people who do not exist, drawn with Pillow: the photos of the tiny world.

A person has an *identity*: skin, hair, eyes, … A photo has a *scene*: background, expression and
often an accessory. Both are dictionaries {attribute: class number}, and `IDENTITY` and `SCENE` hold
the word of each class. An accessory hides a part of the identity (`HIDES`): one photo cannot show
who a person is, several can.

`draw_face` works in three steps, and this file is in the same order:

    1. look up words and colours            {"hair": 2} -> "curly"
    2. draw the parts from back to front    320 × 320 pixels
    3. take a photo of the drawing          pose, 64 × 64 pixels, light, noise
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# Raise it by hand whenever a picture would come out different, if only in one byte.
# It is part of every cache key, so that no program reads pictures of an older version.
VERSION = 1


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

# What each accessory hides: prompts do not name it, and nobody is asked for it. Of three exceptions
# a part still shows. They are not named or asked for either: FeatureNet never learned to read them
# (the colour of a beard under a hat: 24 % right, where guessing gives 17 %).
#     hat          hair_colour      if there is a beard, which has the same colour
#     scarf        expression       unless smiling or serious, where only the mouth differs
#     sunglasses   brows, spacing   if surprised: these brows stand above the glasses
HIDES = {
    "none": (),
    "sunglasses": ("eyes", "brows", "spacing"),
    "hat": ("hair", "hair_colour"),
    "scarf": ("beard", "mole", "expression"),
}


def visible_attributes(labels):
    """The attributes of `labels` that its accessory does not hide, in the order of `labels`.

    labels: {attribute: class number}; without an accessory in it nothing is hidden.

    >>> visible_attributes({"hair": 0, "eyes": 3, "accessory": 2})   # a hat
    ['eyes', 'accessory']
    """
    accessory = SCENE["accessory"][labels.get("accessory", 0)]
    return [name for name in labels if name not in HIDES[accessory]]


# ---------------------------------------------------------------- 1. colours and sizes

RGB = {
    "skin": {
        "pale": (255, 222, 196),
        "tan": (226, 172, 122),
        "brown": (164, 108, 68),
        "dark": (98, 62, 42),
    },
    "hair_colour": {
        "black": (28, 26, 30),
        "brown": (104, 62, 30),
        "red": (222, 94, 20),
        "blond": (240, 202, 92),
        "grey": (176, 178, 184),
        "blue": (52, 96, 214),
    },
    "eyes": {
        "brown": (112, 62, 24),
        "blue": (30, 120, 240),
        "green": (30, 168, 60),
        "violet": (160, 50, 210),
    },
    "background": {
        "red": (204, 56, 60),
        "green": (70, 160, 90),
        "blue": (120, 168, 238),
        "pink": (242, 164, 194),
        "purple": (140, 80, 180),
        "grey": (104, 108, 116),
    },
}
LIPS = (196, 60, 66)
DARK_BROWN = (40, 28, 24)   # brows, and the edge of a beard


class FaceShape(NamedTuple):
    """Outline of a head, in pixels of the canvas."""
    skull: int   # from the middle of the face to its side, at the ears
    jaw: int     # the same, at the mouth
    chin: int    # y of the lowest point


FACE = {
    "round": FaceShape(skull=72, jaw=62, chin=244),
    "narrow": FaceShape(skull=58, jaw=40, chin=258),
    "square": FaceShape(skull=68, jaw=68, chin=250),
}
EYE_DISTANCE = {"close-set": 26, "wide-set": 37}   # from the middle of the face to each pupil
BROW_WIDTH = {"thin": 4, "thick": 11}


def pick_colour(look, name):
    """(R, G, B) of one attribute that has a colour: skin, hair_colour, eyes or background."""
    return RGB[name][look[name]]


def darken(colour, factor):
    """(R, G, B), each times `factor` and rounded down."""
    return tuple(int(value * factor) for value in colour)


# ---------------------------------------------------------------- 2. the parts of a portrait
#
# The canvas has 320 × 320 pixels. x = 0 is the middle of the face, y = 0 the upper edge.
#
#            x = −160             0            160
#      y = 0    +-----------------------------------+
#               |              _______              |
#         75    |            /  hair   \            |
#        130    |           |  --   --  |           |   brows
#        158    |          (|  (o) (o)  |)          |   eyes
#        185    |           |     ^     |           |   nose
#        215    |            \   ===   /            |   mouth
#        250    |             \_______/             |   chin
#               |           ____|   |____           |
#        268    |        /               \          |   shoulders
#        320    +-----------------------------------+
#
# `pen` is Pillow's ImageDraw of this canvas; `look` is {attribute: word}.
# `side` is −1 for the left half of the picture and 1 for the right half.
# Pillow counts angles in degrees from three o'clock, clockwise: 180° to 360° is an upper half.

SIDE = 320


def place(*numbers):
    """x₁, y₁, x₂, y₂, … -> [(x₁, y₁), (x₂, y₂), …] with x = 0 at the left edge, as in Pillow."""
    points = []
    for x, y in zip(numbers[::2], numbers[1::2]):
        points.append((x + SIDE // 2, y))
    return points


def draw_oval(pen, x, y, rx, ry, fill):
    """An ellipse around (x, y), rx pixels to each side, ry up and down."""
    pen.ellipse(place(x - rx, y - ry, x + rx, y + ry), fill)


def draw_box(pen, rx, top, bottom, radius, fill, x=0):
    """A rectangle with round corners, rx pixels to each side of x; radius: of the corners."""
    pen.rounded_rectangle(place(x - rx, top, x + rx, bottom), radius, fill)


# ---- hair, of which a part is behind the head and a part in front of it

def draw_hair_behind(pen, look):
    """The part behind the head; short hair has none."""
    style = look["hair"]
    skull = FACE[look["face"]].skull
    colour = pick_colour(look, "hair_colour")
    if style == "long":
        draw_box(pen, skull + 20, 78, 290, 60, colour)
    elif style == "curly":
        draw_wreath_of_curls(pen, skull, colour)
    elif style == "bun":
        draw_oval(pen, 0, 52, 30, 28, colour)
    elif style == "spiky":
        draw_spikes(pen, skull, colour)
    elif style == "bob":
        draw_box(pen, skull + 24, 70, 218, 50, colour)


def draw_hair_in_front(pen, look):
    """The part in front: the hairline, and what falls over the temples."""
    style = look["hair"]
    skull = FACE[look["face"]].skull
    colour = pick_colour(look, "hair_colour")
    if style == "short":
        draw_cap(pen, skull, 190, colour, gap=3)
        draw_locks(pen, skull, 158, colour, gap=3)
    elif style in ("long", "bun"):
        draw_cap(pen, skull, 186, colour)
        draw_locks(pen, skull, 170, colour)
    elif style == "curly":
        draw_cap(pen, skull, 196, colour)
        draw_fringe_of_curls(pen, skull, colour)
    elif style == "spiky":
        draw_cap(pen, skull, 200, colour)
    elif style == "bob":
        draw_box(pen, skull + 5, 72, 130, 30, colour)


def draw_cap(pen, skull, start, colour, gap=5):
    """Hair on the top of the head, `gap` pixels wider than the skull.

    start: angle of the left end of the hairline; a larger one leaves more of the forehead free.
    """
    end = 540 - start   # the mirror image of start: both are as far from 270°, the top
    box = place(-skull - gap, 65 + gap, skull + gap, 190 + 2 * gap)
    pen.chord(box, start, end, colour)


def draw_locks(pen, skull, bottom, colour, gap=5):
    """A triangle of hair on each temple, down to y = bottom."""
    for side in (-1, 1):
        outer = side * (skull + gap)
        inner = side * (skull - gap - 9)
        tip = side * (skull - gap - 3)
        pen.polygon(place(outer, 135 + gap, inner, 95 + gap, tip, bottom), colour)


def draw_wreath_of_curls(pen, skull, colour):
    """Thirteen balls on an arc from ear to ear."""
    for angle in np.linspace(-0.15, math.pi + 0.15, 13):
        x = -(skull + 8) * math.cos(angle)
        y = 128 - 62 * math.sin(angle)
        draw_oval(pen, x, y, 26, 26, colour)


def draw_fringe_of_curls(pen, skull, colour):
    """Five balls along the forehead."""
    for k in range(-2, 3):
        draw_oval(pen, k * skull / 2.6, 104, 20, 18, colour)


def draw_spikes(pen, skull, colour):
    """Seven triangles, the middle one the highest; the others lean outwards."""
    for k in range(-3, 4):
        foot = k * skull / 3.4
        tip_x = foot + 4 * k
        tip_y = 28 + 4 * k * k
        pen.polygon(place(foot - 24, 112, foot + 24, 112, tip_x, tip_y), colour)


# ---- body and head

def draw_body(pen, look, clothes):
    """Shoulders and neck. clothes: the colour (R, G, B)."""
    shade = darken(pick_colour(look, "skin"), 0.78)
    draw_box(pen, 106, 268, 420, 44, clothes)
    pen.rectangle(place(-30, 225, 30, 284), shade)


def draw_head(pen, look):
    skin = pick_colour(look, "skin")
    shade = darken(skin, 0.78)
    face = FACE[look["face"]]

    # Ears, then the upper half of the head.
    for side in (-1, 1):
        draw_oval(pen, side * face.skull, 172, 13, 19, shade)
    draw_oval(pen, 0, 142, face.skull, 66, skin)

    # The lower half: a box, or an oval and two trapezia that join it to the upper half.
    if look["face"] == "square":
        draw_box(pen, face.skull, 140, face.chin, 26, skin)
    else:
        draw_oval(pen, 0, 206, face.jaw, face.chin - 206, skin)
        draw_cheeks(pen, face.skull, face.jaw, 206, skin)
        draw_cheeks(pen, face.skull, face.jaw * 0.86, 214, skin)


def draw_cheeks(pen, skull, rx, bottom, skin):
    """A trapezium from the full width of the skull to rx pixels on each side at y = bottom."""
    pen.polygon(place(-skull, 142, skull, 142, rx, bottom, -rx, bottom), skin)


# ---- the face

def draw_eyes(pen, look):
    """Both eyes; surprise opens them wide."""
    eyeball = (250, 250, 250)
    iris = pick_colour(look, "eyes")
    pupil = (15, 15, 15)
    half_height = 20 if look["expression"] == "surprised" else 15
    for side in (-1, 1):
        x = side * EYE_DISTANCE[look["spacing"]]
        draw_oval(pen, x, 158, 21, half_height, eyeball)
        draw_oval(pen, x, 158, 13, 13, iris)
        draw_oval(pen, x, 158, 5, 5, pupil)


def draw_brows(pen, look):
    """Two lines: high for surprise, low and tilted towards the nose for anger."""
    y = 131
    tilt = 0
    if look["expression"] == "surprised":
        y = 121
    elif look["expression"] == "angry":
        y = 136
        tilt = 9

    # Each brow is a line over its eye, from its end at the nose to its end at the temple.
    distance = EYE_DISTANCE[look["spacing"]]
    width = BROW_WIDTH[look["brows"]]
    for side in (-1, 1):
        inner = side * (distance - 21)
        outer = side * (distance + 21)
        ends = place(inner, y + tilt, outer, y - tilt)
        pen.line(ends, DARK_BROWN, width)


def draw_nose(pen, look):
    colour = darken(pick_colour(look, "skin"), 0.62)
    if look["nose"] == "small":
        draw_oval(pen, 0, 184, 7, 5, colour)
    elif look["nose"] == "wide":
        draw_box(pen, 20, 180, 193, 6, colour)
    elif look["nose"] == "long":
        pen.polygon(place(-2, 156, 3, 156, 11, 196, -9, 196), colour)


def draw_beard(pen, look):
    """A dark edge shows moustaches and goatees that have nearly the colour of the skin."""
    face = FACE[look["face"]]
    colour = pick_colour(look, "hair_colour")

    # Seven corners, the first one below the nose; a full beard begins with the same moustache.
    moustache = place(0, 196, 28, 194, 40, 220, 22, 212, -22, 212, -40, 220, -28, 194)
    if look["beard"] == "moustache":
        pen.polygon(moustache, colour, DARK_BROWN, 3)
    elif look["beard"] == "goatee":
        goatee = place(-22, 226, 22, face.chin + 8)
        pen.rounded_rectangle(goatee, 14, colour, DARK_BROWN, 3)
    elif look["beard"] == "full":
        around_chin = place(-face.jaw - 4, 160, face.jaw + 4, face.chin + 10)
        pen.pieslice(around_chin, 4, 176, colour)
        cheeks = place(-face.jaw * 0.9, 204, face.jaw * 0.9, 218)
        pen.rectangle(cheeks, colour)
        pen.polygon(moustache, colour)


def draw_mouth(pen, look):
    if look["expression"] == "smiling":
        teeth = (255, 255, 255)
        pen.chord(place(-34, 190, 34, 234), 8, 172, LIPS)
        pen.chord(place(-27, 196, 27, 226), 8, 172, teeth)
    elif look["expression"] == "serious":
        draw_box(pen, 27, 211, 220, 4, LIPS)
    elif look["expression"] == "surprised":
        open_mouth = (70, 16, 24)
        draw_oval(pen, 0, 220, 17, 20, LIPS)
        draw_oval(pen, 0, 220, 11, 14, open_mouth)
    elif look["expression"] == "angry":
        pen.arc(place(-29, 206, 29, 258), 192, 348, LIPS, 9)


def draw_mole(pen, look):
    if look["mole"] == "no":
        return
    side = -1 if look["mole"] == "left" else 1
    x = side * 0.64 * FACE[look["face"]].skull
    colour = (48, 26, 20)
    draw_oval(pen, x, 200, 7, 7, colour)


# ---- accessories

def draw_accessory(pen, look):
    if look["accessory"] == "sunglasses":
        draw_sunglasses(pen, FACE[look["face"]].skull)
    elif look["accessory"] == "hat":
        draw_hat(pen)
    elif look["accessory"] == "scarf":
        draw_scarf(pen)


def draw_sunglasses(pen, skull):
    """A bar from ear to ear and two dark glasses, each with a bright streak."""
    black = (16, 16, 20)
    grey = (90, 94, 110)
    pen.rectangle(place(-skull, 132, skull, 140), black)
    for x in (-37, 37):
        draw_box(pen, 32, 118, 182, 18, black, x)
        pen.line(place(x - 14, 150, x + 2, 130), grey, 6)


def draw_hat(pen):
    """Crown, brim and ribbon."""
    purple = (58, 40, 110)
    dark_purple = (44, 30, 88)
    yellow = (230, 200, 60)
    draw_box(pen, 66, 30, 112, 20, purple)
    draw_box(pen, 98, 98, 120, 10, dark_purple)
    pen.rectangle(place(-66, 84, 66, 98), yellow)


def draw_scarf(pen):
    """A cloth over mouth and chin, with five slanting stripes."""
    red = (196, 36, 84)
    pink = (240, 120, 150)
    draw_box(pen, 88, 196, 284, 26, red)
    for x in (-68, -34, 0, 34, 68):
        pen.line(place(x - 10, 198, x + 6, 282), pink, 7)


def draw_portrait(pen, look, clothes):
    """All parts, from back to front: each covers what was drawn before it."""
    shows_hair = look["accessory"] != "hat"   # a hat hides the whole hair, not only its top
    if shows_hair:
        draw_hair_behind(pen, look)
    draw_body(pen, look, clothes)
    draw_head(pen, look)
    if shows_hair:
        draw_hair_in_front(pen, look)
    draw_eyes(pen, look)
    draw_brows(pen, look)
    draw_nose(pen, look)
    draw_beard(pen, look)
    draw_mouth(pen, look)
    draw_mole(pen, look)
    draw_accessory(pen, look)


# ---------------------------------------------------------------- 3. the photo

def take_photo(canvas, background, rng, size):
    """Turn, scale and shift the canvas, cut 256 × 256 of it, reduce them, change light, add noise.

    canvas: RGB image of 320 × 320 pixels; background: (R, G, B) of what lies outside the canvas;
    rng: np.random.Generator, whose numbers are used in the order of the code.
    Returns an RGB image of size × size pixels.
    """
    angle = rng.normal(0, 0.07)   # radians
    scale = rng.uniform(0.94, 1.06)
    dx, dy = rng.normal(0, 5, 2)   # pixels of the canvas

    # Pillow wants the way back, from the pixel (u, v) of the photo to (x, y) of the canvas:
    #     x =  cos · u + sin · v + x_0
    #     y = −sin · u + cos · v + y_0
    # x_0 and y_0 follow because the middle of the photo, (128, 128), shows (160 + dx, 160 + dy).
    cos = math.cos(angle) / scale
    sin = math.sin(angle) / scale
    x_0 = 160 + dx - 128 * (cos + sin)
    y_0 = 160 + dy - 128 * (cos - sin)
    way_back = (cos, sin, x_0, -sin, cos, y_0)
    photo = canvas.transform((256, 256), Image.Transform.AFFINE, way_back,
                             Image.Resampling.BILINEAR, fillcolor=background)

    # Each pixel of the photo is the mean of its share of the 256 × 256: this smooths all edges.
    photo = photo.resize((size, size), Image.Resampling.BOX)

    # Light is one factor for the whole photo; noise is grey, the same for R, G and B.
    light = rng.uniform(0.88, 1.1)
    noise = rng.normal(0, 1.5, (size, size, 1))
    pixels = np.asarray(photo, np.float32) * light + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_face(identity, scene, rng, size=64):
    """One portrait: an RGB image of size × size pixels.

    identity, scene: {attribute: class number}; together they must name every one of ATTRIBUTES
    (else KeyError), and where both name one, the scene's counts.
    rng: np.random.Generator, or the seed of one, for all that has no label: the colour of the
    clothes, pose, light and noise.
    """
    # Words and colours.
    rng = np.random.default_rng(rng)
    labels = {**identity, **scene}
    look = {name: ATTRIBUTES[name][number] for name, number in labels.items()}
    background = pick_colour(look, "background")
    clothes = tuple(rng.integers(30, 110, 3).tolist())

    # Drawing, then photo: `rng` goes on where the clothes left it.
    canvas = Image.new("RGB", (SIDE, SIDE), background)
    draw_portrait(ImageDraw.Draw(canvas), look, clothes)
    return take_photo(canvas, background, rng, size)
