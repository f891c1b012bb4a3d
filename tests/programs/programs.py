"""Programs of losses over shared data, small ones of every kind that users write.

`PROGRAMS` maps a name to a function that makes `(losses_fn, params)`, in the dtype that JAX has by
default at the time.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

NUM_TASKS = 3
Made = tuple[Callable[[Any], Any], Any]
PROGRAMS: dict[str, Callable[[], Made]] = {}
# In which numbers of less than 32 bits stand, whatever the dtype of the parameters.
NARROW: set[str] = set()


def program(name: str, narrow: bool = False) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(make):
        assert name not in PROGRAMS
        PROGRAMS[name] = make
        if narrow:
            NARROW.add(name)
        return make

    return add


def normal(*shape: int, seed: int = 0) -> jax.Array:
    numbers = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(numbers, jnp.result_type(float))


def filled(shapes: Any, seed: int = 1) -> Any:
    """Normal numbers for leaves that are floating-point, of the default dtype."""
    generator = np.random.default_rng(seed)

    def fill(leaf):
        numbers = generator.normal(size=leaf.shape) / max(np.size(leaf), 1) ** 0.25
        return jnp.asarray(numbers, jnp.result_type(float))

    return jax.tree.map(fill, shapes)


def three(*outputs: jax.Array) -> jax.Array:
    """Three losses that all use all outputs."""
    losses: Any = 0
    for seed, output in enumerate(outputs):
        flat = output.reshape(1, -1)
        dtype = jnp.promote_types(flat.dtype, jnp.float32)
        scales = normal(NUM_TASKS, flat.shape[1], seed=seed).astype(dtype)
        losses = losses + jnp.mean(jnp.sin(scales * flat.astype(dtype)), axis=1)
    return losses


def linen(module: nn.Module, *inputs: jax.Array, **kwargs: Any) -> Made:
    """A Flax module whose parameters are the variables of that collection."""
    init = functools.partial(module.init, **kwargs)
    variables = filled(jax.eval_shape(init, jax.random.key(0), *inputs))
    statistics = {name: variables[name] for name in variables if name != "params"}
    statistics = jax.tree.map(jnp.square, statistics)  # variances are positive

    def losses_fn(params):
        return three(module.apply({"params": params, **statistics}, *inputs, **kwargs))

    return losses_fn, variables["params"]


def equinox(make: Callable[[], Any], inputs: jax.Array) -> Made:
    shapes, static = eqx.partition(eqx.filter_eval_shape(make), _is_array)

    def losses_fn(params):
        return three(jax.vmap(eqx.combine(params, static))(inputs))

    return losses_fn, filled(shapes)


def _is_array(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def flax_nnx(make: Callable[[], nnx.Module], inputs: jax.Array) -> Made:
    graph, shapes, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    del rest  # the random numbers of `make`

    def losses_fn(params):
        return three(nnx.merge(graph, nnx.State(params))(inputs))

    return losses_fn, filled(nnx.to_pure_dict(shapes))


ROWS = functools.partial(normal, 4, 5)
IMAGES = functools.partial(normal, 2, 5, 5, 2)
TOKENS = jnp.asarray(np.array([[1, 4, 1, 0], [6, 1, 2, 2]]))

# Flax linen

LINEN: dict[str, Callable[[], tuple[Any, ...]]] = {
    "Dense": lambda: (nn.Dense(6), ROWS()),
    "Dense without bias": lambda: (nn.Dense(6, use_bias=False), ROWS()),
    "Dense on sequences": lambda: (nn.Dense(6), normal(2, 3, 5)),
    "Dense on one row": lambda: (nn.Dense(6), normal(5)),
    "DenseGeneral to heads": lambda: (nn.DenseGeneral((2, 3)), ROWS()),
    "DenseGeneral from heads": lambda: (nn.DenseGeneral(4, axis=(-2, -1)), normal(3, 2, 3)),
    "DenseGeneral with a batch axis": lambda: (
        nn.DenseGeneral(4, axis=-1, batch_dims=(0,)),
        normal(2, 3, 5),
    ),
    "Embed": lambda: (nn.Embed(9, 4), TOKENS),
    "Conv of 1 axis": lambda: (nn.Conv(3, (2,)), normal(2, 6, 2)),
    "Conv of 2 axes": lambda: (nn.Conv(3, (3, 3)), IMAGES()),
    "Conv in groups": lambda: (nn.Conv(4, (2, 2), feature_group_count=2), IMAGES()),
    "Conv of 1 x 1": lambda: (nn.Conv(3, (1, 1)), IMAGES()),
    "ConvTranspose": lambda: (nn.ConvTranspose(3, (2, 2), strides=(2, 2)), IMAGES()),
    "LayerNorm": lambda: (nn.Sequential([nn.Dense(6), nn.LayerNorm()]), ROWS()),
    "RMSNorm": lambda: (nn.Sequential([nn.Dense(6), nn.RMSNorm()]), ROWS()),
    "GroupNorm": lambda: (nn.Sequential([nn.Conv(4, (2, 2)), nn.GroupNorm(2)]), IMAGES()),
    "BatchNorm in inference": lambda: (nn.BatchNorm(use_running_average=True), ROWS()),
    "Einsum": lambda: (nn.Einsum((5, 2, 3), "bi,iho->bho"), ROWS()),
    "attention": lambda: (nn.MultiHeadDotProductAttention(2), normal(2, 3, 4)),
    "LSTM": lambda: (nn.RNN(nn.LSTMCell(3, param_dtype=float)), normal(2, 3, 4)),
    "GRU": lambda: (nn.RNN(nn.GRUCell(3, param_dtype=float)), normal(2, 3, 4)),
    "activations": lambda: (
        nn.Sequential(
            [nn.Dense(5), nn.relu, nn.Dense(4), nn.softplus, nn.Dense(3), nn.silu, nn.log_softmax]
        ),
        ROWS(),
    ),
}


class Tied(nn.Module):
    """A language model that reads and writes with one table."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(9, 4)
        return embed.attend(nn.Dense(4)(embed(tokens)))


