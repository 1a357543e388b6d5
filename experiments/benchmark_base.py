"""How good weights/tiny is: what FeatureNet reads off photos and off pictures of that model.

    python -m experiments.benchmark_base        five minutes on two CPU cores

For every attribute, on people that nobody was trained on, the share of right answers:
  photo      off photos
  trip       off their round trips through the VAE
  scene      off pictures made from captions that name the scene alone
  traits     off pictures made from captions that name the scene and five traits of the person
Only what can be seen counts and, in the last two columns, only what the caption names.
"""

import math

import numpy as np
import torch

from experiments.base_data import make_faces
from experiments.base_tasks import encode_and_decode
from experiments.makers import make_pictures
from experiments.plan import Settings
from support.checkpoints import TINY
from support.devices import autocast, pick_device, pick_precision
from support.pictures import to_tensor
from support.program import make_parser, run
from toyfaces.captions import describe_traits, write_prompt
from toyfaces.drawing import ATTRIBUTES, IDENTITY, SCENE, visible_attributes
from toyfaces.judge import FeatureNet, label_tensors, share_right
from unet import StableDiffusion

BATCH = 64  # pictures at once


def choose_traits(labels, rng, count=5):
    """The names of `count` traits of the person that can be seen, in random order."""
    names = [name for name in visible_attributes(labels) if name in IDENTITY]
    return rng.permutation(names)[:count].tolist()


def write_long_caption(labels, traits):
    """A caption that names the whole scene and, of the person, the attributes `traits`."""
    scene = {name: labels[name] for name in SCENE}
    identity = {name: labels[name] for name in traits}
    return write_prompt(scene, describe_traits(identity))


def find_named(traits):
    """Which attributes write_long_caption names: (n, A) of n lists of traits."""
    named = []
    for names in traits:
        named.append([name in names or name in SCENE for name in ATTRIBUTES])
    return torch.tensor(named)


def score(judge, images, classes, asked, device):
    """Share of right answers for every attribute: a list of A numbers, nan where none is asked for.

    images (n, 3, 64, 64) in [−1, 1]; classes, asked (n, A): the truth, and what counts.
    """
    parts = [judge(part.to(device)) for part in images.split(BATCH)]
    answers = {}
    for name in ATTRIBUTES:
        answers[name] = torch.cat([part[name] for part in parts])
    return share_right(answers, classes, asked).tolist()


def measure_columns(sd, judge, faces, pictures, settings):
    """{column: share of right answers for every attribute}.

    pictures: how many to make for each of the last two columns, as `settings` say.
    """
    device = settings.device
    classes, seen = label_tensors(faces.labels)
    labels = faces.labels[:pictures]
    rng = np.random.default_rng(0)
    traits = [choose_traits(one, rng) for one in labels]

    # Photos and their round trips.
    photos = to_tensor(faces.pixels)
    round_trips = [encode_and_decode(sd, part) for part in faces.pixels.split(BATCH)]
    round_trips = to_tensor(torch.cat(round_trips))
    columns = {
        "photo": score(judge, photos, classes, seen, device),
        "trip": score(judge, round_trips, classes, seen, device),
    }
    # Pictures from captions, without traits and with them.
    n = len(labels)
    for column, names in {"scene": [[]] * n, "traits": traits}.items():
        captions = [write_long_caption(one, some) for one, some in zip(labels, names)]
        images = to_tensor(make_pictures(sd, captions, settings, settings.seed))
        asked = seen[:n] & find_named(names)
        columns[column] = score(judge, images, classes[:n], asked, device)
    return columns


def print_columns(columns):
    print(f"{'attribute':12} {'  '.join(column.ljust(5) for column in columns)}")
    for name, *shares in zip(ATTRIBUTES, *columns.values()):
        cells = ["-" if math.isnan(share) else f"{share:.3f}" for share in shares]
        print(f"{name:12} {'  '.join(cell.ljust(5) for cell in cells)}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--people", type=int, default=100, help="people, with ten photos each")
    parser.add_argument("--pictures", type=int, default=512, help="pictures to make, at most as "
                        "many as photos, for each of two kinds of captions")
    args = parser.parse_args()
    device = pick_device("auto")
    settings = Settings(device, pick_precision("auto", device), seed=0, batch=BATCH)
    faces = make_faces(args.people, seed=2)
    pictures = min(args.pictures, len(faces.labels))
    sd = StableDiffusion.load(TINY, device)
    judge = FeatureNet.load(TINY / "feature_net").to(device)
    with torch.inference_mode(), autocast(device, settings.precision):
        columns = measure_columns(sd, judge, faces, pictures, settings)
    made = f"{pictures} pictures of a scene in words, as many of it and five traits"
    print(f"{len(faces.labels)} photos, their VAE round trips, {made} (w = 4, 20 steps)")
    print_columns(columns)


if __name__ == "__main__":
    run(main)
