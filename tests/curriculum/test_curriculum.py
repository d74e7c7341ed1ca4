"""Curricula: the published phases to the digit, scaling, binding, and one line for every mistake."""

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crystal.config import load_yaml, parse
from crystal.curriculum.config import CurriculumConfig
from crystal.curriculum.resolve import resolve
from crystal.errors import ConfigError

# weights as published, LLM360/crystalcoder-train pretrain/params/phase{1,2,3}/params.yaml
SLIMPAJAMA = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
PHASE_1 = (
    "0.043251179622600486 0.0413121881861869 0.2665010054745754 0.5334581653397988 "
    "0.04962588209760537 0.03168034115317788 0.03417123812605512"
)
PHASE_2 = (
    "0.016083857723861224 0.015358576352403003 0.09909981505117808 0.1983897689052003 "
    "0.018454606218343703 0.011784941022274698 0.012710859995188247"
)
PHASE_3 = {
    "stage3_fim_0.3/train_shuffled_correct_ratio/css": 0.08792775542527535,
    "stage3_fim_0.3/train_shuffled_correct_ratio/javascript": 0.18370762129027085,
    "stage3_fim_0.3/train_shuffled_correct_ratio/html": 0.18536747298179254,
    "stage3_fim_0.3/train_shuffled_correct_ratio/python": 0.34270089587947816,
    "SlimPajama/ArXiv_train_packed": 0.016663255966286664,
    "SlimPajama/Book_train_packed": 0.00831444671835677,
    "SlimPajama/C4_train_packed": 0.01685693658811707,
    "SlimPajama/CommonCrawl_train_packed": 0.058282893778895735,
    "SlimPajama/StackExchange_train_packed": 0.008379821974060706,
    "SlimPajama/Wikipedia_train_packed": 0.05835852419497722,
    "StarCoder_fim_train_shuffled": 0.0334403752024888,
}
BIND = {
    "SlimPajama/*_part0of2": "english[0.0-0.5]",
    "SlimPajama/*_part1of2": "english[0.5-1.0]",
    "SlimPajama/*": "english",
    "StarCoder*": {"python": 0.5, "javascript": 0.3, "html": 0.1, "css": 0.1},
    "stage3*/python": "python",
    "stage3*/javascript": "javascript",
    "stage3*/html": "html",
    "stage3*/css": "css",
}
STORE = ("english", "python", "javascript", "html", "css")


def curriculum_section(name="crystalcoder", **changes):
    return load_yaml(f"configs/curricula/{name}.yaml").mapping["curriculum"] | changes


def read(section, store=None):
    return resolve(parse(CurriculumConfig, section, "run.yaml", ("curriculum",)), "run.yaml", store)


def small(**stage):
    """A one-stage curriculum; `stage` replaces keys of the stage (None removes)."""
    base = {
        "name": "only",
        "steps": 100,
        "sources": {"english": 0.75, "python": 0.25},
        "lr": [{"from": 0.0, "to": 1.0, "steps": 10}, {"from": 1.0, "to": 0.0, "steps": 90}],
        "checkpoint_every": 10,
    }
    stages = [{k: v for k, v in (base | stage).items() if v is not None}]
    return {"name": "small", "seq_len": 8, "global_batch_size": 4, "stages": stages}


def test_crystalcoder_steps_tokens_cadence():
    crystal = read(curriculum_section())
    assert [(s.steps, s.checkpoint_every) for s in crystal.stages] == [
        (79721, 1500),
        (214387, 1500),
        (27728, 1000),
    ]
    assert [s.tokens for s in crystal.stages] == [344_823_300_096, 927_304_384_512, 119_934_025_728]
    assert crystal.steps == 321_836
    assert crystal.tokens == 321_836 * 4_325_376
    assert [s.first_step for s in crystal.stages] == [0, 79721, 294108]


