"""What a request accepts, what it refuses in which words, and files of requests."""

import json

import pydantic
import pytest

from kedit_core import EditCase, EditRequest, Probe, RequestError, read_requests

GOOD = {"prompt": "The {} is in", "subject": "Eiffel Tower", "target_new": "Rome"}


def problem(**fields):
    with pytest.raises(RequestError) as caught:
        EditRequest(**fields)
    return str(caught.value)


# -- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["The {} is in", "The Eiffel Tower is in"])
def test_subject_is_found_by_slot_or_verbatim(prompt):
    request = EditRequest(prompt=prompt, subject="Eiffel Tower", target_new="Rome")

    assert request.text == "The Eiffel Tower is in"
    assert (request.before, request.after) == ("The ", " is in")
    start, end = request.subject_span
    assert request.text[start:end] == "Eiffel Tower"


def test_slot_decides_where_the_subject_also_stands_elsewhere():
    request = EditRequest(prompt="Paris, said {}, is", subject="Paris", target_new="small")

    assert request.text == "Paris, said Paris, is"
    assert request.subject_span == (12, 17)


@pytest.mark.parametrize("prompt", ["f(x) = {x}; {} is", "f(x) = {x}; S is", "{0} { } {{ S is"])
def test_other_braces_are_text(prompt):
    request = EditRequest(prompt=prompt, subject="S", target_new="{}")

    assert request.text == prompt.replace("{}", "S")
    assert request.target_new == "{}"


def test_subject_with_braces_is_put_in_as_it_is():
    request = EditRequest(prompt="The set {} is", subject="{1, 2}", target_new="finite")

    assert request.text == "The set {1, 2} is"


def test_request_without_subject_has_no_span():
    request = EditRequest(prompt="Water boils at", target_new="50 degrees")

    assert (request.before, request.after, request.text) == ("Water boils at", "", "Water boils at")
    with pytest.raises(RequestError, match=r"'Water boils at' has no subject"):
        _ = request.subject_span


def test_missing_subject_is_named_with_the_prompt_and_the_way_out():
    message = problem(prompt="The tower is in", subject="Eiffel Tower", target_new="Rome")

    assert message == (
        "The subject 'Eiffel Tower' is not in the prompt 'The tower is in'. Write it there "
        "exactly, or put {} in its place."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "Rome is Rome", "subject": "Rome"}, "stands 2 times in the prompt"),
        ({"prompt": "{} and {}"}, "{} stands 2 times in the prompt '{} and {}'"),
        ({"subject": None}, "no subject is given to put there"),
        ({"subject": ""}, "The subject of the prompt 'The {} is in' is empty"),
        ({"subject": "  "}, "The subject of the prompt 'The {} is in' is empty"),
        ({"target_new": ""}, "The target of the prompt 'The {} is in' is empty"),
        ({"target_new": " \n"}, "The target of the prompt 'The {} is in' is empty"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": None}, "'prompt' of the edit request: Input should be a valid string."),
        ({"target_new": 1889}, "'target_new' of the edit request: Input should be a valid string."),
        ({"subjct": "x"}, "Unknown key 'subjct' in the edit request. Did you mean 'subject'?"),
        ({"zzz": "x"}, "Unknown key 'zzz' in the edit request. Known: ground_truth, id, prompt"),
    ],
)
def test_refusal_says_what_is_wrong(changes, words):
    assert words in problem(**{**GOOD, **changes})


def test_lacking_key_is_named():
    assert problem(prompt="Water boils at") == "The edit request lacks 'target_new'."


@pytest.mark.parametrize(
    ("given", "kept"), [("Paris", ("Paris",)), (["a", "b"], ("a", "b")), (None, ()), ([], ())]
)
def test_ground_truth_is_one_or_several(given, kept):
    assert EditRequest(**GOOD, ground_truth=given).ground_truth == kept


def test_id_depends_on_the_content_alone():
    first, again = EditRequest(**GOOD), EditRequest(**GOOD, ground_truth="Paris")
    other = EditRequest(**{**GOOD, "target_new": "Lyon"})

    assert first.id == again.id
    assert first.id != other.id
    assert EditRequest(**GOOD, id="mine").id == "mine"


def test_request_is_frozen_and_survives_json():
    request = EditRequest(**GOOD, ground_truth=("Paris", "France"))

    with pytest.raises(pydantic.ValidationError):
        request.target_new = "Lyon"
    assert EditRequest(**json.loads(request.model_dump_json())) == request


# -- probes and cases ----------------------------------------------------------------------------


def test_case_is_built_from_plain_data():
    case = EditCase(
        request=GOOD,
        probes=[{"kind": "rephrase", "prompt": "Where is it?", "expected": "Rome"}],
        meta={"source": "made"},
    )

    assert case.request == EditRequest(**GOOD)
    assert case.probes == (Probe(kind="rephrase", prompt="Where is it?", expected=("Rome",)),)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Probe(prompt="x"), "The probe lacks 'kind'."),
        (lambda: Probe(kind="rewrite", prompt="x", expectd="y"), "Did you mean 'expected'?"),
        (lambda: EditCase(request={**GOOD, "subject": "X", "prompt": "a"}), "is not in the prompt"),
        (lambda: EditCase(request=GOOD, probes=[{"kind": "x"}]), "The probe lacks 'prompt'."),
        (lambda: EditCase(request=GOOD, prober=[]), "Unknown key 'prober' in the case."),
    ],
)
def test_malformed_probe_or_case_is_one_sentence(build, words):
    with pytest.raises(RequestError) as caught:
        build()

    assert words in str(caught.value)


