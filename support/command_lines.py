"""The command lines of train.py, sample.py and metrics.py: what may be asked for, and with what."""

from pathlib import Path

from support.checkpoints import TINY
from support.inception import InceptionV3
from support.program import add_device_arguments, device_name, file_path, make_parser


def parse_training(text, aggregators):
    """The arguments of train.py. text: for --help; ValueError: some that do not go together."""
    parser = make_parser(text)
    add = parser.add_argument
    add("--method", choices=["adapter", "dreambooth"], default="adapter", help="what to train")
    add("--agg", choices=aggregators, default="selfattn", help="aggregator of references")
    add("--model", default=str(TINY), help="checkpoint folder, single file or hub id (default: "
        "weights/tiny)")
    add("--image-encoder", help="folder or hub id of the CLIP image encoder, if not in --model; or the "
        "file of a face recogniser, mobilefacenet.pt")
    add("--data", default="toy", help="toy, or a folder with one folder of photos a person")
    add("--people", type=int, default=800, help="toy people to draw and train on")
    add("--strangers", type=float, default=0.0, metavar="P", help="beyond the paper: the probability "
        "that one to three references show somebody else")
    add("--init", type=Path, help="adapter file to start from (default: the one in --model)")
    add("--steps", type=int, help="optimiser steps (default: 400; DreamBooth: 200, of SD 1.5 800)")
    add("--batch", type=int, help="photos a step (default: 64; DreamBooth: 8 and 8, of SD 1.5 1 and 1)")
    add("--accumulate", type=int, default=1, help="batches added up before each optimiser step")
    add("--lr", type=float, help="peak learning rate (default: 1e-3; SD 1.5: 1e-4, DreamBooth of all of it 5e-6)")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    add("--every", type=int, default=100, help="steps between checkpoints and validations")
    add("--seed", type=int, default=0, help="of the random numbers of training")
    add_device_arguments(parser)
    add("--out", type=Path, help="folder for results (default: runs/<agg> or runs/dreambooth)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add = parser.add_argument_group("--method dreambooth").add_argument
    add("--images", type=Path, help="folder of photos of one person, one to hundreds")
    add("--noun", help="the class: man, woman, person, dog, …")
    add("--identifier", default="sks", help="rare word for the person")
    add("--prior-weight", type=float, default=1.0, help="λ of the class term; 0: no class pictures")
    add("--class-images", type=int, default=200, help="class pictures that are made first")
    add("--train-text-encoder", action="store_true", help="train it too")
    add("--lora", type=int, metavar="RANK", help="train only updates of this rank of the attention")
    args = parser.parse_args()
    check_training(args)
    return args


def check_training(args):
    of_dreambooth = args.images or args.noun or args.lora or args.train_text_encoder
    if args.method == "adapter" and of_dreambooth:
        flags = "--images, --noun, --lora and --train-text-encoder"
        raise ValueError(f"{flags} are for --method dreambooth")
    if args.method == "dreambooth" and not (args.images and args.noun):
        needs = "--images, a folder of photos, and --noun, what they show"
        raise ValueError(f"--method dreambooth needs {needs}")
    if args.data != "toy" and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder; give one with a folder a person")
    if args.method == "dreambooth" and len(f"{args.identifier} {args.noun}") > 200:
        raise ValueError("--identifier and --noun are a word or two, not more than 200 characters")
    if args.lora and args.train_text_encoder:
        raise ValueError("--lora trains the UNet only: leave --train-text-encoder out")


def parse_sampling(text, aggregators):
    """The arguments of sample.py; text, ValueError: as above."""
    parser = make_parser(text)
    parser.ranges["steps"] = (1, 1000)
    add = parser.add_argument
    add("--model", default=str(TINY), help="checkpoint folder, single file or hub id (default: "
        "weights/tiny)")
    add("--image-encoder", help="folder or hub id of the CLIP image encoder, if not in --model; or the "
        "file of a face recogniser, mobilefacenet.pt")
    add("--adapter", type=file_path, help="adapter file (default: of weights/tiny the newest in runs/, else "
        "the one in --model)")
    add("--refs", type=file_path, nargs="+", help="photos of one person (default: with weights/tiny a "
        "toy person, else none)")
    add("--agg", choices=aggregators, help="use the adapter with another aggregator")
    add("--lora", type=file_path, help="LoRA file to merge into the UNet, ours or diffusers'")
    add("--prompt", help="what to show (default: the scene of the person's tenth photo)")
    add("--negative", default="", help="what not to show")
    add("--lam", type=float, default=1.0, help="weight λ of the references; 0 is text only")
    add("--guidance", type=float, help="classifier-free guidance w; 1 is none (default: 3, as chosen "
        "for weights/tiny by experiments/chosen.py; of other models 4)")
    add("--sampler", choices=["ddpm", "ddim", "dpm"], default="dpm", help="reverse process")
    add("--steps", type=int, default=30, help="UNet evaluations, 1 to 1000")
    add("--n", type=int, default=6, help="pictures to make")
    add("--seed", type=int, default=0, help="picture k starts from the noise of seed + "
        "k; of toy people, also which person")
    add_device_arguments(parser, precision="number format of the weights")
    add("--compile", action="store_true", help="compile the UNet first, on GPUs: takes a minute")
    add("--benchmark", action="store_true", help="print warm-up, seconds a step and peak memory")
    add("--out", type=Path, default=Path("runs/sample.png"), help="picture to write")
    args = parser.parse_args()
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the picture to write")
    if args.benchmark and args.steps == 1:
        raise ValueError("--benchmark with --steps 1: the first step only warms up, give it more")
    return args


def choose_guidance(w, model):
    """w as it was given, or the default: 3 was chosen for weights/tiny, for no other model."""
    if w is not None:
        return w
    return 3.0 if Path(model).resolve() == TINY.resolve() else 4.0


def parse_scoring(text):
    """The arguments of metrics.py; text, ValueError: as above."""
    parser = make_parser(text)
    add = parser.add_argument
    add("real", metavar="REAL_DIR", help="folder of real pictures")
    add("generated", metavar="GENERATED_DIR", help="folder of generated pictures")
    add("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid, "
        "or toy: FeatureNet (default: from torch.hub or, without a network, toy)")
    add("--resize", choices=InceptionV3.RESIZE, default="pytorch-fid", help="to 299 x 299, as whose")
    add("--faces", metavar="FILE", help="mobilefacenet.pt of foamliu/MobileFaceNet: adds identity, "
        "rank-1 and copying of people with a folder of the same name in each of the folders")
    add("--face-box", help="with --faces: where the face lies; deep-funneled (photos of LFW), whole, "
        "or left,top,right,bottom in fractions of the picture (default: whole)")
    add("--clip", help="folder or hub id of a CLIP (openai/clip-vit-large-patch14): adds cosines of "
        "one person's pictures to REAL_DIR (CLIP-I), to --prompt (CLIP-T), to --references (copy)")
    add("--prompt", help="with --clip: what all generated pictures should show")
    add("--references", help="with --clip, --faces: folder of the photos the method was given")
    add("--splits", type=int, default=1, help="IS: mean over so many parts (torch-fidelity: 10)")
    add("--batch", type=int, default=32, help="pictures at once")
    add("--seed", type=int, default=2020, help="of the shuffle before the splits")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()

    if args.prompt is not None and not args.clip:
        raise ValueError("--prompt needs --clip, a CLIP to compare with")
    if args.references and not (args.clip or args.faces):
        raise ValueError("--references needs --clip or --faces to compare with")
    if args.face_box and not args.faces:
        raise ValueError("--face-box needs --faces, the file of a face recogniser")
    return args
