"""One network under one tool, in a process of its own: `coverage_worker.py TOOL NETWORK OUT NORMS`.

Every result is appended to OUT as a JSON line as soon as it is known, with a line at the start of every
phase, so that a process that is killed leaves its results behind. `bench_coverage.py` reads them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coverage_models
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

RATIO = 0.4
EXACT = 1e-9  # relative, float64; the acceptance limit of the engine
SECOND_INPUT_MACS = 5_000_000_000  # above it the test of a second input is left out, it takes two passes
NEAR_ZERO = 1e-3  # a parameter that starts here (a zero head, a layer scale) would hide what runs through it
TIMED = ("trace", "plan", "densify")
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not counted by torch 2.14


class Journal:
    """Appends findings to a file, one JSON object a line, and measures phases."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **findings: Any) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(findings) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs now; wall and CPU seconds of it are written when it ends, by an error too."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.write(phase=name, phase_began=time.time(), phase_began_cpu=cpu)
        try:
            yield
        finally:
            if name in TIMED:
                self.write(
                    **{f"{name}_s": time.perf_counter() - wall, f"{name}_cpu_s": time.process_time() - cpu}
                )


def main() -> None:
    """Measure one network; every failure ends as a row."""
    tool, name, out, norms = sys.argv[1:]
    warnings.filterwarnings("ignore")
    journal = Journal(Path(out))
    try:
        if tool == "autoprune":
            measure_autoprune(name, journal, norms)
        else:
            measure_torch_pruning(name, journal)
    except MemoryError:
        journal.write(outcome="memory", detail="MemoryError")
    except Exception as error:
        traceback.print_exc()
        journal.write(outcome="exception", detail=_described(error))


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/autoprune/" in f.filename] or frames
    first = (str(error).splitlines() or ["no message"])[0][:200]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {first} [{where}]"


def measure_autoprune(name: str, journal: Journal, norms: Any) -> None:
    """Trace, plan and densify in float32 with the clock running; then counts and the float64 comparison."""
    import autoprune
    from autoprune.plan import PruningPlan

    with journal.phase("build"):
        autoprune.densify(*_tiny(autoprune))  # what a first use loads of torch belongs to no network
        model, x = coverage_models.build(name)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    before = _reset_peak()
    with journal.phase("trace"):
        graph = autoprune.trace(model, x, norms=norms)
    with journal.phase("plan"):
        plan = PruningPlan.random(graph, RATIO, 0)
        predicted = graph.cost(plan)
    with journal.phase("densify"):
        dense = autoprune.densify(model, graph, plan)
    journal.write(
        groups=len(graph.groups),
        units=sum(g.num_units for g in graph.groups),
        reach=graph.reach,
        frozen=json.dumps(_kinds(graph)),
        macs=graph.cost().macs,
        params=graph.cost().params,
        macs_after=predicted.macs,
        params_after=predicted.params,
        model_mb=own / 1e6,
        peak_ratio=1 + max(0, _peak() - before) / own,
    )
    with journal.phase("count"):
        counted, counted_before = macs_of(dense, x), macs_of(model, x)
    journal.write(
        counted_macs=counted,
        counted_macs_before=counted_before,
        counted_params=sum(p.numel() for p in dense.parameters()),
    )
    del dense
    with journal.phase("compare"):
        error = _compare(model, graph, plan, x, journal)
    is_counted = (counted, counted_before) == (predicted.macs, graph.cost().macs)
    journal.write(outcome="inexact" if not error <= EXACT else "exact" if is_counted else "miscounted")


def _tiny(autoprune: Any) -> tuple[Any, ...]:
    from autoprune.plan import PruningPlan

    model = _Tiny()
    graph = autoprune.trace(model, torch.randn(1, 3, 16, 16))
    return model, graph, PruningPlan.random(graph, RATIO, 0)


