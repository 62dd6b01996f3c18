"""What workers of a Pool do at their end, as children of multiprocessing do."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from taskrun.workers import leaving

pytestmark = pytest.mark.timeout(60)


def test_what_is_being_imported_when_a_process_ends_has_left_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "multiprocessing.util", ModuleType("multiprocessing.util"))
    leaving.clean_up()
