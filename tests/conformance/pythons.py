"""The Pythons of this machine, and how to run taskrun's manager on each of them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import taskrun

PACKAGE = Path(taskrun.__file__).parent
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"  # the Python of these tests


@functools.cache
def python(version: str) -> str | None:
    """The path of a Python of this version that starts, or None."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [
        *([sys.executable] if version == THIS else []),
        *map(str, sorted(root.glob(f"versions/{version}.*/bin/python"))),
        f"/usr/bin/python{version}",
        f"/usr/local/bin/python{version}",
    ]
    for path in candidates:
        if Path(path).exists() and _starts(path, version):
            return path
    return None


def _starts(path: str, version: str) -> bool:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() == version


@functools.cache
def has_tests(path: str) -> bool:
    """Whether this Python came with the standard library's tests."""
    code = "import test._test_multiprocessing"
    return not subprocess.run([path, "-c", code], capture_output=True, timeout=60).returncode


def environment(folder: Path) -> dict[str, str]:
    """The variables with which any Python can import this taskrun, and nothing else that is
    installed beside it."""
    link = folder / "taskrun"
    if not link.exists():
        link.symlink_to(PACKAGE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
