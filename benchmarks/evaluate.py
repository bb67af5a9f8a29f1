"""Evaluating an edited model: as `kedit eval` does it, or one question at a time.

    python benchmarks/evaluate.py --data counterfact.json        smollm2-135m, CounterFact records
    python benchmarks/evaluate.py --toy                          a few seconds, to see that it runs

Plain: every question is a batch of its own, before and after, for every case.  Together: what
`kedit eval` does in the regime `single`, from the cases' file to the result, with a method whose
edit costs nothing: the unedited side in large batches, the edited side case by case, a journal of
the answers, and the scores of what is read back.  Answers that were kept from an earlier run are
not used.  Both ways ask the same, and their scores are compared.  The plain way is measured on the
first `--plain` cases only.  The share of time outside the model's own forward passes is reported
too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from kedit_bench.cell import Cell
from kedit_bench.regime import Regime
from kedit_bench.results import write_result
from kedit_bench.run import Run
from kedit_bench.scoring import IMMEDIATE, Measurement, Scorer, choose_metrics
from kedit_bench.unedited import AnswerCache, Asker
from kedit_core import EditCase, EditRequest, HyperParams, MethodSpec, Probe, discover
from kedit_core.ask import Answer, Answers, Question
from kedit_core.editing import EditJob, EditSession, ModelHost, Patch, WeightDelta
from kedit_core.testing.toys import load_toy, toy_facts

WHERE = {"schedule": "single", "model": "-", "dtype": "-", "dataset": "-"}


class SmallChange:
    """An edit that costs nothing; what it is does not matter here."""

    def __init__(self, hparams: HyperParams) -> None:
        pass

    def edit(self, job: EditJob) -> Patch:
        site = job.host.mlp_out(1)
        d_out, d_in = job.host.weight(site).shape
        left, right = torch.full((d_out, 1), 1e-4), torch.full((1, d_in), 1e-3)
        return Patch("small-change", (WeightDelta(site, left, right),))


METHOD = MethodSpec(
    "small-change", f"{__name__}:SmallChange", "", hparams="kedit_core.hparams:HyperParams"
)


class Noting(Scorer):
    """A scorer that notes the values of the edited side."""

    values: list[float]

    def score(
        self, case: EditCase, before: Answers, after: Answers, moment: str
    ) -> list[Measurement]:
        found = super().score(case, before, after, moment)
        self.values += [measurement.value for measurement in found]
        return found


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    catalog = discover()
    if options.toy:
        host, cases = ModelHost(*load_toy("llama"), "toy"), toy_cases()
        wanted = ["efficacy/greedy@1", "*/teacher-forced@1"]
    else:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        adapter = catalog.dataset(options.dataset).load()()
        found = (c for c in adapter.cases(options.data) if isinstance(c, EditCase))
        cases = list(islice(found, options.cases))
        wanted = options.metric
    chosen = choose_metrics(
        catalog, wanted, None if options.toy else catalog.dataset(options.dataset)
    )
    scorer = Noting(chosen, WHERE)
    session = EditSession(host, catalog=catalog)
    few = cases[: options.plain]

    one_by_one(session, scorer, few[:1])  # warm up
    plain, seconds_plain, _ = timed(host, lambda: one_by_one(session, scorer, few))
    _, seconds_few, _ = timed(host, lambda: together(session, scorer, few))
    fast, seconds, in_model = timed(host, lambda: together(session, scorer, cases))
    sys.stdout.write(
        json.dumps(
            {
                "cases": len(cases),
                "questions": sum(len(scorer.questions(case)) for case in cases),
                "metrics": [c.name for c in chosen],
                "threads": options.threads,
                "plain_cases": len(few),
                "plain_seconds_per_case": round(seconds_plain / len(few), 4),
                "together_seconds_per_case": round(seconds_few / len(few), 4),
                "ratio": round(seconds_few / seconds_plain, 3),
                "together_seconds_all": round(seconds, 2),
                "outside_the_model": round(1 - in_model / seconds, 3),
                "largest_difference_of_scores": largest_difference(plain, fast),
            },
            indent=2,
        )
        + "\n"
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="counterfact")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--metric", action="append", default=[])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--plain", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def toy_cases() -> list[EditCase]:
    return [
        EditCase(
            request=EditRequest(prompt=f.prompt, subject=f.subject, target_new=f.target_new),
            probes=tuple(
                Probe(kind="locality", prompt=n.prompt, expected=n.answer) for n in f.neighborhood
            ),
        )
        for f in toy_facts()[:12]
    ]


def one_by_one(session: EditSession, scorer: Noting, cases: Sequence[EditCase]) -> list[float]:
    """Every question alone, on both sides, again for every case."""
    scorer.values = []
    for case in cases:
        questions = scorer.questions(case)
        before = alone(session, questions)
        with session.trial(METHOD, case.requests, hparams=HyperParams()):
            scorer.score(case, before, alone(session, questions), IMMEDIATE)
    return scorer.values


def alone(session: EditSession, questions: Sequence[Question]) -> dict[Question, Answer]:
    answers: dict[Question, Answer] = {}
    for question in questions:
        answers.update(session.view().ask([question]))
    return answers


def together(session: EditSession, scorer: Noting, cases: Sequence[EditCase]) -> list[float]:
    """As `kedit eval`: a run's folder with its cases, a cell, and its result."""
    scorer.values = []
    with tempfile.TemporaryDirectory() as folder:
        asker = Asker(session, AnswerCache({"of": "this run"}, Path(folder)))
        run = Run(Path(folder) / "run")
        run.begin({}, cases, None)
        cell = Cell(run.folder / "cell", METHOD, HyperParams(), Regime.parse("single"), scorer)
        cell.run(session, asker, run.cases())
        write_result(cell.folder, {}, run.cases(), scorer)
    return scorer.values


def timed(host: ModelHost, work):
    """What the work returns, its seconds, and those of them that the model's forward took."""
    with forward_time(host) as spent:
        started = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - started
    return found, seconds, spent[0]


@contextmanager
def forward_time(host: ModelHost) -> Iterator[list[float]]:
    spent, started = [0.0], [0.0]

    def begin(*_: object) -> None:
        started[0] = time.perf_counter()

    def end(*_: object) -> None:
        spent[0] += time.perf_counter() - started[0]

    handles = (
        host.model.register_forward_pre_hook(begin),
        host.model.register_forward_hook(end),
    )
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def largest_difference(plain: Sequence[float], fast: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(plain, fast, strict=False))


if __name__ == "__main__":
    main()
