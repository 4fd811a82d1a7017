#!/usr/bin/env python3
"""masque's kernels and PyTorch's side by side on a GPU, in bf16.

    bench_kernels.py                      every comparison, three turns of each side
    bench_kernels.py --only attention     one of them: attention, layernorm, gelu, relation_kl, adamw
    bench_kernels.py --batch 64 --rounds 5

The two take turns, masque, PyTorch, masque, PyTorch; each row shows the medians over the turns in microseconds, their ratio
(PyTorch's time over masque's: above 1 masque is faster) and its range. masque is run as `masque measure kernels --json`, and
its rows say which shapes are compared; of several versions the one that it chooses counts.

Attention has 50, 99 and 197 tokens in heads of 64, 197 in heads of 32 (MAE's decoder), and 65 and 257 of a ViT-H.

What stands against it: the fastest of PyTorch's backends of scaled_dot_product_attention, forward and backward, each
pass by itself, on q, k and v that lie apart (`sdpa`), and on the packed qkv that masque takes, gradient packed too
(`packed`); layer norm and GELU forward and backward; TinyMIM's relation loss with its gradient in plain operations, the
divergence in f32; fused AdamW on f32 parameters, which unlike masque's writes no bf16 copy of them. Both sides are timed
by the device's events after its cache was overwritten. PyTorch's device is kept busy before each timing so that it does
not wait for Python.

The program is $MASQUE, else `masque` on PATH, else target/release/masque of this repository. Exit code: 0; 2 when
something is missing, misspelt or fails, with one sentence.
"""

import argparse
import statistics
import sys

# What masque is asked for: model, kept patches in per cent, ops.
CALLS = [
    ("base", "25,50,100", ("attention", "layernorm", "gelu", "adamw")),
    ("huge", "25", ("attention",)),
    ("tiny", "100", ("relation_kl",)),
]
OPS = ("attention", "layernorm", "gelu", "relation_kl", "adamw")
# name: width, blocks, side of a patch
SIZES = {"tiny": (192, 12, 16), "base": (768, 12, 16), "huge": (1280, 32, 14)}
WARM_UP = 3
# Some ten milliseconds of the device: longer than Python needs to hand over any of the work below.
BUSY_CYCLES = 20_000_000


class Stop(Exception):
    """Something a user has to put right; printed as one sentence, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Stop(f"{message}; --help lists the options.")


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def names(text):
    for name in text.split(","):
        if name not in OPS:
            raise argparse.ArgumentTypeError(f"there is no `{name}`; there are {', '.join(OPS)}")
    return text.split(",")


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=names, default=list(OPS), metavar="NAME,...", help="what to compare (everything)")
    add("--batch", type=count, default=256, help="images (256)")
    add("--rounds", type=count, default=3, help="turns that each side takes (3)")
    add("--runs", type=count, default=20, help="timings of each row in a turn (20)")
    add("--device", default="gpu", help="masque's device; PyTorch takes its first (gpu)")
    add("--timeout", type=count, default=600, help="seconds allowed to one run of masque (600)")
    return parser.parse_args()


# ---- PyTorch's side ----


class Clock:
    def __init__(self, runs):
        self.runs = runs
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scrap = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def us(self, work):
        """Median time of work() on the device."""
        times = []
        for run in range(WARM_UP + self.runs):
            self.scrap.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            self.start.record()
            work()
            self.end.record()
            self.end.synchronize()
            if run >= WARM_UP:
                times.append(self.start.elapsed_time(self.end) * 1e3)
        return statistics.median(times)


def numbers(*shape, grad=True):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def passes(clock, function, inputs):
    """Forward and backward of function(*inputs), each by itself."""
    y = function(*inputs)
    dy = torch.randn_like(y)
    back = clock.us(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    return {"forward": clock.us(lambda: function(*inputs)), "backward": back}


def backends():
    from torch.nn.attention import SDPBackend

    wanted = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return [getattr(SDPBackend, name) for name in wanted if hasattr(SDPBackend, name)]


def attention(clock, case):
    from torch.nn.attention import sdpa_kernel

    b, n, heads, d = (case[key] for key in ("b", "n", "heads", "d"))

    def packed(qkv):
        q, k, v = qkv.reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, heads * d)

    apart = [numbers(b, heads, n, d) for _ in range(3)]
    forms = {"sdpa": (F.scaled_dot_product_attention, apart), "packed": (packed, [numbers(b, n, 3 * heads * d)])}
    found = {"forward": {}, "backward": {}}
    for backend in backends():
        for form, (function, inputs) in forms.items():
            try:
                with sdpa_kernel(backend):
                    times = passes(clock, function, inputs)
            except RuntimeError:
                continue  # This backend does not take these sizes on this card.
            for direction, us in times.items():
                found[direction][form] = min(us, found[direction].get(form, us))
    return found


def layernorm(clock, case):
    c = case["c"]
    inputs = [numbers(case["b"], case["n"], c), numbers(c), numbers(c)]
    times = passes(clock, lambda x, w, bias: F.layer_norm(x, (c,), w, bias, 1e-6), inputs)
    return {direction: {"eager": us} for direction, us in times.items()}


def gelu(clock, case):
    times = passes(clock, F.gelu, [numbers(case["b"], case["n"], case["c"])])
    return {direction: {"eager": us} for direction, us in times.items()}


def relation_kl(clock, case):
    b, n, heads = (case[key] for key in ("b", "n", "heads"))
    student = numbers(b, n, 3 * heads * case["student"])
    teacher = numbers(b, n, 3 * heads * case["teacher"], grad=False)

    def scores(qkv, i, j):
        parts = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return (parts[i] @ parts[j].transpose(-2, -1) * parts.shape[-1] ** -0.5).float()

    def work():
        loss = 0
        for i, j in ((0, 1), (2, 2)):  # q-k and v-v
            ours, theirs = scores(student, i, j).log_softmax(-1), scores(teacher, i, j).softmax(-1)
            loss = loss + F.kl_div(ours, theirs, reduction="sum") / (b * heads * n)
        torch.autograd.grad(loss, student)

    return {"loss+gradient": {"eager": clock.us(work)}}


def shapes(model):
    """What MAE's encoder trains."""
    c, depth, patch = SIZES[model]
    block = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    return [(1, 1, c), (c, 3, patch, patch), (c,)] + depth * block + [(c,), (c,)]


