"""What the edited model as a whole can still do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kedit_core.errors import DataError, SettingError, did_you_mean, reason_of

if TYPE_CHECKING:
    from kedit_core.editing import EditSession

FEWSHOT_SEED = 1234  # the harness's own
RESAMPLES, RESAMPLE_SEED = 1000, 0

Values = Mapping[str, Mapping[int, float]]  # of a part: the value of each question by its number


class LmEval:
    """Scores of the lm-evaluation-harness (arXiv:2405.14782), with all edits in force.

    Asked through the session's view, so that edits in prompts and logits count too.  Prompts,
    tokens and scores are those that the harness has with its own model class `hf`.

    Args:
        tasks: names of tasks or groups of tasks, joined by `+`.
        limit: only so many questions of each task, its first ones.
        num_fewshot: examples before each question, except where a task fixes them to 0; by
            default as the task says.
        include_path: folder of further task files.  They may name Python functions, which are run.

    Raises:
        SettingError: the harness is not installed, a task does not exist, or a number is wrong.
    """

    def __init__(
        self,
        tasks: str,
        limit: int | None = None,
        num_fewshot: int | None = None,
        include_path: str = "",
    ) -> None:
        if limit is not None and limit < 1:
            raise SettingError(f"limit is {limit}; at least one question must be asked.")
        if num_fewshot is not None and num_fewshot < 0:
            raise SettingError(f"num_fewshot is {num_fewshot}, and cannot be negative.")
        self.tasks = [name.strip() for name in tasks.split("+")]
        self.limit, self.num_fewshot = limit, num_fewshot
        self._manager = _manager(self.tasks, include_path)
        self._unedited: dict[str, Values] = {}  # by the model's fingerprint

    def measure(self, session: EditSession) -> Mapping[str, float]:
        """Every score as the part `TASK.METRIC`, or `TASK.METRIC.FILTER` where a filter is named.

        With edits in force a task's score that is a mean over questions has the further parts of
        `changes`.  They need the unedited model, which is asked here if it was not measured before.

        The headline is the accuracy (`acc`), where a single task is asked for that has one.

        Raises:
            DataError: a task cannot be loaded.
            SettingError: a task needs more than greedy text and probabilities.
            ModelError: the model is an encoder-decoder.
            RequestError: an answer is longer than the model takes.
        """
        parts, values = self._scores(session)
        model = session.fingerprint
        if not session.is_edited:
            self._unedited[model] = values
        else:
            if model not in self._unedited:
                with session.suspended():
                    self._unedited[model] = self._scores(session)[1]
            parts |= changes(self._unedited[model], values)
        headline = parts.get(f"{self.tasks[0]}.acc") if len(self.tasks) == 1 else None
        return parts if headline is None else {"": headline, **parts}

    def _scores(self, session: EditSession) -> tuple[dict[str, float], Values]:
        """The scores of the model as it is, and the questions' values behind those of tasks."""
        from lm_eval.evaluator import evaluate

        from kedit_core.guard import untouched
        from kedit_lm_eval.model import EditedLM

        lm = EditedLM(session.view())
        with untouched(session.model, session.host.tokenizer):
            loaded = self._load()
            found = evaluate(lm=lm, task_dict=loaded, limit=self.limit, bootstrap_iters=0)
        parts = {
            f"{task}.{_metric_name(*key.split(',', 1))}": float(value)
            for task, scores in found["results"].items()
            for key, value in scores.items()
            if "," in key and "_stderr" not in key and isinstance(value, int | float)
        }
        return parts, _values(found["samples"], loaded["tasks"])

    def _load(self) -> dict[str, Any]:
        """The tasks with their data, set up as the harness's `simple_evaluate` does."""
        try:
            loaded = self._manager.load(self.tasks)
        except Exception as error:  # task files name foreign code, data sets and packages
            raise DataError(
                f"The harness cannot load '{'+'.join(self.tasks)}': {reason_of(error)}"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise SettingError(
                    f"The task '{name}' runs code that a model writes, or shows pictures; neither "
                    f"is done here."
                )
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own != 0:
                task.set_config("num_fewshot", self.num_fewshot)
            elif own is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        return dict(loaded)


def _manager(tasks: list[str], include_path: str) -> Any:
    """The harness's index of tasks.

    Its own 14,000 files are read only where a task is not in the folder that was given.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SettingError("lm-eval needs the harness's package: pip install lm_eval") from None
    folder = Path(include_path).expanduser() if include_path else None
    if folder is not None:
        if not folder.is_dir():
            raise SettingError(f"The folder {folder} of tasks does not exist.")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise SettingError(f"The harness has no task '{name}'. {hint}")
    return manager


def changes(before: Values, after: Values) -> dict[str, float]:
    """How far each part moved: `PART.change`, the mean over its questions of after − before.

    `PART.change_low` and `PART.change_high` are the ends of its 95 % percentile interval, by a
    bootstrap that draws questions.

    Args:
        before, after: a part whose questions are not the same ones is left out.
    """
    found = {}
    for part, values in after.items():
        if before.get(part, {}).keys() == values.keys():
            moved = np.array([value - before[part][n] for n, value in values.items()])
            draws = np.random.default_rng(RESAMPLE_SEED)
            means = [draws.choice(moved, len(moved)).mean() for _ in range(RESAMPLES)]
            found[f"{part}.change"] = float(moved.mean())
            found[f"{part}.change_low"] = float(np.percentile(means, 2.5))
            found[f"{part}.change_high"] = float(np.percentile(means, 97.5))
    return found


def _values(samples: Mapping[str, Any], tasks: Mapping[str, Any]) -> Values:
    """The values of all questions, for the metrics that the harness takes the mean of."""
    from lm_eval.api.metrics import mean

    values: dict[str, dict[int, float]] = {}
    for task, asked in samples.items():
        ways = tasks[task].aggregation()
        for sample in asked:
            for metric in sample["metrics"]:
                if ways.get(metric, mean) is mean:
                    part = f"{task}.{_metric_name(metric, sample['filter'])}"
                    values.setdefault(part, {})[sample["doc_id"]] = float(sample[metric])
    return values


def _metric_name(metric: str, name: str) -> str:
    """`acc` where its filter is called `none`, `exact_match.strict` where it is called `strict`."""
    return metric if name == "none" else f"{metric}.{name}"
