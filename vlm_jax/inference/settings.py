"""The settings of an evaluation: which model is asked which benchmarks, and how its answers are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax import benchmarks
from vlm_jax.data.templates import QUERIES
from vlm_jax.files import to_path
from vlm_jax.settings.checks import ConfigError, build, check_choice, check_positive
from vlm_jax.settings.run import check_texts

# How answers are found -> the ending of the names of their results. With likelihood, a row without "replies" is generated.
MODES = {"generation": "", "likelihood": "_likelihood"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """A trained model, the benchmarks to ask (none where the caller has questions of its own), and how answers are found."""

    checkpoint: str  # workdir of the training run
    batch_size: int  # prompts per step, all devices together
    max_new_tokens: int  # per answer
    benchmarks: tuple[str, ...] = ()  # keys of BENCHMARKS
    annotations: tuple[str, ...] = ()  # one directory per benchmark
    image_roots: tuple[
        str, ...
    ] = ()  # one folder per benchmark ("": its annotations'); () = all ""
    mode: str = "generation"  # a key of MODES
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0  # of sampling
    limit: int = 0  # first questions only; 0 = all
    features_dir: str = ""  # cached encoder features; "" = encode the images
    visual_tokens: int = 0  # per image; 0 = as the run's config says
    query: str = ""  # a key of data.templates.QUERIES; "" = as in training
    with_questions: bool = False  # predictions.jsonl holds each question and its gold answer too

    def __post_init__(self):
        check_positive("eval", batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if not self.checkpoint:
            raise ConfigError(
                "eval: checkpoint is empty; give the workdir of a training run: --config.eval.checkpoint=DIR."
            )
        if self.annotations:
            self.check_benchmarks()
        if len(self.benchmarks) != len(self.annotations):
            raise ConfigError(
                f"eval: {len(self.benchmarks)} benchmarks but {len(self.annotations)} annotations; give one "
                "directory per benchmark."
            )
        if self.image_roots and len(self.benchmarks) != len(self.image_roots):
            raise ConfigError(
                f"eval: {len(self.benchmarks)} benchmarks but {len(self.image_roots)} image_roots; give one folder per "
                "benchmark ('' for the folder of its annotations), or none."
            )
        if len(set(self.benchmarks)) != len(self.benchmarks):
            raise ConfigError(
                f"eval: benchmarks {self.benchmarks} names one twice; name each once."
            )
        if self.temperature < 0:
            raise ConfigError(
                f"eval: temperature must be 0 (greedy) or more, got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"eval: top_p must lie in (0, 1], got {self.top_p}.")
        check_choice("eval", "query", self.query, ("", *QUERIES))
        check_choice("eval", "mode", self.mode, MODES)
        if self.limit < 0:
            raise ConfigError(f"eval: limit must be 0 (all) or more, got {self.limit}.")
        for name in self.benchmarks:
            benchmarks.get(name)

    @classmethod
    def from_block(cls, block: Mapping[str, Any]) -> EvalConfig:
        """The settings in the block `eval` of a config. Raises ConfigError for wrong names and values."""
        check_texts("eval", block, ("benchmarks", "annotations", "image_roots"))
        return build(cls, block)

    def check_benchmarks(self) -> None:
        """Raises ConfigError when no benchmark is named."""
        if not self.benchmarks:
            names = ", ".join(benchmarks.BENCHMARKS)
            raise ConfigError(f"eval: benchmarks is empty; name one or more of {names}.")

    def image_root(self, number: int) -> str:
        """The folder that image paths of a benchmark start from."""
        if self.image_roots and self.image_roots[number]:
            return self.image_roots[number]
        place = to_path(self.annotations[number])
        return str(place if place.is_dir() else place.parent)
