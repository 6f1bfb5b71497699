"""What every test starts from, and the sets that tests are in."""

import zlib
from collections.abc import Iterator

import pytest
import torch

pytest_plugins = ["text_assets", "transformers_logs"]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put a tenth of ``make soak`` into ``make slow``, the same each time."""
    for item in items:
        if item.get_closest_marker("soak") and zlib.crc32(item.nodeid.encode()) % 10 == 0:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and threads that wait for each other on busy cores cost a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
