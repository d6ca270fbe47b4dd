# make sample   pictures from the shipped network; prints the path of the sheet
# make test     the whole suite
# make check    lint, format, types
# make test-oldest, make test-alone   the suite with the oldest versions; and the engine without diffusers and accelerate
# Each makes .venv first and installs what it needs, pinned by constraints.txt; again only when that changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PIP_CONSTRAINT := constraints.txt
export OMP_WAIT_POLICY ?= passive

.PHONY: sample test test-oldest test-alone check clean

sample: .venv/.base
	$(BIN)/pfode sample --steps 20

test: .venv/.test
	$(BIN)/python -m pytest --numprocesses auto

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	PIP_CONSTRAINT=constraints-oldest.txt .venv-oldest/bin/python -m pip install --quiet --editable '.[test]'
	.venv-oldest/bin/python -m pip install --quiet --no-deps k-diffusion==0.1.1
	.venv-oldest/bin/python -m pytest --numprocesses auto

test-alone:
	$(PYTHON) -m venv .venv-alone
	.venv-alone/bin/python -m pip install --quiet torch safetensors numpy pillow click tqdm scipy pytest pytest-xdist
	.venv-alone/bin/python -m pip install --quiet --no-deps --editable .
	.venv-alone/bin/python -m pytest --numprocesses auto tests/engine tests/ode tests/models tests/test_alone.py

check: .venv/.check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-oldest .venv-alone build dist *.egg-info sheet.png

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

# k-diffusion asks for torchvision, which would replace the pinned torch; tests/peers.py needs only its sampling.py
.venv/.test: .venv/.base
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps k-diffusion==0.1.1
	@touch $@

.venv/.check: .venv/.test
	$(INSTALL) --editable '.[dev]'
	@touch $@
