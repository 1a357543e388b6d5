"""Figures of lectures 3 and 4: where the UNet looks, and where self-attention over references looks."""

import copy

import torch

from attention import attention
from ddpm import sample
from experiments.figures_common import name_row, new_sheet, save_small, show
from ip_adapter import draw_noise, generate, make_guided_eps, text_attentions
from metrics import bootstrap_ci
from support.devices import autocast, pick_device, pick_precision
from support.pictures import to_bytes, to_tensor
from toyfaces.drawing import draw_face
from toyfaces.judge import FeatureNet, grade

BARE, SUNGLASSES, HAT = 0, 1, 2  # classes of toyfaces.drawing.SCENE["accessory"]
SETS = {  # nine references: what each wears (None: as it was drawn), and the photos that are watched
    "as they were drawn": ((None,) * 9, [8]),
    "eight in hats, one bare": ((HAT,) * 8 + (BARE,), [8]),
    "eight in sunglasses, one bare": ((SUNGLASSES,) * 8 + (BARE,), [8]),
    "eight bare, one in a hat": ((BARE,) * 8 + (HAT,), [8]),
    "eight bare, one in sunglasses": ((BARE,) * 8 + (SUNGLASSES,), [8]),
    "eight in hats, one in sunglasses": ((HAT,) * 8 + (SUNGLASSES,), [8]),
    "three of somebody else": ((None,) * 6 + ("stranger",) * 3, [6, 7, 8]),
}
WITH_STRANGERS = {
    "nobody else": ((None,) * 9, [8]),
    "one of somebody else": ((None,) * 8 + ("stranger",), [8]),
    "three of somebody else": ((None,) * 6 + ("stranger",) * 3, [6, 7, 8]),
    "six of somebody else": ((None,) * 3 + ("stranger",) * 6, [3, 4, 5, 6, 7, 8]),
}
IN_PICTURE = ("eight in hats, one bare", "three of somebody else", "as they were drawn")


# ---------------------------------------------------------------- inside the UNet


def attention_weights(Q, K):
    """softmax(QKᵀ/√d), (…, L, S): what `attention` answers if V is the identity matrix."""
    V = torch.eye(K.shape[-2], dtype=K.dtype).expand(*K.shape[:-1], K.shape[-2])
    return attention(Q, K, V)


def watch_attention(unet, found):
    """Append the weights of every text cross-attention to `found`: (text, image) (B, h, L, S).

    Returns the hooks; remove them.
    """

    def watch(layer, inputs):
        x, c_t, c_i, _ = inputs
        to_k_ip, _ = layer.image_kv
        Q = layer.split_heads(layer.to_q(x))
        K = layer.split_heads(layer.to_k(c_t))
        K_ip = layer.split_heads(to_k_ip(c_i))
        found.append((attention_weights(Q, K), attention_weights(Q, K_ip)))

    layers = text_attentions(unet).values()
    return [layer.register_forward_pre_hook(watch) for layer in layers]


def average_maps(weights):
    """Weights (1, h, L, S) of many layers and steps -> maps (S, √L, √L), the mean over all of them."""
    mean = torch.cat(weights).mean(dim=(0, 1))  # (L, S)
    side = round(len(mean) ** 0.5)
    return mean.T.unflatten(1, (side, side))


def make_and_watch(world, conditions, seed):
    """A picture (3, H, W), and its attention maps: of the text (L, 8, 8), of the image (4M, 8, 8)."""
    found = []
    unet = world.sd.unet
    x_T = draw_noise(unet, [seed])
    # w = 1 and DDIM: the UNet is called with the condition only, once a step.
    eps_fn = make_guided_eps(unet, **conditions._asdict(), w=1)
    hooks = watch_attention(unet, found)
    z_0 = sample(eps_fn, x_T, world.sd.schedule, world.steps, "ddim", progress=False)
    for hook in hooks:
        hook.remove()
    texts, images = zip(*found)
    return world.sd.decode_latents(z_0)[0], average_maps(texts), average_maps(images)


