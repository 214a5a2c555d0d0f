# Each target sets up its own virtual environment in .venv; only Python 3.10-3.13, make and a package index are needed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-gpu bench clean

demo: $(VENV)/.installed  ## Train Warm and EDM on the embedded digits, generate, score, draw demo/demo.png
	$(PY) -m warm.demo --outdir=demo

# Without GPUs: the same everywhere, and no two ranks of a test meet on one GPU. A file's tests share what they trained.
test: $(VENV)/.installed-test  ## The whole test suite, a process a core, four at most
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q -n logical --maxprocesses=4 --dist=loadfile

test-gpu: $(VENV)/.installed-test  ## What needs a GPU
	$(PY) -m pytest -q tests/test_precision.py tests/test_speed_paths.py tests/test_warm_blur.py -k 'cuda or gpu'

bench: $(VENV)/.installed-test  ## The benchmarks, one after the other
	for b in tests/benchmarks/bench_*.py; do $(PY) $$b || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "Python %d.%d is not supported: run make PYTHON=python3.11, or another of 3.10 to 3.13" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) demo
