"""Claims about onerow.py: the product of one row in every way of storing the matrix, interpreted or on a GPU."""
import pytest
import torch

import compress
import onetoken
from common import kernels  # noqa: F401


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R, C", [(1, 64), (7, 192), (130, 320), (9, 2560)])     # padded words, several pieces
def test_one_row_equals_the_matrix_multiplied_out(kernels, R, C, dtype):  # noqa: F811
    from onerow import one_row
    torch.manual_seed(R)
    torch.compiler.reset()
    weight, x = torch.randn(R, C), torch.randn(1, C).to(dtype)
    weight[:, :8] += 2                                             # so that shifts count
    for parts in ({"q": weight.to(dtype)}, compress.round_int8(weight), compress.round_int4(weight)):
        layer = onetoken.RoundedLinear(parts)
        exact = x.double() @ layer.multiplied_out().double().T
        for run in one_row, torch.compile(one_row, backend="aot_eager", fullgraph=True):
            y = run(x, layer.q, layer.scale)
            assert y.dtype == dtype and y.shape == (1, R)
            torch.testing.assert_close(y.double(), exact, rtol=1e-2 if dtype != torch.float32 else 1e-5,
                                       atol=1e-2 if dtype != torch.float32 else 1e-4)
