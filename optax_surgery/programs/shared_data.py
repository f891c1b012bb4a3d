"""From the losses of several tasks back to their parameters, in one pass for all of them.

The program is cut in two. What serves one loss alone, or holds a column for each, is differentiated
once, by the sum of the losses: what does not reach a loss takes no part in its derivative, however
undefined, and tasks with data of their own cost that data only. The rest, which several losses
share, is gone through with all tasks side by side.

Where the Gramian is wanted, no parameter's T gradients need outlive it, and those of a matrix need
not be formed: see `plan`, `outer_products`, and `taps` for what lies within loops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_surgery import trees
from optax_surgery.programs import flat, plan, reach
from optax_surgery.programs.over_tasks import as_param
from optax_surgery.programs.split import split


class Backward:
    """One forward pass of all losses, and the ways back from them.

    Attributes:
      losses: (T,).
      value: what the user's function returned.
      num_tasks: T.
    """

    def __init__(
        self,
        function: Callable[[Any], tuple[jax.Array, Any]],
        params: Any,
        with_products: bool = True,
    ):
        """Runs the forward pass.

        Args:
          function: params -> (T,) losses, and what the user gets to see.
          params: pytree of parameters.
          with_products: whether a Gramian may be wanted, and not the stack of all gradients.
        """
        self._again = lambda: Backward(function, params, with_products=False)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(params)
        self._program = program = flat.flatten(closed)
        self._structure, self._leaves = jax.tree.structure(params), program.inputs
        self._losses = flat.as_number(program, 0)
        (self.num_tasks,) = program.avals[self._losses].shape
        leaves = zip(program.inputs, jax.tree.leaves(params), strict=True)
        self._values = program.constants | dict(leaves)

        reached, uses = reach.reached(program, self._losses)
        depends = flat.dependents(program, self._leaves)
        self._split = split(program, self._losses, depends, reached, uses)
        ways = [plan.Way("stack", (), "")] * len(self._leaves)
        if with_products:
            is_shared = self._split.is_shared
            ways = plan.choose_ways(
                program, self._leaves, uses, is_shared, self.num_tasks, owned=False
            )
        self._plan = plan.Plan(program, self._leaves, ways)
        self._like = self._plan.like
        self._dtype = trees.gramian_dtype(self._like)
        ports = [port.number for port in self._split.ports]
        self._crossings = list(dict.fromkeys(n for n in ports if n not in self._leaves))
        returned = self._run_alone(self._run_shared())
        _, self.value = jax.tree.unflatten(jax.tree.structure(shapes), returned)

    # Forward

    def _run_shared(self) -> list[jax.Array]:
        """Runs what several losses share, up to what each takes from it."""
        marked = zip(self._program.equations, self._split.is_shared, strict=True)
        shared = [equation for equation, is_shared in marked if is_shared]
        written = {number for equation in shared for number in equation.outputs}
        handed = written & self._read_later()

        def run(by_vjp, zeros, tap):
            values = dict(self._values)
            self._plan.evaluate(shared, values, by_vjp, zeros, tap)
            crossing = [values[number] for number in self._crossings]
            return crossing, {number: values[number] for number in handed}

        by_vjp = [self._values[self._leaves[place]] for place in self._plan.by_vjp]
        tap = self._plan.tap(self.num_tasks, self._dtype)
        crossing, self._pull, found = jax.vjp(run, by_vjp, self._plan.zeros(), tap, has_aux=True)
        self._values |= found
        return crossing

    def _read_later(self) -> set[int]:
        """The values that are needed after the shared part."""
        alone = [self._program.equations[index] for index in self._split.operands]
        read = {n for equation in alone for n in equation.inputs if n is not None}
        returned = {n for n in self._program.outputs if isinstance(n, int)}
        return read | returned | self._plan.operands | {self._losses}

    def _run_alone(self, crossing: list[jax.Array]) -> list[Any]:
        """Runs what serves one loss alone, and goes back through it, for all losses at once."""
        program, ports = self._program, self._split.ports
        crossed = dict(zip(self._crossings, crossing, strict=True))
        copies = [(self._values | crossed)[port.number] for port in ports]
        of_losses = [place for place, port in enumerate(ports) if port.number == self._losses]

        def run(copies):
            values = dict(self._values)
            for index, places in self._split.operands.items():
                equation = program.equations[index]
                operands = [
                    values[number] if place is None else copies[place]
                    for number, place in zip(equation.inputs, places, strict=True)
                    if number is not None
                ]
                found = flat.run_equation(equation, operands)
                values.update(zip(equation.outputs, found, strict=True))
            losses = copies[of_losses[0]] if of_losses else values[self._losses]
            return losses, flat.returned(program, values)

        self.losses, pull, returned = jax.vjp(run, copies, has_aux=True)
        # For each port what comes back of the one loss that it serves.
        (self._came_back,) = pull(lax.full_like(self.losses, 1))
        return returned

    # Back

    def stacks(self, chunk_size: int | None = None) -> Any:
        """The gradients of all tasks, leaves `(T, *param.shape)`.

        Args:
          chunk_size: how many tasks go through the shared part at once.
        """
        rows = self._summed(self._on_rows)
        by_vjp, _, _ = self._pull_tasks(chunk_size, rows)
        return jax.tree.unflatten(self._structure, self._stacks(by_vjp, rows))

    def gramian(self, chosen: Sequence[bool]) -> tuple[jax.Array, plan.Kept | None]:
        """The (T, T) Gramian of the chosen parameters, and what is kept for `update`."""
        rows = self._summed(self._on_rows)
        by_vjp, cotangents, within = self._pull_tasks(None, rows)
        factors = self._plan.factors(self._values, cotangents, owned=False)
        kept = plan.Kept(factors, self._stacks(by_vjp, rows))
        found = self._plan.gramian(within, chosen, kept)
        return found, kept if self._plan.keeps(self.num_tasks, owned=False) else None

    def differences(self, chosen: Sequence[bool]) -> Callable[..., trees.Differences]:
        """Finds the differences of the gradients, of their stack.

        Products of what went in hold what the gradients have in common, and hide the rest.
        """
        stacks = jax.tree.leaves(self._again().stacks())
        wanted = [
            stack
            for take, stack, like in zip(chosen, stacks, self._like, strict=True)
            if take and flat.is_differentiable(like)
        ]

        def find(base: jax.Array, factors: jax.Array | None = None) -> trees.Differences:
            return trees.differences(wanted, base, factors=factors)

        return find

    def update(self, weights: Sequence[jax.Array], kept: plan.Kept | None = None) -> Any:
        """The weighted sum of the task gradients, with (T,) weights of each parameter."""
        if kept is not None:
            return jax.tree.unflatten(self._structure, self._plan.update(weights, kept))
        found: list[Any] = [None] * len(self._like)
        for weight in {id(weight): weight for weight in weights}.values():
            sums = self._summed(lambda back, reached, w=weight: _weighted(back, reached, w))
            pulled = self._pull(self._crossing(sums)) if self._crossings else ([], {}, None)
            for place, each in enumerate(weights):
                if each is weight:
                    found[place] = self._gradient(place, sums, pulled[0], pulled[1])
        return jax.tree.unflatten(self._structure, found)

    def _gradient(self, place, sums, by_vjp, cotangents):
        """The gradient of one parameter, from what came back to it."""
        leaf = self._leaves[place]
        parts = [sums[leaf]] if leaf in sums else []
        if self._plan.ways[place].name == "product":
            parts += self._plan.gradient(place, self._values, cotangents)
        elif place in self._plan.by_vjp and self._crossings:
            parts.append(by_vjp[self._plan.by_vjp.index(place)])
        return sum(parts[1:], parts[0]) if parts else plan.zeros_like(self._like[place])

    def _stacks(self, by_vjp, sums):
        """For each parameter its T gradients, None for those that are multiplied."""
        stacks: list[Any] = []
        for place, (leaf, way) in enumerate(zip(self._leaves, self._plan.ways, strict=True)):
            parts = [sums[leaf]] if leaf in sums else []
            if place in self._plan.by_vjp and self._crossings:
                parts.append(by_vjp[self._plan.by_vjp.index(place)])
            if way.name == "product":
                stacks.append(None)
            else:
                zeros = plan.zeros_like(self._like[place], self.num_tasks)
                stack = sum(parts[1:], parts[0]) if parts else zeros
                stacks.append(self._where_it_lies(stack, leaf))
        return stacks

    def _where_it_lies(self, stack, leaf):
        if not flat.is_differentiable(self._program.avals[leaf]):
            return stack
        return as_param(stack, self._values[leaf])

    def _pull_tasks(self, chunk_size, sums):
        """Takes all tasks through the shared part, side by side."""
        if not self._crossings:
            return [], {}, jnp.zeros((self.num_tasks, self.num_tasks), self._dtype)
        rows = self._crossing(sums)
        if chunk_size is None:
            return jax.vmap(self._pull)(rows)
        return lax.map(self._pull, rows, batch_size=chunk_size)

    def _crossing(self, sums):
        return [sums[number] for number in self._crossings]

    def _summed(self, share):
        """What comes back for each value that the ports read, summed over them."""
        sums: dict[int, jax.Array] = {}
        for port, back in zip(self._split.ports, self._came_back, strict=True):
            part = share(back, port.reach)
            sums[port.number] = sums[port.number] + part if port.number in sums else part
        return sums

    def _on_rows(self, back: jax.Array, reached: reach.Reach) -> jax.Array:
        """What came back, as (T, ...) with that of each loss in its own row."""
        tasks = range(self.num_tasks)
        is_of = np.array([[task in losses for losses in reached.sets] for task in tasks])
        shape = [self.num_tasks] + [1] * back.ndim
        if reached.axis is not None:
            shape[reached.axis + 1] = len(reached.sets)
        return jnp.where(is_of.reshape(shape), back[None], jnp.zeros((), back.dtype))


def _weighted(back: jax.Array, reached: reach.Reach, weights: jax.Array) -> jax.Array:
    """What came back, times the weight of the loss that it is of."""
    tasks = np.array([next(iter(losses), -1) for losses in reached.sets])
    factors = jnp.where(tasks >= 0, weights[np.maximum(tasks, 0)], 0)
    shape = [1] * back.ndim
    if reached.axis is not None:
        shape[reached.axis] = tasks.size
    factors = factors.reshape(shape).astype(back.dtype)
    # What has no weight takes no part, also if it is not a number.
    return jnp.where(factors == 0, jnp.zeros((), back.dtype), back * factors)
