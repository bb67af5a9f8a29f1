"""The conformance suite itself: it passes what is right and catches what is wrong."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from kedit_core import EditRequest, HyperParams, MethodSpec, SettingError, UnknownNameError
from kedit_core.editing import CallEffect, EditJob, ModuleSwap, Patch, WeightDelta
from kedit_core.errors import ModelError, SiteError
from kedit_core.forward import run_until
from kedit_core.numerics.losses import mean_nll
from kedit_core.numerics.ridge import inverse_by
from kedit_core.numerics.solve import rank_one_factors
from kedit_core.numerics.states import states_at_marks
from kedit_core.numerics.stats import moment_factors
from kedit_core.numerics.values import ValueSettings, ValueTask, optimise_values
from kedit_core.testing import all_checks, parametrize_checks, run_checks
from kedit_core.testing.conformance import Report, Result
from kedit_core.tokens import Row, join, pad, rewrite_row

SEEN: list[str] = []


class ToyHyperParams(HyperParams):
    """Settings of the methods below."""

    layer: int = Field(1, ge=0, description="Block whose MLP output matrix is rewritten.")


class NoHyperParams(HyperParams):
    """No settings."""


class Insert:
    """A rank-one insertion: right in every respect."""

    def __init__(self, hparams: ToyHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        return self.insert(job, job.requests[0])

    def insert(self, job: EditJob, request: EditRequest) -> Patch:
        host, layer = job.host, self.hparams.layer
        site = host.mlp_out(layer)
        row = rewrite_row(host, request)
        settings = ValueSettings(12, 0.3, 0.0, 4.0, 0.0, stop_loss=0.3)
        task = ValueTask((row,), Row(row.prompt, mark=row.mark))
        (value,) = optimise_values(host, site.module, layer, [task], settings)
        points = {"key": (site.module, "input"), "output": (site.module, "output")}
        states = states_at_marks(host, [row], points)
        key, output = states["key"][0].float(), states["output"][0].float()
        inverse = inverse_by(moment_factors(job, [site], tokens=1000)[site])
        direction = inverse(key[:, None])[:, 0]
        left, right = rank_one_factors(value.target - output, direction, key)
        return Patch("insert", (WeightDelta(site, left, right),))


class LeavesHook(Insert):
    def edit(self, job: EditJob) -> Patch:
        job.host.module(job.host.blocks[0].path).register_forward_hook(lambda m, a, o: None)
        return super().edit(job)


class WritesWeights(Insert):
    def edit(self, job: EditJob) -> Patch:
        patch = super().edit(job)
        job.host.weight(patch.deltas[0].site).mul_(1.0001)
        return patch


class SeedsRandomNumbers(Insert):
    def edit(self, job: EditJob) -> Patch:
        torch.manual_seed(0)
        return super().edit(job)


class DrawsFromPython(Insert):
    def edit(self, job: EditJob) -> Patch:
        random.random()
        return super().edit(job)


class BlowsUp(Insert):
    def edit(self, job: EditJob) -> Patch:
        (delta,) = super().edit(job).deltas
        texts = [request.text for request in job.requests]
        scale = 1.0 if len(set(texts)) == len(texts) else 1e3
        return Patch("insert", (replace(delta, left=scale * delta.left),))


class Prints(Insert):
    def edit(self, job: EditJob) -> Patch:
        print("editing", job.requests[0].text)  # noqa: T201
        return super().edit(job)


class RemembersInModule(Insert):
    def edit(self, job: EditJob) -> Patch:
        SEEN.append(job.requests[0].id)
        return super().edit(job)


class RemembersInClass(Insert):
    values: ClassVar[dict[str, Patch]] = {}

    def edit(self, job: EditJob) -> Patch:
        patch = super().edit(job)
        return self.values.setdefault(job.requests[0].id, patch)


class RemembersInInstance(Insert):
    scale = 1.0

    def edit(self, job: EditJob) -> Patch:
        patch = super().edit(job)
        (delta,) = patch.deltas
        self.scale += 0.1
        return replace(patch, effects=(replace(delta, left=delta.left * self.scale),))


class ReturnsNaN(Insert):
    def edit(self, job: EditJob) -> Patch:
        site = job.host.mlp_out(self.hparams.layer)
        change = torch.full_like(job.host.weight(site), float("nan"), dtype=torch.float32)
        return Patch("insert", (WeightDelta(site, change),))


class IgnoresRequest(Insert):
    def edit(self, job: EditJob) -> Patch:
        fixed = EditRequest(prompt="{} lives in", subject="Torvald", target_new="Rome")
        return self.insert(job, fixed)


class ThawsWeights(Insert):
    def edit(self, job: EditJob) -> Patch:
        job.host.model.requires_grad_(True)
        return super().edit(job)


class PadsOnTheLeft(Insert):
    def edit(self, job: EditJob) -> Patch:
        job.host.tokenizer.pad_token = job.host.tokenizer.eos_token
        return super().edit(job)


class FailsDirty(Insert):
    """Puts its hook away, but not when a forward pass fails."""

    def edit(self, job: EditJob) -> Patch:
        module = job.host.module(job.host.blocks[0].path)
        handle = module.register_forward_hook(lambda m, a, o: None)
        patch = super().edit(job)
        handle.remove()
        return patch


class SharesMemory(Insert):
    def edit(self, job: EditJob) -> Patch:
        site = job.host.mlp_out(self.hparams.layer)
        return Patch("insert", (WeightDelta(site, job.host.weight(site)),))


class ShiftHead:
    """Adds one vector to all that the head reads."""

    def __init__(self, hparams: NoHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        host = job.host
        batch = pad(host, [join(host, r.text, r.target_new) for r in job.requests])
        read: list[Tensor] = []
        with torch.no_grad():
            watch = {"states": (host.anatomy.head, "input")}
            run_until(host, batch, watch, lambda name, value: read.append(value))
        states = read[0][batch.rows, batch.columns].float()
        head = host.module(host.anatomy.head).weight.float()  # type: ignore[operator,union-attr]
        vector = torch.zeros(states.shape[1], requires_grad=True)
        optimiser = torch.optim.Adam([vector], lr=0.1)
        for _ in range(40):
            optimiser.zero_grad()
            logits = (states + vector) @ head.mT
            mean_nll(logits, batch.labels, batch.rows, len(job.requests)).sum().backward()
            optimiser.step()
        assert host.anatomy.final_norm is not None
        effect = ModuleSwap(host.anatomy.final_norm, "shift", {}, {"vector": vector.detach()})
        return Patch("shift-head", (effect,))


class Bias:
    """Makes the target's tokens likelier everywhere."""

    def __init__(self, hparams: NoHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        head = job.host.module(job.host.anatomy.head)
        bias = torch.zeros(len(head.weight))  # type: ignore[arg-type]
        for request in job.requests:
            bias[list(join(job.host, request.text, request.target_new).targets)] = 20.0
        return Patch("bias", (CallEffect("token-bias", {}, {"bias": bias}),))


class Tell(Bias):
    """Tells the new fact before every question as well."""

    def edit(self, job: EditJob) -> Patch:
        text = "".join(f"{r.text} {r.target_new.strip()}. " for r in job.requests)
        preface = CallEffect("preface", {"text": text})
        return Patch("tell", (preface, *super().edit(job).effects))


class RefusesTheToys(Bias):
    """Wants another kind of model."""

    def edit(self, job: EditJob) -> Patch:
        raise ModelError(f"It works on quantised weights, and {job.host.name} has none.")


class RefusesEditedModels(Bias):
    """Breaks in the second edit, with the error of a model that does not suit."""

    def edit(self, job: EditJob) -> Patch:
        if job.earlier:
            raise ModelError("The model is edited.")
        return super().edit(job)


class BreaksOnTheToys(Bias):
    def edit(self, job: EditJob) -> Patch:
        raise SiteError("There is no such layer.")


class ChangesTorch(Bias):
    """Leaves the settings of torch changed."""

    def edit(self, job: EditJob) -> Patch:
        patch = super().edit(job)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True)
        torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: None)
        return patch


