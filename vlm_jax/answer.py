"""A trained checkpoint that answers questions: restored onto the mesh once, then asked in fixed-shape batches."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from vlm_jax import compressors, experiment, sharding, weights
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.config import with_tokens
from vlm_jax.data import pipeline, sources
from vlm_jax.data.rows import make_chat
from vlm_jax.generate import Decoding, make_generate
from vlm_jax.laws import flops
from vlm_jax.models.vlm import Inputs
from vlm_jax.run_config import MeshConfig

Rows = Sequence[dict[str, Any]]


class Answerer:
    """The newest checkpoint of a training run. Two of the same model share their compiled code."""

    def __init__(
        self,
        checkpoint: str,
        mesh: MeshConfig,
        features_dir: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        visual_tokens: int = 0,
        query: str = "",
    ):
        """checkpoint: workdir of the training run. features_dir: cached encoder features, "" to encode the images.

        seed: of sampling. visual_tokens: per image, 0 as the run's config says. query: as in DataConfig, "" as in the run.
        Raises ConfigError when the checkpoint cannot be restored onto the mesh or the tokens cannot be chosen.
        """
        sharding.start_processes()
        run = experiment.read(checkpoint)
        compressor, grid = run.model.compressor, run.model.vit.grid
        if visual_tokens:
            compressor = with_tokens(compressor, grid, visual_tokens)
        self.model, self.seed = dataclasses.replace(run.model, compressor=compressor), seed
        self.data = dataclasses.replace(
            run.data, features_dir=features_dir, query=query or run.data.query
        )
        self.visual_tokens = compressors.num_tokens(compressor, grid)
        self.chat = make_chat(self.data, self.visual_tokens)
        self.mesh = sharding.make_mesh(mesh)
        self.params = weights.load(checkpoint, self.model, weights.abstract(self.model, self.mesh))
        self.decoding = Decoding(
            max_new_tokens,
            self.chat.closing_ids,
            self.chat.tokenizer.pad_id,
            temperature,
            top_p,
        )
        self._generator = make_generate(self.model, self.decoding)

    @property
    def compilations(self) -> int:
        """How often the generation of this model was compiled, by whichever Answerer."""
        return self._generator.compilations

    @property
    def writes(self) -> bool:
        """Whether this process keeps the files: the first one does."""
        return jax.process_index() == 0

    def wait(self) -> None:
        """Until every process is here."""
        multihost_utils.sync_global_devices("answers")

    def ask(self, rows: Rows, image_root: str, batch_size: int) -> Iterator[list[Answer]]:
        """(id, text) of every row, batch by batch, shortest prompts first; every process gets all of them.

        rows: LLaVA records that end with a question, ids unique and not empty. Greedy texts depend on the row alone,
        sampled ones also on the seed; neither on batch_size nor on the other rows.
        """
        sharding.check_batch(batch_size, self.mesh)
        _, batches = pipeline.eval_batches(
            rows, image_root, self.data, self.visual_tokens, self.model.vit, batch_size
        )
        local = batch_size // jax.process_count()
        mine = slice(jax.process_index() * local, (jax.process_index() + 1) * local)
        for batch in batches:
            ids = batch.pop("ids")
            seeds = np.array([(zlib.crc32(i.encode()) ^ self.seed) % 2**32 for i in ids], np.uint32)
            batch = {name: value[mine] for name, value in batch.items()} | {
                "seeds": seeds.view(np.int32)[mine]
            }
            tokens = self._generate(sharding.put(batch, self.mesh))
            yield [(i, self._text(row)) for i, row in zip(ids, tokens, strict=True) if i]

    def flops(self, rows: Rows, image_root: str, texts: Sequence[str]) -> float:
        """Forward FLOPs of the average question: mean prompt, question and answer lengths over `rows` and `texts`."""
        prompts, queries, images, outputs = [], [], [], []
        for row, text in zip(rows, texts, strict=True):
            record = sources.parse(row, "questions", image_root, row["id"], generate=True)
            images.append(len(record.images))
            length = self.chat.length(self.chat.prompt(record))
            prompts.append(length - images[-1] * self.visual_tokens)
            if record.images:
                queries.append(int(self.chat.query_arrays(record)[1][0].sum()))
            outputs.append(
                min(len(self.chat.tokenizer.encode(text)[0]) + 1, self.decoding.max_new_tokens)
            )
        return float(
            flops.forward_flops(
                self.model,
                text_tokens=round(np.mean(prompts)),
                output_tokens=round(np.mean(outputs)),
                query_tokens=round(np.mean(queries)) if queries else None,
                images=round(np.mean(images)),
            ).total
        )

    def _generate(self, batch: dict[str, jax.Array]) -> Int[np.ndarray, "B G"]:
        with sharding.use(self.mesh):
            tokens = self._generator(self.params, Inputs.from_batch(batch), batch["seeds"])
        if jax.process_count() == 1:
            return np.asarray(tokens)
        return np.asarray(multihost_utils.process_allgather(tokens, tiled=True))

    def _text(self, tokens: Int[np.ndarray, "G"]) -> str:
        """What stands before the first closing token."""
        ends = np.flatnonzero(np.isin(tokens, self.decoding.eos_ids))
        kept = tokens[: ends[0]] if len(ends) else tokens
        return self.chat.tokenizer.decode(kept.tolist()).strip()
