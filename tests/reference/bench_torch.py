#!/usr/bin/env python3
"""masque and PyTorch side by side: a training step of each of the five systems, and single ops.

Both sides do the same work: method, models, batch, precision, threads, AdamW. They take turns, masque, torch eager, torch
compile, masque, ... once a round, so that a busy machine troubles all alike; a row shows the medians over the rounds, the ratio
(torch's time / masque's: above 1 masque is faster) to the better of eager and compile, and the range of the ratio over the rounds.

    bench_torch.py                                              all five methods, tiny at batch 4, f32, eager: about a minute on two cores
    bench_torch.py --method mae --model tiny:16,base:8          steps of one method
    bench_torch.py --method maskedkd --model tiny:16 --keep 98 --teacher small --precision bf16 --mode both
    bench_torch.py --device gpu --precision bf16 --mode both --method mae --model base:256
    bench_torch.py --what ops --only attention,softmax          some ops (f32, on the CPU); --what all for both
    bench_torch.py --min-ratio 0.9                              exit 1 when a row is below; mae=1.1,step=1,matmul=0.9 by group
    bench_torch.py --torch-only                                 PyTorch's times alone, no masque needed
    bench_torch.py --self-check                                 are these models the papers'?

The program is $MASQUE, else `masque` on PATH, else target/release/masque of this repository. It is run as `masque measure step
... --json` and `masque measure ops ... --json`, and what its rows say of themselves is compared with what was asked for.

Steps. The models are plain statements of the papers with torch alone (torch_models.py). Before any is timed, loss and gradients must be those
of recorded cases in float64 (torch_check.py). PyTorch's side has what makes it fast: scaled_dot_product_attention, fused AdamW, autocast where
bf16 is asked for and a teacher that is bf16 throughout then (--teacher-cast), teachers without gradients that stop at the block that is asked, patches chosen
before the blocks, channels-last patches where they are faster, images copied from pinned memory to a GPU, and nothing in a step waits for it. --mode compile is
torch.compile of everything up to the loss; where there is no compiler a sentence says so and eager goes on. Times of a step are of forward,
backward and update; on a GPU they are taken by events, and masque's step is recorded, as in training.

Ops. masque's rows say which cases are compared: the torch side repeats each case as often as the row's `runs` says. All variants of an op are
shown; --attention and --adamw choose which counts, by default plain attention and AdamW. Products write into a buffer made beforehand,
so that allocation is no part of them; the other ops run forward and backward through autograd and allocate as they do in training.

Exit code: 0; 1 when --min-ratio is not met; 2 when something is missing, misspelt or fails, with one sentence.
"""

import argparse
import gc
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

try:
    import torch
except ImportError:
    print(
        "bench_torch.py: PyTorch is not installed for this Python; install it, or time masque alone with `masque measure step`.",
        file=sys.stderr,
    )
    sys.exit(2)

import torch_check
from torch_models import ATTENTION, METHODS, SIZES, USUAL, Draw, make
from torch_ops import ADAMW, OPS, fallback_cases, median_ms, op_works

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """Something a user has to put right; printed as one sentence, exit code 2."""


def chosen(option, variants):
    """The variants that an option stands for: one, or all of them for `best`."""
    return list(variants) if option == "best" else [option]


# ---- a training step in torch ----


