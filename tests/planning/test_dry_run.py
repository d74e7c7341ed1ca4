"""`crystal train --dry-run` says what will happen, fetches nothing, makes nothing."""

import pytest
import yaml

from crystal.backends.config import CudaConfig, Layout
from crystal.cli.train import dry_run_text
from crystal.data.corpus import packages
from crystal.errors import ConfigError
from crystal.planning import describe
from crystal.planning.cost import run_bytes
from crystal.planning.report import plan_run
from crystal.planning.shards import held
from crystal.run import load_run
from crystal.zoo.build import parameter_count
from crystal.zoo.config import model_config


@pytest.fixture
def dry_run(make_run, monkeypatch, tmp_path):
    """dry_run(*overrides, stage=None, until=None, **changes) → the result; a fetch would fail the test."""
    monkeypatch.setattr(packages, "_fetch_all", lambda *words: pytest.fail("fetched a package"))

    def run(*overrides, stage=None, until=None, **changes):
        path = make_run(**changes)
        before = sorted(tmp_path.rglob("*"))
        result = describe.dry_run(load_run(path, overrides), stage, until)
        assert sorted(tmp_path.rglob("*")) == before
        return result | {"text": dry_run_text(result)}

    return run


def test_it_tells_the_cadence_that_the_run_has(dry_run):
    assert [s["checkpoint_every"] for s in dry_run()["stages"]] == [4, 4, 4]
    own = dry_run(**{"train.checkpoint_every": 7, "train.keep_checkpoints": 2})
    assert [(s["checkpoint_every"], s["checkpoints"]) for s in own["stages"]] == [(7, 2), (7, 2), (7, 2)]
    assert "checkpoint every 7 steps" in own["text"]
    assert "checkpoints: the newest 2 and those at the ends of stages are kept" in own["text"]


def test_it_tells_where_the_command_stops(dry_run):
    assert dry_run()["stop"] == dry_run(until=30)["stop"] == 30
    assert "stops after" not in dry_run()["text"]
    assert "this command stops after step 10" in dry_run(stage=1)["text"]
    assert [dry_run(stage=s, until=u)["stop"] for s, u in ((2, None), (2, 15), (None, 3))] == [22, 15, 3]
    with pytest.raises(ConfigError, match="--stage: expected 1 to 3, got 4"):
        dry_run(stage=4)


def test_it_tells_the_vocabulary_and_refuses_one_that_will_not_fit(dry_run):
    assert dry_run(**{"model.vocab_size": "auto"})["vocab_size"] == 352
    assert "(352 with added tokens and padding)" in dry_run()["text"]
    with pytest.raises(ConfigError, match=r"run\.yaml: model\.vocab_size: expected 352, .* got 320; auto takes it"):
        dry_run(**{"model.vocab_size": 320})
    missing = {"data.tokenizer": {"path": "none.model"}}
    assert "run.yaml: data.tokenizer.path: none.model does not exist" in dry_run(**missing)["notes"][-1]
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size: auto needs the tokenizer's file, and none\.model does not"
    ):
        dry_run(**missing | {"model.vocab_size": "auto"})


