"""How a mistake is told: one line on stderr, and with `--json` an object on stdout as well."""

from __future__ import annotations

import json
import os
import sys

from crystal.options import is_first, print_out


def complain(message: str, file: str | None = None, key: str | None = None) -> None:
    """Say what was wrong. Of several processes the first speaks; once they train, any, for it may be its own mistake.

    file, key: the config file and the dotted key it is about, where they are known. Whether the command line asks for
    JSON is read off its words, for the mistake may be one in the words themselves.
    """
    distributed = sys.modules.get("torch.distributed")
    if is_first():
        if _wants_json(sys.argv[1:]):
            print_out(json.dumps({"error": {"kind": "config", "message": message, "file": file, "key": key}}))
        print(f"crystal: {message}", file=sys.stderr)
    elif distributed is not None and distributed.is_initialized():
        print(f"crystal: process {os.environ['RANK']}: {message}", file=sys.stderr)


def _wants_json(words: list[str]) -> bool:
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options
