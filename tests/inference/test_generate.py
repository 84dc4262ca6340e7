"""Generation: the loop against a plain recomputing twin; padding, neighbours, mesh and shapes change no answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor import compressor_config
from flax import linen as nn

from vlm_jax.inference import generate
from vlm_jax.inference.generate import CANDIDATES, Decoding, choose, make_generate, nucleus_floor
from vlm_jax.models.vlm import VLM, Inputs, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig

VOCAB, EOS, PAD, NEW = 48, 2, 0, 12
GREEDY = Decoding(max_new_tokens=NEW, eos_ids=(EOS,), pad_id=PAD)
PROMPT_LENGTHS = (5, 9, 12, 7)


@functools.cache
def model():
    """A tiny model whose weights are large enough that its answers differ from prompt to prompt."""
    config = VLMConfig(
        vit=presets.vit("mini", image_px=16, num_layers=1, width=16, num_heads=2, mlp_width=16),
        compressor=compressor_config(name="identity"),
        lm=presets.lm("mini-45k", vocab_size=VOCAB, width=32, head_dim=16),
    )
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params)
    return config, generate.for_decoding(config.lm, params)


def prompt(length, seed):
    """One unpadded prompt [1 T]: a bos, the image's four tokens, then text."""
    rng = np.random.default_rng(seed)
    index = np.full(length, -1)
    index[1:5] = range(4) if length > 5 else -1  # the shortest prompt is text alone
    image = rng.integers(0, 256, (1, 16, 16, 3)) if length > 5 else np.zeros((1, 16, 16, 3))
    return Inputs(
        tokens=np.where(index < 0, rng.integers(3, VOCAB, length), 0).astype(np.int32)[None],
        visual_index=index.astype(np.int32)[None],
        positions=np.arange(length, dtype=np.int32)[None],
        segments=np.zeros((1, length), np.int32),
        images=image.astype(np.uint8)[None],
    )


def padded(inputs, length):
    gap = ((0, 0), (length - inputs.tokens.shape[1], 0))
    return inputs._replace(
        tokens=np.pad(inputs.tokens, gap),
        visual_index=np.pad(inputs.visual_index, gap, constant_values=-1),
        positions=np.pad(inputs.positions, gap),
        segments=np.pad(inputs.segments, gap, constant_values=-1),
    )


def stacked(prompts, length):
    rows = [padded(p, length) for p in prompts]
    return Inputs(
        *(
            None if column[0] is None else np.concatenate(column)
            for column in zip(*rows, strict=True)
        )
    )


def batch():
    return stacked([prompt(n, n) for n in PROMPT_LENGTHS], max(PROMPT_LENGTHS))


def answer(inputs, decoding=GREEDY, seeds=None):
    config, params = model()
    seeds = np.zeros(len(inputs.tokens), np.int32) if seeds is None else seeds
    return np.asarray(make_generate(config, decoding)(params, inputs, jnp.asarray(seeds)))


def scanned_params(params):
    """Without the weights of each layer by itself."""
    return params | {"lm": {k: v for k, v in params["lm"].items() if k != generate.EACH_LAYER}}


def test_decoding_with_the_weights_of_each_layer_gives_the_tokens_of_the_scan():
    config, params = model()
    assert generate.EACH_LAYER in params["lm"]
    expected = answer(batch())
    plain = scanned_params(params)
    seeds = jnp.zeros(len(PROMPT_LENGTHS), jnp.int32)
    scanned = make_generate(config, GREEDY)(plain, batch(), seeds)
    np.testing.assert_array_equal(scanned, expected)
    assert len(np.unique(expected)) > 4


def test_a_large_lm_is_decoded_with_its_weights_held_once(monkeypatch):
    config, params = model()
    plain = scanned_params(params)
    monkeypatch.setattr(generate, "EACH_LAYER_BYTES", 4 * config.lm.non_embedding_params - 1)
    assert generate.for_decoding(config.lm, plain) is plain


ROOM = 24


@functools.cache
def compiled():
    config, params = model()
    apply = jax.jit(VLM(config).apply)
    return lambda inputs: apply({"params": params}, inputs)


