"""The table: addresses and forms, chunks, and what it holds on to."""

import collections
import gc
import itertools
import math
import threading
import weakref

import numpy as np
import pytest
import torch
from cases import BACKENDS, assert_same_bits, make_params, set_grads

import fused_warmup as fw
from fused_warmup import _cpu
from fused_warmup.plan import address_cache
from fused_warmup.plan import chunks as cutting
from fused_warmup.plan import plan as planning


def odd_tensors():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "same": torch.zeros(4, 6),
        "none": None,
        "other shape": torch.zeros(6, 4),
        "transposed": torch.zeros(6, 4).t(),
        "strided": torch.zeros(4, 12)[:, ::2],
        "offset": torch.zeros(25)[1:].reshape(4, 6),
        "float64": torch.zeros(4, 6, dtype=torch.float64),
        "more dimensions": torch.zeros(1, 4, 6),
        "sparse": base.to_sparse(),
        "meta": torch.zeros(4, 6, device="meta"),
        "subclass": torch.zeros(4, 6).as_subclass(type("Labelled", (torch.Tensor,), {})),
    }


needs_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange API"
)


def read_both(tensors, grads):
    """What the compiled and the Python reader say of the same tensors, with the form of a contiguous one."""
    likes = [torch.zeros(4, 6) for _ in tensors]
    found = []
    for reader in (_cpu.TensorSignatures(torch.Tensor, likes), address_cache.PythonSignatures(likes)):
        out = np.full(len(tensors), 7, np.uint64)
        found.append((reader.read(tensors, out.ctypes.data, grads), out.tolist()))
        reader.release()
    return found


@needs_exchange
@pytest.mark.parametrize("grads", [False, True], ids=["tensors", "gradients"])
def test_both_readers_agree(grads):
    tensors = odd_tensors()
    asked = list(tensors.values())
    if grads:
        # torch refuses gradients of another shape, dtype or device
        tensors = {
            name: tensors[name] for name in ("same", "none", "transposed", "strided", "offset", "sparse")
        }
        asked = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in tensors]
        for owner, grad in zip(asked, tensors.values(), strict=True):
            owner.grad = grad
    compiled, python = read_both(asked, grads)
    assert compiled == python
    odd, addresses = compiled
    names = list(tensors)
    fits = {
        name: address for i, (name, address) in enumerate(zip(names, addresses, strict=True)) if i not in odd
    }
    expected = {
        name: tensors[name].data_ptr() if name != "none" else 0 for name in ("same", "none", "offset")
    }
    assert fits == expected
    assert all(addresses[i] == 0 for i in odd)


@needs_exchange
def test_dimensions_of_one_element_have_any_stride():
    """Gradients of 1x1 convolutions often come so; they must not be copied at every step."""
    like = torch.zeros(8, 3, 1, 1)
    other = torch.zeros(8, 3, 1, 1).as_strided((8, 3, 1, 1), (3, 1, 7, 9))
    for reader in (_cpu.TensorSignatures(torch.Tensor, [like]), address_cache.PythonSignatures([like])):
        out = np.zeros(1, np.uint64)
        assert reader.read([other], out.ctypes.data) == []
        assert out[0] == other.data_ptr()


