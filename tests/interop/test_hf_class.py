"""CrystalCoder in transformers: the registered class and the directory with its code give our logits, and train."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_near, path_length
from directories import CRYSTAL, crystal_directory, crystal_state
from folding import trained
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache

from crystal.checkpoint import read, write
from crystal.errors import ConfigError
from crystal.inference.load import load_decoder, load_tokenizer
from crystal.interop.hf import CrystalConfig, CrystalForCausalLM, CrystalModel
from crystal.interop.huggingface import export_published, import_published
from crystal.zoo.build import meta_decoder, plan_for
from crystal.zoo.config import model_config

CONFIG = model_config("crystalcoder-w128-l3").model_copy(update={"vocab_size": 500})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, its export) of a small CrystalCoder with random biases and gains."""
    root = tmp_path_factory.mktemp("hf")
    generator = torch.Generator().manual_seed(1)

    def tensors():
        for name, p in meta_decoder(CONFIG).named_parameters():
            # blocks that outweigh the tied embedding, else every token is repeated for ever
            std = 0.1 if p.ndim == 1 else 0.073 if name == "embed.weight" else 3 * p.shape[1] ** -0.5
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            yield f"model.{name}", torch.empty(p.shape).normal_(mean, std, generator=generator)

    state = {"model": CONFIG.model_dump(mode="json"), "bos_id": 1, "eos_id": 2}
    write(root / "checkpoint", tensors(), state)
    return root / "checkpoint", export_published(root / "checkpoint", root / "hf")


@pytest.fixture(scope="module")
def decoder(exported):
    return load_decoder(exported[0])[0]


