#!/usr/bin/env bash
# From a fresh clone and Python >= 3.11: environment, install, the miniature sweep, the law, a plan, a report.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/quickstart.sh [--smoke] [--config.FIELD=VALUE ..]
Makes the environment .venv, runs the miniature sweep, fits its law, plans, and writes runs/mini/report.html:
five LM sizes x four token counts, ten to twenty minutes on two free cores. The same command again goes on where it stopped.
  --smoke               the same road with tiny settings in a minute and a half (a plumbing test, not a result)
  --config.FIELD=VALUE  fields of configs/mini.py for the sweep, such as --config.sweep.seeds="(0,1,2)"
PYTHON (default python3), VENV (default .venv) and WORKDIR (default runs/mini) may be set.
TEXT
}

config=configs/mini.py workdir=runs/mini fields=()
for word in "$@"; do
  case "$word" in
    --smoke)
      config=configs/mini_smoke.py workdir=runs/mini_smoke
      # Optimising programs that run a few steps takes longer than running them.
      export XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}" ;;
    --config.?*=*) fields+=("$word") ;;
    --help | -h) usage; exit 0 ;;
    *) echo "quickstart.sh: unknown argument '$word'." >&2; usage >&2; exit 2 ;;
  esac
done
workdir="${WORKDIR:-$workdir}"
. scripts/environment.sh
make_environment ""
# Compiled programs are kept, so that a second run starts faster.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$VENV/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
python -m vlm_jax.sweep --config="$config" --workdir="$workdir" ${fields[@]+"${fields[@]}"}
python -m vlm_jax.laws.plan --law "$workdir/law.json" --budget-gflops 0.003 --text-tokens 10 --vit mini
echo "Report: $workdir/report.html (and report.md)"
