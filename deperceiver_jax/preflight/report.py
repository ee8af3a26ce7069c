"""The tables of preflight: one row for each bucket, and of a bucket one for each part of the package."""

from deperceiver_jax.preflight.chips import GIB, Chip
from deperceiver_jax.preflight.program import Cost

_COLUMNS = {
    "bucket": 10,
    "arguments": 10,
    "temporaries": 12,
    "outputs": 8,
    "total GiB": 10,
    "of HBM": 8,
    "TFLOP": 7,
    "GB moved": 9,
    "at least": 10,
    "bound by": 9,
    "GB sent": 8,
    "to slices": 11,
    "compiled": 9,
}
HEADER = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())


def row(bucket: tuple[int, int], cost: Cost, chip: Chip | None, hbm_gib: float, fits: bool) -> str:
    """Memory in GiB, moved and sent bytes in GB, the least time of a step, and what bounds it."""
    share = f"{100 * cost.memory / (hbm_gib * GIB):.0f} %" if hbm_gib else "-"
    cells = [f"{bucket[0]}x{bucket[1]}"]
    cells += [f"{part / GIB:.2f}" for part in (cost.arguments, cost.temporaries, cost.outputs, cost.memory)]
    cells += [share, f"{cost.flops / 1e12:.2f}", f"{cost.memory_bytes / 1e9:.1f}", *bound(cost, chip)]
    cells += [f"{cost.interconnect_bytes / 1e9:.2f}", f"{cost.network_bytes / 1e9:.3f}", f"{cost.seconds:.0f} s"]
    if not cost.fits_chip:  # there is no program to take the figures from
        for column in (1, 2, 3, 7, 8, 9, 10, 11):
            cells[column] = "-"
    text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))
    return text if fits else text + "  does not fit"


def parts_table(bucket: tuple[int, int], cost: Cost) -> str:
    """What the bytes through memory are, by the part of the package that moves them: those of 1 % and more."""
    parts = cost.parts
    total = sum(part.bytes for part in parts)
    large = [part for part in parts if 100 * part.bytes >= total]
    lines = [f"Of the GB moved at {bucket[0]}x{bucket[1]}:", f"{'GB moved':>10}{'share':>8}  pass      part"]
    for size, direction, name in [
        *((part.bytes, "backward" if part.backward else "forward", part.name) for part in large),
        (total - sum(part.bytes for part in large), "both", f"{len(parts) - len(large)} others of less than 1 %"),
    ]:
        lines.append(f"{size / 1e9:>10.2f}{100 * size / max(total, 1):>6.1f} %  {direction:<10}{name}")
    return "\n".join(lines)


def bound(cost: Cost, chip: Chip | None) -> tuple[str, str]:
    """(the least time of a step, what binds): operations at the chip's peak, bytes at its memory's bandwidth, or bytes
    at that of its links or of its share of the network between slices, where that is known. All may go on at the same
    time, so the longest of them is the least time."""
    if chip is None:
        return "-", "-"
    seconds = {
        "FLOP/s": cost.flops / chip.peak_flops,
        "memory": cost.memory_bytes / chip.bandwidth,
        "links": cost.interconnect_bytes / chip.links,
        "network": cost.network_bytes / chip.network if chip.network else 0.0,
    }
    binds = max(seconds, key=seconds.__getitem__)
    return f"{1000 * seconds[binds]:.1f} ms", binds
