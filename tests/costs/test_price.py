"""What a question costs: rooflines against sums written out by hand, cache and weights against the models' own."""

import jax
import pytest
from compressor import compressor_config

from vlm_jax.compressors import with_tokens
from vlm_jax.costs import chips, flops, memory
from vlm_jax.costs import price as cost
from vlm_jax.costs.price import Budget, Phase, Price, Workload, find_chip
from vlm_jax.models.lm import empty_cache
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig

H100 = find_chip("H100")


def llava(lm: str, visual_tokens: int) -> VLMConfig:
    vit = presets.vit("clip-l-336")
    packed = with_tokens(compressor_config("tokenpacker"), vit.grid, visual_tokens)
    return VLMConfig(vit, packed, presets.lm(lm))


def test_time_is_the_slower_of_arithmetic_and_traffic_in_each_phase():
    price = Price((Phase("a", 989e12, 1.0), Phase("b", 1.0, 2 * 3350e9)), 0.0, batch=4)
    assert price.seconds(H100) == pytest.approx(1 + 2)
    assert [phase.bounded_by(H100) for phase in price.phases] == ["compute", "memory"]
    assert price.flops == pytest.approx(989e12 / 4)
    assert price.dollars(H100, 7.2) == pytest.approx(3 / 3600 * 7.2 * 1e6 / 4)


@pytest.mark.parametrize("lm", ["qwen1.5-0.5b", "qwen2.5-7b", "llama3.2-1b"])
def test_a_token_of_cache_is_what_the_decoder_keeps(lm):
    config = presets.lm(lm, dtype="bfloat16")
    kept = jax.eval_shape(lambda: empty_cache(config, 3, 5))
    assert 15 * cost.cache_bytes(config) == sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize("size", ["0.5b", "1.8b", "4b", "7b", "14b"])
def test_the_typical_cache_is_near_that_of_real_models_of_the_size(size):
    config = presets.lm(f"qwen1.5-{size}")
    typical = cost.typical_cache_bytes(config.nominal_params)
    assert typical == pytest.approx(cost.cache_bytes(config), rel=0.15)


def test_the_papers_price_is_two_flops_and_one_read_per_weight():
    """7B, 50 text tokens, 16 visual ones, 3 answer tokens: one prefill and two decode steps of a batch of 4."""
    price = cost.paper_price("qwen1.5-7b", 7e9, 16, Workload(50, output_tokens=3, batch=4))
    cache = 2 * 32 * 32 * 128 * 2 * 4
    prefill, decode = price.phases
    assert price.flops == pytest.approx(2 * 7e9 * (50 + 16 + 3))
    assert prefill.bytes == 14e9 + 66 * cache
    assert decode.bytes == 2 * 14e9 + (67 + 68) * cache
    assert price.memory_bytes == 14e9 + 69 * cache
    by_hand = (14e9 + 66 * cache + 28e9 + 135 * cache) / 3350e9  # both phases wait for the memory
    assert price.seconds(H100) == pytest.approx(by_hand)


def test_cached_text_costs_no_flops_but_is_looked_at():
    fresh, cached = (cost.paper_price("x", 1e9, 16, Workload(50, c)) for c in (False, True))
    assert fresh.flops == 2e9 * 66 and cached.flops == 2e9 * 16
    assert fresh.memory_bytes == cached.memory_bytes
    assert fresh.phases[0].bytes == cached.phases[0].bytes


def test_the_exact_price_is_every_part_of_every_question():
    price = cost.exact_price("clip-l-336", "tokenpacker")
    own = price("qwen1.5-0.5b", 0, 16, Workload(50, output_tokens=3, batch=4))
    config = llava("qwen1.5-0.5b", 16)
    assert own.flops == flops.forward_flops(config, text_tokens=50, output_tokens=3).total
    weights, cache = memory.weight_bytes(config), 4 * cost.cache_bytes(config.lm)
    moved = {phase.name: phase.bytes for phase in own.phases}
    assert moved["encoder"] == weights.encoder
    assert moved["prefill"] == weights.layers + weights.head + 66 * cache
    assert moved["decode"] == 2 * (weights.layers + weights.head) + (67 + 68) * cache
    kept = weights.stored + 68 * cache
    assert own.memory_bytes == kept + memory.activation_bytes(config, 4, 66)
    assert own.memory_bytes < 1.5 * kept


def test_a_query_pass_reads_the_decoder_once_more_unless_the_text_is_cached():
    price = cost.exact_price("clip-l-336", "quecc")
    fresh, cached = (price("qwen1.5-0.5b", 0, 16, Workload(50, c)) for c in (False, True))
    weights = memory.weight_bytes(llava("qwen1.5-0.5b", 16))
    phases = {phase.name: phase for phase in fresh.phases}
    assert phases["query"].bytes == weights.layers
    assert phases["query"].flops == flops.decoder_flops(presets.lm("qwen1.5-0.5b"), 50, 50, 0)
    assert "query" not in {phase.name for phase in cached.phases}


def test_weights_of_a_published_model_are_its_parameters():
    """LLaVA-1.5-7B: 6.74 G of Vicuna, 0.29 G of 23 CLIP layers, 21 M of projector."""
    vit = presets.vit("clip-l-336")
    weights = memory.weight_bytes(
        VLMConfig(vit, compressor_config("identity"), presets.lm("vicuna-7b"))
    )
    assert weights.stored == pytest.approx(2 * (6.738e9 + 0.291e9 + 0.021e9), rel=0.002)
    assert weights.compressor == 0


def test_the_counts_a_compressor_can_give_are_those_it_accepts():
    assert cost.allowed_tokens("clip-l-336", "tokenpacker") == (1, 4, 9, 16, 36, 64, 144, 576)
    assert cost.allowed_tokens("siglip-so400m-384", "m3") == (1, 9, 81, 729)
    assert cost.allowed_tokens("clip-l-336", "mqt") == tuple(range(1, 257))
    assert cost.allowed_tokens("clip-l-336", "identity") == (576,)
    with pytest.raises(ConfigError, match="prumerge: its visual tokens cannot be chosen"):
        cost.allowed_tokens("clip-l-336", "prumerge")


def test_a_chips_memory_limits_and_a_smaller_limit_beside_it_wins():
    assert Budget("ms", 50, H100).memory_bytes == H100.hbm_bytes
    assert Budget("ms", 50, H100, memory_gib=12).memory_bytes == 12 * chips.GIB
    assert Budget("ms", 50, H100, memory_gib=1e6).memory_bytes == H100.hbm_bytes
    assert Budget("gflops", 50).memory_bytes == float("inf")
