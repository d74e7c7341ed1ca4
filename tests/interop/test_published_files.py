"""Reading published files: dtypes, shards, memory, and every mistake as one line before a tensor is handed out."""

import json

import pytest
import torch
from directories import CRYSTAL, crystal_directory, crystal_state, edit_json, llama_directory
from safetensors.torch import load_file, save_file

from crystal.errors import CheckpointError, ConfigError
from crystal.interop.huggingface import import_published
from crystal.interop.huggingface_read import read_published


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
    from crystal.interop import huggingface_read as published

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
    with pytest.raises(CheckpointError, match=line) as error:
        read_published(changed(tmp_path, change))
    assert str(error.value).startswith(f"{tmp_path}/model.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = crystal_directory(tmp_path)
    last = directory / "pytorch_model-00003-of-00003.bin"
    torch.save(torch.load(last) | {"transformer.wte.weight": torch.ones(96, 64)}, last)
    with pytest.raises(CheckpointError, match=r"00003.bin: transformer\.wte\.weight: expected once"):
        read_published(directory)


def test_a_head_that_is_no_copy_of_the_tied_embedding_is_refused(tmp_path):
    state = crystal_state()
    state["lm_head.weight"][5, 5] += 1e-3
    directory = crystal_directory(tmp_path / "d", state)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected a copy of the embedding"):
        import_published(directory, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_missing_shard_a_cut_file_and_a_hostile_pickle_are_one_line(tmp_path):
    directory = crystal_directory(tmp_path)
    second = directory / "pytorch_model-00002-of-00003.bin"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.bin: cannot be read as weights"):
        read_published(directory)
    ran = tmp_path / "ran"
    torch.save({"transformer.wte.weight": _Hostile(str(ran))}, second)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.bin: cannot be read as weights"):
        read_published(directory)
    assert not ran.exists()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.bin: no such file"):
        read_published(directory)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_an_index_does_not_lead_out_of_its_directory(tmp_path):
    directory = crystal_directory(tmp_path)
    edit_json(directory / "pytorch_model.bin.index.json", weight_map={"transformer.wte.weight": "../x.bin"})
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
        read_published(directory)


def test_a_directory_without_config_or_weights_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CRYSTAL))
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON"):
        read_published(tmp_path)
