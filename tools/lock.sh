#!/bin/sh
# Writes requirements/*.txt: every version with hashes, for all platforms, and no address of where they came from.
# Keeps locked versions that still fit; arguments go to uv: `make lock ARGS=--upgrade`.
set -eu
cd "$(dirname "$0")/.."

compile() {
    output=requirements/$1.txt
    shift
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url --no-emit-find-links --output-file "$output" "$@"
}

echo uv | compile bootstrap "$@" -
compile runtime "$@" pyproject.toml --extra local --group build
# The second lock holds all of the first, at the same versions.
compile dev "$@" pyproject.toml --extra local --group dev --constraint requirements/runtime.txt
