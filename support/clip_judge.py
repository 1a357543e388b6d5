"""A published CLIP as a judge of folders: cosines between pictures, and to words."""

import torch
from PIL import Image

from support.checkpoints import locate_clip, weight_file
from support.configs import clip_config
from support.files import read_json
from support.finite import check_finite
from support.pictures import load_image
from support.text import first_line
from support.weights import check_tensor, read_tensors


class ClipJudge:
    """A CLIP of transformers (openai/clip-vit-large-patch14). ValueError if `path` is none."""

    def __init__(self, path, device="cpu", batch=32):
        self.device = device
        self.batch = batch
        try:
            self.load(path)
            self.embed_images([Image.new("RGB", (9, 8))])  # now, not after an hour of work
            self.embed_text("a photo")
        except Exception as error:  # transformers' are of many kinds
            reason = first_line(error)
            raise ValueError(f"--clip {path}: no CLIP of transformers ({reason})") from error

    def load(self, path):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # takes seconds

        folder = locate_clip(path)
        config = read_json(folder / "config.json")
        for part in ("text_config", "vision_config"):
            clip_config(config[part])
        file = weight_file(folder, torch.float32)
        for name, tensor in read_tensors(file):
            if not name.endswith("position_ids"):  # a constant that older transformers wrote
                check_tensor(file, name, tensor)
        clip, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"not a whole CLIP, {missing[0]} is missing")
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.clip = clip.float().to(self.device).eval()

    @torch.inference_mode()
    def embed_images(self, images):
        """n PIL images -> (n, E)."""
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
        hidden = self.clip.vision_model(pixels).pooler_output
        embeds = self.clip.visual_projection(hidden).cpu()
        check_finite(image_encoder=embeds)
        return embeds

    def embed_files(self, files):
        """n picture files -> (n, E)."""
        embeds = []
        for start in range(0, len(files), self.batch):
            images = [load_image(file) for file in files[start : start + self.batch]]
            embeds.append(self.embed_images(images))
        return torch.cat(embeds)

    @torch.inference_mode()
    def embed_text(self, text):
        """-> (1, E)."""
        ids = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.device)
        embeds = self.clip.text_projection(self.clip.text_model(**ids).pooler_output).cpu()
        check_finite(text_encoder=embeds)
        return embeds
