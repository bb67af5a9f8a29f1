"""Discovery with real distributions on the path: one broken plugin costs one line."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kedit_core import (
    EditFinished,
    MethodSpec,
    MetricSpec,
    PluginError,
    UnknownNameError,
    discover,
    hookimpl,
)
from kedit_core.plugins import Catalog, first_party

METHOD = """
from kedit_core import MethodSpec, hookimpl

@hookimpl
def kedit_register_methods():
    return [MethodSpec({name!r}, "nowhere:At", "A method.")]
"""
REPORT = """
import json, sys
from kedit_core import KEditError, MethodSpec, discover
try:
    catalog = discover()
    found = {
        "plugins": {f"{p.distribution}/{p.name}": [p.version, p.error] for p in catalog.plugins},
        "methods": [s.name for s in catalog.all(MethodSpec)],
        "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    }
except KEditError as error:
    found = {"raised": str(error)}
sys.stdout.write(json.dumps(found))
"""


def distribute(
    root: Path,
    distribution: str,
    source: str = "",
    *,
    name: str | None = None,
    group: str = "kedit.plugins.v1",
    version: str = "1.2",
) -> None:
    """Lay a distribution with one plugin module into a folder, as an installer does."""
    module = distribution.replace("-", "_")
    (root / f"{module}.py").write_text(textwrap.dedent(source) or METHOD.format(name=distribution))
    info = root / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    (info / "entry_points.txt").write_text(f"[{group}]\n{name or distribution} = {module}\n")


def run(root: Path, script: str = REPORT, **environment: str) -> dict:
    """What a fresh process with the folder on its path reports."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KEDIT_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error_of(found: dict, plugin: str) -> str:
    (error,) = (e for key, (_, e) in found["plugins"].items() if key.partition("/")[2] == plugin)
    return error


# -- whole distributions -------------------------------------------------------------------------

BROKEN = {
    "odd-raises": ("raise ValueError('no luck today')", "ValueError: no luck today"),
    "odd-silent": ("raise ValueError", "ValueError"),
    "odd-exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "odd-lacks": (
        "import a_package_that_is_not_here",
        "it needs the package 'a_package_that_is_not_here', which is not installed",
    ),
    "odd-syntax": ("def (:", "SyntaxError: invalid syntax"),
    "odd-hook": (
        """
        from kedit_core import hookimpl
        @hookimpl
        def kedit_register_method():
            return []
        """,
        "PluginError: it implements an unknown hook 'kedit_register_method'. "
        "Did you mean 'kedit_register_methods'?",
    ),
    "odd-unmarked": (
        """
        def kedit_register_methods():
            return []
        """,
        "PluginError: its function 'kedit_register_methods' is never called: put @hookimpl before "
        "it",
    ),
    "odd-observer": (
        """
        def kedit_edit_finished(event):
            pass
        """,
        "PluginError: its function 'kedit_edit_finished' is never called",
    ),
    "odd-own": (
        "import odd_own.part",
        "the package 'odd_own' has no module 'odd_own.part'",
    ),
    "odd-argument": (
        """
        from kedit_core import hookimpl
        @hookimpl
        def kedit_edit_finished(evnt):
            pass
        """,
        "PluginValidationError: ",
    ),
    "odd-type": (
        """
        from kedit_core import MetricSpec, hookimpl
        @hookimpl
        def kedit_register_methods():
            return [MetricSpec("m", "a:B", "A metric.")]
        """,
        "PluginError: kedit_register_methods returned MetricSpec(",
    ),
    "odd-kind": (
        """
        from kedit_core import MethodSpec, hookimpl
        class Own(MethodSpec):
            pass
        @hookimpl
        def kedit_register_methods():
            return [Own("m", "a:B", "A method.")]
        """,
        "PluginError: kedit_register_methods returned Own(",
    ),
    "odd-none": (
        """
        from kedit_core import hookimpl
        @hookimpl
        def kedit_register_methods():
            pass
        """,
        "TypeError: 'NoneType' object is not iterable",
    ),
    "odd-single": (
        """
        from kedit_core import MethodSpec, hookimpl
        @hookimpl
        def kedit_register_methods():
            return MethodSpec("m", "a:B", "A method.")
        """,
        "TypeError: 'MethodSpec' object is not iterable",
    ),
    "odd-late": (
        """
        from kedit_core import MethodSpec, hookimpl
        @hookimpl
        def kedit_register_methods():
            yield MethodSpec("half", "a:B", "A method.")
            raise RuntimeError("half way")
        """,
        "RuntimeError: half way",
    ),
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> dict:
    """One good plugin among every kind of broken one, as `discover` reports them."""
    root = tmp_path_factory.mktemp("crowd")
    distribute(root, "odd-fine")
    distribute(root, "odd-later", group="kedit.plugins.v2")
    for distribution, (source, _) in BROKEN.items():
        distribute(root, distribution, source)
    return run(root)


@pytest.mark.parametrize("plugin", BROKEN)
def test_broken_plugin_is_listed_with_its_own_error(crowd, plugin):
    assert error_of(crowd, plugin).startswith(BROKEN[plugin][1])


def test_plugin_for_a_later_api_is_listed_and_not_imported(crowd):
    assert error_of(crowd, "odd-later") == (
        "made for another plugin API: it registers in kedit.plugins.v2, this is kedit.plugins.v1"
    )
    assert "odd_later" not in crowd["loaded"]


def test_a_typo_in_the_entry_point_is_told_as_one(tmp_path):
    distribute(tmp_path, "odd-fine")
    (tmp_path / "odd_fine-1.2.dist-info" / "entry_points.txt").write_text(
        "[kedit.plugins.v1]\nodd-fine = odd_fine.plugn\n"
    )

    error = error_of(run(tmp_path), "odd-fine")
    assert error == "the package 'odd_fine' has no module 'odd_fine.plugn'"


def test_everything_else_works(crowd):
    assert crowd["plugins"]["odd-fine/odd-fine"] == ["1.2", ""]
    assert "odd-fine" in crowd["methods"]
    assert not error_of(crowd, "kedit")


def test_broken_plugin_offers_nothing(crowd):
    assert "half" not in crowd["methods"]
    assert "odd-later" not in crowd["methods"]


def test_each_plugin_costs_one_line(crowd):
    names = [key.partition("/")[2] for key in crowd["plugins"]]
    assert len(names) == len(set(names))
    assert {*BROKEN, "odd-fine", "odd-later"} <= set(names)
    assert not any("\n" in error for _, error in crowd["plugins"].values())


def test_nothing_heavy_is_loaded_by_discovery(tmp_path):
    distribute(tmp_path, "odd-fine")
    script = REPORT.replace(
        "    catalog = discover()",
        "    catalog = discover()\n"
        "    assert catalog.method('odd-fine').summary == 'A method.'\n"
        "    assert [catalog.plugin_of(s) for s in catalog.all(MethodSpec)]",
    )

    loaded = set(run(tmp_path, script)["loaded"])
    assert "odd_fine" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "peft", "safetensors", "pydantic"}


