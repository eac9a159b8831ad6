"""`ottava bench`: sends load to a server over HTTP, and measures what its clients see."""
