"""`backend: {name: cerebras}`: our protocol on this side, a process in Cerebras' environment on the other.

The plan is computed here and goes over as data, in a job: shapes, multipliers, groups, pieces of the learning rate.
Batches go through the spool, commands and numbers through a pipe as JSON lines, weights and moments as .mdl files,
which are Cerebras' own checkpoints: no pickle in either direction.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import crystal
from crystal.backends.base import MicroBatch, OneProcess, Setup, StepResult
from crystal.backends.cerebras import environment, mdl, spool
from crystal.backends.cerebras.learning_rate import pieces
from crystal.backends.config import CerebrasConfig, OptimizerConfig
from crystal.curriculum.stages import Curriculum
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.mup.plan import Plan
from crystal.zoo.build import build, initial_weights, multipliers_for
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder

HALF = {"bf16": "bfloat16", "cbfloat16": "cbfloat16", "fp32": "bfloat16"}


def make_job(
    model: ModelConfig,
    plan: Plan,
    optimizer: OptimizerConfig,
    curriculum: Curriculum,
    n_sources: int,
    config: CerebrasConfig,
) -> dict:
    """All that the worker is told, JSON-ready; places on disk are added by `Process`."""
    cluster = None if config.cluster is None else config.cluster.model_dump(mode="json", exclude_none=True)
    for ours in ("session_steps", "spool"):
        if cluster:
            cluster.pop(ours, None)
    return {
        "device": config.device,
        "half": HALF[config.compute_dtype],
        "threads": config.threads,
        "cluster": cluster,
        "model": model.model_dump(mode="json"),
        "multipliers": list(multipliers_for(model, plan)),
        "groups": [
            {
                "name": name,
                "tensors": [row.tensor for row in rows],
                "lr_multiplier": rows[0].lr_multiplier,
                "weight_decay": rows[0].weight_decay,
                "eps": rows[0].eps,
            }
            for name, rows in plan.groups().items()
        ],
        "optimizer": optimizer.name,
        "betas": list(optimizer.betas),
        "grad_clip": optimizer.grad_clip,
        "pieces": pieces(curriculum),
        "n_sources": n_sources,
        "compile_only": False,
    }


class CerebrasFailure(RunError):
    """The other side gave up."""


class Process:
    """A worker in Cerebras' environment and its directory (spool, links, log), both gone with this object."""

    def __init__(self, environment_directory: Path | None, spool_directory: Path | None = None):
        home = environment.find(environment_directory)
        if spool_directory is not None:
            spool_directory.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="crystal-cerebras-", dir=spool_directory))
        package = self.directory / "package"
        package.mkdir()
        (package / "crystal").symlink_to(Path(crystal.__file__).resolve().parent)
        self.log = self.directory / "log"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [str(home / "bin" / "python"), "-m", "crystal.backends.cerebras.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.directory,
                env=environment.process_environment(home, package),
                start_new_session=True,  # Ctrl-C is for the loop, which saves first
            )
        self.places = {"spool": str(self.directory), "package": str(package), "artifact_dir": str(self.directory)}
        weakref.finalize(self, _end, self.child, self.directory)

    def tell(self, do: str, **arguments) -> None:
        """Send a command."""
        try:
            self.child.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.child.stdin.flush()
        except OSError:
            raise self._dead() from None

    def hear(self) -> dict:
        """The next line of answer. Raises CerebrasFailure with its one line when the other side failed or died."""
        line = self.child.stdout.readline()
        if not line:
            raise self._dead()
        answer = json.loads(line)
        if "error" in answer:
            raise CerebrasFailure(f"cerebras: {answer['error']}")
        return answer

    def ask(self, do: str, **arguments) -> dict:
        """A command and its end."""
        self.tell(do, **arguments)
        return self.hear()["done"]

    def close(self) -> None:
        _end(self.child, self.directory)

    def _dead(self) -> CerebrasFailure:
        self.child.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        last = lines[-1] if lines else "no message"
        return CerebrasFailure(f"cerebras: its process ended with {self.child.returncode}: {last}")


def _end(child: subprocess.Popen, directory: Path) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # a command that was not read
            pipe.close()
    shutil.rmtree(directory, ignore_errors=True)


