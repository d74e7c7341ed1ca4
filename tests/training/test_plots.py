"""Pictures of a run and of a curriculum: what lies inside them, what they are called, and where they cannot go."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from crystal.curriculum.resolve import resolve
from crystal.errors import ConfigError, RunError
from crystal.output.pictures import colors, legible_on, literal, save, short
from crystal.run import load_run
from crystal.training.plots import _curriculum, _losses, _shares, plot_curriculum, plot_losses


def curriculum_of(name, *overrides):
    run = load_run(name, overrides)
    return resolve(run.config.curriculum, run.source)


def records(steps, first=28.0, sources=("english", "python"), every=20):
    """Of a run whose losses fall from `first` to about 5."""
    found = [{"step": 0, "stage": 1, "val_loss": dict.fromkeys(sources, first)}]
    for t in range(1, steps + 1):
        loss = 5 + (first - 5) * 0.6**t + 0.1 * (-1) ** t
        record = {"step": t, "stage": 1, "loss": loss, "lr": 0.01, "tokens": 4096 * t}
        if t % every == 0 or t == steps:
            record["val_loss"] = {source: 5.0 + 4 * i for i, source in enumerate(sources)}
        found.append(record)
    return found


def test_every_held_out_loss_lies_inside_the_axes_and_no_half_is_empty():
    drawn = _losses(records(300), curriculum_of("demo"), "title")
    strip, main, rates = drawn.axes[:3]
    ranges = [ax.get_ylim() for ax in (strip, main)]
    left, right = main.get_xlim()
    for t, loss in [(0, 28.0), (20, 9.0), (300, 5.0)]:
        assert left < t < right
        assert any(low < loss < high for low, high in ranges), (t, loss)
    assert right < 1.05 * 300, "steps that are still to come take no room"
    low, high = ranges[1]
    assert high / low < 9.0 / 5.0 * 1.1, "the first steps do not flatten the rest"
    assert rates.get_ylim()[0] == 0


def test_losses_that_begin_near_where_they_end_need_no_strip():
    assert len(_losses(records(300, first=9.5), curriculum_of("demo"), "").axes) == 2


def test_the_training_loss_is_smoothed_over_itself_in_pale():
    ax = _losses(records(300, first=9.5), curriculum_of("demo"), "").axes[0]
    raw, *stages = [line for line in ax.lines if line.get_color() in ("0.82", "0.35") and len(line.get_xdata()) > 2]
    assert (raw.get_color(), len(raw.get_xdata())) == ("0.82", 300)
    assert [len(line.get_xdata()) for line in stages] == [199, 101], "a line for each stage"
    tail = stages[1].get_ydata()[20:-20]
    assert max(tail) - min(tail) < 0.1 < max(raw.get_ydata()[220:280]) - min(raw.get_ydata()[220:280])


def test_tokens_stand_under_steps_and_the_title_says_what_was_trained(tmp_path):
    drawn = _losses(records(300), curriculum_of("demo"), "title")
    (tokens,) = drawn.axes[2].child_axes
    drawn.draw_without_rendering()
    assert tokens.get_xlim()[1] == pytest.approx(drawn.axes[2].get_xlim()[1] * 16 * 256)
    manifest = {"name": "demo_$x$", "plan": {"tensors": [{"shape": [1000, 1342]}, {"shape": [658]}]}}
    manifest["backend"] = {"name": "cpu", "compute_dtype": "bf16"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records(30))) + "\n")
    made = []
    original = save

    def watched(make, path):
        made.append(make())
        original(lambda: made[-1], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crystal.training.plots.save", watched)
        assert plot_losses(tmp_path, curriculum_of("demo")).read_bytes()[:4] == b"\x89PNG"
    assert made[0].axes[0].get_title() == "demo_$x$: 1.343M parameters, 122.9k tokens, cpu, bf16"


@pytest.mark.parametrize("some", [[], records(0), [{"step": 1, "stage": 1, "loss": None, "lr": 0.1}], records(1)])
def test_a_run_that_has_hardly_begun_has_a_picture_too(some, tmp_path):
    save(lambda: _losses(some, curriculum_of("demo"), ""), tmp_path / "loss.png")


def test_a_curriculum_shows_the_sources_that_the_run_trains_on():
    demo = _shares(curriculum_of("demo"))
    assert demo[0] == pytest.approx({"english": 1.0})
    assert {name for stage in demo for name in stage} == {"english", "python", "javascript", "html", "css"}
    legend = _curriculum(curriculum_of("demo")).legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["english", "python", "javascript", "html", "css"]
    published = _shares(curriculum_of("crystalcoder-7b", "curriculum.bind={'nothing*': x}"))
    assert list(published[1]) == [*(f"SlimPajama/{s}" for s in SLIM_PAJAMA), "StarCoder"]
    assert all(sum(stage.values()) == pytest.approx(1) for stage in published)


SLIM_PAJAMA = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")


def test_names_of_ones_own_are_not_shortened_into_one():
    sources = "{web_train: 0.25, web_fim: 0.25, web: 0.5}"
    stage = f"curriculum.stages=[{{name: a, steps: 4, lr: 0.1, checkpoint_every: 4, sources: {sources}}}]"
    (shares,) = _shares(curriculum_of("demo", "curriculum.scale=1", "curriculum.bind={}", stage))
    assert shares == {"web_train": 0.25, "web_fim": 0.25, "web": 0.5}


def test_a_curriculum_has_a_color_for_each_source_and_text_that_can_be_read_on_it():
    drawn = _curriculum(curriculum_of("crystalcoder-7b"))
    handles = drawn.legends[0].get_patches()
    assert len({h.get_facecolor() for h in handles}) == len(handles) == 12
    percents = [t for t in drawn.axes[1].texts if t.get_text().endswith("%")]
    assert len(percents) >= 8
    drawn.draw_without_rendering()
    labels = [t.get_text() for t in drawn.axes[1].get_xticklabels()]
    assert "100k" in labels
    assert "1T" in [t.get_text() for t in drawn.axes[1].child_axes[0].get_xticklabels()]


@given(st.integers(0, 200))
def test_no_color_comes_twice(count):
    assert len(set(colors(count))) == count


@given(st.sampled_from(colors(20) + colors(60) + ["#000000", "#ffffff"]))
def test_text_is_legible_on_every_color(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    light = sum(
        w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True)
    )
    text = {"black": 0.0, "white": 1.0}[legible_on(color)]
    assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1500, "1.5k"), (321_836, "321.8k"), (999_999, "1M"), (2e9, "2B"), (1.392e12, "1.392T")],
)
def test_numbers_are_short(number, shown):
    assert short(number) == shown


def test_source_names_are_drawn_as_they_stand(tmp_path, recwarn):
    names = ("_hidden", "$x_1$ \\foo", "[/red]x", "<b>", "日本", "a\nb\x1b[31m")
    drawn = _losses(records(30, sources=names), curriculum_of("demo"), names[1])
    shown = [t.get_text() for ax in drawn.axes if ax.get_legend() for t in ax.get_legend().get_texts()]
    assert set(shown) >= {literal(f"{name}, held out") for name in names}
    assert not set("\n\x1b") & set("".join(shown))
    save(lambda: drawn, tmp_path / "loss.png")
    assert not [str(w.message) for w in recwarn if "legend" in str(w.message) or "Glyph" in str(w.message)]


def small() -> Figure:
    return Figure(figsize=(1, 1))


@pytest.mark.parametrize("name", ["a?b%20c#.png", "plain", "x.PDF", "über $x$.svg"])
def test_odd_names_are_written_to(name, tmp_path):
    save(small, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/x.png", "missing/x.png: the picture cannot be written: No such file or directory"),
        ("x.txt", r"x.txt: expected a picture's name that ends in .png, .pdf or .svg"),
        ("", "expected the name of a picture, this is no ordinary file"),
        ("circle.png", "circle.png: the picture cannot be written"),
        ("n" * 300 + ".png", "File name too long"),
    ],
)
def test_where_a_picture_cannot_go_is_one_line(name, message, tmp_path):
    (tmp_path / "circle.png").symlink_to("circle.png")
    with pytest.raises((ConfigError, RunError), match=message) as caught:
        save(small, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["circle.png"]


def test_a_link_is_written_through_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "link.png").symlink_to("there.png")
    plot_curriculum(curriculum_of("demo"), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "there.png").read_bytes()[:4] == b"\x89PNG"
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match="no ordinary file"):
        plot_curriculum(curriculum_of("demo"), tmp_path / "pipe.png")
    assert (tmp_path / "pipe.png").is_fifo()
