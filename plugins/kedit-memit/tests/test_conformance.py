from kedit_core.testing import parametrize_checks


@parametrize_checks("memit")
def test_conformance_of_memit(check):
    check()


@parametrize_checks("pmet")
def test_conformance_of_pmet(check):
    check()


@parametrize_checks("emmet")
def test_conformance_of_emmet(check):
    check()
