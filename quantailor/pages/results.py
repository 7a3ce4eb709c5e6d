"""The page of a file that a command wrote with --json: `plan`, `sensitivity`, a search, `fit`, or anything else."""

from __future__ import annotations

from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.pages.document import Document
from quantailor.pages.folders import fitted
from quantailor.pages.generic import generic
from quantailor.pages.planned import is_plan, planned
from quantailor.pages.reading import Found
from quantailor.pages.recipes import architectures, is_nas, is_search, searched
from quantailor.pages.searched import is_mix, is_sensitivity, mix, sensitivities


def of(value: Any, name: str) -> Document:
    """The page of one result document. Raises: UntrustedInput if it is none, or tells that its command failed."""
    data = Found(value, name)
    if not data:
        raise UntrustedInput(f"{name} holds no JSON object, so no command of quantailor's wrote it; give one's --json")
    if set(data.value) == {"error", "exit_code"}:
        raise UntrustedInput(f"{name} tells that its command failed: {data.text('error')[:200]}")
    if {"verdict", "metric", "steps", "scheme", "final", "float"} <= set(data.value):
        return fitted(data.value, None, None, name)
    if is_sensitivity(data):
        return sensitivities(data, name)
    if is_search(data):
        return searched(data, name)
    if is_nas(data):
        return architectures(data, name)
    if is_mix(data):
        return mix(data, name)
    return planned(data, name) if is_plan(data) else generic(data, name)
