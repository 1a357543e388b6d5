"""Judges: what each of them says of the pictures of a folder of a plan.

    quality   Inception, or FeatureNet for toy people,     features and p(y|x): FID, KID, IS
              or nobody
    truth     FeatureNet, of photos that carry labels      right attributes: identity, prompt
    CLIP      the model's own encoders                     CLIP-I, copy, CLIP-T
    faces     MobileFaceNet or FaceJudge, if given         face identity, face copy, rank-1
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments.photos import photos_at_once, read_pictures
from metrics import compare_embeddings, compare_people, rank_one
from support.face_net import FaceEncoder
from support.pictures import to_tensor
from toyfaces.judge import FeatureNet, grade_features


class Judges:
    """All judges of a table.

    sd: the model, in float32 or half precision; quality, faces: judges or None, not both None.
    """

    def __init__(self, plan, sd, quality, faces=None):
        self.plan = plan
        self.sd = sd
        self.quality = quality
        self.faces = faces
        self.grades_truth = plan.knows_truth and isinstance(quality, FeatureNet)
        # CLIP-T needs text and pictures in one space: the tiny pair's, not those of SD 1.5, whose
        # text encoder belongs to another CLIP than the image encoder, and not a face recogniser's.
        width = sd.image_encoder.config.projection_dim
        is_clip = not isinstance(sd.image_encoder, FaceEncoder)
        self.compares_text = is_clip and sd.text_encoder.config.hidden_size == width
        people = range(len(plan.subjects))
        photos = [plan.photo_files(p) for p in people]
        self.references = self.read([files["references"][0] for files in photos], ("CLIP", "faces"))
        self.held = self.read([files["real"][0] for files in photos])

    @property
    def columns(self):
        """The columns that these judges fill."""
        columns = ["FID ↓", "KID ↓", "IS uniform ↑", "IS empirical ↑"] if self.quality else []
        if self.grades_truth:
            columns += ["identity ↑", "prompt ↑"]
        if self.faces:
            columns += ["face identity ↑", "rank-1 ↑", "face copy", "face distance ↓"]
        columns += ["copy", "CLIP-I ↑"]
        if self.compares_text:
            columns.append("CLIP-T ↑")
        return columns

    @property
    def names(self):
        """Who judged what, for the note of a table."""
        text = [f"FID, KID and IS: {self.quality.name}"] if self.quality else []
        text.append(f"{'CLIP-I, CLIP-T' if self.compares_text else 'CLIP-I'} and copy: the model's "
                    "own encoders, which the adapters read, too: that favours them over DreamBooth")
        if self.faces:
            text.append(f"face identity, face copy, rank-1 and distance: {self.faces.name}")
        return text

    @torch.inference_mode()
    def read(self, files, judges=("quality", "CLIP", "faces")):
        """What the judges see in pictures: {name: a tensor a person}. files: a list a person.

        features (n_p, d), probs (n_p, K), embeds (n_p, E), with faces also faces (n_p, 128).
        """
        flat = [file for some in files for file in some]
        batch = photos_at_once(self.sd)
        found = {"features": [], "probs": [], "embeds": [], "faces": []}
        starts = range(0, len(flat), batch)
        for start in tqdm(starts, f"judging {flat[0].parts[-3]}", leave=False):
            pixels = to_tensor(read_pictures(flat[start : start + batch]))
            images = pixels.to(self.plan.settings.device)
            if "quality" in judges and self.quality:
                features, probs = self.quality.read(self.quality.resize(images))
                found["features"].append(features.cpu())
                found["probs"].append(probs.cpu())
            if "CLIP" in judges:
                found["embeds"].append(self.sd.embed_images(images).float().cpu())
            if "faces" in judges and self.faces:
                faces, _ = self.faces.read(self.faces.resize(images))
                found["faces"].append(faces.cpu())
        counts = [len(some) for some in files]
        return {name: torch.cat(parts).split(counts) for name, parts in found.items() if parts}

    def judge(self, files, shots, targets):
        """-> {name: a tensor a person, one row a picture}, what `read` says and what follows.

        files, shots: for each person the pictures, and the photos whose scenes they show; targets:
        for each person the numbers (n_p,) of these among the held-out photos, None: none of them.
        """
        seen = self.read(files)
        seen |= self.compare("CLIP-I ↑", "copy", seen["embeds"], "embeds", targets)
        if self.compares_text:
            seen["CLIP-T ↑"] = self.compare_to_prompts(seen["embeds"], shots)
        if self.grades_truth:
            seen |= self.grade(seen["features"], shots)
        if self.faces:
            faces = seen["faces"]
            seen |= self.compare("face identity ↑", "face copy", faces, "faces", targets)
            seen["rank-1 ↑"] = rank_one(compare_people(faces, self.held["faces"]))
        return seen

    def compare(self, identity, copy, made, what, targets):
        """Cosines to the held-out photos of the same person but that of the scene, and copying."""
        answers = {identity: [], copy: []}
        for p, embeds in enumerate(made):
            held = self.held[what][p]
            # Somebody's only held-out photo counts, even if it has the scene of the picture.
            target = targets[p] if len(held) > 1 else None
            pairs = compare_embeddings(embeds[None], self.references[what][p][None], held[None],
                                       target)
            answers[identity].append(pairs[0])
            answers[copy].append(pairs[1])
        return answers

    @torch.inference_mode()
    def compare_to_prompts(self, embeds, shots):
        """Cosine of each picture to the prompt of its scene, by the model's CLIP pair."""
        sd = self.sd
        cosines = []
        for some, photos in zip(embeds, shots):
            if not photos:  # nobody's pictures, as of the others below
                cosines.append(torch.zeros(0))
                continue
            prompts = [photo.prompt for photo in photos]
            ids = sd.tokenizer(prompts, padding=True, return_tensors="pt").input_ids
            text = sd.text_encoder(ids.to(self.plan.settings.device)).pooler_output
            cosines.append(F.cosine_similarity(some, text.float().cpu()))
        return cosines

    def grade(self, features, shots):
        """What FeatureNet says of the truth: the shares of right attributes."""
        device = self.plan.settings.device
        answers = {"identity ↑": [], "prompt ↑": []}
        for some, photos in zip(features, shots):
            labels = [photo.labels for photo in photos]
            shares = grade_features(self.quality, some.to(device), labels)
            answers["identity ↑"].append(shares["identity"])
            answers["prompt ↑"].append(shares["prompt"])
        return answers