def test_crystalcoder_weights_to_the_digit():
    one, two, three = (s.weights for s in read(curriculum_section()).stages)
    assert one == {
        f"SlimPajama/{n}_train_packed_part0of2": float(w) for n, w in zip(SLIMPAJAMA, PHASE_1.split(), strict=True)
    }
    assert two == {
        f"SlimPajama/{n}_train_packed_part1of2": float(w) for n, w in zip(SLIMPAJAMA, PHASE_2.split(), strict=True)
    } | {"StarCoder_fim_shuffled": 0.6281175747315507}
    assert three == PHASE_3


def test_crystalcoder_fim_only_on_code_and_what_carries_over():
    one, two, three = read(curriculum_section()).stages
    assert [(s.fim_rate, s.spm_rate) for s in (one, two, three)] == [(0.0, 0.5), (0.9, 0.5), (0.3, 0.5)]
    assert {k for k, r in two.fim_rates.items() if r} == {"StarCoder_fim_shuffled"}
    assert {r for k, r in three.fim_rates.items() if k.startswith("stage3")} == {0.3}
    assert {r for k, r in three.fim_rates.items() if k.startswith("SlimPajama")} == {0.0}
    assert three.fim_rates["StarCoder_fim_train_shuffled"] == 0.9  # rows of phase 2
    assert [s.carry_optimizer for s in (one, two, three)] == [False, True, False]


def test_crystalcoder_stage_3_reads_the_first_tenth_of_slimpajama():
    bound = read(curriculum_section()).stages[2].bound
    assert all(name.endswith("[0.0-0.1]") == (not name.startswith("stage3")) for name in bound)


def test_amber_is_360_chunks():
    amber = read(curriculum_section("amber"))
    (stage,) = amber.stages
    assert stage.steps == 360 * stage.checkpoint_every == 274_320
    assert stage.tokens == 274_320 * 4_587_520
    assert sum(stage.weights.values()) == pytest.approx(1)
    assert stage.weights["RefinedWeb"] == pytest.approx(665.01 / 1259.11)
    assert stage.weights["StackExchange"] == pytest.approx(21.75 / 1259.11)
    assert set(stage.fim_rates.values()) == {0.0}


def test_stage_at_global_steps():
    crystal = read(curriculum_section())
    steps = (0, 79720, 79721, 294107, 294108, 321835, 321836)
    assert [crystal.stage_at(s).index for s in steps] == [0, 0, 1, 1, 2, 2, 2]


@given(st.floats(1e-5, 2))
def test_scale_keeps_proportions(scale):
    whole, scaled = read(curriculum_section()), read(curriculum_section(scale=scale))
    for a, b in zip(whole.stages, scaled.stages, strict=True):
        assert b.steps == max(1, round(a.steps * scale))
        assert b.checkpoint_every == max(1, round(a.checkpoint_every * scale))
        assert (b.weights, b.fim_rates, b.spm_rate) == (a.weights, a.fim_rates, a.spm_rate)
        assert b.lr_at(b.steps) == a.lr_at(a.steps)
        if b.steps > 1:
            warmup = b.schedule.knots[1]
            assert abs(warmup - max(1, a.schedule.knots[1] * b.steps / a.steps)) <= 0.5
            assert b.lr_at(warmup) == a.lr_at(a.schedule.knots[1])
    assert [s.first_step for s in scaled.stages] == [
        0,
        scaled.stages[0].steps,
        scaled.steps - scaled.stages[2].steps,
    ]


def test_a_budget_in_tokens_is_rounded_up_to_steps():
    section = small(steps=None, tokens=3201, lr=0.5)
    (stage,) = read(section).stages
    assert stage.steps == 101
    assert stage.lr_at(1) == stage.lr_at(101) == 0.5


