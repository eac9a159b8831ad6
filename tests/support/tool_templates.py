"""Chat templates that know tools, each in the style of its family, shortened to what a round trip needs.

The real ones: Qwen2.5-Instruct and Hermes-2-Pro, Llama-3.1-Instruct, Mistral-7B-Instruct-v0.3, Mistral-Small-3.2.
"""

HERMES_TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Return calls within <tool_call></tool_call> tags.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{%- if message.content %}
{{ message.content }}
{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- set call = tool_call.function %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
""".strip()

LLAMA_TEMPLATE = """
{%- if tools %}<|start_header_id|>system<|end_header_id|>
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}Respond in the format {"name": function name, "parameters": its arguments}.<|eot_id|>
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif message.role == "tool" %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}
""".strip()

_MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}CALLS
{%- elif message.role == "tool" %}
{%- if message.tool_call_id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
{%- endif %}[TOOL_RESULTS]{"content": {{ message.content | tojson }}}[/TOOL_RESULTS]
{%- elif message.role == "user" %}[INST]{{ message.content }}[/INST]
{%- else %}{{ message.content }}</s>
{%- endif %}
{%- endfor %}
""".strip()

MISTRAL_TEMPLATE = _MISTRAL.replace(
    "CALLS",
    """[TOOL_CALLS][
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("Tool call IDs should have 9 characters!") }}{% endif %}
{{- call.function | tojson }}{{ ", " if not loop.last }}
{%- endfor %}]</s>""",
)

MISTRAL_ARGS_TEMPLATE = _MISTRAL.replace(
    "CALLS",
    """
{%- for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}</s>""",
)
