"""Settings: file, then environment, then flags; a mistake in any of them is named."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon import config
from daemon.config import Config, Resume, parse_duration
from daemon.errors import ConfigError

SHOWN = Path(__file__).resolve().parents[2] / "configs" / "modeld.toml"
DEFAULTS: dict[str, dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(Config()))
KEYS = [(section, key) for section, keys in DEFAULTS.items() for key in keys]


@pytest.fixture
def file(tmp_path: Path):
    """Write a config file: `file("[server]…")` returns its path."""
    path = tmp_path / "modeld.toml"

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


def load(file: Path | None = None, flags: dict[str, dict[str, Any]] | None = None, **variables):
    return config.load(file, variables, flags or {})


def error(file: Path | None = None, flags: dict[str, dict[str, Any]] | None = None, **variables):
    with pytest.raises(ConfigError) as raised:
        load(file, flags, **variables)
    return raised.value.message


# the file that shows every setting


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_the_shown_value_of_a_setting_is_its_default(section, key):
    assert tomllib.loads(SHOWN.read_text())[section][key] == DEFAULTS[section][key]


def test_nothing_is_shown_that_is_no_setting():
    shown = tomllib.loads(SHOWN.read_text())
    assert [(section, key) for section, keys in shown.items() for key in keys] == KEYS


def test_the_shown_file_changes_nothing():
    assert load(SHOWN) == load() == Config()


# mistakes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[sever]\nlisten = []", "sever"),
        ("[server]\nlisten_on = []", "listen_on"),
        ("listen = []", "listen"),
        ("server = 3", "server"),
        ('[models]\nslots = "two"', "models.slots"),
        ("[models]\nslots = 1.5", "models.slots"),
        ('[server]\nlisten = "127.0.0.1:1000"', "server.listen"),
        ("[server]\nlisten = [1000]", "server.listen"),
        ("[memory]\nlimit = []", "memory.limit"),
        ('[memory]\nlimit = "lots"', "memory.limit"),
        ('[memory]\nreserve = "2 gibibytes"', "memory.reserve"),
        ("[memory]\nlimit = -1", "memory.limit"),
        ("[models]\nslots = -1", "models.slots"),
        ("[models]\ncontext_length = -1", "models.context_length"),
        ("[models]\nqueue_limit = 0", "models.queue_limit"),
        ("[models]\nload_timeout_s = 0", "models.load_timeout_s"),
        ('[models]\nkeep_alive = "soon"', "models.keep_alive"),
        ('[models]\nresume = "maybe"', "models.resume"),
        ('[models]\nresume_limit = "lots"', "models.resume_limit"),
        ("[models]\nmax_run_s = -1", "models.max_run_s"),
        ("[memory]\nwait_s = -1", "memory.wait_s"),
        ('[memory]\nwatermark = "low"', "memory.watermark"),
        ("[downloads]\nmax_active = 0", "downloads.max_active"),
        ('[downloads]\noffline = "perhaps"', "downloads.offline"),
        ('[server]\nlog_level = "loud"', "server.log_level"),
    ],
)
def test_a_mistake_in_the_file_is_named(file, text, names):
    assert names in error(file(text))


@pytest.mark.parametrize("text", ["[sever]", "[server]\nlisten_on = []", "[models]\nslots = 'x'"])
def test_the_file_of_a_mistake_is_named(file, text):
    path = file(text)
    assert str(path) in error(path)


def test_a_file_that_is_not_toml_is_refused_with_the_place(file):
    message = error(file("[server]\nlisten = = []"))
    assert "is not TOML" in message and "line 2" in message


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "modeld.toml"
    path.write_bytes(b"\xff\xfe")
    assert "is not TOML" in error(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    missing = tmp_path / "missing.toml"
    assert str(missing) in error(missing) and "No such file" in error(missing)


# the environment


@pytest.mark.parametrize(
    ("variable", "text", "section", "key", "value"),
    [
        ("MODELD_SERVER_LISTEN", "127.0.0.1:1000", "server", "listen", ("127.0.0.1:1000",)),
        (
            "MODELD_SERVER_LISTEN",
            "127.0.0.1:1000,unix:/run/m.sock",
            "server",
            "listen",
            ("127.0.0.1:1000", "unix:/run/m.sock"),
        ),
        (
            "MODELD_SERVER_ALLOWED_ORIGINS",
            "http://a,http://b",
            "server",
            "allowed_origins",
            ("http://a", "http://b"),
        ),
        ("MODELD_SERVER_LOG_LEVEL", "debug", "server", "log_level", "debug"),
        ("MODELD_MODELS_SLOTS", "4", "models", "slots", 4),
        ("MODELD_MODELS_LOAD_TIMEOUT_S", "30", "models", "load_timeout_s", 30),
        ("MODELD_DOWNLOADS_OFFLINE", "true", "downloads", "offline", True),
        ("MODELD_DOWNLOADS_OFFLINE", "1", "downloads", "offline", True),
        ("MODELD_DOWNLOADS_OFFLINE", "false", "downloads", "offline", False),
        ("MODELD_DOWNLOADS_OFFLINE", "0", "downloads", "offline", False),
        ("MODELD_MEMORY_LIMIT", "3GiB", "memory", "limit", "3GiB"),
    ],
)
def test_a_variable_sets_its_setting(variable, text, section, key, value):
    assert getattr(getattr(load(**{variable: text}), section), key) == value


def test_a_limit_in_plain_bytes_may_come_from_the_environment():
    assert load(MODELD_MEMORY_LIMIT="1000000").memory.limit_bytes() == 1_000_000


def test_every_setting_can_be_set_by_a_variable():
    texts = {tuple: "a", int: "7", str: "warning", Resume: "keep"}
    sizes = {"limit", "reserve", "watermark", "resume_limit"}
    for section, key in KEYS:
        default = getattr(getattr(Config(), section), key)
        if isinstance(default, bool):
            text = str(not default).lower()
        else:
            text = "1GiB" if key in sizes else "7" if key == "keep_alive" else texts[type(default)]
        changed = getattr(getattr(load(**{f"MODELD_{section}_{key}".upper(): text}), section), key)
        assert changed != default, (section, key)


def test_an_empty_variable_is_an_empty_list(file):
    path = file('[server]\nlisten = ["127.0.0.1:1000"]')
    assert load(path, MODELD_SERVER_LISTEN="").server.listen == ()


def test_spaces_around_the_commas_of_a_list_do_not_count():
    listen = load(MODELD_SERVER_LISTEN="127.0.0.1:1000, unix:/run/m.sock").server.listen
    assert listen == ("127.0.0.1:1000", "unix:/run/m.sock")


def test_an_unknown_key_of_a_section_is_refused_by_the_variable_s_name():
    message = error(MODELD_SERVER_NOPE="1")
    assert "MODELD_SERVER_NOPE" in message and "[server]" in message


@pytest.mark.parametrize(
    ("variable", "text", "names"),
    [
        ("MODELD_MODELS_SLOTS", "two", "models.slots"),
        ("MODELD_DOWNLOADS_OFFLINE", "perhaps", "downloads.offline"),
        ("MODELD_MEMORY_LIMIT", "lots", "memory.limit"),
    ],
)
def test_a_wrong_value_in_the_environment_is_named(variable, text, names):
    assert names in error(**{variable: text})


def test_other_variables_are_none_of_our_business():
    others = {"MODELD_HOST": "127.0.0.1:1", "SERVER_LISTEN": "x", "modeld_server_listen": "y"}
    assert load(**others) == Config()


def test_hf_endpoint_is_honoured(file):
    path = file('[downloads]\nhub_endpoint = "http://file"')
    assert load(HF_ENDPOINT="http://hub").downloads.hub_endpoint == "http://hub"
    assert load(path, HF_ENDPOINT="http://hub").downloads.hub_endpoint == "http://hub"
    assert load(path, HF_ENDPOINT="").downloads.hub_endpoint == "http://file"
    both = load(HF_ENDPOINT="http://hub", MODELD_DOWNLOADS_HUB_ENDPOINT="http://ours")
    assert both.downloads.hub_endpoint == "http://ours"


# precedence


def test_flags_beat_the_environment_which_beats_the_file(file):
    path = file('[models]\nslots = 1\nqueue_limit = 2\nbackend = "file"')
    flags = {"models": {"slots": 3}}
    models = load(path, flags, MODELD_MODELS_SLOTS="2", MODELD_MODELS_QUEUE_LIMIT="4").models
    assert (models.slots, models.queue_limit, models.backend) == (3, 4, "file")
    assert models.load_timeout_s == Config().models.load_timeout_s


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("1KiB", 1024),
        ("2 MiB", 2 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("1TiB", 1024**4),
        ("1.5 GB", 1_500_000_000),
        ("10KB", 10_000),
        (" 7MB ", 7_000_000),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text, size):
    assert config.parse_size(text, "k") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "2 gib",
        "2G",
        "2Ki",
        "-1",
        "-1GiB",
        "1e9",
        "0x10",
        "1,5GiB",
        "2GiB2",
        "2PiB",
        "nan",
        "²GiB",
    ],
)
def test_what_is_no_size_is_refused_with_the_key_and_an_example(text):
    with pytest.raises(ConfigError, match=r"memory\.limit.*2GiB"):
        config.parse_size(text, "memory.limit")


def test_no_limit_is_none_and_a_limit_of_0_is_0():
    assert load().memory.limit_bytes() is None
    assert load(MODELD_MEMORY_LIMIT="0").memory.limit_bytes() == 0
    assert load().memory.reserve_bytes() is None
    assert load(MODELD_MEMORY_RESERVE="2GiB").memory.reserve_bytes() == 2 * 1024**3


# durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (300, 300), ("300", 300), (1.5, 1.5), ("5m", 300), ("1h30m", 5400), ("10s", 10),
        ("1.5h", 5400), ("250ms", 0.25), ("0", 0), (0, 0), ("0s", 0), (-1, math.inf),
        ("-1", math.inf), ("-1m", math.inf), ("1h0m0.5s", 3600.5),
    ],
)  # fmt: skip
def test_durations_are_seconds_or_what_ollama_writes(text, seconds):
    assert parse_duration(text, "keep_alive") == seconds


@pytest.mark.parametrize("text", ["", "m", "5 m", "5x", "1m5", "nan", "inf", "1e3", "five", "--1"])
def test_what_is_no_duration_is_named(text):
    with pytest.raises(ConfigError, match="keep_alive"):
        parse_duration(text, "keep_alive")


# where the file is


def test_the_user_s_file_is_found_and_none_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    system = Path("/etc/modeld/modeld.toml")
    assert config.default_file() == (system if system.is_file() else None)
    mine = tmp_path / "modeld" / "modeld.toml"
    mine.parent.mkdir()
    mine.touch()
    assert config.default_file() == mine
