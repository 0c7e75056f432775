"""From a parsed `ppod k8s` command line to its exit code."""

from __future__ import annotations

from ppod_deploy.k8s.commands import AnyK8s, K8sDown, K8sLogs, K8sScale, K8sStatus, K8sTrain, K8sUp


def execute_k8s(command: AnyK8s) -> int:
    """Run one command.

    Raises:
        K8sError: it failed. ConfigError: a file is wrong.
    """
    from ppod_deploy.k8s import status, train, workloads  # noqa: PLC0415

    match command:
        case K8sUp():
            return workloads.up(command)
        case K8sDown():
            return workloads.down(command)
        case K8sScale():
            return workloads.scale(command)
        case K8sLogs():
            return workloads.logs(command)
        case K8sStatus():
            return status.show(command)
        case K8sTrain():
            return train.submit(command)
