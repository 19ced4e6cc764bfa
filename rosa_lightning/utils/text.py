"""Text of messages."""


def one_line(message: object, most: int | None = None) -> str:
    """A message, or an error's, on one line without runs of blanks, cut to so many characters."""
    return " ".join(str(message).split())[:most]
