"""The networks of the image suites: sizes against published ones, shapes, what is shared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from benchmarks.images import networks

NYUV2 = {"segmentation": 13, "depth": 1, "normals": 3}
IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


def variables_of(net, *args):
    init = functools.partial(net.init, train=True) if not args else net.init
    return jax.eval_shape(init, jax.random.key(0), IMAGE, *args)


def count(net):
    return sum(leaf.size for leaf in jax.tree.leaves(variables_of(net)["params"]))


@pytest.mark.parametrize(
    ("net", "published"),
    [
        # The number that the authors' code divides by, and with it the 1.77 of MTAN's Table 2.
        (networks.SegNet({"segmentation": 13}, attention=False), 24_981_069),
        (networks.SegNet(NYUV2), 1.77 * 24_981_069),
        # torchvision's, with a head of 1000 classes
        (networks.ImageClassifier(networks.resnet18(), {"imagenet": 1000}), 11_689_512),
        (networks.ImageClassifier(networks.resnet50(), {"imagenet": 1000}), 25_557_032),
    ],
    ids=["segnet", "segnet_mtan", "resnet18", "resnet50"],
)
def test_networks_have_as_many_parameters_as_published(net, published):
    tolerance = 1e-3 if published == 1.77 * 24_981_069 else 0
    assert count(net) == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (networks.SegNet(NYUV2, width=2), 64),
        (networks.SegNet(NYUV2, attention=False, width=2), 64),
        (networks.PSPNet(NYUV2, width=2), 64),
        (networks.PSPNet(NYUV2, upsampled=1, width=2), 8),
    ],
    ids=["segnet_mtan", "segnet", "pspnet", "pspnet_small"],
)
def test_dense_networks_predict_every_pixel_of_every_task(net, size):
    outputs = jax.eval_shape(functools.partial(net.apply, train=False), variables_of(net), IMAGE)
    shapes = {task: output.shape for task, output in outputs.items()}
    assert shapes == {task: (1, size, size, channels) for task, channels in NYUV2.items()}


@pytest.mark.parametrize(
    "net",
    [
        networks.SegNet({"segmentation": 3, "depth": 1}, width=2),
        networks.PSPNet({"segmentation": 3, "depth": 1}, width=2),
        networks.CelebANet(("Bald", "Young"), width=2),
        networks.ImageClassifier(networks.resnet18(width=2), {"Art": 5, "Product": 5}),
    ],
    ids=["segnet_mtan", "pspnet", "celeb_a", "classifier"],
)
def test_shared_are_those_parameters_that_several_tasks_reach(net):
    variables = variables_of(net)

    def losses_fn(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables["batch_stats"])
        images = jnp.zeros(IMAGE.shape)
        outputs = net.apply({"params": params, "batch_stats": zeros}, images, train=False)
        if not isinstance(outputs, dict | list):
            outputs = list(outputs.T)
        return [jnp.sum(output) for output in jax.tree.leaves(outputs)]

    reached = surgery.infer_shared(losses_fn, variables["params"])
    for path, several in jax.tree.leaves_with_path(reached):
        assert networks.shared(jax.tree_util.keystr(path, simple=True, separator="/")) == several


def test_convolutions_of_cifar_take_any_block_and_head():
    net = networks.ConvNet(num_tasks=2, num_classes=5, blocks=3, channels=2, features=4)
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3)), jnp.float32)
    route = jnp.array([2, 1])
    params = jax.jit(net.init)(jax.random.key(0), images, 0, route)["params"]

    def loss_fn(params):
        return jnp.sum(net.apply({"params": params}, images, 1, route) ** 2)

    grads = jax.jit(jax.grad(loss_fn))(params)
    for name, chosen in (("dense_0", 2), ("dense_1", 1), ("task_heads", 1)):
        used = np.any(grads[name]["kernel"] != 0, axis=(1, 2))
        np.testing.assert_array_equal(np.flatnonzero(used), [chosen])


def test_the_papers_network_for_cifar_has_the_size_that_its_layers_have():
    net = networks.ConvNet(num_tasks=20, num_classes=5)
    params = variables_of(net, 0, jax.ShapeDtypeStruct((2,), jnp.int32))["params"]
    # At 64 x 64 the flat features are 8 x 8 x 160.
    layers = [(27, 160), (9 * 160, 160), (9 * 160, 160), (64 * 160, 320), (320, 320)]
    expected = sum((inputs + 1) * outputs for inputs, outputs in layers) + 20 * 321 * 5
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_unpooling_puts_maxima_where_they_came_from():
    features = jnp.asarray(np.random.default_rng(0).random((2, 4, 6, 3)), jnp.float32)
    pooled, places = jax.jit(networks.pool_with_places)(features)
    back = jax.jit(networks.unpool)(pooled, places)
    windows = np.asarray(features).reshape(2, 2, 2, 3, 2, 3).max(axis=(2, 4))
    np.testing.assert_array_equal(pooled, windows)
    np.testing.assert_array_equal(back, np.where(np.isin(features, windows), features, 0))


def test_pyramid_pooling_averages_as_adaptive_pooling_does():
    features = np.random.default_rng(0).random((1, 7, 8, 2)).astype(np.float32)
    found = jax.jit(networks.average_parts, static_argnums=1)(features, 3)
    rows, columns = [(0, 3), (2, 5), (4, 7)], [(0, 3), (2, 6), (5, 8)]
    expected = [[features[:, a:b, c:d].mean(axis=(1, 2)) for c, d in columns] for a, b in rows]
    np.testing.assert_allclose(found, np.moveaxis(np.array(expected), 2, 0), rtol=1e-5)
