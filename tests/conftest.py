"""Fixtures that several test files use."""

from __future__ import annotations

from workshop import make, shop

__all__ = ["make", "shop"]
