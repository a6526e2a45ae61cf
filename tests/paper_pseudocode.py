"""Algorithms 1 and 2 of the PreLoRA paper, line by line: the oracle for ``prelora.convergence`` and ``prelora.ranks``.

Numbers at the end of a line are the paper's line numbers. The indices are the paper's too: windows run from 1 to k.
Called with ``Fraction``s, everything here is exact.
"""
# ruff: noqa: PERF401, SIM108 (a shorter form would no longer be the paper's lines)

import math
from fractions import Fraction


def partial_convergence_test(k, m, tau, zeta, alpha, W, L):  # 1: W[a][t] and L[t] at window t
    for a in alpha:  # 3
        for t in range(2, k + 1):  # 4
            dW = (abs(W[a][t]) - abs(W[a][t - 1])) / abs(W[a][t - 1]) * 100  # 5
            dL = (L[t] - L[t - 1]) / L[t - 1] * 100  # 6
            if abs(dW) > tau or abs(dL) > zeta:  # 7
                return False  # 8
    return True  # 12


def windows(epochs, k, m):
    """Line 1's inputs, ``{t: mean}``, from k·m epochs: each a number, or a list of layers, averaged first."""
    exact = [[Fraction(x) for x in (epoch if isinstance(epoch, list) else [epoch])] for epoch in epochs]
    means = [sum(layers) / len(layers) for layers in exact]
    return {t: sum(means[(t - 1) * m : t * m]) / m for t in range(1, k + 1)}


def assign_ranks(r_min, r_max, dW):  # 1: dW[a][l], absolute changes
    R = []  # 3
    for p in range(int(math.log2(r_min)), int(math.log2(r_max)) + 1):  # 4
        R.append(2**p)  # 5
    A = {}  # 7
    for a in dW:  # 8
        changes = [dW[a][layer] for layer in dW[a]]  # 9
        N_a = [(change - min(changes)) / (max(changes) - min(changes)) for change in changes]  # 10
        for layer, v in zip(dW[a], N_a, strict=True):  # 11
            if v != 0:  # 12
                i = math.ceil(v * len(R)) - 1  # 13
            else:  # 14
                i = math.ceil(v * len(R))  # 15
            A[layer] = R[i]  # 17
    return A  # 20
