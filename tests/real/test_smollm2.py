"""The promises of an edit, on a real pretrained model."""

import hashlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kedit_core import EditCase, EditRequest, discover
from kedit_core.editing import EditSession, ModelHost
from kedit_core.export import export_hf, export_peft

pytestmark = pytest.mark.real

TOWER = EditRequest(
    prompt="The {} is located in the city of", subject="Eiffel Tower", target_new="Rome"
)
COLOSSEUM = "The Colosseum is located in the city of"
LOUVRE = "The Louvre is located in the city of"


def bits(model):
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def host():
    return ModelHost.load("smollm2-135m", device="cpu")


@pytest.fixture
def session(host):
    session = EditSession(host)
    yield session
    session.rollback()


@pytest.fixture(scope="module")
def unrelated():
    """Prompts of facts that have nothing to do with the tower."""
    cases = discover().dataset("starter").load()().cases(None)
    prompts = [case.request.text for case in cases if isinstance(case, EditCase)]
    return [prompt for prompt in prompts if "Eiffel" not in prompt][:40]


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "emmet", "pmet", "alphaedit"])
def test_one_edit_leads_and_nine_of_ten_unrelated_prompts_go_on_as_before(
    session, unrelated, method
):
    before = session.view().logits(unrelated).argmax(dim=-1)
    session.edit(method, TOWER, hparams={"moment_tokens": 3072})  # text that it must write first
    assert session.view().greedy(TOWER.text, 4).strip().startswith("Rome")
    after = session.view().logits(unrelated).argmax(dim=-1)
    assert float((after == before).float().mean()) >= 0.9


@pytest.mark.parametrize("method", ["rome", "r-rome", "ft-m"])
def test_an_edit_changes_the_answer_and_comes_off_bit_for_bit(session, method):
    before = bits(session.model)
    assert session.view().greedy(TOWER.text, 8).strip().startswith("Paris")
    session.edit(method, TOWER)
    assert session.view().greedy(TOWER.text, 8).strip().startswith("Rome")
    changed = {name for name, digest in bits(session.model).items() if digest != before[name]}
    assert changed == {delta.site.parameter for delta in session.stack[0].deltas}
    session.rollback()
    assert bits(session.model) == before


def test_a_neighbour_keeps_its_answer(session):
    session.edit("rome", TOWER)
    assert session.view().greedy(LOUVRE, 8).strip().startswith("Paris")
    assert session.view().greedy(COLOSSEUM, 8).strip().startswith("Rome")


def test_history_savepoints_suspension_and_failure_restore_the_bits(session):
    pristine = bits(session.model)
    session.edit("rome", TOWER)
    first = bits(session.model)
    mark = session.savepoint()
    other = EditRequest(prompt="The capital of {} is", subject="Japan", target_new="Madrid")
    session.edit("ft-m", other)
    session.edit("r-rome", other, overlay=True)
    both = bits(session.model)
    with session.suspended():
        assert bits(session.model) == pristine
    assert bits(session.model) == both
    norm = session.host.module(session.host.anatomy.final_norm)
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    handle = norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.edit("rome", other)
    handle.remove()
    assert bits(session.model) == both
    session.rollback(mark)
    assert bits(session.model) == first
    session.rollback()
    assert bits(session.model) == pristine


@pytest.fixture(scope="module")
def saved(host, tmp_path_factory):
    """One ROME edit as files of every kind, and the logits that they must give."""
    folder = tmp_path_factory.mktemp("edit")
    session = EditSession(host)
    session.edit("rome", TOWER)
    session.save(folder / "edits")
    export_peft(session, folder / "peft")
    export_hf(session, folder / "hf")
    logits = session.view().logits([TOWER.text, LOUVRE])
    session.rollback()
    save_file({"logits": logits}, folder / "logits.safetensors")
    return folder


LOAD_AND_COMPARE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from kedit_core.editing import EditSession, ModelHost

session = EditSession(ModelHost.load("smollm2-135m", device="cpu"))
session.load(Path(sys.argv[1]))
logits = session.view().logits(sys.argv[3:])
torch.testing.assert_close(logits, load_file(sys.argv[2])["logits"], rtol=0, atol=1e-4)
"""


def in_another_process(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_saved_edit_is_small(saved):
    size = sum(f.stat().st_size for f in (saved / "edits").rglob("*") if f.is_file())
    assert size < 200_000


def test_a_saved_edit_gives_the_same_logits_in_another_process(saved):
    files = saved / "edits", saved / "logits.safetensors"
    in_another_process(LOAD_AND_COMPARE, *files, TOWER.text, LOUVRE)


def test_weights_modules_and_prompts_stand_together_and_come_off_in_order(session, tmp_path):
    pristine = bits(session.model)
    modules = dict(session.model.named_modules())
    settings = {"ice": {"gate_single": True}}  # or it would stand before the other two prompts
    facts = {
        "rome": TOWER,
        "grace": EditRequest(
            prompt="The capital of {} is", subject="Japan", target_new="Buenos Aires"
        ),
        "ice": EditRequest(prompt="{} plays the", subject="Yo-Yo Ma", target_new="trumpet"),
    }
    prompts = [fact.text for fact in facts.values()]
    steps = [session.view().logits(prompts)]
    for method, fact in facts.items():
        session.edit(method, fact, hparams=settings.get(method))
        steps.append(session.view().logits(prompts))
    written = session.view().greedy(prompts, 8)
    for text, fact in zip(written, facts.values(), strict=True):
        assert text.strip().startswith(fact.target_new)
    assert len(session.unseen_effects()) == 1
    session.save(tmp_path / "edits")
    save_file({"logits": steps[-1]}, tmp_path / "logits.safetensors")

    in_another_process(
        LOAD_AND_COMPARE, tmp_path / "edits", tmp_path / "logits.safetensors", *prompts
    )
    for expected in steps[-2::-1]:
        session.pop()
        assert torch.equal(session.view().logits(prompts), expected)
    assert bits(session.model) == pristine
    assert all(found is modules[name] for name, found in session.model.named_modules())


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_an_export_gives_the_same_logits_without_kedit(host, saved, kind):
    load = {
        "hf": "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n",
        "peft": (
            "from peft import PeftModel\n"
            "base = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
            "model = PeftModel.from_pretrained(base, sys.argv[1])\n"
        ),
    }[kind]
    in_another_process(
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{load}"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])\n"
        "model.eval()\n"
        "expected = load_file(sys.argv[3])['logits']\n"
        "for prompt, row in zip(sys.argv[4:], expected, strict=True):\n"
        "    with torch.no_grad():\n"
        "        logits = model(**tokenizer(prompt, return_tensors='pt')).logits[0, -1]\n"
        "    torch.testing.assert_close(logits, row, rtol=1e-5, atol=1e-4)\n"
        "assert not [name for name in sys.modules if name.startswith('kedit')]\n",
        saved / kind,
        host.model.config._name_or_path,
        saved / "logits.safetensors",
        TOWER.text,
        LOUVRE,
    )
