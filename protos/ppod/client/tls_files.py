"""The certificates that a client reads."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from ppod.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a client's files hold, read together; PEM. Its own certificate and key, for mutual TLS: both or neither."""

    authority: bytes
    certificate: bytes | None
    key: bytes | None

    @classmethod
    def read(cls, authority: Path, certificate: Path | None, key: Path | None) -> Self:
        """Read all files, and check that they can be used.

        gRPC itself takes the public authorities where the file of them is empty, ends the process where a certificate
        is, and of other faults tells at each call that there was no handshake.

        Raises:
            InvalidArgument: a file cannot be read, is not PEM, or the key is not the certificate's.
        """
        files = cls(
            read_file("security.ca_file", authority),
            None if certificate is None else read_file("security.certificate_file", certificate),
            None if key is None else read_file("security.key_file", key),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            # What stands between the certificates is for readers, and may be of any language.
            context.load_verify_locations(cadata=files.authority.decode("ascii", "ignore"))
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument("security.ca_file", f"{authority}: {error}", "certificates in PEM") from error
        if certificate is not None:
            try:
                # With a passphrase, an empty one, or OpenSSL would ask the terminal for the key's, and wait.
                context.load_cert_chain(certificate, key, password="")
            except OSError as error:
                found, expected = (
                    f"{certificate} and {key}: {error}",
                    "both in PEM, the key its own, without a passphrase",
                )
                raise InvalidArgument("security.certificate_file and key_file", found, expected) from error
        return files

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def read_file(name: str, path: Path) -> bytes:
    """What a file holds.

    Raises:
        InvalidArgument: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(name, f"{path}: {error.strerror}", "a file that can be read") from error
