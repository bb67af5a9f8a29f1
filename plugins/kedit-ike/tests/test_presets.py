"""What the presets are for."""

import pytest

from kedit_core import discover
from kedit_core.hparams import presets_of, resolve


@pytest.mark.parametrize("method", ["ike", "ice", "prompt"])
def test_a_preset_that_is_taken_by_itself_changes_something(method):
    spec = discover().method(method)
    for preset in presets_of(spec):
        settings = resolve(spec, preset=preset.name).hparams
        assert not preset.fits or settings != resolve(spec).hparams
