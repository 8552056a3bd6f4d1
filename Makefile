# make demo: set up and run the main job on a small scale.   make test: set up and run the tests.
PYTHON ?= python3
export PYTHON
PY := .venv/bin/python

.PHONY: demo test lint setup clean

demo: setup
	$(PY) -m relabel.demo

test: setup lint
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock setup/install.sh
	bash setup/install.sh

clean:
	rm -rf .venv runs data *.egg-info
