"""A trained checkpoint that answers questions: restored onto the mesh once, then asked in fixed-shape batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from vlm_jax import compressors, sharding
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.compressors import with_tokens
from vlm_jax.costs import flops
from vlm_jax.data import eval_batches as prompts
from vlm_jax.data.records import parse
from vlm_jax.data.rows import make_chat
from vlm_jax.inference.generate import Decoding, make_generate
from vlm_jax.models.attention import for_inference
from vlm_jax.models.lm import Cache
from vlm_jax.models.vlm import Inputs
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights

Rows = Sequence[dict[str, Any]]
Batch = Mapping[str, jax.Array]


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
        self.mesh, self.seed = sharding.make_mesh(mesh), seed
        model = dataclasses.replace(run.model, compressor=compressor)
        self.model = for_inference(model, self.mesh.devices.flat[0])
        self.data = dataclasses.replace(
            run.data, features_dir=features_dir, query=query or run.data.query
        )
        self.visual_tokens = compressors.num_tokens(compressor, grid)
        self.chat = make_chat(self.data, self.visual_tokens)
        self.params = weights.load(checkpoint, self.model, weights.abstract(self.model, self.mesh))
        if features_dir:
            weights.check_cached(features_dir, self.model, self.params["vit"])
        self.decoding = Decoding(
            max_new_tokens,
            self.chat.closing_ids,
            self.chat.tokenizer.pad_id,
            temperature,
            top_p,
        )
        self._generator = make_generate(self.model, self.decoding)
        self.prompt_tokens = self.answer_tokens = 0  # read and generated so far

    @property
    def compilations(self) -> int:
        """How often the generation of this model was compiled, by whichever Answerer."""
        return self._generator.compilations

    @property
    def counts(self) -> dict[str, int]:
        """What was done so far."""
        return {
            "prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens, "compilations": self.compilations,
        }  # fmt: skip

    @property
    def writes(self) -> bool:
        """Whether this process keeps the files: the first one does."""
        return jax.process_index() == 0

    def wait(self) -> None:
        """Until every process is here."""
        multihost_utils.sync_global_devices("answers")

    def answer(
        self,
        rows: Rows,
        image_root: str,
        batch_size: int,
        is_chosen: Callable[[dict[str, Any]], bool],
    ) -> Iterator[list[Answer]]:
        """`choose` for the rows with is_chosen, `ask` for the others; at most eight programs are compiled."""
        chosen = [row for row in rows if is_chosen(row)]
        generated = [row for row in rows if not is_chosen(row)]
        # Where there are both, each compiles a prefix and three widths; else one and four.
        most = prompts.MAX_BUCKETS - bool(chosen and generated)
        yield from self.choose(chosen, image_root, batch_size, most)
        yield from self.ask(generated, image_root, batch_size, most)

    def ask(
        self, rows: Rows, image_root: str, batch_size: int, most_buckets: int = prompts.MAX_BUCKETS
    ) -> Iterator[list[Answer]]:
        """(id, text) of every row, batch by batch, shortest prompts first; every process gets all of them.

        rows: LLaVA records that end with a question, ids unique and not empty. Greedy texts depend on the row alone,
        sampled ones also on the seed; neither on batch_size nor on the other rows.
        """
        asked = self._prepare(rows, image_root, batch_size, most_buckets, None)

        def generate(batch: Batch, prefix: Cache | None) -> jax.Array:
            seeds = batch["seeds"] ^ np.uint32(self.seed % 2**32).view(np.int32)
            return self._generator(self.params, Inputs.from_batch(batch), seeds, prefix)

        for ids, tokens in self._outputs(asked, generate):
            told = [(i, self._kept(row)) for i, row in zip(ids, tokens, strict=True) if i]
            self.answer_tokens += sum(len(kept) for _, kept in told)
            yield [(i, self.chat.tokenizer.decode(kept.tolist()).strip()) for i, kept in told]

    def choose(
        self, rows: Rows, image_root: str, batch_size: int, most_buckets: int = prompts.MAX_BUCKETS
    ) -> Iterator[list[Answer]]:
        """As `ask`, but the text is the likeliest of the row's "replies"; of equals the first."""
        texts = {row["id"]: row["replies"] for row in rows}
        for batch in self.likelihoods(rows, image_root, batch_size, most_buckets):
            yield [(i, texts[i][int(np.argmax(likelihoods))]) for i, likelihoods in batch]

    def likelihoods(
        self, rows: Rows, image_root: str, batch_size: int, most_buckets: int = prompts.MAX_BUCKETS
    ) -> Iterator[list[tuple[str, Float[np.ndarray, "R"]]]]:
        """(id, log-probability of each of the row's "replies" as the whole answer), batch by batch, by one forward pass.

        An answer is whole with the token that closes it; nothing is divided by its length.
        """
        counts = {row["id"]: len(row["replies"]) for row in rows}
        replies = [row["replies"] for row in rows]
        asked = self._prepare(rows, image_root, batch_size, most_buckets, replies)
        sizes = {"slots": asked.reply_slots, "count": max(counts.values(), default=0)}

        def score(batch: Batch, prefix: Cache | None) -> jax.Array:
            return self._generator.replies(self.params, Inputs.from_batch(batch), prefix, **sizes)

        for ids, totals in self._outputs(asked, score):
            yield [(i, row[: counts[i]]) for i, row in zip(ids, totals, strict=True) if i]

    def _prepare(
        self,
        rows: Rows,
        image_root: str,
        batch_size: int,
        most_buckets: int,
        replies: Sequence[Sequence[str]] | None,
    ) -> prompts.Prompts:
        sharding.check_batch(batch_size, self.mesh)
        shard, num_shards = sharding.data_shard(self.mesh)
        asked = prompts.prepare(
            rows, image_root, self.data, self.visual_tokens, self.model.vit, batch_size,
            replies=replies, most_buckets=most_buckets, shard=shard, num_shards=num_shards,
        )  # fmt: skip
        self.prompt_tokens += asked.num_tokens
        return asked

    def _outputs(
        self, asked: prompts.Prompts, run: Callable[[Batch, Cache | None], jax.Array]
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, what `run` gives for their rows) of each batch, from all processes; the device is one batch ahead."""
        prefix = None
        if asked.prefix.size:
            with sharding.use(self.mesh):
                prefix = self._generator.prefix(self.params, asked.prefix[None])
        ahead: tuple[list[str], jax.Array] | None = None
        for batch in asked.batches:
            with sharding.use(self.mesh):
                output = run(sharding.put(batch, self.mesh), prefix)
            if ahead:
                yield ahead[0], _fetch(ahead[1])
            ahead = batch["ids"], output
        if ahead:
            yield ahead[0], _fetch(ahead[1])

    def flops(
        self,
        rows: Rows,
        image_root: str,
        texts: Mapping[str, str],
        is_chosen: Callable[[dict[str, Any]], bool] = lambda row: False,
    ) -> float:
        """Forward FLOPs of the average question asked alone: mean prompt, question and answer lengths over `rows`.

        texts: the answers by id. is_chosen: whether a row's answer is chosen among its replies, which are read with the
        prompt then.
        """
        asked, queries, images, outputs = [], [], [], []
        for row in rows:
            record = parse(row, "questions", image_root, row["id"], True, self.data.ignored_fields)
            images.append(len(record.images))
            length = self.chat.length(self.chat.prompt(record))
            asked.append(length - images[-1] * self.visual_tokens)
            if record.images:
                queries.append(int(self.chat.query_arrays(record)[1][0].sum()))
            if is_chosen(row):
                asked[-1] += sum(map(len, self.chat.replies(record, row["replies"])))
                outputs.append(1)
            else:
                generated = len(self.chat.tokenizer.encode(texts[row["id"]])[0]) + 1
                outputs.append(min(generated, self.decoding.max_new_tokens))
        return float(
            flops.forward_flops(
                self.model,
                text_tokens=round(np.mean(asked)),
                output_tokens=round(np.mean(outputs)),
                query_tokens=round(np.mean(queries)) if queries else None,
                images=round(np.mean(images)),
            ).total
        )

    def _kept(self, tokens: Int[np.ndarray, "G"]) -> Int[np.ndarray, "kept"]:
        """What stands before the first closing token."""
        ends = np.flatnonzero(np.isin(tokens, self.decoding.eos_ids))
        return tokens[: ends[0]] if len(ends) else tokens


def _fetch(output: jax.Array) -> np.ndarray:
    """The rows of all processes."""
    if jax.process_count() == 1:
        return np.asarray(output)
    return np.asarray(multihost_utils.process_allgather(output, tiled=True))
