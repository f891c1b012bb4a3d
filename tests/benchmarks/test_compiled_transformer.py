"""What is read off compiled programs: products with the trips of loops, and what chips send."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import lax

pytest.importorskip("rich")
from benchmarks.systems import compiled_transformer as benchmark

SMALL = dataclasses.replace(
    benchmark.Config(), layers=3, width=128, vocabulary=256, length=128, tasks=2
)


def operations(function, *args):
    return benchmark.Program(jax.jit(function).lower(*args).compile().as_text()).products


def chain(x, kernels):
    return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_a_loops_body_counts_as_often_as_it_runs():
    x, kernels = jnp.ones((32, 64)), jnp.ones((5, 64, 64))
    once = 2 * 32 * 64 * 64
    assert operations(chain, x, kernels) == 5 * once
    assert operations(jax.grad(lambda k: jnp.sum(chain(x, k))), kernels) == 3 * 5 * once

    def nested(x, kernels):
        return lax.scan(lambda x, _: (chain(x, kernels), None), x, length=7)[0]

    assert operations(nested, x, kernels) == 7 * 5 * once


def test_of_a_cond_the_lesser_branch_counts():
    def either(x, kernels):
        return lax.cond(x[0, 0] > 0, lambda: x @ kernels[0], lambda: chain(x, kernels))

    assert operations(either, jnp.ones((32, 64)), jnp.ones((5, 64, 64))) == 2 * 32 * 64 * 64


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_counts_the_products_that_it_needs(padding, dilation):
    images, kernel = jnp.ones((2, 3, 10, 10)), jnp.ones((4, 3, 3, 3))

    def convolve(images, kernel):
        return lax.conv_general_dilated(
            images, kernel, (1, 1), [(padding, padding)] * 2, lhs_dilation=(dilation, dilation)
        )

    # Ones, so that a sum says how many were met; without the dilation's holes and the padding.
    expected = 2 * int(jnp.sum(convolve(images, kernel)))
    assert operations(convolve, images, kernel) == expected


def test_text_of_a_tpus_program():
    """Without a count of trips, with one all-gather beside two others and a product as batch."""
    text = """
%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %f = bf16[4,8]{1,0} fusion(%x), kind=kOutput, calls=%fused
  %g = bf16[4,8]{1,0} fusion(%f), kind=kOutput, calls=%fused
  ROOT %t = (s32[], bf16[4,8]) tuple(%next, %g)
}

%fused (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} all-gather(%a), channel_id=3, dimensions={0}
  ROOT %c = bf16[4,8]{1,0} convolution(%a, %w), dim_labels=bf_io->bf
}

%condition (q: (s32[], bf16[4,8])) -> pred[] {
  %q = (s32[], bf16[4,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (x.1: bf16[4,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]) tuple(%zero, %x.1)
  %loop = (s32[], bf16[4,8]) while(%start), condition=%condition, body=%body
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
    program = benchmark.Program(text)
    assert program.products == 6 * 2 * (2 * 4 * 8 * 8)
    assert program.sent == {"all-gather": 6 * 8 * 8 * 2}


@pytest.mark.parametrize("data", benchmark.DATA)
def test_a_small_step_compiles_for_sixteen_chips(data):
    if not importlib.util.find_spec(benchmark.COMPILER):
        pytest.skip('the compilers come with pip install -e ".[compiled]"')
    mesh = benchmark.mesh_of_chips()
    plain, stacked = (benchmark.measure(SMALL, data, way, mesh) for way in ("plain", "stacked"))
    assert 0 < plain["operations"] < stacked["operations"]
    assert sum(plain["sent"].values()) > 0
    if data == "own":
        assert stacked["operations"] < 1.2 * plain["operations"]
