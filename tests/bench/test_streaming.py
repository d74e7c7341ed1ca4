"""What `crystal bench stream` measures is what a run would do."""

import pytest
from rich.console import Console

from crystal.backends.config import WeightStreamingConfig
from crystal.bench import streaming
from crystal.run import load_run


class _Seen(Exception):
    pass


@pytest.mark.parametrize("model", ["amber-7b", "crystalcoder-7b"])
def test_it_is_benched_under_the_plan_of_the_published_run(monkeypatch, tmp_path, model):
    """Amber decays its norms too, which the bench once forgot."""
    config = load_run(model).config

    def backend(setup, *others):
        assert setup.model == config.model
        assert setup.optimizer == config.optimizer
        assert setup.plan == config.plan()
        raise _Seen

    monkeypatch.setattr(streaming, "WeightStreamingBackend", backend)
    settings = WeightStreamingConfig(name="weight_streaming", path=tmp_path)
    with pytest.raises(_Seen):
        streaming.bench_stream(model, 16, 1, 1, settings, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []
