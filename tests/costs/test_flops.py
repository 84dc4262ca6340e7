"""The analytic count against XLA's own, on one-layer models (a scan's body is counted once)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from compressor import compressor_config
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlm_jax import compressors, sharding
from vlm_jax.aot import programs
from vlm_jax.costs import flops, memory
from vlm_jax.costs.price import paper_flops
from vlm_jax.models import blocked
from vlm_jax.models.attention import AttentionMask
from vlm_jax.models.lm import LM, empty_cache
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM, Inputs, Layout, dummy_inputs
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig, ViTConfig, VLMConfig, stride_for
from vlm_jax.storage import run as experiment
from vlm_jax.training import step


def vit_config(**changes) -> ViTConfig:
    fields = dict(
        image_px=64, patch_px=8, width=256, num_layers=1, num_heads=4, mlp_width=1024, activation="gelu_tanh",
        norm_eps=1e-6, cls_token=False, pre_norm=False, post_norm=True, patch_bias=True, feature_layer=-1,
        mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    return ViTConfig(**{**fields, **changes})


def lm_config(**changes) -> LMConfig:
    fields = dict(
        vocab_size=512, width=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=768,
        rope_theta=1e4, norm_eps=1e-6, qkv_bias=False, qk_norm=False, tied_embeddings=False,
    )  # fmt: skip
    return LMConfig(**{**fields, **changes})


def vlm_config(compressor: str, visual_tokens: int = 16, **changes) -> VLMConfig:
    vit = changes.pop("vit", vit_config())
    stride = 1 if compressor == "identity" else stride_for(vit.grid, visual_tokens)
    return VLMConfig(
        vit, compressor_config(compressor, stride=stride), changes.pop("lm", lm_config()), **changes
    )


def abstract_params(config: VLMConfig):
    return nn.unbox(
        jax.eval_shape(lambda key: VLM(config).init(key, dummy_inputs(config)), jax.random.key(0))
    )


def xla_flops(function, *args) -> float:
    """What the compiled program costs by XLA's analysis."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def int_array(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize(
    "config",
    [
        vit_config(),
        vit_config(image_px=96, num_heads=8, mlp_width=512),
        vit_config(
            cls_token=True,
            pre_norm=True,
            post_norm=False,
            patch_bias=False,
            feature_layer=-2,
            num_layers=2,
        ),
    ],
    ids=["siglip", "longer", "clip-last-but-one"],
)
def test_the_encoders_count_is_within_two_percent_of_xla(config):
    model, pixels = (
        ViT(config),
        jax.ShapeDtypeStruct((1, config.image_px, config.image_px, 3), jnp.float32),
    )
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), pixels))
    measured = xla_flops(model.apply, params, pixels)
    assert flops.encoder_flops(config) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        lm_config(),
        lm_config(num_kv_heads=1, qkv_bias=True),
        lm_config(qk_norm=True, tied_embeddings=True, mlp_width=1024, vocab_size=2048),
    ],
    ids=["mha", "grouped-queries", "tied"],
)
def test_the_decoders_count_is_within_two_percent_of_xla(config):
    tokens = 128
    model = LM(config)

    def run(module, ids, mask):
        hidden = module.hidden(module.embed(ids), ids, AttentionMask(mask))
        return module.logits(hidden[:, -1:])

    ids, mask = int_array(1, tokens), jax.ShapeDtypeStruct((1, tokens, tokens), jnp.bool_)
    params = nn.unbox(
        jax.eval_shape(
            lambda k, i, m: model.init(k, i, m, method=run), jax.random.key(0), ids, mask
        )
    )
    measured = xla_flops(lambda p, i, m: model.apply(p, i, m, method=run), params, ids, mask)
    assert flops.decoder_flops(config, tokens, tokens, logits=1) == pytest.approx(
        measured, rel=0.02
    )


