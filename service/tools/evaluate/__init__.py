"""`ottava evaluate`: what schemes cost in quality, and what they bring."""
