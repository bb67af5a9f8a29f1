"""The balls of GRACE: closed forms, and what holds after any sequence of edits."""

from __future__ import annotations

import pytest
import torch
from kedit_grace.book import Book, Entry

ROME, OSLO, LIMA = (7,), (8,), (9,)


def entry(key, label, value=None, eps=1.0) -> Entry:
    """An edit with the key (key, 50); its value is its label's unless one is given."""
    key = torch.tensor([float(key), 50.0]) if isinstance(key, (int, float)) else key
    value = torch.tensor([float(sum(label))]) if value is None else torch.tensor([float(value)])
    return Entry(key, value, label, eps)


def book_of(*entries: Entry) -> Book:
    book = Book()
    for one in entries:
        book.add(one)
    return book


def answer(book: Book, key: torch.Tensor):
    number, distance = book.nearest(key)
    return book.entries[number] if number >= 0 and distance <= book.radii[number] else None


def test_far_keys_open_balls_of_the_first_radius():
    book = book_of(entry(0, ROME), entry(2.1, OSLO))
    assert book.radii.tolist() == [1.0, 1.0]
    assert book.homes.tolist() == [0, 1]


def test_overlapping_balls_of_two_labels_shrink_to_half_the_distance():
    book = book_of(entry(0, ROME), entry(1.5, OSLO))
    torch.testing.assert_close(book.radii, torch.tensor([0.75 - 1e-5, 0.75]))


def test_overlapping_edit_that_says_the_same_widens_the_ball():
    book = book_of(entry(0, ROME), entry(1.5, ROME))
    torch.testing.assert_close(book.radii, torch.tensor([1.5 + 0.05, -1.0]))
    assert book.homes.tolist() == [0, 0]
    assert book.catches(torch.tensor([1.5 * (1 + 1e-5), 50.0]))  # rounding does not decide


def test_key_inside_a_ball_that_says_the_same_changes_no_radius():
    book = book_of(entry(0, ROME), entry(0.5, ROME))
    assert book.radii.tolist() == [1.0, -1.0]


def test_same_label_with_another_value_opens_a_ball_and_shrinks_none():
    book = book_of(entry(0, ROME, value=1), entry(1.5, ROME, value=2))
    assert book.radii.tolist() == [1.0, 1.0]


def test_ball_never_grows_by_a_conflict():
    """The paper's ε ← d/2 would widen a ball that an earlier conflict had made small."""
    book = book_of(entry(0, ROME), entry(0.2, OSLO), entry(-1.0, LIMA))
    torch.testing.assert_close(book.radii, torch.tensor([0.1 - 1e-5, 0.1, 0.5]))


@pytest.mark.parametrize(("label", "joins"), [(LIMA, True), (ROME, False), (OSLO, False)])
def test_conflict_is_judged_by_the_label_of_the_nearest_key(label, joins):
    """Kept in the other order than their keys, the labels of others would be compared."""
    book = book_of(entry(0, ROME), entry(10, OSLO), entry(20, LIMA), entry(20.5, label))
    assert (book.homes[3] == 2) == joins
    assert book.radii[:2].tolist() == [1.0, 1.0]
    assert float(book.radii[2]) == pytest.approx(1.0 if joins else 0.25 - 1e-5)


@pytest.mark.parametrize("other", [(4, 2, 9), (5,), (5, 5, 5, 5), (9, 2, 4, 5)])
def test_labels_are_compared_token_by_token(other):
    """All have the mean of the first."""
    book = book_of(entry(0, (2, 4, 9), value=1), entry(0.8, other, value=1))
    torch.testing.assert_close(book.radii, torch.tensor([0.4 - 1e-5, 0.4]))


def test_later_edit_of_the_same_prompt_counts():
    book = book_of(entry(0, ROME), entry(0.9, ROME), entry(0, OSLO))
    assert answer(book, torch.tensor([0.0, 50.0])).label == OSLO
    assert answer(book, torch.tensor([0.9, 50.0])).label == ROME  # which had lived in that ball
    assert float(book.radii[0]) == -1


