"""Errors that a user can mend, as opposed to bugs."""

import contextlib
from collections.abc import Iterator, Mapping


class UserError(ValueError):
    """A mistake the user can mend: commands print it as one line and exit with status 2."""


def refuse(problems: Mapping[str, object]) -> None:
    """Raises UserError with the first of these problems that is there: {what to say: whether it is so}."""
    for problem, there in problems.items():
        if there:
            raise UserError(problem)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextlib.contextmanager
def blaming(name: object) -> Iterator[None]:
    """Any exception within is put down to what the file `name` holds: it ends in a UserError that names it.

    Files fail in too many ways to list them all, so any exception inside counts as the file's fault.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        if not isinstance(error, UserError):
            said = f"{name} holds something unexpected ({type(error).__name__}: {said}); mend it, or download it again"
        raise UserError(said if str(name) in said else f"{name}: {said}") from error


@contextlib.contextmanager
def refusals(what: str, remedy: str) -> Iterator[None]:
    """Any exception within, of the hub, ends in a UserError: what failed, the reason, the remedy."""
    try:
        yield
    except Exception as error:  # the hub's, the disk's, or of the HTTP library, which differs by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({reason}); {remedy}") from None
