"""What tests of searches share."""

from __future__ import annotations

import pytest

from lit_llm.store.store import Store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of their own: a sweep may not be called like a study of another test that ran in this process."""
    return Store(tmp_path_factory.mktemp("searches"))
