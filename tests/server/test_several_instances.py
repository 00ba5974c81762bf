"""Several instances: each request goes to the least loaded one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from conftest import Server, wait_until

from genserve import Client


def test_idle_instance_is_preferred(pair: Server) -> None:
    with Client(pair.grpc, timeout=120) as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.generate, "a long one", steps=100, height=320, width=320)
        wait_until(lambda: any(task.step > 0 for task in client.status()[0].tasks), what="it to run")
        short = []
        while not long.done():
            short.append(client.generate("a short one", steps=1, height=64, width=64).info["instance"])
        busy = long.result().info["instance"]
    assert len(short) > 10
    # The last one may be sent as the long one ends, and Triton queues one request per instance.
    assert short.count(busy) <= 2


def test_burst_is_spread_over_instances(pair: Server) -> None:
    with Client(pair.grpc, timeout=120) as client, ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda seed: client.generate("one of many", steps=30, seed=seed).info, range(16)))
    shares = [[info["instance"] for info in made].count(f"flux_0_{index}") for index in range(2)]
    assert sum(shares) == 16
    assert min(shares) >= 5
