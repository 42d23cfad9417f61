#!/bin/sh
# The example bundle at $1. MODEL names another model.
set -eu
gsx export "${MODEL:-examples/model}" --budget 0.7 -o "$1"
