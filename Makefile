PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# One environment for everything: the development tools are small beside torch, and a second one would hold torch twice.
STAMP := $(VENV)/.installed

# A process per core: tests are too small to use more than one each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

# vLLM for CPUs lies over the environment above: its own requirements are other versions, and much that no test needs.
VLLM_VENV ?= $(VENV)-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test check test-gpu test-vllm test-vllm-all clean

demo: $(STAMP)
	$(BIN)/radlads demo

test: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy src
	$(PYTEST) -m "not gpu"

test-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	    echo "make test-gpu needs a CUDA GPU, and PyTorch sees none here: run it on a machine with one" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gpu]'
	$(BIN)/pytest -m gpu --durations=10

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin -m "not slow" --durations=5

test-vllm-all: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin --durations=5

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last, so an installation that failed is tried again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "radlads needs Python 3.11 or newer, which '$(PYTHON)' is not: run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM_STAMP): $(STAMP) tests/vllm_plugin/requirements.txt
	$(BIN)/python -m venv --clear $(VLLM_VENV)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > "$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/under.pth"
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	    -r tests/vllm_plugin/requirements.txt
	@touch $@
