"""A network cable on loopback that can be pulled."""

import contextlib
import socket
import threading
from typing import Self


class Cable:
    """Carries connections to ``port`` from a port of its own, which a device calls instead."""

    def __init__(self, port: int) -> None:
        self._far = port
        self._ends: list[socket.socket] = []
        self._whole = threading.Event()
        self._whole.set()
        self._closed = False
        self._listen(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._whole.set()
        self.sever()

    @property
    def port(self) -> int:
        return self._port

    def pull(self) -> None:
        """Carry nothing any more; connections stay, and what is sent waits, as on a bad line."""
        self._whole.clear()

    def plug(self) -> None:
        """Carry what was waiting, and what follows."""
        self._whole.set()

    def sever(self) -> None:
        """End all connections and take no others, as a router does that was switched off."""
        self._shut(self._listener)
        for end in self._ends:
            self._shut(end)
        self._ends.clear()

    def mend(self) -> None:
        """Take connections again."""
        self._listen(self._port)

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._port: int = self._listener.getsockname()[1]
        self._in_thread(self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._far))
                except OSError:  # no server: nor is there one for the device
                    near.close()
                    continue
                self._ends += [near, far]
                self._in_thread(self._carry, near, far)
                self._in_thread(self._carry, far, near)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._whole.wait()
                sink.sendall(data)
        for end in (source, sink):
            self._shut(end)

    def _shut(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it in another thread
        end.close()

    def _in_thread(self, work: object, *arguments: socket.socket) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]
