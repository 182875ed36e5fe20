"""The order in which a network's operators stand, and so the order in which most runtimes execute them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import fx

from penjing.network.graph import site


def reorder(network: fx.GraphModule, order: Sequence[str]) -> None:
    """Put the operators into another order, in place. The function is unchanged.

    Args:
        network: A captured network.
        order: Sites, as `penjing.analyze.activations.activations` gives them: in an order that can be executed. What it
            does not name, such as views, stands right behind what it reads.

    Raises:
        ValueError: It names an operator before one that it reads.
    """
    rank = {name: i for i, name in enumerate(order)}
    nodes = [node for node in network.graph.nodes if node.op not in ("placeholder", "output")]
    place = {node: i for i, node in enumerate(nodes)}
    missing = {node: sum(read in place for read in node.all_input_nodes) for node in nodes}
    ready = [(rank.get(site(node), -1), place[node]) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    chosen: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        chosen.append(node)
        for user in node.users:
            if user in place:
                missing[user] -= 1
                if not missing[user]:
                    heapq.heappush(ready, (rank.get(site(user), -1), place[user]))
    named = [site(node) for node in chosen if site(node) in rank]
    if named != sorted(named, key=rank.__getitem__):
        raise ValueError("an operator stands before one that it reads")
    end = next(node for node in network.graph.nodes if node.op == "output")
    for node in chosen:
        end.prepend(node)
    network.recompile()
