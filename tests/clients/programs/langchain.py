"""LangChain's ChatOpenAI: invoke, stream, tools and back, structured output by schema and by call."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city and its weather."""

    city: str
    degrees: int


@tool
def weather(city: str) -> str:
    """Weather of a city"""
    return "21 degrees"


llm = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="fake", temperature=0, max_retries=0)
assert llm.invoke("Hi").content == "Hello."
assert "".join(chunk.content for chunk in llm.stream("Hi")) == "Hello."
for is_streamed in (False, True):
    bound = llm.bind_tools([weather])
    asked = [HumanMessage("Hi")]
    if is_streamed:
        parts = list(bound.stream(asked))
        said = parts[0]
        for part in parts[1:]:
            said += part
    else:
        said = bound.invoke(asked)
    assert [(call["name"], call["args"]) for call in said.tool_calls] == [("weather", {"city": "Bonn"})]
    result = ToolMessage(weather.invoke(said.tool_calls[0]["args"]), tool_call_id=said.tool_calls[0]["id"])
    assert bound.invoke([*asked, said, result]).content == "It is 21 degrees in Bonn."
for forced in ("any", "weather"):
    call = llm.bind_tools([weather], tool_choice=forced, parallel_tool_calls=False).invoke("Hi").tool_calls[0]
    assert call["args"] == {"city": "Bonn"}
for method in ("json_schema", "function_calling"):
    assert llm.with_structured_output(City, method=method).invoke("Hi") == City(city="Bonn", degrees=21)
