"""One edit with a method of the family: the target leads, and ordinary text is left alone."""

from __future__ import annotations

import pytest

from kedit_core import EditRequest, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession
from kedit_core.spec import MethodSpec
from kedit_core.testing.toys import TOYS, toy_corpus, toy_facts

METHODS = ("rome", "r-rome", "memit", "emmet", "pmet", "alphaedit")
# On these small models PMET's own stop comes before the MLP's part is enough by itself.
SETTINGS = {"pmet": {"reached_factor": 1.0, "reached_kl": 0.0}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("method", METHODS)
def test_target_leads_and_nine_of_ten_other_texts_go_on_as_before(method, toy, toy_host, store):
    if method not in {spec.name for spec in discover().all(MethodSpec)}:
        pytest.skip(f"{method} is not installed")
    session = EditSession(toy_host(toy), artifacts=store, corpus=Corpus(str(toy_corpus())))
    facts = [fact for fact in toy_facts() if not fact.prompt.startswith("{}")][:2]
    lines = toy_corpus().read_text(encoding="utf-8").split(". ")[:60]
    begun = {line.rpartition(" ")[0] for line in lines} - {""}  # each without its last word
    texts = sorted(t for t in begun if not any(fact.subject in t for fact in facts))
    before = session.view().logits(texts).argmax(dim=-1)

    for fact in facts:
        request = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        with session.trial(method, request, preset="toy", hparams=SETTINGS.get(method)):
            answer = session.view().greedy(request.text, max_new_tokens=6)
            kept = session.view().logits(texts).argmax(dim=-1) == before

        assert answer.strip().startswith(fact.target_new)
        assert float(kept.float().mean()) >= 0.9
