"""A results folder is named by all that distinguishes it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

LONGEST = 200  # names of files end at 255 bytes, and a digest is added to what is longer


def named(label: str, settings: Mapping[str, object]) -> str:
    """A name such as "rdp-row-0.1,epochs=20,start=0.5".

    Args:
        label: what it begins with.
        settings: what distinguishes it besides.
    """
    name = label + "".join(f",{setting}={_short(value)}" for setting, value in settings.items())
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 20]},{blake2b(name.encode(), digest_size=8).hexdigest()}"


def _short(value: object) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("/", "_").replace(" ", "")
