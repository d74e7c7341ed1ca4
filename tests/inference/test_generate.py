"""Generation and the fidelity probe: the cache changes nothing, seeds repeat, mistakes are one line."""

import math
import os

import numpy as np
import pytest
import torch
from closeness import assert_near, path_length
from hypothesis import given
from hypothesis import strategies as st

from crystal.checkpoint import read, write
from crystal.errors import CheckpointError, ConfigError, DataError, RunError
from crystal.inference.generate import KVCache, generate, generate_text, last_logits, pick
from crystal.inference.load import filled, load_decoder, load_tokenizer
from crystal.inference.logits import logits, logits_file, read_ids
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig, model_config

CRYSTAL = ModelConfig(**model_config("crystalcoder-w64-l3").model_dump(exclude={"vocab_size", "max_seq_len"}),
                      vocab_size=96, max_seq_len=48)  # fmt: skip
AMBER_GQA = ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=96, max_seq_len=48)


def tensors(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in meta_decoder(config).named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        yield name, torch.empty(p.shape).normal_(mean, 0.2, generator=generator)


def decoder(config):
    return filled(config, tensors(config), "test")


def prompt(length, seed=2):
    return torch.randint(96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=[CRYSTAL, AMBER_GQA], ids=["crystalcoder", "amber gqa"])
def model(request):
    return decoder(request.param)


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [10, 1, 1, 5, 7], [3, 21]])
def test_cached_logits_are_those_of_the_full_forward_pass(pieces, model):
    ids = prompt(24)
    with torch.inference_mode():
        full = model(torch.tensor([ids]))[0]
        cache, seen, got = KVCache(model, 24), 0, []
        for size in pieces:
            got.append(model(torch.tensor([ids[seen : seen + size]]), cache=cache)[0])
            seen += size
            assert cache.length == seen
    assert full.abs().max() > 0.5
    assert_near(torch.cat(got), full, path_length(model.config, 24))


def test_a_batch_is_cached_row_by_row(model):
    ids = torch.tensor([prompt(12, 1), prompt(12, 2)])
    with torch.inference_mode():
        cache = KVCache(model, 12, batch=2)
        model(ids[:, :7], cache=cache)
        got = model(ids[:, 7:], cache=cache)
        full = model(ids)[:, 7:]
    assert_near(got, full, path_length(model.config, 12))


def test_next_logits_carry_the_multipliers_of_mup():
    model = decoder(CRYSTAL)
    assert model.multipliers.embedding == 14.6
    assert model.multipliers.logits == pytest.approx(2.22 * 256 / 64)
    ids = prompt(9)
    with torch.inference_mode():
        full = model(torch.tensor([ids]))[0, -1]
        assert_near(last_logits(model, torch.tensor([ids]), KVCache(model, 9))[0], full, path_length(model.config, 9))


def test_a_full_cache_says_so(model):
    with torch.inference_mode(), pytest.raises(ValueError, match="cache of 4 tokens cannot hold 5"):
        model(torch.tensor([prompt(5)]), cache=KVCache(model, 4))


