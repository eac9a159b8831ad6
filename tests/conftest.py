"""Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before anything imports one."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores already; tiny models gain nothing from more threads, those of child processes included.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


LONG_FILES = ("test_compile.py", "test_demo_model.py", "test_paged_attention.py", "test_convert.py")
"""Files that take the longest. Begun last, each would keep one process busy after the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """What a server or a command sets of the loggers of this process ends with its test."""
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from a second thread, and on a busy machine waits for it at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
