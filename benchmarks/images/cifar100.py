"""CIFAR-100 as twenty tasks: every superclass is to be told into its five classes.

Each task has images of its own, 2,500 to train on and 500 to test with, and the tasks share the
network of the PCGrad paper: three convolutions and two fully connected layers. With `--network
routed` a task chooses one of twenty blocks for each fully connected layer, and learns to choose
by reinforcement, as in routing networks (Rosenbaum, Klinger and Riemer 2018).
Run `python -m benchmarks.images.cifar100`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_surgery as surgery
from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import image_suite
from benchmarks.images.networks import ConvNet
from benchmarks.images.training import (
    TFDS_DIR,
    DataError,
    Problem,
    in_memory,
    read_record,
    side_by_side,
    tfds_sources,
)

SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "electrical devices": "clock keyboard lamp telephone television",
    "furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large outdoor things": "bridge castle house road skyscraper",
    "large outdoor scenes": "cloud forest mountain plain sea",
    "large herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
TASKS = tuple(SUPERCLASSES)
CLASSES = 5  # of a task
IMAGE = (32, 32, 3)
# How fast a task's choice of blocks changes, and its memory of what reward is usual.
POLICY_RATE = 0.1
REWARD_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """The options. The paper states neither epochs, nor batch size, nor rate of its Adam."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(len(TASKS))] = (
        image_suite.DEFAULT
    )
    network: Annotated[
        str, "the paper's, or with a choice of blocks for each task", ("plain", "routed")
    ] = "plain"
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image is seen", 1] = 50
    batch_size: Annotated[int, "images of each task per step", 1] = 16
    learning_rate: Annotated[float, "of Adam", 1e-9] = 1e-3
    channels: Annotated[int, "of each convolution", 1] = 160
    features: Annotated[int, "units of each fully connected layer", 1] = 320
    blocks: Annotated[int, "of each fully connected layer, with routing", 2] = 20
    data_dir: Annotated[Path, "TFDS's folder, which holds cifar100", None] = TFDS_DIR
    download: Annotated[bool, "let TFDS download and prepare the data", None] = False
    out: Annotated[Path, "folder for the results", None] = Path("results/cifar100")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


# --- The data


def load(config):
    """Both splits, in memory. Reading them takes some ten seconds."""
    sources = tfds_sources("cifar100", config.data_dir, config.download, ("train", "test"))
    return {
        split: side_by_side(by_task(source, config.data_dir)) for split, source in sources.items()
    }


def by_task(source, folder):
    """A split for each superclass. CIFAR-100 numbers its classes in alphabetical order."""
    names = sorted(name for classes in SUPERCLASSES.values() for name in classes.split())
    places = {
        names.index(name): (task, place)
        for task, classes in enumerate(SUPERCLASSES.values())
        for place, name in enumerate(classes.split())
    }
    images, labels = [[] for _ in TASKS], [[] for _ in TASKS]
    for position in range(len(source)):
        record = read_record(source, position, folder)
        task, place = places[int(record["label"])]
        if record["coarse_label"] != task:
            raise DataError(
                f"expected superclass {task} for class {record['label']}, got "
                f"{record['coarse_label']} in example {position} of cifar100 in {folder}"
            )
        images[task].append(record["image"])
        labels[task].append(place)
    for task, found in zip(TASKS, images, strict=True):
        if not found:
            raise DataError(f"expected images of every superclass in {folder}, got no {task}")
    return [
        in_memory({"image": np.stack(task_images), "label": np.array(task_labels)})
        for task_images, task_labels in zip(images, labels, strict=True)
    ]


# --- The network, and what it learns


def make_problem(tasks, config):
    """To learn the tasks at these positions."""
    chosen, each = np.array(tasks), jnp.arange(len(tasks))
    blocks = config.blocks if config.network == "routed" else 1
    net = ConvNet(len(tasks), CLASSES, blocks, config.channels, config.features)

    def init(key):
        variables = dict(net.init(key, jnp.zeros((1, *IMAGE)), 0, jnp.zeros(2, int)))
        policies = jnp.full((len(tasks), 2, blocks), 1 / blocks)
        return variables | {"policies": policies, "rewards": jnp.zeros(len(tasks))}

    def by_task(batch):
        return (jnp.moveaxis(batch[name][:, chosen], 1, 0) for name in ("image", "label"))

    def apply(params, task, route, images) -> Any:
        return net.apply({"params": params}, images / 127.5 - 1, task, route)

    def task_loss(params, task, route, images, labels):
        logits = apply(params, task, route, images)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(errors), jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    def value_and_grad(params, variables, batch, key):
        images, labels = by_task(batch)
        routes = jax.random.categorical(key, jnp.log(variables["policies"]))
        (losses, accuracies), task_grads = surgery.per_task_value_and_grad(task_loss, has_aux=True)(
            params, each, routes, images, labels
        )
        return (losses, learn_routes(variables, routes, accuracies)), task_grads

    def measure(params, variables, batch):
        images, labels = by_task(batch)
        routes = jnp.argmax(variables["policies"], axis=-1)
        logits = jax.vmap(functools.partial(apply, params))(each, routes, images)
        counts = batch["counts"][:, chosen].T
        right = jnp.sum((jnp.argmax(logits, axis=-1) == labels) & counts, axis=1)
        return {"right": right, "images": jnp.sum(counts, axis=1)}

    def metrics(sums):
        return {
            TASKS[t]: 100 * a for t, a in zip(tasks, sums["right"] / sums["images"], strict=True)
        }

    return Problem(init, value_and_grad, measure, metrics)


def learn_routes(variables, routes, accuracies):
    """The weighted policy learner (Abdallah and Lesser 2006), an agent a task and layer.

    A right answer is rewarded by 1, a wrong one by -1. What was done becomes more likely if it
    was rewarded more than usual: much so if it was rare, while an action that disappoints loses
    in proportion to its probability.
    """
    policies, usual = variables["policies"], variables["rewards"]
    rewards = 2 * accuracies - 1
    advantage = (rewards - usual)[:, None]
    taken = jax.nn.one_hot(routes, policies.shape[-1])
    probability = jnp.sum(policies * taken, axis=-1)
    steps = advantage * jnp.where(advantage < 0, probability, 1 - probability)
    moved = policies + POLICY_RATE * steps[..., None] * taken
    policies = jax.vmap(jax.vmap(optax.projections.projection_simplex))(moved)
    return {"policies": policies, "rewards": usual + REWARD_RATE * (rewards - usual)}


# --- The command line


def suite(config):
    return image_suite.Suite(
        tasks=TASKS,
        load=load,
        make_problem=make_problem,
        make_adam=lambda config, steps_per_epoch: optax.adam(config.learning_rate),
        choose=image_suite.last_epochs_mean,
        columns=lambda metrics: {"mean accuracy": float(np.mean(list(metrics.values())))},
        higher_is_better=lambda metrics: dict.fromkeys(metrics, True),
    )


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "cifar100", argv)


if __name__ == "__main__":
    run_main(main, GOES_ON)
