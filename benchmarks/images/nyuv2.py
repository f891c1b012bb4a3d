"""NYUv2: every pixel's class, depth and surface normal, from one image of a room.

The protocol that papers have shared since MTAN: SegNet-MTAN, 200 epochs of batches of 2, Adam with
1e-4, halved at epoch 100, random scale and mirror, and the mean of the last 10 epochs on the test
set. `--network pspnet` is Aligned-MTL's other network, which there starts from ImageNet and here
from random weights. Run `python -m benchmarks.images.nyuv2 --data-dir FOLDER`.

The data are the set that the MTAN authors prepared; https://github.com/lorenmt/mtan says where to
download it. The folder holds `train` and `val`, each with `image`, `label`, `depth` and `normal`,
each with `0.npy`, `1.npy`, ...: 795 and 654 images of 288 x 384.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import dense, image_suite

OUTPUTS = {"segmentation": 13, "depth": 1, "normals": 3}
FIELDS = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options. The defaults are the published protocol."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(len(OUTPUTS))] = (
        image_suite.DEFAULT
    )
    network: Annotated[str, "whose decoders the tasks have", dense.NETWORKS] = "segnet_mtan"
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image is seen", 1] = 200
    halve_at: Annotated[int, "epoch at which the learning rate is halved", 1] = 100
    batch_size: Annotated[int, "images per step", 1] = 2
    learning_rate: Annotated[float, "of Adam", 1e-9] = 1e-4
    channels: Annotated[int, "of the first convolution; later ones have up to 8 times", 1] = 64
    data_dir: Annotated[Path, "folder with the prepared set", None] = Path("data/nyuv2")
    out: Annotated[Path, "folder for the results", None] = Path("results/nyuv2")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


def load(config):
    return {
        name: dense.numpy_folder(config.data_dir / folder, FIELDS, OUTPUTS["segmentation"])
        for name, folder in (("train", "train"), ("test", "val"))
    }


def make_problem(tasks, config):
    outputs = {task: OUTPUTS[task] for task in [list(OUTPUTS)[position] for position in tasks]}
    net = dense.make_network(config.network, outputs, config.channels)
    return dense.make_problem(net, outputs, (dense.scale_and_crop, dense.mirror))


def suite(config):
    return image_suite.Suite(
        tasks=tuple(OUTPUTS),
        load=load,
        make_problem=make_problem,
        make_adam=dense.halved_adam,
        choose=image_suite.last_epochs_mean,
        columns=dict,
        higher_is_better=lambda metrics: {name: dense.HIGHER_IS_BETTER[name] for name in metrics},
    )


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "nyuv2", argv)


if __name__ == "__main__":
    run_main(main, GOES_ON)
