"""Samples packed into one row do not see each other: the logits, and every gradient, are those of each sample alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor import compressor_config

from vlm_jax.models.vlm import VLM, Inputs, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.model import VLMConfig
from vlm_jax.training.losses import next_token_loss

VOCAB, SLOTS = 32, 4
LENGTHS = (9, 7, 8)  # three samples, the last one without a picture; 2 slots of padding


def config(compressor: str, **lm) -> VLMConfig:
    return VLMConfig(
        vit=presets.vit("mini", image_px=16, patch_px=8, width=8, num_layers=1, num_heads=2, mlp_width=16),
        compressor=compressor_config(compressor, num_heads=2, query_grid=2),
        lm=presets.lm(
            "qwen2.5-0.5b", vocab_size=VOCAB, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
            mlp_width=32, **lm,
        ),
    )  # fmt: skip


def samples() -> list[dict[str, np.ndarray]]:
    """Each sample as a batch of one row: pictures at slots 2..5, its second half supervised."""
    rng, made = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        slots = np.arange(length, dtype=np.int32)
        seen = (slots >= 2) & (slots < 2 + SLOTS) & (number < 2)
        made.append(
            {
                "tokens": rng.integers(1, VOCAB, (1, length)).astype(np.int32),
                "visual_index": np.where(seen, slots - 2, -1)[None].astype(np.int32),
                "positions": slots[None],
                "segments": np.zeros((1, length), np.int32),
                "loss_mask": (slots > length // 2)[None],
                "images": rng.integers(0, 256, (1, 1, 16, 16, 3)).astype(np.uint8),
            }
        )
    return made


def packed(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The samples side by side in one row of 26 slots and two pictures."""
    row = {
        name: np.concatenate([p[name] for p in parts], axis=1)
        for name in ("tokens", "positions", "segments", "loss_mask")
    }
    shifted = [
        np.where(p["visual_index"] < 0, -1, p["visual_index"] + i * SLOTS)
        for i, p in enumerate(parts)
    ]
    row["visual_index"] = np.concatenate(shifted, axis=1)
    row["samples"] = np.repeat(np.arange(len(parts)), LENGTHS)[None].astype(np.int32)
    fill = {"visual_index": -1, "segments": -1}
    row = {
        name: np.pad(x, ((0, 0), (0, 2)), constant_values=fill.get(name, 0))
        for name, x in row.items()
    }
    return row | {"images": np.concatenate([p["images"] for p in parts[:2]], axis=1)}


@pytest.mark.parametrize(
    "name, shown, lm",
    [("identity", None, {}), ("mqt", 2, {}), ("identity", None, {"sliding_window": 3})],
)
def test_a_packed_row_gives_each_sample_its_own_logits_and_gradients(name, shown, lm):
    cfg = config(name, **lm)
    model = VLM(cfg)
    boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), nn.unbox(boxed)
    )

    def run(batch):
        inputs = Inputs.from_batch({k: jnp.asarray(v) for k, v in batch.items()})
        inputs = inputs._replace(count=None if shown is None else jnp.int32(shown))

        def loss(params):
            logits = model.apply({"params": params}, inputs)
            mean, told = next_token_loss(logits, inputs.tokens, jnp.asarray(batch["loss_mask"]))
            return mean * told["tokens"], logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    parts = samples()
    (total, logits), grads = run(packed(parts))
    alone = [run(part) for part in parts]
    at = 0
    for ((_, mine), _), length, part in zip(alone, LENGTHS, parts, strict=True):
        filled = np.ones(length, bool)
        if shown is not None and (part["visual_index"] >= 0).any():
            filled[2 : 2 + SLOTS - shown] = False  # hidden slots mean nothing
        np.testing.assert_allclose(
            logits[0, at : at + length][filled], mine[0][filled], rtol=1e-4, atol=1e-5
        )
        at += length
    np.testing.assert_allclose(total, sum(loss for (loss, _), _ in alone), rtol=1e-5)
    summed = jax.tree.map(lambda *g: sum(g), *[g for _, g in alone])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, summed)
