"""OpenAI's routes: their bodies, plans, choices and answers."""
