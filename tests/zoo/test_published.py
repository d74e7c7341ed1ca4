"""Published directories in and out: against transformers, against an independent CrystalCoder, bit for bit back."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from crystal.config import ConfigError
from crystal.generate import filled, load_decoder
from crystal.interchange import export_published, import_published
from crystal.training.checkpoint import write
from crystal.zoo.build import meta_decoder, parameter_count
from crystal.zoo.config import ModelConfig, model_config
from crystal.zoo.forms import config_from_json, config_to_json, published_tensors
from crystal.zoo.published import read_published, to_published


def llama_directory(path, seed=0, **changes):
    """A small random LlamaForCausalLM, saved by transformers itself; weights large enough to tell errors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    randomize(model)
    model.save_pretrained(path)
    return model


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data.normal_(mean, 0.2, generator=generator)


def ids(vocab_size, length=40):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
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

CRYSTAL = {
    "model_type": "crystalcoder", "vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_inner": 170, "activation_function": "swiglu", "position_embedding_type": "rotary", "rotary_dim": 4,
    "layer_norm_epsilon": 1e-5, "mup_width_scale": 0.25, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True, "scale_attn_weights": True, "tie_word_embeddings": True,
}  # fmt: skip


def crystal_state(c=CRYSTAL, seed=3):
    """Random tensors of the published state dict, its duplicate head and its buffers included (facts 1.6)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, mean=0.0, std=0.1):
        return torch.empty(shape).normal_(mean, std, generator=generator)

    d, f = c["n_embd"], c["n_inner"]
    state = {"transformer.wte.weight": random(c["vocab_size"], d)}
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            state[f"{h}.{norm}.weight"], state[f"{h}.{norm}.bias"] = random(d, mean=1.0), random(d)
        for name, fan_in, fan_out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, f),
            ("mlp.c_fc2", d, f),
            ("mlp.c_proj", f, d),
        ):
            state[f"{h}.{name}.weight"], state[f"{h}.{name}.bias"] = random(fan_in, fan_out, std=0.3), random(fan_out)
        state[f"{h}.attn.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
        state[f"{h}.attn.masked_bias"] = torch.tensor(-1e4)
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = random(d, mean=1.0), random(d)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    return state


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


def crystal_directory(path, state=None, shards=3, **changes):
    """As LLM360 published it: .bin shards and their index."""
    state = crystal_state() if state is None else state
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CRYSTAL | changes))
    names = list(state)
    weight_map = {}
    for n in range(shards):
        file = f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin"
        part = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        torch.save({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


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
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


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
    monkeypatch.setattr("crystal.interchange.SHARD_BYTES", 60_000)
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
        expected = theirs(x).logits
        assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fused_parts_may_come_in_any_order_but_must_all_come():
    config = model_config("crystalcoder-w64-l2")
    tensors = list(random_tensors(config))
    forwards, backwards = dict(to_published(config, tensors)), dict(to_published(config, tensors[::-1]))
    assert forwards.keys() == backwards.keys() == {t.name for t in published_tensors(config, "crystalcoder")}
    assert all(torch.equal(forwards[n], backwards[n]) for n in forwards)
    with pytest.raises(ConfigError, match=r"blocks\.1\.attn\.k\.bias"):
        list(to_published(config, [t for t in tensors if t[0] != "blocks.1.attn.k.bias"]))
    with pytest.raises(ConfigError, match=r"embed\.weight.*twice"):
        list(to_published(config, [tensors[0], *tensors]))


def test_a_model_that_no_published_form_computes_is_not_exported(tmp_path):
    config = ModelConfig(**AMBER_LIKE.model_dump(exclude={"mup"}), mup={"parametrization": "mup", "base_d_model": 32})
    with pytest.raises(ConfigError, match=r"multiplier of logits.*llama form, got 0\.5"):
        config_to_json(config)
    write(tmp_path / "c", ((f"model.{n}", t) for n, t in random_tensors(config)), {"model": config.model_dump()})
    with pytest.raises(ConfigError, match="multiplier of logits"):
        export_published(tmp_path / "c", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# -- dtypes, files, mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_widens_exactly(dtype, tmp_path):
    llama_directory(tmp_path).to(dtype).save_pretrained(tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    assert source["lm_head.weight"].dtype == dtype
    tensors = dict(read_published(tmp_path)[1])
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["head.weight"], source["lm_head.weight"].float())
    assert torch.equal(tensors["head.weight"].to(dtype), source["lm_head.weight"])


def test_sharded_safetensors_single_bin_and_old_bin_all_read(tmp_path):
    model = llama_directory(tmp_path)
    single = dict(read_published(tmp_path)[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    directories = [tmp_path / "sharded"]
    for new in (True, False):
        directory = tmp_path / f"bin-{new}"
        directory.mkdir()
        (directory / "config.json").write_text((tmp_path / "config.json").read_text())
        state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        directories.append(directory)
    for directory in directories:
        tensors = list(read_published(directory)[1])
        assert len(tensors) == len(single)
        assert all(torch.equal(t, single[n]) for n, t in tensors)


def test_handed_out_tensors_own_their_memory(tmp_path):
    for _, tensor in read_published(crystal_directory(tmp_path))[1]:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """A shard is opened only when its tensors are asked for, and tensors are read as they are handed out."""
    from crystal.zoo import published

    directory = crystal_directory(tmp_path, shards=4)
    read = []
    original = published._Torch.get
    monkeypatch.setattr(published._Torch, "get", lambda self, name: read.append(name) or original(self, name))
    _, tensors = read_published(directory)
    assert read == []
    next(tensors)
    assert read == ["transformer.wte.weight"]
    next(tensors)
    assert len(read) == 2


MISTAKES = {
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act"),
    "head_dim": ({"head_dim": 32}, "head_dim"),
    "model_type": ({"model_type": "mistral"}, "model_type"),
    "hidden_size": ({"hidden_size": "64"}, "hidden_size"),
    "quantization_config": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_llama_cannot_be_is_one_line_with_file_and_key(name, tmp_path):
    llama_directory(tmp_path)
    changes, key = MISTAKES[name]
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ConfigError) as error:
        read_published(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: {key}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"mup_width_scale": 0.123}, "mup_width_scale"),
        ({"mup_width_scale": 1 / 64}, "mup.base_d_model"),  # one is not a whole head
        ({"n_head": 5}, "n_head"),
        ({"rotary_dim": 18}, "rotary_dim"),
    ],
)
def test_what_a_crystalcoder_cannot_be_is_one_line_with_file_and_key(changes, key, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_published(crystal_directory(tmp_path, **changes))
    assert str(error.value).startswith(f"{tmp_path}/config.json: {key}")


@pytest.mark.parametrize("key", [k for k in CRYSTAL if k.startswith("mup_")])
def test_a_crystalcoder_without_its_multipliers_is_refused(key, tmp_path):
    directory = crystal_directory(tmp_path)
    mapping = json.loads((directory / "config.json").read_text())
    del mapping[key]
    (directory / "config.json").write_text(json.dumps(mapping))
    with pytest.raises(ConfigError, match=f"config.json: {key}: expected a value"):
        read_published(directory)


def changed(tmp_path, change):
    """A llama directory whose tensors went through `change`."""
    llama_directory(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight: expected, but no"),
        (lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), "not a tensor of this model"),
        (lambda s: s.update({"model.norm.weight": torch.ones(63)}), r"norm.weight: expected shape \[64\], got \[63\]"),
        (lambda s: s.update({"model.norm.weight": torch.ones(64).int()}), "norm.weight: expected fp32, bf16 or fp16"),
        (lambda s: s.update({"model.norm.weight": torch.ones(64).double()}), "norm.weight: expected fp32"),
    ],
)
def test_wrong_tensors_are_refused_before_any_is_handed_out(change, line, tmp_path):
    with pytest.raises(ConfigError, match=line) as error:
        read_published(changed(tmp_path, change))
    assert str(error.value).startswith(f"{tmp_path}/model.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = crystal_directory(tmp_path)
    last = directory / "pytorch_model-00003-of-00003.bin"
    torch.save(torch.load(last) | {"transformer.wte.weight": torch.ones(96, 64)}, last)
    with pytest.raises(ConfigError, match=r"00003.bin: transformer\.wte\.weight: expected once"):
        read_published(directory)


def test_a_head_that_is_no_copy_of_the_tied_embedding_is_refused(tmp_path):
    state = crystal_state()
    state["lm_head.weight"][5, 5] += 1e-3
    directory = crystal_directory(tmp_path / "d", state)
    with pytest.raises(ConfigError, match=r"lm_head\.weight: expected a copy of the embedding"):
        import_published(directory, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_missing_shard_a_cut_file_and_a_hostile_pickle_are_one_line(tmp_path):
    directory = crystal_directory(tmp_path)
    second = directory / "pytorch_model-00002-of-00003.bin"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"00002-of-00003.bin: cannot be read as weights"):
        read_published(directory)
    ran = tmp_path / "ran"
    torch.save({"transformer.wte.weight": _Hostile(str(ran))}, second)
    with pytest.raises(ConfigError, match=r"00002-of-00003.bin: cannot be read as weights"):
        read_published(directory)
    assert not ran.exists()
    second.unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00003.bin: no such file"):
        read_published(directory)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_an_index_does_not_lead_out_of_its_directory(tmp_path):
    directory = crystal_directory(tmp_path)
    edit_json(directory / "pytorch_model.bin.index.json", weight_map={"transformer.wte.weight": "../x.bin"})
    with pytest.raises(ConfigError, match=r"index\.json: weight_map"):
        read_published(directory)


def test_a_directory_without_config_or_weights_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CRYSTAL))
    with pytest.raises(ConfigError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: expected JSON"):
        read_published(tmp_path)


def test_the_tokenizer_goes_with_the_weights_both_ways(tmp_path):
    directory = crystal_directory(tmp_path / "d")
    (directory / "tokenizer.model").write_bytes(b"vocabulary")
    assert import_published(directory, tmp_path / "ckpt")["tokenizer"] == "tokenizer.model"
    export_published(tmp_path / "ckpt", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"vocabulary"


def test_nothing_that_is_there_is_overwritten(tmp_path):
    directory = crystal_directory(tmp_path / "d")
    for call in (import_published, export_published):
        if call is export_published:
            import_published(directory, tmp_path / "ckpt")
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="there: expected a new directory"):
            call(directory if call is import_published else tmp_path / "ckpt", tmp_path / "there")
