"""The machine code of the CUDA kernels, read from the library as it is built: nothing here needs a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from fused_warmup import _cpu
from fused_warmup.backends import unavailable_reason
from fused_warmup.reference.rules import LAYER_RULES

ROOT = Path(__file__).resolve().parents[2]
RULES = _cpu.rules()
ARCHS = os.environ.get(
    "FUSED_WARMUP_CUDA_ARCHS", re.search(r'CUDA_ARCHS = "(.*)"', (ROOT / "setup.py").read_text()).group(1)
).split()
# registers that leave room for the threads that launch bounds promise, of 65,536 on every processor
LIMITS = {"decide": 65536 // 512, "update": 65536 // 640, "update of all kinds": 128, "finish": 65536 // 512}
# each thread has four loads in flight, 40 KB on a multiprocessor; an H100 needs 14 and an H200 20 at 600 ns
LIMITS |= {"measure": 65536 // 640}
LIMITS |= dict.fromkeys(("rescale", "rescale of all kinds"), 65536 // 640)
VECTOR_PARTS = ("Perturb", "Finish", "Combine")
LIMITS |= dict.fromkeys((*VECTOR_PARTS, "fold"), 65536 // 512)
LIMITS |= dict.fromkeys(("Finish", "preconditioner"), 65536 // 384)
LIMITS |= dict.fromkeys(("stage1", "reduce_layers", "update of layers"), 65536 // 512)
LIMITS |= {"stage1 of all kinds": 255, "update of layers of all kinds": 65536 // 384}


def find_tool(name):
    """A program of the toolkit, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    inside = [
        Path(p) / "backends" / "nvidia" / "bin" / name
        for p in (spec.submodule_search_locations if spec else [])
    ]
    return shutil.which(name) or next((str(path) for path in inside if path.exists()), None)


def library():
    spec = importlib.util.find_spec("fused_warmup._cuda")
    return None if spec is None else spec.origin


LIBRARY, TOOL = library(), find_tool("cuobjdump")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None, reason="nvcc is not on PATH, so there are no CUDA kernels"
    ),
    pytest.mark.skipif(TOOL is None, reason="neither the CUDA toolkit nor Triton has cuobjdump here"),
]


def dump(*options):
    assert LIBRARY is not None, "nvcc is on PATH, but the extension fused_warmup._cuda is not built"
    return subprocess.run([TOOL, *options, LIBRARY], check=True, capture_output=True, text=True).stdout


def kernel_of(symbol):
    """The stage and the rule that a mangled name stands for; the operation on vectors."""
    if match := re.search(rf"vector_kernel.*({'|'.join(VECTOR_PARTS)})", symbol):
        return match.group(1), None
    stages = "measure|decide|stage1|reduce_layers|update|finish|rescale|preconditioner|fold"
    stage = re.search(rf"({stages})_kernel", symbol).group(1)
    rule = re.search(rf"\d({'|'.join(RULES)})(?=E)", symbol)
    all_kinds = stage in ("stage1", "update", "rescale") and "Lb1E" in symbol
    return f"{stage} of all kinds" if all_kinds else stage, rule and rule.group(1)


@pytest.fixture(scope="module")
def resources():
    """Registers, stack and local memory of every kernel, by device."""
    found, arch = defaultdict(dict), None
    for line in dump("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = match.group(1)
        if match := re.match(r"\s*Function (\S+):", line):
            symbol = match.group(1)
        if "REG:" in line:
            found[arch][symbol] = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


# reading the instructions of one device takes ten seconds
SOME_ARCHS = {min(ARCHS, key=int), max(ARCHS, key=int), "90"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(a, marks=[] if a in SOME_ARCHS else [pytest.mark.rest]) for a in ARCHS],
)
def code(request):
    """Instructions of every kernel for one device."""
    kernels = defaultdict(list)
    for line in dump("-sass", "-arch", f"sm_{request.param}").splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            body = kernels[match.group(1)]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", line):
            body.append(match.group(1))
    return kernels


def test_every_device_has_every_kernel(resources):
    assert set(ARCHS) <= set(resources)
    for arch, kernels in resources.items():
        counts = defaultdict(int)
        for symbol in kernels:
            counts[kernel_of(symbol)] += 1
        variants = {"decide": 2, "update": 1, "update of all kinds": 1, "fold": 1}
        wanted = {(stage, rule): n for stage, n in variants.items() for rule in RULES}
        wanted |= {
            (s, rule): 1 for s in ("stage1", "stage1 of all kinds", "reduce_layers") for rule in LAYER_RULES
        }
        rescales = dict.fromkeys([("rescale", None), ("rescale of all kinds", None)], len(RULES))
        # vectors of float32 and of float64
        vectors = {(part, None): 2 for part in VECTOR_PARTS}
        vectors |= {("preconditioner", rule): 2 for rule in _cpu.preconditioned()}
        wanted |= {("measure", None): 2 * len(RULES), ("finish", None): len(RULES)}
        assert dict(counts) == {**wanted, **rescales, **vectors}, arch


def test_text_for_devices_to_come():
    """The form that a driver compiles is for the oldest device, which serves all later ones."""
    assert set(re.findall(r"\.target sm_(\d+)", dump("-ptx"))) == {min(ARCHS, key=int)}


def test_nothing_is_spilled_and_the_registers_fit(resources):
    for arch, kernels in resources.items():
        for symbol, used in kernels.items():
            stage, rule = kernel_of(symbol)
            if stage.startswith("update") and rule in LAYER_RULES:
                stage = stage.replace("update", "update of layers")
            assert used["STACK"] == used["LOCAL"] == 0, (arch, symbol, used)
            assert used["REG"] <= LIMITS[stage], (arch, symbol, used)


