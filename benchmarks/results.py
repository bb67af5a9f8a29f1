"""The results page: methods on public benchmarks with a real model, made by one command.

    python benchmarks/results.py --data FOLDER --out results      writes docs/results.md

FOLDER holds the benchmarks' files under the names in `SETS`.  What was stopped goes on with the
same command.  The page shows what is finished in `--out`, and is written anew after each set.
`--limit` takes fewer records of each set, and the page says how many there were.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kedit_bench.report import cases_note, effort_rows, protocol_rows, score_rows
from kedit_core.cli import main as kedit

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
METHODS = ("rome", "r-rome", "ft-l", "ft-m")
SETS = (  # dataset, file, records
    ("counterfact", "counterfact/counterfact.json", 200),
    ("zsre", "zsre/zsre_mend_eval.json", 200),
    ("knowedit-recent", "KnowEdit/wiki_recent/recent_train.json", 50),
    ("knowedit-counterfact", "KnowEdit/wiki_counterfact/test_cf.json", 50),
    ("knowedit-zsre", "KnowEdit/ZsRE/ZsRE-test-all.json", 50),
    ("knowedit-wikibio", "KnowEdit/WikiBio/wikibio-test-all.json", 50),
    ("knowedit-convsent", "KnowEdit/Convsent/blender_test.json", 50),
    ("knowedit-sanitation", "KnowEdit/Sanitation/trivia_qa_test.json", 50),
)
HEAD = """# Results

Methods on public benchmarks with [{model}](models.md), each record edited by itself (regime
`single`), presets as they come with the methods, seed 0. Made by

```bash
python benchmarks/results.py --data FOLDER --out results
```

Scores are mean ± standard error, with the number of records; [Metrics](metrics.md) has the
formulas. The model is small: it often does not know the facts that are edited, and its neighbours
change easily. Seconds and memory depend on the machine; compare them within a table only. Targets
of the unedited model are kept: `r-rome` takes those of `rome`, whose seconds hold for both.
"""


def main() -> None:
    options = read_options()
    for dataset, file, records in SETS:
        path = options.data / file
        if path.exists() and (not options.only or dataset in options.only):
            limit = min(records, options.limit)
            evaluate(options, dataset, path, limit, options.out / dataset)
            write_page(options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--only", action="append", default=[], help="one of the sets; repeatable")
    parser.add_argument("--limit", type=int, default=sys.maxsize)
    return parser.parse_args()


def evaluate(options: argparse.Namespace, dataset: str, path: Path, limit: int, out: Path) -> None:
    methods = [a for name in options.method or METHODS for a in ("--method", name)]
    arguments = ["--model", options.model, "--dataset", dataset, "--data", str(path), *methods]
    try:
        kedit(["eval", *arguments, "--limit", str(limit), "--out", str(out)])
    except SystemExit as ended:
        if ended.code:
            raise


def write_page(options: argparse.Namespace) -> None:
    parts = [HEAD.format(model=options.model)]
    for dataset, _, _ in SETS:
        files = sorted((options.out / dataset).glob("*/result.json"))
        found = [json.loads(file.read_text("utf-8")) for file in files]
        if found:
            parts.append(section(dataset, sorted(found, key=place)))
    PAGE.write_text("\n".join(parts), "utf-8")


def place(result: dict) -> int:
    """Where a method's column stands."""
    return METHODS.index(result["method"]) if result["method"] in METHODS else len(METHODS)


def section(dataset: str, results: list[dict]) -> str:
    """Scores, effort and protocols of one dataset."""
    lines = [f"## {dataset}", "", *table(*score_rows(results)), ""]
    if note := cases_note(results):
        lines += [note, ""]
    lines += [*table(*effort_rows(results)), ""]
    for result in results:
        for key, what in (("left_out", "left out"), ("failed", "failed, scored without it")):
            if result[key]:
                first = next(iter(result[key].values()))
                lines += [f"`{result['label']}`: {len(result[key])} {what}; the first: {first}", ""]
    lines += ["How it was measured:", "", *table(*protocol_rows(results)), ""]
    return "\n".join(lines)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = (header, tuple("---" for _ in header), *rows)
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
