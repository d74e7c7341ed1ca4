"""What a search index of training text costs to build, and what looking up in it costs.

Text: documents of 1,000 tokens, Zipf-distributed (p ∝ 1/rank) over 32,000 ids, a tenth of them copies of earlier ones,
in a token store of rows of 2,048; and the store of a run, with --run. Each build is a fresh process, which imports the
room first. CPU-seconds are user + system of that process, with the checksums and the syncing of what is written; memory
is the most that was resident, above what it was before. Queries: how often 32 tokens of the text stand in it, and the
longest spans of a text of 256 tokens (eight pieces of the corpus with a token that is none between them), by our engine
and by the infini-gram package where it is installed, in one process over the mapped files, which the system holds in
memory. Opening compares checksums once a process, so that is in our engine's time, which is measured first. Run:
python benchmarks/trace_index.py [--millions 1,2.5,5,10] [--rounds 3] [--shard-tokens N] [--run RUN]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from crystal.analysis.index import build, index_directory
from crystal.analysis.lookup import Index
from crystal.analysis.shards import sorter
from crystal.data import pack
from crystal.data.store import ShardWriter, TokenStore
from crystal.memory import peak_rss_bytes

VOCAB, DOCUMENT, SEQ_LEN, COUNT_TOKENS, TEXT_TOKENS = 32_000, 1_000, 2_048, 32, 256


def synthetic_store(directory: Path, tokens: int) -> TokenStore:
    """A store of one source, written as `crystal prepare` would, without text or vocabulary."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, VOCAB - 2)
    documents = rng.choice(np.arange(3, VOCAB), (tokens // DOCUMENT, DOCUMENT), p=p / p.sum()).astype("<u2")
    documents[:, -1] = 2
    for i in range(10, len(documents), 10):
        documents[i] = documents[rng.integers(i)]
    (directory / "zipf").mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(b"")
    writer = ShardWriter(directory, "zipf", "train", SEQ_LEN, np.dtype("<u2"))
    for rows in pack.windows(documents, SEQ_LEN, True):
        writer.write(rows)
    writer.close()
    record = {"path": "zipf", "license": "CC0-1.0", "bytes": 0, "split": "train", "tokens": DOCUMENT}
    lines = (json.dumps({"id": f"{i:016x}", **record, "start": i * DOCUMENT}) for i in range(len(documents)))
    index = "".join(f"{line}\n" for line in lines).encode()
    (directory / "zipf" / "documents.jsonl").write_bytes(index)
    entry = {
        "licenses": ["CC0-1.0"], "documents": len(documents), "val_documents": 0, "tokens": documents.size,
        "val_tokens": 0, "text_bytes": 0, "train_rows": sum(s.rows for s in writer.shards), "val_rows": 0,
        "documents_sha256": hashlib.sha256(index).hexdigest(), "shards": [s.model_dump() for s in writer.shards],
    }  # fmt: skip
    vocabulary = {"sha256": "0", "vocab_size": VOCAB, "n_base": VOCAB, "added_tokens": False, "path": "tokenizer.model"}
    manifest = {
        "version": 1, "seq_len": SEQ_LEN, "overlap": True, "bos": True, "dtype": "uint16", "tokenizer": vocabulary,
        "corpus": {"name": "zipf", "fingerprint": "0"}, "fingerprint": f"{tokens:064}", "sources": {"zipf": entry},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore.open(directory)


def build_in_child(directory: str, shard_tokens: int | None, send) -> None:
    sorter()
    before, cpu, wall = peak_rss_bytes(), time.process_time(), time.perf_counter()
    facts = build(TokenStore.open(directory), shard_tokens)
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    send.send(facts | spent | {"memory": peak_rss_bytes() - before})


def measure_builds(store: TokenStore, shard_tokens: int | None, rounds: int) -> list[dict]:
    results = []
    for _ in range(rounds):
        shutil.rmtree(index_directory(store), ignore_errors=True)
        receive, send = get_context("spawn").Pipe(duplex=False)
        child = get_context("spawn").Process(target=build_in_child, args=(str(store.directory), shard_tokens, send))
        child.start()
        send.close()
        results.append(receive.recv())
        child.join()
    return results


def milliseconds(work, queries: list) -> dict:
    work(queries[0])
    times = []
    for query in queries:
        began = time.perf_counter()
        work(query)
        times.append((time.perf_counter() - began) * 1e3)
    return {"median_ms": statistics.median(times), "p95_ms": float(np.quantile(times, 0.95))}


def measure_queries(store: TokenStore, index: Index) -> dict:
    rng = np.random.default_rng(1)

    def piece(tokens: int) -> list[int]:
        source = store.sources[rng.integers(len(store.sources))]
        row = store.row(source, int(rng.integers(store.rows(source))))
        start = int(rng.integers(max(len(row) - tokens, 1)))
        return row[start : start + tokens].tolist()

    counted = [piece(COUNT_TOKENS) for _ in range(400)]
    texts = [[i for _ in range(8) for i in (*piece(TEXT_TOKENS // 8 - 1), 1 << 20)] for _ in range(100)]
    return {
        "count": milliseconds(index.count, counted),
        "trace": milliseconds(lambda ids: index.spans(ids, 8), texts),
    }


def show(name: str, builds: list[dict], store: TokenStore) -> dict:
    cpu = sorted(b["cpu_s"] for b in builds)
    result = {
        "text": name, "tokens": builds[0]["tokens"], "shards": builds[0]["shards"], "bytes": builds[0]["bytes"],
        "cpu_s": cpu, "wall_s": sorted(b["wall_s"] for b in builds), "memory": max(b["memory"] for b in builds),
        "queries": {},
    }  # fmt: skip
    print(
        f"{name:>12}: {result['tokens']:>11,} tokens, {result['shards']} shards: CPU {statistics.median(cpu):.2f} s "
        f"({cpu[0]:.2f} to {cpu[-1]:.2f}), {1e7 * statistics.median(cpu) / result['tokens']:.2f} s per 10 M; memory "
        f"{result['memory'] / 1e6:.0f} MB; files {result['bytes'] / 1e6:.0f} MB"
    )
    engines = ["own", *(["infini-gram"] if importlib.util.find_spec("infini_gram") else [])]
    for engine in engines:
        began = time.perf_counter()
        index = Index.open(store, engine=engine)
        opened = (time.perf_counter() - began) * 1e3
        result["queries"][engine] = found = measure_queries(store, index)
        shown = "; ".join(f"{k} {t['median_ms']:.3f} ms, p95 {t['p95_ms']:.3f}" for k, t in found.items())
        print(f"{'':>14}{engine}: opened in {opened:.0f} ms; {shown}")
    return result


def machine() -> dict:
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    packages = {}
    for name in ("crystal-zoo", "numpy", "pydivsufsort", "infini-gram"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = version(name)
    python = platform.python_version()
    return {"processor": model, "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": python, **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", default="1,2.5,5,10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-tokens", type=int)
    parser.add_argument("--run", help="a run directory or file, whose store is copied and measured too")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    results = {"machine": machine(), "texts": []}
    print(results["machine"])
    with tempfile.TemporaryDirectory() as place:
        for millions in options.millions.split(","):
            store = synthetic_store(Path(place, millions), int(float(millions) * 1e6))
            builds = measure_builds(store, options.shard_tokens, options.rounds)
            results["texts"].append(show(f"zipf {millions} M", builds, store))
        if options.run:
            from crystal.analysis.trace_input import open_run

            ledger, _ = open_run(options.run)
            copy = Path(place, "run")
            shutil.copytree(ledger.store.directory, copy, ignore=shutil.ignore_patterns("index"))
            store = TokenStore.open(copy)
            builds = measure_builds(store, options.shard_tokens, options.rounds)
            results["texts"].append(show(store.manifest["corpus"]["name"], builds, store))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
