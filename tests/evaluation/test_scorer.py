"""Scores over a prefix tree are those of one forward pass over each request, however they are arranged."""

import numpy as np
import pytest
import torch
from closeness import path_length, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.evaluation.prefix_tree import Cost, Node, Trunk, arrange
from crystal.evaluation.scorer import score_tokens
from crystal.inference.load import filled
from crystal.inference.logits import logits
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig

LIMIT = 24
SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "vocab_size": 40, "max_seq_len": LIMIT}
CRYSTAL = ModelConfig(norm="layernorm", bias=True, rotary_fraction=0.5, rotary_style="interleaved", **SIZES)
LLAMA = ModelConfig(n_kv_heads=2, tie_embeddings=True, **SIZES)


def decoder(config):
    generator = torch.Generator().manual_seed(0)
    weights = [
        (name, torch.empty(p.shape).normal_(float(name.endswith("norm.weight")), 0.3, generator=generator))
        for name, p in meta_decoder(config).named_parameters()
    ]
    return filled(config, weights, "test")


MODELS = {"crystalcoder": decoder(CRYSTAL), "llama with grouped heads": decoder(LLAMA)}


def expected(model, context, continuation):
    """(log-probabilities, greedy), by the definition."""
    ids = [*context, *continuation][-(LIMIT + 1) :]
    logprobs_TV = logits(model, torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-len(continuation) :]
    tokens = torch.tensor(continuation)
    return logprobs_TV.gather(1, tokens[:, None])[:, 0], bool((logprobs_TV.argmax(-1) == tokens).all())


# few different tokens, so that much is shared, and one request may be another's beginning
ids = st.lists(st.integers(0, 2), min_size=1, max_size=14)
shared = st.lists(st.integers(0, 39), min_size=0, max_size=LIMIT)


@given(shared, st.lists(st.tuples(ids, ids), min_size=1, max_size=12), st.sampled_from([1, 16, 4096]))
@settings(max_examples=40)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_arrangement_gives_the_numbers_of_a_plain_forward_pass(model, front, pairs, batch_tokens):
    requests = [(front + context, continuation) for context, continuation in pairs]
    found = score_tokens(model, requests, batch_tokens=batch_tokens)
    for (context, continuation), scored in zip(requests, found, strict=True):
        wanted, greedy = expected(model, context, continuation)
        off = (torch.tensor(scored.logprobs) - wanted).abs().max()
        assert off <= tolerance(path_length(model.config, LIMIT), wanted.abs().max().clamp(min=10))
        assert scored.greedy == greedy
        assert scored.cut == max(len(context) + len(continuation) - LIMIT - 1, 0)


def test_each_distinct_prefix_is_read_once_and_last_tokens_not_at_all(monkeypatch):
    from crystal.evaluation import scorer

    read = []
    was = scorer._Pass._read

    def counted(self, ids_BT, *rest):
        read.append(ids_BT.numel())
        return was(self, ids_BT, *rest)

    monkeypatch.setattr(scorer._Pass, "_read", counted)
    model = MODELS["crystalcoder"]
    examples = list(range(10))
    requests = [([*examples, 20 + q, 30], [answer]) for q in range(4) for answer in (5, 6, 7, 8)]
    score_tokens(model, requests, batch_tokens=64)
    assert sum(read) == 10 + 4 * 2  # the examples, then each question; answers of one token cost nothing
    read.clear()
    score_tokens(model, requests * 3, batch_tokens=64)
    assert sum(read) == 10 + 4 * 2


def test_an_empty_side_or_an_answer_without_room_is_refused():
    model = MODELS["crystalcoder"]
    for context, continuation in (([], [1]), ([1], []), ([1], [1] * (LIMIT + 1))):
        with pytest.raises(ValueError, match="expected a con"):
            score_tokens(model, [(context, continuation)])
    assert score_tokens(model, []) == []
    assert len(score_tokens(model, [([1], [2] * LIMIT)])[0].logprobs) == LIMIT


def test_the_caller_hears_of_every_request():
    heard = []
    score_tokens(MODELS["crystalcoder"], [([1, 2], [i]) for i in range(9)], done=heard.append)
    assert sum(heard) == 9


def paths(trunk: Trunk, before=()):
    """{number: tokens} of every sequence in an arrangement."""
    front = (*before, *trunk.tokens.tolist())
    found = {}

    def walk(node: Node, so_far):
        so_far = (*so_far, *node.tokens.tolist())
        if node.ends >= 0:
            assert node.ends not in found
            found[node.ends] = so_far
        for child in node.children:
            walk(child, so_far)
        return len(node.tokens) + sum(size(child) for child in node.children)

    for row in trunk.rows:
        walk(row.root, front)
        assert row.size == size(row.root)
    for further in trunk.trunks:
        found |= paths(further, front)
    return found


def size(node: Node) -> int:
    return len(node.tokens) + sum(size(child) for child in node.children)


sequences = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=30, unique=True
)


@given(sequences, st.sampled_from([0.0, 1.0, 100.0]), st.sampled_from([0.0, 5.0, 1e9]))
def test_an_arrangement_holds_every_sequence_once_whatever_things_cost(some, pair, trunk):
    arrays = [np.array(s) for s in some]
    assert paths(arrange(arrays, Cost(1.0, pair, trunk))) == dict(enumerate(some))


def test_long_chains_of_prefixes_do_not_exhaust_the_stack():
    arrays = [np.arange(1, n + 2) for n in range(1500)]
    assert len(paths(arrange(arrays, Cost(1.0, 0.001, 1e9)))) == 1500
