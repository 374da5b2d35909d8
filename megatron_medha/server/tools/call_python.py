"""Reading one call of a tool as Python, which arrives in pieces."""

from __future__ import annotations

import ast

from megatron_medha.server.tools.call_readers import ToolCallReader, ToolCallSink
from megatron_medha.server.tools.json_text import dump


class PythonCallReader(ToolCallReader):
    """One call as Python writes it: name(key=value, ...)."""

    def __init__(self, calls: ToolCallSink, *, before: str = "") -> None:
        super().__init__(calls, before)
        self._text = ""
        self._num_read = 0
        self._depth = 0
        self._quote = ""  # of the string it is in
        self._is_escaped = False

    def push(self, text: str) -> str:
        """Take a piece; what comes after the call is returned."""
        self._text += text
        for place in range(self._num_read, len(self._text)):
            if self._ends_with(self._text[place]):
                self._end(self._text[: place + 1])
                return self._text[place + 1 :]
        self._num_read = len(self._text)
        return ""

    def give_up(self, *, is_cut: bool) -> None:
        """The text ends here."""
        self._be_text(self._text)

    def _ends_with(self, char: str) -> bool:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            return self._depth == 0
        return False

    def _end(self, text: str) -> None:
        try:
            name, arguments = _parse_python(text)
            if not self._calls.accepts(name, has_arguments=False):
                raise ValueError(name)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            self._be_text(text)
            return
        self.is_done = True
        self._begin(name)
        self._send(arguments)


def _parse_python(text: str) -> tuple[str, str]:
    """Name and arguments of a call as JSON; ValueError where it is none."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
        raise ValueError("no call with named arguments")
    arguments = {one.arg: ast.literal_eval(_JsonNames().visit(one.value)) for one in call.keywords}
    return ast.unparse(call.func), dump(arguments)


class _JsonNames(ast.NodeTransformer):
    """JSON's names for what Python calls otherwise."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The constant, if it is one."""
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node
