"""The UNet learns to look at image tokens: it trains together with an adapter of one photo.

    L = ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²                                      (1)

The reference is another photo of the same person, if there is one, else the photo itself. A quarter
of each batch has no image tokens: the UNet must make portraits of its prompts alone too, from which
DreamBooth starts. After this stage the UNet is frozen for good, as the paper has it, and the adapter
of another image encoder trains on it, by the same loss.

A frozen UNet that learned from prompts alone never used its cross-attention for who somebody is, and
W'k and W'v could not teach it that in a few minutes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.base_data import pick_side
from experiments.base_tasks import diffusion_loss, validate_text_alone
from ip_adapter import IPAdapter, drop_conditions, generate
from metrics import compare_people, rank_one
from support.pictures import save_grid, to_tensor
from train import Task, draw_t_and_eps, fixed_validation


@dataclass
class Branch:
    """An adapter and all that belongs to its image encoder.

    file: of the adapter, in the model's folder. embeds (2, n, E): of the training photos and their
    mirror images. held: data.Features of the validation people. judge: of faces, another network than
    the encoder, or None.
    """

    file: str
    embeds: torch.Tensor
    held: object
    judge: nn.Module = None
    adapter: IPAdapter = None


def together_task(sd, branch, latents, faces, held, device, out, gamma=0.0, frozen=False):
    """Eq. 1 for the UNet and an adapter. latents (2, n, C, h, w): of `faces` (PhotoFaces).

    frozen: for the adapter alone; then all rows have image tokens. validation: eq. 1 on `held`
    (PhotoFaces of the validation people); identity, rank-1: see measure_identity. Pictures of them:
    out/together.png, frozen: out/ip_adapter.png.
    """
    name = "ip_adapter" if frozen else "together"
    module = branch.adapter
    if not frozen:
        module = nn.ModuleDict({"unet": sd.unet, "adapter": branch.adapter})
    loss = make_loss(sd, branch, latents, faces, device, gamma, frozen)

    def validate():
        branch.adapter.lend(sd.unet)
        found = validate_branch(sd, branch, held, device, out / f"{name}.png")
        text = validate_text_alone(sd, branch.held, device)()
        return {**found, "text alone": text["validation"]}

    return Task(name, module, loss, validate)


def make_loss(sd, branch, latents, faces, device, gamma, frozen):
    """Eq. 1 of a batch, see `together_task`: (batch, generator) -> scalar tensor."""
    c_all, which = encode_each_once(sd, faces.prompts)
    null_c_t = sd.encode_prompts([""]).float()

    def loss(batch, generator):
        target = torch.randint(len(faces.pixels), (batch,), generator=generator)
        reference = faces.draw_partners(target, generator)
        branch.adapter.lend(sd.unet)
        alone = 0 if frozen else batch // 4  # rows of the text alone
        total = 0
        if alone:
            total = alone * error_of(target[:alone], None, generator)
        total = total + (batch - alone) * error_of(target[alone:], reference[alone:], generator)
        return total / batch

    def error_of(target, reference, generator):
        """Eq. 1 of some rows; reference None: without image tokens."""
        z_0 = pick_side(latents, target, generator).to(device)
        c_t = c_all[which[target].to(device)]
        embeds = torch.zeros(len(target), 1, 1)
        if reference is not None:
            embeds = pick_side(branch.embeds, reference, generator)[:, None]  # (b, 1, E)
        c_t, embeds = drop_conditions(c_t, embeds.to(device), null_c_t, 0.05, generator)
        c_i = None if reference is None else branch.adapter.tokens(embeds)
        t, eps = draw_t_and_eps(sd, z_0, generator)
        return diffusion_loss(sd, z_0, t, eps, c_t, c_i, gamma)

    return loss


def encode_each_once(sd, prompts):
    """The embeddings of all different prompts (u, L, D), and which of them each prompt has: (n,)."""
    different = sorted(set(prompts))
    number = {prompt: k for k, prompt in enumerate(different)}
    which = torch.tensor([number[prompt] for prompt in prompts])
    return sd.encode_prompts(different).float(), which


def validate_branch(sd, branch, held, device, path):
    """Eq. 1 and identity of one adapter, whose layers the UNet has; its pictures go to `path`."""
    n = branch.adapter.aggregator.photos
    found = fixed_validation(sd, branch.held, branch.adapter.tokens, device, n=n)()
    made, chosen = make_portraits(sd, branch, held, device)
    save_portraits(path, made, chosen, held)
    if branch.judge:
        found |= measure_identity(branch.judge, made, chosen, held)
    return found


# ---------------------------------------------------------------- pictures of validation people


def choose_portraits(held, people=48):
    """(P, 2): for each of the first validation people the reference and the photo of the prompt."""
    counts = torch.bincount(held.who)
    starts = counts.cumsum(0) - counts
    fit = (counts > 1).nonzero().flatten()[:people]
    return torch.stack([starts[fit], starts[fit] + 1], dim=1)


def make_portraits(sd, branch, held, device, w=4.0, steps=12):
    """A picture of each of them from one reference: (P, 3, 64, 64), and `choose_portraits`.

    Always from the same noise.
    """
    chosen = choose_portraits(held)
    references = branch.held.embeds[chosen[:, 0]].to(device)[:, None]  # (P, 1, E)
    c_i = branch.adapter.tokens(references)
    null_c_i = branch.adapter.tokens(torch.zeros_like(references[:1]))
    prompts = [held.prompts[k] for k in chosen[:, 1].tolist()]
    c_t = sd.encode_prompts([*prompts, ""]).float()
    made = generate(sd, c_t[:-1], c_t[-1:], c_i, null_c_i, w, steps=steps)
    return made.float(), chosen


def measure_identity(judge, made, chosen, held):
    """identity, rank-1: of pictures from references, compared with other photos of the people.

    identity: the mean cosine to the person's own, less that to everybody else's: pictures of nobody
    have 0. rank-1: how often the person is the nearest of all.
    """
    device = next(judge.parameters()).device
    features = judge.read(judge.resize(made.to(device)))[0].float().cpu()
    real = []
    for reference in chosen[:, 0].tolist():
        others = (held.who == held.who[reference]).nonzero().flatten()[1:]
        images = to_tensor(held.pixels[others]).to(device)
        real.append(judge.read(judge.resize(images))[0].float().cpu())
    cosines = compare_people(list(features.split(1)), real)  # P times (1, P)
    table = torch.cat(cosines)  # (P, P), a row a picture
    is_own = torch.eye(len(table), dtype=torch.bool)
    identity = table[is_own].mean() - table[~is_own].mean()
    right = torch.cat(rank_one(cosines))
    return {"identity": float(identity), "rank-1": float(right.mean())}


def save_portraits(path: Path, made, chosen, held, people=12):
    """Rows: references, pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    references = to_tensor(held.pixels[chosen[:people, 0]])
    rows = [list(references), list(made[:people].cpu())]
    save_grid(path, rows, captions=["reference", "generated"], side=96)
