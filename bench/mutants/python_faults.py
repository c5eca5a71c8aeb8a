"""Finds the possible one-line faults of a Python source in its syntax tree.

It skips code that tests need not notice: log lines, messages, raised errors, annotations,
decorators, docstrings, `if TYPE_CHECKING` and `if __name__ == "__main__"`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from deeptalk_edge.bench.mutants.fault import Fault

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
_OPPOSITES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "ceil": "floor",
    "floor": "ceil",
}
_COMMUTATIVE = {"isinstance", "issubclass", "getattr", "min", "max", "minimum", "maximum", "gcd"}
_VARIABLE = (ast.Name, ast.Attribute, ast.Call, ast.BinOp, ast.Subscript)  # swapped in silence
_LOGS = {"log", "logger", "logging", "warnings", "print", "warn"}
_UNNOTICED_KEYWORDS = {"daemon", "help", "indent", "exc_info", "stacklevel", "timeout"}


def python_faults(path: str, text: str) -> list[Fault]:
    """Return all possible faults of `text`, the source of `path`, in the order of its lines."""
    collector = _Collector(path, text)
    collector.visit(ast.parse(text))
    return sorted(set(collector.faults))


class _Collector(ast.NodeVisitor):
    def __init__(self, path: str, text: str) -> None:
        self.faults: list[Fault] = []
        self._path = path
        self._lines = text.split("\n")

    # ---- skipped code

    def visit_Raise(self, node: ast.Raise) -> None: ...
    def visit_Assert(self, node: ast.Assert) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...
    def visit_arg(self, node: ast.arg) -> None: ...
    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in _UNNOTICED_KEYWORDS:
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and _name_of(node.annotation) != "TypeAlias":
            self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if "Protocol" not in {_name_of(base) for base in node.bases}:
            self._visit_all(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        defaults = [each for each in node.args.kw_defaults if each is not None]
        self._visit_all([*node.args.defaults, *defaults])
        if isinstance(node.returns, ast.Constant) and node.returns.value is None:
            self._return_early(node.body)
        self._visit_all(node.body)

    # ---- operators

    def visit_If(self, node: ast.If) -> None:
        names = {_name_of(each) for each in ast.walk(node.test)}
        if names & {"TYPE_CHECKING", "__name__"}:
            return
        if not _only_raises(node.body) or node.orelse:
            self._drop_returns(node.body)
        if not isinstance(node.test, (ast.UnaryOp, ast.Compare)):
            self._wrap("negated condition", node.test, "not (", ")")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name_of(node.func)
        if _LOGS & {_name_of(each) for each in ast.walk(node.func)}:
            return
        if name in _OPPOSITES:
            end = node.func.end_col_offset or 0
            self._replace("opposite function", node.func, end - len(name), end, _OPPOSITES[name])
        if len(node.args) >= 2 and name not in _COMMUTATIVE:
            first, second = node.args[:2]
            if isinstance(first, _VARIABLE) and isinstance(second, _VARIABLE):
                self._swap(first, second)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            self._exchange("comparison", left, right, *_COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        exchange = _ARITHMETIC.get(type(node.op))
        if exchange and not _is_text(node.left) and not _is_text(node.right):
            self._exchange("arithmetic", node.left, node.right, *exchange)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        exchange = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._exchange("and, or", left, right, *exchange)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace("dropped not", node, node.col_offset, node.col_offset + len("not "), "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        end = node.end_col_offset or 0
        if isinstance(value, bool):
            self._replace("constant", node, node.col_offset, end, str(not value))
        elif isinstance(value, int):
            self._replace("constant", node, node.col_offset, end, str(value + 1))
        elif isinstance(value, float) and value:
            self._replace("constant", node, node.col_offset, end, repr(value * 10))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not self._is_log(node.value):
            self._remove(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._remove(node)
        exchange = _ARITHMETIC.get(type(node.op))
        if exchange:
            old, new = exchange
            self._exchange("arithmetic", node.target, node.value, f"{old}=", f"{new}=")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self._remove(node)
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._remove(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._remove(node)

    # ---- recording of changes

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def _is_log(self, call: ast.Call) -> bool:
        return bool(_LOGS & {_name_of(each) for each in ast.walk(call.func)})

    def _return_early(self, body: Sequence[ast.stmt]) -> None:
        for statement in body[:-1]:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                self._whole_line("early return", statement, "return")

    def _drop_returns(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Return):
                self._whole_line("dropped return", statement, "pass")

    def _remove(self, statement: ast.stmt) -> None:
        self._whole_line("removed statement", statement, "pass")

    def _whole_line(self, operator: str, statement: ast.stmt, text: str) -> None:
        start, end = statement.col_offset, statement.end_col_offset or 0
        line = self._lines[statement.lineno - 1].encode()
        if statement.end_lineno == statement.lineno and not line[:start].strip():
            self._replace(operator, statement, start, end, text)

    def _swap(self, first: ast.expr, second: ast.expr) -> None:
        if first.lineno != second.end_lineno:
            return
        line = self._lines[first.lineno - 1].encode()
        start, end = first.col_offset, second.end_col_offset or 0
        one = line[start : first.end_col_offset].decode()
        between = line[first.end_col_offset : second.col_offset].decode()
        two = line[second.col_offset : end].decode()
        if one != two:
            self._replace("swapped arguments", first, start, end, f"{two}{between}{one}")

    def _exchange(self, operator: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the token `old` between two operands by `new`."""
        if left.end_lineno != right.lineno:
            return
        start, end = left.end_col_offset or 0, right.col_offset
        between = self._lines[right.lineno - 1].encode()[start:end].decode()
        pattern = re.escape(old).replace(r"\ ", r"\s+")
        changed, count = re.subn(rf"(?<![\w<>=!*/]){pattern}(?![\w<>=*/])", new, between)
        if count == 1:
            self._replace(operator, right, start, end, changed)

    def _wrap(self, operator: str, node: ast.expr, head: str, tail: str) -> None:
        if node.end_lineno == node.lineno:
            start, end = node.col_offset, node.end_col_offset or 0
            text = self._lines[node.lineno - 1].encode()[start:end].decode()
            self._replace(operator, node, start, end, f"{head}{text}{tail}")

    def _replace(
        self, operator: str, at: ast.expr | ast.stmt, start: int, end: int, text: str
    ) -> None:
        """Replace the bytes [start, end) of the line where `at` begins by `text`."""
        if at.end_lineno != at.lineno and operator not in ("dropped not",):
            return
        before = self._lines[at.lineno - 1]
        line = before.encode()
        after = (line[:start] + text.encode() + line[end:]).decode()
        self.faults.append(
            Fault(path=self._path, line=at.lineno, operator=operator, before=before, after=after)
        )


def _name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def _only_raises(body: Sequence[ast.stmt]) -> bool:
    return all(isinstance(each, ast.Raise) for each in body)
