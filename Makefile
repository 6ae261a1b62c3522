# Everything happens in .venv and needs only python3 (3.10 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# CPU builds of torch are a tenth of the size: used on Linux without an NVIDIA driver if this index answers.
# `make TORCH_INDEX= ...` leaves the choice to pip.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
INPUTS := setup.cfg pyproject.toml constraints.txt
export HF_HUB_DISABLE_TELEMETRY = 1

# Libraries of quantised weights, used by one test file; torchao prints warnings wherever it is installed.
QUANTIZED := torchao==0.18.0 bitsandbytes==0.50.2

# What the oldest dependencies are tried with: no real model, no count of what newer transformers imports, and no plugins
# of pytest, some of which need newer dependencies.
OLDEST := tests/eviction/test_cache.py tests/eviction/test_cache_rows.py tests/eviction/test_plan.py \
  tests/retention/test_gates.py tests/retention/test_checkpoint.py tests/retention/test_attach.py \
  tests/test_checked.py tests/test_cli.py tests/test_help.py

.PHONY: help demo test quantized oldest lint docs clean
help:
	@echo "make demo   set up, then show gates at work on a real model (args: ARGS=--quick)"
	@echo "make test   set up, then run all tests (args: PYTEST_ARGS='tests/eviction -x')"
	@echo "make quantized  test models with quantised weights; their libraries are installed beside .venv"
	@echo "make oldest  test the core with the oldest dependencies of setup.cfg, installed beside .venv"
	@echo "make lint   set up, then ruff and basedpyright"
	@echo "make docs   set up, then build the documents into build/docs; broken links and anchors are errors"
	@echo "make clean  remove .venv and what was built; downloads stay in the cache folder"

demo: $(VENV)/.ready-demo
	$(BIN)/tenure demo $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quantized: $(VENV)/.ready-dev build/quantized/.ready
	PYTHONPATH=build/quantized $(BIN)/python -m pytest -n 0 tests/eviction/test_quantized.py

build/quantized/.ready: Makefile | $(BIN)/python
	@rm -rf build/quantized
	@$(PIP) install -q --no-deps --target build/quantized $(QUANTIZED)
	@touch $@

oldest: $(VENV)/.ready-dev build/oldest/.ready
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=build/oldest $(BIN)/python -m pytest -q -p pytest_timeout \
	  -m 'not real' --deselect tests/test_cli.py::test_importing_the_library_leaves_the_compile_stack_alone $(OLDEST)

build/oldest/.ready: constraints-oldest.txt | $(BIN)/python
	@rm -rf build/oldest
	@$(PIP) install -q --no-deps --target build/oldest -r constraints-oldest.txt
	@touch $@

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/basedpyright

docs: $(VENV)/.ready-dev
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Without Debian's python3-venv there is no ensurepip, but the system's pip can fill an environment that has none.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is not Python 3.10 or newer, which tenure needs; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Creating $(VENV)"
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; fi \
	  || { rm -rf $(VENV); echo "Cannot create a virtual environment: install venv for $(PYTHON)" \
	       "(on Debian and Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; }

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "Installing torch"
	@index=""; \
	if [ -n "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
	  && $(BIN)/python -c "import urllib.request as r; r.urlopen('$(TORCH_INDEX)/torch/', timeout=10)" 2>/dev/null; \
	then index="--extra-index-url $(TORCH_INDEX)"; fi; \
	$(PIP) install -q -c constraints.txt $$index torch
	@touch $@

$(VENV)/.ready-demo: $(INPUTS) $(VENV)/.torch
	@echo "Installing tenure and what the demo needs"
	@$(PIP) install -q -c constraints.txt -e '.[demo,train]'
	@touch $@

$(VENV)/.ready-dev: $(INPUTS) $(VENV)/.torch
	@echo "Installing tenure and what its tests and checks need"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@# An editable install is found by an import hook; these links let the type checker see the same names.
	@mkdir -p $(VENV)/typing/tenure
	@for package in retention training eviction serving eval scripts; do \
	  ln -sfn ../../../$$package $(VENV)/typing/tenure/$$package; done
	@for file in __init__.py __main__.py checked.py documents.py py.typed; do ln -sf ../../../tenure/$$file $(VENV)/typing/tenure/$$file; done
	@touch $@ $(VENV)/.ready-demo