class _Tiny(nn.Module):
    """The operators that most networks have: a kilobyte of parameters, but megabytes of libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Hardswish()
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        """Pictures (n, 3, 16, 16) to scores (n, 2), over a channel shuffle."""
        x = self.stem(x)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, left + self.block(right)], 1)
        n, _, h, w = x.shape
        x = x.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)
        return self.head(x.mean((2, 3)))


def _kinds(graph: Any) -> dict[str, int]:
    """Frozen parameter dimensions by reason, without the operator and place that a reason ends with."""
    counts = Counter(f.reason.split(" (")[0].split(": ")[0] for f in graph.frozen)
    return dict(counts.most_common())


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds that torch's own counter sees in one pass.

    It sees into neither the fused encoder layer nor oneDNN's LSTM, so both are off while it counts.
    """
    counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention})
    has_rnn = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:  # the counter looks for gradients of them, even where none are made
            parameter.requires_grad_(False)
        mkldnn = torch.backends.mkldnn.flags(enabled=not has_rnn)
        with torch.no_grad(), mkldnn, counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def strengthen_(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Give the network weights under which nothing is hidden: no zero scales, no unit statistics.

    Running statistics lie around those of `x`, because through unit ones the input fades within a few dozen
    layers, and a comparison would see the biases alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5

    def calibrate(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        mean, var, seen = module.running_mean, module.running_var, inputs[0]
        if seen.dim() < 2 or seen.shape[1] != len(var) or seen.numel() <= len(var):
            var.copy_(uniform(var))
            return
        var_now, mean_now = torch.var_mean(seen.transpose(0, 1).flatten(1), 1, correction=0)
        mean.copy_(mean_now + 0.1 * var_now.sqrt() * torch.randn(mean.shape, generator=generator))
        var.copy_(var_now * uniform(var) + 1e-3)

    with torch.no_grad():
        for parameter in model.parameters():
            is_weak = parameter.dim() <= 1 or float(parameter.abs().max()) < NEAR_ZERO
            if parameter.is_floating_point() and is_weak:
                parameter.copy_(uniform(parameter))
        normalisers = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
        hooks = [m.register_forward_pre_hook(calibrate) for m in normalisers]
        if hooks:
            model(x)
        for hook in hooks:
            hook.remove()


def _compare(model: nn.Module, graph: Any, plan: Any, x: Tensor, journal: Journal) -> float:
    """Dense against masked in float64, and whether the comparison could have seen a difference."""
    from autoprune.structure.densify import densify, difference, masked

    strengthen_(model, x)
    model, x, notes = _in_float64(model, x)
    dense, reference = densify(model, graph, plan), masked(model, graph, plan)
    error = difference(dense, reference, (x,))
    journal.write(difference=error)
    del dense
    effect = difference(reference, model, (x,))
    with torch.no_grad():
        outputs = [t for t in tree_leaves(reference(x)) if isinstance(t, Tensor)]
        if not all(bool(t.isfinite().all()) for t in outputs):
            notes.append("the outputs overflow")
        elif graph.cost().macs <= SECOND_INPUT_MACS:
            others = [t for t in tree_leaves(reference(torch.randn_like(x))) if isinstance(t, Tensor)]
            pairs = zip(outputs, others, strict=True)
            if not any(float((a - b).abs().max()) > 1e-9 * float(a.abs().max()) for a, b in pairs):
                notes.append("the outputs do not depend on the input")
    if not effect > 1e-6 and graph.groups:
        notes.append("removing units changes nothing")
    journal.write(effect=effect, note="; ".join(notes))
    return error


def _in_float64(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, list[str]]:
    model.double()
    torch.set_default_dtype(torch.float64)  # some forwards make tensors of the default type
    try:
        with torch.no_grad():
            model(x.double())
    except RuntimeError as error:
        torch.set_default_dtype(torch.float32)
        first = str(error).splitlines()[0][:100]
        return model.float(), x, [f"compared in float32, in float64 the original fails: {first}"]
    return model, x.double(), []


def measure_torch_pruning(name: str, journal: Journal) -> None:
    """Build its pruner, take one step, apply the mends of its own examples, run the result."""
    import torch_pruning as tp

    with journal.phase("build"):
        small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        tp.pruner.BasePruner(
            small,
            torch.randn(1, 3, 4, 4),
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[small[3]],
        ).step()
        model, x = coverage_models.build(name)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    with torch.no_grad():
        shapes = [t.shape for t in tree_leaves(model(x)) if isinstance(t, Tensor)]
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    journal.write(
        macs=macs_of(model, x), params=sum(p.numel() for p in model.parameters()), model_mb=own / 1e6
    )
    before = _reset_peak()
    num_heads, out_groups = _heads(model)
    with journal.phase("trace"):
        pruner = tp.pruner.BasePruner(
            model,
            x,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=_output_layers(model, x),
            num_heads=num_heads,
            in_channel_groups={},
            out_channel_groups=out_groups,
            output_transform=_sum_of_outputs if name.startswith("segmentation/") else None,
        )
    with journal.phase("densify"):
        pruner.step()
    journal.write(peak_ratio=1 + max(0, _peak() - before) / own)
    _mend_as_its_examples_do(model, pruner)
    after = sum(p.numel() for p in model.parameters())
    journal.write(params_after=after, counted_params=after)
    with journal.phase("run"), torch.no_grad():
        got = [t.shape for t in tree_leaves(model(x)) if isinstance(t, Tensor)]
    counted = macs_of(model, x)
    journal.write(macs_after=counted, counted_macs=counted)
    if got != shapes:
        journal.write(outcome="wrong shapes", detail=f"the output becomes {[tuple(s) for s in got]}")
    else:
        journal.write(outcome="ok")


def _sum_of_outputs(result: Any) -> Tensor:
    return sum((t.sum() for t in tree_leaves(result) if isinstance(t, Tensor)), torch.zeros(()))


def _output_layers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The layers that make the outputs: heads with as many channels as an output, as its examples do."""
    with torch.no_grad():
        widths = {t.shape[1] for t in tree_leaves(model(x)) if isinstance(t, Tensor)}
    named = [m for n, m in model.named_modules() if n.split(".")[0] in ("fc", "head", "classifier", "heads")]
    makers = (nn.Linear, nn.Conv2d, nn.Conv3d)
    found = [m for m in named if isinstance(m, makers) and m.weight.shape[0] in widths]
    return found or [m for m in model.modules() if isinstance(m, makers) and m.weight.shape[0] in widths][-1:]


def _heads(model: nn.Module) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """Head counts, by the recipes of examples/timm_models and examples/torchvision_models."""
    fused = {
        m.qkv: m.num_heads
        for m in model.modules()
        if isinstance(getattr(m, "qkv", None), nn.Linear) and isinstance(getattr(m, "num_heads", None), int)
    }
    torch_own = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return fused, torch_own


def _mend_as_its_examples_do(model: nn.Module, pruner: Any) -> None:
    """After a step: head width of fused attention (with its forward), hidden size of torchvision's ViT."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and module.qkv in pruner.num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            if type(module).__module__.startswith("timm") and type(module).__name__ == "Attention":
                module.forward = _timm_attention.__get__(module)
    if type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def _timm_attention(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """timm's attention with a width of its own, from examples/timm_models/prune_timm_models.py."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = (self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
    mixed: Tensor = (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)
    return self.proj(self.norm(mixed))  # type: ignore[no-any-return]


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):  # not Linux, or not allowed: the peak is that of the whole process
        return 0
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


if __name__ == "__main__":
    main()
