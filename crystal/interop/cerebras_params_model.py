"""The `model` section of a Model Zoo parameter file as the `model:` section of a run: shape, and muP undone.

Release 1.9.1 gives muP's numbers as they are worked out (sigmas as drawn, one multiplier of learning rates); 2.10 gives
base sizes and works them out itself. Either way all numbers must fit together, or the file means a model that is not
ours.
"""

from __future__ import annotations

import math

from crystal.interop.cerebras_params_keys import MODEL, NORMAL, TRAINER_MODEL, TRUNCATED_NORMAL
from crystal.interop.cerebras_params_node import NUMBER, Node, plain

BIASES = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention", "use_ffn_bias")
INITIALIZER_RANGE = 0.02  # Model Zoo's, of an untied head; drawn without a cut, whatever the initializers say


def model_of(node: Node, decoder_kernel: float | None, trainer: bool) -> dict:
    """The `model:` mapping. decoder_kernel: 1.9.1's learning-rate multiplier of matrices, None where it gives none;
    trainer: of release 2.10. Raises ConfigError for what our decoder does not compute or does not start from."""
    node.expect(TRAINER_MODEL if trainer else MODEL)
    biases = {node.get(key, bool) for key in BIASES}
    if len(biases) > 1:
        raise node.error("use_ffn_bias", "expected all of the biases or none")
    d_model, n_heads = _count(node, "hidden_size"), _count(node, "num_heads")
    if d_model % n_heads:
        raise node.error("num_heads", f"expected a divisor of hidden_size {d_model}, got {n_heads}")
    name = node.get("name", str, "gpt2")
    if name not in ("gpt2", "gpt3", "llama"):
        raise node.error("name", f"expected gpt2, gpt3 or llama, got {plain(name)}")
    model = {
        "d_model": d_model,
        "n_layers": _count(node, "num_hidden_layers"),
        "n_heads": n_heads,
        "d_ff": _count(node, "filter_size"),
        "vocab_size": _count(node, "vocab_size"),
        "max_seq_len": _count(node, "max_position_embeddings"),
        "norm": node.get("norm_type", str, "layernorm"),
        "norm_eps": node.above_zero("layer_norm_epsilon", NUMBER),
        "bias": biases.pop(),
        "rotary_fraction": _count(node, "rotary_dim") / (d_model // n_heads),
        "rotary_base": float(node.above_zero("rope_theta", NUMBER, 10000.0)),
        "rotary_style": "half" if name == "llama" else "interleaved",
        "tie_embeddings": node.get("share_embedding_weights", bool),
    }
    groups = _groups(node)
    if groups not in (None, n_heads):
        model["n_kv_heads"] = groups
    return model | {"mup": _mup(node, decoder_kernel, model["n_layers"], model["tie_embeddings"])}


def _count(node: Node, key: str) -> int:
    return node.above_zero(key, int)


def _groups(node: Node) -> int | None:
    """Heads of keys and values, where fewer than of queries."""
    module, extra = node.get("attention_module", str, None), node.mapping.get("extra_attention_params") or {}
    if module != "multiquery_attention":
        if extra:
            raise node.error("extra_attention_params", "expected it with attention_module: multiquery_attention alone")
        return None
    inside = node.inside("extra_attention_params")
    for key in inside.mapping.keys() - {"num_kv_groups"}:
        raise inside.error(key, "not a key that crystal has a word for; expected num_kv_groups alone")
    return _count(inside, "num_kv_groups")


def _mup(node: Node, decoder_kernel: float | None, n_layers: int, tied: bool) -> dict:
    """The `mup:` section."""
    d_model = node.get("hidden_size", int)
    base = _base(node, decoder_kernel)
    m = 1.0 if base is None else d_model / base
    if decoder_kernel is not None:
        m = 1 / decoder_kernel
    scaled = base is not None or decoder_kernel is not None
    embedding, hidden, residual = (
        node.inside(key) for key in ("embedding_initializer", "initializer", "output_layer_initializer")
    )
    std, hidden_std = _std(embedding), _std(hidden)
    worked_out = 1.0 if base is not None else m**-0.5  # 1.9.1 gives sigmas as they are drawn, 2.10 those of the base
    if not _close(hidden_std, std * worked_out):
        raise hidden.error("std", f"expected {std * worked_out:g}, from embedding_initializer's {std:g}")
    ratio = _std(residual) / hidden_std
    smaller, larger = (1 / math.sqrt(2 * n_layers), 1.0) if base is None else (1.0, math.sqrt(2 * n_layers))
    if not (_close(ratio, smaller) or _close(ratio, larger)):
        raise residual.error("std", f"expected initializer's std x {smaller:g} or {larger:g}, got x {ratio:g}")
    cut = _cut(embedding)
    for other in (hidden, residual):
        _expect_as(other, _std(other), cut, "embedding_initializer")
    for key, like in (("ffn_initializer", hidden), ("ffn_output_layer_initializer", residual)):
        if node.mapping.get(key) is not None:
            _expect_as(node.inside(key), _std(like), cut, like.path.rpartition(".")[2])
        elif like is residual and base is not None:  # Model Zoo would take a sigma of 0.02 for it
            node.get(key, dict)
    if not tied and not _close(node.above_zero("initializer_range", NUMBER, INITIALIZER_RANGE), std):
        got = node.get("initializer_range", NUMBER, INITIALIZER_RANGE)
        raise node.error("initializer_range", f"expected {std:g} as of the embedding, for the untied head; got {got:g}")
    mup = {
        "parametrization": "crystalcoder" if scaled else "sp",
        "embedding_multiplier": node.above_zero("embeddings_scale", NUMBER, 1.0),
        "output_alpha": _alpha(node, base, m),
        # 2.10 takes 1/d by itself under muP
        "attention_scale": "1/d" if node.get("scale_qk_dot_by_d", bool, base is not None) else "1/sqrt_d",
        "init_std": std,
        "init_truncate": None if cut is None else float(f"{cut:.12g}"),
        "residual_init_2l": _close(ratio, smaller),
    }
    if scaled:
        width = round(d_model / m)
        if not _close(d_model / m, width):
            raise node.error("hidden_size", f"expected a whole base width, got {d_model} / {m:g}")
        mup["base_d_model"] = width
    return mup


def _base(node: Node, decoder_kernel: float | None) -> float | None:
    """The base width, where the file works by base sizes; all of them must be there and say the same."""
    base = node.above_zero("mup_base_hidden_size", NUMBER, None)
    filter_base = node.above_zero("mup_base_filter_size", NUMBER, None)
    if base is None and filter_base is None:
        return None
    if decoder_kernel is not None:
        raise node.error("mup_base_hidden_size", "expected base sizes or adjust_learning_rate, not both")
    if base is None or filter_base is None:
        missing = "mup_base_hidden_size" if base is None else "mup_base_filter_size"
        raise node.error(missing, "expected int or float, none given, and base sizes come together")
    m = node.get("hidden_size", int) / base
    of_filter = node.above_zero("filter_size", int) / filter_base
    if not math.isclose(of_filter, m, rel_tol=1e-3):  # a base of 682.67 is published as 682.6
        wanted = f"filter_size x {base:g} / hidden_size = {node.get('filter_size', int) / m:g}"
        raise node.error("mup_base_filter_size", f"expected {wanted}, one multiplier for all, got {filter_base:g}")
    return base


def _alpha(node: Node, base: float | None, m: float) -> float:
    """The logits' multiplier at the base width."""
    alpha, worked_out = (node.above_zero(f"output_logits_{k}", NUMBER, None) for k in ("alpha", "scale"))
    if base is None:
        if alpha not in (None, 1):
            raise node.error("output_logits_alpha", "expected it with mup_base_hidden_size, without which it is off")
        return float(f"{(1.0 if worked_out is None else worked_out) * m:.12g}")
    if worked_out is not None:
        raise node.error("output_logits_scale", "expected output_logits_alpha instead, with mup_base_hidden_size")
    return 1.0 if alpha is None else alpha


def _std(node: Node) -> float:
    return node.above_zero("std", NUMBER)


def _cut(node: Node) -> float | None:
    """How many sigmas a normal is cut at, on both sides; None: it is not. Other distributions are refused."""
    name, std = node.get("name", str), _std(node)
    if name not in ("truncated_normal", "normal"):
        raise node.error("name", f"expected truncated_normal or normal, got {plain(name)}")
    node.expect(NORMAL if name == "normal" else TRUNCATED_NORMAL)
    if node.get("mean", NUMBER, 0.0) != 0:
        raise node.error("mean", f"expected 0, got {node.get('mean', NUMBER)}")
    if name == "normal":
        return None
    high = node.above_zero("b", NUMBER)
    if not _close(node.get("a", NUMBER), -high):
        raise node.error("a", f"expected {-high:g}, as far from 0 as b, got {node.get('a', NUMBER):g}")
    return high / std


def _expect_as(node: Node, std: float, cut: float | None, like: str) -> None:
    """A distribution of this sigma, cut at as many sigmas as that other."""
    if not _close(_std(node), std):
        raise node.error("std", f"expected {std:g} as of {like}, got {_std(node):g}")
    own = _cut(node)
    if (own is None) != (cut is None):
        raise node.error("name", f"expected {'normal' if cut is None else 'truncated_normal'} as of {like}")
    if cut is not None and not _close(own, cut):
        raise node.error("b", f"expected {cut:g} x std as of {like}, got {own:g} x std")


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)
