"""The networks of the image suites, as their papers draw them.

Everything that belongs to one task alone lies in modules whose name begins with `task_`; all else
is shared, which is what `shared` tells a surgery. Images are (batch, height, width, channels).
Weights start at random: the published runs of the residual networks start from ImageNet.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def shared(path: str) -> bool:
    """Whether the parameter at this path is used by all tasks, for `surgery.on_shared`."""
    return not path.startswith("task_")


def predict(net: nn.Module, params: Any, variables: Any, inputs: jax.Array) -> Any:
    """What the network says, after training: the statistics of batch normalisation stay."""
    return net.apply({"params": params, **variables}, inputs, train=False)


def batch_norm(train: bool) -> nn.Module:
    """With the momentum of PyTorch, in which the papers' networks are written."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


# --- CIFAR-100: PCGrad's network, also with routed layers


class ConvNet(nn.Module):
    """Three convolutions, two fully connected layers, and a head for each task.

    An image belongs to one task. `task` chooses its head, and `route`, of two numbers, one of the
    `blocks` of each fully connected layer: any task may take any block. One block is no choice:
    that is the network of the PCGrad paper.
    """

    num_tasks: int
    num_classes: int
    blocks: int = 1
    channels: int = 160
    features: int = 320

    @nn.compact
    def __call__(self, images, task, route):
        features = images
        for layer in range(3):
            features = nn.relu(nn.Conv(self.channels, (3, 3), name=f"conv_{layer}")(features))
            features = nn.max_pool(features, (2, 2), (2, 2))
        features = features.reshape(len(features), -1)
        for layer in range(2):
            dense = Choice(self.blocks, self.features, name=f"dense_{layer}")
            features = nn.relu(dense(features, route[layer]))
        return Choice(self.num_tasks, self.num_classes, name="task_heads")(features, task)


class Choice(nn.Module):
    """Many linear layers in one leaf, of which one is applied."""

    layers: int
    features: int

    @nn.compact
    def __call__(self, inputs, chosen):
        shape = (self.layers, inputs.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.layers, self.features))
        return inputs @ kernel[chosen] + bias[chosen][None]


# --- CelebA: nine layers


class CelebANet(nn.Module):
    """Seven convolutions and two fully connected layers, all with batch normalisation.

    Returns logits of shape (batch, tasks).
    """

    tasks: tuple[str, ...]
    width: int = 64

    @nn.compact
    def __call__(self, images, train):
        features = images
        for stage, convolutions in enumerate((1, 2, 2, 2)):
            if stage:
                features = nn.max_pool(features, (2, 2), (2, 2))
            for layer in range(convolutions):
                convolution = nn.Conv(
                    self.width * 2**stage, (3, 3), use_bias=False, name=f"conv_{stage}_{layer}"
                )
                features = nn.relu(batch_norm(train)(convolution(features)))
        features = jnp.mean(features, axis=(1, 2))
        for layer in range(2):
            dense = nn.Dense(features.shape[-1], use_bias=False, name=f"dense_{layer}")
            features = nn.relu(batch_norm(train)(dense(features)))
        logits = [nn.Dense(1, name=f"task_{task}")(features) for task in self.tasks]
        return jnp.concatenate(logits, axis=1)


# --- Dense prediction: SegNet, alone and with an attention network for each task (MTAN)


class ConvBlock(nn.Module):
    """Convolutions of 3 x 3, each with batch normalisation and ReLU."""

    channels: int
    convolutions: int = 1

    @nn.compact
    def __call__(self, features, train):
        for _ in range(self.convolutions):
            convolution = nn.Conv(
                self.channels, (3, 3), kernel_init=nn.initializers.xavier_normal()
            )
            features = nn.relu(batch_norm(train)(convolution(features)))
        return features


class Attention(nn.Module):
    """A mask between 0 and 1 for every position and channel of the shared features."""

    channels: int

    @nn.compact
    def __call__(self, features, train):
        convolution = functools.partial(
            nn.Conv, self.channels, (1, 1), kernel_init=nn.initializers.xavier_normal()
        )
        features = nn.relu(batch_norm(train)(convolution()(features)))
        return nn.sigmoid(batch_norm(train)(convolution()(features)))


class PixelHead(nn.Module):
    """A task's prediction for every pixel, from features of the image's size."""

    channels: int

    @nn.compact
    def __call__(self, features):
        init = nn.initializers.xavier_normal()
        features = nn.Conv(features.shape[-1], (3, 3), kernel_init=init)(features)
        return nn.Conv(self.channels, (1, 1), kernel_init=init)(features)