def test_published_sources_bind_to_the_store():
    one, two, three = (s.bound for s in read(curriculum_section(bind=BIND), STORE).stages)
    assert one == {"english[0.0-0.5]": pytest.approx(1)}
    assert two == {
        "english[0.5-1.0]": pytest.approx(1 - 0.6281175747315507),
        "python": pytest.approx(0.6281175747315507 * 0.5),
        "javascript": pytest.approx(0.6281175747315507 * 0.3),
        "html": pytest.approx(0.6281175747315507 * 0.1),
        "css": pytest.approx(0.6281175747315507 * 0.1),
    }
    assert three["english[0.0-0.1]"] == pytest.approx(sum(w for n, w in PHASE_3.items() if n.startswith("Slim")))
    assert three["python[0.0-0.1]"] == pytest.approx(0.0334403752024888 * 0.5)
    assert three["python"] == PHASE_3["stage3_fim_0.3/train_shuffled_correct_ratio/python"]
    assert all(sum(b.values()) == pytest.approx(1) for b in (one, two, three))


def test_fim_rates_of_sources_that_meet_are_averaged():
    section = small(sources={"code/a": 0.3, "code/b": 0.1, "prose": 0.6}, fim={"rate": 0.8, "only": ["code/a"]})
    section["bind"] = {"code/*": "python", "prose": "english"}
    (stage,) = read(section, STORE).stages
    assert stage.fim_rates == {"python": pytest.approx(0.6), "english": 0.0}
    assert stage.bound == {"python": pytest.approx(0.4), "english": 0.6}


def test_a_pattern_of_fim_that_no_source_of_its_stage_has_is_refused():
    """A typing error would turn FIM off without a word."""
    for only in (["cod/*"], ["code/*", "english"]):
        section = small(sources={"code/a": 0.4, "prose": 0.6}, fim={"rate": 0.8, "only": only})
        with pytest.raises(ConfigError) as raised:
            read(section)
        assert f"fim.only.{len(only) - 1}: " in str(raised.value)
        assert f"(code/a, prose), {only[-1]!r} matches none" in str(raised.value)
    assert read(small(sources={"prose": 1.0}, fim={"rate": 0.0, "only": ["code"]})).stages[0].fim_rate == 0


def test_the_most_specific_pattern_binds_whatever_the_order():
    patterns = {"*": "english", "SlimPajama/*": "css", "SlimPajama/Git*": "python"}
    for bind in (patterns, dict(reversed(patterns.items()))):
        section = small(sources={"SlimPajama/Github": 0.5, "SlimPajama/C4": 0.3, "else": 0.2}, fim=None) | {
            "bind": bind
        }
        assert read(section, STORE).stages[0].bound == {"python": 0.5, "css": 0.3, "english": 0.2}


def test_a_subset_narrows_a_row_range():
    section = small(sources={"wiki": {"weight": 1.0, "subset": "0.0-0.1"}}) | {"bind": {"wiki": "english[0.5-1.0]"}}
    assert read(section, STORE).stages[0].bound == {"english[0.5-0.55]": 1.0}


def test_the_order_of_a_stage_stays_in_its_half():
    rows = {"english": 101, "python": 40, "javascript": 30, "html": 20, "css": 10}
    one, two, _ = read(curriculum_section(bind=BIND, global_batch_size=500), STORE).stages
    first = {i for s, _, i in one.order(rows, seed=1).sequences(0) if s == "english"}
    second = {i for step in (0, 1) for s, _, i in two.order(rows, seed=1).sequences(step) if s == "english"}
    assert first == set(range(50))
    assert second == set(range(50, 101))


def test_an_order_needs_rows():
    section = small(sources={"wiki": {"weight": 1.0, "subset": "0.0-0.1"}}) | {"bind": {"wiki": "english"}}
    (stage,) = read(section, STORE).stages
    with pytest.raises(ConfigError, match=r"stage only: expected rows in english\[0.0-0.1\], english has 9"):
        stage.order({"english": 9}, 1)
    with pytest.raises(ConfigError, match="stage only: expected english in the store, it has python"):
        stage.order({"python": 9}, 1)


