"""The one exception type for data that a person can mend."""


class DataError(Exception):
    """What was expected, what was found and what to do, in one line; printed without a traceback."""


def printable(name: str) -> str:
    r"""A file's name as it can stand in a line: line ends, and bytes that are no UTF-8, are written as escapes.

    Example:
        >>> print(printable("red\n1 \udcff é.png"))
        red\n1 \udcff é.png
    """
    if name.isprintable():
        return name
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
