"""A journal keeps every whole line through crashes, and one process at a time writes it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kedit_bench.journal import Journal, only_one
from kedit_core import DataError

RECORDS = [{"n": 1, "text": "Łódź\nlies"}, [1, 2.5, None], "東京", {"n": 2, "kl": 1e-17}]


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "deep" / "journal.jsonl")


def test_a_journal_that_was_never_written_has_no_line_and_makes_no_file(journal):
    assert list(journal.lines()) == []
    assert not journal.path.parent.exists()


def test_lines_come_back_in_order(journal):
    journal.append(RECORDS[0])
    journal.append(*RECORDS[1:])

    assert list(journal.lines()) == RECORDS
    assert list(Journal(journal.path).lines()) == RECORDS
    assert len(journal.path.read_bytes().splitlines()) == len(RECORDS)  # for people and programs


def test_each_line_can_be_read_by_its_place(journal):
    journal.append(*RECORDS)
    with journal.path.open("ab") as file:
        file.write(b'{"half": ')
    places = list(journal.places())

    assert [journal.at(place) for place in reversed(places)] == RECORDS[::-1]
    with pytest.raises(DataError, match="byte 1: not JSON"):
        journal.at(1)


@pytest.mark.parametrize("broken", [b'{"n": 3', b'{"n": 3}', b"\0\0\0", "東".encode()[:1], b" "])
def test_half_a_line_is_dropped_and_nothing_else(journal, broken):
    journal.append(*RECORDS)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + broken)

    assert list(journal.lines()) == RECORDS
    assert journal.path.read_bytes() == whole + broken  # reading changes nothing

    journal.append("after")
    assert list(journal.lines()) == [*RECORDS, "after"]
    assert journal.path.read_bytes() == whole + b'"after"\n'


def test_wherever_a_crash_cuts_the_file_whole_lines_stay_and_writing_goes_on(journal):
    journal.append(*RECORDS)
    content = journal.path.read_bytes()
    for length in range(len(content) + 1):
        journal.path.write_bytes(content[:length])
        kept = RECORDS[: content[:length].count(b"\n")]

        assert list(journal.lines()) == kept
        journal.append("after")
        assert list(journal.lines()) == [*kept, "after"]


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("before", [0, 1])
def test_half_a_line_may_be_long(journal, before, size):
    journal.append(*RECORDS[:before])
    journal.path.parent.mkdir(exist_ok=True)
    with journal.path.open("ab") as file:
        file.write(b'"' + b"x" * (size - 1))

    journal.append("after")

    assert list(journal.lines()) == [*RECORDS[:before], "after"]


@pytest.mark.parametrize("value", [object(), math.nan, math.inf])
def test_what_json_cannot_hold_leaves_the_journal_as_it_was(journal, value):
    journal.append(RECORDS[0])

    with pytest.raises((TypeError, ValueError)):
        journal.append("good", [value])

    assert list(journal.lines()) == RECORDS[:1]


@pytest.mark.parametrize("broken", [b"{n: 3}\n", b"\xff\n", b"\n"])
def test_a_whole_line_that_is_no_json_is_refused_with_its_number(journal, broken):
    journal.append(*RECORDS[:2])
    with journal.path.open("ab") as file:
        file.write(broken)
    journal.append(RECORDS[2])

    lines = journal.lines()

    assert [next(lines), next(lines)] == RECORDS[:2]
    with pytest.raises(DataError) as caught:
        next(lines)
    assert str(caught.value) == f"{journal.path}, line 3: not JSON."


def test_a_process_that_is_killed_leaves_what_it_appended(journal):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from kedit_bench.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.append(1, 2)\n"
        "journal.append(3)\n"
        "open(sys.argv[1], 'ab').write(b'{\"n\":')\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(journal.path)])

    assert done.returncode == 9
    assert list(journal.lines()) == [1, 2, 3]


# -- one at a time -----------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
from kedit_bench.journal import Journal, only_one
from kedit_core import DataError

folder, number = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal(folder / "journal.jsonl")
while True:
    try:
        with only_one(folder):
            count = sum(1 for _ in journal.lines())
            for step in range(5):
                journal.append([number, count + step])
                time.sleep(0.002)
        break
    except DataError as error:
        assert "Another process is working in" in str(error), error
        time.sleep(0.005)
"""


def test_processes_that_want_the_same_folder_write_one_after_another(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", WORKER, str(folder)]
    workers = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4

    found = list(Journal(folder / "journal.jsonl").lines())

    # Each counted what was there and wrote five lines before the next one came.
    assert [place for _, place in found] == list(range(20))
    turns = [number for number, _ in found][::5]
    assert sorted(turns) == [0, 1, 2, 3]
    assert [number for number, _ in found] == [number for number in turns for _ in range(5)]


def holds(folder: Path) -> bool:
    """Whether another process is kept out of the folder."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedit_bench.journal import only_one\n"
        "from kedit_core import DataError\n"
        "try:\n"
        "    with only_one(Path(sys.argv[1])):\n"
        "        pass\n"
        "except DataError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    sentence = f"Another process is working in {folder}. Wait for it.\n"
    assert done.stderr in ("", sentence), done.stderr
    return done.returncode != 0


def test_a_folder_is_free_again_after_the_block_however_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    with only_one(folder):
        assert holds(folder)
        with pytest.raises(DataError, match="Another process is working"), only_one(folder):
            pass
    assert not holds(folder)

    with pytest.raises(KeyboardInterrupt), only_one(folder):
        raise KeyboardInterrupt
    assert not holds(folder)


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from kedit_bench.journal import only_one\n"
        "with only_one(Path(sys.argv[1])):\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert (tmp_path / ".lock").exists()

    with only_one(tmp_path):
        Journal(tmp_path / "journal.jsonl").append({"n": 1})

    assert json.loads((tmp_path / "journal.jsonl").read_text()) == {"n": 1}
