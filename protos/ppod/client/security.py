"""How a client proves who it is, and knows whom it talks to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ppod.channel import is_local
from ppod.client.tls_files import TlsFiles, read_file
from ppod.errors import InvalidArgument

TOKEN_VARIABLE = "PPOD_TOKEN"
ADMIN_TOKEN_VARIABLE = "PPOD_ADMIN_TOKEN"
_FILE = "_FILE"


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """TLS and a team's token. All empty: plain text, anonymous.

    Attributes:
        ca_file: PEM certificates that the server's must descend from; makes the connection TLS.
        certificate_file, key_file: PEM of the client's own certificate, for servers that ask for one (mutual TLS).
        server_name: name in the server's certificate, where it is not the target's host.
        token: sent with each call as `authorization: Bearer TOKEN`. Never shown in a repr.
        plain_text_token: send the token without TLS to any host; otherwise only to this machine.
    """

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    token: str = field(default="", repr=False)
    plain_text_token: bool = False

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise InvalidArgument("security", "one of certificate_file and key_file", "both or none")
        if self.certificate_file is not None and self.ca_file is None:
            raise InvalidArgument("security.ca_file", "none", "a file: a client certificate needs TLS")
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise InvalidArgument("security.token", "other characters", "printable ASCII without spaces")

    @classmethod
    def from_environment(
        cls,
        *,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        server_name: str = "",
        plain_text_token: bool = False,
        administrator: bool = False,
    ) -> ClientSecurity:
        """Files as given, and the token from PPOD_TOKEN or from the file that PPOD_TOKEN_FILE names.

        Args:
            administrator: for an administration port: the token of PPOD_ADMIN_TOKEN, or of the file that
                PPOD_ADMIN_TOKEN_FILE names, where one of them is set.

        Raises:
            InvalidArgument: a variable is set beside that of its file, or the file cannot be read or is empty.
        """
        token = _read_token(os.environ, ADMIN_TOKEN_VARIABLE) if administrator else ""
        token = token or _read_token(os.environ, TOKEN_VARIABLE)
        return cls(ca_file, certificate_file, key_file, server_name, token, plain_text_token)

    def check_target(self, target: str) -> None:
        """Raise InvalidArgument when the token would travel in plain text to another machine."""
        if self.token and self.ca_file is None and not self.plain_text_token and not is_local(target):
            raise InvalidArgument(
                "security.token",
                f"a token for {target} without TLS",
                "ca_file, or plain_text_token where the network is trusted (a service mesh encrypts by itself)",
            )

    def files(self) -> TlsFiles | None:
        """The files as they are now; None: plain text.

        Raises:
            InvalidArgument: one cannot be read or used.
        """
        return None if self.ca_file is None else TlsFiles.read(self.ca_file, self.certificate_file, self.key_file)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials from the files as they are now; None: plain text. Raises as `files`."""
        files = self.files()
        return None if files is None else files.credentials()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries. gRPC's own call credentials would refuse plain text even on this machine."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def _read_token(environment: Mapping[str, str], variable: str) -> str:
    file_variable = variable + _FILE
    token, path = environment.get(variable, ""), environment.get(file_variable, "")
    if token and path:
        raise InvalidArgument("security.token", f"{variable} and {file_variable}", "one of the two")
    if not path:
        return token
    content = read_file(file_variable, Path(path)).decode(errors="replace").strip()
    if not content:
        raise InvalidArgument(file_variable, f"{path}, which is empty", "a file that holds a token")
    return content
