"""Two tiny trained models, and the small invented world they know, to test editing methods on.

`gpt2` has transposed weights, biases, learned positions and a tied head; its tokenizer adds
nothing and cannot pad.  `llama` has a gated MLP, no biases and an untied head; its tokenizer puts
a BOS token first and pads on the left.  Both answer every fact of `toy_facts()` in every form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOYS = ("gpt2", "llama")
_FOLDER = Path(__file__).parent / "toys"


@dataclass(frozen=True)
class Neighbor:
    """A question about another subject, and the answer that an edit must leave alone."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class ToyFact:
    """One fact that the toys know, and what may be asked about an edit of it.

    Attributes:
        id: relation and number, "home-03".
        prompt: one form of the question, with `{}` in the subject's place; it ends there in every
            third fact.
        answer: what the toys answer, without a leading space; sometimes several tokens.
        target_new: another answer of the same relation.
        rephrases: the question in the other forms of its kind, the subject filled in: those that
            end at the subject if the prompt does, otherwise those that go on after it.
        neighborhood: the same form asked about other subjects, first those with the same answer.
    """

    id: str
    relation: str
    subject: str
    prompt: str
    answer: str
    target_new: str
    rephrases: tuple[str, ...]
    neighborhood: tuple[Neighbor, ...]


def toy_folder(name: str) -> Path:
    """The folder of a toy, in the layout of `from_pretrained`."""
    if name not in TOYS:
        raise ValueError(f"there is no toy model '{name}'; there are {' and '.join(TOYS)}.")
    return _FOLDER / name


def load_toy(
    name: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh copy of a toy in evaluation mode, float32 unless `dtype` says otherwise."""
    import torch
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = toy_folder(name)
    layout = GPT2LMHeadModel if name == "gpt2" else LlamaForCausalLM
    model: PreTrainedModel = layout.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def toy_facts() -> tuple[ToyFact, ...]:
    """The world: all facts that the toys know."""
    return tuple(_fact(line) for line in (_FOLDER / "facts.jsonl").read_text("utf-8").splitlines())


def toy_corpus() -> Path:
    """Text of the kind the toys were trained on, one document a line."""
    return _FOLDER / "corpus.txt"


def _fact(line: str) -> ToyFact:
    fields = json.loads(line)
    fields["rephrases"] = tuple(fields["rephrases"])
    fields["neighborhood"] = tuple(Neighbor(**n) for n in fields["neighborhood"])
    return ToyFact(**fields)
