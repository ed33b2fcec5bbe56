"""A prompt format of ours as the Jinja template that transformers' processors render."""

from __future__ import annotations

import json

from cobra.text.prompt import IMAGE_TAG, PromptFormat
from cobra.text.tokenizer import END_OF_TEXT

# The image comes first wherever it stands in the conversation, as in training. Texts that follow each other, such as a
# system's and a user's, are one message of several lines. The last user's turn ends where the answer begins.
_TEMPLATE = """\
{%- set count = namespace(images=0, turns=0) -%}
{%- set said = namespace(texts=[]) -%}
{%- for message in messages if message.content is not string -%}
  {%- for part in message.content if part.type == "image" -%}{%- set count.images = count.images + 1 -%}{%- endfor -%}
  {%- for part in message.content if part.type not in ["image", "text"] -%}
    {{- raise_exception("Cobra reads images and text, no " ~ part.type ~ ".") -}}
  {%- endfor -%}
{%- endfor -%}
{%- if count.images > 1 -%}{{- raise_exception("Cobra reads one image per conversation.") -}}{%- endif -%}
{%- if count.images -%}{{- IMAGE -}}{%- endif -%}
{%- macro question() -%}
  {{- (BETWEEN if count.turns else "") ~ BEFORE ~ (said.texts | join("\\n") | replace(IMAGE, "") | trim) ~ AFTER -}}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.content is string -%}
    {%- set text = message.content -%}
  {%- else -%}
    {%- set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join("") -%}
  {%- endif -%}
  {%- if message.role == "assistant" -%}
    {{- question() ~ ((text | replace(IMAGE, "") | trim) or " ") ~ END -}}
    {%- set said.texts = [] -%}
    {%- set count.turns = count.turns + 1 -%}
  {%- else -%}
    {%- set said.texts = said.texts + [text] -%}
  {%- endif -%}
{%- endfor -%}
{%- if said.texts -%}{{- question() -}}{%- endif -%}
"""


def chat_template(prompt: PromptFormat) -> str:
    """Return the template that renders conversations as `prompt` does, with `<image>` at the front if there is one."""
    strings = {
        "IMAGE": IMAGE_TAG,
        "BEFORE": prompt.before,
        "AFTER": prompt.after,
        "BETWEEN": prompt.between,
        "END": END_OF_TEXT,
    }
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in strings.items()) + _TEMPLATE
