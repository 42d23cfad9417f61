#!/bin/sh
# A model repository for Triton at $2, of the bundle at $1.
set -eu
gsx triton "$1" -o "$2"
