"""Which tokenizer an imported checkpoint goes by, what begins a text, and what padded ids print."""

import json
import shutil

import pytest
import torch
from directories import CRYSTAL, crystal_directory, edit_json
from safetensors.torch import save_file
from shared_files import shared_file
from vocabularies import BEGIN, added, base_size, model_bytes, put, spec

from crystal.checkpoint import read
from crystal.data.tokenizer import ADDED_TOKENS, Tokenizer
from crystal.errors import CheckpointError
from crystal.inference.generate import generate_text
from crystal.inference.load import PlainTokenizer, end_tokens, load_tokenizer
from crystal.interop.huggingface import export_published, import_published
from crystal.interop.huggingface_forms import config_from_json, published_tensors

LLAMA = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def directory(path, files=(), **changes):
    """A tiny LLaMA's directory with these tokenizer files: {name: bytes or mapping}."""
    path.mkdir()
    mapping = LLAMA | changes
    (path / "config.json").write_text(json.dumps(mapping))
    config, form = config_from_json(mapping, "config.json")
    save_file({t.name: torch.full(t.shape, 0.1) for t in published_tensors(config, form)}, path / "model.safetensors")
    for name, content in dict(files).items():
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def crystal_tokens(n_base):
    return [added(n_base + i, name) for i, name in enumerate(ADDED_TOKENS)]