def forward(tokens, index, segments, images):
    """Logits of one row by a plain forward pass, padded on the right to ROOM: one compilation serves every length."""
    gap = ((0, 0), (0, ROOM - tokens.shape[1]))
    tokens, segments = np.pad(tokens, gap), np.pad(segments, gap, constant_values=-1)
    index = np.pad(index, gap, constant_values=-1)
    return compiled()(
        Inputs(tokens, index, np.arange(ROOM, dtype=np.int32)[None], segments, images)
    )


def recomputed(inputs):
    """The greedy answer of one unpadded prompt by a whole forward pass per token, without any cache."""
    first = inputs.tokens.shape[1]
    gap = ((0, 0), (0, NEW))
    tokens, segments = np.pad(inputs.tokens, gap), np.pad(inputs.segments, gap, constant_values=-1)
    index = np.pad(inputs.visual_index, gap, constant_values=-1)
    answer = []
    for end in range(first, first + NEW):
        logits = forward(tokens, index, segments, inputs.images)
        answer.append(int(np.argmax(logits[0, end - 1])))
        if answer[-1] == EOS:
            break
        tokens[0, end], segments[0, end] = answer[-1], 0
    return answer + [PAD] * (NEW - len(answer))


def test_the_cached_loop_gives_the_tokens_of_whole_forward_passes():
    for length in PROMPT_LENGTHS[:2]:
        inputs = prompt(length, length)
        assert answer(inputs)[0].tolist() == recomputed(inputs)


def test_answers_in_a_mixed_batch_equal_those_alone():
    together = answer(batch())
    assert len({tuple(row) for row in together.tolist()}) == len(together), (
        "answers must differ to be a test"
    )
    for row, length in zip(together, PROMPT_LENGTHS, strict=True):
        assert row.tolist() == answer(prompt(length, length))[0].tolist()


def cut(inputs, count):
    """Prompts without their first `count` tokens; positions go on counting them."""
    kept = {"tokens", "visual_index", "positions", "segments"}
    return inputs._replace(**{name: getattr(inputs, name)[:, count:] for name in kept})


def test_a_shared_prefix_changes_no_answer():
    """Prompts that begin with the same six tokens; the prefix is read once, the rows hold the rest, left-padded."""
    config, params = model()
    generator = make_generate(config, GREEDY)
    prefix = np.array([[1, 7, 9, 4, 11, 23]], np.int32)
    whole = []
    for length in PROMPT_LENGTHS:
        rest = prompt(length, length)
        gap = ((0, 0), (6, 0))
        whole.append(
            rest._replace(
                tokens=np.concatenate([prefix, rest.tokens], axis=1),
                visual_index=np.pad(rest.visual_index, gap, constant_values=-1),
                positions=np.arange(length + 6, dtype=np.int32)[None],
                segments=np.zeros((1, length + 6), np.int32),
            )
        )
    rows = stacked([cut(one, 6) for one in whole], max(PROMPT_LENGTHS))
    seeds = jnp.zeros(len(whole), jnp.int32)
    shared = generator(params, rows, seeds, generator.prefix(params, prefix))
    assert len({tuple(row) for row in shared.tolist()}) == len(whole)
    for row, one in zip(shared, whole, strict=True):
        assert row.tolist() == answer(one)[0].tolist()
    other = generator(params, rows, seeds, generator.prefix(params, prefix[:, ::-1]))
    assert not np.array_equal(shared, other)


def test_a_window_shuts_out_a_shared_prefix_too():
    """With a window of 3 the last of 9 tokens sees nothing of a prefix of 6, two layers see four tokens back."""
    config, params = model()
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, sliding_window=3))
    generator = make_generate(config, GREEDY)
    one = prompt(9, 9)
    seen = one._replace(positions=one.positions + 6)
    prefixes = [generator.prefix(params, np.full((1, 6), token)) for token in (4, 5)]
    said = [generator(params, seen, jnp.zeros(1, jnp.int32), prefix) for prefix in prefixes]
    assert np.array_equal(*said)


REPLIES = [[[5, 6], [7]], [[8, 9, 10], [11, EOS], [12]], [[13]], [[14, EOS], [15, EOS]]]


