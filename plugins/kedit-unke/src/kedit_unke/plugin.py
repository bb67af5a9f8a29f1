"""Entry point of kedit-unke."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, hookimpl

LONG = (  # of long answers; the overlaps come with kedit-similarity
    *("*/rouge-*", "*/bleu@*", "*/cosine@*"),
    "efficacy/teacher-forced@1",
    "generalization/teacher-forced@1",
    "portability/teacher-forced@1",
)
SHORT = (  # the default metrics, and the multi-hop questions as tests
    *(
        f"{quantity}/{protocol}@1"
        for quantity in ("efficacy", "generalization", "portability")
        for protocol in ("teacher-forced", "all-tokens", "greedy")
    ),
    *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1", "tests/*"),
)


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="unke",
            target="kedit_unke.unke:Unke",
            summary="UnKEBench: a question and the paragraph that shall answer it.",
            paper="arXiv:2405.15349",
            metrics=LONG,
        ),
        DatasetSpec(
            name="akew",
            target="kedit_unke.akew:structured",
            summary="AKEW with structured edits: sentences to complete with a short answer.",
            paper="arXiv:2402.18909",
            metrics=SHORT,
        ),
        DatasetSpec(
            name="akew-unstructured",
            target="kedit_unke.akew:unstructured",
            summary="AKEW with unstructured edits: paragraphs that state the same facts.",
            paper="arXiv:2402.18909",
            metrics=(*LONG, "locality-agreement/teacher-forced@1", "tests/*"),
        ),
        DatasetSpec(
            name="editevery",
            target="kedit_unke.editevery:EditEvery",
            summary="EditEverything: long answers, such as proofs, code, poems and news.",
            paper="arXiv:2502.05628",
            metrics=("efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
        ),
    ]
