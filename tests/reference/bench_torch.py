#!/usr/bin/env python3
"""masque and PyTorch side by side on the CPU: single ops and a whole MAE training step.

Both sides do the same work in f32 with the same number of threads. They take turns, masque, torch, masque,
torch, once a round, so that a busy machine troubles both alike; each row shows the medians over the rounds,
their ratio (torch time / masque time: above 1 masque is faster) and the range of the ratio over the rounds.

    bench_torch.py                                        every op, then MAE tiny at batch 16 and base at 8
    bench_torch.py --what ops --only attention,softmax    some ops
    bench_torch.py --what step --model small:8            one step; --model tiny,base --batch 4 also works
    bench_torch.py --min-ratio 0.9                        exit 1 when a row is below
    bench_torch.py --min-ratio matmul=0.9,step=1.1        the same by group
    bench_torch.py --torch-only                           PyTorch's times alone, no masque needed
    bench_torch.py --self-check                           is this MAE the golden micro-model?

The program is $MASQUE, else `masque` on PATH, else target/release/masque of this repository. It is run as
`masque measure ops ... --json` and `masque measure step ... --json`, and its rows say which cases are compared:
the torch side repeats each case as often as the row's `runs` says. `--attention` and `--adamw` choose what
PyTorch is measured with: by default plain eager attention as in the MAE code, and the default AdamW; `best` takes
the faster variant of each row. The variants of an op are all measured and shown, whichever is chosen. Products
write into a buffer made beforehand, so that allocation is no part of them; the other ops run forward and backward
through autograd and allocate as they do in training.

The model is a plain statement of MAE (arXiv 2111.06377) with torch alone. Before a step is timed it must
reproduce the golden micro-model's losses and gradient norms in float64.

Exit code: 0; 1 when --min-ratio is not met; 2 when something is missing, misspelt or fails, with one sentence.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    print("bench_torch.py: PyTorch is not installed for this Python.", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """Something a user has to put right; printed as one sentence, exit code 2."""


# ---- attention and optimiser variants ----


def split_heads(qkv, heads):
    """Packed [B, N, 3*H*D] to q, k, v of [B, H, N, D]."""
    b, n, c3 = qkv.shape
    return qkv.reshape(b, n, 3, heads, c3 // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(y):
    """[B, H, N, D] to [B, N, H*D]."""
    b, h, n, d = y.shape
    return y.transpose(1, 2).reshape(b, n, h * d)


def attention_eager(qkv, heads):
    q, k, v = split_heads(qkv, heads)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, H, N, N]
    return join_heads(scores.softmax(dim=-1) @ v)


def attention_sdpa(qkv, heads):
    q, k, v = split_heads(qkv, heads)
    return join_heads(F.scaled_dot_product_attention(q, k, v))


ATTENTION = {"eager": attention_eager, "sdpa": attention_sdpa}
ADAMW = {"default": {}, "fused": {"fused": True}}
PARTS = ("forward", "backward", "update")


def chosen(option, variants):
    """The variants that an option stands for: one, or all of them for `best`."""
    return list(variants) if option == "best" else [option]


# ---- the model ----

# name: width, depth, heads
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def sincos(dim, grid):
    """Position table [1, 1 + grid*grid, dim]: zeros for the class token; column half, then row half; float32."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    at = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # [grid, dim/4]
    wave = torch.cat([at.sin(), at.cos()], dim=1)  # [grid, dim/2]
    column = wave[None, :, :].expand(grid, grid, -1)
    row = wave[:, None, :].expand(grid, grid, -1)
    table = torch.cat([column, row], dim=2).reshape(grid * grid, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


class Attention(nn.Module):
    def __init__(self, dim, heads, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attention(self.qkv(x), self.heads))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, L, D]