def pool_with_places(features):
    """Max-pooling of 2 x 2, and which of the four each maximum was, as a mask for `unpool`."""
    batch, height, width, channels = features.shape
    windows = features.reshape(batch, height // 2, 2, width // 2, 2, channels)
    windows = windows.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, height // 2, width // 2, 4, channels
    )
    places = jax.nn.one_hot(jnp.argmax(windows, axis=3), 4, axis=3, dtype=features.dtype)
    return jnp.sum(windows * places, axis=3), places


def unpool(features, places):
    """Puts every value where its maximum came from, with zeros around."""
    batch, height, width, _, channels = places.shape
    windows = (features[:, :, :, None] * places).reshape(batch, height, width, 2, 2, channels)
    return windows.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels)


def upsample(features, factor, method="bilinear"):
    batch, height, width, channels = features.shape
    return jax.image.resize(features, (batch, factor * height, factor * width, channels), method)


class SegNet(nn.Module):
    """VGG-16's convolutions down and up again, with the places of the maxima kept.

    With `attention` it is SegNet-MTAN (Liu, Johns and Davison 2019): each task looks at the
    shared features of every level through a mask of its own. Without it the tasks share all but
    their heads. Height and width are to be multiples of 32.

    It departs from the authors' code in one point: features are upsampled with pixels as areas,
    not with aligned corners.
    """

    outputs: dict[str, int]  # task -> channels
    attention: bool = True
    width: int = 64

    @nn.compact
    def __call__(self, images, train):
        # By level, from the size of the image down.
        channels = [self.width * factor for factor in (1, 2, 4, 8, 8)]
        more = (1, 1, 2, 2, 2)
        back = [channels[0], *channels[:4]]
        attended_down = [*channels[1:], channels[4]]
        attended_up = [channels[0], *channels[:3], channels[4]]

        first_down, down, places = [], [], []
        features = images
        for level in range(5):
            first_down.append(ConvBlock(channels[level], name=f"down_{level}")(features, train))
            block = ConvBlock(channels[level], more[level], name=f"down_{level}_more")
            down.append(block(first_down[-1], train))
            features, place = pool_with_places(down[-1])
            places.append(place)
        unpooled, up = {}, {}
        for level in reversed(range(5)):
            unpooled[level] = unpool(features, places[level])
            block = ConvBlock(back[level], name=f"up_{level}")
            more_blocks = ConvBlock(back[level], more[level], name=f"up_{level}_more")
            features = up[level] = more_blocks(block(unpooled[level], train), train)

        down_blocks, up_blocks = [], []
        if self.attention:
            # One set of blocks takes the masked features of all tasks from level to level.
            down_blocks = [
                ConvBlock(n, name=f"attended_down_{i}") for i, n in enumerate(attended_down)
            ]
            up_blocks = [ConvBlock(n, name=f"attended_up_{i}") for i, n in enumerate(attended_up)]
        predictions = {}
        for task, outputs in self.outputs.items():
            if self.attention:
                for level in range(5):
                    seen = first_down[level]
                    if level:
                        seen = jnp.concatenate([seen, features], axis=-1)
                    mask = Attention(channels[level], name=f"task_{task}_down_{level}")(seen, train)
                    features = down_blocks[level](mask * down[level], train)
                    features = nn.max_pool(features, (2, 2), (2, 2))
                for level in reversed(range(5)):
                    features = up_blocks[level](upsample(features, 2), train)
                    seen = jnp.concatenate([unpooled[level], features], axis=-1)
                    mask = Attention(back[level], name=f"task_{task}_up_{level}")(seen, train)
                    features = mask * up[level]
            predictions[task] = PixelHead(outputs, name=f"task_{task}_head")(features)
        return predictions


# --- Residual networks, for whole images and, dilated, for PSPNet


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut: ResNet-18 and -34."""

    channels: int
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, features, train):
        first, second = self.dilation
        inner = convolve(features, self.channels, 3, self.stride, first)
        inner = nn.relu(batch_norm(train)(inner))
        inner = convolve(inner, self.channels, 3, dilation=second)
        inner = batch_norm(train)(inner)
        return nn.relu(inner + shortcut(features, inner, self.stride, train))


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 beside a shortcut: ResNet-50 and deeper."""

    channels: int
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, features, train):
        inner = nn.relu(batch_norm(train)(convolve(features, self.channels, 1)))
        inner = convolve(inner, self.channels, 3, self.stride, self.dilation[0])
        inner = nn.relu(batch_norm(train)(inner))
        inner = batch_norm(train)(convolve(inner, 4 * self.channels, 1))
        return nn.relu(inner + shortcut(features, inner, self.stride, train))


