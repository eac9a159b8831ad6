"""pydantic-ai: text, a tool, output by call and by schema, and a stream."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    city: str
    degrees: int


model = OpenAIChatModel("fake", provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
assert Agent(model).run_sync("Hi").output == "Hello."
agent = Agent(model, system_prompt="Be brief.")


@agent.tool_plain
def weather(city: str) -> str:
    """Weather of a city"""
    assert city == "Bonn"
    return "21 degrees"


assert agent.run_sync("Hi").output == "It is 21 degrees in Bonn."
assert Agent(model, output_type=City).run_sync("Hi").output == City(city="Bonn", degrees=21)
assert Agent(model, output_type=NativeOutput(City)).run_sync("Hi").output == City(city="Bonn", degrees=21)


async def streamed() -> None:
    async with agent.run_stream("Hi") as result:
        assert await result.get_output() == "It is 21 degrees in Bonn."


asyncio.run(streamed())
