"""VGG16, the image classifier of BAGUA's evaluation."""

from collections.abc import Sequence

import jax
from flax import linen as nn

__all__ = ["VGG16"]


class VGG16(nn.Module):
    """Thirteen convolutions of 3x3, five times halved, and three dense layers.

    At its defaults, for images of 224x224 pixels, 138,357,544 parameters, of which the
    first dense layer holds three quarters. Dropout is left out: nothing is trained
    here, and it communicates nothing.

    Attributes:
        stages: channels of each convolution; every stage ends in a 2x2 maximum.
        hidden: units of the two hidden dense layers.
        classes: of images.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = VGG16(stages=((4,), (8, 8)), hidden=16, classes=10)
        >>> image = jnp.zeros((2, 32, 32, 3))
        >>> logits, params = jax.eval_shape(
        ...     small.init_with_output, jax.random.key(0), image
        ... )
        >>> logits.shape
        (2, 10)

    References:
        Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale Image
        Recognition`, 2014, configuration D.
    """

    stages: Sequence[Sequence[int]] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )
    hidden: int = 4096
    classes: int = 1000

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:  # [B, H, W, 3] -> [B, classes]
        """Return the logits of each class."""
        x = image
        for stage in self.stages:
            for channels in stage:
                x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.classes)(x)
