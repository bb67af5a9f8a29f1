from kedit_core.testing import parametrize_checks


@parametrize_checks("grace")
def test_conformance(check):
    check()
