"""Work counted in the text of compiled programs, a CPU's and a TPU's, against what the shapes say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlm_jax import aot
from vlm_jax.aot import hlo, programs
from vlm_jax.training import losses

LAYERS, ROWS, WIDTH = 8, 256, 512
MATMULS = 2 * LAYERS * ROWS * WIDTH**2


@functools.cache
def devices(platform):
    aot.quiet_environment("v5e:2x2")
    return jax.devices()[:1] if platform == "cpu" else programs.devices("v5e:2x2")


def count(platform, function, *shapes, specs=None, sizes=(1,)):
    """The costs of `function` of float32 arguments, over the first devices of `platform` in a mesh with one axis."""
    mesh = jax.make_mesh(
        sizes, ("x",), axis_types=(AxisType.Auto,), devices=devices(platform)[: np.prod(sizes)]
    )
    specs = specs or [PartitionSpec()] * len(shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return hlo.count(jax.jit(function).lower(*arguments).compile().as_text())


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def unrolled(x, weights):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


STACK = ((ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))
both = pytest.mark.parametrize("platform", ["cpu", "tpu"])


@both
def test_a_scan_counts_its_body_as_often_as_it_runs(platform):
    loop, line = count(platform, scanned, *STACK), count(platform, unrolled, *STACK)
    assert loop.flops == line.flops == MATMULS
    assert loop.open_loops == 0


@both
def test_nested_loops_multiply(platform):
    def twice_three(x, weights):
        return jax.lax.fori_loop(0, 3, lambda i, x: scanned(x, weights), x)

    assert count(platform, twice_three, *STACK).flops == 3 * MATMULS


@both
def test_the_backward_pass_costs_twice_and_recomputation_once_more(platform):
    def loss(remat):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)) if remat else None
        forward = (lambda x, w: jax.lax.scan(step, x, w)[0]) if remat else scanned
        return jax.grad(lambda x, w: forward(x, w).sum(), argnums=(0, 1))

    assert count(platform, loss(False), *STACK).flops == 3 * MATMULS
    assert count(platform, loss(True), *STACK).flops == 4 * MATMULS


@both
def test_batched_products_count_no_place_that_is_padding(platform):
    def scores(q, k):
        return jnp.einsum("btnh,bsnh->bnts", q, k)

    # A TPU writes the batch axes as a convolution over dilated windows: most of its places are empty.
    costs = count(platform, scores, (4, 128, 8, 64), (4, 256, 8, 64))
    assert costs.flops == 2 * 4 * 8 * 128 * 256 * 64


@both
def test_one_row_by_a_matrix_counts_although_no_matrix_unit_runs(platform):
    costs = count(platform, lambda x, w: x @ w, (1, 1024), (1024, 512))
    assert costs.flops == 2 * 1024 * 512


@both
def test_of_a_branch_the_costliest_counts(platform):
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    costs = count(platform, branch, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert costs.flops == 2 * 2 * ROWS * WIDTH**2


@both
def test_a_loop_of_unknown_length_counts_once_and_is_reported(platform):
    def until(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

    costs = count(platform, until, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert (costs.flops, costs.open_loops) == (2 * ROWS * WIDTH**2, 1)


@both
@pytest.mark.parametrize("chunk", [8, 512])
def test_the_loss_s_loop_counts_as_often_as_it_may_run(platform, chunk):
    """It ends with the last supervised position."""

    def loss(hidden, head):
        tokens = jnp.arange(4 * 1024).reshape(4, 1024) % 512
        return losses.chunked_next_token_loss(hidden, head, tokens, tokens % 3 == 1, chunk)[0]

    costs = count(platform, jax.grad(loss, (0, 1)), (4, 1024, WIDTH), (WIDTH, 512))
    assert (costs.flops, costs.open_loops) == (3 * 2 * 4 * 1024 * WIDTH * 512, 0)


def test_a_loop_that_counts_in_steps_is_read_from_its_condition():
    text = """HloModule m

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %y)
}

%condition (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[], f32[8,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(12)
  ROOT %lt = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %start = s32[] constant(3)
  %s = (s32[], f32[8,8]) tuple(%start, %a)
  %w = (s32[], f32[8,8]) while(%s), condition=%condition, body=%body
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""
    assert hlo.count(text).flops == 5 * 2 * 8**3  # 3, 5, 7, 9, 11


def test_gathers_in_a_scan_count_each_layer_and_send_what_the_ring_needs():
    specs = [PartitionSpec("x"), PartitionSpec(None, "x")]
    costs = count("tpu", scanned, *STACK, specs=specs, sizes=(4,))
    assert costs.flops == MATMULS / 4
    # Each chip holds a fourth of the weights and passes it on three times.
    assert costs.collectives["all-gather"] in (
        1,
        LAYERS,
    )  # of all layers at once, or layer by layer
    assert costs.sent_bytes["all-gather"] in (  # in float32, or rounded before they travel
        3 * LAYERS * WIDTH**2 * size / 4 for size in (2, 4)
    )


def test_a_sum_over_chips_is_sent_twice_around_the_ring():
    specs = [PartitionSpec(None, "x"), PartitionSpec("x", None)]
    costs = count("tpu", lambda x, w: x @ w, (ROWS, WIDTH), (WIDTH, WIDTH), specs=specs, sizes=(4,))
    kinds = dict(costs.sent_bytes)
    assert kinds == {"all-reduce": 2 * 0.75 * 4 * ROWS * WIDTH}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2,4},{1,3,5}}", 3),
        ("{}", 6),
        ("[2,3]<=[6]", 3),
        ("[3,2]<=[2,3]T(1,0)", 2),
        ("mesh['a'=1,'b'=3,'c'=2], device_ids=([2,3]T(1,0)) {'b'}", 3),
        ("mesh['a'=1,'b'=3,'c'=2] {'b','c'}", 6),
        ("mesh['a'=6] {'a':(1)2}", 2),
    ],
)
def test_groups_are_read_in_every_notation(groups, size):
    text = f"""HloModule m, replica_count=1, num_partitions=6

ENTRY %main (a: f32[100]) -> f32[600] {{
  %a = f32[100]{{0}} parameter(0)
  ROOT %g = f32[600]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
    assert hlo.count(text).sent_bytes == {"all-gather": 400 * (size - 1)}


def test_a_scan_reads_its_stacked_weights_once_and_not_once_per_layer():
    costs = count("cpu", scanned, *STACK)
    weights, state = 4 * LAYERS * WIDTH**2, 4 * ROWS * WIDTH
    assert weights < costs.memory_bytes < 3 * weights + 8 * LAYERS * state


def test_what_stays_on_the_chip_is_no_memory_traffic():
    text = """HloModule m

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[1000]{0:T(1024)S(1)} negate(%a)
  ROOT %c = f32[1000]{0} exponential(%b)
}
"""
    assert hlo.count(text).memory_bytes == 8000


NESTED = """
HloModule product, num_partitions=1

