#!/usr/bin/env bash
# From a fresh clone and Python >= 3.11: environment, install with test tools, every check. Arguments go to check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/test.sh [--fast | --quick]
Makes the environment .venv with the test tools, then runs scripts/check.sh: format, lint, types and all tests.
  --fast   no tests
  --quick  the tests that take seconds
PYTHON (default python3) and VENV (default .venv) may be set.
TEXT
}

for word in "$@"; do
  case "$word" in
    --fast | --quick) ;;
    --help | -h) usage; exit 0 ;;
    *) echo "test.sh: unknown argument '$word'." >&2; usage >&2; exit 2 ;;
  esac
done
. scripts/environment.sh
make_environment "[test]"
scripts/check.sh "$@"
