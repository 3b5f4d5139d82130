"""The workloads of BAGUA's evaluation: their sizes, and that they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax.experiments.studies.models import WORKLOADS, flops, parameters
from bagua_jax.experiments.studies.models.bert import BERT
from bagua_jax.experiments.studies.models.lstm_alexnet import LSTMAlexNet
from bagua_jax.experiments.studies.models.speech_transformer import SpeechTransformer
from bagua_jax.experiments.studies.models.vgg16 import VGG16


def bert(width: int, layers: int, hidden: int) -> int:
    """Count by hand: embeddings and their norm, layers, and a head without a bias."""
    embeddings = (30522 + 512 + 2 + 2) * width
    attention = 4 * (width * width + width)
    perceptron = 2 * width * hidden + hidden + width
    return embeddings + layers * (attention + perceptron + 4 * width) + 2 * width


def speech(d: int = 512, inner: int = 2048, words: int = 5000) -> int:
    norm, attention = 2 * d, 4 * (d * d + d)
    perceptron = 2 * d * inner + inner + d
    front = (9 * 64 + 64) + (9 * 64 * 64 + 64) + (20 * 64 * d + d)
    encoder = 12 * (attention + perceptron + 2 * norm) + norm
    decoder = 6 * (2 * attention + perceptron + 3 * norm) + norm
    return front + encoder + decoder + words * d + (d * words + words)


def lstm_alexnet() -> int:
    sizes = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    picture = sum(a * b * k * k + b for a, b, k in sizes)
    picture += 9216 * 4096 + 4096 + 4096 * 4096 + 4096
    words = 30_000 * 512 + sum(4 * ((i + 1024) * 1024 + 1024) for i in (512, 1024))
    return picture + words + (4096 + 1024) * 1000 + 1000


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg16", 138_357_544),
        ("bert_large", 334_094_336),
        ("bert_base", bert(768, 12, 3072)),
        ("speech_transformer", speech()),
        ("lstm_alexnet", lstm_alexnet()),
    ],
)
def test_sizes(name, count):
    leaves = jax.tree.leaves(parameters(WORKLOADS[name]))
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    stated = f"{count:,}"
    module = type(WORKLOADS[name].network()).__module__
    pages = __import__(module, fromlist=["_"])
    docs = " ".join(filter(None, (x.__doc__ for x in vars(pages).values())))
    assert stated in docs, f"the docstrings of {module} state another size"


def test_the_formula_of_bert_gives_the_confirmed_size():
    assert bert(1024, 24, 4096) == 334_094_336


SMALL = {
    "vgg16": (
        VGG16(stages=((4,), (4, 8)), hidden=8, classes=5),
        (((2, 16, 16, 3), "float32"),),
        (2, 5),
    ),
    "bert": (
        BERT(width=8, layers=2, heads=2, hidden=16, vocabulary=20, window=10),
        (((2, 6), "int32"), ((2, 6), "int32")),
        (2, 6, 2),
    ),
    "speech_transformer": (
        SpeechTransformer(8, 1, 1, heads=2, hidden=16, vocabulary=7),
        (((2, 12, 8), "float32"), ((2, 4), "int32")),
        (2, 4, 7),
    ),
    "lstm_alexnet": (
        LSTMAlexNet(((4, 5, 2), (4, 3, 1), (4, 3, 1)), 8, 6, 9, 5, classes=3),
        (((2, 40, 40, 3), "float32"), ((2, 3), "int32")),
        (2, 3),
    ),
}


def drawn(network, *inputs) -> dict:
    """Draw parameters in NumPy: initializers cost a compilation each."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_computes_and_every_parameter_matters(name):
    network, inputs, expected = SMALL[name]
    rng = np.random.default_rng(0)
    values = [
        rng.integers(0, 2, shape).astype(dtype)
        if dtype == "int32"
        else rng.normal(size=shape).astype(dtype)
        for shape, dtype in inputs
    ]

    def loss(params):
        output = network.apply(params, *values)
        assert output.shape == expected
        return jnp.sum(jnp.sin(output))

    value, grads = jax.jit(jax.value_and_grad(loss))(drawn(network, *values))
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        # A softmax ignores what it adds to all: biases of keys have no gradient.
        if not ("key" in str(path) and "bias" in str(path)):
            assert np.asarray(grad).any(), jax.tree_util.keystr(path)


def test_the_decoder_does_not_hear_the_future():
    network, inputs, _ = SMALL["speech_transformer"]
    sound, text = np.ones(inputs[0][0], "float32"), np.zeros(inputs[1][0], "int32")
    changed = text.copy()
    changed[:, -1] = 3
    params, run = drawn(network, sound, text), jax.jit(network.apply)
    before, after = (run(params, sound, characters) for characters in (text, changed))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert (before[:, -1] != after[:, -1]).any()


def test_operations_of_a_sample_are_those_of_the_layers():
    # Convolutions and dense layers of VGG16 at 224 x 224: 15.47e9 multiplications
    # forward (known), two operations each, three times with the backward pass.
    assert flops(WORKLOADS["vgg16"]) == pytest.approx(6 * 15.47e9, rel=0.05)
