# Needs nothing but Python 3.11 to 3.13 with venv. requirements.txt pins whatever is installed here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Huge pages save a CPU step up to a fifth of its time (glibc; ignored elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-fast lint docs install install-dev pins

demo: install
	$(BIN)/python -m btx_jax.launch --config=configs/demo.py

test: install-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal

# What another jax could change: numbers, compiled programs, files.
FAST := $(addprefix tests/,checkpoints/test_training_state.py models/test_llama.py models/test_moe.py \
  data/test_prepare.py parallel/test_hosts.py parallel/test_sharding.py training/test_step.py \
  training/test_losses.py)
test-fast: install-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal $(FAST)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# README.md and docs/ as a site in site/; a link or an anchor that leads nowhere is an error (which
# --quiet would hide).
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# Modules are compiled when they are first imported: most never are.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
  -c requirements.txt

$(VENV)/.installed: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo,report]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# requirements.txt made anew from pyproject.toml's ranges; a pin changes only where it must (delete
# its line for the newest). Needs uv. Markers of other systems than Linux are left out.
pins:
	uv pip compile --quiet --universal --python-version=3.11 --extra=dev --no-annotate \
	  --custom-compile-command='make pins' --output-file=requirements.txt pyproject.toml
	sed -i '/python_full_version/! s/ ;.*//' requirements.txt
