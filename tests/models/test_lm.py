"""The decoder against Hugging Face's models on tiny random weights, and what its mask and cache must guarantee."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from refs import hf_layout

from vlm_jax.inference.generate import each_layer
from vlm_jax.models.attention import AttentionMask
from vlm_jax.models.lm import EACH_LAYER, LM, causal_mask, empty_cache
from vlm_jax.settings.model import LMConfig, RopeScaling

SIZE = dict(
    vocab_size=37, width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20
)
HF_SIZE = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20,
    max_position_embeddings=64, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)  # fmt: skip


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config(**fields) -> LMConfig:
    base = dict(rope_theta=1e4, norm_eps=1e-6, qkv_bias=False, qk_norm=False, tied_embeddings=False)
    return LMConfig(**(SIZE | base | fields))


def rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | fields}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# name -> (our config, Hugging Face's model class, its config)
FAMILIES = {
    "llama, grouped queries": (config(), transformers.LlamaForCausalLM, transformers.LlamaConfig(**HF_SIZE, **rope("default"))),
    "llama, tied": (
        config(tied_embeddings=True), transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**HF_SIZE, **rope("default"), tie_word_embeddings=True),
    ),
    "llama, theta and head size": (
        config(rope_theta=5e5, head_dim=10), transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**HF_SIZE, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, head_dim=10),
    ),
    "llama, linear scaling": (
        config(rope_scaling=RopeScaling("linear", factor=4.0)), transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**HF_SIZE, **rope("linear", factor=4.0)),
    ),
    "llama 3 scaling": (
        config(rope_scaling=RopeScaling("llama3", original_max_positions=16, **LLAMA3)), transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**HF_SIZE, **rope("llama3", original_max_position_embeddings=16, **LLAMA3)),
    ),
    "qwen2, biases": (config(qkv_bias=True), transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**HF_SIZE, **rope("default"))),
    "qwen3, normed heads": (
        config(qk_norm=True), transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**HF_SIZE, **rope("default"), head_dim=6),
    ),
    "phi3, fused weights": (
        config(), transformers.Phi3ForCausalLM, transformers.Phi3Config(**HF_SIZE, **rope("default")),
    ),
}  # fmt: skip


def build(name: str):
    """(our config, our parameters, the reference model) with every parameter away from its initial value."""
    cfg, cls, hf_config = FAMILIES[name]
    torch.manual_seed(0)
    model = cls(hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    params = hf_layout.decoder(state, cfg.num_heads, cfg.num_kv_heads, cfg.tied_embeddings)
    return cfg, jax.tree.map(jnp.asarray, params), model


def forward(lm: LM, tokens, positions, segments):
    hidden = lm.hidden(lm.embed(tokens), positions, AttentionMask(causal_mask(segments, segments)))
    return lm.logits(hidden), hidden


@functools.cache
def compiled(cfg: LMConfig):
    return jax.jit(functools.partial(LM(cfg).apply, method=forward))


def run(cfg, params, tokens, positions=None, segments=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = np.zeros(tokens.shape)
    args = (jnp.asarray(x, jnp.int32) for x in (positions, segments))
    return np.asarray(compiled(cfg)({"params": params}, tokens, *args)[0])


def ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 37, (batch, length))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_hugging_face(name):
    cfg, params, model = build(name)
    tokens = ids(2, 11)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = run(cfg, params, tokens)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    leaves = sum(x.size for x in jax.tree.leaves(params))
    assert cfg.total_params == leaves == sum(p.numel() for p in model.parameters())


def test_initial_parameters_have_the_layout_of_imported_ones():
    for cfg, params, _ in map(build, ("qwen2, biases", "qwen3, normed heads", "llama, tied")):
        tokens = jnp.zeros((1, 1), jnp.int32)
        init = functools.partial(LM(cfg).init, method=forward)
        shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens))
        assert leaves_of(shapes["params"]) == leaves_of(params)


def leaves_of(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.fixture(scope="module")
def llama():
    cfg, params, _ = build("llama, grouped queries")
    return cfg, params


def test_future_tokens_never_change_past_logits(llama):
    tokens = ids(1, 9)
    before = run(*llama, tokens)
    for t in (1, 4, 8):
        changed = tokens.copy()
        changed[:, t:] = (changed[:, t:] + 5) % 37
        after = run(*llama, changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_logits_whatever_it_holds(llama, side):
    tokens = ids(1, 6)
    alone = run(*llama, tokens)
    for filler in (0, 17):
        padded, segments, positions = (np.full((1, 10), x) for x in (filler, -1, 0))
        real = slice(4, 10) if side == "left" else slice(0, 6)
        padded[:, real], segments[:, real], positions[:, real] = tokens, 0, np.arange(6)
        logits = run(*llama, padded, positions, segments)
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits[:, real], alone, atol=2e-5 * np.abs(alone).max())


def test_independent_turns_see_the_prefix_and_themselves_only(llama):
    prefix, first, second = ids(1, 4), ids(1, 3, seed=1), ids(1, 2, seed=2)
    packed = np.concatenate([prefix, first, second], axis=1)
    positions = [[0, 1, 2, 3, 4, 5, 6, 4, 5]]
    segments = [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    together = run(*llama, packed, positions, segments)
    for turn, place in ((first, slice(4, 7)), (second, slice(7, 9))):
        alone = run(*llama, np.concatenate([prefix, turn], axis=1))
        np.testing.assert_allclose(
            together[:, place], alone[:, 4:], atol=2e-5 * np.abs(alone).max()
        )
    dialogue = run(*llama, packed, positions, np.zeros((1, 9)))
    assert np.abs(dialogue[:, 7:] - together[:, 7:]).max() > 1e-3


def test_the_mask_is_the_picture_in_its_docstring():
    segments = jnp.array([[0, 0, 1, 1, 2, 2, -1]])
    mask = np.asarray(causal_mask(segments, segments)[0]).astype(int)
    rows = ["1000000", "1100000", "1110000", "1111000", "1100100", "1100110"]
    assert ["".join(map(str, row)) for row in mask[:6]] == rows
    assert not mask[:, 6].any()


@functools.cache
def compiled_cached(cfg: LMConfig):
    def step(lm, tokens, positions, key_segments, segments, slot, cache):
        seen = AttentionMask(causal_mask(segments, key_segments, slot))
        hidden, cache = lm.cached_hidden(lm.embed(tokens), positions, seen, cache, slot)
        return lm.logits(hidden), cache

    return jax.jit(functools.partial(LM(cfg).apply, method=step))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["llama, grouped queries", "qwen3, normed heads"])
def test_prefill_and_decode_with_a_cache_equal_one_pass_without(name, apart):
    """apart: each layer decodes with a cache and weights of its own."""
    cfg, params, _ = build(name)
    lengths, prompt, steps, room = np.array([5, 3]), 5, 4, 12
    rows = [ids(1, n + steps, seed=int(n))[0] for n in lengths]
    plain = [run(cfg, params, row[None])[0] for row in rows]
    tokens, positions, segments = (
        np.zeros((2, prompt), int),
        np.zeros((2, prompt), int),
        np.full((2, room), -1),
    )
    for b, n in enumerate(lengths):  # left padded
        tokens[b, prompt - n :], positions[b, prompt - n :] = rows[b][:n], np.arange(n)
        segments[b, prompt - n :] = 0
    as_jax = lambda *xs: [jnp.asarray(x, jnp.int32) for x in xs]  # noqa: E731
    step = compiled_cached(cfg)
    cache = empty_cache(cfg, 2, room)
    logits, cache = step(
        {"params": params}, *as_jax(tokens, positions, segments, segments[:, :prompt], 0), cache
    )
    if apart:
        params = {**params, EACH_LAYER: each_layer(params["layers"], cfg.num_layers)}
        cache = cache.layers()
        assert len(cache) == cfg.num_layers > 1
    for i in range(steps):
        for b, n in enumerate(lengths):
            error = np.abs(logits[b, -1] - plain[b][n - 1 + i]).max()
            assert error <= 2e-5 * np.abs(plain[b]).max(), (b, i)
        token = [[rows[b][n + i]] for b, n in enumerate(lengths)]
        zero = np.zeros((2, 1))
        logits, cache = step(
            {"params": params}, *as_jax(token, lengths[:, None] + i, segments, zero, prompt + i), cache
        )  # fmt: skip


@functools.cache
def gradient(remat: str):
    lm, params = LM(config(remat=remat)), build("llama, grouped queries")[1]
    tokens = jnp.asarray(ids(1, 5), jnp.int32)

    def loss(p):
        args = (tokens, jnp.arange(5)[None], 0 * tokens)
        return jnp.square(lm.apply({"params": p}, *args, method=forward)[0]).mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialised_layers_give_the_same_gradients(remat):
    pairs = zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True)
    for ours, reference in pairs:
        np.testing.assert_allclose(ours, reference, atol=1e-5 * float(jnp.abs(reference).max()))


def test_bfloat16_survives_large_activations_and_padding_without_nan(llama):
    _, params = llama
    params = params | {"embed": params["embed"] * 1e4}
    segments = np.array([[-1, -1, 0, 0, 0]])
    logits = run(config(dtype="bfloat16"), params, ids(1, 5), segments=segments)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
