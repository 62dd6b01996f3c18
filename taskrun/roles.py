"""What those are who come to a coordinator with the key, beside clients of its state."""

from __future__ import annotations

from typing import Final

STATE_OF_RUN: Final = b"state of a run"  # wants the state of one of a server's runs
STEER: Final = b"steer"  # looks at a run and steers it; see ``taskrun.steering``
