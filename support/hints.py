"""What sample.py says where it may not do what somebody meant: a note, or what is missing."""

from pathlib import Path

from support.checkpoints import ADAPTER, PHOTOS


def check_request(args, references, prompt, adapter_file):
    """ValueError if sample.py was not asked for a picture, or if there is no adapter for it."""
    if (args.adapter or args.agg) and not references:
        raise ValueError("--adapter and --agg are for reference photos: name some with --refs")
    if prompt is None:
        raise ValueError("no prompt: say what to show with --prompt")
    if references and adapter_file is None:
        is_face_net = args.image_encoder and Path(args.image_encoder).is_file()
        whose = f" for {args.image_encoder} (weights/photos has one)" if is_face_net else ""
        raise ValueError(f"{args.model} comes without an adapter{whose}: name one with --adapter")


def note_references(adapter, adapter_file, count):
    """Print a note if not all of `count` references take part, or as if there were no training."""
    if adapter.agg == "none" and count > 1:
        print(f"note: this adapter reads the first reference only; --agg avg reads all {count}")
    if adapter.agg == "selfattn" and not adapter.aggregator.to_k.weight.any():
        print(f"note: {adapter_file} was not trained with self-attention, so it averages; train one with "
              "train.py --agg selfattn, and name it with --adapter")
    if Path(adapter_file).resolve() == (PHOTOS / ADAPTER).resolve():
        print("note: the image encoder in weights/photos hardly sees who it is; --image-encoder "
              "mobilefacenet.pt does (support/README.md says where to get it)")
