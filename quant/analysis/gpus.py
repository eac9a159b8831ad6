"""Roofs of GPUs: memory, tensor cores and links by data sheet, and the copy rate if it was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant.errors import UnknownBandwidth


@dataclass(frozen=True, slots=True)
class Gpu:
    """Roofs of a GPU, in bytes and dense operations per second.

    link_bytes_per_s: to other GPUs of its host, in one direction.
    copy_bytes_per_s: read + written, if measured.
    """

    name: str
    bytes_per_s: float
    fp16_per_s: float
    int8_per_s: float
    link_bytes_per_s: float
    copy_bytes_per_s: float | None = None

    def with_bandwidth(self, choice: str) -> Gpu:
        """The same GPU with another memory roof: "data-sheet", "measured", or a number of TB/s.

        Raises:
            UnknownBandwidth: nothing was measured for this GPU, or choice is no word above and no positive number.
        """
        if choice == "data-sheet":
            return self
        if choice == "measured":
            if self.copy_bytes_per_s is None:
                raise UnknownBandwidth(f"no copy rate was measured for {self.name}; give one in TB/s")
            return replace(self, bytes_per_s=self.copy_bytes_per_s)
        tb_per_s = _positive(choice)
        if tb_per_s is None:
            raise UnknownBandwidth(f"bandwidth {choice!r} is not known; give data-sheet, measured or a number of TB/s")
        return replace(self, bytes_per_s=1e12 * tb_per_s)

    def with_link(self, choice: str) -> Gpu:
        """The same GPU with another roof of its links: "data-sheet", or a number of GB/s in one direction.

        Raises:
            UnknownBandwidth: choice is neither that word nor a positive number.
        """
        if choice == "data-sheet":
            return self
        gb_per_s = _positive(choice)
        if gb_per_s is None:
            raise UnknownBandwidth(
                f"link {choice!r} is not known; give data-sheet or a number of GB/s in one direction"
            )
        return replace(self, link_bytes_per_s=1e9 * gb_per_s)


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0.0 < number < float("inf") else None


# NVIDIA's data sheets, dense: rates that are printed with sparsity are halved. fp16 accumulates in float32, as torch
# does; GeForce cards do that at half rate. Links: half of what is printed for both directions, of NVLink where the card
# has it and else of PCIe 4.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 2.039e12, 312e12, 624e12, 300e9),  # A100 80GB SXM
        Gpu(
            "h100", 3.35e12, 989.5e12, 1979e12, 450e9, copy_bytes_per_s=3.02e12
        ),  # H100 SXM; copy: benchmarks/timing.py
        Gpu("h200", 4.8e12, 989.5e12, 1979e12, 450e9),  # H200 SXM
        Gpu("b200", 8e12, 2250e12, 4500e12, 900e9),  # HGX B200
        Gpu("l4", 0.3e12, 121e12, 242.5e12, 32e9),
        Gpu("l40s", 0.864e12, 362e12, 733e12, 32e9),
        Gpu("rtx4090", 1.008e12, 165.2e12, 660.6e12, 32e9),
    )
}
