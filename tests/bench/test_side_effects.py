"""What edits do to a model as a whole, against what they are known to do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from kedit_bench import effort
from kedit_bench.metrics.side_effects import Inference, Perplexity, WeightChange
from kedit_core.editing import EditSession
from kedit_core.errors import SettingError
from tests.core.edits import based, bias_patch, bits, same, shift_patch, weight_patch


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_perplexity_of_a_text_is_that_of_its_tokens(toy, toy_host, tmp_path):
    words = "Mira Voss lives in Lima and Tamsin speaks Norse in New Haven"
    (tmp_path / "text.txt").write_text(f"{words}\n\nshort\n\n{words} again\n")
    session = EditSession(toy_host(toy))
    metric = Perplexity(str(tmp_path / "text.txt"), words=10)

    head, rest = words.split()[:4], words.split()[4:10]
    (alone,) = session.view().score([" ".join(head)], [" ".join(rest)])

    assert len(metric.passages) == 2
    assert metric.measure(session)[""] == pytest.approx(math.exp(-alone.mean_logprob), rel=1e-4)


def test_a_text_without_long_passages_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("too short\n")

    with pytest.raises(SettingError, match="no passage of at least 50 words"):
        Perplexity(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_the_change_of_a_matrix_is_that_of_all_edits_together(toy, toy_host):
    host = toy_host(toy)
    session = EditSession(host)
    sites = [host.mlp_out(layer) for layer in (0, 1)]
    before = [host.weight(site).clone() for site in sites]
    assert WeightChange().measure(session) == {"": 0.0}
    session.apply(based(session, weight_patch(host, 0, 1, seed=1)))
    session.apply(based(session, weight_patch(host, 1, seed=2)))
    session.apply(based(session, bias_patch(host, 5)))
    edited = bits(host.model)

    found = WeightChange().measure(session)

    ratios = [
        float((host.weight(site) - old).norm() / old.norm())
        for site, old in zip(sites, before, strict=True)
    ]
    for site, ratio in zip(sites, ratios, strict=True):
        assert found.pop(site.parameter) == pytest.approx(ratio, rel=1e-4)
    assert found == {"": pytest.approx(max(ratios), rel=1e-4)}
    assert same(bits(host.model), edited)


def test_changes_beside_the_weights_count_too(toy_host):
    host = toy_host("llama")
    session = EditSession(host)
    patch = weight_patch(host, 0)
    session.apply(based(session, patch), overlay=True)

    (delta,) = patch.deltas
    ratio = float(delta.dense().norm() / host.weight(delta.site).norm())
    assert WeightChange().measure(session)[""] == pytest.approx(ratio)


def test_bytes_beside_the_weights_are_those_of_overlays_modules_and_calls(toy_host):
    host = toy_host("llama")
    session = EditSession(host)
    patches = [weight_patch(host, 0), shift_patch(host, host.block(0).path), bias_patch(host, 5)]
    sizes = [sum(t.nbytes for e in p.effects for t in e.tensors.values()) for p in patches]
    assert Inference(1).measure(session) == {"": 1.0, "extra_bytes": 0.0}
    for patch in patches:
        session.apply(based(session, patch))

    assert Inference(1).measure(session)["extra_bytes"] == sizes[1] + sizes[2]

    session.rollback()
    session.apply(based(session, patches[0]), overlay=True)
    assert Inference(1).measure(session)["extra_bytes"] == sizes[0]


def test_an_edit_that_makes_the_model_slow_is_seen(toy_host, monkeypatch):
    host = toy_host("llama")
    session = EditSession(host)
    session.apply(based(session, shift_patch(host, host.block(0).path, scale=0.0)))
    swapped = host.module(host.block(0).path)
    forward = type(swapped).forward
    clock = [0.0]

    def slow(self, *args, **kwargs):
        clock[0] += 1 if self.passes_through else 4
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(swapped), "forward", slow)
    monkeypatch.setattr(effort, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    assert Inference(1).measure(session)[""] == 0.25
