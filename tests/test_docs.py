"""The documentation is true: what it shows exists, and what exists is shown."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

import kedit_core
from kedit_core import DatasetSpec, EditRequest, KEditError, MethodSpec, MetricSpec, discover
from kedit_core.cli import main
from kedit_core.cli.app import build_app
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost, Patch
from kedit_core.scaffold import new_plugin
from kedit_core.testing import toy_corpus

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = {"kedit_core", "kedit_bench", *(p.name for p in (ROOT / "plugins").glob("*/src/*"))}


def read(name):
    return (ROOT / name).read_text("utf-8")


def blocks(page, language):
    """The fenced blocks of a language as (line of the fence, text)."""
    text = page.read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, m.start()) + 1, m[1]) for m in found]


def cases(language):
    return [
        pytest.param(text, id=f"{page.name}:{line}")
        for page in PAGES
        for line, text in blocks(page, language)
    ]


def command_lines():
    """Every `kedit …` line of the bash blocks, continued lines joined."""
    return [
        pytest.param(command, id=f"{page.name}:{line} {command[:50]}")
        for page in PAGES
        for line, text in blocks(page, "bash")
        for command in text.replace("\\\n", " ").splitlines()
        if command.startswith("kedit ")
    ]


def prose(page):
    """A page's text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def slugs(page):
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w-]", "", re.sub(r"\s+", "-", h.strip().lower())) for h in headings}


@pytest.fixture(scope="module")
def cli():
    return typer.main.get_command(build_app())


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- README -----------------------------------------------------------------------------------


def test_what_is_generated_is_what_the_plugins_register(generate):
    for file, content in generate.generated().items():
        assert read(file) == content, f"{file} is stale: python docs/generate.py"


def test_check_finds_a_stale_table_and_writing_mends_it(generate, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- methods:start -->\nold\n<!-- methods:end -->\nafter\n", "utf-8")
    (tmp_path / "kedit_core").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "kedit"\n', "utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)  # a project without plugins
    monkeypatch.setattr(generate, "TABLES", generate.TABLES[:1])
    with pytest.raises(SystemExit, match="stale"):
        generate.main(["--check"])
    assert "old" in page.read_text("utf-8")
    generate.main([])
    generate.main(["--check"])
    text = page.read_text("utf-8")
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_page_without_markers_is_refused(generate):
    with pytest.raises(ValueError, match="markers"):
        generate.with_table("no table here", "methods", "| table |")


@pytest.mark.parametrize("session", ["demo", "tests"])
def test_the_readme_shows_the_command_that_runs(session):
    assert f"pip install nox && nox -s {session}" in read("README.md")


def test_the_readme_is_short():
    before, _, rest = read("README.md").partition("<!-- methods:start -->")
    table, _, after = rest.partition("<!-- methods:end -->")  # grows with the plugins
    assert table
    assert len((before + after).splitlines()) <= 140


# -- code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", cases("python"))
def test_python_examples_parse_and_their_imports_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] in OURS:
                    importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OURS:
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_understood(cli, line):
    command, words = cli, shlex.split(line)[1:]
    while hasattr(command, "commands") and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(command.name, words)  # parses and checks; runs nothing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_text_exist(cli, page):
    named = set(re.findall(r"`kedit ([a-z][a-z-]*)", prose(page)))
    assert named <= set(cli.commands)


@pytest.mark.parametrize("text", cases("yaml"))
def test_yaml_examples_are_yaml(text):
    assert yaml.safe_load(text)


def test_the_example_of_an_author_writes_a_fact(tmp_path, monkeypatch, toy_host):
    page = ROOT / "docs" / "write-a-method.md"
    package = tmp_path / "kedit_nudge"
    (package / "presets").mkdir(parents=True)
    for name in ("plugin", "hparams", "method"):
        section = read("docs/write-a-method.md").partition(f"### {name}.py")[2]
        code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
        (package / f"{name}.py").write_text(code, "utf-8")
    ((_, preset),) = blocks(page, "yaml")
    (package / "presets" / "example.yaml").write_text(preset, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        plugin = importlib.import_module("kedit_nudge.plugin")
        session = EditSession(toy_host("llama"), catalog=discover([("nudge", plugin)]))
        request = toy_request()
        with session.suspended():
            before = probability(session, request)
        session.edit("nudge", request, preset="example", hparams={"layer": 1})
        assert probability(session, request) > before
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "kedit_nudge"]:
            del sys.modules[name]


