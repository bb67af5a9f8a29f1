"""Progress bars: on a terminal, and only for what takes longer than two seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, text: str, unit: str = "it", initial: int = 0) -> tqdm[Any]:
    """A bar on stderr to use as a context manager; call its `update(n)`."""
    return tqdm(
        total=total,
        desc=text,
        unit=unit,
        unit_scale=total is not None and total > 10_000,
        initial=initial,
        delay=2,
        disable=not sys.stderr.isatty(),
        leave=False,
        file=sys.stderr,
    )
