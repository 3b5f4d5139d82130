"""Where workers live: simulated under vmap, or on devices under shard_map."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bagua_jax import processes
from bagua_jax.primitives import AxisName, on_nodes, varying_axes, worker_local

__all__ = ["Workers", "make_mesh"]

_SAME = P()  # equal on all workers


def make_mesh(
    shape: tuple[int, ...], axis_names: tuple[str, ...], devices: Any = None
) -> Mesh:
    """Make a mesh whose axes JAX leaves to ``shard_map``: the one place that does.

    ``jax.make_mesh`` alone makes explicit axes, under which ``shard_map`` refuses
    arrays that do not have the sharding yet.

    Args:
        shape: devices along each axis.
        axis_names: a name for each.
        devices: which devices; as many as needed of ``jax.devices()`` where ``None``.

    Returns:
        A mesh with ``AxisType.Auto`` axes.

    Raises:
        ValueError: if there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(shape)
    if len(devices) < needed:
        kind = f" ({devices[0].platform})" if devices else ""
        wanted = " x ".join(map("{} {}".format, shape, axis_names))
        raise ValueError(
            f"Workers.devices: {wanted} need {needed} devices, and there are "
            f"{len(devices)}{kind}. On a CPU call "
            f'jax.config.update("jax_num_cpu_devices", {needed}) before the first use '
            "of JAX, or use Workers.simulate."
        )
    grid = np.asarray(devices[:needed]).reshape(shape)
    return Mesh(grid, axis_names, axis_types=(AxisType.Auto,) * len(shape))


