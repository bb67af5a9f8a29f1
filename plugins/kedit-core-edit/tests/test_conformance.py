from kedit_core.testing import parametrize_checks


@parametrize_checks("core")
def test_conformance(check):
    check()
