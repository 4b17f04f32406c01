"""The laws of the house: what may be written where, checked on the text of the sources."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_warmup as fw
from fused_warmup import _cpu
from fused_warmup.plan import structs
from fused_warmup.reference import rules, schedules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_warmup"
CSRC = ROOT / "csrc"
TRITON = PACKAGE / "backends" / "triton"
PYTHON = sorted(PACKAGE.rglob("*.py"))
CPP = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def relative(paths, pattern, root):
    found = re.compile(pattern)
    return sorted(str(p.relative_to(root)) for p in paths if found.search(p.read_text()))


def test_update_mathematics_stands_in_rules_only():
    words = r"bias_correction\(|sma_length|rectification\("
    assert relative(PYTHON, words, PACKAGE) == ["backends/triton/rules.py", "reference/rules.py"]
    assert relative(CPP, words, CSRC) == ["rules.h"]
    # platform.h has the cosine that each machine does best
    assert relative(CPP, r"\b(cos|cospi|pow)\(", CSRC) == ["platform.h", "schedules.h"]
    assert relative(PYTHON, r"math\.(cos|pow)\(", PACKAGE) == ["reference/schedules.py"]
    assert relative(PYTHON, r"tl\.cos\(|\bpower\(", PACKAGE) == ["backends/triton/schedules.py"]
    # the norms are the only roots outside the rules and schedules; vectors.py has products of its own
    words = r"tl\.(fma|exp|log|sqrt_rn|div_rn)\("
    names = [f"backends/triton/{name}.py" for name in ("rules", "schedules", "vectors")]
    assert relative(PYTHON, words, PACKAGE) == names


def test_rules_and_schedules_have_the_same_names_in_the_same_order():
    def functions(text, pattern):
        return re.findall(pattern, text, re.M)

    # what Python and Triton need beside the statements
    extra = {"Hyper", "LayerRule", "Rule", "Scalars", "init_exp_avg_sq", "root", "divide", "expm1", "power"}
    for stem, module in (("rules", rules), ("schedules", schedules)):
        cpp = functions(
            (CSRC / f"{stem}.h").read_text(), r"^(?:FW_HOST_DEVICE \w+ (\w+)\(|struct (\w+) (?:: \w+ )?\{)"
        )
        names = [a or b for a, b in cpp if b != "ScalarsOf"]
        for path in (Path(module.__file__), TRITON / f"{stem}.py"):
            python = [node.name for node in ast.parse(path.read_text()).body
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef))]  # fmt: skip
            assert [name for name in python if name in names] == names, path
            assert set(python) - set(names) <= extra, path
    assert (*rules.RULES, *rules.LAYER_RULES) == _cpu.rules()
    assert tuple(rules.RULES) == _cpu.preconditioned()


def assigned(function):
    """Names that a function assigns to, in order, fields of the scalars included."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
            found += [(node.lineno, t.attr if isinstance(t, ast.Attribute) else t.id) for t in targets]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Scalars":
            found += [(keyword.lineno, keyword.arg) for keyword in node.keywords if keyword.arg]
    return [name for _, name in sorted(found)]


def test_rules_of_triton_assign_what_the_reference_assigns():
    """A diff of the two reads as a translation: the same local names in the same order."""
    # where the two languages differ: a choice must be computed on both sides, and fields are set at the end
    free = {"s", "beta2", "adaptive", "nesterov", "decoupled", "positive", "new_state"}
    free |= {"corrected", "inside", "ratio"}
    trees = [ast.parse(path.read_text()) for path in (Path(rules.__file__), TRITON / "rules.py")]
    functions = [
        {
            f"{getattr(outer, 'name', '')}.{node.name}": assigned(node)
            for outer in tree.body
            for node in ([outer] if isinstance(outer, ast.FunctionDef) else getattr(outer, "body", []))
            if isinstance(node, ast.FunctionDef)
        }
        for tree in trees
    ]
    for name in set(functions[0]) & set(functions[1]):
        a, b = ([n for n in found[name] if n not in free] for found in functions)
        assert a == b, name


def test_core_includes_no_torch_and_pybind11_only_in_bindings():
    assert relative(CPP, r"#include *[<\"](torch|ATen|c10)", CSRC) == []
    assert relative(CPP, r"pybind11", CSRC) == ["check.h", "cpu/bindings.cpp", "cuda/bindings.cpp"]
    assert relative(CPP, r"#include.*pybind11", CSRC) == ["cpu/bindings.cpp", "cuda/bindings.cpp"]


def test_extension_needs_no_symbol_of_torch():
    symbols = subprocess.run(
        ["nm", "-D", "-C", _cpu.__file__], check=True, capture_output=True, text=True
    ).stdout
    assert not re.search(r"\b(at|c10|torch)::", symbols)
    exported = [
        line.split(maxsplit=2)[2] for line in symbols.splitlines() if re.search(r"^[0-9a-f]+ [TDB] ", line)
    ]
    assert exported == ["PyInit__cpu"]