@dataclass(frozen=True)
class Workers:
    """The workers of a data-parallel program, and how per-worker functions run on them.

    A per-worker function is written once, without a worker axis. At the boundary a leaf
    that varies between workers carries a leading axis of length ``num_workers``
    (``P("workers")``), and a leaf that is equal on all is held once (``P()``). Which is
    which is read off JAX's types.

    Make one with :meth:`simulate`, :meth:`devices` or :meth:`abstract`.

    Attributes:
        shape: workers along each axis; ``(n,)``, or ``(nodes, devices per node)``.
        axis_name: what algorithms are given: a name, or ``("node", "local")``.
        mesh: the devices; abstract where there are none, ``None`` in simulation. May
            have further axes, which are left to GSPMD: then each worker is a group of
            devices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bagua_jax import primitives
        >>> workers = Workers.simulate(4)
        >>> def deviation(x):
        ...     return x - primitives.c_fp_s(x, axis_name="workers")
        >>> program = workers.spmd(deviation, in_specs=workers.spec)
        >>> program(jnp.arange(4.0)[:, None]).ravel().tolist()
        [-1.5, -0.5, 0.5, 1.5]
    """

    shape: tuple[int, ...]
    axis_name: AxisName
    mesh: Mesh | AbstractMesh | None = None

    @classmethod
    def simulate(
        cls, n: int | tuple[int, int], axis_name: AxisName | None = None
    ) -> "Workers":
        """Simulate n workers on one device, under ``jax.vmap``.

        Args:
            n: number of workers, or (nodes, devices per node).
            axis_name: ``"workers"``, or ``("node", "local")``, where ``None``.

        Raises:
            ValueError: if n is not positive, or does not fit the axis names.
        """
        return cls(*_shape_and_axis("Workers.simulate", n, axis_name))

    @classmethod
    def devices(
        cls,
        n: int | tuple[int, int] | None = None,
        axis_name: AxisName | None = None,
        devices: Any = None,
        shards: Mapping[str, int] | None = None,
    ) -> "Workers":
        """Put one worker on each device, or group of devices, under ``jax.shard_map``.

        Args:
            n: number of workers, or (nodes, devices per node); every device of every
                process where ``None``.
            axis_name: ``"workers"``, or ``("node", "local")``, where ``None``.
            devices: which devices; ``jax.devices()`` where ``None``.
            shards: further axes of the mesh and their sizes, such as ``{"model": 2}``:
                a worker is a group of so many devices, over which GSPMD shards its
                arrays as they were placed (see :func:`bagua_jax.sharded`).

        Raises:
            ValueError: if there are fewer devices than needed, or axes of one name, or
                processes are joined on CPUs with JAX's compilation cache on.
        """
        processes.require_own_programs("Workers.devices")
        shards = dict(shards or {})
        if n is None:
            n = len(jax.devices() if devices is None else devices)
            n //= math.prod(shards.values())
        shape, axis_name = _shape_and_axis("Workers.devices", n, axis_name)
        names = (axis_name,) if isinstance(axis_name, str) else axis_name
        if set(names) & set(shards) or not all(size >= 1 for size in shards.values()):
            raise ValueError(
                "Workers.devices: shards must be positive sizes of axes other than the "
                f"workers' {names}; got {shards}."
            )
        mesh = make_mesh((*shape, *shards.values()), (*names, *shards), devices)
        return cls(shape, axis_name, mesh)

    @classmethod
    def abstract(
        cls, n: int | tuple[int, int], axis_name: AxisName | None = None
    ) -> "Workers":
        """Name workers that are nowhere: their programs can be lowered, not run.

        Args:
            n: number of workers, or (nodes, devices per node).
            axis_name: ``"workers"``, or ``("node", "local")``, where ``None``.

        Raises:
            ValueError: if n is not positive, or does not fit the axis names.
        """
        shape, axis_name = _shape_and_axis("Workers.abstract", n, axis_name)
        names = (axis_name,) if isinstance(axis_name, str) else axis_name
        return cls(shape, axis_name, _abstract_mesh(shape, names))

    @property
    def num_workers(self) -> int:
        """Number of workers n."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axis names, one or two."""
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name

    @property
    def spec(self) -> P:
        """The spec of a leaf that varies: ``P("workers")``."""
        return P(self.axis_name)

    @property
    def own(self) -> np.ndarray:
        """Numbers of this process's workers: all of them where there is one process."""
        if not isinstance(self.mesh, Mesh):
            return np.arange(self.num_workers)
        here = jax.process_index()
        return np.flatnonzero([d.process_index == here for d in self.mesh.devices.flat])

    def stack(self, tree: Any) -> Any:
        """Make worker-stacked arrays of what every process has for its own workers.

        Args:
            tree: leaves with a leading axis over :attr:`own`, in that order.

        Returns:
            Leaves [n, ...] over all processes, each row on its worker's device; in
            simulation the tree as it is. Nothing is communicated.
        """
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, self.spec)

        def place(x):
            shape = (self.num_workers, *np.shape(x)[1:])
            return jax.make_array_from_process_local_data(
                sharding, np.asarray(x), shape
            )

        return jax.tree.map(place, tree)

    def rows(self, x: jax.Array) -> np.ndarray:
        """Copy the rows of this process's workers out of a worker-stacked array.

        Args:
            x: [n, ...], each row on its worker's device.

        Returns:
            [len(own), ...], in the order of :attr:`own`. Nothing is communicated.
        """
        if self.mesh is None or jax.process_count() == 1:
            return np.asarray(x)
        shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    def specs(self, fn: Callable[..., Any], *args: Any, in_specs: Any = _SAME) -> Any:
        """Infer which outputs of a per-worker function vary between workers.

        The function is traced under ``shard_map`` on an abstract mesh, and the type of
        each output is read; nothing runs.

        Args:
            fn: per-worker function.
            *args: what it will be called with at the boundary: arrays or
                ``jax.ShapeDtypeStruct``, with the leading axis where the spec says so.
            in_specs: one spec for all arguments, or a tuple with a spec or a tree of
                specs (a prefix) for each; ``P()`` or :attr:`spec`.

        Returns:
            A tree like the output, ``P()`` or :attr:`spec` at each leaf.
        """
        flat_specs = self._flat_specs(args, in_specs, "Workers.specs")
        return self._trace(fn, args, flat_specs)

    def spmd(self, fn: Callable[..., Any], in_specs: Any = _SAME, **jit: Any) -> Any:
        """Compile a per-worker function for all workers.

        Args:
            fn: per-worker function of positional arguments.
            in_specs: one spec for all arguments, or a tuple with a spec or a tree of
                specs (a prefix) for each; ``P()`` for what is equal on all workers,
                :attr:`spec` for what has a leading worker axis.
            **jit: options of ``jax.jit``, such as ``donate_argnums``.

        Returns:
            A function of the boundary's arrays with the attribute ``lower``, as
            ``jax.jit`` gives it. On CPU devices each call waits for its result: with
            more host devices than cores, two steps in flight can deadlock on jax 0.10.

        Raises:
            ValueError: when called, if a leaf that the specs call worker-stacked has no
                leading axis of length ``num_workers``.
        """

        def program(*args):
            flat_specs = self._flat_specs(args, in_specs, "Workers.spmd")
            out_specs = self._trace(fn, args, flat_specs)
            run = self._vmapped if self.mesh is None else self._sharded
            return run(fn, args, flat_specs, out_specs)

        program.__name__ = getattr(fn, "__name__", "program")
        program.__doc__ = fn.__doc__
        compiled = jax.jit(program, **jit)
        on = self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else ""
        if on != "cpu":
            return compiled

        def blocking(*args):
            return jax.block_until_ready(compiled(*args))

        blocking.lower = compiled.lower  # type: ignore[attr-defined]
        blocking.__name__ = program.__name__
        blocking.__doc__ = fn.__doc__
        return blocking

    def placed(self, args: tuple, in_specs: Any = _SAME) -> tuple:
        """Describe a program's arguments with their shardings, to lower it ahead.

        Args:
            args: arrays or ``jax.ShapeDtypeStruct``, as :meth:`spmd`'s program takes.
            in_specs: as in :meth:`spmd`.

        Returns:
            ``args`` with a ``jax.ShapeDtypeStruct`` at each leaf.

        Raises:
            ValueError: specs that do not fit, or simulated workers, which have no mesh.
        """
        if self.mesh is None:
            raise ValueError(
                "Workers.placed: the workers must have a mesh; got simulated ones. Use "
                "Workers.devices or Workers.abstract."
            )
        specs = self._flat_specs(args, in_specs, "Workers.placed")
        leaves, structure = jax.tree.flatten(args)
        structs = [
            jax.ShapeDtypeStruct(
                np.shape(leaf),
                jax.numpy.result_type(leaf),
                sharding=NamedSharding(self.mesh, spec),
            )
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, structs)

    # --- how it is done ---

    def _flat_specs(self, args: tuple, in_specs: Any, caller: str) -> list[P]:
        """Broadcast the specs over the leaves, and check the leaves against them."""
        if isinstance(in_specs, P):
            in_specs = (in_specs,) * len(args)
        try:
            full = jax.tree.broadcast(
                tuple(in_specs), tuple(args), is_leaf=lambda s: isinstance(s, P)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{caller}: in_specs must be one spec, or a tuple with a spec or tree "
                f"of specs (a prefix) for each of the {len(args)} arguments; got "
                f"{in_specs!r}: {error}"
            ) from None
        flat = jax.tree.leaves(full, is_leaf=lambda s: isinstance(s, P))
        paths = jax.tree_util.tree_leaves_with_path(args)
        for (path, leaf), spec in zip(paths, flat, strict=True):
            name = jax.tree_util.keystr(path)
            if spec not in (P(), self.spec):
                raise ValueError(
                    f"{caller}: specs are P() or {self.spec}, got {spec} for argument "
                    f"{name}. Shard inside the function for anything else."
                )
            shape = np.shape(leaf)
            if spec == self.spec and shape[:1] != (self.num_workers,):
                raise ValueError(
                    f"{caller}: argument {name} is {self.spec}, so its leading axis "
                    f"must hold the {self.num_workers} workers; got shape {shape}."
                )
        return flat

    def _body(self, fn, args, flat_specs, finish):
        """Wrap fn for shard_map: drop the leading axis going in."""
        structure = jax.tree.structure(args)

        def body(*leaves):
            local = [
                leaf[0] if spec == self.spec else leaf
                for leaf, spec in zip(leaves, flat_specs, strict=True)
            ]
            return finish(fn(*jax.tree.unflatten(structure, local)))

        return body

    def _trace(self, fn, args, flat_specs):
        found: dict[str, Any] = {}

        def finish(out):
            found["specs"] = jax.tree.map(
                lambda x: self.spec if varying_axes(x) & set(self.axes) else P(), out
            )
            return jax.tree.map(lambda x: worker_local(x, self.axis_name)[None], out)

        shape = dict(zip(self.axes, self.shape, strict=True))
        shape |= self.mesh.shape if self.mesh is not None else {}
        mesh = _abstract_mesh(tuple(shape.values()), tuple(shape))
        body = self._body(fn, args, flat_specs, lambda out: finish(_arrays(out)))
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(flat_specs),
            out_specs=self.spec,
            axis_names=set(self.axes),
        )
        jax.eval_shape(mapped, *map(_abstract, jax.tree.leaves(args)))
        return found["specs"]

    def _sharded(self, fn, args, flat_specs, out_specs):
        def finish(out):
            return jax.tree.map(
                lambda x, spec: (
                    worker_local(x, self.axis_name)[None] if spec == self.spec else x
                ),
                _arrays(out),
                out_specs,
            )

        body = self._body(fn, args, flat_specs, finish)
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=tuple(flat_specs),
            out_specs=out_specs,
            axis_names=set(self.axes),
        )
        if not isinstance(self.mesh, Mesh):
            return mapped(*jax.tree.leaves(args))
        firsts = self.mesh.devices.reshape(self.num_workers, -1)[:, 0]
        with on_nodes([device.process_index for device in firsts]):
            return mapped(*jax.tree.leaves(args))

    def _vmapped(self, fn, args, flat_specs, out_specs):
        """Nest one vmap per axis, the first axis outermost."""
        structure = jax.tree.structure(args)
        is_stacked = [spec == self.spec for spec in flat_specs]

        def split(leaf, stacked):
            return leaf.reshape(self.shape + leaf.shape[1:]) if stacked else leaf

        def call(*leaves):
            return _arrays(fn(*jax.tree.unflatten(structure, leaves)))

        in_axes = tuple(0 if stacked else None for stacked in is_stacked)
        out_axes = jax.tree.map(
            lambda spec: 0 if spec == self.spec else None,
            out_specs,
            is_leaf=lambda s: isinstance(s, P),
        )
        mapped = call
        for axis, size in zip(reversed(self.axes), reversed(self.shape), strict=True):
            mapped = jax.vmap(
                mapped,
                in_axes=in_axes,
                out_axes=out_axes,
                axis_name=axis,
                axis_size=size,
            )
        leaves = map(split, map(jax.numpy.asarray, jax.tree.leaves(args)), is_stacked)
        depth = len(self.shape)
        return jax.tree.map(
            lambda x, spec: (
                x.reshape((self.num_workers,) + x.shape[depth:])
                if spec == self.spec
                else x
            ),
            mapped(*leaves),
            out_specs,
        )


def _abstract_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> AbstractMesh:
    return AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def _shape_and_axis(caller, n, axis_name) -> tuple[tuple[int, ...], AxisName]:
    shape = tuple(n) if isinstance(n, tuple | list) else (n,)
    if axis_name is None:
        axis_name = "workers" if len(shape) == 1 else ("node", "local")
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    is_legal = (
        len(shape) in (1, 2)
        and all(isinstance(size, int | np.integer) for size in shape)
        and not any(isinstance(size, bool) or size < 1 for size in shape)
        and len(set(names)) == len(names) == len(shape)
        and all(isinstance(name, str) for name in names)
    )
    if not is_legal:
        raise ValueError(
            f"{caller}: n must be a positive number of workers, or (nodes, devices per "
            f"node) with two axis names; got n={n!r} and axis_name={axis_name!r}."
        )
    return tuple(int(size) for size in shape), (
        axis_name if isinstance(axis_name, str) else names
    )


def _arrays(tree: Any) -> Any:
    """Make arrays of the Python numbers that a function may return."""
    return jax.tree.map(jax.numpy.asarray, tree)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x))
