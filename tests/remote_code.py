"""Code that an exported folder takes along, loaded by transformers without a trace on the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers


@contextmanager
def modules_in(place: Path) -> Iterator[None]:
    """transformers copies the code of a folder to a place of its own and imports it from there: to this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place))
        patch.setattr(sys, "path", [str(place), *sys.path])
        yield