def test_edit_gets_its_own_ball_when_the_one_that_holds_it_shrinks():
    book = book_of(entry(0, ROME), entry(1.5, ROME), entry(1.6, OSLO))
    assert answer(book, torch.tensor([1.5, 50.0])).label == ROME
    assert answer(book, torch.tensor([1.6, 50.0])).label == OSLO
    assert answer(book, torch.tensor([0.0, 50.0])).label == ROME


def test_large_radius_makes_no_two_prompts_one():
    book = book_of(entry(0, ROME, eps=1e4), entry(2, OSLO, eps=1e4))
    torch.testing.assert_close(book.radii, torch.tensor([1 - 1e-5, 1.0]))


def test_two_keys_that_are_equal_are_at_distance_zero():
    key = torch.randn(1536, generator=torch.Generator().manual_seed(0)) * 50
    book = book_of(entry(key, ROME))
    assert book.nearest(key.clone())[1] == 0.0


# -- any sequence --------------------------------------------------------------------------------


def random_edits(seed: int, count: int = 40) -> list[Entry]:
    """Crowded keys in the plane, some equal, with three labels of two values each."""
    g = torch.Generator().manual_seed(seed)
    edits = []
    for _ in range(count):
        key = torch.rand(2, generator=g) * 8 + 50
        if edits and torch.rand(1, generator=g) < 0.1:
            key = edits[int(torch.randint(len(edits), (1,), generator=g))].key
        label = (int(torch.randint(3, (1,), generator=g)),)
        value = float(label[0]) + 0.5 * float(torch.rand(1, generator=g) < 0.3)
        edits.append(entry(key, label, value))
    return edits


@pytest.mark.parametrize("seed", range(20))
def test_every_edit_answers_at_its_key_unless_a_later_one_took_its_place(seed):
    edits = random_edits(seed)
    book = Book()
    for made, edit in enumerate(edits):
        book.add(edit)
        for n, older in enumerate(edits[: made + 1]):
            later = [
                e for e in edits[n : made + 1] if float((e.key - older.key).norm()) <= older.slack
            ]
            found = answer(book, older.key)
            assert found is not None
            assert any(found.answers_like(e) for e in later)


@pytest.mark.parametrize("seed", range(5))
def test_recorded_changes_give_the_book_that_the_rules_give(seed):
    edits = random_edits(seed)
    first, again = Book(), Book()
    changes = [first.add(edit) for edit in edits]
    for edit, change in zip(edits, changes, strict=True):
        assert again.add(edit, change) is change
    for name in ("radii", "homes", "reach"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.digest == again.digest


@pytest.mark.parametrize("gone", [0, 3, 17, 38])
@pytest.mark.parametrize("seed", range(5))
def test_book_without_one_edit_is_as_if_it_had_not_been_made(seed, gone):
    edits = random_edits(seed)
    book, left, never = Book(), Book(), Book()
    changes = [book.add(edit) for edit in edits]
    for n, (edit, change) in enumerate(zip(edits, changes, strict=True)):
        if n != gone:
            left.add(edit, change)
            never.add(edit)
    for name in ("radii", "homes", "reach"):
        assert torch.equal(getattr(left, name), getattr(never, name))


def test_recorded_changes_cost_no_distances(monkeypatch):
    edits = random_edits(0)
    book, again = Book(), Book()
    changes = [book.add(edit) for edit in edits]
    monkeypatch.setattr(Book, "_distances", None)
    for edit, change in zip(edits, changes, strict=True):
        again.add(edit, change)
    assert torch.equal(book.radii, again.radii)


def test_copy_grows_alone():
    book = book_of(entry(0, ROME))
    book.copy().add(entry(0.5, OSLO))
    assert len(book.entries) == 1
    assert book.radii.tolist() == [1.0]
