"""The shape of the package: who imports whom, what is never used, how long files may be.

Each rule is a function of source text that returns what breaks it. The rules are run on small
snippets that break them, and then on the package itself.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxpeft"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part imports from its own level and below. `jaxpeft` itself gathers all of them, so only the
# command line may import it.
LEVELS = (
    ("assets", "core"),
    ("methods",),
    ("flax", "quant"),
    ("models", "hf"),
    ("train", "serve"),
    ("cli", "jaxpeft", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
PUBLIC_ONLY = ("jax", "jaxlib", "flax", "optax", "orbax", "transformers")
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
# Written in pieces, so that this file does not contain what it looks for.
HOSTS = tuple(
    ".".join(pieces)
    for pieces in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("download", "pytorch", "org"),
        ("conda", "anaconda", "org"),
    )
)


def imported(source: str, module: str) -> Iterator[str]:
    """The dotted names that a module imports anywhere in it, functions included."""
    package = module.rsplit(".", 1)[0].split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for an attribute of an attribute of a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def part_of(name: str) -> str:
    """The part of jaxpeft that a dotted name is in, `jaxpeft` for the package's own names."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in LEVEL else "jaxpeft"


def own_imports(source: str, module: str) -> set[str]:
    """The other parts of jaxpeft that a module imports."""
    names = (n for n in imported(source, module) if n.split(".")[0] == "jaxpeft")
    return {part_of(name) for name in names} - {part_of(module)}


