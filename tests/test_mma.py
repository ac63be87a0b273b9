"""Device functions of the kernels on tensor cores, in the interpreter."""

import pytest
import torch
import triton.language as tl
from kernel_cases import Shape, assert_tf32, differences
from test_resident_nvidia import BOTH, RAGGED, run
from triton.experimental import gluon

from fusedrnn.kernels import mma

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are imported for the interpreter"
)


@gluon.jit
def squash_kernel(x_ptr, y_ptr, N: tl.constexpr, KINDS: tl.constexpr):
    offsets, tiles = tl.arange(0, N), ()
    for n in tl.static_range(len(KINDS)):
        tiles = tiles + (tl.load(x_ptr + n * N + offsets),)
    tiles = mma.squash(tiles, KINDS)
    for n in tl.static_range(len(KINDS)):
        tl.store(y_ptr + n * N + offsets, tiles[n])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("kinds", [(False,), (True,), (False, True), (False, False, True, False)])
def test_squash_errs_by_less_than_it_tells(kinds):
    """Beside saturated tiles, whose denominators are in the same product."""
    x = torch.cat((torch.linspace(-9, 9, 1022), torch.tensor([200.0, -200.0])))
    x = torch.stack([x.roll(300 * n) for n in range(len(kinds))])
    x[:, 0] = torch.where(torch.tensor(kinds), 200.0, -200.0)  # all are saturated
    found = []
    for given in (x, torch.full_like(x, torch.nan)):
        found.append(torch.empty_like(x))
        squash_kernel[1,](given, found[-1], x.shape[1], kinds)
    for is_tanh, given, got in zip(kinds, x.double(), found[0], strict=True):
        assert (got - (given.tanh() if is_tanh else given.sigmoid())).abs().max() < 4e-7
    assert found[1].isnan().all()


@pytest.mark.parametrize("cell", BOTH)
def test_operands_are_rounded_to_tf32(cell):
    shape = Shape(3, 5, 32)
    assert_tf32(cell, shape, run(cell, shape))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("share", lambda buffer, tile: buffer.store(tile * 1.001)),
        ("zero_where", lambda condition, tiles: tiles),
    ],
)
def test_planted_faults_are_found(name, fault, monkeypatch):
    monkeypatch.setattr(mma, name, fault)
    assert differences("lstm", RAGGED, run("lstm", RAGGED))