def test_two_distributions_that_offer_one_name_are_both_named(tmp_path):
    for distribution in ("odd-a", "odd-b"):
        distribute(tmp_path, distribution, METHOD.format(name="twin"))
    distribute(tmp_path, "odd-fine")

    found = run(tmp_path)
    error = "the method 'twin' is offered by odd-a and odd-b; uninstall all but one"
    assert error_of(found, "odd-a") == error_of(found, "odd-b") == error
    assert "twin" not in found["methods"]
    assert "odd-fine" in found["methods"]


def test_two_distributions_with_one_plugin_name_cost_the_second(tmp_path):
    distribute(tmp_path, "odd-a", METHOD.format(name="a"), name="twin")
    distribute(tmp_path, "odd-b", METHOD.format(name="b"), name="twin")

    found = run(tmp_path)
    assert found["plugins"]["odd-a/twin"] == ["1.2", ""]
    assert "another plugin is called 'twin' too" in found["plugins"]["odd-b/twin"][1]
    assert "a" in found["methods"]
    assert "b" not in found["methods"]


def test_distribution_without_metadata_costs_one_line(tmp_path):
    distribute(tmp_path, "odd-rest")
    (tmp_path / "odd_rest-1.2.dist-info" / "METADATA").unlink()
    distribute(tmp_path, "odd-fine")

    found = run(tmp_path)
    assert "odd-fine" in found["methods"]
    assert len([key for key in found["plugins"] if key.endswith("/odd-rest")]) == 1


