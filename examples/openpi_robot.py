"""The client of openpi's robots, as it is on PyPI, against `insula serve`.

python examples/openpi_robot.py [RUN]        needs: pip install --no-deps openpi-client
"""

import sys
from pathlib import Path

import numpy as np
from policy_server import serving

try:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
except ImportError:
    # Without its dependencies, which ask for an old NumPy; websockets and msgpack are there already.
    sys.exit("openpi-client is not here: pip install --no-deps openpi-client")


def main(run: Path) -> None:
    with serving(run) as url:
        client = WebsocketClientPolicy(url)
        told = client.get_server_metadata()
        side = told["image_size"]

        # openpi's own flat names; {"images": {camera: …}, "state", "task"} are understood as well.
        black = np.zeros((side, side, 3), np.uint8)
        observation = {f"observation/image/{camera}": black for camera in told["cameras"]}
        observation |= {
            "observation/state": np.zeros(told["state_dim"]),
            "prompt": "put the red block in the blue bowl",
        }
        for _ in range(3):
            answer = client.infer(observation)
            print(f"actions {answer['actions'].shape}, {answer['server_timing']['infer_ms']:.1f} ms in the policy")

        client._ws.close()  # it has no method for this


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quick/run"))
