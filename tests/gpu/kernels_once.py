"""Every variant of the kernels once, on small caches: `compute-sanitizer python -m tests.gpu.kernels_once`."""

from __future__ import annotations

import torch

from kvservice_adapters.positions import Rope, RopeForm
from tests.gpu.kernel_checks import Arrangement, Model, cache_of, check_copy, check_turn


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for unit in (1, 2, 4, 8, 16):
        sizes = [unit * 5, (40 << 10) + unit, 16 << 10]
        cache = cache_of(sizes, [0, 0, 1], blocks=3, gap=unit, start=unit, is_interleaved=False)
        check_copy(cache, [2, 0], device)
    for arrangement in Arrangement:
        for form in RopeForm:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                rope = Rope(tuple(1 / pair for pair in range(1, 33)), form)
                kernel_blocks = 1 if arrangement.name.endswith("2") else 2
                model = Model(arrangement, dtype, 3, tokens=16, head_dim=80, rope=rope, kernel_blocks=kernel_blocks)
                check_turn(model, [0, 16, -16], device)
    print(f"every variant once, on {device}: right")  # noqa: T201


if __name__ == "__main__":
    main()
