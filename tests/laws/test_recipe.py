"""An optimizer is added by the recipe of CONTRIBUTING.md: Lion, which is not in the package, in a scratch copy of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fused_warmup", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")

# Chen et al. 2023, arXiv:2302.06675, algorithm 2; beta1 blends the direction and beta2 the buffer
CPP = """
struct Lion {
  static constexpr int kSums = 0;
  static constexpr int kMinStates = 1;
  static constexpr int kMaxStates = 1;

  FW_HOST_DEVICE static int lr_norm_power(const Hyper&, int64_t) { return 1; }

  FW_HOST_DEVICE static void scalars(const Hyper&, double effective_lr, int64_t, Scalars& s) {
    s.step_size = effective_lr;
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update(C& param, C grad, C* state, const ScalarsOf<C>& s) {
    grad = multiply_add(s.weight_decay, param, grad * s.grad_scale);
    C blended = lerp(state[0], grad, s.exp_avg_weight);
    state[0] = lerp(state[0], grad, s.exp_avg_sq_weight);
    C sign = blended > C(0) ? C(1) : (blended < C(0) ? C(-1) : C(0));
    param = param - multiply_add(s.decoupled_decay, param, s.step_size * sign);
  }
};
"""
REFERENCE = '''
class Lion:
    """Sign of a blend of momentum and gradient."""

    min_states: ClassVar[int] = 1
    max_states: ClassVar[int] = 1

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """The update does not depend on the scale of the gradient."""
        return 1

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Learning rate alone."""
        s.step_size = effective_lr

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """One step of Lion."""
        grad = grad * s.grad_scale + s.weight_decay * param
        blended = lerp(state[0], grad, s.exp_avg_weight)
        new_state = [lerp(state[0], grad, s.exp_avg_sq_weight)]
        sign = blended.sign()
        param = param - (s.decoupled_decay * param + s.step_size * sign)
        return param, new_state

'''
TRITON = '''
class Lion:
    """Sign of a blend of momentum and gradient."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """The update does not depend on the scale of the gradient."""
        return 1

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Learning rate alone."""
        return Scalars(s, step_size=effective_lr)

    @staticmethod
    @triton.jit
    def update(param, grad, state, s):
        """One step of Lion."""
        grad = tl.fma(s.weight_decay, param, grad * s.grad_scale)
        blended = lerp(state[0], grad, s.exp_avg_weight)
        new_state = (lerp(state[0], grad, s.exp_avg_sq_weight),)
        sign = tl.where(blended > 0.0, 1.0, tl.where(blended < 0.0, -1.0, 0.0))
        param = param - tl.fma(s.decoupled_decay, param, s.step_size * sign)
        return param, new_state

'''
CLASS = '''"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..reference import rules
from .base import FusedOptimizer, Params
from .hyper import shared


def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    beta1, beta2 = check.betas(owner, group["betas"])
    return Hyper(**shared(owner, group), beta1=beta1, beta2=beta2, decoupled=True)


class Lion(FusedOptimizer):
    """Sign momentum."""

    spec: ClassVar[RuleSpec] = RuleSpec(rules.Lion, ("exp_avg",), _hyper)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)
'''
STATED = '''    preconditioned: ClassVar[bool] = False

    @staticmethod
    def stability_threshold(h: Hyper) -> float:
        """Stated for the test alone."""
        return 3.0

    @staticmethod
    def early_stability_threshold(h: Hyper) -> float:
        """Stated for the test alone."""
        return 2.0

