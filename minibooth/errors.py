"""The errors that are nobody's bug."""


class UserError(ValueError):
    """A mistake the user can mend: commands print it as one line and exit with status 2."""
