"""Published directories in and out: against transformers, against an independent CrystalCoder, bit for bit back."""

import json
import math

import pytest
import torch
from closeness import assert_near, path_length
from directories import CRYSTAL, crystal_directory, crystal_state, llama_directory
from safetensors.torch import load_file
from torch.nn import functional as F

from crystal.checkpoint import write
from crystal.errors import CheckpointError, ConfigError
from crystal.inference.load import filled, load_decoder
from crystal.interop.huggingface import export_published, import_published
from crystal.interop.huggingface_forms import config_from_json, config_to_json, published_tensors
from crystal.interop.huggingface_read import read_published, to_published
from crystal.zoo.build import meta_decoder, parameter_count
from crystal.zoo.config import ModelConfig, model_config


def ids(vocab_size, length=40):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


SHAPES = {
    "amber": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "gqa tied base 1e5 eps 1e-5": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_llama_directory_gives_transformers_logits(name, tmp_path):
    theirs = llama_directory(tmp_path, **SHAPES[name])
    config, tensors = read_published(tmp_path)
    ours = filled(config, tensors, str(tmp_path))
    x = ids(config.vocab_size)
    with torch.inference_mode():
        expected, got = theirs(x).logits, ours(x)
    assert expected.abs().max() > 1  # the weights matter
    assert_near(got, expected, path_length(config, x.shape[1]))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_what_config_json_says_is_what_the_config_holds(tmp_path):
    llama_directory(tmp_path, num_key_value_heads=2, rms_norm_eps=1e-5)
    config, _ = read_published(tmp_path)
    assert config == ModelConfig(
        d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=112, vocab_size=96, max_seq_len=64, norm_eps=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("form", ["amber-7b", "crystalcoder-7b"])
def test_the_published_7b_configs_are_the_presets(form):
    preset = model_config(form)
    assert config_from_json(config_to_json(preset), "config.json")[0] == preset


def test_llm360s_own_config_json_is_the_crystalcoder_preset():
    # the file of LLM360/crystalcoder-train, less its class paths (facts: llm360.md 1.5)
    published = {
        "attn_pdrop": 0.0, "scale_attn_weights": True, "resid_pdrop": 0.0, "mup_embeddings_scale": 14.6,
        "n_inner": 10922, "n_embd": 4096, "layer_norm_epsilon": 1e-05, "n_positions": 2048,
        "activation_function": "swiglu", "n_head": 32, "n_layer": 32, "mup_output_alpha": 2.22,
        "mup_width_scale": 0.0625, "position_embedding_type": "rotary", "rotary_dim": 32,
        "mup_scale_qk_dot_by_d": True, "tie_word_embeddings": True, "vocab_size": 32032, "embd_pdrop": 0.0,
        "model_type": "crystalcoder", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
        "architectures": ["CrystalCoderLMHeadModel"],
    }  # fmt: skip
    config, form = config_from_json(published, "config.json")
    assert (config, form) == (model_config("crystalcoder-7b"), "crystalcoder")
    assert parameter_count(config) == 6_575_278_720
    shapes = {t.name: t.shape for t in published_tensors(config, form)}
    assert shapes["transformer.h.31.attn.c_attn.weight"] == (4096, 12288)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (10922, 4096)
    assert shapes["transformer.h.0.mlp.c_fc2.bias"] == (10922,)
    # the keys of the published index: these, lm_head, and two buffers a layer
    assert len(shapes) + 1 + 2 * 32 == 516


# -- CrystalCoder, written down a second time from the facts alone ------------------------------------------------


def crystal_reference(state, c, tokens):
    """The published forward pass in fp64, position by position where that is the plainest."""
    w = {name: t.double() for name, t in state.items()}
    head = c["n_embd"] // c["n_head"]

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def norm(x, name):
        variance = x.var(-1, unbiased=False, keepdim=True) + c["layer_norm_epsilon"]
        return (x - x.mean(-1, keepdim=True)) / variance.sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def rotated(x):  # [tokens, head]: dimension 2i turns with 2i + 1
        out = x.clone()
        for t in range(len(x)):
            for i in range(c["rotary_dim"] // 2):
                angle = t / 10000 ** (2 * i / c["rotary_dim"])
                a, b = x[t, 2 * i], x[t, 2 * i + 1]
                out[t, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["transformer.wte.weight"][tokens] * c["mup_embeddings_scale"]
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = conv1d(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = qkv.split(c["n_embd"], -1)
        heads = []
        for j in range(c["n_head"]):
            part = slice(j * head, (j + 1) * head)
            scores = rotated(q[:, part]) @ rotated(k[:, part]).T / head
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, part])
        x = x + conv1d(torch.cat(heads, -1), f"{h}.attn.c_proj")
        y = norm(x, f"{h}.ln_2")
        y = conv1d(y, f"{h}.mlp.c_fc") * F.silu(conv1d(y, f"{h}.mlp.c_fc2"))
        x = x + conv1d(y, f"{h}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T
    return logits * c["mup_output_alpha"] * c["mup_width_scale"]


@pytest.mark.parametrize("scale_by_d", [True, False])
def test_the_published_crystalcoder_form_gives_its_logits(scale_by_d, tmp_path):
    directory = crystal_directory(tmp_path, mup_scale_qk_dot_by_d=scale_by_d)
    config, tensors = read_published(directory)
    ours = filled(config, tensors, str(directory))
    state, c = crystal_state(), dict(CRYSTAL)
    x = ids(96, 24)
    with torch.inference_mode():
        got = ours(x)
    if not scale_by_d:  # 1/sqrt(d) is what a queries' projection sqrt(d) times as large gives under 1/d
        for i in range(c["n_layer"]):
            for kind in ("weight", "bias"):
                state[f"transformer.h.{i}.attn.c_attn.{kind}"][..., :64] *= 4
    expected = torch.stack([crystal_reference(state, c, row) for row in x])
    assert expected.abs().max() > 1
    assert_near(got, expected, path_length(config, x.shape[1]))


@pytest.mark.parametrize("key", ["mup_embeddings_scale", "mup_output_alpha", "mup_width_scale", "rotary_dim"])
def test_every_multiplier_of_the_file_reaches_the_logits(key, tmp_path):
    def logits(**changes):
        directory = crystal_directory(tmp_path / "d", **changes)
        config, tensors = read_published(directory)
        with torch.inference_mode():
            return filled(config, tensors, str(directory))(ids(96, 24))

    assert not torch.allclose(logits(), logits(**{key: CRYSTAL[key] * 2}), atol=1e-2)


# -- both ways ----------------------------------------------------------------------------------------------------


def random_tensors(config, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in meta_decoder(config).named_parameters():
        yield name, torch.empty(p.shape).normal_(generator=generator)


AMBER_LIKE = ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=96, max_seq_len=64)


@pytest.mark.parametrize("name", ["llama", "crystalcoder"])
def test_export_then_import_is_bitwise(name, tmp_path, monkeypatch):
    config = AMBER_LIKE if name == "llama" else model_config("crystalcoder-w64-l3")
    monkeypatch.setattr("crystal.interop.huggingface.SHARD_BYTES", 60_000)
    write(tmp_path / "first", ((f"model.{n}", t) for n, t in random_tensors(config)), {"model": config.model_dump()})
    export_published(tmp_path / "first", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    summary = import_published(tmp_path / "hf", tmp_path / "second")
    assert summary["parameters"] == parameter_count(config)
    model, checkpoint = load_decoder(tmp_path / "second")
    assert ModelConfig(**checkpoint.state["model"]) == config
    original = dict(random_tensors(config))
    assert all(torch.equal(p, original.pop(n)) for n, p in model.named_parameters())
    assert not original


def test_import_then_export_gives_the_published_tensors_back(tmp_path):
    import_published(crystal_directory(tmp_path / "d"), tmp_path / "ckpt")
    export_published(tmp_path / "ckpt", tmp_path / "hf")
    got, expected = load_file(tmp_path / "hf" / "model.safetensors"), crystal_state()
    weights = {n for n in expected if n != "lm_head.weight" and not n.endswith((".attn.bias", "masked_bias"))}
    assert set(got) == weights
    assert all(torch.equal(got[n], expected[n]) for n in weights)
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: exported[key] for key in CRYSTAL} == CRYSTAL


def test_transformers_reads_what_is_exported(tmp_path):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "c", ((f"model.{n}", t / 8) for n, t in random_tensors(AMBER_LIKE)),
          {"model": AMBER_LIKE.model_dump()})  # fmt: skip
    export_published(tmp_path / "c", tmp_path / "hf")
    theirs, (ours, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load_decoder(tmp_path / "c")
    x = ids(96)
    with torch.inference_mode():
        assert_near(ours(x), theirs(x).logits, path_length(AMBER_LIKE, x.shape[1]))


def test_fused_parts_may_come_in_any_order_but_must_all_come():
    config = model_config("crystalcoder-w64-l2")
    tensors = list(random_tensors(config))
    forwards, backwards = dict(to_published(config, tensors)), dict(to_published(config, tensors[::-1]))
    assert forwards.keys() == backwards.keys() == {t.name for t in published_tensors(config, "crystalcoder")}
    assert all(torch.equal(forwards[n], backwards[n]) for n in forwards)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.k\.bias"):
        list(to_published(config, [t for t in tensors if t[0] != "blocks.1.attn.k.bias"]))
    with pytest.raises(CheckpointError, match=r"embed\.weight.*twice"):
        list(to_published(config, [tensors[0], *tensors]))


def test_a_model_that_no_published_form_computes_is_not_exported(tmp_path):
    config = ModelConfig(**AMBER_LIKE.model_dump(exclude={"mup"}), mup={"parametrization": "mup", "base_d_model": 32})
    with pytest.raises(ConfigError, match=r"multiplier of logits.*llama form, got 0\.5"):
        config_to_json(config)
    write(tmp_path / "c", ((f"model.{n}", t) for n, t in random_tensors(config)), {"model": config.model_dump()})
    with pytest.raises(ConfigError, match="multiplier of logits"):
        export_published(tmp_path / "c", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_nothing_that_is_there_is_overwritten(tmp_path):
    directory = crystal_directory(tmp_path / "d")
    for call in (import_published, export_published):
        if call is export_published:
            import_published(directory, tmp_path / "ckpt")
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="there: expected a new directory"):
            call(directory if call is import_published else tmp_path / "ckpt", tmp_path / "there")
