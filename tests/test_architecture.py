"""The plan of the house, held by reading the source: who may import whom, and what nobody may write."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import minidsv3

PACKAGE = Path(minidsv3.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]
EVERYTHING = ("",)

# room -> what it may import of ours, besides itself (a folder's name stands for all of its files)
MAY_IMPORT = {
    "config": (),
    "autograd": (),
    "hardware": (),
    "plots": (),
    "quant": (),
    "gradcheck": ("autograd",),
    "ops": ("autograd",),
    "data": ("config",),
    "model": ("config", "autograd", "ops", "quant.recipe"),
    "pretrained": ("config", "model", "quant.formats", "quant.blockwise"),
    "train": ("config", "data", "autograd", "ops", "model", "pretrained", "quant"),
    "generation": ("config", "data", "autograd", "ops", "model", "pretrained", "quant"),
    "parallel": ("config", "autograd", "ops", "quant", "hardware.specs"),
    "accounting": (  # compares all rooms with the papers; asks the writer what a checkpoint holds
        *("config", "autograd", "model", "hardware", "quant.blockwise", "pretrained.writer", "pretrained.tensors"),
        *("parallel.schedules", "parallel.timeline", "parallel.eplb", "generation.costs", "ops.attention", "ops.rope"),
        *("train.schedule", "train.balance"),
    ),
    "exercises": (
        *("config", "autograd", "gradcheck", "ops", "data", "model", "pretrained", "quant", "train", "generation"),
        *("parallel", "hardware", "accounting", "plots"),
    ),
    "commands": EVERYTHING,
    "widgets": (),
    "__main__": ("commands",),
    "__init__": ("config", "model", "pretrained", "generation"),  # the public names
}
# inside quant: each file builds on those before it
QUANT_ORDER = ("formats", "blockwise", "tensorcore", "product", "gemm", "comparison", "recipe")
# library -> the files that may import it
ONLY_IN = {
    "matplotlib": r"plots\.py|.*figures\.py",
    "tqdm": r"(train|commands)/.*",
    "ml_dtypes": r"(quant|pretrained)/.*",
    "mpi4py": r"parallel/mpi(\.py|/.*)",
}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(path, kind):
    return [node for node in ast.walk(tree(path)) if isinstance(node, kind)]


def name_of(path):
    """plots.py -> 'plots'; ops/linear.py -> 'ops.linear'; ops/__init__.py -> 'ops'; the outermost -> '__init__'."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def room_of(name):
    return name.split(".")[0]


def is_module(name):
    return (PACKAGE / f"{name.replace('.', '/')}.py").exists() or (PACKAGE / name.replace(".", "/")).is_dir()


@cache
def imports(path):
    """What a file imports, wherever in the file: (our modules without the package's name, libraries)."""
    ours, libraries = set(), set()
    folder = path.relative_to(PACKAGE).parent.parts
    for node in nodes(path, ast.Import):
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            (ours if top == "minidsv3" else libraries).add(rest or "__init__" if top == "minidsv3" else top)
    for node in nodes(path, ast.ImportFrom):
        module = (node.module or "").split(".") if node.module else []
        if node.level:
            base = [*folder[: len(folder) - node.level + 1], *module]
        elif module[0] == "minidsv3":
            base = module[1:]
        else:
            libraries.add(module[0])
            continue
        for (
            alias
        ) in node.names:  # `from ..quant import recipe` names a module, `from ..config import ModelConfig` does not
            longer = ".".join([*base, alias.name])
            ours.add(longer if is_module(longer) else ".".join(base) or "__init__")
    return frozenset(ours), frozenset(libraries)


