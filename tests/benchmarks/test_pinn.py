"""The benchmark of equations: solutions against second ways, and a tiny run of it all."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

from benchmarks import pinn, pinn_equations
from benchmarks.common.progress import Progress
from benchmarks.pinn_equations import EQUATIONS

ROOT = Path(__file__).parents[2]
COUNTS = {"residual": 40, "boundary": 24, "initial": 16}


def some_points(equation, seed=0):
    counts = {loss: COUNTS[loss] for loss in equation.mistakes}
    return pinn_equations.sample(equation, jax.random.key(seed), counts)


# --- Equations and their solutions


@pytest.mark.parametrize("flow", ["kovasznay", "beltrami"])
def test_losses_of_an_exact_solution_are_zero(flow):
    solution = getattr(pinn_equations, f"{flow}_solution")
    with jax.enable_x64(True):
        points = jax.tree.map(lambda each: each.astype(jnp.float64), some_points(EQUATIONS[flow]))
        losses = pinn_equations.losses(EQUATIONS[flow], solution, points)
        wrong = pinn_equations.losses(EQUATIONS[flow], lambda x: 1.01 * solution(x), points)
        assert set(losses) == set(EQUATIONS[flow].mistakes)
        assert max(losses.values()) < 1e-24
        assert min(wrong.values()) > 1e-6


def test_burgers_residual_is_that_of_a_travelling_wave():
    height, speed = 0.6, 0.2

    def wave(point):
        steepness = height / (2 * pinn_equations.VISCOSITY)
        return speed - height * jnp.tanh(steepness * (point[:1] - speed * point[1]))

    with jax.enable_x64(True):
        for x in (0.09, 0.1, 0.12):
            residual = pinn_equations.burgers_residual(wave, jnp.array([x, 0.5]))
            np.testing.assert_allclose(residual, 0, atol=1e-10)


def test_schroedinger_residual_is_that_of_a_soliton():
    def soliton(point):
        turn = jnp.stack([jnp.cos(point[1] / 2), jnp.sin(point[1] / 2)])
        return turn / jnp.cosh(point[0])

    with jax.enable_x64(True):
        for x in (-1.0, 0.3, 2.0):
            residual = pinn_equations.schroedinger_residual(soliton, jnp.array([x, 0.7]))
            np.testing.assert_allclose(residual, 0, atol=1e-14)
    even = pinn_equations.schroedinger_boundary(lambda x: jnp.cos(x[:1]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(even, [0, 2 * np.sin(5)], atol=1e-5)  # value, slope


def burgers_by_modes(x, times, size=1024, steps=5000):
    """Runge and Kutta's method, with the diffusion exact in Fourier modes."""
    modes = 2j * np.pi * np.fft.rfftfreq(size, 2 / size)
    places = -1 + 2 * np.arange(size) / size
    step = 1 / steps
    half = np.exp(pinn_equations.VISCOSITY * modes**2 * step / 2)

    def slope(waves):
        return -0.5 * modes * np.fft.rfft(np.fft.irfft(waves) ** 2)

    waves, found = np.fft.rfft(-np.sin(np.pi * places)), []
    for n in range(steps + 1):
        if np.any(np.isclose(times, n * step)):
            found.append(np.exp(np.outer(x + 1, modes)) @ waves * 2 / size)
        first = slope(waves)
        second = slope(half * (waves + step / 2 * first))
        third = slope(half * waves + step / 2 * second)
        fourth = slope(half * (half * waves + step * third))
        waves = half * (half * (waves + step / 6 * first) + step / 3 * (second + third))
        waves = waves + step / 6 * fourth
    return np.real(found).T


def test_burgers_solution_agrees_with_a_spectral_method():
    x, times = np.linspace(-1, 1, 41), np.array([0, 0.2, 0.4, 1.0])
    found = pinn_equations.solve_burgers([x, times])[..., 0]
    np.testing.assert_allclose(found[:, 0], -np.sin(np.pi * x), atol=1e-12)
    np.testing.assert_allclose(found, burgers_by_modes(x, times), atol=1e-6)


