"""A run: the cases, the methods' cells, and what came out, in one folder.

run.json          what is evaluated; the same command goes on with the same folder
cases.jsonl       the cases, in order
left_out.jsonl    rows of the data that made no case, with reasons
METHOD/           a cell: cell.json (what it is), answers.jsonl (raw answers), steps/ (the patches
                  of a sequence), scores.csv (by case), result.json (means)
report.md, report.html
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kedit_bench.journal import Journal
from kedit_core.errors import DataError
from kedit_core.files import new_file, write_json
from kedit_core.paths import expanded
from kedit_core.records import HUB, LeftOut, hub_revision
from kedit_core.request import EditCase, Probe

RUN, CASES, LEFT_OUT = "run.json", "cases.jsonl", "left_out.jsonl"
CELL, ANSWERS, STEPS = "cell.json", "answers.jsonl", "steps"
FORMAT = 1
_LONGEST = 255  # bytes of a folder's name


class Cases:
    """Cases of a file, read one at a time whenever they are asked for.

    Args:
        journal: a case in each line.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._places = array("q", journal.places())

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[EditCase]:
        return (EditCase(**line) for line in self._journal.lines())

    def __getitem__(self, n: int) -> EditCase:
        return EditCase(**self._journal.at(self._places[n]))


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        folder: where everything is.
    """

    folder: Path

    def begin(
        self, identity: Mapping[str, Any], found: Iterable[EditCase | LeftOut], limit: int | None
    ) -> int:
        """Write the cases, or find that they are there already; returns how many there are.

        Args:
            identity: what the run is, as JSON values.
            found: what the dataset yields; not read where the folder has the cases.
            limit: how many cases at most.

        Raises:
            DataError: the folder belongs to another run, or there is no case.  What a run of an
                earlier version did not note may be anything.
        """
        wanted = {"format": FORMAT, **identity}
        if (self.folder / RUN).exists():
            self._check_same(wanted)
            return sum(1 for _ in Journal(self.folder / CASES).lines())
        if any(self._is_foreign(path) for path in self.folder.glob("*")):
            raise DataError(f"{self.folder} holds something else. Choose another folder.")
        count = 0
        with new_file(self.folder / CASES) as cases, new_file(self.folder / LEFT_OUT) as left:
            with cases.open("w", encoding="utf-8") as kept, left.open("w", encoding="utf-8") as out:
                for item in found:
                    if isinstance(item, LeftOut):
                        out.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
                    else:
                        kept.write(item.model_dump_json() + "\n")
                        count += 1
                        if count == limit:
                            break
            if not count:
                raise DataError(f"There is no case to evaluate in {identity.get('dataset')}.")
        made = {
            "kedit": importlib.metadata.version("kedit"),
            "begun": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_json(self.folder / RUN, {**wanted, **made})
        return count

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is, with what kedit and when it was begun.

        Raises:
            DataError: the folder holds no run.
        """
        return read_json(
            self.folder / RUN, "Give the folder of an evaluation, or for a new one another --out."
        )

    def cases(self) -> Cases:
        """The cases, in order."""
        return Cases(Journal(self.folder / CASES))

    def left_out(self) -> list[LeftOut]:
        """The rows that made no case."""
        return [LeftOut(**line) for line in Journal(self.folder / LEFT_OUT).lines()]

    def cell_folder(self, label: str, identity: Mapping[str, Any]) -> Path:
        """The folder of a method's cell, new or the same as before.

        Args:
            label: the method with its settings; its folder is called like it, with a digest where
                that is too long or another label has that name.
            identity: what the cell is, as JSON values, `label` among them.

        Raises:
            DataError: the folder has a cell of other settings, or one that cannot be read.
        """
        name = re.sub(r"[^\w.=+-]+", "-", label)
        folder = self.folder / name
        if len(name.encode()) > _LONGEST or self._is_of_another(folder, label):
            folder = self.folder / f"{name[:50]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"
        if not (folder / CELL).exists():
            write_json(folder / CELL, identity)
        elif self.about(folder) != json.loads(json.dumps(identity)):
            raise DataError(
                f"{folder} was made with other settings of {label}. Choose another --out."
            )
        return folder

    def cells(self) -> list[Path]:
        """The folders of the methods, by name."""
        return sorted(file.parent for file in self.folder.glob(f"*/{CELL}"))

    def about(self, cell: Path) -> dict[str, Any]:
        """What a cell is: method, label, plugin, hparams.

        Raises:
            DataError: the file is damaged.
        """
        return read_json(
            cell / CELL, "Remove its folder, and the same `kedit eval` command makes it again."
        )

    def _is_of_another(self, cell: Path, label: str) -> bool:
        """Whether the folder has a cell of another label."""
        return (cell / CELL).exists() and self.about(cell)["label"] != label

    def _is_foreign(self, path: Path) -> bool:
        """Whether a file is not what a run that was killed early leaves."""
        return not path.name.startswith(".") and path.name not in (CASES, LEFT_OUT)

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        stored = self.identity
        for key, value in json.loads(json.dumps(wanted)).items():
            if key in stored and (difference := _difference(key, stored[key], value)):
                raise DataError(
                    f"{self.folder} is another run: {difference}. Choose another --out."
                )


def _difference(key: str, stored: Any, wanted: Any) -> str:
    """How a run that is asked for differs; lists do not by their order."""
    if not isinstance(wanted, list):
        return "" if stored == wanted else f"its {key} is {stored!r}, and {wanted!r} is asked for"
    more = [item for item in wanted if item not in stored]
    less = [item for item in stored if item not in wanted]
    told = [
        f"{verb} {', '.join(items)}" for verb, items in (("adds", more), ("lacks", less)) if items
    ]
    return f"its {key} are others: the command {' and '.join(told)}" if told else ""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object in a file of a run.

    Raises:
        DataError: it cannot be read; the advice says what to do then.
    """
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. {advice}") from None


def digest_of(source: str | Path) -> str:
    """SHA-256 of a file, of a folder's names and files, or of a hub name and its revision.

    Raises:
        DataError: it cannot be read, or the hub does not tell.
    """
    if str(source).startswith(HUB):
        return hashlib.sha256(f"{source} {hub_revision(str(source))}".encode()).hexdigest()
    path = expanded(str(source))
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for inside in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{inside.relative_to(path)} {digest_of(inside)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}.") from None


def with_probes(
    cases: Iterable[EditCase | LeftOut], probes: Iterable[Probe | LeftOut], each: int
) -> Iterator[EditCase | LeftOut]:
    """Cases with further probes, so many for each case in turn, from the first again at the end.

    Raises:
        DataError: there is no probe.
    """
    listed = [item for item in probes if isinstance(item, Probe)]
    if not listed:
        raise DataError("There is no probe to add.")
    turn = itertools.cycle(listed)
    for item in cases:
        if isinstance(item, EditCase):
            more = tuple(itertools.islice(turn, each))
            item = item.model_copy(update={"probes": (*item.probes, *more)})
        yield item