def test_every_room_has_its_arrows():
    assert {room_of(name_of(path)) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_file_imports_only_what_its_room_may(path):
    room = room_of(name_of(path))
    allowed = (*MAY_IMPORT[room], *(("plots",) if path.name.endswith("figures.py") else ()))

    def fits(target):
        return room_of(target) == room or any(a in ("", target) or target.startswith(f"{a}.") for a in allowed)

    forbidden = sorted(target for target in imports(path)[0] if not fits(target))
    assert not forbidden, f"{name_of(path)} imports {forbidden}; {room} may import {allowed}"


@pytest.mark.parametrize("later", [name for name in QUANT_ORDER if (PACKAGE / "quant" / f"{name}.py").exists()])
def test_quant_files_build_on_earlier_ones_only(later):
    ours, _ = imports(PACKAGE / "quant" / f"{later}.py")
    behind = {f"quant.{name}" for name in QUANT_ORDER[QUANT_ORDER.index(later) :]}
    assert not ours & behind


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_library_is_imported_only_where_it_belongs(path):
    relative = path.relative_to(PACKAGE).as_posix()
    strangers = [lib for lib in imports(path)[1] if lib in ONLY_IN and not re.fullmatch(ONLY_IN[lib], relative)]
    assert not strangers


def test_only_declared_dependencies_are_imported():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["mpi"], *extras["tokenizers"]]
    declared = {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines} | {"PIL"}  # pillow's name
    assert "pillow" in declared
    used = {library for path in FILES for library in imports(path)[1]} - set(sys.stdlib_module_names)
    assert used <= declared


def dotted(node):
    """'np.add.at' of the expression np.add.at; '' of anything else."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def lines_with(path, wrong):
    return [node.lineno for node in ast.walk(tree(path)) if wrong(node)]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_scatters_with_ufunc_at(path):
    """np.add.at is slow and its order of sums is not ours to choose."""
    assert not lines_with(path, lambda n: isinstance(n, ast.Attribute) and re.fullmatch(r"np\.\w+\.at", dotted(n)))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_unpickles(path):
    """A checkpoint from a stranger must not run code."""
    assert not imports(path)[1] & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not lines_with(
        path,
        lambda n: (
            isinstance(n, ast.keyword) and n.arg == "allow_pickle" and getattr(n.value, "value", None) is not False
        ),
    )


# creators that default to float64 (or to the platform's int), and where dtype stands among positional arguments
DTYPE_POSITION = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "arange": 3}


def lacks_dtype(node):
    if not isinstance(node, ast.Call) or not dotted(node.func).startswith("np."):
        return False
    creator = dotted(node.func).removeprefix("np.")
    if creator not in DTYPE_POSITION or any(isinstance(a, ast.Starred) for a in node.args):
        return False
    return len(node.args) <= DTYPE_POSITION[creator] and all(k.arg not in ("dtype", None) for k in node.keywords)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_new_arrays_name_their_dtype(path):
    """Nothing becomes float64 in silence."""
    assert not lines_with(path, lacks_dtype)


@pytest.mark.parametrize("code, lacks", [
    ("np.zeros(3)", True), ("np.zeros((2, 3), dtype=int)", False), ("np.zeros(3, float)", False),
    ("np.full(3, 1.0)", True), ("np.arange(3)", True), ("np.arange(0, 3, 1)", True), ("np.zeros_like(x)", False),
    ("np.zeros(*spec)", False), ("np.full(3, 1.0, np.float32)", False), ("np.empty(3, **how)", False),
])  # fmt: skip
def test_search_for_missing_dtypes_finds_them(code, lacks):
    assert lacks_dtype(ast.parse(code, mode="eval").body) is lacks


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_randomness_is_always_a_generator(path):
    """np.random.seed and its kin are one hidden state for all; a Generator is handed in."""
    allowed = {"np.random.default_rng", "np.random.Generator", "np.random.SeedSequence", "np.random.PCG64",
               "np.random.Philox", "np.random.BitGenerator"}  # fmt: skip
    assert not lines_with(
        path,
        lambda n: (
            isinstance(n, ast.Attribute) and re.fullmatch(r"np\.random\.\w+", dotted(n)) and dotted(n) not in allowed
        ),
    )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_figure_is_shown_from_the_package(path):
    assert not lines_with(path, lambda n: isinstance(n, ast.Call) and dotted(n.func) == "plt.show")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_file_says_what_it_is(path):
    assert ast.get_docstring(tree(path))


def test_no_room_is_a_drawer_for_odds_and_ends():
    names = {part for path in FILES for part in name_of(path).split(".")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
