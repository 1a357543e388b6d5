"""A published CLIP as a judge of folders: cosines between pictures, and to words."""

import torch
from safetensors import SafetensorError

from support.pictures import load_image


class ClipJudge:
    """A CLIP of transformers (openai/clip-vit-large-patch14). ValueError if `path` is none."""

    def __init__(self, path, device="cpu", batch=32):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # takes seconds

        try:
            clip, info = CLIPModel.from_pretrained(path, output_loading_info=True)
            self.processor = CLIPImageProcessor.from_pretrained(path)
            self.tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--clip {path}: no CLIP of transformers ({reason})") from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"--clip {path}: not a whole CLIP, {missing[0]} is missing")
        self.clip = clip.float().to(device).eval()
        self.device = device
        self.batch = batch

    @torch.inference_mode()
    def embed_files(self, files):
        """n picture files -> (n, E)."""
        embeds = []
        for start in range(0, len(files), self.batch):
            images = [load_image(file) for file in files[start : start + self.batch]]
            pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
            hidden = self.clip.vision_model(pixels).pooler_output
            embeds.append(self.clip.visual_projection(hidden).cpu())
        return torch.cat(embeds)

    @torch.inference_mode()
    def embed_text(self, text):
        """-> (1, E)."""
        ids = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.device)
        return self.clip.text_projection(self.clip.text_model(**ids).pooler_output).cpu()
