# Each target is enough by itself on a machine with Python 3.11 or newer: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slurm chaos gpu lint clean

quickstart: .venv/installed
	$(BIN)/mixerbench sweep sweeps/quickstart.yaml --workers 2
	$(BIN)/mixerbench report sweeps/quickstart.yaml

# A file's tests share what they set up. The clusters' tests mostly wait, so more of them than cores go side by side; they
# are skipped where Slurm is not installed (tests/virtual_slurm.sh install).
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slurm'
	$(MAKE) test-slurm

test-slurm: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --maxschedchunk 1 -m slurm

# Two hundred runs under faults; another order of faults: make chaos SEED=8.
SEED ?= 7
chaos: .venv/installed
	MIXERBENCH_NEEDS_SLURM=1 MIXERBENCH_CHAOS_RUNS=200 MIXERBENCH_CHAOS_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_chaos.py -s

# What only a GPU can show: tests marked gpu and the conformance suite with every backend; OUT holds what was found.
OUT ?= results/gpu
gpu: .venv/installed
	PYTHON=$(BIN)/python tests/gpu.sh $(OUT)

lint: .venv/installed
	$(BIN)/ruff check bench tests benchmarks examples

.venv/installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "mixerbench needs Python 3.11 or newer; '$(PYTHON)' is not there. Set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mixerbench needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V). Set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