def test_without_the_exchange_api_the_numbers_are_the_same(monkeypatch):
    a, b = make_params(torch.float32), make_params(torch.float32)
    fast = fw.Adam(a, max_grad_norm=1.0)
    monkeypatch.setattr(
        planning,
        "select_reader",
        lambda: address_cache.PYTHON_READER,
    )
    slow = fw.Adam(b, max_grad_norm=1.0)
    for step in range(4):
        for params, opt in ((a, fast), (b, slow)):
            set_grads(params, step)
            if step == 2:
                params[4].grad = params[4].grad.clone().transpose(0, 2).contiguous().transpose(0, 2)
                params[5].grad = None
            opt.step()
    assert isinstance(slow.session.plan.gradients._signatures, address_cache.PythonSignatures)
    for p, q in zip(a, b, strict=True):
        assert_same_bits("param", p, q)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_keeps_a_gradient_alive(backend):
    """``zero_grad`` frees the memory before the next backward pass, odd layouts and unusual dtypes included."""
    params = make_params(torch.float32, [(4, 5), (3,)])
    opt = fw.Adam(params, backend=backend)
    for step in range(3):
        set_grads(params, step)
        params[0].grad = params[0].grad.t().contiguous().t()
        opt.step()
        alive = [weakref.ref(p.grad) for p in params]
        opt.zero_grad()
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def test_parameters_that_left_are_freed():
    params = make_params(torch.float32, [(4,), (3,)])
    opt = fw.Adam(params)
    set_grads(params, 0)
    opt.step()
    storage = weakref.ref(params[0].data.untyped_storage())
    params[0].data = torch.zeros(4)
    opt.step()
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [cutting.CHUNK], [cutting.CHUNK + 1, 0, 3, 2 * cutting.CHUNK], [0, 5, 0]]
)
def test_chunks_cover_every_element_once(sizes):
    column = cutting.chunks(sizes, sizes)
    seen = [(int(c["row"]), int(c["offset"]) + i) for c in column for i in range(0, int(c["count"]), 1)]
    assert seen == [(row, i) for row, size in enumerate(sizes) for i in range(size)]
    assert all(0 < int(c["count"]) <= cutting.CHUNK for c in column)


