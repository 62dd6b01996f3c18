"""What those are who come to a coordinator with the key, beside clients of its state."""

from __future__ import annotations

from typing import Final

STEER: Final = b"steer"  # looks at a run and steers it; see ``taskrun.steering``
