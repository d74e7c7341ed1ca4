"""Our decoder against a forward pass in numpy that was written from the published facts (`numpy_reference`)."""

import ast
import json
from pathlib import Path

import numpy as np
import numpy_reference
import pytest
import torch
from directories import CRYSTAL, crystal_directory

from crystal.inference.load import filled
from crystal.interop.huggingface_read import read_published
from crystal.zoo.build import meta_decoder

PUBLISHED = {key: CRYSTAL[key] for key in CRYSTAL} | {
    # a quarter of each head turns, as published; heads of 16
    "n_embd": 128, "n_head": 8, "n_inner": 341, "n_layer": 3, "rotary_dim": 4, "vocab_size": 160, "n_positions": 128,
    "mup_width_scale": 0.0625,
}  # fmt: skip


def weights(config, seed=0):
    """Published tensors at the sizes that training gives them: activations and logits near 1, biases and gains too."""
    random = np.random.default_rng(seed)
    d, f = config["n_embd"], config["n_inner"]
    out = 1 / np.sqrt(2 * config["n_layer"])
    shapes = {"transformer.wte.weight": ((config["vocab_size"], d), 0, 0.073)}
    for n in range(config["n_layer"]):
        h = f"transformer.h.{n}"
        for name, fan_in, fan_out, size in (
            ("attn.c_attn", d, 3 * d, 1), ("attn.c_proj", d, d, out),
            ("mlp.c_fc", d, f, 1), ("mlp.c_fc2", d, f, 1), ("mlp.c_proj", f, d, out),
        ):  # fmt: skip
            shapes[f"{h}.{name}.weight"] = (fan_in, fan_out), 0, size / np.sqrt(fan_in)
            shapes[f"{h}.{name}.bias"] = (fan_out,), 0, 0.1
        for norm in ("ln_1", "ln_2"):
            shapes[f"{h}.{norm}.weight"], shapes[f"{h}.{norm}.bias"] = ((d,), 1, 0.1), ((d,), 0, 0.1)
    shapes["transformer.ln_f.weight"], shapes["transformer.ln_f.bias"] = ((d,), 1, 0.1), ((d,), 0, 0.1)
    return {name: random.normal(mean, std, shape).astype(np.float32) for name, (shape, mean, std) in shapes.items()}


def ours(tensors, config, directory, ids_BT):
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    crystal_directory(directory, state, **config)
    decoder = filled(*read_published(directory), str(directory))
    with torch.inference_mode():
        return decoder(torch.from_numpy(ids_BT)).numpy()


def ids(config, tokens, seed=1):
    return np.random.default_rng(seed).integers(config["vocab_size"], size=(2, tokens))


@pytest.mark.parametrize("scale_by_d", [True, False])
def test_our_logits_are_numpys_to_1e_5(scale_by_d, tmp_path):
    config = PUBLISHED | {"mup_scale_qk_dot_by_d": scale_by_d}
    tensors, ids_BT = weights(config), ids(config, 100)
    got = ours(tensors, config, tmp_path / "d", ids_BT)
    single = np.stack([numpy_reference.forward(tensors, config, row) for row in ids_BT])
    double = np.stack([numpy_reference.forward(tensors, config, row, np.float64) for row in ids_BT])
    assert 0.5 < np.abs(double).max() < 10
    assert np.abs(got - single).max() < 1e-5
    assert np.abs(got - double).max() < 1e-5


def test_the_presets_own_form_too(tmp_path):
    """LLM360's config.json, narrow and shallow: its shares of rotary dimensions, its factors, its eps."""
    file = Path(__file__).parents[3] / "shared" / "data" / "crystalcoder-config.json"
    published = json.loads(file.read_text()) if file.is_file() else PUBLISHED | {"n_embd": 4096, "n_head": 32}
    config = published | {
        "n_embd": 256, "n_head": 2, "n_inner": 682, "n_layer": 2, "vocab_size": 64, "n_positions": 64, "rotary_dim": 32
    }  # fmt: skip
    config["mup_width_scale"] = 0.0625
    tensors, ids_BT = weights(config), ids(config, 40)
    expected = np.stack([numpy_reference.forward(tensors, config, row) for row in ids_BT])
    assert np.abs(ours(tensors, config, tmp_path / "d", ids_BT) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"mup_embeddings_scale": 14.5}, {"mup_output_alpha": 2.2}, {"mup_width_scale": 0.125}, {"rotary_dim": 8},
        {"mup_scale_qk_dot_by_d": False}, {"layer_norm_epsilon": 1e-3},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_wrong_number_in_the_reference_would_show(change, tmp_path):
    tensors, ids_BT = weights(PUBLISHED), ids(PUBLISHED, 60)
    got = ours(tensors, PUBLISHED, tmp_path / "d", ids_BT)
    other = np.stack([numpy_reference.forward(tensors, PUBLISHED | change, row) for row in ids_BT])
    assert np.abs(got - other).max() > 1e-4


@pytest.mark.parametrize("swap", [("c_fc.", "c_fc2."), ("ln_1.", "ln_2.")])
def test_a_tensor_in_anothers_place_would_show(swap, tmp_path):
    tensors, ids_BT = weights(PUBLISHED), ids(PUBLISHED, 60)
    a, b = swap
    swapped = {name.replace(a, "#").replace(b, a).replace("#", b): array for name, array in tensors.items()}
    got = ours(tensors, PUBLISHED, tmp_path / "d", ids_BT)
    other = np.stack([numpy_reference.forward(swapped, PUBLISHED, row) for row in ids_BT])
    assert np.abs(got - other).max() > 1e-2


def test_the_reference_is_independent():
    tree = ast.parse(Path(numpy_reference.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imported] == ["import numpy as np"]


def test_no_grouped_queries_and_all_biases_are_in_this_form(tmp_path):
    state = {name: torch.from_numpy(array) for name, array in weights(PUBLISHED).items()}
    config, _ = read_published(crystal_directory(tmp_path / "d", state, **PUBLISHED))
    assert (config.kv_heads, config.rotary_style, config.bias) == (config.n_heads, "interleaved", True)
    assert 0 < config.rotary_fraction < 1
    assert sum(p.numel() for p in meta_decoder(config).parameters()) == sum(t.numel() for t in state.values())
