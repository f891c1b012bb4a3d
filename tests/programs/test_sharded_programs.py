"""Exact surgery and stacks on a mesh: what one device finds, and each task's gradients in place."""

import json
import os
import subprocess
import sys

import pytest

from optax_surgery.programs import over_tasks

# Devices have to be asked for before JAX starts, so all checks share one other process.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import optax_surgery as surgery

T, D = 4, 64
keys = jax.random.split(jax.random.key(0), 6)
PARAMS = {"layers": jax.random.normal(keys[0], (3, D, D)) / 8, "bias": jnp.ones(D),
          "kernel": jax.random.normal(keys[1], (D, D)) / 8,
          "head": jax.random.normal(keys[2], (D, T)) / 8}
SPECS = {"layers": P(None, None, "d"), "bias": P("d"), "kernel": P(None, "d"), "head": P()}
pcgrad = surgery.pcgrad()
found = {}

def same(a, b):
    return all(np.allclose(x, y, rtol=2e-4, atol=1e-5)
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

def put(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

def check(name, fn, mesh, specs, batch, batch_spec):
    expected = jax.jit(fn)(PARAMS, batch)
    params = put(mesh, PARAMS, specs)
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, batch_spec)), batch)
    try:
        with jax.set_mesh(mesh):
            got = jax.jit(fn)(params, batch)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {str(error)[:600]}"
        return
    found[name] = {"same": same(got, expected), "specs": {
        key: str(leaf.sharding.spec) for key, leaf in got[1].items()}}

def layers(lie, whole, params, x):
    def layer(x, kernel):
        return lie(jnp.tanh(x @ whole(kernel))), None
    x, _ = lax.scan(jax.checkpoint(layer), lie(x), params["layers"])
    return jnp.tanh(lie(x @ whole(params["kernel"])) + whole(params["bias"])[None])

nothing = lambda x: x
def gather(x):  # as a model on an Explicit mesh does, at its products
    mesh = jax.typeof(x).sharding.mesh
    return x if mesh.empty else jax.sharding.reshard(x, P(*[None] * x.ndim))

# Data that the tasks share, its rows over the mesh.
shared_batch = jax.random.normal(keys[3], (32, D))
few_rows = shared_batch[:4]
# Data of each task's own, the tasks over the mesh.
own_batch = jax.random.normal(keys[4], (T, 8, D))
many = jax.random.normal(keys[5], (8, 1, D))

for kind in ("Auto", "Explicit"):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType[kind],))
    def lie(*spec):
        if kind == "Explicit":
            return nothing
        return lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
    whole = gather if kind == "Explicit" else nothing
    def losses_fn(params, x):
        y = layers(nothing, whole, params, x)
        return jnp.mean((y @ whole(params["head"])) ** 2, axis=0)
    def exact(params, x):
        fn = surgery.surgery_value_and_grad(losses_fn, pcgrad)
        return fn(params, pcgrad.init(None), x)[0]
    def stacks(params, x):
        return surgery.task_value_and_grad(losses_fn)(params, x)
    for name, batch in {"many rows": shared_batch, "few rows": few_rows}.items():
        for way in (exact, stacks):
            check(f"shared, {name}, {way.__name__}, {kind}", way, mesh, SPECS, batch, P("d"))

    for chunk_size in (None, 3):
        def loss_fn(params, x):
            y = layers(lie(None, None), whole, params, x)
            return jnp.mean((y @ whole(params["head"])) ** 2)
        name = {} if kind == "Explicit" else {"spmd_axis_name": "d"}
        def exact(params, x):
            fn = surgery.per_task_surgery_value_and_grad(
                loss_fn, pcgrad, chunk_size=chunk_size, **name)
            return fn(params, pcgrad.init(None), x)[0]
        def stacks(params, x):
            fn = surgery.per_task_value_and_grad(loss_fn, chunk_size=chunk_size, **name)
            return fn(params, x)
        for rows, batch in {"many rows": own_batch, "samples": many}.items():
            for way in (exact, stacks):
                check(f"own, {rows}, {way.__name__}, {chunk_size}, {kind}",
                      way, mesh, SPECS, batch, P("d"))

# With no mesh set and constraints in the loss, each device keeps one task's activations, and what
# moves is the stack alone.
mesh = Mesh(np.array(jax.devices()), ("d",))
def constrained(params, x):
    lie = lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, None)))
    return jnp.mean((layers(lie, nothing, params, x) @ params["head"]) ** 2)
params = put(mesh, PARAMS, SPECS)
batch = jax.device_put(own_batch, NamedSharding(mesh, P("d")))
def compiled(fn):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    step = lambda params, batch: pcgrad.update(fn(params, batch)[1], pcgrad.init(None))[0]
    return jax.jit(step, out_shardings=shardings).lower(params, batch).compile().as_text()
for name in (None, "d"):
    text = compiled(surgery.per_task_value_and_grad(constrained, spmd_axis_name=name))
    gathered = re.findall(r"= f32\\[([0-9,]*)\\]\\S* all-gather\\(", text)
    found[f"gathered {name}"] = sorted(set(gathered))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_results_are_those_of_one_device(found):
    cases = {case: one for case, one in found.items() if not case.startswith("gathered")}
    assert [
        (case, one) for case, one in cases.items() if not isinstance(one, dict) or not one["same"]
    ] == []


def test_gradients_lie_where_the_parameters_do(found):
    for case, one in found.items():
        if "exact" in case and "Explicit" in case:
            assert one["specs"]["layers"] == "P(None, None, 'd')", case
        # Of an Auto mesh the partitioner can only be told by what JAX 0.12 has no more.
        is_told = "Explicit" in case or over_tasks.shard_alike is not None
        if case.startswith("own") and "stacks" in case and is_told:
            assert one["specs"]["layers"] == "P(None, None, None, 'd')", case


def test_with_the_axis_of_the_tasks_no_stack_is_gathered(found):
    assert "4,64,64" in found["gathered None"]
    assert "4,64,64" not in found["gathered d"]
