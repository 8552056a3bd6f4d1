# make demo            set up, and run the main job on a small scale
# make label-map-demo  label maps of real photographs, and a page of what they say
# make test            set up, lint, and run the tests
# make coverage        the tests again, and which lines they have run (longer: Python traces each)
# make lint            ruff and mypy alone
# make gpu-check       on a machine with an NVIDIA GPU: parity, speed and memory in one table, within 9 minutes
#                      (make gpu-check PYTHON=python3: by that Python, which has what is needed; nothing is installed)
# make gpu-kit         what such a Python needs besides torch, CuPy and numba, in one small archive
# make docs            the site of docs/ and the docstrings, in site/
# make lock            requirements.lock from pyproject.toml; versions that still fit stay (make lock UPGRADE=1: the newest)
# make bundle          all wheels and the built FFCV in one folder, for machines without network
PYTHON ?= python3
export PYTHON GPU
PY := .venv/bin/python

.PHONY: demo label-map-demo test coverage gpu-check gpu-kit bundle lint docs lock setup clean

demo: setup
	$(PY) -m scenes.demo

label-map-demo: setup
	$(PY) -m scenes.label_map_demo

test: setup lint
	$(PY) -m pytest

coverage: setup
	$(PY) -m pytest --cov --cov-report=term

# With PYTHON=..., that Python as it is (torch, CuPy, FFCV and the built extension in it): no .venv, no network.
GPU_PY := $(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(PY))
gpu-check: $(if $(filter command line,$(origin PYTHON)),,setup)
	$(GPU_PY) -m benchmarks.gpu_check

gpu-kit: setup
	bash setup/gpu_kit.sh

bundle: setup
	bash setup/bundle.sh

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: setup
	$(PY) -m zensical build --strict --clean

# FFCV's metadata come from its setup.py, which asks pkg-config for OpenCV.
lock: setup
	PKG_CONFIG_PATH=$(CURDIR)/setup/opencv UV_CUSTOM_COMPILE_COMMAND="make lock" $(PY) -m uv pip compile --quiet \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(if $(UPGRADE),--upgrade) \
	    --extra label-map-demo --extra detection --extra dev --extra docs --output-file requirements.lock pyproject.toml

setup: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock setup/install.sh $(wildcard ffcv_fields/native/*.[ch])
	bash setup/install.sh

clean:
	rm -rf .venv site bundle runs data *.egg-info