MODEL = model_bytes()
N = base_size()
# vocab_size 384 holds 340 pieces and CrystalCoder's 22; N of the json is smaller
CASES = {
    # files → tokenizer, whether CrystalCoder's tokens are in use, beginnings of the notes
    "none": ({}, None, None, []),
    "a model": ({"tokenizer.model": MODEL}, "tokenizer.model", False, []),
    "a json": ({"tokenizer.json": spec()}, "tokenizer.json", False, []),
    "an unusable model": ({"tokenizer.model": b"no model"}, None, None, ["tokenizer.model: left out: expected a sent"]),
    "an unusable model before a good json": (
        {"tokenizer.model": b"no model", "tokenizer.json": spec()},
        "tokenizer.json", False, ["tokenizer.model: left out: expected a sent"],
    ),
    "an empty model before a plain json": (
        {"tokenizer.model": b"", "tokenizer.json": spec(more=[added(N, "<x>")])},
        "tokenizer.json", None, ["tokenizer.model: left out"],
    ),
    "an unusable json after a good model": (
        {"tokenizer.model": MODEL, "tokenizer.json": b"{"},
        "tokenizer.model", False, ["tokenizer.json: left out: expected a sent"],
    ),
    "both": ({"tokenizer.model": MODEL, "tokenizer.json": spec()}, "tokenizer.model", False, []),
    "a model too large": (
        {"tokenizer.model": model_bytes(vocab_size=390), "tokenizer.json": spec()},
        "tokenizer.json", False, ["tokenizer.model: left out: expected at most the model's 384 ids, it has 390"],
    ),
    "CrystalCoder's tokens in the json": ({"tokenizer.json": spec(more=crystal_tokens(N))}, "tokenizer.json", True, []),
    "CrystalCoder's tokens beside the model": (
        {"tokenizer.model": MODEL, "added_tokens.json": {name: 340 + i for i, name in enumerate(ADDED_TOKENS)}},
        "tokenizer.model", True, [],
    ),
    "CrystalCoder's tokens in tokenizer_config": (
        {
            "tokenizer.model": MODEL,
            "tokenizer_config.json": {"added_tokens_decoder": {str(t["id"]): t for t in crystal_tokens(340)}},
        },
        "tokenizer.model", True, [],
    ),
    "foreign tokens beside a model": (
        {"tokenizer.model": MODEL, "added_tokens.json": {"<pad>": 340}},
        "tokenizer.model", False, ["tokenizer.model: does not know the added token <pad> at id 340"],
    ),
    "foreign tokens in a json that knows them": (
        {"tokenizer.model": model_bytes(), "tokenizer.json": spec(more=[added(N, "<pad>")]),
         "added_tokens.json": {"<pad>": 340}},
        "tokenizer.json", None, [],
    ),
    "truncation": (
        {"tokenizer.json": spec(truncation={"direction": "Right", "max_length": 512, "strategy": "LongestFirst",
                                            "stride": 0})},
        "tokenizer.json", False, ["tokenizer.json: truncation to 512 tokens: switched off"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_tokenizer_that_can_be_used_is_the_checkpoints(name, tmp_path):
    files, chosen, added_tokens, notes = CASES[name]
    result = import_published(directory(tmp_path / "d", files), tmp_path / "ckpt")
    assert result["tokenizer"] == chosen
    assert len(result["notes"]) == len(notes)
    assert all(note.startswith(start) for note, start in zip(result["notes"], notes, strict=True))
    opened = read(tmp_path / "ckpt")
    if chosen is None:
        assert "tokenizer" not in opened.state
        return
    tokenizer = load_tokenizer(opened)
    assert isinstance(tokenizer, PlainTokenizer) == (added_tokens is None)
    if added_tokens is not None:
        assert tokenizer.added_tokens is added_tokens
        behind = tokenizer.decode([tokenizer.n_base])
        assert behind == ("<|fim_prefix|>" if added_tokens else "")  # padding prints nothing
    left_out = {note.partition(":")[0] for note in result["notes"] if "left out" in note}
    kept = {path.name for path in (tmp_path / "ckpt").iterdir() if path.suffix not in (".safetensors",)}
    assert kept - {"checkpoint.json"} == set(files) - left_out
    for file in kept - {"checkpoint.json"}:
        assert (tmp_path / "ckpt" / file).read_bytes() == (tmp_path / "d" / file).read_bytes()


BEGINS = {
    "a template": ({"tokenizer.json": spec(post_processor=BEGIN)}, {}),
    "a sequence with a template": (
        {"tokenizer.json": spec(post_processor={"type": "Sequence", "processors": [BEGIN]})}, {},
    ),
    "no template": ({"tokenizer.json": spec()}, {}),
    "no template, whatever the config says": ({"tokenizer.json": spec()}, {"add_bos_token": True}),
    "a template, whatever the config says": ({"tokenizer.json": spec(post_processor=BEGIN)}, {"add_bos_token": False}),
    "a model": ({"tokenizer.model": MODEL}, {"add_bos_token": True}),
    "a model without": ({"tokenizer.model": MODEL}, {"add_bos_token": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", BEGINS)
def test_a_text_begins_as_it_does_for_transformers(name, tmp_path):
    from transformers import AutoTokenizer

    files, config = BEGINS[name]
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if "tokenizer.model" in files:
        config["tokenizer_class"] = "LlamaTokenizer"
    d = directory(tmp_path / "d", files | {"tokenizer_config.json": config})
    import_published(d, tmp_path / "ckpt")
    opened = read(tmp_path / "ckpt")
    tokenizer = load_tokenizer(opened)
    ours = [tokenizer.bos_id] * opened.state["bos"] + tokenizer.encode("x ab")
    assert ours == AutoTokenizer.from_pretrained(d)("x ab").input_ids


def test_a_model_of_which_nothing_is_said_begins_as_llamas_own_code_does(tmp_path):
    # and as transformers 4, and the documentation of 5; the code of 5.24 puts nothing there
    import_published(directory(tmp_path / "d", {"tokenizer.model": MODEL}), tmp_path / "ckpt")
    assert read(tmp_path / "ckpt").state["bos"] is True


@pytest.mark.parametrize("bos", [True, False])
def test_an_own_crystalcoder_with_its_tokenizer_comes_back_as_it_was(bos, tmp_path):
    d = crystal_directory(tmp_path / "d")
    for file in ("config.json", *(p.name for p in d.glob("pytorch_model*"))):
        (d / file).unlink()
    mapping = CRYSTAL | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 384,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 8,
        "mup_width_scale": 1.0,
    }
    torch.save(
        {t.name: torch.zeros(t.shape) for t in published_tensors(*config_from_json(mapping, "config.json"))},
        d / "pytorch_model.bin",
    )
    (d / "config.json").write_text(json.dumps(mapping))
    (d / "tokenizer.model").write_bytes(MODEL)
    (d / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": bos}))
    import_published(d, tmp_path / "first")
    state = read(tmp_path / "first").state
    assert (state["bos"], state["added_tokens"]) == (bos, True)
    (tmp_path / "first" / "tokenizer_config.json").unlink()  # as a run's own checkpoint has none
    edit_json(tmp_path / "first" / "checkpoint.json", files=None, sha256=None)
    export_published(tmp_path / "first", tmp_path / "hf")
    import_published(tmp_path / "hf", tmp_path / "second")
    again = read(tmp_path / "second").state
    assert (again["bos"], again["added_tokens"], again["tokenizer"]) == (bos, True, "tokenizer.model")


def test_crystalcoders_published_files_are_read_as_it_was_trained(tmp_path):
    from tokenizers import Tokenizer as Engine

    d = crystal_directory(tmp_path / "d")  # a small model; the vocabulary is the published one
    config = json.loads(shared_file("crystalcoder-config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_file(f"crystalcoder-{file}"), d / file)
    small = import_published(d, tmp_path / "small")
    assert small["tokenizer"] is None
    assert small["notes"] == ["tokenizer.json: left out: expected at most the model's 96 ids, it has 32000"]
    wide = {k: CRYSTAL[k] for k in ("n_embd", "n_layer", "n_head", "n_inner", "rotary_dim", "mup_width_scale")}
    narrow = wide | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 8, "rotary_dim": 4, "mup_width_scale": 1.0}
    mapping = config | narrow
    state = {t.name: torch.zeros(t.shape) for t in published_tensors(*config_from_json(mapping, "config.json"))}
    for file in d.glob("pytorch_model*"):
        file.unlink()
    torch.save(state, d / "pytorch_model.bin")
    (d / "config.json").write_text(json.dumps(mapping))
    result = import_published(d, tmp_path / "ckpt")
    assert (result["tokenizer"], result["notes"]) == ("tokenizer.json", [])
    opened = read(tmp_path / "ckpt")
    tokenizer = load_tokenizer(opened)
    assert (opened.state["bos"], opened.state["added_tokens"]) == (True, True)
    assert end_tokens(opened, tokenizer) == (2,)
    assert tokenizer.fim_prefix == 32000
    assert tokenizer.decode([32021, 32022, 32031]) == "<|sys_end|>"
    engine = Engine.from_file(str(d / "tokenizer.json"))
    for text in ("def f(x):\n    return x\n", "    indented", " x", "é\t😀"):
        assert tokenizer.encode(text) == engine.encode(text).ids


def test_id_32000_of_a_padded_plain_llama_prints_nothing(tmp_path):
    plain = json.loads(shared_file("crystalcoder-tokenizer.json").read_text())
    plain["added_tokens"] = plain["added_tokens"][:3]
    d = directory(tmp_path / "d", {"tokenizer.json": plain}, vocab_size=32064)
    import_published(d, tmp_path / "ckpt")
    tokenizer = load_tokenizer(read(tmp_path / "ckpt"))
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([32000, *ids[:1], 32003, *ids[1:]]) == "a b"
    assert generate_text(tmp_path / "ckpt", "a", max_new_tokens=2)["prompt_tokens"] == 1


def test_older_checkpoints_that_do_not_say_go_by_the_room_there_is(tmp_path):
    import_published(directory(tmp_path / "d", {"tokenizer.model": MODEL}), tmp_path / "ckpt")
    seal = tmp_path / "ckpt" / "checkpoint.json"
    content = json.loads(seal.read_text()) | {"files": None, "sha256": None}
    for key in ("added_tokens", "tokenizer_kind", "eos_id"):
        content["state"].pop(key, None)
    seal.write_text(json.dumps(content))
    assert load_tokenizer(read(tmp_path / "ckpt")).added_tokens is True
    edit_json(seal, state=content["state"] | {"eos_id": 7})
    with pytest.raises(Exception, match=r"expected a tokenizer\.json"):  # so such a one says that it is plain
        load_tokenizer(read(tmp_path / "ckpt"))
    assert Tokenizer.load(tmp_path / "ckpt" / "tokenizer.model").n_base == 340


def test_a_companion_that_is_no_json_is_one_line(tmp_path):
    d = directory(tmp_path / "d", {"tokenizer.model": MODEL, "added_tokens.json": {"<pad>": "x"}})
    with pytest.raises(Exception, match=r"added_tokens\.json: expected added tokens with their ids"):
        import_published(d, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    put(d / "tokenizer_config.json", [])
    with pytest.raises(Exception, match=r"tokenizer_config\.json: expected a mapping"):
        import_published(d, tmp_path / "ckpt")


def test_the_links_of_hugging_faces_own_cache_are_followed(tmp_path):
    """snapshots/REVISION/FILE leads to blobs/HASH."""
    made = directory(tmp_path / "made", {"tokenizer.model": MODEL, "chat_template.jinja": b"{{ x }}"})
    (tmp_path / "snapshots").mkdir()
    made.rename(tmp_path / "snapshots" / "abc")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "snapshots" / "abc").iterdir())):
        path.rename(tmp_path / "blobs" / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    import_published(tmp_path / "snapshots" / "abc", tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "tokenizer.model").read_bytes() == MODEL
    assert (tmp_path / "ckpt" / "chat_template.jinja").read_bytes() == b"{{ x }}"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
@pytest.mark.parametrize(("to", "why"), [("../secret", "a link to one elsewhere"), ("nowhere", "a link to nothing")])
def test_a_link_out_of_the_directory_takes_nothing_along(tmp_path, name, to, why):
    made = directory(tmp_path / "made")
    (tmp_path / "secret").write_bytes(MODEL if name.endswith("model") else b"{}")
    (made / name).symlink_to(to)
    with pytest.raises(CheckpointError, match=rf"made/{name}: expected a file.*{why}"):
        import_published(made, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