def convolve(features, channels, size, stride=1, dilation=1):
    """Padded as PyTorch does: alike on all sides, also where the stride is 2."""
    return nn.Conv(
        channels,
        (size, size),
        stride,
        padding=dilation * (size // 2),
        kernel_dilation=dilation,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
    )(features)


def shortcut(features, inner, stride, train):
    if features.shape == inner.shape:
        return features
    return batch_norm(train)(convolve(features, inner.shape[-1], 1, stride))


class ResNet(nn.Module):
    """The features of the last of four stages, 32 times smaller than the image.

    With `dilated` the last two stages widen their kernels where they would halve the image: the
    features are then 8 times smaller.
    """

    block: Callable[..., nn.Module]
    stages: tuple[int, ...]
    dilated: bool = False
    width: int = 64

    @nn.compact
    def __call__(self, images, train):
        features = convolve(images, self.width, 7, 2)
        features = nn.relu(batch_norm(train)(features))
        sides = ((1, 1), (1, 1))
        features = nn.max_pool(
            features,
            (3, 3),
            (2, 2),
            padding=sides,  # pyright: ignore[reportArgumentType]  # it takes pairs, too
        )
        for stage, blocks in enumerate(self.stages):
            widened = 2 ** (stage - 1) if self.dilated and stage >= 2 else 1
            for block in range(blocks):
                stride, dilation = 1, (widened, widened)
                if block == 0 and stage > 0:
                    stride = 1 if widened > 1 else 2
                    dilation = (max(1, widened // 2), widened)
                make = self.block(self.width * 2**stage, stride, dilation)
                features = make(features, train)
        return features


def normalise(images):
    """From bytes to the mean and deviation of ImageNet, as residual networks are used to."""
    mean = jnp.array([0.485, 0.456, 0.406]).reshape(1, 1, 1, 3)
    deviation = jnp.array([0.229, 0.224, 0.225]).reshape(1, 1, 1, 3)
    return (images / 255 - mean) / deviation


resnet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))


class ImageClassifier(nn.Module):
    """A residual network, the mean over positions, and a linear head for each task.

    Returns a list of logits, (batch, classes), one array a task.
    """

    encoder: nn.Module
    outputs: dict[str, int]  # task -> classes

    @nn.compact
    def __call__(self, images, train):
        features = jnp.mean(self.encoder(images, train), axis=(1, 2))
        return [
            nn.Dense(outputs, name=f"task_{task}")(features)
            for task, outputs in self.outputs.items()
        ]


class PSPNet(nn.Module):
    """A dilated ResNet-50 that the tasks share, and a pyramid-pooling decoder for each.

    Predictions are `upsampled` times as large as the encoder's features; with 8 they have the
    size of the image.
    """

    outputs: dict[str, int]  # task -> channels
    upsampled: int = 8
    width: int = 64

    @nn.compact
    def __call__(self, images, train):
        features = resnet50(dilated=True, width=self.width, name="encoder")(images, train)
        predictions = {}
        for task, outputs in self.outputs.items():
            decoder = PyramidPooling(outputs, 8 * self.width, name=f"task_{task}")
            # As in the authors' code, every pixel takes the nearest prediction.
            predictions[task] = upsample(decoder(features, train), self.upsampled, "nearest")
        return predictions


class PyramidPooling(nn.Module):
    """The features beside their means over 1 x 1, 2 x 2, 3 x 3 and 6 x 6 parts of the image."""

    outputs: int
    channels: int

    @nn.compact
    def __call__(self, features, train):
        batch, height, width, _ = features.shape
        seen = [features]
        for parts in (1, 2, 3, 6):
            pooled = convolve(average_parts(features, parts), self.channels, 1)
            pooled = nn.relu(batch_norm(train)(pooled))
            shape = (batch, height, width, self.channels)
            seen.append(jax.image.resize(pooled, shape, "bilinear"))
        features = convolve(jnp.concatenate(seen, axis=-1), self.channels, 3)
        features = nn.relu(batch_norm(train)(features))
        return nn.Conv(self.outputs, (1, 1))(features)


def average_parts(features, parts):
    """Means over parts x parts regions, which overlap by a row where they do not divide evenly."""
    for axis in (1, 2):
        size = features.shape[axis]
        bounds = [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
        means = [
            jnp.mean(lax.slice_in_dim(features, start, stop, axis=axis), axis, keepdims=True)
            for start, stop in bounds
        ]
        features = jnp.concatenate(means, axis)
    return features
