"""ip_adapter.py: attaching, eq. 1, dropping conditions, guidance, and files that diffusers reads, too."""

import copy
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attention import attention
from conftest import close, randn
from ddpm import Schedule, guide, q_sample, sample
from ip_adapter import (
    ImageProjection, IPAdapter, adapter_loss, drop_conditions, drop_embeds, make_guided_eps, noise_error,
    text_attentions,
)  # fmt: skip
from unet import UNet

B, N, E, D, L = 2, 3, 6, 12, 5
SMALL = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=[8, 16], layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=D, attention_head_dim=2, norm_num_groups=4,
)  # fmt: skip
SD15 = dict(
    sample_size=64, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, cross_attention_dim=768,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], attention_head_dim=8,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)  # fmt: skip


def randomise(module, seed):
    """Random weights everywhere, so that no tensor can be mistaken for another or left at its start."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.parameters():
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return module


@pytest.fixture
def unet():
    return randomise(UNet(**SMALL).double(), 1)


@pytest.fixture
def inputs():
    return dict(x_t=randn(B, 4, 8, 8), t=torch.tensor([3, 700]), c_t=randn(B, L, D, seed=1))


def detach(unet):
    """Take the adapter off: `unet` is the text-to-image model again."""
    for attn in text_attentions(unet).values():
        attn.image_kv = None


def trained(unet, agg="none", seed=2):
    return randomise(IPAdapter(unet, E, agg), seed)


def test_projection_is_linear_split_into_four_tokens_and_layernorm():
    projection, embeds = randomise(ImageProjection(E, D).double(), 0), randn(B, N, E)
    tokens = projection(embeds)
    assert tokens.shape == (B, N * 4, D)
    for n in range(N):
        for k in range(4):
            rows = slice(k * D, (k + 1) * D)
            z = embeds[:, n] @ projection.proj.weight[rows].T + projection.proj.bias[rows]
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            close(tokens[:, 4 * n + k], z * projection.norm.weight + projection.norm.bias)


@pytest.mark.parametrize("agg, M", [("none", 1), ("max", 1), ("avg", 1), ("selfattn", N), ("concat", N)])
def test_tokens_are_projected_after_aggregation(unet, agg, M):
    adapter, embeds = trained(unet, agg), randn(B, N, E)
    c_i = adapter.tokens(embeds)
    assert c_i.shape == (B, M * 4, D)
    close(c_i, adapter.image_proj(adapter.aggregator(embeds)))


def test_embeddings_of_another_encoder_are_refused(unet):
    with pytest.raises(ValueError, match="^the adapter reads image embeddings of width 6, not 7: name its own"):
        IPAdapter(unet, E).tokens(randn(B, N, 7))


def test_ip_projections_start_as_copies_of_the_text_projections(unet, inputs):
    adapter = IPAdapter(unet, E)
    layers = text_attentions(unet)
    assert list(layers) == list(adapter.ip_adapter) == ["1", "3", "5", "7"]  # down, up, up, mid
    for number, attn in layers.items():
        assert torch.equal(adapter.ip_adapter[number]["to_k_ip"].weight, attn.to_k.weight)
        assert torch.equal(adapter.ip_adapter[number]["to_v_ip"].weight, attn.to_v.weight)
        assert adapter.ip_adapter[number]["to_k_ip"].weight is not attn.to_k.weight
        to_k_ip, to_v_ip = attn.image_kv
        assert to_k_ip is adapter.ip_adapter[number]["to_k_ip"]
        assert to_v_ip is adapter.ip_adapter[number]["to_v_ip"]
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2 is layers["7"]
    # the same tokens as text and as image: eq. 3 doubles the text's term
    attn, x, c = layers["7"], randn(B, 4, 16), inputs["c_t"]
    bias = attn.to_out[0].bias
    close(attn(x, c, c) - bias, 2 * (attn(x, c) - bias))


def test_eq3_lam_scales_the_adapters_own_projections(unet):
    layers = trained(unet).ip_adapter["7"]
    attn = text_attentions(unet)["7"]
    x, c_t, c_i = randn(B, 4, 16), randn(B, L, D, seed=1), randn(B, 8, D, seed=2)
    Q = attn.split_heads(attn.to_q(x))
    K_ip = attn.split_heads(layers["to_k_ip"](c_i))
    V_ip = attn.split_heads(layers["to_v_ip"](c_i))
    image_term = attention(Q, K_ip, V_ip).transpose(1, 2).flatten(2) @ attn.to_out[0].weight.T
    close(attn(x, c_t, c_i, 0.7) - attn(x, c_t), 0.7 * image_term)


def test_lam_zero_and_no_image_tokens_are_the_text_only_model(unet, inputs):
    unet.requires_grad_(False)  # already here: PyTorch convolves trainable weights by another kernel
    before = unet(**inputs)
    adapter = trained(unet)
    c_i = adapter.tokens(randn(B, N, E))
    assert torch.equal(unet(**inputs, c_i=c_i, lam=0.0), before)
    assert torch.equal(unet(**inputs), before)
    assert (unet(**inputs, c_i=c_i) - before).abs().max() > 1e-3


def test_the_unet_is_frozen_and_everything_of_the_adapter_trains(unet, inputs):
    names = list(unet.state_dict())
    trained(unet)  # an adapter that came before, so that the next one copies frozen text projections
    adapter = trained(unet, "selfattn")
    eps, c_i = randn(B, 4, 8, 8, seed=5), adapter.tokens(randn(B, N, E))
    schedule = Schedule.stable_diffusion()
    adapter_loss(unet, inputs["x_t"], inputs["t"], eps, inputs["c_t"], c_i, schedule).backward()
    assert not any(weight.requires_grad or weight.grad is not None for weight in unet.parameters())
    assert all(weight.grad.abs().max() > 0 for weight in adapter.trainable_parameters())
    assert len(adapter.trainable_parameters()) == 4 + 4 + 2 * 4  # aggregator, projection, W'_k and W'_v
    assert list(unet.state_dict()) == names, "the UNet borrows W'_k and W'_v, it does not own them"


def test_attaching_replaces_the_adapter_and_nothing_of_the_unet(unet, inputs):
    first, embeds = trained(unet, seed=2), randn(B, N, E)
    c_i = first.tokens(embeds)
    with_first = unet(**inputs, c_i=c_i)
    second = IPAdapter(unet, E, attach=False)
    assert torch.equal(unet(**inputs, c_i=c_i), with_first)
    randomise(second, 3).attach(unet)
    assert (unet(**inputs, c_i=c_i) - with_first).abs().max() > 1e-3
    first.attach(unet)
    assert torch.equal(unet(**inputs, c_i=c_i), with_first)
    detach(unet)
    assert torch.equal(unet(**inputs, c_i=c_i), unet(**inputs))


def test_adapter_follows_the_dtype_of_the_unet():
    adapter = IPAdapter(UNet(**SMALL).bfloat16(), E, "selfattn")
    assert {weight.dtype for weight in adapter.parameters()} == {torch.bfloat16}


def test_sd15_adapter_has_the_published_size_and_names():
    with torch.device("meta"):
        unet = UNet(**SD15)
        adapter = IPAdapter(unet, 1024)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    assert sum(weight.numel() for weight in adapter.trainable_parameters()) == 22_319_616
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    expected = {"image_proj.proj.weight": (3072, 1024), "image_proj.proj.bias": (3072,),
                "image_proj.norm.weight": (768,), "image_proj.norm.bias": (768,)}  # fmt: skip
    for i, width in enumerate(widths):
        expected |= {f"ip_adapter.{2 * i + 1}.to_{c}_ip.weight": (width, 768) for c in "kv"}
    assert shapes == expected


def test_eq1_is_the_mean_square_of_the_noise_left(unet, inputs):
    schedule, adapter = Schedule.stable_diffusion(), trained(unet)
    z_0, eps, t, c_t = inputs["x_t"], randn(B, 4, 8, 8, seed=5), inputs["t"], inputs["c_t"]
    c_i = adapter.tokens(randn(B, N, E))
    total = 0
    for b in range(B):
        z_t = q_sample(z_0[b], t[b].item(), eps[b], schedule)
        eps_hat = unet(z_t[None], t[b], c_t[b : b + 1], c_i[b : b + 1])
        total = total + (eps[b] - eps_hat[0]).square().sum()
    close(adapter_loss(unet, z_0, t, eps, c_t, c_i, schedule), total / (B * 4 * 8 * 8))
    assert adapter_loss(lambda *_: eps, z_0, t, eps, c_t, c_i, schedule) == 0
    squares = noise_error(unet, z_0, t, eps, c_t, c_i, schedule)  # number by number
    assert squares.shape == z_0.shape
    close(squares.sum(), total)


def test_eq1_model_reads_the_noised_latent_and_is_compared_with_the_noise():
    schedule = Schedule.stable_diffusion()
    z_0, eps, t = randn(B, 4, 8, 8), randn(B, 4, 8, 8, seed=5), torch.tensor([3, 700])
    tokens = randn(B, L, D, seed=1), randn(B, 4, D, seed=2)
    z_t = q_sample(z_0, t, eps, schedule)

    def unet(seen_z, seen_t, c_t, c_i):
        close(seen_z, z_t)
        assert torch.equal(seen_t, t)
        assert torch.equal(c_t, tokens[0]) and torch.equal(c_i, tokens[1])
        return 0.3 * z_t

    squares = noise_error(unet, z_0, t, eps, *tokens, schedule)
    close(squares, (eps - 0.3 * z_t) ** 2)
    close(adapter_loss(unet, z_0, t, eps, *tokens, schedule), ((eps - 0.3 * z_t) ** 2).mean())


def test_eq1_is_a_mean_not_a_sum():
    for n in (1, 5):
        eps, t = randn(n, 4, 8, 8), torch.arange(n)
        loss = adapter_loss(lambda *_: eps + 3, eps, t, eps, None, None, Schedule.ddpm())
        close(loss, torch.tensor(9.0, dtype=torch.float64))


def test_dropped_image_is_a_zero_embedding_before_the_projection(unet):
    embeds, mask = randn(B, N, E), torch.tensor([True, False])
    dropped = drop_embeds(embeds, mask)
    assert not dropped[0].any() and torch.equal(dropped[1], embeds[1])
    adapter = trained(unet, "selfattn")
    c_i = adapter.tokens(dropped).reshape(B, N, 4, D)
    bias = adapter.image_proj.proj.bias.reshape(1, 4, D)
    close(c_i[0], adapter.image_proj.norm(bias).expand(N, 4, D))
    assert c_i[0].abs().max() > 0.01


def test_text_image_and_both_are_dropped_with_probability_p_each():
    n = 40_000

    def run(p):
        null_c_t = torch.full((1, 1, 1), -1.0)
        generator = torch.Generator().manual_seed(0)
        return drop_conditions(torch.ones(n, 1, 1), torch.ones(n, 2, 1), null_c_t, p, generator)

    c_t, embeds = run(0.05)
    assert set(c_t.flatten().tolist()) == {1, -1} and torch.equal(embeds[:, 0], embeds[:, 1])
    text, image = c_t.flatten() == -1, embeds[:, 0, 0] == 0
    for event in (text & image, text & ~image, image & ~text):
        assert abs(event.float().mean() - 0.05) < 0.004
    again = run(0.05)
    assert torch.equal(again[0], c_t) and torch.equal(again[1], embeds)
    assert all((kept == 1).all() for kept in run(0))


def test_eq11_guided_eps_is_one_batch_of_both_branches(unet, inputs):
    adapter = trained(unet)
    x_t, c_t, null_c_t = inputs["x_t"], inputs["c_t"], randn(1, L, D, seed=8)
    c_i = adapter.tokens(randn(B, N, E))
    null_c_i = adapter.tokens(torch.zeros(B, N, E, dtype=torch.float64))
    null_rows = null_c_t.expand(B, -1, -1)
    calls = []

    def counted(*args):
        calls.append(len(args[0]))
        return unet(*args)

    eps_hat = make_guided_eps(counted, c_t, c_i, null_c_t, null_c_i[:1], w=5.0, lam=0.6)(x_t, 700)
    cond = unet(x_t, 700, c_t, c_i, 0.6)
    uncond = unet(x_t, 700, null_rows, null_c_i, 0.6)
    close(eps_hat, guide(cond, uncond, 5.0), 1e-11)
    alone = make_guided_eps(counted, c_t, c_i, null_c_t, null_c_i, w=1, lam=0.6)(x_t, 700)
    assert torch.equal(alone, cond)
    assert calls == [2 * B, B]
    text_only = guide(unet(x_t, 700, c_t), unet(x_t, 700, null_rows), 5.0)
    close(make_guided_eps(unet, c_t, None, null_c_t, None, w=5.0)(x_t, 700), text_only, 1e-11)


def test_eq11_guides_in_the_precision_of_x_t_not_in_the_unets():
    cond, uncond = (randn(B, 4, 8, 8, seed=seed).bfloat16() for seed in (1, 2))
    x_t, c_t = randn(B, 4, 8, 8).float(), randn(B, L, D).bfloat16()

    def unet(x_t, *_):
        assert x_t.dtype == torch.bfloat16
        return torch.cat([cond, uncond])[:len(x_t)]

    for w in (1, 7.5):
        eps_hat = make_guided_eps(unet, c_t, None, c_t[:1], None, w)(x_t, 5)
        assert torch.equal(eps_hat, guide(cond.float(), uncond.float(), w))


def test_guided_eps_drives_every_sampler(unet, inputs):
    adapter = trained(unet)
    c_i = adapter.tokens(randn(B, N, E))
    null_c_i = adapter.tokens(torch.zeros(B, N, E, dtype=torch.float64))
    eps_fn = make_guided_eps(unet, inputs["c_t"], c_i, inputs["c_t"][:1], null_c_i, w=2.0)
    for sampler in ("ddpm", "ddim", "dpm"):
        z = sample(eps_fn, inputs["x_t"], Schedule.stable_diffusion(), 3, sampler, progress=False)
        assert z.shape == (B, 4, 8, 8) and z.isfinite().all() and not z.requires_grad


@pytest.mark.parametrize("agg", ["none", "max", "avg", "selfattn", "concat"])
def test_saved_adapter_comes_back_bit_for_bit(unet, inputs, tmp_path, agg):
    adapter, embeds = trained(unet, agg), randn(B, N, E)
    expected = unet(**inputs, c_i=adapter.tokens(embeds))
    adapter.save(tmp_path / "adapter.safetensors", {"steps": "7"})
    detach(unet)
    loaded = IPAdapter.load(tmp_path / "adapter.safetensors", unet)
    assert loaded.agg == agg
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "agg": agg, "steps": "7"}
    assert torch.equal(unet(**inputs, c_i=loaded.tokens(embeds)), expected)
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    extra = [name for name in load_file(tmp_path / "adapter.safetensors") if name.startswith("aggregator.")]
    assert len(extra) == (4 if agg == "selfattn" else 0)


def test_interrupted_save_leaves_the_old_file_and_no_other(unet, tmp_path, monkeypatch):
    adapter, path = trained(unet), tmp_path / "adapter.safetensors"
    adapter.save(path)
    before = path.read_bytes()

    def full_disk(tensors, part, metadata):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("support.files.save_file", full_disk)
    with pytest.raises(OSError):
        adapter.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_nested_bin_file_is_the_same_adapter(unet, tmp_path):
    adapter = trained(unet)
    nested = {"image_proj": adapter.image_proj.state_dict(), "ip_adapter": adapter.ip_adapter.state_dict()}
    torch.save({part: dict(tensors) for part, tensors in nested.items()}, tmp_path / "adapter.bin")
    loaded = IPAdapter.load(tmp_path / "adapter.bin", unet)
    assert loaded.agg == "none"
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_another_aggregator_starts_afresh_on_published_weights(unet, tmp_path):
    adapter, embeds, path = trained(unet), randn(B, N, E), tmp_path / "adapter.safetensors"
    adapter.save(path)
    loaded = IPAdapter.load(path, unet, agg="selfattn")
    average = embeds.mean(1, keepdim=True).expand(B, N, E)
    close(loaded.tokens(embeds), adapter.image_proj(average))
    trained(unet, "selfattn").save(path)
    assert IPAdapter.load(path, unet, agg="selfattn").aggregator.to_k.weight.any()  # the file's own: kept
    assert IPAdapter.load(path, unet, agg="avg").agg == "avg"


def refused(path, unet, message):
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        IPAdapter.load(path, unet)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(attn.image_kv is None for attn in text_attentions(unet).values())
    assert all(weight.requires_grad for weight in unet.parameters())


def test_wrong_files_are_refused_in_one_line_before_the_unet_is_touched(unet, tmp_path):
    good, path = IPAdapter(unet, E, attach=False).state_dict(), tmp_path / "adapter.safetensors"

    def write(**changes):
        tensors = {**good, **changes}
        save_file({name: x.contiguous() for name, x in tensors.items() if x is not None}, path)

    refused(path, unet, "cannot read the adapter")  # there is none
    path.write_bytes(b"not a safetensors file")
    refused(path, unet, "cannot read the adapter")
    save_file({"conv_in.weight": randn(2)}, path)
    refused(path, unet, "is no IP-Adapter")
    write(**{"ip_adapter.3.to_v_ip.weight": None})
    refused(path, unet, r"lacks the tensor ip_adapter\.3\.to_v_ip\.weight$")
    write(**{"image_proj.norm.weight": None})
    refused(path, unet, r"lacks the tensor image_proj\.norm\.weight$")
    write(**{"ip_adapter.5.to_k_ip.weight": randn(4, D)})
    shapes = r"has shape \(4, 12\), this UNet needs \(8, 12\)$"
    refused(path, unet, r"tensor ip_adapter\.5\.to_k_ip\.weight " + shapes)
    write(**{"ip_adapter.9.to_k_ip.weight": randn(8, D)})
    refused(path, unet, r"tensor ip_adapter\.9\.to_k_ip\.weight has no place in this UNet$")
    write(**{"image_proj.proj.weight": randn(4 * 768, E), "image_proj.norm.weight": randn(768)})
    refused(path, unet, "is an adapter for text of width 768, this UNet reads width 12$")


@pytest.mark.parametrize("name, kind", [
    ("image_proj.latents", "IP-Adapter Plus"),
    ("image_proj.proj.3.weight", "IP-Adapter Full Face"),
    ("image_proj.proj.0.weight", "IP-Adapter FaceID"),
    ("image_proj.perceiver_resampler.proj_in.weight", "IP-Adapter FaceID Plus"),
])  # fmt: skip
def test_other_kinds_of_adapter_are_named_as_unsupported(unet, tmp_path, name, kind):
    path = tmp_path / "adapter.safetensors"
    save_file({name: randn(2, 2), "image_proj.proj.0.weight": randn(2, 2)}, path)
    if kind != "IP-Adapter FaceID":
        refused(path, unet, f"is an {kind} file: only the plain IP-Adapter is supported$")
    save_file({name: randn(2, 2)}, path)
    refused(path, unet, f"is an {kind} file: only the plain IP-Adapter is supported$")


def test_bin_files_cannot_run_code(unet, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"image_proj": {"proj.weight": Evil()}}, tmp_path / "adapter.bin")
    refused(tmp_path / "adapter.bin", unet, "cannot read the adapter")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("agg", ["none", "selfattn"])
def test_diffusers_opens_our_file_and_gives_the_same_eps(tmp_path, agg):
    diffusers = pytest.importorskip("diffusers")
    ours = randomise(UNet(**SMALL), 1)
    theirs = diffusers.UNet2DConditionModel(**SMALL)
    theirs.load_state_dict(ours.state_dict())
    adapter, embeds = trained(ours, agg), randn(B, N, E).float()
    adapter.save(tmp_path / "adapter.safetensors")
    pipe = type("Pipeline", (diffusers.loaders.IPAdapterMixin,), {"unet": theirs})()  # what loads files
    file = dict(subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    pipe.load_ip_adapter(str(tmp_path), **file)
    pipe.set_ip_adapter_scale(0.7)
    x_t, c_t, t = randn(B, 4, 8, 8).float(), randn(B, L, D, seed=1).float(), 500
    with torch.no_grad():
        condition = {"image_embeds": [adapter.aggregator(embeds)]}
        expected = theirs(x_t, t, c_t, added_cond_kwargs=condition).sample
        eps_hat = ours(x_t, t, c_t, adapter.tokens(embeds), 0.7)
        text_only = ours(x_t, t, c_t)
    assert (eps_hat - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (eps_hat - text_only).abs().max() > 1e-2 * expected.abs().max()
