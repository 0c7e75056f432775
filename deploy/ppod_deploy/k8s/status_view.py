"""How a cluster's status looks."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ppod_deploy.k8s.objects import K8sError
from ppod_deploy.k8s.status import ClusterStatus, PodStatus, TeamStatus


def print_status(status: ClusterStatus) -> None:
    """Print it once."""
    Console().print(render(status, None, 0.0))


def watch_status(look: Callable[[], ClusterStatus], interval_s: float) -> None:
    """Show it, and look again every `interval_s` seconds, until Ctrl-C. Raises K8sError: the first look failed."""
    before, looked_at = look(), time.monotonic()
    with Live(render(before, None, 0.0), console=Console(), auto_refresh=False) as live:
        live.refresh()
        while True:
            time.sleep(interval_s)
            try:
                status, now = look(), time.monotonic()
            except K8sError as error:
                # As while the API server is replaced: what was seen last stays, and says how old it is.
                age = _age(int(time.monotonic() - looked_at))
                live.update(
                    Group(render(before, None, 0.0), Text(f"as of {age} ago: {error}", style="red")), refresh=True
                )
                continue
            live.update(render(status, before, now - looked_at), refresh=True)
            before, looked_at = status, now


def render(status: ClusterStatus, before: ClusterStatus | None, seconds: float) -> Group:
    """Tables of services, pods and teams; rates where there is an earlier look."""
    parts: list[Table | Text] = [_pods(status)]
    if status.teams:
        parts.append(_teams(status, before, seconds))
    parts += [Text(f"metrics of {pod} could not be read: {why}", style="yellow") for pod, why in status.unread.items()]
    return Group(*parts)


def _pods(status: ClusterStatus) -> Table:
    ready = dict.fromkeys(status.wanted, 0)
    for pod in status.pods:
        ready[pod.component] = ready.get(pod.component, 0) + pod.ready
    summary = ", ".join(f"{name} {ready[name]}/{wanted}" for name, wanted in sorted(status.wanted.items()))
    title = f"namespace {status.namespace}: {summary or 'nothing of ppod is here'}"
    table = Table(title=title, title_justify="left")
    for name in ("component", "pod", "state", "weights", "waiting", "GPUs", "restarts", "age", "node"):
        right = name in {"weights", "waiting", "GPUs", "restarts", "age"}
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    newest = _newest(status)
    for pod in status.pods:
        style = "green" if pod.ready else "yellow" if pod.state in {"Pending", "Running", "Terminating"} else "red"
        state = f"step {pod.step}" if pod.step is not None and pod.ready else "ready" if pod.ready else pod.state
        table.add_row(
            pod.component,
            pod.pod,
            Text(state, style=style),
            _version(pod, newest),
            _waiting(pod),
            str(pod.gpus) if pod.gpus else "",
            str(pod.restarts) if pod.restarts else "",
            _age(pod.age_s),
            pod.node,
        )
    return table


def _newest(status: ClusterStatus) -> dict[str, int]:
    newest: dict[str, int] = {}
    for pod in status.pods:
        newest[pod.component] = max(newest.get(pod.component, 0), pod.version or 0)
    return newest


def _version(pod: PodStatus, newest: dict[str, int]) -> Text:
    """A replica on older weights than its neighbours stands out."""
    if pod.version is None:
        return Text("")
    return Text(str(pod.version), style="" if pod.version == newest[pod.component] else "red")


def _waiting(pod: PodStatus) -> str:
    if pod.waiting_tokens is None:
        return ""
    return f"{pod.waiting_sequences or 0} ({pod.waiting_tokens} tokens)" if pod.waiting_tokens else "0"


def _teams(status: ClusterStatus, before: ClusterStatus | None, seconds: float) -> Table:
    table = Table(title="teams", title_justify="left")
    for name in ("service", "team", "tokens served", "tokens/s", "tokens waiting", "refused"):
        table.add_column(name, justify="left" if name in {"service", "team"} else "right")
    earlier = {(one.component, one.team): one for one in before.teams} if before is not None else {}
    for one in status.teams:
        rate = _rate(one, earlier.get((one.component, one.team)), seconds)
        refused = Text(str(one.refused), style="yellow" if one.refused else "")
        table.add_row(one.component, one.team, f"{one.served_tokens:,}", rate, f"{one.waiting_tokens:,}", refused)
    return table


def _rate(now: TeamStatus, before: TeamStatus | None, seconds: float) -> str:
    """Empty where there is no earlier look, or where a pod that had served left meanwhile."""
    if before is None or seconds <= 0 or now.served_tokens < before.served_tokens:
        return ""
    return f"{(now.served_tokens - before.served_tokens) / seconds:,.0f}"


def _age(seconds: int) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
