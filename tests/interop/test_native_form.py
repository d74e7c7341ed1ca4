"""`--to native`: the fold is exact in fp64, and plain transformers says in fp32 what our decoder says."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from closeness import assert_near, path_length
from folding import CRYSTAL, LLAMA, SHAPES, checkpoint, config_of, trained, weights
from safetensors import safe_open
from torch.nn import functional as F

from crystal.checkpoint import read
from crystal.data.tokenizer import ADDED_TOKENS, padded
from crystal.errors import CheckpointError, ConfigError
from crystal.inference.generate import generate
from crystal.inference.load import filled, load_decoder, load_tokenizer
from crystal.interop import native
from crystal.interop.fold import assembled, fold, half_order
from crystal.interop.native import export_native
from crystal.kernels import rope_table

TEXTS = [p.read_text() for p in sorted(Path(__file__).parents[1].glob("*.py"))]


def ids_of(config, length=60):
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


def folded_model(config, tensors, dtype):
    """transformers' own model with the folded weights, which are made in `dtype` and not in between in another."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    folded = fold(config)
    with torch.device("meta"):
        keys = {k: v for k, v in folded.config.items() if k not in ("architectures", "model_type")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(folded.architecture, **keys))
    state = dict(
        assembled(folded.tensors, iter(tensors.items()), dict.fromkeys((m.name for m in folded.tensors), dtype))
    )
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict(state)
    # the same fp32 angles for both, so that what differs is the fold alone
    model.model.rotary_emb = Angles(config)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):  # which computes in fp32 whatever it is given
            module.forward = partial(
                F.rms_norm, normalized_shape=(config.d_model,), weight=module.weight, eps=config.norm_eps
            )
    return model.eval()


class Angles(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rotary_dim, self.base = config.rotary_dim, config.rotary_base

    def forward(self, x, position_ids):
        cos_TP, sin_TP = rope_table(position_ids[0], self.rotary_dim, self.base)
        return torch.cat([cos_TP, cos_TP], -1)[None].to(x.dtype), torch.cat([sin_TP, sin_TP], -1)[None].to(x.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_the_fold_is_exact(name):
    """In fp64 what is left is fp64's rounding, 1e-14 of the largest logit, where fp32 has 1e-6."""
    config = config_of(SHAPES[name])
    tensors = weights(config, dtype=torch.float64)
    ours = filled(config, tensors.items(), name, torch.float64)
    theirs = folded_model(config, tensors, torch.float64)
    x = ids_of(config)
    with torch.inference_mode():
        expected, got = ours(x), theirs(x).logits
    assert got.dtype == expected.dtype == torch.float64
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["crystalcoder", "crystalcoder, queries in groups", "completep", "amber"])
def test_transformers_loads_the_directory_by_itself_and_answers_alike(name, tmp_path):
    from transformers import AutoModelForCausalLM

    config = config_of(SHAPES[name])
    made = export_native(checkpoint(tmp_path / "c", config), tmp_path / "out")
    ours, _ = load_decoder(tmp_path / "c")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert made["files"] == ["model.safetensors", "config.json", "generation_config.json", "README.md"]
    assert made["parameters"] == sum(p.numel() for p in theirs.parameters())
    x = ids_of(config)
    with torch.inference_mode():
        expected, got = ours(x), theirs(x).logits
        assert_near(got, expected, path_length(config, x.shape[1]))
        new = theirs.generate(x[:1, :9], max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert new[0, 9:].tolist() == list(generate(ours, x[0, :9].tolist(), 40))


def test_amber_passes_through_tensor_by_tensor(tmp_path):
    config = config_of(LLAMA)
    export_native(checkpoint(tmp_path / "c", config), tmp_path / "out")
    mine = dict(read(tmp_path / "c").tensors("model"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.1.self_attn.q_proj.weight"), mine["blocks.1.attn.q.weight"])
        assert torch.equal(file.get_tensor("lm_head.weight"), mine["head.weight"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was folded" in card
    assert "remote code" in card


def test_sixteen_bits_are_the_folded_numbers_rounded_once(tmp_path):
    config = config_of(CRYSTAL)
    checkpoint(tmp_path / "c", config)
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export_native(tmp_path / "c", tmp_path / dtype, dtype)
        said = json.loads((tmp_path / dtype / "config.json").read_text())
        assert said["torch_dtype"] == str(kind).removeprefix("torch.")
        with safe_open(tmp_path / dtype / "model.safetensors", "pt") as file:
            norm = file.get_tensor("model.layers.0.input_layernorm.bias")
            assert norm.dtype == kind
            assert norm[64:].tolist() == [1.0] + [0.0] * (said["hidden_size"] - 65)  # the constant, exactly
            gate = file.get_tensor("model.layers.0.mlp.gate_proj.weight")[90, 64].item()
            up = file.get_tensor("model.layers.0.mlp.up_proj.weight")[90, 64].item()
            assert (torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64)) * up).item() == 1.0


def test_shards_have_an_index_and_every_width_is_a_multiple_of_32(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    config = config_of(SHAPES["crystalcoder, heads of 24"])
    monkeypatch.setattr(native, "SHARD_BYTES", 60_000)
    made = export_native(checkpoint(tmp_path / "c", config), tmp_path / "out")
    assert "model.safetensors.index.json" in made["files"]
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["hidden_size"] % 32 == said["intermediate_size"] % 32 == 0
    assert said["hidden_size"] // said["num_attention_heads"] == 24
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_half_order_pairs_what_interleaving_pairs():
    order = half_order(2, 8, 4).tolist()
    assert order == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("dummy", [True, False])
def test_the_fast_tokenizer_gives_our_ids(dummy, tmp_path):
    """Of code too, whose runs of spaces other conversions get wrong; with the begin token and all 22 added ones."""
    from transformers import AutoTokenizer

    file = trained(tmp_path, TEXTS, add_dummy_prefix=dummy)
    config = config_of(CRYSTAL | {"vocab_size": 448})
    checkpoint(tmp_path / "c", config, file)
    export_native(tmp_path / "c", tmp_path / "out")
    ours, theirs = load_tokenizer(read(tmp_path / "c")), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.is_fast
    for text in [*TEXTS, "  two", "", "\n\n   é 𝄞\t\r\n", "1 000 000"]:
        text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "").replace("<|", "")  # they parse these
        assert theirs(text).input_ids == [1, *ours.encode(text)], text[:80]
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.convert_tokens_to_ids(ADDED_TOKENS[0]) == ours.fim_prefix == ours.n_base
    assert theirs("a<|im_end|>").input_ids[-1] == ours.added["<|im_end|>"]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (1, 2, 96)
    assert padded(ours.n_base, True) == 448


def test_symbols_of_a_sentencepiece_model_stay_symbols(tmp_path):
    from transformers import AutoTokenizer

    file = trained(tmp_path, TEXTS, user_defined_symbols=["<tool>"])
    checkpoint(tmp_path / "c", config_of(CRYSTAL | {"vocab_size": 448}), file)
    export_native(tmp_path / "c", tmp_path / "out")
    ours, theirs = load_tokenizer(read(tmp_path / "c")), AutoTokenizer.from_pretrained(tmp_path / "out")
    symbol = theirs.convert_tokens_to_ids("<tool>")
    assert symbol == 3
    assert symbol in ours.encode("a<tool>b")
    assert symbol in theirs("a<tool>b").input_ids


def test_a_chat_template_and_the_end_tokens_go_along(tmp_path):
    file = trained(tmp_path, TEXTS)
    checkpoint(tmp_path / "c", config_of(CRYSTAL | {"vocab_size": 448}), file)
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0] }}"}))
    export_native(tmp_path / "c", tmp_path / "old")
    (tmp_path / "c" / "chat_template.jinja").write_text("{{ messages }}")
    export_native(tmp_path / "c", tmp_path / "out")
    assert (tmp_path / "old" / "chat_template.jinja").read_text() == "{{ messages[0] }}\n"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}\n"
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "out" / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (1, 2)


