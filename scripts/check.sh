#!/usr/bin/env bash
# Format, lint, types, tests, in the active environment. --fast: no tests; --quick: tests without the slow ones.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
pyrefly check
shopt -s nullglob
for script in scripts/*.sh .ci/run; do bash -n "$script"; done
case "${1:-}" in
  --fast) ;;
  --quick) python -m pytest -m "not slow" ;;
  "") python -m pytest ;;
  *) echo "check.sh: unknown argument '$1'; use --fast, --quick or nothing." >&2; exit 2 ;;
esac
