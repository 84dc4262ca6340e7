"""Every field once, with its unit and source. Other configs start from here and change values, never names.

None means "as the preset says" in `model` and "as the template says" in `data`.
"""

import ml_collections
from ml_collections import config_dict


def placeholder(kind):
    return config_dict.placeholder(kind)


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.model = model()
    c.data = data()
    c.optim = optim()

    c.mesh = ml_collections.ConfigDict()  # their product = number of devices
    c.mesh.slices = 1  # TPU slices (or nodes) joined by a network; the other sizes are those of one
    c.mesh.data = -1  # replicas of the batch; -1 = the devices that are left
    c.mesh.fsdp = 1  # shards of parameters and optimiser state
    c.mesh.tensor = 1  # shards of heads, MLP widths and vocabulary; 0 = as few as the batch allows

    # Per part: a workdir, whose last checkpoint supplies it, or a model directory of the Hugging Face hub; "" = init.from's,
    # else random.
    c.init = ml_collections.ConfigDict()
    # A workdir that supplies the other parts and, where they are not set, model.*, data.tokenizer, template, system and query.
    c.init["from"] = ""
    c.init.vit = ""
    c.init.compressor = ""
    c.init.projector = ""
    c.init.lm = ""

    c.train = ml_collections.ConfigDict()
    c.train.num_steps = 0  # optimiser steps; 0 = from num_epochs
    # Passes over the data (LLaVA-1.5: 1 in both stages), each rounded up to whole batches: 40 records in batches of 256 are one step.
    c.train.num_epochs = 1.0
    c.train.seed = 0  # of the initial parameters
    c.train.micro_batches = 1  # parts of a batch, computed one after the other: less memory
    # Supervised positions per row whose logits exist at once, at most; 0 = all positions, supervised or not
    c.train.loss_chunk = 512
    c.train.log_every = 10  # steps between progress lines; metrics.jsonl has every step
    c.train.save_every = 500  # steps between checkpoints
    c.train.keep = 2  # checkpoints kept
    c.train.on_nonfinite = "stop"  # stop | skip: a step whose loss or gradient is NaN or infinite
    c.train.max_skipped = 10  # with skip: stop after this many
    c.train.peer_timeout = 100  # seconds without a sign of another process, then the run ends
    c.train.validation = ()  # annotation files of held-out records, whose loss is measured; () = none
    c.train.validation_roots = ()  # one folder per file; () = the first of data.image_roots
    c.train.validate_every = 500  # steps between held-out losses
    c.train.keep_best = False  # True: WORKDIR/best is a run with the parameters of the lowest one
    c.train.save_frozen = False  # True: checkpoints also hold frozen parts that init.* loads, a copy of 4 bytes a parameter each
    c.train.random_frozen = False  # True: a part that does not learn may keep random parameters

    c.eval = ml_collections.ConfigDict()
    c.eval.checkpoint = ""  # workdir of the training run to evaluate
    c.eval.benchmarks = ()  # names in benchmarks.BENCHMARKS
    c.eval.annotations = ()  # one directory per benchmark, with its native files
    c.eval.image_roots = ()  # one folder per benchmark, "" = its annotations'; () = all ""
    c.eval.batch_size = 16  # prompts per step, all devices together
    c.eval.mode = "generation"  # generation | likelihood (of the replies to closed questions)
    c.eval.max_new_tokens = 128  # per answer (LLaVA-1.5's evaluation)
    c.eval.temperature = 0.0  # 0 = greedy
    c.eval.top_p = 1.0  # sample among the likeliest tokens that hold this probability
    c.eval.seed = 0  # of sampling
    c.eval.limit = 0  # first questions of each benchmark only; 0 = all
    c.eval.features_dir = ""  # cached encoder features to read instead of images
    c.eval.visual_tokens = (
        0  # per image; 0 = as the model's config says (M3 and MQT can show others)
    )
    c.eval.with_questions = False  # predictions.jsonl with each question and its gold answer
    c.eval.query = ""  # first_turn | last_turn | none; "" = as in training
    c.lock()
    c.model.compressor.unlock()  # takes the settings of whichever compressor is named
    return c


