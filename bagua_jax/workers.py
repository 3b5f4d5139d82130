"""Where workers live: simulated under vmap, or on devices under shard_map."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bagua_jax import flow, loops, processes
from bagua_jax.primitives import AxisName, on_nodes, varying_axes, worker_local

__all__ = ["Workers", "make_mesh"]

_SAME = P()  # equal on all workers
_UNSAID: Any = object()
_BATCH = "batch"


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

    Make one with :meth:`simulate`, :meth:`devices`, :meth:`on` or :meth:`abstract`.

    Attributes:
        shape: workers along each axis; ``(n,)``, or ``(nodes, devices per node)``.
        axis_name: what algorithms are given: a name, or ``("node", "local")``.
        mesh: the devices; abstract where there are none, ``None`` in simulation. May
            have further axes, which are left to GSPMD: then each worker is a group of
            devices.
        home: of :meth:`on`: the user's mesh, whose devices ``mesh`` has. Arrays come
            from it and go back to it.

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
    home: Mesh | None = None

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
    def on(cls, mesh: Mesh, axis_name: AxisName) -> "Workers":
        """Put the workers along an axis of the user's own mesh.

        Args:
            mesh: with axes in any order, ``Auto`` or ``Explicit``.
            axis_name: the axis of the workers, or two for a hierarchy. Further axes are
                left to GSPMD: a worker is a group of devices, over which its arrays are
                sharded as they come.

        Raises:
            ValueError: if an axis is not in the mesh, or processes are joined on CPUs
                with JAX's compilation cache on.
        """
        processes.require_own_programs("Workers.on")
        is_pair = isinstance(axis_name, tuple | list)
        names = tuple(axis_name) if is_pair else (axis_name,)
        sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else {}
        if not names or not all(name in sizes for name in names):
            raise ValueError(
                "Workers.on: axis_name must be one of the axes of a jax.sharding.Mesh, "
                f"or two of them; got axis_name={axis_name!r} and a mesh with the axes "
                f"{tuple(sizes)}."
            )
        shape, axis_name = _shape_and_axis(
            "Workers.on", tuple(sizes[name] for name in names), axis_name
        )
        return cls(shape, axis_name, _auto(mesh), mesh)

    @classmethod
    def abstract(
        cls, n: int | tuple[int, int], axis_name: AxisName | None = None
    ) -> "Workers":
        """Name workers on an abstract mesh: programs can be compiled ahead of time.

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
    def batch(self) -> str:
        """The spec of a global batch [B, ...]: worker k has run k of n equal ones."""
        return _BATCH

    @property
    def own(self) -> np.ndarray:
        """Numbers of this process's workers: all of them where there is one process."""
        if not isinstance(self.mesh, Mesh):
            return np.arange(self.num_workers)
        here = jax.process_index()
        return np.flatnonzero(
            [any(d.process_index == here for d in group) for group in self._groups()]
        )

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

    def spmd(self, fn: Callable[..., Any], in_specs: Any = _UNSAID, **jit: Any) -> Any:
        """Compile a per-worker function for all workers.

        Args:
            fn: per-worker function of positional arguments.
            in_specs: one spec for all arguments, or a tuple with a spec or a tree of
                specs (a prefix) for each; ``P()`` for what is equal on all workers,
                :attr:`spec` for what has a leading worker axis, :attr:`batch` for a
                global batch. ``P()`` where they are not given.
            **jit: options of ``jax.jit``, such as ``donate_argnums``.

        Returns:
            A function of the boundary's arrays with the attribute ``lower``, as
            ``jax.jit`` gives it. On CPU devices each call waits for its result: with
            more host devices than cores, two steps in flight can deadlock on jax 0.10.

        Raises:
            ValueError: when called, if a leaf that the specs call worker-stacked has no
                leading axis of length ``num_workers``; if a leaf that went in as
                ``P()`` and came out stacked is passed in again as ``P()``; if no
                ``in_specs`` are given and a stack of n is averaged, or sent, as if it
                were equal on all workers.
        """
        grown: dict[Any, Any] = {}
        given = _SAME if in_specs is _UNSAID else in_specs

        def program(*args):
            flat_specs = self._flat_specs(args, given, "Workers.spmd")
            loops.refuse_growth(args, flat_specs, grown)
            if in_specs is _UNSAID:
                self._refuse_forgotten(fn, args, flat_specs)
            out_specs, types = self._traced(fn, args, flat_specs)
            loops.remember_growth(
                args, flat_specs, out_specs, types, self.spec, self.num_workers, grown
            )
            return self._run(fn, args, flat_specs, out_specs)

        program.__name__ = getattr(fn, "__name__", "program")
        program.__doc__ = fn.__doc__
        return self._jit(program, **jit)

    def loop(
        self,
        init: Callable[..., Any],
        step: Callable[..., Any],
        init_args: tuple = (),
        inputs: tuple = (),
        *,
        in_specs: Any = None,
        flat: bool | None = None,
        donate: bool = True,
    ) -> loops.Loop:
        """Compile a training loop, and find which of its state is each worker's own.

        The specs of the state start from the types that ``init`` gives. The step is
        traced with them, what comes back as each worker's own is stacked, and so on
        until nothing changes: batch statistics, or the moments of an optimizer in front
        of an exchange, have a row for each worker from the start.

        Args:
            init: per-worker function that makes the state.
            step: per-worker function ``(state, *inputs)``; returns the new state, or a
                tuple with the state first.
            init_args: what ``init`` is called with, equal on all workers; arrays or
                ``jax.ShapeDtypeStruct``.
            inputs: examples of the step's other arguments, likewise.
            in_specs: one spec for all inputs, or a tuple with a spec or a tree of specs
                (a prefix) for each: ``P()``, :attr:`spec` or :attr:`batch`. ``None``:
                :attr:`spec`; with ``flat``, :attr:`batch` for what has an axis.
            flat: whether what crosses the boundary beside the state is as in the
                one-device program: batches [B, ...] come in, and of the outputs a
                worker's floating number is averaged over the workers (one all-reduce)
                and its arrays are joined along their first axis. Otherwise both have
                an axis of workers. ``None``: on the user's mesh only (:meth:`on`).
            donate: whether a step may write over the state that it is given.

        Returns:
            The loop: ``init``, ``step``, ``specs``, ``promoted``, ``average``,
            ``stack``; see :class:`bagua_jax.loops.Loop`.

        Raises:
            ValueError: if ``step`` returns no such state, or changes the dtype or shape
                of a leaf; what :meth:`spmd` refuses.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> workers = Workers.simulate(2)
            >>> step = lambda mean, x: 0.5 * mean + 0.5 * x  # of each worker's own x
            >>> loop = workers.loop(lambda: jnp.zeros(()), step, inputs=(jnp.ones(2),))
            >>> loop.specs == workers.spec, loop.init().shape
            (True, (2,))
            >>> state = loop.step(loop.init(), jnp.array([2.0, 4.0]))
            >>> state.tolist(), float(loop.average(state))
            ([1.0, 2.0], 1.5)
        """
        return loops.make(
            self,
            init,
            step,
            init_args,
            inputs,
            in_specs,
            self.home is not None if flat is None else flat,
            donate,
            "Workers.loop",
        )

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
                sharding=NamedSharding(self.mesh, self._placed(spec)),
            )
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, structs)

    # --- how it is done ---

    def _flat_specs(self, args: tuple, in_specs: Any, caller: str) -> list[P]:
        """Broadcast the specs over the leaves, and check the leaves against them."""
        if _is_spec(in_specs):
            in_specs = (in_specs,) * len(args)
        try:
            full = jax.tree.broadcast(tuple(in_specs), tuple(args), is_leaf=_is_spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{caller}: in_specs must be one spec, or a tuple with a spec or tree "
                f"of specs (a prefix) for each of the {len(args)} arguments; got "
                f"{in_specs!r}: {error}"
            ) from None
        flat = jax.tree.leaves(full, is_leaf=_is_spec)
        paths = jax.tree_util.tree_leaves_with_path(args)
        for (path, leaf), spec in zip(paths, flat, strict=True):
            name = jax.tree_util.keystr(path)
            if spec not in (P(), self.spec, _BATCH):
                raise ValueError(
                    f"{caller}: in_specs are P() or {self.spec} (workers.spec), or "
                    f"'batch' (workers.batch), got {spec} for argument {name}. Shard "
                    "inside the function for anything else."
                )
            shape = np.shape(leaf)
            if spec == _BATCH and (not shape or shape[0] % self.num_workers):
                raise ValueError(
                    f"{caller}: argument {name} is a batch, whose leading axis the "
                    f"{self.num_workers} workers must divide; got shape {shape}."
                )
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

    def _placed(self, spec: P | str) -> P:
        return self.spec if spec == _BATCH else spec  # type: ignore[return-value]

    def _abstract(self) -> AbstractMesh:
        """The mesh on which types are read."""
        if self.mesh is None:
            return _abstract_mesh(self.shape, self.axes)
        ours = self.mesh
        return ours.abstract_mesh if isinstance(ours, Mesh) else ours

    def _groups(self) -> np.ndarray:
        """Each worker's devices, [n, devices of a worker], on a mesh of any order."""
        assert isinstance(self.mesh, Mesh)
        at = [self.mesh.axis_names.index(axis) for axis in self.axes]
        grid = np.moveaxis(self.mesh.devices, at, range(len(at)))
        return grid.reshape(self.num_workers, -1)

    def _typed(self, fn, args, flat_specs, finish) -> Callable[..., Any]:
        return jax.shard_map(
            self._body(fn, args, flat_specs, finish),
            mesh=self._abstract(),
            in_specs=tuple(map(self._placed, flat_specs)),
            out_specs=self.spec,
            axis_names=set(self.axes),
        )

    def _traced(self, fn, args, flat_specs) -> tuple[Any, Any]:
        """Read the spec, and the type on a worker, of each output."""
        found: dict[str, Any] = {}

        def finish(out):
            out = _arrays(out)
            found["specs"] = jax.tree.map(
                lambda x: self.spec if varying_axes(x) & set(self.axes) else P(), out
            )
            found["types"] = jax.tree.map(loops.shape_of, out)
            return jax.tree.map(lambda x: worker_local(x, self.axis_name)[None], out)

        mapped = self._typed(fn, args, flat_specs, finish)
        with _meshed(self._abstract()):
            jax.eval_shape(mapped, *map(loops.shape_of, jax.tree.leaves(args)))
        return found["specs"], found["types"]

    def _trace(self, fn, args, flat_specs):
        return self._traced(fn, args, flat_specs)[0]

    def _refuse_forgotten(self, fn, args, flat_specs) -> None:
        """Refuse to communicate a stack that is passed as equal on all workers."""
        leaves = jax.tree.leaves(args)
        suspects = [np.shape(x)[:1] == (self.num_workers,) for x in leaves]
        if self.num_workers == 1 or not any(suspects):
            return
        finish = lambda out: jax.tree.map(  # noqa: E731
            lambda x: worker_local(x, self.axis_name)[None], _arrays(out)
        )
        mapped = self._typed(fn, args, flat_specs, finish)
        with _meshed(self._abstract()):
            jaxpr = jax.make_jaxpr(mapped)(*map(loops.shape_of, leaves)).jaxpr
        name = flow.pointless_collective(jaxpr, suspects, self.axes)
        if name is not None:
            paths = jax.tree_util.tree_leaves_with_path(args)
            (path, leaf), *_ = itertools.compress(paths, suspects)
            raise ValueError(
                "Workers.spmd: no in_specs are given, so every argument is taken as "
                f"equal on all workers; argument {jax.tree_util.keystr(path)} of shape "
                f"{np.shape(leaf)} looks like a stack of the {self.num_workers} "
                f"workers', and {name} would combine it with itself. Pass "
                "in_specs=workers.spec for stacks (or in_specs=P() if it is equal)."
            )

    def _run(self, fn, args, flat_specs, out_specs):
        run = self._vmapped if self.mesh is None else self._sharded
        return run(fn, args, flat_specs, out_specs)

    def _sharded(self, fn, args, flat_specs, out_specs):
        def leave(x, spec):
            if spec == P():
                return x
            x = worker_local(x, self.axis_name)
            return x if spec == _BATCH else x[None]

        def finish(out):
            return jax.tree.map(leave, _arrays(out), out_specs)

        mapped = jax.shard_map(
            self._body(fn, args, flat_specs, finish),
            mesh=self.mesh,
            in_specs=tuple(map(self._placed, flat_specs)),
            out_specs=jax.tree.map(self._placed, out_specs, is_leaf=_is_spec),
            axis_names=set(self.axes),
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_meshed(self._abstract()))
            if isinstance(self.mesh, Mesh):
                firsts = self._groups()[:, 0]
                stack.enter_context(on_nodes([d.process_index for d in firsts]))
            return mapped(*jax.tree.leaves(args))

    def _vmapped(self, fn, args, flat_specs, out_specs):
        """Nest one vmap per axis, the first axis outermost."""
        structure = jax.tree.structure(args)
        is_stacked = [spec != P() for spec in flat_specs]

        def split(leaf, spec):
            if spec == P():
                return leaf
            if spec == self.spec:
                return leaf.reshape(self.shape + leaf.shape[1:])
            rows = leaf.shape[0] // self.num_workers
            return leaf.reshape(self.shape + (rows,) + leaf.shape[1:])

        def join(x, spec):
            if spec == P():
                return x
            rows = (self.num_workers,) if spec == self.spec else (-1,)
            kept = depth if spec == self.spec else depth + 1
            return x.reshape(rows + x.shape[kept:])

        def call(*leaves):
            return _arrays(fn(*jax.tree.unflatten(structure, leaves)))

        in_axes = tuple(0 if stacked else None for stacked in is_stacked)
        out_axes = jax.tree.map(
            lambda spec: None if spec == P() else 0, out_specs, is_leaf=_is_spec
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
        leaves = map(split, map(jax.numpy.asarray, jax.tree.leaves(args)), flat_specs)
        depth = len(self.shape)
        return jax.tree.map(join, mapped(*leaves), out_specs)

    def _jit(self, program, **options) -> Any:
        """Compile, and call in a context whose mesh is that of the workers.

        A mesh of the user's (``jax.set_mesh``, or arrays that were made under one) with
        explicit axes, or of another size, would reach into the program. The first trace
        that meets one ends there; from then on arrays are moved to automatic axes,
        where they lie, before the call. Other programs pay nothing.
        """
        state = {"moves": self.home is not None and self.home != self.mesh}

        def guarded(*args):
            if not state["moves"] and self._meets_foreign(args):
                raise _Foreign
            return program(*args)

        guarded.__name__ = program.__name__
        guarded.__doc__ = program.__doc__
        compiled = jax.jit(guarded, **options)
        ours, home = self.mesh, self.home
        if isinstance(ours, AbstractMesh):
            return compiled
        is_cpu = ours is not None and ours.devices.flat[0].platform == "cpu"

        def moved(do, args):
            if not state["moves"]:
                try:
                    return do(*args)
                except _Foreign:
                    if _is_traced(args):
                        raise ValueError(_FOREIGN_TRACE) from None
                    state["moves"] = True
            elif _is_traced(args):
                return do(*args)
            mesh = ours if isinstance(ours, Mesh) else _auto(_mesh_of(args))
            with jax.set_mesh(mesh):
                out = do(*jax.tree.map(lambda x: _to(mesh, x), args))
            if home is not None and do is compiled:
                out = jax.tree.map(functools.partial(_to, home), out)
            return out

        def call(*args):
            out = moved(compiled, args)
            return jax.block_until_ready(out) if is_cpu else out

        call.lower = lambda *args: moved(compiled.lower, args)  # type: ignore[attr-defined]
        call._cache_size = compiled._cache_size  # type: ignore[attr-defined]
        call.__name__, call.__doc__ = program.__name__, program.__doc__
        return call

    def _meets_foreign(self, args) -> bool:
        """Whether a mesh that is not ours is in the types, or context, of a trace."""
        types = [
            getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(args)
        ]
        meshes = [t.mesh for t in types if t is not None and not t.mesh.empty]
        if any(AxisType.Explicit in (mesh.axis_types or ()) for mesh in meshes):
            return True
        around = jax.sharding.get_abstract_mesh()
        sizes = {mesh.size for mesh in (*meshes, around) if not mesh.empty}
        return self.mesh is not None and not sizes <= {self.mesh.size}


class _Foreign(Exception):
    """Another mesh was met while tracing; see ``Workers._jit``."""


_FOREIGN_TRACE = (
    "Workers: a program was called inside jax.jit with arrays of a mesh with explicit "
    "axes, or of other devices, which cannot be moved there. Call it outside jit, or "
    "make the mesh with axis_types=(AxisType.Auto,) * k and use Workers.on(mesh, axis)."
)


@contextlib.contextmanager
def _meshed(mesh: AbstractMesh) -> Iterator[None]:
    """Trace on a mesh, whatever mesh, of whatever size, ``jax.set_mesh`` has named."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        with jax.sharding.use_abstract_mesh(mesh):
            yield


def _is_traced(args: tuple) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(args))


def _auto(mesh: Mesh) -> Mesh:
    """The same devices under the same names, with axes that are left to XLA."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _mesh_of(args: tuple) -> Mesh:
    """The mesh in context, or that of the first array that has one."""
    mesh = jax.sharding.get_mesh()
    if isinstance(mesh, Mesh) and not mesh.empty:
        return mesh
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    found = [mesh for mesh in meshes if isinstance(mesh, Mesh)]
    explicit = [mesh for mesh in found if AxisType.Explicit in mesh.axis_types]
    return (explicit or found)[0]


def _to(mesh: Mesh, x: Any) -> Any:
    """Name an array's placement in the terms of another mesh of the same devices."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(x, jax.Array) or not isinstance(sharding, NamedSharding):
        return x
    if sharding.mesh == mesh:
        return x
    same = sharding.mesh.axis_names == mesh.axis_names
    return jax.device_put(x, NamedSharding(mesh, sharding.spec if same else P()))


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


def _is_spec(x: Any) -> bool:
    return isinstance(x, P | str)


def _arrays(tree: Any) -> Any:
    """Make arrays of the Python numbers that a function may return."""
    return jax.tree.map(jax.numpy.asarray, tree)
