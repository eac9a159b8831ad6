"""Many replicas of the application behind one address, placed and watched by Ray Serve.

Only `deployment.py` imports ray, and only `upstream.py` imports aiohttp; both come with the extra `cluster`.
"""
