"""Matrix products on the processor, by the fastest of the libraries that are installed anyway.

torch's x86 builds multiply with MKL. On processors that Intel did not make it leaves AVX-512 unused, and reaches less than
half the speed of the OpenBLAS inside NumPy in float32; some 70 % where there is no AVX-512, and a quarter where a factor has
only 8 columns (docs/log.md has the figures). Where OpenBLAS does not use AVX-512 either, or is not there, oneDNN, which
torch has for bfloat16, stands in; of few rows, as decoding has them, it makes more than OpenBLAS. Who multiplies follows
from the processor, the libraries and the sizes, never from a stopwatch: every run on one machine gives the same bits.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from flexlora.processor import leaves_avx512_unused, made_by_intel, threads_sleep

LEAST = 2**16
"""Multiplications below which the way to NumPy and back costs more than it saves."""
MANY = 2**20
"""Multiplications from which on oneDNN is faster than an OpenBLAS without AVX-512, whose calls cost less."""
AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""What OpenBLAS calls the processors that have it."""
FEW = 64
"""Rows of a decoding step, which reads its weights once."""
PIECE = 2**21
"""Multiplications for which waking another thread pays."""


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) @ b (k, m), where no gradient is recorded."""
    if _TURNS and a.dtype == torch.bfloat16 and a.shape[0] <= FEW and a.device.type == "cpu":
        return (b.T @ a.T).T.contiguous()
    if not _fits(a, b):
        return _torch_mm(a, b)
    threads = torch.get_num_threads()
    served = _SERVED and (threads == 1 or _SLEEP)
    decoded = a.shape[0] <= FEW and a.is_inference()  # training keeps what oneDNN makes, in memory worse than `empty`
    if (
        _STANDS_IN
        and (decoded or not (served and _BROAD))
        and a.dtype == torch.float32
        and _multiplications(a, b) >= MANY
    ):
        return _onednn_mm(a, b)
    if not served:
        return _torch_mm(a, b)
    x, y = _bare(a).numpy(), _bare(b).numpy()
    (n, k), m = x.shape, y.shape[1]
    pieces = min(threads, n * k * m // PIECE, max(n, m))
    if pieces <= 1:
        return torch.from_numpy(np.matmul(x, y))
    out = np.empty((n, m), x.dtype)
    ends = [max(n, m) * i // pieces for i in range(pieces + 1)]
    cuts = [slice(start, end) for start, end in itertools.pairwise(ends)]
    parts = [(x[c], y, out[c]) if n >= m else (x, y[:, c], out[:, c]) for c in cuts]
    waiting = [_pool(threads - 1).submit(np.matmul, *part) for part in parts[1:]]
    np.matmul(*parts[0])
    for part in waiting:
        part.result()
    return torch.from_numpy(out)


def _bare(x: Tensor) -> Tensor:
    """x without gradient: whatever torch does lets another thread take over for a while, so it does nothing in vain."""
    return x.detach() if x.requires_grad else x


def _onednn_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by oneDNN, which takes its first factor row by row: of a transposed one it would make a copy."""
    if b.shape[1] < a.shape[0] and not a.is_contiguous():
        return _onednn(b.T, a).T.contiguous()
    return _onednn(a, b.T)


def _onednn(x: Tensor, w: Tensor) -> Tensor:
    """x (n, k) @ w (m, k)ᵀ."""
    return torch.ops.mkldnn._linear_pointwise(_bare(x), _bare(w), None, "none", [], "")


def _torch_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by torch's library, in float32 in the memory of `empty`."""
    if _fits(a, b) and a.dtype == torch.float32 and not torch.is_grad_enabled():
        return torch.mm(a.detach(), b.detach(), out=empty(a.shape[0], b.shape[1]))
    return a @ b


def empty(*shape: int) -> Tensor:
    """A float32 tensor of a shape on the processor, its entries not set, of NumPy's memory.

    Torch wants addresses that are multiples of 64, for which the C library (glibc before 2.38) asks for 96 bytes more than a
    freed tensor of that size has left behind: what torch frees while other tensors live stays empty. For NumPy it is
    enough. A forward pass of which everything is kept lost a third of its memory that way.
    """
    return torch.from_numpy(np.empty(shape, np.float32))


def add_mm(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total (n, m) += factor · a (n, k) @ b (k, m), in place; in one pass where the library can."""
    if _SERVED and _fits(a, b):
        total.add_(mm(a, b), alpha=factor)
    else:
        total.addmm_(a, b, alpha=factor)


def gram(a: Tensor) -> Tensor:
    """a (n, k) @ aᵀ, exactly symmetric, for half the work of a product where that pays."""
    if _SERVED and _fits(a, a.T):
        x = a.detach().numpy()
        return torch.from_numpy(np.matmul(x, x.T))  # NumPy sees the transpose and works on one triangle
    n, block = a.shape[0], 256
    G = a.new_empty((n, n))
    for i in range(0, n, block):
        to = i + block
        torch.mm(a[i:to], a[i:].T, out=G[i:to, i:])
        G[i:to, i:to] = G[i:to, i:to].tril() + G[i:to, i:to].tril(-1).T
        G[to:, i:to] = G[i:to, to:].T
    return G


def _fits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.float64)
        and a.device.type == b.device.type == "cpu"
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and _multiplications(a, b) >= LEAST
    )


def _multiplications(a: Tensor, b: Tensor) -> int:
    return a.shape[0] * a.shape[1] * b.shape[1]


_PLAIN = (Tensor, nn.Parameter)
"""Not, say, the fake tensors by which memory is estimated."""


_openblas = [
    library
    for library in ThreadpoolController().lib_controllers
    if library.internal_api == "openblas" and "numpy" in library.filepath
]
_SERVED = bool(_openblas) and torch.backends.mkl.is_available() and not made_by_intel()
_BROAD = any(x.info()["architecture"] in AVX512 for x in _openblas)
"""Whether OpenBLAS uses AVX-512."""
_STANDS_IN = leaves_avx512_unused() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether oneDNN is better than a library without AVX-512."""
_TURNS = made_by_intel()
"""Whether a product of few rows in bfloat16 is faster turned round: a third with AMX, while AVX512-BF16 loses as much by it."""
_SLEEP = threads_sleep()


if _SERVED:
    for _library in _openblas:  # its own threads would spin between products, on the cores of torch's
        _library.set_num_threads(1)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="products")
