"""Fixtures that several test files use."""

from __future__ import annotations

import signal

from workshop import make, shop

__all__ = ["make", "shop"]

# A shell starts what runs in the background with SIGINT ignored, and so would we start what
# is tested here, which then could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