class BreaksInTorch(Bias):
    def edit(self, job: EditJob) -> Patch:
        torch.nn.Linear(2, 2)(torch.ones(3))
        raise AssertionError


def spec_of(cls: type, **fields: Any) -> MethodSpec:
    settings = ToyHyperParams if issubclass(cls, Insert) else NoHyperParams
    given = {
        "name": cls.__name__.lower(),
        "target": f"{__name__}:{cls.__name__}",
        "hparams": f"{__name__}:{settings.__name__}",
        "summary": "For tests.",
    }
    if issubclass(cls, Insert):
        given["needs"] = frozenset({"subject", "gradients"})
    return MethodSpec(**(given | fields))


@parametrize_checks(spec_of(Insert), hparams={})
def test_a_good_method_of_weights_passes(check):
    check()


@parametrize_checks(
    spec_of(ShiftHead, effect="modules", max_batch=None, needs=frozenset({"gradients"})),
    hparams={},
)
def test_a_good_method_of_modules_passes(check):
    check()


@parametrize_checks(spec_of(Bias, effect="calls", max_batch=3), hparams={})
def test_a_good_method_of_calls_on_logits_passes(check):
    check()


@parametrize_checks(spec_of(Tell, effect="calls", max_batch=None), hparams={})
def test_a_good_method_of_calls_on_prompts_passes(check):
    check()


