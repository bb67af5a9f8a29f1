"""AlphaEdit's solve for a batch of facts, against a direct solve of the paper's system.

    python benchmarks/alphaedit_solve.py

Prints for each batch of a sequence the CPU seconds of both and their ratio.  The direct way makes
and solves [P (K Kᵀ + C_prev) + L₂ I] X = P K Rᵀ in float32, as the authors' code does, and adds
K Kᵀ to C_prev; ours solves in the space of the facts and keeps what later batches need.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from kedit_core.numerics.nullspace import NullSpace
from kedit_core.numerics.ridge import Constraint, least_squares

L2 = 10.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096, help="m")
    parser.add_argument("--outputs", type=int, default=1024, help="d")
    parser.add_argument("--facts", type=int, default=100, help="of one batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    m, identity = args.width, torch.eye(args.width)
    vectors, _ = torch.linalg.qr(torch.randn(m, m))  # of a C with eigenvalues from 1e-4 to 10
    space = NullSpace.of(torch.logspace(-4, 1, m), vectors, threshold=0.02)
    p = space.project(identity)  # kept by the authors' code
    previous, parts = torch.zeros(m, m), []
    say(f"m = {m}, d = {args.outputs}, {args.facts} facts, rank of P {space.rank}")
    for batch in range(args.batches):
        keys, residual = torch.randn(m, args.facts), torch.randn(args.outputs, args.facts)

        started = time.process_time()
        constraint = Constraint.of(space.inverse(L2), m, parts)
        update = least_squares(keys, residual, constraint.solve(keys))
        parts.append(constraint.part(keys))
        ours = time.process_time() - started

        started = time.process_time()
        system = p @ (keys @ keys.mT + previous) + L2 * identity
        direct = torch.linalg.solve(system, p @ keys @ residual.mT).mT
        previous = previous + keys @ keys.mT
        plain = time.process_time() - started

        difference = float((update.left @ update.right - direct).norm() / direct.norm())
        say(
            f"batch {batch + 1}: {ours:.2f} s against {plain:.2f} s, ratio {ours / plain:.3f}; "
            f"relative difference {difference:.0e}"
        )


if __name__ == "__main__":
    main()
