from kedit_core.testing import parametrize_checks

UNREAD = "The toys were never shown two sentences together, so they do not learn from a context."
LONG = "Letter by letter, the instruction and this prompt are longer than the toys take."
ALL = {
    "target_becomes_the_greedy_answer": UNREAD,
    "requests_decide_what_is_written": UNREAD,
    "all_requests_of_a_batch_take_effect": UNREAD,
    "gpt2-marked_subject_is_the_one_meant": UNREAD,
    "llama-target_becomes_likelier_when_text_surrounds_the_subject": UNREAD,
}
BARE = {
    "gpt2-target_becomes_likelier_when_text_surrounds_the_subject": UNREAD,
    "gpt2-braces_and_foreign_letters_are_text": UNREAD,
}


# The toys take so few tokens that no demonstration fits, and IKE is ICE there.
@parametrize_checks("ike", expected_failures=ALL | BARE)
def test_conformance_of_ike(check):
    check()


@parametrize_checks("ice", expected_failures=ALL | BARE)
def test_conformance_of_ice(check):
    check()


@parametrize_checks("prompt", expected_failures=ALL | {"braces_and_foreign_letters_are_text": LONG})
def test_conformance_of_prompt(check):
    check()
