#!/usr/bin/env bash
# A sweep over several machines with SLURM: what the cells share, then every machine its part of the cells, then the report.
# The same command again goes on where the jobs stopped: finished parts return at once.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/sweep_array.sh --machines=N [--dry-run] [--sbatch=OPTION ..] --config=configs/mini.py --workdir=WORKDIR [..]
  --sbatch=OPTION  passed to each sbatch, for instance --sbatch=--partition=gpu --sbatch=--gpus-per-node=1
  WORKDIR          on a disk that all machines share
TEXT
}

machines='' dry='' workdir='' options=() arguments=()
for word in "$@"; do
  case "$word" in
    --machines=*) machines="${word#*=}" ;;
    --sbatch=*) options+=("${word#*=}") ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    --workdir=*) workdir="${word#*=}"; arguments+=("$word") ;;
    --config=* | --config.?*=*) arguments+=("$word") ;;
    *) echo "sweep_array.sh: unknown argument '$word'; flags of the sweep are --NAME=VALUE." >&2; usage >&2; exit 2 ;;
  esac
done
if ! [[ "$machines" =~ ^[1-9][0-9]*$ ]] || [ -z "$workdir" ]; then
  echo "sweep_array.sh: --machines=N (1 or more) and --workdir=WORKDIR are needed." >&2
  usage >&2
  exit 2
fi
sweep="python -m vlm_jax.sweep$(printf ' %q' "${arguments[@]}")"

submit() { # $1: name of the job, $2: the one it follows, $3: command, further: options; prints the new job's id
  local name="$1" after="$2" command="$3"
  shift 3
  local words=(sbatch --parsable --job-name="sweep-$name" --requeue "${options[@]}" "$@")
  [ -z "$after" ] || words+=(--dependency="afterok:$after")
  words+=(--wrap="$command")
  if [ -n "$dry" ]; then
    printf '%q ' "${words[@]}" >&2
    echo >&2
    echo "ID_OF_$name"
  else
    "${words[@]}" | cut -d';' -f1 # on a federation: id;cluster
  fi
}

shared="$(submit shared '' "$sweep --part=shared")"
cells="$(submit cells "$shared" "$sweep --part=\$SLURM_ARRAY_TASK_ID/$machines" --array="0-$((machines - 1))")"
submit report "$cells" "$sweep" >/dev/null
[ -n "$dry" ] || echo "submitted: shared $shared, cells $cells and the report, $workdir/report.html"
