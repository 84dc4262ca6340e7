"""A trained checkpoint that answers questions: it is restored onto the mesh once, then asked in batches of fixed shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlm_jax import compressors, sharding
from vlm_jax.benchmarks.predictions import Answer
from vlm_jax.compressors import with_tokens
from vlm_jax.costs import flops
from vlm_jax.data import eval_batches as prompts
from vlm_jax.data.records import parse
from vlm_jax.data.rows import make_chat
from vlm_jax.inference import placement
from vlm_jax.inference.generate import Decoding, for_decoding, make_generate
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.models.attention import for_inference
from vlm_jax.models.lm import Cache
from vlm_jax.models.vlm import Inputs
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import opened, weights
from vlm_jax.storage.opened import Opened

Rows = Sequence[dict[str, Any]]
Batch = Mapping[str, jax.Array]

FILE = "evaluation records"  # stands for the file in error messages about rows that come from none


class Answerer:
    """The newest checkpoint of a training run, ready to answer. Answerers of equal models share their compiled code."""

    def __init__(self, settings: EvalConfig, mesh: MeshConfig | Mesh, run: Opened | None = None):
        """run: the model, in place of the run settings.checkpoint.

        Raises ConfigError when the checkpoint does not fit the mesh, or the model cannot give settings.visual_tokens.
        """
        sharding.start_processes()
        run = run or opened.from_run(settings.checkpoint)
        compressor, grid = run.model.compressor, run.model.vit.grid
        if settings.visual_tokens:
            compressor = with_tokens(compressor, grid, settings.visual_tokens)
        model = dataclasses.replace(run.model, compressor=compressor)
        if isinstance(mesh, MeshConfig):
            mesh = placement.mesh_for(model, mesh, rows=settings.batch_size)
        self.mesh, self.settings = mesh, settings
        self.model = for_inference(model, self.mesh.devices.flat[0])
        query = settings.query or run.data.query
        self.data = dataclasses.replace(run.data, features_dir=settings.features_dir, query=query)
        self.visual_tokens = compressors.num_tokens(compressor, grid)
        self.chat = make_chat(self.data, self.visual_tokens)
        keep_vit = bool(settings.features_dir)
        self.params = run.load(weights.answering(self.model, self.mesh, keep_vit))
        if settings.features_dir:
            weights.check_cached(settings.features_dir, self.model, self.params["vit"])
        self.decoding = Decoding(
            settings.max_new_tokens, self.chat.closing_ids, self.chat.tokenizer.pad_id, settings.temperature,
            settings.top_p,
        )  # fmt: skip
        self._generator = make_generate(self.model, self.decoding)
        self.prompt_tokens = self.answer_tokens = 0  # processed so far

    @functools.cached_property
    def _decoding_params(self) -> Any:
        """Made when the first answer is generated: likelihoods need none."""
        return for_decoding(self.model.lm, self.params)

    @property
    def compilations(self) -> int:
        """How often the functions of this model were compiled, by all Answerers of the process."""
        return self._generator.compilations

    @property
    def counts(self) -> dict[str, int]:
        """Tokens processed and functions compiled so far."""
        return {
            "prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens, "compilations": self.compilations,
        }  # fmt: skip

    @property
    def writes(self) -> bool:
        """Whether this process writes the files: only the first one does."""
        return jax.process_index() == 0

    def wait(self) -> None:
        """Waits until every process has reached this call."""
        multihost_utils.sync_global_devices("answers")

    def answer(
        self,
        rows: Rows,
        image_root: str,
        is_chosen: Callable[[dict[str, Any]], bool],
        file: str = FILE,
    ) -> Iterator[list[Answer]]:
        """`choose` for the rows with is_chosen, `ask` for the others; at most eight programs are compiled.

        file: where the rows come from, for error messages.
        """
        chosen = [row for row in rows if is_chosen(row)]
        generated = [row for row in rows if not is_chosen(row)]
        # With both kinds, each compiles a prefix and three widths; otherwise one prefix and four widths are compiled.
        most = prompts.MAX_BUCKETS - bool(chosen and generated)
        batch_size = self.settings.batch_size
        yield from self.choose(chosen, image_root, batch_size, most, file)
        yield from self.ask(generated, image_root, batch_size, most, file)

    def ask(
        self,
        rows: Rows,
        image_root: str,
        batch_size: int,
        most_buckets: int = prompts.MAX_BUCKETS,
        file: str = FILE,
    ) -> Iterator[list[Answer]]:
        """Generates (id, text) for every row, batch by batch, shortest prompts first. Every process gets all answers.

        rows: LLaVA records that end with a question; ids are unique and not empty. A greedy text depends only on its row,
        a sampled one also on the seed; neither depends on batch_size or on the other rows.
        """
        asked = self._prepare(rows, image_root, batch_size, most_buckets, file, None)
        params = self._decoding_params

        def generate(batch: Batch, prefix: Cache | None) -> jax.Array:
            seeds = batch["seeds"] ^ np.uint32(self.settings.seed % 2**32).view(np.int32)
            return self._generator(params, Inputs.from_batch(batch), seeds, prefix)

        for ids, tokens in self._outputs(asked, generate):
            told = [(i, self._kept(row)) for i, row in zip(ids, tokens, strict=True) if i]
            self.answer_tokens += sum(len(kept) for _, kept in told)
            yield [(i, self.chat.tokenizer.decode(kept.tolist()).strip()) for i, kept in told]

    def choose(
        self,
        rows: Rows,
        image_root: str,
        batch_size: int,
        most_buckets: int = prompts.MAX_BUCKETS,
        file: str = FILE,
    ) -> Iterator[list[Answer]]:
        """As `ask`, but the text is the most likely of the row's "replies", the first of equally likely ones."""
        texts = {row["id"]: row["replies"] for row in rows}
        for batch in self.likelihoods(rows, image_root, batch_size, most_buckets, file):
            yield [(i, texts[i][int(np.argmax(likelihoods))]) for i, likelihoods in batch]

    def likelihoods(
        self,
        rows: Rows,
        image_root: str,
        batch_size: int,
        most_buckets: int = prompts.MAX_BUCKETS,
        file: str = FILE,
    ) -> Iterator[list[tuple[str, Float[np.ndarray, "R"]]]]:
        """(id, log-probability of each of the row's "replies" as the answer), batch by batch, in one forward pass each.

        The log-probability includes the token that closes the answer, and is not normalised by length.
        """
        counts = {row["id"]: len(row["replies"]) for row in rows}
        replies = [row["replies"] for row in rows]
        asked = self._prepare(rows, image_root, batch_size, most_buckets, file, replies)
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
        file: str,
        replies: Sequence[Sequence[str]] | None,
    ) -> prompts.Prompts:
        sharding.check_batch(batch_size, self.mesh)
        shard, num_shards = sharding.data_shard(self.mesh)
        asked = prompts.prepare(
            rows, image_root, self.data, self.visual_tokens, self.model.vit, batch_size,
            file=file, replies=replies, most_buckets=most_buckets, shard=shard, num_shards=num_shards,
        )  # fmt: skip
        self.prompt_tokens += asked.num_tokens
        return asked

    def _outputs(
        self, asked: prompts.Prompts, run: Callable[[Batch, Cache | None], jax.Array]
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, output of `run`) of each batch, gathered from all processes. The next batch is dispatched before one is fetched."""
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
        """Forward FLOPs of an average question in a batch of one: for the mean prompt, query and answer lengths of `rows`.

        texts: the answers by id. is_chosen: whether a row's answer is chosen among its replies, which are then processed
        together with the prompt.
        """
        asked, queries, images, outputs = [], [], [], []
        for row in rows:
            record = parse(row, FILE, image_root, row["id"], True, self.data.ignored_fields)
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
        """The tokens before the first closing token."""
        ends = np.flatnonzero(np.isin(tokens, self.decoding.eos_ids))
        return tokens[: ends[0]] if len(ends) else tokens


def _fetch(output: jax.Array) -> np.ndarray:
    """The rows of a batch from all processes."""
    if jax.process_count() == 1:
        return np.asarray(output)
    return np.asarray(multihost_utils.process_allgather(output, tiled=True))
