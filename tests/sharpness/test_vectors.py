"""The fused vector operations of sharpness measurements against plain PyTorch, and their bits."""

import cases
import pytest
import torch
import vector_cases
from cases import CASES, SCHEDULES
from vector_cases import (
    DTYPES,
    ROUNDED,
    check_operations,
    check_preconditioner,
    check_residues,
    combination,
    draw,
    make_pair,
)

from fused_warmup import _cpu
from fused_warmup.backends.native import CpuBackend

BACKENDS = [pytest.param(isa, id=isa) for isa in _cpu.instruction_sets()]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES, DTYPES[2:] + DTYPES[:1]], ids=str)
@pytest.mark.parametrize("isa", BACKENDS)
def test_operations(isa, dtypes, scaled):
    check_operations(dtypes, CpuBackend(isa), scaled=scaled)


@pytest.mark.parametrize(("mode", "dtypes"), ROUNDED, ids=str)
@pytest.mark.parametrize("isa", BACKENDS)
def test_steps_begin_at_exact_values(isa, mode, dtypes):
    check_residues(mode, dtypes, CpuBackend(isa))


def test_sums_do_not_depend_on_threads():
    bits = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        bits.append(combination(CpuBackend(), [(100_003,), (70_001,)], 3))
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])


@pytest.mark.parametrize("isa", BACKENDS)
def test_vectors_longer_than_a_cache(isa):
    """Streaming stores: tensors of odd sizes, one of them longer than the caches, none aligned."""
    shapes = [(3,), (5,), (2_200_003,), (40,)]
    check_operations([torch.float32, torch.bfloat16], CpuBackend(isa), shapes, n_basis=(2,))
    check_residues("split", [torch.bfloat16], CpuBackend(isa), shapes)


def test_parameters_do_not_depend_on_threads_or_the_caches():
    """Parameters and differences are the same bit for bit, also as a part of longer vectors."""
    kept = []
    for threads, shapes in ((1, [(90_001,)]), (5, [(90_001,)]), (1, [(90_001,), (2_200_003,)])):
        torch.set_num_threads(threads)
        _, fused = make_pair([torch.float32], CpuBackend(), shapes)
        basis = fused.basis(2)
        for i in range(2):
            basis[i].copy_(draw(fused, i))
        scale = draw(fused, 2).abs()
        fused.perturb(basis[1], scale, fused.number(0.1))
        moved = fused.params[0].detach().clone()
        grads = [[draw_like(p, seed) for p in fused.params] for seed in (3, 4)]
        out = fused.basis(1)[0]
        fused.finish(basis, out, *grads, scale, fused.number(0.1))
        kept.append(torch.cat([moved, fused.split(out)[0], fused.params[0].detach()]))
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def draw_like(param, seed):
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))


def test_rounded_parameters_are_measured_at_their_real_places():
    """A step moves only some of the bfloat16 weights: the sums are of the distance that these moved."""
    plain, fused = make_pair([torch.bfloat16], CpuBackend())
    for v in (plain, fused):
        basis = v.basis(1)
        basis[0].copy_(draw(v, 0))
        grads = [torch.ones_like(p) for p in v.params], [torch.zeros_like(p) for p in v.params]
        size = v.number(1e-3)
        v.perturb(basis[0], None, size)
        plus = [p.detach().double().clone() for p in v.params]
        v.perturb(basis[0], None, -size)
        moves = [(a - p.detach().double()).flatten() for a, p in zip(plus, v.params, strict=True)]
        displacement = torch.cat(moves)
        assert 0.1 < (displacement != 0).double().mean() < 0.9
        _, moved = v.finish(basis, v.basis(1)[0], *grads, None, size)
        expected = [displacement.square().sum().item(), displacement.sum().item()]
        assert moved.tolist() == pytest.approx(expected, rel=1e-6)


def test_strided_views_are_left_to_pytorch():
    from fused_warmup.sharpness import top_eigenvalue

    base = torch.randn(6, 8, dtype=torch.float64)
    view = torch.nn.Parameter(base[:, ::2])
    whole = torch.nn.Parameter(base[:, ::2].clone())
    values = torch.linspace(1.0, 5.0, 24, dtype=torch.float64).view(6, 4)
    losses = [lambda p=p: 0.5 * (values * p * p).sum() for p in (view, whole)]
    found = [top_eigenvalue(f, [p], iterations=24).value for f, p in zip(losses, (view, whole), strict=True)]
    assert found[0].item() == pytest.approx(5.0, rel=1e-5)
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-9)


def test_cases_reach_every_branch():
    """Odd sizes, several chunks, and dense layouts that are not contiguous."""
    params = vector_cases.make_params([torch.float32], vector_cases.SHAPES)
    assert {p.numel() for p in params} >= {0, 1, 3, 1023, 4097, 33_000}
    assert sum(not p.is_contiguous() for p in params) == 2


def on_cpu(case, params, **options):
    opt = case.make(params, backend="cpu", **options)
    return opt, CpuBackend()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", vector_cases.PRECONDITIONED, ids=lambda case: case.name)
def test_preconditioner_is_that_of_the_reference(case, dtype):
    params = cases.make_params(dtype, [(3,), (0,), (), (33, 101)])
    # a penalty may cancel a clipped gradient up to its rounding error
    clip = None if "weight_decay" in case.options else 5.0
    check_preconditioner(case, on_cpu, params, max_grad_norm=clip, schedule=SCHEDULES["warmup_linear"])


@pytest.mark.parametrize("name", ["adamw", "radam-l2", "sgd-momentum"])
def test_preconditioner_of_groups_and_mixed_dtypes(name):
    """Groups with different rates and decays."""
    case = next(case for case in CASES if case.name == name)
    params = [p for dtype in DTYPES for p in cases.make_params(dtype, [(33,), (4, 5)])]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 3e-3, "weight_decay": 0.01}]

    def make(case, params, **options):
        return on_cpu(case, groups, **options)

    check_preconditioner(case, make, params)
