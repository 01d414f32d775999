"""What each operator does to labels: one small function, a *rule*, for each family of ATen operators.

A rule gets the propagation (`ctx`) and the operator. It ties labels that must stay or go together, freezes
those that must stay, notes multiply-adds, and returns the labels of the outputs' axes. An operator without a
rule freezes what it touches.

- `table` finds the rule of an operator by its name; rules of operators that work position by position
- `products` convolutions, matrix products, attention, embeddings: what reads channels and makes new ones
- `norms` normalisations, sums, means and extremes, softmax: what takes statistics
- `shape` reshape, permute, split, concatenate, slice, pad: what moves axes, and splits them
- `channel_shuffle` shuffles whose parts may shrink unequally
- `spatial` pooling, resizing, sampling, Fourier transforms

The room behind it (`autoprune.structure`) imports the table and the few rules that grouping asks for.
"""