%slice_of_layer (p.0: bf16[32,64,128], p.1: s32[]) -> bf16[64,128] {
  %p.0 = bf16[32,64,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %layer = bf16[64,128]{1,0} bitcast(%cut)
}

%product (q.0: bf16[32,64,128], q.1: s32[], q.2: bf16[4,64]) -> bf16[4,128] {
  %q.0 = bf16[32,64,128]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = bf16[4,64]{1,0} parameter(2)
  %weights = bf16[64,128]{1,0} fusion(%q.0, %q.1), kind=kLoop, calls=%slice_of_layer
  ROOT %made = bf16[4,128]{1,0} convolution(%q.2, %weights), dim_labels=bf_io->bf
}

ENTRY %main (stack: bf16[32,64,128], layer: s32[], rows: bf16[4,64]) -> bf16[4,128] {
  %stack = bf16[32,64,128]{2,1,0} parameter(0)
  %layer.1 = s32[] parameter(1)
  %rows = bf16[4,64]{1,0} parameter(2)
  ROOT %out = bf16[4,128]{1,0} fusion(%stack, %layer.1, %rows), kind=kOutput, calls=%product
}
"""


def test_a_product_reads_its_layer_of_stacked_weights_and_not_the_stack():
    """As a TPU's decode step has it: the slice is a fusion inside of the product's."""
    costs = hlo.count(NESTED)
    assert costs.memory_bytes == 2 * (64 * 128 + 4 * 64 + 4 * 128) + 4  # the layer's number too
    assert costs.flops == 2 * 4 * 64 * 128


OVERLAPPED = """
HloModule gather_beside_a_product, num_partitions=4

%start (a.0: f32[8]) -> (f32[8], f32[4,8]) {
  %a.0 = f32[8]{0} parameter(0)
  %begun = f32[4,8]{1,0} all-gather(%a.0), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (f32[8]{0}, f32[4,8]{1,0}) custom-call(%begun), custom_call_target="AsyncCollectiveStart"
}

%beside (b.0: f32[8], b.1: f32[4,8], b.2: f32[16]) -> (f32[16], f32[8], f32[4,8], f32[4,8]) {
  %b.0 = f32[8]{0} parameter(0)
  %b.1 = f32[4,8]{1,0} parameter(1)
  %b.2 = f32[16]{0} parameter(2)
  %work = f32[16]{0} negate(%b.2)
  %going = f32[4,8]{1,0} all-gather(%b.0), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %all = (f32[16]{0}, f32[8]{0}, f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%work, %b.0, %b.1, %going)
}

%done (c.0: f32[8], c.1: f32[4,8]) -> f32[4,8] {
  %c.0 = f32[8]{0} parameter(0)
  %c.1 = f32[4,8]{1,0} parameter(1)
  %ended = f32[4,8]{1,0} all-gather(%c.0), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %whole = f32[4,8]{1,0} custom-call(%c.0, %c.1, %ended), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (shard: f32[8], rows: f32[16]) -> f32[4,8] {
  %shard = f32[8]{0} parameter(0)
  %rows = f32[16]{0} parameter(1)
  %open = (f32[8]{0}, f32[4,8]{1,0}) fusion(%shard), kind=kCustom, calls=%start
  %in = f32[8]{0} get-tuple-element(%open), index=0
  %out = f32[4,8]{1,0} get-tuple-element(%open), index=1
  %on = (f32[16]{0}, f32[8]{0}, f32[4,8]{1,0}, f32[4,8]{1,0}) fusion(%in, %out, %rows), kind=kOutput, calls=%beside
  %in.1 = f32[8]{0} get-tuple-element(%on), index=1
  %out.1 = f32[4,8]{1,0} get-tuple-element(%on), index=3
  ROOT %end = f32[4,8]{1,0} fusion(%in.1, %out.1), kind=kCustom, calls=%done
}
"""


def test_a_gather_that_overlaps_with_other_work_counts_at_its_start_alone():
    """As a TPU has it: each fusion that runs beside the gather takes its buffers in and hands them on."""
    costs = hlo.count(OVERLAPPED)
    started = 4 * (8 + 8 + 4 * 8)  # the shard read, and both buffers of the result
    assert costs.memory_bytes == started + 4 * (16 + 16)
    assert costs.collectives == {"all-gather": 1} and costs.sent_bytes == {"all-gather": 3 * 4 * 8}
