"""The table of settings in docs/serving.md, written from the fields of `Settings`.

python -m tests.support.settings_table      # writes it into the page
"""

from __future__ import annotations

from pathlib import Path

from pydantic.fields import FieldInfo

from service.settings import Settings
from service.settings.fields import choices_of, is_list, is_secret, panels

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->"


def settings_table() -> str:
    """One table a panel of the help, in the order of the fields."""
    fields = Settings.model_fields
    of_panel = panels(fields)
    parts: list[str] = []
    for title in dict.fromkeys(of_panel.values()):
        rows = [_row(name, field) for name, field in fields.items() if of_panel[name] == title]
        parts += [f"\n**{title}**\n", "| setting | default | what it does |", "|---|---|---|", *rows]
    return "\n".join(parts) + "\n\n"


def written_table() -> str:
    """What the page holds now."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def _row(name: str, field: FieldInfo) -> str:
    words = choices_of(field)
    among = f" One of {', '.join(words)}." if words and not is_list(field) else ""
    secret = " A variable or a key of the file, never a flag." if is_secret(field) else ""
    text = f"{field.description}{among}{secret}".replace("|", "\\|").replace("*", "\\*")
    return f"| `{name}` | {_default(name, field)} | {text} |"


def _default(name: str, field: FieldInfo) -> str:
    if name == "cache_dir":
        # The real one depends on the machine.
        return "`~/.cache/ottava`"
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + settings_table() + END + rest.split(END)[1], encoding="utf-8")
