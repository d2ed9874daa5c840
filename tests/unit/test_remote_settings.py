"""Upstreams in the settings: what is taken, what is refused, and that no key is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.contract import REASONING_EFFORTS, ChatRequest, Sampling, Upstream
from backends.remote import bodies
from daemon import config, sources
from daemon.config import Config, Remote
from daemon.errors import ConfigError, InvalidRequest

KEY = "sk-secret-0123456789"
WORK = '[remote.work]\nurl = "https://host:8000"\n'


@pytest.fixture
def load(tmp_path: Path):
    """`load(toml, **environment)` returns the settings."""

    def load(text: str = "", **environment: str) -> Config:
        path = tmp_path / "modeld.toml"
        path.write_text(text)
        return config.load(path, environment, {})

    return load


def test_there_are_none_by_default(load):
    assert load().remote == {}


def test_an_upstream_has_its_defaults(load):
    assert load(WORK).remote == {"work": Remote(url="https://host:8000")}
    assert load(WORK).remote["work"].upstream("m") == Upstream(url="https://host:8000", model="m")


def test_all_of_it_can_be_set(load):
    text = (
        f'[remote.work]\nurl = "http://h"\napi_key = "{KEY}"\nconnect_timeout_s = 1\n'
        'read_timeout_s = 2.5\nmodels = ["a/b", "c"]'
    )
    work = load(text).remote["work"]
    assert work.upstream("m") == Upstream(
        url="http://h", model="m", api_key=KEY, connect_timeout_s=1.0, read_timeout_s=2.5
    )
    assert work.allows("a/b") and not work.allows("a")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://host", "https://host"),
        ("https://host/", "https://host"),
        ("https://host/v1", "https://host"),
        ("https://host/v1/", "https://host"),
        ("http://[::1]:8000/openai/v1", "http://[::1]:8000/openai"),
    ],
)
def test_a_url_may_end_in_v1(load, url, base):
    assert load(f'[remote.work]\nurl = "{url}"').remote["work"].url == base


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://host:99999",
        "http://[::1",
        "http://ho st",
        "http://hóst",
        "http://me:hidden-word@host",
        "http://host/?key=hidden-word",
        "http://host/#hidden-word",
    ],
)
def test_a_bad_url_is_refused_by_its_key_and_not_shown(load, url):
    with pytest.raises(ConfigError, match=r"remote\.work\.url") as raised:
        load(f'[remote.work]\nurl = "{url}"')
    assert "hidden-word" not in raised.value.message


@pytest.mark.parametrize("name", ["Work", "a_b", "-a", "a.b", "", "hf", "package", "remote", "é"])
def test_a_bad_name_is_refused(load, name):
    with pytest.raises(ConfigError, match="a name is"):
        load(f'[remote."{name}"]\nurl = "http://host"')


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("connect_timeout_s = 0", "remote.work.connect_timeout_s"),
        ("read_timeout_s = -1", "remote.work.read_timeout_s"),
        ("read_timeout_s = inf", "remote.work.read_timeout_s"),
        ("read_timeout_s = nan", "remote.work.read_timeout_s"),
        ('models = "a"', "models"),
        ("colour = 1", "colour"),
        ("api_key = 5", "api_key"),
        ('api_key = "two words"', "remote.work.api_key"),
        ('api_key = "line\\nbreak"', "remote.work.api_key"),
        ('api_key = "schlüssel"', "remote.work.api_key"),
        ('api_key_file = "/no/such/file"', "remote.work.api_key_file"),
    ],
)
def test_a_mistake_is_named(load, line, names):
    with pytest.raises(ConfigError) as raised:
        load(WORK + line)
    assert names in raised.value.message
    assert "two words" not in raised.value.message and "schl" not in raised.value.message


def test_a_key_may_be_in_a_file(load, tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert load(f'{WORK}api_key_file = "{file}"').remote["work"].upstream("m").api_key == KEY


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe"])
def test_a_file_without_a_key_is_refused(load, tmp_path, content):
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"remote\.work\.api_key_file"):
        load(f'{WORK}api_key_file = "{file}"')


def test_a_key_and_a_file_are_one_too_many(load, tmp_path):
    with pytest.raises(ConfigError, match="not both") as raised:
        load(f'{WORK}api_key = "{KEY}"\napi_key_file = "{tmp_path}"')
    assert KEY not in raised.value.message


def test_a_variable_sets_a_key(load):
    assert load(WORK, MODELD_REMOTE_WORK_API_KEY=KEY).remote["work"].api_key == KEY
    assert load(WORK, MODELD_REMOTE_WORK_MODELS="a, b").remote["work"].models == ("a", "b")


def test_a_whole_upstream_may_come_from_the_environment(load):
    variables = {"MODELD_REMOTE_MY_BOX_URL": "http://h", "MODELD_REMOTE_MY_BOX_READ_TIMEOUT_S": "9"}
    assert load("", **variables).remote == {"my-box": Remote(url="http://h", read_timeout_s=9.0)}


@pytest.mark.parametrize("variable", ["MODELD_REMOTE_WORK_COLOUR", "MODELD_REMOTE_URL"])
def test_a_wrong_variable_is_named(load, variable):
    with pytest.raises(ConfigError, match=variable) as raised:
        load(WORK, **{variable: KEY})
    assert KEY not in raised.value.message


def test_a_key_is_not_in_the_text_of_settings(load):
    settings = load(f'{WORK}api_key = "{KEY}"')
    assert KEY not in f"{settings!r} {settings} {settings.remote}"
    assert KEY not in repr(settings.remote["work"].upstream("m"))


# sources


def test_a_cloud_model_has_a_source_that_can_be_read_back():
    source = sources.RemoteSource(upstream="work", model="org/m:1@x y")
    assert sources.parse_remote(str(source)) == source


def test_a_cloud_model_cannot_be_added_by_hand():
    assert sources.is_source("remote:work/m")
    with pytest.raises(InvalidRequest, match=r"\[remote.NAME\]"):
        sources.parse("remote:work/m")


# what an upstream is asked


def test_only_what_was_set_is_sent_under_its_usual_name():
    sampling = Sampling(
        max_tokens=5,
        temperature=0.0,
        top_k=1,
        stop=("a",),
        ignore_eos=True,
        logprobs=0,
        logit_bias={7: -1.0},
        json_schema={"type": "object"},
    )
    body = bodies.chat(ChatRequest(messages=(), sampling=sampling), "m")
    del body["model"], body["messages"], body["stream"], body["stream_options"]
    assert body == {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_k": 1,
        "stop": ["a"],
        "ignore_eos": True,
        "logprobs": True,
        "logit_bias": {"7": -1.0},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}},
        },
    }


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", None),
        ("none", "none"),
        ("required", "required"),
        ("function", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tools_and_their_choice_are_sent(choice, sent):
    tool = {"type": "function", "function": {"name": "f"}}
    request = ChatRequest(messages=(), tools=(tool,), tool_choice=choice, tool_name="f")
    body = bodies.chat(request, "m")
    assert body["tools"] == [tool] and body["parallel_tool_calls"] is False
    assert body.get("tool_choice") == sent


@pytest.mark.parametrize("effort", [None, *REASONING_EFFORTS])
def test_how_much_to_think_is_passed_on(effort):
    body = bodies.chat(ChatRequest(messages=(), reasoning_effort=effort), "m")
    assert body.get("reasoning_effort") == effort and ("reasoning_effort" in body) is bool(effort)


def test_any_json_is_asked_for_by_its_own_name():
    request = ChatRequest(messages=(), sampling=Sampling(json_schema={}))
    assert bodies.chat(request, "m")["response_format"] == {"type": "json_object"}