def test_several_end_tokens_stay_several_and_none_is_invented(tmp_path):
    config = config_of(LLAMA)
    for ids in ({"bos_id": None, "eos_id": [3, 5], "imported_from": "x"}, {"imported_from": "x"}):
        checkpoint(tmp_path / f"c{len(ids)}", config, state=ids)
        export_native(tmp_path / f"c{len(ids)}", tmp_path / f"out{len(ids)}")
        said = json.loads((tmp_path / f"out{len(ids)}" / "config.json").read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (None, ids.get("eos_id"))


def test_what_cannot_be_folded_says_why_in_a_line(tmp_path):
    config = config_of(LLAMA | {"rotary_fraction": 0.5})
    with pytest.raises(ConfigError, match=r"model\.rotary_fraction: expected 1 with rmsnorm, got 0\.5: LLaMA rotates"):
        export_native(checkpoint(tmp_path / "c", config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_half_written(tmp_path):
    config = config_of(CRYSTAL)
    checkpoint(tmp_path / "c", config)
    with pytest.raises(ConfigError, match="--dtype: expected fp32, bf16, fp16 for native, got q8_0"):
        export_native(tmp_path / "c", tmp_path / "out", "q8_0")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + b"\0\0\0\1\2\3\4\5")
    with pytest.raises(CheckpointError, match="sha256"):
        export_native(tmp_path / "c", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    shard.write_bytes(whole)
    export_native(tmp_path / "c", tmp_path / "out")
    with pytest.raises(ConfigError, match="there already"):
        export_native(tmp_path / "c", tmp_path / "out")


def test_weights_beyond_fp16_are_an_error_and_not_infinity(tmp_path):
    config = config_of(CRYSTAL)
    path = checkpoint(tmp_path / "c", config)
    big = {n: t * 1e5 if n == "norm.weight" else t for n, t in weights(config).items()}
    from crystal.checkpoint import write

    write(tmp_path / "big", ((f"model.{n}", t) for n, t in big.items()), read(path).state)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: .*fp16"):
        export_native(tmp_path / "big", tmp_path / "out", "fp16")
    export_native(tmp_path / "big", tmp_path / "out", "bf16")
