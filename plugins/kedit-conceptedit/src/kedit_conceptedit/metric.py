"""ConceptEdit's change of instances: how many fewer of them the edited model calls so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from kedit_core.ask import Answers, Continue, Question
from kedit_core.errors import SettingError
from kedit_core.measure import mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import begins_with

# Other demonstrations are another protocol: give the metric a new version with them.
DEMONSTRATIONS = """\
Whether Tuesday belongs to category weekday? Yes
Whether copper belongs to category fruit? No
"""
NO = "No"
NEW_TOKENS = 2


class InstanceChange:
    """Share of instances called so before the edit, less the share after it (Wang et al. 2024,
    arXiv:2403.06259), on probes of kind `instance`; from -1 to 1, the paper's is 100 times as much.

    Two demonstrations, answered with yes and no, stand before each question, and the model
    continues by 2 tokens, each the most probable one.  A reply says so if it begins with an
    accepted answer ("Yes").  The authors' code counts a reply that is neither yes nor no as a yes;
    here it is none, and part `unclear` is the share of such replies after the edit.

    Args:
        demonstrations: a text file with others, the last line break included; it stands before
            the question as it is.

    Raises:
        SettingError: the file cannot be read.
    """

    def __init__(self, demonstrations: str = "") -> None:
        self.demonstrations, self.details = DEMONSTRATIONS, "own demonstrations"
        if demonstrations:
            self.demonstrations = _text_of(demonstrations)
            digest = hashlib.sha256(self.demonstrations.encode()).hexdigest()[:12]
            self.details = f"demonstrations {digest}"

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each instance's prompt, with the demonstrations before it."""
        return [self._question(p) for p in case.probes if p.kind == "instance"]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The change and `unclear`; empty where the case has no instance."""
        changes, unclear = [], []
        for probe in case.probes:
            if probe.kind != "instance":
                continue
            old, new = (text_of(answers, self._question(probe)).text for answers in (before, after))
            yes = [any(begins_with(text, a) for a in probe.expected) for text in (old, new)]
            changes.append(yes[0] - yes[1])
            unclear.append(not yes[1] and not begins_with(new, NO))
        if not changes:
            return {}
        return {
            "": CaseScore(mean(changes), len(changes)),
            "unclear": CaseScore(mean(unclear), len(unclear)),
        }

    def _question(self, probe: Probe) -> Continue:
        return Continue(self.demonstrations + probe.prompt, NEW_TOKENS)


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SettingError(
            f"The demonstrations in '{file}' cannot be read: {error}. Give the path of a text file "
            f"in UTF-8."
        ) from None
