"""What is asked of every method: people, photos, prompts and noise, written down first.

A plan lives in a folder, and everything that belongs to it does, too:

    plan.json                          what was asked for; another plan is refused there
    references/<person>/000.png …      the nine photos that methods are given, cut to the model's size
    real/<person>/000.png …            held-out photos of the same people, the real ones of FID
    other-photos/<person>/000.png …    more of them, for the row of real photos
    <method>-w-3/<person>/000.png …    what a method made at w = 3 (makers.py); of its second
                                       training <method>-1-w-3
    <method>/seconds-0000.json …       how long each unit of work took

Every method gets the same references, prompts, noise, steps and guidance. Picture k of person p is
picture p·n + k of all, and starts from the noise of seed + p·n + k.
"""

import re
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import torch

from data import LFW, Person, ToyFaces, split
from dreambooth import DreamBooth
from support.checkpoints import digest_encoders
from support.crops import find_crop
from support.files import digest, digest_bytes, digest_file, read_json, write_json

VERSION = 3  # of the pictures: raised by hand when this or any other code makes other ones
REFERENCES = 9
VALIDATION = 100  # people, at most: data.load_people validates on so many


@dataclass
class Settings:
    """What all methods share."""

    device: torch.device
    precision: str
    people: int = 60
    photos: int = 3  # prompts a person, each that of a held-out photo
    seeds: int = 3  # pictures a prompt
    guidance: float = 4.0  # w of eq. 11
    steps: int = 20
    seed: int = 2020  # of the noise
    batch: int = 32
    validation: bool = False  # of the people on whom things are chosen, not of the exam's

    @property
    def n(self):
        """Pictures of a person."""
        return self.photos * self.seeds


@dataclass
class Method:
    """A row that makes pictures: an adapter and what it is given, DreamBooth, or the text alone."""

    title: str
    file: Path = None  # the adapter; None: no references
    agg: str = None
    references: int = REFERENCES  # the first so many photos
    normalise: bool = False  # the references' embeddings to one length
    kinds: tuple = None  # instead: nine photos, each of a kind (makers.Maker.embed_kinds)
    lam: float = 1.0
    guidance: float = None  # w, if it is not that of the settings
    phi: float = 0.0  # of ddpm.rescale_guidance
    dreambooth: DreamBooth = None
    steps: int = None  # of DreamBooth's training, and its peak learning rate; None: as in train.py
    lr: float = None

    def describe(self):
        """What its pictures depend on, as plan.json keeps it: the adapter's content, not its name."""
        facts = asdict(self)
        facts["kinds"] = self.kinds and list(self.kinds)
        facts["file"] = self.file and digest_file(self.file)
        return facts

    @property
    def teaching_key(self):
        """What a model that DreamBooth taught depends on, beside the person."""
        return (*astuple(self.dreambooth), self.steps, self.lr)


