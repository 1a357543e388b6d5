"""Boxes and arrows: the method with shapes at both scales, and the tensors of one step of training."""

import torch

from experiments.figures_common import save_small
from support.pictures import to_tensor
from support.plots import save_figure

FROZEN = "#dbe7f3"
TRAINED = "#f9d9a8"
DATA = "white"

BOXES = {  # name: (x, y of the centre, width, text, colour)
    "photos": (1.0, 4.0, 1.5, "references\n$x_1 … x_N$", DATA),
    "clip": (3.2, 4.0, 1.7, "CLIP image\nencoder $Γ_i$", FROZEN),
    "G": (5.9, 4.0, 1.7, "aggregator $G$\n(Algorithm 1)", TRAINED),
    "project": (8.5, 4.0, 1.7, "Linear,\nLayerNorm", TRAINED),
    "image": (12.2, 4.0, 2.6, "$Attention(Q, K', V')$\n$K' = c_i W'_k, V' = c_i W'_v$", TRAINED),
    "prompt": (1.0, 2.2, 1.5, "prompt $τ$", DATA),
    "text": (3.2, 2.2, 1.7, "CLIP text\nencoder $Γ_τ$", FROZEN),
    "attention": (12.2, 2.2, 2.6, "$Attention(Q, K, V)$\n$K = c_τ W_k, V = c_τ W_v$", FROZEN),
    "removed": (1.0, 0.4, 1.5, "removed\nphoto $x_j$", DATA),
    "vae": (3.2, 0.4, 1.7, "VAE, then\nnoise (eq. 8)", FROZEN),
    "unet": (12.2, 0.4, 2.6, "UNet: $Z$ in, $Z_{new}$ out\nin every text attention", FROZEN),
    "eps": (15.6, 0.4, 1.2, "$\\hat{ε}$", DATA),
}
ARROWS = {  # from, to: the text over it
    ("photos", "clip"): "",
    ("clip", "G"): "embeds\n(N, E)",
    ("G", "project"): "(M, E)",
    ("project", "image"): "$c_i$\n(4M, D)",
    ("prompt", "text"): "",
    ("text", "attention"): "$c_τ$ (L, D)",
    ("removed", "vae"): "",
    ("vae", "unet"): "$z_t$ (4, h, w)",
    ("image", "attention"): "$+ λ ·$",
    ("attention", "unet"): "$Z_{new}$ (3)",
    ("unet", "attention"): "$Q = Z W_q$",
    ("attention", "image"): "$Q$",
    ("unet", "eps"): "",
}
SHAPES = [
    ["", "pixels", "h = w", "N", "M", "E", "D", "L", "text attentions", "UNet", "adapter", "G"],
    ["tiny", "64", "16", "9", "9", "128", "128", "48", "4", "4.0 M", "0.20 M", "0.07 M"],
    ["SD 1.5", "512", "64", "9", "9", "1024", "768", "77", "16", "860 M", "22.3 M", "4.2 M"],
]


def draw_box(axis, x, y, width, text, colour, height=0.95):
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.1"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec="black"))
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def draw_arrow(axis, start, end, text):
    """From the right side of a box to the left of the next; down on the left, up on the right."""
    style = dict(arrowstyle="->", lw=1.2)
    if start[0] == end[0]:
        is_down = start[1] > end[1]
        side = -0.5 if is_down else 0.5
        x = start[0] + side
        y_start = start[1] + (-0.5 if is_down else 0.5)
        y_end = end[1] + (0.5 if is_down else -0.5)
        axis.annotate("", (x, y_end), (x, y_start), arrowprops=style)
        align = "right" if is_down else "left"
        y = (y_start + y_end) / 2
        axis.text(x + 0.2 * side, y, text, fontsize=8, va="center", ha=align)
        return
    left = start[0] + start[2] / 2 + 0.04
    right = end[0] - end[2] / 2 - 0.04
    axis.annotate("", (right, end[1]), (left, start[1]), arrowprops=style)
    axis.text((left + right) / 2, start[1] + 0.08, text, fontsize=8, ha="center", va="bottom")


