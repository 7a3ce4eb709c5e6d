"""What all tests of files share."""

import os

import pytest


@pytest.fixture
def real_fsync():
    """For the tests that are about fsync itself."""


@pytest.fixture(autouse=True)
def no_fsync(request, monkeypatch):
    """Hundreds of fsyncs would take a minute, and only a power failure can tell."""
    if "real_fsync" not in request.fixturenames:
        monkeypatch.setattr(os, "fsync", lambda fd: None)
