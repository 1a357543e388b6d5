"""What sample.py says where it may not do what somebody meant: a note, or what is missing."""

from pathlib import Path

from support.checkpoints import ADAPTER, PHOTOS, read_adapter


def check_request(args, references, prompt, adapter_file):
    """ValueError if sample.py was not asked for a picture, or if there is no adapter for it."""
    if (args.adapter or args.agg) and not references:
        raise ValueError("--adapter and --agg are for reference photos: name some with --refs")
    if prompt is None:
        raise ValueError("no prompt: say what to show with --prompt")
    if references and adapter_file is None:
        if args.image_encoder and Path(args.image_encoder).is_file():
            problem = f"{args.model} comes without an adapter for {args.image_encoder}"
            raise ValueError(f"{problem}: --model weights/photos has one, or name one with --adapter")
        raise ValueError(f"{args.model} comes without an adapter: name one with --adapter")


def note_references(adapter, adapter_file, count):
    """Print notes: some of `count` references are left out, or what reads them has not learned to."""
    reads = 1 if adapter.agg == "none" else adapter.aggregator.references or count
    if reads < count:
        which = "the first of the" if reads == 1 else f"the first {reads} of the"
        print(f"note: {adapter.agg} reads {which} {count} references; --agg avg reads all")
    _, metadata = read_adapter(adapter_file)
    has_weights = any(True for _ in adapter.aggregator.parameters())
    if has_weights and metadata.get("agg", "none") != adapter.agg:
        print(f"note: {adapter_file} was trained without {adapter.agg}, whose weights are as they begin; "
              f"train.py --agg {adapter.agg} trains them, --adapter names the result")
    if Path(adapter_file).resolve() == (PHOTOS / ADAPTER).resolve():
        print("note: the image encoder in weights/photos hardly sees who it is; --image-encoder "
              "mobilefacenet.pt does (support/README.md says where to get it)")
