"""The embedded experiment: sizes x visual tokens on a laptop CPU, through the same code as a real run.

Every number here was chosen on the miniature's own validation error; docs/miniature.md reports what it gives.
"""

import ml_collections

from configs import default

# What learns from images: everything but the encoder and the decoder's MLPs, which keep what the text taught them.
ATTENDING = "^(compressor/|projector/|lm/(?!layers/mlp/))"


def get_config():
    c = default.get_config()
    with c.unlocked():
        c.sweep = sweep()
    c.model.compressor.unlock()  # as in default.py

    c.model.vit.preset = "mini"
    c.model.vit.dtype = "float32"
    c.model.compressor.name = "tokenpacker"
    c.model.compressor.num_heads = 4
    c.model.compressor.taps = ()
    c.model.compressor.dtype = "float32"
    c.model.projector_norm = "rms"
    c.model.projector_positions = "grid"
    c.model.projector_scale = "words"
    c.model.lm.preset = "mini-82k"
    c.model.lm.dtype = "float32"
    c.model.lm.remat = "none"

    c.data.tokenizer = "tokenizer"
    c.data.template = "vicuna_v1"
    c.data.system = ""
    c.data.turns = "independent"
    c.data.max_query_tokens = 16
    c.data.image_mode = "stretch"
    c.data.batch_size = 32

    c.optim.optimizer = "muon"
    c.optim.warmup_ratio = 0.075
    c.optim.beta2 = 0.99

    c.train.save_every = 1_000_000  # the last step alone: a stage takes a minute

    c.eval.batch_size = 256
    c.eval.max_new_tokens = 2
    return c


# Limits of the miniature, which the report prints beside its numbers.
CAVEATS = (
    "The tasks are built so that each resource binds: reasoning is recall and short composition, whose error the LM's "
    "capacity sets; OCR needs as many visual tokens as there are characters. The order of the exponents is therefore "
    "nearly built in. The miniature shows the machinery and the order, not the paper's ratio.",
    "Of the reasoning questions only the fifth about sheets need more than one visual token, which sets reasoning's beta; of the "
    "OCR questions only the relations of characters need the LM's capacity, which sets OCR's alpha. Both shares were chosen.",
    "The curves are not clean power laws over so short a range. With D free, alpha moves a lot along the flat direction of "
    "the fit; compare exponents at D = 0 and trust their order only.",
    "Differences between seeds are larger than what resampling questions would suggest: read intervals over seeds.",
    "N counts the parameters of the layers, without embeddings.",
)


def sweep() -> ml_collections.ConfigDict:
    s = default.sweep()
    s.title = "The miniature: LM size against visual tokens"
    s.caveats = CAVEATS
    s.seeds = (0,)  # each seed repeats everything: world, encoder, text, cells
    s.lms = ("mini-21k", "mini-45k", "mini-82k", "mini-131k", "mini-254k")  # keys of presets.LM
    s.visual_tokens = (1, 4, 16, 64)
    s.beside = (("quecc", "mini-82k", 1),)
    # Unlike QueCC as released, its cells know where a patch lies and read the question's words.
    s.compressor_settings.quecc = {"positions": "sines", "query_layers": 0}
    s.benchmarks = ("mini_reasoning", "mini_ocr")
    s.looks = ("mini_ocr", "read ")
    s.prepare = "vlm_jax.miniworld.generate.write"
    s.prepare_settings.num_train_images = 4000  # scenes and sheets in the shares of generate.py
    s.prepare_settings.num_test_images = 800
    s.prepare_settings.num_encoder_images = 2048
    s.prepare_settings.num_text_records = 32000  # eight questions each
    s.processes = 0  # parts side by side, each on one core; 0: one per core, on a GPU or TPU 1
    s.max_reruns = 2  # of a cell that stays at chance, each with other seeds, before it is flagged
    s.failed_above = 0.93  # error of a benchmark at or above which a cell stays at chance
    s.plan_text_tokens = 10  # of the figures and the plan
    s.plan_budget_gflops = 0.003  # per question
    s.fixed_d = 0.0  # the law's D: over so short a range a free one is not identified

    # Stages: steps, samples per step, tokens of a conversation without visual ones, peak rates and their end. To look at a
    # place is learnt late and only while the rate is high: it stays at its peak for half of the steps.
    s.stages.encoder = default.stage(
        per="seed", compressor="identity",
        annotations=("encoder_train.json",), trainable=".", steps=350, batch_size=32, text_tokens=125,
        learning_rate=3e-3, muon_learning_rate=1e-2, decay_ratio=0.0,
    )  # fmt: skip
    s.stages.text = default.stage(
        per="lm", compressor="tokenpacker", settings=(("data.max_images", 0),),
        annotations=("text_train.json",), trainable="^lm/", steps=800, batch_size=32, text_tokens=66,
        learning_rate=4e-3, muon_learning_rate=2e-2, decay_ratio=0.0,
    )  # fmt: skip
    begun = {"vit": "encoder", "lm": "text"}
    s.stages.vlm = default.stage(
        cells="blind", init=begun, cached=True,
        annotations=("vlm_train.json",), trainable=ATTENDING, steps=400, batch_size=32,
        text_tokens=64, learning_rate=1e-2, muon_learning_rate=2e-2, decay_ratio=0.4,
    )  # fmt: skip
    # As many questions per step, one per image: a query-aware compressor looks at one question.
    s.stages.query_aware_vlm = default.stage(
        cells="query_aware", init=begun, cached=True,
        annotations=("vlm_single_train.json",), trainable=ATTENDING, steps=400, batch_size=256,
        text_tokens=9, learning_rate=1e-2, muon_learning_rate=2e-2, decay_ratio=0.4,
    )  # fmt: skip
    s.cache = ("vlm_train.json", "reasoning_test.json", "ocr_test.json")
    s.cached_eval = True
    return s
