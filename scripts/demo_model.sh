#!/usr/bin/env bash
# A small model that answers in sentences: SmolLM2-135M-Instruct, an encoder, and QueCC with a few visual tokens.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/demo_model.sh LM ENCODER DATA OUT [STRIDE]
Alignment, then LoRA, on this machine, and a question to the result.
  LM       a decoder's directory in Hugging Face's layout, such as SmolLM2-135M-Instruct
  ENCODER  a workdir whose encoder is taken, such as runs/mini/seed0/encoder, or an encoder's directory
  DATA     a folder with train.json and held_out.json in LLaVA's format, and the pictures that they name
  OUT      where the runs go: OUT/align, OUT/instruct; what is finished there is not trained again
  STRIDE   patches along one side of a window: visual tokens = (grid / STRIDE)^2 (default: the whole grid, one token)
Steps: ALIGN_STEPS and LORA_STEPS in the environment (defaults: 300 and 600 of 8 records).
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
  -*) echo "demo_model.sh: unknown argument '$1'." >&2; usage >&2; exit 2 ;;
esac
[ $# -ge 4 ] || { echo "demo_model.sh: give LM, ENCODER, DATA and OUT." >&2; usage >&2; exit 2; }
lm="$1" encoder="$2" data="$3" out="$4"
for path in "$lm" "$encoder" "$data"; do
  [ -d "$path" ] || { echo "demo_model.sh: '$path' is no directory." >&2; exit 2; }
done
[ -f "$data/train.json" ] || { echo "demo_model.sh: '$data' has no train.json." >&2; exit 2; }

grid="$(python -c '
import sys
from vlm_jax.hf.directory import is_model
from vlm_jax.hf import named
from vlm_jax.storage import run
vit = named.vit(sys.argv[1]) if is_model(sys.argv[1]) else run.read(sys.argv[1]).model.vit
print(vit.grid)' "$encoder")"
stride="${5:-$grid}"
# A workdir's encoder has no preset: its fields are given one by one.
mapfile -t vit < <(python -c '
import dataclasses, sys
from vlm_jax.hf.directory import is_model
from vlm_jax.storage import run
if is_model(sys.argv[1]):
    print(f"--config.model.vit.preset={sys.argv[1]}")
else:
    print("--config.model.vit.preset=")
    for name, value in dataclasses.asdict(run.read(sys.argv[1]).model.vit).items():
        print(f"--config.model.vit.{name}={value}")' "$encoder")

shared=(
  --config.data.annotations="('$data/train.json',)" --config.data.image_roots="('$data',)" --config.data.batch_size=8
  --config.data.max_tokens=192 --config.train.save_every=100 --config.train.log_every=10
)
python -m vlm_jax.train --config=stage1 --workdir="$out/align" "${vit[@]}" --config.init.vit="$encoder" \
  --config.model.lm.preset="$lm" --config.init.lm="$lm" --config.data.tokenizer="$lm" --config.data.template=chatml \
  --config.model.lm.dtype=float32 --config.model.compressor.name=quecc --config.model.compressor.stride="$stride" \
  --config.model.compressor.taps="()" --config.model.compressor.dtype=float32 --config.train.num_steps="${ALIGN_STEPS:-300}" \
  "${shared[@]}"
python -m vlm_jax.train --config=stage2_lora --workdir="$out/instruct" --config.init.from="$out/align" \
  --config.model.lm.lora_rank=16 --config.train.num_steps="${LORA_STEPS:-600}" "${shared[@]}"
if [ -f "$data/held_out.json" ]; then
  python -m vlm_jax.evaluate --config=eval --workdir="$out/eval" --config.eval.checkpoint="$out/instruct" \
    --config.eval.benchmarks=llava --config.eval.annotations="$data/held_out.json"
fi
echo "python -m vlm_jax.chat --model=$out/instruct PICTURE"
