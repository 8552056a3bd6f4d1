#!/usr/bin/env bash
# Creates .venv with everything pinned in requirements.lock. `make` calls it when those pins change.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
APT="python3-venv python3-dev g++ make pkg-config libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev libjpeg-dev"
DEMO_IMAGES=/usr/share/datasets/fashion-mnist

stop() { echo "setup: $*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  stop "$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 to 3.13 is required: make PYTHON=python3.11"

# 1. What FFCV is built from, and the demo's images: from system packages, or from a conda environment.
ready() {
  command -v g++ pkg-config >/dev/null &&
    "$PYTHON" -c 'import ensurepip, os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null &&
    pkg-config --exists libturbojpeg libjpeg &&
    { pkg-config --exists opencv4 || [ -e /usr/include/opencv4/opencv2/imgproc.hpp ]; }
}
missing=
ready || missing=$APT
[ -d "${FASHION_MNIST:-$DEMO_IMAGES}" ] || missing="$missing dataset-fashion-mnist"
if [ -n "$missing" ]; then
  if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing
  fi
  ready || stop "the packages that FFCV is built from are missing. One of:
    sudo apt-get install $APT
    conda install -c conda-forge python=3.11 cxx-compiler make pkg-config opencv libjpeg-turbo"
fi
pkg-config --exists opencv4 || export PKG_CONFIG_PATH="$PWD/setup/opencv${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"

# 2. The pinned packages. --no-deps: the lock is complete (`make lock`), and FFCV would also install opencv-python, which
#    needs desktop libraries, next to opencv-python-headless.
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pinned() { for name; do grep "^$name==" requirements.lock || stop "$name is not in requirements.lock"; done; }
quiet=--quiet
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  quiet=  # pip shows what it downloads
  free=$(df -Pk .venv | awk 'NR == 2 { print int($4 / 1048576) }')
  echo "setup: downloads about 3 GB, mostly torch and CUDA's libraries, and installs them into .venv: 5 GB; $free GB are free"
  [ "$free" -ge 6 ] || stop "$PWD has $free GB free; 6 are needed"
fi
# shellcheck disable=SC2046
pip install --quiet --no-deps $(pinned setuptools wheel)
# shellcheck disable=SC2086
pip install $quiet --no-deps --no-build-isolation -r requirements.lock
if [ -n "${GPU:-}" ] || { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }; then  # GPU=1: always
  pip install --no-deps cupy-cuda13x==14.2.0
fi
pip install --quiet --no-deps --no-build-isolation --editable .
echo "setup: compiling the kernels, once"
.venv/bin/python -m setup.first_run >/dev/null || stop "a first small training failed, as said above"
touch .venv/.installed
