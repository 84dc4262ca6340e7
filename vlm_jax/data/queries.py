"""Which question about each image a compressor may look at."""

from __future__ import annotations

from collections.abc import Callable

from vlm_jax.data.records import Record

NO_QUERY = "image"  # the query of a row without one, as in the reference


def first_turn(record: Record) -> list[str]:
    """The human turn that shows the image (the first one after it), whole.

    # Differs from llava-token-compression@bdedebd, which cuts the query out of decoded text at "\\n" and "ASSISTANT".
    """
    return [turn.question.strip() or NO_QUERY for turn in record.turns for _ in range(turn.images)]


def last_turn(record: Record) -> list[str]:
    """The last human turn for every image: the question asked now, when a prompt has earlier turns."""
    return [record.turns[-1].question.strip() or NO_QUERY] * len(record.images)


# config.DataConfig.query -> the text for each image of a record; None: no tokens at all, which the model takes as zeros
QUERIES: dict[str, Callable[[Record], list[str]] | None] = {
    "first_turn": first_turn,
    "last_turn": last_turn,
    "none": None,
}
