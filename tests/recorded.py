"""Run directories as training leaves them, written by hand: config, metrics, events, checkpoints; no training."""

import functools
import json
from pathlib import Path

import yaml

TOKENS = 16 * 256  # of a step of the demo


@functools.cache
def _resolved(overrides: tuple) -> str:
    from crystal.run import load_run

    return yaml.safe_dump(load_run("demo", overrides).config.model_dump(mode="json", by_alias=True), sort_keys=False)


def record_run(
    directory: Path,
    *overrides,
    steps=60,
    stop=None,
    interrupted=False,
    start=0,
    val_every=20,
    loss=None,
    checkpoint=True,
) -> Path:
    """A run of the demo (804 steps) that got to step `steps`; stop: whether its last start said so at its end.

    loss: a function of the step. Returns the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(_resolved(overrides))
    (directory / "manifest.json").write_text("{}")
    loss = loss or (lambda step: 8 / (1 + step) + 2)
    records = [{"step": 0, "stage": 1, "val_loss": {"english": 9.0, "python": 10.0}}]
    for step in range(1, steps + 1):
        record = {"step": step, "stage": 1, "loss": loss(step), "tokens": step * TOKENS, "tokens_per_second": 1000.0}
        if val_every and step % val_every == 0:
            record["val_loss"] = {"english": loss(step) + 0.1, "python": loss(step) + 0.2}
        records.append(record)
    events = [{"event": "start", "step": start, "stop": stop or 804}]
    if interrupted:
        events.append({"event": "interrupted", "step": steps, "signal": "SIGINT"})
    if stop or interrupted:
        events.append({"event": "stop", "step": steps})
    for name, lines in (("metrics", records), ("events", events)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if checkpoint:
        sealed = directory / "checkpoints" / f"step-{steps:07d}" / "checkpoint.json"
        sealed.parent.mkdir(parents=True)
        sealed.write_text("{}")
    return directory
