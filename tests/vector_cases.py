"""Check the vector operations of a backend against those in plain PyTorch, for every backend with kernels."""

import pytest
import torch
from cases import CASES, assert_same_bits, set_grads
from torch.nn import Parameter

from fused_warmup import _cpu
from fused_warmup.plan.residues import residue_of, value_of
from fused_warmup.reference.rounding import RESIDUES, SIXTEEN_BITS, Rounding, store
from fused_warmup.sharpness.pending_step import PendingStep
from fused_warmup.sharpness.vectors import FusedVectors, Vectors

# optimizers whose sharpness can be measured against their own pre-conditioner
PRECONDITIONED = [case for case in CASES if case.cls.spec.name in _cpu.preconditioned()]
# odd sizes, an empty tensor, 0-dim, one beyond a chunk; channels-last and a transposed matrix are dense too
SHAPES = [(3,), (0,), (), (1023,), (4097,), (8, 16), (33_000,)]
FEW_SHAPES = [(3,), (0,), (), (40,), (300,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# half a unit in the last place of a parameter
UNIT = {torch.float32: 6e-8, torch.float64: 1.2e-16, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_params(dtypes, shapes):
    """Return parameters of each dtype and shape, and some with other orders of dimensions in memory."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(s, generator=generator).to(d) for d in dtypes for s in shapes]
    made += [torch.randn(6, 10, generator=generator).to(d).t() for d in dtypes]
    images = torch.randn(2, 3, 4, 5, generator=generator).to(dtypes[0])
    made.append(images.to(memory_format=torch.channels_last))
    return [Parameter(t) for t in made]


def make_pair(dtypes, backend, shapes=SHAPES, device="cpu"):
    """Return the operations in plain PyTorch and by a backend, over separate parameters of equal values."""
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    made = []
    for kind in ("plain", "fused"):
        params = [Parameter(p.detach().to(device)) for p in make_params(dtypes, shapes)]
        snapshot = [p.detach().clone() for p in params]
        if kind == "fused":
            made.append(FusedVectors(params, snapshot, wide, backend))
        else:
            made.append(Vectors(params, snapshot, wide))
    return made


# modes with a residue, and dtypes of which some parameters have one
ROUNDED = [
    *(
        (mode, [dtype])
        for mode in RESIDUES
        for dtype in SIXTEEN_BITS
        if (mode, dtype) != ("split", torch.float16)
    ),
    *((mode, DTYPES) for mode in RESIDUES),
]


def with_residues(params, mode):
    """Store random float32 numbers in the 16-bit parameters of a list, and return their residues."""
    generator = torch.Generator().manual_seed(5)
    residues = []
    for p in params:
        if p.dtype not in SIXTEEN_BITS or (mode, p.dtype) == ("split", torch.float16):
            residues.append(None)
            continue
        values = torch.randn(p.shape, generator=generator).to(p.device)
        if p.numel() > 100:
            # ties of bfloat16, zeros, and a number that bfloat16 rounds to zero
            special = [1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 1e-42]
            values.view(-1)[: len(special)] = torch.tensor(special)
        param, residue = store(values, p.dtype, Rounding(mode))
        if p.numel() > 100:
            # written from outside since
            param.view(-1)[6:90:7] *= 1.5
            param.view(-1)[7:90:7] = 0.0
        p.detach().copy_(param)
        residues.append(residue_of({RESIDUES[mode][0]: residue}, mode, p.detach()))
    return residues


def check_residues(mode, dtypes, backend, shapes=SHAPES, device="cpu"):
    """Check that steps begin at the exact values, to the bit, and that what is stored comes back.

    Numbers are such that the products of the step are exact, so that a fused multiplication and addition rounds
    as two operations do.
    """
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    for made in ("plain", "fused"):
        params = [Parameter(p.detach().to(device)) for p in make_params(dtypes, shapes)]
        residues = with_residues(params, mode)
        before = [r if r is None else r.tensor.clone() for r in residues]
        snapshot = [p.detach().clone() for p in params]
        kind = (Vectors, FusedVectors)[made == "fused"]
        v = kind(params, snapshot, wide, *((backend,) if made == "fused" else ()), residues)
        basis = v.basis(2)
        for b in basis:
            b.copy_((draw(v, 1) * 2.0).round() * 2.0**-10)
        scale, size = 2.0 ** draw(v, 2).round().clamp(-2, 2), v.number(0.5)
        ends = []
        for sign in (1.0, -1.0):
            v.perturb(basis[-1], scale, sign * size)
            steps = v.split(sign * size.to(wide) * scale * basis[-1])
            found = [p.detach().clone() for p in params]
            for x, p, r, step in zip(found, snapshot, residues, steps, strict=True):
                assert torch.equal(x, (value_of(p, r) + step).to(p.dtype)), (made, tuple(p.shape), p.dtype)
                if r is not None and p.numel() > 100:
                    assert not torch.equal(x, (p.to(wide) + step).to(p.dtype))
            ends.append(v.flat(found))
        grads = [[torch.ones_like(p) for p in params], [None for _ in params]]
        _, moved = v.finish(basis, v.basis(1)[0], *grads, scale, size)
        way = (ends[0] - ends[1]).double()
        expected = [way.square().sum().item(), way.sum().item()]
        assert moved.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for p, q, r, tensor in zip(params, snapshot, residues, before, strict=True):
            assert torch.equal(p, q), "the stored values are back"
            if r is not None:
                assert_same_bits("residues are not written", r.tensor, tensor)


def draw(vectors, seed):
    """Return a random vector with the same values for any order of a flat vector."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in vectors.params]
    return vectors.flat([part.to(p.device) for part, p in zip(parts, vectors.params, strict=True)])


def same(plain, fused, a, b, rtol, name):
    """Assert that flat vectors hold the same numbers, tensor by tensor."""
    for x, y in zip(plain.split(a), fused.split(b), strict=True):
        torch.testing.assert_close(y, x, rtol=rtol, atol=rtol, msg=lambda m: f"{name}: {m}")


def check_operations(dtypes, backend, shapes=SHAPES, device="cpu", scaled=True, n_basis=(1, 3, 6)):
    """Check all three operations on the same numbers: elements to rounding, sums to 1e-6 per element."""
    plain, fused = make_pair(dtypes, backend, shapes, device)
    rtol = 1e-12 if plain.dtype == torch.float64 else 1e-6
    # plain sums round each product, and the sums may cancel
    sums = {"rtol": 0.0, "atol": 1e-6 * plain.numel}
    both = (plain, fused)
    for m in n_basis:
        basis = [v.basis(m) for v in both]
        for v, b in zip(both, basis, strict=True):
            for i in range(m):
                b[i].copy_(draw(v, i))
        scales = [draw(v, 100).abs() + 0.5 if scaled else None for v in both]
        size = plain.number(2.0**-6)
        for v, b, scale in zip(both, basis, scales, strict=True):
            v.perturb(b[-1], scale, size)
        for p, q, value in zip(plain.params, fused.params, plain.snapshot, strict=True):
            # a sum rounded once or twice may end on either side of a tie
            torch.testing.assert_close(q, p, rtol=2.1 * UNIT[p.dtype], atol=2e-7)
            assert p.numel() < 5 or not torch.equal(p, value)
        generator = torch.Generator().manual_seed(m)
        grads = [
            [torch.randn(p.shape, generator=generator).to(p.dtype).to(device) for p in plain.params]
            for _ in range(2)
        ]
        grads[0][0] = grads[1][1] = grads[0][3] = grads[1][3] = None
        # as backward of a sum gives it
        grads[1][4] = torch.ones((), dtype=plain.params[4].dtype, device=device).expand(plain.params[4].shape)
        found = []
        for v, b, scale in zip(both, basis, scales, strict=True):
            out = v.basis(1)[0]
            found.append((out, *v.finish(b, out, *grads, scale, size)))
            for p, value in zip(v.params, v.snapshot, strict=True):
                assert torch.equal(p, value), "the parameters are back"
        (a, products, moved), (b, products2, moved2) = found
        same(plain, fused, a, b, rtol, "difference")
        torch.testing.assert_close(products2, products, **sums)
        torch.testing.assert_close(moved2, moved, **sums)
        assert bool(moved.any()) == plain.is_narrow
        for keep in (plain.number(0.75), None):
            coefficients = torch.linspace(-1.0, 1.0, m + 1, dtype=torch.float64, device=device)[1:]
            results = []
            for v, out, known, scale in zip(both, (a, b), basis, scales, strict=True):
                results.append(v.combine(out, keep, known, coefficients, scale))
            same(plain, fused, a, b, 4.0 * m * rtol, "combination")
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(y, x, **sums)
            assert results[0][1][0] > 0.0
            assert bool(results[0][1][1] > 0.0) == scaled
    none = [torch.zeros(0, dtype=torch.float64, device=device) for _ in both]
    lengths = [
        v.combine(out, v.number(1.0), v.basis(1)[:0], c, None)[1]
        for v, out, c in zip(both, (a, b), none, strict=True)
    ]
    torch.testing.assert_close(lengths[1], lengths[0], rtol=1e-6, atol=0.0)


def combination(backend, shapes, m):
    """Return all numbers of a combination of ``m`` vectors, to compare their bits."""
    _, fused = make_pair([torch.float32], backend, shapes)
    basis = fused.basis(m)
    for i in range(m):
        basis[i].copy_(draw(fused, i))
    out = draw(fused, 9)
    coefficients = torch.linspace(0.1, 0.3, m, dtype=torch.float64)
    sums = fused.combine(out, fused.number(0.5), basis, coefficients, basis[0])
    return torch.cat([*sums, out.double()])


def check_preconditioner(case, resolve, params, *, steps=(1, 6), **options):
    """Check the kernels' pre-conditioner against the reference: elements, rates and L2 penalties, after some steps.

    ``resolve`` returns the optimizer and its backend for a list of parameters.
    """
    opt, backend = resolve(case, params, **options)
    for step in range(max(steps) + 1):
        set_grads(params, step)
        if step in steps:
            pending = PendingStep("test", opt)
            vectors = FusedVectors(pending.params, pending.params, wide_of(params), backend)
            found = pending.preconditioner(vectors)
            assert found is not None
            members = pending.members
            inverse = pending.inverse_preconditioners(pending.grads)
            factors = [m.lr / m.threshold for m in members]
            assert found.factor.item() == pytest.approx(factors[0], rel=1e-12)
            if found.scale is None:
                assert opt.spec.name == "SGD"
            else:
                close(vectors, found.scale, [x.sqrt() for x in inverse])
            if len(set(factors)) == 1:
                assert found.scaled is None
            else:
                pairs = zip(inverse, factors, strict=True)
                close(vectors, found.scaled, [(x.double() * f).sqrt().to(x.dtype) for x, f in pairs])
            decays = [m.coupled_decay for m in members]
            assert [d.item() for d in found.decays] == (pytest.approx(decays) if any(decays) else [])
            for p, grad in zip(pending.params, pending.grads, strict=True):
                p.grad = grad
        opt.step()


def wide_of(params):
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def close(vectors, found, wanted):
    for p, a, b in zip(vectors.params, vectors.split(found), wanted, strict=True):
        rtol = 1e-12 if p.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=0.0)