class Block(nn.Module):
    """What a transformer repeats, without its attention."""

    @nn.compact
    def __call__(self, hidden, _):
        return hidden + nn.Dense(5)(nn.tanh(nn.Dense(6)(nn.LayerNorm()(hidden)))), None


class Layers(nn.Module):
    """Blocks in a loop over stacked parameters, computed again on the way back if so wanted."""

    remat: bool = True

    @nn.compact
    def __call__(self, hidden):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned()(hidden, None)[0]


LINEN["tied Embed"] = lambda: (Tied(), TOKENS)
LINEN["scan of remat"] = lambda: (Layers(), ROWS())
LINEN["scan"] = lambda: (Layers(remat=False), ROWS())
LINEN["remat"] = lambda: (nn.remat(Block)(), ROWS(), None)


class First(nn.Module):
    """Returns the first of what the inner module returns."""

    inner: nn.Module

    def __call__(self, *inputs):
        return self.inner(*inputs)[0]


for _name, _make in LINEN.items():

    def _linen(make=_make):
        module, *inputs = make()
        return linen(First(module) if len(inputs) > 1 else module, *inputs)

    program(f"linen {_name}")(_linen)

# Equinox and nnx

KEY = jax.eval_shape(lambda: jax.random.key(0))
EQUINOX = {
    "Linear": (lambda: eqx.nn.Linear(5, 3, key=jax.random.key(0)), ROWS),
    "MLP": (lambda: eqx.nn.MLP(5, 2, 6, 2, key=jax.random.key(0)), ROWS),
    "Conv2d": (lambda: eqx.nn.Conv2d(5, 3, 2, key=jax.random.key(0)), lambda: normal(2, 5, 3, 3)),
    "Embedding": (lambda: eqx.nn.Embedding(9, 4, key=jax.random.key(0)), lambda: TOKENS[0]),
}
for _name, (_module, _inputs) in EQUINOX.items():
    program(f"equinox {_name}")(lambda make=_module, inputs=_inputs: equinox(make, inputs()))

NNX = {
    "Linear": (lambda: nnx.Linear(5, 3, rngs=nnx.Rngs(0)), ROWS),
    "Embed": (lambda: nnx.Embed(9, 4, param_dtype=float, rngs=nnx.Rngs(0)), lambda: TOKENS),
    "LoRA": (lambda: nnx.LoRA(5, 2, 3, rngs=nnx.Rngs(0)), ROWS),
}
for _name, (_module, _inputs) in NNX.items():
    program(f"nnx {_name}")(lambda make=_module, inputs=_inputs: flax_nnx(make, inputs()))

# Plain JAX


def plain(name, losses_of, narrow=False, **shapes):
    """A program of named parameters of these shapes."""

    @program(name, narrow)
    def _make():
        params = {
            key: normal(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items())
        }
        return losses_of, params