def upward(source: str, module: str) -> list[str]:
    here = part_of(module)
    return [f"{here} -> {to}" for to in own_imports(source, module) if LEVEL[to] > LEVEL[here]]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that stay when nodes with nothing left to import are taken away again and again."""
    left = dict(graph)
    while free := [part for part, to in left.items() if not to & left.keys()]:
        for part in free:
            del left[part]
    return sorted(left)


def flax_imports(source: str, module: str) -> list[str]:
    return [name for name in imported(source, module) if name.split(".")[0] == "flax"]


def private_names(source: str, module: str) -> list[str]:
    """Names with a part that starts with one underscore, in libraries that may change those."""
    attributes = (dotted(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute))
    names = [*imported(source, module), *attributes]
    pieces = {name: name.split(".") for name in names if name.split(".")[0] in PUBLIC_ONLY}
    return [n for n, p in pieces.items() if any(q[:1] == "_" and q[:2] != "__" for q in p)]


def pickling(source: str, module: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(source)))
    keywords = (n for n in nodes if isinstance(n, ast.keyword) and n.arg == "allow_pickle")
    allowed = [
        f"allow_pickle on line {n.value.lineno}"
        for n in keywords
        if not (isinstance(n.value, ast.Constant) and n.value.value is False)
    ]
    calls = (dotted(n.func) for n in nodes if isinstance(n, ast.Call))
    loads = [name for name in calls if name in ("torch.load", "torch.save")]
    return allowed + loads + [n for n in imported(source, module) if n.split(".")[0] in PICKLES]


def not_reexports(source: str) -> list[str]:
    """Statements other than a docstring, `from jaxpeft... import x as x` and constant dunders."""
    body = ast.parse(source).body
    start = 1 if body and ast.get_docstring(ast.parse(source)) is not None else 0
    return [ast.unparse(node) for node in body[start:] if not _is_reexport(node)]


def _is_reexport(node: ast.stmt) -> bool:
    match node:
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return module.split(".")[0] == "jaxpeft" and all(n.asname == n.name for n in names)
        case ast.Assign(targets=[ast.Name(id=str(name))]):
            return name in ("__all__", "__version__")
    return False


def hosts(text: str) -> list[str]:
    return [host for host in HOSTS if host in text.lower()]


def too_long(text: str, lines: int = 400) -> list[str]:
    count = len(text.splitlines())
    return [f"{count} lines"] if count > lines else []


BREAKS = [
    (upward, "from jaxpeft.flax import linen", "jaxpeft.methods.lora"),
    (upward, "def f():\n    from jaxpeft.train import loop", "jaxpeft.models.load"),
    (upward, "from jaxpeft import cli", "jaxpeft.serve.generate"),
    (upward, "import jaxpeft.methods.lora", "jaxpeft.core.lift"),
    (upward, "import jaxpeft as jp", "jaxpeft.train.loop"),
    (upward, "from jaxpeft import lora", "jaxpeft.models.load"),
    (upward, "from ..methods import lora", "jaxpeft.core.lift"),
    (upward, "if TYPE_CHECKING:\n    from .. import methods", "jaxpeft.core.lift"),
    (flax_imports, "def f():\n    from flax import nnx", "jaxpeft.core.lift"),
    (flax_imports, "import flax.linen as nn", "jaxpeft.core.lift"),
    (private_names, "from jax._src import core", "jaxpeft.core.lift"),
    (private_names, "from jax import _src", "jaxpeft.core.lift"),
    (private_names, "import jax\njax._src.core.Trace", "jaxpeft.core.lift"),
    (private_names, "from flax.nnx import _helpers", "jaxpeft.flax.nnx"),
    (pickling, "import pickle", "jaxpeft.hf.files"),
    (pickling, "def f():\n    from cloudpickle import loads", "jaxpeft.hf.files"),
    (pickling, "np.load(path, allow_pickle=True)", "jaxpeft.hf.files"),
    (pickling, "np.load(path, allow_pickle=trusted)", "jaxpeft.hf.files"),
    (pickling, "torch.load(path)", "jaxpeft.hf.files"),
]
KEEPS = [
    (upward, "from jaxpeft.core import lift\nfrom jaxpeft.models import names", "jaxpeft.hf.load"),
    (upward, "from . import structured\nfrom .tree import mask", "jaxpeft.core.lift"),
    (upward, "import jaxpeft as jp\nimport jaxpeft.train", "jaxpeft.cli.demo"),
    (upward, "import flax\nfrom flax import nnx", "jaxpeft.models.decoder"),
    (flax_imports, "from jaxpeft.flax import nnx", "jaxpeft.core.lift"),
    (
        private_names,
        "jax.__version__\nself._cache\nfrom jax.extend import core",
        "jaxpeft.core.lift",
    ),
    (pickling, "np.load(path, allow_pickle=False)\nimport json", "jaxpeft.hf.files"),
]


def _names(case):
    return getattr(case, "__name__", None)


@pytest.mark.parametrize(("rule", "source", "module"), BREAKS, ids=_names)
def test_a_rule_finds_what_breaks_it(rule, source, module):
    assert rule(source, module)


@pytest.mark.parametrize(("rule", "source", "module"), KEEPS, ids=_names)
def test_a_rule_lets_the_rest_pass(rule, source, module):
    assert rule(source, module) == []


def test_a_cycle_is_found():
    assert cycle({"hf": {"models", "core"}, "models": {"hf"}, "core": set()}) == ["hf", "models"]
    assert cycle({"hf": {"models", "core"}, "models": {"core"}, "core": set()}) == []


@pytest.mark.parametrize(
    "source",
    ["import jax", "from jaxpeft.core import lift", "def f(): pass", "x = 1", "from . import core"],
)
def test_only_re_exports_pass_as_re_exports(source):
    assert not_reexports(source) == [source.replace("def f(): pass", "def f():\n    pass")]
    assert not_reexports('"""Doc."""\nfrom jaxpeft.core.lift import lift as lift') == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_found(host):
    assert hosts(f"see https://{host.upper()}/simple") == [host]


def test_a_long_file_is_found():
    assert too_long("x\n" * 401) and not too_long("x\n" * 400)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _own_text_files() -> list[Path]:
    """What the repository consists of: not environments, caches or git's own files."""
    folders = ("jaxpeft", "tests", "examples", "benchmarks", "docs", "scripts", ".ci", ".github")
    below = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    files = (path for path in [*ROOT.iterdir(), *below] if path.is_file())
    return [path for path in files if "__pycache__" not in path.parts]


def test_the_package_is_where_this_test_looks():
    assert PACKAGE / "core" / "lift.py" in MODULES
    assert ROOT / "pyproject.toml" in _own_text_files()


@pytest.mark.parametrize("rule", [upward, private_names, pickling], ids=_names)
def test_the_package_keeps(rule):
    found = {_module(path): rule(path.read_text(), _module(path)) for path in MODULES}
    assert not {module: what for module, what in found.items() if what}


def test_every_part_has_a_level():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert parts - {"__init__"} <= LEVEL.keys()


def test_parts_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        module = _module(path)
        graph.setdefault(part_of(module), set()).update(own_imports(path.read_text(), module))
    assert cycle(graph) == []


def test_the_core_knows_no_flax():
    core = [path for path in MODULES if part_of(_module(path)) == "core"]
    found = {path.name: flax_imports(path.read_text(), _module(path)) for path in core}
    assert not {name: what for name, what in found.items() if what}


def test_the_package_only_re_exports_at_its_top():
    assert not_reexports((PACKAGE / "__init__.py").read_text()) == []


def test_no_file_is_too_long():
    found = {path.name: too_long(path.read_text()) for path in MODULES}
    assert not {name: what for name, what in found.items() if what}


def test_no_package_registry_is_named():
    found = {path: hosts(path.read_text(errors="replace")) for path in _own_text_files()}
    assert not {path: what for path, what in found.items() if what}
