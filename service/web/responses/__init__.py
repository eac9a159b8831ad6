"""OpenAI's Responses API, translated to and from a chat."""
