"""nginx in front of a server: TLS, bearer token, rate limit, client certificates."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import wait_until

from genserve import TLS, Client
from genserve.serve.ports import free_ports

CACHE = Path(os.environ.get("GENSERVE_CACHE_DIR", Path.home() / ".cache" / "genserve")) / "nginx"
KEY = "Bearer right"
MAX_BODY_MB = 16
DOORS = ("open", "limited", "limited_grpc", "mutual")

CONFIGURATION = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    log_format short '$status $server_protocol $uri';
    access_log {folder}/access.log short;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    ssl_certificate {folder}/server.pem;
    ssl_certificate_key {folder}/server.pem;
    client_max_body_size {max_body_mb}m;
    grpc_buffer_size 64k;
    map $http_authorization $refusal {{ default 403; "" 401; "{key}" ""; }}
    limit_req_zone $server_port zone=slow:1m rate=1r/s;
    limit_req_status 429;

    # One port serves both protocols: HTTP below a prefix, gRPC below its service name.
    server {{
        listen 127.0.0.1:{open} ssl http2;
        if ($refusal = 401) {{ return 401; }}
        if ($refusal = 403) {{ return 403; }}
        location /genserve/ {{ proxy_pass http://127.0.0.1:{http}/; }}
        location /inference.GRPCInferenceService/ {{ grpc_pass grpc://127.0.0.1:{grpc}; }}
    }}
    # Rate limit of one request per second; nginx rejects gRPC requests in plain HTTP.
    server {{
        listen 127.0.0.1:{limited} ssl http2;
        add_header Retry-After 1 always;
        limit_req zone=slow;
        location /genserve/ {{ proxy_pass http://127.0.0.1:{http}/; }}
        location /inference.GRPCInferenceService/ {{ grpc_pass grpc://127.0.0.1:{grpc}; }}
    }}
    # The same limit, with rejections in gRPC.
    server {{
        listen 127.0.0.1:{limited_grpc} ssl http2;
        limit_req zone=slow;
        error_page 429 = @too_many;
        location /inference.GRPCInferenceService/ {{ grpc_pass grpc://127.0.0.1:{grpc}; }}
        location @too_many {{
            default_type application/grpc;
            add_header grpc-status 8;
            add_header grpc-message "too many requests";
            add_header Retry-After 1;
            return 204;
        }}
    }}
    # Client certificates required.
    server {{
        listen 127.0.0.1:{mutual} ssl http2;
        ssl_client_certificate {folder}/ca.pem;
        ssl_verify_client on;
        location /genserve/ {{ proxy_pass http://127.0.0.1:{http}/; }}
        location /inference.GRPCInferenceService/ {{ grpc_pass grpc://127.0.0.1:{grpc}; }}
    }}
}}
"""


def find_nginx() -> str:
    """Return the nginx on PATH, else Debian's, fetched without root. Skip the test without either."""
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed:
        return installed
    fetched = CACHE / "usr" / "sbin" / "nginx"
    if not fetched.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "nginx"], cwd=CACHE, check=True, capture_output=True, timeout=60)
            (package,) = CACHE.glob("nginx_*.deb")
            subprocess.run(["dpkg", "-x", package, CACHE], check=True, capture_output=True, timeout=60)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            pytest.skip(f"no nginx on PATH, and Debian's cannot be fetched: {error}")
    return str(fetched)


class Nginx:
    """nginx in front of a server's HTTP and gRPC ports, with its files in one folder."""

    def __init__(self, folder: Path, *, http_port: int, grpc_port: int) -> None:
        self.folder = folder
        self.ports = dict(zip(DOORS, free_ports(len(DOORS)), strict=True))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
        caller = authority.issue_cert("caller")
        caller.private_key_pem.write_to_path(folder / "caller.key")
        caller.cert_chain_pems[0].write_to_path(folder / "caller.pem")
        (folder / "nginx.conf").write_text(
            CONFIGURATION.format(
                user="user root;" if os.getuid() == 0 else "",
                folder=folder,
                max_body_mb=MAX_BODY_MB,
                key=KEY,
                http=http_port,
                grpc=grpc_port,
                **self.ports,
            )
        )

    def url(self, protocol: str, door: str = "open") -> str:
        port = self.ports[door]
        return f"https://localhost:{port}/genserve" if protocol == "http" else f"grpcs://localhost:{port}"

    @property
    def tls(self) -> TLS:
        return TLS(ca=self.folder / "ca.pem")

    @property
    def callers_tls(self) -> TLS:
        return TLS(self.folder / "ca.pem", self.folder / "caller.pem", self.folder / "caller.key")

    def client(self, protocol: str, door: str = "open", **options: Any) -> Client:
        return Client(self.url(protocol, door), **{"tls": self.tls, "headers": {"Authorization": KEY}, **options})

    def answers(self, status: int, path: str) -> int:
        """Return the number of requests below a path that got the status."""
        lines = [line.split() for line in (self.folder / "access.log").read_text().splitlines()]
        return sum(line[0] == str(status) and line[2].startswith(path) for line in lines)

    def is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.ports["open"]), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def running_nginx(folder: Path, *, http_port: int, grpc_port: int) -> Iterator[Nginx]:
    """Run nginx within the block."""
    binary = find_nginx()
    nginx = Nginx(folder, http_port=http_port, grpc_port=grpc_port)
    command = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or nginx.is_listening(), what="nginx to listen")
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield nginx
        finally:
            process.terminate()
