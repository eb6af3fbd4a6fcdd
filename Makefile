# Everything a fresh machine needs: Python (3.11.5 or newer; 3.11 to 3.13 work) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := params/demo.yaml
PARAMS ?= $(DEMO)
# Two processes of one thread each beat one process of two threads on small models, and tests stay repeatable.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Tests of a file stay together, for their fixtures; files in the order of tests/npu_sim/plugin.py.
WORKERS := --dist loadfile --no-loadscope-reorder -n

.PHONY: demo test browser types check lab install clean help

help:
	@echo "make demo   environment, then the whole pipeline on the built-in model; prints where the report is"
	@echo "make test   environment, lint, all tests (CPU, then the NPU path on a simulated NPU)"
	@echo "make test-long  the tests of half a minute and more that make test leaves out"
	@echo "make browser  the notebooks and the report in a real Chromium (apt install chromium)"
	@echo "make lab    JupyterLab on copies of the notebooks for PARAMS=params/demo.yaml, localhost only"
	@echo "make clean  remove environment and demo results"

install: .venv/.base

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,cluster]"
	@touch $@

# `plain` runs the source checkpoint with every switch off; `optimized` converts it and switches everything on.
# The second run ends with the comparison of both.
demo: .venv/.base
	$(BIN)/python -m ascend_kit run $(DEMO) --run plain --overwrite --only 04_throughput,05_evaluate \
	    --set use_model=source --set graph_mode=false --set operator_fusion=false --set memory_optimize=false
	$(BIN)/python -m ascend_kit run $(DEMO) --run optimized --overwrite --set if_model_exists=overwrite

test: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb
	$(BIN)/python -m ascend_kit notebooks --check
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) 3
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) 2 --device npu
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	    $(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) 2 --device cuda; \
	else echo "No CUDA device here: the suite's third run is left out."; fi

# Half a minute or more each: several Ray nodes, layouts of cards, whole runs of the command line.
test-long: .venv/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) 2 -m long
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) 2 -m long --device npu

types: .venv/.dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: test

# The short tests run in `make test` as well where playwright is there; the long pass takes about ten minutes.
browser: .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[browser]"
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_browser.py
	$(TEST_ENV) $(BIN)/python benchmarks/browser_lab.py

# Opens the project with copies of the notebooks in the run folder; the notebooks themselves stay as they are.
LAB := $(BIN)/jupyter lab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)
lab: .venv/.base
	work="$$($(BIN)/python -m ascend_kit work $(PARAMS))" && case "$$work" in \
	    /*) $(LAB) "$$work" ;; \
	    *) $(LAB) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url="/lab/tree/$$work" ;; \
	esac

clean:
	rm -rf .venv .npu-sim outputs/demo
