"""Prints what a project needs at run time: its dependencies and those of the extras that are named.

Usage: requirements.py PYPROJECT [EXTRA ...]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extras = [line for name in sys.argv[2:] for line in project["optional-dependencies"][name]]
print(*project["dependencies"], *extras, sep="\n")
