from kedit_core.testing import parametrize_checks


@parametrize_checks("lora")
def test_conformance_of_lora(check):
    check()


@parametrize_checks("adalora")
def test_conformance_of_adalora(check):
    check()
