"""The chat of the Pieces API as the Python SDK's generated calls and models see it.

They are the oracle: each answer and each frame is read by its model, which must know all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import websocket
from pieces_os_client.api.applications_api import ApplicationsApi
from pieces_os_client.api.connector_api import ConnectorApi
from pieces_os_client.api.conversation_api import ConversationApi
from pieces_os_client.api.conversation_message_api import ConversationMessageApi
from pieces_os_client.api.conversation_messages_api import ConversationMessagesApi
from pieces_os_client.api.conversations_api import ConversationsApi
from pieces_os_client.api.models_api import ModelsApi
from pieces_os_client.api.qgpt_api import QGPTApi
from pieces_os_client.api.user_api import UserApi
from pieces_os_client.api_client import ApiClient
from pieces_os_client.configuration import Configuration
from pieces_os_client.exceptions import ApiException
from pieces_os_client.models.flattened_conversation_messages import FlattenedConversationMessages
from pieces_os_client.models.qgpt_question_input import QGPTQuestionInput
from pieces_os_client.models.qgpt_relevance_input import QGPTRelevanceInput
from pieces_os_client.models.qgpt_relevance_input_options import QGPTRelevanceInputOptions
from pieces_os_client.models.qgpt_stream_input import QGPTStreamInput
from pieces_os_client.models.qgpt_stream_output import QGPTStreamOutput
from pieces_os_client.models.relevant_qgpt_seed import RelevantQGPTSeed
from pieces_os_client.models.relevant_qgpt_seeds import RelevantQGPTSeeds
from pieces_os_client.models.seed import Seed
from pieces_os_client.models.seeded_asset import SeededAsset
from pieces_os_client.models.seeded_connector_connection import SeededConnectorConnection
from pieces_os_client.models.seeded_conversation import SeededConversation
from pieces_os_client.models.seeded_format import SeededFormat
from pieces_os_client.models.seeded_fragment import SeededFragment
from pieces_os_client.models.seeded_tracked_application import SeededTrackedApplication
from pieces_os_client.models.streamed_identifiers import StreamedIdentifiers
from pieces_os_client.models.transferable_string import TransferableString
from pieces_os_client.models.user_profile import UserProfile
from pieces_sdk import check_read, check_understood
from running import SAMPLE, RunningDaemon

APIS = (
    ApplicationsApi,
    ConnectorApi,
    ConversationApi,
    ConversationMessageApi,
    ConversationMessagesApi,
    ConversationsApi,
    ModelsApi,
    QGPTApi,
    UserApi,
)
QUESTION = "Where is the Eiffel Tower?"
NOBODY = "00000000-0000-4000-8000-000000000000"
WAIT_S = 60.0


class Sdk:
    """The SDK at one daemon: `sdk("name_of_its_method", …)` returns what it read, after checks."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.client = ApiClient(Configuration(host=daemon.url))
        self.apis = [api(self.client) for api in APIS]
        self.daemon = daemon

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        (api,) = (api for api in self.apis if hasattr(api, method))
        response = getattr(api, f"{method}_with_http_info")(*args, **kwargs)
        check_understood(response)
        return response.data

    def socket(self, path: str) -> websocket.WebSocket:
        return websocket.create_connection(
            self.daemon.url.replace("http", "ws") + path, timeout=WAIT_S
        )

    def model(self) -> str:
        (model,) = (m for m in self("models_snapshot").iterable if m.unique == SAMPLE)
        return str(model.id)


@pytest.fixture
def sdk(sample_daemon: RunningDaemon) -> Iterator[Sdk]:
    sdk = Sdk(sample_daemon)
    try:
        yield sdk
    finally:
        sdk.client.rest_client.pool_manager.clear()


def seed(text: str) -> Seed:
    """A snippet, in all that the SDK wraps it in."""
    fragment = SeededFragment(string=TransferableString(raw=text))
    application = {
        "id": "a",
        "name": "OPEN_SOURCE",
        "version": "1",
        "platform": "LINUX",
        "onboarded": True,
        "privacy": "OPEN",
    }
    asset = SeededAsset.model_construct(
        application=SeededAsset.model_fields["application"].annotation.from_dict(application),
        format=SeededFormat(fragment=fragment),
    )
    return Seed(type="SEEDED_ASSET", asset=asset)


def ask(sdk: Sdk, asked: QGPTStreamInput) -> tuple[str, list[QGPTStreamOutput]]:
    """Ask over a socket of its own; return the text and all frames, each read by the SDK."""
    socket = sdk.socket("/qgpt/stream")
    frames: list[QGPTStreamOutput] = []
    try:
        socket.send(asked.to_json())
        while not frames or frames[-1].status.value == "IN-PROGRESS":
            sent = json.loads(socket.recv())
            frame = QGPTStreamOutput.from_dict(sent)
            check_read(sent, frame)
            frames.append(frame)
    finally:
        socket.close()
    texts = [answer.text for f in frames if f.question for answer in f.question.answers.iterable]
    return "".join(texts), frames


