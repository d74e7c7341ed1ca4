"""What a run recorded, as curves over the tokens it had seen: what is compared, and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crystal.files import open_regular
from crystal.workspace.runs import losses, number, parse_record, read_config, whole

LONGEST = 1 << 20  # bytes of a line that is read at a time: what is longer is no step's record


@dataclass(frozen=True)
class Curves:
    """What a run recorded, over the tokens it had seen; lists run in parallel, tokens ascend."""

    label: str
    directory: Path
    config: dict | None  # None: it cannot be read
    tokens: list[int]
    steps: list[int]
    loss: list[float]
    val_tokens: list[int]
    val_steps: list[int]
    val_loss: list[dict[str, float]]

    @property
    def sources(self) -> list[str]:
        return sorted({source for losses in self.val_loss for source in losses})


def read_curves(directory: Path, label: str) -> Curves:
    """A run's records; those of steps that were made again after a kill count as they were made last."""
    config = read_config(directory)
    records: dict[int, dict] = {}
    try:
        with open_regular(directory / "metrics.jsonl") as file:
            while line := file.readline(LONGEST):
                record = parse_record(line)
                if record and (step := whole(record.get("step"))) is not None:
                    records[step] = record
    except OSError:
        pass
    curriculum = (config or {}).get("curriculum")
    curriculum = curriculum if isinstance(curriculum, dict) else {}
    per_step = (number(curriculum.get("seq_len")) or 1) * (number(curriculum.get("global_batch_size")) or 1)
    trained, validated = [], []
    for step, record in sorted(records.items()):
        tokens = number(record.get("tokens"))
        tokens = int(step * per_step if tokens is None else tokens)
        if number(record.get("loss")) is not None:
            trained.append((tokens, step, record["loss"]))
        if by_source := losses(record.get("val_loss")):
            validated.append((tokens, step, by_source))
    return Curves(
        label, directory, config,
        *([list(column) for column in zip(*trained, strict=True)] or [[], [], []]),
        *([list(column) for column in zip(*validated, strict=True)] or [[], [], []]),
    )  # fmt: skip