def lay_over(axis, picture, heat, title):
    """A map over a pale picture, from its own least value (nothing) to its own largest (red)."""
    low, high = heat.min(), heat.max()
    share = (heat - low) / (high - low)
    height, width = picture.shape[1:]
    show(axis, picture * 0.5 + 0.3, title, below=f"{low:.3f} – {high:.3f}")
    axis.imshow(share, cmap="inferno", alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bicubic")


def draw_attention(world, path):
    """Where the tokens of some words, and the four kinds of image tokens, are looked at.

    Mean over layers, heads and steps. Image token k is the sum over the k-th tokens of all nine
    references. Under each map: its least and its largest weight.
    """
    words = ["smiling", "hat", "green", "background"]
    prompt = "a photo of a smiling person wearing a hat, green background"
    tokens = world.sd.tokenizer.tokenize(prompt)
    places = [1 + tokens.index(f"{word}</w>") if f"{word}</w>" in tokens else 1 for word in words]
    adapter = world.selfattn()
    figure, axes = new_sheet(3, 1 + len(words) + 4, side=1.15)
    for r, person in enumerate(world.faces[:3]):
        embeds = world.embed([photo.image for photo in person.photos[:9]])[None]
        conditions = world.condition([prompt], adapter, embeds)
        picture, text, image = make_and_watch(world, conditions, world.seed + r)
        show(axes[r][0], picture, "made" if r == 0 else None)
        for c, (word, place) in enumerate(zip(words, places)):
            lay_over(axes[r][1 + c], picture, text[place], f"“{word}”" if r == 0 else None)
        by_kind = image.unflatten(0, (-1, 4)).sum(0)  # (4, 8, 8)
        for k, heat in enumerate(by_kind):
            title = f"image token {k + 1}" if r == 0 else None
            lay_over(axes[r][1 + len(words) + k], picture, heat, title)
    save_small(path, figure)


# ---------------------------------------------------------------- among the references


def draw_references_of(world, kinds):
    """Nine pictures of everybody, each of its kind: (P, 9, 3, H, W).

    None: the photo as it was; a number: the same scene with this accessory; "stranger": the photo of
    the person before.
    """
    rows = []
    for p, person in enumerate(world.faces):
        faces = []
        for k, kind in enumerate(kinds):
            photo = person.photos[k]
            if kind is None:
                face = photo.image
            elif kind == "stranger":
                face = world.faces[p - 1].photos[k].image
            else:
                labels = {**photo.labels, "accessory": kind}
                face = draw_face(labels, {}, [p, k], world.sd.image_size)
            faces.append(face)
        rows.append(to_tensor(faces))
    return torch.stack(rows)


def weigh_references(aggregator, embeds):
    """Algorithm 1's softmax(QKᵀ/√d_k): (P, 9, E) -> (P, 9, 9), rows are those who look."""
    return attention_weights(aggregator.to_q(embeds), aggregator.to_k(embeds))


def print_interval(words, values, digits=3):
    """A mean over people with its 95 % interval; values (P,)."""
    values = values.double().tolist()
    low, high = bootstrap_ci(values, lambda some: sum(some) / len(some))
    mean = sum(values) / len(values)
    print(f"{words}: {mean:.{digits}f} ({low:.{digits}f}…{high:.{digits}f})", flush=True)


def draw_selfattn_weights(world, path):
    """How much of its weight self-attention gives to each of nine references, beside the photos."""
    adapter = world.selfattn()
    print(f"mean weight over {world.people} people (95 % intervals), nine references each:")
    pictures, weights = {}, {}
    for name, (kinds, watched) in SETS.items():
        pictures[name] = draw_references_of(world, kinds)
        embeds = world.embed_sets(pictures[name])
        weights[name] = weigh_references(adapter.aggregator, embeds)
        given = weights[name].mean(1)[:, watched].sum(1)  # (P,) the mean over those who look
        which = "the last" if len(watched) == 1 else f"the last {len(watched)}"
        print_interval(f"  {name}: on {which} (chance {len(watched) / 9:.3f})", given)
    draw_weights(path, pictures, weights)
    hats = world.embed_sets(pictures["eight in hats, one bare"])
    compare_weights(world, adapter, hats)


def print_gaze(words, weights, watched):
    """The weight on the watched references: by all nine, by the others, and by themselves.

    weights (P, 9, 9), rows are those who look; watched: numbers of references.
    """
    others = [k for k in range(9) if k not in watched]
    chance = f"chance {len(watched) / 9:.3f}"
    lookers = {"all": range(9), "the others": others, "themselves": watched}
    for who, rows in lookers.items():
        given = weights[:, list(rows)].mean(1)[:, watched].sum(1)  # (P,)
        print_interval(f"{words}: on the last {len(watched)} by {who} ({chance})", given)


def draw_strangers(world, path):
    """The weights on strangers among the references: as trained in the paper's way, and with strangers.

    Rows: the photos; the weights of the adapter that never met one; of the one that did
    (train.py --strangers).
    """
    adapters = {"trained leave-one-out": world.selfattn, "with strangers": world.selfattn_with_strangers}
    pictures, weights = {}, {}
    for name, (kinds, _) in WITH_STRANGERS.items():
        pictures[name] = draw_references_of(world, kinds)
    print(f"mean weight over {world.people} people (95 % intervals), nine references each:")
    for words, load in adapters.items():
        aggregator = load().aggregator
        for name, (_, watched) in WITH_STRANGERS.items():
            embeds = world.embed_sets(pictures[name])
            weights[words, name] = weigh_references(aggregator, embeds)
            print_gaze(f"  {words}; {name}", weights[words, name], watched)
    shown = ("one of somebody else", "three of somebody else")
    figure, axes = new_sheet(3 * len(shown), 9, side=1.0)
    for r, name in enumerate(shown):
        rows = axes[3 * r : 3 * r + 3]
        name_row(rows[0][0], name.replace(" of some", "\nof some"))
        for k in range(9):
            show(rows[0][k], pictures[name][0, k])
        for row, words in zip(rows[1:], adapters):
            name_row(row[0], words.replace(" ", "\n"))
            one = weights[words, name]  # (P, 9, 9)
            for k in range(9):
                draw_bar(row[k], one[0, :, k].mean(), one[:, :, k].mean())
    save_small(path, figure)


def draw_weights(path, pictures, weights, person=0):
    figure, axes = new_sheet(2 * len(IN_PICTURE), 10, side=1.0, width_ratios=[1] * 9 + [2])
    for r, name in enumerate(IN_PICTURE):
        one = weights[name][person]  # (9, 9)
        everybody = weights[name].mean(dim=(0, 1))  # (9,)
        top, bottom = axes[2 * r], axes[2 * r + 1]
        name_row(top[0], name.replace(", ", ",\n").replace("of some", "of\nsome")
                 .replace("they were", "they\nwere"))
        name_row(bottom[0], "weight")
        for k in range(9):
            show(top[k], pictures[name][person, k])
            draw_bar(bottom[k], one[:, k].mean(), everybody[k])
        draw_matrix(top[9], one)
        bottom[9].text(0.5, 0.9, "rows look at columns;\nbars: mean over rows,\ndot: mean over "
                       "people,\nline: 1/9, chance" if r == 0 else "", ha="center", va="top",
                       fontsize=7)
    save_small(path, figure)


def draw_bar(axis, value, mean):
    """This person's weight as a bar, the mean over people as a dot, 1/9 as a line."""
    axis.bar([0], [value], width=0.6, color="tab:blue")
    axis.plot([0], [mean], "o", color="tab:orange", markersize=4)
    axis.axhline(1 / 9, color="grey", linewidth=0.7)
    axis.set(ylim=(0, 0.75), xlim=(-0.7, 0.7))
    axis.set_xlabel(f"{value:.2f}", fontsize=7, labelpad=2)


def draw_matrix(axis, weights):
    axis.imshow(weights, cmap="viridis", vmin=0, vmax=1)


def compare_weights(world, adapter, embeds):
    """Print what the weights are worth: identity if eight references wear hats, one is bare.

    As trained; with W_k = 0, which makes all weights 1/9 and changes nothing else; with the bare
    photo alone, nine times.
    """
    device = pick_device("cpu")
    judge = FeatureNet.load(world.model / "feature_net")
    equal = copy.deepcopy(adapter.aggregator)
    equal.to_k.weight.zero_()
    bare = embeds[:, 8:].expand(-1, 9, -1)
    cases = {
        "weights as trained": (adapter.aggregator, embeds),
        "all weights 1/9": (equal, embeds),
        "the bare photo nine times": (adapter.aggregator, bare),
    }
    prompts = [person.photos[9].prompt for person in world.faces]
    labels = [person.photos[9].labels for person in world.faces]
    print("identity, eight in hats and one bare, a picture a person:")
    for words, (aggregator, references) in cases.items():
        adapter.aggregator = aggregator
        with autocast(device, pick_precision("auto", device)):
            conditions = world.condition(prompts, adapter, references)
            made = generate(world.sd, **conditions._asdict(), steps=world.steps, seed=world.seed)
        right = grade(judge, to_bytes(made), labels, device)["identity"]
        print_interval(f"  {words}", right)
