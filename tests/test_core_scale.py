"""The scale run of ``benchmarks/core_scale.py``, small: here only that it ends right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "core_scale.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("core_scale", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workers", [20, 2000])
@pytest.mark.parametrize("shape", ["pipeline", "tree"])
def test_twenty_thousand_calls_all_succeed(shape: str, workers: int) -> None:
    found = _script().measure(shape, 20_000, workers)
    assert 19_900 <= found["calls"] <= 20_001
