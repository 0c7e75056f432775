"""Certificates for tests of TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and files of what it issued."""

    ca: trustme.CA
    directory: Path

    def issue(self, name: str) -> dict[str, str]:
        """Write certificate and key of 127.0.0.1; returns the configuration of a port with them."""
        issued = self.ca.issue_cert("127.0.0.1", "localhost")
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return {"certificate_file": str(certificate), "private_key_file": str(key)}

    @property
    def root(self) -> bytes:
        return self.ca.cert_pem.bytes()

    def root_file(self) -> str:
        path = self.directory / "ca.crt"
        path.write_bytes(self.root)
        return str(path)

    def server(self) -> grpc.ServerCredentials:
        """Credentials of a server at 127.0.0.1."""
        issued = self.ca.issue_cert("127.0.0.1")
        return grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())])

    def client(self) -> grpc.ChannelCredentials:
        """Credentials of a caller that this authority vouches for."""
        issued = self.ca.issue_cert("trainer")
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.root, issued.private_key_pem.bytes(), chain)
