#!/usr/bin/env bash
# From a fresh clone and Python >= 3.11: environment, install with test tools, every check. Arguments go to check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "[test]"
scripts/check.sh "$@"