def test_it_tells_of_a_corpus_that_does_not_exist_and_of_one_to_fetch(dry_run, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml: data\.corpus: mien\.yaml: no such file"):
        dry_run(**{"data.corpus": "mien.yaml"})
    entries = {
        "english": [{"files": "nowhere/*.jsonl", "license": "MIT"}, {"files": "gone", "license": "MIT"}],
        "python": [{"package": "pypi:nothing==1", "include": "x", "license": "MIT"}],
        "html": [{"files": "nowhere/*.jsonl", "license": "MIT"}],
        "idle": [{"package": "pypi:idle==1", "include": "x", "license": "MIT"}],
    }
    recipe = {"name": "c", "sources": {name: {"entries": held} for name, held in entries.items()}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    notes = dry_run(**{"data.corpus": str(tmp_path / "c.yaml"), "curriculum.bind": {"englsh": "python"}})["notes"]
    assert "packages to fetch for the corpus c: 1 (pypi:nothing==1)" in notes
    assert f"{tmp_path}/nowhere/*.jsonl: matches no file (source english, html)" in notes
    assert f"{tmp_path}/gone: does not exist (source english)" in notes
    assert "no stage draws from idle of the corpus c" in notes
    assert f"{tmp_path}/run.yaml: curriculum.bind.englsh: matches no source of any stage" in notes


def test_a_source_that_is_bound_nowhere_is_refused(dry_run):
    message = r"curriculum\.stages\.0\.sources\.pyhton: expected a source of the corpus .*did you mean 'python'"
    with pytest.raises(ConfigError, match=message):
        dry_run("curriculum.stages.0.sources={english: 0.5, pyhton: 0.5}")


def test_it_tells_that_a_run_goes_on(dry_run, make_run, train):
    train(make_run(), until=2)
    assert any(note.startswith("goes on from step 2") for note in dry_run()["notes"])


def test_the_time_at_a_matmuls_rate_has_its_old_name_beside_the_right_one(dry_run):
    found = dry_run()
    assert found["seconds_at_matmul_rate"] == found["seconds_atmatmul_rate"] > 0


def test_a_layout_of_gpus_is_told_from_the_planner_and_not_from_this_cpu():
    words = ["backend.name=cuda", "backend.parallel.fsdp=8", "train.micro_batch_size=2"]
    result = describe.dry_run(load_run("amber-7b", words))
    planned = plan_run(load_run("amber-7b", words), 8, "a100-80gb")["own"]
    assert result["layout"] == planned | {"device": "a100-80gb", "devices": 8}
    assert result["memory_bytes"] == planned["memory_bytes"]
    text = dry_run_text(result)
    assert f"fsdp 8 on 8 x a100-80gb: {planned['memory_bytes'] / 1e9:.3g} GB" in text
    assert "GFLOP/s" not in text


@pytest.mark.parametrize("word", ["backend.dtype=fp32", "backend.device=cpu"])
def test_what_the_planner_does_not_know_is_said(word):
    result = describe.dry_run(load_run("amber-7b", ["backend.name=cuda", "backend.parallel.fsdp=8", word]))
    assert result["layout"] is None
    assert "memory is that of all 8 processes together; time is this machine's" in result["notes"]


@pytest.mark.parametrize("words", ["dp=2", "fsdp=2", "tp=2", "pp=2", "pp=2 tp=2 dp=2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_memory_of_all_processes_counts_what_several_hold(words, tied):
    """Replicas, norms under tensor parallelism, a tied embedding at both ends of a pipeline."""
    layout = Layout(**{name: int(n) for name, n in (word.split("=") for word in [*words.split(), "interleave=1"])})
    backend = CudaConfig(name="cuda", device="cpu", dtype="fp32", parallel=layout)
    model = model_config("crystalcoder-w64-l2").model_copy(update={"tie_embeddings": tied, "d_ff": 172})
    together = sum(held(model, layout, process).whole for process in range(layout.pp)) * layout.tp * layout.dp
    assert run_bytes(model, backend) == {"memory": 16 * together, "disk": 0}
    assert run_bytes(model, backend)["memory"] > 16 * parameter_count(model) or words == "fsdp=2" or (
        words == "pp=2" and not tied
    )


def test_what_training_would_refuse_of_a_backend_is_refused_on_paper():
    with pytest.raises(ConfigError, match=r"backend\.device=cuda: weight_streaming computes on the cpu"):
        load_run("amber-7b", ["backend.name=weight_streaming", "backend.device=cuda"])
    on_csx = describe.dry_run(load_run("amber-7b", ["backend.name=cerebras", "backend.device=csx"]))
    assert any("backend.cluster: training on csx needs a system's mgmt_address" in note for note in on_csx["notes"])
