#!/usr/bin/env bash
# Everything that is to be measured on one GPU, in at most nine minutes, as Markdown.
set -uo pipefail
cd "$(dirname "$0")/../.."

usage() {
  cat <<'TEXT'
usage: scripts/bench/gpu.sh [--smoke] [FILE]
Prints tables, and writes them to FILE as well: attention kernels (equal to XLA's?), training steps beside torch, memory and time
predicted and measured, generation at 1, 36 and 576 visual tokens, and the harness beside a plain transformers loop.
  --smoke   the smallest sizes on a CPU: what the script is tested with
PYTHON (default python3) needs jax with CUDA, flax, optax, einops and jaxtyping; torch and transformers for what stands beside;
ml-collections, tokenizers and pillow for the harness. A section that lacks a package or fails says so, and the next begins.
SECONDS_IN_ALL (default 540) bounds the whole.
TEXT
}

smoke="" file=/dev/null
for word in "$@"; do
  case "$word" in
    --smoke) smoke=--smoke ;;
    --help | -h) usage; exit 0 ;;
    -*) echo "gpu.sh: unknown argument '$word'." >&2; usage >&2; exit 2 ;;
    *) file="$word" ;;
  esac
done
python="${PYTHON:-python3}" last="${SECONDS_IN_ALL:-540}"
exec > >(tee "$file")
said="$(mktemp)"
trap 'rm -f "$said"' EXIT
# jax would otherwise take most of the memory at once, and leave none to torch beside it.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

# section SECONDS TITLE WORDS..: a process of its own, so that what it holds is free again and its end does not end the rest.
section() {
  local most="$1" title="$2" code=0
  shift 2
  printf '\n## %s\n\n' "$title"
  if [ $((SECONDS + 10)) -gt "$last" ]; then
    echo "Not measured: $last seconds are over."
    return
  fi
  [ $((SECONDS + most)) -le "$last" ] || most=$((last - SECONDS))
  timeout "$most" "$python" "$@" 2>"$said" || code=$?
  case $code in
    0) ;;
    124) echo "(ended after $most seconds)" ;;
    *) echo "(ended with exit code $code: $(grep -v '^ *$' "$said" | tail -1 | cut -c1-300))" ;;
  esac
}

"$python" - <<'PY'
import importlib.metadata as m
import platform, sys

def version(name):
    try:
        return f"{name} {m.version(name)}"
    except m.PackageNotFoundError:
        return f"no {name}"

print(f"Python {platform.python_version()},", ", ".join(version(n) for n in ("jax", "flax", "optax", "torch", "transformers")))
PY
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
date -u +%F

here=scripts/bench
if [ -n "$smoke" ]; then
  section 120 "Attention" $here/gpu.py kernels --smoke
  section 240 "Training step beside torch" $here/train.py --sizes mini --rounds 1
  section 120 "Training step, predicted and measured" $here/gpu.py step --smoke
  section 120 "Generation" $here/gpu.py generate --smoke
  section 240 "Harness beside transformers" $here/evaluate.py --questions 4 --batch 2 --rounds 1 --new 2 --lm 64 1 --vit 64 2
else
  section 60 "Attention" $here/gpu.py kernels
  for size in 1.8b 0.5b 7b-lora 7b-frozen; do
    section 75 "Training step beside torch: $size" $here/train.py --device=gpu --rounds 3 --sizes "$size"
  done
  section 80 "Training step, predicted and measured" $here/gpu.py step 0.5b 1.8b 7b-lora
  section 100 "Generation" $here/gpu.py generate 1.8b 7b
  section 120 "Harness beside transformers" $here/evaluate.py --questions 64 --rounds 1 --lm 1024 12 --vit 512 8
fi
printf '\n%s seconds in all.\n' "$SECONDS"
