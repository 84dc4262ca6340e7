"""The stages of the miniature's sweep: for each training its config, made from configs/mini.py's `sweep` block, and its folders."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax import compressors
from vlm_jax.hf import named
from vlm_jax.settings.model import stride_for

QUERY_AWARE = "quecc"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep."""

    seed: int
    compressor: str
    lm: str
    visual_tokens: int

    @property
    def name(self) -> str:
        return f"{self.compressor}-{self.lm}-v{self.visual_tokens}"

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Shared:
    """The directories below seed<k>/ that all cells of one seed share."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def encoder(self) -> Path:
        return self.root / "encoder"

    @property
    def features(self) -> Path:
        return self.root / "features"

    def text(self, lm: str) -> Path:
        return self.root / "text" / lm

    def log(self, part: str) -> Path:
        return self.root / "logs" / f"{part}.txt"


def stage(cfg: ConfigDict, seed: int, name: str, shared: Shared) -> ConfigDict:
    """A copy of `cfg` with the settings of sweep.<name>, on the miniature's files and with its seeds."""
    settings = cfg.sweep[name]
    c = copy.deepcopy(cfg)
    c.train.num_steps = settings.steps
    c.train.save_every = settings.steps
    c.train.seed = c.data.seed = seed
    c.optim.trainable = settings.trainable
    c.optim.learning_rate = settings.learning_rate
    c.optim.muon_learning_rate = settings.muon_learning_rate
    c.optim.decay_ratio = settings.decay_ratio
    c.data.annotations = (str(shared.data / settings.annotations),)
    c.data.image_roots = (str(shared.data),)
    c.data.tokenizer = str(shared.data / "tokenizer")
    c.data.batch_size = settings.batch_size
    c.data.max_tokens = settings.text_tokens
    return c


def encoder_stage(cfg: ConfigDict, seed: int, shared: Shared) -> ConfigDict:
    """Training of the encoder: inside a VLM without compression, with all parameters trainable."""
    c = stage(cfg, seed, "encoder", shared)
    compressors.choose(c.model.compressor, "identity")
    c.data.max_tokens += named.vlm(c.model.to_dict()).vit.num_patches
    return c


def text_stage(cfg: ConfigDict, seed: int, lm: str, shared: Shared) -> ConfigDict:
    """Training of the language model on text alone."""
    c = stage(cfg, seed, "text", shared)
    c.model.lm.preset = lm
    c.data.max_images = 0
    return c


def cell_stage(cfg: ConfigDict, cell: Cell, shared: Shared, seed: int) -> ConfigDict:
    """Training of compressor, projector and language model on the cached features of the frozen encoder."""
    c = stage(cfg, seed, "query_aware_vlm" if cell.compressor == QUERY_AWARE else "vlm", shared)
    c.model.lm.preset = cell.lm
    stride = stride_for(named.vlm(c.model.to_dict()).vit.grid, cell.visual_tokens)
    asking = cfg.sweep.asking.to_dict() if cell.compressor == QUERY_AWARE else {}
    compressors.choose(c.model.compressor, cell.compressor, stride=stride, **asking)
    c.data.max_tokens += cell.visual_tokens
    c.data.features_dir = str(shared.features)
    c.init.vit = str(shared.encoder)
    c.init.lm = str(shared.text(cell.lm))
    return c


def work(c: ConfigDict) -> int:
    """The decoder's products in a stage: how long it takes, in a unit that all stages of a sweep share."""
    tokens = c.train.num_steps * c.data.batch_size * c.data.max_tokens
    return tokens * named.vlm(c.model.to_dict()).lm.non_embedding_params
