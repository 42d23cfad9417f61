#!/bin/sh
# The example bundle at $1; further options go to gsx export. MODEL names another model.
set -eu
out=$1
shift
gsx export "${MODEL:-examples/model}" --budget 0.7 -o "$out" "$@"
