r"""Tasks: what is trained, on which data, and how it is judged.

A task of your own is a :class:`Task`, or a function without arguments that returns one,
in any module that Python can import from where you stand::

    # my_package/my_module.py
    import jax, jax.numpy as jnp, numpy as np
    from bagua_jax.experiments.tasks import Data, Task

    def my_task():
        '''Least squares on points of a line.'''

        def init(key):
            return {"slope": jnp.zeros(()), "offset": jnp.zeros(())}

        def loss(params, batch):
            prediction = params["slope"] * batch["x"] + params["offset"]
            return jnp.mean((prediction - batch["y"]) ** 2)

        def data(seed, workers):
            x = np.random.default_rng(seed).normal(size=640).astype(np.float32)
            train = {"x": x[:512], "y": 3 * x[:512] + 1}
            test = {"x": x[512:], "y": 3 * x[512:] + 1}
            return Data(train, labels=(x[:512] > 0).astype(int), test=test)

        def evaluate(params, test):
            return {"loss": loss(params, test)}

        return Task("a line", init, loss, data, evaluate)

and a config names it: ``task: my_package.my_module:my_task``.
"""

from bagua_jax.experiments.spec import names
from bagua_jax.experiments.spec.config import ConfigError, quote
from bagua_jax.experiments.spec.messages import blame
from bagua_jax.experiments.tasks.base import Task
from bagua_jax.experiments.tasks.counterexamples import (
    sign_counterexamples,
    top1_counterexample,
)
from bagua_jax.experiments.tasks.data import Data
from bagua_jax.experiments.tasks.images import digits, mnist5k
from bagua_jax.experiments.tasks.problems import (
    adult,
    breast_cancer,
    logistic,
    quadratic,
)
from bagua_jax.experiments.tasks.text import kjv

__all__ = [
    "TASKS",
    "Data",
    "Task",
    "adult",
    "breast_cancer",
    "digits",
    "kjv",
    "load",
    "logistic",
    "mnist5k",
    "quadratic",
    "sign_counterexamples",
    "top1_counterexample",
]

TASKS = {
    "mnist5k": mnist5k,
    "digits": digits,
    "kjv": kjv,
    "quadratic": quadratic,
    "logistic": logistic,
    "breast_cancer": breast_cancer,
    "adult": adult,
    "sign_counterexamples": sign_counterexamples,
    "top1_counterexample": top1_counterexample,
}
"""Every task by name."""


def load(name: str) -> Task:
    """Find a task.

    Args:
        name: in ``TASKS``, or ``package.module:attribute`` of your own. The working
            directory is searched after everything else.

    Raises:
        ConfigError: if there is none.
    """
    found = names.find(name, TASKS, "task", "task")
    try:
        task = found() if callable(found) else found
    except Exception as error:
        raise ConfigError(f"task: {quote(name)} failed: {blame(error)}.") from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"task: {quote(name)} must be a Task or a function that returns one, got "
            f"{type(task).__name__}."
        )
    return task
