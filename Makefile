# make demo | make test | make check | make bench | make notebooks | make gpu-check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check bench install browser format notebooks gpu-check

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# The report page is tested in a real browser. Elsewhere than on Debian or Ubuntu, install Chromium yourself.
browser:
	@command -v chromium >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "no apt-get: install chromium yourself, or its tests are skipped"; exit 0; }; \
	  SUDO=$$( [ "$$(id -u)" = 0 ] || echo sudo ); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq chromium >/dev/null || echo "chromium could not be installed"; }

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/demo.sh

# A process per core, each with one thread.
test: install browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/peers.py quality
	$(BIN)/python benchmarks/peers.py speed

notebooks: install
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

# Where a GPU is there may be no network: this installs nothing, and needs only torch.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py
