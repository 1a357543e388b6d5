"""The figures of the course, of what happens inside, and that of the README.

    python -m experiments.figures                 all of them, to assets/course
    python -m experiments.figures vae attention   only these

Model: weights/tiny. Self-attention: runs/selfattn, trained first (five minutes) if it is not there.
"""

from pathlib import Path

import torch

from experiments import figures_attention, figures_diffusion, figures_method, figures_numbers
from experiments.figures_common import World
from support.checkpoints import TINY
from support.program import make_parser, run

FIGURES = {  # name of the file: what draws it
    "method": figures_method.draw_method,
    "dataflow": figures_method.draw_dataflow,
    "noising": figures_diffusion.draw_noising,
    "samplers": figures_diffusion.draw_samplers,
    "guidance": figures_diffusion.draw_guidance,
    "vae": figures_diffusion.draw_vae,
    "attention": figures_attention.draw_attention,
    "selfattn_weights": figures_attention.draw_selfattn_weights,
    "strangers": figures_attention.draw_strangers,
    "references": figures_numbers.draw_references,
    "prior": figures_numbers.draw_prior,
    "fid_bias": figures_numbers.draw_fid_bias,
}


def parse_arguments():
    parser = make_parser(__doc__)
    parser.ranges["steps"] = parser.ranges["long_steps"] = (1, 1000)
    parser.ranges["people"] = (6, 1000)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)} (default: all)")
    add("--model", type=Path, default=TINY, help="checkpoint folder with adapter and FeatureNet")
    add("--runs", type=Path, default=Path("runs"), help="adapters, and results of sweeps")
    add("--people", type=int, default=60, help="people that numbers are means over")
    add("--steps", type=int, default=20, help="UNet evaluations a picture")
    add("--long-steps", type=int, default=1000, help="the most of them, in samplers.png")
    add("--seed", type=int, default=0, help="of the noise")
    add("--out", type=Path, default=Path("assets/course"), help="folder; method.png goes above it")
    return parser.parse_args()


def main():
    args = parse_arguments()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        raise ValueError(f"no figure {unknown[0]!r}: choose of {', '.join(FIGURES)}")
    world = World(args.model, args.runs, args.people, args.steps, args.long_steps, args.seed)
    for name in args.names or FIGURES:
        folder = args.out.parent if name == "method" else args.out
        path = folder / f"{name}.png"
        with torch.no_grad():
            FIGURES[name](world, path)
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    run(main)