CLIP = dict(
    cls_token=True, pre_norm=True, post_norm=False, patch_bias=False, feature_layer=-2, num_layers=3
)
GROUPED = dict(num_kv_heads=2, qkv_bias=True, tied_embeddings=True, vocab_size=2048)
# Two layers of the encoder and of the decoder, unrolled; what each differs in.
WHOLE: dict[str, dict] = {
    "identity": dict(compressor=dict(name="identity")),
    "identity, head_dim of its own": dict(
        compressor=dict(name="identity"),
        lm=dict(head_dim=128, qk_norm=True, num_kv_heads=4),
        vlm=dict(projector_layers=3),
    ),
    "tokenpacker, clip, grouped, tied": dict(
        compressor=dict(name="tokenpacker", stride=2), vit=CLIP, lm=GROUPED
    ),
    "tokenpacker, taps, two images": dict(
        compressor=dict(name="tokenpacker", stride=4, taps=(0, 1)), images=2
    ),
    "quecc": dict(compressor=dict(name="quecc", stride=2, taps=(0, 1))),
    "quecc, one layer reads": dict(compressor=dict(name="quecc", stride=4, query_layers=1)),
    "quecc, embeddings alone": dict(compressor=dict(name="quecc", stride=8, query_layers=0)),
    "m3": dict(compressor=dict(name="m3", visual_tokens=16)),
    "querypool": dict(compressor=dict(name="querypool", visual_tokens=16)),
    "mqt": dict(compressor=dict(name="mqt", visual_tokens=36, query_grid=8)),
    "prumerge": dict(compressor=dict(name="prumerge", neighbours=8), vit=CLIP),
}  # fmt: skip


def whole(compressor: dict, vit=(), lm=(), vlm=(), images: int = 1) -> VLMConfig:
    wide = dict(width=512, num_layers=2)
    return VLMConfig(
        vit_config(**{**wide, "mlp_width": 2048, **dict(vit)}),
        compressor_config(**compressor),
        lm_config(**{**wide, "num_heads": 8, "num_kv_heads": 8, "mlp_width": 1536, **dict(lm)}),
        **dict(vlm),
    )


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_a_whole_prefill_is_within_two_percent_of_xla(case):
    config, images, text, query = whole(**case), case.get("images", 1), 32, 16
    count = flops.forward_flops(config, text_tokens=text, query_tokens=query, images=images)
    length = text + images * compressors.num_tokens(config.compressor, config.vit.grid)
    params = abstract_params(config)
    cache = jax.eval_shape(lambda: empty_cache(config.lm, 1, length))
    inputs = Inputs(
        tokens=int_array(1, length), visual_index=int_array(1, length), positions=int_array(1, length),
        segments=int_array(1, length), images=jax.ShapeDtypeStruct((1, images, 64, 64, 3), jnp.uint8),
        query_tokens=int_array(1, images, query), query_mask=jax.ShapeDtypeStruct((1, images, query), jnp.bool_),
    )  # fmt: skip
    measured = xla_flops(
        lambda p, i, c: VLM(config).apply(p, i, c, method="prefill"), params, inputs, cache
    )
    assert count.total == pytest.approx(measured, rel=0.02)
    assert count.decode == 0


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_the_weights_are_those_of_the_model(case):
    config = whole(**case)
    held = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert memory.weight_bytes(config, value_bytes=4).stored == pytest.approx(held, rel=0.002)


