"""What goes wrong with data."""


class DataError(RuntimeError):
    """Data is missing, corrupt or does not fit what was asked; the message is one sentence that says what to do."""
