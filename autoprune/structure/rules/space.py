"""Operators that work over space: pooling, resizing, padding by reflection, sampling, Fourier transforms."""

from __future__ import annotations

from autoprune.structure.propagate import Axes, Handler, Walk
from autoprune.structure.recorder import Op


def spatial(walk: Walk, op: Op) -> list[Axes]:
    """Pooling, resizing, padding by reflection: batch and channel axes go on, the rest is space."""
    x = op.inputs[0]
    axes = walk.get(x)
    lead = len(axes) - SPACE[op.name]
    for axis in axes[lead:]:
        walk.freeze(axis, "a spatial axis")
    return [[*axes[:lead], *[None] * (len(walk.shape(r)) - lead)] for r in op.outputs if r is not None]


def grid_sample(walk: Walk, op: Op) -> Axes:
    """Every channel read at the positions of a grid."""
    x, grid, out = op.arg("input"), op.arg("grid"), op.outputs[0]
    assert out is not None
    for axis in (*walk.get(x)[2:], *walk.get(grid)[1:]):
        walk.freeze(axis, "a spatial axis")
    batch = walk.join([walk.get(x)[0], walk.get(grid)[0]])
    return [batch, walk.get(x)[1], *[None] * (len(walk.shape(out)) - 2)]


def fourier(walk: Walk, op: Op) -> Axes:
    """Fourier transforms: the axes transformed stay, the others go on."""
    axes = list(walk.get(op.inputs[0]))
    for d in op.arg("dim"):
        walk.freeze(axes[d], "a Fourier transform along the channels")
        axes[d] = None
    return axes


def real_pair(walk: Walk, op: Op) -> Axes:
    """Complex numbers as pairs of real ones along a last axis, and back."""
    axes = list(walk.get(op.inputs[0]))
    if op.name == "view_as_real":
        return [*axes, None]
    walk.freeze(axes[-1], "the two parts of a complex number", is_structural=True)
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

SPACE_FAMILIES: dict[Handler, str] = {
    spatial: " ".join(SPACE),
    grid_sample: "grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback",
    fourier: "_fft_r2c _fft_c2c _fft_c2r",
    real_pair: "view_as_real view_as_complex",
}

SPACE_TABLE: dict[str, Handler] = {n: f for f, names in SPACE_FAMILIES.items() for n in names.split()}
