"""Runs llama.cpp on a GGUF file in a process of its own, which an abort of it ends alone; `llama_cpp` starts it.

Run as a file. stdin: JSON {library, model, rows: [[id]], texts: [str], prompt: [id], greedy: n, cache: fp32|fp16,
threads}; argv[1]: a .npz with `logits_i` fp32 [T, V] of each row, `tokens_i` of each text (with the begin token where
the file wants one, no special tokens parsed), `greedy`. Imports nothing of crystal's.

The library is the C interface inside xllamacpp's extension module. The header's structs grow with its versions, so what
is set in them is found by what surrounds it, and nothing is assumed where that does not fit.
"""

import ctypes
import json
import sys

import numpy as np

ROOM = 2048  # more than any of its parameter structs takes


class Params(ctypes.Structure):
    """A parameter struct by value. Large ones are returned through and passed in memory: more room does no harm."""

    _fields_ = [("raw", ctypes.c_ubyte * ROOM)]


class Batch(ctypes.Structure):
    """llama_batch, which has been the same since 2023."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def load(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    pointer = ctypes.c_void_p
    signatures = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_model_default_params": (Params, []),
        "llama_context_default_params": (Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Params]),
        "llama_init_from_model": (pointer, [pointer, Params]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_set_n_threads": (None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_batch_init": (Batch, [ctypes.c_int32] * 3),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (ctypes.c_int32, [pointer, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        "llama_tokenize": (
            ctypes.c_int32,
            [pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
            + [ctypes.c_bool] * 2,
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name, None)
        if function is None:
            sys.exit(f"{path}: has no {name}: this build does not show llama.cpp's own interface")
        function.restype, function.argtypes = result, arguments
    return lib


def set_context(params: Params, tokens: int, cache: str) -> Params:
    """Room for `tokens`, all in one batch, plain attention, keys and values in `cache`."""
    ints = np.frombuffer(params.raw, dtype=np.int32)  # a view
    # n_ctx, n_batch, n_ubatch, n_seq_max; later rope scaling, pooling, attention and flash attention, all -1 (unset),
    # then behind floats and a callback the types of keys and values, both 1 (F16)
    unset = next((i for i in range(4, 32) if (ints[i : i + 4] == -1).all()), None)
    types = unset and next((i for i in range(unset + 4, 48, 2) if (ints[i : i + 2] == 1).all()), None)
    if tuple(ints[[0, 1, 3]]) != (512, 2048, 1) or types is None:
        sys.exit("this version of llama.cpp keeps its context's parameters in another order than is known here")
    ints[0] = ints[1] = ints[2] = tokens
    ints[unset + 3] = 0  # flash attention off
    ints[types : types + 2] = 0 if cache == "fp32" else 1
    return params


class Context:
    def __init__(self, lib: ctypes.CDLL, work: dict, tokens: int):
        self.lib = lib
        self.model = lib.llama_model_load_from_file(work["model"].encode(), lib.llama_model_default_params())
        if not self.model:
            sys.exit(f"{work['model']}: llama.cpp does not load it: {LOG[-1] if LOG else 'no reason given'}")
        params = set_context(lib.llama_context_default_params(), tokens, work["cache"])
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"{work['model']}: llama.cpp makes no context: {LOG[-1] if LOG else 'no reason given'}")
        lib.llama_set_n_threads(self.context, work["threads"], work["threads"])
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, last_only: bool = False) -> np.ndarray:
        """fp32 logits [T, V] of ids at positions start …; of the last alone [1, V]."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = not last_only or i == len(ids) - 1
        code = self.lib.llama_decode(self.context, batch)
        if code:
            sys.exit(f"llama_decode ended with {code}: {LOG[-1] if LOG else 'no reason given'}")
        wanted = [len(ids) - 1] if last_only else range(len(ids))
        rows = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.size,)).copy() for i in wanted
        ]
        self.lib.llama_batch_free(batch)
        return np.stack(rows)

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        found = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), True, False)
        return list(ids[:found])


LOG: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def hear(level: int, text: bytes, _: int) -> None:
    if level >= 3 and text.strip():  # warnings and errors
        LOG.append(text.decode(errors="replace").strip())


def main() -> None:
    work = json.load(sys.stdin)
    lib = load(work["library"])
    lib.llama_log_set(hear, None)
    lib.llama_backend_init()
    longest = max([32, len(work["prompt"]) + work["greedy"], *map(len, work["rows"])])
    context = Context(lib, work, longest)
    found = {}
    for i, row in enumerate(work["rows"]):
        context.clear()
        found[f"logits_{i}"] = context.decode(row, 0)
    for i, text in enumerate(work["texts"]):
        found[f"tokens_{i}"] = np.array(context.tokenize(text), dtype=np.int64)
    context.clear()
    greedy, unread, start = [], work["prompt"], 0
    for _ in range(work["greedy"]):
        logits = context.decode(unread, start, last_only=True)[0]
        start += len(unread)
        unread = [int(logits.argmax())]
        greedy += unread
    found["greedy"] = np.array(greedy, dtype=np.int64)
    np.savez(sys.argv[1], **found)


if __name__ == "__main__":
    main()
