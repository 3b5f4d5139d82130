"""Which extra of the package brings what: jax, optax and numpy alone are the core."""

from collections.abc import Mapping

__all__ = ["EXTRAS", "missing"]

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "experiments": (
        *("bible", "flax", "matplotlib", "mlxtend", "orbax", "rich"),
        *("scipy", "sklearn", "tensorstore", "tyro", "yaml"),
    ),
    "testing": ("chex", "pytest"),
    "async": ("zmq",),
    "mpi": ("mpi4py",),
    "plan": ("platformdirs",),
}
"""Extra: the modules that it brings, by the names under which they are imported."""


def missing(error: ImportError, who: str) -> str:
    """Explain an import that failed.

    Args:
        error: what the import raised.
        who: what needs the module, as the message's subject.

    Returns:
        A message that names the extra; empty if no extra brings the module.

    Example:
        >>> missing(ModuleNotFoundError(name="zmq"), "PairGossip")
        "PairGossip needs zmq, which is not installed: pip install 'bagua-jax[async]'."
        >>> missing(ModuleNotFoundError(name="antigravity2"), "PairGossip")
        ''
    """
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return (
                f"{who} needs {module}, which is not installed: "
                f"pip install 'bagua-jax[{extra}]'."
            )
    return ""