class CerebrasBackend(OneProcess):
    """See `Backend` for the methods."""

    def __init__(
        self,
        setup: Setup,
        config: CerebrasConfig,
        directory: Path,
    ):
        if config.device == "csx" and config.cluster is None:
            raise ConfigError(
                "backend.cluster: expected a system's mgmt_address with device: csx; with none, "
                "`crystal cerebras lower` goes as far as it goes without"
            )
        if setup.curriculum is None:
            raise ValueError("setup.curriculum: expected the curriculum, whose learning rates are compiled")
        self.keep(setup)
        self.curriculum, self.config = setup.curriculum, config
        self.job = make_job(setup.model, setup.plan, setup.optimizer, setup.curriculum, setup.n_sources, config)
        shared = config.cluster and (config.cluster.spool or directory)
        self.process = Process(config.environment, shared)
        self.spool = self.process.directory
        self.process.ask("start", job=self.job | self.process.places)
        self.session: int | None = None  # next step of the session that is open
        self.session_end: int | None = None
        self.optimizer_step = 0

    def initialise(self) -> None:
        self._load(lambda _: initial_weights(self.plan, self.seed), None)

    def reset_optimizer(self) -> None:
        self._end_session()
        self.process.ask("reset")
        self.optimizer_step = 0

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> StepResult:
        micro_batches = list(micro_batches)
        spool.put(self.spool, step, self._arrays(micro_batches))
        if self.session != step:
            self._end_session()
            self._begin_session(step, len(micro_batches[0].ids_BT))
        answer = self.process.hear()
        spool.drop(self.spool, step)
        loss, norm, applied, nll, tokens = answer["values"]
        self.optimizer_step += int(applied)
        self.session = step + 1
        if self.session_end is not None and step == self.session_end:
            self.process.hear()
            self.session = None
        as_tensor = torch.tensor
        return StepResult(as_tensor(loss), as_tensor(norm), as_tensor(applied), as_tensor(nll), as_tensor(tokens))

    def _begin_session(self, step: int, micro_batch_size: int) -> None:
        steps = None
        if self.config.device == "csx":
            stage = self.curriculum.stage_at(step - 1)
            steps = min(self.config.cluster.session_steps, stage.first_step + stage.steps - step + 1)
        self.session_end = None if steps is None else step + steps - 1
        self.process.tell("train", first=step, steps=steps, micro_batch_size=micro_batch_size)

    def _end_session(self) -> None:
        """Have the worker listen to commands again; on CSX a session ends where it was announced."""
        if self.session is None:
            return
        if self.session_end is not None:
            raise ConfigError(
                f"backend.cluster.session_steps: step {self.session - 1} is inside a session, which ends at step "
                f"{self.session_end}; validation and checkpoints must fall on ends of sessions"
            )
        spool.end(self.spool, self.session)
        self.process.hear()
        spool.drop(self.spool, self.session)
        self.session = None

    def eval_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        self._end_session()
        spool.put(self.spool, 0, self._arrays([batch]))
        answer = self.process.ask("eval", step=0)
        spool.drop(self.spool, 0)
        return torch.tensor(answer["nll"]), torch.tensor(answer["tokens"])

    def _arrays(self, batches: Sequence[MicroBatch]) -> dict[str, np.ndarray]:
        """All rows of a step, in the types that the system takes."""
        one_hot = torch.nn.functional.one_hot(torch.cat([b.sources_B for b in batches]), self.n_sources)
        arrays = {
            "ids_BT": torch.cat([b.ids_BT for b in batches]).int(),
            "labels_BT": torch.cat([b.labels_BT for b in batches]).int(),
            "weights_BT": torch.cat([b.weights_BT for b in batches]),
            "sources_BS": one_hot.float(),
        }
        if self.model_config.document_mask:
            arrays["documents_BT"] = torch.cat([b.documents_BT for b in batches]).int()
        return {key: value.numpy() for key, value in arrays.items()}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        self._end_session()
        file = self.spool / "state.mdl"
        file.unlink(missing_ok=True)
        saved = Path(self.process.ask("save", file=str(file))["file"])
        yield from mdl.state_tensors(mdl.read(saved))[1]
        file.unlink(missing_ok=True)

    def scalars(self) -> dict:
        return {"optimizer_step": self.optimizer_step}

    def load(self, tensors: Callable[[str], Iterable[tuple[str, Tensor]]], scalars: dict | None) -> None:
        updates = scalars["optimizer_step"] if scalars else 0
        self._load(tensors, updates or None)

    def _load(self, tensors: Callable[[str], Iterable[tuple[str, Tensor]]], updates: int | None) -> None:
        self._end_session()
        file = self.spool / "load.mdl"
        about = {"optimizer_step": updates or 0}
        try:
            betas, with_optimizer = self.optimizer_config.betas, updates is not None
            mdl.write_state(file, self.job["groups"], betas, about, tensors, with_optimizer, durable=False)
        except ValueError as error:
            raise CheckpointError(f"checkpoint: expected every tensor of the model: {error}") from None
        self.process.ask("load", file=str(file), updates=updates)
        file.unlink()
        self.optimizer_step = updates or 0

    def decoder(self) -> Decoder:
        decoder = build(self.model_config, self.plan)
        weights = {k.removeprefix("model."): v for k, v in self.state() if k.startswith("model.")}
        decoder.load_state_dict(weights, assign=True)
        return decoder

    def groups(self) -> Sequence[dict]:
        return self.job["groups"]

    def describe(self) -> dict:
        return {
            "name": "cerebras",
            "device": self.config.device,
            "cerebras_pytorch": environment.VERSION,
            "compute_dtype": self.config.compute_dtype,
            "weights_dtype": "fp32",
            "exact_clipping": True,
            "gradient_accumulation": True,
            "layouts": ["single process"]
            if self.config.device == "cpu"
            else [f"{self.config.cluster.num_csx} systems"],
        }