@pytest.mark.parametrize("channel", [1, 3, 9, 255, 256, 2047, 2049, 32767, 32768, 32769, 70_001])
@pytest.mark.parametrize("count", [1, 2, 17, 300])
def test_chunks_hold_whole_channels_or_parts_of_one(channel, count):
    """And begin where vectors do, unless a few channels are too long for that."""
    sizes, channels = [5, count * channel, 7], [5, channel, 7]
    column = cutting.chunks(sizes, channels)
    chunks = column[column["row"] == 1]
    ends = chunks["offset"] + chunks["count"]
    assert chunks["offset"].tolist() == [0, *ends[:-1].tolist()]
    assert ends[-1] == count * channel
    assert (chunks["count"] <= cutting.CHUNK).all()
    if channel <= cutting.CHUNK:
        assert not (chunks["offset"] % channel).any()
    else:
        assert not (chunks["offset"] % channel % cutting.CHUNK).any()
        assert (chunks["offset"] // channel == (ends - 1) // channel).all()
    if 16 * channel <= cutting.CHUNK:
        assert not (chunks["offset"] % 16).any()


def test_one_region_of_chunks_for_all_groups():
    """The order of the table is that of the groups, whichever gradient came first; later ones have their places."""
    params = make_params(torch.float32, [(3,), (4,), (5,)])
    opt = fw.Adam([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
    params[2].grad = torch.ones(5)
    opt.step()
    plan = opt.session.plan
    assert [row.is_reserved for row in plan.rows] == [True, True, False]
    params[0].grad = torch.ones(3)
    opt.step()
    assert opt.session.plan is plan
    assert [row.index for row in plan.rows] == [0, 1, 2]
    assert [row.is_reserved for row in plan.rows] == [False, True, False]
    assert plan._chunks["count"].tolist() == [3, 4, 5]


def test_repr_shows_the_backend():
    opt = fw.Adam(make_params(torch.float32, [(3,)]))
    assert repr(opt).startswith("Adam (backend: auto (cpu)")


def sgd(n=3, **options):
    """A parameter of zeros whose gradient is one, so that plain steps of rate 0.1 are visible by eye."""
    x = torch.nn.Parameter(torch.zeros(n))
    x.grad = torch.ones(n)
    return x, fw.SGD([x], lr=0.1, **options)


def moved(x, opt):
    before = x.detach().clone()
    opt.step()
    return round(float((before - x.detach())[0]), 5)


def test_states_that_move_are_followed():
    """In shared memory, under another storage, replaced, or gone; the kernel must never write where they were."""
    x, opt = sgd(1 << 16, momentum=0.5)
    assert moved(x, opt) == 0.1
    opt.state[x]["momentum_buffer"].share_memory_()
    assert moved(x, opt) == 0.15
    held = opt.state[x]["momentum_buffer"]
    opt.step()
    held.data = torch.zeros(1 << 16)
    assert moved(x, opt) == 0.1
    opt.state[x]["momentum_buffer"] = torch.full((1 << 16,), 2.0)
    assert moved(x, opt) == 0.2
    opt.state[x]["step"] = torch.tensor(7)
    opt.step()
    assert opt.state[x]["step"] == 8
    opt.state.clear()
    assert moved(x, opt) == 0.1
    assert opt.state_dict()["state"][0]["step"] == 1


def test_groups_that_change_are_followed():
    x, opt = sgd()
    y, z = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    y.grad, z.grad = torch.ones(3), torch.ones(3)
    opt.add_param_group({"params": [y], "lr": 0.5})
    opt.step()
    opt.param_groups[0]["params"][0] = z
    x.grad = None
    assert moved(z, opt) == 0.1
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())
    assert moved(z, opt) == 0.5
    opt.param_groups.reverse()
    assert moved(z, opt) == 0.5
    del opt.param_groups[1]
    assert moved(z, opt) == 0.5


def test_gradients_replaced_by_another_thread_during_the_step():
    """The kernels run without the GIL: the plan holds the gradients that they read.

    The thief waits for the step to begin and the step for the thief, because torch itself must not read
    ``.grad`` in one thread while another sets it: freeing the old tensor gives up the GIL half way.
    """
    x = torch.nn.Parameter(torch.zeros(1 << 21))
    opt = fw.SGD([x], lr=1.0)
    x.grad = torch.ones(1 << 21)
    opt.step()
    begun, stolen, stop = threading.Event(), threading.Event(), threading.Event()
    alive = []

    class Backend:
        name, max_inline_pointers = "cpu", 0

        def step(self, plan, inner=opt.session.backend):
            begun.set()
            inner.step(plan)
            stolen.wait()
            alive.append(gradient() is not None)

    def thief():
        while begun.wait() and not stop.is_set():
            begun.clear()
            x.grad = None
            stolen.set()

    opt.session.backend = Backend()
    thread = threading.Thread(target=thief)
    thread.start()
    for _ in range(100):
        x.grad = torch.ones(1 << 21)
        gradient = weakref.ref(x.grad)
        stolen.clear()
        opt.step()
    stop.set()
    begun.set()
    thread.join()
    assert alive == [True] * 100
    assert gradient() is None
    assert (x == -101.0).all()


def test_default_device_does_not_matter():
    x, opt = sgd(average=fw.EMA(0.5), telemetry="all")
    with torch.device("meta"):
        for _ in range(1030):
            opt.step()
        saved = opt.state_dict()
        opt.load_state_dict(saved)
    assert opt.telemetry.history()["step"].tolist() == list(range(1, 1031))
    assert fw.Adam([x], exp_avg_sq_init="random").step() is None


def test_settings_changed_later_take_effect():
    x, opt = sgd()
    opt.step()
    opt.nonfinite = "skip"
    x.grad[1] = torch.nan
    assert moved(x, opt) == 0.0
    x.grad = torch.ones(3)
    opt.average = fw.EMA(0.5)
    opt.step()
    with opt.averaged_parameters():
        assert opt.state[x]["average"][0] == x[0]
    opt.nonfinite = "sometimes"
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        opt.step()


def test_compiled_training_step():
    """A cold optimizer inside torch.compile: the step runs in Python between the compiled pieces."""
    model = torch.nn.Linear(3, 1)
    opt = fw.Adam(model.parameters(), lr=0.1)
    data = torch.randn(8, 3)

    @torch.compile(backend="eager")
    def step_and_double(x):
        opt.step()
        return 2 * x

    losses = []
    for _ in range(5):
        loss = model(data).square().mean()
        loss.backward()
        losses.append(float(step_and_double(loss.detach())) / 2)
        opt.zero_grad()
    assert losses[-1] < losses[0]
    assert opt.telemetry.latest()["step"] == 5


def test_subclass_of_parameter():
    class Labelled(torch.nn.Parameter):
        pass

    x = Labelled(torch.zeros(3))
    x.grad = torch.ones(3)
    opt = fw.SGD([x], lr=0.1)
    assert [moved(x, opt), moved(x, opt)] == [0.1, 0.1]


def test_betas_of_any_sequence_written_in_place():
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.Adam([x], betas=collections.UserList([0.9, 0.999]))
    x.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["betas"][0] = 0.0
    x.grad = torch.full((1,), 3.0)
    opt.step()
    assert opt.state[x]["exp_avg"] == 3.0


def test_last_rate_survives_a_rebuilt_table():
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([x], lr=1.0, schedule=fw.schedules.warmup(10))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.get_last_lr() == [0.1]


def test_weight_decay_schedule_counts_in_the_initialisation():
    x = torch.nn.Parameter(torch.full((1,), 10.0))
    options = {"weight_decay": 0.1, "weight_decay_schedule": fw.schedules.warmup(10)}
    opt = fw.GIAdam([x], **options)
    x.grad = torch.ones(1)
    opt.init_from_gradients()
    assert opt.state[x]["exp_avg_sq"].item() == pytest.approx(1.1**2, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_moves_and_returns_is_followed(backend):
    param = torch.nn.Parameter(torch.ones(3))
    opt = fw.SGD([param], lr=0.25, backend=backend)
    param.grad = torch.ones(3)
    first, second = param.data, torch.full((3,), 5.0)
    for data in (first, second, first, second):
        param.data = data
        opt.step()
    assert first.tolist() == [0.5] * 3
    assert second.tolist() == [4.5] * 3


READERS = {"python": address_cache.PYTHON_READER, "compiled": address_cache.select_reader()}


@needs_exchange
def test_both_readers_find_the_same_extents():
    """Address, elements, bytes and dimensions of plain tensors; any other one is left to the checks."""
    tensors = [tensor for tensor in odd_tensors().values() if tensor is not None]
    tensors += [
        torch.nn.Parameter(torch.zeros(3)),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(2, dtype=torch.int32),
    ]
    tensors += [
        torch.zeros(5, dtype=torch.float16),
        torch.zeros(5, dtype=torch.bfloat16),
        torch.zeros(4, 1, 2),
    ]
    python, compiled = (READERS[name].extents(tensors) for name in ("python", "compiled"))
    assert python["dtype"].tolist() == compiled["dtype"].tolist()
    plain = compiled["dtype"] >= 0
    assert python[plain].tolist() == compiled[plain].tolist()
    assert [t.data_ptr() for t, p in zip(tensors, plain, strict=True) if p] == compiled["address"][
        plain
    ].tolist()
    assert [t.nbytes for t, p in zip(tensors, plain, strict=True) if p] == compiled["reach"][plain].tolist()
    assert plain.tolist() == [
        *(
            name in ("same", "offset", "float64", "more dimensions", "other shape")
            for name in odd_tensors()
            if name != "none"
        ),
        *(True, True, False, False, True, True, True),
    ]


@pytest.mark.parametrize("how", READERS)
def test_what_readers_say_of_many_objects(how):
    reader = READERS[how]
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    assert not reader.any_gradient([first, second])
    second.grad = torch.zeros(2)
    assert reader.any_gradient([first, second])
    assert not reader.any_gradient([first])
    objects = [object(), object()]
    assert not reader.referenced_beyond(objects, 1)
    held = objects[1]
    assert reader.referenced_beyond(objects, 1)
    assert not reader.referenced_beyond(objects, 2)
    assert held is objects[1]


GROUPS = {
    "equal": ({"lr": 0.5 + 0.5, "betas": [0.9, 0.99], "eps": math.inf}, False),
    "another number": ({"lr": 2.0, "betas": [0.9, 0.99], "eps": math.inf}, True),
    "another list": ({"lr": 1.0, "betas": [0.9, 0.98], "eps": math.inf}, True),
    "the last one": ({"lr": 1.0, "betas": [0.9, 0.99], "eps": 1e-8}, True),
    "a tensor of one element": ({"lr": torch.ones(1), "betas": [0.9, 0.99], "eps": math.inf}, False),
    "a tensor that cannot be compared": ({"lr": torch.ones(2), "betas": [0.9, 0.99], "eps": math.inf}, True),
    "an array that cannot be compared": ({"lr": np.ones(2), "betas": [0.9, 0.99], "eps": math.inf}, True),
}


@pytest.mark.parametrize("how", READERS)
def test_readers_find_groups_with_other_values(how):
    keys, then = ("lr", "betas", "eps"), (1.0, [0.9, 0.99], math.inf)
    find = READERS[how].changed_groups
    for name, (group, changed) in GROUPS.items():
        assert find([group], keys, [then]) == [0] * changed, name
    groups = [{**group, "params": []} for group, _ in GROUPS.values()]
    wanted = [i for i, (_, changed) in enumerate(GROUPS.values()) if changed]
    assert find(groups, keys, [then] * len(groups)) == wanted
    # not a number is the same object, or another value
    assert find([{"lr": math.nan}, {"lr": float("nan")}], ("lr", "lr"), [(math.nan, math.nan)] * 2) == [1]
    # what must be read again
    assert find(groups[:1], keys, [None]) == [0]
    with pytest.raises(KeyError, match="eps"):
        find([{"lr": 1.0, "betas": [0.9, 0.99]}], keys, [then])


@pytest.mark.parametrize("how", READERS)
def test_readers_find_values_in_any_order_of_the_keys(how):
    find, keys, then = READERS[how].changed_groups, ("lr", "betas", "eps"), (1.0, (0.9, 0.99), 1e-8)
    known = dict(zip(keys, then, strict=True))
    for order in itertools.permutations((*keys, "params")):
        group = {key: known.get(key, []) for key in order}
        # equal keys that are other objects, as pickle makes
        if order[0] == "eps":
            group = {"".join(list(key)): value for key, value in group.items()}
        assert find([group], keys, [then]) == []
        for key in keys:
            assert find([{**group, key: 7.0}], keys, [then]) == [0]
            with pytest.raises(KeyError, match=key):
                find([{k: v for k, v in group.items() if k != key}], keys, [then])


class Forgetful:
    """Takes entries out of the group when it is compared."""

    def __init__(self, group):
        self.group = group

    def __eq__(self, other):
        self.group.clear()
        self.group.update({f"key {i}": i for i in range(1000)}, eps=1e-8)
        return True


@pytest.mark.parametrize("how", ["compiled"])
def test_readers_survive_comparisons_that_change_the_group(how):
    group = {"eps": 1e-8}
    group = {"lr": Forgetful(group), "betas": (0.9, 0.99), "eps": 1e-8}
    group["lr"].group = group
    with pytest.raises(KeyError, match="betas"):
        READERS[how].changed_groups([group], ("lr", "betas", "eps"), [(1.0, (0.9, 0.99), 1e-8)])


class Incomparable:
    def __eq__(self, other):
        raise OSError("no comparison")


@pytest.mark.parametrize("how", READERS)
def test_readers_pass_on_what_comparisons_raise(how):
    with pytest.raises(OSError, match="no comparison"):
        READERS[how].changed_groups([{"a": Incomparable(), "b": 1}], ("a", "b"), [(1, 1)])


@pytest.mark.parametrize("how", READERS)
def test_readers_compare_the_members_of_groups(how):
    unchanged = READERS[how].groups_unchanged
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    for params in ([a, b], (a, b)):
        assert unchanged([{"params": params}], [[a, b]])
        assert not unchanged([{"params": params}], [[b, a]])
        assert not unchanged([{"params": params}], [[a]])
        assert not unchanged([{"params": params}, {"params": []}], [[a, b]])
    assert unchanged([{"params": []}, {"params": [a]}], [[], [a]])
    with pytest.raises(KeyError, match="params"):
        unchanged([{}], [[a]])
