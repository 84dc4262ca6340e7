#!/usr/bin/env bash
# A TPU slice through a queued resource: asks for it, waits until it is there, installs the last commit on every worker.
# --slices=N asks for N slices in one resource, NAME-0, NAME-1, .. Again on a slice that exists: code and --setup only. A
# preempted or failed one is deleted and asked for anew. Exit code 3: the slice could not be asked for.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/tpu_create.sh --name=NAME --zone=ZONE --type=TYPE [options]
  --type=TYPE      accelerator, such as v5litepod-256, v5p-128, v6e-64, v4-32
  --runtime=IMAGE  default: the one that fits TYPE
  --project=ID     default: gcloud's
  --slices=N       so many slices of TYPE, joined by a network (mesh.slices=N); default: 1
  --spot           preemptible, cheaper
  --setup=COMMAND  run on every worker after each installation, for instance to mount a disk that all workers share
  --dry-run        print the commands, run nothing
TEXT
}

name='' zone='' type='' runtime='' setup='' dry='' slices=1 project=() spot=()
for word in "$@"; do
  case "$word" in
    --name=*) name="${word#*=}" ;;
    --zone=*) zone="${word#*=}" ;;
    --type=*) type="${word#*=}" ;;
    --runtime=*) runtime="${word#*=}" ;;
    --project=*) project=("--project=${word#*=}") ;;
    --slices=*) slices="${word#*=}" ;;
    --spot) spot=(--spot) ;;
    --setup=*) setup="${word#*=}" ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    *) echo "tpu_create.sh: unknown argument '$word'." >&2; usage >&2; exit 2 ;;
  esac
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ]; then
  echo "tpu_create.sh: --name, --zone and --type are needed." >&2
  usage >&2
  exit 2
fi
if ! [[ "$slices" =~ ^[1-9][0-9]*$ ]]; then
  echo "tpu_create.sh: --slices='$slices' is no number of slices; give 1 or more." >&2
  exit 2
fi
if [ -z "$runtime" ]; then
  case "$type" in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) echo "tpu_create.sh: no image is known for '$type'; give --runtime=IMAGE." >&2; exit 2 ;;
  esac
fi
where=(--zone="$zone" "${project[@]}")
queue=(gcloud compute tpus queued-resources) vm=(gcloud compute tpus tpu-vm)
names=("$name") asked=("--node-id=$name")
if [ "$slices" -gt 1 ]; then
  names=() asked=("--node-count=$slices" "--node-prefix=$name")
  for ((i = 0; i < slices; i++)); do names+=("$name-$i"); done
fi

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

state() { # of the queued resource; ABSENT when there is none
  "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
  run "${queue[@]}" create "$name" "${asked[@]}" "${where[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${spot[@]}"
}

if [ -n "$dry" ]; then
  create
else
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE) break ;;
      ABSENT) create || exit 3 ;;
      FAILED | SUSPENDED) "${queue[@]}" delete "$name" "${where[@]}" --force --quiet ;;
      *) echo "$name: $now" ; sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
fi

archive="${TMPDIR:-/tmp}/vlm_jax-$name.tar.gz"
run git archive --format=tar.gz --output="$archive" HEAD
# The images hold Python 3.10, and uv brings a newer one.
install='mkdir -p vlm_jax && tar -xzf vlm_jax.tar.gz -C vlm_jax && cd vlm_jax && export PYTHON=python3 && '
install+='if ! python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then python3 -m pip install --quiet --user uv && '
# shellcheck disable=SC2016
install+='python3 -m uv python install --quiet 3.11 && PYTHON="$(python3 -m uv python find 3.11)"; fi && '
install+='. scripts/environment.sh && make_environment "[tpu,gcs]"'

prepare() { # $1: a slice
  run "${vm[@]}" scp "$archive" "$1:vlm_jax.tar.gz" --worker=all "${where[@]}" &&
    run "${vm[@]}" ssh "$1" --worker=all "${where[@]}" --command="$install${setup:+ && ($setup)}"
}

status=0 children=()
for slice in "${names[@]}"; do
  if [ -n "$dry" ]; then prepare "$slice"; else prepare "$slice" & children+=($!); fi
done
for child in ${children[@]+"${children[@]}"}; do wait "$child" || status=1; done
exit "$status"