def test_kedit_plugins_limits_what_is_imported(tmp_path):
    for distribution in ("odd-a", "odd-b", "odd-c"):
        distribute(tmp_path, distribution)

    found = run(tmp_path, KEDIT_PLUGINS="odd-a, odd-c,")
    assert found["methods"] == ["odd-a", "odd-c"]
    assert set(found["plugins"]) == {"odd-a/odd-a", "odd-c/odd-c"}
    assert "odd_b" not in found["loaded"]


def test_kedit_strict_turns_a_broken_plugin_into_an_error(tmp_path):
    distribute(tmp_path, "odd-raises", BROKEN["odd-raises"][0])

    only = {"KEDIT_PLUGINS": "odd-raises"}
    assert run(tmp_path, KEDIT_STRICT="1", **only) == {
        "raised": "Plugin odd-raises of odd-raises: ValueError: no luck today."
    }
    assert run(tmp_path, KEDIT_STRICT="0", **only)["methods"] == []


def test_kedit_strict_is_content_with_good_plugins(tmp_path):
    distribute(tmp_path, "odd-fine")

    found = run(tmp_path, KEDIT_STRICT="1", KEDIT_PLUGINS="odd-fine")
    assert found["methods"] == ["odd-fine"]


def test_misuse_of_a_name_that_two_claim_names_both(tmp_path):
    twins = [(name, _methods(name, "twin")) for name in ("kedit-b", "kedit-a")]

    with pytest.raises(PluginError, match="'twin' is offered by kedit-a and kedit-b"):
        discover(extra=twins).method("twin")


# -- look-ups ------------------------------------------------------------------------------------


def _methods(plugin: str, *names: str) -> ModuleType:
    """A plugin module that offers methods of these names."""
    module = ModuleType(plugin)

    @hookimpl
    def kedit_register_methods():
        return [MethodSpec(name, "nowhere:At", "A method.") for name in names]

    module.kedit_register_methods = kedit_register_methods
    return module


@pytest.fixture
def alone(monkeypatch) -> None:
    """No plugin is installed."""
    monkeypatch.setattr("kedit_core.plugins._entry_points", list)
    monkeypatch.delenv("KEDIT_PLUGINS", raising=False)
    monkeypatch.delenv("KEDIT_STRICT", raising=False)


def test_specs_are_found_by_kind_and_name(alone):
    catalog = discover(extra=[("b", _methods("b", "zeta", "beta")), ("a", _methods("a", "alpha"))])

    assert [spec.name for spec in catalog.all(MethodSpec)] == ["alpha", "beta", "zeta"]
    assert catalog.plugin_of(catalog.method("zeta")).name == "b"
    assert catalog.plugins[0].offers == ("method zeta", "method beta")
    assert catalog.plugins[0].status == "ok"
    assert catalog.all(MetricSpec) == []


def test_unknown_name_is_answered_with_the_nearest(alone):
    catalog = discover(extra=[("odd", _methods("odd", "odd-method"))])

    with pytest.raises(UnknownNameError, match=r"^There is no method 'od-methd'. Did you mean 'od"):
        catalog.method("od-methd")


