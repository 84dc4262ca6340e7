"""The whole flow: against Hugging Face's LLaVA, and what images, slots and queries may and may not influence."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from compressor import compressor_config
from refs import hf_layout

from vlm_jax.compressors import COMPRESSORS, num_tokens
from vlm_jax.models.lm import empty_cache
from vlm_jax.models.projector import Projector
from vlm_jax.models.vlm import VLM, Inputs, Layout, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.model import VLMConfig

PX, PATCH, VOCAB, IMAGE_ID = 28, 7, 37, 36
GRID = PX // PATCH


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config(name: str, dtype: str = "float32") -> VLMConfig:
    taps = (1, 2) if COMPRESSORS[name].uses_taps else ()
    stride = 1 if name == "identity" else 2
    return VLMConfig(
        vit=presets.vit(
            "clip-l-336", image_px=PX, patch_px=PATCH, width=12, num_layers=3, num_heads=2, mlp_width=20, dtype=dtype
        ),
        compressor=compressor_config(name, stride, 2, taps, dtype=dtype, neighbours=4),
        lm=presets.lm(
            "vicuna-7b", vocab_size=VOCAB, width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20,
            norm_eps=1e-6, dtype=dtype,
        ),
    )  # fmt: skip


@functools.cache
def model(name: str):
    """(config, parameters): random, with every bias and norm away from 0 and 1 (drawn here: compiling init is slow)."""
    cfg = config(name)
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = 0.25 * rng.standard_normal(leaf.shape)
        return jnp.asarray(x + (path[-1].key == "scale"), jnp.float32)

    return cfg, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def method(cfg: VLMConfig, name: str = "__call__"):
    return jax.jit(functools.partial(VLM(cfg).apply, method=name))


def call(name: str, inputs: Inputs, how: str = "__call__"):
    cfg, params = model(name)
    return np.asarray(method(cfg, how)({"params": params}, inputs))


def batch(name: str, seed: int = 0) -> Inputs:
    """Rows of 2M + 6 slots with 2 images: row 0 shows both, row 1 the second image's slots only, row 2 is text alone."""
    m, rng = num_tokens(config(name).compressor, GRID), np.random.default_rng(seed)
    length = 2 * m + 6
    index = np.full((3, length), -1)
    index[0, 1 : m + 1], index[0, m + 3 : 2 * m + 3] = range(m), range(m, 2 * m)
    index[1, 2 : m + 2] = range(m, 2 * m)
    integers = lambda *shape: jnp.asarray(rng.integers(3, VOCAB, shape), jnp.int32)  # noqa: E731
    return Inputs(
        tokens=jnp.where(index < 0, integers(3, length), 0),
        visual_index=jnp.asarray(index, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length), (3, length)),
        segments=jnp.zeros((3, length), jnp.int32),
        images=jnp.asarray(rng.integers(0, 256, (3, 2, PX, PX, 3)), jnp.uint8),
        query_tokens=integers(3, 2, 5),
        query_mask=jnp.arange(5) < jnp.asarray([[3, 5], [1, 2], [1, 1]])[..., None],
    )


def far(a, b) -> bool:
    return bool(np.abs(a - b).max() > 1e-3)


