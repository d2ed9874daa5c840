"""How chat templates are told whether, and how much, a model is to think before it answers. Pure.

There is no one name for it: templates read what they know of these variables and no other.
"""

from __future__ import annotations

import json
import re
from typing import Any

from backends.contract import ChatRequest

# What templates of models that think have in them: the switches, the marks around a thought, or the
# field of earlier messages that has one.
_SIGNS = (
    "enable_thinking",
    "reasoning_effort",
    "reasoning_content",
    "<think>",
    "</think>",
    "[THINK]",
    "<|START_THINKING|>",
    "<|channel|>analysis",
)
_FEW = frozenset({"none", "minimal"})
# The last thing that a template writes, if that opens a thought; statements alone may follow.
_OPENS = re.compile(r"""<think>(?:\\n|\s)*['"]\s*[-+]?\}\}(?=(?:\s|\{%[^{}]*%\})*+\Z)""")
_SWITCH = (
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '</think>\\n\\n' }}{%- endif %}"
)


def can_think(chat_template: str) -> bool:
    """Say whether a model with this chat template can think before it answers."""
    return any(sign in chat_template for sign in _SIGNS)


def variables(request: ChatRequest) -> dict[str, Any]:
    """Return what a chat template is to know of the request's `reasoning_effort`; {} leaves it be.

    `enable_thinking` is the switch of Qwen3, GLM and SmolLM3, `thinking` that of Granite and of
    DeepSeek V3.1; `reasoning_effort` is gpt-oss's, which knows low, medium and high alone, and
    thinks always.
    """
    effort = request.reasoning_effort
    if effort is None:
        return {}
    thinks = effort not in _FEW
    level = effort if thinks else "low"
    return {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": level}


def settings(request: ChatRequest) -> str:
    """Return the same as the beginning of a template, for engines that take no variables."""
    told = variables(request)
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in told.items())


def switchable(chat_template: str) -> str:
    """Return a template; one that always opens a thought can be told to close it at once.

    So the models that think whatever they are asked (DeepSeek R1, QwQ) answer directly.
    """
    if "enable_thinking" in chat_template:
        return chat_template
    return _OPENS.sub(lambda opening: opening[0] + _SWITCH, chat_template)