'''
CASE = '    _layer("lion", fw.Lion, weight_decay=0.093),\n    _layer("lion-maximize", fw.Lion, betas=(0.5, 0.8), maximize=True),\n'


def insert(path, *changes):
    """Put texts before others that stand in a file exactly once."""
    text = path.read_text(encoding="utf-8")
    for anchor, new in changes:
        assert text.count(anchor) == 1, (path, anchor)
        text = text.replace(anchor, new + anchor)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The five edits of the recipe, and the build."""
    copy = tmp_path_factory.mktemp("scratch")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    package = copy / "fused_warmup"
    insert(
        copy / "csrc" / "rules.h",
        ("// x clamped to an interval", CPP.lstrip() + "\n"),
        (" X(LAMB) X(AdamP) X(SGDP)\n", " X(Lion)"),
    )
    rules = package / "reference" / "rules.py"
    insert(rules, ("\ndef bounded(", REFERENCE + "\n"), ("}\nLAYER_RULES: dict", ', "Lion": Lion'))
    insert(
        package / "backends" / "triton" / "rules.py",
        ("\n@triton.jit\ndef bounded(", TRITON + "\n"),
        ("}\nLAYER_RULES: dict", ', "Lion": Lion'),
    )
    (package / "optim" / "lion.py").write_text(CLASS, encoding="utf-8")
    insert(
        package / "__init__.py",
        ("from .optim.radam import RAdam\n", "from .optim.lion import Lion\n"),
        ('    "PersistentCatapult",\n    "RAdam"', '    "Lion",\n'),
    )
    insert(copy / "tests" / "cases.py", ("]\nTORCH_CASES", CASE))
    # the results are compared with the reference, which the optimisation of the compiler does not change
    environment = {
        **os.environ,
        "FUSED_WARMUP_CUDA": "0",
        "FUSED_WARMUP_CXXFLAGS": "-O0",
        "PYTHONPATH": str(copy),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True)
    return copy, environment


def run(scratch, command, **variables):
    copy, environment = scratch
    result = subprocess.run(
        [sys.executable, *command], cwd=copy, env={**environment, **variables}, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_the_generic_tests_take_the_new_rule(scratch):
    files = [
        *(f"tests/backends/test_{name}.py" for name in ("backends", "bitwise", "reference")),
        *(
            f"tests/optim/test_{name}.py"
            for name in ("state_dict", "torch_contract", "torch_state", "properties")
        ),
    ]
    status, output = run(
        scratch, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "lion or Lion"]
    )
    assert status == 0, output
    count = int(output.split(" passed")[0].split()[-1])
    assert count >= 20, output
    laws = "names_in_the_same_order or assign_what or mathematics or circle or downwards or private"
    status, output = run(
        scratch, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws/test_laws.py", "-k", laws]
    )
    assert status == 0, output


@pytest.mark.slow
def test_triton_takes_the_new_rule(scratch):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/interpreted.py",
        "-k",
        "one_step and lion",
    ]
    status, output = run(scratch, command, TRITON_INTERPRET="1")
    assert status == 0, output
    assert " passed" in output


SHARPNESS = """
import torch, fused_warmup as fw
x = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
opt = fw.Lion([x], lr=0.1)
loss = lambda: (torch.tensor([3.0, 5.0], dtype=torch.float64) * x * x).sum() / 2
loss().backward()
opt.step()
for read in (lambda: fw.sharpness.preconditioned(loss, opt), lambda: fw.sharpness.threshold(opt)):
    try:
        reading = read()
        print(float(reading if isinstance(reading, float) else reading.value))
    except TypeError as error:
        print(error)
print(float(fw.sharpness.top_eigenvalue(loss, [x]).value))
"""


@pytest.mark.slow
def test_its_sharpness_is_read_once_the_rule_states_what_that_takes(scratch):
    copy, _ = scratch
    status, output = run(scratch, ["-c", SHARPNESS])
    assert status == 0, output
    first, second, value = output.strip().splitlines()
    assert first == "preconditioned: optimizer must have a known rule, got 'Lion'."
    assert second == "threshold: optimizer must have a known rule, got 'Lion'."
    assert float(value) == pytest.approx(5.0, rel=1e-5)
    rules = copy / "fused_warmup" / "reference" / "rules.py"
    text = rules.read_text(encoding="utf-8")
    head, tail = text.split("class Lion:", 1)
    anchor = "    max_states: ClassVar[int] = 1\n"
    before, after = tail.split(anchor, 1)
    rules.write_text(head + "class Lion:" + before + anchor + STATED + after, encoding="utf-8")
    try:
        status, output = run(scratch, ["-c", SHARPNESS])
    finally:
        rules.write_text(text, encoding="utf-8")
    assert status == 0, output
    assert [float(line) for line in output.strip().splitlines()] == pytest.approx([5.0, 30.0, 5.0], rel=1e-5)
