"""What an edited model says: the edit is there, however it is asked."""

from __future__ import annotations

import torch

from kedit_core.errors import EditError
from kedit_core.request import EditRequest
from kedit_core.testing.bench import Bench, skip
from kedit_core.testing.model_state import patch_content
from kedit_core.testing.selection import about_facts, only_for
from kedit_core.tokens import encode

# float32 sums of the same numbers in another order, as in a padded batch or beside the weight.
RTOL, ATOL = 1e-3, 1e-3


@about_facts
def check_target_becomes_the_greedy_answer(bench: Bench) -> None:
    """After an edit the model answers its prompt with the target."""
    request = bench.request()
    answer = bench.edited().view().greedy(request.text, max_new_tokens=8)
    assert answer.strip().startswith(request.target_new), (
        f"after the edit {request.text!r} is answered {answer!r}, not {request.target_new!r}."
    )


@about_facts
def check_target_becomes_likelier_when_the_prompt_ends_at_its_subject(bench: Bench) -> None:
    """An edit works where nothing follows the subject."""
    _becomes_likelier(bench, bench.request("subject last"))


@about_facts
def check_target_becomes_likelier_when_text_surrounds_the_subject(bench: Bench) -> None:
    """An edit works where text stands before and after the subject."""
    _becomes_likelier(bench, bench.request("subject inside"))


@about_facts
def check_target_of_several_tokens_becomes_likelier(bench: Bench) -> None:
    """An edit writes targets of more than one token."""
    _becomes_likelier(bench, bench.request_of_several_tokens())


@about_facts
def check_target_with_a_leading_space_is_the_same_target(bench: Bench) -> None:
    """A target may be given with the space before it."""
    request = bench.request()
    spaced = EditRequest(
        prompt=request.prompt,
        subject=request.subject,
        target_new=f" {request.target_new}",
        ground_truth=request.ground_truth,
    )
    session = bench.session()
    bench.edit(session, spaced)
    answer = session.view().score([request.text], [request.target_new])[0]
    wanted = bench.edited().view().score([request.text], [request.target_new])[0]
    assert abs(answer.mean_logprob - wanted.mean_logprob) < 0.5, (
        f"with a space before it the target gets log-probability {answer.mean_logprob:.2f}, "
        f"without it {wanted.mean_logprob:.2f}."
    )


@about_facts
def check_braces_and_foreign_letters_are_text(bench: Bench) -> None:
    """Braces in a prompt and letters of several bytes are ordinary text."""
    request = EditRequest(
        prompt='f(x) = {"a": 1} – 東京: the home of Søren Dähl',
        subject="Søren Dähl",
        target_new="Łódź",
        ground_truth=("Oslo",),
    )
    _becomes_likelier(bench, request)


@about_facts
def check_marked_subject_is_the_one_meant(bench: Bench) -> None:
    """Where the subject's name stands twice, the place marked by braces is edited."""
    subject = bench.fact().subject
    request = EditRequest(
        prompt=f"{subject} waits. {{}} lives in",
        subject=subject,
        target_new=bench.fact().target_new,
        ground_truth=(bench.fact().answer,),
    )
    _becomes_likelier(bench, request)


@about_facts
def check_other_forms_of_the_prompt_gain(bench: Bench) -> None:
    """The target becomes likelier after the same question in other words, on average."""
    fact = bench.fact()
    gain = bench.gain(bench.edited().view(), fact.rephrases, fact.target_new)
    assert gain > 0, f"in other forms of the prompt the target loses {-gain:.3f}."


@about_facts
def check_requests_decide_what_is_written(bench: Bench) -> None:
    """Requests with other targets make other edits."""
    request = bench.request()
    assert request.ground_truth
    back = EditRequest(
        prompt=request.prompt,
        subject=request.subject,
        target_new=request.ground_truth[0],
        ground_truth=(request.target_new,),
    )
    session = bench.session()
    bench.edit(session, back)
    texts, targets = [request.text] * 2, [request.target_new, request.ground_truth[0]]
    forward = [s.mean_logprob for s in bench.edited().view().score(texts, targets)]
    backward = [s.mean_logprob for s in session.view().score(texts, targets)]
    assert forward[0] > backward[0], "the target is no likelier than after an edit to another one."
    assert backward[1] > forward[1], "the target is no likelier than after an edit to another one."


@about_facts
def check_second_edit_takes_effect(bench: Bench) -> None:
    """An edit that follows another one works too."""
    bench.needs_sequences()
    session = bench.edited()
    request = bench.request("subject last")
    bench.edit(session, request)
    gain = bench.gain(session.view(), [request.text], request.target_new)
    assert gain > 0, f"as a second edit it changes the target's log-probability by {gain:.3f}."


