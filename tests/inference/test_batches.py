"""Several prompts at a time, filled up on the left: each row as on its own; end tokens; dtypes; block by block."""

import json

import numpy as np
import pytest
import torch
from closeness import assert_near, path_length
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import AMBER_GQA, CRYSTAL, checkpoint, decoder, prompt, text_checkpoint, vocabulary  # noqa: F401

import crystal.inference.load as load
from crystal.checkpoint import read
from crystal.errors import ConfigError, DataError
from crystal.inference.by_block import logits_by_block
from crystal.inference.generate import KVCache, generate, generate_batch, generate_text, generate_texts
from crystal.inference.logits import logits, logits_file
from crystal.inference.prompts import read_prompts

LENGTHS = [[5, 5], [9, 1, 4], [1, 12], [7], [3, 3, 8, 2]]


@pytest.fixture(scope="module", params=[CRYSTAL, AMBER_GQA], ids=["crystalcoder", "amber gqa"])
def model(request):
    return decoder(request.param)


def prompts_of(lengths):
    return [prompt(length, seed) for seed, length in enumerate(lengths, 10)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_padded_rows_have_the_logits_that_they_have_alone(lengths, model):
    rows, longest = prompts_of(lengths), max(lengths)
    padding = [longest - n for n in lengths]
    padded = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    more = torch.tensor([prompt(3, 50 + b) for b in range(len(rows))])
    with torch.inference_mode():
        cache = KVCache(model, longest + 3, len(rows), padding)
        first = model(padded, cache=cache)
        second = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], 1)
        for b, row in enumerate(rows):
            alone = model(torch.tensor([row + more[b].tolist()]))[0]
            got = torch.cat([first[b, padding[b] :], second[b]])
            assert_near(got, alone, path_length(model.config, longest + 3))
    assert torch.isfinite(first).all()  # what fills a row may not poison it


@pytest.mark.parametrize("settings_", [{}, {"temperature": 1.3}, {"temperature": 0.9, "top_k": 20, "top_p": 0.8}])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_batch_gives_each_row_what_it_gives_alone(lengths, settings_, model):
    rows = prompts_of(lengths)
    together = generate_batch(model, rows, 10, seed=7, eos_id=[90, 91], **settings_)
    alone = [list(generate(model, row, 10, seed=7 + b, eos_id=[90, 91], **settings_)) for b, row in enumerate(rows)]
    assert together == alone


def test_rows_end_each_for_itself_at_any_of_the_end_tokens(model):
    rows = prompts_of([4, 9, 6])
    free = generate_batch(model, rows, 12, temperature=1.5)
    ends = [free[0][2], free[1][5]]
    got = generate_batch(model, rows, 12, temperature=1.5, eos_id=ends)
    for row, whole in zip(got, free, strict=True):
        cut = next((i + 1 for i, token in enumerate(whole) if token in ends), 12)
        assert row == whole[:cut]
    assert len(got[0]) <= 3
    assert generate_batch(model, [], 5) == []


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_any_mixture_of_lengths(model, lengths, seed):
    rows = [prompt(length, seed + b) for b, length in enumerate(lengths)]
    together = generate_batch(model, rows, 4, temperature=1.0, seed=seed)
    assert together == [list(generate(model, row, 4, temperature=1.0, seed=seed + b)) for b, row in enumerate(rows)]


def test_a_mistake_names_the_prompt(model):
    with pytest.raises(ConfigError, match=r"^prompt 2: expected at least one token"):
        generate_batch(model, [[1], []], 3)
    with pytest.raises(ConfigError, match=r"^prompt 3: expected at most 45 tokens .*got 46$"):
        generate_batch(model, [[1], [2], [3] * 46], 3)


