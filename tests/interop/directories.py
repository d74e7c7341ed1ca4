"""Small published directories with random weights, in both forms, for the tests of this folder."""

import json

import torch


def llama_directory(path, seed=0, **changes):
    """A small random LlamaForCausalLM, saved by transformers itself; weights large enough to tell errors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    randomize(model)
    model.save_pretrained(path)
    return model


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data.normal_(mean, 0.2, generator=generator)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CRYSTAL = {
    "model_type": "crystalcoder", "vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_inner": 170, "activation_function": "swiglu", "position_embedding_type": "rotary", "rotary_dim": 4,
    "layer_norm_epsilon": 1e-5, "mup_width_scale": 0.25, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True, "scale_attn_weights": True, "tie_word_embeddings": True,
}  # fmt: skip


def crystal_state(c=CRYSTAL, seed=3):
    """Random tensors of the published state dict, its duplicate head and its buffers included (facts 1.6)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, mean=0.0, std=0.1):
        return torch.empty(shape).normal_(mean, std, generator=generator)

    d, f = c["n_embd"], c["n_inner"]
    state = {"transformer.wte.weight": random(c["vocab_size"], d)}
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            state[f"{h}.{norm}.weight"], state[f"{h}.{norm}.bias"] = random(d, mean=1.0), random(d)
        for name, fan_in, fan_out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, f),
            ("mlp.c_fc2", d, f),
            ("mlp.c_proj", f, d),
        ):
            state[f"{h}.{name}.weight"], state[f"{h}.{name}.bias"] = random(fan_in, fan_out, std=0.3), random(fan_out)
        state[f"{h}.attn.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
        state[f"{h}.attn.masked_bias"] = torch.tensor(-1e4)
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = random(d, mean=1.0), random(d)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    return state


def crystal_directory(path, state=None, shards=3, **changes):
    """As LLM360 published it: .bin shards and their index."""
    state = crystal_state() if state is None else state
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CRYSTAL | changes))
    names = list(state)
    weight_map = {}
    for n in range(shards):
        file = f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin"
        part = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        torch.save({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
