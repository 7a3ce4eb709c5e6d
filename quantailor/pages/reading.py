"""Receipts and result documents as somebody may have edited them: every value is looked at before it is used.

What is missing or of another type counts as not there; only what a page cannot do without is an error.
"""

from __future__ import annotations

from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.pages.document import finite, pair


class Found:
    """A JSON object; `what` names it in errors."""

    def __init__(self, value: Any, what: str = "the document") -> None:
        self.value: dict[str, Any] = value if isinstance(value, dict) else {}
        self.what = what

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def __bool__(self) -> bool:
        return bool(self.value)

    def text(self, key: str, default: str = "") -> str:
        """A string, or a number or a truth value written as one."""
        value = self.value.get(key)
        return str(value) if isinstance(value, str | int | float) else default

    def number(self, key: str) -> float | None:
        """A finite number."""
        return finite(self.value.get(key))

    def pair(self, key: str) -> tuple[float, float] | None:
        return pair(self.value.get(key))

    def flag(self, key: str) -> bool | None:
        value = self.value.get(key)
        return value if isinstance(value, bool) else None

    def object(self, key: str) -> Found:
        return Found(self.value.get(key), f"{self.what}.{key}")

    def objects(self, key: str) -> list[Found]:
        """The objects of a list, others left out."""
        value = self.value.get(key)
        items = value if isinstance(value, list) else []
        return [Found(item, f"{self.what}.{key}") for item in items if isinstance(item, dict)]

    def texts(self, key: str) -> list[str]:
        """The strings of a list; a lone string is a list of one."""
        value = self.value.get(key)
        if isinstance(value, str):
            return [value]
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def strings(self, key: str) -> list[tuple[str, str]]:
        """(name, value) of an object whose values are plain."""
        items = self.object(key).value
        return [(name, str(value)) for name, value in items.items() if isinstance(value, str | int | float)]

    def needed(self, *keys: str) -> None:
        """Raises: UntrustedInput naming the first key that is not there."""
        for key in keys:
            if key not in self:
                raise UntrustedInput(f"{self.what} has no {key!r}, so it is damaged or not quantailor's; make it again")
