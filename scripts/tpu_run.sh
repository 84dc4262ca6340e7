#!/usr/bin/env bash
# The same command on every worker of a TPU slice, again after a preemption, until the run is finished (WORKDIR/final.json).
# Start it where it can stay: in tmux, or on a small VM.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/tpu_run.sh [options of tpu_create.sh] [--logs=DIR] -- python -m vlm_jax.train --config=.. --workdir=WORKDIR ..
  --logs=DIR  one file per worker and attempt; default: logs
  WORKDIR     gs://BUCKET/.., or an absolute path on a disk that all workers share: checkpoints are written by all of them
TEXT
}

name='' logs=logs dry='' slices=1 where=() create=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --logs=*) logs="${1#*=}" ;;
    --help | -h) usage; exit 0 ;;
    *)
      case "$1" in
        --name=*) name="${1#*=}" ;;
        --zone=* | --project=*) where+=("$1") ;;
        --slices=*) slices="${1#*=}" ;;
        --dry-run) dry=1 ;;
      esac
      create+=("$1")
      ;;
  esac
  shift
done
[ "${1:-}" != -- ] || shift
workdir=''
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#*=}" ;; esac
done
if [ -z "$name" ] || ! [[ "$workdir" =~ ^(/|gs://) ]]; then
  echo "tpu_run.sh: --name, and after -- a command with --workdir=gs://BUCKET/.. or --workdir=/ABSOLUTE/PATH are needed." >&2
  usage >&2
  exit 2
fi
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}") everywhere=(--worker=all)
if [ "$slices" != 1 ]; then
  ssh=(gcloud compute tpus queued-resources ssh "$name" "${where[@]}") everywhere=(--worker=all --node=all)
fi
command="cd vlm_jax && . .venv/bin/activate && exec$(printf ' %q' "$@")"
# A bucket is asked from here, a shared disk by one of the workers.
done_check=(gcloud storage ls "$workdir/final.json")
if [ "${workdir#gs://}" = "$workdir" ]; then
  done_check=("${ssh[@]}" --worker=0 --command="test -f $(printf '%q' "$workdir/final.json")")
  [ "$slices" = 1 ] || done_check+=(--node=0)
fi

attempt() { # $1: its number
  mkdir -p "$logs/$1"
  "${ssh[@]}" "${everywhere[@]}" --command="$command" --output-directory="$logs/$1"
}

if [ -n "$dry" ]; then
  scripts/tpu_create.sh "${create[@]}"
  printf '%q ' "${ssh[@]}" "${everywhere[@]}" --command="$command" --output-directory="$logs/1"
  echo
  printf '%q ' "${done_check[@]}"
  echo
  exit 0
fi

# What a slice, or the resource that holds several, says of itself while nothing is wrong.
describe=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)') well=READY
if [ "$slices" != 1 ]; then
  describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)') well=ACTIVE
fi
failures=0
for ((number = 1; ; number++)); do
  status=0
  { scripts/tpu_create.sh "${create[@]}" && attempt "$number"; } || status=$?
  if "${done_check[@]}" >/dev/null 2>&1; then
    echo "$name: finished ($workdir/final.json)"
    exit 0
  fi
  healthy=''
  [ "$("${describe[@]}" 2>/dev/null)" != "$well" ] || healthy=1
  # Without a preemption a failure is most often a mistake; a worker's reboot is forgiven, twice.
  if [ "$status" -ne 0 ] && [ -n "$healthy" ]; then
    failures=$((failures + 1))
    if [ "$failures" -ge 3 ]; then
      echo "$name: failed three times in a row on a healthy slice; see $logs/$number" >&2
      exit 1
    fi
  else
    failures=0
  fi
  echo "$name: attempt $number ended before the run was finished; again ..."
  sleep "${POLL_SECONDS:-30}"
done
