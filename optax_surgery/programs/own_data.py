"""From the losses of tasks that have data of their own back to their parameters.

Each task runs the same program for its data, so that all of their derivatives together are one
backward pass. See `shared_data` for tasks that share their data, and `plan` for what both have in
common.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import trees
from optax_surgery.programs import flat, plan, reach


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
    ):
        """Runs the forward pass.

        Args:
          function: (params, args of one task) -> its loss, and what the user gets to see.
          params: pytree of parameters.
          args: those of all tasks, with a leading axis.
          chunk_size: how many tasks are run at once.
        """
        one_task = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), args)

        def as_vector(params, args):
            loss, value = function(params, args)
            return loss[None], value

        closed, self._shapes = jax.make_jaxpr(as_vector, return_shape=True)(params, one_task)
        self._program = program = flat.flatten(closed)
        self._structure = jax.tree.structure(params)
        self._params, self._args = jax.tree.leaves(params), jax.tree.leaves(args)
        self._leaves = program.inputs[: len(self._params)]
        self._like = [program.avals[leaf] for leaf in self._leaves]
        self._dtype = trees.gramian_dtype(self._like)
        self.num_tasks = self._args[0].shape[0]
        self._chunk_size, self._plan = chunk_size, None

        def run(params, args):
            values = self._inputs(args) | dict(zip(self._leaves, params, strict=True))
            flat.evaluate(program.equations, values)
            return self._returned(values)

        if chunk_size is not None:  # else the activations of all tasks would be held
            run = jax.checkpoint(run)
        self.losses, self._pull, self.value = jax.vjp(
            lambda params: self._map(lambda args: run(params, args), self._args),
            self._params,
            has_aux=True,
        )

    def _map(self, function: Callable[[Any], Any], operands: Any) -> Any:
        if self._chunk_size is not None:
            return lax.map(function, operands, batch_size=self._chunk_size)
        return jax.vmap(function)(operands)

    def _inputs(self, args):
        inputs = zip(self._program.inputs, [*self._params, *args], strict=True)
        return self._program.constants | dict(inputs)

    def _returned(self, values):
        returned = flat.returned(self._program, values)
        losses, value = jax.tree.unflatten(jax.tree.structure(self._shapes), returned)
        return losses[0], value

    def gramian(self, chosen: Sequence[bool]) -> tuple[jax.Array, plan.Kept | None]:
        """The (T, T) Gramian of the chosen parameters, and what is kept for `update`."""
        program, self._plan = self._program, self._planned()
        planned = self._plan
        zeros, taps = planned.zeros(), jnp.zeros((self.num_tasks, self.num_tasks), self._dtype)
        by_vjp = [self._params[place] for place in planned.by_vjp]

        def loss_of(by_vjp, zeros, tap, args):
            values = self._inputs(args)
            planned.evaluate(program.equations, values, by_vjp, zeros, tap)
            loss, _ = self._returned(values)
            return loss, {number: values[number] for number in planned.operands}

        back = jax.grad(loss_of, argnums=(0, 1, 2), has_aux=True)
        (found, cotangents, within), operands = self._map(
            lambda operands: back(by_vjp, zeros, *operands), (taps, self._args)
        )
        stacks = [
            None if way.name == "product" else plan.zeros_like(like, self.num_tasks)
            for way, like in zip(planned.ways, self._like, strict=True)
        ]
        for place, stack in zip(planned.by_vjp, found, strict=True):
            stacks[place] = stack
        kept = plan.Kept(planned.factors(operands, cotangents, owned=True), stacks)
        gramian = planned.gramian(within, chosen, kept)
        return gramian, kept if planned.keeps(self.num_tasks, owned=True) else None

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
        if kept is not None and self._plan is not None:
            return jax.tree.unflatten(self._structure, self._plan.update(weights, kept))
        found: list[Any] = [None] * len(self._like)
        for weight in {id(weight): weight for weight in weights}.values():
            (pulled,) = self._pull(weight.astype(self.losses.dtype))
            for place, each in enumerate(weights):
                if each is weight:
                    found[place] = pulled[place]
        return jax.tree.unflatten(self._structure, found)