@pytest.fixture
def model(exported):
    return AutoModelForCausalLM.from_pretrained(exported[1]).eval()


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """remote(directory, **settings) → the model by the directory's own code, as where crystal is not installed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def load(directory, **settings):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
            for mapping in (CONFIG_MAPPING, AutoModel._model_mapping, AutoModelForCausalLM._model_mapping):
                patch.setattr(mapping, "_extra_content", {})
            model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **settings).eval()
        assert not isinstance(model, CrystalForCausalLM)
        file = Path(sys.modules[type(model).__module__].__file__)
        assert "transformers_modules" in file.parts
        assert file.read_bytes() == (directory / "modeling_crystal.py").read_bytes()
        return model

    return load


def ids(rows=2, tokens=24, vocab_size=CONFIG.vocab_size):
    return torch.randint(3, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(7))


# -- one model, three programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_registered_class_and_the_directorys_own_code_give_our_logits(attention, exported, decoder, remote):
    registered = AutoModelForCausalLM.from_pretrained(exported[1], attn_implementation=attention).eval()
    assert isinstance(registered, CrystalForCausalLM)
    by_its_code = remote(exported[1], attn_implementation=attention)
    assert registered.config._attn_implementation == by_its_code.config._attn_implementation == attention
    with torch.inference_mode():
        expected, got, again = decoder(ids()), registered(ids()).logits, by_its_code(ids()).logits
    assert expected.std() > 0.05  # the weights matter
    assert_near(got, expected, path_length(CONFIG, 24))
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert torch.equal(got, again)


def test_the_code_in_a_directory_needs_torch_and_transformers_only(exported):
    tree = ast.parse((exported[1] / "modeling_crystal.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"inspect", "math", "torch", "transformers", "typing"}


def test_in_bf16_the_class_is_as_far_from_fp32_as_our_decoder(exported, decoder):
    theirs = AutoModelForCausalLM.from_pretrained(exported[1], dtype=torch.bfloat16).eval()
    ours = load_decoder(exported[0], torch.bfloat16)[0]
    with torch.inference_mode():
        exact = decoder(ids(tokens=64))
        off = [
            (logits.float() - exact).square().mean().sqrt()
            for logits in (theirs(ids(tokens=64)).logits, ours(ids(tokens=64)))
        ]
    assert off[0] < 1.3 * off[1]


def test_llm360s_own_directory_loads_without_its_code(tmp_path):
    """`.bin` shards with masks and a second head, a config.json that names classes which no longer load."""
    auto_map = {"AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel"}
    directory = crystal_directory(tmp_path / "d", architectures=["CrystalCoderLMHeadModel"], auto_map=auto_map)
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert isinstance(theirs, CrystalForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    import_published(directory, tmp_path / "ckpt")
    ours, x = load_decoder(tmp_path / "ckpt")[0], ids(vocab_size=96)
    with torch.inference_mode():
        assert_near(theirs.eval()(x).logits, ours(x), path_length(ours.config, 24))


def test_auto_classes_know_the_model(exported):
    config = AutoConfig.from_pretrained(exported[1])
    assert isinstance(config, CrystalConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, CONFIG.n_heads)
    assert isinstance(AutoModel.from_pretrained(exported[1]), CrystalModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), CrystalForCausalLM)


# -- scoring code elsewhere ----------------------------------------------------------------------------------------


def test_logit_scale_is_what_fused_heads_need(model, exported):
    """TRL's rule: backbone, then lm_head.weight, then the config's logit_scale; without it 0.13875 would be lost."""
    written = json.loads((exported[1] / "config.json").read_text())
    assert written["logit_scale"] == plan_for(CONFIG).logits_multiplier == model.config.logit_scale != 1
    with torch.inference_mode():
        hidden = model.base_model(ids()).last_hidden_state
        head = model.get_output_embeddings()
        assert head.bias is None
        scored = hidden @ head.weight.T * model.config.logit_scale
        expected = model(ids()).logits
    assert_near(scored, expected, CONFIG.d_model)


def test_the_published_config_gets_its_logit_scale():
    assert CrystalConfig().logit_scale == CrystalConfig(**CRYSTAL, logit_scale=None).logit_scale / 4 == 2.22 * 0.0625


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("logit_scale", 1.0, "logit_scale: expected mup_output_alpha x mup_width_scale = 0.13875, got 1"),
        ("activation_function", "gelu", "activation_function: expected swiglu, got gelu"),
        ("position_embedding_type", "alibi", "position_embedding_type: expected rotary, got alibi"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx: expected False"),
        ("n_head", 33, "n_head: expected a divisor of n_embd 4096, got 33"),
        ("rotary_dim", 130, "rotary_dim: expected an even number up to 128, got 130"),
    ],
)
def test_a_config_that_the_class_does_not_compute_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        CrystalConfig(**{key: value})


def test_embeddings_are_scaled_however_they_come(model):
    with torch.inference_mode():
        looked_up = model.get_input_embeddings()(ids())
        assert torch.equal(model(inputs_embeds=looked_up).logits, model(ids()).logits)
        with pytest.raises(ValueError, match="expected one of input_ids and inputs_embeds"):
            model()


def test_logits_can_be_had_for_the_last_positions_alone_and_states_for_all_layers(model):
    with torch.inference_mode():
        all_logits, out = model(ids()).logits, model(ids(), logits_to_keep=2, output_hidden_states=True)
        assert_near(out.logits, all_logits[:, -2:], CONFIG.d_model)
        assert len(out.hidden_states) == CONFIG.n_layers + 1
        model.set_attn_implementation("eager")
        weights = model(ids(), output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, CONFIG.n_heads, 24, 24)] * CONFIG.n_layers
    assert torch.allclose(weights[0].sum(-1), torch.ones(()))


# -- generation ----------------------------------------------------------------------------------------------------


def test_the_cache_changes_nothing(model):
    x = ids(tokens=20)
    with torch.inference_mode():
        whole = model(x).logits
        cache = model(x[:, :11], use_cache=True).cache
        rest = [model(x[:, 11:15], cache=cache).logits]
        rest += [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(15, 20)]  # the old name too
    assert cache.get_seq_length() == 20
    assert_near(torch.cat(rest, 1), whole[:, 11:], path_length(CONFIG, 20))


def test_a_static_cache_works_too(model):
    x = ids(tokens=12)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.inference_mode():
        model(x[:, :8], cache=cache)
        assert_near(model(x[:, 8:], cache=cache).logits, model(x).logits[:, 8:], path_length(CONFIG, 16))


def greedy(model, x, **more):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(x, **settings | more)[:, x.shape[1] :]


def test_generation_is_ours_with_the_cache_and_without(model, decoder):
    from crystal.inference.generate import generate

    x = ids(rows=1)
    ours = list(generate(decoder, x[0].tolist(), 12))
    assert greedy(model, x)[0].tolist() == greedy(model, x, use_cache=False)[0].tolist() == ours


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_padded_on_the_left_generates_what_its_rows_do(attention, model):
    model.set_attn_implementation(attention)
    rows = [ids(rows=1, tokens=n) for n in (24, 9, 1)]
    batch, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 24 - row.shape[1] :], mask[i, 24 - row.shape[1] :] = row[0], 1
    alone = [greedy(model, row)[0].tolist() for row in rows]
    assert greedy(model, batch, attention_mask=mask).tolist() == alone
    assert (
        greedy(model, batch, attention_mask=torch.ones_like(mask)).tolist() != alone
    )  # padding that is not masked would show
    with torch.inference_mode():
        logits = model(batch, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        for i, row in enumerate(rows):
            expected = model(row).logits[0]
            assert_near(logits[i, -row.shape[1] :], expected, path_length(CONFIG, 24), logits.abs().max().item())


def test_generation_ends_at_the_published_end_of_text(model):
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    wanted = greedy(model, ids(rows=1))[0].tolist()
    model.generation_config.eos_token_id = [5, wanted[3]]
    ended = model.generate(ids(rows=1), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 24:].tolist()
    assert ended == wanted[: wanted.index(wanted[3]) + 1]


def test_documents_that_positions_start_again_for_do_not_see_each_other(model):
    """As transformers has it for packed rows without a mask; the published training let them see each other."""
    x, positions = ids(rows=1, tokens=20), torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.inference_mode():
        packed = model(x, position_ids=positions, use_cache=False).logits
        assert_near(packed[:, 12:], model(x[:, 12:]).logits, path_length(CONFIG, 20), packed.abs().max().item())


# -- there and back ------------------------------------------------------------------------------------------------


def same(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_byte_equal_after_a_round_trip(dtype, exported, tmp_path):
    first = export_published(exported[0], tmp_path / "first", dtype=dtype)
    import_published(first, tmp_path / "back")
    second = export_published(tmp_path / "back", tmp_path / "second", dtype=dtype)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}
    assert {p.name for p in first.iterdir()} == {"model.safetensors", "config.json", "modeling_crystal.py"}
    assert json.loads((first / "config.json").read_text())["torch_dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(first)
    assert loaded.dtype == getattr(torch, dtype)


def test_what_transformers_saves_holds_its_code_and_comes_back(model, exported, tmp_path, remote):
    model.save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "saved", exported[1])
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == json.loads((exported[1] / "config.json").read_text())["auto_map"]
    import_published(tmp_path / "saved", tmp_path / "back")
    assert same(export_published(tmp_path / "back", tmp_path / "again"), exported[1])
    theirs = remote(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(theirs(ids()).logits, model(ids()).logits)


def test_a_checkpoint_of_ours_gets_a_tokenizer_that_transformers_loads(exported, tmp_path):
    source = read(exported[0])
    lines = ["def f(x):\n    return x + 1\n" * 20, "the quick brown fox\n" * 20, Path(__file__).read_text()]
    state = {"model": source.state["model"], "tokenizer": "tokenizer.model"}
    write(tmp_path / "c", ((f"model.{name}", tensor) for name, tensor in source.tensors("model")), state,
          [trained(tmp_path, lines)])  # fmt: skip
    ours = load_tokenizer(read(tmp_path / "c"))
    directory = export_published(tmp_path / "c", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in ("def f(x):\n    return x\n", " a  b", "naïve 漢字"):
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]
    saved = json.loads((directory / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    import_published(directory, tmp_path / "back")
    again = export_published(tmp_path / "back", tmp_path / "again")
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_shards_written_in_any_order_are_the_same_files(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("crystal.interop.huggingface.SHARD_BYTES", 300_000)
    first = export_published(exported[0], tmp_path / "first")
    files = sorted(p.name for p in first.glob("*.safetensors"))
    assert len(files) > 5
    assert all(p.stat().st_size < 300_000 + 4096 or len(load_file(p)) == 1 for p in first.glob("*.safetensors"))
    from crystal.interop import huggingface

    original = huggingface.to_published
    monkeypatch.setattr(huggingface, "to_published", lambda c, t: reversed(list(original(c, t))))
    second = export_published(exported[0], tmp_path / "second")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert isinstance(AutoModelForCausalLM.from_pretrained(first), CrystalForCausalLM)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are listed by Linux")
def test_one_shard_of_the_checkpoint_is_mapped_at_a_time(exported, tmp_path, monkeypatch):
    """Pages that were read count as memory until a file is unmapped: a 7B's would come to 26 GB."""
    monkeypatch.setattr("crystal.checkpoint.SHARD_BYTES", 300_000)
    import_published(exported[1], tmp_path / "c")
    assert len(list((tmp_path / "c").glob("shard-*"))) > 5
    mapped = []
    for _ in read(tmp_path / "c").tensors("model"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(len({line.split()[-1] for line in lines if str(tmp_path / "c") in line}))
    assert max(mapped) in (1, 2)  # the last one's tensor may still be held


def test_numbers_that_fp16_does_not_hold_are_not_written(tmp_path):
    state = crystal_state() | {"transformer.ln_f.bias": torch.full((64,), 7e4)}
    import_published(crystal_directory(tmp_path / "d", state), tmp_path / "ckpt")
    with pytest.raises(ConfigError, match=r"transformer\.ln_f\.bias: expected numbers that float16 holds, got 7e\+04"):
        export_published(tmp_path / "ckpt", tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        export_published(tmp_path / "ckpt", tmp_path / "out", dtype="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "d"]
