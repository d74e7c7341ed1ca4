"""`crystal export CKPT --to native`: a directory that any transformers, vLLM or llama.cpp converter loads as it is.

The weights are folded (`crystal.interop.fold`) into a plain StableLM or LLaMA: no code of ours or of LLM360's is needed
to load them. It is for inference: folded weights are not muP's any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from crystal.checkpoint import Checkpoint, locate, read
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.files import expect_new, from_json, regular_bytes, replacing
from crystal.inference.load import model_config_of, tokenizer_of
from crystal.interop.fast_tokenizer import tokenizer_files, write_tokenizer
from crystal.interop.fold import Folded, assembled, fold
from crystal.interop.huggingface_write import SHARD_BYTES, write_weights
from crystal.interop.token_ids import begins, exported, first
from crystal.zoo.build import parameter_count
from crystal.zoo.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Opened:
    """A checkpoint on its way out: what it is, its fold, its tokenizer (None: saved without), its tokens' ids."""

    source: Checkpoint
    config: ModelConfig
    folded: Folded
    tokenizer: object | None
    tokenizer_file: Path | None
    bos: bool  # whether a text starts with the begin token
    ids: dict[str, int | list[int] | None]  # bos_token_id, eos_token_id, perhaps pad_token_id
    template: str | None

    @property
    def bos_id(self) -> int | None:
        return self.ids.get("bos_token_id")

    @property
    def eos_id(self) -> int | None:
        return first(self.ids.get("eos_token_id"))

    def said(self, out: Path, form: str, files: list[str]) -> dict:
        """{out, form, files, architecture, parameters, folded} of an export, JSON-ready."""
        return {
            "out": str(out),
            "form": form,
            "files": files,
            "architecture": self.folded.architecture,
            "parameters": self.folded.parameters,
            "folded": self.folded.changes,
        }

    @contextmanager
    def written_to(self, path: Path) -> Iterator[Path]:
        """`replacing(path)`. Raises RunError when the disk fails, CheckpointError where tensors are not its model's."""
        try:
            with replacing(path, alone=True) as aside:
                yield aside
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(f"{self.source.directory}: expected the tensors of its model: {error}") from None


def open_for_export(checkpoint: Path) -> Opened:
    """A checkpoint, or a run's latest. Raises ConfigError where it cannot be folded, CheckpointError as `read`."""
    source = read(locate(Path(checkpoint)))
    config = model_config_of(source)
    try:
        folded = fold(config)
    except ConfigError as error:
        raise ConfigError(f"{source.directory}: model.{error}") from None
    tokenizer = tokenizer_of(source)
    ids = exported(source.state, tokenizer)
    bos = tokenizer is not None and begins(source.state, ids)
    file = None if tokenizer is None else source.directory / source.state["tokenizer"]
    return Opened(source, config, folded, tokenizer, file, bos, ids, chat_template(source.directory))


def chat_template(directory: Path) -> str | None:
    """The chat template that lies beside a checkpoint's tokenizer, as a file of its own or in its config.

    Raises CheckpointError for a file that cannot be read. Of several named ones the default.
    """
    file = directory / TEMPLATE
    try:
        if file.is_file():
            return regular_bytes(file).decode()
        file = directory / "tokenizer_config.json"
        found = from_json(regular_bytes(file)).get("chat_template") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def export_native(checkpoint: Path, to: Path, dtype: str = "fp32") -> dict:
    """A checkpoint (or a run's latest) as a plain StableLM or LLaMA directory at `to`.

    dtype: fp32, bf16 or fp16. Returns {out, form, files, architecture, parameters, folded}, JSON-ready. Written aside,
    then renamed. Raises ConfigError when `to` exists or no plain architecture computes this model, RunError when the
    disk fails.
    """
    to = Path(to)
    expect_new(to, "directory")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)} for native, got {dtype}")
    opened = open_for_export(checkpoint)
    with opened.written_to(to) as aside:
        aside.mkdir(parents=True)
        files = _write(aside, opened, dtype)
    return opened.said(to, "native", files)


def _write(directory: Path, opened: Opened, dtype: str) -> list[str]:
    folded = opened.folded
    shapes = {made.name: made.shape for made in folded.tensors}
    tensors = assembled(folded.tensors, opened.source.tensors("model"), dict.fromkeys(shapes, DTYPES[dtype]))
    files = write_weights(directory, shapes, tensors, DTYPES[dtype], SHARD_BYTES)
    # said even where there is none: transformers gives a StableLM whose config.json is silent the ids 0
    config = folded.config | opened.ids
    config["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")  # transformers 4 and 5 read this name
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(
            {k: v for k, v in opened.ids.items() if v is not None} | {"do_sample": False}, indent=2
        ),
        "README.md": model_card(opened, dtype),
    }
    if opened.template is not None:
        texts[TEMPLATE] = opened.template
    for name, text in texts.items():
        (directory / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    files += texts
    if opened.tokenizer is not None:
        arguments = opened.tokenizer, opened.tokenizer_file, opened.bos, opened.eos_id, opened.config.max_seq_len
        files += write_tokenizer(directory, tokenizer_files(*arguments))
    return files


def model_card(opened: Opened, dtype: str) -> str:
    """README.md of an exported directory: what it is, where it comes from, what was folded."""
    folded, state = opened.folded, opened.source.state
    name = {"stablelm": "StableLM", "llama": "LLaMA"}[folded.architecture]
    where = [f"`{opened.source.directory.name}`"]
    if "step" in state:
        where.append(f"step {state['step']}")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [crystal, " + folded.architecture + "]",
        "---",
        f"# A plain {name}, folded from a checkpoint of crystal",
        "",
        f"From {', '.join(where)}: {parameter_count(opened.config):,} parameters of ours, {folded.parameters:,} here, "
        f"in {dtype}. It loads without remote code: `AutoModelForCausalLM.from_pretrained(DIR)`.",
        "",
    ]
    if folded.changes:
        lines += [
            "What this architecture has no word for is folded into the weights. In exact arithmetic the logits are the "
            "original's; the proof is in crystal's docs/interop.md.",
            "",
            *(f"- {change}" for change in folded.changes),
            "",
            "**For inference.** The weights are no longer parametrized as they were trained: learning rates, weight "
            "decay and initialization of muP do not fit them. Train from the checkpoint itself.",
        ]
    else:
        lines += ["Nothing was folded: the tensors are the checkpoint's own."]
    return "\n".join(lines)
