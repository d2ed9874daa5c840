"""What chat templates are told of thinking."""

from __future__ import annotations

import pytest
from templates import PONDERING

from backends.contract import REASONING_EFFORTS, ChatRequest
from backends.thinking import can_think, settings, switchable, variables

# The ends of templates, as the models that always think have them.
ENDS = (
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n",
    '{%- if add_generation_prompt and not ns.is_tool -%}{{ "<think>" -}}{%- endif -%}',
)


def rendered(template: str, **told) -> str:
    jinja2 = pytest.importorskip("jinja2")
    namespace = {"is_tool": False}
    return jinja2.Template(template).render(add_generation_prompt=True, ns=namespace, **told)


def asking(effort: str | None) -> ChatRequest:
    return ChatRequest(messages=(), reasoning_effort=effort)


def test_each_effort_is_told_in_the_words_of_the_templates():
    assert variables(asking(None)) == {} and settings(asking(None)) == ""
    told = {effort: variables(asking(effort)) for effort in REASONING_EFFORTS}
    assert [effort for effort in told if told[effort]["enable_thinking"]] == [
        "low",
        "medium",
        "high",
    ]
    assert all(each["thinking"] is each["enable_thinking"] for each in told.values())
    levels = [each["reasoning_effort"] for each in told.values()]
    assert levels == ["low", "low", "low", "medium", "high"]
    for effort in REASONING_EFFORTS:
        telling = settings(asking(effort)) + "{{ enable_thinking }} {{ reasoning_effort }}"
        each = told[effort]
        assert rendered(telling) == f"{each['enable_thinking']} {each['reasoning_effort']}"


@pytest.mark.parametrize("end", ENDS)
def test_a_thought_that_is_always_opened_can_be_closed(end):
    template = "Hello" + end
    usual = rendered(template)
    mended = switchable(template)
    assert rendered(mended) == rendered(mended, enable_thinking=True) == usual
    assert rendered(mended, enable_thinking=False) == usual + "</think>\n\n"
    assert switchable(mended) == mended


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ '<|im_start|>assistant\\n' }}",
        "{{ '<think>\\n' + message.reasoning_content }}",
        "{{ '<think>\\n' }}{{ message.content }}",
        "{{ '<think>\\n' }} and more",
        "{{ '<think>\\n' }}{% if enable_thinking %}{% endif %}",
        "{{ '<think>\\n' }}" + "{% " * 100_000,
    ],
)
def test_other_templates_stay_as_they_are(template):
    assert switchable(template) == template


def test_models_that_can_think_are_known_by_their_templates():
    assert can_think(PONDERING) and can_think("{% if enable_thinking %}")
    assert not can_think("") and not can_think("{{ messages }}<|im_start|>assistant")
