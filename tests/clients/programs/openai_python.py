"""openai: chat, stream, tools and back, a forced call, structured output, a completion."""

import sys
from typing import Literal

import openai
from pydantic import BaseModel


class City(BaseModel):
    city: str
    degrees: int


client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
model = client.models.list().data[0].id
user = {"role": "user", "content": "Hi"}
said = client.chat.completions.create(model=model, messages=[user], user="u", store=True, metadata={"run": "1"})
assert said.choices[0].message.content == "Hello."
assert said.usage.total_tokens > 0

pieces = client.chat.completions.create(
    model=model, messages=[user], stream=True, stream_options={"include_usage": True}
)
chunks = list(pieces)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello."
assert chunks[-1].usage.completion_tokens > 0

tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]
choice: Literal["auto", "required"]
for choice in ("auto", "required"):
    with client.chat.completions.stream(model=model, messages=[user], tools=tools, tool_choice=choice) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Bonn"}
answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
back = client.chat.completions.create(model=model, messages=[user, message, answer], tools=tools)
assert back.choices[0].message.content == "It is 21 degrees in Bonn."
assert back.choices[0].finish_reason == "stop"

parsed = client.chat.completions.parse(model=model, messages=[user], response_format=City)
assert parsed.choices[0].message.parsed == City(city="Bonn", degrees=21)
assert client.completions.create(model=model, prompt="Hi", max_tokens=8, stop=["x"]).choices[0].text == "Hello."
