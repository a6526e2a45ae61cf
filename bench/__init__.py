"""Benchmarks: every figure beside its peers and its bound, taken in one interleaved run after the tests are green.

    pytest bench/ --benchmark-json out.json         # the default cells, about a quarter of an hour on two cores
    pytest bench/ --full                            # every cell: hours on a CPU
    pytest bench/ --collect-only --full             # their names, from which -k picks any
    pytest bench/ -k train_step-ViT-S-b32-r16-fp32  # these cells and no others
    python -m bench.report out.json --output DIR    # one table and one picture

A ratio is the median of ratios taken within a round, so that a machine that slows down slows both sides of it.
Below 1 is faster than the peer; the bound is what arithmetic or memory would allow, and 1 is the best.
"""
