"""SimIE: edits that another method makes one by one, combined by recursive least squares."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kedit_core import EditMethod, EditRequest, MethodSpec, discover
from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.errors import EditError, RequestError, SettingError, SiteError
from kedit_core.hparams import resolve
from kedit_core.numerics.ridge import Update
from kedit_core.numerics.solve import condition_of
from kedit_core.numerics.states import watch_tokens
from kedit_core.tokens import Row, join
from kedit_simie.hparams import SimIEHyperParams


class SimIE:
    """Lifelong editing by another method (Guo et al. 2025, openreview.net/forum?id=VdEG08ZJCH).

    For each matrix, with what it reads at the tokens of edit t as the columns of K_t and what the
    base method made of it as Ŵ_t, W is to do for all edits so far what their Ŵ_t did:

        minimise Σ_t ‖(W − Ŵ_t) K_t‖² + λ ‖W − W₀‖²

    A patch is the step from one solution to the next.  Its right factors Q_t hold all that later
    steps need to know of it (`recursion`), so it has no further state.
    """

    def __init__(self, hparams: SimIEHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Compute the step that one more edit makes.

        Raises:
            SettingError: the base method does not edit weights, or λ is not that of earlier edits.
            RequestError: the base method needs what the request does not have.
            SiteError: the base method changed what is no matrix of a plain layer.
            EditError: λ is too small for what a matrix reads.
            KEditError: as the base method.
        """
        (request,) = job.requests
        host, ridge = job.host, self.hparams.ridge
        if any(patch.hparams["ridge"] != ridge for patch in job.earlier):
            raise SettingError(
                f"Earlier edits of this session have another `ridge` than {ridge:g}. Use theirs, "
                f"or roll back."
            )
        with job.unedited() if self.hparams.init_model else contextlib.nullcontext():
            base = self._base_edit(job, request)
            changes = {d.site: [o for o in base.deltas if o.site == d.site] for d in base.deltas}
            keys = keys_of(host, list(changes), request)
            wanted = {
                site: job.weight(site).double() @ keys[site] + _products(deltas, keys[site])
                for site, deltas in changes.items()
            }
        effects, conditions = [], []
        for site in changes:
            earlier = [d for patch in job.earlier for d in patch.deltas if d.site == site]
            rights = [d.right for d in earlier if d.right is not None]
            gap = wanted[site] - job.weight(site).double() @ keys[site]
            update = recursion(gap, keys[site], rights, ridge)
            effects.append(WeightDelta(site, update.left.cpu(), update.right.cpu()))
            conditions.append(update.condition)
        state = {} if self.hparams.init_model else base.state
        notes = {"base": dict(base.notes), "conditions": conditions}
        return Patch("simie", tuple(effects), state=state, notes=notes)

    def _base_edit(self, job: EditJob, request: EditRequest) -> Patch:
        """The base method's patch for the model as it is now."""
        spec = self._base_spec()
        if reason := spec.refusal(request):
            raise RequestError(reason)
        hparams = self.hparams
        settings = resolve(
            spec,
            preset=hparams.base_preset,
            settings=hparams.base_settings,
            config=job.host.config,
        )
        if hparams.init_model:  # an edit on its own
            job = replace(job, earlier=(), is_edited=False)
        return cast(EditMethod, spec.load()(settings.hparams)).edit(job)

    def _base_spec(self) -> MethodSpec:
        catalog = discover()
        spec = catalog.method(self.hparams.base)
        if spec.effect != "weights":
            names = ", ".join(s.name for s in catalog.all(MethodSpec) if s.effect == "weights")
            raise SettingError(
                f"{spec.name} does not edit weights, so that simie cannot combine its edits. Set "
                f"`base` to one of {names}."
            )
        return spec


def recursion(gap: Tensor, keys: Tensor, rights: Sequence[Tensor], ridge: float) -> Update:
    """Factors of W_t − W_{t−1} = (Ŵ_t − W_{t−1}) K Kᵀ M_t⁻¹, where M_t = λI + Σ K_s K_sᵀ, s ≤ t.

    By Woodbury's identity, with N = M_{t−1}⁻¹, Y = N K and L Lᵀ = I + Kᵀ Y,

        W_t − W_{t−1} = (Ŵ_t − W_{t−1}) K L⁻ᵀ Qᵀ,    M_t⁻¹ = N − Q Qᵀ,    Q = Y L⁻ᵀ

    so that the right factors of earlier steps make N = I/λ − Σ Q_s Q_sᵀ, s < t.

    Args:
        gap: (Ŵ_t − W_{t−1}) K, (d_out, T).
        keys: K, (d_in, T).
        rights: Q_sᵀ of each earlier step, (T_s, d_in).
        ridge: λ.

    Returns:
        The step, whose right factor is Qᵀ (T, d_in), and the condition of I + Kᵀ Y.

    Raises:
        EditError: λ is so small that the factors in float32 would lose what other keys need; says
            the condition.
    """
    k = keys.double()
    y = k / ridge
    for right in rights:
        q = right.to(k)
        y = y - q.mT @ (q @ k)
    gram = k.mT @ y
    gram = (gram + gram.mT) / 2 + torch.eye(len(gram), dtype=k.dtype, device=k.device)
    condition = condition_of(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    # Q of a long key takes nearly all of I/λ away, and its rounding is all that is left of it.
    lost = torch.finfo(torch.float32).eps * float(k.square().sum(dim=0).max()) / ridge
    if bool(failed) or lost > 1e-2:
        raise EditError(
            f"`ridge` {ridge:g} is too small beside what the matrix reads (norm "
            f"{float(k.norm()):.1e}, condition of its system {condition:.0e}) to go on in float32. "
            f"Raise it."
        )
    halves = torch.linalg.solve_triangular(factor, torch.cat([gap.double(), y]).mT, upper=False)
    left, right = halves.mT.split([len(gap), len(y)])
    return Update(left.float(), right.mT.float(), condition)


def keys_of(host: ModelHost, sites: Sequence[Site], request: EditRequest) -> dict[Site, Tensor]:
    """What each matrix reads at the tokens of prompt and target: (d_in, T), float64."""
    row = join(host, request.text, request.target_new)
    found: dict[Site, Tensor] = {}
    points = {site: (site.module, "input") for site in sites}
    watch_tokens(host, [Row(row.prompt + row.targets)], points, found.__setitem__)
    for site in sites:
        fits = site in found and found[site].shape[1] == host.weight(site).shape[1]
        if site.expert is not None or not fits:
            raise SiteError(
                f"{site.parameter} is no matrix of a plain layer, so that simie cannot combine "
                f"edits of it. Choose other layers or another `base`."
            )
    return {site: keys.double().mT for site, keys in found.items()}


def _products(deltas: Sequence[WeightDelta], keys: Tensor) -> Tensor:
    """D K, where D is the sum of some changes of one matrix."""
    return torch.stack([delta.product(keys.mT).mT for delta in deltas]).sum(dim=0)
