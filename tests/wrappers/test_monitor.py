"""What was done, for everyone to see: `monitor` and `scalars`."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_surgery as surgery
from optax_surgery.flax import SurgeryTrainState
from tests.common import same
from tests.wrappers.cases import (
    LOSSES,
    NAN_ROW,
    NUM_TASKS,
    PARAMS,
    assert_close,
    gradients,
    in_trunk,
    module,
    scaled,
    with_nan_row,
)

FROM_MONITOR = {"conflict_share", "least_cosine", "mean_cosine", "condition_number"}


def test_a_monitored_surgery_is_the_surgery_and_its_weights_are_in_the_state():
    tx, famo = surgery.monitor(NUM_TASKS, surgery.famo(NUM_TASKS)), surgery.famo(NUM_TASKS)
    state, expected_state = tx.init(PARAMS), famo.init(PARAMS)
    np.testing.assert_array_equal(optax.tree.get(state, "weights"), np.zeros(NUM_TASKS))
    for number, task_grads in enumerate(gradients(2)):
        losses = LOSSES + number
        updates, state = tx.update(task_grads, state, PARAMS, losses=losses)
        expected, expected_state = famo.update(task_grads, expected_state, PARAMS, losses=losses)
        assert_close(updates, expected)
        weights = optax.tree.get(state, "weights")
        assert_close(surgery.combine(weights, task_grads), expected)
        gramian = surgery.gramian(task_grads)
        np.testing.assert_allclose(optax.tree.get(state, "gramian"), gramian, rtol=1e-6)
    assert_close(state.weighting_state.inner_state, expected_state)


def test_before_a_surgery_it_passes_the_gradients_on():
    tx, (task_grads,) = surgery.monitor(NUM_TASKS), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS))
    assert same(updates, task_grads)
    np.testing.assert_allclose(state.gramian, surgery.gramian(task_grads), rtol=1e-6)
    assert "weight/0" not in surgery.scalars(state)
    assert not isinstance(tx, surgery.Surgery)


@pytest.mark.parametrize("inner", [None, surgery.mean()])
def test_of_a_masked_task_there_is_nothing_to_see(inner):
    tx, (task_grads,) = surgery.monitor(NUM_TASKS, inner), gradients(1)
    _, state = tx.update(with_nan_row(task_grads), tx.init(PARAMS), task_mask=NAN_ROW)
    gramian = np.asarray(optax.tree.get(state, "gramian"))
    expected = np.array(surgery.gramian(task_grads))
    expected[1] = expected[:, 1] = 0
    np.testing.assert_allclose(gramian, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [1e30, 1e-30])
@pytest.mark.parametrize("inner", [None, surgery.mean()])
def test_norms_whose_squares_do_not_fit_are_reported_right(inner, length):
    tx, (task_grads,) = surgery.monitor(NUM_TASKS, inner), gradients(1)
    _, state = tx.update(scaled(task_grads, jnp.full(NUM_TASKS, length)), tx.init(PARAMS))
    norms = length * np.sqrt(np.diagonal(surgery.gramian(task_grads)))
    found = surgery.scalars(state)
    assert optax.tree.get(state, "scale") != 1
    for task, norm in enumerate(norms):
        np.testing.assert_allclose(found[f"norm/{task}"], norm, rtol=1e-5)


def test_a_surgery_on_coordinates_has_no_weights():
    tx = surgery.monitor(NUM_TASKS, surgery.graddrop())
    message = "Expected stacked gradients alone, got a Gramian at 'graddrop'"
    with pytest.raises(ValueError, match=message):
        tx.update(*gradients(1), tx.init(PARAMS))


# scalars


def monitored(state_of=None, **extra_args):
    tx = surgery.monitor(NUM_TASKS, surgery.nash_mtl()) if state_of is None else state_of
    _, state = tx.update(*gradients(1), tx.init(PARAMS), PARAMS, losses=LOSSES, **extra_args)
    return state


def test_numbers_for_a_logger():
    state = monitored()
    found = jax.jit(surgery.scalars)(state)
    of_tasks = {f"{what}/{task}" for what in ("norm", "weight") for task in range(NUM_TASKS)}
    reported = {"converged", "residual", "unusable_losses"}
    assert set(found) == FROM_MONITOR | of_tasks | reported
    assert all(number.shape == () for number in found.values())
    gramian = np.asarray(optax.tree.get(state, "gramian"), float)
    norms = np.sqrt(np.diagonal(gramian))
    cosines = (gramian / np.outer(norms, norms))[np.triu_indices(NUM_TASKS, 1)]
    np.testing.assert_allclose(found["least_cosine"], cosines.min(), rtol=1e-5)
    np.testing.assert_allclose(found["mean_cosine"], cosines.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["conflict_share"], (cosines < 0).mean(), rtol=1e-6)
    for task in range(NUM_TASKS):
        np.testing.assert_allclose(found[f"norm/{task}"], norms[task], rtol=1e-5)
        assert found[f"weight/{task}"] == optax.tree.get(state, "weights")[task]
    assert found["converged"]


def test_names_of_tasks_are_given_as_a_list_or_by_the_losses():
    state = monitored()
    losses = {"c": 3.0, "a": 1.0, "b": 2.0}
    assert surgery.scalars(state, losses) == surgery.scalars(state, ["a", "b", "c"])
    assert "weight/a" in surgery.scalars(state, losses)
    assert surgery.scalars(state, LOSSES) == surgery.scalars(state)
    with pytest.raises(ValueError, match=r"Expected 3 names of tasks, got \['a', 'b'\] at 'names'"):
        surgery.scalars(state, ["a", "b"])


def test_of_fewer_than_two_gradients_no_pair_conflicts():
    tx = surgery.monitor(NUM_TASKS)
    _, state = tx.update(*gradients(1), tx.init(PARAMS), task_mask=jnp.array([True, False, False]))
    for state_of in (state, tx.init(PARAMS)):
        found = surgery.scalars(state_of)
        assert found["least_cosine"] == found["mean_cosine"] == 1
        assert found["conflict_share"] == 0


def test_groups_have_their_names_before_the_number():
    leafwise = surgery.leafwise(surgery.monitor(NUM_TASKS, surgery.mean()), module)
    assert {"trunk/least_cosine", "head/weight/2"} <= set(surgery.scalars(monitored(leafwise)))
    partition = optax.partition(
        {"trunk": surgery.monitor(NUM_TASKS, surgery.mean()), "head": surgery.sum()},
        {"trunk": "trunk", "head": "head"},
    )
    found = surgery.scalars(monitored(partition))
    assert {"trunk/least_cosine", "trunk/weight/2"} <= set(found)
    assert "head/least_cosine" not in found


def test_two_monitors_in_one_chain_have_numbers_of_their_own():
    chain = optax.chain(
        surgery.monitor(NUM_TASKS), surgery.monitor(NUM_TASKS, surgery.mean()), optax.adam(1e-3)
    )
    found = surgery.scalars(monitored(chain))
    assert found["norm/0"] == found["1/norm/0"]


def test_masked_tasks_and_unusable_losses_are_counted_once():
    chain = optax.chain(
        surgery.monitor(NUM_TASKS, surgery.every(surgery.scale_invariant(), 1, NUM_TASKS)),
        optax.adam(1e-3),
    )
    tx = surgery.on_nonfinite(chain)
    state = tx.init(PARAMS)
    losses = {"a": -1.0, "b": jnp.nan, "c": 2.0}
    for _ in range(2):
        _, state = tx.update(*gradients(1), state, PARAMS, losses=losses)
    found = surgery.scalars(state, losses)
    assert (found["unusable_losses"], found["tasks_masked"]) == (2, 2)
    assert found["weight/a"] == 0
    assert found["weight/c"] == 0.5


def test_the_state_of_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(surgery.monitor(2, surgery.pcgrad()), optax.adam(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    found = surgery.scalars(optimizer.opt_state, ["fit", "decay"])
    np.testing.assert_allclose(found["least_cosine"], -1, rtol=1e-5)
    assert "weight/fit" in found


def test_a_state_without_anything_to_report_has_the_count_alone():
    tx = surgery.on_shared(surgery.pcgrad(), in_trunk)
    assert set(surgery.scalars(tx.init(PARAMS))) == {"unusable_losses"}
    assert surgery.scalars(optax.adam(1e-3).init(PARAMS)) == {}


def test_scalars_look_into_training_states_and_several_in_a_dict():
    tx, (task_grads,) = surgery.monitor(NUM_TASKS, surgery.pcgrad()), gradients(1)
    train_state = SurgeryTrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    train_state = train_state.apply_gradients(grads=task_grads)
    found = surgery.scalars(train_state.opt_state)
    assert same(surgery.scalars(train_state), found)
    both = surgery.scalars({"actor": train_state, "critic": train_state.opt_state})
    assert set(both) == {f"{name}/{key}" for name in ("actor", "critic") for key in found}


def test_scalars_see_all_of_a_named_tuple_whatever_its_fields_are_called():
    tx, (task_grads,) = surgery.monitor(NUM_TASKS, surgery.pcgrad()), gradients(1)
    _, state = tx.update(task_grads, tx.init(PARAMS))
    mine = collections.namedtuple("Mine", ["before", "opt_state"])
    assert same(surgery.scalars(mine(before=state, opt_state=())), surgery.scalars(state))


def test_scalars_of_several_seeds_are_mapped():
    tx, (task_grads,) = surgery.monitor(NUM_TASKS), gradients(1)
    states = jax.vmap(lambda _: tx.update(task_grads, tx.init(PARAMS))[1])(jnp.arange(2))
    with pytest.raises(
        ValueError, match=r"Map over seeds or steps: `jax.vmap\(scalars\)\(state\)`"
    ):
        surgery.scalars(states)
    for value in jax.vmap(surgery.scalars)(states).values():
        assert value.shape == (2,)
