"""DoLa's and DeCo's formulas, against plain Python."""

import math

import pytest
import torch
from kedit_decode.contrast import OUT, contrast, jensen_shannon
from kedit_decode.correct import correct


def logits_of(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row):
    exps = [math.exp(x - max(row)) for x in row]
    return [x / sum(exps) for x in exps]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def dola(final, early, alpha):
    """One row, as the paper writes it."""
    last, others = softmax(final), [softmax(row) for row in early]

    def differs(q):
        mean = [(a + b) / 2 for a, b in zip(last, q, strict=True)]
        return (divergence(last, mean) + divergence(q, mean)) / 2

    chosen = max(others, key=differs)
    return [
        math.log(p / q) if p >= alpha * max(last) else OUT
        for p, q in zip(last, chosen, strict=True)
    ]


def deco(final, early, alpha, top_p, top_k):
    """One row, as the paper writes it."""
    shares, candidates, total = softmax(final), [], 0.0
    for token in sorted(range(len(final)), key=lambda t: -shares[t])[:top_k]:
        if total < top_p:
            candidates.append(token)
        total += shares[token]
    others = [softmax(row) for row in early]
    sure, layer = max((others[n][c], n) for n in range(len(early)) for c in candidates)
    return [
        final[t] + alpha * sure * early[layer][t] if t in candidates else OUT
        for t in range(len(final))
    ]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.9, 1.0])
def test_contrast_is_that_of_the_paper(alpha):
    final, early = logits_of(6, 11), logits_of(4, 6, 11, seed=1)

    expected = [dola(final[n].tolist(), early[:, n].tolist(), alpha) for n in range(6)]

    torch.testing.assert_close(
        contrast(final, list(early), alpha), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.9, 20), (0.9, 3), (0.5, 20), (1.0, 1), (1e-6, 9), (1.0, 11)]
)
def test_correction_is_that_of_the_paper(top_p, top_k):
    final, early = logits_of(6, 11), logits_of(4, 6, 11, seed=1)

    expected = [deco(final[n].tolist(), early[:, n].tolist(), 0.6, top_p, top_k) for n in range(6)]

    torch.testing.assert_close(
        correct(final, list(early), 0.6, top_p, top_k),
        torch.tensor(expected),
        rtol=1e-4,
        atol=1e-4,
    )


def test_divergence_is_jensens_and_shannons():
    """Of two distributions that exclude each other it is log 2; it has no direction."""
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.0, 1.0]]).log()
    a, b = logits_of(3, 7).log_softmax(-1), logits_of(3, 7, seed=1).log_softmax(-1)

    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([math.log(2)]))
    torch.testing.assert_close(jensen_shannon(a, b), jensen_shannon(b, a))
    torch.testing.assert_close(jensen_shannon(a, a), torch.zeros(3))


def test_directions_of_the_divergence_matter_for_the_choice():
    """Where KL(m ‖ ·) would choose another layer than JSD, JSD's choice is taken."""
    last = torch.tensor([[0.9, 0.09, 0.01]]).log()
    early = [torch.tensor([[1 - 2e-9, 1e-9, 1e-9]]).log(), torch.tensor([[0.3, 0.5, 0.2]]).log()]
    backwards = []
    for layer in early:
        m = ((last.exp() + layer.exp()) / 2).log()
        backwards.append(sum(float((m.exp() * (m - other)).sum()) for other in (last, layer)))

    assert backwards[0] > backwards[1]
    torch.testing.assert_close(contrast(last, early, 0.5)[0, 0], (last - early[1])[0, 0])


@pytest.mark.parametrize(
    "change",
    [lambda f, e: contrast(f, e, 0.1), lambda f, e: correct(f, e, 0.6, 0.9, 20)],
    ids=["dola", "deco"],
)
class TestEachRow:
    def test_depends_on_itself_alone(self, change):
        final, early = logits_of(16, 40), logits_of(5, 16, 40, seed=1)
        together = change(final, list(early))
        alone = [change(final[n : n + 1], list(early[:, n : n + 1])) for n in range(16)]

        assert torch.equal(together, torch.cat(alone))

    def test_chooses_its_own_layer(self, change):
        """A layer that is far away, and sure, for one row only is chosen there only."""
        final = torch.tensor([[3.0, 2.9, 0.0, 0.0]]).repeat(3, 1)
        early = [final.clone() * 0.9 for _ in range(3)]
        for n in range(3):
            early[n][n] = torch.tensor([9.0, -9.0, 0.0, 0.0])
        only = [change(final[:1], [early[n][n : n + 1]]) for n in range(3)]

        torch.testing.assert_close(change(final, early), torch.cat(only))

    def test_waits_for_no_device(self, change, monkeypatch):
        for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, _waits)

        change(logits_of(4, 30), [logits_of(4, 30, seed=1), logits_of(4, 30, seed=2)])

    def test_leaves_its_inputs_alone_and_keeps_their_type(self, change):
        final, early = logits_of(4, 30).bfloat16(), [logits_of(4, 30, seed=1).bfloat16()]
        before = final.clone(), early[0].clone()

        found = change(final, early)

        assert found.dtype == torch.bfloat16
        assert torch.equal(final, before[0])
        assert torch.equal(early[0], before[1])

    def test_gives_numbers_even_where_tokens_are_forbidden(self, change):
        final, early = logits_of(4, 30), [logits_of(4, 30, seed=1), logits_of(4, 30, seed=2)]
        for layer in (final, *early):
            layer[:, 3] = -torch.inf

        assert torch.isfinite(change(final, early)).all()

    def test_likeliest_token_always_stays(self, change):
        final = logits_of(8, 30)
        kept = change(final, [logits_of(8, 30, seed=1)])

        assert (kept.gather(1, final.argmax(-1, keepdim=True)) > OUT).all()


def _waits(self, *args):
    raise AssertionError("the host waits for the device")
