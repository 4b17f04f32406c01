"""Steps and readings of sharpness in processes that were forked after steps of several threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_warmup as fw

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.skipif("cpu" not in fw.available_backends(), reason="the CPU kernels are not built"),
]

# two threads for our kernels, which have 40,000 elements; tensors of 20,000 take one thread in torch
START = """
import multiprocessing, os, sys, types, warnings
import torch
import fused_warmup as fw
from fused_warmup.backends import threads

warnings.filterwarnings("ignore", "This process", DeprecationWarning)
torch.set_num_threads(2)

def made():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(20_000, generator=generator)) for _ in range(2)]
    opt = fw.Adam(params, lr=0.01, max_grad_norm=1.0, average=fw.EMA(0.9), backend="cpu")
    step(opt)
    return opt

def step(opt):
    for param in opt.session.params:
        param.grad = param.detach().cos()
    opt.step()

def read(opt):
    params = opt.session.params
    return fw.sharpness.preconditioned(lambda: sum((p**4).sum() for p in params), opt).value

def results(opt):
    # a step of the optimizer that was there, a new one, vectors and preconditioner
    step(opt)
    other = made()
    tensors = [t for o in (opt, other) for p in o.session.params for t in (p.detach(), o.state[p]["average"])]
    return torch.cat(tensors), read(opt), read(other)

def child(opt, path):
    # torch's own operations would wait for the threads of the parent; the kernels may ask for two
    torch.set_num_threads(1)
    threads.torch = types.SimpleNamespace(get_num_threads=lambda: 2)
    torch.save(results(opt), path)

opt, path = made(), sys.argv[1]
read(opt)
"""
ENDS = {
    "os.fork": """
pid = os.fork()
if pid == 0:
    child(opt, path)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
""",
    "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=child, args=(opt, path))
process.start()
process.join()
assert process.exitcode == 0
""",
    "grandchild": """
pid = os.fork()
if pid == 0:
    grandchild = os.fork()
    if grandchild == 0:
        child(opt, path)
        os._exit(0)
    os._exit(os.waitpid(grandchild, 0)[1])
assert os.waitpid(pid, 0)[1] == 0
""",
}
COMPARE = """
tensors, *readings = torch.load(path)
threads_before = threads.threads_for(40_000)
expected, *theirs = results(opt)
assert threads_before == 2
assert torch.equal(tensors, expected)
assert readings == theirs
"""


def run(code: str, path: Path, timeout: float = 100.0) -> None:
    """Run a script in a process group of its own, which ends with it, children that wait included."""
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        pytest.fail("a forked process waits for ever")
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_forked_process_makes_the_same_steps_and_readings(how: str, tmp_path: Path) -> None:
    """With the same bits as its parent, which goes on with two threads."""
    run(START + ENDS[how] + COMPARE, tmp_path / "results.pt")


def test_a_process_forked_before_any_step_has_threads(tmp_path: Path) -> None:
    code = """
import os, sys, torch
from fused_warmup.backends.threads import threads_for
torch.set_num_threads(2)
threads_for(1)
pid = os.fork()
if pid == 0:
    os._exit(threads_for(40_000))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
"""
    run(code, tmp_path)
