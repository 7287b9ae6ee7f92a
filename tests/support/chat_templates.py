"""Chat templates from the Hugging Face hub, with the peculiarity of each."""

# ruff: noqa: E501
from __future__ import annotations

from dsmoe_local.engine.prompts.choice import BUILT_IN

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}{{- message.content }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
DEEPSEEK_R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
    "{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜>' + message['content']}}{%- set ns.is_output_first = false %}"
    "{%- else %}{{'\\n' + message['content']}}{%- endif %}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

HUB = {
    **BUILT_IN,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "llama3.1": LLAMA31,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "mistral3": MISTRAL3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "deepseek-r1": DEEPSEEK_R1,
    "qwen3": QWEN3,
}
ODD = {
    "counts": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}:",
    "backwards": "{% for m in messages | reverse %}{{ m.role }}{{ m.content }}{% endfor %}:",
    "first and last": "{{ messages[0].content }}{{ messages[-1].content }}:",
    "looks behind": "{% for m in messages %}{{ loop.previtem.role }}>{{ m.content }}{% endfor %}:",
    "looks ahead": "{% for m in messages %}{{ m.content }}{{ loop.nextitem.role }};{% endfor %}:",
    "says what changes": "{% for m in messages %}{% if loop.changed(m.role) %}[{{ m.role }}]{% endif %}"
    "{{ loop.cycle('a', 'b') }}{{ loop.index }}{{ m.content }}{% endfor %}:",
    "counts down": "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}:",
    "numbers users": "{% set n = namespace(u=0, l=[]) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set n.u = n.u + 1 %}{% set n.l = n.l + [n.u] %}{% endif %}<{{ n.u }}>{{ m.content }}{% endfor %}{{ n.l }}:",
    "keeps a message": "{% set n = namespace(m=none) %}{% for m in messages %}{{ n.m.role }}|{{ m.content }}"
    "{% set n.m = m %}{% endfor %}{{ n.m.role }}:",
    "keeps the loop": "{% set n = namespace(l=none) %}{% for m in messages %}{{ n.l.index }}{{ m.content }}"
    "{% set n.l = loop %}{% endfor %}{{ n.l.index }}:",
    "takes from an iterator": "{% set i = range(99) | map('string') %}{% for m in messages %}{{ i | first }}"
    "{{ m.content }}{% endfor %}{{ i | first }}:",
    "joins": "{% set j = joiner('+') %}{% for m in messages %}{{ j() }}{{ m.content }}{% endfor %}{{ j() }}:",
    "cycles": "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{{ m.content }}{% endfor %}:",
    "macro": "{% macro t(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ t(m) }}"
    "{% endfor %}{% call t({'role': 'assistant', 'content': ''}) %}{% endcall %}",
    "two loops": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% break %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}{% endif %}"
    "{% endfor %}assistant:",
    "skips": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{% endfor %}:",
    "else": "{% for m in messages %}{{ m.content }}{% else %}nothing{% endfor %}:",
    "breaks off": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}:",
    "last three": "{% for m in messages[-3:] %}{{ m.content }}{% endfor %}:",
    "first three": "{% for m in messages[:3] %}{{ m.content }}{% endfor %}:",
    "every other": "{% for m in messages[::2] %}{{ m.content }}{% endfor %}:",
    "from the third": "{% for m in messages[2:] %}{{ loop.index0 }}{{ m.content }}{% endfor %}:",
    "shouts": "{% for m in messages %}{{ m.content | upper }}{% endfor %}:",
    "cuts": "{% for m in messages %}{{ m.content[:5] }}{% endfor %}:",
    "splits over turns": "{% set n = namespace(r='') %}{% for m in messages %}{{ n.r }}{{ m.content[:7] }}"
    "{% set n.r = m.content[7:] %}{% endfor %}{{ n.r }}:",
    "says it twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}:",
    "says the first again": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}:",
    "json": "{{ messages | tojson }}:",
    "text": "{{ messages }}:",
    "methods": "{{ messages.count(messages[0]) }}{% for m in messages %}{{ m.content }}{% endfor %}:",
    "adds": "{% for m in messages + [{'role': 'x', 'content': ''}] %}{{ m.content }}{% endfor %}:",
    "is it": "{% if messages is sequence and messages is iterable and messages %}{% for m in messages %}"
    "{{ m.content }}{% endfor %}{% endif %}{% if messages is mapping or messages is string %}no{% endif %}:",
    "compares": "{% if messages == [] %}none{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}:",
    "in a block": "{% block b %}{% for m in messages %}{{ m.content }}{% endfor %}{% endblock %}:",
    "in a with": "{% with x = messages %}{% for m in x %}{{ m.content }}{% endfor %}{% endwith %}:",
    "in a set": "{% set x %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ x }}:",
    "in a loop": "{% for i in range(2) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}:",
    "shadows": "{% for m in messages %}{% set messages = [1] %}{{ messages | length }}{{ m.content }}{% endfor %}"
    "{{ messages[0].role }}:",
    "pairs": "{% for m in messages | batch(2) %}{% for n in m %}{{ n.content }}{% endfor %};{% endfor %}:",
    "users only": "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
    "empty contents": "{% for m in messages %}{% if m.content %}[{{ m.content }}]{% else %}-{% endif %}{% endfor %}:",
    "depends on the first": "{% for m in messages %}{{ messages[0].role }}{{ m.content }}{% endfor %}:",
    "depends on the third": "{% for m in messages %}{{ messages[2].role }}{{ m.content }}{% endfor %}:",
    "index in a namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% if messages[n.i + 1] is defined %}"
    "{{ messages[n.i + 1].role }}{% endif %}{{ m.content }}{% set n.i = n.i + 1 %}{% endfor %}:",
}
ALL = HUB | ODD