def parameter_groups(model):
    """No weight decay for vectors, weight decay for all else, as MAE does it."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
    ]


class TorchStep:
    """A model, its optimiser and a batch, ready to take steps."""

    def __init__(self, job, options, compiled, attention, adamw):
        torch.manual_seed(0)
        self.device, self.bf16 = torch.device(options.device.replace("gpu", "cuda")), options.precision == "bf16"
        self.model = make(job.method, job, ATTENTION[attention]).to(self.device)
        self.teaches = hasattr(self.model, "teacher")
        if self.teaches and self.bf16 and options.teacher_cast != "autocast":
            self.model.teacher.bfloat16()
        host = torch.randn(job.batch, 3, job.image_size, job.image_size)
        self.host = None
        # Where cutting an image into patches is faster so: not in bf16 on the CPU.
        if options.device != "cpu" or not self.bf16:
            self.model.to(memory_format=torch.channels_last)
            host = host.to(memory_format=torch.channels_last)
        if options.device != "cpu":
            self.host = host.pin_memory()
        self.images = host.to(self.device)
        targets = torch.eye(job.classes)[torch.arange(job.batch) % job.classes].to(self.device) if job.method == "maskedkd" else None
        self.draw = Draw(self.device, targets)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.model), lr=1.5e-4, betas=(0.9, 0.95), **ADAMW[adamw])
        self.forward, self.compiled = self.model, compiled
        if compiled:
            mode = options.compile_mode or ("reduce-overhead" if options.device != "cpu" else "default")
            self.forward = torch.compile(self.model, mode=mode)

    def step(self, mark):
        """`mark()` is called between its parts."""
        mark()
        if self.compiled and self.host is not None:
            torch.compiler.cudagraph_mark_step_begin()
        if self.host is not None:
            self.images.copy_(self.host, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.forward(self.images, self.draw)
        mark()
        loss.backward()
        mark()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        mark()
        return loss

    def compile(self):
        """Until nothing is compiled any more; seconds."""
        begin = time.perf_counter()
        for _ in range(3):
            loss = self.step(lambda: None)
        loss.item()
        return time.perf_counter() - begin

    def turn(self, options):
        """{"ms", "parts", "loss"} of a turn's steps, medians."""
        take = self.on_gpu if self.host is not None else self.on_cpu
        rows, loss = take(options.warmup, options.steps)
        if not math.isfinite(loss):
            raise Failure(f"PyTorch's loss is {loss} after {options.warmup + options.steps} steps.")
        total = statistics.median(sum(row.values()) for row in rows)
        return {"ms": total, "parts": median_dict(rows), "loss": loss}

    def on_cpu(self, warmup, steps):
        rows = []
        for _ in range(warmup + steps):
            clock = []
            if self.teaches and not self.compiled:
                self.model.clock = []
            loss = self.step(lambda: clock.append(time.perf_counter()))
            row = dict(zip(("forward", "backward", "update"), ((b - a) * 1e3 for a, b in zip(clock, clock[1:]))))
            if self.model_clock():
                row["teacher"] = sum(self.model.clock) * 1e3
                row["forward"] -= row["teacher"]
            rows.append(row)
        return rows[warmup:], loss.item()

    def model_clock(self):
        return getattr(self.model, "clock", None)

    def on_gpu(self, warmup, steps):
        """Between two events of each step; the host waits once, behind all of them."""
        events = [[] for _ in range(warmup + steps)]

        def mark(own):
            own.append(torch.cuda.Event(enable_timing=True))
            own[-1].record()

        for own in events:
            loss = self.step(lambda: mark(own))
        torch.cuda.synchronize()
        rows = [{"step": own[0].elapsed_time(own[-1])} for own in events]
        return rows[warmup:], loss.item()


def torch_steps(job, options):
    """{name: step} of every variant that is asked for, compiled already, and the seconds that compiling took."""
    variants = list(itertools.product(chosen(options.attention or "sdpa", ATTENTION), chosen(options.adamw or "fused", ADAMW)))
    found, seconds = {}, {}
    for mode, (attention, adamw) in itertools.product(options.modes, variants):
        name = mode if len(variants) == 1 else f"{mode}, {attention}, AdamW {adamw}"
        step = TorchStep(job, options, mode == "compile", attention, adamw)
        if mode == "compile":
            tell(f"{job.label}: torch.compile ...")
            try:
                seconds[name] = step.compile()
            except Exception as error:  # what inductor raises has no common type
                said = (str(error).strip().splitlines() or ["no message"])[0]
                sentence = f"torch.compile does not work here ({type(error).__name__}: {said})"
                if options.modes == ["compile"]:
                    raise Failure(f"{sentence}; --mode eager needs no compiler.")
                tell(f"{sentence}; eager goes on.")
                options.modes = ["eager"]
                break
        found[name] = step
    return found, seconds


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


def masque_step(program, job, options):
    arguments = ["step", "--method", job.method, "--device", options.device, "--precision", options.precision]
    arguments += ["--threads", options.threads, "--steps", options.steps, "--warmup", options.warmup]
    for key, value in job.asked.items():
        arguments += ["--" + key.replace("_", "-")] + ([] if value is True else [value])
    row = run_masque(program, arguments, options.timeout)[-1]
    require(row, "what", "step")
    require(row, "method", job.method)
    require(row, "dtype", options.precision)
    require(row, "threads", options.threads)
    for key, value in {**job.asked, **job.implied}.items():
        require(row, key, value)
    parts = row["parts"] and {part: positive(row["parts"], part) for part in row["parts"]}
    more = {key: row.get(key) for key in ("gflop_per_step", "gflop_per_s", "pool_bytes", "parameters", "teacher_parameters", "loss")}
    return {"ms": positive(row, "ms_per_step"), "parts": parts, **more}


