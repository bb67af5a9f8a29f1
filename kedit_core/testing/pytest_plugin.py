"""What pytest loads of kedit: a marker for conformance checks, and a count of them at the end.

Loaded in every project where kedit is installed, so it imports neither torch nor kedit.
"""

from __future__ import annotations

from collections import Counter

import pytest

MARKER = "kedit_check"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}(method): one conformance check of a method")


def pytest_itemcollected(item: pytest.Item) -> None:
    marker = item.get_closest_marker(MARKER)
    if marker is not None:
        item.user_properties.append((MARKER, marker.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "xfailed", "xpassed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, method in getattr(report, "user_properties", ()):
                if name == MARKER:
                    counts.setdefault(str(method), Counter())[outcome] += 1
    for method, found in sorted(counts.items()):
        parts = ", ".join(f"{n} {outcome}" for outcome, n in found.items())
        line = f"kedit conformance: {found.total()} checks of {method}, {parts}"
        terminalreporter.write_line(line)
