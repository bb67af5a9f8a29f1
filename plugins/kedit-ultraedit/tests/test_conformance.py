from kedit_core.testing import parametrize_checks


@parametrize_checks("ultraedit")
def test_conformance(check):
    check()
