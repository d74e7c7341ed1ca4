"""Our own kernels with one fault each: a load or store of a kernel loses its mask. Run under TRITON_INTERPRET=1.

The sanitizer or the comparison with fp64 must notice every one. Prints a JSON line for each.
"""

import ast
import importlib.util
import inspect
import json
import sys
import tempfile
from pathlib import Path

import torch

from crystal.kernels import cross_entropy, norm, norm_kernels, rope, swiglu  # noqa: F401
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.dispatch import Kernel
from crystal.kernels.proof.accuracy import errors
from crystal.kernels.proof.interpreter import Sanitizer, repair

HEAD = "import triton.language as tl\nfrom crystal.kernels.dispatch import kernel\n\n"
NARROW = 200  # elements of a row that "fit in registers" here, where a program costs milliseconds
RUNS = {  # module of kernels: (the module that launches them, operators and odd shapes that reach all of them)
    "norm_kernels": ("norm", [
        ("add_layer_norm_scaled", {"rows": 19, "width": 200, "pitch": 328}),  # two programs backward
        ("add_layer_norm_scaled", {"rows": 3, "width": 201}),  # over NARROW: by the kernels for wide rows
    ]),
    "cross_entropy": ("cross_entropy", [
        ("cross_entropy_full", {"rows": 5, "vocab": 1503}),
        ("cross_entropy", {"rows": 1, "vocab": 1503}),  # its label, -100, lies before the logits
    ]),
    "swiglu": ("swiglu", [("swiglu", {"rows": 3, "width": 33}), ("swiglu", {"rows": 5, "width": 33, "pitch": 47})]),
    "rope": ("rope", [
        (name, {"batch": 2, "seq": 5, "heads": 5, "kv_heads": 1, "head_dim": 20, "rotary_dim": 12})
        for name in ("rope_half_packed", "rope_interleaved_qk")
    ]),
}  # fmt: skip


def masked_accesses(tree: ast.Module) -> list[ast.Call]:
    """Calls of tl.load and tl.store with a mask, in the order of the text."""
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func) in ("tl.load", "tl.store")]
    return [x for x in calls if any(k.arg == "mask" for k in x.keywords)]


def kernels_of(module) -> dict[str, Kernel]:
    return {
        name: x
        for name, x in vars(module).items()
        if isinstance(x, Kernel) and x.function.__module__ == module.__name__
    }


def build(text: str, folder: str, number: int) -> dict[str, Kernel]:
    """Kernels of a source; Triton reads it again from its file."""
    path = Path(folder) / f"mutant_{number}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return kernels_of(module)


def noticed(runs: list) -> str | None:
    """What is found in these runs of operators, None if nothing is."""
    for name, shape in runs:
        operator = next(x for x in OPERATORS if x.name == name)
        with Sanitizer() as sanitizer:
            found = errors(operator, shape, torch.float32, operator.reference)
        if sanitizer.findings:
            return next(iter(sanitizer.findings))
        if any(not error.ours <= 1e-5 for error in found):
            return "not as fp64 has it"
    return None


def main(only: list[str]) -> None:
    for kernels_in, (launched_by, runs) in RUNS.items():
        if only and kernels_in not in only:
            continue
        source, launcher = (sys.modules[f"crystal.kernels.{name}"] for name in (kernels_in, launched_by))
        originals = kernels_of(source)
        text = HEAD + "\n\n".join(inspect.getsource(x.function) for x in originals.values())
        count = len(masked_accesses(ast.parse(text)))
        with tempfile.TemporaryDirectory() as folder:
            for number in range(-1, count):  # -1: nothing is wrong
                tree, fault = ast.parse(text), "none"
                if number >= 0:
                    call = masked_accesses(tree)[number]
                    inside = next(f.name for f in tree.body if isinstance(f, ast.FunctionDef) and call in ast.walk(f))
                    fault = f"{inside}: {ast.unparse(call)}"
                    call.keywords = [k for k in call.keywords if k.arg not in ("mask", "other")]
                for name, mutant in build(ast.unparse(tree), folder, number + 1).items():
                    if hasattr(launcher, name):
                        setattr(launcher, name, mutant)
                print(json.dumps({"module": kernels_in, "fault": fault, "noticed": noticed(runs)}), flush=True)


if __name__ == "__main__":
    repair()
    norm.WIDEST_FORWARD = norm.WIDEST_BACKWARD = NARROW
    main(sys.argv[1:])
