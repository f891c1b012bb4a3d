"""Stacks that are sharded over devices: the result of one device, and hardly a collective."""

import json
import os
import subprocess
import sys

import pytest

# Eight devices have to be asked for before JAX starts, so all checks share one other process.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import optax_surgery as surgery

T, SHAPES = 4, {"kernel": (16, 24, 8), "bias": (8,), "scale": ()}
PARAMS = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES))))
GRADS = {name: jax.random.normal(keys[name], (T, *shape)) for name, shape in SHAPES.items()}
# Long enough for a loop over blocks, where a device holds it alone.
LONG = {"table": jax.random.normal(jax.random.key(1), (T, 8, 40_003))}

def make_mesh(kind):
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType[kind],))

def shard(mesh, grads, name, axis, tasks=None):
    specs = {key: [None] * (grad.ndim - 1) for key, grad in grads.items()}
    if name:
        specs[name][axis] = "d"
    return {key: jax.device_put(grad, NamedSharding(mesh, P(tasks, *specs[key])))
            for key, grad in grads.items()}

def collectives(text):
    # What each kind moves: several arrays may go together in one.
    kinds = r"= (.*?) (all-[a-z-]+?|collective-permute|reduce-scatter)(?:-start)?\\("
    return sorted({f"{kind} {shape}" for shapes, kind in re.findall(kinds, text)
                   for shape in re.findall(r"\\w+\\[[0-9,]*\\]", shapes)})

def run(update, sharded, expected):
    compiled = jax.jit(update).lower(sharded).compile()
    found = compiled(sharded)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    kept = jax.tree.map(
        lambda a, grad: a.sharding.is_equivalent_to(
            NamedSharding(grad.sharding.mesh, P(*grad.sharding.spec[1:])), a.ndim
        ), found, sharded)
    return {"same": all(jax.tree.leaves(same)), "kept": all(jax.tree.leaves(kept)),
            "collectives": collectives(compiled.as_text())}

def updates_of(make):
    tx = make()
    return lambda grads: tx.update(grads, tx.init(None))[0]

report = {}
KINDS = ("Auto", "Explicit")
CASES = [("pcgrad", kind, name, axis) for kind in KINDS
         for name, axis in [("kernel", 0), ("kernel", 1), ("kernel", 2), ("bias", 0)]]
CASES += [(method, kind, "kernel", 1) for method in ("aligned_mtl", "mean") for kind in KINDS]
CASES += [("mgda", "Explicit", "kernel", 1)]
for method, kind, name, axis in CASES:
    update = updates_of(getattr(surgery, method))
    sharded = shard(make_mesh(kind), GRADS, name, axis)
    report[f"{method} {kind} {name} {axis}"] = run(update, sharded, jax.jit(update)(GRADS))

update = updates_of(surgery.pcgrad)
expected = jax.jit(update)(LONG)
for kind in KINDS:
    report[f"long {kind}"] = run(update, shard(make_mesh(kind), LONG, "table", 0), expected)

# Some tasks masked, of more of them than one loop sums.
MANY = {"table": jax.random.normal(jax.random.key(4), (20, 8, 40))}
def without_thirds(grads):
    tx = surgery.pcgrad()
    return tx.update(grads, tx.init(None), task_mask=jnp.arange(20) % 3 != 0)[0]
expected_masked = jax.jit(without_thirds)(MANY)
for kind in KINDS:
    sharded = shard(make_mesh(kind), MANY, "table", 0)
    report[f"masked {kind}"] = run(without_thirds, sharded, expected_masked)

# One leaf over two axes of a mesh, another over one of them.
for kind in KINDS:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2)
    specs = {"kernel": P(None, "a", None, "b"), "bias": P(None, "a"), "scale": P(None)}
    sharded = {name: jax.device_put(grad, NamedSharding(mesh, specs[name]))
               for name, grad in GRADS.items()}
    report[f"two axes {kind}"] = run(update, sharded, jax.jit(update)(GRADS))

# Shardings that only `jit` is told of.
mesh = make_mesh("Auto")
sharding = NamedSharding(mesh, P(None, "d"))
compiled = jax.jit(update, in_shardings=({"table": sharding},)).lower(LONG).compile()
report["in_shardings"] = {"collectives": collectives(compiled.as_text())}