def relevance(query: str, model: str, **fields: Any) -> QGPTRelevanceInput:
    options = QGPTRelevanceInputOptions(question=True)
    return QGPTRelevanceInput(query=query, model=model, options=options, **fields)


def test_an_app_connects_as_the_local_user(sdk: Sdk) -> None:
    application = SeededTrackedApplication(name="OPEN_SOURCE", platform="LINUX", version="1.0.0")
    connected = sdk("connect", SeededConnectorConnection(application=application))
    assert connected.application.name.value == "OPEN_SOURCE"
    assert connected.health.os.version.startswith("12.")
    listed = sdk("applications_snapshot").iterable
    assert connected.application.id in [each.id for each in listed]
    user = sdk("user_snapshot").user
    assert user.id and user.aesthetics.font.size > 0
    socket = sdk.socket("/user/stream")
    sent = json.loads(socket.recv())
    socket.close()
    check_read(sent, UserProfile.from_dict(sent))
    assert sent["id"] == user.id


def test_a_conversation_from_its_first_turn_to_its_end(sdk: Sdk) -> None:
    model = sdk.model()
    changes = sdk.socket("/conversations/stream/identifiers")
    changes.recv()
    _, frames = ask(sdk, QGPTStreamInput(relevance=relevance(QUESTION, model), request="r"))
    assert frames[-1].status.value == "COMPLETED" and {f.request for f in frames} == {"r"}
    key = frames[-1].conversation
    sent = json.loads(changes.recv())
    changes.close()
    told = StreamedIdentifiers.from_dict(sent)
    check_read(sent, told)
    assert told.iterable[0].conversation.id == key

    form = QGPTQuestionInput(query="Why?", model=model, relevant=RelevantQGPTSeeds(iterable=[]))
    _, frames = ask(sdk, QGPTStreamInput(conversation=key, question=form))
    assert frames[-1].conversation == key

    shown = sdk("conversation_get_specific_conversation", key)
    assert (shown.name, shown.type.value, shown.model.id) == (QUESTION, "COPILOT", model)
    assert key in [each.id for each in sdk("conversations_snapshot").iterable]
    assert key in [each.id for each in sdk("conversations_identifiers_snapshot").iterable]
    said = sdk("conversation_specific_conversation_messages", key).iterable
    assert [each.role.value for each in said] == ["USER", "ASSISTANT"] * 2
    assert list(shown.messages.indices) == [each.id for each in said]
    first = sdk("message_specific_message_snapshot", said[0].id)
    assert first.fragment.string.raw == QUESTION and first.conversation.id == key

    shown.name = "renamed"
    assert sdk("conversation_update", conversation=shown).name == "renamed"
    named = sdk("conversation_specific_conversation_rename", key)
    assert named.name == QUESTION
    first.fragment.string.raw = "Where is Big Ben?"
    changed = sdk("message_update_value", conversation_message=first)
    assert changed.fragment.string.raw == "Where is Big Ben?"
    assert sdk("messages_delete_specific_message", said[-1].id) is None
    assert len(sdk("conversation_specific_conversation_messages", key).iterable) == 3
    assert sdk("conversations_delete_specific_conversation", key) is None
    with pytest.raises(ApiException) as gone:
        sdk("conversation_get_specific_conversation", key)
    assert (gone.value.status, gone.value.body) == (410, "conversation was not found.")


def test_a_conversation_is_begun_without_a_question(sdk: Sdk) -> None:
    begun = SeededConversation(type="COPILOT", name="mine")
    shown = sdk("conversations_create_specific_conversation", seeded_conversation=begun)
    assert shown.name == "mine" and shown.messages == FlattenedConversationMessages(
        iterable=[], indices={}
    )
    sdk("conversations_delete_specific_conversation", shown.id)


def test_snippets_go_with_a_question(sdk: Sdk) -> None:
    """An answer knows what they say."""
    model, words = sdk.model(), seed("My name is Zebulon.")
    relevant = RelevantQGPTSeeds(iterable=[RelevantQGPTSeed(seed=words)])
    form = QGPTQuestionInput(query="What is my name?", model=model, relevant=relevant)
    answer = sdk("question", form).answers.iterable[0].text
    assert "Zebulon" in answer
    text, _ = ask(sdk, QGPTStreamInput(question=form))
    assert "Zebulon" in text


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("conversations_delete_specific_conversation", (NOBODY,)),
        ("conversation_specific_conversation_rename", (NOBODY,)),
        ("messages_delete_specific_message", (NOBODY,)),
        (
            "question",
            (QGPTQuestionInput(query="x", model=NOBODY, relevant=RelevantQGPTSeeds(iterable=[])),),
        ),
    ],
)
def test_what_is_not_there_is_an_error_in_words(
    sdk: Sdk, method: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(ApiException) as failed:
        sdk(method, *args)
    assert failed.value.status == 500 and failed.value.body
    assert failed.value.headers["Content-Type"].startswith("text/plain")
