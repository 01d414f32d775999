"""Modules of a dense network that need more than sliced parameters: another class, or other numbers.

A patched module keeps the user's parameters under their names and stays an instance of the user's class.
Patches are applied by `densify`, where the graph says so, and are part of what verification runs.

- `count_attributes` integers that count heads, groups or widths: found here, set by `densify`
- `forward_mode` what the next three share: a mode that replaces calls of the user's forward
- `reshape_patch` reshapes and splits to widths that are written in the program
- `channel_gather` splits and shuffles of unequal parts, by an index
- `norm_patch` layer norms and means that count the original width
- `attention` `nn.MultiheadAttention` with fewer heads
- `window_attention` torchvision's Swin and MaxViT attention with fewer heads
- `padding` shortcuts without parameters that pad channels
"""
