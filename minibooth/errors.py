"""The errors that are nobody's bug."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake the user can mend: commands print it as one line and exit with status 2."""


@contextlib.contextmanager
def blaming(name: object) -> Iterator[None]:
    """Within, whatever goes wrong is due to what the file `name` holds, and ends in a UserError that says so.

    Files fail in too many ways to list them all, so any exception inside counts as the file's fault.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        if not isinstance(error, UserError):
            said = f"{name} holds something unexpected ({type(error).__name__}: {said}); mend it, or download it again"
        raise UserError(said if str(name) in said else f"{name}: {said}") from error