@dataclass
class Subject:
    """A person whose pictures are asked for: nine references, and held-out photos.

    held: the real photos of FID and KID; the first of them give the prompts. more: photos for the
    row of real photos, none if there is only one held-out photo.
    """

    person: Person
    references: list
    held: list
    more: list

    @classmethod
    def choose(cls, person, settings):
        """The first nine photos by name are the references; the rest is shared out, half and half.

        At most n photos each; if there are few, the prompts come first.
        """
        references = person.photos[:REFERENCES]
        rest = person.photos[REFERENCES:]
        half = max((len(rest) + 1) // 2, settings.photos)
        half = min(half, settings.n)
        return cls(person, references, rest[:half], rest[half:][: settings.n])

    @property
    def name(self):
        return self.person.name


@dataclass
class Plan:
    """The whole of it. model: digests of the networks. methods: {folder: Method}."""

    out: Path
    settings: Settings
    subjects: list
    model: str
    methods: dict = field(default_factory=dict)

    @property
    def n(self):
        return self.settings.n

    def scenes(self, p):
        """(n,): the held-out photo of person p whose prompt, and so whose scene, picture k has.

        The first `photos` of them; somebody who has fewer is asked for the same ones again.
        """
        asked = torch.arange(self.settings.photos) % len(self.subjects[p].held)
        return asked.repeat_interleave(self.settings.seeds)

    def shots(self, p):
        """The held-out photos that the n pictures of person p should be like."""
        return [self.subjects[p].held[q] for q in self.scenes(p)]

    @property
    def prompts(self):
        """The prompts of all pictures: P·n."""
        return [shot.prompt for p in range(len(self.subjects)) for shot in self.shots(p)]

    @property
    def knows_truth(self):
        """Whether the photos carry labels: toy people do."""
        return bool(self.subjects[0].held[0].labels)

    def files(self, folder, p, count=None):
        """The files of the pictures of person p in one of the folders above; count: default n."""
        count = self.n if count is None else count
        place = self.out / folder / self.subjects[p].name
        return [place / f"{k:03d}.png" for k in range(count)]

    def photo_files(self, p):
        """{folder: (files, photos)} of the photos of person p."""
        subject = self.subjects[p]
        folders = {"references": subject.references, "real": subject.held,
                   "other-photos": subject.more}
        pairs = {}
        for name, photos in folders.items():
            pairs[name] = (self.files(name, p, len(photos)), photos)
        return pairs

    def describe(self):
        """The content of plan.json."""
        settings = asdict(self.settings)
        settings["device"] = self.settings.device.type
        settings["people"] = len(self.subjects)
        people = {}
        for p, subject in enumerate(self.subjects):
            people[subject.name] = {
                "noun": subject.person.noun,
                "references": [photo.name for photo in subject.references],
                "held out": [photo.name for photo in subject.held + subject.more],
                "prompts": [shot.prompt for shot in self.shots(p)],
                "digest": digest_bytes([photo.key for photo in subject.person.photos]),
            }
        methods = {name: method.describe() for name, method in self.methods.items()}
        return {"version": VERSION, "model": self.model, **settings, "persons": people,
                "methods": methods}

    @property
    def path(self):
        return self.out / "plan.json"

    def check(self):
        """The content of the plan.json that is there, None if there is none.

        Methods may be added to a plan, everything else must be the same. ValueError says what
        differs.
        """
        if not self.path.exists():
            return None
        found = read_json(self.path)
        wrong = find_differences(found, self.describe())
        if wrong:
            hint = "give another --out, or move this folder away"
            raise ValueError(f"{self.path} is another plan ({'; '.join(wrong[:5])}): {hint}")
        return found

    def settle(self):
        """Write plan.json, or check it against the one that is there, and add its methods."""
        found = self.check()
        wanted = self.describe()
        if found:
            wanted["methods"] = {**found["methods"], **wanted["methods"]}
        if wanted != found:
            write_json(self.path, wanted)


def find_differences(found, wanted):
    """What two contents of plan.json do not have in common, in words."""
    if not isinstance(found, dict) or not isinstance(found.get("methods"), dict):
        return ["it is not one of this program"]
    wrong = []
    for key, value in wanted.items():
        old = found.get(key)
        if key == "methods":
            shared = [name for name in value if name in old]
            wrong += [f"another {name}" for name in shared if old[name] != value[name]]
        elif key == "persons" and old != value:
            wrong.append("other people, photos or prompts")
        elif key == "model" and old != value:
            wrong.append("another model")
        elif old != value:
            wrong.append(f"{key} {old}, not {value}")
    return wrong


def make_plan(out, settings, sd, source):
    """The plan of people from `source` for a model, without methods. ValueError: too few people."""
    subjects = choose_subjects(source, sd.image_size, settings, find_crop(sd.preprocessor))
    model = f"{digest(sd.unet, sd.vae)} {digest_encoders(sd)}"
    return Plan(out, settings, subjects, model)


def choose_subjects(source, size, settings, crop=None):
    """People that nothing was trained on.

    source: "toy": of ToyFaces' seed 2, after the hundred of validation. A folder like LFW: of the
    held-out third (data.split), those with more than nine photos. Only if fewer than a hundred others
    are held out, train.py validates on some of them; they are among the first hundred held out, who
    come last here. crop: of a folder's photos.

    settings.validation: of toy people the hundred, and nobody else.
    """
    if source == "toy":
        photos = REFERENCES + 2 * settings.n
        first = 0 if settings.validation else VALIDATION
        last = first + settings.people
        if settings.validation and last > VALIDATION:
            raise ValueError(f"--people {settings.people}: there are {VALIDATION} for validation")
        people = ToyFaces(last, photos, size, seed=2).people[first:]
        return [Subject.choose(person, settings) for person in people]
    _, held_out = split(LFW(source, size, crop=crop).people)
    held_out = held_out[VALIDATION:] + held_out[:VALIDATION]
    people = [person for person in held_out if len(person.photos) > REFERENCES]
    if len(people) < 2:
        needs = f"two people with at least {REFERENCES + 1} photos each are needed"
        raise ValueError(f"{source}: {needs}, among the held-out third there are {len(people)}")
    if len(people) < settings.people:
        print(f"note: {source} has {len(people)} held-out people with at least "
              f"{REFERENCES + 1} photos, not {settings.people}: the table is of these")
    return [Subject.choose(person, settings) for person in people[: settings.people]]


def name_person(prompt, noun):
    """The prompt for DreamBooth: "a photo of a man" -> "a photo of a sks man"."""
    named, count = re.subn(r"\b(man|woman|person)\b", f"sks {noun}", prompt, count=1)
    return named if count else f"{prompt}, a sks {noun}"
