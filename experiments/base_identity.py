"""How an encoder learns who somebody is: the CLIP pair of photographs, and the judge of faces.

    margin softmax   of all training names the right one is nearest, by a margin m (CosFace)
    attraction       two photos of one person are nearer than those of different people (SupCon)
    prompts          photo and prompt belong together, as in CLIP; equal prompts are the same one

Names and prompts are needed for training only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.base_tasks import ClipPair
from support.pictures import to_tensor
from toyfaces.judge import augment
from train import Task


# ---------------------------------------------------------------- losses


def margin_softmax(embeds, names, who, margin=0.2, scale=20.0):
    """−log softmax(s·(cos θ_k − m·[k = who]))   (CosFace, Wang et al. 2018): a scalar.

    embeds (B, E); names (P, E), a direction for each person; who (B,): the right ones.
    """
    cosines = F.normalize(embeds.float(), dim=1) @ F.normalize(names.float(), dim=1).T  # (B, P)
    handicap = margin * F.one_hot(who, len(names))
    return F.cross_entropy(scale * (cosines - handicap), who)


def attraction(embeds, who, temperature=0.1):
    """Supervised contrastive loss (Khosla et al. 2020): a scalar.

    For each row of embeds (B, E) the mean of −log softmax over the other rows of the same person,
    the softmax over all other rows. Everybody must be there twice.
    """
    unit = F.normalize(embeds.float(), dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -1e9)
    log_share = logits.log_softmax(dim=1)  # (B, B)
    is_same = (who[:, None] == who[None, :]) & ~itself
    mean = (log_share * is_same).sum(1) / is_same.sum(1)
    return -mean.mean()


def prompt_loss(logits, which):
    """CLIP's loss where several photos have one prompt, which is never its own negative: a scalar.

    logits (B, U): photos against the different prompts; which (B,): the prompt of each photo.
    """
    to_text = F.cross_entropy(logits, which)
    # From a prompt to photos: any photo that has it is right.
    log_share = logits.T.log_softmax(dim=1)  # (U, B)
    is_right = which[None, :] == torch.arange(logits.shape[1], device=which.device)[:, None]
    right = log_share.masked_fill(~is_right, -1e9).logsumexp(dim=1)  # (U,)
    return (to_text - right.mean()) / 2


def measure_auc(embeds, who):
    """The probability that a pair of one person has a larger cosine than a pair of two people."""
    unit = F.normalize(embeds.float(), dim=1).cpu()
    cosines = unit @ unit.T
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    values = cosines[first, second].double()
    is_same = who[first] == who[second]
    ranks = values.argsort().argsort().double()  # 0 is the smallest
    same = int(is_same.sum())
    different = len(values) - same
    return float((ranks[is_same].sum() - same * (same - 1) / 2) / (same * different))


# ---------------------------------------------------------------- photos for them


def draw_pairs(faces, batch, generator):
    """Numbers (batch,) of photos: two of each of batch/2 people, one after another.

    Three pairs of four are of people with two or more photos, each person as likely as another;
    somebody with one photo is there with it twice.
    """
    counts = torch.bincount(faces.who)
    starts = counts.cumsum(0) - counts
    several = (counts > 1).nonzero().flatten()
    people = torch.randint(len(counts), (batch // 2,), generator=generator)
    if len(several):
        known = several[torch.randint(len(several), (batch // 2,), generator=generator)]
        is_known = torch.arange(batch // 2) % 4 < 3
        people = torch.where(is_known, known, people)
    u = torch.rand(batch // 2, generator=generator, dtype=torch.float64)
    first = starts[people] + (u * counts[people]).long()
    second = faces.draw_partners(first, generator)
    return torch.stack([first, second], dim=1).flatten()


def vary(images, generator):
    """Shifted, blurred, noisy (toyfaces.judge.augment), of another light and with a part covered.

    images (B, 3, S, S) in [−1, 1] -> the same shape.
    """
    images = augment(images, generator)
    batch, _, side, _ = images.shape
    light = 0.2 * torch.randn(batch, 1, 1, 1, generator=generator)
    contrast = 1 + 0.2 * torch.randn(batch, 1, 1, 1, generator=generator)
    images = images * contrast.to(images.device) + light.to(images.device)
    # A square of a quarter of the side, in every second picture, is grey.
    hole = side // 4
    for k in range(0, batch, 2):
        top, left = torch.randint(side - hole, (2,), generator=generator).tolist()
        images[k, :, top : top + hole, left : left + hole] = 0
    return images


# ---------------------------------------------------------------- the two trainings


class NamePair(ClipPair):
    """The CLIP pair, and a direction for the name of each training person: for training only."""

    def __init__(self, sd, people):
        super().__init__(sd)
        width = sd.image_encoder.config.projection_dim
        self.names = nn.Parameter(torch.randn(people, width))

    def embed_images(self, images):
        """Pictures (B, 3, 64, 64) in [−1, 1] -> embeddings (B, E)."""
        return self.vision(self.sd.clip_pixels(images)).image_embeds


def identity_task(sd, faces, held, device):
    """The image encoder learns names, and photos of one person attract; text and photos as in CLIP.

    validation: 1 − AUC of pairs of held-out people, so less is better; right prompts among all.
    """
    pair = NamePair(sd, len(faces.people)).to(device)
    all_prompts = sorted(set(held.prompts))

    def loss(batch, generator):
        i = draw_pairs(faces, batch, generator)
        images = to_tensor(faces.pick(i, generator)).to(device)
        embeds = pair.embed_images(vary(images, generator))
        who = faces.who[i].to(device)
        # The different prompts of the batch, and which of them each photo has.
        captions = [faces.prompts[k] for k in i.tolist()]
        different = sorted(set(captions))
        which = torch.tensor([different.index(caption) for caption in captions], device=device)
        about_text = prompt_loss(pair.compare(embeds, different), which)
        about_names = margin_softmax(embeds, pair.names, who)
        return about_names + attraction(embeds, who) + about_text

    def validate():
        parts = to_tensor(held.pixels).to(device).split(64)
        embeds = torch.cat([pair.embed_images(part) for part in parts])
        picked = pair.compare(embeds, all_prompts).argmax(dim=1).tolist()
        right = [all_prompts[k] == prompt for k, prompt in zip(picked, held.prompts)]
        error = 1 - measure_auc(embeds, held.who)
        return {"validation": error, "prompts": sum(right) / len(right)}

    return Task("clip", pair, loss, validate)


class NamedJudge(nn.Module):
    """A FaceJudge, and a direction for each name: for training only."""

    def __init__(self, judge, people):
        super().__init__()
        self.judge = judge
        self.names = nn.Parameter(torch.randn(people, 128))


def judge_task(judge, faces, held, device):
    """Names and attraction, without prompts. validation: 1 − AUC of photos that it has not seen."""
    named = NamedJudge(judge, len(faces.people)).to(device)

    def loss(batch, generator):
        i = draw_pairs(faces, batch, generator)
        images = to_tensor(faces.pick(i, generator)).to(device)
        embeds = judge(vary(images, generator))
        who = faces.who[i].to(device)
        return margin_softmax(embeds, named.names, who) + attraction(embeds, who)

    def validate():
        parts = to_tensor(held.pixels).to(device).split(64)
        embeds = torch.cat([judge.read(part)[0] for part in parts])
        return {"validation": 1 - measure_auc(embeds, held.who)}

    return Task("face_judge", named, loss, validate)
