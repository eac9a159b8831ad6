"""The sampling values that a model's generation_config.json recommends."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from service.engine.api import RECOMMENDED
from service.text.chat_template import read_object
from service.web.schemas.bodies import Sampling

logger = logging.getLogger(__name__)


def sampling_defaults(folder: Path) -> dict[str, float]:
    """Name -> value of what the file in a model folder recommends; a value that no request could have is left out.

    `do_sample` is not read: files of models that are meant to be sampled from often lack it.

    Raises:
        UnsupportedModel: the file cannot be read.
    """
    path = folder / "generation_config.json"
    given = read_object(path)
    found = {}
    for name in RECOMMENDED:
        if given.get(name) is None:
            continue
        try:
            found[name] = getattr(Sampling.model_validate({name: given[name]}), name)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            logger.warning("%s: %s is %r, which is left out: %s", path, name, given[name], reason)
    return found