@pytest.mark.parametrize("lm", [{}, GROUPED], ids=["mha", "grouped, tied"])
def test_an_answer_behind_a_cached_text_is_within_two_percent_of_xla(lm):
    """32 cached tokens, 64 fresh ones, 3 answer tokens: one pass over the fresh, then two steps over a growing cache."""
    config = whole(dict(name="identity"), lm=lm)
    count = flops.forward_flops(
        config, text_tokens=32, cached_text_tokens=32, output_tokens=3, query_tokens=0
    )
    model = LM(config.lm)

    def run(module, ids, mask, cache):
        slot = cache.length - ids.shape[1]
        hidden, cache = module.cached_hidden(
            module.embed(ids), ids, AttentionMask(mask), cache, slot
        )
        return module.logits(hidden[:, -1:]), cache

    def measured(tokens: int, keys: int) -> float:
        mask = jax.ShapeDtypeStruct((1, tokens, keys), jnp.bool_)
        cache = jax.eval_shape(lambda: empty_cache(config.lm, 1, keys))
        params = {"params": abstract_params(config)["params"]["lm"]}
        apply = lambda p, i, m, c: model.apply(p, i, m, c, method=run)  # noqa: E731
        return xla_flops(apply, params, int_array(1, tokens), mask, cache)

    assert count.prefill == pytest.approx(measured(64, 96), rel=0.02)
    assert count.decode == pytest.approx(measured(1, 97) + measured(1, 98), rel=0.02)


def test_a_decode_step_is_within_two_percent_of_xla():
    config = vlm_config("identity")
    slots = 96
    params, cache = (
        abstract_params(config),
        jax.eval_shape(lambda: empty_cache(config.lm, 1, slots)),
    )
    measured = xla_flops(
        lambda p, t, s, slot, c: VLM(config).apply(p, t, slot, Layout(s, s), c, method="decode"),
        params, int_array(1), int_array(1, slots), int_array(), cache,
    )  # fmt: skip
    assert flops.decoder_flops(config.lm, 1, slots, logits=1) == pytest.approx(measured, rel=0.02)


def test_an_answer_costs_one_decode_step_less_than_it_has_tokens():
    config = vlm_config("identity")
    one, three = (flops.forward_flops(config, text_tokens=32, output_tokens=n) for n in (1, 3))
    assert one.decode == 0 and one.prefill == three.prefill
    lm = config.lm
    assert three.decode == flops.decoder_flops(lm, 1, 97, 1) + flops.decoder_flops(lm, 1, 98, 1)


def test_cached_text_costs_no_linear_maps_but_is_still_looked_at():
    config = vlm_config("identity")
    fresh, cached = (
        flops.forward_flops(config, text_tokens=32, cached_text_tokens=n) for n in (0, 32)
    )
    assert fresh.prefill - cached.prefill == flops.decoder_flops(config.lm, 32, 96, logits=0)
    with pytest.raises(
        ConfigError, match=r"cached_text_tokens 33 must lie in \[0, text_tokens = 32\]"
    ):
        flops.forward_flops(config, text_tokens=32, cached_text_tokens=33)


def test_the_papers_count_is_close_for_a_large_model_and_short_prompt():
    lm = presets.lm("qwen1.5-7b")
    exact = flops.decoder_flops(lm, 66, 66, logits=66)
    head = (
        lm.vocab_size * lm.width
    )  # the paper's N counts the embedding table too, which multiplies nothing
    assert paper_flops(lm.total_params - head, 50, 16) == pytest.approx(exact, rel=0.01)


def test_more_layers_multiply_only_the_layers():
    one, two = lm_config(), dataclasses.replace(lm_config(), num_layers=2)
    head = 2 * 256 * 512
    assert flops.decoder_flops(two, 8, 8, 1) - head == 2 * (
        flops.decoder_flops(one, 8, 8, 1) - head
    )


# What learns, and what each case differs in. Two layers, unrolled.
FROZEN_ENCODER = r"^(compressor|projector|lm)/"
STEPS: dict[str, dict] = {
    "siglip, everything learns": dict(compressor=dict(name="tokenpacker", stride=2), learns="."),
    "clip, frozen": dict(
        compressor=dict(name="tokenpacker", stride=2, taps=(0, 1)),
        vit=CLIP,
        lm=GROUPED,
        learns=FROZEN_ENCODER,
    ),
    "alignment: frozen decoder": dict(
        compressor=dict(name="identity"), learns=r"^(compressor|projector)/"
    ),
    "quecc": dict(compressor=dict(name="quecc", stride=2, taps=(0, 1)), learns=FROZEN_ENCODER),
    "lora": dict(
        compressor=dict(name="quecc", stride=4),
        lm=dict(lora_rank=16),
        learns=r"lora_|^(compressor|projector)/",
    ),
    "text alone": dict(compressor=dict(name="identity"), learns=r"^lm/", text_only=True),
    "attention in blocks, cached features": dict(
        compressor=dict(name="identity"), learns=FROZEN_ENCODER, tokens=300, cached=True
    ),
}


