from kedit_core.testing import parametrize_checks


@parametrize_checks(
    "grace",
    expected_failures={
        "gpt2-other_forms_of_the_prompt_gain": "A key holds for its own prompt; here no other form "
        "of it comes near enough.",
    },
)
def test_conformance(check):
    check()
