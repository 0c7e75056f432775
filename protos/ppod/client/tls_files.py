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
        files = cls._found(authority, certificate, key)
        while True:
            _check(files.authority, authority, certificate, key)
            # What is checked is in the files, which may be swapped meanwhile: those that are the same again were not.
            before, files = files, cls._found(authority, certificate, key)
            if files == before:
                return files

    @classmethod
    def _found(cls, authority: Path, certificate: Path | None, key: Path | None) -> Self:
        return cls(
            read_file("security.ca_file", authority),
            None if certificate is None else read_file("security.certificate_file", certificate),
            None if key is None else read_file("security.key_file", key),
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def _check(content: bytes, authority: Path, certificate: Path | None, key: Path | None) -> None:
    """Raise InvalidArgument where the authority's content, or the other two files, cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # What stands between the certificates is for readers, and may be of any language.
        context.load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument("security.ca_file", f"{authority}: {error}", "certificates in PEM") from error
    if certificate is not None:
        try:
            # With a passphrase, an empty one, or OpenSSL would ask the terminal for the key's, and wait.
            context.load_cert_chain(certificate, key, password="")
        except OSError as error:
            field, found = "security.certificate_file and key_file", f"{certificate} and {key}: {error}"
            raise InvalidArgument(field, found, "both in PEM, the key its own, without a passphrase") from error


def read_file(name: str, path: Path) -> bytes:
    """What a file holds.

    Raises:
        InvalidArgument: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(name, f"{path}: {error.strerror}", "a file that can be read") from error