@pytest.fixture(scope="module")
def llava():
    """Hugging Face's LLaVA of the same sizes."""
    vision = transformers.CLIPVisionConfig(
        image_size=PX,
        patch_size=PATCH,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=20, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    settings = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    hf = transformers.LlavaForConditionalGeneration(settings).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hf


def test_logits_equal_hugging_faces_llava(llava):
    cfg, m = config("identity"), GRID**2
    state = {k: v.numpy() for k, v in llava.state_dict().items()}
    lm = {f"model.{k}": v for k, v in hf_layout.sub(state, "model.language_model.").items()}
    lm["lm_head.weight"] = state["lm_head.weight"]
    linears = hf_layout.sub(state, "model.multi_modal_projector.")
    params = {
        "vit": hf_layout.encoder(
            hf_layout.sub(state, "model.vision_tower."), 2, 2, post_norm=False
        ),
        "projector": {f"dense_{i}": hf_layout.linear(linears, f"linear_{i + 1}") for i in range(2)},
        "lm": hf_layout.decoder(lm, 4, 2, tied=False),
    }
    inputs = batch("identity")
    # Rows with the same number of images, as Hugging Face wants: two in row 0.
    inputs = jax.tree.map(lambda x: x[:1], inputs)
    pixels = np.asarray(inputs.images[0], np.float32) / 255
    pixels = (pixels - np.float32(cfg.vit.mean)) / np.float32(cfg.vit.std)
    ids = np.where(inputs.visual_index >= 0, IMAGE_ID, inputs.tokens % IMAGE_ID)
    with torch.no_grad():
        theirs = llava(
            input_ids=torch.tensor(ids).long(), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(),
            attention_mask=torch.ones(ids.shape).long(),
        ).logits.numpy()  # fmt: skip
    inputs = inputs._replace(tokens=inputs.tokens % IMAGE_ID)
    ours = np.asarray(method(cfg)({"params": params}, inputs))
    assert ours.shape == (1, 2 * m + 6, VOCAB)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_an_image_changes_the_rows_and_positions_that_see_it_and_no_others(name):
    inputs = batch(name)
    before = call(name, inputs)
    m = num_tokens(config(name).compressor, GRID)
    for image in (0, 1):
        after = call(name, inputs._replace(images=inputs.images.at[:, image].add(jnp.uint8(90))))
        first = 1 if image == 0 else m + 3
        np.testing.assert_array_equal(after[0, :first], before[0, :first])
        assert far(after[0, first:], before[0, first:])
        assert far(after[1], before[1]) == (image == 1)  # row 1 has no slot for its first image
        np.testing.assert_array_equal(after[2], before[2])  # text alone


def test_swapping_images_and_their_slots_together_changes_nothing():
    inputs = batch("tokenpacker")
    index = inputs.visual_index
    swapped = jnp.where(index < 0, index, (index + 4) % 8)
    other = inputs._replace(images=inputs.images[:, ::-1], visual_index=swapped)
    before = call("tokenpacker", inputs)
    np.testing.assert_allclose(call("tokenpacker", other), before, atol=1e-5)
    assert far(call("tokenpacker", inputs._replace(visual_index=swapped)), before)


def test_visual_tokens_stand_at_their_slots_and_text_everywhere_else():
    cfg, params = model("tokenpacker")
    inputs = batch("tokenpacker")
    x, _ = placed(cfg, params, inputs)
    index = np.asarray(inputs.visual_index)
    table = np.asarray(params["lm"]["embed"])
    np.testing.assert_array_equal(x[index < 0], table[np.asarray(inputs.tokens)][index < 0])
    features = call_features(cfg, params, inputs)
    compressor = COMPRESSORS["tokenpacker"].module(cfg.compressor, GRID)
    mid = jax.jit(compressor.apply)({"params": params["compressor"]}, *features[:2]).tokens
    visual = jax.jit(Projector(24, 2, "none", "none", "float32").apply)(
        {"params": params["projector"]}, mid
    )
    visual = np.asarray(visual).reshape(3, 8, 24)
    for row in (0, 1):
        shown = index[row][index[row] >= 0]
        np.testing.assert_allclose(x[row][index[row] >= 0], visual[row, shown], atol=1e-5)


def placed(cfg, params, inputs):
    """What the decoder is given: embeddings and layout."""

    def place(module, inputs):
        return module.insert_visual_tokens(inputs, module.encode_images(inputs))

    made = jax.jit(functools.partial(VLM(cfg).apply, method=place))({"params": params}, inputs)
    return jax.tree.map(np.asarray, made)


def call_features(cfg, params, inputs):
    features = method(cfg, "features")({"params": params}, inputs)
    assert features.last.shape == (6, 16, 12) and features.taps.shape == (6, 16, 24)
    return features


@pytest.mark.parametrize("name", [n for n, entry in COMPRESSORS.items() if not entry.uses_scores])
def test_cached_features_stand_in_for_images(name):
    cfg, params = model(name)
    inputs = batch(name)
    last, taps = method(cfg, "features")({"params": params}, inputs)[:2]
    cached = inputs._replace(
        images=None, feature_last=last.reshape(3, 2, *last.shape[1:]),
        feature_taps=taps.reshape(3, 2, *taps.shape[1:]) if cfg.compressor.taps else None,
    )  # fmt: skip
    np.testing.assert_allclose(call(name, cached), call(name, inputs), atol=1e-5)


def test_a_batch_without_images_is_the_decoder_alone():
    inputs = batch("quecc")
    text = Inputs(
        inputs.tokens[2:], inputs.visual_index[2:], inputs.positions[2:], inputs.segments[2:]
    )
    together = call("quecc", inputs)[2:]
    np.testing.assert_allclose(call("quecc", text), together, atol=2e-5 * np.abs(together).max())


# The query


def test_the_query_is_the_final_state_of_the_questions_last_token(llava):
    cfg = config("quecc")
    state = {k: v.numpy() for k, v in llava.state_dict().items()}
    lm = {f"model.{k}": v for k, v in hf_layout.sub(state, "model.language_model.").items()}
    lm["lm_head.weight"] = state["lm_head.weight"]
    params = {"lm": hf_layout.decoder(lm, 4, 2, tied=False)}
    inputs = batch("quecc")
    ours = np.asarray(method(cfg, "query")({"params": params}, inputs))
    assert ours.shape == (6, 24)
    for row in range(3):
        for image in range(2):
            count = int(inputs.query_mask[row, image].sum())
            tokens = torch.tensor(np.array(inputs.query_tokens[row, image, :count])).long()[None]
            with torch.no_grad():
                hidden = llava.model.language_model(input_ids=tokens).last_hidden_state
            theirs = hidden[0, -1].numpy()
            error = np.abs(ours[2 * row + image] - theirs).max()
            assert error <= 2e-5 * np.abs(theirs).max()


def test_the_query_ignores_its_padding_and_reaches_only_its_own_image():
    inputs = batch("quecc")
    before = call("quecc", inputs)
    padding = jnp.where(inputs.query_mask, inputs.query_tokens, 9)
    np.testing.assert_array_equal(call("quecc", inputs._replace(query_tokens=padding)), before)
    m = num_tokens(config("quecc").compressor, GRID)
    asked = inputs._replace(query_tokens=inputs.query_tokens.at[0, 1, 0].set(3))
    after = call("quecc", asked)
    np.testing.assert_array_equal(after[0, : m + 3], before[0, : m + 3])
    assert far(after[0, m + 3 :], before[0, m + 3 :])
    np.testing.assert_array_equal(after[1:], before[1:])


def test_no_gradient_flows_through_the_query_into_the_decoder():
    cfg, params = model("quecc")
    inputs, weights = batch("quecc"), np.random.default_rng(1).standard_normal((3, 14, 24))
    visual = jnp.where(inputs.visual_index[..., None] >= 0, weights, 0.0)

    @jax.jit
    @jax.grad
    def gradient(params):
        x, _ = VLM(cfg).apply(
            {"params": params},
            inputs,
            method=lambda m, i: m.insert_visual_tokens(i, m.encode_images(i)),
        )
        return jnp.sum(x * visual)

    grads = gradient(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads["lm"]))
    for part in ("vit", "compressor", "projector"):
        assert any(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(grads[part])), part
    assert float(jnp.abs(grads["compressor"]["text"]["kernel"]).max()) > 1e-3


