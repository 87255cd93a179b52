#!/bin/sh
# Makes .venv hold exactly what one of the locks says: `tools/setup.sh runtime` or `tools/setup.sh dev`.
#
# Needs a Python of 3.11 or newer with venv and ensurepip, and nothing else. Safe to repeat: what is there already is
# left alone. Creates .venv when it is missing, broken, or was made in another place (its scripts name their path).
# Installs with uv, and with pip where uv cannot be had; both check every hash and compile what they install, once and
# not at each start of a process. Prints what to do and exits 1 when it cannot go on.
set -eu

lock=${1:?usage: tools/setup.sh runtime|dev}
cd "$(dirname "$0")/.."
root=$(pwd -P)
venv=.venv

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none was found${PYTHON:+ (PYTHON=$PYTHON)}." \
        "Install it (Debian, Ubuntu: apt-get install python3 python3-venv; Fedora: dnf install python3;" \
        "macOS: brew install python), or name one: make PYTHON=/path/to/python3 ..."
}

create_venv() {
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv or ensurepip module." \
        "Install it: apt-get install python3-venv (or python3.X-venv for the version at hand)."
    echo "setup: creating .venv with $("$python" --version)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "could not create .venv with $python; see the message above."
    printf '%s\n' "$root" >"$venv/.made-in"
}

[ "$(cat "$venv/.made-in" 2>/dev/null)" = "$root" ] && is_new_enough "$venv/bin/python" || create_venv

# A user without a writable home (nobody, a locked-down CI) keeps uv's cache in the tree.
[ -w "${HOME:-/nonexistent}" ] || export UV_CACHE_DIR="${UV_CACHE_DIR:-$root/.build/uv-cache}"
# uv reads no settings of pip: hand on the one that a mirror needs.
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

with_uv() {
    [ -x "$venv/bin/uv" ] || pip install --require-hashes -r requirements/bootstrap.txt || return 1
    "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"
}

install() {
    with_uv "$@" && return
    echo "setup: uv could not do it; trying with pip" >&2
    pip install "$@"
}

echo "setup: installing requirements/$lock.txt" >&2
install --require-hashes -r "requirements/$lock.txt" ||
    fail "could not install the locked packages; see the message above (no network, or a mirror that lacks them?)."
install --no-deps --no-build-isolation -e . || fail "could not install the project itself into .venv."
if [ "$lock" = dev ]; then
    # Benchmarks are no part of the package, so that their command is none of its scripts.
    printf '#!/bin/sh\nexec "%s/%s/bin/python" -m benchmarks.load "$@"\n' "$root" "$venv" >"$venv/bin/postroad-bench"
    chmod +x "$venv/bin/postroad-bench"
fi
touch "$venv/.installed-$lock"