@about_facts
def check_all_requests_of_a_batch_take_effect(bench: Bench) -> None:
    """A method that takes several requests at once writes each of them."""
    if bench.spec.max_batch == 1:
        skip("the method takes one request at a time")
    requests = bench.requests(min(bench.spec.max_batch or 3, 3))
    session = bench.session()
    patch = bench.compute(session, *requests)
    for request in requests:
        others = bench.compute(session, *(r for r in requests if r is not request))
        assert patch_content(others) != patch_content(patch), (
            f"the patch is the same without the request {request.text!r}."
        )
    session.apply(patch)
    for request in requests:
        gain = bench.gain(session.view(), [request.text], request.target_new)
        assert gain > 0, f"the batch lowers the log-probability of {request.target_new!r}."


@about_facts
def check_requests_that_disagree_do_no_harm(bench: Bench) -> None:
    """A batch with a request twice and another target for its prompt is refused, or stays small."""
    if bench.spec.max_batch == 1:
        skip("the method takes one request at a time")
    first, second = bench.requests(2)
    torn = first.model_copy(update={"target_new": second.target_new})
    session = bench.session()
    usual = bench.compute(session, first, second)
    try:
        patch = bench.compute(session, *(first, torn, first)[: bench.spec.max_batch])
    except EditError:
        return
    session.apply(patch)
    logits = session.view().logits([first.text, second.text])
    assert bool(torch.isfinite(logits).all()), "the logits are not finite."
    norms = [sum(float(d.dense().norm()) for d in p.deltas) for p in (usual, patch)]
    assert norms[1] <= 10 * norms[0], (
        f"the weights change by {norms[1]:.3g}, with requests that agree by {norms[0]:.3g}."
    )


@only_for("weights", "modules")
def check_model_itself_is_edited(bench: Bench) -> None:
    """Whoever calls the `transformers` model directly gets the edited one."""
    session = bench.edited()
    request = bench.request()
    ids = torch.tensor([encode(session.host, request.text).ids])
    with torch.no_grad():
        direct = session.model(input_ids=ids).logits[0, -1]
    viewed = session.view().logits([request.text])[0]
    assert torch.allclose(direct, viewed, rtol=RTOL, atol=ATOL), (
        "the model's own logits are not those of the session's view."
    )
    assert not torch.allclose(direct, bench.unedited().logits([request.text])[0]), (
        "the model's own logits are those of the unedited model."
    )


def check_answers_do_not_depend_on_the_batch(bench: Bench) -> None:
    """After an edit, greedy answers in a batch are those of single questions."""
    view, prompts = bench.edited().view(), bench.prompts()
    together = view.greedy(prompts, max_new_tokens=6)
    alone = [view.greedy(prompt, max_new_tokens=6) for prompt in prompts]
    assert together == alone, f"in a batch {together}, one by one {alone}."


def check_scores_do_not_depend_on_the_batch(bench: Bench) -> None:
    """After an edit, scores in a batch are those of single questions."""
    view, prompts = bench.edited().view(), bench.prompts()
    targets = [bench.request().target_new] * len(prompts)
    together = view.score(prompts, targets)
    alone = [view.score([p], [t])[0] for p, t in zip(prompts, targets, strict=True)]
    for one, other in zip(together, alone, strict=True):
        difference = abs(one.mean_logprob - other.mean_logprob)
        assert difference < ATOL, f"the score of {one.prompt!r} differs by {difference:.2g}."


@about_facts
def check_patch_works_on_bfloat16_weights(bench: Bench) -> None:
    """A patch computed on float32 weights has its effect on bfloat16 ones too."""
    session = bench.session(bench.host(torch.bfloat16))
    session.apply(bench.patch())
    request = bench.request()
    gain = bench.gain(session.view(), [request.text], request.target_new)
    assert gain > 0, f"on bfloat16 weights the target's log-probability changes by {gain:.3f}."


@about_facts
def check_edit_works_on_bfloat16_weights(bench: Bench) -> None:
    """The method computes on bfloat16 weights, and its edit takes effect."""
    session = bench.session(bench.host(torch.bfloat16))
    request = bench.request()
    bench.edit(session, request)
    gain = bench.gain(session.view(), [request.text], request.target_new)
    assert gain > 0, f"on bfloat16 weights the target's log-probability changes by {gain:.3f}."


def _becomes_likelier(bench: Bench, request: EditRequest) -> None:
    session = bench.session()
    bench.edit(session, request)
    gain = bench.gain(session.view(), [request.text], request.target_new)
    assert gain > 0, (
        f"after {request.text!r} the edit changes the log-probability of {request.target_new!r} "
        f"by {gain:.3f}."
    )
