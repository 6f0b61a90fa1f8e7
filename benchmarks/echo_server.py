"""echo_server: the bare grpc.aio unary server that lookups are compared with: identity serializers, no metadata read.

    python -m benchmarks.echo_server SOCKET_PATH

Runs as a process of its own on uvloop, like the daemon. The first two bytes of a request (little-endian) say how many
of its bytes to send back, so that the answer has the size of the answer that it stands for. Prints a line when it
serves; ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import uvloop

METHOD = "/kvservice.bench.Echo/Unary"
REPLY_SIZE_BYTES = 2


class Echo(grpc.GenericRpcHandler):
    """Answers METHOD and nothing else."""

    def __init__(self) -> None:
        # Without serializers: bytes in, bytes out.
        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._answer)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._handler if handler_call_details.method == METHOD else None

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request[: request[0] | request[1] << 8]


async def serve(address: str) -> None:
    """Serve on a Unix socket until stdin ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    server.add_insecure_port(address)
    await server.start()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve(f"unix:{sys.argv[1]}"))
