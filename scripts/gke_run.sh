#!/usr/bin/env bash
# The same command on every host of one or more TPU slices of a GKE cluster, as a JobSet, until the run is finished
# (WORKDIR/final.json): a preempted or failed slice starts all of them anew, which go on from the last checkpoint.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/gke_run.sh --name=NAME --image=IMAGE --accelerator=KIND --topology=AxB[xC] [options] -- COMMAND .. --workdir=gs://..
  --image=IMAGE       a container image with vlm_jax and its extras [tpu,gcs]
  --accelerator=KIND  tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu-v4-podslice, as the node pool says
  --topology=AxB[xC]  chips of a slice, such as 16x16 or 4x4x4
  --slices=N          node pools to run on, one slice each (mesh.slices=N); default: 1
  --spot              on preemptible nodes
  --restarts=N        at most so many, after failures and preemptions together; default: 100
  --account=NAME      Kubernetes service account that may write the bucket; default: default
  --dry-run           print the manifest, apply nothing
TEXT
}

refuse() {
  echo "gke_run.sh: $1" >&2
  usage >&2
  exit 2
}

name='' image='' accelerator='' topology='' slices=1 spot='' restarts=100 account=default dry=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --account=*) account="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    *) refuse "unknown argument '$1'." ;;
  esac
  shift
done
[ "${1:-}" != -- ] || shift
workdir=''
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#*=}" ;; esac
done
if [ -z "$name" ] || [ -z "$image" ] || [ -z "$accelerator" ] || [ "${workdir#gs://}" = "$workdir" ]; then
  refuse "--name, --image, --accelerator, --topology, and after -- a command with --workdir=gs://.. are needed."
fi
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || refuse "--topology='$topology' is none; give chips such as 16x16 or 4x4x4."
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || refuse "--slices='$slices' is no number of slices; give 1 or more."
[[ "$restarts" =~ ^[0-9]+$ ]] || refuse "--restarts='$restarts' is no number."
chips=$((${topology//x/*}))
per_host=$((chips < 4 ? chips : 4))

quoted() { # the words as a shell command, in a YAML string of its own
  local text
  text="$(printf '%q ' "$@")"
  printf "'%s'" "${text//\'/\'\'}"
}

# A trainer that is asked to stop saves and exits 0: only final.json, which the first host writes last, says that the run is
# finished. Each host waits a minute for it.
finished="import sys, time; from etils import epath; file = epath.Path(sys.argv[1])
sys.exit(not any(file.exists() or time.sleep(1) for _ in range(60)))"

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $((chips / per_host))
          completions: $((chips / per_host))
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: $account
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
$([ -z "$spot" ] || echo '                cloud.google.com/gke-spot: "true"')
              containers:
                - name: trainer
                  image: $image
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  command: [bash, -c, 'set -e; trap "kill -TERM \\\$!" TERM; eval "exec \$1" &
                    status=0; wait \$! || status=\$?; while kill -0 \$! 2>/dev/null; do status=0; wait \$! || status=\$?; done;
                    [ \$status = 0 ]; eval "\$2"', trainer]
                  args:
                    - $(quoted "$@")
                    - $(quoted python -c "$finished" "$workdir/final.json")
                  resources:
                    requests: {google.com/tpu: $per_host}
                    limits: {google.com/tpu: $per_host}
YAML
}

if [ -n "$dry" ]; then
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
