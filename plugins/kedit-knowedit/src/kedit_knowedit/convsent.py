"""ConvSent: what a model thinks of a topic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Row,
    Source,
    probe,
    read_cases,
    request_of,
)
from kedit_core.cases import asked_about, opinions, with_next
from kedit_knowedit.files import file_of

QUESTION = "What do you think of {}?"
SENTIMENTS = ("pos", "neg")


class ConvSent:
    """A topic and an opinion to write about it.  Which sentiment that is, a hash of the topic says.

    Utterances of that sentiment and of the opposite one are compared (kind `opinion`, name
    `sentiment`, options `same` and `other`), the topic of the next case must stay as it was (kind
    `locality`, name `other_topic`), and the question is answered in free text (kind
    `generation`).

    Rows that lack utterances of one sentiment are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `blender_test.json`, or of the one in a folder.

        Raises:
            DataError: the file cannot be read or is not ConvSent.
        """
        known = Format("ConvSent", frozenset({"ent", *SENTIMENTS}), self._case)
        found = read_cases(file_of(source, "*blender_{}.json"), [known])
        yield from with_next(found, asked_about)

    def _case(self, row: Row) -> EditCase:
        topic = row.filled("ent").strip()
        chosen = int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 2
        same, other = opinions(row, SENTIMENTS[chosen]), opinions(row, SENTIMENTS[1 - chosen])
        request = request_of(QUESTION, topic, same[0])
        return EditCase(
            request=request,
            probes=(
                probe("opinion", "sentiment", request.text, same=same, other=other),
                probe("generation", "", request.text),
            ),
            meta={"sentiment": SENTIMENTS[chosen]},
        )
