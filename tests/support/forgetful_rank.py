"""A rank that can load no weights but those of the start; run as `service.host.ranks.process`."""

from __future__ import annotations

from typing import Never

import torch

from service.host.ranks import process


def _no_memory(*_: object, **__: object) -> Never:
    raise torch.OutOfMemoryError("no memory is left for the new weights")


if __name__ == "__main__":
    vars(process)["checkpoint_part"] = _no_memory
    process.main()
