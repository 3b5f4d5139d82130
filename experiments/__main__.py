"""``bagua-jax``, also ``python -m bagua_jax.experiments``: first Ctrl-C, then imports.

The command is installed with the core, too, and then says what it needs.
"""

import sys

import bagua_jax
from bagua_jax import extras
from bagua_jax.experiments.commands import terminal

__all__ = ["main"]


def main() -> int:
    """Run the command line of this process, if what it needs is installed.

    Returns:
        Exit status, as of :func:`bagua_jax.experiments.cli.main`.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"bagua-jax {bagua_jax.__version__}")
        return 0
    terminal.stop_at_once()
    try:
        from bagua_jax.experiments import cli
    except ModuleNotFoundError as error:
        message = extras.missing(error, "the command line")
        if not message:
            raise
        print(f"bagua-jax: {message}", file=sys.stderr)
        return 2
    status = cli.main()
    terminal.stop_at_once()
    return status


if __name__ == "__main__":
    sys.exit(main())
