from kedit_core.testing import parametrize_checks


@parametrize_checks("rome")
def test_conformance_of_rome(check):
    check()


@parametrize_checks("r-rome")
def test_conformance_of_r_rome(check):
    check()
