"""Imports point down only: the floors of the design, over every syntax tree, lazy ones too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From top to bottom; inside a floor from left to right, except where `APART` says that none of them
# imports another.
FLOORS = [
    ["cli", "recipe", "bench"],
    ["serve", "distill", "prune", "quant"],
    ["command"],
    ["engine"],
    ["evaluate", "calibrate", "plan"],
    ["plots"],
    ["models"],
    ["data"],
    ["ops"],
    ["triton_kernels", "_ops", "_C"],
    ["arch", "check"],
]
APART = {"serve", "distill", "prune", "quant"}
# The one module beside the floors: it stands on ops, and only bench and tests stand on it.
TESTING_MAY = {"ops", "triton_kernels", "_ops", "_C", "arch", "check"}
ORDER = {
    name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)
}
# Engines are imported in the files of their plug-in, and vLLM in the one that times its kernels;
# the others nowhere at module level.
ENGINES = {"sglang": ("serve/sglang",), "vllm": ("serve/vllm", "bench/linear/rivals")}
LAZY = {"transformers", "flashinfer", "cupy", "triton", "matplotlib"}
# Exempt, and why.
AT_MODULE_LEVEL = {
    "slmperf.distill.callbacks": "its class derives from transformers.TrainerCallback",
    "slmperf.distill.config": "its class derives from transformers.TrainingArguments",
    "slmperf.distill.on_policy.generators": "its processor derives from one of transformers",
    "slmperf.distill.progress": "its class derives from transformers.TrainerCallback",
    "slmperf.distill.trainer": "its class derives from transformers.Trainer",
    "slmperf.engine.engine": "its cache derives from transformers.DynamicCache",
    "slmperf.models.engines.configuration_decilm": "a checkpoint's own file: its class derives "
    "from transformers.LlamaConfig",
    "slmperf.models.engines.flat": "its class derives from transformers.PretrainedConfig",
    "slmperf.models.pruned": "its classes derive from transformers' own",
    "slmperf.testing.interpreter": "it mends triton's interpreter",
}


def sources() -> list[tuple[str, Path]]:
    """(dotted name, file) of every Python file of the package."""
    found = []
    for folder, package in (
        (ROOT / "slmperf", "slmperf"),
        (ROOT / "triton_kernels", "slmperf.triton_kernels"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[str, int]]:
    """(absolute dotted name, line) of every import in the tree, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                drop = node.level - is_package
                parent = module.split(".")[: len(module.split(".")) - drop]
                base = ".".join([*parent, base] if base else parent)
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith("import_module") or called == "__import__":
                found.append((str(node.args[0].value), node.lineno))
    return found


def floor_of(name: str) -> str | None:
    """The floor's member that a dotted name belongs to, None for names outside."""
    parts = name.split(".")
    if parts[0] != "slmperf" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ORDER or parts[1] == "testing" else None


def allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if imported == "testing":
        return importer == "bench"
    if importer == "testing":
        return imported in TESTING_MAY
    if importer in APART and imported in APART:
        return False
    return ORDER[importer] < ORDER[imported]


@pytest.mark.parametrize(
    "module,path", sources(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_down(module, path):
    tree = ast.parse(path.read_text(), str(path))
    importer = module.split(".")[1] if "." in module else None
    if importer is not None:
        assert importer in ORDER or importer == "testing", f"{importer} stands on no floor"
    relative = path.relative_to(ROOT)
    for name, line in imports(tree, module, path.name == "__init__.py"):
        where = f"{relative}:{line}"
        top = name.split(".")[0]
        assert top != "triton_kernels", f"{where}: the bare name belongs to another project"
        if top in ENGINES:
            found = any(place in str(relative) for place in ENGINES[top])
            assert found, f"{where}: only {' and '.join(ENGINES[top])} import {top}"
        imported = floor_of(name)
        if imported is not None and importer is not None:
            assert allowed(importer, imported), f"{where}: {importer} may not import {imported}"


@pytest.mark.parametrize(
    "module,path", sources(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_heavy_imports_are_lazy(module, path):
    """transformers, triton and their like load in the function that needs them."""
    if module.startswith("slmperf.triton_kernels") or module in AT_MODULE_LEVEL:
        return  # a Triton file imports triton
    tree = ast.parse(path.read_text(), str(path))
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside | guarded:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            heavy = {name.split(".")[0] for name in names} & LAZY
            assert not heavy, (
                f"{path.relative_to(ROOT)}:{node.lineno}: import {heavy} where it is used"
            )


def test_the_rules_can_fail():
    """A planted import of each forbidden kind is found."""
    planted = "def f():\n    from slmperf import recipe\n    import slmperf.testing.cases\n"
    names = [name for name, _ in imports(ast.parse(planted), "slmperf.data.x", False)]
    assert [floor_of(name) for name in names] == ["recipe", "testing"]
    assert not allowed("data", "recipe") and not allowed("data", "testing")
    assert not allowed("prune", "quant") and not allowed("evaluate", "engine")
    assert allowed("evaluate", "calibrate") and not allowed("calibrate", "evaluate")
    relative = imports(ast.parse("from ..recipe import run"), "slmperf.data.x", False)
    assert relative == [("slmperf.recipe.run", 1)]
