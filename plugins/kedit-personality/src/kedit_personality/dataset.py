"""PersonalityEdit: what a model thinks of a topic, in the manner of a trait."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Row,
    RowError,
    Source,
    probe,
    read_cases,
    request_of,
)
from kedit_core.cases import asked_about, opinions, with_next

QUESTION = "What do you think of {}?"
TRAITS = ("neuroticism", "agreeableness", "extraversion")  # in the order of the paper
KEYS = frozenset({"ent", *TRAITS})


class Personality:
    """A topic and an opinion to write about it, in the manner of the trait `target_per`; where a
    record names none, a hash of the topic says which.

    Opinions of that trait and of the two others are compared (kind `opinion`, name of the trait,
    options `same` and `other`), and the topic of the next case must stay as it was (kind
    `locality`, name `other_topic`).  In the test file the question is also answered in free text
    (kind `generation`).

    Rows that lack opinions of a trait are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `test.json`.

        Raises:
            DataError: the file cannot be read or is not PersonalityEdit.
        """
        known = {
            "PersonalityEdit with target traits": KEYS | {"target_per"},
            "PersonalityEdit": KEYS,
        }
        formats = [Format(name, keys, self._case) for name, keys in known.items()]
        yield from with_next(read_cases(source, formats), asked_about)

    def _case(self, row: Row) -> EditCase:
        topic = row.filled("ent").strip()
        trait = _trait(row, topic)
        found = {name: opinions(row, name) for name in TRAITS}
        same = found.pop(trait)
        other = [opinion for others in found.values() for opinion in others]
        request = request_of(QUESTION, topic, same[0])
        probes = [probe("opinion", trait, request.text, same=same, other=other)]
        if "target_per" in row:
            probes.append(probe("generation", "", request.text))
        return EditCase(request=request, probes=tuple(probes), meta={"trait": trait})


def _trait(row: Row, topic: str) -> str:
    if "target_per" not in row:
        return TRAITS[int(hashlib.sha256(topic.encode()).hexdigest(), 16) % len(TRAITS)]
    trait = row.text("target_per")
    if trait not in TRAITS:
        raise RowError(f"'target_per' is {trait!r}, none of {', '.join(TRAITS)}")
    return trait