def test_a_batch_is_transformers_batch(tmp_path):
    """Its left padding and attention mask, against ours: greedy, with two end tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from crystal.interop.huggingface_read import read_published

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load.filled(*read_published(tmp_path), "here")
    rows = prompts_of([3, 9, 6])
    padded = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    free = generate_batch(ours, rows, 10)
    ends = [free[0][3], free[2][6]]
    out = theirs.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=ends,
                          pad_token_id=95)[:, 9:].tolist()  # fmt: skip
    for row, expected in zip(generate_batch(ours, rows, 10, eos_id=ends), out, strict=True):
        assert row == expected[: len(row)]
        assert set(expected[len(row) :]) <= {95}


# -- texts --------------------------------------------------------------------------------------------------------


def test_texts_come_in_their_order_whatever_the_batches(tmp_path, vocabulary):  # noqa: F811
    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size)
    texts = ["the quick brown fox", "", "lazy", "number 12 jumps", "dogs", "the"]
    alone = [generate_text(path, text, max_new_tokens=6, temperature=1.0, seed=3 + i) for i, text in enumerate(texts)]
    for batch_size in (1, 2, 4, 8):
        assert generate_texts(path, texts, max_new_tokens=6, temperature=1.0, seed=3, batch_size=batch_size) == alone
    assert generate_texts(path, []) == []
    with pytest.raises(ConfigError, match=r"^prompt 2: expected at most"):
        generate_texts(path, ["a", "x" * 100], max_new_tokens=6)
    with pytest.raises(ConfigError, match="batch_size"):
        generate_texts(path, ["a"], batch_size=0)


def test_generation_ends_at_any_token_of_the_checkpoints_list(tmp_path, vocabulary):  # noqa: F811
    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size, tokenizer_kind="llama")
    free = generate_text(path, "the quick", max_new_tokens=10, temperature=2.0)
    assert free["ended"] == "length"
    listed = text_checkpoint(
        tmp_path / "l", vocabulary, vocabulary.vocab_size, tokenizer_kind="llama", eos_id=[2, free["tokens"][4]]
    )
    result = generate_text(listed, "the quick", max_new_tokens=10, temperature=2.0)
    assert result["tokens"] == free["tokens"][: free["tokens"].index(free["tokens"][4]) + 1]
    assert result["ended"] == "eos"
    none = text_checkpoint(tmp_path / "n", vocabulary, vocabulary.vocab_size, tokenizer_kind="llama", eos_id=None)
    assert generate_text(none, "the quick", max_new_tokens=10, temperature=2.0)["ended"] == "length"


def test_the_command_takes_several_prompts(tmp_path, vocabulary):  # noqa: F811
    from command import crystal

    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size)
    (tmp_path / "p.jsonl").write_text('"the"\n{"prompt": "lazy\\ndogs"}\n\n')

    def answer(*words):
        return json.loads(crystal("generate", path, "--max-new-tokens", 3, "--json", *words).stdout)

    one = answer("--prompt", "the")
    assert set(one) == {"text", "tokens", "prompt_tokens", "ended"}
    several = answer("--prompt", "the", "--prompts", tmp_path / "p.jsonl")
    assert [row["prompt_tokens"] for row in several["generations"]] == [
        one["prompt_tokens"], one["prompt_tokens"], len(vocabulary.encode("lazy\ndogs")) + 1,
    ]  # fmt: skip
    assert several["generations"][0] == one


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'"a"\n{"text": "b"}\n', r"line 2: expected a JSON string, or an object"),
        (b"the\n", r"line 1: expected a JSON string"),
        (b"\n\n", r"expected a prompt a line, there is none"),
        (b"\xff", r"cannot be read"),
        (None, r"cannot be read: No such file"),
    ],
)
def test_prompts_that_are_none_are_one_line(content, line, tmp_path):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: {line}"):
        read_prompts(path)
    path.write_text(json.dumps("a\u2028b", ensure_ascii=False) + "\n")
    assert read_prompts(path) == ["a\u2028b"]


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CRYSTAL, AMBER_GQA], ids=["tied", "untied"])
def test_block_by_block_gives_the_same_logits(config, tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "c", config)
    ids = np.array([prompt(11, seed) for seed in range(5)])
    np.save(tmp_path / "ids.npy", ids)
    expected = logits(load.load_decoder(path)[0], torch.from_numpy(ids))
    monkeypatch.setattr("crystal.inference.by_block.HIDDEN_BYTES", 2 * 11 * 64 * 4)  # two rows at a time
    for by_block in (True, False, None):
        assert logits_file(path, tmp_path / "ids.npy", tmp_path / f"{by_block}.npy", by_block) == (5, 11, 96)
        got = torch.from_numpy(np.load(tmp_path / f"{by_block}.npy"))
        assert_near(got, expected, path_length(config, 11))


def test_block_by_block_holds_one_block_at_a_time(tmp_path, monkeypatch):
    from crystal.zoo.decoder import Block

    path, held = checkpoint(tmp_path / "c"), []
    original = Block.forward
    models = []
    monkeypatch.setattr("crystal.inference.by_block.build", lambda *a: models.append(load.build(*a)) or models[-1])

    def forward(self, *args):
        held.append(sorted({n.split(".")[1] for n, p in models[0].named_parameters() if not p.is_meta}))
        return original(self, *args)

    monkeypatch.setattr(Block, "forward", forward)
    list(logits_by_block(read(path), np.array([prompt(5)])))
    assert held == [["0"], ["1"], ["2"]]
    assert all(p.is_meta for p in models[0].parameters())


def test_what_does_not_fit_into_memory_goes_in_bf16_or_by_block(tmp_path, monkeypatch, vocabulary):  # noqa: F811
    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size)
    opened = read(path)
    bytes_ = 5 * load.parameter_count(load.model_config_of(opened))
    for free, dtype in ((bytes_, torch.float32), (bytes_ - 1, torch.bfloat16), (None, torch.float32)):
        monkeypatch.setattr(load, "available_bytes", lambda free=free: free)
        assert load.fitting_dtype(opened) == dtype
        assert load.fitting_dtype(opened, "fp32") == torch.float32
    with pytest.raises(ConfigError, match=r"^dtype: expected auto, fp32 or bf16, got 'int8'$"):
        load.fitting_dtype(opened, "int8")
    half = generate_texts(path, ["the", "lazy dogs"], max_new_tokens=4, dtype="bf16")
    assert [len(row["tokens"]) for row in half] == [4, 4]
    taken = []
    monkeypatch.setattr(load, "available_bytes", lambda: 1)
    monkeypatch.setattr("crystal.inference.logits.logits_by_block", lambda *a: taken.append(a) or logits_by_block(*a))
    np.save(tmp_path / "ids.npy", np.array(prompt(5)))
    logits_file(path, tmp_path / "ids.npy", tmp_path / "out.npy")
    assert len(taken) == 1


def test_free_memory_is_known_here():
    from crystal.memory import available_bytes

    assert 1 << 20 < available_bytes() < 1 << 50
