"""Random programs: what holds for those that we thought of holds for those that we did not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_surgery as surgery
from tests.programs import comparison
from tests.programs.programs import normal

NUM_ROWS, NUM_STEPS, NUM_PROGRAMS = 3, 7, 30
ELEMENTWISE = (jnp.tanh, jnp.sin, jax.nn.softplus, jax.checkpoint(jnp.cos), lambda x: x**2)


def random_program(seed):
    """Losses of a random graph over matrices, of which each step makes one more, and parameters."""
    generator = np.random.default_rng(seed)
    widths = [int(width) for width in generator.integers(2, 5, size=2)]
    params: list[tuple[int, ...]] = []
    steps = []

    def draw(number):
        return int(generator.integers(number))

    def parameter(*shape):
        """A new one, or one that has been used before."""
        same = [place for place, other in enumerate(params) if other == shape]
        if same and generator.random() < 0.4:
            return same[draw(len(same))]
        params.append(shape)
        return len(params) - 1

    for _ in range(NUM_STEPS):
        one = draw(len(widths))
        same = [place for place, width in enumerate(widths) if width == widths[one]]
        other, width, size = same[draw(len(same))], widths[one], 1 + draw(4)
        kind = ("dense", "dense", "turned", "elementwise", "bias", "times", "slice", "concatenate")[
            draw(8)
        ]
        if kind == "dense":
            steps.append((kind, one, parameter(width, size)))
            widths.append(size)
        elif kind == "turned":
            steps.append((kind, one, parameter(size, width)))
            widths.append(size)
        elif kind == "elementwise":
            steps.append((kind, one, draw(len(ELEMENTWISE))))
            widths.append(width)
        elif kind == "bias":
            steps.append((kind, one, parameter(width)))
            widths.append(width)
        elif kind == "times":
            steps.append((kind, one, other))
            widths.append(width)
        elif kind == "slice":
            start = draw(width)
            steps.append((kind, one, start))
            widths.append(width - start)
        else:
            other = draw(len(widths))
            steps.append((kind, one, other))
            widths.append(width + widths[other])
    readers = [sorted({len(widths) - 1 - draw(4) for _ in range(2)}) for _ in range(3)]
    by_columns = generator.random() < 0.5

    def losses_fn(params):
        values = [normal(NUM_ROWS, width, seed=place) for place, width in enumerate(widths[:2])]
        for kind, one, other in steps:
            x = values[one]
            if kind == "dense":
                x = x @ params[other]
            elif kind == "turned":
                x = lax.dot_general(params[other], x, (((1,), (1,)), ((), ()))).T
            elif kind == "elementwise":
                x = ELEMENTWISE[other](x)
            elif kind == "bias":
                x = x + params[other][None]
            elif kind == "times":
                x = x * values[other]
            elif kind == "slice":
                x = x[:, other:]
            else:
                x = jnp.concatenate([x, values[other]], axis=1)
            values.append(x)
        if by_columns:  # of the last ones, one loss for each
            return jnp.mean(jnp.concatenate(values[-3:], axis=1) ** 2, axis=0)
        return [sum(jnp.mean(jnp.sin(values[place])) for place in places) for places in readers]

    return losses_fn, [normal(*shape, seed=seed) for seed, shape in enumerate(params)]


@functools.cache
def found_for(seed):
    with jax.enable_x64(True), comparison.multiplied():
        return comparison.both_ways(*random_program(seed))


every_seed = pytest.mark.parametrize("seed", range(NUM_PROGRAMS))


@every_seed
def test_the_gramian_is_that_of_the_stack(seed):
    comparison.assert_gramian(found_for(seed), 1e-12)


@every_seed
def test_the_sum_of_given_weights_is_that_of_the_stack(seed):
    comparison.assert_sums(found_for(seed), 1e-12)


@every_seed
def test_parameters_with_gradients_of_two_losses_are_found_to_be_shared(seed):
    with jax.enable_x64(True):
        losses_fn, params = random_program(seed)
        shared = surgery.infer_shared(losses_fn, params)
    rows, place = found_for(seed).rows, 0
    for is_shared, leaf in zip(shared, params, strict=True):
        of_leaf = rows[:, place : place + leaf.size]
        place += leaf.size
        assert is_shared or np.count_nonzero(np.any(of_leaf, axis=1)) < 2


def test_random_programs_have_shared_parameters_and_others():
    """Else the tests above say nothing."""
    found = [np.array(surgery.infer_shared(*random_program(seed))) for seed in range(NUM_PROGRAMS)]
    share = np.mean(np.concatenate(found))
    assert 0.2 < share < 0.8
    assert np.mean([np.linalg.norm(found_for(seed).rows) > 0 for seed in range(NUM_PROGRAMS)]) > 0.9
