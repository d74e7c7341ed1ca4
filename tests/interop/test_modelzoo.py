"""Model Zoo parameter files: the published ones field by field, both forms there and back, and what is refused."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from published_phases import MODEL, OPTIMIZER, PHASES, published, write_tree

from crystal.config import Config, parse
from crystal.errors import ConfigError
from crystal.interop.cerebras_params_read import files_of, import_parameters, run_of
from crystal.interop.cerebras_params_write import STYLES, export_parameters, stage_files
from crystal.run import RunConfig, RunFile, load_run


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_we_write_is_the_published_file_in_every_field_that_says_what_is_trained(number):
    ours = stage_files(load_run("crystalcoder-7b"), "1.9.1")[f"stage{number}"]
    theirs = published(f"phase{number}")
    assert {key: ours["model"].get(key) for key in MODEL} == MODEL
    assert {key: ours["optimizer"].get(key) for key in OPTIMIZER} == OPTIMIZER
    for mine, segment in zip(ours["optimizer"]["learning_rate"], theirs["optimizer"]["learning_rate"], strict=True):
        echoed = ("base_lr", "learning_rate")
        assert {key: mine.get(key) for key in segment if key not in echoed} == {
            key: value for key, value in segment.items() if key not in echoed
        }
    assert ours["train_input"]["mixture"] == theirs["train_input"]["mixture"]
    for section, keys in (
        ("train_input", ("batch_size", "vocab_size", "data_processor", "shuffle", "shuffle_seed", "repeat")),
        ("runconfig", ("max_steps", "checkpoint_steps", "seed", "is_pretrained_checkpoint")),
    ):
        assert {k: ours[section][k] for k in keys} == {k: theirs[section][k] for k in keys}


def test_the_published_phases_are_read_into_the_published_run(tmp_path):
    for phase in PHASES:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{phase}.yaml").write_text(yaml.safe_dump(published(phase)))
    result = import_parameters(tmp_path / "in", tmp_path / "crystal.yaml")
    assert result["stages"] == ["phase1", "phase2", "phase3"]
    ours, theirs = load_run("crystalcoder-7b").config, load_run(tmp_path / "crystal.yaml").config
    assert theirs.model == ours.model
    assert theirs.plan() == ours.plan()
    assert theirs.optimizer == ours.optimizer.model_copy(update={"name": "adamw_cerebras"})
    for mine, other in zip(ours.curriculum.stages, theirs.curriculum.stages, strict=True):
        assert (mine.steps, mine.checkpoint_every, mine.lr) == (other.steps, other.checkpoint_every, other.lr)
        assert {n: (s.weight, s.subset) for n, s in mine.sources.items()} == {
            n: (s.weight, s.subset) for n, s in other.sources.items()
        }
    assert [set(stage.carry) for stage in theirs.curriculum.stages] == [set(), {"weights", "optimizer"}, {"weights"}]


@st.composite
def runs(draw):
    """A run that Model Zoo has words for, as its mapping."""
    d_head, heads = draw(st.sampled_from([4, 8, 16])), draw(st.sampled_from([2, 4, 6]))
    scaled, half = draw(st.booleans()), draw(st.booleans())
    model = {
        "d_model": d_head * heads, "n_heads": heads, "n_layers": draw(st.integers(1, 5)),
        "d_ff": draw(st.integers(1, 300)), "vocab_size": draw(st.integers(1, 500)), "max_seq_len": 64,
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])), "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "bias": draw(st.booleans()), "rotary_fraction": draw(st.sampled_from([0.5, 1.0])),
        "rotary_base": draw(st.sampled_from([10000.0, 500000.0])), "rotary_style": "half" if half else "interleaved",
        "tie_embeddings": draw(st.booleans()),
        "mup": {
            "parametrization": "crystalcoder" if scaled else "sp", "init_std": draw(st.floats(0.001, 0.2)),
            "init_truncate": draw(st.sampled_from([None, 2.0, 3.0])), "residual_init_2l": draw(st.booleans()),
            "embedding_multiplier": draw(st.floats(0.5, 20)),
            "attention_scale": draw(st.sampled_from(["1/d", "1/sqrt_d"])),
        },
    }  # fmt: skip
    if scaled:
        model["mup"] |= {"base_d_model": draw(st.integers(1, 40)) * 2, "output_alpha": draw(st.floats(0.1, 5))}
    if heads > 2 and draw(st.booleans()) and not scaled:
        model["n_kv_heads"] = 2
    stages = []
    for i in range(draw(st.integers(1, 3))):
        rates = draw(st.lists(st.floats(1e-5, 0.1), min_size=3, max_size=3))
        warm, steps = draw(st.integers(1, 20)), draw(st.integers(1, 200))
        shape = draw(st.sampled_from(["linear", "cosine"]))
        stages.append(
            {
                "name": f"stage{i}", "steps": warm + steps, "checkpoint_every": draw(st.integers(1, 50)),
                "carry": [] if i == 0 else draw(st.sampled_from([["weights"], ["weights", "optimizer"]])),
                "lr": [
                    {"from": rates[0], "to": rates[1], "steps": warm},
                    {"from": rates[1], "to": rates[2], "steps": steps + draw(st.integers(0, 50)), "shape": shape},
                ],
                "sources": {"x/a": {"weight": 0.25, "subset": "0.0-0.5"}, "x/b": {"weight": 0.75}},
            }
        )  # fmt: skip
    return {
        "name": "drawn", "model": model,
        "optimizer": {
            "name": "adamw_cerebras", "eps": draw(st.sampled_from([1e-8, 1e-9])),
            "betas": [0.9, draw(st.sampled_from([0.95, 0.999]))], "weight_decay": draw(st.floats(0, 0.5)),
            "grad_clip": draw(st.sampled_from([None, 1.0, 0.5])),
        },
        "curriculum": {
            "name": "drawn", "seq_len": draw(st.sampled_from([16, 48, 64])), "lr_counts_from": 0,
            "global_batch_size": draw(st.integers(1, 64)), "stages": stages,
        },
        "data": {"corpus": "corpus.yaml", "tokenizer": {"path": "tokenizer.json"}},
        "train": {"seed": draw(st.integers(0, 9)), "micro_batch_size": 1},
    }  # fmt: skip


def as_run(mapping) -> RunFile:
    return RunFile(parse(RunConfig, mapping, "drawn"), Config(mapping, {(): "drawn"}), "drawn")


def close(a, b) -> bool:
    """Equal, numbers to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b


