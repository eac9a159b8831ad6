"""Other people's clients against the routes: run for real by `make test-clients`, and their requests replayed always.

`programs/` use one client each and know nothing of ottava but its address; they run in an environment of their own
(`requirements.txt`). What they sent is in `recorded/`, so that every run of the tests replays it.
"""
