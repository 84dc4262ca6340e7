#!/usr/bin/env bash
# Format, lint, types, tests, in the active environment. --fast: no tests; --quick: tests without the slow ones.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
pyrefly check
shopt -s nullglob
shellcheck scripts/*.sh scripts/*.sbatch .ci/run
# A file's tests share models, and all tests share what was compiled (tests/conftest.py); a worker without work takes half
# of what another still has.
workers=(-n auto --maxprocesses 8 --dist worksteal)
case "${1:-}" in
  --fast) ;;
  --quick) python -m pytest "${workers[@]}" -m "not slow" ;;
  "") python -m pytest "${workers[@]}" ;;
  *) echo "check.sh: unknown argument '$1'; use --fast, --quick or nothing." >&2; exit 2 ;;
esac
