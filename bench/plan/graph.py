"""The runs of a sweep as a graph: what state each is in, what is left of it, and what must be trained again.

States: 'done', 'running' (somebody holds its lease), 'failed' (given up, or its parent is), 'missing', and 'again':
its record is there and stays, but its weights are gone and a run that is left starts from them.
"""

from dataclasses import dataclass

from bench.config import Run
from bench.plan.evidence import Ledger
from bench.store import Store

STATES = ("done", "running", "failed", "missing", "again")
LEFT = ("running", "missing", "again")  # still costs time


@dataclass(frozen=True)
class Node:
    run: Run
    state: str
    share: float  # of its training that is left
    reason: str  # why it failed, or why it will not train
    trains: bool  # False: its parent has no weights to start from, so it ends at once


def nodes(runs: list[Run], store: Store, ledger: Ledger, retries: int) -> list[Node]:
    """The runs, in their order (parents first), with their states."""
    found: dict[str, Node] = {}
    for run in runs:
        found[run.id] = _node(run, found, store, ledger, retries)
    for node in reversed(list(found.values())):  # children first: a grandparent may be needed for its child's sake
        run = found[node.run.id]
        parent = found[run.run.parent.id] if run.run.parent else None
        if run.state in LEFT and run.trains and parent and _weightless(parent, store, ledger):
            found[parent.run.id] = Node(parent.run, "again", 1.0, "its weights are gone", True)
    return list(found.values())


def _weightless(node: Node, store: Store, ledger: Ledger) -> bool:
    if node.state != "done" or ledger.finished[node.run.id].outcome != "ok":
        return False
    return node.run.id not in ledger.folders or not store.weights(node.run.id).exists()


def _node(run: Run, found: dict[str, Node], store: Store, ledger: Ledger, retries: int) -> Node:
    """`found`: what it needs, among others."""
    if run.id in ledger.finished:
        return Node(run, "done", 0.0, "", False)
    if run.id in ledger.folders:
        if store.leased(run.id):
            return Node(run, "running", 1 - store.progress(run.id), "", True)
        if store.given_up(run.id, retries):
            last = store.failures(run.id)[-1]
            return Node(run, "failed", 0.0, f"{last['kind']}: {(last['message'].splitlines() or [''])[0]}", False)
    if blocked := run.blocked_by(lambda r: found[r.id].state == "failed"):
        return Node(run, "failed", 0.0, f"{blocked[1]} {blocked[0].id} is given up", False)
    above = ledger.finished.get(run.parent.id) if run.parent else None
    if above and above.outcome != "ok":
        return Node(run, "missing", 0.0, f"its parent {run.parent.id}: {above.outcome}", False)
    share = 1 - store.progress(run.id) if run.id in ledger.folders else 1.0
    return Node(run, "missing", share, "", True)
