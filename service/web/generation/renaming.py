"""Errors of a request that was translated from another format, with the names that its client knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from service.errors import RequestError


@contextmanager
def named_as_sent(names: Mapping[str, str]) -> Iterator[None]:
    """Rename fields in errors that leave the block.

    A path below a renamed field is left out, since places in what was translated are not those that were sent.

    Args:
        names: name of a field after the translation -> its name in the request.
    """
    try:
        yield
    except RequestError as error:
        quoted = re.compile(rf"`({'|'.join(map(re.escape, names))})(?:\.[\w.]+)?`")
        error.message = quoted.sub(lambda found: f"`{names[found[1]]}`", error.message)
        error.args = (error.message,)
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise
