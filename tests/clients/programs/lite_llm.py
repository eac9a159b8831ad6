"""LiteLLM with the provider `openai`: chat, stream, tools and back."""

import json
import os
import sys

# Otherwise it asks GitHub for prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

litellm.suppress_debug_info = True
ask = {"model": "openai/fake", "api_base": sys.argv[1], "api_key": "none", "num_retries": 0}
user = {"role": "user", "content": "Hi"}
assert litellm.completion(messages=[user], **ask).choices[0].message.content == "Hello."
chunks = list(litellm.completion(messages=[user], stream=True, stream_options={"include_usage": True}, **ask))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello."
assert chunks[-1].usage.completion_tokens > 0
tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
for is_streamed in (False, True):
    said = litellm.completion(messages=[user], tools=tools, stream=is_streamed, **ask)
    if is_streamed:
        said = litellm.stream_chunk_builder(list(said), messages=[user])
    message = said.choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})
    assert said.choices[0].finish_reason == "tool_calls"
    answer = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "21 degrees"}
    back = litellm.completion(messages=[user, message, answer], tools=tools, **ask)
    assert back.choices[0].message.content == "It is 21 degrees in Bonn."
