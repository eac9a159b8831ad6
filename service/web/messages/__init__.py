"""Anthropic's Messages API, translated to and from a chat."""
