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
workers=(-n auto --maxprocesses 8 --dist loadfile)  # a file's tests share what they compile
case "${1:-}" in
  --fast) ;;
  --quick) python -m pytest "${workers[@]}" -m "not slow" ;;
  "") python -m pytest "${workers[@]}" ;;
esac
