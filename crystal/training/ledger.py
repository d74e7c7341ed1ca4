"""The ledger: which documents went into step N, and at which steps was document D seen.

Both answers come from the order and the store's document boundaries, the same code that training reads its batches
with; nothing is logged, so nothing can be missing. Steps count from 1 over all stages, as in metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable

from crystal.curriculum.resolve import resolve
from crystal.data.store import TokenStore
from crystal.errors import ConfigError
from crystal.run import RunFile, prepare_run
from crystal.training.batches import Batches


class Ledger:
    """A run's data, opened for questions; `crystal prepare` has made the store, or it is made now.

    store: the run's, where it is open already.
    """

    def __init__(self, run: RunFile, console=None, store: TokenStore | None = None):
        self.store = store or TokenStore.open(prepare_run(run, console), verify=run.config.data.verify)
        self.curriculum = resolve(run.config.curriculum, run.source, self.store.sources)
        train = run.config.train
        self.batches = Batches(self.curriculum, self.store, train.seed, train.micro_batch_size, train.without)

    def where(self, step: int) -> dict:
        """The rows of a step and the documents in each: one entry for every (row, document).

        fim: whether FIM changed the row, at least one of its documents.
        """
        stage = self._stage(step)
        rows = []
        for number, (source, epoch, index) in enumerate(
            self.batches.order(stage).sequences(step - 1 - stage.first_step)
        ):
            row, _, _ = self.batches.row(stage, source, epoch, index)
            changed = bool((row != self.store.row(source, index)).any())
            for document in self.store.documents_in_row(source, index):
                rows.append(
                    {
                        "row": number,
                        "stage": stage.name,
                        "source": source,
                        "document": document["id"],
                        "path": document["path"],
                        "license": document["license"],
                        "epoch": epoch,
                        "index": index,
                        "fim": changed,
                    }
                )
        return {"step": step, "rows": rows}

    def when(self, document: str) -> dict:
        """All steps at which a document is seen in the run, past or to come; of an id that several documents have, all
        of theirs, and `occurrences` where they are of several sources. Raises ConfigError for an unknown one."""
        found = self.store.occurrences(document)
        steps = sorted({step for source, rows in found for step, _, _ in self.sightings(source, rows)})
        source, rows = found[0]
        answer = {"document": document, "source": source, "rows": rows, "steps": steps}
        several = [{"source": source, "rows": rows} for source, rows in found]
        return answer if len(found) == 1 else answer | {"occurrences": several}

    def sightings(self, source: str, rows: Iterable[int]) -> list[tuple[int, str, int]]:
        """When rows of a source are read, past or to come: (step, stage, epoch within the stage), in order."""
        rows = [*rows]
        return sorted(
            (stage.first_step + at + 1, stage.name, epoch)
            for stage in self.curriculum.stages
            for index in rows
            for at, _, epoch in self.batches.order(stage).steps_of(source, index, stage.steps)
        )

    def show(self, step: int, count: int) -> dict:
        """The first `count` rows of a step as text, as the model gets them: FIM applied."""
        stage = self._stage(step)
        shown = []
        sequences = self.batches.order(stage).sequences(step - 1 - stage.first_step)[:count]
        for number, (source, epoch, index) in enumerate(sequences):
            row, mask, _ = self.batches.row(stage, source, epoch, index)
            text = self.batches.tokenizer.decode(row.tolist())
            shown.append({"row": number, "source": source, "epoch": epoch, "masked": int((~mask).sum()), "text": text})
        return {"step": step, "rows": shown}

    def stats(self) -> dict:
        """Documents, tokens and rows of every source, and how often the run goes through each."""
        sources = {}
        for name, entry in self.store.manifest["sources"].items():
            keys = ("documents", "tokens", "train_rows", "val_rows", "text_bytes", "licenses")
            sources[name] = {key: entry[key] for key in keys}
            sources[name]["epochs"] = round(self._drawn(name) / max(entry["train_rows"], 1), 4)
        return {"store": str(self.store.directory), "sources": sources}

    def _drawn(self, source: str) -> int:
        drawn = 0
        for stage in self.curriculum.stages:
            counts = self.batches.order(stage).counts_at(stage.steps)
            drawn += sum(n for entry, n in counts.items() if entry.partition("[")[0] == source)
        return drawn

    def _stage(self, step: int):
        if not 1 <= step <= self.curriculum.steps:
            raise ConfigError(f"--step: expected 1 to {self.curriculum.steps}, the run's last, got {step}")
        return self.curriculum.stage_at(step - 1)
