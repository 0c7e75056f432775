"""The reward model behind LitServe with dynamic batching.

usage: python litserve_server.py --checkpoint DIR --port N --threads N --dtype NAME --max-batch-size N
"""

from __future__ import annotations

import sys
from pathlib import Path

import litserve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forward import Forward, server_parser

BATCH_TIMEOUT_S = 0.01


class RewardApi(litserve.LitAPI):
    """POST /predict with {"text": ...} gives {"score": ...}."""

    checkpoint = ""
    threads = 1
    dtype = "float32"

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        """Load the model in the worker."""
        self.forward = Forward(self.checkpoint, self.threads, self.dtype)

    def decode_request(self, request: dict[str, str]) -> str:
        """The text of a request."""
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        """A batch is a list of texts."""
        return inputs

    def predict(self, texts: list[str]) -> list[float]:
        """Scores of a batch."""
        return self.forward.scores(self.forward.encode(texts))

    def unbatch(self, output: list[float]) -> list[float]:
        """One score for each request."""
        return output

    def encode_response(self, output: float) -> dict[str, float]:
        """The reply."""
        return {"score": output}


def main() -> None:
    """Serve until a signal."""
    parser = server_parser(__doc__)
    parser.add_argument("--max-batch-size", type=int, required=True)
    options = parser.parse_args()
    api = RewardApi(max_batch_size=options.max_batch_size, batch_timeout=BATCH_TIMEOUT_S)
    api.checkpoint, api.threads, api.dtype = options.checkpoint, options.threads, options.dtype
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