@pytest.mark.parametrize("name", ["identity", "tokenpacker"])
def test_a_compressor_without_query_does_not_pay_for_one(name):
    cfg, params = model(name)
    inputs = batch(name)
    np.testing.assert_array_equal(
        call(name, inputs._replace(query_tokens=None, query_mask=None)), call(name, inputs)
    )
    text = str(jax.make_jaxpr(VLM(cfg).apply)({"params": params}, inputs))
    assert text.count("scan[") == 2  # the encoder's layers and the decoder's, once each


def test_quecc_pays_one_decoder_pass_for_the_query_and_needs_one():
    cfg, params = model("quecc")
    inputs = batch("quecc")
    assert str(jax.make_jaxpr(VLM(cfg).apply)({"params": params}, inputs)).count("scan[") == 3
    with pytest.raises(ValueError, match="quecc needs query_tokens"):
        call("quecc", inputs._replace(query_tokens=None))


# Prefill, layout, precision


@pytest.mark.parametrize("name", ["quecc"])
def test_prefill_and_decode_of_left_padded_prompts_equal_the_plain_pass(name):
    cfg, params = model(name)
    inputs, pad = batch(name), 2
    length = inputs.tokens.shape[1]
    plain = call(name, inputs)
    gap = ((0, 0), (pad, 0))
    padded = inputs._replace(
        tokens=jnp.pad(inputs.tokens[:, :-1], gap, constant_values=5),
        visual_index=jnp.pad(inputs.visual_index[:, :-1], gap, constant_values=-1),
        positions=jnp.pad(inputs.positions[:, :-1], gap),
        segments=jnp.pad(inputs.segments[:, :-1], gap, constant_values=-1),
    )
    cache = empty_cache(cfg.lm, 3, length + pad + 3)
    logits, cache, layout = method(cfg, "prefill")({"params": params}, padded, cache)
    np.testing.assert_array_equal(layout.positions, padded.positions)
    scale = np.abs(plain).max()
    assert np.abs(logits - plain[:, -2]).max() <= 2e-5 * scale
    slot = length + pad - 1
    following = jnp.tile(inputs.positions[:, -1:], (1, 4)) + jnp.arange(4)
    slots = Layout(
        jnp.concatenate([padded.positions, following], axis=1),
        jnp.pad(padded.segments, ((0, 0), (0, 4)), constant_values=0),
    )
    logits, _ = method(cfg, "decode")(
        {"params": params}, inputs.tokens[:, -1], jnp.asarray(slot), slots, cache
    )
    assert np.abs(logits - plain[:, -1]).max() <= 2e-5 * scale


@pytest.mark.parametrize("name", ["quecc", "tokenpacker"])
def test_the_flow_reads_every_parameter_of_the_initial_tree(name):
    cfg, params = model(name)
    assert params.keys() == {"vit", "compressor", "projector", "lm"}
    loss = lambda p: jnp.square(VLM(cfg).apply({"params": p}, batch(name))).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_flatten_with_path(grads)[0]:
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        # A bias that all keys share falls out of the softmax.
        assert float(jnp.abs(gradient).max()) > 0 or place.endswith("k/bias"), place


def test_bfloat16_survives_large_activations():
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model("quecc")[1])
    logits = np.asarray(method(config("quecc", "bfloat16"))({"params": params}, batch("quecc")))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