FAULTS: dict[type, set[str]] = {
    LeavesHook: {"computing_leaves_no_hook", "fault_while_computing_leaves_no_trace"},
    WritesWeights: {"computing_leaves_every_weight", "rollback_restores_every_bit"},
    SeedsRandomNumbers: {
        "computing_leaves_global_random_numbers",
        "fault_while_computing_leaves_no_trace",
    },
    DrawsFromPython: {
        "computing_leaves_global_random_numbers",
        "fault_while_computing_leaves_no_trace",
    },
    Prints: {"nothing_is_printed"},
    RemembersInModule: {"modules_remember_nothing"},
    RemembersInClass: {"modules_remember_nothing"},
    RemembersInInstance: {"instance_remembers_nothing"},
    ReturnsNaN: {"computed_numbers_are_finite"},
    IgnoresRequest: {"requests_decide_what_is_written"},
    ThawsWeights: {
        "computing_leaves_requires_grad",
        "computing_leaves_no_gradients",
        "fault_while_computing_leaves_no_trace",
    },
    PadsOnTheLeft: {"computing_leaves_the_tokenizer", "fault_while_computing_leaves_no_trace"},
    FailsDirty: {"fault_while_computing_leaves_no_trace"},
    SharesMemory: {"patch_is_plain_data"},
}


@pytest.mark.parametrize("cls", FAULTS, ids=lambda cls: cls.__name__)
def test_each_fault_is_caught_by_its_check(cls):
    watched = tuple(sorted(set.union(*FAULTS.values())))

    report = run_checks(spec_of(cls), hparams={}, layouts=("gpt2",), only=watched)

    caught = {result.check for result in report.failures}
    assert not report.ok
    assert caught >= FAULTS[cls]
    innocent = {"modules_remember_nothing", "computing_leaves_no_hook"}
    assert not (caught - FAULTS[cls]) & innocent