def model() -> ml_collections.ConfigDict:
    m = ml_collections.ConfigDict()
    m.vit = ml_collections.ConfigDict()
    m.vit.preset = (
        "clip-l-336"  # a key of presets.VIT, a model directory, or "" with every field set
    )
    m.vit.image_px = placeholder(int)  # side of the square input image, pixels
    m.vit.patch_px = placeholder(int)  # side of a patch, pixels
    m.vit.width = placeholder(int)
    m.vit.num_layers = placeholder(int)
    m.vit.num_heads = placeholder(int)
    m.vit.mlp_width = placeholder(int)
    m.vit.activation = placeholder(str)  # gelu_tanh | gelu | quick_gelu
    m.vit.norm_eps = placeholder(float)
    m.vit.cls_token = placeholder(bool)  # CLIP's class token
    m.vit.pre_norm = placeholder(bool)  # CLIP's norm after the embeddings
    m.vit.post_norm = placeholder(bool)  # SigLIP's norm after the last layer
    m.vit.patch_bias = placeholder(bool)  # SigLIP's bias of the patch projection
    m.vit.feature_layer = placeholder(int)  # -1 last hidden state, -2 last but one (LLaVA-1.5)
    m.vit.mean = placeholder(tuple)  # of RGB in [0, 1]
    m.vit.std = placeholder(tuple)
    m.vit.position_grid = placeholder(
        int
    )  # side of the position table when it is interpolated; 0 = grid
    m.vit.resample = placeholder(str)  # bicubic | bilinear: how images are resized
    m.vit.dtype = "bfloat16"  # of the computation
    m.vit.param_dtype = "float32"  # of the parameters; bfloat16 halves a frozen encoder
    m.vit.remat = "none"  # as lm.remat
    m.vit.sharded = (
        False  # True: its weights are split over mesh.fsdp; False: a copy on each device
    )

    m.compressor = ml_collections.ConfigDict()
    # A key of compressors.COMPRESSORS and, where they are not its defaults, its settings: each compressor's own are in
    # vlm_jax/compressors/NAME.py. What stands below is left out by one that does not have it; any other value or setting
    # must be one of the chosen one's.
    m.compressor.name = "quecc"
    m.compressor.stride = 4  # patches per window side; visual tokens = (grid / stride)^2
    m.compressor.num_heads = 8  # of its attention (QueCC, TokenPacker: 8; MQT: 16)
    m.compressor.taps = (12, 16, 22, 23)  # encoder states seen side by side; () = the feature alone
    m.compressor.dtype = "bfloat16"

    m.projector_layers = 2  # LLaVA-1.5's mlp2x_gelu
    m.projector_norm = "none"  # none | rms: RMSNorm of the visual tokens (the miniature's)
    m.projector_positions = "none"  # none | grid: a learned vector per place (likewise)
    m.projector_scale = "one"  # one | words: a new projector's norm and positions begin at the root
    # mean square of the decoder's word embeddings instead of 1 (needs the norm)

    m.lm = ml_collections.ConfigDict()
    m.lm.preset = "vicuna-7b"  # a key of presets.LM, a model directory, or "" with every field set
    m.lm.vocab_size = placeholder(int)
    m.lm.width = placeholder(int)
    m.lm.num_layers = placeholder(int)
    m.lm.num_heads = placeholder(int)
    m.lm.num_kv_heads = placeholder(int)
    m.lm.head_dim = placeholder(int)
    m.lm.mlp_width = placeholder(int)
    m.lm.rope_theta = placeholder(float)
    m.lm.norm_eps = placeholder(float)
    m.lm.qkv_bias = placeholder(bool)
    m.lm.qk_norm = placeholder(bool)
    m.lm.o_bias = placeholder(bool)  # of attention's output map
    m.lm.mlp_bias = placeholder(bool)
    m.lm.tied_embeddings = placeholder(bool)
    m.lm.sliding_window = placeholder(int)  # keys a query may look back on; 0 = all
    m.lm.nominal_params = placeholder(float)  # the size in the model's name, parameters
    m.lm.rope_scaling = ml_collections.ConfigDict()
    m.lm.rope_scaling.kind = placeholder(str)  # none | linear | llama3
    m.lm.rope_scaling.factor = placeholder(float)
    m.lm.rope_scaling.low_freq_factor = placeholder(float)
    m.lm.rope_scaling.high_freq_factor = placeholder(float)
    m.lm.rope_scaling.original_max_positions = placeholder(int)
    m.lm.dtype = "bfloat16"  # of the computation
    m.lm.param_dtype = "float32"  # of the parameters; bfloat16 halves a frozen decoder
    m.lm.remat = "dots"  # kept for the backward pass: none = all | dots = products | full = layer inputs | offload = products, on the host
    m.lm.attention = "auto"  # auto (the platform's) | xla | cudnn (GPU) | splash (TPU)
    m.lm.lora_rank = 0  # of low-rank adapters beside the decoder's linear maps; 0 = none
    m.lm.lora_alpha = 16.0  # their output is scaled by lora_alpha / lora_rank
    m.lm.lora_targets = "."  # regex: which of layers/attn/{q,k,v,o}, layers/mlp/{gate,up,down}
    return m


