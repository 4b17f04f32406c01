"""The machine code: every instruction set is in the one binary, and the loops use its widest vectors."""

import re
import subprocess

import pytest

from fused_warmup import _cpu
from fused_warmup.backends.native import CpuBackend


@pytest.fixture(scope="module")
def code():
    """Disassembly by symbol and instruction set, told apart by the registers it uses."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _cpu.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    leaves = ("update_block<", "stage1_block<", "direction_block<", "sum_part<", "draw_counters(")
    return [
        block for block in re.split(r"\n\n", text) if any(leaf in block.split("\n", 1)[0] for leaf in leaves)
    ]


def test_widest_is_chosen_and_unknown_is_refused():
    names = _cpu.instruction_sets()
    assert names[0] == "baseline"
    assert set(names) <= {"baseline", "avx2", "avx512"}
    assert CpuBackend()._isa == len(names) - 1
    with pytest.raises(ValueError, match="avx9"):
        CpuBackend("avx9")


@pytest.mark.skipif(
    "avx2" not in _cpu.instruction_sets(), reason="the binary has x86-64 kernels only on x86-64"
)
@pytest.mark.parametrize(("rule", "states"), [("Adam", 2), ("Adam", 3), ("RAdam", 2), ("SGD", 0), ("SGD", 1)])
@pytest.mark.parametrize(
    ("register", "dtype"), [("ymm", "float"), ("ymm", "double"), ("zmm", "float"), ("zmm", "double")]
)
def test_updates_are_vectors(code, rule, states, register, dtype):
    """AVX-512 code is checked by its text, since a machine without it cannot run it."""
    blocks = [b for b in code if f"update_block<fw::{rule}, {states}, {dtype}>" in b.split("\n", 1)[0]]
    suffix = "ps" if dtype == "float" else "pd"
    wanted = [rf"vfn?m(add|sub)\d+{suffix}.*%{register}", rf"vmovup{suffix[1]} +%{register}\d+,"]
    wanted += [rf"vsqrt{suffix} .*%{register}", rf"vdiv{suffix} .*%{register}"] if rule != "SGD" else []
    assert any(all(re.search(pattern, block) for pattern in wanted) for block in blocks), len(blocks)


@pytest.mark.skipif(
    "avx2" not in _cpu.instruction_sets(), reason="the binary has x86-64 kernels only on x86-64"
)
@pytest.mark.parametrize(("rule", "states"), [("LAMB", 2), ("AdamP", 2), ("SGDP", 1)])
@pytest.mark.parametrize("leaf", ["stage1_block", "direction_block"])
@pytest.mark.parametrize(
    ("register", "dtype"), [("ymm", "float"), ("ymm", "double"), ("zmm", "float"), ("zmm", "double")]
)
def test_both_parts_of_an_update_are_vectors(code, rule, states, leaf, register, dtype):
    blocks = [b for b in code if f"{leaf}<fw::{rule}, {states}, {dtype}>" in b.split("\n", 1)[0]]
    suffix = "ps" if dtype == "float" else "pd"
    wanted = [rf"vmov[au]p{suffix[1]} +%{register}\d+,"]
    wanted += [rf"vsqrt{suffix} .*%{register}", rf"vdiv{suffix} .*%{register}"] if rule != "SGDP" else []
    assert any(all(re.search(pattern, block) for pattern in wanted) for block in blocks), len(blocks)


@pytest.mark.skipif(
    "avx2" not in _cpu.instruction_sets(), reason="the binary has x86-64 kernels only on x86-64"
)
@pytest.mark.parametrize("register", ["xmm", "ymm", "zmm"])
def test_random_bits_are_drawn_in_lanes(code, register):
    """Seven rounds of two registers: two products each, one in the first two, whose other one is shared."""
    blocks = [b for b in code if "draw_counters(" in b.split("\n", 1)[0]]
    loops = [b[b.find("pmuludq") : b.rfind("pmuludq")] for b in blocks if f"%{register}" in b]
    products = [len(re.findall(rf"pmuludq .*%{register}", block)) for block in blocks]
    assert max(products) == 2 * (2 * 7 - 2)
    assert loops
    assert not any("imul" in loop for loop in loops)


@pytest.mark.skipif(
    "avx2" not in _cpu.instruction_sets(), reason="the binary has x86-64 kernels only on x86-64"
)
@pytest.mark.parametrize("rule", ["LAMB", "AdamP"])
@pytest.mark.parametrize(("register", "lanes"), [("ymm", 4), ("zmm", 8)])
def test_sums_over_layers_are_vectors_of_doubles(code, rule, register, lanes):
    blocks = [b for b in code if f"sum_part<fw::{rule}, float>" in b.split("\n", 1)[0]]
    found = max(len(re.findall(rf"vfmadd\d+pd .*%{register}", block)) for block in blocks)
    # thirty-two lanes over all sums
    assert found >= 32 // lanes
    # halves of a register are converted more slowly than numbers from memory; AdamP scales a gradient before
    if rule == "LAMB":
        assert not any(re.search(rf"vcvtps2pd +%[xy]mm\d+,%{register}", block) for block in blocks)
