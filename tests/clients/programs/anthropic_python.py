"""anthropic: a message, streamed, tools and back, a forced call, tokens counted, an error."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="none", max_retries=0)
user = {"role": "user", "content": "Hi"}
ask = {"model": "fake", "max_tokens": 1024}
said = client.messages.create(messages=[user], system="Be brief.", **ask)
assert said.content[0].text == "Hello."
assert (said.stop_reason, said.usage.output_tokens > 0) == ("end_turn", True)

with client.messages.stream(messages=[user], **ask) as stream:
    assert "".join(stream.text_stream) == "Hello."
    assert stream.get_final_message().usage.output_tokens == said.usage.output_tokens

tools = [
    {
        "name": "weather",
        "description": "Weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
for choice in ("auto", "any", "tool"):
    named = {"name": "weather"} if choice == "tool" else {}
    with client.messages.stream(messages=[user], tools=tools, tool_choice={"type": choice, **named}, **ask) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert (call.name, call.input, message.stop_reason) == ("weather", {"city": "Bonn"}, "tool_use")
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}]}
turns = [user, {"role": "assistant", "content": message.content}, result]
back = client.messages.create(messages=turns, tools=tools, **ask)
assert back.content[0].text == "It is 21 degrees in Bonn."

# It has no arguments of its own for these any more.
sampling = {"temperature": 0.5, "top_k": 5, "top_p": 0.9}
stopped = client.messages.create(messages=[user], stop_sequences=["lo"], extra_body=sampling, **ask)
assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("Hel", "stop_sequence", "lo")
assert client.messages.count_tokens(model="fake", messages=[user]).input_tokens > 0
refused = None
try:
    client.messages.create(messages=[user], **{**ask, "model": "other"})
except anthropic.NotFoundError as error:
    refused = error
assert refused.body["error"]["type"] == "not_found_error"
