"""Names in configs: those of a registry, and ``module:name`` for what a user wrote."""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from bagua_jax.experiments.spec.config import ConfigError, quote, unknown
from bagua_jax.experiments.spec.messages import blame

__all__ = ["find", "is_own"]


def is_own(name: str) -> bool:
    """Tell whether a name is written as ``module:name``.

    >>> is_own("my_package.my_module:my_task"), is_own("quadratic")
    (True, False)
    """
    return ":" in name


def find(name: str, registry: Mapping[str, Any], what: str, where: str) -> Any:
    """Look a name up in a registry, or import it.

    Args:
        name: a key of the registry, or ``package.module:attribute`` of your own. The
            working directory is searched after everything else.
        registry: what is shipped.
        what: the kind of thing, for errors, such as "task".
        where: the field, for errors.

    Raises:
        ConfigError: if there is no such name, it cannot be imported, or it belongs to
            Python's standard library.

    Example:
        >>> find("numpy:pi", {}, "number", "x") > 3
        True
    """
    if name in registry:
        return registry[name]
    if not is_own(name):
        raise unknown(where, name, registry, f"{what} (and no package.module:name)")
    module_name, _, attribute = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(  # os:system is no compressor, whatever it would do
            f"{where}: {quote(name)} is Python's own. Name a module of yours."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{where}: {quote(name)} cannot be imported: {blame(error)}. The "
            "working directory and PYTHONPATH are searched."
        ) from error
    if not hasattr(module, attribute):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise unknown(where, attribute, public, f"name in {module_name}")
    return getattr(module, attribute)
