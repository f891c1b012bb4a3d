"""From the losses of tasks that have data of their own back to their parameters.

Each task runs the same program for its data, so that all of their derivatives together are one
backward pass. See `shared_data` for tasks that share their data, and `plan` for what both have in
common.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_surgery import core, trees
from optax_surgery.programs import flat, plan, reach
from optax_surgery.programs.over_tasks import OverTasks


class Backward:
    """The losses of all tasks, and the ways back from them.

    Attributes:
      losses: (T,).
      value: what the user's function returned, stacked.
      num_tasks: T.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], tuple[jax.Array, Any]],
        params: Any,
        args: Any,
        chunk_size: int | None = None,
        spmd_axis_name: Any = None,
    ):
        """Runs the forward pass.

        Args:
          function: (params, args of one task) -> its loss, and what the user gets to see.
          params: pytree of parameters.
          args: those of all tasks, with a leading axis.
          chunk_size: how many tasks are run at once.
          spmd_axis_name: the axes of a mesh over which the tasks lie.
        """
        leaves = jax.tree.leaves(params)
        self._over = over = OverTasks(leaves, args, chunk_size, spmd_axis_name)
        one_task = jax.tree.map(over.one_task, args)
        params = jax.tree.unflatten(jax.tree.structure(params), over.params)

        def as_vector(params, args):
            loss, value = function(params, args)
            return loss[None], value

        traced = jax.make_jaxpr(as_vector, return_shape=True)
        self._closed, self._shapes = traced(params, one_task)
        self._program = program = flat.flatten(self._closed)
        self._structure = jax.tree.structure(params)
        self._params, self._args = over.params, jax.tree.leaves(args)
        self._leaves = program.inputs[: len(self._params)]
        self._like = [program.avals[leaf] for leaf in self._leaves]
        self._dtype = trees.gramian_dtype(self._like)
        self.num_tasks = over.num_tasks
        self._chunk_size = chunk_size
        self._plan = self._planned()
        self.losses, self._pull, self.value = self._run(self._args)

    def _run(self, args):
        """The losses for these data, and the way back from them to the parameters."""

        def run(params, args):
            values = self._inputs(args) | dict(zip(self._leaves, params, strict=True))
            flat.evaluate(self._program.equations, values)
            return self._returned(values)

        if self._chunk_size is not None:  # else the activations of all tasks would be held
            run = jax.checkpoint(run)

        def run_all(params):
            losses, value = self._over.map(lambda args: run(params, args), args)
            return self._over.whole(losses), value

        return jax.vjp(run_all, self._params, has_aux=True)

    def _inputs(self, args):
        inputs = zip(self._program.inputs, [*self._params, *args], strict=True)
        return self._program.constants | dict(inputs)

    def _returned(self, values):
        returned = flat.returned(self._program, values)
        losses, value = jax.tree.unflatten(jax.tree.structure(self._shapes), returned)
        return losses[0], value

    def gramian(self, chosen: Sequence[bool]) -> tuple[jax.Array, plan.Kept | None]:
        """The (T, T) Gramian of the chosen parameters, and what is kept for `update`."""
        within, kept = self._pull_tasks(self._plan)
        found = self._plan.gramian(within, chosen, kept)
        return found, kept if self._plan.keeps(self.num_tasks, owned=True) else None

    def differences(self, chosen: Sequence[bool]) -> Callable[..., trees.Differences]:
        """Finds the differences of the gradients, of their stack.

        Of what went in and came back for tasks with data of their own, there is no difference.
        """
        ways = [
            way if way.name == "unused" else plan.Way("stack", (), "their differences are wanted")
            for way in self._plan.ways
        ]
        planned = plan.Plan(self._program, self._leaves, ways)
        _, kept = self._pull_tasks(planned)
        stacks = [kept.stacks[place] for place in planned.by_vjp if chosen[place]]

        def find(base: jax.Array, factors: jax.Array | None = None) -> trees.Differences:
            return trees.differences(stacks, base, factors=factors)

        return find

    def _pull_tasks(self, planned):
        """What is in loops, and what a pass for all tasks leaves of the rest."""
        program = self._program
        zeros, tap = planned.zeros(), planned.tap(self.num_tasks, self._dtype)
        taps = jnp.broadcast_to(tap, (self.num_tasks, self.num_tasks))
        by_vjp = [self._params[place] for place in planned.by_vjp]

        def loss_of(by_vjp, zeros, tap, args):
            values = self._inputs(args)
            planned.evaluate(program.equations, values, by_vjp, zeros, tap)
            loss, _ = self._returned(values)
            return loss, {number: values[number] for number in planned.operands}

        back = jax.grad(loss_of, argnums=(0, 1, 2), has_aux=True)
        (found, cotangents, within), operands = self._over.map(
            lambda operands: back(by_vjp, zeros, *operands), (taps, self._args)
        )
        operands, cotangents, within = self._over.whole((operands, cotangents, within))
        stacks = [
            None if way.name == "product" else plan.zeros_like(like, self.num_tasks)
            for way, like in zip(planned.ways, self._like, strict=True)
        ]
        for place, stack in zip(planned.by_vjp, found, strict=True):
            stacks[place] = stack
        stacks = self._over.stacked(stacks, lambda: self._closed)
        kept = plan.Kept(planned.factors(operands, cotangents, owned=True), stacks)
        return within, kept

    def _planned(self) -> plan.Plan:
        program, losses = self._program, flat.as_number(self._program, 0)
        _, uses = reach.reached(program, losses)
        everything = [True] * len(program.equations)
        ways = plan.choose_ways(program, self._leaves, uses, everything, self.num_tasks, owned=True)
        if self._chunk_size is not None:  # a tap wants all tasks at once
            ways = [way._replace(name="stack") if way.name == "slices" else way for way in ways]
        return plan.Plan(program, self._leaves, ways)

    def update(self, weights: Sequence[jax.Array], kept: plan.Kept | None = None) -> Any:
        """The weighted sum of the task gradients, with (T,) weights of each parameter."""
        if kept is not None:
            return self._tree(self._plan.update(weights, kept))
        found: list[Any] = [None] * len(self._like)
        for weight in {id(weight): weight for weight in weights}.values():
            pulled = self._pulled(weight.astype(self.losses.dtype))
            for place, each in enumerate(weights):
                if each is weight:
                    found[place] = pulled[place]
        return self._tree(found)

    def _tree(self, grads):
        return jax.tree.unflatten(self._structure, self._over.as_params(grads))

    def _pulled(self, weights: jax.Array) -> list[Any]:
        """The weighted sum of the task gradients, one of all parameters.

        A task that has no weight takes no part, also if its gradient is not a number: then those
        that have one are run again, with the data of one of them in its place.
        """

        def among_others():
            has_weight = weights != 0
            tasks = jnp.where(has_weight, jnp.arange(self.num_tasks), jnp.argmax(has_weight))
            args = [jnp.take(leaf, tasks, axis=0) for leaf in self._over.whole(self._args)]
            _, pull, _ = self._run(args)
            return [jnp.where(jnp.any(has_weight), leaf, 0) for leaf in real(pull(weights)[0])]

        def real(leaves):
            return [leaf for leaf in leaves if flat.is_differentiable(leaf)]

        (found,) = self._pull(weights)
        numbers = real(found)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in numbers]
        sound = jnp.all(weights != 0) | jnp.all(jnp.stack(finite))
        chosen = iter(core.branch(trees.everywhere(sound), lambda: numbers, among_others))
        return [next(chosen) if flat.is_differentiable(leaf) else leaf for leaf in found]
