#!/usr/bin/env bash
# The same command on every worker of a TPU slice, again after a preemption, until the run is finished (WORKDIR/final.json).
# Start it where it can stay: in tmux, or on a small VM.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/tpu_run.sh [options of tpu_create.sh] [--logs=DIR] [--delete] -- python -m vlm_jax.train --config=.. --workdir=WORKDIR ..
  --logs=DIR  one file per slice and attempt, each line begins with its worker; default: logs
  --delete    delete the slice when the run is finished or given up; without it the slice stays, and costs
  WORKDIR     gs://BUCKET/.., or an absolute path on a disk that all workers share: checkpoints are written by all of them
TEXT
}

name='' logs=logs delete='' dry='' slices=1 where=() create=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --logs=*) logs="${1#*=}" ;;
    --delete) delete=1 ;;
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
names=("$name")
# What a slice, or the resource that holds several, says of itself while nothing is wrong.
describe=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)') well=READY
if [ "$slices" != 1 ]; then
  names=()
  for ((i = 0; i < slices; i++)); do names+=("$name-$i"); done
  describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)') well=ACTIVE
fi
ssh=(gcloud compute tpus tpu-vm ssh)
# Each line begins with the worker's name. What adds it must outlive the trainer, which is asked to stop by the same signals.
command="cd vlm_jax && . .venv/bin/activate && exec$(printf ' %q' "$@")"
command+=" > >(trap '' HUP TERM; exec sed -u \"s/^/\$(hostname): /\") 2>&1"
# A bucket is asked from here, a shared disk by one of the workers.
done_check=(gcloud storage ls "$workdir/final.json")
if [ "${workdir#gs://}" = "$workdir" ]; then
  done_check=("${ssh[@]}" "${names[0]}" "${where[@]}" --worker=0 --command="test -f $(printf '%q' "$workdir/final.json")")
fi
delete_all=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)

if [ -n "$dry" ]; then
  scripts/tpu_create.sh "${create[@]}"
  for slice in "${names[@]}"; do
    printf '%q ' "${ssh[@]}" "$slice" "${where[@]}" --worker=all --command="$command"
    echo
  done
  printf '%q ' "${done_check[@]}"
  echo
  exit 0
fi

attempt() { # $1: its number
  local slice child status=0 children=()
  mkdir -p "$logs/$1"
  echo "$name: attempt $1; its output: $logs/$1"
  for slice in "${names[@]}"; do
    "${ssh[@]}" "$slice" "${where[@]}" --worker=all --command="$command" >"$logs/$1/$slice.log" 2>&1 &
    children+=($!)
  done
  for child in "${children[@]}"; do wait "$child" || status=$?; done
  return "$status"
}

end() { # $1: exit code
  if [ -n "$delete" ]; then
    "${delete_all[@]}"
  else
    echo "$name: the slice stays, and costs, until: ${delete_all[*]}"
  fi
  exit "$1"
}

failures=0 number=1
while [ -e "$logs/$number" ]; do number=$((number + 1)); done # the logs of earlier commands stay
for (( ; ; number++)); do
  status=0
  { scripts/tpu_create.sh "${create[@]}" && attempt "$number"; } || status=$?
  if "${done_check[@]}" >/dev/null 2>&1; then
    echo "$name: finished ($workdir/final.json)"
    end 0
  fi
  # Without a preemption a failure is most often a mistake; a worker's reboot is forgiven, twice.
  if [ "$status" -eq 3 ]; then
    why="could not be asked for"
  elif [ "$status" -ne 0 ] && [ "$("${describe[@]}" 2>/dev/null)" = "$well" ]; then
    why="failed on a healthy slice; see $logs/$number"
  else
    why='' failures=0
  fi
  if [ -n "$why" ] && [ "$((failures += 1))" -ge 3 ]; then
    echo "$name: three times in a row: $why" >&2
    end 1
  fi
  echo "$name: attempt $number ended before the run was finished; again ..."
  sleep "${POLL_SECONDS:-30}"
done