def with_replies(inputs, replies, slots):
    """The last `slots` columns hold a row's replies, numbered 1, 2, ..."""
    last = int(inputs.positions[0, -1])
    tokens, segments, positions = [], [], []
    for number, ids in enumerate(replies, start=1):
        tokens += ids
        segments += [number] * len(ids)
        positions += range(last + 1, last + 1 + len(ids))
    gap = [0] * (slots - len(tokens))
    filled = (
        (inputs.tokens, tokens + gap), (inputs.visual_index, [-1] * slots), (inputs.positions, positions + gap),
        (inputs.segments, segments + [-1] * len(gap)),
    )  # fmt: skip
    joined = [np.concatenate([old, np.array([new], np.int32)], axis=1) for old, new in filled]
    names = ("tokens", "visual_index", "positions", "segments")
    return inputs._replace(**dict(zip(names, joined, strict=True)))


def likelihood(inputs, reply):
    """Log-probability of a reply to one unpadded prompt, by a plain forward pass over both."""
    told = with_replies(inputs, [reply], len(reply))
    logits = forward(told.tokens, told.visual_index, told.segments * 0, told.images)[0]
    logits = np.asarray(jax.nn.log_softmax(logits))
    first = inputs.tokens.shape[1] - 1
    return sum(float(logits[first + i, token]) for i, token in enumerate(reply))


def test_replies_in_one_pass_are_as_likely_as_each_alone():
    config, params = model()
    prompts = [prompt(length, length) for length in PROMPT_LENGTHS]
    rows = [
        with_replies(padded(one, max(PROMPT_LENGTHS)), replies, 6)
        for one, replies in zip(prompts, REPLIES, strict=True)
    ]
    together = Inputs(
        *(
            None if column[0] is None else np.concatenate(column)
            for column in zip(*rows, strict=True)
        )
    )
    generator = make_generate(config, GREEDY)
    found = np.asarray(generator.replies(params, together, None, slots=6, count=3))
    assert found.shape == (4, 3) and len(set(found[found < 0])) == 8
    for row, one, replies in zip(found, prompts, REPLIES, strict=True):
        wanted = [likelihood(one, reply) for reply in replies]
        np.testing.assert_allclose(row[: len(replies)], wanted, rtol=2e-5)
        assert (row[len(replies) :] == 0).all()


def test_replies_behind_a_shared_prefix_are_as_likely_as_behind_whole_prompts():
    config, params = model()
    generator = make_generate(config, GREEDY)
    one = prompt(12, 12)
    one = one._replace(  # the image stands behind the six tokens that are shared
        tokens=np.roll(one.tokens, 6), visual_index=np.roll(one.visual_index, 6)
    )
    told = with_replies(one, REPLIES[1], 6)
    whole = generator.replies(params, told, None, slots=6, count=3)
    prefix = generator.prefix(params, one.tokens[:, :6])
    shared = generator.replies(params, cut(told, 6), prefix, slots=6, count=3)
    np.testing.assert_allclose(shared, whole, rtol=2e-5)


def test_more_padding_changes_no_answer():
    inputs = batch()
    assert np.array_equal(answer(inputs), answer(padded(inputs, 24)))


def test_the_prompt_and_the_image_change_the_answer():
    inputs = prompt(9, 9)
    assert answer(inputs).tolist() != answer(prompt(9, 10)).tolist()
    assert answer(inputs).tolist() != answer(inputs._replace(images=255 - inputs.images)).tolist()


def test_a_row_stops_at_the_first_end_token_and_is_padded():
    whole = answer(batch(), Decoding(max_new_tokens=NEW, eos_ids=(EOS,), pad_id=VOCAB - 1))
    end = int(whole[1, 3])  # a token the model chooses becomes an end token
    cut = answer(batch(), Decoding(max_new_tokens=NEW, eos_ids=(EOS, end), pad_id=VOCAB - 1))
    for before, after in zip(whole.tolist(), cut.tolist(), strict=True):
        length = before.index(end) + 1 if end in before else NEW
        assert after == before[:length] + [VOCAB - 1] * (NEW - length)
    assert cut[1, 4:].tolist() == [VOCAB - 1] * (NEW - 4)


