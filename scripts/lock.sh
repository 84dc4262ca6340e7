#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/lock.sh [PYTHON ..]
Moves requirements.lock to the newest releases that setup.py allows, for every Python from 3.11 on, and runs all tests with them,
with each PYTHON, one after another (default: python3), such as: scripts/lock.sh python3.11 python3.12
Commit the new lock when the tests pass; `git checkout requirements.lock` takes it back.
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
  -*) echo "lock.sh: unknown argument '$1'." >&2; usage >&2; exit 2 ;;
esac
[ $# -gt 0 ] || set -- python3

tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$1" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check uv
{
  echo "# The exact versions that scripts/quickstart.sh and scripts/test.sh install. Written by scripts/lock.sh; not edited by hand."
  echo "# torch is pinned in setup.py, and pins the CUDA packages that it wants on some platforms."
  "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --extra test --extra tpu --no-header --no-annotate setup.py |
    grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)=='
} >"$tools/lock"
mv "$tools/lock" requirements.lock
git --no-pager diff --stat requirements.lock

for python in "$@"; do
  echo "Testing the new lock with $("$python" --version) ..."
  PYTHON="$python" VENV="$tools/$(basename "$python")" scripts/test.sh
done