def data() -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict()
    d.annotations = ()  # LLaVA-format .json / .jsonl files or prepared tfds directories
    d.image_roots = ()  # one folder per annotation file
    d.tokenizer = ""  # directory with a Hugging Face tokenizer
    d.template = "vicuna_v1"  # a key of data.chat.TEMPLATES
    d.system = placeholder(str)  # system prompt; None = the template's
    d.turns = "dialogue"  # dialogue | independent (a turn sees the shared prefix and itself only)
    d.query = "first_turn"  # first_turn | last_turn | none: the question that QueCC looks at
    d.max_tokens = 2048  # tokens per sample, visual ones included (LLaVA-1.5)
    d.max_query_tokens = 64  # tokens of the question that QueCC looks at
    d.max_images = 1  # images per sample; 0 = text only
    d.image_mode = "pad"  # pad (square, mean colour) | crop (shortest side, centre) | stretch
    d.max_image_pixels = 50_000_000  # larger images are bad records
    d.decoder = "exact"  # exact: pixels as Hugging Face's processors; fast: nearly so, for pip install "vlm_jax[fast]"
    d.exif_rotation = False  # True: images are turned as their EXIF orientation says (LLaVA: never)
    d.ignored_fields = ()  # fields of records taken for absent, such as ("video",): see data.fields
    d.batch_size = 128  # samples per step, all devices together
    d.seed = 0  # of the shuffle
    d.sampling = (
        "shuffle"  # shuffle | modality_length (LLaVA-1.5: images or text only, alike in length)
    )
    d.length_buckets = ()  # with modality_length: widths a batch is cut to, ascending, the last one
    # max_tokens, such as (512, 1024, 2048); each is one more compilation per modality; () = max_tokens
    d.packing = False  # several samples per row of max_tokens; batch_size then counts packed rows
    d.packed_images = 8  # with packing: image slots per row; an empty slot costs an encoder pass
    d.num_workers = 0  # decoding processes; 0 = threads of this process
    d.on_bad_record = "raise"  # raise | skip
    d.max_bad_records = 100  # with skip: stop after this many
    d.features_dir = ""  # cached encoder features to read instead of images
    return d


def optim() -> ml_collections.ConfigDict:
    o = ml_collections.ConfigDict()
    o.trainable = "^(compressor|projector|lm)/"  # regex over parameter paths
    o.optimizer = "adamw"  # adamw | muon (hidden matrices by Muon, the rest by AdamW) | adafactor
    o.learning_rate = 2e-5  # peak
    o.muon_learning_rate = 1e-2  # peak, of Muon's matrices
    o.rates = ()  # (regex, factor): parameters that learn at another rate, such as (("^vit/", 0.1),)
    o.warmup_ratio = 0.03  # of the steps
    o.decay_ratio = 0.0  # of the steps, at the end, linearly to 0 and constant before; 0 = half a cosine after the warm-up
    o.weight_decay = 0.0
    o.beta1 = 0.9
    o.beta2 = 0.999
    o.eps = 1e-8
    o.clip_norm = 1.0  # of the global gradient norm
    o.momentum_dtype = "float32"  # of the first moment (adamw, muon); bfloat16 saves memory
    return o