def adamw(clock, case, model):
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes(model)]
    if sum(p.numel() for p in params) != case["parameters"]:
        raise Stop(f"masque's {model} has {case['parameters']} parameters, which is not the model that PyTorch is timed with.")
    for p in params:
        p.grad = torch.randn_like(p)
    optimiser = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    return {"update": {"fused": clock.us(optimiser.step)}}


def torch_times(clock, row):
    """{direction: {variant: microseconds}}"""
    if row["op"] == "adamw":
        return adamw(clock, row["case"], row["model"])
    return {"attention": attention, "layernorm": layernorm, "gelu": gelu, "relation_kl": relation_kl}[row["op"]](clock, row["case"])


# ---- side by side ----


def counts(row):
    """Whether PyTorch has a counterpart, and this is the version that masque runs."""
    plain = row.get("case", {}).get("what") != "class rows" and "keys" not in row.get("case", {})
    return row.get("op") in OPS and plain and (row["version"] is None or row["chosen"])


def masque_rows(bench_torch, program, options):
    rows = []
    for model, tokens, ops in CALLS:
        ops = [op for op in ops if op in options.only]
        if not ops:
            continue
        arguments = ["kernels", "--device", options.device, "--precision", "bf16", "--model", model, "--tokens", tokens]
        arguments += ["--batch", options.batch, "--rounds", options.runs, "--only", ",".join(ops)]
        rows += filter(counts, bench_torch.run_masque(program, arguments, options.timeout))
    return rows


def shown(row):
    return " ".join(f"{key} {value}" for key, value in row["case"].items() if key != "what")


def measure(bench_torch, options):
    """{(op, shape, direction): [(masque, {variant: PyTorch})]}, one entry a turn."""
    program, found = bench_torch.find_masque(), {}
    clock = Clock(options.runs)
    for turn in range(1, options.rounds + 1):
        print(f"turn {turn}/{options.rounds}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        rows = masque_rows(bench_torch, program, options)
        times = {}
        for row in rows:
            # Forward and backward of one shape are two rows and one measurement.
            key = row["op"], shown(row)
            if key not in times:
                times[key] = torch_times(clock, row)
            found.setdefault((*key, row["direction"]), []).append((row["us"], times[key][row["direction"]]))
    return found


def report(found, options):
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, bf16, {options.rounds} turns; ratio = PyTorch / masque")
    print(f"{'op':<12} {'shape':<46} {'direction':<14} {'against':<8} {'masque us':>10} {'PyTorch us':>11} {'ratio':>6}  range")
    for (op, shape, direction), turns in found.items():
        for variant in turns[0][1]:
            pairs = [(ours, theirs[variant]) for ours, theirs in turns if variant in theirs]
            ours, theirs = (statistics.median(side) for side in zip(*pairs))
            ratios = [b / a for a, b in pairs]
            text = f"{op:<12} {shape:<46} {direction:<14} {variant:<8} {ours:>10.1f} {theirs:>11.1f} {theirs / ours:>6.2f}"
            print(f"{text}  {min(ratios):.2f}..{max(ratios):.2f}")


def main():
    options = parse()
    global torch, F
    try:
        import torch
        import torch.nn.functional as F
    except ImportError:
        raise Stop("PyTorch is not installed for this Python.")
    if not torch.cuda.is_available():
        raise Stop("PyTorch sees no CUDA device.")
    import bench_torch

    torch.manual_seed(0)
    try:
        report(measure(bench_torch, options), options)
    except bench_torch.Failure as failure:
        raise Stop(str(failure))


if __name__ == "__main__":
    try:
        main()
    except Stop as stop:
        print(f"bench_kernels.py: {stop}", file=sys.stderr)
        sys.exit(2)
