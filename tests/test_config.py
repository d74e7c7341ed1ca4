"""Configs: inheritance, overrides, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crystal.config import Strict, find, load_yaml, override, parse
from crystal.errors import ConfigError
from crystal.run import load_run


class Optim(Strict):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class Stage(Strict):
    name: str
    steps: int


class Root(Strict):
    optim: Optim = Optim()
    stages: tuple[Stage, ...] = ()
    out: Path | None = None


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_children_change_what_they_name_and_keep_the_rest(tmp_path):
    write(tmp_path, "a.yaml", "optim: {lr: 1, betas: [0.8, 0.9]}\nout: x\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\noptim: {lr: 2}\n")
    config = load_yaml(write(tmp_path, "c.yaml", "extends: [b.yaml]\nstages: [{name: s, steps: 3}]\n"))
    root = parse(Root, config.mapping, config)
    assert (root.optim.lr, root.optim.betas, root.out) == (2.0, (0.8, 0.9), Path("x"))
    assert root.stages == (Stage(name="s", steps=3),)


def test_packaged_files_are_found_with_or_without_folder_and_ending(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find("demo", "runs") == find("configs/runs/demo.yaml") == find("runs/demo.yaml") == find("demo")


def test_of_several_parents_the_later_wins_and_the_child_over_all(tmp_path):
    write(tmp_path, "root.yaml", "optim: {lr: 1}\nout: root\n")
    write(tmp_path, "one.yaml", "extends: root.yaml\noptim: {lr: 2, betas: [0.1, 0.2]}\n")
    (tmp_path / "folder").mkdir()
    write(tmp_path, "folder/two.yaml", "optim: {lr: 3}\nout: two\n")
    config = load_yaml(write(tmp_path, "x.yaml", "extends: [one.yaml, folder/two.yaml]\nout: x\n"))
    root = parse(Root, config.mapping, config)
    assert (root.optim.lr, root.optim.betas, root.out) == (3.0, (0.1, 0.2), Path("x"))
    assert "extends" not in config.mapping
    names = {key: Path(config.where(key)).name for key in (("optim", "lr"), ("optim", "betas", 0), ("out",))}
    assert names == {("optim", "lr"): "two.yaml", ("optim", "betas", 0): "one.yaml", ("out",): "x.yaml"}


def test_a_list_replaces_the_parents_list_and_its_mistakes_are_the_childs(tmp_path):
    write(tmp_path, "p.yaml", "stages: [{name: a, steps: 1, stpes: 2}, {name: b, steps: 2}]\n")
    config = load_yaml(write(tmp_path, "c.yaml", "extends: p.yaml\nstages: [{name: c, setps: 3}]\n"))
    assert config.mapping["stages"] == [{"name": "c", "setps": 3}]
    with pytest.raises(ConfigError, match=r"c\.yaml: stages\.0\.setps: unknown key; did you mean 'steps'"):
        parse(Root, config.mapping, config)


def test_a_run_extends_packaged_files_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_run(write(tmp_path, "mine.yaml", "extends: runs/demo\nname: mine\nmodel: {d_model: 64}\n"))
    assert (run.config.name, run.config.model.d_model) == ("mine", 64)
    assert run.config.curriculum == load_run("demo").config.curriculum


def test_a_circle_of_extends_is_named(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: extends: .*circle"):
        load_yaml(write(tmp_path, "b.yaml", "extends: a.yaml\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1", r"x\.yaml:\d+: expected YAML"),
        ("- 1\n- 2\n", r"x\.yaml: expected a mapping of keys, got \[1, 2\]"),
        ("optim: {lr: 1}\noptim: {lr: 2}\n", r"x\.yaml:2: expected YAML, key 'optim' given twice"),
        ("extends: nowhere.yaml\n", r"x\.yaml: extends: nowhere\.yaml: no such file"),
        ("extends: 3\n", r"x\.yaml: extends: expected the name of a file, or a list of names, got 3"),
        ("extends: {a: b}\n", r"x\.yaml: extends: expected the name of a file"),
        ("extends: [a, 3]\n", r"x\.yaml: extends: expected the name of a file"),
        ("out: 3\n[a, b]: 3\n", r"x\.yaml:2: expected YAML, a key that is one word"),
        ("out: &a {b: *a}\n", r"x\.yaml:1: expected YAML, an anchor used inside itself"),
        ("out: &a [*a]\n", r"x\.yaml:1: expected YAML, an anchor used inside itself"),
        ("out: *a\n", r"x\.yaml:1: expected YAML, found undefined alias"),
        ("out: !!python/name:os.system\n", r"x\.yaml:1: expected YAML, could not determine a constructor"),
        ("a: 1\nout: \0\n", r"x\.yaml:2: expected YAML, special characters are not allowed"),
        ("a: 1\nout: !!int x\n", r"x\.yaml:2: expected YAML, a whole number, found x"),
        ("out: !!bool x\n", r"x\.yaml:1: expected YAML, a value that is not what it says"),
        ("out: 0x_\n", r"x\.yaml:1: expected YAML, a whole number, found 0x_"),
        ("out: 010\n", r"x\.yaml:1: expected YAML, a whole number without leading zeros and colons .*, found 010"),
        ("out: 1:30\n", r"x\.yaml:1: expected YAML, a whole number without leading zeros and colons .*, found 1:30"),
        ("out: 1e-400\n", r"x\.yaml:1: expected YAML, a number that a double can hold, found 1e-400"),
        ("out: !!null x\n", r"x\.yaml:1: expected YAML, null, found x"),
        ("out: !!set {a}\n", r"x\.yaml:1: expected YAML, could not determine a constructor for the tag"),
        ('out: "a\\0b"\n', r"x\.yaml:1: expected YAML, text without NUL"),
        ('out: "\\ud800"\n', r"x\.yaml:1: expected YAML, text without NUL and halves of surrogate pairs"),
        ("a: 1\n'': 2\n", r"x\.yaml:2: expected YAML, a key that is one word"),
        ("? " + "k" * 300 + "\n: 1\n", r"x\.yaml:1: expected YAML, a key of at most 256 characters, found kkk"),
        ("out: " + "[" * 3000, r"x\.yaml:1: expected YAML, nested too deeply, at most 32 levels"),
        ("out: " + "9" * 5000, r"x\.yaml:1: expected YAML, a whole number of at most 100 digits, found 999"),
        ("#" * (1 << 20), r"x\.yaml: expected at most 524,288 bytes"),
        ("out: [" + "1, " * 30000 + "1]", r"x\.yaml:1: expected YAML, at most 20,000 keys and values"),
        ("", r"x\.yaml: expected a mapping of keys, got nothing"),
    ],
)
def test_bad_files_name_themselves(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_yaml(write(tmp_path, "x.yaml", text))
    assert "\n" not in str(error.value)


def test_files_that_are_no_text_and_names_that_are_no_file_get_one_line(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    for name in (tmp_path / "x.yaml", tmp_path, "", "/", "..", "n" * 300):
        with pytest.raises(ConfigError, match=r"read: expected UTF-8|it is a directory|no such file|too long"):
            load_yaml(name)


@given(st.text(st.sampled_from("ab:{}[]&*?-! \n'\"#|>,1.e~<"), max_size=30))
def test_any_text_is_a_mapping_or_one_line(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp(), "any.yaml", text)
    try:
        assert isinstance(load_yaml(path).mapping, dict)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either is right


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"optim": {"lrr": 1}}, "f.yaml: optim.lrr: unknown key; did you mean 'lr'?"),
        ({"optmi": {}}, "f.yaml: optmi: unknown key; did you mean 'optim'?"),
        ({"optim": {"lr": "fast"}}, 'f.yaml: optim.lr: expected a number, got "fast"'),
        ({"optim": {"lr": True}}, "f.yaml: optim.lr: expected a number, got true"),
        ({"stages": [{"name": "a", "steps": 2.5}]}, "f.yaml: stages.0.steps: expected a whole number, got 2.5"),
        ({"stages": [{"name": "a"}]}, "f.yaml: stages.0.steps: expected a value, none given"),
        ({"optim": {"lr": float("nan")}}, "f.yaml: optim.lr: expected a finite number, got NaN"),
        ({"optim": {"betas": [0.9, float("inf")]}}, "f.yaml: optim.betas.1: expected a finite number, got Infinity"),
        ({"optim": None}, "f.yaml: optim: expected a mapping of keys, got null"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_what_was_expected(mapping, message):
    with pytest.raises(ConfigError) as error:
        parse(Root, mapping, "f.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_file_that_is_named_is_the_one_that_holds_the_key(tmp_path):
    write(tmp_path, "parent.yaml", "optim: {lrr: 1}\n")
    config = load_yaml(write(tmp_path, "child.yaml", "extends: parent.yaml\noptim: {lr: 2}\n"))
    with pytest.raises(ConfigError, match=r"parent\.yaml: optim\.lrr"):
        parse(Root, config.mapping, config)
    config = override(config, ["optim.lr=x"])
    config.mapping["optim"].pop("lrr")
    with pytest.raises(ConfigError, match=r"^command line: optim\.lr=x: expected a number, got \"x\""):
        parse(Root, config.mapping, config)


OWN = """
extends: [crystalcoder-w64-l2, run.base.yaml]
name: own
curriculum:
  {seq_len: 32, global_batch_size: 12, stages: [{name: one, steps: 10, lr: 0.01, sources: {english: 1}}]}
