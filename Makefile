# make demo   installs, trains on the built-in dataset, evaluates, draws detections: four minutes after the install
# make test   installs and runs the tests, as CI does
# make parity prints how far every model is from its official code, one model after the other: it takes long
# make lint   ruff and mypy, as CI does
# make test FAST=1    without processes, whole programs, full-size models and tests of half a second and more
# make test RECORD=1  writes down which tests take long, and FAST=1 leaves out: tests/durations.json
# make test LATEST=1  the whole suite with the newest versions of everything, in an environment of its own

PYTHON ?= python3
ifdef LATEST
VENV ?= .venv-latest
else
VENV ?= .venv
PINS = --constraint constraints.txt
MORE = ,trackio
endif
ifdef FAST
SELECTED = -m 'not slow'
endif
ifdef RECORD
export DEPERCEIVER_JAX_RECORD_TESTS = 1
endif
RUN = runs/demo
BIN = $(VENV)/bin

.PHONY: demo test parity lint clean

$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "deperceiver_jax needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINS) --editable '.[dev$(MORE)]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python train.py --config=configs/demo.py:deperceiver_plus --workdir=$(RUN)
	$(BIN)/python eval.py --workdir=$(RUN) --checkpoint=latest --report
	$(BIN)/python -m deperceiver_jax.visualize detections --workdir=$(RUN) --output=$(RUN)/detections.png --score_threshold=0.4

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder $(SELECTED)

parity: $(VENV)/installed
	$(BIN)/python -m tests.parity

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-latest runs build *.egg-info
