from kedit_core.testing import parametrize_checks


@parametrize_checks("wise")
def test_conformance_of_wise(check):
    check()


@parametrize_checks("wise-merge")
def test_conformance_of_wise_merge(check):
    check()
