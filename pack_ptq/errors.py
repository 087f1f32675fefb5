"""The one exception that users see as a message instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: the message names the key, the value and what is allowed."""


def refuse(key: str, value: object, allowed: str) -> UserError:
    """Word a refusal in the house form, to be raised by the caller."""
    return UserError(f"{key} is {value!r}; allowed: {allowed}")
