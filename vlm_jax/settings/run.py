"""Frozen, validated settings of a run: data, optimiser, devices, initial parameters. model.py has the model's. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.settings.checks import ConfigError, check_choice, check_positive
from vlm_jax.settings.model import VLMConfig


def check_texts(owner: str, block: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ConfigError when a tuple of names holds something else: a command line reads 2024 as a number."""
    for name in names:
        for value in block[name]:
            if not isinstance(value, str):
                quoted = tuple(map(str, block[name]))
                raise ConfigError(
                    f"{owner}: {name} holds {value!r} ({type(value).__name__}), not a string; give it in quotes: "
                    f'--config.{owner}.{name}="{quoted!r}".'
                )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how one becomes arrays. Sizes are static: nothing recompiles per batch."""

    annotations: tuple[str, ...]  # LLaVA .json / .jsonl files or tfds directories; concatenated
    image_roots: tuple[str, ...]  # one folder per annotation file ("" when it has no images)
    tokenizer: str  # directory with a Hugging Face tokenizer
    template: str  # a key of data.chat.TEMPLATES
    system: str | None  # replaces the template's system prompt; None keeps it
    turns: str  # dialogue | independent: whether a turn attends to earlier turns or to the shared prefix only
    max_tokens: int  # T, visual tokens included
    max_query_tokens: int  # Q
    max_images: int  # I, images per sample; 0 = text only
    image_mode: str  # pad | crop | stretch
    max_image_pixels: int  # larger images are bad records
    batch_size: int  # global
    seed: int  # of the shuffle
    num_workers: int  # decoding processes; 0 = threads of this process
    on_bad_record: str  # raise | skip
    max_bad_records: int  # with skip: stop after this many
    features_dir: str  # cached encoder features to read instead of images; "" = none
    query: str = "first_turn"  # a key of data.templates.QUERIES: the query text of a compressor
    sampling: str = "shuffle"  # shuffle | modality_length: see data.sampling
    length_buckets: tuple[int, ...] = ()  # widths a batch may be cut to; () = max_tokens alone
    packing: bool = False  # several samples per row: see data.packing
    packed_images: int = 8  # image slots of a packed row
    exif_rotation: bool = False  # True: rotate images by their EXIF orientation
    ignored_fields: tuple[str, ...] = ()  # fields of records that are read as if they were absent
    decoder: str = "exact"  # exact | fast: of images, see data.fast_images

    def __post_init__(self):
        check_choice("data", "sampling", self.sampling, ("shuffle", "modality_length"))
        check_choice("data", "turns", self.turns, ("dialogue", "independent"))
        check_choice("data", "query", self.query, ("first_turn", "last_turn", "none"))
        check_choice("data", "image_mode", self.image_mode, ("pad", "crop", "stretch"))
        check_choice("data", "decoder", self.decoder, ("exact", "fast"))
        check_choice("data", "on_bad_record", self.on_bad_record, ("raise", "skip"))
        check_positive("data", max_tokens=self.max_tokens, batch_size=self.batch_size)
        if len(self.annotations) != len(self.image_roots):
            raise ConfigError(
                f"data: {len(self.annotations)} annotations but {len(self.image_roots)} image_roots; give one root per file."
            )
        buckets, modality = self.length_buckets, self.sampling == "modality_length"
        if buckets and (sorted({*buckets}) != [*buckets] or buckets[-1] != self.max_tokens):
            raise ConfigError(
                f"data: length_buckets {buckets} must ascend and end with max_tokens {self.max_tokens}."
            )
        if buckets and not modality:
            raise ConfigError(
                f"data: length_buckets {buckets} need sampling 'modality_length': a shuffled batch has a long row almost always."
            )
        if self.packing and modality:
            raise ConfigError(
                "data: packing fills rows with samples of any length, which sampling 'modality_length' keeps apart; use 'shuffle'."
            )
        if self.packing and self.packed_images < self.max_images:
            raise ConfigError(
                f"data: packed_images {self.packed_images} must be at least max_images {self.max_images}: a sample is not split."
            )

    @property
    def image_slots(self) -> int:
        """Images per row."""
        return self.packed_images if self.packing and self.max_images else self.max_images


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule of the trainable parameters."""

    trainable: str  # regex searched in parameter paths such as "projector/dense_0/kernel"
    optimizer: str  # adamw | muon (hidden matrices by Muon, the rest by AdamW) | adafactor
    learning_rate: float  # peak, AdamW's
    muon_learning_rate: float  # peak, Muon's
    warmup_ratio: float  # of the steps
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_norm: float  # global gradient norm
    momentum_dtype: str = "float32"  # of the first moment: bfloat16 saves 2 bytes per parameter
    # (regex, factor): parameters whose learning rate is that much of the peak; the first match counts
    rates: tuple[Sequence[Any], ...] = ()
    # Of the steps, at the end: the rate falls linearly to 0 and is constant before. 0: a half cosine after the warm-up.
    decay_ratio: float = 0.0

    def __post_init__(self):
        try:  # lists, as JSON has them, become tuples
            rates = tuple((str(pattern), float(factor)) for pattern, factor in self.rates)
        except (TypeError, ValueError):
            raise ConfigError(
                f"optim: rates must be pairs (regex, factor), such as (('^vit/', 0.1),); got {self.rates!r}."
            ) from None
        object.__setattr__(self, "rates", rates)
        for pattern, factor in rates:
            check_positive("optim", **{f"rates {pattern!r}": factor})
        check_choice("optim", "optimizer", self.optimizer, ("adamw", "muon", "adafactor"))
        check_choice("optim", "momentum_dtype", self.momentum_dtype, ("float32", "bfloat16"))
        check_positive("optim", learning_rate=self.learning_rate, clip_norm=self.clip_norm)
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"optim: warmup_ratio must lie in [0, 1), got {self.warmup_ratio}.")
        if not 0 <= self.decay_ratio <= 1 - self.warmup_ratio:
            raise ConfigError(
                f"optim: decay_ratio must lie between 0 and 1 - warmup_ratio = {1 - self.warmup_ratio:g}, got {self.decay_ratio}."
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh of one slice; -1 (at most once) takes the remaining devices.

    tensor = 0 chooses the smallest size that the batch allows: 1 while data * fsdp divides its rows, more where there are
    more devices than rows (see sharding.make_mesh). slices: TPU slices joined by a network (DCN), each a copy of the mesh;
    rows are split over them, so gradients alone cross the network.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        check_positive("mesh", slices=self.slices)
        sizes = (self.data, self.fsdp, self.tensor)
        explicit = sizes if self.tensor else sizes[:2]
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in explicit):
            raise ConfigError(
                f"mesh: data, fsdp, tensor must be positive, with -1 at most once (tensor may be 0: as small as "
                f"the batch allows); got {sizes}."
            )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Per part: a workdir, whose last checkpoint supplies it, or a Hugging Face model directory; "" = `run`'s, or random."""

    vit: str
    compressor: str
    projector: str
    lm: str
    run: str = ""  # init.from: the workdir that supplies the other parts, and the model's settings

    @property
    def sources(self) -> dict[str, str]:
        """Part -> where it comes from; "" = random."""
        parts = ("vit", "compressor", "projector", "lm")
        return {part: getattr(self, part) or self.run for part in parts}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to leave on disk."""

    num_steps: int  # 0 = from num_epochs
    num_epochs: float
    seed: int  # of the initial parameters
    log_every: int
    save_every: int
    keep: int
    on_nonfinite: str = "stop"  # stop | skip: a step whose loss or gradient is NaN or infinite
    max_skipped: int = 10  # with skip: stop after this many
    peer_timeout: int = (
        100  # seconds without a heartbeat of another process after which the run ends
    )
    random_frozen: bool = False  # whether a frozen part may keep its random initial parameters
    save_frozen: bool = False  # whether checkpoints hold what is frozen and lies elsewhere as well
    micro_batches: int = 1  # parts of a batch whose gradients are computed in turn and added
    # Logits are computed for supervised positions alone, of so many per row at once; 0 = for all positions, all at once.
    loss_chunk: int = 0
    validation: tuple[str, ...] = ()  # annotation files of held-out records
    validation_roots: tuple[
        str, ...
    ] = ()  # one folder per file; () = the first of data.image_roots
    validate_every: int = 500  # steps
    keep_best: bool = False  # whether the parameters of the lowest held-out loss are kept as well

    def __post_init__(self):
        if self.keep_best and not self.validation:
            raise ConfigError("train: keep_best needs a held-out loss; set train.validation.")
        if self.validation_roots and len(self.validation_roots) != len(self.validation):
            raise ConfigError(
                f"train: {len(self.validation)} files of validation but {len(self.validation_roots)} validation_roots; give "
                "one root per file, or none."
            )
        check_positive(
            "train", validate_every=self.validate_every, log_every=self.log_every, save_every=self.save_every, keep=self.keep,
            micro_batches=self.micro_batches, peer_timeout=self.peer_timeout,
        )  # fmt: skip
        check_choice("train", "on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if self.loss_chunk < 0:
            raise ConfigError(
                f"train: loss_chunk must be 0 (all positions) or more, got {self.loss_chunk}."
            )
        if self.num_steps <= 0 and not self.num_epochs > 0:
            raise ConfigError(
                f"train: num_steps {self.num_steps} and num_epochs {self.num_epochs} make no step; set one of them."
            )


def logit_block(loss_chunk: int, rows: int, tokens: int, head_learns: bool) -> int:
    """Supervised positions of `rows` rows of `tokens` slots, those of one device, whose logits exist at once.

    Small blocks compute few logits in vain. But each reads the head anew: with less than 256 positions an accelerator waits
    for its memory. Where the head learns, each also adds to the head's gradient in float32, so they are fewer and larger.
    """
    slots = rows * tokens
    block = max(512, -(-slots // 8)) if head_learns else 256
    return min(slots, rows * loss_chunk, block)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All settings of one training run; `config.json` of a workdir holds exactly these."""

    model: VLMConfig
    data: DataConfig
    optim: OptimConfig
    mesh: MeshConfig
    init: InitConfig
    train: TrainConfig
