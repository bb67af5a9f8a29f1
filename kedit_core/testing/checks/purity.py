"""Computing a patch leaves no trace; not even when it fails half way."""

from __future__ import annotations

import contextlib
import io
import sys
from types import ModuleType

import torch

from kedit_core.errors import KEditError
from kedit_core.testing.bench import Bench, Fault, failing_at, skip
from kedit_core.testing.model_state import assert_same, model_state, patch_content


def check_computing_leaves_every_weight(bench: Bench) -> None:
    """`edit` of the method changes no bit of any parameter or buffer."""
    _computing_leaves(bench, "weights", "buffers")


def check_computing_leaves_all_modules_in_place(bench: Bench) -> None:
    """`edit` of the method replaces no module or parameter."""
    _computing_leaves(bench, "modules", "parameters")


def check_computing_leaves_no_hook(bench: Bench) -> None:
    """`edit` of the method removes the hooks that it sets."""
    _computing_leaves(bench, "hooks")


def check_computing_leaves_no_replaced_forward(bench: Bench) -> None:
    """`edit` of the method leaves no module with another `forward`."""
    _computing_leaves(bench, "forwards")


def check_computing_leaves_training_flags(bench: Bench) -> None:
    """`edit` of the method leaves every module's training flag."""
    _computing_leaves(bench, "training")


def check_computing_leaves_requires_grad(bench: Bench) -> None:
    """`edit` of the method leaves frozen what is frozen."""
    _computing_leaves(bench, "requires_grad")


def check_computing_leaves_no_gradients(bench: Bench) -> None:
    """`edit` of the method leaves no gradient at any parameter."""
    _computing_leaves(bench, "gradients")


def check_computing_leaves_the_tokenizer(bench: Bench) -> None:
    """`edit` of the method leaves the tokenizer's settings and tokens."""
    _computing_leaves(bench, "tokenizer")


def check_computing_leaves_the_configuration(bench: Bench) -> None:
    """`edit` of the method leaves the model's and the generation config."""
    _computing_leaves(bench, "configuration")


def check_computing_leaves_global_random_numbers(bench: Bench) -> None:
    """`edit` of the method neither seeds nor draws from a global random generator."""
    _computing_leaves(bench, "random numbers")


def check_computing_leaves_global_settings_of_torch(bench: Bench) -> None:
    """`edit` of the method leaves default type, gradient mode, threads and global hooks."""
    _computing_leaves(bench, "torch settings")


def check_fault_while_computing_leaves_no_trace(bench: Bench) -> None:
    """When a forward pass fails, first or later, the model is as it was found."""
    _fault_leaves_no_trace(bench, Fault)


def check_interrupt_while_computing_leaves_no_trace(bench: Bench) -> None:
    """When the user presses Ctrl-C, early or late, the model is as it was found."""
    _fault_leaves_no_trace(bench, KeyboardInterrupt)


def check_fault_during_an_edit_leaves_the_session_unedited(bench: Bench) -> None:
    """When an edit fails in the middle, the session holds no patch and the model is untouched."""
    session = bench.session()
    with failing_at(session.host, 2, Fault) as passes:
        before = model_state(session.host)
        try:
            bench.edit(session, bench.request())
        except Fault:
            after = model_state(session.host)
        else:
            skip(f"the method runs the model {len(passes)} times, so no second pass can fail")
    assert not session.is_edited, "a failed edit is in the session's history."
    assert_same(before, after, "After a failed edit")


def check_weights_that_are_not_numbers_are_refused(bench: Bench) -> None:
    """NaN in the model leads to an error, or to a finite patch where no weight matters."""
    host = bench.host()
    with torch.no_grad():
        host.module(host.anatomy.embedding).weight.fill_(float("nan"))  # type: ignore[operator]
    session = bench.session(host)
    before = model_state(host)
    try:
        patch = bench.edit(session, bench.request())
    except KEditError:
        assert_same(before, model_state(host), "After a refused edit")
    else:
        assert "gradients" not in bench.spec.needs, "an edit computed from NaN was accepted."
        patch.check_finite()


