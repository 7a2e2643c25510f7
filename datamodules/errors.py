"""The one exception type for data that a person can mend."""


class DataError(Exception):
    """What was expected, what was found and what to do, in one line; printed without a traceback."""
