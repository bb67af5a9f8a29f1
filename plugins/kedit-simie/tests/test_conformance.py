from kedit_core.testing import parametrize_checks


@parametrize_checks(
    "simie",
    expected_failures={
        "requests_without_a_subject": "What a request must have is up to the base, here rome.",
    },
)
def test_conformance(check):
    check()
