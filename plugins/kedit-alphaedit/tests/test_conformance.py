from kedit_core.testing import parametrize_checks


@parametrize_checks("alphaedit")
def test_conformance(check):
    check()
