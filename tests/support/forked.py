"""Python modules as processes of their own, forked from one that has imported torch and transformers already.

`python -m` spends most of a tiny service's start on those imports, and the tests start a hundred of them. The processes
differ from real ones in nothing that the tests look at; the tests of the launcher start theirs with `python -m`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from ppod_deploy.child import PR_SET_PDEATHSIG

_PRELOADED = (
    "google.protobuf.message",
    "grpc.aio",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "peft",
    "pydantic",
    "safetensors.torch",
    "torch",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.integrations.sdpa_attention",
    "transformers.masking_utils",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""Third-party modules only: what is tested is imported anew by every process."""


class ForkedProcess:
    """`python -m module arguments`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        stdout_file: Path,
        stderr_file: Path,
        network_namespace: str | None = None,
    ) -> None:
        # As ppod's packages have it, which the server of forks loads gRPC before.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self.args = ["python", "-m", module, *arguments]
        self._stdout_file, self._stderr_file = stdout_file, stderr_file
        files = (str(stdout_file), str(stderr_file))
        job = (module, tuple(arguments), dict(environment), str(cwd), files, network_namespace)
        self._process: ForkServerProcess = context.Process(target=_run, args=job)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"{' '.join(self.args)} still runs after {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            # It may have ended just now: its exit code comes from the server that forked it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and stderr."""
        self.wait(timeout)
        return self._stdout_file.read_text(), self._stderr_file.read_text()


_CLONE_NEWNET = 0x40000000


def _enter(network_namespace: str) -> None:
    """Move this thread, the process's only one, into a namespace that `ip netns add` made."""
    opened = os.open(f"/var/run/netns/{network_namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(opened, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter network namespace {network_namespace}")
    os.close(opened)


def _run(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    files: tuple[str, str],
    network_namespace: str | None,
) -> None:
    # The process that it is forked from ends with the tests; whatever way that is, nothing stays behind.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if network_namespace is not None:
        _enter(network_namespace)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    roots = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*roots, *(entry for entry in sys.path if entry not in roots)]
    sys.argv = [module, *arguments]
    warnings.simplefilter("default")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # As at the end of any process; multiprocessing leaves it out.
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
