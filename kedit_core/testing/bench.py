"""What a conformance check works with: one method on one toy model, everything fresh."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.errors import ModelError
from kedit_core.host import ModelHost
from kedit_core.hparams import HyperParams
from kedit_core.job import EditJob
from kedit_core.patch import Patch
from kedit_core.plugins import Catalog
from kedit_core.protocols import EditMethod
from kedit_core.request import EditRequest
from kedit_core.session import EditSession
from kedit_core.spec import MethodSpec
from kedit_core.testing.model_state import ModelState, model_state
from kedit_core.testing.toys import ToyFact, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import join
from kedit_core.view import ModelView

T = TypeVar("T")
Form = Literal["subject first", "subject last", "subject inside"]


class Skipped(Exception):
    """A check does not apply; the message says why."""


class Fault(Exception):
    """What a check lets go wrong on purpose."""


def skip(reason: str) -> NoReturn:
    """End the check: it does not apply to this method.

    Raises:
        Skipped: always.
    """
    raise Skipped(reason)


class Workbench:
    """What the checks of one run share: toy models as they were read, artifacts, a folder.

    Everything here is a pure function of method and layout; checks get copies.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kedit-checks-"))
        self._made: dict[object, object] = {}
        self._numbers = itertools.count()
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returned when it was first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def folder(self) -> Path:
        """A path where nothing is yet."""
        return self.root / f"{next(self._numbers)}"