def draw_method(world, path):
    """The figure of the README."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 16.5), ylim=(-1.9, 5.0))
    axis.axis("off")
    for (start, end), text in ARROWS.items():
        draw_arrow(axis, BOXES[start], BOXES[end], text)
    for box in BOXES.values():
        draw_box(axis, *box)
    draw_box(axis, 15.6, 4.0, 1.2, "trained", TRAINED, height=0.45)
    draw_box(axis, 15.6, 3.3, 1.2, "frozen", FROZEN, height=0.45)
    axis.text(7.2, 3.25, "M = N for self-attention and concatenation, 1 for the others",
              fontsize=8, ha="center")
    table = axis.table(SHAPES, bbox=(0.02, 0.0, 0.96, 0.19), cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(path, figure)


# ---------------------------------------------------------------- one step, with measured shapes

PLACES = {  # name: (x, y, words)
    "photos": (1.0, 5.6, "nine references"),
    "embeds": (3.6, 5.6, "embeds"),
    "G": (6.2, 5.6, "G(embeds)"),
    "c_i": (8.8, 5.6, "image tokens $c_i$"),
    "prompt": (1.0, 4.2, "prompt $τ$"),
    "c_t": (8.8, 4.2, "text tokens $c_τ$"),
    "photo": (1.0, 2.4, "removed photo $x_j$"),
    "z_0": (3.6, 2.4, "latent $z_0$"),
    "z_t": (3.6, 0.6, "$z_t$"),
    "conv_in": (6.2, 0.6, "conv_in"),
    "down_blocks.0": (8.8, 0.6, "down block 0"),
    "down_blocks.1": (11.4, 0.6, "down block 1\n+ attention"),
    "mid_block": (14.0, 1.5, "middle\n+ attention"),
    "up_blocks.0": (11.4, 2.4, "up block 0\n+ attention"),
    "up_blocks.1": (8.8, 2.4, "up block 1"),
    "conv_out": (6.2, 2.4, "$\\hat{ε}$ (conv_out)"),
}
FLOWS = [  # from, to, words
    ("photos", "embeds", "$Γ_i$"), ("embeds", "G", "Alg. 1"),
    ("G", "c_i", "Linear,\nLayerNorm"), ("prompt", "c_t", "$Γ_τ$"), ("photo", "z_0", "VAE"),
    ("z_0", "z_t", "eq. 8"), ("z_t", "conv_in", ""), ("conv_in", "down_blocks.0", ""),
    ("down_blocks.0", "down_blocks.1", ""), ("down_blocks.1", "mid_block", ""),
    ("mid_block", "up_blocks.0", ""), ("up_blocks.0", "up_blocks.1", ""),
    ("up_blocks.1", "conv_out", ""), ("down_blocks.0", "up_blocks.1", "skips"),
    ("down_blocks.1", "up_blocks.0", "skips"),
]
WITH_TOKENS = ("down_blocks.1", "mid_block", "up_blocks.0")


def measure_shapes(world):
    """{name: shape without the batch} of every tensor of PLACES, in one step of training."""
    sd = world.sd
    person = world.faces[0]
    adapter = world.selfattn()
    photos = to_tensor([photo.image for photo in person.photos])
    found = {"photos": (9, *photos.shape[1:]), "photo": photos.shape[1:]}
    embeds = sd.embed_images(photos[1:])[None]
    found["embeds"] = embeds.shape[1:]
    found["G"] = adapter.aggregator(embeds).shape[1:]
    c_i = adapter.tokens(embeds)
    found["c_i"] = c_i.shape[1:]
    c_t = sd.encode_prompts([person.photos[0].prompt])
    found["c_t"] = c_t.shape[1:]
    z_0 = sd.encode_latents(photos[:1])
    found["z_0"] = found["z_t"] = z_0.shape[1:]

    # What the blocks of the UNet answer; a block on the way down answers a list, the last counts.
    def keep(name):
        def hook(layer, inputs, output):
            last = output if torch.is_tensor(output) else output[-1]
            found[name] = last.shape[1:]

        return hook

    modules = dict(sd.unet.named_modules())
    names = [name for name in PLACES if name in modules]
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    sd.unet(z_0, 500, c_t, c_i)
    for hook in hooks:
        hook.remove()
    return found


def draw_dataflow(world, path):
    """One step of training: every tensor with the shape that it really has."""
    from matplotlib.figure import Figure

    shapes = measure_shapes(world)
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.1, 15.1), ylim=(-0.1, 6.3))
    axis.axis("off")
    for name, (x, y, words) in PLACES.items():
        colour = TRAINED if name in ("G", "c_i") else FROZEN if name in WITH_TOKENS else DATA
        shape = " × ".join(map(str, shapes[name])) if name in shapes else "a sentence"
        draw_box(axis, x, y, 1.7, f"{words}\n{shape}", colour, height=1.0)
    for start, end, words in FLOWS:
        connect(axis, PLACES[start], PLACES[end], words)
    # The tokens go to every block with attention.
    for y in (5.6, 4.2):
        axis.plot([9.67, 14.0], [y, y], color="black", lw=1.2)
    axis.plot([14.0, 14.0], [5.6, 4.2], color="black", lw=1.2)
    arrow = dict(arrowstyle="->", lw=1.2)
    axis.annotate("", (14.0, 2.02), (14.0, 4.2), arrowprops=arrow)
    axis.annotate("", (12.0, 2.92), (14.0, 4.2), arrowprops=arrow)
    axis.text(14.15, 3.5, "eq. 3, in all\nblocks with\nattention", fontsize=8, va="center")
    legend = "orange: trained; blue: reads them by $W'_k$ and $W'_v$, which are trained, too"
    axis.text(6.4, 3.35, legend, fontsize=8, ha="center")
    axis.text(4.9, 1.5, "loss, eq. 1:\n$‖ε − \\hat{ε}‖^2$", fontsize=9, ha="center", va="center")
    save_small(path, figure)


def connect(axis, start, end, words):
    """An arrow from the edge of one box to the edge of another."""
    x, y = start[:2]
    x_end, y_end = end[:2]
    arrow = dict(arrowstyle="->", lw=1.2)
    if x == x_end:  # up or down
        side = 0.54 if y_end > y else -0.54
        axis.annotate("", (x, y_end - side), (x, y + side), arrowprops=arrow)
        axis.text(x + 0.1, (y + y_end) / 2, words, fontsize=8, va="center")
        return
    side = 0.88 if x_end > x else -0.88
    axis.annotate("", (x_end - side, y_end), (x + side, y), arrowprops=arrow)
    axis.text((x + x_end) / 2, (y + y_end) / 2 + 0.08, words, fontsize=8, ha="center", va="bottom")
