"""After the optimiser: `apply_updates`."""

import jax
import optax
import pytest

import optax_surgery as surgery
from tests.common import same
from tests.wrappers.cases import PARAMS, gradients


def test_apply_updates():
    updates = jax.tree.map(lambda leaf: 0.5 * leaf, PARAMS)
    assert same(surgery.apply_updates(PARAMS, updates), optax.apply_updates(PARAMS, updates))


def test_stacked_updates_are_refused():
    message = r"Expected an update of shape \(\), got shape \(3,\) at 'head'. Combine the gradients"
    with pytest.raises(ValueError, match=message):
        surgery.apply_updates(PARAMS, gradients(1)[0])
