"""LlamaIndex's OpenAILike: chat, stream, tools."""

import sys

# This file has the client's own name.
sys.path.pop(0)

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def weather(city: str) -> str:
    """Weather of a city"""
    return "21 degrees"


llm = OpenAILike(
    model="fake",
    api_base=sys.argv[1],
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    max_retries=0,
)
user = ChatMessage(role="user", content="Hi")
assert llm.chat([user]).message.content == "Hello."
assert "".join(part.delta for part in llm.stream_chat([user])) == "Hello."
tool = FunctionTool.from_defaults(weather)
said = llm.chat_with_tools([tool], user_msg="Hi")
(call,) = llm.get_tool_calls_from_response(said)
assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Bonn"})
answer = ChatMessage(role="tool", content="21 degrees", additional_kwargs={"tool_call_id": call.tool_id})
back = llm.chat_with_tools([tool], chat_history=[user, said.message, answer])
assert back.message.content == "It is 21 degrees in Bonn."
assert llm.complete("Hi").text == "Hello."
