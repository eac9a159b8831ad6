"""The OpenAI-compatible routes: bodies, plans, choices and answers."""
