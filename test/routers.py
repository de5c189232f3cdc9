"""Two servers behind each of two routers, of which one is killed in the middle of a load.

    apt-get install nginx-light  # a proxy
    python3 -m pip install 'litellm[proxy]==1.108.7' prometheus-client==0.23.1  # a router
    make && python3 test/routers.py

Every answer must be that which a server gives when it is asked alone, or an error that a client
sees: a status, or a stream that breaks off before its end, and is right so far. Requests that come
after the router has had time to notice must be answered, by the server that is left, and, when the
other is there again, by both. Exits with 1 if not. One who lacks a router is told, and the other is
tried.
"""
import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

NGINX = """
daemon off; pid nginx.pid; error_log error.log; worker_processes 1;
events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream servers {
        %s
        keepalive 16;
    }
    server {
        listen 127.0.0.1:%d;
        location / {
            proxy_pass http://servers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_buffering off;         # a token goes on when it comes
            proxy_read_timeout 600s;
            proxy_next_upstream error timeout http_503 http_429 non_idempotent;
        }
    }
}
"""

LITELLM = """
model_list:
%s
router_settings: {num_retries: 3, allowed_fails: 1, cooldown_time: 2}
general_settings: {background_health_checks: true, health_check_interval: 2}
litellm_settings: {callbacks: ["prometheus"], request_timeout: 60}
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(port, path, body=None):
    """Status and text; of a stream its text so far, and whether it came to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None,
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        if not (body and body.get("stream")) or response.status != 200:
            return response.status, response.read().decode(), True
        text, ended = "", False
        try:
            for line in response:
                data = line.decode().strip()[6:]
                if data == "[DONE]":
                    ended = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        break
                    text += "".join(c.get("text") or "" for c in event["choices"])
        except (OSError, http.client.HTTPException):
            pass
        return 200, text, ended
    finally:
        connection.close()


def wait_for(port, path, process, seconds=120):
    for _ in range(10 * seconds):
        try:
            if ask(port, path)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"nothing answers at {path}: {process.args}")


class Server:
    def __init__(self, options):
        self.options, self.port = options, free_port()
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.options.program, self.options.model, "--serve", str(self.port), "--threads", "1"],
            stderr=subprocess.DEVNULL)
        wait_for(self.port, "/health", self.process)

    def answered(self):
        metrics = ask(self.port, "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in metrics
                   if line.startswith("vllm:request_success_total"))


def request(name, i, stream):
    return {"model": name, "prompt": f"Once upon a time {i}", "max_tokens": 100, "temperature": 0,
            "stream": stream}


def judge(port, name, i, expected):
    """right, error, cut: what a client got; anything else is wrong."""
    stream = i % 2 == 1
    try:
        status, text, ended = ask(port, "/v1/completions", request(name, i, stream))
        if status != 200:
            return "error" if status >= 400 else "wrong"
        text = text if stream else json.loads(text)["choices"][0]["text"]
    except (OSError, http.client.HTTPException):
        return "error"
    if ended:
        return "right" if text == expected[i] else "wrong"
    return "cut" if expected[i].startswith(text) else "wrong"


def load(port, name, expected, numbers, clients, in_the_middle=None):
    numbers, counts, lock = list(numbers), {}, threading.Lock()
    middle = len(numbers) // 3

    def client():
        while True:
            with lock:
                if not numbers:
                    return
                i = numbers.pop()
                if in_the_middle and len(numbers) == middle:
                    threading.Timer(0.02, in_the_middle).start()
            result = judge(port, name, i, expected)
            with lock:
                counts[result] = counts.get(result, 0) + 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def start_nginx(folder, port, servers):
    rows = "\n        ".join(f"server 127.0.0.1:{s.port} max_fails=1 fail_timeout=1s;"
                             for s in servers)
    with open(f"{folder}/nginx.conf", "w") as file:
        file.write(NGINX % (rows, port))
    command = ["nginx", "-e", "error.log", "-p", folder, "-c", "nginx.conf"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL), "/health"


def start_litellm(folder, port, servers, name):
    rows = "\n".join(
        f"- model_name: {name}\n  litellm_params: {{model: text-completion-openai/{name}, "
        f"api_base: 'http://127.0.0.1:{s.port}/v1', api_key: none}}" for s in servers)
    with open(f"{folder}/litellm.yaml", "w") as file:
        file.write(LITELLM % rows)
    environment = dict(os.environ, LITELLM_LOCAL_MODEL_COST_MAP="True")
    command = [shutil.which("litellm", path=os.path.dirname(sys.executable)) or "litellm",
               "--config", f"{folder}/litellm.yaml", "--port", str(port), "--host", "127.0.0.1"]
    log = open(f"{folder}/litellm.log", "w")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment), "/health/liveliness"


def judge_router(router, options, folder):
    servers = [Server(options), Server(options)]
    name = json.loads(ask(servers[0].port, "/v1/models")[1])["data"][0]["id"]
    expected = {i: json.loads(ask(servers[0].port, "/v1/completions", request(name, i, False))[1])
                ["choices"][0]["text"] for i in range(options.requests)}
    before = [s.answered() for s in servers]
    port = free_port()
    start = start_nginx if router == "nginx" else lambda *a: start_litellm(*a, name)
    process, path = start(folder, port, servers)
    ok = True
    try:
        wait_for(port, path, process)
        shares = []

        def kill():
            shares.extend(s.answered() - b for s, b in zip(servers, before))
            servers[1].process.send_signal(signal.SIGKILL)
            servers[1].process.wait()

        during = load(port, name, expected, range(options.requests), options.clients, kill)
        time.sleep(3)
        after = load(port, name, expected, range(40), options.clients)
        servers[1].start()
        time.sleep(3)
        again = load(port, name, expected, range(40), options.clients)
        returned = servers[1].answered()
        ok = (not during.get("wrong") and after == {"right": 40} and again == {"right": 40} and
              min(shares) > 0 and returned > 0)
        print(f"{router}: {options.requests} requests, one server killed: {during}; answered before "
              f"by each {shares}; then {after}; with both again {again}, {returned:.0f} of them by "
              f"the one that came back")
        if router == "litellm":
            health = json.loads(ask(port, "/health")[1])
            metrics = ask(port, "/metrics/")[1]
            print(f"{router}: healthy {health.get('healthy_count')} of 2; metrics: "
                  f"{sum(line.startswith('litellm_') for line in metrics.splitlines())} lines")
            ok = ok and health.get("healthy_count") == 2
    finally:
        process.terminate()
        process.wait()
        for server in servers:
            server.process.kill()
            server.process.wait()
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="./dynamo")
    parser.add_argument("--model", default="model.bin")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    ok = True
    for router in ("nginx", "litellm"):
        beside = os.path.join(os.path.dirname(sys.executable), router)
        if not shutil.which(router) and not os.path.exists(beside):
            print(f"{router}: not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            good = judge_router(router, options, folder)
        print(f"{router}: {'ok' if good else 'FAIL'}")
        ok = ok and good
    sys.exit(not ok)


if __name__ == "__main__":
    main()
