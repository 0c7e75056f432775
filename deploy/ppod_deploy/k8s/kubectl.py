"""The kubectl lines that do what `ppod k8s` does, so that nobody depends on it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from ppod_deploy.k8s.commands import Where

FIELD_MANAGER = "ppod"
APPLY = ("apply", "--server-side", "--force-conflicts", f"--field-manager={FIELD_MANAGER}")


def line(where: Where, *arguments: str, namespaced: bool = True) -> str:
    """A kubectl command as one types it."""
    context = () if where.context is None else ("--context", where.context)
    namespace = ("-n", where.namespace) if namespaced else ()
    return shlex.join(("kubectl", *context, *namespace, *arguments))


def show_without(where: Where, kinds: Sequence[str], option: tuple[str, str], *arguments: str) -> None:
    """Print how all but some kinds of an overlay are applied, which kubectl alone cannot do."""
    flag, place = option
    source = shlex.join(("kubectl", "kustomize", place) if flag == "-k" else ("cat", place))
    chosen = " and ".join(f'.kind != "{kind}"' for kind in kinds)
    applied = line(where, *arguments, "-f", "-")
    print(f"$ {source} | yq 'select({chosen})' | {applied}", file=sys.stderr, flush=True)


def show(where: Where, *arguments: str, namespaced: bool = True) -> None:
    """Print it, on stderr: stdout is for what was asked for."""
    print(f"$ {line(where, *arguments, namespaced=namespaced)}", file=sys.stderr, flush=True)
