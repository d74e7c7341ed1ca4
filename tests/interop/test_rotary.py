"""The rotary base of a config.json is the one that transformers 5 computes with, or the file is refused by name."""

import json

import pytest
from directories import CRYSTAL

from crystal.errors import ConfigError
from crystal.interop.huggingface_forms import config_from_json

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

READ = {
    "nothing said": {},
    "at the top": {"rope_theta": 5e5},
    "a whole number": {"rope_theta": 1000000},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "parameters before the top": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 3e4},
    "parameters without a base": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4},
    "no type": {"rope_parameters": {"rope_theta": 5e5}},
    "scaling of type default": {"rope_scaling": {"type": "default"}, "rope_theta": 3e4},
    "scaling with a base": {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 3e4},
    "scaling before parameters": {
        "rope_scaling": {"rope_type": "default", "rope_theta": 2e4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "scaling without a base before parameters with one": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "the default beside parameters that scale": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_theta": 3e4,
    },
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "null scaling": {"rope_scaling": None, "rope_theta": 5e5},
    "null parameters": {"rope_parameters": None, "rope_theta": 5e5},
    "rope_type before type": {"rope_scaling": {"rope_type": "default", "type": "linear"}, "rope_theta": 5e5},
    "a whole factor": {"partial_rotary_factor": 1.0, "rope_theta": 5e5},
    "a whole factor inside": {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1}},
}


@pytest.mark.parametrize("name", READ)
def test_the_base_is_the_one_that_transformers_rotates_with(name, tmp_path):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    mapping = LLAMA | READ[name]
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert (theirs.rope_type, theirs.attention_scaling) == ("default", 1.0)
    base = config_from_json(mapping, "config.json")[0].rotary_base
    assert theirs.inv_freq.tolist() == pytest.approx([base ** -(i / 8) for i in range(8)], rel=1e-6)


SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 32},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies_are_refused_by_name(kind, section, key):
    mapping = LLAMA | {section: {key: kind, "rope_theta": 1e4} | SCALED[kind]}
    with pytest.raises(ConfigError, match=rf"^config\.json: {section}\.{key}: expected default.*got '{kind}'$"):
        config_from_json(mapping, "config.json")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_type": None}}, "rope_scaling.rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
    ],
)
def test_what_is_no_base_or_half_a_head_is_refused_by_name(changes, key):
    with pytest.raises(ConfigError) as error:
        config_from_json(LLAMA | changes, "config.json")
    assert str(error.value).startswith(f"config.json: {key}: expected ")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"logit_scale": 1.0}, "logit_scale"),
        ({"mup_output_alpha": float("nan")}, "mup_output_alpha"),
    ],
)
def test_a_crystalcoder_rotates_as_its_class_does_or_is_refused(changes, key):
    with pytest.raises(ConfigError) as error:
        config_from_json(CRYSTAL | changes, "config.json")
    assert str(error.value).startswith(f"config.json: {key}: expected ")
    assert config_from_json(CRYSTAL | {"rope_theta": 10000, "logit_scale": 0.555}, "config.json")[0].rotary_base == 1e4
