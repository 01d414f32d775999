"""Rules of operators over space: pooling, resizing, padding by reflection, sampling, Fourier transforms."""

from __future__ import annotations

from autoprune.structure.propagate import Axes, Propagation, Rule
from autoprune.structure.recorder import Op


def spatial(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze the spatial axes of pooling, resizing and reflective padding; batch and channels go on."""
    x = op.inputs[0]
    axes = ctx.get(x)
    lead = len(axes) - SPACE[op.name]
    for axis in axes[lead:]:
        ctx.freeze(axis, "a spatial axis")
    return [[*axes[:lead], *[None] * (len(ctx.shape(r)) - lead)] for r in op.outputs if r is not None]


def grid_sample(ctx: Propagation, op: Op) -> Axes:
    """Freeze the spatial axes; every channel is read at the positions of a grid, and batch axes tie."""
    x, grid, out = op.arg("input"), op.arg("grid"), op.outputs[0]
    assert out is not None
    for axis in (*ctx.get(x)[2:], *ctx.get(grid)[1:]):
        ctx.freeze(axis, "a spatial axis")
    batch = ctx.join([ctx.get(x)[0], ctx.get(grid)[0]])
    return [batch, ctx.get(x)[1], *[None] * (len(ctx.shape(out)) - 2)]


def fourier(ctx: Propagation, op: Op) -> Axes:
    """Freeze the axes that a Fourier transform works on; the others keep their labels."""
    axes = list(ctx.get(op.inputs[0]))
    for d in op.arg("dim"):
        ctx.freeze(axes[d], "a Fourier transform along the channels")
        axes[d] = None
    return axes


def real_pair(ctx: Propagation, op: Op) -> Axes:
    """Add a last axis for the two parts of complex numbers, or freeze and drop it on the way back."""
    axes = list(ctx.get(op.inputs[0]))
    if op.name == "view_as_real":
        return [*axes, None]
    ctx.freeze(axes[-1], "the two parts of a complex number", is_structural=True)
    return axes[:-1]


SPATIAL = (
    "max_pool{0}d max_pool{0}d_with_indices avg_pool{0}d adaptive_avg_pool{0}d _adaptive_avg_pool{0}d "
    "adaptive_max_pool{0}d reflection_pad{0}d replication_pad{0}d upsample_nearest{0}d "
    "_upsample_nearest_exact{0}d"
)
SPACE = {name: dims for dims in (1, 2, 3) for name in SPATIAL.format(dims).split()} | {
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
}

SPATIAL_FAMILIES: dict[Rule, str] = {
    spatial: " ".join(SPACE),
    grid_sample: "grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback",
    fourier: "_fft_r2c _fft_c2c _fft_c2r",
    real_pair: "view_as_real view_as_complex",
}