def test_schroedinger_solution_agrees_with_an_adaptive_solver():
    size, axes = 256, EQUATIONS["schroedinger"].axes
    places = -5 + 10 * np.arange(size) / size
    squares = (2 * np.pi * np.fft.fftfreq(size, 10 / size)) ** 2

    def slope(_, pulse):
        curvature = np.fft.ifft(-squares * np.fft.fft(pulse))
        return 1j * (curvature / 2 + np.abs(pulse) ** 2 * pulse)

    begun = (2 / np.cosh(places)).astype(complex)
    # A longer step is not stable, and may overflow before it is refused.
    limits = {"max_step": 5e-4, "rtol": 1e-8, "atol": 1e-8}
    solved = solve_ivp(slope, (0, np.pi / 2), begun, "DOP853", axes[1][::10], **limits)
    found = pinn_equations.solve_schroedinger([np.append(places, 5.0), axes[1]])[:-1, ::10]
    found = found[..., 0] + 1j * found[..., 1]
    # The slope of 2 sech jumps at the ends, and modes that the one has and the other has not tell.
    np.testing.assert_allclose(found, solved.y, atol=2e-3)
    middle = np.abs(places) < 3
    np.testing.assert_allclose(found[middle], solved.y[middle], atol=2e-4)


def test_points_are_stratified_and_lie_where_they_should():
    equation = EQUATIONS["beltrami"]
    points = some_points(equation)
    assert {loss: len(each) for loss, each in points.items()} == COUNTS
    inside = np.asarray(points["residual"])
    for column, low, high in zip(inside.T, equation.low, equation.high, strict=True):
        slices = np.floor((column - low) / (high - low) * len(column))
        np.testing.assert_array_equal(np.sort(slices), np.arange(len(column)))
    np.testing.assert_array_equal(points["initial"][:, -1], 0)
    boundary = np.asarray(points["boundary"])[:, :3]
    on_side = np.abs(boundary) == 1
    np.testing.assert_array_equal(on_side.sum(axis=1), 1)
    sides = [np.sum(boundary[:, axis] == end) for axis in range(3) for end in (-1, 1)]
    assert sides == [4] * 6
    assert not np.allclose(inside, some_points(equation, seed=1)["residual"])


def test_a_computed_solution_is_kept(tmp_path, monkeypatch):
    points, values = pinn_equations.reference("burgers", tmp_path / "deep")
    (path,) = (tmp_path / "deep").iterdir()
    size = np.prod(EQUATIONS["burgers"].grid)
    assert points.shape == (size, 2)
    assert values.shape == (size, 1)
    solve = EQUATIONS["burgers"].solve
    never = dataclasses.replace(EQUATIONS["burgers"], solve=None)
    monkeypatch.setitem(EQUATIONS, "burgers", never)
    again = pinn_equations.reference("burgers", tmp_path / "deep")[1]
    np.testing.assert_array_equal(again, values)
    path.write_bytes(b"half a fi")
    monkeypatch.setitem(EQUATIONS, "burgers", dataclasses.replace(never, solve=solve))
    again = pinn_equations.reference("burgers", tmp_path / "deep")[1]
    np.testing.assert_array_equal(again, values)


# --- Training


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    lane = pinn.Lane(0, 2.0, None, jnp.asarray(1000))
    found = [float(pinn.learning_rate(jnp.asarray(step), lane)) for step in (0, 9, 10, 505, 1000)]
    np.testing.assert_allclose(found, [0.2, 2.0, 2.0, 1.1, 0.2], rtol=1e-5)


@pytest.mark.parametrize("method", pinn.CHOICES)
def test_every_method_makes_an_update(method):
    lane = pinn.Lane(0, 1e-3, None, jnp.asarray(100))
    optimiser = pinn.make_optimiser(method, 2, lane)
    params = {"w": jnp.zeros(3)}
    grads = {"w": jnp.array([[1.0, 0, 0], [-1, 2, 0]])}
    losses = {"boundary": jnp.array(2.0), "residual": jnp.array(1.0)}
    updates, _ = optimiser.update(grads, optimiser.init(params), params, losses=losses)
    assert np.all(np.isfinite(updates["w"]))
    assert np.any(updates["w"] != 0)


def test_both_conditions_are_one_loss_where_that_is_asked():
    equation = EQUATIONS["burgers"]
    three = pinn.Config(width=4, depth=1, inside=8, boundary=4, initial=4)
    two = dataclasses.replace(three, losses="two")
    params = pinn.make_network(three, equation).init(jax.random.key(0), jnp.zeros(2))
    points = pinn.sample(three, equation, jax.random.key(1))
    apart, joint = (pinn.losses_of(config, equation, params, points) for config in (three, two))
    assert pinn.tasks_of(three, equation) == tuple(sorted(apart))
    assert pinn.tasks_of(two, equation) == tuple(sorted(joint))
    np.testing.assert_allclose(joint["conditions"], (apart["boundary"] + apart["initial"]) / 2)
    assert pinn.tasks_of(two, EQUATIONS["kovasznay"]) == ("boundary", "residual")
    weights = pinn.candidates("linear", ("boundary", "initial", "residual"), three)
    np.testing.assert_allclose(weights[:, 0], three.condition_weights)
    np.testing.assert_allclose(weights[:, 2], 1)


