"""Runs a script as processes that form a gloo group; the script prints what it found."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fused_warmup as fw

START = """
import sys
import torch
import torch.distributed as dist
import fused_warmup as fw

rank, world_size = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world_size)
torch.set_num_threads(1)
"""


# threads of gloo may outlive the group, and what tears torch down aborts if one still runs
END = """
import os
sys.stdout.flush()
os._exit(0)
"""


def run_ranks(tmp_path, body, world_size=2, timeout=120, **variables):
    """Return the words that each rank printed; ``variables`` are added to its environment."""
    script = tmp_path / "rank.py"
    # a group cannot take over the file of one before
    store = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
    script.write_text(START + body + END)
    root = str(Path(fw.__file__).parents[1])
    tests = str(Path(__file__).parent)
    environment = {
        "PYTHONPATH": os.pathsep.join((root, tests)),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(store), str(world_size)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world_size)
    ]
    out = [process.communicate(timeout=timeout) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world_size, out
    return [text.split() for text, _ in out]