@settings(max_examples=40)
@given(runs(), st.sampled_from(STYLES))
def test_a_run_comes_back_from_both_forms(tmp_path_factory, mapping, style):
    if style == "1.9.1":
        mapping["model"] |= {"norm": "layernorm", "rotary_style": "interleaved", "rotary_base": 10000.0}
    run = as_run(mapping)
    directory, files = tmp_path_factory.mktemp("zoo"), []
    for name, parameters in stage_files(run, style).items():
        files.append(directory / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(parameters))
    back = as_run(run_of(files, "drawn")).config
    if len(files) == 1:  # a single file does not know its stage's name
        (stage,) = back.curriculum.stages
        renamed = stage.model_copy(update={"name": "stage0"})
        back = back.model_copy(update={"curriculum": back.curriculum.model_copy(update={"stages": (renamed,)})})
    base = {} if mapping["model"]["mup"]["parametrization"] == "crystalcoder" else {"base_d_model": 256}
    for section in ("model", "optimizer", "curriculum"):
        ours, theirs = getattr(run.config, section).model_dump(), getattr(back, section).model_dump()
        if section == "model":
            ours["mup"] |= base
            ours["n_kv_heads"] = theirs["n_kv_heads"] = run.config.model.kv_heads
        assert close(ours, theirs), section
    assert back.train.seed == run.config.train.seed


