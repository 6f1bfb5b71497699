"""What the source of a function does with the attributes of one of its arguments."""

import ast
from collections.abc import Iterator

_ASKING = frozenset({"isinstance", "hasattr", "id", "type", "len"})
_Path = tuple[str, ...]


class Chains:
    """Every chain of attributes, such as ``self.layers[i].weight``, as far as it goes: ("layers", "*", "weight").

    With each comes whether something is written there. Names for parts of it (``fc = self.fc``, ``for layer in
    self.layers``) are followed; what is only asked for (``isinstance(self.fc, ...)``, ``self.bias is None``) is left
    out.
    """

    EACH = "*"
    """In place of the name of a child that is chosen by an index, or one after the other."""

    def __init__(self, function: ast.FunctionDef, argument: str) -> None:
        self.tree = _Constant().visit(function)
        self.names: dict[str, set[_Path]] = {argument: {()}}
        self._passed: set[int] = set()  # parts of longer chains, and what only gives a name
        for _ in range(2):  # a name may stand for a part of another one
            for node in ast.walk(self.tree):
                self._note_names(node)

    def __iter__(self) -> Iterator[tuple[_Path, bool]]:
        asked: set[int] = set()
        written: set[int] = set()
        for node in ast.walk(self.tree):  # outer parts of an expression come before inner ones
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
                asked.update(map(id, node.args))
            elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                asked.add(id(node.left))
            elif isinstance(node, ast.AugAssign):
                written.add(id(node.target))
            if not isinstance(node, (ast.Attribute, ast.Subscript, ast.Name)) or id(node) in self._passed:
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in written:
                continue  # the name stands for something else from now on
            changes = not isinstance(node.ctx, ast.Load) or id(node) in written
            paths = self._paths(node)
            for path in () if id(node) in asked else paths:
                in_place = any(part.endswith("_") and not part.endswith("__") for part in path)
                if path and (len(path) > 1 or not changes):
                    yield path, changes or in_place

    def _paths(self, node: ast.expr) -> set[_Path]:
        """The chains that an expression may be; the parts of it are not looked at again."""
        parts: list[str] = []
        inside: list[int] = []
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            parts.append(node.attr if isinstance(node, ast.Attribute) else self.EACH)
            node = node.value
            inside.append(id(node))
        if not isinstance(node, ast.Name) or node.id not in self.names:
            return set()
        self._passed.update(inside)
        return {(*start, *reversed(parts)) for start in self.names[node.id]}

    def _note_names(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._name(node.targets[0], node.value)
        elif isinstance(node, ast.NamedExpr):
            self._name(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._name_each(node.target, node.iter)

    def _name(self, target: ast.expr, value: ast.expr, each: bool = False) -> None:
        if (
            isinstance(target, ast.Name)
            and isinstance(value, (ast.Attribute, ast.Subscript))
            and (paths := self._paths(value))
        ):
            self._passed.add(id(value))
            end = (self.EACH,) if each else ()
            self.names.setdefault(target.id, set()).update((*path, *end) for path in paths)

    def _name_each(self, target: ast.expr, values: ast.expr) -> None:
        called = values.func.id if isinstance(values, ast.Call) and isinstance(values.func, ast.Name) else ""
        if isinstance(values, ast.Call) and called in ("enumerate", "zip", "reversed") and values.args:
            several = isinstance(target, ast.Tuple) and called != "reversed"
            targets = [*target.elts][-len(values.args) :] if several else [target]  # type: ignore[attr-defined]
            for one, value in zip(targets, values.args, strict=False):
                self._name_each(one, value)
        elif isinstance(values, (ast.Tuple, ast.List)):
            for value in values.elts:
                self._name(target, value)
        else:
            self._name(target, values, each=True)


class _Constant(ast.NodeTransformer):
    """``getattr(self, "fc")`` is ``self.fc``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            value, name = node.args[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                return ast.copy_location(ast.Attribute(value, name.value, ast.Load()), node)
        return node
