from kedit_core.testing import parametrize_checks


@parametrize_checks("ft-m")
def test_conformance_of_ft_m(check):
    check()


@parametrize_checks("ft-l")
def test_conformance_of_ft_l(check):
    check()
