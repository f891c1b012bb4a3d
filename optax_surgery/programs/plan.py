"""Which way each parameter's inner products take, and from what came back to Gramian and update."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_surgery import trees
from optax_surgery.programs import flat, outer_products, reach, taps

# What may be kept from the pass for all tasks so that no second one is needed: so many times the
# parameters' bytes, or so many bytes.
_KEPT_TIMES = 4
_KEPT_BYTES = 2**26
_WITHIN = "a loop or a rematerialised part"


class Way(NamedTuple):
    """How the inner products of a parameter's T gradients are found.

    Attributes:
      name: "product" of what went in and what came back, "stack" of its T gradients, "slices"
        within a loop or a rematerialised part, "unused".
      uses: the products.
      why: in words.
    """

    name: Literal["product", "stack", "slices", "unused"]
    uses: tuple[outer_products.Use, ...]
    why: str


_watchers: list[Callable[[list[Way]], None]] = []


@contextlib.contextmanager
def watched(watcher: Callable[[list[Way]], None]) -> Iterator[None]:
    """Hands over the ways that are chosen meanwhile, one list for each program."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.pop()


def choose_ways(
    program: flat.Program,
    leaves: Sequence[int],
    reaches: Sequence[Sequence[reach.Reach]],
    is_shared: Sequence[bool],
    num_tasks: int,
    owned: bool,
) -> list[Way]:
    """Chooses for each parameter.

    Args:
      program: the losses as a program.
      leaves: the numbers of the parameters.
      reaches: what each operand of each equation reaches by this use.
      is_shared: for each equation whether it belongs to the part that losses share.
      num_tasks: T.
      owned: whether each task runs the program for data of its own.
    """
    chains: dict[int, tuple[int, list[flat.Equation]]] = {leaf: (leaf, []) for leaf in leaves}
    uses: dict[int, list[Any]] = {leaf: [] for leaf in leaves}
    for index, equation in enumerate(program.equations):
        for place, number in enumerate(equation.inputs):
            if number not in chains or not reaches[index][place].union():
                continue
            leaf, chain = chains[number]
            if is_shared[index] and taps.goes_on(equation):
                chains[equation.outputs[0]] = (leaf, [*chain, equation])
                continue
            use = None
            if is_shared[index]:
                use = outer_products.use_of(chain, equation, place)
                if use is None and place in taps.marked_places(equation):
                    use = _WITHIN
            uses[leaf].append(use or equation.name)
    for number in set(program.outputs[:1]) & set(chains):
        uses[chains[number][0]].append("the losses themselves")
    return [_way(uses[leaf], num_tasks, owned) for leaf in leaves]


def _way(uses: list[Any], num_tasks: int, owned: bool) -> Way:
    if not uses:
        return Way("unused", (), "no loss uses it")
    if uses == [_WITHIN]:
        return Way("slices", (), f"used within {_WITHIN}")
    others = {use for use in uses if isinstance(use, str)}
    if others:
        return Way("stack", (), f"used in {', '.join(sorted(others))}")
    if len(uses) > 1 and any(use.axes is None for use in uses):
        return Way("stack", (), f"used {len(uses)} times, reshaped")
    costs = [
        cost(uses, num_tasks, owned)
        for cost in (outer_products.product_cost, outer_products.stack_cost)
    ]
    sizes = ", ".join("{} x {} x {}".format(*use.size) for use in uses)
    why = f"{sizes}: {costs[0]:.2g} multiplications by products, {costs[1]:.2g} by its gradients"
    return Way("product" if costs[0] <= costs[1] else "stack", tuple(uses), why)


class Kept(NamedTuple):
    """What is left of the pass for all tasks, from which the update follows without another.

    Attributes:
      factors: for each parameter, of its products.
      stacks: for each parameter its T gradients, None where there are factors.
    """

    factors: list[list[outer_products.Factors]]
    stacks: list[Any]


