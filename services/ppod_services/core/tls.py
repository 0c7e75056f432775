"""TLS for a server's ports, with certificates that are read again when they rotate."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from ppod_services.core.config import TlsConfig
from ppod_services.core.logs import log_event

_LOGGER = logging.getLogger(__name__)


class CertificateError(Exception):
    """A certificate, key or authority cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class _Files:
    """The bytes of all files of one configuration, read together; PEM."""

    certificate: bytes
    private_key: bytes
    client_authority: bytes | None

    @classmethod
    def read(cls, config: TlsConfig) -> Self:
        """Read all files, and check that they belong together: gRPC itself would only refuse handshakes later.

        Raises:
            CertificateError: a file cannot be read, is not PEM, or the key is not the certificate's.
        """
        authority = None if config.client_ca_file is None else _read("client_ca_file", config.client_ca_file)
        files = cls(
            _read("certificate_file", config.certificate_file),
            _read("private_key_file", config.private_key_file),
            authority,
        )
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # With a passphrase, an empty one, or OpenSSL would ask the terminal for the key's, and wait.
            context.load_cert_chain(config.certificate_file, config.private_key_file, password="")
            if authority is not None:
                context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, OSError, UnicodeDecodeError) as error:
            names = ", ".join(str(path) for path in _paths(config))
            raise CertificateError(
                f"{names}: not a certificate, its key without a passphrase, and authority, in PEM: {error}"
            ) from error
        return files

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """As gRPC takes it."""
        return grpc.ssl_server_certificate_configuration(
            [(self.private_key, self.certificate)], root_certificates=self.client_authority
        )


class RotatingCertificates:
    """Credentials that follow their files: each handshake looks whether they changed, as a mounted Secret does.

    Connections that are open keep the certificate they began with. New files that do not fit together are logged and
    the old ones stay in use, because half a rotation must not stop a service.

    Raises:
        CertificateError: the files cannot be used at the start.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stamp = _stamp(config)
        self._files = self._served = _Files.read(config)
        self._refused = False
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._files.configuration(),
            self._fetch,  # pyright: ignore[reportArgumentType] - None is allowed, and means unchanged
            require_client_authentication=config.client_ca_file is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake, in a thread of its own; None: nothing new."""
        with self._lock:
            self._look()
            if self._files == self._served:
                return None
            self._served = self._files
            log_event(_LOGGER, "certificates_rotated", {"certificate": str(self._config.certificate_file)})
            return self._served.configuration()

    def refused(self) -> bool:
        """Whether the files as they are now are refused. Looks at them itself: nobody may connect for days."""
        with self._lock:
            self._look()
            return self._refused

    def _look(self) -> None:
        """Read the files if they changed, and again where they did meanwhile. The lock must be held."""
        while (stamp := _stamp(self._config)) != self._stamp:
            self._stamp = stamp
            try:
                self._files = _Files.read(self._config)
            except CertificateError as error:
                self._refused = True
                if stamp == _stamp(self._config):
                    # Else it was read while it was swapped: the certificate of one version, the key of the next.
                    log_event(_LOGGER, "certificates_refused", {"detail": str(error)}, level=logging.ERROR)
            else:
                self._refused = False


def _paths(config: TlsConfig) -> list[Path]:
    paths = [config.certificate_file, config.private_key_file, config.client_ca_file]
    return [path for path in paths if path is not None]


def _stamp(config: TlsConfig) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a file does: a rotated Secret gets other inodes, a file written in place another time."""
    return tuple(_stamp_of(path) for path in _paths(config))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{key}: {path}: {error.strerror}") from error
