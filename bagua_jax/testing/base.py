"""How a set of checks runs: all of them, and every failure with its cure."""

from collections.abc import Callable, Iterable

__all__ = ["run_all"]


def run_all(
    subject: str, checks: Iterable[tuple[str, Callable[[], None], str]]
) -> None:
    """Run checks, and report all failures together.

    Args:
        subject: what is checked.
        checks: name, check and cure of each.

    Raises:
        AssertionError: if one fails; it names the check, what was seen, and the cure.

    Example:
        >>> def fails():
        ...     raise AssertionError("2 is not 3")
        >>> run_all("mine", [("equal", fails, "Make it 3."), ("other", dict, "")])
        Traceback (most recent call last):
        ...
        AssertionError: mine: 1 of 2 checks failed.
        equal: 2 is not 3
            Cure: Make it 3.
    """
    failures, count = [], 0
    for name, check, cure in checks:
        count += 1
        try:
            check()
        except Exception as error:  # whatever a user's code raises is a finding
            kind = "" if isinstance(error, AssertionError) else type(error).__name__
            seen = " ".join(str(error).split())[:600]
            seen = f"{kind}: {seen}" if kind else seen
            failures.append(f"{name}: {seen}\n    Cure: {cure}")
    if failures:
        raise AssertionError(
            f"{subject}: {len(failures)} of {count} checks failed.\n"
            + "\n".join(failures)
        )