# ---- what is compared ----

def make_job(method, name, batch, options):
    """What both sides are asked for: a flag of masque for each of `asked`, and what its row has to say besides."""
    patches = (options.image_size // options.patch_size) ** 2
    model, (_, teacher) = name or USUAL[method][0], USUAL[method]
    teacher = teacher and (options.teacher or teacher)
    depth = SIZES[teacher][1] if teacher else 0
    usual_block = {"dmae": 3 * depth // 4, "tinymim": {12: 12, 24: 18}.get(depth)}.get(method)
    job = SimpleNamespace(method=method, model=model, batch=batch, teacher=teacher, classes=1000, norm_pix=options.norm_pix)
    job.image_size, job.patch_size = options.image_size, options.patch_size
    job.mask_ratio = options.mask_ratio if options.mask_ratio is not None else (0.0 if method == "tinymim" else 0.75)
    job.keep = options.keep or patches // 2
    job.teacher_block = usual_block and (options.teacher_block or usual_block)
    job.decoder = options.decoder_dim or 512, options.decoder_depth or 8, options.decoder_heads or 16
    job.asked = {"model": model, "batch": batch, "image_size": job.image_size, "patch_size": job.patch_size}
    if teacher:
        job.asked["teacher"] = teacher
    if method == "maskedkd":
        job.asked["keep"] = job.keep
    if method in READS["mask_ratio"]:
        job.asked["mask_ratio"] = job.mask_ratio
    if job.teacher_block:
        job.asked["teacher_block"] = job.teacher_block
    job.implied = {"views": 2} if method == "dmjd" else {}
    if method in DECODED:
        job.asked.update(zip(("decoder_dim", "decoder_depth", "decoder_heads"), job.decoder))
        if options.norm_pix:
            job.asked["norm_pix"] = True
    job.label = f"{method} {model}{'<-' + teacher if teacher else ''} batch {batch}"
    job.case = {"method": method, **job.asked, **job.implied, "precision": options.precision, "device": options.device}
    check_job(job, patches)
    return job


def check_job(job, patches):
    kept = int(patches * (1 - job.mask_ratio))
    if job.method in READS["mask_ratio"] and not (0 < kept < patches or job.mask_ratio == 0 and job.method == "tinymim"):
        raise Failure(f"--mask-ratio {job.mask_ratio} keeps {kept} of {patches} patches; at least one has to be kept and one hidden.")
    if job.method == "dmjd" and 2 * kept > patches:
        raise Failure(f"--mask-ratio {job.mask_ratio}: two views that share nothing each hide at least half; take 0.5 or more for dmjd.")
    if job.method == "maskedkd" and job.keep > patches:
        raise Failure(f"--keep {job.keep}: the image has {patches} patches, of which 1 to {patches} can be seen.")
    if job.teacher_block and job.teacher_block > SIZES[job.teacher][1]:
        raise Failure(f"--teacher-block {job.teacher_block}: {job.teacher} has blocks 1 to {SIZES[job.teacher][1]}.")


def torch_op(op, case, runs, options):
    """Measures every variant; `ms` is the one the options ask for."""
    try:
        works = op_works(op, case)
    except TypeError:
        raise Failure(f"masque's case {json.dumps(case)} of {op} does not have the sizes that op is measured with.")
    variants = {name: median_ms(work, runs) for name, work in works.items()}
    counted = chosen({"attention": options.attention or "eager", "adamw": options.adamw or "default"}.get(op, "best"), variants)
    return {"ms": min(variants[name] for name in counted), "variants": variants}


def op_round(program, op, options):
    """One round of one op: [(name, case, masque result, torch result)]."""
    if program:
        rows = masque_ops(program, op, options)
    else:
        rows = [{"case": case, "runs": options.runs} for case in fallback_cases(op)]
    return [(op, row["case"], row, torch_op(op, row["case"], row["runs"], options)) for row in rows]


def step_rows(program, jobs, options):
    """A row for each job: masque, eager and compile take turns."""
    rows = []
    for job in jobs:
        tell(f"{job.label}: PyTorch's models")
        steps, compile_s = torch_steps(job, options)
        ours, theirs = [], {name: [] for name in steps}
        for number in range(1, options.rounds + 1):
            said = []
            if program:
                ours.append(masque_step(program, job, options))
                same_sizes(ours[-1], next(iter(steps.values())).model)
                said.append(f"masque {ours[-1]['ms']:.1f} ms")
            for name, step in steps.items():
                theirs[name].append(step.turn(options))
                said.append(f"{name} {theirs[name][-1]['ms']:.1f} ms")
            tell(f"{job.label}: round {number}/{options.rounds}: {', '.join(said)}")
        rows.append(step_row(job, ours, theirs, compile_s))
        del steps
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    return rows


def same_sizes(ours, model):
    """Both sides must train, and be taught by, networks of the same size."""
    numbers = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if hasattr(model, "teacher"):
        numbers["teacher_parameters"] = sum(p.numel() for p in model.teacher.parameters())
    for key, wanted in numbers.items():
        if ours[key] != wanted:
            raise Failure(f"masque's step has {ours[key]} {key.replace('_', ' ')} and PyTorch's {wanted}: they are not the same model.")


def step_row(job, ours, theirs, compile_s):
    medians = {name: statistics.median(turn["ms"] for turn in turns) for name, turns in theirs.items()}
    best = min(medians, key=medians.get)
    row = {"name": "step", "group": "step", "method": job.method, "case": job.case, "label": job.label}
    row.update(torch_ms=medians[best], torch_best=best, torch_variants=medians, torch_compile_s=compile_s)
    row["torch_rounds"] = {name: [turn["ms"] for turn in turns] for name, turns in theirs.items()}
    row["torch_parts"] = {name: median_dict([turn["parts"] for turn in turns]) for name, turns in theirs.items()}
    if ours:
        row["masque_ms"] = statistics.median(turn["ms"] for turn in ours)
        row["masque_rounds"] = [turn["ms"] for turn in ours]
        if ours[0]["parts"]:
            row["masque_parts"] = median_dict([turn["parts"] for turn in ours])
        row.update({f"masque_{key}": ours[-1][key] for key in ("gflop_per_step", "gflop_per_s", "pool_bytes", "parameters", "loss")})
        row["ratios"] = {name: median / row["masque_ms"] for name, median in medians.items()}
        row["ratio"] = row["ratios"][best]
        row["ratios_by_round"] = {name: [b["ms"] / a["ms"] for a, b in zip(ours, turns)] for name, turns in theirs.items()}
        row["round_ratios"] = row["ratios_by_round"][best]
    return row


def group_of(name):
    return name.split("_")[0]


def median_dict(dicts):
    return {key: statistics.median(d[key] for d in dicts) for key in dicts[0]}


def op_row(name, case, ours, theirs):
    """One row of the table from the results of all rounds."""
    row = {"name": name, "group": group_of(name), "case": case}
    row["torch_ms"] = statistics.median(r["ms"] for r in theirs)
    row["torch_variants"] = median_dict([r["variants"] for r in theirs])
    if "ms" in ours[0]:
        row["masque_ms"] = statistics.median(r["ms"] for r in ours)
        row["ratio"] = row["torch_ms"] / row["masque_ms"]
        row["round_ratios"] = [b["ms"] / a["ms"] for a, b in zip(ours, theirs)]
    return row


def op_rows(program, options):
    """Runs every op once a round and summarises each row over the rounds."""
    results = {}
    for number, op in itertools.product(range(1, options.rounds + 1), options.only):
        tell(f"round {number}/{options.rounds}: {op}")
        for name, case, ours, theirs in op_round(program, op, options):
            key = name, json.dumps(case)
            results.setdefault(key, (name, case, [], []))
            results[key][2].append(ours)
            results[key][3].append(theirs)
    uneven = [key for key, row in results.items() if len(row[2]) != options.rounds]
    if uneven:
        raise Failure(f"masque did not measure {uneven[0][0]} {uneven[0][1]} exactly once in every round.")
    return [op_row(*row) for row in results.values()]


def self_check(methods):
    """A line for each comparison of a model with recorded numbers."""
    folders = [folder for folder in (ROOT / "tests/fixtures/parity", ROOT / "fixtures/parity") if folder.is_dir()]
    if not folders:
        raise Failure(f"{ROOT}/tests/fixtures/parity is not there: it holds the numbers that the models are compared with before they are timed.")
    try:
        return list(torch_check.check(methods, folders[0]))
    except torch_check.Wrong as wrong:
        raise Failure(str(wrong))


def load():
    """Processes that want a core, of late; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def warn_of_others(options):
    """PyTorch's threads spin while they wait for each other, and lose several times as much as masque's to a busy machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if options.device == "cpu" and (load() or 0) > cores / 2:
        tell(
            f"warning: a load of {load():.1f} on {cores} cores: others work here too, which slows PyTorch most, and the ratios say little; "
            "wait, or set OMP_WAIT_POLICY=passive"
        )


def measure(options):
    warn_of_others(options)
    program = None if options.torch_only else find_masque()
    rows = []
    if options.what != "ops":
        jobs = [make_job(method, name, batch, options) for method in options.method for name, batch in options.model]
        tell(f"{len(self_check(options.method))} comparisons of the models with recorded losses and gradients: all agree")
        rows += step_rows(program, jobs, options)
    if options.what != "step":
        rows += op_rows(program, options)
    return rows


def tell(line):
    print(line, file=sys.stderr, flush=True)


# ---- the tables ----


def case_text(case):
    return " ".join(f"{key}={value}" for key, value in case.items())


def listed(values):
    return ", ".join(f"{key} {value:.2f}" for key, value in values.items())


def ratio_text(ratio, rounds):
    return f"{ratio:.2f} ({min(rounds):.2f}..{max(rounds):.2f})"


def print_steps(rows, options):
    where = f"GPU {torch.cuda.get_device_name()}" if options.device != "cpu" else f"CPU, {options.threads} threads"
    print(f"A training step, {where}, {options.precision}, {options.rounds} rounds of {options.steps} steps, torch {torch.__version__}")
    if not options.torch_only:
        print("ratio = torch's time / masque's: above 1 masque is faster; range over the rounds")
    for row in rows:
        print(f"\n{row['label']}  ({case_text({key: value for key, value in row['case'].items() if key in SHOWN})})")
        if "masque_ms" in row:
            work = f"   {row['masque_gflop_per_step']:.1f} GFLOP a step, {row['masque_gflop_per_s']:.1f} GFLOP/s"
            print(f"  {'masque':<28} {row['masque_ms']:>10.2f} ms{work}")
        for name, ms in row["torch_variants"].items():
            against = f"   ratio {ratio_text(row['ratios'][name], row['ratios_by_round'][name])}" if "ratios" in row else ""
            best = "  <- the better" if len(row["torch_variants"]) > 1 and name == row["torch_best"] else ""
            print(f"  {'torch ' + name:<28} {ms:>10.2f} ms{against}{best}")
        parts = {"masque": row.get("masque_parts"), **{f"torch {name}": parts for name, parts in row["torch_parts"].items()}}
        for name, part in parts.items():
            if part and len(part) > 1:
                print(f"    {name} ms: {listed(part)}")


def print_op(row):
    text = f"{row['name']:<15} {case_text(row['case']):<28}"
    if "ratio" in row:
        low, high = min(row["round_ratios"]), max(row["round_ratios"])
        print(f"{text} {row['masque_ms']:>10.3f} {row['torch_ms']:>10.3f} {row['ratio']:>7.2f}  {low:.2f}..{high:.2f}")
    else:
        print(f"{text} {'-':>10} {row['torch_ms']:>10.3f} {'-':>7}  -")
    if len(row["torch_variants"]) > 1:
        print(f"    torch ms: {listed(row['torch_variants'])}")


def print_ops(rows, options):
    print(
        f"f32, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}, "
        f"attention {options.attention or 'eager'}, AdamW {options.adamw or 'default'}; ratio = torch / masque"
    )
    print(f"{'name':<15} {'case':<28} {'masque ms':>10} {'torch ms':>10} {'ratio':>7}  spread")
    for row in rows:
        print_op(row)


def group_means(rows):
    """Geometric mean of the ratios by group."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row["ratio"])
    return {group: statistics.geometric_mean(ratios) for group, ratios in groups.items()}


def print_tables(rows, options):
    steps, ops = ([row for row in rows if (row["group"] == "step") == is_step] for is_step in (True, False))
    if steps:
        print_steps(steps, options)
    if ops:
        print_ops(ops, options)
    compared = [row for row in rows if "ratio" in row]
    if compared:
        print("\ngeometric mean: " + listed(group_means(compared)))
        worst = min(compared, key=lambda row: row["ratio"])
        print(f"worst: {worst.get('label') or worst['name'] + ' ' + case_text(worst['case'])} {worst['ratio']:.2f}")


def too_slow(rows, floors):
    """Sentences for the rows below their floor; floors is {group: least ratio}, the group "" standing for all."""
    out = []
    for row in rows:
        floor = floors.get(row.get("method"), floors.get(row["group"], floors.get("", 0)))
        if row["ratio"] < floor:
            out.append(f"below {floor:g}: {row['name']} {case_text(row['case'])} {row['ratio']:.3f}")
    return out


def first_line(command):
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def machine(options):
    """What the numbers were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if options.device != "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "masque": None if options.torch_only else first_line([find_masque(), "--version"]),
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "load_before": options.load,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path, rows, options):
    keys = ("threads", "rounds", "steps", "warmup", "precision", "device", "attention", "adamw", "compile_mode", "teacher_cast")
    record = {"what": "bench_torch", "arguments": sys.argv[1:], "machine": machine(options), "torch": torch.__version__}
    record.update({key: getattr(options, key) for key in keys}, rows=rows)
    if not options.torch_only:
        record["geometric_means"] = group_means(rows)
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}.")


