"""Pictures to look at after a stage of base.py: is it good enough to go on?"""

import torch

from ip_adapter import generate
from support.devices import device_of
from support.pictures import save_grid, to_tensor

SHOWN = 12  # pictures in a row


@torch.inference_mode()
def save_round_trips(path, sd, held):
    """Rows: photos of validation people, and the same through the VAE and back."""
    photos = to_tensor(held.pixels[:SHOWN])
    z = sd.encode_latents(photos)
    made = sd.decode_latents(z).float().cpu()
    save_grid(path, [list(photos), list(made)], captions=["photo", "round trip"], side=96)
    print(f"wrote {path}")


@torch.inference_mode()
def save_text_pictures(path, sd, prompts, w=4.0, steps=20):
    """A row of pictures for each of the four most frequent prompts."""
    frequent = sorted(set(prompts), key=prompts.count, reverse=True)[:4]
    device = device_of(sd.unet)
    rows = []
    for prompt in frequent:
        c_t = sd.encode_prompts([prompt]).float().to(device)
        null_c_t = sd.encode_prompts([""]).float().to(device)
        made = generate(sd, c_t.expand(SHOWN, -1, -1), null_c_t, w=w, steps=steps)
        rows.append(list(made.float().cpu()))
    save_grid(path, rows, captions=frequent, side=96)
    print(f"wrote {path}")
