"""A rank's process without a model, for tests of its supervisor. It imports nothing of ours: it starts in milliseconds.

After the HTTP process's address come the starts, each as words that it does; the last one is that of all later ones.

    serve       report that it serves
    ending      report that it ends on purpose
    exit:N      end
    kill        die by SIGKILL
    fork        start a process that holds every file open for a while
    obey        end by a second signal, `Leave`, `EndFailed` and the supervisor's death, and print which
    hang        listen to nobody
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time


def report(kind: str, **fields: object) -> None:
    link.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")


def end(text: str) -> None:
    print("rank:", text, flush=True)
    report("Ending")
    os._exit(1)


def obey() -> None:
    num_signals = 0
    for line in lines:
        command = json.loads(line)
        num_signals += command["kind"] == "PassSignal"
        if command["kind"] == "Leave":
            print("rank: leaves", flush=True)
            report("Ending")
            os._exit(0)
        if command["kind"] == "EndFailed" or num_signals == 2:
            end(command.get("reason") or f"a second {command['name']}")
    print("rank: its supervisor has died", flush=True)
    os._exit(1)


link = socket.socket(fileno=0)
lines = link.makefile("rb")
begin = json.loads(lines.readline())
hub = {"address": json.loads(sys.argv[1]), "token": "token"}
number = (begin["rejoin"] or {"num_restarts": 0})["num_restarts"]
scripts = sys.argv[2:]
for word in scripts[min(number, len(scripts) - 1)].split():
    what, _, value = word.partition(":")
    match what:
        case "serve":
            report("Serving", hub=hub)
        case "ending":
            report("Ending")
        case "exit":
            os._exit(int(value))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "fork":
            subprocess.Popen(["sleep", "20"], close_fds=False)
        case "obey":
            obey()
        case "hang":
            time.sleep(60)
