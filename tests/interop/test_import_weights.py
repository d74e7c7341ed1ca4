"""Weights that go wrong silently: which files count, tied models, numbers that are none; begin and end tokens."""

import json

import pytest
import torch
from closeness import assert_near, path_length
from directories import CRYSTAL, crystal_directory, crystal_state, edit_json, llama_directory
from safetensors.torch import load_file, save_file

from crystal.checkpoint import read
from crystal.errors import CheckpointError, ConfigError
from crystal.inference.generate import generate
from crystal.inference.load import filled, load_decoder
from crystal.interop.huggingface import export_published, import_published
from crystal.interop.huggingface_read import read_published


def sets_of_weights(path):
    """A directory with four whole sets, told apart by their final norm: 1 single, 2 sharded, 3 .bin, 4 sharded .bin."""
    model = llama_directory(path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = sorted(state)[: len(state) // 2]
    for number, (stem, ending) in enumerate(
        [("model", "safetensors"), ("model", "safetensors"), ("pytorch_model", "bin"), ("pytorch_model", "bin")], 1
    ):
        state["model.norm.weight"] = torch.full((64,), float(number))
        put = save_file if ending == "safetensors" else torch.save
        if number % 2:
            put(state, path / f"{stem}.{ending}")
            continue
        files = {f"{stem}-{i}-of-2.{ending}": [n for n in state if (n in half) == (i == 1)] for i in (1, 2)}
        for file, names in files.items():
            put({name: state[name] for name in names}, path / file)
        weight_map = {name: file for file, names in files.items() for name in names}
        (path / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("gone", "number"),
    [
        ([], 1),
        (["model.safetensors"], 2),
        (["model.safetensors", "model.safetensors.index.json"], 3),
        (["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], 4),
    ],
)
def test_of_several_sets_the_one_counts_that_transformers_takes(gone, number, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = sets_of_weights(tmp_path)
    for name in gone:
        (directory / name).unlink()
    theirs = AutoModelForCausalLM.from_pretrained(directory).model.norm.weight
    assert theirs[0] == number
    assert torch.equal(dict(read_published(directory)[1])["norm.weight"], theirs.detach())


def test_a_single_file_stands_before_an_index_of_shards_that_are_gone(tmp_path):
    llama_directory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert len(list(read_published(tmp_path)[1])) == 21


def test_the_file_that_config_json_names_is_the_one(tmp_path):
    directory = sets_of_weights(tmp_path)
    edit_json(directory / "config.json", transformers_weights="model.safetensors.index.json")
    assert dict(read_published(directory)[1])["norm.weight"][0] == 2
    edit_json(directory / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: transformers_weights: expected"):
        read_published(directory)


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    llama_directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a whole model"):
        read_published(tmp_path)


def test_a_tied_llama_with_only_its_head_is_what_transformers_makes_of_it(tmp_path):
    from transformers import AutoModelForCausalLM

    llama_directory(tmp_path, tie_word_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config, tensors = read_published(tmp_path)
    ours, x = filled(config, tensors, "here"), torch.arange(40)[None]
    with torch.inference_mode():
        assert_near(ours(x), theirs(x).logits, path_length(config, 40))


def test_a_tied_crystalcoder_with_only_its_head_is_whole(tmp_path):
    state = crystal_state()
    embedding = state.pop("transformer.wte.weight")
    tensors = dict(read_published(crystal_directory(tmp_path, state))[1])
    assert torch.equal(tensors["embed.weight"], embedding)


def test_an_untied_model_with_only_one_of_the_two_is_refused(tmp_path):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        llama_directory(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state[name]
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name}: expected, but no such tensor"):
            read_published(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias", "lm_head.weight"])
def test_numbers_that_are_not_finite_are_named_and_nothing_is_left(name, number, tmp_path):
    state = crystal_state()
    state[name].view(-1)[-1] = number
    directory = crystal_directory(tmp_path / "d", state)
    with pytest.raises(CheckpointError, match=rf"\.bin: {name}: expected finite numbers, it has a number that is"):
        import_published(directory, tmp_path / "ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_half_that_overflowed_is_named(tmp_path):
    llama_directory(tmp_path).to(torch.float16).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"][:2] = 65504 * torch.tensor([2.0, -2.0], dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected finite numbers, it has 2 numbers"):
        list(read_published(tmp_path)[1])


def test_a_mapped_file_is_mapped_anew_and_gives_the_same(tmp_path, monkeypatch):
    directory = crystal_directory(tmp_path)
    whole = dict(read_published(directory)[1])
    monkeypatch.setattr("crystal.interop.huggingface_read._REMAP_BYTES", 1)
    again = dict(read_published(directory)[1])
    assert all(torch.equal(again.pop(name), tensor) for name, tensor in whole.items())
    assert not again


# -- begin and end tokens -----------------------------------------------------------------------------------------

IDS = {
    "one": ({"bos_token_id": 1, "eos_token_id": 2}, None, {"bos": 1, "eos": 2}),
    "a list": ({"bos_token_id": 1, "eos_token_id": [2, 7, 9]}, None, {"bos": 1, "eos": [2, 7, 9]}),
    "none": ({"bos_token_id": None, "eos_token_id": None}, None, {"bos": None, "eos": None}),
    "nothing said": ({}, None, {"bos": None, "eos": None}),
    "generation_config": ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, {"bos": None, "eos": [5, 6]}),
    "a silent generation_config": ({"eos_token_id": 2}, {"eos_token_id": None}, {"bos": None, "eos": 2}),
    "padding": ({"eos_token_id": 2, "pad_token_id": 0}, None, {"bos": None, "eos": 2, "pad": 0}),
}


@pytest.mark.parametrize("form", ["llama", "crystalcoder"])
@pytest.mark.parametrize("name", IDS)
def test_begin_and_end_tokens_come_through_as_they_are(name, form, tmp_path):
    config, generation, expected = IDS[name]
    directory = tmp_path / "d"
    if form == "llama":
        llama_directory(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
    else:
        crystal_directory(directory)
    mapping = json.loads((directory / "config.json").read_text())
    kept = {k: v for k, v in mapping.items() if not k.endswith("_token_id")}
    (directory / "config.json").write_text(json.dumps(kept | config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    import_published(directory, tmp_path / "ckpt")
    export_published(tmp_path / "ckpt", tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in exported.items() if k.endswith("_token_id")} == {
        f"{k}_token_id": v for k, v in expected.items()
    }
    assert (tmp_path / "out" / "generation_config.json").is_file() == (generation is not None)


@pytest.mark.parametrize("wrong", ["2", 2.0, True, [], [2, "3"], {}])
def test_what_is_no_token_id_is_refused_by_name(wrong, tmp_path):
    directory = crystal_directory(tmp_path / "d", eos_token_id=wrong)
    with pytest.raises(ConfigError, match=r"config\.json: eos_token_id: expected a token id, a list of them or null"):
        import_published(directory, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_generation_stops_at_any_end_token_as_transformers_does(tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama_directory(tmp_path / "d")
    prompt = torch.tensor([[3, 4, 5]])
    free = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    ends = [95 if 95 not in free else 94, free[5]]
    edit_json(tmp_path / "d" / "config.json", eos_token_id=ends)
    (tmp_path / "d" / "generation_config.json").unlink(missing_ok=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    import_published(tmp_path / "d", tmp_path / "ckpt")
    ours, opened = load_decoder(tmp_path / "ckpt")
    assert opened.state["eos_id"] == ends
    assert list(generate(ours, [3, 4, 5], 12, eos_id=opened.state["eos_id"])) == expected == free[: len(expected)]
    assert len(expected) < 12


def test_a_revision_is_a_directory_and_the_checkpoint_says_which(tmp_path):
    for step, seed in (("CrystalCoder_phase1_checkpoint_001500", 3), ("CrystalCoder_phase2_checkpoint_214387", 4)):
        crystal_directory(tmp_path / step, crystal_state(seed=seed))
        import_published(tmp_path / step, tmp_path / f"{step}-ckpt")
        opened = read(tmp_path / f"{step}-ckpt")
        assert opened.state["imported_from"] == str(tmp_path / step)
        got = dict(opened.tensors("model"))["embed.weight"]
        assert torch.equal(got, crystal_state(seed=seed)["transformer.wte.weight"])
    assert opened.state["model"]["vocab_size"] == CRYSTAL["vocab_size"]
