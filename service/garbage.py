"""What Python's garbage collector has to look at while a server runs: `settle`."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect garbage once, and leave all that is alive now out of later collections.

    A full collection looks at every object. With torch and transformers imported that takes a quarter of a second, in
    which no thread of this process moves, and 64 streams bring one about every five seconds. What has been loaded
    stays anyway. Called again, as after a reload, it looks at everything once more: what was let go since is freed.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
