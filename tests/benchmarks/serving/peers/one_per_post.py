"""A FastAPI reward server as OpenRLHF's remote reward protocol calls one: POST /get_reward, one sample a request.

usage: python one_per_post.py --checkpoint DIR --port N --threads N --dtype NAME

Request {"query": [text], ...}, reply {"rewards": [score]}, after OpenRLHF's examples of remote reward models.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forward import Forward, server_parser


class Query(BaseModel):
    """Texts of prompt and response together."""

    query: list[str]


def main() -> None:
    """Serve until a signal."""
    options = server_parser(__doc__).parse_args()
    forward = Forward(options.checkpoint, options.threads, options.dtype)
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(query: Query) -> dict[str, list[float]]:
        return {"rewards": forward.scores(forward.encode(query.query))}

    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", timeout_keep_alive=600)


if __name__ == "__main__":
    main()