def adapters(p):
    return three(ROWS() @ normal(5, 4) + ROWS() @ p["a"] @ p["b"])


def merged_adapters(p):
    return three(ROWS() @ (normal(5, 4) + p["a"] @ p["b"]))


plain("low rank, x @ A @ B", adapters, a=(5, 2), b=(2, 4))
plain("low rank, W + A @ B", merged_adapters, a=(5, 2), b=(2, 4))
plain("kernel transposed", lambda p: three(ROWS() @ p["w"].T), w=(6, 5))
plain("kernel on the left", lambda p: three(p["w"] @ ROWS().T), w=(6, 5))
plain(
    "kernel reshaped", lambda p: three(jnp.tensordot(ROWS(), p["w"].reshape(5, 2, 3), 1)), w=(5, 6)
)
plain(
    "kernel reshaped, transposed and cast",
    lambda p: (
        three(ROWS() @ p["w"].reshape(2, 3, 5).astype(jnp.float32).transpose(2, 1, 0)[..., 0])
        + three(ROWS() @ p["w"].reshape(6, 5).T.astype(jnp.float32))
    ),
    narrow=True,
    w=(30,),
)
plain(
    "bfloat16 activations",
    lambda p: three(
        jnp.tanh(ROWS().astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))
        @ p["v"].astype(jnp.bfloat16)
    ),
    narrow=True,
    w=(5, 6),
    v=(6, 3),
)
plain("used twice", lambda p: three(jnp.tanh(ROWS() @ p["w"]) @ p["w"]), w=(5, 5))
plain("used on both sides", lambda p: three(jnp.tanh(ROWS() @ p["w"]) @ p["w"].T), w=(5, 3))
plain("times itself", lambda p: three(p["w"] @ p["w"], p["w"].T @ p["w"]), w=(4, 4))
plain(
    "used twice, once by all its numbers",
    lambda p: three(ROWS() @ p["w"], lax.dot_general(p["w"], ROWS(), (((0, 1), (1, 0)), ((), ())))),
    w=(5, 4),
)
plain(
    "used twice, once by none of its axes",
    lambda p: three(ROWS() @ p["w"], lax.dot_general(ROWS(), p["w"], (((), ()), ((), ())))),
    w=(5, 4),
)
plain(
    "used twice, reshaped",
    lambda p: three(ROWS() @ p["w"], normal(4, 10) @ p["w"].reshape(10, 2)),
    w=(5, 4),
)
plain(
    "table read and multiplied on either side",
    lambda p: three(p["w"][jnp.array([3, 0, 3])] @ p["w"].T, normal(2, 4) @ p["w"]),
    w=(4, 5),
)
plain(
    "table read out of bounds",
    lambda p: three(
        p["w"].at[jnp.array([0, 9, -1, -9])].get(mode="fill", fill_value=0),
        p["w"].at[jnp.array([7, 2])].get(mode="clip"),
    ),
    w=(4, 3),
)
plain("table of one column", lambda p: three(p["w"][TOKENS]), w=(9, 1))
plain("table of matrices", lambda p: three(p["w"][TOKENS]), w=(9, 2, 2))
plain("rows of a table by a slice", lambda p: three(p["w"][2:5], p["w"][:, 1]), w=(9, 4))
plain("axes of size 1", lambda p: three(ROWS()[:1] @ p["w"] * p["b"] + p["b"]), w=(5, 1), b=(1, 1))
plain(
    "scan over time",
    lambda p: three(
        lax.scan(
            lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["v"]),) * 2,
            jnp.zeros((2, 3)),
            normal(4, 2, 5),
        )[1]
    ),
    w=(3, 3),
    v=(5, 3),
)


def scanned(p):
    def layer(hidden, w):
        return jnp.tanh(hidden @ w["w"] + w["b"][None]), jnp.sum(w["w"])

    return three(*lax.scan(layer, ROWS(), p, reverse=True, unroll=2))


plain("scan over layers, reversed", scanned, w=(4, 5, 5), b=(4, 5))


def nested(p):
    def group(hidden, ws):
        return jax.checkpoint(lambda h, ws: lax.scan(layer, h, ws))(hidden, ws)[0], None

    def layer(hidden, w):
        return hidden + jnp.sin(hidden @ w.T.astype(hidden.dtype)), None

    return three(lax.scan(group, ROWS(), p["w"])[0])