def check_nothing_is_printed(bench: Bench) -> None:
    """An edit writes nothing to standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench.edit(bench.session(), bench.request())
    assert not out.getvalue(), f"it printed {out.getvalue()[:80]!r}."


def check_modules_remember_nothing(bench: Bench) -> None:
    """The plugin's modules and the method's class hold after an edit what they held before."""
    session = bench.session()
    bench.compute(session, bench.request())
    before = _memory(bench)
    bench.compute(session, bench.request("subject last"))
    after = _memory(bench)
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    assert not changed, f"an edit changed {', '.join(changed[:4])}."


def check_same_seed_gives_the_same_patch(bench: Bench) -> None:
    """The same request with the same seed gives the same patch, bit for bit."""
    _same_patches(bench, "A second computation")


def check_instances_do_not_influence_each_other(bench: Bench) -> None:
    """An edit is the same whether or not another session edited something else before."""
    bench.edit(bench.session(seed=7), bench.request("subject inside"))
    _same_patches(bench, "After another session's edit")


def check_instance_remembers_nothing(bench: Bench) -> None:
    """One instance of the method gives the same patch before and after another request."""
    session, method = bench.session(), bench.method()
    bench.freeze(session)
    job, other = (bench.job(session, bench.request(f)) for f in ("subject first", "subject last"))
    first = method.edit(job)
    method.edit(other)
    assert patch_content(first) == patch_content(method.edit(job)), (
        "the instance remembers an earlier request: its patch differs."
    )


def check_stored_artifacts_change_nothing(bench: Bench) -> None:
    """A patch is the same whether its statistics were in the store or had to be made."""
    session = bench.session(store=bench.folder())
    cold = bench.compute(session, bench.request())
    assert patch_content(cold) == patch_content(bench.compute(session, bench.request())), (
        "the patch computed with stored artifacts differs from the first one."
    )


def check_global_seed_changes_nothing(bench: Bench) -> None:
    """A patch does not depend on the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        _same_patches(bench, "With another global seed")


def check_settings_and_requests_are_not_changed(bench: Bench) -> None:
    """An edit leaves the hyperparameters and the requests that it was given."""
    request = bench.request()
    before = bench.hparams.model_dump_json(), request.model_dump_json()
    bench.edit(bench.session(), request)
    assert before == (bench.hparams.model_dump_json(), request.model_dump_json()), (
        "the hyperparameters or the request were changed."
    )


def _computing_leaves(bench: Bench, *aspects: str) -> None:
    assert_same(*bench.computing(), "After computing a patch", *aspects)


def _fault_leaves_no_trace(bench: Bench, error: type[BaseException]) -> None:
    request = bench.request()
    bench.patch()  # what is dear is in the store, as at most edits
    for number in (1, 2, 3, 6):
        session = bench.session()
        bench.freeze(session)
        method, job = bench.method(), bench.job(session, request)
        with failing_at(session.host, number, error) as passes:
            before = model_state(session.host)
            with contextlib.suppress(error):
                method.edit(job)
            after = model_state(session.host)
        if not passes:
            skip("the method does not run the model")
        assert_same(before, after, f"After a fault in forward pass {number}")


def _same_patches(bench: Bench, when: str) -> None:
    wanted = patch_content(bench.patch())
    found = patch_content(bench.compute(bench.session(), bench.request()))
    assert found == wanted, f"{when}, the patch differs."


def _memory(bench: Bench) -> dict[str, object]:
    """What the modules of the plugin's package, and their classes, hold."""
    package = bench.spec.load().__module__.rpartition(".")[0] or bench.spec.load().__module__
    if package.partition(".")[0] == "kedit_core":
        package = bench.spec.load().__module__
    names = [n for n in sys.modules if n == package or n.startswith(f"{package}.")]
    modules = [sys.modules[name] for name in sorted(names)]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    owners: list[ModuleType | type] = [*modules, *classes]
    return {
        f"{owner.__name__}.{name}": _shallow(value)
        for owner in owners
        for name, value in vars(owner).items()
        if not name.startswith("__") and not isinstance(value, ModuleType)
    }


def _shallow(value: object) -> object:
    """A value to compare: itself, a container's or an object's content, how full a cache is."""
    if isinstance(value, dict):
        return id(value), [(key, id(item)) for key, item in value.items()]
    if isinstance(value, list | set | tuple):
        return id(value), [id(item) for item in value]
    if hasattr(value, "cache_info"):
        return id(value), value.cache_info().currsize
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return id(value)
    return id(value), [(key, id(item)) for key, item in vars(value).items()]
