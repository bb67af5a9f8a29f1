"""What spec, settings and patch promise, and what must be refused with a sentence."""

from __future__ import annotations

import contextlib
import inspect
import re

import pydantic

from kedit_core.effects import CallEffect, ModuleSwap, WeightDelta
from kedit_core.errors import KEditError, MissingSettingError, RequestError, SettingError
from kedit_core.hparams import HyperParams, presets_of, resolve
from kedit_core.patch import Patch
from kedit_core.protocols import EditMethod, Preparable
from kedit_core.request import EditRequest
from kedit_core.spec import check_spec, load_target
from kedit_core.testing.bench import Bench, in_fresh_python, skip
from kedit_core.testing.model_state import assert_same, model_state, patch_content
from kedit_core.testing.selection import about_facts, once, only_for

HEAVY = ("torch", "transformers", "numpy", "peft")


@once
def check_spec_can_be_listed(bench: Bench) -> None:
    """The spec has a lower-case name and a summary of one sentence."""
    check_spec(bench.spec)
    summary = bench.spec.summary
    assert re.fullmatch(r"\S.{0,110}\.", summary), f"its summary is {summary!r}."


@once
def check_plugin_is_listed_without_torch(bench: Bench) -> None:
    """Neither the plugin's entry module nor its settings import torch, and they are found."""
    modules = [bench.plugin_module(), bench.spec.hparams.partition(":")[0]]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for hook in [n for n in vars(module) if n.startswith('kedit_register_')]:\n"
        "        list(getattr(module, hook)())\n"
        f"print(*sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    run = in_fresh_python(code)
    assert run.returncode == 0, f"it cannot be imported: {run.stderr.strip()[-200:]}"
    assert not run.stdout.strip(), f"it imports {run.stdout.strip()}."


@once
def check_method_is_made_from_settings_alone(bench: Bench) -> None:
    """The method's class takes its hyperparameters and nothing else; `edit` takes the job."""
    cls = bench.spec.load()
    assert len(inspect.signature(cls).parameters) == 1, "its class takes more than the settings."
    method = cls(bench.hparams)
    assert isinstance(method, EditMethod), "it has no method `edit`."
    assert len(inspect.signature(method.edit).parameters) == 1, "`edit` takes more than the job."


@once
def check_settings_are_hyperparameters(bench: Bench) -> None:
    """The settings are those that the spec names, and refuse to be changed."""
    cls = load_target(bench.spec.hparams)
    assert issubclass(cls, HyperParams), f"{bench.spec.hparams} is no HyperParams."
    assert isinstance(bench.hparams, cls), f"the settings are no {bench.spec.hparams}."
    for name in cls.model_fields:
        try:
            setattr(bench.hparams, name, getattr(bench.hparams, name))
        except pydantic.ValidationError:
            continue
        raise AssertionError(f"the setting '{name}' can be changed.")


@once
def check_settings_are_described(bench: Bench) -> None:
    """Every setting says what it is."""
    fields = type(bench.hparams).model_fields
    silent = [name for name, field in fields.items() if not field.description]
    assert not silent, f"no description: {', '.join(silent)}."


@once
def check_settings_survive_json(bench: Bench) -> None:
    """The settings written as JSON and read again are the same."""
    text = bench.hparams.model_dump_json()
    assert type(bench.hparams).model_validate_json(text) == bench.hparams, "they differ."


@once
def check_presets_are_valid_and_name_their_source(bench: Bench) -> None:
    """Each preset of the method gives valid settings and says where they come from."""
    for preset in presets_of(bench.spec):
        with contextlib.suppress(MissingSettingError):  # a preset may leave some to the user
            resolve(bench.spec, preset=preset.name)
        assert preset.source.strip(), f"preset {preset.name} names no source."


def check_unknown_settings_are_refused(bench: Bench) -> None:
    """A misspelt setting is an error, and the model is untouched."""
    _refuses_settings(bench, {"no_such_setting": 1})


def check_layers_that_do_not_exist_are_refused(bench: Bench) -> None:
    """A layer beyond the last block is an error, and the model is untouched."""
    wrong: dict[str, object] = {}
    for name, value in {"layer": 999, "layers": [999]}.items():
        if name in type(bench.hparams).model_fields:
            wrong[name] = value
    if not wrong:
        skip("the method has no setting `layer` or `layers`")
    _refuses_settings(bench, wrong)


@about_facts
def check_requests_without_a_subject(bench: Bench) -> None:
    """A request without a subject is refused where the spec needs one, and written otherwise."""
    whole = bench.request()
    request = EditRequest(
        prompt=whole.text, target_new=whole.target_new, ground_truth=whole.ground_truth
    )
    session = bench.session()
    before = model_state(session.host)
    if "subject" not in bench.spec.needs:
        bench.edit(session, request)
        gain = bench.gain(session.view(), [request.text], request.target_new)
        assert gain > 0, f"the target's log-probability changes by {gain:.3f}."
        return
    try:
        bench.edit(session, request)
    except RequestError:
        assert_same(before, model_state(session.host), "After the refusal")
    else:
        raise AssertionError("a request without a subject was accepted.")


