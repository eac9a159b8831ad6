"""openai's Responses API: plain, streamed, tools and back, a forced call, structured output."""

import sys

import openai
from pydantic import BaseModel


class City(BaseModel):
    city: str
    degrees: int


client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
said = client.responses.create(model="fake", input="Hi", instructions="Be brief.", metadata={"run": "1"})
assert said.output_text == "Hello."
assert said.usage.total_tokens > 0

events = list(client.responses.create(model="fake", input=[{"role": "user", "content": "Hi"}], stream=True))
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello."
assert events[-1].type == "response.completed"
assert [event.sequence_number for event in events] == list(range(len(events)))

tools = [
    {
        "type": "function",
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]
asked = [{"role": "user", "content": "Hi"}]
for choice in ("auto", "required", {"type": "function", "name": "weather"}):
    with client.responses.stream(model="fake", input=asked, tools=tools, tool_choice=choice) as stream:
        response = stream.get_final_response()
    (call,) = response.output
    assert call.parsed_arguments == {"city": "Bonn"}
asked += [*response.output, {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
back = client.responses.create(model="fake", input=asked, tools=tools)
assert back.output_text == "It is 21 degrees in Bonn."

parsed = client.responses.parse(model="fake", input="Hi", text_format=City)
assert parsed.output_parsed == City(city="Bonn", degrees=21)

refused = None
try:
    client.responses.retrieve(said.id)
except openai.NotFoundError as error:
    refused = error
assert "stores no answers" in refused.message
