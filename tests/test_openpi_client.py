"""The client that openpi's robots run, as it is on PyPI, against a server here. Skipped where it is not installed."""
# ruff: noqa: E402 - the first import decides whether there are others

from collections.abc import Iterator

import numpy as np
import pytest

openpi = pytest.importorskip("openpi_client.websocket_client_policy", exc_type=ImportError)

from live_server import OBSERVATION, Scripted, serving, small_policy
from websockets.exceptions import InvalidStatus

from insula.policy import Policy
from insula.serve.policy_backend import PolicyBackend

KEY = "a key for tests, which is long".replace(" ", "-")
SEED = [7, 0]

pytestmark = pytest.mark.filterwarnings("ignore:connect\\(\\) must be used as a context manager:DeprecationWarning")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return small_policy(tmp_path_factory.mktemp("openpi"))


@pytest.fixture(scope="module")
def url(policy: Policy) -> Iterator[str]:
    with serving(PolicyBackend(policy, "small", "none")) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[object]:
    client = openpi.WebsocketClientPolicy(url)
    yield client
    client._ws.close()  # it has no method for this


def test_it_learns_what_to_send(client: openpi.WebsocketClientPolicy) -> None:
    told = client.get_server_metadata()
    assert told["cameras"] == ["front", "wrist"]
    assert (told["state_dim"], told["action_dim"], told["horizon"]) == (2, 3, 4)


def test_host_and_port_are_an_address_too(url: str) -> None:
    host, port = url.removeprefix("ws://").split(":")
    client = openpi.WebsocketClientPolicy(host, int(port))
    assert client.infer(OBSERVATION)["actions"].shape == (4, 3)
    client._ws.close()


def test_it_gets_the_actions_of_the_policy_itself(client: openpi.WebsocketClientPolicy, policy: Policy) -> None:
    answer = client.infer(OBSERVATION | {"seed": SEED})
    np.testing.assert_array_equal(answer["actions"], policy.act(OBSERVATION, seed=SEED))
    assert answer["policy_timing"]["infer_ms"] > 0 and answer["server_timing"]["total_ms"] > 0

    other = client.infer(OBSERVATION | {"seed": [8, 0]})["actions"]  # the control: other noise, other actions
    assert np.abs(other - answer["actions"]).max() > 0.01


def test_flat_names_are_the_same_observation(client: openpi.WebsocketClientPolicy, policy: Policy) -> None:
    """As openpi's examples for real robots write them."""
    flat = {f"observation/image/{name}": picture for name, picture in OBSERVATION["images"].items()}
    flat |= {"observation/state": OBSERVATION["state"].astype(np.float64), "prompt": OBSERVATION["task"]}
    np.testing.assert_array_equal(client.infer(flat | {"seed": SEED})["actions"], policy.act(OBSERVATION, seed=SEED))


def test_a_refusal_is_shown_and_the_next_request_answered(client: openpi.WebsocketClientPolicy) -> None:
    with pytest.raises(RuntimeError, match=r'"field": "images.wrist"'):
        client.infer(OBSERVATION | {"images": {"front": OBSERVATION["images"]["front"]}})
    with pytest.raises(RuntimeError, match="2 numbers"):
        client.infer(OBSERVATION | {"state": np.zeros(3, np.float32)})

    assert client.infer(OBSERVATION)["actions"].shape == (4, 3)


def test_the_key_is_sent_as_openpi_sends_it() -> None:
    with serving(Scripted(lambda request: np.zeros((4, 3)), {"server": "insula"}), key=KEY) as url:
        client = openpi.WebsocketClientPolicy(url, api_key=KEY)
        assert client.infer(OBSERVATION)["actions"].shape == (4, 3)
        client._ws.close()

        for wrong in (None, KEY + "!"):
            with pytest.raises(InvalidStatus, match="401"):
                openpi.WebsocketClientPolicy(url, api_key=wrong)


def test_every_type_it_can_send_is_read() -> None:
    """Its own packing: scalars of NumPy, lists, other kinds of numbers."""
    backend = Scripted(lambda request: np.zeros((4, 3)), {"server": "insula"})
    states = [np.arange(2, dtype=kind) for kind in (np.float32, np.float64, np.int32, np.int64)] + [[0.0, 1.0]]
    with serving(backend) as url:
        client = openpi.WebsocketClientPolicy(url)
        for state in states:
            client.infer(OBSERVATION | {"state": state, "max_age_ms": np.float64(500.0), "seed": np.int64(3)})
        client._ws.close()

    for request, state in zip(backend.asked, states, strict=True):
        np.testing.assert_array_equal(request.observation["state"], state)
        assert (request.max_age_ms, request.seed) == (500.0, (3,))
