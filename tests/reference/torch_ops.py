"""Single operations in PyTorch on the CPU, f32: what bench_torch.py --what ops times beside `masque measure ops`."""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch_models import ATTENTION

ADAMW = {"default": {}, "fused": {"fused": True}}
OPS = ("matmul_forward", "matmul_input", "matmul_weight", "layernorm", "gelu", "softmax", "attention", "adamw")


def median_ms(work, runs):
    """Median time of work() in milliseconds, after at least two and at least 50 ms of warm-up runs."""
    begin, warm = time.perf_counter(), 0
    while warm < 2 or time.perf_counter() - begin < 0.05:
        work()
        warm += 1
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def there_and_back(function, inputs, like):
    """Work that runs function(*inputs) and its backward from a fixed output gradient."""
    for x in inputs:
        x.requires_grad_()
    dy = torch.randn(like)

    def work():
        for x in inputs:
            x.grad = None
        function(*inputs).backward(dy)

    return work


def matmul_work(op, m, n, k):
    """The product alone: it writes into memory that is already there."""
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    left, right = {"matmul_forward": (x, w.t()), "matmul_input": (dy, w), "matmul_weight": (dy.t(), x)}[op]
    out = torch.empty(left.shape[0], right.shape[1])
    return lambda: torch.mm(left, right, out=out)


def layernorm_work(rows, c):
    inputs = torch.randn(rows, c), torch.ones(c), torch.zeros(c)
    return there_and_back(lambda x, w, b: F.layer_norm(x, (c,), w, b, eps=1e-6), inputs, (rows, c))


def gelu_work(rows, c):
    return there_and_back(F.gelu, [torch.randn(rows, c)], (rows, c))


def softmax_work(rows, c):
    return there_and_back(lambda x: torch.softmax(x, dim=-1), [torch.randn(rows, c)], (rows, c))


def attention_work(variant, b, n, heads, d):
    qkv = torch.randn(b, n, 3 * heads * d)
    return there_and_back(lambda x: ATTENTION[variant](x, heads), [qkv], (b, n, heads * d))


def adamw_work(variant, numel):
    param = nn.Parameter(torch.randn(numel))
    param.grad = torch.randn(numel)
    return torch.optim.AdamW([param], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **ADAMW[variant]).step


def op_works(op, case):
    """The PyTorch variants of one row: name of the variant -> work."""
    if op.startswith("matmul_"):
        return {"mm": matmul_work(op, **case)}
    if op == "attention":
        return {variant: attention_work(variant, **case) for variant in ATTENTION}
    if op == "adamw":
        return {variant: adamw_work(variant, **case) for variant in ADAMW}
    return {"eager": {"layernorm": layernorm_work, "gelu": gelu_work, "softmax": softmax_work}[op](**case)}


def cases(keys, sizes):
    return [dict(zip(keys.split(), size)) for size in sizes]


def fallback_cases(op):
    """What --torch-only measures; otherwise masque's rows decide."""
    layers = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (1536, 512), (512, 2048), (576, 192)]
    if op.startswith("matmul_"):
        return cases("m n k", [(m, n, k) for m in (400, 1576, 3152) for n, k in layers])
    return {
        "layernorm": cases("rows c", [(1576, 512), (400, 768), (3152, 512)]),
        "gelu": cases("rows c", [(1576, 2048), (400, 3072)]),
        "softmax": cases("rows c", [(25216, 197)]),
        "attention": cases("b n heads d", [(8, 50, 12, 64), (8, 197, 16, 32), (16, 50, 3, 64)]),
        "adamw": cases("numel", [(5_700_000,), (31_200_000,)]),
    }[op]
