"""A fault that only a device of its own shows, put into a running engine (see engine_child.py)."""

from __future__ import annotations

from typing import Any

import engine_child


def keep_stale_parameters() -> None:
    """Child: what the host writes of requests is not copied to the device. The engine is of no
    use afterwards; a request that never ends becomes an error."""
    engine_child.runner().tables.static.refresh = lambda: None
    step, left = engine_child.ENGINE.step, iter(range(100))

    def limited() -> Any:
        assert next(left, None) is not None, "too many steps"
        return step()

    engine_child.ENGINE.step = limited
