# make demo            set up, and run the main job on a small scale
# make label-map-demo  label maps of real photographs, and pictures of what they say
# make test            set up, lint, and run the tests
# make lint            ruff and mypy alone
# make gpu-check       on a machine with an NVIDIA GPU: the GPU tests, pooling and training benchmarks
#                      (make gpu-check PYTHON=python3: by that Python, which has what is needed; nothing is installed)
# make bundle          all wheels and the built FFCV in one folder, for machines without network
PYTHON ?= python3
export PYTHON GPU
PY := .venv/bin/python

.PHONY: demo label-map-demo test gpu-check bundle lint setup clean

demo: setup
	$(PY) -m scenes.demo

label-map-demo: setup
	$(PY) -m scenes.label_map_demo

test: setup lint
	$(PY) -m pytest --cov --cov-report=term

# With PYTHON=..., that Python as it is (torch, CuPy, FFCV and the built extension in it): no .venv, no network.
GPU_PY := $(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(PY))
gpu-check: $(if $(filter command line,$(origin PYTHON)),,setup)
	$(GPU_PY) -c "import torch; assert torch.cuda.is_available(), 'no NVIDIA GPU here'; print(torch.cuda.get_device_name())"
	RELABEL_TEST_GPU=1 $(GPU_PY) -m pytest -o addopts=-q -k on_a_gpu tests/test_pooling_cuda.py tests/test_augment.py tests/test_optimizers.py
	$(GPU_PY) -m benchmarks.label_pooling
	$(GPU_PY) -m benchmarks.training

bundle: setup
	bash setup/bundle.sh

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

setup: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock setup/install.sh $(wildcard ffcv_fields/native/*.[ch])
	bash setup/install.sh

clean:
	rm -rf .venv bundle runs data *.egg-info
