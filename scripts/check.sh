#!/usr/bin/env bash
# Format, lint, types, tests, in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/check.sh [--fast | --quick]
Format, lint, types and all tests, in the active environment (scripts/test.sh makes one).
  --fast   no tests
  --quick  tests without the slow ones
TEXT
}

case "${1:-}" in
  "" | --fast | --quick) ;;
  --help | -h) usage; exit 0 ;;
  *) echo "check.sh: unknown argument '$1'." >&2; usage >&2; exit 2 ;;
esac

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
esac
