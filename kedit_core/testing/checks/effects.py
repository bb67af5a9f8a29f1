"""Effects that do not live in weights: every row its own, with a cache, among other edits."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file

from kedit_core.ask import Continue, Read, Score, Text
from kedit_core.effects import ModuleSwap, WeightDelta
from kedit_core.patch import Base, Patch
from kedit_core.testing.bench import Bench, in_fresh_python, skip
from kedit_core.testing.checks.answers import ATOL, RTOL
from kedit_core.testing.model_state import assert_same, model_state, patch_content
from kedit_core.testing.selection import only_for
from kedit_core.testing.toys import toy_folder


def check_what_is_written_is_what_is_read(bench: Bench) -> None:
    """Text written with a cache is, read at once, the most probable one at every token."""
    view = bench.edited().view()
    answers = view.ask([Continue(prompt, 6) for prompt in bench.prompts()])
    written = {q.prompt: a for q, a in answers.items() if isinstance(a, Text) and a.tokens}
    reads = view.ask([Read(prompt, text.text) for prompt, text in written.items()])
    compared = 0
    for score in reads.values():
        assert isinstance(score, Score)
        if score.tokens != written[score.prompt].tokens:
            continue  # the text has another encoding than the tokens that were written
        compared += 1
        assert score.predicted == score.tokens, (
            f"after {score.prompt!r} {score.target!r} is written, but not what is most probable "
            f"where it is read."
        )
    assert compared, "no written text could be read."


def check_edit_stands_over_and_under_a_change_of_weights(bench: Bench) -> None:
    """Among changes of weights an edit is in force, and popped in order all is as before."""
    session, prompts = bench.session(), bench.prompts()
    before = model_state(session.host)
    steps = [_weights(bench, 1), bench.patch(), _weights(bench, 2)]
    logits = [session.view().logits(prompts)]
    for patch in steps:
        session.apply(replace(patch, base=Base()))
        logits.append(session.view().logits(prompts))
        assert not torch.equal(logits[-1], logits[-2]), f"the {patch.method} patch has no effect."
    for expected in reversed(logits[:-1]):
        session.pop()
        assert torch.equal(session.view().logits(prompts), expected), "popping gives other logits."
    assert_same(before, model_state(session.host), "After all is popped")


def check_one_edit_is_taken_back_from_among_others(bench: Bench) -> None:
    """Without one of three edits, the model is what the two others alone make it."""
    if not bench.spec.removable:
        skip("the method's edits build on each other")
    bench.needs_sequences()
    session, others = bench.session(), bench.session()
    for request in bench.requests(3):
        bench.edit(session, request)
    first, _, last = session.stack
    session.remove(1)
    for patch in (first, last):
        others.apply(patch)
    assert list(map(patch_content, session.stack)) == list(map(patch_content, others.stack))
    assert torch.equal(
        session.view().logits(bench.prompts()), others.view().logits(bench.prompts())
    ), "the logits are not those of the other two edits."


@only_for("modules", "calls")
def check_saved_edits_load_in_another_process(bench: Bench) -> None:
    """Loaded in a fresh process, an edit gives the same logits."""
    bench.plugin_module()
    session, folder = bench.edited(), bench.folder()
    logits = session.view().logits(bench.prompts())
    session.save(folder)
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from kedit_core.editing import EditSession, ModelHost\n"
        f"host = ModelHost.load({str(toy_folder(bench.layout))!r}, device='cpu', dtype='float32')\n"
        "session = EditSession(host)\n"
        f"session.load(Path({str(folder)!r}))\n"
        f"logits = session.view().logits({bench.prompts()!r})\n"
        f"save_file({{'logits': logits}}, {str(folder / 'logits.safetensors')!r})\n"
    )
    run = in_fresh_python(code)
    assert run.returncode == 0, f"it cannot be loaded: {run.stderr.strip()[-300:]}"
    loaded = load_file(folder / "logits.safetensors")["logits"]
    assert torch.allclose(loaded, logits, rtol=RTOL, atol=ATOL), "the logits are other ones."


def _weights(bench: Bench, seed: int) -> Patch:
    """A random change of a matrix: of one that the method wraps, if it wraps any."""
    host = bench.host()
    generator = torch.Generator().manual_seed(seed)
    outs = [block.mlp_out for block in host.blocks if block.mlp_out is not None]
    wrapped = {e.path for e in bench.patch().effects if isinstance(e, ModuleSwap)}
    site = next((site for site in outs if site.module in wrapped), outs[0])
    d_out, d_in = host.weight(site).shape
    left = torch.randn(d_out, 1, generator=generator) * 0.05
    return Patch("by hand", (WeightDelta(site, left, torch.randn(1, d_in, generator=generator)),))