plain("scan of remat of scan", nested, w=(2, 2, 5, 5))
plain(
    "scan of a part for one loss",
    lambda p: jnp.append(
        three(ROWS() @ p["w"]), jnp.sum(lax.scan(lambda h, w: (h * w, h), 1.0, p["v"])[1])
    ),
    w=(5, 4),
    v=(4,),
)
plain(
    "cond",
    lambda p: three(
        lax.cond(jnp.sum(p["w"]) > -99, lambda w: ROWS() @ w, lambda w: -ROWS() @ w, p["w"])
    ),
    w=(5, 4),
)
plain("jit within", lambda p: three(jax.jit(lambda w, x: x @ w)(p["w"], ROWS())), w=(5, 4))
plain("vmap within", lambda p: three(jax.vmap(lambda x: x @ p["w"])(ROWS())), w=(5, 4))
plain(
    "vmap over kernels", lambda p: three(jax.vmap(jnp.matmul)(normal(3, 2, 5), p["w"])), w=(3, 5, 4)
)


@jax.custom_vjp
def squared(x, w):
    return (x @ w) ** 2


squared.defvjp(
    lambda x, w: (squared(x, w), (x, w)),
    lambda kept, d: (
        2 * (d * (kept[0] @ kept[1])) @ kept[1].T,
        2 * kept[0].T @ (d * (kept[0] @ kept[1])),
    ),
)
plain("custom_vjp", lambda p: three(squared(ROWS() @ p["w"], p["v"])), w=(5, 4), v=(4, 3))


@jax.custom_vjp
def straight_through(value, rounded):
    return rounded


straight_through.defvjp(lambda value, rounded: (rounded, None), lambda _, d: (d, jnp.zeros_like(d)))


@jax.custom_jvp
def straight_forward(value, rounded):
    return rounded


straight_forward.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def quantised(rule, p):
    hidden = ROWS() @ p["w"]
    return three(rule(hidden, lax.stop_gradient(jnp.round(hidden))))


plain(
    "custom_vjp by what its function drops",
    functools.partial(quantised, straight_through),
    w=(5, 4),
)
plain(
    "custom_jvp by what its function drops",
    functools.partial(quantised, straight_forward),
    w=(5, 4),
)


@jax.custom_vjp
def centred(x):
    return x


centred.defvjp(lambda x: (x, None), lambda _, d: (d - jnp.mean(d),))
plain(
    "custom_vjp that mixes columns on the way back",
    lambda p: jnp.mean(jnp.sin(centred(ROWS() @ p["w"])), axis=0),
    w=(5, 3),
)
plain(
    "checkpoint", lambda p: three(jax.checkpoint(lambda w: jnp.sin(ROWS() @ w))(p["w"])), w=(5, 4)
)
plain(
    "checkpoint with a policy",
    lambda p: three(
        jax.checkpoint(
            lambda p: jnp.tanh(jnp.tanh(ROWS() @ p["w"]) @ p["v"]) * p["s"],
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        )(p)
    ),
    w=(5, 4),
    v=(4, 4),
    s=(),
)


def printing(p):
    hidden = ROWS() @ p["w"]
    jax.debug.callback(lambda _: None, hidden)
    return three(hidden @ p["v"])


