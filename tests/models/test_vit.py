"""The image encoder against Hugging Face's SigLIP and CLIP on tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from refs import hf_layout

from vlm_jax.layers import resize_matrix, sincos_positions
from vlm_jax.models.vit import ViT
from vlm_jax.settings import presets
from vlm_jax.settings.model import ViTConfig

SIZE = dict(image_px=28, patch_px=7, width=12, num_layers=3, num_heads=2, mlp_width=20)
HF_SIZE = dict(
    image_size=28, patch_size=7, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20,
    attn_implementation="eager",
)  # fmt: skip


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config(preset: str, **fields) -> ViTConfig:
    return presets.vit(preset, **(SIZE | fields))


def reference(model, config: ViTConfig):
    """(our parameters, normalised pixels, the reference's hidden states and its output after the last norm)."""
    torch.manual_seed(0)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # away from zeros and ones, so that nothing is untested
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        out = model.eval()(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    kept = config.feature_state
    post_norm = config.post_norm and config.feature_layer == -1
    params = hf_layout.encoder(state, kept, config.num_heads, post_norm)
    states = [h.numpy() for h in out.hidden_states]
    return params, jnp.asarray(pixels), states, out.last_hidden_state.numpy()


def close(ours, theirs) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * np.abs(theirs).max()


def run(config: ViTConfig, taps, params, pixels):
    return jax.jit(ViT(config, taps).apply)({"params": params}, pixels)


@pytest.fixture(scope="module")
def siglip():
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**HF_SIZE, vision_use_head=False)
    )
    cfg = config("siglip-b16-224")
    return cfg, *reference(model, cfg)


@pytest.fixture(scope="module")
def clip():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF_SIZE))
    cfg = config("clip-l-336")
    return cfg, *reference(model, cfg)


def test_siglip_features_are_the_normed_last_layer_and_taps_the_raw_states(siglip):
    cfg, params, pixels, states, last = siglip
    features = run(cfg, (0, 2, 3), params, pixels)
    close(features.last, last)
    close(features.taps, np.concatenate([states[i] for i in (0, 2, 3)], axis=-1))


def test_clip_feature_is_the_last_state_but_one_without_its_class_token(clip):
    cfg, params, pixels, states, _ = clip
    assert cfg.feature_state == 2
    features = run(cfg, (2, 0, 1), params, pixels)
    close(features.last, states[2][:, 1:])
    close(features.taps, np.concatenate([states[i][:, 1:] for i in (2, 0, 1)], axis=-1))


def test_without_taps_the_feature_is_the_only_level(clip):
    cfg, params, pixels, _, _ = clip
    features = run(cfg, (), params, pixels)
    np.testing.assert_array_equal(features.last, features.taps)


# What a compressor that scores patches asks for


def attention_maps(hf, pixels, layer: int) -> list[np.ndarray]:
    """The reference's own queries and keys [B R C] of one layer, heads side by side."""
    kept = []
    for name in (f"layers.{layer}.self_attn.q_proj", f"layers.{layer}.self_attn.k_proj"):
        (linear,) = [module for path, module in hf.named_modules() if path.endswith(name)]
        linear.register_forward_hook(lambda module, args, out: kept.append(out.numpy()))
    with torch.no_grad():
        hf(torch.tensor(np.array(pixels)).permute(0, 3, 1, 2))
    return kept


def test_scores_of_clip_are_the_queries_and_keys_of_the_layer_after_the_feature():
    hf = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF_SIZE))
    cfg = config("clip-l-336")
    params, pixels, states, _ = reference(hf, cfg)
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    params["next_layer"] = hf_layout.asking_layer(state, cfg.feature_state, cfg.num_heads)
    features = jax.jit(ViT(cfg, (0,), scores=True).apply)({"params": params}, pixels)
    q, k = attention_maps(hf, pixels, 2)
    close(features.scores.query, q[:, 0])
    close(features.scores.keys, k[:, 1:])
    close(features.scores.class_key, k[:, 0])
    close(features.last, states[2][:, 1:])
    close(features.taps, states[0][:, 1:])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scores_of_siglip_are_its_last_layers_keys_and_mean_query(remat):
    hf = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**HF_SIZE, vision_use_head=False)
    )
    cfg = config("siglip-b16-224", remat=remat)
    params, pixels, _, last = reference(hf, cfg)
    features = jax.jit(ViT(cfg, scores=True).apply)({"params": params}, pixels)
    q, k = attention_maps(hf, pixels, 2)
    close(features.scores.query, q.mean(axis=1))
    close(features.scores.keys, k)
    close(features.last, last)
    assert features.scores.class_key is None


