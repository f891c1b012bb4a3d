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


# The authors' code of SAM-GS on this Jacobian and a second one, github.com/ThomBors/samgs, in
# float64 and without the factor T; lengths are made equal in the first case, and not in the others.
SECOND = np.array([[3.0, -2.0, 1.0], [1.0, 1.0, 0.5]], np.float32)
SAM_GS = {
    "equal lengths": (1.0, [JACOBIAN], [0.158809, 2.070607, 2.070607]),
    "momenta": (0.1, [JACOBIAN], [303.224149, 30.322415, 30.322415]),
    "momenta of two steps": (0.1, [JACOBIAN, SECOND], [19.258971, -0.704596, 6.106503]),
    "one step of each": (0.9, [JACOBIAN, SECOND], [3.848557, 0.346327, 1.574055]),
}


@pytest.mark.parametrize("name", SAM_GS)
def test_sam_gs_equals_the_authors_code(name):
    threshold, jacobians, expected = SAM_GS[name]
    tx = surgery.sam_gs(2, threshold=threshold)
    state = tx.init(np.zeros(3, np.float32))
    for jacobian in jacobians:
        update, state = tx.update(jacobian, state)
    np.testing.assert_allclose(update, expected, rtol=1e-5)


# The quadratic program of the authors' code of FedMGDA+ (`solve_centered_w`), by quadprog 0.1.
THREE = np.array([[-4, 1, 1], [6, 1, 1], [0, -1, 3]], np.float32)
FEDMGDA = {
    0.1: [0.017342, 0.078535, 0.37368],
    0.25: [0.016003, 0.155952, 0.261361],
    1.0: [0.01526, 0.198962, 0.198962],
}


@pytest.mark.parametrize("radius", FEDMGDA)
def test_fedmgda_equals_the_authors_code(radius):
    tx = surgery.fedmgda(radius)
    update, _ = tx.update(THREE, tx.init(np.zeros(3, np.float32)))
    np.testing.assert_allclose(update, FEDMGDA[radius], atol=1e-6)


# The authors' `epo_lp.py` (github.com/dbmptr/EPOSearch) with GLPK, by cvxpy 1.9.3, four digits.
CONFLICTING = np.array([[1, 2, 0], [-2, 1, 1], [0.5, -1, 3]], np.float32)
EPO = {
    "two, no descent of the second": (JACOBIAN, [3, 1], [0.5, 0.5], [-3.4461, 1, 1]),
    "two, balanced": (JACOBIAN, [1, 1], [0.5, 0.5], [0.5, 1, 1]),
    "two, of unequal preference": (JACOBIAN, [1, 3], [0.2, 0.8], [3.4054, 1, 1]),
    "three": (CONFLICTING, [2, 1, 0.5], [1 / 3] * 3, [1, 2, 0]),
    "three, balanced": (CONFLICTING, [1, 1, 1], [1 / 3] * 3, [0.6154, -0.3077, 2.3077]),
    "three, of unequal preference": (CONFLICTING, [0.5, 1, 4], [0.2, 0.3, 0.5], [0.5, -1, 3]),
}


@pytest.mark.parametrize("name", EPO)
def test_epo_equals_the_authors_code(name):
    jacobian, losses, preference, expected = EPO[name]
    tx = surgery.epo(np.array(preference, np.float32))
    update, state = tx.update(jacobian, tx.init(None), losses=np.array(losses, np.float32))
    assert state.weighting_state.converged
    np.testing.assert_allclose(update, expected, atol=1e-4)


# LibMOON 0.2.2, `solve_pmgda` with sigma = 0.95, five digits, by cvxopt. Its unit vectors are
# shorter by 1e-4 in the denominator.
PMGDA = {
    "two": (JACOBIAN, [3, 1], [0.5, 0.5], [-0.95002, 0.20598, 0.20598]),
    "three": (CONFLICTING, [2, 1, 0.5], [1 / 3] * 3, [0.29633, 0.72124, -0.55714]),
    "three, unequal": (CONFLICTING, [0.5, 1, 4], [0.2, 0.3, 0.5], [0.33253, -0.74294, 0.50454]),
}


@pytest.mark.parametrize("name", PMGDA)
def test_pmgda_corrects_as_libmoon_does(name):
    jacobian, losses, preference, expected = PMGDA[name]
    tx = surgery.pmgda(np.array(preference, np.float32))
    update, state = tx.update(jacobian, tx.init(None), losses=np.array(losses, np.float32))
    assert state.weighting_state.converged
    np.testing.assert_allclose(update, expected, atol=2e-3)


def test_krum_selects_torchjds_gradients():
    jacobian = np.array([[1, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]], np.float32)
    tx = surgery.krum(num_byzantine=1, num_selected=4)
    update, _ = tx.update(jacobian, tx.init(None))
    np.testing.assert_allclose(update, [1.25, 0.75, 1.5], rtol=1e-6)