def test_a_scaled_down_run_keeps_its_learning_rates(tmp_path):
    """The demo's lines are cut at other places than the published ones; their values are its own."""
    from crystal.curriculum.resolve import resolve

    demo = load_run("demo")
    export_parameters("demo", tmp_path / "zoo")
    for style in STYLES:
        import_parameters(tmp_path / "zoo" / style, tmp_path / f"run-{style}.yaml")
        back = load_run(tmp_path / f"run-{style}.yaml")
        ours, theirs = (resolve(run.config.curriculum, run.source) for run in (demo, back))
        assert ours.steps == theirs.steps
        for mine, other in zip(ours.stages, theirs.stages, strict=True):
            for t in range(0, mine.steps + 1, 7):
                assert other.lr_at(t) == pytest.approx(mine.lr_at(t), rel=1e-9)


def test_a_run_without_words_is_refused_whole_and_nothing_is_left(tmp_path):
    with pytest.raises(ConfigError, match=r"amber-7b\.yaml: optimizer\.decay_norms_and_biases: expected false"):
        export_parameters("amber-7b", tmp_path / "zoo")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "zoo").mkdir()
    with pytest.raises(ConfigError, match="expected a new directory"):
        export_parameters("crystalcoder-7b", tmp_path / "zoo")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "model",
            "nonlinearity",
            "gelu",
            "model.nonlinearity: expected swiglu, which is what this decoder does, got gelu",
        ),
        (
            "model",
            "alibi_trainable_slopes",
            True,
            "model.alibi_trainable_slopes: not a key that crystal has a word for",
        ),
        ("model", "hidden_size", "4096", "model.hidden_size: expected int, got '4096'"),
        ("model", "use_ffn_bias", False, "model.use_ffn_bias: expected all of the biases or none"),
        ("model", "initializer", {"name": "truncated_normal", "std": 0.02, "b": 0.04}, "std: expected 0.01825"),
        ("optimizer", "optimizer_type", "SGD", "optimizer.optimizer_type: expected AdamW, got SGD"),
        ("optimizer", "adjust_learning_rate", {"embedding": 2.0}, "expected decoder_kernel alone, got embedding"),
        ("runconfig", "max_steps", None, "runconfig.max_steps: expected int, got None"),
    ],
)
def test_what_is_not_understood_names_file_and_key(tmp_path, section, key, value, message):
    mapping = published("phase1")
    mapping[section] = mapping[section] | {key: value}
    (tmp_path / "phase.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(ConfigError) as error:
        import_parameters(tmp_path / "phase.yaml", tmp_path / "run.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'phase.yaml'}: ")
    assert message in str(error.value)
    assert not (tmp_path / "run.yaml").exists()


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for phase in ("phase1", "phase2"):
        mapping = published(phase)
        if phase == "phase2":
            mapping["train_input"]["batch_size"] = 100
        (tmp_path / "in" / f"{phase}.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(
        ConfigError, match=r"phase2\.yaml: global_batch_size: expected 2112 as in phase1\.yaml, got 100"
    ):
        import_parameters(tmp_path / "in", tmp_path / "run.yaml")


def test_the_published_tree_is_read_as_it_lies_there(tmp_path):
    """phase1/params.yaml to phase3/params.yaml, with every key that was published: the run as it is packaged."""
    result = import_parameters(write_tree(tmp_path / "params"), tmp_path / "crystal.yaml")
    assert result == {"run": str(tmp_path / "crystal.yaml"), "stages": ["phase1", "phase2", "phase3"]}
    ours, theirs = load_run("crystalcoder-7b").config, load_run(tmp_path / "crystal.yaml").config
    assert (theirs.model, theirs.plan()) == (ours.model, ours.plan())
    for mine, other in zip(ours.curriculum.stages, theirs.curriculum.stages, strict=True):
        assert (mine.steps, mine.lr, list(mine.sources)) == (other.steps, other.lr, list(other.sources))


@pytest.mark.parametrize("phase", PHASES)
def test_a_tree_in_which_a_phase_is_missing_is_refused_by_its_name(tmp_path, phase):
    there = write_tree(tmp_path / "params") / phase
    line = rf"params/{phase}/params\.yaml: expected phase 1 to 3 of a run, this one is not there"
    (there / "params.yaml").unlink()
    with pytest.raises(ConfigError, match=line):
        import_parameters(tmp_path / "params", tmp_path / "run.yaml")
    there.rmdir()
    with pytest.raises(ConfigError, match=line):
        import_parameters(tmp_path / "params", tmp_path / "run.yaml")
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("model", "vocab_size", 32000, "model.vocab_size: expected 32032 as in phase1/params.yaml, got 32000"),
        ("model", "layer_norm_epsilon", 1e-6, "model.norm_eps: expected 1e-05 as in phase1/params.yaml, got 1e-06"),
        ("optimizer", "eps", 1e-8, "optimizer.eps: expected 1e-09 as in phase1/params.yaml, got 1e-08"),
        ("train_input", "batch_size", 99, "global_batch_size: expected 2112 as in phase1/params.yaml, got 99"),
    ],
)
def test_phases_that_contradict_one_another_are_refused_by_file_and_key(tmp_path, section, key, value, line):
    mapping = published("phase2")
    mapping[section][key] = value
    if key == "vocab_size":
        mapping["train_input"][key] = value
    (write_tree(tmp_path / "params") / "phase2" / "params.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(ConfigError) as error:
        import_parameters(tmp_path / "params", tmp_path / "run.yaml")
    assert str(error.value) == f"{tmp_path}/params/phase2/params.yaml: {line}"


def test_a_stage_that_starts_from_a_checkpoint_cannot_be_the_first(tmp_path):
    write_tree(tmp_path / "params")
    with pytest.raises(ConfigError, match=r"runconfig\.is_pretrained_checkpoint: expected none in the first stage"):
        import_parameters(tmp_path / "params" / "phase3" / "params.yaml", tmp_path / "run.yaml")


def test_files_are_stages_in_the_order_of_their_numbers(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / f"stage{number}.yaml").write_text(yaml.safe_dump(published("phase2")))
    (tmp_path / "stage3.yml").write_text(yaml.safe_dump(published("phase2")))
    run = run_of(files_of(tmp_path), "run")
    assert [stage["name"] for stage in run["curriculum"]["stages"]] == ["stage1", "stage2", "stage3", "stage10"]


def test_logits_that_no_key_scales_are_not_scaled(tmp_path):
    """Model Zoo multiplies by output_logits_scale where it is there, whatever the learning rates are divided by."""
    mapping = published("phase1")
    del mapping["model"]["output_logits_scale"]
    (tmp_path / "phase.yaml").write_text(yaml.safe_dump(mapping))
    run = as_run(run_of([tmp_path / "phase.yaml"], "run"))
    assert run.config.plan().logits_multiplier == pytest.approx(1.0)


def test_under_mup_a_trainer_takes_1_over_d_by_itself(tmp_path):
    (mapping,) = stage_files(as_run(MUP_RUN), "2.10").values()
    del mapping["trainer"]["init"]["model"]["scale_qk_dot_by_d"]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(mapping))
    assert run_of([tmp_path / "a.yaml"], "run")["model"]["mup"]["attention_scale"] == "1/d"


MUP_RUN = {
    "name": "mup",
    "model": {
        "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "vocab_size": 99, "max_seq_len": 64,
        "norm": "layernorm", "rotary_style": "interleaved", "tie_embeddings": True,
        "mup": {"parametrization": "crystalcoder", "base_d_model": 16, "init_truncate": 2.0},
    },
    "optimizer": {"name": "adamw_cerebras"},
    "curriculum": {
        "name": "mup", "seq_len": 64, "global_batch_size": 2, "lr_counts_from": 0,
        "stages": [{"name": "a", "steps": 9, "lr": [{"from": 0.1, "to": 0.0, "steps": 9}], "sources": {"x": 1.0}}],
    },
    "data": {"corpus": "corpus.yaml", "tokenizer": {"path": "tokenizer.json"}},
}  # fmt: skip
