"""Subcommands: each module holds the flags as a dataclass and ``main(command)``.

None imports jax before ``main`` runs: help comes at once, and host devices can be made
before jax starts.
"""
