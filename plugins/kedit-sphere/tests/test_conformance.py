from kedit_core.testing import parametrize_checks


@parametrize_checks("sphere")
def test_conformance(check):
    check()
