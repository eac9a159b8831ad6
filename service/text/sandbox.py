"""Jinja for templates of untrusted models: nothing unsafe can be called, and steps, time and memory are bounded.

Jinja's own sandbox bounds neither nested loops nor the size of a text. Here each iteration of a loop and each call of a
macro counts as a step, and whatever can make a text or a list larger is charged for the size of its result beforehand.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sized
from functools import wraps
from itertools import chain
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_SIZE = 1 << 25
"""Most characters and list entries that one rendering may make, intermediate ones included."""
MAX_S = 1.0
STEPS_PER_LOOK = 16
"""Steps between two looks at the clock."""

TICK, MADE = "__tick", "__made"
NUMBER = re.compile(r"\d+")
LINE = re.compile(r"\s")
"""Where a filter may break a line or insert blanks."""


class OutOfBudget(Exception):
    """A template took too many steps, too much time or too much memory."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._size = 0
        self._end_s = time.monotonic() + MAX_S

    def step(self) -> None:
        """Count a step. Raises OutOfBudget."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise OutOfBudget(f"it was cut off after {MAX_STEPS} steps")
        if self._num_steps % STEPS_PER_LOOK == 0 and time.monotonic() > self._end_s:
            raise OutOfBudget(f"it was cut off after {MAX_S:g} s")

    def charge(self, size: int) -> None:
        """Count characters or entries that are about to be made. Raises OutOfBudget."""
        self._size += size
        if self._size > MAX_SIZE:
            raise OutOfBudget(f"it was cut off at {MAX_SIZE} characters")
        self.step()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates run within a `Budget`; see `within_budget`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=self._made)
        self._local = threading.local()
        # Makes text of any length.
        del self.globals["lipsum"]
        self.globals[TICK] = self._tick
        self.filters = {name: self._charged(name, function) for name, function in self.filters.items()}
        self.filters[MADE] = self._made

    def within_budget(self, render: Callable[[], str]) -> str:
        """Call render with a fresh budget for its templates.

        Raises:
            OutOfBudget: it is used up.
        """
        self._local.budget = Budget()
        try:
            return render()
        finally:
            del self._local.budget

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = self._charged(name, function)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See Jinja: called instead of the operators in `intercepted_binops`."""
        self._charge(_binop_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (Jinja's signature)
        """See Jinja: calls an object for a template."""
        method = getattr(__obj, "__wrapped__", __obj)
        of = getattr(method, "__self__", None)
        if __obj is not __self._tick:
            __self._charge(_call_size(getattr(method, "__name__", ""), of, (*args, *kwargs.values())))
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Sized().visit(super()._parse(source, name, filename))
        loops, macros, blocks = (tree.find_all(kind) for kind in (nodes.For, nodes.Macro, nodes.CallBlock))
        for node in chain[Any](loops, macros, blocks):
            step = nodes.ExprStmt(nodes.Call(nodes.Name(TICK, "load"), [], [], None, None))
            node.body.insert(0, step.set_lineno(node.lineno))
        tree.set_environment(self)
        return tree

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged before it runs."""

        # Copies Jinja's mark of filters that take the context as well.
        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            self._charge(_call_size(name, given[0] if given else None, (*given[1:], *kwargs.values()), is_filter=True))
            return function(*args, **kwargs)

        return charged

    def _tick(self) -> None:
        budget = getattr(self._local, "budget", None)
        if budget is not None:
            budget.step()

    def _charge(self, size: int) -> None:
        # There is no budget while a template is compiled, which folds constants.
        budget = getattr(self._local, "budget", None) or Budget()
        budget.charge(size)

    def _made(self, value: Any) -> Any:
        """Charge for a text or container that a template has put together, and for what it writes."""
        budget = getattr(self._local, "budget", None)
        if budget is not None:
            budget.charge(len(value) if type(value) is str else _total(value))
        return value


class _Sized(NodeTransformer):
    """Lets the result of each `a ~ b` and each list, tuple and mapping be charged for."""

    def visit_Concat(self, node: nodes.Expr) -> nodes.Filter:  # noqa: N802 (Jinja's names)
        made = nodes.Filter(self.generic_visit(node), MADE, [], [], None, None)
        made.set_lineno(node.lineno)
        return made

    visit_List = visit_Dict = visit_Concat  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        return self.visit_Concat(node) if node.ctx == "load" else node


def _binop_size(operator: str, left: Any, right: Any) -> int:
    """Characters, entries or bits of an operation's result, at least."""
    if operator == "%":
        return _format_size(left, right if isinstance(right, tuple) else (right,))
    if operator == "**":
        return left.bit_length() * max(0, right) if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "+":
        return _total(left) + _total(right)
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    return max((_total(a) * max(0, b) for a, b in ((left, right), (right, left)) if isinstance(b, int)), default=0)


def _call_size(name: str, of: Any, args: tuple[Any, ...], *, is_filter: bool = False) -> int:
    """Characters or entries of the result of a method or filter, at least as far as its arguments enlarge it."""
    if not args and name != "tojson":
        return 0
    largest = max((abs(arg) for arg in args if isinstance(arg, int)), default=0)
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    if name == "replace" and isinstance(of, str) and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        return len(of) + of.count(args[0]) * len(args[1])
    if name == "join":
        return _len(of) * longest if is_filter else _len(of) * max((_len(arg) for arg in args), default=0)
    if name in ("format", "format_map"):
        size = _format_size(of, args)
    elif name in ("expandtabs", "indent", "tojson", "wordwrap"):
        pieces = len(LINE.findall(of)) + 1 if isinstance(of, str) else _total(of)
        size = pieces * max(1, largest, longest)
    elif name == "translate":
        by_char = [_len(value) for arg in args if isinstance(arg, dict) for value in arg.values()]
        size = _len(of) * max(by_char, default=1)
    else:
        size = sum(map(_total, args)) if name == "dict" else largest
    return size


def _format_size(form: Any, args: tuple[Any, ...]) -> int:
    """The widths in a format and those among its arguments."""
    widths = [int(number[:20]) for number in NUMBER.findall(form)] if isinstance(form, str) else []
    return sum(widths) + max((abs(arg) for arg in args if isinstance(arg, int) and "*" in str(form)), default=0)


def _len(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _total(value: Any) -> int:
    """Characters of a text; entries of nested lists and mappings, as often as they would be written.

    Raises:
        OutOfBudget: there are more than MAX_STEPS of them.
    """
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left:
        each = left.pop()
        total += 1
        if isinstance(each, dict):
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            left.extend(each)
        if total + len(left) > MAX_STEPS:
            raise OutOfBudget(f"it was cut off at {MAX_STEPS} entries of a list")
    return total
