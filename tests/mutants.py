"""Plants one small fault at a time in a copy of the sources, and says which of them no test notices.

    python tests/mutants.py              faults in Python and Triton
    python tests/mutants.py --only watch those in files, or of texts, with this word
    python tests/mutants.py --build      those in C++ too: each builds the extension, which takes minutes

Not a test: it takes half an hour on a quiet machine. A fault is a line of ``FAULTS``: the text that is replaced,
which must stand in its file exactly once, what replaces it, and the tests that should notice where they are not
those of the file. A text that is gone stops the script before anything is run; tests that fail without a fault
stop it, too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("fused_warmup", "tests", "csrc", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# a fault may make a loop endless
SECONDS = 900
SHARDS = "distributed/test_sharded_sharpness.py -k one_process"
AUTOWU = "tuning/test_autowu.py -k 'not digits'"
LARGE = "tuning/test_large_lr.py -k 'not digits and not ticks and not signatures and not held_out'"
REFINE = "tuning/test_refine.py -k 'not digits and not command'"
TUNING = "tuning/test_tuning.py"
SPHERE = "optim/test_sphere.py"
# what is the same for all rules and backends is tried with some
SOME = "-k 'not -reference and not spawned and not forked and not new_process and not LAMB and not RAdam and not amsgrad'"
STATES = f"optim/test_state_dict.py {SOME}"
SUMS, EDGES = "distributed/test_sums.py -k steps_are_those", "distributed/test_sums.py -k edges"
# what a user may give an optimizer, and do with it between steps
USES = " ".join(
    f"optim/test_{name}.py"
    for name in (
        "tensor_kinds",
        "changes_between_steps",
        "copies",
        "other_processes",
        "loaded_states",
        "hyper_parameters",
        "shared_memory",
        "param_groups",
        "step_counts",
        "autograd",
        "closures_and_hooks",
        "loss_scaling",
        "dtensors",
    )
)
SOME_USES = f"{USES} {SOME}"
PLACES = f"{SOME_USES[:-1]} and not odd_sizes and not disturb and not empty_tensors and not scalars and not flags_of and not maximize and not turned_on and not schedulers'"
PLAN = "plan/test_plan.py"
ERRORS = "optim/test_errors.py"
OUTSIDE = "optim/test_outside.py"
TORCH = "optim/test_torch_state.py"
HIDDEN = "optim/test_hidden_state.py"
LOCKSTEP = "optim/test_lockstep.py"
RESIDUES = "sharpness/test_residues.py"
GROWTH = "plan/test_growth.py"
ROUNDED = "optim/test_rounding.py -k 'not ten_thousand'"
KEPT = "optim/test_state_dtype.py"
# and a word of the test there that is for the fault
AVERAGES = "optim/test_averaging.py -k"
GRAD_DTYPES = "optim/test_grad_dtypes.py -k"
SCALER = "optim/test_grad_scaler.py -k"
STARTS = "optim/test_second_moment_starts.py -k"
SETTINGS = "optim/test_settings.py -k"
LOADS = "optim/test_state_dict_contents.py -k"
RECORD = "optim/test_telemetry_contents.py -k"
GROUPS = "plan/test_groups.py -k"
STALE = "plan/test_staleness.py -k"
PROBE = "sharpness/test_probe_measurements.py -k"
DECISIONS = "tuning/test_autowu_decisions.py -k"
REGIMES = "tuning/test_large_lr_regimes.py -k"
SEARCHES = "tuning/test_rate_searches.py -k"

# by file below fused_warmup or csrc, and the tests that should notice: lines of old text, new text, other tests
FAULTS: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("reference/rounding.py", ROUNDED): [
        ("ROUNDS = 7", "ROUNDS = 6"),
        ("(word + i * step) % 2**32", "word"),
        ("blocks >> 32 | stage << _PASS_BIT", "blocks >> 32"),
        ("torch.full_like(blocks, number)", "torch.zeros_like(blocks)"),
        ("(seed % 2**32, seed >> 32)", "(seed % 2**32, 0)"),
        ("16 * (elements & 1)", "0 * (elements & 1)"),
        ("(plain == 0.0) & (remainder < 0)", "plain != plain"),
        ("torch.where(value.to(param.dtype) == param, value, plain)", "value"),
        ("return torch.where(fits, rounded,", "return torch.where(fits | True, rounded,"),
        ("(bits + 0x8000) >> 16", "bits >> 16"),
        ("rounded.to(dtype), value.to(dtype))", "rounded.to(dtype), rounded.to(dtype))"),
        ("(bits & 0x1FFF)", "(bits & 0x0FFF)"),
        ("(units + bits) >> 16", "units >> 16"),
    ],
    ("distributed/spread.py", "distributed/test_rounded_shards.py"): [
        ("first += index * math.prod(param.shape[dim + 1 :])", "pass"),
        ("math.prod(local.shape[last:]), math.prod(param.shape[last:])", "local.numel(), local.numel()"),
    ],
    ("backends/reference.py", ROUNDED): [
        ("_store(plan, row, rescale(_value_of(row), factor), SPHERE_PASS)", "_store(plan, row, rescale(_value_of(row), factor), UPDATE_PASS)"),
        ("average_update(row.average, _value_of(row), weight)", "average_update(row.average, row.work.float(), weight)"),
        ("row.index, t, elements_of", "0, t, elements_of"),
        ("row.index, t, elements_of", "row.index, 0, elements_of"),
    ],
    ("plan/build.py", ROUNDED): [
        ("value_of(row.local.detach(), found)", "row.local.detach()"),
        ("            and taken.rounding == rounding\n", ""),
        ("row.local.copy_(param)\n    assert lacking", "assert lacking"),
        ('hyper.param_rounding == "split" and param.dtype == torch.float16', "False"),
    ],
    ("plan/plan.py", ROUNDED): [
        ("rounded: np.ndarray = codes * has_16_bits", "rounded: np.ndarray = codes"),
        ('columns["number"] = self.indices', "pass"),
        ("            and (columns[\"rounding\"] == self._roundings(hypers)).all()\n", ""),
    ],
    ("plan/state_cache.py", ROUNDED): [("ends = ends + kept", "pass")],
    ("optim/state_dict.py", ROUNDED): [
        ("if len(residues) > 1:", "if False:"),
        ("        return RESIDUES[MODE_OF_RESIDUE[key]][1]\n", "        return torch.float32\n"),
    ],
    ("optim/state_dict.py", KEPT): [
        ("if not isinstance(held, Tensor) or held.dtype != dtype:", "if not isinstance(held, Tensor):"),
        ("            check_rounding(owner, k, param, hyper)\n", "            pass\n"),
    ],
    ("backends/reference.py", KEPT): [
        ('_rounding(plan, row, "stochastic", stage)', '_rounding(plan, row, "stochastic", UPDATE_PASS)'),
        ("_propose(layered, param, grad, _states_of(row), s)", "_propose(layered, param, grad, layered.update_moments(param, grad, states, s), s)"),
        ("[state.to(compute_dtype(row.work.dtype)) for state in row.states]", "list(row.states)"),
    ],
    ("plan/build.py", KEPT): [
        ("            and taken.state_dtype == state_dtype\n", ""),
        ("hyper.rounded_state_dtype is not None and param.dtype == torch.float64", "False"),
        ("dict.get(own, name), row.state_dtype)", "dict.get(own, name))"),
    ],
    ("plan/plan.py", KEPT): [
        ('            and (columns["state_dtype"] == self._state_dtypes(hypers)).all()\n', ""),
        ('(columns["rounding"] != 0) | (columns["state_dtype"] == DTYPES[torch.bfloat16])', 'columns["rounding"] != 0'),
        (" & (codes == DTYPES[torch.float32])", ""),
    ],
    ("optim/adam.py", KEPT): [("dtype = compute_dtype(row.work.dtype)", "dtype = exp_avg_sq.dtype")],
    ("optim/session.py", ROUNDED): [("del own[name]", "pass")],
    ("optim/exact.py", ROUNDED): [
        ("if value.shape != param.shape:", "if False:"),
        ("local_tensor(residue).copy_(lacking)", "pass"),
    ],
    ("plan/state_checks.py", f"{TORCH} {OUTSIDE}"): [
        ("or count != int(count)", ""),
        ("not 0 <= count < COUNT_LIMIT", "not count < COUNT_LIMIT"),
        ("if local.is_meta:", "if False:"),
        ("not 0.0 <= norm < math.inf", "not norm < math.inf"),
        ("torch.Size(), torch.float64, device)", "torch.Size(), value.dtype, device)"),
        ("if value.shape != param.shape:", "if False:"),
        ("local.is_complex() or local.is_quantized", "local.is_quantized"),
    ],
    ("optim/counts.py", f"{GROWTH} {LOADS} beyond_those"): [
        ("self._made_of is not self.exact", "self._made is None", "optim/test_state_dict.py -k memory_in_use"),
        ("found = held.to(device).index_select(0, send(slots[kept], device))", "found = held[: len(kept)] * 0", f"{GROWTH} {LOADS} beyond_those"),
        ("exact[:, 0] = made", "pass", f"{LOADS} beyond_those"),
        ("self.steps.get(key) is row.step", "True", SOME_USES),
        ('self.exact = state["exact"]', "pass", f"{LOADS} beyond_those"),
    ],
    ("plan/overlaps.py", "plan/test_overlaps.py"): [
        ("np.maximum.accumulate(begins + reaches[order])", "begins + reaches[order]"),
        ("begins[0] + stride)", "begins[0] + 2 * stride)"),
        ("if stride == 0 or any(own != stride for own, _ in outer):", "if stride == 0:"),
        ("order = np.argsort(offsets % stride, kind=\"stable\")", "order = np.arange(len(offsets))"),
        ("[*offsets.tolist(), *strides, *sizes]", "[*strides, *sizes]"),
        ("        own.fill_(True)\n", ""),
    ],
    ("plan/state_cache.py", f"{HIDDEN} {GROWTH}"): [
        ("if state is not self._state or", "if"),
        ("beyond(self._plain, _OWN_REFERENCES)", "False"),
        ("beyond(self._counts, _COUNT_REFERENCES)", "False"),
        ("self._reader.states_unchanged([self._state] * len(self._own), self._params, self._own)", "True"),
        ("any(beyond(own, _DICT_REFERENCES + n) for n, own in self._sized.items())", "False"),
        ("len(self._state) == self._length and", ""),
        ("return None if moved is None else len(moved) > 0", "return False", f"{PLAN} {PLACES} {GROWTH}"),
        ("        self._cache.accept()\n        self.fill(columns)\n", "        self._cache.accept()\n", GROWTH),
        ("addresses[ends + averaged]", "addresses[ends]", GROWTH),
        ("row.initialized = bool(dict.get(own, \"initialized\", False))", "pass", f"{STARTS} a_start_from_gradients"),
    ],
    ("plan/tensors.py", "distributed/test_processes.py -k placements"): [("    if wanted == got:\n", "    if True:\n")],
    ("distributed/groups.py", "distributed/test_processes.py -k averages"): [
        ("            module.reshard()\n", "            pass\n"),
        ("                _reshard(module, handle, True)\n", "                pass\n"),
    ],
    ("optim/averaging.py", "distributed/test_processes.py -k averages"): [(" and not stays", "")],
    ("distributed/groups.py", "distributed/test_processes.py -k shards"): [
        ('"_fsdp_flattened"', '"_flattened"'),
        ("return None if frame is None else", "return None if True else"),
    ],
    ("distributed/reduction.py", SUMS): [
        ("            if mask is not None:\n", "            if False:\n"),
        ("[frozenset(groups)] * _FLAGS", "[frozenset()] * _FLAGS", EDGES),
        ("if norms and not self.is_known:", "if False:", EDGES),
    ],
    ("distributed/spread.py", SUMS): [
        ("any(dim != 0 for _, dim in cuts)", "False"),
        ("first + each * mesh.get_local_rank(i)", "first + each"),
    ],
    ("plan/plan.py", SUMS): [
        ("squares and not layers", "False"),
        ("if measures or self.scaling[1] is not None:", "if measures:", EDGES),
        ("some = found_inf or self.reduction is not None", "some = found_inf", EDGES),
    ],
    ("optim/session.py", OUTSIDE): [
        ("or self._counted is not counters", "", "optim/test_state_dict.py -k memory_in_use"),
        ("if self.average != self.planned_average:", "if False:", f"{PLAN} optim/test_averaging.py"),
        ("or skip or plan.groups.random_start", "or skip", f"{STARTS} applied"),
        ("float(row.param.numel()))", "0.0)", f"{STARTS} applied"),
        ('    "counters",\n', "", "optim/test_state_dict.py optim/test_torch_calls.py"),
        ("or self.backend_device != device:", "or False:", "backends/test_cuda_errors.py"),
        ("not 0 < size <= len(rates)", "not size <= len(rates)", f"{GROUPS} without_any_group"),
    ],
    ("optim/losses.py", f"{OUTSIDE} tuning/test_ascent.py tuning/test_loss_forms.py -k losses"): [
        ("loss.numel() > 1 and not", "False and not", OUTSIDE),
        (".double().mean()", ".double().sum()", OUTSIDE),
        ('in "iuf"', 'in "f"'),
        ("loss.is_complex() or loss.dtype == torch.bool", "loss.dtype == torch.bool"),
    ],
    ("optim/state_dict.py", STATES): [
        ("loaded.update(fixed)", "pass", OUTSIDE),
        ("session.state.update(others)", "pass", TORCH),
        ("else copy.deepcopy(value)\n", "else value\n", TORCH),
        ('list(dict.fromkeys(group["params"]))', 'list(group["params"])', "optim/test_torch_contract.py -k tied"),
        ("held is not None and not live", "not live", OUTSIDE),
        ("session.average_settings.due_count(calls)", "0", OUTSIDE),
        ('torch.as_tensor(packed["norm"]).clone()', 'packed["norm"]', SPHERE),
        ("packed[key] = texts[id(schedule)]", "pass", STATES),
        ("{**own, **positions}", "{**positions, **own}", STATES),
        ("first += len(ids)\n        packed", "first += len(own)\n        packed", STATES),
        (" or isinstance(key, Tensor) else", " else", STATES),
        ("max(told, default=0)", "0"),
        ("_is_filled(buffer)", "False"),
        ("drawn + started if drawn else 0.0", "0.0", "distributed/test_checkpoints.py"),
        ('"counters": session.counters', '"counters": session.counters.clone()', f"{LOADS} saved_state"),
        ('"init_norm_sq": session.init_norm_sq', '"init_norm_sq": 0.0', f"{STARTS} random_start"),
        ("made[same] if same in made else restored(", "restored(", AUTOWU),
        ("value.detach().clone() if isinstance(value, Tensor)", "value if isinstance(value, Tensor)", f"{LOADS} saved_state"),

        ("held.copy_(norm)", 'group["norm"] = norm', SPHERE),
        ("count if float(np.float32(count)) == step else step", "step", f"{LOADS} beyond_those"),
        ('int("step" not in saved or _is_filled(buffer))', "0", f"{STATES} {USES}"),
        ('"counted": "step" in saved', '"counted": True', f"{LOADS} counts_of_torch"),
        ('bool(saved.get("initialized", False))', "False", f"{STARTS} unloaded"),

        ('keep.pop("average", None)', "pass", f"{LOADS} does_not_have"),
        ('keep["average"], n_averaged = param, 0', "n_averaged = 0"),
        ("set(state) - set(keep)", "set()", f"{LOADS} does_not_have"),

        ("session.state.pop(param, None)", "pass", f"{LOADS} does_not_have"),
        ("max([updates, *(", "min([updates, *(", f"{LOADS} counts_of_torch"),
        ("    session.reset()", "    pass", f"{STARTS} unloaded"),
        ('float(own.get("init_norm_sq", 0.0))', "0.0", f"{STARTS} random_start"),
        ('own.get("rule") != rule', "False", ERRORS),
        ("value.shape != param.shape", "value.numel() != param.numel()", f"{LOADS} rule_or_shape"),
        ("session.telemetry.kept_rows()", "session.telemetry.rows()[:1024]", OUTSIDE),
        ("rows if rows is not None else", "rows if rows is None else"),
        ("key not in spec.states]", "False]", f"{LOADS} rule_or_shape"),
        ("and key not in spec.optional_states]", "and False]", ERRORS),
        ("held.load_state_dict(new.state_dict())", "pass", AUTOWU),
        ('return {**loaded, "schedule": held}', "return loaded", AUTOWU),
    ],
    ("plan/address_cache.py", PLAN): [
        ("type(t) in self._types[i] and", ""),
        ("self._kept.append(t)", "pass", f"{STALE} released"),
        ("return self.find_moved() if among and len(moved) else moved", "return moved", f"{GROWTH} -k gradient"),
        ("if wanted is not None and not wanted[i]:", "if False:", f"{GROWTH} -k gradient"),
        ("np.flatnonzero(self.now != self.addresses)", "np.zeros(0)", f"{PLAN} {SOME_USES}"),
        ("self._signatures.read(tensors, added.ctypes.data)", "pass", f"{PLAN} {SOME_USES}"),
        ("if self.now.tobytes() == self._known:", "if True:", f"{PLAN} {SOME_USES}"),
        ("self.addresses[:] = self.now\n        self._known = self.addresses.tobytes()", "self.addresses[:] = self.now", f"{PLAN} -k returns"),
        ("[len(a) for a in now] == [len(b) for b in members]", "len(now) == len(members)", f"{STALE} groups_that"),
        ("p is q for a, b", "p is p for a, b", f"{STALE} groups_that"),
        ("dict.get(d, key) is value", "key in d", f"{STALE} entries_that"),
    ],
    ("plan/plan.py", f"{PLAN} {PLACES}"): [
        ("if check_states and not self.states.has_objects():", "if False:"),
        ("check_states or self.gradients.odd or", "check_states or", f"{GROWTH} -k gradient"),
        ("or self.average.kind is not None or self.groups.has_spheres", "", f"{GROWTH} -k gradient"),
        ("check_disjoint(self.owner, self.rows, self._param_cache.now, self._reaches)", "pass", "plan/test_overlaps.py"),
        ('self._columns["param"] = _work_addresses(self.rows, self._param_cache.addresses)', "pass", GROWTH),
        ("self.arrivals = np.flatnonzero(self.gradients.present & self._reserved)", "pass", GROWTH),
        ('self.buffers.rewrite("rows", positions)', "pass", "plan/test_capture.py"),
        ("any(local_tensor(row.param) is not row.local for row in self._shards)", "False", f"{STALE} shard_that"),
        ("            self._kinds = None\n", "            pass\n", "interpreted.py -k dtype_and_back"),
        ("        if self.groups.has_spheres:\n            changed |=", "        if False:\n            changed |=", f"{SPHERE} {SOME_USES}"),
        ("grad_scale is self.scaling[0] and found_inf", "found_inf"),
        ("found_inf is self.scaling[1]", "True"),
        ("if settings == self.settings:", "if settings.measure == self.settings.measure:", f"{SETTINGS} measured_anyway"),
    ],
    ("plan/captured.py", "plan/test_capture.py"): [
        ("if torch.equal(slot, held):", "if True:"),
        ("        self._used += 1\n", ""),
        ("if self._used == len(slots):", "if False:"),
    ],
    ("plan/plan.py", "plan/test_capture.py -k 'recorder or graph or pattern or captures or moved'"): [
        ('        array["grads"] = address_of(column) + array.nbytes\n', ""),
        ('array["grads"], self.gradients.is_stale, self._captured_step = grads, is_stale, None', "pass"),
        ("self.gradients.is_stale = n_rows <= max_pointers", "self.gradients.is_stale = False"),
        ("            self._captures.reserve()\n", "            pass\n"),
    ],
    ("plan/groups.py", "plan/test_capture.py -k schedule"): [
        ("value if all(map(is_, value, read)) else read", "value", "plan/test_groups.py"),
        ('        segments["table"] += np.uint64(self._send_schedules("values", values))\n', ""),
        ("pack_rows(self.hypers, self._places, self._segments)", "pack_rows(self.hypers, self._places, 0)"),
    ],
    ("optim/session.py", "plan/test_capture.py -k 'goes_on'"): [
        ("follows = len(self.param_groups) == len(plan.groups.norms)", "follows = True"),
        ("follows = follows and self._fits(plan)", "pass"),
        ("self._options == self.captured_options", "True"),
    ],
    ("plan/gradients.py", PLAN): [
        ("        self._recast |= recast\n", "        self._recast = recast\n", "plan/test_capture.py -k dtype"),
        ("recast = cast != self._cast", "recast = bool(cast)", f"{GRAD_DTYPES} dtype_and_back"),
        ('self._columns["grad_dtype"] = self._columns["dtype"]', "pass", f"{GRAD_DTYPES} dtype_and_back"),
    ],
    ("plan/groups.py", PLAN): [
        ("self._values = [None] * len(self._values)", "pass", AUTOWU),
        ("return list(map(_read, value)) if isinstance(value, Sequence) else object()", "return value", HIDDEN),
        ("if not changed and readings is self._values:", "if readings is self._values:", HIDDEN),
        ("return check.on_host(value, object())", "return object()", "plan/test_groups.py"),
        ("if old is None or now[1:] != old[1:]:", "if True:", "plan/test_groups.py"),
        ("if any(_schedules(h) != _schedules(old[i]) for i, h in made.items()):", "if made:", "plan/test_groups.py"),
        ("if any((h.sphere, h.radius) != (old[i].sphere, old[i].radius)", "if any(False", "plan/test_groups.py"),
    ],
    ("plan/tracked_states.py", HIDDEN): [
        ("    states.access.noted = True\n    return", "    return", "optim/test_state_dict.py -k access"),
        ("                self.access.replaced = True", "                pass"),
        ("            self.access.noted = True", "            pass"),
        ("        access.noted = True", "        pass"),
        ("def __iter__(self) -> Iterator[Any]:\n        \"\"\"Iterate over the parameters;", "def _iterate(self) -> Iterator[Any]:\n        \"\"\"Iterate over the parameters;"),
        ("return pair in dict.items(self._mapping)", "return super().__contains__(pair)"),
        ("merged: defaultdict[Any, Any] = self.copy() | other", "merged = super().__or__(other)"),
    ],
    ("plan/spec.py", HIDDEN): [
        ("if self.scalar_states:", "if False:"),
        ("if len(self.states) != self.rule.max_states", "if False"),
        ("if name is not None and name not in self.states:", "if False:"),
        ("if not hasattr(self.rule, name):", "if False:"),
    ],
    ("optim/base.py", f"{PLAN} {PLACES}"): [
        ("profiler._is_profiler_enabled or ", "", "optim/test_torch_calls.py -k profilers"),
        ("if not set_to_none or profiler._is_profiler_enabled", "if not set_to_none", "optim/test_torch_calls.py -k profilers"),
        ("not set_to_none or profiler", "profiler", "optim/test_torch_calls.py -k let_go"),
        ("self._optimizer_step_pre_hooks\n            or ", "", "optim/test_torch_calls.py -k hook_alone"),
        ("or optimizer._global_optimizer_post_hooks", "", "optim/test_torch_calls.py -k hook_alone"),
        ("state_dict = state_dict if replaced is None else replaced", "pass", f"{LOADS} hook_before"),
        ("post_hook(self)", "pass", SOME_USES),
        ("if not self._session.update_captured():\n            warnings", "if False:\n            warnings", "plan/test_capture.py"),
        ("if not self._session.update_captured():\n            raise", "if False:\n            raise", "plan/test_capture.py"),

        ("if value is not None:", "if isinstance(value, torch.Tensor):", f"{RECORD} as_a_number"),
        ("session.load_kernels(plan, backend)", "pass", "backends/test_cuda_errors.py"),
        ("        except Exception:\n            plan.release()\n", "        except Exception:\n", "backends/test_cuda_errors.py"),
    ],
    ("optim/adam.py", "backends/test_reference.py"): [
        ("init_exp_avg_sq(param, grad, hyper, weight_decay, clip_coef)", "init_exp_avg_sq(param, grad, hyper, weight_decay, 1.0)"),
        ('self.state[row.param]["initialized"] = True', "pass"),
        ("if any(row.step is not None and int(row.step) for row, _ in active)", "if any(row.step is not None and int(row.step) for row in plan.rows)", f"{STARTS} init_from_gradients"),
        ("if grad is not None]\n        if not active", "]\n        if not active", f"{STARTS} init_from_gradients"),
    ],
    ("plan/build.py", f"{PLAN} {PLACES}"): [
        ("wanted = [every or hyper.sphere for hyper in hypers]", "wanted = [every for hyper in hypers]", SPHERE),
        ("        row.step.zero_()\n", "        pass\n", f"{PLAN} {SOME_USES} backends/test_reference.py"),
        ("if tensors.fits(state, row.local, spec.by_channel, dtype):", "if True:"),
    ],
    ("optim/averaging.py", "optim/test_averaging.py"): [
        ('"EMA", self.decay, self.every, self.every', '"EMA", self.decay, 1, self.every'),
        ('"SWA", 0.0, self.start, self.every', '"SWA", 0.0, self.every, self.every'),
        ("dense = param.stride() == average.stride()", "dense = True", f"{AVERAGES} strided_view"),
        ("param.data if dense else param.data.clone()", "param.data"),
        ("param.data = average.to(param.dtype)", "param.data = average"),
        ("param.data.copy_(average)", "pass"),
        ("for param, kept, dense in reversed(undo)", "for param, kept, dense in reversed(undo[1:])"),
        ('check.number("EMA", "decay", self.decay, 0.0, 1.0, ends="[]")', "pass", ERRORS),
        ('check.whole("SWA", "every", self.every, 1)', "pass", ERRORS),
    ],
    ("optim/telemetry.py", "optim/test_telemetry.py"): [
        ("if self._uncopied == _CAPACITY:", "if self._uncopied == _CAPACITY + 1:"),
        ("max(self._calls, calls - _CAPACITY)", "self._calls"),
        ("if not self._loaded or calls - self._loaded >= _CAPACITY:", "if True:"),
        ("return np.concatenate([ring_buffer[begin:], ring_buffer[:beyond]])", "return ring_buffer"),
        ("rows = _between(ring_buffer, first, calls)", "rows = _between(ring_buffer, first + 1, calls + 1)"),
        ("self._copies.clear()\n        self._uncopied = 0", "self._uncopied = 0"),
        ("_calls = self._loaded = len(rows)\n        self._write(loaded, later=True)\n        return self._calls", "_calls = len(rows)\n        return 0", STATES),
        ("self._copies.append(_Copy(self.ring_buffer, self._counters))", "pass"),
        ("and self._copies[0].is_complete()", ""),
        ("copy = self._copies.popleft()", "copy = self._copies[0]; self._copies.clear()"),
        ("min(self._wait() - self._calls, _CAPACITY)", "self._wait() - self._calls"),
        ("calls > self._calls:\n            # this row", "calls >= self._calls:\n            # this row"),
        ("None if self._keep_all else _CAPACITY)", "_CAPACITY)"),
        ("self._rows.last(None if self._keep_all else _CAPACITY)", "self.rows()[-_CAPACITY:]"),
        ("None if keep_all else _KEPT", "None"),
        ("self._rows = _KeptRows(None if self._keep_all else _KEPT)", "self._rows = _KeptRows(None)"),
        ("rows = rows[-self.limit :] if self.limit is not None else rows", "pass"),
        ("grown[: self.added] = self.buffer[: self.added]", "pass"),
        ('if name not in ("_stream", "_view")', ""),
        ('("_stream", "_view")', '("_stream",)', "optim/test_state_dict.py -k copies"),
        ("view is None or viewed is not ring_buffer", "view is None", "optim/test_state_dict.py -k memory_in_use"),
        ("updates - int((rows[:, _SKIPPED] == 0.0).sum())", "updates - len(rows)"),
        ("        if self._stream is not None:\n            self._collect()\n        loaded =", "        loaded ="),
        ("rows = rows[rows[:, _STEP] > stream.last_step]", "pass"),
        ("            self._write(_on_host(self._rows.last(None)), later=True)", "            pass"),
        ("if len(rows) and self.is_owned():", "if len(rows):"),
        ("self.last_step = float(rows[-1, _STEP])", "pass"),
        ("file.truncate(file.seek(0, os.SEEK_END) - len(incomplete))", "pass"),
        ('or not header.endswith("\\n")', ""),
        ("@atexit.register", ""),
        ("slot.fill_(value)", "pass"),
        ("self.pending_scalars.device != device", "False", f"{RECORD} on_a_device"),
    ],
    ("reference/schedules.py", "schedules/test_schedules.py optim/test_averaging.py"): [
        ("and t >= segment.steps:", "and t > segment.steps:"),
        ("        return end\n", "        return start\n"),
        ("    if not segments:\n        return 1.0", "    if not segments:\n        return 0.0", "backends/test_backends.py -k trajectory"),
        ("and t >= begin + (segments", "and t > begin + (segments"),
        ("step >= start", "step > start"),
        ("(step - start) % every == 0", "step % every == 0", f"{AVERAGES} whose_period"),
        ("1.0 if n_averaged == 1 else 1.0 - decay", "1.0 - decay"),
    ],
    ("distributed/agreement.py", "distributed/test_adaptive.py"): [
        ("if all(torch.equal(digest, own) for digest in digests):", "if True:", "distributed/test_adaptive.py -k differ"),
        ('dist.new_group(backend="gloo", timeout=TIMEOUT)', "dist.group.WORLD", "distributed/test_adaptive.py -k one_rank"),
    ],
    ("sharpness/shards.py", SHARDS): [
        ("        reduction.add_up(squares=True)\n", "        pass\n"),
        ("local_tensor(placed(v.view(p.shape), p)).reshape(-1)", "v[: local_tensor(p).numel()]"),
    ],
    ("sharpness/loss_evaluator.py", SHARDS): [
        ("                p.grad = grad\n        return", "                pass\n        return"),
        ("        for module in self._gathering:\n            reshard(module)\n", "        pass\n"),
        ("self.autocast = self.autocast or computes_in_16_bits(module)", "pass"),
    ],
    ("sharpness/pending_step.py", SHARDS): [
        ("self.shards.total([dot(g.double(), g.double()) for g in grads])", "sum(dot(g.double(), g.double()) for g in grads)"),
    ],
    ("sharpness/vectors.py", RESIDUES): [
        ("values = map(value_of, self.snapshot, self.residues)", "values = self.snapshot"),
    ],
    ("sharpness/pending_step.py", RESIDUES): [
        ("value_of(m.param.detach(), m.residue).to", "m.param.detach().to"),
    ],
    ("sharpness/operators.py", RESIDUES): [("pending.backend, reduce, residues)", "pending.backend, reduce)")],
    ("sharpness/loss_evaluator.py", RESIDUES): [
        ("ShardedVectors(self.shards, self.snapshot, self.dtype, self._residues)", "ShardedVectors(self.shards, self.snapshot, self.dtype)", "distributed/test_sharded_sharpness.py -k exact"),
        ("return Vectors(self.params, self.snapshot, self.dtype, self._residues)", "return Vectors(self.params, self.snapshot, self.dtype)"),
    ],
    ("plan/vector_tables.py", RESIDUES): [('self._slices["rounding"][i] = ROUNDINGS[residue.mode]', "pass")],
    ("plan/residues.py", RESIDUES): [
        ("(RESIDUES[mode][0], *MODE_OF_RESIDUE)", "(RESIDUES[mode][0],)"),
        ("or mode not in RESIDUES:", "and mode not in RESIDUES:"),
        ("held.dtype != dtype or ", ""),
        (" or not same_layout(held, local)", ""),
    ],
    ("optim/adam.py", RESIDUES): [("row.value.to(", "row.work.to(")],
    ("sharpness/probe.py", "sharpness/test_probe.py"): [
        ("a.largest > b.largest", "a.largest < b.largest", f"{PROBE} larger_of"),
        ("torch.where(better, a.residual, b.residual)", "b.residual", f"{PROBE} larger_of"),
        ("torch.zeros_like(spectrum.vector) if old is None else old", "torch.zeros_like(spectrum.vector)", f"{PROBE} vector_survives"),
        ("fine & (error > 1e-2), 0.5 if", "fine & (error > 1e-2), 1.0 if", f"{PROBE} too_long"),
        ("0.5 if shorten else 1.0", "0.5", f"{PROBE} too_long"),
        ("torch.where(spectrum.largest == 0.0, 0.0, error)", "error", f"{PROBE} too_long"),
        ("torch.where(fine, error, old)", "error", f"{PROBE} too_long"),
        (".clamp(min=0.0)", "", f"{PROBE} is_smoothed"),
        ("torch.where(old.isfinite(), _MEMORY", "torch.where(old.isnan(), _MEMORY", f"{PROBE} batch_error"),
        ("torch.where(gap.isfinite(), smooth, old)", "smooth", f"{PROBE} is_smoothed"),
        ("(vectors.length, vector.dtype) == known", "vector.dtype == known[1]", f"{PROBE} other_parameters"),
        ("(vectors.length, vector.dtype) == known", "vectors.length == known[0]", f"{PROBE} other_parameters"),
        ("self.optimizer, self._use_grad)", "self.optimizer, True)", f"{PROBE} arguments_of"),
        ("pending.sign, self._stretch)", "1.0, self._stretch)", f"{PROBE} arguments_of"),
        ('manual_seed(check.whole(name, "seed", seed))', "manual_seed(0)", f"{PROBE} arguments_of"),
        ("self._calls - 1 if isinstance", "self._calls if isinstance", f"{PROBE} audits_and"),
        ("number.bool()", "number", f"{PROBE} search_was_locked"),
        ("unseen=torch.where(better, a.unseen, b.unseen)", "unseen=b.unseen", f"{PROBE} larger_of"),
    ],
    ("backends/triton/rules.py", "interpreted.py -k 'one_step_from_the_same_state and float32'"): [
        ("near = (x > -1.0) & (u != 1.0)", "near = u != 1.0", "interpreted.py -k scalars"),
        ("tl.where(positive, -expm1(", "tl.where(True, -expm1(", "interpreted.py -k scalars"),
        ("s.exp_avg_sq_scale * exp_avg_sq,", "exp_avg_sq,", "interpreted.py -k second_moments"),
        ("return tl.where(x > high, high, x)", "return x", "interpreted.py -k wnorm_clip1"),
        ("& (param_norm != 0.0)", "", "interpreted.py -k without_a_ratio"),
        ("tl.where(grad_norm > h.eps, grad_norm, h.eps)", "grad_norm", "interpreted.py -k right_angles"),
        ("* tl.sqrt(size.to(tl.float64)) <", "<", "interpreted.py -k 'one_step_on_a_sphere and adamp'"),
        ("& (sum_sq < float(\"inf\"))", "", "interpreted.py -k 'infinite or norm_that_is_none'"),
        ("defined = (sum_sq > 0.0)", "defined = (sum_sq >= 0.0)", "interpreted.py -k 'infinite or norm_that_is_none'"),
        ("tl.where(weight < 0.5, weight, weight - 1.0)", "weight", "interpreted.py -k that_jump"),
        ("tl.where(weight < 0.5, weight, weight - 1.0)", "weight - 1.0", "interpreted.py -k that_jump"),
        ("exp_avg_sq_scale=s.exp_avg_sq_scale * 0.0 + 1.0", "exp_avg_sq_scale=s.exp_avg_sq_scale", "interpreted.py -k a_look_at"),
    ],
    ("backends/triton/launch.py", "backends/test_triton_compile.py -k kept_launches"): [
        ("kept is None or kept[0] != properties", "kept is None"),
        ("[constants[name] for name in kernel.arg_names[1:]]", "list(constants.values())", "backends/test_triton_compile.py -k later_steps"),
    ],
    ("backends/__init__.py", "backends/test_triton.py -k found_out_once"): [
        ("_triton_problem(\"cpu\" if", "None if True else (\"cpu\" if"),
        ("if release < OLDEST_TRITON:", "if False:", "backends/test_triton.py -k old_triton"),
    ],
    ("backends/triton/schedules.py", "interpreted.py -k 'test_schedules'"): [
        ("(segment.steps > 0) & (t >= segment.steps)", "(segment.steps > 0) & (t > segment.steps)"),
        ("tl.where(begun & (t >= begin), j, i)", "tl.where(begun & (t > begin), j, i)"),
        ("(step >= start)", "(step > start)", "interpreted.py -k weights_of"),
        ("((step - start) % every == 0)", "(step % every == 0)", "interpreted.py -k weights_of"),
        ("1.0 / n.to", "1.0 / (n + 1).to", "interpreted.py -k weights_of"),
    ],
    ("backends/triton/rounding.py", "interpreted.py -k random_bits"): [
        ("| (STAGE << 28)", ""),
        ("index * row.run_stride +", "index * row.run +"),
        ("tl.join(tl.join(a, c), tl.join(b, d))", "tl.join(tl.join(a, b), tl.join(c, d))"),
        ("return row.residue | (row.first_element | runs)", "return row.residue | row.first_element", "interpreted.py -k counter_does"),
        ("STATE_PASS + j, ALIGNED", "STATE_PASS, ALIGNED", "interpreted.py -k 'states_have_the_bits and adam-'"),
        ("kept = kept + (number(stored, STATE_DTYPE),)", "kept = kept + (values[j],)", "interpreted.py -k layers_are_scaled"),
        ("kind = kind & (row.state_dtype == KINDS[k][3])", "pass", "interpreted.py -k every_rounding_mode"),
        ("return tl.where(holds, value, plain)", "return value", "interpreted.py -k vectors_begin"),
        ("tl.where(is_small, small, normal)", "normal", "interpreted.py -k 'stored_and_loaded and stochastic'"),
        ("return tl.where(fits, rounded, truncated)", "return rounded", "interpreted.py -k 'stored_and_loaded and kahan'"),
    ],
    ("backends/triton/sphere.py", "interpreted.py -k 'rounded_parameters and stochastic and sphere'"): [
        ("ROUNDING, SPHERE_PASS, C", "ROUNDING, 0, C"),
    ],
    ("backends/triton/decide.py", "interpreted.py -k scaled_gradients"): [
        ("part.l1 * decision.unscale", "part.l1"),
        ("decision.grad_norm * decision.clip_coef", "decision.grad_norm", "interpreted.py -k second_moments"),
    ],
    ("backends/triton/reduce.py", "interpreted.py -k 'rows_of_every'"): [
        ("(part % GRAIN == 0)", "True"),
        ("& (chunk.offset % GRAIN == 0)", "", "interpreted.py -k odd_channels"),
        ("| (part == chunk.count)", "", "interpreted.py -k vectors_of"),
    ],
    ("backends/triton/layerwise.py", "interpreted.py -k 'rows_of_every and (lamb or channels)'"): [
        ("(skipped > 0)", "(skipped >= 0)", "interpreted.py -k 'trajectory and lamb-l2'"),
        ("(skipped > 0)", "(skipped < 0)"),
        ("combine(load_struct(step.partials, index, \"Partial\"), norms)", "norms"),
        ("sum_sq += stage2_tiles(", "sum_sq = stage2_tiles(", "interpreted.py -k 'on_a_sphere and lamb'"),
    ],
    ("backends/triton/reduce.py", "interpreted.py -k norms_of_every"): [
        ("(part.l2_sq >= 2.0**-80) | (part.l1 == 0.0)", "part.l2_sq >= 0.0"),
        ("tl.fma(a, b, -added) +", "(a * b - added) +"),
        (" + (pair[0] - old))", ")"),
        ("pair[0].to(tl.float64) + pair[1].to(tl.float64)", "pair[0].to(tl.float64)"),
    ],
    ("backends/triton/vectors.py", "interpreted.py -k vectors_begin"): [
        ("moved(start, size", "moved(value, size"),
    ],
    ("backends/triton/step.py", "interpreted.py -k norms_of_every"): [
        ("vector_alignment(row, rounds_anything(KINDS))", "0", "interpreted.py -k 'states_of_parts and adam'"),
        ("part = within_range(part,", "within_range(part,"),
    ],
    ("backends/threads.py", "optim/test_fork.py"): [
        ("1 if _pool.lost else max(", "max("),
        ("self.lost = self.lost or self.used", "self.lost = True"),
    ],
    ("backends/reference.py", "optim/test_loss_scaling.py -k scaler"): [
        ("grad_norm * unscale, grad_norm_l1 * unscale", "grad_norm * unscale, grad_norm_l1", f"{SCALER} scaled_gradients"),
    ],
    ("reference/rules.py", "optim/test_sphere.py"): [
        ("sum_sq < math.inf", "True"),
        ("CHANNEL_VIEW if channels_invariant else view", "view", "optim/test_layers.py -k golden"),
        ("LAYER_VIEW if layer_invariant else NO_VIEW", "NO_VIEW", "optim/test_layers.py -k golden"),
        ("h.init_scale * grad_norm * grad_norm", "h.init_scale * grad_norm", "backends/test_reference.py -k random_init"),
        ("1.0 if ratio >= 1.0 else ratio", "ratio", "backends/test_reference.py -k separate_batch"),
    ],
    ("tuning/warmup/initial_lr.py", TUNING): [
        ("min(upper, target) / 2.0", "min(upper, target) / 4.0", f"{SEARCHES} rates_that"),
        ("if upper >= target:", "if upper > target:", f"{SEARCHES} rates_that"),
        ("rise <= accepted", "rise < line.start"),
        ("    line.forwards = 0\n", ""),
        ('("target",) if upper == target else ()', "()", f"{SEARCHES} rates_that"),
        ("1.0 if target <= critical else", "1.0 if target < critical else", f"{SEARCHES} target_saves"),
        ('check.whole("saved_steps", "forwards", forwards) / 2.0', 'check.whole("saved_steps", "forwards", forwards)'),
        ("line.loss(min(upper, target))", "line.loss(upper)", f"{SEARCHES} rates_that"),
        ("if loss < line.start:", "if loss <= line.start:", f"{SEARCHES} as_high_as"),
        ("if not rise < line.start:", "if rise > line.start:", f"{SEARCHES} rates_that"),
        ('check.number(owner, "target", target, start)', 'check.number(owner, "target", target, 0.0)'),
        ('RateSearch(math.nan, 0.0, math.inf, 0, ("nonfinite",))', 'RateSearch(math.nan, 0.0, math.inf, 0, ())'),
        ("return RateSearch(target, target, math.inf", "return RateSearch(target, lower, math.inf", f"{SEARCHES} rates_that"),
    ],
    ("sharpness/line_search.py", f"{TUNING} -k batch"): [
        ("len(closures) * found.forwards + ", "found.forwards + "),
        ("return sum(others, first) / len(closures)", "return sum(others, first)"),
        ("itertools.combinations(rates, 2)", "itertools.pairwise(rates)"),
        ("own = Line(evaluator, pending, line)", "own = Line(evaluator, pending)"),
    ],
    ("tuning/warmup/persistent_catapult.py", TUNING): [
        ("value < self.best or not", "value <= self.best or not", f"{SEARCHES} catapult"),
        ("type(self).__name__, self.lr or self.start", "type(self).__name__, self.start", f"{SEARCHES} catapult"),
        ("value if math.isfinite(value) and", "value if", f"{SEARCHES} catapult"),
        ("given / self._given[0] if", "1.0 if", f"{SEARCHES} catapult"),
        ('group["lr"].fill_(lr)', 'group["lr"] = lr', f"{SEARCHES} catapult"),
        ("average(shared)", "pass", f"{SEARCHES} catapult"),
        ("torch.float64, copy=True)", "torch.float64)", f"{SEARCHES} catapult"),
        ("self.forwards += found.forwards", "self.forwards = found.forwards"),
        ('"target", "start", "tolerance")', '"target", "start")', f"{SEARCHES} catapult"),
        ("if math.isfinite(found.value):", "if True:", f"{SEARCHES} catapult"),
    ],
    ("_checks.py", "tuning/test_autowu.py -k bad_states"): [
        ('{"version", *keys} - set(value)', "set(keys) - set(value)"),
    ],
    ("tuning/refinement/norms.py", REFINE): [
        ("norms[skipped == 0.0]", "norms"),
        ("len(norms) < 2", "len(norms) < 1"),
    ],
    ("tuning/refinement/refine.py", REFINE): [
        ("max(float(np.finfo(np.float64).tiny), least * float(np.median(kept)))", "least * float(np.median(kept))"),
        ("len(places) == n == steps", "n == steps"),
        ("int(_START * length)", "0"),
        ("peak > _LATEST_PEAK", "peak > 0.9"),
        ("np.append(tails[1:], 0.0) if zero_last else tails", "np.append(tails[1:], 0.0)"),
        ("np.exp(np.interp(at, known, np.log(values)))", "np.interp(at, known, np.log(values))"),
        ("max(1, round(_FALLBACK_WARMUP * length))", "round(_FALLBACK_WARMUP * length)"),
        ("np.full(half, values[0])", "np.full(half, values[half])"),
        ("max(1, 2 * (n - 1))", "2 * (n - 1)"),
    ],
    ("tuning/autowu/loss_buffer.py", AUTOWU): [
        ("self.filled = 0\n        host", "host"),
        ("self.values = self.values.to(device)", "pass", f"{RECORD} on_a_device"),
        ("self.values[-1].copy_(made)", "self.values[-1] = 0"),
    ],
    ("tuning/large_lr/geometry.py", LARGE): [
        (".detach().double() for state in states", ".detach() for state in states", f"{REGIMES} means_of"),
        ("mean[name] = last.clone()", "mean[name] = last", f"{REGIMES} means_of"),
        ("3 * highest // 4", "highest // 2"),
        ("edges != sorted(set(edges))", "edges != sorted(edges)"),
        ("list(a) != list(b)", "False"),
    ],
    ("tuning/large_lr/regimes.py", LARGE): [
        ("chance + _ABOVE_CHANCE * (1.0 - chance)", "chance", f"{REGIMES} above_chance"),
        ("and len(trial.losses) > 1", "", f"{REGIMES} best_rate"),
        ("near = trial.barrier is None or", "near = trial.barrier is not None and", f"{REGIMES} best_rate"),
        ("near and trial.tuned >= goal", "near and trial.tuned > goal", f"{REGIMES} best_rate"),
        ("max(good, key=lambda p: p.trial.tuned or 0.0)", "max(good, key=lambda p: p.lr)", f"{REGIMES} best_rate"),
        ("min(end, divergence if", "max(end, divergence if"),
        ("*trial.accuracies[-1:]]", "*trial.accuracies]", f"{REGIMES} best_rate"),
        ("pstdev(tail)", "0.0", f"{REGIMES} best_rate"),
    ],
    ("tuning/large_lr/pretrain_finetune.py", LARGE): [
        ('if key != "pretrained")', ")", f"{REGIMES} any_order"),
        ("states[min(rates)], states[max(rates)]", "states[rates[0]], states[rates[1]]", f"{REGIMES} any_order"),
    ],
    ("tuning/autowu/schedule.py", AUTOWU): [
        ("self._steps - 1 if counters is None", "self._steps if counters is None"),
        ("math.ceil((1.0 - self._options", "math.floor((1.0 - self._options", f"{DECISIONS} cooldown"),
        ("waited + 1.0 > self._options", "waited + 1.0 >= self._options"),
        ("lowest - 1e-4 * abs(lowest)", "lowest", f"{DECISIONS} plateau"),
        ("self.phase, self._epoch.filled = phase, 0", "self.phase = phase"),
        ("2 * sum(p > self", "1 + sum(p > self", f"{DECISIONS} votes_decide"),
        (".mean()) < 0.5", ".mean()) < 0.9"),
        ('"_source": None, "_alone": False', '"_source": None', f"{DECISIONS} given_away"),
        ('new._plateau = list(state_dict["plateau"])', "pass", f"{DECISIONS} plateau"),
        ('new.tests = [WarmupTest(**test) for test in state_dict["tests"]]', "pass"),
        ('new.back_at = state_dict["back_at"]', "pass"),
        ("self._plateau = [lowest, 0.0]", "pass"),
    ],
    ("tuning/autowu/gaussian_process.py", AUTOWU): [
        ("_JITTER = 1e-4", "_JITTER = 1e-2"),
        ("int(expected[grid <= end].argmin())", "int(expected.argmin())", f"{DECISIONS} beyond_the_last"),
        ("if len(y) > 3 else 0.0", "if len(y) > 30 else 0.0", f"{DECISIONS} four_losses"),
        ('self._steps = state["steps"]', "pass", f"{DECISIONS} a_fit_goes_on"),
    ],
    ("plan/plan.py", LOCKSTEP): [
        ("            and not (self._waiting and self._reader.any_gradient(self._waiting))\n", ""),
        ("        if check_states and not self.states.has_objects():\n            return False\n", ""),
        ("row.work.copy_(row.local.detach())", "pass"),
    ],
    ("optim/state_dict.py", LOCKSTEP): [('step.fill_(loaded["step"])', 'step.fill_(loaded["step"] + 1)')],
    ("backends/reference.py", LOCKSTEP): [
        ("for row in plan.rows if averaged else ():", "for row, _ in active if averaged else ():"),
        ("float(plan.groups.rates[0, 0]) if", "plan.groups.hypers[0].lr if"),
        ("_sum_gradients(plan, active)", "_sum_gradients(plan, [a for a in active if a[1].group == 0])"),
    ],
    ("plan/groups.py", LOCKSTEP): [("return list(map(_read, value)) if isinstance(value, Sequence) else object()", "return value")],
}  # fmt: skip

# by file below csrc
CPP_FAULTS: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("rounding.h", ROUNDED): [
        ("kPhiloxRounds = 7", "kPhiloxRounds = 6"),
        ("key1(static_cast<uint32_t>(row.seed >> 32))", "key1(0)"),
        ("high(static_cast<uint32_t>(pass) << kPassBit)", "high(0)"),
        ("+ runs * (row.run_stride - row.run)", ""),
        ("choose(is_ordinary, bits, 0x8000u)", "bits"),
        ("choose(is_nan, 0x7fc00000u, rounded)", "rounded"),
        ("(bits & 0x1fffu)) >> 13", "0u) >> 13"),
        ("return narrow_to<kOrdinary>(value, rounded) == plain ? value : plain;", "return value;"),
        ("is_zero && remainder < 0 ?", "is_zero && remainder > 0 ?"),
        ("choose(is_same, rounded, bits_of(lacking))", "rounded"),
        ("(bits + 0x8000u) >> 16", "bits >> 16"),
    ],
    ("cpu/blocks.h", ROUNDED): [
        ("memcpy(at<float>(row.residue) + offset, block, count * sizeof(float))", "(void)0"),
        ("return largest < kLargest<P>;", "return true;"),
        ("if (!loop(std::true_type())) loop(std::false_type());", "loop(std::true_type());"),
    ],
    ("cpu/wide.h", ROUNDED): [
        ("_mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q))", "x"),
        ("_MM_FROUND_TO_NEAREST_INT |", "_MM_FROUND_TO_ZERO |"),
    ],
    ("cpu/random_bits.h", ROUNDED): [
        ("return bits + before;", "return bits;"),
        ("fw::draw(k, block, high, word)", "fw::draw(k, block, 0u, word)", "backends/test_cuda_on_host.py -k place_in_the_whole"),
        (" || high_word(first) != high_word(first + count - 1)", "", "backends/test_cuda_on_host.py -k place_in_the_whole"),
        ("return counter % (kWide / 2) * 2 + counter / (kWide / 2);", "return counter;"),
        ("lanes += uint64_t{Words::kCounters}", "lanes += uint64_t{1}"),
    ],
    ("cpu/sphere.h", ROUNDED): [("kSpherePass", "kUpdatePass")],
    ("cpu/blocks.h", KEPT): [
        ("static_cast<RoundingPass>(kStatePass + k)", "kUpdatePass"),
        ("if (!has_rounded_states(row)) return;", "return;"),
    ],
    ("cpu/layerwise.h", KEPT): [
        ("if (has_rounded_states(row)) {", "if (false) {"),
        ("      states.load(row, offset, count);\n      direction_block", "      direction_block"),
    ],
    ("cpu/preconditioner.cpp", KEPT): [
        ("states.state[0], states.state[1], states.state[2],", "at<C>(row.state0) + offset, at<C>(row.state1) + offset, at<C>(row.state2) + offset,"),
    ],
    ("totals.h", SUMS): [
        ("step.totals ? spread_of(step, index).numel : row.numel", "row.numel"),
        ("total.nonfinite = static_cast<int64_t>(flags_of(step)[0]);", ""),
    ],
    ("cpu/totals.h", SUMS): [("norms[1] += part.l2_sq;", "norms[1] = part.l2_sq;")],
    ("cpu/vectors.cpp", "sharpness/test_vectors.py -k exact"): [
        ("if (!past_caches && !has_residue(s.tensor.rounding))", "if (!past_caches)"),
        ("moved_block<P>(way, value, scale", "moved_block<P>(way, snapshot + done, scale"),
    ],
    ("cpu/layerwise.h", SUMS): [("sums[Rule::kSums] = found.failed;", "sums[Rule::kSums] = 0.0;")],
    ("decide.h", f"{SCALER} scaled_gradients"): [
        ("decision.grad_norm_l1 = total.l1 * decision.unscale", "decision.grad_norm_l1 = total.l1"),
    ],
    ("dlpack.h", f"{GRAD_DTYPES} dtype_and_back"): [
        ("t.dtype_bits != signature.dtype_bits ||", ""),
        ("t.dtype_code != signature.dtype_code ||", ""),
    ],
    ("reduce.h", "backends/test_cuda_on_host.py -k norms_of_every"): [
        ("(sum >= 0x1p-40f || sum == 0.0f)", "sum >= 0.0f"),
        ("sum < 0x1p50f", "sum < INFINITY"),
        ("multiply_add(a, b, -added) +", "(a * b - added) +"),
        (" + (sum - old);", ";"),
        ("static_cast<double>(sum) + static_cast<double>(error)", "static_cast<double>(sum)"),
    ],
    ("cuda/measure.cuh", "backends/test_cuda_on_host.py -k norms_of_every"): [
        ("      accumulate_l2(l2_sq, grad[i]);", ""),
    ],
    ("cuda/states.cuh", "backends/test_cuda_on_host.py -k 'rounded_states_have and plain'"): [
        ("static_cast<RoundingPass>(pass)", "kStatePass"),
        ("round_all(state1, kStates == 2 ? bits2 : bits1)", "round_all(state1, bits1)"),
        ("round_stochastically(value[k], (bits[k / 2] >> (16 * (k % 2))) & 0xffffu, rounded);", "narrow(value[k], rounded);"),
    ],
    ("cuda/params.cuh", "backends/test_cuda_on_host.py -k 'rounded_parameters_have and Adam'"): [
        ("reinterpret_cast<const uint2*>(&staged(place)) + i / N % 2", "reinterpret_cast<const uint2*>(&staged(place))"),
        ("reinterpret_cast<uint2*>(&staged(place)) + i / N % 2", "reinterpret_cast<uint2*>(&staged(place))"),
    ],
    ("cuda/chunks.cuh", "backends/test_cuda_on_host.py -k 'rounded_states_of_rounded'"): [
        ("[](int place, uint16_t* state) { unstage(place, state); }", "[](int, uint16_t*) {}"),
        ("      if (has_short_residue(this->rounding)) unstage(kResiduePlace, residue(i));\n", ""),
    ],
    ("cuda/layerwise.cuh", "backends/test_cuda_on_host.py -k 'rounded_states_have and AdamP'"): [
        ("    pack.states.round(s);\n", ""),
    ],
}  # fmt: skip


class Fault(NamedTuple):
    path: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def listed(folder: str, faults: dict[tuple[str, str], list[tuple[str, ...]]], word: str) -> list[Fault]:
    """All faults with a word in their place or text."""
    found = [
        Fault(f"{folder}/{file}", line[0], line[1], line[2] if len(line) > 2 else tests)
        for (file, tests), lines in faults.items()
        for line in lines
    ]
    return [fault for fault in found if word in str(fault)]


def check(faults: list[Fault]) -> None:
    """Stop if a text does not stand in its file exactly once."""
    for fault in faults:
        count = (ROOT / fault.path).read_text(encoding="utf-8").count(fault.old)
        if count != 1:
            raise SystemExit(f"mutants: {fault.path} must hold {fault.old!r} once, got {count} times.")


def run_here(copy: Path, tests: str) -> int:
    """Run tests in the copy, in this process, and return the exit status of pytest."""
    # tests that do not end have failed
    signal.alarm(SECONDS)
    with (copy / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    if "interpreted" in tests:
        os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(copy / "tests")
    sys.dont_write_bytecode, sys.path[0] = True, str(copy)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


def run(copy: Path, tests: str) -> int:
    """Run tests in the copy, in a fork that has torch already, and return the exit status."""
    child = os.fork()
    if child == 0:
        status = int(pytest.ExitCode.INTERNAL_ERROR)
        try:
            status = run_here(copy, tests)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        output = (copy / "output").read_text(encoding="utf-8")
        raise SystemExit(f"mutants: pytest {tests} must find tests, got\n{output}")
    return status


def build(copy: Path) -> None:
    """Compile the extension in the copy, without CUDA."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env={**os.environ, "FUSED_WARMUP_CUDA": "0"}, check=True)


def is_noticed(copy: Path, fault: Fault) -> bool:
    """Plant a fault, run its tests, and take it out again."""
    file = copy / fault.path
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        if fault.path.startswith("csrc"):
            build(copy)
        return run(copy, fault.tests) != 0
    finally:
        file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    faults = listed("fused_warmup", FAULTS, options.only)
    if options.build:
        faults += listed("csrc", CPP_FAULTS, options.only)
    check(faults)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for tests in sorted({fault.tests for fault in faults}):
            if run(copy, tests) != 0:
                raise SystemExit(f"mutants: pytest {tests} must pass without a fault.")
        for number, fault in enumerate(faults, 1):
            begun = time.monotonic()
            noticed = is_noticed(copy, fault)
            missed += [] if noticed else [fault]
            decision = "noticed    " if noticed else "NOT NOTICED"
            print(
                f"{number:3}/{len(faults)} {decision} {time.monotonic() - begun:4.0f} s  {fault}", flush=True
            )
    print(f"{len(faults)} planted, {len(faults) - len(missed)} noticed")
    for fault in missed:
        print(f"not noticed by {fault.tests}: {fault}")


if __name__ == "__main__":
    main()
