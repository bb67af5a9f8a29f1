"""What an endpoint does wrong costs a pause or a sentence, and the key stays where it is."""

import json
import logging
import socket
import sys
from itertools import pairwise

import pytest
from kedit_judge.metric import rephrase

from kedit_core import EditCase, EditRequest, Probe, SettingError, discover
from kedit_core.ask import Continue, Text
from kedit_core.named import create

KEY = "sk-very-secret-0123456789"
CASE = EditCase(
    request=EditRequest(prompt="a", target_new="b"),
    probes=(Probe(kind="rephrase", prompt="q", expected=("b",)),),
)
SAID = {Continue("q", 50, "task"): Text("q", "b", ())}
SOON = {"retry-after-ms": "1"}


def judged(url, **settings):
    return rephrase(**{"url": url, "model": "j", **settings}).score(CASE, {}, SAID)[""].value


def refused(url, **settings):
    """The one sentence or two that the user sees."""
    with pytest.raises(SettingError) as caught:
        judged(url, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- trying again ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_busy_or_broken_endpoint_is_asked_again(status, stub):
    stub.plan = [(status, "{}", SOON), (status, "{}", SOON)]

    assert judged(stub.url) == 1
    assert stub.calls == 3


def test_pauses_grow(stub):
    stub.plan = [(429, "{}", {})] * 3

    judged(stub.url)

    first, _, third = (b - a for a, b in pairwise(stub.times))
    assert 0.3 < first < third  # half a second and two, each up to a quarter shorter


def test_silent_endpoint_is_asked_again(stub):
    stub.plan = [stub.HANG]

    assert judged(stub.url, timeout=2) == 1
    assert stub.calls == 2


def test_endpoint_that_stays_silent_is_given_up(stub):
    stub.plan = [stub.HANG, stub.HANG]

    message = refused(stub.url, timeout=1, retries=1)

    assert message.startswith(f"The judge at {stub.url} was asked 2 times and said nothing within")
    assert stub.calls == 2


def test_endpoint_that_stays_busy_is_given_up_with_its_reason(stub):
    stub.plan = [(429, '{"error": {"message": "Quota\\nused up."}}', SOON)] * 3

    message = refused(stub.url, retries=2)

    assert message == f"The judge at {stub.url} fails with status 429: Quota used up."
    assert stub.calls == 3


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_told_without_the_key(status, stub, monkeypatch):
    monkeypatch.setenv("KEDIT_JUDGE_KEY", KEY)
    stub.plan = [(status, json.dumps({"error": {"message": f"Wrong key {KEY[:7]}***"}}), {})]

    message = refused(stub.url)

    assert message == (
        f"The judge at {stub.url} refuses the key in KEDIT_JUDGE_KEY (status {status})."
    )
    assert stub.calls == 1


def test_missing_key_is_told(stub):
    stub.plan = [(401, "{}", {})]

    assert refused(stub.url) == f"The judge at {stub.url} wants a key. Set KEDIT_JUDGE_KEY."


def test_unknown_model_is_told(stub):
    stub.plan = [(404, '{"error": {"code": "model_not_found"}}', {})]

    assert "knows no model 'gtp-4', or its url is wrong" in refused(stub.url, model="gtp-4")
    assert stub.calls == 1


def test_wrong_path_is_told(stub):
    assert "ends before /chat/completions" in refused(stub.url + "/chat/completions")


def test_other_refusal_is_told_with_its_reason_and_without_the_key(stub, monkeypatch):
    monkeypatch.setenv("KEDIT_JUDGE_KEY", KEY)
    stub.plan = [(400, json.dumps({"error": {"message": f"No temperature 0 for {KEY}."}}), {})]

    message = refused(stub.url)

    assert message.endswith("fails with status 400: No temperature 0 for ….")


def test_nobody_there_is_told():
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"

        assert refused(url, retries=0).startswith(f"The judge at {url} cannot be reached.")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("<html>Welcome</html>", "text/html"),
        ("not { json", "application/json"),
        ("[]", "application/json"),
        ("null", "application/json"),
        ('{"error": "no"}', "application/json"),
        ('{"choices": []}', "application/json"),
        ('{"choices": [{}]}', "application/json"),
        ('{"choices": ["A"]}', "application/json"),
        ('{"choices": [{"message": {"content": ["A"]}}]}', "application/json"),
    ],
)
def test_what_is_no_chat_completion_is_told(body, kind, stub):
    stub.plan = [(200, body, {"Content-Type": kind})]

    assert "answers, but not with a chat completion" in refused(stub.url)


