"""Numbers that others computed, on the Jacobian of TorchJD 0.18's own tests."""

import numpy as np
import pytest

import optax_surgery as surgery

JACOBIAN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32)

# TorchJD 0.18, tests/unit/aggregation/test_values.py, four digits each
TORCHJD = {
    "pcgrad": (surgery.pcgrad(), [0.5848, 3.8012, 3.8012]),
    "aligned_mtl": (surgery.aligned_mtl(), [0.2133, 0.9673, 0.9673]),
    "imtl_g": (surgery.imtl_g(), [0.0767, 1.0, 1.0]),
    "conflict_free": (surgery.conflict_free(), [0.1588, 2.0706, 2.0706]),
}


@pytest.mark.parametrize("name", TORCHJD)
def test_equals_torchjd(name):
    tx, expected = TORCHJD[name]
    update, _ = tx.update(JACOBIAN, tx.init(None))
    np.testing.assert_allclose(update, expected, atol=1e-4)


def test_krum_selects_torchjds_gradients():
    jacobian = np.array([[1, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]], np.float32)
    tx = surgery.krum(num_byzantine=1, num_selected=4)
    update, _ = tx.update(jacobian, tx.init(None))
    np.testing.assert_allclose(update, [1.25, 0.75, 1.5], rtol=1e-6)