class Mae(nn.Module):
    """Masked autoencoder; the state dict has MAE's names in MAE's order."""

    def __init__(self, image, patch, encoder, decoder, attention, norm_pix=True):
        super().__init__()
        (dim, depth, heads), (dec_dim, dec_depth, dec_heads) = encoder, decoder
        grid = image // patch
        self.patch, self.norm_pix = patch, norm_pix
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos(dim, grid), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_dim))
        self.decoder_pos_embed = nn.Parameter(sincos(dec_dim, grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, attention) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, dec_dim)
        self.decoder_blocks = nn.ModuleList([Block(dec_dim, dec_heads, attention) for _ in range(dec_depth)])
        self.decoder_norm = nn.LayerNorm(dec_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dec_dim, 3 * patch * patch)
        self.initialise()

    def initialise(self):
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, images):
        b, _, side, _ = images.shape
        p, grid = self.patch, side // self.patch
        x = images.reshape(b, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1)  # [B, row, col, py, px, C]
        return x.reshape(b, grid * grid, p * p * 3)

    def encode(self, images, noise, mask_ratio):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        b, patches, dim = x.shape
        keep = int(patches * (1 - mask_ratio))
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, dim))  # [B, K, D]
        mask = (restore >= keep).to(x.dtype)  # [B, L], 1 is removed
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def decode(self, x, restore):
        x = self.decoder_embed(x)
        b, tokens, dim = x.shape
        hidden = self.mask_token.expand(b, restore.shape[1] + 1 - tokens, -1)
        y = torch.cat([x[:, 1:], hidden], dim=1).gather(1, restore[:, :, None].expand(-1, -1, dim))
        x = torch.cat([x[:, :1], y], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # [B, L, P]

    def forward(self, images, noise, mask_ratio):
        x, mask, restore = self.encode(images, noise, mask_ratio)
        pred = self.decode(x, restore)
        target = self.patchify(images)
        if self.norm_pix:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        per_patch = ((pred - target) ** 2).mean(dim=-1)
        return (per_patch * mask).sum() / mask.sum()


# ---- the golden micro-model ----

# norm_pix: loss, L2 norm of all gradients
GOLDEN = {False: (0.5125649486173123, 0.18690577743774228), True: (1.0056227797735364, 0.25950250193894425)}


def golden_model(norm_pix, attention):
    """Every parameter value is a sine of its place; the position tables stay."""
    model = Mae(32, 8, (16, 2, 4), (8, 1, 2), attention, norm_pix).double()
    for j, (name, value) in enumerate(model.state_dict().items()):
        if "pos_embed" not in name:
            i = torch.arange(value.numel(), dtype=torch.float64)
            norm_weight = "norm" in name and name.endswith("weight")
            value.copy_((0.1 * (0.37 * i + 1.3 * j).sin() + norm_weight).reshape(value.shape))
    return model


def self_check():
    """Compares loss and gradients with the golden micro-model; returns what it found, a line a variant."""
    at = torch.arange(3 * 32 * 32, dtype=torch.float64)
    images = torch.stack([(0.05 * at + n).sin().reshape(3, 32, 32) for n in range(2)])
    place = torch.arange(1, 17, dtype=torch.float64)
    noise = torch.stack([(0.6180339887 * place * k).frac() for k in (1, 2)])
    lines = []
    for norm_pix, (variant, attention) in itertools.product(GOLDEN, ATTENTION.items()):
        model = golden_model(norm_pix, attention)
        loss = model(images, noise, 0.75)
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
        want = GOLDEN[norm_pix]
        line = f"norm_pix={norm_pix} attention={variant}: loss {loss.item():.16g}, gradient norm {norm:.16g}"
        if not all(math.isclose(got, x, rel_tol=1e-11) for got, x in zip((loss.item(), norm), want)):
            raise Failure(f"the golden micro-model gives loss {want[0]} and gradient norm {want[1]}, not {line}.")
        lines.append(line)
    return lines


# ---- timing in torch ----


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


def torch_op(op, case, runs, options):
    """Measures every variant; `ms` is the one the options ask for."""
    try:
        works = op_works(op, case)
    except TypeError:
        raise Failure(f"masque's case {json.dumps(case)} of {op} does not have the sizes that op is measured with.")
    variants = {name: median_ms(work, runs) for name, work in works.items()}
    counted = chosen({"attention": options.attention, "adamw": options.adamw}.get(op, "best"), variants)
    return {"ms": min(variants[name] for name in counted), "variants": variants}


def parameter_groups(model):
    """No weight decay for vectors, weight decay for all else, as MAE does it."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
    ]


def time_steps(model, optimiser, images, options):
    """Times of the three parts of each step, [[forward, backward, update], ...] in milliseconds, and the last loss."""
    patches = (options.image_size // options.patch_size) ** 2
    rows = []
    for step in range(options.warmup + options.steps):
        clock = [time.perf_counter()]
        loss = model(images, torch.rand(len(images), patches), options.mask_ratio)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())
        if step >= options.warmup:
            rows.append([(b - a) * 1e3 for a, b in zip(clock, clock[1:])])
    return rows, loss.item()


def torch_step_variant(name, batch, attention, adamw, options):
    torch.manual_seed(0)
    decoder = options.decoder_dim, options.decoder_depth, options.decoder_heads
    model = Mae(options.image_size, options.patch_size, SIZES[name], decoder, ATTENTION[attention])
    optimiser = torch.optim.AdamW(parameter_groups(model), lr=1e-4, betas=(0.9, 0.95), **ADAMW[adamw])
    images = torch.randn(batch, 3, options.image_size, options.image_size)
    rows, loss = time_steps(model, optimiser, images, options)
    parts = dict(zip(PARTS, map(statistics.median, zip(*rows))))
    return {"ms": statistics.median(map(sum, rows)), "parts": parts, "loss": loss}


def torch_step(name, batch, options):
    """The step with the chosen attention and AdamW; the fastest of the combinations for `best`."""
    results = {}
    for attention, adamw in itertools.product(chosen(options.attention, ATTENTION), chosen(options.adamw, ADAMW)):
        results[f"{attention}, AdamW {adamw}"] = torch_step_variant(name, batch, attention, adamw, options)
    best = min(results.values(), key=lambda result: result["ms"])
    return {**best, "variants": {variant: result["ms"] for variant, result in results.items()}}


# ---- running masque ----


def find_masque():
    named = os.environ.get("MASQUE")
    found = shutil.which(named or "masque")
    built = ROOT / "target" / "release" / "masque"
    if found is None and not named and os.access(built, os.X_OK):
        found = str(built)
    if found is None:
        wanted = f"MASQUE names {named}, which" if named else f"masque on PATH or {built}"
        raise Failure(f"{wanted} is not a program; run `cargo build --release` or set MASQUE.")
    return found


def run_masque(program, arguments, timeout):
    """Runs `masque measure ... --json` and returns its JSON objects."""
    command = [program, "measure", *map(str, arguments), "--json"]
    said = " ".join(command)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failure(f"`{said}` did not finish in {timeout:g} s.")
    except OSError as error:
        raise Failure(f"`{said}` does not start: {error.strerror}.")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"`{said}` failed with exit code {done.returncode}: {last}")
    try:
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    except ValueError:
        raise Failure(f"`{said}` printed something that is not JSON.")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise Failure(f"`{said}` printed no rows.")
    return rows


def require(row, key, want):
    """The masque row must have been measured as it was asked to."""
    if row.get(key) != want:
        raise Failure(f"masque was asked for {key} {want} but its row says {row.get(key)}: {json.dumps(row)}")


def positive(row, key):
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise Failure(f"`{key}` must be a number above 0 in masque's row {json.dumps(row)}")
    return value


def masque_ops(program, op, options):
    """Rows of one op, {"case", "runs", "ms"}."""
    arguments = ["ops", "--threads", options.threads, "--rounds", options.runs, "--only", op]
    rows = run_masque(program, arguments, options.timeout)
    for row in rows:
        require(row, "op", op)
        require(row, "dtype", "f32")
        require(row, "threads", options.threads)
        if not isinstance(row.get("case"), dict):
            raise Failure(f"masque's row has no case: {json.dumps(row)}")
    return [{"case": row["case"], "runs": int(positive(row, "runs")), "ms": positive(row, "ms")} for row in rows]


def masque_step(program, name, batch, options):
    arguments = ["step", "--model", name, "--batch", batch, "--norm-pix"]
    for key in STEP_SIZES + ("threads", "steps", "warmup"):
        arguments += ["--" + key.replace("_", "-"), getattr(options, key)]
    row = run_masque(program, arguments, options.timeout)[-1]
    require(row, "what", "step")
    require(row, "model", name)
    require(row, "batch", batch)
    for key in ("threads",) + STEP_SIZES:
        if key in row:
            require(row, key, getattr(options, key))
    if not isinstance(row.get("parts"), dict):
        raise Failure(f"masque's row has no parts: {json.dumps(row)}")
    parts = {part: positive(row["parts"], part) for part in PARTS}
    return {"ms": positive(row, "ms_per_step"), "parts": parts, "loss": row.get("loss")}


# ---- side by side ----

OPS = ("matmul_forward", "matmul_input", "matmul_weight", "layernorm", "gelu", "softmax", "attention", "adamw")
STEP_SIZES = ("image_size", "patch_size", "mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads")


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


def op_round(program, op, options):
    """One round of one op: [(name, case, masque result, torch result)]."""
    if program:
        rows = masque_ops(program, op, options)
    else:
        rows = [{"case": case, "runs": options.runs} for case in fallback_cases(op)]
    return [(op, row["case"], row, torch_op(op, row["case"], row["runs"], options)) for row in rows]


def step_round(program, name, batch, options):
    ours = masque_step(program, name, batch, options) if program else {}
    return [("step", {"model": name, "batch": batch}, ours, torch_step(name, batch, options))]


def group_of(name):
    return name.split("_")[0]


def median_dict(dicts):
    return {key: statistics.median(d[key] for d in dicts) for key in dicts[0]}


def summarise(name, case, ours, theirs):
    """One row of the table from the results of all rounds."""
    row = {"name": name, "group": group_of(name), "case": case}
    row["torch_ms"] = statistics.median(r["ms"] for r in theirs)
    row["torch_variants"] = median_dict([r["variants"] for r in theirs])
    if "parts" in theirs[0]:
        row["torch_parts"] = median_dict([r["parts"] for r in theirs])
    if "ms" in ours[0]:
        row["masque_ms"] = statistics.median(r["ms"] for r in ours)
        row["ratio"] = row["torch_ms"] / row["masque_ms"]
        row["round_ratios"] = [b["ms"] / a["ms"] for a, b in zip(ours, theirs)]
        if "parts" in ours[0]:
            row["masque_parts"] = median_dict([r["parts"] for r in ours])
    return row


def collect(rounds_of, rounds):
    """Runs every entry once a round and summarises each row over the rounds."""
    results = {}
    for number in range(1, rounds + 1):
        for label, run in rounds_of:
            print(f"round {number}/{rounds}: {label}", file=sys.stderr, flush=True)
            for name, case, ours, theirs in run():
                key = name, json.dumps(case)
                results.setdefault(key, (name, case, [], []))
                results[key][2].append(ours)
                results[key][3].append(theirs)
    uneven = [key for key, row in results.items() if len(row[2]) != rounds]
    if uneven:
        raise Failure(f"masque did not measure {uneven[0][0]} {uneven[0][1]} exactly once in every round.")
    return [summarise(*row) for row in results.values()]


def measure(options):
    program = None if options.torch_only else find_masque()
    entries = []
    if options.what != "step":
        entries += [(op, partial(op_round, program, op, options)) for op in options.only]
    if options.what != "ops":
        self_check()
        for name, batch in options.model:
            entries.append((f"step {name} batch {batch}", partial(step_round, program, name, batch, options)))
    return collect(entries, options.rounds)


# ---- the table ----


def case_text(case):
    return " ".join(f"{key}={value}" for key, value in case.items())


def listed(values):
    return ", ".join(f"{key} {value:.2f}" for key, value in values.items())


def print_row(row):
    text = f"{row['name']:<15} {case_text(row['case']):<28}"
    if "ratio" in row:
        low, high = min(row["round_ratios"]), max(row["round_ratios"])
        print(f"{text} {row['masque_ms']:>10.3f} {row['torch_ms']:>10.3f} {row['ratio']:>7.2f}  {low:.2f}..{high:.2f}")
    else:
        print(f"{text} {'-':>10} {row['torch_ms']:>10.3f} {'-':>7}  -")
    if len(row["torch_variants"]) > 1:
        print(f"    torch ms: {listed(row['torch_variants'])}")
    for side in ("masque", "torch"):
        if f"{side}_parts" in row:
            print(f"    {side} ms: {listed(row[side + '_parts'])}")


def group_means(rows):
    """Geometric mean of the ratios by group."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row["ratio"])
    return {group: statistics.geometric_mean(ratios) for group, ratios in groups.items()}


def print_table(rows, options):
    print(
        f"f32, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}, "
        f"attention {options.attention}, AdamW {options.adamw}; ratio = torch / masque"
    )
    print(f"{'name':<15} {'case':<28} {'masque ms':>10} {'torch ms':>10} {'ratio':>7}  spread")
    for row in rows:
        print_row(row)
    compared = [row for row in rows if "ratio" in row]
    if compared:
        print("geometric mean: " + listed(group_means(compared)))
        worst = min(compared, key=lambda row: row["ratio"])
        print(f"worst: {worst['name']} {case_text(worst['case'])} {worst['ratio']:.2f}")


def too_slow(rows, floors):
    """Sentences for the rows below their floor; floors is {group: least ratio}, the group "" standing for all."""
    out = []
    for row in rows:
        floor = floors.get(row["group"], floors.get("", 0))
        if row["ratio"] < floor:
            out.append(f"below {floor:g}: {row['name']} {case_text(row['case'])} {row['ratio']:.3f}")
    return out


def write_json(path, rows, options):
    head = {key: getattr(options, key) for key in ("threads", "rounds", "attention", "adamw")}
    record = {**head, "torch": torch.__version__, "dtype": "f32", "rows": rows}
    if not options.torch_only:
        record["geometric_means"] = group_means(rows)
    try:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}.")


