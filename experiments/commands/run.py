"""``bagua-jax run``: train the algorithms of a config and compare them."""

from dataclasses import dataclass
from pathlib import Path

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.runs.folders import RunError, require_writable
from bagua_jax.experiments.spec import claims
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.spec.messages import blame

__all__ = ["Run", "main"]


@dataclass(frozen=True)
class Run(base.OnConfig):
    """Train the algorithms of a config and compare them.

    Each algorithm gets a run folder, runs/EXPERIMENT/LABEL-HASH-sSEED. A finished run
    is not repeated, and an interrupted one continues where it stopped. The flags'
    defaults are the config's: `bagua-jax run CONFIG --help` shows them, and without a
    CONFIG those of demo.
    """

    overwrite: bool = False
    """Throw away the folders of these runs and start afresh."""
    check: bool = False
    """Judge config and flags, name the run folders, and run nothing."""


def main(command: Run) -> int:
    """Do the runs, report on them, and judge the config's claims."""
    config = command.experiment
    if command.check:
        return _check(config)
    if config.where == "processes":
        base.join_processes(config)
    else:
        base.prepare_host_devices(config)

    from bagua_jax import processes
    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import train
    from bagua_jax.experiments.spec import catalog
    from bagua_jax.experiments.tables import comparison, report
    from bagua_jax.experiments.tasks.data import Shards

    _require_devices(config)
    runs = catalog.resolve(config)
    task = tasks.load(config.task)
    try:
        data = task.data(config.seed, config.workers)
    except Exception as error:
        raise RunError(f"the task's data failed: {blame(error)}.") from error
    Shards.deal(data, config.workers, config.sharding, config.batch_size, config.seed)

    stated = [claims.parse(text) for text in config.claims]
    for run in runs if stated else ():
        claims.check_metrics(stated, run, train.metric_names(run, task, data))

    folder = Path(config.output) / config.experiment
    processes.from_first(lambda: require_writable(folder), RunError)

    console = base.console(quiet=not processes.is_first())
    console.print(report.headline(config, task.title), highlight=False)
    finished, failures = [], []
    for run in runs:
        try:
            summary = train.run(run, task, data, console, overwrite=command.overwrite)
            finished.append((run, summary))
        except train.Stopped:
            raise
        except RunError as error:
            failures.append(f"{run.algorithms[0].label}: {error}")
            base.complain(failures[-1], base.FAILED)

    def finish() -> int:
        listed = configs.load(command.config).algorithms
        compared = comparison.gather(config, runs, finished, listed)
        own = {run.algorithms[0].label for run in runs}
        known = own | {result.summary["label"] for result in compared.results}
        judged = [claim for claim in stated if claim.labels <= known]
        verdicts = report.judge(judged, compared.results)
        if compared.results:
            report.write(config, task.title, compared, failures, verdicts, console)
        left_out = len(stated) - len(judged)
        if left_out:
            console.print(f"{left_out} claims about runs left out are not judged.")
        # A claim about earlier runs alone is theirs.
        ours = (v for c, v in zip(judged, verdicts, strict=True) if c.labels & own)
        failed = failures or not all(verdict.holds for verdict in ours)
        return base.FAILED if failed else 0

    return processes.from_first(finish, RunError)


def _check(config: ExperimentConfig) -> int:
    """Refuse what the config or a flag says wrong; one's own task is not loaded."""
    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import folders
    from bagua_jax.experiments.spec import catalog, names

    runs = catalog.resolve(config)
    if not names.is_own(config.task):
        tasks.load(config.task)
    console = base.console()
    for run in runs:
        folder = folders.path_of(run)
        state = "finished" if (folder / "summary.json").exists() else "to run"
        console.print(f"{folder}: {state}", highlight=False, soft_wrap=True)
    return 0


def _require_devices(config: ExperimentConfig) -> None:
    import jax

    found = jax.devices()
    n = config.workers
    short = config.where == "devices" and len(found) < n
    # Processes agree through all their devices: none may be without a worker.
    if short or (config.where == "processes" and len(found) != n):
        raise ConfigError(
            f"workers: {n} workers need {n} devices, and there are {len(found)} "
            f"({found[0].device_kind}). Use another number of workers, or --where "
            "simulate."
        )