def test_wide_kernels_stay_behind_their_table():
    """No function compiled for AVX2 or AVX-512 may be one that the linker could call from elsewhere."""
    symbols = subprocess.run(["nm", "-C", _cpu.__file__], check=True, capture_output=True, text=True).stdout
    weak = [line for line in symbols.splitlines() if re.search(r" [WVu] .*fw::", line)]
    assert weak == []


def test_data_ptr_only_in_plan():
    assert relative(PYTHON, r"data_ptr\(", PACKAGE) == ["plan/plan.py"]


def test_step_never_waits():
    paths = [
        PACKAGE / name
        for name in (
            "plan/plan.py",
            "optim/averaging.py",
            "backends/native.py",
            "backends/triton/launch.py",
            "backends/__init__.py",
        )
    ]
    assert relative(paths, r"\.item\(|\.cpu\(|synchronize|float\(\w*(loss|grad)|\.tolist\(", PACKAGE) == []
    tree = ast.parse((PACKAGE / "optim" / "base.py").read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FusedOptimizer")
    for function in cls.body:
        if isinstance(function, ast.FunctionDef) and function.name in (
            "step",
            "_prepared_plan",
            "record_loss",
        ):
            assert not re.search(r"\.item\(|\.cpu\(|synchronize|\.tolist\(|float\(", ast.unparse(function))


def test_measuring_never_waits():
    """Step counts are read once, in ``pending_step.py``; searches for a rate go step by step on the host."""
    paths = [
        PACKAGE / "sharpness" / f"{name}.py" for name in ("hvp", "lanczos", "vectors", "probe", "operators")
    ]
    assert relative(paths, r"\.item\(|\.cpu\(|synchronize|\.tolist\(|float\((?!\")", PACKAGE) == []


def imports(path):
    """Modules that a file imports when it is imported, relative ones by their path in the package."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.append(".".join(filter(None, (base, node.module))))
            names += [f"{names[-1]}.{alias.name}" for alias in node.names]
    return names


def test_reference_imports_only_torch_and_the_standard_library():
    for path in sorted((PACKAGE / "reference").glob("*.py")):
        for name in imports(path):
            top = name.split(".")[0]
            assert (
                top in sys.stdlib_module_names or top == "torch" or name.startswith("fused_warmup.reference")
            ), name


def test_data_flows_one_way():
    for path in sorted((PACKAGE / "backends").rglob("*.py")):
        assert not [name for name in imports(path) if name.startswith("fused_warmup.optim")], path
    for name in imports(PACKAGE / "plan" / "plan.py"):
        assert not name.startswith(("fused_warmup.backends", "fused_warmup.optim")), name


def test_layout_of_the_shared_structs():
    layout = _cpu.layout()
    assert set(layout) == set(structs.STRUCTS)
    for name, dtype in structs.STRUCTS.items():
        fields = {field: (dtype.fields[field][1], dtype.fields[field][0].itemsize) for field in dtype.names}
        assert fields | {"": (0, dtype.itemsize)} == layout[name], name


def test_sharpness_and_tuning_are_imported_when_asked_for():
    script = (
        "import sys, fused_warmup as fw; before = 'fused_warmup.sharpness' in sys.modules; "
        "print(before, fw.SharpnessProbe.__name__, fw.SharpnessReading.__name__, fw.PersistentCatapult.__name__, "
        "fw.sharpness.__name__, fw.tuning.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.split() == [
        "False", "SharpnessProbe", "SharpnessReading", "PersistentCatapult", "fused_warmup.sharpness", "fused_warmup.tuning"
    ]  # fmt: skip


@pytest.mark.slow
def test_import_is_light():
    """No extra is imported, and it takes under 100 ms beyond torch: processor time, which neighbours do not lengthen."""
    script = (
        "import time, torch, numpy; t = time.process_time(); import fused_warmup, sys; "
        "print(time.process_time() - t, *sorted(set(sys.modules) & "
        "{'scipy', 'matplotlib', 'rich', 'click', 'sklearn', 'torch._dynamo', 'triton'}))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(len(words) == 1 for words in runs), runs
    assert min(float(words[0]) for words in runs) < 0.1


def test_public_names():
    assert sorted(fw.__all__) == sorted(set(fw.__all__))
    assert len(fw.__all__) <= 20
    for name in fw.__all__:
        assert hasattr(fw, name)


def test_nothing_names_a_machine():
    """No path of the machine that this was written on, in any file that git tracks."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    home = os.sep + "root" + os.sep
    tracked = [ROOT / name for name in files if not name.endswith((".png", ".so"))]
    assert relative([path for path in tracked if path.is_file()], re.escape(home) + "|/tm" + "p/", ROOT) == []
