"""The model behind the web: loaded, given its memory, checked, exchanged."""