"""
BASE = "data: {corpus: corpus.yaml, tokenizer: {train: {vocab_size: 300}}}\n"


@pytest.fixture
def own(tmp_path):
    """A run file that says as little as it can, in a folder of its own; its corpus lies beside it."""
    write(tmp_path, "corpus.yaml", "name: c\nsources: {english: {entries: [{files: nowhere, license: MIT}]}}\n")
    write(tmp_path, "run.base.yaml", BASE)
    return write(tmp_path, "run.yaml", OWN)


def test_a_run_extends_a_rung_of_a_ladder_and_fills_in_what_it_does_not_say(own, monkeypatch):
    monkeypatch.chdir("/")
    config = load_run(own).config
    assert (config.model.d_model, config.model.n_layers, config.model.mup.base_d_model) == (64, 2, 256)
    assert load_run(own, ["model.vocab_size=auto"]).config.model.vocab_size == 352, "300 + 22, a multiple of 32"
    assert config.optimizer.eps == 1e-9
    assert config.data.corpus == str(own.parent / "corpus.yaml")
    assert config.train.micro_batch_size == 12
    long = load_run(own, ["curriculum.seq_len=2048", "train.micro_batch_size=auto"]).config
    assert long.train.micro_batch_size == 4, "8,192 tokens, and a divisor of 12"
    parallel = ["backend.name=cuda", "backend.parallel={fsdp: 2, pp: 2}", "model.n_layers=4"]
    assert load_run(own, parallel).config.train.micro_batch_size == 3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("model.d_model=0",), "command line: model.d_model=0: expected a whole number greater than 0, got 0"),
        (("model.d_model=65",), "command line: model.d_model=65: model.n_heads: expected a divisor of d_model 65, go"),
        (("model.d_model=100",), "command line: model.d_model=100: model.rotary_fraction: expected an even number"),
        (("model.max_seq_len=16",), "command line: model.max_seq_len=16: curriculum.seq_len: expected at most model."),
        (("curriculum.global_batch_size=7", "train.micro_batch_size=4"), "command line: train.micro_batch_size=4: ex"),
        (("curriculum.stages.one.lr=x",), "command line: curriculum.stages.one.lr=x: curriculum.stages.0.lr: expecte"),
        (("curriculum.stages.0={name: one, lr: [{to: x}]}",), "command line: curriculum.stages.0={name: one, lr: [{t"),
        (("curriculum.seq_len=4096",), "command line: curriculum.seq_len=4096: expected at most model.max_seq_len 20"),
        (("backend={name: cuda, parallel: {tp: 3}}",), "command line: backend={name: cuda, parallel: {tp: 3}}: backe"),
        (("data.tokenizer={path: none.json}", "model.vocab_size=auto"), "command line: model.vocab_size=auto: auto n"),
    ],
)
def test_an_override_is_named_as_the_override(own, overrides, line):
    with pytest.raises(ConfigError) as error:
        load_run(own, overrides)
    assert str(error.value).startswith(line)


def test_what_a_packaged_file_brings_in_is_the_fault_of_the_users_file(own):
    from crystal.run import check_vocabulary

    with pytest.raises(ConfigError, match=rf"^{own}: model\.vocab_size: expected 352, .* 300, got 32032; auto takes"):
        check_vocabulary(load_run(own))
    check_vocabulary(load_run(own, ["model.vocab_size=auto"]))
    write(own.parent, "run.base.yaml", BASE + "curriculum: {seq_len: 4096}\n")
    own.write_text(OWN.replace("seq_len: 32, ", ""))
    with pytest.raises(ConfigError, match=r"run\.base\.yaml: curriculum\.seq_len: expected at most .* 2048, got 4096"):
        load_run(own)
    own.write_text("extends: crystalcoder-7b\nname: own\n")
    with pytest.raises(ConfigError, match=rf"^{own}: curriculum: expected a value, none given"):
        load_run(own)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("crystalcoder", "run.yaml: data.corpus: expected a value, none given"),  # the curriculum, no corpus
        ("crystalcoder-w65", "width 65: expected a multiple of the head size 32"),
        ("crystlacoder-7b", "no such file; did you mean 'crystalcoder-7b'"),
        ("a100-80bg", "no such file$"),
        ("transfer-mpu", "no such file$"),
        ("sampel", "no such file$"),
    ],
)
def test_what_a_run_extends_is_sought_and_suggested_among_what_a_run_is_made_of(own, parent, message):
    own.write_text(f"extends: [{parent}]\n")
    with pytest.raises(ConfigError, match=message):
        load_run(own)


@pytest.mark.parametrize(("kind", "name"), [("runs", "crystalcoder-proxi"), ("corpora", "demmo"), ("sweeps", "smaple")])
def test_a_suggestion_is_of_the_kind_that_is_expected(kind, name):
    with pytest.raises(ConfigError) as error:
        find(name, kind)
    suggested = str(error.value).partition("did you mean '")[2].strip("'?")
    assert not suggested or find(suggested, kind).parent.name == kind


def test_overrides_reach_into_lists_by_place_and_by_name(tmp_path):
    config = load_yaml(write(tmp_path, "x.yaml", "stages: [{name: one, steps: 1}, {name: two, steps: 2}]\n"))
    root = override(config, ["stages.0.steps=7", "stages.two.steps=8", "optim.lr=1e-5", "out=null"])
    assert [s.steps for s in parse(Root, root.mapping, root).stages] == [7, 8]
    assert parse(Root, root.mapping, root).optim.lr == 1e-5
    for word in ("three", "2", "-1", "\u00b2"):
        with pytest.raises(ConfigError, match=f"expected one of one, two at '{word}'"):
            override(config, [f"stages.{word}.steps=1"])
    assert config.mapping["stages"][0]["steps"] == 1, "the config that was read stays as it was"


@pytest.mark.parametrize("word", ["optim.lr", "=3", "a=[1", "a..b=1", ".a=1", "a.=1", "a=&x [*x]"])
def test_words_that_are_no_override_are_refused(tmp_path, word):
    with pytest.raises(ConfigError, match=r"expected (dotted\.key=value|a YAML value)"):
        override(load_yaml(write(tmp_path, "x.yaml", "out: a\n")), [word])


def test_numbers_in_exponent_form_are_numbers(tmp_path):
    mapping = load_yaml(write(tmp_path, "x.yaml", "a: 1e-5\nb: 2E3\nc: .5e1\nd: 1_000\ne: e5\n")).mapping
    assert mapping == {"a": 1e-5, "b": 2000.0, "c": 5.0, "d": 1000, "e": "e5"}


def test_a_date_is_text(tmp_path):
    assert load_yaml(write(tmp_path, "x.yaml", "out: 2024-01-01\n")).mapping == {"out": "2024-01-01"}


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ("model.d_modle=64", "model.d_modle", "did you mean 'd_model'"),
        ("model.d_model=wide", "model.d_model", "a whole number greater than 0, got"),
        ("model.n_heads=3", "model.n_heads=3: ", "expected a divisor of d_model"),
        ("model.rotary_fraction=0.1", "model.rotary_fraction=0.1: ", "expected an even number of rotary dimensions"),
        ("curriculum.stages.stage2.sources={StarCoder_fim_shuffled: 0.9}", "curriculum.stages", "sum to 1"),
        ("curriculum.stages.stage1.lr=[{from: 0, to: 1, steps: 99999}]", "curriculum.stages.0.lr", "warm-up within"),
        ("curriculum.stages.0.lr=[{frm: 0, to: 1, steps: 9}]", "curriculum.stages.0.lr.0.frm", "'from'"),
        ("curriculum.stages.1.name=stage1", "curriculum.stages.1.name=stage1: ", "expected a name of its own"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "expected"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: ", "expected a number of at least 0 and less than 1, got 1"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay=.inf: ", "expected a finite number"),
        ("backend.name=tpu", "backend.name", "'cpu'"),
        ("trian.seed=1", "trian", "did you mean 'train'"),
    ],
)
def test_a_runs_mistakes_name_the_command_line(change, key, expected):
    from crystal.curriculum.resolve import resolve

    def read() -> None:
        run = load_run("demo", [change])
        resolve(run.config.curriculum, run.source)

    with pytest.raises(ConfigError) as error:
        read()
    line = str(error.value)
    assert line.startswith("command line: ")
    assert key in line
    assert expected in line
    assert "\n" not in line


def test_every_packaged_file_is_yaml_that_loads():
    root = Path(__file__).parents[1] / "configs"
    files = sorted(root.glob("*/*.yaml"))
    assert len(files) >= 8
    for file in files:
        assert yaml.safe_load(file.read_text())
    for run in sorted((root / "runs").glob("*.yaml")):
        load_run(run)


def test_a_key_is_the_text_that_is_written(tmp_path):
    mapping = load_yaml(write(tmp_path, "x.yaml", "no: 1\n1: 2\n0x1: 3\n~: 4\n2024-01-01: 5\n")).mapping
    assert mapping == {"no": 1, "1": 2, "0x1": 3, "~": 4, "2024-01-01": 5}


def test_mappings_merge_by_yaml_s_own_word_and_own_keys_win(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, {z: 4}], x: 5}\n"
    mapping = load_yaml(write(tmp_path, "x.yaml", text)).mapping
    assert mapping["b"] == {"x": 1, "y": 3}
    assert mapping["c"] == {"x": 5, "y": 3, "z": 4}


@pytest.mark.parametrize("levels", [3, 9, 60])
def test_aliases_count_as_often_as_they_stand_for_something(tmp_path, levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(8 * [f'*a{i - 1}'])}]" for i in range(1, levels)]
    with_keys = [line.replace("[", "{k: [").replace("]", "]}") for line in lines]
    for text in ("\n".join(lines), "\n".join(with_keys)):
        path = write(tmp_path, "x.yaml", text)
        if levels == 3:
            assert load_yaml(path).mapping
        else:
            with pytest.raises(ConfigError, match="at most 20,000 keys and values"):
                load_yaml(path)


def test_a_diamond_is_read_once_a_file_and_means_what_a_tree_would(tmp_path):
    write(tmp_path, "f0.yaml", "deep: {a: 0, list: [1, 2]}\n")
    for i in range(1, 20):
        write(tmp_path, f"f{i}.yaml", f"extends: [f{i - 1}.yaml, ./f{i - 1}.yaml]\ndeep: {{k{i}: {i}}}\n")
    config = load_yaml(tmp_path / "f19.yaml")
    assert config.mapping == {"deep": {"a": 0, "list": [1, 2]} | {f"k{i}": i for i in range(1, 20)}}
    assert Path(config.where(("deep", "k7"))).name == "f7.yaml"
    for i in range(20, 23):
        write(tmp_path, f"f{i}.yaml", f"extends: [f{i - 1}.yaml, f{i - 1}.yaml]\n")
    with pytest.raises(ConfigError, match=r"extends: expected at most 40 files in all"):
        load_yaml(tmp_path / "f22.yaml")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (".".join("a" * 3000) + "=1", "at most 32 parts"),
        ("k" * 300 + "=1", "each of at most 256 characters"),
        ("out=0x_", "expected a YAML value after '=', a whole number, found 0x_"),
        ("out=" + "[" * 40, "nested too deeply"),
        ("out=" + "x" * (1 << 20), "expected at most 256 changes and 524,288 bytes"),
    ],
)
def test_overrides_are_bounded_too(tmp_path, word, expected):
    config = load_yaml(write(tmp_path, "x.yaml", "out: a\n"))
    with pytest.raises(ConfigError, match=expected) as error:
        override(config, [word])
    assert len(str(error.value)) < 500
    with pytest.raises(ConfigError, match="at most 256 changes"):
        override(config, ["out=1"] * 300)


def test_of_overrides_of_the_same_place_the_last_is_the_one_that_set_it(tmp_path):
    config = load_yaml(write(tmp_path, "x.yaml", "a: {b: {c: 1}}\n"))
    changed = override(config, ["a=3", "a.b.d=5", "e.f=1", "e={g: 2}"])
    assert changed.mapping == {"a": {"b": {"d": 5}}, "e": {"g": 2}}
    said = {".".join(loc): origin.removeprefix("command line: ") for loc, origin in changed.origin.items() if loc}
    assert said == {"a": "a=3", "a.b": "a.b.d=5", "a.b.d": "a.b.d=5", "e": "e={g: 2}", "e.g": "e={g: 2}"}


@pytest.mark.parametrize("section", ["model", "train", "data", "curriculum", "backend", "data.tokenizer"])
@pytest.mark.parametrize("value", ["[1]", "[]", "x", "3", "[{vocab_size: auto}]"])
def test_a_section_that_is_no_mapping_is_said_to_be_none(section, value):
    with pytest.raises(ConfigError, match=rf"^command line: {section}=.*: expected a mapping of keys") as error:
        load_run("demo", [f"{section}={value}"])
    assert error.value.key == section


def test_fim_with_a_vocabulary_that_changes_texts_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from crystal import run as runs

    path = write(tmp_path, "v.model", "")
    monkeypatch.setattr(runs, "vocab_size", lambda config: None)
    tokenizer = SimpleNamespace(fim_prefix=1, changes_text="ab")
    monkeypatch.setattr(runs.Tokenizer, "load", lambda path, added_tokens: tokenizer)
    changes = [f"data.tokenizer={{path: {path}}}", "model.vocab_size=352"]
    with pytest.raises(ConfigError, match=r"v\.model: FIM needs a vocabulary that gives texts back") as error:
        runs.check_vocabulary(load_run("demo", changes))
    assert error.value.key == "data.tokenizer.path"


@pytest.mark.parametrize("key", ["run_dir", "data.dir"])
def test_an_empty_path_is_not_the_directory_one_is_in(key):
    with pytest.raises(ConfigError, match='expected a path, got ""') as error:
        load_run("demo", [f"{key}=''"])
    assert error.value.key == key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ((), "curriculum.stages.1.fim.rate"),
        (("curriculum.stages.1.fim.rate=0",), "curriculum.stages.2.fim.rate"),
        (
            ("curriculum.stages.1.fim.rate=0", "curriculum.stages.2.fim.rate=0"),
            "curriculum.stages.2.sources.StarCoder_fim_train_shuffled.fim",
        ),
    ],
)
def test_fim_without_its_tokens_is_refused_when_the_run_is_read(changes, key):
    """Whichever stage needs them: the run would train for days before it gets there."""
    without = ["data.tokenizer.added_tokens=false", "model.vocab_size=auto"]
    with pytest.raises(ConfigError, match="FIM needs CrystalCoder's added tokens") as error:
        load_run("demo", [*without, *changes])
    assert error.value.key == key
    off = [f"curriculum.stages.{i}.fim.rate=0" for i in (1, 2)]
    star = "curriculum.stages.2.sources={StarCoder_x: {weight: 1, fim: 0}}"
    assert load_run("demo", [*without, *off, star]).config.data.tokenizer.added_tokens is False
