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
CPP = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


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
    # the norms are the only roots outside the rules and schedules; vectors.py has products of its own, reduce.py
    # the exact ones of pairs of floats
    words = r"tl\.(fma|exp|log|sqrt_rn|div_rn)\("
    names = [f"backends/triton/{name}.py" for name in ("reduce", "rules", "schedules", "vectors")]
    assert relative(PYTHON, words, PACKAGE) == names
    # the clip formula, the start of a second moment, the choice of a view and the stability thresholds
    words = r"norm \+ 1e-6|(?<!_)init_scale \* |(?i:projection_coef)\(h, "
    assert relative(PYTHON, words, PACKAGE) == ["backends/triton/rules.py", "reference/rules.py"]
    assert relative(CPP, words, CSRC) == ["rules.h"]
    assert relative(PYTHON, r"2\.0 \* \(1\.0 \+ \w+\.(beta1|momentum)\)", PACKAGE) == ["reference/rules.py"]
    # no rule is told by its name, nor by the number of its states
    words = r"rule [!=]= [\"'](Adam|RAdam|SGD|LAMB|AdamP|SGDP)|min_states <"
    assert relative(PYTHON, words, PACKAGE) == []


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
    stated = tuple(name for name, rule in rules.RULES.items() if hasattr(rule, "preconditioned"))
    assert stated == _cpu.preconditioned()


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


def test_data_ptr_only_in_the_address_cache():
    assert relative(PYTHON, r"data_ptr\(", PACKAGE) == ["plan/address_cache.py"]


# files of which nothing waits for the device, and the methods on the way of a step in those that also load and build
NEVER_WAIT = (
    *(
        f"plan/{name}.py"
        for name in (
            "plan",
            "gradients",
            "groups",
            "address_cache",
            "device_buffers",
            "state_cache",
            "tracked_states",
        )
    ),
    *("optim/averaging.py", "backends/native.py", "backends/threads.py", "backends/triton/launch.py"),
    "backends/__init__.py",
)
STEP = {
    "optim/base.py": ("step", "_prepare", "record_loss"),
    "optim/session.py": (
        "prepare",
        "_refresh",
        "_refresh_groups",
        "_fits",
        "feed",
        "warn_unfed",
        "keep_captured",
    ),
}
WAITS = r"\.item\(|\.cpu\(|synchronize|\.tolist\(|float\(|int\("


def methods(path):
    """The functions of the classes of a file, by name."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {f.name: f for cls in classes for f in cls.body if isinstance(f, ast.FunctionDef)}


def test_step_never_waits():
    paths = [PACKAGE / name for name in NEVER_WAIT]
    # a count of the average is read where a plan is built, and bool() of gradients by a probe of the states
    words = r"\.item\(|\.cpu\(|synchronize|float\(\w*(loss|grad)|\.tolist\("
    assert relative(paths, words, PACKAGE) == []
    for name, names in STEP.items():
        found = methods(PACKAGE / name)
        for function in names:
            assert not re.search(WAITS, ast.unparse(found[function])), function


def test_measuring_never_waits():
    """Step counts are read once, in ``pending_step.py``; searches for a rate go step by step on the host."""
    paths = [
        PACKAGE / "sharpness" / f"{name}.py"
        for name in ("hvp", "lanczos", "vectors", "probe", "operators", "measure")
    ]
    assert relative(paths, r"\.item\(|\.cpu\(|synchronize|\.tolist\(|float\((?!\")", PACKAGE) == []


def imports(path, root=PACKAGE):
    """Modules that a file imports, those inside functions and for types only included, by their full name."""
    package = path.relative_to(root.parent).with_suffix("").parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.append(".".join(filter(None, (base, node.module))))
            names += [f"{names[-1]}.{alias.name}" for alias in node.names]
    return names


def import_graph(root=PACKAGE):
    """The files of a package that each file imports."""
    paths = sorted(root.rglob("*.py"))
    module_of = {}
    for path in paths:
        parts = path.relative_to(root.parent).with_suffix("").parts
        module_of[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        path: {module_of[name] for name in imports(path, root) if name in module_of} - {path}
        for path in paths
    }


def find_circle(graph):
    """A circle of a graph as the list of its nodes, or None."""
    done, way = set(), []

    def visit(node):
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return None
        way.append(node)
        for other in sorted(graph[node]):
            found = visit(other)
            if found:
                return found
        done.add(way.pop())
        return None

    return next(filter(None, map(visit, sorted(graph))), None)


# each room imports only from rooms before it; the package itself is the roof
ROOMS = (
    *(
        "_version",
        "_checks",
        "reference",
        "schedules",
        "distributed",
        "plan",
        "backends",
        "optim",
        "sharpness",
    ),
    *("tuning", "cli", "", "__main__"),
)


def room_of(path):
    """The folder of a file below the package, or the file itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def test_no_circle_of_imports():
    """A package stands for its files: what imports the folder runs its __init__, which the arrows show."""
    graph = import_graph()
    assert len(graph) > 90
    # fused_warmup itself imports the rooms when they are asked for, and the command line uses it as anyone does
    roof = PACKAGE / "__init__.py"
    graph = {path: others - {roof} for path, others in graph.items()}
    assert find_circle(graph) is None


def test_imports_go_downwards_only():
    for path, others in import_graph().items():
        for other in others - {PACKAGE / "__init__.py"}:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(path)), f"{path} imports {other}"


def test_no_import_by_string():
    """An arrow that is not drawn: ``find_spec`` only asks whether a package of others is installed."""
    found = relative(PYTHON, r"import_module\((?!\"(matplotlib|triton)[\".])|__import__\(", PACKAGE)
    assert found == []


def test_reference_imports_only_torch_and_the_standard_library():
    for path in sorted((PACKAGE / "reference").glob("*.py")):
        for name in imports(path):
            top = name.split(".")[0]
            assert (
                top in sys.stdlib_module_names or top == "torch" or name.startswith("fused_warmup.reference")
            ), name


def private_reads(path):
    """Reads of ``object._name`` of an attribute that no class or module of the file itself has."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                own |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
                own |= {n.attr for n in ast.walk(target) if isinstance(n, ast.Attribute)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr) or node.attr in own:
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super"):
            continue
        found.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
    return found


# of others, where there is no public way: torch marks FSDP's and DTensor's tensors, and keeps an operator, hooks of all
# optimizers and the state of its profilers there
OF_OTHERS = r"_backward_hooks|profiler\._is_profiler_enabled|optimizer\._global_optimizer|torch\.|Optimizer\._|_local_tensor|_version$|sys\._getframe|_fields$|_asdict$|_replace$|ZeroRedundancy|super\(\)\._"


def test_no_private_attribute_of_another_module():
    found = [read for path in PYTHON for read in private_reads(path) if not re.search(OF_OTHERS, read)]
    assert found == []


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
