from kedit_core.testing import parametrize_checks


@parametrize_checks("kn")
def test_conformance(check):
    check()
