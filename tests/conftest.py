"""Tests that are marked ``long`` run only in `make test-long`."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if not os.environ.get("OCRNET_TEST_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-long"))