def test_changed_settings_of_torch_are_caught_by_their_check_alone():
    before = _torch_settings()

    report = run_checks(
        spec_of(ChangesTorch, effect="calls"),
        {},
        layouts=("gpt2",),
        only=(
            "patch_says_where_it_comes_from",
            "computing_leaves_no_hook",
            "computing_leaves_global_settings_of_torch",
            "second_edit_takes_effect",
        ),
    )

    (failure,) = report.failures
    assert failure.check == "computing_leaves_global_settings_of_torch"
    for setting in ("dtype", "gradients", "deterministic", "hooks of all modules"):
        assert f"torch settings: {setting}" in failure.message
    assert _torch_settings() == before


def _torch_settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        len(torch.nn.modules.module._global_forward_hooks),
    )


def test_a_wrong_effect_kind_is_caught():
    report = run_checks(
        spec_of(Insert, effect="modules"),
        hparams={},
        layouts=("llama",),
        only=("effects_are_of_the_promised_kind",),
    )

    assert [r.message for r in report.failures] == [
        "the spec says modules, the patch has a WeightDelta."
    ]


def test_an_unfulfilled_batch_size_is_caught():
    report = run_checks(
        spec_of(Insert, max_batch=None),
        hparams={},
        layouts=("gpt2",),
        only=("all_requests_of_a_batch_take_effect",),
    )

    assert not report.ok


def test_a_change_without_bounds_is_caught():
    report = run_checks(
        spec_of(BlowsUp, max_batch=None),
        hparams={},
        layouts=("gpt2",),
        only=("requests_that_disagree_do_no_harm",),
    )

    (failure,) = report.failures
    assert failure.message.startswith("the weights change by")


def test_an_expected_failure_must_fail():
    expected = {"nothing_is_printed": "It talks.", "computed_numbers_are_finite": "It once did."}

    report = run_checks(spec_of(Prints), {}, expected, layouts=("gpt2",), only=tuple(expected))

    outcomes = {result.check: result.outcome for result in report.results}
    assert outcomes == {"nothing_is_printed": "xfailed", "computed_numbers_are_finite": "xpassed"}
    assert not report.ok
    assert report.counts == {"xpassed": 1, "xfailed": 1}


def test_an_expected_failure_may_be_of_one_layout():
    report = run_checks(
        spec_of(Prints),
        {},
        {"gpt2-nothing_is_printed": "It talks."},
        only=("nothing_is_printed",),
    )

    assert [(r.layout, r.outcome) for r in report.results] == [
        ("gpt2", "xfailed"),
        ("llama", "failed"),
    ]


def test_an_expected_failure_needs_a_reason():
    with pytest.raises(SettingError, match="say why"):
        run_checks(spec_of(Insert), {}, {"nothing_is_printed": " "})


@pytest.mark.parametrize("runner", [run_checks, parametrize_checks])
def test_an_unknown_check_is_answered_with_the_nearest(runner):
    with pytest.raises(UnknownNameError, match="Did you mean 'nothing_is_printed'"):
        runner(spec_of(Insert), {}, {"nothing_is_prnted": "A typo."})


def test_without_settings_a_toy_preset_is_needed():
    with pytest.raises(SettingError, match=r"Add presets/toy\.yaml to its plugin\.$"):
        run_checks(spec_of(Insert))


def test_a_skip_has_its_reason():
    report = run_checks(
        spec_of(Bias, effect="calls"),
        {},
        layouts=("gpt2",),
        only=("overlay_gives_the_same_logits", "fault_while_computing_leaves_no_trace"),
    )

    assert report.ok
    assert {result.message for result in report.results} == {
        "for methods whose effect is weights; this one's is calls",
        "the method does not run the model",
    }


def test_a_method_that_refuses_the_toys_is_skipped_in_its_own_words():
    checks = ("target_becomes_the_greedy_answer", "second_edit_takes_effect")
    spec = spec_of(RefusesTheToys, effect="calls", summary="Says what it does")  # no full stop

    report = run_checks(spec, {}, layouts=("gpt2",), only=(*checks, "spec_can_be_listed"))

    found = {result.check: (result.outcome, result.message) for result in report.results}
    reason = "It works on quantised weights, and the toy gpt2 has none."
    assert {found.pop(check) for check in checks} == {("skipped", reason)}
    assert [outcome for outcome, _ in found.values()] == ["failed"]  # does not hang on the model


