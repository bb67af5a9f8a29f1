"""Settings of AlphaEdit."""

from kedit_core.targets import NullSpaceHyperParams


class AlphaEditHyperParams(NullSpaceHyperParams):
    """Settings of AlphaEdit."""