@pytest.mark.parametrize(
    "preset, extra", [("clip-l-336", 2 * 12 + 2 * (12 * 12 + 12)), ("siglip-b16-224", 0)]
)
def test_of_the_next_layer_only_the_first_norm_and_two_maps_exist(preset, extra):
    def count(scores: bool) -> int:
        init = ViT(config(preset), scores=scores).init
        shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(True) - count(False) == extra


def test_without_scores_none_are_handed_out(clip):
    cfg, params, pixels, _, _ = clip
    assert run(cfg, (1,), params, pixels).scores is None


def test_rematerialised_layers_give_the_same_numbers(siglip):
    _, params, pixels, _, last = siglip
    close(run(config("siglip-b16-224", remat="full"), (), params, pixels).last, last)


def test_positions_learned_for_another_grid_are_interpolated_as_in_hugging_face():
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**HF_SIZE, vision_use_head=False)
    )
    cfg = config("siglip-b16-224", image_px=42, position_grid=4)
    torch.manual_seed(1)
    (table,) = [p for name, p in model.named_parameters() if "position_embedding" in name]
    torch.nn.init.normal_(table)
    pixels = np.random.default_rng(0).standard_normal((1, 42, 42, 3)).astype(np.float32)
    with torch.no_grad():
        out = model.eval()(torch.tensor(pixels).permute(0, 3, 1, 2), interpolate_pos_encoding=True)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    params = hf_layout.encoder(state, 3, 2, post_norm=True)
    close(run(cfg, (), params, jnp.asarray(pixels)).last, out.last_hidden_state.numpy())


@pytest.mark.parametrize("size, source", [(6, 4), (4, 6), (27, 24), (5, 5)])
def test_the_interpolation_matrix_is_torchs_bicubic(size, source):
    table = np.random.default_rng(2).standard_normal((source, source)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table)[None, None], size=(size, size), mode="bicubic"
    )
    matrix = resize_matrix(size, source)
    np.testing.assert_allclose(matrix @ table @ matrix.T, theirs[0, 0].numpy(), atol=1e-5)


def test_initial_positions_tell_rows_columns_and_neighbours_apart():
    table = sincos_positions(6, 32)
    square = table.reshape(6, 6, 32)
    np.testing.assert_array_equal(
        square[:, 2, :16], square[:1, 2, :16].repeat(6, axis=0)
    )  # columns
    np.testing.assert_array_equal(square[3, :, 16:], square[3, :1, 16:].repeat(6, axis=0))  # rows
    np.testing.assert_array_equal(square[:, 2, 16:], square[2, :, :16])
    np.testing.assert_allclose(square[0, 2, :2], [np.sin(2), np.sin(2 * 10**-0.5)], atol=1e-6)
    distances = np.linalg.norm(square[2, 2] - square, axis=-1)
    assert distances[2, 3] < distances[2, 4] < distances[4, 4]


def test_a_border_narrower_than_a_patch_is_left_out():
    cfg = config("siglip-b16-224", image_px=31)
    assert (cfg.grid, cfg.num_patches) == (4, 16)
    vit = ViT(cfg)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((1, 31, 31, 3)), jnp.float32)
    params = jax.jit(vit.init)(jax.random.key(0), pixels)
    apply = jax.jit(vit.apply)
    changed = apply(params, pixels.at[:, 28:].set(9.0).at[:, :, 28:].set(-9.0))
    np.testing.assert_array_equal(changed.last, apply(params, pixels).last)


def test_bfloat16_survives_large_activations(siglip):
    _, params, pixels, _, _ = siglip
    features = run(config("siglip-b16-224", dtype="bfloat16"), (1,), params, 1e3 * pixels)
    assert features.last.dtype == features.taps.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(features.last).all())
