"""What an asynchronous run did: its exchanges, how late they came, and a replay."""

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bagua_jax.asynchrony.replica import Replica

__all__ = ["Event", "Log", "event", "read", "replay", "staleness", "write"]


class Event(NamedTuple):
    """One exchange, as one of the workers in it saw it.

    A worker is in one exchange at a time, so its events, in the order in which they are
    written, and its steps determine all that happened to its parameters.
    """

    worker: int
    exchange: int  # the same number at all workers that were in it
    workers: tuple[int, ...]  # who was in it; in a pair the one that asked comes first
    snapshot: int  # local steps that had ended when the snapshot was taken
    apply: int  # and when the correction was added
    in_step: bool  # whether the next step was then under way


class Log(Protocol):
    """Where events go: a text file, or what is written to like one."""

    def write(self, text: str, /) -> Any:
        """Append a text."""

    def flush(self) -> None:
        """Hand on what was written."""


def write(file: Log, event: Event) -> None:
    """Append an event to a JSON Lines file; the kernel has it when this returns."""
    file.write(json.dumps(event._asdict()) + "\n")
    file.flush()


def read(path: Path) -> list[Event]:
    """Read the events of one worker; a last line that is not whole is left out.

    Raises:
        ValueError: if another line is no event; the message names it.
    """
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(event(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"asynchrony.read: {path}, line {number}, is no event: it was altered. "
                "What comes after it cannot be trusted."
            ) from None
    return events


def event(fields: Mapping[str, Any]) -> Event:
    """Make an event of what :func:`write` wrote; other keys are left alone."""
    found = Event(*(fields[name] for name in Event._fields))
    return found._replace(workers=tuple(found.workers))


def staleness(events: Iterable[Event]) -> dict[int, int]:
    """Count the exchanges by their staleness.

    Args:
        events: of one worker, or of several.

    Returns:
        Steps that ended between snapshot and apply -> number of exchanges, in order.

    Example:
        >>> late = Event(0, 1, (0, 1), snapshot=3, apply=5, in_step=True)
        >>> staleness([late, late._replace(apply=3)])
        {0: 1, 2: 1}
    """
    counts = collections.Counter(event.apply - event.snapshot for event in events)
    return dict(sorted(counts.items()))


def replay(
    events: Mapping[int, Sequence[Event]],
    replicas: Mapping[int, Replica],
    local_step: Callable[[int, Any], Any],
    exchange: Callable[[int, tuple[int, ...], list[Any]], list[Any]],
    steps: Mapping[int, int],
) -> None:
    """Do in one process, in the recorded order, what a run did in many.

    Every local step, snapshot and correction falls where it fell, so that the replicas
    end where the run's ended: bit for bit where ``exchange`` adds in the same order as
    the run did (a pair always does), else up to the rounding of its sums.

    Args:
        events: of each worker, in its order.
        replicas: of each worker, with the initial parameters; they are changed.
        local_step: ``(worker, params) -> new params``; called in each worker's order of
            steps, so that it can carry the optimizer's state.
        exchange: ``(number, workers, snapshots) -> corrections``, one for each of the
            workers; called in an order in which the exchanges can have happened.
        steps: local steps of each worker in the whole run.

    Raises:
        ValueError: if an exchange is missing from the log of a worker that was in it,
            as after a fault: only what every worker logged can be replayed.
    """
    under_way: dict[int, Any] = {}  # what a worker's step started from

    def go_to(worker: int, count: int, in_step: bool) -> None:
        replica = replicas[worker]
        while replica.steps < count or (in_step and worker not in under_way):
            start = under_way.pop(worker, None)
            start = replica.begin() if start is None else start
            if replica.steps < count:
                replica.end(start, local_step(worker, start))
            else:
                under_way[worker] = start

    queues = {worker: collections.deque(own) for worker, own in events.items()}
    snapshots: dict[int, dict[int, Any]] = collections.defaultdict(dict)
    corrections: dict[int, dict[int, Any]] = {}
    while any(queues.values()):
        moved = False
        for worker, queue in queues.items():
            while queue:
                event = queue[0]
                offered = snapshots[event.exchange]
                if worker not in offered:
                    go_to(worker, event.snapshot, in_step=False)
                    offered[worker] = replicas[worker].snapshot()[0]
                    moved = True
                if len(offered) < len(event.workers):
                    break
                if event.exchange not in corrections:
                    models = [offered[w] for w in event.workers]
                    given = exchange(event.exchange, event.workers, models)
                    corrections[event.exchange] = dict(
                        zip(event.workers, given, strict=True)
                    )
                go_to(worker, event.apply, event.in_step)
                replicas[worker].apply(corrections[event.exchange].pop(worker))
                queue.popleft()
                moved = True
        if not moved:
            stuck = next(queue[0] for queue in queues.values() if queue)
            raise ValueError(
                f"replay: worker {stuck.worker} was in exchange {stuck.exchange} with "
                f"workers {stuck.workers}, and not all of them logged it there. A run "
                "in which a worker died cannot be replayed."
            )
    for worker, count in steps.items():
        go_to(worker, count, in_step=False)
