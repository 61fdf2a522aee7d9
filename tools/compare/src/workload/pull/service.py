# A small service: it says that it is up, then loads what services load, and answers over HTTP.
import sys, json, http.server

print("up", flush=True)

import asyncio, email.message, socket, socketserver, sqlite3, ssl, threading, urllib.request, xml.dom.minidom

SOCKET = "/run.sock"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ssl.create_default_context()
        row = sqlite3.connect(":memory:").execute("select 6 * 7, sqlite_version()").fetchone()
        body = json.dumps(row).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # The client of a unix socket has no address.
    def log_message(self, *arguments):
        pass


def ask():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(SOCKET)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while client.recv(4096):
            pass


with socketserver.UnixStreamServer(SOCKET, Handler) as server:
    if "once" in sys.argv:
        threading.Thread(target=ask).start()
        server.handle_request()
    else:
        server.serve_forever()
