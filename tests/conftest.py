"""Settings for all tests: those that are marked ``long`` run only in `make test-long`; logging starts afresh."""

import logging
import os

import pytest

from ocrnet.utils import log


@pytest.fixture(autouse=True)
def fresh_logging():
    """Log at level INFO, without the handlers and the rank of earlier tests."""
    logger = logging.getLogger("ocrnet")
    logger.setLevel(logging.INFO)
    yield
    logger.handlers.clear()
    log.set_rank(0, first_of_machine=True)


def pytest_collection_modifyitems(items):
    if not os.environ.get("OCRNET_TEST_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-long"))
