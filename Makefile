# make sample   pictures from the shipped network; prints the path of the sheet
# make test     the whole suite
# make check    lint, format, types
# make test-oldest, make test-alone   the suite with the oldest versions; and the engine without diffusers and accelerate
# make sbom     sbom.json: a bill of materials of the environment (CycloneDX)
# The first three make .venv and install the versions of .ci/lock, every file checked by its hash; again only when that
# changed. What a build of torch for graphics cards asks for besides is not in it and comes without.

PYTHON ?= python3
BIN := .venv/bin
LOCK := .ci/lock
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(INSTALL) --require-hashes --no-deps --requirement
ALONE := .venv-alone/bin/python -m pip install --quiet
PFODE := $(INSTALL) --no-build-isolation --editable
export OMP_WAIT_POLICY ?= passive

.PHONY: sample test test-oldest test-alone check sbom clean

sample: .venv/.base
	$(BIN)/pfode sample

test: .venv/.test
	$(BIN)/python -m pytest --numprocesses auto

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	PIP_CONSTRAINT=constraints-oldest.txt .venv-oldest/bin/python -m pip install --quiet --editable '.[test]'
	.venv-oldest/bin/python -m pip install --quiet --no-deps k-diffusion==0.1.1
	.venv-oldest/bin/python -m pytest --numprocesses auto

test-alone:
	$(PYTHON) -m venv .venv-alone
	$(ALONE) --require-hashes --no-deps --requirement $(LOCK)/torch-cpu.txt 2> /dev/null \
		|| $(ALONE) --require-hashes --no-deps --requirement $(LOCK)/torch.txt
	$(ALONE) torch safetensors numpy pillow click tqdm scipy pytest pytest-xdist
	.venv-alone/bin/python -m pip install --quiet --no-deps --editable .
	.venv-alone/bin/python -m pytest --numprocesses auto tests/engine tests/ode tests/models tests/test_alone.py

check: .venv/.check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

sbom: .venv/.sbom
	.venv/sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--output-file sbom.json

clean:
	rm -rf .venv .venv-oldest .venv-alone build dist *.egg-info sheet.png sbom.json

.venv/.base: pyproject.toml $(LOCK)/run.txt
	$(PYTHON) -m venv .venv
	$(LOCKED) $(LOCK)/torch-cpu.txt 2> /dev/null || $(LOCKED) $(LOCK)/torch.txt
	$(LOCKED) $(LOCK)/run.txt
	$(PFODE) .
	@touch $@

.venv/.test: .venv/.base $(LOCK)/test.txt
	$(LOCKED) $(LOCK)/test.txt
	$(PFODE) '.[test]'
	@touch $@

.venv/.check: .venv/.test $(LOCK)/check.txt
	$(LOCKED) $(LOCK)/check.txt
	$(PFODE) '.[dev]'
	@touch $@

.venv/.sbom: .venv/.base $(LOCK)/sbom.txt
	$(PYTHON) -m venv .venv/sbom
	.venv/sbom/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement $(LOCK)/sbom.txt
	@touch $@
