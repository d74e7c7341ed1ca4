"""Batched writing up to a stop string: the tokens of plain generation, cut in the text, row by row for itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_subject import run, subject  # noqa: F401

import crystal.inference.generate as generate_module
from crystal.errors import ConfigError
from crystal.evaluation.writing import Sampling, budget, room, write
from crystal.inference.generate import generate_texts

TEXTS = ["the of and", "def return", "a", "<p> </p> <div>", "for in if else", "was with be by on not he his but at"]
GREEDY, SAMPLED = Sampling(1, 0.0, 0.95, 20, 0), Sampling(3, 0.9, 0.9, 20, 5)


def prompts(subject, texts=TEXTS, seed=7):  # noqa: F811
    return [([*subject.start, *subject.tokenizer.encode(text)], seed + i) for i, text in enumerate(texts)]


def written(subject, asked, sampling=GREEDY, stops=(), ends=None):  # noqa: F811
    ends = subject.ends if ends is None else ends
    batches = write(subject.decoder, subject.tokenizer, asked, stops, ends, sampling)
    found = dict(pair for batch in batches for pair in batch)
    return [found[number] for number in range(len(asked))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_are_those_of_generate_texts(run, subject, temperature):  # noqa: F811
    expected = generate_texts(run, TEXTS, max_new_tokens=20, temperature=temperature, top_p=0.95, seed=7)
    got = written(subject, prompts(subject), Sampling(1, temperature, 0.95, 20, 0))
    assert [one.tokens for one in got] == [one["tokens"] for one in expected]
    assert [one.text for one in got] == [one["text"] for one in expected]
    assert [one.ended for one in got] == [one["ended"] for one in expected]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_text_is_cut_before_its_first_stop_string_and_no_token_later(subject, data):  # noqa: F811
    asked = prompts(subject)
    free = written(subject, asked, Sampling(1, 1.0, 1.0, 20, 0), ends=())
    number = data.draw(st.integers(0, len(asked) - 1))
    text = free[number].text
    stops = []
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, max(len(text) - 1, 0)))
        stops.append(text[at : at + data.draw(st.integers(1, 8))])
    stops = [stop for stop in stops if stop and "\ufffd" not in stop] or ["never seen"]
    cut = written(subject, asked, Sampling(1, 1.0, 1.0, 20, 0), stops=stops, ends=())
    for whole, one in zip(free, cut, strict=True):
        assert one.tokens == whole.tokens[: len(one.tokens)]
        assert not any(stop in one.text for stop in stops)
        assert whole.text.startswith(one.text)
        if one.ended == "stop":
            rest = whole.text[len(one.text) :]
            assert any(rest.startswith(stop) for stop in stops)
        else:
            assert one == whole


def test_a_stop_string_that_begins_in_the_prompt_is_none(subject):  # noqa: F811
    asked = prompts(subject)
    free = written(subject, asked, ends=())
    stop = TEXTS[0][-3:] + free[0].text[:2]
    assert written(subject, asked, stops=[stop], ends=())[0] == free[0]


def test_a_sample_depends_on_its_own_seed_and_not_on_its_company(subject):  # noqa: F811
    asked = [(ids, SAMPLED.seed_of(f"item {i}", j)) for i, (ids, _) in enumerate(prompts(subject)) for j in range(3)]
    together = written(subject, asked, SAMPLED, stops=[" the", "="])
    assert together == [written(subject, [one], SAMPLED, stops=[" the", "="])[0] for one in asked]
    assert written(subject, asked[::-1], SAMPLED, stops=[" the", "="])[::-1] == together
    assert len({tuple(one.tokens) for one in together[:3]}) > 1


def test_seeds_tell_items_samples_and_runs_apart():
    seeds = {Sampling(4, 1.0, 1.0, 8, seed).seed_of(item, j) for seed in (0, 1) for item in "ab" for j in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rows_that_have_ended_cost_nothing_for_long(subject, monkeypatch):  # noqa: F811
    asked = prompts(subject, ["the of"] * 8)
    free = written(subject, asked, Sampling(1, 1.2, 1.0, 30, 0), ends=())
    stops = [one.text[:6] for one in free[:5]]
    sizes, real = [], generate_module.last_logits
    monkeypatch.setattr(
        generate_module, "last_logits", lambda model, ids, cache: sizes.append(len(ids)) or real(model, ids, cache)
    )
    cut = written(subject, asked, Sampling(1, 1.2, 1.0, 30, 0), stops=stops, ends=())
    alive = [sum(len(one.tokens) > step for one in cut) for step in range(len(sizes))]
    assert sizes[0] == 8 > sizes[-1]
    assert all(living <= size < 2 * living or size == living for living, size in zip(alive, sizes, strict=True))


def test_a_prompt_that_is_too_long_loses_its_beginning_and_says_how_much(subject):  # noqa: F811
    assert subject.decoder.config.max_seq_len == 64
    assert (budget(subject.decoder, 20), room(subject.decoder, 20)) == (20, 44)
    assert (budget(subject.decoder, 500), room(subject.decoder, 500)) == (32, 32)  # half is the prompt's
    ids = list(range(3, 103))
    long, short = written(subject, [(ids, 0), (ids[-44:], 0)])
    assert (long.cut, short.cut) == (56, 0)
    assert long.tokens == short.tokens


def test_no_prompts_are_no_batches(subject):  # noqa: F811
    assert list(write(subject.decoder, subject.tokenizer, [], [], subject.ends, GREEDY)) == []


def test_many_prompts_go_in_batches_that_fit_into_memory(subject, monkeypatch):  # noqa: F811
    asked = prompts(subject, TEXTS * 6)
    expected = written(subject, asked)
    monkeypatch.setattr("crystal.evaluation.writing.available_bytes", lambda: 100_000)
    batches = list(write(subject.decoder, subject.tokenizer, asked, [], subject.ends, GREEDY))
    assert len(batches) > len(asked) // 8
    lengths = [len(asked[number][0]) for batch in batches for number, _ in batch]
    assert lengths == sorted(lengths)
    assert dict(pair for batch in batches for pair in batch) == dict(enumerate(expected))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"temperature": 0.0}, "samples: expected 1 at temperature 0, where all are the same, got 3"),
    ],
)
def test_settings_out_of_range_are_one_line(changed, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Sampling(**{"samples": 3, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 8, "seed": 0} | changed)


def test_a_character_in_byte_tokens_is_whole_in_the_text(subject):  # noqa: F811
    """Stops are sought in text, so a letter that is spelled in bytes stops it when its last byte has come."""
    from crystal.evaluation.writing import _Row

    tokenizer = subject.tokenizer
    ids = tokenizer.encode("x")
    row = _Row(tokenizer, ids, ["\u4e2d"], set())
    spelled = tokenizer.encode("x the \u4e2d of")[len(ids) :]
    at = [row.add(token) for token in spelled].index(True)
    assert tokenizer.decode(spelled[: at + 1]).endswith("\u4e2d")
    assert "\ufffd" in tokenizer.decode(spelled[:at])
    assert row.written(0).text == " the "
