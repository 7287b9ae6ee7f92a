"""Chat templates in the style of well-known reasoning models."""

from __future__ import annotations

# The model opens the reasoning; it stays after the last message of the user; `enable_thinking` closes it.
QWEN = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}
{{- '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}
{%- else %}
{%- set said = m.content %}
{%- set thought = '' %}
{%- if m.reasoning_content is defined and m.reasoning_content is not none %}
{%- set thought = m.reasoning_content %}
{%- elif '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|start|>assistant\n' }}
{%- if loop.index0 > ns.last and thought %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- said.lstrip('\n') + '<|end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# The prompt opens the reasoning, whatever the variables. The template knows no `reasoning_content`.
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|start|>' + said + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + ':' + m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|><think>\\n' }}{% endif %}"
)

# The prompt opens or closes the reasoning, and all of it stays.
KEEPS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '').strip('\\n') + '</think>' + m.content.lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n<think>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '</think>' }}{% endif %}{% endif %}"
)

# Another pair of markers, which the model writes itself; earlier reasoning is dropped.
BRACKETS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ' ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}{# [THINK]...[/THINK] #}"
)

ALL = {"qwen": QWEN, "r1": R1, "keeps": KEEPS, "brackets": BRACKETS}
