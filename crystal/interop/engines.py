"""Other people's inference engines on a file or directory that was exported: the same questions to each."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crystal.interop import llama_cpp
from crystal.interop.llama_cpp import Answers
from crystal.interop.native import DTYPES


@dataclass(frozen=True)
class Questions:
    """rows: token ids whose logits are compared, [T] each; prompt: ids that are continued greedily by `greedy` tokens;
    texts: what is tokenized, with the begin token where a text starts with one."""

    rows: list[list[int]]
    prompt: list[int]
    greedy: int
    texts: list[str]


def native(directory: Path, dtype: str, asked: Questions) -> Answers:
    """transformers' own classes on a directory of plain architecture."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], local_files_only=True).eval()
        tokens = None
        if asked.texts:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            tokens = [tokenizer(text).input_ids for text in asked.texts]
        return _of_transformers(model, asked, tokens)


def published(directory: Path, dtype: str, asked: Questions) -> Answers:
    """The class that goes along with the published form as remote code, registered by `crystal.interop.hf`."""
    from transformers import AutoModelForCausalLM

    import crystal.interop.hf  # noqa: F401  registers

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], local_files_only=True).eval()
        return _of_transformers(model, asked, None)


def llama(file: Path, dtype: str, asked: Questions) -> Answers:
    """llama.cpp on a GGUF file, keys and values in fp32 whatever the weights are."""
    return llama_cpp.ask(file, asked.rows, asked.texts, asked.prompt, asked.greedy)


def missing(engine: str) -> str | None:
    """Why an engine cannot run here, with the line that mends it; None: it can."""
    if engine == "llama.cpp":
        if importlib.util.find_spec("gguf") is None:
            return "pip install gguf"
        return None if llama_cpp.library() else llama_cpp.INSTALL
    if engine == "transformers-remote-code" and importlib.util.find_spec("crystal.interop.hf") is None:
        return "crystal.interop.hf is not there"
    return None


def _of_transformers(model: Any, asked: Questions, tokens: list[list[int]] | None) -> Answers:
    with torch.inference_mode():
        logits = [model(torch.tensor([row])).logits[0].float().numpy() for row in asked.rows]
        greedy: Sequence[int] = []
        if asked.greedy:
            settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            prompt = torch.tensor([asked.prompt])
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=asked.greedy, **settings
            )
            greedy = out[0, len(asked.prompt) :].tolist()
    return Answers(logits, list(greedy), tokens)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
