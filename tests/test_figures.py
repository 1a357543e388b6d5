"""The figures of the course: they are drawn, small enough, and show what they say they show."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from aggregators import SelfAttention
from attention import CrossAttention, attention
from experiments import figures, figures_attention, figures_common, figures_diffusion, figures_numbers
from experiments.figures_common import World
from ip_adapter import IPAdapter
from support.program import run
from conftest import close, randn

COURSE = Path(__file__).parent.parent / "assets" / "course"


@pytest.fixture
def draw(workdir, tiny_folder, tiny_model, monkeypatch):
    """Run the program on random weights, with few steps, people and pictures."""
    adapter = IPAdapter(tiny_model.unet, 128, "selfattn")
    Path("runs/selfattn").mkdir(parents=True)
    adapter.save("runs/selfattn/ip-adapter.safetensors")
    found = {"selfattn": Path("runs/selfattn/ip-adapter.safetensors")}
    monkeypatch.setattr(figures_common, "find_adapters", lambda *_, **options: found)
    monkeypatch.setattr(figures_diffusion, "FEW_STEPS", (1, 2))
    monkeypatch.setattr(figures_numbers, "FEW_REFERENCES", (1, 2))
    monkeypatch.setattr(figures_numbers, "SIZES", (2, 4))

    def draw(*words):
        options = ["--model", tiny_folder, "--people", 6, "--steps", 1, "--long-steps", 3]
        monkeypatch.setattr(sys, "argv", ["figures", *words, *map(str, options)])
        figures.main()

    return draw


def test_every_figure_but_dreambooths_is_drawn_with_a_random_model(draw):
    names = [name for name in figures.FIGURES if name != "prior"]  # it trains twice
    draw(*names)
    for name in names:
        path = Path("assets/method.png" if name == "method" else f"assets/course/{name}.png")
        assert Image.open(path).mode == ("RGBA" if name == "method" else "P")  # few colours: small


def test_the_courses_figures_can_all_be_drawn_again_and_together_are_small():
    files = list(COURSE.glob("*.png"))
    assert {file.stem for file in files} == set(figures.FIGURES) - {"method"}
    assert sum(file.stat().st_size for file in files) <= 2 * 2**20


def test_an_unknown_figure_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures", "vae", "mona_lisa"])
    with pytest.raises(SystemExit) as stopped:
        run(figures.main)
    assert stopped.value.code == 2
    assert "no figure 'mona_lisa'" in capsys.readouterr().err


def test_weights_are_those_that_attention_takes_the_mean_with():
    Q, K, V = randn(2, 5, 8, seed=1), randn(2, 7, 8, seed=2), randn(2, 7, 3, seed=3)
    weights = figures_attention.attention_weights(Q, K.double())
    close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    close(weights @ V, attention(Q, K, V))


def test_the_watched_weights_give_the_layers_answer():
    torch.manual_seed(0)
    layer = CrossAttention(8, 6, heads=2, head_dim=4)
    layer.image_kv = (torch.nn.Linear(6, 8), torch.nn.Linear(6, 8))
    layer.double()
    for part in layer.image_kv:
        part.double()
    unet = torch.nn.ModuleDict({"attn2": layer})
    found = []
    figures_attention.watch_attention(unet, found)
    x, c_t, c_i = randn(1, 4, 8), randn(1, 3, 6, seed=1), randn(1, 5, 6, seed=2)
    answer = layer(x, c_t, c_i, 1.0)
    (text, image), = found
    V = layer.split_heads(layer.to_v(c_t))
    V_ip = layer.split_heads(layer.image_kv[1](c_i))
    close(layer.to_out(layer.merge_heads(text @ V + image @ V_ip)), answer)


def test_without_training_all_references_weigh_the_same():
    weights = figures_attention.weigh_references(SelfAttention(8), torch.randn(2, 9, 8))
    close(weights, torch.full((2, 9, 9), 1 / 9), 1e-6)


def test_only_the_photos_of_a_kind_are_drawn_anew():
    world = World(people=6)
    world.sd = type("Sized", (), {"image_size": 64})
    usual = figures_attention.draw_references_of(world, (None, None, None))
    mixed = figures_attention.draw_references_of(world, (None, 2, "stranger"))
    assert (usual == mixed).flatten(2).all(2).tolist() == [[True, False, False]] * 6
    assert torch.equal(mixed[:, 2], usual[:, 2].roll(1, 0))


def test_a_sweep_that_is_there_is_read(tmp_path):
    rows = {f"Max; references: {n}": {"identity ↑": [0.5, 0.4, 0.6]} for n in (1, 2)}
    file = tmp_path / "sweep_refs.json"
    file.write_text(json.dumps({"rows": rows}))
    assert figures_numbers.read_sweep(file) == {"Max": [(n, 0.5, 0.4, 0.6) for n in (1, 2)]}