def test_greedy_is_the_argmax_of_full_forward_passes(model):
    ids = prompt(5)
    expected = list(ids)
    with torch.inference_mode():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, ids, 12)) == expected[5:]
    assert list(generate(model, np.array(ids), 12, seed=9)) == expected[5:]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model):
    def draw(seed):
        return list(generate(model, prompt(4), 20, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(1)
    assert draw(1) == first  # the global generator has no part in it


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model):
    greedy = list(generate(model, prompt(4), 10))
    assert list(generate(model, prompt(4), 10, temperature=2.0, top_k=1)) == greedy
    assert list(generate(model, prompt(4), 10, temperature=2.0, top_p=1e-6)) == greedy


def test_it_ends_with_eos(model):
    tokens = list(generate(model, prompt(4), 20, temperature=1.5, seed=3))
    eos = tokens[7]
    assert list(generate(model, prompt(4), 20, temperature=1.5, seed=3, eos_id=eos)) == tokens[: tokens.index(eos) + 1]


def test_the_last_position_can_be_used_and_none_after_it(model):
    limit = model.config.max_seq_len
    assert len(list(generate(model, prompt(limit - 6), 6))) == 6
    with pytest.raises(ConfigError, match=rf"prompt: expected at most {limit - 6} tokens .*got {limit - 5}$"):
        generate(model, prompt(limit - 5), 6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"ids": []}, "prompt"),
        ({"ids": [96]}, "prompt"),
        ({"ids": [-1]}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_optionsout_of_range_are_told_before_any_work(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: expected"):
        generate(meta_decoder(CRYSTAL), **({"ids": [1], "max_new_tokens": 3} | options))


def frequencies(values, draws=4000, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    drawn = [pick(torch.tensor(values).log(), generator=generator, **options) for _ in range(draws)]
    return np.bincount(drawn, minlength=len(values)) / draws


def test_draws_follow_the_softmax_and_its_cuts():
    p = [0.1, 0.4, 0.2, 0.3]
    assert frequencies(p) == pytest.approx(p, abs=0.03)
    flat = np.sqrt(p) / np.sqrt(p).sum()
    assert frequencies(p, temperature=2.0) == pytest.approx(flat, abs=0.03)
    assert frequencies(p, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert frequencies(p, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert frequencies(p, top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.03)
    # top_p is taken of what top_k has left: 4/7 alone is short of 0.6, 3 alone of 2 would not be
    assert frequencies(p, top_k=2, top_p=0.5) == pytest.approx([0, 1, 0, 0])


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    st.floats(0.01, 5),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.integers(0, 2**32),
)
def test_a_drawn_token_is_always_among_the_likeliest_allowed(values, temperature, top_k, top_p, seed):
    logits_V = torch.tensor(values)
    token = pick(logits_V, temperature, top_k, top_p, torch.Generator().manual_seed(seed))
    likelier = int((logits_V > logits_V[token]).sum())
    assert likelier < (top_k or len(values))
    if top_p is not None:
        p_V = (logits_V / temperature).softmax(-1)
        assert p_V[logits_V > logits_V[token]].sum() < top_p + 1e-5


# -- from checkpoints ---------------------------------------------------------------------------------------------


def checkpoint(path, config=CRYSTAL, skip=None, **state):
    named = ((f"model.{n}", t) for n, t in tensors(config) if n != skip)
    return write(path, named, {"model": config.model_dump(mode="json"), **state})


def test_a_checkpoint_gives_its_decoder(tmp_path, model):
    loaded, opened = load_decoder(checkpoint(tmp_path / "c", model.config))
    assert opened.directory == tmp_path / "c"
    ids = torch.tensor([prompt(10)])
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in loaded.named_parameters())
    # the file's weights are not aligned as those in memory, on which a product's roundings may depend
    assert_near(logits(loaded, ids), logits(model, ids), path_length(model.config, 10))
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


def test_the_latest_checkpoint_of_a_run_is_taken(tmp_path):
    for step in (3, 12):
        checkpoint(tmp_path / "checkpoints" / f"step-{step:07d}", step=step)
    assert load_decoder(tmp_path)[1].state["step"] == 12


def test_a_checkpoint_loads_in_bf16(tmp_path):
    half, _ = load_decoder(checkpoint(tmp_path / "c"), dtype=torch.bfloat16)
    ids = torch.tensor([prompt(10)])
    expected = logits(decoder(CRYSTAL), ids)
    assert logits(half, ids).dtype == torch.float32
    assert (logits(half, ids) - expected).abs().max() < 0.1 * expected.abs().max()
    assert len(list(generate(half, prompt(3), 5))) == 5


def test_a_checkpoint_that_is_not_the_models_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.q\.weight: expected, but no such tensor"):
        load_decoder(checkpoint(tmp_path / "a", skip="blocks.1.attn.q.weight"))
    named = [(f"model.{n}", t[:1] if n == "norm.bias" else t) for n, t in tensors(CRYSTAL)]
    write(tmp_path / "b", named, {"model": CRYSTAL.model_dump(mode="json")})
    with pytest.raises(CheckpointError, match=r"norm\.bias: expected \[\d+\] in F32, got \[1\]"):
        load_decoder(tmp_path / "b")
    write(tmp_path / "c", named, {})
    with pytest.raises(ConfigError, match=r"c: model"):
        load_decoder(tmp_path / "c")


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    from crystal.data.tokenizer import train_tokenizer

    words = [f"the quick brown fox number {i} jumps over lazy dogs\n" for i in range(300)]
    return train_tokenizer(words, 340, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def text_checkpoint(path, vocabulary, vocab_size, **state):
    config = ModelConfig(**CRYSTAL.model_dump(exclude={"vocab_size"}), vocab_size=vocab_size)
    named = ((f"model.{n}", t) for n, t in tensors(config))
    state = {"model": config.model_dump(mode="json"), "tokenizer": vocabulary.path.name, **state}
    return write(path, named, state, [vocabulary.path])


def test_text_is_continued_from_a_checkpoint(tmp_path, vocabulary):
    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size)
    result = generate_text(path, "the quick", max_new_tokens=8)
    model, _ = load_decoder(path)
    ids = [vocabulary.bos_id, *vocabulary.encode("the quick")]
    assert result["tokens"] == list(generate(model, ids, 8, eos_id=vocabulary.eos_id))
    assert result["prompt_tokens"] == len(ids)
    assert "the quick" + result["text"] == vocabulary.decode(ids + result["tokens"])
    assert generate_text(path, "", max_new_tokens=2)["prompt_tokens"] == 1


def test_a_model_trained_without_bos_is_prompted_without(tmp_path, vocabulary):
    path = text_checkpoint(tmp_path / "c", vocabulary, vocabulary.vocab_size, bos=False)
    assert generate_text(path, "the", max_new_tokens=2)["prompt_tokens"] == len(vocabulary.encode("the"))
    with pytest.raises(ConfigError, match="prompt: expected at least one token"):
        generate_text(path, "", max_new_tokens=2)


@pytest.mark.parametrize(("vocab_size", "added"), [(384, True), (352, False)])  # 340 + 22 and 340, padded
def test_added_tokens_are_there_when_the_model_has_room(vocab_size, added, tmp_path, vocabulary):
    opened = read(text_checkpoint(tmp_path / "c", vocabulary, vocab_size))
    assert load_tokenizer(opened).added_tokens is added


def test_a_checkpoint_without_or_with_too_large_a_tokenizer_is_one_line(tmp_path, vocabulary):
    with pytest.raises(CheckpointError, match="expected a tokenizer"):
        generate_text(checkpoint(tmp_path / "a"), "the")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected at most the model's 96 ids"):
        generate_text(text_checkpoint(tmp_path / "b", vocabulary, 96), "the")


# -- the fidelity probe -------------------------------------------------------------------------------------------


def test_logits_are_fp32_and_each_row_its_own(model):
    ids = torch.tensor([prompt(11, 1), prompt(11, 2), prompt(11, 3)])
    got = logits(model, ids)
    assert (got.dtype, got.shape) == (torch.float32, (3, 11, 96))
    with torch.inference_mode():
        assert torch.equal(got[1], model(ids[1:2])[0])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_a_file_of_ids_becomes_a_file_of_logits(dtype, tmp_path):
    path, model = checkpoint(tmp_path / "c"), decoder(CRYSTAL)
    ids = np.array([prompt(11, 1), prompt(11, 2)])
    np.save(tmp_path / "ids.npy", ids.astype(dtype))
    assert logits_file(path, tmp_path / "ids.npy", tmp_path / "out.npy") == (2, 11, 96)
    got = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert got.dtype == np.float32
    assert_near(torch.from_numpy(got), logits(model, torch.from_numpy(ids)), path_length(CRYSTAL, 11))


def test_logits_take_no_other_files_place(tmp_path):
    path, ids = checkpoint(tmp_path / "c"), tmp_path / "ids.npy"
    np.save(ids, np.array(prompt(7)))
    (tmp_path / "again.npy").symlink_to(ids)
    whole = ids.read_bytes()
    for out, what in ((ids, "the token ids"), (tmp_path / "again.npy", "the token ids"),
                      (path / "checkpoint.json", "no .npy")):  # fmt: skip
        before = out.read_bytes()
        with pytest.raises(ConfigError, match=rf"--out: expected a new file or a .npy to write over, .* is {what}"):
            logits_file(path, ids, out)
        assert out.read_bytes() == before
    assert ids.read_bytes() == whole
    (tmp_path / "empty").touch()  # as mktemp makes it
    for _ in range(2):
        assert logits_file(path, ids, tmp_path / "empty") == (1, 7, 96)


def test_ids_from_a_pipe_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "ids.npy")
    with pytest.raises(DataError, match=r"ids\.npy: cannot be read: expected a file"):
        read_ids(tmp_path / "ids.npy", CRYSTAL)


def test_one_sequence_is_a_batch_of_one(tmp_path):
    np.save(tmp_path / "ids.npy", np.array(prompt(7)))
    assert logits_file(checkpoint(tmp_path / "c"), tmp_path / "ids.npy", tmp_path / "out.npy") == (1, 7, 96)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.ones((2, 3)), "expected integers, got float64"),
        (np.ones((2, 3), dtype=bool), "expected integers, got bool"),
        (np.ones((1, 2, 3), dtype=int), r"shape \[seq\] or \[batch, seq\], got \[1, 2, 3\]"),
        (np.zeros((0, 3), dtype=int), r"got \[0, 3\]"),
        (np.array(5), r"got \[\]"),
        (np.array([1, 96]), "ids from 0 to 95, got 96"),
        (np.array([1, -1]), "ids from 0 to 95, got -1"),
        (np.array([2**63 + 5], dtype=np.uint64), "ids from 0 to 95, got 9223372036854775813"),
        (np.ones((1, 49), dtype=int), "rows of at most 48 ids, got 49"),
        (np.array([{}], dtype=object), "expected a .npy array of token ids"),
    ],
)
def test_ids_that_are_not_the_models_are_one_line(ids, expected, tmp_path):
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    with pytest.raises((ConfigError, DataError), match=expected) as error:
        read_ids(tmp_path / "ids.npy", CRYSTAL)
    assert str(error.value).startswith(f"{tmp_path}/ids.npy: ")


def test_files_that_cannot_be_read_or_written_are_one_line_and_leave_nothing(tmp_path):
    path = checkpoint(tmp_path / "c")
    with pytest.raises(DataError, match=r"none\.npy: cannot be read"):
        logits_file(path, tmp_path / "none.npy", tmp_path / "out.npy")
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(DataError, match=r"text\.npy: expected a \.npy array"):
        logits_file(path, tmp_path / "text.npy", tmp_path / "out.npy")
    np.save(tmp_path / "ids.npy", np.array([1, 2]))
    with pytest.raises(RunError, match=r"none/out\.npy: cannot be written"):
        logits_file(path, tmp_path / "ids.npy", tmp_path / "none" / "out.npy")
    assert {p.name for p in tmp_path.iterdir()} == {"c", "text.npy", "ids.npy"}
