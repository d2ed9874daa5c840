"""Templates of Ollama's API, rendered as Go's text/template would."""

from __future__ import annotations

import pytest

from daemon.api.ollama.templates import render
from daemon.errors import InvalidRequest

VALUES = {"System": "Be kind.", "Prompt": "Hello", "Suffix": ""}
CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""


def test_a_template_as_models_have_them():
    assert render(CHATML, VALUES) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, {"Prompt": "Hello"}).startswith("<|im_start|>user\nHello")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("", ""),
        ("as it is { } %", "as it is { } %"),
        ("{{.Prompt}}!", "Hello!"),
        ("a \n {{- .Prompt -}} \n b", "aHellob"),
        ("a {{ .Prompt }} b", "a Hello b"),
        ("{{ if .Suffix }}x{{ else }}y{{ end }}", "y"),
        ("{{ if .Suffix }}x{{ else if .System }}y{{ else }}z{{ end }}", "y"),
        ("{{ if .Prompt }}x{{ else if .System }}y{{ else }}z{{ end }}", "x"),
        ("{{ if .Suffix }}{{ if .Prompt }}x{{ else }}y{{ end }}{{ else }}z{{ end }}", "z"),
        ("{{ if not .Suffix }}x{{ end }}{{ if not .Prompt }}y{{ end }}", "x"),
        ("{{ if and .System .Prompt }}x{{ end }}{{ if and .System .Suffix }}y{{ end }}", "x"),
        ("{{ if or .Suffix .Prompt }}x{{ end }}{{ if or .Suffix .Suffix }}y{{ end }}", "x"),
        ("a{{/* {{ .Prompt }} a comment */}}b{{- /* another */ -}} c", "abc"),
        ("{{ .Prompt }}{{ .Response }} and {{ nothing of it }}", "Hello"),
        ("{{ if .Suffix }}{{ .Response }}{{ end }}{{ .Prompt }}", "Hello"),
        ("{{ .Prompt }}<PRE>{{ .Suffix }}<SUF>", "Hello<PRE><SUF>"),
    ],
)
def test_the_language(template, prompt):
    assert render(template, VALUES) == prompt


def test_values_are_not_read_as_templates():
    assert render("{{ .Prompt }}", {"Prompt": "{{ .System }}", "System": "x"}) == "{{ .System }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ range .Messages }}{{ .Content }}{{ end }}",
        "{{ .Tools }}",
        "{{ .prompt }}",
        "{{ Prompt }}",
        "{{ }}",
        "{{",
        "{{ .Prompt",
        "{{ if .Prompt }}x",
        "{{ if }}x{{ end }}",
        "{{ if eq .Prompt .System }}x{{ end }}",
        "{{ if and .Prompt }}x{{ end }}",
        "x{{ end }}",
        "{{ else }}",
        "{{ if .Prompt }}x{{ else }}y{{ else }}z{{ end }}",
        "{{ if .Suffix }}{{ .Nothing }}{{ end }}",
        "{{ .Prompt | printf }}",
        "{{" * 30_000,
        "{{ - " * 15_000,
    ],
)
def test_what_is_not_understood_is_refused(template):
    with pytest.raises(InvalidRequest, match=r"^template: .*it may have \.System") as caught:
        render(template, VALUES)
    assert caught.value.param == "template"
