"""Would a zero-bubble schedule pay? Step times of 1F1B, interleaved 1F1B and ZB-H1 over the ideal one without bubble.

ZB-H1 (Qi et al. 2023, table 1) cuts a backward pass into input gradients B, which the stage before waits for, and
weight gradients W, which fill the bubble: it leaves (S - 1)(F + B - W), with as many microbatches in flight as 1F1B.
What we have is simulated on its action lists; ZB-H1 is given its formula, which is the best case.

W needs what B had: residuals stay until W, the cotangent of every product is written and read once more, and
elementwise work that a fused backward pass shares is done twice. All of that is one number: how much longer B and W
together may take than one backward pass before ZB-H1 is no faster (break-even).

    python -m benchmarks.zero_bubble
"""

from __future__ import annotations

from galvatron_jax.schedule import build_schedule

FORWARD, BACKWARD = 1.0, 2.0
"""Of one microbatch on one slice; half of the backward pass are weight gradients."""


def simulated(name: str, slices: int, microbatches: int, chunks: int = 1) -> float:
    """Return the time of a step under a schedule that the runtime has; messages take none."""
    lists = build_schedule(name, slices, microbatches, chunks)
    done: dict[tuple[int, str, int], float] = {}
    at, clock, last = [0] * slices, [0.0] * slices, slices * chunks - 1
    while any(at[s] < len(lists[s]) for s in range(slices)):
        for s in range(slices):
            while at[s] < len(lists[s]):
                phase, m, chunk = lists[s][at[s]]
                k = chunk * slices + s
                first, near = (0, k - 1) if phase == "forward" else (last, k + 1)
                ready = 0.0 if k == first else done.get((near, phase, m))
                if ready is None:
                    break
                clock[s] = max(clock[s], ready) + (FORWARD if phase == "forward" else BACKWARD) / chunks
                done[k, phase, m] = clock[s]
                at[s] += 1
    return max(clock)


def zb_h1(slices: int, microbatches: int) -> float:
    """Return the time of a step under ZB-H1 when the cut costs nothing."""
    half = BACKWARD / 2
    return microbatches * (FORWARD + BACKWARD) + (slices - 1) * (FORWARD + half - half)


def main() -> None:
    """Print a table."""
    print("stages   m    1f1b  interleaved 2  interleaved 4   zb-h1   break-even against 1f1b, interleaved 2, 4")
    for slices in (2, 4, 8):
        for m in (slices, 2 * slices, 4 * slices, 8 * slices):
            ideal = m * (FORWARD + BACKWARD)
            ours = [simulated("1f1b", slices, m)]
            ours += [simulated("interleaved-1f1b", slices, m, chunks) for chunks in (2, 4)]
            zero = zb_h1(slices, m)
            even = [f"{100 * max(0.0, time - zero) / (m * BACKWARD):7.1f} %" for time in ours]
            shares = [f"{time / ideal:.3f}" for time in (*ours, zero)]
            columns = f"{shares[0]:>5s} {shares[1]:>14s} {shares[2]:>14s} {shares[3]:>7s}"
            print(f"{slices:6d} {m:3d}   {columns} {' '.join(even)}")


if __name__ == "__main__":
    main()
