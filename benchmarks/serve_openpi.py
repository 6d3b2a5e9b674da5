"""openpi's own client, as it is on PyPI, against a running server: so many requests, and how many were refused.

python benchmarks/serve_openpi.py ws://127.0.0.1:8000        needs: pip install --no-deps openpi-client
"""

import argparse
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a running insula serve, such as ws://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=10_000)
    given = parser.parse_args()

    client = WebsocketClientPolicy(given.url)
    told = client.get_server_metadata()
    rng = np.random.default_rng(0)
    side, shape = told["image_size"], (told["horizon"], told["action_dim"])
    observations = [
        {
            "images": {name: rng.integers(0, 256, (side, side, 3), np.uint8) for name in told["cameras"]},
            "state": rng.normal(size=told["state_dim"]),
            "prompt": "put the red block in the blue bowl",
        }
        for _ in range(16)
    ]

    errors, times, overheads = 0, [], []
    for i in range(given.requests):
        started = time.perf_counter()
        try:
            answer = client.infer(observations[i % 16])
            errors += answer["actions"].shape != shape or not np.isfinite(answer["actions"]).all()
        except RuntimeError as error:
            errors += 1
            print(error)
            continue
        times.append((time.perf_counter() - started) * 1000)
        overheads.append(times[-1] - answer["policy_timing"]["infer_ms"])

    (p50, p99), (least, most) = np.percentile(times, (50, 99)), np.percentile(overheads, (50, 99))
    print(f"{given.requests:,} requests, {errors} errors; round trip p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"beyond the policy: p50 {least:.2f} ms, p99 {most:.2f} ms")
    client._ws.close()  # it has no method for this


if __name__ == "__main__":
    main()
