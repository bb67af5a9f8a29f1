from kedit_core.testing import parametrize_checks


@parametrize_checks("dola")
def test_conformance_of_dola(check):
    check()


@parametrize_checks("deco")
def test_conformance_of_deco(check):
    check()
