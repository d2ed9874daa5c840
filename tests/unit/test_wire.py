"""The channel's codec: what is encoded comes back equal, and nothing else is ever a message."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import contract, wire

ARTIFACT = contract.Artifact(
    format="gguf",
    files=(
        contract.ModelFile(
            path="/models/größe 模型.gguf", size_bytes=2**40, mtime_ns=2**60, sha256="0" * 64
        ),
    ),
    architecture="llama",
    parameters=134_515_008,
    quantization="Q4_1",
    context_length=8192,
    weights_bytes=98_362_432,
    chat_template="{{ messages }}\n{% if x %}\u2028{% endif %}",
    metadata={
        "llama.block_count": 30,
        "llama.attention.head_count_kv": [3, 1],
        "llama.rope.freq_base": 10000.5,
        "tokenizer.ggml.add_bos_token": True,
        "general.name": "Tiny",
    },
)
SAVED = contract.SavedConversation(
    name=f"{'0' * 32}.kv", size_bytes=2**40, sha256="f" * 64, tokens=1831
)
MESSAGES = [
    (wire.ToWorker, message)
    for message in (
        wire.Load(
            spec=contract.LoadSpec(
                artifact=ARTIFACT, context_length=4096, slots=4, threads=2, scratch_dir="/tmp/x"
            )
        ),
        wire.Chat(
            id=1,
            request=contract.ChatRequest(
                messages=({"role": "user", "content": "Grüße,\n日本語 🙂"},),
                sampling=contract.Sampling(
                    max_tokens=1, temperature=0.5, seed=2**32 - 2, stop=("\n\n",), ignore_eos=True
                ),
            ),
        ),
        wire.Chat(id=2, request=contract.ChatRequest(messages=())),
        wire.Chat(
            id=2**40,
            request=contract.ChatRequest(
                messages=({"role": "user", "content": [{"type": "text", "text": "x"}]},),
                tools=({"type": "function", "function": {"name": "f"}},),
                tool_choice="function",
                tool_name="f",
                sampling=contract.Sampling(
                    logprobs=3, logit_bias={7: -1.5}, json_schema={"type": "object"}
                ),
            ),
        ),
        wire.Complete(id=3, request=contract.CompleteRequest(prompt="a", suffix="b")),
        wire.Embed(id=4, request=contract.EmbedRequest(inputs=("a", "b"), dimensions=2)),
        wire.Rerank(id=5, request=contract.RerankRequest(query="q", documents=("d",))),
        wire.Classify(id=6, request=contract.ClassifyRequest(inputs=("a",), truncate=True)),
        wire.Count(id=7, request=contract.CountRequest(chat=contract.ChatRequest(messages=()))),
        wire.Load(
            spec=contract.LoadSpec(
                artifact=ARTIFACT,
                context_length=1,
                slots=1,
                threads=1,
                scratch_dir="/tmp/x",
                state_dir="/states/größe",
                conversations=(SAVED,),
            )
        ),
        wire.SaveState(id=8, folder="/states/größe", limit_bytes=2**40),
        wire.Cancel(id=2**53),
        wire.Ping(id=3),
        wire.Shutdown(),
    )
] + [
    (wire.FromWorker, message)
    for message in (
        wire.Hello(pid=7),
        wire.Error(code="engine_error", message="out of slots", id=1),
        wire.Error(code="load_failed", message=""),
        wire.Error(code="context_length_exceeded", message="too long", id=1, tokens=5000),
        wire.StateSaved(id=8, conversations=(SAVED, SAVED)),
        wire.StateSaved(id=8, conversations=()),
        wire.Counted(id=7, result=contract.Count(tokens=2**31)),
        wire.Progress(fraction=0.25),
        wire.Loaded(
            model=contract.LoadedModel(
                tasks=(contract.Task.CHAT, contract.Task.EMBED),
                slots=4,
                context_length=4096,
                engine_version="1.0",
                restored=(SAVED.name,),
            )
        ),
        wire.Delta(id=1, delta=contract.Delta(content="\x00\r\n\u2028🙂")),
        wire.Done(
            id=1,
            result=contract.Done(
                finish_reason="length",
                usage=contract.Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=8),
                timings=contract.Timings(prompt_ms=1.5, predicted_ms=0.25),
            ),
        ),
        wire.Done(id=2, result=contract.Done(finish_reason="cancelled")),
        wire.Delta(
            id=1,
            delta=contract.Delta(
                reasoning="why",
                tool_calls=(contract.ToolCall(index=0, id="c", name="f", arguments="{"),),
                logprobs=(
                    contract.TokenLogprob(
                        token="a",
                        logprob=-0.5,
                        bytes=(97,),
                        top=(contract.TokenLogprob(token="b", logprob=-1.0),),
                    ),
                ),
            ),
        ),
        wire.Embedded(
            id=4,
            result=contract.Embeddings(
                vectors=(b"\x00\x00\x80\x3f", b"\xff" * 4),
                dimensions=1,
                usage=contract.Usage(prompt_tokens=2),
            ),
        ),
        wire.Reranked(id=5, result=contract.Scores(scores=(0.5, -1.25))),
        wire.Classified(id=6, result=contract.Classes(labels=({"good": 0.75},))),
        wire.Pong(id=3),
    )
]
MESSAGES += [
    (
        wire.FromProber,
        wire.Probed(
            probe=contract.Probe(
                backend="x", available=True, version="1", devices=("CPU",), features=("chat",)
            )
        ),
    ),
    (
        wire.FromProber,
        wire.Probed(probe=contract.Probe(backend="x", available=False, reason="not installed")),
    ),
    (
        wire.FromProber,
        wire.Detected(
            hardware=contract.Hardware(
                cpu_model="x",
                physical_cores=1,
                logical_cores=2,
                ram_bytes=3,
                gpus=(contract.Gpu(id="0", vendor="nvidia", name="y", sources={"name": "NVML"}),),
                problems=("z",),
            )
        ),
    ),
]


def name_of(message: Any) -> str:
    return type(message).__name__ if isinstance(message, msgspec.Struct) else ""


@pytest.mark.parametrize(("union", "message"), MESSAGES, ids=name_of)
def test_what_is_encoded_comes_back_equal(union, message):
    line = wire.encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    decoded = wire.Decoder(union).decode(line)
    assert type(decoded) is type(message) and decoded == message


def test_no_message_type_is_left_out_above():
    covered = {type(message) for _, message in MESSAGES}
    own = {cls for cls in wire.Message.__subclasses__() if cls.__module__ == wire.__name__}
    assert covered == own


def test_the_type_of_a_message_is_its_class_in_lower_case():
    assert msgspec.json.decode(wire.encode(wire.Shutdown())) == {"type": "shutdown"}


@given(st.text())
def test_any_text_passes_in_one_line(text):
    line = wire.encode(wire.Delta(id=1, delta=contract.Delta(content=text)))
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert wire.Decoder(wire.FromWorker).decode(line).delta.content == text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"hello there\n", "malformed"),
        (b"\n", "truncated"),
        (b"", "truncated"),
        (b'{"type":"pong","id":1', "truncated"),
        (b'{"type":"pong","id":1}{"type":"pong","id":2}\n', "trailing"),
        (b"null\n", "object"),
        (b'[{"type":"pong","id":1}]\n', "object"),
        (b"{}\n", "type"),
        (b'{"type":"nonsense"}\n', "nonsense"),
        (b'{"type":1}\n', "type"),
        (b'{"type":"pong"}\n', "id"),
        (b'{"type":"pong","id":"1"}\n', "id"),
        (b'{"type":"pong","id":1.5}\n', "id"),
        (b'{"type":"loaded","model":{"tasks":["fly"],"slots":1}}\n', "fly"),
        (b'{"type":"error","code":"\xff\xfe","message":"x"}\n', "utf-8"),
        (b'{"type":"error","code":"\\ud800 ","message":"x"}\n', "surrogate"),
        (b"\x00\x01\x02\n", "malformed"),
    ],
)
def test_a_line_that_is_no_message_is_a_protocol_error_that_shows_it(line, why):
    with pytest.raises(wire.ProtocolError) as error:
        wire.Decoder(wire.FromWorker).decode(line)
    assert why in str(error.value)
    assert repr(line) in str(error.value)


def test_the_error_shows_only_the_beginning_of_a_long_line():
    with pytest.raises(wire.ProtocolError) as error:
        wire.Decoder(wire.FromWorker).decode(b"x" * 1_000_000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("union", [wire.FromWorker, wire.FromProber])
def test_what_the_other_side_says_is_not_taken_from_this_one(union):
    with pytest.raises(wire.ProtocolError):
        wire.Decoder(union).decode(wire.encode(wire.Shutdown()))


def test_nesting_without_end_is_a_protocol_error():
    line = b'{"type":"done","x":' + b"[" * 1_000_000 + b"\n"
    with pytest.raises(wire.ProtocolError):
        wire.Decoder(wire.FromWorker).decode(line)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_do_more_than_raise_a_protocol_error(line):
    try:
        message = wire.Decoder(wire.FromWorker).decode(line)
    except wire.ProtocolError:
        return
    assert isinstance(message, wire.Message)


def test_a_field_that_a_newer_peer_added_is_passed_over():
    line = b'{"type":"pong","id":1,"new":{"a":[1]}}\n'
    assert wire.Decoder(wire.FromWorker).decode(line) == wire.Pong(id=1)


def test_a_line_of_exactly_64_mib_is_sent_and_one_more_byte_is_refused():
    empty = len(wire.encode(wire.Error(code="c", message="")))
    text = "x" * (wire.MAX_LINE_BYTES - empty)
    assert wire.MAX_LINE_BYTES == 64 * 1024 * 1024
    assert len(wire.encode(wire.Error(code="c", message=text))) == wire.MAX_LINE_BYTES
    with pytest.raises(wire.ProtocolError, match=f"{wire.MAX_LINE_BYTES + 1} bytes"):
        wire.encode(wire.Error(code="c", message=text + "x"))


def test_vectors_are_base64_in_the_line():
    message = wire.Embedded(
        id=1, result=contract.Embeddings(vectors=(b"\x00\x00\x80\x3f",), dimensions=1)
    )
    assert msgspec.json.decode(wire.encode(message))["result"]["vectors"] == ["AACAPw=="]


def test_half_a_character_is_no_line():
    with pytest.raises(wire.ProtocolError, match="JSON"):
        wire.encode(wire.Delta(id=1, delta=contract.Delta(content="\ud83d")))