# ---- arguments ----


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Failure(f"{message}; --help lists the options.")


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def fraction(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not between 0 and 1")
    return value


def names(text):
    picked = text.split(",")
    for name in picked:
        if name not in OPS:
            raise argparse.ArgumentTypeError(f"there is no op `{name}`; the ops are {', '.join(OPS)}")
    return picked


def jobs(text):
    """ "tiny:16,base" to [("tiny", 16), ("base", None)]."""
    out = []
    for job in text.split(","):
        name, colon, batch = job.partition(":")
        if name not in SIZES:
            raise argparse.ArgumentTypeError(f"there is no model `{name}`; the models are {', '.join(SIZES)}")
        out.append((name, count(batch) if colon else None))
    return out


def floors(text):
    """ "0.9" to {"": 0.9}; "matmul=0.9,step=1.1" to {"matmul": 0.9, "step": 1.1}."""
    out = {}
    for part in text.split(","):
        group, _, value = part.rpartition("=")
        try:
            out[group] = float(value)
        except ValueError:
            out[group] = math.nan
        if not 0 <= out[group] < math.inf:
            raise argparse.ArgumentTypeError(f"`{part}` is neither a ratio nor GROUP=RATIO")
    return out


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", choices=("ops", "step", "all"), default="all")
    add("--threads", type=count, default=2)
    add("--rounds", type=count, default=5, help="turns that each side takes (5)")
    add("--runs", type=count, default=10, help="given to `masque measure ops --rounds` each turn (10)")
    add("--only", type=names, default=list(OPS), metavar="NAME,...", help="ops to measure: " + ", ".join(OPS))
    add("--model", type=jobs, action="extend", metavar="NAME[:BATCH],...", help="tiny:16,base:8; may be repeated")
    add("--batch", type=count, default=8, help="batch of the models named without one (8)")
    add("--steps", type=count, default=5, help="timed steps each turn (5)")
    add("--warmup", type=count, default=1, help="untimed steps before them (1)")
    add("--image-size", type=count, default=224)
    add("--patch-size", type=count, default=16)
    add("--mask-ratio", type=fraction, default=0.75)
    add("--decoder-dim", type=count, default=512)
    add("--decoder-depth", type=count, default=8)
    add("--decoder-heads", type=count, default=16)
    add("--attention", choices=(*ATTENTION, "best"), default="eager", help="PyTorch's attention (eager)")
    add("--adamw", choices=(*ADAMW, "best"), default="default", help="PyTorch's AdamW (default)")
    add("--min-ratio", type=floors, metavar="R", help="exit 1 when a row is below; also GROUP=R,...")
    add("--timeout", type=count, default=600, help="seconds allowed to one run of masque (600)")
    add("--json", metavar="FILE", help="write the rows here as well")
    add("--torch-only", action="store_true", help="time PyTorch alone")
    add("--self-check", action="store_true", help="check the model against the golden micro-model and stop")
    options = parser.parse_args()
    options.model = [(name, batch or options.batch) for name, batch in options.model or jobs("tiny:16,base:8")]
    check(options)
    return options


def check(options):
    """What one option alone cannot say."""
    if options.image_size % options.patch_size:
        raise Failure(f"image size {options.image_size} is not a multiple of patch size {options.patch_size}.")
    if options.decoder_dim % options.decoder_heads or options.decoder_dim % 4:
        dim, heads = options.decoder_dim, options.decoder_heads
        raise Failure(f"decoder dim {dim} must be a multiple of 4 and of its {heads} heads.")
    if options.min_ratio and options.torch_only:
        raise Failure("--min-ratio needs masque; leave out --torch-only.")
    measured = {group_of(op) for op in options.only} if options.what != "step" else set()
    measured |= {"step"} if options.what != "ops" else set()
    for group in options.min_ratio or ():
        if group and group not in measured:
            raise Failure(f"--min-ratio names {group}, but what is measured is {', '.join(sorted(measured))}.")


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.self_check:
        print("\n".join(self_check()))
        return 0
    rows = measure(options)
    print_table(rows, options)
    if options.json:
        write_json(options.json, rows, options)
    slow = too_slow(rows, options.min_ratio) if options.min_ratio else []
    print("\n".join(slow), end="\n" if slow else "")
    return 1 if slow else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"bench_torch.py: {failure}", file=sys.stderr)
        sys.exit(2)
