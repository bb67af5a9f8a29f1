from kedit_core.testing import parametrize_checks


@parametrize_checks("eamet")
def test_conformance(check):
    check()