@pytest.mark.parametrize("cls", [RefusesEditedModels, BreaksOnTheToys])
def test_no_other_error_is_taken_for_a_refusal(cls):
    report = run_checks(
        spec_of(cls, effect="calls"), {}, layouts=("gpt2",), only=("second_edit_takes_effect",)
    )

    assert [result.outcome for result in report.results] == ["failed"]


def test_an_error_is_told_with_the_line_of_the_method_that_led_to_it():
    report = run_checks(
        spec_of(BreaksInTorch, effect="calls"),
        {},
        layouts=("gpt2",),
        only=("second_edit_takes_effect",),
    )

    line = inspect.getsourcelines(BreaksInTorch.edit)[1] + 1
    (message,) = (result.message for result in report.results)
    assert message.startswith("RuntimeError: ")
    assert message.endswith(f" (test_conformance.py:{line})")


def test_the_table_names_each_check_and_each_failure():
    report = run_checks(spec_of(Prints), {}, only=("nothing_is_printed", "settings_are_described"))

    table = report.table()
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["prints", "gpt2", "llama"]
    assert ["settings_are_described", "passed"] in lines
    assert ["nothing_is_printed", "failed", "failed"] in lines
    assert "failed: it printed 'editing " in table
    assert "    nothing_is_printed" in table.splitlines()
    assert report.as_data()["results"][0]["check"] == report.results[0].check


def test_the_table_tells_one_reason_once():
    report = run_checks(
        spec_of(BreaksOnTheToys, effect="calls"),
        {},
        only=("second_edit_takes_effect", "computed_numbers_are_finite", "nothing_is_printed"),
    )

    table = report.table()
    assert len(report.failures) == 6
    assert table.count("There is no such layer.") == 1
    assert table.splitlines()[-3:-1] == [
        "failed: SiteError: There is no such layer. (test_conformance.py:"
        f"{inspect.getsourcelines(BreaksOnTheToys.edit)[1] + 1})",
        "    computed_numbers_are_finite, nothing_is_printed, second_edit_takes_effect",
    ]


def test_the_table_names_the_layout_of_a_reason_that_not_all_share():
    results = (
        Result("sings", "gpt2", "failed", 0.0, "out of tune."),
        Result("sings", "llama", "passed", 0.0),
        Result("runs", "gpt2", "failed", 0.0, "out of tune."),
    )

    assert Report("odd", results).table().splitlines()[-3:] == [
        "failed: out of tune.",
        "    gpt2-sings, runs",
        "2 checks on gpt2 and llama: 2 failed, 1 passed",
    ]


def test_there_are_many_checks_and_each_says_what_it_claims():
    checks = all_checks()

    assert len(checks) >= 40
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.claim.endswith(".") for check in checks)


def test_what_pytest_and_the_catalog_load_is_light():
    code = (
        "import sys, kedit_core.testing.plugin, kedit_core.testing.pytest_plugin\n"
        "print(*{'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules))"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == ""


def test_pytest_counts_the_checks_of_each_method(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n"
        "@pytest.mark.kedit_check('mine')\n"
        "@pytest.mark.parametrize('right', [True, True, False])\n"
        "def test_it(right):\n"
        "    assert right\n"
        "@pytest.mark.kedit_check('other')\n"
        "def test_skipped():\n"
        "    pytest.skip('not for it')\n"
        "def test_else():\n"
        "    pass\n"
    )

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 1
    assert "kedit conformance: 3 checks of mine, 2 passed, 1 failed" in run.stdout
    assert "kedit conformance: 1 checks of other, 1 skipped" in run.stdout