@about_facts
def check_requests_without_a_former_answer(bench: Bench) -> None:
    """A request without ground truth is refused where the spec needs one, and written otherwise."""
    whole = bench.request()
    request = EditRequest(prompt=whole.prompt, subject=whole.subject, target_new=whole.target_new)
    session = bench.session()
    try:
        bench.edit(session, request)
    except RequestError:
        assert "ground-truth" in bench.spec.needs, "the spec does not say that it needs one."
    else:
        gain = bench.gain(session.view(), [request.text], request.target_new)
        assert gain > 0, f"the target's log-probability changes by {gain:.3f}."


@about_facts
def check_too_long_prompts_are_refused(bench: Bench) -> None:
    """A prompt longer than the model takes is refused: by the edit, or when it is asked."""
    session = bench.session()
    before = model_state(session.host)
    long = EditRequest(
        prompt="The " + "very " * 400 + "old {} is",
        subject="tree",
        target_new="tall",
        ground_truth=("old",),
    )
    try:
        bench.edit(session, long)
        session.view().greedy(long.text)
    except KEditError as error:
        session.rollback()
        assert_same(before, model_state(session.host), "After the refusal")
        message = str(error)
        assert len(message) < 400, "the error repeats the whole prompt."
    else:
        raise AssertionError("a prompt longer than the model takes was accepted.")


def check_patch_says_where_it_comes_from(bench: Bench) -> None:
    """The patch names method, requests, settings and the weights that it was computed on."""
    patch = bench.patch()
    assert isinstance(patch, Patch), f"edit() returned a {type(patch).__name__}."
    assert patch.method == bench.spec.name, f"it names the method {patch.method!r}."
    assert patch.requests == (bench.request(),), "it names other requests."
    assert patch.hparams == bench.hparams.model_dump(mode="json"), "it names other settings."
    session = bench.session()
    assert patch.base.fingerprint == session.fingerprint, "it names another model."
    sums = {d.site.parameter: session.host.checksum(d.site) for d in patch.deltas}
    assert patch.base.checksums == sums, "its checksums are not those of the weights."


def check_effects_are_of_the_promised_kind(bench: Bench) -> None:
    """The patch has effects, all of the kind that the spec names."""
    kind = {"weights": WeightDelta, "modules": ModuleSwap, "calls": CallEffect}[bench.spec.effect]
    effects = bench.patch().effects
    assert effects, "the patch has no effect."
    other = [type(effect).__name__ for effect in effects if not isinstance(effect, kind)]
    assert not other, f"the spec says {bench.spec.effect}, the patch has a {other[0]}."


def check_computed_numbers_are_finite(bench: Bench) -> None:
    """What `edit` of the method returns has no NaN and no infinity."""
    bench.compute(bench.session(), bench.request()).check_finite()


def check_patch_is_plain_data(bench: Bench) -> None:
    """The patch's tensors share no memory with the model and need no gradient."""
    session = bench.session()
    patch = bench.compute(session, bench.request())
    model = {p.untyped_storage().data_ptr() for p in session.model.parameters()}
    tensors = [t for effect in patch.effects for t in effect.tensors.values()]
    for tensor in [*tensors, *patch.state.values()]:
        assert tensor.untyped_storage().data_ptr() not in model, "it shares memory with a weight."
        assert not tensor.requires_grad, "one of its tensors still needs a gradient."


@only_for("weights")
def check_weight_changes_fit_their_matrices(bench: Bench) -> None:
    """Each change has the shape of its matrix, which the model stores as the patch says."""
    host = bench.host()
    blocks = [b.mlp_out for b in host.blocks] + [s for b in host.blocks for s in b.mlp_in]
    known = {site.parameter: site.transposed for site in blocks if site is not None}
    for delta in bench.patch().deltas:
        assert tuple(host.weight(delta.site).shape) == delta.shape, "a change has a wrong shape."
        wanted = known.get(delta.site.parameter, delta.site.transposed)
        assert delta.site.transposed == wanted, f"{delta.site.parameter} is turned round."


def check_batches_are_no_larger_than_promised(bench: Bench) -> None:
    """Three requests give as many patches as `max_batch` says, each with its own requests."""
    bench.needs_sequences()
    session, requests = bench.session(), bench.requests(3)
    bench.edit(session, *requests)
    size = bench.spec.max_batch or 3
    assert [len(p.requests) for p in session.stack] == [
        len(requests[n : n + size]) for n in range(0, 3, size)
    ], "the patches hold other numbers of requests."
    assert tuple(r for p in session.stack for r in p.requests) == requests, "requests are lost."


def check_preparing_changes_nothing(bench: Bench) -> None:
    """`prepare` leaves the model alone, and the edit after it is the same as without it."""
    if not isinstance(bench.method(), Preparable):
        skip("the method has nothing to prepare")
    session = bench.session(store=bench.folder())
    before = model_state(session.host)
    session.prepare(bench.spec, hparams=bench.hparams)
    assert_same(before, model_state(session.host), "After prepare()")
    assert patch_content(bench.compute(session, bench.request())) == patch_content(bench.patch()), (
        "after prepare() the patch is another one."
    )


def _refuses_settings(bench: Bench, wrong: dict[str, object]) -> None:
    session = bench.session()
    before = model_state(session.host)
    given = bench.hparams.model_dump(mode="json") | wrong
    try:
        session.edit(bench.spec, bench.request(), hparams=given)
    except KEditError as error:
        is_setting = isinstance(error, SettingError)
        assert is_setting or "no_such_setting" not in wrong, "it is no SettingError."
        assert_same(before, model_state(session.host), "After the refusal")
    else:
        raise AssertionError(f"the settings {wrong} were accepted.")
