"""Where things lie in a block's shared memory: named regions, their offsets, and a picture.

Knows: bytes and alignment. Refuses to know: what the regions hold.
"""

from __future__ import annotations

from dataclasses import dataclass

# Most shared memory that a block can ask for, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
BLOCK_LIMITS = {
    "75": 65_536, "80": 166_912, "86": 101_376, "87": 166_912, "89": 101_376, "90": 232_448, "100": 232_448,
    "103": 232_448, "120": 101_376, "121": 101_376,
}  # fmt: skip


def block_limit(arch: str) -> int:
    """Bytes of shared memory that a block can have on a target like "sm_90a"; ValueError for one unknown."""
    digits = arch.removeprefix("sm_").rstrip("af")
    if digits not in BLOCK_LIMITS:
        raise ValueError(f"shared memory: target is {arch!r}; known are {', '.join(BLOCK_LIMITS)}")
    return BLOCK_LIMITS[digits]


@dataclass(frozen=True)
class Region:
    """`count` pieces of `bytes` each, the first at `start`, one right after another."""

    name: str
    start: int
    bytes: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.bytes * self.count


@dataclass(frozen=True)
class SmemPlan:
    """The layout of one block's dynamic shared memory, in bytes from its start (aligned to 1024)."""

    regions: tuple[Region, ...]

    @classmethod
    def of(cls, *parts: tuple[str, int, int, int], limit: int) -> SmemPlan:
        """Lay out (name, bytes of a piece, alignment, pieces) in this order.

        ValueError: an alignment that is no power of two up to 1024 or does not divide a piece where there
        are several, a name used twice, or more than `limit` bytes in all (sm_90: 232,448 a block; sm_86, 89
        and 120: 101,376).
        """
        regions: list[Region] = []
        at = 0
        for name, size, alignment, count in parts:
            if alignment < 1 or alignment & (alignment - 1) or alignment > 1024:
                raise ValueError(
                    f"shared memory: {name} is aligned to {alignment}; a power of two up to 1024 is required"
                )
            if size < 1 or count < 1 or (count > 1 and size % alignment):
                raise ValueError(
                    f"shared memory: {name} has {count} pieces of {size} bytes, aligned to {alignment}"
                )
            if any(region.name == name for region in regions):
                raise ValueError(f"shared memory: two regions are called {name}")
            at = -(-at // alignment) * alignment
            regions.append(Region(name, at, size, count))
            at = regions[-1].end
        plan = cls(tuple(regions))
        if plan.bytes > limit:
            raise ValueError(
                f"shared memory: {plan.bytes:,} bytes are needed, the limit is {limit:,}:\n{plan.picture()}"
            )
        return plan

    @property
    def bytes(self) -> int:
        return self.regions[-1].end if self.regions else 0

    def offset(self, name: str, piece: int = 0) -> int:
        """Where a region, or one piece of it, begins. KeyError for no such region, IndexError for no such
        piece."""
        for region in self.regions:
            if region.name == name:
                if not 0 <= piece < region.count:
                    raise IndexError(f"shared memory: {name} has {region.count} pieces, not a piece {piece}")
                return region.start + piece * region.bytes
        raise KeyError(
            f"shared memory: no region {name!r}; there are {', '.join(r.name for r in self.regions)}"
        )

    def picture(self) -> str:
        """One line a region: from, to, pieces."""
        return "\n".join(
            f"{r.start:>7,} .. {r.end:>7,}  {r.name:<10} {r.count} x {r.bytes:,} bytes" for r in self.regions
        )