plain("a callback within", printing, w=(5, 4), v=(4, 3))
plain(
    "a callback that returns",
    lambda p: three(
        ROWS()
        @ p["w"]
        * jax.pure_callback(
            lambda x: np.asarray(2 * x),
            jax.ShapeDtypeStruct((), p["w"].dtype),
            lax.stop_gradient(p["w"][0, 0]),
        )
    ),
    w=(5, 4),
)
plain(
    "stop_gradient",
    lambda p: three(ROWS() @ p["w"] @ lax.stop_gradient(p["v"]), lax.stop_gradient(p["w"])),
    w=(5, 4),
    v=(4, 3),
)
plain(
    "rounded to integers",
    lambda p: three(
        jax.nn.one_hot(jnp.argmax(ROWS() @ p["w"], axis=1), 4) @ p["v"],
        ROWS() @ p["u"].astype(jnp.int8).astype(p["v"].dtype),
    ),
    w=(5, 4),
    v=(4, 2),
    u=(5, 2),
)
plain(
    "rounded to integers in a part computed again",
    lambda p: three(
        jax.checkpoint(lambda w, v: v * w.astype(jnp.int32).astype(v.dtype))(p["w"], p["v"])
    ),
    w=(3,),
    v=(3,),
)
plain(
    "nothing but integers between",
    lambda p: jax.nn.one_hot(jnp.argmax(jnp.sum(ROWS() @ p["w"], axis=0)), 3) * p["b"],
    w=(5, 3),
    b=(3,),
)
plain(
    "complex numbers",
    lambda p: three(
        jnp.abs(jnp.fft.fft(ROWS() @ p["w"]) @ p["v"].astype(complex)),
        jax.checkpoint(lambda u: jnp.real(1j * normal(2, 3) @ u.astype(complex)))(p["u"]),
    ),
    w=(5, 4),
    v=(4, 3),
    u=(3, 2),
)
plain(
    "integers times floats",
    lambda p: three(
        lax.dot_general(
            jnp.arange(20).reshape(4, 5),
            p["w"],
            (((1,), (0,)), ((), ())),
            preferred_element_type=p["w"].dtype,
        )
    ),
    w=(5, 4),
)
plain("solve", lambda p: three(jnp.linalg.solve(5 * jnp.eye(3) + p["w"], ROWS().T[:3])), w=(3, 3))
plain(
    "a dict of losses",
    lambda p: {
        "fit": jnp.mean((ROWS() @ p["w"]) ** 2),
        "decay": jnp.sum(p["w"] ** 2),
        "bias": jnp.sum(jnp.sin(p["b"])),
    },
    w=(5, 4),
    b=(4,),
)
plain(
    "heads as a matrix with a column for each",
    lambda p: jnp.mean((jnp.tanh(ROWS() @ p["w"]) @ p["heads"] + p["b"][None]) ** 2, axis=0),
    w=(5, 6),
    heads=(6, 3),
    b=(3,),
)
plain(
    "heads as matrices",
    lambda p: [jnp.mean((jnp.tanh(ROWS() @ p["w"]) @ p[head]) ** 2) for head in ("a", "b", "c")],
    w=(5, 6),
    a=(6, 2),
    b=(6, 2),
    c=(6, 1),
)
plain(
    "heads in one array",
    lambda p: jnp.mean(
        jnp.einsum("bi,tio->tbo", jnp.tanh(ROWS() @ p["w"]), p["heads"]) ** 2, (1, 2)
    ),
    w=(5, 6),
    heads=(3, 6, 2),
)
plain(
    "outputs taken apart",
    lambda p: [
        jnp.sum(part**2) for part in jnp.split(jnp.tanh(ROWS() @ p["w"]) @ p["v"], [1, 4], axis=1)
    ],
    w=(5, 6),
    v=(6, 7),
)


def parts_of_parts(p):
    first, second, third = jnp.split(jnp.sin(ROWS() @ p["w"]), [2, 5], axis=1)
    return jnp.concatenate([first.sum(axis=0), second.sum(axis=0), third.sum(axis=1)])


plain("parts by rows and by columns", parts_of_parts, w=(5, 7))
plain(
    "a loss without the parameters",
    lambda p: jnp.stack([jnp.sum(ROWS() @ p["w"]), jnp.sum(ROWS()), jnp.sum(p["w"] ** 2)]),
    w=(5, 4),
)
plain(
    "no loss with the parameters", lambda p: jnp.arange(3.0) + 0 * lax.stop_gradient(p["w"]), w=(3,)
)
plain("an unused parameter", lambda p: three(ROWS() @ p["w"]), w=(5, 4), unused=(2, 2))
plain("a parameter that is the losses", lambda p: p["w"], w=(3,))
plain("parameters that are losses", lambda p: [p["a"], p["b"], p["a"]], a=(), b=())
plain(
    "an optax loss of outputs with a column for each",
    lambda p: jnp.mean(
        optax.sigmoid_binary_cross_entropy(ROWS() @ p["w"], jnp.sign(normal(4, 3)) / 2 + 0.5),
        axis=0,
    ),
    w=(5, 3),
)
plain(
    "optax losses",
    lambda p: {
        "a": jnp.mean(optax.huber_loss(ROWS() @ p["w"], normal(4, 6))),
        "b": jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(ROWS() @ p["w"], jnp.arange(4))
        ),
        "c": jnp.mean(optax.cosine_distance(ROWS() @ p["w"], normal(4, 6))),
    },
    w=(5, 6),
)
plain("one loss", lambda p: jnp.sum(jnp.sin(ROWS() @ p["w"]))[None], w=(5, 4))
