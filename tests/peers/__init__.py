"""Tests against other packages, which are skipped with a printed reason where those are not installed."""

import importlib
import os

import pytest


def peer(name):
    """The package, or a skip; where CBN_REQUIRE_PEERS is set, as in continuous integration, its absence is an error."""
    if os.environ.get("CBN_REQUIRE_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[peers]'")
