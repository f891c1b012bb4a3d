"""A program of losses in two parts: what several losses share, and what serves one alone."""

from typing import NamedTuple

from optax_surgery.programs import flat, reach


class Port(NamedTuple):
    """A value that comes from the part that losses share into one that serves a loss alone."""

    number: int
    reach: reach.Reach


class Split(NamedTuple):
    """A program in two parts.

    Attributes:
      is_shared: for each equation whether it belongs to the first part.
      ports: what the second part takes from the first and is differentiated by.
      operands: for each equation of the second part and each of its operands the port that it
        reads, or None.
    """

    is_shared: list[bool]
    ports: list[Port]
    operands: dict[int, list[int | None]]


def split(
    program: flat.Program,
    losses: int,
    depends: set[int],
    reached: list[reach.Reach],
    uses: list[list[reach.Reach]],
) -> Split:
    """Cuts a program where its values begin to serve one loss alone."""
    needed: set[int] = set()  # by the shared part
    kinds: list[str] = []
    for index in reversed(range(len(program.equations))):
        equation = program.equations[index]
        active = [n for n in equation.outputs if n in depends and reached[n].union()]
        alone = all(reached[number].is_single() for number in active) and all(
            use.is_single()
            for number, use in zip(equation.inputs, uses[index], strict=True)
            if number in depends
        )
        is_needed = not needed.isdisjoint(equation.outputs)
        kind = "shared" if is_needed or (active and not alone) else "alone" if active else "passive"
        if kind == "shared":
            needed.update(number for number in equation.inputs if number is not None)
        kinds.append(kind)
    kinds.reverse()

    late: set[int] = set()
    ports: dict[Port, int] = {}
    operands: dict[int, list[int | None]] = {}

    def port(number, by_this_use):
        if number is None or number in late or number not in depends or not by_this_use.union():
            return None
        whole = reached[number]
        key = Port(number, whole if whole.is_single() else by_this_use)
        return ports.setdefault(key, len(ports))

    for index, equation in enumerate(program.equations):
        if kinds[index] == "shared" or (
            kinds[index] == "passive" and late.isdisjoint(equation.inputs)
        ):
            continue
        operands[index] = [
            port(number, use) for number, use in zip(equation.inputs, uses[index], strict=True)
        ]
        late.update(equation.outputs)
    port(losses, reached[losses])
    is_shared = [index not in operands for index in range(len(program.equations))]
    return Split(is_shared, list(ports), operands)
