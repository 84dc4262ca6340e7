#!/usr/bin/env bash
# From a fresh clone and Python >= 3.11: environment, install, the miniature sweep, the law, a plan, a report.
#   scripts/quickstart.sh            three LM sizes x four token counts (about ten minutes on two cores)
#   scripts/quickstart.sh --smoke    the same road with tiny settings (a plumbing test, not a result)
# Further arguments go to the sweep, for instance --config.sweep.seeds=0,1,2 . WORKDIR and VENV may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
config=configs/mini.py
workdir=runs/mini
if [ "${1:-}" = --smoke ]; then
  config=configs/mini_smoke.py
  workdir=runs/mini_smoke
  shift
fi
workdir="${WORKDIR:-$workdir}"
. scripts/environment.sh
make_environment ""
# Compiled programs are kept, so that a second run starts faster.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$VENV/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# glibc keeps freed memory: without this a fifth of the CPU time goes to the kernel's page faults.
export MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=4294967296
python -m vlm_jax.sweep --config="$config" --workdir="$workdir" "$@"
python -m vlm_jax.laws.plan --law "$workdir/law.json" --budget-gflops 0.003 --text-tokens 10 --vit mini
echo "Report: $workdir/report.html (and report.md)"
