"""The credentials of a client's channels, whose files are renewed while it runs."""

from __future__ import annotations

import threading

import grpc

from ppod.client.security import ClientSecurity
from ppod.client.tls_files import TlsFiles
from ppod.errors import InvalidArgument


class RenewedCredentials:
    """Credentials of each channel, and whether there are newer ones. Thread-safe.

    A channel begins each connection with the certificate that it was opened with. A run of days may lose one when that
    has long expired, with a certificate in the files that is good.
    """

    def __init__(self, security: ClientSecurity) -> None:
        self._security = security
        self._lock = threading.Lock()
        self._files: TlsFiles | None = None
        self._credentials: grpc.ChannelCredentials | None = None
        self._opened: dict[str, grpc.ChannelCredentials | None] = {}

    def for_channel(self, address: str) -> grpc.ChannelCredentials | None:
        """Those to open a channel with; None: plain text.

        Raises:
            InvalidArgument: the files cannot be used, and never could.
        """
        with self._lock:
            self._read()
            self._opened[address] = self._credentials
            return self._credentials

    def check(self) -> None:
        """Raise InvalidArgument where the files cannot be used, and never could."""
        with self._lock:
            self._read()

    def renewed(self, address: str) -> bool:
        """Whether the files hold something else now than when a channel was opened."""
        with self._lock:
            self._read()
            return self._opened.get(address) is not self._credentials

    def _read(self) -> None:
        """Read the files again; those that cannot be used, such as half of a renewal, leave the earlier ones in use."""
        try:
            files = self._security.files()
        except InvalidArgument:
            if self._files is None:
                raise
            return
        if files is not None and files != self._files:
            self._files, self._credentials = files, files.credentials()