# ---- arguments ----

DECODED = ("mae", "dmae", "dmjd")
# Which methods read an option; the others have no use for it.
READS = {
    "teacher": ("dmae", "maskedkd", "tinymim"),
    "keep": ("maskedkd",),
    "mask_ratio": ("mae", "dmae", "dmjd", "tinymim"),
    "teacher_block": ("dmae", "tinymim"),
    **{key: DECODED for key in ("decoder_dim", "decoder_depth", "decoder_heads", "norm_pix")},
}
# What of a case is shown beside its name.
SHOWN = ("mask_ratio", "keep", "views", "teacher_block", "decoder_dim", "decoder_depth", "norm_pix")
# Methods, models and what else only steps have.
OF_STEPS = ("method", "model", "batch", "mode", "compile_mode", "teacher_cast", "steps", "warmup", *READS)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Failure(f"{message}; --help lists the options.")


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def fraction(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not from 0 to below 1")
    return value


def device(text):
    kind, colon, number = text.replace("cuda", "gpu").partition(":")
    if kind not in ("cpu", "gpu") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise argparse.ArgumentTypeError(f"there is no device `{text}`; use cpu, gpu or gpu:1")
    return kind + colon + number


def listed_from(what, known, text):
    picked = list(known) if text == "all" else text.split(",")
    for name in picked:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no {what} `{name}`; there are {', '.join(known)} and all")
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--what", choices=("step", "ops", "all"), default="step")
    add("--threads", type=count, default=cores, help=f"of both sides (one a core: {cores})")
    add("--rounds", type=count, default=2, help="turns that each side takes (2)")
    add("--device", type=device, default="cpu", metavar="cpu|gpu|gpu:N")
    add("--precision", choices=("f32", "bf16"), default="f32", help="bf16: masque's, and PyTorch's autocast (f32)")
    add("--json", metavar="FILE", help="write everything here as well")
    add("--min-ratio", type=floors, metavar="R", help="exit 1 when a row is below; also GROUP=R,... with a method, step, or an op")
    add("--timeout", type=count, default=600, help="seconds allowed to one run of masque (600)")
    add("--torch-only", action="store_true", help="time PyTorch alone")
    add("--self-check", action="store_true", help="compare the models of --method with recorded numbers and stop")
    add("--attention", choices=(*ATTENTION, "best"), help="PyTorch's attention (steps: sdpa; ops: eager)")
    add("--adamw", choices=(*ADAMW, "best"), help="PyTorch's AdamW (steps: fused; ops: default)")
    step = parser.add_argument_group("steps").add_argument
    step("--method", type=partial(listed_from, "method", METHODS), metavar="NAME,...", help=", ".join(METHODS) + " or all (all)")
    step("--model", type=jobs, action="extend", metavar="NAME[:BATCH],...", help="tiny:16,base:8; may be repeated (tiny)")
    step("--batch", type=count, help="of models named without one (4)")
    step("--mode", choices=("eager", "compile", "both"), help="of PyTorch (eager); compiling takes a minute or more a model")
    step("--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), help="of torch.compile (reduce-overhead on a GPU, else default)")
    step("--teacher-cast", choices=("weights", "autocast"), help="PyTorch's teacher in bf16: all of it (weights), or as the student (weights)")
    step("--steps", type=count, help="timed steps each turn (3)")
    step("--warmup", type=count, help="untimed steps before them (1)")
    step("--image-size", type=count, default=224)
    step("--patch-size", type=count, default=16)
    step("--mask-ratio", type=fraction, help="part of the patches that is hidden (0.75; tinymim: 0)")
    step("--decoder-dim", type=count, help="of mae, dmae and dmjd (512)")
    step("--decoder-depth", type=count, help="(8)")
    step("--decoder-heads", type=count, help="(16)")
    step("--norm-pix", action="store_true", help="targets are normalised patch by patch")
    step("--teacher", choices=SIZES, help="(small; tinymim: base)")
    step("--keep", type=count, help="patches that maskedkd's teacher sees (half)")
    step("--teacher-block", type=count, help="of dmae and tinymim, from 1 (three quarters up; the last of 12, 18 of 24)")
    op = parser.add_argument_group("ops").add_argument
    op("--only", type=partial(listed_from, "op", OPS), metavar="NAME,...", help=", ".join(OPS) + " (all)")
    op("--runs", type=count, help="given to `masque measure ops --rounds` each turn (10)")
    options = parser.parse_args()
    check(options)
    options.load = load()
    options.modes = {"both": ["eager", "compile"]}.get(options.mode, [options.mode or "eager"])
    options.model = [(name, batch or options.batch or 4) for name, batch in options.model or [(None, None)]]
    options.steps, options.warmup, options.runs = options.steps or 3, options.warmup or 1, options.runs or 10
    options.method, options.only = options.method or list(METHODS), options.only or list(OPS)
    return options


def flag(key):
    return "--" + key.replace("_", "-")


def check(options):
    """What one option alone cannot say."""
    if options.image_size % options.patch_size:
        raise Failure(f"image size {options.image_size} is not a multiple of patch size {options.patch_size}.")
    dim, heads = options.decoder_dim or 512, options.decoder_heads or 16
    if dim % heads or dim % 4:
        raise Failure(f"decoder dim {dim} must be a multiple of 4 and of its {heads} heads.")
    methods = options.method or METHODS
    for key, readers in READS.items():
        if getattr(options, key) and not set(readers) & set(methods):
            raise Failure(f"{flag(key)} is for --method {', '.join(readers)}, not {', '.join(methods)}; leave it out.")
    if options.what == "ops" and not options.self_check:
        for key in OF_STEPS:
            if getattr(options, key):
                raise Failure(f"{flag(key)} is for steps; leave it out or take --what step.")
    if options.what == "step":
        for key in ("only", "runs"):
            if getattr(options, key):
                raise Failure(f"{flag(key)} is for ops; add --what ops, or --what all for steps too.")
    elif options.device != "cpu" or options.precision == "bf16":
        raise Failure("ops are compared in f32 on the CPU; take --what step, or bench_kernels.py for kernels of a GPU.")
    if options.device != "cpu" and not options.self_check and not torch.cuda.is_available():
        raise Failure(f"--device {options.device}: PyTorch sees no GPU (torch.cuda.is_available() is False); leave --device out to compare on the CPU.")
    if options.device != "cpu" and not options.self_check and int(options.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise Failure(f"--device {options.device}: PyTorch sees {torch.cuda.device_count()} GPUs, counted from gpu:0.")
    if options.compile_mode and options.mode not in ("compile", "both"):
        raise Failure("--compile-mode is for --mode compile or both; add one of them.")
    if options.teacher_cast and options.precision != "bf16":
        raise Failure("--teacher-cast is for --precision bf16; leave it out.")
    if options.min_ratio and options.torch_only:
        raise Failure("--min-ratio needs masque; leave out --torch-only.")
    measured = {group_of(op) for op in options.only or OPS} if options.what != "step" else set()
    measured |= {"step", *methods} if options.what != "ops" else set()
    for group in options.min_ratio or ():
        if group and group not in measured:
            raise Failure(f"--min-ratio names {group}, but what is measured is {', '.join(sorted(measured))}.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise Failure(f"--json {options.json}: its folder is not there; make it before.")


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.self_check:
        print("\n".join(self_check(options.method)))
        return 0
    if options.device != "cpu":
        torch.cuda.set_device(int(options.device.partition(":")[2] or 0))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    rows = measure(options)
    print_tables(rows, options)
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
