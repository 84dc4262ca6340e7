"""A trained run as a model of lmms-eval: `python -m lmms_eval --model vlm_jax --model_args checkpoint=DIR ...`.

lmms-eval finds `manifest` through the entry point in setup.py. It is not a dependency: only this module imports it, and no
other module imports this one. Interface: lmms_eval/api/model.py and models/registry_v2.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.model import lmms  # pyrefly: ignore[missing-import]
from PIL import Image

from vlm_jax.data import images, sources
from vlm_jax.files import Path, to_path
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.progress import Bar
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment

# The supported generation_kwargs and their defaults, which are those of LLaVA in lmms-eval.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "do_sample": None, "until": (),
}  # fmt: skip
NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
}  # accepted only with these values, which have no effect
# Accepted and not used: a run has an image mode of its own, `data.image_mode`.
UNUSED = ("image_aspect_ratio",)


class Sampling(NamedTuple):
    """How tokens are chosen. Questions with equal settings are answered together."""

    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_p: float


class Request(NamedTuple):
    """One request. row: a LLaVA record whose id names task, split, document and repetition."""

    row: dict[str, Any]
    sampling: Sampling
    stops: tuple[str, ...]  # the answer ends before the first of them


class VLMJax(lmms):
    """Answers the generate_until requests of lmms-eval about images. Other kinds of requests raise ConfigError."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        visual_tokens: int = 0,
        query: str = "",
        seed: int = 0,
        fsdp: int = 1,
        tensor: int = 1,
    ):
        """The arguments are those of `--model_args`; lmms-eval passes `--batch_size` itself, as a string.

        checkpoint: workdir of a training run. visual_tokens: per image, 0 as the run's config says. query: as in
        DataConfig, "" as in the run. seed: of sampling. fsdp, tensor: axes of the mesh; data takes the other devices.
        Raises ConfigError, before any data set is read, for a value that cannot be used.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(
                f"lmms-eval: --batch_size must be a number, 1 or more, got {batch_size!r}; give --batch_size 16."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # lmms-eval would split the questions by it
            raise ConfigError(
                f"lmms-eval: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but one process drives all devices; start it "
                "with python -m lmms_eval, without accelerate or torchrun."
            )
        experiment.read(checkpoint)
        if experiment.last_step(checkpoint) is None:
            raise ConfigError(
                f"lmms-eval: checkpoint {checkpoint!r} has no finished checkpoint; train first."
            )
        self.batch_size = int(batch_size)
        self.mesh = MeshConfig(fsdp=fsdp, tensor=tensor)
        self.settings = EvalConfig(
            checkpoint, self.batch_size, DEFAULTS["max_new_tokens"], visual_tokens=visual_tokens, query=query, seed=seed
        )  # fmt: skip
        self._loaded: tuple[Sampling, Any] | None = None  # with its answer.Answerer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, stripped, in the order of the requests.

        requests: Instances whose args are (context, generation_kwargs, doc_to_visual, doc_id, task, split); one that is
        repeated is answered as often, each time with another seed. Raises ConfigError for generation_kwargs and
        visuals that are not supported, before the first answer.
        """
        texts: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="vlm_jax_lmms_eval_") as folder:
            questions = self._questions(requests, to_path(folder))
            with Bar("vlm_jax", len(questions)) as bar:
                for sampling in dict.fromkeys(q.sampling for q in questions):
                    rows = [q.row for q in questions if q.sampling == sampling]
                    for answers in self._answerer(sampling).ask(rows, folder, self.batch_size):
                        texts.update(answers)
                        bar.advance(len(answers))
        return [cut(texts[q.row["id"]], q.stops) for q in questions]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise _unsupported("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise _unsupported("generate_until_multi_round", requests)

    def _questions(self, requests: Sequence[Any], folder: Path) -> list[Request]:
        """The requests as rows. Images are written to `folder` under a name made of their content, so each is there once."""
        repeats: collections.Counter[str] = collections.Counter()
        questions = []
        for request in requests:
            context, kwargs, doc_to_visual, doc_id, task, split = request.args
            document = f"{task}/{split}/{doc_id}"
            sampling, stops = parse_kwargs(kwargs, task)
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            files = [_write_image(visual, folder, document) for visual in visuals]
            if sources.IMAGE not in context:  # otherwise the task has placed them
                context = f"{sources.IMAGE}\n" * len(files) + context
            row = {
                "id": f"{document}/{repeats[document]}",
                "image": files,
                "conversations": [{"from": sources.HUMAN, "value": context}],
            }
            repeats[document] += 1
            questions.append(Request(row, sampling, stops))
        return questions

    def _answerer(self, sampling: Sampling) -> Any:
        """The run, restored for `sampling`. The weights are read again when the sampling changes."""
        from vlm_jax.inference.answer import Answerer  # here, not above: jax and orbax take seconds

        if self._loaded is None or self._loaded[0] != sampling:
            self._loaded = None  # frees the memory first
            settings = dataclasses.replace(self.settings, **sampling._asdict())
            self._loaded = sampling, Answerer(settings, self.mesh)
        return self._loaded[1]


def manifest() -> Any:
    """The entry point's payload: a ModelManifest."""
    from lmms_eval.models.registry_v2 import (  # pyrefly: ignore[missing-import]
        ModelManifest,  # not above: lmms_eval.models calls this function while it is imported
    )

    return ModelManifest("vlm_jax", simple_class_path=f"{__name__}.{VLMJax.__name__}")


def parse_kwargs(kwargs: Mapping[str, Any], task: str) -> tuple[Sampling, tuple[str, ...]]:
    """The sampling settings and the stop strings of a task's generation_kwargs. A value of None counts as not given.

    Greedy unless the temperature is positive; do_sample=false is greedy at any temperature, as in transformers. Raises
    ConfigError for unsupported or contradictory values.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL and value == NEUTRAL[name]:
            continue
        if name not in DEFAULTS and name not in UNUSED:
            raise ConfigError(
                f"lmms-eval: {task}: generation_kwargs {name}={value!r} is not supported; allowed are "
                f"{', '.join((*DEFAULTS, *UNUSED))}, num_beams=1 and repetition_penalty=1.0."
            )
    values = DEFAULTS | given
    temperature, stops = float(values["temperature"]), values["until"]
    if values["do_sample"] and temperature == 0:
        raise ConfigError(
            f"lmms-eval: {task}: do_sample=True needs a temperature above 0; give --gen_kwargs temperature=1."
        )
    if temperature == 0 or values["do_sample"] is False:
        sampling = Sampling(values["max_new_tokens"], 0.0, 1.0)
    else:
        sampling = Sampling(values["max_new_tokens"], temperature, float(values["top_p"]))
    return sampling, (stops,) if isinstance(stops, str) else tuple(stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, stripped. Empty stop strings are ignored."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))].strip()


def _write_image(visual: Any, folder: Path, document: str) -> str:
    """Writes an image as PNG, converted to RGB as in the data pipeline, and returns the name of the file."""
    if not isinstance(visual, Image.Image):
        raise ConfigError(
            f"lmms-eval: {document} shows a {type(visual).__name__}; only images are supported, no video or audio; "
            "choose tasks about images."
        )
    data = io.BytesIO()
    images.to_rgb(visual).save(data, "PNG", compress_level=1)  # fast, and hardly larger
    path = folder / f"{hashlib.sha256(data.getbuffer()).hexdigest()}.png"
    path.write_bytes(data.getbuffer())
    return path.name


def _unsupported(kind: str, requests: Sequence[Any]) -> ConfigError:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    return ConfigError(
        f"lmms-eval: {kind} is not supported, which {tasks} asks for; choose tasks whose output_type is generate_until."
    )
