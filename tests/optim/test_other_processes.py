"""Optimizers in other processes, spawned and forked, and what a process loads that imports the package.

``test_fork.py`` has the kernels' threads after a fork.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import fused_warmup as fw

SPAWN = """
import multiprocessing
import torch
import fused_warmup as fw

def work(opt, queue):
    param = opt.param_groups[0]["params"][0]
    param.grad = torch.ones(4)
    opt.step()
    queue.put((param.tolist(), int(opt.state[param]["step"]), opt.telemetry.latest()["step"]))

if __name__ == "__main__":
    param = torch.nn.Parameter(torch.zeros(4))
    opt = fw.SGD([param], lr=1.0, momentum=0.5)
    param.grad = torch.ones(4)
    opt.step()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(opt, queue))
    process.start()
    print(queue.get(timeout=60))
    process.join()
"""

FORK = """
import os
import torch
import fused_warmup as fw

torch.set_num_threads(2)
param = torch.nn.Parameter(torch.zeros(100_000))
opt = fw.SGD([param], lr=1.0)
param.grad = torch.ones(100_000)
opt.step()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    opt.step()
    os._exit(0 if float(param[0].detach()) == -2.0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run_script(text: str, folder: Path) -> str:
    """Run a script in a new interpreter; return what it printed."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    root = str(Path(fw.__file__).parents[1])
    command = [sys.executable, str(script)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": root}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_spawned_processes_take_an_optimizer(tmp_path: Path) -> None:
    """An optimizer passed to a spawned process goes on there."""
    assert run_script(SPAWN, tmp_path) == "([-2.5, -2.5, -2.5, -2.5], 2, 2.0)"


def test_forked_processes_make_steps(tmp_path: Path) -> None:
    """A process forked after a parallel step can make one of its own, on one thread."""
    assert run_script(FORK, tmp_path) == "0"
