#!/bin/sh
# The plugin library at $1, built for all GPUs that gsx knows.
set -eu
mkdir -p "$(dirname "$1")"
built=$(gsx plugins build --json)
cp "$(echo "$built" | python3 -c 'import json, sys; print(json.load(sys.stdin)["path"])')" "$1"