def sweep() -> ml_collections.ConfigDict:
    """The block `sweep` of a config over many cells, which configs/default.py itself has not; see vlm_jax/sweeps/__init__.py."""
    s = ml_collections.ConfigDict()
    s.title = "LM size against visual tokens"  # of the report
    s.seeds = (0,)  # each seed repeats everything
    # Keys of compressors.COMPRESSORS, "resized", "text_only", or other names whose compressor_settings name the compressor.
    s.compressors = ("tokenpacker",)
    s.lms = ()  # keys of presets.LM or model directories
    s.visual_tokens = ()
    s.beside = ()  # (compressor, LM, visual tokens): cells shown beside the law, not in it
    # Where it is not `visual_tokens`: compressor -> its own counts. And compressor -> other fields of model.compressor.
    s.visual_tokens_of = ml_collections.ConfigDict()
    s.compressor_settings = ml_collections.ConfigDict()
    # (LM, {field of the config: value}), such as ("vicuna-7b", {"mesh.fsdp": 8, "init.lm": "vicuna"}); a field below the name of
    # a stage, "tune.optim.learning_rate", is for that stage alone.
    s.lm_settings = ()
    s.held_out = ()  # LMs that are measured and predicted, not fitted
    s.elastic = True  # M3, MQT and querypool are trained once per LM, for all their counts
    s.inputs = "."  # folder from which relative paths begin, unless there is a prepare step
    s.prepare = ""  # dotted path of a function (folder, seed, **prepare_settings) that writes data
    s.prepare_settings = ml_collections.ConfigDict()
    s.stages = ml_collections.ConfigDict()  # name -> stage(..), in their order
    s.cache = ()  # annotation files; features of their images are computed once
    s.cache_image_roots = ()  # one folder per file; () = where relative paths begin
    s.cached_eval = False  # True: the cache holds the benchmarks' images too
    s.benchmarks = ()  # keys of benchmarks.BENCHMARKS
    s.annotations = ()  # one folder per benchmark; () = where relative paths begin
    s.image_roots = ()  # as eval.image_roots
    s.families = ()  # one per benchmark: the law that its errors are fitted by; "" = its own
    s.processes = 0  # parts side by side, each on one core; 0: one per core, on a GPU or TPU 1
    s.max_reruns = 0  # of a training that stays at chance or is out of line, before it is flagged
    s.failed_above = 1.01  # error of a benchmark at or above which a cell stays at chance
    s.plan_text_tokens = 50  # of the figures and the plan (the paper's Q)
    s.plan_budget_gflops = 1000.0  # per question
    s.fixed_d = placeholder(float)  # the law's D; None = fitted
    s.looks = ()  # (benchmark, beginning of a question): where a cell of `beside` looks is drawn
    s.caveats = ()  # sentences of the report
    # Numbers to print beside the measured ones: (compressor, visual tokens, {benchmark: as Table 1 prints it}), and by family
    # the alpha and beta of a published law and the cells that it was fitted to.
    s.published = ()
    s.published_law = ml_collections.ConfigDict()
    s.published_cells = ml_collections.ConfigDict()  # family -> a table of vlm_jax/laws/data
    return s


def stage(**given) -> ml_collections.ConfigDict:
    """One stage of a sweep, with the fields that are given."""
    g = ml_collections.ConfigDict()
    g.per = "cell"  # cell | lm | seed: what it is trained once for
    g.cells = "all"  # all | blind | query_aware: cells whose compressors do not, or do, look at the question
    g.compressor = ""  # "" = the cell's
    g.annotations = ()  # as data.annotations
    g.image_roots = ()  # one folder per file; () = where relative paths begin
    g.trainable = "."  # as optim.trainable
    g.steps = 0  # optimiser steps; 0 = from epochs
    g.epochs = 0.0
    g.batch_size = 32
    g.text_tokens = 64  # tokens of a row beside the visual ones
    # (text tokens, share of the steps): rows alike in length, cut to these widths; the shares are for --dry-run alone.
    g.buckets = ()
    g.records = 0  # of the annotations, for --dry-run where steps are counted in epochs
    g.learning_rate = 1e-3  # peak
    g.muon_learning_rate = 1e-2  # peak, of Muon's matrices
    g.decay_ratio = 0.0  # as optim.decay_ratio
    # Part -> an earlier stage; "" = as the block `init` says, or a preset that is a model directory.
    g.init = ml_collections.ConfigDict({"vit": "", "compressor": "", "projector": "", "lm": ""})
    g.cached = False  # True: reads the cached features instead of the images
    g.settings = ()  # (field of the config, value): further ones
    with g.unlocked():
        for name, value in given.items():
            if name not in g:
                raise ValueError(f"a stage has no field {name!r}")
            g[name] = {**g[name], **value} if name == "init" else value
    return g