def test_empty_reply_is_unparseable(stub):
    stub.say = lambda prompt: None

    scores = rephrase(url=stub.url, model="j").score(CASE, {}, SAID)

    assert scores["unparseable"].value == 1
    assert "" not in scores


# -- the key ---------------------------------------------------------------------------------


def test_key_goes_to_the_endpoint_and_nowhere_else(stub, monkeypatch, caplog, cache):
    monkeypatch.setenv("KEDIT_JUDGE_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    stub.plan = [(500, "{}", SOON)]
    metric = rephrase(url=stub.url, model="j", price_in=1, price_out=1)

    metric.score(CASE, {}, SAID)
    metric.combine({})

    assert [h["authorization"] for h in stub.headers] == [f"Bearer {KEY}"] * 2
    assert caplog.records
    objects = (metric, metric.judge, metric.judge.endpoint, *vars(metric.judge.endpoint).values())
    written = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert written
    assert KEY not in caplog.text + repr(objects) + str(written)


def test_key_is_in_no_error_and_no_traceback(stub, monkeypatch, caplog):
    monkeypatch.setenv("KEDIT_JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    stub.plan = [(401, json.dumps({"error": {"message": KEY}}), {})]
    try:
        judged(stub.url)
    except SettingError:
        logging.getLogger("test").exception("as with --debug")

    assert "as with --debug" in caplog.text
    assert KEY not in caplog.text


def test_keys_of_other_programs_are_not_sent(stub, monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", f"foreign-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: foreign-header")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/foreign")

    judged(stub.url)

    (headers,) = stub.headers
    assert "foreign" not in str(headers)
    assert "authorization" not in headers


def test_key_is_no_setting(stub):
    with pytest.raises(SettingError, match="has no setting 'key'"):
        create(discover().metric("efficacy/judge@1"), {"url": stub.url, "model": "j", "key": "x"})


@pytest.mark.parametrize("key", ["sk-schlüssel", "sk-a\nb"])
def test_key_that_cannot_be_sent_is_told_at_once_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("KEDIT_JUDGE_KEY", key)
    with pytest.raises(SettingError, match="KEDIT_JUDGE_KEY holds characters") as caught:
        rephrase(url="http://localhost/v1", model="j")

    assert key not in str(caught.value)


# -- settings --------------------------------------------------------------------------------


def test_url_and_model_come_from_the_environment(stub, monkeypatch):
    monkeypatch.setenv("KEDIT_JUDGE_URL", stub.url + "/")
    monkeypatch.setenv("KEDIT_JUDGE_MODEL", "from-environment")

    rephrase().score(CASE, {}, SAID)
    rephrase(model="given").score(CASE, {}, SAID)

    assert [body["model"] for body in stub.bodies] == ["from-environment", "given"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"url": ""}, "give url=https://HOST/v1, or set KEDIT_JUDGE_URL"),
        ({"model": ""}, "give model=NAME, or set KEDIT_JUDGE_MODEL"),
        ({"url": "localhost:8000/v1"}, "must look like https://HOST/v1"),
        ({"url": "http://"}, "must look like https://HOST/v1"),
        ({"url": "http://[1/v1"}, "must look like https://HOST/v1"),
        ({"temperature": -1}, "temperature must be a number from 0 on, not -1"),
        ({"temperature": "cold"}, "temperature must be a number from 0 on, not 'cold'"),
        ({"workers": 0}, "workers must be a whole number from 1 on, not 0"),
        ({"workers": 1.5}, "workers must be a whole number from 1 on, not 1.5"),
        ({"timeout": 0}, "timeout must be a number from 0.001 on, not 0"),
        ({"timeout": float("nan")}, "timeout must be a number"),
        ({"retries": -1}, "retries must be a whole number from 0 on, not -1"),
        ({"price_in": 1}, "price_in and price_out belong together"),
        ({"price_in": 1, "price_out": "much"}, "price_out must be a number from 0 on, not 'much'"),
    ],
)
def test_wrong_setting_is_told_before_anything_is_asked(settings, sentence):
    with pytest.raises(SettingError) as caught:
        rephrase(**{"url": "http://localhost/v1", "model": "j", **settings})

    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"https://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://h/#{KEY}", KEY]
)
def test_secret_in_the_address_is_refused_and_not_shown(url, monkeypatch):
    monkeypatch.setenv("KEDIT_JUDGE_URL", url)
    with pytest.raises(SettingError, match="must look like") as caught:
        rephrase(model="j")

    assert KEY not in str(caught.value)


def test_missing_package_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)

    with pytest.raises(SettingError, match="pip install openai"):
        rephrase(url="http://localhost/v1", model="j")