# --- What it finds


def made_up(logs, tasks=2):
    """Results with these logarithms of errors at the end, (seeds,)."""
    errors = 10.0 ** np.stack([np.zeros_like(logs), logs], axis=1)
    return {
        "mse": errors,
        "losses": np.repeat(errors[..., None], tasks, axis=-1),
        "cosines": np.full((*errors.shape, tasks, tasks), -0.2),
        "learning_rate": 1e-3,
        "condition_weight": 10.0,
        "seconds_per_step": 0.01,
        "field": np.ones(EQUATIONS["kovasznay"].grid),
    }


def test_methods_are_compared_by_the_logarithms_of_their_errors():
    logs = np.array([-2.0, -2.5, -3.0, -2.2])
    results = {
        "sum": made_up(logs),
        "linear": made_up(logs - 0.5 + np.array([0.01, 0, -0.01, 0])),
        "pcgrad": made_up(logs + np.array([0.1, -0.1, 0.05, -0.06])),
        "nash_mtl": made_up(np.array([np.nan, -9, -9, -9])),
    }
    rows = pinn.compare(results)
    assert list(rows) == ["linear", "pcgrad", "sum", "nash_mtl"]
    assert rows["nash_mtl"]["diverged"] == 1
    assert rows["nash_mtl"]["against"] == {}
    assert pinn.verdict(rows["linear"]["against"]["sum"]) == "x 0.32"
    assert pinn.verdict(rows["pcgrad"]["against"]["sum"]) == "="
    values = np.ones((np.prod(EQUATIONS["kovasznay"].grid), 3))
    config = pinn.Config(seeds=4, steps=2, points=2)
    words = list(pinn.in_words("kovasznay", rows, results, values, config))
    assert words[0].startswith("Against sum, better: linear; worse: none; no difference found: pc")
    assert "diverged, and are in no test, of: nash_mtl (1)." in words[2]
    assert "conflicts with a condition's in 100%" in " ".join(words)
    assert next(pinn.over_all({"kovasznay": rows})).endswith("every equation: linear.")


def test_all_that_diverges_is_reported_too():
    results = {method: made_up(np.full(2, np.nan)) for method in ("sum", "linear", "pcgrad")}
    rows = pinn.compare(results)
    values = np.ones((np.prod(EQUATIONS["kovasznay"].grid), 3))
    config = pinn.Config(seeds=2, steps=1, points=1)
    words = " ".join(pinn.in_words("kovasznay", rows, results, values, config))
    assert "sum (2), linear (2), pcgrad (2)" in words
    assert "better" not in words
    pinn.make_table(rows, results, values, ("boundary", "residual"))
    assert pinn.as_png(pinn.make_figure("kovasznay", rows, results, values, config))


def test_the_tables_that_are_shown_are_those_of_the_results(tmp_path):
    kept = json.loads((ROOT / "benchmarks/results/pinn.json").read_text())
    errors = {}
    for equation in kept["equations"]:
        _, values = pinn_equations.reference(equation["equation"], tmp_path)
        for method, found in equation["methods"].items():
            mse = np.exp(np.mean(np.log(found["errors"])))
            errors.setdefault(method, []).append(100 * pinn.relative_error(mse, values))
    page = (ROOT / "docs/how_to/physics.md").read_text()
    table = (ROOT / "benchmarks/results/pinn.md").read_text()
    assert set(errors) == set(pinn.DEFAULTS)
    for method, (kovasznay, burgers) in errors.items():
        assert f"| `{method}` | {kovasznay:.2f} | {burgers:.1f} |" in page
        assert f" | {kovasznay:.2f} | " in table
        assert f" | {burgers:.2f} | " in table


