# Two commands: `make demo` and `make test`. Each sets up .venv first, from requirements.lock. `make proof` is what CI runs
# after the suite (hostile input, long kills); `make fuzz FUZZ="--count 10000 --seed 5"` as much of it as one likes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SAY := $(BIN)/crystal generate runs/demo --max-new-tokens 60 --temperature 0.7 --top-p 0.9

.PHONY: demo test proof fuzz lint clean

demo: $(READY)
	$(BIN)/crystal train demo
	@echo; echo "--- after stage 1 (English):"
	@$(SAY) --stage 1 --prompt "The President of the United States"
	@echo; echo "--- after stage 2 (English and code):"
	@$(SAY) --stage 2 --prompt "def __init__(self"
	@echo; echo "--- after stage 3 (Python and web):"
	@$(SAY) --stage 3 --prompt ".button {"
	@echo; echo "--- does it know anything?"
	@$(BIN)/crystal eval runs/demo --suite proxy --limit 100
	@echo; echo "--- is its muP right?"
	@$(BIN)/crystal coord-check demo --out runs/demo/coord-check
	@echo; echo "The run is in runs/demo: loss.png, metrics.jsonl, manifest.json, checkpoints/, evals/."

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

proof: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m proof

fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m hostile.fuzz $(FUZZ)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/shellcheck .ci/run benchmarks/*.sh docs/examples/*.sh

clean:
	rm -rf .venv

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crystal needs Python 3.11 or newer; say which: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