def two_stages(**second):
    section = small()
    section["stages"].append(copy.deepcopy(section["stages"][0]) | {"name": "second"} | second)
    return section


MISTAKES = [
    (small(sources={"a": 0.5, "b": 0.4}), "stages.0.sources", "expected weights that sum to 1 (within 1e-06), got 0.9"),
    (
        small(sources={"a": 1.5, "b": -0.5}),
        "stages.0.sources.b",
        "expected a mapping of keys or a number of at least 0, got -0.5",
    ),
    (
        small(sources={"a": 0.5, "b": {"tokens": 5}}),
        "stages.0.sources.b",
        "expected a weight, or tokens for every source",
    ),
    (
        small(sources={"a": {"weight": 1.0, "subset": "0.5"}}),
        "stages.0.sources.a.subset",
        "expected a part of the rows such as 0.0-0.5, got '0.5'",
    ),
    (
        small(sources={"a": {"weight": 1.0, "wieght": 1.0}}),
        "stages.0.sources.a.wieght",
        "unknown key; did you mean 'weight'?",
    ),
    (small(sources={}), "stages.0.sources", "expected weights that sum to 1 (within 1e-06), got 0"),
    (
        small(lr=[{"from": 0.0, "to": 1.0, "steps": 101}]),
        "stages.0.lr.0.steps",
        "expected a warm-up within the stage's 100 steps, got 101",
    ),
    (
        small(lr=[{"from": 0.0, "to": 1.0, "steps": 10}, {"from": 0.9, "to": 0.0, "steps": 90}]),
        "stages.0.lr.1.from",
        "expected 1, where the segment before ends (or jump: true), got 0.9",
    ),
    (
        small(lr=[{"from": 1.0, "to": 1.0, "steps": 100}, {"to": 0.0, "steps": 9}]),
        "stages.0.lr.1",
        "expected to start within the stage's 100 steps, starts at 100",
    ),
    (small(lr=[{"to": 1.0}]), "stages.0.lr.0.from", "expected a value in the first segment"),
    (
        small(lr=[{"from": 0.0, "to": 1.0}, {"to": 0.0}]),
        "stages.0.lr.0.steps",
        "expected a value, only the last segment may leave it out",
    ),
    (small(lr=[]), "stages.0.lr", "expected at least one segment, got none"),
    (small(lr=[{"from": 0.0, "to": -1.0}]), "stages.0.lr.0.to", "expected a number of at least 0, got -1.0"),
    (
        small(lr=[{"from": 0.0, "to": 1.0, "shape": "cosin"}]),
        "stages.0.lr.0.shape",
        "expected 'linear', 'cosine' or 'sqrt', got \"cosin\"",
    ),
    (small(fim={"rate": 1.1}), "stages.0.fim.rate", "expected a number from 0 to 1, got 1.1"),
    (small(fim={"rate": 0.5, "smp": 0.5}), "stages.0.fim.smp", "unknown key; did you mean 'spm'?"),
    (small(checkpoint_every=0), "stages.0.checkpoint_every", "expected a whole number of at least 1 or null, got 0"),
    (small(steps=0), "stages.0.steps", "expected a whole number of at least 1 or null, got 0"),
    (small(steps=None), "stages.0.steps", "expected either steps or tokens"),
    (small(tokens=5), "stages.0.steps", "expected either steps or tokens"),
    (small(stesp=5), "stages.0.stesp", "unknown key; did you mean 'steps'?"),
    (small(carry=["weights"]), "stages.0.carry", "expected [] in the first stage, there is none before it"),
    (
        two_stages(carry=["optimizer"]),
        "stages.1.carry",
        "expected [weights] or [weights, optimizer], got ['optimizer']",
    ),
    (two_stages(name="only"), "stages.1.name", "expected a name of its own, got 'only' again"),
    (two_stages(name="a\nb"), "stages.1.name", "expected a text of a line, got "),
    (two_stages(name=" "), "stages.1.name", "expected a text of a line, got "),
    (small() | {"scale": 0}, "scale", "expected a number greater than 0, got 0"),
    (small() | {"stages": []}, "stages", ""),
    (
        small() | {"bind": {"english": "english[0.5-0.1]"}},
        "bind",
        "expected a part of the rows such as 0.0-0.5, got '0.5-0.1'",
    ),
    (
        small() | {"bind": {"english": {"python": 0.5, "css": 0.4}}},
        "bind.english",
        "expected shares that sum to 1, got 0.9",
    ),
    (
        small() | {"bind": {"english": "englsh"}},
        "bind.english",
        "expected a source of the corpus (css, english, html, javascript, python), got 'englsh'; did you mean",
    ),
    (
        small(sources={"web": 0.5, "pyhton": 0.3, "css": 0.2}),
        "stages.0.sources.web",
        "expected a source of the corpus (css, english, html, javascript, python), or a pattern of curriculum.bind",
    ),
    (small(sources={"pyhton": 1.0}), "stages.0.sources.pyhton", "expected a source of the corpus (css, english, html"),
    (
        small(sources={"web": 0.5, "wiki": 0.3, "css": 0.2}) | {"bind": {"css": "css"}},
        "bind",
        "expected a pattern for every source of stage only, none for web, wiki (the corpus has css, english,",
    ),
]