def test_the_variant_of_memit_keeps_the_largest_relative_changes(tmp_path, monkeypatch, toy_host):
    section = read("docs/write-a-method.md").partition("### A variant of MEMIT")[2]
    code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    (tmp_path / "kedit_rect.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    rect = MethodSpec("rect", "kedit_rect:Rect", "RECT", hparams="kedit_rect:RectHyperParams")
    host, request = toy_host("llama"), toy_request()
    session = EditSession(host, corpus=Corpus(str(toy_corpus())))
    with session.trial("memit", request, preset="toy") as outcome:
        (whole,), settings = outcome.patches[0].effects, outcome.patches[0].hparams
    weight, before = host.weight(whole.site).clone(), probability(session, request)
    own = {key: value for key, value in settings.items() if key != "history"}
    try:
        (patch,) = session.edit(rect, request, hparams={**own, "keep": 0.3}).patches
    finally:
        sys.modules.pop("kedit_rect", None)
    (kept,) = patch.effects
    ratio, is_kept = whole.dense().abs() / weight.abs(), kept.dense() != 0
    assert is_kept.sum() == round(0.3 * weight.numel())
    assert ratio[is_kept].min() >= ratio[~is_kept].max()
    torch.testing.assert_close(kept.dense()[is_kept], whole.dense()[is_kept])
    assert probability(session, request) > before


def test_the_dataset_and_the_metric_of_the_page_are_what_kedit_writes(tmp_path):
    page = read("docs/write-a-dataset-or-metric.md")
    shown = re.findall(r"^`(kedit-\S+)`\n\n```\w+\n(.*?)^```$", page, re.M | re.S)
    new_plugin("dataset", "capitals", tmp_path)
    new_plugin("metric", "learned", tmp_path)
    assert [path for path, text in shown if text not in (tmp_path / path).read_text("utf-8")] == []
    files = {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.py")}
    assert {f for f in files if not f.endswith("__init__.py")} <= {path for path, _ in shown}


def test_the_fields_of_datasets_and_metrics_are_explained():
    page = read("docs/write-a-dataset-or-metric.md")
    for spec in (DatasetSpec, MetricSpec):
        table = page.partition(f"| Field of `{spec.__name__}` |")[2].partition("\n\n")[0]
        cells = " ".join(re.findall(r"^\| (.+?) \|", table, re.M))
        assert sorted(f.name for f in fields(spec)) == sorted(re.findall(r"`(\w+)`", cells))


def toy_request():
    from kedit_core.testing import toy_facts

    fact = next(f for f in toy_facts() if not f.prompt.endswith("{}"))
    return EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)


def probability(session, request):
    (score,) = session.view().score([request.text], [request.target_new])
    return score.mean_logprob


# -- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(other), f"{other.name} has no heading #{anchor}"


def test_every_page_is_in_the_navigation():
    pages = {page for entry in yaml.safe_load(read("mkdocs.yml"))["nav"] for page in entry.values()}
    assert pages == {page.name for page in (ROOT / "docs").glob("*.md")}


# -- what exists is documented ----------------------------------------------------------------


def test_every_kind_of_error_is_explained():
    exported = (getattr(kedit_core, name) for name in kedit_core.__all__)
    kinds = {e for e in exported if isinstance(e, type) and issubclass(e, KEditError)}
    table = read("docs/edit-a-fact.md").partition("## When something goes wrong")[2]
    missing = {kind.__name__ for kind in kinds - {KEditError}} - set(re.findall(r"`(\w+)`", table))
    assert not missing


def test_every_key_of_a_saved_session_is_explained(tmp_path, toy_host):
    session = EditSession(toy_host("gpt2"))
    session.apply(Patch("nothing", ()))
    session.save(tmp_path / "edits")
    manifest = json.loads((tmp_path / "edits" / "0000" / "patch.json").read_text("utf-8"))
    stack = json.loads((tmp_path / "edits" / "stack.json").read_text("utf-8"))
    keys = {*manifest, *stack, *stack["patches"][0], *(f"base.{key}" for key in manifest["base"])}
    explained = re.findall(r'[`"]([\w.]+)[`"]', prose(ROOT / "docs" / "patch-format.md"))
    assert keys - {"base"} <= set(explained)


def test_what_is_to_be_read_before_an_edit_is_loaded_is_shown(tmp_path, toy_host, capsys):
    session, request = EditSession(toy_host("gpt2")), toy_request()
    session.apply(Patch("nothing", (), requests=(request,), notes={"losses": [0.5]}))
    session.save(tmp_path / "edits")
    command = re.search(r"`requests` and `notes` with\s`(.+?)`", read("docs/patch-format.md"))[1]
    with pytest.raises(SystemExit):
        main([*command.split()[1:], str(tmp_path / "edits")])
    (shown,) = json.loads(capsys.readouterr().out)["patches"]
    assert shown["requests"][0]["prompt"] == request.prompt
    assert shown["notes"] == {"losses": [0.5]}


def test_the_current_version_has_an_entry_in_the_changelog():
    assert f"\n## {kedit_core.__version__}\n" in read("CHANGELOG.md")
    assert tomllib.loads(read("pyproject.toml"))["project"]["version"] == kedit_core.__version__


def test_the_hosts_calls_of_the_author_page_exist():
    named = set(re.findall(r"`host\.(\w+)", read("docs/write-a-method.md")))
    own = {"model", "tokenizer", "name", "anatomy"}  # set when it is made
    assert named
    assert not {name for name in named - own if not hasattr(ModelHost, name)}
