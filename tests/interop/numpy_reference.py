"""CrystalCoder's forward pass in numpy, from the published facts alone (facts/llm360.md, section 1).

Nothing of the zoo is read or imported. Tensors have the published names and layout: Conv1D, in x out. Numbers are in
the dtype that is asked for throughout, so that in fp32 this is what a second program would give.
"""

import numpy as np


def layer_norm(x_TD, weight_D, bias_D, eps):
    """Mean and variance over channels (biased), then gain and bias: pre-LN of 1.1."""
    centered_TD = x_TD - x_TD.mean(-1, keepdims=True)
    variance_T1 = np.square(centered_TD).mean(-1, keepdims=True)
    return centered_TD / np.sqrt(variance_T1 + x_TD.dtype.type(eps)) * weight_D + bias_D


def silu(x):
    """x * sigmoid(x), where exp cannot overflow."""
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softmax(scores_TS):
    e_TS = np.exp(scores_TS - scores_TS.max(-1, keepdims=True))
    return e_TS / e_TS.sum(-1, keepdims=True)


def turned(x_TK, rotary_dim):
    """GPT-J's pairs (0, 1), (2, 3), … as complex numbers, turned by t * 10000^(-2i / rotary_dim); the rest passes."""
    pairs_TP = x_TK[:, 0:rotary_dim:2] + 1j * x_TK[:, 1:rotary_dim:2]
    frequency_P = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    pairs_TP = pairs_TP * np.exp(1j * np.arange(len(x_TK))[:, None] * frequency_P)
    out_TK = x_TK.copy()
    out_TK[:, 0:rotary_dim:2], out_TK[:, 1:rotary_dim:2] = pairs_TP.real, pairs_TP.imag
    return out_TK


def forward(tensors, config, ids_T, dtype=np.float32):
    """Logits [T, V] of one sequence. tensors: published name → array; config: the published config.json."""
    w = {name: array.astype(dtype) for name, array in tensors.items()}
    d, heads, eps = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]
    d_head = d // heads
    scale = 1 / d_head if config["mup_scale_qk_dot_by_d"] else 1 / np.sqrt(d_head)

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    x_TD = w["transformer.wte.weight"][ids_T] * dtype(config["mup_embeddings_scale"])
    future_TT = np.triu(np.ones((len(ids_T), len(ids_T)), dtype=bool), 1)
    for n in range(config["n_layer"]):
        h = f"transformer.h.{n}"
        qkv_TE = conv1d(norm(x_TD, f"{h}.ln_1"), f"{h}.attn.c_attn")
        y_TD = np.empty_like(x_TD)
        for j in range(heads):
            q, k, v = (qkv_TE[:, block * d + j * d_head :][:, :d_head] for block in range(3))
            scores_TT = turned(q, config["rotary_dim"]) @ turned(k, config["rotary_dim"]).T * dtype(scale)
            y_TD[:, j * d_head :][:, :d_head] = softmax(np.where(future_TT, dtype("-inf"), scores_TT)) @ v
        x_TD = x_TD + conv1d(y_TD, f"{h}.attn.c_proj")
        y_TD = norm(x_TD, f"{h}.ln_2")
        x_TD = x_TD + conv1d(conv1d(y_TD, f"{h}.mlp.c_fc") * silu(conv1d(y_TD, f"{h}.mlp.c_fc2")), f"{h}.mlp.c_proj")
    logits_TV = norm(x_TD, "transformer.ln_f") @ w["transformer.wte.weight"].T
    return logits_TV * dtype(config["mup_output_alpha"] * config["mup_width_scale"])
