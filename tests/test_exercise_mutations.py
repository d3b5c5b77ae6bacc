"""A wrong gradient in any op of the package is found by `check`: every operator of every backward pass is mutated.

Each mutant is the op's own class with one change in the text of `backward` (and of the helpers that are written for
it): an operator replaced, a term dropped, a transposition left out, an index moved, a sign flipped.
"""

import ast
import copy
import inspect
import sys
import textwrap

import pytest

from minidsv3.exercises.any_op import CASES
from minidsv3.exercises.checker import evaluate
from minidsv3.ops.plain import PLAIN_FORMS

SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
DROPPED = (ast.Add, ast.Sub, ast.Mult)
# forms of an op -> the op as which they are checked
FORMS = {op: op for op in CASES} | {plain: fast for fast, plain in PLAIN_FORMS.items()}


def mutants_of(node):
    """Changes of one node of the syntax tree: (what, new node)."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield "operator", ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        if isinstance(node.op, DROPPED):
            yield "right dropped", node.left
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        yield "operator", ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
        yield "statement dropped", ast.Pass()
    if isinstance(node, ast.Constant) and type(node.value) is int and not hasattr(node, "free"):
        yield "number", ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "->" in node.value:
        inputs, output = node.value.split("->")
        yield "index", ast.Constant(f"{inputs}->{output[:-2]}{output[:-3:-1]}")
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield "transposition", node.value
    if isinstance(node, ast.Return) and node.value is not None:
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for i, value in enumerate(values):
            if isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id == "weight_gradient"):
                continue
            changed = [ast.UnaryOp(ast.USub(), v) if i == j else v for j, v in enumerate(values)]
            yield f"sign of result {i}", ast.Return(ast.Tuple(changed, ast.Load()) if len(values) > 1 else changed[0])


def mark_free(tree):
    """Numbers that may change and change nothing: -1 among the sizes of a reshape, 1 as the least count of a mean,
    and which input an op asks about, since all of them want a gradient here."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if name in ("reshape", "max", "needs"):
            for argument in call.args:
                for node in [argument, getattr(argument, "operand", argument)]:
                    if isinstance(node, ast.Constant):
                        node.free = True
    return tree


class Replace(ast.NodeTransformer):
    def __init__(self, target, new):
        self.target, self.new = target, new

    def visit(self, node):
        return self.new if node is self.target else self.generic_visit(node)


def mutated(op):
    """Mutants of an op: (name, class)."""
    source = textwrap.dedent(inspect.getsource(op))
    count = len(list(ast.walk(backward_of(ast.parse(source)))))
    module = sys.modules[op.__module__]
    for number in range(count):
        tree = mark_free(ast.parse(source))
        node = list(ast.walk(backward_of(tree)))[number]
        for what, new in mutants_of(node):
            changed = copy.deepcopy(tree)
            target = list(ast.walk(backward_of(changed)))[number]
            changed = ast.fix_missing_locations(Replace(target, copy.deepcopy(new)).visit(changed))
            scope = dict(vars(module))
            exec(compile(changed, "<mutant>", "exec"), scope)
            yield f"{ast.unparse(node)} ({what})", scope[op.__name__]


def backward_of(tree):
    (cls,) = tree.body
    return next(f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "backward")


def wrong_in(op, submission):
    return [r.property.name for r in evaluate(f"op:{FORMS[op].__name__}", submission, seconds=30) if r.detail]


@pytest.mark.parametrize("op", FORMS, ids=lambda op: op.__name__)
def test_check_accepts_the_op_itself(op):
    assert wrong_in(op, op) == []


@pytest.mark.parametrize("op", FORMS, ids=lambda op: op.__name__)
def test_check_finds_every_wrong_gradient(op):
    survivors = [what for what, mutant in mutated(op) if not wrong_in(op, mutant)]
    assert survivors == []