def step_of(case: dict, folder):
    """(count, what XLA counts in the gradients before it optimises them) of a case of STEPS."""
    config = whole(**{k: case[k] for k in ("compressor", "vit", "lm") if k in case})
    tokens, has_images = case.get("tokens", 128), "text_only" not in case
    c = tiny.config(folder)
    c.optim.trainable, c.data.batch_size = case["learns"], 2
    c.data.update({"max_tokens": tokens, "max_query_tokens": 16})
    c.data.features_dir = "cached" if "cached" in case else ""
    exp = dataclasses.replace(experiment.resolve(c), model=config)
    plan = step.plan(exp, sharding.make_mesh(exp.mesh, jax.devices()[:1]), 3)
    batch = programs.batch(exp, plan.mesh, 2, training=True)
    if not has_images:
        batch = {k: x for k, x in batch.items() if "image" not in k and "query" not in k}
    lowered = jax.jit(step.make_gradients(plan)).lower(
        plan.state.trainable, batch, plan.state.step, plan.state.frozen
    )
    learning = flatten_dict(plan.state.trainable, sep="/").keys()
    return flops.batch_flops(exp, learning, tokens, has_images), lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_a_training_step_is_within_two_percent_of_xla(case, tmp_path):
    count, measured = step_of(case, tmp_path)
    assert count.total == pytest.approx(measured, rel=0.02)


def test_logits_are_counted_for_supervised_slots_alone():
    config = whole(dict(name="identity"))
    product = 2 * config.lm.width * config.lm.vocab_size

    def count(supervised: int | None, *trainable: str) -> int:
        sizes = dict(rows=2, tokens=96, images=2, query_tokens=0, trainable=trainable)
        return flops.step_flops(config, **sizes, supervised=supervised).decoder

    assert count(2 * 96, "lm/head") == count(None, "lm/head")
    assert count(7, "lm/head") - count(0, "lm/head") == 7 * 2 * product
    # The head is frozen, and gradients flow through it to the projector.
    assert count(7, "projector/dense_0/kernel") - count(0, "projector/dense_0/kernel") == 7 * 2 * product  # fmt: skip
    assert count(7, "lm/layers/mlp/up/kernel", "lm/head") - count(0, "lm/layers/mlp/up/kernel", "lm/head") == 7 * 3 * product  # fmt: skip


def test_an_elastic_step_runs_the_decoder_once_per_number_of_tokens_and_the_rest_once():
    def count(scales: tuple[int, ...]) -> flops.StepFlops:
        config = whole(dict(name="m3", train_tokens=scales))
        sizes = dict(rows=2, tokens=96, images=2, query_tokens=0, trainable=["projector/dense_0/kernel"])  # fmt: skip
        return flops.step_flops(config, **sizes)

    one, three = count((64,)), count((64, 16, 4))
    assert three.decoder == 3 * one.decoder
    assert (three.encoder, three.projector) == (one.encoder, one.projector)


def test_queries_are_cut_into_the_blocks_that_attention_cuts():
    assert (flops.QUERIES, flops.BLOCKS) == (blocked.MIN_QUERIES, blocked.MAX_BLOCKS)
    assert flops.score_pairs(100, 100) == 100**2
    assert flops.score_pairs(300, 310) == 128 * 138 + 128 * 266 + 44 * 310
    assert flops.score_pairs(1, 77) == 77
