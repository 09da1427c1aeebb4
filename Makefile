# `make` or `make help` lists what can be made.
PYTHON ?= .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-timing test-hub faults lint figures notebook numbers page clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## make .venv with all that running, building and testing need
	python3 -m venv .venv
	.venv/bin/pip install -q -r requirements.txt -r requirements-dev.txt

run:  ## run the whole document
	$(PYTHON) annotated_bigs.py

test:  ## doctests and fast tests
	$(PYTHON) -m pytest --doctest-modules

test-all:  ## every test, slow ones too
	$(PYTHON) -m pytest --doctest-modules --slow

test-timing:  ## what measures time, alone
	$(PYTHON) -m pytest --timing

test-hub:  ## what needs the Hugging Face hub: published models, GLUE, Wikipedia
	$(PYTHON) -m pytest -m hub

faults:  ## seed faults, one at a time: does a test catch each?
	$(PYTHON) tests/faults.py

lint:  ## ruff: rules and format
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

figures:  ## redraw figures/
	$(PYTHON) annotated_bigs.py figures

notebook:  ## execute annotated_bigs.py into annotated_bigs.ipynb
	$(PYTHON) page/notebook.py

numbers:  ## renew the numbers in the prose that have a hidden proof
	$(PYTHON) page/proofs.py

page:  ## render the notebook as page/index.html (needs node and npm)
	$(PYTHON) page/build.py

clean:  ## remove caches and the built page
	rm -rf .pytest_cache .ruff_cache .ipynb_checkpoints page/index.html page/node_modules
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
