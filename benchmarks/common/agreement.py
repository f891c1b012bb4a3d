"""How the gradients of tasks agree, beside a control: one task's gradients on two batches.

The control is what the noise of a batch leaves of 1. A cosine between tasks near zero says little
unless the control is far from it.
"""

import jax
import numpy as np

import optax_surgery as surgery


def disjoint_batches(key, size, batch_size):
    """Positions (2, batch) of two batches of `size` examples, or of their halves if too few."""
    batch_size = min(batch_size, size // 2)
    return jax.random.permutation(key, size)[: 2 * batch_size].reshape(2, -1)


def cosines_on_two_batches(task_grads):
    """(T, T) cosines, of task i on the one batch and task j on the other; the diagonal controls.

    Args:
      task_grads: leaves (2, T, *shape), the gradients of T tasks on two disjoint batches.
    """
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), task_grads)
    cosines = surgery.cosine_similarities(surgery.gramian(stacked))
    num_tasks = len(cosines) // 2
    return cosines[:num_tasks, num_tasks:]


def split(cosines):
    """From (..., T, T) to those between two tasks, (..., T (T - 1)), and the control, (..., T)."""
    cosines = np.asarray(cosines, float)
    between = cosines[..., ~np.eye(cosines.shape[-1], dtype=bool)]
    return between, np.diagonal(cosines, axis1=-2, axis2=-1)


def in_words(method, cosines):
    """A sentence on the (..., T, T) cosines of training with a method."""
    between, same = split(cosines)
    return (
        f"Trained with {method}, {np.mean(between < 0):.0%} of the pairs of tasks conflict, "
        f"{np.mean(between < -0.1):.0%} by more than -0.1; the mean cosine is "
        f"{between.mean():+.2f}, of one task on two batches {same.mean():+.2f}."
    )