# Each device holds a part of the parameters: the caller sums the Gramian over the mesh.
def local(grads):
    tx = surgery.pcgrad()
    gramian = jax.lax.psum(surgery.gramian(grads), "d")
    return tx.update(grads, tx.init(None), gramian=gramian)[0]
spec = {"table": P(None, "d")}
manual = jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs={"table": P("d")})
report["shard_map"] = run(manual, shard(mesh, LONG, "table", 0), expected)

# Each device has all of the parameters, and a surgery of its own.
alone = jax.shard_map(update, mesh=mesh, in_specs=({"table": P(None, None, None, "d")},),
                      out_specs={"table": P(None, None, "d")})
stacked = {"table": jnp.concatenate([LONG["table"][..., None]] * 8, axis=-1)}
each = {"table": jnp.concatenate([expected["table"][..., None]] * 8, axis=-1)}
report["a surgery a device"] = run(alone, shard(mesh, stacked, "table", 2), each)

# Data-parallel: the batch is sharded, the gradients are not.
def losses_fn(params, batch):
    return jnp.stack([jnp.mean((batch @ params["w"] - task) ** 2) for task in range(3)])
batch, params = jax.random.normal(jax.random.key(2), (16, 5)), {"w": jnp.ones(5)}
def step(params, batch):
    tx = optax.chain(surgery.pcgrad(), optax.sgd(0.1))
    return tx.update(jax.jacrev(losses_fn)(params, batch), tx.init(params), params)[0]
expected_step = jax.jit(step)(params, batch)
for kind in KINDS:
    mesh = make_mesh(kind)
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    found = jax.jit(step)(put(params, P()), put(batch, P("d")))
    report[f"data-parallel {kind}"] = {
        "same": bool(np.allclose(found["w"], expected_step["w"], rtol=1e-5, atol=1e-6))}

# Task-parallel: one all-to-all brings the gradients of each coordinate together.
EIGHT = {"table": jax.random.normal(jax.random.key(3), (8, 16, 24))}
expected = jax.jit(update)(EIGHT)
RESHARD = {"Auto": jax.lax.with_sharding_constraint, "Explicit": jax.sharding.reshard}
for kind, reshard in RESHARD.items():
    mesh = make_mesh(kind)
    by_task = shard(mesh, EIGHT, None, 0, tasks="d")
    def from_tasks(grads):
        grads = jax.tree.map(lambda grad: reshard(grad, NamedSharding(mesh, P(None, "d"))), grads)
        return update(grads)
    compiled = jax.jit(from_tasks).lower(by_task).compile()
    direct = jax.jit(update)(by_task)
    same = [np.allclose(found["table"], expected["table"], rtol=1e-5, atol=1e-6)
            for found in (compiled(by_task), direct)]
    report[f"task-parallel {kind}"] = {
        "same": all(same), "collectives": collectives(compiled.as_text())}
json.dump(report, sys.stdout)
"""


@pytest.fixture(scope="module")
def report():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_results_are_those_of_one_device(report):
    assert [case for case, found in report.items() if not found.get("same", True)] == []


def test_updates_lie_where_the_parameters_do(report):
    assert [case for case, found in report.items() if not found.get("kept", True)] == []


def test_the_only_collective_of_a_surgery_sums_the_gramian(report):
    cases = [case for case in report if case.split()[0] not in ("data-parallel", "task-parallel")]
    found = {case: report[case]["collectives"] for case in cases}
    local = ("mean", "a surgery")
    for case in cases:
        num_tasks = 20 if case.startswith("masked") else 4
        summed = f"all-reduce f32[{num_tasks},{num_tasks}]"
        wanted = [] if case.startswith(local) else [summed]
        assert found[case] == wanted, case


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_gradients_sharded_by_task_take_one_all_to_all(report, kind):
    found = report[f"task-parallel {kind}"]["collectives"]
    assert [kind.split()[0] for kind in found] == ["all-reduce", "all-to-all"]
    assert found[0] == "all-reduce f32[8,8]"
