# make sample   pictures from the shipped network; prints the path of the sheet
# make test     the whole suite
# make check    lint, format, types
# Each makes .venv first and installs what it needs, pinned by constraints.txt; again only when that changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PIP_CONSTRAINT := constraints.txt
export OMP_WAIT_POLICY ?= passive

.PHONY: sample test check clean

sample: .venv/.base
	$(BIN)/pfode sample --steps 20

test: .venv/.test
	$(BIN)/python -m pytest --numprocesses auto

check: .venv/.check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build dist *.egg-info sheet.png

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
