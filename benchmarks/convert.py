"""Peak memory and time of converting a checkpoint of π0.5's full size, array by array.

The source is a sparse file (all zeros) in openpi's PyTorch layout, bfloat16. Anonymous memory is sampled every 20 ms:
the pages of mapped files are the kernel's to drop.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from insula.checkpoints.openpi import OPENPI_TORCH
from insula.checkpoints.writing import foreign_shapes
from insula.model.config import PI05

GIB = 2**30


def sparse_source(path: Path) -> int:
    """Writes the header and no data; returns the bytes of the largest tensor."""
    header, start, largest = {}, 0, 0
    for name, shape in foreign_shapes(OPENPI_TORCH, PI05).items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, start + size]}
        start, largest = start + size, max(largest, size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return largest


def anonymous_memory(process: subprocess.Popen) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak(command: list[str]) -> tuple[int, float]:
    """(bytes, seconds) of a command."""
    started, highest = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            highest = max(highest, anonymous_memory(process))
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return highest, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", choices=["insula", "lerobot", "openpi"], nargs="+", default=["insula", "lerobot"])
    parser.add_argument("--folder", type=Path, help="where 7 GB a target fit; the system's temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "source" / "model.safetensors"
        source.parent.mkdir()
        largest = sparse_source(source)
        one = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
        stats = {"norm_stats": {"state": one, "actions": one}}
        (Path(folder) / "stats.json").write_text(json.dumps(stats))
        base, _ = peak([sys.executable, "-m", "insula", "convert", "--help"])
        print(f"source {source.stat().st_size / GIB:.2f} GiB, largest tensor {largest / GIB:.2f} GiB")
        for to in arguments.to:
            command = [sys.executable, "-m", "insula", "convert", str(source.parent), f"{folder}/{to}", "--to", to]
            command += ["--dtype", "bfloat16", "--norm-stats", f"{folder}/stats.json"]
            highest, seconds = peak(command)
            written = sum(path.stat().st_size for path in Path(folder, to).rglob("*") if path.is_file())
            print(
                f"{to:8} wrote {written / GIB:.2f} GiB in {seconds:.0f} s, peak {highest / GIB:.2f} GiB of anonymous "
                f"memory ({base / GIB:.2f} GiB to start)"
            )


if __name__ == "__main__":
    main()