def test_nearest_name_may_be_one_that_is_not_installed(alone):
    with pytest.raises(UnknownNameError, match="Did you mean 'rome'"):
        discover().method("rmoe")


def test_unknown_name_tells_which_plugins_do_not_work(alone):
    broken = ModuleType("broken")
    broken.kedit_register_methods = hookimpl(lambda: 1 / 0, specname="kedit_register_methods")
    catalog = discover(extra=[("cap", broken), ("odd", _methods("odd", "odd-method"))])

    with pytest.raises(UnknownNameError) as caught:
        catalog.method("od-method")
    assert str(caught.value) == (
        "There is no method 'od-method'. Did you mean 'odd-method'? Plugins that do not work: cap "
        "(see `kedit plugins`)."
    )


def test_name_of_another_kind_is_unknown(alone):
    catalog = discover(extra=[("odd", _methods("odd", "odd-method"))])

    with pytest.raises(UnknownNameError, match="There is no dataset 'odd-method'"):
        catalog.dataset("odd-method")


@pytest.mark.parametrize(("kind", "name"), first_party())
def test_first_party_name_that_is_missing_is_answered_with_its_package(alone, kind, name):
    package = first_party()[kind, name]

    with pytest.raises(UnknownNameError) as caught:
        getattr(discover(), kind)(name)
    assert str(caught.value) == (
        f"The {kind} '{name}' is not installed. Install it with `pip install {package}`."
    )


def test_first_party_name_that_the_environment_leaves_out_says_so(monkeypatch):
    def point(name):
        return SimpleNamespace(
            name=name,
            group="kedit.plugins.v1",
            dist=SimpleNamespace(name=f"kedit-{name}", version="1"),
            load=lambda: _methods(name, name),
        )

    monkeypatch.setattr("kedit_core.plugins._entry_points", lambda: [point("memit"), point("rome")])
    monkeypatch.setenv("KEDIT_PLUGINS", "rome")

    assert discover().method("rome").name == "rome"
    with pytest.raises(UnknownNameError) as caught:
        discover().method("memit")
    assert str(caught.value) == (
        "The method 'memit' is left out by the environment variable KEDIT_PLUGINS. Add 'memit' to "
        "it, or unset it."
    )
    with pytest.raises(UnknownNameError, match="'alphaedit' is not installed"):
        discover().method("alphaedit")


def test_first_party_plugin_that_is_broken_shows_why(alone):
    broken = ModuleType("broken")

    @hookimpl
    def kedit_register_methods():
        raise RuntimeError("bad day")

    broken.kedit_register_methods = kedit_register_methods
    with pytest.raises(PluginError, match=r"'rome' is broken: RuntimeError: bad day"):
        discover(extra=[("kedit-rome", broken)]).method("rome")


def test_every_first_party_package_offers_what_the_index_says():
    """The plugins in this repository, installed as they are, are all in the index."""
    catalog = discover()
    ours = {p.name for p in (Path(__file__).parents[2] / "plugins").iterdir()}
    offered = {
        tuple(offer.split(" ", 1)): info.distribution
        for info in catalog.plugins
        for offer in info.offers
        if info.distribution in ours and offer.split()[0] in ("method", "model", "dataset")
    }

    assert offered.items() <= first_party().items()


def test_target_that_fails_to_import_says_what_is_missing():
    needed = "'not_here.x:Y' cannot be imported: it needs the package 'not_here', which is not inst"
    with pytest.raises(PluginError, match=needed):
        MethodSpec("odd", "not_here.x:Y", "A method.").load()
    typo = r"'kedit_core.spc:Y' cannot be imported: the package 'kedit_core' has no module 'kedit_c"
    with pytest.raises(PluginError, match=typo):
        MethodSpec("odd", "kedit_core.spc:Y", "A method.").load()
    with pytest.raises(PluginError, match="does not exist in its module"):
        MethodSpec("odd", "kedit_core.spec:Nothing", "A method.").load()