# --- The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--equations", "heat"], "invalid choice: 'heat'"),
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--losses", "four"], "invalid choice: 'four'"),
        (["--steps", "7", "--points", "2"], "a multiple of --points"),
        (["--seeds", "1"], "expected at least 2"),
        (["--learning-rates", "0"], "expected at least"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        pinn.main(arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def small_grids(monkeypatch):
    for name, equation in EQUATIONS.items():
        grid = (7, 5, 3, 2)[: len(equation.inputs)]
        monkeypatch.setitem(EQUATIONS, name, dataclasses.replace(equation, grid=grid))
    # Programs are kept by the name of the equation.
    pinn.make_program.cache_clear()
    yield
    pinn.make_program.cache_clear()


SMALL = """--equations burgers --methods inverse_norms --seeds 2 --steps 4 --points 2 --inside 6
--boundary 4 --initial 4 --width 3 --depth 1 --learning-rates 1e-3 1e-2 --condition-weights 1 10"""


def test_a_run_from_the_command_line_is_resumed(small_grids, tmp_path, capsys, monkeypatch):
    options = [*SMALL.split(), "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    pinn.main(options)
    printed = capsys.readouterr()
    # Stretches: two of training and two of tuning a method, and of tuning `linear` two more.
    assert "burgers, tuning linear: 4 of 14 done" in printed.err
    assert "burgers, training inverse_norms: 12 of 14 done" in printed.err
    assert "Against linear" in printed.out
    names = ("results.json", "burgers.png", "summary.json", "results.md")
    file, picture, summary, table = (tmp_path / "out" / name for name in names)
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())["equations"]["burgers"]
    assert list(found) == ["sum", "linear", "inverse_norms"]
    for method, run in found.items():
        assert np.shape(run["mse"]) == (2, 3)
        assert np.shape(run["losses"]) == (2, 3, 3)
        assert np.shape(run["cosines"]) == (2, 3, 3, 3)
        assert np.shape(run["scores"]) == (2 if method == "linear" else 1, 2, 1)
        # All methods begin with the same networks, and no two seeds do.
        assert [each[0] for each in run["mse"]] == [e[0] for e in found["sum"]["mse"]]
        assert run["mse"][0][0] != run["mse"][1][0]
        assert run["mse"][0][2] != run["mse"][0][0]

    # What is kept says the same, and nothing of this machine's folders.
    kept = json.loads(summary.read_text())
    assert str(tmp_path) not in summary.read_text()
    (equation,) = kept["equations"]
    assert equation["losses"] == ["boundary", "initial", "residual"]
    for method, each in equation["methods"].items():
        np.testing.assert_allclose(each["errors"], [e[-1] for e in found[method]["mse"]], rtol=1e-4)
        assert f"| `{method}` |" in table.read_text()

    for each in (file, picture, summary, table):
        each.unlink()
    monkeypatch.setattr(pinn, "train_method", None)  # nothing is left to train
    pinn.main(options)
    assert json.loads(file.read_text())["equations"]["burgers"] == found

    with pytest.raises(SystemExit):
        pinn.main(options)
    assert "is already there" in capsys.readouterr().err


def test_with_one_rate_nothing_is_tuned(small_grids, tmp_path):
    config = pinn.Config(
        seeds=2, steps=2, points=2, inside=4, boundary=4, width=3, depth=1, learning_rates=(1e-3,),
        data_dir=tmp_path,
    )  # fmt: skip
    assert pinn.stretches_of("sum", "kovasznay", config) == 2
    with Progress(2) as progress:
        found = pinn.train_method("sum", "kovasznay", config, progress)
    assert progress.done == 2
    assert found["scores"] is None
    assert found["field"].shape == (7, 5)
    assert not list(tmp_path.iterdir())  # a formula is not kept


def test_the_sum_is_trained_by_the_gradient_of_the_sum(small_grids, tmp_path):
    config = pinn.Config(inside=5, boundary=4, width=3, depth=1)
    equation = EQUATIONS["kovasznay"]
    lane = pinn.Lane(jnp.asarray(3), jnp.asarray(0.1), jnp.array([10.0, 1]), jnp.asarray(100))
    run = pinn.start(lane, config, equation, "sum")
    after = pinn.train_stretch(run, lane, jnp.arange(1), config, equation, "sum")
    points = pinn.sample(config, equation, jax.random.fold_in(run.key, 0))

    def loss_fn(params):
        losses = pinn.losses_of(config, equation, params, points)
        return 10 * losses["boundary"] + losses["residual"]

    adam = optax.adam(0.1)  # warmed up at once
    updates, _ = adam.update(jax.grad(loss_fn)(run.params), adam.init(run.params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        after.params,
        optax.apply_updates(run.params, updates),
    )
