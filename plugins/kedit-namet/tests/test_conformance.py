from kedit_core.testing import parametrize_checks


@parametrize_checks("namet")
def test_conformance(check):
    check()
