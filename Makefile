# make demo            set up, and run the main job on a small scale
# make label-map-demo  label maps of real photographs, and pictures of what they say
# make test            set up, lint, and run the tests
# make lint            ruff and mypy alone
# make gpu-check       on a machine with an NVIDIA GPU: the GPU tests, pooling and training benchmarks
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

gpu-check: setup
	$(PY) -c "import torch; assert torch.cuda.is_available(), 'no NVIDIA GPU here'; print(torch.cuda.get_device_name())"
	$(PY) -m pytest tests/test_pooling_cuda.py tests/test_augment.py
	$(PY) -m benchmarks.label_pooling
	$(PY) -m benchmarks.training

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
