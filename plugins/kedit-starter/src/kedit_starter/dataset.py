"""The starter facts as cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from kedit_core import DataError, EditCase, EditRequest, Probe, RequestError


class Starter:
    """True facts that smollm2-135m answers by itself, each with a false target to write.

    A case asks, besides the fact's own prompt: two rephrasings (kind `rephrase`), three questions
    of the same relation about other subjects, whose answers must stay (`locality`,
    `neighborhood`), and for many facts one consequence of the new answer (`portability`,
    `one_hop`).  `meta["relation"]` says what kind of fact it is.
    """

    def cases(self, path: Path | None = None) -> Iterator[EditCase]:
        """Yield the facts that ship with the package, or those of a file in the same format.

        Raises:
            DataError: the file cannot be read or a line is not such a fact.
        """
        source = Path(path) if path is not None else files("kedit_starter") / "facts.jsonl"
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The facts file {source} cannot be read: {error}.") from None
        for number, line in enumerate(lines, start=1):
            try:
                yield _case(json.loads(line))
            except KeyError as error:
                raise DataError(f"{source}, line {number}: the fact lacks {error}.") from None
            except (ValueError, TypeError, RequestError) as error:
                raise DataError(f"{source}, line {number} is not a fact: {error}.") from None


def _case(record: dict[str, Any]) -> EditCase:
    subject, target = record["subject"], record["target_new"]
    probes = [
        Probe(kind="rephrase", prompt=prompt.replace("{}", subject), expected=target)
        for prompt in record["rephrases"]
    ]
    probes += [
        Probe(kind="locality", name="neighborhood", prompt=near["prompt"], expected=near["answer"])
        for near in record["neighborhood"]
    ]
    if hop := record["portability"]:
        probes.append(
            Probe(kind="portability", name="one_hop", prompt=hop["prompt"], expected=hop["answer"])
        )
    return EditCase(
        request=EditRequest(
            id=record["id"],
            prompt=record["prompt"],
            subject=subject,
            target_new=target,
            ground_truth=record["answer"],
        ),
        probes=tuple(probes),
        meta={"relation": record["relation"]},
    )
