"""Every mistake that pydantic can find in any of our configs is told in our words, none of pydantic's."""

import importlib
import itertools
import json
import pkgutil
import re

import pydantic
import pytest

import crystal
from crystal.backends.config import ClusterConfig, OptimizerConfig
from crystal.config import Strict, parse
from crystal.curriculum.config import CurriculumConfig, StageConfig
from crystal.data.corpus.build import Recipe
from crystal.data.prepare import DataConfig, TrainTokenizer
from crystal.errors import ConfigError
from crystal.output.config_messages import _Place, _sentence, explain
from crystal.run import RunConfig

WRONG = (
    None, True, -1, 0, 0.5, 2.5, 10**30, float("nan"), float("inf"), "", "no such word", "\ud800", [], [1], [None] * 3,
    ["x"], {}, {"x": 1}, {"not a key!": None}, {"name": "nobody"}, {"name": 3},
)  # fmt: skip
OURS = re.compile(r"expected |unknown key|[\w.]+: expected |'\w+' has no meaning")
PROSE = re.compile(r"[Ii]nput|should|\bvalid\b|[Ff]ield|[Ee]xtra|permitted|required|instance|dictionary|\btype\b")


def config_classes() -> list[type[pydantic.BaseModel]]:
    """All pydantic models of the package."""
    for module in pkgutil.walk_packages(crystal.__path__, "crystal."):
        if not module.name.startswith("crystal.backends.cerebras."):  # runs where Cerebras' software is
            importlib.import_module(module.name)

    def below(cls: type) -> list[type]:
        return [c for sub in cls.__subclasses__() for c in (sub, *below(sub))]

    return [c for c in below(pydantic.BaseModel) if c.__module__.startswith("crystal.") and c is not Strict]


def places(schema: dict, root: dict, depth: int = 0) -> list[tuple]:
    """Key paths of a JSON schema, into sections, lists, mappings and every branch of a union."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    inside = [((key,), s) for key, s in schema.get("properties", {}).items()]
    inside += [((0,), s) for s in (*schema.get("prefixItems", ()), *([schema["items"]] if "items" in schema else ()))]
    if isinstance(schema.get("additionalProperties"), dict):
        inside.append((("some",), schema["additionalProperties"]))
    branches = schema.get("anyOf", schema.get("oneOf", ()))
    found = [path for branch in branches for path in places(branch, root, depth)]
    if depth < 5:
        found += [(*key, *rest) for key, s in inside for rest in ((), *places(s, root, depth + 1))]
    return list(dict.fromkeys(found))


def at(path: tuple, value: object, tag: str | None) -> object:
    """A mapping that holds `value` at `path` and nothing else; tag: the name of every section of several kinds."""
    if not path:
        return value
    below = at(path[1:], value, tag)
    if path[0] == 0:
        return [below]
    return {"name": tag, path[0]: below} if tag and path[0] != "name" else {path[0]: below}


def test_no_mistake_in_any_config_is_told_in_pydantics_words():
    kinds, lines = set(), set()
    for cls in config_classes():
        root = cls.model_json_schema()
        tags = (None, "cuda", "weight_streaming", "cerebras") if "backend" in root.get("properties", {}) else (None,)
        for path in [(), *places(root, root)]:
            for value, tag in itertools.product(WRONG, tags if path[:1] == ("backend",) else (None,)):
                mapping = at(path, value, tag)
                try:
                    cls.model_validate_json(json.dumps(mapping))
                except pydantic.ValidationError as problem:
                    lines.add(explain(cls, mapping, problem)[1])
                    for error in problem.errors():
                        kinds.add(error["type"])
                        lines.add(_sentence(_Place(root, mapping, error), error))
    foreign = [x for x in lines if not OURS.match(x) or PROSE.search(re.sub(r"got .*|\(known: .*", "", x))]
    assert not foreign
    assert len(lines) > 500
    assert {"missing", "extra_forbidden", "int_type", "greater_than", "literal_error", "union_tag_invalid"} <= kinds
    assert {"string_pattern_mismatch", "too_short", "finite_number", "json_invalid", "model_type"} <= kinds


STAGE = {"name": "a", "steps": 1, "sources": {"a": 1}, "lr": 1}
CURRICULUM = {"seq_len": 1, "global_batch_size": 1, "stages": [STAGE]}
MODEL = {"d_model": 32, "n_layers": 1, "n_heads": 1, "d_ff": 1, "vocab_size": 1}
DATA = {"corpus": "a", "tokenizer": {"path": "a"}}
WHOLE = {
    RunConfig: {"name": "a", "model": MODEL, "curriculum": CURRICULUM, "data": DATA},
    CurriculumConfig: CURRICULUM,
    StageConfig: STAGE,
    DataConfig: DATA,
}


@pytest.mark.parametrize(
    ("section", "mapping", "message"),
    [
        (RunConfig, {"backend": {"name": "tpu"}}, "backend.name: expected 'cpu', 'cuda', 'weight_streaming' or 'cereb"),
        (RunConfig, {"backend": {"threads": 0}}, "backend.threads: expected a whole number greater than 0 or null, g"),
        (RunConfig, {"backend": {"name": "cuda", "parallel": {"dp": "x"}}}, "backend.parallel.dp: expected a whole n"),
        (CurriculumConfig, {"name": "x", "seq_len": 0}, "seq_len: expected a whole number of at least 1, got 0"),
        (CurriculumConfig, {"bind": {"a": 1}}, "bind.a: expected text or a mapping of keys, each with a number great"),
        (CurriculumConfig, {"bind": {"a": {"b": "c"}}}, 'bind.a.b: expected a number greater than 0, got "c"'),
        (StageConfig, {"sources": {"a": -1}}, "sources.a: expected a mapping of keys or a number of at least 0"),
        (StageConfig, {"lr": -1}, "lr: expected a list, each a mapping of keys or a number of at least 0, got -1"),
        (StageConfig, {"lr": "fast"}, "lr: expected a number, or a list of pieces such as {from: 0, to: 0.01, steps:"),
        (StageConfig, {"lr": [{"from": 1, "to": "x"}]}, 'lr.0.to: expected a number of at least 0, got "x"'),
        (Recipe, {"name": "a", "sources": {"b c": {}}}, "sources: expected a name of letters, digits, '.', '_' and '"),
        (Recipe, {"name": "a", "sources": {"b": {"entires": 1}}}, "sources.b.entires: unknown key; did you mean 'ent"),
        (TrainTokenizer, {"vocab_size": 1 << 30}, "vocab_size: expected a whole number from 300 to 1,048,576, got 10"),
        (ClusterConfig, {"micro_batch_size": 0, "mgmt_address": "a"}, "micro_batch_size: expected 'auto', 'explore'"),
        (OptimizerConfig, {"betas": [0.9, float("inf")]}, "betas.1: expected a finite number, got Infinity"),
        (DataConfig, {"corpus": "\ud800"}, "expected text that UTF-8 can hold"),
    ],
)
def test_a_mistake_names_its_key_and_says_all_that_is_expected(section, mapping, message):
    with pytest.raises(ConfigError) as error:
        parse(section, WHOLE.get(section, {}) | mapping, "f.yaml")
    assert str(error.value).startswith(f"f.yaml: {message}")
