"""Did the model learn photos by heart? The nearest training photo of every generated picture.

    python -m experiments.memorised --model weights/photos --data path/to/lfw-deepfunneled \
        --faces mobilefacenet.pt --pictures runs/table/one-photo-w-4

Nearest is by cosine in MobileFaceNet's space, among all photos that weights/photos was trained on
(base_data.choose_people). The same is asked of real photos of held-out people: strangers look like
somebody, too. A model that copies has a share of pictures far above the 99th percentile of these.
The nearest pairs are drawn, to look at: memorised.png.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import LFW, split
from experiments.base_data import choose_people, read_faces
from support.crops import read_crop
from support.devices import pick_device
from support.face_net import MobileFaceNet, find_face_box
from support.files import write_json
from support.pictures import PICTURES, crop_square, load_image, save_grid, to_bytes, to_tensor
from support.program import device_name, file_path, make_parser, run

SIZE = 64  # pixels
SHARES = (0.5, 0.9, 0.99)


@torch.inference_mode()
def read_directions(net, pixels, title):
    """uint8 (n, 3, H, W) -> unit vectors (n, 128) on the CPU."""
    device = next(net.parameters()).device
    parts = []
    for part in tqdm(pixels.split(16), title, leave=False):  # by 64: 2.5 times as slow
        faces = net.resize(to_tensor(part).to(device))
        parts.append(net.read(faces)[0].float().cpu())
    return F.normalize(torch.cat(parts), dim=1)


def find_nearest(vectors, training):
    """For unit vectors (n, E) the cosine (n,) and the number (n,) of the nearest of training (m, E)."""
    found = [(part @ training.T).max(dim=1) for part in vectors.split(256)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def compare(made, real):
    """Percentiles of both, and the share of `made` above the 99th percentile of `real`."""
    limit = real.quantile(SHARES[-1])
    answer = {"pictures": len(made), "held-out photos": len(real)}
    for share in SHARES:
        answer[f"pictures, {share:.0%}"] = float(made.quantile(share))
        answer[f"held-out photos, {share:.0%}"] = float(real.quantile(share))
    answer["above the 99 % of held-out photos"] = float((made > limit).float().mean())
    return answer


def read_pictures(folder, size):
    """All pictures in a folder and below: uint8 (n, 3, size, size). ValueError if there are none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: no pictures; give a folder of generated ones")
    images = [crop_square(load_image(file), size) for file in files]
    return to_bytes(to_tensor(images))


def draw_nearest(path, made, training, cosines, numbers, count=10):
    """Rows: the pictures that are nearest to a training photo, and these photos."""
    order = cosines.argsort(descending=True)[:count]
    rows = [list(to_tensor(made[order])), list(to_tensor(training[numbers[order]]))]
    save_grid(path, rows, captions=["generated", "nearest training photo"], side=96)


def check_memory(model, data, faces, pictures, out, device):
    """Prints the comparison; writes memorised.json and memorised.png into the folder `out`."""
    crop = read_crop(model)
    net = MobileFaceNet(faces, find_face_box(crop)).to(device)
    made = read_pictures(pictures, SIZE)
    learned, _ = choose_people(data, SIZE, crop)
    _, strangers = split(LFW(data, SIZE, crop=crop).people)
    training = read_faces(learned).pixels
    real = read_faces(strangers).pixels
    known = read_directions(net, training, "training photos")
    cosines, numbers = find_nearest(read_directions(net, made, "pictures"), known)
    usual, _ = find_nearest(read_directions(net, real, "held-out photos"), known)
    answer = compare(cosines, usual)
    for name, value in answer.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    write_json(out / "memorised.json", answer)
    draw_nearest(out / "memorised.png", made, training, cosines, numbers)
    print(f"wrote {out}/memorised.json, memorised.png")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="weights/photos", help="folder of the model: it says how photos are cut")
    add("--data", type=Path, required=True, help="the folder that it was trained on")
    add("--faces", type=file_path, required=True, help="mobilefacenet.pt of foamliu/MobileFaceNet")
    add("--pictures", type=Path, required=True, help="folder of generated pictures, or of folders")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, default=Path("runs/memorised"), help="folder for results")
    args = parser.parse_args()
    device = pick_device(args.device)
    check_memory(args.model, args.data, args.faces, args.pictures, args.out, device)


if __name__ == "__main__":
    run(main)
