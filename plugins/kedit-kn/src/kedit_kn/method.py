"""Knowledge neurons: the algorithm from top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_core import EditError
from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.numerics.sample import OPENINGS, context_texts, sample
from kedit_core.tokens import Row, join
from kedit_kn.attribution import Neuron, attribute, attribute_rows, common_neurons, select
from kedit_kn.hparams import KnHyperParams

TEXT_LENGTH = 12  # tokens of a text that stands for another fact


class KnowledgeNeurons:
    """Find the neurons that express the old answer; make them write the new one.

    Dai et al. 2022 (arXiv:2104.08696).
    """

    def __init__(self, hparams: KnHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Sample the contexts, and find the neurons that matter everywhere."""
        self._contexts(job)
        self._common(job)

    def edit(self, job: EditJob) -> Patch:
        """Compute the change of a few columns of the MLPs' output matrices.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: the head's rows are no directions of the residual stream.
        """
        (request,) = job.requests
        host, hparams = job.host, self.hparams
        contexts = ("", *self._contexts(job))
        found = attribute(host, request, contexts, hparams.layers, hparams.steps)
        fewest, most = hparams.neurons
        common = self._common(job)
        neurons = select(found, hparams.threshold, hparams.share, fewest, most, common)
        old = answer_direction(host, request.text, request.ground_truth[0])
        new = answer_direction(host, request.text, request.target_new)
        direction = hparams.write * new - hparams.erase * old
        chosen = {
            host.mlp_out(layer): [neuron for neuron in neurons if neuron.layer == layer]
            for layer in sorted({neuron.layer for neuron in neurons})
        }
        effects = tuple(
            column_change(site, job.weight(site), own, direction) for site, own in chosen.items()
        )
        notes = {
            "neurons": [vars(neuron) for neuron in neurons],
            "contexts": list(contexts),
            "common": [list(place) for place in common],
        }
        return Patch("kn", effects, notes=notes)

    def _contexts(self, job: EditJob) -> tuple[str, ...]:
        """Sampled texts; an encoder-decoder writes none."""
        if job.host.is_encoder_decoder:
            return ()
        return context_texts(job, self.hparams.contexts)

    def _common(self, job: EditJob) -> list[tuple[int, int]]:
        """Layer and index of neurons that matter in texts of any kind; found once and kept.

        Of the unedited model, from the last token of texts that it writes itself.
        """
        host, hparams = job.host, self.hparams
        if host.is_encoder_decoder or not hparams.others:
            return []
        key = {
            "model": job.fingerprint,
            "seed": job.seed,
            **hparams.model_dump(include={"layers", "steps", "threshold", "others", "common"}),
            "version": 1,
        }
        stored = job.artifacts.get("common-neurons", key)
        if stored is None:
            starts = [OPENINGS[n % len(OPENINGS)] for n in range(hparams.others)]
            with job.unedited():
                texts = sample(host, starts, TEXT_LENGTH, job.generator(), top_k=50)
                rows = [Row(text[:-1], text[-1:]) for text in texts]
                found = attribute_rows(host, rows, hparams.layers, hparams.steps)
            places = common_neurons(found, hparams.threshold, hparams.common)
            stored = {"places": torch.tensor(places, dtype=torch.long).reshape(-1, 2)}
            job.artifacts.put("common-neurons", key, stored)
        return [(layer, index) for layer, index in stored["places"].tolist()]


def answer_direction(host: ModelHost, prompt: str, answer: str) -> Tensor:
    """Unit vector (d,) of the residual stream that makes an answer's tokens likely, float32.

    The sum of the head's rows for them; the head and the paper's word embeddings are one matrix in
    models that tie them.

    Raises:
        EditError: the head reads something else than the residual stream.
    """
    rows: Tensor = host.module(host.anatomy.head).weight.detach()  # type: ignore[assignment]
    if rows.shape[1] != host.anatomy.hidden_size:
        raise EditError(
            f"The head of {host.name} reads {rows.shape[1]} numbers and its blocks write "
            f"{host.anatomy.hidden_size}, so answers have no direction there. Use another method."
        )
    total = rows[list(join(host, prompt, answer).targets)].float().sum(dim=0).cpu()
    return total / total.norm()


def column_change(
    site: Site, weight: Tensor, neurons: list[Neuron], direction: Tensor
) -> WeightDelta:
    """Add a direction to the columns of one layer's neurons, in the proportion of their norms.

        W[:, j] ← W[:, j] + sign(w_j) · ‖W[:, j]‖ · direction

    The sign of the activation w_j is 1 for neurons behind ReLU, and for those behind GELU that
    matter; in a gated MLP a neuron may be negative, and its column is then written negated.

    Args:
        site: the matrix of their layer.
        weight: W, (d_out, d_in).
        neurons: of this layer.
        direction: (d,) λ₂ e_t / ‖e_t‖ − λ₁ e_o / ‖e_o‖.

    Returns:
        left (d, neurons) and right (neurons, d_in), rows of the identity.
    """
    columns = [neuron.index for neuron in neurons]
    signs = torch.tensor([1.0 if neuron.activation >= 0 else -1.0 for neuron in neurons])
    norms = weight[:, columns].float().norm(dim=0).cpu()
    right = torch.zeros(len(columns), weight.shape[1])
    right[range(len(columns)), columns] = 1
    return WeightDelta(site, direction[:, None] * (signs * norms), right)