def test_no_local_memory(code):
    for symbol, body in code.items():
        assert not [op for op in body if op.startswith(("LDL", "STL"))], symbol


def test_memory_is_known_to_be_global(code):
    """A load from anywhere must first find out where it is."""
    for symbol, body in code.items():
        if kernel_of(symbol)[0] not in ("decide", "reduce_layers", "fold"):
            assert not [op for op in body if re.match(r"(LD|ST)\.", op)], symbol


def test_vectors_of_16_bytes(code):
    """Per variant of the element types: parameter, gradient and states, each loaded and stored as vectors."""
    states = {"Adam": (2, 3), "RAdam": (2,), "SGD": (0, 1), "LAMB": (2,), "AdamP": (2,), "SGDP": (0, 1)}
    for symbol, body in code.items():
        stage, rule = kernel_of(symbol)
        loads, stores = (sum(op.startswith(f"{op_code}.E.128") for op in body) for op_code in ("LDG", "STG"))
        if stage == "measure":
            # float32 and float64 take one; both kinds of 16 bits one, or two beside float32 gradients
            assert loads >= 1 + 1 + 2 * (1 + 2), (symbol, loads)
        elif stage.startswith("rescale"):
            # parameter and average, which is two vectors beside eight elements of 16 bits
            assert min(loads, stores) >= (1 + 1) + 2 * (1 + 2), (symbol, loads, stores)
        elif stage == "preconditioner":
            assert loads >= 3 * min(states[rule]), (symbol, loads)
            assert stores >= 2, (symbol, stores)
        elif stage in VECTOR_PARTS:
            # of each type of parameters: values, vector and scale; the gradients and basis; or the basis
            assert loads >= (3 * 3 if stage != "Combine" else 3 * 5), (symbol, loads)
            assert stores >= 3, (symbol, stores)
        elif stage.startswith("stage1"):
            # parameter, gradient and states in, states out, of four kinds and of two beside float32 gradients
            assert loads >= sum((1 + 1 + n) + 2 * (1 + 1 + 2 * n) + 2 * (1 + 2 + 2 * n) for n in states[rule])
            assert stores >= sum(n + 4 * 2 * n for n in states[rule])
        elif rule in LAYER_RULES and stage.startswith("update"):
            # The gradient is read for Nesterov's form and where there is no state. LAMB never reads it, so that
            # its type makes no difference. States are not written.
            grads = (0,) if rule == "LAMB" else (1, 2)
            assert loads >= sum(1 + grads[0] + n + 1 for n in states[rule]) + 2 * sum(
                1 + grad + 2 * n + 2 for n in states[rule] for grad in grads
            ), (symbol, loads)
            # variants that differ in the gradient alone may end in the same stores
            assert stores >= (1 + 1 + 2 * (1 + 2)) * len(states[rule]), (symbol, stores)
        elif stage in ("update", "update of all kinds"):
            # the states and the average of eight elements of 16 bits take two vectors each
            wide = sum(1 + 1 + n + 1 for n in states[rule])
            half = 2 * sum((1 + 1 + 2 * n + 2) + (1 + 2 + 2 * n + 2) for n in states[rule])
            assert loads >= wide + half, (symbol, loads)
            assert stores >= sum(1 + n + 1 for n in states[rule]) + 4 * sum(
                1 + 2 * n + 2 for n in states[rule]
            )


def test_rounding_takes_whole_packs_of_16_bits(code):
    """Halves are taken from shared memory, where whole packs wait; per kind of 16 bits and of its gradients."""
    states = {"Adam": (2, 3), "RAdam": (2,), "SGD": (0, 1), "LAMB": (2,), "AdamP": (2,), "SGDP": (1,)}
    for symbol, body in code.items():
        stage, rule = kernel_of(symbol)
        staged, stores = (sum(op.startswith(name) for op in body) for name in ("STS.128", "STG.E.128"))
        # parameter, residue and states, and the gradient unless it is float32
        packs = sum(2 * (2 * (2 + n) + 1) for n in states.get(rule, ()))
        if stage == "update of all kinds" and rule not in LAYER_RULES:
            assert staged >= packs, (symbol, staged)
            # float64 and two ways of float32; 16 bits to nearest; rounded, with what is float32 beside them
            wanted = sum((3 if n else 2) * (n + 2) + 4 * (2 * n + 3) + 4 * (2 * n + 4) for n in states[rule])
            assert stores >= wanted, (symbol, stores)
        elif stage == "stage1 of all kinds":
            # chunks of one channel, and of several where there are channels
            times = 1 if rule == "LAMB" else 2
            assert staged >= times * packs, (symbol, staged)
            assert stores >= times * sum(3 * n + 4 * 2 * n + 4 * n for n in states[rule]), (symbol, stores)


def test_library_stands_alone():
    """No CUDA runtime to find, no symbol to clash, and it loads where there is no driver."""
    assert LIBRARY is not None, "nvcc is on PATH, but the extension fused_warmup._cuda is not built"
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert not [name for name in needed if re.search(r"cuda|torch|c10|nvrtc", name)], needed
    symbols = subprocess.run(["nm", "-D", LIBRARY], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^[0-9a-f]+ [TDB] (\S+)", symbols, re.M) == ["PyInit__cuda"]
    command = [sys.executable, "-c", "from fused_warmup import _cuda; print(_cuda.rules())"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == str(RULES)


def test_the_reason_is_named_where_there_is_no_device():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert unavailable_reason("cuda") == "torch finds no CUDA device"
