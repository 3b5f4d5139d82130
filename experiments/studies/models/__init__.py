"""The five workloads of BAGUA's evaluation at their true sizes.

They are compiled and counted, never trained here: what a network sends depends on the
shapes of its parameters alone. Each is a flax module; this table says what a step of
one of the original's workers sees, and which of these numbers are confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

__all__ = ["WORKLOADS", "Workload", "flops", "parameters"]


class Workload(NamedTuple):
    """A network, and what one worker feeds it in a step.

    Attributes:
        title: what tables call it.
        network: makes the module at its true size.
        inputs: the shape and dtype of each argument, without the batch.
        batch: samples of a step and worker.
        sizes: where these sizes come from.
    """

    title: str
    network: Callable[[], nn.Module]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    batch: int
    sizes: str


def _vgg16() -> nn.Module:
    from bagua_jax.experiments.studies.models.vgg16 import VGG16

    return VGG16()


def _bert_large() -> nn.Module:
    from bagua_jax.experiments.studies.models.bert import bert_large

    return bert_large()


def _bert_base() -> nn.Module:
    from bagua_jax.experiments.studies.models.bert import bert_base

    return bert_base()


def _speech_transformer() -> nn.Module:
    from bagua_jax.experiments.studies.models.speech_transformer import (
        SpeechTransformer,
    )

    return SpeechTransformer()


def _lstm_alexnet() -> nn.Module:
    from bagua_jax.experiments.studies.models.lstm_alexnet import LSTMAlexNet

    return LSTMAlexNet()


_TOKENS = ((384,), "int32")
_IMAGE = ((224, 224, 3), "float32")

WORKLOADS: Mapping[str, Workload] = {
    "vgg16": Workload(
        "VGG16, ImageNet", _vgg16, (_IMAGE,), 32, "confirmed: network and batch"
    ),
    "bert_large": Workload(
        "BERT-Large, SQuAD",
        _bert_large,
        (_TOKENS, _TOKENS),
        6,
        "confirmed: network, batch; 384 tokens as in the original's example",
    ),
    "bert_base": Workload(
        "BERT-Base",
        _bert_base,
        (_TOKENS, _TOKENS),
        6,
        "network from its paper; head, batch and length are our choice",
    ),
    "speech_transformer": Workload(
        "speech transformer, AISHELL-2",
        _speech_transformer,
        (((800, 80), "float32"), ((30,), "int32")),
        32,
        "batch confirmed; every size of the network is our choice",
    ),
    "lstm_alexnet": Workload(
        "LSTM + AlexNet",
        _lstm_alexnet,
        (_IMAGE, ((32,), "int32")),
        32,
        "every size is our choice",
    ),
}
"""Every workload by name."""


def _inputs(workload: Workload, batch: int) -> list[jax.ShapeDtypeStruct]:
    import jax

    return [jax.ShapeDtypeStruct((batch, *s), dtype) for s, dtype in workload.inputs]


def parameters(workload: Workload) -> Any:
    """Return the shapes of a workload's parameters; nothing is allocated.

    Returns:
        A tree of float32 ``jax.ShapeDtypeStruct``.

    Example:
        >>> import jax
        >>> leaves = jax.tree.leaves(parameters(WORKLOADS["vgg16"]))
        >>> len(leaves), f"{sum(leaf.size for leaf in leaves):,}"
        (32, '138,357,544')
    """
    import jax

    network, key = workload.network(), jax.random.key(0)
    return jax.eval_shape(network.init, key, *_inputs(workload, 1))["params"]


def flops(workload: Workload) -> float:
    """Count the floating-point operations of one sample, forward and backward.

    Read from the program of the gradient before XLA optimizes it.

    Returns:
        Operations; a multiplication and an addition are two.
    """
    import jax
    import jax.numpy as jnp

    network, params = workload.network(), parameters(workload)

    def loss(params, *inputs):
        output = jnp.asarray(network.apply({"params": params}, *inputs))
        return jnp.mean(output**2)

    lowered = jax.jit(jax.grad(loss)).lower(params, *_inputs(workload, 1))
    cost = lowered.cost_analysis() or {}
    return float(cost["flops"])
