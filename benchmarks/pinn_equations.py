"""Four equations of physics that a network learns to solve, and their solutions.

An equation is what its mistakes are: numbers that are zero for its solution and for nothing else.
The mistakes inside its domain are the residuals of the differential equation; those on its edge,
of the boundary and the initial condition. Kovasznay's and Beltrami's flow have exact solutions.
Those of Burgers' and Schrödinger's equation are computed here and kept in a folder.

Domains, conditions and figures are those of ConFIG (Liu et al., ICLR 2025, arXiv 2408.11104), with
one exception: its code leaves the slope out of the periodic boundary of Schrödinger's equation.
"""

import dataclasses
import functools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.jet import jet

# Of the cached references: another number where other figures would be computed.
VERSION = 1

Mistakes = Callable[[Callable, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation on a box. A field is a function of a point (inputs,) to values (outputs,).

    `mistakes` gives, by the name of the loss, a function of a field and a point to numbers that
    are zero for the solution. The residual is meant inside; "boundary" and "initial" on the edge.
    """

    title: str
    inputs: tuple[str, ...]  # time, if there is one, is last
    outputs: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mistakes: dict[str, Mistakes]
    grid: tuple[int, ...]  # points per input to measure errors on
    solve: Callable[[list], np.ndarray]  # from the grid's axes to values (*grid, outputs)
    computed: bool = False  # and not a formula

    @property
    def dimensions(self):
        """Of space."""
        return len(self.inputs) - ("initial" in self.mistakes)

    @property
    def axes(self):
        each = zip(self.low, self.high, self.grid, strict=True)
        return [np.linspace(low, high, size) for low, high, size in each]


def along(point, axis):
    """The unit vector of one coordinate."""
    return jnp.zeros_like(point).at[axis].set(1)


def first(field, point, axis):
    """The first derivative along one coordinate."""
    return jax.jvp(field, (point,), (along(point, axis),))[1]


def taylor(field, point, axis):
    """Value, first and second derivative along one coordinate.

    In one pass: a derivative of a derivative would compute the first one twice, which took half as
    long again.
    """
    value, (slope, curvature) = jet(field, (point,), ((along(point, axis), jnp.zeros_like(point)),))
    return value, slope, curvature


def differs_from(solution):
    """The mistakes of a condition that gives the solution itself."""
    return lambda field, point: field(point) - solution(point)


# --- Kovasznay's flow: past a grid of cylinders, steady, in two dimensions

REYNOLDS = 40.0


def kovasznay_solution(point):
    x, y = point
    rate = REYNOLDS / 2 - np.sqrt(REYNOLDS**2 / 4 + 4 * np.pi**2)
    grows = jnp.exp(rate * x)
    return jnp.stack(
        [
            1 - grows * jnp.cos(2 * np.pi * y),
            rate / (2 * np.pi) * grows * jnp.sin(2 * np.pi * y),
            (1 - grows**2) / 2,
        ]
    )


def kovasznay_residual(field, point):
    """Two momenta, and continuity."""
    (u, v, _), by_x, by_xx = taylor(field, point, 0)
    _, by_y, by_yy = taylor(field, point, 1)
    diffusion = (by_xx + by_yy) / REYNOLDS
    momentum = u * by_x + v * by_y - diffusion
    return jnp.stack([momentum[0] + by_x[2], momentum[1] + by_y[2], by_x[0] + by_y[1]])


# --- Beltrami's flow: unsteady, in three dimensions (Ethier and Steinman 1994), Reynolds number 1


def beltrami_solution(point):
    """With both of its constants 1."""
    x, y, z, t = point
    decay = jnp.exp(-t)
    velocity = [
        -(jnp.exp(a) * jnp.sin(b + c) + jnp.exp(c) * jnp.cos(a + b)) * decay
        for a, b, c in ((x, y, z), (y, z, x), (z, x, y))
    ]
    pressure = -0.5 * sum(
        jnp.exp(2 * a) + 2 * jnp.sin(a + b) * jnp.cos(c + a) * jnp.exp(b + c)
        for a, b, c in ((x, y, z), (y, z, x), (z, x, y))
    )
    return jnp.stack([*velocity, pressure * decay**2])


def beltrami_residual(field, point):
    """Three momenta, and continuity."""
    by_t = first(field, point, 3)
    here, by_x, by_xx = taylor(field, point, 0)
    (_, by_y, by_yy), (_, by_z, by_zz) = (taylor(field, point, axis) for axis in (1, 2))
    diffusion = by_xx + by_yy + by_zz
    momentum = by_t + here[0] * by_x + here[1] * by_y + here[2] * by_z - diffusion
    pressure = jnp.stack([by_x[3], by_y[3], by_z[3]])
    return jnp.append(momentum[:3] + pressure, by_x[0] + by_y[1] + by_z[2])


# --- Burgers' equation, which grows a shock at x = 0

VISCOSITY = 0.01 / np.pi
NODES = 200  # of the quadrature


def burgers_residual(field, point):
    value, by_x, by_xx = taylor(field, point, 0)
    return first(field, point, 1) + value * by_x - VISCOSITY * by_xx


def burgers_initial(field, point):
    return field(point) + jnp.sin(np.pi * point[:1])


def solve_burgers(axes):
    """By the formula of Cole and Hopf, with the quadrature of Gauss and Hermite.

    As Basdevant et al. (1986): u is a ratio of two integrals over a Gaussian in the place at which
    a particle that is now at x has begun.
    """
    x, t = axes
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    begun = x[:, None, None] - np.sqrt(4 * VISCOSITY * t)[:, None] * nodes
    exponents = -np.cos(np.pi * begun) / (2 * np.pi * VISCOSITY)
    # The largest one is taken out of both integrals.
    shares = weights * np.exp(exponents - exponents.max(axis=-1, keepdims=True))
    values = -np.sum(shares * np.sin(np.pi * begun), axis=-1) / np.sum(shares, axis=-1)
    return values[..., None]


# --- Schrödinger's equation with a cubic term: a pulse that breathes

MODES = 512
SUBSTEPS = 300  # between two times of the grid


def schroedinger_residual(field, point):
    """Its real and its imaginary part."""
    (u, v), _, curvature = taylor(field, point, 0)
    by_t = first(field, point, 1)
    square = u**2 + v**2
    return jnp.stack(
        [-by_t[1] + curvature[0] / 2 + square * u, by_t[0] + curvature[1] / 2 + square * v]
    )


def schroedinger_boundary(field, point):
    """Value and slope are periodic. Of the point only the time counts."""
    ends = [point.at[0].set(x) for x in (-5.0, 5.0)]
    left, right = (jnp.concatenate([field(end), first(field, end, 0)]) for end in ends)
    return left - right


def schroedinger_initial(field, point):
    return field(point) - jnp.stack([2 / jnp.cosh(point[0]), jnp.zeros_like(point[0])])


def solve_schroedinger(axes):
    """By splitting: the cubic term is exact in space, the second derivative in Fourier modes."""
    x, t = axes
    width = x[-1] - x[0]
    places = x[0] + width * np.arange(MODES) / MODES
    modes = 2 * np.pi * np.fft.fftfreq(MODES, width / MODES)
    step = (t[1] - t[0]) / SUBSTEPS
    disperse = np.exp(-0.5j * modes**2 * step)
    pulse = (2 / np.cosh(places)).astype(complex)
    pulses = [pulse]
    for _ in t[1:]:
        for _ in range(SUBSTEPS):
            pulse = pulse * np.exp(0.5j * step * np.abs(pulse) ** 2)
            pulse = np.fft.ifft(disperse * np.fft.fft(pulse))
            pulse = pulse * np.exp(0.5j * step * np.abs(pulse) ** 2)
        pulses.append(pulse)
    # The value at any place is the sum of the modes there.
    waves = np.exp(1j * np.outer(x - x[0], modes)) / MODES
    values = waves @ np.fft.fft(np.array(pulses), axis=-1).T
    return np.stack([values.real, values.imag], axis=-1)


# --- All of them


def on_grid(solution, axes):
    """A formula's values."""
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    values = jax.vmap(solution)(points.reshape(-1, points.shape[-1]))
    return np.asarray(values).reshape(*points.shape[:-1], -1)


EQUATIONS = {
    "kovasznay": Equation(
        "Kovasznay's flow",
        ("x", "y"),
        ("u", "v", "p"),
        (-0.5, -0.5),
        (1.0, 1.5),
        {"residual": kovasznay_residual, "boundary": differs_from(kovasznay_solution)},
        (101, 101),
        functools.partial(on_grid, kovasznay_solution),
    ),
    "burgers": Equation(
        "Burgers' equation",
        ("x", "t"),
        ("u",),
        (-1.0, 0.0),
        (1.0, 1.0),
        {
            "residual": burgers_residual,
            "boundary": lambda field, point: field(point),
            "initial": burgers_initial,
        },
        (257, 51),
        solve_burgers,
        computed=True,
    ),
    "schroedinger": Equation(
        "Schrödinger's equation",
        ("x", "t"),
        ("real", "imaginary"),
        (-5.0, 0.0),
        (5.0, np.pi / 2),
        {
            "residual": schroedinger_residual,
            "boundary": schroedinger_boundary,
            "initial": schroedinger_initial,
        },
        (257, 51),
        solve_schroedinger,
        computed=True,
    ),
    "beltrami": Equation(
        "Beltrami's flow",
        ("x", "y", "z", "t"),
        ("u", "v", "w", "p"),
        (-1.0, -1.0, -1.0, 0.0),
        (1.0, 1.0, 1.0, 1.0),
        {
            "residual": beltrami_residual,
            "boundary": differs_from(beltrami_solution),
            "initial": differs_from(beltrami_solution),
        },
        (21, 21, 11, 5),
        functools.partial(on_grid, beltrami_solution),
    ),
}


def reference(name, folder):
    """The grid's points (N, inputs) and the solution's values there (N, outputs), in float32."""
    equation = EQUATIONS[name]
    points = np.stack(np.meshgrid(*equation.axes, indexing="ij"), axis=-1)
    values = cached(name, folder) if equation.computed else equation.solve(equation.axes)
    flat = (each.reshape(-1, each.shape[-1]).astype(np.float32) for each in (points, values))
    return tuple(flat)


def cached(name, folder):
    """The computed values on the grid. What is kept but cannot be read is computed anew."""
    equation = EQUATIONS[name]
    path = Path(folder) / f"{name}_{VERSION}.npz"
    shape = *equation.grid, len(equation.outputs)
    try:
        with np.load(path) as file:
            values = file["values"]
        if values.shape == shape:
            return values
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    values = equation.solve(equation.axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another run may be looking for it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as own:
        made = Path(own, path.name)
        np.savez_compressed(made, values=values)
        os.replace(made, path)
    return values


# --- Points to train on


def latin_hypercube(key, count, low, high):
    """(count, inputs) points, of which each of `count` equal slices of any input holds one."""
    place_key, *keys = jax.random.split(key, len(low) + 1)
    slices = jnp.stack([jax.random.permutation(each, count) for each in keys], axis=-1)
    places = (slices + jax.random.uniform(place_key, slices.shape)) / count
    low, high = (jnp.asarray(each, jnp.float32) for each in (low, high))
    return low[None] + places * (high - low)[None]


def sample(equation, key, counts):
    """Points for each loss, {loss: (count, inputs)}."""
    keys = dict(zip(counts, jax.random.split(key, len(counts)), strict=True))
    points = {
        loss: latin_hypercube(keys[loss], count, equation.low, equation.high)
        for loss, count in counts.items()
    }
    if "initial" in points:
        points["initial"] = points["initial"].at[:, -1].set(equation.low[-1])
    rows = np.arange(counts["boundary"])
    # The sides take turns.
    side, axis = rows % 2, rows // 2 % equation.dimensions
    ends = np.array([equation.low, equation.high], np.float32)[side, axis]
    points["boundary"] = points["boundary"].at[rows, axis].set(ends)
    return points


def losses(equation, field, points):
    """{loss: mean square of its mistakes}: residuals add up over the equations, as in ConFIG."""
    found = {}
    for loss, mistakes in equation.mistakes.items():
        each = jax.vmap(functools.partial(mistakes, field))(points[loss]) ** 2
        found[loss] = jnp.mean(jnp.sum(each, axis=-1) if loss == "residual" else each)
    return found
