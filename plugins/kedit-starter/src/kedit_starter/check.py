"""Does a model know the starter facts?  `python -m kedit_starter.check --model smollm2-135m`"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kedit_core import EditCase, KEditError, LeftOut
from kedit_core.progress import progress
from kedit_core.texts import begins_with
from kedit_starter.dataset import Starter

if TYPE_CHECKING:
    from kedit_core.editing import ModelView

BATCH = 64
KINDS = ("prompt", "rephrase", "neighborhood")


@dataclass(frozen=True)
class Question:
    """One prompt of a fact and the true answer, which the unedited model should begin with."""

    fact: str
    relation: str
    kind: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What the model went on with, and whether that begins with a right answer."""

    question: Question
    text: str

    @property
    def is_right(self) -> bool:
        """Whether the text begins with one of the answers, as metrics compare them."""
        return any(begins_with(self.text, answer) for answer in self.question.answers)


def questions(cases: Iterable[EditCase | LeftOut]) -> list[Question]:
    """All that the facts claim about the unedited model; consequences of the edit are not asked."""
    found = []
    for case in cases:
        if isinstance(case, LeftOut):
            continue
        relation, truth = str(case.meta["relation"]), case.request.ground_truth
        found.append(Question(case.request.id, relation, "prompt", case.request.text, truth))
        for probe in case.probes:
            if probe.kind == "rephrase":
                asked = Question(case.request.id, relation, "rephrase", probe.prompt, truth)
            elif probe.kind == "locality":
                asked = Question(
                    case.request.id, relation, "neighborhood", probe.prompt, probe.expected
                )
            else:
                continue
            found.append(asked)
    return found


def ask(view: ModelView, asked: Sequence[Question]) -> list[Reply]:
    """The model's greedy replies, in the order of the questions."""
    texts: dict[str, str] = {}
    prompts = list(dict.fromkeys(question.prompt for question in asked))  # neighbours recur
    with progress(len(prompts), "Asking", unit="prompt") as bar:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            texts.update(zip(batch, view.greedy(batch, max_new_tokens=12), strict=True))
            bar.update(len(batch))
    return [Reply(question, texts[question.prompt]) for question in asked]


def main(
    model: Annotated[str, typer.Option(help="A registered name, a folder or a hub id.")] = (
        "smollm2-135m"
    ),
) -> None:
    """Check every prompt, rephrasing and neighbour of the starter facts against a model."""
    asked = questions(Starter().cases())

    from kedit_core.editing import EditSession, ModelHost  # torch is loaded here

    try:
        replies = ask(EditSession(ModelHost.load(model)).view(), asked)
    except KEditError as error:
        typer.echo(error, err=True)
        raise typer.Exit(error.exit_code) from None
    _print_table(replies)
    wrong = [reply for reply in replies if not reply.is_right]
    for reply in wrong:
        question = reply.question
        typer.echo(
            f"{question.fact} ({question.kind}): {question.prompt!r} is answered {reply.text!r}, "
            f"not {question.answers[0]!r}",
            err=True,
        )
    if any(reply.question.kind == "prompt" for reply in wrong):
        raise typer.Exit(1)


def _print_table(replies: Sequence[Reply]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("relation", *KINDS)
    total = Counter((reply.question.relation, reply.question.kind) for reply in replies)
    right = Counter(
        (reply.question.relation, reply.question.kind) for reply in replies if reply.is_right
    )
    relations = sorted({reply.question.relation for reply in replies})
    for relation in relations:
        table.add_row(
            relation, *(f"{right[relation, kind]}/{total[relation, kind]}" for kind in KINDS)
        )
    table.add_section()
    sums = {kind: [sum(c[r, kind] for r in relations) for c in (right, total)] for kind in KINDS}
    table.add_row("all", *(f"{sums[kind][0]}/{sums[kind][1]}" for kind in KINDS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