class Plan:
    """A program with parameters, each of which goes its way.

    Attributes:
      ways: one for each parameter.
      by_vjp: which of the parameters the program is differentiated by; the others are multiplied,
        and what comes back is asked for at the products.
      operands: the numbers of what they are multiplied with.
      like: the parameters' shapes and dtypes.
    """

    def __init__(self, program: flat.Program, leaves: Sequence[int], ways: Sequence[Way]):
        self._program, self._leaves, self.ways = program, leaves, list(ways)
        self.like = [program.avals[leaf] for leaf in leaves]
        self.by_vjp = [
            place
            for place, (like, way) in enumerate(zip(self.like, ways, strict=True))
            if way.name in ("stack", "slices") and flat.is_differentiable(like)
        ]
        multiplied = [use for way in ways if way.name == "product" for use in way.uses]
        self._outputs = {use.output for use in multiplied}
        self.operands = {_operand(use) for use in multiplied}
        self._untapped = _chained(
            program, (leaf for leaf, way in zip(leaves, ways, strict=True) if way.name == "slices")
        )
        for watcher in _watchers:
            watcher(self.ways)

    def zeros(self) -> dict[int, jax.Array]:
        """Zeros to add to the products, whose derivatives are what comes back there."""
        avals = self._program.avals
        return {
            number: _zeros(avals[number].shape, avals[number].dtype, [avals[number]])
            for number in self._outputs
        }

    def tap(self, num_tasks: int, dtype: Any) -> jax.Array:
        """A tap for the parameters in loops and rematerialised parts."""
        return _zeros((num_tasks,), dtype, self.like)

    def evaluate(
        self,
        equations: Iterable[flat.Equation],
        values: dict[int, Any],
        by_vjp: Sequence[jax.Array],
        zeros: dict[int, jax.Array],
        tap: jax.Array,
    ) -> None:
        """Runs equations as `flat.evaluate` does, so that all that was planned comes back."""
        places = zip(self.by_vjp, by_vjp, strict=True)
        values.update((self._leaves[place], leaf) for place, leaf in places)

        def outputs_of(equation, operands):
            marks = [number in self._untapped for number in equation.inputs]
            if any(marks) and taps.marked_places(equation):
                return taps.run(equation, taps.operands_of(equation, values), marks, tap)
            found = flat.run_equation(equation, operands)
            if self._outputs.isdisjoint(equation.outputs):
                return found
            return [found[0] + zeros[equation.outputs[0]]]

        flat.evaluate(equations, values, outputs_of)

    def factors(
        self, operands: dict[int, Any], cotangents: dict[int, jax.Array], owned: bool
    ) -> list[list[outer_products.Factors]]:
        """What went in and what came back, for each parameter that is multiplied."""

        def of_use(use):
            x, d = operands[_operand(use)], cotangents[use.output]
            left = outer_products.left(use, flat.varying_over(x, flat.varying_axes(d)), owned)
            return outer_products.Factors(use, left, outer_products.right(use, d, stacked=True))

        return [
            [of_use(use) for use in way.uses] if way.name == "product" else [] for way in self.ways
        ]

    def gramian(self, within: jax.Array, chosen: Sequence[bool], kept: Kept) -> jax.Array:
        """The (T, T) Gramian of the chosen parameters; `within` is that of those in loops."""
        total, formed = within, []
        for take, way, factors, stack in zip(
            chosen, self.ways, kept.factors, kept.stacks, strict=True
        ):
            if take and way.name == "product":
                total = total + outer_products.gramian(factors).astype(total.dtype)
            elif take and way.name == "stack":
                formed.append(stack)
        return total + trees.gramian(formed).astype(total.dtype) if formed else total

    def update(self, weights: Sequence[jax.Array], kept: Kept) -> list[Any]:
        """For each parameter the weighted sum of its task gradients."""
        return [
            _combined(weight, factors, stack, like)
            for weight, factors, stack, like in zip(
                weights, kept.factors, kept.stacks, self.like, strict=True
            )
        ]

    def gradient(
        self, place: int, operands: dict[int, Any], cotangents: dict[int, jax.Array]
    ) -> list[jax.Array]:
        """The parts of one gradient of a parameter that is multiplied."""

        def part(use):
            x, d = operands[_operand(use)], cotangents[use.output]
            x = outer_products.left(use, flat.varying_over(x, flat.varying_axes(d)))
            return outer_products.gradient(use, x, outer_products.right(use, d), self.like[place])

        return [part(use) for use in self.ways[place].uses]

    def keeps(self, num_tasks: int, owned: bool) -> bool:
        """Whether what a second pass would need is small enough to be kept."""
        if any(way.name == "slices" for way in self.ways):
            return False
        size = plain = 0
        for like, way in zip(self.like, self.ways, strict=True):
            itemsize = like.dtype.itemsize
            plain += like.size * itemsize
            if way.name == "product":
                numbers = [outer_products.kept_numbers(use, num_tasks, owned) for use in way.uses]
                size += sum(numbers) * itemsize
            elif way.name == "stack":
                size += like.size * num_tasks * itemsize
        return size <= max(_KEPT_TIMES * plain, _KEPT_BYTES)


def zeros_like(like: Any, num_tasks: int | None = None) -> Any:
    """The gradient, or the T gradients, of what reaches no loss."""
    shape = like.shape if num_tasks is None else (num_tasks, *like.shape)
    if not flat.is_differentiable(like):
        return np.zeros(shape, jax.dtypes.float0)
    return jnp.zeros(shape, like.dtype)


def _zeros(shape: tuple[int, ...], dtype: Any, avals: Sequence[Any]) -> jax.Array:
    axes = frozenset[str]().union(*map(flat.varying_axes, avals))
    return flat.varying_over(jnp.zeros(shape, dtype), axes)


def _operand(use: outer_products.Use) -> int:
    """The number of what a parameter is multiplied with."""
    number = use.equation.inputs[1 - use.place]
    assert number is not None
    return number


def _chained(program: flat.Program, leaves: Iterable[int]) -> set[int]:
    """The values that are these parameters, cast, reshaped or transposed."""
    found = set(leaves)
    for equation in program.equations:
        if taps.goes_on(equation) and equation.inputs[0] in found:
            found.update(equation.outputs)
    return found


def _combined(
    weights: jax.Array, factors: list[outer_products.Factors], stack: Any, like: Any
) -> Any:
    if not factors:
        is_real = flat.is_differentiable(like)
        return trees.combine(weights, stack, weights != 0) if is_real else zeros_like(like)
    found = [outer_products.weighted_gradient(weights, each, like) for each in factors]
    return sum(found[1:], found[0])
