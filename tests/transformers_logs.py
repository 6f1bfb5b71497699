"""No test, and nothing of this library in it, calls transformers in a way that it has deprecated.

What transformers warns of through Python's warnings is an error anyhow; of the rest it speaks in its log, once in a
process.
"""

import logging
import sys
import traceback
from collections.abc import Iterator

import pytest


class _Deprecations(logging.Handler):
    """Keeps what is said of deprecated names; what the peft package calls is its own affair."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (text := record.getMessage()):
            callers = [frame.filename for frame in traceback.extract_stack()]
            if not any("site-packages/peft/" in name for name in callers):
                self.said.append(text)


@pytest.fixture(autouse=True)
def no_deprecated_call() -> Iterator[None]:
    """Fails a test in whose course transformers logs that something is deprecated."""
    module = sys.modules.get("transformers.utils.logging")
    if module is None:  # not loaded: nothing is called
        yield
        return
    logging.Logger.warning_once.cache_clear()  # it says each thing once in a process, and here once in a test
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.said, handler.said[0]
