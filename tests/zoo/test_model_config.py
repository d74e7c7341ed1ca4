"""Model configs: ladders, and one clear sentence for each impossible combination."""

import pytest

from crystal.config import parse
from crystal.errors import ConfigError
from crystal.zoo.config import ModelConfig, model_config, preset, with_width

SMALL = {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "vocab_size": 100}


@pytest.mark.parametrize("family", ["crystalcoder", "amber"])
@pytest.mark.parametrize("width", [64, 128, 256, 512, 1024, 2048])
def test_the_width_ladder_keeps_the_head_size(family, width):
    config = model_config(f"{family}-w{width}")
    assert (config.d_model, config.d_head) == (width, 32)
    assert config.d_ff / width == pytest.approx(8 / 3 if family == "crystalcoder" else 11008 / 4096, rel=0.01)


def test_the_depth_ladder():
    assert [model_config(f"crystalcoder-w128-l{n}").n_layers for n in (2, 8, 32)] == [2, 8, 32]


def test_the_ladder_reaches_the_published_shape():
    full = model_config("crystalcoder-7b")
    assert with_width(full, 256).d_ff == 682
    assert with_width(full, 4096) == full


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"n_heads": 3}, "n_heads", "divisor of d_model 64"),
        ({"n_kv_heads": 4}, "n_kv_heads", "divisor of n_heads 2"),
        ({"rotary_fraction": 0.3}, "rotary_fraction", "even number of rotary dimensions"),
        ({"rotary_fraction": 0.09375}, "rotary_fraction", "= 3"),
        ({"d_model": "64"}, "d_model", "a whole number greater than 0"),
        ({"d_model": -64}, "d_model", "greater than 0"),
        ({"norm": "batchnorm"}, "norm", "'layernorm' or 'rmsnorm'"),
        ({"d_modle": 64}, "d_modle", "did you mean 'd_model'"),
        ({"mup": {"parametrization": "completep"}}, "base_n_layers", "depth of the tuned proxy"),
        ({"mup": {"init_sdt": 1.0}}, "mup.init_sdt", "did you mean 'init_std'"),
    ],
)
def test_impossible_models_are_one_line(change, key, expected):
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, SMALL | change, "run.yaml", ("model",))
    line = str(error.value)
    assert line.startswith("run.yaml: model")
    assert key in line
    assert expected in line
    assert "\n" not in line


def test_unknown_presets_suggest_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'crystalcoder-7b'"):
        preset("crystalcoder-7B")
    with pytest.raises(ConfigError, match="multiple of the head size 32"):
        preset("crystalcoder-w100")
