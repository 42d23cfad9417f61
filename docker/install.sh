#!/bin/sh
# An environment at $1 with the packages that follow, of the versions in constraints.txt. What the image's own Python has
# (TensorRT, for one) is seen too.
set -eu
here=$(dirname "$0")
environment=$1
shift
python3 -m venv --without-pip --system-site-packages "$environment"
python3 -m pip --python "$environment/bin/python" install --no-cache-dir --constraint "$here/constraints.txt" "$@"
