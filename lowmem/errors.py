"""The one exception that a user may meet."""


class LowmemError(Exception):
    """A problem the user can act on: the message says what was given, what is possible and what to type."""
