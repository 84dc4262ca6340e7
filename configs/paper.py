"""The paper's scaling experiment: Qwen1.5 0.5B to 7B x 1 to 576 visual tokens, TokenPacker, LLaVA-1.5's recipe, eleven benchmarks.

    python -m vlm_jax.sweep --config=configs/paper.py --workdir=DIR --dry-run --topology=v5e:16x16 --chip-hour-dollars=1.2
    python -m vlm_jax.sweep --config=configs/paper.py --workdir=DIR --config.sweep.inputs=INPUTS

INPUTS holds models/ (hf download), llava/ and benchmarks/ under the names below. 14B is the paper's held-out size: add it to
sweep.lms, and it is measured and predicted, not fitted. Sources: arXiv 2411.03312, its code (locuslab/llava-token-compression),
and LLaVA-1.5 (arXiv 2310.03744, haotian-liu/LLaVA), whose recipe it follows.
"""

from configs import default

# Published names of the presets; the chat models, as LLaVA-NeXT uses them.
WEIGHTS = {
    "qwen1.5-0.5b": "models/Qwen1.5-0.5B-Chat",
    "qwen1.5-1.8b": "models/Qwen1.5-1.8B-Chat",
    "qwen1.5-4b": "models/Qwen1.5-4B-Chat",
    "qwen1.5-7b": "models/Qwen1.5-7B-Chat",
    "qwen1.5-14b": "models/Qwen1.5-14B-Chat",
}
# The nine reasoning benchmarks (arXiv 2411.03312, section 3.2) and the OCR pair; families are those of vlm_jax.benchmarks.
REASONING = (
    "mme", "gqa", "ai2d", "mmbench", "mmmu", "scienceqa", "mathvista", "pope", "chartqa",
)  # fmt: skip
OCR = ("docvqa", "textvqa")
# Text tokens of a row and the share of the steps, estimated, not measured: most of the 665k records are a few short turns about
# an image, 40k are long text-only conversations. They matter to --dry-run alone; measure your copy and set them.
BUCKETS = ((256, 0.5), (512, 0.35), (1472, 0.15))


def get_config():
    c = default.get_config()
    with c.unlocked():
        c.sweep = sweep()
    c.model.compressor.unlock()  # as in default.py

    c.model.vit.preset = "clip-l-336"  # CLIP ViT-L/14-336, 576 patches, frozen
    c.model.vit.param_dtype = "bfloat16"  # frozen: it is computed in bfloat16 anyway
    c.init.vit = "models/clip-vit-large-patch14-336"
    c.model.compressor.name = "tokenpacker"  # of every scaling run
    c.model.compressor.taps = (12, 16, 22, 23)  # hidden states of TokenPacker's release
    c.model.lm.remat = "full"  # the recipe's gradient checkpointing
    c.data.template = "chatml"  # Qwen's
    # Parameters and optimiser state are split over all devices; where there are more devices than rows, the rest split heads.
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 0
    c.eval.batch_size = 64
    c.eval.max_new_tokens = 128  # LLaVA-1.5's evaluation
    return c


def sweep():
    s = default.sweep()
    s.title = "LM size against visual tokens: the paper's experiment"
    s.lms = (
        "qwen1.5-0.5b",
        "qwen1.5-1.8b",
        "qwen1.5-4b",
        "qwen1.5-7b",
    )  # what the law is fitted to
    s.held_out = ("qwen1.5-14b",)  # the paper's Figure 2
    s.lm_settings = tuple((lm, {"init.lm": path}) for lm, path in WEIGHTS.items())
    # Kernels 24, 12, 6, 4, 3, 2 and no compression (scaling_law_code/values.py, scripts/slurm_llm.sh at d10f0c0).
    s.visual_tokens = (1, 4, 16, 36, 64, 144, 576)
    s.inputs = "inputs"
    s.benchmarks = (*REASONING, *OCR)
    s.annotations = tuple(f"benchmarks/{name}" for name in s.benchmarks)
    s.plan_text_tokens = 50  # Q of the paper's Figures 1b and 3
    s.plan_budget_gflops = 1000.0
    s.published_law = {
        "reasoning": (0.077, 0.015),
        "ocr": (0.029, 0.048),
    }  # alpha, beta of Figure 3
    s.published_cells = {"reasoning": "paper_reasoning", "ocr": "paper_ocr"}
    s.stages.align, s.stages.tune = recipe("align", template="plain")
    s.caveats = (
        "The paper's benchmark scores are an unweighted mean of nine; how it scales MME is not printed, here by 2800.",
        "Trainings differ by luck: LLaVA-1.5's own runs differ by 20 points of MME. Give sweep.seeds several.",
    )
    return s


def recipe(name, template, cells="all"):
    """Alignment and instruction tuning of LLaVA-1.5 (scripts/v1_5/{pretrain,finetune}.sh)."""
    align = default.stage(
        cells=cells,
        annotations=("llava/blip_laion_cc_sbu_558k.json",), image_roots=("llava/pretrain",),
        records=558_128, epochs=1.0, batch_size=256,
        trainable="^(compressor|projector)/", learning_rate=1e-3,
        text_tokens=128,  # one caption; longer ones, of which there are hardly any, are cut
        settings=(("data.image_mode", "crop"), ("data.template", template)),
    )  # fmt: skip
    tune = default.stage(
        cells=cells,
        annotations=("llava/llava_v1_5_mix665k.json",), image_roots=("llava/instruct",),
        records=665_298, epochs=1.0, batch_size=128,
        trainable="^(compressor|projector|lm)/", learning_rate=2e-5,
        text_tokens=BUCKETS[-1][0],  # 2048 with the 576 tokens of no compression
        buckets=BUCKETS, settings=(("data.image_mode", "pad"),),
        init={"compressor": name, "projector": name},
    )  # fmt: skip
    return align, tune