def test_the_loop_stops_when_every_row_has_ended(monkeypatch):
    """Counts decode steps by a host callback: one row that ends at its 4th token needs 3 of them."""
    steps = []
    inputs = prompt(9, 9)
    end = int(answer(inputs)[0, 3])
    first = answer(inputs)[0].tolist().index(end)
    original = VLM.decode

    def counted(self, *args):
        jax.debug.callback(lambda: steps.append(1))
        return original(self, *args)

    monkeypatch.setattr(VLM, "decode", counted)
    answer(inputs, Decoding(max_new_tokens=NEW + 1, eos_ids=(end,), pad_id=PAD))
    jax.effects_barrier()
    assert len(steps) == first


def test_equal_shapes_and_equal_configs_compile_once():
    config, params = model()
    decoding = Decoding(max_new_tokens=2, eos_ids=(EOS,), pad_id=PAD)
    generator = make_generate(config, decoding)
    assert generator is make_generate(
        config, Decoding(max_new_tokens=2, eos_ids=(EOS,), pad_id=PAD)
    )
    for _ in range(2):
        generator(params, batch(), jnp.zeros(4, jnp.int32))
    assert generator.compilations == 1
    generator(params, prompt(9, 9), jnp.zeros(1, jnp.int32))
    assert generator.compilations == 2


def test_sampling_repeats_with_the_seed_and_ignores_the_other_rows():
    sampled = Decoding(max_new_tokens=NEW, eos_ids=(EOS,), pad_id=PAD, temperature=1.5, top_p=0.9)
    seeds = np.array([11, 12, 13, 14], np.int32)
    together = answer(batch(), sampled, seeds)
    assert np.array_equal(together, answer(batch(), sampled, seeds))
    assert not np.array_equal(together, answer(batch(), sampled, seeds + 10))
    alone = answer(prompt(PROMPT_LENGTHS[2], PROMPT_LENGTHS[2]), sampled, seeds[2:3])
    assert np.array_equal(together[2:3], alone)


def test_nearly_zero_temperature_is_greedy():
    logits = jax.random.normal(jax.random.key(0), (64, VOCAB))
    cold = Decoding(max_new_tokens=1, eos_ids=(), pad_id=0, temperature=1e-4)
    drawn = choose(logits, jnp.arange(64), jnp.int32(0), cold)
    assert np.array_equal(drawn, np.argmax(logits, -1))


@pytest.mark.parametrize(
    "spread", [0.1, 6.0]
)  # a nucleus of more tokens than CANDIDATES, and of fewer
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(spread):
    logits = spread * jax.random.normal(jax.random.key(0), (3, 5000))
    top_p = np.array([[0.5], [0.9], [1.0]])
    found = np.asarray(nucleus_floor(logits, jnp.asarray(top_p, jnp.float32)))
    assert found[2] == -np.inf
    for row, share, least in zip(np.asarray(logits, np.float64), top_p[:2], found, strict=False):
        descending = np.sort(row)[::-1]
        probabilities = np.exp(descending) / np.exp(descending).sum()
        size = np.searchsorted(np.cumsum(probabilities), share[0]) + 1
        assert (size > CANDIDATES) == (spread < 1)
        assert np.isclose(least, descending[size - 1])


def test_draws_follow_the_softmax_of_the_nucleus():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25])), (4000, 4))
    assert np.allclose(np.exp(nucleus_floor(logits[:1], 0.7)), 0.25)  # .5 < .7 <= .5 + .25
    decoding = Decoding(max_new_tokens=1, eos_ids=(), pad_id=0, temperature=1.0, top_p=0.7)
    drawn = choose(logits, jnp.arange(4000), jnp.int32(3), decoding)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 4000
    assert shares[0] == shares[2] == 0
    assert abs(shares[1] - 2 / 3) < 0.03  # 4 standard deviations


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 0.0}, "top_p must be positive"),
    ],
)
def test_impossible_decoding_is_named(fields, match):
    with pytest.raises(ConfigError, match=match):
        Decoding(**{"max_new_tokens": 1, "eos_ids": (1,), "pad_id": 0, **fields})