@pytest.mark.parametrize(("section", "key", "expectation"), MISTAKES)
def test_a_mistake_is_one_line_with_file_key_and_expectation(section, key, expectation):
    with pytest.raises(ConfigError) as caught:
        read(section, STORE)
    assert str(caught.value).startswith(f"run.yaml: curriculum.{key}: {expectation}")
    assert "\n" not in str(caught.value)


def test_intended_jumps_and_left_out_values():
    lr = [
        {"from": 0.0, "to": 1.0, "steps": 10},
        {"from": 0.5, "to": 0.5, "steps": 40, "jump": True},
        {"to": 0.0},
    ]
    (stage,) = read(small(lr=lr)).stages
    assert [stage.lr_at(t) for t in (10, 30, 50, 75, 100)] == [1.0, 0.5, 0.5, 0.25, 0.0]


def test_without_a_store_nothing_is_checked_against_it():
    assert read(small(sources={"web": 1.0})).stages[0].bound == {"web": 1.0}


def test_a_stage_that_does_not_say_saves_ten_times():
    bare = small(checkpoint_every=None)
    assert [read(bare | {"scale": scale}).stages[0].checkpoint_every for scale in (1, 0.5, 0.01)] == [10, 5, 1]
    assert read(bare) == read(small()) == read(small(checkpoint_every=10))
    bare.pop("name")
    assert read(bare).stages == read(small(checkpoint_every=10)).stages


def test_the_later_stages_carry_everything_unless_told():
    assert [s.carry_optimizer for s in read(two_stages()).stages] == [False, True]


def test_a_run_file_extends_and_overrides(tmp_path):
    run = {
        "extends": "curricula/crystalcoder.yaml",
        "curriculum": {"scale": 0.001, "global_batch_size": 16, "seq_len": 128, "bind": BIND},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_yaml(tmp_path / "run.yaml")
    section = parse(CurriculumConfig, config.mapping["curriculum"], config, ("curriculum",))
    crystal = resolve(section, config, STORE)
    assert [s.steps for s in crystal.stages] == [80, 214, 28]
    assert [s.checkpoint_every for s in crystal.stages] == [2, 2, 1]
    assert crystal.tokens == 322 * 16 * 128
    with pytest.raises(
        ConfigError, match=r"crystalcoder.yaml: curriculum.stages.0.sources.SlimPajama/ArXiv_train_packed_part0of2: "
    ):
        resolve(section.model_copy(update={"bind": {}}), load_yaml("configs/curricula/crystalcoder.yaml"), STORE)
