"""The figure of the README that no other experiment draws: the method, with shapes at both scales.

    python -m experiments.figures
"""

from pathlib import Path

from support.plots import save_figure
from support.program import make_parser, run

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


def draw_method(path):
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


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("assets/method.png"), help="picture")
    args = parser.parse_args()
    draw_method(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
