"""AlphaEdit: its least squares inside a null space are `kedit_core.numerics.nullspace`."""

from __future__ import annotations

from kedit_alphaedit.hparams import AlphaEditHyperParams
from kedit_core.editing import EditJob, Patch
from kedit_core.numerics.nullspace import edit_in_null_space, prepare_null_spaces


class AlphaEdit:
    """Null-space constrained editing (Fang et al. 2025, arXiv:2410.02355).

    The keys of a session's earlier edits are part of the least squares; each patch's state holds
    those of its own facts, so that they are rolled back with it.
    """

    def __init__(self, hparams: AlphaEditHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect the second moments and decompose them, and sample the contexts."""
        prepare_null_spaces(job, self.hparams)

    def edit(self, job: EditJob) -> Patch:
        """Compute the changes that write all facts of the job at once.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: a matrix has no free direction, a loss is not finite, or earlier edits of
                the session were made with other settings.
        """
        return edit_in_null_space("alphaedit", job, self.hparams)
