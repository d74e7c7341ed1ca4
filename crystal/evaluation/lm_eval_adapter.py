"""lm-eval on a checkpoint of ours: its tasks and its numbers, our decoder, tokenizer and scorer. No export needed.

For tasks that are written for lm-eval, and to see that its numbers and ours agree. It needs lm-eval, which nothing else
here does: importing this file raises ConfigError without it. No hub is asked unless HF_HUB_OFFLINE=0 says so.

As a model of lm-eval's own command: python -m crystal.evaluation.lm_eval_adapter run --model crystal
--model_args checkpoint=RUN --tasks TASK --include_path DIR
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when lm-eval's packages are imported

import torch

from crystal import checkpoint as checkpoints
from crystal.errors import ConfigError, CrystalError, DataError, RunError
from crystal.evaluation import results
from crystal.evaluation.evaluate import Evaluation, Where, drawn
from crystal.evaluation.scorer import score_tokens
from crystal.evaluation.task import Subject
from crystal.evaluation.writing import Sampling, write
from crystal.files import write_whole
from crystal.output.progress import Bar

try:
    import lm_eval.models  # noqa: F401 - its own models, which it would not register behind ours
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise ConfigError("lm-eval is not installed: pip install 'crystal-zoo[eval]'") from None

if TYPE_CHECKING:
    from rich.console import Console

MAX_GEN_TOKS = 256  # lm-eval's, where a task does not say
_UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_NOTHING = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}  # change nothing
_BOOTSTRAPS = 1000


@register_model("crystal")
class CrystalLM(TemplateLM):
    """A checkpoint as lm-eval sees a model.

    checkpoint: a checkpoint or run directory (its latest), or a Subject that is loaded already. dtype: auto, fp32 or
    bf16; device: auto, cpu or cuda. lm-eval's batch_size is not needed: the scorer chooses. A BOS token stands before
    every text where the checkpoint's own evaluation has one. console: shows progress.
    """

    def __init__(
        self,
        checkpoint: str | Path | Subject,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        device: str = "auto",
        seed: int = 0,
        console: Console | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not isinstance(checkpoint, Subject):
            directory = checkpoints.locate(Path(checkpoint))
            if device.startswith("cuda") and not torch.cuda.is_available():  # lm-eval's command says cuda unasked
                device = "auto"
            checkpoint = Evaluation(directory, Where({}, directory, None), dtype, device).subject
        self.subject, self.seed, self.console = checkpoint, seed, console
        self._own_specials = checkpoint.tokenizer.encode("")  # what a published tokenizer.json adds to every text

    @property
    def eot_token_id(self) -> int:
        """The first end token; where there is none, the prefix's."""
        return self.subject.ends[0] if self.subject.ends else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, or else an end token, as in our own tasks."""
        return (*self.subject.start, *self._own_specials[:1], *self.subject.ends[:1], 0)[0]

    @property
    def max_length(self) -> int:
        return self.subject.decoder.config.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        return str(self.subject.checkpoint)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, behind BOS where there is one; add_special_tokens False: without. A BOS that is spelled out
        is text like any other, as it is to our tokenizer."""
        ids = self.subject.tokenizer.encode(string)
        if add_special_tokens is not False:
            return [*self.subject.start, *ids]
        added = len(self._own_specials)
        return ids[added:] if added and ids[:added] == self._own_specials else ids

    def tok_decode(self, tokens: Sequence[int] | int) -> str:
        return self.subject.tokenizer.decode([tokens] if isinstance(tokens, int) else tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether each token is the likeliest) of (context, continuation) texts."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        """Of (texts, context ids, continuation ids). What is too long is cut on its left; raises DataError for a
        continuation that is longer than the model's window by itself, or has no tokens."""
        with Bar(self.console, "lm-eval: log-probabilities", len(requests), unit="requests") as bar:
            try:
                pairs = [(context, continuation) for _, context, continuation in requests]
                scored = score_tokens(self.subject.decoder, pairs, bar.advance)
            except ValueError as error:
                raise DataError(f"lm-eval: {error}") from None
        found = [(one.total, one.greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probabilities of whole texts, in disjoint windows as lm-eval's own models have them. They count the BOS
        that stands before a text as one of its tokens, foretold from another; so does this."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to the first stop string or end token.

        A repeated request gets a draw of its own. At most half of the window is written, where lm-eval's own models
        would leave a long context less room.
        """
        alike: dict[tuple, list[tuple[int, tuple[list[int], int]]]] = defaultdict(list)
        times: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, asked = request.args
            stops, sampling = self._settings(asked)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            alike[tuple(stops), sampling].append((number, (ids, sampling.seed_of(context, times[context]))))
            times[context] += 1
        texts = [""] * len(requests)
        with Bar(self.console, "lm-eval: writing", len(requests), unit="requests") as bar:
            for (stops, sampling), some in alike.items():
                numbers, prompts = zip(*some, strict=True)
                subject = self.subject
                for batch in write(subject.decoder, subject.tokenizer, prompts, stops, subject.ends, sampling):
                    for i, written in batch:
                        texts[numbers[i]] = written.text
                        self.cache_hook.add_partial("generate_until", requests[numbers[i]].args, written.text)
                    bar.advance(len(batch))
        return texts

    def _settings(self, asked: dict) -> tuple[list[str], Sampling]:
        """Stop strings, and how to write: the temperature is 0 unless a task asks for sampling, as in lm-eval."""
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        for key in settings.keys() - _UNDERSTOOD:
            if key not in _NOTHING or settings[key] != _NOTHING[key]:
                known = ", ".join(sorted(_UNDERSTOOD))
                raise ConfigError(f"generation_kwargs: {key}: {settings[key]!r}: expected none but {known}", key=key)
        temperature = float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0
        top_p, top_k = float(settings.get("top_p") or 1.0), settings.get("top_k") or None  # top_k 0: all
        stops = [stop for stop in settings["until"] if stop]
        return stops, Sampling(1, temperature, top_p, settings["max_gen_toks"], self.seed, top_k)


def run_lm_eval(
    checkpoint: Path | Subject,
    tasks: Sequence[str],
    include_path: Path | None = None,
    include_defaults: bool = False,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    unsafe: bool = False,
    console: Console | None = None,
) -> dict:
    """lm-eval's tasks on a checkpoint: {"engine", "tasks": {task: {metric: value, "n", "stderr"}}, "items": {task:
    lm-eval's samples}}.

    tasks: by name, from the YAML files under include_path; include_defaults: from lm-eval's own too, most of which
    need a hub. limit: so many items of each, drawn by seed as in `crystal eval`. shots: instead of the tasks' own.
    unsafe: let tasks run what the model wrote, unconfined. Raises ConfigError in one line for whatever lm-eval makes
    of a task, and as `Evaluation`.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"{include_path}: expected a directory of lm-eval's YAML tasks", file=include_path)
    if include_path is None and not include_defaults:
        raise ConfigError("lm-eval: expected --include-path DIR with YAML tasks, or its own to be asked for")
    names = list(tasks)
    try:
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            known = ", ".join(manager.all_tasks[:20]) or "there are none"
            raise ConfigError(f"--suite {unknown[0]}: no such task of lm-eval ({known})", key="suite")
        model = CrystalLM(checkpoint, dtype, device, seed, console)
        samples = None
        if limit is not None:
            loaded = manager.load(names)["tasks"]
            samples = {name: drawn(len(task.eval_docs), limit, seed) for name, task in loaded.items()}
        found = evaluator.simple_evaluate(
            model, tasks=names, num_fewshot=shots, samples=samples, task_manager=manager,
            bootstrap_iters=_BOOTSTRAPS, confirm_run_unsafe_code=unsafe, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except CrystalError:
        raise
    except Exception as error:  # a task may be any code, and lm-eval raises what it likes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"lm-eval: {', '.join(names)}: {said}", key="suite") from error
    summaries = {name: _summary(found, name) for name in found["n-samples"]}
    return {"engine": f"lm-eval {version('lm-eval')}", "tasks": summaries, "items": dict(found["samples"])}


def evaluate_all(
    places: Where,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    seed: int,
    dtype: Literal["auto", "fp32", "bf16"],
    device: str,
    unsafe: bool,
    console: Console | None,
) -> dict:
    """`run_lm_eval` on every checkpoint: {"engine", "evals", "checkpoints": [{"step", "tasks"}]}; its samples go to
    EVALS/step-NNNNNNN/lm-eval/TASK.json. Without include_path the tasks are lm-eval's own.

    Raises ConfigError as `run_lm_eval`, RunError where nothing can be written.
    """
    checkpoints = []
    for step, directory in places.checkpoints.items():
        subject = Evaluation(directory, places, dtype, device).subject
        own = include_path is None
        found = run_lm_eval(subject, tasks, include_path, own, limit, seed, unsafe=unsafe, console=console)
        folder = results.directory_of(places.evals, step) / "lm-eval"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, samples in found["items"].items():
                content = {"engine": found["engine"], "step": step, **found["tasks"][name], "items": samples}
                write_whole(folder / f"{name}.json", json.dumps(content, default=str))
        except OSError as error:
            raise RunError(f"{folder}: the results cannot be written: {error.strerror}") from None
        checkpoints.append({"step": step, "tasks": found["tasks"]})
    return {"engine": found["engine"], "evals": str(places.evals), "checkpoints": checkpoints}


def _summary(found: dict, name: str) -> dict:
    """{metric: value, …, n, metric, stderr} of a task; the first metric's standard error. A metric behind another
    filter than `none` is metric/filter."""
    values, errors = {}, {}
    for key, value in found["results"][name].items():
        metric, comma, through = key.partition(",")
        if comma:
            into, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (values, metric)
            into[metric if through == "none" else f"{metric}/{through}"] = value
    first = next(iter(values))
    stderr = errors.get(first)
    counted = {"n": found["n-samples"][name]["effective"], "metric": first}
    return values | counted | {"stderr": stderr if isinstance(stderr, float) else None}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
