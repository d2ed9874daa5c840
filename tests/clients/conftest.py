"""What the tests of client libraries share: one daemon with a model of each kind."""

from __future__ import annotations

from collections.abc import Iterator

import gguf_models
import onnx_files
import pytest
from running import RunningDaemon

# A template of the kind that models have which think before they answer.
THINKING_TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set reasoning = message.reasoning_content if message.reasoning_content is defined else '' %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{{- message.content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

MODELS = ("letters", "minilm", "seeing", "thinking")


@pytest.fixture(scope="session")
def furnished_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon with the sample model, and others.

    `minilm` is an embedder; `letters` says random ones. `seeing` is the sample with an image
    encoder, whose weights are random; `thinking` is the sample with a template for models that
    think, on xllamacpp, which tells their thoughts apart.
    """
    home = tmp_path_factory.mktemp("furnished")
    daemon = RunningDaemon(home)
    daemon.start()
    try:
        daemon.download()
        for name in MODELS:
            (home / name).mkdir()
        onnx_files.embedder(home / "minilm")
        for name in ("seeing", "thinking"):
            (home / name / "model.gguf").hardlink_to(gguf_models.smollm2())
        gguf_models.image_encoder(home / "seeing")
        gguf_models.tiny_llama(home / "letters")
        thinks = {"chat_template": THINKING_TEMPLATE, "backend": "xllamacpp"}
        for name in MODELS:
            body = {"source": f"{home / name}/", "unique": name}
            body |= thinks if name == "thinking" else {}
            daemon.json("POST", "/modeld/v1/models", body)
            daemon.download(name)
        yield daemon
    finally:
        daemon.stop()