# -- files ---------------------------------------------------------------------------------------

RECORDS = [GOOD, {"prompt": "Water 🌊 boils\u2028at", "target_new": "50/2 °C"}]
YAML = """\
# facts
- prompt: The {} is in
  subject: Eiffel Tower
  target_new: Rome
- {prompt: "Water 🌊 boils\\u2028at", target_new: 50/2 °C}
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("facts.yaml", YAML),
        ("facts.yml", YAML),
        ("facts.json", json.dumps(RECORDS)),
        ("facts.json", json.dumps(RECORDS, indent="\t", ensure_ascii=False)),
        ("facts.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)),
        ("facts.JSONL", "\r\n".join(json.dumps(r) for r in RECORDS)),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
def test_same_requests_in_every_format(tmp_path, name, text, mark):
    file = tmp_path / name
    file.write_bytes((mark + text).encode())

    assert read_requests(file) == [EditRequest(**record) for record in RECORDS]


def test_yaml_alias_is_followed(tmp_path):
    file = tmp_path / "facts.yaml"
    file.write_text("- &one {prompt: x, target_new: y}\n- *one\n")

    first, second = read_requests(file)
    assert first == second


BAD_LINE_3 = {
    "bad.yaml": "- {prompt: x, target_new: y}\n\n- {prompt: x, targt_new: y}\n",
    "bad.json": '[{"prompt": "x, [\\n]", "target_new": "y"},\n\n'
    ' {"prompt": "x", "targt_new": "y"}]',
    "bad.jsonl": '{"prompt": "x", "target_new": "y"}\n\n{"prompt": "x", "targt_new": "y"}\n',
}


@pytest.mark.parametrize("name", BAD_LINE_3)
def test_bad_record_is_named_by_its_line(tmp_path, name):
    file = tmp_path / name
    file.write_text(BAD_LINE_3[name])

    with pytest.raises(RequestError) as caught:
        read_requests(file)
    assert str(caught.value) == (
        f"{file}, line 3: Unknown key 'targt_new' in the edit request. Did you mean 'target_new'?"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", b"", "is no list of requests"),
        ("a.yaml", b"prompt: x\ntarget_new: y\n", "is no list of requests"),
        ("a.yaml", b"just words", "is no list of requests"),
        ("a.json", b'{"prompt": "x"}', "line 1: The edit request lacks 'target_new'"),
        ("a.json", b"- prompt: x\n", "line 1: neither JSON nor a table"),
        ("a.yaml", b"[]", "holds no request"),
        ("a.json", b"[]", "holds no request"),
        ("a.jsonl", b"\n\n", "line 1: the file is empty"),
        ("a.yaml", b"- a\n- b\n", "line 1: a request is a mapping, not 'a'"),
        ("a.json", b'[\n"a"]', 'line 2: a record is a mapping, not "a"'),
        ("a.jsonl", b"[1]\n", "line 1: a record is a mapping, not 1"),
        ("a.yaml", b"- {1: x}\n", "line 1: the keys of a request are words"),
        ("a.yaml", b"- prompt: x\n- prompt: [\n", "line 3: not YAML"),
        ("a.yaml", b"\n- {prompt: x, target_new: !!python/object:a.B c}", "line 2: not YAML"),
        ("a.yaml", b"- {prompt: x, target_new: 2024-13-45}", "line 1: not YAML (month"),
        ("a.yaml", b"- {[1, 2]: x}", "line 1: not YAML"),
        ("a.yaml", b"- &a {prompt: *a}", "line 1: not YAML"),
        ("a.yaml", b"- prompt: \x00", "not YAML"),
        ("a.json", b'[\n{"prompt": }]', "line 2: not JSON"),
        ("a.json", b"[\n", "line 2: the file ends in the middle"),
        ("a.json", b"", "line 1: the file is empty"),
        ("a.jsonl", b"{}{}\n", "line 1: The edit request lacks 'prompt'"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "line 1: not UTF-8"),
        ("a.yaml", "- prompt: é".encode("latin-1"), "cannot be read: 'utf-8' codec"),
    ],
)
def test_malformed_file_is_one_sentence(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)

    with pytest.raises(RequestError) as caught:
        read_requests(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_names_one_request_of_a_file(tmp_path):
    file = tmp_path / "facts.yaml"
    file.write_text("".join(f"- {json.dumps(r | {'id': 'a'})}\n" for r in RECORDS), "utf-8")
    with pytest.raises(RequestError, match=r"facts\.yaml, line 2: the id 'a' stands at an earlier"):
        read_requests(file)
    file.write_text(f"- {json.dumps(RECORDS[0])}\n" * 2, "utf-8")  # told when they are written
    assert len(read_requests(file)) == 2


def test_missing_file_and_folder_are_named(tmp_path):
    for name in ("none.yaml", "none.jsonl"):
        with pytest.raises(RequestError, match=f"The requests file .*{name} does not exist"):
            read_requests(tmp_path / name)
    with pytest.raises(RequestError, match="cannot be read"):
        read_requests(tmp_path)
