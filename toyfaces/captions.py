"""Sentences about drawn portraits.

A *prompt* names the scene of a photo and nothing of the person: it is what a user asks for.
A *caption* names parts of the scene and of the identity, like captions of real photos: the base
model is trained on these, so that it learns the words of both.
Neither names what the accessory of the photo hides.
"""

from toyfaces.drawing import IDENTITY, SCENE, visible_attributes

# The noun of an attribute where it is not the attribute's name.
NOUN = {"hair_colour": "hair", "spacing": "eyes"}
# Attributes whose phrase begins with "a".
COUNTABLE = ("nose", "face", "beard", "mole")
ACCESSORY = {"sunglasses": "sunglasses", "hat": "a hat", "scarf": "a scarf"}


def describe_trait(name, word):
    """One trait: ("beard", "full") -> "a full beard", ("beard", "no") -> "no beard"."""
    if word in ("moustache", "goatee"):   # these are nouns already
        return f"a {word}"
    noun = NOUN.get(name, name)
    if name in COUNTABLE and word != "no":
        return f"a {word} {noun}"
    return f"{word} {noun}"


def describe_traits(identity):
    """The part of a sentence that tells what a person looks like; "" for no traits.

    identity: {attribute: class number}, all of IDENTITY or a part, in the order to be named.
    Style and colour of the hair become one phrase, in the place of the style.

    >>> describe_traits({"skin": 0, "hair": 2, "hair_colour": 2, "beard": 0})
    ' with pale skin, curly red hair, no beard'
    """
    phrases = []
    for name, number in identity.items():
        word = IDENTITY[name][number]
        # Style and colour of the hair make one phrase: "curly red hair".
        if name == "hair_colour" and "hair" in identity:
            continue
        if name == "hair" and "hair_colour" in identity:
            colour = IDENTITY["hair_colour"][identity["hair_colour"]]
            word = f"{word} {colour}"
        phrases.append(describe_trait(name, word))
    if not phrases:
        return ""
    return " with " + ", ".join(phrases)


def write_prompt(scene, traits=""):
    """The sentence for what can be seen of a scene.

    scene: {attribute: class number}; what it lacks is left out.
    traits: words about the person, as `describe_traits` returns them.

    >>> write_prompt({"background": 1, "expression": 3, "accessory": 2})
    'a photo of an angry person wearing a hat, green background'
    """
    words = {}
    for name in visible_attributes(scene):
        words[name] = SCENE[name][scene[name]]

    # The person, with "an" before a vowel: "an angry person", "a smiling person".
    person = "person"
    if "expression" in words:
        person = f"{words['expression']} person"
    article = "an" if person[0] in "aeiou" else "a"
    text = f"a photo of {article} {person}{traits}"

    # What the person wears; after a list of traits it needs a comma.
    if words.get("accessory") in ACCESSORY:
        comma = "," if traits else ""
        text += f"{comma} wearing {ACCESSORY[words['accessory']]}"

    if "background" in words:
        text += f", {words['background']} background"
    return text


def write_caption(labels, rng, traits=None):
    """A caption as people write them: parts of the scene, and some traits of the person.

    labels: {attribute: class number} of a photo, identity and scene.
    rng: np.random.Generator; it chooses the traits and their order, and leaves out each attribute
    of the scene with probability 0.15.
    traits: how many, of those that can be seen; None draws 0 to 8.

    A caption that leaves out the scarf may name the expression under it. These are 3 % of the
    captions that weights/tiny was trained on.

    >>> import numpy as np
    >>> labels = dict.fromkeys([*IDENTITY, *SCENE], 0)
    >>> write_caption(labels, np.random.default_rng(0), traits=2)
    'a photo of a smiling person with close-set eyes, a small nose, red background'
    """
    # Traits of the person: some of those that can be seen, in random order.
    names = [name for name in visible_attributes(labels) if name in IDENTITY]
    order = rng.permutation(names)
    if traits is None:
        traits = rng.integers(9)
    identity = {name: labels[name] for name in order[:traits]}

    # Parts of the scene.
    scene = {}
    for name in SCENE:
        if rng.random() > 0.15:
            scene[name] = labels[name]
    return write_prompt(scene, describe_traits(identity))
