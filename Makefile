# Two commands matter: `make demo` and `make test`. Both make .venv and install what they need first.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo photos test test-cluster faults faults-cluster bench study scale lint format install clean

demo: install
	.venv/bin/lvm-ray demo recipes/demo.yaml

photos: install
	.venv/bin/lvm-ray demo recipes/photos.yaml

test: install lint
	.venv/bin/python -m pytest

# A real Ray cluster on three hosts that are network namespaces of this machine, as root
test-cluster: install
	.venv/bin/python -m pytest tests/cluster

# What kills, full disks and damaged files leave behind: runs/faults.json and docs/reliability.md; ONLY="name ..." for some
faults: install
	.venv/bin/python -m tests.faults $(ONLY)

# What they leave behind on a cluster of three hosts, as root: runs/faults-cluster.json; ONLY="train/cut tune ..." for some
faults-cluster: install
	.venv/bin/python -m tests.cluster.faults $(ONLY)

# Ratios measured side by side: runs/bench.json and docs/benchmarks.md; ONLY=name for one of them
bench: install
	.venv/bin/python -m tests.bench $(ONLY)

# Comparisons over seeds: only rows that docs/results/*.jsonl still lacks
study: install
	.venv/bin/python -m tests.studies $(ONLY)

# docs/scale.md: what 100 million images would take on 8, 64 and 512 GPUs, computed anew
scale: install
	.venv/bin/python -m tests.scale

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

install: .venv/installed

# torch first and by itself, so that a CPU build that is at hand is taken and nothing pulls another; DeepSpeed is built
# from source without its C++ operators, against that torch.
.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (about two minutes)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) setuptools wheel packaging ninja py-cpuinfo numpy
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