@dataclass(frozen=True)
class Bench:
    """One method on one toy model.

    Attributes:
        spec: the method.
        hparams: its settings.
        layout: name of the toy model.
        catalog: the installed plugins.
        workbench: what the checks of a run share.
    """

    spec: MethodSpec
    hparams: HyperParams
    layout: str
    catalog: Catalog
    workbench: Workbench

    # -- models ---------------------------------------------------------------------------

    def host(self, dtype: torch.dtype = torch.float32) -> ModelHost:
        """A fresh copy of the toy."""
        model, tokenizer = self.workbench.once(
            (self.layout, dtype), lambda: load_toy(self.layout, dtype)
        )
        return ModelHost(
            copy.deepcopy(model), copy.deepcopy(tokenizer), name=f"the toy {self.layout}"
        )

    def session(
        self, host: ModelHost | None = None, *, store: Path | None = None, seed: int = 0
    ) -> EditSession:
        """A session on a fresh toy, or on `host`; artifacts are shared unless a store is given."""
        return EditSession(
            host or self.host(),
            artifacts=ArtifactStore(store or self.workbench.root / "artifacts"),
            corpus=Corpus(str(toy_corpus())),
            seed=seed,
            catalog=self.catalog,
        )

    def unedited(self) -> ModelView:
        """The view of a toy that nothing edits."""
        return self.workbench.once((self.layout, "unedited"), lambda: ModelView(self.host()))

    def folder(self) -> Path:
        """A path where nothing is yet."""
        return self.workbench.folder()

    # -- requests -------------------------------------------------------------------------

    def fact(self, form: Form = "subject first", number: int = 0) -> ToyFact:
        """One of the toy world's facts whose prompt is of this form."""
        return [f for f in toy_facts() if _form(f.prompt) == form][number]

    def request(self, form: Form = "subject first", number: int = 0) -> EditRequest:
        """The request of a fact."""
        return as_request(self.fact(form, number))

    def requests(self, count: int) -> tuple[EditRequest, ...]:
        """Requests about different subjects."""
        facts = {fact.subject: fact for fact in reversed(toy_facts())}
        return tuple(as_request(fact) for fact in reversed(facts.values()))[:count]

    def request_of_several_tokens(self) -> EditRequest:
        """A request whose target has at least two tokens."""
        host = self.host()
        requests = [as_request(fact) for fact in toy_facts()]
        return next(r for r in requests if len(join(host, r.text, r.target_new).targets) > 1)

    def prompts(self) -> list[str]:
        """Some prompts: an edited one, its other forms, and others."""
        fact = self.fact()
        edited = fact.prompt.format(fact.subject)
        return [edited, *fact.rephrases, *(n.prompt for n in fact.neighborhood), "The"]

    # -- the method -----------------------------------------------------------------------

    def method(self) -> EditMethod:
        """A new instance."""
        return cast(EditMethod, self.spec.load()(self.hparams))

    def job(self, session: EditSession, *requests: EditRequest) -> EditJob:
        """What the session would hand to the method on an unedited model."""
        return EditJob(
            host=session.host,
            requests=requests,
            artifacts=session.artifacts,
            fingerprint=session.fingerprint,
            corpus=session.corpus,
            seed=session.seed,
            unedited=session.suspended,
        )

    def compute(self, session: EditSession, *requests: EditRequest) -> Patch:
        """What the method's `edit` alone returns: nothing is applied or cleaned up after it."""
        self.freeze(session)
        return self.method().edit(self.job(session, *requests))

    def refusal(self) -> str | None:
        """Why the method edits no model like this toy, in its own words, if it says so."""

        def ask() -> str | None:
            try:
                self.compute(self.session(), self.request())
            except ModelError as error:
                return str(error)
            return None

        return self.workbench.once((self.layout, "refusal"), ask)

    def freeze(self, session: EditSession) -> None:
        """Freeze the weights, as a session does before it calls a method."""
        session.model.requires_grad_(False)

    def edit(self, session: EditSession, *requests: EditRequest, overlay: bool = False) -> Patch:
        """Edit as users do; returns the last patch."""
        return session.edit(self.spec, requests, hparams=self.hparams, overlay=overlay).patches[-1]

    def patch(self) -> Patch:
        """The patch of `request()`, computed once in a run."""
        return self.workbench.once(
            (self.layout, "patch"), lambda: self.edit(self.session(), self.request())
        )

    def edited(self, *, overlay: bool = False) -> EditSession:
        """A fresh session with `patch()` in force."""
        session = self.session()
        session.apply(self.patch(), overlay=overlay)
        return session

    def computing(self) -> tuple[ModelState, ModelState]:
        """States before and after computing a patch; observed once in a run."""

        def observe() -> tuple[ModelState, ModelState]:
            session = self.session()
            self.freeze(session)
            method, job = self.method(), self.job(session, self.request())
            before = model_state(session.host)
            method.edit(job)
            return before, model_state(session.host)

        return self.workbench.once((self.layout, "computing"), observe)

    # -- what the model says --------------------------------------------------------------

    def gain(self, view: ModelView, prompts: Sequence[str], target: str) -> float:
        """How much more probable the target is than for the toy: mean difference of the mean
        log-probability of its tokens."""
        targets = [target] * len(prompts)
        before = self.unedited().score(prompts, targets)
        after = view.score(prompts, targets)
        gains = [a.mean_logprob - b.mean_logprob for a, b in zip(after, before, strict=True)]
        return sum(gains) / len(gains)

    def needs_sequences(self) -> None:
        """End the check where the method's edits may not follow one another.

        Raises:
            Skipped: they may not.
        """
        if not self.spec.sequential:
            skip("the method's edits may not follow one another")

    def plugin_module(self) -> str:
        """Name of the module that registers the method.

        Raises:
            Skipped: the spec was handed over and belongs to no installed plugin.
        """
        if self.spec not in self.catalog.all(MethodSpec):
            skip("no installed plugin registers the method")
        name = self.catalog.plugin_of(self.spec).name
        return str(self.catalog.manager.get_plugin(name).__name__)  # type: ignore[union-attr]


def as_request(fact: ToyFact) -> EditRequest:
    """The request to change a fact."""
    return EditRequest(
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=fact.target_new,
        ground_truth=(fact.answer,),
    )


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    """What a new Python that finds the same modules makes of the code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@contextlib.contextmanager
def failing_at(host: ModelHost, number: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Inside the block the model's forward pass number `number` raises.

    Yields:
        A list with one entry for each pass that began.
    """
    passes: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        passes.append(len(passes) + 1)
        if len(passes) == number:
            raise error("a fault on purpose")

    handle = host.module(host.anatomy.embedding).register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def _form(prompt: str) -> Form:
    if prompt.endswith("{}"):
        return "subject last"
    return "subject first" if prompt.startswith("{}") else "subject inside"