def test_target_that_raises_at_import_is_a_plugin_error(tmp_path, monkeypatch):
    (tmp_path / "odd_target.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(PluginError, match="'odd_target:X' cannot be imported: division by zero"):
        MethodSpec("odd", "odd_target:X", "A method.").load()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            MethodSpec("odd", "a:B", "A method.", needs={"subjct"}),
            "MethodSpec 'odd': needs cannot be 'subjct'. Did you mean 'subject'?",
        ),
        (
            MethodSpec("odd", "a:B", "A method.", effect="weigths"),
            "MethodSpec 'odd': effect cannot be 'weigths'. Did you mean 'weights'?",
        ),
        (
            MethodSpec("odd", "a:B", "A method.", max_batch=0),
            "MethodSpec 'odd': max_batch is 0; give 1 or more, or None",
        ),
        (
            MethodSpec("My Method", "a:B", "A method."),
            "MethodSpec 'My Method': its name must be lower-case words with hyphens between them",
        ),
        (
            MetricSpec("foo", "a:B", "A metric."),
            "MetricSpec 'foo': its name must be quantity/protocol@version",
        ),
        (
            MetricSpec("foo/bar@1", "a:B", "A metric.", better="hihger"),
            "MetricSpec 'foo/bar@1': better cannot be 'hihger'. Did you mean 'higher'?",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.name,
)
def test_a_value_that_no_spec_may_have_costs_the_plugin_one_line(alone, spec, problem):
    hook = f"kedit_register_{'methods' if isinstance(spec, MethodSpec) else 'metrics'}"
    plugin = ModuleType("odd")
    setattr(plugin, hook, hookimpl(lambda: [spec]))

    catalog = discover(extra=[("odd", plugin)])

    (info,) = catalog.plugins
    assert info.error.startswith(f"PluginError: {problem}")
    assert catalog.all(type(spec)) == []


def test_specs_are_frozen():
    spec = MethodSpec("odd", "a:B", "A method.")

    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "even"


# -- observation ---------------------------------------------------------------------------------


def _observer(name: str, seen: list, *, fails: bool = False) -> ModuleType:
    module = ModuleType(name)

    @hookimpl
    def kedit_edit_finished(event):
        seen.append((name, event))
        if fails:
            raise RuntimeError("observer broke")

    module.kedit_edit_finished = kedit_edit_finished
    return module


def test_error_of_an_observer_is_logged_and_stops_nobody(alone, caplog):
    seen = []
    catalog = discover(
        extra=[
            ("first", _observer("first", seen)),
            ("bad", _observer("bad", seen, fails=True)),
            ("last", _observer("last", seen)),
        ]
    )
    event = EditFinished("odd", (), patch=None, seconds=0.0)

    with caplog.at_level(logging.ERROR):
        catalog.notify("kedit_edit_finished", event)

    assert catalog.has_observers("kedit_edit_finished")
    assert not catalog.has_observers("kedit_case_measured")
    assert sorted(name for name, _ in seen) == ["bad", "first", "last"]
    assert all(got is event for _, got in seen)
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "plugin bad failed in kedit_edit_finished" in record.getMessage()
    assert "observer broke" in caplog.text


def test_nobody_listening_is_fine(alone):
    discover().notify("kedit_case_measured", object())


def test_catalogs_do_not_share_anything(alone):
    one = discover(extra=[("odd", _methods("odd", "odd-method"))])
    two = discover()

    assert [s.name for s in one.all(MethodSpec)] == ["odd-method"]
    assert two.all(MethodSpec) == []
    assert Catalog().plugins == []


def test_a_misspelt_name_in_the_environment_is_told(monkeypatch, caplog):
    monkeypatch.setenv("KEDIT_PLUGINS", "kedit,rmoe")

    catalog = discover()

    assert [plugin.name for plugin in catalog.plugins] == ["kedit"]
    assert "KEDIT_PLUGINS names 'rmoe'" in caplog.text
