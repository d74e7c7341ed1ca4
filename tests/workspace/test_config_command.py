"""`crystal config`: every key of a run with value, origin, type, default and meaning; and the schema of run files."""

import json
from typing import get_args

import pytest
import yaml
from recorded import record_run

from crystal.cli.config import keys_text
from crystal.config import CONFIGS, Strict, load_yaml
from crystal.config.bounded_yaml import yaml_value
from crystal.run import RunConfig, load_run
from crystal.workspace import config_keys as keys


def shown(result):
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)["keys"]


def test_each_key_has_value_origin_type_default_and_meaning(crystal, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: runs/demo\ntrain: {seed: 5}\n")
    got = shown(crystal("config", mine, "--json", "train.eval_rows=8"))
    assert got["train.seed"] == {
        "place": "train.seed", "value": 5, "origin": str(mine), "type": "a whole number", "default": 1,
        "required": False, "description": "of the first weights, the order of the data and FIM",
    }  # fmt: skip
    assert (got["train.eval_rows"]["value"], got["train.eval_rows"]["origin"]) == (8, "command line")
    assert got["train.max_bad_steps"]["origin"] == "default"
    assert got["curriculum.scale"]["origin"] == str(CONFIGS / "runs" / "demo.yaml")
    assert got["model.norm"]["origin"] == str(CONFIGS / "models" / "crystalcoder-7b.yaml")
    assert (got["model.d_model"]["required"], got["model.d_model"]["default"]) == (True, None)
    assert got["backend.name"]["origin"] == "default"


def test_no_key_is_left_out_and_none_made_up():
    run = load_run("demo")

    def leaves(node, loc=()):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        sections = isinstance(node, dict) or (isinstance(node, list) and node and isinstance(node[0], dict))
        if not node or not sections:
            return {".".join(map(str, loc)): node}
        return {key: value for word, item in items for key, value in leaves(item, (*loc, word)).items()}

    assert {k.place: k.value for k in keys.run_keys(run)} == leaves(run.config.model_dump(mode="json", by_alias=True))


@pytest.mark.parametrize("name", ["demo", "crystalcoder-7b-streaming", "amber-7b"])
def test_what_is_shown_can_be_given_as_an_override(name):
    """`key=value` as printed gives the same value again, and then comes from the command line."""
    # a bare weight has no keys below it that an override could reach
    found = [k for k in keys.run_keys(load_run(name)) if ".sources." not in k.key and k.key != "backend.name"]
    for key in found[:: len(found) // 20 + 1]:
        line = keys_text([key]).splitlines()[0].rpartition("  # ")[0]
        assignment = line.replace(": ", "=", 1)
        (again,) = keys.run_keys(load_run(name, [assignment]), key.key)
        assert (again.value, again.origin) == (key.value, "command line"), assignment


def below(annotation):
    """The sections that a value may be, or hold."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [section for part in get_args(annotation) for section in below(part)]


def test_every_key_that_a_run_can_have_is_explained():
    sections = {RunConfig}
    for _ in range(5):
        sections |= {m for s in sections for f in s.model_fields.values() for m in below(f.annotation)}
    assert len(sections) > 15
    for section in sections:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description or below(field.annotation), f"{section.__name__}.{name} says nothing of itself"


def test_short_forms_come_from_the_file_that_has_them(tmp_path):
    mine = tmp_path / "mine.yaml"
    stage = {"name": "one", "steps": 4, "sources": {"english": 1.0}, "lr": 0.01, "checkpoint_every": 4}
    mine.write_text(yaml.safe_dump({"extends": "runs/demo", "curriculum": {"stages": [stage], "bind": {}}}))
    found = {k.key: k for k in keys.run_keys(load_run(mine))}
    for key, value in (("sources.english.weight", 1.0), ("lr.0.from", 0.01), ("lr.0.to", 0.01)):
        key = found[f"curriculum.stages.one.{key}"]
        assert (key.value, key.origin) == (value, str(mine))
    for key in ("sources.english.subset", "lr.0.jump", "tokens", "fim.rate"):
        assert found[f"curriculum.stages.one.{key}"].origin == "default"


def test_a_key_or_a_section_is_shown_alone(crystal):
    assert list(shown(crystal("config", "demo", "train.seed", "--json"))) == ["train.seed"]
    section = shown(crystal("config", "demo", "model.mup", "--json"))
    assert len(section) == 11
    assert all(key.startswith("model.mup.") for key in section)
    by_name = shown(crystal("config", "demo", "curriculum.stages.stage2.fim", "--json"))
    assert by_name == shown(crystal("config", "demo", "curriculum.stages.1.fim", "--json"))
    assert list(by_name) == [f"curriculum.stages.stage2.fim.{key}" for key in ("rate", "spm", "only")]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.d_modle", "; did you mean 'model.d_model'?"),
        ("d_model", "; did you mean 'model.d_model'?"),
        ("modle", "; did you mean 'model'?"),
        ("curriculum.stages.stage4", "; did you mean 'curriculum.stages.stage3'?"),
        ("model.", "; did you mean 'model'?"),
        ("qqqqqq", ""),
    ],
)
def test_an_unknown_key_is_one_line_with_the_nearest(crystal, key, hint):
    assert crystal("config", "demo", key) == (2, "", f"crystal: demo: {key}: unknown key{hint}\n")


def test_two_keys_or_no_run_are_one_line(crystal):
    for words in (("demo", "train", "model"), (), ("nowhere",), ("demo", "train.seed=x")):
        code, out, err = crystal("config", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_run_directory_shows_what_was_recorded(crystal, tmp_path):
    directory = record_run(tmp_path / "demo", "train.seed=9")
    got = shown(crystal("config", directory, "--json"))
    assert got["train.seed"]["value"] == 9
    assert {key["origin"] for key in got.values()} == {str(directory / "config.yaml")}


def test_the_text_says_the_same(crystal):
    code, out, _ = crystal("config", "demo", "curriculum.scale")
    assert (code, out) == (
        0,
        "curriculum.scale: 0.0025  # configs/runs/demo.yaml\n"
        "    [a number greater than 0, default 1.0] factor on the published steps, warm-ups and checkpoint cadences\n",
    )


def test_what_a_run_chooses_by_itself_is_auto_by_default(crystal, tmp_path, schema):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: runs/demo\n")
    for section, name in keys.AUTO:
        key = f"{section}.{name}"
        (got,) = keys.run_keys(load_run(mine, [f"{key}=auto"]), key)
        assert (got.origin, got.default, got.required) == ("command line", "auto", False)
        assert isinstance(got.value, int)
        assert got.type.endswith("or 'auto'")
        assert misfits({section: {name: "auto"}}, schema, schema) == []
        assert misfits({section: {name: 0}}, schema, schema)


def misfits(value, schema, whole):
    """Where a value breaks a JSON schema; of the words that ours use, and no others."""
    known = {
        "$ref", "anyOf", "type", "properties", "additionalProperties", "required", "items", "prefixItems", "enum",
        "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "pattern",
        "title", "description", "default", "$schema", "$defs", "propertyNames", "format",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        return misfits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        tried = [misfits(value, option, whole) for option in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    types = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
        "number": (int, float),
    }  # fmt: skip
    if "type" in schema and (
        not isinstance(value, types[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return [f"{value!r} is no {schema['type']}"]
    found = []
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        found.append(f"{value!r} is none of {schema.get('enum', schema.get('const'))}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high or value <= schema.get("exclusiveMinimum", value - 1):
            found.append(f"{value!r} is out of bounds")
    if isinstance(value, dict):
        keys_known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in keys_known:
                found += misfits(item, keys_known[name], whole)
            elif others is False:
                found.append(f"{name} is unknown")
            elif isinstance(others, dict):
                found += misfits(item, others, whole)
    if isinstance(value, list) and "items" in schema:
        found += [m for item in value for m in misfits(item, schema["items"], whole)]
    return found


@pytest.fixture(scope="module")
def schema():
    return keys.schema()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[rmc]u*/*.yaml")) + sorted(CONFIGS.glob("models/*.yaml")))
def test_every_packaged_file_fits_the_schema(schema, path):
    assert misfits(yaml_value(path.read_text()), schema, schema) == []
    assert misfits(load_yaml(path).mapping, schema, schema) == []


@pytest.mark.parametrize(
    "mistake",
    [
        {"model": {"d_modle": 3}}, {"train": {"seed": "x"}}, {"backend": {"parallel": {"tp": 0}}}, {"extends": 3},
        {"curriculum": {"stages": [{"name": "a"}]}}, {"model": {"norm": "batchnorm"}}, {"modle": {}},
        {"curriculum": {"stages": [{"name": "a", "sources": {"x": "y"}, "lr": 0.1, "checkpoint_every": 1}]}},
    ],
)  # fmt: skip
def test_the_schema_sees_mistakes(schema, mistake):
    assert misfits(mistake, schema, schema)


def test_the_schema_lets_files_leave_out_what_others_say(schema):
    for part in ({"backend": {"dtype": "fp32"}}, {"backend": {"parallel": {"tp": 2}}}, {"model": {}}, {"train": {}}):
        assert misfits(part, schema, schema) == []
    stage = {"name": "a", "steps": 3, "sources": {"x": 1, "y": {"weight": 0.5}}, "lr": 0.1, "checkpoint_every": 1}
    assert misfits({"extends": ["a", "b"], "curriculum": {"stages": [stage]}}, schema, schema) == []


def test_the_schema_needs_no_run_and_explains_the_keys(crystal, schema):
    code, out, err = crystal("config", "--schema")
    assert (code, err, json.loads(out)) == (0, "", schema)
    assert out.count("\n") > 100, "to be read and saved"
    assert crystal("config", "--schema", "--json")[1].count("\n") == 1
    assert schema["$defs"]["TrainConfig"]["properties"]["seed"]["description"].startswith("of the first weights")
